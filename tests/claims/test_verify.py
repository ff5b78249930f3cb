"""verify certifies honest predictors of every kind, and refuses each way of cheating that it says it refuses."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TinyModel

import llmcomp
from llmcomp import Error
from llmcomp.cli.main import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_bytes()
DATA = TEXT[:900]
UNIFORM = np.full(256, 1 / 256)


def verify(predictor: Any, data: Any = DATA, **options: Any) -> Any:
    return llmcomp.verify(predictor, data, progress=False, **options)


def refusals(predictor: Any, data: Any = DATA, **options: Any) -> list[str]:
    found = verify(predictor, data, **options)
    assert not found.valid
    return [refusal["what"] for refusal in found.refusals]


# Honest predictors. The expected bits are summed here, from the same probabilities, in float64.


class Adaptive:
    """Laplace's rule over the bytes so far: picklable, so made anew in fresh processes."""

    name = "laplace"

    def __call__(self, past: np.ndarray) -> np.ndarray:
        counts = np.bincount(past, minlength=256) + 1.0
        return counts / counts.sum()


def laplace_bits(data: bytes) -> float:
    counts, bits = [1] * 256, 0.0
    for t, byte in enumerate(data):
        bits -= math.log2(counts[byte] / (256 + t))
        counts[byte] += 1
    return bits


def test_a_callable_gets_a_certificate_with_its_own_bits() -> None:
    documents = [TEXT[:700], TEXT[700:1100]]
    found = verify(Adaptive(), documents)
    assert found.valid and found.refusals == [] and found.checks["decoder"] == "a fresh process"
    expected = sum(map(laplace_bits, documents))
    assert found.coded["ideal_bits"] == pytest.approx(expected, rel=1e-4)
    assert expected <= found.coded["bits"] + 1 <= expected * 1.0001 + 8 * 12
    assert found.bits_per_byte == found.coded["bits"] / 1100
    assert found.data["bytes"] == 1100 and found.data["documents"] == 2
    assert found.data["sha256"] == hashlib.sha256(TEXT[:1100]).hexdigest() == found.checks["decoded_sha256"]
    assert found.coded["tokens"] == 1100 and found.predictor["name"] == "laplace"


def test_what_cannot_be_pickled_is_verified_in_copies_of_the_process() -> None:
    found = verify(lambda past: UNIFORM)
    assert found.valid and "fork" in found.checks["decoder"]
    assert found.coded["ideal_bits"] == pytest.approx(8 * len(DATA), rel=1e-6)


def test_a_model_is_coded_as_score_codes_it(tmp_path: Path) -> None:
    model = TinyModel(context_length=64)
    documents = [TEXT[:500], TEXT[500:900]]
    found = verify(model, documents)
    rows = llmcomp.score(documents, model, progress=False)
    assert found.valid and found.checks["future_bits_max"] == 0
    assert found.coded["ideal_bits"] == pytest.approx(rows["ideal_bits"].sum(), rel=1e-12)
    # Beside the payloads: one byte of count, and two lengths of one or two bytes for each.
    assert 0 <= found.coded["bytes"] - rows["coded_bytes"].sum() <= 1 + 2 * 2 * 2
    path = tmp_path / "certificate.json"
    found.write(path)
    assert json.loads(path.read_text())["valid"] is True


def test_a_named_model_is_told_with_its_digests() -> None:
    found = verify("pico-13k", TEXT[:2000])
    model = llmcomp.load_model("pico-13k")
    assert found.valid and found.checks["decoder"] == "a fresh process"
    assert found.predictor["sha256"] == model.weights_sha256 and found.predictor["n_params"] == model.n_params
    assert found.predictor["fingerprint"] == model.fingerprint
    assert found.software["llmcomp"] == llmcomp.__version__


def test_a_tokenizer_of_a_callable() -> None:
    """Tokens are the tokenizer's, the denominator stays bytes."""
    tokenizer = llmcomp.load_model("pico-13k").tokenizer
    found = verify(Uniform(1024), DATA, tokenizer=tokenizer)
    assert found.valid
    assert found.coded["tokens"] == len(tokenizer.encode_bytes(DATA)) < len(DATA)
    assert found.coded["bits_per_token"] == pytest.approx(10, rel=0.02)
    assert found.bits_per_byte == found.coded["bits"] / len(DATA)


class Uniform:
    def __init__(self, size: int):
        self.size = size

    def __call__(self, past: np.ndarray) -> np.ndarray:
        return np.full(self.size, 1 / self.size)


# A command.

SERVER = """
    import json, sys
    counts = None
    for line in sys.stdin:
        request = json.loads(line)
        if "llmcomp" in request:
            size = request["vocab_size"]
            answer = {"name": "counts"}
        else:
            if "start" in request:
                counts = [1] * size
            else:
                counts[request["token"]] += 1
            answer = {"probabilities": [n / sum(counts) for n in counts]}
        CHEAT
        print(json.dumps(answer), flush=True)
"""


def server(folder: Path, cheat: str = "pass") -> list[str]:
    path = folder / "server.py"
    path.write_text(textwrap.dedent(SERVER).replace("CHEAT", cheat))
    return [sys.executable, str(path)]


def test_a_command_gets_the_same_number_as_a_callable(tmp_path: Path) -> None:
    data = [TEXT[:150], TEXT[150:260]]
    found = verify(server(tmp_path), data)
    assert found.valid and found.predictor["name"] == "counts"
    assert found.coded["ideal_bits"] == pytest.approx(sum(map(laplace_bits, data)), rel=1e-4)
    script = (tmp_path / "server.py").read_bytes()
    assert hashlib.sha256(script).hexdigest() in [file["sha256"] for file in found.predictor["files"]]


@pytest.mark.parametrize(
    ("cheat", "says"),
    [
        ("sys.exit()", "ended without an answer"),
        ("answer = {'error': 'no memory'}", "no memory"),
        ("print('loading', flush=True)", "no valid JSON"),
        ("answer.pop('name', None) or answer.pop('probabilities')", "name"),
    ],
)
def test_a_command_that_breaks_the_protocol_is_an_error(tmp_path: Path, cheat: str, says: str) -> None:
    with pytest.raises(Error, match=says):
        verify(server(tmp_path, cheat), b"abc")


def test_a_command_that_gives_no_distribution_is_refused(tmp_path: Path) -> None:
    assert refusals(server(tmp_path, "answer.get('probabilities', [0])[0] *= 9"), b"abcabc") == ["distribution"]


# Cheating.


class Cheat:
    """Base of predictors that carry the data."""

    def __init__(self, data: bytes = DATA):
        self.data = data

    def sure_of(self, byte: int, sharpness: float = 0.99) -> np.ndarray:
        p = np.full(256, (1 - sharpness) / 255)
        p[byte] = sharpness
        return p


class LooksUpByIndex(Cheat):
    def __call__(self, past: np.ndarray) -> np.ndarray:
        return self.sure_of(self.data[len(past)])


class LooksUpEveryFifth(Cheat):
    """Honest but for every fifth byte."""

    def __call__(self, past: np.ndarray) -> np.ndarray:
        return self.sure_of(self.data[len(past)], 0.9) if len(past) % 5 == 0 else Adaptive()(past)


class CountsCalls(Cheat):
    """Looks at no argument at all."""

    n = -1

    def __call__(self, past: np.ndarray) -> np.ndarray:
        self.n += 1
        return self.sure_of(self.data[self.n % len(self.data)])


class LooksAtTheCaller:
    """Finds the tokens that are coded among the variables of its callers."""

    def __call__(self, past: np.ndarray) -> np.ndarray:
        frame = inspect.currentframe()
        while frame is not None:
            stream = frame.f_locals.get("stream")
            if isinstance(stream, np.ndarray) and len(stream) > len(past):
                p = np.full(256, 0.001 / 255)
                p[stream[len(past)]] = 0.999
                return p
            frame = frame.f_back
        return UNIFORM


class LooksBehindTheArray:
    """Takes what lies behind the past in memory: room that the caller has not filled yet."""

    def __call__(self, past: np.ndarray) -> np.ndarray:
        base = past if past.base is None else past.base
        rest = base[len(past) : len(past) + 1]
        p = np.full(256, 1e-3 / 255)
        p[int(rest[0]) % 256 if len(rest) else 0] = 1 - 1e-3
        return p / p.sum()


@pytest.mark.parametrize(
    "cheat", [LooksUpByIndex(), LooksUpEveryFifth(), CountsCalls()], ids=lambda c: type(c).__name__
)
def test_look_ahead_by_index_is_refused(cheat: Cheat) -> None:
    found = verify(cheat)
    assert [refusal["what"] for refusal in found.refusals] == ["position"]
    assert found.checks["position_bits"] > 0.5
    # And what carries the data shows by its size.
    assert found.predictor["pickle_bytes"] > len(DATA)


def test_a_closure_over_the_data_is_refused() -> None:
    data = list(DATA)
    assert refusals(lambda past: Cheat().sure_of(data[len(past)])) == ["position"]


def test_looking_at_the_caller_does_not_decode() -> None:
    assert "decoding" in refusals(LooksAtTheCaller())


def test_nothing_lies_behind_the_past() -> None:
    """Bits of one who reads there are those of a guess."""
    found = verify(LooksBehindTheArray())
    assert found.coded is None or found.bits_per_byte > 8


class ShowsTheNext(TinyModel):
    """Logits that favour the token that follows, where there is one."""

    def logits(self, tokens):
        found = super().logits(tokens)
        tokens = np.asarray(tokens)
        for b in range(len(tokens)):
            for t in range(tokens.shape[1] - 1):
                found[b, t, tokens[b, t + 1]] += 3
        return found


class PaysNothing(TinyModel):
    """Intervals of everything: no bits at all."""

    def intervals(self, tokens, targets, lengths=None, vocab_size=None):
        shape = np.shape(targets)
        return np.zeros(shape, np.uint64), np.full(shape, 1 << 20, np.uint64), np.full(shape, 1 << 20, np.uint64)


def test_a_model_that_sees_what_follows_is_refused() -> None:
    found = verify(ShowsTheNext(context_length=64))
    assert {refusal["what"] for refusal in found.refusals} == {"decoding", "future"}
    assert found.coded is None and found.checks["future_bits_max"] > 0.5


def test_intervals_without_bits_do_not_decode() -> None:
    assert "decoding" in refusals(PaysNothing(context_length=64))


def scaled(p: np.ndarray, factor: float) -> np.ndarray:
    return p * factor


BAD_ANSWERS: dict[str, Callable[[np.ndarray], Any]] = {
    "sums to 2": lambda past: 2 * UNIFORM,
    "sums to 1.001": lambda past: 1.001 * UNIFORM,
    "sums to 0.9": lambda past: 0.9 * UNIFORM,
    "one everywhere": lambda past: np.ones(256),
    "NaN": lambda past: np.where(np.arange(256) == 3, np.nan, UNIFORM),
    "negative": lambda past: UNIFORM + np.where(np.arange(256) < 2, (np.arange(256) - 0.5) / 64, 0),
    "infinite": lambda past: np.where(np.arange(256) == 3, np.inf, UNIFORM),
    "too short": lambda past: np.full(255, 1 / 255),
    "too long": lambda past: np.full(257, 1 / 257),
    "no numbers": lambda past: "the next is e",
    "late": lambda past: UNIFORM * (1 + (len(past) == 700)),
}


@pytest.mark.parametrize("predictor", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_what_is_no_distribution_is_refused(predictor: Any) -> None:
    found = verify(predictor)
    assert "distribution" in [refusal["what"] for refusal in found.refusals] and found.coded is None


def test_logits_with_nan_are_refused() -> None:
    model = TinyModel(context_length=64)
    model._by_token[ord("e"), 5] = np.nan
    assert "distribution" in refusals(model)


def test_numbers_that_differ_from_call_to_call_do_not_decode() -> None:
    def predict(past: np.ndarray) -> np.ndarray:
        p = np.frombuffer(os.urandom(256), np.uint8) + 1.0
        return p / p.sum()

    assert "decoding" in refusals(predict)


@pytest.mark.parametrize("wrong_denominator", [2 * len(DATA), len(DATA) + 30])
def test_a_claim_with_a_wrong_denominator_is_refused(wrong_denominator: int) -> None:
    bits = laplace_bits(DATA)
    assert verify(Adaptive(), claim=bits / len(DATA)).valid
    assert refusals(Adaptive(), claim=bits / wrong_denominator) == ["claim"]
    assert refusals(Adaptive(), claim=math.nan) == ["claim"]


class DropsAccents(type(llmcomp.load_model("pico-224k-bytes").tokenizer)):
    """Tokens are bytes without their top bit: the published mapping, whose bits are not all paid for."""

    def encode_bytes(self, data: bytes, stand_ins: bool = False):
        return super().encode_bytes(bytes(byte & 127 for byte in data), stand_ins)


def test_a_tokenizer_that_loses_bytes_does_not_decode() -> None:
    data = "Ein Wörterbuch für Müßiggänger".encode()
    assert refusals(Uniform(256), data, tokenizer=DropsAccents()) == ["decoding"]


# Mistakes.


@pytest.mark.parametrize("data", [b"", [b"a", b""], [], "text", 7])
def test_data_that_are_none(data: Any) -> None:
    with pytest.raises(Error):
        verify(Adaptive(), data)


@pytest.mark.parametrize("predictor", [7, None, Adaptive, [], ["/no/such/program"], "no-such-model"])
def test_predictors_that_are_none(predictor: Any) -> None:
    with pytest.raises(Error):
        verify(predictor)


def test_a_predictor_that_raises_is_an_error_of_one_line() -> None:
    def predict(past: np.ndarray) -> np.ndarray:
        return np.zeros(256)[1000]

    with pytest.raises(Error, match="IndexError"):
        verify(predict)


# The command line.

PREDICTOR = """
    import numpy as np
    def laplace(past):
        counts = np.bincount(past, minlength=256) + 1.0
        print("seen", len(past))
        return counts / counts.sum()
    def wrong(past):
        return np.ones(256)
"""


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, data, out = tmp_path / "mine.py", tmp_path / "data.txt", tmp_path / "certificate.json"
    module.write_text(textwrap.dedent(PREDICTOR))
    data.write_bytes(DATA)
    assert main(["verify", "-q", "--callable", f"{module}:laplace", str(data), "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text()) and found["valid"]
    assert found["coded"]["ideal_bits"] == pytest.approx(laplace_bits(DATA), rel=1e-4)
    assert found["predictor"]["files"][0]["sha256"] == hashlib.sha256(module.read_bytes()).hexdigest()
    assert main(["verify", "-q", f"--callable={module}:wrong", str(data)]) == 1
    assert "REFUSED    distribution: the probabilities sum to 256" in capsys.readouterr().out
    command = " ".join(server(tmp_path))
    assert main(["verify", "-q", "--command", command, str(data), "--claim", "1.5"]) == 1
    assert "REFUSED    claim" in capsys.readouterr().out
    assert main(["verify", "-q", "-m", "pico-13k", "--dataset", "text", "--chunks", "2"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["verify", "-q", "-m", "pico-13k"]) == 1
    assert main(["verify", "-q", "--callable", f"{module}:nothing", str(data)]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def test_the_working_directory_is_not_imported_from(tmp_path: Path) -> None:
    """A file of a stranger's that lies in the folder where llmcomp is called."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "data").write_bytes(DATA)
    program = "import sys; sys.path.pop(0); from llmcomp.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "verify", "-q", "-m", "pico-13k", "data"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
