"""Which beginnings of prompts are held, and which have to go."""

from __future__ import annotations

import ast
import itertools
import random
from pathlib import Path

import pytest

from ssv.runtime.decode import prompt_cache as module
from ssv.runtime.decode.prompt_cache import PromptCache


def filled(*prompts: list[int], block_tokens: int = 2, max_bytes: int = 1000, drafts: bool = False) -> PromptCache[str]:
    """With every whole block of the prompts that is not held yet, of one byte each, named by the tokens up to its
    end."""
    cache: PromptCache[str] = PromptCache(block_tokens, max_bytes)
    for prompt in prompts:
        keep(cache, prompt, drafts)
    return cache


def keep(cache: PromptCache[str], prompt: list[int], drafts: bool = False, num_bytes: int = 1) -> None:
    cache.find(prompt, drafts)
    for stop in range(cache.block_tokens, len(prompt) + 1, cache.block_tokens):
        if cache.wants(prompt[:stop], drafts):
            cache.put(prompt[:stop], drafts, named(prompt[:stop], drafts), num_bytes)


def named(tokens: list[int], drafts: bool = False) -> str:
    return f"{tokens} {drafts}"


def is_held(cache: PromptCache[str], tokens: list[int], drafts: bool = False) -> bool:
    """Whether a block and those before it are; without using them."""
    return not any(
        cache.wants(tokens[:stop], drafts) for stop in range(cache.block_tokens, len(tokens) + 1, cache.block_tokens)
    )


# --- what is found --------------------------------------------------------------------------------------------------


def test_finds_the_longest_beginning_that_is_held() -> None:
    cache = filled([1, 2, 3, 4, 5, 6])
    blocks = [named([1, 2]), named([1, 2, 3, 4]), named([1, 2, 3, 4, 5, 6])]
    assert cache.find([1, 2, 3, 4, 5, 6, 7, 8], False) == blocks
    assert cache.find([1, 2, 3, 4, 5, 6], False) == blocks
    assert cache.find([1, 2, 3, 4, 9, 6], False) == blocks[:2]
    assert cache.find([1, 9, 3, 4, 5, 6], False) == []


@pytest.mark.parametrize(("length", "found"), [(0, 0), (1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (7, 2), (8, 2)])
def test_only_whole_blocks_are_found(length: int, found: int) -> None:
    tokens = list(range(8))
    assert len(filled(tokens, block_tokens=3).find(tokens[:length], False)) == found


def test_a_block_is_found_only_behind_those_that_it_was_made_behind() -> None:
    cache = filled([1, 2, 3, 4], [5, 6])
    assert cache.find([5, 6, 3, 4], False) == [named([5, 6])]
    assert cache.find([3, 4], False) == []
    assert cache.find([3, 4, 1, 2], False) == []


def test_blocks_with_and_without_the_draft_are_kept_apart() -> None:
    cache = filled([1, 2, 3, 4])
    assert cache.find([1, 2, 3, 4], True) == []
    assert cache.wants([1, 2], True)
    keep(cache, [1, 2], drafts=True)
    assert cache.find([1, 2, 3, 4], True) == [named([1, 2], True)]
    assert cache.find([1, 2, 3, 4], False) == [named([1, 2]), named([1, 2, 3, 4])]


def test_tokens_that_read_alike_have_names_of_their_own() -> None:
    cache = filled([1, 23], [12, 3], [123, 0], [1, 2, 3, 0])
    for prompt in ([1, 23], [12, 3], [123, 0], [1, 2]):
        assert cache.find(prompt, False) == [named(prompt)]
    assert cache.stats.blocks == 5


def test_different_tokens_never_share_a_name() -> None:
    """Numbers whose bytes, digits or sums are those of others."""
    cache: PromptCache[str] = PromptCache(2, 10**6)
    tokens = [0, 1, 10, 11, 256, 257, 2**16, 2**31, 2**32]
    prompts = [list(prompt) for length in (2, 4) for prompt in itertools.product(tokens[: 11 - length], repeat=length)]
    for prompt, drafts in itertools.product(prompts, (False, True)):
        assert cache.wants(prompt, drafts)
        cache.put(prompt, drafts, named(prompt, drafts), 1)
    for prompt, drafts in itertools.product(prompts, (False, True)):
        assert cache.find(prompt, drafts)[-1] == named(prompt, drafts)
    assert cache.stats.blocks == 2 * len(prompts)


def test_names_do_not_depend_on_how_tokens_are_given() -> None:
    assert filled([1, 2, 3, 4]).find((1, 2, 3, 4), False) == [named([1, 2]), named([1, 2, 3, 4])]


def test_wants_what_is_not_held_behind_what_is() -> None:
    cache: PromptCache[str] = PromptCache(2, 100)
    assert cache.wants([1, 2], False)
    assert not cache.wants([1, 2, 3, 4], False)
    cache.put([1, 2], False, "a", 1)
    assert not cache.wants([1, 2], False)
    assert cache.wants([1, 2, 3, 4], False)
    assert cache.wants([5, 6], False)


# --- what goes ------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first() -> None:
    cache = filled([1, 1], [2, 2], [3, 3], max_bytes=3)
    cache.find([1, 1], False)
    keep(cache, [4, 4])
    assert [is_held(cache, [n, n]) for n in (1, 2, 3, 4)] == [True, False, True, True]
    keep(cache, [5, 5])
    assert [is_held(cache, [n, n]) for n in (1, 2, 3, 4, 5)] == [True, False, False, True, True]


def test_asking_what_is_wanted_is_no_use() -> None:
    cache = filled([1, 1], [2, 2], max_bytes=2)
    cache.wants([1, 1], False)
    keep(cache, [3, 3])
    assert not is_held(cache, [1, 1])


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    cache = filled(prompt, max_bytes=3)
    for other, left in ((7, 2), (8, 1), (9, 0)):
        keep(cache, [other, other])
        assert [is_held(cache, prompt[:stop]) for stop in (2, 4, 6)] == [left > 0, left > 1, False]


def test_a_beginning_stays_as_long_as_one_of_its_ends_is_used() -> None:
    """Only the ends are asked for and kept anew; the beginning that they share must not go before them."""
    cache = filled([1, 2, 3, 4], [1, 2, 5, 6], max_bytes=3)
    keep(cache, [1, 2, 7, 8])
    assert not is_held(cache, [1, 2, 3, 4])
    assert is_held(cache, [1, 2, 5, 6]) and is_held(cache, [1, 2, 7, 8])


def test_keeping_a_block_uses_those_before_it() -> None:
    cache = filled([1, 2], [3, 4], max_bytes=3)
    cache.put([1, 2, 5, 6], False, named([1, 2, 5, 6]), 1)
    keep(cache, [7, 8])
    assert is_held(cache, [1, 2, 5, 6])
    assert not is_held(cache, [3, 4])


def test_a_prompt_longer_than_all_room_keeps_its_beginning() -> None:
    cache = filled([1, 2, 3, 4, 5, 6, 7, 8], max_bytes=2)
    assert len(cache.find([1, 2, 3, 4, 5, 6, 7, 8], False)) == 2
    assert cache.stats.num_bytes == 2


def test_a_large_block_takes_the_room_of_several() -> None:
    cache = filled([1, 1], [2, 2], [3, 3], max_bytes=3)
    cache.put([4, 4], False, "large", 2)
    assert [is_held(cache, [n, n]) for n in (1, 2, 3, 4)] == [False, False, True, True]
    assert (cache.stats.num_bytes, cache.stats.evicted) == (3, 2)


def test_a_block_larger_than_all_room_is_left_out() -> None:
    cache = filled([1, 2], [3, 4], max_bytes=10)
    cache.put([1, 2, 5, 6], False, "too large", 11)
    assert cache.wants([1, 2, 5, 6], False)
    assert is_held(cache, [1, 2]) and is_held(cache, [3, 4])
    assert (cache.stats.num_bytes, cache.stats.evicted) == (2, 0)
    cache.put([1, 2, 5, 6], False, "just fits", 8)
    assert cache.find([1, 2, 5, 6], False)[1] == "just fits"
    cache.put([7, 8], False, "alone", 10)
    assert cache.find([7, 8], False) == ["alone"]
    assert (cache.stats.blocks, cache.stats.num_bytes) == (1, 10)


# --- counting -------------------------------------------------------------------------------------------------------


def test_stats() -> None:
    cache: PromptCache[str] = PromptCache(2, 10)
    assert cache.find([1, 2, 3, 4, 5], False) == []
    cache.put([1, 2], False, "a", 4)
    cache.put([1, 2, 3, 4], False, "b", 5)
    assert cache.find([1, 2, 9, 9, 9, 9], False) == ["a"]
    stats = cache.stats
    assert (stats.blocks, stats.num_bytes, stats.hits, stats.misses, stats.evicted) == (2, 9, 1, 4, 0)
    cache.put([6, 7], False, "c", 6)
    stats = cache.stats
    assert (stats.blocks, stats.num_bytes, stats.hits, stats.misses, stats.evicted) == (2, 10, 1, 4, 1)


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_plain_model(seed: int) -> None:
    """Of what is held, the block goes that was used longest ago; among those used together, the one furthest from the
    beginning."""
    rng = random.Random(seed)
    block_tokens, max_bytes = rng.randint(1, 3), rng.randint(5, 40)
    cache: PromptCache[str] = PromptCache(block_tokens, max_bytes)
    held: dict[tuple[bool, tuple[int, ...]], tuple[int, int]] = {}  # last use and size
    hits = misses = evicted = 0

    def beginnings(prompt: list[int], drafts: bool) -> list[tuple[bool, tuple[int, ...]]]:
        return [(drafts, tuple(prompt[:stop])) for stop in range(block_tokens, len(prompt) + 1, block_tokens)]

    for now in range(300):
        prompt, drafts = [rng.randint(0, 1) for _ in range(rng.randint(0, 5 * block_tokens))], rng.random() < 0.3
        names = beginnings(prompt, drafts)
        count = next((i for i, name in enumerate(names) if name not in held), len(names))
        if rng.random() < 0.4:
            assert cache.find(prompt, drafts) == [named(list(tokens), drafts) for _, tokens in names[:count]]
            hits, misses = hits + count, misses + len(names) - count
            used = names[:count]
        else:
            wanted = [cache.wants(list(tokens), drafts) for _, tokens in names]
            assert wanted == [i == count for i in range(len(names))]
            if count == len(names):
                continue
            tokens, size, used = list(names[count][1]), rng.randint(1, max_bytes // 3 + 3), names[: count + 1]
            cache.put(tokens, drafts, named(tokens, drafts), size)
            if size > max_bytes:
                continue
            held[names[count]] = (now, size)
        for name in used:
            held[name] = (now, held[name][1])
        while sum(size for _, size in held.values()) > max_bytes:
            del held[min(held, key=lambda name: (held[name][0], -len(name[1])))]
            evicted += 1
        assert all((name[0], name[1][:-block_tokens]) in held for name in held if len(name[1]) > block_tokens)
        num_bytes = sum(size for _, size in held.values())
        assert num_bytes <= max_bytes
        stats = cache.stats
        assert (stats.blocks, stats.num_bytes) == (len(held), num_bytes)
        assert (stats.hits, stats.misses, stats.evicted) == (hits, misses, evicted)
    assert hits > 10 and evicted > 10


def test_imports_no_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(name.split(".")[0] in ("torch", "ssv") for name in names)
