"""Monitor commands that say where the guest is to stop, beyond what gdb's own commands can say.

What a stop looks like is decided by the guest's adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub.guest_stops import EXCEPTION_TITLES, name_of_vector, signal_of_vector
from gdbstub.monitor.command import Command, parse_linear, parse_number, parse_physical, parse_switch, usage_error
from gdbstub.target import TargetError
from machine.debug import CodeBreakpoint, Watchpoint
from machine.faults import Vector

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget

_ACCESSES = {"read": (True, False), "write": (False, True), "access": (True, True)}
_MAX_WATCHED_BYTES = 1 << 20


def add_breakpoint(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`break [phys] ADDRESS [cr3=VALUE]`."""
    words, cr3 = _take_cr3(guest, words)
    physical, words = _take_physical(words)
    if len(words) != 1:
        raise usage_error("break")
    address = (parse_physical if physical else parse_linear)(guest, words[0])
    own = guest.breakpoints.add_own(CodeBreakpoint(address, physical=physical, cr3=cr3))
    yield f"Monitor breakpoint {own.number}: {own.describe()}.\n"


def add_watchpoint(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`watch [read|write|access] [phys] ADDRESS [LENGTH] [cr3=VALUE]`."""
    words, cr3 = _take_cr3(guest, words)
    on_read, on_write = _ACCESSES["write"]
    if words and words[0] in _ACCESSES:
        on_read, on_write = _ACCESSES[words[0]]
        words = words[1:]
    physical, words = _take_physical(words)
    if len(words) not in (1, 2):
        raise usage_error("watch")
    address = (parse_physical if physical else parse_linear)(guest, words[0])
    length = parse_number(guest, words[1], "length") if len(words) == 2 else 4
    if not 1 <= length <= _MAX_WATCHED_BYTES:
        raise TargetError(f"A watched range has 1 to {_MAX_WATCHED_BYTES} bytes.")
    own = guest.breakpoints.add_own(Watchpoint(address, length, on_read, on_write, physical=physical, cr3=cr3))
    yield f"Monitor breakpoint {own.number}: {own.describe()}.\n"


def _take_physical(words: list[str]) -> tuple[bool, list[str]]:
    if words and words[0] in ("phys", "physical"):
        return True, words[1:]
    return False, words


def _take_cr3(guest: GuestTarget, words: list[str]) -> tuple[list[str], int | None]:
    for word in words:
        if word.startswith("cr3="):
            return [other for other in words if other is not word], parse_linear(guest, word[4:])
    return words, None


def list_breakpoints(guest: GuestTarget, _words: list[str]) -> Iterator[str]:
    """`info breakpoints`."""
    for own in guest.breakpoints.own:
        hits = {0: "never hit", 1: "hit once"}.get(own.hits, f"hit {own.hits} times")
        yield f"{own.number}: {own.describe()}, {hits}\n"
    for breakpoint_ in guest.breakpoints.client:
        condition = ", with a condition or commands" if breakpoint_.check else ""
        kind = breakpoint_.kind.name.lower()
        yield f"gdb: {kind} at linear {breakpoint_.address:#010x}, length {breakpoint_.length}{condition}\n"
    if guest.until_icount is not None:
        yield f"instruction count {guest.until_icount}\n"
    yield _describe_catches(guest)


def delete_breakpoint(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`delete [NUMBER]`."""
    if len(words) > 1:
        raise usage_error("delete")
    count = guest.breakpoints.delete_own(parse_number(guest, words[0]) if words else None)
    yield f"{count} deleted.\n"


def catch(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`catch [EVENT...]`."""
    vectors, interrupts, _ = _parse_events(guest, words)
    guest.caught_vectors |= vectors
    guest.catch_interrupts |= interrupts
    guest.update_catches()
    yield _describe_catches(guest)


def uncatch(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`uncatch [EVENT...]`; without words: everything."""
    vectors, interrupts, triple = _parse_events(guest, words or ["all"])
    if triple and words:
        yield "A triple fault stops always while a debugger is attached.\n"
    guest.caught_vectors -= vectors
    guest.catch_interrupts &= not interrupts
    guest.update_catches()
    yield _describe_catches(guest)


def _parse_events(guest: GuestTarget, words: list[str]) -> tuple[frozenset[int], bool, bool]:
    """Vectors, whether `irq` is among them, whether `triple` is."""
    vectors: set[int] = set()
    interrupts = triple = False
    by_name = {vector.name.lower(): int(vector) for vector in EXCEPTION_TITLES}
    for word in words:
        name = word.lower().lstrip("#")
        if name == "all":
            vectors.update(by_name.values())
            interrupts = True
        elif name == "irq":
            interrupts = True
        elif name == "triple":
            triple = True
        elif name in by_name:
            vectors.add(by_name[name])
        elif name[:1].isdigit():
            vector = parse_number(guest, name, "vector")
            if vector > 31:
                raise TargetError(f"Vector {vector} is no exception; `catch irq` stops at external interrupts.")
            vectors.add(vector)
        else:
            names = " ".join(by_name)
            raise TargetError(f"`{word}` is no event to catch; there are: {names} irq triple all.")
    return frozenset(vectors), interrupts, triple


def _describe_catches(guest: GuestTarget) -> str:
    caught = [f"{name_of_vector(v)} ({signal_name(v)})" for v in sorted(guest.caught_vectors)]
    if guest.catch_interrupts:
        caught.append("external interrupts (SIGUSR1)")
    caught.append("triple faults (SIGABRT)")
    return "Caught before delivery: " + ", ".join(caught) + ".\n"


def signal_name(vector: int) -> str:
    """The name under which a user knows an exception's signal."""
    return f"SIG{signal_of_vector(vector).name}"


def set_step_interrupts(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`step-interrupts [on|off]`."""
    debug = guest.machine.debug
    if words:
        debug.step_interrupts = parse_switch(words, "step-interrupts")
    yield (
        "A step goes into the handler of an interrupt that is pending.\n"
        if debug.step_interrupts
        else "A step executes one instruction; interrupts stay pending until `continue`, or a step on HLT.\n"
    )


def set_until_icount(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`until-icount [COUNT|off]`."""
    now = guest.machine.clock.icount
    if words == ["off"]:
        guest.until_icount = None
    elif words:
        if len(words) != 1:
            raise usage_error("until-icount")
        relative = words[0].startswith("+")
        count = parse_number(guest, words[0].lstrip("+"), "count") + (now if relative else 0)
        if count <= now:
            raise TargetError(f"The count is {now} already; `monitor reset` or `run` starts again from 0.")
        guest.until_icount = count
    if guest.until_icount is None:
        yield f"No stop at an instruction count is set; the count is {now}.\n"
    else:
        yield f"`continue` runs to instruction count {guest.until_icount}; it is {now} now.\n"


_EVENTS = ", ".join(
    f"{vector.name.lower()} ({title})" for vector, title in EXCEPTION_TITLES.items() if vector != Vector.NMI
)

COMMANDS = (
    Command(
        "break",
        "[phys] ADDRESS [cr3=VALUE]",
        "a breakpoint by physical address, or in one address space only",
        add_breakpoint,
        changes=True,
        details="It stops before the instruction at ADDRESS, like gdb's own. With cr3=VALUE only while CR3 has that\n"
        "value (cr3=$cr3 is the address space of now). `info breakpoints` lists them, `delete` removes them.",
    ),
    Command(
        "watch",
        "[read|write|access] [phys] ADDRESS [LENGTH] [cr3=VALUE]",
        "a watchpoint by physical address, or in one address space only",
        add_watchpoint,
        changes=True,
        details="It stops after the instruction that touches one of LENGTH bytes (4 if left out); writes, if not said\n"
        "otherwise.",
    ),
    Command("info breakpoints", "", "breakpoints, watchpoints and catches", list_breakpoints),
    Command(
        "delete", "[NUMBER]", "delete a breakpoint of the monitor, or all of them", delete_breakpoint, changes=True
    ),
    Command(
        "catch",
        "[EVENT...]",
        "stop before an exception or interrupt is delivered",
        catch,
        changes=True,
        bare=True,
        details=f"EVENT is one of {_EVENTS};\nor irq (external interrupts), triple, all. "
        "The stop has the signal that `catch` shows in brackets, so that\n"
        "`handle SIGSEGV nostop noprint pass` lets such exceptions happen without a stop. `continue` delivers the\n"
        "exception; `signal 0` does not, and tries the instruction again, which helps if you have mended the cause.\n"
        "An exception with SIGTRAP is delivered in any case, since gdb never passes that signal.",
    ),
    Command(
        "uncatch", "[EVENT...]", "do not stop before EVENT any more; without EVENT: before none", uncatch, changes=True
    ),
    Command(
        "step-interrupts",
        "[on|off]",
        "whether a step may end in an interrupt's handler",
        set_step_interrupts,
        changes=True,
        bare=True,
    ),
    Command(
        "until-icount",
        "[[+]COUNT|off]",
        "stop the next `continue` at an instruction count (+COUNT: so many instructions from here)",
        set_until_icount,
        changes=True,
        bare=True,
        details="The count is the register $icount. The same image, options and inputs are in the same state at the\n"
        "same count on every run.",
    ),
)
