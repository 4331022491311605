"""Compiled code fragments (CCF): what is known of each piece of emitted code, and how to find it again.

It must not know how code is emitted or run.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from vmm.native.modes import Mode
from vmm.native.unit import Unit


@dataclass(slots=True, eq=False)
class Fragment:
    """The translation of one TU, where it stands in the TC.

    Attributes:
        mode: what it was translated for.
        unit: its instructions and their code.
        ram_page: the page of RAM that its instructions are in.
        start: offset of its code in the TC.
        guest_bytes: length of the instructions that it stands for.
        loads: offsets in its page of immediate operands that it reads where they stand, 4 bytes each.
    """

    mode: Mode
    unit: Unit
    ram_page: int
    start: int
    guest_bytes: int
    loads: tuple[int, ...] = ()

    @property
    def eip(self) -> int:
        """Guest address of its first instruction."""
        return self.unit.eip

    @property
    def end(self) -> int:
        """Offset in the TC behind its code."""
        return self.start + len(self.unit.code)

    @property
    def linear(self) -> int:
        """Linear address of its first instruction."""
        return self.mode.linear(self.eip)

    @property
    def first(self) -> int:
        """Offset in its page of its first instruction."""
        return self.linear & 0xFFF

    def depends_on(self) -> list[tuple[int, int]]:
        """The bytes of its page that it stands for: first offset, offset behind."""
        found, first = [], self.first
        for at in sorted(self.loads):
            found.append((first, at))
            first = at + 4
        return [*found, (first, self.first + self.guest_bytes)]

    def instructions_in(self, first: int, end: int) -> list[tuple[int, int]]:
        """The instructions with bytes from offset `first` to before `end` of the page: guest address, offset behind."""
        last = self.first + self.guest_bytes
        starts = sorted(
            {(self.first + eip - self.eip, eip) for eip in self.unit.eips if self.first + eip - self.eip < last}
        )
        ends = [at for at, _ in starts[1:]] + [last]
        return [(eip, after) for (at, eip), after in zip(starts, ends, strict=True) if at < end and first < after]

    def index_at(self, offset: int) -> int:
        """Which guest instruction the code at `offset` belongs to; -1 before the first."""
        return bisect_right(self.unit.hosts, offset - self.start) - 1


@dataclass(slots=True)
class FragmentIndex:
    """All fragments of a TC.

    Attributes:
        by_address: mode, page of RAM and guest address to fragment.
        pages: page of RAM to the fragments in it.
        covered: page of RAM to a byte for each of its bytes: 1 where an instruction was translated.
    """

    by_address: dict[tuple[Mode, int, int], Fragment] = field(default_factory=dict)
    pages: dict[int, list[Fragment]] = field(default_factory=dict)
    covered: dict[int, bytearray] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list)
    _fragments: list[Fragment] = field(default_factory=list)

    def add(self, fragment: Fragment) -> None:
        """Enter a fragment that stands behind all others in the TC."""
        self.by_address[fragment.mode, fragment.ram_page, fragment.eip] = fragment
        self.pages.setdefault(fragment.ram_page, []).append(fragment)
        covered = self.covered.setdefault(fragment.ram_page, bytearray(4096))
        for first, end in fragment.depends_on():
            covered[first:end] = b"\1" * (end - first)
        self._starts.append(fragment.start)
        self._fragments.append(fragment)

    def at(self, offset: int) -> Fragment | None:
        """The fragment whose code is at `offset` of the TC, also one that was dropped."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or offset >= self._fragments[index].end:
            return None
        return self._fragments[index]

    def overlapping(self, ram_page: int, first: int, end: int) -> list[Fragment]:
        """The fragments with instructions in the bytes from offset `first` to before `end` of a page."""
        covered = self.covered.get(ram_page)
        if covered is None or not any(covered[first:end]):
            return []
        return [
            fragment
            for fragment in self.pages.get(ram_page, ())
            if any(low < end and first < high and low < high for low, high in fragment.depends_on())
        ]

    def cover_anew(self, ram_page: int) -> bool:
        """Forget which bytes dropped fragments covered; returns whether any are left."""
        covered = bytearray(4096)
        for fragment in self.pages.get(ram_page, ()):
            for first, end in fragment.depends_on():
                covered[first:end] = b"\1" * (end - first)
        self.covered[ram_page] = covered
        return any(covered)

    def drop(self, fragment: Fragment) -> bool:
        """Forget one fragment; False if it is forgotten already."""
        key = (fragment.mode, fragment.ram_page, fragment.eip)
        if self.by_address.get(key) is not fragment:
            return False
        del self.by_address[key]
        self.pages[fragment.ram_page].remove(fragment)
        return True

    def drop_page(self, ram_page: int) -> list[Fragment]:
        """Forget the fragments of a page; their code is still there."""
        dropped = self.pages.pop(ram_page, [])
        for fragment in dropped:
            self.by_address.pop((fragment.mode, ram_page, fragment.eip), None)
        self.covered.pop(ram_page, None)
        return dropped

    def clear(self) -> None:
        """Forget all."""
        self.by_address.clear()
        self.pages.clear()
        self.covered.clear()
        self._starts.clear()
        self._fragments.clear()
