"""The experiment: which images an arm gets, equal steps, nothing of the test split before the table, the refit."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from stgan_utils import arms, classifier, data, evaluation, files, findings, finetune
from stgan_utils.backbone import IMAGENET_SCALING, load_backbone, load_lite
from stgan_utils.config import UserError
from stgan_utils.lesions import CLASSES, MINORITY


@pytest.fixture(scope="module")
def run_dir(phantom_dir, tmp_path_factory):
    """Steps 00, 01 and 04 of a run in miniature: the "generated" images are phantoms of the test split."""
    folder = tmp_path_factory.mktemp("run")
    table = data.split_by_lesion(data.load_dataset(str(phantom_dir)))
    # Of two or three lesions, scikit-learn 1.7 (Python 3.10) can leave out all at once when it shuffles.
    common = table.loc[(table["label"] == "NV") & (table["split"] == "train"), "lesion_id"].unique()
    for rare, lesions in (("AKIEC", common[:6]), ("DF", common[6:12]), ("VASC", common[12:18])):
        table.loc[table["lesion_id"].isin(lesions), "label"] = rare
    (folder / "00_start_here").mkdir()
    data.save_table(table, folder / "00_start_here" / "table.csv")
    torch.manual_seed(0)
    (folder / "01_baseline").mkdir()
    model = classifier.Classifier({"size": 32, **IMAGENET_SCALING})
    with torch.no_grad():  # far from even, so that it does not say one class for all
        model.head[1].weight.mul_(30)
    model.save(folder / "01_baseline" / "model.safetensors")
    pictures = table.loc[table["split"] == "test", "path"].to_list()
    made = [(f"{code}_{i:04d}.png", code, i % 3 > 0) for code in MINORITY for i in range(40)]
    rows = []
    (folder / "images").mkdir()
    for number, (name, code, kept) in enumerate(made):
        shutil.copy(pictures[number % len(pictures)], folder / "images" / name)
        rows.append({"path": str(folder / "images" / name), "class": code, "kept": kept})
    (folder / "04_deduplicate").mkdir()
    pd.DataFrame(rows).to_csv(folder / "04_deduplicate" / "dedup.csv", index=False)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small():
    """Two epochs of 32 px from random weights, two teachers of one kind and three of the other: seconds."""
    with pytest.MonkeyPatch.context() as patch:
        kinds = {"mobilenet": (2, load_backbone), "lite2": (3, load_lite)}
        patch.setattr(arms, "TEACHERS", {name: arms.Teachers(*kind, {"views": 2}) for name, kind in kinds.items()})
        patch.setattr(arms, "RECIPE", {"size": 32, "epochs": 2, "pretrained": "none", "batch_size": 16})
        for name, size in (("release", 48), ("release-160px", 32)):
            patch.setitem(arms.ARMS, name, arms.ARMS[name]._replace(settings={"size": size}))
        yield


def chosen(run_dir, **arm):
    real = data.read_table(run_dir / "00_start_here" / "table.csv").assign(synthetic=False)
    return real, arms.choose_generated(run_dir, real, arms.Arm("", {}, **arm), None)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_as_many_generated_images_as_the_share_of_the_gap(run_dir, share):
    real, made = chosen(run_dir, synthetic="raw", share=share)
    counts = real[real["split"] == "train"]["label"].value_counts()
    for code in MINORITY:
        of_class = made[made["label"] == code]
        assert len(of_class) == min(40, round(share * (counts["NV"] - counts[code])))
        # the first ones by name, and all to train on
        assert [path.rsplit("_")[-1] for path in of_class["path"]] == [f"{i:04d}.png" for i in range(len(of_class))]
    assert set(made["split"]) == {"train"} and made["synthetic"].all() and "NV" not in set(made["label"])


def test_filters_keep_what_they_say(run_dir):
    listed = pd.read_csv(run_dir / "04_deduplicate" / "dedup.csv").set_index("path")
    real, dedup = chosen(run_dir, synthetic="dedup", share=1.0)
    assert listed.loc[dedup["path"], "kept"].all()
    _, filtered = chosen(run_dir, synthetic="filtered", share=1.0)
    assert 0 < len(filtered) < len(dedup) and listed.loc[filtered["path"], "kept"].all()
    model = classifier.Classifier.load(run_dir / "01_baseline" / "model.safetensors")
    said = model.predict_proba(data.load_images(listed.index, 32)).idxmax(axis=1).to_numpy()
    agreed = listed[(said == listed["class"]) & listed["kept"]]
    gap = real[real["split"] == "train"]["label"].value_counts()
    for code, of_class in agreed.groupby("class"):
        expected = list(of_class.index)[: gap.max() - gap[code]]
        assert list(filtered.loc[filtered["label"] == code, "path"]) == expected


def test_arms_take_equal_steps_and_leave_the_test_split_to_the_table(run_dir):
    for name in ("real", "gan-raw"):
        for seed in range(2):
            folder = arms.train(name, run_dir, seed)
    table = data.read_table(run_dir / "00_start_here" / "table.csv")
    plain, mixed = (files.read_json(run_dir / "arms" / name / "seed1" / "result.json") for name in ("real", "gan-raw"))
    for key in ("epochs", "epoch_images", "batch_size"):
        assert plain["settings"][key] == mixed["settings"][key]
    assert plain["settings"]["epoch_images"] == (table["split"] == "train").sum()
    assert (
        sum(plain["training_images"]["generated"].values()) == 0 < sum(mixed["training_images"]["generated"].values())
    )
    assert "test" not in set(mixed)
    answers = pd.read_csv(folder / "predictions.csv")
    assert sorted(answers["image_id"]) == sorted(table.loc[table["split"] != "train", "image_id"])  # real ones only
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="other settings"):
        patch.setitem(arms.RECIPE, "epochs", 3)
        arms.train("gan-raw", run_dir, 1)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert arms.train("gan-raw", run_dir, 1) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written

    # What a step made anew says, an arm made of it must not stand beside.
    again = run_dir / "04_deduplicate" / "result.json"
    files.write_json(again, {"fingerprint": "another"})
    with pytest.raises(UserError, match=r"made anew \(04_deduplicate\)"):
        arms.train("gan-raw", run_dir, 1)
    assert arms.train("real", run_dir, 1)  # was not made of it
    again.unlink()

    # The adjustment is that of the real images, unless the arm is about just that.
    real = table[table["split"] == "train"]["label"].value_counts()
    with pytest.MonkeyPatch.context() as patch:
        seen = {}
        adjusted = finetune.adjusted_loss
        patch.setattr(
            finetune, "adjusted_loss", lambda *a: (seen.setdefault("adjustment", a[2]), adjusted(*a))[1], raising=True
        )
        for name, same in (("gan-dedup", True), ("gan-mixed-prior", False)):
            seen.clear()
            shutil.rmtree(run_dir / "arms" / name, ignore_errors=True)
            arms.train(name, run_dir, 0)
            shares = torch.tensor([real[code] / real.sum() for code in CLASSES])
            assert torch.allclose(seen["adjustment"].exp(), shares.float()) is same
            shutil.rmtree(run_dir / "arms" / name)

    compared = findings.compare(run_dir, bootstrap=50).set_index("arm")
    assert compared.loc["real", "to_beat"] and compared.loc["real", "difference"] == 0
    for name in ("real", "gan-raw"):
        scores = []
        for seed in range(2):
            answers = pd.read_csv(run_dir / "arms" / name / f"seed{seed}" / "predictions.csv")
            answers = answers[answers["split"] == "test"]
            scores.append(evaluation.balanced_accuracy(answers["label"], answers[list(CLASSES)]))
        assert compared.loc[name, "balanced_accuracy"] == pytest.approx(np.mean(scores))
    text = findings.write_comparison(run_dir)
    assert text.count("\n") == 5 and "the one to beat" in text
    assert text.endswith("95 % intervals over test lesions and the classifiers' 2 seeds; the GANs were trained once.")
    assert "test lesions alone (one seed)" in findings.markdown(findings.compare(run_dir, bootstrap=5).assign(seeds=1))
    for name in ("arms.csv", "arms.md", "arms.png"):
        assert (run_dir / "arms" / name).stat().st_size

    files.write_json(again, {"fingerprint": "another"})
    with pytest.raises(UserError, match="Arm gan-raw was trained before 00_start_here or 04_deduplicate was made anew"):
        findings.compare(run_dir)
    again.unlink()

    arms.train("cutmix", run_dir, 0)
    with pytest.raises(UserError, match="different numbers of seeds"):
        findings.compare(run_dir)
    shutil.rmtree(run_dir / "arms" / "cutmix")

    moved = run_dir / "arms" / "gan-raw" / "seed0" / "predictions.csv"
    kept = moved.read_text()
    moved.write_text(kept.replace(answers["image_id"].iloc[0], "another"))
    with pytest.raises(UserError, match="judged on different test images"):
        findings.compare(run_dir)
    moved.write_text(kept)


def test_refit_takes_every_real_image_and_the_temperature_of_the_split_run(run_dir, tmp_path):
    with pytest.raises(UserError, match="arms train release"):
        arms.refit("release", run_dir)
    arms.train("release", run_dir, 0)
    folder = arms.refit("release", run_dir)
    taught_by = files.read_json(folder / "result.json")["taught_by"]
    teachers = [f"teachers/{name}" for name in ("mobilenet-0", "mobilenet-1", "lite2-0", "lite2-1", "lite2-2")]
    assert list(taught_by) == [f"arms/{name}/model.safetensors" for name in (*teachers, "release/seed0")]
    judged = classifier.Classifier.load(run_dir / "arms" / "release" / "seed0" / "model.safetensors")
    refitted = classifier.Classifier.load(folder / "model.safetensors")
    assert refitted.size == judged.size == 48
    assert refitted.settings["epochs"] == 1 and judged.settings["epochs"] == 2
    assert refitted.answering["temperature"] == judged.answering["temperature"] != 1
    # Each phase goes on from the one before.
    assert refitted.settings["continue_from"] == str(run_dir / "arms" / "release" / "seed0" / "model.safetensors")
    assert judged.settings["continue_from"] == str(run_dir / "arms" / "release-160px" / "seed0" / "model.safetensors")
    # A run folder that was moved is the same run; with another first phase it is not.
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    first, done = moved / "arms" / "release-160px" / "seed0" / "model.safetensors", moved / "arms" / "release" / "seed0"
    before = files.sha256(done / "model.safetensors")
    assert arms.train("release", moved, 0) == done and files.sha256(done / "model.safetensors") == before
    shutil.copyfile(done / "model.safetensors", first)
    with pytest.raises(UserError, match=r"made anew \(release-160px\)"):
        arms.train("release", moved, 0)
    result = files.read_json(folder / "result.json")
    assert sum(result["training_images"]["real"].values()) == 210
    assert "release" not in set(
        findings.compare(run_dir, bootstrap=5)["arm"]
    )  # more steps than the arms: not among them
    page = findings.judge("release", run_dir, bootstrap=20)
    test = files.read_json(page.parent / "result.json")
    assert test["images"] == (data.read_table(run_dir / "00_start_here" / "table.csv")["split"] == "test").sum()
    pictures = re.findall(r"\((.*\.png)\)", page.read_text())
    assert len(pictures) >= 5 and all((page.parent / picture).stat().st_size for picture in pictures)


def test_a_taught_arm_hears_of_each_image_only_who_does_not_know_it(run_dir, monkeypatch):
    table = data.read_table(run_dir / "00_start_here" / "table.csv")
    teachers = arms.teach(run_dir)
    learnt = np.stack(list(teachers.values()))
    in_train = (table["split"] == "train").to_numpy()
    assert (learnt[:2].sum(0) == np.where(in_train, 1, 0)).all()
    assert (learnt[2:].sum(0) == np.where(in_train, 2, 0)).all()
    for rows in learnt:  # whole lesions, and every class
        assert not set(table["lesion_id"][rows]) & set(table["lesion_id"][in_train & ~rows])
        assert set(table["label"][rows]) == set(CLASSES)
    written = [file.stat().st_mtime_ns for file in teachers]
    assert [file.stat().st_mtime_ns for file in arms.teach(run_dir)] == written

    heard = {}  # the last training is that of the arm itself
    train = finetune.train
    monkeypatch.setattr(finetune, "train", lambda *a, **k: heard.update(k) or train(*a, **k))
    shutil.rmtree(run_dir / "arms" / "release", ignore_errors=True)
    arms.train("release", run_dir, 0)
    answers = [classifier.Classifier.load(file) for file in teachers]
    pictures = data.image_cache(table, answers[0].size)
    each = np.stack([model.predict_proba(pictures)[list(CLASSES)] for model in answers])
    told, share = heard["taught"]
    assert (share == 0.5).all()
    other = {name: kind._replace(settings={"views": 1}) for name, kind in arms.TEACHERS.items()}
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"made anew \(teachers\)"):
        patch.setattr(arms, "TEACHERS", other)
        arms.train("release", run_dir, 0)
    row = int(np.flatnonzero(in_train)[0])
    outsiders = np.flatnonzero(~learnt[:, row])
    assert [answers[i].network for i in outsiders] == ["mobilenet_v2", "efficientnet_lite2"]
    assert np.allclose(told[row], each[outsiders, row].mean(0), atol=1e-5)
    assert np.allclose(told[~in_train], each[:, ~in_train].mean(0), atol=1e-5)


def test_generated_images_are_labelled_by_what_the_baseline_answers(run_dir, monkeypatch):
    class Heard(Exception):
        """Nothing is to be trained."""

    def stop(settings, images, labels, *rows, taught):
        raise Heard(*taught)

    monkeypatch.setattr(finetune, "train", stop)
    shutil.rmtree(run_dir / "arms" / "gan-answered", ignore_errors=True)
    with pytest.raises(Heard) as heard:
        arms.train("gan-answered", run_dir, 0)
    answers, share = heard.value.args
    real, made = chosen(run_dir, synthetic="dedup", share=1.0)
    assert list(share) == [0] * len(real) + [1] * len(made)
    model = classifier.Classifier.load(run_dir / "01_baseline" / "model.safetensors")
    said = model.predict_proba(data.load_images(made["path"], 32))[list(CLASSES)].to_numpy()
    assert np.allclose(answers[len(real) :], said, atol=1e-5)

    monkeypatch.setattr(finetune, "MODEL_FILE", "none.safetensors")
    with pytest.raises(UserError, match="run step 01_baseline"):
        arms.train("gan-answered", run_dir, 0)


def test_tasks_for_an_engine_name_their_folders_and_wait_for_a_first_phase(run_dir):
    tasks = {task.name: task for task in arms.tasks(["release", "real", "release-160px", "real"], run_dir, 2)}
    assert list(tasks) == [f"arms/{n}/seed{i}" for n in ("release", "real", "release-160px") for i in range(2)]
    assert tasks["arms/release/seed1"].needs == ("arms/release-160px/seed1",)
    assert tasks["arms/real/seed1"].needs == ()
    one = tasks["arms/real/seed1"]
    assert one.work(*one.arguments) == run_dir / one.name and (run_dir / one.name / "result.json").exists()
    with pytest.raises(UserError, match="No arm 'gan'"):
        arms.tasks(["gan"], run_dir, 1)


def test_what_is_missing_is_named(run_dir, tmp_path):
    with pytest.raises(UserError, match="No arm 'gan'"):
        arms.train("gan", run_dir, 0)
    with pytest.raises(UserError, match="run step 00_start_here"):
        arms.train("real", tmp_path, 0)
    with pytest.raises(UserError, match="no trained arm"):
        findings.compare(tmp_path)
    with pytest.raises(UserError, match="real-only"):
        arms.refit("gan-raw", run_dir)
