"""pack_best_fit against plain Python, exact optima and its contract; PackedBatch against a dense mask."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import Example, PackedBatch, pack_best_fit


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as its definition says, in quadratic time."""
    bins: list[list[int]] = []
    space: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in range(len(bins)) if space[b] >= lengths[i]]
        if fits:
            chosen = min(fits, key=lambda b: space[b])
        else:
            chosen = len(bins)
            bins.append([])
            space.append(capacity)
        bins[chosen].append(i)
        space[chosen] -= lengths[i]
    return [sorted(members) for members in bins]


def first_fit(lengths: Sequence[int], capacity: int) -> int:
    """Bins that first-fit decreasing opens."""
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        for b in range(len(space)):
            if space[b] >= length:
                space[b] -= length
                break
        else:
            space.append(capacity - length)
    return len(space)


def optimum(lengths: Sequence[int], capacity: int) -> int:
    """The least number of bins, by trying everything."""

    def place(i: int, space: tuple[int, ...], best: int) -> int:
        if len(space) >= best:
            return best
        if i == len(lengths):
            return len(space)
        for b in range(len(space)):
            if space[b] >= lengths[i] and space[b] not in space[:b]:
                best = place(i + 1, (*space[:b], space[b] - lengths[i], *space[b + 1 :]), best)
        return place(i + 1, (*space, capacity - lengths[i]), best)

    return place(0, (), len(lengths) + 1)


@st.composite
def problems(draw, max_size: int = 60) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(0, capacity), max_size=max_size)), capacity


@given(problems())
def test_pack_equals_the_definition(problem):
    lengths, capacity = problem
    bins = pack_best_fit(lengths, capacity)
    assert bins == best_fit(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(len(members) > 0 and sum(lengths[i] for i in members) <= capacity for members in bins)
    assert len(bins) >= -(-sum(lengths) // capacity)
    assert 9 * len(bins) <= 11 * first_fit(lengths, capacity) + 9


@settings(max_examples=50)
@given(problems(max_size=8))
def test_pack_is_near_the_optimum(problem):
    lengths, capacity = problem
    assert 9 * len(pack_best_fit(lengths, capacity)) <= 11 * optimum(lengths, capacity) + 9


def test_pack_fills_realistic_lengths():
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, 20_000).astype(np.int32).clip(1, 2048)
    bins = pack_best_fit(lengths, 2048)
    assert len(bins) <= -(-int(lengths.sum()) // 2048) + 2
    assert bins == pack_best_fit(lengths.tolist(), 2048)
    assert bins == pack_best_fit(np.repeat(lengths, 2)[::2], 2048)  # strided


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 9, 10], r"length 9 at index 1 is above the capacity 8"),
        ([3, -1], r"length -1 at index 1 is negative"),
        ([2.5], r"lengths must be \[n\] integers, got \[1\] float64"),
        ([[1, 2]], r"lengths must be \[n\] integers, got \[1, 2\] int64"),
    ],
)
def test_pack_names_what_does_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack_best_fit(lengths, 8)


examples = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=7).map(
        lambda tokens: Example(
            np.array([t for t, _ in tokens], np.int32),
            np.array([m for _, m in tokens], np.bool_),
        )
    ),
    max_size=6,
)


@given(examples)
def test_packed_batch_lists_each_target_once(examples):
    batch = PackedBatch.pack(examples)
    starts = [sum(map(len, examples[:number])) for number in range(len(examples))]
    expected = [
        (starts[number] + i - 1, int(example.input_ids[i]), number)
        for number, example in enumerate(examples)
        for i in range(1, len(example))
        if example.loss_mask[i]
    ]
    got = zip(batch.rows.tolist(), batch.targets.tolist(), batch.sequence.tolist(), strict=True)
    assert list(got) == expected
    assert batch.input_ids.tolist() == [t for example in examples for t in example.input_ids.tolist()]
    assert batch.num_sequences == len(examples)
    assert len(batch.targets) == sum(example.num_targets for example in examples)
    assert (batch.input_ids.dtype, batch.rows.dtype, batch.targets.dtype) == (torch.int64,) * 3


@given(examples)
def test_no_token_sees_another_document(examples):
    layout = PackedBatch.pack(examples).layout
    owner = torch.tensor([n for n, example in enumerate(examples) for _ in example.input_ids], dtype=torch.int64)
    place = torch.tensor([i for example in examples for i in range(len(example))], dtype=torch.int64)
    index = torch.arange(len(owner))
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < layout.visible_until[None, :])  # [query, key]
    assert torch.equal(sees, (owner[:, None] == owner[None, :]) & (place[None, :] <= place[:, None]))
    assert layout.positions.tolist() == place.tolist()
