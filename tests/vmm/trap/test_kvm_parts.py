"""The parts of the KVM backend that need no KVM: slots, plans for debug registers, the alarm, counters, refusals."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from machine.debug import CodeBreakpoint, DebugControl, Watchpoint
from machine.memory import MIB, PhysicalMemory
from tests.vmm.trap.kvm import open_files
from vmm.trap.exits import ExitCounters
from vmm.trap.kick import KICK_SIGNAL, Kick
from vmm.trap.kvm import EVENTS, REGS, SREGS, KvmError, Vm
from vmm.trap.kvmcounters import read_counters
from vmm.trap.kvmdebug import plan
from vmm.trap.kvmfacts import KvmFacts
from vmm.trap.kvmmemory import Slot, slots_of

ALL = KvmFacts(
    paging=True,
    virtual_8086=True,
    code_breakpoints=True,
    data_breakpoints=True,
    fpu=True,
    cpuid=True,
    tsc=True,
    insns_per_s=1e9,
)


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    made = PhysicalMemory(4 * MIB)
    made.map_rom(bytes(64 << 10))
    yield made
    made.close()


class TestSlots:
    ROM = Slot(0xF_0000, 0x1_0000, 0xF_0000, read_only=True)
    COPY = Slot(0xFFFF_0000, 0x1_0000, 0xF_0000, read_only=True)

    def test_ram_rom_and_holes(self, memory: PhysicalMemory) -> None:
        low, high = Slot(0, 0xA_0000, 0, read_only=False), Slot(MIB, 3 * MIB, MIB, read_only=False)
        assert slots_of(memory) == [low, self.ROM, high, self.COPY]

    def test_every_address_as_the_memory_has_it(self, memory: PhysicalMemory) -> None:
        for enabled in (True, False):
            memory.a20_enabled = enabled
            found = dict.fromkeys(range(0, 5 * MIB, 4096), -1)
            slots = slots_of(memory)
            for slot in slots:
                for at in range(0, slot.size_bytes, 4096):
                    if slot.physical < 5 * MIB:
                        assert found[slot.physical + at] == -1
                        found[slot.physical + at] = slot.ram_address + at
            expected = {at: memory.ram_address(at) for at in found}
            assert found == expected

    def test_a20_held_low(self, memory: PhysicalMemory) -> None:
        memory.a20_enabled = False
        by_address = {slot.physical: slot for slot in slots_of(memory)}
        assert by_address[MIB].ram_address == 0
        assert by_address[3 * MIB].ram_address == 2 * MIB


class TestPlan:
    def test_all_kinds(self) -> None:
        debug = DebugControl()
        written = Watchpoint(0x2000, 4, on_read=False, on_write=True)
        touched = Watchpoint(0x3002, 2, on_read=True, on_write=True)
        debug.set_breakpoints(frozenset({CodeBreakpoint(0x1000), CodeBreakpoint(0x1000, cr3=0x5000)}))
        debug.set_watchpoints(frozenset({written, touched}))
        found = plan(debug, ALL, frozenset({0x500}))
        assert found is not None
        assert found.addresses == (0x500, 0x1000, 0x2000, 0x3002)
        # G0..G3; lengths and kinds: code, code, a doubleword written, a word touched.
        assert found.dr7 == 0xAA | 0x600 | 0xD << 24 | 0x7 << 28
        assert found.used
        assert found.watched(1 << 2) is written
        assert found.watched(1 << 3) is touched
        assert found.watched(1 << 0) is None

    def test_nothing_to_stop_at(self) -> None:
        found = plan(DebugControl(), ALL)
        assert found is not None
        assert not found.used

    @pytest.mark.parametrize(
        "breakpoints",
        [
            frozenset(CodeBreakpoint(n) for n in range(5)),
            frozenset({CodeBreakpoint(1, physical=True)}),
        ],
        ids=["five", "physical"],
    )
    def test_breakpoints_that_do_not_fit(self, breakpoints: frozenset[CodeBreakpoint]) -> None:
        debug = DebugControl()
        debug.set_breakpoints(breakpoints)
        assert plan(debug, ALL) is None

    @pytest.mark.parametrize(
        "watchpoint",
        [
            Watchpoint(0x2001, 4, on_read=False, on_write=True),
            Watchpoint(0x2000, 8, on_read=False, on_write=True),
            Watchpoint(0x2000, 4, on_read=True, on_write=False),
            Watchpoint(0x2000, 4, on_read=False, on_write=True, physical=True),
        ],
        ids=["misaligned", "long", "reads", "physical"],
    )
    def test_watchpoints_that_do_not_fit(self, watchpoint: Watchpoint) -> None:
        debug = DebugControl()
        debug.set_watchpoints(frozenset({watchpoint}))
        assert plan(debug, ALL) is None

    def test_what_this_kvm_does_not_stop_at(self) -> None:
        debug = DebugControl()
        debug.set_breakpoints(frozenset({CodeBreakpoint(1)}))
        assert plan(debug, replace(ALL, code_breakpoints=False)) is None
        assert plan(debug, replace(ALL, data_breakpoints=False)) is not None
        debug.set_watchpoints(frozenset({Watchpoint(0x2000, 4, on_read=False, on_write=True)}))
        assert plan(debug, replace(ALL, data_breakpoints=False)) is None


class TestKick:
    def test_the_signal_comes_when_it_was_asked_for(self) -> None:
        kick = Kick()
        try:
            begun_ns = time.monotonic_ns()
            kick.arm(begun_ns + 5_000_000)
            assert signal.sigtimedwait((KICK_SIGNAL,), 5) is not None
            assert 5_000_000 <= time.monotonic_ns() - begun_ns < 1_000_000_000
        finally:
            kick.close()

    def test_a_time_in_the_past_is_now(self) -> None:
        kick = Kick()
        try:
            kick.arm(1)
            assert signal.sigtimedwait((KICK_SIGNAL,), 5) is not None
            kick.drain()
            kick.arm(1)
            assert signal.sigtimedwait((KICK_SIGNAL,), 5) is not None
        finally:
            kick.close()

    def test_disarmed_nothing_comes(self) -> None:
        kick = Kick()
        try:
            kick.arm(1)
            kick.arm(time.monotonic_ns() + 1_000_000)
            kick.disarm()
            assert signal.sigtimedwait((KICK_SIGNAL,), 0.02) is None
        finally:
            kick.close()

    def test_closed_the_thread_is_as_before(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        kick = Kick()
        assert KICK_SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        kick.arm(1)
        kick.close()
        kick.close()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

    def test_each_thread_gets_its_own(self) -> None:
        kicks: list[Kick] = []
        come: list[bool] = []

        def body() -> None:
            kicks.append(Kick())
            kicks[0].arm(1)
            come.append(signal.sigtimedwait((KICK_SIGNAL,), 5) is not None)
            kicks[0].close()

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        assert come == [True]
        assert kicks[0].thread_id != threading.get_native_id()


def test_counters() -> None:
    counters = ExitCounters()
    counters.note("HLT", 5)
    counters.note("IN", 100)
    counters.note("HLT", 6)
    assert [(row.reason, row.count, row.total_ns) for row in counters.rows()] == [("IN", 1, 100), ("HLT", 2, 11)]
    assert (counters.total, counters.total_ns) == (3, 111)


def test_counters_of_a_guest_that_looks_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.trap.exits.MAX_REASONS", 3)
    counters = ExitCounters()
    for port in range(5):
        counters.note(f"IN from {port:#06x}", 1)
    counters.note("IN from 0x0001", 1)
    counters.note("NPF read 0xe0000000", 1)
    counters.note("HLT", 1)
    assert counters.counts() == {
        "IN from 0x0000": 1, "IN from 0x0001": 2, "IN from 0x0002": 1, "IN from elsewhere": 2,
        "NPF read elsewhere": 1, "HLT": 1,
    }  # fmt: skip


def test_facts_in_words() -> None:
    assert ALL.describe() == "complete; 1e+03 million instructions a second in a short loop"
    assert replace(ALL, paging=False, fpu=False).describe().startswith("lacks 32-bit paging, x87; ")


def test_the_kernels_counters() -> None:
    """One counter, one histogram of three values, one more counter."""
    names = [b"exits", b"lengths", b"halts"]
    descriptions = b"".join(
        struct.pack("<IhHII16s", 0, 0, count, offset, 0, name)
        for name, count, offset in zip(names, (1, 3, 1), (0, 8, 32), strict=True)
    )
    header = struct.pack("<6I", 0, 16, 3, 24, 32, 32 + len(descriptions))
    fd = os.memfd_create("counters")
    try:
        os.pwrite(fd, header.ljust(32, b"\0") + descriptions + struct.pack("<5Q", 7, 1, 2, 3, 1 << 40), 0)
        assert read_counters(fd) == {"exits": 7, "halts": 1 << 40}
    finally:
        os.close(fd)


def test_sizes_that_the_kernel_declares() -> None:
    assert (REGS.size, SREGS.size, EVENTS.size) == (144, 312, 64)


def test_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.trap.kvm.DEVICE", "/nonexistent/kvm")
    with pytest.raises(KvmError, match=r"^/nonexistent/kvm cannot be opened: No such file or directory$"):
        Vm()


def test_what_is_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.trap.kvm.DEVICE", "/dev/null")
    before = open_files()
    with pytest.raises(KvmError, match=r"^KVM refuses to tell its version: "):
        Vm()
    assert open_files() == before
