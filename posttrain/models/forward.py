"""From a packed batch to hidden states, and from there to log-probabilities, without the logits in between."""

from torch import Tensor, nn

from posttrain.data.batch import PackedBatch
from posttrain.models.causal_lm import ModelError, causal_lm, decoder, position_limit
from posttrain.models.head import head
from posttrain.models.packing import run_packed, run_padded
from posttrain.ops import TokenLogprobs, linear_logprob


def hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Last hidden states `[T, H]` of the packed tokens; the language head is never run.

    No sequence influences another. A model prepared with our attention runs all tokens as one row, any other one
    padded row for each sequence. Adapters, activation checkpointing and `torch.no_grad` work as always.

    Raises `ModelError` for a sequence with more positions than the model learned.
    """
    causal = causal_lm(model)
    limit = position_limit(causal)
    if limit is not None and batch.layout.num_tokens > limit:
        longest = int(batch.layout.positions.max()) + 1
        if longest > limit:
            raise ModelError(f"a sequence has {longest} tokens, and {type(causal).__name__} knows {limit} positions")
    run = run_packed if causal.config._attn_implementation == "posttrain" else run_padded
    return run(decoder(causal), batch.input_ids, batch.layout)


def token_logprobs(
    model: nn.Module,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    need_entropy: bool = False,
    hidden: Tensor | None = None,
) -> TokenLogprobs:
    """Log-probabilities `[M]` of the batch's targets, and the entropy at their places if asked for.

    `hidden` are the batch's hidden states, where they are there already.
    """
    weight, bias, softcap, logit_scale, lora = head(model)
    return linear_logprob(
        hidden_states(model, batch) if hidden is None else hidden,
        weight,
        batch.targets,
        rows=batch.rows,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
        need_entropy=need_entropy,
    )
