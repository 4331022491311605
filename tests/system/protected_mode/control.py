"""Control registers, debug registers, MSRs and privileged instructions at every level."""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.protected_mode.arena import CR4_DE, CR4_TSD
from tests.system.protected_mode.harness import V86, Case
from tests.system.protected_mode.segments import EXIT

_LEVELS = (0, 3, V86)
_CR0_VALUES = (
    0x11, 0x13, 0x1F, 0x31, 0x10011, 0x40011, 0x20000011, 0x40000011, 0x60000011, 0x7FFAFFD1, 0x7FFFFFFF, 0x80000010,
    0xA0000011,
)  # fmt: skip
# MCE and PCE are left out: whether they exist is the CPU model's choice.
_CR4_BITS = (0, *(1 << n for n in range(32) if n not in (6, 8, 9, 10)))


def _at(level: int, name: str, code: str, **registers: int) -> Case:
    width = ".code16; " if level == V86 else ""
    return Case(f"{name} cpl {level} {registers}", width + code + EXIT, level, registers)


def control_registers() -> list[Case]:
    """MOV to and from CR0 to CR7, LMSW, SMSW, CLTS."""
    return [case for level in _LEVELS for case in _control_registers(level)]


def _control_registers(level: int) -> Iterator[Case]:
    for value in _CR0_VALUES:
        yield _at(level, f"cr0={value:x}", f"mov eax, {value}; mov cr0, eax; mov ebx, cr0; smsw ecx; smsw dx")
    for value in _CR4_BITS:
        yield _at(level, f"cr4={value:x}", f"mov eax, {value}; mov cr4, eax; mov ebx, cr4")
    for number in range(8):
        yield _at(level, f"read cr{number}", f".byte 0x0f, 0x20, {0xC3 | number << 3}")
        if number:
            write = f"mov ebx, 0x12345018; .byte 0x0f, 0x22, {0xC3 | number << 3}; mov ecx, cr2; mov edx, cr3"
            yield _at(level, f"write cr{number}", write)
    for value in (0, 1, 2, 4, 8, 0xE, 0xF, 0xFFF0, 0xFFFF):
        for cr0 in (0x11, 0x13, 0x19, 0x1F):
            yield _at(level, f"lmsw {value:x}", f"mov ax, {value}; lmsw ax; mov ebx, cr0", cr0=cr0)
    for cr0 in (0x11, 0x19, 0x1F):
        yield _at(level, "clts", "clts; smsw eax", cr0=cr0)


def debug_registers() -> list[Case]:
    """MOV to and from DR0 to DR7, CR4.DE, and the guard of DR7.GD."""
    return [case for level in _LEVELS for case in _debug_registers(level)]


def _debug_registers(level: int) -> Iterator[Case]:
    for number in range(8):
        read, write = (f".byte 0x0f, {opcode}, {0xC3 | number << 3}" for opcode in (0x21, 0x23))
        for cr4 in (0, CR4_DE):
            # Bit 11 of DR7 is one that some models have; GD has cases of its own.
            for value in (0, 0x400, 0xFF, 0x123453FF, 0xFFFFD7FF):
                see = "mov ecx, dr6; mov edx, dr7; mov eax, 0x400; mov dr7, eax"
                code = f"mov ebx, {value}; {write}; xor ebx, ebx; {read}; {see}"
                yield _at(level, f"dr{number}={value:x}", code, cr4=cr4)
            for access in (read, write):
                yield _at(level, f"guarded dr{number} {access}", f"mov eax, 0x2400; mov dr7, eax; {access}", cr4=cr4)


def model_registers() -> Iterator[Case]:
    """RDMSR and WRMSR of the SYSENTER registers, of the TSC and of what does not exist; RDTSC under CR4.TSD."""
    for level in _LEVELS:
        for number in (0x174, 0x175, 0x176, 0x10, 0x2345, 0x12345678):
            drop = "xor eax, eax; xor edx, edx" if number == 0x10 else "nop"
            write = f"mov ecx, {number}; mov eax, 0x1234; xor edx, edx; wrmsr; xor eax, eax; rdmsr; {drop}"
            yield _at(level, f"wrmsr {number:x}", write)
            yield _at(level, f"rdmsr {number:x}", f"mov ecx, {number}; rdmsr; {drop}")
        for cr4 in (0, CR4_TSD):
            yield _at(level, "rdtsc", "rdtsc; xor eax, eax; xor edx, edx", cr4=cr4)


def privileged() -> list[Case]:
    """What rings 1 to 3 and virtual-8086 mode may not do."""
    names = ("hlt", "invd", "wbinvd", "invlpg [0]", "lgdt [0]", "lidt [0]", "lldt ax", "ltr ax", "clts", "lmsw ax")
    return [_at(level, name, name) for level in (1, 2, 3, V86) for name in names]
