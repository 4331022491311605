"""Owns the native execution of single integer instructions on this host: registers and flags in, the same out.

It runs bytes that our own tables made and nothing else; it must never be handed bytes of a guest.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from array import array
from collections.abc import Callable
from typing import Final, Self

from machine.flags import STATUS_MASK

WORDS_PER_STATE: Final = 9
"""A state is nine 32-bit words: EAX ECX EDX EBX ESP EBP ESI EDI, in ModRM order, and EFLAGS. ESP is not loaded."""

EFLAGS_WORD: Final = 8
BATCH_STATES: Final = 4096

_STATE_BYTES: Final = WORDS_PER_STATE * 4
_MAP_32BIT: Final = 0x40  # Linux, x86-64 only: place the mapping in the low 2 GiB
_CODE_BYTES: Final = 128 * 1024
_LONGEST_CODE_BYTES: Final = 64

# The low mapping: a stack for 32-bit code (a signal that arrives there needs room for its frame), a slot that keeps
# the 64-bit stack pointer meanwhile, and the states.
_STACK_BYTES: Final = 128 * 1024
_SAVED_RSP_OFFSET: Final = _STACK_BYTES
_STATES_OFFSET: Final = _STACK_BYTES + 64
_LOW_BYTES: Final = -(-(_STATES_OFFSET + BATCH_STATES * _STATE_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

# Linux's flat 32-bit user segments on x86-64.
_USER32_CS: Final = 0x23
_USER_DS: Final = 0x2B

# What LAR reports in bits 23:8, without A and AVL: present, DPL 3, code, readable, D=1, L=0; and present, DPL 3, data,
# writable, B=1.
_LAR_MASK: Final = 0x60FE00
_LAR_USER32_CODE: Final = 0x40FA00
_LAR_USER_DATA: Final = 0x40F200

# (states, how many). It keeps the GIL: a batch takes microseconds, and nobody else may touch the states meanwhile.
_ROUTINE: Final = ctypes.PYFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)


class HostCpuError(Exception):
    """This host cannot execute what was asked: not x86-64 Linux, no executable memory, or no 32-bit code segment."""


def _le32(value: int) -> bytes:
    return (value & 0xFFFF_FFFF).to_bytes(4, "little")


def _long_mode_loop(code: bytes) -> bytes:
    """64-bit routine(rdi: states, rsi: how many): run `code` on each state in place."""
    head = bytes.fromhex("55 53 41 56 41 57")  # push rbp, rbx, r14, r15
    head += bytes.fromhex("49 89 FF 49 89 F6")  # mov r15, rdi; mov r14, rsi
    body = b"\x41\x8b\x47\x20"  # mov eax, [r15+32]
    body += b"\x25" + _le32(STATUS_MASK)  # and eax, STATUS_MASK
    body += b"\x50\x9d"  # push rax; popfq
    for reg, offset in ((0, 0), (1, 4), (2, 8), (3, 12), (5, 20), (6, 24), (7, 28)):
        body += bytes((0x41, 0x8B, 0x47 | reg << 3, offset))  # mov reg, [r15+offset]
    body += code
    body += b"\x9c"  # pushfq
    for reg, offset in ((0, 0), (1, 4), (2, 8), (3, 12), (5, 20), (6, 24), (7, 28)):
        body += bytes((0x41, 0x89, 0x47 | reg << 3, offset))  # mov [r15+offset], reg
    body += b"\x58\x41\x89\x47\x20"  # pop rax; mov [r15+32], eax
    body += bytes((0x49, 0x83, 0xC7, _STATE_BYTES))  # add r15, 36
    body += b"\x49\xff\xce"  # dec r14
    body += b"\x0f\x85" + _le32(-(len(body) + 6))  # jnz body
    tail = bytes.fromhex("41 5F 41 5E 5B 5D C3")  # pop r15, r14, rbx, rbp; ret
    return head + body + tail


def _legacy_loop(code: bytes, address: int, low: int, long_mode_cs: int) -> bytes:
    """64-bit routine(rdi: states, rsi: how many) at `address`: run `code` on each state in a 32-bit code segment.

    DS is null in a 64-bit process, so every access goes by EBP or ESP, which imply SS. Nothing is trusted to survive
    the change of mode but what the low mapping keeps.
    """
    head = bytes.fromhex("55 53 41 54 41 55 41 56 41 57")  # push rbp, rbx, r12, r13, r14, r15
    head += b"\x48\x89\x24\x25" + _le32(low + _SAVED_RSP_OFFSET)  # mov [saved], rsp
    head += b"\xbc" + _le32(low + _STACK_BYTES - 64)  # mov esp, stack
    head += b"\x56\x57"  # push rsi; push rdi: the 32-bit code sees [esp] = states, [esp+8] = how many
    head += b"\xff\x2d" + _le32(0)  # jmp far [rip]
    body_address = address + len(head) + 6
    head += _le32(body_address) + _USER32_CS.to_bytes(2, "little")

    body = b"\x8b\x2c\x24"  # mov ebp, [esp]
    body += b"\x8b\x45\x20"  # mov eax, [ebp+32]
    body += b"\x25" + _le32(STATUS_MASK)  # and eax, STATUS_MASK
    body += b"\x50\x9d"  # push eax; popfd
    for reg, offset in ((0, 0), (1, 4), (2, 8), (3, 12), (6, 24), (7, 28), (5, 20)):
        body += bytes((0x8B, 0x45 | reg << 3, offset))  # mov reg, [ebp+offset], EBP last
    body += code
    body += b"\x9c\x55"  # pushfd; push ebp
    body += b"\x8b\x6c\x24\x08"  # mov ebp, [esp+8]
    for reg, offset in ((0, 0), (1, 4), (2, 8), (3, 12), (6, 24), (7, 28)):
        body += bytes((0x89, 0x45 | reg << 3, offset))  # mov [ebp+offset], reg
    body += b"\x58\x89\x45\x14"  # pop eax; mov [ebp+20], eax
    body += b"\x58\x89\x45\x20"  # pop eax; mov [ebp+32], eax
    body += bytes((0x83, 0x04, 0x24, _STATE_BYTES))  # add dword [esp], 36
    body += b"\xff\x4c\x24\x08"  # dec dword [esp+8]
    body += b"\x0f\x85" + _le32(-(len(body) + 6))  # jnz body
    body += b"\xea" + _le32(body_address + len(body) + 7) + long_mode_cs.to_bytes(2, "little")  # jmp far tail

    tail = b"\x48\x8b\x24\x25" + _le32(low + _SAVED_RSP_OFFSET)  # mov rsp, [saved]
    tail += bytes.fromhex("41 5F 41 5E 41 5D 41 5C 5B 5D C3")  # pop r15, r14, r13, r12, rbx, rbp; ret
    return head + body + tail


class HostCpu:
    """Executable memory of our own, in which instructions run on the host's CPU.

    Raises:
        HostCpuError: the host is not x86-64 Linux, or does not let a process make memory executable.
    """

    def __init__(self) -> None:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "amd64") or sys.maxsize < 2**32:
            raise HostCpuError(
                f"native probes need a 64-bit Python on x86-64 Linux, not {platform.machine()} {sys.platform}"
            )
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
        )  # fmt: skip
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._libc.munmap.restype = ctypes.c_int

        # The code is mapped twice, so that no page is writable and executable at once.
        code_fd = os.memfd_create("trapgate-hostcpu", os.MFD_CLOEXEC)
        try:
            os.ftruncate(code_fd, _CODE_BYTES)
            self._code = mmap.mmap(code_fd, _CODE_BYTES)
            self._code_host = self._map(_CODE_BYTES, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_SHARED, code_fd)
        finally:
            os.close(code_fd)
        self._low_host = self._map(
            _LOW_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1
        )
        self._states_host = self._low_host + _STATES_OFFSET
        self._code_used_bytes = 0
        self._routines: dict[tuple[bytes, bool], Callable[[int, int], None]] = {}
        self._long_mode_cs, self.has_legacy_mode = self._find_segments()

    def _map(self, length_bytes: int, protection: int, flags: int, fd: int) -> int:
        host = self._libc.mmap(None, length_bytes, protection, flags | _MAP_32BIT, fd, 0)
        if host is None or host == 2**64 - 1:
            error = ctypes.get_errno()
            raise HostCpuError(f"no low executable memory for native probes: {os.strerror(error)}")
        return int(host)

    def _find_segments(self) -> tuple[int, bool]:
        """CS of 64-bit code, and whether Linux's flat 32-bit segments are here: LAR tells without a fault."""
        state = array("I", [0] * WORDS_PER_STATE)
        state[6], state[7] = _USER32_CS, _USER_DS
        # mov edx, cs; xor eax, eax; xor ecx, ecx; lar eax, esi; lar ecx, edi (the last two clear ZF if they fail)
        self.run(bytes.fromhex("8C CA 31 C0 31 C9 0F 02 C6 0F 02 CF"), state)
        code_rights, data_rights, long_mode_cs = state[0] & _LAR_MASK, state[1] & _LAR_MASK, state[2]
        return long_mode_cs, code_rights == _LAR_USER32_CODE and data_rights == _LAR_USER_DATA

    def run(self, code: bytes, states: array[int], *, legacy: bool = False) -> None:
        """Execute `code` once on each of `states`, in place.

        Args:
            code: instructions from our own tables that fall through to their end, use ESP only in a balanced way, and
                cannot fault on these states (the caller excludes divides that raise #DE).
            states: type code `I`, `WORDS_PER_STATE` words each; of EFLAGS only the status flags are loaded.
            legacy: run in a 32-bit code segment, for instructions that 64-bit mode lacks.

        Raises:
            HostCpuError: `legacy`, and the host has no 32-bit code segment.
        """
        count, rest = divmod(len(states), WORDS_PER_STATE)
        if states.typecode != "I" or rest:
            raise ValueError("states must be an array('I') of whole states")
        routine = self._routines.get((code, legacy)) or self._emit(code, legacy=legacy)
        source_host, _ = states.buffer_info()
        for first in range(0, count, BATCH_STATES):
            batch = min(BATCH_STATES, count - first)
            here = source_host + first * _STATE_BYTES
            ctypes.memmove(self._states_host, here, batch * _STATE_BYTES)
            routine(self._states_host, batch)
            ctypes.memmove(here, self._states_host, batch * _STATE_BYTES)

    def _emit(self, code: bytes, *, legacy: bool) -> Callable[[int, int], None]:
        if len(code) > _LONGEST_CODE_BYTES:
            raise ValueError(f"{len(code)} bytes are more than one probe needs")
        if legacy and not self.has_legacy_mode:
            raise HostCpuError(
                "the kernel has no 32-bit code segment (IA32 emulation): 32-bit-only instructions cannot run"
            )
        if self._code_used_bytes + 512 > _CODE_BYTES:
            self._routines.clear()
            self._code_used_bytes = 0
        start = self._code_used_bytes
        if legacy:
            routine_bytes = _legacy_loop(code, self._code_host + start, self._low_host, self._long_mode_cs)
        else:
            routine_bytes = _long_mode_loop(code)
        self._code[start : start + len(routine_bytes)] = routine_bytes
        self._code_used_bytes = -(-(start + len(routine_bytes)) // 16) * 16
        routine: Callable[[int, int], None] = _ROUTINE(self._code_host + start)
        self._routines[code, legacy] = routine
        return routine

    def close(self) -> None:
        """Unmap everything; the object cannot be used afterwards. Closing twice is harmless."""
        if self._code.closed:
            return
        self._routines.clear()
        self._code.close()
        self._libc.munmap(self._code_host, _CODE_BYTES)
        self._libc.munmap(self._low_host, _LOW_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
