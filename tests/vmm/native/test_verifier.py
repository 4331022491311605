"""The verifier: it lets through what the translator emits, and refuses what could escape.

What it accepts of mutated code is judged by another decoder, which knows of implicit operands.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from iced_x86 import (
    Code,
    CodeSize,
    Decoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    UsedMemory,
)

from tests.machine.instruction_cases import by_mnemonic
from tests.oracles.assembler import assemble
from tests.vmm.bare import flat
from tests.vmm.native.test_translator import EIP, KERNEL, unit_of
from vmm.bt import BinaryTranslator
from vmm.native.cache import Exit, TranslationCache
from vmm.native.modes import Mode
from vmm.native.stateblock import OFFSETS, STATE_BYTES
from vmm.native.strings import LIMIT_LOG2
from vmm.native.translator import translate
from vmm.native.unit import Unit
from vmm.native.verifier import Verifier, VerifierError

SOURCES = (
    "inc eax\nadd ecx, [eax+4*edx]\npush esp\npop esp\njz 1f\nnop\n1: ret",
    "mov al, [0x1234]\nxchg esp, eax\ncmpxchg8b [esi]\nshld eax, ecx, cl\nmul dword ptr [esp]\nleave\nret 8",
    "rep movsd\nscasb\nrepne scasb\nlodsw",
    "rep stosw\nrepe cmpsd\nmovsb",
    "jecxz 1f\ninc ax\n1: loop 1b",
    "call 1f\ninc eax\n1: hlt",
    "call 0x9000",
    "call [eax+8]",
    "pushfd\nrdtsc\nmov edx, cr0\ncli\npushad",
    "popfd",
    "mov ds, eax",
    "int 0x80",
    "fld qword ptr [eax]\nfstp st(1)\nmovsd xmm0, [ecx]\npaddd mm0, [edx]\ncvttss2si eax, xmm1",
    "jmp ecx",
    "jnz 0x9000",
    "sub esp, 16\nmov [esp+4], eax\nmovzx eax, byte ptr [edi]\nbswap edx\nsete cl\ncmovb eax, [ebx]",
)
SOFT_SOURCES = (
    "add [eax+4*edx], ecx\nmov esp, [esp+8]\nmov fs:[ecx], dh",
    "cmpxchg8b [esi]\nmov eax, [0x1234]\nimul edx, [ebp], 5",
    "shld [eax], ecx, cl\nnot word ptr [eax]\nsetc byte ptr [edi]",
)
FLIPS_PER_UNIT = 250
# R8 = a place in the view of RAM
IN_RAM = f"mov r9d, r9d\nmov r8, [r15+{OFFSETS['ram_view']}]\nlea r8, [r8+r9]"

_INFO = InstructionInfoFactory()
_GUEST = frozenset((Register.RAX, Register.RCX, Register.RDX, Register.RBX, Register.RBP, Register.RSI, Register.RDI,
                    Register.R12, Register.R8, Register.R9))  # fmt: skip
_READS = (OpAccess.READ, OpAccess.COND_READ, OpAccess.NONE)
_LIES = frozenset({
    Mnemonic.CPUID, Mnemonic.RDTSC, Mnemonic.RDTSCP, Mnemonic.RDPMC, Mnemonic.RDRAND, Mnemonic.RDSEED, Mnemonic.XGETBV,
    Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT, Mnemonic.STR, Mnemonic.SMSW, Mnemonic.LAR, Mnemonic.LSL, Mnemonic.VERR,
    Mnemonic.VERW, Mnemonic.PUSHFQ, Mnemonic.POPFQ, Mnemonic.RDFSBASE, Mnemonic.RDGSBASE, Mnemonic.WRFSBASE,
    Mnemonic.WRGSBASE, Mnemonic.RDPID, Mnemonic.RDPKRU, Mnemonic.WRPKRU, Mnemonic.FXSAVE, Mnemonic.FXRSTOR,
})  # fmt: skip
_FLOWS = frozenset({
    FlowControl.NEXT, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH, FlowControl.CALL,
})  # fmt: skip
_STRINGS = frozenset({
    Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.STOSB,
    Mnemonic.STOSW, Mnemonic.STOSD, Mnemonic.LODSB, Mnemonic.LODSW, Mnemonic.LODSD, Mnemonic.SCASB, Mnemonic.SCASW,
    Mnemonic.SCASD,
})  # fmt: skip
_VIEW_OFFSET = f"{OFFSETS['ram_view']:X}h"
_LOAD_VIEW = f"mov r8,[r15+{'0' * _VIEW_OFFSET[0].isalpha()}{_VIEW_OFFSET}]"
# What belongs to the engine, in so many words: whatever else touches its registers is an escape.
_OURS = frozenset({
    "sarx r9,r10,r11", "movzx r9d,byte ptr [r11+r9-3Fh]", "mov r9d,[r14+r8*4]", "lea r9,[r13+r9]", "jmp r9", "call r9",
    "mov [rsp],r9", "ret", "lea rsi,[r8+rsi]", "lea rdi,[r8+rdi]", f"mov r8,[r15+{OFFSETS['window']:X}h]",
    "pushfq", "pop r8", _LOAD_VIEW, "lea r8,[r8+r9]",
})  # fmt: skip
# What a place in the view of RAM is made by, directly behind an instruction that writes all of R9D.
_PLACE = [_LOAD_VIEW, "lea r8,[r8+r9]"]
_FULL_WRITERS = frozenset({Mnemonic.MOV, Mnemonic.OR, Mnemonic.LEA, Mnemonic.MOVZX, Mnemonic.ADD, Mnemonic.XOR})


@pytest.fixture(scope="module")
def tc() -> Iterator[TranslationCache]:
    made = TranslationCache()
    yield made
    made.close()


@pytest.fixture
def verifier(tc: TranslationCache) -> Verifier:
    return Verifier(tc)


def unit_with(tc: TranslationCache, host: str | bytes) -> Unit:
    """A unit for `inc eax; hlt` with host code in place of the increment."""
    unit = unit_of(tc, "inc eax\nhlt")
    start, end = unit.hosts
    code = assemble(host, bits=64) if isinstance(host, str) else host
    hosts = (start, start + len(code))
    shift = len(code) - (end - start)
    tail = bytearray(unit.code[end:])
    # The one direct branch of the tail, to the exit for callouts.
    tail[-4:] = (int.from_bytes(tail[-4:], "little", signed=True) - shift).to_bytes(4, "little", signed=True)
    return replace(unit, code=unit.code[:start] + code + bytes(tail), hosts=hosts)


def soft_unit_of(tc: TranslationCache, source: str, *, user: bool = False) -> Unit:
    """A unit in which each instruction that can has a soft form."""
    code = assemble(source, origin=EIP).ljust(64, b"\xf4")
    return translate(tc, Mode(user=user), EIP, code, soft=frozenset(range(EIP, EIP + 64)))


def escapes(tc: TranslationCache, code: bytes) -> str | None:
    """Why code at the next free position could harm the host, by a judge with other eyes; None if it could not."""
    origin = tc.host + tc.position
    instructions = list(Decoder(64, code, ip=origin))
    starts = {instruction.ip for instruction in instructions}
    exits = {tc.host + offset for offset in (*tc.exits.values(), *tc.routines.values())}
    latest: list[tuple[str, bool]] = []  # instructions, and whether each leaves R9 below 2**32
    is_place = False  # R8 is one in the view of RAM
    for instruction in instructions:
        text = str(instruction)
        is_low = instruction.op0_register == Register.R9D and instruction.mnemonic in _FULL_WRITERS
        latest = [*latest[-2:], (text, is_low)]
        if text in _OURS:
            is_place = len(latest) == 3 and latest[0][1] and [latest[1][0], latest[2][0]] == _PLACE
            continue
        if instruction.is_invalid or instruction.is_privileged or instruction.mnemonic in _LIES:
            return text
        if instruction.flow_control not in _FLOWS:
            return text
        if instruction.op0_kind in (OpKind.NEAR_BRANCH64, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH16):
            if instruction.near_branch_target not in starts | exits or instruction.op0_kind == OpKind.NEAR_BRANCH16:
                return text
            continue
        info = _INFO.info(instruction)
        for used in info.used_registers():
            if used.access in _READS:
                continue
            full = RegisterExt.full_register(used.register)
            is_budget = full == Register.R10 and instruction.code == Code.LEA_R64_M
            is_segment = RegisterExt.is_segment_register(used.register)
            if is_segment or (full not in _GUEST and not is_budget and RegisterExt.is_gpr(used.register)):
                return text
        for memory in info.used_memory():
            if not (_is_allowed(memory, instruction) or (is_place and _is_in_ram(memory, instruction))):
                return text
        is_place = is_place and not any(
            RegisterExt.full_register(used.register) == Register.R8 and used.access not in _READS
            for used in info.used_registers()
        )
    return None


def _is_allowed(memory: UsedMemory, instruction: Instruction) -> bool:
    base, index, segment = int(memory.base), int(memory.index), int(memory.segment)
    if instruction.mnemonic in _STRINGS and base in (Register.RSI, Register.RDI):
        return True
    if base == Register.R15:
        return index == Register.NONE and segment != Register.GS and memory.displacement < STATE_BYTES
    return segment == Register.GS and memory.address_size == CodeSize.CODE32


def _is_in_ram(memory: UsedMemory, instruction: Instruction) -> bool:
    size_bytes = MemorySizeExt.size(instruction.memory_size)
    return (memory.base, memory.index, memory.displacement) == (Register.R8, Register.NONE, 0) and (
        memory.segment == Register.DS and memory.address_size == CodeSize.CODE64 and size_bytes <= 8
    )


class TestWhatIsEmitted:
    @pytest.mark.parametrize("source", SOURCES)
    def test_it_passes(self, tc: TranslationCache, verifier: Verifier, source: str) -> None:
        unit = unit_of(tc, source)
        verifier.check_unit(unit)
        assert escapes(tc, unit.code) is None

    @pytest.mark.parametrize("source", SOFT_SOURCES)
    @pytest.mark.parametrize("user", [False, True])
    def test_soft_forms_pass(self, tc: TranslationCache, verifier: Verifier, source: str, user: bool) -> None:
        unit = soft_unit_of(tc, source, user=user)
        assert unit.code.count(b"\x4f\x8d\x04\x08") == 3  # lea r8, [r8+r9]
        verifier.check_unit(unit)
        assert escapes(tc, unit.code) is None

    def test_every_row_passes_in_a_soft_form(self, tc: TranslationCache, verifier: Verifier) -> None:
        for found in by_mnemonic(32).values():
            for case in found[::3]:
                verifier.check_unit(translate(tc, KERNEL, EIP, case.code.ljust(64, b"\x90"), soft=frozenset({EIP})))

    def test_every_row_of_the_table_passes(self, tc: TranslationCache, verifier: Verifier) -> None:
        for found in by_mnemonic(32).values():
            for case in found[::5]:
                verifier.check_unit(translate(tc, KERNEL, EIP, case.code.ljust(64, b"\x90")))

    def test_the_stubs_pass(self, verifier: Verifier) -> None:
        verifier.check_stubs()


class TestGuestBytesPassedThrough:
    def test_they_are_refused_unless_they_are_harmless(self, tc: TranslationCache, verifier: Verifier) -> None:
        """Every form of the instruction table, unchanged."""
        accepted = refused = 0
        for found in by_mnemonic(32).values():
            for case in found[::2]:
                unit = unit_with(tc, case.code)
                try:
                    verifier.check_unit(unit)
                except VerifierError:
                    refused += 1
                else:
                    accepted += 1
                    assert escapes(tc, unit.code) is None, str(case)
        assert refused > accepted > 50

    @pytest.mark.parametrize("name", ["sgdt", "sidt", "sldt", "str", "smsw", "lar", "lsl", "verr", "verw", "pushf",
        "pushfd", "popf", "popfd", "cpuid", "rdtsc", "int", "int3", "into", "xlatb", "hlt", "cli", "sti", "in", "out",
        "iret", "iretd", "sysenter", "sysexit", "lds", "les", "lss", "lfs", "lgs", "bound", "arpl", "push", "pop",
        "ret", "enter", "leave", "pusha", "pushad", "popa", "popad", "movs", "stosb", "fxsave", "fxrstor", "maskmovq",
        "lgdt", "wrmsr", "rdmsr", "invd", "wbinvd", "ud2", "icebp", "retf", "insb", "outsb"])  # fmt: skip
    def test_none_that_lies_or_touches_the_stack(self, tc: TranslationCache, verifier: Verifier, name: str) -> None:
        for case in by_mnemonic(32).get(name, []):
            if name == "int":
                assert case.code[-2] == 0xCD
            with pytest.raises(VerifierError):
                verifier.check_unit(unit_with(tc, case.code))


class TestEscapes:
    @pytest.mark.parametrize(
        "host",
        [
            # Memory that is not the window: no GS, no 67h, another segment, another base.
            "mov eax, [ecx]", "mov eax, [rcx]", "mov eax, gs:[rcx]", "mov eax, fs:[ecx]", "mov eax, fs:[0]",
            "mov eax, [rip+0x100]", "mov eax, gs:[rip]", "add [rsp], eax", "mov eax, [rsp]", "mov eax, gs:[esp]",
            "mov eax, gs:[r10d]", "mov eax, gs:[r15d]", "mov eax, gs:[rcx+8]", "lock add dword ptr gs:[ecx], eax",
            # The engine's registers and segment bases.
            "mov r10, rax", "mov r11, rax", "mov r13d, eax", "xchg r14d, eax", "mov r15, rax", "mov rsp, rax",
            "add rsp, 8", "wrgsbase rax", "wrfsbase rax", "rdgsbase rax", "mov gs, eax", "mov ds, eax", "mov eax, cs",
            # The host's stack.
            "push rax", "pop rax", "pop r10", "pushfq", "popfq", "ret", "ret 8", "leave", "enter 8, 0",
            "push qword ptr gs:[ecx]", "pop qword ptr gs:[ecx]", "mov [rsp], r9", "mov [rsp], rax",
            "pop r8", "pushfq\nnop\npop r8", "pushfq\npop r9", "pushfq\npushfq\npop r8", "pushfq\nret",
            # Kernel, processor, and what tells of the host.
            "int 0x80", "int3", "int 3", "syscall", "sysenter", "hlt", "cpuid", "rdtsc", "xgetbv", "rdpmc",
            "rdrand eax",
            "sgdt gs:[eax]", "sidt gs:[eax]", "smsw eax", "str eax", "sldt eax", "lar eax, ecx", "verr ax",
            "in al, dx", "out dx, al", "cli", "iretq", "lretq", "ud2", "xlatb", "insb", "outsb", "clflush gs:[eax]",
            "fxsave gs:[eax]", "xsave gs:[eax]", "maskmovdqu xmm0, xmm1", "vzeroupper", "movq xmm8, rax",
            # The view of RAM without what has to come first, or for more than its first 4 GiB.
            "mov eax, [r8]", "mov [r8], eax", f"mov r8, [r15+{OFFSETS['ram_view']}]\nmov eax, [r8]",
            f"mov r8, [r15+{OFFSETS['ram_view']}]\nlea r8, [r8+r9]\nmov eax, [r8]",
            f"mov r8, [r15+{OFFSETS['window']}]\nmov r9d, r9d\nlea r8, [r8+r9]\nmov eax, [r8]",
            f"mov r9, [r15+{OFFSETS['ram_view']}]", f"mov rax, [r15+{OFFSETS['ram_view']}]",
            f"{IN_RAM}\nmov eax, [r8+4]", f"{IN_RAM}\nmov eax, [r8+rcx]", f"{IN_RAM}\nmov eax, gs:[r8]",
            f"{IN_RAM}\nmov eax, fs:[r8]", f"{IN_RAM}\nmov eax, [r8d]", f"{IN_RAM}\nmov rax, [r8]",
            f"{IN_RAM}\nmul qword ptr [r8]", f"{IN_RAM}\nadd qword ptr [r8], 1", f"{IN_RAM}\ncmpxchg16b [r8]",
            f"{IN_RAM}\npush qword ptr [r8]", f"{IN_RAM}\njmp [r8]", f"{IN_RAM}\ncall [r8]",
            f"{IN_RAM}\nlock inc dword ptr [r8]", f"{IN_RAM}\nmovaps xmm0, [r8]", f"{IN_RAM}\nbts [r8], ecx",
            f"{IN_RAM}\nlea r8, [r8+r9]\nmov eax, [r8]", f"{IN_RAM}\nmov r8d, eax\nmov eax, [r8]",
            f"{IN_RAM}\nadd r8, r9\nmov eax, [r8]", f"{IN_RAM}\njecxz 1f\nmov r8d, ecx\n1: mov eax, [r8]",
            f"jecxz 1f\n{IN_RAM}\n1: mov eax, [r8]", f"{IN_RAM}\nmov rsi, [r8]", f"{IN_RAM}\nmov [rsp], r8",
            f"mov [r15+{OFFSETS['ram_view']}], r8", f"mov [r15+{OFFSETS['page_flags']}], r8d",
            f"mov [r15+{OFFSETS['entry_uses']}], eax", f"mov r8, [r15+{OFFSETS['entry_uses']}]",
            # 64 bits where the guest has 32.
            "mul qword ptr gs:[ecx]", "neg qword ptr gs:[ecx]", "add qword ptr gs:[ecx], 1",
            "mov rax, rcx", "lea rax, [rcx+rdx]", "mov rax, [r15]", "movsxd rax, ecx", "bswap rax", "cdqe",
            "add r8, r9", "mov rax, gs:[ecx]", "movabs rax, 0x1122334455667788",
            # Fields that say where code, tables or the host's stack are.
            *(f"mov [r15+{OFFSETS[name]}], r8d" for name in ("window", "dispatch", "target", "host_rsp", "call_stack",
                                                             "fault_exit", "budget", "flags")),
            f"mov [r15+{STATE_BYTES}], eax", "mov [r15-4], eax", "mov [r15+rcx], eax", "mov [r15+r15], eax",
            f"mov [r15d+{OFFSETS['eip']}], eax", f"mov gs:[r15+{OFFSETS['eip']}], eax",
            f"mov [r15+{OFFSETS['eip'] + 2}], eax",
            # Control flow.
            "jmp rax", "jmp r8", "jmp r9", "call rax", "call r9", "jmp [r14+r8*4]", "jmp gs:[eax]", "call gs:[eax]",
            "jmp .+3\nmov eax, 0xcd80", "1: jmp 1b", "jrcxz .+2\n", "loop .+2", "jmp .+0x1000", "jz .-0x1000",
            ".byte 0x66\njmp .+4", ".byte 0xf2\njmp .+3",
            # Look-ups and strings without what has to come first.
            "mov r9d, [r14+r8*4]", "mov r9, [r14+r8*4]", "mov r8d, eax\nmov r9d, [r14+r8*8]",
            "mov r8d, eax\nmov r9d, [r14+r9*4]", "mov r8d, eax\nmov r9d, [r14+r8*4]\nlea r9, [r13+r9+8]\njmp r9",
            "mov r8d, eax\nmov r9d, [r14+r8*4]\njmp r9", "mov r9d, eax\nlea r9, [r13+r9]\njmp r9",
            "mov r8d, eax\nmov r9d, [r14+r8*4]\nadd r9d, 1\nlea r9, [r13+r9]\njmp r9",
            "mov r8d, eax\nmov r9d, [r14+r8*4]\nlea r9, [r13+r9]\nmov [rsp], r9\nnop\nret",
            "movzx r9d, byte ptr [r11+r9-63]", "sarx r9, r10, r11\nmovzx r9d, byte ptr [r11+r9-64]",
            "movsb", "rep stosd", "lodsb", "movsq", f"mov r8, [r15+{OFFSETS['dispatch']}]\nlea rsi, [r8+rsi]\nlodsb",
            f"mov r8, [r15+{OFFSETS['window']}]\nlea rsi, [r8+rsi]\nlea rsi, [r8+rsi]\nlodsb\nmov esi, esi",
            f"mov r8, [r15+{OFFSETS['window']}]\nlea rsi, [r8+rsi]\nlodsb",  # and RSI stays an address
            f"mov r8, [r15+{OFFSETS['window']}]\nlea rdi, [r8+rdi]\nrep stosd\nmov edi, edi",  # ECX as it comes
            "nop dword ptr [rax]", "data16 nop", "rep ret", "ds mov eax, ecx", ".byte 0x67\nmov eax, ecx",
        ],
    )  # fmt: skip
    def test_it_is_refused(self, tc: TranslationCache, verifier: Verifier, host: str) -> None:
        with pytest.raises(VerifierError):
            verifier.check_unit(unit_with(tc, host))

    def test_the_same_frame_passes_around_what_is_allowed(self, tc: TranslationCache, verifier: Verifier) -> None:
        window = OFFSETS["window"]
        for host in (
            "mov eax, gs:[ecx]", f"mov [r15+{OFFSETS['eip']}], eax", "mov r12d, eax",
            f"mov r8, [r15+{window}]\nlea rdi, [r8+rdi]\nrep stosb\nmov edi, edi",
            "jecxz 1f\nmov eax, ecx\n1: nop",
            *(f"{IN_RAM}\n{insn}" for insn in ("mov eax, [r8]", "add [r8], r12d", "mul byte ptr [r8]", "mov r9w, [r8]",
                                               "cmpxchg8b [r8]", "mov word ptr [r8], 5", "bts dword ptr [r8], 5")),
        ):  # fmt: skip
            verifier.check_unit(unit_with(tc, host))

    @pytest.mark.parametrize(("limit", "passes"), [(22, True), (30, True), (31, False), (40, False), (0x1E1E, False)])
    def test_a_rep_needs_a_count_that_stays_in_the_guard(
        self, tc: TranslationCache, verifier: Verifier, limit: int, passes: bool
    ) -> None:
        unit = unit_of(tc, "rep stosd")
        place = b"\x41\xb9" + LIMIT_LOG2.to_bytes(4, "little")
        assert unit.code.count(place) == 1
        unit = replace(unit, code=unit.code.replace(place, place[:2] + limit.to_bytes(4, "little")))
        if passes:
            verifier.check_unit(unit)
        else:
            with pytest.raises(VerifierError, match="ECX may be too large"):
                verifier.check_unit(unit)

    def test_a_prefix_that_is_dropped(self, tc: TranslationCache, verifier: Verifier) -> None:
        unit = unit_of(tc, "mov eax, [ecx+0x11223344]")
        operand = b"\x65\x67\x8b\x81\x44\x33\x22\x11"
        assert operand in unit.code
        for prefixes in (b"\x65\x2e", b"\x90\x67", b"\x64\x67", b"\x65\x90", b"\x65\x65", b"\x67\x67", b"\x65\xf0"):
            with pytest.raises(VerifierError):
                verifier.check_unit(replace(unit, code=unit.code.replace(operand, prefixes + operand[2:])))

    def test_an_entry_in_the_middle_of_an_instruction(self, tc: TranslationCache, verifier: Verifier) -> None:
        unit = unit_of(tc, "mov eax, 0x11223344\nhlt")
        with pytest.raises(VerifierError, match="middle"):
            verifier.check_unit(replace(unit, hosts=(unit.hosts[0] + 1, unit.hosts[1])))

    def test_a_resumption_between_window_and_access(self, tc: TranslationCache, verifier: Verifier) -> None:
        """The string instruction itself may not be where a fault resumes: the window would be added to nothing."""
        unit = unit_of(tc, "movsb\nhlt")
        at = unit.code.index(b"\xa4")
        with pytest.raises(VerifierError, match="movsb"):
            verifier.check_unit(replace(unit, hosts=(unit.hosts[0], at), eips=(EIP, EIP)))

    @pytest.mark.parametrize("shift", [1, -3, -40, 0x1000, -0x100_0000])
    def test_a_routine_goes_on_at_a_boundary_further_on(
        self, tc: TranslationCache, verifier: Verifier, shift: int
    ) -> None:
        unit = unit_of(tc, "popfd")
        at = unit.code.index(b"\x4d\x8d\x85") + 3  # lea r8, [r13+...]
        constant = int.from_bytes(unit.code[at : at + 4], "little") + shift
        code = unit.code[:at] + (constant & 0xFFFF_FFFF).to_bytes(4, "little") + unit.code[at + 4 :]
        with pytest.raises(VerifierError, match="no boundary further on"):
            verifier.check_unit(replace(unit, code=code))

    def test_a_routine_that_goes_on_is_told_where(self, tc: TranslationCache, verifier: Verifier) -> None:
        unit = unit_of(tc, "popfd")
        at = unit.code.index(b"\x4d\x8d\x85")
        with pytest.raises(VerifierError, match="does not know where to go on"):
            verifier.check_unit(replace(unit, code=unit.code[:at] + b"\x90" * 7 + unit.code[at + 7 :]))

    def test_execution_may_not_run_on(self, tc: TranslationCache, verifier: Verifier) -> None:
        unit = unit_of(tc, "hlt")
        with pytest.raises(VerifierError, match="runs on"):
            verifier.check_unit(replace(unit, code=unit.code[:-5] + b"\x90" * 5))
        with pytest.raises(VerifierError, match="finds no instruction"):
            verifier.check_unit(replace(unit, code=unit.code + b"\x06"))

    def test_the_error_tells_where_and_why(self, tc: TranslationCache, verifier: Verifier) -> None:
        with pytest.raises(VerifierError) as caught:
            verifier.check_unit(unit_with(tc, "nop\nint 0x80"))
        error = caught.value
        assert (error.eip, error.code) == (EIP, b"\xcd\x80")
        assert "0x00001000" in str(error)
        assert "cd 80" in str(error)
        assert "int 0x80" in error.rule


class TestMutations:
    @pytest.mark.parametrize("source", [*SOURCES, *SOFT_SOURCES])
    def test_flipped_bits(self, tc: TranslationCache, verifier: Verifier, source: str) -> None:
        """What is accepted of code with a flipped bit is harmless, if not what the guest meant."""
        unit = soft_unit_of(tc, source) if source in SOFT_SOURCES else unit_of(tc, source)
        chance = random.Random(source)
        bits = 8 * len(unit.code)
        accepted = 0
        for bit in chance.sample(range(bits), min(bits, FLIPS_PER_UNIT)):
            code = bytearray(unit.code)
            code[bit >> 3] ^= 1 << (bit & 7)
            try:
                verifier.check_unit(replace(unit, code=bytes(code)))
            except VerifierError:
                continue
            accepted += 1
            why = escapes(tc, bytes(code))
            assert why is None, f"bit {bit & 7} of byte {bit >> 3}: {why}"
        assert accepted < bits * 3 // 4

    def test_flipped_bits_in_the_stubs(self, tc: TranslationCache, verifier: Verifier) -> None:
        """A stub is not the guest's to choose, so it is enough that a mistake is likely to be seen."""
        chance = random.Random(7)
        original = bytes(tc.data[: tc.stubs_bytes])
        refused = 0
        places = chance.sample(range(8 * tc.stubs_bytes), 300)
        try:
            for bit in places:
                tc.data[bit >> 3] ^= 1 << (bit & 7)
                try:
                    verifier.check_stubs()
                except VerifierError:
                    refused += 1
                tc.data[: len(original)] = original
        finally:
            tc.data[: len(original)] = original
        assert refused > len(places) // 2


class TestPatches:
    def test_links_lead_from_direct_branches_to_entries(self, tc: TranslationCache, verifier: Verifier) -> None:
        unit = unit_of(tc, "jmp .")
        start = tc.position
        verifier.check_unit(unit)
        at = start + unit.code.index(b"\xe9") + 1
        verifier.check_link(at, start)
        with pytest.raises(VerifierError, match="no known entry"):
            verifier.check_link(at, start + 1)
        with pytest.raises(VerifierError, match="no direct branch"):
            verifier.check_link(at + 1, start)
        verifier.clear()
        with pytest.raises(VerifierError):
            verifier.check_link(at, start)

    def test_a_link_exit_names_a_branch_of_its_own(self, tc: TranslationCache, verifier: Verifier) -> None:
        unit = unit_of(tc, "jmp .")
        place = b"\x41\xb9" + (tc.position + unit.code.index(b"\xe9") + 1).to_bytes(4, "little")
        assert place in unit.code
        wrong = place[:2] + (8).to_bytes(4, "little")
        with pytest.raises(VerifierError, match="link exit"):
            verifier.check_unit(replace(unit, code=unit.code.replace(place, wrong)))

    def test_heads_are_overwritten_only_where_nobody_enters(self, tc: TranslationCache, verifier: Verifier) -> None:
        unit = unit_of(tc, "inc eax\nhlt")
        start = tc.position
        verifier.check_unit(unit)
        jump = (tc.exits[Exit.MISS] - (start + 11)).to_bytes(4, "little", signed=True)
        head = b"\x41\xb8" + EIP.to_bytes(4, "little") + b"\xe9" + jump
        verifier.check_head(start, head)
        with pytest.raises(VerifierError, match="middle"):
            verifier.check_head(start, b"\x90" * unit.hosts[0] + head)
        with pytest.raises(VerifierError, match="middle"):
            verifier.check_head(start + 1, head)
        with pytest.raises(VerifierError):
            verifier.check_head(start, head[:-1] + b"\x7f")


@cache
def _system_call() -> bytes:
    return assemble("int 0x80", bits=64)


class TestEngine:
    def test_it_refuses_to_place_what_is_not_proven(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = translate

        def sabotage(*arguments: object, **keywords: object) -> Unit:
            unit = real(*arguments, **keywords)  # type: ignore[arg-type]
            return replace(unit, code=unit.code + _system_call())

        monkeypatch.setattr("vmm.native.fragmentstore.translate", sabotage)
        bare = flat("1: inc eax\njmp 1b", lambda cpu, debug: BinaryTranslator(cpu, debug, verify=True))
        try:
            with pytest.raises(VerifierError, match="int 0x80"):
                bare.run(1000)
        finally:
            bare.close()

    def test_it_verifies_links_and_dropped_heads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        for name in ("check_unit", "check_link", "check_head"):

            def count(*arguments: object, name: str = name, real: object = getattr(Verifier, name)) -> None:
                calls.append(name)
                real(*arguments)  # type: ignore[operator]

            monkeypatch.setattr(Verifier, name, count)
        source = "1: inc eax\ncmp eax, 100\njnz 1b\nmov byte ptr [1b], 0x90\nmov eax, 99\njmp 1b"
        bare = flat(source, lambda cpu, debug: BinaryTranslator(cpu, debug, verify=True))
        try:
            bare.run(5000)
        finally:
            bare.close()
        assert set(calls) == {"check_unit", "check_link", "check_head"}
