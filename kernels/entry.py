"""What tests/kernels/aot.py compiles: a kernel as a launch with certain arguments would have it compiled."""

from typing import Any

import torch
from torch import Tensor

# Name, jit function, signature, constexprs and options, as tests/kernels/aot.py describes them.
Entry = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.uint8: "*u8"}
_FLOATS = torch.empty(16, device="meta")


def entry(kernel, detail: str, arguments: dict[str, Any], **options: int) -> Entry:
    """The entry of a launch of `kernel` with the `arguments` that it takes of these; a missing one is float32 data.

    Names of one capital letter are sizes and other names in capitals constexprs, as is a stride or depth of 1.
    """
    given = {name: arguments.get(name, _FLOATS) for name in kernel.arg_names}
    constants = {name: value for name, value in given.items() if _is_constant(name, value)}
    signature = {name: _type(value) for name, value in given.items() if name not in constants}
    options |= {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return f"{kernel.__name__} {detail}".strip(), kernel, signature, constants, options


def _is_constant(name: str, value: Any) -> bool:
    if value is None or (name.isupper() and len(name) > 1):
        return True
    return name.endswith(("stride", "depth")) and value == 1


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return f"{_POINTERS[value.dtype]}:16"
    if isinstance(value, float):
        return "fp32"
    return "i32" if value % 16 else "i32:16"
