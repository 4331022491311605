"""What each image does, as rows that a test runs against an image file: the shipped one, or one built just now."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.guests import qemu

DEBUG_EXIT = 2  # QEMU ends with twice the guest's status, plus one


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One run of the image `name`.

    Attributes:
        append: its command line, or for a disk image the interface of its drive.
        serial: a regular expression that all of its output must match.
        status: QEMU's exit status; None if it never ends, and is stopped after its output.
    """

    name: str
    append: str
    serial: str
    status: int | None

    def check(self, image: Path) -> None:
        """Run `image` and compare."""
        disk = image.suffix == ".img"
        arguments = qemu.drive(image, self.append) if disk else qemu.kernel(image, self.append)
        if self.status is None:
            assert re.fullmatch(self.serial, qemu.run_until(arguments, self.serial.splitlines()[-1])) is not None
            return
        outcome = qemu.run(arguments)
        assert re.fullmatch(self.serial, outcome.serial, re.DOTALL), outcome.serial
        assert outcome.status == self.status


# What SeaBIOS 1.16 says of 128 MiB.
_E820 = r"""e820 0000000000000000 \+ 000000000009fc00 type 01
e820 000000000009fc00 \+ 0000000000000400 type 02
e820 00000000000f0000 \+ 0000000000010000 type 02
e820 0000000000100000 \+ 0000000007ee0000 type 01
(e820 0000000007fe0000 \+ 0000000000020000 type 02
)?e820 00000000fffc0000 \+ 0000000000040000 type 02
"""
_BENCH_SUMS = {
    "sieve": "d8b8d73b",
    "crc32": "d1df4327",
    "fib": "00001a6d",
    "matrix": "0c398d64",
    "memory": "2dd81fc2",
    "calls": "99b75f68",
    "sort": "aaa42b4a",
    "lz": "0b48ad63",
    "nbody": "2ec2f5fb",
    "mandelbrot": "4beda7b2",
}
_BENCH_ONCE = "".join(f"start {name}\n{name} 1 {checksum}\n" for name, checksum in _BENCH_SUMS.items())

# What the nanobenchmarks prove themselves by: events that were counted, sums of what was loaded; 0 for all others.
NANO_NAMES = (
    *("empty", "user_empty", "syscall_int", "syscall_sysenter", "in", "out", "mov_cr3", "mov_from_cr0", "call_ret"),
    *("call_1_target", "call_256_targets", "call_256_sites", "page_fault", "divide_error", "pte", "pte_invlpg"),
    *("pushf_popf", "cli_sti", "mov_ds", "mov_fs", "rdtsc", "cpuid", "iret", "patched_code", "process_switch"),
    *("process_switch_40", "new_process", "vga_store"),
)
_NANO_SUMS = {
    **dict.fromkeys(("syscall_int", "syscall_sysenter", "page_fault", "divide_error", "process_switch"), 100),
    "call_1_target": 100 * 7,
    "call_256_targets": 0x3276,
    **dict.fromkeys(("process_switch_40", "new_process"), 100 * sum(range(0, 256, 32))),
    "pte_invlpg": 50 * 3 + 50 * 5,
    "patched_code": 100 * 101 // 2,
}
_NANO_ONCE = "".join(f"start {name}\n{name} 100 {_NANO_SUMS.get(name, 0):x}\n" for name in NANO_NAMES)

# The workloads of `fork` by the formulas that the statuses and sums of its processes follow; that of the computation is
# what the host computes, see test_behaviour.
FORK_COMPUTE_SUMS = {1: 0x1D337CEC, 10: 0xC5ED62CB}


def fork_results(count: int) -> dict[str, int]:
    """The result of each workload of `fork` but `compute`."""
    return {
        "forkwait": sum(i % 16 + i // 16 + i + 1 for i in range(count)),
        "syscalls": count,
        "ptchurn": sum(range(count)),
        "io": sum(i & 0xFF for i in range(count)),
        "mix": 2 * count * (FORK_COMPUTE_SUMS[1] + 1 + 2),
    }


FORK_NAMES = ("forkwait", "compute", "syscalls", "ptchurn", "io", "mix")
_FORK_SUMS = {**fork_results(10), "compute": FORK_COMPUTE_SUMS[10]}
_FORK_ONCE = "".join(f"start {name}\n{name} 10 {_FORK_SUMS[name] & 0xFFFFFFFF:x}\n" for name in FORK_NAMES)
# Each child copies the page that it writes to; then its parent has that page, and that of its stack, for itself.
_FORK_COUNTS = r"counts forks=3 system_calls=10 page_faults=25 copies=3 reuses=6 zeroed=16 switches=\d+ ticks=\d+\n"

BEHAVIOURS = (
    Behaviour(
        "demo",
        "run=echo hello;pgfault;poweroff",
        r"trapgate demo kernel: \d+ KiB RAM, 100 Hz, system calls by int 80h and sysenter\n"
        r"demo> echo hello\nhello\n"
        r"demo> pgfault\npid 4 \(crash\) killed: page fault at 00c[0-9a-f]{5}, write to 00000010, not present\n"
        r"status 142\ndemo> poweroff\n",
        0,
    ),
    Behaviour(
        "boot",
        "floppy",
        r"(.*\n)?trapgate boot guest\ndrive 00\nchs: read\nheads 02 sectors 12\nlba: not supported\n"
        rf"base memory KiB 027[0-9a-f]\n{_E820}a20: open\nentering protected mode\nprotected mode\n",
        0,
    ),
    Behaviour(
        "boot",
        "ide",
        r"(.*\n)?trapgate boot guest\ndrive 80\nchs: read\nheads [0-9a-f]{2} sectors 3f\nlba: same\n"
        rf"base memory KiB 027[0-9a-f]\n{_E820}a20: open\nentering protected mode\nprotected mode\n",
        0,
    ),
    Behaviour("bench", "", f"{_BENCH_ONCE}done\n", 0),
    Behaviour("nano", "", f"{_NANO_ONCE}done\n", 0),
    Behaviour("nano", "page_fault=3 in", "start page_fault\npage_fault 3 3\nstart in\nin 100 0\ndone\n", 0),
    Behaviour("fork", "", f"{_FORK_ONCE}done\n", 0),
    Behaviour("fork", "hz=20000 forkwait=3 counts", f"start forkwait\nforkwait 3 9\n{_FORK_COUNTS}done\n", 0),
    Behaviour("tiny-triple", "", "triple\n", 0),
    Behaviour("tiny-hlt", "", r"\.{10}\n", 10 * DEBUG_EXIT + 1),
    Behaviour("tiny-loop", "", "loop\n", None),
    Behaviour("tiny-exit", "", "exit\n", 21 * DEBUG_EXIT + 1),
    Behaviour("tiny-exit", "status=9 77 3", "exit\n", 77 * DEBUG_EXIT + 1),
    Behaviour("tiny-selfmod", "", "abcde selfmod\n", 1),
    Behaviour("tiny-stepper", "", "stepper\n", 0x15 * DEBUG_EXIT + 1),
)
