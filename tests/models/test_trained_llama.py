"""A small Llama that was really trained: what its archive takes is what transformers says that the text is worth.

The reference shares nothing with the package but the tokens: windows are counted here, by the drawing in
codec/windows.py, and log-likelihoods are transformers' own.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from real_data import FAMILIES_DATA

import llmcomp
from llmcomp.codec.container import ArchiveReader
from llmcomp.codec.segments import SegmentCodec
from llmcomp.data.mappings import get_mapping

STORIES = FAMILIES_DATA / "models" / "stories260K-hf"
ALICE = FAMILIES_DATA / "texts" / "alice29.txt"
# What an archive may add to a stream: FORMAT.md, "Range coder".
_END_BITS = 16

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the trained Llama is not here")


@pytest.fixture(scope="module")
def llama() -> Any:
    return llmcomp.load_model(STORIES)


@pytest.fixture(scope="module", params=["float32", "float64"])
def reference(request: pytest.FixtureRequest) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=getattr(torch, request.param)).eval()


def story() -> bytes:
    """The stories that transformers let the model write, to the end of a sentence, one after the other and again."""
    runs = json.loads((STORIES / "expected.json").read_text("utf-8"))["runs"]
    return "\n".join(run["text"][: run["text"].rindex(".") + 1] for run in (*runs, *runs)).encode()


def reference_bits(module: Any, tokens: np.ndarray, overlap: int, has_floor: bool = False) -> float:
    """The first window codes a context of tokens behind the start token; each that follows begins with the start token
    and the `overlap` tokens before its own, which it does not pay for again.

    `has_floor`: of the likelihood as FORMAT.md makes integers of it, which takes no token for all but impossible.
    """
    import torch

    context_length, start_token = module.config.max_position_embeddings, module.config.bos_token_id
    bits, at = 0.0, 0
    with torch.inference_mode():
        while at < len(tokens):
            first = max(0, at - overlap)
            own = tokens[first : first + context_length]
            inputs = torch.from_numpy(np.concatenate([[start_token], own[:-1]]).astype(np.int64))
            logits = module(inputs[None]).logits[0].double().numpy()
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            if has_floor:
                weights = 1 + np.floor(2.0**29 * weights)
            likelihood = weights[np.arange(len(own)), own] / weights.sum(-1)
            bits -= np.log2(likelihood[at - first :]).sum()
            at = first + len(own)
    return float(bits)


def stream_bits(model: Any, content: bytes, overlap: int) -> float:
    """Bits of the one coded segment of `content` in an archive without mixing and stock codecs, its side byte left out.

    The archive is decoded, too.
    """
    archive = llmcomp.compress(
        content, model, mix=False, stock=False, overlap=overlap, segment_bytes=max(len(content), 4096)
    )
    assert llmcomp.decompress(archive, model) == content
    (segment,) = ArchiveReader(io.BytesIO(archive)).segments()
    assert not segment.stored
    return 8.0 * (len(segment.payload) - 1)  # one side byte: whether a space stands before the text


def test_an_archive_takes_the_bits_that_transformers_says(llama: Any, reference: Any) -> None:
    content = story()
    tokens = get_mapping("bytes").encode(content, llama.tokenizer).tokens
    expected = reference_bits(reference, tokens, 128)
    (coded,) = SegmentCodec(llama, overlap=128).encode([content])
    assert coded.n_tokens == len(tokens) > llama.context_length  # more windows than one
    assert abs(coded.ideal_bits - expected) < 1e-4 * len(tokens)
    found = stream_bits(llama, content, 128)
    assert -1e-4 * len(tokens) < found - expected < _END_BITS + 1e-4 * len(tokens)
    assert expected < len(content)  # a bit a byte: it can read this


def test_what_the_model_holds_for_impossible_costs_the_floor(llama: Any, reference: Any) -> None:
    """Without overlap a window begins in the middle of a story, where a token is all but impossible."""
    content = story()
    tokens = get_mapping("bytes").encode(content, llama.tokenizer).tokens
    bare, expected = (reference_bits(reference, tokens, 0, has_floor) for has_floor in (False, True))
    (coded,) = SegmentCodec(llama, overlap=0).encode([content])
    assert abs(coded.ideal_bits - expected) < 1e-4 * len(tokens)
    assert expected < bare - 0.1


def test_a_score_is_the_likelihood(llama: Any, reference: Any) -> None:
    content = story()
    rows = llmcomp.score([content], llama, progress=False)
    tokens = get_mapping("bytes").encode(content, llama.tokenizer).tokens
    expected = reference_bits(reference, tokens, llama.context_length // 4)
    assert rows["tokens"].item() == len(tokens)
    assert abs(rows["ideal_bits"].item() - expected) < 1e-4 * len(tokens)


@pytest.mark.slow
def test_a_long_text_in_one_stream_leaves_nothing_to_its_end(llama: Any) -> None:
    """152 kB of Alice, carriage returns included, which no story had: there the floor of the integers saves much, and
    the few bits at the end of the stream are less than 1e-4 a token."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float64).eval()
    content = ALICE.read_bytes()
    tokens = get_mapping("bytes").encode(content, llama.tokenizer).tokens
    expected, bare = (reference_bits(reference, tokens, 0, has_floor) for has_floor in (True, False))
    assert abs(stream_bits(llama, content, 0) - expected) < 2e-4 * len(tokens)
    assert expected < bare - 0.1 * len(tokens)
