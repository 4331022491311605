"""Monitor commands about the translation cache: what stands for an address, how the cache is used, and emptying it.

They ask engines that keep translations (`Inspectable`); others are told apart in one clear line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gdbstub import guest_registers
from gdbstub.monitor.command import Command, parse_linear, usage_error
from gdbstub.target import TargetError
from machine.memory import PAGE_SHIFT
from vmm.native.inspection import GuestLine, Inspectable, Translations

if TYPE_CHECKING:
    from gdbstub.guest import GuestTarget
    from vmm.native.fragments import Fragment

_GUEST_COLUMNS = 44
_PAGES_SHOWN = 20
_TABLES_SHOWN = 12


def show(guest: GuestTarget, words: list[str]) -> Iterator[str]:
    """`tc [ADDRESS|map|flush]`."""
    engine = guest.machine.engine
    if not isinstance(engine, Inspectable):
        raise TargetError(f"The engine `{engine.name}` translates nothing; `monitor vmm bt` selects one that does.")
    if words == ["flush"]:
        count = len(engine.translations().fragments.by_address)
        engine.flush_translations()
        yield f"{count:,} fragments were dropped; the guest notices nothing, and its code is translated again.\n"
    elif words == ["map"]:
        yield from _show_map(engine.translations())
    elif len(words) > 1:
        raise usage_error("tc")
    else:
        linear = parse_linear(guest, words[0]) if words else guest_registers.linear_pc(guest.machine.cpu)
        yield from _show_fragments(guest, engine.translations(), linear)


def _show_fragments(guest: GuestTarget, translations: Translations, linear: int) -> Iterator[str]:
    cpu = guest.machine.cpu
    physical = cpu.mmu.probe(linear)
    if physical is None:
        raise TargetError(f"Linear address {linear:#010x} is not mapped.")
    at = cpu.memory.ram_address(physical)
    fragments = translations.covering(at) if at >= 0 else []
    if not fragments:
        yield (
            f"No fragment stands for {linear:#010x}: it has not run, has changed since, has a breakpoint, or is "
            "interpreted.\n"
        )
    for fragment in fragments:
        yield from _show_fragment(guest, translations, fragment)


def _show_fragment(guest: GuestTarget, translations: Translations, fragment: Fragment) -> Iterator[str]:
    memory = guest.machine.cpu.memory
    size_bytes = fragment.end - fragment.start
    yield (
        f"fragment for {fragment.eip:#010x} in page {fragment.ram_page << PAGE_SHIFT:#x} of RAM, "
        f"CPL {3 if fragment.mode.user else 0}\n"
        f"  {fragment.unit.charged} instructions, {fragment.guest_bytes} bytes; {size_bytes} bytes of host code, "
        f"TC offset {fragment.start:#x}\n"
        f"  {_plural(translations.chains_to(fragment), 'direct branch leads', 'direct branches lead')} to it; "
        "executions are not counted\n"
    )
    first = fragment.ram_page << PAGE_SHIFT | fragment.linear & 0xFFF
    code = bytes(memory.ram8[first : first + max(fragment.guest_bytes, 15)])
    for line in translations.lines(fragment, code):
        yield _format(line)
    for eip, offset in sorted(translations.landings_in(fragment).items()):
        yield f"  a return to {eip:#010x} goes on at TC offset {offset:#x}\n"


def _format(line: GuestLine) -> str:
    left = line.text if line.eip is None else f"{line.eip:08x}  {line.text}"
    rows = []
    for host in line.host or (None,):
        right = "" if host is None else f"{host.offset:6x}  {host.text}" + (f"  ; {host.note}" if host.note else "")
        rows.append(f"  {left:{_GUEST_COLUMNS}} {right}".rstrip() + "\n")
        left = ""
    return "".join(rows)


def _show_map(translations: Translations) -> Iterator[str]:
    usage = translations.usage()
    fragments = sum(page.fragments for page in usage.pages)
    guest_bytes = sum(page.guest_bytes for page in usage.pages)
    yield (
        f"{usage.used_bytes:,} of {usage.total_bytes:,} bytes used; {usage.live_bytes:,} by {fragments:,} fragments, "
        f"{guest_bytes:,} bytes of guest code\n"
        f"{'page of RAM':>12} {'fragments':>10} {'guest bytes':>12} {'host bytes':>11}\n"
    )
    for page in usage.pages[:_PAGES_SHOWN]:
        address = f"{page.ram_page << PAGE_SHIFT:#x}"
        yield f"{address:>12} {page.fragments:10,} {page.guest_bytes:12,} {page.host_bytes:11,}\n"
    if len(usage.pages) > _PAGES_SHOWN:
        yield f"{'':12} and {len(usage.pages) - _PAGES_SHOWN} more pages\n"
    entries = ", ".join(f"{count:,}" for count in usage.tables[:_TABLES_SHOWN])
    yield f"{_plural(len(usage.tables), 'dispatch table is', 'dispatch tables are')} in use"
    yield f", with {entries} entries\n" if entries else "\n"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count or 'no'} {one if count == 1 else many}"


COMMANDS = (
    Command(
        "tc",
        "[ADDRESS|map|flush]",
        "translated code: what stands for an address, or how the cache is used",
        show,
        details="With a linear ADDRESS, or none for the current EIP: every fragment that stands for it, guest and host "
        "code side by side. Host code lies at offsets of the translation cache; guest registers keep their names but "
        "ESP, which is r12d, and guest memory is reached through gs. `map` shows how much is used, by page of RAM, and "
        "the tables by which indirect branches find fragments; `flush` drops every fragment.",
    ),
)
