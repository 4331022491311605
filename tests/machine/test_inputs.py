"""Outside input: what is recorded comes in again at the same instructions, and damaged files are refused."""

from __future__ import annotations

import json

import pytest

from guests import images
from machine.debug import StopKind
from machine.inputs import Input, InputError, InputKind, header, parse
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from machine.state import EAX, ECX
from tests.engine import MAKERS, factories
from tests.oracles.assembler import assemble

RAM_BYTES = 8 << 20


def demo(*, replay: tuple[Input, ...] = (), log: list[Input] | None = None, engine: str = "interp") -> Machine:
    def record(entry: Input | None) -> None:
        if log is not None and entry is not None:
            log.append(entry)

    options = MachineOptions(
        image=images.path("demo"), loading=LoadOptions(ram_bytes=RAM_BYTES), replay=replay, record=record
    )
    return Machine(options, factories(), engine)


def advance(machine: Machine, until_icount: int) -> None:
    while machine.clock.icount < until_icount:
        stop = machine.engine.run(until_icount)
        if stop.kind is StopKind.RESET:
            machine.reset()
        else:
            assert stop.kind is StopKind.BUDGET


def fingerprint(machine: Machine) -> tuple[int, bytes, bytes]:
    return machine.clock.now_ns, machine.cpu.state.pack(), bytes(machine.memory.ram8)


@pytest.mark.parametrize("engine", MAKERS)
def test_a_recorded_run_repeats_itself(engine: str) -> None:
    log: list[Input] = []
    first = demo(log=log)
    advance(first, 120_000)
    first.feed_serial(0, b"echo hello\r")
    advance(first, 125_003)
    first.type_text("x")
    first.press_keys(b"\x1c\xf0\x1c")
    advance(first, 140_000)
    first.raise_nmi()
    first.memory.write(0x50_0000, b"poked")
    first.note_memory_write(0x50_0000, b"poked")
    first.cpu.state.gpr[EAX] ^= 1
    first.note_register_write()
    advance(first, 160_000)
    first.press_reset()
    advance(first, 290_000)
    repeated = demo(replay=parse([header(), *(entry.line() for entry in log)]), engine=engine)
    for icount in (100_000, 150_000, 290_000):
        advance(repeated, icount)
    assert fingerprint(repeated) == fingerprint(first)
    assert [entry.kind for entry in log] == [
        InputKind.SERIAL, InputKind.TEXT, InputKind.KEYS, InputKind.NMI, InputKind.MEMORY, InputKind.REGISTERS,
        InputKind.RESET,
    ]  # fmt: skip
    first.close()
    repeated.close()


# Reads the keyboard's status 40 times by one REP, again and again.
POLLING = """
1:  mov edi, 0x200000
    mov ecx, 40
    mov edx, 0x64
    rep insb
    add ebx, [0x20001c]
    mov edx, 0x60
    in al, dx
    jmp 1b
"""


def polling(*, replay: tuple[Input, ...] = (), log: list[Input] | None = None, engine: str = "interp") -> Machine:
    def record(entry: Input | None) -> None:
        if log is not None and entry is not None:
            log.append(entry)

    options = MachineOptions(
        image=assemble(POLLING, origin=0x10_0000),
        loading=LoadOptions(ram_bytes=RAM_BYTES, load_address=0x10_0000),
        replay=replay,
        record=record,
    )
    return Machine(options, factories(), engine)


def finish_rep(machine: Machine) -> None:
    while machine.cpu.repeating:
        machine.engine.step()


@pytest.mark.parametrize("engine", MAKERS)
def test_what_comes_in_the_midst_of_a_rep_comes_in_at_its_end(engine: str) -> None:
    log: list[Input] = []
    first = polling(log=log)
    advance(first, 1000)
    while not first.cpu.repeating or first.cpu.state.gpr[ECX] != 20:
        first.engine.step()
    icount = first.clock.icount
    first.feed_serial(0, b"ab")
    first.press_keys(b"\x1c")
    recordable = [first.can_record]
    assert first.serial_queued_bytes(0) == 2
    assert [entry.at_ns for entry in log] == [icount + 1, icount + 1]
    finish_rep(first)
    assert first.clock.icount == icount + 1
    assert [*recordable, first.can_record] == [False, True]
    advance(first, icount + 1)
    assert first.memory.read(0x20_0000, 40) == 40 * first.memory.read(0x20_0000, 1)
    advance(first, 3000)
    repeated = polling(replay=parse([header(), *(entry.line() for entry in log)]), engine=engine)
    advance(repeated, 3000)
    assert fingerprint(repeated) == fingerprint(first)
    assert first.serial_queued_bytes(0) == repeated.serial_queued_bytes(0) == 2
    first.close()
    repeated.close()


def test_what_comes_in_is_behind_what_devices_do_at_that_time() -> None:
    """Also if that is due only now, or was scheduled later: so it is when the input comes in again."""
    order: list[str] = []
    log: list[Input] = []
    first = demo(log=log)
    advance(first, 1000)
    first.clock.schedule(1000, lambda: order.append(f"device, {first.serial_queued_bytes(0)} bytes"))
    first.feed_serial(0, b"x")
    repeated = demo(replay=tuple(log))
    repeated.clock.schedule(1000, lambda: order.append(f"device, {repeated.serial_queued_bytes(0)} bytes"))
    advance(repeated, 1001)
    assert order == 2 * ["device, 0 bytes"]
    assert repeated.serial_queued_bytes(0) == 1
    first.close()
    repeated.close()


def test_without_the_input_the_run_is_another() -> None:
    quiet, typed = demo(), demo()
    advance(typed, 120_000)
    typed.feed_serial(0, b"echo hello\r")
    for machine in (quiet, typed):
        advance(machine, 140_000)
    assert fingerprint(quiet) != fingerprint(typed)
    quiet.close()
    typed.close()


def test_lines_and_inputs_are_each_other() -> None:
    entries = tuple(Input(n, kind, bytes([n]), n) for n, kind in enumerate(InputKind))
    assert parse([header(), *(entry.line() for entry in entries)]) == entries


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: the file is empty"),
        (["zork"], "line 1: not an input"),
        (['{"format": "other", "version": 1}'], "line 1: not a file of inputs"),
        ([header(), "[]"], "line 2: not an input"),
        ([header(), Input(5, InputKind.NMI).line(), Input(4, InputKind.NMI).line()], "line 3: earlier"),
        ([header(), json.dumps({"ns": -1, "kind": "nmi", "index": 0, "data": ""})], "line 2: .*-1 is not a number"),
        ([header(), json.dumps({"ns": 1, "kind": "zork", "index": 0, "data": ""})], "line 2: .*zork"),
        ([header(), json.dumps({"ns": 1, "kind": "nmi", "index": 0, "data": "xyz"})], "line 2"),
        ([header(), 100_000 * "["], "line 2: not an input"),
        ([header(), json.dumps({"ns": True, "kind": "nmi", "index": 0, "data": ""})], "line 2"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(lines)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (InputKind.TEXT, b"\xff", "at 7 ns: 'utf-8' codec"),
        (InputKind.TEXT, "\N{SNOWMAN}".encode(), "at 7 ns: .*no key"),
        (InputKind.REGISTERS, b"short", "at 7 ns: 5 bytes are not the registers"),
    ],
)
def test_what_cannot_come_in_is_refused_before_the_run(kind: InputKind, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        demo(replay=(Input(7, kind, data),))
