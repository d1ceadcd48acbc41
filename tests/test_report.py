"""The report stands alone, tells everything and trusts nothing."""

import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from stgan_utils import files, report
from stgan_utils.config import UserError


class Page(HTMLParser):
    """Every tag and every address of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []


def write_step(run_dir, step, width=20, **more):
    buffer = io.BytesIO()
    Image.new("RGB", (width, 10)).save(buffer, "PNG")
    (run_dir / step / "figures").mkdir(parents=True)
    (run_dir / step / "figures" / "a.png").write_bytes(buffer.getvalue())
    result = {
        "step": step,
        "settings": {"seed": 0},
        "data": "phantom",
        "data_name": "phantom",
        "profile": "smoke",
        "seconds": 61.0,
        "device": "cpu",
        "versions": {"torch": "2.9"},
        "numbers": {},
        "figures": [{"file": "figures/a.png", "caption": '<script>alert("x")</script>'}],
        "tables": [{"title": "counts & co", "columns": ["class", "n"], "rows": [["<b>MEL</b>", 1234], ["NV", None]]}],
        "models": [{"file": "m.safetensors", "sha256": "ab" * 32}],
        "learnt": "It <i>runs</i>.",
    }
    files.write_json(run_dir / step / "result.json", result | more)


def metrics(value):
    return {"metrics": {"balanced_accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1}}}


def test_page_is_self_contained_escaped_and_complete(tmp_path):
    write_step(tmp_path, "00_start_here")
    write_step(tmp_path, "01_baseline")
    released = {"file": "best.safetensors", "origin": "released: stage2-mel-64px", "sha256": "cd" * 32}
    write_step(tmp_path, "03_stage2_MEL", width=2400, models=[released])
    write_step(tmp_path, "04_deduplicate", numbers={"generated": 5000, "after_phash": 4000, "after_whash": 3000})
    write_step(tmp_path, "05_classifier", numbers={"test": {"real": metrics(0.5), "both": metrics(0.625)}})
    write_step(tmp_path, "07_report")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_baseline.ipynb").touch()

    text = report.build(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("img") == 5
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    inside = ("#", "data:", "notebooks/")
    assert all(link.startswith(inside) for link in page.links)
    assert "notebooks/01_baseline.ipynb" in page.links
    assert "notebooks/00_start_here.ipynb" not in page.links
    assert not {"script", "i", "b", "iframe", "object"} & set(page.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    for expected in (
        "&lt;b&gt;MEL&lt;/b&gt;",
        "1,234",
        "–",
        "drawn, not photographed",
        "0.5 (0.4 – 0.6)",
        "0.625 (0.525 – 0.725)",
        "5,000",
        "4,000",
        "3,000",
        "ab" * 32,
        "made here",
        "released: stage2-mel-64px",
        "cd" * 32,
        "melanoma",
        'name="viewport"',
    ):
        assert expected in text, expected
    assert text.count("Not a medical device") == 1


def test_real_data_carry_no_phantom_warning_and_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"notebooks/00_start_here\.ipynb first"):
        report.build(tmp_path)
    write_step(tmp_path, "00_start_here", data="/data", data_name="HAM10000, n = 10,015")
    text = report.build(tmp_path).read_text(encoding="utf-8")
    assert "drawn, not photographed" not in text and "HAM10000, n = 10,015" in text
    (tmp_path / "00_start_here" / "figures" / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png is gone"):
        report.build(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
