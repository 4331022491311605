from __future__ import annotations

from pathlib import Path

import pytest

from guests import images
from machine.alu import Alu, build_alu
from machine.debug import StopKind
from machine.devices.board import BoardOptions
from machine.loaders.errors import ImageError
from machine.loaders.image import LoadOptions
from machine.memory import MemorySizeError
from machine.pc import EngineFactory, Machine, MachineOptions
from vmm.interp import Interpreter

CODE = 0x10_0000
ENGINES: dict[str, EngineFactory] = {
    "interp": lambda machine: Interpreter(machine.cpu, machine.debug),
    "another": lambda machine: Interpreter(machine.cpu, machine.debug),
}
JMP_SELF = b"\xeb\xfe"


def build(image: str | Path | bytes = JMP_SELF, ram_bytes: int = 4 << 20, **board: object) -> Machine:
    address = CODE if isinstance(image, bytes) else None
    loading = LoadOptions(ram_bytes=ram_bytes, load_address=address)
    return Machine(MachineOptions(image=image, loading=loading, board=BoardOptions(**board)), ENGINES, "interp")  # type: ignore[arg-type]


def state_of(machine: Machine) -> tuple[bytes, object, int]:
    return machine.cpu.state.pack(), machine.board.snapshot(), hash(machine.memory.read(0, machine.memory.ram_bytes))


def test_stands_before_the_first_instruction() -> None:
    machine = build()
    assert (machine.cpu.state.eip, machine.clock.icount) == (CODE, 0)
    assert machine.memory.read(CODE, 2) == JMP_SELF
    assert machine.memory.read(0xF_FFF0, 1) == machine.memory.read(0xFFFF_FFF0, 1)
    machine.close()


def test_arithmetic_is_made_with_the_first_instruction_that_needs_it() -> None:
    made: list[Alu] = []

    def make() -> Alu:
        made.append(build_alu())
        return made[-1]

    loading = LoadOptions(ram_bytes=4 << 20, load_address=CODE)
    machine = Machine(MachineOptions(image=b"\x90\x40\x40\xeb\xfe", loading=loading), ENGINES, "interp", make)
    assert made == []
    machine.engine.run(10)
    assert machine.cpu.alu is made[0]
    assert len(made) == 1
    machine.close()


def test_a_disk_is_booted_by_the_bios() -> None:
    output = bytearray()
    machine = build(images.path("boot"), serial=(output.extend, None))
    assert machine.cpu.state.segments[1].base + machine.cpu.state.eip == 0xFFFF_FFF0
    while machine.clock.icount < 20_000_000:
        stop = machine.engine.run(20_000_000)
        if stop.kind is not StopKind.BUDGET:
            break
    assert stop.kind is StopKind.EXIT
    assert b"boot" in output.lower()
    machine.close()


def test_restart_is_the_first_start_again() -> None:
    machine = build(images.path("demo"), 16 << 20)
    first = state_of(machine)
    machine.engine.run(50_000)
    after = state_of(machine)
    assert after != first
    machine.restart()
    assert state_of(machine) == first
    machine.engine.run(50_000)
    assert state_of(machine) == after
    machine.close()


def test_restart_reads_the_file_again(tmp_path: Path) -> None:
    image = tmp_path / "code.bin"
    image.write_bytes(JMP_SELF)
    machine = build(f"{image}@{CODE:#x}")
    image.write_bytes(b"\x40" + JMP_SELF)
    machine.restart()
    assert machine.memory.read(CODE, 3) == b"\x40" + JMP_SELF
    machine.engine.run(10)
    assert machine.cpu.state.gpr[0] == 1
    machine.close()


def test_a_restart_that_fails_leaves_the_machine_as_it_was(tmp_path: Path) -> None:
    image = tmp_path / "code.bin"
    image.write_bytes(b"\x40" + JMP_SELF)
    machine = build(f"{image}@{CODE:#x}")
    machine.engine.run(100)
    before = state_of(machine)
    image.unlink()
    with pytest.raises(ImageError):
        machine.restart()
    assert state_of(machine) == before
    machine.engine.run(200)
    assert machine.clock.icount == 200
    machine.close()


def test_reset_keeps_memory_and_time_and_loads_the_image_again() -> None:
    machine = build()
    machine.memory.write(CODE, b"\x90\x90")
    machine.memory.write(0x20_0000, b"kept")
    machine.engine.run(1)
    machine.cpu.state.gpr[3] = 5
    machine.lines.raise_nmi()
    machine.reset()
    assert not machine.lines.nmi_pending
    assert machine.memory.read(CODE, 2) == JMP_SELF
    assert machine.memory.read(0x20_0000, 4) == b"kept"
    assert (machine.cpu.state.eip, machine.cpu.state.gpr[3], machine.clock.icount) == (CODE, 0, 1)
    assert machine.cpu.tsc == 0
    assert machine.resets == 1
    machine.engine.run(10)
    assert machine.clock.icount == 10
    machine.close()


def test_an_engine_is_changed_in_mid_run() -> None:
    code = b"\x40\xeb\xfd"
    machine = build(code)
    machine.engine.run(10)
    first = machine.engine
    machine.select_engine("interp")
    assert machine.engine is first
    machine.select_engine("another")
    assert machine.engine is not first
    machine.engine.run(20)
    assert (machine.clock.icount, machine.cpu.state.gpr[0]) == (20, 10)
    with pytest.raises(KeyError):
        machine.select_engine("none such")
    assert machine.engine_names == ("interp", "another")
    machine.close()


def test_input_reaches_the_devices() -> None:
    machine = build()
    machine.feed_serial(0, b"abc")
    machine.feed_serial(1, b"d")
    assert (machine.serial_queued_bytes(0), machine.serial_queued_bytes(1)) == (3, 1)
    assert machine.board.ports.load(0x3F8, 1) == ord("a")
    machine.type_text("a")
    assert machine.board.keyboard.pending
    with pytest.raises(ValueError, match="no key"):
        machine.type_text("é")
    machine.close()


def test_symbols() -> None:
    machine = build(images.path("demo"), 16 << 20)
    assert machine.symbol_file == images.path("demo").absolute()
    machine.close()
    machine = build()
    assert machine.symbol_file is None
    machine.close()
    options = MachineOptions(image=images.path("boot"), symbols=images.symbols_path("boot"))
    machine = Machine(options, ENGINES, "interp")
    assert machine.symbol_file == images.symbols_path("boot")
    machine.close()


def test_statistics_name_engine_and_count() -> None:
    machine = build()
    machine.engine.run(10)
    statistics = machine.statistics()
    assert (statistics["engine"], statistics["icount"]) == ("interp", 10)
    machine.close()


def test_refusals() -> None:
    with pytest.raises(ImageError):
        build("no such file")
    with pytest.raises((MemorySizeError, ImageError)):
        build(ram_bytes=4097)
    with pytest.raises(ValueError, match="port"):
        build(debug_exit_port=0x20)
    with pytest.raises(KeyError):
        Machine(MachineOptions(image=JMP_SELF, loading=LoadOptions(load_address=CODE)), ENGINES, "fast")
