"""Signals with an engine in the process: emitted code's faults become exits, everything else is as without it.

Whatever may end the process runs in a child of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest

from vmm.native import signals
from vmm.native.signals import SIGNALS, SignalCore, SignalError

# What a child has at hand: an engine that loops for ever, with a callout in each round that can run Python code.
PRELUDE = """
import ctypes, faulthandler, os, signal, sys, threading, time
from tests.vmm.bare import flat
from vmm.bt import BinaryTranslator
from vmm.native.signals import CORE, SIGNALS

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background

class Port:
    action = staticmethod(lambda: None)
    def load_port(self, port, size_bytes):
        self.action()
        return 0
    def store_port(self, port, size_bytes, value):
        pass

port = Port()

def engine(source="1: inc eax\\nin al, 0x50\\njmp 1b"):
    bare = flat(source, BinaryTranslator)
    bare.ports.register(0x50, 0x50, port)
    return bare

def crash():
    ctypes.string_at(8)

libc = ctypes.CDLL(None, use_errno=True)
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended: negative status is the number of a signal."""

    status: int
    output: str
    errors: str


def child(code: str, *options: str) -> Outcome:
    script = PRELUDE + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONFAULTHANDLER": ""}
    done = subprocess.run(
        [sys.executable, *options, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


WHEN = {
    "without an engine": "crash()",
    "with an engine that waits": "bare = engine(); bare.run(1000); crash()",
    "below an engine that runs": "bare = engine(); port.action = crash; bare.run(1000)",
    "after an engine": "bare = engine(); bare.run(1000); bare.close(); crash()",
}


class TestFaultsOfOthers:
    @pytest.mark.parametrize("when", WHEN.values(), ids=WHEN)
    def test_they_end_the_process(self, when: str) -> None:
        outcome = child(when)
        assert outcome.status == -signal.SIGSEGV, outcome.errors
        assert outcome.errors == ""

    @pytest.mark.parametrize("when", WHEN.values(), ids=WHEN)
    def test_faulthandler_shows_them_first(self, when: str) -> None:
        outcome = child(f"faulthandler.enable()\n{when}")
        assert outcome.status == -signal.SIGSEGV
        assert outcome.errors.count("Fatal Python error: Segmentation fault") == 1
        assert "in crash" in outcome.errors

    @pytest.mark.parametrize(
        "before",
        ["bare = engine()", "bare = engine(); bare.run(1000)", "bare = engine(); bare.run(1000); bare.close()"],
        ids=["entered", "run", "left"],
    )
    def test_faulthandler_may_come_later(self, before: str) -> None:
        outcome = child(f"{before}\nfaulthandler.enable()\ncrash()")
        assert outcome.status == -signal.SIGSEGV
        assert outcome.errors.count("Fatal Python error: Segmentation fault") == 1

    def test_an_engine_runs_on_under_a_faulthandler_that_comes_and_goes(self) -> None:
        outcome = child(
            """
            bare = engine()
            bare.run(1000)
            faulthandler.enable()
            bare.run(1000)
            bare.memory.flag_page(1, 0x80)  # a page of the window is write-protected: the next run faults and goes on
            bare.run(1000)
            faulthandler.disable()
            bare.run(1000)
            faulthandler.enable()
            bare.run(1000)
            print(bare.clock.icount)
            crash()
            """
        )
        assert outcome.output == "5000\n"
        assert outcome.status == -signal.SIGSEGV
        assert outcome.errors.count("Fatal Python error") == 1

    def test_faulthandler_enabled_below_a_run_stays_and_the_run_ends(self) -> None:
        outcome = child(
            """
            bare = engine()
            port.action = faulthandler.enable
            bare.run(3)
            port.action = lambda: None
            crash()
            """
        )
        assert outcome.status == -signal.SIGSEGV
        assert outcome.errors.count("Fatal Python error") == 1

    def test_a_handler_of_pythons_runs(self) -> None:
        outcome = child(
            """
            seen = []
            def handler(number, frame):
                seen.append(number)
            for number in SIGNALS:
                signal.signal(number, handler)
            bare = engine()
            def send():
                for number in SIGNALS:
                    os.kill(os.getpid(), number)
            port.action = send
            bare.run(3)
            port.action = lambda: None
            print(sorted(set(seen)) == sorted(SIGNALS), bare.clock.icount)
            """
        )
        assert (outcome.output, outcome.status) == ("True 3\n", 0), outcome.errors

    @pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
    def test_one_that_somebody_sends_ends_the_process(self, number: signal.Signals) -> None:
        outcome = child(
            f"""
            bare = engine()
            port.action = lambda: os.kill(os.getpid(), {int(number)})
            bare.run(1000)
            print("alive")
            """
        )
        assert (outcome.status, outcome.output) == (-number, "")

    @pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
    def test_an_ignored_one_that_somebody_sends_is_ignored(self, number: signal.Signals) -> None:
        outcome = child(
            f"""
            signal.signal({int(number)}, signal.SIG_IGN)
            bare = engine()
            port.action = lambda: os.kill(os.getpid(), {int(number)})
            bare.run(1000)
            port.action = lambda: None
            print(signal.getsignal({int(number)}) == signal.SIG_IGN, bare.clock.icount)
            """
        )
        assert (outcome.output, outcome.status) == ("True 1000\n", 0)

    def test_an_ignored_fault_ends_the_process_all_the_same(self) -> None:
        outcome = child(
            """
            signal.signal(signal.SIGSEGV, signal.SIG_IGN)
            bare = engine()
            port.action = crash
            bare.run(1000)
            """
        )
        assert outcome.status == -signal.SIGSEGV

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGTRAP], ids=lambda number: number.name)
    def test_one_that_is_sent_while_guest_code_runs_is_no_fault_of_the_guest(self, number: signal.Signals) -> None:
        outcome = child(
            f"""
            seen = []
            signal.signal({int(number)}, lambda number, frame: seen.append(number))
            runner = os.getpid()
            sender = os.fork()
            if not sender:
                while os.getppid() == runner:  # and no longer, however this ends
                    time.sleep(0.002)
                    os.kill(runner, {int(number)})
                os._exit(0)
            bare = engine("1: inc eax\\njmp 1b")
            while len(seen) < 20:
                bare.run(2_000_000)
            os.kill(sender, signal.SIGKILL)
            os.waitpid(sender, 0)
            statistics = bare.engine.statistics()
            print(bare.state.gpr[0] == (bare.clock.icount + 1) // 2, statistics.get("faults interpreted", 0))
            """
        )
        assert (outcome.output, outcome.status) == ("True 0\n", 0), outcome.errors

    def test_an_alarm_in_guest_code_reaches_pythons_handler(self) -> None:
        outcome = child(
            """
            seen = []
            signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
            bare = engine("1: inc eax\\njmp 1b")
            signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
            while len(seen) < 20:
                bare.run(2_000_000)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(bare.state.gpr[0] == (bare.clock.icount + 1) // 2)
            """
        )
        assert (outcome.output, outcome.status) == ("True\n", 0), outcome.errors


class TestInterrupt:
    def test_ctrl_c_waits_for_the_end_of_the_stint_and_harms_nothing(self) -> None:
        outcome = child(
            """
            bare = engine("1: inc eax\\njmp 1b")
            interrupted = 0
            for turn in range(5):
                try:
                    threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
                    while True:
                        bare.run(1_000_000)
                except KeyboardInterrupt:
                    interrupted += 1
            before = bare.clock.icount
            bare.run(1000)
            print(interrupted, bare.clock.icount - before)
            bare.close()
            """
        )
        assert (outcome.output, outcome.status) == ("5 1000\n", 0), outcome.errors

    def test_a_handler_that_only_notes_it_leaves_the_guest_exact(self) -> None:
        outcome = child(
            """
            seen = []
            signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
            bare = engine("1: inc eax\\njmp 1b")
            threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            while not seen:
                bare.run(1_000_000)
            print(bare.state.gpr[0] == bare.clock.icount // 2 + bare.clock.icount % 2)
            """
        )
        assert (outcome.output, outcome.status) == ("True\n", 0), outcome.errors


class TestStack:
    def test_faulthandlers_own_comes_back(self) -> None:
        outcome = child(
            """
            class Stack(ctypes.Structure):
                _fields_ = [("host", ctypes.c_void_p), ("flags", ctypes.c_int), ("size_bytes", ctypes.c_size_t)]
            def current():
                stack = Stack()
                assert libc.sigaltstack(None, ctypes.byref(stack)) == 0
                return stack.host, stack.flags, stack.size_bytes
            seen = []
            faulthandler.enable()
            before = current()
            bare = engine()
            port.action = lambda: seen.append(current())
            bare.run(3)
            print(before == current(), before != seen[0], seen[0][2] >= 65536)
            """
        )
        assert (outcome.output, outcome.status) == ("True True True\n", 0), outcome.errors

    def test_a_run_in_another_thread_has_one_too(self) -> None:
        outcome = child(
            """
            # Each call pushes on the stack of guest calls, down to its guard: there is no room for a signal's frame.
            bare = engine("mov ecx, 100000\\n1: mov esp, 0x8000\\ncall 1f\\n1: dec ecx\\njnz 1b\\nhlt")
            thread = threading.Thread(target=lambda: bare.run(200_000))
            thread.start()
            thread.join()
            print(bare.clock.icount)
            """
        )
        assert (outcome.output, outcome.status) == ("200000\n", 0), outcome.errors

    def test_two_threads_cannot_run_guests_at_once(self) -> None:
        outcome = child(
            """
            first, second = engine(), engine()
            def run_second():
                try:
                    second.run(10)
                except OSError as error:
                    print(error)
            def start():
                thread = threading.Thread(target=run_second)
                thread.start()
                thread.join()
            port.action = start
            first.run(2)
            port.action = lambda: None
            second.run(10)
            print(first.clock.icount, second.clock.icount)
            """
        )
        assert outcome.output == "guest code runs in another thread of this process\n2 10\n", outcome.errors

    def test_one_engine_may_run_below_another(self) -> None:
        outcome = child(
            """
            first, second = engine(), engine("1: inc eax\\njmp 1b")
            port.action = lambda: second.run(1000)
            first.run(3000)
            print(first.clock.icount, second.clock.icount)
            crash()
            """
        )
        assert (outcome.output, outcome.status) == ("3000 1000000\n", -signal.SIGSEGV), outcome.errors


def test_the_slots_are_finite_and_come_back() -> None:
    core = SignalCore()
    count = signals.CODE_REGION_BYTES // signals.SLOT_BYTES
    slots = [core.acquire() for _ in range(count)]
    assert len(set(slots)) == count
    assert all(core.region <= slot < core.region + signals.CODE_REGION_BYTES for slot in slots)
    assert not core.region % signals.CODE_REGION_BYTES
    with pytest.raises(SignalError, match="16 slots"):
        core.acquire()
    core.give_back(slots[3])
    assert core.acquire() == slots[3]


def test_a_host_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SignalCore()
    monkeypatch.setattr(signals, "_AT_MINSIGSTKSZ", 0)
    core.acquire()
    core._arm = lambda: -22
    with pytest.raises(SignalError, match="refuses"):
        core.arm()
