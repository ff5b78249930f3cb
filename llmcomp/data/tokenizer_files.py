"""The files of a folder that make a tokenizer, in every form that transformers reads: tokenizer.json; vocab.json with
merges.txt; tokenizer.model. All become the content of a tokenizer.json; what that means is not decided here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmcomp.checked_json import CONFIG_BYTES_MAX, TOKENIZER_BYTES_MAX, read_bytes, read_object
from llmcomp.data import sentencepiece_model
from llmcomp.data.start_token import StartHints
from llmcomp.errors import Error, reason

# What may make a tokenizer besides tokenizer.json, and what is read beside it.
OTHER_FORMS = ("vocab.json", "merges.txt", "tokenizer.model")
SETTINGS = "tokenizer_config.json"
# Whose vocab.json and merges.txt are GPT-2's scheme; other classes have other pre-tokenisers, which no file states.
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_GPT2_MODELS = ("gpt2", "gpt_neo", "gptj")


class TokenizerFiles(NamedTuple):
    """The content of a tokenizer.json, where it is from, and what the files beside it say about the start token."""

    content: bytes
    origin: str
    start_hints: StartHints


def find_tokenizer_file(folder: str | os.PathLike[str]) -> Path:
    """The file of `folder` that the tokenizer is read from; its tokenizer.json, which is not there, where none is."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        if all((folder / name).is_file() for name in OTHER_FORMS[:2]):
            return folder / OTHER_FORMS[0]
        if (folder / OTHER_FORMS[2]).is_file():
            return folder / OTHER_FORMS[2]
    return folder / "tokenizer.json"


def read_tokenizer_files(path: str | os.PathLike[str]) -> TokenizerFiles:
    """The tokenizer in a file that `find_tokenizer_file` may give, or in any other file of tokenizer.json's form.

    `Error` for files that cannot be read, and where a library that is needed is not installed: transformers reads the
    vocab.json of other classes than GPT-2's and, with tiktoken, the ranks in a tokenizer.model that is not
    SentencePiece's.
    """
    path = Path(path)
    settings, config = (_optional(path.parent / name) for name in (SETTINGS, "config.json"))
    if path.name == OTHER_FORMS[0]:
        is_gpt2 = settings.get("tokenizer_class") in _GPT2_CLASSES
        is_gpt2 |= "tokenizer_class" not in settings and config.get("model_type") in _GPT2_MODELS
        content = _gpt2_json(path.parent, settings) if is_gpt2 else _converted(path)
    elif path.name == OTHER_FORMS[2]:
        content = read_bytes(path, TOKENIZER_BYTES_MAX)
        is_known = sentencepiece_model.is_sentencepiece(content)
        content = sentencepiece_model.tokenizer_json(content, str(path)) if is_known else _converted(path)
    else:
        content = read_bytes(path, TOKENIZER_BYTES_MAX)
    return TokenizerFiles(content, str(path), _start_hints(settings, config))


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, CONFIG_BYTES_MAX) if path.is_file() else {}


def _start_hints(settings: Mapping[str, Any], config: Mapping[str, Any]) -> StartHints:
    return StartHints(
        _content(settings.get("bos_token")),
        _content(settings.get("eos_token")),
        _id(config.get("bos_token_id")),
        _id(config.get("eos_token_id")),
    )


def _id(token: Any) -> int | None:
    """A token's id, which is itself or the first of a list."""
    token = token[0] if isinstance(token, list) and token else token
    return token if type(token) is int else None


def _content(token: Any) -> str | None:
    """The text of a token, which is itself or stands in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _gpt2_json(folder: Path, settings: Mapping[str, Any]) -> bytes:
    """vocab.json and merges.txt as a tokenizer.json: byte-level BPE with GPT-2's pre-tokeniser."""
    vocab = read_object(folder / OTHER_FORMS[0], TOKENIZER_BYTES_MAX)
    try:
        lines = read_bytes(folder / OTHER_FORMS[1], TOKENIZER_BYTES_MAX).decode().split("\n")
    except UnicodeDecodeError as error:
        raise Error(f"{folder / OTHER_FORMS[1]}: expected UTF-8: {error}") from None
    merges = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {"<|endoftext|>", *(_content(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad"))}
    special = sorted((vocab[name], name) for name in names if name in vocab)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description = {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": name, **flags} for token, name in special],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return json.dumps(description).encode()


def _converted(path: Path) -> bytes:
    """Through transformers."""
    try:
        from llmcomp.data import tokenizer_conversion
    except ImportError as error:
        raise Error(
            f"{path}: this form of a tokenizer is read by transformers, which cannot be imported ({error}): "
            'pip install "llmcomp-exact[torch]" tiktoken, or put a tokenizer.json beside it'
        ) from None
    try:
        return tokenizer_conversion.tokenizer_json(path.parent)
    except Exception as error:  # whatever a library raises for a file, and ImportError for one that is missing
        raise Error(
            f"{path}: transformers cannot read this tokenizer ({reason(error)}): put a tokenizer.json beside it, or "
            "pip install tiktoken if that is missing"
        ) from None
