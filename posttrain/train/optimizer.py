"""Optimizer: AdamW over float32 weights, whatever precision the model computes in.

A parameter in bfloat16 has a float32 twin here. Its gradient is added to the twin's as soon as the backward pass has
made it, and freed: micro-batches accumulate in float32, and no bfloat16 gradient is kept. After a step the twin is
rounded into the parameter. A float32 parameter is its own twin.
"""

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.train.config import TrainConfig

_HALF = (torch.bfloat16, torch.float16)


def half_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """What the model computes in, if not in the dtype it has: bfloat16 if asked for or, unless forbidden, on CUDA."""
    wanted = device.type == "cuda" if config.bf16 is None else config.bf16
    return torch.bfloat16 if wanted else None


class Optimizer:
    """AdamW for the trainable parameters of `model`.

    With `half` the model's parameters are turned into that dtype here, so that the twins keep their full precision.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, half: torch.dtype | None = None) -> None:
        self._max_norm = config.max_grad_norm
        twins = _twins(model, half)
        self._named = {name: twin for name, (_, twin) in twins.items()}
        self._half = [(parameter, twin) for parameter, twin in twins.values() if parameter is not twin]
        for parameter, twin in self._half:
            parameter.register_post_accumulate_grad_hook(_move_gradient(twin))
        matrices = [twin for twin in self._named.values() if twin.ndim > 1]
        vectors = [twin for twin in self._named.values() if twin.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update the weights, and drop the gradients. Returns the norm before clipping, a scalar."""
        gradients = [twin.grad for twin in self._named.values() if twin.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._named.values(), self._max_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            for parameter, twin in self._half:
                parameter.copy_(twin)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as named tensors."""
        tensors = {}
        for name, twin in self._named.items():
            for key, value in self._adamw.state[twin].items():
                tensors[f"{name}.{key}"] = value
        halves = {id(twin) for _, twin in self._half}
        tensors |= {f"{name}.weight32": twin.detach() for name, twin in self._named.items() if id(twin) in halves}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave. The model's own weights are restored by the caller."""
        by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in self._named}
        for key, value in tensors.items():
            name, _, part = key.rpartition(".")
            if name not in by_parameter:
                raise ValueError(f"the checkpoint has optimizer state for {name!r}, which this model doesn't train")
            by_parameter[name][part] = value
        for name, twin in self._named.items():
            if (wide := by_parameter[name].pop("weight32", None)) is not None:
                twin.data.copy_(wide)
        # load_state_dict knows parameters by their number, in the order of the groups.
        order = {id(twin): name for name, twin in self._named.items()}
        names = [order[id(twin)] for group in self._adamw.param_groups for twin in group["params"]]
        state = {number: by_parameter[name] for number, name in enumerate(names) if by_parameter[name]}
        self._adamw.load_state_dict({"state": state, "param_groups": self._adamw.state_dict()["param_groups"]})


def _twins(model: nn.Module, half: torch.dtype | None) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Name -> (parameter, float32 twin) of what is trained; with `half`, turns the whole model into it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wide = {name: parameter.data for name, parameter in trained.items()}
    if half is not None:
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(half)
    twins: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for name, parameter in trained.items():
        twin = parameter if parameter.dtype not in _HALF else nn.Parameter(wide[name].float())
        twins[name] = (parameter, twin)
    return twins


def _move_gradient(twin: Tensor):
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if twin.grad is None:
            twin.grad = parameter.grad.to(twin.dtype)
        else:
            twin.grad.add_(parameter.grad)
        parameter.grad = None

    return move
