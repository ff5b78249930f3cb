"""Rows as `score` makes them, without a model."""

import pandas as pd


def make_rows(coded_bytes=(500, 700), protocol="lossless", chunk_bytes=(2048, 1024), **changes):
    """Two rows of one cell; a published one has bits but no payload."""
    n_rows = len(coded_bytes)
    ideal_bits = [8.0 * coded - 3 for coded in coded_bytes]
    side_bits = [8] * n_rows if protocol == "lossless" else [0] * n_rows
    bits = [8 * c + s for c, s in zip(coded_bytes, side_bits, strict=True)] if protocol == "lossless" else ideal_bits
    columns = {
        "model": "pico-13k", "params": 47_000, "step": 128, "dataset": "d", "modality": "text", "protocol": protocol,
        "mapping": "bytes", "chunk": list(range(n_rows)), "bytes_in": list(chunk_bytes),
        "bytes_scored": list(chunk_bytes), "tokens": [600] * n_rows, "ideal_bits": ideal_bits,
        "coded_bytes": list(coded_bytes) if protocol == "lossless" else pd.NA, "side_bits": side_bits,
        "ratio": [b / (8 * n) for b, n in zip(bits, chunk_bytes, strict=True)], "seconds": 0.25, "engine": "exact",
        "backend": "serial", "device": "cpu", "dtype": "float16", "weights_sha256": "ab", "version": "0.1",
    }  # fmt: skip
    return pd.DataFrame(columns | changes)
