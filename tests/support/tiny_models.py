"""Models small enough to check by hand: any object with logits() and session() is a model."""

from __future__ import annotations

import numpy as np

from llmcomp import coding

TRAINING_TEXT = (
    b"""The archive keeps every byte. The model guesses the next token, the coder pays for what it did not guess.
A window begins with the start token, and then come the tokens themselves, one by one. [[Link]] and &quot;text&quot;.
"""
    * 3
)


class TinyModel:
    """Logits from the token before (counts in `TRAINING_TEXT`, so that text shrinks) and from a hash of all tokens
    since the window began, so that a wrong window, context or lane gives other logits."""

    def __init__(self, context_length: int = 24, seed: int = 0, tokenizer=None, name: str = "tiny", **attributes):
        self.name = name
        self.context_length = context_length
        self.n_logits = 256 if tokenizer is None else tokenizer.vocab_size + 5
        if tokenizer is not None:
            self.tokenizer = tokenizer
        rng = np.random.default_rng(seed)
        known = (
            np.frombuffer(TRAINING_TEXT, np.uint8).astype(np.int64)
            if tokenizer is None
            else tokenizer.encode_bytes(TRAINING_TEXT)
        )
        counts = np.full((self.n_logits, self.n_logits), 0.01, np.float32)
        np.add.at(counts, (known[:-1], known[1:]), 1)
        self._by_token = np.log(counts).astype(np.float32)
        self._by_state = rng.normal(0, 0.5, (64, self.n_logits)).astype(np.float32)
        self.__dict__.update(attributes)

    def row(self, state: int, token: int) -> tuple[int, np.ndarray]:
        state = (state * 1103515245 + int(token) + 12345) % (1 << 31)
        return state, self._by_token[token] + self._by_state[state >> 5 & 63]

    def logits(self, tokens):
        tokens = np.asarray(tokens)
        assert tokens.shape[1] <= self.context_length
        out = np.empty((*tokens.shape, self.n_logits), np.float32)
        for b in range(len(tokens)):
            state = 0
            for t in range(tokens.shape[1]):
                state, out[b, t] = self.row(state, tokens[b, t])
        return out

    def session(self, n_streams: int) -> TinySession:
        return TinySession(self, n_streams)


class TinySession:
    def __init__(self, model: TinyModel, n_streams: int):
        self._model = model
        self._states = [0] * n_streams
        self._n_seen = 0

    def step(self, tokens):
        self._n_seen += 1
        assert self._n_seen <= self._model.context_length
        out = np.empty((len(self._states), self._model.n_logits), np.float32)
        for b, token in enumerate(tokens):
            self._states[b], out[b] = self._model.row(self._states[b], token)
        return out


def rows_by_hand(model, stream: np.ndarray, bos: int, context_length: int, overlap: int) -> np.ndarray:
    """Logits before each token, each from its own replay of what its window has read until then."""
    rows = []
    window_start, context_start = 0, 0
    for at in range(len(stream)):
        if at - context_start == context_length:
            window_start, context_start = at, at - overlap
        assert context_start <= window_start <= at
        state, row = model.row(0, bos)
        for token in stream[context_start:at]:
            state, row = model.row(state, token)
        rows.append(row)
    return np.array(rows)


class ConstantModel:
    """One distribution over bytes whatever came before, at next to no cost: what is left is the archive's own work."""

    name = "constant"
    context_length = 1 << 16

    def __init__(self, weights):
        self._row = np.log(np.asarray(weights, np.float32))
        rows = np.broadcast_to(self._row, (256, 256))
        self._intervals = np.stack(coding.intervals(rows, np.arange(256)))

    def logits(self, tokens):
        return np.broadcast_to(self._row, (*np.shape(tokens), 256))

    def intervals(self, tokens, targets, lengths=None, vocab_size=None):
        return tuple(self._intervals[:, targets])

    def session(self, n_streams: int):
        rows = np.broadcast_to(self._row, (n_streams, 256))
        return type("Session", (), {"step": lambda self, tokens: rows, "reset": lambda self: None})()


class HashModel:
    """Logits that are a hash of all tokens since the window began: for large vocabularies, and bad at everything."""

    name = "hash"

    def __init__(self, tokenizer, context_length: int = 64):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.n_logits = tokenizer.vocab_size
        self._multiples = np.arange(self.n_logits, dtype=np.int64) * 40503

    def row(self, state: int, token: int) -> tuple[int, np.ndarray]:
        state = (state * 1103515245 + int(token) + 12345) % (1 << 31)
        return state, ((self._multiples ^ state) % 1021).astype(np.float32) / 300

    logits = TinyModel.logits
    session = TinyModel.session


def starter(model: TinyModel):
    """A window of the model for the oracle, from `row` alone: neither sessions nor batches."""

    def start():
        state = 0

        def step(token):
            nonlocal state
            state, row = model.row(state, token)
            return row

        return step

    return start
