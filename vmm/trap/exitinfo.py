"""What EXITINFO1 and EXITINFO2 say for each kind of exit, and the events of EVENTINJ and EXITINTINFO, as values.

Every class encodes to and decodes from the numbers of the control area; it must not know where those are kept.

Source: AMD64 APM Vol. 2, "Secure Virtual Machine": the sections on each intercept, "Event Injection", "Nested Paging".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from machine.faults import Vector
from machine.state import SegmentRegister

MASK32 = 0xFFFF_FFFF

IOIO_IN = 1 << 0
IOIO_STRING = 1 << 2
IOIO_REP = 1 << 3
IOIO_SIZE_SHIFT = 4  # SZ8, SZ16, SZ32: the size in bytes, one bit each
IOIO_ADDRESS_SHIFT = 7  # A16, A32, A64
IOIO_SEGMENT_SHIFT = 10
IOIO_PORT_SHIFT = 16

PF_PRESENT = 1 << 0
PF_WRITE = 1 << 1
PF_USER = 1 << 2
PF_RESERVED = 1 << 3
PF_FETCH = 1 << 4
NPF_FINAL = 1 << 32  # while the guest's physical address was translated
NPF_TABLE = 1 << 33  # while a table of the guest was read

TASK_SWITCH_BY_IRET = 1 << 36
TASK_SWITCH_BY_JUMP = 1 << 38
TASK_SWITCH_HAS_ERROR_CODE = 1 << 44
TASK_SWITCH_RF = 1 << 48

CR_MOV = 1 << 63

EVENT_ERROR_CODE = 1 << 11
EVENT_VALID = 1 << 31
_EVENT_TYPE_SHIFT = 8


@dataclass(frozen=True, slots=True)
class IoInfo:
    """An intercepted IN, OUT, INS or OUTS.

    Attributes:
        port: 0 to FFFFh.
        size_bytes: 1, 2 or 4.
        is_in: IN or INS.
        string, rep: INS or OUTS; with a REP prefix.
        address_bits: 16 or 32; only of a string instruction.
        segment: of its memory operand.
        next_eip: of the instruction behind it (EXITINFO2).
    """

    port: int
    size_bytes: int
    is_in: bool
    string: bool = False
    rep: bool = False
    address_bits: int = 32
    segment: SegmentRegister = SegmentRegister.ES
    next_eip: int = 0

    def encode(self) -> tuple[int, int]:
        """EXITINFO1 and EXITINFO2."""
        info = self.port << IOIO_PORT_SHIFT | self.size_bytes << IOIO_SIZE_SHIFT
        info |= IOIO_IN * self.is_in | IOIO_STRING * self.string | IOIO_REP * self.rep
        info |= self.address_bits // 16 << IOIO_ADDRESS_SHIFT | self.segment << IOIO_SEGMENT_SHIFT
        return info, self.next_eip

    @classmethod
    def decode(cls, info1: int, info2: int) -> Self:
        """Take it from the control area; ValueError if the size or segment is none."""
        size_bytes = info1 >> IOIO_SIZE_SHIFT & 7
        if size_bytes not in (1, 2, 4):
            raise ValueError(f"EXITINFO1 {info1:#x} of an I/O exit has no size")
        return cls(
            port=info1 >> IOIO_PORT_SHIFT & 0xFFFF,
            size_bytes=size_bytes,
            is_in=bool(info1 & IOIO_IN),
            string=bool(info1 & IOIO_STRING),
            rep=bool(info1 & IOIO_REP),
            address_bits=16 * (info1 >> IOIO_ADDRESS_SHIFT & 7),
            segment=SegmentRegister(info1 >> IOIO_SEGMENT_SHIFT & 7),
            next_eip=info2 & MASK32,
        )

    def __str__(self) -> str:
        name = ("INS" if self.is_in else "OUTS") if self.string else "IN" if self.is_in else "OUT"
        text = f"{'REP ' * self.rep}{name} of {self.size_bytes} bytes at port {self.port:#06x}"
        if self.string:
            text += f", segment {self.segment.name}, {self.address_bits}-bit addresses"
        return f"{text}, next instruction at {self.next_eip:08x}"


@dataclass(frozen=True, slots=True)
class PageFaultInfo:
    """An intercepted #PF: EXITINFO1 is the error code, EXITINFO2 the linear address. CR2 has not been written."""

    error_code: int
    linear: int

    def encode(self) -> tuple[int, int]:
        """EXITINFO1 and EXITINFO2."""
        return self.error_code, self.linear

    @classmethod
    def decode(cls, info1: int, info2: int) -> Self:
        """Take it from the control area."""
        return cls(info1 & MASK32, info2 & MASK32)

    def __str__(self) -> str:
        return f"{describe_error_code(self.error_code)} at linear {self.linear:08x}"


@dataclass(frozen=True, slots=True)
class NestedPageFaultInfo:
    """A nested page fault.

    Attributes:
        error_code: as of #PF; U/S is always set, since the nested tables are walked as a user's.
        physical: the guest-physical address (EXITINFO2).
        in_table: a table of the guest was being read; else the address that the guest's tables gave.
    """

    error_code: int
    physical: int
    in_table: bool = False

    def encode(self) -> tuple[int, int]:
        """EXITINFO1 and EXITINFO2."""
        return self.error_code | (NPF_TABLE if self.in_table else NPF_FINAL), self.physical

    @classmethod
    def decode(cls, info1: int, info2: int) -> Self:
        """Take it from the control area."""
        return cls(info1 & MASK32, info2, bool(info1 & NPF_TABLE))

    def __str__(self) -> str:
        where = "a page table of the guest" if self.in_table else "the final address"
        return f"{describe_error_code(self.error_code)} at guest-physical {self.physical:#010x}, {where}"


def describe_error_code(error_code: int) -> str:
    """The bits of a page fault's error code in words."""
    words = ["protection" if error_code & PF_PRESENT else "not present"]
    words.append("write" if error_code & PF_WRITE else "fetch" if error_code & PF_FETCH else "read")
    words.append("user" if error_code & PF_USER else "supervisor")
    if error_code & PF_RESERVED:
        words.append("reserved bit set")
    return f"{', '.join(words)} ({error_code:#x})"


class TaskSwitchCause(IntEnum):
    """What switches tasks, as the bits of EXITINFO2 tell it."""

    CALL_OR_EVENT = 0
    IRET = TASK_SWITCH_BY_IRET
    JUMP = TASK_SWITCH_BY_JUMP


@dataclass(frozen=True, slots=True)
class TaskSwitchInfo:
    """A task switch that is about to happen.

    Attributes:
        selector: of the incoming TSS (EXITINFO1).
        cause: what switches.
        error_code: what is to be pushed in the new task, or None.
        rf: EFLAGS.RF that would be saved in the outgoing TSS.
    """

    selector: int
    cause: TaskSwitchCause = TaskSwitchCause.CALL_OR_EVENT
    error_code: int | None = None
    rf: bool = False

    def encode(self) -> tuple[int, int]:
        """EXITINFO1 and EXITINFO2."""
        info = self.cause | TASK_SWITCH_RF * self.rf
        if self.error_code is not None:
            info |= TASK_SWITCH_HAS_ERROR_CODE | self.error_code
        return self.selector, info

    @classmethod
    def decode(cls, info1: int, info2: int) -> Self:
        """Take it from the control area; ValueError if it is caused by IRET and a jump at once."""
        cause = TaskSwitchCause(info2 & (TASK_SWITCH_BY_IRET | TASK_SWITCH_BY_JUMP))
        error_code = info2 & MASK32 if info2 & TASK_SWITCH_HAS_ERROR_CODE else None
        return cls(info1 & 0xFFFF, cause, error_code, bool(info2 & TASK_SWITCH_RF))

    def __str__(self) -> str:
        cause = {TaskSwitchCause.CALL_OR_EVENT: "call, interrupt or exception"}.get(self.cause, self.cause.name.lower())
        code = "" if self.error_code is None else f", error code {self.error_code:#x}"
        return f"to TSS {self.selector:04x} by {cause}{code}{', RF' * self.rf}"


@dataclass(frozen=True, slots=True)
class RegisterAccessInfo:
    """An intercepted access to a control or debug register, as decode assists tell it in EXITINFO1.

    Attributes:
        gpr: number of the general-purpose register of MOV; None for CLTS, LMSW and SMSW.
        control: a control register; else a debug register, which only MOV accesses.
    """

    gpr: int | None
    control: bool = True

    def encode(self) -> tuple[int, int]:
        """EXITINFO1 and EXITINFO2."""
        if self.gpr is None:
            return 0, 0
        return self.gpr | CR_MOV * self.control, 0

    @classmethod
    def decode_control(cls, info1: int) -> Self:
        """Of an access to a control register."""
        return cls(info1 & 0xF if info1 & CR_MOV else None)

    @classmethod
    def decode_debug(cls, info1: int) -> Self:
        """Of an access to a debug register."""
        return cls(info1 & 0xF, control=False)

    def __str__(self) -> str:
        return "by CLTS, LMSW or SMSW" if self.gpr is None else f"by MOV with GPR {self.gpr}"


class EventType(IntEnum):
    """What kind of event is injected, or was being delivered."""

    INTR = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE = 4  # INT n


@dataclass(frozen=True, slots=True)
class Event:
    """EVENTINJ: what VMRUN is to deliver first. EXITINTINFO: what was being delivered when the exit came.

    Attributes:
        vector: 0 to 255.
        type: its kind.
        error_code: what is pushed, or None.
    """

    vector: int
    type: EventType
    error_code: int | None = None

    @property
    def name(self) -> str:
        """What people call events of this kind, exceptions told apart."""
        if self.type is not EventType.EXCEPTION:
            return self.type.name
        return f"#{Vector(self.vector).name if self.vector in Vector._value2member_map_ else self.vector}"

    def encode(self) -> int:
        """The 64 bits of the field."""
        bits = EVENT_VALID | self.type << _EVENT_TYPE_SHIFT | self.vector
        return bits if self.error_code is None else bits | EVENT_ERROR_CODE | self.error_code << 32

    @classmethod
    def decode(cls, bits: int) -> Self | None:
        """The event, or None if V is clear; ValueError for a type that is reserved."""
        if not bits & EVENT_VALID:
            return None
        error_code = bits >> 32 if bits & EVENT_ERROR_CODE else None
        return cls(bits & 0xFF, EventType(bits >> _EVENT_TYPE_SHIFT & 7), error_code)

    def __str__(self) -> str:
        kind = {EventType.INTR: "interrupt", EventType.SOFTWARE: "software interrupt"}.get(self.type, self.type.name)
        code = "" if self.error_code is None else f", error code {self.error_code:#x}"
        return f"{kind.lower() if self.type is EventType.EXCEPTION else kind} {self.vector:#04x}{code}"
