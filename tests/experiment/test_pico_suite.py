"""The bundled pico suite and the bundled samples: complete, as their description says, and apart from each other."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from real_data import DATA, needs_data
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

import llmcomp
from llmcomp import pico

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "llmcomp" / "pico" / "suite"
CARD = json.loads((SUITE / "suite.json").read_text())
CHECKPOINTS = [(name, step) for name in pico.SUITE_NAMES for step in pico.STEPS]
# Width, layers, heads: what the suite promises, not what train.py says.
SHAPES = {
    "pico-13k": (32, 1, 1),
    "pico-28k": (48, 1, 2),
    "pico-77k": (56, 2, 2),
    "pico-224k": (96, 2, 3),
    "pico-595k": (128, 3, 4),
}
OTHER_VOCABULARIES = {"pico-224k-bytes": 256, "pico-224k-bpe512": 512, "pico-224k-bpe2048": 2048}


def chunks_of(data: bytes) -> list[bytes]:
    return [data[at : at + 2048] for at in range(0, len(data) - 2047, 2048)]


def pcm_of(path: Path) -> bytes:
    return soundfile.read(path, dtype="int16")[0].astype("<i2").tobytes()


@pytest.mark.parametrize("name, step", CHECKPOINTS)
def test_checkpoint_is_what_the_card_says(name: str, step: int) -> None:
    folder = pico.suite_folder(name, step)
    entry = CARD["checkpoints"][f"{name}/step{step}"]
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == entry["sha256"]
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float16)}
    assert all(np.isfinite(weight).all() for weight in weights.values())
    n_embedding = weights["gpt_neox.embed_in.weight"].size
    assert sum(weight.size for weight in weights.values()) == entry["parameters"]
    assert entry["parameters_without_embedding"] == entry["parameters"] - n_embedding
    assert not [key for key in weights if "embed_out" in key or "lm_head" in key], "the tied embedding is stored once"


@pytest.mark.parametrize("name, step", CHECKPOINTS)
def test_config_describes_the_weights(name: str, step: int) -> None:
    config = json.loads((pico.suite_folder(name, step) / "config.json").read_text())
    width, n_layers, n_heads = SHAPES[name]
    expected = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
        "use_parallel_residual": True,
        "rotary_pct": 1.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "max_position_embeddings": CARD["recipe"]["context_length"],
    }
    assert {key: config.get(key) for key in expected} == expected
    weights = load_file(pico.suite_folder(name, step) / "model.safetensors")
    assert weights["gpt_neox.embed_in.weight"].shape == (1024, width)
    assert weights[f"gpt_neox.layers.{n_layers - 1}.attention.query_key_value.weight"].shape == (3 * width, width)
    assert f"gpt_neox.layers.{n_layers}.attention.query_key_value.weight" not in weights


def test_nothing_but_the_suite_lies_in_its_folder() -> None:
    files = {path.relative_to(SUITE).as_posix() for path in SUITE.rglob("*") if path.is_file()}
    checkpoints = {f"{n}/step{s}/{file}" for n, s in CHECKPOINTS for file in ("config.json", "model.safetensors")}
    cards = {"suite.json", "SUITE.md", "tokenizer.json", "training_chunks.bin", "ratios.csv", "laws.json"}
    cards |= {"vocabularies.json", "vocabularies.csv"}
    cards |= {f"pico-224k-bpe{entries}/tokenizer.json" for entries in (512, 2048)}
    others = {f"{n}/step2048/{file}" for n in OTHER_VOCABULARIES for file in ("config.json", "model.safetensors")}
    assert files == checkpoints | cards | others
    assert set(CARD["checkpoints"]) == {f"{name}/step{step}" for name, step in CHECKPOINTS}
    assert len({entry["sha256"] for entry in CARD["checkpoints"].values()}) == len(CHECKPOINTS), "equal checkpoints"


def test_models_of_other_vocabularies_are_one_size_on_the_same_bytes() -> None:
    assert {"pico-224k": 1024} | OTHER_VOCABULARIES == pico.VOCABULARIES
    card = json.loads((SUITE / "vocabularies.json").read_text())
    assert set(card["models"]) == set(OTHER_VOCABULARIES)
    own = CARD["checkpoints"]["pico-224k/step2048"]["parameters_without_embedding"]
    for name, vocab_size in OTHER_VOCABULARIES.items():
        entry, folder = card["models"][name], pico.suite_folder(name, 2048)
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == entry["sha256"]
        weights = load_file(folder / "model.safetensors")
        assert weights["gpt_neox.embed_in.weight"].shape == (vocab_size, SHAPES["pico-224k"][0])
        assert sum(w.size for w in weights.values()) == entry["parameters"] == own + 96 * vocab_size
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocab_size
        assert entry["bytes_seen"] == pytest.approx(card["suite_bytes_seen"], rel=0.01)
        same = {key: value for key, value in entry["recipe"].items() if "share" not in key or key[:4] == "wiki"}
        same.pop("sequences_per_step")
        assert same.items() <= CARD["recipe"].items()
    for other in ("config.json", "model.safetensors"):
        sizes = [(pico.suite_folder(name, 2048) / other).stat().st_size for name in OTHER_VOCABULARIES]
        assert sum(sizes) < 2_000_000


def test_a_smaller_bpe_is_a_beginning_of_the_larger() -> None:
    largest = None
    for name, entries in (("pico-224k-bpe2048", 2048), ("pico-224k", 1024), ("pico-224k-bpe512", 512)):
        path = pico.tokenizer_path_of(name)
        assert path is not None
        merges = json.loads(path.read_text())["model"]["merges"]
        assert len(merges) == entries - 257
        largest = largest or merges
        assert largest[: len(merges)] == merges
    assert pico.tokenizer_path_of("pico-224k-bytes") is None


@pytest.mark.parametrize("name", OTHER_VOCABULARIES)
def test_other_vocabularies_code_any_bytes(name: str) -> None:
    data = "Any bytes: naïve".encode() + bytes(range(256)) + pico.sample_path("text").read_bytes()[:300]
    blob = llmcomp.compress(data, name, stock=False)
    assert llmcomp.decompress(blob) == data
    model = llmcomp.load_model(name)
    assert (model.step, model.vocab_size) == (2048, OTHER_VOCABULARIES[name])
    with pytest.raises(llmcomp.Error, match="no step 128"):
        llmcomp.load_model(name, 128)
    entry = next(entry for entry in llmcomp.list_models() if entry.name == name)
    assert (entry.suite, entry.nominal, entry.steps, entry.bundled) == ("pico-vocabularies", 224_000, (2048,), True)


def test_recorded_ratios_of_vocabularies_name_every_model_and_modality() -> None:
    with (SUITE / "vocabularies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["model"], row["modality"]) for row in rows) == sorted(
        (name, modality) for name in pico.VOCABULARIES for modality in ("text", "image", "speech")
    )
    suite = {(row["model"], row["step"], row["modality"]): row for row in csv.DictReader((SUITE / "ratios.csv").open())}
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(int(row["coded_bytes"]) / int(row["bytes_in"]), abs=1e-5)
        if row["model"] == "pico-224k":
            assert row == suite["pico-224k", "2048", row["modality"]]


def test_larger_names_have_more_parameters() -> None:
    counts = [CARD["checkpoints"][f"{name}/step128"]["parameters_without_embedding"] for name in pico.SUITE_NAMES]
    nominal = [int(name.removeprefix("pico-").removesuffix("k")) * 1000 for name in pico.SUITE_NAMES]
    np.testing.assert_allclose(counts, nominal, rtol=0.04)


def test_tokenizer_has_all_bytes_and_keeps_them() -> None:
    tokenizer = Tokenizer.from_file(str(pico.tokenizer_path()))
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(1024))
    assert vocab["<|endoftext|>"] == 0
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocab)
    assert len(pre_tokenizers.ByteLevel.alphabet()) == 256
    assert tokenizer.normalizer is None
    text = "  A ﬁnal\tcafe\u0301 —  12,345 naïve\r\n\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="pico-13k"):
        pico.suite_folder("pico-12k", 128)
    with pytest.raises(KeyError, match="2048"):
        pico.suite_folder("pico-13k", 130)
    with pytest.raises(KeyError, match="speech"):
        pico.sample_path("video")


def test_training_chunks_are_listed_without_gaps() -> None:
    n_hashes = 0
    for source in CARD["training_chunks"]:
        assert source["first"] == n_hashes and source["count"] > 0
        n_hashes += source["count"]
    assert (SUITE / "training_chunks.bin").stat().st_size == 8 * n_hashes < 100_000
    names = [source["name"] for source in CARD["training_chunks"]]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "topics" in name], "the bundled text sample's file was trained on"
    assert not [name for name in names if "en-029" in name], "the bundled speech sample's voice was trained on"


@needs_data
def test_training_text_is_recognised_and_held_out_text_is_not() -> None:
    chunks = chunks_of((DATA / "enwik8.head").read_bytes())
    first = -(-1_000_000 // 2048)
    assert not any(pico.training_source(chunk) for chunk in chunks[:first])
    sources = {pico.training_source(chunk) for chunk in chunks[first:]}
    assert len(sources) == 1
    assert sources.pop().startswith("enwik8[1001472:")


@needs_data
def test_training_speakers_are_recognised_and_held_out_speakers_are_not() -> None:
    speakers = set(CARD["training_speakers"])
    utterances = sorted((DATA / "librispeech").glob("*.flac"))
    held_out = {path.stem.split("-")[0] for path in utterances} - speakers
    assert len(held_out) >= 4
    for path in utterances:
        expected = f"librispeech/{path.stem}" if path.stem.split("-")[0] in speakers else None
        assert {pico.training_source(chunk) for chunk in chunks_of(pcm_of(path))} == {expected}


@needs_data
def test_no_photograph_of_imagenet_was_trained_on() -> None:
    for path in sorted((DATA / "imagenet-val").glob("*.JPEG"))[:8]:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert not any(pico.training_source(pixels[at : at + 32, :64].tobytes()) for at in range(0, 200, 32))


def test_samples_have_the_promised_form() -> None:
    text = pico.sample_path("text").read_bytes()
    assert len(chunks_of(text)) >= 32
    assert text.decode("utf-8").isprintable() is False and "assert" in text.decode("utf-8")
    image = Image.open(pico.sample_path("image"))
    assert (image.format, image.mode) == ("PNG", "L")
    assert (image.width // 64) * (image.height // 32) >= 32
    speech = soundfile.info(pico.sample_path("speech"))
    assert (speech.format, speech.subtype, speech.samplerate, speech.channels) == ("FLAC", "PCM_16", 16000, 1)
    assert speech.frames * 2 // 2048 >= 32
    samples = pcm_of(pico.sample_path("speech"))
    assert np.abs(np.frombuffer(samples, "<i2").astype(int)).max() < 32767, "clipped"
    total = sum(pico.sample_path(modality).stat().st_size for modality in ("text", "image", "speech"))
    assert total < 600_000


def test_no_sample_was_trained_on() -> None:
    pixels = np.asarray(Image.open(pico.sample_path("image")))
    crops = [
        pixels[row : row + 32, column : column + 64].tobytes()
        for row in range(0, pixels.shape[0] - 31, 32)
        for column in range(0, pixels.shape[1] - 63, 64)
    ]
    text, speech = pico.sample_path("text").read_bytes(), pcm_of(pico.sample_path("speech"))
    chunks = [*chunks_of(text), *crops, *chunks_of(speech)]
    assert [pico.training_source(chunk) for chunk in chunks] == [None] * len(chunks)


def test_transformers_loads_the_suite_and_it_has_learnt() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    ids = Tokenizer.from_file(str(pico.tokenizer_path())).encode(
        pico.sample_path("text").read_bytes()[:1200].decode(), add_special_tokens=False
    )
    n_bytes = len(pico.sample_path("text").read_bytes()[:1200])
    rows = torch.tensor([[0, *ids.ids]])[:, : CARD["recipe"]["context_length"] + 1]
    bits = {}
    for name, step in [("pico-13k", 128), ("pico-13k", 2048), ("pico-595k", 2048)]:
        model = transformers.GPTNeoXForCausalLM.from_pretrained(pico.suite_folder(name, step), dtype=torch.float32)
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits.double()
        assert torch.isfinite(logits).all()
        nats = torch.nn.functional.cross_entropy(logits[0], rows[0, 1:], reduction="sum").item()
        bits[name, step] = nats / np.log(2)
    assert 8 * n_bytes > bits["pico-13k", 128] > bits["pico-13k", 2048] > bits["pico-595k", 2048] > 0


@pytest.mark.parametrize("shape", [(96, 32), (32, 128), (48, 48)])
def test_muon_steps_are_orthogonal(shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    from llmcomp.pico.muon import orthogonalised

    matrix = torch.from_numpy(np.random.default_rng(1).normal(size=shape).astype(np.float32)) * 1e-3
    step = orthogonalised(matrix).numpy()
    u, _, v = np.linalg.svd(matrix.numpy().astype(np.float64), full_matrices=False)
    singular = np.linalg.svd(step, compute_uv=False)
    assert singular.max() < 1.3
    # The direction of U V^T, Newton-Schulz's limit; the smallest singular values may lag behind.
    cosine = float((step * (u @ v)).sum() / np.linalg.norm(step) / np.linalg.norm(u @ v))
    assert cosine > 0.97


def test_fractions_of_sequences_add_up() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from llmcomp.pico.train import Recipe, _whole, batches

    assert [_whole(turn, 3.0) for turn in range(4)] == [3, 3, 3, 3]
    assert sum(_whole(turn, 3.5864) for turn in range(10_000)) == 35_864

    class Constant:
        def __init__(self, token: int) -> None:
            self.token = token

        def draw(self, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
            return np.full(n_tokens, self.token)

    streams = {kind: [(0.5, Constant(i)), (0.5, Constant(i))] for i, kind in enumerate(("text", "image", "speech"), 1)}
    recipe = Recipe(context_length=4, sequences_per_step=7.5, text_share=2.5, image_share=1.25, speech_share=0.0)
    data = batches(streams, recipe)
    rows = np.concatenate([next(data).numpy() for _ in range(200)])
    assert len(rows) == 1500
    assert (rows[:, 0] == 0).all()
    assert np.bincount(rows[:, 1]).tolist() == [0, 1000, 500]


@pytest.mark.slow
def test_training_runs_and_repeats(tmp_path: Path) -> None:
    for module in ("torch", "transformers", "sklearn"):
        pytest.importorskip(module)
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    sentence = b"The quick tests of this script say one plain sentence again and again to the machine. "
    (tmp_path / "text").write_bytes(b"\xff" * 1_001_472 + sentence * 100)
    (tmp_path / "speech").mkdir()
    noise = np.random.default_rng(0).integers(-900, 900, 16_000).astype(np.int16)
    soundfile.write(tmp_path / "speech" / "1088-1-0001.flac", noise, 16_000, subtype="PCM_16")
    soundfile.write(tmp_path / "speech" / "61-1-0001.flac", noise[::-1], 16_000, subtype="PCM_16")
    for out in ("first", "second"):
        command = [sys.executable, "-m", "llmcomp.pico.train", "--text", tmp_path / "text", "--out", tmp_path / out]
        command += ["--speech", tmp_path / "speech", "--sizes", "pico-13k", "--steps", "1", "2", "--n-photographs", "4"]
        command += ["--n-drawn-images", "4", "--n-espeak-utterances", "2"]
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT, capture_output=True)
    first, second = (json.loads((tmp_path / out / "suite.json").read_text()) for out in ("first", "second"))
    assert first["checkpoints"].keys() == {"pico-13k/step1", "pico-13k/step2"}
    assert first["checkpoints"] == second["checkpoints"]
    names = [source["name"] for source in first["training_chunks"]]
    assert "librispeech/1088-1-0001" in names and "librispeech/61-1-0001" not in names
    for step in ("step1", "step2"):
        weights = load_file(tmp_path / "first" / "pico-13k" / step / "model.safetensors")
        assert all(np.isfinite(weight).all() for weight in weights.values())
