"""Breakpoints and watchpoints of a debugger on a PC: where the guest stops, with which reason, and who decides."""

from __future__ import annotations

import pytest

from gdbstub.target import (
    Breakpoint,
    BreakpointKind,
    Resume,
    ResumeMode,
    Signal,
    StintEnd,
    StopReason,
    TargetError,
    Verdict,
)
from tests.gdbstub.pc import (
    CODE,
    DATA,
    INC_EAX,
    JMP_SELF,
    NOP,
    code_break,
    go,
    guest,
    load_eax,
    mov_eax,
    register,
    say,
    step,
    store_eax,
    write,
)

pytestmark = pytest.mark.usefixtures("each_engine")


class TestCodeBreakpoints:
    def test_stops_before_the_instruction_and_not_again(self) -> None:
        code = INC_EAX + b"\xeb\xfd"
        with guest(code) as target:
            target.insert_breakpoint(code_break(CODE))
            for rounds in range(3):
                event = go(target)
                assert event.reason is StopReason.SWBREAK
                assert register(target, "eax") == rounds + 1

    def test_one_where_the_guest_was_moved_to_stops_at_once(self) -> None:
        with guest(NOP * 8) as target:
            target.insert_breakpoint(code_break(CODE + 4))
            target.insert_breakpoint(code_break(CODE + 6))
            go(target)
            write(target, "eip", CODE + 6)
            assert go(target).reason is StopReason.SWBREAK
            assert register(target, "eip") == CODE + 6
            assert register(target, "icount") == 4

    def test_hardware_kind_is_told_apart(self) -> None:
        with guest(NOP * 8) as target:
            target.insert_breakpoint(Breakpoint(BreakpointKind.HARDWARE, CODE + 4, 1))
            assert go(target).reason is StopReason.HWBREAK

    def test_memory_is_never_patched(self) -> None:
        with guest(NOP * 8) as target:
            target.insert_breakpoint(code_break(CODE + 4))
            target.resume([Resume(ResumeMode.CONTINUE)])
            target.breakpoints.apply()
            assert target.machine.memory.read(CODE, 8) == NOP * 8

    def test_condition_decides(self) -> None:
        with guest(INC_EAX + b"\xeb\xfd") as target:
            asked = []

            def check() -> Verdict:
                asked.append(register(target, "eax"))
                return Verdict.STOP if register(target, "eax") == 5 else Verdict.GO_ON

            target.insert_breakpoint(code_break(CODE, check=check))
            assert go(target).reason is StopReason.SWBREAK
            assert asked == [1, 2, 3, 4, 5]

    def test_yield_executes_the_instruction_and_ends_the_stint(self) -> None:
        with guest(INC_EAX * 20) as target:
            asked = []

            def check() -> Verdict:
                asked.append(register(target, "eip"))
                return Verdict.GO_ON_AND_YIELD

            target.insert_breakpoint(code_break(CODE + 3, check=check))
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(10) is StintEnd.BUDGET
            assert register(target, "eip") == CODE + 4
            target.interrupt()
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(5) is StintEnd.BUDGET
            assert asked == [CODE + 3]

    def test_one_that_stops_wins_over_one_that_goes_on(self) -> None:
        with guest(NOP * 8) as target:
            target.insert_breakpoint(code_break(CODE + 4, check=lambda: Verdict.GO_ON))
            target.insert_breakpoint(Breakpoint(BreakpointKind.HARDWARE, CODE + 4, 1))
            assert go(target).reason is StopReason.HWBREAK

    def test_removed_and_replaced(self) -> None:
        with guest(NOP * 4 + JMP_SELF) as target:
            target.insert_breakpoint(code_break(CODE + 2))
            target.insert_breakpoint(code_break(CODE + 2, check=lambda: Verdict.GO_ON))
            target.insert_breakpoint(code_break(CODE + 3))
            target.remove_breakpoint(BreakpointKind.SOFTWARE, CODE + 3, 1)
            target.remove_breakpoint(BreakpointKind.SOFTWARE, CODE + 1, 1)
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(100) is StintEnd.BUDGET

    def test_real_mode_stop_whose_eip_is_not_the_address_is_a_plain_trap(self) -> None:
        # At 20000h real_entry sets CS to 2000h: gdb's breakpoint is linear, EIP is an offset.
        with guest(NOP * 8, bits=16, at=0x2_0000) as target:
            assert register(target, "pc_linear") == 0x2_0000
            target.insert_breakpoint(code_break(0x2_0004))
            event = go(target)
            assert (event.reason, event.signal) == (StopReason.SIGNAL, Signal.TRAP)
            assert "0x00020004" in event.text
            assert register(target, "eip") == 4

    def test_address_beyond_32_bits_is_refused(self) -> None:
        with guest(NOP) as target, pytest.raises(TargetError, match="32 bits"):
            target.insert_breakpoint(code_break(1 << 32))

    def test_they_survive_a_restart_but_not_a_detach(self) -> None:
        with guest(NOP * 8 + JMP_SELF) as target:
            target.insert_breakpoint(code_break(CODE + 4))
            go(target)
            target.restart()
            assert go(target).reason is StopReason.SWBREAK
            target.detach()
            target.attach()
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(100) is StintEnd.BUDGET


class TestWatchpoints:
    CODE = mov_eax(7) + store_eax(DATA) + load_eax(DATA) + NOP * 4 + JMP_SELF

    @pytest.mark.parametrize(
        ("kind", "reason", "stops"),
        [
            (BreakpointKind.WRITE, StopReason.WATCH, [10]),
            (BreakpointKind.READ, StopReason.RWATCH, [15]),
            (BreakpointKind.ACCESS, StopReason.AWATCH, [10, 15]),
        ],
    )
    def test_kinds(self, kind: BreakpointKind, reason: StopReason, stops: list[int]) -> None:
        with guest(self.CODE) as target:
            target.insert_breakpoint(Breakpoint(kind, DATA + 2, 2))
            for offset in stops:
                event = go(target)
                assert (event.reason, event.address) == (reason, DATA + 2)
                assert register(target, "eip") == CODE + offset
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(100) is StintEnd.BUDGET

    def test_one_byte_beside_is_not_touched(self) -> None:
        with guest(self.CODE) as target:
            target.insert_breakpoint(Breakpoint(BreakpointKind.ACCESS, DATA + 4, 4))
            target.insert_breakpoint(Breakpoint(BreakpointKind.ACCESS, DATA - 1, 1))
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(100) is StintEnd.BUDGET

    def test_condition_and_step(self) -> None:
        with guest(self.CODE) as target:
            target.insert_breakpoint(Breakpoint(BreakpointKind.WRITE, DATA, 4, check=lambda: Verdict.GO_ON))
            target.insert_breakpoint(Breakpoint(BreakpointKind.READ, DATA, 4))
            assert go(target).reason is StopReason.RWATCH
            target.restart()
            step(target)
            assert step(target).reason is StopReason.STEP
            assert step(target).reason is StopReason.RWATCH

    def test_the_debuggers_own_accesses_do_not_stop(self) -> None:
        with guest(NOP * 4 + JMP_SELF) as target:
            target.insert_breakpoint(Breakpoint(BreakpointKind.ACCESS, DATA, 4))
            say(target, f"watch access phys {DATA:#x} 4")
            target.resume([Resume(ResumeMode.CONTINUE)])
            target.run(2)
            target.write_memory(DATA, b"abcd")
            assert target.read_memory(DATA, 4) == b"abcd"
            assert target.run(100) is StintEnd.BUDGET

    @pytest.mark.parametrize(("address", "length"), [(0, 0), (0xFFFF_FFFF, 2)])
    def test_bad_ranges_are_refused(self, address: int, length: int) -> None:
        with guest(NOP) as target, pytest.raises(TargetError):
            target.insert_breakpoint(Breakpoint(BreakpointKind.WRITE, address, length))
