"""The suite scaling: one size grows by case, work grows with it, and what is measured is right."""

from functools import partial

import pytest

from posttrain.bench.cases import SCALING, cases_of
from posttrain.bench.interleave import alternate
from posttrain.bench.measure import OURS, PLAIN, measure
from posttrain.bench.power import fit
from posttrain.bench.session import Selection, Session
from posttrain.bench.shapes import SUITES, ModelShape, Suite
from posttrain.cli import main

_SHAPE = ModelShape("tiny", 64, 128, 1, 4, 2, 16, 96, rank=4)
_TINY = Suite("scaling", (_SHAPE,), (_SHAPE,), 128, 2)
_AXES = {"linear_logprob": {"N": 1, "V": 1}, "packed_attention": {"T": 2}, "rollout": {"batch": 1}, "grpo": {"G": 1}}


@pytest.fixture(scope="module")
def cases():
    return {op: cases_of(op, _TINY) for op in SCALING}


@pytest.mark.parametrize("op", SCALING)
def test_work_grows_with_the_size_alone(op, cases):
    """Operations as a power of the size; of GRPO less, whose prompts are there once."""
    assert {case.axis for case in cases[op]} == set(_AXES[op])
    for axis, exponent in _AXES[op].items():
        own = [case for case in cases[op] if case.axis == axis]
        sizes = [case.size for case in own]
        assert sizes == sorted(set(sizes)) and len({str(case) for case in own}) == len(own) == len(sizes)
        work = [(case.size, case.work[case.passes[-1]].flops) for case in (own[0], own[-1])]
        power = fit(work)
        assert power is not None
        if op == "grpo":
            assert 0.5 < power.exponent < 1
        else:
            assert power.exponent == pytest.approx(exponent, abs=0.02)


@pytest.mark.parametrize("op", SCALING)
def test_the_smallest_sizes_are_right(op, cases, monkeypatch):
    monkeypatch.setattr("posttrain.bench.measure.cache_bytes", lambda: 1)
    monkeypatch.setattr("posttrain.bench.measure.alternate", partial(alternate, min_seconds=0))
    for table in measure(cases[op][0], rounds=2).values():
        assert set(table.columns) == {OURS, PLAIN}


def test_the_suite_has_these_ops_only(capsys):
    session = Session(Selection(suite="scaling"))
    entries = session.entries((*tuple(_AXES), "rope"))
    assert {entry.case.op for entry in entries} == set(_AXES)
    assert all(entry.case.axis and entry.case.size for entry in entries)
    assert SUITES["scaling"].name == "scaling" and cases_of("rope", SUITES["scaling"]) == []
    assert main(["bench", "scaling", "rope"]) == 2
    assert capsys.readouterr().err.startswith("posttrain: error: unknown op 'rope'; there are packed_attention, ")
