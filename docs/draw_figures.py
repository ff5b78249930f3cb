"""Draws the figures of README and site from what is in the repository: `python docs/draw_figures.py`, a minute.

law.png: the pico suite on held-out chunks (llmcomp/pico/suite/ratios.csv) with the laws fitted to it. surfaces.png: the
75 published ratios with the laws refitted to them. holdout.png: what laws of the three smaller published sizes predict
of the two larger ones. decoding.png, protocols.png: what the pages on ideas explain. ratios.png: the bundled models and
file compressors on the bundled text sample, measured here.
"""

import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from PIL import Image

import llmcomp
from llmcomp import pico, plot

FOLDER = Path(__file__).parent
DPI = 120
BLUE, GREY, RED, PALE = "#2a6f97", "#8a8f98", "#bc4b51", "#dfe6ea"
# Shares of a chunk's bytes that the published protocol scores, and of all bytes that have the bit which it drops:
# Pythia's tokenizer on enwik8, crops of ImageNet and LibriSpeech.
COVERED = {"text": 0.999, "image": 0.658, "speech": 0.517}


def write(panels: Any, name: str) -> None:
    """A PNG of 192 colours, enough for these figures and a third of the bytes."""
    path = FOLDER / name
    figure = panels if hasattr(panels, "savefig") else panels.flat[0].figure
    figure.savefig(path, dpi=DPI)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(192, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def draw_decoding() -> Any:
    """Encoder above, decoder below, which reads the token that it has just written; between them what may differ."""
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(0, 4.2))
    axes.axis("off")
    places = {"tokens": 1.6, "logits": 4.2, "intervals": 6.8, "payload": 9.3}
    arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 4, "shrinkB": 4}
    for y, name, how in ((3.4, "encoder", "one pass"), (1.3, "decoder", "a step for each token")):
        axes.text(0.0, y, name, weight="bold", fontsize=11, va="center", rotation=90)
        boxes = {}
        for text, x in places.items():
            box = {"boxstyle": "round,pad=0.5", "fc": PALE, "ec": BLUE}
            boxes[text] = axes.text(x, y, text, ha="center", va="center", bbox=box)
        backwards = ("payload", "intervals") if name == "decoder" else ("intervals", "payload")
        for left, right in (("tokens", "logits"), ("logits", "intervals"), backwards):
            side = 0.85 if places[left] < places[right] else -0.85
            axes.annotate("", (places[right] - side, y), (places[left] + side, y), arrowprops=arrow)
        axes.text(2.9, y + 0.28, how, ha="center", fontsize=9, color=GREY)
    back = {**arrow, "connectionstyle": "arc3,rad=-0.25"}
    axes.annotate("", (places["tokens"], 1.0), (places["intervals"], 1.0), arrowprops=back)
    axes.text(4.2, 0.1, "the token just decoded", ha="center", fontsize=9, color=GREY)
    between = {"ha": "center", "va": "center", "fontsize": 9}
    axes.text(4.2, 2.35, "cache, batch, threads,\nprocessor, library differ", color=RED, **between)
    axes.text(6.8, 2.35, "must be equal\nto the last bit", color=BLUE, **between)
    return figure


def draw_protocols() -> Any:
    """Eight bits high, 2,048 bytes wide: scored, not scored, dropped."""
    figure, panels = plt.subplots(1, 3, figsize=(8, 2.6), sharey=True, layout="constrained")
    for axes, (modality, share) in zip(panels, COVERED.items(), strict=True):
        axes.bar([0], [8], [2048], align="edge", bottom=10, color=BLUE)
        axes.bar([0], [7], [2048 * share], align="edge", color=BLUE)
        axes.bar([2048 * share], [7], [2048 * (1 - share)], align="edge", color=PALE)
        axes.bar([0], [1], [2048], align="edge", bottom=7, color=RED)
        axes.set(title=f"{modality}: {share:.0%} of the bytes", xlabel="byte of a chunk", xticks=(0, 1024, 2048))
        axes.set_yticks([4, 14], ["published", "lossless"])
        axes.tick_params(left=False)
        axes.spines[:].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (BLUE, PALE, RED)]
    figure.legend(
        handles, ["scored", "cut off", "top bit, dropped"], loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def draw_ratios() -> Any:
    models = [f"pico-{size}" for size in ("13k", "28k", "77k", "224k", "595k")]
    with tempfile.TemporaryDirectory() as out:
        rows = llmcomp.sweep(models, None, ["text"], out=out, baselines=True, n_chunks=32, progress=False)
    rows = rows[(rows["protocol"] == "lossless") & (rows["chunk"] >= 0) & ~rows["model"].str.startswith("random")]
    sums = rows.groupby("model")[["coded_bytes", "bytes_in"]].sum()
    ratios = (sums["coded_bytes"] / sums["bytes_in"]).sort_values(ascending=False)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.barh(ratios.index, ratios, color=[BLUE if name in models else GREY for name in ratios.index])
    for place, ratio in enumerate(ratios):
        axes.text(ratio + 0.005, place, f"{ratio:.3f}", va="center", fontsize=9)
    axes.set(xlabel="compressed size over original size", xlim=(0, ratios.max() + 0.07))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    write(draw_decoding(), "decoding.png")
    write(draw_protocols(), "protocols.png")
    write(draw_ratios(), "ratios.png")
    cells = pd.read_csv(pico.suite_root() / "ratios.csv").assign(protocol="lossless", mapping="bytes")
    write(plot.law(llmcomp.fit_scaling_law(cells, resamples=0)), "law.png")
    laws = llmcomp.fit_scaling_law(llmcomp.published(), resamples=0)
    write(plot.surfaces(laws), "surfaces.png")
    write(plot.holdout(laws.holdout(by="params", keep=3)), "holdout.png")


if __name__ == "__main__":
    main()
