"""Where the bundled pico models and the bundled samples lie, and what the models were trained on.

Names and paths only: nothing here loads a model, reads a sample or needs torch. `llmcomp.pico.train` made the suite's
weights, `llmcomp.pico.vocabularies` those of other vocabularies, `llmcomp.pico.samples` the samples.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from pathlib import Path

SUITE_NAMES: tuple[str, ...] = ("pico-13k", "pico-28k", "pico-77k", "pico-224k", "pico-595k")
STEPS: tuple[int, ...] = (128, 256, 512, 1024, 2048)

# One size with other vocabularies, at the last step: entries by name (256: plain bytes), the suite's own among them.
VOCABULARIES: dict[str, int] = {
    "pico-224k-bytes": 256,
    "pico-224k-bpe512": 512,
    "pico-224k": 1024,
    "pico-224k-bpe2048": 2048,
}

# Every bundled model and its checkpoints.
MODEL_STEPS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(SUITE_NAMES, STEPS),
    **{name: STEPS[-1:] for name in VOCABULARIES if name not in SUITE_NAMES},
}

CHUNK_BYTES = 2048
HASH_BYTES = 8

_FOLDER = Path(__file__).resolve().parent
_SUITE = _FOLDER / "suite"
_SAMPLES = {"text": "text.txt", "image": "image.png", "speech": "speech.flac"}


def suite_root() -> Path:
    """The folder of all checkpoints, tokenizers and their descriptions."""
    return _SUITE


def suite_folder(name: str, step: int) -> Path:
    """The folder of one checkpoint (`config.json`, `model.safetensors`); KeyError for an unknown name or step."""
    if name not in MODEL_STEPS:
        raise KeyError(f"no pico model is named {name!r}; there are {', '.join(MODEL_STEPS)}")
    if step not in MODEL_STEPS[name]:
        raise KeyError(f"{name} has no step {step}; there are {', '.join(map(str, MODEL_STEPS[name]))}")
    return _SUITE / name / f"step{step}"


def tokenizer_path() -> Path:
    """The `tokenizer.json` that all models of the suite share: byte-level BPE, 1,024 entries."""
    return _SUITE / "tokenizer.json"


def tokenizer_path_of(name: str) -> Path | None:
    """The `tokenizer.json` of a bundled model; None where a token is a byte."""
    if name in SUITE_NAMES:
        return tokenizer_path()
    return _SUITE / name / "tokenizer.json" if VOCABULARIES[name] > 256 else None


def sample_path(modality: str) -> Path:
    """The bundled sample of "text" (UTF-8), "image" (8-bit grey PNG) or "speech" (FLAC, 16 kHz, 16 bit, mono)."""
    if modality not in _SAMPLES:
        raise KeyError(f"no sample of {modality!r}; there are {', '.join(_SAMPLES)}")
    return _FOLDER / "samples" / _SAMPLES[modality]


def chunk_hash(chunk: bytes) -> bytes:
    """What `training_chunks.bin` keeps of a chunk: the first 8 bytes of its SHA-256."""
    return hashlib.sha256(chunk).digest()[:HASH_BYTES]


def training_source(chunk: bytes) -> str | None:
    """The name of the file that held `chunk` when the suite was trained, or None if no training chunk was equal to it.

    Only whole chunks of 2,048 bytes on the grid of their file (for speech: of the utterance's PCM) are known.
    Two different chunks share an 8-byte hash with probability 2^-64.
    """
    index = _training_index().get(chunk_hash(chunk))
    if index is None:
        return None
    firsts, names = _training_sources()
    return names[bisect.bisect_right(firsts, index) - 1]


@functools.cache
def _training_index() -> dict[bytes, int]:
    hashes = (_SUITE / "training_chunks.bin").read_bytes()
    return {hashes[at : at + HASH_BYTES]: at // HASH_BYTES for at in range(0, len(hashes), HASH_BYTES)}


@functools.cache
def _training_sources() -> tuple[list[int], list[str]]:
    sources = json.loads((_SUITE / "suite.json").read_text("utf-8"))["training_chunks"]
    return [source["first"] for source in sources], [source["name"] for source in sources]
