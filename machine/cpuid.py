"""Which CPU the guest finds: CPUID's answers, and the control bits that follow from them.

Source: SDM Vol. 2A, "CPUID"; the model is a P6-class part without FPU, APIC and MTRRs, running at a virtual 1 GHz.
"""

from __future__ import annotations

from dataclasses import dataclass

from machine.state import CR4_DE, CR4_PAE, CR4_PGE, CR4_PSE, CR4_PVI, CR4_TSD, CR4_VME

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


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A CPU model.

    Attributes:
        vendor: 12 characters.
        signature: leaf 1 EAX: family, model, stepping.
        features: leaf 1 EDX.
        brand: up to 47 characters, in leaves 80000002h to 80000004h.
        cr4_mask: the bits of CR4 that can be set.
    """

    vendor: str = "GenuineIntel"
    signature: int = 0x0000_0665
    features: int = _BASE_FEATURES
    brand: str = "trapgate virtual CPU"
    cr4_mask: int = CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_PGE

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
        return self.signature, 0, 0, self.features
