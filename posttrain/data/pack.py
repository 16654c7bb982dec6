"""Bin packing: sequences into as few packed batches of a fixed capacity as a fast method finds.

Best-fit decreasing: take the lengths from the longest to the shortest and put each into the fullest bin that still
has room for it. It never needs more than 11/9 OPT + 4 bins (Johnson et al., "Worst-case performance bounds for simple
one-dimensional packing algorithms", 1974). O(n log n), in C++ (csrc/packing.cpp).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from posttrain import _C


def pack_best_fit(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, every index once, no bin's lengths adding up to more than `capacity`.

    The result depends on nothing but the arguments. Indices ascend within a bin; the bin of the longest length comes
    first.

    Raises:
        ValueError: a length that is negative or above `capacity`, with its index; lengths that are no integers.
    """
    given = np.asarray(lengths)
    if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
        raise ValueError(f"pack_best_fit: lengths must be [n] integers, got {list(given.shape)} {given.dtype}")
    sizes = np.ascontiguousarray(given, dtype=np.int64)
    misfits = np.flatnonzero((sizes < 0) | (sizes > capacity))
    if len(misfits):
        index = int(misfits[0])
        problem = f"is above the capacity {capacity}" if sizes[index] >= 0 else "is negative"
        raise ValueError(f"pack_best_fit: length {sizes[index]} at index {index} {problem}")
    bin_of = np.empty_like(sizes)
    bins = _C.pack_best_fit(sizes.ctypes.data, len(sizes), capacity, bin_of.ctypes.data)
    grouped = np.argsort(bin_of, kind="stable")
    ends = np.bincount(bin_of, minlength=bins).cumsum()
    return [part.tolist() for part in np.split(grouped, ends[:-1])] if bins else []
