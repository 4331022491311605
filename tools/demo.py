"""What `make run` shows: gdb on the demo kernel, at the user's hands if there is a terminal, else by a script.

It starts the command line as a user would, with the options given here added, and knows nothing of what is behind it.
"""

from __future__ import annotations

import sys
from importlib import resources

from gdbstub.cli import main


def run() -> int:
    """Run the session and return its exit status: 0 unless gdb's script, or trapgate, failed."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(
            "The demo kernel, stopped before its first instruction. Try: break syscall_dispatch, continue, backtrace, "
        )
        print("monitor help. Its shell is on COM1: monitor serial help\\n. End with quit.", flush=True)
        return main(["gdb", *sys.argv[1:]])
    with resources.as_file(resources.files("tools") / "demo.gdb") as script:
        return main(["gdb", "--serial", "none", *sys.argv[1:], "--", "-nx", "-batch", "-x", str(script)])


if __name__ == "__main__":
    raise SystemExit(run())
