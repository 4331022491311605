"""Host address space: reservations, mappings of files into them, protection; by way of libc's mmap.

It must not know what the memory is for.
"""

from __future__ import annotations

import ctypes
import mmap
import os

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE, _MAP_POPULATE = 1, 2, 16, 32, 0x4000, 0x8000
_MADV_DONTNEED, _MADV_NOHUGEPAGE, _MADV_POPULATE_READ = 4, 15, 22
_MAP_FAILED = 2**64 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_uint64
_mmap.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
_mprotect = _libc.mprotect
_mprotect.restype = ctypes.c_int
_mprotect.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int]
_madvise = _libc.madvise
_madvise.restype = ctypes.c_int
_madvise.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int]
_mincore = _libc.mincore
_mincore.restype = ctypes.c_int
_mincore.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_char_p]


class HostMemoryError(OSError):
    """The host refused a mapping; errno says why."""


def _failed(what: str) -> HostMemoryError:
    number = ctypes.get_errno()
    return HostMemoryError(number, f"{what}: {os.strerror(number)}")


def _map(host: int, length_bytes: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    got: int = _mmap(host, length_bytes, protection, flags, fd, offset)
    if got == _MAP_FAILED:
        raise _failed(f"mmap of {length_bytes:#x} bytes")
    return got


def reserve(length_bytes: int, *, align: int = 4096) -> int:
    """Reserve inaccessible host addresses; returns the first one, a multiple of `align`. Costs no memory."""
    got = _map(0, length_bytes + align, PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE)
    first = (got + align - 1) & -align
    if first > got:
        release(got, first - got)
    tail = got + align - first
    if tail:
        release(first + length_bytes, tail)
    return first


def release(host: int, length_bytes: int) -> None:
    """Give addresses back."""
    if _munmap(host, length_bytes):
        raise _failed(f"munmap of {length_bytes:#x} bytes")


def map_file(host: int, length_bytes: int, fd: int, offset: int, *, writable: bool, populate: bool = False) -> None:
    """Put `length_bytes` of a file at a reserved address, replacing what was there."""
    protection = PROT_READ | (PROT_WRITE if writable else 0)
    _map(host, length_bytes, protection, _MAP_SHARED | _MAP_FIXED | (_MAP_POPULATE if populate else 0), fd, offset)


def map_anonymous(length_bytes: int, *, host: int = 0) -> int:
    """Zeroed private memory, writable, at a reserved address or anywhere; only touched pages cost memory."""
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if host else 0)
    return _map(host, length_bytes, PROT_READ | PROT_WRITE, flags)


def unmap(host: int, length_bytes: int) -> None:
    """Make a range of a reservation inaccessible again; the addresses stay reserved."""
    _map(host, length_bytes, PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED)


def protect(host: int, length_bytes: int, *, writable: bool) -> None:
    """Allow or forbid writing to mapped pages."""
    if _mprotect(host, length_bytes, PROT_READ | (PROT_WRITE if writable else 0)):
        raise _failed(f"mprotect of {length_bytes:#x} bytes")


def forbid(host: int, length_bytes: int) -> None:
    """Make mapped pages inaccessible: a guard."""
    if _mprotect(host, length_bytes, PROT_NONE):
        raise _failed(f"mprotect of {length_bytes:#x} bytes")


def discard(host: int, length_bytes: int) -> None:
    """Let anonymous memory read as zero again and cost nothing."""
    if _madvise(host, length_bytes, _MADV_DONTNEED):
        raise _failed(f"madvise of {length_bytes:#x} bytes")


def use_small_pages(host: int, length_bytes: int) -> None:
    """Never back a sparse table with huge pages: one touched entry would cost 2 MiB."""
    # A kernel without transparent huge pages refuses the advice with EINVAL, and needs none.
    _madvise(host, length_bytes, _MADV_NOHUGEPAGE)


def populate_resident(host: int, length_bytes: int) -> None:
    """Enter mapped pages of a file into the host's page tables, if most of them are in memory anyhow.

    A page costs 0.5 us so, and 1.3 us when it is touched first; one that has to be allocated costs 2.8 us and memory.
    """
    pages = length_bytes + 4095 >> 12
    resident = ctypes.create_string_buffer(pages)
    if not _mincore(host, length_bytes, resident) and resident.raw.count(b"\1") > pages * 3 // 4:
        # A kernel before 5.14 refuses the advice with EINVAL; then each page is entered when it is touched.
        _madvise(host, length_bytes, _MADV_POPULATE_READ)


def view(host: int, length_bytes: int) -> memoryview:
    """A writable view of bytes at a host address; it must not outlive the mapping."""
    return memoryview((ctypes.c_char * length_bytes).from_address(host)).cast("B")


def map_code(host: int, code: bytes) -> None:
    """Put `code`, at most a page, at a reserved address: writable until it stands there, then only executable."""
    map_anonymous(4096, host=host)
    view(host, len(code))[:] = code
    if _mprotect(host, 4096, PROT_READ | PROT_EXEC):
        raise _failed("mprotect of code")


class DualMapping:
    """One memfd, seen writable through `data` by us and executable at `host` by the CPU: no page is both."""

    def __init__(self, length_bytes: int, name: str, *, host: int = 0) -> None:
        """Make it; with `host` at that reserved address, else anywhere."""
        self.length_bytes = length_bytes
        self._reserved = bool(host)
        fd = os.memfd_create(name)
        try:
            os.ftruncate(fd, length_bytes)
            self.data = mmap.mmap(fd, length_bytes)
            self.host = _map(host, length_bytes, PROT_READ | PROT_EXEC, _MAP_SHARED | (_MAP_FIXED if host else 0), fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Unmap both views, a reserved address staying reserved; no code of it may be running."""
        if self._reserved:
            unmap(self.host, self.length_bytes)
        else:
            release(self.host, self.length_bytes)
        self.data.close()
