"""Generation on models of a shape with random weights, drawn freely: by default eight completions of four prompts.

Plain PyTorch is `model.generate` with its cache, on copies of the prompts. Our log-probabilities are held to those of
the plain model in a wider dtype for the same tokens. Operations are 2 for each weight of the layers and token, the
prompts' once, and of the head and new token; bytes are the weights once for each step.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from posttrain.bench import decode_peers as peers
from posttrain.bench.case import Arguments, Case, Problem, Work
from posttrain.bench.device import DEVICE, DTYPE, WIDER
from posttrain.bench.model import make_models
from posttrain.bench.peers import Makers
from posttrain.bench.shapes import ModelShape, Suite

GENERATE = "generate"
PEERS: Makers = {"continuous batching": peers.continuous_batching}


class _NoWords:
    """A tokenizer of tokens that mean nothing."""

    eos_token_id = bos_token_id = None

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def decode(self, tokens: object, **options: object) -> str:
        return ""


def rollout(suite: Suite, prompts: int = 4, each: int = 8) -> list[Case]:
    """`each` completions of `prompts` prompts; as many new tokens as a prompt has."""
    length, cases = suite.tokens // 16, []
    for model in suite.steps:
        need = model.weights * (2.0 * DTYPE.itemsize + WIDER.itemsize)
        need += 2.0 * prompts * each * 2 * length * model.vocabulary * WIDER.itemsize
        title = f"{model.name}, {prompts} x ({length} + {each} x {length}) tokens"
        make = partial(_problem, model, length, prompts, each)
        cases.append(Case("rollout", title, need, make, _work(model, length, prompts, each), PEERS))
    return cases


def _work(model: ModelShape, length: int, count: int, each: int) -> dict[str, Work]:
    drawn, head = count * each * length, model.hidden * model.vocabulary
    flops = 2.0 * model.layers * model.layer_weights * (count * length + drawn) + 2.0 * head * drawn
    return {GENERATE: Work(flops, float(length * (model.weights - head) * DTYPE.itemsize))}


def _problem(model: ModelShape, length: int, count: int, each: int) -> Problem:
    from posttrain.rollout import Engine, SamplingParams

    prepared, plain, wide = make_models(model, 2 * length)
    prompts = torch.randint(3, model.vocabulary, (count, length))
    rows = prompts.repeat_interleave(each, 0).to(DEVICE)
    engine = Engine(prepared, _NoWords(model.vocabulary), memory=_cache_bytes(model, length, count * each))
    params = SamplingParams(n=each, max_tokens=length, ignore_eos=True, seed=0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}

    def ours() -> tuple[Tensor, Tensor]:
        done = [completion for each in engine.generate(prompts.tolist(), params) for completion in each]
        tokens = torch.tensor([completion.token_ids for completion in done], device=DEVICE)
        return tokens, torch.tensor([completion.logprobs for completion in done], device=DEVICE)

    def theirs() -> tuple[Tensor, None]:
        with torch.inference_mode():
            return plain.generate(rows, attention_mask=torch.ones_like(rows), **options)[:, length:].clone(), None

    def checked(_: Arguments, result: Any) -> list[Tensor]:
        tokens, logprobs = result
        found = _scored(plain, rows, tokens) if logprobs is None else logprobs
        return [(found.to(WIDER) - _scored(wide, rows, tokens)).to(found.dtype)]

    truth = [torch.zeros(len(rows), length, device=DEVICE, dtype=WIDER)]
    context = SimpleNamespace(model=plain, rows=rows, length=length)
    return Problem((), ours, theirs, context, checked=checked, truth=lambda: truth)


def _cache_bytes(model: ModelShape, length: int, count: int) -> int:
    """Room for all sequences without sharing."""
    tokens = count * (2 * length + 32)
    return 2 * model.layers * model.key_heads * model.width * DTYPE.itemsize * tokens


def _scored(module: Any, rows: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the new tokens by a plain forward."""
    with torch.no_grad():
        whole = torch.cat([rows, tokens], 1)
        logits = module(input_ids=whole, use_cache=False).logits[:, rows.shape[1] - 1 : -1]
        table = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return table.gather(-1, tokens[..., None])[..., 0]
