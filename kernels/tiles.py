"""The tiles of a matrix product: their sizes, and the order in which the programs of a launch take them."""

from typing import NamedTuple

import triton
import triton.language as tl


class Blocks(NamedTuple):
    """Tile sizes of a GEMM kernel, rows, columns and the step along the depth, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def grouped_place(num_row_blocks, num_columns, GROUP: tl.constexpr):
    """(row block, column) of this program: `GROUP` row blocks go through all columns together."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    within = program - group * GROUP * num_columns
    return first + within % size, within // size
