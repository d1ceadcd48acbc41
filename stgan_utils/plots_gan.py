"""Figures of what happens inside the GANs (`anatomy`), and of what their parts are good for (`ablation`)."""

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from stgan_utils.plots import COLOURS


def excitation(taken, title):
    """From the coarse map to the gates to one channel of the fine map, for two images.

    Of all channels the one is shown whose gate varies most, and of all images the two at its ends. Maps are red above
    0, blue below; before and after the gate share one scale, so that a gate makes the map paler.

    Args:
        taken: `anatomy.Excitation` of two images or more.
    """
    channel = np.ptp(taken.gates, axis=0).argmax()
    of_channel = taken.gates[:, channel]
    shown = [of_channel.argmin(), of_channel.argmax()]
    coarse = np.abs(taken.coarse[shown]).mean(1)
    fine = {"before": taken.before[shown, channel], "after": taken.after[shown, channel]}
    most = np.percentile(np.abs(fine["before"]), 99)
    colours = [COLOURS[1] if k == channel else "0.6" for k in range(taken.gates.shape[1])]
    fig = Figure(figsize=(10, 4.3), layout="constrained")
    axes = fig.subplots(2, 5, width_ratios=(1, 1, 2.4, 1, 1))
    for i, (picture, small, bars, *maps) in enumerate(axes):
        bars.bar(range(len(colours)), taken.gates[shown[i]], color=colours, width=1)
        bars.set(ylim=(0, 1), xticks=[channel])
        picture.imshow(taken.pictures[shown[i]])
        small.imshow(coarse[i], vmin=coarse.min(), vmax=coarse.max())
        for ax, values in zip(maps, fine.values(), strict=True):
            ax.imshow(values[i], cmap="RdBu_r", vmin=-most, vmax=most)
        maps[1].set_xlabel(f"× {of_channel[shown[i]]:.2f}", fontsize=9)
        for ax in (picture, small, *maps):
            ax.set(xticks=[], yticks=[])
    heads = ("picture", "coarse map, 4 px\n(mean strength)", "gates, one a channel of the fine map")
    heads += (f"fine map, 64 px,\nchannel {channel}, before", "after its gate")
    for ax, head in zip(axes[0], heads, strict=True):
        ax.set_title(head, fontsize=9)
    fig.suptitle(title, fontsize=10)
    return fig


def ablation(curves, title):
    """Three panels over the iterations, a colour an arm; KID with its 95 % interval.

    Args:
        curves: DataFrame as `ablation.run` gives it.
    """
    panels = {"kid": "KID (lower is better)", "barlow": "Barlow Twins term", "margin": "D(real) − D(generated)"}
    fig = Figure(figsize=(10, 3.2), layout="constrained")
    axes = fig.subplots(1, len(panels))
    for (arm, rows), colour in zip(curves.groupby("arm", sort=False), COLOURS, strict=False):
        axes[0].fill_between(rows["iteration"], rows["kid_low"], rows["kid_high"], color=colour, alpha=0.12, lw=0)
        for ax, name in zip(axes, panels, strict=True):
            ax.plot(rows["iteration"], rows[name], "o-", color=colour, ms=3.5, label=arm)
    for ax, name in zip(axes, panels.values(), strict=True):
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("iteration", fontsize=8)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), fontsize=8)
    fig.suptitle(title, fontsize=10)
    sns.despine(fig)
    return fig
