"""What the command line says about the guest, as the options of a machine; checked as far as that is possible.

It must not know engines, nor where bytes of serial lines go.
"""

from __future__ import annotations

import argparse
from datetime import datetime

from gdbstub import cli_cpu, cli_inputs
from gdbstub.cli_engine import UsageError
from guests import images
from machine.devices.board import BoardOptions
from machine.devices.rtc import START_DATE
from machine.devices.uart import Output
from machine.loaders.image import LoadOptions, parse_modules
from machine.pc import MachineOptions


def machine_options(
    options: argparse.Namespace,
    serial: tuple[Output | None, Output | None] = (None, None),
    debugcon: Output | None = None,
) -> MachineOptions:
    """The machine that the options of `cli_options.add_guest_options` describe.

    Args:
        options: from the parser.
        serial: where COM1 and COM2 put their bytes.
        debugcon: where port E9h does.

    Raises:
        UsageError, ImageError: it cannot be.
    """
    if options.image and options.kernel:
        raise UsageError(f"two images, {options.image} and {options.kernel}")
    image = options.image or options.kernel
    symbols = None
    if image is None:
        image, symbols = images.path("demo"), images.symbols_path("demo")
    loading = LoadOptions(
        ram_bytes=options.memory,
        command_line=options.append or "",
        modules=parse_modules(options.initrd) if options.initrd else (),
        kernel=options.kernel is not None,
    )
    board = BoardOptions(
        serial=serial,
        debugcon=debugcon,
        debug_exit_port=options.debug_exit,
        start_date=_parse_date(options.rtc),
    )
    try:
        model, make_fpu = cli_cpu.choose(options.cpu)
        return MachineOptions(
            image=image,
            model=model,
            make_fpu=make_fpu,
            loading=loading,
            board=board,
            ns_per_insn=options.ns_per_insn,
            symbols=symbols,
            replay=cli_inputs.read(options.replay) if options.replay else (),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _parse_date(text: str | None) -> datetime:
    if text is None:
        return START_DATE
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--rtc {text}: not a date such as 2006-10-21T12:00:00") from None
    return date.replace(tzinfo=None)
