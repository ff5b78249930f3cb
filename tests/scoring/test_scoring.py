"""The pipeline behind the model, the published sum's bound, and scores that depend on neither batches nor threads."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator

import mixing_oracle
import numpy as np
import oracle
import pytest
from tiny_models import TRAINING_TEXT, TinyModel

from llmcomp import coding, compress, load_model, score
from llmcomp.cli.main import main
from llmcomp.codec.container import ArchiveReader
from llmcomp.errors import Error
from llmcomp.models.adapter import AdaptedModel
from llmcomp.results import cells, read_rows
from llmcomp.scoring import background
from llmcomp.scoring.background import in_background
from llmcomp.scoring.published import CLAMP, PublishedSum
from llmcomp.scoring.score import ADAPTIVE_COLUMNS, adaptive_ratio

PATIENCE = 20.0


def coder_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("llmcomp-coder")]


def test_a_group_is_finished_while_the_next_is_at_work() -> None:
    """Group 2's model waits for the coder of group 1: without a second thread this would never end."""
    coded = [threading.Event() for _ in range(3)]

    def start(group: int) -> Callable[[], int]:
        if group:
            assert coded[group - 1].wait(PATIENCE), "nothing codes while the model is at work"

        def finish() -> int:
            coded[group].set()
            return 10 * group

        return finish

    assert list(in_background(range(3), start)) == [(0, 0), (1, 10), (2, 20)]
    assert not coder_threads()


def test_the_queue_is_bounded() -> None:
    gate, started = threading.Event(), []

    def start(group: int) -> Callable[[], bool]:
        started.append(group)
        return lambda: gate.wait(PATIENCE)

    results = in_background(range(6), start, n_behind=2)
    threading.Timer(0.2, gate.set).start()
    next(results)
    # The first result is taken when two groups wait behind it.
    assert started == [0, 1, 2]
    assert [group for group, _ in results] == [1, 2, 3, 4, 5]


def test_errors_of_both_sides_and_early_ends_leave_no_thread() -> None:
    def failing(group: int) -> Callable[[], int]:
        def finish() -> int:
            raise KeyError(group)

        return finish

    with pytest.raises(KeyError):
        list(in_background(range(3), failing))
    assert not coder_threads()

    def interrupted(group: int) -> Callable[[], int]:
        if group == 2:
            raise KeyboardInterrupt
        return lambda: group

    with pytest.raises(KeyboardInterrupt):
        list(in_background(range(5), interrupted))
    assert not coder_threads()
    results = in_background(range(5), lambda group: lambda: group)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not coder_threads()


def test_the_caller_s_backend_and_threads_hold_behind() -> None:
    with coding.use_backend("serial"), coding.use_threads(3):
        found = in_background([0], lambda _: lambda: (coding.backend_in_use(), coding.threads_in_use()))
        assert list(found) == [(0, ("serial", 3))]


CHUNKS = [TRAINING_TEXT[at : at + n] for at, n in ((0, 90), (7, 200), (100, 3), (30, 150), (50, 150), (2, 40))]


@pytest.fixture(params=["any object", "exact", "torch"])
def model(request: pytest.FixtureRequest) -> Iterator[object]:
    if request.param == "any object":
        yield TinyModel()
        return
    if request.param == "torch":
        torch = pytest.importorskip("torch", reason="the torch engine is an extra")
        torch.set_num_threads(1)
    yield load_model("pico-13k", engine=request.param)


@pytest.mark.filterwarnings("ignore:.*tokens. the published protocol is cut there")
@pytest.mark.parametrize("protocol", ["lossless", "published"])
def test_rows_do_not_depend_on_the_pipeline(model: object, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcomp.scoring.score._SCORE_BATCH_BYTES", 200)
    behind = score(CHUNKS, model, protocol, progress=False)
    monkeypatch.setattr(background, "N_BEHIND", 0)
    in_turn = score(CHUNKS, model, protocol, progress=False)
    assert len(behind) == len(CHUNKS)
    assert behind.drop(columns="seconds").equals(in_turn.drop(columns="seconds"))


@pytest.mark.parametrize(("value", "message"), [(np.nan, "a logit is NaN"), (np.inf, r"a logit is \+inf")])
def test_logits_that_are_no_numbers(value: float, message: str) -> None:
    class Broken(TinyModel):
        def logits(self, tokens: np.ndarray) -> np.ndarray:
            logits = super().logits(tokens)
            logits[-1, 2, 3] = value
            return logits

    streams = [np.arange(n, dtype=np.int32) for n in (9, 2, 7)]
    # The longest comes first in the batch, so that its last row is the shortest stream, of one row: nothing is wrong.
    PublishedSum(AdaptedModel(Broken())).bits(streams)
    with pytest.raises(Error, match=f"stream 2, row 2: {message}"):
        PublishedSum(AdaptedModel(Broken())).bits([streams[0], streams[0], streams[2]])


def float64_bits(logits: np.ndarray, targets: np.ndarray) -> float:
    """The published sum by the formula."""
    rows = logits.astype(np.float64)
    rows -= rows.max(1, keepdims=True)
    probabilities = np.exp(rows[np.arange(len(targets)), targets]) / np.exp(rows).sum(1)
    return float(-np.log2(np.maximum(probabilities, CLAMP)).sum())


class Forgetful(TinyModel):
    """Logits by the last token alone, some of them far below any clamp; `dtype` is what it gives them in."""

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        self.dtype = dtype
        self.table = np.random.default_rng(3).standard_normal((256, 256)) * 12

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[np.asarray(tokens)].astype(self.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_the_sum_of_any_model(dtype: str) -> None:
    model, rng = Forgetful(dtype), np.random.default_rng(4)
    streams = [rng.integers(0, 256, n).astype(np.int32) for n in (50, 1, 2, 47, 3)]
    found = PublishedSum(AdaptedModel(model)).bits(streams)
    clamped = 0
    for stream, bits in zip(streams, found, strict=True):
        logits = model.logits(stream[:-1]).astype(np.float32)
        expected = float64_bits(logits, stream[1:]) if len(stream) > 1 else 0.0
        assert bits == pytest.approx(expected, abs=2e-6 * max(len(stream), 1))
        clamped += sum(
            float64_bits(row[None], target[None]) > 33.2 for row, target in zip(logits, stream[1:], strict=True)
        )
    assert clamped > 3


def test_the_sum_of_a_model_that_gives_tensors() -> None:
    """bfloat16, which NumPy has not, and with a gradient, which a forward pass leaves by default."""
    torch = pytest.importorskip("torch", reason="the torch engine is an extra")

    class OfTorch(Forgetful):
        def logits(self, tokens: np.ndarray) -> np.ndarray:
            return torch.from_numpy(super().logits(tokens)).bfloat16().requires_grad_()

    stream = np.arange(40, dtype=np.int32)
    (found,) = PublishedSum(AdaptedModel(OfTorch())).bits([stream])
    logits = OfTorch().logits(stream[:-1]).detach().float().numpy()
    assert found == pytest.approx(float64_bits(logits, stream[1:]), abs=1e-4)


@pytest.mark.parametrize("engine", ["exact", "exact-int8"])
def test_the_exact_engines_write_no_logits(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("pico-13k", engine=engine)
    streams = [model.tokenizer.encode_bytes(chunk) for chunk in CHUNKS]
    expected = [float64_bits(model.logits(stream[None, :-1])[0], stream[1:]) for stream in streams]
    monkeypatch.setattr(type(model), "logits", lambda *_: pytest.fail("logits were written"))
    published = PublishedSum(AdaptedModel(model))
    found = published.bits(streams)
    assert found == pytest.approx(expected, abs=2e-6 * max(map(len, streams)))
    # As many rows as the lossless protocol has, whatever the vocabulary.
    assert published.batch_rows == model.pass_memory().rows_max
    for n_threads in (1, 3):
        with coding.use_threads(n_threads):
            assert [PublishedSum(AdaptedModel(model)).bits([stream])[0] for stream in streams] == found


def test_the_protocols_cannot_share_a_pass() -> None:
    """Lossless windows begin with the start token: with the same tokens every probability is another one. Of one pass
    without a start token all but the first token's bits are the published ones."""
    model = load_model("pico-28k")
    tokens = model.tokenizer.encode_bytes(TRAINING_TEXT[:200])
    lossless = np.concatenate([[model.tokenizer.bos_token], tokens[:-1]])[None]
    bits = []
    for inputs, targets in ((lossless, tokens[None]), (tokens[None, :-1], tokens[None, 1:])):
        _, freq, total = model.intervals(inputs, targets, vocab_size=model.n_logits)
        bits.append(-np.log2(freq[0].astype(np.float64) / total[0].astype(np.float64)))
    assert bits[1].sum() == pytest.approx(PublishedSum(AdaptedModel(model)).bits([tokens])[0], rel=1e-5)
    assert abs(bits[0][1:].sum() - bits[1].sum()) > 1


def test_score_tells_the_bits_of_every_token() -> None:
    model = TinyModel()
    chunks = [TRAINING_TEXT[:100], TRAINING_TEXT[100:170]]
    rows = score(chunks, model, token_bits=True, progress=False)
    for chunk, bits, ideal in zip(chunks, rows["token_bits"], rows["ideal_bits"], strict=True):
        assert bits.dtype == np.float32 and len(bits) == len(chunk)
        assert bits.sum(dtype=np.float64) == pytest.approx(ideal, rel=1e-5)
    # The first token, after the start token 0, by the softmax itself.
    logits = model.logits([[0]])[0, 0].astype(np.float64)
    first = np.log2(np.exp(logits - logits.max()).sum()) - (logits[chunks[0][0]] - logits.max()) / np.log(2)
    assert rows["token_bits"][0][0] == pytest.approx(first, rel=1e-5)
    assert "token_bits" not in score(chunks, model, progress=False)
    coded_bits = 8 * rows["coded_bytes"] + rows["side_bits"]
    assert rows["bits_per_token"].tolist() == pytest.approx((coded_bits / rows["tokens"]).tolist())
    with pytest.raises(Error, match="lossless"):
        score(chunks, model, "published", token_bits=True, progress=False)


# Adaptive columns.


def test_adaptive_columns_stand_beside_the_models_own():
    chunks = [TRAINING_TEXT * 2, b"again and again and " * 20, b"x", bytes(range(200))]
    plain, rows = (score(chunks, TinyModel(), adapt=adapt, verify=True, progress=False) for adapt in (False, True))
    assert list(rows.columns) == [*plain.columns, *ADAPTIVE_COLUMNS]
    assert rows[plain.columns].drop(columns="seconds").equals(plain.drop(columns="seconds"))
    assert rows["adaptive_coded_bytes"][1] < rows["coded_bytes"][1] / 2
    for row, chunk in zip(rows.itertuples(), chunks, strict=True):
        # What an archive's segment has: the archive of the chunk less the frame.
        blob = compress(chunk, TinyModel(), overlap=6, stock=False)
        segment = next(iter(ArchiveReader(io.BytesIO(blob)).segments()))
        assert segment.stored or row.adaptive_coded_bytes == len(segment.payload)
        assert row.adaptive_ratio == row.adaptive_coded_bytes / len(chunk)
        assert 0 <= 8 * row.adaptive_coded_bytes - row.adaptive_ideal_bits <= 16
    total = 8 * sum(map(len, chunks)) * adaptive_ratio(rows)
    assert total == pytest.approx(8 * rows["adaptive_coded_bytes"].sum())


def test_adaptive_bits_are_those_of_the_oracle():
    """From the model's own intervals by tests/support/mixing_oracle.py, written from FORMAT.md."""
    chunk = b"one two one two one three one two"
    model, mixer, bits = TinyModel(context_length=99), mixing_oracle.Mixer(), 0.0
    logits = model.logits(np.frombuffer(b"\0" + chunk[:-1], np.uint8)[None])[0]
    for row, token in zip(logits, chunk, strict=True):
        weights = [int(w) for w in oracle.weights(row)]
        mixed = mixing_oracle.mixed_weights(mixer, weights)
        bits -= np.log2(mixed[token] / sum(mixed))
        mixer.take(token, weights[token], sum(weights))
    assert score([chunk], model, adapt=True, progress=False)["adaptive_ideal_bits"][0] == pytest.approx(bits)


def test_cells_and_laws_know_nothing_of_adaptive_columns():
    rows = score([TRAINING_TEXT], TinyModel(), adapt=True, progress=False)
    assert cells(rows).equals(cells(rows.drop(columns=[*ADAPTIVE_COLUMNS])))
    assert not any("adaptive" in column for column in cells(rows).columns)


def test_the_published_protocol_does_not_adapt():
    with pytest.raises(Error, match="adapt"):
        score([b"abc"], TinyModel(), "published", adapt=True, progress=False)


def test_adaptive_ratio_on_the_command_line(tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"again and again and " * 200)
    command = ["score", "pico-13k", "--dataset", f"text={tmp_path / 'text'}", "--json", "-q"]
    assert main(command) == 0
    (plain,) = json.loads(capsys.readouterr().out)
    assert main([*command, "--adapt", "--out", str(tmp_path / "rows.parquet")]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert "adaptive_ratio" not in plain and row["ratio"] == plain["ratio"]
    assert row["adaptive_ratio"] < 0.5 * row["ratio"]
    assert not set(ADAPTIVE_COLUMNS) & set(read_rows(tmp_path / "rows.parquet").columns)
