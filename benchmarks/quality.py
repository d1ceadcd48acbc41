"""What speed costs: the same seeds and iterations, reference and fast settings, on real images: benchmarks/quality.py.

The first perceptual distance named is the reference, in float32 and with the paper's step: by default LPIPS of VGG-16,
as in FastGAN's public code. The others compute as we do, in bf16 where the processor has it. Each training has a
process of its own; they take turns. Judged by KID to held-out real images, which none has learnt from: with
INCEPTION_WEIGHTS in the features of Inception-v3, which no distance here is taken in. A cheaper distance goes through
more iterations in the same time: `--iterations 600 1200` gives each distance its own. `--perceptual mobilenet
mobilenet` shows what bf16 alone costs.
Needs a folder of HAM10000, named by the environment variable HAM10000_DIR.
"""

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from classifier import alone
from common import write_section
from scipy.stats import sem
from scipy.stats import t as student_t

from stgan_utils import files

PACKAGES = ("torch", "torchvision", "torch-fidelity")
JUDGED = 800  # held-out real images and generated ones: Inception-v3 takes a sixth of a second for each


def train(settings, exact, images, count):
    """One training: {"made", "precision", "seconds"}, the first uint8 (count, S, S, 3) images of its generator.

    Args:
        settings: keywords of `Stage1Settings`.
        exact: compute in float32 throughout.
        images: uint8 (N, S, S, 3) to learn from.
        count: how many to make.
    """
    import torch

    from stgan_utils import device, generation, trainer
    from stgan_utils.config import Stage1Settings

    if exact:
        device.precision = lambda *_: torch.float32
    settings = Stage1Settings(**settings)
    computes = str(device.precision(device.pick(), settings.ngf)).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        began = perf_counter()
        gan = trainer.GanTrainer(settings, images, Path(folder))
        gan.run()
        seconds = perf_counter() - began
    made = generation.sample(gan.ema, settings.seed, range(count))
    return {"made": made, "precision": computes, "seconds": seconds}


def kept(folder, settings, exact, *args):
    """What `train` returns for the same arguments in a process of its own, from `folder` where it is there already."""
    if folder is None:
        return alone(train, settings, exact, *args)
    file = folder / ("-".join(map(str, (*settings.values(), "exact" if exact else "ours"))) + ".npz")
    if not file.exists():
        with files.atomic_path(file) as temporary:
            np.savez(temporary, **alone(train, settings, exact, *args))
    with np.load(file) as found:
        return {"made": found["made"], "precision": str(found["precision"]), "seconds": float(found["seconds"])}


def compared_by_seed(names, kids):
    """Lines on each kind of training beside the first one, seed by seed, from their names and KIDs, one a seed."""
    for other, found in zip(names[1:], kids[1:], strict=True):
        differences = np.subtract(found, kids[0])
        reach = sem(differences) * student_t.ppf(0.975, len(differences) - 1)
        mean = differences.mean()
        interval = f"{mean:+.4f} ({mean - reach:+.4f} … {mean + reach:+.4f}; Student's t, {len(differences)} pairs)"
        yield f"{other} less {names[0]}, seed by seed: {interval}."


def main():
    from stgan_utils import data
    from stgan_utils.config import PERCEPTUAL, SIZES, Stage1Settings
    from stgan_utils.features import feature_extractor
    from stgan_utils.profiles import PROFILES
    from stgan_utils.quality import kid

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=SIZES, default=64, help="side in pixels (default 64)")
    parser.add_argument("--ngf", type=int, default=32, help="width of the networks (default 32)")
    parser.add_argument(
        "--iterations", type=int, nargs="+", default=[1000], help="of all trainings, or one for each distance"
    )
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind (default 2)")
    compared = ["vgg", PROFILES["real-cpu"]["stage1"]["perceptual"]]
    parser.add_argument(
        "--perceptual", choices=PERCEPTUAL, nargs="+", default=compared, help=f"default: {' '.join(compared)}"
    )
    parser.add_argument("--keep", type=Path, help="folder for what trainings made, so that more seeds go on from there")
    args = parser.parse_args()
    lengths = args.iterations if len(args.iterations) > 1 else args.iterations * len(args.perceptual)
    if len(lengths) != len(args.perceptual):
        parser.error(f"{len(args.perceptual)} distances need one number of iterations, or as many as they are.")
    if not os.environ.get("HAM10000_DIR"):
        print("quality: skipped, HAM10000_DIR names no folder of HAM10000.")
        return
    table = data.split_by_lesion(data.load_dataset(os.environ["HAM10000_DIR"]))
    images, learns = data.image_cache(table, args.size), (table["split"] == "train").to_numpy()
    learnt, held_out = np.asarray(images[learns]), np.asarray(images[~learns])[:JUDGED]
    extractor = feature_extractor()
    lines = ["| distance, precision | iterations | seed | KID (95 % interval) | minutes |", "|---|---|---|---|---|"]
    names, kids = list(args.perceptual), [[] for _ in args.perceptual]
    for seed in range(args.seeds):
        for kind, (perceptual, iterations) in enumerate(zip(args.perceptual, lengths, strict=True)):
            exact = kind == 0
            settings = {"size": args.size, "ngf": args.ngf, "iterations": iterations, "perceptual": perceptual}
            run = kept(args.keep, settings | {"seed": seed}, exact, learnt, len(held_out))
            found = kid(extractor(held_out), extractor(run["made"]), seed)
            shown = "{kid:.4f} ({low:.4f} … {high:.4f})".format(**found)
            names[kind] = f"{perceptual}, {run['precision']}"
            cells = (names[kind], f"{iterations:,}", seed, shown, f"{run['seconds'] / 60:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
            kids[kind].append(found["kid"])
    for name, of, iterations in zip(names, kids, lengths, strict=True):
        spread = f"{np.mean(of):.4f} ({min(of):.4f} – {max(of):.4f}, lowest and highest)"
        lines.append(f"| {name} | {iterations:,} | all | {spread} | |")
    if args.seeds > 1:
        lines += ["", *compared_by_seed(names, kids)]
    body = f"""
Stage 1 on {len(learnt):,} real training images, {args.size} px, width {args.ngf}, batch {Stage1Settings.batch_size};
KID in the features of {extractor.name}, {len(held_out):,} generated images against as many held-out real ones, lower
is better (a network's own features flatter the distance that is taken in them).

{chr(10).join(lines)}
"""
    print(body)
    spent = " and ".join(f"{iterations:,}" for iterations in dict.fromkeys(lengths))
    write_section(f"What speed costs in quality, {spent} iterations", body, PACKAGES)


if __name__ == "__main__":
    main()
