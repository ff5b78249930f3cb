"""Segments of bytes to payloads and back with one model: what archives and scores are both made of.

A segment is cut into tokens by a mapping, the tokens are coded through the windows of windows.py. Where payloads lie
in an archive is container.py's business; files, streams and tables are codec.py's and archive.py's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from llmcomp import coding
from llmcomp.codec import container, stock_codecs
from llmcomp.codec.container import Header, ModelId, Segment
from llmcomp.codec.windows import WindowedModel
from llmcomp.data import mappings
from llmcomp.data.mappings import Encoded
from llmcomp.errors import CorruptArchive, Error, ModelMismatch
from llmcomp.models.adapter import AdaptedModel, ModelTraits
from llmcomp.models.load import NamedModel, load_model, load_registered
from llmcomp.models.memory import MaxMemory
from llmcomp.models.registry import list_models

# Codes of engines in an archive; 0 is any object with logits() and session() that names no engine.
ENGINE_CODES = {"": 0, "exact": 1, "torch": 2, "exact-int8": 3}
MAPPING_DEFAULT = "bytes"
# Chosen by benchmarks/bench_archive.py --overlaps: a quarter of the context saves 1.6 % of enwik8 and takes 1.4 times
# as long to decode, half of it 1.8 % and 1.9 times (benchmarks/results/archive.md).
OVERLAP_SHARE_DEFAULT = 0.25
# Where rows are mixed, what a window lacks is known from the stream: a sixteenth saves 0.4 % and takes 1.07 times as
# long, a quarter 0.6 % and 1.33 times (benchmarks/results/mixing.md).
OVERLAP_SHARE_MIXED = 0.0625
# Nor does a small model (its weights outside the embeddings) need all of its context then: half of it takes 0.2 to
# 0.4 % more bytes of text, logs and code and half the reading of keys and values (there, too).
SMALL_MODEL_WEIGHTS = 1 << 21
_REVISION = re.compile(r"(?:step([0-9]{1,9}))?")
OnShare = Callable[[float], Any] | None
_T = TypeVar("_T")
# The side byte of mapping bytes with a vocabulary that lacks some.
_BIT_UNSET, _BIT_SET = b"\x00", b"\x80"


def _hash_prefix(fingerprint: str | None, n_bytes: int) -> bytes:
    """The first bytes of a hexadecimal SHA-256; of any other text, the first of its own SHA-256; zeros for None."""
    if not fingerprint:
        return bytes(n_bytes)
    try:
        raw = bytes.fromhex(fingerprint)
    except ValueError:
        raw = b""
    return (raw if len(raw) >= n_bytes else hashlib.sha256(fingerprint.encode()).digest())[:n_bytes]


def _check_identity(wanted: ModelId, traits: ModelTraits) -> None:
    """ModelMismatch unless that model decodes what `wanted` coded; both are named with what differs."""
    found = _identity(traits, wanted.mapping, wanted.context_length, wanted.overlap, wanted.mixing)
    by_name = not any(wanted.weights_hash)
    differing = [
        field
        for field in ("arithmetic_version", "engine", "weights_hash", "tokenizer_hash", "vocab_size", "bos_token")
        if getattr(found, field) != getattr(wanted, field)
    ]
    if by_name and (wanted.name, wanted.revision) != (found.name, found.revision):
        differing.append("name")
    if wanted.context_length > traits.context_length:
        differing.append(f"context of {wanted.context_length} tokens, found {traits.context_length}")
    if differing:
        raise ModelMismatch(
            f"the archive needs {_describe(wanted)}; found {_describe(found)} (different: {', '.join(differing)})"
        )


def _describe(identity: ModelId) -> str:
    engine = _engine_name(identity.engine)
    weights = f"weights {identity.weights_hash.hex()[:12]}" if any(identity.weights_hash) else "weights not recorded"
    parts = [identity.name, identity.revision, f"engine {engine}" if engine else "", weights]
    return ", ".join(part for part in parts if part)


def _engine_name(code: int) -> str:
    return next((name for name, known in ENGINE_CODES.items() if known == code), "")


def _identity(traits: ModelTraits, mapping: int, context_length: int, overlap: int, mixing: int) -> ModelId:
    if traits.engine not in ENGINE_CODES:
        raise Error(
            f"no archive knows engine {traits.engine!r}; expected one of {', '.join(filter(None, ENGINE_CODES))}"
        )
    return ModelId(
        name=traits.name,
        revision=traits.revision,
        weights_hash=_hash_prefix(traits.fingerprint, container.WEIGHTS_HASH_BYTES),
        tokenizer_hash=_hash_prefix(traits.tokenizer.fingerprint, container.TOKENIZER_HASH_BYTES),
        arithmetic_version=traits.arithmetic,
        engine=ENGINE_CODES[traits.engine],
        mapping=mapping,
        context_length=context_length,
        overlap=overlap,
        vocab_size=traits.vocab_size,
        bos_token=traits.bos_token,
        mixing=mixing,
    )


def archive_context(model: Any, mixing: int) -> int:
    """The context that archives are coded with, in tokens."""
    traits = ModelTraits.of(model)
    is_small = traits.n_params_nonembedding is not None and traits.n_params_nonembedding < SMALL_MODEL_WEIGHTS
    return max(1, traits.context_length // 2) if mixing and is_small else traits.context_length


def windowed_model(
    model: Any, overlap: int | None = None, context_length: int | None = None, max_memory: MaxMemory = None
) -> WindowedModel:
    """`model` with the windows that archives are coded with; None: the defaults."""
    adapted = model if isinstance(model, AdaptedModel) else AdaptedModel(model)
    traits = adapted.traits
    context_length = traits.context_length if context_length is None else context_length
    return WindowedModel(
        adapted,
        vocab_size=traits.vocab_size,
        bos_token=traits.bos_token,
        context_length=context_length,
        overlap=int(context_length * OVERLAP_SHARE_DEFAULT) if overlap is None else overlap,
        is_stepwise=traits.engine == "torch",
        max_memory=max_memory,
    )


# Segments.


def as_chunks(chunks: Iterable[Any]) -> list[bytes]:
    """The chunks of a user as bytes; `Error` for one chunk or a name where several are meant, and for other items."""
    if isinstance(chunks, (bytes, bytearray, memoryview, str, os.PathLike)):
        raise Error(
            f"chunks are one {type(chunks).__name__}; expected several bytes objects, as load_dataset gives them"
        )
    found = []
    for number, chunk in enumerate(chunks):
        try:
            found.append(bytes(memoryview(chunk)))
        except TypeError:
            raise Error(f"chunk {number} is a {type(chunk).__name__}; expected bytes") from None
    return found


class Coded(NamedTuple):
    """A coded segment: `side` bytes that the mapping needs, and the coder's `stream`; one after the other the payload.

    A payload is never empty: the decoder reads zeros behind the end of a stream, so one of no bytes is also one zero.
    """

    side: bytes
    stream: bytes
    side_bits: int
    n_tokens: int
    ideal_bits: float
    token_bits: npt.NDArray[np.float64]  # of every token, [n_tokens]; ideal_bits is their sum

    @property
    def payload(self) -> bytes:
        return self.side + self.stream or b"\0"


class SegmentCodec:
    """Segments of bytes <-> payloads with one model, one mapping and one window plan.

    The payload of a segment depends on nothing else: not on the segments beside it, lanes, threads or backend.
    `mixing`: the version of what is learnt from the segment itself, 0 for nothing (FORMAT.md, "Mixing").
    `may_be_marked`: the segments are those of an archive of format 2, whose payloads may have a kind.
    `is_stepwise` None: step by step with the torch engine, whose one-pass logits are not bit for bit its steps'.
    """

    def __init__(
        self,
        model: Any,
        mapping: str = MAPPING_DEFAULT,
        overlap: int | None = None,
        context_length: int | None = None,
        is_stepwise: bool | None = None,
        *,
        max_memory: MaxMemory = None,
        mixing: int = 0,
        may_be_marked: bool = False,
    ):
        adapted = AdaptedModel(model)
        self.traits = adapted.traits
        if overlap is None and mixing:
            overlap = int((context_length or self.traits.context_length) * OVERLAP_SHARE_MIXED)
        self._may_be_marked = may_be_marked
        self._mapping = mappings.get_mapping(mapping)
        self._model = windowed_model(adapted, overlap, context_length, max_memory)
        if is_stepwise is not None:
            self._model.is_stepwise = is_stepwise
        context_length, overlap = self._model.context_length, self._model.overlap
        self._is_mixed = mixing != 0
        self.identity = _identity(self.traits, mappings.MAPPINGS.index(mapping), context_length, overlap, mixing)
        # One side bit a segment says whether stand-ins are in use, of a vocabulary that has no token for some bytes,
        # or whether the tokens begin with the space that another tokenizer puts before text in training.
        self._prefix = mappings.prefix_of(self.traits.tokenizer) if mapping == "bytes" else b""
        lacks_bytes = mapping == "bytes" and self.traits.tokenizer.needs_stand_ins(bytes(range(256)))
        self._has_stand_ins = lacks_bytes and not self._prefix
        self._has_side_bit = lacks_bytes or bool(self._prefix)
        self._lanes = adapted.lanes(context_length)

    @classmethod
    def for_archive(
        cls, header: Header, model: Any = None, device: str | None = None, download: bool = False
    ) -> SegmentCodec | None:
        """The codec that decodes an archive, or None where it needs no model; ModelMismatch for another model.

        Without `model`, the one that the header names is loaded if it is one of the registry, and bundled or in the
        cache, or with `download` to be had: a name from a file is never taken for a folder or another name of the hub.
        """
        if header.model is None:
            return None
        wanted = header.model
        if wanted.mapping >= len(mappings.MAPPINGS):
            raise CorruptArchive(f"the archive's header has mapping {wanted.mapping}, which this llmcomp does not know")
        model = _model_of_header(wanted, device, download) if model is None else _given_model(model, wanted, device)
        traits = ModelTraits.of(model)
        _check_identity(wanted, traits)
        mapping = mappings.MAPPINGS[wanted.mapping]
        options: dict[str, Any] = {"mixing": wanted.mixing, "may_be_marked": bool(header.salt)}
        return cls(model, mapping, wanted.overlap, wanted.context_length, **options)

    @property
    def lanes(self) -> int:
        """How many segments are decoded side by side unless the caller says otherwise."""
        return self._lanes

    @property
    def batch_rows(self) -> int | None:
        """How many rows a batch of the model may have; None where streams are stepped through."""
        return self._model.batch_rows

    def encode(self, contents: Sequence[bytes], on_share: OnShare = None) -> list[Coded]:
        """The coded form of every segment. Error where the mapping or the model cannot code one.

        `on_share` is called with the share of the model's work that is done.
        """
        return self._reporting(self.start, self._encoded(contents), on_share)

    def _encoded(self, contents: Sequence[bytes]) -> list[Encoded]:
        return [self._mapping.encode(content, self.traits.tokenizer) for content in contents]

    def shortest_payloads(self, contents: Sequence[bytes], on_share: OnShare = None) -> list[bytes]:
        """The payloads of segments of an archive of format 2, without mixing where that is shorter with its mark."""
        if not self._is_mixed:
            return [coded.payload for coded in self.encode(contents, on_share)]
        return [
            min(mixed.payload, stock_codecs.marked(alone.payload, stock_codecs.ALONE), key=len)
            for alone, mixed in self._reporting(self.start_both, self._encoded(contents), on_share)
        ]

    def _reporting(
        self, start: Callable[[Sequence[Encoded]], Callable[[], _T]], encoded: Sequence[Encoded], on_share: OnShare
    ) -> _T:
        """What `start` gives for `encoded`, with the share that is done reported meanwhile."""
        if on_share is None:
            return start(encoded)()
        n_tokens, n_done = sum(len(item.tokens) for item in encoded), 0

        def report(n: int) -> None:
            nonlocal n_done
            n_done += n
            on_share(n_done / n_tokens)

        self._model.on_tokens = report
        try:
            return start(encoded)()
        finally:
            self._model.on_tokens = None

    def start(self, encoded: Sequence[Encoded]) -> Callable[[], list[Coded]]:
        """Gives the model the work of `encode` for segments whose tokens are known; what is returned codes them, on any
        thread."""
        if self._is_mixed:
            wait_for_both = self.start_both(encoded)
            return lambda: [mixed for _, mixed in wait_for_both()]
        wait = self._model.start_intervals([item.tokens for item in encoded])
        return lambda: [self._code(item, parts) for item, parts in zip(encoded, wait(), strict=True)]

    def start_both(self, encoded: Sequence[Encoded]) -> Callable[[], list[tuple[Coded, Coded]]]:
        """As `start`: what the model codes alone, and what it codes mixed, by one pass."""
        wait = self._model.start_intervals([item.tokens for item in encoded])

        def code() -> list[tuple[Coded, Coded]]:
            alone = zip(encoded, wait(), strict=True)
            return [
                (self._code(item, parts), self._code(item, np.stack(coding.mix_intervals(item.tokens, *parts))))
                for item, parts in alone
            ]

        return code

    def _code(self, item: Encoded, parts: npt.NDArray[np.uint64]) -> Coded:
        side, side_bits = (item.side or _BIT_UNSET, 1) if self._has_side_bit else (item.side, item.side_bits)
        bits = -np.log2(parts[1].astype(np.float64) / parts[2].astype(np.float64))
        return Coded(side, coding.encode_intervals(*parts), side_bits, len(item.tokens), float(bits.sum()), bits)

    def decode(
        self,
        payloads: Sequence[bytes],
        n_bytes: Sequence[int],
        on_step: Callable[[int], Any] | None = None,
        *,
        is_mixed: bool | None = None,
    ) -> list[bytes]:
        """The contents of segments of `n_bytes` each, from their payloads; CorruptArchive where they do not fit.

        `is_mixed` None: as this codec encodes.
        """
        sides = [self._side(payload, n) for payload, n in zip(payloads, n_bytes, strict=True)]
        left = sum(n_bytes)

        def report(n_done: int) -> None:
            # The spaces put before segments are no bytes of theirs.
            nonlocal left
            n_done = min(n_done, left)
            left -= n_done
            if on_step is not None:
                on_step(n_done)

        streams = self._model.decode(
            [payload[len(side) :] for payload, side in zip(payloads, sides, strict=True)],
            [n + len(self._prefix) * (side == _BIT_SET) for n, side in zip(n_bytes, sides, strict=True)],
            self._token_bytes,
            [int(self._uses_stand_ins(side)) for side in sides],
            report,
            is_mixed=self._is_mixed if is_mixed is None else is_mixed,
        )
        return [self._join(*parts) for parts in zip(streams, sides, n_bytes, strict=True)]

    def decode_segments(self, segments: Sequence[Segment], on_step: Callable[[int], Any] | None = None) -> list[bytes]:
        """The contents of an archive's segments, those that need no model included; CorruptArchive names the first that
        fails."""
        found: dict[int, bytes] = {}
        groups: tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]] = ([], [])
        for place, segment in enumerate(segments):
            payload, is_alone = self._own_payload(segment)
            if payload is None:
                found[place] = stock_codecs.content_of(segment)
                continue
            self._check_form(segment.number, payload, segment.n_bytes)
            groups[is_alone].append((place, payload))
        for group, is_mixed in zip(groups, (self._is_mixed, False), strict=True):
            if not group:
                continue
            lengths = [segments[place].n_bytes for place, _ in group]
            try:
                contents = self.decode([payload for _, payload in group], lengths, on_step, is_mixed=is_mixed)
            except CorruptArchive as error:
                first, last = segments[0].number, segments[-1].number
                raise CorruptArchive(
                    f"segments {first} to {last} do not decode, though their checksums are right ({error}): the model "
                    "computes something else here than where they were coded"
                ) from None
            found |= zip((place for place, _ in group), contents, strict=True)
        return [found[place] for place in range(len(segments))]

    def _own_payload(self, segment: Segment) -> tuple[bytes | None, bool]:
        """The model's payload of a segment, None where it needs no model, and whether it is one without mixing in an
        archive with it."""
        if segment.stored:
            return None, False
        side_bytes = self.side_bytes(segment.n_bytes)
        if not self._may_be_marked or not stock_codecs.is_marked(segment.payload, side_bytes):
            return segment.payload, False
        stream, kind = stock_codecs.cut(segment.payload)
        return (stream, True) if self._is_mixed and kind == stock_codecs.ALONE else (None, False)

    def side_bytes(self, n_bytes: int) -> int:
        """How many bytes stand before the stream of a segment of `n_bytes`."""
        return -(-self._side_bits(n_bytes) // 8)

    def _side_bits(self, n_bytes: int) -> int:
        return {"bytes": int(self._has_side_bit), "latin1": 0}.get(self._mapping.name, n_bytes)

    def _side(self, payload: bytes, n_bytes: int) -> bytes:
        """The side bytes of a payload; CorruptArchive where its form is one that no encoder writes."""
        n_bits = self._side_bits(n_bytes)
        length = self.side_bytes(n_bytes)
        side, stream = payload[:length], payload[length:]
        if len(side) < length or (side and side[-1] % (1 << 8 * length - n_bits)):
            raise CorruptArchive(
                f"a payload of {len(payload)} bytes does not begin with {n_bits} side bits in whole bytes"
            )
        if stream.endswith(b"\0") and payload != b"\0":
            raise CorruptArchive("a stream ends in a zero byte, which an encoder leaves out")
        return side

    def _check_form(self, number: int, payload: bytes, n_bytes: int) -> None:
        """CorruptArchive names a segment that no encoder writes; another model is not to blame for it."""
        try:
            self._side(payload, n_bytes)
        except CorruptArchive as error:
            raise CorruptArchive(f"segment {number} is malformed: {error}") from None

    def _uses_stand_ins(self, side: bytes) -> bool:
        return self._has_stand_ins and side == _BIT_SET

    @functools.cached_property
    def _token_bytes(self) -> npt.NDArray[np.int64]:
        """How many original bytes each token completes, -1 where it stands for none: int64 [2, vocab_size].

        The second row holds where stand-ins are in use. Under latin1 a byte above 127 is complete with the second of
        its two UTF-8 bytes, which may come with the next token.
        """
        table = np.full((2, self.traits.vocab_size), -1, np.int64)
        is_latin1 = self._mapping.name == "latin1"
        for stand_ins in (False, True)[: 1 + self._has_stand_ins]:
            for token in range(self.traits.vocab_size):
                with contextlib.suppress(Error):
                    raw = self.traits.tokenizer.decode_bytes([token], stand_ins=stand_ins)
                    table[int(stand_ins), token] = sum(byte < 0xC0 for byte in raw) if is_latin1 else len(raw)
        return table

    def _join(self, stream: npt.NDArray[np.int32], side: bytes, n_bytes: int) -> bytes:
        if self._has_stand_ins and not self._uses_stand_ins(side):
            side = b""
        try:
            return self._mapping.decode(stream, side, n_bytes, self.traits.tokenizer)
        except Error as error:
            raise CorruptArchive(str(error)) from None


def _given_model(model: Any, wanted: ModelId, device: str | None) -> Any:
    """The model that the user gave; one that is only named is loaded with the engine that the archive was made with."""
    if isinstance(model, (str, os.PathLike)):
        model = NamedModel(model, options={} if device is None else {"device": device})
    if not isinstance(model, NamedModel):
        return load_model(model, device=device)
    revision = _REVISION.fullmatch(wanted.revision)
    step = int(revision[1]) if revision and revision[1] else None

    def is_wanted(found: Any) -> bool:
        fingerprint = ModelTraits.of(found).fingerprint
        return _hash_prefix(fingerprint, container.WEIGHTS_HASH_BYTES) == wanted.weights_hash

    return model.load(_engine_name(wanted.engine) or "exact", wanted.name, step, is_wanted)


def _model_of_header(wanted: ModelId, device: str | None, download: bool) -> Any:
    revision = _REVISION.fullmatch(wanted.revision)
    if revision is None or wanted.name not in {entry.name for entry in list_models()}:
        raise Error(
            f"the archive needs {_describe(wanted)}, which is neither bundled nor in the registry: name the model"
        )
    step = int(revision[1]) if revision[1] else None
    engine = _engine_name(wanted.engine) or "exact"
    return load_registered(wanted.name, step, engine, device=device, download=download)
