"""The debuggee as the GDB server sees it: the `Target` protocol and the plain values that cross it.

It must not know packets, sockets or any concrete machine; whoever has something to debug implements `Target`.
"""

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class TargetError(Exception):
    """A request that the target refuses; its text is shown to the debugger's user, so write a sentence for them."""


class QuitRequested(Exception):
    """Raised by a monitor command that ends the whole program, with the exit status that it wants."""

    def __init__(self, status: int = 0) -> None:
        super().__init__(status)
        self.status = status


class Signal(enum.IntEnum):
    """Signal numbers of the remote protocol: gdb's own, whatever the host's are.

    Source: gdb's include/gdb/signals.def.
    """

    NONE = 0
    HUP = 1
    INT = 2
    QUIT = 3
    ILL = 4
    TRAP = 5
    ABRT = 6
    EMT = 7
    FPE = 8
    KILL = 9
    BUS = 10
    SEGV = 11
    SYS = 12
    PIPE = 13
    ALRM = 14
    TERM = 15
    USR1 = 30
    USR2 = 31


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a flags or struct type: bits `first_bit` to `last_bit`, both inclusive."""

    name: str
    first_bit: int
    last_bit: int
    type: str | None = None


@dataclass(frozen=True, slots=True)
class FlagsType:
    """A register whose bits have names; gdb prints the ones that are set, as `[ PE PG ]`."""

    id: str
    size_bytes: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class StructType:
    """A register made of bit fields with values."""

    id: str
    size_bytes: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class UnionType:
    """Several views of one register: pairs of member name and type."""

    id: str
    members: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class VectorType:
    """`count` elements of one type."""

    id: str
    element: str
    count: int


TypeDefinition = FlagsType | StructType | UnionType | VectorType


@dataclass(frozen=True, slots=True)
class Register:
    """One register of a feature.

    `bits` is a multiple of 8. `type` is one of gdb's own (int32, uint64, code_ptr, data_ptr, i387_ext, ...) or the id
    of a type of the same feature. `group` is one of gdb's (general, float, vector, system, ...) or a name of our own.
    `save_restore` says whether gdb saves it around a call of a function from the debugger.
    """

    name: str
    bits: int = 32
    type: str = "int32"
    group: str | None = None
    save_restore: bool = True


@dataclass(frozen=True, slots=True)
class Feature:
    """A named group of registers, as one <feature> of target.xml; a name of gdb's own has gdb's own contents."""

    name: str
    registers: tuple[Register, ...]
    types: tuple[TypeDefinition, ...] = ()


@dataclass(frozen=True, slots=True)
class Description:
    """What never changes in a session: all registers, numbered through all features in order from 0.

    `expedited` names the registers that every stop reply carries; `pc` is the one that `c ADDR` writes;
    `triple` is what lldb takes the machine for.
    """

    features: tuple[Feature, ...]
    expedited: tuple[str, ...] = ("eip", "esp", "ebp")
    pc: str = "eip"
    triple: str = "i386-unknown-unknown"
    registers: tuple[Register, ...] = field(init=False)

    def __post_init__(self) -> None:
        registers = tuple(register for feature in self.features for register in feature.registers)
        names = [register.name for register in registers]
        if len(set(names)) != len(names):
            raise ValueError("two registers of a description have one name")
        if any(register.bits <= 0 or register.bits % 8 for register in registers):
            raise ValueError("a register's bits are not a positive multiple of 8")
        object.__setattr__(self, "registers", registers)

    def number_of(self, name: str) -> int:
        """Return the number of the register called `name`; KeyError if there is none."""
        for number, register in enumerate(self.registers):
            if register.name == name:
                return number
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread as gdb lists it: a number from 1, a short name, and a line about its state."""

    id: int
    name: str
    extra: str = ""


class MemoryKind(enum.Enum):
    """Kinds of memory that a memory map tells apart; gdb uses hardware breakpoints in ROM."""

    RAM = "ram"
    ROM = "rom"


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """`length` bytes from `start` with equal properties; `permissions` of r, w, x is empty for a hole."""

    start: int
    length: int
    kind: MemoryKind = MemoryKind.RAM
    permissions: str = "rwx"
    name: str = ""


class BreakpointKind(enum.IntEnum):
    """The kinds of the Z packets."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    READ = 3
    ACCESS = 4


class Verdict(enum.Enum):
    """What is to become of a breakpoint that was reached."""

    STOP = enum.auto()
    GO_ON = enum.auto()
    # As GO_ON, but the stint has lasted long enough: execute this instruction and return `StintEnd.BUDGET`.
    GO_ON_AND_YIELD = enum.auto()


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A breakpoint or watchpoint on `length` bytes at linear `address` (for code, `length` has no meaning).

    When it is reached the target calls `check`, if there is one, at the instruction boundary where it would stop (code:
    before the instruction; data: after it) and obeys. `check` reads registers and memory of the target and nothing
    else; it takes microseconds and must not be called re-entrantly.
    """

    kind: BreakpointKind
    address: int
    length: int
    check: Callable[[], Verdict] | None = None


class ResumeMode(enum.Enum):
    """How a thread goes on."""

    CONTINUE = enum.auto()
    STEP = enum.auto()
    RANGE_STEP = enum.auto()


@dataclass(frozen=True, slots=True)
class Resume:
    """How one thread, or every thread if `thread_id` is None, goes on.

    RANGE_STEP steps until EIP is outside [`range_start`, `range_end`), at least once. `signal` is what gdb wants
    delivered: after a stop before the delivery of an exception, the number of that stop lets the exception happen and
    0 suppresses it.
    """

    mode: ResumeMode
    thread_id: int | None = None
    signal: int = 0
    range_start: int = 0
    range_end: int = 0


class StopReason(enum.Enum):
    """Why the guest stopped, as far as gdb tells reasons apart."""

    STEP = enum.auto()  # a step or a range step is done
    SWBREAK = enum.auto()  # BreakpointKind.SOFTWARE; EIP is at the breakpoint
    HWBREAK = enum.auto()  # BreakpointKind.HARDWARE
    WATCH = enum.auto()  # BreakpointKind.WRITE; `address` is set
    RWATCH = enum.auto()
    AWATCH = enum.auto()
    SIGNAL = enum.auto()  # an exception, a catch, a triple fault, Ctrl-C: `signal` says which
    EXITED = enum.auto()  # the guest is gone (power off, debug exit): `status` is its exit status


@dataclass(frozen=True, slots=True)
class StopEvent:
    """A stop of the guest.

    `address` is the data address of a watchpoint; `text` is shown on the debugger's console before the stop
    (several lines are fine; end them with newlines).
    """

    reason: StopReason
    signal: int = Signal.TRAP
    thread_id: int = 1
    address: int | None = None
    status: int = 0
    text: str = ""


class StintEnd(enum.Enum):
    """Why a stint ended without a stop."""

    BUDGET = enum.auto()  # run again
    IDLE = enum.auto()  # halted, and only outside input (serial, keyboard, debugger) can wake it: no need to hurry


class Target(Protocol):
    """Something to debug. Every method is called from one thread, none blocks for more than a few milliseconds.

    Any method may raise `TargetError` with a text for the user. Between stints the guest stands at an instruction
    boundary, so registers and memory may be read also while it is running (the read-only second client does).
    """

    @property
    def description(self) -> Description:
        """Registers and names; the same object all the time."""

    def threads(self) -> Sequence[Thread]:
        """Return the threads there are now, never none; for one CPU, `[Thread(1, "CPU 1")]`."""

    # Registers: values are unsigned, `number` counts through `description.registers`.

    def read_registers(self, thread_id: int) -> Sequence[int | None]:
        """Return the values of all registers, in order; None for one that is not available."""

    def read_register(self, thread_id: int, number: int) -> int | None:
        """Return one value; None if it is not available."""

    def write_register(self, thread_id: int, number: int, value: int) -> None:
        """Set a register; TargetError if it cannot be written or `value` is not valid in it."""

    # Memory: linear addresses in [0, 2**32), unless the user told the target otherwise.

    def read_memory(self, address: int, length: int) -> bytes:
        """Return up to `length` bytes, cut at the first one that cannot be read (so b"" if that is the first)."""

    def write_memory(self, address: int, data: bytes) -> None:
        """Write all of `data`, or raise TargetError and write nothing."""

    def memory_map(self) -> Sequence[MemoryRegion] | None:
        """Return the regions for gdb's memory map, ascending; None to have none.

        gdb refuses what a map leaves out, so a map in linear addresses covers all that paging could ever map.
        """

    def region_at(self, address: int) -> MemoryRegion | None:
        """Return the region or hole (no permissions) around a linear address as mapped now; None if not known."""

    # Breakpoints stay, over restarts too, until they are removed or `detach` is called.

    def insert_breakpoint(self, breakpoint: Breakpoint) -> None:  # noqa: A002 - the manual's word
        """Add a breakpoint; one with the same kind, address and length is replaced."""

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int) -> None:
        """Remove a breakpoint; nothing happens if there is none."""

    def pass_signals(self, signals: frozenset[int]) -> None:
        """Let the exceptions and catches that would stop with these signals happen without a stop."""

    # Running: `resume` once, then `run` until it gives a StopEvent; `interrupt` in place of a `run` stops by request.

    def resume(self, actions: Sequence[Resume]) -> None:
        """Set how the guest goes on; for a thread, the first action that names it or every thread counts.

        A breakpoint that the guest has just stopped at does not stop it again before it has executed an instruction.
        """

    def run(self, budget_insns: int) -> StopEvent | StintEnd:
        """Execute up to `budget_insns` guest instructions (about: the host decides how long they take).

        Where a stint ends makes no difference to the guest.
        """

    def interrupt(self) -> StopEvent:
        """Stop where the guest is now; the event has `Signal.INT`."""

    # Life and death.

    def attach(self) -> None:
        """Tell that a debugger is there: triple faults and what the user asks for stop from now on."""

    def detach(self) -> None:
        """Tell that it has gone: drop breakpoints, pass_signals and catches; the guest is not resumed by this."""

    def restart(self) -> StopEvent:
        """Load the image again and stop before the first instruction; also after an exit or `kill`."""

    def kill(self) -> None:
        """End the guest; only `restart`, reads and `monitor` may follow."""

    # What the user asks for by name.

    def monitor(self, command: str, *, read_only: bool) -> Iterator[str]:
        """Carry out a `monitor` command, yielding its output in pieces.

        Called with the guest stopped, or with `read_only` also while it runs. Each `next` lasts a few milliseconds at
        most and may yield ""; other work is done in between. Ends early with TargetError (its text is printed) or
        QuitRequested; it may be closed.

        Args:
            command: the line, not empty, without newline.
            read_only: the client may only look; refuse with TargetError what changes anything.
        """

    def exec_file(self) -> str | None:
        """Return the absolute path of the guest's program with symbols; None if there is none."""

    def os_tables(self) -> Mapping[str, str]:
        """Return the tables of `info os`: name to description; empty for none."""

    def os_rows(self, table: str) -> Sequence[Mapping[str, str]]:
        """Return the rows of a table, each column title to text; all rows have the same columns."""
