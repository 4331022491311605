"""The 8259A pair at register level, as the data sheet has it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from machine.devices.pic import Pic
from machine.lines import CpuLines

MASTER, SLAVE = 0x20, 0xA0
EOI, ROTATE_EOI = 0x20, 0xA0
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C
SPECIAL_MASK_ON, SPECIAL_MASK_OFF = 0x68, 0x48


class Pair:
    """A pair that has been initialised, with shorthands."""

    def __init__(self, master_icw4: int = 1, slave_icw4: int = 1) -> None:
        self.lines = CpuLines()
        self.pic = Pic(self.lines)
        self.wires = {irq: self.pic.line(irq) for irq in range(16)}
        self.initialise(master_icw4, slave_icw4)

    def initialise(self, master_icw4: int = 1, slave_icw4: int = 1) -> None:
        for command, values in ((MASTER, (0x20, 4, master_icw4)), (SLAVE, (0x28, 2, slave_icw4))):
            self.out(command, 0x11)
            for value in values:
                self.out(command + 1, value)

    def out(self, port: int, *values: int) -> None:
        for value in values:
            self.pic.store_port(port, 1, value)

    def read(self, port: int) -> int:
        return self.pic.load_port(port, 1)

    def up(self, *irqs: int) -> None:
        for irq in irqs:
            self.wires[irq](True)

    def down(self, *irqs: int) -> None:
        for irq in irqs:
            self.wires[irq](False)

    def taken(self) -> list[int]:
        """Acknowledge, without EOI, until INTR falls."""
        vectors = []
        while self.lines.intr:
            peeked = self.lines.peek()
            vectors.append(self.lines.acknowledge())
            assert vectors[-1] == peeked
        return vectors

    def irr(self, port: int = MASTER) -> int:
        self.out(port, READ_IRR)
        return self.read(port)

    def isr(self, port: int = MASTER) -> int:
        self.out(port, READ_ISR)
        return self.read(port)


def vectors(irqs: Iterable[int]) -> list[int]:
    return [0x20 + irq for irq in irqs]


def test_nothing_is_asked_before_initialisation() -> None:
    lines = CpuLines()
    pic = Pic(lines)
    pic.line(1)(True)
    assert not lines.intr
    for value in (0x20, 4, 1):
        pic.store_port(MASTER + 1, 1, value)
    pic.store_port(MASTER, 1, 0x11)
    assert not lines.intr
    for value in (0x20, 4):
        pic.store_port(MASTER + 1, 1, value)
        assert not lines.intr
    pic.line(1)(False)
    pic.line(1)(True)
    pic.store_port(MASTER + 1, 1, 1)
    assert lines.intr


@pytest.mark.parametrize(
    ("icw1", "following"),
    [(0x11, (0x23, 4, 1)), (0x10, (0x23, 4)), (0x13, (0x23, 1)), (0x12, (0x23,))],
)
def test_initialisation_sequences(icw1: int, following: tuple[int, ...]) -> None:
    pair = Pair()
    pair.out(MASTER + 1, 0xFF)
    pair.out(MASTER, icw1)
    pair.out(MASTER + 1, *following)
    assert pair.read(MASTER + 1) == 0
    pair.out(MASTER + 1, 0x5A)
    assert pair.read(MASTER + 1) == 0x5A
    pair.up(0)
    # The low three bits of ICW2 do not count in 8086 mode.
    assert pair.taken() == [0x20]


def test_icw1_clears_everything_but_elcr_and_forgets_edges() -> None:
    pair = Pair()
    pair.out(0x4D1, 0x02)
    pair.up(1, 3)
    pair.lines.acknowledge()
    pair.out(MASTER, 0xC2)
    pair.initialise()
    assert (pair.irr(), pair.isr(), pair.read(MASTER + 1), pair.read(0x4D1)) == (0, 0, 0, 0x02)
    pair.down(1)
    pair.up(1, 0)
    assert pair.lines.acknowledge() == 0x20


def test_fixed_priority_and_nesting() -> None:
    pair = Pair()
    pair.up(5)
    assert pair.taken() == vectors([5])
    pair.up(7, 3)
    assert pair.taken() == vectors([3])
    pair.up(4)
    assert pair.taken() == []
    assert (pair.isr(), pair.irr()) == (0x28, 0x90)
    pair.out(MASTER, EOI)
    assert pair.isr() == 0x20
    assert pair.taken() == vectors([4])
    pair.out(MASTER, EOI, EOI)
    assert pair.taken() == vectors([7])


def test_the_slave_comes_through_input_2() -> None:
    pair = Pair()
    pair.up(8, 12, 3)
    assert pair.taken() == vectors([8])
    assert (pair.isr(), pair.isr(SLAVE), pair.irr(SLAVE)) == (0x04, 0x01, 0x10)
    pair.out(SLAVE, EOI)
    assert pair.taken() == []
    pair.out(MASTER, EOI)
    assert pair.taken() == vectors([12])
    pair.out(SLAVE, EOI)
    pair.out(MASTER, EOI)
    assert pair.taken() == vectors([3])


def test_masks_hide_but_do_not_forget() -> None:
    pair = Pair()
    pair.out(MASTER + 1, 0xFF)
    pair.up(1)
    assert (pair.irr(), pair.lines.intr) == (2, False)
    pair.out(MASTER + 1, 0xFD)
    assert pair.taken() == vectors([1])


def test_an_edge_counts_once_and_a_level_for_as_long_as_it_lasts() -> None:
    pair = Pair()
    pair.out(0x4D0, 0x20)
    pair.up(5, 6)
    assert pair.taken() == vectors([5])
    pair.out(MASTER, EOI)
    assert pair.taken() == vectors([5])
    pair.down(5)
    pair.out(MASTER, EOI)
    assert pair.taken() == vectors([6])
    pair.out(MASTER, EOI)
    assert pair.taken() == []
    pair.down(6)
    pair.up(6)
    assert pair.taken() == vectors([6])


def test_elcr_has_the_chipsets_fixed_edges() -> None:
    pair = Pair()
    pair.out(0x4D0, 0xFF)
    pair.out(0x4D1, 0xFF)
    assert (pair.read(0x4D0), pair.read(0x4D1)) == (0xF8, 0xDE)


def test_a_request_that_goes_away_takes_intr_with_it() -> None:
    pair = Pair()
    pair.up(5)
    assert pair.lines.intr
    pair.down(5)
    assert (pair.lines.intr, pair.irr()) == (False, 0)


def test_spurious_interrupts_answer_7_and_serve_nothing() -> None:
    pair = Pair()
    assert pair.pic.acknowledge() == 0x27
    assert pair.isr() == 0
    pair.up(12)
    pair.pic.slave.set_input(4, False)
    pair.pic.master.set_input(2, True)
    assert pair.lines.peek() == pair.pic.acknowledge() == 0x2F
    # The master does not know that its slave's request has gone.
    assert (pair.isr(), pair.isr(SLAVE)) == (4, 0)


def test_non_specific_eoi_ignores_the_level() -> None:
    pair = Pair()
    pair.up(5)
    pair.taken()
    pair.up(1)
    pair.taken()
    pair.out(MASTER, 0x25)
    assert pair.isr() == 0x20


def test_specific_eoi() -> None:
    pair = Pair()
    pair.up(5)
    pair.taken()
    pair.up(1)
    pair.taken()
    pair.out(MASTER, 0x65)
    assert pair.isr() == 0x02


def test_eoi_without_anything_in_service_does_nothing() -> None:
    pair = Pair()
    pair.out(MASTER, EOI, ROTATE_EOI)
    pair.up(0, 7)
    assert pair.taken() == vectors([0])


@pytest.mark.parametrize(
    ("command", "order"),
    [(ROTATE_EOI, [4, 5, 6, 7, 0, 1, 3]), (0xE5, [6, 7, 0, 1, 3, 4, 5]), (EOI, [0, 1, 3, 4, 5, 6, 7])],
)
def test_rotation_at_eoi(command: int, order: list[int]) -> None:
    pair = Pair()
    pair.up(3)
    pair.taken()
    pair.down(3)
    pair.out(MASTER, command)
    if command == 0xE5:
        pair.out(MASTER, 0x63)
    pair.out(MASTER + 1, 0xFF)
    pair.up(0, 1, 3, 4, 5, 6, 7)
    pair.out(MASTER + 1, 0)
    seen = []
    for _ in order:
        seen.append(pair.lines.acknowledge() - 0x20)
        pair.out(MASTER, 0x60 | seen[-1])
    assert seen == order


@pytest.mark.parametrize(("lowest", "ascending"), [(4, [4, 3, 0, 7, 5]), (3, [3, 1, 0, 6, 4]), (7, [7, 6, 3, 1, 0])])
def test_set_priority(lowest: int, ascending: list[int]) -> None:
    pair = Pair()
    pair.up(3)
    pair.taken()
    pair.down(3)
    pair.out(MASTER, 0xC0 | lowest)
    assert pair.isr() == 0x08, "it is no EOI"
    pair.out(MASTER, EOI)
    seen = []
    for irq in ascending:
        pair.up(irq)
        seen += pair.taken()
    assert seen == vectors(ascending), "each interrupts the one before"
    assert pair.isr() == sum(1 << irq for irq in ascending)


def test_automatic_eoi_leaves_nothing_in_service() -> None:
    pair = Pair(master_icw4=3)
    pair.up(6, 1)
    assert sorted(pair.taken()) == vectors([1, 6])
    assert pair.isr() == 0


def test_rotation_in_automatic_eoi() -> None:
    pair = Pair(master_icw4=3)
    pair.out(MASTER + 1, 0xFF)
    pair.out(MASTER, 0x80)
    pair.up(0, 1)
    pair.out(MASTER + 1, 0)
    assert pair.lines.acknowledge() == 0x20
    pair.down(0)
    pair.up(0, 7)
    assert pair.taken() == vectors([1, 7, 0])
    pair.out(MASTER, 0x00)
    pair.down(0, 1)
    pair.up(1)
    pair.up(0)
    assert pair.taken() == vectors([1, 0])


def test_automatic_eoi_of_the_slave_makes_an_edge_for_each() -> None:
    pair = Pair(master_icw4=3, slave_icw4=3)
    pair.out(SLAVE + 1, 0xFF)
    pair.up(8, 9, 15)
    pair.out(SLAVE + 1, 0)
    assert pair.taken() == vectors([8, 9, 15])


def test_special_fully_nested_mode_lets_the_slave_in_again() -> None:
    for icw4, expected in ((0x01, []), (0x11, vectors([8]))):
        pair = Pair(master_icw4=icw4)
        pair.up(12)
        pair.taken()
        pair.up(3, 8)
        assert pair.taken() == expected, "neither lets in what is below the cascade"


def test_special_mask_mode_opens_what_is_not_masked() -> None:
    pair = Pair()
    pair.up(3)
    pair.taken()
    pair.out(MASTER + 1, 0x08)
    pair.up(6)
    assert pair.taken() == []
    pair.out(MASTER, SPECIAL_MASK_ON)
    assert pair.taken() == vectors([6])
    # A non-specific EOI passes over the masked level.
    pair.out(MASTER, EOI)
    assert pair.isr() == 0x08
    pair.out(MASTER, EOI)
    assert pair.isr() == 0x08
    pair.out(MASTER, SPECIAL_MASK_OFF, EOI)
    assert pair.isr() == 0


def test_special_mask_needs_its_enable_bit() -> None:
    pair = Pair()
    pair.up(3)
    pair.taken()
    pair.out(MASTER + 1, 0x08)
    pair.out(MASTER, 0x28)
    pair.up(6)
    assert pair.taken() == []


def test_poll_acknowledges_and_reads_the_level_once() -> None:
    pair = Pair()
    pair.out(MASTER, READ_IRR)
    pair.up(6)
    pair.out(MASTER, POLL)
    assert pair.read(MASTER) == 0x86
    assert (pair.read(MASTER), pair.isr(), pair.lines.intr) == (0, 0x40, False)
    pair.out(MASTER, EOI, POLL)
    assert pair.read(MASTER) == 0
    pair.out(MASTER + 1, 0x77)
    pair.out(MASTER, POLL)
    assert (pair.read(MASTER + 1), pair.read(MASTER + 1)) == (0, 0x77)


def test_poll_goes_before_the_choice_of_register() -> None:
    pair = Pair()
    pair.out(MASTER, READ_ISR)
    pair.up(1)
    pair.out(MASTER, POLL | 2)
    assert pair.read(MASTER) == 0x81
    assert pair.read(MASTER) == 0x02, "ISR is still selected"


def test_registers_stay_selected() -> None:
    pair = Pair()
    pair.up(1)
    pair.taken()
    pair.up(4)
    assert (pair.irr(), pair.read(MASTER)) == (0x10, 0x10)
    assert (pair.isr(), pair.read(MASTER)) == (0x02, 0x02)
    pair.out(MASTER, 0x08)
    assert pair.read(MASTER) == 0x02


def test_reset_takes_requests_back() -> None:
    pair = Pair()
    pair.up(1, 12)
    pair.pic.reset()
    assert (pair.lines.intr, pair.pic.master.levels, pair.pic.slave.levels) == (False, 0, 0)


def test_describe_names_both_chips() -> None:
    pair = Pair()
    pair.up(1)
    first, second = pair.pic.describe().splitlines()
    assert first.startswith("pic0: irr=02 imr=00 isr=00 base=20")
    assert second.startswith("pic1: irr=00")
