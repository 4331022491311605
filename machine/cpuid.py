"""Which CPU the guest finds: CPUID's answers, the instructions and the control bits that go with them.

It must not know what the instructions do. The models lack what the machine lacks: APIC, MTRRs, machine checks.

Source: SDM Vol. 2A, "CPUID".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from iced_x86 import CpuidFeature

from machine.state import (
    CR4_DE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_PVI,
    CR4_TSD,
    CR4_VME,
)

FEATURE_FPU = 1 << 0
FEATURE_VME = 1 << 1
FEATURE_DE = 1 << 2
FEATURE_PSE = 1 << 3
FEATURE_TSC = 1 << 4
FEATURE_MSR = 1 << 5
FEATURE_PAE = 1 << 6
FEATURE_CX8 = 1 << 8
FEATURE_SEP = 1 << 11
FEATURE_PGE = 1 << 13
FEATURE_CMOV = 1 << 15
FEATURE_CLFSH = 1 << 19
FEATURE_MMX = 1 << 23
FEATURE_FXSR = 1 << 24
FEATURE_SSE = 1 << 25
FEATURE_SSE2 = 1 << 26

_BASE_FEATURES = (
    FEATURE_VME
    | FEATURE_DE
    | FEATURE_PSE
    | FEATURE_TSC
    | FEATURE_MSR
    | FEATURE_PAE
    | FEATURE_CX8
    | FEATURE_SEP
    | FEATURE_PGE
    | FEATURE_CMOV
)
_BASE_CR4 = CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_PGE

# What the decoder calls the instruction sets. It knows every later extension too; their opcodes are #UD here.
P6_INSTRUCTIONS: Final[frozenset[int]] = frozenset(
    {
        CpuidFeature.INTEL8086,
        CpuidFeature.INTEL186,
        CpuidFeature.INTEL286,
        CpuidFeature.INTEL386,
        CpuidFeature.INTEL486,
        CpuidFeature.CPUID,
        CpuidFeature.CX8,
        CpuidFeature.TSC,
        CpuidFeature.MSR,
        CpuidFeature.CMOV,
        CpuidFeature.SEP,
        CpuidFeature.MULTIBYTENOP,
        CpuidFeature.PAUSE,
    }
)
PENTIUM4_INSTRUCTIONS: Final[frozenset[int]] = P6_INSTRUCTIONS | {
    CpuidFeature.FPU,
    CpuidFeature.FPU287,
    CpuidFeature.FPU387,
    CpuidFeature.MMX,
    CpuidFeature.FXSR,
    CpuidFeature.SSE,
    CpuidFeature.SSE2,
    CpuidFeature.CLFSH,
}


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A CPU model.

    Attributes:
        vendor: 12 characters.
        signature: leaf 1 EAX: family, model, stepping.
        features: leaf 1 EDX.
        brand: up to 47 characters, in leaves 80000002h to 80000004h.
        cr4_mask: the bits of CR4 that can be set.
        cache_line_bytes: what CLFLUSH works on; 0 without it.
        instructions: the decoder's names of the instruction sets there are.
    """

    vendor: str = "GenuineIntel"
    signature: int = 0x0000_0665
    features: int = _BASE_FEATURES
    brand: str = "trapgate virtual CPU"
    cr4_mask: int = _BASE_CR4
    cache_line_bytes: int = 0
    instructions: frozenset[int] = P6_INSTRUCTIONS

    def leaf(self, eax: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX for a CPUID leaf; beyond the highest one it answers as the highest basic leaf does."""
        if eax == 0:
            words = [int.from_bytes(self.vendor[n : n + 4].encode(), "little") for n in (0, 4, 8)]
            return 1, words[0], words[2], words[1]
        if eax == 0x8000_0000:
            return 0x8000_0004, 0, 0, 0
        if eax == 0x8000_0001:
            return 0, 0, 0, 0
        if 0x8000_0002 <= eax <= 0x8000_0004:
            text = self.brand.encode().ljust(48, b"\0")[(eax - 0x8000_0002) * 16 :]
            a, b, c, d = (int.from_bytes(text[n : n + 4], "little") for n in (0, 4, 8, 12))
            return a, b, c, d
        return self.signature, self.cache_line_bytes // 8 << 8, 0, self.features

    @property
    def has_fpu(self) -> bool:
        """x87, and with it MMX, SSE and SSE2: the models have all of them or none."""
        return bool(self.features & FEATURE_FPU)


P6_NO_FPU: Final = CpuModel()
"""A P6-class part without FPU."""

PENTIUM4: Final = CpuModel(
    signature=0x0000_0F29,
    features=_BASE_FEATURES | FEATURE_FPU | FEATURE_CLFSH | FEATURE_MMX | FEATURE_FXSR | FEATURE_SSE | FEATURE_SSE2,
    cr4_mask=_BASE_CR4 | CR4_OSFXSR | CR4_OSXMMEXCPT,
    cache_line_bytes=64,
    instructions=PENTIUM4_INSTRUCTIONS,
)
"""Family 15, as a Pentium 4 reports itself, with x87, MMX, SSE and SSE2."""

MODELS: Final = {"p6-nofpu": P6_NO_FPU, "pentium4": PENTIUM4}
"""The models by the names that a command line uses."""
