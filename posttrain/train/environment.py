"""Environment: what answers a completion, so that a rollout has several turns.

    def environment(prompt, completion, **columns) -> None | str | list[int] | list[dict]

gets a prompt as the data has it, the completion so far (a text or, for a chat, the list of messages), and the row's
other columns. It returns None if nothing follows, else what does: a text, token ids, or chat messages (a tool's result,
a user's next question). The policy goes on behind it. Tokens stay what they were drawn as: nothing is decoded and
tokenised again, and what the environment says is no target.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from posttrain.data.formats import Format, problem
from posttrain.data.values import is_unicode
from posttrain.rewards.score import RewardError, resolve
from posttrain.train.config import ConfigError

Answer = str | list[int] | list[dict[str, Any]] | None

_COLUMN = "column 'messages' "
_OPENING = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]


class Environment:
    """A callable, or its "module:function", whose answers become tokens. Raises `ConfigError` if it isn't found."""

    def __init__(self, function: Callable[..., Answer] | str, tokenizer: Any, vocabulary: int | None = None) -> None:
        try:
            self._function = resolve(function)
        except RewardError as error:
            raise ConfigError(str(error).replace("reward function", "environment")) from error
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer) if vocabulary is None else vocabulary

    def answer(
        self, prompt: Any, completion: Any, columns: Mapping[str, Any]
    ) -> tuple[list[int], str | list[dict[str, Any]]] | None:
        """Tokens that follow, and the same as text or messages; None if the completion is done."""
        sample = f"; prompt {prompt!r:.200}, completion {completion!r:.200}"
        try:
            answer: Any = self._function(prompt=prompt, completion=completion, **columns)
        except Exception as error:  # of any kind: it is the user's code
            raise ConfigError(f"the environment raised {type(error).__name__}: {error}{sample}") from error
        try:
            return None if answer is None else self._encoded(answer, isinstance(prompt, str))
        except (ConfigError, TemplateError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{error} (the environment returned {answer!r:.200}){sample}") from error

    def _encoded(self, answer: Any, text: bool) -> tuple[list[int], str | list[dict[str, Any]]]:
        """Tokens of an answer, and the answer; behind a text, the contents of messages must be texts."""
        if isinstance(answer, str):
            if not is_unicode(answer):
                raise ConfigError("the environment's text holds half of a surrogate pair, which no tokenizer can read")
            return self._tokenize(answer), answer
        if isinstance(answer, Sequence) and answer and all(isinstance(message, Mapping) for message in answer):
            if wrong := problem({"messages": list(answer)}, Format(("messages",), True)):
                raise ConfigError(f"the environment's answer {wrong.removeprefix(_COLUMN)}")
            if text and not all(isinstance(message.get("content"), str) for message in answer):
                raise ConfigError("the environment's messages must have texts as content, since the prompt is a text")
            return self._tokenize(self._rendered(list(answer))), list(answer)
        if isinstance(answer, Sequence) and all(type(token) is int for token in answer):
            if unknown := [token for token in answer if not 0 <= token < self._vocabulary]:
                raise ConfigError(
                    f"the environment's token {unknown[0]} is not in the vocabulary of {self._vocabulary}"
                )
            return list(answer), self._tokenizer.decode(answer, skip_special_tokens=True)
        raise ConfigError(f"an environment must return None, a text, token ids or messages, got {answer!r:.200}")

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _rendered(self, messages: list[Any]) -> str:
        """What the chat template writes between an answer's end-of-sequence token and the next answer."""
        before = self._tokenizer.apply_chat_template(_OPENING, tokenize=False)
        whole = self._tokenizer.apply_chat_template(_OPENING + messages, tokenize=False, add_generation_prompt=True)
        end = self._tokenizer.eos_token
        if end and end in before:
            before = before[: before.rindex(end) + len(end)]
        if not whole.startswith(before):
            raise ConfigError("the chat template writes a conversation's beginning differently once it goes on")
        return whole[len(before) :]
