"""Translation units: where they end, what they charge, how they leave, and which host code stands for what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iced_x86 import Code, Decoder, FlowControl, Instruction, OpKind, Register

from machine.state import FS, GS, SHADOW_STI
from tests.machine.instruction_cases import by_mnemonic
from tests.oracles.assembler import assemble
from vmm.native import translator
from vmm.native.cache import Exit, TranslationCache
from vmm.native.ident import IDENT
from vmm.native.modes import Mode
from vmm.native.stateblock import OFFSETS
from vmm.native.translator import EMITTERS, MAX_TU_INSTRUCTIONS, NARROW_EMITTERS, translate
from vmm.native.unit import Unit

EIP = 0x1000
KERNEL, USER = Mode(user=False), Mode(user=True)


@pytest.fixture(scope="module")
def tc() -> Iterator[TranslationCache]:
    made = TranslationCache()
    made.place(b"\x90" * 100)
    yield made
    made.close()


def unit_of(tc: TranslationCache, source: str, *, stops: Sequence[int] = (), mode: Mode = KERNEL) -> Unit:
    code = assemble(source, origin=EIP).ljust(4096, b"\x90")
    return translate(tc, mode, EIP, code, frozenset(stops))


def host_instructions(tc: TranslationCache, unit: Unit) -> list[Instruction]:
    return list(Decoder(64, unit.code, ip=tc.host + tc.position))


def listing(tc: TranslationCache, unit: Unit, index: int) -> list[str]:
    """The host code of one guest instruction, links named by where their stubs go."""
    start = tc.host + tc.position + unit.hosts[index]
    end = tc.host + tc.position + (unit.hosts[index + 1] if index + 1 < len(unit.hosts) else len(unit.code))
    names = {tc.host + offset: exit_.name for exit_, offset in tc.exits.items()}
    lines: list[str] = []
    for instruction in host_instructions(tc, unit):
        if not start <= instruction.ip < end or (lines and lines[-1] == "jmp LINK"):
            continue
        text = str(instruction)
        if instruction.op0_kind == OpKind.NEAR_BRANCH64:
            target = instruction.near_branch_target
            mnemonic = text.partition(" ")[0]
            text = f"{mnemonic} {names[target] if target in names else f'+{target - start:x}'}"
        lines.append(text)
    return lines


def charge(unit: Unit) -> int:
    """What the first host instruction takes off the budget."""
    first = next(iter(Decoder(64, unit.code)))
    assert (first.code, first.op0_register, first.memory_base) == (Code.LEA_R64_M, Register.R10, Register.R10)
    return -(first.memory_displacement - (first.memory_displacement >> 63 << 64))


class TestEnds:
    def test_at_32_instructions(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "inc eax\n" * 40)
        assert MAX_TU_INSTRUCTIONS == 32
        assert (unit.charged, unit.end_eip, len(unit.hosts)) == (32, EIP + 32, 32)
        assert unit.eips == tuple(range(EIP, EIP + 32))

    @pytest.mark.parametrize("branch", ["jmp 1f", "call 1f", "ret", "jmp eax", "call [eax]"])
    def test_at_a_control_transfer(self, tc: TranslationCache, branch: str) -> None:
        unit = unit_of(tc, f"inc eax\ninc ecx\n{branch}\n1: inc edx")
        assert unit.charged == len(unit.hosts) == 3
        assert unit.end_eip == EIP + len(assemble(f"inc eax\ninc ecx\n{branch}\n1: inc edx", origin=EIP)) - 1

    @pytest.mark.parametrize("callout", ["hlt", "int 3", "mov cr4, eax", "insb", "ud2", "data16 lret"])
    def test_before_a_callout(self, tc: TranslationCache, callout: str) -> None:
        unit = unit_of(tc, f"inc eax\ninc ecx\n{callout}\ninc edx")
        assert (unit.charged, unit.end_eip, unit.eips) == (2, EIP + 2, (EIP, EIP + 1, EIP + 2))

    @pytest.mark.parametrize("source", ["cli", "sti", "mov eax, cr2", "invlpg [eax]", "sysexit", "rdtsc"])
    def test_before_what_ring_3_may_not_or_not_always(self, tc: TranslationCache, source: str) -> None:
        assert unit_of(tc, source, mode=USER).charged == 0
        assert unit_of(tc, source, mode=KERNEL).charged > 0

    @pytest.mark.parametrize("source", ["popfd", "mov ds, eax", "pop gs", "int 0x80", "iretd", "sysenter"])
    def test_behind_what_a_routine_does(self, tc: TranslationCache, source: str) -> None:
        assert unit_of(tc, f"inc eax\n{source}\ninc edx").charged == 2

    def test_what_is_in_the_shadow_of_sti_stays_with_it(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "inc eax\n" * 31 + "sti\ninc ecx\ninc edx")
        assert (unit.charged, unit.shadows) == (33, {32: SHADOW_STI})
        unit = unit_of(tc, "sti\nhlt")
        assert (unit.charged, unit.shadows) == (1, {1: SHADOW_STI})
        lines = listing(tc, unit, 1)
        assert lines[0].startswith("mov dword ptr [r15")
        assert lines[1:] == [f"mov r8d,{EIP + 1:X}h", "jmp CALLOUT"]

    def test_at_the_end_of_the_page(self, tc: TranslationCache) -> None:
        unit = translate(tc, KERNEL, 0x1FFE, b"\x40\x41")
        assert (unit.charged, unit.end_eip) == (2, 0x2000)
        assert listing(tc, unit, 1)[1:] == ["mov r8d,2000h", "mov r9d,[r14+r8*4]", "lea r9,[r13+r9]", "jmp r9"]

    @pytest.mark.parametrize("data", [b"\x40\x83", b"\x40\xe8\x00", b"\x40\x66\x66"])
    def test_before_an_instruction_across_the_end_of_the_page(self, tc: TranslationCache, data: bytes) -> None:
        unit = translate(tc, KERNEL, 0x2000 - len(data), data)
        assert (unit.charged, unit.end_eip) == (1, 0x2001 - len(data))
        assert listing(tc, unit, 0)[-1] == "jmp LINK"

    @pytest.mark.parametrize("data", [b"\x83", b"\xe8\x00", b"\x66\x66"])
    def test_an_instruction_across_the_end_of_the_page(self, tc: TranslationCache, data: bytes) -> None:
        """It is a TU by itself, if the bytes of the next page are known."""
        unit = translate(tc, KERNEL, 0x2000 - len(data), data)
        assert not unit.charged
        assert listing(tc, unit, 0)[-1] == "jmp CALLOUT"
        unit = translate(tc, KERNEL, 0x2000 - len(data), data, beyond=b"\xc0\x07\x00\x00")
        assert unit.charged == 1
        assert unit.straddles
        assert 0x2000 < unit.end_eip <= 0x2003

    def test_before_the_instruction_that_ends_at_4_gib(self, tc: TranslationCache) -> None:
        unit = translate(tc, KERNEL, 0xFFFF_FFFE, b"\x40\x41")
        assert (unit.charged, unit.end_eip) == (1, 0xFFFF_FFFF)

    @pytest.mark.parametrize("stop", [0, 1, 3])
    def test_before_a_breakpoint(self, tc: TranslationCache, stop: int) -> None:
        unit = unit_of(tc, "inc eax\n" * 8, stops=[EIP + stop, EIP + 6])
        assert (unit.charged, unit.end_eip) == (stop, EIP + stop)
        assert listing(tc, unit, stop) == [f"mov r8d,{EIP + stop:X}h", "jmp CALLOUT"]


class TestBudget:
    def test_it_is_charged_first_and_checked_without_flags(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "inc eax\nadd ecx, eax\nhlt")
        head = [str(instruction) for instruction in host_instructions(tc, unit)[:3]]
        assert head == ["lea r10,[r10-2]", "sarx r9,r10,r11", "movzx r9d,byte ptr [r11+r9-3Fh]"]
        assert charge(unit) == unit.charged == 2

    def test_a_callout_in_the_middle_gives_back_what_did_not_retire(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "inc eax\ninc ecx\nrep movsb\ninc edx\ninc ebx\nhlt")
        assert charge(unit) == 5
        lines = listing(tc, unit, 2)
        at = lines.index("jmp CALLOUT")
        assert lines[at - 2 : at] == ["lea r10,[r10+3]", f"mov r8d,{EIP + 2:X}h"]


class TestForms:
    @pytest.mark.parametrize(
        ("source", "lines"),
        [
            ("push ebx", ["mov gs:[r12d-4],ebx", "lea r12d,[r12d-4]"]),
            ("push esp", ["mov gs:[r12d-4],r12d", "lea r12d,[r12d-4]"]),
            ("push 0x1234", ["mov dword ptr gs:[r12d-4],1234h", "lea r12d,[r12d-4]"]),
            ("push -2", ["mov dword ptr gs:[r12d-4],0FFFFFFFEh", "lea r12d,[r12d-4]"]),
            ("push dword ptr [esp+8]", ["mov r8d,gs:[r12d+8]", "mov gs:[r12d-4],r8d", "lea r12d,[r12d-4]"]),
            ("pop ebx", ["mov ebx,gs:[r12d]", "lea r12d,[r12d+4]"]),
            ("pop esp", ["mov r12d,gs:[r12d]"]),
            ("leave", ["mov r8d,gs:[ebp]", "lea r12d,[ebp+4]", "mov ebp,r8d"]),
            ("pause", []),
            ("nop", []),
        ],
    )
    def test_of_the_stack(self, tc: TranslationCache, source: str, lines: list[str]) -> None:
        assert listing(tc, unit_of(tc, f"{source}\nhlt"), 0) == lines

    @pytest.mark.parametrize("source", ["pop ss", "enter 8, 0", "pop word ptr [esp]"])
    def test_that_the_stack_has_not(self, tc: TranslationCache, source: str) -> None:
        assert unit_of(tc, source).charged == 0

    def test_both_ends_of_pushad_come_first(self, tc: TranslationCache) -> None:
        lines = listing(tc, unit_of(tc, "pushad"), 0)
        assert lines[:3] == ["not dword ptr gs:[r12d-4]", "not dword ptr gs:[r12d-4]", "mov gs:[r12d-20h],edi"]
        assert listing(tc, unit_of(tc, "popad"), 0)[:3] == [
            "mov r8d,gs:[r12d]",
            "mov r8d,gs:[r12d+1Ch]",
            "mov edi,gs:[r12d]",
        ]

    def test_of_a_return(self, tc: TranslationCache) -> None:
        body = ["mov r9d,[r14+r8*4]", "lea r9,[r13+r9]", "mov [rsp],r9", "ret"]
        assert listing(tc, unit_of(tc, "ret"), 0) == ["mov r8d,gs:[r12d]", "lea r12d,[r12d+4]", *body]
        assert listing(tc, unit_of(tc, "ret 0x20"), 0) == ["mov r8d,gs:[r12d]", "lea r12d,[r12d+24h]", *body]

    def test_of_branches_in_the_page_and_out_of_it(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "jz 1f\nnop\n1: hlt")
        assert listing(tc, unit, 0)[0].startswith("je +")
        assert listing(tc, unit, 1) == []
        lines = listing(tc, unit_of(tc, "jz 0x9000\nhlt"), 0)
        assert lines[1:] == ["lea r10,[r10]", "mov r8d,9000h", "mov r9d,[r14+r8*4]", "lea r9,[r13+r9]", "jmp r9"]

    @pytest.mark.parametrize(
        ("source", "read"),
        [("jmp ecx", "mov r8d,ecx"), ("jmp esp", "mov r8d,r12d"), ("jmp [esp+4]", "mov r8d,gs:[r12d+4]")],
    )
    def test_of_indirect_jumps(self, tc: TranslationCache, source: str, read: str) -> None:
        lines = listing(tc, unit_of(tc, source), 0)
        assert lines == [read, "mov r9d,[r14+r8*4]", "lea r9,[r13+r9]", "jmp r9"]

    def test_of_calls(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "call [esp]")
        lines = listing(tc, unit, 0)
        assert lines[:6] == [
            "mov r8d,gs:[r12d]", f"mov dword ptr gs:[r12d-4],{EIP + 3:X}h", "lea r12d,[r12d-4]",
            "mov r9d,[r14+r8*4]", "lea r9,[r13+r9]", "call r9",
        ]  # fmt: skip
        assert [eip for _, eip in unit.landings] == [EIP + 3]

    def test_the_landing_of_a_call_follows_it(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "inc eax\ncall 1f\nnop\n1: ret")
        ((offset, eip),) = unit.landings
        assert eip == EIP + 6
        call = next(i for i in host_instructions(tc, unit) if i.flow_control == FlowControl.CALL)
        assert call.next_ip == tc.host + tc.position + offset

    @pytest.mark.parametrize("source", ["data16 ljmp 8:0", "data16 lret", "data16 lcall [eax]"])
    def test_that_branches_have_not(self, tc: TranslationCache, source: str) -> None:
        assert unit_of(tc, source).charged == 0

    @pytest.mark.parametrize("prefix", ["es", "ss", "ds"])
    def test_flat_segments_are_the_window(self, tc: TranslationCache, prefix: str) -> None:
        assert listing(tc, unit_of(tc, f"mov eax, {prefix}:[ecx]\nhlt"), 0) == ["mov eax,gs:[ecx]"]

    @pytest.mark.parametrize("prefix", ["fs", "gs"])
    def test_base_and_limit_of_other_segments_are_looked_up(self, tc: TranslationCache, prefix: str) -> None:
        number = {"fs": FS, "gs": GS}[prefix]
        bound = OFFSETS["segment_bounds"] + 16 * number
        lines = listing(tc, unit_of(tc, f"mov eax, {prefix}:[ecx+8]\nhlt"), 0)
        assert [line.replace("+0", "+") for line in lines] == [
            "lea r8d,[ecx+8]", f"mov r9,[r15+{bound:X}h]", "lea r9,[r9+r8+3]", "not r9", "sarx r9,r9,r11",
            "movzx r9d,byte ptr [r11+r9-3Fh]", f"mov r9d,[r15+{OFFSETS['segment_bases'] + 4 * number:X}h]",
            "lea r8d,[r8+r9]", "mov eax,gs:[r8d]",
        ]  # fmt: skip
        lines = listing(tc, unit_of(tc, f"inc dword ptr {prefix}:[ecx]\nhlt"), 0)
        assert f"mov r9,[r15+{bound + 8:X}h]" in [line.replace("+0", "+") for line in lines]
        for source in ("push dword ptr {}:[ecx]", "jmp {}:[ecx]", "pop dword ptr {}:[ecx]", "mov {}:[ecx], ds"):
            assert unit_of(tc, source.format(prefix)).charged

    def test_code_is_read_but_not_written(self, tc: TranslationCache) -> None:
        assert listing(tc, unit_of(tc, "mov eax, cs:[ecx]\nhlt"), 0) == ["mov eax,gs:[ecx]"]
        assert unit_of(tc, "mov cs:[ecx], eax").charged == 0
        assert unit_of(tc, "mov eax, cs:[ecx]", mode=replace(KERNEL, flat=0)).charged

    def test_an_address_of_16_bits_is_cut(self, tc: TranslationCache) -> None:
        assert listing(tc, unit_of(tc, "mov eax, [bx+si-2]\nhlt"), 0) == [
            "lea r8d,[ebx+esi-2]", "movzx r8d,r8w", "mov eax,gs:[r8d]"
        ]  # fmt: skip


class TestLinks:
    def test_a_link_names_the_place_to_be_patched(self, tc: TranslationCache) -> None:
        """Each stub loads the guest address, and the offset in the TC of the rel32 that led to it."""
        unit = unit_of(tc, "inc eax\njmp 1f\nnop\n1:")
        instructions = {instruction.ip: instruction for instruction in host_instructions(tc, unit)}
        branches = [i for i in instructions.values() if i.near_branch_target in instructions]
        assert len(branches) == 1
        targets = set()
        for branch in branches:
            load = instructions[branch.near_branch_target]
            place = instructions[load.next_ip]
            leave = instructions[place.next_ip]
            assert (load.op0_register, place.op0_register) == (Register.R8D, Register.R9D)
            assert leave.near_branch_target == tc.host + tc.exits[Exit.LINK]
            assert place.immediate(1) == branch.next_ip - 4 - tc.host
            targets.add(load.immediate(1))
        assert targets == {EIP + 4}

    def test_a_way_out_gives_back_what_does_not_retire(self, tc: TranslationCache) -> None:
        """Jcc goes forward to a refund, from which a link leads on."""
        unit = unit_of(tc, "inc eax\njz 1f\nnop\nnop\nret\n1:")
        assert charge(unit) == unit.charged == 5
        instructions = {instruction.ip: instruction for instruction in host_instructions(tc, unit)}
        branch = next(i for i in instructions.values() if i.flow_control == FlowControl.CONDITIONAL_BRANCH)
        refund = instructions[branch.near_branch_target]
        assert str(refund) == "lea r10,[r10+3]"
        load = instructions[instructions[refund.next_ip].near_branch_target]
        assert str(load) == f"mov r8d,{EIP + 6:X}h"

    def test_the_last_instruction_has_nothing_to_give_back(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "inc eax\n" * 31 + "jz 1f\nnop\n1:")
        instructions = {instruction.ip: instruction for instruction in host_instructions(tc, unit)}
        branch = next(i for i in instructions.values() if i.flow_control == FlowControl.CONDITIONAL_BRANCH)
        assert str(instructions[branch.near_branch_target]) == f"mov r8d,{EIP + 34:X}h"

    @pytest.mark.parametrize(("insns", "rounds"), [(2, 16), (3, 10), (10, 3), (16, 2), (17, 1)])
    def test_a_loop_that_is_the_unit_is_unrolled(self, tc: TranslationCache, insns: int, rounds: int) -> None:
        """All rounds but the last leave by the opposite condition; the last goes back to the start by a link."""
        unit = unit_of(tc, "1:" + "inc eax\n" * (insns - 1) + "jnz 1b\nhlt")
        conditions = [
            str(instruction).split()[0]
            for instruction in host_instructions(tc, unit)
            if instruction.flow_control == FlowControl.CONDITIONAL_BRANCH
        ]
        assert conditions == ["je"] * (rounds - 1) + ["jne"]
        assert unit.eips[insns : 2 * insns] == unit.eips[:insns] or rounds == 1
        assert unit.end_eip == EIP + insns + 1
        if insns * rounds < MAX_TU_INSTRUCTIONS:
            assert unit.eips[insns * rounds] == EIP + insns + 1

    def test_a_loop_is_not_unrolled_over_a_breakpoint(self, tc: TranslationCache) -> None:
        unit = unit_of(tc, "1: inc eax\njnz 1b\nhlt", stops=[EIP + 1])
        assert (unit.charged, unit.eips) == (1, (EIP, EIP + 1))

    def test_a_loop_to_itself_is_a_link(self, tc: TranslationCache) -> None:
        assert listing(tc, unit_of(tc, "jmp ."), 0)[0].startswith("jmp +")


def test_what_has_no_emitter_is_a_callout(tc: TranslationCache) -> None:
    for name, found in by_mnemonic(32).items():
        if name not in IDENT and name not in EMITTERS and name not in NARROW_EMITTERS:
            for case in found[::8]:
                assert translate(tc, KERNEL, EIP, case.code.ljust(32, b"\x90")).charged == 0, str(case)


SEGMENTS = tuple(
    Mode(user=False, flat=0, code_base=base, code_limit=limit, is_narrow=True, has_narrow_stack=True)
    for base, limit in ((0, 0xFFFF), (0x12_3000, 0x7FFF), (0xFFFF_0000, 0xFFFF))
)


def test_computations_are_the_same_in_every_segment(tc: TranslationCache) -> None:
    """So what they were translated to is kept for all of them together."""
    for name, found in by_mnemonic(16).items():
        for case in found[::8] if name in IDENT else ():
            codes = set()
            for mode in SEGMENTS:
                translator._known.cache_clear()
                codes.add(translate(tc, mode, EIP, case.code).code)
            assert len(codes) == 1, str(case)
    assert translator._known.cache_info().currsize == 1
    for mode in SEGMENTS:
        translate(tc, mode, EIP, b"\x40")
    assert translator._known.cache_info().currsize == 1


_ALLOWED_FLOWS = frozenset({
    FlowControl.NEXT, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH,
    FlowControl.CALL, FlowControl.INDIRECT_CALL, FlowControl.RETURN,
})  # fmt: skip


@given(st.binary(min_size=1, max_size=40).filter(lambda data: 0x82 not in data))  # SIGILL on the host
@settings(max_examples=300)
def test_no_bytes_of_a_guest_become_more_than_host_code_of_ours(tc: TranslationCache, data: bytes) -> None:
    """Nothing privileged or unknown, no system call, and no direct branch but to an exit or into the unit."""
    unit = translate(tc, KERNEL, EIP, data)
    instructions = host_instructions(tc, unit)
    starts = {instruction.ip for instruction in instructions}
    exits = {tc.host + offset for offset in (*tc.exits.values(), *tc.routines.values())}
    for instruction in instructions:
        assert not instruction.is_invalid, data.hex()
        assert not instruction.is_privileged, data.hex()
        assert instruction.flow_control in _ALLOWED_FLOWS, data.hex()
        if instruction.op0_kind in (OpKind.NEAR_BRANCH64, OpKind.NEAR_BRANCH32):
            assert instruction.near_branch_target in starts | exits, data.hex()
        if instruction.memory_base == Register.RIP:
            pytest.fail(f"relative to RIP: {data.hex()}")
    assert len(unit.hosts) == len(unit.eips) >= unit.charged
    assert list(unit.hosts) == sorted(unit.hosts)
