"""Outside input: what is recorded comes in again at the same instructions, and damaged files are refused."""

from __future__ import annotations

import json

import pytest

from guests import images
from machine.debug import StopKind
from machine.inputs import Input, InputError, InputKind, header, parse
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from machine.state import EAX
from tests.engine import MAKERS, factories

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
