"""Charts as SVG text: groups of bars on a logarithmic scale, and bars of parts. It must not know what is drawn.

Nothing but text is made, so the same values give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

# By Okabe and Ito: told apart in print and by readers who do not see all colours.
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#000000")
_WIDTH, _HEIGHT = 960, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 16, 64, 56
_ROW_HEIGHT = 22
_LABELS = 250
_LETTER = 7  # pixels that a letter takes at most


class ChartError(ValueError):
    """These values cannot be drawn."""


@dataclass(frozen=True, slots=True)
class Series:
    """Bars of one colour: a value for each group, None where there is none."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class LogScale:
    """A logarithmic scale from `10 ** low` at 0 to `10 ** high` at `length`."""

    low: int
    high: int
    length: float

    @classmethod
    def around(cls, values: Sequence[float], length: float) -> LogScale:
        """Whole decades that hold all values, the smallest of them with a bar of its own.

        Raises:
            ChartError: there are none, or one of them has no logarithm.
        """
        if not values or min(values) <= 0:
            raise ChartError("a logarithmic scale takes positive values, and at least one")
        low = ceil(log10(min(values))) - 1
        return cls(low, max(low + 1, ceil(log10(max(values)))), length)

    def position(self, value: float) -> float:
        """How far along the scale the value is."""
        return (log10(value) - self.low) / (self.high - self.low) * self.length

    def ticks(self) -> Iterator[tuple[float, float]]:
        """Value and position of each decade."""
        for exponent in range(self.low, self.high + 1):
            value = 10.0**exponent
            yield value, self.position(value)


def log_bars(title: str, unit: str, groups: Sequence[str], series: Sequence[Series]) -> str:
    """Bars in groups, on a logarithmic scale.

    Args:
        title: what is shown.
        unit: of the values.
        groups: names below the groups.
        series: the bars, in their order within a group; a series without any value is left out.

    Returns:
        An SVG document.

    Raises:
        ChartError: a series has another number of values than there are groups, or a value is not positive.
    """
    if any(len(each.values) != len(groups) for each in series):
        raise ChartError("a series needs a value, or None, for each group")
    shown = [each for each in series if any(value is not None for value in each.values)]
    values = [value for each in shown for value in each.values if value is not None]
    height = _HEIGHT - _TOP - _BOTTOM
    scale = LogScale.around(values, height)
    base = _TOP + height
    parts = [*_legend([each.name for each in shown])]
    for value, at in scale.ticks():
        y = base - at
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, short(value), anchor="end"))
    group_width = (_WIDTH - _LEFT - _RIGHT) / len(groups)
    bar_width = 0.8 * group_width / len(shown)
    for index, name in enumerate(groups):
        left = _LEFT + (index + 0.1) * group_width
        parts.append(_text(left + 0.4 * group_width, base + 18, name, anchor="middle"))
        for number, each in enumerate(shown):
            value_here = each.values[index]
            if value_here is None:
                continue
            tall = scale.position(value_here)
            parts.append(
                f'<rect x="{left + number * bar_width:.1f}" y="{base - tall:.1f}" width="{bar_width:.1f}" '
                f'height="{tall:.1f}" fill="{_colour(number)}">'
                f"<title>{escape(f'{name}, {each.name}: {short(value_here)} {unit}')}</title></rect>"
            )
    parts.append(_text(_LEFT, _HEIGHT - 12, f"{unit}, logarithmic scale", anchor="start"))
    return _document(title, _WIDTH, _HEIGHT, parts)


def share_bars(title: str, parts_of: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], note: str = "") -> str:
    """A horizontal bar for each row, as long as all others, divided as its values are.

    Args:
        title: what is shown.
        parts_of: names of the parts.
        rows: a name and as many values, none negative and not all 0.
        note: stands below.

    Raises:
        ChartError: the values of a row cannot be shares.
    """
    width = _WIDTH - _LABELS - _RIGHT
    parts = [*_legend(parts_of)]
    for index, (name, values) in enumerate(rows):
        total = sum(values)
        if len(values) != len(parts_of) or min(values) < 0 or total <= 0:
            raise ChartError(f"{name}: no shares of a whole: {values}")
        y = _TOP + index * _ROW_HEIGHT
        parts.append(_text(_LABELS - 8, y + 13, name, anchor="end"))
        x = float(_LABELS)
        for number, value in enumerate(values):
            long = value / total * width
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{_ROW_HEIGHT - 5}" fill="{_colour(number)}">'
                f"<title>{escape(f'{name}: {parts_of[number]} {value / total:.1%}')}</title></rect>"
            )
            x += long
    height = _TOP + len(rows) * _ROW_HEIGHT + 32
    parts.append(_text(_LABELS, height - 10, note, anchor="start"))
    return _document(title, _WIDTH, height, parts)


def short(value: float) -> str:
    """A number for people, of about three digits: 0.05, 12.3, 4,560, 1.2M."""
    if value >= 1e6:
        return f"{value / 1e6:,.3g}M" if value < 1e9 else f"{value / 1e9:,.3g}G"
    if value >= 100:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    digits = max(0, 2 - floor(log10(abs(value))))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = _LEFT
    for number, name in enumerate(names):
        yield f'<rect x="{x}" y="36" width="12" height="12" fill="{_colour(number)}"/>'
        yield _text(x + 16, 46, name, anchor="start")
        x += 34 + _LETTER * len(name)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _document(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    size = f'width="{width}" height="{height}"'
    fonts = 'font-family="sans-serif" font-size="12"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" {fonts}>',
        f'<rect {size} fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
