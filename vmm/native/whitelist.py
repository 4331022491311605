"""The forms of host instructions that the translation cache may hold, as data: what `verifier` proves code against.

A form names whole instructions (mnemonic, kinds of operands, prefixes), since Capstone lists no memory operand for
PUSH, RET, XLAT or INT, and what it must find in registers and leaves there. It must not know where code comes from.

To allow another form add a row with the reason: `Form("mov", "r9d, dword [r14+r8*4]", "why", needs=…, gives=…)`.

Kinds of operands:
    reg     a guest register where it lives (EAX … EDI, R12D for ESP), R8 or R9, of 8, 16 or 32 bits
    imm     a constant
    win     memory in the window: GS and a 32-bit effective address (prefixes 65h and 67h)
    val     reg, imm or win, of up to 32 bits
    ea      an address for LEA, from registers that `reg` names; nothing is accessed
    xmm mm st   a register of the FPU that the guest has (XMM0 to XMM7)
    ram     [r8], where that is in the view of RAM: no GS, a 64-bit address; of up to 32 bits, `wide` of 64
    rel     a direct branch: to a boundary of the fragment, a stub, or a known entry
    state   memory in one field of the state block, [r15+constant]; `state.NAME` in this one; `out` in one of WRITABLE;
            `slot` in any but those of PROTECTED
    r9d, qword [r14+r8*4+16], …   exactly this; of a constant its number
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from machine.instructions.operands import CONDITION_NAMES
from vmm.native import whitelistfpu
from vmm.native.stateblock import OFFSETS

# Fields of the state block that fragments may store to: no addresses that anybody jumps to or maps by.
WRITABLE: Final = frozenset(
    (
        *("gpr", "eip", "reason", "detail", "interrupt_flag", "interrupt_flag_before", "shadow"),
        *("routine_eip", "routine_next", "port", "port_access", "port_resume"),
        *("fpu_ip", "fpu_cs", "fpu_dp", "fpu_ds", "fpu_op"),
        *("segments", "segment_bases", "parked", "target_eip", "soft_last"),
        *("string_esi", "string_edi", "string_ecx", "string_source", "string_destination"),
    )
)

# Fields that not even the stubs store to but by forms of their own.
PROTECTED: Final = frozenset(
    {"window", "routine_return", "ram_view", "page_flags", "entry_uses", "fault_first", "fault_routine", "fault_exit"}
)


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of a register's 64 bits.

    Attributes:
        kind: `any`; `below`: less than 2**number; `const`: equal to number; `window`, the current window's address;
            `pointer`, that plus a 32-bit number; `gate`, where the FPU's gates lead; `page`, that of the guest's FPU
            registers; `ram`, the view of all RAM, `place`, that plus a 32-bit number; `page_flags` and `entry_uses`,
            tables of the engine with a byte for each page, and for each doubleword of an entry; `negative`, -1 if the
            budget is used up, else 0; `offset`, from the
            dispatch table; `entry`, an address from there; `shifted`, the value `of` shifted right by `number`;
            `code`, the address of a boundary of this fragment; `flags`, RFLAGS, which take less than 32 bits.
        number: see there.
        of: the instruction that made the value, to tell copies of it; 0 if nobody asked.
    """

    kind: str
    number: int = 0
    of: int = 0

    @property
    def bits(self) -> int:
        """The value is less than 2**bits, for unsigned numbers of up to 32 bits; 64 if it may be anything."""
        if self.kind == "below":
            return self.number
        if self.kind == "const":
            return self.number.bit_length()
        return 32 if self.kind in ("offset", "shifted") else 64

    def describe(self) -> str:
        """In words, as a need."""
        words = {"below": f"below 2**{self.number}", "const": f"= {self.number:#x}"}
        return words.get(self.kind, f"as {self.kind}")

    def satisfies(self, need: Fact) -> bool:
        """Whether this is enough where `need` is needed."""
        if need.kind == "below":
            return self.bits <= need.number
        return need.kind == "any" or (need.kind == self.kind and (need.kind != "const" or need.number == self.number))


ANY: Final = Fact("any")
U32: Final = Fact("below", 32)
WINDOW, POINTER, NEGATIVE, OFFSET, ENTRY = map(Fact, ("window", "pointer", "negative", "offset", "entry"))
GATE, FPU_PAGE = map(Fact, ("gate", "page"))
CODE, FLAGS = map(Fact, ("code", "flags"))
RAM, PLACE, PAGE_FLAGS, ENTRY_USES = map(Fact, ("ram", "place", "page_flags", "entry_uses"))
# How often a REP may be repeated, by the bytes of an element, so that it stays in the window and the 4 GiB behind it.
REP_BITS: Final = {1: 32, 2: 31, 4: 30}


@dataclass(frozen=True, slots=True)
class Form:
    """A row.

    Attributes:
        mnemonics: as Capstone writes them, several with one meaning.
        operands: their kinds.
        why: the reason that it is allowed.
        needs: facts by 64-bit register, or by `[rsp]` for what the next RET finds.
        gives: facts afterwards; of other registers that it names nothing is known but that they stay 32-bit numbers.
        prefixes: mandatory or meaningful prefixes beside 65h and 67h, which follow from the operands.
        flow: "", "jump" (never comes back), "branch" (may go on behind it), "call" (goes on behind it by a landing).
        stub: allowed in the TC's fixed stubs only.
    """

    mnemonics: str
    operands: str
    why: str
    needs: Mapping[str, Fact] = field(default_factory=dict)
    gives: Mapping[str, Fact] = field(default_factory=dict)
    prefixes: bytes = b""
    flow: str = ""
    stub: bool = False


_JCC = " ".join(f"j{name}" for name in CONDITION_NAMES)
_SETCC = " ".join(f"set{name}" for name in CONDITION_NAMES)
_CMOVCC = " ".join(f"cmov{name}" for name in CONDITION_NAMES)

_COMPUTING = (
    Form("mov add or adc sbb and sub xor cmp test xchg xadd", "val, val", "IDENT: explicit operands and flags only"),
    Form("movzx movsx imul bsf bsr", "val, val", "IDENT"),
    Form("imul", "val, val, imm", "IDENT"),
    Form("cmpxchg", "val, val", "IDENT: the accumulator too"),
    Form("cmpxchg8b", "win", "IDENT: EDX:EAX too"),
    Form(f"inc dec neg not mul imul div idiv bswap {_SETCC}", "val", "IDENT: EDX:EAX too for products and quotients"),
    Form("rol ror rcl rcr shl sal shr sar", "val, imm", "IDENT"),
    Form("rol ror rcl rcr shl sal shr sar", "val, cl", "IDENT"),
    Form("rol ror rcl rcr shl sal shr sar", "val", "IDENT: by one"),
    Form("shld shrd", "val, reg, imm", "IDENT"),
    Form("shld shrd", "val, reg, cl", "IDENT"),
    Form("bt bts btr btc", "val, imm", "IDENT: the index is taken modulo the operand's size"),
    Form("bt bts btr btc", "reg, reg", "IDENT: a register's index in memory would reach beyond the window"),
    Form(_CMOVCC, "reg, val", "IDENT"),
    Form("lea", "reg, ea", "IDENT, and arithmetic without flags"),
    Form("cbw cwd", "", "IDENT", prefixes=b"\x66"),
    Form("cwde cdq clc stc cmc cld std lahf sahf", "", "IDENT: registers and flags of the guest"),
    Form("nop", "", "90h alone: alignment"),
    Form("sarx shrx shlx", "reg, reg, reg", "shifts without flags"),
)
_STATE = (
    Form("mov", "reg, state", "scratch loads; the guest's memory cannot be reached by what is read"),
    Form("mov", "r8, qword [state.window]", "what string instructions add", gives={"r8": WINDOW}),
    Form("mov", "out, reg", "state for Python"),
    Form("mov", "out, imm", "state for Python"),
)
_BUDGET = (
    Form("lea", "r10, [r10+imm]", "charge and refund"),
    Form("sarx", "r9, r10, r11", "all ones if the budget is used up; R11 is 63 modulo 64", gives={"r9": NEGATIVE}),
    Form("movzx", "r9d, byte [r11+r9-63]", "the guard page if it is", needs={"r9": NEGATIVE}),
)
_SEGMENTED = (
    Form("mov", "r9, qword [state.segment_bounds]", "a number that an offset is added to"),
    Form("lea", "r9, [r9+r8+imm]", "negative if the offset is within the limit"),
    Form("lea", "r9, [r8+imm]", "the same with a constant limit"),
    Form("not", "r9", "all ones in its upper half if it is not"),
    Form("sarx", "r9, r9, r11", "all ones if so; R11 is 63 modulo 64", gives={"r9": NEGATIVE}),
    Form("shlx", "r9, r8, r9", "DF as a sign"),
    Form("lea", "r8, [r8+r9+imm]", "the last byte of a REP, to be compared with a limit"),
    Form("lea", "r8, [r8+r9*2+imm]", "the same of words"),
    Form("lea", "r8, [r8+r9*4+imm]", "the same of doublewords"),
    Form("lea", "r9, [r9+r8]", "negative if it is within the limit"),
    Form("rorx", "reg, reg, imm", "a high byte without flags"),
)
_FLOW = (
    Form("jmp", "rel", "links, exits", flow="jump"),
    Form(_JCC, "rel", "conditions", flow="branch"),
    Form("jecxz", "rel", "LOOP, JECXZ, and tests without flags", flow="branch"),
    Form("call", "rel", "CALL inside the page", flow="call"),
    Form("mov", "r9d, dword [r14+r8*4]", "the dispatch table: 2**32 entries", needs={"r8": U32}, gives={"r9": OFFSET}),
    Form("lea", "r9, [r10+r9]", "negative if what is published of a port may be another by now"),
    Form("lea", "r9, [r13+r9]", "an offset of the TC as an address", needs={"r9": OFFSET}, gives={"r9": ENTRY}),
    Form("jmp", "r9", "indirect, and across pages", needs={"r9": ENTRY}, flow="jump"),
    Form("call", "r9", "the same", needs={"r9": ENTRY}, flow="call"),
    Form("mov", "qword [rsp], r9", "over the host's return address", needs={"r9": ENTRY}, gives={"[rsp]": ENTRY}),
    Form("ret", "", "directly behind it", needs={"[rsp]": ENTRY}, flow="jump"),
)
_IN_WINDOW = {"rsi": POINTER, "rdi": POINTER}
_SYSTEM = (
    Form("pushfq", "", "PUSHFD: RFLAGS as they are", gives={"[rsp]": FLAGS}),
    Form("pop", "r8", "directly behind PUSHFQ", needs={"[rsp]": FLAGS}, gives={"r8": U32}),
    Form("lea", "r8, [r13+imm]", "where a routine goes on: the verifier looks at the constant", gives={"r8": CODE}),
    Form("lea", "rdx, [r10+imm]", "RDTSC: what is left of the budget"),
    Form("mulx", "r9, r8, qword [state.ns_per_insn]", "RDTSC: as time"),
    Form("not", "r8", "RDTSC: the same, negative"),
    Form("mov", "r9, qword [state.tsc_at_no_budget]", "RDTSC"),
    Form("mov", "r9, qword [state.published_budget]", "a number that the budget is added to"),
    Form("lea", "r8, [r8+r9+1]", "RDTSC"),
    Form("shrx", "rdx, r8, rdx", "RDTSC: the upper half", needs={"rdx": Fact("const", 32)}, gives={"rdx": U32}),
)
_STRINGS = (
    Form("lea", "rsi, [r8+rsi]", "window + ESI", needs={"r8": WINDOW, "rsi": U32}, gives={"rsi": POINTER}),
    Form("lea", "rdi, [r8+rdi]", "window + EDI", needs={"r8": WINDOW, "rdi": U32}, gives={"rdi": POINTER}),
    Form("movsb movsd cmpsb cmpsd", "", "at the window", needs=_IN_WINDOW, gives=_IN_WINDOW, prefixes=b"\xf2\xf3"),
    Form("movsw cmpsw", "", "at the window", needs=_IN_WINDOW, gives=_IN_WINDOW, prefixes=b"\x66\xf2\xf3"),
    Form("stosb stosd scasb scasd", "", "at the window", {"rdi": POINTER}, {"rdi": POINTER}, b"\xf2\xf3"),
    Form("stosw scasw", "", "at the window", {"rdi": POINTER}, {"rdi": POINTER}, b"\x66\xf2\xf3"),
    Form("lodsb lodsd", "", "at the window", {"rsi": POINTER}, {"rsi": POINTER}, b"\xf2\xf3"),
    Form("lodsw", "", "at the window", {"rsi": POINTER}, {"rsi": POINTER}, b"\x66\xf2\xf3"),
)
_FLOATING = (
    *(Form(names, kinds, "the guest's FPU registers", prefixes=prefix) for names, kinds, prefix in whitelistfpu.ROWS),
    Form("mov", "r9, qword [state.fpu_gate]", "a page of ours, or nowhere", gives={"r9": GATE}),
    Form("mov", "r9, qword [state.sse_gate]", "the same", gives={"r9": GATE}),
    Form("mov", "r9d, dword [r9]", "through the gate", needs={"r9": GATE}),
)
_IN_PAGE = {"rax": FPU_PAGE}
_PLACES = ("[rax]", "[rax+imm]")
_STUBS = (
    Form("mov", "rax, qword [state.fpu_page]", "where the FPU registers are kept", gives=_IN_PAGE, stub=True),
    Form("fxsave fxrstor", "[rax]", "the FPU registers out and in", needs=_IN_PAGE, stub=True),
    Form("mov", "dword [rax+imm], ecx", "x87 pointers out", needs=_IN_PAGE, stub=True),
    Form("mov", "ecx, dword [rax+imm]", "x87 pointers in", needs=_IN_PAGE, stub=True),
    *(Form("movups", f"xmm, {place}", "registers in an image", needs=_IN_PAGE, stub=True) for place in _PLACES),
    *(Form("movups", f"{place}, xmm", "registers in an image", needs=_IN_PAGE, stub=True) for place in _PLACES),
    Form("stmxcsr fnstcw ldmxcsr fldcw", "state", "the control words of the caller in C", stub=True),
    Form("fninit", "", "the caller in C wants an empty stack", stub=True),
    Form("mov", "rax, qword [state.window]", "for WRGSBASE", gives={"rax": WINDOW}, stub=True),
    Form("push pop", "pointer", "registers that the caller in C wants back", stub=True),
    Form("mov", "slot, any", "the way in and out", stub=True),
    Form("mov", "any, state", "the way in and out", stub=True),
    Form("movabs mov", "pointer, imm", "addresses of the engine's own memory", stub=True),
    Form("wrgsbase", "rax", "the window", {"rax": WINDOW}, {"rax": WINDOW}, b"\xf3", stub=True),
    Form("push pop", "state", "flags in and out", stub=True),
    Form("pushfq popfq", "", "flags in and out", stub=True),
    Form("jmp", "qword [state.target]", "the way in: where Python says", flow="jump", stub=True),
    Form("ret", "", "the way out: to the caller in C", flow="jump", stub=True),
)
# RAX is a multiple of 40 below the size of this field: CR3, then two spaces.
_SLOTS = [OFFSETS["address_spaces"] + 8 * number for number in range(5)]
_DELIVERIES = OFFSETS["deliveries"]
_ROUTINES = (
    Form("mov", "rax, qword [state.kernel_space]", "a window or 0", gives={"rax": WINDOW}, stub=True),
    Form("mov", "rax, qword [state.user_space]", "a window or 0", gives={"rax": WINDOW}, stub=True),
    Form("mov", "r8, qword [state.window]", "a routine fails: its own window", gives={"r8": WINDOW}, stub=True),
    Form("wrgsbase", "r8", "a routine fails: its own window", needs={"r8": WINDOW}, prefixes=b"\xf3", stub=True),
    Form("mov", "r14, qword [state.kernel_space]", "a dispatch table", stub=True),
    Form("mov", "r14, qword [state.user_space]", "a dispatch table", stub=True),
    Form("test", "rax, rax", "is the space known?", {"rax": WINDOW}, {"rax": WINDOW}, stub=True),
    Form("mov", "qword [state.window], rax", "another space", {"rax": WINDOW}, {"rax": WINDOW}, stub=True),
    Form("mov", "qword [state.routine_return], r8", "where the fragment said", needs={"r8": CODE}, stub=True),
    Form("cmp", "state, imm", "decisions", stub=True),
    Form("test and or", "state, any", "decisions, and flags", stub=True),
    Form("or cmp", "reg, state", "flags, and decisions", stub=True),
    Form("not", "rcx", "the bound of a segment", stub=True),
    Form("add sub", "reg, state", "an address in a descriptor table; room for an error code", stub=True),
    Form("cmp", "qword [state.delivery_budget], r10", "has anything retired?", stub=True),
    Form("mov", f"ecx, dword [r15+rax*4+{_DELIVERIES}]", "a counter: RAX is below 32", stub=True),
    Form("mov", f"dword [r15+rax*4+{_DELIVERIES}], ecx", "a counter", stub=True),
    *(Form("mov", f"r8, qword [r15+rax+{at}]", "a space known by CR3", stub=True) for at in _SLOTS[1:]),
    Form("cmp", f"qword [r15+rax+{_SLOTS[0]}], r9", "the slot of CR3", stub=True),
    Form("cmp", f"qword [r15+rax+{_SLOTS[2]}], imm", "is it in use?", stub=True),
    Form("jmp", "qword [state.routine_return]", "where the fragment said", flow="jump", stub=True),
)
_REAL_SPACES = OFFSETS["real_spaces"]  # RAX is a multiple of 16 below its size: a selector, then a table
_REAL = (
    Form("cmp", f"qword [r15+rax+{_REAL_SPACES}], r9", "the slot of a selector", stub=True),
    Form("mov", f"r14, qword [r15+rax+{_REAL_SPACES + 8}]", "a dispatch table, or 0: a callout", stub=True),
    Form("test", "r14, r14", "is it there?", stub=True),
    Form("mov", "rcx, qword [state.segment_bounds]", "a number that an offset is added to", stub=True),
    Form("lea", "rcx, [rcx+rax+imm]", "negative if the offset is within the limit", stub=True),
    Form("test", "rcx, rcx", "is it?", stub=True),
)
_IN_RAM = {"r9": RAM, "rax": U32}
_WALK = (
    Form("mov", "r9, qword [state.ram_view]", "page tables are read in it", gives={"r9": RAM}, stub=True),
    Form("mov", "eax, dword [r9+rax]", "an entry, or its lower half", needs=_IN_RAM, stub=True),
    Form("mov", "edx, dword [r9+rax+4]", "the upper half of an entry", needs=_IN_RAM, stub=True),
)
_SITES = [OFFSETS["sites"] + 4 * number for number in range(4)]
# RCX is a multiple of 16 below the size of the table.
_FAULTS = (
    Form("sub", "rax, r13", "where in the TC a signal came", stub=True),
    Form("cmp", f"eax, dword [r15+rcx+{_SITES[0]}]", "is that known?", stub=True),
    *(Form("mov", f"eax, dword [r15+rcx+{at}]", "what is known", stub=True) for at in _SITES[1:3]),
    Form("sub", f"dword [r15+rcx+{_SITES[3]}], imm", "how often", stub=True),
    Form("lea", "r10, [r10+rax]", "refund", stub=True),
    Form("sub", "rax, qword [state.window]", "a guest address,", stub=True),
    Form("mov", "rcx, rax", "if its upper half", stub=True),
    Form("shr", "rcx, imm", "is zero", stub=True),
)

_AT_PLACE = {"r8": PLACE}
_RAM_FOR = {"val": "ram", "win": "wide"}  # what stands for it in a soft form
_SOFT = (
    Form("mov", "r8, qword [state.ram_view]", "4 GiB with the guest's RAM and nothing else", gives={"r8": RAM}),
    Form("lea", "r8, [r8+r9]", "a place in it", needs={"r8": RAM, "r9": U32}, gives=_AT_PLACE),
    *(
        replace(
            form, operands=", ".join((*kinds[:n], _RAM_FOR[kind], *kinds[n + 1 :])), why="soft form", needs=_AT_PLACE
        )
        for form in _COMPUTING
        for kinds in (form.operands.split(", "),)
        for n, kind in enumerate(kinds)
        if kind in _RAM_FOR
    ),
)
_RAM_AND = {"rdx": RAM, "rcx": U32}
_FLAGS_AND = {"r8": PAGE_FLAGS, "rax": Fact("below", 20)}
_SOFT_ROUTINES = (
    Form("mov", "rdx, qword [state.ram_view]", "RAM", gives={"rdx": RAM}, stub=True),
    Form("mov", "ecx, dword [rdx+rcx]", "an entry of a page directory", _RAM_AND, stub=True),
    Form("mov", "eax, dword [rdx+rcx]", "an entry of a page table", _RAM_AND, stub=True),
    Form("mov", "dword [rdx+rcx], eax", "its A and D bits", _RAM_AND, stub=True),
    Form("cmp", "dword [rdx+rcx+4], imm", "the upper half of an entry", _RAM_AND, stub=True),
    Form("mov", "r8, qword [state.page_flags]", "a byte for each of 2**20 pages", gives={"r8": PAGE_FLAGS}, stub=True),
    Form("shr", "eax, 12", "the number of a page", gives={"rax": Fact("below", 20)}, stub=True),
    Form("test", "byte [r8+rax], imm", "flags of a page", needs=_FLAGS_AND, stub=True),
    Form("movzx", "eax, byte [r8+rax]", "flags of a page", needs=_FLAGS_AND, stub=True),
    Form("mov", "rdx, qword [state.entry_uses]", "a byte for each of 2**30", gives={"rdx": ENTRY_USES}, stub=True),
    Form("shr", "eax, 2", "the number of a doubleword", gives={"rax": Fact("below", 30)}, stub=True),
    Form("cmp", "byte [rdx+rax], imm", "use", {"rdx": ENTRY_USES, "rax": Fact("below", 30)}, stub=True),
    Form("sub", "state, imm", "how often that may be done", stub=True),
)

FORMS: Final[tuple[Form, ...]] = (
    *_SOFT,
    *(*_FLOW, *_BUDGET, *_SEGMENTED, *_STRINGS, *_SYSTEM, *_STATE, *_COMPUTING, *_FLOATING),
)
STUB_FORMS: Final[tuple[Form, ...]] = (*_SOFT_ROUTINES, *_WALK, *_REAL, *_FAULTS, *_ROUTINES, *_STUBS, *FORMS)
