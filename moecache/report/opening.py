"""What a page begins with: the headline figures, then the pictures of all layers at once."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from moecache.report import overview
from moecache.report.drawing import digits, faster, text
from moecache.report.figures import Panel, Report, Share, Source
from moecache.report.overview import Strip
from moecache.text import counted

LISTED = 40  # rows of a picture
SAID = {
    "measured": "measured, one is best", "tie": "measured, a tie", "failures": "nothing usable",
    "predicted": "predicted only", "wanted": "met, not measured yet",
}  # fmt: skip
BELOW = "below 1× fewer experts were active than balanced routing has, which the limit counts, or caches kept weights"
Colours = Mapping[str, Sequence[str]]  # op -> its variants
Numbered = tuple[int, Panel]
Picture = tuple[str, str, str]  # title, what it shows, the picture or nothing


def origin(report: Report) -> str:
    """Where the timings come from, in a line."""
    said = [f"Timings of {len(report.sources)} environments, listed at the end"] if len(report.sources) > 1 else []
    if len(report.sources) == 1:
        where = report.sources[0].environment
        versions = (f"{name} {version}" for name, version in (
            ("driver", where.driver), ("torch", where.torch), ("Triton", where.triton)) if version)  # fmt: skip
        said += [where.device_name or "unknown device", *versions, *_when(report.sources[0])]
    devices = dict.fromkeys(panel.device for panel in report.panels if panel.predicted)
    said += [f"predicted for {', '.join(devices)}"] if devices else []
    return f"<p>{text(' · '.join(said))}</p>" if said else ""


def _when(source: Source) -> list[str]:
    days = list(dict.fromkeys(filter(None, (source.first, source.last))))
    return [f"measured {' to '.join(days)}"] if days else []


def tiles(report: Report) -> list[str]:
    over, gains, regrets = report.shares("close"), report.shares("gain"), report.shares("regret")
    tried = sum(count for _, count in report.statuses)
    measured = sum(len(panel.cells) for panel in report.panels if not panel.predicted)
    tiles = []
    if over:
        more = f"time ÷ limit, geometric mean of {counted(len(over), 'problem')} with most experts active (a0)"
        ends = f"from {digits(min(over), 2)}× to {digits(max(over), 2)}×"
        ends += f"; {BELOW}" if min(over) < 0.995 else ""
        tiles.append((f"{overview.times(overview.mean_ratio(over))} the limit", f"{more}; {ends}"))
    if gains:
        kept = sum(cell.default for cell in report.cells)
        of = counted(measured, "problem")
        more = f"geometric mean; most {faster(max(gains))}; the default itself wins {kept} of {of}"
        gain = overview.gained(overview.mean_ratio([1 + gain for gain in gains]))
        tiles.append((gain, f"faster than the static default, {more}"))
    if regrets:
        most = f"most {100 * max(regrets):.2g} %"
        more = f"slower than the best timing, mean; {most}: what calling close timings a tie costs"
        tiles.append((f"{100 * fmean(regrets):.2g} % regret", more))
    if measured:
        tiles.append(
            (
                counted(measured, "problem"),
                f"measured, by {counted(tried, 'timing')} of {tried / measured:.1f} candidates each",
            )
        )
    if guessed := len(report.cells) - measured:
        tiles.append((f"{guessed} predicted", "by a model: nobody has measured these problems"))
    return ['<div class="row">', *(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles), "</div>"]


def pictures(report: Report, colours: Colours) -> list[str]:
    drawn: list[Picture] = []
    for op, variants in colours.items():
        cells = [cell for panel in report.panels if panel.op == op for cell in panel.cells]
        drawn.append((f"What wins: {text(op)}", "share of problems", overview.columns(cells, variants)))
    states = [(SAID[name], count) for name, count in report.states]
    elsewhere = "in another environment, measured means unverified" if report.sources else ""
    drawn.append(("Problems by tier", elsewhere, overview.counts(states, "problems by tier")))
    if set(dict(report.statuses)) - {"ok"}:
        drawn.append(("Timings by status", "", overview.counts(report.statuses, "timings by status")))
    return [*_row(drawn), *_row(_distances(report))]


def _distances(report: Report) -> list[Picture]:
    """How far from the limit, how much before the default, and what choosing cost, layer by layer."""
    measured = [(k, panel) for k, panel in enumerate(report.panels) if not panel.predicted]
    gains = [(name, to, [1 + gain for gain in row]) for name, to, row in _strips(measured, "gain")]
    mean = "bar and figure: geometric mean"
    drawn = [
        _over("Time over the limit", "", measured),
        ("Gain over the default", f"its time ÷ the winner’s; {mean}", overview.ratios(gains, "gain", overview.gained)),
        ("Regret of the choices", "time lost to the best one; bar and figure: mean",
         overview.percents(_strips(measured, "regret"), "regret")),
    ]  # fmt: skip
    for op in dict.fromkeys(panel.op for panel in report.panels if panel.predicted):
        guessed = [(k, panel) for k, panel in enumerate(report.panels) if panel.predicted and panel.op == op]
        drawn.append(_over(f"Predicted: {text(op)}", "÷ limit; ", guessed))
    return drawn


def _over(title: str, what: str, panels: Sequence[Numbered]) -> Picture:
    picture = overview.ratios(_strips(panels, "close"), "time over the limit", overview.times)
    return title, f"{what}most experts active; bar: geometric mean", picture


def _strips(panels: Sequence[Numbered], name: Share) -> list[Strip]:
    """As many as are still read; the layers themselves are all there below."""
    found: list[Strip] = [(panel.title, f"l{k}", panel.shares(name)) for k, panel in panels if panel.shares(name)]
    return found[:LISTED]


def _row(pictures: Sequence[Picture]) -> list[str]:
    figures = [_figure(*picture) for picture in pictures if picture[2]]
    return ['<div class="row">', *figures, "</div>"] if figures else []


def _figure(name: str, about: str, picture: str) -> str:
    more = f"<span>{about}</span>" if about else ""
    return f'<figure><figcaption>{name}{more}</figcaption><div class="wide">{picture}</div></figure>'
