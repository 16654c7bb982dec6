"""The rollout engine with the CUDA kernels of a decoding step."""

from itertools import chain

import pytest
import torch
from tiny_model import build_model
from tiny_models import tiny

from posttrain import ops
from posttrain.models import load, prepare
from posttrain.rollout import Engine, SamplingParams

PROMPTS = [[5], [7, 9, 30, 2, 11], list(range(2, 42))]
DRAWN = SamplingParams(n=2, max_tokens=6, temperature=0.8, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load(build_model(tmp_path_factory.mktemp("tiny") / "model"))[1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_rope_and_cache_in_one_launch(name, tokenizer, device, monkeypatch) -> None:
    """The same completions as by `rope` and `write_cache`."""
    model = tiny(name).to(device)
    prepare(model)
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return ops.rope_cache(*arguments)

    monkeypatch.setattr("posttrain.rollout.paged.rope_cache", counted)
    results = []
    for backend in ("cuda", "reference"):
        engine = Engine(model, tokenizer, memory=1 << 20, page_size=8)
        begin = engine._runner.begin

        def begin_with_modules(engine=engine, begin=begin):
            begin()
            engine._runner.compiled = None

        monkeypatch.setattr(engine._runner, "begin", begin_with_modules)
        with ops.use_backend(backend, "rope_cache"):
            results.append(engine.generate(PROMPTS, DRAWN))
        assert calls
        calls.clear()
        engine.release()
    for ours, theirs in zip(*(chain(*result) for result in results), strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs))
