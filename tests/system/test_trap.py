"""`--vmm trap` as users start it: a boot to the end, and a gdb session that changes engines on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from guests import images
from tests.system.tools import asked, run_gdb
from tests.system.trapgate import run, running

DEMO = images.path("demo")


@pytest.mark.parametrize("paging", ["shadow", "nested"])
def test_a_boot_to_the_end(paging: str, tmp_path: Path) -> None:
    report = tmp_path / "stats.json"
    done = run(
        "run", DEMO, "--vmm", "trap", "--paging", paging, "--gdb", "none", "--append", "quiet run=ps;poweroff",
        "--json-stats", str(report),
    )  # fmt: skip
    assert done.returncode == 0
    statistics = json.loads(report.read_text())["statistics"]
    assert statistics["paging"] == paging
    assert statistics["exits_out_to_0x03f8"] > 10
    assert ("exits_excp_pf_hidden" in statistics) == (paging == "shadow")
    assert ("nested_walk_references" in statistics) == (paging == "nested")
    clocks = ("seconds_in_guest", "seconds_in_vmm", "seconds_in_emulation_of_hardware")
    assert all(statistics[name] > 0 for name in clocks)
    assert statistics["world_switches"] == statistics["exits"]
    record = json.loads(report.read_text())
    assert sum(row["count"] for row in record["exits"]) == statistics["exits"]
    assert all(row["total_ns"] > 0 and statistics[_key(row["reason"])] == row["count"] for row in record["exits"])
    sites = record["exit_sites"]
    assert len(sites) == 10
    assert [site["total_ns"] for site in sites] == sorted((site["total_ns"] for site in sites), reverse=True)
    assert all(site["count"] > 0 and site["eip"] > 0 for site in sites)


def _key(reason: str) -> str:
    return "exits_" + re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_")


def test_gdb_changes_engines_in_mid_run_and_reads_the_statistics_of_each() -> None:
    with running(DEMO, "--append", "quiet", "--serial", "none", "--vmm", "trap") as trapgate:
        done = run_gdb(
            [
                trapgate.connect, "stepi", *asked("$icount"), "break syscall_dispatch", "continue", "monitor exits",
                "monitor vmcb", "monitor vmm bt", "continue", "monitor stats", "monitor vmm trap nested", "continue",
                "delete", "watch ticks", "continue", "monitor exits", *asked("$cpl"), "kill",
            ],
            program=DEMO,
        )  # fmt: skip
    assert done.value_of("$icount") == "1"
    assert done.output.count("Breakpoint 1, syscall_dispatch") == 3
    assert re.search(r"^EXCP_PF hidden +\d", done.output, re.MULTILINE)
    assert "guest addresses that cost most:" in done.output
    assert re.search(r"^exitcode +VMEXIT_EXCP_DB", done.output, re.MULTILINE)
    assert "* bt" in done.output
    assert re.search(r"^ *translation units +\d", done.output, re.MULTILINE)
    assert "* trap nested" in done.output
    assert re.search(r"Old value = 0\nNew value = 1\n", done.output)
    assert re.search(r"^NPF write 0xb8000 +\d", done.output, re.MULTILINE)
