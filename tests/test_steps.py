"""Single steps as users run them: out of order, on folders of their own, with released weights, with bad data."""

import json
import shutil

import pandas as pd
import pytest
from conftest import ROOT, command

from stgan_utils import config, data, runs, weights
from stgan_utils.files import sha256
from stgan_utils.lesions import CLASSES


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


def test_the_prior_systems_generated_images_count_as_real_nowhere(phantom_dir, tmp_path):
    of_class = data.load_dataset(str(phantom_dir)).groupby("label").head(5)
    rows, prior = [], tmp_path / "prior"
    (prior / "images").mkdir(parents=True)
    for place, image in enumerate(of_class.sort_values("label").itertuples()):
        name = f"{image.label}_{place:04}_{'RRRFF'[place % 5]}.jpg"
        shutil.copy(image.path, prior / "images" / name)
        rows.append([name, *(int(code == image.label) for code in CLASSES)])
    pd.DataFrame(rows, columns=["filename", *CLASSES]).to_csv(prior / "synthetic_dataset_labels.csv", index=False)
    out = tmp_path / "out"
    ran = command("stgan_utils", "run", "--data", prior, "--profile", "smoke", "--out", out, "--only", "00")
    assert ran.returncode == 0, ran.stderr
    table = data.read_table(out / runs.START / "table.csv")
    assert len(table) == 21 and table["image_id"].str.endswith("_R").all() and "synthetic" not in table
    assert "14 images made by a GAN are set aside" in (out / "notebooks" / "00_start_here.ipynb").read_text()
