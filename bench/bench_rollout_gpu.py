"""Decoding on a GPU, against transformers' continuous batching and the memory bandwidth.

Models of the shape of Qwen2.5 0.5B and Llama 3.1 8B with random weights in bfloat16; batches of 1, 32 and 256 prompts
of 128 tokens, 256 new tokens each, drawn at temperature 1 without an end-of-sequence token.

A step reads every weight but the embedding's (a tied one is the head, and read as such), and keys and values of all
tokens so far. The floor is the time of those bytes at the rate of a copy of a gigabyte, measured in the same run, which
counts what is read and written. A call also reads its prompts; the floor doesn't, so a share errs downwards.
"""

import pytest
import torch
from bench_rollout import NoWords

from posttrain.bench.interleave import interleave
from posttrain.models import prepare
from posttrain.rollout import Engine, SamplingParams
from posttrain.rollout.cache import page_bytes
from posttrain.rollout.paged import layer_shapes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU's memory; there is no GPU")
PROMPT, NEW = 128, 256


def small():
    """The shape of Qwen2.5 0.5B."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM, Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def large():
    """The shape of Llama 3.1 8B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM, LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def build(make):
    """The model with random weights, made on the device."""
    kind, config = make()
    torch.manual_seed(0)
    with torch.device("cuda"):
        return kind._from_config(config, dtype=torch.bfloat16).eval()


def posttrain_way(model, prompts):
    """The engine."""
    prepare(model)
    tokens = len(prompts) * (PROMPT + NEW + 16)
    memory = tokens // 16 * page_bytes(layer_shapes(model), 16, torch.bfloat16)
    engine = Engine(model, NoWords(model.config.vocab_size), memory=memory, max_tokens_per_step=8192)

    def run():
        for [one] in engine.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True)):
            assert len(one.token_ids) == NEW

    run.engine = engine
    return run


def continuous_way(model, prompts):
    """`model.generate_batch`, with a cache that just holds the sequences and a manager that stays."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model.set_attn_implementation("sdpa")
    options = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    blocks = len(prompts) * ((PROMPT + NEW) // 32 + 1)
    cache = ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=8192, use_cuda_graph=True)

    def run():
        out = model.generate_batch(prompts, options, cache, persistent_manager=True)
        assert [len(one.generated_tokens) for one in out.values()] == [NEW] * len(prompts)

    return run


def floor(model, batch):
    """(seconds, bytes per second): of reading what NEW steps read, and of a copy."""
    tied = model.config.tie_word_embeddings
    embeddings = 0 if tied else model.get_input_embeddings().weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embeddings
    token = page_bytes(layer_shapes(model), 1, torch.bfloat16)
    read = sum(weights + batch * (PROMPT + step) * token for step in range(NEW))
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = interleave({"copy": lambda: target.copy_(source)}, "copy").seconds["copy"].median
    return read * seconds / 2**31, 2**31 / seconds


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("make", [small, large])
def test_decoding(make, batch, publish):
    generator = torch.Generator().manual_seed(0)
    ours = build(make)
    prompts = torch.randint(3, ours.config.vocab_size, (batch, PROMPT), generator=generator).tolist()
    runs = {"continuous batching": continuous_way(build(make), prompts), "posttrain": posttrain_way(ours, prompts)}
    comparison = interleave(runs, "continuous batching", rounds=5)
    seconds, rate = floor(ours, batch)
    facts = {f"{name} tokens/s": batch * NEW / spread.median for name, spread in comparison.seconds.items()}
    facts["share of the bandwidth floor"] = seconds / comparison.seconds["posttrain"].median
    facts["copy, bytes/s"] = rate
    facts |= runs["posttrain"].engine.stats.metrics
    runs["posttrain"].engine.release()
    publish(f"rollout-gpu-{make.__name__}-{batch}", f"Decoding, {make.__name__}, batch {batch}", comparison, **facts)
    assert batch > 1 or facts["share of the bandwidth floor"] >= 0.7
