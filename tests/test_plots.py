"""Figures show the numbers they are given, and stand what real runs bring: few images, figures without a value."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from stgan_utils import plots, plots_gan
from stgan_utils.anatomy import Excitation
from stgan_utils.lesions import CLASSES, LESIONS

UNKNOWN = {"value": None, "low": None, "high": None}


def test_class_counts_has_a_bar_of_the_class_colour_for_each_class_and_split():
    labels = ["MEL"] * 5 + ["NV"] * 30
    table = pd.DataFrame({"label": labels, "split": ["train"] * 33 + ["test"] * 2})
    ax = plots.class_counts(table).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [[0, 0, 0, 0, 5, 28, 0], [0, 0, 0, 0, 0, 2, 0]]
    red, green, blue, _ = ax.containers[0][CLASSES.index("MEL")].get_facecolor()
    assert [round(255 * part) for part in (red, green, blue)] == list(bytes.fromhex(LESIONS["MEL"].colour[1:]))
    assert "n = 35" in ax.get_title()


def test_confusion_shows_counts_and_colours_by_row():
    matrix = np.zeros((7, 7), int)
    matrix[0, 0], matrix[0, 1], matrix[5, 5] = 1, 3, 1200
    ax = plots.confusion(matrix, CLASSES).axes[0]
    shown = [text.get_text() for text in ax.texts]
    assert (shown[0], shown[1], shown[5 * 7 + 5], shown[-1]) == ("1", "3", "1,200", "0")
    share = ax.collections[0].get_array().reshape(7, 7)
    assert (share[0, 0], share[0, 1], share[5, 5], share[3].sum()) == (0.25, 0.75, 1, 0)


def test_figures_without_a_value_are_left_out_and_the_others_keep_their_place(tmp_path):
    known = {"value": 0.5, "low": 0.25, "high": 0.75}
    metrics = {name: known for name in plots.METRICS} | {"macro_auc": UNKNOWN}
    fig = plots.metric_intervals({"real": metrics, "both": metrics})
    fig.savefig(tmp_path / "a.png")
    assert np.isnan(fig.axes[0].lines[0].get_xdata()).tolist() == [name == "macro_auc" for name in plots.METRICS]
    per_class = {code: {"images": 3, "recall": UNKNOWN if code == "DF" else known} for code in CLASSES}
    plots.recall_per_class({"real": per_class}).savefig(tmp_path / "b.png")


def test_best_kid_is_the_lowest():
    history = pd.DataFrame({"iteration": [0, 50, 100], "kid": [0.3, 0.1, 0.2]})
    history = history.assign(kid_low=history["kid"] - 0.01, kid_high=history["kid"] + 0.01)
    legend = plots.kid_history(history).axes[0].get_legend()
    assert "best: 0.1 at iteration 50" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_few_images_make_a_figure_too(count, tmp_path):
    images = np.zeros((count, 8, 8, 3), np.uint8)
    plots.image_grid(images, title="x").savefig(tmp_path / "grid.png")
    plots.real_above_generated(images, images[:1], "x").savefig(tmp_path / "above.png")
    fig = plots.pairs(images, images, ["a"] * count)
    assert len(fig.axes[0].images) == 2 * count


def test_subgroups_with_few_images_are_pale_and_every_group_has_its_count(tmp_path):
    groups = pd.DataFrame({"column": ["age", "age", "sex"], "group": ["0–29", "75+", "female"], "images": [3, 40, 43]})
    groups = groups.assign(classes=[1, 2, 2])
    for name in ("accuracy", "balanced_accuracy"):
        groups = groups.assign(**{name: [1.0, 0.5, None], f"{name}_low": [1.0, 0.4, None], f"{name}_high": 1.0})
    fig = plots.subgroups(groups)
    fig.savefig(tmp_path / "a.png")
    ax = fig.axes[0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    ends = ["(n = 3, 1 class)", "(n = 40, 2 classes)", "(n = 43, 2 classes)"]
    assert labels == [
        f"{name}  {end}" for name, end in zip(["age: 0–29", "age: 75+", "sex: female"], ends, strict=True)
    ]
    shown = {True: set(), False: set()}
    for line in ax.lines:
        shown[line.get_alpha() < 1] |= {x for x in line.get_xdata() if not np.isnan(x)}
    assert shown == {True: {1.0}, False: {0.5}}


def test_rows_of_images_have_their_names_and_real_ones_are_spread_over_all():
    real = np.zeros((50, 4, 4, 3), np.uint8) + np.arange(50, dtype=np.uint8)[:, None, None, None]
    fig = plots.real_above_generated(real, real[:9], "DF")
    (ax,) = fig.axes
    rows = {(x, y): image.get_array().max() for image in ax.images for x, _, _, y in [np.floor(image.get_extent())]}
    assert [rows[x, 0] for x in range(1, 9)] == [0, 7, 14, 21, 28, 35, 42, 49]
    assert [rows[x, 1] for x in range(1, 9)] == list(range(8))
    names = {text.get_text(): np.floor(text.get_position()[1]) for text in ax.texts if text.get_text()}
    assert names == {"real": 0, "generated": 1}
    assert fig.get_suptitle() == "DF, n = 50 real and 9 generated"


def test_excitation_shows_the_channel_whose_gate_varies_most_and_the_images_at_its_ends(tmp_path):
    gates = np.array([[0.5, 0.5, 0.6], [0.5, 0.75, 0.7], [0.6, 0.25, 0.6]], np.float32)
    before = np.ones((3, 3, 64, 64), np.float32) * np.array([1, -2, 3], np.float32)[:, None, None]
    pictures = np.zeros((3, 64, 64, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None]
    taken = Excitation(pictures, np.ones((3, 5, 4, 4), np.float32), gates, before, before * gates[:, :, None, None])
    fig = plots_gan.excitation(taken, "x")
    fig.savefig(tmp_path / "a.png")
    assert "channel 1" in fig.axes[3].get_title()
    assert [fig.axes[i].images[0].get_array().max() for i in (0, 5)] == [2, 1]
    assert [fig.axes[i].get_xlabel() for i in (4, 9)] == ["× 0.25", "× 0.75"]
    assert [fig.axes[i].images[0].get_array().mean() for i in (3, 4, 8, 9)] == [-2, -0.5, -2, -1.5]


def test_ablation_has_a_line_for_each_arm_in_each_panel():
    arms = ("both", "nothing frozen")
    rows = [(arm, i, i, i - 1, i + 1, 10 * i, n) for n, arm in enumerate(arms) for i in range(3)]
    curves = pd.DataFrame(rows, columns=["arm", "iteration", "kid", "kid_low", "kid_high", "barlow", "margin"])
    fig = plots_gan.ablation(curves, "x")
    assert [text.get_text() for text in fig.legends[0].get_texts()] == list(arms)
    drawn = [[list(line.get_ydata()) for line in ax.lines] for ax in fig.axes]
    assert drawn == [[[0, 1, 2]] * 2, [[0, 10, 20]] * 2, [[0, 0, 0], [1, 1, 1]]]


@pytest.mark.parametrize("epochs", [1, 500])
def test_a_history_is_seen_however_short_it_is(epochs):
    history = pd.DataFrame({"epoch": np.arange(epochs) + 1, "val_loss": np.linspace(1, 0.5, epochs)})
    fig = plots.loss_history(history, ["val_loss"], x="epoch")
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    colour = [int(plots.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    drawn = (np.asarray(canvas.buffer_rgba())[..., :3] == colour).all(-1)
    assert drawn.sum() > 4
    assert all(float(tick).is_integer() for tick in fig.axes[0].get_xticks())
