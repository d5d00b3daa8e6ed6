"""An answer in pieces: what each of them has, and that none is lost on the way."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from ssv.runtime.counters import Counters
from ssv.runtime.request import Chunk, FinishReason, SamplingParams, TokenFate, TokenLogprobs
from ssv.runtime.serving.intake import Settings
from ssv.runtime.serving.pieces import Answer, Piece, error_text


class Bytes:
    """Each token is the byte of its number, and special from 200 on."""

    def token_bytes(self, token: int) -> bytes:
        return f"<{token}>".encode() if self.is_special(token) else bytes([token])

    def is_special(self, token: int) -> bool:
        return token >= 200


COUNTERS = Counters(
    prompt_tokens=9, cached_tokens=4, emitted=5, drafted=8, judged=4, accepted=3, trusted=1, typical=2, target_passes=2
)


def make(*, stream: bool, stop: tuple[str, ...] = (), lossless: bool = True, method: str = "premium") -> Answer:
    return Answer("key", Settings(method, SamplingParams(stop=stop), stream, None), lossless)


def chunk(*token_ids: int, reason: FinishReason | None = None, counters: Counters = COUNTERS) -> Chunk:
    return Chunk(0, "", token_ids, counters, reason)


def pieces(answer: Answer, *chunks: Chunk) -> list[Piece]:
    return [piece for each in chunks if (piece := answer.piece(each, 0.0, 0.0)) is not None]


def test_streaming_has_a_piece_for_each_chunk() -> None:
    found = pieces(make(stream=True), chunk(1), chunk(2, 3), chunk(reason="stop"))
    assert [piece.token_ids for piece in found] == [(1,), (2, 3), ()]
    assert [piece.number for piece in found] == [0, 1, 2]
    assert [piece.is_last for piece in found] == [False, False, True]
    assert [piece.fields["finish_reason"] for piece in found] == ["", "", "stop"]
    assert [piece.fields["num_output_tokens"] for piece in found] == [1, 2, 0]


def test_an_answer_says_that_the_tier_asked_for_is_withdrawn() -> None:
    settings = Settings("premium", SamplingParams(), False, None)
    (piece,) = pieces(Answer("key", settings, True, withdrawn_tier="turbo"), chunk(1, reason="stop"))
    found = [piece.fields[name] for name in ("ssv_tier_used", "ssv_lossless", "ssv_tier_withdrawn")]
    assert found == ["premium", True, "turbo"]


def test_pieces_keep_their_distance() -> None:
    """Tokens that come too soon leave with the next ones; the first ones and the end never wait."""
    answer = make(stream=True)
    times = [100.0, 100.25, 100.49, 100.5, 100.6, 101.2, 101.3]
    found = [answer.piece(chunk(i), now, 0.5) for i, now in enumerate(times)]
    assert [piece and piece.token_ids for piece in found] == [(0,), None, None, (1, 2, 3), None, (4, 5), None]
    last = answer.piece(chunk(reason="cancelled"), 101.3, 0.5)
    assert last is not None
    assert (last.token_ids, last.number, last.is_last) == ((6,), 3, True)
    assert last.fields["num_output_tokens"] == 1


def test_otherwise_there_is_one_with_all_tokens() -> None:
    (piece,) = pieces(make(stream=False), chunk(1), chunk(2, 3), chunk(4, reason="length"))
    assert (piece.token_ids, piece.number, piece.is_last) == ((1, 2, 3, 4), 0, True)
    assert (piece.fields["num_output_tokens"], piece.fields["finish_reason"]) == (4, "length")


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled", "deadline"])
def test_every_end_is_a_last_piece(reason: FinishReason) -> None:
    (piece,) = pieces(make(stream=False), chunk(reason=reason))
    assert piece.is_last
    assert piece.fields["finish_reason"] == reason


def test_fields() -> None:
    answer = make(stream=True, lossless=False, method="turbo", stop=("END", "x"))
    (piece,) = pieces(answer, chunk(1, 2))
    assert piece.key == "key"
    assert piece.stop == ("END", "x")
    assert piece.fields == {
        "finish_reason": "",
        "num_input_tokens": 9,
        "num_output_tokens": 2,
        "acceptance_rate": 0.75,
        "total_accepted_draft_tokens": 3,
        "total_draft_tokens": 4,
        "ssv_tier_used": "turbo",
        "ssv_lossless": False,
        "ssv_unverified_tokens": 1,
        "ssv_typical_tokens": 2,
        "ssv_target_passes": 2,
        "ssv_cached_tokens": 4,
        "ssv_tier_withdrawn": "",
        "ssv_arm": "",
        "ssv_draft_tokens": 8,
        "ssv_kept_per_pass": "",
    }


def test_the_last_piece_says_how_many_passes_kept_how_many_drafted_tokens() -> None:
    counters = replace(COUNTERS, passes_by_kept=Counter({3: 2, 0: 1}))
    found = pieces(make(stream=True), chunk(1, counters=counters), chunk(reason="stop", counters=counters))
    assert [piece.fields["ssv_kept_per_pass"] for piece in found] == ["", "[1, 0, 0, 2]"]
    (piece,) = pieces(make(stream=False), chunk(1, reason="stop"))  # the prompt's step gave it
    assert piece.fields["ssv_kept_per_pass"] == "[]"


def test_a_stop_token_counts_and_is_no_text() -> None:
    settings = Settings("premium", SamplingParams(stop_token_ids=(3,)), False, None)
    for reason, ids in (("stop", (1, 2)), ("length", (1, 2, 3))):
        (piece,) = pieces(Answer("key", settings, True), chunk(1, 2), chunk(3, reason=reason))
        assert (piece.token_ids, piece.fields["num_output_tokens"]) == (ids, 3)


def test_log_probabilities_travel_with_their_tokens() -> None:
    first, second = TokenLogprobs(1, -0.5, ((1, -0.5), (7, -2.0))), TokenLogprobs(2, -1.0)
    settings = Settings("premium", SamplingParams(logprobs=2, prompt_logprobs=0), True, None)
    answer = Answer("key", settings, True, first_token=5)
    found = pieces(
        answer,
        Chunk(0, "", (1,), COUNTERS, None, (first,), (TokenLogprobs(6, -3.0),)),
        Chunk(0, "", (2,), COUNTERS, "stop", (second,)),
    )
    assert [piece.logprobs for piece in found] == [((1, -0.5, ((1, -0.5), (7, -2.0))),), ((2, -1.0, ()),)]
    assert [piece.prompt_logprobs for piece in found] == [((5, None, ()), (6, -3.0, ())), ()]
    assert [Piece.from_json(piece.to_json()) for piece in found] == found
    told = [json.loads(piece.outputs("x", Bytes())["ssv_logprobs"]) for piece in found]
    assert told[0]["prompt"] == [
        {"id": 5, "bytes": [5], "logprob": None, "top": []},
        {"id": 6, "bytes": [6], "logprob": -3.0, "top": []},
    ]
    assert told[0]["output"][0]["top"][1] == {"id": 7, "bytes": [7], "logprob": -2.0}
    assert told[1] == {"output": [{"id": 2, "bytes": [2], "logprob": -1.0, "top": []}]}


def test_fates_travel_with_their_tokens() -> None:
    first = TokenFate(65, "accepted", 1, 0.25, ((66, 67), (68,)))
    second, last = TokenFate(0xC3, "trusted", 1, 0.125), TokenFate(200, "corrected", 1, None, ((201,),))
    settings = Settings("turbo", SamplingParams(fates=True), True, None)
    found = pieces(
        Answer("key", settings, False),
        Chunk(0, "", (65,), COUNTERS, fates=(first,)),
        Chunk(0, "", (0xC3, 200), COUNTERS, "stop", fates=(second, last)),
    )
    assert [piece.fates for piece in found] == [(first,), (second, last)]
    assert [Piece.from_json(piece.to_json()) for piece in found] == found
    told = [entry for piece in found for entry in json.loads(piece.outputs("x", Bytes())["ssv_fates"])]
    assert told == [
        {"token": "A", "bytes": [65], "fate": "accepted", "pass": 1, "risk": 0.25, "dropped": [["B", "C"], ["D"]]},
        {"token": "\ufffd", "bytes": [0xC3], "fate": "trusted", "pass": 1, "risk": 0.125, "dropped": []},
        {"token": "<200>", "bytes": None, "fate": "corrected", "pass": 1, "risk": None, "dropped": [["<201>"]]},
    ]


def test_fates_that_are_held_back_leave_with_their_tokens() -> None:
    answer = make(stream=True)
    fates = [TokenFate(token, "target", token) for token in range(3)]
    chunks = [Chunk(0, "", (fate.token,), COUNTERS, fates=(fate,)) for fate in fates]
    found = [answer.piece(each, now, 0.5) for each, now in zip(chunks, [1.0, 1.2, 1.6], strict=True)]
    assert [piece and piece.fates for piece in found] == [(fates[0],), None, (fates[1], fates[2])]


def test_without_them_there_is_nothing_of_them() -> None:
    (piece,) = pieces(make(stream=True), chunk(1))
    told = piece.outputs("x", Bytes())
    assert (told["ssv_logprobs"], told["ssv_fates"]) == ("", "")


def test_types_of_fields_survive_json() -> None:
    """They choose the types of tensors."""
    for counters in (COUNTERS, Counters(), Counters(judged=3, accepted=3)):
        (piece,) = pieces(make(stream=True), chunk(1, counters=counters))
        back = Piece.from_json(piece.to_json())
        assert back == piece
        assert [type(value) for value in back.fields.values()] == [type(value) for value in piece.fields.values()]
        assert type(back.fields["acceptance_rate"]) is float


def test_counters_are_those_of_the_moment() -> None:
    """A chunk's counters are the request's own, which go on counting."""
    answer, counters = make(stream=True), Counters(target_passes=1)
    first = answer.piece(chunk(1, counters=counters), 0.0, 0.0)
    counters.target_passes = 2
    assert first is not None
    assert first.fields["ssv_target_passes"] == 1


@pytest.mark.parametrize("stop", [(), ("é", '"', "\n", "\x00", "\ud800")])
def test_json(stop: tuple[str, ...]) -> None:
    (piece,) = pieces(make(stream=True, stop=stop), chunk(1))
    text = piece.to_json()
    assert text.isascii()
    assert Piece.from_json(text) == Piece.from_json(text.encode()) == piece


def test_probe() -> None:
    answer = make(stream=True, stop=("END",))
    first, probe, second = answer.piece(chunk(1), 0.0, 0.0), answer.probe(), answer.piece(chunk(2), 0.0, 0.0)
    assert first is not None and second is not None
    assert probe.is_probe and not first.is_probe
    assert (probe.key, probe.token_ids, probe.is_last) == ("key", (), False)
    assert second.number == first.number + 1
    assert Piece.from_json(probe.to_json()).is_probe


def test_probe_takes_no_tokens_along() -> None:
    answer = make(stream=False)
    assert answer.piece(chunk(1), 0.0, 0.0) is None
    assert answer.probe().token_ids == ()
    (piece,) = pieces(answer, chunk(2, reason="stop"))
    assert piece.token_ids == (1, 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", "1", '{"key": "a"}', json.dumps({"key": "k", "more": 1})])
def test_what_is_no_piece_raises(text: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Piece.from_json(text)


def test_errors_have_their_status_in_front() -> None:
    assert error_text("UNAVAILABLE", ValueError("no: later")) == "UNAVAILABLE: no: later"
