"""The command `trapgate`: reads the command line and hands over to the part that it names.

Imports of those parts wait until one is needed, so that `--help` is there at once.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence

from gdbstub.cli_options import USAGE_STATUS, build_parser, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    gdb_words: list[str] = []
    if words[:1] == ["gdb"] and "--" in words:
        split = words.index("--")
        words, gdb_words = words[:split], words[split + 1 :]
    options = parse(words)
    if options.version:
        from importlib.metadata import PackageNotFoundError, version

        try:
            sys.stdout.write(f"trapgate {version('trapgate')}\n")
        except PackageNotFoundError:
            sys.stdout.write("trapgate, run from its sources without being installed\n")
        return 0
    if options.command is None:
        build_parser().print_help(sys.stderr)
        return USAGE_STATUS
    return _dispatch(options, gdb_words)


def _dispatch(options: argparse.Namespace, gdb_words: list[str]) -> int:
    if options.command in ("run", "gdb"):
        gc.disable()  # a tenth of the start is a search for garbage in what was just imported; `cli_run` enables it
        try:
            return _run(options, gdb_words)
        finally:
            gc.enable()
    if options.command == "bench":
        from gdbstub import cli_bench

        return cli_bench.run(options)
    if options.command == "diff":
        from gdbstub import cli_diff

        return cli_diff.run(options)
    from gdbstub import cli_doctor

    return cli_doctor.run(options)


def _run(options: argparse.Namespace, gdb_words: list[str]) -> int:
    if options.command == "run":
        from gdbstub import cli_run

        return cli_run.run(options)
    from gdbstub import cli_gdb

    return cli_gdb.run(options, gdb_words)


if __name__ == "__main__":
    raise SystemExit(main())
