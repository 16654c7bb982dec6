"""Decoding by graphs. Without a GPU, what would be captured is kept and run again, on the same memory."""

from copy import deepcopy
from itertools import chain

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain import ops
from posttrain.models import prepare
from posttrain.rollout import SamplingParams, graphs
from posttrain.rollout.cache import KVCache
from posttrain.rollout.decoder import Unusual
from posttrain.rollout.paged import PagedRunner, layer_shapes

PARAMS = [
    SamplingParams(n=6, max_tokens=40, temperature=1.5, seed=3),
    SamplingParams(n=1, max_tokens=5, temperature=0, ignore_eos=True),
    SamplingParams(n=2, max_tokens=21, top_k=20, min_p=0.01, seed=5, ignore_eos=True),
    SamplingParams(n=1, max_tokens=18, seed=1),
]


class HostReads(TorchFunctionMode):
    """The names of what reads a tensor's numbers on the host, but for what runs in a graph."""

    NAMES = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__index__", "__float__", "__array__", "nonzero")

    def __init__(self):
        super().__init__()
        self.seen, self.paused = [], False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES and not self.paused:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Refuses what takes or gives a tensor elsewhere: a copy. Numbers that Python gives a kernel are no copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.device.type != "meta":
                raise AssertionError(f"{func} on {tensor.device}")
        return result


class Recorder:
    """Stands for the capture: warms up like it; a replay is the same step again."""

    def __init__(self, reads=None):
        self.captured, self.replayed, self.reads = 0, 0, reads

    def __call__(self, step):
        self.captured += 1
        step()
        step()

        def replay():
            self.replayed += 1
            if self.reads is not None:
                self.reads.paused = True
            step()
            if self.reads is not None:
                self.reads.paused = False

        return replay


@pytest.fixture
def make(make_engine, monkeypatch):
    """`make(capture, model=..., **options)`: an engine that runs through the modules."""

    def unusual(*_):
        raise Unusual("the test wants its modules")

    monkeypatch.setattr("posttrain.rollout.paged.CompiledDecoder", unusual)

    def make(capture, *arguments, **options):
        engine = make_engine(*arguments, **options)
        engine._runner.capture = capture
        engine.end_tokens |= frozenset(range(40, 60))
        return engine

    return make


def assert_same(ours, theirs):
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert (one.token_ids, one.finish_reason, one.text) == (other.token_ids, other.finish_reason, other.text)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs))


@pytest.mark.parametrize(
    "options", [{}, {"max_sequences": 3}, {"memory": 16 * 4096}], ids=["all", "queue", "preempted"]
)
def test_graphs_draw_what_the_modules_draw(options, make, prompts):
    capture = Recorder()
    engine = make(capture, **options)
    results = engine.generate(prompts, PARAMS)
    assert (engine.stats.preempted > 0) == ("memory" in options)
    assert {one.finish_reason for one in chain(*results)} == {"stop", "length"}
    assert capture.replayed > 20 and 0 < capture.captured <= 5  # 16, 8, 4, 2 and 1 rows
    assert_same(results, make(None, **options).generate(prompts, PARAMS))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi3"])
def test_families_with_longer_tables(name, make, monkeypatch):
    monkeypatch.setattr(graphs, "_LEAST_PAGES", 1)
    model = tiny(name)
    prepare(model)
    capture = Recorder()
    drawn = SamplingParams(n=2, max_tokens=40, seed=3, ignore_eos=True)
    results = make(capture, model).generate([[5, 9, 7], [8] * 20], drawn)
    assert capture.captured > 1
    assert_same(results, make(None, model).generate([[5, 9, 7], [8] * 20], drawn))


def test_the_host_reads_once_a_block(make, prompts, monkeypatch):
    reads = HostReads()
    capture = Recorder(reads)
    engine, blocks = make(capture), []
    advance = graphs.GraphBurst.advance

    def watched(burst):
        reads.seen.clear()
        before = capture.replayed
        with reads:
            went_on = advance(burst)
        blocks.append((capture.replayed - before, reads.seen.copy()))
        return went_on

    monkeypatch.setattr(graphs.GraphBurst, "advance", watched)
    engine.generate(prompts, SamplingParams(max_tokens=graphs.BLOCK * 2 + 4, ignore_eos=True))
    assert blocks == [(steps, ["cpu", "numpy"]) for steps in (graphs.BLOCK, graphs.BLOCK, 3)]


def test_a_step_never_waits_for_the_device(monkeypatch):
    """On tensors without numbers: reading one is an error. The ops take the way of a GPU's."""
    model = tiny("llama")
    prepare(model)
    shapes = layer_shapes(model)
    monkeypatch.setattr("posttrain.ops.backend._obstacle", lambda *_: None)
    device = torch.device("meta")
    cache = KVCache(shapes, 4, 16, torch.float32, device)
    cache.allocate()
    runner = PagedRunner(model.to(device), cache)
    with ops.use_backend("triton"), ops.use_backend("cuda", "sample", "rope_cache"), OnDevice():
        graph = graphs.DecodeGraph(4, 8, runner._logits, cache, lambda step: step)
        graph.run(graphs.BLOCK)
    assert graph.logits.shape == (4, 97) and graph.logits.device == device
    for read in (Tensor.item, Tensor.tolist, Tensor.cpu, bool, int):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read(graph.logits[0, 0])


def test_rows_at_their_limit_write_nowhere_else(make, monkeypatch):
    monkeypatch.setattr(graphs, "_LEAST_PAGES", 1)
    engine = make(Recorder(), context_length=40)
    branches = [engine.open([7] * 14), engine.open([9] * 27)]
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=4)
    assert [len(one.token_ids) for one in engine.grow(branches, params)] == [20, 13]  # the second in a block's middle
    engine.context_length = 60
    for _ in range(2):
        prompts = [branch.tokens.copy() for branch in branches]
        grown = engine.grow(branches, SamplingParams(max_tokens=9, ignore_eos=True, seed=5))
        assert engine.stats.prefill_tokens == 0
        for own, (scores,) in zip(grown, engine.score(prompts, [[one] for one in grown]), strict=True):
            assert own.logprobs == pytest.approx(scores, abs=1e-5)
    for branch in branches:
        engine.close(branch)


def with_adapter(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(deepcopy(model), config).eval()


def test_graphs_live_as_long_as_they_read_the_model(make, model):
    adapted, capture = with_adapter(model), Recorder()
    engine, prompt = make(capture, adapted), [[5, 6, 7]]
    drawn = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

    def captured():
        before = capture.captured
        results = engine.generate(prompt, drawn)
        assert_same(results, make(None, adapted).generate(prompt, drawn))
        return capture.captured - before

    weight = adapted.get_input_embeddings().weight
    assert captured() == 1
    assert captured() == 0
    with torch.no_grad():
        weight.mul_(1.5)  # as an optimizer does
    adapted.train()
    assert captured() == 0
    adapted.merge_adapter()
    assert captured() == 1
    adapted.unmerge_adapter()
    assert captured() == 1
    with adapted.disable_adapter():
        assert captured() == 1
    assert captured() == 1
    weight.data = weight.data.clone()
    assert captured() == 1
    with ops.use_backend("reference", "rms_norm"):
        assert captured() == 1
    assert captured() == 1
    engine.release()
    assert engine._runner.graphs is None
    assert captured() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs on a GPU; there is no GPU")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_captured_on_a_gpu(name, make, prompts):
    model = tiny(name).to("cuda")
    prepare(model)
    engine = make(graphs.CudaCapture(torch.device("cuda")), model)
    results = engine.generate(prompts, PARAMS)
    assert engine._runner.graphs is not None
    assert_same(results, make(None, model).generate(prompts, PARAMS))


def test_models_that_cannot_be_captured(make, model, prompts):
    def refuses(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = make(None).generate(prompts, PARAMS)
    engine = make(refuses)
    with pytest.warns(UserWarning, match="without captured graphs: operation not permitted"):
        assert_same(engine.generate(prompts, PARAMS), expected)
    assert_same(engine.generate(prompts, PARAMS), expected)  # not tried, nor warned of, again
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    try:
        capture = Recorder()
        assert_same(make(capture).generate(prompts, PARAMS), expected)
        assert capture.captured == 0
    finally:
        handle.remove()


def test_no_distribution_is_an_error(make, model):
    broken = deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[:] = torch.nan
    with pytest.raises(ValueError, match="no distribution"):
        make(Recorder(), broken).generate([[5, 6]], SamplingParams(max_tokens=12, ignore_eos=True))
