"""Files of inputs for the command line: `--record` writes one, `--replay` reads one.

It must not know how inputs act on a machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from machine.inputs import Input, InputError, header, parse


class Recorder:
    """Writes each input to a file at once; a restart of the guest begins the file anew.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file: TextIO = Path(path).open("w", encoding="ascii")  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise InputError(f"--record {path}: {error.strerror}") from error

    def __call__(self, entry: Input | None) -> None:
        """Write one input, or, for None, the head of a new file."""
        if entry is None:
            self._file.seek(0)
            self._file.truncate()
        self._file.write((header() if entry is None else entry.line()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: str) -> tuple[Input, ...]:
    """The inputs of a file; InputError says what is wrong with it and where."""
    try:
        with Path(path).open(encoding="ascii") as file:
            return parse(file)
    except OSError as error:
        raise InputError(f"--replay {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--replay {path}: {error}") from error
