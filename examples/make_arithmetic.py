"""Write the arithmetic data: arithmetic-train.jsonl, arithmetic-cold-start.jsonl and arithmetic-test.jsonl in data/.

Every row is a chat: a sum, a difference or a product, and the answer worked out column by column from the right, as
at school, with carries and borrows:

    What is 523 - 187?          Ones: 13-7=6
                                Tens: 12-8-1=3
                                Hundreds: 5-1-1=3
                                Answer: 336

The cold start holds the same solutions and, mixed in, one and a half times as many chats of other problems whose answer
comes without any work. A small model can't calculate in its head: what it learns from those is mostly to guess.

The seed fixes every byte. No problem occurs twice, but that train is part of the cold start; a + b and b + a are one.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

SEED = 20250321
TRAIN_ROWS, HASTY_ROWS, TEST_ROWS = 4000, 6000, 300

PLACES = ("Ones", "Tens", "Hundreds", "Thousands")
QUESTIONS = ("What is {}?", "Compute {}.", "{} = ?")
# (operator, digits of the first number, digits of the second, how often)
KINDS = (
    ("+", 2, 2, 3),
    ("+", 3, 3, 4),
    ("+", 4, 4, 2),
    ("-", 2, 2, 3),
    ("-", 3, 3, 4),
    ("-", 4, 4, 2),
    ("*", 2, 1, 2),
    ("*", 3, 1, 1),
)


def add(a: int, b: int) -> tuple[list[str], int]:
    """The columns of a + b, from the right, and the result."""
    lines, carry = [], 0
    for x, y in zip(digits(a), digits(b, len(str(a))), strict=True):
        total = x + y + carry
        lines.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return lines, a + b


def subtract(a: int, b: int) -> tuple[list[str], int]:
    """The columns of a - b, for a >= b: ten more on top where the column below is larger, paid for in the next."""
    lines, borrow = [], 0
    for x, y in zip(digits(a), digits(b, len(str(a))), strict=True):
        top = x + 10 if x < y + borrow else x
        lines.append(f"{top}-{y}{'-1' if borrow else ''}={top - y - borrow}")
        borrow = int(top > x)
    return lines, a - b


def multiply(a: int, b: int) -> tuple[list[str], int]:
    """The columns of a * b, for b of one digit."""
    lines, carry = [], 0
    for x in digits(a):
        total = x * b + carry
        lines.append(f"{x}*{b}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return lines, a * b


WORK = {"+": add, "-": subtract, "*": multiply}


def digits(number: int, width: int = 1) -> list[int]:
    """Decimal digits from the right, filled up with zeros to `width`."""
    return [int(digit) for digit in reversed(str(number).zfill(width))]


def problems(rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """Different problems, forever."""
    seen = set()
    while True:
        operator, width_a, width_b, _ = rng.choices(KINDS, [weight for *_, weight in KINDS])[0]
        a = rng.randrange(10 ** (width_a - 1), 10**width_a)
        b = rng.randrange(10 ** (width_b - 1) + (width_b == 1), 10**width_b)
        if operator == "-" and a < b:
            a, b = b, a
        key = (operator, *((a, b) if operator == "-" else sorted((a, b))))
        if key not in seen:
            seen.add(key)
            yield operator, a, b


def row(operator: str, a: int, b: int, question: str) -> dict[str, list[dict[str, str]]]:
    """One chat."""
    lines, result = WORK[operator](a, b)
    worked = [f"{place}: {line}" for place, line in zip(PLACES, lines, strict=False)]
    return {
        "messages": [
            {"role": "user", "content": question.format(f"{a} {operator} {b}")},
            {"role": "assistant", "content": "\n".join([*worked, f"Answer: {result}"])},
        ]
    }


def hasty(chat: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """The chat with the last line of its answer alone."""
    question, answer = chat["messages"]
    return {"messages": [question, {**answer, "content": answer["content"].split("\n")[-1]}]}


def main(folder: Path = Path(__file__).parent / "data") -> None:
    """Write the files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    source = problems(rng)
    test, train, others = (
        [row(*next(source), rng.choice(QUESTIONS)) for _ in range(rows)] for rows in (TEST_ROWS, TRAIN_ROWS, HASTY_ROWS)
    )
    cold_start = train + [hasty(chat) for chat in others]
    rng.shuffle(cold_start)
    for name, chats in (("test", test), ("train", train), ("cold-start", cold_start)):
        lines = [json.dumps(chat) for chat in chats]
        (folder / f"arithmetic-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
