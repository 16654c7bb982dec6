"""exact_match: which answers count."""

import pytest

from posttrain.rewards import exact_match

WORKED = "Ones: 7+5=12\nTens: 4+8+1=13\nAnswer: 132"


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (WORKED, 132, 1.0),
        (WORKED, "132", 1.0),
        (WORKED, WORKED, 1.0),
        (WORKED, "13", 0.0),
        ("Answer: 13", "132", 0.0),
        ("Answer: 1320", "132", 0.0),
        ("Answer: 132.5", "132", 0.0),
        ("Answer: 132,500", "132", 0.0),
        ("Answer: 132.", "132", 1.0),
        ("Answer: -7", -7, 1.0),
        ("Answer: 7", -7, 0.0),
        ("Answer: 5\nAnswer: 132", "132", 1.0),
        ("Answer: 132\nAnswer: 5", "132", 0.0),
        ("Answer: 132\nAnswer: 13.2", "132", 0.0),
        ("132", "132", 0.0),
        ("", "132", 0.0),
        ([{"role": "assistant", "content": WORKED}], "132", 1.0),
        (WORKED, None, None),
        (WORKED, " ", None),
        ("Answer: 007", "7", 1.0),
        ("Answer: +7", 7, 1.0),
        ("Answer: 7", "+07", 1.0),
        ("Answer: -07", "-7", 1.0),
        ("Answer: -0", 0, 1.0),
        ("Answer: 70", "7", 0.0),
        ("Answer: 7", "7/2", 0.0),
        ("Answer: 7", "7.0", 0.0),
    ],
)
def test_score(completion, answer, score):
    assert exact_match(["?"], [completion], [[1]], answer=[answer], difficulty=["easy"]) == [score]


def test_one_answer_for_each_completion():
    assert exact_match(["?", "?"], [WORKED, "no"], answer=[132, 132]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="2 completions, but 1 answers"):
        exact_match(["?", "?"], [WORKED, "no"], answer=[132])


def test_the_assistants_last_message_counts():
    said = [{"role": "assistant", "content": "Answer: 7"}, {"role": "tool", "content": "Answer: 8"}]
    assert exact_match(["?"] * 2, [said, said[1:]], answer=[7, 8]) == [1.0, 0.0]
