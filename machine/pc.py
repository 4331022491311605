"""The whole PC: memory, CPU, board, firmware and image, put together, reset, restarted, and run by one of its engines.

It must not know any engine, debugger or command line: engines come as factories, options as values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path

from machine.alu import build_alu
from machine.bios import Caller, Firmware, rom
from machine.clock import Clock, Event
from machine.cpu import AluSource, Cpu
from machine.cpuid import P6_NO_FPU, CpuModel
from machine.debug import DebugControl
from machine.devices.board import Board, BoardOptions
from machine.devices.ps2_keyboard import scan_codes
from machine.devices.uart import Output
from machine.disk import Disk, Media
from machine.engine import Engine, EngineError
from machine.fpu import FpuPort
from machine.fpustate import FpuState
from machine.inputs import Input, InputError, InputKind
from machine.lines import CpuLines
from machine.loaders.detection import load
from machine.loaders.image import LoadedImage, LoadOptions, c_string
from machine.memory import PhysicalMemory
from machine.snapshot import Snapshot
from machine.state import STATE_LAYOUT

EngineFactory = Callable[["Machine"], Engine]
FpuFactory = Callable[[FpuState], FpuPort]

_FLOPPY_144 = 4  # CMOS drive type
_FIRST_FLOPPY = 0x00
_FIRST_HARD_DISK = 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """What makes one PC differ from another.

    Attributes:
        image: what to boot: a file's path, or its bytes.
        model: the CPU.
        make_fpu: makes what computes floating point on a CPU's registers; needed for a model that has an FPU.
        loading: RAM size, command line, modules and what else decides how the image is loaded.
        board: where serial bytes go and the like; drives and command line are filled in from the image.
        ns_per_insn: virtual nanoseconds that an instruction takes.
        symbols: file with symbols for a debugger; None: the image itself, if it is an ELF file.
        replay: inputs of an earlier run, which come in again when they came then.
        record: told of each input; None first, at every power-on.
    """

    image: str | PathLike[str] | bytes
    model: CpuModel = P6_NO_FPU
    make_fpu: FpuFactory | None = None
    loading: LoadOptions = field(default_factory=LoadOptions)
    board: BoardOptions = field(default_factory=BoardOptions)
    ns_per_insn: int = 1
    symbols: Path | None = None
    replay: tuple[Input, ...] = ()
    record: Callable[[Input | None], None] | None = None


class Machine:
    """One PC, from power-on on.

    Attributes:
        options: what it was made from.
        debug: what a debugger wants; it outlives restarts.
        image: the loaded image.
        memory, clock, lines, board, cpu, firmware: the parts; new ones after each `restart`.
        engine: what runs the CPU.
        resets: how often RESET was pulled since power-on.
        engine_since_icount: when it took over: what it has counted begins there.
    """

    image: LoadedImage
    memory: PhysicalMemory
    clock: Clock
    lines: CpuLines
    board: Board
    cpu: Cpu
    firmware: Firmware
    engine: Engine
    engine_since_icount: int

    def __init__(
        self,
        options: MachineOptions,
        engines: Mapping[str, EngineFactory],
        engine: str,
        alu: AluSource | None = None,
        start: Snapshot | None = None,
    ) -> None:
        """Put the machine together and stop before the first instruction.

        Args:
            options: what to build.
            engines: by name, what makes an engine for this machine.
            engine: name of the one that runs the CPU.
            alu: arithmetic with the undefined flags that the guest is to see, or what makes it once something needs it;
                None: those of a fixed model.
            start: go on from there instead; of a machine with options that differ in outputs only.

        Raises:
            ImageError: the image cannot be loaded.
            MemorySizeError, ValueError: the options make no PC, such as one whose FPU nothing computes for.
            InputError: something cannot come in again.
            KeyError: there is no such engine.
        """
        if options.model.has_fpu and options.make_fpu is None:
            raise ValueError("the CPU model has an FPU, and nothing computes for it")
        for entry in options.replay:
            _check_input(entry)
        self.options = options
        self.debug = DebugControl()
        self._factories = dict(engines)
        self._alu = alu or build_alu
        if start is None:
            self._power_on(load(options.image, options.loading), self._factories[engine])
        else:
            self._go_on(start, self._factories[engine])

    def _power_on(self, image: LoadedImage, factory: EngineFactory) -> None:
        self._assemble(image)
        self._boot()
        self._record(None)
        for entry in self.options.replay:
            self._replay.append((entry, self._schedule(entry)))
        self._let_run(factory(self))

    def _assemble(self, image: LoadedImage) -> None:
        """New parts, wired, with power but not booted."""
        options = self.options
        self.image = image
        self._replay: list[tuple[Input, Event]] = []  # what is to come in again
        self._waiting: list[tuple[Input, Event]] = []  # what came in the midst of a REP
        self.clock = Clock(options.ns_per_insn)
        self.lines = CpuLines()
        self.memory = PhysicalMemory(options.loading.ram_bytes)
        self.memory.map_rom(rom())
        self._serial_used = [False, False]
        board = _board_options(options, image)
        serial = (self._noting_use(0, board.serial[0]), self._noting_use(1, board.serial[1]))
        self.board = Board(self.clock, self.lines, self.memory, replace(board, serial=serial))
        self.cpu = Cpu(self.memory, self.board.ports, self.lines, self.clock, self._alu)
        self.cpu.fpu_error = self.board.fpu_error.lines
        self.cpu.model = options.model
        if options.make_fpu is not None and options.model.has_fpu:
            self.cpu.fpu = options.make_fpu(self.cpu.state.fpu)
        caller = Caller(self.cpu.state, self.memory)
        self.firmware = Firmware(caller, self.memory, self.board.ports, _drives(image.disk))
        self.resets = 0

    def _noting_use(self, index: int, output: Output | None) -> Output:
        def pass_on(data: bytes) -> None:
            self._serial_used[index] = True
            if output is not None:
                output(data)

        return pass_on

    def _boot(self) -> None:
        """From RESET to the image's first instruction; a disk image is left to the BIOS."""
        self.cpu.reset()
        if self.image.disk is None:
            self.firmware.self_test()
            self.image.install(self.cpu.state, self.memory)
            self.cpu.set_cpl(0)
            self.cpu.mmu.flush()

    def reset(self) -> None:
        """Pull RESET, as the reset button does: CPU and chips start again, RAM and time go on.

        The image is loaded again, over what RAM holds; a disk image is booted by the BIOS, with the guest's writes.
        """
        self.lines.reset()
        self.board.reset()
        self._boot()
        self.cpu.state.tsc_offset = -self.clock.now_ns & 0xFFFF_FFFF_FFFF_FFFF
        self.resets += 1

    def restart(self) -> None:
        """Switch off and on: the image is read from its file again, and everything is as it was at the first start.

        Raises:
            ImageError: the image cannot be loaded any more; the machine is as it was.
        """
        image = load(self.options.image, self.options.loading)
        factory = self._factories[self.engine.name]
        self.close()
        self._power_on(image, factory)

    def close(self) -> None:
        """Give memory and files back to the host."""
        self.engine.leave()
        self._release()

    def _release(self) -> None:
        self.cpu.fpu.close()
        self.memory.close()
        if self.image.disk is not None:
            self.image.disk.close()

    # Copies.

    def snapshot(self) -> Snapshot:
        """All that decides how the guest goes on; to be closed. The machine stands at an instruction boundary."""
        replay = tuple(
            (entry, (event.at_ns, event.order)) for entry, event in (*self._replay, *self._waiting) if event.pending
        )
        return Snapshot(self.cpu, self.board, self.image, self.resets, tuple(self._serial_used), replay)

    def twin(self, start: Snapshot, engine: str, board: BoardOptions) -> Machine:
        """Another machine that goes on from a snapshot of this one, or of a twin; this one is not touched.

        Args:
            start: where it begins.
            engine: which of this machine's engines runs it.
            board: as of this machine, but for where outputs go. Nothing of what comes in is recorded.

        Raises:
            KeyError, EngineError: there is no such engine, or it cannot run on this host.
            OSError: the host has no memory, or no more files can be open.
        """
        options = replace(self.options, board=board, replay=(), record=None)
        return Machine(options, self._factories, engine, self._alu, start)

    def _go_on(self, start: Snapshot, factory: EngineFactory) -> None:
        self._assemble(start.copy_image())
        try:
            start.restore(self.cpu, self.board)
            self.resets = start.resets
            self._serial_used[:] = start.serial_used
            for entry, at in start.replay:
                event = self.clock.resume(list(at), partial(self._apply, entry))
                assert event is not None
                self._replay.append((entry, event))
            self._let_run(factory(self))
        except (EngineError, OSError):
            self._release()
            raise

    # Engines.

    @property
    def engine_names(self) -> tuple[str, ...]:
        """The engines that `select_engine` knows."""
        return tuple(self._factories)

    def select_engine(self, name: str) -> None:
        """Let another engine run the CPU from here on.

        Raises:
            KeyError: there is none of this name.
            EngineError: it cannot run on this host; the engine of before runs on.
        """
        factory = self._factories[name]
        if name == self.engine.name:
            return
        engine, before = factory(self), self.engine
        before.leave()
        try:
            self._let_run(engine)
        except (EngineError, OSError) as error:
            before.enter()
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"The host has no room for {name}: {error}") from error

    def _let_run(self, engine: Engine) -> None:
        engine.enter()
        self.engine, self.engine_since_icount = engine, self.clock.icount

    def statistics(self) -> dict[str, int | float | str]:
        """What the engine has counted, with the machine's own counters."""
        clock = self.clock
        return {
            "engine": self.engine.name,
            "icount": clock.icount,
            "virtual ns": clock.now_ns,
            "virtual ns in HLT": clock.idle_ns,
            "resets": self.resets,
            "engine since icount": self.engine_since_icount,
            "undefined flags": self.cpu.alu.profile.name,
            **self.engine.statistics(),
        }

    # What comes in from outside, at the icount of now.

    def feed_serial(self, index: int, data: bytes) -> None:
        """Send bytes to COM1 (index 0) or COM2 (1), as a terminal there would."""
        self._enter(InputKind.SERIAL, data, index)

    def serial_queued_bytes(self, index: int) -> int:
        """How many of those bytes the guest has not read yet."""
        line = InputKind.SERIAL, index
        waiting = sum(len(one.data) for one, event in self._waiting if event.pending and (one.kind, one.index) == line)
        return (self.board.com1, self.board.com2)[index].queued_bytes + waiting

    def serial_is_listening(self, index: int) -> bool:
        """True once the guest has used COM1 or COM2: it lets received bytes interrupt, or has sent one."""
        return self._serial_used[index] or (self.board.com1, self.board.com2)[index].receives_by_interrupt

    def type_text(self, text: str) -> None:
        """Type on the keyboard; ValueError for a character that has no key."""
        self._enter(InputKind.TEXT, text.encode())

    def press_keys(self, codes: bytes) -> None:
        """Inject scan codes of set 2, with F0h before those of a released key."""
        self._enter(InputKind.KEYS, codes)

    def raise_nmi(self) -> None:
        """Pull NMI, unless port 70h masks it."""
        self._enter(InputKind.NMI)

    def press_reset(self) -> None:
        """Push the reset button: see `reset`."""
        self._record(Input(self.clock.now_ns, InputKind.RESET))
        self.reset()

    def note_memory_write(self, physical: int, data: bytes) -> None:
        """A debugger has written memory."""
        self._record(Input(self.clock.now_ns, InputKind.MEMORY, data, physical))

    def note_register_write(self) -> None:
        """A debugger has written registers."""
        self._record(Input(self.clock.now_ns, InputKind.REGISTERS, self.cpu.state.pack()))

    @property
    def can_record(self) -> bool:
        """Whether a debugger's writes can be repeated, if that is wanted: virtual time stands still in a REP."""
        return self.options.record is None or not self.cpu.repeating

    def _enter(self, kind: InputKind, data: bytes = b"", index: int = 0) -> None:
        """Let something come in: at once, but behind what devices do now; or at the end of the REP that is under way.

        Each input has a place in the order of instructions and events that its time alone tells, for it to be repeated.
        """
        clock = self.clock
        if self.cpu.repeating:
            entry = Input(clock.now_ns + clock.ns_per_insn, kind, data, index)
            self._waiting = [(one, event) for one, event in self._waiting if event.pending]
            self._waiting.append((entry, self._schedule(entry)))
        else:
            entry = Input(clock.now_ns, kind, data, index)
            clock.run_due()
            self._apply(entry)
        self._record(entry)

    def _schedule(self, entry: Input) -> Event:
        return self.clock.schedule(entry.at_ns, partial(self._apply, entry), last=True)

    def _record(self, entry: Input | None) -> None:
        if self.options.record is not None:
            self.options.record(entry)

    def _apply(self, entry: Input) -> None:
        board, data = self.board, entry.data
        if entry.kind is InputKind.SERIAL:
            (board.com1, board.com2)[entry.index & 1].receive(data)
        elif entry.kind is InputKind.KEYS:
            board.keyboard.press(data)
        elif entry.kind is InputKind.TEXT:
            board.keyboard.type_text(data.decode())
        elif entry.kind is InputKind.NMI:
            board.raise_nmi()
        elif entry.kind is InputKind.RESET:
            self.lines.request_reset()
        elif entry.kind is InputKind.MEMORY:
            self.memory.write(entry.index, data)
        else:
            self.cpu.state.unpack(data)
            self.cpu.set_cpl(self.cpu.state.cpl)
            self.cpu.mmu.flush()

    @property
    def symbol_file(self) -> Path | None:
        """The absolute path of a file with symbols of the guest; None if there is none."""
        if self.options.symbols is not None:
            return self.options.symbols.absolute()
        if isinstance(self.options.image, bytes) or self.image.disk is not None:
            return None
        path = Path(self.options.image)
        try:
            with path.open("rb") as file:
                is_elf = file.read(4) == b"\x7fELF"
        except (OSError, ValueError):
            return None
        return path.absolute() if is_elf else None


def _check_input(entry: Input) -> None:
    where = f"the input at {entry.at_ns} ns"
    if entry.kind is InputKind.TEXT:
        try:
            scan_codes(entry.data.decode())
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    elif entry.kind is InputKind.REGISTERS and len(entry.data) != STATE_LAYOUT.sizeof():
        raise InputError(f"{where}: {len(entry.data)} bytes are not the registers, which are {STATE_LAYOUT.sizeof()}")


def _board_options(options: MachineOptions, image: LoadedImage) -> BoardOptions:
    disk = image.disk
    command_line = c_string(options.loading.command_line) if options.loading.command_line else None
    board = replace(options.board, command_line=command_line, fpu=options.model.has_fpu)
    if disk is None:
        return board
    if disk.media is Media.FLOPPY:
        return replace(board, floppy_types=(_FLOPPY_144,))
    return replace(board, disks=(disk,))


def _drives(disk: Disk | None) -> dict[int, Disk]:
    if disk is None:
        return {}
    return {_FIRST_FLOPPY if disk.media is Media.FLOPPY else _FIRST_HARD_DISK: disk}
