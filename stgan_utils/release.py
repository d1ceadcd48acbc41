"""Releasing: the models of a finished run as small files in `weights/`, each with its entry in the manifest.

Matrices go to half precision; vectors (BatchNorm, singular vectors) are few and stay as they are. Loaded, everything is
float32 again, and the pictures differ from the original's by two grey levels at most, or nothing is released.
"""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import jsonschema
import numpy as np
from PIL import Image

from stgan_utils import checkpoints, config, generation, runs, weights
from stgan_utils import data as datasets
from stgan_utils.config import UserError
from stgan_utils.features import feature_extractor
from stgan_utils.files import atomic_path, read_json, sha256, write_json
from stgan_utils.lesions import CLASSES, MINORITY
from stgan_utils.quality import kid

LIMIT = 60_000_000  # bytes, all released files together
FURTHEST = 2  # grey levels between a pixel of the original and of the released generator
GENERATED = 500  # images behind a KID
LICENCE = "CC BY-NC 4.0, as HAM10000 (P. Tschandl et al., Sci. Data 5, 180161, 2018)"
BASELINE, STAGE1, CLASSIFIER = "01_baseline", "02_stage1_global_gan", "05_classifier"
SCHEMA = Path(__file__).with_name("weights_manifest.schema.json")


def release(run_dir):
    """Put a run's Stage 1 (with its discriminator), its six Stage-2 generators and its better classifier into weights/.

    The better classifier is the one with the higher balanced accuracy on real validation images. A generator's KID is
    measured against real images of the validation and test splits, which it has not seen. `weights/samples.png` gets a
    row of eight images from each generator.

    Returns:
        {name: megabytes}, and "together".

    Raises:
        UserError: a step is not finished, more than 60 MB, or half precision changes the pictures.
    """
    run_dir, target = Path(run_dir), weights.ROOT / "weights"
    steps = {code: f"03_stage2_{code}" for code in MINORITY}
    results = {step: runs.result(run_dir, step) for step in (runs.START, BASELINE, STAGE1, *steps.values(), CLASSIFIER)}
    if missing := [step for step, found in results.items() if found is None and step != CLASSIFIER]:
        raise UserError(f"{run_dir} is not a finished run: {', '.join(missing)} is not done.")
    distance = _Distance(run_dir)
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as made:
        made = Path(made)
        assets, rows = [], []
        generators = {None: STAGE1} | steps
        for code, step in generators.items():
            best = run_dir / step / "best.safetensors"
            name = f"stage{'2-' + code.lower() if code else 1}-{checkpoints.load_generator(best).size}px"
            file = made / f"{name}.safetensors"
            header = _write_half(best, file, run_dir / STAGE1 / "checkpoint.safetensors" if code is None else None)
            rows.append(_check_pictures(best, file))
            figures = {"feature_space": distance.extractor.name, "kid_held_out": distance(file)}
            if code:
                figures["kid_held_out"] = {code: figures["kid_held_out"][code]}
                figures["kid_held_out_of_stage1"] = {code: assets[0]["figures"]["kid_held_out"][code]}
                figures["memorisation"] = results[step]["numbers"]["memorisation"]
            assets.append(_entry(file, header, "stage2" if code else "stage1", code, results, step, figures))
        step, figures = _better_classifier(results)
        file = made / "classifier-mobilenetv2.safetensors"
        header = _write_half(run_dir / step / "model.safetensors", file)
        assets.append(_entry(file, header, "classifier", None, results, step, figures))

        total = sum(asset["bytes"] for asset in assets)
        if total > LIMIT:
            raise UserError(f"The files have {total / 1e6:.1f} MB together, {LIMIT / 1e6:.0f} MB may be released.")
        for asset in assets:
            os.replace(made / asset["file"], target / asset["file"])
    with atomic_path(target / "samples.png") as temporary:
        Image.fromarray(generation.mosaic(np.concatenate(rows))).save(temporary)
    _write_manifest(assets)
    return {asset["name"]: asset["bytes"] / 1e6 for asset in assets} | {"together": total / 1e6}


def half(tensors):
    """Tensors by name, matrices and kernels in half precision."""
    return {name: t.half() if t.is_floating_point() and t.ndim > 1 else t for name, t in tensors.items()}


def _write_half(source, target, training=None):
    """One of our files in half precision, with the discriminator of a training checkpoint; returns its header."""
    tensors, header = checkpoints.load(source)
    if training and training.exists():
        discriminator = checkpoints.without_prefix("discriminator", checkpoints.load(training)[0])
        tensors |= checkpoints.prefixed("discriminator", discriminator)
    header["released_from"] = sha256(source)
    if header["settings"].get("start_from"):
        header["settings"]["start_from"] = Path(header["settings"]["start_from"]).name
    checkpoints.save(target, half(tensors), header)
    return header


def _check_pictures(original, released):
    """Eight images of the released generator."""
    before, after = (generation.sample(checkpoints.load_generator(file), 0, range(8)) for file in (original, released))
    difference = int(np.abs(before.astype(int) - after).max())
    if difference > FURTHEST:
        raise UserError(f"In half precision, pictures of {original} change by {difference} grey levels: not released.")
    return after


class _Distance:
    """KID of a generator's file to the real images of each class that no GAN of the run has seen."""

    def __init__(self, run_dir):
        table = datasets.read_table(run_dir / runs.START / "table.csv")
        held_out = table[table["split"] != "train"]
        self.extractor = feature_extractor("auto", run_dir / BASELINE / "model.safetensors")
        size = checkpoints.load_generator(run_dir / STAGE1 / "best.safetensors").size
        self.real = {
            code: self.extractor(datasets.load_images(rows["path"], size)) for code, rows in held_out.groupby("label")
        }

    def __call__(self, file):
        images = generation.sample(checkpoints.load_generator(file), 0, range(GENERATED))
        made = self.extractor(images)
        found = {}
        for code in CLASSES:
            figures = kid(self.real[code], made)
            values = {name: round(figures[name], 4) for name in ("kid", "low", "high")}
            found[code] = values | {"real": len(self.real[code]), "generated": GENERATED}
        return found


def _better_classifier(results):
    """(step, figures) of the classifier that is better on real validation images."""
    found = {BASELINE: {"validation": results[BASELINE]["numbers"]["val"]}}
    if results[CLASSIFIER]:
        numbers = results[CLASSIFIER]["numbers"]
        found[BASELINE]["test"] = numbers["test"]["real only"]
        found[CLASSIFIER] = {
            "validation": numbers["validation"]["real validation"],
            "test": numbers["test"]["real + generated"],
        }
    step = max(found, key=lambda step: found[step]["validation"]["metrics"]["balanced_accuracy"]["value"])
    figures = {split: {"images": f["images"], **f["metrics"]} for split, f in found[step].items()}
    return step, {"trained_with_generated_images": step == CLASSIFIER, **figures}


def _entry(file, header, stage, code, results, step, figures):
    return {
        "name": file.stem,
        "stage": stage,
        "lesion_class": code,
        "architecture": header["architecture"],
        "class_order": header["class_order"] if stage == "classifier" else None,
        "preprocessing": header.get("preprocessing", {"range": [-1, 1]}),
        "file": file.name,
        "unpack": False,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "licence": LICENCE,
        "trained_on": {
            "data": results[runs.START]["data_name"] + (f", {code} only" if code else ""),
            "split": f"train, by lesion, seed {results[runs.START]['settings']['seed']}",
            "iterations": header.get("iteration"),
            "command": _command(results, step),
            "commit": header["git_commit"],
        },
        "figures": figures,
        "sources": {"repo": f"weights/{file.name}", "kaggle": None, "url": None},
    }


def _command(results, step):
    """What makes a step again: the profile, and each setting in which the run differed from it."""
    result = results[step]
    kind = {BASELINE: "baseline", STAGE1: "stage1", CLASSIFIER: "classifier"}.get(step, "stage2")
    usual = asdict(config.resolve(kind, result["profile"]))
    own = {name: value for name, value in result["settings"].items() if name not in ("lesion", "start_from")}
    words = [f"-p {kind}.{name} {value}" for name, value in own.items() if value != usual.get(name)]
    data = "phantom" if result["data"] == runs.PHANTOM else "FOLDER"
    return " ".join([f"python -m stgan_utils run --data {data} --profile {result['profile']}", *words])


def _write_manifest(assets):
    manifest = read_json(weights.MANIFEST)
    names = [asset["name"] for asset in assets]
    manifest["assets"] = assets + [asset for asset in manifest["assets"] if asset["name"] not in names]
    jsonschema.validate(manifest, read_json(SCHEMA))
    write_json(weights.MANIFEST, manifest)
