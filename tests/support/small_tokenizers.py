"""Small tokenizers of each kind that is in use, as the content of a tokenizer.json: trained here, by the library."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

CORPUS = [
    "The naïve café costs 12 € today; der Zug fährt über die Brücke für Größe.\n",
    "for i in range(10):\n        print(i)   # été, señor, ação, mañana, þæt, ÿ\n",
    "Привет, мир! 你好 世界。 The other theory then gathers there, and another one.\n",
] * 3
SPACE = "\u2581"
BYTE_TEXTS = [f"<0x{byte:02X}>" for byte in range(256)]
PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": SPACE}
REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def added(token: int, content: str, *, special: bool) -> dict[str, Any]:
    return {"id": token, "content": content, "special": special, **FLAGS}


def metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def of_characters() -> dict[str, Any]:
    """Llama 2's kind: <unk>, <s>, </s>, the bytes, merges of characters; a space before text by its normaliser."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>"]
    # "ÿ" and the Chinese characters have no entry: they are coded as bytes.
    alphabet = sorted(
        {SPACE} | {c for line in CORPUS for c in line if c.isprintable() and c != " " and ord(c) < 0x2E80} - {"ÿ"}
    )
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=[*special, *BYTE_TEXTS],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in CORPUS], trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    found["added_tokens"] = [added(number, name, special=True) for number, name in enumerate(special)]
    found["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    found["pre_tokenizer"] = None
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    found["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return found


def variants() -> dict[str, dict[str, Any]]:
    """The spellings of byte fallback that published models have."""
    legacy = of_characters()
    plain = legacy | {"normalizer": None}
    n = len(legacy["model"]["vocab"])
    gemma = plain | {
        "normalizer": REPLACE,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "added_tokens": [
            *legacy["added_tokens"],
            added(n, "\n\n", special=False),
            added(n + 1, "<h1>", special=False),
            added(n + 2, SPACE * 2, special=False),
            added(n + 3, "<mask>", special=True),
        ],
    }
    return {
        "legacy": legacy,
        "first": plain | {"pre_tokenizer": metaspace("first", split=False)},
        "split": plain | {"pre_tokenizer": metaspace("always", split=True)},
        "never": plain | {"pre_tokenizer": metaspace("never", split=False)},
        "gemma": gemma,
        "plain spaces": plain,
        "NFKC": legacy | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, PREPEND, REPLACE]}},
    }


def as_json(description: dict[str, Any]) -> bytes:
    return json.dumps(description).encode()
