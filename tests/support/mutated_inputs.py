"""Files as a stranger may have made them: valid ones, changed by chance, and what reads them.

`KINDS` by name; `kind(folder)` writes what it changes into the folder, `kind.read_one(rng)` makes one input and reads
it: an `Error` or an answer is right, anything else is a fault. benchmarks/fuzz_inputs.py makes many, the tests a few.
"""

from __future__ import annotations

import copy
import io
import json
import lzma
import math
import random
import shutil
import struct
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from engine_models import make_config, make_weights
from hub_server import byte_tokenizer_json
from safetensors.numpy import save

from llmcomp import pico, results
from llmcomp.data.datasets import check_manifest, load_dataset, write_manifest
from llmcomp.data.tokenizers import Tokenizer
from llmcomp.errors import Error
from llmcomp.models import lock, suite
from llmcomp.models.checkpoint import stored_weights_sha256
from llmcomp.models.engines.exact import load_exact
from llmcomp.models.sources import find_model

_HUGE = 10**400
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63)),
    *(_HUGE, -_HUGE, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf),
    *("", "a", "a b", " ", "\0", "a\nb", "\x1b[2J", "\ud800", "../x", "/etc/passwd", "é" * 200, "x" * 10_000),
    *([], {}, [None], [0, 2**70], [-1, -2], [1] * 65, [[]], {"": 0}, {"type": "default"}, ["a", "b"]),
]  # fmt: skip
RAW = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000, b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"NaN", b"1e999"]


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to eight changes: flipped bits, stretches overwritten, removed, doubled or put in, an end cut off."""
    bad = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(bad) + 1)
        n_bytes = min(rng.choice((1, 1, 4, 8, 64)), len(bad) - at)
        match rng.randrange(7):
            case 0 | 1 if at < len(bad):
                bad[at] ^= 1 << rng.randrange(8)
            case 2:
                bad[at : at + n_bytes] = rng.choice((rng.randbytes(n_bytes), bytes(n_bytes), b"\xff" * n_bytes))
            case 3:
                del bad[at : at + n_bytes]
            case 4:
                bad[at:at] = bad[at : at + n_bytes]
            case 5:
                bad[at:at] = rng.choice(RAW)[:200]
            case 6 if rng.random() < 0.2:
                del bad[at:]
    return bytes(bad)


def changed_json(content: Any, rng: random.Random) -> bytes:
    """An object with one to three members replaced, removed, renamed or doubled; or its text changed."""
    found = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, key = _somewhere(found, rng)
        if place is None:
            return rng.choice(RAW)
        match rng.randrange(8):
            case 0:
                del place[key]
            case 1 if isinstance(place, dict):
                place[rng.choice([str(v) for v in VALUES[:30]])] = place.pop(key)
            case 2 if isinstance(place, list):
                place.insert(rng.randrange(len(place) + 1), rng.choice(place))
            case 3:
                other, other_key = _somewhere(found, rng)
                place[key] = json.loads(json.dumps(other[other_key]))
            case 4 if type(place[key]) in (int, float) and abs(place[key]) < 2**64:
                place[key] += rng.choice((-1, 1, 0.5, 1000))
            case _:
                place[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(found).encode()
    if rng.random() < 0.15:
        at = text.find(b":", rng.randrange(len(text))) + 1
        text = text[:at] + rng.choice(RAW) + b"," * rng.randrange(2) + text[at + rng.randrange(3) :]
    elif rng.random() < 0.15:
        text = changed_bytes(text, rng)
    elif rng.random() < 0.05 and text.startswith(b"{") and len(text) > 2:
        first = next(iter(found))
        text = text[:-1] + b"," + json.dumps({first: rng.choice(VALUES)}).encode()[1:]
    return text


def _somewhere(found: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random container and a key of it, or (None, None); every level is as likely to be the last."""
    if not isinstance(found, (dict, list)) or not found:
        return None, None
    key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
    if rng.random() < 0.6:
        place, below = _somewhere(found[key], rng)
        if place is not None:
            return place, below
    return found, key


class _Checkpoint:
    """A folder of a tiny checkpoint; what is read of it computes something, where it can be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = make_config(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=16)
        self.config |= {"rotary_pct": 0.5, "architectures": ["GPTNeoXForCausalLM"], "torch_dtype": "float32"}
        self.weights = save(make_weights(self.config))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "model.safetensors").write_bytes(self.weights)

    def compute(self) -> None:
        model = load_exact(self.folder)
        model.logits(np.zeros((1, 2), np.int64))


class Config(_Checkpoint):
    def read_one(self, rng: random.Random) -> None:
        (self.folder / "config.json").write_bytes(changed_json(self.config, rng))
        find_model(self.folder).read_config()
        stored_weights_sha256(self.folder)
        self.compute()


class Header(_Checkpoint):
    def read_one(self, rng: random.Random) -> None:
        n_bytes = int.from_bytes(self.weights[:8], "little")
        header = json.loads(self.weights[8 : 8 + n_bytes])
        text = changed_json(header, rng)
        content = len(text).to_bytes(8, "little") + text + self.weights[8 + n_bytes :]
        # Beside, then renamed: a model that is alive has the file before mapped.
        beside = self.folder / "beside"
        beside.write_bytes(changed_bytes(self.weights, rng) if rng.random() < 0.2 else content)
        beside.replace(self.folder / "model.safetensors")
        self.compute()


class Index(_Checkpoint):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        names = sorted(json.loads(self.weights[8 : 8 + int.from_bytes(self.weights[:8], "little")]))
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
        places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        self.index = {"metadata": {"total_size": len(self.weights)}, "weight_map": places}

    def read_one(self, rng: random.Random) -> None:
        (self.folder / "model.safetensors.index.json").write_bytes(changed_json(self.index, rng))
        self.compute()


class SuiteFile:
    """A file of a suite, with what is made of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "mine.json"
        bundled = Path(suite.__file__).parent / "suites"
        self.others = [json.loads((bundled / f"{name}.json").read_text()) for name in suite.bundled_suites()]

    def read_one(self, rng: random.Random) -> None:
        self.path.write_bytes(changed_json(rng.choice(self.others), rng))
        found = suite.read_suite(self.path)
        for model in found.models:
            for checkpoint in suite.checkpoints(model, ("main", "step1000", "step5-seed1")):
                _ = checkpoint.label, hash(checkpoint.model)


class LockFile:
    """models.lock."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / lock.NAME
        files = {"config.json": lock.LockedFile(500, "ab"), "model.safetensors": lock.LockedFile(10**9, "cd" * 32)}
        revisions = {f"step{step}": lock.LockedRevision("c0ffee", files) for step in (1, 2, 10)}
        lock.write_lock(self.path, lock.Lock({"org/a": revisions, "org/b": revisions}))
        self.content = json.loads(self.path.read_text())

    def read_one(self, rng: random.Random) -> None:
        self.path.write_bytes(changed_json(self.content, rng))
        lock.write_lock(self.path, lock.read_lock(self.path))


class TokenizerFile:
    """A tokenizer that is read must give back all bytes."""

    def __init__(self, folder: Path) -> None:
        self.content = json.loads(byte_tokenizer_json())
        sequence = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}
        sequence["pretokenizers"].append(self.content["pre_tokenizer"])
        self.others = [self.content, {**self.content, "pre_tokenizer": sequence, "normalizer": {"type": "NFC"}}]

    def read_one(self, rng: random.Random) -> None:
        tokenizer = Tokenizer.from_bytes(changed_json(rng.choice(self.others), rng))
        _ = tokenizer.fingerprint, tokenizer.bos_token, tokenizer.vocab_size
        data = b"the rain in spain " + rng.randbytes(8) + b" a b c"
        stand_ins = tokenizer.needs_stand_ins(data)
        tokens = tokenizer.encode_bytes(data, stand_ins)
        if tokenizer.decode_bytes(tokens, stand_ins) != data:
            raise AssertionError("the bytes do not come back")
        tokenizer.text_lengths(tokenizer.encode_text("the rain in spain"))


class Rows:
    """A file of results: its bytes changed, or its columns before it was written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        n, n_bytes = 4, 100
        facts: dict[str, Any] = {name: "" for name, (dtype, _) in results.ROW_COLUMNS.items() if dtype == "string"}
        facts |= {"model": "m", "dataset": "d", "modality": "text", "protocol": "lossless", "mapping": "bytes"}
        facts |= {"params": 10, "step": 1, "bytes_in": n_bytes, "bytes_scored": n_bytes, "tokens": 5, "side_bits": 0}
        facts |= {"ideal_bits": 399.0, "coded_bytes": 50, "ratio": 0.5, "seconds": 0.1, "batch_rows": pd.NA}
        self.rows = results.check_rows(pd.DataFrame({"chunk": range(n)}).assign(**facts))
        results.write_rows(self.path, self.rows, {"llmcomp.cell": "{}"})
        self.content = self.path.read_bytes()
        self.table = pq.read_table(self.path)

    def read_one(self, rng: random.Random) -> None:
        self.path.write_bytes(self._columns(rng) if rng.random() < 0.15 else changed_bytes(self.content, rng))
        results.read_metadata(self.path)
        results.cells(results.read_rows(self.path))

    def _columns(self, rng: random.Random) -> bytes:
        table = self.table
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.randrange(table.num_columns)
            name = table.column_names[i]
            values: list[Any] = [
                *([], [1] * 4, [None] * 4, [2**63 - 1] * 4, [-1] * 4, [0.5] * 4, [math.nan] * 4, [math.inf] * 4),
                *(["x"] * 4, ["\0\n"] * 4, [b"\xff"] * 4, [[1], [], None, [2]], [{"a": 1}] * 4, [True] * 4),
                *([1e300] * 4, ["9" * 400] * 4, [pd.Timestamp(0)] * 4, range(4)),
            ]
            column = pa.array(rng.choice(values) or [None] * 4)
            if rng.random() < 0.2:
                is_plain = not pa.types.is_nested(column.type) and not pa.types.is_null(column.type)
                column = column.dictionary_encode() if is_plain else column
            match rng.randrange(4):
                case 0:
                    table = table.remove_column(i)
                case 1:
                    table = table.append_column(rng.choice((name, "other", "", "\0")), column)
                case _:
                    table = table.set_column(i, name, column)
        kept = dict(self.table.schema.metadata)
        kept[b"pandas"] = rng.choice((b"{}", b"[", b'{"index_columns": [1], "columns": null}', b"[" * 5000, b"\xff"))
        if rng.random() < 0.2:
            kept[b"llmcomp.rows"] = rng.choice((b"1", b"\xff", b"999"))
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(kept), buffer)
        return buffer.getvalue()


class Pickle:
    """Weights as torch pickles them, in either form of the file, or something else that it pickles."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.torch, self.folder = torch, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "pytorch_model.bin"
        state = {"a.weight": torch.ones(4, 3), "b.bias": torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))}
        self.files = [self._pickled(state, is_zip) for is_zip in (True, False)]
        tensor = torch.ones(4, 3)
        self.things: list[Any] = [
            *(None, 1, "text", [tensor], {"state_dict": {"a": tensor}}, {1: tensor}, {"a": None}, {"a": [1]}, {}),
            *({"a": tensor.to_sparse()}, {"a": tensor.double()}, {"a": tensor.bool()}, {"a": tensor.to("meta")}),
            *({"a": torch.ones(1).expand(1 << 40)}, {"a": tensor.to(torch.complex64)}, {"a": tensor.T}, {"\0": tensor}),
            *({"a": tensor.to(torch.float8_e4m3fn)}, {"a": torch.empty(0, 1 << 40)}, {"a": torch.ones(())}, state),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch is about to give these up
            self.things.append({"a": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)})

    def _pickled(self, thing: Any, is_zip: bool) -> bytes:
        buffer = io.BytesIO()
        self.torch.save(thing, buffer, _use_new_zipfile_serialization=is_zip)
        return buffer.getvalue()

    def read_one(self, rng: random.Random) -> None:
        from llmcomp.models.engines import torch_weights as engine

        if rng.random() < 0.1:
            content = self._pickled(rng.choice(self.things), rng.random() < 0.5)
        else:
            content = changed_bytes(rng.choice(self.files), rng)
        beside = self.folder / "beside"
        beside.write_bytes(content)
        beside.replace(self.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rng.choice((engine.read_pickled_weights, engine.read_host_weights))(self.folder)


class DataFiles:
    """Pictures, tars, tables of pictures, sound and manifests."""

    def __init__(self, folder: Path) -> None:
        import soundfile
        from PIL import Image

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.random.default_rng(0).integers(0, 255, (40, 70), np.uint8)
        pictures = {}
        for suffix, form in {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}.items():
            Image.fromarray(grey).save(buffer := io.BytesIO(), form)
            pictures[f"p.{suffix}"] = buffer.getvalue()
        Image.fromarray(grey).convert("RGB").save(buffer := io.BytesIO(), "DDS")
        pictures["dds.png"] = buffer.getvalue()
        self.files = [(f"image={folder}/{name}", name, content) for name, content in pictures.items()]
        for mode in ("", "gz", "bz2", "xz"):
            self.files.append((f"image={folder}/t.tar", "t.tar", self._tar(pictures, mode)))
        table = pa.table({"image": [{"bytes": content, "path": name} for name, content in pictures.items()]})
        pq.write_table(table, buffer := io.BytesIO())
        self.files.append((f"image={folder}/tables", "tables/t.parquet", buffer.getvalue()))
        (folder / "tables").mkdir(exist_ok=True)
        samples = np.random.default_rng(0).integers(-3000, 3000, 3000, np.int16)
        for suffix in ("flac", "wav"):
            soundfile.write(buffer := io.BytesIO(), samples, 16_000, subtype="PCM_16", format=suffix.upper())
            self.files.append((f"speech={folder}/s.{suffix}", f"s.{suffix}", buffer.getvalue()))
        self.sample = load_dataset("text", 2)
        write_manifest(self.sample, folder / "manifest.json")
        self.manifest = json.loads((folder / "manifest.json").read_text())

    @staticmethod
    def _tar(files: dict[str, bytes], mode: str) -> bytes:
        with tarfile.open(fileobj=(buffer := io.BytesIO()), mode=f"w:{mode}") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def read_one(self, rng: random.Random) -> None:
        if rng.random() < 0.1:
            (self.folder / "manifest.json").write_bytes(changed_json(self.manifest, rng))
            check_manifest(self.sample, self.folder / "manifest.json")
            return
        spec, name, content = rng.choice(self.files)
        if content.startswith(lzma_magic := b"\xfd7zXZ") and rng.random() < 0.3:
            content = lzma.compress(changed_bytes(lzma.decompress(content), rng))
            assert content.startswith(lzma_magic)
        else:
            content = changed_bytes(content, rng)
        if name.endswith("flac") and rng.random() < 0.3:
            # The number of samples, 36 bits of the header.
            content = content[:21] + struct.pack(">BI", rng.randrange(256), rng.randrange(1 << 32)) + content[26:]
        (self.folder / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_dataset(spec, 2, 2048, rng.randrange(3), progress=False)


class BundledTokenizer(TokenizerFile):
    """The suite's own: more merges, slower."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.others = [json.loads(pico.tokenizer_path().read_bytes())]


KINDS: dict[str, Callable[[Path], Any]] = {
    "config": Config,
    "header": Header,
    "index": Index,
    "suite": SuiteFile,
    "lock": LockFile,
    "tokenizer": TokenizerFile,
    "bundled-tokenizer": BundledTokenizer,
    "rows": Rows,
    "pickle": Pickle,
    "data": DataFiles,
}


def outcome(kind: Any, seed: str) -> str:
    """ "read" or "refused" of one input; any other end, or a message of more than one line, is an exception."""
    try:
        kind.read_one(random.Random(seed))
    except Error as error:
        text = str(error)
        if not text or len(text) > 2000 or "\n" in text or "\x1b" in text:
            raise AssertionError(f"not a message of one line: {text[:300]!r}") from error
        return "refused"
    return "read"
