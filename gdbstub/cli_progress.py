"""A progress bar on standard error, where that is a terminal.

It must not know what is under way.
"""

from __future__ import annotations

import sys

_BAR_CELLS = 24


def show_bar(name: str, fraction: float, what: str) -> None:
    """Draw the bar anew: `fraction` from 0 to 1, and a few words behind it."""
    if not sys.stderr.isatty():
        return
    full = round(_BAR_CELLS * min(1.0, max(0.0, fraction)))
    bar = "#" * full + "-" * (_BAR_CELLS - full)
    sys.stderr.write(f"\r\x1b[K{name} [{bar}] {what}")
    sys.stderr.flush()


def clear_bar() -> None:
    """Take it away, for a line of output."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
