"""The run folder: who may write where, and what a result holds."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from stgan_utils import files, plots, runs, steps
from stgan_utils.config import Stage1Settings, Stage2Settings, UserError, resolve

SETTINGS = Stage1Settings(iterations=7)


@pytest.fixture
def run_dir(tmp_path):
    """A run folder whose step 00 is done, on the embedded dataset."""
    step = steps.open_step(runs.START, resolve("data", "smoke"), "phantom", tmp_path, "smoke")
    step.finish({}, "")
    return tmp_path


def open_stage1(run_dir, settings=SETTINGS, data="phantom"):
    return steps.open_step("02", settings, data, run_dir, "smoke", needs=(runs.START,))


def test_fingerprint_ignores_order_and_time_budget_and_nothing_else():
    base = runs.fingerprint("02", SETTINGS, "phantom", {"00": "a", "01": "b"})
    assert base == runs.fingerprint("02", replace(SETTINGS, max_minutes=3), "phantom", {"01": "b", "00": "a"})
    stage2 = (Stage2Settings(), Stage2Settings(ablation_iterations=60))  # beside the training, not part of it
    assert len({runs.fingerprint("03", settings, "phantom", {}) for settings in stage2}) == 1
    others = [
        ("03", SETTINGS, "phantom", {"00": "a", "01": "b"}),
        ("02", replace(SETTINGS, nz=255), "phantom", {"00": "a", "01": "b"}),
        ("02", SETTINGS, "/data", {"00": "a", "01": "b"}),
        ("02", SETTINGS, "phantom", {"00": "a", "01": "c"}),
    ]
    assert base not in {runs.fingerprint(*other) for other in others}


def test_result_holds_what_was_collected(run_dir, capsys):
    step = open_stage1(run_dir)
    first_line = capsys.readouterr().out
    assert all(word in first_line for word in ("02", "phantom", str(step.folder)))

    figure = Figure()
    figure.subplots().plot([1, 2])
    step.figure(figure, "curve", "a line")
    step.table(pd.DataFrame({"n": [1, np.nan]}, index=pd.Index(["a", "b"], name="class")), "counts")
    (step.folder / "model.bin").write_bytes(b"abc")
    step.model(step.folder / "model.bin")
    (run_dir / runs.START / "earlier.bin").write_bytes(b"")
    step.model(run_dir / runs.START / "earlier.bin", "used: to start from")
    step.model(files.__file__, "used: elsewhere")
    step.finish({"kid": np.float32(0.5), "none": math.nan, "list": np.array([1, 2]), "deep": {"x": [math.inf]}}, "fine")

    stored = files.read_json(step.folder / "result.json")
    assert stored["numbers"] == {"kid": 0.5, "none": None, "list": [1, 2], "deep": {"x": [None]}}
    assert stored["figures"] == [{"file": "figures/curve.png", "caption": "a line"}]
    assert (step.folder / "figures" / "curve.png").exists()
    assert stored["tables"] == [{"title": "counts", "columns": ["class", "n"], "rows": [["a", 1.0], ["b", None]]}]
    assert stored["models"][0] == {
        "file": "model.bin",
        "origin": "made here",
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    # Inside the run folder relative, so that a run can be moved; outside as it is.
    assert [(model["file"], model["origin"]) for model in stored["models"][1:]] == [
        (f"../{runs.START}/earlier.bin", "used: to start from"),
        (files.__file__, "used: elsewhere"),
    ]
    assert stored["settings"]["iterations"] == 7
    assert stored["data_name"] == steps.PHANTOM_NAME
    assert open_stage1(run_dir).earlier(runs.START)["step"] == runs.START


@pytest.mark.parametrize("data", ["phantom", "photographed"])
def test_no_figure_of_phantom_images_calls_them_real(data, run_dir, tmp_path):
    (tmp_path / "real lesions").mkdir()
    step = open_stage1(run_dir) if data == "phantom" else None
    if step is None:
        step = steps.open_step("02", SETTINGS, tmp_path / "real lesions", tmp_path / "other", "real-cpu")
    word = "phantom" if data == "phantom" else "real"
    ours, beside, others = (
        plots.image_rows({"real": images, "unreal": images}, "Real, profile real-cpu")
        for images in [np.zeros((3, 8, 8, 3), np.uint8)] * 3
    )
    ours.legend(ours.axes[0].plot([0], [0]), ["real lesions"])
    step.figure(ours, "ours", "Real training images.")
    step.figure(beside, "beside", "Real ones.", f"real: {step.data_name}; generated: weights")
    step.figure(others, "others", "Real test images.", "as published: real")
    texts = [[text.get_text() for text in fig.findobj(Text)] for fig in (ours, beside, others)]
    assert {word, "unreal", f"{word.capitalize()}, profile real-cpu", f"{word} lesions"} <= set(texts[0])
    assert f"data: {step.data_name}" in texts[0]
    assert word in texts[1] and ("real" in texts[1]) == (data != "phantom")
    assert {"real", "Real, profile real-cpu", "data: as published: real"} <= set(texts[2])
    captions = [figure["caption"] for figure in step.figures]
    assert captions == [f"{word.capitalize()} training images.", f"{word.capitalize()} ones.", "Real test images."]
    assert step.finish({}, "On real lesions.")["learnt"] == f"On {word} lesions."


def test_done_only_with_the_same_settings_data_and_inputs(run_dir):
    assert not runs.is_done(run_dir, "02", SETTINGS, "phantom")
    open_stage1(run_dir).finish({}, "")
    assert runs.is_done(run_dir, "02", SETTINGS, "phantom")
    assert runs.is_done(run_dir, "02", replace(SETTINGS, max_minutes=1), "phantom")
    assert not runs.is_done(run_dir, "02", replace(SETTINGS, seed=1), "phantom")
    assert not runs.is_done(run_dir, "02", SETTINGS, "/data")
    start = files.read_json(run_dir / runs.START / "result.json")
    files.write_json(run_dir / runs.START / "result.json", start | {"fingerprint": "0" * 16})
    assert not runs.is_done(run_dir, "02", SETTINGS, "phantom")


def test_step_00_looks_again_when_files_came_or_went(tmp_path):
    images, run_dir = tmp_path / "images", tmp_path / "images" / "run"
    images.mkdir()
    (images / "1.jpg").write_bytes(b"1")
    settings = resolve("data", "smoke")
    steps.open_step(runs.START, settings, images, run_dir, "smoke").finish({}, "", content="first")
    data = str(images)
    assert runs.is_done(run_dir, runs.START, settings, data)
    (images / ".hidden.jpg").touch()
    (run_dir / "02").mkdir()
    (run_dir / "02" / "made.png").touch()  # a run inside its dataset is no part of it
    assert runs.is_done(run_dir, runs.START, settings, data)
    stage1 = steps.open_step("02", SETTINGS, data, run_dir, "smoke", needs=(runs.START,))
    stage1.finish({}, "")

    (images / "part 2").mkdir()
    (images / "part 2" / "2.jpg").write_bytes(b"2")
    assert not runs.is_done(run_dir, runs.START, settings, data)
    # The same content, laid out otherwise, is the same for all that follows; other content is not.
    for content, same in (("first", True), ("second", False)):
        steps.open_step(runs.START, settings, images, run_dir, "smoke").finish({}, "", content=content)
        assert runs.is_done(run_dir, runs.START, settings, data)
        assert runs.is_done(run_dir, "02", SETTINGS, data) is same


def test_a_step_made_anew_with_another_outcome_is_noticed(run_dir):
    for weights, same in ((b"one", True), (b"one", True), (b"two", False)):
        step = open_stage1(run_dir)
        (step.folder / "model.bin").write_bytes(weights)
        step.model(step.folder / "model.bin")
        step.finish({}, "")
        if not runs.result(run_dir, "03"):
            steps.open_step("03", Stage2Settings(), "phantom", run_dir, "smoke", needs=("02",)).finish({}, "")
        assert runs.is_done(run_dir, "02", SETTINGS, "phantom")
        assert runs.is_done(run_dir, "03", Stage2Settings(), "phantom") is same


def test_going_through_a_finished_step_again_keeps_the_time_it_took(run_dir):
    step = open_stage1(run_dir)
    step._started -= 500
    step.finish({}, "")
    assert open_stage1(run_dir).finish({}, "")["seconds"] >= 500
    assert open_stage1(run_dir).finish({}, "", content="another")["seconds"] < 500


def test_a_half_made_step_is_taken_up_with_its_settings_and_refused_with_others(run_dir):
    step = open_stage1(run_dir)
    open_stage1(run_dir, replace(SETTINGS, seed=1))  # nothing made yet: nothing to protect
    open_stage1(run_dir)
    (step.folder / "checkpoint").touch()
    open_stage1(run_dir, replace(SETTINGS, max_minutes=5))
    with pytest.raises(UserError, match=r"iterations 7 there, 8 asked for.*--out.*--force") as refused:
        open_stage1(run_dir, replace(SETTINGS, iterations=8))
    assert "seed" not in str(refused.value)
    start = files.read_json(run_dir / runs.START / "result.json")
    files.write_json(run_dir / runs.START / "result.json", start | {"fingerprint": "0" * 16})
    with pytest.raises(UserError, match=f"{runs.START} was made anew"):
        open_stage1(run_dir)


def test_a_folder_from_before_a_setting_was_there_stood_at_its_default(run_dir):
    begun = open_stage1(run_dir).folder / "settings.json"
    (begun.parent / "work").touch()
    older = files.read_json(begun)
    del older["settings"]["weights"]
    files.write_json(begun, older)
    assert open_stage1(run_dir).settings.weights == "train"
    files.write_json(begun, older)
    with pytest.raises(UserError, match=r"\(weights 'train' there, 'auto' asked for\)"):
        open_stage1(run_dir, replace(SETTINGS, weights="auto"))


def test_missing_step_and_other_data_are_named(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"01_baseline has not been run in .*notebooks/01_baseline\.ipynb first"):
        steps.open_step("05", SETTINGS, "phantom", run_dir, "smoke", needs=(runs.START, "01_baseline"))
    with pytest.raises(UserError, match=r"There is no .*nowhere: give data"):
        open_stage1(run_dir, data=tmp_path / "nowhere")
    with pytest.raises(UserError, match="was made from phantom, not from"):
        open_stage1(run_dir, data=tmp_path)
    with pytest.raises(UserError, match="is the dataset's own folder"):
        steps.open_step(runs.START, SETTINGS, tmp_path, tmp_path, "smoke")


def test_another_size_and_a_linked_folder_count_however_the_data_are_named(tmp_path):
    images, disk = tmp_path / "images", tmp_path / "disk"
    for folder in (images, disk):
        folder.mkdir()
    metadata, seen = images / "HAM10000_metadata.csv", []
    metadata.touch()
    (images / "linked").symlink_to(disk)
    for changed in (images / "1.jpg", images / "1.jpg", disk / "2.jpg"):
        changed.write_bytes(b"longer" if changed.exists() else b"1")
        seen.append([runs.listing(str(data)) for data in (images, metadata)])
    assert all(len(set(listings)) == 3 for listings in zip(*seen, strict=True))


def test_a_folder_named_by_a_file_of_it_is_the_dataset_s_own_too(tmp_path):
    metadata = tmp_path / "HAM10000_metadata.csv"
    metadata.touch()
    with pytest.raises(UserError, match="is the dataset's own folder"):
        runs.refuse_dataset_folder(tmp_path, str(metadata))


def test_pictures_of_what_was_to_be_done_are_no_work_to_lose(run_dir):
    step = open_stage1(run_dir)
    step.figure(Figure(), "first", "Before anything was made.")
    open_stage1(run_dir, replace(SETTINGS, seed=1))
