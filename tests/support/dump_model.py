"""A bundled checkpoint and its vocabulary as one plain file for csrc/check/archive_check.c, which knows no JSON.

    python tests/support/dump_model.py pico-short OUT.model [OUT.content]

for a golden archive of `golden_archives.PICO`, and what the archive holds. Little-endian: sizes (u64) in the
order of `_SIZES`, rotary dimensions, whether the residual is parallel; rotary base and layer norm epsilon (binary64),
what the elements are (u64, `_DTYPES`), the tensors (u64 number of elements, 0 for one that is not
there, and the elements), the number of tokens (u64), for each its number of bytes (u32, all ones for none) and bytes.
Read from the files by the formats' own descriptions, without the package's engine or tokenizer.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import archive_oracle
import golden_archives as golden

from llmcomp import pico

_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "vocab_size",
    "max_position_embeddings",
)
# LMC_FLOAT32, LMC_FLOAT16, LMC_BFLOAT16.
_DTYPES = ("F32", "F16", "BF16")
_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


def read_tensors(path: Path) -> tuple[dict[str, bytes], str]:
    """Raw little-endian elements by name, and the one type that they all have (huggingface/safetensors, "Format")."""
    raw = path.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    entries = {name: entry for name, entry in json.loads(raw[8 : 8 + n_header]).items() if name != "__metadata__"}
    (dtype,) = {entry["dtype"] for entry in entries.values()}
    data = raw[8 + n_header :]
    return {name.removeprefix("gpt_neox."): data[slice(*e["data_offsets"])] for name, e in entries.items()}, dtype


def dump(folder: Path, tokenizer_path: Path) -> bytes:
    config = json.loads((folder / "config.json").read_bytes())
    tensors, dtype = read_tensors(folder / "model.safetensors")
    rotary_dims = int(config["hidden_size"] // config["num_attention_heads"] * config["rotary_pct"])
    sizes = [config[name] for name in _SIZES]
    sizes += [rotary_dims, int(config["use_parallel_residual"])]
    out = struct.pack("<9Q2d", *sizes, float(config["rotary_emb_base"]), config["layer_norm_eps"])
    out += struct.pack("<Q", _DTYPES.index(dtype))
    names = ["embed_in.weight", "final_layer_norm.weight", "final_layer_norm.bias", "embed_out.weight"]
    for layer in range(config["num_hidden_layers"]):
        names += [f"layers.{layer}.{part}.{kind}" for part in _LAYER for kind in ("weight", "bias")]
    for name in names:
        elements = tensors.get(name, b"")
        out += struct.pack("<Q", len(elements) // (4 if dtype == "F32" else 2)) + elements
    table, _ = archive_oracle.vocabulary(json.loads(tokenizer_path.read_bytes()))
    out += struct.pack("<Q", len(table))
    for raw in table:
        out += b"\xff" * 4 if raw is None else struct.pack("<I", len(raw)) + raw
    return out


def main(name: str, model_path: str, content_path: str | None = None) -> None:
    model, step, _, _ = golden.PICO[name]
    Path(model_path).write_bytes(dump(pico.suite_folder(model, step), pico.tokenizer_path()))
    if content_path is not None:
        Path(content_path).write_bytes(golden.pico_content(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
