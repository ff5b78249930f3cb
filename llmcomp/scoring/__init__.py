"""Rows of chunks: score, the published protocol, baselines, positions. Fits and figures are in law."""
