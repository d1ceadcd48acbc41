"""The experiment: what makes the classifier better on real lesions, and do generated images?

An arm is one recipe. It differs from the one that it stands beside in one thing, takes the same number of optimiser
steps, chooses its epoch by the same real validation lesions, and is trained with several seeds. The test split is read
when the table is made, once every arm is there.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from stgan_utils import data, device, evaluation, finetune, plots, runs
from stgan_utils.classifier import Classifier
from stgan_utils.config import ClassifierSettings, UserError
from stgan_utils.files import atomic_path, read_json, sha256, write_json
from stgan_utils.lesions import CLASSES

KINDS = {"real": False, "generated": True}
# What all arms share. The first blocks are half of a step's time and hold a hundredth of the weights: frozen, three
# seeds of each arm become affordable on a CPU.
RECIPE = {"size": 96, "epochs": 5, "frozen_blocks": 4}
# The one that is released: no arm of the comparison, it is larger and trained for longer, small images first.
RELEASE, FIRST_PHASE = "release", "release-128px"


class Arm(NamedTuple):
    """A recipe: classifier settings beside `RECIPE`, and what else belongs to it."""

    text: str
    settings: dict
    # Which generated images join ("" none, "raw", "dedup", "filtered"), and how many of those that a class lacks to be
    # as large as the largest, 0 … 1.
    synthetic: str = ""
    share: float = 0.0
    # The arm whose weights it begins with: it is the second phase of that one.
    after: str = ""


PLAIN, ADJUSTED = {"logit_adjustment": 0.0}, {"logit_adjustment": 1.0}
ARMS = {
    "real": Arm("real images, plain cross-entropy", PLAIN),
    "balanced-sampling": Arm("… and every class drawn equally often", PLAIN | {"sampling": "balanced"}),
    "logit-adjustment": Arm("… and logit adjustment (τ = 1)", ADJUSTED),
    "trivial-augment": Arm("logit adjustment and TrivialAugment", ADJUSTED | {"augmentation": "trivial"}),
    "mixup": Arm("logit adjustment and MixUp", ADJUSTED | {"mix": "mixup"}),
    "cutmix": Arm("logit adjustment and CutMix", ADJUSTED | {"mix": "cutmix"}),
    "gan-raw": Arm("logit adjustment and generated images, raw, to balance", ADJUSTED, "raw", 1.0),
    "gan-dedup": Arm("… deduplicated, to balance", ADJUSTED, "dedup", 1.0),
    "gan-filtered": Arm("… deduplicated and filtered, to balance", ADJUSTED, "filtered", 1.0),
    "gan-filtered-50": Arm("… half of the way to balance", ADJUSTED, "filtered", 0.5),
    "gan-filtered-25": Arm("… a quarter of the way to balance", ADJUSTED, "filtered", 0.25),
    FIRST_PHASE: Arm("the released recipe, first phase", ADJUSTED | {"size": 128, "epochs": 10}),
    RELEASE: Arm(
        "the released recipe",
        ADJUSTED | {"size": 224, "epochs": 6, "learning_rate": 5e-4, "views": 2},
        after=FIRST_PHASE,
    ),
}
COMPARED = [name for name in ARMS if name not in (RELEASE, FIRST_PHASE)]
REAL_ONLY = [name for name in COMPARED if not ARMS[name].synthetic]
# The curve over the share of generated images.
SHARES = ["logit-adjustment", "gan-filtered-25", "gan-filtered-50", "gan-filtered"]


def train(name, run_dir, seed):
    """Train one arm with one seed; a finished one is left alone, a killed one goes on.

    Args:
        name: a key of `ARMS`.
        run_dir: a run folder with 00 and, for arms with generated images, 01, 03 and 04.

    Returns:
        The folder, `run_dir/arms/NAME/seedN`: model.safetensors, history.csv, predictions.csv (validation and test
        lesions), result.json (nothing of the test lesions in it).

    Raises:
        UserError: no such arm, or a step that has not run.
    """
    arm, run_dir = _arm(name), Path(run_dir)
    real = _real(run_dir)
    before = train(arm.after, run_dir, seed) if arm.after else None
    settings = _settings(arm, seed, before, epoch_images=int((real["split"] == "train").sum()))
    folder = run_dir / "arms" / name / f"seed{seed}"
    table = pd.concat([real, choose_generated(run_dir, real, arm, settings)], ignore_index=True)
    images = data.image_cache(table, settings.size)
    rows = {split: table.index[table["split"] == split] for split in ("train", "val", "test")}
    began = time.monotonic()
    history = finetune.train(settings, images, table["label"], rows["train"], rows["val"], folder)
    if (folder / "result.json").exists():
        return folder
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
    write_json(folder / "result.json", result | {"validation": validation})
    return folder


def refit(name, run_dir):
    """Train an arm's recipe once more on *all* real images, held-out ones too: what is released.

    Nothing is left to judge it by: its figures are those of the arm's own training, `judge`. The temperature is that
    one's as well.

    Returns:
        The folder, `run_dir/arms/NAME/refit`: model.safetensors, history.csv, result.json.

    Raises:
        UserError: an arm with generated images, or one that was not trained with seed 0.
    """
    arm, run_dir = _arm(name), Path(run_dir)
    if arm.synthetic:
        raise UserError(
            f"Arm {name} learns from generated images of the train split: only real-only arms are refitted."
        )
    source = run_dir / "arms" / name / "seed0"
    _require(source / "result.json", f"`arms train {name}`")
    real = _real(run_dir)
    temperature = Classifier.load(source / finetune.MODEL_FILE).answering["temperature"]
    settings = _settings(arm, 0, refit(arm.after, run_dir) if arm.after else None, temperature=temperature)
    folder = run_dir / "arms" / name / "refit"
    images = data.image_cache(real, settings.size)
    began = time.monotonic()
    finetune.train(settings, images, real["label"], real.index, None, folder)
    counts = real["label"].value_counts()
    write_json(
        folder / "result.json",
        _result(name, settings, folder, {"real": {code: int(counts[code]) for code in CLASSES}}, began),
    )
    return folder


def judge(name, run_dir, bootstrap=1000):
    """`evaluation.evaluate` of an arm's seed 0 on the real test lesions, and `evaluation.by_subgroups`."""
    run_dir = Path(run_dir)
    folder = run_dir / "arms" / name / "seed0"
    _require(folder / "predictions.csv", f"`arms train {name}`")
    answers = _test_answers(folder)
    proba, test = answers[list(CLASSES)], _real(run_dir).query("split == 'test'").reset_index(drop=True)
    assert list(test["image_id"]) == list(answers["image_id"]), f"{folder} was judged on other images"
    return (
        evaluation.evaluate(test["label"], proba, test["lesion_id"], bootstrap),
        evaluation.by_subgroups(test, test["label"], proba, bootstrap),
    )


def choose_generated(run_dir, real, arm, settings):
    """The generated images that an arm trains on, as rows of the dataset table (`synthetic` True, `split` "train").

    Of each class the first ones in the order of their names, as many as `share` of the gap to the largest class asks
    for; fewer where there are no more. "dedup" keeps what step 04 kept; "filtered" keeps of these what the baseline of
    step 01, trained on real images only, takes for the class that was asked for.
    """
    if not arm.synthetic:
        return real[:0]
    _require(run_dir / "04_deduplicate" / "dedup.csv", "04_deduplicate")
    made = pd.read_csv(run_dir / "04_deduplicate" / "dedup.csv").rename(columns={"class": "label"})
    if arm.synthetic != "raw":
        made = made[made["kept"]]
    if arm.synthetic == "filtered":
        _require(run_dir / "01_baseline" / finetune.MODEL_FILE, "01_baseline")
        baseline = Classifier.load(run_dir / "01_baseline" / finetune.MODEL_FILE).to(device.pick())
        said = baseline.predict_proba(data.image_cache(made.reset_index(drop=True), baseline.size)).idxmax(axis=1)
        made = made[said.to_numpy() == made["label"].to_numpy()]
    sizes = real.loc[real["split"] == "train", "label"].value_counts()
    wanted = ((sizes.max() - sizes) * arm.share).round().astype(int)
    place = made.groupby("label").cumcount()
    made = made[place < made["label"].map(wanted)]
    return made[["path", "label"]].assign(synthetic=True, split="train")


def compare(run_dir, bootstrap=1000):
    """The table of all arms that are trained, on real test lesions.

    Intervals resample lesions and seeds together. The arm to beat is the one without generated images that is best on
    the *validation* lesions.

    Returns:
        DataFrame, a row an arm in the order of `ARMS`: arm, text, command, seeds, generated (images), filled (the share
        of the gap to balance that they fill, 0 … 1), val (balanced accuracy, mean), to_beat, and value, `_low`, `_high`
        of accuracy, balanced_accuracy, macro_auc, mel_sensitivity_at_90 and difference (of the balanced accuracy to
        that of the arm to beat).

    Raises:
        UserError: no trained arm, arms with different numbers of seeds, or none without generated images.
    """
    folders = {name: sorted(Path(run_dir).glob(f"arms/{name}/seed*/result.json")) for name in COMPARED}
    folders = {name: found for name, found in folders.items() if found}
    if not set(folders) & set(REAL_ONLY):
        raise UserError(f"{run_dir} has no trained arm without generated images: `arms train real` makes one.")
    seeds = {name: len(found) for name, found in folders.items()}
    if len(set(seeds.values())) > 1:
        raise UserError(f"The arms have different numbers of seeds ({seeds}): train those that are missing.")
    results = {name: [read_json(path) for path in found] for name, found in folders.items()}
    answers = {name: [_test_answers(path.parent) for path in found] for name, found in folders.items()}
    val = {
        name: sum(r["validation"]["balanced_accuracy"] for r in found) / len(found) for name, found in results.items()
    }
    to_beat = max(set(folders) & set(REAL_ONLY), key=val.get)
    truth = answers[to_beat][0]
    rows = []
    for name in folders:
        figures = evaluation.over_seeds(
            truth["label"], answers[name], answers[to_beat], truth["lesion_id"], bootstrap=bootstrap
        )
        row = {
            "arm": name,
            "text": ARMS[name].text,
            "command": f"python -m stgan_utils arms train {name} --run RUN",
            "seeds": seeds[name],
            **_filled(results[name][0]["training_images"]),
            "val": val[name],
            "to_beat": name == to_beat,
        }
        for figure, interval in figures.items():
            row |= {figure: interval["value"], f"{figure}_low": interval["low"], f"{figure}_high": interval["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table):
    """The table of `compare` for a README."""

    def shown(row, name, sign=""):
        return f"{row[name]:{sign}.3f} ({row[f'{name}_low']:{sign}.3f} … {row[f'{name}_high']:{sign}.3f})"

    head = "| arm | generated | balanced accuracy | difference | accuracy | AUC | `python -m stgan_utils …` |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in table.to_dict("records"):
        difference = "the one to beat" if row["to_beat"] else shown(row, "difference", "+")
        lines.append(
            f"| {row['text']} | {row['generated']:,} | {shown(row, 'balanced_accuracy')} | {difference} "
            f"| {shown(row, 'accuracy')} | {shown(row, 'macro_auc')} | `arms train {row['arm']} --run RUN` |"
        )
    return "\n".join(lines)


def write_comparison(run_dir):
    """Write `compare` as RUN_DIR/arms/arms.csv, arms.md and arms.png; returns the Markdown table."""
    folder, table = Path(run_dir) / "arms", compare(run_dir)
    text = markdown(table)
    with atomic_path(folder / "arms.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic_path(folder / "arms.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    with atomic_path(folder / "arms.png") as temporary:
        plots.arms(table, SHARES).savefig(temporary, dpi=130)
    return text


def write_judgement(name, run_dir):
    """Write `judge` as test.json and subgroups.csv into the arm's folder; returns its figures as text."""
    folder = Path(run_dir) / "arms" / name / "seed0"
    found, groups = judge(name, run_dir)
    write_json(folder / "test.json", found)
    with atomic_path(folder / "subgroups.csv") as temporary:
        groups.to_csv(temporary, index=False)
    lines = [f"{found['images']} images of {found['lesions']} lesions"]
    lines += ["{:24} {value:.3f} ({low:.3f} … {high:.3f})".format(k, **v) for k, v in found["metrics"].items()]
    return "\n".join(lines)


def _arm(name):
    if name not in ARMS:
        raise UserError(f"No arm {name!r}; there are {', '.join(ARMS)}.")
    return ARMS[name]


def _settings(arm, seed, before, **more):
    start_from = str(before / finetune.MODEL_FILE) if before else ""
    return ClassifierSettings(**{**RECIPE, **arm.settings, **more, "seed": seed, "start_from": start_from})


def _result(name, settings, folder, images, began):
    return {
        "arm": name,
        "text": ARMS[name].text,
        "settings": asdict(settings),
        "training_images": images,
        "backbone": Classifier.load(folder / finetune.MODEL_FILE).settings["backbone"],
        "model_sha256": sha256(folder / finetune.MODEL_FILE),
        "seconds": time.monotonic() - began,
        "device": device.describe(),
        "commit": runs.git_commit(),
    }


def _filled(images):
    """How many generated images an arm had, and which share of the gap to balance that is: what was asked for, or less
    where the filters left less."""
    generated, real = sum(images["generated"].values()), images["real"].values()
    return {"generated": generated, "filled": generated / (len(real) * max(real) - sum(real))}


def _real(run_dir):
    path = run_dir / "00_start_here" / "table.csv"
    _require(path, "00_start_here")
    return data.read_table(path).assign(synthetic=False)


def _test_answers(folder):
    answers = pd.read_csv(folder / "predictions.csv")
    return answers[answers["split"] == "test"].reset_index(drop=True)


def _require(path, step):
    if not path.exists():
        raise UserError(f"{path} is missing: run step {step} first.")
