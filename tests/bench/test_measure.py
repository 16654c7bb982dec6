"""No figure without room, without agreement, or without a word about what is missing."""

import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

from posttrain.bench import measure as module
from posttrain.bench.case import BOTH, FORWARD, Way, copied
from posttrain.bench.device import Roofline
from posttrain.bench.interleave import Comparison, alternate
from posttrain.bench.measure import OURS, PLAIN, NotMeasured, calls_of, least_seconds, measure


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Few copies of the arguments, and single calls."""
    monkeypatch.setattr(module, "cache_bytes", lambda: 128)
    monkeypatch.setattr(module, "alternate", partial(alternate, min_seconds=0))


def test_figures_of_both_passes(make_case):
    tables = measure(make_case(), rounds=3)
    assert list(tables) == ["forward", "forward+backward"]
    for table in tables.values():
        assert list(table.columns) == [OURS, PLAIN] and table.missing == {}
        assert all(len(column.samples) == 3 and column.error == 0.0 for column in table.columns.values())
        ratios = [b / a for a, b in zip(*(table.columns[name].samples for name in (OURS, PLAIN)), strict=True)]
        assert table.comparison.speedup[OURS].median == statistics.median(ratios)


def test_a_wrong_forward_has_no_figures(make_case):
    with pytest.raises(NotMeasured, match="posttrain is wrong: an error of 0") as caught:
        measure(make_case(ours=lambda x: 2 * x + 1e-3), rounds=3)
    assert caught.value.wrong


def test_a_wrong_gradient_has_no_figures(make_case):
    def detached(x):
        return x + x.detach()

    with pytest.raises(NotMeasured, match="posttrain is wrong"):
        measure(make_case(ours=detached), rounds=3)


def test_the_forward_without_a_gradient_is_checked_too(make_case):
    with pytest.raises(NotMeasured, match="posttrain is wrong"):
        measure(make_case(ours=lambda x: 2 * x if torch.is_grad_enabled() else 3 * x), rounds=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(make_case, bad):
    with pytest.raises(NotMeasured, match="posttrain is wrong"):
        measure(make_case(ours=lambda x: torch.where(x > 0.9, bad, 2 * x)), rounds=3)


def test_in_float32_twice_the_error_of_plain_is_no_excuse(make_case):
    def off_by(error, scale=2.0):
        return lambda x: scale * x + scale * (error if x.dtype == torch.float32 else 0)

    with pytest.raises(NotMeasured, match=r"more than 1e-5 \+ 1.3e-6 of the value"):
        measure(make_case(off_by(6e-6), off_by(4e-6)), rounds=2)
    measure(make_case(off_by(6e-6, 100.0), off_by(4e-6, 100.0)), rounds=2)


def test_half_precision_may_err_twice_as_much_as_plain(make_case):
    def off_by(error):
        return lambda x: 2 * x + (error if x.dtype == torch.bfloat16 else 0)

    measure(make_case(off_by(0.15), off_by(0.1), dtype=torch.bfloat16), rounds=2)
    with pytest.raises(NotMeasured, match="posttrain is wrong"):
        measure(make_case(off_by(0.3), off_by(0.1), dtype=torch.bfloat16), rounds=2)


def test_without_room_the_numbers_are_named(make_case, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda: 3 << 30)
    with pytest.raises(NotMeasured, match=r"needs 10.0 GiB, and 3.0 GiB are free") as caught:
        measure(make_case(need=10 * 2.0**30), rounds=3)
    assert not caught.value.wrong


def test_without_memory_after_all_the_estimate_is_named(make_case):
    def make():
        raise torch.OutOfMemoryError("tried to allocate")

    with pytest.raises(NotMeasured, match=r"out of memory, where 2.0 GiB were reckoned with") as caught:
        measure(replace(make_case(need=2 * 2.0**30), make=make), rounds=3)
    assert not caught.value.wrong


def test_peers_that_are_missing_wrong_or_failing_are_named(make_case):
    def absent(problem):
        raise ImportError("No module named 'absent'")

    def failing(problem):
        def call(x):
            raise RuntimeError("no kernel\nfor this")

        return call

    def only_forward(problem):
        return lambda x: 2 * x.detach()

    peers = {
        "right": lambda problem: lambda x: x + x,
        "own arguments": lambda problem: Way(lambda x: x + x, copied),
        "coarse": lambda problem: lambda x: 2 * x + 0.01,
        "wrong": lambda problem: lambda x: 3 * x,
        "absent": absent,
        "failing": failing,
        "only forward": only_forward,
    }
    case = make_case(peers=peers)
    tables = measure(case, rounds=2, peers=True)
    assert tables[BOTH].missing.pop("only forward").startswith("fails: RuntimeError")
    for name, table in tables.items():
        forward = ["only forward"] if name == FORWARD else []
        assert list(table.columns) == [OURS, PLAIN, "right", "own arguments", "coarse", *forward]
        assert table.columns["coarse"].error == pytest.approx(0.005, rel=1e-3)
        assert table.missing == {
            "absent": "not installed: No module named 'absent'",
            "failing": "fails: RuntimeError no kernel for this",
            "wrong": "is wrong: off by 0.5 of the largest value",
        }
    assert list(measure(case, rounds=2)["forward"].columns) == [OURS, PLAIN]


def test_arguments_take_turns(make_case):
    seen = set()

    def ours(x):
        seen.add(x.data_ptr())
        return 2 * x

    measure(make_case(ours=ours), rounds=4)  # two caches of 128 bytes hold four sets of 64
    assert len(seen) >= 4


def test_no_column_reads_what_the_one_before_it_has_loaded(make_case, monkeypatch):
    seen = []

    def noted(x):
        seen.append(x.data_ptr())
        return 2 * x

    def timed(calls, rounds, seconds):
        seen.clear()
        samples = alternate(calls, rounds, min_seconds=0)
        found.append(list(seen))
        return samples

    found = []
    monkeypatch.setattr(module, "alternate", timed)
    measure(make_case(noted, noted, {"peer": lambda problem: noted}), rounds=4, peers=True)
    for pointers in found:
        assert len(pointers) >= 12 and len(set(pointers)) == 5
        assert all(len(set(pointers[i : i + 5])) == 5 for i in range(len(pointers) - 4))


@pytest.mark.parametrize("name", [FORWARD, BOTH])
def test_calls_pass_the_gate_and_stay_with_the_arguments(make_case, name):
    seen = []

    def ours(x):
        seen.append(x.data_ptr())
        return 2 * x

    problem = make_case(ours=ours).make()
    peers = {"right": lambda problem: lambda x: x + x, "wrong": lambda problem: lambda x: 3 * x}
    calls, missing = calls_of(problem, peers, name)
    assert list(calls) == [OURS, PLAIN, "right"]
    assert missing == {"wrong": "is wrong: off by 0.5 of the largest value"}
    seen.clear()
    for _ in range(3):
        calls[OURS]()
    assert seen == [problem.arguments[0].data_ptr()] * 3
    with pytest.raises(NotMeasured, match="posttrain is wrong"):
        calls_of(make_case(ours=lambda x: 3 * x).make(), {}, name)


def test_a_peer_with_its_own_shape_is_right_without_a_backward_too(make_case):
    problem = make_case().make()
    halves = Way(lambda x: x + x, lambda args: (args[0].view(2, -1),), back=torch.flatten)
    assert "halves" in calls_of(problem, {"halves": lambda problem: halves}, FORWARD)[0]


def test_functions_take_turns():
    order = []
    samples = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4, min_seconds=0)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab" + "ba"
    assert [len(times) for times in samples.values()] == [4, 4]


def test_ratios_are_taken_round_by_round():
    found = Comparison.of("a", {"a": [1.0, 2.0, 4.0], "b": [0.5, 1.0, 1.0]})
    assert found.speedup["b"].median == 2.0 and found.speedup["a"].p80 == 1.0
    assert found.seconds["b"].median == 1.0


def test_a_case_without_time_is_named_before_it_is_made(make_case):
    def make():
        raise AssertionError("made")

    case = replace(make_case(), make=make)  # 16 + 32 operations and 128 + 256 bytes
    with pytest.raises(NotMeasured, match=r"would take 61 s at the rates of the roofline, and a case may take 60 s"):
        measure(case, 3, roofline=Roofline(copy=100.0, gemm=1e9), seconds=60)
    assert least_seconds(case, Roofline(copy=1e9, gemm=16.0)) == 16 * (16 + 32) / 16


def test_rounds_are_fewer_where_there_is_no_time_for_them(monkeypatch):
    monkeypatch.setattr("posttrain.bench.interleave._sample", lambda function, calls: calls * function())
    both = {"a": lambda: 0.5, "b": lambda: 1.5}
    for seconds, rounds in ((0, 3), (9, 4), (14, 7)):
        samples = alternate(both, rounds=7, seconds=seconds)
        assert samples == {"a": [0.5] * rounds, "b": [1.5] * rounds}
    assert len(alternate(both, rounds=2, seconds=0)["a"]) == 2
    assert len(alternate({"a": lambda: 0.001}, rounds=9, min_seconds=0.01, seconds=0.04)["a"]) == 4  # of ten calls
