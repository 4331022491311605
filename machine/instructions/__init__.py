"""The instruction table: what each instruction does, which flags it leaves undefined, how engines may run it.

One row a mnemonic; `machine.instructions.table.lookup` finds the row for what the decoder names.
"""

from machine.instructions import arithmetic, branches, exchanges, fpu, moves, segments, simd, strings, system
from machine.instructions.table import CODE_NAMES, FPU_ROWS, Effect, Operation, Row, add_rows, codes, lookup

__all__ = ["CODE_NAMES", "Effect", "Operation", "Row", "codes", "lookup"]

for _module in (arithmetic, branches, exchanges, moves, segments, strings, system, fpu):
    add_rows(*_module.ROWS)
for _module in (fpu, simd):
    add_rows(*_module.FPU_ROWS, part=FPU_ROWS)
