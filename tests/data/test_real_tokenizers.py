"""The tokenizers of published models, on real data: what they encode decodes, and text is cut as in training."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from real_data import DATA

from llmcomp.data.datasets import load_dataset
from llmcomp.data.mappings import Encoded, get_mapping
from llmcomp.data.tokenizer_report import report
from llmcomp.data.tokenizers import Tokenizer

FAMILIES = DATA / "families"
NAMES = ("gpt2", "llama-2", "llama-3", "olmo-1", "olmo-2", "qwen2.5", "stories260K-hf")
needs_families = pytest.mark.skipif(not FAMILIES.is_dir(), reason=f"real tokenizers are not in {FAMILIES}")
pytestmark = needs_families
BYTES = get_mapping("bytes")


def path_of(name: str) -> Path:
    return FAMILIES / ("models" if name.endswith("-hf") else "tokenizers") / name / "tokenizer.json"


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_file(path_of(request.param))


def check_inverse(tokenizer: Tokenizer, data: bytes) -> Encoded:
    coded = BYTES.encode(data, tokenizer)
    assert len(coded.tokens) <= len(data)
    assert BYTES.decode(coded.tokens, coded.side, coded.n_bytes, tokenizer) == data
    return coded


def test_files_come_back(tokenizer: Tokenizer) -> None:
    text = (DATA / "enwik8.head").read_bytes()[:1_000_000]
    check_inverse(tokenizer, text)
    check_inverse(tokenizer, (FAMILIES / "texts/alice29.txt").read_bytes())
    for spec in ("imagenet-val", "librispeech"):
        name = "image" if spec.startswith("image") else "speech"
        for chunk in load_dataset(f"{name}={DATA}/{spec}", 24, progress=False).chunks:
            check_inverse(tokenizer, chunk)


def test_bytes_pairs_and_invalid_utf8_come_back(tokenizer: Tokenizer) -> None:
    for byte in range(256):
        check_inverse(tokenizer, bytes([byte]))
    for first in range(256):
        check_inverse(tokenizer, b"".join(bytes((first, second)) for second in range(256)))
    for strange in (
        b"\xc0\x80",
        b"\xed\xa0\x80\xed\xb0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf8\x88\x80\x80\x80",
        b"a\xe4\xbd",
    ):
        check_inverse(tokenizer, strange)
        check_inverse(tokenizer, b"The other theory " + strange + b" and more of it")


def test_its_own_special_tokens_are_text(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> None:
    description = json.loads(path_of(request.node.callspec.params["tokenizer"]).read_bytes())
    special = {token["id"] for token in description["added_tokens"] if token["special"]}
    contents = [token["content"] for token in description["added_tokens"]]
    for text in (*contents, "".join(contents), " ".join(contents), "\u2581".join(contents)):
        assert not special & set(check_inverse(tokenizer, text.encode()).tokens.tolist())
        check_inverse(tokenizer, b"\xff" + text.encode() + b"\xff")


def random_text(draw: random.Random) -> str:
    """Of one to twenty characters out of ASCII, one block, all of Unicode, and what tokenizers write spaces as."""
    block = draw.randrange(0x1100) * 0x100
    ranges = ((0x20, 0x7F), (block, block + 0x100), (0, 0x110000), (0x2580, 0x2583), (0, 0x21))
    codes = [draw.randrange(*draw.choice(ranges)) for _ in range(draw.randrange(1, 21))]
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize("n_texts", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_unicode_comes_back(tokenizer: Tokenizer, n_texts: int) -> None:
    draw = random.Random(n_texts)
    for _ in range(n_texts):
        check_inverse(tokenizer, random_text(draw).encode())


VECTORS = {
    "gpt-2": "gpt2",
    "llama-bpe": "llama-3",
    "llama-spm": "llama-2",
    "phi-3": "llama-2",
    "qwen2": "qwen2.5",
}


@pytest.mark.parametrize("name", VECTORS)
def test_ids_of_llama_cpp_s_vectors(name: str) -> None:
    """Equal, but where the space before text would be a token by itself before one-byte tokens: there it is left out,
    for there would be more tokens than bytes."""
    path = FAMILIES / f"vectors/ggml-vocab-{name}.gguf"
    texts = path.with_suffix(".gguf.inp").read_bytes().split(b"\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")[: len(texts)]
    tokenizer = Tokenizer.from_file(path_of(VECTORS[name]))
    n_left_out = 0
    for text, line in zip(texts, lines, strict=True):
        expected = [int(token) for token in line.split()]
        found = check_inverse(tokenizer, text).tokens.tolist()
        if len(expected) > len(text):
            assert tokenizer.token_bytes(expected[0]) == b" "
            expected = expected[1:]
            n_left_out += 1
        assert found == expected, text
    assert n_left_out == (14 if VECTORS[name] == "llama-2" else 0)


def test_text_is_cut_as_in_training(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> None:
    library = tokenizers.Tokenizer.from_file(str(path_of(request.node.callspec.params["tokenizer"])))
    text = unicodedata.normalize("NFC", (DATA / "enwik8.head").read_bytes()[:300_000].decode("utf-8", "ignore"))
    expected = library.encode(text, add_special_tokens=False).ids
    assert BYTES.encode(text.encode(), tokenizer).tokens.tolist() == expected


def test_the_share_that_is_cut_as_in_training(tokenizer: Tokenizer) -> None:
    text = (FAMILIES / "texts/alice29.txt").read_text()[:40_000]
    found = report(tokenizer, text)
    assert found.share_as_trained == 1.0
    if "NFC" in found.left_out:
        assert report(tokenizer, unicodedata.normalize("NFD", "Größe für Brücke é " * 200)).share_as_trained < 0.9


def test_fingerprints_that_archives_may_hold(pythia_tokenizer: Tokenizer) -> None:
    """Of before byte fallback was read."""
    expected = {
        "gpt2": "5f30a625",
        "llama-3": "84285808",
        "olmo-1": "38ba8f78",
        "olmo-2": "41212ad6",
        "qwen2.5": "61eed060",
    }
    assert pythia_tokenizer.fingerprint.startswith("bc184468")
    for name, start in expected.items():
        assert Tokenizer.from_file(path_of(name)).fingerprint.startswith(start)


def with_tokenizer_model(name: str, folder: Path) -> Tokenizer:
    shutil.copy(path_of(name).with_name("tokenizer.model"), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return Tokenizer.from_file(folder / "tokenizer.model")


def test_tokenizer_model_of_sentencepiece(tmp_path: Path) -> None:
    """The same vocabulary and merges as those of the file that was published beside it."""
    tokenizer = with_tokenizer_model("llama-2", tmp_path)
    expected = Tokenizer.from_file(path_of("llama-2"))
    assert (tokenizer.bos_token, tokenizer.prefix, tokenizer.left_out) == (1, b" ", ())
    found, published = (json.loads(t.__reduce__()[1][0])["model"] for t in (tokenizer, expected))
    assert found["vocab"] == published["vocab"]
    assert sorted(map(" ".join, found["merges"])) == sorted(published["merges"])
    text = (DATA / "enwik8.head").read_bytes()[:200_000]
    for data in (text, text[1:50], np.random.default_rng(1).bytes(5000)):
        assert check_inverse(tokenizer, data).tokens.tolist() == check_inverse(expected, data).tokens.tolist()
    assert tokenizer.encode_text("a  b").tolist() == expected.encode_text("a  b").tolist()


def test_tokenizer_model_of_ranks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("tiktoken")
    tokenizer, expected = with_tokenizer_model("llama-3", tmp_path), Tokenizer.from_file(path_of("llama-3"))
    for data in (b"The other theory, \xc3\xa9t\xc3\xa9.\n" * 9, np.random.default_rng(1).bytes(500)):
        assert check_inverse(tokenizer, data).tokens.tolist() == check_inverse(expected, data).tokens.tolist()
