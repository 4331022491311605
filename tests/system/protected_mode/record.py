"""Renews `bochs.json`, the digests of what Bochs makes of every case: `python -m tests.system.protected_mode.record`.

With the name of a suite it changes nothing and shows where the reference CPU and Bochs differ, record by record.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.oracles import bochs, reference
from tests.system.protected_mode import deviations
from tests.system.protected_mode.arena import BLOB, ENTRY
from tests.system.protected_mode.harness import Case, Record, build, describe, parse
from tests.system.protected_mode.suites import SUITES, Suite, batches

RECORDED = Path(__file__).with_name("bochs.json")


def bochs_records(cases: Iterable[Case]) -> list[Record]:
    """What Bochs makes of the cases."""
    records: list[Record] = []
    for batch in batches(cases):
        program = build(batch)
        code = program[: bochs.PIECE_BYTES].rstrip(b"\0")
        found = parse(bochs.run({ENTRY: code, BLOB: program[BLOB - ENTRY :]}))
        assert len(found) == len(batch), f"Bochs stopped in {batch[len(found)].name!r}"
        records += found
    return records


def reference_records(cases: Iterable[Case]) -> list[Record]:
    """What the reference CPU makes of them."""
    records: list[Record] = []
    for batch in batches(cases):
        done = reference.run(build(batch))
        found = parse(done.run.output)
        assert len(found) == len(batch), f"{batch[len(found)].name!r} ended the run: {done.chain}"
        records += found
    return records


def _digests(suite: Suite) -> str:
    """Those of all cases, in a row."""
    cases = list(suite.cases())
    return "".join(
        deviations.UNKNOWN if deviations.reason(deviations.BOCHS, suite.name, case.name) else deviations.digest(record)
        for case, record in zip(cases, bochs_records(cases), strict=True)
    )


def _show(suite: Suite) -> None:
    cases = list(suite.cases())
    for case, ours, theirs in zip(cases, reference_records(cases), bochs_records(cases), strict=True):
        if deviations.digest(ours) != deviations.digest(theirs):
            why = deviations.reason(deviations.BOCHS, suite.name, case.name) or "unexplained"
            print(f"{case.name}: {why}\n  ours  {describe(ours)}\n  Bochs {describe(theirs)}")


def main(names: list[str]) -> None:
    """Renew all, or show the suites that are named."""
    if names:
        for suite in SUITES:
            if suite.name in names:
                _show(suite)
        return
    found = {"bochs": bochs.version(), "suites": {suite.name: _digests(suite) for suite in SUITES}}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
