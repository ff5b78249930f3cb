"""The golden file decodes, encodes and gives its intervals with every backend, forever."""

import golden_coding as golden
import numpy as np
import pytest

import llmcomp

GOLDENS = golden.read()


def logits_of(case):
    bits = golden.logits_bits(case)
    if case.dtype == golden.BFLOAT16:
        torch = pytest.importorskip("torch")
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return bits.view(np.float32 if case.dtype == golden.FLOAT32 else np.float16)


def test_generator_makes_the_logits_that_were_meant():
    assert len(GOLDENS) == 205
    for entry in GOLDENS:
        assert golden.hash_of(golden.logits_bits(entry.case)) == entry.logits_hash, entry.case
        assert (golden.tokens(entry.case) == entry.rows["token"]).all(), entry.case


@pytest.mark.parametrize("backend", llmcomp.backends())
@pytest.mark.parametrize("dtype", [golden.FLOAT32, golden.FLOAT16, golden.BFLOAT16])
def test_golden_intervals_and_payloads(backend, dtype):
    for entry in GOLDENS:
        if entry.case.dtype != dtype:
            continue
        logits = logits_of(entry.case)
        tokens = entry.rows["token"].astype(np.int64)
        with llmcomp.use_backend(backend):
            found = llmcomp.intervals(logits, tokens)
            for name, numbers in zip(("start", "freq", "total"), found, strict=True):
                assert (numbers == entry.rows[name]).all(), (entry.case, name)
            assert llmcomp.encode(logits, tokens) == entry.payload, entry.case
            assert (llmcomp.decode(entry.payload, logits) == tokens).all(), entry.case
