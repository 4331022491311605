from __future__ import annotations

from dataclasses import replace

import pytest

from gdbstub.guest import TRIPLE_FAULT_STATUS
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
from machine.inputs import Input, InputKind
from tests.gdbstub.pc import (
    CODE,
    DATA,
    HLT,
    INC_EAX,
    INT3,
    JMP_SELF,
    NOP,
    REP_STOSB,
    STI,
    UD2,
    code_break,
    finish,
    go,
    guest,
    mov_eax,
    mov_ecx,
    mov_edi,
    out_exit,
    register,
    say,
    step,
    step_range,
    store_eax,
    write,
)

pytestmark = pytest.mark.usefixtures("each_engine")


class TestRunning:
    def test_step_is_one_instruction(self) -> None:
        with guest(INC_EAX * 3) as target:
            before = register(target, "icount")
            event = step(target)
            assert event.reason is StopReason.STEP
            assert (register(target, "eip"), register(target, "eax")) == (CODE + 1, 1)
            assert before == 0
            assert register(target, "icount") == 1

    def test_step_of_rep_is_one_iteration(self) -> None:
        with guest(mov_ecx(3) + mov_edi(DATA) + REP_STOSB + NOP) as target:
            step(target)
            step(target)
            at = register(target, "eip")
            for left in (2, 1):
                step(target)
                assert (register(target, "eip"), register(target, "ecx")) == (at, left)
            step(target)
            assert register(target, "ecx") == 0
            assert register(target, "eip") == CODE + 12

    def test_a_recorded_guest_is_not_changed_in_the_midst_of_a_rep(self) -> None:
        log: list[Input | None] = []
        with guest(mov_ecx(3) + mov_edi(DATA) + REP_STOSB + NOP) as target:
            target.machine.options = replace(target.machine.options, record=log.append)
            for _ in range(3):
                step(target)
            for change in (
                lambda: target.write_memory(DATA, b"x"),
                lambda: write(target, "ebx", 1),
                lambda: say(target, "reset"),
            ):
                with pytest.raises(TargetError, match="in the midst of a REP"):
                    change()
            assert (register(target, "ebx"), register(target, "ecx"), log) == (0, 2, [])
            step(target)
            step(target)
            target.write_memory(DATA, b"x")
            assert [entry.kind for entry in log if entry is not None] == [InputKind.MEMORY]

    def test_budget_ends_a_stint_without_a_stop(self) -> None:
        with guest(JMP_SELF) as target:
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(77) is StintEnd.BUDGET
            assert register(target, "icount") == 77

    def test_stints_of_any_size_end_at_the_same_place(self) -> None:
        code = mov_ecx(50) + INC_EAX + b"\xe2\xfd" + out_exit(5)
        ends = set()
        for budget in (1, 7, 10_000):
            with guest(code) as target:
                event = go(target, budget=budget, stints=500)
                ends.add((event.reason, event.status, register(target, "icount"), register(target, "eax")))
        assert len(ends) == 1
        assert ends.pop()[:2] == (StopReason.EXITED, 11)

    def test_interrupt_stops_where_the_guest_is(self) -> None:
        with guest(JMP_SELF) as target:
            target.resume([Resume(ResumeMode.CONTINUE)])
            target.run(10)
            event = target.interrupt()
            assert (event.reason, event.signal) == (StopReason.SIGNAL, Signal.INT)

    def test_halted_for_ever_is_idle(self) -> None:
        with guest(b"\xfa" + HLT) as target:
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(1000) is StintEnd.IDLE
            assert "halted" in target.threads()[0].extra

    @pytest.mark.parametrize("interrupts", ["on", "off"])
    def test_step_on_halt_ends_when_the_next_event_wakes(self, interrupts: str) -> None:
        # In real mode, with the BIOS's handlers; its timer ticks at 18.2 Hz: far in virtual time, at once for the user.
        with guest(STI + NOP * 3 + HLT + NOP * 4, bits=16, at=0x7C00) as target:
            say(target, f"step-interrupts {interrupts}")
            target.insert_breakpoint(code_break(0x7C04))
            go(target)  # the interrupt that programming the timer has raised is served on the way
            assert step(target).reason is StopReason.STEP
            assert "halted" not in target.threads()[0].extra
            assert target.machine.clock.idle_ns > 1_000_000
            handler = (register(target, "pc_linear") or 0) >= 0xF_0000
            assert handler == (interrupts == "on")

    def test_paced_guest_sleeps_as_long_as_the_host_does(self) -> None:
        host_s = 100.0
        code = STI + HLT + b"\xeb\xfd"
        with guest(code, bits=16, at=0x7C00) as target:
            target.pace = lambda: host_s
            target.resume([Resume(ResumeMode.CONTINUE)])
            for elapsed_s in (0.06, 0.2, 1.0):
                while target.run(1_000_000) is not StintEnd.IDLE:
                    pass
                idle_s = target.machine.clock.idle_ns / 1e9
                assert host_s - 100.0 < idle_s < host_s - 100.0 + 1.0
                assert target.run(1_000_000) is StintEnd.IDLE
                host_s = 101.0 + elapsed_s

    def test_step_on_a_halt_that_nothing_ends(self) -> None:
        with guest(b"\xfa" + HLT) as target:
            step(target)
            event = step(target)
            assert event.reason is StopReason.STEP
            assert "only an NMI" in event.text
        with guest(b"\xe6\x80" + b"\xb0\xff\xe6\x21" + STI + HLT) as target:  # every line is masked
            for _ in range(4):
                step(target)
            target.resume([Resume(ResumeMode.STEP)])
            target.machine.clock.reset()
            assert target.run(100) is StintEnd.IDLE

    def test_range_step_leaves_the_range(self) -> None:
        code = mov_ecx(500) + INC_EAX + b"\xe2\xfd" + NOP * 2
        with guest(code) as target:
            event = step_range(target, CODE, CODE + 8, budget=100)
            assert event.reason is StopReason.STEP
            assert (register(target, "eip"), register(target, "eax")) == (CODE + 8, 500)

    def test_range_step_steps_at_least_once_and_stops_at_breakpoints(self) -> None:
        with guest(INC_EAX * 8) as target:
            assert step_range(target, CODE + 4, CODE + 5).reason is StopReason.STEP
            assert register(target, "eip") == CODE + 1
            target.insert_breakpoint(code_break(CODE + 3))
            event = step_range(target, CODE, CODE + 8)
            assert event.reason is StopReason.SWBREAK
            assert register(target, "eip") == CODE + 3
            assert step_range(target, CODE, CODE + 5).reason is StopReason.STEP

    def test_until_icount_stops_once(self) -> None:
        with guest(JMP_SELF) as target:
            say(target, "until-icount 1234")
            event = go(target)
            assert (event.reason, event.signal) == (StopReason.SIGNAL, Signal.TRAP)
            assert "1234" in event.text
            assert register(target, "icount") == 1234
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(1000) is StintEnd.BUDGET

    def test_end_icount_ends_the_run_with_status_0(self) -> None:
        with guest(JMP_SELF) as target:
            target.end_icount = 500
            event = go(target)
            assert (event.reason, event.status) == (StopReason.EXITED, 0)
            assert register(target, "icount") == 500

    def test_another_thread_cannot_be_resumed(self) -> None:
        with guest(NOP) as target, pytest.raises(TargetError, match="CPU 1"):
            target.resume([Resume(ResumeMode.CONTINUE, thread_id=2)])


class TestCatches:
    def test_exception_stops_before_delivery_with_its_signal(self) -> None:
        with guest(NOP + UD2) as target:
            say(target, "catch ud")
            event = go(target)
            assert (event.reason, event.signal) == (StopReason.SIGNAL, Signal.ILL)
            assert "#UD" in event.text
            assert register(target, "eip") == CODE + 1

    def test_signal_delivers_and_zero_tries_again(self) -> None:
        with guest(NOP + UD2 + NOP * 4 + JMP_SELF) as target:
            say(target, "catch ud")
            go(target)
            assert go(target).signal == Signal.ILL, "suppressed, the instruction raises it again"
            target.write_memory(CODE + 1, NOP * 2)
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(100) is StintEnd.BUDGET, "the cause was mended"

    def test_delivery_goes_to_the_handler(self) -> None:
        with guest(NOP + UD2 + NOP * 4 + JMP_SELF) as target:
            # The IDTR is real mode's, so delivery in protected mode fails: a triple fault shows that it was tried.
            say(target, "catch ud")
            go(target)
            event = go(target, signal=Signal.ILL)
            assert event.signal == Signal.ABRT
            assert "1. #UD" in event.text

    def test_trap_signals_are_delivered_whatever_gdb_passes(self) -> None:
        with guest(INT3) as target:
            say(target, "catch bp")
            assert go(target).signal == Signal.TRAP
            assert go(target, signal=0).signal == Signal.ABRT

    def test_pass_signals_do_not_stop(self) -> None:
        with guest(UD2) as target:
            say(target, "catch ud")
            target.pass_signals(frozenset({Signal.ILL}))
            assert go(target).signal == Signal.ABRT
            target.restart()
            target.pass_signals(frozenset())
            assert go(target).signal == Signal.ILL

    def test_moving_eip_forgets_what_was_pending(self) -> None:
        with guest(UD2 + UD2) as target:
            say(target, "catch ud")
            go(target)
            write(target, "eip", CODE + 2)
            assert go(target, signal=Signal.ILL).signal == Signal.ILL

    def test_external_interrupt(self) -> None:
        with guest(STI + JMP_SELF) as target:
            say(target, "catch irq")
            event = go(target, budget=1_000_000, stints=200)
            assert event.signal == Signal.USR1
            assert "external interrupt, vector 0x08" in event.text

    def test_a_step_that_lets_the_interrupt_happen_enters_its_handler(self) -> None:
        with guest(STI + JMP_SELF, bits=16, at=0x7C00) as target:
            say(target, "catch irq")
            say(target, "step-interrupts off")
            go(target)
            assert step(target, signal=Signal.USR1).reason is StopReason.STEP
            assert (register(target, "pc_linear") or 0) >= 0xF_0000
            assert not target.machine.debug.step_interrupts


class TestTripleFault:
    def test_stops_with_the_chain(self) -> None:
        with guest(UD2) as target:
            event = go(target)
            assert (event.reason, event.signal) == (StopReason.SIGNAL, Signal.ABRT)
            lines = event.text.splitlines()
            assert lines[0].startswith("Triple fault")
            assert lines[1].startswith("  1. #UD")
            assert f"0008:{CODE:08x}" in lines[1]
            assert any("#DF" in line for line in lines)
            assert "shut down" in target.threads()[0].extra

    def test_signal_lets_the_reset_happen(self) -> None:
        with guest(INC_EAX + UD2) as target:
            go(target)
            event = step(target, signal=Signal.ABRT)
            assert event.reason is StopReason.STEP
            assert (register(target, "eip"), register(target, "eax")) == (CODE, 0)
            assert target.machine.resets == 1

    def test_a_breakpoint_at_the_first_instruction_stops_after_the_reset(self) -> None:
        with guest(UD2) as target:
            go(target)
            target.insert_breakpoint(code_break(CODE))
            assert go(target, signal=Signal.ABRT).reason is StopReason.SWBREAK
            assert target.machine.resets == 1

    def test_signal_0_tries_again(self) -> None:
        with guest(UD2 + JMP_SELF) as target:
            go(target)
            target.write_memory(CODE, NOP * 2)
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(100) is StintEnd.BUDGET

    def test_without_a_debugger_the_run_ends_with_status_3(self) -> None:
        with guest(UD2) as target:
            target.detach()
            event = go(target)
            assert (event.reason, event.status) == (StopReason.EXITED, TRIPLE_FAULT_STATUS)
            assert "#UD" in target.unseen_text

    def test_detaching_in_shutdown_ends_the_run_too(self) -> None:
        with guest(UD2) as target:
            go(target)
            target.write_memory(CODE, JMP_SELF)  # too late: the CPU is shut down
            target.detach()
            event = go(target)
            assert (event.reason, event.status) == (StopReason.EXITED, TRIPLE_FAULT_STATUS)


class TestLifeAndDeath:
    def test_debug_exit(self) -> None:
        with guest(out_exit(0x10)) as target:
            event = go(target)
            assert (event.reason, event.status) == (StopReason.EXITED, 0x21)
            with pytest.raises(TargetError, match="ended"):
                target.resume([Resume(ResumeMode.CONTINUE)])

    def test_restart_is_the_first_start_again(self) -> None:
        with guest(mov_eax(7) + store_eax(DATA) + out_exit(0)) as target:
            first = target.machine.cpu.state.pack()
            go(target)
            event = target.restart()
            assert (event.reason, event.signal) == (StopReason.SIGNAL, Signal.TRAP)
            assert target.machine.cpu.state.pack() == first
            assert register(target, "icount") == 0
            assert target.read_memory(DATA, 4) == bytes(4)
            assert go(target).reason is StopReason.EXITED

    def test_reset_by_the_guest_goes_on(self) -> None:
        # OUT 64h, FEh: the keyboard controller pulls RESET; the second time the byte at DATA is set, so it ends.
        code = b"\x80\x3d" + DATA.to_bytes(4, "little") + b"\x01\x74\x0b"  # cmp byte [DATA], 1; je +11
        code += b"\xc6\x05" + DATA.to_bytes(4, "little") + b"\x01" + b"\xb0\xfe\xe6\x64"
        code += out_exit(3)
        with guest(code) as target:
            event = go(target)
            assert (event.reason, event.status) == (StopReason.EXITED, 7)
            assert target.machine.resets == 1

    def test_kill(self) -> None:
        with guest(JMP_SELF) as target:
            target.kill()
            assert target.read_memory(CODE, 2) == JMP_SELF
            with pytest.raises(TargetError):
                target.resume([Resume(ResumeMode.CONTINUE)])
            target.restart()
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(10) is StintEnd.BUDGET

    def test_detach_forgets_what_the_debugger_wanted(self) -> None:
        with guest(NOP * 8 + JMP_SELF) as target:
            target.insert_breakpoint(code_break(CODE + 1))
            say(target, f"break {CODE + 2:#x}")
            say(target, "catch all")
            say(target, "until-icount 3")
            say(target, "memory physical")
            target.pass_signals(frozenset({Signal.ILL}))
            target.detach()
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert target.run(100) is StintEnd.BUDGET
            debug = target.machine.debug
            assert not debug.breakpoints
            assert not debug.caught_vectors
            assert not debug.catch_interrupts
            assert not target.physical


def test_same_stops_twice() -> None:
    def record() -> list[tuple[object, ...]]:
        code = STI + mov_ecx(2000) + INC_EAX + b"\xe2\xfd" + store_eax(DATA) + out_exit(1)
        stops: list[tuple[object, ...]] = []
        with guest(code) as target:
            target.insert_breakpoint(code_break(CODE + 6, check=lambda: Verdict.GO_ON))
            target.insert_breakpoint(Breakpoint(BreakpointKind.WRITE, DATA, 4))
            say(target, "until-icount 555")
            for _ in range(3):
                event = go(target, budget=100, stints=1000)
                stops.append((event, register(target, "icount"), target.machine.cpu.state.pack()))
        return stops

    assert record() == record()


def test_resumed_run_can_be_finished_step_by_step() -> None:
    with guest(INC_EAX * 3 + out_exit(0)) as target:
        for _ in range(4):
            assert step(target).reason is StopReason.STEP
        target.resume([Resume(ResumeMode.STEP)])
        outcome = finish(target)
        if outcome.reason is StopReason.STEP:  # the request to exit is seen at the next boundary
            outcome = step(target)
        assert (outcome.reason, outcome.status) == (StopReason.EXITED, 1)
