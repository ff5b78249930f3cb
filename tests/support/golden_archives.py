"""The golden archives: which there are, the model and the tokenizers that they were made with, and their contents.

Nothing here may change once the files are frozen. All arithmetic of the model is exact: integers over eight.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
from tiny_models import TinyModel

from llmcomp.data.tokenizers import Tokenizer

# By form. What writes format 1 is an empty salt; that of format 2 is made of the content.
FORMS = {
    **{"1": "archives", "2": "archives-2", "2 mixed": "archives-2-mixed", "2 stock": "archives-2-stock"},
    "2 mixed or not": "archives-2-chosen",
}
FOLDERS = {form: Path(__file__).parents[1] / "golden" / folder for form, folder in FORMS.items()}
WRITING: dict[str, dict] = {
    "1": {"salt": b""},
    "2": {"mix": False, "stock": False},
    "2 mixed": {"stock": False, "mix": True},
    "2 mixed or not": {"stock": False},
    # What other versions of zlib and liblzma would write is another archive: these are only read.
    "2 stock": {"mix": False},
}

CONTENTS = {
    "empty": b"",
    "byte": b"\xff",
    "text": b"A golden archive decodes forever. " * 8 + "Grüße, ÿ und 世界; <|endoftext|>\n".encode() * 3,
    "binary": bytes(range(256)) + bytes(200) + b"\xc0\xc1\xf5\xff" * 30 + "ÿÿ\u00c0\u00c1".encode() * 9,
    "zeros": bytes(500),
    # What comes again so far away that LZMA alone finds it.
    "far": bytes(byte & 3 for byte in hashlib.shake_256(b"golden").digest(33_000)) * 2,
    # A sample of pico-13k: what it codes alone in less than mixed.
    "drawn": base64.b85decode(
        "VIW~{WFTR5bY*U2VQh0{EFfVZa$$67bZB97VQeQSCs|=2Ze?L(YanTEAY*80WN9E~a%E$5X>M+5Zf787a&K)QVIX&9b9DPI`<DA~{H*+V"
        "_G|vK|Hl7N|6c*k0#g5M|4RS#|JMK3|MCCZ{_^}p`fB+x`gr>SU0ng~0s91K1f~YA1^fin1E2zK0#*S~0i*yj09*h_0P+9b|L6bV|D*rq"
        "|3?4b|HA*r|KI=E|Em9z|2Y6z09*iI0D}Nl0Al~&|Hc3M|DgYp|M&k006G9?015)Q19<{w18xS~24@AM1-"
        "AvH1;Yff0|p`l>IDs|3tS9<3^Nb_69AI{G%WvM{$KuomY9+?0Neo20BHeR0mA@j08RnP0qX#t0O$Y5|7`#z0Pg?t|MUMt0GI%g01W?S|9"
        "1bM|5N{M|E~Wt03j^^3IYN;0%HaC1b+k30?`7;{(%4h0sc4s75tC>ivo`VIRM-M%K)(d&;Q#0R{#hA4*>T6#s3lj6ano4p8=x*76Ik|"
    ),
}
STOCK_CONTENTS = ("far",)
PICO_CONTENTS = ("drawn",)
OPTIONS = {
    "default": {"overlap": 4},
    "overlap0": {"overlap": 0},
    "overlap15": {"overlap": 15, "segment_bytes": 200},
    "segments": {"overlap": 4, "segment_bytes": 16},
    "wide": {"overlap": 4, "segment_bytes": 65537},
    "latin1": {"overlap": 4, "mapping": "latin1", "segment_bytes": 128},
    "shift": {"overlap": 4, "mapping": "shift", "segment_bytes": 128},
    "ascii": {"overlap": 4, "mapping": "ascii", "segment_bytes": 128},
}


def tokenizer_description(lacks: bytes) -> dict:
    """A byte-level BPE of all bytes but those in `lacks`, some pairs, a special token in front."""
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    symbols = {b: chr(b) for b in kept} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in kept)
    }
    letters = "üßÿÀÁõöéèêĀäïĂ"
    pairs = [pair.encode() for pair in ("de", " a", "ch", "iv", "go", "ve", *letters)]
    pairs += [bytes(pair) for pair in itertools.product((0, 255), repeat=2)]
    merges = [[symbols[a], symbols[b]] for a, b in pairs if not {a, b} & set(lacks)]
    texts = ["<|endoftext|>", *(symbols[b] for b in range(256) if b not in lacks), *(a + b for a, b in merges)]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": merges},
    }


TOKENIZERS = {
    "bytes": None,
    "bpe": tokenizer_description(b""),
    "lacking": tokenizer_description(bytes([0xC0, 0xC1, *range(0xF5, 0x100)])),
}


class IntegerModel(TinyModel):
    """TinyModel with logits in eighths: how often a pair occurs in the contents, as a power of two, and the hash."""

    def __init__(self, tokenizer: str):
        description = TOKENIZERS[tokenizer]
        super().__init__(
            context_length=16,
            tokenizer=None if description is None else Tokenizer.from_bytes(json.dumps(description).encode()),
            name=f"integer-{tokenizer}",
            fingerprint=None if tokenizer == "bpe" else "0123456789abcdef" * 4,
            step=None if tokenizer == "bpe" else 7,
        )
        counts = np.zeros((self.n_logits, self.n_logits), np.int64)
        known = CONTENTS["text"] + bytes(100) + CONTENTS["text"][:50]
        tokens = np.frombuffer(known, np.uint8) if description is None else self.tokenizer.encode_bytes(known)
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
        powers = sum((counts >= 1 << k).astype(np.int64) for k in range(8))
        self._by_token = ((16 * powers) / 8).astype(np.float32)
        grid = np.arange(64)[:, None] * 1103 + np.arange(self.n_logits)[None, :] * 40503
        self._by_state = ((grid % 7) / 8).astype(np.float32)


Case = tuple[str, str, str, str]


def cases() -> list[Case]:
    """(form, tokenizer, options, content): a file each."""
    contents = {"1": ("text", "binary"), "2": ("text",), "2 mixed": ("text", "binary")}
    coded = [
        (v, t, o, c)
        for v in contents
        for t in TOKENIZERS
        for o in OPTIONS
        for c in CONTENTS
        if c not in (*STOCK_CONTENTS, *PICO_CONTENTS) and (o == "default" or c in contents[v])
    ]
    stock = [("2 stock", "lacking", o, c) for o in ("wide", "shift", "segments") for c in ("text", "zeros")]
    return coded + stock + [("2 stock", "bytes", "wide", c) for c in STOCK_CONTENTS]


# Archives of the exact engine with bundled weights: (model, step, contents that follow one another, options).
PICO = {
    "pico-short": ("pico-13k", 2048, ("byte", "text"), {"overlap": 128, "segment_bytes": 200}),
    "pico-text": ("pico-13k", 2048, ("text",) * 5, {"overlap": 128}),
    "pico-mixed": ("pico-28k", 512, ("text", "binary", "zeros", "text"), {"overlap": 100, "segment_bytes": 1000}),
    "pico-drawn": ("pico-13k", 2048, ("text", "drawn"), {"overlap": 32, "segment_bytes": 200}),
}


def pico_cases() -> list[tuple[str, str]]:
    """(form, name of PICO): a file each."""
    return [(form, name) for form in FORMS for name in PICO if (name == "pico-drawn") == (form == "2 mixed or not")]


def pico_content(name: str) -> bytes:
    return b"".join(CONTENTS[content] for content in PICO[name][2])


def path_of(case: Case) -> Path:
    return FOLDERS[case[0]] / f"{'-'.join(case[1:])}.llmc"


def pico_path(form: str, name: str) -> Path:
    return FOLDERS[form] / f"{name}.llmc"
