"""linear_logprob: forward, frozen head and trainable head, over the vocabularies of models.

Operations are those of the products that nobody can do without: the logits, 2 N H V; as many again for the gradient of
the hidden states; and again for that of a trainable head. Bytes are those of the inputs and gradients. The loss is the
sum over the rows.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from posttrain import ops
from posttrain.bench import peers
from posttrain.bench.case import BOTH, FORWARD, Case, Problem, Work, randn
from posttrain.bench.device import DEVICE, DTYPE
from posttrain.bench.shapes import ModelShape, Suite


def linear_logprob(suite: Suite) -> list[Case]:
    """Frozen and trainable heads."""
    named: peers.Makers = {
        "torch.compile": peers.compiled,
        "torch linear_cross_entropy": peers.torch_linear_cross_entropy,
        "Liger": peers.liger_linear_cross_entropy,
        "cut-cross-entropy": peers.cut_cross_entropy,
        "TRL": peers.trl_logprob,
        "quack": peers.quack_linear_cross_entropy,
        "Unsloth": peers.unsloth_cross_entropy,
    }
    cases = {}
    for model in suite.models:
        for kind in ("frozen", "trainable"):
            title = f"[{suite.tokens}, {model.hidden}] x [{model.vocabulary}, {model.hidden}] {kind}"
            logits = suite.tokens * model.vocabulary
            need = 4 * logits * 2 * DTYPE.itemsize + 3 * (model.vocabulary + suite.tokens) * model.hidden * 4
            cases[title] = Case(
                "linear_logprob",
                title,
                need,
                partial(_problem, suite.tokens, model, kind == "trainable"),
                _work(suite.tokens, model, kind == "trainable"),
                named,
            )
    return list(cases.values())


def _work(rows: int, model: ModelShape, trainable: bool) -> dict[str, Work]:
    product = 2.0 * rows * model.hidden * model.vocabulary
    x, weight = (count * model.hidden * DTYPE.itemsize for count in (rows, model.vocabulary))
    if trainable:
        return {BOTH: Work(3 * product, 2 * (x + weight))}
    return {FORWARD: Work(product, x + weight), BOTH: Work(2 * product, 2 * x + weight)}


def _problem(rows: int, model: ModelShape, trainable: bool) -> Problem:
    hidden, vocabulary = model.hidden, model.vocabulary
    x = randn(rows, hidden, grad=True)
    weight = randn(vocabulary, hidden, scale=hidden**-0.5, grad=trainable)
    y = torch.randint(vocabulary, (rows,), device=DEVICE)
    return Problem((x, weight, y), ours, plain)


def ours(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """Minus the sum of the log-probabilities of the targets."""
    return -ops.linear_logprob(x, weight, y).logprob.sum()


def plain(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """The same through the whole logits."""
    logits = functional.linear(x, weight)
    return functional.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), y, reduction="sum")
