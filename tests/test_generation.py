"""Every image depends on its own numbers alone, and can be made again from its row."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from stgan_utils import checkpoints, generation
from stgan_utils.config import UserError
from stgan_utils.fastgan import Generator
from stgan_utils.files import sha256


@pytest.fixture(scope="module")
def generator():
    """Untrained, but with noise that shows and with BatchNorm statistics, so that images differ visibly."""
    torch.manual_seed(0)
    generator = Generator(64, 8, nz=32)
    with torch.no_grad():
        for layer, _ in generator.noise_layers():
            layer.weight.fill_(0.3)
        for _ in range(20):
            generator(torch.randn(8, 32))
    return generator.eval()


def furthest(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_an_image_is_the_same_alone_and_in_any_batch(generator, monkeypatch):
    monkeypatch.setattr(generation, "BATCH", 4)
    batch = generation.sample(generator, 5, range(7))
    assert batch.shape == (7, 64, 64, 3) and batch.dtype == np.uint8
    for index in (0, 3, 6):
        assert furthest(generation.sample(generator, 5, [index])[0], batch[index]) <= 1
    assert furthest(generation.sample(generator, 5, [6, 2])[1], batch[2]) <= 1


def test_seed_and_index_make_the_image_and_nothing_else(generator):
    before = torch.get_rng_state()
    first = generation.sample(generator, 5, range(4))
    assert torch.equal(torch.get_rng_state(), before)  # a training around it is not disturbed
    torch.manual_seed(99)
    assert np.array_equal(generation.sample(generator, 5, range(4)), first)
    assert all(furthest(first[i], first[j]) > 10 for i in range(4) for j in range(i))
    assert furthest(generation.sample(generator, 6, [0])[0], first[0]) > 10


def test_noise_is_part_of_what_an_index_stands_for(generator):
    z, noise = generation.latents(generator, 5, [1, 2])
    assert z.shape == (2, 32) and [tuple(plane.shape) for plane in noise] == [(2, 1, s, s) for s in (8, 8, 32, 32)]
    again, again_noise = generation.latents(generator, 5, [2])
    assert torch.equal(again[0], z[1]) and all(torch.equal(a[0], b[1]) for a, b in zip(again_noise, noise, strict=True))
    everything = torch.cat([z.flatten(), *(plane.flatten() for plane in noise)])
    assert everything.unique().numel() > 0.999 * everything.numel()


def test_mode_and_noise_of_the_generator_are_given_back(generator):
    generator.train()
    statistics = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    in_training = generation.sample(generator, 5, [0])
    assert generator.training and all(layer.noise is None for layer, _ in generator.noise_layers())
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in generator.state_dict().items())
    generator.eval()
    assert np.array_equal(generation.sample(generator, 5, [0]), in_training)


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, -1 + 2 / 255])
    pictures = generation.to_uint8(values.reshape(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert pictures.shape == (1, 1, 6, 3) and pictures[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 1]


def test_write_images_resumes_and_each_can_be_made_again_from_its_row(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "BATCH", 3)
    model = tmp_path / "best.safetensors"
    checkpoints.save_generator(model, generator, {})
    rows = generation.write_images(generator, "DF", 8, 7, tmp_path, sha256(model))
    stored = pd.read_csv(tmp_path / "synthetic.csv")
    assert list(stored.columns) == ["file", "class", "seed", "latent_index", "truncation", "checkpoint_sha256"]
    pd.testing.assert_frame_equal(stored, rows)
    assert stored["file"].tolist() == [f"images/DF_{i:04d}.png" for i in range(1, 9)]
    assert sorted(f"images/{path.name}" for path in (tmp_path / "images").iterdir()) == stored["file"].tolist()

    row = stored.iloc[5]
    assert sha256(model) == row["checkpoint_sha256"]
    numbers = row["seed"], [row["latent_index"]], row["truncation"]
    again = generation.sample(checkpoints.load_generator(model), *numbers)[0]
    assert furthest(again, np.asarray(Image.open(tmp_path / row["file"]))) <= 1

    # A kill before the end: some images are not there yet.
    written = {file: (tmp_path / file).read_bytes() for file in stored["file"]}
    gone, kept = stored["file"].tolist()[3:6], stored["file"].iloc[0]
    for file in gone:
        (tmp_path / file).unlink()
    untouched = (tmp_path / kept).stat().st_mtime_ns
    pd.testing.assert_frame_equal(generation.write_images(generator, "DF", 8, 7, tmp_path, sha256(model)), rows)
    assert {file: (tmp_path / file).read_bytes() for file in stored["file"]} == written
    assert (tmp_path / kept).stat().st_mtime_ns == untouched

    # Other numbers: no image of the old ones stays under a new row.
    other = generation.write_images(generator, "DF", 4, 8, tmp_path, sha256(model))
    assert sorted(f"images/{path.name}" for path in (tmp_path / "images").iterdir()) == other["file"].tolist()
    assert all((tmp_path / file).read_bytes() != written[file] for file in other["file"])


def test_nothing_to_make_is_an_empty_list(generator, tmp_path):
    assert len(generation.write_images(generator, "DF", 0, 7, tmp_path, "0" * 64)) == 0
    assert pd.read_csv(tmp_path / "synthetic.csv").empty


def test_list_synthetic(generator, tmp_path):
    with pytest.raises(UserError, match=r"no generated images.*notebooks/03_stage2"):
        generation.list_synthetic(tmp_path)
    for code in ("VASC", "DF"):
        generation.write_images(generator, code, 2, 0, tmp_path / f"03_stage2_{code}", "0" * 64)
    found = generation.list_synthetic(tmp_path)
    assert found["class"].tolist() == ["DF", "DF", "VASC", "VASC"]
    assert found["path"].tolist() == sorted(str(path) for path in tmp_path.rglob("*.png"))


def test_list_synthetic_of_balanced_classes_says_what_to_set(generator, tmp_path):
    generation.write_images(generator, "DF", 0, 0, tmp_path / "03_stage2_DF", "0" * 64)
    with pytest.raises(UserError, match="set generate"):
        generation.list_synthetic(tmp_path)


def test_list_kept(tmp_path):
    with pytest.raises(UserError, match="run step 04"):
        generation.list_kept(tmp_path)
    file = tmp_path / "04_deduplicate" / "dedup.csv"
    file.parent.mkdir()
    rows = pd.DataFrame({"path": ["1", "2", "3"], "class": ["df", "DF", "mel"], "kept": [True, False, True]})
    rows.assign(kept_auto=[False, True, True]).to_csv(file, index=False)
    for which, paths in (("raw", [1, 2, 3]), ("kept", [1, 3]), ("auto", [2, 3])):
        assert list(generation.list_kept(tmp_path, which)["path"]) == [f"{tmp_path}/{number}" for number in paths]
    assert list(generation.list_kept(tmp_path)["label"]) == ["DF", "MEL"]
    rows.to_csv(file, index=False)
    with pytest.raises(UserError, match="without real lesions"):
        generation.list_kept(tmp_path, "auto")
    rows.assign(**{"class": "all"}).to_csv(file, index=False)
    with pytest.raises(UserError, match="of class ALL: put them into folders"):
        generation.list_kept(tmp_path)
    rows.assign(**{"class": 1}).to_csv(file, index=False)  # folders named 0, 1, 2
    with pytest.raises(UserError, match="of class 1: put them into folders"):
        generation.list_kept(tmp_path)


def test_a_run_folder_that_was_moved_knows_its_own_images(tmp_path):
    before, after, elsewhere = tmp_path / "before", tmp_path / "after", tmp_path / "mine" / "2.png"
    paths = pd.Series([str(before / "03_stage2_DF" / "images" / "1.png"), str(elsewhere)])
    kept = pd.DataFrame({"path": paths, "class": "DF", "kept": True, "duplicate_of": [None, paths[0]]})
    written = generation.movable(kept, before)
    assert written["duplicate_of"].tolist()[1] == "03_stage2_DF/images/1.png" and written["duplicate_of"].isna()[0]
    (after / "04_deduplicate").mkdir(parents=True)
    written.to_csv(after / "04_deduplicate" / "dedup.csv", index=False)
    found = generation.list_kept(after)["path"].tolist()
    assert found == [str(after / "03_stage2_DF" / "images" / "1.png"), str(elsewhere)]


def test_linked_folders_are_looked_into(tmp_path):
    for name in ("disk", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "disk" / "1.png").touch()
    (tmp_path / "mine" / "DF").symlink_to(tmp_path / "disk")
    assert generation.list_images(tmp_path / "mine")["class"].tolist() == ["DF"]


def test_list_images(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        generation.list_images(tmp_path / "absent")
    with pytest.raises(UserError, match="no image"):
        generation.list_images(tmp_path)
    for name in ("b/2.JPG", "b/1.png", "a/x.jpeg", "loose.png", "b/notes.txt", "b/.3.db3629d6.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = generation.list_images(tmp_path)
    assert found["class"].tolist() == ["a", "b", "b", "all"]
    assert [path.removeprefix(f"{tmp_path}/") for path in found["path"]] == [
        "a/x.jpeg",
        "b/1.png",
        "b/2.JPG",
        "loose.png",
    ]


def test_seeds_share_no_image(generator):
    """A sum of seed and index would: image 1 of seed 5 is not image 0 of seed 6."""
    ours, theirs = (generation.latents(generator, seed, range(4))[0] for seed in (5, 6))
    assert len(torch.cat([ours, theirs]).unique(dim=0)) == 8


def test_an_image_that_cannot_be_written_is_no_silence(generator, tmp_path):
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(OSError, match="images"):
        generation.write_images(generator, "DF", 2, 7, tmp_path, "0" * 64)


def test_a_kill_leaves_no_half_image_under_its_name(generator, tmp_path, monkeypatch):
    def killed(image, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        generation.write_images(generator, "DF", 2, 7, tmp_path, "0" * 64)
    assert not list((tmp_path / "images").iterdir())
