"""Bytes <-> tokens: the tokenizers, each an exact inverse for any bytes. The mappings are in mappings.py.

Nothing here knows of data sets, models or the coder. A tokenizer is a Hugging Face `tokenizer.json` of byte-level BPE
(GPT-2's scheme) or of BPE over characters with byte fallback (SentencePiece's scheme, Llama 2's), or none at all
(`ByteTokenizer`: a token is a byte).

How `Tokenizer` cuts bytes. Well-formed UTF-8 (Unicode 15, table 3-7) is found by decoding from left to right; a byte
that belongs to no well-formed character is invalid. A stretch of valid characters is *text* if it is at least
`MIN_TEXT_CHARACTERS` long or if it is the whole input; everything else is *raw*. Text goes through the pre-tokeniser,
the BPE and the tokenizer's ordinary added tokens, as in training, but not through its normaliser, and special tokens
in it are plain text. Raw bytes go through the same BPE without the pre-tokeniser and added tokens: as byte symbols, or,
with byte fallback, as characters between which every invalid byte is its byte token. Shorter stretches of ASCII occur
in images and sound by chance; as text of their own they would only cut BPE merges short. (Pythia's tokenizer on real
chunks of 2,048 bytes: text 567 tokens, images 1,749, speech 2,045; a threshold between 1 and 32 moves these by less
than one.)

Byte fallback. Such vocabularies write a space as U+2581, so a U+2581 in the text is spelled with byte tokens. The byte
tokens of ASCII are used only where ASCII has no other: models have hardly seen them. Most put a space before a text in
training; that is the caller's choice here (`takes_prefix`), stated by a side bit of the mapping `bytes`, since a text
of one-byte tokens would otherwise take one token more than it has bytes.

Stand-ins. Some byte-level vocabularies have no token for some bytes: Pythia's lacks the 13 that UTF-8 never uses (C0,
C1, F5 to FF; every fourth byte of speech is one). Input that holds such a byte is coded with stand-ins: for each
missing byte m the token of the character U+00m where there is one, else the lowest token not yet taken that is one
character of two bytes. With stand-ins these tokens mean nothing else: where their two bytes really occur they are
spelled byte by byte. One side bit tells the decoder so; input without missing bytes, thus all valid UTF-8, needs none.

Whatever is encoded is decoded again before it is returned: tokens that do not give the bytes back are an `Error`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from llmcomp.data import tokenizer_json as tokenizer_description
from llmcomp.data.start_token import StartHints, find_start_token
from llmcomp.data.tokenizer_files import TokenizerFiles, find_tokenizer_file, read_tokenizer_files
from llmcomp.data.tokenizer_json import PREFIX_UNLESS_SPACE, library_errors
from llmcomp.data.vocabulary import StandIns, Tokens, Vocabulary
from llmcomp.display import Shown
from llmcomp.errors import Error

MIN_TEXT_CHARACTERS = 8
# Bounds the memory of one call into the tokenizer library; see `_text_pieces` for where a longer text is cut.
MAX_PIECE_SYMBOLS = 65_536
_BATCH_SYMBOLS, _BATCH_PIECES = 16 * MAX_PIECE_SYMBOLS, 4096
_TEXT = re.compile(rf"[^\udc80-\udcff]{{{MIN_TEXT_CHARACTERS},}}")


class AnyTokenizer(Protocol):
    """What the mappings ask of a tokenizer; `Tokenizer` and `ByteTokenizer` are two. One may also have `prefix` and
    `takes_prefix`, as `Tokenizer`."""

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


class Tokenizer(Shown):
    """A BPE tokenizer, byte-level or with byte fallback, whose tokens always join to the bytes they came from.

    Made by `from_file` or `from_bytes`; `Error` for a tokenizer of another kind.
    `vocab_size`: ids 0 .. vocab_size - 1 may occur, of which the first `n_own_tokens` are the BPE's, the rest added.
    `fingerprint`: SHA-256 (hex) of what decides the tokens: model, pre-tokeniser and added tokens, in canonical JSON;
    `file_sha256`: of the file as it is. `bos_token`: the id of the token that stands before the first one, None where
    no token can; `bos_reason` says which it is and why. `kind`: in words; `left_out`: the normaliser's steps that are
    not applied, since no decoder could undo them. `prefix`: b" " where text has a space before it in training, else
    b"".
    """

    def __init__(
        self, tokenizer_json: bytes, origin: str = "tokenizer.json", start_hints: StartHints | None = None
    ) -> None:
        description = tokenizer_description.parse(tokenizer_json, origin)
        self._json, self._origin, self._start_hints = tokenizer_json, origin, start_hints or StartHints()
        self.fingerprint = tokenizer_description.fingerprint(description)
        self.file_sha256 = hashlib.sha256(tokenizer_json).hexdigest()
        self.kind, self.left_out = description.kind, description.left_out
        self._prefix_rule, self._space = description.prefix, description.space
        self.prefix = b" " if description.prefix else b""
        vocab, added = description.vocab, description.added
        self._vocabulary = Vocabulary(vocab, added, description.is_byte_level, description.space)
        self.vocab_size = len(self._vocabulary.lengths)
        self.n_own_tokens = len(vocab)
        self.bos_token, self.bos_reason = find_start_token(
            description.content,
            vocab | {token["content"]: token["id"] for token in added},
            {token["id"] for token in added if token.get("special")},
            self._start_hints,
        )
        self._text = tokenizer_description.text_tokenizer(description, origin)
        self._is_byte_level = description.is_byte_level
        missing = self._vocabulary.missing_bytes()
        self._stand_ins = StandIns(vocab, self._vocabulary, missing if self._is_byte_level else (), origin)
        self._raw = self._stand_ins.raw_tokenizer(self._text.model)
        self._as_published: tokenizers.Tokenizer | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or another of the forms that tokenizer_files.py lists."""
        return cls(*read_tokenizer_files(path))

    @classmethod
    def from_bytes(cls, tokenizer_json: bytes) -> Tokenizer:
        """The content of a `tokenizer.json`."""
        return cls(tokenizer_json)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str, StartHints]]:
        return Tokenizer, (self._json, self._origin, self._start_hints)

    def _facts(self) -> dict[str, Any]:
        start = "none" if self.bos_token is None else self.bos_token
        return {"": self.kind, "tokens": self.vocab_size, "start token": start, "SHA-256": self.fingerprint[:12]}

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; `Error` if it stands for none (a special token, an id out of range)."""
        return self.decode_bytes([token])

    def needs_stand_ins(self, data: bytes) -> bool:
        """Whether `data` holds a byte that the vocabulary has no token for."""
        return any(byte in data for byte in self._stand_ins.token_of_byte)

    def takes_prefix(self, data: bytes) -> bool:
        """Whether `data` begins with text that has a space (`prefix`) before it in training."""
        if not self._prefix_rule or not data:
            return False
        if self._prefix_rule == PREFIX_UNLESS_SPACE and data.startswith(b" "):
            return False
        return next(_stretches(data))[0]

    def encode_bytes(self, data: bytes, stand_ins: bool = False) -> Tokens:
        """Bytes -> int32 [T], T <= len(data), by the rules at the head of this module.

        `Error` for a byte that has no token, unless `stand_ins` are used.
        """
        data = bytes(data)
        if not stand_ins and self.needs_stand_ins(data):
            byte = next(byte for byte in data if byte in self._stand_ins.token_of_byte)
            raise Error(f"{self._origin}: no token for byte 0x{byte:02x}; mapping 'bytes' codes it with stand-ins")
        pieces: list[Tokens] = []
        try:
            for is_text, stretch in _stretches(data):
                pieces += self._encode_text_stretch(stretch) if is_text else self._encode_raw(stretch)
            tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
            tokens = self._stand_ins.put_in(tokens) if stand_ins else tokens
        except Error as error:
            raise Error(f"{self._origin}: {error}") from None
        if len(tokens) > len(data) or self.decode_bytes(tokens, stand_ins) != data:
            raise Error(f"{self._origin}: {len(data)} bytes do not come back from their tokens")
        return tokens

    def decode_bytes(self, tokens: npt.ArrayLike, stand_ins: bool = False) -> bytes:
        """int [T] -> the tokens' bytes, joined; `Error` names the first token that stands for no bytes."""
        bytes_of = self._stand_ins.bytes_of if stand_ins else self._vocabulary.bytes_of
        try:
            return b"".join(map(bytes_of.__getitem__, np.asarray(tokens).tolist()))
        except KeyError as error:
            raise Error(f"{self._origin}: token {error.args[0]} stands for no bytes") from None

    def text_lengths(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """int [T] of `encode_text`, from the first on -> int64 [T]: the UTF-8 bytes of each token's text, special
        tokens' spelling included, the space that was put before the text not."""
        lengths = self._vocabulary.lengths[np.asarray(tokens, np.int64)]
        if len(lengths) and self.prefix and lengths[0]:
            lengths[0] -= 1
        return lengths

    def encode_text(self, text: str) -> Tokens:
        """The tokenizer as its file says, normaliser and special tokens in the text too. Not always invertible.

        No start or end tokens are added, as in the published computation.
        """
        if self._as_published is None:
            self._as_published = tokenizer_description.library_tokenizer(self._json.decode(), self._origin)
            self._as_published.no_truncation()
            self._as_published.no_padding()
        with library_errors(self._origin):
            return np.array(next(_encode(self._as_published, [text])), np.int32)

    def _encode_text_stretch(self, text: str) -> Iterator[Tokens]:
        for is_space_symbol, part in _parts(text, self._space):
            if is_space_symbol:
                yield np.array(self._vocabulary.spell(part.encode()), np.int32)
                continue
            pieces = list(_text_pieces(part))
            for piece, ids in zip(pieces, _encode(self._text, pieces), strict=True):
                # Added tokens may swallow the spaces around them, a pre-tokeniser may drop characters: then it is raw.
                data = piece.encode()
                is_exact = self._vocabulary.is_spelled(ids, data)
                yield from [np.array(ids, np.int32)] if is_exact else self._encode_raw(data)

    def _encode_raw(self, data: bytes) -> Iterator[Tokens]:
        if not self._is_byte_level:
            yield from self._encode_raw_characters(data)
            return
        symbols = data.decode("latin-1").translate(self._stand_ins.symbols)
        for ids in _encode(self._raw, _cut(symbols)):
            yield self._stand_ins.mark(np.array(ids, np.int32))

    def _encode_raw_characters(self, data: bytes) -> Iterator[Tokens]:
        """Runs of characters through the bare BPE, in turn with what has byte tokens only."""
        parts = list(_parts(data.decode("utf-8", "surrogateescape"), self._space, with_invalid=True))
        runs = [piece for is_marked, part in parts if not is_marked for piece in _cut(part)]
        ids_of_runs = _encode(self._raw, [run.replace(" ", self._space or " ") for run in runs])
        for is_marked, part in parts:
            if is_marked:
                yield np.array(self._vocabulary.spell(part.encode("utf-8", "surrogateescape")), np.int32)
                continue
            for piece in _cut(part):
                tokens = self._vocabulary.respell(np.array(next(ids_of_runs), np.int32))
                # A text that spells a byte token's name can become that token.
                is_exact = self._vocabulary.is_spelled(tokens.tolist(), piece.encode())
                yield tokens if is_exact else np.array(self._vocabulary.spell(piece.encode()), np.int32)


class ByteTokenizer(Shown):
    """The tokenizer of a model that has none: a token is a byte, and nothing stands before the first."""

    vocab_size = 256
    kind, left_out, prefix = "bytes", (), b""
    bos_token: int | None = None
    bos_reason = "token 0 stands in: tokens are bytes"
    fingerprint = hashlib.sha256(b'{"model":{"type":"bytes"}}').hexdigest()

    def _facts(self) -> dict[str, Any]:
        return {"": self.kind, "tokens": self.vocab_size}

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


# As a model's tokenizer path: its tokens are bytes. A file of that name is "./bytes".
BYTES = "bytes"
# A byte model may have this many tokens: the bytes, and one or two of its own for where a text starts and ends.
_BYTE_MODEL_SIZES = range(256, 259)


@functools.lru_cache(maxsize=4)
def _shared_tokenizer(files: TokenizerFiles) -> Tokenizer:
    # The checkpoints of one model bring equal files, and making Llama 3's tokenizer takes seconds.
    return Tokenizer(*files)


def from_object(tokenizer: Any) -> AnyTokenizer:
    """The tokenizer that an object of transformers or of the tokenizers library is, through the files that it saves.

    An object that is one for this package (`encode_bytes`) is returned as it is. `Error` for anything else.
    """
    if callable(getattr(tokenizer, "encode_bytes", None)):
        found: AnyTokenizer = tokenizer
        return found
    with tempfile.TemporaryDirectory() as folder:
        if callable(getattr(tokenizer, "save_pretrained", None)):
            tokenizer.save_pretrained(folder)
        elif isinstance(tokenizer, tokenizers.Tokenizer):
            Path(folder, "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        else:
            raise Error(
                f'a {type(tokenizer).__name__} is no tokenizer: expected a file or its folder, "{BYTES}", or an object '
                "of transformers or tokenizers"
            )
        path = find_tokenizer_file(folder)
        if not path.is_file():
            raise Error(f"a {type(tokenizer).__name__} saves none of tokenizer.json, vocab.json and tokenizer.model")
        return _shared_tokenizer(read_tokenizer_files(path))


class Tokenized(Shown):
    """What the models of all engines have of their tokenizer; they set the attributes.

    `_tokenizer_path`: a file as `tokenizer_files.find_tokenizer_file` names it; None or "bytes": tokens are bytes.
    """

    _tokenizer_path: str | os.PathLike[str] | None
    n_logits: int

    def _facts(self) -> dict[str, Any]:
        """Of a model of any engine; nothing is read for it."""
        found: Any = self
        return {
            "": found.name,
            "step": found.step,
            "engine": found.engine,
            "parameters": found.n_params,
            "without embeddings": found.n_params_nonembedding,
            "context": found.context_length,
            "dtype": found.dtype,
            "device": found.device,
        }

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | ByteTokenizer:
        """The model's tokenizer; `Error` where it is of a kind that cannot carry any bytes, or where it is missing.

        A folder without one is that of a byte model if there are 256 to 258 logits.
        """
        if self._has_byte_tokens:
            return ByteTokenizer()
        assert self._tokenizer_path is not None
        path = Path(self._tokenizer_path)
        if not os.path.lexists(path):
            raise Error(
                f"{path.parent} holds no tokenizer (tokenizer.json, vocab.json with merges.txt or tokenizer.model) and "
                f'its model has {self.n_logits} tokens, a byte model 256: add the file, or say tokenizer="bytes"'
            )
        return _shared_tokenizer(read_tokenizer_files(path))

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str | None:
        """The tokenizer's; that of bytes where the files have none; None for one of a kind that is not understood."""
        if self._has_byte_tokens or not os.path.lexists(self._tokenizer_path or ""):
            return ByteTokenizer.fingerprint
        try:
            return self.tokenizer.fingerprint
        except Error:
            return None

    @functools.cached_property
    def vocab_size(self) -> int:
        """How many logits of a row are tokens; the padding after them gets no probability."""
        if self._has_byte_tokens:
            return self.n_logits
        try:
            return min(self.tokenizer.vocab_size, self.n_logits)
        except Error:
            return self.n_logits

    @property
    def _has_byte_tokens(self) -> bool:
        path = self._tokenizer_path
        if path is None or path == BYTES:
            return True
        return self.n_logits in _BYTE_MODEL_SIZES and not os.path.lexists(path)


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

    A piece ends before a space that stands between two letters: no pre-tokeniser in use (GPT-2's to Llama 3's) and no
    vocabulary of words joins the space to what is before it, so the tokens are those of the whole text. A text without
    such a place is cut anywhere.
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


def _parts(text: str, symbol: str | None, with_invalid: bool = False) -> Iterator[tuple[bool, str]]:
    """(False, characters) and (True, others) in turn: the others are `symbol`, and invalid bytes (as surrogates)."""
    marked = re.escape(symbol or "") + ("\udc80-\udcff" if with_invalid else "")
    if not marked:
        yield False, text
        return
    for number, part in enumerate(re.split(f"([{marked}]+)", text)):
        if part:
            yield number % 2 == 1, part


def _cut(symbols: str) -> list[str]:
    return [symbols[at : at + MAX_PIECE_SYMBOLS] for at in range(0, len(symbols), MAX_PIECE_SYMBOLS)]


def _encode(tokenizer: tokenizers.Tokenizer, pieces: Sequence[str]) -> Iterator[list[int]]:
    """Ids of each piece; about 1 MB and at most some thousand pieces a call."""
    start = 0
    while start < len(pieces):
        stop, n_symbols = start, 0
        while stop < len(pieces) and n_symbols < _BATCH_SYMBOLS and stop - start < _BATCH_PIECES:
            n_symbols += len(pieces[stop])
            stop += 1
        for encoding in tokenizer.encode_batch_fast(list(pieces[start:stop]), add_special_tokens=False):
            yield encoding.ids
        start = stop
