"""The cases of every op and training step: CASES[op](suite) lists them."""

from collections.abc import Callable

from posttrain.bench.case import Case
from posttrain.bench.cases import attention, decode, elementwise, logprob, lora, nf4, rollout, steps
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
