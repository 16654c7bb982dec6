"""linear_logprob with the CUDA fold: library GEMM tiles, statistics and gradients on the GPU."""

import pytest
import torch
from tolerance import HALF, assert_as_good_as, assert_true_to

from posttrain.ops import linear_logprob, logprob_tiled, reference, use_backend


@pytest.fixture(params=[131, 136])
def small_tiles(monkeypatch, request):
    """Tiles that small problems cross several of, with rows that are 16-byte aligned or not."""
    monkeypatch.setattr(logprob_tiled, "ROWS", 7)
    monkeypatch.setattr(logprob_tiled, "COLUMNS", request.param)


def inputs(device: str, dtype: torch.dtype, **sizes: int) -> dict[str, torch.Tensor]:
    n, m, h, v = (sizes.get(name, default) for name, default in zip("nmhv", (5, 11, 40, 300), strict=True))
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator) for name, shape in {"hidden": (n, h), "bias": (v,)}.items()
    }
    tensors["weight"] = torch.randn(v, h, generator=generator) / h**0.5
    targets = torch.randint(0, v, (m,), generator=generator)
    targets[2] = -100
    index = {"targets": targets, "rows": torch.randint(0, n, (m,), generator=generator)}
    return {k: x.to(device, dtype).requires_grad_() for k, x in tensors.items()} | {
        k: x.to(device) for k, x in index.items()
    }


def run(op, x: dict[str, torch.Tensor], frozen: bool, outputs: int, **options):
    result = op(x["hidden"], x["weight"], x["targets"], rows=x["rows"], bias=x["bias"], **options)
    generator = torch.Generator().manual_seed(5)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in result[:outputs])
    leaves = [x["hidden"]] if frozen else [x["hidden"], x["weight"], x["bias"]]
    return result, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.usefixtures("poison", "small_tiles")
def test_against_the_reference(device, frozen, softcap, outputs):
    options = {"softcap": softcap, "temperature": 0.8, "logit_scale": 1.2}
    x = inputs(device, torch.float32)
    for name in ("weight", "bias"):
        x[name].requires_grad_(not frozen)
    with use_backend("cuda"):
        ours, grads = run(linear_logprob, x, frozen, outputs, need_entropy=True, **options)
        again, grads_again = run(linear_logprob, x, frozen, outputs, need_entropy=True, **options)
    truth, true_grads = run(reference.linear_logprob, inputs("cpu", torch.float64), frozen, outputs, **options)
    for value, true in zip([*ours[:3], *grads], [*truth[:3], *true_grads], strict=True):
        assert_true_to(value.detach().cpu(), true.detach())
    assert torch.equal(ours[3].cpu(), truth[3])
    for value, second in zip([*ours, *grads], [*again, *grads_again], strict=True):
        assert torch.equal(value, second)


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
    monkeypatch.setattr(logprob_tiled, "COLUMNS", 2049)
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
