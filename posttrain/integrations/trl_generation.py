"""The completions of TRL's GRPO and RLOO trainers, drawn by our engine.

One method of theirs calls the policy's `generate`; while it runs, that is ours. It takes and gives back what
transformers' does, prompts padded on the left and behind them what was drawn, and reads equal prompts once. The
distribution is the same, the random numbers are others, and without sampling so are the tokens.

The settings are those that transformers would go by, from the trainer, the model and the defaults. Where the engine
can't follow one of them, or the arguments or the model, transformers generates as always, counted with the reason.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin

from posttrain.integrations.counting import count, say
from posttrain.integrations.layer_check import divided, looked_at
from posttrain.models import ModelError
from posttrain.models.attention import NAME
from posttrain.models.causal_lm import causal_lm, decoder
from posttrain.models.lora_layers import hooked, per_row
from posttrain.rollout import Completion, Engine, SamplingParams

GENERATION = {"GRPOTrainer": ("_generate_single_turn",), "RLOOTrainer": ("_generate_single_turn",)}

_FOLLOWED = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id", "pad_token_id")
_IMMATERIAL = (  # to sampling of given token ids, each sequence for itself
    "_from_model_config",
    "bos_token_id",
    "compile_config",
    "disable_compile",
    "early_stopping",
    "length_penalty",
    "max_length",  # max_new_tokens is there
    "transformers_version",
    "use_cache",
)


class _Unfit(Exception):
    """Why the engine can't generate something."""


def by_engine(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`theirs`, a method of a trainer, in which the policy generates by our engine where that is possible."""

    @wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            causal = causal_lm(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        except ModelError:
            return theirs(self, *args, **kwargs)
        with _generating(causal, self.processing_class):
            return theirs(self, *args, **kwargs)

    return method


@contextmanager
def _generating(causal: Any, tokenizer: Any) -> Iterator[None]:
    """`causal.generate` is ours."""
    before, theirs = vars(causal).get("generate"), causal.generate
    own = before is not None or type(causal).generate is not GenerationMixin.generate

    def generate(**inputs: Any) -> Any:
        try:
            if own:
                raise _Unfit("the model has a generate of its own")
            found = _generate(causal, tokenizer, **inputs)
        except _Unfit as reason:
            count(f"completions by transformers: {reason}")
            say(f"posttrain: transformers draws the completions: {reason}")
            return theirs(**inputs)
        count("completions by the engine")
        return found

    causal.generate = generate
    try:
        yield
    finally:
        if before is None:
            del causal.generate
        else:
            causal.generate = before


def _generate(
    causal: Any, tokenizer: Any, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **others: Any
) -> Tensor:
    """Prompts `[B, P]`, padded on the left, and behind them up to L drawn tokens and padding: `[B, P + L]`."""
    if others:
        raise _Unfit(f"generate got {next(iter(others))}")
    _check_model(causal)
    settings, _ = causal._prepare_generation_config(generation_config)
    params = _sampling(settings)
    prompts = _without_padding(input_ids, attention_mask)
    with looked_at(decoder(causal), input_ids, attention_mask):
        drawn = _draw(causal, tokenizer, prompts, params, settings.eos_token_id)
    rows = [torch.tensor(completion.token_ids) for completion in drawn]
    padded = pad_sequence(rows, batch_first=True, padding_value=settings.pad_token_id)
    return torch.cat([input_ids, padded.to(input_ids)], 1)


def _check_model(causal: Any) -> None:
    if causal.config.get_text_config()._attn_implementation != NAME:
        raise _Unfit("the model's attention is not ours")
    if getattr(causal, "_posttrain_head_obstacle", None) is not None:
        raise _Unfit(causal._posttrain_head_obstacle)
    if (getattr(causal, "_tp_size", None) or 1) > 1 or any(map(divided, causal.modules())):
        raise _Unfit("the model's weights are divided among processes")
    if len({parameter.device for parameter in causal.parameters()}) > 1:
        raise _Unfit("the model is on several devices")
    if hooked(causal.get_output_embeddings()):
        raise _Unfit("the language head has hooks")
    rows = per_row(causal)
    if rows is not None:
        raise _Unfit(rows)
    if causal.device.type != "cpu" and "_original_forward" in vars(causal):  # accelerate has wrapped it
        raise _Unfit(f"the model runs in mixed precision on {causal.device.type}")


def _sampling(settings: Any) -> SamplingParams:
    """What the engine is to do for `settings`, in which nothing that has a default is None."""
    defaults = settings._get_default_generation_params()
    for name, value in settings.to_dict().items():
        unset = value is None or value is False or value == defaults.get(name)
        if not unset and name not in (*_FOLLOWED, *_IMMATERIAL):
            raise _Unfit(f"{name} is {value!r}")
    for name in ("max_new_tokens", "pad_token_id"):
        if getattr(settings, name) is None:
            raise _Unfit(f"{name} is None")
    if not settings.do_sample:
        return SamplingParams(temperature=0, max_tokens=settings.max_new_tokens)
    try:
        return SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k or 0,
            top_p=settings.top_p,
            min_p=settings.min_p or 0.0,
            max_tokens=settings.max_new_tokens,
        )
    except ValueError as problem:
        raise _Unfit(str(problem)) from problem


def _without_padding(input_ids: Tensor, attention_mask: Tensor) -> list[tuple[int, ...]]:
    mask = attention_mask.bool()
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise _Unfit("padding that is not on the left")
    return [tuple(ids[keep].tolist()) for ids, keep in zip(input_ids.cpu(), mask.cpu(), strict=True)]


def _draw(
    causal: Any, tokenizer: Any, prompts: list[tuple[int, ...]], params: SamplingParams, ends: int | list[int] | None
) -> list[Completion]:
    """A completion of each prompt; equal prompts are one, with as many samples."""
    longest = max(map(len, prompts)) + params.max_tokens
    positions = getattr(causal.config.get_text_config(), "max_position_embeddings", longest)
    if longest > positions:
        raise _Unfit(f"completions may go beyond the model's {positions} positions")
    engine = Engine(causal, tokenizer, context_length=longest, max_sequences=len(prompts))
    if engine.cache_tokens < longest:
        raise _Unfit("there is no memory for the keys and values of a sequence")
    if engine.end_tokens != {*([] if ends is None else [ends] if isinstance(ends, int) else ends)}:
        raise _Unfit(f"eos_token_id is {ends!r}, and not {sorted(engine.end_tokens)} of model and tokenizer")
    counts = Counter(prompts)
    with engine:
        found = engine.generate(list(counts), [replace(params, n=count) for count in counts.values()])
    samples = dict(zip(counts, map(iter, found), strict=True))
    return [next(samples[prompt]) for prompt in prompts]
