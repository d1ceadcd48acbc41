"""Folder, archive and file to the challenge's CSV, and that CSV through the challenge's own scorer."""

import io
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.optim.swa_utils import update_bn

from stgan_utils import data
from stgan_utils.backbone import IMAGENET_SCALING
from stgan_utils.classifier import Classifier
from stgan_utils.config import UserError
from stgan_utils.evaluation import evaluate
from stgan_utils.lesions import CLASSES, PRIOR_TRAINING_ORDER
from stgan_utils.predict import ISIC_ORDER, predict_folder

HEADER = ["image", "MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough that its answers differ, and outputs in an order that is not ours."""
    torch.manual_seed(0)
    model = Classifier({"size": 32, **IMAGENET_SCALING}, PRIOR_TRAINING_ORDER)
    update_bn([torch.randint(0, 256, (64, 1, 1, 3), dtype=torch.uint8).expand(-1, 32, 32, -1)], model)
    with torch.no_grad():
        model.head[1].weight.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """70 JPEGs in two sub-folders, written in no order, one of them cut off and one text; and what is no image."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in rng.permutation(70):
        place = folder / f"part_{number % 2}"
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, 3) + rng.normal(0, 30, (45, 60, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"ISIC_{number:07}.jpg")
    cut = folder / "part_0" / "ISIC_0000010.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    (folder / "part_1" / "ISIC_0000011.jpg").write_text("not a picture")
    (folder / "ATTRIBUTION.txt").write_text("text")
    (folder / "part_1" / "._ISIC_0000001.jpg").write_text("macOS")
    return folder


@pytest.fixture(scope="module")
def predicted(model, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "preds.csv"
    return out, predict_folder(model, folder, out, batch_size=16)


def test_folder_gives_the_submission_format(model, folder, predicted):
    out, (written, unreadable) = predicted
    table = pd.read_csv(out)
    assert list(table.columns) == HEADER
    good = [f"ISIC_{number:07}" for number in range(70) if number not in (10, 11)]
    assert table["image"].tolist() == good and written == 68
    assert np.allclose(table[list(CLASSES)].sum(axis=1), 1, atol=1e-6)
    assert [str(name).rsplit("/", 1)[-1] for name, _ in unreadable] == ["ISIC_0000010.jpg", "ISIC_0000011.jpg"]
    # The same pixels as in training give the same answers, each under its own name.
    paths = pd.DataFrame({"path": [str(next(folder.rglob(f"{image_id}.jpg"))) for image_id in good]})
    expected = model.predict_proba(data.image_cache(paths, 32, folder.parent / "cache"))
    pd.testing.assert_frame_equal(table[list(CLASSES)], expected[list(CLASSES)], atol=1e-3)
    assert expected.idxmax(axis=1).nunique() > 2


def test_zip_and_single_file_give_the_same_rows(model, folder, predicted, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, f"inside/{path.relative_to(folder)}")
        archive.writestr("__MACOSX/inside/ISIC_0000001.jpg", b"macOS")
    before = sorted(tmp_path.iterdir())
    written, unreadable = predict_folder(model, tmp_path / "images.zip", "-", batch_size=16)
    zipped = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert sorted(tmp_path.iterdir()) == before  # nothing was unpacked
    pd.testing.assert_frame_equal(zipped, pd.read_csv(predicted[0]), atol=1e-6)
    assert (written, len(unreadable)) == (68, 2)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "linked").symlink_to(folder / "part_0")
    assert predict_folder(model, tmp_path / "mine", tmp_path / "linked.csv")[0] == 34  # of 35, one is cut off
    assert predict_folder(model, folder / "part_0" / "ISIC_0000004.jpg", tmp_path / "one.csv") == (1, [])
    one = pd.read_csv(tmp_path / "one.csv")
    pd.testing.assert_frame_equal(one, zipped[zipped["image"] == "ISIC_0000004"].reset_index(drop=True), atol=1e-3)


def test_the_challenge_scores_it_as_we_do(predicted, tmp_path, monkeypatch):
    scoring = pytest.importorskip("isic_challenge_scoring.classification")
    if not hasattr(pd.DataFrame, "applymap"):  # pandas 3 dropped the name that the scorer uses
        monkeypatch.setattr(pd.DataFrame, "applymap", pd.DataFrame.map, raising=False)
    table = pd.read_csv(predicted[0], index_col="image")
    rng = np.random.default_rng(0)
    label = pd.Series(rng.choice(CLASSES, len(table)), table.index).where(rng.random(len(table)) < 0.4, table.idxmax(1))
    truth = pd.get_dummies(label).reindex(columns=list(ISIC_ORDER), fill_value=False).astype(float)
    truth.to_csv(tmp_path / "truth.csv", index_label="image")
    score = scoring.ClassificationScore.from_file(
        tmp_path / "truth.csv", predicted[0], scoring.ClassificationMetric.BALANCED_ACCURACY
    )
    ours = evaluate(label, table, bootstrap=0)["metrics"]
    assert score.overall == pytest.approx(ours["balanced_accuracy"]["value"])
    assert score.macro_average["auc"] == pytest.approx(ours["macro_auc"]["value"])


def test_wrong_sources_say_what_to_do(model, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a/same.jpg", "b/same.jpg"):
        (tmp_path / "twice" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "twice" / name)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "twice" / "a" / "same.jpg", "same.jpg")
    whole = (tmp_path / "images.zip").read_bytes()
    directory = whole.index(b"PK\x01\x02")
    (tmp_path / "damaged.zip").write_bytes(whole[:directory] + b"PK\x00\x00" + whole[directory + 4 :])
    (tmp_path / "cut.zip").write_bytes(whole[:-10])
    for source, message in (
        (tmp_path / "damaged.zip", "is a damaged archive"),
        (tmp_path / "cut.zip", "is a damaged archive"),
        (tmp_path / "absent", "There is no .*absent"),
        (folder / "ATTRIBUTION.txt", "no folder, zip archive or image"),
        (tmp_path / "empty", "no image in"),
        (tmp_path / "twice", "twice, such as same"),
    ):
        with pytest.raises(UserError, match=message):
            predict_folder(model, source, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises(UserError, match="empty is a folder or a device: name a file"):
        predict_folder(model, tmp_path / "images.zip", tmp_path / "empty")


def test_what_is_read_is_never_written_over(model, tmp_path):
    image = tmp_path / "folder" / "lesion.png"
    image.parent.mkdir()
    Image.new("RGB", (8, 8)).save(image)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(image, "lesion.png")
    (tmp_path / "link.csv").symlink_to(image)
    for source, out in (
        (image, image),
        (image.parent, image),
        (image.parent, tmp_path / "link.csv"),
        (tmp_path / "images.zip", tmp_path / "images.zip"),
    ):
        before = out.read_bytes()
        with pytest.raises(UserError, match="one of the files to be read"):
            predict_folder(model, source, out)
        assert out.read_bytes() == before


def test_a_name_inside_an_archive_is_no_file_here(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("lesion.png")
    with zipfile.ZipFile("images.zip", "w") as archive:
        archive.write("lesion.png")
    assert predict_folder(model, "images.zip", "lesion.png")[0] == 1


def test_where_nothing_can_be_read_earlier_answers_stay(model, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.jpg").write_text("no picture")
    (tmp_path / "out.csv").write_text("earlier")
    with pytest.raises(UserError, match=r"None of the 1 image\(s\) in .*images can be read \(not an image\)"):
        predict_folder(model, tmp_path / "images", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "earlier"


def test_a_name_that_is_not_utf_8_costs_one_row_and_not_the_others(model, tmp_path):
    for name in (b"good.png", b"caf\xe9.png"):
        Image.new("RGB", (8, 8)).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    written, unreadable = predict_folder(model, tmp_path, tmp_path / "out.csv")
    assert written == 1 and pd.read_csv(tmp_path / "out.csv")["image"].tolist() == ["good"]
    assert unreadable == [(f"{tmp_path}/caf\\udce9.png", "its name is not UTF-8")]


def test_files_passed_over_are_counted_by_kind(model, folder, tmp_path, capsys):
    for name in ("good.png", "IMG_1.HEIC", "b/IMG_2.heic", "notes", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in tmp_path.rglob("*[!p]"):
            if path.is_file():
                archive.write(path, path.relative_to(tmp_path))
    for source, others in (
        (tmp_path, "4 file(s): .heic (2), .zip (1), notes (1)"),
        (tmp_path / "images.zip", "3 file(s): .heic (2), notes (1)"),
    ):
        assert predict_folder(model, source, "-") == (1, [])
        said = capsys.readouterr().err
        assert f"no image by its ending, so passed over: {others}\n" in said
    predict_folder(model, tmp_path / "good.png", "-")
    assert "passed over" not in capsys.readouterr().err


def test_a_damaged_member_of_an_archive_costs_one_row_and_not_the_others(model, tmp_path):
    for name in ("bad.png", "good.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("bad.png", "good.png"):
            archive.write(tmp_path / name, name)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 1  # zipfile's own error, neither OSError nor ValueError
    (tmp_path / "images.zip").write_bytes(content)
    written, unreadable = predict_folder(model, tmp_path / "images.zip", tmp_path / "out.csv")
    assert written == 1 and [name for name, _ in unreadable] == ["bad.png"]
    assert pd.read_csv(tmp_path / "out.csv")["image"].tolist() == ["good"]


def test_a_hidden_folder_on_the_way_to_what_was_named_hides_nothing(model, tmp_path):
    folder = tmp_path / ".cache" / "images"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "lesion.png")
    for source in (folder, folder / "lesion.png"):
        assert predict_folder(model, source, tmp_path / "out.csv") == (1, [])
