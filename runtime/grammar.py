"""Outputs of a given form: JSON, JSON of a schema, a regular expression, a grammar, one of several texts.

The library llguidance says which tokens may follow a text (github.com/guidance-ai/llguidance): a mask takes some
microseconds, and so does a copy of a state, so that each node of a tree can have one. It needs neither torch nor a GPU.
Imports no torch.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ssv.runtime.memory import give_back
from ssv.runtime.request import RequestError
from ssv.support.json_text import parse_json

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

KINDS = ("json", "json_schema", "regex", "ebnf_grammar", "choice")
"""Forms: any JSON object; JSON of a schema; a regular expression (of Rust's `regex`, without look-around); a grammar in
Lark's form or llama.cpp's GBNF; one of a JSON list of texts."""

JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written as Python does it: where white space may be anything, small models write nothing else. A schema's own
`x-guidance` can say otherwise."""

MAX_HELD = 32
"""Grammars that are held ready. What one of them knows of texts grows while it is used, within `NARROW`: the worst
that were tried took 5 MB, and those of common schemas less than one."""

NARROW = {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 20_000, "max_lexer_states": 100_000}
"""Limits of llguidance for what is held and shared. Few grammars need more."""

WIDE = {"max_lexer_states": 100_000}
"""Limits for those that do, of which each output has one of its own, until it ends: up to 160 MB, as was tried. What is
not named is llguidance's own limit."""


def grammar_of(kind: str, guide: str = "") -> str:
    """A grammar in llguidance's form, checked.

    Args:
        kind: one of `KINDS`.
        guide: the schema, the expression and so on; of "json" nothing.

    Raises:
        RequestError: it is of no such form, asks for what is not supported, or llguidance is not installed.
    """
    if kind not in KINDS:
        raise RequestError(f"{kind!r} is no form of an output; known: {', '.join(KINDS)}")
    matcher = _library().LLMatcher
    try:
        if kind == "json":
            grammar = matcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_STYLE)
        elif kind == "json_schema":
            grammar = matcher.grammar_from_json_schema(_schema(guide), defaults=JSON_STYLE)
        elif kind == "regex":
            grammar = matcher.grammar_from_regex(guide)
        elif kind == "choice":
            grammar = matcher.grammar_from_lark(f"start: {' | '.join(json.dumps(text) for text in _texts(guide))}")
        else:
            grammar = _library().grammar_from("grammar", guide)
    except ValueError as error:
        raise RequestError(f"the {kind} of the output cannot be read: {' '.join(str(error).split())[:400]}") from error
    is_wrong, messages = matcher.validate_grammar_with_warnings(grammar)
    if is_wrong:
        why = " ".join(messages[0].split())[:400]
        # Its option is one of the schema's own.
        cure = 'put "x-guidance": {"coerce_one_of": true} into the schema' if "coerce_one_of" in why else ""
        raise RequestError(f"the {kind} of the output is not supported: {why}", cure)
    return str(grammar)


_VLLM_KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "ebnf_grammar"}


def guide_of(given: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and guide of a form as vLLM has it: an object with one of json (a schema, also as text), regex, choice,
    grammar, or json_object true.

    Raises:
        RequestError: it has none of them, several, or anything else.
    """
    held = {name: value for name, value in given.items() if value is not None and value is not False}
    known = (*_VLLM_KINDS, "json_object")
    if len(held) != 1 or (name := next(iter(held))) not in known:
        raise RequestError(
            f"the form of the output is given by {', '.join(sorted(held)) or 'nothing'}",
            f"give one of {', '.join(known)}",
        )
    value = held[name]
    if name == "json_object":
        if value is not True:
            raise RequestError(f"the json_object of the output is {value!r}: give true, or leave it out")
        return "json", ""
    if name in ("json", "choice") and not isinstance(value, str):
        return _VLLM_KINDS[name], json.dumps(value)
    if not isinstance(value, str):
        raise RequestError(f"the {name} of the output must be a text")
    return _VLLM_KINDS[name], value


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "outputs of a given form need llguidance, which is not installed", "pip install 'ssv[structured]'"
        ) from error
    return llguidance


def _schema(guide: str) -> dict[str, Any]:
    try:
        schema = parse_json(guide)
    except ValueError as error:
        raise RequestError(f"the JSON schema is not valid JSON: {error}") from error
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise RequestError("the JSON schema must be a JSON object")
    return schema


def _texts(guide: str) -> list[str]:
    try:
        texts = parse_json(guide)
    except ValueError as error:
        raise RequestError(f"the choice is not valid JSON: {error}") from error
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts)):
        raise RequestError("the choice must be a JSON list of texts that are not empty")
    return texts


class Grammars:
    """Grammars over one vocabulary. May be asked by several threads."""

    def __init__(self, tokenizer_json: Callable[[], str], vocab_size: int, eos_ids: Sequence[int]) -> None:
        """Prepares nothing: the vocabulary takes a second when the first grammar comes.

        Args:
            tokenizer_json: gives the tokenizer as the library tokenizers writes it.
            vocab_size: of the target's logits.
            eos_ids: tokens that end an output.
        """
        self._tokenizer_json, self._vocab_size, self._eos_ids = tokenizer_json, vocab_size, sorted(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        # Copies of a matcher share what it has learned of texts. None: it needs more than `NARROW`, and is not shared.
        self._held: OrderedDict[str, LLMatcher | None] = OrderedDict()

    def prepare(self, grammar: str) -> None:
        """Makes a grammar ready, which may take long.

        Raises:
            RequestError: it cannot be used with this vocabulary.
        """
        with self._lock:
            self._prepared(grammar)

    def begin(self, grammar: str) -> GrammarState:
        """The state of an output that begins.

        Raises:
            RequestError: see `prepare`.
        """
        with self._lock:
            held = self._prepared(grammar)
            matcher = self._matcher(grammar, WIDE) if held is None else held.deep_copy()
        renew = None if held is None else lambda: self._renewed(grammar)
        return GrammarState(matcher, self._vocab_size, frozenset(self._eos_ids), renew)

    def _prepared(self, grammar: str) -> LLMatcher | None:
        """What is held of a grammar from now on."""
        if grammar in self._held:
            held = self._held[grammar]
        else:
            held = self._matcher(grammar, NARROW)
            if held.is_error():
                held = None
                self._try_wide(grammar)
        self._held[grammar] = held
        self._held.move_to_end(grammar)
        while len(self._held) > MAX_HELD:
            self._held.popitem(last=False)
        return held

    def _try_wide(self, grammar: str) -> None:
        """Raises RequestError: a grammar is more than `WIDE` takes."""
        matcher = self._matcher(grammar, WIDE)
        why = matcher.get_error() if matcher.is_error() else None
        del matcher
        give_back()  # see `GrammarState.end`
        if why is not None:
            raise RequestError(f"the form of the output is not supported: {why[:400]}")

    def _renewed(self, grammar: str) -> LLMatcher:
        """A matcher that nobody else has, of a grammar that came to the limits of what is shared: by itself, or because
        of other outputs."""
        with self._lock:
            self._held[grammar] = None
            return self._matcher(grammar, WIDE)

    def _matcher(self, grammar: str, limits: Mapping[str, int]) -> LLMatcher:
        library = _library()
        if self._tokenizer is None:
            text, eos = self._tokenizer_json(), self._eos_ids
            self._tokenizer = library.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos)
            del text
            give_back()  # what it was made from: 60 MB and more
        return library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**limits))


_BIAS_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
).astype(np.float32)


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Which tokens may follow.

    Attributes:
        bits: uint8, a bit for each token of the vocabulary, the lowest of a byte first.
        vocab_size: V.
    """

    bits: np.ndarray
    vocab_size: int

    def __contains__(self, token: int) -> bool:
        return bool(self.bits[token >> 3] >> (token & 7) & 1)

    def tokens(self) -> list[int]:
        """All of them, in their order."""
        return [int(token) for token in np.unpackbits(self.bits, bitorder="little")[: self.vocab_size].nonzero()[0]]

    def bias(self) -> np.ndarray:
        """What is to be added to logits, fp32 [V]: 0, or -inf for what may not follow."""
        return _BIAS_OF_BYTE.take(self.bits, axis=0).reshape(-1)[: self.vocab_size]


class _Exhausted(Exception):
    """A matcher has come to a limit that a fresh one may not come to."""


class GrammarState:
    """Where an output is in its grammar, and where it would be behind the paths of a tree.

    Each place has a matcher of its own, a copy of its parent's, which takes microseconds. To go back with llguidance's
    own `rollback` would be cheaper still, but masks were wrong now and then behind it (llguidance 1.9.1).
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        eos_ids: frozenset[int],
        renew: Callable[[], LLMatcher] | None = None,
    ) -> None:
        """Follows an output from its beginning.

        Args:
            renew: gives a fresh matcher where this one has come to a limit; None where there is none that goes further.
        """
        self._vocab_size, self._eos_ids, self._renew = vocab_size, eos_ids, renew
        # Matchers and masks behind the settled tokens, by the tokens of a path; None where it is none of the grammar's.
        self._num_settled = 0
        self._places: dict[tuple[int, ...], LLMatcher | None] = {(): matcher}
        self._masks: dict[tuple[int, ...], TokenMask | None] = {}
        self._forced_at: dict[tuple[int, ...], list[int]] = {}
        self._has_failed = False

    @property
    def has_failed(self) -> bool:
        """Whether the grammar was more than llguidance goes through at a token, or the vocabulary has no token that may
        follow: nothing but an end is allowed then."""
        return self._has_failed

    def allowed(self, output: Sequence[int], path: Sequence[int]) -> TokenMask | None:
        """Which tokens may follow; at least one.

        Args:
            output: tokens of the output that are settled; as many as before, or more.
            path: what follows them and is not settled.

        Returns:
            None where the path is none of the grammar's or has come to an end: nothing that matters follows.
        """
        return self._tried(output, lambda: self._mask(tuple(path)))

    def accepts(self, output: Sequence[int], path: Sequence[int], token: int) -> bool | None:
        """Whether `allowed` has a token, which takes less than to say which tokens it has; None where that is None."""
        return self._tried(output, lambda: self._has(tuple(path), token))

    def forced(self, output: Sequence[int]) -> list[int]:
        """Tokens behind the settled ones in whose places no others may stand."""
        return self._tried(output, lambda: self._forced(()))

    def end(self) -> None:
        """Lets go of all that is known, as nothing will be asked any more.

        What a matcher of one's own has learned can be 160 MB in small pieces. malloc would keep them in the arena of
        the thread that asked, and the next of these outputs takes others: so they are given back to the system, which
        takes some milliseconds. What is held stays in use, and there is nothing to give back.
        """
        self._begin_at(None, self._num_settled)
        if self._renew is None:
            give_back()

    def _tried(self, output: Sequence[int], ask: Callable[[], T]) -> T:
        """The answer to a question behind the settled tokens: of another matcher, where this one is exhausted."""
        try:
            self._settle(output)
            return ask()
        except _Exhausted:
            assert self._renew is not None
            self._begin_at(self._renew(), 0)
            self._renew = None
            self._settle(output)
            return ask()

    def _settle(self, output: Sequence[int]) -> None:
        """Takes what the output has more now."""
        if new := tuple(output[self._num_settled :]):
            self._begin_at(self._place(new), len(output))
            self._note_failure()

    def _begin_at(self, place: LLMatcher | None, num_settled: int) -> None:
        self._places, self._masks, self._forced_at, self._num_settled = {(): place}, {}, {}, num_settled

    def _note_failure(self) -> None:
        settled = self._places[()]
        self._has_failed = self._has_failed or (settled is not None and self._is_exhausted(settled))

    def _is_exhausted(self, place: LLMatcher) -> bool:
        """Whether a matcher has come to its limits, and there is no other."""
        if not place.is_error():
            return False
        if self._renew is not None:
            raise _Exhausted
        return True

    def _place(self, path: tuple[int, ...]) -> LLMatcher | None:
        """The matcher behind a path."""
        known = next(end for end in range(len(path), -1, -1) if path[:end] in self._places)
        place = self._places[path[:known]]
        for end in range(known, len(path)):
            token = path[end]
            place = None if place is None or token in self._eos_ids else place.deep_copy()
            if place is not None and place.try_consume_tokens([token]) != 1:
                self._is_exhausted(place)
                place = None
            self._places[path[: end + 1]] = place
        return place

    def _mask(self, path: tuple[int, ...]) -> TokenMask | None:
        if path not in self._masks:
            place = self._place(path)
            self._masks[path] = self._computed(place) if place is not None else None
        return self._masks[path]

    def _has(self, path: tuple[int, ...], token: int) -> bool | None:
        # Masks that are there already are not asked: the same answer whatever was asked before.
        if token not in self._eos_ids:
            # Where a text has no alternative, a mask has the one token that the library itself would write next.
            forced, place = self._forced(path), self._place(path)
            if place is None or not self._is_exhausted(place):
                return None if place is None else forced[0] == token if forced else place.validate_tokens([token]) == 1
        mask = self._mask(path)
        return None if mask is None else token in mask

    def _forced(self, path: tuple[int, ...]) -> list[int]:
        if path not in self._forced_at:
            place = self._place(path)
            self._forced_at[path] = [] if place is None else list(place.compute_ff_tokens())
        return self._forced_at[path]

    def _computed(self, place: LLMatcher) -> TokenMask:
        bits = np.frombuffer(place.compute_bitmask(), dtype=np.uint8)
        self._is_exhausted(place)
        if not bits.any():
            bits = bits.copy()
            for token in self._eos_ids:
                bits[token >> 3] |= 1 << (token & 7)
            self._has_failed = self._has_failed or place is self._places[()]
        self._note_failure()
        return TokenMask(bits, self._vocab_size)
