"""What a stranger may leave behind: a model folder with code in it, and archives that name a model of the registry."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hub_server import neox_files
from tiny_models import TRAINING_TEXT, TinyModel

import llmcomp
from llmcomp import compress

REGISTERED, STEP = "EleutherAI/pythia-70m", 143000


def plant_folder(folder: Path, marker: Path) -> Path:
    """A checkpoint whose config.json names a Python file beside it, which writes `marker` when it is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    files = neox_files(1, tie_word_embeddings=True)
    config = json.loads(files["config.json"]) | {
        "model_type": "planted",
        "architectures": ["PlantedModel"],
        "auto_map": {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedModel"},
    }
    files["config.json"] = json.dumps(config).encode()
    files["planted.py"] = (
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
        "from transformers import GPTNeoXConfig, GPTNeoXForCausalLM\n"
        "class PlantedConfig(GPTNeoXConfig):\n    model_type = 'planted'\n"
        "class PlantedModel(GPTNeoXForCausalLM):\n    config_class = PlantedConfig\n"
    ).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def archive_that_names(name: str = REGISTERED, step: int | str | None = STEP, engine: str = "torch") -> bytes:
    """An archive of TRAINING_TEXT in whose header that model and engine stand."""
    model = TinyModel(name=name, step=step, engine=engine, fingerprint="ab" * 32)
    return compress(TRAINING_TEXT, model, stock=False)


def stranger_environment(tmp_path: Path, endpoint: str) -> dict[str, str]:
    """For a program that runs in a folder of a stranger: an empty cache, and a hub that keeps account of requests."""
    root = str(Path(llmcomp.__file__).parent.parent)
    paths = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    return {**os.environ, **paths, "HF_ENDPOINT": endpoint, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}
