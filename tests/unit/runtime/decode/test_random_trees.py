"""Trees of any form, of right and wrong tokens, that no drafter would make: the text of plain decoding, wherever in a
branch an output ends."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from drive import text_of

from fakes import EOS, VOCAB_SIZE, FakeTarget, FakeTokenizer
from ssv.bundle.policy import MAX_PENDING, verify_all
from ssv.runtime.decode import round as module
from ssv.runtime.decode.drafters import Drafters
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.llm import LLM
from ssv.runtime.request import Output, Request, SamplingParams
from ssv.runtime.tokenizer import BundleTokenizer

MAX_LENGTH = 40
STOPS: tuple[tuple[str, ...], ...] = ((), (), ("b c",), ("E", "x"), ("ab", "a"))


class RandomTrees(Drafter):
    """Random trees, in which every node that follows right ones alone may get a right child.

    Attributes:
        kept: of each request, by its seed, how many nodes each pass has kept.
        seen: what has happened, and how often.
    """

    def __init__(self, texts: Mapping[int, Sequence[int]], rng: random.Random) -> None:
        """Args:
        texts: what plain decoding says, by a request's seed, beyond where the request ends.
        """
        self._texts, self._rng = texts, rng
        self.kept: dict[int, list[int]] = {}
        self.seen: Counter[str] = Counter()

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Any = None) -> None:
        for row, limit in zip(rows, limits, strict=True):
            if limit > 0:
                self.seen[f"{limit} nodes"] += 1
                row.tree = self._tree(self._texts[row.params.seed][row.counters.emitted :], limit)

    def _tree(self, right: Sequence[int], limit: int) -> Tree:
        """Args:
        right: what plain decoding says next.
        """
        tree, rng = Tree(), self._rng
        right_nodes, chance = [ROOT], rng.choice([0.0, 0.4, 0.9])
        for _ in range(limit):
            parent = right_nodes[-1] if rng.random() < 0.4 else rng.randint(ROOT, len(tree) - 1)
            depth = 0 if parent == ROOT else tree.depths[parent]
            is_right = parent in right_nodes and depth < len(right) and rng.random() < chance
            token = right[depth] if is_right else rng.randrange(VOCAB_SIZE)
            if tree.child(parent, token) is not None:  # siblings differ
                continue
            node = tree.add(token, parent=parent)
            if parent in right_nodes and depth < len(right) and token == right[depth]:
                right_nodes.append(node)
        return tree

    def observe(self, b: int, row: Row, path: Sequence[int], chosen: Sequence[int], features_TF: Any) -> None:
        self.kept.setdefault(row.params.seed, []).append(len(path))
        self.seen["another than the first child"] += list(path) != row.tree.first_path[: len(path)]
        self.seen["nothing kept"] += not path
        self.seen["rejected behind what is kept"] += row.tree.parents.count(path[-1]) if path else 0


def make_llm(seed: int, max_batch: int = 1) -> LLM:
    """With a prompt lookup that is another drafter, where one is put in its place."""
    target = FakeTarget(
        seed=seed, tap=False, eos_bias=-0.5, max_batch=max_batch, max_length=MAX_LENGTH + 2 * MAX_PENDING
    )
    return LLM(
        target,
        None,
        BundleTokenizer(FakeTokenizer()),
        eos_token_ids=[EOS],
        tiers={},
        max_length=MAX_LENGTH,
        prefill_chunk=4,
    )


def random_params(rng: random.Random, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.2]),
        top_k=rng.choice([0, 0, 4]),
        top_p=rng.choice([1.0, 0.8]),
        seed=seed,
        max_tokens=rng.randint(1, 24),
        min_tokens=rng.choice([0, 0, 1]),
        stop=rng.choice(STOPS),
        ignore_eos=rng.random() < 0.3,
    )


def plain_texts(llm: LLM, requests: Sequence[Request]) -> dict[int, Sequence[int]]:
    """What plain decoding says if only the cache ends it, by the requests' seeds."""
    longer = [replace(r.params, max_tokens=MAX_LENGTH - len(r.prompt_ids), stop=(), ignore_eos=True) for r in requests]
    asked = [Request(r.prompt_ids, "autoregressive", params) for r, params in zip(requests, longer, strict=True)]
    return {r.params.seed: output.token_ids for r, output in zip(requests, llm.generate(asked), strict=True)}


def compare(seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Output], list[Output], RandomTrees]:
    """What plain decoding says of random requests, and what random trees do."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 14))) for _ in range(5)]
    asked = [
        Request(
            rng.choice(prompts),
            "prompt-lookup",
            random_params(rng, 100 * seed + i),
            policy=verify_all(1 + (9 * seed + i) % MAX_PENDING, drafter="prompt-lookup", children=(2,)),
        )
        for i in range(9)
    ]
    alone = make_llm(seed)
    plain = [alone.generate([Request(request.prompt_ids, "autoregressive", request.params)])[0] for request in asked]
    drafter = RandomTrees(plain_texts(make_llm(seed, len(asked)), asked), rng)
    llm = make_llm(seed, max_batch=1 + 2 * (seed % 2))
    with monkeypatch.context() as patched:
        patched.setattr(module, "drafters", lambda *_: Drafters({"prompt-lookup": drafter}))
        found = llm.generate(asked, prompt_cache=llm.prompt_cache(1 << 20))
    for request, output in zip(asked, found, strict=True):
        *earlier, last = drafter.kept.get(request.params.seed, [0])
        before = 1 + sum(earlier) + len(earlier)
        if output.counters.emitted - before < last:  # there were right nodes behind its end
            drafter.seen[f"{how_it_ended(output, request.params)} in a branch"] += 1
        drafter.seen["from the prompt cache"] += output.counters.cached_tokens > 0
    return plain, found, drafter


def how_it_ended(output: Output, params: SamplingParams) -> str:
    if output.finish_reason == "length":
        return "max_tokens"
    return "end of sequence" if output.token_ids[-1] == EOS and not params.ignore_eos else "stop string"


def test_random_trees_give_the_text_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and beside others, greedy and sampled, of 1 to 64 nodes; outputs end in the middle of a branch that is
    right beyond their end."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        plain, found, drafter = compare(seed, monkeypatch)
        for output, expected in zip(found, plain, strict=True):
            counters = output.counters
            assert text_of(output) == text_of(expected)
            assert counters.drafted == counters.accepted + counters.rolled_back
            assert counters.target_tokens == counters.drafted + counters.target_passes
        seen += drafter.seen
    for what in ("another than the first child", "nothing kept", "rejected behind what is kept"):
        assert seen[what] >= 20, what
    for what in ("max_tokens in a branch", "end of sequence in a branch", "stop string in a branch"):
        assert seen[what] >= 5, what
    assert seen["from the prompt cache"] > 20
    assert sum(what.endswith(" nodes") for what in seen) > 60  # sizes; an output of one token has none
