"""What the exact engine reads: the layouts of Hugging Face, and every way in which a folder can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import make_config, make_weights, write_folder
from safetensors.numpy import save_file

from llmcomp.errors import Error
from llmcomp.models.checkpoint import Tensor, read_safetensors, stored_weights_sha256
from llmcomp.models.engines.exact import ExactModel, load_exact
from llmcomp.models.sources import find_model

TOKENS = np.arange(20).reshape(2, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = make_config()
    return write_folder(tmp_path / "model", config, make_weights(config))


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def join_file(path: Path, header: Any, data: bytes, pad: int = 0) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_properties(folder: Path) -> None:
    model = load_exact(folder, step=3)
    assert (model.name, model.step, model.engine, model.device, model.dtype) == ("model", 3, "exact", "cpu", "float32")
    assert (model.n_logits, model.vocab_size, model.context_length) == (61, 61, 48)
    weights = make_weights(make_config())
    assert model.n_params == sum(value.size for value in weights.values())
    digest = hashlib.sha256()
    named = {name.removeprefix("gpt_neox."): value for name, value in weights.items()}
    for name in sorted(named):
        digest.update(f"{name} float32 {named[name].shape}\n".encode() + named[name].tobytes())
    assert model.weights_sha256 == digest.hexdigest()


def test_tied_weights_count_once() -> None:
    config = make_config(tie_word_embeddings=True)
    weights = make_weights(config)
    model = ExactModel(config, {**weights, "lm_head.weight": weights["gpt_neox.embed_in.weight"]})
    assert model.n_params == sum(value.size for value in weights.values())


def test_a_tied_model_with_another_head_is_refused() -> None:
    """transformers 4 uses the embedding, transformers 5 the head: no guess is right."""
    config = make_config(tie_word_embeddings=True)
    weights = make_weights(config)
    embedding = weights["gpt_neox.embed_in.weight"]
    for head in (2 * embedding, embedding.astype(np.float16), embedding[:-1]):
        with pytest.raises(Error, match=r"a head that is not embed_in.weight, though tie_word_embeddings is true"):
            ExactModel(config, {**weights, "embed_out.weight": head})


def test_a_weight_that_is_there_twice_is_refused() -> None:
    config, weights = make_config(), make_weights(make_config())
    with pytest.raises(Error, match=r"embed_in.weight is the second tensor that means embed_in.weight"):
        ExactModel(config, {**weights, "embed_in.weight": 2 * weights["gpt_neox.embed_in.weight"]})


def test_the_fingerprint_tells_models_apart(folder: Path) -> None:
    model = load_exact(folder)
    assert model.fingerprint == load_exact(folder, name="other", step=5).fingerprint
    config, weights = make_config(), make_weights(make_config())
    assert ExactModel(config, weights).fingerprint == model.fingerprint
    seen = {model.fingerprint}
    seen.add(ExactModel({**config, "use_parallel_residual": False}, weights).fingerprint)
    seen.add(ExactModel({**config, "rotary_emb_base": 9999}, weights).fingerprint)
    seen.add(ExactModel(config, weights, vocab_size=60).fingerprint)
    weights["gpt_neox.final_layer_norm.bias"][0] += np.float32(1e-7)
    seen.add(ExactModel(config, weights).fingerprint)
    assert len(seen) == 5


def test_weights_are_mapped_not_copied(folder: Path) -> None:
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        base = tensor.data
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), name


def test_a_header_that_misaligns_the_data_is_read_all_the_same(folder: Path) -> None:
    expected = load_exact(folder).logits(TOKENS)
    header, data = split_file(folder / "model.safetensors")
    join_file(folder / "model.safetensors", header, data, pad=3 - len(json.dumps(header)) % 4)
    np.testing.assert_array_equal(load_exact(folder).logits(TOKENS), expected)


def test_shards(folder: Path) -> None:
    expected = load_exact(folder)
    weights = make_weights(make_config())
    names = sorted(weights)
    places = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(places.values())):
        save_file({name: weights[name] for name in names if places[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model = load_exact(folder)
    np.testing.assert_array_equal(model.logits(TOKENS), expected.logits(TOKENS))
    assert model.fingerprint == expected.fingerprint
    index.write_text(json.dumps({"weight_map": {**places, "extra": places[names[0]]}}))
    with pytest.raises(Error, match="lacks extra, which the index places there"):
        load_exact(folder)
    index.write_text(json.dumps({"weight_map": {**places, names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(Error, match="not in the folder itself"):
        load_exact(folder)
    index.write_text(json.dumps({"weight_map": {**places, names[0]: "model-00009-of-00003.safetensors"}}))
    with pytest.raises(Error, match=r"model-00009-of-00003.safetensors: No such file"):
        load_exact(folder)


def test_names_of_the_head_and_old_buffers(folder: Path) -> None:
    expected = load_exact(folder)
    weights = make_weights(make_config())
    weights["lm_head.weight"] = weights.pop("embed_out.weight")
    weights["gpt_neox.layers.0.attention.bias"] = np.tril(np.ones((1, 1, 48, 48), bool))
    weights["gpt_neox.layers.0.attention.masked_bias"] = np.array(-1e9, np.float32)
    weights["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = np.ones(1, np.float64)
    # In the place of the file, not into it: the first model's weights are mapped from there.
    save_file(weights, folder / "new")
    (folder / "new").replace(folder / "model.safetensors")
    model = load_exact(folder)
    np.testing.assert_array_equal(model.logits(TOKENS), expected.logits(TOKENS))
    assert model.fingerprint == expected.fingerprint


def test_spellings_of_the_rotary_positions(folder: Path) -> None:
    rewrite_config(folder, rotary_pct=0.5, rotary_emb_base=500.0)
    expected = load_exact(folder)
    spellings: list[dict[str, Any]] = [
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}},
        {"rope_theta": 500, "partial_rotary_factor": 0.5},
    ]
    for spelling in spellings:
        rewrite_config(folder, rotary_pct=..., rotary_emb_base=..., **spelling)
        assert load_exact(folder).fingerprint == expected.fingerprint


def test_given_weights_replace_those_of_the_folder(folder: Path) -> None:
    expected = load_exact(folder)
    (folder / "model.safetensors").unlink()
    model = load_exact(folder, weights=make_weights(make_config()))
    assert model.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', the exact engine computes gpt_neox, gpt2, llama,"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"head_dim": 7}, "head_dim is 7, expected hidden_size / num_attention_heads, 8"),
        ({"alibi": True}, "config.json says alibi = True, which the exact engine does not know"),
        ({"hidden_size": "24"}, "hidden_size is '24', expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 5}, "24 is no multiple of num_attention_heads 5"),
        ({"rotary_pct": 0.4}, "3 rotary dimensions, expected an even number"),
        ({"rotary_pct": 1.5}, "expected an even number|rotary"),
        ({"rotary_pct": True}, "rotary_pct is True, expected a number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "expected a number factor"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "type 'default' have a factor, which is not known"),
        ({"rope_scaling": [2.0]}, "expected an object"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"layer_norm_eps": -1.0}, "out of range"),
        ({"vocab_size": 62}, r"embed_in.weight has shape \[61, 24\], expected \[62, 24\]"),
        ({"num_hidden_layers": 3}, "the weights lack layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "tensors that the model does not, the first is layers.1.attention.dense.bias"),
        ({"attention_bias": False}, "tensors that the model does not"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(Error, match=message):
        load_exact(folder)


HOSTILE_VALUES = (
    *(2**63, 2**70, 10**400, -1, 0.5, 1e308, float("nan"), float("inf"), None, True, "1", "\0", [1], [[]], {"a": 1}),
)


@pytest.mark.parametrize("key", [key for key in make_config() if key != "model_type"])
def test_no_value_of_any_key_ends_in_another_error(folder: Path, key: str) -> None:
    n_refused = 0
    for value in HOSTILE_VALUES:
        rewrite_config(folder, **{key: value})
        try:
            load_exact(folder).logits(TOKENS)
        except Error as error:
            assert key in str(error) or "embed" in str(error) or "weight" in str(error) or "out of range" in str(error)
            n_refused += 1
    assert n_refused >= len(HOSTILE_VALUES) - 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"model_type": "gpt_neox", "x": ' + b"[" * 100_000, "nested too deep or too large"),
        (b'{"model_type": "gpt_neox", "model_type": "gpt_neox"}', "a name occurs twice"),
        (b'{"model_type": "\\ud800"}', "surrogates not allowed"),
        (b"\xff\xfe", "no valid JSON"),
    ],
)
def test_texts_that_are_no_configuration(folder: Path, text: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(text)
    for read in (load_exact, stored_weights_sha256, lambda folder: find_model(folder).read_config()):
        with pytest.raises(Error, match=message):
            read(folder)


def test_large_numbers_in_keys_that_nobody_reads_harm_nothing(folder: Path) -> None:
    expected = load_exact(folder).fingerprint
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        f'{{"max_length": 1{"0" * 400}, "task_specific_params": [0, Infinity], {config[1:]}'
    )
    assert load_exact(folder).fingerprint == expected


@pytest.mark.parametrize("place", ["a\0b", "\ud800", "", ".", "..", "/etc/passwd", "a/b", "x" * 300, 1, None, ["a"]])
def test_shards_with_names_that_are_none(folder: Path, place: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed_out.weight": place}}))
    with pytest.raises(Error, match=r"is not in the folder itself|surrogates not allowed"):
        load_exact(folder)


def test_weights_that_are_no_regular_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(Error, match=r"model.safetensors: expected a regular file"):
        load_exact(folder)


def test_a_model_that_memory_does_not_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: ExactModel) -> None:
        raise MemoryError

    monkeypatch.setattr(ExactModel, "_make_core", fail)
    with pytest.raises(Error, match="more memory than there is"):
        load_exact(folder)


def test_missing_and_foreign_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"config.json: No such file"):
        load_exact(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(Error, match="no valid JSON"):
        load_exact(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(Error, match="expected a JSON object"):
        load_exact(folder)
    rewrite = folder / "config.json"
    rewrite.write_text(json.dumps(make_config()))
    (folder / "model.safetensors").unlink()
    with pytest.raises(Error, match=r"model.safetensors: No such file"):
        load_exact(folder)


@pytest.mark.parametrize("n_bytes", [0, 7, 8, 100, 3000, -1])
def test_truncated_files(folder: Path, n_bytes: int) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, n_bytes if n_bytes >= 0 else path.stat().st_size + n_bytes)
    with pytest.raises(Error, match=r"truncated|no valid JSON"):
        load_exact(folder)


def test_headers_that_lie(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = split_file(path)
    name = "embed_out.weight"
    begin, end = header[name]["data_offsets"]
    lies: list[tuple[Any, str]] = [
        ({**header[name], "dtype": "F99"}, "F99"),
        ({**header[name], "dtype": "F64"}, "takes 5856 bytes, expected 11712"),
        ({**header[name], "dtype": "I32"}, "dtype I32, expected one of F32, F16, BF16"),
        ({**header[name], "shape": [61, 25]}, "takes 5856 bytes, expected 6100"),
        ({**header[name], "shape": [-61, -24]}, "shape is .-61, -24., expected an array of whole numbers"),
        ({**header[name], "shape": [True]}, "shape is .True., expected an array of whole numbers"),
        ({**header[name], "data_offsets": [end, begin]}, "truncated"),
        ({**header[name], "data_offsets": [begin]}, "data_offsets is .0., expected two offsets"),
        ({**header[name], "data_offsets": [len(data), len(data) + end - begin]}, "truncated"),
        ({**header[name], "data_offsets": [begin + 4, end + 4]}, "overlap"),
        ({**header[name], "shape": [0, 2**70], "data_offsets": [0, 0]}, "expected an array of whole numbers"),
        ({**header[name], "shape": [0, 2**62], "data_offsets": [0, 0]}, "expected fewer than 2.63 bytes"),
        ({**header[name], "shape": [2**32, 2**31, 0], "data_offsets": [0, 0]}, "expected fewer than 2.63 bytes"),
        ({**header[name], "shape": [1] * 65, "data_offsets": [0, 4]}, "expected at most 8 dimensions"),
        ({**header[name], "dtype": ["F32"]}, "dtype is .'F32'., expected one of BOOL"),
        ("no entry", "embed_out.weight is 'no entry', expected an object"),
    ]
    for lie, message in lies:
        join_file(path, {**header, name: lie}, data)
        with pytest.raises(Error, match=message):
            load_exact(folder)
    twice = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    join_file(path, twice.encode(), data)
    with pytest.raises(Error, match="a name occurs twice"):
        load_exact(folder)
    join_file(path, b"[" * 100_000, data)
    with pytest.raises(Error, match="no valid JSON"):
        load_exact(folder)
    join_file(path, b"3", data)
    with pytest.raises(Error, match="no JSON object"):
        load_exact(folder)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(Error, match="too few for a header"):
        load_exact(folder)


def test_arrays_of_other_types() -> None:
    config, weights = make_config(), make_weights(make_config())
    weights["embed_out.weight"] = weights["embed_out.weight"].astype(np.float64)
    with pytest.raises(Error, match=r"embed_out.weight has dtype float64"):
        ExactModel(config, weights)


def test_arrays_of_any_layout_give_the_same_model() -> None:
    config, weights = make_config(), make_weights(make_config())
    expected = ExactModel(config, weights)
    other: dict[str, np.ndarray | Tensor] = {}
    for i, (name, value) in enumerate(weights.items()):
        other[name] = [np.asfortranarray(value), value.astype(">f4"), Tensor(value, "float32")][i % 3]
    model = ExactModel(config, other)
    assert model.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(model.logits(TOKENS), expected.logits(TOKENS))


def test_vocab_size_is_checked() -> None:
    config, weights = make_config(), make_weights(make_config())
    assert ExactModel(config, weights, vocab_size=50).vocab_size == 50
    with pytest.raises(Error, match="vocab_size is 62, expected 1 to 61"):
        ExactModel(config, weights, vocab_size=62)
