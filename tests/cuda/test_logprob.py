"""linear_logprob with the CUDA fold: library GEMM tiles, statistics and gradients on the GPU."""

import pytest
import torch
from tolerance import HALF, assert_as_good_as, assert_true_to, assert_unbiased

from posttrain.ops import linear_logprob, logprob_tiles, reference, use_backend


@pytest.fixture(params=[131, 136])
def small_tiles(monkeypatch, request):
    """Tiles that small problems cross several of, with rows that are 16-byte aligned or not."""
    monkeypatch.setattr(logprob_tiles, "ROWS", 7)
    monkeypatch.setattr(logprob_tiles, "COLUMNS", request.param)


def inputs(device: str, dtype: torch.dtype, seed: int = 3, **sizes: int) -> dict[str, torch.Tensor]:
    defaults = {"n": 5, "m": 11, "h": 40, "v": 300, "rank": 0}
    n, m, h, v, rank = (defaults | sizes).values()
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (n, h), "bias": (v,), "weight": (v, h)}
    shapes |= {"lora_a": (rank, h), "lora_b": (v, rank)} if rank else {}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in tensors.keys() & {"weight", "lora_a", "lora_b"}:
        tensors[name] /= tensors[name].shape[1] ** 0.5
    targets = torch.randint(0, v, (m,), generator=generator)
    targets[2:3] = -100
    index = {"targets": targets, "rows": torch.randint(0, max(n, 1), (m,), generator=generator)}
    return {k: x.to(device, dtype).requires_grad_() for k, x in tensors.items()} | {
        k: x.to(device) for k, x in index.items()
    }


def run(op, x: dict[str, torch.Tensor], frozen: bool, outputs: int, **options):
    if "lora_a" in x:
        options["lora"] = x["lora_a"], x["lora_b"], 0.5
    result = op(x["hidden"], x["weight"], x["targets"], rows=x["rows"], bias=x["bias"], **options)
    generator = torch.Generator().manual_seed(5)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in result[:outputs])
    leaves = [x["hidden"]] if frozen else [y for y in x.values() if y.is_floating_point()]
    return result, torch.autograd.grad(loss, leaves)


def check(x: dict[str, torch.Tensor], frozen: bool, outputs: int, **options) -> None:
    """Results and gradients in float32 are true to the reference, and the same bits again."""
    wide = {k: y.detach().cpu() for k, y in x.items()}
    wide = {k: y.double().requires_grad_() if y.is_floating_point() else y for k, y in wide.items()}
    for name in x.keys() & {"weight", "bias"}:
        x[name].requires_grad_(not frozen)
    with use_backend("cuda"):
        ours, grads = run(linear_logprob, x, frozen, outputs, need_entropy=True, **options)
        again, grads_again = run(linear_logprob, x, frozen, outputs, need_entropy=True, **options)
    truth, true_grads = run(reference.linear_logprob, wide, frozen, outputs, **options)
    for value, true in zip([*ours[:3], *grads], [*truth[:3], *true_grads], strict=True):
        assert_true_to(value.detach().cpu(), true.detach())
    assert torch.equal(ours[3].cpu(), truth[3])
    for value, second in zip([*ours, *grads], [*again, *grads_again], strict=True):
        assert torch.equal(value, second)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.usefixtures("poison", "small_tiles")
def test_against_the_reference(device, frozen, softcap, outputs):
    options = {"softcap": softcap, "temperature": 0.8, "logit_scale": 1.2}
    check(inputs(device, torch.float32), frozen, outputs, **options)


@pytest.mark.parametrize("shape", [(0, 0, 8, 97), (1, 1, 13, 97), (63, 63, 13, 97), (2, 3, 4, 50257)], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.usefixtures("poison")
def test_shapes(device, frozen, shape):
    """From no rows to 25 tiles of the vocabulary."""
    check(inputs(device, torch.float32, **dict(zip("nmhv", shape, strict=True))), frozen, 1)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.usefixtures("poison", "small_tiles")
def test_an_adapter_on_the_head(device, outputs):
    check(inputs(device, torch.float32, rank=3), False, outputs, softcap=4.0)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.usefixtures("poison", "small_tiles")
def test_all_targets_ignored(device, frozen):
    x = inputs(device, torch.float32, rank=0 if frozen else 3)
    x["targets"].fill_(-100)
    check(x, frozen, 1)
    with use_backend("cuda"):
        ours, grads = run(linear_logprob, x, frozen, 1)
    assert not any(y.any() for y in (ours[0], *grads))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.usefixtures("poison", "small_tiles")
def test_strides(device, frozen):
    """Every second element of every dimension."""
    x = inputs(device, torch.float32, n=10, m=22, h=80, v=600, rank=0 if frozen else 6)
    x["rows"] //= 2
    x["targets"] //= torch.where(x["targets"] < 0, 1, 2)
    halves = {k: y.detach()[(slice(None, None, 2),) * y.ndim] for k, y in x.items()}
    check({k: y.requires_grad_(y.is_floating_point()) for k, y in halves.items()}, frozen, 3)


@pytest.mark.parametrize("which", ["logprob", "gradient of the bias"])
def test_errors_have_no_side(device, which, monkeypatch):
    monkeypatch.setattr(logprob_tiles, "COLUMNS", 64)

    def result(op, seed: int, device: str, dtype: torch.dtype) -> torch.Tensor:
        x = inputs(device, dtype, seed, n=4, m=8, h=8, v=97)
        outputs, grads = run(op, x, False, 1)
        return (outputs[0].detach() if which == "logprob" else grads[1]).cpu()

    def ours(seed: int) -> torch.Tensor:
        with use_backend("cuda"):
            return result(linear_logprob, seed, device, torch.float32)

    assert_unbiased(
        ours,
        lambda seed: result(plain, seed, "cpu", torch.float32),
        lambda seed: result(reference.linear_logprob, seed, "cpu", torch.float64),
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("save", ["unit", "none"])
def test_opcheck(device, save, dtype):
    x = inputs(device, dtype, rank=0 if save == "unit" else 3)
    for name in ("weight", "bias"):
        x[name].requires_grad_(save == "none")
    tensors = [x.get(name) for name in ("hidden", "weight", "targets", "rows", "bias", "lora_a", "lora_b")]
    arguments = (*tensors, 0.5, 0.9, 3.0, 1.1, True, 1 << 20, save, "cuda")
    # gradients in half precision differ between the checks by more than its tolerance
    utils = ("test_schema", "test_faketensor") if dtype in HALF else torch.library._OPCHECK_DEFAULT_UTILS
    torch.library.opcheck(torch.ops.posttrain.linear_logprob.default, arguments, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poison")
def test_whole_tiles(device, dtype):
    """Rows of 2048 columns and of what is left of 3001; repeated rows have the same bits."""
    x = inputs(device, dtype, n=3, m=3, h=8, v=3001)
    with use_backend("cuda"):
        ours, grads = run(linear_logprob, x, True, 1)
        many, _ = run(linear_logprob, x | {k: x[k].repeat(3) for k in ("targets", "rows")}, True, 1)
    wide = {k: y.detach().cpu() for k, y in x.items()}
    wide = {k: y.double().requires_grad_() if y.is_floating_point() else y for k, y in wide.items()}
    truth, true_grads = run(reference.linear_logprob, wide, True, 1)
    assert_true_to(ours[0].detach().cpu(), truth[0].detach())
    if dtype == torch.float32:
        assert_true_to(grads[0].cpu(), true_grads[0])
    for part in many[0].chunk(3):
        assert torch.equal(part, many[0][:3])


def test_a_row_wider_than_its_registers_is_refused(device, monkeypatch):
    monkeypatch.setattr(logprob_tiles, "COLUMNS", 2049)
    x = inputs(device, torch.float32, n=3, m=3, h=4, v=2049)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="CUDA: invalid argument"):
        run(linear_logprob, x, True, 1)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.usefixtures("poison", "small_tiles")
def test_half_precision(device, frozen, dtype):
    """bfloat16 goes into the GEMMs as it is; log-probabilities are as from float32 copies."""
    x = inputs(device, dtype)
    for name in ("weight", "bias"):
        x[name].requires_grad_(not frozen)
    wide = {name: y.detach().cpu() for name, y in x.items()}
    wide = {name: y.float().requires_grad_() if y.is_floating_point() else y for name, y in wide.items()}
    with use_backend("cuda"):
        ours, grads = run(linear_logprob, x, frozen, 1)
        _, grads_again = run(linear_logprob, x, frozen, 1)
    truth, true_grads = run(reference.linear_logprob, wide, frozen, 1)
    peer_grads = run(plain, x, frozen, 1)[1]
    torch.testing.assert_close(ours[0].detach().cpu(), truth[0].detach())
    for value, again, peer, true in zip(grads, grads_again, peer_grads, true_grads, strict=True):
        assert torch.equal(value, again)
        assert_as_good_as(value.cpu(), peer.cpu(), true)


def plain(hidden, weight, targets, *, rows, bias):
    """PyTorch's way, with logits in the dtype of its inputs."""
    counts = targets != -100
    log_p = torch.nn.functional.linear(hidden[rows], weight, bias).log_softmax(-1)
    chosen = log_p.gather(-1, torch.where(counts, targets, 0).unsqueeze(-1)).squeeze(-1)
    return (torch.where(counts, chosen, 0).float(),)


@pytest.mark.usefixtures("poison", "small_tiles")
def test_extreme_logits(device):
    z = torch.randint(-40, 41, (6, 600), generator=torch.Generator().manual_seed(0)) / 8
    z[0] += 1e4
    z[1] -= 1e4
    z[2, 11], z[2, 400] = 1e4, -1e4
    z[3, 500:] += 1e4
    with torch.no_grad():
        logits = {"hidden": torch.eye(6) * 128, "weight": z.T / 128, "bias": torch.zeros(600)}
        index = {"targets": torch.tensor([1, 2, 11, 520, 33, 5]), "rows": torch.arange(6)}
    x = {k: t.to(device).requires_grad_(k in logits) for k, t in (logits | index).items()}
    wide = {k: t.double().requires_grad_() for k, t in logits.items()} | index
    with use_backend("cuda"):
        ours, grads = run(linear_logprob, x, False, 3, need_entropy=True)
    truth, true_grads = run(reference.linear_logprob, wide, False, 3)
    for value, true in zip([*ours[:3], *grads], [*truth[:3], *true_grads], strict=True):
        assert_true_to(value.detach().cpu(), true.detach())
