import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import Example
from posttrain.train.config import ConfigError
from posttrain.train.source import PackedSource, Step


def examples(lengths: list[int]) -> list[Example]:
    """Example i holds the token i, and all of it but the first token is a target."""
    return [Example(np.full(n, i, np.int32), np.ones(n, np.bool_)) for i, n in enumerate(lengths)]


def members(step: Step) -> list[int]:
    """Which examples are in a step."""
    return sorted(i for batch in step.batches for i in batch.input_ids.unique().tolist())


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=30),
    sequences=st.integers(1, 7),
    max_tokens=st.integers(9, 40),
    seed=st.none() | st.integers(0, 3),
)
def test_an_epoch_has_every_example_once(lengths, sequences, max_tokens, seed):
    source = PackedSource(examples(lengths), sequences_per_step=sequences, max_tokens=max_tokens, shuffle_seed=seed)
    steps = [source.step(number) for number in range(source.steps_per_epoch)]
    assert sorted(i for step in steps for i in members(step)) == list(range(len(lengths)))
    assert all(len(members(step)) == sequences for step in steps[:-1])
    assert sum(step.num_tokens for step in steps) == sum(lengths)
    for step in steps:
        assert all(len(batch.input_ids) <= max_tokens for batch in step.batches)
        assert step.num_targets == sum(len(batch.targets) for batch in step.batches)
        assert step.num_tokens == step.num_packed_tokens == sum(len(batch.input_ids) for batch in step.batches)


def completions(num_prompts: int, num_completions: int) -> list[Example]:
    """Prompts of 20 tokens, each with completions of 5 target tokens."""
    return [
        Example(np.repeat([prompt, 100 + completion], [20, 5]).astype(np.int32), np.arange(25) >= 20)
        for prompt in range(num_prompts)
        for completion in range(num_completions)
    ]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("bin_tokens", [None, 50])
def test_sharing_changes_the_micro_batches_alone(seed, bin_tokens):
    apart, shared = (
        PackedSource(
            completions(6, 4),
            sequences_per_step=8,
            max_tokens=80,
            bin_tokens=bin_tokens,
            shuffle_seed=seed,
            share=share,
        )
        for share in (False, True)
    )

    def targets(step: Step) -> list[tuple[int, list[int]]]:
        """(prompt, target tokens) of each example."""
        return sorted(
            (int(batch.input_ids[batch.rows[batch.sequence == n][0]]), batch.targets[batch.sequence == n].tolist())
            for batch in step.batches
            for n in range(batch.num_sequences)
        )

    assert apart.steps_per_epoch == shared.steps_per_epoch
    for number in range(apart.steps_per_epoch):
        one, other = apart.step(number), shared.step(number)
        assert targets(one) == targets(other)
        assert (one.num_targets, one.num_tokens) == (other.num_targets, other.num_tokens)
        prompts = {prompt for prompt, _ in targets(other)}
        assert other.num_packed_tokens == sum(len(batch.input_ids) for batch in other.batches)
        assert other.num_packed_tokens == 20 * len(prompts) + 5 * len(targets(other))
        assert all(len(batch.input_ids) <= 80 for batch in other.batches)


def test_a_group_over_the_budget_has_its_prompt_in_every_part():
    source = PackedSource(completions(1, 8), sequences_per_step=8, max_tokens=40, share=True)
    step = source.step(0)
    assert [len(batch.input_ids) for batch in step.batches] == [40, 40]
    assert (step.num_tokens, step.num_packed_tokens, step.num_targets) == (200, 80, 40)


def test_order_depends_on_seed_and_epoch_alone():
    def orders(seed: int | None) -> list[list[int]]:
        source = PackedSource(examples([3] * 20), sequences_per_step=1, max_tokens=9, shuffle_seed=seed)
        return [[members(source.step(20 * epoch + number))[0] for number in range(20)] for epoch in range(2)]

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    assert orders(1)[0] != orders(1)[1]
    assert orders(None) == [list(range(20))] * 2


def test_bins_count_as_sequences():
    source = PackedSource(examples([4, 6, 5, 5, 10]), sequences_per_step=1, max_tokens=10, bin_tokens=10)
    assert source.steps_per_epoch == 3
    assert all(source.step(number).num_tokens == 10 for number in range(3))


def test_an_example_over_the_budget_is_named():
    with pytest.raises(ConfigError, match="example 1 has 12 tokens, more than max_tokens_per_batch 10"):
        PackedSource(examples([3, 12]), sequences_per_step=1, max_tokens=10)


def test_no_examples():
    with pytest.raises(ConfigError, match="no example"):
        PackedSource([], sequences_per_step=1, max_tokens=10)
