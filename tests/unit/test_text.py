"""Text as it comes: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from fakes import FakeTokenizer
from ssv.runtime.text import TextStream

HALF = "\ufffd"


class ByteTokenizer:
    """A token for each byte."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def byte_stream(*stop: str) -> TextStream:
    return TextStream(ByteTokenizer().decode, stop)


def push_all(stream: TextStream, text: str | bytes) -> list[str]:
    """What each byte lets out, until the stream stops."""
    pieces = []
    for byte in text.encode() if isinstance(text, str) else text:
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    return pieces


@pytest.mark.parametrize("text", ["plain", "é€😀", "a€b", "naïve 😀!", "한국어", "e\u0301"])
def test_half_characters_never_leave(text: str) -> None:
    stream = byte_stream()
    pieces = push_all(stream, text)
    assert not any(HALF in piece for piece in pieces)
    assert "".join(pieces) == text
    assert all(text.startswith("".join(pieces[:n])) for n in range(len(pieces)))
    assert stream.flush() == ""


def test_character_leaves_with_its_last_byte() -> None:
    assert push_all(byte_stream(), "a😀b") == ["a", "", "", "", "😀", "b"]


def test_several_tokens_at_once() -> None:
    stream = byte_stream()
    data = "a€b😀".encode()
    assert [stream.push(*data[:3]), stream.push(*data[3:5]), stream.push(*data[5:])] == ["a", "€b", "😀"]


def test_broken_bytes_leave_once_they_cannot_be_completed() -> None:
    pieces = push_all(byte_stream(), b"\xe2\x82a")
    assert pieces == ["", "", HALF + "a"]


def test_flush_gives_what_a_half_character_held_back() -> None:
    stream = byte_stream()
    push_all(stream, b"a\xe2\x82")
    assert stream.flush() == HALF
    assert stream.flush() == ""


def test_tokens_of_several_characters() -> None:
    tokenizer = FakeTokenizer()
    stream = TextStream(tokenizer.decode, ())
    # "ab", "x" + half of "é", the rest + "y", half of "€", its rest
    assert [stream.push(token) for token in (3, 10, 11, 8, 9)] == ["ab", "", "xéy", "", "€"]


def test_a_token_is_decoded_with_those_before_it() -> None:
    """As a tokenizer does that drops the space which begins a text."""

    def decode(token_ids: Sequence[int]) -> str:
        return "".join(f" w{token}" for token in token_ids)[1:]

    stream = TextStream(decode, ())
    assert "".join(stream.push(token) for token in range(6)) == "w0 w1 w2 w3 w4 w5"


def test_context_stays_short() -> None:
    """Decoding all tokens for each would be quadratic."""
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return bytes(token_ids).decode(errors="replace")

    push_all(TextStream(decode, ("stop",)), "some text of a certain length " * 4)
    assert longest <= 4


# --- stop strings ---------------------------------------------------------------------------------------------------


def test_stop_string_and_what_follows_it_never_leave() -> None:
    stream = byte_stream("END")
    assert "".join(push_all(stream, "some text END more")) == "some text "
    assert stream.stopped
    assert stream.flush() == ""


def test_stop_string_within_a_token() -> None:
    stream = TextStream(lambda ids: "".join(("one ", "twoENDthree")[i] for i in ids), ("END",))
    assert [stream.push(0), stream.push(1)] == ["one ", "two"]
    assert stream.stopped


def test_beginning_of_a_stop_string_is_held_back() -> None:
    stream = byte_stream("END")
    assert push_all(stream, "xEN") == ["x", "", ""]
    assert stream.push(ord("E")) == "EN"
    assert stream.push(ord("z")) == "Ez"
    assert not stream.stopped


def test_flush_gives_a_stop_string_that_was_not_completed() -> None:
    stream = byte_stream("END")
    push_all(stream, "xEN")
    assert stream.flush() == "EN"


def test_stop_string_that_overlaps_itself() -> None:
    stream = byte_stream("aab")
    assert "".join(push_all(stream, "aaaaab!")) == "aaa"
    assert stream.stopped


def test_first_of_several_stop_strings() -> None:
    assert "".join(push_all(byte_stream("cd", "b"), "abcd")) == "a"
    assert "".join(push_all(byte_stream("abcd", "bc"), "xabcd")) == "xa"
    assert "".join(push_all(byte_stream("abcd", "x"), "abcabcd")) == "abc"


def test_stop_string_of_half_characters() -> None:
    stream = byte_stream("€!")
    assert "".join(push_all(stream, "a€€!")) == "a€"
    assert stream.stopped


def test_stop_string_against_a_search_of_the_whole_text() -> None:
    rng = random.Random(0)
    for _ in range(300):
        stops = ["".join(rng.choices("abé", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abé", k=25))
        stream = byte_stream(*stops)
        out = "".join(push_all(stream, text)) + stream.flush()
        # The first to be completed ends the text; of those that one byte completes, the longest.
        end = next((n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)), None)
        begins = [end - len(stop) for stop in stops if end is not None and text[:end].endswith(stop)]
        assert out == text[: min(begins, default=len(text))]
        assert stream.stopped == (end is not None)


def test_would_stop() -> None:
    stream = byte_stream("END")
    push_all(stream, "xE")
    assert stream.would_stop(b"ND")
    assert stream.would_stop(b"NDxyz")
    assert not stream.would_stop(b"N")
    assert not stream.would_stop(b"xND")
    assert not stream.would_stop(b"")
    assert stream.would_stop(b"NEND")


def test_would_stop_changes_nothing() -> None:
    stream, other = byte_stream("END"), byte_stream("END")
    for byte in "a€EN€END".encode():
        stream.would_stop(b"ND")
        stream.would_stop(b"\xe2\x82")
        assert stream.push(byte) == other.push(byte)


def test_would_stop_across_a_half_character() -> None:
    stream = byte_stream("€")
    push_all(stream, b"a\xe2\x82")
    assert stream.would_stop(b"\xac")
    assert not stream.would_stop(b"a")


def test_would_stop_without_stop_strings() -> None:
    assert not byte_stream().would_stop(b"END")


def test_would_stop_foresees_push() -> None:
    rng = random.Random(1)
    for _ in range(200):
        stop = "".join(rng.choices("ab", k=rng.randint(1, 4)))
        data = "".join(rng.choices("ab", k=12)).encode()
        at = rng.randint(0, 12)
        stream = byte_stream(stop)
        push_all(stream, data[:at])
        if not stream.stopped:
            assert stream.would_stop(data[at:]) == (stop.encode() in data)


def test_stop_string_followed_by_half_a_character_in_the_last_token() -> None:
    """The half character holds the token back; the stop string in it must not leave with the rest."""
    pieces = (b"some ", b"END\xe2")
    stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), ("END",))
    text = stream.push(0) + stream.push(1)
    if not stream.stopped:
        text += stream.flush()
    assert text == "some "
