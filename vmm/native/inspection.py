"""What there is to see of a translation cache: fragments with guest and host code side by side, and how it is used.

Engines that translate offer it through the protocol `Inspectable`. It only reads, and must not know who asks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import capstone

from machine.memory import PAGE_SHIFT

if TYPE_CHECKING:
    from vmm.native.cache import TranslationCache
    from vmm.native.fragments import Fragment, FragmentIndex
    from vmm.native.modes import Mode
    from vmm.native.tally import Tally

_PAGE_MASK = (1 << PAGE_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class HostLine:
    """One host instruction: its offset in the TC, its text, and where it leads in words (or nothing)."""

    offset: int
    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class GuestLine:
    """One guest instruction and the host code that stands for it.

    Attributes:
        eip: its address; None for host code that belongs to no instruction: the charge, the ends.
        text: the instruction, or what the code is for.
        host: the code.
    """

    eip: int | None
    text: str
    host: tuple[HostLine, ...]


@dataclass(frozen=True, slots=True)
class PageUse:
    """How much of the TC stands for one page of RAM."""

    ram_page: int
    fragments: int
    guest_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """How a TC is used.

    Attributes:
        total_bytes, used_bytes: its size, and how much is taken, by dropped fragments too.
        live_bytes: of fragments that can be entered.
        pages: by page of RAM, the largest first.
        tables: entries of each dispatch table that is not empty.
    """

    total_bytes: int
    used_bytes: int
    live_bytes: int
    pages: Sequence[PageUse]
    tables: Sequence[int]


@dataclass(frozen=True, slots=True)
class Translations:
    """A look into an engine's TC; good until guest code runs again.

    Attributes:
        tc, fragments, tally: the engine's.
        landings: where returns come back to: by page of RAM, then by mode and guest address.
        tables: for each dispatch table, how many entries it has.
    """

    tc: TranslationCache
    fragments: FragmentIndex
    tally: Tally
    landings: Mapping[int, Mapping[tuple[Mode, int], int]]
    tables: Sequence[int]

    def landings_in(self, fragment: Fragment) -> dict[int, int]:
        """The return addresses of its calls, and the offset in the TC at which each goes on."""
        landings = self.landings.get(fragment.ram_page, {})
        return {eip: offset for (_, eip), offset in landings.items() if fragment.start <= offset < fragment.end}

    def covering(self, ram_address: int) -> list[Fragment]:
        """The fragments whose instructions include the byte at a RAM address, those that begin there first."""
        at = ram_address & _PAGE_MASK
        found = [
            fragment
            for fragment in self.fragments.pages.get(ram_address >> PAGE_SHIFT, ())
            if 0 <= at - fragment.first < fragment.guest_bytes
        ]
        return sorted(found, key=lambda fragment: at - fragment.first)

    def chains_to(self, fragment: Fragment) -> int:
        """How many direct branches lead to it."""
        return self.tally.chains_to(fragment.start)

    def lines(self, fragment: Fragment, guest: bytes) -> Iterator[GuestLine]:
        """Guest and host code side by side.

        Args:
            fragment: what to list.
            guest: the bytes at its address, to the end of the last instruction.
        """
        unit = fragment.unit
        bounds = [fragment.start, *(fragment.start + at for at in unit.hosts), fragment.end]
        host = list(self._host_lines(fragment))
        starts = [line.offset for line in host]
        texts = _guest_texts(fragment.mode, fragment.eip, guest)

        def between(low: int, high: int) -> tuple[HostLine, ...]:
            return tuple(host[bisect_right(starts, low - 1) : bisect_right(starts, high - 1)])

        yield GuestLine(None, f"charge {unit.charged}", between(bounds[0], bounds[1]))
        for index, eip in enumerate(unit.eips[: len(unit.hosts)]):
            text = texts.get(eip, "")
            if index >= unit.charged:
                text = f"{text} (interpreted)".lstrip()
            yield GuestLine(eip, text, between(bounds[index + 1], bounds[index + 2]))

    def usage(self) -> Usage:
        """How the TC is used."""
        pages, live = [], 0
        for ram_page, fragments in self.fragments.pages.items():
            host_bytes = sum(fragment.end - fragment.start for fragment in fragments)
            guest_bytes = sum(fragment.guest_bytes for fragment in fragments)
            pages.append(PageUse(ram_page, len(fragments), guest_bytes, host_bytes))
            live += host_bytes
        pages.sort(key=lambda page: -page.host_bytes)
        tables = sorted((entries for entries in self.tables if entries), reverse=True)
        return Usage(self.tc.position + self.tc.free_bytes, self.tc.position, live, pages, tables)

    def _host_lines(self, fragment: Fragment) -> Iterator[HostLine]:
        code = bytes(self.tc.data[fragment.start : fragment.end])
        for insn in _decoder(capstone.CS_MODE_64).disasm(code, fragment.start):
            note = ""
            if insn.group(capstone.CS_GRP_BRANCH_RELATIVE):
                note = self._describe_target(fragment, insn.operands[0].imm)
            yield HostLine(insn.address, f"{insn.mnemonic} {insn.op_str}".strip(), note)

    def _describe_target(self, fragment: Fragment, target: int) -> str:
        """Where a direct branch leads."""
        names = {
            **{offset: f"routine {name}" for name, offset in self.tc.routines.items()},
            **{offset: f"exit: {reason.name.lower()}" for reason, offset in self.tc.exits.items()},
        }
        if target in names:
            return names[target]
        if fragment.start < target < fragment.end:
            return ""
        other = self.fragments.at(target)
        return "" if other is None else f"chained to the fragment for {other.eip:#010x}"


@runtime_checkable
class Inspectable(Protocol):
    """An engine that keeps translations."""

    def translations(self) -> Translations:
        """A look at them; the engine must be running the CPU."""

    def flush_translations(self) -> None:
        """Forget them all; the guest sees nothing of it."""


@cache
def _decoder(mode: int) -> capstone.Cs:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, mode)
    decoder.detail = True
    return decoder


def _guest_texts(mode: Mode, eip: int, guest: bytes) -> dict[int, str]:
    return {
        insn.address: f"{insn.mnemonic} {insn.op_str}".strip()
        for insn in _decoder(capstone.CS_MODE_16 if mode.is_narrow else capstone.CS_MODE_32).disasm(guest, eip)
    }
