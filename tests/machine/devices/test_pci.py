"""PCI configuration mechanism 1."""

from __future__ import annotations

import pytest

from machine.devices.pci import Pci
from machine.ports import PortBus

ONES = 0xFFFF_FFFF


class Bus:
    def __init__(self) -> None:
        self.pci = Pci()
        self.ports = PortBus()
        self.ports.register(0xCF8, 0xCFB, self.pci, (4,))
        self.ports.register(0xCFC, 0xCFF, self.pci, (1, 2, 4))

    def select(self, device: int, offset: int, *, bus: int = 0, function: int = 0) -> None:
        self.ports.store(0xCF8, 4, 0x8000_0000 | bus << 16 | device << 11 | function << 8 | offset)


@pytest.mark.parametrize(("device", "identity", "class_code"), [(0, 0x1237_8086, 0x0600), (1, 0x7000_8086, 0x0601)])
def test_the_two_bridges(device: int, identity: int, class_code: int) -> None:
    bus = Bus()
    bus.select(device, 0)
    assert bus.ports.load(0xCFC, 4) == identity
    bus.select(device, 8)
    assert bus.ports.load(0xCFC, 4) >> 16 == class_code


def test_all_widths() -> None:
    bus = Bus()
    bus.select(0, 0)
    assert [bus.ports.load(0xCFC + n, 1) for n in range(4)] == [0x86, 0x80, 0x37, 0x12]
    assert (bus.ports.load(0xCFC, 2), bus.ports.load(0xCFE, 2)) == (0x8086, 0x1237)


@pytest.mark.parametrize(("bus_number", "device", "function"), [(0, 2, 0), (0, 31, 7), (0, 0, 1), (0, 1, 1), (1, 0, 0)])
def test_nothing_else_is_there(bus_number: int, device: int, function: int) -> None:
    bus = Bus()
    bus.select(device, 0, bus=bus_number, function=function)
    bus.ports.store(0xCFC, 4, 0)
    assert [bus.ports.load(0xCFC, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, ONES]


def test_without_the_enable_bit_nothing_answers() -> None:
    bus = Bus()
    bus.ports.store(0xCF8, 4, 0)
    assert bus.ports.load(0xCFC, 4) == ONES
    bus.ports.store(0xCF8, 4, 0x0000_0001)
    assert bus.ports.load(0xCFC, 4) == ONES


def test_the_address_register_keeps_its_bits_and_takes_dwords_only() -> None:
    bus = Bus()
    bus.ports.store(0xCF8, 4, ONES)
    assert bus.ports.load(0xCF8, 4) == 0x80FF_FFFC
    bus.ports.store(0xCF8, 1, 0)
    bus.ports.store(0xCFA, 2, 0)
    assert (bus.ports.load(0xCF8, 4), bus.ports.load(0xCF8, 1), bus.ports.load(0xCF8, 2)) == (0x80FF_FFFC, 0xFF, 0xFFFF)


def test_what_can_be_written_reads_back_and_identities_stay() -> None:
    bus = Bus()
    for offset, written, expected in ((0x00, 0, 0x1237_8086), (0x58, 0x3322_1100, 0x3322_1100), (0x08, 0, 0x0600_0002)):
        bus.select(0, offset)
        bus.ports.store(0xCFC, 4, written)
        assert bus.ports.load(0xCFC, 4) == expected
    bus.select(1, 0x60)
    bus.ports.store(0xCFD, 1, 0xFB)
    assert bus.ports.load(0xCFC, 4) == 0x8080_8B80
    bus.pci.reset()
    assert bus.ports.load(0xCF8, 4) == 0
    for device, offset, expected in ((1, 0x60, 0x8080_8080), (0, 0x58, 0)):
        bus.select(device, offset)
        assert bus.ports.load(0xCFC, 4) == expected
