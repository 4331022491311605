"""The verifier: proves emitted code against the whitelist of forms, and its control flow closed, before it may run.

It decodes with Capstone, a second opinion beside the assembler that wrote the code, and must not know who emits what.

A fragment is read once from its first byte to its last. For each instruction a form of `whitelist` must match, and the
facts that it needs must hold on every way there: branches inside a fragment only go forward, so one pass knows them.
Where code is entered from elsewhere (its start, the first host instruction of each guest instruction, which a fault
resumes, and what follows a CALL) nothing is known but that the guest's registers are 32-bit numbers; wherever
control leaves, they have to be. A fragment that passes can neither read nor write host memory but by the whitelisted
forms, nor execute anything but verified code. That the budget and the guest's semantics are right is not proven here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Final

from vmm.native.cache import Exit, TranslationCache
from vmm.native.hostcode import GUEST_NUMBERS, REGISTER_NAMES, DecodeError, Step, decode, split
from vmm.native.unit import Unit
from vmm.native.whitelist import ANY, CODE, FLAGS, REP_BITS, U32, Fact, Form

_RCX, _R8, _R9 = 1, 8, 9
_PADDING = b"\x90"
_RETURN: Final = 16  # the slot at [rsp], behind the sixteen registers
_SLOTS: Final = {**{name: number for number, name in enumerate(REGISTER_NAMES[0])}, "[rsp]": _RETURN}

State = tuple[Fact, ...]
_OUTSIDE: Final[State] = tuple(U32 if number in GUEST_NUMBERS else ANY for number in range(17))
_RETURNING: Final[State] = tuple(CODE if number == _R8 else fact for number, fact in enumerate(_OUTSIDE))
_NOTHING: Final[State] = (ANY,) * 17


class VerifierError(Exception):
    """Emitted code that is not proven harmless: a mistake of the translator.

    Attributes:
        eip: address of the guest instruction that it was emitted for; None for a stub or a patch.
        offset: where it is, or was to be, in the TC.
        code: the host instruction's bytes.
        rule: what they break.
    """

    def __init__(self, eip: int | None, offset: int, code: bytes, rule: str) -> None:
        place = "the TC's own code" if eip is None else f"guest address {eip:#010x}"
        super().__init__(f"{place}, host code {code.hex(' ')} at TC offset {offset:#x}: {rule}")
        self.eip = eip
        self.offset = offset
        self.code = code
        self.rule = rule


class _BrokenRuleError(Exception):
    """Found at one instruction; becomes a `VerifierError` where its place is known."""


# Facts.


def _meet(one: State, other: State) -> State:
    """What holds on both ways."""
    if one == other:
        return one
    return tuple(
        a if a == b else Fact("below", max(a.bits, b.bits)) if max(a.bits, b.bits) <= 32 else ANY
        for a, b in zip(one, other, strict=True)
    )


def _after(step: Step, form: Form, state: State, index: int) -> State:
    """What is known behind an instruction."""
    new = list(state)
    new[_RETURN] = ANY
    for number, fully in step.writes:
        new[number] = U32 if fully or new[number].bits <= 32 else ANY
    if step.mnemonic in ("mov", "shrx", "movabs") and step.operands[0].kind == "register":
        _follow_value(step, state, new, index)
    if step.mnemonic == "movzx" and step.operands[0].bits == 32:
        new[step.operands[0].number] = Fact("below", step.operands[1].bits)
    for name, fact in form.gives.items():
        new[_SLOTS[name]] = fact
    return tuple(new)


def _follow_value(step: Step, state: State, new: list[Fact], index: int) -> None:
    """MOV and SHRX into a register: constants, copies, and what a shift says of its source."""
    target, source = step.operands[0], step.operands[1]
    if target.bits == 64 and source.kind != "constant":
        new[target.number] = ANY
    if target.bits != 32:
        return
    if step.mnemonic == "shrx":
        count, value = state[step.operands[2].number], state[source.number]
        if source.kind == "register" and count.kind == "const" and count.number < 32 and value.of:
            new[target.number] = Fact("shifted", count.number, value.of)
    elif source.kind == "constant":
        new[target.number] = Fact("const", source.number & 0xFFFF_FFFF)
    elif source.kind == "register" and source.bits == 32 and state[source.number].bits <= 32:
        fact = state[source.number]
        if not fact.of:
            fact = replace(fact, of=index + 1)
        new[source.number] = new[target.number] = fact


def _check_stack(step: Step, state: State | None) -> None:
    """What PUSHFQ has put on the host's stack is taken off at once."""
    if state is not None and state[_RETURN] == FLAGS and step.mnemonic != "pop":
        raise _BrokenRuleError(f"`{step.text}` leaves RFLAGS on the host's stack")


def _check_repetition(step: Step, state: State) -> None:
    """A REP ends within the window, or in the guard behind it."""
    if step.repeated_bytes and state[_RCX].bits > REP_BITS[step.repeated_bytes]:
        raise _BrokenRuleError(f"ECX may be too large for `{step.text}` to end in the window or its guard")


def _if_ecx_is_zero(state: State) -> State:
    """What JECXZ says where it jumps: of a value whose high bits are zero, all its copies are small."""
    high = state[_RCX]
    if high.kind != "shifted":
        return state
    return tuple(Fact("below", high.number, high.of) if fact.of == high.of else fact for fact in state)


@dataclass(slots=True)
class _Reading:
    """One pass over a piece of code.

    Attributes:
        origin: its offset in the TC.
        steps: its instructions, by offset in it.
        incoming: what is known at places that are reached by a branch, or from elsewhere.
        outside: offsets in the TC to which it may jump.
        link_exit: the one of them that asks for a link to be patched, whose place is in R9D.
        returning: those of them that go on at the address in R8.
        links: offsets in the TC of the rel32s of its direct branches.
    """

    origin: int
    steps: dict[int, Step]
    incoming: dict[int, State]
    outside: Container[int]
    link_exit: int
    returning: Container[int]
    links: frozenset[int]

    def read(self, on_error: Callable[[int, bytes, str], VerifierError]) -> None:
        """Prove it; what is wrong is raised as `on_error(offset in it, bytes, rule)`."""
        state: State | None = None
        for index, (at, step) in enumerate(self.steps.items()):
            known, fallen = self.incoming.get(at), state
            if state is None and known is None and step.code == _PADDING:
                continue
            if state is None:
                # Nothing falls through to here. What nothing jumps to either is proven as if somebody did.
                state = known or _OUTSIDE
            elif known is not None:
                state = _meet(state, known)
            try:
                form = self._choose(step, state)
                _check_stack(step, fallen)
                _check_repetition(step, state)
                self._take_address(at, step, form)
                if form.flow and not form.stub:
                    self._check_flow(at, step, state)
            except _BrokenRuleError as broken:
                raise on_error(at, step.code, str(broken)) from None
            state = None if form.flow in ("jump", "call") else _after(step, form, state, index)
        if state is not None:
            at, step = list(self.steps.items())[-1]
            raise on_error(at, step.code, "execution runs on behind the last instruction")

    def _take_address(self, at: int, step: Step, form: Form) -> None:
        """Where a routine is to go on is a boundary further on, where nothing is known."""
        if form.gives.get("r8") != CODE:
            return
        target = step.operands[1].number - self.origin
        if target not in self.steps or target <= at:
            raise _BrokenRuleError(f"TC offset {self.origin + target:#x} is no boundary further on in this fragment")
        known = self.incoming.get(target)
        self.incoming[target] = _OUTSIDE if known is None else _meet(known, _OUTSIDE)

    def _choose(self, step: Step, state: State) -> Form:
        """The first form whose needs are met."""
        for form in step.forms:
            if all(state[_SLOTS[name]].satisfies(need) for name, need in form.needs.items()):
                return form
        if not step.forms:
            raise _BrokenRuleError(f"no form of the whitelist allows `{step.text}`")
        needs = ", ".join(
            f"{name}: {need.kind} {need.number or ''}".strip() for name, need in step.forms[0].needs.items()
        )
        raise _BrokenRuleError(f"`{step.text}` is allowed only with {needs}")

    def _check_flow(self, at: int, step: Step, state: State) -> None:
        """Direct targets are boundaries further on, or known; where control leaves, the guest's registers are clean."""
        if step.relative is not None:
            target = at + len(step.code) + step.relative
            if target in self.steps and self.origin + target not in self.outside:
                if target <= at:
                    raise _BrokenRuleError("a branch backwards inside a fragment")
                there = _if_ecx_is_zero(state) if step.mnemonic == "jecxz" else state
                known = self.incoming.get(target)
                self.incoming[target] = there if known is None else _meet(known, there)
                return
            if self.origin + target not in self.outside:
                place = "the middle of an instruction" if 0 <= target < max(self.steps) else "no known entry"
                raise _BrokenRuleError(f"`{step.text}` goes to TC offset {self.origin + target:#x}, {place}")
            if self.origin + target in self.returning and state[_R8] != CODE:
                raise _BrokenRuleError(f"`{step.text}` goes to a routine that does not know where to go on")
            if self.origin + target == self.link_exit:
                detail = state[_R9]
                if detail.kind != "const" or detail.number not in self.links:
                    raise _BrokenRuleError("the link exit is not given the place of a direct branch of this fragment")
        dirty = [REGISTER_NAMES[0][number] for number in GUEST_NUMBERS if state[number].bits > 32]
        if dirty:
            raise _BrokenRuleError(f"control leaves while {', '.join(dirty)} is more than a 32-bit number")


def _returning(steps: Mapping[int, Step], routines: frozenset[int]) -> frozenset[int]:
    """The routines that keep what is in R8 as the address to go on at."""
    found, routine = set[int](), -1
    for at, step in steps.items():
        routine = at if at in routines else routine
        if any(form.needs.get("r8") == CODE for form in step.forms):
            found.add(routine)
    return frozenset(found)


class Verifier:
    """What is verified of one translation cache.

    Whoever places or changes code asks first; each method raises `VerifierError` and otherwise remembers the answer.
    """

    def __init__(self, tc: TranslationCache) -> None:
        self._tc = tc
        exits = {offset for reason, offset in tc.exits.items() if reason is not Exit.FAULT}
        self._exits = frozenset(exits | {*tc.routines.values()})
        self._entries: dict[int, frozenset[int]] = {}  # start of a fragment: where else it is entered
        self._targets: set[int] = set(self._exits)
        self._links: set[int] = set()
        self._returning: frozenset[int] = frozenset()
        self.check_stubs()

    def clear(self) -> None:
        """The TC holds nothing but its stubs."""
        self._entries.clear()
        self._targets = set(self._exits)
        self._links.clear()

    def check_stubs(self) -> None:
        """The TC's own code, which is emitted once: the exits, and the way in that the C caller takes."""
        tc = self._tc
        steps = self._steps(bytes(tc.data[: tc.stubs_bytes]), stub=True)
        self._returning = _returning(steps, frozenset(tc.routines.values()))
        incoming = dict.fromkeys((*tc.exits.values(), *tc.routines.values()), _OUTSIDE)
        incoming.update(dict.fromkeys(self._returning, _RETURNING))
        incoming[tc.way_in] = incoming[tc.routines["fault"]] = _NOTHING
        reading = _Reading(0, steps, incoming, frozenset(tc.exits.values()), -1, (), frozenset())
        reading.read(lambda at, code, rule: VerifierError(None, at, code, rule))

    def check_unit(self, unit: Unit) -> None:
        """A unit that is to be placed at the TC's next free position."""
        origin = self._tc.position

        def fail(at: int, code: bytes, rule: str) -> VerifierError:
            index = max(0, bisect_right(unit.hosts, at) - 1)
            return VerifierError(unit.eips[index], origin + at, code, rule)

        try:
            steps = self._steps(unit.code)
        except VerifierError as error:
            raise fail(error.offset, error.code, error.rule) from None
        entries = frozenset({0, *unit.hosts, *(at for at, _ in unit.landings)})
        for at in entries - steps.keys():
            raise fail(at, unit.code[at : at + 15], "an entry in the middle of an instruction")
        links = frozenset(
            origin + at + len(step.code) - 4
            for at, step in steps.items()
            if step.relative is not None and len(step.code) > 4  # JECXZ alone has a rel8
        )
        incoming = dict.fromkeys(entries, _OUTSIDE)
        _Reading(origin, steps, incoming, self._targets, self._tc.exits[Exit.LINK], self._returning, links).read(fail)
        self._entries[origin] = frozenset(origin + at for at in incoming)
        self._targets |= {origin, *(origin + at for at, _ in unit.landings)}
        self._links |= links

    def check_link(self, at: int, target: int) -> None:
        """A direct branch, whose rel32 is at offset `at`, is to lead to `target`."""
        code = bytes(self._tc.data[at : at + 4])
        if at not in self._links:
            raise VerifierError(None, at, code, "a link is patched that is no direct branch of a fragment")
        if target not in self._entries and target not in self._targets:
            raise VerifierError(None, at, code, f"a link to TC offset {target:#x}, which is no known entry")

    def check_head(self, start: int, code: bytes) -> None:
        """The head of a dropped fragment is to be overwritten by `code`, which leads out or to a known entry."""
        within = self._entries.get(start)
        if within is None or any(start < entry < start + len(code) for entry in within):
            raise VerifierError(None, start, code, "code is overwritten that can be entered in its middle")
        steps = self._steps(code)
        reading = _Reading(
            start, steps, {0: _OUTSIDE}, self._targets, self._tc.exits[Exit.LINK], self._returning, frozenset()
        )
        reading.read(lambda at, code, rule: VerifierError(None, start + at, code, rule))

    def _steps(self, code: bytes, *, stub: bool = False) -> dict[int, Step]:
        steps = {}
        for at, part in split(code):
            try:
                steps[at] = decode(part, stub=stub)
            except DecodeError as broken:
                raise VerifierError(None, at, part, str(broken)) from None
        return steps
