"""The translation cache: its stubs hand everything over in both directions, and every fault of emitted code is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from machine.flags import AF, CF, DF, OF, PF, SF, ZF
from vmm.native import cache, hostmemory, stateblock
from vmm.native.assembler import Assembler
from vmm.native.cache import CALL_STACK_BYTES, GUARD_BIAS, GUEST_REGISTERS, Exit, TranslationCache
from vmm.native.operands import (
    EAX,
    EBX,
    R8,
    R8D,
    R9,
    R9D,
    R10,
    R11,
    R13,
    R14,
    R15,
    RSP,
    Memory,
    Register,
    address,
    qword,
)
from vmm.native.signals import CORE, SLOT_BYTES

STATUS = CF | PF | AF | ZF | SF | OF
HOST_FLAGS = 0x202
FAULT_SIGNAL = stateblock.OFFSETS["fault_signal"] // 8


@pytest.fixture
def tc() -> Iterator[TranslationCache]:
    made = TranslationCache()
    yield made
    made.close()


def holdings() -> tuple[int, int]:
    """How many mappings and open files the process has."""
    mappings = Path("/proc/self/maps").read_text().splitlines()
    return len(mappings), len(list(Path("/proc/self/fd").iterdir()))


def assert_nothing_more_than(before: tuple[int, int]) -> None:
    mappings, files = holdings()
    assert mappings - before[0] < 4  # Python's own may grow
    assert files == before[1]


def run(tc: TranslationCache, write: Callable[[Assembler], None], reason: Exit = Exit.CALLOUT) -> int:
    """Emit code, leave by an exit behind it, and enter it; returns its offset."""
    assembler = tc.assembler()
    write(assembler)
    assembler.jump_to("jmp", tc.host + tc.exits[reason])
    start = tc.place(assembler.finish())
    enter(tc, start)
    return start


def enter(tc: TranslationCache, start: int) -> None:
    tc.state.quads[stateblock.TARGET] = tc.host + start
    tc.state.words[stateblock.REASON] = 0
    CORE.arm()
    try:
        tc.enter()
    finally:
        CORE.disarm()


class TestHandOver:
    def test_registers_go_in_and_come_out(self, tc: TranslationCache) -> None:
        values = [0x1111_0001 * (number + 1) for number in range(8)]
        for number, value in enumerate(values):
            tc.state.words[number] = value

        def increment(assembler: Assembler) -> None:
            for register in GUEST_REGISTERS:
                assembler.emit("lea", register, address(Register(register.number, 64), 1))

        run(tc, increment)
        assert tc.state.words[:8].tolist() == [value + 1 for value in values]

    @pytest.mark.parametrize("flags", [0, CF, PF, AF, ZF, SF, OF, DF, STATUS | DF])
    def test_flags_go_in_and_come_out(self, tc: TranslationCache, flags: int) -> None:
        tc.state.quads[stateblock.FLAGS] = HOST_FLAGS | flags
        run(tc, lambda _: None)
        assert tc.state.quads[stateblock.FLAGS] == HOST_FLAGS | flags

    def test_flags_that_emitted_code_sets_come_out(self, tc: TranslationCache) -> None:
        tc.state.quads[stateblock.FLAGS] = HOST_FLAGS

        def compute(assembler: Assembler) -> None:
            assembler.emit("std")
            assembler.emit("mov", EAX, 0x7FFF_FFFF)
            assembler.emit("add", EAX, 1)

        run(tc, compute)
        assert tc.state.quads[stateblock.FLAGS] & (STATUS | DF) == OF | SF | PF | AF | DF
        assert bytes(bytearray(range(64))) == bytes(range(64))  # C code that a set DF would break

    @pytest.mark.parametrize("reason", [Exit.MISS, Exit.LINK, Exit.CALLOUT])
    def test_each_exit_says_what_it_is(self, tc: TranslationCache, reason: Exit) -> None:
        tc.state.words[stateblock.DETAIL] = 5

        def name(assembler: Assembler) -> None:
            assembler.emit("mov", R8D, 0xDEAD_BEEF)
            assembler.emit("mov", R9D, 0x1234_5678)

        run(tc, name, reason)
        words = tc.state.words
        assert (words[stateblock.REASON], words[stateblock.EIP]) == (reason, 0xDEAD_BEEF)
        assert words[stateblock.DETAIL] == (0x1234_5678 if reason is Exit.LINK else 5)

    def test_the_miss_stub_is_where_empty_dispatch_entries_lead(self, tc: TranslationCache) -> None:
        assert tc.exits[Exit.MISS] == 0

    def test_emitted_code_finds_its_bases(self, tc: TranslationCache) -> None:
        quads = tc.state.quads
        quads[stateblock.WINDOW], quads[stateblock.DISPATCH], quads[stateblock.BUDGET] = 0x7000_0000_0000, 0x123, -77
        seen = hostmemory.map_anonymous(4096)

        def store(assembler: Assembler) -> None:
            assembler.emit("mov", R8, seen)
            for slot, register in enumerate((R10, R11, R13, R14, R15, RSP)):
                assembler.emit("mov", qword(R8, 8 * slot), register)
            assembler.emit("rdgsbase", R9)
            assembler.emit("mov", qword(R8, 48), R9)
            assembler.emit("lea", R10, address(R10, 7))

        run(tc, store)
        budget, guard, host, dispatch, state, stack, window = hostmemory.view(seen, 56).cast("q")
        assert (budget, guard, host, dispatch) == (-77, tc.guard + GUARD_BIAS, tc.host, 0x123)
        assert (state, window) == (tc.state.host, 0x7000_0000_0000)
        assert tc.is_call_stack_guard(stack)
        assert quads[stateblock.BUDGET] == -70
        hostmemory.release(seen, 4096)

    def test_the_stack_of_calls_stays_where_it_was(self, tc: TranslationCache) -> None:
        before = tc.state.quads[stateblock.CALL_STACK]
        run(tc, lambda assembler: assembler.emit("push", R8))
        assert tc.state.quads[stateblock.CALL_STACK] == before - 8
        run(tc, lambda assembler: assembler.emit("push", R8))
        assert tc.state.quads[stateblock.CALL_STACK] == before - 16
        tc.reset_call_stack()
        assert tc.state.quads[stateblock.CALL_STACK] == before

    def test_a_thousand_entries_leave_the_hosts_stack_alone(self, tc: TranslationCache) -> None:
        start = run(tc, lambda _: None)
        before = tc.state.quads[stateblock.OFFSETS["host_rsp"] // 8]
        for _ in range(1000):
            tc.enter()
        assert abs(tc.state.quads[stateblock.OFFSETS["host_rsp"] // 8] - before) < 4096
        assert start


class TestFaults:
    def fault(self, tc: TranslationCache, write: Callable[[Assembler], None]) -> int:
        start = run(tc, write)
        assert tc.state.words[stateblock.REASON] == Exit.FAULT
        return tc.state.quads[stateblock.FAULT_RIP] - tc.host - start

    @pytest.mark.parametrize("write", [False, True])
    def test_an_access_tells_address_and_kind(self, tc: TranslationCache, *, write: bool) -> None:
        reserved = hostmemory.reserve(1 << 33, align=1 << 32)
        tc.state.quads[stateblock.WINDOW] = reserved
        tc.state.words[0] = 0x8765_4321
        operand = Memory(32, EAX, displacement=-0x21, gs=True)
        at = self.fault(tc, lambda assembler: assembler.emit("mov", *((operand, EBX) if write else (EBX, operand))))
        quads = tc.state.quads
        assert quads[stateblock.FAULT_ADDRESS] == reserved + 0x8765_4300
        assert bool(quads[stateblock.FAULT_ERROR] & 2) is write
        assert (quads[stateblock.FAULT_TRAP], quads[FAULT_SIGNAL] & 0xFFFF_FFFF, at) == (14, signal.SIGSEGV, 0)
        hostmemory.release(reserved, 1 << 33)

    @pytest.mark.parametrize(
        ("code", "number", "trap", "at"),
        [
            ("31c9f7f1", signal.SIGFPE, 0, 2),
            ("900f0b", signal.SIGILL, 6, 1),
            ("9090cc", signal.SIGTRAP, 3, 3),
            ("48b80000000000000080488b00", signal.SIGSEGV, 13, 10),
            ("f4", signal.SIGSEGV, 13, 0),
        ],
        ids=["divide", "undefined", "breakpoint", "not canonical", "privileged"],
    )
    def test_each_signal(self, tc: TranslationCache, code: str, number: int, trap: int, at: int) -> None:
        assert self.fault(tc, lambda assembler: assembler.raw(bytes.fromhex(code))) == at
        assert tc.state.quads[FAULT_SIGNAL] & 0xFFFF_FFFF == number
        assert tc.state.quads[stateblock.FAULT_TRAP] == trap

    def test_a_file_that_ends_is_a_bus_error(self, tc: TranslationCache) -> None:
        fd = os.memfd_create("short")
        reserved = hostmemory.reserve(1 << 33, align=1 << 32)
        hostmemory.map_file(reserved, 4096, fd, 0, writable=False)
        tc.state.quads[stateblock.WINDOW] = reserved
        self.fault(tc, lambda assembler: assembler.emit("mov", EAX, Memory(32, displacement=8, gs=True)))
        assert tc.state.quads[FAULT_SIGNAL] & 0xFFFF_FFFF == signal.SIGBUS
        assert tc.state.quads[stateblock.FAULT_ADDRESS] == reserved + 8
        hostmemory.release(reserved, 1 << 33)
        os.close(fd)

    def test_the_same_instruction_can_be_tried_again(self, tc: TranslationCache) -> None:
        """With all registers, scratch ones too, the flags, and the stack of calls."""
        reserved = hostmemory.reserve(1 << 33, align=1 << 32)
        tc.state.quads[stateblock.WINDOW] = reserved
        tc.state.quads[stateblock.FLAGS] = HOST_FLAGS | CF | OF | DF
        for number in range(8):
            tc.state.words[number] = 0x100 + number

        def write(assembler: Assembler) -> None:
            assembler.emit("push", R15)
            assembler.emit("mov", R8, 0x8888_8888_8888)
            assembler.emit("mov", R9, 0x9999_9999_9999)
            assembler.emit("adc", Memory(32, EBX, gs=True), EAX)
            assembler.emit("mov", qword(R15, stateblock.OFFSETS["fault_address"]), R8)
            assembler.emit("mov", qword(R15, stateblock.OFFSETS["fault_error"]), R9)

        self.fault(tc, write)
        assert tc.state.words[:8].tolist() == [0x100 + number for number in range(8)]
        assert tc.state.quads[stateblock.FLAGS] & (STATUS | DF) == CF | OF | DF
        stack = tc.state.quads[stateblock.CALL_STACK]
        hostmemory.map_anonymous(4096, host=reserved)
        enter(tc, tc.state.quads[stateblock.FAULT_RIP] - tc.host)
        assert tc.state.words[stateblock.REASON] == Exit.CALLOUT
        assert hostmemory.view(reserved + 0x103, 4).cast("I")[0] == 0x101
        assert tc.state.quads[stateblock.FAULT_ADDRESS] == 0x8888_8888_8888
        assert tc.state.quads[stateblock.FAULT_ERROR] == 0x9999_9999_9999
        assert tc.state.quads[stateblock.CALL_STACK] == stack
        hostmemory.release(reserved, 1 << 33)

    @pytest.mark.parametrize(("budget", "faults"), [(0, False), (1 << 40, False), (-1, True), (-(1 << 40), True)])
    def test_a_used_up_budget_faults_at_its_guard(self, tc: TranslationCache, budget: int, *, faults: bool) -> None:
        tc.state.quads[stateblock.BUDGET] = budget

        def check(assembler: Assembler) -> None:
            assembler.emit("sarx", R9, R10, R11)
            assembler.emit("movzx", R9D, Memory(8, R11, R9, 1, -GUARD_BIAS))

        run(tc, check)
        assert (tc.state.words[stateblock.REASON] == Exit.FAULT) is faults
        if faults:
            assert tc.is_budget_guard(tc.state.quads[stateblock.FAULT_ADDRESS])
            assert not tc.is_call_stack_guard(tc.state.quads[stateblock.FAULT_ADDRESS])
        assert not tc.is_budget_guard(tc.guard)

    @pytest.mark.parametrize("name", ["push", "pop"])
    def test_the_stack_of_calls_has_guards_at_both_ends(self, tc: TranslationCache, name: str) -> None:
        def overrun(assembler: Assembler) -> None:
            top = assembler.here
            assembler.emit(name, R8)
            assembler.jump_to("jmp", top)

        self.fault(tc, overrun)
        host = tc.state.quads[stateblock.FAULT_ADDRESS]
        assert tc.is_call_stack_guard(host)
        assert not tc.is_budget_guard(host)
        tc.reset_call_stack()
        run(tc, lambda assembler: assembler.emit("push", R8))
        assert tc.state.words[stateblock.REASON] == Exit.CALLOUT
        depth = tc.state.quads[stateblock.CALL_STACK] - host
        assert 0 <= abs(depth) <= CALL_STACK_BYTES


class TestSpace:
    def test_code_is_written_through_one_view_and_run_through_another(self, tc: TranslationCache) -> None:
        assert tc.host % SLOT_BYTES == 0
        at = tc.place(b"\x12\x34\x56")
        assert hostmemory.view(tc.host + at, 3).tobytes() == b"\x12\x34\x56"
        rights = {
            line.split()[0]: line.split()[1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "translation-cache" in line
        }
        assert sorted(right[:3] for right in rights.values()) == ["r-x", "rw-"]

    def test_places_follow_each_other_aligned(self, tc: TranslationCache) -> None:
        first = tc.assembler()
        assert first.origin == tc.host + tc.position
        free = tc.free_bytes
        tc.place(b"\x90" * 5)
        second = tc.assembler()
        assert second.origin == first.origin + 16
        assert tc.free_bytes == free - 16

    def test_a_jump_is_pointed_elsewhere(self, tc: TranslationCache) -> None:
        start = run(tc, lambda assembler: assembler.emit("mov", EAX, 1))
        second = tc.assembler()
        second.emit("mov", EAX, 2)
        second.jump_to("jmp", tc.host + tc.exits[Exit.CALLOUT])
        there = tc.place(second.finish())
        tc.point(start + 6, there)
        enter(tc, start)
        assert tc.state.words[0] == 2

    def test_a_cleared_cache_keeps_its_stubs_and_traps_elsewhere(self, tc: TranslationCache) -> None:
        start = run(tc, lambda assembler: assembler.emit("mov", EAX, 1))
        tc.clear()
        enter(tc, start)
        assert tc.state.quads[FAULT_SIGNAL] & 0xFFFF_FFFF == signal.SIGTRAP
        assert run(tc, lambda assembler: assembler.emit("mov", EAX, 7)) == start
        assert tc.state.words[0] == 7

    def test_more_than_fits_is_a_mistake(self, tc: TranslationCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "TC_BYTES", tc.position + 16)
        tc.place(b"\x90" * 16)
        with pytest.raises(AssertionError):
            tc.place(b"\x90")

    def test_nothing_stays_behind(self) -> None:
        TranslationCache().close()  # what is there for the life of the process
        before = holdings()
        for _ in range(3):
            made = [TranslationCache() for _ in range(4)]
            for each in made:
                each.close()
        assert_nothing_more_than(before)

    @pytest.mark.parametrize("failing", ["DualMapping", "reserve", "map_anonymous"])
    def test_nothing_stays_behind_of_one_that_could_not_be_made(
        self, failing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        TranslationCache().close()
        before, slots = holdings(), len(CORE._free)
        really, calls = getattr(hostmemory, failing), []

        def fail_at_last(*arguments: object, **options: object) -> object:
            calls.append(arguments)
            if len(calls) == {"DualMapping": 1, "reserve": 2, "map_anonymous": 3}[failing]:
                raise hostmemory.HostMemoryError(12, "no room")
            return really(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(hostmemory, failing, fail_at_last)
            for _ in range(5):
                calls.clear()
                with pytest.raises(hostmemory.HostMemoryError):
                    TranslationCache()
        assert_nothing_more_than(before)
        assert len(CORE._free) == slots
