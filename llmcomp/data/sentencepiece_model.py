"""A tokenizer.model of SentencePiece (BPE) as the content of a tokenizer.json. No library is needed; nothing else lives
here.

The file is a protocol buffer (google/sentencepiece, src/sentencepiece_model.proto); its fields have numbers alone:

    1 pieces, repeated            1 text, 2 score (float32), 3 type
    2 what it was trained with    3 algorithm
    3 normaliser                  2 map of characters, 3 a space before text, 4 runs of spaces are one
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

from llmcomp.errors import Error

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_ALGORITHMS = {1: "Unigram", 2: "BPE", 3: "WordLevel", 4: "characters"}
_SPACE = "\u2581"


def is_sentencepiece(content: bytes) -> bool:
    """Whether a tokenizer.model begins as SentencePiece's do, with a piece; the ranks of tiktoken are lines of text."""
    return content[:1] == b"\n"


def tokenizer_json(content: bytes, origin: str) -> bytes:
    """The same tokenizer as a tokenizer.json; `Error` for a damaged file and for other algorithms than BPE."""
    try:
        fields = list(_fields(content))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trained, normalizer = (dict(_fields(_last(fields, number))) for number in (2, 3))
        texts = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0 for piece in pieces]
        types = [int(piece.get(3, _NORMAL)) for piece in pieces]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        raise Error(f"{origin}: no SentencePiece model: the file is damaged") from None
    algorithm = trained.get(3, 1)
    if algorithm != 2:
        raise Error(f"{origin}: the tokenizer's model is {_ALGORITHMS.get(algorithm, algorithm)}, expected BPE")
    vocab = {text: token for token, text in enumerate(texts)}
    if len(vocab) != len(texts):
        raise Error(f"{origin}: {len(texts)} pieces have {len(vocab)} texts, expected one each")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    description = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": texts[token], **flags, "special": kind != _USER_DEFINED}
            for token, kind in enumerate(types)
            if kind in {_UNKNOWN, _CONTROL, _USER_DEFINED}
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizer(normalizer)},
        "model": {
            "type": "BPE",
            "unk_token": texts[types.index(_UNKNOWN)] if _UNKNOWN in types else None,
            "fuse_unk": True,
            "byte_fallback": "<0x00>" in vocab,
            "vocab": vocab,
            "merges": _merges(vocab, scores),
        },
    }
    return json.dumps(description).encode()


def _normalizer(found: dict[int, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if found.get(2):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(found[2]).decode()})
    if found.get(4, 1):
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if found.get(3, 1):
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]


def _merges(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """All pairs of pieces that make a piece, those that make one of a higher score first: SentencePiece joins the pair
    whose piece has the highest score."""
    merges = []
    for text, token in vocab.items():
        for at in range(1, len(text)):
            if text[:at] in vocab and text[at:] in vocab:
                merges.append((-scores[token], vocab[text[:at]], vocab[text[at:]], [text[:at], text[at:]]))
    return [merge[-1] for merge in sorted(merges)]


def _last(fields: list[tuple[int, Any]], number: int) -> bytes:
    found: bytes = next((value for key, value in reversed(fields) if key == number), b"")
    return found


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or the bytes of anything longer."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(content, at)
        else:
            length = {1: 8, 5: 4}[kind]
        if at + length > len(content):
            raise ValueError("cut short")
        yield key >> 3, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number is too long")
