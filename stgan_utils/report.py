"""The last page: one self-contained HTML file made from the `result.json` files of a run folder alone."""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from stgan_utils import files, runs
from stgan_utils.config import UserError
from stgan_utils.lesions import LESIONS

REPORT = "07_report"
TITLES = {
    "00": "The data",
    "01": "Baseline: real images alone",
    "02": "Stage 1: one GAN for every class",
    "03": "Stage 2",
    "04": "Deduplication",
    "05": "Classifier: real and generated images",
    "06": "Post-mortem",
}
METRICS = {"balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "macro_auc": "macro AUC"}
WIDEST = 2000  # pixels; wider figures are scaled down


def build(run_dir, overview=()):
    """Writes `RUN_DIR/report.html`: no script, no outside resource, pictures inside.

    Args:
        overview: figures of step 07 itself, as `OpenStep.figures` lists them, for the top of the page.

    Raises:
        UserError: no step has been finished there, or a result's figure is missing.
    """
    run_dir = Path(run_dir).expanduser().resolve()
    results = [files.read_json(path) for path in sorted(run_dir.glob("*/result.json"))]
    results = [result for result in results if result["step"] != REPORT]
    if not results:
        raise UserError(f"No step has been finished in {run_dir}: run notebooks/{runs.START}.ipynb first.")
    numbers = {result["step"]: result["numbers"] for result in results}
    # {arm: what `evaluation.evaluate` gave on the real test split}
    arms = numbers.get("05_classifier", {}).get("test", {})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["value"] = _value
    page = environment.get_template("report.html.jinja").render(
        results=results,
        overview=_figures(run_dir / REPORT, overview),
        steps=[_section(run_dir, result) for result in results],
        phantom=results[0]["data"] == runs.PHANTOM,
        data_name=results[0]["data_name"],
        arms=list(arms),
        rows=_metric_rows(arms),
        models=[
            [result["step"], model["file"], model.get("origin", "made here"), model["sha256"]]
            for result in results
            for model in result["models"]
        ],
        kept=_kept(numbers.get("04_deduplicate", {})),
        seconds=sum(result["seconds"] for result in results),
    )
    path = run_dir / "report.html"
    with files.atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _section(run_dir, result):
    step = result["step"]
    number, code = step[:2], step.rpartition("_")[2]
    lesion = f": {code}, {LESIONS[code].name}" if code in LESIONS else ""
    notebook = f"notebooks/{step}.ipynb"
    return {
        **result,
        "title": TITLES.get(number, step) + lesion,
        "figures": _figures(run_dir / step, result["figures"]),
        "notebook": notebook if (run_dir / notebook).exists() else None,
    }


def _figures(folder, figures):
    return [{**figure, "uri": _data_uri(folder / figure["file"])} for figure in figures]


def _data_uri(path):
    try:
        image = Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"The figure {path} is gone: run its step again with --force.") from None
    image.thumbnail((WIDEST, 10 * WIDEST))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)  # an eighth of PNG's bytes: the page can be mailed
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _metric_rows(arms):
    """[name, figure of each arm]; a figure that no arm has is left out."""
    metrics = [arm["metrics"] for arm in arms.values()]
    return [
        [name, *(arm.get(key) for arm in metrics)] for key, name in METRICS.items() if any(key in m for m in metrics)
    ]


def _kept(found):
    """Generated, after pHash, after wHash, from step 04's numbers; None where it has not been run."""
    keys = ("generated", "after_phash", "after_whash")
    return [found[key] for key in keys] if all(key in found for key in keys) else None


def _value(value):
    """A value as a reader wants it: `0.534 (0.51 – 0.557)` for {"value", "low", "high"}, thousands set apart."""
    if isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
        return f"{_value(value['value'])} ({_value(value['low'])} – {_value(value['high'])})"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
