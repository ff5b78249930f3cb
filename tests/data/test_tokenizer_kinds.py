"""Tokenizers of characters with byte fallback, tokens that are taken by others, start tokens, forms of files."""

from __future__ import annotations

import builtins
import itertools
import json
import random
import re
import struct
import sys
from pathlib import Path
from typing import Any

import archive_oracle
import engine_models
import format_oracle
import golden_archives
import numpy as np
import pytest
import small_tokenizers
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import BYTE_TEXTS, CORPUS, SPACE, added, as_json
from tiny_models import TinyModel

import llmcomp
from llmcomp.data.mappings import MAPPINGS, get_mapping
from llmcomp.data.start_token import StartHints
from llmcomp.data.tokenizer_report import report
from llmcomp.data.tokenizers import AnyTokenizer, ByteTokenizer, Tokenizer
from llmcomp.errors import CorruptArchive, Error
from llmcomp.pico import tokenizer_path

DESCRIPTIONS = small_tokenizers.variants()
TOKENIZERS = {name: Tokenizer.from_bytes(as_json(found)) for name, found in DESCRIPTIONS.items()}
LEGACY = TOKENIZERS["legacy"]
WITH_PREFIX = {"legacy", "first", "split", "NFKC"}

NASTY = {
    "empty": b"",
    "space": b" ",
    "spaces": b"   ",
    "line": b"\n",
    "lines": b"\n\n a\n",
    "all 256": bytes(range(256)),
    "all pairs": b"".join(bytes((a, b)) for a in range(256) for b in range(256)),
    "space character": f"{SPACE} a{SPACE}b {SPACE}{SPACE} the{SPACE}".encode(),
    "space character in binary": b"\xff" + f"the{SPACE}re".encode() + b"\x80",
    "byte tokens": b"<0x0A> <0xFF><0x20>",
    "special tokens": b"<s> the </s><unk><mask> <h1>x\n\n\n",
    "special in binary": b"\xff\xfe<s>\x80</s>\xff",
    "cut character": "für die Brücke, 你好".encode()[:-1],
    "surrogates": b"\xed\xa0\x80 the other \xf4\x90\x80\x80",
    "no text before text": b"\x80 the other theory",
    "NFC-unstable": "e\u0301 \u212b \ufb01n \u1e9b\u0323".encode(),
    "text": "".join(CORPUS).encode(),
}


def check_inverse(mapping: str, tokenizer: AnyTokenizer, data: bytes) -> np.ndarray:
    coded = get_mapping(mapping).encode(data, tokenizer)
    assert len(coded.side) == -(-coded.side_bits // 8)
    if mapping == "bytes":
        assert len(coded.tokens) <= len(data)
        assert coded.side_bits <= 1
    assert get_mapping(mapping).decode(coded.tokens, coded.side, coded.n_bytes, tokenizer) == data
    return coded.tokens


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("data", NASTY.values(), ids=NASTY)
def test_any_bytes_come_back(mapping: str, name: str, data: bytes) -> None:
    check_inverse(mapping, TOKENIZERS[name], data)


PARTS = [SPACE.encode(), b"<0x0A>", b"<s>", b"\n\n", b"  ", b"\xff", "ÿ".encode(), b"the other", CORPUS[2].encode()]
mixed_bytes = st.lists(
    st.one_of(st.binary(max_size=20), st.text(max_size=20).map(str.encode), st.sampled_from(PARTS)), max_size=8
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(data=mixed_bytes, name=st.sampled_from(list(TOKENIZERS)))
def test_any_bytes_come_back_drawn(data: bytes, name: str) -> None:
    check_inverse("bytes", TOKENIZERS[name], data)


def library(name: str, **changes: Any) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer.from_str(json.dumps(DESCRIPTIONS[name] | changes))
    found.encode_special_tokens = True
    return found


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"NFKC"}))
@pytest.mark.parametrize("text", [*CORPUS[:3], "The other", "theory, 你好 ÿ", "the x  y", "the\n\nb"])
def test_text_is_cut_as_in_training(name: str, text: str) -> None:
    expected = library(name).encode(text, add_special_tokens=False).ids
    found = get_mapping("bytes").encode(text.encode(), TOKENIZERS[name])
    assert found.tokens.tolist() == expected
    assert found.side == (b"\x80" if name in WITH_PREFIX else b"")


def test_a_space_before_text_where_the_file_says_so() -> None:
    """Metaspace puts none before a space that is there; a normaliser that prepends always does."""
    sides = {name: get_mapping("bytes").encode(b" the other", TOKENIZERS[name]).side for name in WITH_PREFIX}
    assert sides == {"legacy": b"\x80", "NFKC": b"\x80", "first": b"\0", "split": b"\0"}
    for name in ("legacy", "first"):
        expected = library(name).encode(" the other", add_special_tokens=False).ids
        assert check_inverse("bytes", TOKENIZERS[name], b" the other").tolist() == expected
    assert all(TOKENIZERS[name].prefix == b" " * (name in WITH_PREFIX) for name in TOKENIZERS)


@pytest.mark.parametrize("data", [b"\n", b"\n\t", b"\x01", "你".encode(), b"\x80", b"\xff the other theory", b""])
def test_no_space_where_it_would_cost_a_token_too_many_or_no_text_begins(data: bytes) -> None:
    coded = get_mapping("bytes").encode(data, LEGACY)
    assert (coded.side, coded.side_bits) == (b"\0", 1)
    assert LEGACY.decode_bytes(coded.tokens) == data


def test_the_side_bit_is_checked() -> None:
    coded = get_mapping("bytes").encode(b"the other", LEGACY)
    assert coded.side == b"\x80"
    for side in (b"", b"\x40", b"\x80\x80"):
        with pytest.raises(Error, match="expected 00 or 80"):
            get_mapping("bytes").decode(coded.tokens, side, 9, LEGACY)
    with pytest.raises(Error, match="expected b' '"):
        get_mapping("bytes").decode(LEGACY.encode_bytes(b"xthe other"), b"\x80", 9, LEGACY)
    with pytest.raises(Error, match="found 10 bytes, expected 9"):
        get_mapping("bytes").decode(coded.tokens, b"\0", 9, LEGACY)


def bpe_by_rank(characters: list[str]) -> list[str]:
    """Sennrich et al. 2016: the pair of the lowest rank first, the leftmost of equals."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(DESCRIPTIONS["legacy"]["model"]["merges"])}
    parts = list(characters)
    while True:
        found = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not found:
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_raw_bytes_are_runs_of_characters_and_byte_tokens() -> None:
    vocab = DESCRIPTIONS["legacy"]["model"]["vocab"]
    noise = random.Random(3).randbytes(600)
    for data in (noise, b"\xffthe\x80 and\xc3\xff", b"\x80" + "ÿ".encode() + b"\x00 r"):
        expected: list[str] = []
        for part in re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
            if re.fullmatch("[\udc80-\udcff]", part):
                expected.append(BYTE_TEXTS[ord(part) - 0xDC00])
                continue
            for piece in bpe_by_rank([SPACE if c == " " else c for c in part]):
                # A character that the vocabulary lacks.
                expected += [piece] if piece in vocab else [BYTE_TEXTS[byte] for byte in piece.encode()]
        assert not any(len(c) >= 8 for c in re.split("[\udc80-\udcff]", data.decode("utf-8", "surrogateescape")))
        assert LEGACY.encode_bytes(data).tolist() == [vocab[text] for text in expected]


def test_a_text_that_spells_a_byte_token_or_a_special_one() -> None:
    """Converted vocabularies can have merges that lead to the names of bytes and to <s>."""
    description = json.loads(as_json(DESCRIPTIONS["legacy"]))
    model = description["model"]
    for left, right in (("<", "0"), ("<0", "x"), ("<0x", "0"), ("<0x0", "A"), ("<0x0A", ">"), ("<", "s"), ("<s", ">")):
        for text in (left, right, left + right):
            model["vocab"].setdefault(text, len(model["vocab"]))
        model["merges"].append([left, right])
    raw = tokenizers.Tokenizer.from_str(json.dumps(description))
    raw.encode_special_tokens = True
    assert model["vocab"]["<0x0A>"] in raw.encode("a <0x0A>", add_special_tokens=False).ids
    tokenizer = Tokenizer.from_bytes(as_json(description))
    for data in (b"a <0x0A> b", b"<s>", b"\xff<0x0A><s>", b"one <s> and <0x0A>"):
        tokens = check_inverse("bytes", tokenizer, data)
        assert not {1, 3 + 10} & set(tokens.tolist())


def byte_level(**changes: Any) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(tokenizer_path().read_bytes())
    return description | changes


def test_an_added_token_may_have_the_id_of_a_byte() -> None:
    """Its other bytes still come back, and those of the byte are refused by name instead of coming back as others."""
    description = byte_level()
    vocab = description["model"]["vocab"]
    description["added_tokens"] += [
        added(vocab["é"], "é", special=False),
        added(vocab["!"], "!", special=True),
    ]
    tokenizer = Tokenizer.from_bytes(as_json(description))
    assert tokenizer.token_bytes(vocab["é"]) == "é".encode()
    check_inverse("bytes", tokenizer, "the café".encode())
    check_inverse("bytes", tokenizer, b"\xc3\xff\x80 the other")
    with pytest.raises(Error, match=r"no token for byte 0xe9: added token é has the id \d+ of é"):
        tokenizer.encode_bytes(b"\xe9\xff")
    with pytest.raises(Error, match=r"no token for byte 0x21: added token ! has the id \d+ of !"):
        tokenizer.encode_bytes(b"the other!")


def test_an_added_token_may_have_the_id_of_a_merge() -> None:
    description = byte_level()
    vocab = description["model"]["vocab"]
    token = vocab["th"]
    description["added_tokens"].append(added(token, "th", special=True))
    tokenizer = Tokenizer.from_bytes(as_json(description))
    for data in (b"th", b"the other theory", b"\xffth\xffthe"):
        assert token not in check_inverse("bytes", tokenizer, data)


def test_a_stand_in_is_not_spelled_with_a_byte_that_is_taken() -> None:
    """FF is lacking, the token of ÿ (C3 BF) stands in for it, and the id of byte BF is taken."""
    description = golden_archives.tokenizer_description(b"\xff")
    description["added_tokens"].append(added(description["model"]["vocab"]["¿"], "¿", special=False))
    tokenizer = Tokenizer.from_bytes(as_json(description))
    check_inverse("bytes", tokenizer, b"\xff the other")
    check_inverse("bytes", tokenizer, "ÿ".encode())
    with pytest.raises(Error, match="no token for byte 0xbf: added token ¿ has the id"):
        tokenizer.encode_bytes("ÿ".encode() + b"\xff", stand_ins=True)


@pytest.mark.parametrize(
    ("changes", "hints", "expected", "why"),
    [
        ({"post_processor": None}, StartHints(), 0, "by its name"),
        ({}, StartHints(bos="<|padding|>"), 1, "tokenizer_config.json"),
        ({}, StartHints(bos="not there", eos="<|padding|>"), 0, "by its name"),
    ],
)
def test_start_tokens_of_byte_level(changes: dict[str, Any], hints: StartHints, expected: int, why: str) -> None:
    description = byte_level(**changes)
    content = {token["content"]: token["id"] for token in description["added_tokens"]}
    if "<|padding|>" not in content:
        description["added_tokens"].append(added(len(description["model"]["vocab"]), "<|padding|>", special=True))
    expected = expected and description["added_tokens"][-1]["id"]
    tokenizer = Tokenizer(as_json(description), "x", hints)
    assert (tokenizer.bos_token, why in tokenizer.bos_reason) == (expected, True)


@pytest.mark.parametrize(
    ("names", "template", "hints", "expected", "why"),
    [
        (["<unk>", "<s>", "</s>"], True, StartHints(bos="</s>", bos_id=2), 1, "before every text"),
        (["<unk>", "<s>", "</s>"], False, StartHints(bos="</s>"), 2, "bos_token of tokenizer_config"),
        (["<unk>", "<x>", "</s>"], False, StartHints(bos_id=1, eos="</s>"), 1, "bos_token_id of config.json"),
        (["<unk>", "<x>", "</s>"], False, StartHints(bos_id=300, eos="</s>"), 2, "stands in, the end token"),
        (["<unk>", "<x>", "</s>"], False, StartHints(eos_id=2), 2, "stands in, the end token"),
        (["<unk>", "<x>", "</s>"], False, StartHints(), None, "token 0 stands in"),
    ],
)
def test_start_tokens(names: list[str], template: bool, hints: StartHints, expected: int | None, why: str) -> None:
    description = json.loads(as_json(DESCRIPTIONS["legacy"]).replace(b"<s>", names[1].encode()))
    if not template:
        description["post_processor"] = None
    tokenizer = Tokenizer(as_json(description), "x", hints)
    assert (tokenizer.bos_token, why in tokenizer.bos_reason) == (expected, True)


def test_refused_by_name() -> None:
    unigram = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}}
    lacking = json.loads(as_json(DESCRIPTIONS["never"]))
    del lacking["model"]["vocab"]["<0x8F>"]
    two = DESCRIPTIONS["legacy"] | {"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}
    word_piece = {"type": "WordPiece", "vocab": {"a": 0}}
    for content, message in (
        (unigram, "Unigram, expected BPE"),
        ({"model": word_piece}, "WordPiece, expected BPE.*drops spaces"),
        (lacking, "no token <0x8F>"),
        (two, "spaces are written as"),
    ):
        with pytest.raises(Error, match=message):
            Tokenizer.from_bytes(as_json(content))


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_format_md_says_of_tokens_and_fingerprints(name: str) -> None:
    description, tokenizer = DESCRIPTIONS[name], TOKENIZERS[name]
    table, stand_ins = archive_oracle.vocabulary(description)
    assert not stand_ins
    assert not tokenizer.needs_stand_ins(bytes(range(256)))
    assert len(table) == tokenizer.vocab_size
    for token, raw in enumerate(table):
        if raw is None:
            with pytest.raises(Error, match="stands for no bytes"):
                tokenizer.decode_bytes([token])
        else:
            assert tokenizer.token_bytes(token) == raw
    assert bool(tokenizer.prefix) == archive_oracle.has_dummy_space(description)
    assert tokenizer.fingerprint == format_oracle.tokenizer_fingerprint(description)


def test_fingerprints_tell_the_kinds_apart() -> None:
    assert len({tokenizer.fingerprint for tokenizer in TOKENIZERS.values()}) == len(TOKENIZERS) - 2
    # What is left out, and how an equal rule is written, decide no tokens.
    assert TOKENIZERS["NFKC"].fingerprint == LEGACY.fingerprint
    assert TOKENIZERS["first"].fingerprint == TOKENIZERS["split"].fingerprint


@pytest.mark.parametrize("name", ["legacy", "first", "gemma", "plain spaces"])
def test_archives(name: str) -> None:
    description, tokenizer = DESCRIPTIONS[name], TOKENIZERS[name]
    model = TinyModel(tokenizer=tokenizer, name=f"tiny-{name}", fingerprint="00" * 32)
    table, _ = archive_oracle.vocabulary(description)
    contents = [b"The other theory, then. " * 20, bytes(range(256)) * 2, b"\n", f"{SPACE}a\n".encode() * 40]
    for content in (*contents, b"".join(contents)):
        for mapping in MAPPINGS:
            blob = llmcomp.compress(content, model, mapping=mapping, overlap=4, segment_bytes=100, stock=False)
            assert llmcomp.decompress(blob, model) == content
            steps = lambda: _step(model)  # noqa: E731
            is_spaced = archive_oracle.has_dummy_space(description)
            assert archive_oracle.decode(blob, table, {}, steps, dummy_space=is_spaced) == content


def _step(model: TinyModel) -> Any:
    session = model.session(1)
    return lambda token: session.step(np.array([token]))[0]


def test_a_dummy_space_that_is_none_is_a_damaged_payload() -> None:
    from llmcomp.codec.segments import SegmentCodec

    codec = SegmentCodec(TinyModel(tokenizer=LEGACY), overlap=4)
    (coded,) = codec.encode([b"the other"])
    assert coded.payload[:1] == b"\x80"
    assert codec.decode([coded.payload], [9]) == [b"the other"]
    (plain,) = codec.encode([b"\xffthe other"])
    assert plain.payload[:1] == b"\0"
    with pytest.raises(CorruptArchive):
        codec.decode([b"\x80" + plain.payload[1:]], [9])
    steps: list[int] = []
    assert codec.decode([coded.payload], [9], steps.append) == [b"the other"]
    assert sum(steps) == 9


def test_report() -> None:
    found = report(LEGACY, CORPUS[0])
    assert found.share_as_trained == 1.0
    assert found.prefix == b" "
    assert found.start.startswith("<s>")
    nfkc = report(TOKENIZERS["NFKC"], "the \ufb01ne caf\u00e9 " * 20)
    assert nfkc.left_out == ("NFKC",)
    assert 0.3 < nfkc.share_as_trained < 1
    assert any("NFKC" in line for line in nfkc.lines())
    bytes_report = report(ByteTokenizer(), "abc")
    assert (bytes_report.share_as_trained, bytes_report.n_tokens, bytes_report.kind) == (1.0, 3, "bytes")
    assert "100.00% of the tokens" in report(Tokenizer.from_file(tokenizer_path())).lines()[-1]


# Forms of files, and folders without any.


def model_folder(folder: Path, n_logits: int, **config: Any) -> Path:
    found = engine_models.make_config(vocab_size=n_logits)
    engine_models.write_folder(folder, found, engine_models.make_weights(found))
    (folder / "config.json").write_text(json.dumps({**found, **config}))
    return folder


def write_gpt2_form(folder: Path, description: dict[str, Any], **settings_of: Any) -> None:
    model = description["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of))


@pytest.mark.parametrize("engine", ["exact", "torch"])
def test_vocab_and_merges(tmp_path: Path, engine: str) -> None:
    if engine == "torch":
        pytest.importorskip("transformers")
    description = byte_level()
    folder = model_folder(tmp_path / "model", 1024)
    write_gpt2_form(folder, description, tokenizer_class="GPT2Tokenizer", bos_token="<|endoftext|>")
    tokenizer = llmcomp.load_model(str(folder), engine=engine).tokenizer
    own = Tokenizer.from_file(tokenizer_path())
    for data in (CORPUS[0].encode(), bytes(range(256))):
        stand_ins = own.needs_stand_ins(data)
        assert tokenizer.encode_bytes(data, stand_ins).tolist() == own.encode_bytes(data, stand_ins).tolist()
    assert tokenizer.bos_token == own.bos_token
    assert "bos_token of tokenizer_config.json" in tokenizer.bos_reason


def test_a_folder_without_a_tokenizer_is_no_byte_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", 300)
    model = llmcomp.load_model(str(folder))
    with pytest.raises(Error, match=re.escape(str(folder)) + r' holds no tokenizer .* 300 tokens.*tokenizer="bytes"'):
        _ = model.tokenizer
    with pytest.raises(Error, match="holds no tokenizer"):
        llmcomp.compress(b"abc", model)
    assert model.logits(np.zeros((1, 2), np.int32)).shape == (1, 2, 300)
    asked = llmcomp.load_model(str(folder), tokenizer="bytes")
    assert isinstance(asked.tokenizer, ByteTokenizer)
    assert asked.fingerprint == model.fingerprint
    assert llmcomp.decompress(llmcomp.compress(b"abc", asked), asked) == b"abc"


@pytest.mark.parametrize("n_logits", [256, 257, 258])
def test_a_folder_without_a_tokenizer_and_a_vocabulary_of_bytes(tmp_path: Path, n_logits: int) -> None:
    model = llmcomp.load_model(str(model_folder(tmp_path / "model", n_logits)))
    assert isinstance(model.tokenizer, ByteTokenizer)
    assert llmcomp.decompress(llmcomp.compress(b"abc", model), model) == b"abc"


def test_a_tokenizer_that_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", 1100)
    for tokenizer in (tokenizer_path(), tokenizer_path().parent):
        model = llmcomp.load_model(str(folder), tokenizer=tokenizer)
        assert model.tokenizer.fingerprint == Tokenizer.from_file(tokenizer_path()).fingerprint
    with pytest.raises(Error, match="no tokenizer there"):
        llmcomp.load_model(str(folder), tokenizer=tmp_path / "nowhere")
    assert isinstance(llmcomp.load_model("pico-13k", tokenizer="bytes").tokenizer, ByteTokenizer)


def test_a_form_that_needs_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model", 300)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    model = llmcomp.load_model(str(folder))
    real = builtins.__import__

    def no_transformers(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", no_transformers)
        patched.delitem(sys.modules, "llmcomp.data.tokenizer_conversion", raising=False)
        with pytest.raises(Error, match=r"tokenizer\.model: .*transformers.*pip install"):
            _ = model.tokenizer
    pytest.importorskip("transformers")
    with pytest.raises(Error, match=r"tokenizer\.model: transformers cannot read this tokenizer"):
        _ = llmcomp.load_model(str(folder)).tokenizer


def field(number: int, value: int | bytes) -> bytes:
    """Of a protocol buffer; lengths and numbers below 2^14."""
    head = number << 3 | (0 if isinstance(value, int) else 2)
    n = value if isinstance(value, int) else len(value)
    size = bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])
    return bytes([head]) + size + (b"" if isinstance(value, int) else value)


def sentencepiece_file(description: dict[str, Any], algorithm: int = 2, **normalizer: int) -> bytes:
    """The tokenizer as SentencePiece writes it: scores fall with the ids, which are in the order of merging."""
    content = b""
    for text, token in sorted(description["model"]["vocab"].items(), key=lambda item: item[1]):
        kind = {"<unk>": 2, "<s>": 3, "</s>": 3}.get(text, 6 if text in BYTE_TEXTS else 1)
        content += field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -token) + field(3, kind))
    content += field(2, field(3, algorithm))
    return content + field(3, b"".join(field(int(number[1:]), value) for number, value in normalizer.items()))


def test_tokenizer_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", 500, model_type="gpt_neox")
    description = DESCRIPTIONS["legacy"]
    (folder / "tokenizer.model").write_bytes(sentencepiece_file(description, _4=0))
    tokenizer = llmcomp.load_model(str(folder)).tokenizer
    assert (tokenizer.bos_token, tokenizer.prefix, tokenizer.left_out) == (1, b" ", ())
    for data in NASTY.values():
        assert check_inverse("bytes", tokenizer, data).tolist() == check_inverse("bytes", LEGACY, data).tolist()
    (folder / "tokenizer.model").write_bytes(sentencepiece_file(description, _3=0))
    assert Tokenizer.from_file(folder / "tokenizer.model").prefix == b""
    assert Tokenizer.from_file(folder / "tokenizer.model").left_out == ("Replace",)
    (folder / "tokenizer.model").write_bytes(sentencepiece_file(description, 1))
    with pytest.raises(Error, match=r"tokenizer\.model: the tokenizer's model is Unigram, expected BPE"):
        Tokenizer.from_file(folder / "tokenizer.model")


def test_a_damaged_tokenizer_model(tmp_path: Path) -> None:
    whole, path = sentencepiece_file(DESCRIPTIONS["legacy"]), tmp_path / "tokenizer.model"
    draw = random.Random(5)
    cut = [whole[:n] for n in (2, 9, len(whole) // 2, len(whole) - 1)]
    flipped = [bytearray(whole) for _ in range(60)]
    for content in flipped:
        content[draw.randrange(1, len(content))] ^= 1 << draw.randrange(8)
    for content in (*cut, *flipped):
        path.write_bytes(content)
        try:
            tokenizer = Tokenizer.from_file(path)
        except Error as error:
            assert "tokenizer.model: " in str(error)
        else:
            check_inverse("bytes", tokenizer, b"the other \xff theory")
