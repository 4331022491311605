"""Virtual-8086 mode and what IOPL, VME and PVI do to flags, interrupts and ports, there and in protected mode."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.system.protected_mode.arena import (
    AC,
    ARENA,
    CF,
    CODE,
    CR4_PVI,
    CR4_TSD,
    CR4_VME,
    DATA,
    IF,
    NT,
    OF,
    RESET_EFLAGS,
    RF,
    S_CODE0,
    S_CODE0_16,
    S_DATA0_16,
    S_DATA3,
    S_TSS,
    S_TSS_B,
    STACK0,
    STUBS,
    TF,
    TSS_MAIN,
    V86_CODE,
    VIF,
    VIP,
    VM,
    ZF,
    Patch,
    descriptor,
    gate,
    iopl,
    segment,
    vector_gate,
)
from tests.system.protected_mode.harness import V86, Case
from tests.system.protected_mode.segments import EXIT

_LEVELS = (0, 1, 3, V86)


def _mode(level: int, flags: int) -> dict[str, int]:
    return {"eflags": RESET_EFLAGS | flags | (VM if level == V86 else 0)}


def _code(level: int, code: str) -> str:
    return f".code16; {code}" if level == V86 else code


def interrupt_flag() -> list[Case]:
    """CLI, STI, PUSHF and PUSHFD at every IOPL, with VME, PVI, both and neither, with and without VIP."""
    return [
        Case(
            f"{instruction} cpl {level} iopl {level_needed} cr4 {cr4} flags {flags:x}",
            _code(level, instruction + EXIT),
            level,
            {"cr4": cr4, **_mode(level, flags | iopl(level_needed))},
        )
        for instruction in ("cli", "sti", "cli; sti", "sti; cli", "pushfw", "pushfd")
        for level in _LEVELS
        for level_needed in range(4)
        for cr4 in (0, CR4_VME, CR4_PVI, CR4_VME | CR4_PVI)
        for flags in (0, VIP)
    ]


_IMAGES = (0, 0x3FFFFF & ~(TF | NT | VM), IF, IF | VIF | VIP, iopl(3), NT, AC | RF, TF, CF | ZF | OF)


def _popped(instruction: str, level: int, level_needed: int, cr4: int, flags: int, image: int) -> Case:
    push = f".byte 0x66, 0x68; .long {image}" if level == V86 else f"push {image}"
    return Case(
        f"{instruction} {image:x} cpl {level} iopl {level_needed} cr4 {cr4} flags {flags:x}",
        _code(level, f"{push}; {instruction}; nop" + EXIT),
        level,
        {"cr4": cr4, **_mode(level, flags | iopl(level_needed))},
    )


def popped_flags() -> list[Case]:
    """POPF and POPFD of images that set what they may not."""
    return [
        _popped(instruction, level, level_needed, cr4, flags, image)
        for instruction in ("popfw", "popfd")
        for level in _LEVELS
        for level_needed in (0, 2, 3)
        for cr4 in (0, CR4_VME | CR4_PVI)
        for flags in (0, VIP)
        for image in _IMAGES
    ]


def returned_flags() -> Iterator[Case]:
    """IRET and IRETD within a level."""
    for level in _LEVELS:
        for level_needed in (0, 2, 3):
            for cr4 in (0, CR4_VME | CR4_PVI):
                for flags in (0, VIP):
                    for image in _IMAGES:
                        for name, code in _returns(level, image).items():
                            yield Case(
                                f"{name} {image:x} cpl {level} iopl {level_needed} cr4 {cr4} flags {flags:x}",
                                _code(level, f"{code}; .org 0x30; nop" + EXIT),
                                level,
                                {"cr4": cr4, **_mode(level, flags | iopl(level_needed))},
                            )


def _returns(level: int, image: int) -> dict[str, str]:
    """Code that returns to offset 30h of itself with `image` in the flags; not at all if that were a task switch."""
    if level == V86:
        push = ".byte 0x66, 0x68; .long"
        wide = f"{push} {image}; data32 push cs; {push} 0x30; iretd"
        return {"iretw": f"push {image & 0xFFFF}; push cs; push 0x30; iretw", "iretd": wide}
    return {} if image & NT else {"iretd": f"push {image}; push cs; push {CODE + 0x30}; iretd"}


def pending_virtual_interrupts() -> list[Case]:
    """IRET to an outer level or to virtual-8086 mode with VIF and VIP both set."""
    return [
        Case(
            f"cpl {level} iopl {level_needed} cr4 {cr4} flags {flags:x}",
            _code(level, "mov al, 1" + EXIT),
            level,
            {"cr4": cr4, **_mode(level, flags | iopl(level_needed))},
        )
        for level in (0, 3, V86)
        for level_needed in (0, 2)
        for cr4 in (0, CR4_VME, CR4_PVI, CR4_VME | CR4_PVI)
        for flags in (VIF | VIP, VIF, VIP)
    ]


_EVENTS = (("int 0x31", 0x31), ("int3", 3), ("into", 4), ("int 3", 3), ("int 0x10", 0x10))


def software_interrupts() -> Iterator[Case]:
    """INT n, INT3, INTO: methods 1 to 6 of handling them."""
    show = "; .org 0x40; .code16; pushfw; pop bx; mov cx, sp; pop dx; pop si; pop di; ud2"
    for level_needed in (0, 3):
        for cr4 in (0, CR4_VME):
            for intercepted in (0, 1):
                for flags in (0, IF, VIF, IF | VIF, NT, AC):
                    for event, vector in (
                        ("int 0x31", 0x31),
                        ("int3", 3),
                        ("into", 4),
                        ("int 3", 3),
                        ("int 0x10", 0x10),
                    ):
                        bitmap = bytes([0xFF if intercepted else 0]) * 32
                        yield Case(
                            f"{event} iopl {level_needed} cr4 {cr4} bit {intercepted} flags {flags:x}",
                            f".code16; mov ax, 0x7f; add al, 1; {event}; hlt" + show,
                            V86,
                            {"cr4": cr4, "eflags": RESET_EFLAGS | VM | iopl(level_needed) | flags},
                            [
                                Patch(TSS_MAIN + 0x68, bitmap),
                                vector_gate(0x31, gate(S_CODE0, STUBS + 0x310, 0xEE)),
                                vector_gate(0x10, gate(S_CODE0, STUBS + 0x100, 0x8F)),
                                Patch(vector * 4, struct.pack("<HH", 0x40, V86_CODE)),
                            ],
                        )


_INSTRUCTIONS = (
    "hlt", "lgdt [0]", "lidt [0]", "sgdt [0]", "sidt [0]", "sldt ax", "str ax", "lldt ax", "ltr ax", "lar ax, bx",
    "lsl ax, bx", "verr ax", "verw ax", "arpl ax, bx", "mov eax, cr0", "mov cr0, eax", "mov eax, dr7", "mov dr7, eax",
    "smsw ax", "lmsw ax", "clts", "invd", "wbinvd", "invlpg [0]", "rdmsr", "wrmsr",
    "rdtsc; sub eax, eax; sub edx, edx", "sysenter", "sysexit",
    "mov ax, 0x3333; mov ds, ax; mov es, ax; mov fs, ax; mov gs, ax",
    "mov ss, ax; nop; mov ax, 0x2080; mov ss, ax; nop", "push ds; pop es; pop es", f"jmp {V86_CODE}:0x40",
    f"call {V86_CODE}:0x40", f"push {V86_CODE}; push 0x40; retf", f"push {V86_CODE}; push 0x40; retf 6",
    "lds si, [4]", "les di, [8]", "lss sp, [4]; nop", "bound ax, [0]", "mov ax, [0xffff]", "mov ax, [0xfffe]",
    "mov eax, [0xfffd]", f".byte 0x66, 0xea; .long 0x10040; .word {V86_CODE}",
    f".byte 0x66, 0x9a; .long 0x40; .word {V86_CODE}", f".byte 0x66, 0x9a; .long 0x10040; .word {V86_CODE}",
    "in al, 0x10", "out 0x10, al", "in ax, 0x3f",
)  # fmt: skip


def instructions() -> list[Case]:
    """Instructions that are privileged, undefined, trapped by IOPL, or paragraph arithmetic."""
    data = Patch(DATA, struct.pack("<6H", 5, 0x40, 0x50, 0x2090, 0x60, 0x2222))
    return [
        Case(
            f"{instruction} iopl {level_needed} cr4 {cr4}",
            f".code16; {instruction}{EXIT}; .org 0x40; mov ax, cs; mov bx, sp" + EXIT,
            V86,
            {"cr4": cr4, "eflags": RESET_EFLAGS | VM | iopl(level_needed), "eax": 0x12345678, "ebx": S_DATA3, "edx": 0},
            [data],
        )
        for instruction in _INSTRUCTIONS
        for level_needed in (0, 3)
        for cr4 in (0, CR4_TSD, CR4_VME)
    ]


def exceptions() -> Iterator[Case]:
    """Exceptions and interrupts out of virtual-8086 mode through all kinds of gates."""
    for access in (0x8E, 0x8F, 0x86, 0x87, 0x85):
        is_16 = access in (0x86, 0x87)
        offset, selector = (CODE + 0x40 - ARENA, S_CODE0_16) if is_16 else (CODE + 0x40, S_CODE0)
        offset, selector = (0, S_TSS_B) if access == 0x85 else (offset, selector)
        for event, vector in (("ud2", 6), ("hlt", 13), ("div byte ptr [4]", 0), ("int 0x31", 0x31)):
            for esp in (0x100, 0x10100):
                dpl = 0x60 if vector == 0x31 else 0
                show = "mov eax, esp; mov ecx, ds; mov edx, es; mov esi, fs; mov edi, gs" + EXIT
                yield Case(
                    f"{event} gate {access:x} esp {esp:x}",
                    f".code16; {event}; .org 0x40; .code{16 if is_16 else 32}; {show}",
                    V86,
                    {"esp": esp, "eflags": 0x3FFFFF & ~(TF | VIF | VIP | NT)},
                    [vector_gate(vector, gate(selector, offset, access | dpl)), Patch(DATA, bytes(16))],
                )


def ports() -> list[Case]:
    """The I/O permission bitmap, its ends, and TSSs that have none."""
    bitmap = Patch(TSS_MAIN + 0x88, bytes([0, 0x80, 1, 0, 0xFF, 0]))
    odd = {
        "limit 67": [descriptor(S_TSS, segment(TSS_MAIN, 0x67, 0x89, 0))],
        "limit 66": [descriptor(S_TSS, segment(TSS_MAIN, 0x66, 0x89, 0))],
        "16-bit": [
            descriptor(S_TSS, segment(TSS_MAIN, 0x9F, 0x81, 0)),
            Patch(TSS_MAIN + 2, struct.pack("<HH", STACK0 - ARENA, S_DATA0_16)),
        ],
        "base 9e": [Patch(TSS_MAIN + 0x66, struct.pack("<H", 0x9E))],
    }
    places = (0, 7, 8, 0xF, 0x10, 0x17, 0x18, 0x3F, 0x80, 0xAF, 0xB0, 0xB7, 0xB8, 0xBF, 0xC0, 0x1000, 0xFFFF)
    found = [(level, needed, port, width, "", [bitmap]) for level in (0, 3, V86) for needed in (0, 3) for port in places
             for width in ("al", "ax", "eax") if not needed or port < 0x18]  # fmt: skip
    found += [(level, 0, port, "al", name, patches) for level in (3, V86) for port in (0, 7, 8)
              for name, patches in odd.items()]  # fmt: skip
    return [
        Case(
            f"in {width}, {port:x} cpl {level} iopl {needed} {name}",
            _code(level, f"mov dx, {port}; in {width}, dx; xor eax, eax" + EXIT),
            level,
            _mode(level, iopl(needed)),
            patches,
        )
        for level, needed, port, width, name, patches in found
    ]
