"""Shared prefixes: each stored once, and packed batches that train exactly as separate copies do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny

from posttrain.data import Example, PackedBatch
from posttrain.data.share import SHORTEST, Forest, keep_apart, share_prefixes
from posttrain.models import prepare, token_logprobs
from posttrain.ops.layout import PackedLayout


def sequence(*runs: tuple[int, int]) -> np.ndarray:
    """Runs of (token, how many)."""
    return np.concatenate([np.full(count, token, np.int32) for token, count in runs] or [np.empty(0, np.int32)])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=4), max_size=8))
def test_every_sequence_lies_on_a_path_of_the_forest(runs) -> None:
    sequences = [sequence(*each) for each in runs]
    forest = share_prefixes(sequences)
    check(forest, sequences)
    assert forest.num_tokens <= sum(map(len, sequences))


def check(forest: Forest, sequences: list[np.ndarray]) -> None:
    """Every sequence lies on a path of `forest` and sees itself alone."""
    packed = np.concatenate([*forest.tokens, np.empty(0, np.int32)])
    layout = PackedLayout.from_forest(forest.lengths, forest.parents)  # checks the depth-first order
    for ids, places in zip(sequences, forest.places(), strict=True):
        assert packed[places].tolist() == ids.tolist()
        assert layout.positions[places].tolist() == list(range(len(ids)))
        if len(ids):
            seen = [k for k in range(places[-1] + 1) if places[-1] < layout.visible_until[k]]
            assert seen == places.tolist()
    assert forest.num_tokens == len(packed)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=4), max_size=12),
    st.integers(0, 100),
)
def test_bins_hold_every_sequence_once_within_the_capacity(runs, spare) -> None:
    sequences = [sequence(*each) for each in runs]
    forest = share_prefixes(sequences)
    capacity = max(map(len, sequences), default=0) + spare
    bins = forest.divide(capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sequences)))
    for members in bins:
        part = forest.select(members)
        check(part, [sequences[i] for i in members])
        assert part.num_tokens <= capacity
    if sequences and forest.num_tokens <= capacity:
        assert bins == [list(range(len(sequences)))]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=4), max_size=12),
    st.integers(1, 3),
    st.integers(0, 100),
)
def test_units_are_never_parted(runs, size, spare) -> None:
    sequences = [sequence(*each) for each in runs]
    units = [(i * 7) % len(sequences) // size for i in range(len(sequences))]  # members that don't lie side by side
    forest = share_prefixes(sequences)
    members_of = [[i for i, unit in enumerate(units) if unit == wanted] for wanted in set(units)]
    capacity = max((forest.select(members).num_tokens for members in members_of), default=0) + spare
    bins = forest.divide(capacity, units)
    assert sorted(i for members in bins for i in members) == list(range(len(sequences)))
    for members in bins:
        assert forest.select(members).num_tokens <= capacity
    for unit in members_of:
        assert sum(bool(set(unit) & set(members)) for members in bins) == 1


def test_pairs_over_one_prompt_fill_the_bins() -> None:
    """A prompt of 20 tokens with 4 pairs of answers of 10, and bins that hold two pairs."""
    sequences = [sequence((1, 20), (2 + answer, 10)) for answer in range(8)]
    assert sorted(share_prefixes(sequences).divide(60, [i // 2 for i in range(8)])) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_group_stays_together_where_it_fits() -> None:
    """Three prompts of 20 tokens with two completions of 5, in turns, and bins of 60."""
    sequences = [sequence((prompt, 20), (9 + turn, 5)) for turn in range(2) for prompt in range(3)]
    bins = share_prefixes(sequences).divide(60)
    assert sorted(map(len, bins)) == [2, 4]
    assert all((i + 3) % 6 in members for members in bins for i in members)


def test_a_group_is_divided_as_low_as_it_can_be() -> None:
    """A prompt of 20 tokens, two turns of 30 under it, three answers of 10 under each, and bins of 80 tokens."""
    sequences = [sequence((1, 20), (2 + turn, 30), (4 + answer, 10)) for turn in range(2) for answer in range(3)]
    forest = share_prefixes(sequences)
    assert forest.num_tokens == 20 + 2 * (30 + 3 * 10)
    assert sorted(forest.divide(80)) == [[0, 1, 2], [3, 4, 5]]
    halves = forest.divide(70)
    assert [forest.select(members).num_tokens for members in halves] == [70, 70, 60, 60]
    assert all(len({i // 3 for i in members}) == 1 for members in halves)


def test_sequences_kept_apart() -> None:
    sequences = [sequence((1, 20)), sequence((1, 20), (2, 5))]
    forest = keep_apart(sequences)
    check(forest, sequences)
    assert forest.parents == [-1, -1]
    assert forest.divide(45) == [[0, 1]] and forest.divide(44) == [[1], [0]]


def test_what_is_shared_is_the_longest_prefix_recursively() -> None:
    prompt, turn = (1, 20), (2, SHORTEST)
    sequences = [
        sequence(prompt, turn, (3, 5)),
        sequence((4, 9)),
        sequence(prompt, turn, (5, 5)),
        sequence(prompt, (6, 5)),
    ]
    shared = share_prefixes(sequences)
    assert shared.lengths == [20, SHORTEST, 5, 5, 5, 9]
    assert shared.parents == [-1, 0, 1, 1, 0, -1]


def test_short_prefixes_stay_with_their_sequences() -> None:
    short = (1, SHORTEST - 1)
    assert share_prefixes([sequence(short, (2, 3)), sequence(short, (3, 3))]).parents == [-1, -1]
    nested = [sequence(short, (2, 1), (3, 4)), sequence(short, (4, 3)), sequence(short, (2, 1), (5, 4))]
    assert share_prefixes(nested).lengths == [SHORTEST, 4, 4, SHORTEST + 2]


def test_equal_and_contained_sequences() -> None:
    whole, part = sequence((1, 50)), sequence((1, 30))
    shared = share_prefixes([whole, part, whole])
    assert (shared.lengths, shared.parents) == ([30, 20], [-1, 0])
    assert shared.paths == [[0, 1], [0], [0, 1]]


def shared_prompt_set(vocabulary: int) -> list[Example]:
    """Two prompts with three completions each, one of which has a turn in common with another; two alone."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return generator.integers(5, vocabulary, count).astype(np.int32)

    first, second, turn = draw(40), draw(23), draw(18)
    prompts = [
        first,
        np.concatenate([first, turn]),
        np.concatenate([first, turn]),
        second,
        second,
        second,
        draw(3),
        draw(30),
    ]
    examples = []
    for prompt in prompts:
        ids = np.concatenate([prompt, draw(int(generator.integers(1, 12)))])
        examples.append(Example(ids, np.arange(len(ids)) >= len(prompt)))
    return examples


@pytest.mark.parametrize("family", ["llama", "gemma2"], ids=["full attention", "windows and caps"])
def test_losses_and_gradients_are_those_of_copies(family: str) -> None:
    model = tiny(family).double()
    prepare(model)
    examples = shared_prompt_set(VOCABULARY)
    results = []
    for share in (False, True):
        batch = PackedBatch.pack(examples, share_prefixes=share)
        model.zero_grad()
        logprob = token_logprobs(model, batch).logprob
        logprob.sum().backward()
        results.append((logprob.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], batch))
    (alone, alone_grads, copies), (together, grads, shared) = results
    assert len(shared.input_ids) < 0.75 * len(copies.input_ids)
    assert torch.equal(copies.targets, shared.targets) and torch.equal(copies.sequence, shared.sequence)
    torch.testing.assert_close(together, alone)
    for one, other in zip(grads, alone_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_to_share() -> None:
    batch = PackedBatch.pack([], share_prefixes=True)
    assert len(batch.input_ids) == len(batch.rows) == 0
    empty = Example(np.empty(0, np.int32), np.empty(0, bool))
    assert PackedBatch.pack([empty], share_prefixes=True).num_sequences == 1
