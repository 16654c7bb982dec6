"""Rollouts: completions with what is known of their tokens, and how they become the steps of on-policy training.

One generation draws completions for some prompts and serves `steps` optimizer steps, `num_iterations` times over. Which
prompts it takes follows from its number alone; what it drew is kept until its last step, and goes into checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.data import Example, PackedBatch
from posttrain.data.share import keep_apart, share_prefixes
from posttrain.objectives.policy import PolicyCounts, PolicyTargets
from posttrain.train.source import Step

_PER_TOKEN = ("sampling_logprob", "old_logprob", "ref_logprob")  # of the L tokens in the loss


@dataclass(frozen=True)
class Rollout:
    """A completion behind its prompt.

    Attributes:
        example: the tokens, and which of them the policy drew; none of them if the completion is left out of the loss.
        advantage: how much better it is than the others of its prompt.
        sampling_logprob: float32 `[L]`, of its L loss tokens, as the sampler gave it.
        old_logprob: float32 `[L]`, of the policy that drew it, or None where that is not needed.
        ref_logprob: float32 `[L]`, of the reference policy, or None.
    """

    example: Example
    advantage: float
    sampling_logprob: NDArray[np.float32]
    old_logprob: NDArray[np.float32] | None = None
    ref_logprob: NDArray[np.float32] | None = None


class Generation(NamedTuple):
    """What was drawn at once: rollouts, those of a prompt in a row (`Example.group`), and metrics of all of them."""

    rollouts: list[Rollout]
    metrics: dict[str, float]


@dataclass(frozen=True)
class PolicyBatch:
    """A micro-batch of rollouts.

    Attributes:
        packed: their tokens; a prompt is there once.
        targets: what is known of the tokens in the loss.
        members: which rollouts of the step these are.
        idle: whether the gradient is known to be 0.
    """

    packed: PackedBatch
    targets: PolicyTargets
    members: list[int]
    idle: bool = False

    def to(self, device: torch.device | str) -> "PolicyBatch":
        """The same on `device`."""
        return replace(self, packed=self.packed.to(device), targets=self.targets.to(device))


@dataclass(frozen=True, kw_only=True)
class PolicyStep(Step):
    """A step, with the counts that its loss is divided by."""

    counts: PolicyCounts


class Packing(NamedTuple):
    """How rollouts are laid out.

    Attributes:
        max_tokens: most packed tokens of a micro-batch.
        share: whether tokens that rollouts begin with in common are there once.
        skip_idle: whether a group of rollouts without advantage has no gradient.
    """

    max_tokens: int
    share: bool
    skip_idle: bool = False

    def batches(self, rollouts: Sequence[Rollout]) -> list[PolicyBatch]:
        """Micro-batches of the rollouts that have loss tokens. At least one has a gradient, if only one of 0."""
        present = [i for i, rollout in enumerate(rollouts) if rollout.example.num_targets]
        groups = {rollouts[i].example.group for i in present if rollouts[i].advantage != 0 or not self.skip_idle}
        busy = [i for i in present if rollouts[i].example.group in groups] or present[:1]
        idle = [i for i in present if i not in set(busy)]
        return [*self._lay_out(rollouts, busy, False), *self._lay_out(rollouts, idle, True)]

    def _lay_out(self, rollouts: Sequence[Rollout], chosen: list[int], idle: bool) -> list[PolicyBatch]:
        """Micro-batches of the chosen rollouts."""
        sequences = [rollouts[i].example.input_ids for i in chosen]
        forest = share_prefixes(sequences) if self.share else keep_apart(sequences)
        batches = []
        for places in forest.divide(self.max_tokens):
            members = [chosen[place] for place in places]
            packed = PackedBatch.lay_out([rollouts[i].example for i in members], forest.select(places))
            batches.append(PolicyBatch(packed, _targets([rollouts[i] for i in members], packed), members, idle))
        return batches


def _targets(rollouts: list[Rollout], packed: PackedBatch) -> PolicyTargets:
    lengths = torch.tensor([rollout.example.num_targets for rollout in rollouts])
    advantage = torch.tensor([rollout.advantage for rollout in rollouts], dtype=torch.float32)
    known = {name: _joined([getattr(rollout, name) for rollout in rollouts]) for name in _PER_TOKEN}
    return PolicyTargets(packed.sequence, lengths, advantage[packed.sequence], **known)


def _joined(arrays: list[Any]) -> Tensor | None:
    return None if any(array is None for array in arrays) else torch.from_numpy(np.concatenate(arrays))


def per_rollout(batches: Sequence[PolicyBatch], values: Sequence[Tensor], count: int) -> list[NDArray[np.float32]]:
    """`values[b]` `[M]` of each micro-batch, as one array for each of `count` rollouts; this waits for the device."""
    found = [np.empty(0, np.float32)] * count
    for batch, value in zip(batches, values, strict=True):
        parts = np.split(value.float().cpu().numpy(), np.cumsum(batch.targets.lengths.cpu().numpy())[:-1])
        for member, part in zip(batch.members, parts, strict=True):
            found[member] = part
    return found


class RolloutSource:
    """Steps made of completions that are drawn when they are needed.

    Args:
        num_prompts: prompts in the data.
        generate: (indices of prompts, number of the generation or None for an evaluation) -> completions.
        prompts_per_generation: how many prompts a generation takes; the data goes round and round.
        steps: optimizer steps that share the completions of a generation.
        num_iterations: how often each of these steps is made.
        packing: how a step is laid out.
        shuffle_seed: of the order of the prompts in each epoch; None: as they are.
        prepare: what is done to the micro-batches of a step before it is made.
    """

    def __init__(
        self,
        num_prompts: int,
        generate: Callable[[list[int], int | None], Generation],
        *,
        prompts_per_generation: int,
        steps: int,
        num_iterations: int,
        packing: Packing,
        shuffle_seed: int | None,
        prepare: Callable[[list[PolicyBatch], PolicyCounts], tuple[list[PolicyBatch], PolicyCounts]],
    ) -> None:
        self._num_prompts = num_prompts
        self._generate = generate
        self._prompts_per_generation = prompts_per_generation
        self._steps = steps
        self._uses = steps * num_iterations
        self._packing = packing
        self._shuffle_seed = shuffle_seed
        self._prepare = prepare
        self._number = -1
        self._generation = Generation([], {})

    @property
    def steps_per_epoch(self) -> Fraction:
        """Optimizer steps in which every prompt is taken once."""
        return Fraction(self._num_prompts * self._uses, self._prompts_per_generation)

    def step(self, number: int) -> PolicyStep:
        """Optimizer step `number`, counted from 0; draws completions if it is the first one that needs them."""
        generation, use = divmod(number, self._uses)
        if generation != self._number:
            self._generation = self._generate(self._prompts(generation), generation)
            self._number = generation
        rollouts, part = self._generation.rollouts, use % self._steps
        size = len(rollouts) // self._steps
        return self._pack(rollouts[part * size : (part + 1) * size], self._steps)

    def everything(self) -> PolicyStep:
        """Completions of all prompts, drawn anew."""
        kept = self._generation
        self._generation = self._generate(list(range(self._num_prompts)), None)
        try:
            return self._pack(self._generation.rollouts, 1)
        finally:
            self._generation = kept

    def state(self, number: int) -> dict[str, Tensor]:
        """The completions in hand that step `number` and later ones use."""
        generation, use = divmod(number, self._uses)
        if generation != self._number or use == 0:
            return {}
        return {"number": torch.tensor([generation]), **_to_tensors(self._generation)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        if state:
            self._number, self._generation = int(state["number"]), _from_tensors(state)

    def _prompts(self, generation: int) -> list[int]:
        """Indices of the prompts of a generation: epoch after epoch, each in its own order."""
        count = self._prompts_per_generation
        places = range(generation * count, (generation + 1) * count)
        orders = {epoch: self._order(epoch) for epoch in {place // self._num_prompts for place in places}}
        return [orders[place // self._num_prompts][place % self._num_prompts] for place in places]

    def _order(self, epoch: int) -> list[int]:
        if self._shuffle_seed is None:
            return list(range(self._num_prompts))
        generator = torch.Generator().manual_seed(self._shuffle_seed + epoch)
        return torch.randperm(self._num_prompts, generator=generator).tolist()

    def _pack(self, rollouts: list[Rollout], steps: int) -> PolicyStep:
        tokens = sum(rollout.example.num_targets for rollout in rollouts)
        everyone = sum(rollout.example.num_targets for rollout in self._generation.rollouts)
        batches, counts = self._prepare(
            self._packing.batches(rollouts), PolicyCounts(len(rollouts), tokens, everyone / steps)
        )
        metrics = {name: _number(value) for name, value in self._generation.metrics.items()}
        if not batches:  # every completion is left out
            metrics["loss"] = _number(0.0)
        num_tokens = sum(len(rollout.example) for rollout in rollouts)
        packed = sum(len(batch.packed.input_ids) for batch in batches)
        return PolicyStep(batches, tokens, num_tokens, packed, metrics, counts=counts)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _to_tensors(generation: Generation) -> dict[str, Tensor]:
    rollouts = generation.rollouts
    tensors: dict[str, Any] = {
        "lengths": np.array([len(rollout.example) for rollout in rollouts]),
        "tokens": np.concatenate([rollout.example.input_ids for rollout in rollouts]),
        "loss_mask": np.concatenate([rollout.example.loss_mask for rollout in rollouts]),
        "group": np.array([rollout.example.group for rollout in rollouts]),
        "advantage": np.array([rollout.advantage for rollout in rollouts]),
    }
    for name in _PER_TOKEN:
        arrays = [getattr(rollout, name) for rollout in rollouts]
        if arrays[0] is not None:
            tensors[name] = np.concatenate(arrays)
    metrics = {f"metric.{name}": _number(value) for name, value in generation.metrics.items()}
    return {name: torch.from_numpy(array) for name, array in tensors.items()} | metrics


def _from_tensors(tensors: Mapping[str, Tensor]) -> Generation:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    ends = np.cumsum(arrays["lengths"])[:-1]
    masks = np.split(arrays["loss_mask"], ends)
    targets = np.cumsum([mask[1:].sum() for mask in masks])[:-1]
    known = {name: np.split(arrays[name], targets) for name in _PER_TOKEN if name in arrays}
    rollouts = []
    for i, (ids, mask) in enumerate(zip(np.split(arrays["tokens"], ends), masks, strict=True)):
        example = Example(ids, mask, group=int(arrays["group"][i]))
        fields = {name: values[i] for name, values in known.items()}
        rollouts.append(Rollout(example, float(arrays["advantage"][i]), **fields))
    metrics = {name[len("metric.") :]: value.item() for name, value in arrays.items() if name.startswith("metric.")}
    return Generation(rollouts, metrics)
