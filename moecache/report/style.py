"""How a page looks. One hue a variant, from Okabe and Ito's palette, which colour-blind readers can tell apart."""

HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f")
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff;
  --even: #1f2328; --uneven: #59636e; --skewed: #8c959f; --hot: #afb8c1; --accent: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --paper: #0d1117;
    --even: #f0f6fc; --uneven: #9ea7b1; --skewed: #7d8690; --hot: #59626c; --accent: #56b4e9 }
}
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
  max-width: 1104px; padding: 0 1em }
h1 { font-size: 22px; margin-bottom: .2em; overflow-wrap: anywhere } h2 { font-size: 17px; margin: 2em 0 .4em }
h3 { font-size: 14px; margin: 0; display: inline; overflow-wrap: anywhere }
p { margin: .2em 0 .6em } .note { color: var(--soft); font-size: 12px; overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: 1.4em 24px; margin: 1em 0 } figure { margin: 0; max-width: 100% }
.row figure { width: 350px }
.wide { overflow-x: auto; max-width: 100% } figcaption { font-weight: 600 }
figcaption span { display: block; font-weight: 400; font-size: 12px; color: var(--soft) }
.tile { flex: 1 1 190px; border: 1px solid var(--line); border-radius: 6px; padding: .5em .8em }
.tile b { display: block; font-size: 24px; line-height: 1.3 } .tile span { font-size: 12px; color: var(--soft) }
details { margin: .3em 0 } summary { cursor: pointer } .layer { margin-top: 1.6em }
.layer:not([open]) { margin-top: .5em }
details details summary { font-size: 12px; color: var(--soft) }
svg { max-width: none; display: block } svg text { font: 11px system-ui, sans-serif; fill: var(--ink) }
svg .name { font-weight: 600 } svg .small { font-size: 10.5px } svg .soft { fill: var(--soft); font-size: 10.5px }
svg a text { fill: var(--accent) } rect.again { fill-opacity: .2 }
.halo { stroke: var(--paper); stroke-width: 3; paint-order: stroke; stroke-linejoin: round }
.end { text-anchor: end } .mid { text-anchor: middle }
.level, .lead { stroke: var(--line) } .lead { stroke-dasharray: 2 3 } .limit { stroke: var(--soft); stroke-width: 1.5 }
rect { fill-opacity: .5 } .guessed { stroke-dasharray: 3 2 } .dot { stroke: var(--paper) }
.part { stroke: var(--paper); stroke-width: .5 }
.failed { fill: none; stroke: var(--line); stroke-dasharray: 4 3 } .bar { fill: var(--accent) }
.spot { fill: var(--accent); fill-opacity: .45 } .mean { stroke: var(--ink); stroke-width: 2 }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.even { stroke: var(--even) } .uneven { stroke: var(--uneven) } .skewed { stroke: var(--skewed) }
.hot { stroke: var(--hot) } .half { stroke-dasharray: 7 3 } .few { stroke-dasharray: 2 3 }
table { border-collapse: collapse; font-size: 12px } th { text-align: left; color: var(--soft) }
td, th { padding: 2px 12px 2px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td a { color: var(--accent) }
td.long { overflow-wrap: anywhere; min-width: 260px }
""" + "\n".join(f".c{k} {{ fill: {hue}; stroke: {hue} }}" for k, hue in enumerate(HUES))
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a reader's browser loads nothing, whatever stands here
