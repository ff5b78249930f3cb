"""How the bundled pico suite was made: `python -m llmcomp.pico.train --text ENWIK8 --speech FOLDER --out FOLDER`.

Tokenizer, token streams, training, and the files that are written. The sources are in `corpus`, the table of ratios
in `evaluate`. Needs the extra `[train]`; nothing else in llmcomp imports this file. Seeded: the same processor, thread
count and library versions give the same weights; other machines give others, which is why the weights are bundled.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save as safetensors_bytes
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from llmcomp.atomic_write import write_beside
from llmcomp.data.tokenizers import AnyTokenizer, Tokenizer
from llmcomp.pico import STEPS, SUITE_NAMES, chunk_hash, corpus
from llmcomp.pico.corpus import Source
from llmcomp.pico.muon import Muon

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, layers and heads of one model."""

    hidden_size: int
    n_layers: int
    n_heads: int


SIZES = dict(
    zip(SUITE_NAMES, (Size(32, 1, 1), Size(48, 1, 2), Size(56, 2, 2), Size(96, 2, 3), Size(128, 3, 4)), strict=True)
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on beside the data and the machine."""

    seed: int = 2026
    context_length: int = 512
    sequences_per_step: float = 4.0
    warmup_steps: int = 32
    muon_rate: float = 0.02
    muon_decay: float = 0.01
    adamw_rate: float = 3.3e-3
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    average_power: int = 10
    # Of 20 consecutive sequences: 14 text, 3 image, 3 speech.
    text_share: float = 14.0
    image_share: float = 3.0
    speech_share: float = 3.0
    # Within a modality: the share of the first kind of source (Wikipedia, photographs, LibriSpeech).
    wikipedia_share: float = 0.85
    photograph_share: float = 0.5
    librispeech_share: float = 0.65
    n_photographs: int = 1500
    n_drawn_images: int = 1500
    n_espeak_utterances: int = 24


Corpus = dict[str, list[tuple[float, list[Source]]]]
Streams = dict[str, list[tuple[float, "TokenStream"]]]


def gather(text: Path, speech: Path, recipe: Recipe) -> Corpus:
    """The training data: for each modality the kinds of source, each with its share of the modality's sequences."""
    rng = np.random.default_rng(recipe.seed)
    wikipedia = corpus.wikipedia(text)
    spoken_text = wikipedia[0].data.decode("utf-8", "ignore")
    speakers = corpus.librispeech(speech)
    if not wikipedia[0].data or not speakers:
        raise SystemExit(f"{text} ends before byte {corpus.TEXT_FIRST_BYTE}, or {speech} has no training speaker")
    synthetic = corpus.synthetic_speech(spoken_text, recipe.n_espeak_utterances, rng)
    photographs = corpus.photographs(recipe.n_photographs, rng)
    drawn = corpus.drawn_images(recipe.n_drawn_images, rng)
    return {
        "text": [(recipe.wikipedia_share, wikipedia), (1 - recipe.wikipedia_share, corpus.python_library())],
        "image": [(recipe.photograph_share, photographs), (1 - recipe.photograph_share, drawn)],
        "speech": [(recipe.librispeech_share, speakers), (1 - recipe.librispeech_share, synthetic)],
    }


def tokenizer_texts(everything: Corpus) -> list[bytes]:
    """Wikipedia, and one Python module in sixteen: about the shares that they have in the training sequences."""
    (_, wikipedia), (_, library) = everything["text"]
    return [source.data for source in [*wikipedia, *library[::16]]]


def train_tokenizer(texts: list[bytes], vocab_size: int = VOCAB_SIZE) -> bytes:
    """The `tokenizer.json` of GPT-NeoX's kind of tokenizer, without its normaliser.

    Byte-level BPE; all 256 byte symbols are in the vocabulary, `<|endoftext|>` is id 0.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("utf-8", "ignore") for text in texts), trainer)
    return tokenizer.to_str(pretty=False).encode()


class TokenStream:
    """The tokens of some sources, chunk by chunk as they are scored, from which sequences are drawn."""

    def __init__(self, sources: list[Source], tokenizer: AnyTokenizer):
        chunks = [tokenizer.encode_bytes(chunk) for source in sources for chunk in source.chunks()]
        self.tokens = np.concatenate(chunks).astype(np.int64)
        self.lengths = np.array([len(chunk) for chunk in chunks])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])

    def draw(self, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [n_tokens] from the start of a random chunk or, as often, from anywhere inside it.

        A scored chunk longer than the context goes on from its middle, so the model must know both.
        """
        chunk = rng.integers(len(self.starts))
        latest = max(0, self.lengths[chunk] - n_tokens)
        at = self.starts[chunk] + rng.integers(2) * rng.integers(latest + 1)
        at = max(0, min(at, len(self.tokens) - n_tokens))
        return self.tokens[at : at + n_tokens]


def token_streams(everything: Corpus, tokenizer: AnyTokenizer) -> Streams:
    """The corpus in tokens."""
    return {
        modality: [(share, TokenStream(sources, tokenizer)) for share, sources in kinds]
        for modality, kinds in everything.items()
    }


def batches(streams: Streams, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless batches, int64 [sequences_per_step, context_length + 1], each row beginning with token 0.

    The same for every size: model P at step S has seen what model Q at step S has seen. Shares and sequences need not
    be whole numbers: what a step or a round of the modalities leaves over goes to a later one.
    """
    rng = np.random.default_rng((recipe.seed, 1))
    shares = {"text": recipe.text_share, "image": recipe.image_share, "speech": recipe.speech_share}
    pending: list[str] = []
    n_rounds = 0
    for step in itertools.count():
        n_rows = _whole(step, recipe.sequences_per_step)
        rows = np.zeros((n_rows, recipe.context_length + 1), np.int64)
        for row in rows:
            while not pending:
                deck = [name for name, share in shares.items() for _ in range(_whole(n_rounds, share))]
                pending = list(rng.permutation(deck))
                n_rounds += 1
            (share, first), (_, second) = streams[pending.pop()]
            row[1:] = (first if rng.random() < share else second).draw(recipe.context_length, rng)
        yield torch.from_numpy(rows)


def _whole(turn: int, each: float) -> int:
    """How many of `each` a turn, a fraction, fall to turn 0, 1, ...: whole numbers with the right sum."""
    return math.floor((turn + 1) * each) - math.floor(turn * each)


def new_model(size: Size, recipe: Recipe, vocab_size: int = VOCAB_SIZE) -> GPTNeoXForCausalLM:
    """A GPT-NeoX model with random weights."""
    torch.manual_seed(recipe.seed)
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        intermediate_size=4 * size.hidden_size,
        hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        max_position_embeddings=recipe.context_length,
        tie_word_embeddings=True,
        use_parallel_residual=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def optimisers(model: GPTNeoXForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and all vectors."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.muon_decay),
        torch.optim.AdamW(others, lr=recipe.adamw_rate, betas=recipe.adamw_betas, weight_decay=0.0),
    ]


def train(
    model: GPTNeoXForCausalLM, data: Iterator[torch.Tensor], steps: tuple[int, ...], recipe: Recipe, log: str
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yields (step, averaged weights) at each of `steps`; the average is over all steps so far, late ones more."""
    both = optimisers(model, recipe)
    rates = [optimiser.param_groups[0]["lr"] for optimiser in both]
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    started, recent = time.monotonic(), []
    for step in range(1, max(steps) + 1):
        for optimiser, rate in zip(both, rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * min(1.0, step / recipe.warmup_steps)
        rows = next(data)
        logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        for optimiser in both:
            optimiser.step()
            optimiser.zero_grad()
        keep = (1 - 1 / step) ** recipe.average_power
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - keep)
        recent.append(loss.item())
        if step % 64 == 0:
            seconds = time.monotonic() - started
            left = seconds / step * (max(steps) - step)
            print(f"{log} step {step} loss {np.mean(recent):.3f} nats, {seconds:.0f} s, {left:.0f} s left", flush=True)
            recent = []
        if step in steps:
            yield step, average


def save_checkpoint(folder: Path, model: GPTNeoXForCausalLM, weights: dict[str, torch.Tensor]) -> str:
    """Writes `config.json` and `model.safetensors` (float16, the tied embedding once); returns the latter's SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}
    if not all(torch.isfinite(half).all() for half in halves.values()):
        raise FloatingPointError(f"{folder}: a weight does not fit float16")
    config = model.config.to_dict() | {"dtype": "float16", "architectures": ["GPTNeoXForCausalLM"], "use_cache": True}
    # The names that Pythia's own config.json has for two of these, for readers older than transformers 5.
    config |= {"rotary_pct": 1.0, "rotary_emb_base": 10000}
    config = {key: value for key, value in sorted(config.items()) if not key.startswith("_")}
    write_beside(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    weights_file = safetensors_bytes(halves, metadata={"format": "pt"})
    write_beside(folder / "model.safetensors", weights_file)
    return hashlib.sha256(weights_file).hexdigest()


def record_chunks(everything: Corpus, out: Path) -> list[dict[str, object]]:
    """Writes `training_chunks.bin`; returns which hashes in it are whose."""
    hashes: list[bytes] = []
    ranges: list[dict[str, object]] = []
    for kinds in everything.values():
        for source in (source for _, sources in kinds for source in sources if source.recorded):
            own = [chunk_hash(chunk) for chunk in source.chunks() if len(chunk) == corpus.CHUNK_BYTES]
            if own:
                ranges.append({"name": source.name, "first": len(hashes), "count": len(own)})
            hashes += own
    write_beside(out / "training_chunks.bin", b"".join(hashes))
    return ranges


def versions() -> dict[str, str]:
    """What the weights were made with, beside the recipe."""
    espeak = subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True).stdout.split()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "espeak-ng": next(word for word in espeak if word[0].isdigit()),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }


def card(everything: Corpus, ranges: list[dict[str, object]], recipe: Recipe, steps: tuple[int, ...]) -> dict:
    """`suite.json` but for the checkpoints, which join as they are written."""
    return {
        "vocab_size": VOCAB_SIZE,
        "recipe": dataclasses.asdict(recipe),
        "steps": list(steps),
        "tokens_seen": {str(step): int(step * recipe.sequences_per_step) * recipe.context_length for step in steps},
        "versions": versions(),
        "text_first_byte": corpus.TEXT_FIRST_BYTE,
        "training_speakers": list(corpus.TRAINING_SPEAKERS),
        "espeak_voices": list(corpus.ESPEAK_VOICES),
        "training_bytes": {
            modality: sum(len(source.data) for _, sources in kinds for source in sources)
            for modality, kinds in everything.items()
        },
        "checkpoints": {},
        "training_chunks": ranges,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llmcomp.pico.train", description="Train the pico suite.")
    parser.add_argument("--text", type=Path, required=True, help="enwik8, or its head; read from byte 1,001,472 on")
    parser.add_argument("--speech", type=Path, required=True, help="folder of LibriSpeech utterances (FLAC)")
    parser.add_argument("--out", type=Path, required=True, help="folder that the suite is written to")
    parser.add_argument("--sizes", nargs="+", choices=SUITE_NAMES, default=list(SUITE_NAMES))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--threads", type=int, default=1)
    for field in dataclasses.fields(Recipe):
        if isinstance(field.default, (int, float)):
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=type(field.default), default=field.default, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    known = {field.name for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**{name: value for name, value in vars(arguments).items() if name in known})
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = tuple(sorted(arguments.steps))
    everything = gather(arguments.text, arguments.speech, recipe)
    tokenizer_json = train_tokenizer(tokenizer_texts(everything))
    write_beside(arguments.out / "tokenizer.json", tokenizer_json)
    tokenizer = Tokenizer.from_bytes(tokenizer_json)
    streams = token_streams(everything, tokenizer)
    suite = card(everything, record_chunks(everything, arguments.out), recipe, steps)
    for name in arguments.sizes:
        model = new_model(SIZES[name], recipe)
        for step, weights in train(model, batches(streams, recipe), steps, recipe, name):
            folder = arguments.out / name / f"step{step}"
            suite["checkpoints"][f"{name}/step{step}"] = {
                "parameters": model.num_parameters(),
                "parameters_without_embedding": model.num_parameters() - model.gpt_neox.embed_in.weight.numel(),
                "sha256": save_checkpoint(folder, model, weights),
            }
        write_beside(arguments.out / "suite.json", (json.dumps(suite, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
