"""The digests in the package, against implementations that are no part of it, and what `llmcomp selftest` says of them.

The oracles of tests/support were written from FORMAT.md alone; transformers knows nothing of either."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated_device
import mixing_oracle
import numpy as np
import oracle
import pytest
from transformer_oracle import Oracle

import llmcomp
from llmcomp.cli.main import main
from llmcomp.codec import container, stock_codecs
from llmcomp.coding import cuda
from llmcomp.conformance import cases, inputs, selftest
from llmcomp.conformance.selftest import Place
from llmcomp.models.checkpoint import core_arguments, match_tensors
from llmcomp.models.families import FAMILIES, parse_graph

DIGESTS = selftest.expected_digests()
# What the oracles take less than a second for.
SMALL = ("gpt_neox", "gpt2", "llama", "gemma", "olmo2", "qwen3", "phi", "stablelm")


def digest_of(arrays: Iterator[np.ndarray]) -> str:
    """As `cases.digest` says it: SHA-256 over lengths and little-endian bytes, its first 128 bits."""
    found = hashlib.sha256()
    for array in arrays:
        data = np.ascontiguousarray(array).tobytes()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:32]


def splitmix64(seed: int, n: int) -> list[int]:
    """The published generator, a number at a time."""
    state, found = seed << 32, []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_draws_are_those_of_the_published_generator() -> None:
    assert inputs.draw(3, 5).tolist() == splitmix64(3, 5)
    floats = inputs.draw_floats(3, 2, 500)
    assert floats.dtype == np.float32 and np.abs(floats).max() < 2 and np.unique(floats).size > 990
    assert (floats * 2**20 == np.trunc(floats * 2**20)).all()
    assert abs(float(floats.mean())) < 0.1


def test_every_family_and_both_engines_have_cases() -> None:
    """A family that is added has to come with its digests."""
    of_family = {str(config["model_type"]) for config in inputs.MODELS.values()}
    assert of_family == set(FAMILIES)
    assert list(DIGESTS) == list(cases.all_cases())
    assert len(set(DIGESTS.values())) == len(DIGESTS)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_digests_of_intervals_are_the_oracles(dtype: str) -> None:
    def parts() -> Iterator[np.ndarray]:
        for logits, tokens in inputs.logit_rows(dtype):
            rows = logits.astype(np.float32)
            triples = np.array([oracle.interval(row, int(token)) for row, token in zip(rows, tokens, strict=True)])
            yield from triples.astype("<u8").T

    assert digest_of(parts()) == DIGESTS[f"intervals {dtype}"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_digests_of_mixed_payloads_are_the_oracles(dtype: str) -> None:
    def parts() -> Iterator[np.ndarray]:
        for logits, drawn in inputs.logit_rows(dtype):
            mixer, triples = mixing_oracle.Mixer(), []
            for row, token in zip(logits.astype(np.float32), inputs.phrases(drawn).tolist(), strict=True):
                start, freq, total = oracle.interval(row, token)
                added = mixer.added(total)
                start_mixed = start + sum(mass for other, mass in added.items() if other < token)
                triples.append((start_mixed, freq + added.get(token, 0), total + sum(added.values())))
                mixer.take(token, freq, total)
            yield from np.array(triples).astype("<u8").T
            yield np.frombuffer(oracle.encode(triples), np.uint8)

    assert digest_of(parts()) == DIGESTS[f"payloads mixed {dtype}"]


def test_the_mixed_archive_has_segments_of_every_kind() -> None:
    [blob] = cases.all_cases()["archive mixed exact"]("cpu")
    assert isinstance(blob, bytes)
    segments = list(container.ArchiveReader(io.BytesIO(blob)).segments())
    assert [segment.stored for segment in segments] == [False, False, False, True]
    assert [stock_codecs.is_marked(segment.payload, 0) for segment in segments[:3]] == [False, False, True]
    assert stock_codecs.cut(segments[2].payload)[1] == stock_codecs.ALONE


@pytest.mark.parametrize("engine", ["exact", "exact-int8"])
@pytest.mark.parametrize("name", SMALL)
def test_digests_of_logits_are_the_oracles(name: str, engine: str) -> None:
    graph = parse_graph(inputs.MODELS[name], name)
    tensors = match_tensors(graph, inputs.synthetic_weights(name), name)
    arguments = core_arguments(graph, tensors, engine == "exact-int8")
    model = Oracle(arguments["config"], arguments["tensors"], list(arguments["layers"]))
    tokens = inputs.draw_tokens(graph.n_logits, (3, 24), graph.n_logits)
    logits = np.stack([model.logits(row) for row in tokens])
    assert np.isfinite(logits).all() and logits.std() > 0.1 and np.ptp(logits.argmax(-1)) > 0
    assert digest_of(iter([logits.astype("<f4")])) == DIGESTS[f"logits {name} {engine}"]


@pytest.mark.parametrize("name", inputs.MODELS)
def test_logits_of_synthetic_models_are_logits(name: str) -> None:
    """Finite, different from row to row, and with every weight of use: else a digest would see less than it says."""
    model = cases.ENGINES["exact"](**inputs.model_arguments(name))
    logits = model.logits(inputs.draw_tokens(5, (2, 24), model.n_logits))
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 100
    assert np.abs(logits[:, 1:] - logits[:, :-1]).max(axis=-1).min() > 0.01


def test_the_backends_are_those_of_the_processor() -> None:
    """As the kernel tells them: a compiler whose library knows no processor would leave only `serial`."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if platform.machine() != "x86_64" or not flags:
        pytest.skip("asks Linux on x86-64")
    expected = ["serial"]
    if {"avx2", "fma", "f16c"} <= flags:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected.append("avx512")
    assert llmcomp.backends() == tuple(expected)


def few_cases(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    found = {name: case for name, case in cases.all_cases().items() if name in names}
    monkeypatch.setattr(selftest, "all_cases", lambda: found)
    monkeypatch.setattr("llmcomp.conformance.cases.all_cases", lambda: found)


def total_of(digests: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(digests.values()).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=[pytest.mark.slow] if place.name == "serial" else []) for place in selftest.places()],
    ids=lambda place: place.name,
)
def test_every_case_passes(place: Place) -> None:
    outcome = selftest.selftest(place)
    assert outcome.failures == ()
    assert outcome.n_cases + len(outcome.refused) == len(DIGESTS)
    if not outcome.refused:
        assert outcome.digest == total_of(DIGESTS)


def test_the_command_prints_a_row_of_each_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("payloads of streams", "logits pico-13k exact")
    few_cases(monkeypatch, names)
    assert main(["selftest", "-q"]) == 0
    header, line, *rows = capsys.readouterr().out.splitlines()
    assert header == "| processor | backend | compiler | versions | cases | digest |" and set(line) == {"|", "-"}
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cell[1] for cell in cells] == [place.name for place in selftest.places()]
    for cell in cells:
        assert cell[4:] == ["2", total_of({name: DIGESTS[name] for name in names})]
    assert f"llmcomp {llmcomp.__version__}" in cells[0][3]
    assert cells[0][2].split()[0] in ("gcc", "clang", "another")


def test_another_bit_is_a_failure_that_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_cases(monkeypatch, ("payloads of streams", "logits pico-13k exact"))
    real = llmcomp.models.engines.exact.ExactModel.logits

    def off_by_one_bit(model: Any, *arguments: Any) -> np.ndarray:
        logits = real(model, *arguments)
        logits.view(np.uint32)[-1, -1, -1] ^= 1
        return logits

    monkeypatch.setattr("llmcomp.models.engines.exact.ExactModel.logits", off_by_one_bit)
    assert main(["selftest", "-q"]) == 1
    found = capsys.readouterr()
    assert "serial: FAILED logits pico-13k exact: step by step the logits have other bits" in found.out
    assert "payloads" not in found.out
    assert found.err.startswith("llmcomp: ") and found.err.count("\n") == 1


def test_another_digest_is_a_failure_that_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_cases(monkeypatch, ("payloads of streams",))
    monkeypatch.setattr(selftest, "expected_digests", lambda: {"payloads of streams": "0" * 32})
    assert main(["selftest", "-q", "--json"]) == 1
    first = json.loads(capsys.readouterr().out)[0]
    assert first["failures"] == [f"payloads of streams: digest {DIGESTS['payloads of streams']}, expected {'0' * 32}"]
    assert first["backend"] == "serial" and first["cases"] == "1"


def test_a_device_meets_the_same_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of this machine or the emulated one, and what it refuses is told, not counted as done."""
    if not cuda.cuda_info()["devices"]:
        emulated_device.install(monkeypatch, emulated_device.build())
    names = ("payloads of streams", "logits gpt_neox exact", "logits gpt_neox exact-int8", "logits pico-13k exact")
    few_cases(monkeypatch, names)
    device = selftest.places()[-1]
    assert device == Place("cuda:0", llmcomp.backends()[-1], "cuda:0")
    outcome = selftest.selftest(device)
    assert (outcome.n_cases, outcome.failures, outcome.refused) == (len(names), (), ())

    refusing = functools.partial(_refuse, "not this one")
    monkeypatch.setattr(selftest, "all_cases", lambda: {"logits gpt_neox exact": refusing})
    outcome = selftest.selftest(device)
    assert (outcome.n_cases, outcome.failures) == (0, ())
    assert outcome.refused == ("logits gpt_neox exact: not this one",)


def _refuse(message: str, device: str) -> Iterator[np.ndarray]:
    raise cases.Refusal(message)
