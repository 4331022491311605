"""How a comparison of two engines ended: as lines for people, and as plain values for JSON.

It must not know how they were compared, nor who asks.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmm.differences import describe_stop
from vmm.lockstep import Divergence, Outcome


def describe(outcome: Outcome, engines: tuple[str, str], begin_icount: int) -> Iterator[str]:
    """Lines, without their ends.

    Args:
        outcome: what came of it.
        engines: their names.
        begin_icount: where both began.
    """
    divergence = outcome.divergence
    if divergence is not None:
        yield from _describe_divergence(divergence, engines)
        return
    if outcome.stop is not None:
        yield f"both stop at icount {outcome.icount:,}: {describe_stop(outcome.stop)}"
    yield f"no difference in {outcome.icount - begin_icount:,} instructions"
    times = (f"{name} {seconds:.3f} s" for name, seconds in zip(engines, outcome.seconds, strict=True))
    yield f"the host's time: {', '.join(times)}"


def _describe_divergence(divergence: Divergence, engines: tuple[str, str]) -> Iterator[str]:
    if divergence.is_exact and divergence.icount - divergence.agreed_icount == 1:
        yield f"different after the instruction at icount {divergence.agreed_icount:,} ({' / '.join(engines)}):"
    else:
        yield (
            f"equal at icount {divergence.agreed_icount:,}, different at {divergence.icount:,} ({' / '.join(engines)}):"
        )
    yield from (f"  {difference}" for difference in divergence.differences)
    if not divergence.is_exact:
        yield "one at a time these instructions do the same under both; the unit that an engine makes of them does not"
    if divergence.trace:
        yield f"the last instructions, by icount, as {engines[0]} comes there:"
        yield from (f"  {line}" for line in divergence.trace)


def as_values(outcome: Outcome, engines: tuple[str, str], begin_icount: int) -> dict[str, object]:
    """The same for programs: names are stable."""
    divergence = outcome.divergence
    return {
        "engines": list(engines),
        "begin_icount": begin_icount,
        "icount": outcome.icount,
        "stop": None if outcome.stop is None else describe_stop(outcome.stop),
        "seconds": list(outcome.seconds),
        "difference": None if divergence is None else _divergence_values(divergence),
    }


def _divergence_values(divergence: Divergence) -> dict[str, object]:
    return {
        "agreed_icount": divergence.agreed_icount,
        "icount": divergence.icount,
        "exact": divergence.is_exact,
        "differences": [
            {"kind": each.kind.value, "name": each.name, "first": each.first, "second": each.second}
            for each in divergence.differences
        ],
        "trace": list(divergence.trace),
    }
