"""Text as it comes: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeTokenizer
from ssv.runtime.text import Detokenizer, StreamError, TextStream

HALF = "\ufffd"


class ByteTokenizer:
    """A token for each byte."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def no_decoding(token_ids: Sequence[int]) -> str:
    pytest.fail("bytes are enough")


Streams = Callable[..., TextStream]


@pytest.fixture(scope="module", params=["by difference", "by bytes"])
def byte_stream(request: pytest.FixtureRequest) -> Streams:
    if request.param == "by bytes":
        return lambda *stop: TextStream(no_decoding, stop, token_bytes=lambda token: bytes([token]))
    return lambda *stop: TextStream(ByteTokenizer().decode, stop)


def push_all(stream: TextStream, text: str | bytes) -> list[str]:
    """What each byte lets out, until the stream stops."""
    pieces = []
    for byte in text.encode() if isinstance(text, str) else text:
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    return pieces


@pytest.mark.parametrize("text", ["plain", "é€😀", "a€b", "naïve 😀!", "한국어", "e\u0301"])
def test_half_characters_never_leave(text: str, byte_stream: Streams) -> None:
    stream = byte_stream()
    pieces = push_all(stream, text)
    assert not any(HALF in piece for piece in pieces)
    assert "".join(pieces) == text
    assert all(text.startswith("".join(pieces[:n])) for n in range(len(pieces)))
    assert stream.flush() == ""


def test_character_leaves_with_its_last_byte(byte_stream: Streams) -> None:
    assert push_all(byte_stream(), "a😀b") == ["a", "", "", "", "😀", "b"]


def test_several_tokens_at_once(byte_stream: Streams) -> None:
    stream = byte_stream()
    data = "a€b😀".encode()
    assert [stream.push(*data[:3]), stream.push(*data[3:5]), stream.push(*data[5:])] == ["a", "€b", "😀"]


def test_broken_bytes_leave_once_they_cannot_be_completed(byte_stream: Streams) -> None:
    pieces = push_all(byte_stream(), b"\xe2\x82a")
    assert pieces == ["", "", HALF + "a"]


def test_flush_gives_what_a_half_character_held_back(byte_stream: Streams) -> None:
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


def test_stop_string_and_what_follows_it_never_leave(byte_stream: Streams) -> None:
    stream = byte_stream("END")
    assert "".join(push_all(stream, "some text END more")) == "some text "
    assert stream.stopped
    assert stream.flush() == ""


def test_stop_string_within_a_token() -> None:
    stream = TextStream(lambda ids: "".join(("one ", "twoENDthree")[i] for i in ids), ("END",))
    assert [stream.push(0), stream.push(1)] == ["one ", "two"]
    assert stream.stopped


def test_beginning_of_a_stop_string_is_held_back(byte_stream: Streams) -> None:
    stream = byte_stream("END")
    assert push_all(stream, "xEN") == ["x", "", ""]
    assert stream.push(ord("E")) == "EN"
    assert stream.push(ord("z")) == "Ez"
    assert not stream.stopped


def test_flush_gives_a_stop_string_that_was_not_completed(byte_stream: Streams) -> None:
    stream = byte_stream("END")
    push_all(stream, "xEN")
    assert stream.flush() == "EN"


def test_stop_string_that_overlaps_itself(byte_stream: Streams) -> None:
    stream = byte_stream("aab")
    assert "".join(push_all(stream, "aaaaab!")) == "aaa"
    assert stream.stopped


def test_first_of_several_stop_strings(byte_stream: Streams) -> None:
    assert "".join(push_all(byte_stream("cd", "b"), "abcd")) == "a"
    assert "".join(push_all(byte_stream("abcd", "bc"), "xabcd")) == "xa"
    assert "".join(push_all(byte_stream("abcd", "x"), "abcabcd")) == "abc"


def test_stop_string_of_half_characters(byte_stream: Streams) -> None:
    stream = byte_stream("€!")
    assert "".join(push_all(stream, "a€€!")) == "a€"
    assert stream.stopped


def test_stop_string_against_a_search_of_the_whole_text(byte_stream: Streams) -> None:
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


def test_would_stop(byte_stream: Streams) -> None:
    stream = byte_stream("END")
    push_all(stream, "xE")
    assert stream.would_stop(b"ND")
    assert stream.would_stop(b"NDxyz")
    assert not stream.would_stop(b"N")
    assert not stream.would_stop(b"xND")
    assert not stream.would_stop(b"")
    assert stream.would_stop(b"NEND")


def test_would_stop_changes_nothing(byte_stream: Streams) -> None:
    stream, other = byte_stream("END"), byte_stream("END")
    for byte in "a€EN€END".encode():
        stream.would_stop(b"ND")
        stream.would_stop(b"\xe2\x82")
        assert stream.push(byte) == other.push(byte)


def test_would_stop_across_a_half_character(byte_stream: Streams) -> None:
    stream = byte_stream("€")
    push_all(stream, b"a\xe2\x82")
    assert stream.would_stop(b"\xac")
    assert not stream.would_stop(b"a")


def test_would_stop_without_stop_strings(byte_stream: Streams) -> None:
    assert not byte_stream().would_stop(b"END")


def test_would_stop_foresees_push(byte_stream: Streams) -> None:
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


# --- the texts of many streams --------------------------------------------------------------------------------------


def detokenizer(max_streams: int = 8) -> Detokenizer:
    return Detokenizer(ByteTokenizer().decode, max_streams)


def test_pieces_of_streams_that_interleave() -> None:
    texts = detokenizer()
    assert texts.push("a", 0, b"x\xe2", (), False) == "x"
    assert texts.push("b", 0, b"\xf0\x9f", (), False) == ""
    assert texts.push("a", 1, b"\x82\xacy", (), False) == "€y"
    assert texts.push("b", 1, b"\x98\x80", (), True) == "😀"
    assert texts.push("a", 2, b"", (), True) == ""
    assert len(texts) == 0


def test_a_stream_of_one_piece() -> None:
    assert detokenizer().push("a", 0, "naïve €".encode(), (), True) == "naïve €"


def test_an_empty_stream() -> None:
    assert detokenizer().push("a", 0, b"", ("END",), True) == ""


def test_a_last_piece_gives_what_was_held_back() -> None:
    texts = detokenizer()
    assert texts.push("a", 0, b"xEN", ("END",), False) == "x"
    assert texts.push("a", 1, b"", ("END",), True) == "EN"
    assert texts.push("b", 0, b"x\xe2", (), True) == "x" + HALF


def test_nothing_of_or_after_a_stop_string_leaves() -> None:
    texts = detokenizer()
    assert texts.push("a", 0, b"some EN", ("END",), False) == "some "
    assert texts.push("a", 1, b"D more", ("END",), False) == ""
    assert texts.push("a", 2, b"and more", ("END",), True) == ""
    assert texts.push("b", 0, b"some END more", ("END",), True) == "some "


def test_any_cut_into_pieces_gives_the_text_in_one_go(byte_stream: Streams) -> None:
    rng = random.Random(2)
    for _ in range(300):
        data = "".join(rng.choices("abé€😀", k=12)).encode() + rng.choice([b"", b"\xe2\x82", b"\xff"])
        stop = tuple("".join(rng.choices("abé", k=rng.randint(1, 3))) for _ in range(rng.randint(0, 2)))
        whole = byte_stream(*stop)
        expected = "".join(push_all(whole, data)) + whole.flush()
        texts, cuts = detokenizer(), sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, 5)))
        bounds = [0, *cuts, len(data)]
        found = [
            texts.push("a", n, data[start:end], stop, n == len(cuts)) for n, (start, end) in enumerate(pairwise(bounds))
        ]
        assert "".join(found) == expected
        assert not any(HALF in piece for piece in found[:-1]) or HALF in expected
        assert len(texts) == 0


DATA = st.lists(st.sampled_from([b"a", b"b", "é".encode(), "€".encode(), "😀".encode(), b"\xe2", b"\xff"]), max_size=12)


@given(DATA, st.lists(st.integers(1, 5), min_size=40, max_size=40))
def test_without_stop_strings_any_bytes_in_any_pieces_are_the_whole_text(data: list[bytes], sizes: list[int]) -> None:
    """Broken characters too, of which none leaves before it is known to be broken."""
    left, texts, found = b"".join(data), detokenizer(), []
    whole = left.decode(errors="replace")
    for number, size in enumerate(sizes):
        piece, left = left[:size], left[size:]
        found.append(texts.push("a", number, piece, (), not left))
        assert whole.startswith("".join(found))
        if not left:
            break
    assert "".join(found) == whole


@given(data=DATA, stops=st.lists(st.text("abé€", min_size=1, max_size=3), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_in_the_text(data: list[bytes], stops: list[str], byte_stream: Streams) -> None:
    stream, whole = byte_stream(*stops), b"".join(data).decode(errors="replace")
    text = "".join(push_all(stream, b"".join(data))) + stream.flush()
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert stream.stopped == any(stop in whole for stop in stops)
    assert stream.stopped or text == whole


@pytest.mark.parametrize("number", [1, 5])
def test_a_piece_whose_beginning_is_unknown(number: int) -> None:
    texts = detokenizer()
    with pytest.raises(StreamError, match="ask again"):
        texts.push("a", number, b"x", (), False)
    assert len(texts) == 0


@pytest.mark.parametrize("number", [1, 3])
def test_a_piece_missing_or_sent_twice(number: int) -> None:
    texts = detokenizer()
    texts.push("a", 0, b"x", (), False)
    texts.push("a", 1, b"y", (), False)
    with pytest.raises(StreamError):
        texts.push("a", number, b"z", (), False)
    with pytest.raises(StreamError):  # and the rest is of no use
        texts.push("a", 2, b"z", (), False)


def test_after_its_last_piece_a_stream_is_over() -> None:
    texts = detokenizer()
    texts.push("a", 0, b"x", (), True)
    with pytest.raises(StreamError):
        texts.push("a", 1, b"y", (), True)


def test_streams_that_break_off_are_forgotten() -> None:
    texts = detokenizer(max_streams=3)
    texts.push("living", 0, b"0", (), False)
    for n in range(1, 50):
        texts.push(f"broken {n}", 0, b"x", (), False)
        assert texts.push("living", n, b"y", (), False) == "y"
        assert len(texts) <= 3
    with pytest.raises(StreamError):
        texts.push("broken 1", 1, b"x", (), False)
    assert texts.push("broken 49", 1, b"z", (), True) == "z"
