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

from stgan_utils import card, checkpoints, config, generation, runs, weights
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
BASELINE, STAGE1 = "01_baseline", "02_stage1_global_gan"
SCHEMA = Path(__file__).with_name("weights_manifest.schema.json")


def release(run_dir=None, classifier=None):
    """Put a run's GANs, a classifier or both into weights/, with their entries in the manifest and the model card.

    Args:
        run_dir: a finished run that trained its GANs: Stage 1 (with its discriminator) and the six Stage-2 generators
            are released. A generator's KID is measured against real images of the validation and test splits, which it
            has not seen; `weights/samples.png` gets a row of eight images from each.
        classifier: a folder with model.safetensors and result.json as `arms train` and `arms refit` leave them, in the
            run folder where they left it.

    Returns:
        {name: megabytes}, and "together", all that weights/ then holds.

    Raises:
        UserError: nothing to release, a step is not finished or was not trained, no such classifier, more than 60 MB,
            or half precision changes the pictures.
    """
    if not run_dir and not classifier:
        raise UserError("Nothing to release: name a run folder, --classifier FOLDER, or both.")
    if classifier:
        _classifier_result(Path(classifier))  # known before minutes of measuring
    target = weights.ROOT / "weights"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as made:
        made = Path(made)
        assets, rows = _release_generators(Path(run_dir), made) if run_dir else ([], [])
        if classifier:
            assets.append(_classifier_entry(Path(classifier), made / "classifier-mobilenetv2.safetensors"))
        manifest = _manifest_with(assets)
        total = sum(asset["bytes"] for asset in manifest["assets"] if asset["sources"]["repo"])
        if total > LIMIT:
            raise UserError(f"The files have {total / 1e6:.1f} MB together, {LIMIT / 1e6:.0f} MB may be released.")
        for asset in assets:
            os.replace(made / asset["file"], target / asset["file"])
    if rows:
        with atomic_path(target / "samples.png") as temporary:
            Image.fromarray(generation.mosaic(np.concatenate(rows))).save(temporary)
    write_json(weights.MANIFEST, manifest)
    card.write(target / "README.md", manifest["assets"])
    return {asset["name"]: asset["bytes"] / 1e6 for asset in assets} | {"together": total / 1e6}


def _release_generators(run_dir, folder):
    """Half-precision files in `folder`; their manifest entries, and eight images of each, (8, S, S, 3) uint8."""
    steps = {code: f"03_stage2_{code}" for code in MINORITY}
    results = {step: runs.result(run_dir, step) for step in (runs.START, STAGE1, *steps.values())}
    if missing := [step for step, found in results.items() if found is None]:
        raise UserError(f"{run_dir} is not a finished run: {', '.join(missing)} is not done.")
    if borrowed := [step for step, found in results.items() if "released" in found["numbers"]]:
        raise UserError(f"{run_dir} trained nothing in {', '.join(borrowed)}: it used released weights.")
    distance = HeldOutDistance(run_dir)
    assets, rows = [], []
    for code, step in ({None: STAGE1} | steps).items():
        best = run_dir / step / "best.safetensors"
        name = f"stage{'2-' + code.lower() if code else 1}-{checkpoints.load_generator(best).size}px"
        file = folder / f"{name}.safetensors"
        header = _write_half(best, file, run_dir / STAGE1 / "checkpoint.safetensors" if code is None else None)
        rows.append(_check_pictures(best, file))
        measured = distance(file, [code] if code else CLASSES)
        figures = {"feature_space": distance.extractor.name, "kid_held_out": measured}
        if code:
            figures["kid_held_out_of_stage1"] = {code: assets[0]["figures"]["kid_held_out"][code]}
            figures["memorisation"] = results[step]["numbers"]["memorisation"]
        assets.append(_generator_entry(file, header, code, results, step, figures))
    return assets, rows


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
    for name in ("start_from", "continue_from"):  # a path of the machine that it was trained on
        if header["settings"].get(name):
            header["settings"][name] = Path(header["settings"][name]).name
    checkpoints.save(target, half(tensors), header)
    return header


def _check_pictures(original, released):
    """Eight images of the released generator."""
    before, after = (generation.sample(checkpoints.load_generator(file), 0, range(8)) for file in (original, released))
    difference = int(np.abs(before.astype(int) - after).max())
    if difference > FURTHEST:
        raise UserError(f"In half precision, pictures of {original} change by {difference} grey levels: not released.")
    return after


class HeldOutDistance:
    """KID of a generator's file to the real images of classes that no GAN of a run has seen, by class.

    {class: {"kid", "low", "high", "real" and "generated" (numbers of images)}}, in the features of `extractor`.
    """

    def __init__(self, run_dir):
        table = datasets.read_table(run_dir / runs.START / "table.csv")
        held_out = table[table["split"] != "train"]
        self.extractor = feature_extractor("auto", run_dir / BASELINE / "model.safetensors")
        size = checkpoints.load_generator(run_dir / STAGE1 / "best.safetensors").size
        self.real = {
            code: self.extractor(datasets.load_images(rows["path"], size)) for code, rows in held_out.groupby("label")
        }

    def __call__(self, file, classes=CLASSES):
        made = self.extractor(generation.sample(checkpoints.load_generator(file), 0, range(GENERATED)))
        found = {}
        for code in classes:
            figures = kid(self.real[code], made)
            values = {name: round(figures[name], 4) for name in ("kid", "low", "high")}
            found[code] = values | {"real": len(self.real[code]), "generated": GENERATED}
        return found


def _classifier_result(folder):
    if not (folder / "model.safetensors").exists() or not (folder / "result.json").exists():
        raise UserError(f"{folder} holds no trained classifier: model.safetensors and result.json are expected there.")
    result = read_json(folder / "result.json")
    if result["model_sha256"] != sha256(folder / "model.safetensors"):
        raise UserError(f"{folder / 'result.json'} tells of another model.safetensors: train the classifier again.")
    return result


def _classifier_entry(folder, file):
    """The entry of a trained classifier, which goes to `file`; its figures are of lesions that it did not learn from.

    Of one that went on with all images nothing is left to judge: its figures are those that it had before.
    """
    result = _classifier_result(folder)
    start = runs.result(folder.resolve().parents[2], runs.START)
    if start is None:
        raise UserError(f"{folder} is not where `arms` leaves its classifiers, in a run folder: its data are unknown.")
    went_on = "validation" not in result
    judged = (folder.parent / "seed0" if went_on else folder) / "test" / "result.json"
    figures = {"went_on_with_all_images": went_on, "trained_with": result["training_images"]}
    if judged.exists():
        test = read_json(judged)
        figures["test"] = {"images": test["images"], **test["metrics"]}
    header = _write_half(folder / "model.safetensors", file)
    figures["answering"] = header["answering"]
    trained_on = {
        "data": start["data_name"],
        "split": "none: every image was trained on"
        if went_on
        else f"train, by lesion, seed {start['settings']['seed']}",
        "iterations": None,
        "command": f"python -m stgan_utils arms {'refit' if went_on else 'train'} {result['arm']} --run RUN",
        "commit": header["git_commit"],
    }
    stage = {"stage": "classifier", "class_order": header["class_order"]}
    return _entry(file, header, trained_on, figures) | stage


def _generator_entry(file, header, code, results, step, figures):
    start = results[runs.START]
    counts = {each: splits["train"] for each, splits in start["numbers"]["counts"].items()}
    own = code and header["iteration"]
    learnt = f"the {counts[code]:,} images of {code}" if own else f"the {sum(counts.values()):,} images"
    borrowed = " (Stage 1's own generator: none of Stage 2 came nearer)" if code and not own else ""
    trained_on = {
        "data": f"{start['data_name']}: {learnt} in the train split{borrowed}",
        "split": f"train, by lesion, seed {start['settings']['seed']}",
        "iterations": header["iteration"],
        "command": _command(results, step),
        "commit": header["git_commit"],
    }
    stage = {"stage": "stage2" if code else "stage1", "lesion_class": code}
    return _entry(file, header, trained_on, figures) | stage


def _entry(file, header, trained_on, figures):
    return {
        "name": file.stem,
        "stage": None,
        "lesion_class": None,
        "architecture": header["architecture"],
        "class_order": None,
        "preprocessing": header.get("preprocessing", {"range": [-1, 1]}),
        "file": file.name,
        "unpack": False,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "licence": LICENCE,
        "trained_on": trained_on,
        "figures": figures,
        "sources": {"repo": f"weights/{file.name}", "kaggle": None, "url": None},
    }


def _command(results, step):
    """What makes a step again: the profile, and each setting in which the run differed from it."""
    result, words = results[step], []
    for made in dict.fromkeys((STAGE1, step)):  # Stage 2 begins with what Stage 1 made
        kind = "stage1" if made == STAGE1 else "stage2"
        words += differing(results[made], kind)
    data = "phantom" if result["data"] == runs.PHANTOM else "FOLDER"
    return " ".join([f"python -m stgan_utils run --data {data} --profile {result['profile']} --out RUN", *words])


def differing(result, kind):
    """`-p KIND.NAME VALUE` for each setting in which a step differs from its profile, but for where it began."""
    usual = asdict(config.resolve(kind, result["profile"]))
    own = {name: value for name, value in result["settings"].items() if name not in ("lesion", "start_from")}
    return [f"-p {kind}.{name} {value}" for name, value in own.items() if value != usual.get(name)]


def _manifest_with(assets):
    manifest = read_json(weights.MANIFEST)
    names = [asset["name"] for asset in assets]
    manifest["assets"] = assets + [asset for asset in manifest["assets"] if asset["name"] not in names]
    jsonschema.validate(manifest, read_json(SCHEMA))
    return manifest
