"""From tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from ssv.support.errors import UserError

_HALF_CHARACTER = "\ufffd"


class _Decoding(Protocol):
    """Text of tokens as they come, without a thought for stop strings."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens; returns the text that is certain now."""
        ...

    def ahead(self, token_ids: Sequence[int] = ()) -> str:
        """The text that has not been returned, if these tokens followed and ended it; half characters as U+FFFD. They
        are not taken."""
        ...


class _ByBytes:
    """Where a text is no more than its tokens' bytes one after another, as UTF-8."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._half = b""

    def push(self, token_ids: Sequence[int]) -> str:
        found = self._joined(token_ids)
        text, used = codecs.utf_8_decode(found, "replace")
        self._half = found[used:]
        return text

    def ahead(self, token_ids: Sequence[int] = ()) -> str:
        return self._joined(token_ids).decode(errors="replace")

    def _joined(self, token_ids: Sequence[int]) -> bytes:
        return self._half + b"".join(map(self._token_bytes, token_ids))


class _ByDifference:
    """For any tokenizer: what decoding all of the tokens gives beyond decoding those before."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        # Tokens are decoded with some before them, since a token's text depends on its left (spaces, bytes of a
        # character). Those must have a text of their own: a decoder that strips a space strips it then from them.
        prefix = decode(context) if context else ""
        known = prefix and not prefix.endswith(_HALF_CHARACTER)
        self._ids: list[int] = list(context) if known else []
        self._done = len(self._ids)
        # Of the first `_done` ids, where it is known: decoding costs more than all else here.
        self._before: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        before = self._decode(self._ids[: self._done]) if self._before is None else self._before
        self._before = before
        self._ids.extend(token_ids)
        after = self._decode(self._ids)
        if after.endswith(_HALF_CHARACTER):
            if len(token_ids) == 1:
                return ""
            # Whole characters before the half one leave all the same.
            del self._ids[-len(token_ids) :]
            return "".join([self.push([token]) for token in token_ids])
        self._before = None
        if len(after) == len(before) and not self._decode([*token_ids, *token_ids]):
            # They are left out of every text, and must not push what the next one is decoded with out of sight.
            del self._ids[-len(token_ids) :]
        elif text := self._decode(self._ids[self._done :]):
            self._ids, self._before = self._ids[self._done :], text
        else:
            self._before = after
        self._done = len(self._ids)
        return after[len(before) :]

    def ahead(self, token_ids: Sequence[int] = ()) -> str:
        return self._decode([*self._ids, *token_ids])[len(self._decode(self._ids[: self._done])) :]


class TextStream:
    """The text of one request.

    Whatever the tokens are cut into, the pieces together are what decoding all of them at once gives. (With
    `tokenizers.decoders.DecodeStream` they are not: it has no end, so half a character that an output ends with is
    lost.)

    Attributes:
        min_tokens: tokens that do not complete a stop string.
        stopped: whether a stop string was completed; `push` must not be called any more then.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        *,
        token_bytes: Callable[[int], bytes] | None = None,
        stop_ids: Collection[int] = (),
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        """Begins an output.

        Args:
            token_bytes: of tokens whose bytes, one after another, are the UTF-8 of what `decode` gives: such text is
                had several times faster. None of a tokenizer whose tokens are not of that kind.
            stop_ids: tokens that end the output as a stop string does, of which the text has nothing.
            min_tokens: see the attribute.
            context: the end of what the text continues; nothing for a text of its own.
        """
        self._decoding: _Decoding = _ByBytes(token_bytes) if token_bytes is not None else _ByDifference(decode, context)
        self._stop = tuple(stop)
        self._stop_ids, self.min_tokens = frozenset(stop_ids), min_tokens
        self._pushed = 0
        self._held = ""
        self.stopped = self._has_ended = False

    def push(self, *token_ids: int) -> str:
        """Takes tokens, and returns the text that can leave now.

        With stop strings, tokens are taken one at a time: the output ends with the token that completes one.
        """
        if not token_ids:
            return ""
        self._pushed += len(token_ids)
        if self._stop_ids and self._stop_ids.intersection(token_ids) and self._pushed > self.min_tokens:
            text = self.flush()
            self.stopped = True
            return text
        return self._release(self._decoding.push(token_ids))

    def flush(self) -> str:
        """The rest, when the output has ended without a stop string; half characters as U+FFFD."""
        if self.stopped or self._has_ended:
            return ""
        self._has_ended = True
        text = self._held + self._decoding.ahead()
        # A stop string before half a character has not been seen by `push`.
        found = self._first_stop(text) if self._pushed > self.min_tokens else None
        self.stopped = found is not None
        return text[:found]

    def would_stop(self, token_ids: Sequence[int]) -> bool:
        """Whether a stop string is complete once these tokens, not pushed yet, have followed."""
        if not self._stop or self._pushed + len(token_ids) <= self.min_tokens:
            return False
        if self._stop_ids.intersection(token_ids):
            return True
        text = self._held + self._decoding.ahead(token_ids)
        return any(stop in text for stop in self._stop)

    def _release(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        found = self._first_stop(text) if self._pushed > self.min_tokens else None
        if found is not None:
            self.stopped = True
            self._held = ""
            return text[:found]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> int | None:
        return min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class StreamError(UserError):
    """A piece of a stream whose beginning is not known here; the message says what to do."""


class Detokenizer:
    """The texts of many streams, whose pieces come in their order, each stream's with a key.

    Streams that break off without a last piece are forgotten once `max_streams` others have come after them.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        max_streams: int,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        """Begins without streams.

        Args:
            decode, token_bytes: see `TextStream`.
        """
        self._decode, self._max_streams, self._token_bytes = decode, max_streams, token_bytes
        self._streams: OrderedDict[str, tuple[TextStream, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._streams)

    def push(
        self,
        key: str,
        number: int,
        token_ids: Sequence[int],
        stop: Sequence[str],
        is_last: bool,
        *,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> str:
        """Text that can leave after this piece.

        Args:
            number: of the piece in its stream, from 0.
            stop: strings that end the stream's text, which does not include them; the same in every piece.
            min_tokens, context: see `TextStream`; of a stream's first piece.

        Raises:
            StreamError: pieces before it are missing.
        """
        if number == 0:
            new = TextStream(self._decode, stop, token_bytes=self._token_bytes, min_tokens=min_tokens, context=context)
            self._streams[key] = (new, 0)
            while len(self._streams) > self._max_streams:
                self._streams.popitem(last=False)
        stream, expected = self._streams.pop(key, (None, -1))
        if stream is None or number != expected:
            raise StreamError("the server has lost the beginning of this answer, as it was restarted", "ask again")
        text = ""
        if stop:
            for token in token_ids:
                if not stream.stopped:
                    text += stream.push(token)
        elif token_ids:
            text = stream.push(*token_ids)
        if is_last:
            return text + stream.flush()
        self._streams[key] = (stream, number + 1)
        return text
