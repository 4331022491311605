"""Far JMP, CALL, RET and IRET to every descriptor type, call gates with parameters, SYSENTER and SYSEXIT."""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.protected_mode.arena import (
    ARENA,
    CF,
    CODE,
    IF,
    NT,
    RESET_EFLAGS,
    RF,
    S_CODE0,
    S_CODE1,
    S_CODE2,
    S_CODE3,
    S_CONFORMING0,
    S_CONFORMING3,
    S_DATA0,
    S_DATA1,
    S_DATA2,
    S_DATA3,
    S_FREE,
    S_READ_ONLY3,
    STACK1,
    STACK3,
    TF,
    VIF,
    VIP,
    VM,
    Patch,
    descriptor,
    flat,
    gate,
    segment,
)
from tests.system.protected_mode.harness import V86, Case
from tests.system.protected_mode.segments import EXIT, any_descriptor, each

_STACKS = (S_DATA0, S_DATA1, S_DATA2, S_DATA3)
_CODES = (S_CODE0, S_CODE1, S_CODE2, S_CODE3)
_SHOW = "; .org 0x40; mov eax, cs; mov ebx, ss; mov ecx, ds; mov edx, es" + EXIT


def _to_any(instruction: str) -> Iterator[Case]:
    for access, (level, rpl) in each(((0, 0), (0, 3), (1, 1), (3, 3))):
        for code in (S_CODE0, S_CODE1, S_CODE3, S_CONFORMING0) if access & 0x17 == 4 else (S_CODE0,):
            yield Case(
                f"{instruction} access {access:02x} rpl {rpl} cpl {level} gate to {code:x}",
                f"{instruction} {S_FREE | rpl}:{CODE + 0x40}; nop{EXIT}; .org 0x40; mov eax, cs" + EXIT,
                level,
                patches=[descriptor(S_FREE, any_descriptor(access, code))],
            )


def jumps() -> list[Case]:
    """JMP far."""
    return list(_to_any("jmp"))


def calls() -> list[Case]:
    """CALL far."""
    return list(_to_any("call"))


def _returns(instruction: str, flags: str) -> list[Case]:
    return [
        Case(
            f"{instruction} access {access:02x} rpl {rpl} cpl {level}",
            f"push {_STACKS[rpl]}; push {STACK3 - 0x80}; {flags} push {S_FREE | rpl}; push {CODE + 0x40}; {instruction}"
            + _SHOW,
            level,
            patches=[descriptor(S_FREE, any_descriptor(access))],
        )
        for access, (level, rpl) in each(((0, 0), (0, 1), (0, 3), (3, 3)))
    ]


def far_returns() -> list[Case]:
    """RETF to every descriptor type."""
    return _returns("retf", "")


def interrupt_returns() -> list[Case]:
    """IRETD to every descriptor type, with an image that sets all flags but VM, NT, TF, RF, VIF and VIP."""
    return _returns("iretd", f"push {0x3FFFFF & ~(VM | NT | TF | RF | VIF | VIP)};")


def outer_stacks() -> list[Case]:
    """SS of returns to ring 3."""
    return [
        Case(
            f"{instruction} ss access {access:02x} rpl {rpl}",
            f"push {S_FREE | rpl}; push {STACK3 - 0x80}; {flags} push {S_CODE3}; push {CODE + 0x40}; {instruction}"
            + _SHOW,
            patches=[descriptor(S_FREE, any_descriptor(access))],
        )
        for instruction, flags in (("iretd", "push 2;"), ("retf", ""))
        for access, rpl in each((3, 0))
    ]


def call_gates() -> Iterator[Case]:
    """32-bit and 16-bit gates inwards and to the same level, parameters copied, and the return that releases them."""
    for access, size, prefix in ((0xEC, 4, ""), (0xE4, 2, ".byte 0x66;")):
        for count in (0, 1, 2, 5, 16, 31):
            for level in (1, 2, 3):
                for inner in range(level + 1):
                    # A 16-bit gate has a 16-bit offset, and its RETFW cuts EIP: all code is based at the arena then.
                    code = [descriptor(0xD0, segment(ARENA, 0xFFFF, 0x9B | inner << 5))]
                    code.append(descriptor(0xD8, segment(ARENA, 0xFFFF, 0x9B | level << 5)))
                    offset = CODE + 0x40 - ARENA
                    start = f"push {0xD8 | level}; push {CODE + 0x10 - ARENA}; retf; .org 0x10; "
                    yield Case(
                        f"call gate {access:x} {count} parameters {level} to {inner}",
                        f"{start} call {S_FREE | 3}:0; mov esi, esp{EXIT}; .org 0x40; mov eax, cs; mov ebx, ss;"
                        f" mov ecx, esp; mov edx, [esp]; {prefix} retf {count * size}",
                        level,
                        {"esp": STACK3 - 0x80, "eax": 0, "edx": 0},
                        [
                            *code,
                            descriptor(S_FREE, gate(0xD0 | inner, offset, access, count)),
                            Patch(STACK3 - 0x80, bytes(range(0x80))),
                        ],
                    )


def segments_dropped() -> Iterator[Case]:
    """What an outer level may not use becomes null on the way out."""
    selectors = (0, 1, 3, S_DATA0, S_DATA1 & ~3, S_DATA3, S_CODE0, S_CONFORMING0, S_CONFORMING3, S_CODE3, S_READ_ONLY3)
    for selector in selectors:
        for instruction, flags in (("iretd", "push 2;"), ("retf", "")):
            for level in (1, 3):
                loads = "; ".join(f"mov {register}, eax" for register in ("ds", "es", "fs", "gs"))
                yield Case(
                    f"{instruction} to {level} with {selector:x}",
                    f"mov eax, {selector}; {loads}; push {_STACKS[level]}; push {STACK3}; {flags}"
                    f" push {_CODES[level]}; push {CODE + 0x40}; {instruction}; .org 0x40" + EXIT,
                    patches=[descriptor(S_CODE3, flat(0xFB))],
                )


def fast_calls() -> Iterator[Case]:
    """SYSENTER and SYSEXIT with good and null selectors, from every level."""
    show = "; .org 0x40; pushfd; pop edx; mov eax, cs; mov ebx, ss; mov ecx, esp" + EXIT
    for level in (0, 1, 3, V86):
        width = ".code16; " if level == V86 else ""
        for instruction in ("sysenter", "sysexit"):
            yield Case(f"{instruction} without msr, cpl {level}", f"{width}{instruction}; nop" + EXIT, level)
    for selector in (0, 3, S_CODE0, S_CODE3 & ~3, S_CODE3):
        msrs = ((0x174, selector), (0x175, STACK1), (0x176, CODE + 0x40))
        write = "".join(f"mov ecx, {number}; mov eax, {value}; wrmsr; " for number, value in msrs)
        for flags in (RESET_EFLAGS, RESET_EFLAGS | IF | CF):
            to_ring_3 = (
                f"push {S_DATA3}; push {STACK3}; push {flags}; push {S_CODE3}; push {CODE + 0x3E}; iretd; .org 0x3e; "
            )
            for before in ("", to_ring_3):
                yield Case(
                    f"sysenter cs {selector:x} flags {flags:x} {'ring 3' if before else ''}",
                    f"xor edx, edx; {write} {before} sysenter" + show,
                    registers={"eflags": flags},
                )
            yield Case(
                f"sysexit cs {selector:x} flags {flags:x}",
                f"xor edx, edx; {write} mov ecx, {STACK3 - 8}; mov edx, {CODE + 0x40}; sysexit" + show,
                registers={"eflags": flags},
            )
