"""The order in which the programs of a launch take the tiles of a matrix."""

import triton
import triton.language as tl


@triton.jit
def grouped_place(num_row_blocks, num_columns, GROUP: tl.constexpr):
    """(row block, column) of this program: `GROUP` row blocks go through all columns together."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    within = program - group * GROUP * num_columns
    return first + within % size, within // size
