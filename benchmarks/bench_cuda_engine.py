"""The exact engines on the CUDA device of this machine, beside cuBLAS and beside transformers, all in one run.

    python benchmarks/bench_cuda_engine.py [--streams 512,1024] [--steps 536] [--rows 8192] [--out FILE.md]

Random weights of the shapes of Pythia and SmolLM2-135M; nothing is downloaded. First the bits: logits of one pass and
of steps against the C core's, and payloads that decode to what was coded. Then the times:

- One pass of the 1.4b shape in float32, against its matrix products alone by cuBLAS in float32 with TF32 off; and in
  8-bit integers, against the products alone by cuBLAS in 8-bit integers, which leaves their sums as integers. By CUDA
  events.
- Decoding with the 70m and SmolLM2's shape: model, range decoder and tokens on the device, payloads in and tokens out,
  all streams together and in two halves, each on a CUDA stream of its own; by the clock. Against transformers' steps
  with its cache on the 70m shape's weights, which give a row of logits and no more: its share is one argmax a step. A
  token stands for 3.82 bytes, as on enwik8: 536 tokens in 2,048 bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import llmcomp
from llmcomp import coding
from llmcomp.coding.cuda import open_device
from llmcomp.models.checkpoint import tensor_shapes
from llmcomp.models.engines.cuda import CudaInt8Model, CudaModel
from llmcomp.models.engines.cuda_streams import DecodingChain
from llmcomp.models.engines.exact import ExactModel, Int8Model

SHAPES = {
    "70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192},
    "SmolLM2-135M": {
        **{"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
}
DECODED_SHAPES = ("70m", "SmolLM2-135M")
BYTES_PER_TOKEN = 2048 / 536  # of enwik8 with Pythia's tokenizer
N_REPEATS = 7
# What every engine is on the processor, and on the device.
MODELS: dict[str, tuple[type[ExactModel], type[CudaModel]]] = {
    "exact": (ExactModel, CudaModel),
    "exact-int8": (Int8Model, CudaInt8Model),
}


def config_of(shape: str) -> dict[str, Any]:
    return {"model_type": "gpt_neox", "vocab_size": 50304, "max_position_embeddings": 2048, **SHAPES[shape]}


def random_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parts of one pool of numbers: a model is as quick with any weights. Norms multiply by one."""
    shapes = tensor_shapes(config)
    largest = max(int(np.prod(shape)) for _, shape in shapes)
    pool = np.random.default_rng(0).standard_normal(largest + len(shapes), np.float32) * np.float32(0.02)
    weights = {}
    for first, (name, shape) in enumerate(shapes):
        part = pool[first : first + int(np.prod(shape))].reshape(shape)
        weights[name] = part + np.float32(1) if name.endswith("norm.weight") else part
    return weights


# Bits.


def check_bits(shape: str, engine: str, n_tokens: int) -> str:
    """One pass and steps, float32 and float16; SystemExit where a bit differs from the C core's."""
    config = config_of(shape)
    weights = random_weights(config)
    on_cpu, on_device = MODELS[engine]
    for dtype in (np.float32, np.float16):
        stored = {name: value.astype(dtype, copy=False) for name, value in weights.items()}
        cpu, device = on_cpu(config, stored), on_device(config, stored)
        tokens = np.random.default_rng(1).integers(0, cpu.n_logits, (2, n_tokens))
        expected = cpu.logits(tokens)
        session = device.session(2, n_tokens)
        steps = np.stack([session.step(tokens[:, t]) for t in range(n_tokens)], 1)
        for name, found in (("one pass", device.logits(tokens)), ("steps", steps)):
            n_wrong = int((found.view(np.uint32) != expected.view(np.uint32)).sum())
            if n_wrong:
                which = f"{shape} {engine} {dtype.__name__}, {name}"
                raise SystemExit(f"{which}: {n_wrong} of {found.size} logits differ in bits")
    return (
        f"{shape}, {engine}: {expected.size:,} logits of one pass and of steps, float32 and float16, are the C core's"
    )


# Times.


class Timer:
    """Milliseconds on one CUDA stream, by events."""

    def __init__(self, torch: Any, stream: int):
        self._torch = torch
        self._stream = torch.cuda.ExternalStream(stream) if stream else torch.cuda.current_stream()

    def ms(self, work: Callable[[], object]) -> float:
        events = [self._torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._torch.cuda.synchronize()
        events[0].record(self._stream)
        work()
        events[1].record(self._stream)
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1]))

    def median_ms(self, work: Callable[[], object]) -> float:
        return statistics.median([self.ms(work) for _ in range(N_REPEATS + 2)][2:])


def product_shapes(model: CudaModel) -> list[tuple[int, int, int]]:
    """(how often, outputs, inputs) of the matrix products of a pass."""
    c = model.config
    layer = [(3 * c.hidden, c.hidden), (c.hidden, c.hidden), (c.intermediate, c.hidden), (c.hidden, c.intermediate)]
    return [*((c.n_layers, *shape) for shape in layer), (1, c.n_logits, c.hidden)]


def time_pass(torch: Any, engine: str, n_rows: int) -> list[str]:
    """The 1.4b shape: sequences of 512 tokens, all layers and all logits."""
    config = config_of("1.4b")
    model = MODELS[engine][1](config, random_weights(config))
    module, device, n_tokens, n_head = model._module, model._device, 512, 1024
    n_sequences = n_rows // n_tokens
    session = model._core.session(1, n_sequences, n_tokens, n_rows)
    tokens = np.random.default_rng(2).integers(0, model.n_logits, n_rows).astype(np.int32)
    begin = np.arange(0, n_rows + 1, n_tokens, dtype=np.uint32)
    places = [module.Buffer(array.nbytes, device) for array in (tokens, begin)]
    for place, array in zip(places, (tokens, begin), strict=True):
        module.upload(device, session.stream, place.pointer, array)
    logits = module.Buffer(4 * n_head * model.n_logits, device)

    def layers() -> None:
        session.run_pass(places[0].pointer, places[1].pointer, 0, n_sequences, n_rows, n_tokens)

    def head() -> None:
        for first in range(0, n_rows, n_head):
            session.head(first, min(n_head, n_rows - first), logits.pointer)

    timer = Timer(torch, session.stream)
    ours = timer.median_ms(layers), timer.median_ms(head)
    if (error := session.check()) is not None:
        raise SystemExit(f"the pass found an error: {error}")
    of_cublas, operations = time_cublas(torch, product_shapes(model), n_rows, engine == "exact-int8")
    both = sum(ours)
    arithmetic, told = ("float32", "float32, TF32 off") if engine == "exact" else ("8-bit integers",) * 2
    target = " (target 60 %)" if engine == "exact" else ""
    return [
        f"| 1.4b shape, {arithmetic}, {n_rows:,} tokens | ms | 10^12 operations/s of the products |",
        "|---|---|---|",
        f"| {engine}: all layers and the head | {both:.1f} | {operations / both / 1e9:.1f} |",
        f"| of it the head | {ours[1]:.1f} | {2 * n_rows * model.n_logits * model.config.hidden / ours[1] / 1e9:.1f} |",
        f"| cuBLAS, {told}: the products alone | {of_cublas:.1f} | {operations / of_cublas / 1e9:.1f} |",
        "",
        f"The pass runs at {of_cublas / both:.0%} of cuBLAS{target}, norms, attention and GELU included.",
    ]


def time_cublas(torch: Any, shapes: list[tuple[int, int, int]], n_rows: int, int8: bool) -> tuple[float, float]:
    """(milliseconds, operations) of all products; the head in the same blocks would be no faster."""
    torch.backends.cuda.matmul.allow_tf32 = False
    timer, total, operations = Timer(torch, 0), 0.0, 0.0
    dtype, product, sum_dtype = (
        (torch.int8, torch._int_mm, torch.int32) if int8 else (torch.float32, torch.mm, torch.float32)
    )
    for n_times, n_outputs, n_inputs in shapes:
        weight = torch.randn(n_outputs, n_inputs, device="cuda").to(dtype)
        inputs = torch.randn(min(n_rows, 8192), n_inputs, device="cuda").to(dtype)
        parts = n_rows / len(inputs)
        output = torch.empty(len(inputs), n_outputs, device="cuda", dtype=sum_dtype)
        one = timer.median_ms(lambda x=inputs, w=weight, y=output: product(x, w.T, out=y))
        total += n_times * parts * one
        operations += 2.0 * n_times * n_rows * n_outputs * n_inputs
        del weight, inputs, output
    torch.cuda.empty_cache()
    return total, operations


def payloads_of(model: CudaModel, streams: np.ndarray) -> list[bytes]:
    """Of int [B, T], each from the start token 0 on."""
    inputs = np.pad(streams[:, :-1], ((0, 0), (1, 0)))
    start, freq, total = model.intervals(inputs, streams)
    return [coding.encode_intervals(*parts) for parts in zip(start, freq, total, strict=True)]


def time_decoding(torch: Any, model: CudaModel, n_streams: int, n_steps: int, n_parts: int) -> float:
    """Tokens a second of streams in so many parts; SystemExit unless they are those that were coded."""
    # As many different streams as are quickly coded, each several times.
    different = np.random.default_rng(n_streams).integers(0, model.n_logits, (min(n_streams, 64), n_steps))
    payloads = payloads_of(model, different)
    chain = DecodingChain(model, n_streams, n_steps, model.n_logits, n_parts)
    lanes, active = np.arange(n_streams), np.ones(n_streams, np.bool_)
    found: list[np.ndarray] = []

    def decode() -> None:
        found.clear()
        chain.open_window(lanes, np.zeros((n_streams, 1), np.int32))
        for at in range(0, n_steps, chain.steps_max):
            found.append(chain.run(min(chain.steps_max, n_steps - at), active))

    times = []
    for _ in range(3):
        chain.begin([payloads[i % len(payloads)] for i in range(n_streams)])
        torch.cuda.synchronize()
        began = time.perf_counter()
        decode()  # ends with tokens on the host
        times.append(time.perf_counter() - began)
        decoded = np.concatenate(found).T
        if any(not np.array_equal(row, different[i % len(different)]) for i, row in enumerate(decoded)):
            raise SystemExit(f"{n_streams} streams: decoded tokens are not those that were coded")
    return n_streams * n_steps / min(times)


def transformers_model(torch: Any, config: dict[str, Any], weights: dict[str, np.ndarray], dtype: str) -> Any:
    import transformers
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, f"{folder}/model.safetensors")
        transformers.GPTNeoXConfig(**config).save_pretrained(folder)
        found = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return found.to("cuda").eval()


def time_transformers(torch: Any, model: Any, n_streams: int, n_steps: int) -> float:
    """Tokens a second of steps from position 0 on, with the cache that transformers makes by itself."""

    def steps() -> None:
        cache, tokens = None, torch.zeros(n_streams, 1, dtype=torch.long, device="cuda")
        for _ in range(n_steps):
            out = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    timer = Timer(torch, 0)
    with torch.inference_mode():
        times = [timer.ms(steps) for _ in range(3)]
    return n_streams * n_steps / (min(times) * 1e-3)


def our_decoding(
    torch: Any, all_streams: list[int], n_steps: int
) -> tuple[dict[tuple[str, str, int], float], list[str]]:
    """Tokens a second by shape, engine and streams, and the table's lines."""
    rate_of, lines = {}, []
    for shape in DECODED_SHAPES:
        config = config_of(shape)
        weights = random_weights(config)
        for engine, (_, on_device) in MODELS.items():
            model = on_device(config, weights)
            for n in all_streams:
                rates = [time_decoding(torch, model, n, n_steps, n_parts) for n_parts in (1, 2)]
                rate_of[shape, engine, n] = max(rates)
                mb = f"{max(rates) * BYTES_PER_TOKEN / 1e6:.2f}" if shape == "70m" else "-"
                told = " | ".join(f"{rate:,.0f}" for rate in rates)
                lines.append(f"| {engine}, decoding | {shape} | {n:,} | {told} | {mb} |")
                print(lines[-1], file=sys.stderr)
            del model
    return rate_of, lines


def transformers_decoding(
    torch: Any, all_streams: list[int], n_steps: int
) -> tuple[dict[tuple[str, int], float], list[str]]:
    """Tokens a second of transformers by dtype and batch, and the table's lines."""
    config = config_of("70m")
    weights = random_weights(config)
    rate_of, lines = {}, []
    for dtype in ("float32", "bfloat16"):
        other = transformers_model(torch, config, weights, dtype)
        for n in (1, all_streams[0]):
            rate = rate_of[dtype, n] = time_transformers(torch, other, n, n_steps)
            mb = rate * BYTES_PER_TOKEN / 1e6
            lines.append(
                f"| transformers, {dtype}, cached steps, no coding | 70m | {n:,} | {rate:,.0f} | - | {mb:.3f} |"
            )
            print(lines[-1], file=sys.stderr)
        del other
        torch.cuda.empty_cache()
    return rate_of, lines


def decoding_table(torch: Any, all_streams: list[int], n_steps: int) -> list[str]:
    heading = [
        f"| {n_steps} steps from position 0 | shape | streams | tokens/s | in two halves | MB/s of text, at best |",
        "|---|---|---|---|---|---|",
    ]
    ours, our_lines = our_decoding(torch, all_streams, n_steps)
    theirs, their_lines = transformers_decoding(torch, all_streams, n_steps)
    first = all_streams[0]
    ratios = [ours["70m", "exact", first] / theirs["float32", n] for n in (1, first)]
    told = (
        f"{ratios[0]:.1f} times transformers at batch 1 (target 20), {ratios[1]:.1f} times at batch {first} (target 2)"
    )
    best = {
        engine: max(rate for (shape, of, _), rate in ours.items() if (shape, of) == ("70m", engine))
        * BYTES_PER_TOKEN
        / 1e6
        for engine in MODELS
    }
    ends = f"at best {best['exact']:.2f} MB/s (target 1), in 8-bit integers {best['exact-int8']:.2f}"
    return [*heading, *our_lines, *their_lines, "", f"At {first} streams {told}, all in float32; {ends}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="512,1024,2048", help="of decoding (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=536, help="of decoding (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8192, help="of the pass (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    try:
        open_device("cuda")
    except llmcomp.Error as error:
        raise SystemExit(f"bench_cuda_engine: {error}") from None
    try:
        import torch
        from bench_cuda import machine
    except ImportError as error:
        raise SystemExit(f"bench_cuda_engine: torch, which is measured beside, is not installed ({error})") from None
    if not torch.cuda.is_available():
        raise SystemExit("bench_cuda_engine: this torch has no CUDA; it is measured beside")
    lines = [
        "## The exact engines",
        *machine(),
        *(f"- {check_bits(shape, engine, 48)}" for shape in SHAPES for engine in MODELS),
        "",
    ]
    print("\n".join(lines), file=sys.stderr)
    for engine in MODELS:
        lines += [*time_pass(torch, engine, arguments.rows), ""]
    lines += [*decoding_table(torch, [int(n) for n in arguments.streams.split(",")], arguments.steps), ""]
    lines.append(f"Afterwards: {machine()[0][2:]}")
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
