"""A tiny random model of each family, with the features that make the family different."""

from itertools import pairwise

import torch

from posttrain.data import Example, PackedBatch

VOCABULARY = 97

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 10, "sliding_window": 4}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}

# "sdpa" of older transformers drops the cap of the scores without a word.
_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "sliding_window": 5, "use_sliding_window": True, **_MIXED}),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 16}),
    "gemma2": ("Gemma2", {**_GEMMA, **_MIXED, **_CAPS}),
    "gemma3": ("Gemma3", {**_GEMMA, **_MIXED, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": 6}),
    "olmo2": ("Olmo2", {}),
}
OTHERS: dict[str, tuple[str, dict]] = {
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, **overrides):
    """A model of family `name`; every weight is random, norms and biases too, and large enough to matter."""
    import transformers

    prefix, extra = {**FAMILIES, **OTHERS}[name]
    config_class = "Gemma3TextConfig" if name == "gemma3" else f"{prefix}Config"
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**_SHAPE, **extra, **overrides})
    return randomised(getattr(transformers, f"{prefix}ForCausalLM")(config)).to(dtype).eval()


def randomised(model):
    """The model with its vectors (norm weights, biases) away from their ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.3 * noise if parameter.ndim == 1 else 4 * parameter)
    return model


def batch_of(lengths: list[int], seed: int = 0) -> PackedBatch:
    """Random sequences of these lengths; about two thirds of their tokens are targets."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator, dtype=torch.int32)
        examples.append(Example(ids.numpy(), (torch.rand(length, generator=generator) < 0.67).numpy()))
    return PackedBatch.pack(examples)


def alone(model, batch: PackedBatch):
    """Each sequence of `batch` through the whole model by itself: (hidden states [T, H], logits [T, V])."""
    starts = batch.layout.segment_starts
    outputs = [
        model(input_ids=batch.input_ids[None, a:b], use_cache=False, output_hidden_states=True)
        for a, b in pairwise(starts)
        if b > a
    ]
    return torch.cat([o.hidden_states[-1][0] for o in outputs]), torch.cat([o.logits[0] for o in outputs])
