"""Packets and Ctrl-C are heard in any loop of a guest: no stint keeps the debugger out for long, on either engine."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdbstub.stint import StintBudget
from gdbstub.target import Breakpoint, BreakpointKind, Resume, ResumeMode, StintEnd, Verdict
from tests.gdbstub.pc import CODE, guest
from tests.gdbstub.wire import pack
from tests.oracles.assembler import assemble
from tests.system.trapgate import running

pytestmark = pytest.mark.usefixtures("each_engine")

LIMIT_S = 0.020
IDT = 0x8_0000
BUFFER = 0x20_0000
END = 0x40_0000  # of RAM

# An IDT whose gates all lead to a handler that goes on two bytes later.
PROLOGUE = f"""
    mov esp, 0x90000
    mov edi, {IDT:#x}
    mov ecx, 32
7:  mov eax, offset handler
    mov [edi], ax
    mov [edi + 2], cs
    mov dword ptr [edi + 4], 0x108e00
    add edi, 8
    loop 7b
    push {IDT:#x}
    sub esp, 2
    mov word ptr [esp], 0xff
    lidt [esp]
    cld
"""
EPILOGUE = "\n.balign 16\nhandler: add dword ptr [esp], 2\niretd"

LOOPS = {
    "two instructions": "1: inc eax\njmp 1b",
    "a scan of everything": "1: mov ecx, -1\nmov al, 0x5a\nmov edi, offset 1b\nrepne scasb\njmp 1b",
    "copies": f"1: mov ecx, {(END - BUFFER) // 8}\nmov esi, {BUFFER}\nmov edi, 0x300000\nrep movsd\njmp 1b",
    "a copy backwards through everything": "1: std\nmov ecx, -1\nmov esi, -8\nmov edi, 0x300000\nrep movsb\njmp 1b",
    "REP after REP, after a fast loop": f"""
        1: mov ecx, 30000000
        2: dec ecx
        jnz 2b
        mov edx, 100000
        3: mov ecx, 4096
        mov edi, {BUFFER}
        repe scasb
        dec edx
        jnz 3b
        jmp 1b
    """,
    "exceptions": "1: ud2\njmp 1b",
    "ports": "1: in al, 0x80\nout 0x80, al\njmp 1b",
    "the display": "1: mov edi, 0xb8000\nmov ecx, 0x2000\nrep stosd\nmov eax, [0xb8004]\njmp 1b",
    "code that is always new": f"""
        1: mov edi, {BUFFER}
        2: mov dword ptr [edi], 0x0eeb40
        add edi, 16
        cmp edi, {BUFFER + 0x8000}
        jb 2b
        mov dword ptr [edi], 0xc3
        mov eax, {BUFFER}
        call eax
        jmp 1b
    """,
}


def program(loop: str) -> bytes:
    return assemble(PROLOGUE + loop + EPILOGUE, origin=CODE)


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """What other tests have left behind is not looked through here."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("loop", LOOPS)
def test_no_stint_is_long(loop: str) -> None:
    """In CPU time of this thread, so that a busy host makes no difference."""
    with guest(program(LOOPS[loop]), timed=True) as target:
        target.resume([Resume(ResumeMode.CONTINUE)])
        assert longest_stint_s(target.run, 0.3) < LIMIT_S


def test_no_stint_is_long_with_a_breakpoint_that_does_not_want_to_stop() -> None:
    with guest(program(LOOPS["two instructions"]), timed=True) as target:
        at = CODE + program(LOOPS["two instructions"]).index(bytes.fromhex("40 eb fd"))  # inc eax; jmp to it
        asked = 0

        def check() -> Verdict:
            nonlocal asked
            asked += 1
            return Verdict.GO_ON

        target.insert_breakpoint(Breakpoint(BreakpointKind.SOFTWARE, at, 1, check=check))
        target.resume([Resume(ResumeMode.CONTINUE)])
        assert longest_stint_s(target.run, 0.3) < LIMIT_S
        assert asked > 100


def longest_stint_s(run: object, duration_s: float) -> float:
    """Run stints as the server does, and return how long the longest one took."""
    assert callable(run)
    budget = StintBudget()
    longest_s = 0.0
    # What is done for the first time in this process, such as the proof that emitted code is harmless, does not count.
    assert run(budget.insns) is StintEnd.BUDGET
    assert run(budget.insns) is StintEnd.BUDGET
    end_s = time.thread_time() + duration_s
    while (begun_s := time.thread_time()) < end_s:
        assert run(budget.insns) is StintEnd.BUDGET
        elapsed_s = time.thread_time() - begun_s
        budget.note(elapsed_s)
        longest_s = max(longest_s, elapsed_s)
    return longest_s


@pytest.mark.parametrize("loop", ["a scan of everything", "exceptions"])
def test_ctrl_c_is_answered_at_once(loop: str, tmp_path: Path) -> None:
    """Through the server, with the best of some tries, since the host may be busy."""
    image = tmp_path / "code"
    image.write_bytes(program(LOOPS[loop]))
    with (
        running(f"{image}@{CODE:#x}", "-m", "256", "--serial", "none") as trapgate,
        socket.create_connection(("127.0.0.1", trapgate.port), timeout=30) as client,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"+" + pack(b"QStartNoAckMode"))
        assert b"OK" in client.recv(100)
        client.sendall(b"+")
        waits_s = []
        for _ in range(12):
            client.sendall(pack(b"vCont;c"))
            time.sleep(0.1)
            begun_s = time.monotonic()
            client.sendall(b"\x03")
            assert b"02" in client.recv(1000)
            waits_s.append(time.monotonic() - begun_s)
        assert sorted(waits_s)[1] < LIMIT_S, waits_s
