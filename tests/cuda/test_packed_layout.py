"""Layouts and their tile schedules by the CUDA kernels: integer for integer what posttrain/ops/layout.py makes."""

from dataclasses import replace

import pytest
import torch
from forests import forests
from hypothesis import HealthCheck, given, settings

from posttrain.ops import layout_cuda
from posttrain.ops.layout import PackedLayout

SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def kernels(device, monkeypatch):
    """Calls a function while layouts on `device` are made by the CUDA kernels, which a CPU's otherwise are not."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(layout_cuda, "has_kernels", lambda _: True)
            return function()

    return call


def check(forest: tuple[list[int], list[int]], device: str, kernels) -> None:
    expected = PackedLayout.from_forest(*forest)
    layout = kernels(lambda: PackedLayout.from_forest(*forest, device))
    for name in ("visible_until", "positions"):
        ours = getattr(layout, name)
        assert ours.device.type == device
        assert ours.dtype == torch.int32
        assert torch.equal(ours.cpu(), getattr(expected, name))
    for name in ("segment_starts", "segment_ends", "consecutive"):
        assert getattr(layout, name) == getattr(expected, name)
    assert torch.equal(kernels(lambda: layout.schedule).cpu(), expected.schedule)


@SETTINGS
@given(forest=forests(12, 60))
def test_any_forest(forest, device, kernels) -> None:
    check(forest, device, kernels)


@pytest.mark.parametrize(
    "forest",
    [
        ([1] * 2500, [-1] * 2500),
        ([2] + [0, 3] * 600, [-1] + [0] * 1200),
        ([3] * 1100, list(range(-1, 1099))),
        ([33000, 5, 700, 40], [-1, 0, 0, -1]),
    ],
    ids=["many sequences", "many completions", "a chain", "long segments"],
)
def test_more_segments_or_blocks_than_threads(forest, device, kernels) -> None:
    check(forest, device, kernels)


@SETTINGS
@given(forest=forests(6, 60))
def test_the_schedule_of_any_integers(forest, device, kernels) -> None:
    """What a key is visible until may change within a segment, or lie before the key; positions may be any."""
    layout = PackedLayout.from_forest(*forest)
    generator = torch.Generator().manual_seed(layout.num_tokens)
    bounds = -5, layout.num_tokens + 5
    values = torch.randint(*bounds, (2, layout.num_tokens), generator=generator, dtype=torch.int32)
    for until in (values[0], layout.visible_until - values[0].clamp(0, 2)):
        other = replace(layout, visible_until=until, positions=values[1])
        expected = other.schedule
        moved = PackedLayout(until.to(device), values[1].to(device), layout.segment_starts)
        assert torch.equal(kernels(lambda moved=moved: moved.schedule).cpu(), expected)


def test_strides(device, kernels) -> None:
    layout = PackedLayout.from_forest([40, 9, 200], [-1, 0, -1])
    apart = [torch.stack([x] * 2, -1).to(device)[:, 0] for x in (layout.visible_until, layout.positions)]
    assert torch.equal(kernels(lambda: PackedLayout(*apart, layout.segment_starts).schedule).cpu(), layout.schedule)


def test_errors_stay(device, kernels) -> None:
    with pytest.raises(ValueError, match="not in depth-first order: segment 3 has the parent 1"):
        kernels(lambda: PackedLayout.from_forest([1, 1, 1, 1], [-1, 0, 0, 1], device))


def test_opcheck(device) -> None:
    layout = PackedLayout.from_forest([40, 9], [-1, 0])
    arguments = layout.visible_until.to(device), layout.positions.to(device)
    torch.library.opcheck(torch.ops.posttrain.packed_schedule, arguments)
