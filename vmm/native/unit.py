"""A translation unit (TU) in the making: the host code so far, and the building blocks that emitters share.

It must not know which guest instruction it emits for.

Flags: nothing here changes RFLAGS, in which the guest's status flags live.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from machine.instructions.operands import CONDITION_NAMES
from machine.state import SHADOW_NONE
from vmm.native.assembler import Assembler
from vmm.native.cache import GUARD_BIAS, GUEST_ESP, Exit, TranslationCache
from vmm.native.fpupointers import LastInstruction, LastOperand, Pointers, Span, emit_store
from vmm.native.modes import Mode
from vmm.native.operands import R8, R8D, R9, R9D, R10, R11, R13, R14, Memory, Register, address
from vmm.native.stateblock import field as field_of

_CHARGE_PLACEHOLDER = -0x1000_0000  # so that the displacement takes four bytes


@dataclass(frozen=True, slots=True)
class Link:
    """A direct branch that may be pointed at a fragment.

    Attributes:
        at: offset of its rel32 in the TU's code.
        eip: the guest address that it goes to.
    """

    at: int
    eip: int


@dataclass(frozen=True, slots=True)
class SideExit:
    """A conditional way out of a TU that may go on behind it.

    Attributes:
        at: offset of the rel32 that leads there.
        eip: the guest address that it goes to, in the page of the TU.
        retired: how many instructions have retired by then; the others that were charged are given back.
        pointers: what x87 instructions left behind, to be stored on the way.
    """

    at: int
    eip: int
    retired: int
    pointers: tuple[LastInstruction | LastOperand, ...] = ()


@dataclass(frozen=True, slots=True)
class Repetition:
    """A string instruction of the host on registers that are not the guest's while it runs: see `narrowstrings`.

    Attributes:
        registers: those of ESI and EDI that it uses, by number.
        is_narrow: they are SI and DI, and the count is CX.
        counts: it has a REP prefix.
    """

    registers: frozenset[int]
    is_narrow: bool
    counts: bool


@dataclass(frozen=True, slots=True)
class Unit:
    """The code of one TU, not placed yet.

    Attributes:
        eip: guest address of the first instruction.
        code: host code.
        hosts: offset in `code` at which each guest instruction begins.
        eips: guest address of each.
        end_eip: the highest address after an instruction.
        charged: instructions that retire if the end is reached.
        landings: offset in `code` of what follows a CALL, and the return address that it stands for.
        shadows: what holds events off before an instruction, by its number: SHADOW_*, left out where nothing does.
        spans: what x87 instructions leave behind and is not stored at once.
        floating: it has instructions that need the guest's FPU state.
        stack_offsets: by number, before which instructions guest ESP is not what R12D holds, but that plus so much.
        faulting_in_order: numbers of the instructions that meet page faults where and as the interpreter would.
        repetitions: string instructions after whose faults registers have to be made good, by offset in `code`.
        loads: guest addresses of immediate operands that are read where they stand.
        straddles: it is one instruction, which goes on in the next page.
    """

    eip: int
    code: bytes
    hosts: tuple[int, ...]
    eips: tuple[int, ...]
    end_eip: int
    charged: int
    landings: tuple[tuple[int, int], ...]
    shadows: Mapping[int, int]
    spans: tuple[Span, ...] = ()
    floating: bool = False
    stack_offsets: Mapping[int, int] = field(default_factory=dict)
    faulting_in_order: AbstractSet[int] = frozenset()
    repetitions: Mapping[int, Repetition] = field(default_factory=dict)
    loads: tuple[int, ...] = ()
    straddles: bool = False


@dataclass(slots=True)
class Draft:
    """What emitters write into.

    Attributes:
        tc: where the code will be placed: at its next free position, before anything else is.
        mode: what it is translated for.
        eip: guest address of the first instruction.
        most_insns: how many instructions the TU may have.
        asm: the assembler.
        hosts, eips: as of `Unit`.
        links: branches to be chained.
        landings: as of `Unit`.
        shadows: as of `Unit`.
        is_complete: no instruction may follow.
        goes_round: what follows is the first instruction again.
        pointers: what x87 instructions leave behind.
        gates: those of the FPU that this TU has passed.
        stack_offset: guest ESP is R12D plus this: pushes and pops in a row move R12D once.
        stack_offsets: as of `Unit`.
        faulting_in_order: as of `Unit`.
        repetitions: as of `Unit`.
        patched: instructions whose immediate operand changes.
        loads: as of `Unit`.
        straddles: as of `Unit`.
        beyond: the bytes that its instruction has in the next page.
        known: the host code of guest instructions that IDENT has met, by their bytes.
        soft: guest addresses of instructions that are to have a soft form.
    """

    tc: TranslationCache
    mode: Mode
    eip: int
    most_insns: int
    asm: Assembler = field(init=False)
    hosts: list[int] = field(default_factory=list)
    eips: list[int] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    landings: list[tuple[int, int]] = field(default_factory=list)
    shadows: dict[int, int] = field(default_factory=dict)
    is_complete: bool = False
    goes_round: bool = False
    pointers: Pointers = field(default_factory=Pointers)
    gates: set[str] = field(default_factory=set)
    stack_offset: int = 0
    stack_offsets: dict[int, int] = field(default_factory=dict)
    faulting_in_order: set[int] = field(default_factory=set)
    repetitions: dict[int, Repetition] = field(default_factory=dict)
    patched: AbstractSet[int] = frozenset()
    loads: list[int] = field(default_factory=list)
    straddles: bool = False
    beyond: bytes = b""
    known: dict[bytes, bytes] = field(default_factory=dict)
    soft: AbstractSet[int] = frozenset()
    _charge_at: int = 0
    _refunds: list[tuple[int, int]] = field(default_factory=list)
    _side_exits: list[SideExit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.asm = self.tc.assembler()
        self._check_budget()

    def _check_budget(self) -> None:
        """Budget -= n; if budget < 0: fault at the guard page."""
        emit = self.asm.emit
        emit("lea", R10, address(R10, _CHARGE_PLACEHOLDER))
        self._charge_at = len(self.asm.code) - 4
        emit("sarx", R9, R10, R11)
        emit("movzx", R9D, Memory(8, R11, R9, 1, -GUARD_BIAS))

    def begin(self, eip: int) -> None:
        """The next guest instruction is the one at `eip`."""
        if self.stack_offset:
            self.stack_offsets[len(self.hosts)] = self.stack_offset
        self.hosts.append(len(self.asm.code))
        self.eips.append(eip)

    def take_back(self, at: int) -> None:
        """Forget the code from offset `at` on, which is part of one instruction."""
        del self.asm.code[at:]
        self._refunds = [refund for refund in self._refunds if refund[0] < at]

    @property
    def has_room_for_round(self) -> bool:
        """Whether all instructions so far fit into the TU once more."""
        rounds_insns = self.eips.index(self.eip, 1) if self.eip in self.eips[1:] else len(self.eips)
        return len(self.eips) + rounds_insns <= self.most_insns

    def is_in_page(self, eip: int) -> bool:
        """Whether a guest address is in the page of this TU, so that its mapping cannot differ."""
        return self.mode.linear(eip) >> 12 == self.mode.linear(self.eip) >> 12

    def callout(self, eip: int) -> None:
        """Leave the TC: the instruction at `eip` is interpreted."""
        self.tell_shadow()
        unsettled = self.stack_offsets.get(len(self.hosts) - 1, 0)
        if unsettled:
            self.asm.emit("lea", GUEST_ESP, address(GUEST_ESP, unsettled))
        self.asm.emit("mov", R8D, eip)
        self.asm.jump_to("jmp", self.tc.host + self.tc.exits[Exit.CALLOUT])

    def callout_early(self, eip: int) -> None:
        """A callout in mid-TU: what was charged for this instruction and those behind it is given back."""
        self.budget_here(R10)
        self.callout(eip)

    def budget_here(self, destination: Register) -> None:
        """Let `destination` be what is left of the budget before this instruction."""
        self.asm.emit("lea", destination, address(R10, _CHARGE_PLACEHOLDER))
        self._refunds.append((len(self.asm.code) - 4, len(self.hosts) - 1))

    @property
    def in_shadow(self) -> int:
        """What the instruction before holds off until the end of this one: SHADOW_*."""
        return self.shadows.get(len(self.hosts) - 1, SHADOW_NONE)

    def hold_off(self, kind: int) -> None:
        """This instruction, STI or a load of SS, holds events off until the end of the next one."""
        self.shadows[len(self.hosts)] = kind

    def tell_shadow(self) -> None:
        """Let whoever is left to know of the shadow that this instruction is in."""
        if self.in_shadow:
            self.asm.emit("mov", field_of("shadow"), self.in_shadow)

    def call_routine(self, name: str, eip: int, next_eip: int) -> None:
        """Call a routine of the TC, with its argument in R9D, for the last instruction of this TU."""
        self._name_instruction(eip, next_eip)
        self.enter_routine(name)
        self.is_complete = True

    def enter_routine(self, name: str) -> None:
        """Call a routine of the TC that needs to know nothing but where to go on."""
        self.asm.emit("lea", R8, address(R13, _CHARGE_PLACEHOLDER))
        at = len(self.asm.code)
        self.asm.jump_to("jmp", self.tc.host + self.tc.routines[name])
        self.asm.code[at - 4 : at] = (self.tc.position + len(self.asm.code)).to_bytes(4, "little")

    def go_to_routine(self, name: str, eip: int, next_eip: int) -> None:
        """The same with a routine that goes on elsewhere."""
        self._name_instruction(eip, next_eip)
        self.asm.jump_to("jmp", self.tc.host + self.tc.routines[name])

    def leave_for_port(self, eip: int, next_eip: int) -> None:
        """Leave the TC for a port access, which is the last instruction of this TU, and come back behind it."""
        self._name_instruction(eip, next_eip)
        self.asm.emit("mov", field_of("port_resume"), 0)
        at = len(self.asm.code)
        self.asm.jump_to("jmp", self.tc.host + self.tc.exits[Exit.PORT])
        self.asm.code[at - 4 : at] = (self.tc.position + len(self.asm.code)).to_bytes(4, "little")
        self.is_complete = True

    def _name_instruction(self, eip: int, next_eip: int) -> None:
        self.tell_shadow()
        self.asm.emit("mov", field_of("routine_eip"), eip)
        self.asm.emit("mov", field_of("routine_next"), next_eip)

    def store_pointers(self) -> None:
        """Store what x87 instructions left behind, before the next guest instruction begins."""
        if self.pointers.pending:
            self.pointers.store(self.asm, len(self.hosts))

    def link(self, name: str, eip: int) -> None:
        """A direct branch (JMP, CALL, Jcc) inside the page, chained when it is first taken."""
        self.links.append(Link(self.asm.jump_to(name, self.tc.host), eip))

    def jump(self, eip: int) -> None:
        """Go to a guest address: directly inside the page, by the table out of it, where the mapping may change."""
        if self.is_in_page(eip):
            self.link("jmp", eip)
        else:
            self.asm.emit("mov", R8D, eip)
            self.dispatch("jmp")

    def leave(self, name: str, eip: int) -> None:
        """A conditional jump (or a jump that one leads around) to an address in the page, or on to what follows."""
        at = self.asm.jump_to(name, self.tc.host)
        self._side_exits.append(SideExit(at, eip, len(self.hosts), self.pointers.open))

    def leave_if(self, condition: int, target: int) -> None:
        """Leave for a guest address if the flags say so; `condition` as in the encodings, whose bit 0 inverts it."""
        if self.is_in_page(target):
            self.leave(f"j{CONDITION_NAMES[condition]}", target)
        else:
            around = self.asm.jump_to(f"j{CONDITION_NAMES[condition ^ 1]}", self.tc.host)
            self.leave_page(target)
            self.bind_short(around)

    def leave_page(self, eip: int) -> None:
        """Go to an address out of the page, from what only one way out of the TU comes to."""
        for value in self.pointers.open:
            emit_store(self.asm, value)
        self.asm.emit("lea", R10, address(R10, _CHARGE_PLACEHOLDER))
        self._refunds.append((len(self.asm.code) - 4, len(self.hosts)))
        self.asm.emit("mov", R8D, eip)
        self.dispatch("jmp")

    def look_up(self) -> None:
        """R9 = host address of the fragment for the guest address in R8D, or of the miss stub."""
        self.asm.emit("mov", R9D, Memory(32, R14, R8, 4))
        self.asm.emit("lea", R9, address(R13, index=R9))

    def dispatch(self, name: str) -> None:
        """JMP or CALL to the fragment for the guest address in R8D."""
        self.look_up()
        self.asm.emit(name, R9)

    def push(self, value: Register | int) -> None:
        """guest: [ESP - 4] = value; ESP -= 4, by what `settle_stack` does later."""
        self.asm.emit("mov", Memory(32, GUEST_ESP, displacement=self.stack_offset - 4, gs=True), value)
        self.stack_offset -= 4

    def pop(self, destination: Register) -> None:
        """guest: destination = [ESP]; ESP += 4, by what `settle_stack` does later."""
        self.asm.emit("mov", destination, Memory(32, GUEST_ESP, displacement=self.stack_offset, gs=True))
        self.stack_offset += 4

    def settle_stack(self) -> None:
        """Let R12D be guest ESP again."""
        if self.stack_offset:
            self.asm.emit("lea", GUEST_ESP, address(GUEST_ESP, self.stack_offset))
            self.stack_offset = 0

    def land(self, eip: int) -> None:
        """What follows a host CALL: the return address's fragment is entered from here, so that `ret` is predicted."""
        self.landings.append((len(self.asm.code), eip))
        self.jump(eip)

    def bind_short(self, at: int) -> None:
        """Point the rel32 at offset `at` here."""
        code = self.asm.code
        code[at : at + 4] = (len(code) - (at + 4)).to_bytes(4, "little", signed=True)

    def finish(self, end_eip: int, charged: int) -> Unit:
        """Append the stubs to which links lead until they are chained, and fill in the charge."""
        asm = self.asm
        for side in self._side_exits:
            if side.retired == charged and not side.pointers:
                self.links.append(Link(side.at, side.eip))
                continue
            self.bind_short(side.at)
            for value in side.pointers:
                emit_store(asm, value)
            asm.emit("lea", R10, address(R10, charged - side.retired))
            self.link("jmp", side.eip)
        for link in self.links:
            self.bind_short(link.at)
            asm.emit("mov", R8D, link.eip)
            asm.emit("mov", R9D, self.tc.position + link.at)
            asm.jump_to("jmp", self.tc.host + self.tc.exits[Exit.LINK])
        asm.code[self._charge_at : self._charge_at + 4] = (-charged).to_bytes(4, "little", signed=True)
        for at, index in self._refunds:
            asm.code[at : at + 4] = (charged - index).to_bytes(4, "little", signed=True)
        return Unit(
            self.eip,
            asm.finish(),
            tuple(self.hosts),
            tuple(self.eips),
            end_eip,
            charged,
            tuple(self.landings),
            self.shadows,
            tuple(self.pointers.spans),
            bool(self.gates),
            self.stack_offsets,
            self.faulting_in_order,
            self.repetitions,
            tuple(self.loads),
            self.straddles,
        )
