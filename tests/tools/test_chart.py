"""Charts: where the bars of a logarithmic scale end, what the document says, and what cannot be drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from tools.chart import COLOURS, ChartError, LogScale, Series, log_bars, share_bars, short

SVG = "{http://www.w3.org/2000/svg}"


def bars(document: str) -> list[dict[str, str]]:
    """The attributes of all rectangles that have a tooltip, and the tooltip."""
    found = []
    for rect in ET.fromstring(document).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            found.append({**rect.attrib, "title": title.text or ""})
    return found


def test_a_decade_is_as_long_as_any_other() -> None:
    scale = LogScale.around([3.0, 4500.0], 400)
    assert (scale.low, scale.high) == (0, 4)
    assert [scale.position(10.0**exponent) for exponent in range(5)] == pytest.approx([0, 100, 200, 300, 400])
    assert list(scale.ticks())[2] == pytest.approx((100, 200))


@pytest.mark.parametrize(
    ("values", "low", "high"), [([1.0], -1, 0), ([10.0, 10.0], 0, 1), ([0.01], -3, -2), ([9.99, 10.01], 0, 2)]
)
def test_the_smallest_value_has_a_bar_too(values: list[float], low: int, high: int) -> None:
    scale = LogScale.around(values, 100)
    assert (scale.low, scale.high) == (low, high)
    assert 0 < scale.position(min(values)) <= scale.position(max(values)) <= 100


@pytest.mark.parametrize("values", [[], [0.0], [1.0, -2.0]])
def test_what_has_no_logarithm_is_refused(values: list[float]) -> None:
    with pytest.raises(ChartError):
        LogScale.around(values, 100)


def test_bars_stand_in_groups_in_the_order_of_the_series() -> None:
    document = log_bars(
        "A <b> & more",
        "ns",
        ["in", "out"],
        [Series("bt", (10.0, None)), Series("none", (None, None)), Series("trap", (1000.0, 100.0))],
    )
    root = ET.fromstring(document)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0] == "A <b> & more"
    assert "none" not in texts
    assert {"bt", "trap", "in", "out", "1,000"} <= set(texts)
    first, second, third = bars(document)
    assert [bar["title"] for bar in (first, second, third)] == [
        "in, bt: 10 ns",
        "in, trap: 1,000 ns",
        "out, trap: 100 ns",
    ]
    assert [bar["fill"] for bar in (first, second, third)] == [COLOURS[0], COLOURS[1], COLOURS[1]]
    assert float(first["x"]) < float(second["x"]) < float(third["x"])
    assert float(second["height"]) == pytest.approx(3 * float(first["height"]))
    assert {float(bar["y"]) + float(bar["height"]) for bar in (first, second, third)} == {364.0}


def test_a_series_has_a_value_for_each_group() -> None:
    with pytest.raises(ChartError, match="for each group"):
        log_bars("", "", ["a", "b"], [Series("s", (1.0,))])


def test_shares_fill_their_row() -> None:
    document = share_bars("t", ("guest", "VMM"), [("a", (1.0, 3.0)), ("b", (0.0, 5.0))])
    first, second, third, fourth = bars(document)
    assert first["title"] == "a: guest 25.0%"
    assert float(second["width"]) == pytest.approx(3 * float(first["width"]), abs=0.2)
    assert float(second["x"]) == pytest.approx(float(first["x"]) + float(first["width"]), abs=0.2)
    assert (float(third["width"]), fourth["title"]) == (0, "b: VMM 100.0%")
    assert float(third["y"]) > float(first["y"])
    for wrong in ((1.0,), (-1.0, 2.0), (0.0, 0.0)):
        with pytest.raises(ChartError, match="no shares"):
            share_bars("t", ("guest", "VMM"), [("a", wrong)])


def test_the_same_values_give_the_same_bytes() -> None:
    made = {log_bars("t", "u", ["a"], [Series("s", (12.5,))]) for _ in range(3)}
    assert len(made) == 1
    assert re.match(r"<svg .*</svg>\n$", made.pop(), re.DOTALL)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01, "0.01"), (0.0526, "0.0526"), (1, "1"), (1.25, "1.25"), (20, "20"), (12.34, "12.3"),
     (99.96, "100"), (100, "100"), (4560, "4,560"), (999_999, "999,999"), (1_234_567, "1.23M"), (5e9, "5G")],
)  # fmt: skip
def test_numbers_for_people(value: float, text: str) -> None:
    assert short(value) == text
