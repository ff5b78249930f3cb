"""Draws the README's figures from what is in the repository: `python docs/draw_figures.py`, a few seconds, no data.

law.png: the pico suite on held-out chunks (llmcomp/pico/suite/ratios.csv) with the laws fitted to it. surfaces.png: the
75 published ratios with the laws refitted to them. holdout.png: what laws of the three smaller published sizes predict
of the two larger ones.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

import llmcomp
from llmcomp import pico, plot

FOLDER = Path(__file__).parent
DPI = 120


def write(panels: Any, name: str) -> None:
    """A PNG of 192 colours, enough for these figures and a third of the bytes."""
    path = FOLDER / name
    panels.flat[0].figure.savefig(path, dpi=DPI)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(192, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    cells = pd.read_csv(pico.suite_root() / "ratios.csv").assign(protocol="lossless", mapping="bytes")
    write(plot.law(llmcomp.fit_scaling_law(cells, resamples=0)), "law.png")
    laws = llmcomp.fit_scaling_law(llmcomp.published(), resamples=0)
    write(plot.surfaces(laws), "surfaces.png")
    write(plot.holdout(laws.holdout(by="params", keep=3)), "holdout.png")


if __name__ == "__main__":
    main()
