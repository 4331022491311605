"""Stock gdb on exceptions, interrupts and triple faults, and on instructions that are easily stepped over wrongly."""

from __future__ import annotations

import re

import pytest

from tests.system.test_gdb_session import number, session
from tests.system.tools import asked

pytestmark = pytest.mark.usefixtures("each_engine")


class TestTripleFault:
    def test_is_explained_before_the_reset(self) -> None:
        run = session(
            "continue", "backtrace", *asked("/x $idtr_limit"), "monitor info icount", append="quiet run=triple"
        )
        assert "Triple fault: the CPU has shut down." in run.output
        assert re.search(r"^  1\. #GP .* error code 0x001a \(IDT vector 0x03\)$", run.output, re.MULTILINE)
        assert re.search(r"^  3\. #DF ", run.output, re.MULTILINE)
        assert "Program received signal SIGABRT" in run.output
        assert "triple_fault () at guests/demo/entry.S" in run.output
        assert run.value_of("/x $idtr_limit") == "0x0"

    def test_continue_resets_the_machine(self) -> None:
        run = session(
            "continue", "tbreak start", "continue", *asked("$icount > 0"), *asked("$edx"), image="tiny-triple"
        )
        assert run.output.count("Triple fault") == 1
        assert "Temporary breakpoint 1, start" in run.output
        assert run.value_of("$icount > 0") == "1"

    def test_every_level_of_the_chain(self) -> None:
        run = session("continue", image="tiny-triple", append="")
        chain = re.findall(r"^  \d\. (#\w+)(?:.*error code (0x\w+))?", run.output, re.MULTILINE)
        assert chain == [("#UD", ""), ("#NP", "0x0033"), ("#NP", "0x005b"), ("#DF", "0x0000"), ("#NP", "0x0043")]

    def test_signal_0_lets_the_user_mend_it(self) -> None:
        run = session(
            "continue", "monitor info idt 6", "set var *(short*)$eip = 0x9090", "signal 0",
            image="tiny-triple", append="",
        )  # fmt: skip
        assert "  06 #UD  0000:00000000, interrupt gate32, DPL 0, not present" in run.output
        assert run.output.count("Triple fault") == 1, "UD2 is gone"
        assert "The guest has ended: debug exit." in run.output


class TestCatching:
    def test_page_fault_before_delivery(self) -> None:
        run = session(
            "monitor catch pf", "continue", "x/i $pc", *asked("$cr2"), *asked("$cpl"), "stepi", *asked("$cpl"),
            "info symbol $pc", "monitor page $cr2", append="quiet run=pgfault",
        )  # fmt: skip
        assert "Program received signal SIGSEGV, Segmentation fault." in run.output
        assert re.search(r"About to be delivered: #PF page fault \(vector 14\) at CS:EIP 001b:\w+", run.output)
        assert run.value_of("$cpl") == "3"
        assert "vector_14" in run.output
        assert "not present" in run.output

    def test_signals_filter_what_stops(self) -> None:
        run = session(
            "monitor catch pf", "handle SIGSEGV nostop noprint pass", "break task_exit", "continue", "backtrace 1",
            append="quiet run=pgfault",
        )  # fmt: skip
        assert "SIGSEGV, Segmentation fault" not in run.output
        assert "Breakpoint 1, task_exit" in run.output

    def test_external_interrupt(self) -> None:
        run = session("monitor catch irq", "continue", *asked("$icount"), "stepi", "info symbol $pc", "continue")
        assert "Program received signal SIGUSR1" in run.output
        assert "external interrupt, vector 0x20" in run.output
        assert "vector_32" in run.output

    @pytest.mark.parametrize(
        ("crash", "catch", "signal"),
        [("div0", "de", "SIGFPE"), ("ud", "ud", "SIGILL"), ("gp", "gp", "SIGSEGV"), ("bp", "bp", "SIGTRAP")],
    )
    def test_exceptions_have_their_signals(self, crash: str, catch: str, signal: str) -> None:
        run = session(
            f"monitor catch {catch}", "continue", *asked("$cpl"), "monitor uncatch", append=f"quiet run={crash}"
        )
        assert f"Program received signal {signal}" in run.output
        assert f"About to be delivered: #{catch.upper()}" in run.output
        assert run.value_of("$cpl") == "3"

    def test_an_unknown_event_is_refused_with_a_sentence(self) -> None:
        run = session("monitor catch zork")
        assert "`zork` is no event to catch" in run.output


class TestStepper:
    """Instructions at symbols step_NAME; one step must end where the architecture says."""

    # In the order in which the guest comes to them: name, steps, and where they end.
    STEPS = (
        ("plain", 3, "&leaf"),
        ("rep", 5, "&step_after_rep"),
        ("rep_zero", 1, "&step_after_rep_zero"),
        ("int", 1, "&service"),
        ("popf", 1, "&step_after_popf"),
        ("mov_ss", 1, "&step_mov_ss + 2"),
        ("sti", 2, "&line0"),
        ("loop", 3, "&step_after_loop"),
        ("int3", 1, "&breakpoint"),
    )

    def test_steps(self) -> None:
        commands = ["monitor step-interrupts on"]
        for name, steps, end in self.STEPS:
            commands += [f"tbreak *step_{name}", "continue"]
            commands += [f"stepi {steps}", *asked(f"(long)$eip - (long)({end})")]
        run = session(*commands, image="tiny-stepper", append="")
        ends = {name: run.value_of(f"(long)$eip - (long)({end})") for name, _, end in self.STEPS}
        assert ends == {name: "0" for name, _, _ in self.STEPS}, run.output

    def test_one_step_is_one_iteration_and_sti_holds_interrupts_off(self) -> None:
        run = session(
            "tbreak *step_rep", "continue", "stepi", *asked("(long)$eip - (long)&step_rep"), *asked("$ecx"),
            "tbreak *step_sti", "continue", "stepi", *asked("(long)$eip - (long)&step_hlt"),
            "tbreak *step_loop", "continue", "stepi", *asked("(long)$eip - (long)&step_loop"), image="tiny-stepper",
            append="",
        )  # fmt: skip
        for name in ("rep", "hlt", "loop"):
            assert run.value_of(f"(long)$eip - (long)&step_{name}") == "0"
        assert run.value_of("$ecx") == "4"

    def test_without_interrupts_a_step_on_hlt_still_wakes(self) -> None:
        run = session(
            "break *step_hlt", "continue", "stepi", *asked("(long)$eip - (long)&step_after_hlt"), "stepi 2",
            image="tiny-stepper", append="",
        )  # fmt: skip
        assert run.value_of("(long)$eip - (long)&step_after_hlt") == "0", run.output

    def test_the_guest_ends_as_it_does_without_a_debugger(self) -> None:
        run = session("break *step_loop", "continue", "delete", "continue", image="tiny-stepper", append="")
        assert "exited with code 053" in run.output  # (15h << 1) | 1, in octal


class TestDeterminism:
    COMMANDS = (
        "break syscall_dispatch", "continue", *asked("$icount"), "stepi 10", *asked("$icount"), "delete",
        "watch ticks", "continue", *asked("$icount "), "finish", *asked("$icount  "), "monitor until-icount 150000",
        "delete", "continue", *asked("$icount   "), "info registers", "x/64xw $esp",
    )  # fmt: skip

    def test_the_same_session_twice_stops_at_the_same_counts(self) -> None:
        first, second = session(*self.COMMANDS), session(*self.COMMANDS)
        assert first.output == second.output
        assert number(first, "$icount   ") == 150_000

    def test_a_breakpoint_that_is_never_hit_changes_nothing(self) -> None:
        plain = session("monitor until-icount 200000", "continue", "info registers")
        busy = session(
            "break *0x12345", "watch *(int*)0xc0000000", "monitor until-icount 200000", "continue", "info registers"
        )
        after = "eax            "
        assert plain.output[plain.output.index(after) :] == busy.output[busy.output.index(after) :]


class TestMonitorBreakpoints:
    def test_physical(self) -> None:
        run = session(
            'eval "monitor break phys %#x", (long)&kernel_main - 0xc0000000',
            "continue",
            "info symbol $eip",
            "monitor delete 1",
        )
        assert re.search(r"Monitor breakpoint 1: break at physical 0x0010\w{4}\.", run.output)
        assert "kernel_main" in run.output

    def test_one_address_space_only(self) -> None:
        run = session(
            "break primes_main", "continue", "delete", "monitor break 0x200004 cr3=$cr3", "monitor info breakpoints",
            *asked("$cr3"),
        )  # fmt: skip
        assert f"CR3 {int(run.value_of('$cr3')):#010x}" in run.output
