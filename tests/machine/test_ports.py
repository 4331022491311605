"""The port bus: who answers, at which width, and what happens between devices."""

from __future__ import annotations

import pytest

from machine.ports import PortBus


class Ports:
    """Remembers accesses; reads give the port number's low byte in every byte."""

    def __init__(self, name: str, log: list[tuple[str, str, int, int, int]]) -> None:
        self.name = name
        self.log = log

    def load_port(self, port: int, size_bytes: int) -> int:
        self.log.append((self.name, "in", port, size_bytes, 0))
        return int.from_bytes(bytes([port & 0xFF] * size_bytes), "little")

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        self.log.append((self.name, "out", port, size_bytes, value))


@pytest.fixture
def log() -> list[tuple[str, str, int, int, int]]:
    return []


def test_nobody_reads_as_ones_and_ignores_writes() -> None:
    bus = PortBus()
    assert [bus.load(0x1234, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    for size in (1, 2, 4):
        bus.store(0xFFFF, size, 0)


def test_wide_accesses_of_a_byte_device_are_split_low_byte_first(log: list[tuple[str, str, int, int, int]]) -> None:
    bus = PortBus()
    bus.register(0x10, 0x13, Ports("a", log))
    assert bus.load(0x10, 4) == 0x1312_1110
    bus.store(0x10, 4, 0xDDCC_BBAA)
    assert log == [("a", "in", 0x10 + n, 1, 0) for n in range(4)] + [
        ("a", "out", 0x10 + n, 1, value) for n, value in enumerate((0xAA, 0xBB, 0xCC, 0xDD))
    ]


def test_a_split_access_may_end_in_another_device_or_nowhere(log: list[tuple[str, str, int, int, int]]) -> None:
    bus = PortBus()
    bus.register(0x10, 0x10, Ports("a", log))
    bus.register(0x12, 0x13, Ports("b", log), (2,))
    assert bus.load(0x10, 4) == 0x1212_FF10
    assert bus.load(0x13, 1) == 0xFF
    bus.store(0x10, 4, 0x4433_2211)
    assert log[2:] == [("a", "out", 0x10, 1, 0x11), ("b", "out", 0x12, 2, 0x4433)]


def test_widths_share_a_port(log: list[tuple[str, str, int, int, int]]) -> None:
    bus = PortBus()
    bus.register(0xCF8, 0xCFB, Ports("address", log), (4,))
    bus.register(0xCF9, 0xCF9, Ports("reset", log))
    bus.store(0xCF8, 4, 1)
    bus.store(0xCF9, 1, 2)
    bus.store(0xCF8, 2, 0x0300)
    assert log == [("address", "out", 0xCF8, 4, 1), ("reset", "out", 0xCF9, 1, 2), ("reset", "out", 0xCF9, 1, 3)]


def test_a_wide_access_lies_wholly_inside(log: list[tuple[str, str, int, int, int]]) -> None:
    bus = PortBus()
    bus.register(0xCFC, 0xCFF, Ports("data", log), (1, 2, 4))
    assert bus.load(0xCFE, 4) == 0xFFFF_FEFE
    assert bus.load(0xCFF, 2) == 0xFFFF
    assert log == [("data", "in", 0xCFE, 2, 0), ("data", "in", 0xCFF, 1, 0)]


def test_the_last_port_wraps(log: list[tuple[str, str, int, int, int]]) -> None:
    bus = PortBus()
    bus.register(0, 0, Ports("first", log))
    assert bus.load(0xFFFF, 2) == 0x00FF


@pytest.mark.parametrize(("first", "last", "widths"), [(-1, 0, (1,)), (5, 4, (1,)), (0, 0x1_0000, (1,)), (0, 7, (8,))])
def test_what_is_no_range_is_refused(
    first: int, last: int, widths: tuple[int, ...], log: list[tuple[str, str, int, int, int]]
) -> None:
    with pytest.raises(ValueError, match="port"):
        PortBus().register(first, last, Ports("a", log), widths)


def test_a_taken_port_is_refused_and_nothing_is_registered(log: list[tuple[str, str, int, int, int]]) -> None:
    bus = PortBus()
    bus.register(0x12, 0x12, Ports("a", log))
    with pytest.raises(ValueError, match="port 0x12"):
        bus.register(0x10, 0x17, Ports("b", log))
    assert bus.load(0x10, 1) == 0xFF


def test_bytes_of_a_port_are_steady_as_long_as_the_device_says(log: list[tuple[str, str, int, int, int]]) -> None:
    bus = PortBus()
    bus.register(0x10, 0x13, Ports("a", log), (1, 2))
    bus.promise(0x11, lambda: 1234)
    assert [bus.steady_until_ns(port, 1) for port in (0x10, 0x11, 0x12)] == [0, 1234, 0]
    assert bus.steady_until_ns(0x11, 2) == 0
    assert log == []
