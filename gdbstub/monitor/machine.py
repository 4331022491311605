"""Monitor commands about the machine as a whole: registers, time, engines, reset and the end.

They act through the guest's adapter and the machine's own functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub import counters, guest_registers
from gdbstub.monitor.command import Command, parse_number, usage_error
from gdbstub.target import FlagsType, QuitRequested, TargetError
from machine import flags
from machine.descriptors import Descriptor, describe_kind
from machine.engine import EngineError
from machine.state import SEG_G, Segment, SegmentRegister
from vmm.native.inspection import Inspectable

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_SITES_SHOWN = 8
_GPR_LINES = (("eax", "ebx", "ecx", "edx"), ("esi", "edi", "ebp", "esp"))


def describe_bits(value: int, type_: FlagsType) -> str:
    """The names of the one-bit fields that are set."""
    single = (field for field in type_.fields if field.first_bit == field.last_bit and field.name)
    return " ".join(field.name for field in single if value >> field.first_bit & 1) or "-"


def show_registers(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`info registers`."""
    cpu = guest.machine.cpu
    state = cpu.state
    description = guest_registers.DESCRIPTION
    for names in _GPR_LINES:
        values = ((name, guest_registers.read(cpu, description.number_of(name)) or 0) for name in names)
        yield "  ".join(f"{name} {value:08x}" for name, value in values) + "\n"
    yield f"eip {state.eip:08x}  linear {guest_registers.linear_pc(cpu):08x}  {guest.threads()[0].extra}\n"
    yield f"eflags {state.eflags:08x}  {flags.describe(state.eflags)}\n"
    for register in SegmentRegister:
        yield _describe_segment(register.name.lower(), state.segments[register])
    yield _describe_segment("ldtr", state.ldtr)
    yield _describe_segment("tr", state.tr)
    yield f"gdtr base {state.gdtr.base:08x} limit {state.gdtr.limit:04x}\n"
    yield f"idtr base {state.idtr.base:08x} limit {state.idtr.limit:04x}\n"
    yield f"cr0 {state.cr0:08x}  {describe_bits(state.cr0, guest_registers.CR0_TYPE)}\n"
    yield f"cr2 {state.cr2:08x}  cr3 {state.cr3:08x}\n"
    yield f"cr4 {state.cr4:08x}  {describe_bits(state.cr4, guest_registers.CR4_TYPE)}\n"
    yield "  ".join(f"dr{n} {state.dr[n]:08x}" for n in (0, 1, 2, 3, 6, 7)) + "\n"
    yield (
        f"sysenter cs {state.sysenter_cs:08x} esp {state.sysenter_esp:08x} eip {state.sysenter_eip:08x}\n"
        f"icount {cpu.clock.icount}\n"
    )


def _describe_segment(name: str, segment: Segment) -> str:
    selector, base, limit, attributes = segment.fields
    raw = (attributes & 0xFF) << 40 | (attributes & 0xF00) << 44
    words = [describe_kind(Descriptor(0, raw)), f"DPL {segment.dpl}"]
    if attributes & SEG_G:
        words.append("G")
    if not segment.present:
        words = ["unusable"]
    return f"{name:4} {selector:04x}  base {base:08x}  limit {limit:08x}  {', '.join(words)}\n"


def show_icount(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`info icount`."""
    clock = guest.machine.clock
    yield f"{clock.icount} instructions retired since reset\n"
    yield f"virtual time {clock.now_ns} ns, {clock.idle_ns} ns of it in HLT; {clock.ns_per_insn} ns an instruction\n"
    deadline_ns = clock.next_deadline_ns
    if deadline_ns is None:
        yield "no device has anything to do at a later time\n"
    else:
        yield f"the next event of a device is in {max(0, deadline_ns - clock.now_ns)} ns\n"


def show_statistics(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`stats`."""
    yield from counters.for_people(guest.machine.statistics())
    engine = guest.machine.engine
    sites = engine.translations().tally.hottest(_SITES_SHOWN) if isinstance(engine, Inspectable) else ()
    if sites:
        yield "hottest callouts:\n"
    for site in sites:
        yield f"  {site.eip:08x}  {site.row:18} {site.count:,}\n"


def select_engine(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`vmm [NAME]`."""
    machine = guest.machine
    if words:
        wanted = " ".join(words).replace("-", " ")
        if wanted not in machine.engine_names:
            raise TargetError(f"There is no engine `{' '.join(words)}`; there is: {', '.join(machine.engine_names)}.")
        try:
            machine.select_engine(wanted)
        except EngineError as error:
            raise TargetError(f"{error}.") from error
    for name in machine.engine_names:
        default = " (the default)" if name == guest.default_engine else ""
        yield f"{'*' if name == machine.engine.name else ' '} {name}{default}\n"


def reset(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`reset`."""
    guest.check_recordable()
    guest.machine.press_reset()
    guest.forget_past()
    yield (
        "The machine was reset and stands before its first instruction.\n"
        "gdb still shows the registers of before: `maintenance flush register-cache` makes it read them again.\n"
    )


def quit_program(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`quit [STATUS]`."""
    if len(words) > 1:
        raise usage_error("quit")
    status = parse_number(guest, words[0], "status") if words else 0
    if not 0 <= status <= 255:
        raise TargetError("An exit status is 0 to 255.")
    yield ""
    raise QuitRequested(status)


COMMANDS = (
    Command("info registers", "", "every register, hidden parts decoded", show_registers),
    Command("info icount", "", "the instruction count and virtual time", show_icount),
    Command("stats", "", "what the engine has counted since the start", show_statistics),
    Command(
        "vmm",
        "[NAME]",
        "the engines that there are, and which one runs the guest; NAME selects one",
        select_engine,
        changes=True,
        bare=True,
        details="bt translates guest code to host code and is fastest. trap runs the guest under a VMCB until it\n"
        "exits, on an emulated CPU with SVM, with shadow or (trap nested) nested paging; trap kvm on this host's own,\n"
        "and then no run is like another. hybrid has bt and trap take turns: see `hybrid`. interp is the slow\n"
        "reference. The guest goes on where it is under each.",
    ),
    Command(
        "reset",
        "",
        "reset the machine as its reset button does, and stay stopped",
        reset,
        changes=True,
        details="The CPU and the devices are reset, RAM keeps what it holds, and the image is loaded again over it.\n"
        "gdb's `run` (after `target extended-remote`) starts from cleared memory and the image file as it is now.",
    ),
    Command("quit", "[STATUS]", "end trapgate, with an exit status", quit_program, changes=True),
)
