"""The fragments of one engine: found, translated on demand, chained, and dropped when what they stand for changes.

It owns what is in the translation cache besides the stubs. It must not know when code runs, nor what an exit means.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from machine.cpu import Cpu
from machine.memory import HOLDS_CODE, PAGE_SHIFT, SECOND_HOLDS_CODE
from machine.state import MASK32
from vmm.blocks import MAX_INSTRUCTION_BYTES
from vmm.native.adaptation import CODE_PAGE_WRITES, Culprits, TableWrites
from vmm.native.cache import Exit, TranslationCache
from vmm.native.fpulive import LiveFpu
from vmm.native.fragments import Fragment, FragmentIndex
from vmm.native.modes import Mode
from vmm.native.sharing import Space
from vmm.native.spaces import Spaces
from vmm.native.tally import Tally
from vmm.native.translator import can_be_soft, translate

if TYPE_CHECKING:
    from vmm.native.verifier import Verifier

HOLDS_FRAGMENTS = 0x20  # page flag: emitted code stands for bytes of this page of RAM
SECOND_HOLDS_FRAGMENTS = 0x80  # the same, of an engine that stays beside another one
# Whoever jumps to a dropped fragment goes by way of its successors, one for each change of its bytes. Direct jumps stay
# in the page; so with all its fragments those ways end, too. GRUB changes the number of each INT before it.
CHANGES_PUT_UP_WITH = 32
ENDS_PUT_UP_WITH = 16  # how often an instruction that lies in two pages is translated anew because its end is another
LONGEST_PATCH_BYTES = 16  # what is longer loads other code
_TC_RESERVE_BYTES = 64 << 10
_CODE = HOLDS_FRAGMENTS | SECOND_HOLDS_FRAGMENTS | HOLDS_CODE | SECOND_HOLDS_CODE

# By guest address and page of RAM: at which addresses of the page a fragment has to stop.
Stops = Callable[[Mode, int, int], frozenset[int]]


class FragmentStore:
    """The fragments of one translation cache.

    Attributes:
        index: what is known of each.
        landings: where a RET comes back to: by page of RAM, then by mode and guest address.
        flushes, invalidations: how often everything, and the fragments of a page, were forgotten.
        flag: what a page of RAM with fragments has in `page_flags`.
        given_up: how often the fragments of a page were forgotten because it is written to as data.
        on_give_up: told of such a page of RAM.
    """

    def __init__(
        self,
        cpu: Cpu,
        tc: TranslationCache,
        spaces: Spaces,
        fpu: LiveFpu,
        culprits: Culprits,
        tally: Tally,
        stops: Stops,
        verifier: Verifier | None,
    ) -> None:
        self._cpu = cpu
        self._tc = tc
        self._spaces = spaces
        self._fpu = fpu
        self._culprits = culprits
        self._tally = tally
        self._stops = stops
        self._verifier = verifier
        self.index = FragmentIndex()
        self.landings: dict[int, dict[tuple[Mode, int], int]] = {}
        # The heads of dropped fragments, by what they were for.
        self._diverted: dict[tuple[Mode, int, int], list[int]] = {}
        self._changes: dict[int, int] = {}  # pages of RAM of which some fragments were dropped: how often
        self._ends: dict[tuple[int, int], int] = {}  # callouts of instructions that lie in two pages
        self._data_writes = TableWrites(CODE_PAGE_WRITES)
        self._data_writes_to: dict[int, int] = {}  # by page of RAM, since a unit of it was last translated
        self.flag = HOLDS_FRAGMENTS
        self.flushes = 0
        self.invalidations = 0
        self.given_up = 0
        self.on_give_up: list[Callable[[int], None]] = []

    def find(self, space: Space, eip: int) -> int | None:
        """The offset of the fragment for a guest address, translated if need be; None if it is not in RAM.

        Raises:
            PageFault: the address cannot be fetched.
        """
        cpu = self._cpu
        if eip > space.mode.code_limit:
            return None
        linear = space.mode.linear(eip)
        ram_page = space.window.ram_page(linear >> PAGE_SHIFT)
        if ram_page < 0:
            self._spaces.windows.fill(linear, write=False, window=space.window)
            ram_page = space.window.ram_page(linear >> PAGE_SHIFT)
        if ram_page < 0:
            at = cpu.memory.ram_address(cpu.mmu.translate(linear, write=False, user=cpu.mmu.user))
            if at < 0:
                return None
            ram_page = at >> PAGE_SHIFT
        fragment = self.index.by_address.get((space.mode, ram_page, eip))
        if fragment is None:
            fragment = self._translate(space.mode, eip, ram_page << PAGE_SHIFT | linear & 0xFFF)
        if space.window.ram_page(linear >> PAGE_SHIFT) == ram_page:  # else nobody would clear the entry
            self._enter(space, fragment, linear >> PAGE_SHIFT)
        return fragment.start

    def _enter(self, space: Space, fragment: Fragment, page: int) -> None:
        """Let jumps to a fragment's address find it; to all known ones of the page if it is the first of them.

        A new address space meets a page that others have run: what is known of it need not be missed one by one.
        """
        self._spaces.sharing.join(space, page)
        table, landings = space.table, self.landings.get(fragment.ram_page, {})
        others = () if table.has(page) else self.index.pages[fragment.ram_page]
        for each in (fragment, *others):
            if each is fragment or (each.mode is space.mode and each.linear >> PAGE_SHIFT == page):
                table.set(each.eip, landings.get((space.mode, each.eip), each.start))

    def _translate(self, mode: Mode, eip: int, at: int) -> Fragment:
        tc, memory = self._tc, self._cpu.memory
        before = time.perf_counter()
        if tc.free_bytes < _TC_RESERVE_BYTES:
            self.flush()
        ram_page = at >> PAGE_SHIFT
        data = bytes(memory.ram8[at : (ram_page + 1) << PAGE_SHIFT])
        unit = translate(
            tc,
            mode,
            eip,
            data,
            self._stops(mode, eip, ram_page),
            self._cpu.model.instructions,
            self._culprits.loaded(ram_page),
            self._bytes_beyond(mode, eip, len(data)),
            self._culprits.soft(ram_page),
        )
        if unit.floating:
            self._fpu.used = True
        if self._verifier is not None:
            self._verifier.check_unit(unit)
        start = tc.place(unit.code)
        length_bytes = (unit.end_eip - eip) & MASK32 or int(not self._culprits.is_written(ram_page, eip))
        length_bytes = min(length_bytes, len(data))
        loads = tuple({mode.linear(at) & 0xFFF for at in unit.loads})
        fragment = Fragment(mode, unit, ram_page, start, length_bytes, loads)
        self.index.add(fragment)
        self._culprits.translated(fragment)
        for head in self._diverted.pop((mode, ram_page, eip), ()):
            self._divert(head, eip, start)
        for offset, landing_eip in unit.landings:
            if mode.linear(landing_eip) >> PAGE_SHIFT == mode.linear(eip) >> PAGE_SHIFT:
                self.landings.setdefault(ram_page, {})[mode, landing_eip] = start + offset
        self._data_writes_to.pop(ram_page, None)
        if not memory.page_flags[ram_page] & self.flag:
            self._data_writes.take_back(ram_page, memory.ram8[at & -4096 : (at & -4096) + 4096])
            memory.flag_page(ram_page, self.flag)
        self._tally.translated(unit.charged, fragment.guest_bytes, len(unit.code))
        self._tally.seconds_in_translator += time.perf_counter() - before
        return fragment

    def _bytes_beyond(self, mode: Mode, eip: int, room_bytes: int) -> bytes:
        """The bytes behind the page that an instruction at `eip` may have; none if they are not there now."""
        if room_bytes >= MAX_INSTRUCTION_BYTES or not mode.is_plain:
            return b""
        physical = self._cpu.mmu.probe(mode.linear(eip) + room_bytes)
        at = -1 if physical is None else self._cpu.memory.ram_address(physical)
        return b"" if at < 0 else bytes(self._cpu.memory.ram8[at : at + MAX_INSTRUCTION_BYTES - room_bytes])

    def call_out(self, space: Space, eip: int) -> None:
        """The instruction at `eip` is going to be interpreted: the end of one that lies in two pages may be new."""
        self._tally.call_out(self._cpu, eip)
        if eip & 0xFFF <= 4096 - MAX_INSTRUCTION_BYTES:
            return
        ram_page = space.window.ram_page(space.mode.linear(eip) >> PAGE_SHIFT)
        fragment = self.index.by_address.get((space.mode, ram_page, eip))
        if fragment is not None and fragment.unit.straddles:
            count = self._ends.get((ram_page, eip), 0) + 1
            self._ends[ram_page, eip] = count
            if count <= ENDS_PUT_UP_WITH:
                self.drop_fragment(fragment)

    def can_be_soft(self, fragment: Fragment, index: int, *, divides: bool = False) -> bool:
        """Whether instruction number `index` of a fragment can have a soft form; `divides`: of a division."""
        if fragment.unit.straddles:
            return False
        first = fragment.ram_page << PAGE_SHIFT | fragment.mode.linear(fragment.unit.eips[max(index, 0)]) & 0xFFF
        data = bytes(self._cpu.memory.ram8[first : min(first | 0xFFF, first + MAX_INSTRUCTION_BYTES - 1) + 1])
        return can_be_soft(fragment.mode, data, self._cpu.model.instructions, divides=divides)

    def retranslate(self, linear_addresses: AbstractSet[int], physical_addresses: AbstractSet[int]) -> None:
        """Drop the fragments of pages in which instructions are stopped at, or are no more."""
        linear = {address >> PAGE_SHIFT for address in linear_addresses}
        physical = {address >> PAGE_SHIFT for address in physical_addresses}
        if not linear and not physical:
            return
        for ram_page, fragments in list(self.index.pages.items()):
            if ram_page in physical or any(fragment.linear >> PAGE_SHIFT in linear for fragment in fragments):
                self.drop_page(ram_page)

    def code_written(self, at: int, length: int, _old: bytes, flags: int) -> None:
        """A store to a page with fragments: those go whose bytes it hits, and now and then all of the page's."""
        if not flags & _CODE:
            return
        for ram_page in range(at >> PAGE_SHIFT, (at + length - 1 >> PAGE_SHIFT) + 1):
            base = ram_page << PAGE_SHIFT
            first, end = max(0, at - base), min(4096, at + length - base)
            is_patch = self._culprits.note_write(ram_page, first, end)
            hit = self.index.overlapping(ram_page, first, end)
            if not hit:
                if is_patch:
                    continue
                self._write_data(ram_page)
            else:
                if end - first <= LONGEST_PATCH_BYTES:
                    for fragment in hit:
                        self._culprits.write(fragment, first, end)
                self._drop_some(ram_page, hit)

    def _write_data(self, ram_page: int) -> None:
        """A store beside the code of a page: after many the page is data, whose code is in the way."""
        count = self._data_writes_to.get(ram_page, 0) + 1
        self._data_writes_to[ram_page] = count
        units = len(self.index.pages.get(ram_page, ()))
        if self._data_writes.is_enough(ram_page, count // max(1, units)):
            at = ram_page << PAGE_SHIFT
            self._data_writes.let_go(ram_page, bytes(self._cpu.memory.ram8[at : at + 4096]))
            self.drop_page(ram_page)
            self.given_up += 1
            for observer in self.on_give_up:
                observer(ram_page)

    def _drop_some(self, ram_page: int, fragments: list[Fragment]) -> None:
        """Forget fragments of a page whose code was changed."""
        count = self._changes.get(ram_page, 0) + 1
        if count >= CHANGES_PUT_UP_WITH:
            self.drop_page(ram_page)
            return
        self.invalidations += 1
        for fragment in fragments:
            self.drop_fragment(fragment)
        if self.index.cover_anew(ram_page):
            self._changes[ram_page] = count
        else:
            self.drop_page(ram_page)

    def drop_page(self, ram_page: int) -> None:
        """Forget a page's fragments; whoever still jumps to one comes out with its guest address."""
        tc = self._tc
        self.invalidations += 1
        for fragment in self.index.drop_page(ram_page):
            self._divert(fragment.start, fragment.eip, tc.exits[Exit.MISS])
            self._tally.drop(fragment.start)
        self.landings.pop(ram_page, None)
        self._changes.pop(ram_page, None)
        self._data_writes_to.pop(ram_page, None)
        self._cpu.memory.page_flags[ram_page] &= ~self.flag

    def drop_fragment(self, fragment: Fragment) -> None:
        """Have a fragment translated anew; whoever jumps to the old one will come to the new one."""
        tc = self._tc
        if self.index.drop(fragment):
            self._divert(fragment.start, fragment.eip, tc.exits[Exit.MISS])
            self._tally.drop(fragment.start)
            self._diverted.setdefault((fragment.mode, fragment.ram_page, fragment.eip), []).append(fragment.start)

    def _divert(self, start: int, eip: int, target: int) -> None:
        """Let all chains to a dropped fragment lead to the miss stub, or to its successor."""
        tc = self._tc
        head = b"\x41\xb8" + eip.to_bytes(4, "little")  # mov r8d, eip
        jump = (target - (start + len(head) + 5)).to_bytes(4, "little", signed=True)
        if self._verifier is not None:
            self._verifier.check_head(start, head + b"\xe9" + jump)
        tc.data[start : start + len(head) + 5] = head + b"\xe9" + jump

    def translate_singly(self) -> None:
        """From now on every instruction is a TU of its own."""
        self._tc.longest_unit_insns = 1
        self.flush()

    def flush(self) -> None:
        """Start with an empty TC: forget everything."""
        self.flushes += 1
        self._tally.flush()
        for ram_page in list(self.index.pages):
            self._cpu.memory.page_flags[ram_page] &= ~self.flag
        self.index.clear()
        self.landings.clear()
        self._changes.clear()
        self._ends.clear()
        self._data_writes_to.clear()
        self._culprits.forget_fragments()
        self._diverted.clear()
        self._spaces.clear_tables()
        self._fpu.forget()
        self._tc.clear()
        if self._verifier is not None:
            self._verifier.clear()
        self._tc.reset_call_stack()

    def chain(self, at: int, target: int) -> None:
        """Point the direct branch whose rel32 is at offset `at` to the fragment at offset `target`."""
        if self._verifier is not None:
            self._verifier.check_link(at, target)
        self._tc.point(at, target)
        self._tally.chained(target)
