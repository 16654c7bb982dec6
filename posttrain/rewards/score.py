"""RewardFunctions: functions found by name, called on a batch of completions, and held to what they promise.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

gets the prompts as the data has them, the completions as texts (or, for chats, as lists of messages), their tokens, and
every other column of the data by name, one value for each completion; besides `trainer_state` (with global_step and
max_steps), `log_extra(column, values)`, which adds a column to the completions that are written, and
`log_metric(name, value)`. None means that it does not apply. An `async def` is awaited; several run at once. A column
of the data with the name of one of these arguments is an error.
"""

import asyncio
import inspect
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

RewardFunction = Callable[..., Any]

_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_WRITTEN = ("step", "prompt", "completion", "advantage")  # columns of the completions on disk


class RewardError(ValueError):
    """A reward function that can't be found, fails, or returns what is no reward; one line, with the sample."""


@dataclass(frozen=True)
class TrainerState:
    """What a reward function may know of the run."""

    global_step: int
    max_steps: int


@dataclass
class Scores:
    """What F reward functions say of B completions.

    Attributes:
        rewards: float64 `[B, F]`, NaN where a function does not apply.
        columns: from `log_extra`: name -> B values.
        metrics: from `log_metric`: name -> mean of the values.
    """

    rewards: Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class RewardFunctions:
    """Some reward functions.

    Args:
        functions: one or several; each a callable, "module:function", or a name in posttrain.rewards.

    Raises:
        RewardError: a name that can't be resolved, or something that can't be called.
    """

    def __init__(self, functions: Any) -> None:
        several = functions if isinstance(functions, list | tuple) else [functions]
        if not several:
            raise RewardError("there is no reward function")
        self._functions = [resolve(function) for function in several]
        self.names = _distinct([getattr(f, "__name__", type(f).__name__) for f in self._functions])
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warned = False

    def __len__(self) -> int:
        return len(self._functions)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
        state: TrainerState | None = None,
    ) -> Scores:
        """Scores of B completions. Raises `RewardError`."""
        batch = _Batch(prompts, completions, completion_ids, columns, state)
        pending = {}
        results: dict[int, Any] = {}
        for index, function in enumerate(self._functions):
            if _is_async(function):
                pending[index] = batch.call_async(function)
            else:
                results[index] = batch.call(function)
        if pending:
            results |= zip(pending, self._wait(pending.values()), strict=True)
        rewards = torch.empty(len(completions), len(self), dtype=torch.float64)
        for index, name in enumerate(self.names):
            rewards[:, index] = batch.checked(name, self._functions[index], results[index])
        if rewards.isnan().all() and not self._warned:
            self._warned = True
            warnings.warn(
                f"no reward function applies to any of {len(rewards)} completions: all are None", stacklevel=2
            )
        metrics = {name: sum(values) / len(values) for name, values in batch.metrics.items()}
        return Scores(rewards, batch.columns_logged(), metrics)

    def _wait(self, coroutines: Iterable[Any]) -> list[Any]:
        """Run coroutines at once, in a loop that stays: clients made in one batch are of use in the next."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()

        async def together() -> list[Any]:
            return await asyncio.gather(*coroutines)

        return asyncio.run_coroutine_threadsafe(together(), self._loop).result()


class _Batch:
    """The arguments of a call, and what functions log."""

    def __init__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
        state: TrainerState | None,
    ) -> None:
        for name in _ARGUMENTS:
            if name in columns:
                raise RewardError(
                    f"the data's column {name!r} has the name of an argument of reward functions; rename it"
                )
        self._given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        self._state = state
        self._size = len(completions)
        self._extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def call(self, function: RewardFunction) -> Any:
        """What `function` returns, or the exception that it raised."""
        try:
            return function(**self._arguments())
        except Exception as error:  # of any kind: it is the user's code; `checked` reports it
            return error

    async def call_async(self, function: RewardFunction) -> Any:
        """As `call`, of an async function."""
        try:
            return await function(**self._arguments())
        except Exception as error:
            return error

    def columns_logged(self) -> dict[str, list[Any]]:
        """From `log_extra`. Raises `RewardError` for a column that isn't one value for each completion."""
        for name, values in self._extra.items():
            if len(values) != self._size:
                raise RewardError(f"log_extra({name!r}): {len(values)} values for {self._size} completions")
        return self._extra

    def checked(self, name: str, function: RewardFunction, result: Any) -> Tensor:
        """Rewards `[B]` from what `function` returned. Raises `RewardError`."""
        if isinstance(result, Exception):
            where = self._sample(self._culprit(function, result))
            raise RewardError(f"reward function {name} raised {type(result).__name__}: {result}{where}") from result
        try:
            values = list(result)
        except TypeError:
            raise RewardError(
                f"reward function {name} must return a list, got {type(result).__name__}{self._sample(0)}"
            ) from None
        if len(values) != self._size:
            raise RewardError(
                f"reward function {name} returned {len(values)} rewards for {self._size} completions{self._sample(0)}"
            )
        return torch.tensor([self._number(name, i, value) for i, value in enumerate(values)], dtype=torch.float64)

    def _number(self, name: str, index: int, value: Any) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"reward function {name} returned {value!r} instead of a finite number or None{self._sample(index)}"
            )
        return number

    def _arguments(self, index: int | None = None) -> dict[str, Any]:
        given = self._given if index is None else {name: [values[index]] for name, values in self._given.items()}
        log = {"log_extra": self._log_extra, "log_metric": self._log_metric} if index is None else _SILENT
        return {**given, "trainer_state": self._state, **log}

    def _log_extra(self, column: str, values: Iterable[Any]) -> None:
        if column in _WRITTEN:
            raise RewardError(f"log_extra({column!r}): the completions that are written have a column of that name")
        self._extra.setdefault(column, []).extend(values)

    def _log_metric(self, name: str, value: float) -> None:
        if not math.isfinite(number := float(value)):
            raise RewardError(f"log_metric({name!r}): {value!r} is not a finite number")
        self.metrics.setdefault(name, []).append(number)

    def _culprit(self, function: RewardFunction, error: Exception) -> int | None:
        """The first completion for which alone `function` fails in the same way."""
        trace = error.__traceback__
        never_entered = trace is None or trace.tb_next is None  # it doesn't take these arguments
        if never_entered:
            return None
        for index in range(self._size):
            try:
                self._alone(function, index)
            except Exception as again:
                if type(again) is type(error):
                    return index
        return None

    def _alone(self, function: RewardFunction, index: int) -> None:
        """Call `function` for one completion."""
        result = function(**self._arguments(index))
        if inspect.iscoroutine(result):
            asyncio.run(result)

    def _sample(self, index: int | None) -> str:
        """A completion and its prompt in words."""
        if index is None or index >= self._size:
            return ""
        prompt, completion = (_short(self._given[name][index]) for name in ("prompts", "completions"))
        return f", at completion {index}: {completion} of the prompt {prompt}"


_SILENT = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}


def resolve(function: Any) -> RewardFunction:
    """A callable, from itself, "module:function", or a name in posttrain.rewards. Raises `RewardError`."""
    if callable(function):
        return function
    if not isinstance(function, str):
        raise RewardError(f"a reward function must be callable or 'module:function', got {type(function).__name__}")
    module, colon, name = function.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where the user's own module is likely to be
    try:
        found = getattr(import_module(module if colon else "posttrain.rewards"), name, None)
    except (ImportError, ValueError) as error:
        raise RewardError(f"reward function {function}: {error}") from error
    except Exception as error:  # of any kind: it is the user's module
        raise RewardError(f"reward function {function}: its module raised {type(error).__name__}: {error}") from error
    if found is None:
        raise RewardError(f"reward function {function}: {module or 'posttrain.rewards'} has no {name!r}")
    if not callable(found):
        raise RewardError(f"reward function {function} can't be called: it is a {type(found).__name__}")
    return found


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _distinct(names: list[str]) -> list[str]:
    """`names`, with a number behind those that came before."""
    return [name if (n := names[:i].count(name)) == 0 else f"{name}_{n + 1}" for i, name in enumerate(names)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-90:]}"
