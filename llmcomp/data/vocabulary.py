"""Which bytes a token stands for (FORMAT.md 5.5): the two alphabets of tokenizers, added tokens, stand-ins.

Nothing here reads files or cuts text. `Vocabulary` is what both alphabets share: tokens to bytes, and bytes spelled
with tokens of single bytes or characters. `StandIns` lends tokens to bytes that a byte-level vocabulary lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from llmcomp.errors import Error, named

Tokens = npt.NDArray[np.int32]
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _byte_symbols() -> list[str]:
    """GPT-2's alphabet: the character that stands for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


SYMBOLS = _byte_symbols()
# For str.translate: symbols to their bytes as Latin-1, characters below 256 that are no symbols out of Latin-1's reach.
_LATIN1_OF_SYMBOL = dict.fromkeys(range(256), 0x100) | {ord(symbol): byte for byte, symbol in enumerate(SYMBOLS)}


def byte_level_bytes(entry: str) -> bytes | None:
    """The bytes of a text in GPT-2's alphabet; None for a special token of some kind, which is not in it."""
    try:
        return entry.translate(_LATIN1_OF_SYMBOL).encode("latin-1")
    except UnicodeEncodeError:
        return None


def byte_fallback_bytes(entry: str, space: str | None) -> bytes:
    """The bytes of an entry of a vocabulary of characters: <0x00> to <0xFF> a byte, `space` (or None) a space."""
    if match := _BYTE_TOKEN.fullmatch(entry):
        return bytes([int(match[1], 16)])
    return (entry if space is None else entry.replace(space, " ")).encode()


class Vocabulary:
    """What the tokens of a tokenizer.json stand for.

    `bytes_of`: {id: bytes}, without the tokens that stand for nothing; `lengths`: int64 [size], the bytes of every
    token's text, special tokens' spelling included. `space` is the character that stands for a space where the
    vocabulary is one of characters with byte fallback; `is_byte_level` otherwise.
    """

    def __init__(
        self, vocab: Mapping[str, int], added: Iterable[Mapping[str, Any]], is_byte_level: bool, space: str | None
    ) -> None:
        self._vocab, self._space, self._is_byte_level = vocab, space, is_byte_level
        # What the model means by its tokens, whatever is added.
        self._own = {token: raw for entry, token in vocab.items() if (raw := self._bytes(entry)) is not None}
        self.bytes_of = dict(self._own)
        texts = dict(self._own)
        self._added_of: dict[int, str] = {}
        for added_token in added:
            token, content = added_token["id"], added_token["content"]
            raw = content.encode() if is_byte_level else byte_fallback_bytes(content, space)
            texts[token] = self.bytes_of[token] = raw
            self._added_of[token] = content
            if added_token.get("special"):
                del self.bytes_of[token]
        self.lengths = np.zeros(1 + max([*vocab.values(), *texts]), np.int64)
        for token, raw in texts.items():
            self.lengths[token] = len(raw)
        self._taken = np.array(sorted(t for t, raw in self._own.items() if self.bytes_of.get(t) != raw), np.int32)

    def _bytes(self, entry: str) -> bytes | None:
        return byte_level_bytes(entry) if self._is_byte_level else byte_fallback_bytes(entry, self._space)

    def is_spelled(self, ids: Iterable[int], data: bytes) -> bool:
        """Whether the tokens stand for `data`."""
        try:
            return b"".join(map(self.bytes_of.__getitem__, ids)) == data
        except KeyError:
            return False

    def respell(self, ids: Tokens) -> Tokens:
        """The model's tokens, with those that an added token has taken over spelled by others; `Error` if none can."""
        if not len(self._taken):
            return ids
        at = np.flatnonzero(np.isin(ids, self._taken))
        if not len(at):
            return ids
        parts: list[Any] = []
        start = 0
        for place in at.tolist():
            parts += [ids[start:place], np.array(self.spell(self._own[int(ids[place])]), np.int32)]
            start = place + 1
        return np.concatenate([*parts, ids[start:]])

    def spell(self, data: bytes) -> list[int]:
        """Tokens of `data`, each of one byte or, in a vocabulary of characters, one character; `Error` if none is."""
        if self._is_byte_level:
            return [self.token_of_byte(byte) for byte in data]
        found: list[int] = []
        for character in data.decode("utf-8", "surrogateescape"):
            raw = character.encode("utf-8", "surrogateescape")
            token = self._vocab.get(self._space if character == " " and self._space else character, -1)
            found += [token] if self.bytes_of.get(token) == raw else map(self.token_of_byte, raw)
        return found

    def token_of_byte(self, byte: int) -> int:
        """The token that the vocabulary has for a byte; `Error` if an added token has taken its id."""
        entry = SYMBOLS[byte] if self._is_byte_level else f"<0x{byte:02X}>"
        token = self._vocab.get(entry, -1)
        if self.bytes_of.get(token) != bytes([byte]):
            taken = f"added token {named(self._added_of.get(token, ''))} has the id {token} of {entry}"
            raise Error(f"no token for byte 0x{byte:02x}: {taken if token >= 0 else f'{entry} is not in vocab'}")
        return token

    def missing_bytes(self) -> list[int]:
        """The bytes that the vocabulary has no entry for, ascending."""
        entries = SYMBOLS if self._is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        return [byte for byte, entry in enumerate(entries) if entry not in self._vocab]


class StandIns:
    """Which tokens stand for the bytes that a byte-level vocabulary has no token for.

    While encoding, missing byte m is first a private character that no BPE merge holds, with an id that only the raw
    tokenizer knows, then (`mark`) the mark -1 - m, which is no token, and at last (`put_in`) its stand-in.
    """

    def __init__(self, vocab: Mapping[str, int], vocabulary: Vocabulary, missing: Sequence[int], origin: str) -> None:
        bytes_of = vocabulary.bytes_of
        self.symbols = dict(enumerate(SYMBOLS)) | {byte: chr(0xE000 + byte) for byte in missing}
        two_bytes = {
            text: token
            for token, text in (sorted(bytes_of.items(), reverse=True) if missing else ())
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
        self._bytes_before = {token: bytes_of[token] for token in self.token_of_byte.values()}
        self._vocabulary = vocabulary
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
        """The raw tokenizer's ids for missing bytes -> marks; the others where added tokens have not taken them."""
        missing = np.flatnonzero(raw_ids >= self._first_raw_id) if self.token_of_byte else ()
        if len(missing):
            raw_ids[missing] = self._mark_of_raw_id[raw_ids[missing] - self._first_raw_id]
        return self._vocabulary.respell(raw_ids)

    def put_in(self, tokens: Tokens) -> Tokens:
        """Spell real occurrences of the stand-ins' own bytes, then replace the marks by the stand-ins."""
        twice = np.isin(tokens, list(self._bytes_before))
        out = np.repeat(tokens, 1 + twice)
        at = np.flatnonzero(twice) + np.arange(np.count_nonzero(twice))
        spelling = {t: self._vocabulary.spell(self._bytes_before[t]) for t in set(tokens[twice].tolist())}
        spelled = np.array([spelling[token] for token in tokens[twice].tolist()], np.int32).reshape(-1, 2)
        out[at], out[at + 1] = spelled[:, 0], spelled[:, 1]
        return np.where(out < 0, self._token_of_mark[np.minimum(out, 0)], out)


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False
