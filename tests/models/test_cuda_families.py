"""Every family on a CUDA device against the C core, which test_families.py holds against transformers: the same bits in
one pass, in pieces and in steps, with windows that go around their rings and with contexts of any length.

As in test_cuda_engine.py: on the device of this machine, or where there is none on an emulated one."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from engine_models import assert_same_bits
from family_models import CASES
from model_pairs import MODELS

import llmcomp
from llmcomp.errors import Error
from llmcomp.models.checkpoint import tensor_shapes
from llmcomp.models.engines.cuda import CudaModel
from llmcomp.models.engines.exact import ExactModel

pytestmark = pytest.mark.usefixtures("machine")

ALL = [(family, case) for family, cases in CASES.items() for case in cases]
FIRST = [(family, next(iter(cases))) for family, cases in CASES.items()]


def make_pair(keys: dict[str, Any], engine: str = "exact") -> tuple[ExactModel, CudaModel]:
    """Of what config.json would say, with weights that are drawn."""
    rng = np.random.default_rng(zlib.crc32(repr(sorted(keys)).encode()))
    weights = {}
    for name, shape in tensor_shapes(keys):
        centre, scale = (1.0, 0.3) if len(shape) == 1 else (0.0, 1.5 / shape[-1] ** 0.5)
        weights[name] = (centre + scale * rng.standard_normal(shape)).astype(np.float32)
    on_cpu, on_device = MODELS[engine]
    return on_cpu(keys, weights), on_device(keys, weights)


def check_family(family: str, case: str, engine: str) -> None:
    cpu, device = make_pair({"model_type": family, **CASES[family][case]}, engine)
    assert device.fingerprint == cpu.fingerprint
    tokens = np.random.default_rng(3).integers(0, cpu.n_logits, (3, 45))
    lengths = [45, 0, 33]
    assert_same_bits(device.logits(tokens, lengths), cpu.logits(tokens, lengths))
    expected = cpu.logits(tokens)
    session = device.session(3, 45)
    assert_same_bits(session.prefill(1, tokens[1, :20]), expected[1, 19])
    for t in range(3):
        found = session.step(tokens[[0, 1, 2], [t, 20 + t, t]])
        assert_same_bits(found, expected[[0, 1, 2], [t, 20 + t, t]])


@pytest.mark.parametrize(("family", "case"), ALL)
def test_a_family_has_the_bits_of_the_cpu(family: str, case: str) -> None:
    check_family(family, case, "exact")


@pytest.mark.parametrize(("family", "case"), FIRST)
def test_in_8_bit_integers_too(family: str, case: str) -> None:
    check_family(family, case, "exact-int8")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), [case for case in ALL if case not in FIRST])
def test_more_in_8_bit_integers(family: str, case: str) -> None:
    check_family(family, case, "exact-int8")


_SMALL = {
    **{"vocab_size": 256, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def test_windows_keep_little_and_give_the_bits_of_the_pass() -> None:
    """What is read at once is longer than a ring has room for: it comes in stretches."""
    windows = {"sliding_window": 9, "layer_types": ["sliding_attention", "sliding_attention"]}
    keys = {**_SMALL, "model_type": "olmo3", "max_position_embeddings": 20000}
    cpu, device = make_pair({**keys, **windows})
    tokens = np.random.default_rng(6).integers(0, 256, (1, 420))
    expected = cpu.logits(tokens)[0]
    session = device.session(1, 420)
    assert_same_bits(session.prefill(0, tokens[0, :400]), expected[399])
    for t in range(400, 405):
        assert_same_bits(session.step(tokens[:, t])[0], expected[t])
    assert_same_bits(session.prefill(0, tokens[0, 405:]), expected[-1])
    session.reset()  # what the ring still holds is of no stream any more
    assert_same_bits(session.step(tokens[:, 0])[0], expected[0])
    whole = make_pair({**keys, "sliding_window": None, "layer_types": ["full_attention"] * 2})[1]
    assert 30 * device._core.cache_bytes(2, 1, 20000) < whole._core.cache_bytes(2, 1, 20000)


def test_contexts_of_any_length() -> None:
    """Of so many tokens a step's scores do not fit the memory that a block of the device shares."""
    cpu, device = make_pair({**_SMALL, "model_type": "llama", "max_position_embeddings": 131072})
    tokens = np.random.default_rng(7).integers(0, 256, (2, 70))
    expected = cpu.logits(tokens)
    assert_same_bits(device.logits(tokens), expected)
    session = device.session(2, 12000)
    session.prefill(0, tokens[0, :67])
    for t in range(3):
        assert_same_bits(session.step(tokens[[0, 1], [67 + t, t]]), expected[[0, 1], [67 + t, t]])


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_archives_of_other_families_cross_both_ways(family: str) -> None:
    keys = {**CASES[family][next(iter(CASES[family]))], "vocab_size": 256, "max_position_embeddings": 64}
    cpu, device = make_pair({"model_type": family, **keys})
    data = b"what is written here is read there, and what is written there is read here. " * 2
    archive = llmcomp.compress(data, cpu, segment_bytes=100, mix=False)
    assert llmcomp.compress(data, device, segment_bytes=100, mix=False) == archive
    assert llmcomp.decompress(archive, device) == data


def test_what_the_device_does_not_compute_is_named() -> None:
    keys = {**_SMALL, "model_type": "qwen3", "head_dim": 258, "max_position_embeddings": 64}
    with pytest.raises(Error, match="on a CUDA device heads have at most 256 features"):
        make_pair(keys)
