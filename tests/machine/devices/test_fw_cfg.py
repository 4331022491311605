"""fw_cfg in its port form, read as a guest reads it."""

from __future__ import annotations

import struct

import pytest

from machine.devices.fw_cfg import FwCfg, pc_items
from machine.e820 import memory_map
from machine.ports import PortBus

RAM = 64 << 20


def port_bus(command_line: bytes | None = None, files: dict[str, bytes] | None = None) -> PortBus:
    ports = PortBus()
    device = FwCfg(pc_items(RAM, memory_map(RAM), command_line, cpus=2, files=files))
    ports.register(0x510, 0x511, device)
    ports.register(0x510, 0x511, device, (2,))
    return ports


def item(ports: PortBus, key: int, length: int) -> bytes:
    ports.store(0x510, 2, key)
    return bytes(ports.load(0x511, 1) for _ in range(length))


@pytest.mark.parametrize(
    ("key", "data"),
    [
        (0x00, b"QEMU\0"), (0x01, b"\x01\0\0\0"), (0x03, struct.pack("<QB", RAM, 0)), (0x05, b"\x02\0"),
        (0x0F, b"\x02\0"), (0x15, b"\0\0"), (0x1234, b"\0\0\0"),
    ],
)  # fmt: skip
def test_items(key: int, data: bytes) -> None:
    assert item(port_bus(), key, len(data)) == data


def test_command_line() -> None:
    ports = port_bus(b"console=ttyS0")
    assert item(ports, 0x14, 4) == struct.pack("<I", 14)
    assert item(ports, 0x15, 15) == b"console=ttyS0\0\0"


def test_the_directory_leads_to_the_files() -> None:
    ports = port_bus(files={"opt/a": b"hello", "zz": b""})
    (count,) = struct.unpack(">I", item(ports, 0x19, 4))
    assert count == 3
    entries = {}
    for _ in range(count):
        size, key, reserved, name = struct.unpack(">IHH56s", bytes(ports.load(0x511, 1) for _ in range(64)))
        entries[name.rstrip(b"\0").decode()] = (size, key)
        assert reserved == 0
    assert list(entries) == ["etc/e820", "opt/a", "zz"]
    assert item(ports, entries["opt/a"][1], 6) == b"hello\0"
    size, key = entries["etc/e820"]
    regions = list(struct.iter_unpack("<QQI", item(ports, key, size)))
    assert regions == [(region.base, region.length_bytes, region.kind) for region in memory_map(RAM)]


def test_reset_selects_the_signature() -> None:
    device = FwCfg(pc_items(RAM, memory_map(RAM)))
    device.store_port(0x510, 2, 3)
    device.load_port(0x511, 1)
    device.reset()
    assert bytes(device.load_port(0x511, 1) for _ in range(4)) == b"QEMU"


def test_selecting_starts_anew_and_only_words_select() -> None:
    ports = port_bus()
    assert item(ports, 0, 2) == b"QE"
    ports.store(0x510, 1, 1)
    ports.store(0x511, 1, 1)
    assert ports.load(0x511, 1) == ord("M")
    assert ports.load(0x510, 1) == ord("U"), "the data comes at both ports"
    assert item(ports, 0, 4) == b"QEMU"
