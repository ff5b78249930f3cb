"""The CUDA path of llmcomp.coding without a device: llmcomp/coding/cuda.py over a stand-in for llmcomp._cuda.

The stand-in keeps "device" memory in the CPU's, reads arguments exactly as the C module documents them, and computes
with the C core. So everything in Python is checked here: array protocols, strides, masks, errors, growing buffers. The
kernels are checked by test_cuda_build.py (their arithmetic, on the host) and test_cuda.py (on a device).
"""

# ruff: noqa: PLR0917  (the functions of the C module take their arguments by position)

import ctypes
import itertools
import sys
import types
from typing import Any

import numpy as np
import pytest

import llmcomp
from llmcomp import _core, coding
from llmcomp.coding import cuda

NO_ERROR = 2**64 - 1


class Buffer:
    def __init__(self, n_bytes: int, device: int) -> None:
        self.n_bytes, self.device = n_bytes, device
        self._memory = ctypes.create_string_buffer(b"\xa5" * (n_bytes + 1), n_bytes + 1)
        self.pointer = ctypes.addressof(self._memory)


def read(pointer: int, n: int, dtype: Any) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(pointer, n * np.dtype(dtype).itemsize), dtype=dtype).copy()


def write(pointer: int, array: np.ndarray) -> None:
    data = np.ascontiguousarray(array).tobytes()
    ctypes.memmove(pointer, data, len(data))


def row_of(rows: tuple, i: int) -> np.ndarray:
    pointer, outer, inner, _, n_inner, vocab_size, dtype = rows
    at = pointer + i // n_inner * outer + i % n_inner * inner
    return read(at, vocab_size, [np.float32, np.float16][dtype])


class StandIn(types.ModuleType):
    """The functions of csrc/python/cuda_module.c that llmcomp/coding/cuda.py calls."""

    Buffer = Buffer
    TOOLKIT_VERSION, TARGETS = 13000, "sm_80 sm_90 compute_90"
    ENCODER_BYTES, ENCODER_LENGTH_OFFSET, DECODER_BYTES, STEP_BYTES_MAX = 40, 24, 40, 8
    VOCAB_SIZE_MAX = _core.VOCAB_SIZE_MAX

    def __init__(self) -> None:
        super().__init__("llmcomp._cuda")
        self.coders: dict[int, list] = {}
        self.places: dict[int, tuple[int, int]] = {}
        self.capturing = False
        self.calls: list[str] = []
        self.devices: dict[int, int] = {}  # of addresses that are not on device 0

    def machine(self) -> tuple:
        return 13000, [{"name": "stand-in"}], None

    def upload(self, device: int, stream: int, pointer: int, data: Any) -> None:
        ctypes.memmove(pointer, bytes(data), len(bytes(data)))

    def download_rows(self, device: int, stream: int, pointer: int, pitch: int, n_bytes: int, n_rows: int) -> bytes:
        self.calls.append(f"wait {stream}" if stream else "wait")
        return b"".join(ctypes.string_at(pointer + i * pitch, n_bytes) for i in range(n_rows))

    def copy_rows_on_device(
        self, device: int, stream: int, target: int, t_pitch: int, source: int, s_pitch: int, n_bytes: int, n_rows: int
    ) -> None:
        for i in range(n_rows):
            ctypes.memmove(target + i * t_pitch, source + i * s_pitch, n_bytes)

    def error_clear(self, device: int, stream: int, error: int) -> None:
        write(error, np.array([NO_ERROR], np.uint64))

    def error_read(self, device: int, stream: int, error: int) -> tuple | None:
        found = int(read(error, 1, np.uint64)[0])
        return None if found == NO_ERROR else (found >> 8, found & 0xFF == 4, "a fault of the row")

    def is_capturing(self, device: int, stream: int) -> bool:
        return self.capturing

    def device_of(self, pointer: int) -> int:
        return self.devices.get(pointer, 0)

    def _report(self, error: int, row: int, status: int) -> None:
        found = int(read(error, 1, np.uint64)[0])
        write(error, np.array([min(found, row << 8 | status)], np.uint64))

    def intervals(self, device: int, stream: int, rows: tuple, tokens: tuple, active: int, *out: int) -> None:
        pointer, outer, inner, item = tokens
        for i in range(rows[3]):
            at = pointer + i // rows[4] * outer + i % rows[4] * inner
            token = int(read(at, 1, np.int64 if item == 8 else np.int32)[0])
            triple = [np.zeros(1, np.uint64)] * 3
            if not active or read(active + i, 1, np.uint8)[0]:
                try:
                    triple = list(_core.intervals(row_of(rows, i)[None], [token], None))
                except llmcomp.Error as error:
                    self._report(out[3], i, 4 if "token" in str(error) else 1)
            for place, value in zip(out, triple, strict=False):
                write(place + 8 * i, value)

    def log2_softmax(self, device: int, stream: int, rows: tuple, tokens: tuple, found: int, error: int) -> None:
        pointer, outer, inner, item = tokens
        for i in range(rows[3]):
            at = pointer + i // rows[4] * outer + i % rows[4] * inner
            token = int(read(at, 1, np.int64 if item == 8 else np.int32)[0])
            value = np.full(1, np.nan)
            try:
                value = _core.log2_softmax(row_of(rows, i)[None], [token], None)
            except llmcomp.Error as fault:
                self._report(error, i, 4 if "token" in str(fault) else 1)
            write(found + 8 * i, value)

    def code_length(self, device: int, stream: int, n: int, freq: int, total: int, bits: int) -> None:
        write(bits, -np.log2(read(freq, n, np.uint64) / read(total, n, np.uint64)))

    def encoders_begin(self, device: int, stream: int, encoders: int, n: int, data: int, capacity: int) -> None:
        self.coders[encoders] = [_core.Encoder(1) for _ in range(n)]
        self.places[encoders] = (data, capacity)

    def encoders_place(self, device: int, stream: int, encoders: int, n: int, data: int, capacity: int) -> None:
        self.places[encoders] = (data, capacity)

    def encoders_put(
        self,
        device: int,
        stream: int,
        encoders: int,
        n: int,
        start: int,
        freq: int,
        total: int,
        active: int,
        error: int,
    ) -> None:
        self.calls.append("encoders_put")
        if int(read(error, 1, np.uint64)[0]) != NO_ERROR:
            return
        for i in range(n):
            if not active or read(active + i, 1, np.uint8)[0]:
                triple = [read(pointer + 8 * i, 1, np.uint64) for pointer in (start, freq, total)]
                self.coders[encoders][i].push_intervals(*triple)

    def encoders_end(self, device: int, stream: int, encoders: int, n: int) -> None:
        data, capacity = self.places[encoders]
        for i, coder in enumerate(self.coders[encoders]):
            (payload,) = coder.finish()
            assert len(payload) <= capacity
            ctypes.memmove(data + i * capacity, payload, len(payload))
            write(encoders + 40 * i + 24, np.array([len(payload)], np.uint64))

    def decoders_begin(self, device: int, stream: int, decoders: int, n: int, payloads: int, offsets: int) -> None:
        at = [int(offset) for offset in read(offsets, n + 1, np.uint64)]
        spans = [ctypes.string_at(payloads + a, b - a) for a, b in itertools.pairwise(at)]
        self.coders[decoders] = [_core.Decoder([span]) for span in spans]

    def _pull(self, rows: tuple, i: int, coder: Any, tokens: int, error: int) -> None:
        try:
            token = coder.pull(row_of(rows, i)[None])
        except llmcomp.Error:
            self._report(error, i, 1)
            token = np.array([-2])
        write(tokens + 4 * i, token.astype(np.int32))

    def decode_step(self, device: int, stream: int, rows: tuple, active: int, decoders: int, *out: int) -> None:
        self.calls.append("decode_step")
        for i in range(rows[3]):
            if active and not read(active + i, 1, np.uint8)[0]:
                write(out[0] + 4 * i, np.array([-1], np.int32))
            else:
                self._pull(rows, i, self.coders[decoders][i], *out)

    def decode_stream(self, device: int, stream: int, rows: tuple, decoder: int, *out: int) -> None:
        for i in range(rows[3]):
            self._pull(rows, i, self.coders[decoder][0], *out)


class OnDevice:
    """A NumPy array that only shows itself over __cuda_array_interface__, as Numba's device arrays do."""

    def __init__(self, array: np.ndarray, stream: int | None = None) -> None:
        self._array, self._stream = array, stream

    @property
    def pointer(self) -> int:
        return int(self._array.ctypes.data)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = dict(self._array.__array_interface__, version=3, stream=self._stream)
        return {**interface, "strides": None if self._array.flags.c_contiguous else self._array.strides}

    def reshape(self, *shape: int) -> np.ndarray:
        return self._array.reshape(*shape)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "llmcomp._cuda", module)
    monkeypatch.setattr(llmcomp, "_cuda", module, raising=False)
    return module


def sample(*shape: int, dtype: Any = np.float32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, shape).astype(dtype)
    return logits, random.integers(0, shape[-1], shape[:-1])


def assert_same(found: tuple, expected: tuple) -> None:
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, cuda.DeviceArray)
        np.testing.assert_array_equal(one.numpy(), other)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(50,), (7, 33), (2, 5, 40), (2, 3, 4, 9)])
def test_intervals_and_code_length_equal_the_cpu(stand_in: StandIn, shape: tuple[int, ...], dtype: Any) -> None:
    logits, tokens = sample(*shape, dtype=dtype)
    assert_same(llmcomp.intervals(OnDevice(logits), tokens), llmcomp.intervals(logits, tokens))
    bits = llmcomp.code_length(OnDevice(logits), OnDevice(tokens))
    np.testing.assert_array_equal(bits.numpy(), llmcomp.code_length(logits, tokens))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_softmax_of_scores_equals_the_cpu(stand_in: StandIn, dtype: Any) -> None:
    logits, tokens = sample(2, 5, 40, dtype=dtype)
    tokens %= 39
    for part in (np.s_[:], np.s_[:, ::2]):
        found = coding.log2_softmax(OnDevice(logits[part]), OnDevice(tokens[part]), 39)
        np.testing.assert_array_equal(found.numpy(), coding.log2_softmax(logits[part], tokens[part], 39))
    logits[1, 2, 3] = np.inf
    with pytest.raises(llmcomp.Error, match="row 7: a fault"):
        coding.log2_softmax(OnDevice(logits), tokens)
    found = cuda.log2_softmax(OnDevice(logits), OnDevice(tokens), wait=False).numpy()
    assert np.isnan(found[1, 2]) and np.isfinite(np.delete(found.reshape(-1), 7)).all()
    with pytest.raises(llmcomp.Error, match="row 0: token 40 is outside the vocabulary; expected 0 to 39"):
        coding.log2_softmax(OnDevice(logits[0]), [40, 0, 0, 0, 0])


@pytest.mark.parametrize("token_dtype", [np.int64, np.int32])
def test_views_are_read_in_place(stand_in: StandIn, token_dtype: Any) -> None:
    logits, tokens = sample(4, 12, 30)
    tokens = tokens.astype(token_dtype)
    for part in (np.s_[:, :-1], np.s_[::2, 1::3], np.s_[:, ::-1], np.s_[1:2], np.s_[:, 3:3]):
        found = llmcomp.intervals(OnDevice(logits[part]), OnDevice(tokens[part]), vocab_size=30)
        assert_same(found, llmcomp.intervals(logits[part], tokens[part]))
    shared = np.broadcast_to(logits[:1, :1], logits.shape)
    assert_same(llmcomp.intervals(OnDevice(shared), OnDevice(tokens)), llmcomp.intervals(shared, tokens))


def test_what_cannot_be_read_in_place_is_refused(stand_in: StandIn) -> None:
    logits, tokens = sample(3, 4, 5, 6)
    with pytest.raises(llmcomp.Error, match="not evenly spaced"):
        llmcomp.intervals(OnDevice(logits[:, :3, ::2]), tokens[:, :3, ::2])
    with pytest.raises(llmcomp.Error, match="contiguous"):
        llmcomp.intervals(OnDevice(logits[..., ::2]), tokens // 2)
    with pytest.raises(llmcomp.Error, match="float64"):
        llmcomp.intervals(OnDevice(logits.astype(np.float64)), tokens)


def test_arguments_are_checked_as_on_the_cpu(stand_in: StandIn) -> None:
    logits, tokens = sample(3, 8)
    for wrong in (tokens[:2], tokens[None], np.zeros((3, 1), int)):
        with pytest.raises(llmcomp.Error, match="shape"):
            llmcomp.intervals(OnDevice(logits), wrong)
    with pytest.raises(llmcomp.Error, match="expected integers"):
        llmcomp.intervals(OnDevice(logits), tokens.astype(float))
    for vocab_size in (0, 9, 2**22):
        with pytest.raises(llmcomp.Error, match="expected"):
            llmcomp.intervals(OnDevice(logits), tokens, vocab_size)
    with pytest.raises(llmcomp.Error, match=r"row 1: token 99 is outside the vocabulary; expected 0 to 7"):
        llmcomp.intervals(OnDevice(logits), [0, 99, 0])
    with pytest.raises(llmcomp.Error, match=r"row 2: token -1"):
        llmcomp.intervals(OnDevice(logits), OnDevice(np.array([0, 0, -1])))
    logits[1, 3] = np.nan
    with pytest.raises(llmcomp.Error, match="row 1: a fault"):
        llmcomp.intervals(OnDevice(logits), tokens)


def test_a_captured_call_leaves_errors_on_the_device(stand_in: StandIn) -> None:
    logits, tokens = sample(3, 8)
    logits[1] = np.nan
    stand_in.capturing = True
    _, _, total = llmcomp.intervals(OnDevice(logits), OnDevice(tokens))
    assert total.numpy()[1] == 0 and total.numpy()[0] > 0


def test_a_captured_call_takes_nothing_from_the_cpu(stand_in: StandIn) -> None:
    """A graph would hold the address, and read there at every launch."""
    logits, tokens = sample(3, 8)
    encoder = llmcomp.Encoder(3)
    encoder.push(OnDevice(logits), tokens)
    stand_in.capturing = True
    with pytest.raises(llmcomp.Error, match="expected them on the device"):
        llmcomp.intervals(OnDevice(logits), tokens)
    with pytest.raises(llmcomp.Error, match="expected them on the device"):
        encoder.push(OnDevice(logits), OnDevice(tokens), np.ones(3, np.bool_))
    encoder.push(OnDevice(logits), OnDevice(tokens), OnDevice(np.ones(3, np.bool_)))
    assert stand_in.calls[-1] == "encoders_put"  # to wait would break the capture


def test_arrays_of_unknown_frameworks_may_be_freed_after_a_step(stand_in: StandIn) -> None:
    logits, tokens = sample(3, 8)
    encoder = llmcomp.Encoder(3)
    encoder.push(OnDevice(logits), tokens)
    assert stand_in.calls[-2:] == ["encoders_put", "wait"]
    encoder.push_intervals(*map(OnDevice, llmcomp.intervals(logits, tokens)))
    assert stand_in.calls[-2:] == ["encoders_put", "wait"]
    decoder = llmcomp.Decoder(encoder.finish())
    decoder.pull(OnDevice(logits))
    assert stand_in.calls[-2:] == ["decode_step", "wait"]


def test_the_work_that_makes_an_array_on_another_stream_is_waited_for(stand_in: StandIn) -> None:
    logits, tokens = sample(3, 8)
    encoder = llmcomp.Encoder(3)
    encoder.push(OnDevice(logits, stream=7), OnDevice(tokens, stream=7), OnDevice(np.ones(3, np.bool_)))
    assert stand_in.calls == ["encoders_put", "wait 7"]
    encoder.push(OnDevice(logits, stream=7), OnDevice(tokens, stream=8), OnDevice(np.ones(3, np.bool_), stream=1))
    assert stand_in.calls[2:] == ["wait 8", "wait 1", "encoders_put", "wait 7"]


def test_arrays_are_used_on_the_device_that_has_their_memory(stand_in: StandIn) -> None:
    logits, tokens = (OnDevice(array) for array in sample(3, 8))
    stand_in.devices = {logits.pointer: 1, tokens.pointer: 1}
    found = llmcomp.intervals(logits, tokens)
    assert [part.device for part in found] == [1, 1, 1]
    stand_in.devices[tokens.pointer] = 0
    with pytest.raises(llmcomp.Error, match="tokens are on CUDA device 0; expected device 1"):
        llmcomp.intervals(logits, tokens)
    stand_in.devices[logits.pointer] = -1
    with pytest.raises(llmcomp.Error, match="logits have __cuda_array_interface__, but their memory is not that"):
        llmcomp.intervals(logits, tokens)


class CupyDevice:
    current = 0

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> None:
        self.before, CupyDevice.current = CupyDevice.current, self.id

    def __exit__(self, *_: object) -> None:
        CupyDevice.current = self.before


class CupyArray(OnDevice):
    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array, stream=70)
        self.device, self.data = CupyDevice(CupyDevice.current), types.SimpleNamespace(ptr=self.pointer)


def test_results_for_cupy_are_on_the_device_of_the_logits(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """New arrays and the current stream are of the device that is current in CuPy, which may be another one."""
    streams = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=70 + CupyDevice.current))
    cupy = types.SimpleNamespace(
        ndarray=CupyArray, cuda=streams, empty=lambda shape, dtype: CupyArray(np.empty(shape, dtype))
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    logits, tokens = sample(3, 8)
    with CupyDevice(1):
        there = CupyArray(logits), CupyArray(tokens)
    stand_in.device_of = lambda pointer: 1  # type: ignore[method-assign]
    found = llmcomp.intervals(*there)
    assert [part.device.id for part in found] == [1, 1, 1]
    for part, expected in zip(found, llmcomp.intervals(logits, tokens), strict=True):
        np.testing.assert_array_equal(part._array, expected)
    encoder = llmcomp.Encoder(3)
    encoder.push(*there)
    assert encoder._on_device._stream == 71
    assert "wait" not in " ".join(stand_in.calls)


def test_a_call_that_does_not_wait_leaves_errors_on_the_device(stand_in: StandIn) -> None:
    logits, tokens = sample(3, 8)
    logits[1] = np.nan
    found = cuda.intervals(OnDevice(logits), tokens, wait=False)
    assert found[2].numpy()[1] == 0
    expected = llmcomp.intervals(logits[[0, 2]], np.asarray(tokens)[[0, 2]])
    np.testing.assert_array_equal([part.numpy()[[0, 2]] for part in found], expected)


def test_one_stream(stand_in: StandIn) -> None:
    logits, tokens = sample(200, 40)
    payload = llmcomp.encode(OnDevice(logits), tokens)
    assert payload == llmcomp.encode(logits, tokens)
    np.testing.assert_array_equal(llmcomp.decode(payload, OnDevice(logits)).numpy(), tokens)
    assert llmcomp.encode(OnDevice(logits[:0]), tokens[:0]) == b""
    with pytest.raises(llmcomp.Error, match="expected"):
        llmcomp.encode(OnDevice(logits[None]), tokens[None])


@pytest.mark.parametrize("mask_on_device", [False, True])
def test_streams_equal_those_of_the_cpu(stand_in: StandIn, mask_on_device: bool) -> None:
    n_steps, n_streams = 300, 5  # more steps than the buffers hold at first
    logits, tokens = sample(n_steps, n_streams, 20)
    active = np.random.default_rng(1).random((n_steps, n_streams)) < 0.8
    encoder, expected = llmcomp.Encoder(n_streams), llmcomp.Encoder(n_streams)
    for step in range(n_steps):
        mask = OnDevice(active[step]) if mask_on_device else active[step]
        if step % 3 == 2:
            triple = llmcomp.intervals(logits[step], tokens[step])
            encoder.push_intervals(*map(OnDevice, triple), mask)
        else:
            encoder.push(OnDevice(logits[step]), tokens[step], mask)
        expected.push(logits[step], tokens[step], active[step])
    payloads = encoder.finish()
    assert payloads == expected.finish()
    decoder = llmcomp.Decoder(payloads)
    for step in range(n_steps):
        found = decoder.pull(OnDevice(logits[step]), active[step]).numpy()
        np.testing.assert_array_equal(found, np.where(active[step], tokens[step], -1))
    decoder.check()


def test_streams_stay_where_they_are_and_report_late(stand_in: StandIn) -> None:
    logits, tokens = sample(2, 8)
    encoder = llmcomp.Encoder(2)
    encoder.push(OnDevice(logits), tokens)
    with pytest.raises(llmcomp.Error, match="another device"):
        encoder.push(logits, tokens)
    with pytest.raises(llmcomp.Error, match=r"expected \[2, vocab_size\]"):
        encoder.push(OnDevice(logits[:1]), tokens[:1])
    encoder.push(OnDevice(np.full_like(logits, np.nan)), tokens)
    with pytest.raises(llmcomp.Error, match="row 0"):
        encoder.check()
    with pytest.raises(llmcomp.Error, match="row 0"):
        encoder.finish()
    with pytest.raises(llmcomp.Error, match="finished"):
        encoder.push(OnDevice(logits), tokens)
    decoder = llmcomp.Decoder([b"abc", b""])
    logits[1] = -np.inf
    assert decoder.pull(OnDevice(logits)).numpy()[1] == -2
    with pytest.raises(llmcomp.Error, match="row 1"):
        decoder.check()


def test_info(stand_in: StandIn) -> None:
    info = cuda.cuda_info()
    assert info["built"] and info["toolkit"] == "13.0" and info["driver"] == "13.0" and info["problem"] is None


def test_without_the_cuda_part_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcomp._cuda", None)
    monkeypatch.delattr(llmcomp, "_cuda", raising=False)
    logits, tokens = sample(2, 8)
    with pytest.raises(llmcomp.Error, match="built without its CUDA part"):
        llmcomp.intervals(OnDevice(logits), tokens)
    assert cuda.cuda_info() == {
        "built": False,
        "toolkit": None,
        "targets": [],
        "driver": None,
        "devices": [],
        "problem": "llmcomp was built without CUDA",
    }
