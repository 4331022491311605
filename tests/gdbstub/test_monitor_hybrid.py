"""`monitor hybrid`: which engine runs, since when and why, and the prices; what other commands say under `hybrid`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from gdbstub import counters
from gdbstub.cli_engine import make_factories
from gdbstub.guest import GuestTarget
from gdbstub.target import TargetError
from tests.gdbstub.pc import CODE, guest, run_to, say
from tests.oracles.assembler import assemble
from vmm.hybrid import HybridEngine
from vmm.phases import Cost
from vmm.prices import PARTS

# A callout for bt, which is cheaper than an exit, and then what bt does by itself.
SOURCE = """
    mov esp, 0x180000
    mov edi, 60000
1:  cpuid
    nop
    dec edi
    jnz 1b
2:  in al, 0x61
    inc ecx
    jmp 2b
"""


@pytest.fixture
def target() -> Iterator[GuestTarget]:
    """A guest under hybrid that has not run yet."""
    with guest(assemble(SOURCE, origin=CODE), factories=make_factories(verify=True), name="hybrid") as made:
        yield made


def begin_with_trap(target: GuestTarget) -> HybridEngine:
    """As if it had been chosen, so that there is something to be changed."""
    engine = target.machine.engine
    assert isinstance(engine, HybridEngine)
    engine.chooser._switch("the test says so")
    engine._bt.pause()
    engine._trap.resume()
    engine._begin_stretch()
    return engine


def test_before_anything_has_run(target: GuestTarget) -> None:
    text = say(target, "hybrid")
    assert text.startswith("bt runs the guest, for 0 instructions now: it begins.\n0 switches so far.\n")
    assert "overhead in cycles of a P4 672, by published costs; a model, no measurement of this host:\n" in text
    assert re.search(r"^ +0 +0 bt +0 +not known  none\n +it begins\n", text, re.MULTILINE)


def test_a_choice_is_explained(target: GuestTarget) -> None:
    engine = begin_with_trap(target)
    run_to(target, 60_000)
    assert engine.chooser.engine == "bt"
    text = say(target, "hybrid")
    assert re.match(r"bt runs the guest, for [\d,]+ instructions now: bt costs [\d,]+, trap 1,530,000,000\.\n", text)
    assert re.search(r"^2 switches so far; each took [\d,]+ us here, and is priced as an exit\.$", text, re.MULTILINE)
    # A CPUID in four instructions, with an exit of 4340 + 10 * 178 cycles each.
    events = r"CPUID 250,\d{3}, EXCP_PF hidden \d+"
    assert re.search(rf"trap +1,53\d,\d{{3}},\d{{3}} +not known  {events}\n +the test says so\n", text)
    assert re.search(r"bt, trial +[\d,]+ +1,530,000,000  \w.*\n +to see what it costs, where trap costs", text)
    spent = {row[1]: row for row in re.finditer(r"(?m)^  (bt|trap|switches) +(.*)$", text)}
    assert list(spent) == ["bt", "trap", "switches"]
    run_to(target, 600_000)
    assert re.search(r"bt  .*  port accesses \d", say(target, "hybrid"))


def test_prices_of_another_processor(target: GuestTarget) -> None:
    engine = begin_with_trap(target)
    run_to(target, 2_000)
    text = say(target, "hybrid sandy bridge")
    assert engine.part is PARTS[-1]
    assert "overhead in cycles of a Sandy Bridge" in text
    assert "prices have changed" in text
    with pytest.raises(TargetError, match="on a `486` is not known; there are: P4 672, Core 2, "):
        say(target, "hybrid 486")
    assert engine.part is PARTS[-1]


def test_what_happens_while_nothing_retires(target: GuestTarget) -> None:
    engine = begin_with_trap(target)
    engine.chooser.judge(Cost(0, {"port I/O": 654}, {"port I/O": 4_000_000}))
    assert re.search(r"^ +0 +0 trap .*  port I/O 654,000,000\n", say(target, "hybrid"), re.MULTILINE)


def test_a_client_that_may_only_look_cannot_set_prices(target: GuestTarget) -> None:
    assert say(target, "hybrid", read_only=True).startswith("bt runs")
    with pytest.raises(TargetError, match="may only look"):
        say(target, "hybrid Core 2", read_only=True)


def test_other_engines_choose_nothing(target: GuestTarget) -> None:
    assert "* bt" in say(target, "vmm bt")
    with pytest.raises(TargetError, match="`bt` makes no choices; `monitor vmm hybrid` selects one that does"):
        say(target, "hybrid")
    assert "* hybrid" in say(target, "vmm hybrid")
    run_to(target, 10_000)
    assert say(target, "hybrid").startswith("bt runs the guest, for 10,000 instructions")


def test_statistics_exits_and_translations_are_those_of_the_engine_concerned(target: GuestTarget) -> None:
    begin_with_trap(target)
    run_to(target, 2_000)
    assert re.search(r"^CPUID +500 +\d", say(target, "exits"), re.MULTILINE)
    assert "guest addresses that cost most:" in say(target, "exits")
    assert "exitcode" in say(target, "vmcb")
    fragment = say(target, f"tc {CODE + 10:#x}")
    run_to(target, 60_000)
    assert say(target, "hybrid").startswith("bt ")
    # What intercepts makes a callout there is emitted code here.
    assert "fragment for" in fragment
    assert say(target, f"tc {CODE + 10:#x}") != fragment
    assert re.search(r"fragments were dropped", say(target, "tc flush"))
    statistics = json.loads(json.dumps(counters.for_programs(target.machine.statistics())))
    assert statistics["engine"] == "hybrid"
    assert statistics["running"] == "bt"
    assert statistics["switches"] == 2
    assert statistics["priced_as"] == "P4 672"
    insns = statistics["instructions_in_bt"], statistics["instructions_in_trap"]
    assert sum(insns) == statistics["icount"] == 60_000
    exits = statistics["exits_cpuid"] + statistics["exits_excp_pf_hidden"]
    assert statistics["estimated_cycles_in_trap"] == exits * 6120
    assert statistics["estimated_cycles_of_switches"] == 6120  # the first one was the test's
    assert statistics["seconds_in_guest"] > 0
    stats = say(target, "stats")
    assert re.search(r"^ *running +bt$", stats, re.MULTILINE)
    assert re.search(r"^ *exits CPUID +[\d,]+$", stats, re.MULTILINE)
