"""One register of the guest: what gdb is told of it, and how it is read and written.

It must not know any particular register.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gdbstub.target import Register
from machine.cpu import Cpu


@dataclass(frozen=True, slots=True)
class Access:
    """How one register is read and written; without `write` it is for reading only.

    `read` gives None where the CPU model has no such register.
    """

    register: Register
    read: Callable[[Cpu], int | None]
    write: Callable[[Cpu, int], None] | None = None
