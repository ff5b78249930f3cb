"""Bytes <-> tokens: the tokenizers, and the mappings, each with an exact inverse.

Nothing here knows of data sets, models or the coder. A tokenizer is a Hugging Face `tokenizer.json` of the byte-level
BPE kind (GPT-2's scheme), or none at all (`ByteTokenizer`: a token is a byte).

How `Tokenizer` cuts bytes. Well-formed UTF-8 (Unicode 15, table 3-7) is found by decoding from left to right; a byte
that belongs to no well-formed character is invalid. A stretch of valid characters is *text* if it is at least
`MIN_TEXT_CHARACTERS` long or if it is the whole input; everything else is *raw*. Text goes through the pre-tokeniser,
the BPE and the tokenizer's ordinary added tokens, as in training, but not through its normaliser, and special tokens
in it are plain text. Raw bytes go through the same BPE as byte symbols, without the pre-tokeniser. Shorter stretches
of ASCII occur in images and sound by chance; as text of their own they would only cut BPE merges short. (Pythia's
tokenizer on real chunks of 2,048 bytes: text 567 tokens, images 1,749, speech 2,045; a threshold between 1 and 32
moves these by less than one.)

Stand-ins. Some vocabularies have no token for some bytes: Pythia's lacks the 13 that UTF-8 never uses (C0, C1, F5 to
FF; every fourth byte of speech is one). Input that holds such a byte is coded with stand-ins: for each missing byte m
the token of the character U+00m where there is one, else the lowest token not yet taken that is one character of two
bytes. With stand-ins these tokens mean nothing else: where their two bytes really occur they are spelled byte by
byte. One side bit tells the decoder; input without missing bytes, thus all valid UTF-8, needs none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from llmcomp.checked_json import TOKENIZER_BYTES_MAX, Members, parse_object, read_bytes
from llmcomp.errors import Error, named, reason, shown

MIN_TEXT_CHARACTERS = 8
# Bounds the memory of one call into the tokenizer library; see `_text_pieces` for where a longer text is cut.
MAX_PIECE_SYMBOLS = 65_536
_TEXT = re.compile(rf"[^\udc80-\udcff]{{{MIN_TEXT_CHARACTERS},}}")
_IDS_MAX = 1 << 24
_ADDED_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_START_TOKENS = ("<|endoftext|>", "<|begin_of_text|>", "<s>")
Tokens = npt.NDArray[np.int32]


class AnyTokenizer(Protocol):
    """What the mappings ask of a tokenizer; `Tokenizer` and `ByteTokenizer` are two."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def bos_token(self) -> int | None: ...
    def needs_stand_ins(self, data: bytes) -> bool: ...
    def encode_bytes(self, data: bytes, stand_ins: bool = False) -> Tokens: ...
    def decode_bytes(self, tokens: npt.ArrayLike, stand_ins: bool = False) -> bytes: ...
    def encode_text(self, text: str) -> Tokens: ...
    def text_lengths(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]: ...


def _byte_symbols() -> list[str]:
    """GPT-2's alphabet: the character that stands for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


_SYMBOLS = _byte_symbols()
# For str.translate: symbols to their bytes as Latin-1, characters below 256 that are no symbols out of Latin-1's reach.
_LATIN1_OF_SYMBOL = dict.fromkeys(range(256), 0x100) | {ord(symbol): byte for byte, symbol in enumerate(_SYMBOLS)}


class Tokenizer:
    """A byte-level BPE tokenizer whose tokens always join to the bytes they came from.

    Made by `from_file` or `from_bytes`; `Error` for a tokenizer of another kind.
    `vocab_size`: ids 0 .. vocab_size - 1 may occur, of which the first `n_own_tokens` are the BPE's, the rest added.
    `fingerprint`: SHA-256 (hex) of what decides the tokens: model, pre-tokeniser and added tokens, in canonical JSON;
    `file_sha256`: of the file as it is. `bos_token`: the id of <|endoftext|> (or of the start token of another family),
    None where there is none.
    """

    def __init__(self, tokenizer_json: bytes, origin: str = "tokenizer.json") -> None:
        description = _parse(tokenizer_json, origin)
        self._json, self._origin = tokenizer_json, origin
        self.fingerprint = _fingerprint(description)
        self.file_sha256 = hashlib.sha256(tokenizer_json).hexdigest()
        vocab: dict[str, int] = description["model"]["vocab"]
        added = description.get("added_tokens") or []
        self._bytes_of, self._lengths = _token_bytes(vocab, added)
        self.vocab_size = len(self._lengths)
        self.n_own_tokens = len(vocab)
        ids = vocab | {token["content"]: token["id"] for token in added}
        self.bos_token: int | None = next((ids[token] for token in _START_TOKENS if token in ids), None)
        self._text = _text_tokenizer(description, origin)
        self._stand_ins = _StandIns(vocab, self._bytes_of, origin)
        self._raw = self._stand_ins.raw_tokenizer(self._text.model)
        self._as_published: tokenizers.Tokenizer | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`."""
        return cls(read_bytes(path, TOKENIZER_BYTES_MAX), str(path))

    @classmethod
    def from_bytes(cls, tokenizer_json: bytes) -> Tokenizer:
        """The content of a `tokenizer.json`."""
        return cls(tokenizer_json)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str]]:
        return Tokenizer, (self._json, self._origin)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; `Error` if it stands for none (a special token, an id out of range)."""
        return self.decode_bytes([token])

    def needs_stand_ins(self, data: bytes) -> bool:
        """Whether `data` holds a byte that the vocabulary has no token for."""
        return any(byte in data for byte in self._stand_ins.token_of_byte)

    def encode_bytes(self, data: bytes, stand_ins: bool = False) -> Tokens:
        """Bytes -> int32 [T], T <= len(data), by the rules at the head of this module.

        `Error` for a byte that has no token, unless `stand_ins` are used.
        """
        data = bytes(data)
        if not stand_ins and self.needs_stand_ins(data):
            byte = next(byte for byte in data if byte in self._stand_ins.token_of_byte)
            raise Error(f"{self._origin}: no token for byte 0x{byte:02x}; mapping 'bytes' codes it with stand-ins")
        pieces: list[Tokens] = []
        for is_text, stretch in _stretches(data):
            pieces += self._encode_text_stretch(stretch) if is_text else self._encode_raw(stretch)
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        return self._stand_ins.put_in(tokens) if stand_ins else tokens

    def decode_bytes(self, tokens: npt.ArrayLike, stand_ins: bool = False) -> bytes:
        """int [T] -> the tokens' bytes, joined; `Error` names the first token that stands for no bytes."""
        bytes_of = self._stand_ins.bytes_of if stand_ins else self._bytes_of
        try:
            return b"".join(map(bytes_of.__getitem__, np.asarray(tokens).tolist()))
        except KeyError as error:
            raise Error(f"{self._origin}: token {error.args[0]} stands for no bytes") from None

    def text_lengths(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """int [T] -> int64 [T]: the UTF-8 bytes of each token's text, special tokens' spelling included."""
        return self._lengths[np.asarray(tokens, np.int64)]

    def encode_text(self, text: str) -> Tokens:
        """The tokenizer as its file says, normaliser and special tokens in the text too. Not always invertible.

        No start or end tokens are added, as in the published computation.
        """
        if self._as_published is None:
            with _library_errors(self._origin):
                self._as_published = tokenizers.Tokenizer.from_str(self._json.decode())
            self._as_published.no_truncation()
            self._as_published.no_padding()
        with _library_errors(self._origin):
            return np.array(next(_encode(self._as_published, [text])), np.int32)

    def _encode_text_stretch(self, text: str) -> Iterator[Tokens]:
        pieces = list(_text_pieces(text))
        for piece, ids in zip(pieces, _encode(self._text, pieces), strict=True):
            # Added tokens may swallow the spaces around them, a pre-tokeniser may drop characters: then it is raw.
            data = piece.encode()
            yield from [np.array(ids, np.int32)] if self._stands_for(ids, data) else self._encode_raw(data)

    def _encode_raw(self, data: bytes) -> Iterator[Tokens]:
        symbols = data.decode("latin-1").translate(self._stand_ins.symbols)
        pieces = [symbols[at : at + MAX_PIECE_SYMBOLS] for at in range(0, len(symbols), MAX_PIECE_SYMBOLS)]
        for ids in _encode(self._raw, pieces):
            yield self._stand_ins.mark(np.array(ids, np.int32))

    def _stands_for(self, ids: list[int], data: bytes) -> bool:
        try:
            return b"".join(map(self._bytes_of.__getitem__, ids)) == data
        except KeyError:
            return False


class _StandIns:
    """Which tokens stand for the bytes that a vocabulary has no token for.

    While encoding, missing byte m is first a private character that no BPE merge holds, with an id that only the raw
    tokenizer knows, then (`mark`) the mark -1 - m, which is no token, and at last (`put_in`) its stand-in.
    """

    def __init__(self, vocab: dict[str, int], bytes_of: dict[int, bytes], origin: str) -> None:
        missing = [byte for byte in range(256) if _SYMBOLS[byte] not in vocab]
        self.symbols = dict(enumerate(_SYMBOLS)) | {byte: chr(0xE000 + byte) for byte in missing}
        two_bytes = {
            text: token
            for token, text in sorted(bytes_of.items(), reverse=True)
            if len(text) == 2 and not set(text) & set(missing) and _is_character(text)
        }
        own = {byte: two_bytes.pop(chr(byte).encode()) for byte in missing if chr(byte).encode() in two_bytes}
        rest = iter(sorted(two_bytes.values()))
        self.token_of_byte = {byte: own[byte] if byte in own else next(rest, -1) for byte in missing}
        if missing and max(vocab.values()) != len(vocab) - 1:
            raise Error(
                f"{origin}: {len(vocab)} vocabulary entries with ids up to {max(vocab.values())}, expected no gaps"
            )
        if -1 in self.token_of_byte.values():
            raise Error(
                f"{origin}: {len(missing)} bytes have no token and too few two-byte characters stand in for them"
            )
        self.bytes_of = bytes_of | {token: bytes([byte]) for byte, token in self.token_of_byte.items()}
        self._spelling = {
            token: [vocab[_SYMBOLS[byte]] for byte in bytes_of[token]] for token in self.token_of_byte.values()
        }
        self._first_raw_id = len(vocab)
        self._mark_of_raw_id = np.array([-1 - byte for byte in missing], np.int32)
        self._token_of_mark = np.zeros(257, np.int32)
        for byte, token in self.token_of_byte.items():
            self._token_of_mark[-1 - byte] = token

    def raw_tokenizer(self, model: tokenizers.models.Model) -> tokenizers.Tokenizer:
        """The bare BPE, with the ids from len(vocab) on for the missing bytes."""
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_tokens(
            [tokenizers.AddedToken(self.symbols[byte], normalized=False) for byte in self.token_of_byte]
        )
        return tokenizer

    def mark(self, raw_ids: Tokens) -> Tokens:
        """The raw tokenizer's ids for missing bytes -> marks."""
        if not self.token_of_byte:
            return raw_ids
        missing = np.flatnonzero(raw_ids >= self._first_raw_id)
        raw_ids[missing] = self._mark_of_raw_id[raw_ids[missing] - self._first_raw_id]
        return raw_ids

    def put_in(self, tokens: Tokens) -> Tokens:
        """Spell real occurrences of the stand-ins' own bytes, then replace the marks by the stand-ins."""
        twice = np.isin(tokens, list(self._spelling))
        out = np.repeat(tokens, 1 + twice)
        at = np.flatnonzero(twice) + np.arange(np.count_nonzero(twice))
        spelled = np.array([self._spelling[token] for token in tokens[twice].tolist()], np.int32).reshape(-1, 2)
        out[at], out[at + 1] = spelled[:, 0], spelled[:, 1]
        return np.where(out < 0, self._token_of_mark[np.minimum(out, 0)], out)


class ByteTokenizer:
    """The tokenizer of a model that has none: a token is a byte, and nothing stands before the first."""

    vocab_size = 256
    bos_token: int | None = None
    fingerprint = hashlib.sha256(b'{"model":{"type":"bytes"}}').hexdigest()

    def token_bytes(self, token: int) -> bytes:
        """The byte `token`."""
        return self.decode_bytes([token])

    def needs_stand_ins(self, data: bytes) -> bool:
        """Never: every byte is a token."""
        return False

    def encode_bytes(self, data: bytes, stand_ins: bool = False) -> Tokens:
        """Any bytes -> int32 [len(data)]."""
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode_bytes(self, tokens: npt.ArrayLike, stand_ins: bool = False) -> bytes:
        """int [T] -> T bytes; `Error` names the first token that is no byte."""
        tokens = np.asarray(tokens, np.int64)
        strange = tokens[(tokens < 0) | (tokens > 255)]
        if len(strange):
            raise Error(f"token {strange[0]} stands for no byte; a model without a tokenizer has the tokens 0 to 255")
        return tokens.astype(np.uint8).tobytes()

    def text_lengths(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """int [T] -> int64 [T] of ones."""
        return np.ones(len(np.asarray(tokens)), np.int64)

    def encode_text(self, text: str) -> Tokens:
        """The UTF-8 bytes of `text`."""
        return self.encode_bytes(text.encode())


class _Content(bytes):
    """A tokenizer.json; equal to any other of the same bytes, wherever it was read."""

    origin = ""


@functools.lru_cache(maxsize=4)
def _shared_tokenizer(content: _Content) -> Tokenizer:
    # The checkpoints of one model bring equal files, and making Pythia's tokenizer takes half a second.
    return Tokenizer(bytes(content), content.origin)


class Tokenized:
    """What the models of all engines have of their tokenizer; they set the two attributes."""

    _tokenizer_path: str | os.PathLike[str] | None
    n_logits: int

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | ByteTokenizer:
        """The model's tokenizer; `Error` where it is of a kind that cannot carry any bytes."""
        if self._tokenizer_path is None:
            return ByteTokenizer()
        content = _Content(read_bytes(self._tokenizer_path, TOKENIZER_BYTES_MAX))
        content.origin = str(self._tokenizer_path)
        return _shared_tokenizer(content)

    @functools.cached_property
    def vocab_size(self) -> int:
        """How many logits of a row are tokens; the padding after them gets no probability."""
        if self._tokenizer_path is None:
            return self.n_logits
        try:
            return min(self.tokenizer.vocab_size, self.n_logits)
        except Error:
            return self.n_logits


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def _stretches(data: bytes) -> Iterator[tuple[bool, Any]]:
    """(True, text: str) and (False, raw: bytes) in turn; the rule at the head of this module."""
    try:
        whole = data.decode()
    except UnicodeDecodeError:
        pass
    else:
        if whole:
            yield True, whole
        return
    # Every invalid byte becomes one of the surrogates U+DC80 .. U+DCFF (PEP 383), which valid UTF-8 cannot hold.
    escaped, at = data.decode("utf-8", "surrogateescape"), 0
    for text in _TEXT.finditer(escaped):
        if text.start() > at:
            yield False, escaped[at : text.start()].encode("utf-8", "surrogateescape")
        yield True, text.group()
        at = text.end()
    if at < len(escaped):
        yield False, escaped[at:].encode("utf-8", "surrogateescape")


def _text_pieces(text: str) -> Iterator[str]:
    """Pieces of at most MAX_PIECE_SYMBOLS characters.

    A piece ends before a space that stands between two letters: no pre-tokeniser in use (GPT-2's to Llama 3's) joins
    the space to what is before it, so the tokens are those of the whole text. A text without such a place is cut
    anywhere.
    """
    at = 0
    while len(text) - at > MAX_PIECE_SYMBOLS:
        cut = text.rfind(" ", at + 1, at + MAX_PIECE_SYMBOLS)
        while cut != -1 and not (text[cut - 1].isalpha() and text[cut + 1].isalpha()):
            cut = text.rfind(" ", at + 1, cut)
        end = cut if cut != -1 else at + MAX_PIECE_SYMBOLS
        yield text[at:end]
        at = end
    yield text[at:]


def _encode(tokenizer: tokenizers.Tokenizer, pieces: list[str]) -> Iterator[list[int]]:
    """Ids of each piece, sixteen pieces (at most about 1 MB) a call."""
    for at in range(0, len(pieces), 16):
        for encoding in tokenizer.encode_batch_fast(pieces[at : at + 16], add_special_tokens=False):
            yield encoding.ids


def _parse(tokenizer_json: bytes, origin: str) -> dict[str, Any]:
    """The content of a tokenizer.json whose every field that is read here is of its type."""
    described = f"{origin}: not a Hugging Face tokenizer.json"
    description = parse_object(tokenizer_json, described)
    model = Members(description, described).members("model")
    kind = model.text("type")
    if kind != "BPE":
        raise Error(f"{origin}: the tokenizer's model is {named(kind)}, expected BPE over bytes")
    _check_vocab(model.object("vocab"), origin)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if value := description["model"].get(option):
            raise Error(f"{origin}: the tokenizer's BPE has {option} = {shown(value)}, expected none")
    if description["model"].get("ignore_merges") is not None:
        model.flag("ignore_merges")
    for merge in model.array("merges"):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise Error(f"{origin}: merges has {shown(merge)}, expected pairs of strings")
    _check_added(description, origin)
    pre_tokenizers = [step["type"] for step in _pre_tokenizer_steps(description, origin)]
    if "ByteLevel" not in pre_tokenizers:
        found = ", ".join(map(named, pre_tokenizers)) or "none"
        raise Error(f"{origin}: the tokenizer's pre-tokenisers are {found}; expected ByteLevel among them")
    return description


def _check_vocab(vocab: Mapping[str, Any], origin: str) -> None:
    entries = Members(vocab, f"{origin}: vocab")
    for entry in vocab:
        entries.integer(entry, highest=_IDS_MAX - 1)
    if not vocab or len(set(vocab.values())) != len(vocab):
        raise Error(f"{origin}: {len(vocab)} entries of vocab have {len(set(vocab.values()))} ids, expected one each")


def _check_added(description: dict[str, Any], origin: str) -> None:
    if description.get("added_tokens") is None:
        return
    for number, token in enumerate(Members(description, origin).array("added_tokens")):
        if not isinstance(token, dict):
            raise Error(f"{origin}: added_tokens has {shown(token)}, expected objects")
        members = Members(token, f"{origin}: added_tokens[{number}]")
        members.integer("id", highest=_IDS_MAX - 1)
        members.text("content")
        for flag in _ADDED_FLAGS:
            members.flag(flag, False)


def _pre_tokenizer_steps(description: dict[str, Any], origin: str = "") -> list[dict[str, Any]]:
    if description.get("pre_tokenizer") is None:
        return []
    first = Members(description, origin).members("pre_tokenizer")
    steps = [description["pre_tokenizer"]]
    if first.text("type") == "Sequence":
        steps = list(first.array("pretokenizers"))
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise Error(f"{origin}: pre_tokenizer has {shown(step)}, expected an object with a type")
    return steps


@contextlib.contextmanager
def _library_errors(origin: str) -> Iterator[None]:
    """The tokenizers library raises bare Exception for what it cannot read, and panics, which are no Exception."""
    try:
        yield
    except (Error, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise Error(f"{origin}: the tokenizers library cannot read it: {reason(error)}") from error


def _without_prefix_space(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokeniser's steps; a space put before the text could not be told from one that was there."""
    steps = [dict(step) for step in _pre_tokenizer_steps(description)]
    for step in steps:
        if step["type"] == "ByteLevel":
            step |= {"add_prefix_space": False, "trim_offsets": True, "use_regex": step.get("use_regex", True)}
    return steps


def _fingerprint(description: dict[str, Any]) -> str:
    """The same for files that differ only in how versions of the library write the same tokenizer."""
    model = description["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    canonical = {
        "model": {"vocab": model["vocab"], "merges": merges, "ignore_merges": bool(model.get("ignore_merges"))},
        "pre_tokenizer": _without_prefix_space(description),
        "added_tokens": sorted(
            [token["id"], token["content"], *(bool(token.get(flag)) for flag in _ADDED_FLAGS)]
            for token in description.get("added_tokens") or []
        ),
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _token_bytes(
    vocab: dict[str, int], added: Iterable[dict[str, Any]]
) -> tuple[dict[int, bytes], npt.NDArray[np.int64]]:
    """({id: bytes} of the tokens that carry bytes, int64 [vocab_size] of the lengths of all tokens' texts)."""
    bytes_of: dict[int, bytes] = {}
    for entry, token in vocab.items():
        try:
            bytes_of[token] = entry.translate(_LATIN1_OF_SYMBOL).encode("latin-1")
        except UnicodeEncodeError:
            continue  # not of the byte alphabet: a special token of some kind
    texts = dict(bytes_of)
    for added_token in added:
        token, content = added_token["id"], added_token["content"].encode()
        texts[token] = bytes_of[token] = content
        if added_token.get("special"):
            del bytes_of[token]
    vocab_size = 1 + max([*vocab.values(), *texts])
    lengths = np.zeros(vocab_size, np.int64)
    for token, text in texts.items():
        lengths[token] = len(text)
    return bytes_of, lengths


def _text_tokenizer(description: dict[str, Any], origin: str) -> tokenizers.Tokenizer:
    """The tokenizer for stretches of text: no normaliser, no prefix space, special tokens are plain text."""
    steps = _without_prefix_space(description)
    changed = description | {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    with _library_errors(origin):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(changed))
    tokenizer.encode_special_tokens = True
    for token in description.get("added_tokens") or []:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise Error(
                f"{origin}: added token {shown(token['content'])} has id {token['id']}, the library gives it {found}"
            )
    return tokenizer
