"""Callers that mean harm or make every mistake get an exception or the right answer: no crash, no leak."""

import contextlib
import copy
import gc
import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest

import llmcomp
from llmcomp import _core, coding

LOGITS = np.float32([[0.5, -1.0, 2.0, 0.0], [3.0, 0.0, -2.0, 1.5]])
TOKENS = [2, 1]
TRIPLES = [oracle.interval(row, token) for row, token in zip(LOGITS, TOKENS, strict=True)]
PAYLOAD = oracle.encode(TRIPLES)


def as_triples(arrays):
    return [tuple(int(x) for x in triple) for triple in zip(*(np.ravel(a) for a in arrays), strict=True)]


def check_still_right():
    assert as_triples(llmcomp.intervals(LOGITS, TOKENS)) == TRIPLES
    assert llmcomp.encode(LOGITS, TOKENS) == PAYLOAD
    assert llmcomp.decode(PAYLOAD, LOGITS).tolist() == TOKENS


# Wrong types and shapes.

WRONG_LOGITS = {
    "float64": LOGITS.astype(np.float64),
    "int32": LOGITS.astype(np.int32),
    "uint16": LOGITS.astype(np.uint16),  # not taken for bfloat16
    "bool": LOGITS > 0,
    "complex": LOGITS.astype(np.complex64),
    "longdouble": LOGITS.astype(np.longdouble),
    "object": LOGITS.astype(object),
    "record": np.zeros((2, 4), [("a", "f4")]),
    "dates": np.zeros((2, 4), "M8[s]"),
    "void": np.zeros((2, 4), "V2"),
    "list": LOGITS.tolist(),
    "text": "logits",
    "none": None,
    "dict": {},
    "0-d": np.float32(3),
    "0-d array": np.zeros((), np.float32),
    "no symbols": np.zeros((2, 0), np.float32),
    "too many symbols": np.broadcast_to(np.float32(0), (1, 2**21 + 1)),
}


@pytest.mark.parametrize("name", WRONG_LOGITS)
def test_wrong_logits(name):
    logits = WRONG_LOGITS[name]
    calls = [
        lambda: llmcomp.intervals(logits, TOKENS),
        lambda: coding.log2_softmax(logits, TOKENS),
        lambda: llmcomp.encode(logits, TOKENS),
        lambda: llmcomp.decode(PAYLOAD, logits),
        lambda: llmcomp.Encoder(2).push(logits, TOKENS),
        lambda: llmcomp.Decoder([PAYLOAD] * 2).pull(logits),
    ]
    for call in calls:
        with pytest.raises(llmcomp.Error, match=r"logits ha(ve|s)|length") as caught:
            call()
        assert "expected" in str(caught.value)


def test_lists_that_are_no_arrays():
    with pytest.raises(ValueError):
        llmcomp.intervals([[1.0], [1.0, 2.0]], TOKENS)


WRONG_TOKENS = {
    "float": [2.0, 1.0],
    "bool": [True, False],
    "object": np.array([2, 1], object),
    "text": ["2", "1"],
    "none": None,
    "bytes": b"\x02\x01",
    "too few": [2],
    "too many": [2, 1, 0],
    "column": [[2], [1]],
    "0-d": 2,
    "beyond int64": [2**64, 1],
}


@pytest.mark.parametrize("name", WRONG_TOKENS)
def test_wrong_tokens(name):
    for call in (llmcomp.intervals, coding.log2_softmax, llmcomp.encode, lambda x, t: llmcomp.Encoder(2).push(x, t)):
        with pytest.raises((llmcomp.Error, OverflowError), match=r"tokens have (dtype|shape)|too large"):
            call(LOGITS, WRONG_TOKENS[name])


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i2", "u2", "i4", ">u4", "i8", "u8", ">u8"])
def test_tokens_of_every_integer_type(dtype):
    assert as_triples(llmcomp.intervals(LOGITS, np.array(TOKENS, dtype))) == TRIPLES
    assert as_triples(llmcomp.intervals(LOGITS, np.array([2, 9, 1, 9], dtype)[::2])) == TRIPLES


def test_unsigned_tokens_above_int64_are_outside():
    with pytest.raises(llmcomp.Error, match=r"row 1: token .* is outside the vocabulary"):
        llmcomp.intervals(LOGITS, np.array([0, 2**63 + 1], np.uint64))


@pytest.mark.parametrize("vocab_size", [0, -1, 5, 2**21 + 1, 2**31, 2**63, 2**70, -(2**70)])
def test_wrong_vocab_size(vocab_size):
    with pytest.raises(llmcomp.Error):
        llmcomp.intervals(LOGITS, TOKENS, vocab_size)
    if vocab_size != 5:  # an Encoder has not seen the logits
        for streams in (llmcomp.Encoder, lambda n, v: llmcomp.Decoder([b""] * n, v)):
            with pytest.raises(llmcomp.Error, match="vocab_size"):
                streams(2, vocab_size)


@pytest.mark.parametrize("vocab_size", [4.0, "4", [4], b""])
def test_vocab_size_that_is_no_integer(vocab_size):
    with pytest.raises(TypeError):
        llmcomp.intervals(LOGITS, TOKENS, vocab_size)


@pytest.mark.parametrize("payload", [None, "text", 5, [1, 2], np.zeros((2, 2), np.float32)[:, 0]])
def test_payload_that_is_no_bytes(payload):
    with pytest.raises((TypeError, BufferError, ValueError)):
        llmcomp.decode(payload, LOGITS)


@pytest.mark.parametrize("payloads", [b"ab", bytearray(2), "ab", None, 7, ["a", "b"], [b"", None], [b"", 3], {1: 2}])
def test_payloads_that_are_no_list_of_bytes(payloads):
    with pytest.raises((llmcomp.Error, TypeError)):
        llmcomp.Decoder(payloads)


def test_payloads_of_every_kind_of_buffer():
    for wrap in (bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)):
        assert llmcomp.decode(wrap(PAYLOAD), LOGITS).tolist() == TOKENS
        streams = llmcomp.Decoder(iter([wrap(PAYLOAD)]))
        assert [streams.pull(LOGITS[i : i + 1]).tolist() for i in range(2)] == [[2], [1]]


def test_decoder_keeps_its_own_bytes():
    payload = bytearray(PAYLOAD)
    streams = llmcomp.Decoder([payload])
    payload[:] = b"\xff" * len(payload)
    payload.clear()
    assert [streams.pull(LOGITS[i : i + 1]).tolist() for i in range(2)] == [[2], [1]]


@pytest.mark.parametrize("active", [[1, 0], [True], [[True, False]], np.array([1.0, 0.0]), "no", 3, b"\x01\x00"])
def test_wrong_masks(active):
    with pytest.raises(llmcomp.Error, match="active"):
        llmcomp.Encoder(2).push(LOGITS, TOKENS, active)
    with pytest.raises(llmcomp.Error, match="active"):
        llmcomp.Decoder([PAYLOAD] * 2).pull(LOGITS, active)


def test_masks_with_strides():
    active = np.array([True, True, False, True])[::2]
    assert llmcomp.Decoder([PAYLOAD] * 2).pull(LOGITS, active).tolist() == [2, -1]


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (2, 1, 4), (0, 4)])
def test_streams_want_one_row_each(shape):
    logits = np.zeros(shape, np.float32)
    with pytest.raises(llmcomp.Error, match=r"expected \[2, vocab_size\]"):
        llmcomp.Encoder(2).push(logits, np.zeros(shape[:-1], int))
    with pytest.raises(llmcomp.Error, match=r"expected \[2, vocab_size\]"):
        llmcomp.Decoder([b"", b""]).pull(logits)


@pytest.mark.parametrize("n_streams", [-1, -(2**62), 2**60, 2**62, 2**63, 2**80, 1.5, "2", None])
def test_wrong_n_streams(n_streams):
    with pytest.raises((llmcomp.Error, TypeError, OverflowError, MemoryError)):
        llmcomp.Encoder(n_streams)


# Memory layouts.


def test_empty_arrays():
    for shape in [(0, 4), (2, 0, 4), (0, 0, 1)]:
        start, freq, total = llmcomp.intervals(np.zeros(shape, np.float32), np.zeros(shape[:-1], int))
        assert start.shape == freq.shape == total.shape == shape[:-1]
    assert llmcomp.Decoder([]).pull(np.zeros((0, 4), np.float32)).shape == (0,)


def test_strides_of_zero_and_below():
    row = np.float32([9.0, -1.0, 0.5])
    expected = oracle.interval(row, 1)
    assert set(as_triples(llmcomp.intervals(np.broadcast_to(row, (100, 50, 3)), np.full((100, 50), 1)))) == {expected}
    column = np.broadcast_to(np.float32([[1.0], [2.0]]), (2, 70))
    assert as_triples(llmcomp.intervals(column, [3, 3])) == [
        oracle.interval(np.zeros(70, np.float32) + i, 3) for i in (1, 2)
    ]
    cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for view in (cube[::-1], cube[:, ::-1], cube[..., ::-1], cube[::-1, ::-1, ::-1], cube.transpose(2, 0, 1), cube.T):
        tokens = np.ones(view.shape[:-1], int)
        rows = view.reshape(-1, view.shape[-1])
        assert as_triples(llmcomp.intervals(view, tokens)) == [oracle.interval(row, 1) for row in rows]


def test_one_row_at_the_very_end_of_a_mapping(tmp_path):
    """A kernel that reads past a row would fault: the row ends where its pages do."""
    path = tmp_path / "page"
    page = os.sysconf("SC_PAGE_SIZE")
    path.write_bytes(bytes(page))
    for dtype, vocab_size in [(np.float32, 1), (np.float32, 67), (np.float16, 1), (np.float16, 131)]:
        mapped = np.memmap(path, np.uint8, "r")
        row = mapped[page - vocab_size * np.dtype(dtype).itemsize :].view(dtype)
        for backend in llmcomp.backends():
            with llmcomp.use_backend(backend):
                assert as_triples(llmcomp.intervals(row, 0)) == [oracle.interval(np.zeros(vocab_size, np.float32), 0)]


class Disguised(np.ndarray):
    """A subclass that lies about its shape where Python asks."""

    @property
    def shape(self):
        return (1000, 1000)

    def __len__(self):
        return 10**6


def test_subclasses_are_read_as_arrays():
    disguised = LOGITS.copy().view(Disguised)
    assert as_triples(llmcomp.intervals(disguised, TOKENS)) == TRIPLES
    assert as_triples(llmcomp.intervals(np.ma.masked_array(LOGITS, LOGITS > 1), TOKENS)) == TRIPLES


class LongerThanItSays(list):
    def __len__(self):
        return 1_000_000


def test_sequences_that_lie_about_their_length():
    start, freq, total = (list(column) for column in zip(*TRIPLES, strict=True))
    with pytest.raises((llmcomp.Error, ValueError)):
        llmcomp.encode_intervals(LongerThanItSays(start), freq, total)
    with pytest.raises((llmcomp.Error, ValueError)):
        llmcomp.encode_intervals(start, freq[:1], total)
    with pytest.raises(llmcomp.Error, match="start have shape"):
        llmcomp.encode_intervals([start], [freq], [total])


# DLPack.


class Exporter:
    """An object with DLPack's two methods and nothing else."""

    def __init__(self, capsule, device=(1, 0)):
        self.capsule, self.device = capsule, device

    def __dlpack__(self, **_):
        return self.capsule() if callable(self.capsule) else self.capsule

    def __dlpack_device__(self):
        return self.device


def test_dlpack_on_the_cpu():
    logits = LOGITS.copy()
    for device in [(1, 0), (3, 0)]:
        assert as_triples(llmcomp.intervals(Exporter(logits.__dlpack__, device), TOKENS)) == TRIPLES


@pytest.mark.parametrize("device", [(4, 0), (7, 1), (8, 3), (-5, 0)])
def test_dlpack_on_another_device_names_it(device):
    exporter = Exporter(lambda: pytest.fail("the device is asked first"), device)
    with pytest.raises(llmcomp.Error, match=f"DLPack type {device[0]}, id {device[1]}; expected the CPU"):
        llmcomp.intervals(exporter, TOKENS)


@pytest.mark.parametrize("device", [None, 1, (1,), (1, 0, 0), ("cpu", 0), (2**40, 0)])
def test_dlpack_devices_that_are_none(device):
    with pytest.raises((TypeError, ValueError, OverflowError, SystemError)):
        llmcomp.intervals(Exporter(LOGITS.copy().__dlpack__, device), TOKENS)


def test_dlpack_capsules_that_are_none():
    used = LOGITS.copy().__dlpack__()
    assert as_triples(llmcomp.intervals(Exporter(used), TOKENS)) == TRIPLES

    def broken():
        raise RuntimeError("no capsule today")

    for capsule in (None, 5, used, sys, b"dltensor"):
        with pytest.raises((TypeError, ValueError)):
            llmcomp.intervals(Exporter(capsule), TOKENS)
    with pytest.raises(RuntimeError, match="no capsule today"):
        llmcomp.intervals(Exporter(broken), TOKENS)
    for wrong in (np.zeros((2, 4)), np.zeros((2, 4), np.int32), np.zeros((), np.float32), np.zeros((2, 0), np.float32)):
        with pytest.raises(llmcomp.Error, match=r"logits|length"):
            llmcomp.intervals(Exporter(wrong.__dlpack__), TOKENS)


def test_dlpack_gives_the_tensor_back():
    logits = LOGITS.copy()
    before = sys.getrefcount(logits)
    for _ in range(50):
        llmcomp.intervals(Exporter(logits.__dlpack__), TOKENS)
        with pytest.raises(llmcomp.Error):
            llmcomp.intervals(Exporter(logits.__dlpack__), [0, 99])
        with pytest.raises(llmcomp.Error):
            llmcomp.encode(Exporter(logits[0].__dlpack__), 0)
    gc.collect()
    assert sys.getrefcount(logits) == before


def test_torch_tensors_that_cannot_be_read():
    torch = pytest.importorskip("torch")
    with pytest.raises((llmcomp.Error, ValueError, BufferError, RuntimeError, NotImplementedError)):
        llmcomp.intervals(torch.zeros(2, 4, device="meta"), TOKENS)
    for dtype in (torch.float64, torch.int64, torch.complex64, torch.bool):
        with pytest.raises(llmcomp.Error, match="expected float32, float16 or bfloat16"):
            llmcomp.intervals(torch.zeros(2, 4, dtype=dtype), TOKENS)


# Objects misused.


def test_encoder_finished_twice():
    encoder = llmcomp.Encoder(2)
    encoder.push(LOGITS, TOKENS)
    encoder.finish()
    for call in (
        encoder.finish,
        lambda: encoder.push(LOGITS, TOKENS),
        lambda: encoder.push_intervals([0] * 2, [1] * 2, [2] * 2),
    ):
        with pytest.raises(llmcomp.Error, match="finished"):
            call()


def test_objects_cannot_be_copied_changed_or_derived_from():
    for thing in (_core.Encoder(1), _core.Decoder([b""])):
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                call(thing)
        with pytest.raises(AttributeError):
            thing.n_streams = 5
        with pytest.raises(TypeError):
            type("Derived", (type(thing),), {})
        with pytest.raises(TypeError):
            type(thing).__new__(type(thing))


def test_methods_of_another_type_refuse():
    with pytest.raises(TypeError):
        _core.Encoder.push(_core.Decoder([b""]), LOGITS, TOKENS)
    with pytest.raises(TypeError):
        _core.Decoder.pull(object(), LOGITS)


def test_decoding_far_past_the_end():
    streams = llmcomp.Decoder([b"", b"\xff" * 3])
    tokens = np.array([streams.pull(LOGITS) for _ in range(2_000)])
    assert tokens.shape == (2_000, 2) and ((tokens >= 0) & (tokens < 4)).all()


# Leaks.


# Long: a line a call.
def leaking_calls():
    """Every function and every kind of error, on fresh objects."""
    bad = LOGITS.copy()
    bad[1, 1] = np.nan

    def expect_error(call):
        try:
            call()
        except (llmcomp.Error, TypeError, ValueError, BufferError):
            return
        raise AssertionError("no error")

    def streams():
        encoder = llmcomp.Encoder(2)
        encoder.push(LOGITS, TOKENS, np.array([True, False]))
        encoder.push_intervals(*llmcomp.intervals(LOGITS, TOKENS))
        decoder = llmcomp.Decoder(encoder.finish())
        decoder.pull(LOGITS)
        expect_error(encoder.finish)
        expect_error(lambda: decoder.pull(bad))

    columns = list(zip(*TRIPLES, strict=True))
    return {
        "intervals": lambda: llmcomp.intervals(LOGITS, TOKENS),
        "code_length": lambda: llmcomp.code_length(LOGITS, TOKENS),
        "log2_softmax": lambda: coding.log2_softmax(LOGITS, TOKENS),
        "coding": lambda: llmcomp.decode(llmcomp.encode(LOGITS, TOKENS), LOGITS),
        "copies": lambda: llmcomp.encode(LOGITS[:, ::-1], TOKENS),
        "byte-swapped": lambda: llmcomp.encode(LOGITS.astype(">f4"), TOKENS),
        "encode_intervals": lambda: llmcomp.encode_intervals(*columns),
        "streams": streams,
        "dlpack": lambda: llmcomp.intervals(Exporter(LOGITS.copy().__dlpack__), TOKENS),
        "dlpack error": lambda: expect_error(lambda: llmcomp.intervals(Exporter(LOGITS.copy().__dlpack__), [9, 9])),
        "dlpack dtype": lambda: expect_error(lambda: llmcomp.intervals(Exporter(np.zeros((2, 4)).__dlpack__), TOKENS)),
        "dlpack device": lambda: expect_error(lambda: llmcomp.intervals(Exporter(None, (2, 0)), TOKENS)),
        "dlpack capsule": lambda: expect_error(lambda: llmcomp.intervals(Exporter(None), TOKENS)),
        "NaN": lambda: expect_error(lambda: llmcomp.encode(bad, TOKENS)),
        "NaN of a softmax": lambda: expect_error(lambda: coding.log2_softmax(bad, TOKENS)),
        "dtype": lambda: expect_error(lambda: llmcomp.encode(LOGITS.astype(float), TOKENS)),
        "shape": lambda: expect_error(lambda: llmcomp.encode(LOGITS, [1, 2, 3])),
        "mask": lambda: expect_error(lambda: llmcomp.Encoder(2).push(LOGITS, TOKENS, [1])),
        "rows": lambda: expect_error(lambda: llmcomp.Encoder(3).push(LOGITS, TOKENS)),
        "interval": lambda: expect_error(lambda: llmcomp.encode_intervals([0], [0], [1])),
        "interval dtype": lambda: expect_error(lambda: llmcomp.encode_intervals([0], [0.5], [1])),
        "payload": lambda: expect_error(lambda: llmcomp.decode(None, LOGITS)),
        "payload rows": lambda: expect_error(lambda: llmcomp.decode(PAYLOAD, LOGITS[0])),
        "payloads": lambda: expect_error(lambda: llmcomp.Decoder([b"", 5])),
        "vocab_size": lambda: expect_error(lambda: llmcomp.Decoder([b""], vocab_size=0)),
        "backend": lambda: expect_error(lambda: llmcomp.use_backend("abacus").__enter__()),
    }  # fmt: skip


def test_no_call_leaks():
    """Traced memory, which has the extension's own, stays where it was over 200 calls of each kind.

    Caches may still fill in one round; a leak shows in each.
    """
    gc.collect()
    gc.freeze()  # what stood before is not looked through again after every round
    tracemalloc.start()
    try:
        for name, call in leaking_calls().items():
            growths = []
            while len(growths) < 5 and not (growths and growths[-1] < 1_600):  # 8 bytes a call
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(200):
                    call()
                gc.collect()
                growths.append(tracemalloc.get_traced_memory()[0] - before)
            assert growths[-1] < 1_600, (name, growths)
    finally:
        tracemalloc.stop()
        gc.unfreeze()


STATM = Path("/proc/self/statm")


def resident_bytes():
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="no /proc")
def test_no_call_leaks_over_100_000_calls():
    """Resident memory, which has what tracemalloc does not see: 16 bytes a call would be 1.6 MB.

    The heap may still take an arena in one round; a leak shows in each.
    """
    for name, call in leaking_calls().items():
        for _ in range(2_000):
            call()
        growths = []
        while len(growths) < 3 and not (growths and growths[-1] < 1_500_000):
            gc.collect()
            before = resident_bytes()
            for _ in range(100_000):
                call()
            gc.collect()
            growths.append(resident_bytes() - before)
        assert growths[-1] < 1_500_000, (name, growths)


# Anything at all.

anything = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=9), st.booleans(),
    st.lists(st.integers(-3, 9), max_size=5), st.lists(st.floats(width=32), max_size=5),
    st.sampled_from([LOGITS, LOGITS[0], LOGITS.T, TOKENS, [PAYLOAD] * 2, PAYLOAD, np.float16(LOGITS)[None], object()]),
)  # fmt: skip


@hypothesis.settings(max_examples=300, deadline=None, database=None)
@hypothesis.given(arguments=st.lists(anything, max_size=4), data=st.data())
def test_any_arguments_are_answered(arguments, data):
    functions = [
        llmcomp.intervals, llmcomp.code_length, llmcomp.encode, llmcomp.decode, llmcomp.encode_intervals,
        llmcomp.Decoder, llmcomp.Decoder([PAYLOAD] * 2).pull, llmcomp.Encoder(2).push,
        llmcomp.Encoder(2).push_intervals, llmcomp.Encoder(0).finish,
    ]  # fmt: skip
    function = data.draw(st.sampled_from(functions))
    with contextlib.suppress(TypeError, ValueError, OverflowError, BufferError):  # llmcomp.Error is a ValueError
        function(*arguments)
    check_still_right()
