"""The whole sequence in `smoke` through papermill, as a user runs it; and what users get wrong."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from stgan_utils import ablation, checkpoints, config, generation, pipeline, runs, weights
from stgan_utils.files import sha256
from stgan_utils.lesions import CLASSES, MINORITY


def command(*words, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A run folder that the smoke profile has gone through from the first step to the report."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    ran = command("stgan_utils", "run", "--data", "phantom", "--profile", "smoke", "--out", folder, "--jobs", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


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
    assert runs.result(smoke, runs.START)["data_name"].startswith(runs.PHANTOM_NAME)


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


def test_on_two_nodes_of_a_ray_cluster_the_same_comes_out_bit_for_bit(smoke, cluster, tmp_path):
    cluster.add_node(num_cpus=1)
    out = tmp_path / "ray"
    words = ("--data", "phantom", "--profile", "smoke", "--out", out, "--engine", "ray", "--address", cluster.address)
    ran = command("stgan_utils", "run", *words)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for step in pipeline.STEPS:
        here, there = (runs.result(folder, step.name) for folder in (smoke, out))
        assert here["models"] == there["models"]
    made = sorted(path.relative_to(smoke) for path in smoke.glob("03_stage2_*/images/*.png"))
    assert len(made) == 6 * 24
    for file in (*made, "05_classifier/test_predictions.csv"):
        assert (smoke / file).read_bytes() == (out / file).read_bytes(), file


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


def test_deduplication_alone_on_any_folder(smoke, tmp_path):
    images = tmp_path / "mine"
    shutil.copytree(smoke / "03_stage2_DF" / "images", images)
    first = min(images.iterdir())
    shutil.copy(first, images / f"zz_copy_of_{first.name}")
    notebook = ROOT / "notebooks" / "04_deduplicate.ipynb"
    words = ["-p", "images", str(images), "-p", "run_dir", str(tmp_path / "out")]
    ran = command("papermill", notebook, tmp_path / "out.ipynb", *words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    rows = pd.read_csv(tmp_path / "out" / "04_deduplicate" / "dedup.csv")
    copy = rows[rows["path"].str.contains("zz_copy_of")].iloc[0]
    assert len(rows) == len(list(images.iterdir()))
    assert not copy["kept"] and copy["removed_by"] == "phash" and copy["distance"] < 10


@pytest.fixture
def started(smoke, tmp_path):
    """A run folder with the first two steps done."""
    for name in (runs.START, "01_baseline"):
        shutil.copytree(smoke / name, tmp_path / "run" / name)
    return tmp_path / "run"


def run_stage2(folder, *words):
    arguments = ["--data", "phantom", "--profile", "smoke", "--out", folder, "--only", "03_stage2_DF", *words]
    return command("stgan_utils", "run", *arguments)


def test_stage2_without_stage1_names_the_notebook_to_run(started):
    ran = run_stage2(started)
    assert ran.returncode == 2
    assert "02_stage1_global_gan" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


def test_stage2_refuses_a_checkpoint_of_another_size(smoke, started):
    shutil.copytree(smoke / "02_stage1_global_gan", started / "02_stage1_global_gan")
    ran = run_stage2(started, "-p", "stage2.size", "128")
    assert ran.returncode == 2
    assert "64 px" in ran.stderr and "128 px" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


def test_stage2_refuses_a_class_with_fewer_images_than_a_batch(smoke, started):
    shutil.copytree(smoke / "02_stage1_global_gan", started / "02_stage1_global_gan")
    ran = run_stage2(started, "-p", "stage2.batch_size", "64")
    assert ran.returncode == 2
    assert "fewer than a batch of 64" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1
    # Asked again with what fits, the same folder goes on.
    assert run_stage2(started).returncode == 0


def test_auto_trains_where_nothing_released_fits_and_says_so(smoke, started):
    shutil.copytree(smoke / "02_stage1_global_gan", started / "02_stage1_global_gan")
    ran = run_stage2(started, "-p", "stage2.weights", "auto")  # nobody releases networks as narrow as these
    assert ran.returncode == 0, ran.stderr
    assert "No released DF weights at 64 px, ngf 8, nz 256: training." in _outputs(started, "03_stage2_DF")
    result = runs.result(started, "03_stage2_DF")
    assert result["numbers"]["kid_best"] is not None and "released" not in result["numbers"]
    by_origin = {model["origin"]: model["sha256"] for model in result["models"]}
    assert by_origin["used: to start from"] == sha256(started / "02_stage1_global_gan" / "checkpoint.safetensors")
    assert by_origin["made here"] == sha256(started / "03_stage2_DF" / "best.safetensors")


def test_released_weights_stand_in_for_training(started):
    quick = {"stage1": config.resolve("stage1", "quick"), "stage2": config.resolve("stage2", "quick", {"lesion": "DF"})}
    released = [weights.choose_released(settings) for settings in quick.values()]
    if not all(released):
        pytest.skip("no weights of the quick profile are released")
    words = ["--data", "phantom", "--profile", "smoke", "--out", started, "-p", "ngf", "16", "-p", "weights", "auto"]
    for kind, settings in quick.items():
        words += ["-p", f"{kind}.size", settings.size]
    for asset, step in zip(released, ("02_stage1_global_gan", "03_stage2_DF"), strict=True):
        ran = command("stgan_utils", "run", *words, "--only", step)
        assert ran.returncode == 0, ran.stderr
        said = _outputs(started, step)
        assert f"**Nothing is trained here: released weights `{asset['name']}`, SHA-256 `{asset['sha256']}`.**" in said
        assert "a KID to drawn ones would mean nothing" in said or "KID is left out" in said
        result = runs.result(started, step)
        (model,) = result["models"]
        assert model["origin"] == f"released: {asset['name']}" and model["sha256"] == asset["sha256"]
        assert sha256(started / step / model["file"]) == asset["sha256"]
        assert result["numbers"]["quality"] is None and asset["name"] in result["learnt"]
        assert {"samples", "interpolation"} <= {figure["file"][8:-4] for figure in result["figures"]}
        assert not (started / step / "history.csv").exists()
    rows = pd.read_csv(started / "03_stage2_DF" / "synthetic.csv")
    assert set(rows["checkpoint_sha256"]) == {released[1]["sha256"]} and len(rows) == 24


def _outputs(run_dir, step):
    """What an executed notebook printed and displayed as Markdown."""
    notebook = json.loads((run_dir / "notebooks" / f"{step}.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(o.get("text", o.get("data", {}).get("text/markdown", ""))) for o in outputs)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: folder / "nowhere", "nowhere"),
        (lambda folder: _without_dx(folder), "dx"),
        (lambda folder: _unknown_label(folder), "zebra"),
        (lambda folder: _cut_short(folder), "PHANTOM_"),
    ],
    ids=["no such folder", "metadata without dx", "unknown label", "truncated JPEG"],
)
def test_bad_data_is_one_sentence_and_status_2(spoil, named, phantom_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    out = tmp_path / "out"
    ran = command("stgan_utils", "run", "--data", spoil(folder), "--profile", "smoke", "--out", out, "--only", "00")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert named in ran.stderr and len(ran.stderr.strip().splitlines()) == 1
    assert not (out / runs.START / "result.json").exists()


def _without_dx(folder):
    table = pd.read_csv(folder / "HAM10000_metadata.csv")
    table.drop(columns="dx").to_csv(folder / "HAM10000_metadata.csv", index=False)
    return folder


def _unknown_label(folder):
    table = pd.read_csv(folder / "HAM10000_metadata.csv")
    table.loc[5, "dx"] = "zebra"
    table.to_csv(folder / "HAM10000_metadata.csv", index=False)
    return folder


def _cut_short(folder):
    image = next(folder.rglob("*.jpg"))
    image.write_bytes(image.read_bytes()[:400])
    return folder


def test_real_images_go_through_the_first_step(ham10000, tmp_path):
    out = tmp_path / "real"
    ran = command("stgan_utils", "run", "--data", ham10000, "--profile", "smoke", "--out", out, "--only", "00")
    assert ran.returncode == 0, ran.stderr
    counts = json.loads((out / runs.START / "result.json").read_text())["numbers"]["counts"]
    found = {code: sum(counts[code][split] for split in ("train", "val", "test")) for code in CLASSES}
    assert found == {"AKIEC": 183, "BCC": 264, "BKL": 583, "DF": 60, "MEL": 491, "NV": 4323, "VASC": 80}
