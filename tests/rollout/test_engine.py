"""The engine against transformers' generate and against the training forward, alone and in company."""

from copy import deepcopy
from itertools import chain

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, tiny

from posttrain.data import Example, PackedBatch
from posttrain.models import add_lora, prepare, token_logprobs
from posttrain.models.quantized import quantize
from posttrain.rollout import Completion, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(n=3, temperature=0.7, max_tokens=12, ignore_eos=True, seed=1)


def with_adapter(model):
    """The model with a LoRA adapter that changes something."""
    adapted = add_lora(model, r=3)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def by_modules(engine):
    """The engine, without the step in C++."""
    begin = engine._runner.begin

    def begin_with_modules():
        begin()
        engine._runner.compiled = None

    engine._runner.begin = begin_with_modules
    return engine


def trained_logprobs(model, prompt, completion, temperature):
    """What the packed training forward says of the completion's tokens."""
    ids = torch.tensor(prompt + completion.token_ids, dtype=torch.int32).numpy()
    mask = torch.arange(len(ids)).numpy() >= len(prompt)
    with torch.no_grad():
        return token_logprobs(model, PackedBatch.pack([Example(ids, mask)]), temperature=temperature).logprob


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_turned_once_or_in_every_step(name, make_engine, prompts, monkeypatch):
    model = tiny(name)
    prepare(model)
    model = with_adapter(model)
    results = []
    for most in (0, 1 << 30):
        monkeypatch.setattr("posttrain.rollout.decoder._MOST_TURNED", most)
        engine = make_engine(model)
        results.append(engine.generate(prompts, DRAWN))
        assert (engine._runner.compiled.turned is not None) == (most > 0)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_logprobs_are_those_of_training(name, adapted, make_engine, prompts):
    model = tiny(name)
    prepare(model)
    model = with_adapter(model) if adapted else model
    engine = make_engine(model)
    results = engine.generate(prompts, DRAWN)
    assert (engine._runner.compiled is not None) == (name in FAMILIES), engine._runner.obstacle
    for prompt, completions in zip(prompts, results, strict=True):
        for completion in completions:
            assert len(completion.token_ids) == 12
            expected = trained_logprobs(model, prompt, completion, 0.7)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_step_is_the_modules(name, make_engine, prompts):
    model = tiny(name, torch.float64)
    prepare(model)
    model = with_adapter(model)
    ours = make_engine(model).generate(prompts, DRAWN)
    theirs = by_modules(make_engine(model)).generate(prompts, DRAWN)
    for a, b in zip(chain(*ours), chain(*theirs), strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs))


@pytest.mark.parametrize("way", ["compiled", "modules", "any causal LM"])
def test_greedy_is_that_of_transformers(way, make_engine, prompts):
    model = tiny("llama")
    if way != "any causal LM":
        prepare(model)
    engine = by_modules(make_engine(model)) if way == "modules" else make_engine(model)
    ours = engine.generate(prompts, GREEDY)
    peer = tiny("llama")
    for prompt, [completion] in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, min_new_tokens=12
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alone_as_in_company(dtype, make_engine, model):
    """Bit for bit, whatever the batch, the steps that the prompt is read in, the room and the prefixes found."""
    model = deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(3)
    common = torch.randint(2, 97, (20,), generator=generator).tolist()
    lengths = torch.randint(0, 40, (32,), generator=generator).tolist()
    prompts = [common + torch.randint(2, 97, (length,), generator=generator).tolist() for length in lengths]
    params = [
        SamplingParams(n=1 + i % 2, max_tokens=5 + i, ignore_eos=True, seed=i % 3, top_p=0.9 if i % 4 else 1.0)
        for i in range(32)
    ]
    together = make_engine(model).generate(prompts, params)
    in_pieces = make_engine(model, max_tokens_per_step=13, max_sequences=5).generate(prompts, params)
    crowded = make_engine(model, memory=20 * 8 * 2 * 2 * 2 * 16 * dtype.itemsize)
    squeezed = crowded.generate(prompts, params)
    assert crowded.stats.preempted > 0
    one_by_one = [
        make_engine(model).generate([prompt], one)[0] for prompt, one in zip(prompts[:8], params[:8], strict=True)
    ]
    assert together == in_pieces == squeezed
    assert together[:8] == one_by_one


@pytest.mark.parametrize(("name", "dtype"), [("gemma2", torch.float64), ("olmo2", torch.float32)])
@pytest.mark.parametrize("times", [1, 2], ids=["by columns", "by tokens"])
def test_any_number_of_threads(name, dtype, times, make_engine, prompts):
    model = tiny(name, dtype, intermediate_size=1024)
    prepare(model)
    model, results, threads = with_adapter(model), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(make_engine(model).generate(prompts * times, DRAWN))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_modules_alone_as_in_company(name, make_engine, prompts):
    model = tiny(name)
    prepare(model)
    together = by_modules(make_engine(model)).generate(prompts, DRAWN)
    in_pieces = by_modules(make_engine(model, max_tokens_per_step=7)).generate(prompts, DRAWN)
    alone = [by_modules(make_engine(model)).generate([prompt], DRAWN)[0] for prompt in prompts]
    assert together == in_pieces == alone


def test_4_bits_alone_as_in_company(make_engine, prompts):
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    quantize(model)
    prepare(model)
    engine = make_engine(model)
    together = engine.generate(prompts, DRAWN)
    assert engine._runner.compiled is None
    in_pieces = make_engine(model, max_tokens_per_step=7).generate(prompts, DRAWN)
    alone = [make_engine(model).generate([prompt], DRAWN)[0] for prompt in prompts]
    assert together == in_pieces == alone


def test_seeds(engine, prompts):
    first = engine.generate(prompts, DRAWN)
    assert engine.generate(prompts[::-1], DRAWN)[::-1] == first
    assert len({tuple(completion.token_ids) for completion in first[0]}) == 3
    torch.manual_seed(5)
    unseeded = [engine.generate(prompts, SamplingParams(max_tokens=12)) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    torch.manual_seed(5)
    assert engine.generate(prompts, SamplingParams(max_tokens=12)) == unseeded[0]


def test_weights_and_adapters_of_the_moment(make_engine, prompts):
    """Nothing is remembered from one call to the next, in training mode or not."""
    model = tiny("qwen3")
    prepare(model)
    model = with_adapter(model).train()
    engine = make_engine(model)
    before = engine.generate(prompts, DRAWN)
    with model.disable_adapter():
        assert engine.generate(prompts, DRAWN) != before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = engine.generate(prompts, DRAWN)
    assert after != before
    expected = trained_logprobs(model, prompts[3], after[3][0], 0.7)
    torch.testing.assert_close(torch.tensor(after[3][0].logprobs), expected, atol=1e-5, rtol=0)
    assert all(module.training for module in model.modules())


def test_unusual_models_run_their_modules(make_engine, prompts):
    model = tiny("llama")
    prepare(model)
    engine = make_engine(model)
    calls = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with_hook = engine.generate(prompts, GREEDY)
    assert calls and "hooks" in engine._runner.obstacle
    hook.remove()
    assert [c.token_ids for [c] in engine.generate(prompts, GREEDY)] == [c.token_ids for [c] in with_hook]
    assert engine._runner.obstacle is None


def test_released_memory_comes_back(engine, prompts):
    first = engine.generate(prompts, GREEDY)
    engine.release()
    assert engine._cache.keys == engine._cache.values == []
    with engine:
        assert engine.generate(prompts, GREEDY) == first
    assert engine._cache.keys == []


def test_top_logprobs(engine, prompts, model):
    params = SamplingParams(max_tokens=4, logprobs=3, ignore_eos=True, temperature=0)
    for prompt, [completion] in zip(prompts, engine.generate(prompts, params), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).topk(3)
        assert [[token for token, _ in place] for place in completion.top_logprobs] == expected.indices.tolist()
        values = torch.tensor([[value for _, value in place] for place in completion.top_logprobs], dtype=torch.float64)
        torch.testing.assert_close(values, expected.values, atol=1e-5, rtol=0)
        assert completion.logprobs == pytest.approx(values[:, 0].tolist(), abs=1e-5)


def test_score(make_engine, prompts):
    for name in ("llama", "granite"):
        model = tiny(name)
        if name == "llama":
            prepare(model)
        engine = make_engine(model, max_tokens_per_step=64)
        results = engine.generate(prompts, DRAWN)
        scores = engine.score(prompts, results, temperature=0.7)
        for row, scored in zip(results, scores, strict=True):
            for completion, values in zip(row, scored, strict=True):
                torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(values), atol=1e-5, rtol=0)
        difference = engine.logprob_difference(prompts, results, temperature=0.7)
        assert difference["sampling/sampling_logp_difference/mean"] >= 0
        assert difference["sampling/sampling_logp_difference/max"] <= 1e-5
        assert engine.logprob_difference(prompts, results)["sampling/sampling_logp_difference/mean"] > 0.01
    assert engine.score(["ab"], [["", [5]]])[0][0] == []
    with pytest.raises(ValueError, match="1 prompts need a list of completions each, got 2"):
        engine.score(["a"], [["b"], ["c"]])
    with pytest.raises(ValueError, match="completions of prompt 0 must be a list, got str"):
        engine.score(["a"], ["b"])


def test_statistics(make_engine):
    engine = make_engine()
    [[completion], _] = engine.generate([[5] * 33, [5] * 33], SamplingParams(max_tokens=9, ignore_eos=True))
    stats = engine.stats
    assert isinstance(completion, Completion)
    assert (stats.prompt_tokens, stats.shared_tokens) == (66, 32)
    assert stats.prefill_tokens == 33 + 1
    assert stats.decode_tokens == 2 * 8
    assert sum(steps for steps, _ in stats.batch_sizes) == 9
    assert stats.metrics["rollout/shared_prefix_rate"] == pytest.approx(32 / 66)
    assert stats.metrics["rollout/batch_size"] == 2
    assert stats.peak_pages == 4 + 2 * 2  # of 41 tokens, the last drawn without keys
    assert stats.metrics["rollout/decode_tokens_per_second"] > 0


def test_a_model_without_a_cache_of_keys(make_engine, prompts, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    params = SamplingParams(n=2, max_tokens=4, ignore_eos=True, seed=0)
    for prompt, completions in zip(prompts, make_engine(model).generate(prompts, params), strict=True):
        for completion in completions:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            drawn = torch.tensor(completion.token_ids)[:, None]
            expected = logits.log_softmax(-1).gather(1, drawn)[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected)
