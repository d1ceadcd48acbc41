"""The notebooks' figures: one function each, returning a matplotlib Figure; `OpenStep.figure` saves and shows it.

Images are uint8 (N, H, W, 3), RGB. A class has one colour everywhere (`lesions.LESIONS`).
"""

import textwrap

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from stgan_utils.lesions import CLASSES, LESIONS

METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "macro_auc", "mel_sensitivity_at_90")
# Of arms and curves (colour-blind safe); in no figure together with the classes' own.
FEW = 30  # images of a group below which its figures are hardly more than anecdotes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def class_counts(table):
    """Images per class and split, on a logarithmic scale, the number on each bar.

    Args:
        table: a dataset table with `label` and `split`.
    """
    counts = table.groupby(["label", "split"]).size().unstack(fill_value=0).reindex(CLASSES, fill_value=0)
    splits = [split for split in ("train", "val", "test") if split in counts]
    fig = Figure(figsize=(8, 3.6), layout="constrained")
    ax = fig.subplots()
    for i, split in enumerate(splits):
        x = np.arange(len(CLASSES)) + (i - (len(splits) - 1) / 2) * 0.27
        # The split is told by how full the colour is, the class by the colour.
        colours = [LESIONS[code].colour for code in CLASSES]
        bars = ax.bar(x, counts[split], 0.26, color=colours, alpha=(1, 0.6, 0.35)[i])
        ax.bar_label(bars, labels=[f"{count:,}" for count in counts[split]], fontsize=6.5, padding=1)
    ax.set(yscale="log", ylabel="images (log)", title=f"Images per class: {', '.join(splits)}; n = {len(table):,}")
    ax.set_xticks(range(len(CLASSES)), CLASSES)
    ax.margins(y=0.12)
    return _tidy(fig)


def image_grid(images, titles=None, columns=8, title=""):
    """Images in rows of `columns`, each with its title where `titles` are given; a remainder row stays open."""
    columns = min(columns, len(images))
    high = 1 if titles is None else 1.2  # of an image and its title
    fig, ax = _sheet(columns, -(-len(images) // columns) * high)
    for i, image in enumerate(images):
        x, top = i % columns, (i // columns + 1) * high - 1
        _put(ax, image, x, top)
        if titles is not None:
            ax.text(x + 0.5, top, titles[i], ha="center", va="bottom", fontsize=7)
    fig.suptitle(f"{title} (n = {len(images)} shown)" if title else "", fontsize=10)
    return fig


def image_rows(rows, title):
    """Pictures in rows, the name of each row before it.

    Args:
        rows: {name: images}, up to 8 of each are shown; the pictures of different rows may differ in size.
    """
    columns = min(8, max(len(images) for images in rows.values()))
    fig, ax = _sheet(1 + columns, len(rows))  # the names are the first column
    for y, (name, images) in enumerate(rows.items()):
        ax.text(0.92, y + 0.5, "\n".join(textwrap.wrap(name, 14)), ha="right", va="center", fontsize=9)
        for x, image in enumerate(images[:columns], 1):
            _put(ax, image, x, y)
    fig.suptitle(title, fontsize=10)
    return fig


def _sheet(width, height):
    """(figure, axes) for `_put`: one system of axes whose unit is an image's side, y downwards.

    A system of its own for every image takes matplotlib seconds for a hundred of them.
    """
    fig = Figure(figsize=(1.2 * width, 1.2 * height + 0.4), layout="constrained")
    ax = fig.subplots()
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return fig, ax


def _put(ax, image, x, y):
    """An image onto a sheet, its left upper corner at (`x`, `y`)."""
    limits = ax.axis()
    ax.imshow(image, extent=(x + 0.03, x + 0.97, y + 0.97, y + 0.03))
    ax.axis(limits)  # which imshow sets to the image's


def real_above_generated(real, fake, title):
    """8 real images, spread evenly over all of them, above the first 8 generated ones."""
    spread = np.unique(np.linspace(0, len(real) - 1, 8).astype(int))
    title = f"{title}, n = {len(real):,} real and {len(fake):,} generated"
    return image_rows({"real": real[spread], "generated": fake}, title)


def pairs(images_left, images_right, captions):
    """Each left image beside its right one, `captions` above the pair; three pairs a row."""
    wide, high = 2.4, 1.2  # of a pair and its distance to the next, and of its caption
    columns = min(3, len(captions))
    fig, ax = _sheet(wide * columns - 0.4, -(-len(captions) // columns) * high)
    for i, (left, right, caption) in enumerate(zip(images_left, images_right, captions, strict=True)):
        x, top = i % columns * wide, (i // columns + 1) * high - 1
        _put(ax, left, x, top)
        _put(ax, right, x + 1, top)
        ax.text(x + 1, top, caption, ha="center", va="bottom", fontsize=8)
    return fig


def loss_history(history, columns, title="Losses", x="iteration"):
    """Each of `columns` over `x` ("iteration" or "epoch") in its own panel, since losses have no common scale."""
    fig = Figure(figsize=(3.2 * min(3, len(columns)), 2.3 * -(-len(columns) // 3)), layout="constrained")
    axes = fig.subplots(-(-len(columns) // 3), min(3, len(columns)), squeeze=False).ravel()
    for ax, column, colour in zip(axes, columns, np.resize(COLOURS, len(columns)), strict=False):
        # Dots where they can be told apart: a line through the one epoch of a short run would show nothing.
        ax.plot(history[x], history[column], "o-" if len(history) <= 20 else "-", color=colour, lw=1.2, ms=3)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.set_title(column.replace("_", " "), fontsize=9)
        ax.set_xlabel(x, fontsize=8)
    for ax in axes[len(columns) :]:
        ax.axis("off")
    fig.suptitle(title, fontsize=10)
    return _tidy(fig)


def kid_history(history, title="Distance to real images"):
    """KID over iterations with its interval, the best one marked.

    Args:
        history: DataFrame with `iteration`, `kid`, `kid_low`, `kid_high`.
        title: must name the feature space.
    """
    best = history.loc[history["kid"].idxmin()]
    fig = Figure(figsize=(6, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.fill_between(history["iteration"], history["kid_low"], history["kid_high"], color=COLOURS[0], alpha=0.2, lw=0)
    ax.plot(history["iteration"], history["kid"], "o-", color=COLOURS[0], ms=4, label="KID, 95 % interval")
    label = f"best: {best['kid']:.4g} at iteration {best['iteration']:,.0f}"
    ax.plot(best["iteration"], best["kid"], "*", color=COLOURS[1], ms=13, label=label)
    ax.set(xlabel="iteration", ylabel="KID (lower is better)", title=title)
    ax.legend(fontsize=8)
    return _tidy(fig)


def dedup_bars(counts):
    """What each filter leaves, side by side per class.

    Args:
        counts: DataFrame indexed by class with columns such as `generated`, `after pHash`, `after wHash`.
    """
    fig = Figure(figsize=(8, 3.4), layout="constrained")
    ax = fig.subplots()
    width = 0.84 / len(counts.columns)
    for i, name in enumerate(counts.columns):
        x = np.arange(len(counts)) + (i - (len(counts.columns) - 1) / 2) * width
        bars = ax.bar(x, counts[name], width, color=COLOURS[i], label=name)
        ax.bar_label(bars, labels=[f"{count:,}" for count in counts[name]], fontsize=6.5, padding=1)
    ax.set_xticks(range(len(counts)), counts.index)
    ax.set(ylabel="images", title=f"Left by each filter, n = {int(counts.iloc[:, 0].sum()):,} generated")
    ax.legend(fontsize=8, ncols=len(counts.columns), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return _tidy(fig)


def threshold_sweep(shares, threshold=10, title="Kept at each threshold"):
    """Share kept against the Hamming threshold; the one in use as a dotted line.

    Args:
        shares: DataFrame indexed by threshold, a column a curve, values in [0, 1]. Columns that name "real" are drawn
            dashed: they are the control, in which nothing is a copy. Columns that name the same hash share a colour.
    """
    fig = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = fig.subplots()
    hashes = list(dict.fromkeys(name.split()[-1] for name in shares.columns))
    for name in shares.columns:
        style = "--" if "real" in name else "-"
        ax.plot(shares.index, shares[name], style, color=COLOURS[hashes.index(name.split()[-1])], label=name)
    ax.axvline(threshold, color="0.4", ls=":", lw=1)
    ax.set(xlabel="threshold (bits of 64)", ylabel="share kept", ylim=(0, 1.02), title=title)
    ax.legend(fontsize=8)
    return _tidy(fig)


def confusion(matrix, classes, title="Confusion matrix"):
    """Counts, rows true and columns predicted, coloured by their share of the row.

    Args:
        matrix: (C, C) whole numbers, rows and columns in the order of `classes`.
    """
    matrix = np.asarray(matrix)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    fig = Figure(figsize=(5.2, 4.4), layout="constrained")
    ax = fig.subplots()
    sns.heatmap(
        share,
        annot=matrix,
        fmt=",d",
        cmap="Blues",
        vmin=0,
        vmax=1,
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"label": "share of the row"},
        annot_kws={"fontsize": 8},
        ax=ax,
    )
    ax.set(xlabel="predicted", ylabel="true", title=f"{title}, n = {matrix.sum():,}")
    ax.tick_params(axis="y", rotation=0)
    return fig


def metric_intervals(arms, names=METRICS, title="Real test split, 95 % intervals"):
    """A dot with its interval for each figure and arm.

    Args:
        arms: {arm: `metrics` as `evaluation.evaluate` gives them}; a figure or bound that is None is not drawn.
    """
    fig = Figure(figsize=(6.4, 0.5 * len(names) + 1.4), layout="constrained")
    ax = fig.subplots()
    for i, (arm, metrics) in enumerate(arms.items()):
        values, errors = _bars([metrics[name] for name in names])
        y = np.arange(len(names)) + (i - (len(arms) - 1) / 2) * 0.22
        ax.errorbar(values, y, xerr=errors, fmt="o", ms=5, capsize=3, color=COLOURS[i], label=arm)
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), title=title)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(arms))
    return _tidy(fig)


def arms(table, shares, title="Arms of the experiment, real test lesions, 95 % intervals"):
    """Balanced accuracy of each arm, its difference to the one to beat, and the curve over generated images.

    Args:
        table: `findings.compare`.
        shares: the arms that are the points of the curve.
    """
    fig = Figure(figsize=(10, 0.34 * len(table) + 1.6), layout="constrained")
    left, middle, right = fig.subplots(1, 3, width_ratios=(3, 3, 2.4))
    y = np.arange(len(table))
    for ax, name in ((left, "balanced_accuracy"), (middle, "difference")):
        values, errors = _bars(_intervals(table, name))
        ax.errorbar(values, y, xerr=errors, fmt="o", ms=4, capsize=2, color=COLOURS[0])
        ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=name.replace("_", " "))
        ax.set_yticks(y, table["arm"] if ax is left else [])
    middle.axvline(0, color="0.5", lw=0.8)
    middle.set_xlabel(f"difference to {table.loc[table['to_beat'], 'arm'].item()}")
    curve = table[table["arm"].isin(shares)].sort_values("filled")
    values, errors = _bars(_intervals(curve, "balanced_accuracy"))
    right.errorbar(100 * curve["filled"], values, yerr=errors, fmt="o-", ms=4, capsize=2)
    right.set(xlabel="generated images, % of the gap", ylabel="balanced accuracy")
    fig.suptitle(title, fontsize=10)
    return _tidy(fig)


def recall_per_class(arms, title="Recall per class, real test split, 95 % intervals"):
    """Bars per class with their intervals, one for each arm; the number of test images below the class.

    Args:
        arms: {arm: `per_class` as `evaluation.evaluate` gives it}.
    """
    fig = Figure(figsize=(7, 3.4), layout="constrained")
    ax = fig.subplots()
    width = 0.84 / len(arms)
    for i, (arm, per_class) in enumerate(arms.items()):
        values, errors = _bars([per_class[code]["recall"] for code in CLASSES])
        x = np.arange(len(CLASSES)) + (i - (len(arms) - 1) / 2) * width
        ax.bar(x, values, width, yerr=errors, color=COLOURS[i], label=arm, error_kw={"lw": 0.8, "ecolor": "0.3"})
    images = next(iter(arms.values()))
    ax.set_xticks(range(len(CLASSES)), [f"{code}\nn = {images[code]['images']:,}" for code in CLASSES])
    ax.set(ylim=(0, 1.02), ylabel="recall", title=title)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(arms))
    return _tidy(fig)


def permutations(scores, marked, title="Accuracy under every reading of the columns"):
    """Histogram of the accuracies with some readings marked.

    Args:
        scores: DataFrame with `order` and `accuracy`, as `evaluation.permutation_scores` gives it.
        marked: {name: order}.
    """
    fig = Figure(figsize=(7, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.hist(scores["accuracy"], bins=70, color="0.7")
    accuracy = scores.set_index("order")["accuracy"]
    for (name, order), colour in zip(marked.items(), COLOURS, strict=False):
        label = f"{name}: {accuracy[order]:.1%}  ({' '.join(order)})"
        ax.axvline(accuracy[order], color=colour, lw=1.8, label=label)
    ax.set(yscale="log", xlim=(0, 1), xlabel="accuracy", ylabel="readings (log)", title=f"{title}, n = {len(scores):,}")
    ax.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return _tidy(fig)


def subgroups(groups, title="Subgroups, real test split, 95 % intervals"):
    """Accuracy and balanced accuracy of each group with intervals; its counts beside its name, few images in pale.

    Args:
        groups: DataFrame as `evaluation.by_subgroups` gives it.
    """
    fig = Figure(figsize=(7, 0.24 * len(groups) + 1.2), layout="constrained")
    ax = fig.subplots()
    # A step of one between groups, of two where another column begins.
    y = np.arange(len(groups)) + (groups["column"] != groups["column"].shift()).cumsum()
    for name, colour, shift in (("accuracy", COLOURS[0], -0.12), ("balanced_accuracy", COLOURS[1], 0.12)):
        for chosen, alpha in ((groups["images"] >= FEW, 1), (groups["images"] < FEW, 0.3)):
            values, errors = _bars(_intervals(groups[chosen], name))
            label = name.replace("_", " ") if alpha == 1 else None
            ax.errorbar(values, y[chosen] + shift, xerr=errors, fmt="o", ms=3.5, color=colour, alpha=alpha, label=label)
    labels = [
        f"{row.column}: {row.group}  (n = {row.images:,}, {row.classes} class{'es' if row.classes > 1 else ''})"
        for row in groups.itertuples()
    ]
    ax.set_yticks(y, labels, fontsize=7.5)
    ax.set(xlim=(0, 1.02), ylim=(y.max() + 1, y.min() - 1), title=f"{title}\npale: fewer than {FEW} images")
    ax.grid(axis="x", lw=0.4, alpha=0.6)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / fig.get_figheight()), ncols=2)
    return _tidy(fig)


def reliability(curves, title="Reliability, real test split"):
    """How often answers given with some probability are right; on the diagonal a probability means what it says.

    Args:
        curves: {name: DataFrame as `evaluation.reliability_curve` gives it}; a dot's area grows with its images.
    """
    fig = Figure(figsize=(4.6, 4.4), layout="constrained")
    ax = fig.subplots()
    ax.plot([0, 1], [0, 1], ":", color="0.5", lw=1)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        images = curve["images"]
        label = f"{name}, n = {images.sum():,}"
        ax.plot(curve["confidence"], curve["accuracy"], color=colour, lw=1, label=label)
        ax.scatter(curve["confidence"], curve["accuracy"], 6 + 300 * images / images.sum(), colour, alpha=0.6, lw=0)
    ax.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="probability of the answer", ylabel="share right", title=title)
    ax.legend(fontsize=8, loc="upper left")
    return _tidy(fig)


def heatmaps(images, maps, titles, title=""):
    """Images side by side, below each one its maps laid over it.

    Args:
        images: uint8 (N, S, S, 3).
        maps: {name of the row: (N, S, S) in [0, 1]}, such as `gradcam.grad_cam` gives.
        titles: N captions.
    """
    fig = Figure(figsize=(1.25 * len(images) + 0.9, 1.25 * (1 + len(maps)) + 0.7), layout="constrained")
    axes = fig.subplots(1 + len(maps), len(images), squeeze=False)
    for column, caption in enumerate(titles):
        axes[0, column].set_title(caption, fontsize=7)
        for row, overlay in zip(axes[:, column], (None, *maps.values()), strict=True):
            row.imshow(images[column])
            if overlay is not None:
                row.imshow(overlay[column], cmap="inferno", vmin=0, vmax=1, alpha=0.5)
            row.set(xticks=[], yticks=[])
    for ax, name in zip(axes[:, 0], ("image", *maps), strict=True):
        ax.set_ylabel(name, fontsize=8)
    fig.suptitle(title, fontsize=10)
    return fig


def _intervals(table, name):
    columns = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
    return [{key: row[column] for key, column in columns.items()} for _, row in table.iterrows()]


def _bars(intervals):
    """Values (N,) and lengths of their bars downwards and upwards (2, N); NaN where there is None."""
    value, low, high = (np.array([interval[key] for interval in intervals], float) for key in ("value", "low", "high"))
    return value, np.clip([value - low, high - value], 0, None)


def _tidy(fig):
    sns.despine(fig)
    return fig
