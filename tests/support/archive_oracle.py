"""A second decoder of archives, in plain Python from csrc/FORMAT.md, section 5. Nothing of the package is used here.

What it cannot do by itself is the model: it is given a function that starts a window and returns a function from an
input token to the row of logits after it. Intervals and the range decoder are oracle.py's.
"""

import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import oracle

MAPPINGS = ("bytes", "latin1", "shift", "ascii")

Step = Callable[[int], np.ndarray]


class Damaged(Exception):
    """The archive does not follow the format."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Damaged(what)


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> bytes:
        require(self.at + n <= len(self.data), "too short")
        self.at += n
        return self.data[self.at - n : self.at]

    def integer(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def varint(self) -> int:
        septets = []
        while not septets or septets[-1] & 0x80:
            septets.append(self.integer(1))
        require(len(septets) == 1 or septets[-1] != 0, "varint not minimal")
        value = sum((septet & 0x7F) << 7 * i for i, septet in enumerate(septets))
        require(value < 2**28, "varint too large")
        return value


def read_header(reader: Reader) -> dict:
    require(reader.take(4) == b"\x89LMC" and reader.integer(1) == 1, "magic, version")
    header: dict = {"flags": reader.integer(1), "segment_bytes": reader.varint()}
    if header["flags"]:
        for name in ("arithmetic", "engine", "mapping"):
            header[name] = reader.integer(1)
        for name in ("context_length", "overlap", "vocab_size", "bos_token"):
            header[name] = reader.varint()
        header["weights"], header["tokenizer"] = reader.take(16), reader.take(8)
        header["name"], header["revision"] = (reader.take(reader.integer(1)).decode() for _ in range(2))
    header["H"] = zlib.crc32(reader.data[: reader.at])
    require(reader.integer(4) == header["H"], "header checksum")
    require(header["flags"] < 2 and 16 <= header["segment_bytes"] <= 2**20, "header fields")
    return header


def read_segments(blob: bytes) -> tuple[dict, list[tuple[int, bool, bytes]], int, bytes]:
    """(header, [(original bytes, is stored, payload)], size and hash of the original)."""
    reader = Reader(blob)
    header = read_header(reader)
    tag_bytes = 2 if header["segment_bytes"] <= 2**16 else 3
    segments: list[tuple[int, bool, bytes]] = []
    entries = b""

    def frame(n: int, tag: int) -> None:
        require(tag <= n - 2 or tag == 0, "payload saves too little")
        check = reader.integer(4)
        payload = reader.take(tag or n)
        place = struct.pack("<IQII", header["H"], len(segments), n, len(payload))
        require(check == zlib.crc32(payload) ^ zlib.crc32(place), "segment checksum")
        segments.append((n, tag == 0, payload))

    while True:
        offset = reader.at
        tag = reader.integer(tag_bytes)
        is_end = tag == 2 ** (8 * tag_bytes) - 1
        n = reader.varint() if is_end else header["segment_bytes"]
        require(not is_end or n < header["segment_bytes"], "short segment too long")
        if n:
            if segments and len(segments) % 256 == 0:
                entries += offset.to_bytes(6, "little")
            frame(n, reader.integer(tag_bytes) if is_end else tag)
        if is_end:
            break
    body_at = reader.at
    require(reader.take(len(entries)) == entries, "index")
    size, digest = reader.integer(8), reader.take(16)
    require(reader.integer(4) == zlib.crc32(blob[body_at : reader.at - 4], header["H"]), "trailer checksum")
    require(size == sum(n for n, _, _ in segments) and reader.at == len(blob), "size")
    return header, segments, size, digest


def decode_stream(
    header: dict, stream: bytes, n_bytes: int, token_bytes: Sequence[bytes | None], start: Callable[[], Step]
) -> bytes:
    """The bytes of the tokens of one stream: windows, then tokens until n_bytes are complete."""
    decoder = oracle.Decoder(stream)
    context_length, overlap = header["context_length"], header["overlap"]
    is_latin1 = MAPPINGS[header["mapping"]] == "latin1"
    tokens: list[int] = []
    joined = b""
    n_complete, n_inputs, row, step = 0, context_length, None, None
    while n_complete < n_bytes:
        if n_inputs == context_length:
            step = start()
            row = step(header["bos_token"])
            context = tokens[len(tokens) - min(overlap, len(tokens)) :]
            n_inputs = 1 + len(context)
            for token in context:
                row = step(token)
        else:
            row = step(tokens[-1])
            n_inputs += 1
        token = decoder.next([int(w) for w in oracle.weights(row[: header["vocab_size"]])])
        raw = token_bytes[token]
        require(raw is not None and len(tokens) < 2 * n_bytes, "impossible token")
        tokens.append(token)
        joined += raw
        n_complete += sum(byte < 0xC0 for byte in raw) if is_latin1 else len(raw)
    require(n_complete == n_bytes, "too many bytes")
    return joined


def undo_mapping(mapping: str, joined: bytes, side: bytes) -> bytes:
    if mapping == "bytes":
        return joined
    if mapping == "latin1":
        return bytes(ord(character) for character in joined.decode())
    bits = [side[i // 8] >> (7 - i % 8) & 1 for i in range(len(joined))]
    if mapping == "shift":
        return bytes(byte * 2 + bit for byte, bit in zip(joined, bits, strict=True))
    return bytes(byte + 128 * bit for byte, bit in zip(joined, bits, strict=True))


def decode(
    blob: bytes, token_bytes: Sequence[bytes | None], stand_ins: dict[int, int], start: Callable[[], Step]
) -> bytes:
    """The original. `token_bytes` by token, `stand_ins`: byte without a token -> the token that stands for it."""
    header, segments, size, digest = read_segments(blob)
    out = b""
    for n, is_stored, payload in segments:
        if is_stored:
            out += payload
            continue
        mapping = MAPPINGS[header["mapping"]]
        n_side = {"bytes": int(bool(stand_ins)), "latin1": 0}.get(mapping, -(-n // 8))
        side, stream = payload[:n_side], payload[n_side:]
        table = list(token_bytes)
        if side == b"\x80" and mapping == "bytes":
            for byte, token in stand_ins.items():
                table[token] = bytes([byte])
        out += undo_mapping(mapping, decode_stream(header, stream, n, table, start), side)
    require(len(out) == size and hashlib.sha256(out).digest()[:16] == digest, "content hash")
    return out


# Tokens of a byte-level BPE vocabulary.


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others follow from U+0100 on, in order."""
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


def vocabulary(tokenizer: dict) -> tuple[list[bytes | None], dict[int, int]]:
    """(bytes by token, stand-ins) of the content of a tokenizer.json; special tokens stand for no bytes."""
    alphabet = byte_alphabet()
    vocab = tokenizer["model"]["vocab"]
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    table: list[bytes | None] = [None] * (max(*vocab.values(), *added, 0) + 1)
    for text, token in vocab.items():
        if token not in added:
            table[token] = bytes(alphabet[character] for character in text)
    for token, entry in added.items():
        if not entry["special"]:
            table[token] = entry["content"].encode()
    known = {raw: token for token, raw in reversed(list(enumerate(table))) if raw is not None}
    missing = [byte for byte in range(256) if bytes([byte]) not in known]
    characters = [chr(code).encode() for code in range(0x80, 0x800)]
    free = {raw: known[raw] for raw in characters if raw in known and not set(raw) & set(missing)}
    stand_ins = {byte: free.pop(chr(byte).encode()) for byte in missing if chr(byte).encode() in free}
    rest = iter(sorted(free.values()))
    return table, {byte: stand_ins[byte] if byte in stand_ins else next(rest) for byte in missing}
