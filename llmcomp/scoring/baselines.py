"""What compressors without a language model make of the same chunks, as rows of the results table, and models that
know nothing.

Every output counted here was decoded again and compared. No coder of llmcomp's own. The random models at the end are
scored as any model is, by `llmcomp.score` or a sweep; their rows have no `params`, which marks a baseline.
A row's chunk is its number in the data set; `results.STREAM_CHUNK` marks all chunks as one stream: one behind the
other for the byte compressors and FLAC, one above the other as pictures of at most 511 chunks (WebP's limit is 16,383
rows) for PNG and WebP.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from safetensors.numpy import save_file

from llmcomp.data.datasets import Dataset
from llmcomp.data.images import IMAGE_COLUMNS
from llmcomp.data.speech import SAMPLE_RATE_HZ
from llmcomp.data.tokenizers import ByteTokenizer, Tokenizer
from llmcomp.errors import Error
from llmcomp.models.checkpoint import tensor_shapes
from llmcomp.models.load import load_model
from llmcomp.models.sources import ModelSource
from llmcomp.progress import tqdm
from llmcomp.results import ROW_COLUMNS, STREAM_CHUNK, check_rows
from llmcomp.version import __version__

_PICTURE_BYTES = 511 * 32 * IMAGE_COLUMNS
_SAMPLE_BYTES = 2


@dataclass(frozen=True)
class Baseline:
    """One compressor at one setting; `modality` None: for any bytes. `package` is what must be installed.

    What takes whole rows of pixels or whole samples only gets zeros up to a multiple of `unit_bytes`, which are cut off
    after decoding: the size of a chunk is known beside it, for every row of the table.
    """

    name: str
    modality: str | None
    package: str | None
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]
    unit_bytes: int = 1

    @property
    def is_installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(_MODULES[self.package]) is not None

    @property
    def library(self) -> str:
        """Name and version of the library that does the work."""
        if self.package is not None:
            return f"{self.package} {metadata.version(self.package)}"
        return f"zlib {zlib.ZLIB_RUNTIME_VERSION}" if self.name.startswith("gzip") else "Python's standard library"


_MODULES = {"zstandard": "zstandard", "brotli": "brotli", "pillow": "PIL", "soundfile": "soundfile"}


def _xz_compress(data: bytes) -> bytes:
    # The preset's dictionary of 64 MB would be set up anew for every chunk; one that holds all the data is as good.
    dict_size = min(64 << 20, max(4096, len(data)))
    return lzma.compress(
        data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dict_size}]
    )


def _zstd_compress(data: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdCompressor(level=19).compress(data))


def _zstd_decompress(coded: bytes) -> bytes:
    import zstandard

    return bytes(zstandard.ZstdDecompressor().decompress(coded))


def _brotli_compress(data: bytes) -> bytes:
    import brotli

    # The window of 16 MB is the largest that every brotli decoder takes.
    return bytes(brotli.compress(data, quality=11, lgwin=24))


def _brotli_decompress(coded: bytes) -> bytes:
    import brotli

    return bytes(brotli.decompress(coded))


def _save_picture(data: bytes, **how: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("L", (IMAGE_COLUMNS, len(data) // IMAGE_COLUMNS), data).save(file, **how)
    return file.getvalue()


def _load_picture(coded: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(coded)) as picture:
        return picture.convert("L").tobytes()


def _png_compress(data: bytes) -> bytes:
    return _save_picture(data, format="PNG", optimize=True)


def _webp_compress(data: bytes) -> bytes:
    return _save_picture(data, format="WEBP", lossless=True, quality=80, method=6)


def _flac_compress(data: bytes) -> bytes:
    import soundfile

    file = io.BytesIO()
    samples = np.frombuffer(data, "<i2").astype(np.int16)
    soundfile.write(file, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return file.getvalue()


def _flac_decompress(coded: bytes) -> bytes:
    import soundfile

    samples, _ = soundfile.read(io.BytesIO(coded), dtype="int16")
    return bytes(samples.astype("<i2").tobytes())


BASELINES: tuple[Baseline, ...] = (
    Baseline("gzip-9", None, None, lambda data: gzip.compress(data, 9, mtime=0), gzip.decompress),
    Baseline("bzip2-9", None, None, lambda data: bz2.compress(data, 9), bz2.decompress),
    Baseline("xz-9e", None, None, _xz_compress, lzma.decompress),
    Baseline("zstd-19", None, "zstandard", _zstd_compress, _zstd_decompress),
    Baseline("brotli-11", None, "brotli", _brotli_compress, _brotli_decompress),
    Baseline("png", "image", "pillow", _png_compress, _load_picture, IMAGE_COLUMNS),
    Baseline("webp", "image", "pillow", _webp_compress, _load_picture, IMAGE_COLUMNS),
    Baseline("flac", "speech", "soundfile", _flac_compress, _flac_decompress, _SAMPLE_BYTES),
)


def list_baselines(modality: str) -> tuple[str, ...]:
    """Names of the installed baselines for data of this modality."""
    return tuple(b.name for b in BASELINES if b.modality in (None, modality) and b.is_installed)


def baseline_rows(
    dataset: Dataset, names: tuple[str, ...] | None = None, stream: bool = True, progress: bool = True
) -> pd.DataFrame:
    """One row a chunk and baseline and, with `stream`, one row a baseline for all chunks as one stream.

    `names`: None for `list_baselines`. Columns are those of `results.ROW_COLUMNS`; params, step and tokens are null,
    protocol is "lossless": each output was decoded to the bytes it came from. `Error` for an unknown baseline, one for
    another modality, one whose package is not installed, or one that does not give the bytes back.
    """
    chosen = [_find(name, dataset.modality) for name in (names or list_baselines(dataset.modality))]
    rows = []
    with tqdm(total=len(chosen) * len(dataset.chunks), desc="baselines", disable=not progress, delay=2) as bar:
        for baseline in chosen:
            for number, chunk in enumerate(dataset.chunks):
                rows.append(_row(baseline, dataset, number, chunk))
                bar.update()
            if stream:
                rows.append(_row(baseline, dataset, STREAM_CHUNK, b"".join(dataset.chunks)))
    return check_rows(pd.DataFrame(rows, columns=list(ROW_COLUMNS)))


def _find(name: str, modality: str) -> Baseline:
    baseline = next((b for b in BASELINES if b.name == name and b.modality in (None, modality)), None)
    if baseline is None:
        names = ", ".join(b.name for b in BASELINES if b.modality in (None, modality))
        raise Error(f"no baseline for {modality} is called {name!r}; there are {names}")
    if not baseline.is_installed:
        raise Error(f"baseline {name} needs the package {baseline.package}; install llmcomp-exact[baselines]")
    return baseline


def _row(baseline: Baseline, dataset: Dataset, number: int, data: bytes) -> dict[str, Any]:
    start = time.perf_counter()
    pieces = [data]
    if baseline.modality == "image":
        pieces = [data[at : at + _PICTURE_BYTES] for at in range(0, len(data), _PICTURE_BYTES)]
    pieces[-1] += bytes(-len(data) % baseline.unit_bytes)
    coded = [baseline.compress(piece) for piece in pieces]
    seconds = time.perf_counter() - start
    if b"".join(map(baseline.decompress, coded))[: len(data)] != data:
        raise Error(f"{baseline.name} does not give back chunk {number} of {dataset.name}")
    coded_bytes = sum(map(len, coded))
    return {
        "model": baseline.name,
        "params": None,
        "step": None,
        "dataset": dataset.name,
        "modality": dataset.modality,
        "protocol": "lossless",
        "mapping": "",
        "chunk": number,
        "bytes_in": len(data),
        "bytes_scored": len(data),
        "tokens": None,
        "ideal_bits": float("nan"),
        "coded_bytes": coded_bytes,
        "side_bits": 0,
        "ratio": coded_bytes / len(data),
        "seconds": seconds,
        "engine": baseline.library,
        "backend": "",
        "device": "cpu",
        "dtype": "",
        "weights_sha256": "",
        "version": __version__,
    }


# Models that know nothing.


class RandomWeights:
    """The model of `source` before its first training step: the same config and tokenizer, weights drawn at random.

    Matrices are normal with the config's `initializer_range` as transformers draws them, here with seed `seed` and
    rounded to float16; biases are 0, gains 1. `engine` and `options` as in `load_model`. The weights are made when the
    model is first used, and then it has what that engine's models have.
    """

    name = "random-weights"
    n_params = None
    step = None

    def __init__(
        self, source: ModelSource, engine: str = "exact", options: Mapping[str, Any] | None = None, seed: int = 0
    ):
        self.source, self.seed = source, seed
        self._how = (engine, dict(options or {}))

    def __reduce__(self) -> tuple[Any, ...]:
        return RandomWeights, (self.source, *self._how, self.seed)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the shape, the seed and the tokenizer, so that a finished cell is known without making any weights."""
        path = self.source.find_tokenizer()
        tokenizer = "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        shapes = list(tensor_shapes(self.source.read_config()))
        return hashlib.sha256(json.dumps([self.name, self.seed, shapes, tokenizer, self._how]).encode()).hexdigest()

    @functools.cached_property
    def _model(self) -> Any:
        config, tokenizer = self.source.read_config(), self.source.find_tokenizer()
        engine, options = self._how
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps({**config, "dtype": "float16"}), "utf-8")
            save_file(_random_tensors(config, self.seed), Path(folder) / "model.safetensors")
            if tokenizer is not None:
                shutil.copyfile(tokenizer, Path(folder) / "tokenizer.json")
            model = load_model(folder, engine=engine, **options)
            _ = model.weights_sha256, model.tokenizer  # while their files are there
            return model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)


def _random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    deviation = np.float32(config.get("initializer_range", 0.02))
    tensors = {}
    for name, shape in tensor_shapes(config):
        if len(shape) == 2:
            tensors[name] = (deviation * rng.standard_normal(shape, np.float32)).astype(np.float16)
        else:
            is_gain = "norm" in name and name.endswith(".weight")
            tensors[name] = np.full(shape, float(is_gain), np.float16)
    return tensors


class RandomDirichlet:
    """The published random baseline: one random distribution over the vocabulary, the same after any context.

    It is drawn once from a symmetric Dirichlet distribution of concentration 0.1 over the tokenizer's own entries (no
    added tokens), by NumPy's RandomState with seed 42; probabilities below 1e-10 are raised to it, then all are scaled
    to sum to 1. An added token has 1 / vocabulary size. Source: the notebook of the published baseline
    (github.com/rokosbasilisk/scaling-laws-for-compression, "October 2025"). The published ratios of text are met chunk
    for chunk; those called ImageNet are of pictures that the notebook generated when it could not load ImageNet's.
    With V entries and no floor a token costs (psi(0.1 V) - psi(0.1)) / ln 2 bits on average over draws, 27.3 for
    Pythia's; the floor takes three of them off.
    """

    name = "random-dirichlet"
    n_params = None
    step = None
    engine = ""
    context_length = 2048

    CONCENTRATION = 0.1
    SEED = 42
    FLOOR = 1e-10

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer):
        self.tokenizer = tokenizer
        self.n_logits = self.vocab_size = tokenizer.vocab_size
        n_own = getattr(tokenizer, "n_own_tokens", tokenizer.vocab_size)
        drawn = np.random.RandomState(self.SEED).dirichlet(np.full(n_own, self.CONCENTRATION))
        drawn = np.maximum(drawn, self.FLOOR)
        self.probabilities = np.full(self.vocab_size, 1 / n_own)
        self.probabilities[:n_own] = drawn / drawn.sum()
        digest = hashlib.sha256(self.probabilities.astype("<f8").tobytes())
        self.weights_sha256 = digest.hexdigest()
        digest.update(tokenizer.fingerprint.encode())
        self.fingerprint = digest.hexdigest()

    def logits(self, tokens: npt.ArrayLike) -> np.ndarray:
        """int [B, T] -> float32 [B, T, vocab_size]: one row, seen B x T times; not to be written to."""
        row = np.log(self.probabilities).astype(np.float32)
        return np.broadcast_to(row, (*np.shape(tokens), self.vocab_size))

    def log2_probabilities(self, tokens: npt.ArrayLike, targets: npt.ArrayLike, lengths: npt.ArrayLike) -> np.ndarray:
        """log2 of the probabilities of `targets`, float64 [B, T]; 0 from `lengths[b]` on."""
        targets = np.asarray(targets)
        is_there = np.arange(targets.shape[1]) < np.asarray(lengths)[:, None]
        return np.where(is_there, np.log2(self.probabilities)[targets], 0.0)

    def session(self, n_streams: int) -> _RandomSession:
        return _RandomSession(self)


class _RandomSession:
    def __init__(self, model: RandomDirichlet):
        self._model = model

    def step(self, tokens: npt.ArrayLike) -> np.ndarray:
        return self._model.logits(tokens)


def random_models(
    source: ModelSource, engine: str = "exact", options: Mapping[str, Any] | None = None
) -> list[RandomWeights | RandomDirichlet]:
    """The random baselines beside a model: of its shape (GPT-NeoX only), with its tokenizer; no weights are read."""
    path = source.find_tokenizer()
    found: list[RandomWeights | RandomDirichlet] = []
    if source.read_config().get("model_type") == "gpt_neox":
        found.append(RandomWeights(source, engine, options))
    return [*found, RandomDirichlet(ByteTokenizer() if path is None else Tokenizer.from_file(path))]
