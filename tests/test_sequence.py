"""The whole sequence in `smoke` through papermill, as a user runs it."""

import time
from dataclasses import asdict

import numpy as np
import pandas as pd
from conftest import command
from PIL import Image

from stgan_utils import ablation, checkpoints, config, generation, pipeline, runs, steps
from stgan_utils.files import sha256
from stgan_utils.lesions import CLASSES, MINORITY


def test_every_step_left_its_result(smoke):
    for step in pipeline.STEPS:
        result = runs.result(smoke, step.name)
        assert result["learnt"] and result["profile"] == "smoke" and result["data"] == "phantom"
        assert result["seed"] == 0 or step.kind in ("dedup", "report", "post_mortem")
        for figure in result["figures"]:
            Image.open(smoke / step.name / figure["file"]).verify()
        for model in result["models"]:
            assert sha256(smoke / step.name / model["file"]) == model["sha256"]
        assert (smoke / "notebooks" / step.notebook.name).exists()


def test_every_figure_of_drawn_images_says_so(smoke):
    page = (smoke / "report.html").read_text(encoding="utf-8")
    assert "drawn, not photographed" in page and "Not a medical device" in page
    assert runs.result(smoke, runs.START)["data_name"].startswith(steps.PHANTOM_NAME)


def test_stage2_generates_from_its_best_checkpoint_and_any_image_can_be_made_again(smoke):
    for code in MINORITY:
        folder = smoke / f"03_stage2_{code}"
        numbers = runs.result(smoke, folder.name)["numbers"]
        assert numbers["kid_best"] == min(numbers["quality_history"]["kid"])
        rows = pd.read_csv(folder / "synthetic.csv")
        assert len(rows) == numbers["generated"] == len(list((folder / "images").glob("*.png")))
        assert set(rows["checkpoint_sha256"]) == {sha256(folder / "best.safetensors")}
        assert set(rows["class"]) == {code}
    row = rows.iloc[3]
    generator = checkpoints.load_generator(folder / "best.safetensors")
    again = generation.sample(generator, row["seed"], [row["latent_index"]])[0].astype(int)
    assert abs(again - np.asarray(Image.open(folder / row["file"]))).max() <= 1


def test_the_ablation_shows_three_arms_and_leaves_the_training_alone(smoke):
    for code in MINORITY:
        folder = smoke / f"03_stage2_{code}"
        curves = pd.DataFrame(runs.result(smoke, folder.name)["numbers"]["ablation"])
        assert list(curves["arm"].unique()) == list(ablation.ARMS) and curves["iteration"].max() == 1
        assert curves[["kid", "barlow", "margin"]].notna().all(axis=None)
        assert [path.name for path in (folder / "ablation").iterdir()] == ["ablation.json"]
        settings = config.resolve("stage2", "smoke", {"lesion": code})
        assert checkpoints.read_header(folder / "checkpoint.safetensors")["settings"] == asdict(settings)


def test_no_gan_saw_a_validation_or_test_image_and_only_real_ones_judge(smoke):
    table = pd.read_csv(smoke / runs.START / "table.csv")
    per_split = table["split"].value_counts()
    numbers = runs.result(smoke, "05_classifier")["numbers"]
    for arm in numbers["test"].values():
        assert arm["images"] == per_split["test"] and arm["classes"] == list(CLASSES)
    assert numbers["validation"]["real validation"]["images"] == per_split["val"]
    for code in MINORITY:
        train = (table["split"].eq("train") & table["label"].eq(code)).sum()
        assert runs.result(smoke, f"03_stage2_{code}")["numbers"]["real"] == train


def test_a_second_run_has_nothing_to_do(smoke):
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("result.json")}
    began = time.monotonic()
    ran = command("stgan_utils", "run", "--data", "phantom", "--profile", "smoke", "--out", smoke)
    assert ran.returncode == 0 and ran.stdout.count("skipped") == len(pipeline.STEPS)
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("result.json")} == before
    assert time.monotonic() - began < 20  # nothing was trained


def test_other_settings_in_the_same_folder_are_refused_and_nothing_is_lost(smoke):
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("*") if path.is_file()}
    ran = command(
        "stgan_utils", "run", "--profile", "smoke", "--out", smoke, "-p", "stage1.iterations", "9", "-p", "seed", "1"
    )
    assert ran.returncode == 2 and "--force" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("*") if path.is_file()} == before
