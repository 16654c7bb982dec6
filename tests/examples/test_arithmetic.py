"""The bundled data: its script reproduces it, and every line of it is right."""

import json
import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("arithmetic-train.jsonl", "arithmetic-cold-start.jsonl", "arithmetic-test.jsonl")


def chats(name: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (EXAMPLES / "data" / name).read_text().splitlines()]
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]


def test_the_script_reproduces_every_byte(tmp_path):
    runpy.run_path(str(EXAMPLES / "make_arithmetic.py"))["main"](tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


def test_no_problem_occurs_twice():
    seen = []
    assert set(chats(FILES[0])) < set(chats(FILES[1]))
    for name in FILES[1:]:
        for question, _ in chats(name):
            a, operator, b = re.search(r"(\d+) ([-+*]) (\d+)", question).groups()
            seen.append((operator, *((a, b) if operator == "-" else sorted((a, b)))))
    assert len(seen) == len(set(seen)) == 10300


def test_the_cold_start_has_worked_and_hasty_answers():
    worked = [work for _, work in chats("arithmetic-cold-start.jsonl") if "\n" in work]
    assert len(worked) == 4000 and len(chats("arithmetic-cold-start.jsonl")) == 10000
    assert all("\n" in work for name in (FILES[0], FILES[2]) for _, work in chats(name))


def test_every_line_of_work_and_every_answer_is_right():
    value = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for question, work in [chat for name in FILES for chat in chats(name)]:
        a, operator, b = re.search(r"(\d+) ([-+*]) (\d+)", question).groups()
        *columns, last = work.split("\n")
        assert last == f"Answer: {value[operator](int(a), int(b))}"
        if not columns:
            continue
        written = ""
        for place, column in zip(("Ones", "Tens", "Hundreds", "Thousands"), columns, strict=False):
            sides = re.fullmatch(rf"{place}: (\d+[-+*]\d(?:[-+]\d)?)=(\d+)", column)
            assert eval(sides[1]) == int(sides[2])
            written = sides[2][-1] + written
        assert len(columns) == len(a)
        assert str(int(sides[2][:-1] + written)) == last.removeprefix("Answer: ")
