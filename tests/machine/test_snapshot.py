"""A machine that goes on from a snapshot does what the one does that it was taken of, and neither touches the other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from guests import images
from machine.cpuid import MODELS
from machine.debug import StopKind
from machine.devices.board import BoardOptions
from machine.inputs import Input, InputKind
from machine.lines import ExitKind, ExitRequest
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from machine.state import SHADOW_NONE
from tests import engine
from vmm.lockstep import Side, differences
from vmm.native.hostfpu import HostFpu

COMMANDS = "quiet run=sleep 3;ps;spin 20;pgfault;div0;ticks"
NS_PER_INSN = 1000
LAST = 250_000
RING_3 = 64_500  # the demo kernel is in a task then
BOOT_LAST = 900_000


def options(image: str = "demo", append: str = COMMANDS) -> MachineOptions:
    return MachineOptions(
        image=images.path(image),
        model=MODELS["pentium4"],
        make_fpu=HostFpu,
        loading=LoadOptions(ram_bytes=8 << 20, command_line=append),
        ns_per_insn=NS_PER_INSN,
    )


def side_of(machine: Machine, output: bytearray | None = None) -> Side:
    return Side(machine, bytearray() if output is None else output, machine.board.snapshot, machine.reset)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, made: MachineOptions, name: str = "interp") -> Machine:
    return stack.enter_context(closing(Machine(made, engine.factories(), name)))


def twin(stack: ExitStack, machine: Machine, name: str = "interp") -> Machine:
    with closing(machine.snapshot()) as snapshot:
        return stack.enter_context(closing(machine.twin(snapshot, name, BoardOptions())))


@pytest.mark.parametrize("image", ["demo", "boot"])
def test_at_random_places_under_any_engine(stack: ExitStack, image: str) -> None:
    """Copies of copies: each goes on where the one before has come to, under another engine than that."""
    last = LAST if image == "demo" else BOOT_LAST
    reference = side_of(start(stack, options(image)))
    chance = random.Random(2)
    machine = Machine(options(image), engine.factories(), "bt")
    places, stop = set(), None
    pieces = [RING_3, *(chance.randrange(1, last // 12) for _ in range(40))]
    while machine.clock.icount < last and stop is None:
        stop = side_of(machine).advance(min(last, machine.clock.icount + pieces.pop(0)))
        places.add(machine.cpu.state.cpl)
        if stop is None:
            before = machine
            with closing(before), closing(before.snapshot()) as snapshot:
                machine = before.twin(snapshot, chance.choice(list(engine.MAKERS)), BoardOptions())
    stack.enter_context(closing(machine))
    assert reference.advance(machine.clock.icount + (stop is not None)) == stop
    assert differences(side_of(machine), reference) == []
    assert image == "boot" or places == {0, 3}


def test_at_each_step(stack: ExitStack) -> None:
    """REP half done, the shadows of MOV SS and STI, HLT."""
    machine = start(stack, options("tiny-stepper", ""))
    halfway = shadowed = halted = 0
    while machine.clock.icount < 400 and machine.engine.step().kind in (StopKind.STEP, StopKind.BUDGET):
        with (
            closing(machine.snapshot()) as snapshot,
            closing(machine.twin(snapshot, "interp", BoardOptions())) as other,
        ):
            assert differences(side_of(machine), side_of(other)) == []
        halfway += machine.cpu.repeating
        shadowed += machine.cpu.state.shadow != SHADOW_NONE
        halted += machine.cpu.state.halted
    assert halfway
    assert shadowed
    assert halted


def test_what_is_beside_the_registers(stack: ExitStack) -> None:
    machine = start(stack, options())
    side_of(machine).advance(RING_3)
    machine.cpu.pending_debug = 1
    machine.lines.raise_nmi()
    other = twin(stack, machine)
    assert other.cpu.mmu.user
    assert other.cpu.pending_debug == 1
    assert other.lines.nmi_pending
    assert other.lines.attention
    assert other.statistics()["icount"] == other.engine_since_icount == RING_3


def test_a_line_that_the_guest_has_printed_on_is_still_in_use(stack: ExitStack) -> None:
    machine = start(stack, options("boot"))
    assert not twin(stack, machine).serial_is_listening(0)
    side_of(machine).advance(BOOT_LAST)
    assert not machine.board.com1.receives_by_interrupt
    other = twin(stack, machine)
    assert [other.serial_is_listening(index) for index in (0, 1)] == [True, False]


def test_neither_touches_the_other(stack: ExitStack) -> None:
    machine = start(stack, options())
    side_of(machine).advance(50_000)
    before = machine.cpu.state.pack(), bytes(machine.memory.ram8), machine.board.snapshot(), machine.clock.snapshot()
    with closing(machine.snapshot()) as snapshot:
        other = stack.enter_context(closing(machine.twin(snapshot, "bt", BoardOptions())))
        assert side_of(other).advance(LAST) is None
        assert before == (
            machine.cpu.state.pack(), bytes(machine.memory.ram8), machine.board.snapshot(), machine.clock.snapshot()
        )  # fmt: skip
        again = stack.enter_context(closing(machine.twin(snapshot, "interp", BoardOptions())))
        assert again.clock.icount == snapshot.icount == 50_000
        assert side_of(again).advance(LAST) is None
        assert differences(side_of(again), side_of(other)) == []


def test_output_goes_where_it_is_told(stack: ExitStack) -> None:
    printed, others = bytearray(), bytearray()
    machine = start(stack, replace(options(append="quiet"), board=BoardOptions(serial=(printed.extend, None))))
    side_of(machine).advance(LAST)
    assert b"demo>" in printed
    with closing(machine.snapshot()) as snapshot:
        other = stack.enter_context(
            closing(machine.twin(snapshot, "interp", BoardOptions(serial=(others.extend, None))))
        )
    before = bytes(printed)
    other.feed_serial(0, b"echo twins\r")
    side_of(other).advance(LAST + 50_000)
    assert b"twins" in others
    assert printed == before
    assert other.serial_is_listening(0)


def test_input_that_is_to_come_in_again_comes_to_both(stack: ExitStack) -> None:
    plain = start(stack, options(append="quiet"))
    side_of(plain).advance(200_000)
    now_ns = plain.clock.now_ns
    inputs = tuple(Input(now_ns + at_ms * 1_000_000, InputKind.SERIAL, b"echo now\r") for at_ms in (-20, 5, 5))
    recorded: list[Input | None] = []
    machine = start(stack, replace(options(append="quiet"), replay=inputs, record=recorded.append))
    side_of(machine).advance(200_000)
    other = twin(stack, machine)
    assert differences(side_of(machine), side_of(plain)) != [], "the first one has come in"
    with closing(machine.snapshot()) as first, closing(other.snapshot()) as second:
        assert len(first.replay) == 2
        assert first.replay == second.replay
    for each in (machine, other, plain):
        side_of(each).advance(300_000)
    assert differences(side_of(machine), side_of(other)) == []
    assert other.board.com1.queued_bytes == 0
    assert recorded == [None], "the copy is a run of its own"
    third = twin(stack, machine)
    assert third.clock.snapshot() == machine.clock.snapshot()


def test_a_request_to_end_the_run_is_kept(stack: ExitStack) -> None:
    machine = start(stack, options())
    machine.lines.request_exit(ExitRequest(ExitKind.DEBUG_EXIT, 7))
    stop = twin(stack, machine).engine.run(100)
    assert stop.kind is StopKind.EXIT
    assert stop.exit_request == ExitRequest(ExitKind.DEBUG_EXIT, 7)


def test_a_disks_writes_are_copied_and_then_each_ones_own(stack: ExitStack) -> None:
    made = replace(options(), image=b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    machine = start(stack, made)
    assert machine.image.disk is not None
    machine.image.disk.write(3, b"a" * 512)
    other = twin(stack, machine)
    assert other.image.disk is not None
    machine.image.disk.write(4, b"b" * 512)
    other.image.disk.write(3, b"c" * 512)
    assert (other.image.disk.read(3, 2), machine.image.disk.read(3, 1)) == (b"c" * 512 + bytes(512), b"a" * 512)


def test_a_reset_of_the_copy_boots_the_same_image(stack: ExitStack) -> None:
    machine = start(stack, options(append="quiet run=reboot"))
    side_of(machine).advance(40_000)
    other = twin(stack, machine)
    for each in (machine, other):
        side_of(each).advance(200_000)
    assert machine.resets == other.resets >= 1
    assert twin(stack, machine).resets == machine.resets
    assert differences(side_of(machine), side_of(other)) == []


def test_nothing_stays_open() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with closing(Machine(options("boot", ""), engine.factories(), "interp")) as machine:
        before = descriptors()
        with closing(machine.snapshot()) as snapshot, closing(machine.twin(snapshot, "interp", BoardOptions())):
            assert descriptors() > before
        assert descriptors() == before
