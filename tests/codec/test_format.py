"""FORMAT.md is enough: what it says of binary64, positions, token bytes, stand-ins and fingerprints, computed from its
words (format_oracle.py, archive_oracle.py), is what the C core and the package compute."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import archive_oracle
import engine_models
import format_oracle
import golden_archives
import numpy as np
import oracle
import pytest
import tiny_models

import llmcomp
from llmcomp import pico
from llmcomp.data.tokenizers import ByteTokenizer, Tokenizer
from llmcomp.errors import CorruptArchive, Error

CSRC = Path(__file__).parents[2] / "csrc"

# Section 1.1.

SHIM = """
#include "core/base/ieee.h"
double exp64(double x) { return lmc_exp64(x); }
double log64(double x) { return lmc_log64(x); }
void sincos64(double x, double *sine, double *cosine) { lmc_sincos64(x, sine, cosine); }
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> ctypes.CDLL:
    """The functions of ieee.h behind a shared library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    flags = ["-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library), "-lm"], check=True, timeout=120)
    core = ctypes.CDLL(str(library))
    core.exp64.restype = core.log64.restype = ctypes.c_double
    core.exp64.argtypes = core.log64.argtypes = [ctypes.c_double]
    core.sincos64.argtypes = [ctypes.c_double, *[ctypes.POINTER(ctypes.c_double)] * 2]
    core.sincos64.restype = None
    return core


def assert_same(found: float, expected: float, argument: float) -> None:
    """To the last bit, the sign of zero included."""
    assert struct.pack("<d", found) == struct.pack("<d", expected), (argument.hex(), found.hex(), expected.hex())


def test_exp_as_written(core):
    draw = random.Random(1)
    near_ties = [(n + 0.5) * format_oracle.LN2 for n in (-3, 0, 7)]
    for x in [0.0, -0.0, 1.0, 69.0, 699.0, -699.0, *near_ties, *(draw.uniform(-699, 699) for _ in range(2000))]:
        assert_same(core.exp64(x), format_oracle.exp64(x), x)


def test_ln_as_written(core):
    draw = random.Random(2)
    root = float.fromhex("0x1.6a09e667f3bcdp-1")
    edges = [1.0, 2.0, root, np.nextafter(root, 0), 2 * root, float.fromhex("0x1p-1022"), 1e30, 10000.0, 500000.0]
    for x in [*map(float, edges), *(2.0 ** draw.uniform(-1000, 1000) for _ in range(2000))]:
        assert_same(core.log64(x), oracle.ln64(x), x)


def test_sin_and_cos_as_written(core):
    draw = random.Random(3)
    drawn = [float(np.float32(draw.choice((-1, 1)) * 2.0 ** draw.uniform(-40, 29.9))) for _ in range(2000)]
    sine, cosine = ctypes.c_double(), ctypes.c_double()
    for x in [0.0, 1.0, 2047.0, *(float(np.float32(k * format_oracle.PI_2 / 2)) for k in range(-9, 10)), *drawn]:
        core.sincos64(x, sine, cosine)
        expected = format_oracle.sincos64(x)
        assert_same(sine.value, expected[0], x)
        assert_same(cosine.value, expected[1], x)


# Section 3.3: the end of a stream.


def test_a_decoder_can_tell_whether_an_encoder_ends_here():
    draw = random.Random(4)
    outcomes = []
    for _ in range(20_000):
        rows = [draw.choices((1, 2, 5, 100, 2**29, 2**40), k=draw.randrange(1, 5)) for _ in range(draw.randrange(6))]
        tokens = [draw.randrange(len(row)) for row in rows]
        payload = oracle.encode([(sum(row[:t]), row[t], sum(row)) for row, t in zip(rows, tokens, strict=True)])
        payload = payload[: draw.choice((None, None, -1))] + bytes(
            draw.choices((0, 1, 255, 77), k=draw.choice((0, 0, 1, 2)))
        )
        decoder = oracle.Decoder(payload)
        found = [decoder.next(row) for row in rows]
        again = oracle.encode([(sum(row[:t]), row[t], sum(row)) for row, t in zip(rows, found, strict=True)])
        assert decoder.may_end() == (again == payload), (payload.hex(), rows)
        outcomes.append(decoder.may_end())
    assert 1000 < sum(outcomes) < 19_000


def test_a_truncated_stream_decodes_to_other_tokens():
    """Which is why payloads are kept with a checksum: `llmcomp.decode` cannot tell."""
    logits = np.random.default_rng(8).normal(size=(40, 50)).astype(np.float32)
    tokens = np.random.default_rng(9).integers(0, 50, 40)
    payload = llmcomp.encode(logits, tokens)
    for n in range(len(payload)):
        found = llmcomp.decode(payload[:n], logits)
        assert len(found) == 40 and found.tolist() != tokens.tolist()
        assert llmcomp.encode(logits, found) == payload[:n].rstrip(b"\0")


# Section 4: the logits of a checkpoint.


def widened(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("gpt_neox."): value.astype(np.float32) for name, value in weights.items()}


@pytest.mark.parametrize("engine", ["exact", "exact-int8"])
@pytest.mark.parametrize("variant", [name for name in engine_models.VARIANTS if name != "wide"])
def test_logits_as_written(variant, engine, tmp_path):
    config = {**engine_models.make_config(**engine_models.VARIANTS[variant]), "num_hidden_layers": 1}
    weights = engine_models.make_weights(config, seed=5)
    folder = engine_models.write_folder(tmp_path / "model", config, weights)
    model = llmcomp.load_model(str(folder), engine=engine)
    tokens = np.random.default_rng(6).integers(0, config["vocab_size"], 6)
    written = format_oracle.Neox(config, widened(weights), engine == "exact-int8")
    expected = np.array([written.step(int(token)) for token in tokens])
    engine_models.assert_same_bits(model.logits(tokens[None])[0], expected)


# Section 5.4: payloads that no encoder writes, in archives whose checksums are right.


class Archive(NamedTuple):
    """An archive with short coded segments, and how the package and the second decoder read it."""

    blob: bytes
    content: bytes
    read: list[Callable[[bytes], bytes]]


@pytest.fixture(scope="module")
def archives() -> dict[str, Archive]:
    found = {}
    for tokenizer, options in (("bpe", "segments"), ("lacking", "default"), *itertools.product(["bpe"], SIDES)):
        model = golden_archives.IntegerModel(tokenizer)
        description = golden_archives.TOKENIZERS[tokenizer]
        table, stand_ins = archive_oracle.vocabulary(description)
        # Text shifted by a bit is nothing that the model has seen.
        content = bytes(301) if options == "shift" else golden_archives.CONTENTS["text"][:301]
        blob = llmcomp.compress(content, model, stock=False, **golden_archives.OPTIONS[options])
        readers = [
            functools.partial(llmcomp.decompress, model=model),
            functools.partial(
                archive_oracle.decode, token_bytes=table, stand_ins=stand_ins, start=functools.partial(start, model)
            ),
        ]
        found[f"{tokenizer} {options}"] = Archive(blob, content, readers)
    found["pico"] = pico_archive()
    return found


SIDES = ("latin1", "shift", "ascii")
ARCHIVES = ("bpe segments", "lacking default", *(f"bpe {options}" for options in SIDES), "pico")


def start(model: golden_archives.IntegerModel) -> Callable[[int], np.ndarray]:
    """A window of the model, from `row` alone."""
    state = 0

    def step(token: int) -> np.ndarray:
        nonlocal state
        state, row = model.row(state, token)
        return row

    return step


def pico_archive() -> Archive:
    """One that the exact engine decodes in a chain of steps in C, with the smallest bundled model."""
    model = llmcomp.load_model("pico-13k")
    content = golden_archives.CONTENTS["text"]
    blob = llmcomp.compress(content, model, segment_bytes=200, stock=False)
    table, stand_ins = archive_oracle.vocabulary(json.loads(pico.tokenizer_path().read_bytes()))

    def window() -> Callable[[int], np.ndarray]:
        session = model.session(1)
        return lambda token: session.step([token])[0]

    second = functools.partial(archive_oracle.decode, token_bytes=table, stand_ins=stand_ins, start=window)
    return Archive(blob, content, [functools.partial(llmcomp.decompress, model=model), second])


def assert_refused(archive: Archive, change: Callable[[bytes], bytes], reason: str) -> None:
    blob = archive_oracle.with_payloads(archive.blob, change)
    assert blob != archive.blob
    with pytest.raises(CorruptArchive, match=reason):
        archive.read[0](blob)
    with pytest.raises(archive_oracle.Damaged):
        archive.read[1](blob)


@pytest.mark.parametrize("name", ARCHIVES)
def test_the_encoders_own_payloads_are_read(name, archives):
    archive = archives[name]
    assert archive_oracle.with_payloads(archive.blob, lambda payload: payload) == archive.blob
    assert [read(archive.blob) for read in archive.read] == [archive.content] * 2


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("n_zeros", [1, 2])
def test_a_zero_byte_behind_a_stream_is_refused(name, n_zeros, archives):
    assert_refused(archives[name], lambda payload: payload + bytes(n_zeros), "zero byte|of kind")


@pytest.mark.parametrize("name", ARCHIVES)
def test_another_byte_behind_a_stream_changes_nothing(name, archives):
    """It is what FORMAT.md says of it, neither more nor less: the tokens are the same where the number still lies in
    the last interval."""
    archive = archives[name]
    blob = archive_oracle.with_payloads(archive.blob, lambda payload: payload + b"\x01")
    second, package = [], []
    for read, outcome, error in zip(
        archive.read, (package, second), (CorruptArchive, archive_oracle.Damaged), strict=True
    ):
        try:
            outcome.append(read(blob))
        except error:
            outcome.append(None)
    assert package == second and package[0] in (None, archive.content)


@pytest.mark.parametrize("name", ["bpe shift", "bpe ascii"])
def test_a_side_bit_behind_the_last_is_refused(name, archives):
    """301 bytes: the last segment has 45, so three bits of its sixth side byte stand for nothing."""
    archive = archives[name]
    segments = archive_oracle.read_segments(archive.blob)[1]
    assert [(n, is_stored) for n, is_stored, _ in segments] == [(128, False), (128, False), (45, False)]
    last = segments[-1][2]
    assert_refused(
        archive, lambda payload: payload[:5] + bytes([payload[5] | (payload == last)]) + payload[6:], "side bits"
    )


def test_the_payload_of_one_zero_byte_is_read():
    """Where all symbols but the first are all but impossible the stream has no bytes."""
    model = tiny_models.TinyModel()
    model._by_token[:, 1:] -= 1000
    model._by_state[:] = 0
    content = bytes(40)
    blob = llmcomp.compress(content, model, segment_bytes=16, stock=False)
    payloads = [payload for _, is_stored, payload in archive_oracle.read_segments(blob)[1] if not is_stored]
    table = [bytes([byte]) for byte in range(256)]
    assert payloads == [b"\0"] * 3
    assert llmcomp.decompress(blob, model) == content
    assert archive_oracle.decode(blob, table, {}, functools.partial(start, model)) == content
    longer = archive_oracle.with_payloads(blob, lambda payload: b"\0\0")
    with pytest.raises(CorruptArchive, match="of kind 0"):
        llmcomp.decompress(longer, model)
    with pytest.raises(archive_oracle.Damaged):
        archive_oracle.decode(longer, table, {}, functools.partial(start, model))


# Section 5.5.

EXAMPLE = {0x01: 255, 0x81: 256, 0xE9: 253}


def tokenizer_of(missing: list[int], pairs: list[bytes], added: list[tuple[str, bool]] = (), shuffle: int = 0) -> dict:
    """A tokenizer.json with single bytes but for `missing`, then tokens of two bytes, then added ones."""
    symbols = {byte: symbol for symbol, byte in archive_oracle.byte_alphabet().items()}
    texts = [symbols[byte] for byte in range(256) if byte not in missing]
    texts += [symbols[a] + symbols[b] for a, b in pairs]
    if shuffle:
        random.Random(shuffle).shuffle(texts)
    description = golden_archives.tokenizer_description(b"")
    description["model"] |= {"vocab": {text: i for i, text in enumerate(texts)}, "merges": []}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    description["added_tokens"] = [
        {"id": len(texts) + i, "content": content, "special": special, **flags}
        for i, (content, special) in enumerate(added)
    ]
    return description


def package_tokenizer(description: dict) -> Tokenizer:
    return Tokenizer.from_bytes(json.dumps(description).encode())


def test_the_example_of_stand_ins():
    description = tokenizer_of(
        [0x01, 0x81, 0xE9], [s.encode() for s in "\u00e9\u0101\u0151\u00fc"], [("\u0151", False)]
    )
    table, stand_ins = archive_oracle.vocabulary(description)
    assert [table[token] for token in range(253, 258)] == [
        b"\xc3\xa9",
        b"\xc4\x81",
        b"\xc5\x91",
        b"\xc3\xbc",
        b"\xc5\x91",
    ]
    assert stand_ins == EXAMPLE
    tokenizer = package_tokenizer(description)
    assert tokenizer.encode_bytes(b"\xe9\x01\x81", stand_ins=True).tolist() == [253, 255, 256]
    for byte, token in EXAMPLE.items():
        assert tokenizer.decode_bytes([token], stand_ins=True) == bytes([byte])


def assert_same_vocabulary(description: dict) -> bool:
    """Whether both take it; what each token stands for is compared, with stand-ins and without."""
    try:
        table, stand_ins = archive_oracle.vocabulary(description)
    except archive_oracle.Damaged:
        with pytest.raises(Error, match=r"stand in|no gaps"):
            package_tokenizer(description)
        return False
    tokenizer = package_tokenizer(description)
    assert tokenizer.vocab_size == len(table)
    assert tokenizer.needs_stand_ins(bytes(range(256))) == bool(stand_ins)
    with_stand_ins = list(table)
    for byte, token in stand_ins.items():
        with_stand_ins[token] = bytes([byte])
    for is_with, expected in ((False, table), (True, with_stand_ins)):
        for token, raw in enumerate(expected):
            if raw is None:
                with pytest.raises(Error, match="stands for no bytes"):
                    tokenizer.decode_bytes([token], is_with)
            else:
                assert tokenizer.decode_bytes([token], is_with) == raw
    return True


def test_token_bytes_and_stand_ins_of_many_vocabularies():
    draw = random.Random(7)
    characters = [chr(code).encode() for code in range(0x80, 0x800)]
    n_taken = 0
    for seed in range(1, 60):
        missing = sorted({*draw.sample(range(256), draw.randrange(5)), *draw.sample((1, 2, 0xC1, 0xE9, 0xFF), 2)})
        likely = [chr(code).encode() for code in (*missing, 0xE9, 0xC0) if code >= 0x80]
        likely += draw.sample(characters, draw.randrange(8))
        pairs = [pair for pair in dict.fromkeys(likely) if draw.random() < 0.6] + [b"ab", b"\xc3\xc3"]
        # The tokenizers library keeps texts of both kinds in one table: no added token may be spelled as a symbol is.
        twice = [pair.decode() for pair in pairs if pair not in (b"ab", b"\xc3\xc3") and ord(pair.decode()) > 0x143]
        added = [(content, False) for content in twice[:1]]
        added += [("<|endoftext|>", True), ("  ", False), ("\u20ac", False)]
        n_taken += assert_same_vocabulary(tokenizer_of(missing, pairs, added, seed))
    assert 20 < n_taken < 55


def test_an_added_token_decides_on_its_id_and_a_text_outside_the_alphabet_stands_for_nothing():
    description = tokenizer_of([0xFF], [b"\xc3\xbf", b"\xc3\xa9"])
    vocab = description["model"]["vocab"]
    vocab |= {"\u2581x": 257, "": 258, "\xad": 259}
    space = vocab["\u0120"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description["added_tokens"] = [{"id": space, "content": "\u0120", **flags}]
    assert assert_same_vocabulary(description)
    table, stand_ins = archive_oracle.vocabulary(description)
    assert [table[token] for token in (space, 257, 258, 259)] == [None, None, b"", None]
    assert stand_ins == {0xFF: 255}


def test_a_vocabulary_that_lacks_bytes_and_has_gaps_is_refused():
    description = tokenizer_of([0xFF], [b"\xc3\xbf"])
    description["model"]["vocab"]["b"] = 300
    assert not assert_same_vocabulary(description)


# Section 5.6.

PLAIN = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False}


def test_fingerprints_of_tokenizers():
    descriptions = [json.loads(pico.tokenizer_path().read_bytes()), *filter(None, golden_archives.TOKENIZERS.values())]
    descriptions.append(descriptions[0] | {"pre_tokenizer": PLAIN})
    descriptions.append(descriptions[0] | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, PLAIN]}})
    joined = json.loads(json.dumps(descriptions[0]))
    joined["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in joined["model"]["merges"]]
    joined["model"]["ignore_merges"] = True
    strange = tokenizer_of([], [], [('"\\ \x7f\t\n\u20ac\U0001f600', False), ("/<x>", True)])
    for description in [*descriptions, joined, strange]:
        assert package_tokenizer(description).fingerprint == format_oracle.tokenizer_fingerprint(description)
    assert ByteTokenizer.fingerprint == hashlib.sha256(b'{"model":{"type":"bytes"}}').hexdigest()


@pytest.mark.parametrize("engine", ["exact", "exact-int8"])
@pytest.mark.parametrize("variant", engine_models.VARIANTS)
def test_fingerprints_of_models(variant, engine, tmp_path):
    config = engine_models.make_config(**engine_models.VARIANTS[variant], layer_norm_eps=1e-6)
    weights = engine_models.make_weights(config)
    weights["gpt_neox.layers.0.attention.bias"] = np.ones(3, np.float32)
    weights = {n: v.astype(np.float16) if "norm" in n else v for n, v in weights.items()}
    folder = engine_models.write_folder(tmp_path / "model", config, weights)
    check_fingerprint(folder, config, None, engine)


def check_fingerprint(folder: Path, config: dict, tokenizer: dict | None, engine: str = "exact") -> None:
    tensors = format_oracle.read_tensors(folder / "model.safetensors")
    expected = format_oracle.model_fingerprint(config, tensors, tokenizer, engine)
    assert llmcomp.load_model(str(folder), engine=engine).fingerprint == expected


def test_fingerprints_of_other_spellings_of_a_config(tmp_path):
    config = {
        "model_type": "gpt_neox",
        "hidden_size": 200,
        "num_attention_heads": 2,
        "num_hidden_layers": 11,
        "intermediate_size": 8,
        "vocab_size": 300,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.29, "rope_theta": 1e16},
        "rotary_pct": 1.0,
    }
    assert format_oracle.rotary(config) == (28, 1e16)
    weights = engine_models.make_weights({**config, "attention_bias": True, "tie_word_embeddings": False})
    folder = engine_models.write_folder(tmp_path / "model", config, weights)
    check_fingerprint(folder, config, None)
    description = tokenizer_of([], [b"ab"], [("<|endoftext|>", True)])
    (folder / "tokenizer.json").write_text(json.dumps(description))
    check_fingerprint(folder, config, description)


@pytest.mark.parametrize(("form", "name"), golden_archives.pico_cases())
def test_the_header_of_a_golden_archive_has_the_fingerprints(form, name):
    if (form, name) == ("2 stock", "pico-text"):
        pytest.skip("names no model")
    model_name, step, _, _ = golden_archives.PICO[name]
    folder = pico.suite_folder(model_name, step)
    tokenizer = json.loads(pico.tokenizer_path().read_bytes())
    tensors = format_oracle.read_tensors(folder / "model.safetensors")
    expected = format_oracle.model_fingerprint(json.loads((folder / "config.json").read_bytes()), tensors, tokenizer)
    header, *_ = archive_oracle.read_segments(golden_archives.pico_path(form, name).read_bytes())
    assert header["weights"].hex() == expected[:32]
    assert header["tokenizer"].hex() == format_oracle.tokenizer_fingerprint(tokenizer)[:16]


def test_bfloat16_in_a_fingerprint(tmp_path):
    torch, save = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    config = engine_models.make_config()
    weights = {n: torch.from_numpy(v).bfloat16() for n, v in engine_models.make_weights(config).items()}
    folder = engine_models.write_folder(tmp_path / "model", config, engine_models.make_weights(config))
    save(weights, folder / "model.safetensors")
    check_fingerprint(folder, config, None)
