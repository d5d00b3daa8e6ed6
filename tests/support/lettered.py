"""A tokenizer of a few letters and signs, for outputs of a given form over a fake target."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from ssv.runtime.tokenizer import BundleTokenizer
from ssv.runtime.tokenizer_files import FileTokenizer

END = "<end>"
SIGNS = tuple('{}[]":, ab01c')
MERGES = [('"', ":"), ("{", '"'), (",", "\u0120"), ('":', "\u0120"), ("a", "b")]


def lettered() -> BundleTokenizer:
    """Token 0 ends an output; the others are single signs and some that are joined."""
    signs = [sign.replace(" ", "\u0120") for sign in SIGNS]
    texts = [*signs, *("".join(pair) for pair in MERGES)]
    backend = Tokenizer(BPE({END: 0, **{text: i + 1 for i, text in enumerate(texts)}}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return BundleTokenizer(FileTokenizer(backend, {"eos_token": END}, None), [0])


NUM_TOKENS = 1 + len(SIGNS) + len(MERGES)
