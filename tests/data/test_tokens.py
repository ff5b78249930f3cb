"""Bytes <-> tokens: exact inverses, the tokens the model was trained on, the published tokenisation."""

import itertools
import json
import pickle
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import DATA, needs_data
from tokenizers import models, normalizers, pre_tokenizers, trainers

from llmcomp.data.datasets import load_dataset
from llmcomp.data.mappings import MAPPINGS, get_mapping
from llmcomp.data.tokenizers import MAX_PIECE_SYMBOLS, MIN_TEXT_CHARACTERS, AnyTokenizer, ByteTokenizer, Tokenizer
from llmcomp.errors import Error
from llmcomp.scoring.published import PublishedTokens

# The 13 bytes that UTF-8 never uses (RFC 3629, section 1); Pythia's vocabulary lacks them.
NOT_IN_UTF8 = [0xC0, 0xC1, *range(0xF5, 0x100)]

CORPUS = [
    "The naïve café costs 12 € today; der Zug fährt über die Brücke für Größe.\n",
    "for i in range(10):\n        print(i)   # été, señor, ação, mañana, þæt, ÿ\n",
    "Привет, мир! 你好 世界。 The other theory then gathers there, and another one.\n",
    "\n".join("éüöøõùúûýáóíñç") + "\n",
] * 3


def make_tokenizer_json(lacking: list[int] | None = None) -> bytes:
    """A tokenizer of the kind that Pythia has: NFC, special tokens in the vocabulary, runs of spaces added behind."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    alphabet -= {gpt2_symbols()[byte] for byte in lacking or []}
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(alphabet),
        special_tokens=["<|endoftext|>", "<|padding|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    return tokenizer.to_str().encode()


def gpt2_symbols() -> list[str]:
    """The byte alphabet by its order: ByteLevel writes each code point's bytes; one-byte ones are read back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    assert sorted(symbols.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return [symbols[byte] for byte in range(256)]


FULL_JSON = make_tokenizer_json()
LACKING_JSON = make_tokenizer_json(NOT_IN_UTF8)
FULL, LACKING = Tokenizer.from_bytes(FULL_JSON), Tokenizer.from_bytes(LACKING_JSON)
TOKENIZERS: dict[str, AnyTokenizer] = {"full": FULL, "lacking": LACKING, "bytes": ByteTokenizer()}

NASTY = {
    "empty": b"",
    "one": b"a",
    "all 256": bytes(range(256)),
    "all pairs": b"".join(bytes((a, b)) for a in range(256) for b in range(256)),
    "NFC-unstable": "e\u0301 A\u030a \u212b \u1e9b\u0323 \uac00 \u1100\u1161".encode(),
    "special tokens": b"<|endoftext|> a <|padding|><|endoftext|>",
    "special in binary": b"\xff\xfe<|endoftext|>\x80<|padding|>\xff",
    "runs of spaces": b"x" + b" " * 31 + b"y  z" + b" " * 9,
    "line ends": b"a\r\nb\n\n\n\tc\r",
    "cut character": "für die Brücke, 你好".encode()[:-1],
    "overlong": b"\xc0\x80 abcdefgh \xe0\x80\x80 \xed\xa0\x80 \xf4\x90\x80\x80 \xf8\x88\x80\x80\x80",
    "latin-1": "Die Brücke über den Fluß hört auf, né à côté".encode("latin-1"),
    "two-byte characters and FF": "é".encode() * 5 + b"\xff" + "öüéõøùúûý".encode() * 3 + b"\xc3\xbc\xc3",
    "private use": "\ue0ff\ue0c0\uf8ff".encode() + b"\xff",
}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("data", NASTY.values(), ids=NASTY)
def test_mappings_are_exact_inverses(mapping: str, tokenizer: AnyTokenizer, data: bytes) -> None:
    check_inverse(mapping, tokenizer, data)


def check_inverse(mapping: str, tokenizer: AnyTokenizer, data: bytes) -> None:
    coded = get_mapping(mapping).encode(data, tokenizer)
    assert coded.tokens.dtype == np.int32
    assert coded.tokens.ndim == 1
    assert coded.n_bytes == len(data)
    assert len(coded.side) == -(-coded.side_bits // 8)
    assert coded.side_bits == (len(data) if mapping in ("shift", "ascii") else coded.side_bits)
    if len(coded.tokens):
        assert coded.tokens.min() >= 0
        assert coded.tokens.max() < tokenizer.vocab_size
    if mapping == "bytes":
        assert len(coded.tokens) <= len(data)
        assert coded.side_bits <= 1
    assert get_mapping(mapping).decode(coded.tokens, coded.side, coded.n_bytes, tokenizer) == data


PARTS = [b"<|endoftext|>", b" " * 12, b"\xff\xff", "é".encode(), b"\xc3", *(line.encode() for line in CORPUS[:3])]
mixed_bytes = st.lists(
    st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode), st.sampled_from(PARTS)), max_size=8
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(data=mixed_bytes, mapping=st.sampled_from(MAPPINGS), tokenizer=st.sampled_from(list(TOKENIZERS)))
def test_mappings_are_exact_inverses_of_anything(data: bytes, mapping: str, tokenizer: str) -> None:
    check_inverse(mapping, TOKENIZERS[tokenizer], data)


# An independent statement of the mapping "bytes": UTF-8 by the Unicode standard's table 3-7, BPE by rank.
WELL_FORMED = (
    rb"(?:[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})"
)


def stretches(data: bytes) -> Iterator[tuple[bool, bytes]]:
    if re.fullmatch(WELL_FORMED + rb"*", data):
        if data:
            yield True, data
        return
    at = 0
    raw = b""
    while at < len(data):
        text = re.compile(WELL_FORMED + rb"+").match(data, at)
        if text and len(text.group().decode()) >= MIN_TEXT_CHARACTERS:
            if raw:
                yield False, raw
                raw = b""
            yield True, text.group()
        else:
            raw += text.group() if text else data[at : at + 1]
        at = text.end() if text else at + 1
    if raw:
        yield False, raw


def bpe_by_rank(symbols: list[str], vocab: dict[str, int], merges: list[list[str]]) -> list[int]:
    ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not pairs:
            return [vocab[symbol] for symbol in symbols]
        _, i = min(pairs)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


@settings(max_examples=150, deadline=None)
@given(data=mixed_bytes)
def test_bytes_mapping_follows_its_rule(data: bytes) -> None:
    description = json.loads(FULL_JSON)
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    library = tokenizers.Tokenizer.from_str(FULL_JSON.decode())
    library.normalizer = None
    library.encode_special_tokens = True
    symbols = gpt2_symbols()
    expected: list[int] = []
    for is_text, stretch in stretches(data):
        if is_text:
            expected += library.encode(stretch.decode()).ids
        else:
            expected += bpe_by_rank([symbols[byte] for byte in stretch], vocab, merges)
    assert FULL.encode_bytes(data).tolist() == expected


@pytest.mark.parametrize("text", [*CORPUS[:3], "x" + " " * 31 + "y  z", "a\n\n b"])
def test_text_gets_the_tokens_of_training(text: str) -> None:
    assert unicodedata.is_normalized("NFC", text)
    expected = tokenizers.Tokenizer.from_str(LACKING_JSON.decode()).encode(text).ids
    assert LACKING.encode_bytes(text.encode()).tolist() == expected
    assert LACKING.encode_text(text).tolist() == expected


def test_special_tokens_in_text_are_plain_text() -> None:
    tokens = FULL.encode_bytes(b"<|endoftext|>")
    assert FULL.bos_token == 0
    assert 0 not in tokens
    assert FULL.encode_text("<|endoftext|>").tolist() == [0]


def test_long_text_is_cut_where_no_token_is_lost() -> None:
    text = "".join(CORPUS) * 200
    assert len(text) > 2 * MAX_PIECE_SYMBOLS
    library = tokenizers.Tokenizer.from_str(FULL_JSON.decode())
    assert FULL.encode_bytes(text.encode()).tolist() == library.encode(text).ids


def test_text_without_a_place_to_cut_and_long_raw_bytes() -> None:
    text = ("é" * 1000 + ".") * 150
    noise = np.random.default_rng(1).integers(128, 256, 3 * MAX_PIECE_SYMBOLS, np.uint8).tobytes()
    for data in (text.encode(), noise):
        check_inverse("bytes", FULL, data)
        check_inverse("bytes", LACKING, data)


def test_stand_ins_only_where_bytes_are_missing() -> None:
    mapping = get_mapping("bytes")
    for data in ("naïve café über".encode(), b"\x80\x81abc"):
        coded = mapping.encode(data, LACKING)
        assert coded.side == b""
        assert coded.side_bits == 0
        assert LACKING.decode_bytes(coded.tokens) == data
    for byte in NOT_IN_UTF8:
        coded = mapping.encode(bytes([byte]) * 3, LACKING)
        assert (coded.side, coded.side_bits) == (b"\x80", 1)
        assert len(coded.tokens) == 3
        # A stand-in is the token of a character of two bytes.
        assert len(LACKING.token_bytes(coded.tokens[0]).decode().encode()) == 2
    coded = [int(mapping.encode(bytes([byte]), LACKING).tokens[0]) for byte in NOT_IN_UTF8]
    assert len(set(coded)) == len(NOT_IN_UTF8)
    # U+00FC "ü" is a token of the corpus, so it stands for byte FC.
    assert LACKING.token_bytes(coded[NOT_IN_UTF8.index(0xFC)]) == "ü".encode()
    with pytest.raises(Error, match="0xff"):
        LACKING.encode_bytes(b"abc\xff")


def test_too_few_stand_ins_is_an_error() -> None:
    description = json.loads(LACKING_JSON)
    description["model"]["merges"] = []
    description["model"]["vocab"] = {
        entry: i for i, entry in enumerate(e for e in description["model"]["vocab"] if len(e) == 1)
    }
    description["added_tokens"] = []
    with pytest.raises(Error, match="13 bytes have no token"):
        Tokenizer.from_bytes(json.dumps(description).encode())


def test_added_tokens_that_swallow_spaces_stay_lossless() -> None:
    description = json.loads(FULL_JSON)
    last = max(token["id"] for token in description["added_tokens"])
    greedy = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": False}
    description["added_tokens"].append({"id": last + 1, "content": "greedy", **greedy})
    tokenizer = Tokenizer.from_bytes(json.dumps(description).encode())
    check_inverse("bytes", tokenizer, b"some   greedy   spaces")


def test_fingerprint_is_that_of_the_tokens_alone() -> None:
    description = json.loads(FULL_JSON)
    old_style = description | {"truncation": None, "decoder": None}
    old_style["model"] = description["model"] | {"merges": [" ".join(m) for m in description["model"]["merges"]]}
    assert Tokenizer.from_bytes(json.dumps(old_style, indent=2).encode()).fingerprint == FULL.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", FULL.fingerprint)
    other = json.loads(FULL_JSON)
    other["model"]["merges"][0], other["model"]["merges"][1] = other["model"]["merges"][1], other["model"]["merges"][0]
    assert Tokenizer.from_bytes(json.dumps(other).encode()).fingerprint != FULL.fingerprint
    assert len({FULL.fingerprint, LACKING.fingerprint, ByteTokenizer().fingerprint}) == 3


def test_tokenizer_survives_pickling(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(LACKING))
    assert again.fingerprint == LACKING.fingerprint
    check_inverse("bytes", again, bytes(range(256)))
    (tmp_path / "tokenizer.json").write_bytes(LACKING_JSON)
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").vocab_size == LACKING.vocab_size


def changed(**changes: object) -> bytes:
    return json.dumps(json.loads(FULL_JSON) | changes).encode()


def changed_model(**changes: object) -> bytes:
    return changed(model=json.loads(FULL_JSON)["model"] | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "not a Hugging Face tokenizer.json"),
        (b"[]", "not a Hugging Face tokenizer.json"),
        (b"{}", "not a Hugging Face tokenizer.json"),
        (changed_model(type="WordPiece"), "WordPiece, expected BPE"),
        (changed(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "Unigram, expected BPE"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "Whitespace; expected ByteLevel"),
        (changed(pre_tokenizer=None), "none; expected ByteLevel"),
        (changed_model(dropout=0.1), "dropout = 0.1"),
        (changed_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (changed_model(merges=[["not", "there"]]), "cannot read it"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"model": "\\ud800"}', "surrogates not allowed"),
        (changed(model=None), "model is None, expected an object"),
        (changed_model(vocab={}), "0 entries of vocab"),
        (changed_model(vocab={"a": 0, "b": 0}), "2 entries of vocab have 1 ids"),
        (changed_model(vocab={"a": 10**400}), "vocab: a is inf, expected a whole number"),
        (changed_model(vocab={"a": -1}), "vocab: a is -1"),
        (changed_model(vocab={"a": 1 << 24}), "up to 16777215"),
        (changed_model(vocab={"a": True}), "vocab: a is True"),
        (changed_model(merges=None), "merges is None, expected an array"),
        (changed_model(merges=[["a"]]), "merges has .'a'., expected pairs"),
        (changed_model(merges=["a b c"]), "merges has 'a b c', expected pairs"),
        (changed_model(merges=[[1, 2]]), "merges has .1, 2., expected pairs"),
        (changed_model(ignore_merges="yes"), "ignore_merges is 'yes', expected true or false"),
        (changed(added_tokens={"a": 1}), "added_tokens is .'a': 1., expected an array"),
        (changed(added_tokens=["a"]), "added_tokens has 'a', expected objects"),
        (changed(added_tokens=[{"content": "a"}]), r"added_tokens.0.: id is missing"),
        (changed(added_tokens=[{"id": 0, "content": 7}]), "content is 7, expected a string"),
        (changed(added_tokens=[{"id": 0, "content": "a", "special": 1}]), "special is 1, expected true or false"),
        (changed(pre_tokenizer=["ByteLevel"]), "pre_tokenizer is .'ByteLevel'., expected an object"),
        (changed(pre_tokenizer={}), "type is missing"),
        (changed(pre_tokenizer={"type": "Sequence"}), "pretokenizers is missing"),
        (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [None]}), "pre_tokenizer has None"),
        (changed(pre_tokenizer={"type": "ByteLevel", "use_regex": "\x1b[2J"}), "cannot read it"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(Error, match=message):
        Tokenizer.from_bytes(content)


def test_a_vocabulary_of_one_entry_and_tokens_without_flags() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    with pytest.raises(Error, match="255 bytes have no token"):
        Tokenizer.from_bytes(changed(model=model, added_tokens=[]))
    added = [{k: v for k, v in token.items() if k != "special"} for token in json.loads(FULL_JSON)["added_tokens"]]
    with pytest.raises(Error, match="cannot read it"):
        Tokenizer.from_bytes(changed(added_tokens=added))


@pytest.mark.parametrize("normalizer", [{"type": "Nothing"}, {"type": "Replace", "pattern": {"Regex": "("}}])
def test_what_only_the_published_tokens_need_fails_where_they_are_asked_for(normalizer: object) -> None:
    tokenizer = Tokenizer.from_bytes(changed(normalizer=normalizer))
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(b"the rain")) == b"the rain"
    with pytest.raises(Error, match=r"tokenizer.json: the tokenizers library cannot read it"):
        tokenizer.encode_text("the rain")


def test_a_normalizer_that_is_no_object_is_refused_at_once() -> None:
    with pytest.raises(Error, match=r"tokenizer\.json: normalizer is 7, expected an object"):
        Tokenizer.from_bytes(changed(normalizer=7))


def test_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"nowhere\.json"):
        Tokenizer.from_file(tmp_path / "nowhere.json")


@pytest.mark.parametrize("token", [0, 1, -1, 10**6])
def test_tokens_without_bytes_do_not_decode(token: int) -> None:
    with pytest.raises(Error, match=f"token {token} stands for no bytes"):
        FULL.decode_bytes([5, token])


def test_damaged_input_of_decode_is_an_error() -> None:
    data = b"some bytes \x80\xff"
    for name in MAPPINGS:
        mapping = get_mapping(name)
        coded = mapping.encode(data, LACKING)
        with pytest.raises(Error, match=f"mapping {name}: "):
            mapping.decode(coded.tokens[:-1], coded.side, len(data), LACKING)
        with pytest.raises(Error, match=f"mapping {name}: found"):
            mapping.decode(coded.tokens, coded.side + b"\x01", len(data), LACKING)
    with pytest.raises(Error, match="expected 0 to 127"):
        get_mapping("shift").decode(FULL.encode_bytes(b"\xe9"), b"\x00", 1, FULL)
    with pytest.raises(Error, match="characters below U"):
        get_mapping("latin1").decode(FULL.encode_bytes("€".encode()), b"", 1, FULL)
    with pytest.raises(Error, match="token 256 stands for no byte"):
        ByteTokenizer().decode_bytes([1, 256])
    with pytest.raises(Error, match="no mapping is called 'utf8'"):
        get_mapping("utf8")


def test_mappings_mean_what_design_says() -> None:
    data = bytes([0, 1, 65, 128, 200, 255])
    tokenizer = ByteTokenizer()
    assert get_mapping("shift").encode(data, tokenizer).tokens.tolist() == [b >> 1 for b in data]
    assert get_mapping("ascii").encode(data, tokenizer).tokens.tolist() == [b % 128 for b in data]
    assert get_mapping("shift").encode(data, tokenizer).side == bytes([0b01100100])
    assert get_mapping("ascii").encode(data, tokenizer).side == bytes([0b00011100])
    assert get_mapping("latin1").encode(data, tokenizer).tokens.tolist() == list(data.decode("latin-1").encode())


@pytest.mark.parametrize("data", [b"plain text", bytes(range(256)) * 8, CORPUS[0].encode() * 40, b"<|endoftext|>" * 9])
def test_published_tokens_are_the_library_s(data: bytes) -> None:
    library = tokenizers.Tokenizer.from_str(FULL_JSON.decode())
    library.enable_truncation(1024)
    expected = library.encode("".join(chr(b % 128) for b in data), add_special_tokens=False)
    found = PublishedTokens().encode(data, FULL)
    tokens, covered = found.tokens, found.n_bytes
    assert tokens.tolist() == expected.ids
    assert covered == expected.offsets[-1][1]


@pytest.fixture(scope="module")
def real_chunks() -> dict[str, tuple[bytes, ...]]:
    specs = {"text": "enwik8=enwik8.head", "image": "image=imagenet-val", "speech": "speech=librispeech"}
    how = {"draw": "first", "progress": False}
    return {m: load_dataset(spec.replace("=", f"={DATA}/"), 192, **how).chunks for m, spec in specs.items()}


@needs_data
def test_pythia_s_tokenizer(pythia_tokenizer: Tokenizer) -> None:
    assert pythia_tokenizer.vocab_size == 50_277
    assert pythia_tokenizer.bos_token == 0
    assert pythia_tokenizer.token_bytes(50_276) == b"  "
    missing = [byte for byte in range(256) if pythia_tokenizer.needs_stand_ins(bytes([byte]))]
    assert missing == NOT_IN_UTF8


@needs_data
@pytest.mark.parametrize(
    ("modality", "n_tokens", "covered"), [("text", 553, 0.999), ("image", 1588, 0.66), ("speech", 1980, 0.52)]
)
def test_published_coverage_of_real_chunks(
    pythia_tokenizer: Tokenizer,
    real_chunks: dict[str, tuple[bytes, ...]],
    modality: str,
    n_tokens: float,
    covered: float,
) -> None:
    """What was measured before this code was written, on other chunks of the same files."""
    chunks = real_chunks[modality]
    shares = [PublishedTokens().encode(chunk, pythia_tokenizer).n_bytes / len(chunk) for chunk in chunks]
    assert np.mean(shares) == pytest.approx(covered, abs=0.02)
    uncut = [len(get_mapping("ascii").encode(chunk, pythia_tokenizer).tokens) for chunk in chunks]
    assert np.mean(uncut) == pytest.approx(n_tokens, rel=0.04)


@needs_data
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_real_chunks_come_back(
    pythia_tokenizer: Tokenizer, real_chunks: dict[str, tuple[bytes, ...]], mapping: str
) -> None:
    for chunks in real_chunks.values():
        for chunk in chunks[:16]:
            check_inverse(mapping, pythia_tokenizer, chunk)


@needs_data
def test_real_text_gets_the_tokens_of_training(pythia_tokenizer: Tokenizer) -> None:
    text = (DATA / "enwik8.head").read_bytes()[:400_000].decode("utf-8", "ignore")
    text = unicodedata.normalize("NFC", text)
    expected = tokenizers.Tokenizer.from_file(str(DATA / "pythia-20B_tokenizer.json")).encode(text).ids
    assert pythia_tokenizer.encode_bytes(text.encode()).tolist() == expected
