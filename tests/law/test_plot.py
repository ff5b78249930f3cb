"""Figures: what they show of planted tables, and that nothing in them is cut off, overlapping or left behind."""

import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from llmcomp import plot, results
from llmcomp.errors import Error
from llmcomp.law import style
from llmcomp.law.figures import plot_all
from llmcomp.law.fit import fit_scaling_law

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("error")

SIZES, STEPS, N_CHUNKS = [47_000, 137_000, 730_000], [128, 512, 2048], 20
CHUNK_BYTES = 2048


def rows_of(dataset, modality, level, *, protocol="lossless", mapping="bytes", scored=CHUNK_BYTES, side_bits=0):
    """Rows of 3 sizes x 3 steps whose ratio follows a law, with the same spread over chunks everywhere."""
    spread = np.random.default_rng(0).normal(0, 0.03, N_CHUNKS)
    frames = []
    for params in SIZES:
        for step in STEPS:
            ratio = level + 4 * params**-0.35 + 1.1 * step**-0.39 + spread
            coded = np.round(ratio * CHUNK_BYTES).astype(int) - side_bits // 8
            columns = {
                "model": f"pico-{params}", "params": params, "step": step, "dataset": dataset, "modality": modality,
                "protocol": protocol, "mapping": mapping, "chunk": np.arange(N_CHUNKS), "bytes_in": CHUNK_BYTES,
                "bytes_scored": scored, "tokens": 600, "ideal_bits": 8.0 * coded,
                "coded_bytes": coded if protocol == "lossless" else pd.NA, "side_bits": side_bits,
                "ratio": (8 * coded + side_bits) / (8 * CHUNK_BYTES), "seconds": 0.1, "engine": "exact",
                "backend": "serial", "device": "cpu", "dtype": "float16", "weights_sha256": "", "version": "0",
            }  # fmt: skip
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def baseline_of(rows, name, ratio):
    coded = round(ratio * CHUNK_BYTES)
    return rows.iloc[:N_CHUNKS].assign(
        model=name, params=pd.NA, step=pd.NA, mapping="", tokens=pd.NA, ideal_bits=float("nan"), coded_bytes=coded,
        side_bits=0, ratio=coded / CHUNK_BYTES,
    )  # fmt: skip


@pytest.fixture(scope="module")
def table():
    text, speech = rows_of("enwik8", "text", 0.1), rows_of("libri", "speech", 0.4)
    lines = [baseline_of(text, name, ratio) for name, ratio in (("gzip", 0.49), ("xz", 0.5), ("zstd", 0.495))]
    return pd.concat([speech, text, *lines], ignore_index=True)


@pytest.fixture(scope="module")
def laws(table):
    return fit_scaling_law(table, resamples=0)


def nothing_cut_off(figure):
    """All panels with their labels, legends and texts lie inside the figure, and no two tick labels touch."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    for ax in figure.axes:
        if isinstance(ax, plot.Axes3D):
            continue
        box = ax.get_tightbbox(renderer)
        assert box.x0 >= -1, ax.get_title()
        assert box.y0 >= -1, ax.get_title()
        assert box.x1 <= width + 1, ax.get_title()
        assert box.y1 <= height + 1, ax.get_title()
        low, high = ax.get_xlim()
        ticks = [tick.label1 for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [label.get_window_extent(renderer) for label in ticks if label.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]), ax.get_title()
    return True


@pytest.mark.parametrize("draw", [plot.training_dynamics, plot.baselines, plot.chunk_distribution, plot.adjusted_ratio])
def test_figures_of_rows_have_one_panel_a_data_set(table, draw):
    axes = draw(table)
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["text: enwik8", "speech: libri"]
    assert all("lossless protocol" in ax.get_title() for ax in axes)
    assert all(ax.get_xlabel() for ax in axes)
    assert axes[0].get_ylabel()
    assert nothing_cut_off(axes[0].figure)


def test_training_dynamics_shows_the_cells(table):
    ax = plot.training_dynamics(table)[0]
    cells = results.cells(table)
    expected = cells[(cells["dataset"] == "enwik8") & (cells["params"] == SIZES[0])].sort_values("step")
    line = ax.get_lines()[0]
    assert line.get_xdata() == pytest.approx(expected["step"].to_numpy(float))
    assert line.get_ydata() == pytest.approx(expected["ratio"].to_numpy())


def test_law_shows_cells_curves_and_band(laws):
    axes = laws.plot()
    assert axes.shape == (2, 2)
    upper = axes[0, 0]
    law = laws["text"]
    curves = [line for line in upper.get_lines() if len(line.get_xdata()) > 3]
    assert len(curves) == len(upper.collections) == len(STEPS)
    assert curves[0].get_ydata() == pytest.approx(law.predict(curves[0].get_xdata(), STEPS[0]))
    assert nothing_cut_off(upper.figure)
    assert axes[0, 0].get_legend() is None
    assert [text.get_text() for text in axes[0, 1].get_legend().get_texts()] == ["128", "512", "2,048"]


def test_laws_are_drawn_text_first(laws):
    assert [law.name for law in laws.values()] == ["enwik8", "libri"]
    backwards = dict(reversed(list(laws.items())))
    titles = [ax.get_title().partition("\n")[0] for ax in plot.law(backwards)[0]]
    assert titles == ["text: enwik8", "speech: libri"]


def test_one_law_plots_on_given_axes(laws):
    figure = Figure(layout="constrained")
    given = figure.subplots(2, 1)
    drawn = laws["text"].plot(given)
    assert drawn[0, 0] is given[0]
    assert drawn[1, 0] is given[1]
    with pytest.raises(Error, match="expected 2 Axes, found 3"):
        laws["text"].plot(Figure().subplots(3, 1))
    with pytest.raises(Error, match="expected a scaling law"):
        plot.surfaces(pd.DataFrame())


def test_residuals_and_surfaces(laws):
    ax = plot.residuals(laws["text"])
    shown = np.concatenate([line.get_ydata() for line in ax.get_lines()[1:]])
    assert np.sort(shown) == pytest.approx(np.sort(laws["text"].residuals))
    assert nothing_cut_off(ax.figure)
    axes = plot.surfaces(laws)
    assert [ax.name for ax in axes] == ["3d", "3d"]
    assert nothing_cut_off(axes[0].figure)


def test_baselines_are_named_once_and_apart(table):
    ax = plot.baselines(table)[0]
    labels = [text for text in ax.texts if text.get_text()]
    assert [text.get_text() for text in labels] == ["gzip 0.490", "zstd 0.495", "xz 0.500"]
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    # nothing of text's baselines in the speech panel
    assert not plot.baselines(table)[1].texts


def test_of_the_baselines_of_one_stream_only_the_best_is_drawn(table):
    gzip, xz = (table[table["model"] == name].iloc[:1] for name in ("gzip", "xz"))
    streams = [
        one.assign(chunk=results.STREAM_CHUNK, coded_bytes=coded, ratio=coded / CHUNK_BYTES)
        for one, coded in ((gzip, 700), (xz, 600))
    ]
    ax = plot.baselines(pd.concat([table, *streams], ignore_index=True))[0]
    names = [text.get_text() for text in ax.texts]
    assert names == ["xz (stream) 0.293", "gzip 0.490", "zstd 0.495", "xz 0.500"]


def test_random_baselines_are_drawn_where_there_are_no_others(table):
    text, speech = (table[table["dataset"] == name] for name in ("enwik8", "libri"))
    random = [baseline_of(part, "random-weights", 1.5) for part in (text, speech)]
    panels = plot.baselines(pd.concat([table, *random], ignore_index=True))
    assert [[text.get_text() for text in ax.texts] for ax in panels] == [
        ["gzip 0.490", "zstd 0.495", "xz 0.500"],
        ["random-weights 1.500"],
    ]
    assert panels[0].get_ylim()[1] < 1


def test_spread_moves_as_little_as_needed():
    assert style.spread([1.0, 5.0], 1.0) == [1.0, 5.0]
    assert style.spread([1.0, 1.0], 1.0) == [0.5, 1.5]
    moved = style.spread([0.0, 0.1, 0.2, 5.0, 5.9], 1.0)
    assert np.diff(moved).min() >= 1.0 - 1e-12
    assert np.mean(moved[:3]) == pytest.approx(0.1)
    assert np.mean(moved[3:]) == pytest.approx(5.45)


def test_adjusted_ratio_starts_to_pay_where_it_should(table):
    ax = plot.adjusted_ratio(table, bytes_per_param=2.0)[0]
    curve = ax.get_lines()[0]
    cells = results.cells(table)
    last = cells[(cells["dataset"] == "enwik8") & (cells["params"] == SIZES[0]) & (cells["step"] == STEPS[-1])]
    # (compressed + model) / original = 1 where data = model / (1 - ratio)
    pays = 2.0 * SIZES[0] / (1 - last["ratio"].iloc[0])
    assert np.interp(pays, curve.get_xdata(), curve.get_ydata()) == pytest.approx(1.0, rel=0.01)


def test_break_even_by_hand(table):
    found = plot.break_even(table, bytes_per_param=2.0).set_index(["dataset", "params"])
    assert found.index.tolist() == [(name, params) for name in ("enwik8", "libri") for params in SIZES]
    assert (found["step"] == STEPS[-1]).all()
    one = found.loc[("enwik8", SIZES[1])]
    gzip = round(0.49 * CHUNK_BYTES) / CHUNK_BYTES
    assert (one["baseline"], one["baseline_ratio"]) == ("gzip", pytest.approx(gzip))
    # data and model at that many bytes: as long as the original, and as the baseline's output
    assert one["ratio"] * one["saves_from"] + 2.0 * SIZES[1] == pytest.approx(one["saves_from"])
    assert one["ratio"] * one["beats_from"] + 2.0 * SIZES[1] == pytest.approx(gzip * one["beats_from"])
    # no baseline, and one that no model beats; the published random numbers are no compressor
    assert found.loc["libri", "baseline"].tolist() == [""] * 3
    assert found.loc["libri", "beats_from"].isna().all()
    better = pd.concat([table, baseline_of(table[table["dataset"] == "libri"], "flac", 0.2)], ignore_index=True)
    assert np.isinf(plot.break_even(better).set_index("dataset").loc["libri", "beats_from"]).all()
    random = pd.concat([table, baseline_of(table[table["dataset"] == "libri"], "random", 0.9)], ignore_index=True)
    assert plot.break_even(random).set_index("dataset").loc["libri", "beats_from"].isna().all()


def test_adjusted_ratio_dots_where_a_model_beats_the_baseline(table):
    panels = plot.adjusted_ratio(table)
    dots = [line for line in panels[0].get_lines() if len(line.get_xdata()) == 1 and line.get_marker() != "None"]
    expected = plot.break_even(table).query("dataset == 'enwik8'")
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx(expected["beats_from"].tolist())
    assert [dot.get_ydata()[0] for dot in dots] == pytest.approx(expected["baseline_ratio"].tolist())
    assert not [line for line in panels[1].get_lines() if len(line.get_xdata()) == 1]


def vocabulary_table(table):
    last = table[(table["step"] == STEPS[-1]) | table["params"].isna()]
    return last, {f"pico-{SIZES[0]}": 2048, f"pico-{SIZES[1]}": 256}


def test_ratio_against_vocabulary_shows_the_named_models(table):
    last, vocab_sizes = vocabulary_table(table)
    panels = plot.ratio_against_vocabulary(last, vocab_sizes)
    cells = results.cells(last)
    for ax, dataset in zip(panels, ("enwik8", "libri"), strict=True):
        line = ax.get_lines()[0]
        part = cells[cells["dataset"] == dataset].set_index("model")
        assert line.get_xdata().tolist() == [256, 2048]
        assert line.get_ydata().tolist() == [part.loc[f"pico-{SIZES[i]}", "ratio"] for i in (1, 0)]
        assert ax.get_xscale() == "log"
    assert [text.get_text() for text in panels[0].texts] == ["gzip 0.490"]
    nothing_cut_off(panels[0].figure)


def test_ratio_against_vocabulary_takes_one_model_each(table):
    last, vocab_sizes = vocabulary_table(table)
    with pytest.raises(Error, match="a vocabulary appears twice"):
        plot.ratio_against_vocabulary(last, dict.fromkeys(vocab_sizes, 256))
    with pytest.raises(Error, match="a vocabulary appears twice"):
        plot.ratio_against_vocabulary(table, vocab_sizes)
    with pytest.raises(Error, match="nothing to draw"):
        plot.ratio_against_vocabulary(last, {"another": 256})


def waterfall_table(covered=1024, ascii_too=True):
    """Published .3 with half the bytes covered; lossless ascii .8, bytes .7."""
    one = rows_of("photos", "image", 0.0).iloc[:4]
    coded = {"published": 0.3, "ascii": 0.675, "bytes": 0.7}
    parts = []
    for name, ratio in coded.items():
        if name == "ascii" and not ascii_too:
            continue
        lossless, side_bits = name != "published", 2048 if name == "ascii" else 0
        bits = round(ratio * CHUNK_BYTES) * 8
        parts.append(one.assign(
            protocol="lossless" if lossless else "published", mapping="bytes" if name == "bytes" else "ascii",
            ideal_bits=float(bits), coded_bytes=bits // 8 if lossless else pd.NA, side_bits=side_bits,
            bytes_scored=CHUNK_BYTES if lossless else covered, ratio=(bits + side_bits) / (8 * CHUNK_BYTES),
        ))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def test_waterfall_parts_by_hand():
    parts = plot.waterfall_parts(waterfall_table()).set_index("part")["ratio"]
    expected = {
        "published": 0.3,
        "tokens cut": 0.3,
        "dropped bit": 0.125,
        "first token, context": 0.075,
        "mapping bytes": -0.1,
        "lossless (bytes)": 0.7,
    }
    assert parts.to_dict() == pytest.approx(expected, abs=1e-3)
    without = plot.waterfall_parts(waterfall_table(ascii_too=False))
    assert list(without["part"])[3:] == ["first token, mapping", "lossless (bytes)"]
    assert without["ratio"].iloc[:-1].sum() == pytest.approx(0.7, abs=1e-3)


def test_waterfall_bars_meet():
    ax = plot.waterfall(waterfall_table())
    bars = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert bars[-1] == pytest.approx((0.0, 0.7), abs=1e-3)
    for before, after in pairwise(bars[:-1]):
        assert any(a == pytest.approx(b, abs=1e-9) for a in before for b in after)
    assert nothing_cut_off(ax.figure)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (waterfall_table()[lambda t: t["protocol"] == "lossless"], "with its published and its lossless cells"),
        (waterfall_table(covered=0), "how many bytes"),
        (results.published()[:1], "published and its lossless"),
    ],
)
def test_waterfall_needs_both_protocols(table, message):
    with pytest.raises(Error, match=message):
        plot.waterfall(table)


def test_samples_show_the_bytes():
    image = bytes(range(256)) * 8
    speech = np.arange(-512, 512, dtype="<i2").tobytes()
    axes = plot.samples({"text": "grüße $x$ ".encode() * 100, "image": image, "speech": speech})
    assert axes[0].texts[0].get_text().startswith("grüße \\$x\\$ grüße")
    assert axes[1].get_images()[0].get_array().tobytes() == image
    assert (axes[2].get_lines()[0].get_ydata() == np.arange(-512, 512)).all()
    assert axes[2].get_lines()[0].get_xdata()[-1] == pytest.approx(1023 / 16)
    assert nothing_cut_off(axes[0].figure)


def test_ratio_by_position_means_over_chunks():
    bits = np.tile(np.arange(10.0, 0.0, -1.0), (5, 1))
    bits[:, 7:] = np.nan
    ax = plot.ratio_by_position({"one": bits, "two": bits / 2})
    line = ax.get_lines()[0]
    assert line.get_xdata() == pytest.approx(np.arange(1, 8))
    assert line.get_ydata() == pytest.approx(np.arange(10.0, 3.0, -1.0))
    assert nothing_cut_off(ax.figure)
    with pytest.raises(Error, match=r"found shape \(3,\)"):
        plot.ratio_by_position(np.ones(3))


def test_plot_all_writes_the_set(table, tmp_path):
    paths = plot_all(table[table["dataset"] == "libri"], tmp_path / "figures")
    names = {"training-dynamics", "model-size-counted", "chunks", "surfaces", "law", "residuals"}  # no baseline in it
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {path.name for path in paths}
    for path in paths:
        start = b"\x89PNG" if path.suffix == ".png" else b"%PDF"
        assert path.read_bytes().startswith(start)


def test_plot_all_of_both_protocols(tmp_path):
    lossless, ascii_too = (rows_of("d", "image", 0.2, mapping=mapping) for mapping in ("bytes", "ascii"))
    published = rows_of("d", "image", 0.1, protocol="published", mapping="ascii", scored=1024)
    both = pd.concat([lossless, ascii_too, published], ignore_index=True)
    paths = plot_all(both[both["step"] == STEPS[-1]], tmp_path, formats=("png",))
    names = {path.stem for path in paths}
    kinds = ("lossless-bytes", "lossless-ascii", "published-ascii")
    figures = ("training-dynamics", "model-size-counted", "chunks")
    assert names == {f"{figure}-{kind}" for figure in figures for kind in kinds} | {"published-to-lossless"}


def test_plot_all_without_enough_for_a_law(table, tmp_path):
    paths = plot_all(table[table["step"] == 128], tmp_path, formats=("png",))
    assert {path.stem for path in paths} == {"training-dynamics", "model-size-counted", "chunks"}
    with pytest.raises(Error, match="nothing to draw"):
        plot_all(table[table["params"].isna()], tmp_path)


def test_plot_all_names_what_it_cannot_write(table, tmp_path):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(Error, match=r"cannot write .*a_file"):
        plot_all(table[table["step"] == 128], tmp_path / "a_file" / "figures")


def test_baselines_are_not_drawn_without_baselines(table):
    with pytest.raises(Error, match="no baseline in the table"):
        plot.baselines(table[table["dataset"] == "libri"])


def test_the_bands_of_a_law_say_what_they_are(laws):
    for row in plot.law(laws):
        title = row[-1].get_legend().get_title().get_text()
        assert "95 % profile" in title.replace("\n", " ")


def test_boxes_of_chunks_say_what_they_are(table):
    panels = plot.chunk_distribution(table)
    said = [text.get_text().replace("\n", " ") for text in panels[-1].get_legend().get_texts()]
    assert said == ["box: quartiles", "line: median, whiskers: 5 to 95 %", "mean"]
    assert nothing_cut_off(panels[0].figure)


def test_whiskers_of_a_few_chunks_reach_the_percentiles(table):
    few = table[table["chunk"].lt(5) & table["params"].notna()]
    last = few[few["step"] == few["step"].max()]
    one = last[(last["modality"] == "text") & (last["params"] == last["params"].max())]["ratio"]
    ax = plot.chunk_distribution(few)[0]
    ends = {float(y) for line in ax.lines for y in line.get_ydata()}
    assert len(one) == 5
    for percent in (5, 95):
        assert any(np.isclose(np.percentile(one, percent), end) for end in ends)


def test_error_bars_and_markers_say_what_they_are(table):
    assert "standard error" in plot.baselines(table)[0].get_ylabel()
    assert "below the baseline" in plot.adjusted_ratio(table)[0].get_xlabel()


def test_the_legend_of_counted_sizes_leaves_the_line_at_one_free(table):
    panels = plot.adjusted_ratio(table)
    assert [ax.get_legend() is not None for ax in panels] == [False] * (len(panels) - 1) + [True]
    panels[0].figure.draw_without_rendering()
    lowest = panels[-1].get_legend().get_window_extent().y0
    assert lowest > panels[-1].transData.transform((1.0, 1.0))[1]


def test_labels_of_surfaces_do_not_touch():
    panels = plot.surfaces(fit_scaling_law(results.published(), resamples=0))
    panels[0].figure.draw_without_rendering()
    for ax in panels:
        ticks = [label for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels() if label.get_text()]
        boxes = [label.get_window_extent() for label in [*ticks, ax.xaxis.label, ax.yaxis.label]]
        for i, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_held_out_cells_lie_over_what_was_predicted_of_them():
    laws = fit_scaling_law(results.published(), resamples=0)
    found = laws.holdout(keep=3)
    panels = plot.holdout(found)
    assert [ax.get_title().partition(":")[0] for ax in panels] == ["text", "image", "speech"]
    assert nothing_cut_off(panels[0].figure)
    seen, *rest = panels[0].get_lines()
    assert len(seen.get_xdata()) == 15
    points = [line for line in rest if line.get_marker() not in ("None", "", None)]
    table = found.table[found.table["law"] == "enwik8"]
    assert [list(line.get_ydata()) for line in points] == [
        list(table[table["params"] == size]["ratio"]) for size in (1e9, 1.4e9)
    ]
    assert "95 % predictive" in panels[-1].get_legend().get_title().get_text()
    steps = laws["text"].holdout("step").plot()
    assert steps[0].get_xlabel() == "parameters P (total)"


def test_a_law_of_one_axis_is_drawn(tmp_path):
    flops = np.geomspace(1e17, 1e22, 10)
    law = fit_scaling_law(pd.DataFrame({"flops": flops, "ratio": 0.1 + 3e4 * flops**-0.3}), x="flops", resamples=0)
    panels = law.plot()
    assert panels.shape == (1, 1)
    assert panels[0, 0].get_xlabel() == "training FLOPs C"
    assert plot.residuals(law).get_xlabel() == "training FLOPs C"
    assert len(law.holdout().plot()) == 1
    with pytest.raises(Error, match="a surface needs a law of two axes"):
        plot.surfaces(law)


def test_settings_and_open_figures_are_left_alone(table, tmp_path):
    from matplotlib import pyplot

    pyplot.close("all")
    before = dict(matplotlib.rcParams)
    plot_all(table[table["step"] == 128], tmp_path, formats=("png",))
    assert pyplot.get_fignums() == []
    ax = Figure().subplots()
    assert plot.ratio_by_position(np.ones((2, 5)), ax) is ax
    assert dict(matplotlib.rcParams) == before


def test_series_stay_in_order_in_grey():
    weights = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
    grey = [sum(w * c for w, c in zip(weights, colour[:3], strict=True)) for colour in style.colours(6)]
    assert np.diff(grey).min() > 0.08


def test_the_module_needs_no_torch():
    code = "import sys, llmcomp.law.figures; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")
