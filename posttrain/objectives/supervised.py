"""Supervised fine-tuning: the mean negative log-likelihood of the target tokens.

With N the number of target tokens of the whole optimizer step (all its micro-batches),

    loss = -1/N sum over targets of log p(target | what precedes it)

so a token weighs the same in whichever micro-batch it falls.
"""

from posttrain.objectives.loss import Loss
from posttrain.ops.logprob import TokenLogprobs


def cross_entropy(policy: TokenLogprobs, num_targets: int) -> Loss:
    """Share of this micro-batch in the step's cross-entropy.

    Args:
        policy: of this micro-batch's targets, `[M]` each, with entropy.
        num_targets: target tokens of the whole optimizer step.

    Returns:
        The loss, with metrics `loss`, `entropy` (nats) and `mean_token_accuracy` (share of targets that are the most
        likely token).
    """
    if num_targets < 1:
        raise ValueError(f"cross_entropy: the step must have at least one target token, got {num_targets}")
    if policy.entropy is None:
        raise ValueError("cross_entropy: the policy must come with need_entropy=True, for the metric `entropy`")
    value = -policy.logprob.sum() / num_targets
    metrics = {
        "loss": value.detach(),
        "entropy": policy.entropy.detach().sum() / num_targets,
        "mean_token_accuracy": policy.is_top1.sum() / num_targets,
    }
    return Loss(value, metrics)
