"""Prompts as tokens."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from posttrain.data.values import is_unicode


def encode(tokenizer: Any, prompt: Any, name: str, size: int) -> list[int]:
    """Token ids of a prompt: a text, token ids, or the messages of a chat, whose answer is to be generated.

    An empty one becomes the beginning-of-sequence token. `size` is the number of tokens that the model embeds. Raises
    `ValueError`, which calls the prompt `name`.
    """
    if isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt, name, return_attention_mask=False)
    elif _is_chat(prompt):
        ids = _encode_chat(tokenizer, prompt, name)
    else:
        ids = _token_ids(prompt, name)
    if not ids:
        if tokenizer.bos_token_id is None:
            raise ValueError(f"{name} has no tokens, and the tokenizer no beginning-of-sequence token to start from")
        ids = [tokenizer.bos_token_id]
    check_tokens(ids, name, size)
    return list(ids)


def encode_text(tokenizer: Any, text: str, name: str, **options: Any) -> list[int]:
    """Token ids of a text. Raises `ValueError`, which calls it `name`, for one that isn't Unicode."""
    _check_text(text, name)
    return tokenizer(text, **options)["input_ids"]


def _check_text(text: str, name: str) -> None:
    if not is_unicode(text):
        raise ValueError(f"{name} holds half of a surrogate pair, which no tokenizer can read")


def check_tokens(ids: Sequence[int], name: str, size: int) -> None:
    """Raises `ValueError` for a token that a model of `size` tokens can't embed."""
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        raise ValueError(f"{name} has the token {wrong}; the model has 0 to {size - 1}")


def encode_all(tokenizer: Any, prompts: Any, size: int) -> list[list[int]]:
    """Token ids of every prompt of a list, for a model of `size` tokens."""
    one = isinstance(prompts, str | dict) or _is_chat(prompts) or _is_numbers(prompts)
    if one or not isinstance(prompts, Sequence | np.ndarray):
        raise ValueError(f"prompts must be a list of prompts, got {type(prompts).__name__}; for one prompt, [prompt]")
    return [encode(tokenizer, prompt, f"prompt {index}", size) for index, prompt in enumerate(prompts)]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], dict)


def _is_numbers(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Integral)


def _encode_chat(tokenizer: Any, messages: Any, name: str) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(f"{name} is a chat, and the tokenizer has no chat template")
    for number, message in enumerate(messages):
        for text in message.values() if isinstance(message, dict) else ():
            if isinstance(text, str):
                _check_text(text, f"message {number} of {name}")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template rejects {name}: {error}") from error


def _token_ids(prompt: Any, name: str) -> list[int]:
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(ids, list) and all(type(token) is int for token in ids):  # the others are slow to look at
        return ids
    if not isinstance(ids, Sequence) or any(not isinstance(token, Integral) for token in ids):
        raise ValueError(f"{name} must be a text, a list of token ids or a list of messages, got {prompt!r:.80}")
    return [int(token) for token in ids]
