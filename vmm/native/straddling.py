"""Instructions that lie in two pages: host code that looks whether the second page still holds what was translated.

The bytes are read through the window, as the CPU fetches them: a page that is not there is a page fault, and whatever
page is there now is the right one. So nothing else depends on that page. It must not know which instruction it is.
"""

from __future__ import annotations

from vmm.native.operands import ECX, R8D, R9, R9D, Memory, address
from vmm.native.unit import Draft


def emit_check(draft: Draft, eip: int, beyond: bytes) -> None:
    """Call the instruction at `eip` out unless the next page begins with `beyond`.

    for each piece: R9D = [piece]; R8D = ECX; ECX = R9D - its value; if not ECX: ECX = R8D, else: ECX = R8D; callout
    """
    emit = draft.asm.emit
    first = (draft.mode.linear(eip) | 0xFFF) + 1
    at = 0
    while at < len(beyond):
        size_bytes = next(size for size in (4, 2, 1) if at + size <= len(beyond))
        value = int.from_bytes(beyond[at : at + size_bytes], "little")
        linear = first + at
        source = Memory(8 * size_bytes, displacement=linear - (1 << 32) if linear >> 31 else linear, gs=True)
        emit("mov" if size_bytes == 4 else "movzx", R9D, source)
        emit("mov", R8D, ECX)
        emit("lea", ECX, address(R9, -value if value < 1 << 31 else (1 << 32) - value))
        unchanged = draft.asm.jump_if_ecx_is_zero()
        emit("mov", ECX, R8D)
        draft.callout_early(eip)
        draft.asm.bind_rel8(unchanged)
        emit("mov", ECX, R8D)
        at += size_bytes
