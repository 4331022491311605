"""Two engines from one snapshot: equal where they are, and a planted mistake found and named at its instruction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from guests import images
from machine.debug import Stop, StopKind
from machine.flags import CF
from machine.loaders.image import LoadOptions
from machine.pc import EngineFactory, Machine, MachineOptions
from machine.snapshot import Snapshot
from machine.state import EAX, EBX
from tests import engine
from tests.oracles.assembler import assemble
from tests.vmm.bare import host_alu
from tests.vmm.planted import plant
from vmm import lockstep, pairs
from vmm.bt import BinaryTranslator
from vmm.differences import Kind
from vmm.interp import Interpreter
from vmm.lockstep import Divergence, LockstepError, Outcome, Progress, Sides
from vmm.native.sharing import Space
from vmm.native.unit import Draft
from vmm.pairs import Pair, PairError

NATIVE = [name for name in engine.factories() if name != "interp"]
ORIGIN = 0x10_0000


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def machine_of(stack: ExitStack, source: str) -> Machine:
    """Flat code in 32-bit protected mode, from ORIGIN on; it stands before its first instruction."""
    loading = LoadOptions(ram_bytes=4 << 20, load_address=ORIGIN)
    options = MachineOptions(image=assemble(source, origin=ORIGIN), loading=loading)
    return stack.enter_context(closing(Machine(options, engine.factories(), "interp")))


def demo(stack: ExitStack, append: str = "quiet run=pgfault;poweroff", running: str = "interp") -> Machine:
    options = MachineOptions(
        image=images.path("demo"), loading=LoadOptions(ram_bytes=16 << 20, command_line=append), ns_per_insn=1000
    )
    return stack.enter_context(closing(Machine(options, engine.factories(), running)))


def finish(pair: Pair, insns: int, **options: bool) -> tuple[Outcome, list[Progress]]:
    """The outcome, and the progress on the way to it."""
    seen = []
    comparison = pair.compare(insns, **options)
    while True:
        try:
            seen.append(next(comparison))
        except StopIteration as end:
            return end.value, seen


def parted(machine: Machine, first: str, second: str, insns: int) -> Divergence:
    with Pair(machine, (first, second)) as pair:
        outcome, _ = finish(pair, insns)
    assert outcome.divergence is not None
    return outcome.divergence


class TestEqual:
    @pytest.mark.parametrize("names", [("interp", "bt"), ("bt", "trap"), ("trap nested", "interp")], ids="-".join)
    def test_from_the_start_to_the_end_of_a_guest(self, stack: ExitStack, names: tuple[str, str]) -> None:
        with Pair(demo(stack), names) as pair:
            outcome, seen = finish(pair, 5_000_000)
        assert outcome.divergence is None
        assert outcome.stop is not None
        assert outcome.stop.kind is StopKind.EXIT
        assert b"poweroff" in outcome.output
        icounts = [progress.icount for progress in seen]
        assert icounts == sorted(icounts)
        assert not any(progress.is_searching for progress in seen)

    def test_from_the_middle_of_a_run_which_is_not_moved(self, stack: ExitStack) -> None:
        machine = demo(stack, running="bt")
        machine.engine.run(64_321)
        before = (
            machine.clock.snapshot(),
            machine.cpu.state.pack(),
            bytes(machine.memory.ram8),
            machine.board.snapshot(),
        )
        with Pair(machine, ("bt", "trap nested")) as pair:
            outcome, _ = finish(pair, 20_000)
            assert pair.begin_icount == 64_321
        assert (outcome.divergence, outcome.stop, outcome.icount) == (None, None, 84_321)
        assert before == (
            machine.clock.snapshot(), machine.cpu.state.pack(), bytes(machine.memory.ram8), machine.board.snapshot()
        )  # fmt: skip

    def test_in_slices(self, stack: ExitStack) -> None:
        machine = machine_of(stack, "1: inc eax\njmp 1b")
        with Pair(machine, ("interp", "interp"), in_slices=True) as pair:
            _, seen = finish(pair, 40_000)
        with Pair(machine, ("interp", "interp")) as pair:
            _, whole = finish(pair, 40_000)
        assert len(seen) > len(whole)

    def test_it_can_be_left_at_any_time(self, stack: ExitStack) -> None:
        machine = demo(stack)
        before = len(list(Path("/proc/self/fd").iterdir()))
        with Pair(machine, ("interp", "bt")) as pair:
            comparison = pair.compare(1_000_000)
            for _ in range(10):
                next(comparison)
            comparison.close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


class TestRefusals:
    def test_kvm_has_no_icount(self) -> None:
        with pytest.raises(PairError, match="`trap kvm` has no icount"):
            pairs.check_engines(("bt", "trap kvm"), ("bt", "trap kvm"))

    def test_what_there_is_not(self, stack: ExitStack) -> None:
        with pytest.raises(
            PairError, match="there is no engine `hvm`; there is: interp, bt, trap, trap nested, hybrid"
        ):
            Pair(demo(stack), ("bt", "hvm"))


# Memory, a call, a port and flags; SBB comes in one round only.
LOOP = f"""
    mov ebx, {ORIGIN + 0x1000}
    mov esp, {ORIGIN + 0x3000}
    mov ecx, 5000
1:  lea eax, [ecx + edx]
    add edi, eax
    mov [ebx + 8], edi
    call 2f
    cmp ecx, 4000
    jne 3f
    sbb esi, 7
    setc [ebx + 16]
    mov edx, 0x3ff
    out dx, al
3:  dec ecx
    jnz 1b
    hlt
2:  rol edi, 3
    ret
"""
ROUND_INSNS = 10
SBB_ICOUNT = 3 + ROUND_INSNS * 1000 + 8  # so many retire before it
OUT_ICOUNT = SBB_ICOUNT + 3
SBB, STORE, ROL, DEC = (assemble(text) for text in ("sbb esi, 7", "mov [ebx + 8], edi", "rol edi, 3", "dec ecx"))
# The host's: memory operands go by way of the window in GS, with 32-bit addresses.
WRONG_STORE = b"\x65\x67" + assemble("mov [ebx + 12], edi")


def named(divergence: Divergence) -> list[tuple[Kind, str]]:
    return [(each.kind, each.name) for each in divergence.differences]


class TestPlantedInATranslator:
    """By mutation: the instruction that is emitted wrongly is found, and what it does wrong is named."""

    @pytest.mark.parametrize("name", NATIVE)
    def test_a_register(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        plant(monkeypatch, SBB, lambda draft: draft.asm.raw(assemble("sbb esi, 8")))
        divergence = parted(machine_of(stack, LOOP), "interp", name, 20_000)
        assert (divergence.agreed_icount, divergence.icount) == (SBB_ICOUNT, SBB_ICOUNT + 1)
        assert divergence.is_exact
        assert named(divergence)[0] == (Kind.REGISTER, "esi")
        assert str(divergence.differences[0]) == "esi: 0xfffffff9 / 0xfffffff8"
        assert divergence.trace[-1].split(None, 2)[::2] == [str(SBB_ICOUNT), "sbb esi, 7"]
        assert " jne " in divergence.trace[-2]

    def test_a_flag_that_is_overwritten_soon(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, assemble("add edi, eax"), lambda draft: draft.asm.raw(assemble("add edi, eax; cmc")))
        with Pair(machine_of(stack, LOOP), ("interp", "bt")) as pair:
            assert finish(pair, 900)[0].divergence is None
            divergence = finish(pair, 900, each=True)[0].divergence
        assert divergence is not None
        assert (divergence.agreed_icount, divergence.icount) == (4, 5)
        assert [str(each) for each in divergence.differences] == ["flag CF: 0 / 1"]

    def test_a_flag(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, SBB, lambda draft: draft.asm.raw(SBB + assemble("cmc")))
        divergence = parted(machine_of(stack, LOOP), "trap", "interp", 20_000)
        assert (divergence.agreed_icount, divergence.icount) == (SBB_ICOUNT, SBB_ICOUNT + 1)
        assert [str(each) for each in divergence.differences] == ["flag CF: 0 / 1"]

    @pytest.mark.parametrize("name", ["bt", "trap nested"])
    def test_memory(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        plant(monkeypatch, STORE, lambda draft: draft.asm.raw(WRONG_STORE))
        divergence = parted(machine_of(stack, LOOP), name, "interp", 20_000)
        # A page that is touched for the first time may be touched by the interpreter.
        assert divergence.agreed_icount in (5, 5 + ROUND_INSNS)
        assert named(divergence) == [(Kind.MEMORY, f"{ORIGIN + 0x1000 + at:08x}") for at in (8, 12)]
        assert divergence.trace[-1].endswith("mov dword ptr [ebx + 8], edi")

    def test_a_device(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        access = BinaryTranslator._access_port

        def access_wrongly(self: BinaryTranslator, space: Space, limit_icount: int, now_s: float) -> int | None:
            words = self._tc.state.words if self._tc is not None else pytest.fail("no cache")
            words[EAX] ^= 0x40
            try:
                return access(self, space, limit_icount, now_s)
            finally:
                words[EAX] ^= 0x40
                self._cpu.state.gpr[EAX] = words[EAX]

        monkeypatch.setattr(BinaryTranslator, "_access_port", access_wrongly)
        divergence = parted(machine_of(stack, LOOP), "interp", "bt", 20_000)
        assert (divergence.agreed_icount, divergence.icount) == (OUT_ICOUNT, OUT_ICOUNT + 1)
        assert named(divergence) == [(Kind.DEVICE, "com1.scratch")]
        assert divergence.trace[-1].endswith("out dx, al")

    def test_where_only_the_unit_is_wrong_that_is_said(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        def emit(draft: Draft) -> None:
            draft.asm.raw(assemble("sbb esi, 8") if len(draft.hosts) > 1 else SBB)

        plant(monkeypatch, SBB, emit)
        divergence = parted(machine_of(stack, LOOP), "interp", "bt", 20_000)
        assert not divergence.is_exact
        assert divergence.agreed_icount <= SBB_ICOUNT < divergence.icount <= divergence.agreed_icount + 64
        assert "one at a time" in str(divergence)
        assert named(divergence)[0] == (Kind.REGISTER, "esi")

    def test_without_a_search(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, SBB, lambda draft: draft.asm.raw(assemble("sbb esi, 8")))
        with Pair(machine_of(stack, LOOP), ("interp", "bt")) as pair:
            outcome, seen = finish(pair, 20_000, locate=False)
        assert outcome.divergence is not None
        assert outcome.divergence.agreed_icount <= SBB_ICOUNT < outcome.divergence.icount
        assert outcome.divergence.trace == ()
        assert not any(progress.is_searching for progress in seen)


class TestPlantedInTheInterpreter:
    def test_an_operation(self, stack: ExitStack) -> None:
        """Both sides have the wrong arithmetic, and only one interprets."""
        right = host_alu()

        def wrong(a: int, b: int, eflags: int) -> tuple[int, int]:
            result, eflags = right.binary["sbb"][32](a, b, eflags)
            return result, eflags ^ CF

        alu = replace(right, binary={**right.binary, "sbb": {**right.binary["sbb"], 32: wrong}})
        loading = LoadOptions(ram_bytes=4 << 20, load_address=ORIGIN)
        options = MachineOptions(image=assemble(LOOP, origin=ORIGIN), loading=loading)
        machine = stack.enter_context(closing(Machine(options, engine.factories(), "interp", alu)))
        divergence = parted(machine, "bt", "interp", 20_000)
        assert (divergence.agreed_icount, divergence.icount) == (SBB_ICOUNT, SBB_ICOUNT + 1)
        assert [str(each) for each in divergence.differences] == ["flag CF: 1 / 0"]


class Forgetful(Interpreter):
    """It makes a mistake at icount 30,000, if it has run since before icount 1,000."""

    def enter(self) -> None:
        super().enter()
        self._began_icount = self._cpu.clock.icount

    def run(self, until_icount: int, *, skip_breakpoint: bool = False, deliver_caught: bool = False) -> Stop:
        clock = self._cpu.clock
        if self._began_icount < 1000 and clock.icount < 30_000 <= until_icount:
            stop = super().run(30_000, skip_breakpoint=skip_breakpoint, deliver_caught=deliver_caught)
            if clock.icount == 30_000:
                self._cpu.state.gpr[EBX] ^= 1
            return stop
        return super().run(until_icount, skip_breakpoint=skip_breakpoint, deliver_caught=deliver_caught)


class TestTheSearch:
    SOURCE = "1: inc eax\njmp 1b"

    def machine(self, stack: ExitStack) -> Machine:
        loading = LoadOptions(ram_bytes=4 << 20, load_address=ORIGIN)
        options = MachineOptions(image=assemble(self.SOURCE, origin=ORIGIN), loading=loading)
        makers: dict[str, EngineFactory] = {
            **engine.factories(),
            "forgetful": lambda machine: Forgetful(machine.cpu, machine.debug),
        }
        return stack.enter_context(closing(Machine(options, makers, "interp")))

    def test_begins_at_a_place_that_was_saved(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        begun = []
        make = Pair._make

        def note(self: Pair, start: Snapshot) -> Sides:
            begun.append(start.icount)
            return make(self, start)

        monkeypatch.setattr(Pair, "_make", note)
        monkeypatch.setattr(lockstep, "SAVE_EVERY_INSNS", 20_000)
        machine = machine_of(stack, "mov ecx, 15000\n1: dec ecx\nnop\njnz 1b\nsbb esi, 7\nhlt")
        plant(monkeypatch, SBB, lambda draft: draft.asm.raw(assemble("sbb esi, 8")))
        divergence = parted(machine, "interp", "bt", 60_000)
        assert divergence.agreed_icount == 1 + 3 * 15_000
        assert begun[0] == 0
        assert begun[1] >= lockstep.SAVE_EVERY_INSNS
        assert set(begun[1:]) == {begun[1]}

    def test_goes_back_to_the_beginning_for_what_does_not_come_from_there(
        self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lockstep, "SAVE_EVERY_INSNS", 10_000)
        divergence = parted(self.machine(stack), "interp", "forgetful", 40_000)
        assert (divergence.agreed_icount, divergence.icount) == (29_999, 30_000)
        assert divergence.is_exact
        assert [str(each) for each in divergence.differences] == ["ebx: 0x0 / 0x1"]

    def test_a_side_that_does_not_come_on(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lockstep, "PATIENCE_RUNS", 3)
        monkeypatch.setattr(Interpreter, "run", lambda *_words, **_others: Stop(StopKind.BUDGET))
        with Pair(self.machine(stack), ("interp", "interp")) as pair, pytest.raises(LockstepError, match="no further"):
            finish(pair, 1000)
