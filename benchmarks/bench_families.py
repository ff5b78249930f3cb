"""The exact engines on the shapes of models that people use, beside what else runs them on a processor.

    python benchmarks/bench_families.py [--shapes SmolLM2-135M Qwen3-0.6B] [--weights float32 bfloat16 int8]
        [--threads 1 2] [--layers N] [--peers torch ctranslate2 llama.cpp] [--work pass 1 8 64] [--clock wall|cpu]

Random weights in the published shapes. Peers: transformers with torch, CTranslate2 and llama.cpp, each where its
packages are (ctranslate2; llama-cpp-python built from its source package with GGML_NATIVE=ON, and gguf), named where
they are not. Each side reads the same numbers; bfloat16 ones and int8 have the peers' own formats for these: bfloat16
and Q8_0 of llama.cpp, bfloat16 (float32 where it has none for this processor) and int8 of CTranslate2. transformers has
no int8 of its own: there it stands with float32.

First all sides' logits of one short text are compared with those of transformers in float32; a side that computes
something else ends the run. Then rounds of all sides are interleaved and medians are given: "pass", one sequence of 512
tokens with all logits, and "step N", one token of each of N streams, with PAST tokens in the cache at first. A step of
CTranslate2 is a share of a generation, whose search for the largest logit it does besides. ratio: a side's time over
ours.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import llmcomp
from llmcomp.bench.engine import CLOCKS
from llmcomp.coding import backend_in_use
from llmcomp.models.checkpoint import tensor_shapes
from llmcomp.models.engines.exact import load_exact

PASS_TOKENS, PAST = 512, 32
STEPS = {1: 24, 8: 8, 64: 3}  # of each round
ROUNDS_MAX = 8  # the first one warms up
_SHARED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True, "bos_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        **_SHARED,
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        **{"rms_norm_eps": 1e-5, "rope_theta": 100000, "max_position_embeddings": 8192, "mlp_bias": False},
    },
    "Qwen3-0.6B": {
        **_SHARED,
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 40960},
    },
}
# How far logits may be from those of transformers in float32, as a share of the largest.
TOLERANCES = {"exact": 1e-4, "float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}
PEERS = ("torch", "ctranslate2", "llama.cpp")


def write_random(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """Normal values of deviation 0.02 (norms: about 1) that bfloat16 holds, as `dtype`: float32 or bfloat16."""
    rng, header, at = np.random.default_rng(0), {"__metadata__": {"format": "pt"}}, 0
    shapes = tensor_shapes(config)
    for name, shape in shapes:
        n_bytes = int(np.prod(shape)) * (2 if dtype == "bfloat16" else 4)
        stored = "BF16" if dtype == "bfloat16" else "F32"
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [at, at + n_bytes]}  # type: ignore[dict-item]
        at += n_bytes
    text = json.dumps(header).encode()
    text += b" " * ((-8 - len(text)) % 64)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shapes:
            values = (1.0 if len(shape) == 1 else 0.0) + np.float32(0.02) * rng.standard_normal(shape, np.float32)
            bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
            file.write((bits >> 16).astype(np.uint16).tobytes() if dtype == "bfloat16" else bits.tobytes())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}), "utf-8")


class Exact:
    def __init__(self, folder: Path, engine: str) -> None:
        self.name = f"llmcomp {engine}"
        self.tolerance = TOLERANCES["int8" if engine == "exact-int8" else "exact"]
        self._model = load_exact(folder, engine=engine)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._model.logits(tokens[None])[0]

    def steps(self, past: np.ndarray, n_streams: int, n_steps: int) -> Callable[[], object]:
        session = self._model.session(n_streams, len(past) + ROUNDS_MAX * n_steps)
        out = np.zeros((n_streams, self._model.n_logits), np.float32)
        tokens = np.zeros(n_streams, np.int64)

        for stream in range(n_streams):
            session.prefill(stream, past)

        def run() -> None:
            for _ in range(n_steps):
                session.step(tokens, None, out)

        return run


class Torch:
    def __init__(self, folder: Path, dtype: str, n_threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(n_threads)
        transformers.utils.logging.disable_progress_bar()
        self.name, self.tolerance = f"transformers {dtype}", TOLERANCES[dtype]
        self.module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.module(torch.from_numpy(tokens)[None]).logits[0].float().numpy()

    def steps(self, past: np.ndarray, n_streams: int, n_steps: int) -> Callable[[], object]:
        import torch

        ids = torch.zeros((n_streams, 1), dtype=torch.int64)
        with torch.inference_mode():
            begun = torch.from_numpy(np.tile(past, (n_streams, 1)))
            cache = self.module(begun, use_cache=True, logits_to_keep=1).past_key_values

        def run() -> None:
            with torch.inference_mode():
                for _ in range(n_steps):
                    self.module(ids, past_key_values=cache, use_cache=True)

        return run


class CTranslate2:
    """Converted by its own converter, which takes transformers' module apart; the tokenizer's part is left out."""

    def __init__(self, stored: Path, folder: Path, dtype: str, n_threads: int) -> None:
        import ctranslate2
        from ctranslate2.converters import transformers as converter

        self.name, self.tolerance = f"CTranslate2 {dtype}", TOLERANCES[dtype]
        module = Torch(stored, "float32", n_threads).module
        loader = converter._MODEL_LOADERS[type(module.config).__name__]
        spec = loader.get_model_spec(module)
        n_tokens = module.config.vocab_size
        spec.register_vocabulary([f"<{token}>" for token in range(n_tokens)])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "<0>"
        spec.config.layer_norm_epsilon = module.config.rms_norm_eps
        spec.validate()
        spec.optimize(quantization=dtype)
        folder.mkdir(parents=True, exist_ok=True)
        spec.save(str(folder))
        del spec, module
        gc.collect()
        self._generator = ctranslate2.Generator(
            str(folder), "cpu", compute_type=dtype, inter_threads=1, intra_threads=n_threads
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._generator.forward_batch([tokens.tolist()]))[0]

    def steps(self, past: np.ndarray, n_streams: int, n_steps: int) -> Callable[[], object]:
        prompt = [f"<{token}>" for token in past]
        starts = [[f"<{1 + stream}>"] for stream in range(n_streams)]

        def run() -> None:
            self._generator.generate_batch(
                starts, static_prompt=prompt, cache_static_prompt=True, max_length=n_steps, min_length=n_steps,
                sampling_topk=1, include_prompt_in_result=False, max_batch_size=0,
            )  # fmt: skip

        return run


_GGUF_NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{"embed_tokens": "token_embd", "norm": "output_norm"},
}


def write_gguf(path: Path, folder: Path, dtype: str) -> None:
    import gguf

    config = json.loads((folder / "config.json").read_text("utf-8"))
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = getattr(gguf.GGMLQuantizationType, dtype)
    n_heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, values in stored_tensors(folder):
        *places, part, _ = name.removeprefix("model.").split(".")
        short = ".".join([*places[2:], part]) if places[:1] == ["layers"] else part
        target = f"blk.{places[1]}." if places[:1] == ["layers"] else ""
        if arch == "llama" and part in n_heads:  # that family's pairs of dimensions are neighbours there
            split = values.reshape(n_heads[part], 2, -1, values.shape[1])
            values = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
        own = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = values if own == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, own)
        writer.add_tensor(f"{target}{_GGUF_NAMES[short]}.weight", data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 values) of what `write_random` wrote."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, fields in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        data = memoryview(raw)[start + fields["data_offsets"][0] : start + fields["data_offsets"][1]]
        if fields["dtype"] == "BF16":
            bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(fields["shape"])
        else:
            yield name, np.frombuffer(data, np.float32).reshape(fields["shape"])


class LlamaCpp:
    """By its C functions: contexts with a cache a stream, in float16 as is its default."""

    def __init__(self, folder: Path, path: Path, dtype: str, n_threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self.name = f"llama.cpp {dtype}"
        self.tolerance = TOLERANCES["int8" if dtype == "Q8_0" else "bfloat16"]  # the cache is float16
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        write_gguf(path, folder, dtype)
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        self._n_logits = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._n_threads = n_threads
        self._context: Any = None

    def _open(self, n_streams: int, n_tokens: int) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx = n_streams, n_streams * (n_tokens + 255) // 256 * 256 + 256 * n_streams
        params.n_batch = params.n_ubatch = max(PASS_TOKENS, n_streams)
        params.n_threads = params.n_threads_batch = self._n_threads
        params.kv_unified = False
        self._context = self._lib.llama_init_from_model(self._model, params)
        self._batch = self._lib.llama_batch_init(max(PASS_TOKENS, n_streams), 0, 1)

    def _decode(self, tokens: Any, positions: Any, streams: Any, wanted: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, stream) in enumerate(zip(tokens, positions, streams, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), int(position), 1, wanted
            batch.seq_id[i][0] = int(stream)
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._lib.llama_synchronize(self._context)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        if self._context is None or self._lib.llama_n_seq_max(self._context) != 1:
            self._open(1, PASS_TOKENS)
        self._clear()
        self._decode(tokens, range(len(tokens)), [0] * len(tokens), True)
        found = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (len(tokens), self._n_logits))

    def steps(self, past: np.ndarray, n_streams: int, n_steps: int) -> Callable[[], object]:
        self._open(n_streams, len(past) + ROUNDS_MAX * n_steps)
        for stream in range(n_streams):
            self._decode(past, range(len(past)), [stream] * len(past), False)
        positions = itertools.count(len(past))

        def run() -> None:
            for _ in range(n_steps):
                self._decode([0] * n_streams, [next(positions)] * n_streams, range(n_streams), True)

        return run


_MODULES = {"torch": ("torch", "transformers"), "ctranslate2": ("ctranslate2",), "llama.cpp": ("llama_cpp", "gguf")}


def make_sides(folder: Path, weights: str, n_threads: int, peers: list[str]) -> list[Any]:
    """Ours first; then those peers whose packages are here, in the format nearest to `weights`."""
    stored = folder / ("bfloat16" if weights == "bfloat16" else "float32")
    sides: list[Any] = [Exact(stored, "exact-int8" if weights == "int8" else "exact")]
    missing = [p for p in peers if any(importlib.util.find_spec(module) is None for module in _MODULES[p])]
    if missing:
        print(f"not installed: {', '.join(missing)}", flush=True)
    reference = Torch(stored, "float32", n_threads) if "torch" not in missing else None
    if "torch" in peers and reference is not None:
        sides.append(reference)
        if weights == "bfloat16":
            sides.append(Torch(stored, "bfloat16", n_threads))
    if "ctranslate2" in set(peers) - set(missing) and reference is not None:
        import ctranslate2

        dtype = weights if weights in ctranslate2.get_supported_compute_types("cpu") else "float32"
        sides.append(CTranslate2(stored, folder / f"ct2-{dtype}", dtype, n_threads))
    if "llama.cpp" in set(peers) - set(missing):
        dtype = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}[weights]
        sides.append(LlamaCpp(stored, folder / f"{dtype}.gguf", dtype, n_threads))
    check(sides, reference)
    return sides


def check(sides: list[Any], reference: Torch | None) -> None:
    tokens = np.random.default_rng(1).integers(1, 4000, 40)
    expected = (reference or sides[0]).logits(tokens)
    for side in sides:
        error = float(np.abs(side.logits(tokens) - expected).max() / np.abs(expected).max())
        print(f"  {side.name}: logits within {error:.1e} of the largest", flush=True)
        if not error <= side.tolerance:
            raise SystemExit(f"{side.name} computes something else: {error:.1e} > {side.tolerance:.0e}")


def time_sides(runs: list[Callable[[], object]], n: int, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Median seconds of an n-th of a run, over interleaved rounds of about `seconds` a side, at least three."""
    times: list[list[float]] = [[] for _ in runs]
    until = time.perf_counter() + seconds * len(runs)
    for number in range(ROUNDS_MAX):
        if number > 3 and time.perf_counter() > until:
            break
        for run, found in zip(runs, times, strict=True):
            start = clock()
            run()
            found.append((clock() - start) / n)
    return [statistics.median(found[1:]) for found in times]


def report(work: str, unit: str, sides: list[Any], shown: list[float], seconds: list[float]) -> None:
    parts = [f"{side.name} {value:.4g}" for side, value in zip(sides, shown, strict=True)]
    ratios = [f"{found / seconds[0]:.2f}" for found in seconds[1:]]
    print(f"{work:8} {unit:9} {'; '.join(parts)}; ratio {' '.join(ratios)}", flush=True)


def compare(sides: list[Any], work: list[str], seconds: float, clock: Callable[[], float]) -> None:
    rng = np.random.default_rng(2)
    if "pass" in work:
        tokens = rng.integers(1, 4000, PASS_TOKENS)
        found = time_sides([lambda s=side: s.logits(tokens) for side in sides], 1, seconds, clock)
        report("pass", "tokens/s", sides, [PASS_TOKENS / value for value in found], found)
    for n_streams in (int(name) for name in work if name != "pass"):
        past, n_steps = rng.integers(1, 4000, PAST), STEPS[n_streams]
        runs = [side.steps(past, n_streams, n_steps) for side in sides]
        found = time_sides(runs, n_steps, seconds, clock)
        report(f"step {n_streams}", "ms", sides, [1e3 * value for value in found], found)
        del runs
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--work", nargs="+", default=["pass", "1", "8", "64"])
    parser.add_argument("--seconds", type=float, default=2.0, help="about so long for each side of a row")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--folder", type=Path, help="where the random models are kept; default: nowhere")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for shape in args.shapes:
            config = {**SHAPES[shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
            folder = (args.folder or Path(temporary)) / f"{shape}-{config['num_hidden_layers']}"
            for dtype in ("float32", "bfloat16"):
                if not (folder / dtype / "config.json").exists():
                    write_random(folder / dtype, config, dtype)
            for weights in args.weights:
                for n_threads in args.threads:
                    head = f"{shape}, {config['num_hidden_layers']} layers, {weights} weights, {n_threads} thread(s)"
                    print(f"{head}, backend {backend_in_use()}, {args.clock} clock", flush=True)
                    with llmcomp.use_threads(n_threads):
                        sides = make_sides(folder, weights, n_threads, args.peers)
                        compare(sides, args.work, args.seconds, CLOCKS[args.clock])
                        del sides
                        gc.collect()


if __name__ == "__main__":
    main()
