"""Reward functions as a batch calls them: plain, async, by name; and what it says of those that fail."""

import asyncio
import math
import sys
import time
import warnings

import pytest

from posttrain.rewards import exact_match
from posttrain.rewards.score import RewardError, RewardFunctions, TrainerState

PROMPTS, COMPLETIONS, IDS = ["p", "q"], ["Answer: 1", "Answer: 2"], [[1], [2, 3]]


def scored(functions, **columns):
    return RewardFunctions(functions)(PROMPTS, COMPLETIONS, IDS, columns, TrainerState(3, 10))


def length(prompts, completions, completion_ids, **columns):
    return [len(ids) for ids in completion_ids]


def test_several_functions_by_name_and_value():
    both = RewardFunctions(["exact_match", length, "posttrain.rewards:exact_match"])
    assert both.names == ["exact_match", "length", "exact_match_2"]
    found = both(PROMPTS, COMPLETIONS, IDS, {"answer": [1, None]})
    assert found.rewards[0].tolist() == [1.0, 1.0, 1.0]
    assert found.rewards[1, 1] == 2 and found.rewards[1, [0, 2]].isnan().all()


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def one(completions, **columns): return [1] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert scored("rewards_of_mine:one").rewards.tolist() == [[1.0], [1.0]]


def test_async_functions_run_at_once_in_one_loop():
    loops = []

    async def slow(completions, **columns):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)

    functions = RewardFunctions([slow, slow, length])
    started = time.perf_counter()
    for _ in range(2):
        assert functions(PROMPTS, COMPLETIONS, IDS, {}).rewards.tolist() == [[1, 1, 1], [1, 1, 2]]
    assert time.perf_counter() - started < 0.75  # 4 x 0.2 s one after the other
    assert len(set(loops)) == 1


def test_columns_state_and_logs():
    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
        assert answer == ["a", "b"] and trainer_state.global_step == 3
        log_extra("twice", [2 * a for a in answer])
        log_metric("seen", 1.0)
        log_metric("seen", 2.0)
        return [0.0, 1.0]

    found = scored(reward, answer=["a", "b"])
    assert found.columns == {"twice": ["aa", "bb"]} and found.metrics == {"seen": 1.5}


def failing(kind):
    def bad(completions, **columns):
        if kind == "raises":
            return [1 / (completion != "Answer: 2") for completion in completions]
        return {"short": [1.0], "text": [1.0, "much"], "nan": [1.0, math.nan], "number": 1.0}[kind]

    return bad


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", "bad raised ZeroDivisionError: division by zero, at completion 1: 'Answer: 2' of the prompt 'q'"),
        ("short", "bad returned 1 rewards for 2 completions, at completion 0: 'Answer: 1'"),
        ("text", "bad returned 'much' instead of a finite number or None, at completion 1: 'Answer: 2'"),
        ("nan", "bad returned nan instead of a finite number or None, at completion 1"),
        ("number", "bad must return a list, got float"),
    ],
)
def test_failures_name_the_sample(kind, message):
    with pytest.raises(RewardError, match=message):
        scored(failing(kind))


def test_failures_of_async_functions():
    async def bad(completions, **columns):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="bad raised KeyError: 'answer', at completion 0: 'Answer: 1'"):
        scored(bad)

    async def bad_second(completions, **columns):
        return [1 / (completion != "Answer: 2") for completion in completions]

    with pytest.raises(RewardError, match="division by zero, at completion 1: 'Answer: 2' of the prompt 'q'"):
        scored(bad_second)


def test_a_function_that_takes_other_arguments():
    with pytest.raises(RewardError, match=r"exact_match raised TypeError: .*'answer'$"):
        scored(exact_match)


@pytest.mark.parametrize(
    "name", ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"]
)
def test_a_column_does_not_replace_an_argument(name):
    with pytest.raises(RewardError, match=f"the data's column '{name}' has the name of an argument"):
        RewardFunctions(length)(PROMPTS, COMPLETIONS, IDS, {name: ["x", "y"]})


def test_log_extra_needs_a_value_for_each():
    def reward(completions, log_extra, **columns):
        log_extra("x", [1])
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=r"log_extra\('x'\): 1 values for 2 completions"):
        scored(reward)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_log_metric_needs_a_finite_number(value):
    def reward(completions, log_metric, **columns):
        log_metric("seen", value)
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=rf"log_metric\('seen'\): {value} is not a finite number"):
        scored(reward)


@pytest.mark.parametrize("column", ["step", "prompt", "completion", "advantage"])
def test_log_extra_does_not_replace_a_column(column):
    def reward(completions, log_extra, **columns):
        log_extra(column, completions)
        return [0.0, 0.0]

    with pytest.raises(RewardError, match=rf"log_extra\('{column}'\): the completions that are written have"):
        scored(reward)


def test_no_reward_at_all_is_said_once():
    functions = RewardFunctions(exact_match)
    with pytest.warns(UserWarning, match="no reward function applies to any of 2 completions"):
        functions(PROMPTS, COMPLETIONS, IDS, {"answer": [None, None]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functions(PROMPTS, COMPLETIONS, IDS, {"answer": [None, None]})


@pytest.mark.parametrize(("text", "message"), [("1 / 0", "ZeroDivisionError: division"), ("def", "SyntaxError: ")])
def test_a_module_that_fails(text, message, tmp_path, monkeypatch):
    (tmp_path / "rewards_that_fail.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=f"rewards_that_fail:f: its module raised {message}"):
        RewardFunctions("rewards_that_fail:f")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere_to_be_found:f", "No module named"),
        ("posttrain.rewards:f", "posttrain.rewards has no 'f'"),
        ("exact_mach", "posttrain.rewards has no 'exact_mach'"),
        ("math:pi", "can't be called: it is a float"),
        (3, "callable or 'module:function', got int"),
        ([], "there is no reward function"),
    ],
)
def test_functions_that_are_not_there(function, message):
    with pytest.raises(RewardError, match=message):
        RewardFunctions(function)
