"""The embedded dataset: what it promises about counts, lesions and seeds, and that its classes can be told apart."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

from stgan_utils import config, data, phantom
from stgan_utils.config import UserError
from stgan_utils.lesions import CLASSES


def rng(*seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("size", [16, 64, 100])
def test_draw_gives_a_picture(label, size):
    image = phantom.draw(label, size, rng(0))
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert image.std() > 5


def test_draw_depends_on_the_generators_alone():
    first = phantom.draw("MEL", 48, rng(1), rng(2))
    np.testing.assert_array_equal(first, phantom.draw("MEL", 48, rng(1), rng(2)))
    assert not np.array_equal(first, phantom.draw("MEL", 48, rng(3), rng(2)))
    assert not np.array_equal(first, phantom.draw("MEL", 48, rng(1), rng(4)))


def test_a_lesion_is_the_same_at_any_size():
    small = phantom.draw("NV", 32, rng(1), rng(2)).astype(float)
    large = Image.fromarray(phantom.draw("NV", 128, rng(1), rng(2))).resize((32, 32), Image.Resampling.BOX)
    other = phantom.draw("NV", 32, rng(5), rng(2)).astype(float)
    assert np.abs(small - large).mean() < 0.5 * np.abs(small - other).mean()


def test_dataset_has_the_schema_and_the_imbalance(phantom_dir):
    metadata = pd.read_csv(phantom_dir / "HAM10000_metadata.csv")
    columns = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset"]
    assert list(metadata.columns) == columns
    counts = metadata["dx"].str.upper().value_counts()
    assert counts.sum() == 210 and counts.min() >= 6 and 0.5 < counts["NV"] / 210 < 0.67
    assert (metadata.groupby("dx")["lesion_id"].nunique() >= 4).all()
    lesions = metadata.groupby("lesion_id")
    assert (lesions["dx"].nunique() == 1).all() and (lesions["age"].nunique() == 1).all()
    assert lesions.size().max() > 1
    assert set(metadata["dataset"]) == {"phantom"}
    for part in (1, 2):
        assert len(list((phantom_dir / f"HAM10000_images_part_{part}").glob("*.jpg"))) == 105


def test_full_size_imbalance_is_that_of_ham10000():
    labels = pd.Series([row["dx"].upper() for row in phantom._metadata(10015, 0)])
    assert labels.value_counts().to_dict() == phantom.HAM10000_COUNTS


def test_seed_decides(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        phantom.write_dataset(tmp_path / name, 140, 16, seed)
    content = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))}
        for name in "abc"
    }
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]
    assert len(set(content["a"].values())) == 141  # no picture twice


def test_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        phantom.write_dataset(tmp_path / "full", 140, 16, 0)
    with pytest.raises(UserError, match="at least 140"):
        phantom.write_dataset(tmp_path / "few", 30, 16, 0)

    draw, drawn = phantom.draw, []

    def killed(*arguments):
        drawn.append(1)
        if len(drawn) == 20:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(phantom, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        phantom.write_dataset(tmp_path / "cut", 140, 16, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_classes_can_be_told_apart_but_not_perfectly():
    """Colour and texture alone, linearly: far above chance, far below certainty."""
    features, labels = [], []
    for index, label in enumerate(CLASSES):
        for number in range(40):
            image = phantom.draw(label, 48, rng(9, index, number)).astype(np.float32) / 255
            middle, edge = image[8:40, 8:40], np.concatenate([image[:6].reshape(-1, 3), image[-6:].reshape(-1, 3)])
            relative = middle - edge.mean(0)
            steps = np.abs(np.diff(middle, axis=0)).mean((0, 1))
            features.append([*relative.mean((0, 1)), *relative.std((0, 1)), *relative.min((0, 1)), *steps])
            labels.append(label)
    features = np.array(features)
    features = (features - features.mean(0)) / features.std(0)
    model = LogisticRegression(max_iter=2000)
    predicted = cross_val_predict(model, features, labels, cv=GroupKFold(5), groups=np.arange(len(labels)))
    accuracy = np.mean(predicted == np.array(labels))
    assert 0.40 < accuracy < 0.90, accuracy


def test_phantom_loads_and_splits(phantom_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("STGAN_CACHE", str(tmp_path))
    table = data.split_by_lesion(data.load_dataset(phantom_dir))
    assert (table.groupby(["label", "split"]).size().unstack() > 0).all(axis=None)


@pytest.mark.parametrize("profile", ["smoke", "demo"])
def test_profiles_draw_enough_of_every_class_for_a_batch_of_stage2(profile):
    settings = config.resolve("data", profile)
    drawn = data.load_dataset("phantom", phantom=(settings.phantom_images, settings.phantom_size, settings.seed))
    train = data.split_by_lesion(drawn, seed=settings.seed).query("split == 'train'")
    assert train["label"].value_counts().reindex(CLASSES).min() >= config.resolve("stage2", profile).batch_size
