"""Functions that several Triton kernels use."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """As exact near 0 as elsewhere, where (1 - e) / (1 + e) with e = exp(-2 |x|) would lose digits."""
    square = x * x
    near = -5.70498872745e-3
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * near, tl.where(x < 0, -far, far))
