"""Text from token ids, one by one, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # optional dependency
    import tokenizers

# Decoded for incomplete and invalid UTF-8.
_REPLACEMENT = "\ufffd"
# Tokens of the prompt that new ones are decoded with, so that a leading space is kept.
_CONTEXT = 8
# Most bytes, and so tokens, of a character.
_LONGEST = 4
# Tokens after which text that still ends inside a character is written as it is.
_MOST_PENDING = 4 * _LONGEST


class TextStream:
    """The text that tokens add to a prompt, written as soon as no later token can change it.

    Held back are bytes until they complete a character, and text that may be the beginning of a stop string. Decoding
    in pieces needs care: decoders strip the first token's space, and with byte fallback one incomplete character makes
    the whole run of byte tokens invalid.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        """Starts after the ids of the prompt; the text ends before the first of the stop strings."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes; "" after a stop string."""
        self._ids.append(int(token))
        return self._release(self._decoded(last=False))

    def flush(self) -> str:
        """The text that is left after the last token."""
        text = self._release(self._decoded(last=True))
        held, self._held = self._held, ""
        return text + held

    def _decoded(self, last: bool) -> str:
        pending = self._ids[self._read :]
        if not pending:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        whole = self._decode(self._ids[self._start :])
        if whole.endswith(_REPLACEMENT) and not last and len(pending) < _MOST_PENDING:
            return ""
        start, end = self._start, self._read
        self._start, self._read = end, len(self._ids)
        if whole.startswith(before):
            return whole[len(before) :]
        if before.endswith(_REPLACEMENT):  # a character of the prompt is complete now: write it, and none before it
            known = (self._decode(self._ids[start : end - left_out]) for left_out in range(1, _LONGEST))
            complete = next((text for text in known if not text.endswith(_REPLACEMENT)), "")
            if whole.startswith(complete):
                return whole[len(complete) :]
        return self._decode(pending)  # they made what was decoded before them invalid

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins."""
    return next(length for length in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:length]))
