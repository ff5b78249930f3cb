"""Causal models of transformers through the torch engine: scored, verified, archived, in memory and from folders."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from causal_models import CAUSAL_FAMILIES, CONTEXT, make_causal
from session_checks import assert_steps_with_pauses

torch = pytest.importorskip("torch", reason="the torch engine is an extra")
transformers = pytest.importorskip("transformers", reason="the torch engine is an extra")

from llmcomp import compress, decompress, load_dataset, load_model, pico, score, sweep  # noqa: E402
from llmcomp.cli.main import main  # noqa: E402
from llmcomp.errors import Error  # noqa: E402
from llmcomp.models.engines.torch import TorchModel  # noqa: E402

TEXT = b"Call me Ishmael. Some years ago - never mind how long precisely - having little"
# Those whose steps are of different kinds; the others are in the slow target.
_FAST = ("llama", "mamba", "rwkv", "gemma2", "bloom", "openai-gpt")
# Versions that have no cache that gives what one pass gives (transformers 5.23), or none at all.
_WITHOUT_CACHE = {"openai-gpt", "recurrent_gemma"}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*(fast path|mamba|selective|causal.conv|fla ).*")
        yield


def ideal_bits(module: Any, chunk: bytes) -> float:
    """Of windows of the context's length that begin with token 0 and, but for the first, a quarter of the one before:
    transformers' logits, the softmax in float64."""
    bits, start, overlap = 0.0, 0, CONTEXT // 4
    while start < len(chunk):
        first = max(0, start - overlap)
        part = np.frombuffer(chunk[first : first + CONTEXT], np.uint8).astype(np.int64)
        with torch.no_grad():
            logits = module(torch.from_numpy(np.concatenate([[0], part[:-1]]))[None]).logits[0].double()
        log2 = torch.log_softmax(logits, -1).numpy()[np.arange(len(part)), part] / np.log(2)
        bits -= log2[start - first :].sum()
        start = first + len(part)
    return bits


@pytest.mark.parametrize(
    "family",
    [family if family in _FAST else pytest.param(family, marks=pytest.mark.slow) for family in CAUSAL_FAMILIES],
)
def test_every_family_is_scored_verified_and_archived(family: str) -> None:
    module = make_causal(family)
    model = load_model(module, tokenizer="bytes")
    expected = ideal_bits(module, TEXT)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = score([TEXT, TEXT[:30]], model, verify=True, progress=False)
        archive = compress(TEXT, model)
        assert decompress(archive, load_model(module, tokenizer="bytes")) == TEXT
    costs = {str(warning.message) for warning in told if "reads a window again" in str(warning.message)}
    assert len(costs) == (family in _WITHOUT_CACHE)
    assert rows["ideal_bits"][0] == pytest.approx(expected, rel=2e-5)
    # In one pass, as scores are made without `verify`.
    assert score([TEXT], model, progress=False)["ideal_bits"][0] == pytest.approx(expected, rel=2e-5)
    # What was read matters: a model that forgot it would give other bits.
    read = torch.tensor([list(TEXT[:12]), list(TEXT[:8]) + list(TEXT[40:41]) + list(TEXT[9:12])])
    with torch.no_grad():
        last = module(read).logits[:, -1]
    assert (last[0] - last[1]).abs().max() > 1e-3 * last.abs().max()


def test_attention_is_what_the_model_computes_with() -> None:
    """Gemma 2 caps its attention, which transformers' sdpa leaves out."""
    assert load_model(make_causal("gemma2"), tokenizer="bytes").attention == "eager"
    assert load_model(make_causal("llama"), tokenizer="bytes").attention == "sdpa"


@pytest.mark.parametrize("family", ["mamba", "mistral", "jamba", "openai-gpt"])
def test_streams_pause_and_forget_whatever_they_remember_by(family: str) -> None:
    module = make_causal(family)
    model = TorchModel(module, name=family, tokenizer_path="bytes")
    tokens = np.random.default_rng(3).integers(0, 256, (3, 24))
    with torch.no_grad():
        expected = module(torch.from_numpy(tokens)).logits.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = model.session(3)
    assert_steps_with_pauses(session, tokens, expected, share=0.7, atol=1e-3)
    session.reset(1)
    rows = session.step(tokens[2, [0, 0, 0]], [False, True, False])
    np.testing.assert_allclose(rows[1], expected[2, 0], atol=1e-3)
    assert session.positions.tolist() == [24, 1, 24]


def test_a_model_that_looks_ahead_is_refused() -> None:
    """transformers loads BERT as a causal model that is none."""
    model = TorchModel(make_causal("bert"), name="bert", tokenizer_path="bytes")
    tokens = np.zeros((1, 8), int)
    for use in (
        lambda: score([TEXT], model, progress=False),
        lambda: model.session(1),
        lambda: model.logits(tokens),
        lambda: model.log2_probabilities(tokens, tokens),
        lambda: compress(TEXT, model),
    ):
        with pytest.raises(Error, match="bert is not causal"):
            use()


def test_caps_and_scales_behind_the_head_are_seen() -> None:
    """Random weights have small logits, on which a cap does little and a scale leaves little to see."""
    for family, more in (("gemma2", {"final_logit_softcapping": 5.0}), ("cohere", {"logit_scale": 0.5})):
        module = make_causal(family, **more)
        assert not load_model(module, tokenizer="bytes")._head_is_linear
        with torch.no_grad():
            module.get_output_embeddings().weight.mul_(0.01)
        assert not load_model(module, tokenizer="bytes")._head_is_linear or family == "gemma2"
        assert score([TEXT], load_model(module, tokenizer="bytes"), progress=False)["ideal_bits"][0] == pytest.approx(
            ideal_bits(module, TEXT), rel=2e-5
        )
    assert load_model(make_causal("llama"), tokenizer="bytes")._head_is_linear


def test_a_folder_of_a_family_that_only_this_engine_knows(tmp_path: Path) -> None:
    make_causal("mamba").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'mamba' model, which the exact engine does not know"):
        model = load_model(tmp_path, tokenizer="bytes")
    assert (model.engine, model.context_length) == ("torch", CONTEXT)
    assert decompress(compress(TEXT, model), model) == TEXT


def text_tokenizer() -> Any:
    """A byte-level BPE of 300 entries, as an object of transformers."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT.decode()] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def test_a_module_with_its_tokenizer_is_a_model(tmp_path: Path) -> None:
    module, tokenizer = make_causal("llama", vocab_size=320), text_tokenizer()
    model = load_model(module, tokenizer=tokenizer)
    assert (model.vocab_size, model.n_logits) == (300, 320)
    assert model.tokenizer.encode_bytes(TEXT).tolist() == tokenizer(TEXT.decode())["input_ids"]
    module.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    from_folder = load_model(tmp_path / "m", engine="torch")
    assert model.tokenizer.bos_token == from_folder.tokenizer.bos_token
    expected = score([TEXT], from_folder, progress=False)["ideal_bits"][0]
    pair = (module, tokenizer)
    assert score([TEXT], pair, progress=False)["ideal_bits"][0] == expected
    for given in (tokenizer.backend_tokenizer, tmp_path / "m", tmp_path / "m" / "tokenizer.json", model.tokenizer):
        assert score([TEXT], (module, given), progress=False)["ideal_bits"][0] == expected
    assert decompress(compress(TEXT, pair), pair) == TEXT
    rows = sweep(pair, datasets={"prose": [TEXT.decode()]}, out=tmp_path / "out", whole=True, progress=False)
    assert rows["ideal_bits"].tolist() == [expected] and rows.attrs["failed"] == []
    again = sweep([pair], datasets={"prose": [TEXT.decode()]}, out=tmp_path / "out", whole=True, progress=False)
    assert again["seconds"].tolist() == rows["seconds"].tolist()
    with pytest.raises(Error, match="add the file, or say tokenizer"):
        score([TEXT], module, progress=False)
    with pytest.raises(Error, match="a dict is no tokenizer"):
        load_model(module, tokenizer={})
    with pytest.raises(Error, match="bfloat16 is for folders"):
        load_model(module, tokenizer="bytes", dtype="bfloat16")


def test_a_module_in_training_goes_on_training() -> None:
    module = make_causal("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = ideal_bits(module, TEXT)
    module.train()
    module.transformer.h[0].eval()  # a part that its owner froze
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    for _ in range(2):
        rows = score([TEXT], (module, "bytes"), verify=True, progress=False)
        assert module.training and module.transformer.h[1].attn.training
        assert not module.transformer.h[0].training
    # Dropout is off while it is scored.
    assert rows["ideal_bits"][0] == pytest.approx(expected, rel=2e-5)
    tokens = torch.tensor([list(TEXT[:CONTEXT])])
    module(tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = score([TEXT], (module, "bytes"), progress=False)
    assert after["weights_sha256"][0] != rows["weights_sha256"][0]
    assert after["ideal_bits"][0] != rows["ideal_bits"][0]


def test_threads_are_chosen_by_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps take one thread, whatever torch may take; a large pass takes all; then the setting is as it was."""
    model = load_model(make_causal("llama"), tokenizer="bytes")
    seen = []
    run = model.module.model.forward  # what the module calls: its own forward is asked for its parameters

    def noted(*given: Any, **options: Any) -> Any:
        seen.append(torch.get_num_threads())
        return run(*given, **options)

    monkeypatch.setattr(model.module.model, "forward", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model.logits(np.zeros((1, 4), int))
        assert set(seen) == {1} and torch.get_num_threads() == 3
        monkeypatch.setattr("llmcomp.models.engines.torch._FLOP_PER_THREAD", 1000)
        seen.clear()
        model.logits(np.zeros((1, 4), int))
        assert seen == [3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [[], ["--dtype=bfloat16"]])
def test_an_archive_says_with_which_engine_it_is_decoded(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exact engine knows GPT-NeoX, too, and would be taken for a folder with it."""
    folder, file = tmp_path / "model", tmp_path / "letter.txt"
    shutil.copytree(pico.suite_root() / "pico-13k" / "step2048", folder)
    shutil.copy(pico.tokenizer_path(), folder)
    content = load_dataset("text", 1, 900, progress=False).chunks[0]
    file.write_bytes(content)
    assert main(["compress", "--engine=torch", *options, "-q", "-k", "-m", str(folder), str(file)]) == 0
    archive = Path(f"{file}.llmc")
    assert main(["decompress", "-q", "-m", str(folder), "-o", str(tmp_path / "back"), str(archive)]) == 0
    assert (tmp_path / "back").read_bytes() == content
    assert decompress(archive.read_bytes(), folder) == content
    # What the user says of the engine holds against the archive.
    assert main(["decompress", "-q", "--engine=exact", "-m", str(folder), "-t", str(archive)]) == 1
    assert "the archive needs" in capsys.readouterr().err


def test_the_step_of_an_archive_is_that_of_its_model() -> None:
    content = load_dataset("text", 1, 900, progress=False).chunks[0]
    archive = compress(content, load_model("pico-13k", 512))
    assert decompress(archive, "pico-13k") == content
