"""Batches of sequences with common prompts, padded as TRL's trainers pad them, and padding-free."""

import torch
from tiny_models import VOCABULARY

PROMPTS = (21, 17)  # tokens
ANSWERS = ((5, 1, 8), (3, 6, 2))  # tokens of the answers to each


def sequences(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    prompts = [tokens(length) for length in PROMPTS]
    return [torch.cat([prompt, tokens(n)]) for prompt, lengths in zip(prompts, ANSWERS, strict=True) for n in lengths]


def padded(side: str) -> dict[str, torch.Tensor]:
    """As TRL pads: prompts on the left and answers on the right (GRPO), or all on the right (DPO)."""
    rows = sequences()
    prompts = [n for n, answers in zip(PROMPTS, ANSWERS, strict=True) for _ in answers]
    left = [max(PROMPTS) - n if side == "left" else 0 for n in prompts]
    width = max(n + len(row) for n, row in zip(left, rows, strict=True))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (start, row) in enumerate(zip(left, rows, strict=True)):
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def padding_free() -> dict[str, torch.Tensor]:
    rows = sequences()
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
