"""Faults in the middle of instructions: which one, with what error code and CR2, and that nothing has changed by then.

Every memory operand is met by pages that are not there or read-only, alone and across two pages, by segments that end
within it, and misaligned with alignment checking on. This host's CPU tells what should happen; what must hold anywhere
is checked as well: registers and memory are as they were, and the instruction then runs as if nothing had been.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
from iced_x86 import OpKind, Register

from machine.faults import PF_PRESENT, PF_USER, PF_WRITE, Vector
from machine.flags import AC, ALWAYS_SET, IF
from tests.machine.instruction_cases import Bits, Case
from tests.machine.instruction_checks import (
    BITS,
    COMPARED,
    check,
    host_vendor,
    one_of_each,
    subject,
)
from tests.machine.instruction_jobs import (
    BASED,
    DATA16,
    DATA32,
    DESTINATION,
    EXPAND_DOWN,
    FRAME,
    MIDDLE,
    OPERAND,
    READ_ONLY,
    SHORT,
    SOURCE,
    STACK,
    STRADDLE,
    WORLDS,
    Layout,
    World,
    build_job,
    has_modrm_memory,
    some_world,
    world,
)
from tests.machine.instruction_subject import differences
from tests.oracles.usermode import (
    ARENA,
    ARENA_BYTES,
    ARENA_PAGES,
    CODE,
    EXECUTE,
    NONE,
    PAGE_BYTES,
    READ,
    WRITE,
    Job,
    Outcome,
    ldt_selector,
    pristine,
)

STACK_POINTERS = frozenset((Register.SP, Register.ESP))
USES_STACK = frozenset(("enter", "iret", "iretd", "retf", "call_far"))


def uses_stack(case: Case) -> bool:
    return case.instruction.is_stack_instruction or case.row.mnemonic in USES_STACK


def uses_operand(case: Case) -> bool:
    return has_modrm_memory(case.instruction) or case.row.mnemonic == "xlatb"


def uses(case: Case, layout: Layout) -> bool:
    """Whether anything of `case` moves when the layout does."""
    usual = Layout()
    return (
        (layout.operand != usual.operand and uses_operand(case))
        or ((layout.source, layout.destination) != (usual.source, usual.destination) and bool(case.row.string))
        or (layout.stack != usual.stack and uses_stack(case))
        or (layout.frame != usual.frame and case.row.mnemonic in ("enter", "leave"))
        or (layout == usual and (uses_operand(case) or case.row.string or uses_stack(case)))
    )


def protect(*pages: tuple[int, int]) -> bytes:
    """Rights for each page of the arena: all, but for those given by linear address."""
    rights = bytearray([WRITE]) * ARENA_PAGES
    for linear, protection in pages:
        rights[(linear - ARENA) // PAGE_BYTES] = protection
    return bytes(rights)


LAYOUTS = {
    "inside": Layout(),
    **{f"operand {n} before the end": Layout(operand=OPERAND + STRADDLE - n) for n in (1, 2, 3, 5)},
    "source across": Layout(source=SOURCE + STRADDLE - 1),
    "destination across": Layout(destination=DESTINATION + STRADDLE - 1),
    "both across": Layout(source=SOURCE + STRADDLE - 1, destination=DESTINATION + STRADDLE - 2),
    **{f"stack {n:+d}": Layout(stack=STACK + STRADDLE + n) for n in (-0x12, -2, -1, 1, 2, 0x12)},
    **{f"frame {n:+d}": Layout(frame=FRAME + STRADDLE + n) for n in (-2, 6)},
}


def check_restart(case: Case, job: Job, seen: Outcome, whole: Outcome) -> list[str]:
    """What a page fault changed though it must not, and how the run differs once every page is there."""
    wrong = []
    if seen.vector != Vector.PF:
        return [f"no page fault but {seen.vector}"]
    repeats = case.instruction.has_rep_prefix or case.instruction.has_repne_prefix
    before = pristine_with(job)
    if not repeats:
        for name, then, now in (
            ("gpr", job.gpr, seen.gpr),
            ("eip", job.eip, seen.eip),
            ("eflags", job.eflags | IF | ALWAYS_SET, seen.eflags),
            ("selectors", job.selectors, seen.selectors),
            ("memory", before, dict(seen.memory)),
        ):
            if then != now:
                wrong.append(f"{name} changed by a fault: {then} to {now}")
    for page in range(ARENA, ARENA + ARENA_BYTES, PAGE_BYTES):
        subject().set_protection(page, WRITE)
    return wrong + differences(whole, subject().go_on(job))


def pristine_with(job: Job) -> dict[int, int]:
    """The arena at the beginning of a job, as far as it differs from the usual."""
    found = {linear + n: byte for linear, data in job.patches.items() for n, byte in enumerate(data)}
    return {linear: byte for linear, byte in found.items() if pristine()[linear - ARENA] != byte}


def missing_pages(bits: Bits, layout: Layout, pages: int) -> Iterator[tuple[Case, Job, Outcome]]:
    """Cases with `pages` of the pages that they touch missing, or one read-only, and the outcome if all are there."""
    cpu = subject()
    for original in one_of_each(bits):
        if not uses(original, layout):
            continue
        chance = random.Random(original.code + repr(layout).encode())
        case, job = build_job(original, chance, some_world(original, chance), layout)
        cpu.forget_touched()
        whole = cpu.run(job)
        touched = cpu.touched()
        choices: list[tuple[tuple[int, int], ...]]
        if pages == 1:
            choices = [((page, NONE),) for page, _ in touched]
            choices += [((page, READ),) for page, written in touched if written]
        else:
            choices = [((a, NONE), (b, NONE)) for (a, _), (b, _) in combinations(touched, 2)]
        for choice in choices:
            yield case, replace(job, protection=protect(*choice)), whole


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_page_that_is_missing_or_read_only(layout: Layout, bits: Bits) -> None:
    work = list(missing_pages(bits, layout, 1))
    wholes = {id(job): whole for _, job, whole in work}
    done = check(
        ((case, job) for case, job, _ in work),
        lambda case, job, seen: check_restart(case, job, seen, wholes[id(job)]),
    )
    assert done


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_of_two_missing_pages_the_first_to_be_touched_is_reported(layout: Layout, bits: Bits) -> None:
    if host_vendor() != "AuthenticAMD":
        pytest.skip(f"the order of accesses was compared with AMD's; this host's CPU is of {host_vendor()}")
    work = list(missing_pages(bits, layout, 2))
    wholes = {id(job): whole for _, job, whole in work}
    check(
        ((case, job) for case, job, _ in work),
        lambda case, job, seen: check_restart(case, job, seen, wholes[id(job)]),
    )


MISALIGNED = {
    **{f"operand {n:+d}": Layout(operand=OPERAND + MIDDLE + n) for n in range(1, 8)},
    **{
        f"source {m:+d} destination {n:+d}": Layout(source=SOURCE + MIDDLE + m, destination=DESTINATION + MIDDLE + n)
        for m, n in ((0, 1), (1, 0), (2, 0), (0, 2), (2, 2))
    },
    **{f"stack {n:+d}": Layout(stack=STACK + MIDDLE + n) for n in (1, 2, 3)},
    **{f"frame {n:+d}": Layout(frame=FRAME + MIDDLE + n) for n in (1, 2)},
    "operand across": Layout(operand=OPERAND + STRADDLE - 2),
    # The old frame where the new one is pushed.
    **{f"frame on the stack {n:+d}": Layout(frame=STACK + MIDDLE + n) for n in (-4, 0, 1, 2, 4)},
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", MISALIGNED.values(), ids=MISALIGNED.keys())
def test_alignment_check_comes_before_page_faults(layout: Layout, bits: Bits) -> None:
    """EFLAGS.AC set and clear, with every page there and with those missing that are touched."""

    def work() -> Iterator[tuple[Case, Job]]:
        for original in one_of_each(bits):
            if uses(original, layout):
                chance = random.Random(original.code + repr(layout).encode())
                case, job = build_job(original, chance, some_world(original, chance), layout)
                yield case, job
                checked = replace(job, eflags=job.eflags | AC)
                yield case, checked
                yield case, replace(checked, protection=bytes([NONE]) * ARENA_PAGES)

    assert check(work())


def _limit_plans(bits: Bits) -> Iterator[tuple[str, World, Layout]]:
    code = WORLDS[bits][-1].selectors[1]
    wide, narrow = ldt_selector(DATA32), ldt_selector(DATA16)
    short, down = ldt_selector(SHORT), ldt_selector(EXPAND_DOWN)
    end = ARENA + 0x2000
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        yield "operand", world("short", code, wide, short), Layout(end - n, end - n, ARENA + 0x1000)
    for n in (0, 1, 2, 3, 4, 7):
        yield "operand", world("short", code, wide, short), Layout(end + n, ARENA + 0x1000, end - n)
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 16, 18, 28, 32, 34):
        yield "stack", world("short stack", code, short, wide), Layout(stack=end - n, frame=end - n)
    for n, stack in ((n, stack) for n in (0, 1, 2, 3, 4, 5, 7, 8, 10, 15, 16, 18, 30, 31) for stack in (short, narrow)):
        yield "stack", world("stack at 0", code, stack, wide), Layout(stack=ARENA + n, frame=ARENA + n)
    for n in (1, 2, 3, 4, 5, 8):
        top = ARENA + 0x1_0000 - n
        yield "stack", world("stack at 64 KiB", code, narrow, wide), Layout(stack=top, frame=top)
    for n in (-4, -3, -2, -1, 0, 1):
        start = ARENA + 0x1800 + n
        yield "operand", world("expand-down", code, wide, down), Layout(start, destination=start)
    for n in (1, 2, 3, 4, 5, 7, 8):
        last = ARENA + 0x1_0000 - n
        yield "operand", world("end of expand-down", code, wide, down), Layout(last, last)
    for n in (0, 2, 4, 8, 9, 16, 18):
        start = ARENA + 0x1800 + n
        yield "stack", world("expand-down stack", code, down, wide), Layout(stack=start, frame=start + 0x100)
    yield "operand", world("read-only", code, wide, ldt_selector(READ_ONLY)), Layout()
    yield "operand", world("null", code, wide, 0), Layout()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", ["operand", "stack"])
def test_segments_that_end_within_an_operand(part: str, bits: Bits) -> None:
    def more(_case: Case, job: Job, seen: Outcome) -> list[str]:
        if seen.vector in (Vector.DB, Vector.BP, Vector.OF):
            return []
        same = (seen.gpr, seen.eip, seen.memory) == (job.gpr, job.eip, pristine_with(job))
        return [] if same else ["something changed before the fault"]

    def work() -> Iterator[tuple[Case, Job]]:
        for plan, (about, surroundings, layout) in enumerate(_limit_plans(bits)):
            for number, case in enumerate(one_of_each(bits)):
                used = uses_stack(case) if about == "stack" else uses_operand(case) or case.row.string
                # A quarter of the plans for each case; neighbours in the opcode map get different ones.
                if about == part and used and (plan + number) % 4 == 0:
                    chance = random.Random(case.code + bytes([plan]))
                    yield build_job(case, chance, surroundings, layout)

    assert check(work(), more) > 500


@pytest.mark.parametrize("bits", BITS)
def test_an_instruction_that_runs_into_a_page_which_is_missing(bits: Bits) -> None:
    """Wherever the page ends within it; if it ends with the page, the next page is not asked for."""

    def work() -> Iterator[tuple[Case, Job]]:
        for original in one_of_each(bits):
            if original.row.mnemonic in ("ud0", "ud1"):
                continue  # to AMD they have no ModRM byte
            chance = random.Random(original.code)
            surroundings = some_world(original, chance)
            case, job = build_job(original, chance, surroundings, Layout())
            for before in range(1, len(case.code) + 1):
                linear = CODE + PAGE_BYTES - before
                yield (
                    case,
                    replace(
                        job,
                        eip=linear - surroundings.code_base,
                        code_linear=linear,
                        code_protection=bytes([EXECUTE, NONE]),
                    ),
                )

    assert check(work()) > 2000


# What an instruction with a ModRM operand in memory does to it. A read-modify-write asks for the right to write at
# once, and CMPXCHG writes whether the comparison holds or not; measured, and so in the SDM where that speaks of it.
NOT_TOUCHED = frozenset(("nop", "lea", "ud0", "ud1", "invlpg", "lldt", "ltr", "lgdt", "lidt", "lmsw"))
ONLY_READ = frozenset(
    (
        "cmp", "test", "bt", "imul", "mul", "div", "idiv", "movzx", "movsx", "mov_to_sreg", "push", "call", "jmp",
        "jmp_far", "call_far", "bound", "les", "lds", "lss", "lfs", "lgs", "lar", "lsl", "verr", "verw", "arpl",
        "bsf", "bsr", *(mnemonic for mnemonic in COMPARED if mnemonic.startswith("cmov")),
    )
)  # fmt: skip
WRITTEN_AS_DESTINATION = frozenset(
    (
        "mov", "add", "or", "adc", "sbb", "and", "sub", "xor", "not", "neg", "inc", "dec", "rol", "ror", "rcl", "rcr",
        "shl", "sal", "shr", "sar", "shld", "shrd", "bts", "btr", "btc", "xchg", "xadd", "cmpxchg", "cmpxchg8b",
        "mov_from_sreg", "pop", *(mnemonic for mnemonic in COMPARED if mnemonic.startswith("set")),
    )
)  # fmt: skip


def is_written(case: Case) -> bool | None:
    """Whether the operand is written or only read; None if it is not touched, or not by a user."""
    mnemonic = case.row.mnemonic
    if mnemonic in NOT_TOUCHED:
        return None
    if mnemonic in WRITTEN_AS_DESTINATION:
        return case.instruction.op0_kind == OpKind.MEMORY
    assert mnemonic in ONLY_READ, mnemonic
    return False


@pytest.mark.parametrize("bits", BITS)
def test_error_codes_by_what_is_done_to_the_operand(bits: Bits) -> None:
    """The same on every host: W is set for any read-modify-write, whatever the operands are."""
    wrong: list[str] = []
    checked = 0
    for original in one_of_each(bits):
        if not has_modrm_memory(original.instruction):
            continue
        chance = random.Random(original.code)
        surroundings = BASED if bits == 32 else WORLDS[16][0]
        case, job = build_job(original, chance, surroundings, Layout())
        written = is_written(case)
        for protection, present in ((NONE, 0), (READ, PF_PRESENT)):
            # What uses the stack must find it; all else may find no page at all.
            pages = protect((OPERAND, protection)) if uses_stack(case) else bytes([protection]) * ARENA_PAGES
            seen = subject().run(replace(job, protection=pages))
            if present and case.row.mnemonic == "arpl":
                continue  # it writes if it must
            if seen.vector in (Vector.GP, Vector.SS) or case.instruction.memory_base in STACK_POINTERS:
                continue  # an index of BT beyond the segment; an operand on the stack
            allowed = written is None or (present and not written)
            expected = None if allowed else PF_USER | present | (PF_WRITE if written else 0)
            fault = seen.error_code if seen.vector == Vector.PF else None
            checked += 1
            if fault != expected:
                wrong.append(f"{case}: {fault}, expected {expected}")
    assert not wrong, "\n".join(wrong[:10])
    assert checked > 500
