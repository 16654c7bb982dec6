"""Layouts of packed tokens by the CUDA kernels: integer for integer what layout.py makes otherwise.

`expand` sends two integers for each segment to the device instead of two for each token, and waits for nothing.
`schedule` is two launches; PyTorch's ops are eighteen.
"""

import numpy as np
import torch
from torch import Tensor

from posttrain import _C
from posttrain.ops.backend import cuda_device, cuda_kernels, cuda_stream, gpu_obstacle
from posttrain.ops.library import define

_BUILT = _C.with_cuda()


def has_kernels(device: torch.device) -> bool:
    """Whether layouts on `device` are made here."""
    return _BUILT and device.type == "cuda" and gpu_obstacle(device) is None


def expand(lengths: np.ndarray, parents: np.ndarray, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(visible_until, positions), int32 `[tokens]` on `device`, of a checked forest: int64 `[S]` each."""
    forest = torch.from_numpy(np.stack([lengths, parents]).astype(np.int32))
    if device.type == "cuda":
        forest = forest.pin_memory().to(device, non_blocking=True)
    workspace = forest.new_empty(3, len(lengths))
    visible_until, positions = forest.new_empty(2, tokens)
    with cuda_device(forest):
        cuda_kernels(forest).cuda_layout_expand(
            cuda_stream(forest),
            *(x.data_ptr() for x in forest),
            len(lengths),
            tokens,
            *(x.data_ptr() for x in (workspace, visible_until, positions)),
        )
    return visible_until, positions


def _schedule(visible_until: Tensor, positions: Tensor) -> Tensor:
    """`PackedLayout.schedule`."""
    schedule = _fake_schedule(visible_until, positions)
    visible_until, positions = visible_until.contiguous(), positions.contiguous()
    with cuda_device(visible_until):
        cuda_kernels(visible_until).cuda_layout_schedule(
            cuda_stream(visible_until),
            visible_until.data_ptr(),
            positions.data_ptr(),
            len(visible_until),
            schedule.data_ptr(),
            schedule.shape[1],
        )
    return schedule


def _fake_schedule(visible_until: Tensor, positions: Tensor) -> Tensor:
    return visible_until.new_empty(5, 4 * ((len(visible_until) + 127) // 128))


schedule = define("packed_schedule", "(Tensor visible_until, Tensor positions) -> Tensor", _schedule, _fake_schedule)
