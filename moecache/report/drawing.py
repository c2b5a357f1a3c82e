"""What all pictures share: texts that are safe in a page, figures with sensible digits, SVG parts."""

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from moecache.schemas.printing import printable

COLOURS = 8  # classes c0 … c7 of the page
LONGEST = 300  # characters of a text


def text(value: object, longest: int = LONGEST) -> str:
    """Of a stranger's file, safe between tags and in double quotes, cut to so many characters."""
    shown = printable(value)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return escape(shown, {'"': "&quot;", "'": "&#39;"})


def digits(value: float, count: int = 3) -> str:
    """So many significant digits, trailing zeros included, and every digit before the point."""
    if not value:
        return "0"
    power = int(f"{value:.{count - 1}e}".partition("e")[2])  # after rounding: 0.9997 is 1.00
    return f"{value:.{max(0, count - 1 - power)}f}"


def duration(us: float, count: int = 3) -> str:
    """In the unit that has at most three digits before the point."""
    unit, size = ("µs", 1.0) if us < 999.5 else ("ms", 1e3) if us < 999.5e3 else ("s", 1e6)
    return f"{digits(us / size, count)} {unit}"


def faster(gain: float) -> str:
    """A gain over something in per cent, as a multiple where it is twice as fast or more."""
    if gain >= 1:
        return f"{digits(1 + gain)}×"
    return f"{100 * gain:+.{0 if abs(gain) >= 0.0995 else 1}f} %" if abs(gain) >= 0.0005 else "0 %"


def colour(variant: str, colours: Sequence[str]) -> str:
    """The class of a variant; after the last hue they begin again, paler."""
    at = colours.index(variant)
    return f"c{at % COLOURS}" + (" again" if at >= COLOURS else "")


def short(tokens: int) -> str:
    """2048 as 2k."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A picture of that size with a name for those who cannot see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
    return "\n".join([f"{head} aria-label={quoteattr(title)}>", *parts, "</svg>"])


def label(x: float, y: float, shown: str, kind: str = "", tip: str = "", room: float = 0) -> str:
    """A text whose base line starts, ends or is centred there, squeezed into so much room. `shown` is safe already."""
    inner = f"<title>{tip}</title>{shown}" if tip else shown
    tight = f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"' if room else ""
    return f'<text{f" class={quoteattr(kind)}" if kind else ""} x="{x:.1f}" y="{y:.1f}"{tight}>{inner}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
