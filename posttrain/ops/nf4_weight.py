"""A matrix in 4-bit NormalFloat, laid out as bitsandbytes lays it out.

The elements of W [N, K], row after row, fall into blocks of `blocksize` (blocks run on across rows):

    W_i = CODE[q_i] absmax_(i // blocksize)      q_i in 0..15, two to a byte, the even element in the high half

(Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.) With nested statistics the absmax of blocks
is itself kept in 8 bits, in blocks of 256:

    absmax_b = nested_code[absmax_b] nested_absmax_(b // 256) + offset

Values, and the tensors of a checkpoint, are equal to those of bitsandbytes bit for bit.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCKSIZE = 256
_STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class NestedAbsmax:
    """What the 8-bit absmax of blocks stands for.

    Attributes:
        absmax: float32, one for each `blocksize` absmax.
        code: float32 `[256]`, the values of the 8 bits, ascending.
        offset: float32, one number, the mean that was taken off.
        blocksize: how many absmax share one.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int = _NESTED_BLOCKSIZE


@dataclass(frozen=True)
class NF4Weight:
    """A quantised matrix `[N, K]`.

    Attributes:
        packed: uint8, (N K + 1) // 2 bytes; bitsandbytes gives them the shape [bytes, 1].
        absmax: float32, one for each block; uint8 with nested statistics.
        shape: (N, K).
        dtype: of the matrix that was quantised, and of the one that `nf4_dequantize` makes.
        blocksize: elements that share an absmax.
        nested: nested statistics, or None.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    blocksize: int = 64
    nested: NestedAbsmax | None = None

    def __post_init__(self) -> None:
        rows, width = self.shape
        size = rows * width
        blocks = -(-size // self.blocksize)
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"NF4Weight: blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        if self.packed.dtype != torch.uint8 or self.packed.numel() != (size + 1) // 2:
            raise ValueError(
                f"NF4Weight: packed must hold {(size + 1) // 2} uint8 for {[rows, width]}; "
                f"got {list(self.packed.shape)} {self.packed.dtype}"
            )
        wanted = torch.float32 if self.nested is None else torch.uint8
        if self.absmax.dtype != wanted or self.absmax.numel() != blocks:
            raise ValueError(
                f"NF4Weight: absmax must hold {blocks} {wanted} for {[rows, width]} in blocks of {self.blocksize}; "
                f"got {list(self.absmax.shape)} {self.absmax.dtype}"
            )
        if self.nested is not None:
            _check_nested(self.nested, blocks)
        devices = {str(x.device) for x in self._tensors().values()}
        if len(devices) > 1:
            raise ValueError(f"NF4Weight: all parts must be on one device, got {', '.join(sorted(devices))}")

    def __repr__(self) -> str:
        statistics = "" if self.nested is None else ", nested statistics"
        shape, dtype, device = list(self.shape), str(self.dtype).removeprefix("torch."), self.packed.device
        return f"NF4Weight({shape} of {dtype} on {device}, blocks of {self.blocksize}{statistics})"

    def to(self, device: torch.device | str) -> "NF4Weight":
        """This matrix on `device`."""
        nested = self.nested
        if nested is not None:
            absmax, code, offset = (x.to(device) for x in (nested.absmax, nested.code, nested.offset))
            nested = NestedAbsmax(absmax, code, offset, nested.blocksize)
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), nested=nested)

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The tensors under which bitsandbytes saves this matrix, named after the parameter `prefix`."""
        facts: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
        }
        tensors = {"absmax": self.absmax, "quant_map": code_table(self.packed.device)}
        if self.nested is not None:
            tensors |= {"nested_absmax": self.nested.absmax, "nested_quant_map": self.nested.code}
            facts |= {
                "nested_blocksize": self.nested.blocksize,
                "nested_dtype": "float32",
                "nested_offset": self.nested.offset.item(),
            }
        tensors[_STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        return {prefix: self.packed.reshape(-1, 1), **{f"{prefix}.{name}": x for name, x in tensors.items()}}

    @staticmethod
    def from_state_dict(tensors: dict[str, Tensor], prefix: str = "weight") -> "NF4Weight":
        """The matrix that bitsandbytes saved as the parameter `prefix`.

        Raises `ValueError` where a tensor is missing, or the weights are quantised otherwise.
        """
        fields = {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}
        if prefix not in tensors or _STATE not in fields:
            raise ValueError(f"NF4Weight: {prefix!r} and {f'{prefix}.{_STATE}'!r} are needed, got {sorted(tensors)}")
        facts = _read_facts(prefix, fields[_STATE])
        missing = {"absmax", "quant_map"} - fields.keys()
        if "nested_offset" in facts:
            missing |= {"nested_absmax", "nested_quant_map"} - fields.keys()
        if missing:
            raise ValueError(f"NF4Weight: {prefix!r} lacks {', '.join(sorted(missing))}")
        _check_code(fields["quant_map"])
        nested = None
        if "nested_offset" in facts:
            offset = torch.tensor(float(facts["nested_offset"])).to(fields["absmax"].device)
            nested = NestedAbsmax(
                fields["nested_absmax"], fields["nested_quant_map"], offset, int(facts["nested_blocksize"])
            )
        rows, width = facts["shape"]
        packed = tensors[prefix].view(torch.uint8)
        return NF4Weight(packed, fields["absmax"], (rows, width), _DTYPES[facts["dtype"]], facts["blocksize"], nested)

    @staticmethod
    def from_bitsandbytes(packed: Tensor, state: Any) -> "NF4Weight":
        """The matrix of a `Params4bit` and its `quant_state`; tensors are shared, not copied."""
        if state.quant_type != "nf4":
            raise ValueError(f"NF4Weight: quant_type must be 'nf4', got {state.quant_type!r}")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("NF4Weight: bitsandbytes has repacked this weight for inference on the CPU")
        _check_code(state.code)
        nested = None
        if state.nested:
            nested = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
        rows, width = state.shape
        return NF4Weight(
            packed.detach().view(torch.uint8), state.absmax, (rows, width), state.dtype, state.blocksize, nested
        )

    def _tensors(self) -> dict[str, Tensor]:
        nested = self.nested
        inner = {} if nested is None else {"n.absmax": nested.absmax, "n.code": nested.code, "offset": nested.offset}
        return {"packed": self.packed, "absmax": self.absmax, **inner}


def quantize_nf4(weight: Tensor, *, blocksize: int = 64, nested: bool = False) -> NF4Weight:
    """`weight` `[N, K]`, float32, bfloat16 or float16, in NF4, as bitsandbytes quantises on the CPU.

    Args:
        weight: the matrix.
        blocksize: elements that share an absmax.
        nested: also keep the absmax in 8 bits ("double quantisation").
    """
    if weight.ndim != 2 or weight.dtype not in _DTYPES.values():
        raise ValueError(
            f"quantize_nf4: weight must be [N, K] in 16 or 32 bits, got {weight.dtype} {list(weight.shape)}"
        )
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"quantize_nf4: blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    flat = weight.detach().reshape(-1).float()
    scaled, absmax = _scaled(flat, blocksize)
    code = code_table(weight.device)
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    if len(index) % 2:
        index = torch.cat([index, index.new_full((1,), CODE.index(0.0))])
    packed = ((index[::2] << 4) | index[1::2]).unsqueeze(1)
    rows, width = weight.shape
    if not nested:
        return NF4Weight(packed, absmax, (rows, width), weight.dtype, blocksize)
    statistics = _nest(absmax)
    return NF4Weight(packed, statistics[0], (rows, width), weight.dtype, blocksize, statistics[1])


def _scaled(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Elements over the absmax of their block, in [-1, 1], and the absmax. Whole blocks are multiplied by a reciprocal;
    the rest is divided."""
    whole = len(flat) // blocksize * blocksize
    blocks, rest = flat[:whole].view(-1, blocksize), flat[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).reshape(-1)
    if len(rest):
        last = rest.abs().amax().clamp(min=1e-38)
        scaled, absmax = torch.cat([scaled, rest / last]), torch.cat([absmax, last[None]])
    return scaled.clamp(-1, 1), absmax


def _nest(absmax: Tensor) -> tuple[Tensor, NestedAbsmax]:
    """The absmax in 8 bits. bitsandbytes looks a value up in a table over 65,536 steps of [-1, 1]; so does this."""
    offset = absmax.mean()
    centred = absmax - offset
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % _NESTED_BLOCKSIZE)).view(-1, _NESTED_BLOCKSIZE)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest)[:, None]).reshape(-1)[: len(absmax)].nan_to_num(nan=-1.0)
    code = dynamic_code(absmax.device)
    grid = torch.arange(65536, device=absmax.device) / 32767.5 - 1
    table = torch.bucketize(grid, (code[:-1] + code[1:]) / 2).to(torch.uint8)
    step = ((scaled + 1) * 32767.5 + 0.5).long()
    return table[step], NestedAbsmax(largest, code.clone(), offset)


@cache
def code_table(device: torch.device) -> Tensor:
    """`CODE` as float32 `[16]`."""
    return torch.tensor(CODE, device=device)


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending: 0, 1, and for e = -6..0 the middles of 2^(e+6) equal
    parts of [0.1, 1], times 10^e, with both signs (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning",
    2015)."""
    values = [0.0, 1.0]
    for e in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (e + 6) + 1)
        middles = (10**e * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-x for x in middles]
    return torch.tensor(sorted(values), device=device)


def _read_facts(prefix: str, state: Tensor) -> dict[str, Any]:
    try:
        facts = json.loads(bytes(state.tolist()))
        dtype, shape = facts["dtype"], facts["shape"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"NF4Weight: {prefix}.{_STATE} is not what bitsandbytes writes: {error!r}") from error
    if dtype not in _DTYPES or len(shape) != 2 or "blocksize" not in facts:
        raise ValueError(
            f"NF4Weight: {prefix!r} needs a blocksize, a dtype of {', '.join(_DTYPES)} and a shape [N, K]; got {facts}"
        )
    return facts


def _check_code(code: Tensor) -> None:
    if code.shape != (16,) or not torch.equal(code.cpu().float(), torch.tensor(CODE)):
        raise ValueError(f"NF4Weight: the 16 values must be those of NF4, got {code.tolist()}")


def _check_nested(nested: NestedAbsmax, blocks: int) -> None:
    wanted = -(-blocks // nested.blocksize)
    if nested.absmax.dtype != torch.float32 or nested.absmax.numel() != wanted:
        raise ValueError(
            f"NF4Weight: nested absmax must hold {wanted} float32 for {blocks} blocks; "
            f"got {list(nested.absmax.shape)} {nested.absmax.dtype}"
        )
    if nested.code.shape != (256,) or nested.code.dtype != torch.float32 or nested.offset.numel() != 1:
        raise ValueError(
            f"NF4Weight: nested statistics need a code of 256 float32 and one offset; "
            f"got {list(nested.code.shape)} {nested.code.dtype} and {list(nested.offset.shape)}"
        )
