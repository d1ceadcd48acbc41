"""Datasets in every layout, the split by lesion, the image cache; against plain loops and made-up metadata."""

import contextlib
import errno
import itertools
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stgan_utils import data
from stgan_utils.config import UserError
from stgan_utils.layouts import whole_folder
from stgan_utils.lesions import CLASSES, LESIONS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(path, seed, size=(30, 22)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return path


def made_up(classes=CLASSES, lesions=20):
    """A table of lesions with 1 … 4 images each."""
    images = itertools.cycle([1, 1, 2, 1, 4, 1, 3])
    rows = [
        {"lesion_id": f"L_{code}_{number:03d}", "label": code}
        for code in classes
        for number in range(lesions)
        for _ in range(next(images))
    ]
    table = pd.DataFrame(rows)
    table.insert(0, "image_id", [f"I_{number:05d}" for number in range(len(rows))])
    return table.assign(path="")


def several_images(table, label="MEL"):
    """A lesion with more than one image."""
    return table.loc[table["label"] == label, "lesion_id"].value_counts().index[0]


def kaggle(folder, images=21, name="HAM10000_metadata.csv", separator=",", parts=("images_part_1", "IMAGES_PART_2")):
    """HAM10000 as on Kaggle: `images` pictures, two of each lesion where it comes out even."""
    rows = []
    for number in range(images):
        code = CLASSES[number // 2 % 7]
        rows.append((f"HAM_{number // 2:07d}", f"ISIC_{number:07d}", LESIONS[code].dx, "histo", 50.0, "male", "back"))
        picture(folder / f"HAM10000_{parts[number % 2]}" / f"ISIC_{number:07d}.jpg", number)
    columns = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
    metadata = pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0)
    metadata.to_csv(folder / name, index=False, sep=separator)
    return folder


# Split


def test_split_is_by_lesion_and_stratified():
    table = data.split_by_lesion(made_up(lesions=40))
    assert (table.groupby("lesion_id")["split"].nunique() == 1).all()
    for _, rows in table.groupby("label"):
        largest = rows["lesion_id"].value_counts().max()
        shares = rows["split"].value_counts()
        for split, fraction in zip(data.SPLITS, data.FRACTIONS, strict=True):
            assert abs(shares[split] - fraction * len(rows)) <= largest


def test_split_depends_on_ids_and_seed_alone():
    table = made_up()
    first = data.split_by_lesion(table, seed=3)
    shuffled = data.split_by_lesion(table.sample(frac=1, random_state=1), seed=3).sort_values("image_id")
    pd.testing.assert_frame_equal(first, shuffled)
    assert not first["split"].equals(data.split_by_lesion(table, seed=4)["split"])


def test_split_is_the_same_on_every_machine():
    table = pd.DataFrame({"image_id": list("abcdefgh"), "lesion_id": list("ABCDEFGG"), "label": "NV"})
    # Order of the lesions' SHA-256 ("0:A" …), worked out with sha256sum: C B G E A D F.
    expected = ["train", "train", "train", "val", "train", "test", "train", "train"]
    assert list(data.split_by_lesion(table)["split"]) == expected


@pytest.mark.parametrize("lesions", [3, 4, 5])
def test_every_split_has_each_class_of_three_lesions(lesions):
    table = data.split_by_lesion(made_up(lesions=lesions))
    assert (table.groupby(["label", "split"]).size().unstack() > 0).all(axis=None)


def test_split_of_one_and_two_lesions_and_of_no_test_share():
    assert set(data.split_by_lesion(made_up(("DF",), 1))["split"]) == {"train"}
    assert data.split_by_lesion(made_up(("DF",), 2))["split"].iloc[[0, -1]].nunique() == 2
    assert set(data.split_by_lesion(made_up(), (0.8, 0.2, 0))["split"]) == {"train", "val"}


def test_generated_images_go_to_train():
    table = made_up().assign(synthetic=lambda frame: frame.index % 2 == 1)
    table["lesion_id"] = table["image_id"]
    split = data.split_by_lesion(table)
    assert set(split.loc[split["synthetic"], "split"]) == {"train"}
    assert set(split.loc[~split["synthetic"], "split"]) == set(data.SPLITS)


def test_split_refuses():
    table = made_up()
    with pytest.raises(UserError, match="sum to 1"):
        data.split_by_lesion(table, (0.7, 0.2, 0.2))
    lesion = several_images(table)
    table.loc[table["lesion_id"].eq(lesion).idxmax(), "label"] = "BCC"
    with pytest.raises(UserError, match=rf"1 lesion.*two classes.*{lesion}"):
        data.split_by_lesion(table)


def test_table_is_checked_when_read_again(tmp_path):
    table = data.split_by_lesion(made_up())
    data.save_table(table, tmp_path / "table.csv")
    assert data.read_table(tmp_path / "table.csv")["split"].equals(table["split"])
    lesion = several_images(table[table["split"] == "test"])
    table.loc[table["lesion_id"].eq(lesion).idxmax(), "split"] = "train"
    table.to_csv(tmp_path / "leaky.csv", index=False)
    with pytest.raises(UserError, match=rf"two splits.*{lesion}"):
        data.read_table(tmp_path / "leaky.csv")
    with pytest.raises(UserError, match="step 00"):
        data.read_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match=r"empty\.csv is no table"):
        data.read_table(tmp_path / "empty.csv")


# Layouts


def test_kaggle(tmp_path):
    table = data.load_dataset(kaggle(tmp_path / "data"))
    assert list(table.columns[:4]) == ["image_id", "lesion_id", "label", "path"]
    assert table["image_id"].is_monotonic_increasing and len(table) == 21
    assert {"age", "sex", "localization", "dx_type"} <= set(table.columns)
    for row in table.itertuples():
        assert os.path.basename(row.path) == f"{row.image_id}.jpg" and os.path.exists(row.path)
        assert row.label == CLASSES[int(row.image_id[5:]) // 2 % 7]


def test_kaggle_mount_deeper_and_images_twice(tmp_path):
    folder = kaggle(tmp_path / "input" / "kmader" / "ham")
    shutil.copytree(folder / "HAM10000_images_part_1", folder / "ham10000_images_part_1")
    assert len(data.load_dataset(tmp_path / "input")) == 21


@pytest.mark.parametrize(("name", "separator"), [("HAM10000_metadata", ","), ("HAM10000_metadata.tab", "\t")])
def test_dataverse(tmp_path, name, separator):
    folder = kaggle(tmp_path / "data", name=name, separator=separator)
    metadata = pd.read_csv(folder / name, sep=separator).assign(dataset="vidir_modern")
    metadata.to_csv(folder / name, index=False, sep=separator)
    table = data.load_dataset(folder)
    assert len(table) == 21 and set(table["dataset"]) == {"vidir_modern"}


@pytest.mark.parametrize("groupings", [True, False])
def test_isic(tmp_path, groupings):
    rng = np.random.default_rng(0)
    ids = [f"ISIC_{number:07d}" for number in range(14)]
    order = list(rng.permutation(CLASSES))
    frame = pd.DataFrame([[each] + [float(code == CLASSES[i % 7]) for code in order] for i, each in enumerate(ids)])
    frame.columns = ["image", *order]
    truth = tmp_path / "ISIC2018_Task3_Training_GroundTruth"
    truth.mkdir()
    frame.to_csv(truth / "ISIC2018_Task3_Training_GroundTruth.csv", index=False)
    for number, each in enumerate(ids):
        picture(tmp_path / "ISIC2018_Task3_Training_Input" / f"{each}.jpg", number)
    if groupings:
        lesions = pd.DataFrame({"image": ids, "lesion_id": [f"HAM_{i % 7}" for i in range(14)]})
        lesions["diagnosis_confirm_type"] = "histopathology"
        lesions.to_csv(tmp_path / "ISIC2018_Task3_Training_LesionGroupings.csv", index=False)
        for double in (tmp_path, tmp_path / "__MACOSX"):  # what macOS puts beside it
            double.mkdir(exist_ok=True)
            (double / "._ISIC2018_Task3_Training_LesionGroupings.csv").write_bytes(b"\x00\x05\x16\x07\xff")
    for source in (tmp_path, truth / "ISIC2018_Task3_Training_GroundTruth.csv"):
        with contextlib.nullcontext() if groupings else pytest.warns(UserWarning, match="which images show the same"):
            table = data.load_dataset(source)
        assert data.has_lesion_ids(table) == groupings
        assert list(table["label"]) == [CLASSES[i % 7] for i in range(14)]
        assert table["lesion_id"].nunique() == (7 if groupings else 14)
        assert ("dx_type" in table) == groupings


def test_one_hot_labels_that_are_words_are_refused(tmp_path):
    frame = pd.DataFrame([["a", *(["yes"] + ["no"] * 6)]], columns=["image", *CLASSES])
    frame.to_csv(tmp_path / "ISIC2018_Task3_Training_GroundTruth.csv", index=False)
    with pytest.raises(UserError, match=r"not numbers .*must be 0 or 1"):
        data.load_dataset(tmp_path)


def test_ids_that_look_like_numbers_keep_their_zeros(tmp_path):
    frame = pd.DataFrame({"image_id": ["0001", "0010"], "lesion_id": ["007", "008"], "dx": ["nv", "mel"]})
    frame.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    for number, each in enumerate(frame["image_id"]):
        picture(tmp_path / f"{each}.jpg", number)
    table = data.load_dataset(tmp_path)
    assert list(table["image_id"]) == ["0001", "0010"] and list(table["lesion_id"]) == ["007", "008"]


def prior_set(folder, order, wrong_header=False):
    rows = []
    for number, code in enumerate(CLASSES):
        for kind in "RF":
            name = f"{code}_0001_{kind}.jpg"
            picture(folder / "Synthetic_Dataset" / "Synthetic_Dataset" / name, 2 * number + (kind == "F"))
            rows.append([name, *(int(code == each) for each in order)])
    header = sorted(order) if wrong_header else order
    pd.DataFrame(rows, columns=["filename", *header]).to_csv(folder / "synthetic_dataset_labels.csv", index=False)
    return folder


@pytest.mark.parametrize("order", [CLASSES, ("NV", "MEL", "BKL", "BCC", "AKIEC", "VASC", "DF")])
def test_prior_set_in_any_order_of_columns(tmp_path, order):
    table = data.load_dataset(prior_set(tmp_path, list(order)))
    assert list(table["label"]) == [each.split("_")[0] for each in table["image_id"]]
    assert list(table["synthetic"]) == [each.endswith("_F") for each in table["image_id"]]


def test_prior_set_with_a_wrong_header_is_refused(tmp_path):
    """The prior system's mistake: labels in one order, read in another."""
    order = ["NV", "MEL", "BKL", "BCC", "AKIEC", "VASC", "DF"]
    with pytest.raises(UserError, match="AKIEC in a file named NV"):
        data.load_dataset(prior_set(tmp_path, order, wrong_header=True))


def test_generated_copy_of_a_real_image_is_named_and_can_be_left_out(tmp_path):
    """As one lesion it would be on two sides: generated images are trained on, real ones may be held out."""
    folder = prior_set(tmp_path, CLASSES)
    pictures = folder / "Synthetic_Dataset" / "Synthetic_Dataset"
    for code in ("DF", "MEL"):
        shutil.copy(pictures / f"{code}_0001_R.jpg", pictures / f"{code}_0001_F.jpg")
    with pytest.raises(UserError, match=r"2 generated copy of a real image \(DF_0001_F, MEL_0001_F\)"):
        data.load_dataset(folder)
    assert "generated copy of a real image" in data.check(folder)[0]
    with pytest.warns(UserWarning, match="2 image"):
        table = data.load_dataset(folder, "skip", tmp_path / "bad.csv")
    assert sorted(table["synthetic"]) == [False] * 7 + [True] * 5
    data.split_by_lesion(table)


def test_dermamnist(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 14), ("val", 7), ("test", 7)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count)[:, None] % 7
    np.savez(tmp_path / "dermamnist.npz", **arrays)
    for source in (tmp_path, tmp_path / "dermamnist.npz"):
        table = data.load_dataset(source)
        assert list(table["label"]) == [*CLASSES] * 4
        cached = data.image_cache(table, 28)
        expected = np.concatenate([arrays[f"{part}_images"] for part in ("train", "val", "test")])
        np.testing.assert_array_equal(cached, expected)
    file = tmp_path / "dermamnist.npz"
    for changed in ("val_labels", "test_images"):
        np.savez(file, **arrays | {changed: arrays[changed][:-1]})
        with pytest.raises(UserError, match="not a DermaMNIST file: it has no"):
            data.load_dataset(tmp_path)
    np.savez(file, **{name: values.astype(float) for name, values in arrays.items()})
    with pytest.raises(UserError, match="not a DermaMNIST file: it has no"):
        data.load_dataset(tmp_path)
    np.savez(file, **arrays)
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"not a DermaMNIST file .*; download it again"):
        data.load_dataset(tmp_path)


def test_folder_per_class(tmp_path):
    for number, code in enumerate(CLASSES):
        picture(tmp_path / "top" / (code if number % 2 else code.lower()) / "0001.png", number)
        picture(tmp_path / "top" / (code if number % 2 else code.lower()) / "0002.jpg", 50)  # the same in each class
    table = data.load_dataset(tmp_path)
    assert sorted(table["label"]) == sorted([*CLASSES] * 2) and table["image_id"].is_unique
    with pytest.raises(UserError, match="two classes"):
        data.split_by_lesion(table)
    picture(tmp_path / "top" / "SCC" / "0001.jpg", 99)
    with pytest.raises(UserError, match=r"1 unknown label SCC \(SCC/0001\)"):
        data.load_dataset(tmp_path)


def test_phantom_is_drawn_once(cache, monkeypatch):
    table = data.load_dataset("phantom", phantom=(140, 32, 5))
    assert len(table) == 140 and set(table["label"]) == set(CLASSES)
    monkeypatch.setattr(data.phantom_images, "write_dataset", None)
    pd.testing.assert_frame_equal(table, data.load_dataset("phantom", phantom=(140, 32, 5)))


def test_real_images(ham10000):
    table = data.load_dataset(ham10000)
    expected = {"AKIEC": 183, "BCC": 264, "BKL": 583, "DF": 60, "MEL": 491, "NV": 4323, "VASC": 80}
    assert table["label"].value_counts().to_dict() == expected
    split = data.split_by_lesion(table)
    assert split["split"].value_counts(normalize=True).round(2).to_dict() == {"train": 0.7, "val": 0.15, "test": 0.15}


# What is wrong with a dataset


def test_one_error_names_everything_and_skip_lists_it(tmp_path):
    folder = kaggle(tmp_path / "data")
    metadata = pd.read_csv(folder / "HAM10000_metadata.csv").sort_values("image_id", ignore_index=True)
    metadata.loc[0, "dx"] = "scc"
    metadata = pd.concat([metadata, metadata.iloc[[2]], metadata.iloc[[4]].assign(dx="nv")])
    metadata.to_csv(folder / "HAM10000_metadata.csv", index=False)
    images = {path.stem[-2:]: path for path in folder.rglob("*.jpg")}
    images["06"].unlink()
    images["07"].write_bytes(images["07"].read_bytes()[:-60])
    images["08"].write_bytes(b"")

    with pytest.raises(UserError) as error:
        data.load_dataset(folder)
    message = str(error.value)
    for part in ("7 image(s)", "1 missing (ISIC_0000006)", "2 unreadable (ISIC_0000007, ISIC_0000008)"):
        assert part in message
    assert "3 duplicate id" in message and "1 unknown label scc (ISIC_0000000)" in message

    with pytest.warns(UserWarning, match="7 image"):
        table = data.load_dataset(folder, on_bad="skip", bad_csv=tmp_path / "bad.csv")
    # 2 stands twice with one label: kept once; 4 stands twice with two labels: nobody knows which.
    dropped = {0, 4, 6, 7, 8}
    assert set(table["image_id"]) == {f"ISIC_{number:07d}" for number in range(21) if number not in dropped}
    bad = pd.read_csv(tmp_path / "bad.csv")
    assert len(bad) == 7 and list(bad.columns) == ["image_id", "label", "path", "problem"]

    for number in (11, 12, 13, 14):
        images[f"{number}"].write_bytes(b"")
    report, bad = data.check(folder)
    assert bad == 11
    assert ", ".join(f"ISIC_{number:07d}" for number in (7, 8, 11, 12, 13, 14)) in report  # each by name
    for part in ("bad images: 11", "1 missing", "6 unreadable", "3 duplicate id", "lesions with several images: "):
        assert part in report


def test_without_lesion_ids_nothing_is_promised(tmp_path):
    for number in range(28):
        picture(tmp_path / CLASSES[number % 7] / f"{number}.jpg", number)
    with pytest.warns(UserWarning, match="which images show the same lesion"):
        data.load_dataset(tmp_path)
    report, _ = data.check(tmp_path)
    assert "lesions with several images: not known" in report and "split by lesion none" not in report


def test_lesions_with_a_file_in_common_are_one(tmp_path):
    """Whatever the ids say: or a training image would stand in the test split as well."""
    root = kaggle(tmp_path, images=42)
    paths = data.load_dataset(root).set_index("image_id")["path"]
    # The lesions 0, 7 and 14, of one class: the middle one has a file in common with each of the others.
    shutil.copyfile(paths["ISIC_0000000"], paths["ISIC_0000014"])
    shutil.copyfile(paths["ISIC_0000028"], paths["ISIC_0000015"])
    lesions = data.load_dataset(root).set_index("image_id")["lesion_id"]
    assert set(lesions[[f"ISIC_{number:07d}" for number in (0, 1, 14, 15, 28, 29)]]) == {"HAM_0000000"}
    assert lesions.nunique() == 21 - 2
    # A row that is left out joins nothing.
    shutil.copyfile(paths["ISIC_0000002"], paths["ISIC_0000004"])
    metadata = pd.read_csv(root / "HAM10000_metadata.csv")
    metadata.loc[metadata["image_id"] == "ISIC_0000004", "dx"] = "unknown"
    metadata.to_csv(root / "HAM10000_metadata.csv", index=False)
    with pytest.warns(UserWarning, match="left out"):
        lesions = data.load_dataset(root, on_bad="skip", bad_csv=tmp_path / "bad.csv").set_index("image_id")[
            "lesion_id"
        ]
    assert lesions["ISIC_0000002"] == "HAM_0000001" and lesions["ISIC_0000005"] == "HAM_0000002"


def test_a_name_that_is_not_utf_8_is_a_bad_image(tmp_path):
    for number in range(4):
        picture(tmp_path / CLASSES[number % 2] / f"{number}.jpg", number)
    try:
        os.rename(os.fsencode(tmp_path / CLASSES[0] / "0.jpg"), os.fsencode(tmp_path / CLASSES[0]) + b"/Bild_\x84.jpg")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    with pytest.raises(UserError, match=r"1 file name is not UTF-8 \(AKIEC/Bild_.*84\)"):
        data.load_dataset(tmp_path)
    with pytest.warns(UserWarning, match="1 image"):
        assert len(data.load_dataset(tmp_path, "skip", tmp_path / "bad.csv")) == 3
    assert "Bild_" in (tmp_path / "bad.csv").read_text(encoding="utf-8")


def test_content_is_what_the_images_show_wherever_they_lie(tmp_path):
    tables = [data.split_by_lesion(data.load_dataset(kaggle(tmp_path / place))) for place in ("a", "b")]
    assert data.content(tables[0]) == data.content(tables[1])
    picture(tmp_path / "b" / "HAM10000_images_part_1" / "ISIC_0000002.jpg", 99)
    assert data.content(tables[0]) != data.content(tables[1])
    assert data.content(tables[0]) != data.content(data.split_by_lesion(tables[0], seed=1))


def test_check_counts_what_would_leak(tmp_path):
    folder = kaggle(tmp_path / "data", images=28)
    images = sorted(folder.rglob("*.jpg"))
    shutil.copy(images[0], images[7])  # of another lesion of that class: one lesion, then
    report, bad = data.check(folder)
    assert bad == 0
    # A pair stays together with chance 0.7² + 0.15² + 0.15² = 0.535, the four images with 0.241.
    expected = 12 * 0.465 + 0.759
    assert f"lesions with several images: 13; a random split by image would put about {expected:.0f} " in report
    assert f"identical files: 1 group(s) ({images[0].stem} = {images[7].stem})" in report
    assert "images of two classes: 0" in report
    line = next(line for line in report.splitlines() if line.startswith("MEL"))
    assert line.split()[1:3] == ["2", "4"]
    shutil.copy(images[0], images[1])  # of another class: nobody knows which one is right
    report, bad = data.check(folder)
    assert bad == 1  # `run` would refuse it
    assert "images of two classes: 1 (HAM_0000000)" in report and "identical files: 1 group(s)" in report


@pytest.mark.parametrize("column", ["dx", "lesion_id", "image_id"])
def test_metadata_without_a_column(tmp_path, column):
    folder = kaggle(tmp_path / "data")
    pd.read_csv(folder / "HAM10000_metadata.csv").drop(columns=column).to_csv(folder / "HAM10000_metadata.csv")
    with pytest.raises(UserError, match=f"no column {column}"):
        data.load_dataset(folder)


def test_a_column_that_says_what_is_generated_is_read_whatever_its_words(tmp_path):
    folder = kaggle(tmp_path / "data", images=28)
    table = pd.read_csv(folder / "HAM10000_metadata.csv")
    table.assign(synthetic=0).to_csv(folder / "HAM10000_metadata.csv", index=False)
    assert not data.load_dataset(folder)["synthetic"].any()
    table.assign(synthetic="perhaps").to_csv(folder / "HAM10000_metadata.csv", index=False)
    with pytest.raises(UserError, match="column synthetic must say True or False"):
        data.load_dataset(folder)


def test_datasets_without_an_image(tmp_path):
    for code in CLASSES:
        (tmp_path / "classes" / code).mkdir(parents=True)
    kaggle(tmp_path / "kaggle", images=7)
    metadata = tmp_path / "kaggle" / "HAM10000_metadata.csv"
    metadata.write_text(metadata.read_text().splitlines()[0] + "\n")
    for folder in (tmp_path / "classes", tmp_path / "kaggle"):
        for look in (data.load_dataset, data.check):
            with pytest.raises(UserError, match="holds no image that can be used"):
                look(folder)


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        data.load_dataset(tmp_path / "none")
    with pytest.raises(UserError, match="no dataset that we know"):
        data.load_dataset(tmp_path)
    kaggle(tmp_path / "a", images=7)
    kaggle(tmp_path / "b", images=7)
    with pytest.raises(UserError, match="more than one dataset"):
        data.load_dataset(tmp_path)
    (tmp_path / "a" / "HAM10000_metadata.csv").write_text("")
    with pytest.raises(UserError, match="not a readable table"):
        data.load_dataset(tmp_path / "a")


def test_of_images_of_one_name_the_jpeg_counts(tmp_path):
    folder = kaggle(tmp_path)
    for number, suffix in enumerate((".bmp", ".png", ".tif")):  # masks, say, in a folder that sorts first
        picture(folder / "A" / f"ISIC_0000000{suffix}", number)
    table = data.load_dataset(folder).set_index("image_id")
    assert table.loc["ISIC_0000000", "path"].endswith("images_part_1/ISIC_0000000.jpg")


@pytest.mark.parametrize("suffix", [".jfif", ".bmp", ".TIF", ".tiff", ".webp", ".JPEG"])
def test_other_formats_of_images_are_read_too(tmp_path, suffix):
    for number, code in enumerate(CLASSES):
        picture(tmp_path / code / f"name.with.dots{suffix}", number)
    table = data.load_dataset(tmp_path)
    assert list(table["image_id"]) == [f"{code}/name.with.dots" for code in CLASSES]
    named = pd.DataFrame({"image_id": [f"A.1{suffix}"], "lesion_id": ["L"], "dx": ["mel"]})
    named.to_csv(picture(tmp_path / "ham" / f"A.1{suffix}", 0).parent / "HAM10000_metadata.csv", index=False)
    assert list(data.load_dataset(tmp_path / "ham")["image_id"]) == ["A.1"]


# Image cache


def test_cache_equals_a_plain_loop_and_notices_a_changed_image(tmp_path):
    folder = kaggle(tmp_path / "data")
    table = data.load_dataset(folder).sample(frac=1, random_state=0)
    cached = data.image_cache(table, 16)

    def plain():
        images = [Image.open(path).convert("RGB") for path in table["path"]]  # of 30 × 22 px
        squares = [image.resize((16, 16), Image.Resampling.BICUBIC, box=(4, 0, 26, 22)) for image in images]
        return np.stack([np.asarray(square) for square in squares])

    assert cached.dtype == np.uint8 and isinstance(cached, np.memmap)
    np.testing.assert_array_equal(cached, plain())
    data.image_cache(table, 16)[:] = 0  # one reader's scribbles reach neither the file nor another reader
    assert data.image_cache(table, 16).filename == cached.filename

    path = table["path"].iloc[3]
    before = os.stat(path)
    picture(tmp_path / "other.jpg", 1234)
    shutil.copy(tmp_path / "other.jpg", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = data.image_cache(table, 16)
    assert changed.filename != cached.filename
    np.testing.assert_array_equal(changed, plain())


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (45, 45)])
def test_a_round_lesion_stays_round_and_in_the_middle_whatever_the_format(tmp_path, size):
    y, x = np.ogrid[: size[1], : size[0]]
    lesion = np.hypot(x - (size[0] - 1) / 2, y - (size[1] - 1) / 2) < 15
    Image.fromarray(np.where(lesion, 40, 200).astype(np.uint8)).save(tmp_path / "lesion.png")
    (image,) = data.load_images([tmp_path / "lesion.png"], 90)
    dark = image[..., 0] < 120
    ends = [np.flatnonzero(dark.any(axis))[[0, -1]] for axis in (0, 1)]
    assert np.abs(np.array(ends) - [[15, 74]] * 2).max() <= 1  # 30 px of 45, twice as large


def test_grey_of_16_bits_keeps_its_shades(tmp_path):
    shades = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(shades).save(tmp_path / name)
    images = data.load_images([tmp_path / "grey.png", tmp_path / "grey.tif"], 8)
    np.testing.assert_array_equal(images, np.stack([shades >> 8] * 3, axis=-1)[None].repeat(2, 0))


def test_an_image_is_seen_as_its_camera_was_held(tmp_path):
    drawn = np.zeros((12, 8, 3), np.uint8)
    drawn[:4] = 255, 0, 0
    upright = Image.fromarray(drawn)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=orientation)
    images = data.load_images([tmp_path / "upright.png", tmp_path / "turned.png"], 8)
    np.testing.assert_array_equal(*images)
    assert images[0][0].any()
    upright.save(tmp_path / "damaged.png", exif=b"Exif\x00\x00no such thing")
    np.testing.assert_array_equal(data.load_images([tmp_path / "damaged.png"], 8)[0], images[0])


def test_pixels_of_32_bits_are_refused_rather_than_black(tmp_path):
    table = data.load_dataset(kaggle(tmp_path / "data"))
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / "integer.tif")
    for name in ("float.tif", "integer.tif"):
        with pytest.raises(ValueError, match="32 bits"):
            data.load_images([tmp_path / name], 8)
    with pytest.raises(UserError, match=r"unreadable \(.*float\.tif"):
        data.image_cache(table.assign(path=str(tmp_path / "float.tif")), 8)


def test_cache_folder_and_missing_image(tmp_path, cache):
    table = data.load_dataset(kaggle(tmp_path / "data"))
    file = data.image_cache(table, 8, folder=tmp_path / "here").filename
    assert str(file).startswith(str(tmp_path / "here"))
    assert [path.name for path in (tmp_path / "here").iterdir()] == [os.path.basename(file)]
    os.unlink(table["path"].iloc[0])
    with pytest.raises(UserError, match="1 image"):
        data.image_cache(table, 8)


def test_cache_keeps_the_order_of_the_table(tmp_path):
    table = data.load_dataset(kaggle(tmp_path / "data"))
    there, back = data.image_cache(table, 8), data.image_cache(table[::-1], 8)
    np.testing.assert_array_equal(there, back[::-1])


def test_scribbles_on_a_cache_reach_no_other_reader(tmp_path):
    table = data.load_dataset(kaggle(tmp_path / "data", images=7))
    before = np.array(data.image_cache(table, 8))
    data.image_cache(table, 8)[:] = 0
    np.testing.assert_array_equal(data.image_cache(table, 8), before)


def test_cache_notices_another_image_of_the_same_size(tmp_path):
    path = picture(tmp_path / "lesion.bmp", 0)
    table = pd.DataFrame({"path": [str(path)]})
    before, facts = np.array(data.image_cache(table, 8)), os.stat(path)
    picture(path, 1)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert path.stat().st_size == facts.st_size
    np.testing.assert_array_equal(data.image_cache(table, 8), data.load_images([path], 8))
    assert not np.array_equal(data.image_cache(table, 8), before)


def test_an_image_that_could_not_be_read_once_is_tried_again(tmp_path, monkeypatch):
    table = pd.DataFrame({"path": [str(picture(tmp_path / "lesion.png", 0))]})
    with monkeypatch.context() as patch, pytest.raises(UserError, match="missing or unreadable"):
        patch.setattr(data, "_digest", lambda path: "")  # a network drive hiccups
        data.image_cache(table, 8)
    assert data.image_cache(table, 8).shape == (1, 8, 8, 3)


def test_a_cache_that_could_not_be_filled_is_made_anew(tmp_path, monkeypatch):
    table, decode = data.load_dataset(kaggle(tmp_path / "data", images=7)), data._decode

    def killed(path, size):
        if path == table["path"].iloc[-1]:
            raise KeyboardInterrupt
        return decode(path, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_decode", killed)
        data.image_cache(table, 8)
    np.testing.assert_array_equal(data.image_cache(table, 8), data.load_images(table["path"], 8))


def test_a_table_read_again_keeps_the_zeros_of_its_ids(tmp_path):
    table = made_up(lesions=3)
    for column in ("image_id", "lesion_id"):
        table[column] = [f"{number:05d}" for number in pd.factorize(table[column])[0]]
    table = data.split_by_lesion(table)
    data.save_table(table, tmp_path / "table.csv")
    again = data.read_table(tmp_path / "table.csv")
    assert again[["image_id", "lesion_id"]].equals(table[["image_id", "lesion_id"]])


def test_a_table_with_an_unknown_label_or_an_image_twice_is_refused(tmp_path):
    table = data.split_by_lesion(made_up())
    table.assign(label=table["label"].replace("DF", "SCC")).to_csv(tmp_path / "label.csv", index=False)
    with pytest.raises(UserError, match=r"unknown label\(s\) SCC"):
        data.read_table(tmp_path / "label.csv")
    pd.concat([table, table[:1]]).to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(UserError, match=r"1 image\(s\) stand in the table twice \(I_00000\)"):
        data.read_table(tmp_path / "twice.csv")
    with pytest.raises(UserError, match="fractions"):
        data.split_by_lesion(made_up(), (1.2, -0.1, -0.1))


def test_content_tells_labels_apart(tmp_path):
    table = data.split_by_lesion(data.load_dataset(kaggle(tmp_path / "data")))
    assert data.content(table) != data.content(table.assign(label=table["label"].replace("DF", "NV")))


def test_another_seed_draws_another_phantom():
    digests = [data._file_facts(data.load_dataset("phantom", phantom=(140, 32, seed))["path"]) for seed in (5, 6)]
    assert not set(digests[0].values()) & set(digests[1].values())


def isic(folder, rows):
    """Ground truth of {id: classes}, and a picture of each."""
    frame = pd.DataFrame([[each] + [float(code in row) for code in CLASSES] for each, row in rows.items()])
    frame.columns = ["image", *CLASSES]
    for number, each in enumerate(rows):
        picture(folder / "Input" / f"{each}.jpg", number)
    frame.to_csv(folder / "ISIC2018_Task3_Training_GroundTruth.csv", index=False)
    return folder


def test_one_hot_rows_of_two_classes_and_of_none_are_no_label(tmp_path):
    with pytest.raises(UserError, match=r"1 unknown label BCC\+NV \(b\); 1 unknown label no class \(c\)"):
        data.load_dataset(isic(tmp_path, {"a": ["NV"], "b": ["NV", "BCC"], "c": []}))


def test_ids_of_isic_keep_their_zeros_and_groupings_may_be_there_twice(tmp_path):
    folder = isic(tmp_path, {"0001": ["NV"], "0010": ["NV"], "0011": ["DF"]})
    lesions = pd.DataFrame({"image": ["0001", "0010", "0011"], "lesion_id": ["007", "007", "008"]})
    for place in ("a", "b"):
        (folder / place).mkdir()
        lesions.to_csv(folder / place / "ISIC2018_Task3_Training_LesionGroupings.csv", index=False)
    table = data.load_dataset(folder)
    assert list(table["image_id"]) == ["0001", "0010", "0011"] and list(table["lesion_id"]) == ["007", "007", "008"]


def test_a_hidden_folder_holds_no_dataset(tmp_path):
    kaggle(tmp_path / ".trash", images=7)
    kaggle(tmp_path / "a", images=7)
    assert len(data.load_dataset(tmp_path)) == 7


def test_another_dermamnist_of_the_same_name_has_its_own_images(tmp_path):
    for place in ("a", "b"):
        images = np.full((7, 28, 28, 3), ord(place), np.uint8)
        arrays = {f"{part}_images": images for part in data.SPLITS}
        arrays |= {f"{part}_labels": np.arange(7)[:, None] for part in data.SPLITS}
        (tmp_path / place).mkdir()
        np.savez(tmp_path / place / "dermamnist.npz", **arrays)
        table = data.load_dataset(tmp_path / place).drop_duplicates("path")
        assert (data.load_images(table["path"], 28) == ord(place)).all()


def test_a_whole_folder_may_be_read_by_others_and_hides_no_error(tmp_path):
    with whole_folder(tmp_path / "made"):
        pass
    assert (tmp_path / "made").stat().st_mode & 0o055 == 0o055
    with pytest.raises(PermissionError), whole_folder(tmp_path / "other"):
        raise PermissionError(errno.EACCES, "denied")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
