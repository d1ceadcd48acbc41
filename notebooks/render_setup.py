"""Writes the setup cell and the badges of every notebook, and the badges of the README: `make notebooks`.

Both name the version that this is and where it is published: `stgan_utils/__init__.py`.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # works before anything is installed

import stgan_utils  # noqa: E402
from stgan_utils.lesions import MINORITY  # noqa: E402

SETUP = """\
# @title Setup: run this cell first
# The package: of this checkout, installed, of a Kaggle data set, or fetched now. The torch that is here stays.
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

here = Path.cwd()
found = [folder for folder in (here, *here.parents) if (folder / "stgan_utils").is_dir()]
if not found and not find_spec("stgan_utils"):
    mounts = here.parent / "input"  # as Kaggle has them
    found = [path.parent for depth in range(1, 5) for path in sorted(mounts.glob("*/" * depth + "stgan_utils"))]
sys.path[:0] = [str(folder) for folder in found[:1]]
if not all(map(find_spec, ("stgan_utils", "imagehash", "lpips", "torch_fidelity", "torchmetrics"))):
    release = "stgan-utils @ {repository}/archive/refs/tags/v{version}.tar.gz"
    kept = [f"{{name}}=={{version(name)}}" for name in ("torch", "torchvision", "numpy") if find_spec(name)]
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--retries=1", *kept, release]).returncode:
        raise ModuleNotFoundError(
            "The package cannot be installed. No internet? On Kaggle switch it on (Settings, Internet) or add a data "
            "set that holds the repository; elsewhere start this notebook in a clone of the repository."
        )
"""
SETUP = SETUP.format(repository=stgan_utils.REPOSITORY, version=stgan_utils.__version__).rstrip("\n")
# No reader came for it: folded in Jupyter, Kaggle and Colab.
FOLDED = {"jupyter": {"source_hidden": True}, "_kg_hide-input": True, "cellView": "form"}
BADGES = (
    ("Colab", "https://colab.research.google.com/github/", "https://colab.research.google.com/assets/colab-badge.svg"),
    (
        "Kaggle",
        "https://kaggle.com/kernels/welcome?src=https://github.com/",
        "https://kaggle.com/static/images/open-in-kaggle.svg",
    ),
)


def badges(name):
    """One line of HTML: the notebook `name`, of this version, to be opened in Colab and in Kaggle."""
    where = f"{stgan_utils.REPOSITORY.removeprefix('https://github.com/')}/blob/v{stgan_utils.__version__}/notebooks"
    return " ".join(
        f'<a href="{opens}{where}/{name}"><img src="{image}" alt="Open in {place}"></a>'
        for place, opens, image in BADGES
    )


def render(text, name):
    """A notebook's JSON text with its badges on top of the first cell and the setup in its first code cell."""
    notebook = json.loads(text)
    top = notebook["cells"][0]
    lines = [line for line in top["source"] if "Open in Colab" not in line]
    while lines[0] == "\n":
        lines.pop(0)
    top["source"] = [badges(name) + "\n", "\n", *lines]
    setup = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    setup["source"] = SETUP.splitlines(keepends=True)
    setup["metadata"] = FOLDED
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def render_readme(text):
    """The README with the badges of each notebook, where they are, brought to this version."""
    anchor = r'<a href="https://(?:colab|kaggle)[^"]*/notebooks/([\w.]+)">.*?</a>'
    return re.sub(rf"{anchor} {anchor}", lambda found: badges(found[1]), text)


def targets():
    """{file: the name that its badges open}: the notebooks, and for the six of the classes their template."""
    rendered = {HERE / f"03_stage2_{code}.ipynb" for code in MINORITY}
    names = {path: path.name for path in sorted(HERE.glob("*.ipynb")) if path not in rendered}
    return names | {HERE / "03_stage2.template.ipynb": "03_stage2_{{CODE}}.ipynb"}


if __name__ == "__main__":
    for path, name in targets().items():
        path.write_text(render(path.read_text(encoding="utf-8"), name), encoding="utf-8")
    readme = HERE.parent / "README.md"
    readme.write_text(render_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")
