"""PackedLayout: the mask of a forest, its positions, what is refused, and what people see of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from forests import forests
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.ops.layout import BLOCK, PackedLayout


def ancestors(parents: list[int], i: int) -> list[int]:
    """The segment i and those it continues, from the root."""
    return [*ancestors(parents, parents[i]), i] if i >= 0 else []


@settings(max_examples=200, deadline=None)
@given(forests(8, 9))
def test_a_token_sees_its_segment_before_it_and_the_ancestors(forest) -> None:
    lengths, parents = forest
    layout = PackedLayout.from_forest(lengths, parents)
    owner = [i for i, length in enumerate(lengths) for _ in range(length)]
    index = torch.arange(layout.num_tokens)
    visible = (index <= index[:, None]) & (index[:, None] < layout.visible_until)
    for q, segment in enumerate(owner):
        path = ancestors(parents, segment)
        assert visible[q].tolist() == [k <= q and owner[k] in path for k in range(len(owner))]
        before = sum(lengths[i] for i in path[:-1])
        assert layout.positions[q] == before + q - layout.segment_starts[segment]
    assert layout.segment_starts == tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    assert layout.visible_until.dtype == layout.positions.dtype == torch.int32


@settings(max_examples=100, deadline=None)
@given(forests(12, 60))
def test_the_schedule_bounds_what_a_block_sees(forest) -> None:
    layout = PackedLayout.from_forest(*forest)
    largest, smallest, largest_position, tree_start, smallest_position = layout.schedule
    assert len(largest) % 4 == 0 and len(largest) * BLOCK >= layout.num_tokens
    until, positions = layout.visible_until.tolist(), layout.positions.tolist()
    for block, first in enumerate(range(0, layout.num_tokens, BLOCK)):
        whole = first + BLOCK <= layout.num_tokens
        assert largest[block] == max(until[first : first + BLOCK])
        assert smallest[block] == (min(until[first : first + BLOCK]) if whole else 0)
        assert largest_position[block] == max(positions[first : first + BLOCK])
        assert smallest_position[block] == (min(positions[first : first + BLOCK]) if whole else 0)
        start = first
        while start > 0 and max(until[:start]) > start:
            start -= 1
        assert tree_start[block] == start // BLOCK * BLOCK


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([3, -2], [-1, -1], "segment 1 has the negative length -2"),
        ([3, 2], [-1], "2 lengths, but 1 parents"),
        ([3, 2], [-1, 1], "segment 1 has the parent 1, which must come before it"),
        ([1, 1, 1, 1], [-1, 0, 0, 1], "not in depth-first order: segment 3 has the parent 1"),
        ([2**30, 2**30], [-1, -1], r"segment 1 ends at token 1073741824 \+ 1073741824, beyond what int32 holds"),
        ([3, 2], [-1, -5], "segment 1 has the parent -5; a root has -1"),
        ([2, 1.7], [-1, -1], r"lengths\[1\] is 1\.7, not an integer"),
        ([2, True], [-1, -1], r"lengths\[1\] is True, not an integer"),
        ([2**70], [-1], rf"lengths\[0\] is {2**70}, not an integer that int32 holds"),
        ([3, 2], [-1, -(2**70)], r"parents\[1\] is -.*, not an integer that int32 holds"),
        ([[1, 2], [3, 4]], [-1, 0], r"lengths must be one list of integers, got the shape \[2, 2\]"),
    ],
)
def test_what_is_no_forest_is_an_error(lengths, parents, message) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_forest(lengths, parents)


def test_integers_of_any_kind_are_lengths() -> None:
    for lengths in ((3, 2), np.array([3, 2], np.int16), [np.int64(3), 2], torch.tensor([3, 2])):
        assert PackedLayout.from_lengths(lengths).segment_starts == (0, 3, 5)


def test_position_ids_tell_the_sequences() -> None:
    layout = PackedLayout.from_position_ids(torch.tensor([[0, 1, 2, 0, 0, 1, 7, 8]]))
    assert layout.segment_starts == (0, 3, 4, 6, 8)
    assert layout.visible_until.tolist() == [3, 3, 3, 4, 6, 6, 8, 8]
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 1, 7, 8]
    assert PackedLayout.from_position_ids(torch.tensor([], dtype=torch.int64)).segment_starts == (0,)


@pytest.mark.parametrize("wrong", [-1, 2**31, -(2**40)])
def test_position_ids_outside_int32_are_errors(wrong) -> None:
    with pytest.raises(ValueError, match=f"position id 2 is {wrong}, outside 0 to what int32 holds"):
        PackedLayout.from_position_ids(torch.tensor([0, 1, wrong]))


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(3, dtype=torch.complex64)],
    ids=["rows", "float", "complex"],
)
def test_position_ids_of_another_kind_are_errors(wrong) -> None:
    with pytest.raises(ValueError, match=r"must be \[T\] or \[1, T\] integers"):
        PackedLayout.from_position_ids(wrong)


def test_what_people_see() -> None:
    layout = PackedLayout.from_forest([4, 3, 2, 0, 5], [-1, 0, 0, 2, -1])
    assert repr(layout) == "PackedLayout(14 tokens on cpu, segments of 4(3, 2), 5)"
    assert repr(PackedLayout.from_lengths([1] * 20)).endswith("1, 1 and 8 more)")
    tree = PackedLayout.from_forest([1, 2, 1, 1], [-1, 0, 1, 0])
    assert repr(tree) == "PackedLayout(5 tokens on cpu, segments of 1(2(1), 1))"
    assert tree.draw() == "#....\n##...\n###..\n####.\n#...#"
    with pytest.raises(ValueError, match="65 tokens are too many to draw"):
        PackedLayout.from_lengths([65]).draw()


def test_independence_and_moving() -> None:
    assert PackedLayout.from_forest([3, 0, 2], [-1, -1, -1]).independent
    assert not PackedLayout.from_forest([3, 2], [-1, 0]).independent
    moved = PackedLayout.from_forest([3, 2], [-1, 0]).to("meta")
    assert moved.visible_until.is_meta and moved.positions.is_meta and moved.segment_starts == (0, 3, 5)


def test_the_schedule_waits_for_no_device() -> None:
    assert PackedLayout.from_forest([40, 9], [-1, 0], device="meta").schedule.is_meta  # a device that can't be read


def test_moving_to_where_it_is_keeps_what_was_computed() -> None:
    with FakeTensorMode():
        whole = torch.empty(5, dtype=torch.int32, device="cuda")
        layout = PackedLayout(whole, whole, (0, 3, 5))
        assert layout.to("cuda") is layout is layout.to("cuda:0")


def test_positions_may_skip_within_a_segment() -> None:
    assert all(PackedLayout.from_lengths(lengths).consecutive for lengths in ([], [0], [1], [3, 0, 2, 0]))
    assert PackedLayout.from_forest([4, 3, 2], [-1, 0, 0]).consecutive
    plain = PackedLayout.from_lengths([3, 2])
    skipping = replace(plain, positions=torch.tensor([0, 1, 3, 0, 1], dtype=torch.int32))
    restarting = replace(plain, positions=torch.tensor([0, 1, 2, 7, 8], dtype=torch.int32))
    assert restarting.consecutive and not skipping.consecutive and not skipping.to("meta").consecutive
