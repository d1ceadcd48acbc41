"""What freezing (Freeze-D) and Barlow Twins change in Stage 2: the same short training with each of them switched off.

An arm differs from the first one in one setting and in nothing else: the same start, seed and order of images.
"""

import shutil
from dataclasses import asdict, replace

import pandas as pd
import torch

from stgan_utils import checkpoints, files, quality
from stgan_utils.augment import diff_augment
from stgan_utils.fastgan import small_view
from stgan_utils.iteration import BARLOW_LAMBDA
from stgan_utils.losses import barlow_twins
from stgan_utils.trainer import GanTrainer

ARMS = {"both": {}, "nothing frozen": {"freeze_blocks": 0}, "no Barlow Twins": {"bt_weight": 0.0}}
POINTS = 5  # of each curve at least, after the start
GENERATED = 200  # images behind each KID at most
LOOKED_AT = 64  # training images at most that the discriminator is asked about


def arms(settings):
    """{arm: its `Stage2Settings`}, `ablation_iterations` long, with a ramp of Barlow Twins that fits into them."""
    iterations = settings.ablation_iterations
    every = max(1, iterations // POINTS)
    short = replace(
        settings,
        iterations=iterations,
        bt_ramp=min(settings.bt_ramp, iterations // 4),
        checkpoint_every=iterations,
        sample_every=iterations,
        evaluate_every=every,
        quality_images=min(settings.quality_images, GENERATED),
        max_minutes=None,
    )
    return {name: replace(short, **changes) for name, changes in ARMS.items()}


def run(settings, real, start, extractor, folder):
    """Train the arms one after the other, in a folder of their own; only the figures stay.

    Args:
        settings: `Stage2Settings` with `ablation_iterations` above 0.
        real: uint8 (N, S, S, 3), the class's training images.
        start: the checkpoint of Stage 1, generator and discriminator.
        extractor: of the features for KID.
        folder: where `ablation.json` goes. Called again with the same settings, nothing is trained; a killed run goes
            on with the arm that it was at, or begins anew where settings or feature space have changed.

    Returns:
        DataFrame: arm, iteration, feature_space, kid, kid_low, kid_high, and the figures of `asked`.
    """
    wanted = {name: asdict(arm) for name, arm in arms(settings).items()}
    done, trainings = folder / "ablation.json", folder / "trainings"
    found = files.read_json(done) if done.exists() else {"settings": None}
    if found["settings"] != wanted or "feature_space" not in found["curves"]:
        begun, state = trainings / "begun.json", {"settings": wanted, "feature_space": extractor.name}
        if trainings.exists() and (not begun.exists() or files.read_json(begun) != state):
            shutil.rmtree(trainings)
        files.write_json(begun, state)
        distance = quality.DistanceToReal(real, extractor, settings.seed)
        curves = [
            _train(arm, real, start, distance, trainings / name).assign(arm=name)
            for name, arm in arms(settings).items()
        ]
        curves = pd.concat(curves, ignore_index=True).assign(feature_space=extractor.name)
        files.write_json(done, {"settings": wanted, "curves": curves.to_dict("list")})
    shutil.rmtree(trainings, ignore_errors=True)
    return pd.DataFrame(files.read_json(done)["curves"])


def _train(settings, real, start, distance, folder):
    gan = GanTrainer(
        settings, real, folder, start=(checkpoints.load_generator(start), checkpoints.load_discriminator(start))
    )
    discriminator = gan.discriminator  # the trainer itself, held by its own function, would stay in memory
    gan.evaluate = lambda made: distance(made) | asked(discriminator, real, made, settings.augment)
    return gan.run()[1]


@torch.no_grad()
def asked(discriminator, real, made, augment):
    """What the discriminator thinks at one moment; no random number of the training is used up.

    Args:
        real, made: uint8 (N, S, S, 3), training images and generated ones.
        augment: the policies of DiffAugment that make two views of each image.

    Returns:
        {"barlow": the Barlow Twins term of its own features (before the projector, which only some arms train) for two
        views of the same training images; "margin": mean logit of training images minus that of generated ones}.
    """
    place, training = next(discriminator.parameters()).device, discriminator.training
    real, made = (
        torch.from_numpy(images[:LOOKED_AT]).permute(0, 3, 1, 2).to(place).float() / 127.5 - 1
        for images in (real, made)
    )
    discriminator.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        views = [diff_augment(real, augment) for _ in range(2)]
    judged = [discriminator(images, small_view(images)) for images in (*views, real, made)]
    discriminator.train(training)
    on_diag, off_diag = barlow_twins(*(one.last.mean((2, 3)) for one in judged[:2]))
    margin = judged[2].logits.mean() - judged[3].logits.mean()
    return {"barlow": float(on_diag + BARLOW_LAMBDA * off_diag), "margin": float(margin)}
