"""The I/O address space: which device answers at which port, and at which widths.

It must not know the CPU's permission checks (IOPL, the I/O bitmap), nor what any device does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

PORTS = 1 << 16
FOR_EVER_NS = 1 << 62
_LAST_PORT = PORTS - 1


class PortDevice(Protocol):
    """What can be registered on a `PortBus`; `size_bytes` is one of the widths it was registered with."""

    def load_port(self, port: int, size_bytes: int) -> int:
        """Read `size_bytes` at `port`; the side effects of the read happen."""
        ...

    def store_port(self, port: int, size_bytes: int, value: int) -> None:
        """Write the unsigned `value` of `size_bytes` at `port`."""
        ...


class PortBus:
    """Port accesses of 1, 2 and 4 bytes, passed to the devices.

    An access that no device takes at its width is split into halves, low half first, as the ISA bus converts a wide
    cycle for a narrow card. Ports that nobody claims read all ones and ignore writes.
    """

    __slots__ = ("_loads", "_steady", "_stores")

    def __init__(self) -> None:
        self._loads: dict[int, dict[int, Callable[[int, int], int]]] = {1: {}, 2: {}, 4: {}}
        self._stores: dict[int, dict[int, Callable[[int, int, int], None]]] = {1: {}, 2: {}, 4: {}}
        self._steady: dict[int, Callable[[], int]] = {}

    def register(self, first: int, last: int, device: PortDevice, widths: tuple[int, ...] = (1,)) -> None:
        """Give the ports `first` to `last` to `device`, for accesses of the `widths` (bytes) that lie wholly inside.

        Two devices may share a port at different widths (PCI's dword at CF8h, the reset control's byte at CF9h).

        Raises:
            ValueError: not a range of ports, not a width, or a port already taken at that width.
        """
        if not 0 <= first <= last <= _LAST_PORT:
            raise ValueError(f"not a range of I/O ports: {first:#x} to {last:#x}")
        for width in widths:
            if width not in self._loads:
                raise ValueError(f"a port access has 1, 2 or 4 bytes, not {width}")
            span = range(first, last - width + 2)
            for port in span:
                if port in self._loads[width]:
                    raise ValueError(f"port {port:#x} has a device for accesses of {width} bytes already")
        for width in widths:
            for port in range(first, last - width + 2):
                self._loads[width][port] = device.load_port
                self._stores[width][port] = device.store_port

    def promise(self, port: int, steady_until_ns: Callable[[], int]) -> None:
        """Have a device say until when byte loads of a port give the same, do nothing else, and depend on time alone.

        Args:
            port: of a device.
            steady_until_ns: gives the virtual time at which a load may give something else, if no store, event,
                input or load of another port comes before; 0 if the next load itself does something.
        """
        self._steady[port] = steady_until_ns

    def steady_until_ns(self, port: int, size_bytes: int) -> int:
        """The virtual time until which loads of a port are in vain, as far as its device promises; else 0."""
        if size_bytes != 1:
            return 0
        steady = self._steady.get(port)
        if steady is not None:
            return steady()
        return 0 if port in self._loads[1] else FOR_EVER_NS

    def load(self, port: int, size_bytes: int) -> int:
        """IN: read 1, 2 or 4 bytes at `port`, unsigned."""
        load = self._loads[size_bytes].get(port)
        if load is not None:
            return load(port, size_bytes)
        if size_bytes == 1:
            return 0xFF
        half = size_bytes >> 1
        low = self.load(port, half)
        return low | self.load((port + half) & _LAST_PORT, half) << (8 * half)

    def store(self, port: int, size_bytes: int, value: int) -> None:
        """OUT: write 1, 2 or 4 bytes at `port`; `value` is unsigned and fits."""
        store = self._stores[size_bytes].get(port)
        if store is not None:
            store(port, size_bytes, value)
        elif size_bytes > 1:
            half = size_bytes >> 1
            bits = 8 * half
            self.store(port, half, value & ((1 << bits) - 1))
            self.store((port + half) & _LAST_PORT, half, value >> bits)
