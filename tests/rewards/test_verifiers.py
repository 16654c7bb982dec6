"""Verifiers: numbers, forms, lengths and mathematics."""

import threading

import pytest

from posttrain.rewards import OverlongPenalty, RegexFormat, math_equivalence, numeric, think_format


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("It is 1,234.50 apples.", "1234.5", 1.0),
        ("first 3, then 4.", 4, 1.0),
        ("first 3, then 4.", 3, 0.0),
        ("3/4", "0.75", 1.0),
        ("75%", 0.75, 1.0),
        ("-2e3", -2000, 1.0),
        ("2", -2, 0.0),
        ("0.3333333", 1 / 3, 1.0),
        ("0.3333", 1 / 3, 0.0),
        ("1/0", 0, 0.0),
        ("x2", 2, 0.0),
        ("none", "none", 0.0),
        ([{"role": "assistant", "content": "so 7"}], 7, 1.0),
        ("7", None, None),
    ],
)
def test_numeric(text, answer, score):
    assert numeric(["?"], [text], [[1]], answer=[answer], other=[0]) == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a\nb</think>\nc", 1.0),
        ("<think>a</think>", 1.0),
        ("c", 0.0),
        ("c <think>a</think>", 0.0),
        ("<think>a<think>b</think>", 0.0),
        ("<think>a</think>b</think>", 0.0),
    ],
)
def test_think_format(text, score):
    assert think_format(["?"], [text], [[1]]) == [score]


def test_regex_format_matches_the_whole():
    reward = RegexFormat(r"Answer: \d+", "answer_form")
    assert reward(["?"] * 3, ["Answer: 12", "Answer: 12!", "12"]) == [1.0, 0.0, 0.0]
    assert reward.__name__ == "answer_form"
    with pytest.raises(ValueError, match="is no regular expression"):
        RegexFormat("(")


def test_overlong_penalty():
    reward = OverlongPenalty(10, 4)
    assert reward([], [], [[0] * n for n in (0, 6, 7, 9, 10, 30)]) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    with pytest.raises(ValueError, match="from 1 to the limit 10, got 0"):
        OverlongPenalty(10, 0)


MATH = [
    (r"so it is \boxed{\frac{2}{4}}", "1/2", 1.0),
    ("the answer is $x = 3$", "3", 1.0),
    (r"\boxed{(x+1)^2}", "$x^2 + 2x + 1$", 1.0),
    ("the answer is 12", 12, 1.0),
    ("the answer is 13", 12, 0.0),
    ("no idea", 12, 0.0),
    ("12", None, None),
]


def test_math_equivalence():
    texts, answers, scores = zip(*MATH, strict=True)
    assert math_equivalence(["?"] * len(MATH), texts, answer=answers) == list(scores)


def test_math_equivalence_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(math_equivalence(["?"], ["$0.5$"], solution=["1/2"])))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_columns_are_checked():
    with pytest.raises(ValueError, match="2 completions, but 1 answers"):
        numeric(["?"] * 2, ["1", "2"], answer=[1])
    with pytest.raises(ValueError, match="'answer' or 'solution'"):
        math_equivalence(["?"], ["1"])
