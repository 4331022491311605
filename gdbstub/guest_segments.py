"""What happens to a segment register, visible and hidden part, when a debugger writes it.

It reads descriptors as the CPU would but changes nothing in memory and raises no fault of the guest.
"""

from __future__ import annotations

from gdbstub.guest_memory import read_linear
from gdbstub.target import TargetError
from machine import flags
from machine.cpu import Cpu
from machine.descriptors import LDT, RPL, TSS16, TSS16_BUSY, TSS32, TSS32_BUSY, Descriptor
from machine.faults import TI
from machine.segmentation import load_null, load_real_code, load_real_data, load_v86
from machine.state import (
    CR0_PE,
    MASK32,
    SEG_G,
    SEG_S,
    CpuState,
    Segment,
    SegmentRegister,
)

_KINDS = {"ldtr": (LDT,), "tr": (TSS16, TSS16_BUSY, TSS32, TSS32_BUSY)}


def find(state: CpuState, name: str) -> Segment:
    """The segment register that gdb calls `name`, LDTR and TR among them."""
    if name == "ldtr":
        return state.ldtr
    if name == "tr":
        return state.tr
    return state.segments[SegmentRegister[name.upper()]]


def set_hidden(cpu: Cpu, name: str, part: str, value: int) -> None:
    """Set `base`, `limit` or `attributes` of a segment register, LDTR or TR; the selector stays.

    Raises:
        TargetError: attributes with bits that no descriptor has.
    """
    if part == "attributes" and value & ~0xDFF & ~SEG_G:
        raise TargetError("Segment attributes are descriptor bits 47:40 in 7:0 and 55:52 in 11:8; bit 9 is reserved.")
    segment = find(cpu.state, name)
    values = {"base": segment.base, "limit": segment.limit, "attributes": segment.attributes, part: value}
    segment.load(segment.selector, **values)


def load_selector(cpu: Cpu, register: SegmentRegister, selector: int) -> None:
    """Put a selector into a segment register, with the hidden part that it would bring.

    In real and virtual-8086 mode the base becomes 16 times the selector and the rest stays. In protected mode the
    descriptor is read; the privilege checks of MOV and far JMP are not made, and CS brings its RPL as CPL. Writing the
    selector that is there already does nothing, so hidden parts survive gdb's saving and restoring of registers.

    Raises:
        TargetError: no usable descriptor; nothing has changed.
    """
    state = cpu.state
    segment = state.segments[register]
    name = register.name
    if selector == segment.selector:
        return
    if selector > 0xFFFF:
        raise TargetError(f"A selector has 16 bits; {selector:#x} does not fit into {name}.")
    if state.eflags & flags.VM:
        load_v86(segment, selector)
        return
    if not state.cr0 & CR0_PE:
        (load_real_code if register is SegmentRegister.CS else load_real_data)(segment, selector)
        return
    if selector & ~RPL == 0:
        if register in (SegmentRegister.CS, SegmentRegister.SS):
            raise TargetError(f"{name} cannot hold a null selector in protected mode.")
        load_null(segment, selector)
        return
    descriptor = _read_descriptor(cpu, name, selector)
    if not descriptor.attributes & SEG_S:
        raise TargetError(f"Selector {selector:#06x} is of a system segment; {name} needs code or data.")
    if not descriptor.present:
        raise TargetError(f"The segment of selector {selector:#06x} is not present.")
    if register is SegmentRegister.CS:
        if not descriptor.is_code:
            raise TargetError(f"Selector {selector:#06x} is not of a code segment.")
    elif not descriptor.is_readable:
        raise TargetError(f"Selector {selector:#06x} is of an execute-only segment; {name} cannot hold it.")
    if register is SegmentRegister.SS and not descriptor.is_writable:
        raise TargetError(f"Selector {selector:#06x} is not of a writable data segment, which SS needs.")
    segment.load(selector, descriptor.base, descriptor.limit, descriptor.attributes)
    if register is SegmentRegister.CS:
        cpu.set_cpl(selector & RPL)


def load_system_selector(cpu: Cpu, name: str, selector: int) -> None:
    """Put a selector into LDTR or TR with its hidden part; a null selector empties LDTR.

    Raises:
        TargetError: no usable descriptor; nothing has changed.
    """
    segment = find(cpu.state, name)
    if selector == segment.selector:
        return
    if not cpu.state.cr0 & CR0_PE:
        raise TargetError(f"{name.upper()} can be loaded in protected mode only.")
    if selector & ~RPL == 0 and name == "ldtr":
        load_null(segment, selector)
        return
    if selector & TI:
        raise TargetError(f"{name.upper()} takes selectors of the GDT only.")
    descriptor = _read_descriptor(cpu, name.upper(), selector)
    if not descriptor.present:
        raise TargetError(f"The segment of selector {selector:#06x} is not present.")
    if descriptor.system_type not in _KINDS[name]:
        raise TargetError(f"Selector {selector:#06x} is not of {'an LDT' if name == 'ldtr' else 'a TSS'}.")
    segment.load(selector, descriptor.base, descriptor.limit, descriptor.attributes)


def _read_descriptor(cpu: Cpu, name: str, selector: int) -> Descriptor:
    state = cpu.state
    table: tuple[int, int]
    if selector & TI:
        if not state.ldtr.present:
            raise TargetError(f"Selector {selector:#06x} is of the LDT, and there is none.")
        table = state.ldtr.base, state.ldtr.limit
    else:
        table = state.gdtr.base, state.gdtr.limit
    at = selector & ~7
    if at + 7 > table[1]:
        raise TargetError(f"Selector {selector:#06x} for {name} is beyond the limit {table[1]:#x} of its table.")
    raw = read_linear(cpu.memory, state, (table[0] + at) & MASK32, 8)
    if len(raw) < 8:
        raise TargetError(f"The descriptor of selector {selector:#06x} is on a page that is not mapped.")
    return Descriptor(at, int.from_bytes(raw, "little"))
