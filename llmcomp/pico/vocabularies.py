"""How pico models of other vocabularies were made: `python -m llmcomp.pico.vocabularies --text ENWIK8 --speech FOLDER`.

One size of the suite on plain bytes and on BPE of 512 and of 2,048 entries, from the suite's own sources, recipe and
seed. The steps are the suite's, and so are the bytes that a step sees of every modality: a smaller vocabulary gets more
sequences of 512 tokens. Only that comparison lives here; all else is `llmcomp.pico.train`'s. Needs the extra `[train]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from llmcomp.atomic_write import write_beside
from llmcomp.data.tokenizers import AnyTokenizer, ByteTokenizer, Tokenizer
from llmcomp.pico import STEPS, SUITE_NAMES, VOCABULARIES, suite_root, tokenizer_path
from llmcomp.pico import train as suite

SIZE = "pico-224k"
NAMES = tuple(name for name in VOCABULARIES if name not in SUITE_NAMES)

# Sequences drawn to estimate the bytes of one: the standard error is below 0.5 %.
_N_DRAWS = 4096


def token_lengths(tokenizer: AnyTokenizer) -> np.ndarray:
    """Bytes of every token, int64 [vocab_size]; 0 for `<|endoftext|>`."""
    bos = tokenizer.bos_token
    return np.array([0 if id_ == bos else len(tokenizer.decode_bytes([id_])) for id_ in range(tokenizer.vocab_size)])


def bytes_a_sequence(streams: suite.Streams, lengths: np.ndarray, recipe: suite.Recipe) -> dict[str, float]:
    """Mean bytes of a sequence of every modality, from `_N_DRAWS` of them."""
    rng = np.random.default_rng(recipe.seed)
    found = {}
    for modality, ((share, first), (_, second)) in streams.items():
        kinds = rng.random(_N_DRAWS) < share
        drawn = [lengths[(first if kind else second).draw(recipe.context_length, rng)].sum() for kind in kinds]
        found[modality] = float(np.mean(drawn))
    return found


def matched_recipe(recipe: suite.Recipe, reference: dict[str, float], own: dict[str, float]) -> suite.Recipe:
    """The recipe with as many sequences of every modality as hold the bytes of the reference's."""
    before = {modality: getattr(recipe, f"{modality}_share") for modality in own}
    after = {modality: round(share * reference[modality] / own[modality], 4) for modality, share in before.items()}
    growth = sum(after.values()) / sum(before.values())
    shares = {f"{modality}_share": share for modality, share in after.items()}
    return dataclasses.replace(recipe, sequences_per_step=round(recipe.sequences_per_step * growth, 4), **shares)


class Counted:
    """Batches, and how many bytes they held."""

    def __init__(self, data: Iterator[torch.Tensor], lengths: np.ndarray):
        self._data, self._lengths = data, lengths
        self.n_bytes = 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> torch.Tensor:
        rows = next(self._data)
        self.n_bytes += int(self._lengths[rows[:, 1:].numpy()].sum())
        return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llmcomp.pico.vocabularies", description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="enwik8, or its head; read from byte 1,001,472 on")
    parser.add_argument("--speech", type=Path, required=True, help="folder of LibriSpeech utterances (FLAC)")
    parser.add_argument("--out", type=Path, default=suite_root(), help="default: the bundled suite's folder")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--step", type=int, default=STEPS[-1])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    recipe = suite.Recipe()
    everything = suite.gather(arguments.text, arguments.speech, recipe)
    texts = suite.tokenizer_texts(everything)
    tokenizer_json = suite.train_tokenizer(texts)
    if tokenizer_json != tokenizer_path().read_bytes():
        raise SystemExit("these sources give another tokenizer than the bundled suite's: they are not the suite's")
    reference = Tokenizer.from_bytes(tokenizer_json)
    streams = suite.token_streams(everything, reference)
    reference_bytes = bytes_a_sequence(streams, token_lengths(reference), recipe)
    counted = Counted(suite.batches(streams, recipe), token_lengths(reference))
    for _ in range(arguments.step):
        next(counted)
    card = {"size": SIZE, "step": arguments.step, "versions": suite.versions(), "models": {}}
    card["suite_bytes_seen"] = counted.n_bytes
    for name in arguments.names:
        vocab_size = VOCABULARIES[name]
        tokenizer: AnyTokenizer = ByteTokenizer()
        if vocab_size > 256:
            tokenizer_json = suite.train_tokenizer(texts, vocab_size)
            (arguments.out / name).mkdir(parents=True, exist_ok=True)
            write_beside(arguments.out / name / "tokenizer.json", tokenizer_json)
            tokenizer = Tokenizer.from_bytes(tokenizer_json)
        streams, lengths = suite.token_streams(everything, tokenizer), token_lengths(tokenizer)
        own = matched_recipe(recipe, reference_bytes, bytes_a_sequence(streams, lengths, recipe))
        counted = Counted(suite.batches(streams, own), lengths)
        model = suite.new_model(suite.SIZES[SIZE], recipe, vocab_size)
        for step, weights in suite.train(model, counted, (arguments.step,), own, name):
            card["models"][name] = {
                "vocab_size": vocab_size,
                "recipe": dataclasses.asdict(own),
                "bytes_seen": counted.n_bytes,
                "parameters": model.num_parameters(),
                "parameters_without_embedding": model.num_parameters() - model.gpt_neox.embed_in.weight.numel(),
                "sha256": suite.save_checkpoint(arguments.out / name / f"step{step}", model, weights),
            }
        write_beside(arguments.out / "vocabularies.json", (json.dumps(card, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
