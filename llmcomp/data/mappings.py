"""Mappings from bytes to tokens and back, each an exact inverse for any bytes. Tokenizers are in tokenizers.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmcomp.data.tokenizers import AnyTokenizer
from llmcomp.data.vocabulary import Tokens
from llmcomp.errors import Error


@dataclass(frozen=True)
class Encoded:
    """A mapping's output: tokens int32 [T]; `side_bits` bits beside them, packed into `side`, first bit on top."""

    tokens: Tokens
    side: bytes
    side_bits: int
    n_bytes: int


def prefix_of(tokenizer: AnyTokenizer) -> bytes:
    """What the tokenizer puts before text in training and mapping "bytes" may put before data; mostly nothing."""
    prefix: bytes = getattr(tokenizer, "prefix", b"")
    return prefix


def has_prefix_before(tokenizer: Any, data: bytes) -> bool:
    """Whether the tokenizer, one with a prefix, puts it before `data`."""
    return bool(tokenizer.takes_prefix(data))


class ByteEncoder(Protocol):
    """Bytes -> tokens and side bits, under a name of its own."""

    @property
    def name(self) -> str: ...
    def encode(self, data: bytes, tokenizer: AnyTokenizer) -> Encoded: ...


class ByteMapping(ByteEncoder, Protocol):
    """And back: every mapping is an exact inverse for any bytes."""

    def decode(self, tokens: npt.ArrayLike, side: bytes, n_bytes: int, tokenizer: AnyTokenizer) -> bytes: ...


class _Bytes:
    """The bytes themselves: `Tokenizer.encode_bytes`. One side bit, set, where stand-ins are used, else none.

    A tokenizer that puts a space before text in training (`prefix`) always has one side bit: set where the tokens are
    those of the space and the bytes. They are where the bytes begin with text and no tokens more than bytes result.
    """

    name = "bytes"

    def encode(self, data: bytes, tokenizer: AnyTokenizer) -> Encoded:
        if prefix := prefix_of(tokenizer):
            tokens, side = np.empty(0, np.int32), b"\0"
            if has_prefix_before(tokenizer, data):
                tokens = tokenizer.encode_bytes(prefix + data)
                side = b"\x80" if len(tokens) <= len(data) else side
            return Encoded(tokens if side == b"\x80" else tokenizer.encode_bytes(data), side, 1, len(data))
        stand_ins = tokenizer.needs_stand_ins(data)
        side = b"\x80" if stand_ins else b""
        return Encoded(tokenizer.encode_bytes(data, stand_ins), side, len(side), len(data))

    def decode(self, tokens: npt.ArrayLike, side: bytes, n_bytes: int, tokenizer: AnyTokenizer) -> bytes:
        prefix = prefix_of(tokenizer)
        if side not in ((b"\0", b"\x80") if prefix else (b"", b"\x80")):
            expected = "00 or 80" if prefix else "none or 80"
            raise Error(f"mapping {self.name}: found side bits {side[:8].hex()}, expected {expected}")
        data = tokenizer.decode_bytes(tokens, stand_ins=bool(side) and not prefix)
        if prefix and side == b"\x80":
            if not data.startswith(prefix):
                raise Error(f"mapping {self.name}: the tokens begin with {data[:1]!r}, expected {prefix!r}")
            data = data[len(prefix) :]
        _check_length(self.name, "bytes", len(data), n_bytes)
        return data


class _Latin1:
    """Byte b is the character U+00b; bytes from 128 on cost two bytes of UTF-8."""

    name = "latin1"

    def encode(self, data: bytes, tokenizer: AnyTokenizer) -> Encoded:
        return Encoded(tokenizer.encode_bytes(data.decode("latin-1").encode()), b"", 0, len(data))

    def decode(self, tokens: npt.ArrayLike, side: bytes, n_bytes: int, tokenizer: AnyTokenizer) -> bytes:
        _check_length(self.name, "side bytes", len(side), 0)
        try:
            data = tokenizer.decode_bytes(tokens).decode().encode("latin-1")
        except UnicodeError as error:
            raise Error(f"mapping {self.name}: the tokens are not the UTF-8 of characters below U+0100") from error
        _check_length(self.name, "bytes", len(data), n_bytes)
        return data


@dataclass(frozen=True)
class _SevenBits:
    """Seven bits of each byte as an ASCII character, bit number `side_bit` (0 is the lowest) beside it."""

    name: str
    side_bit: int

    def encode(self, data: bytes, tokenizer: AnyTokenizer) -> Encoded:
        values = np.frombuffer(data, np.uint8)
        text = values >> 1 if self.side_bit == 0 else values & 127
        side = np.packbits(values >> self.side_bit & 1).tobytes()
        return Encoded(tokenizer.encode_bytes(text.tobytes()), side, len(data), len(data))

    def decode(self, tokens: npt.ArrayLike, side: bytes, n_bytes: int, tokenizer: AnyTokenizer) -> bytes:
        text = np.frombuffer(tokenizer.decode_bytes(tokens), np.uint8)
        _check_length(self.name, "bytes", len(text), n_bytes)
        _check_length(self.name, "side bytes", len(side), -(-n_bytes // 8))
        if text.max(initial=0) > 127:
            raise Error(f"mapping {self.name}: the tokens hold byte {text.max()}, expected 0 to 127")
        bits = np.unpackbits(np.frombuffer(side, np.uint8), count=n_bytes)
        return ((text << 1 | bits) if self.side_bit == 0 else (text | bits << 7)).tobytes()


_MAPPINGS: dict[str, ByteMapping] = {
    mapping.name: mapping for mapping in (_Bytes(), _Latin1(), _SevenBits("shift", 0), _SevenBits("ascii", 7))
}
MAPPINGS: tuple[str, ...] = tuple(_MAPPINGS)


def get_mapping(name: str) -> ByteMapping:
    """The mapping called "bytes", "latin1", "shift" (b >> 1, low bit beside) or "ascii" (b % 128, top bit beside)."""
    if name not in _MAPPINGS:
        raise Error(f"no mapping is called {name!r}; there are {', '.join(MAPPINGS)}")
    return _MAPPINGS[name]


def _check_length(mapping: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise Error(f"mapping {mapping}: found {found} {what}, expected {expected}")
