"""`info os` in a session of gdb: the list of tables, tables, and one that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guests import images
from tests.system.tools import gdbs, run_gdb
from tests.system.trapgate import running

DEMO = images.path("demo")
COMMANDS = (
    "break tasks_tick", "continue", "info os", "info os engines", "info os exits", "info os exit-sites",
    "info os devices", "info os events", "info os zork",
)  # fmt: skip


@pytest.mark.parametrize("gdb", gdbs(), ids=["stock", "recent"])
@pytest.mark.parametrize("name", ["bt", "trap nested"])
def test_tables_of_the_session(gdb: Path, name: str) -> None:
    """`info os`, which gdb offers by the list that it gets, and what gdb makes of a table that there is not."""
    with running(DEMO, "--append", "quiet hz=1000", "--serial", "none", "--vmm", "interp") as trapgate:
        output = run_gdb([trapgate.connect, f"monitor vmm {name}", *COMMANDS, "kill"], gdb=gdb, program=DEMO).output
    for table in ("engines", "statistics", "exits", "exit-sites", "devices", "events"):
        assert re.search(rf"^{table} +[A-Z]", output, re.MULTILINE), table
    assert re.search(rf"^\* .* {name} *$", output, re.MULTILINE)
    assert re.search(r"^i8042 +i8042: status=", output, re.MULTILINE)
    assert re.search(r"^\d+ +\d+ +\d+ +pit\.timer", output, re.MULTILINE)
    assert "Can not fetch data now" in output
    assert re.search(r"^Count +Share +Mean us +Total ms +Exit", output, re.MULTILINE)
    if name == "bt":
        assert output.count(" bt has no exits") == 2
    else:
        assert re.search(r"^\d+ +\d+\.\d% +\d+\.\d\d +\d+\.\d{3} +NPF write 0xb8000", output, re.MULTILINE)
        assert re.search(r"^\d+ +\d+\.\d% +\d+\.\d\d +\d+\.\d{3} +0xc01\w{5}", output, re.MULTILINE)
