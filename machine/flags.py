"""Owns the layout of EFLAGS: masks, bit numbers, the parity table and the sixteen condition codes.

Plain ints only, because every simulated instruction passes here; must not know the CPU state or any instruction.
"""

from collections.abc import Callable
from typing import Final

CF_BIT: Final = 0
PF_BIT: Final = 2
AF_BIT: Final = 4
ZF_BIT: Final = 6
SF_BIT: Final = 7
TF_BIT: Final = 8
IF_BIT: Final = 9
DF_BIT: Final = 10
OF_BIT: Final = 11
IOPL_BIT: Final = 12
NT_BIT: Final = 14
RF_BIT: Final = 16
VM_BIT: Final = 17
AC_BIT: Final = 18
VIF_BIT: Final = 19
VIP_BIT: Final = 20
ID_BIT: Final = 21

CF: Final = 1 << CF_BIT
PF: Final = 1 << PF_BIT
AF: Final = 1 << AF_BIT
ZF: Final = 1 << ZF_BIT
SF: Final = 1 << SF_BIT
TF: Final = 1 << TF_BIT
IF: Final = 1 << IF_BIT
DF: Final = 1 << DF_BIT
OF: Final = 1 << OF_BIT
IOPL: Final = 3 << IOPL_BIT
NT: Final = 1 << NT_BIT
RF: Final = 1 << RF_BIT
VM: Final = 1 << VM_BIT
AC: Final = 1 << AC_BIT
VIF: Final = 1 << VIF_BIT
VIP: Final = 1 << VIP_BIT
ID: Final = 1 << ID_BIT

STATUS_MASK: Final = CF | PF | AF | ZF | SF | OF
"""The six flags that arithmetic writes (SDM Vol. 1, "Status Flags")."""

ALWAYS_SET: Final = 1 << 1
"""Bit 1 reads as one always."""

DEFINED_MASK: Final = STATUS_MASK | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID
"""Every bit that can change; the others read as zero, but for `ALWAYS_SET`."""

PARITY: Final = tuple(0 if byte.bit_count() & 1 else PF for byte in range(256))
"""`PARITY[result & 0xFF]` is `PF` for an even number of ones, else 0."""

NAMES: Final = (
    ("CF", CF),
    ("PF", PF),
    ("AF", AF),
    ("ZF", ZF),
    ("SF", SF),
    ("TF", TF),
    ("IF", IF),
    ("DF", DF),
    ("OF", OF),
    ("IOPL", IOPL),
    ("NT", NT),
    ("RF", RF),
    ("VM", VM),
    ("AC", AC),
    ("VIF", VIF),
    ("VIP", VIP),
    ("ID", ID),
)
"""Every field with its mask, lowest bit first."""


def describe(eflags: int) -> str:
    """Names of the fields of `eflags` that are not zero, highest first, such as `OF IOPL=3 IF`; `-` for none."""
    words = [
        f"IOPL={(eflags & IOPL) >> IOPL_BIT}" if mask == IOPL else name
        for name, mask in reversed(NAMES)
        if eflags & mask
    ]
    return " ".join(words) or "-"


# SF and OF are four bits apart: shifting EFLAGS right by this much puts OF where SF is.
_OF_TO_SF: Final = OF_BIT - SF_BIT


def is_overflow(eflags: int) -> bool:
    """O: OF = 1."""
    return eflags & OF != 0


def is_not_overflow(eflags: int) -> bool:
    """NO: OF = 0."""
    return eflags & OF == 0


def is_below(eflags: int) -> bool:
    """B, C, NAE: CF = 1."""
    return eflags & CF != 0


def is_not_below(eflags: int) -> bool:
    """NB, NC, AE: CF = 0."""
    return eflags & CF == 0


def is_zero(eflags: int) -> bool:
    """Z, E: ZF = 1."""
    return eflags & ZF != 0


def is_not_zero(eflags: int) -> bool:
    """NZ, NE: ZF = 0."""
    return eflags & ZF == 0


def is_not_above(eflags: int) -> bool:
    """BE, NA: CF = 1 or ZF = 1."""
    return eflags & (CF | ZF) != 0


def is_above(eflags: int) -> bool:
    """NBE, A: CF = 0 and ZF = 0."""
    return eflags & (CF | ZF) == 0


def is_sign(eflags: int) -> bool:
    """S: SF = 1."""
    return eflags & SF != 0


def is_not_sign(eflags: int) -> bool:
    """NS: SF = 0."""
    return eflags & SF == 0


def is_parity(eflags: int) -> bool:
    """P, PE: PF = 1."""
    return eflags & PF != 0


def is_not_parity(eflags: int) -> bool:
    """NP, PO: PF = 0."""
    return eflags & PF == 0


def is_less(eflags: int) -> bool:
    """L, NGE: SF and OF differ."""
    return (eflags ^ (eflags >> _OF_TO_SF)) & SF != 0


def is_not_less(eflags: int) -> bool:
    """NL, GE: SF and OF are equal."""
    return (eflags ^ (eflags >> _OF_TO_SF)) & SF == 0


def is_not_greater(eflags: int) -> bool:
    """LE, NG: ZF = 1, or SF and OF differ."""
    return ((eflags ^ (eflags >> _OF_TO_SF)) & SF) | (eflags & ZF) != 0


def is_greater(eflags: int) -> bool:
    """NLE, G: ZF = 0, and SF and OF are equal."""
    return ((eflags ^ (eflags >> _OF_TO_SF)) & SF) | (eflags & ZF) == 0


CONDITIONS: Final[tuple[Callable[[int], bool], ...]] = (
    is_overflow,
    is_not_overflow,
    is_below,
    is_not_below,
    is_zero,
    is_not_zero,
    is_not_above,
    is_above,
    is_sign,
    is_not_sign,
    is_parity,
    is_not_parity,
    is_less,
    is_not_less,
    is_not_greater,
    is_greater,
)
"""Predicates on EFLAGS in the order of the low four opcode bits of Jcc, SETcc and CMOVcc (SDM Vol. 1 appendix B)."""
