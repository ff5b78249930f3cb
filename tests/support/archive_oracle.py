"""A second decoder of archives, in plain Python from csrc/FORMAT.md, section 5. Nothing of the package is used here.

What it cannot do by itself is the model: it is given a function that starts a window and returns a function from an
input token to the row of logits after it. Intervals and the range decoder are oracle.py's.
"""

import hashlib
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence

import mixing_oracle
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
    require(reader.take(4) == b"\x89LMC", "magic")
    version, flags = reader.integer(1), reader.integer(1)
    require(version in (1, 2) and flags < 2, "version, flags")
    header: dict = {"version": version, "salt": reader.take(16) if version == 2 else b""}
    header["segment_bytes"] = reader.varint()
    if flags:
        for name in ("arithmetic", "engine", "mapping"):
            header[name] = reader.integer(1)
        header["mixing"] = reader.integer(1) if version == 2 else 0
        require(header["mixing"] in (0, 1), "mixing")
        for name in ("context_length", "overlap", "vocab_size", "bos_token"):
            header[name] = reader.varint()
        header["weights"], header["tokenizer"] = reader.take(16), reader.take(8)
        header["name"], header["revision"] = (reader.take(reader.integer(1)).decode() for _ in range(2))
    header["H"] = zlib.crc32(reader.data[: reader.at])
    require(reader.integer(4) == header["H"], "header checksum")
    require(16 <= header["segment_bytes"] <= 2**20, "segment_bytes")
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


def with_payloads(blob: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The archive with other payloads of its coded segments, and the checksums and offsets that these need."""
    header, segments, size, digest = read_segments(blob)
    reader = Reader(blob)
    read_header(reader)
    tag_bytes = 2 if header["segment_bytes"] <= 2**16 else 3
    out, entries = blob[: reader.at], b""
    for number, (n, is_stored, payload) in enumerate(segments):
        if number and number % 256 == 0:
            entries += len(out).to_bytes(6, "little")
        if n < header["segment_bytes"]:
            out += b"\xff" * tag_bytes + varint_bytes(n)
        payload = payload if is_stored else change(payload)
        check = zlib.crc32(payload) ^ zlib.crc32(struct.pack("<IQII", header["H"], number, n, len(payload)))
        out += (0 if is_stored else len(payload)).to_bytes(tag_bytes, "little") + struct.pack("<I", check) + payload
    if size % header["segment_bytes"] == 0:
        out += b"\xff" * tag_bytes + b"\0"
    tail = entries + struct.pack("<Q", size) + digest
    return out + tail + struct.pack("<I", zlib.crc32(tail, header["H"]))


def varint_bytes(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint_bytes(value // 128)


def decode_stream(
    header: dict, stream: bytes, n_bytes: int, token_bytes: Sequence[bytes | None], start: Callable[[], Step]
) -> bytes:
    """The bytes of the tokens of one stream: windows, then tokens until n_bytes are complete."""
    decoder, mixer = oracle.Decoder(stream), mixing_oracle.Mixer()
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
        weights = [int(w) for w in oracle.weights(row[: header["vocab_size"]])]
        token = decoder.next(mixing_oracle.mixed_weights(mixer, weights) if header["mixing"] else weights)
        if header["mixing"]:
            mixer.take(token, weights[token], sum(weights))
        raw = token_bytes[token]
        require(raw is not None and len(tokens) < 2 * n_bytes, "impossible token")
        assert raw is not None
        tokens.append(token)
        joined += raw
        n_complete += sum(byte < 0xC0 for byte in raw) if is_latin1 else len(raw)
    require(n_complete == n_bytes, "too many bytes")
    return joined


def n_side_bytes(mapping: str, n: int, lacks_bytes: bool) -> int:
    return {"bytes": int(lacks_bytes), "latin1": 0}.get(mapping, -(-n // 8))


def is_marked(payload: bytes, mapping: str | None, n: int, lacks_bytes: bool) -> bool:
    """Whether the payload has a kind in an archive of format 2."""
    n_side = 0 if mapping is None else n_side_bytes(mapping, n, lacks_bytes)
    return payload[-1] == 0 and len(payload) not in (n_side, 1)


def stock_content(payload: bytes, n: int) -> bytes:
    """The content of a payload of a stock codec, by the one-shot functions of the standard library."""
    stream, kind = payload[:-2], payload[-2]
    require(kind in (1, 2), "kind of payload")
    if kind == 1:
        inflate = zlib.decompressobj(wbits=-15)
        content, is_whole = inflate.decompress(stream) + inflate.flush(), inflate.eof and not inflate.unused_data
    else:
        # The header of a file of the LZMA SDK: lc + 9 (lp + 5 pb), the dictionary, no size told.
        file = bytes([3 + 9 * (0 + 5 * 2)]) + struct.pack("<IQ", 2**20, 2**64 - 1) + stream
        alone = lzma.LZMADecompressor(lzma.FORMAT_ALONE)
        content, is_whole = alone.decompress(file), alone.eof and not alone.unused_data
    require(is_whole and len(content) == n, "the end of a stock codec's stream")
    return content


def cut_payload(payload: bytes, mapping: str, n: int, lacks_bytes: bool) -> tuple[bytes, bytes]:
    """(side bytes, stream) of a payload of n original bytes."""
    n_side = n_side_bytes(mapping, n, lacks_bytes)
    side, stream = payload[:n_side], payload[n_side:]
    require(len(side) == n_side, "too short for its side bytes")
    if mapping == "bytes":
        require(side in (b"", b"\x00", b"\x80"), "side byte")
    elif side and n % 8:
        require(side[-1] % 2 ** (8 - n % 8) == 0, "a side bit behind the last")
    require(not stream.endswith(b"\0") or payload == b"\0", "a zero byte behind the stream")
    return side, stream


def undo_mapping(mapping: str, joined: bytes, side: bytes) -> bytes:
    if mapping == "bytes":
        return joined
    if mapping == "latin1":
        try:
            return bytes(ord(character) for character in joined.decode())
        except ValueError:
            raise Damaged("not the UTF-8 of characters below U+0100") from None
    require(max(joined) < 0x80, "a byte of 80 or more")
    bits = [side[i // 8] >> (7 - i % 8) & 1 for i in range(len(joined))]
    if mapping == "shift":
        return bytes(byte * 2 + bit for byte, bit in zip(joined, bits, strict=True))
    return bytes(byte + 128 * bit for byte, bit in zip(joined, bits, strict=True))


def decode(
    blob: bytes,
    token_bytes: Sequence[bytes | None],
    stand_ins: dict[int, int],
    start: Callable[[], Step],
    *,
    dummy_space: bool = False,
) -> bytes:
    """The original. `token_bytes` by token, `stand_ins`: byte without a token -> the token that stands for it."""
    header, segments, size, digest = read_segments(blob)
    out = b""
    for n, is_stored, payload in segments:
        if is_stored:
            out += payload
            continue
        mapping = MAPPINGS[header["mapping"]] if "mapping" in header else None
        own = header
        if header["version"] == 2 and is_marked(payload, mapping, n, bool(stand_ins) or dummy_space):
            if payload[-2] != 3 or not header.get("mixing"):
                out += stock_content(payload, n)
                continue
            payload, own = payload[:-2], header | {"mixing": 0}
        require(mapping is not None, "a payload that needs a model")
        assert mapping is not None
        side, stream = cut_payload(payload, mapping, n, bool(stand_ins) or dummy_space)
        table = list(token_bytes)
        if side == b"\x80" and mapping == "bytes":
            for byte, token in stand_ins.items():
                table[token] = bytes([byte])
        n += dummy_space and side == b"\x80" and mapping == "bytes"
        joined = undo_mapping(mapping, decode_stream(own, stream, n, table, start), side)
        if dummy_space and side == b"\x80" and mapping == "bytes":
            require(joined[:1] == b" ", "no dummy space")
            joined = joined[1:]
        out += joined
    require(len(out) == size and hashlib.sha256(out).digest()[:16] == digest, "content hash")
    return out


# Tokens of a byte-level BPE vocabulary.


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others follow from U+0100 on, in order."""
    kept = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


def vocabulary(tokenizer: dict) -> tuple[list[bytes | None], dict[int, int]]:
    """(bytes by token, stand-ins) of the content of a tokenizer.json: section 5.5. `Damaged` where it is refused."""
    alphabet = byte_alphabet()
    vocab = tokenizer["model"]["vocab"]
    if tokenizer["model"].get("byte_fallback"):
        return vocabulary_of_characters(vocab, tokenizer["added_tokens"], space_character(tokenizer)), {}
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    table: list[bytes | None] = [None] * (max(*vocab.values(), *added, 0) + 1)
    for text, token in vocab.items():
        if all(character in alphabet for character in text):
            table[token] = bytes(alphabet[character] for character in text)
    for token, entry in added.items():
        table[token] = None if entry["special"] else entry["content"].encode()
    return table, stand_ins(vocab, table)


def steps(tokenizer: dict, key: str, parts: str) -> list[dict]:
    first = tokenizer.get(key) or {"type": "Sequence", parts: []}
    return first[parts] if first["type"] == "Sequence" else [first]


def space_character(tokenizer: dict) -> str:
    """As which character a space is written; a space where it is itself."""
    found = set()
    for step in steps(tokenizer, "normalizer", "normalizers"):
        if step["type"] == "Prepend":
            found.add(step["prepend"])
        if step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            found.add(step["content"])
    for step in steps(tokenizer, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace":
            found.add(step["replacement"])
    require(len(found) < 2 and all(len(space) == 1 for space in found), "spaces of several kinds")
    return found.pop() if found else " "


def has_dummy_space(tokenizer: dict) -> bool:
    for step in steps(tokenizer, "normalizer", "normalizers"):
        if step["type"] == "Prepend":
            return True
    for step in steps(tokenizer, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace":
            if "prepend_scheme" in step:
                return step["prepend_scheme"] != "never"
            return step.get("add_prefix_space") is not False
    return False


def vocabulary_of_characters(vocab: dict[str, int], added: list[dict], space: str) -> list[bytes | None]:
    texts_of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    require(set(texts_of_bytes) <= set(vocab), "a byte without a token")

    def raw(text: str) -> bytes:
        if text in texts_of_bytes:
            return bytes([texts_of_bytes.index(text)])
        return b"".join(b"\x20" if character == space else character.encode() for character in text)

    table: list[bytes | None] = [None] * (1 + max([*vocab.values(), *(entry["id"] for entry in added)]))
    for text, token in vocab.items():
        table[token] = raw(text)
    for entry in added:
        table[entry["id"]] = None if entry["special"] else raw(entry["content"])
    return table


def stand_ins(vocab: dict[str, int], table: list[bytes | None]) -> dict[int, int]:
    """Missing byte -> token, by the four steps of section 5.5."""
    missing = [byte for symbol, byte in byte_alphabet().items() if symbol not in vocab]
    if not missing:
        return {}
    require(sorted(vocab.values()) == list(range(len(vocab))), "gaps in the vocabulary")
    candidates: list[int] = []
    for code in range(0x80, 0x800):
        spelled = bytes([0xC0 + code // 64, 0x80 + code % 64])
        if spelled in table and not set(spelled) & set(missing):
            candidates.append(table.index(spelled))
    found = {}
    for byte in missing:
        own = bytes([0xC3, byte - 0x40]) if byte >= 0xC0 else b""
        token = table.index(own) if own and own in table else -1
        if token in candidates:
            found[byte] = token
            candidates.remove(token)
    for byte in sorted(set(missing) - set(found)):
        require(bool(candidates), "too few stand-ins")
        found[byte] = min(candidates)
        candidates.remove(found[byte])
    return found
