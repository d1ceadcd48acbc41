"""docs/render_real_run.py: what the documents show of a run is what the run found."""

import re
import shutil
import sys

import pytest
from conftest import ROOT

from stgan_utils import release, runs
from stgan_utils.lesions import MINORITY

sys.path.insert(0, str(ROOT / "docs"))
import render_real_run


@pytest.fixture(scope="module")
def docs(smoke, tmp_path_factory):
    """What the documents would show of the smoke run."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "GENERATED", 16)
        render_real_run.main(smoke, folder)
    return folder


def test_the_page_says_what_the_steps_found(docs, smoke):
    page = (docs / "real-run.md").read_text(encoding="utf-8")
    assert "\npython -m stgan_utils run --data phantom --profile smoke --out RUN\n" in page
    found = runs.result(smoke, "05_classifier")["numbers"]
    without, with_generated = (arm["metrics"]["balanced_accuracy"]["value"] for arm in found["test"].values())
    row = next(line for line in page.splitlines() if line.startswith("| balanced accuracy |"))
    assert [cell.split()[0] for cell in row.split("|")[2:4]] == [f"{without:.3f}", f"{with_generated:.3f}"]
    for code in MINORITY:
        numbers = runs.result(smoke, f"03_stage2_{code}")["numbers"]
        assert re.search(rf"\| {code} \| {numbers['real']} \| {numbers['kid_start']:.3f} \|", page)
        left = runs.result(smoke, "04_deduplicate")["numbers"]["per_class"][code]
        assert f"| {code} | {left['generated']} | {left['after_phash']} | {left['after_whash']} |" in page
    for figure in re.findall(r"\]\((figures/[^)]*)\)", page):
        assert (docs / figure).stat().st_size


def test_settings_that_differ_from_the_profile_are_in_the_command(smoke):
    results = {step.name: runs.result(smoke, step.name) for step in render_real_run.pipeline.STEPS}
    for code in MINORITY:
        results[f"03_stage2_{code}"]["settings"]["generate"] = 4000
    assert render_real_run.command(results).endswith("--out RUN -p stage2.generate 4000")


def test_executed_notebooks_are_pages_of_no_machine(docs, smoke):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (docs / "executed").iterdir()}
    assert set(pages) == set(render_real_run.SHOWN)
    for page in pages.values():
        assert str(smoke) not in page and str(ROOT) not in page and "data:image/png" not in page
    assert "data:image/jpeg" in pages["07_report"] and "runs/smoke" in pages["00_start_here"]
    for name, page in pages.items():
        for target in re.findall(r'href="([^"#:]+\.(?:html|ipynb|md))', page):
            link = (ROOT / "docs" / "executed" / target).resolve()
            assert link.exists() or (docs / "executed" / target).exists(), f"{name}: {target}"


def test_an_unfinished_run_is_refused(smoke, tmp_path):
    shutil.copytree(smoke / runs.START, tmp_path / "run" / runs.START)
    with pytest.raises(SystemExit, match="is not a finished run: 01_baseline, "):
        render_real_run.main(tmp_path / "run", tmp_path)


def test_folders_of_a_machine_go_and_addresses_stay(tmp_path):
    def left(text):
        return render_real_run.of_no_machine(text, tmp_path, "/data/ham")

    assert left(f"{tmp_path}/03/x.png") == f"runs/{tmp_path.name}/03/x.png"
    assert (
        left("<td>/data/ham/part_1/a.jpg</td> <td>/data/ham/...</td>") == "<td>ham/part_1/a.jpg</td> <td>ham/...</td>"
    )
    assert left('data = "/data/ham", from /opt/w/m.pth') == 'data = "ham", from m.pth'
    for text in ("https://a.org/b/c.html", "x/y/z 3/4", "</td><td>a</td>", "data:image/png;base64,iVBO/ab/cd+/ef/gh"):
        assert left(text) == text


def test_what_differed_between_steps_names_them():
    results = {"01_baseline": "bf16", "03_stage2_BCC": "float32", "03_stage2_DF": "float32", "05_classifier": "bf16"}
    assert render_real_run.by_step(results, str) == "bf16 (01, 05); float32 (03)"
    assert render_real_run.by_step(results, lambda _: "e50bd22") == "e50bd22"
