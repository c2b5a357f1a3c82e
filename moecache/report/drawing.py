"""What all pictures share: texts that are safe in a page, figures with sensible digits, SVG parts."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from moecache.schemas.errors import printable

COLOURS = 8  # classes c0 … c7 of the page
LONGEST = 300  # characters of a text


def text(value: object, longest: int = LONGEST) -> Markup:
    """Of a stranger's file, safe between tags and in quotes, cut to so many characters; markup as it is."""
    if isinstance(value, Markup):
        return value
    shown = printable(value)
    return escape(shown if len(shown) <= longest else shown[: longest - 1] + "…")


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


def times(value: float) -> str:
    """A multiple in three digits."""
    return f"{digits(value)}×"


def colour(variant: str, colours: Sequence[str]) -> str:
    """The class of a variant; after the last hue they begin again, paler."""
    at = colours.index(variant)
    return f"c{at % COLOURS}" + (" again" if at >= COLOURS else "")


def short(tokens: int) -> str:
    """2048 as 2k."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def element(tag: str, *inside: object, kind: str = "", **attributes: object) -> Markup:
    """An element of class `kind`: everything in it goes through `text`, a float gets one digit after the point."""
    given: dict[str, object] = {"class": kind} if kind else {}
    given |= {n.replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else v for n, v in attributes.items()}
    head = Markup("<") + tag + Markup("").join(Markup(' {}="{}"').format(n, text(v)) for n, v in given.items())
    return head + (Markup(">{}</{}>").format(Markup("").join(map(text, inside)), tag) if inside else Markup("/>"))


def svg(width: float, height: float, title: str, parts: Sequence[Markup]) -> Markup:
    """A picture of that size with a name for those who cannot see it."""
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}"}
    inside = Markup("\n").join(parts)
    return element("svg", inside, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=title, **size)


def label(x: float, y: float, shown: object, kind: str = "", tip: str = "", room: float = 0) -> Markup:
    """A text whose base line starts, ends or is centred there, squeezed into so much room."""
    inside = [element("title", tip), shown] if tip else [shown]
    tight: dict[str, object] = {"textLength": round(room), "lengthAdjust": "spacingAndGlyphs"} if room else {}
    return element("text", *inside, kind=kind, x=x, y=y, **tight)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", kind=kind, x1=x1, y1=y1, x2=x2, y2=y2)
