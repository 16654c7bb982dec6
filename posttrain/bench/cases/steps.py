"""Optimizer steps of SFT, DPO and GRPO on models of a shape with random weights, all of which are trained.

Ours runs the packed batch, prompts once, through the prepared model and `linear_logprob`; plain PyTorch runs
transformers' model on the padded batch, with the prompts copied, and log_softmax of its logits, those of prompts left
out where all answers begin later (`logits_to_keep`, as TRL's GRPO has it). Loss, backward and AdamW (with a learning
rate of 0, so that the weights stay) are the same for both. GRPO's completions are given: what makes them is the case
`rollout`. Operations are those of the matrix products of the packed tokens: 6 for each weight of the layers and token,
and of the head and target; DPO's reference takes 2 more.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from posttrain.bench import trainer_peers as peers
from posttrain.bench.case import Case, Problem, Work
from posttrain.bench.device import DEVICE, DTYPE, GPU, WIDER
from posttrain.bench.model import make_models
from posttrain.bench.peers import Makers
from posttrain.bench.shapes import ModelShape, Suite

STEP = "step"
Logprobs = Callable[[], Tensor]
Loss = Callable[[Logprobs, Tensor], Tensor]  # of the policy's log-probabilities, and their sequences


class Texts(NamedTuple):
    """Random sequences: tokens of each group's prompt, and of each answer to it."""

    prompts: list[int]
    answers: list[int]


def sft(suite: Suite) -> list[Case]:
    """Documents of different lengths."""
    draw = torch.Generator().manual_seed(1)
    spread = torch.randint(suite.tokens // 64, suite.tokens // 8, (64,), generator=draw)
    lengths = spread[: int((spread.cumsum(0) < suite.tokens).sum())].tolist()
    return _cases(
        suite,
        "sft",
        f"{len(lengths)} documents of {sum(lengths)}",
        Texts([1] * len(lengths), [n - 1 for n in lengths]),
        1,
        _sft,
    )


def dpo(suite: Suite) -> list[Case]:
    """Four prompts with two answers each."""
    prompt, answer = suite.tokens // 8, suite.tokens // 32
    return _cases(suite, "dpo", f"4 x ({prompt} + 2 x {answer})", Texts([prompt] * 4, [answer] * 8), 2, _dpo)


def grpo(suite: Suite, each: int = 8) -> list[Case]:
    """Two prompts with `each` completions each."""
    prompt, answer = suite.tokens // 8, suite.tokens // 32
    texts = Texts([prompt] * 2, [answer] * 2 * each)
    return _cases(suite, "grpo", f"2 x ({prompt} + {each} x {answer})", texts, each, _grpo)


def _sft(logprobs: Logprobs, sequence: Tensor) -> Tensor:
    return -logprobs().mean()


def _dpo(logprobs: Logprobs, sequence: Tensor) -> Tensor:
    """-log sigmoid(0.1 (chosen - rejected)), each less the reference, which is the policy itself."""
    count = int(sequence[-1]) + 1
    with torch.no_grad():
        reference = logprobs()
    policy = logprobs()
    sums = policy.new_zeros(count).index_add(0, sequence, policy - reference)
    return -logsigmoid(0.1 * (sums[::2] - sums[1::2])).mean()


def _grpo(logprobs: Logprobs, sequence: Tensor) -> Tensor:
    """The clipped surrogate on-policy, with advantages that alternate."""
    policy = logprobs()
    ratio = (policy - policy.detach()).exp()
    advantage = torch.where(sequence % 2 == 0, 1.0, -0.5)
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def _cases(suite: Suite, op: str, title: str, texts: Texts, each: int, loss: Loss) -> list[Case]:
    longest = max(texts.prompts) + max(texts.answers)
    named: Makers = {"torch.compile": peers.compiled, "TRL": peers.trl}
    if op == "sft":
        named = {**named, "TRL padding-free": peers.trl_padding_free}
    cases = []
    for model in suite.steps:
        weights = max(4 * DTYPE.itemsize, DTYPE.itemsize + 2 * WIDER.itemsize) * model.weights
        logits = 3.0 * WIDER.itemsize * len(texts.answers) * (max(texts.answers) + 1) * model.vocabulary
        need = weights + logits + 40.0 * len(texts.answers) * longest * model.layers * model.inner
        make = partial(_problem, model, texts, each, longest, loss)
        work = {STEP: _work(model, texts, 8 if op == "dpo" else 6)}
        cases.append(Case(op, f"{model.name}, {title} tokens", need, make, work, named))
    return cases


def _work(model: ModelShape, texts: Texts, factor: int) -> Work:
    targets = sum(texts.answers)
    layers = model.layers * model.layer_weights * (sum(texts.prompts) + targets)
    return Work(float(factor * (layers + model.hidden * model.vocabulary * targets)), 0.0)


def _problem(model: ModelShape, texts: Texts, each: int, longest: int, loss: Loss) -> Problem:
    from posttrain.models import token_logprobs

    prepared, plain, wide = make_models(model, longest)
    batch, rows, real = _batch(texts, each, model.vocabulary)
    first = int(real.any(0).nonzero()[0])  # of the logits that are needed
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0, weight_decay=0.0, fused=GPU)

    def padded(module: Any) -> Tensor:
        """Of the targets, in the order of the packed batch."""
        logits = module(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            use_cache=False,
            logits_to_keep=rows.shape[1] - first,
        ).logits
        table = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return table[:, :-1].gather(-1, rows[:, first + 1 :, None])[..., 0][real[:, first:]]

    truth = _step(wide, partial(padded, wide), loss, batch.sequence)
    del wide

    def step(logprobs: Logprobs) -> Callable[[], list[Tensor]]:
        return partial(_step, plain, logprobs, loss, batch.sequence, optimizer)  # all have the same weights

    context = SimpleNamespace(model=plain, rows=rows, logprobs=padded, step=step)
    context.labels = torch.where(functional.pad(real, (1, 0)), rows, -100)
    context.lengths = [texts.prompts[index // each] + answer for index, answer in enumerate(texts.answers)]
    ours = step(lambda: token_logprobs(prepared, batch).logprob)
    return Problem((), ours, step(partial(padded, plain)), context, truth=lambda: truth)


def _step(module: Any, logprobs: Logprobs, loss: Loss, sequence: Tensor, optimizer: Any = None) -> list[Tensor]:
    """One optimizer step: its loss, the log-probabilities, and the gradient of the first norm, through all layers."""
    seen: list[Tensor] = []

    def noted() -> Tensor:
        seen.append(logprobs())
        return seen[-1]

    module.zero_grad()
    with torch.enable_grad():
        value = loss(noted, sequence)
        value.backward()
    if optimizer is not None:
        optimizer.step()
    return [value.detach(), seen[-1].detach(), module.get_decoder().layers[0].input_layernorm.weight.grad.clone()]


def _batch(texts: Texts, each: int, vocabulary: int) -> tuple[Any, Tensor, Tensor]:
    """(packed batch, padded token ids `[B, L]`, which of the padded tokens after the first are targets)."""
    from posttrain.data import Example, PackedBatch

    draw = torch.Generator().manual_seed(0)

    def random(count: int) -> Tensor:
        return torch.randint(3, vocabulary, (count,), generator=draw, dtype=torch.int32)

    prompts = [random(count) for count in texts.prompts]
    owners = [prompts[index // each] for index in range(len(texts.answers))]
    ids = [torch.cat([prompt, random(count)]) for prompt, count in zip(owners, texts.answers, strict=True)]
    masks = [torch.arange(len(x)) >= len(prompt) for x, prompt in zip(ids, owners, strict=True)]
    examples = [Example(x.numpy(), mask.numpy()) for x, mask in zip(ids, masks, strict=True)]
    rows, real = (pad_sequence(x, batch_first=True).to(DEVICE) for x in (ids, masks))
    return PackedBatch.pack(examples, share_prefixes=each > 1).to(DEVICE), rows.long(), real[:, 1:]
