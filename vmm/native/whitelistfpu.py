"""The forms of x87, MMX, SSE and SSE2 that fragments may hold, as rows for `whitelist`.

They reach the FPU registers that the guest has, and memory in the window. It must not know how forms are matched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

Row = tuple[str, str, bytes]

_ALONE = (
    "emms f2xm1 fabs fchs fcompp fcos fdecstp fincstp fld1 fldl2e fldl2t fldlg2 fldln2 fldpi fldz fnclex fnop fpatan "
    "fprem fprem1 fptan frndint fscale fsin fsincos fsqrt ftst fucompp fxam fxtract fyl2x fyl2xp1 wait"
)
_STACK = (
    "fadd faddp fcom fcomi fcomp fcompi fdiv fdivp fdivr fdivrp ffree ffreep fld fmul fmulp fst fstp fsub fsubp fsubr "
    "fsubrp fucom fucomi fucomp fucompi"
)
_STACK_TWICE = (
    "fadd fcmovb fcmovbe fcmove fcmovnb fcmovnbe fcmovne fcmovnu fcmovu fdiv fdivr fmul fstpnce fsub fsubr fxch"
)
_STACK_MEMORY = (
    "fadd fbld fbstp fcom fcomp fdiv fdivr fiadd ficom ficomp fidiv fidivr fild fimul fist fistp fisub fisubr fld "
    "fldcw fmul fnstcw fnstsw fst fstp fsub fsubr stmxcsr"
)
# The same for MMX and, with 66h, for SSE2.
_PACKED_SHIFTS = "pslld psllq psllw psrad psraw psrld psrlq psrlw"
_PACKED = (
    f"{_PACKED_SHIFTS} packssdw packsswb packuswb paddb paddd paddq paddsb paddsw paddusb paddusw paddw pand pandn "
    "pavgb pavgw pcmpeqb pcmpeqd pcmpeqw pcmpgtb pcmpgtd pcmpgtw pmaddwd pmaxsw pmaxub pminsw pminub pmulhuw pmulhw "
    "pmullw pmuludq por psadbw psubb psubd psubq psubsb psubsw psubusb psubusw psubw punpckhbw punpckhdq punpckhwd "
    "punpcklbw punpckldq punpcklwd pxor"
)
_PREDICATES = ("eq", "lt", "le", "unord", "neq", "nlt", "nle", "ord")
# Operand 1 is a register or memory; by the mandatory prefix.
_XMM: Final = {
    b"": "addps andnps andps comiss cvtdq2ps cvtps2pd divps maxps minps mulps orps rcpps rsqrtps sqrtps subps ucomiss "
    "unpckhps unpcklps xorps movaps movups movhlps movlhps movhps movlps",
    b"\x66": f"{_PACKED} addpd andnpd andpd comisd cvtpd2ps cvtps2dq cvttpd2dq divpd maxpd minpd mulpd orpd punpckhqdq "
    "punpcklqdq sqrtpd subpd ucomisd unpckhpd unpcklpd xorpd movapd movupd movdqa movhpd movlpd movq movd",
    b"\xf2": "addsd cvtpd2dq cvtsd2ss divsd maxsd minsd mulsd sqrtsd subsd movsd",
    b"\xf3": "addss cvtdq2pd cvtss2sd cvttps2dq divss maxss minss mulss rcpss rsqrtss sqrtss subss movss movdqu movq",
}
_COMPARE: Final = {b"": "ps", b"\x66": "pd", b"\xf2": "sd", b"\xf3": "ss"}
_XMM_IMMEDIATE: Final = {b"": "shufps", b"\x66": "pshufd shufpd", b"\xf2": "pshuflw", b"\xf3": "pshufhw"}
_TO_MEMORY: Final = {
    b"": "movaps movhps movlps movntps movups",
    b"\x66": "movapd movd movdqa movhpd movlpd movntdq movntpd movq movupd",
    b"\xf2": "movsd",
    b"\xf3": "movdqu movss",
}
_TO_GENERAL: Final = {
    b"": "movmskps", b"\x66": "movd movmskpd pmovmskb", b"\xf2": "cvtsd2si cvttsd2si", b"\xf3": "cvtss2si cvttss2si"
}  # fmt: skip


def _rows() -> Iterator[Row]:
    yield _ALONE, "", b""
    yield "fnstsw", "ax", b""
    yield _STACK, "st", b""
    yield _STACK_TWICE, "st, st", b""
    yield _STACK_MEMORY, "win", b""
    yield "movnti", "win, reg", b""
    yield f"{_PACKED} movq", "mm, mm", b""
    yield f"{_PACKED} movq movd", "mm, win", b""
    yield "movd movq movntq", "win, mm", b""
    yield "movd", "mm, reg", b""
    yield "movd pmovmskb", "reg, mm", b""
    yield "pshufw", "mm, mm, imm", b""
    yield "pinsrw pshufw", "mm, win, imm", b""
    yield "pinsrw", "mm, reg, imm", b""
    yield "pextrw", "reg, mm, imm", b""
    yield _PACKED_SHIFTS, "mm, imm", b""
    yield f"{_PACKED_SHIFTS} pslldq psrldq", "xmm, imm", b"\x66"
    yield "movdq2q", "mm, xmm", b"\xf2"
    yield "movq2dq", "xmm, mm", b"\xf3"
    yield "movd", "xmm, reg", b"\x66"
    yield "pinsrw", "xmm, reg, imm", b"\x66"
    yield "pinsrw", "xmm, win, imm", b"\x66"
    yield "pextrw", "reg, xmm, imm", b"\x66"
    for prefix, kind in ((b"\xf2", "sd"), (b"\xf3", "ss")):
        yield f"cvtsi2{kind}", "xmm, reg", prefix
        yield f"cvtsi2{kind}", "xmm, win", prefix
        yield f"cvt{kind}2si cvtt{kind}2si", "reg, win", prefix
    for prefix, kind in _COMPARE.items():
        compare = " ".join(f"cmp{name}{kind}" for name in _PREDICATES)
        for source in ("xmm", "win"):
            yield f"{_XMM[prefix]} {compare}", f"xmm, {source}", prefix
            yield f"{_XMM_IMMEDIATE[prefix]} cmp{kind}".strip(), f"xmm, {source}, imm", prefix
        yield _TO_MEMORY[prefix], "win, xmm", prefix
        yield _TO_GENERAL[prefix], "reg, xmm", prefix


ROWS: Final = tuple(_rows())
"""Mnemonics, kinds of operands, mandatory prefix."""
