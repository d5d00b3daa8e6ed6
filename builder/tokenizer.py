"""A checkpoint's tokenizer: read, checked against the model's embedding, and the tokens that end an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssv.model.chat_template import ChatTemplate
from ssv.model.checkpoint import CheckpointError
from ssv.model.control_tokens import ConversationEncoder, structure_ids
from ssv.support.json_text import read_json_object

_USER, _ASSISTANT, _AGAIN = "<<user>>", "<<assistant>>", "<<again>>"

# GPT-2's split, with every digit by itself before it (llama.cpp's src/llama-vocab.cpp has them as one kind).
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
# Whole words of the vocabulary are taken without asking the merges, and a prompt begins with BOS unless the file says
# otherwise.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
# What llama.cpp does with a file that does not say, as old converters wrote them.
_DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def load_tokenizer(path: Path, folder: Path | None = None) -> Any:
    """Reads the `transformers` tokenizer of a checkpoint.

    It has one chat template, and does not truncate as it did in training.

    Args:
        path: a GGUF file or a folder.
        folder: where the tokenizer lies, if not there.

    Raises:
        CheckpointError: it cannot be read, or lacks a chat template that works.
    """
    source = folder or path
    tokenizer = _read(path, folder)
    tokenizer.chat_template = _one_template(source, tokenizer.chat_template)
    _render(source, tokenizer, [{"role": "user", "content": _USER}], add_generation_prompt=True)
    return tokenizer


def check_same_tokens(path: Path, rows: int, target: Any, target_rows: int) -> None:
    """Checks that a draft's tokens are its target's: what its embedding has beyond them is padding, for which llama.cpp
    writes tokens called [PAD151669] and so on.

    Args:
        path: the draft's checkpoint.
        rows, target_rows: of the embeddings of both.
        target: the target's tokenizer.

    Raises:
        CheckpointError: naming the first token that differs, or that an embedding has no row for.
    """
    mine, theirs = (
        {token: text for text, token in each.get_vocab().items() if text != f"[PAD{token}]"}
        for each in (_read(path), target)
    )
    for token in sorted(mine.keys() | theirs.keys()):
        if mine.get(token) != theirs.get(token):
            said = [repr(vocab[token]) if token in vocab else "no token" for vocab in (mine, theirs)]
            raise CheckpointError(
                f"{path}: token {token} is {said[0]}, the target's is {said[1]}",
                "a standalone draft needs the target's vocabulary: give a smaller model of its family",
            )
    if max(mine, default=0) >= min(rows, target_rows):
        raise CheckpointError(
            f"{path}: the tokenizer has token {max(mine)}, and the embeddings have {rows} and {target_rows} rows",
            "give the files of one model",
        )


def _read(path: Path, folder: Path | None = None) -> Any:
    """Reads a tokenizer, whatever its chat template is."""
    from transformers import AutoTokenizer

    is_gguf = folder is None and path.is_file()
    source = path if is_gguf else (folder or path)
    meta = _gguf_metadata(path) if is_gguf else {}
    _check_gguf_ids(path, meta)
    if not is_gguf:
        _check_json(source)
    try:
        if is_gguf:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the libraries raise nothing narrower for a file of another version
        if not is_gguf:
            _refuse_config(source)
        raise CheckpointError(
            f"{source}: its tokenizer cannot be read ({_one_line(error)})",
            f"use files that transformers {_version('transformers')} and tokenizers {_version('tokenizers')} read",
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{source}: its tokenizer has no tokenizer.json and none can be made of it",
            "convert it with transformers (save_pretrained of a fast tokenizer)",
        )
    if is_gguf:
        if meta.get("tokenizer.ggml.model") == "gpt2":
            _set_split(path, meta, tokenizer)
        tokenizer = _as_it_stands(tokenizer, meta["num_tokens"])
        backend = tokenizer.backend_tokenizer
    # A chat's prompt must not be cut or padded to the lengths of a training run.
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def end_tokens(path: Path, tokenizer: Any) -> list[int]:
    """Ids of all tokens that end an answer, ascending.

    They are the tokenizer's, those of generation_config.json and config.json (a GGUF file's eos, eot and eom), and the
    one that the chat template writes after an assistant's message.

    Raises:
        CheckpointError: there is none, or one of the files says something else than ids.
    """
    found: set[int] = set()
    if path.is_file():
        meta = _gguf_metadata(path)
        names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        found |= {meta[name] for name in names if name in meta}
    else:
        for name in ("generation_config.json", "config.json"):
            found |= _end_tokens_of(path / name)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if (of_turn := _end_of_turn(tokenizer)) is not None:
        found.add(of_turn)
    if not found:
        raise CheckpointError(
            f"{path}: no token ends an answer, neither in the tokenizer nor in generation_config.json, config.json or "
            "the chat template",
            "add eos_token_id to generation_config.json",
        )
    return sorted(found)


def check_vocabulary(path: Path, tokenizer: Any, ends: Iterable[int], rows: int) -> None:
    """Checks that the model has an embedding for whatever the tokenizer can give; more rows than tokens are padding.

    Raises:
        CheckpointError: a token lies beyond the embedding.
    """
    for token in ends:
        if not 0 <= token < rows:
            raise CheckpointError(
                f"{path}: end token {token} ({_text_of(tokenizer, token)}) lies outside the model's embedding of "
                f"{rows} rows",
                "give the files of one model, or enlarge its embedding",
            )
    vocab = tokenizer.get_vocab()
    beyond = sorted((token, text) for text, token in vocab.items() if token >= rows)
    if not beyond:
        return
    text = _conversation(tokenizer) or ""
    written = [(token, name) for token, name in beyond if name in text]
    token, name = (written or beyond)[0]
    where = "the chat template writes token" if written else "the tokenizer has token"
    raise CheckpointError(
        f"{path}: {where} {token} ({name!r}), and the model's embedding has {rows} rows for the tokenizer's "
        f"{max(vocab.values()) + 1}",
        "give the files of one model, or enlarge its embedding",
    )


def text_digest(tokenizer: Any, ends: Iterable[int]) -> str:
    """SHA-256 of all that decides between text and tokens: tokenizer, special tokens, chat template, end tokens."""
    parts = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "ends": list(ends),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that a chat template's turns may begin and end with.

    They are special tokens, other added tokens that are no words, and the tokenizer's end of sequence.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(structure_ids(added) | {tokenizer.eos_token_id} - {None})


def conversation_encoder(tokenizer: Any, ends: Iterable[int] = ()) -> ConversationEncoder:
    """Turns conversations into token ids with a tokenizer of `transformers`.

    Args:
        tokenizer: of `transformers`, with one chat template.
        ends: ids of the end tokens.
    """
    template, named = ChatTemplate(tokenizer.chat_template), tokenizer.special_tokens_map

    def render(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        return template.render(messages, named, add_generation_prompt=add_generation_prompt)

    return ConversationEncoder(tokenizer.backend_tokenizer, render, template.source, ends)


def _check_json(folder: Path) -> None:
    """Reads the files that `transformers` reads beside a tokenizer: it names none of them in what it says of them."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"):
        _read_object(folder / name)


def _refuse_config(folder: Path) -> None:
    """Refuses a config.json that `transformers` does not take; it reads that too when it is asked for a tokenizer.

    Raises:
        CheckpointError: it does not take it.
    """
    from transformers import AutoConfig

    if (path := folder / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(folder)
        except Exception as error:  # it raises nothing narrower
            raise CheckpointError(
                f"{path} is refused by transformers {_version('transformers')} ({_one_line(error)})",
                "correct what it names",
            ) from error


def _read_object(path: Path) -> dict[str, Any]:
    """The settings in a file; none if it is not there."""
    if not path.is_file():
        return {}
    return read_json_object(path, CheckpointError, "mend it or fetch it again")


# --- end tokens -----------------------------------------------------------------------------------------------------


def _end_tokens_of(path: Path) -> set[int]:
    value = _read_object(path).get("eos_token_id")
    if value is None:
        return set()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise CheckpointError(f"{path}: eos_token_id {value!r} must be a token id or a list of token ids")
    return set(ids)


def _end_of_turn(tokenizer: Any) -> int | None:
    """The first added token, special or not, that the chat template writes after an assistant's message."""
    for conversation in (_conversation(tokenizer), _conversation(tokenizer, turns=2)):
        if conversation is None or _ASSISTANT not in conversation:
            continue
        after = conversation.rpartition(_ASSISTANT)[2].partition(_AGAIN)[0]
        control = control_ids(tokenizer)
        return next((t for t in tokenizer.encode(after, add_special_tokens=False) if t in control), None)
    return None


def _conversation(tokenizer: Any, turns: int = 3) -> str | None:
    """A conversation in the chat template; None if the template takes none with so many turns."""
    roles = (("user", _USER), ("assistant", _ASSISTANT), ("user", _AGAIN))[:turns]
    messages = [{"role": role, "content": content} for role, content in roles]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # whatever the template's author lets it raise; that it takes a question has been checked
        return None


# --- templates ------------------------------------------------------------------------------------------------------


def _one_template(path: Path, template: object) -> str:
    """The template for chats, where a tokenizer has several with names."""
    if isinstance(template, Mapping):
        if "default" not in template:
            raise CheckpointError(
                f"{path}: the tokenizer has chat templates named {', '.join(map(str, template))}, and none named "
                "default",
                "give the one for chats that name",
            )
        template = template["default"]
    if not isinstance(template, str) or not template.strip():
        raise CheckpointError(
            f"{path}: the tokenizer lacks a chat template",
            "add chat_template.jinja, or `chat_template` to tokenizer_config.json",
        )
    return template


def _render(path: Path, tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # whatever the template's author lets it raise, or jinja2 with what is not its language
        raise CheckpointError(
            f"{path}: the chat template fails on a user's question ({type(error).__name__}: {_one_line(error)})",
            "use one that takes a conversation beginning with the user",
        ) from error
    if _USER not in text:
        raise CheckpointError(
            f"{path}: the chat template leaves out the user's question", "use one that writes all messages"
        )
    return text


# --- GGUF -----------------------------------------------------------------------------------------------------------


def _gguf_metadata(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata: single values, and the number of tokens as `num_tokens`."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        meta, _ = read_gguf_metadata(str(path), ("tokenizer.ggml.tokens",))
    except Exception as error:  # it reads what the file's counts say, and raises what comes of that
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)}): truncated or not a GGUF file") from error
    tokens = meta.pop("tokenizer.ggml.tokens", ())
    return {**meta, "num_tokens": len(tokens) if isinstance(tokens, list) else 0}


def _check_gguf_ids(path: Path, meta: Mapping[str, Any]) -> None:
    if not meta:
        return
    if not meta["num_tokens"]:
        raise CheckpointError(
            f"{path}: the file has no tokenizer (tokenizer.ggml.tokens)", "convert the model again with it"
        )
    for name, value in meta.items():
        if name.startswith("tokenizer.ggml.") and name.endswith("_token_id") and value >= meta["num_tokens"]:
            raise CheckpointError(
                f"{path}: {name} {value} lies outside the vocabulary of {meta['num_tokens']} tokens",
                "convert the model again",
            )


def _set_split(path: Path, meta: Mapping[str, Any], tokenizer: Any) -> None:
    """Sets how text is split before the merges: as the file's `tokenizer.ggml.pre` says.

    `transformers` takes GPT-2's way for every name that it does not know. Source: `llm_tokenizer_bpe` in llama.cpp.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    pre, backend = meta.get("tokenizer.ggml.pre", "default"), tokenizer.backend_tokenizer
    if pre == "default":
        splits = [Split(Regex(pattern), behavior="isolated") for pattern in _DEFAULT_SPLITS]
        backend.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    elif pre in _DIGITS_THEN_GPT2:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif pre in _GPT2:
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    elif pre not in GGUF_PRE_TOKENIZER_SPLITS:
        known = sorted({"default", *_DIGITS_THEN_GPT2, *_GPT2, *GGUF_PRE_TOKENIZER_SPLITS})
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre {pre!r} is unknown, and with another split the tokens would be others; known: "
            f"{', '.join(known)}",
            "use the model's safetensors folder",
        )
    if pre in _WHOLE_WORDS:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in meta and tokenizer.bos_token_id is not None:
            tokenizer.add_bos_token = True


def _as_it_stands(tokenizer: Any, num_tokens: int) -> Any:
    """The same tokenizer as a class that reads its tokenizer.json as it stands.

    When they are read, the families' own classes make their split again, and add their usual special tokens (GPT-2's
    <|endoftext|>) to vocabularies that have none.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["id"] < num_tokens]
    vocab = data["model"]["vocab"]
    if data["model"].get("unk_token") not in vocab:
        data["model"]["unk_token"] = None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    named = {name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **{name: text for name, text in named.items() if text in vocab},
    )


def _text_of(tokenizer: Any, token: int) -> str:
    text = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    return repr(text) if text is not None else "which the tokenizer does not have"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
