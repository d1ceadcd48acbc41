"""Where in the image a classifier found its answer: Grad-CAM (R. R. Selvaraju et al., ICCV 2017, arXiv:1610.02391)."""

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

STRIDE = 32  # MobileNetV2: five convolutions of stride 2


def grad_cam(model, images, codes):
    """One map an image: how much each place spoke *for* one class, 0 (nothing or against it) to 1 (most of this image).

    The last feature maps, each weighted by the mean gradient of the class's logit (eq. 1), summed, the negative cut off
    (eq. 2), enlarged to the image. They have a cell for 32 pixels: 7 × 7 at 224 px, 3 × 3 at 96 px, no finer.

    Args:
        model: `Classifier`, as trained or `fused()`; it does the scaling.
        images: uint8 (N, S, S, 3), a few: they go through at once.
        codes: N class codes, what each image is asked about.

    Returns:
        float32 (N, S, S) in [0, 1]; all 0 where nothing speaks for the class.
    """
    model.eval()
    kept = []

    def keep(module, inputs, output):
        # Cut off from what is below: the gradient is wanted here and no deeper.
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.features.register_forward_hook(keep)
    try:
        logits = model(torch.from_numpy(np.asarray(images)).to(model.mean.device))
    finally:
        handle.remove()
    columns = torch.tensor([model.classes.index(code) for code in codes], device=logits.device)
    asked = logits.gather(1, columns[:, None]).sum()  # an image's logit depends on its own maps alone
    (gradient,) = torch.autograd.grad(asked, kept[0])
    weights = gradient.mean((2, 3), keepdim=True)
    maps = F.relu((weights * kept[0].detach()).sum(1, keepdim=True))
    maps = _enlarged(maps, model.size)
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu().numpy()


def surest_answers(model, images, truth, answers):
    """Maps of the surest answers, by rule and not by taste: of each class the surest right and the surest wrong one.

    Args:
        model, images: as `grad_cam`; all N images that were answered for.
        truth: N class codes.
        answers: N rows of probabilities, columns named by class.

    Returns:
        {"hits": (images, maps, titles), "misses": …} as `plots.heatmaps` takes them; misses are also asked about the
        true class. A key is left out where there is none.
    """
    said = pd.DataFrame(
        {"true": list(truth), "said": list(answers.idxmax(axis=1)), "sure": answers.max(axis=1).to_list()}
    )
    said = said.sort_values("sure", ascending=False, kind="stable").assign(hit=said["true"] == said["said"])
    found = {}
    for hit, shown in said.groupby(["hit", "true"]).head(1).sort_values("true").groupby("hit"):
        seen = images[shown.index]
        maps = {"for its answer": grad_cam(model, seen, shown["said"])}
        if not hit:
            maps["for the truth"] = grad_cam(model, seen, shown["true"])
        titles = [f"{row.true}\nsaid {row.said}, {row.sure:.0%}" for row in shown.itertuples()]
        found["hits" if hit else "misses"] = seen, maps, titles
    return found


def _enlarged(maps, size):
    """Maps (N, 1, C, C) as (N, size, size), each cell where it looks.

    A convolution of stride 2 with a border of 1 puts its cell i over pixel 2 i, so that five of them look at pixel 32 i
    and not at the middle of the i-th tile: plain enlarging would shift every map by 16 pixels to the lower right.
    """
    at = torch.arange(size, device=maps.device) / STRIDE * 2 / max(1, maps.shape[-1] - 1) - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=True)[:, 0]
