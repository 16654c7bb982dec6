"""How an op reaches PyTorch: one implementation, two doors.

Calling a registered op costs 30 to 70 us on a CPU; calling the implementation costs nothing extra, and an
`autograd.Function` 10 us. So an eager call takes the short door (the implementation itself, wrapped in an
`autograd.Function` only when a gradient is needed), and everything that traces or intercepts operators
(`torch.compile`, `torch.export`, `opcheck`, fake tensors, FLOP counters) takes the registered `torch.ops.posttrain`
door. Both run the same `forward`, `setup_context` and `backward`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PLAIN = frozenset({Tensor, torch.nn.Parameter, float, int, bool, str, list, type(None)})
_LIBRARY = torch.library.Library("posttrain", "DEF")


def define(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `posttrain::name` and return the function that ops call.

    `schema` is the part after the name, as in `"(Tensor x, float eps) -> (Tensor, Tensor)"`. `forward` computes it,
    `fake` makes empty outputs. `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` are as in
    `torch.library.register_autograd`; an op without them has no gradient. The returned function takes its arguments
    by position.
    """
    qualified = f"posttrain::{name}"
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    registered = getattr(torch.ops.posttrain, name)
    if setup_context is None or backward is None:
        return lambda *args: registered(*args) if _intercepted() else forward(*_plain(name, args))

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)

    def forward_and_context(ctx: Any, *args: Any) -> Any:
        """Both at once: a Function with a `setup_context` has its signature inspected in every call, 25 to 70 us."""
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward_and_context), "backward": staticmethod(once_differentiable(backward))}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        if _intercepted():
            return registered(*args)
        _plain(name, args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        return forward(*args)

    return call


def _plain(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`, among which is no tensor that has its numbers in other tensors (DTensor): it has no memory to read."""
    if not _PLAIN.issuperset(map(type, args)):
        wrapped = next((arg for arg in args if hasattr(type(arg), "__tensor_flatten__")), None)
        if wrapped is not None:
            raise ValueError(
                f"{name}: got a {type(wrapped).__name__} {list(wrapped.shape)}, and ops take plain tensors. FSDP2 "
                "gathers a module's weights when the module is called; elsewhere give to_local() or full_tensor()"
            )
    return args


def _intercepted() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
