"""The words of the command line: names, values and their meaning, checked; nothing is opened or started here.

It must be quick to import, since every start of the program does it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

USAGE_STATUS = 2
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 1234
DEFAULT_MEMORY = "64M"
DEFAULT_DIFF_INSNS = 10_000_000
DEFAULT_REPORT = "docs/paper"
DEFAULT_DEBUG_EXIT = 0xF4
DEFAULT_ENGINE = "bt"
FALLBACK_ENGINE = "interp"
ENGINE_NAMES = ("bt", "trap", "hybrid", "interp")
TRAP_VARIANTS = ("trap-nested", "trap-kvm")
HOST_FLAGS = "host"
CPU_NAMES = ("p6-nofpu", "pentium4")
DEFAULT_CPU = "pentium4"
_UNITS_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "": 1 << 20}


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int


DEFAULT_ADDRESS = Address(DEFAULT_HOST, DEFAULT_PORT)


@dataclass(frozen=True, slots=True)
class Listening:
    """What --gdb says: an address, or None for nowhere."""

    address: Address | None


@dataclass(frozen=True, slots=True)
class Sink:
    """Where bytes of a serial line or of debugcon go: `kind` is stdio, stdout (no input), none, file or tcp."""

    kind: str
    path: str = ""
    address: Address = Address(DEFAULT_HOST, 0)


class Parser(argparse.ArgumentParser):
    """Refuses a wrong command line with one line and status 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where help is."""
        sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        raise SystemExit(USAGE_STATUS)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options in the words of a command line, without the program's name.

    Raises:
        SystemExit: they are wrong, and a line on standard error says how; or help was asked for and is given.
    """
    options, unknown = build_parser().parse_known_args(words)
    if not unknown:
        return options
    names = [name for name in ("trapgate", options.command) if name]
    word = unknown[0]
    if not word.startswith("-"):
        Parser(prog=" ".join(names)).error(f"{word!r} is one word too many")
    from difflib import get_close_matches

    name = word.partition("=")[0]
    close = get_close_matches(name, _long_options(options.command), n=1)
    hint = f"; there is {close[0]}" if close else ""
    return Parser(prog=" ".join(names)).error(f"there is no option {name}{hint}")


def _long_options(command: str | None) -> list[str]:
    """The options of `run`, `gdb` and `diff` by their long names, from where all of them are public; of others none."""
    parser = Parser()
    add = {"run": add_machine_options, "gdb": add_machine_options, "diff": add_diff_options}.get(command or "")
    if add is None:
        return []
    add(parser)
    return sorted(set(re.findall(r"--[a-z-]+", parser.format_help())))


def build_parser() -> Parser:
    """The parser for the whole command line; its namespace has `command` and what belongs to it."""
    parser = Parser(
        prog="trapgate",
        description="A whole IA-32 PC as a debug target for stock gdb, the same run every time.",
        epilog="Try: trapgate gdb (the demo kernel), trapgate gdb KERNEL.ELF. trapgate COMMAND --help says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="say which version this is")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    run = commands.add_parser("run", help="boot an image and serve gdb", allow_abbrev=False, description=_RUN)
    add_machine_options(run)
    run.add_argument("-S", dest="wait", action="store_true", help="wait for the debugger before the first instruction")
    gdb = commands.add_parser(
        "gdb",
        help="the same, and start stock gdb on it, connected, with symbols",
        allow_abbrev=False,
        description=_GDB,
        epilog="Words after -- are gdb's own: trapgate gdb kernel.elf -- -batch -ex 'info registers'",
    )
    add_machine_options(gdb)
    gdb.add_argument("-S", dest="wait", action="store_true", help=argparse.SUPPRESS)
    bench = commands.add_parser("bench", help="run the benchmarks", allow_abbrev=False)
    bench.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks to run (default: all but paper); --list names them"
    )
    bench.add_argument("--json", metavar="FILE", help="write the results there too")
    bench.add_argument(
        "--out", metavar="DIR", default=DEFAULT_REPORT, help=f"where paper writes its report (default {DEFAULT_REPORT})"
    )
    bench.add_argument(
        "--scale", type=parse_scale, default=1.0, metavar="X", help="for paper: measure X times as long (default 1)"
    )
    bench.add_argument("--list", action="store_true", help="list the benchmarks")
    diff = commands.add_parser(
        "diff",
        help="run two engines side by side to the first difference",
        allow_abbrev=False,
        description=_DIFF,
        epilog="Try: trapgate diff interp bt (the demo kernel), trapgate diff bt trap-nested KERNEL --max-insns 50M.",
    )
    add_diff_options(diff)
    doctor = commands.add_parser("doctor", help="say what this host offers, and what falls back", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="as JSON")
    return parser


_RUN = """Boot IMAGE and serve gdb. IMAGE is a multiboot kernel, an ELF file, a Linux kernel, a disk or floppy
image, or a flat binary as FILE@ADDRESS; without one the built-in demo kernel is booted. Exit status: the guest's own
through the debug exit port; 0 when the guest powers off, the debugger kills it, or --max-insns is reached; 2 for a
wrong command line or an image that cannot be loaded; 3 for a triple fault when no debugger is attached."""
_DIFF = """Boot IMAGE twice, under the engines A and B, and compare registers, flags, memory, devices, time and output
at irregular instruction counts. Where they differ, the first instruction after which they do is looked for, and shown
with what differs. Exit status: 0 if nothing does; 1 if something does; 2 for a wrong command line, an image that cannot
be loaded, or engines that cannot be compared (KVM counts no instructions)."""
_GDB = """Boot IMAGE stopped before its first instruction, and start stock gdb on it ($GDB, or gdb from PATH),
connected and with the image's symbols. The guest's serial output appears in between; `monitor serial TEXT` is its
input."""


def add_guest_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide what the guest is and what it does."""
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="what to boot; none: the built-in demo kernel")
    add("--kernel", "-kernel", metavar="IMAGE", help="the same as IMAGE, for a kernel: never booted as a disk")
    add("--initrd", "-initrd", metavar="FILES", help="multiboot modules: FILE[ ARGUMENTS][,FILE...]")
    add("--append", "-append", metavar="ARGUMENTS", help="the kernel's command line")
    add("-m", "--memory", "-memory", type=parse_memory, default=DEFAULT_MEMORY, metavar="SIZE",
        help="RAM, in MiB or with K, M, G (default 64M)")  # fmt: skip
    add("--cpu", "-cpu", type=parse_cpu, default=None, metavar="MODEL",
        help=f"the guest's CPU: {' or '.join(CPU_NAMES)} (default {DEFAULT_CPU})")  # fmt: skip
    add("--debug-exit", type=parse_port_or_none, default=DEFAULT_DEBUG_EXIT, metavar="PORT|none",
        help="the I/O port that ends the run with status value * 2 + 1 (default 0xf4)")  # fmt: skip
    add(
        "--ns-per-insn", type=parse_count, default=1, metavar="N", help="virtual nanoseconds an instruction (default 1)"
    )
    add(
        "--rtc", metavar="YYYY-MM-DD[THH:MM:SS]", help="what the clock chip says at power-on (default: always the same)"
    )
    add("--replay", metavar="FILE", help="let the input come in again that --record wrote, at the same instructions")
    add("--verify-tc", action="store_true", help="prove code that bt, trap or hybrid emits harmless before it may run")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe the machine and what is connected to it; QEMU's names work with one dash too."""
    add_guest_options(parser)
    add = parser.add_argument
    add("-s", dest="gdb_default", action="store_true", help=f"gdb on {DEFAULT_HOST}:{DEFAULT_PORT} (the default)")
    add("--gdb", "-gdb", type=parse_listen, default=None, metavar="[HOST:]PORT|none",
        help=f"where gdb connects; port 0 picks one (default {DEFAULT_HOST}:{DEFAULT_PORT})")  # fmt: skip
    add("--serial", "-serial", type=parse_sink, action="append", default=[], metavar="SINK",
        help="COM1, and given again COM2: stdio, none, tcp:PORT or a FILE (default stdio)")  # fmt: skip
    add("--debugcon", "-debugcon", type=parse_sink, default=Sink("none"), metavar="SINK",
        help="bytes written to port 0xe9 (default none)")  # fmt: skip
    add("--vmm", type=parse_engine, default=None, metavar="ENGINE",
        help="what runs the guest: bt, binary translation; trap, a hardware-style VMM; hybrid, these two in turns; "
        "interp, the slow reference "
        f"(default {DEFAULT_ENGINE}, or {FALLBACK_ENGINE} where the host cannot do {DEFAULT_ENGINE})")  # fmt: skip
    add("--trap-backend", choices=("emulated", "kvm"), help="whose CPU --vmm trap runs on: an emulated one with SVM "
        "(default), or with kvm this host's own")  # fmt: skip
    add("--paging", choices=("shadow", "nested"), help="how --vmm trap pages: shadow page tables (default), or nested "
        "ones that the emulated hardware walks")  # fmt: skip
    add("--max-insns", type=parse_count, metavar="N", help="end the run after N instructions")
    add("--pace", action="store_true", help="time in HLT waits for the host's clock (else it passes at once)")
    add(
        "--undefined-flags",
        default=HOST_FLAGS,
        metavar="MODEL",
        help="flags that the SDM leaves undefined: this host's CPU's (host), or those of a known CPU, which need the "
        "engine interp (default host)",
    )
    add(
        "--record",
        metavar="FILE",
        help="write all outside input (serial, keys, debugger's writes) there, with its time",
    )
    add("--json-stats", metavar="FILE", help="write what the engine counted there at the end")
    add("-v", "--verbose", action="store_true", help="say on standard error who connects and what goes wrong")


def add_diff_options(parser: argparse.ArgumentParser) -> None:
    """The options of `diff`: two engines, the guest, and how they are compared."""
    add = parser.add_argument
    add("first", metavar="A", help="an engine: bt, trap, trap-nested, hybrid, interp")
    add("second", metavar="B", help="the one beside it")
    add_guest_options(parser)
    add("--max-insns", type=parse_count, default=DEFAULT_DIFF_INSNS, metavar="N",
        help="how many instructions to compare (default 10M)")  # fmt: skip
    add("--each", action="store_true", help="compare after each instruction, which is a thousand times slower")
    add("--json", action="store_true", help="say as JSON how it ended")


def parse_memory(text: str) -> int:
    """Bytes of RAM from `64M`, `1G`, `65536K` or `64` (MiB)."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    digits = text[: len(text) - len(unit)]
    if unit not in _UNITS_BYTES or not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of memory such as 64M")
    return int(digits) * _UNITS_BYTES[unit]


def parse_listen(text: str) -> Listening:
    """`PORT`, `HOST:PORT`, `[IPv6]:PORT`, QEMU's `tcp:HOST:PORT`, or `none`."""
    if text == "none":
        return Listening(None)
    host, _, port = text.removeprefix("tcp:").rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or DEFAULT_HOST
    return Listening(Address(host, _parse_tcp_port(port, text)))


def parse_sink(text: str) -> Sink:
    """`stdio`, `none`, `tcp:[HOST:]PORT`, QEMU's `file:FILE`, or the name of a file."""
    if text in ("stdio", "none"):
        return Sink(text)
    if text.startswith("tcp:"):
        host, _, port = text.removeprefix("tcp:").split(",", 1)[0].rpartition(":")
        return Sink("tcp", address=Address(host or DEFAULT_HOST, _parse_tcp_port(port, text)))
    path = text.removeprefix("file:")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not a sink: stdio, none, tcp:PORT or a file name")
    return Sink("file", path)


def _parse_tcp_port(digits: str, text: str) -> int:
    if not digits.isdecimal() or int(digits) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} has no TCP port from 0 to 65535")
    return int(digits)


def parse_port_or_none(text: str) -> int | None:
    """An I/O port (decimal, or hex after 0x), or `none`."""
    if text == "none":
        return None
    try:
        port = int(text, 0)
    except ValueError:
        port = -1
    if not 0 <= port <= 0xFFFC:
        raise argparse.ArgumentTypeError(f"{text!r} is not an I/O port from 0 to 0xfffc")
    return port


def parse_engine(text: str) -> str:
    """The name of an engine that exists; the variants of trap by one word, as `diff` takes them."""
    if text not in (*ENGINE_NAMES, *TRAP_VARIANTS):
        raise argparse.ArgumentTypeError(
            f"there is no engine {text!r}; there is: {', '.join((*ENGINE_NAMES, *TRAP_VARIANTS))}"
        )
    return text


def parse_cpu(text: str) -> str:
    """The name of a CPU model."""
    if text not in CPU_NAMES:
        raise argparse.ArgumentTypeError(f"there is no CPU {text!r}; there is: {', '.join(CPU_NAMES)}")
    return text


def parse_count(text: str) -> int:
    """A positive number, perhaps with K, M or G for thousands."""
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:].upper(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.replace("_", "").isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(digits) * scale


def parse_scale(text: str) -> float:
    """A positive factor."""
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return scale
