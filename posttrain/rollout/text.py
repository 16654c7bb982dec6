"""Text from tokens, one at a time, and the stop texts in it.

A token can be half a character, and a tokenizer may write a token differently at the beginning of a text than behind
another. So the new text is what the last tokens give together with the ones before them, less what those give alone,
and waits while it ends in the middle of a character.
"""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of tokens, up to the first of the `stop` texts.

    Attributes:
        text: of all tokens whose characters are complete, up to the stop text.
        stopped: whether a stop text was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._context = 0  # the tokens before the new ones that they are decoded with
        self._done = 0  # tokens whose text is in `text`
        self._given = 0  # characters that `take` has given out

    def add(self, token: int) -> None:
        """Append a token."""
        self._tokens.append(token)
        self._extend(final=False)

    def close(self) -> None:
        """No token follows: write what waits."""
        self._extend(final=True)

    def take(self) -> str:
        """The text since the last call, less an end that may become a stop text."""
        held = 0 if self.stopped else max((self._overlap(stop) for stop in self._stop), default=0)
        end = max(self._given, len(self.text) - held)
        given, self._given = self._given, end
        return self.text[given:end]

    def rest(self) -> str:
        """The text since the last `take`, all of it."""
        given, self._given = self._given, len(self.text)
        return self.text[given:]

    def _extend(self, final: bool) -> None:
        if self.stopped:
            return
        before = decode(self._tokenizer, self._tokens[self._context : self._done])
        after = decode(self._tokenizer, self._tokens[self._context :])
        if len(after) > len(before) and (final or not after.endswith(_INCOMPLETE)):
            seen = len(self.text)
            self.text += after[len(before) :]
            self._context, self._done = self._done, len(self._tokens)
            self._cut(seen)

    def _cut(self, seen: int) -> None:
        """End the text at the first stop text that reaches beyond `seen`."""
        places = [self.text.find(stop, max(0, seen - len(stop) + 1)) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _overlap(self, stop: str) -> int:
        """The longest beginning of `stop` that the text ends with."""
        return next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n])), 0)


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """The text of `tokens` without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
