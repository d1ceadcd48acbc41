"""The experiment: what makes the classifier better on real lesions, and do generated images?

An arm is one recipe. It differs from the one that it stands beside in one thing, takes the same number of optimiser
steps, chooses its epoch by the same real validation lesions, and is trained with several seeds. What it answers for the
test lesions is written down when it is trained, and compared with the truth when the table is made.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock
from sklearn.model_selection import StratifiedGroupKFold

from stgan_utils import data, device, finetune, generation, runs, versions
from stgan_utils.backbone import load_backbone, load_lite
from stgan_utils.classifier import Classifier
from stgan_utils.config import ClassifierSettings, UserError
from stgan_utils.engine import Task
from stgan_utils.files import atomic_path, read_json, sha256, sweep, write_json
from stgan_utils.lesions import CLASSES

KINDS = {"real": False, "generated": True}
# What all arms share. The first blocks are half of a step's time and hold a hundredth of the weights: frozen, three
# seeds of each arm become affordable on a CPU.
RECIPE = {"size": 96, "epochs": 5, "frozen_blocks": 4}
# The one that is released: no arm of the comparison, it is larger and trained for longer, small images first.
RELEASE, FIRST_PHASE = "release", "release-160px"
# The released one's answers aim at accuracy for so much and at balanced accuracy for the rest. Chosen on validation
# lesions (`benchmarks/answers.py`): 0.002 of balanced accuracy is its price there, 0.025 of accuracy its gain.
ACCURACY_SHARE = 0.15


class Arm(NamedTuple):
    """A recipe: classifier settings beside `RECIPE`, and what else belongs to it."""

    text: str
    settings: dict
    # Which generated images join ("" none, "raw", "dedup", "filtered"), and how many of those that a class lacks to be
    # as large as the largest, 0 … 1.
    synthetic: str = ""
    share: float = 0.0
    # Whose class shares logit adjustment makes up for: those of the "real" training images or of the whole "mix".
    prior: str = "real"
    # The arm whose weights it begins with: it is the second phase of that one.
    after: str = ""
    # Whose answers are learnt. "half": half of each image's loss are those of networks that have not learnt from it,
    # `teach`; "generated": all of a generated image's loss, not the class that was asked for but what the baseline of
    # step 01, trained on real images only, answers to it.
    taught: str = ""


PLAIN, ADJUSTED = {"logit_adjustment": 0.0}, {"logit_adjustment": 1.0}
ARMS = {
    "real": Arm("real images, plain cross-entropy", PLAIN),
    "balanced-sampling": Arm("… and every class drawn equally often", PLAIN | {"sampling": "balanced"}),
    "logit-adjustment": Arm("… and logit adjustment (τ = 1)", ADJUSTED),
    "trivial-augment": Arm("logit adjustment and TrivialAugment", ADJUSTED | {"augmentation": "trivial"}),
    "mixup": Arm("logit adjustment and MixUp", ADJUSTED | {"mix": "mixup"}),
    "cutmix": Arm("logit adjustment and CutMix", ADJUSTED | {"mix": "cutmix"}),
    "gan-raw": Arm("logit adjustment and generated images, raw, to balance", ADJUSTED, "raw", 1.0),
    "gan-raw-50": Arm("… half of the way to balance", ADJUSTED, "raw", 0.5),
    "gan-raw-25": Arm("… a quarter of the way to balance", ADJUSTED, "raw", 0.25),
    "gan-dedup": Arm("logit adjustment and generated images, deduplicated", ADJUSTED, "dedup", 1.0),
    "gan-filtered": Arm("… deduplicated and filtered", ADJUSTED, "filtered", 1.0),
    "gan-mixed-prior": Arm("… and the adjustment made for the mix", ADJUSTED, "filtered", 1.0, prior="mix"),
    "gan-answered": Arm(
        "… deduplicated, with a baseline's answers for labels", ADJUSTED, "dedup", 1.0, taught="generated"
    ),
    "gan-dedup-25": Arm("… deduplicated, a quarter of the way to balance", ADJUSTED, "dedup", 0.25),
    "gan-answered-25": Arm("… and with a baseline's answers for labels", ADJUSTED, "dedup", 0.25, taught="generated"),
    FIRST_PHASE: Arm(
        "the released recipe, first phase", ADJUSTED | {"size": 160, "epochs": 8, "augmentation": "strong"}
    ),
    RELEASE: Arm(
        "the released recipe",
        ADJUSTED
        | {"size": 224, "epochs": 16, "learning_rate": 5e-4, "augmentation": "strong", "views": 2}
        | {"accuracy_share": ACCURACY_SHARE},
        after=FIRST_PHASE,
        taught="half",
    ),
}


class Teachers(NamedTuple):
    """Networks of one kind and recipe, each trained without one of so many parts of the train split."""

    parts: int
    load: Callable
    settings: dict


# Whose answers the released one learns. What a network answers to images that it has not learnt from is what an honest
# guess looks like; two kinds are wrong in different places, and both together less often than either.
TEACHERS = {
    "mobilenet": Teachers(5, load_backbone, ARMS[FIRST_PHASE].settings | {"views": 2}),
    "lite2": Teachers(3, load_lite, ARMS[FIRST_PHASE].settings | {"views": 2, "size": 224, "frozen_blocks": 5}),
}
COMPARED = [name for name in ARMS if name not in (RELEASE, FIRST_PHASE)]
REAL_ONLY = [name for name in COMPARED if not ARMS[name].synthetic]
SHARES = ["logit-adjustment", "gan-raw-25", "gan-raw-50", "gan-raw"]


def tasks(names, run_dir, seeds):
    """What trains several arms with seeds 0 … `seeds` - 1, as `engine.Task`s: one for each, named by its folder.

    Raises:
        UserError: no such arm.
    """

    def task(name, seed):
        before = (_folder(arm_named(name).after, seed),) if arm_named(name).after else ()
        return Task(_folder(name, seed), train, (name, Path(run_dir).resolve(), seed), before, peers=len(ARMS))

    return [task(name, seed) for name in dict.fromkeys(names) for seed in range(seeds)]


def train(name, run_dir, seed):
    """Train one arm with one seed; a finished one is left alone, a killed one goes on.

    Args:
        name: a key of `ARMS`.
        run_dir: a run folder with 00 and, for arms with generated images, 01, 03 and 04.

    Returns:
        The folder, `run_dir/arms/NAME/seedN`: model.safetensors, history.csv, predictions.csv (validation and test
        lesions), result.json (nothing of the test lesions in it).

    Raises:
        UserError: no such arm, a step that has not run, or an arm that was trained with other settings or on what
            another run of those steps made.
    """
    arm, run_dir = arm_named(name), Path(run_dir)
    real = real_table(run_dir)
    if arm.taught == "half":
        load_lite("none")  # what is not installed is said now, not after the first phase
    before = train(arm.after, run_dir, seed) if arm.after else None
    settings = _settings(arm, seed, before, epoch_images=int((real["split"] == "train").sum()))
    inputs = made_of(name, run_dir)
    folder = run_dir / _folder(name, seed)
    if before:
        inputs[arm.after] = sha256(before / finetune.MODEL_FILE)
    if (folder / "result.json").exists():
        done = read_json(folder / "result.json")
        asked, there = asdict(settings), done["settings"] | {"continue_from": settings.continue_from}  # may be moved
        differ = [name for name in asked if there.get(name) != asked[name]]
        # Results once did not say which first phase they went on from.
        made_with = {arm.after: inputs.get(arm.after)} | done.get("inputs", inputs)
        differ += [name for name in inputs if made_with.get(name) != inputs[name]]
        if not differ:
            return folder
        raise UserError(
            f"{folder} was trained with other settings, or before something was made anew ({', '.join(differ)}): "
            "delete it, or choose another run folder."
        )
    sweep(folder)
    table = pd.concat([real, choose_generated(run_dir, real, arm, settings)], ignore_index=True)
    images = data.image_cache(table, settings.size)
    rows = {split: table.index[table["split"] == split] for split in ("train", "val", "test")}
    began = time.monotonic()
    prior = rows["train"] if arm.prior == "mix" else table.index[(table["split"] == "train") & ~table["synthetic"]]
    history = finetune.train(
        settings, images, table["label"], rows["train"], rows["val"], folder, prior, taught=_taught(arm, run_dir, table)
    )
    model = Classifier.load(folder / finetune.MODEL_FILE).to(device.pick())
    judged = rows["val"].append(rows["test"])
    answers = model.predict_proba(images, judged)
    columns = table.loc[judged, ["image_id", "lesion_id", "label", "split"]].reset_index(drop=True)
    with atomic_path(folder / "predictions.csv") as temporary:
        columns.join(answers).to_csv(temporary, index=False)
    best = history.loc[history["val_balanced_accuracy"].idxmax()]
    counts = table[table["split"] == "train"].groupby(["label", "synthetic"]).size().unstack(fill_value=0)
    images_of = {kind: {code: int(counts.loc[code].get(made, 0)) for code in CLASSES} for kind, made in KINDS.items()}
    validation = {"epoch": int(best["epoch"]), "balanced_accuracy": float(best["val_balanced_accuracy"])}
    result = _result(name, settings, folder, images_of, began)
    write_json(folder / "result.json", result | {"inputs": inputs, "validation": validation})
    return folder


def refit(name, run_dir):
    """Train on with an arm's recipe, from the weights of its seed 0, on *all* real images: what is released.

    Half as many epochs: it begins where the arm ended.

    The held-out lesions are among them, so nothing is left to judge it by: its figures are those of the arm itself,
    `findings.judge`. The temperature is that one's as well. A taught arm stays taught: held-out images by all teachers
    and by the arm's own seed 0, since none of these has learnt from them.

    Returns:
        The folder, `run_dir/arms/NAME/refit`: model.safetensors, history.csv, result.json.

    Raises:
        UserError: an arm with generated images, or one that was not trained with seed 0.
    """
    arm, run_dir = arm_named(name), Path(run_dir)
    if arm.synthetic:
        raise UserError(
            f"Arm {name} learns from generated images of the train split: only real-only arms are refitted."
        )
    source = run_dir / "arms" / name / "seed0"
    require(source / "result.json", f"`arms train {name}`")
    real = real_table(run_dir)
    temperature = Classifier.load(source / finetune.MODEL_FILE).answering["temperature"]
    settings = _settings(arm, 0, source, temperature=temperature)
    settings = replace(settings, epochs=math.ceil(settings.epochs / 2))
    folder = run_dir / "arms" / name / "refit"
    images = data.image_cache(real, settings.size)
    began = time.monotonic()
    teachers = teach(run_dir) | {source / finetune.MODEL_FILE: real["split"] == "train"} if arm.taught else {}
    taught = _half(answers_of_others(teachers, real)) if arm.taught else None
    finetune.train(settings, images, real["label"], real.index, None, folder, taught=taught)
    counts = real["label"].value_counts()
    result = _result(name, settings, folder, {"real": {code: int(counts[code]) for code in CLASSES}}, began)
    taught_by = {str(path.relative_to(run_dir)): sha256(path) for path in teachers}
    write_json(folder / "result.json", result | {"taught_by": taught_by})
    return folder


def teach(run_dir):
    """Train the `TEACHERS` on the train split, cross-fitted: of each kind one leaves a lesion out.

    Returns:
        {model file: rows of the run's dataset table that it has learnt from, bool (N,)}, the files in
        `run_dir/arms/teachers/KIND-PART`; those that are there are left alone.

    Raises:
        UserError: the packages of EfficientNet-Lite2 are not installed.
    """
    run_dir = Path(run_dir)
    real = real_table(run_dir)
    train_rows = real.index[real["split"] == "train"]
    files = {}
    for name, kind in TEACHERS.items():
        parts = StratifiedGroupKFold(kind.parts, shuffle=True, random_state=0).split(
            train_rows, real.loc[train_rows, "label"], real.loc[train_rows, "lesion_id"]
        )
        for part, (kept, _) in enumerate(parts):
            settings = ClassifierSettings(**{**RECIPE, **kind.settings, "seed": part})
            folder = run_dir / "arms" / "teachers" / f"{name}-{part}"
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # several seeds may ask for them side by side
                images = data.image_cache(real, settings.size)
                finetune.train(settings, images, real["label"], train_rows[kept], None, folder, load=kind.load)
            files[folder / finetune.MODEL_FILE] = real.index.isin(train_rows[kept])
    return files


def choose_generated(run_dir, real, arm, settings):
    """The generated images that an arm trains on, as rows of the dataset table (`synthetic` True, `split` "train").

    Of each class the first ones in the order of their names, as many as `share` of the gap to the largest class asks
    for; fewer where there are no more. "dedup" keeps what step 04 kept; "filtered" keeps of these what the baseline of
    step 01, trained on real images only, takes for the class that was asked for.
    """
    if not arm.synthetic:
        return real[:0]
    made = generation.list_kept(run_dir, "raw" if arm.synthetic == "raw" else "kept")
    if arm.synthetic == "filtered":
        require(run_dir / "01_baseline" / finetune.MODEL_FILE, "01_baseline")
        baseline = Classifier.load(run_dir / "01_baseline" / finetune.MODEL_FILE).to(device.pick())
        said = baseline.predict_proba(data.image_cache(made.reset_index(drop=True), baseline.size)).idxmax(axis=1)
        made = made[said.to_numpy() == made["label"].to_numpy()]
    sizes = real.loc[real["split"] == "train", "label"].value_counts()
    wanted = ((sizes.max() - sizes) * arm.share).round().astype(int)
    place = made.groupby("label").cumcount()
    made = made[place < made["label"].map(wanted)]
    return made[["path", "label"]].assign(synthetic=True, split="train")


def _folder(name, seed):
    return f"arms/{name}/seed{seed}"


def arm_named(name):
    if name not in ARMS:
        raise UserError(f"No arm {name!r}; there are {', '.join(ARMS)}.")
    return ARMS[name]


def made_of(name, run_dir):
    """{step: its fingerprint} of those steps of the run whose outcome an arm is made of, and how its teachers are."""
    arm = arm_named(name)
    uses = {
        "00_start_here": True,
        "01_baseline": arm.synthetic == "filtered" or arm.taught == "generated",
        "04_deduplicate": bool(arm.synthetic),
    }
    found = runs.fingerprints(run_dir, [step for step, used in uses.items() if used])
    if arm.taught == "half":
        found["teachers"] = {kind: [each.parts, each.settings] for kind, each in TEACHERS.items()}
    return found


def _taught(arm, run_dir, table):
    """What `finetune.train` takes under this name."""
    if arm.taught == "half":
        return _half(answers_of_others(teach(run_dir), table))
    if arm.taught == "generated":
        baseline = run_dir / "01_baseline" / finetune.MODEL_FILE
        require(baseline, "01_baseline")
        return answers_of_others({baseline: ~table["synthetic"]}, table), table["synthetic"].to_numpy()
    return None


def _half(answers):
    return answers, np.full(len(answers), 0.5)


def answers_of_others(networks, table):
    """For each image the mean balanced probabilities (N, classes) of those `networks`, {file: rows learnt from}, that
    do not know it; columns in the order of `CLASSES`."""
    total, asked = np.zeros((len(table), len(CLASSES))), np.zeros((len(table), 1))
    for file, learnt in networks.items():
        model, rows = Classifier.load(file).fused().to(device.pick()), np.flatnonzero(~np.asarray(learnt))
        model.answering["weights"] = {}  # balanced, as the loss wants it
        total[rows] += model.predict_proba(data.image_cache(table, model.size), rows)[list(CLASSES)].to_numpy()
        asked[rows] += 1
    return total / asked.clip(1)


def _settings(arm, seed, before, **more):
    continue_from = str(before / finetune.MODEL_FILE) if before else ""
    return ClassifierSettings(**{**RECIPE, **arm.settings, **more, "seed": seed, "continue_from": continue_from})


def _result(name, settings, folder, images, began):
    return {
        "arm": name,
        "text": ARMS[name].text,
        "settings": asdict(settings),
        "training_images": images,
        "backbone": Classifier.load(folder / finetune.MODEL_FILE).settings["backbone"],
        "model_sha256": sha256(folder / finetune.MODEL_FILE),
        "seconds": time.monotonic() - began,
        "device": device.describe(settings.width),
        "commit": versions.git_commit(),
    }


def real_table(run_dir):
    """The dataset table of a run folder, with its splits and a column `synthetic`, all False."""
    path = run_dir / "00_start_here" / "table.csv"
    require(path, "00_start_here")
    return data.read_table(path).assign(synthetic=False)


def require(path, step):
    """Raise a `UserError` that names the step to run where `path` is not there."""
    if not path.exists():
        raise UserError(f"{path} is missing: run step {step} first.")
