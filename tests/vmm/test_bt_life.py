"""Many engines, one after the other and at the same time: what each takes from the host it gives back."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest

from machine.debug import StopKind
from tests.vmm.bare import Bare, flat
from vmm.bt import BinaryTranslator
from vmm.native.signals import CODE_REGION_BYTES, CORE, SIGNALS, SLOT_BYTES, SignalError

LOOP = "1: inc eax\ncall 2f\nmov [0x3000 + eax], al\nand eax, 0xffff\njmp 1b\n2: ret"
SLOTS = CODE_REGION_BYTES // SLOT_BYTES


def holdings() -> tuple[int, int, int]:
    """Mappings, open files and resident KiB of the process."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0])
    return len(Path("/proc/self/maps").read_text().splitlines()), len(list(Path("/proc/self/fd").iterdir())), resident


def address_space_gib() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) >> 20


def test_one_after_the_other() -> None:
    before = (0, 0, 0)
    size = 0
    for turn in range(40):
        bare = flat(LOOP, BinaryTranslator)
        bare.run(20_000)
        bare.close()
        if turn % 8 == 5:
            gc.collect()  # Python gives little back of what many engines have left between its own objects
        if turn == 5:
            before, size = holdings(), address_space_gib()
    mappings, files, resident = holdings()
    assert mappings - before[0] < 10
    assert files == before[1]
    assert resident - before[2] < 20_000
    assert address_space_gib() - size < 4


def test_left_and_entered_again() -> None:
    bare = flat(LOOP, BinaryTranslator)
    reference = flat(LOOP)
    size = 0
    for turn in range(10):
        bare.run(1000)
        reference.run(1000)
        bare.engine.leave()
        assert not any(bare.memory.page_flags)
        assert bare.memory.write_observers == [bare.cpu.mmu._table_written]
        assert len(bare.memory.flag_observers) == len(bare.memory.map_observers) == 1
        assert bare.cpu.mmu.flush_observers == []
        assert bare.debug.on_change == []
        bare.engine.enter()
        if turn == 2:
            size = address_space_gib()
    assert address_space_gib() - size < 4
    assert bare.state.pack() == reference.state.pack()
    bare.close()


def test_all_at_once_and_no_more() -> None:
    bares = [flat(LOOP, BinaryTranslator) for _ in range(SLOTS)]
    for turn in range(3):
        for number, bare in enumerate(bares):
            bare.run(100 * (number + 1) + turn)
    reference = flat(LOOP)
    for number, bare in enumerate(bares):
        reference.run(bare.clock.icount - reference.clock.icount)
        assert bare.state.pack() == reference.state.pack(), number
    extra = Bare()
    engine = BinaryTranslator(extra.cpu, extra.debug)
    with pytest.raises(SignalError, match=f"{SLOTS} slots"):
        engine.enter()
    assert len(extra.debug.on_change) == 1  # nothing of it was left there
    bares.pop().close()
    engine.enter()
    engine.leave()
    for bare in bares:
        bare.close()


def test_a_run_after_a_failure_is_a_run() -> None:
    """An error of ours in the middle of a run leaves the process's signal handlers as they were."""
    bare = flat("1: inc eax\nin al, 0x50\njmp 1b", BinaryTranslator)

    class Broken:
        broken = True

        def load_port(self, _port: int, _size_bytes: int) -> int:
            if self.broken:
                raise ZeroDivisionError
            return 0

        def store_port(self, _port: int, _size_bytes: int, _value: int) -> None:
            pass

    device = Broken()
    bare.ports.register(0x50, 0x50, device)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError):
        bare.run(100)
    assert CORE._depth == 0
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    device.broken = False
    bare.run(99)
    assert bare.clock.icount == 99 + 1
    bare.close()


def test_a_stint_that_is_over_at_once_ends() -> None:
    """Its timer's signals do not come so soon after one another that nothing else is ever done."""
    bare = flat(LOOP, BinaryTranslator)
    bare.run(1000)
    for longest_s in (1e-9, 1e-7, 1e-5):
        bare.debug.longest_run_s = longest_s
        for _ in range(10):
            assert bare.engine.run(1 << 40).kind is StopKind.BUDGET
    bare.close()
