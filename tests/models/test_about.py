"""`llmcomp info MODEL` and `models`: engine and reason, sizes of one definition, memory, speed, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hub_server import neox_config, neox_files, write_checkpoint
from safetensors.numpy import load_file

import llmcomp
from llmcomp import pico, results
from llmcomp.cli.main import main
from llmcomp.data import tokenizer_report
from llmcomp.models.about import about
from llmcomp.models.families import FAMILIES


def counted(name: str) -> tuple[int, int]:
    """All parameters of a bundled model, and those of no embedding, from the weights' own file."""
    folder = next(path for path in (Path(pico.__file__).parent / "suite" / name).iterdir() if path.is_dir())
    tensors = load_file(folder / "model.safetensors")
    sizes = {key: int(np.prod(tensor.shape)) for key, tensor in tensors.items()}
    return sum(sizes.values()), sum(n for key, n in sizes.items() if "embed" not in key)


@pytest.mark.parametrize("name", ["pico-13k", "pico-595k"])
def test_sizes_agree_everywhere(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    n_params, n_nonembedding = counted(name)
    entry = next(entry for entry in llmcomp.list_models() if entry.name == name)
    assert (entry.params, entry.n_params_nonembedding) == (n_params, n_nonembedding)
    model = llmcomp.load_model(name)
    assert (model.n_params, model.n_params_nonembedding) == (n_params, n_nonembedding)
    (row,) = llmcomp.score([b"text"], model, progress=False).to_dict("records")
    assert (row["params"], row["n_params_nonembedding"]) == (n_params, n_nonembedding)
    facts = about(name, measure=False).facts
    assert (facts["params"], facts["n_params_nonembedding"]) == (n_params, n_nonembedding)
    assert main(["models", "pico", "--json"]) == 0
    listed = {model["name"]: model for model in json.loads(capsys.readouterr().out)}[name]
    assert (listed["params"], listed["n_params_nonembedding"]) == (n_params, n_nonembedding)
    assert "embeddings included" in results.ROW_COLUMNS["params"][1]


def test_an_axis_says_which_parameters() -> None:
    from llmcomp.law.style import PARAMS_LABEL

    assert "total" in PARAMS_LABEL


def test_the_torch_engine_counts_alike() -> None:
    pytest.importorskip("transformers")
    model = llmcomp.load_model("pico-13k", engine="torch")
    assert (model.n_params, model.n_params_nonembedding) == counted("pico-13k")


def test_what_is_known_of_a_bundled_model() -> None:
    report = about("pico-13k")
    facts, model = report.facts, llmcomp.load_model("pico-13k")
    assert facts["engine"] == "exact" and "gpt_neox" in facts["why"] and "every machine" in facts["why"]
    assert facts["held_memory_bytes"] == model.pass_memory().held_bytes
    assert facts["stream_memory_bytes"] == model.session_memory() > 2 * 4 * model.config.n_layers * 512 * 16
    assert facts["pass_memory_bytes"] > 8192 and facts["pass_tokens_per_second"] > facts["step_tokens_per_second"] > 0
    assert report.tokenizer_lines == tokenizer_report.report(model.tokenizer).lines()
    json.dumps(report.to_dict())


def test_a_family_that_no_exact_engine_knows(tmp_path: Path) -> None:
    folder = tmp_path / "strange"
    write_checkpoint(folder, seed=1)
    config = neox_config()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "rwkv"}))
    facts = about(folder, measure=False).facts
    assert facts["engine"] == "torch" and "'rwkv'" in facts["why"] and "same machine" in facts["why"]
    # A family that is known, with a key that is not: named, never guessed.
    (folder / "config.json").write_text(json.dumps({**config, "new_trick": True}))
    facts = about(folder, measure=False).facts
    assert facts["engine"] == "none" and "new_trick" in facts["why"] and "torch" in facts["why"]


def test_a_model_of_the_hub_is_told_of_without_its_weights(hub) -> None:
    hub.add("org/model", "main", neox_files(seed=3))
    facts = about("org/model").facts
    assert facts["to_download_bytes"] > 0 and facts["engine"] == "exact" and facts["params"] > 0
    assert hub.downloads("model.safetensors") == 0


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "pico-13k", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["engine"] == "exact" and report["tokenizer"]["vocab_size"] == 1024
    assert main(["info", "pico-13k", "-s", "128"]) == 0
    out = capsys.readouterr().out
    assert "pico-13k step 128" in out and "tokenizer: BPE over bytes" in out and "tokens as in training" in out
    assert main(["info", "no-such-model"]) == 1
    assert main(["info", str(tmp_path / "absent.llmc")]) == 1
    assert main(["info"]) == 0
    capsys.readouterr()
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(family in out for family in FAMILIES) and "llmcomp info MODEL" in out
