"""NF4: bitsandbytes' bits, true products with a few rows and with many, clear about wrong arguments."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from tolerance import HALF, check
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.ops import NF4Weight, nf4_dequantize, nf4_linear, quantize_nf4, reference
from posttrain.ops.nf4 import MATVEC_ROWS, PARTS, Parts
from posttrain.ops.nf4_weight import CODE, dynamic_code

SHAPES = [(1, 1), (7, 13), (3, 64), (5, 100), (33, 97), (64, 130), (0, 64), (100, 1000)]
ROWS = [0, 1, 2, 5, 8, 15, 16, 17, 63]
statistics = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])

PACKED = (
    "0a2e61c3f91d50b3e71c4f92e60b3e81d50a2e71c4f91d50b3e81d4fa2e60c3f81d50a2e71c4f92e60b3e81d50a2e61c3f91d50b2e71d4fa2e60c3"
    "f81d50a2e71c4f92d60b3e81d4fa2e61c3f81d50b2e71c4f92e60b3e81d50a2e71c4f91d50b3e71d4fa2e60c3f81d50a2e71c4f92e60b3e81d50a2"
    "e61c"
)
ABSMAX = "cdcc4c3d3b78493de9bd4a3daa23463d1f874b3d05af483d8e32483d97034c3d"
NESTED = {"absmax": "ed3ec600d52f26de", "nested_absmax": "c0ac733a"}
FACTS = b'{"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [6, 40]'
NESTED_FACTS = b', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.04930340126156807}'
LAST_FOUR = {False: "4b7e133d979a94bb79080ebd6dd2b33c", True: "4c7e133d989a94bb7a080ebd6ed2b33c"}


def matrix(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(height, width, generator=generator)


def golden_matrix() -> Tensor:
    i = torch.arange(6 * 40)
    return ((i * 2654435761 % 2**32).double() / 2**31 - 1).float().view(6, 40) * 0.05


def golden_checkpoint(nested: bool) -> dict[str, Tensor]:
    """What bitsandbytes 0.50.2 on a CPU saves of `golden_matrix()`, made by

    packed, state = bitsandbytes.functional.quantize_4bit(
        golden_matrix(), blocksize=32, compress_statistics=nested, quant_type="nf4")
    state.as_dict(packed=True), bitsandbytes.functional.dequantize_4bit(packed, state).flatten()[-4:]
    """

    def tensor(text: str, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)

    facts = FACTS + NESTED_FACTS if nested else FACTS + b"}"
    tensors = {
        "weight": tensor(PACKED, torch.uint8).view(-1, 1),
        "weight.absmax": tensor(NESTED["absmax"], torch.uint8) if nested else tensor(ABSMAX, torch.float32),
        "weight.quant_map": torch.tensor(CODE),
    }
    if nested:
        tensors["weight.nested_absmax"] = tensor(NESTED["nested_absmax"], torch.float32)
        tensors["weight.nested_quant_map"] = dynamic_code(torch.device("cpu"))
    return {**tensors, "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(facts), dtype=torch.uint8)}


@statistics
def test_a_checkpoint_of_bitsandbytes_is_read_and_written_bit_for_bit(nested) -> None:
    saved = golden_checkpoint(nested)
    weight = NF4Weight.from_state_dict(saved)
    for dequantize in (nf4_dequantize, partial(reference.nf4_dequantize, dtype=torch.float32)):
        values = dequantize(weight)
        assert values.flatten()[-4:].numpy().tobytes().hex() == LAST_FOUR[nested]
    written = weight.state_dict()
    assert list(written) == list(saved)
    for name, tensor in saved.items():
        assert (written[name].shape, written[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(written[name], tensor), name


def test_quantises_to_the_bits_of_bitsandbytes() -> None:
    weight = quantize_nf4(golden_matrix(), blocksize=32)
    assert weight.packed.numpy().tobytes().hex() == PACKED
    assert weight.absmax.numpy().tobytes().hex() == ABSMAX


@statistics
def test_equals_an_installed_bitsandbytes(nested) -> None:
    functional_ = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for shape in [(1, 1), (7, 13), (64, 130), (70, 512)]:
        for dtype in (torch.float32, *HALF):
            source = matrix(*shape).to(dtype)
            source[:33] = 0
            packed, state = functional_.quantize_4bit(source, compress_statistics=nested, quant_type="nf4")
            theirs = {"weight": packed, **{f"weight.{k}": x for k, x in state.as_dict(packed=True).items()}}
            ours = quantize_nf4(source, nested=nested)
            assert list(ours.state_dict()) == list(theirs)
            for name, tensor in ours.state_dict().items():
                assert torch.equal(tensor, theirs[name]), (shape, dtype, name)
            shared = NF4Weight.from_bitsandbytes(packed, state)
            if shape[1] % 2 == 0:  # bitsandbytes compiles another implementation for odd widths, which takes 10 s
                assert torch.equal(nf4_dequantize(shared), functional_.dequantize_4bit(packed, state))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@statistics
def test_dequantising_agrees_with_the_reference_bit_for_bit(nested, blocksize, dtype) -> None:
    for shape in SHAPES:
        weight = quantize_nf4(matrix(*shape), blocksize=blocksize, nested=nested)
        ours = nf4_dequantize(weight, dtype)
        assert ours.dtype == dtype
        assert torch.equal(ours, reference.nf4_dequantize(weight, dtype))


def test_dequantises_to_the_dtype_that_was_quantised_through_many_slabs() -> None:
    weight = quantize_nf4(matrix(1030, 1025).bfloat16())
    assert nf4_dequantize(weight).dtype == torch.bfloat16
    assert torch.equal(nf4_dequantize(weight), reference.nf4_dequantize(weight, torch.bfloat16))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@statistics
def test_product_agrees_with_the_reference(nested, shape, dtype) -> None:
    weight = quantize_nf4(matrix(*shape), nested=nested)
    for rows in ROWS:
        x, bias = matrix(rows, shape[1], 1).to(dtype), matrix(1, shape[0], 2)[0].to(dtype)
        check(
            lambda x, bias: nf4_linear(x, weight, bias),
            lambda x, bias: reference.nf4_linear(x, weight, bias),
            [x, bias],
        )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@statistics
def test_product_with_rows_of_whole_blocks(nested, blocksize) -> None:
    """The kernel for such rows takes 16 rows of W and up to 4096 elements of them at a time, and 1 to 8 rows of x."""
    for shape in [(1, 4096), (33, 4096), (18, 8192)] if blocksize == 4096 else [(1, 128), (19, 256), (34, 4096 + 128)]:
        weight = quantize_nf4(matrix(*shape), blocksize=blocksize, nested=nested)
        for rows in (*range(1, 9), 13):
            check(
                partial(nf4_linear, weight=weight),
                partial(reference.nf4_linear, weight=weight),
                [matrix(rows, shape[1], 1)],
            )


_AT_A_GUARD = """
import ctypes, mmap
from dataclasses import replace
import torch
from posttrain.ops import nf4_linear, quantize_nf4

def at_a_guard(values):
    pages = -(-values.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = pages * mmap.PAGESIZE - values.nbytes
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=begin)
    return copy.view(values.shape).copy_(values)

for height, width, block in [(17, 128, 64), (17, 128, 128), (19, 256, 128), (30, 128, 32), (33, 64, 32)]:
    weight = quantize_nf4(torch.randn(height, width), blocksize=block)
    guarded = replace(weight, packed=at_a_guard(weight.packed), absmax=at_a_guard(weight.absmax))
    for rows in (1, 8):
        x = torch.randn(rows, width)
        assert torch.equal(nf4_linear(x, guarded), nf4_linear(x, weight)), (height, width, block, rows)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="calls Linux' mprotect")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_product_reads_nothing_beyond_its_arrays(isa) -> None:
    """`packed` and `absmax` end where memory that can't be read begins; a CPU without `isa` runs what it has."""
    environment = {**os.environ, "POSTTRAIN_ISA": isa}
    done = subprocess.run([sys.executable, "-c", _AT_A_GUARD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"signal {-done.returncode}"


@pytest.mark.usefixtures("poison")
def test_products_of_many_slabs_and_of_other_shapes() -> None:
    weight = quantize_nf4(matrix(1030, 1025))
    truth = partial(reference.nf4_linear, weight=weight)
    for x in (matrix(40, 1025), matrix(3, 1025), matrix(4, 5 * 1025).view(2, 10, 1025), matrix(1, 1025)[0]):
        check(partial(nf4_linear, weight=weight), truth, [x])
    strided = matrix(2050, 40).T[:, ::2]
    check(partial(nf4_linear, weight=weight), truth, [strided])
    check(partial(nf4_linear, weight=weight), truth, [strided[:7]])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [3, 40])
def test_half_precision_is_as_good_as_pytorch(rows, dtype) -> None:
    weight = quantize_nf4(matrix(64, 130))
    dense = nf4_dequantize(weight, dtype)
    check(
        partial(nf4_linear, weight=weight),
        partial(reference.nf4_linear, weight=weight),
        [matrix(rows, 130, 1).to(dtype)],
        lambda x: functional.linear(x, dense),
    )


@pytest.mark.parametrize("size", [2.0**14, 2.0**-60])
def test_large_and_small_values_scale_exactly(size) -> None:
    x, source = matrix(5, 97, 1), matrix(33, 97)
    assert torch.equal(nf4_linear(x, quantize_nf4(size * source)), size * nf4_linear(x, quantize_nf4(source)))


def test_zero_and_undefined_weights_stay_so() -> None:
    assert torch.equal(nf4_dequantize(quantize_nf4(torch.zeros(3, 70), nested=True)), torch.zeros(3, 70))
    source = matrix(2, 128)
    source[1, 3] = float("nan")
    values = nf4_dequantize(quantize_nf4(source))
    assert torch.equal(values.isnan(), torch.tensor([[False] * 128, [True] * 64 + [False] * 64]))


@pytest.mark.parametrize("shape", [(33, 97), (34, 4096 + 128)], ids=str)
def test_same_bits_every_time_and_alone_or_beside_others(shape) -> None:
    weight = quantize_nf4(matrix(*shape))
    x = matrix(MATVEC_ROWS, shape[1], 1)
    whole = nf4_linear(x, weight)
    assert torch.equal(nf4_linear(x, weight), whole)
    for i in range(MATVEC_ROWS):
        assert torch.equal(nf4_linear(x[i], weight), whole[i])
        assert torch.equal(nf4_linear(x[: i + 1], weight), whole[: i + 1])


@statistics
def test_gradcheck(nested) -> None:
    weight = quantize_nf4(50 * matrix(7, 13), nested=nested)
    for rows in (3, 20):
        x, bias = torch.randn(rows, 13, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
        op = lambda x, bias: nf4_linear(x, weight, bias)  # noqa: E731
        inputs = (x.requires_grad_(), bias.requires_grad_())
        assert torch.autograd.gradcheck(op, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@statistics
def test_opcheck(nested, dtype) -> None:
    weight = Parts.of(quantize_nf4(matrix(7, 13), nested=nested))
    assert len(weight) == PARTS.count(",") + 1
    torch.library.opcheck(torch.ops.posttrain.nf4_dequantize, (*weight, dtype, "cpu"))
    for rows in (3, 20):
        x, bias = torch.randn(rows, 13, dtype=dtype, requires_grad=True), torch.randn(7, dtype=dtype)
        torch.library.opcheck(torch.ops.posttrain.nf4_linear, (x, bias, *weight, "cpu"))
        torch.library.opcheck(torch.ops.posttrain.nf4_linear_backward, (x.new_ones(rows, 7), *weight, "cpu"))


def test_compiles_without_graph_breaks_to_the_same_bits() -> None:
    weight = quantize_nf4(matrix(33, 97))
    op = partial(nf4_linear, weight=weight)
    ours, theirs = (matrix(5, 97, 1).requires_grad_() for _ in range(2))
    y, expected = torch.compile(op, backend="aot_eager", fullgraph=True)(ours), op(theirs)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(ours.grad, theirs.grad)


def test_the_weight_has_no_gradient_and_nothing_is_saved_of_x() -> None:
    weight = quantize_nf4(matrix(64, 130))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        nf4_linear(matrix(40, 130).requires_grad_(), weight)
    kept = {weight.packed.data_ptr(), weight.absmax.data_ptr()}
    assert {x.data_ptr() for x in saved} == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 12),), r"x must be floating \[..., 13\] for W \[7, 13\]; got torch.float32 \[2, 12\]"),
        ((torch.ones(2, 13).int(),), r"x must be floating .*got torch.int32 \[2, 13\]"),
        ((torch.ones(2, 13, device="meta"),), "x is on meta, the weight on cpu"),
        (
            (torch.ones(2, 13), torch.ones(8)),
            r"bias must be \[7\] torch.float32 on cpu; got torch.float32 \[8\] on cpu",
        ),
        ((torch.ones(2, 13), torch.ones(7).half()), r"bias must be .*got torch.float16 \[7\]"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    x, *bias = arguments
    with pytest.raises(ValueError, match=f"nf4_linear: {message}"):
        nf4_linear(x, quantize_nf4(matrix(7, 13)), *bias)


def test_wrong_matrices() -> None:
    weight = quantize_nf4(matrix(7, 13), nested=True)
    with pytest.raises(ValueError, match=r"packed must hold 46 uint8 for \[7, 13\]; got \[45, 1\] torch.uint8"):
        replace(weight, packed=weight.packed[:45])
    with pytest.raises(ValueError, match=r"absmax must hold 3 torch.uint8 .* in blocks of 32; got \[2\]"):
        replace(weight, blocksize=32)
    with pytest.raises(ValueError, match=r"blocksize must be one of .*, got 48"):
        quantize_nf4(matrix(7, 13), blocksize=48)
    with pytest.raises(ValueError, match=r"weight must be \[N, K\] in 16 or 32 bits, got torch.float64 \[7, 13\]"):
        quantize_nf4(matrix(7, 13).double())
    with pytest.raises(ValueError, match=r"nf4_dequantize: weight must be an NF4Weight, .* got Tensor"):
        nf4_dequantize(matrix(7, 13))
    with pytest.raises(ValueError, match=r"nf4_linear: weight must be an NF4Weight, .* got Tensor"):
        nf4_linear(matrix(2, 13), matrix(7, 13))
    with pytest.raises(ValueError, match=r"dtype must be floating, got torch.int32"):
        nf4_dequantize(weight, torch.int32)
    with pytest.raises(ValueError, match="'weight' lacks nested_absmax"):
        tensors = golden_checkpoint(nested=True)
        NF4Weight.from_state_dict({name: x for name, x in tensors.items() if name != "weight.nested_absmax"})
    with pytest.raises(ValueError, match=r"'weight' and 'weight.quant_state.bitsandbytes__nf4' are needed"):
        NF4Weight.from_state_dict({"weight": weight.packed})
    with pytest.raises(ValueError, match="the 16 values must be those of NF4"):
        NF4Weight.from_state_dict({**golden_checkpoint(nested=False), "weight.quant_map": torch.zeros(16)})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (b"{", "is not what bitsandbytes writes: JSONDecodeError"),
        (b"{}", "is not what bitsandbytes writes: KeyError"),
        (b'{"dtype": "float64", "shape": [7, 13], "blocksize": 64}', "a dtype of float32, float16, bfloat16"),
        (b'{"dtype": "float32", "shape": [7, 13, 2], "blocksize": 64}', r"a shape \[N, K\]"),
    ],
)
def test_broken_facts_of_a_checkpoint(facts, message) -> None:
    broken = {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(facts), dtype=torch.uint8)}
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_state_dict({**golden_checkpoint(nested=False), **broken})


def test_repr() -> None:
    weight = quantize_nf4(matrix(7, 13), nested=True)
    assert repr(weight) == "NF4Weight([7, 13] of float32 on cpu, blocks of 64, nested statistics)"


def test_parts_with_gaps() -> None:
    weight = quantize_nf4(matrix(7, 13))
    packed = torch.zeros(weight.packed.numel(), 2, dtype=torch.uint8)
    packed[:, 0] = weight.packed[:, 0]
    gappy, x = replace(weight, packed=packed[:, 0]), matrix(3, 13)
    assert torch.equal(nf4_linear(x, gappy), nf4_linear(x, weight))
    assert torch.equal(ops.lora_linear(x, gappy), ops.lora_linear(x, weight))


def test_backends_can_be_forced() -> None:
    weight = quantize_nf4(matrix(7, 13))
    with ops.use_backend("reference"):
        assert torch.equal(nf4_dequantize(weight), reference.nf4_dequantize(weight, torch.float32))
        x = matrix(3, 13)
        assert torch.equal(nf4_linear(x, weight), reference.nf4_linear(x, weight))
