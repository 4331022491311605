"""`--vmm hybrid` as users start it: the same run as under bt, and what is said of it at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guests import images
from tests.system.trapgate import run


def statistics_of(engine: str, image: str, append: str, report: Path) -> dict[str, int | float | str]:
    """Boot to the end; what is counted then."""
    words = ("--vmm", engine, "--gdb", "none", "--append", append, "--json-stats", str(report))
    done = run("run", images.path(image), *words)
    assert done.returncode == 0, done.stderr
    statistics: dict[str, int | float | str] = json.loads(report.read_text())["statistics"]
    return statistics


@pytest.mark.parametrize(
    ("image", "append"),
    [("demo", "quiet run=ps;pgfault;sleep 20;poweroff"), ("nano", "patched_code=12000 in=3000 pte=3000")],
)
def test_a_boot_to_the_end_is_the_same_run(image: str, append: str, tmp_path: Path) -> None:
    bt = statistics_of("bt", image, append, tmp_path / "bt.json")
    hybrid = statistics_of("hybrid", image, append, tmp_path / "hybrid.json")
    assert hybrid["engine"] == "hybrid"
    for name in ("icount", "virtual_ns", "interrupts", "exceptions_pf"):
        assert hybrid.get(name) == bt.get(name)
    assert int(hybrid["instructions_in_bt"]) + int(hybrid["instructions_in_trap"]) == hybrid["icount"]
    assert int(hybrid["estimated_cycles_in_bt"]) > 0
    if image == "nano":
        assert int(hybrid["switches"]) >= 1
        assert int(hybrid["instructions_in_trap"]) > 10_000
