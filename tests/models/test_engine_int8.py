"""The exact engine in 8-bit integers: its rule against NumPy's integers and binary64, denormals, and a name of its own
wherever results are kept. What is asked of floats too is in test_engine_bits.py."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from engine_models import (
    VARIANTS,
    assert_same_bits,
    draw,
    make_config,
    make_weights,
    reference_logits,
    serial_logits,
    write_folder,
)

import llmcomp
from llmcomp.codec.archive import info
from llmcomp.errors import Error, ModelMismatch
from llmcomp.models.engines.exact import ExactModel, Int8Model, load_exact

# Right.


def codes_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FORMAT.md's rule in NumPy: int64 codes and float32 scales of float32 rows."""
    assert rows.dtype == np.float32
    largest = np.abs(rows).max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        codes = np.rint(rows * (np.float32(127) / largest))
    scales = largest / np.float32(127)
    scales[largest < np.float32(2.0**-100)] = 0
    codes[(largest < np.float32(2.0**-100))[:, 0]] = 0
    scales[~np.isfinite(largest)] = np.nan
    codes[~np.isfinite(largest)[:, 0]] = 0
    return codes.astype(np.int64), scales[:, 0]


def without_layers(config: dict, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights with which every layer adds +0, so that the head sees the norm of the embedding."""
    zeros = {
        name: np.zeros_like(value)
        for name, value in weights.items()
        if ".attention.dense." in name or ".dense_4h_to_h." in name
    }
    return {**weights, **zeros}


def test_the_head_is_numpys_integers(backend: str) -> None:
    """Bit for bit, from inputs that the float engine shows through a head of ones on the diagonal."""
    config = make_config(vocab_size=53)
    weights = without_layers(config, make_weights(config))
    head = weights["embed_out.weight"]
    head[3], head[4], head[5] = 0, np.float32(1e-33), np.float32(3e38)
    head[6, 2], head[7, 9], head[8] = np.inf, np.nan, np.ldexp(np.float32(1), -100)
    head[9, :2] = [np.float32(127), np.float32(2.5)]  # a tie
    weights["gpt_neox.final_layer_norm.weight"][1] = 1000  # an input far larger than the others
    diagonal = {**weights, "embed_out.weight": np.eye(53, config["hidden_size"], dtype=np.float32)}
    tokens = np.arange(48)[None]
    inputs = ExactModel(config, diagonal).logits(tokens)[0, :, : config["hidden_size"]]
    x, x_scales = codes_of(inputs)
    w, w_scales = codes_of(head)
    sums = (x @ w.T).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (sums * w_scales) * x_scales[:, None]
    assert np.abs(x).max() == 127 and np.isinf(expected).any() and not expected[:, 3].any()
    assert np.isnan(expected).any(0).nonzero()[0].tolist() == [6, 7]
    found = Int8Model(config, weights).logits(tokens)[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_binary64(variant: str) -> None:
    """A code may fall to the other side of a tie in binary64, and what follows it differs; that is rare."""
    config = make_config(**VARIANTS[variant])
    weights = make_weights(config)
    tokens = np.random.default_rng(2).integers(0, config["vocab_size"], (6, 48))
    found = Int8Model(config, weights).logits(tokens)
    expected = reference_logits(config, weights, tokens, int8=True)
    error = np.abs(found - expected).max(-1)
    cost = np.abs(expected - reference_logits(config, weights, tokens)).max(-1)
    assert np.median(cost) > 0.01
    assert np.median(error) < 2e-5
    assert (error < 1e-3 * cost.mean()).mean() > 0.8


def test_sums_at_the_bound_do_not_overflow(backend: str) -> None:
    """2**17 inputs whose codes are all 127, weights too: their sum is 2**31 less 1.6 percent."""
    n = 1 << 17
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 9}
    config = make_config(**sizes, intermediate_size=n)
    weights = make_weights(config)
    layer = "gpt_neox.layers.0."
    for name in (
        "attention.dense.weight",
        "attention.dense.bias",
        "mlp.dense_h_to_4h.weight",
        "mlp.dense_4h_to_h.bias",
    ):
        weights[layer + name] = np.zeros_like(weights[layer + name])
    weights[f"{layer}mlp.dense_h_to_4h.bias"] = np.full(n, 8, np.float32)  # GELU(8) is 8
    signs = np.array([1, -1, 1, -1, 1, 1, -1, 1], np.float32)
    weights[f"{layer}mlp.dense_4h_to_h.weight"] = np.repeat(signs[:, None], n, axis=1)
    weights["gpt_neox.embed_in.weight"][:] = 0
    found = Int8Model(config, weights).logits(np.zeros((1, 1), int))
    # Every channel is +-2**20 but for roundings: the norm makes +-1 of them less their mean.
    expected = reference_logits(config, weights, np.zeros((1, 1), int), int8=True)
    assert np.abs(found - expected).max() < 1e-5
    with pytest.raises(Error, match="out of range"):
        Int8Model(
            make_config(**sizes, intermediate_size=n + 1), make_weights(make_config(**sizes, intermediate_size=n + 1))
        )


# The same bits.


def test_flush_to_zero_of_the_caller_changes_nothing(backend: str) -> None:
    """Inputs near 2**-100 make codes from products with denormals beside them; scales of 2**-107 times 1e-12."""
    torch = pytest.importorskip("torch")
    config = make_config()
    weights = make_weights(config)
    for name, value in weights.items():
        if name.endswith("query_key_value.weight"):
            value *= np.float32(1e-28)
            value[::2] *= np.float32(1e-9)
    model = Int8Model(config, weights)
    tokens = draw(model, 2, 20)
    expected = serial_logits(model, tokens)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert float(torch.tensor(1e-38) * 0.1) == 0
        assert_same_bits(Int8Model(config, weights).logits(tokens), expected)
    finally:
        torch.set_flush_denormal(False)


# A name of its own.


RESIDENT = """
    import ctypes, gc, os
    import numpy as np
    from engine_models import make_config, make_weights
    from llmcomp.models.engines.exact import Int8Model

    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept for the next call
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    config = make_config(hidden_size=1024, num_attention_heads=4, intermediate_size=4096, vocab_size=64)
    weights = make_weights(config)
    n_bytes = sum(value.nbytes for value in weights.values())
    np.savez("weights.npz", **weights)
    Int8Model(make_config(), make_weights(make_config()))  # what the first model takes once
    del weights
    before = resident()
    with np.load("weights.npz") as stored:
        model = Int8Model(config, {name: stored[name] for name in stored})
    print(n_bytes, resident() - before, model.n_params)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="resident memory as Linux and glibc state it")
def test_memory_is_a_quarter_and_the_checkpoint_is_let_go(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(RESIDENT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    n_bytes, held, n_params = map(int, done.stdout.split())
    assert n_bytes / 4 < held < 0.35 * n_bytes
    assert 4 * n_params == n_bytes


def test_attributes_and_fingerprint(tmp_path: Path) -> None:
    config = make_config()
    folder = write_folder(tmp_path / "model", config, make_weights(config))
    model, other = llmcomp.load_model(folder, engine="exact-int8"), llmcomp.load_model(folder)
    assert isinstance(load_exact(folder, engine="exact-int8"), Int8Model)
    assert (model.engine, model.dtype, model.device) == ("exact-int8", "int8", "cpu")
    assert (other.engine, other.dtype) == ("exact", "float32")
    assert model.weights_sha256 == other.weights_sha256
    assert model.fingerprint != other.fingerprint
    assert not np.array_equal(model.logits([[1, 2]]), other.logits([[1, 2]]))
    with pytest.raises(Error, match="the exact-int8 engine has no choice of dtype"):
        llmcomp.load_model(folder, engine="exact-int8", dtype="bfloat16")


def test_an_archive_needs_the_engine_that_made_it() -> None:
    data = bytes(llmcomp.load_dataset("text", n_chunks=1, progress=False).chunks[0])
    int8, other = (llmcomp.load_model("pico-13k", engine=engine) for engine in ("exact-int8", "exact"))
    blob = llmcomp.compress(data, int8, stock=False)
    assert blob != llmcomp.compress(data, other, stock=False)
    assert llmcomp.decompress(blob) == data
    assert llmcomp.decompress(blob, int8) == data
    assert info(io.BytesIO(blob)).engine == "exact-int8"
    with pytest.raises(ModelMismatch, match=r"needs pico-13k, step2048, engine exact-int8.*found .*engine exact, "):
        llmcomp.decompress(blob, other)
    with pytest.raises(ModelMismatch, match=r"found .*engine exact-int8"):
        llmcomp.decompress(llmcomp.compress(data, other, stock=False), int8)


def test_rows_say_which_engine() -> None:
    chunks = llmcomp.load_dataset("text", n_chunks=2, progress=False)
    rows = [
        llmcomp.score(chunks, llmcomp.load_model("pico-77k", engine=engine), verify=True, progress=False)
        for engine in ("exact-int8", "exact")
    ]
    assert set(rows[0]["engine"]) == {"exact-int8"} and set(rows[0]["dtype"]) == {"int8"}
    ideal = [part["ideal_bits"].sum() for part in rows]
    assert ideal[0] != ideal[1]
    assert abs(ideal[0] / ideal[1] - 1) < 0.005
