"""`monitor tc`: guest and host code side by side, how the cache is used, and emptying it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from gdbstub.guest import GuestTarget
from gdbstub.target import TargetError
from tests.gdbstub.pc import CODE, guest, run_to, say
from tests.oracles.assembler import assemble

SOURCE = """
    mov esp, 0x180000
1:  inc eax
    add ecx, [0x120000]
    cmp eax, 50
    jnz 1b
    xor eax, eax
    call 2f
    jmp 1b
2:  wbinvd
    ret
"""


@pytest.fixture
def target() -> Iterator[GuestTarget]:
    """A guest under bt that has run for a while."""
    with guest(assemble(SOURCE, origin=CODE), name="bt") as made:
        run_to(made, 5000)
        yield made


def test_guest_and_host_code_side_by_side(target: GuestTarget) -> None:
    text = say(target, f"tc {CODE + 5:#x}")
    first = text.partition(f"fragment for {CODE:#010x} in")[0]
    assert first.startswith(f"fragment for {CODE + 5:#010x} in page {CODE & ~0xFFF:#x} of RAM, CPL 0\n")
    assert re.search(rf"{CODE + 5:08x}  inc eax +[0-9a-f]+  inc eax\n", first)
    assert re.search(
        rf"{CODE + 6:08x}  add ecx, dword ptr \[0x120000\] +[0-9a-f]+  add ecx, dword ptr gs:\[0x120000\]", first
    )
    assert re.search(r"^  charge \d+ ", first, re.MULTILINE)
    assert f"; chained to the fragment for {CODE + 5:#010x}" in first
    assert re.search(r"\d direct branch(es)? leads? to it; executions are not counted", first)


def test_an_address_inside_shows_every_fragment_that_covers_it(target: GuestTarget) -> None:
    text = say(target, f"tc {CODE + 6:#x}")
    assert text.count("in page") == 2  # from the start, and from the loop's head
    assert text.index(f"{CODE + 5:#010x}") < text.index(f"{CODE:#010x} in")


def test_callouts_and_returns_are_named(target: GuestTarget) -> None:
    call = CODE + assemble(SOURCE, origin=CODE).index(b"\xe8")
    text = say(target, f"tc {call:#x}")
    assert f"a return to {call + 5:#010x} goes on at TC offset" in text
    routine = CODE + assemble(SOURCE, origin=CODE).index(b"\x0f\x09")
    text = say(target, f"tc {routine:#x}")
    assert "wbinvd (interpreted)" in text
    assert "; exit: callout" in text


def test_without_an_address_it_is_eip(target: GuestTarget) -> None:
    eip = target.machine.cpu.state.eip
    assert say(target, "tc") == say(target, f"tc {eip:#x}") == say(target, "tc $eip")


def test_what_has_no_fragment(target: GuestTarget) -> None:
    assert say(target, "tc 0x123456").startswith("No fragment stands for 0x00123456")
    assert say(target, "tc 0xfee00000").startswith("No fragment")


def test_map(target: GuestTarget) -> None:
    text = say(target, "tc map")
    match = re.match(r"([\d,]+) of ([\d,]+) bytes used; ([\d,]+) by ([\d,]+) fragments", text)
    assert match is not None
    used, total, live, fragments = (int(number.replace(",", "")) for number in match.groups())
    assert 0 < live < used < total
    assert fragments == target.machine.statistics()["fragments"]
    assert re.search(rf"^ +{CODE & ~0xFFF:#x} +{fragments} ", text, re.MULTILINE)
    assert re.search(r"^1 dispatch table is in use, with \d+ entries$", text, re.MULTILINE)


def test_flush_drops_everything_and_the_guest_runs_on(target: GuestTarget) -> None:
    assert re.match(r"\d+ fragments were dropped", say(target, "tc flush"))
    assert target.machine.statistics()["fragments"] == 0
    assert target.machine.statistics()["TC flushes"] == 1
    assert "no dispatch tables are in use\n" in say(target, "tc map")
    assert say(target, "tc").startswith("No fragment")
    run_to(target, 10_000)
    assert target.machine.clock.icount == 10_000
    assert say(target, f"tc {CODE + 5:#x}").startswith("fragment for")


def test_other_engines_say_so(target: GuestTarget) -> None:
    say(target, "vmm interp")
    for line in ("tc", "tc map", "tc flush"):
        with pytest.raises(TargetError, match="translates nothing"):
            say(target, line)


@pytest.mark.parametrize("line", ["tc zork", "tc map 5", "tc 1 2", "tc 0x1ffffffff"])
def test_what_it_does_not_understand(target: GuestTarget, line: str) -> None:
    with pytest.raises(TargetError):
        say(target, line)
