"""Every suite of protected-mode cases by name, and in which places the oracles are known to be wrong.

It must not know how an oracle is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.system.protected_mode import (
    control,
    interrupts,
    limits,
    mixtures,
    paging,
    segments,
    tasks,
    transfers,
    virtual86,
)
from tests.system.protected_mode.harness import Case

# A batch must fit into what Bochs loads in one piece.
BATCH_BYTES = 110_000


@dataclass(frozen=True, slots=True)
class Suite:
    """Cases that belong together.

    Attributes:
        name: of the test.
        cases: makes them.
        by_qemu: QEMU's TCG implements what they are about: it has no segment limits for data, no VME and no PVI, sets A
            bits of page tables in another order, and knows no reserved bits of small pages.
    """

    name: str
    cases: Callable[[], Iterable[Case]]
    by_qemu: bool


SUITES = tuple(
    Suite(f"{function.__module__.rpartition('.')[2]}.{function.__name__}", function, by_qemu)
    for function, by_qemu in (
        (segments.data_segments, True),
        (segments.stack_segments, True),
        (segments.system_segments, True),
        (segments.looks, True),
        (segments.tables, True),
        (transfers.jumps, True),
        (transfers.calls, True),
        (transfers.far_returns, True),
        (transfers.interrupt_returns, True),
        (transfers.outer_stacks, True),
        (transfers.call_gates, True),
        (transfers.segments_dropped, True),
        (transfers.fast_calls, True),
        (interrupts.gates, True),
        (interrupts.code_segments, True),
        (interrupts.inner_stacks, True),
        (interrupts.double_faults, False),
        (tasks.switches, True),
        (tasks.returns, True),
        (tasks.back_links, True),
        (tasks.tss_descriptors, True),
        (tasks.new_segments, False),
        (tasks.endings, False),
        (virtual86.interrupt_flag, False),
        (virtual86.popped_flags, False),
        (virtual86.returned_flags, False),
        (virtual86.pending_virtual_interrupts, False),
        (virtual86.software_interrupts, False),
        (virtual86.instructions, False),
        (virtual86.exceptions, True),
        (virtual86.ports, True),
        (control.control_registers, False),
        (control.debug_registers, False),
        (control.model_registers, False),
        (control.privileged, True),
        (paging.rights_32, False),
        (paging.large_pages, False),
        (paging.pae, False),
        (paging.system_faults, False),
        (paging.alignment, False),
        (limits.data, False),
        (limits.stacks, False),
        (limits.code, False),
        (mixtures.call_gates, False),
        (mixtures.interrupts, False),
        (mixtures.returns, False),
    )
)


def batches(cases: Iterable[Case]) -> Iterator[Sequence[Case]]:
    """The cases in pieces of one program each."""
    batch: list[Case] = []
    size_bytes = 0
    for case in cases:
        # A record, its header, and at most the code that fits; a patch has a header of eight bytes.
        size_bytes += 250 + sum(len(patch.data) + 12 for patch in case.patches) + 8 * len(case.dumps)
        if batch and size_bytes > BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(case)
    if batch:
        yield batch
