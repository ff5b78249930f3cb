"""The CUDA kernels on a device against the C core on the CPU, which test_intervals.py and test_coding.py hold against
the oracle: every dtype, alignment and adversarial row, streams, views, graphs and errors. Skipped, with the reason,
where there is no device."""

import importlib
import importlib.util
import itertools

import numpy as np
import pytest
from logit_rows import DISTRIBUTIONS, VOCAB_SIZES, some_tokens

import llmcomp
from llmcomp.coding import cuda


def what_is_missing() -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if not cuda.is_built():
        return "llmcomp was built without CUDA"
    info = cuda.cuda_info()
    if not info["devices"]:
        return f"there is no CUDA device: {info['problem']}"
    return "" if importlib.import_module("torch").cuda.is_available() else "this torch has no CUDA"


MISSING = what_is_missing()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
if importlib.util.find_spec("torch") is not None:
    import torch

    DTYPES = [torch.float32, torch.float16, torch.bfloat16]
else:
    DTYPES = []
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def logits_of(distribution, shape, dtype, seed=0):
    rng = np.random.default_rng([DISTRIBUTIONS.index(distribution), shape[-1], seed])
    with np.errstate(over="ignore"):
        rows = np.asarray(distribution(rng, shape), np.float32)
    if dtype == torch.float16:
        rows = np.where(np.isfinite(rows), np.clip(rows, -65504, 65504), rows)
    tensor = torch.from_numpy(rows).to(dtype)
    # Rounding to a short format may have made an infinity of the largest numbers.
    return torch.where(tensor == torch.inf, torch.finfo(dtype).max, tensor)


def on_cpu(arrays):
    return [np.asarray(array.cpu().numpy(), np.uint64) for array in arrays]


def assert_intervals_equal(on_device, tokens, vocab_size=None):
    expected = llmcomp.intervals(on_device.cpu(), np.asarray(tokens), vocab_size)
    found = llmcomp.intervals(on_device, tokens, vocab_size)
    assert all(array.device == on_device.device for array in found)
    for one, other in zip(on_cpu(found), expected, strict=True):
        np.testing.assert_array_equal(one, other)


# Intervals.


@EVERY_DTYPE
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_intervals_equal_the_cpu(distribution, dtype):
    for vocab_size in [*VOCAB_SIZES, 6143, 8192, 8193, 50_257, 50_304]:
        logits = logits_of(distribution, (7, vocab_size), dtype)
        tokens = some_tokens(np.random.default_rng(vocab_size), 7, vocab_size)
        assert_intervals_equal(logits.cuda(), tokens)


@EVERY_DTYPE
@pytest.mark.parametrize("vocab_size", [65_536, 128_256, 131_073, 262_144, 262_145, 524_289, 2**20, 2**21])
def test_large_vocabularies(vocab_size, dtype):
    """From rows that a block can hold over rows that only a cluster can to rows that are read twice."""
    for distribution in DISTRIBUTIONS[:5]:
        logits = logits_of(distribution, (3, vocab_size), dtype)
        assert_intervals_equal(logits.cuda(), some_tokens(np.random.default_rng(1), 3, vocab_size))


@EVERY_DTYPE
@pytest.mark.parametrize("vocab_size", [1, 5, 40, 1000, 2055, 50_257])
def test_rows_of_every_alignment(vocab_size, dtype):
    logits = logits_of(DISTRIBUTIONS[0], (9, vocab_size + 33), dtype).cuda()
    tokens = some_tokens(np.random.default_rng(2), 9, vocab_size)
    for first in range(17):
        assert_intervals_equal(logits[:, first : first + vocab_size], tokens)


@EVERY_DTYPE
def test_every_token_of_a_row(dtype):
    for vocab_size, first in itertools.product([1, 3, 8, 300, 2061], range(3)):
        row = logits_of(DISTRIBUTIONS[0], (1, vocab_size + first), dtype).cuda()[:, first:]
        assert_intervals_equal(row.expand(vocab_size, vocab_size), np.arange(vocab_size))


@EVERY_DTYPE
@pytest.mark.parametrize(("n_rows", "vocab_size"), [(1, 50_304), (131, 50_304), (70_000, 17), (3000, 1025)])
def test_any_number_of_rows(n_rows, vocab_size, dtype):
    logits = logits_of(DISTRIBUTIONS[0], (n_rows, vocab_size), dtype)
    assert_intervals_equal(logits.cuda(), some_tokens(np.random.default_rng(3), n_rows, vocab_size))


def test_no_rows_at_all():
    for part in llmcomp.intervals(torch.zeros(0, 5, device="cuda"), np.zeros(0, int)):
        assert part.shape == (0,)


def test_views_and_kinds_of_tokens():
    logits = logits_of(DISTRIBUTIONS[0], (4, 12, 300), torch.float32).cuda()
    tokens = torch.randint(0, 290, (4, 12), device="cuda")
    for part in (np.s_[:, :-1], np.s_[::2, 1::3], np.s_[1:2], np.s_[2]):
        for kind in (tokens, tokens.int()):
            assert_intervals_equal(logits[part], kind[part].cpu().numpy(), 290)
            on_device = llmcomp.intervals(logits[part], kind[part], 290)
            expected = llmcomp.intervals(logits[part].cpu(), kind[part].cpu().numpy(), 290)
            np.testing.assert_array_equal(on_cpu(on_device), expected)
    assert_intervals_equal(logits.requires_grad_(), tokens.cpu().numpy())
    with pytest.raises(llmcomp.Error, match="contiguous"):
        llmcomp.intervals(logits.transpose(1, 2), torch.zeros(4, 300, dtype=torch.int64, device="cuda"))


def test_code_length():
    logits = logits_of(DISTRIBUTIONS[0], (50, 1000), torch.bfloat16)
    tokens = some_tokens(np.random.default_rng(4), 50, 1000)
    bits = llmcomp.code_length(logits.cuda(), tokens)
    assert bits.dtype == torch.float64
    np.testing.assert_allclose(bits.cpu().numpy(), llmcomp.code_length(logits, tokens), rtol=1e-14)


@EVERY_DTYPE
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 50_304])
def test_the_softmax_of_scores(vocab_size, dtype):
    for distribution in DISTRIBUTIONS:
        logits = logits_of(distribution, (9, vocab_size), dtype)
        tokens = some_tokens(np.random.default_rng(5), 9, vocab_size)
        found = llmcomp.coding.log2_softmax(logits.cuda(), tokens).cpu().numpy()
        np.testing.assert_array_equal(found, llmcomp.coding.log2_softmax(logits, tokens))


def half_patterns(dtype):
    """Every number of a short format up to 0, beside the maximum 0."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[(values <= 0) & ~values.isnan()]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("maximum", [0.0, 13.5, 40_000.0])
def test_every_half_value(dtype, maximum):
    values = half_patterns(dtype)
    rows = torch.stack([torch.full_like(values, maximum), values], dim=1)
    assert_intervals_equal(rows.cuda(), np.ones(len(rows), int))


@pytest.mark.slow
def test_every_256th_float_is_weighted_as_on_the_cpu():
    for start in range(0, 2**32, 2**30):
        bits = np.arange(start, start + 2**30, 251, dtype=np.uint32)
        values = bits.view(np.float32)
        values = values[values <= 3.0]
        rows = torch.from_numpy(np.stack([np.full_like(values, 3.0), values], axis=1))
        assert_intervals_equal(rows.cuda(), np.ones(len(rows), int))


@pytest.mark.slow
@EVERY_DTYPE
def test_a_thousand_million_logits(dtype):
    """With three dtypes over 10**9: random, trained-like and adversarial rows of the usual vocabularies."""
    n_logits = 0
    for seed in itertools.count():
        distribution = DISTRIBUTIONS[seed % len(DISTRIBUTIONS)]
        vocab_size = (50_304, 50_257, 32_000, 128_256)[seed % 4]
        logits = logits_of(distribution, (320, vocab_size), dtype, seed)
        assert_intervals_equal(logits.cuda(), some_tokens(np.random.default_rng(seed), 320, vocab_size))
        n_logits += logits.numel()
        if n_logits > 340e6:
            break


# Errors.


@EVERY_DTYPE
@pytest.mark.parametrize(("value", "phrase"), [(np.nan, "NaN"), (-np.nan, "NaN"), (np.inf, r"\+inf")])
def test_errors_name_their_row(value, phrase, dtype):
    for vocab_size, first in [(1, 0), (50, 1), (3001, 3), (50_257, 1)]:
        base = logits_of(DISTRIBUTIONS[0], (5, vocab_size + first), dtype).cuda()
        for position in {0, vocab_size // 2, vocab_size - 1}:
            logits = base.clone()[:, first:]
            logits[2, position] = value
            with pytest.raises(llmcomp.Error, match=f"row 2: a logit is {phrase}"):
                llmcomp.intervals(logits, np.zeros(5, int))
            logits[3] = -np.inf
            logits[1] = -np.inf
            with pytest.raises(llmcomp.Error, match="row 1: all logits are -inf"):
                llmcomp.intervals(logits, np.zeros(5, int))


def test_a_bad_token_names_its_row_and_the_call_after_works():
    logits = logits_of(DISTRIBUTIONS[0], (4, 100), torch.float32).cuda()
    for bad in (-1, 100, 2**31, 2**40, -(2**63)):
        tokens = torch.tensor([0, 99, bad, bad], device="cuda")
        with pytest.raises(llmcomp.Error, match=f"row 2: token {bad} is outside the vocabulary; expected 0 to 99"):
            llmcomp.intervals(logits, tokens)
    assert_intervals_equal(logits, np.zeros(4, int))


def test_nan_in_the_padding_has_no_part():
    logits = logits_of(DISTRIBUTIONS[0], (4, 100), torch.float32)
    logits[:, 90:] = torch.nan
    assert_intervals_equal(logits.cuda(), np.full(4, 89), 90)


def test_a_device_that_is_not_there():
    from llmcomp import _cuda

    with pytest.raises(llmcomp.Error, match="CUDA: "):
        _cuda.Buffer(8, len(cuda.cuda_info()["devices"]))
    assert_intervals_equal(torch.zeros(2, 5, device="cuda"), [1, 4])


# Streams of the range coder.


@EVERY_DTYPE
@pytest.mark.parametrize("vocab_size", [2, 257, 50_257])
def test_streams_equal_those_of_the_cpu(vocab_size, dtype):
    n_steps, n_streams = 90, 33
    logits = logits_of(DISTRIBUTIONS[0], (n_steps * n_streams, vocab_size), dtype).view(n_steps, n_streams, vocab_size)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, vocab_size, (n_steps, n_streams))
    active = rng.random((n_steps, n_streams)) < 0.9
    encoder, expected = llmcomp.Encoder(n_streams), llmcomp.Encoder(n_streams)
    on_device = logits.cuda()
    for step in range(n_steps):
        encoder.push(on_device[step], torch.from_numpy(tokens[step]).cuda(), torch.from_numpy(active[step]).cuda())
        expected.push(logits[step], tokens[step], active[step])
    payloads = encoder.finish()
    assert payloads == expected.finish()
    decoder = llmcomp.Decoder(payloads)
    found = [decoder.pull(on_device[step], active[step]) for step in range(n_steps)]
    decoder.check()
    np.testing.assert_array_equal(torch.stack(found).cpu().numpy(), np.where(active, tokens, -1))


def test_any_bytes_decode_as_on_the_cpu():
    rng = np.random.default_rng(6)
    payloads = [rng.bytes(int(n)) for n in rng.integers(0, 40, 200)]
    for distribution, vocab_size in [(DISTRIBUTIONS[0], 50_304), (DISTRIBUTIONS[2], 1000), (DISTRIBUTIONS[9], 17)]:
        decoder, expected = llmcomp.Decoder(payloads), llmcomp.Decoder(payloads)
        for seed in range(30):
            logits = logits_of(distribution, (200, vocab_size), torch.bfloat16, seed)
            found = decoder.pull(logits.cuda())
            assert found.dtype == torch.int32
            np.testing.assert_array_equal(found.cpu().numpy(), expected.pull(logits))


def test_carries_run_over_many_bytes():
    """Intervals at the top of a range make the carry walk back over bytes of 0xFF."""
    n_streams, random = 64, np.random.default_rng(7)
    encoder, expected = llmcomp.Encoder(n_streams), llmcomp.Encoder(n_streams)
    for _ in range(300):
        total = random.integers(2, 2**51, n_streams)
        start = total - 1 - random.integers(0, 2, n_streams) * (total // 2)
        freq = np.ones(n_streams, np.int64)
        encoder.push_intervals(*(torch.from_numpy(part).cuda() for part in (start, freq, total)))
        expected.push_intervals(start, freq, total)
    assert encoder.finish() == expected.finish()


def test_one_stream():
    logits = logits_of(DISTRIBUTIONS[0], (400, 5000), torch.float32)
    tokens = np.random.default_rng(8).integers(0, 5000, 400)
    payload = llmcomp.encode(logits.cuda(), tokens)
    assert payload == llmcomp.encode(logits, tokens)
    np.testing.assert_array_equal(llmcomp.decode(payload, logits.cuda()).cpu().numpy(), tokens)
    logits[300, 7] = torch.nan
    with pytest.raises(llmcomp.Error, match="row 300: a logit is NaN"):
        llmcomp.decode(payload, logits.cuda())


def test_a_step_with_an_error_codes_nothing_and_is_raised_later():
    logits = logits_of(DISTRIBUTIONS[0], (6, 100), torch.float32).cuda()
    tokens = torch.zeros(6, dtype=torch.int64, device="cuda")
    encoder = llmcomp.Encoder(6)
    encoder.push(logits, tokens)
    bad = logits.clone()
    bad[4, 1] = torch.nan
    encoder.push(bad, tokens)
    encoder.push(logits, tokens)
    for raises in (encoder.check, encoder.finish):
        with pytest.raises(llmcomp.Error, match="row 4: a logit is NaN"):
            raises()
    good = llmcomp.Encoder(6)
    good.push(logits, tokens)
    decoder = llmcomp.Decoder(good.finish())
    assert decoder.pull(bad).tolist() == [0, 0, 0, 0, -2, 0]
    with pytest.raises(llmcomp.Error, match="row 4"):
        decoder.check()


# Streams and graphs of CUDA.


def test_work_is_put_on_the_callers_stream():
    logits = torch.zeros(64, 50_304, device="cuda")
    target = logits_of(DISTRIBUTIONS[0], (64, 50_304), torch.float32).cuda()
    tokens = torch.arange(64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # what runs on another stream would see the zeros
        logits.copy_(target)
        found = llmcomp.intervals(logits, tokens)
        expected = llmcomp.intervals(target.cpu(), np.arange(64))
    np.testing.assert_array_equal(on_cpu(found), expected)


def test_intervals_in_a_graph():
    logits = torch.zeros(16, 3000, device="cuda")
    tokens = torch.arange(16, device="cuda")
    llmcomp.intervals(logits, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = llmcomp.intervals(logits, tokens)
    for seed in range(3):
        logits.copy_(logits_of(DISTRIBUTIONS[0], (16, 3000), torch.float32, seed))
        graph.replay()
        np.testing.assert_array_equal(on_cpu(found), llmcomp.intervals(logits.cpu(), np.arange(16)))


def test_coding_loops_in_a_graph():
    n_steps, n_streams, vocab_size = 40, 65, 5003
    steps = [logits_of(DISTRIBUTIONS[0], (n_streams, vocab_size), torch.float16, i).cuda() for i in range(n_steps)]
    tokens = torch.randint(0, vocab_size, (n_steps, n_streams), device="cuda")
    logits, token = steps[0].clone(), tokens[0].clone()
    encoder, expected = llmcomp.Encoder(n_streams), llmcomp.Encoder(n_streams)
    encoder.push(logits, token)
    encoder.reserve(n_steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encoder.push(logits, token)
    for step in range(1, n_steps):
        logits.copy_(steps[step])
        token.copy_(tokens[step])
        graph.replay()
    for step in range(n_steps):
        expected.push(steps[step].cpu(), tokens[step].cpu().numpy())
    payloads = encoder.finish()
    assert payloads == expected.finish()

    decoder = llmcomp.Decoder(payloads)
    logits.copy_(steps[0])
    found = [decoder.pull(logits)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pulled = decoder.pull(logits)
    for step in range(1, n_steps):
        logits.copy_(steps[step])
        graph.replay()
        found.append(pulled.clone())
    decoder.check()
    assert torch.equal(torch.stack(found).long(), tokens)


def test_tokens_on_the_cpu_are_refused_in_a_graph():
    logits = torch.zeros(16, 3000, device="cuda")
    with pytest.raises(llmcomp.Error, match="expected them on the device"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        llmcomp.intervals(logits, np.zeros(16, int))
    assert_intervals_equal(logits, np.zeros(16, int))


def test_more_replays_than_reserved_are_an_error_and_write_nowhere():
    logits, tokens = torch.zeros(3, 4, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    encoder = llmcomp.Encoder(3)
    encoder.push(logits, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encoder.push(logits, tokens)
    for _ in range(20_000):
        graph.replay()
    with pytest.raises(llmcomp.Error, match="a buffer is too small"):
        encoder.finish()


# Other frameworks.


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    logits = logits_of(DISTRIBUTIONS[0], (20, 777), torch.float32)
    tokens = some_tokens(np.random.default_rng(9), 20, 777)
    with cupy.cuda.Stream(non_blocking=True):
        found = llmcomp.intervals(cupy.asarray(logits.numpy()), cupy.asarray(tokens))
        assert all(isinstance(part, cupy.ndarray) and part.dtype == np.uint64 for part in found)
        np.testing.assert_array_equal([part.get() for part in found], llmcomp.intervals(logits, tokens))


def test_jax_arrays(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("jax has no GPU here")
    logits = logits_of(DISTRIBUTIONS[0], (20, 777), torch.float32)
    tokens = some_tokens(np.random.default_rng(10), 20, 777)
    found = llmcomp.intervals(jax.numpy.asarray(logits.numpy()), tokens)
    np.testing.assert_array_equal([part.numpy() for part in found], llmcomp.intervals(logits, tokens))


def test_a_result_of_ours_is_taken_by_torch():
    array = cuda.DeviceArray((3, 4), "int32", 0)
    tensor = torch.from_dlpack(array)
    assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == ((3, 4), torch.int32, array.pointer)
    tensor.fill_(7)
    del array
    assert tensor.sum().item() == 84


@pytest.mark.slow
def test_arrays_of_more_than_2_gib_come_back():
    array = cuda.DeviceArray((2**31 + 4096,), "uint8", 0)
    torch.from_dlpack(array)[-1] = 7
    found = array.numpy()
    assert found.size == 2**31 + 4096 and found[-1] == 7 and not found[:-1:4097].any()
