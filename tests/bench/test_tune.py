"""`posttrain tune` without a GPU: its search with a stand-in timer, its gate under the interpreter, its cache."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from posttrain import doctor
from posttrain.bench.case import BOTH, FORWARD, Case, Problem, Work
from posttrain.bench.cases import attention, nf4
from posttrain.bench.interleave import alternate
from posttrain.bench.measure import measure
from posttrain.bench.shapes import SUITES, ModelShape, Suite
from posttrain.bench.tune import Measured, Range, Tunable, choices, neighbours, search, timed, tunables, tune
from posttrain.cli import main
from posttrain.kernels import nf4 as nf4_kernels
from posttrain.kernels.packed_attention import Blocks
from posttrain.ops import block_sizes
from posttrain.ops.block_sizes import chosen, save, try_sizes

_CUDA = torch.device("cuda", 0)
_WORK = {FORWARD: Work(1, 1)}
_RANGES = (Range(16, 256), Range(16, 256), Range(1, 8), Range(1, 5, False))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, for a GPU called G."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(block_sizes, "gpu_name", lambda device: "G")
    block_sizes.tuned.cache_clear()
    yield tmp_path / "posttrain" / "block_sizes.json"
    block_sizes.tuned.cache_clear()


def tunable(name="packed_attention forward 64", shipped=(64, 64, 4, 2), ranges=_RANGES, case=None, source="shipped"):
    return Tunable(name, shipped, ranges, source, case or Case("packed_attention", "tiny", 0, lambda: None, _WORK))


def stand_in(best, rounds, broken=()):
    """A timer whose seconds are steps away from `best`; what is `broken` has none."""

    def seconds(sizes):
        doubled = sum(
            abs((a // b if a > b else b // a).bit_length() - 1) for a, b in zip(sizes[:3], best[:3], strict=True)
        )
        return 1.0 + doubled + abs(sizes[3] - best[3])

    def timer(tunable, sizes):
        rounds.append(list(sizes))
        return Measured({s: seconds(s) for s in sizes if s not in broken}, {s: "is out" for s in sizes if s in broken})

    return timer


def test_neighbours_stay_in_their_ranges():
    assert list(neighbours((16, 256, 4, 1), _RANGES)) == [
        *((32, 256, 4, 1), (16, 128, 4, 1), (16, 256, 8, 1), (16, 256, 2, 1), (16, 256, 4, 2)),
    ]


def test_the_search_walks_to_the_fastest_sizes():
    rounds = []
    found = search(tunable(), stand_in((128, 32, 8, 3), rounds))
    assert found.sizes == (128, 32, 8, 3) and found.factor == pytest.approx(5.0)
    assert len(rounds) == 5 and rounds[0][0] == (64, 64, 4, 2)  # four steps, and a round in which nothing is faster
    seen = [sizes for each in rounds for sizes in each[1:]]
    assert len(set(seen)) == len(seen) == found.tried - 1


def test_what_cannot_run_is_walked_around_and_counted():
    broken = {(128, 64, 4, 2)}
    found = search(tunable(), stand_in((128, 32, 4, 2), [], broken))
    assert found.sizes == (128, 32, 4, 2) and found.missing == {(128, 64, 4, 2): "is out"}


def test_a_gain_within_the_noise_changes_nothing():
    def timer(tunable, sizes):
        return Measured({s: 1.0 if s == tunable.shipped else 0.98 for s in sizes}, {})

    assert search(tunable(), timer).sizes == (64, 64, 4, 2)


def test_only_better_sizes_are_kept_and_each_kernel_has_a_line():
    lines = []
    kernels = [tunable(), tunable("nf4_linear", (128, 64, 4, 2)), tunable("lora_linear")]
    kernels[2] = Tunable(kernels[2].name, kernels[2].shipped, _RANGES, "default", None)
    found = {}
    tune(kernels, stand_in((128, 64, 4, 2), []), lines.append, found.__setitem__)
    assert found == {"packed_attention forward 64": (128, 64, 4, 2), "nf4_linear": None}
    assert lines[0].startswith("packed_attention forward 64: (64, 64, 4, 2) (128, 64, 4, 2) is 2.00 times as fast; ")
    assert (
        lines[1].startswith("nf4_linear: (128, 64, 4, 2) stays; ") and lines[2] == "lora_linear: not used on this GPU"
    )


def test_what_was_found_before_an_interrupt_is_kept():
    def timer(kernel, sizes):
        if kernel.name == "nf4_linear":
            raise KeyboardInterrupt
        return stand_in((128, 64, 4, 2), [])(kernel, sizes)

    found = {}
    with pytest.raises(KeyboardInterrupt):
        tune([tunable(), tunable("nf4_linear")], timer, print, found.__setitem__)
    assert found == {"packed_attention forward 64": (128, 64, 4, 2)}


@pytest.fixture
def quick(monkeypatch):
    """Single calls, one set of arguments."""
    monkeypatch.setattr("posttrain.bench.measure.cache_bytes", lambda: 1)
    monkeypatch.setattr("posttrain.bench.measure.alternate", partial(alternate, min_seconds=0))
    monkeypatch.setattr("posttrain.bench.tune._ROUNDS", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
def test_sizes_are_launched_and_held_to_the_truth(quick, monkeypatch):
    launched = []
    run = InterpretedFunction.run

    def noted(self, *args, **kwargs):
        launched.append(tuple(kwargs[name] for name in nf4_kernels.MATVEC if name in kwargs))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    case = Case("nf4_linear", "tiny", 0, partial(nf4._linear, 2, 8, 128), _WORK)
    shipped, other, impossible = (4, 256, 4), (8, 64, 4), (4, 48, 4)  # Triton takes powers of two
    found = timed(tunable("nf4_linear", shipped, case=case), [shipped, other, impossible])
    assert set(found.seconds) == {shipped, other} and found.missing[impossible].startswith("fails: ")
    assert {shipped, other} <= set(launched)
    launched.clear()
    case.make().ours(*case.make().arguments)
    assert other not in launched and chosen("nf4_linear", shipped, torch.device("cpu")) == shipped


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 has tables of its own on a GPU")
def test_a_backward_runs_with_the_sizes_of_its_forward(quick, monkeypatch):
    seen = []

    def noted(name, shipped, device):
        seen.append((name, block_sizes._tried.get("packed_attention dq 64")))
        return chosen(name, shipped, device)

    monkeypatch.setattr("posttrain.kernels.packed_attention.chosen", noted)

    def make() -> Problem:
        problem = attention.packed_attention(_tiny_suite())[0].make()
        arguments = tuple(x.detach().half().requires_grad_() for x in problem.arguments)
        return Problem(arguments, problem.ours, problem.plain)

    case = Case("packed_attention", "tiny", 0, make, {BOTH: Work(1, 1)})
    shipped, other = (32, 32, 4, 1), (16, 16, 4, 1)
    found = timed(tunable("packed_attention dq 64", shipped, case=case), [shipped, other])
    assert set(found.seconds) == {shipped, other}
    assert {sizes for name, sizes in seen if name == "packed_attention dq 64"} == {shipped, other}


def _tiny_suite():
    return Suite("tiny", (ModelShape("tiny", 64, 128, 1, 1, 1, 16, 97),), (), 16, 2)


def test_wrong_results_are_out(quick):
    def ours(x):
        wrong = block_sizes._tried.get("rope") == (2,)
        return 2 * x + (0.01 if wrong else 0.0)

    case = Case("rope", "tiny", 0, lambda: Problem((torch.ones(8),), ours, lambda x: 2 * x), _WORK)
    found = timed(tunable("rope", (1,), (Range(1, 4),), case), [(1,), (2,), (4,)])
    assert set(found.seconds) == {(1,), (4,)} and "is off by 0.005" in found.missing[2,]


def test_the_cache_is_of_a_gpu_and_a_version_of_triton(cache):
    name, shipped = "packed_attention forward 64", Blocks(128, 64, 8, 2)
    assert chosen(name, shipped, _CUDA) is shipped
    assert save("other", {name: (1, 1, 1, 1)}) == save("G", {name: (32, 16, 4, 1), "nf4_linear": (8, 64, 2)}) == cache
    assert chosen(name, shipped, _CUDA) == type(shipped)(32, 16, 4, 1) != shipped
    assert isinstance(chosen(name, shipped, _CUDA), type(shipped))
    assert chosen(name, shipped, torch.device("cpu")) is shipped
    save("G", {name: None})
    assert chosen(name, shipped, _CUDA) is shipped and chosen("nf4_linear", (4, 256, 4), _CUDA) == (8, 64, 2)
    cache.write_text(cache.read_text().replace('"3.', '"2.'))
    block_sizes.tuned.cache_clear()
    assert chosen("nf4_linear", (4, 256, 4), _CUDA) == (4, 256, 4)


def test_sizes_that_are_tried_come_first():
    save("G", {"nf4_linear": (8, 64, 2)})
    try_sizes("nf4_linear", (16, 128, 4))
    assert chosen("nf4_linear", (4, 256, 4), _CUDA) == (16, 128, 4)
    try_sizes("nf4_linear", None)
    assert chosen("nf4_linear", (4, 256, 4), _CUDA) == (8, 64, 2)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"G": 3}', '{"G": {"3.8.0": {"nf4_linear": [8, 0, 2]}}}', '{"G": {"x": {"y": ["a"]}}}']
)
def test_a_cache_that_is_none_is_named(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    with pytest.raises(ValueError, match=r"block_sizes\.json: .*delete it"):
        chosen("nf4_linear", (4, 256, 4), _CUDA)


def test_another_number_of_sizes_is_named(cache):
    save("G", {"nf4_linear": (8, 64)})
    with pytest.raises(ValueError, match=r"nf4_linear has 2 block sizes, and the kernel takes 3: run posttrain tune"):
        chosen("nf4_linear", (4, 256, 4), _CUDA)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_table_is_searched_from_sizes_within_its_ranges(capability):
    found = {each.name: each for each in tunables(capability)}
    assert {each.op for each in found.values()} == {
        *("packed_attention", "linear_logprob", "lora_linear", "nf4_linear", "paged_attention"),
    }
    for each in found.values():
        assert all(low <= size <= high for size, (low, high, _) in zip(each.shipped, each.ranges, strict=True)), each
        assert each.case is not None or (each.name == "lora_linear" and capability in (90, 100))
        assert each.case is None or each.case.op == each.op
    source = found["packed_attention forward 128"].source
    assert source == ("default" if capability == 89 else "shipped")


def test_the_choice_is_visible(cache):
    save("G", {"nf4_linear": (8, 64, 2)})
    shown = dict(choices("G", 89))
    assert shown["nf4_linear"] == f"(8, 64, 2): tuned ({cache})"
    assert shown["packed_attention forward 64"] == "(128, 32, 8, 2): default"
    assert shown["linear_logprob wide"].endswith(": default") and shown["paged_attention decode 64"].endswith("shipped")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_one_line_and_2(capsys):
    assert main(["tune"]) == 2
    assert (
        capsys.readouterr().err
        == "posttrain: error: posttrain tune needs a CUDA GPU that torch can use, and there is none\n"
    )
    assert "from their tables; posttrain tune measures them" in doctor.report()


def test_the_command_writes_what_it_found(cache, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        "posttrain.bench.tune.timed", lambda tunable, sizes: Measured({s: 1 / sum(s) for s in sizes}, {})
    )
    assert main(["tune", "nf4_linear"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"-> {cache}"
    (versions,) = json.loads(cache.read_text()).values()
    assert list(versions.values()) == [{"nf4_linear": [4, 1024, 4]}]
    assert main(["tune", "rope"]) == 2
    assert capsys.readouterr().err.startswith("posttrain: error: unknown op 'rope'; there are packed_attention, ")


@pytest.mark.parametrize("rich", [False, True])
def test_the_head_that_is_measured_has_all_that_takes_room(rich, monkeypatch):
    shape = replace(SUITES["full"].models[0], hidden=16, vocabulary=40)
    monkeypatch.setitem(SUITES, "full", replace(SUITES["full"], models=(shape,), tokens=8))
    monkeypatch.setattr("posttrain.bench.measure.cache_bytes", lambda: 1)
    monkeypatch.setattr("posttrain.bench.measure.alternate", partial(alternate, min_seconds=0))
    case = next(each.case for each in tunables(90) if each.name == f"linear_logprob {'narrow' if rich else 'wide'}")
    problem = case.make()
    assert len(problem.arguments) == (6 if rich else 5)
    assert list(measure(case, rounds=2)) == [BOTH]
