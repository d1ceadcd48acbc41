"""The notebooks as files: their anatomy, their parameters, and that they are committed without outputs."""

import ast
import functools
import importlib
import re
from dataclasses import fields

import nbformat
import pytest
from conftest import ROOT

from stgan_utils import pipeline
from stgan_utils.config import SETTINGS

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GLOSSARY = ROOT / "docs" / "glossary.md"
STEPS = {step.name: step for step in pipeline.STEPS}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    nb = nbformat.read(request.param, as_version=4)
    nbformat.validate(nb)
    nb.path = request.param
    return nb


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def prose(nb):
    return "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


def anchors(page):
    """The addresses that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def parameters(nb):
    """{name: default} of the one tagged cell."""
    (cell,) = [cell for cell in code_cells(nb) if "parameters" in cell.metadata.get("tags", [])]
    # Flat literals, one a line: what papermill can read and a reader can change.
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(cell.source).body
        if isinstance(statement, ast.Assign)
    }


def test_every_step_has_its_notebook_and_every_notebook_its_step():
    names = {path.stem for path in PATHS if not path.stem.endswith(".template")}
    assert names == set(STEPS)


def test_committed_without_outputs(notebook):
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(notebook))


def test_opens_with_question_answer_figure_and_time_and_ends_with_what_was_learnt(notebook):
    headings = re.findall(r"^# (.+)$", prose(notebook), re.MULTILINE)
    assert len(headings) == 1
    assert headings[0].startswith(notebook.path.stem[:2])
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    question, answer, figure, time, words = map(
        first.index, ("**Question:**", "**In short:**", "![", "**Time:**", "**Words:**")
    )
    assert question < answer < figure < time < words
    # On real images where there are figures, which is everywhere.
    assert "real" in first[answer:figure] and len(first[answer:figure].splitlines()) <= 6
    assert re.search(r"\*\*Time:\*\* \d+ minutes to read", first)
    assert "## What we learnt" in last
    assert notebook.path.stem.startswith("07") or "**Next:**" in last


def test_two_exercises_each_with_a_hidden_solution(notebook):
    last = notebook.cells[-1].source
    pattern = r"\*\*Exercise (\d)\.\*\* (.+?)\n\n<details><summary>Solution</summary>\n\n(.+?)\n</details>(?=\n\n|\n?$)"
    found = re.findall(pattern, last, re.DOTALL)
    assert [number for number, _, _ in found] == ["1", "2"]
    assert last.count("<details>") == last.count("</details>") == 2
    for _, asked, solution in found:
        assert asked.strip() and re.search(r"\d", solution)
        for code in re.findall(r"```python\n(.+?)```", solution, re.DOTALL):
            ast.parse(code)


def test_after_each_training_it_is_said_what_to_see_and_what_else_may_be_seen(notebook):
    cells = notebook.cells
    trainings = [i for i, c in enumerate(cells) if re.search(r"\btrain\(|ablation\.run\(", c.source)]
    trains = notebook.path.stem[:2] in ("01", "02", "03", "05")
    assert bool([i for i in trainings if cells[i].cell_type == "code"]) == trains
    for i in trainings:
        if cells[i].cell_type == "code":
            said = next(c.source for c in cells[i + 1 :] if "**What you should see:**" in c.source)
            assert re.search(r"\*\*If you see this\s+instead:\*\*", said)


def test_words_lead_to_the_glossary(notebook):
    line = next(line for line in notebook.cells[0].source.splitlines() if line.startswith("**Words:**"))
    linked = re.findall(r"\]\(\.\./docs/glossary\.md#([^)]+)\)", prose(notebook))
    assert len(linked) >= 3 and linked[0] in line
    assert set(linked) <= set(anchors(GLOSSARY))


def test_every_word_of_the_glossary_is_one_notebooks_and_is_used():
    text = GLOSSARY.read_text(encoding="utf-8")
    for heading, entry in re.findall(r"^### (.+?)\n(.+?)(?=\n### |\Z)", text, re.MULTILINE | re.DOTALL):
        (*_, explained) = re.findall(r"\]\(\.\./notebooks/([^)#]+)\)", entry)
        assert (ROOT / "notebooks" / explained).exists(), heading
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(anchors(GLOSSARY))
    linked = {
        word for path in PATHS for word in re.findall(r"glossary\.md#([^)\\]+)\)", path.read_text(encoding="utf-8"))
    }
    within = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert set(anchors(GLOSSARY)[1:]) <= linked | within


def test_figures_of_the_answers_are_those_of_the_documents(notebook):
    """What is quoted from runs on real images changes with them: then the notebook has to follow."""
    pages = [ROOT / "README.md", ROOT / "docs" / "real-run.md", ROOT / "weights" / "README.md"]
    known = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    answer = re.search(r"\*\*In short:\*\*.*?\n\n", notebook.cells[0].source, re.DOTALL)[0]
    quoted = re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", answer)
    assert [figure for figure in quoted if figure not in known] == []


def test_links_lead_somewhere(notebook):
    for target in re.findall(r"\]\(([^)#]+)\)", prose(notebook)):
        assert (notebook.path.parent / target).exists(), target


def test_parameters_are_those_of_the_settings(notebook):
    step = STEPS[notebook.path.stem.replace(".template", "_DF")]
    given = parameters(notebook)
    assert set(given) == {"data", "run_dir", "profile"} | {field.name for field in fields(SETTINGS[step.kind])}
    assert given["data"] == "auto" and given["profile"] == "demo" and given["run_dir"] == "runs/demo"
    # Defaults of settings are the profile's, so that they stand once.
    own = set(given) - {"data", "run_dir", "profile", "lesion"}
    assert all(given[name] is None for name in own)


def test_opens_its_own_step_with_what_the_pipeline_says_it_needs(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    step = STEPS[notebook.path.stem.replace(".template", "_DF")]
    opened = re.search(r'steps\.open_step\(f?"([^"]+)"', source).group(1).replace("{lesion}", "DF")
    assert step.name == opened.replace("03_stage2_DF", step.name)
    written = set(re.findall(r'"(0\d_[a-z0-9_]+?)"', source)) - {opened}
    missing = {name for name in step.needs if not name.startswith("03")} - written
    assert not missing or "pipeline.STEPS" in source


def test_setup_is_the_same_everywhere_and_first(notebook):
    reference = code_cells(nbformat.read(PATHS[0], as_version=4))[0].source
    assert code_cells(notebook)[0].source == reference


def test_logic_lives_in_the_package(notebook):
    for cell in code_cells(notebook):
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
        assert len(cell.source.splitlines()) <= 40
        assert not re.search(r"/content|/kaggle|!pip|%pip", cell.source)


def test_post_mortem_points_to_what_there_is():
    text = prose(nbformat.read(ROOT / "notebooks" / "06_post_mortem.ipynb", as_version=4))
    tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert tests and all(f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") for file, name in tests)
    made_in = re.findall(r"`((?:classifier|evaluation|layouts|backbone|data)\.[\w.]+)`", text)
    assert len(made_in) > 5
    for name in made_in:
        module, *parts = name.split(".")
        functools.reduce(getattr, parts, importlib.import_module(f"stgan_utils.{module}"))
