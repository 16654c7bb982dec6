"""The cases of every op and training step: `cases_of(op, suite)` lists them."""

from collections.abc import Callable

from posttrain.bench.case import Case
from posttrain.bench.cases import attention, decode, elementwise, logprob, lora, nf4, rollout, steps
from posttrain.bench.cases.scaling import SCALING
from posttrain.bench.shapes import Suite

CASES: dict[str, Callable[[Suite], list[Case]]] = {
    "rms_norm": elementwise.rms_norm,
    "rope": elementwise.rope,
    "swiglu": elementwise.swiglu,
    "geglu": elementwise.geglu,
    "packed_attention": attention.packed_attention,
    "rope_cache": decode.rope_cache,
    "paged_attention": decode.paged_attention,
    "sample": decode.sample,
    "nf4_dequantize": nf4.nf4_dequantize,
    "nf4_linear": nf4.nf4_linear,
    "lora_linear": lora.lora_linear,
    "lora_qkv": lora.lora_qkv,
    "lora_mlp": lora.lora_mlp,
    "linear_logprob": logprob.linear_logprob,
    "sft": steps.sft,
    "dpo": steps.dpo,
    "grpo": steps.grpo,
    "rollout": rollout.rollout,
}


def cases_of(op: str, suite: Suite) -> list[Case]:
    """An op's cases in a suite; not every op is in the suite scaling."""
    if suite.name != "scaling":
        return CASES[op](suite)
    return SCALING[op](suite) if op in SCALING else []
