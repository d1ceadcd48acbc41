"""Writes what the documents show of the run on real images: `python docs/render_real_run.py RUN` with a finished run.

`real-run.md` from its template and the steps' `result.json`, the gallery's pictures and films, and the executed
notebooks as web pages. Paths of the machine are left out.
"""

import base64
import io
import re
import sys
from pathlib import Path

import jinja2
import nbformat
from nbconvert import HTMLExporter
from PIL import Image

from stgan_utils import pipeline, release, runs
from stgan_utils.card import interval, table
from stgan_utils.lesions import CLASSES, MINORITY

HERE = Path(__file__).resolve().parent
SHOWN = ("00_start_here", "01_baseline", "02_stage1_global_gan", "03_stage2_BCC", "03_stage2_MEL")
SHOWN += ("04_deduplicate", "05_classifier", "06_post_mortem", "07_report")
WIDTH = 1100  # pixels at most of a picture
FIGURES = {  # name in docs/figures: where it lies in the run folder
    "classes": "00_start_here/figures/classes.png",
    "real_and_generated": "07_report/figures/real_and_generated.png",
    "removed_whash": "04_deduplicate/figures/removed_whash.png",
    "sweep": "04_deduplicate/figures/sweep.png",
    "recall": "05_classifier/figures/recall.png",
}
PRIOR = {  # KID at 200 iterations and of the one used; generated, left by pHash, left by wHash
    "AKIEC": (0.088, 0.134, 6378, 6297, 3574),
    "BCC": (0.055, 0.062, 6191, 6039, 3836),
    "BKL": (0.035, 0.043, 5606, 5512, 3149),
    "DF": (0.046, 0.056, 6590, 6493, 2461),
    "MEL": (0.051, 0.044, 5592, 5384, 2782),
    "VASC": (0.046, 0.066, 6563, 5065, 3016),
}
METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "macro_auc": "macro AUC",
    "mel_sensitivity_at_90": "melanoma sensitivity at 90 % specificity",
}
STYLE = """
body { max-width: 1050px; margin: 2em auto; padding: 0 1em; font-family: sans-serif; line-height: 1.45 }
pre { background: #f6f6f6; padding: .6em; overflow-x: auto; font-size: .85em }
img { max-width: 100% }
table { border-collapse: collapse }
td, th { border: 1px solid #ccc; padding: .2em .5em; font-size: .9em }
.anchor-link { display: none }
.prompt { color: #999; font-size: .75em }
"""


def main(run_dir, docs=HERE):
    """Everything; `docs` is the folder that is written to."""
    run_dir = Path(run_dir).resolve()
    results = {step.name: runs.result(run_dir, step.name) for step in pipeline.STEPS}
    if missing := [name for name, found in results.items() if found is None]:
        raise SystemExit(f"{run_dir} is not a finished run: {', '.join(missing)} is not done.")
    known = facts(run_dir, results)  # before anything is written: it can refuse
    for folder in ("figures", "executed"):
        (docs / folder).mkdir(exist_ok=True)
    draw(run_dir, results, docs / "figures")
    for name in SHOWN:
        page = executed(run_dir / "notebooks" / f"{name}.ipynb", run_dir, results[name]["data"])
        (docs / "executed" / f"{name}.html").write_text(page, encoding="utf-8")
    template = jinja2.Template(
        (HERE / "real-run.md.jinja").read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined
    )
    known["some_removed"] = (run_dir / FIGURES["removed_whash"]).exists()  # step 04 has nothing to show of none
    (docs / "real-run.md").write_text(template.render(known) + "\n", encoding="utf-8")


# --- pictures ------------------------------------------------------------------------------------------------------


def draw(run_dir, results, folder):
    """The run's figures as JPEG of a document's width, and the samples of its trainings as films."""
    best = int(results[release.STAGE1]["numbers"]["kid_best_iteration"])
    pictures = {name: Image.open(run_dir / file) for name, file in FIGURES.items() if (run_dir / file).exists()}
    pictures["stage1"] = Image.open(run_dir / release.STAGE1 / "samples" / f"{best:06d}.png")
    arms = [Image.open(run_dir / f"05_classifier/figures/confusion_real_{arm}.png") for arm in ("only", "+_generated")]
    pictures["confusion"] = beside(arms)
    for name, picture in pictures.items():
        picture = picture.convert("RGB")
        picture.thumbnail((WIDTH, 10 * WIDTH))
        picture.save(folder / f"{name}.jpg", quality=88)
    for name, step in {"stage1": release.STAGE1, **{code: f"03_stage2_{code}" for code in MINORITY}}.items():
        film(run_dir / step / "samples", folder / f"film_{name}.gif")


def beside(pictures):
    """One picture of several of the same height."""
    whole = Image.new("RGB", (sum(each.width for each in pictures), pictures[0].height))
    left = 0
    for each in pictures:
        whole.paste(each, (left, 0))
        left += each.width
    return whole


def film(samples, path):
    """The first two rows of each sheet of samples, 64 px an image."""
    frames = []
    for file in sorted(samples.glob("*.png")):
        sheet = Image.open(file)
        side = sheet.width // 8
        frames.append(sheet.crop((0, 0, sheet.width, 2 * side)).resize((512, 128)))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=350, loop=0)


# --- notebooks -----------------------------------------------------------------------------------------------------


def executed(path, run_dir, data):
    """An executed notebook as one web page: pictures as JPEG, links to where things are from `docs/executed`."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = of_no_machine(cell.source, run_dir, data)
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = of_no_machine(output.text, run_dir, data)
            contents = output.get("data", {})
            if "image/png" in contents:
                contents["image/jpeg"] = jpeg(contents.pop("image/png"))
            for kind in ("text/plain", "text/html", "text/markdown"):
                if kind in contents:
                    contents[kind] = of_no_machine(contents[kind], run_dir, data)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    head = f'<meta charset="utf-8"><title>{path.stem}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def of_no_machine(text, run_dir, data):
    """The text without the folders of the machine that it was made on."""
    # Files of the run are not there for a reader: what Jupyter shows as a link to one stays as its name.
    text = re.sub(r"<a href='[^']*' target='_blank'>(.*?)</a>", r"\1", text)
    text = re.sub(rf"(?:\.\./)*(?:\.\.)?{re.escape(str(run_dir))}", f"runs/{run_dir.name}", text).replace(
        f"{data}/", f"{Path(data).name}/"
    )
    # Whatever else is absolute: its last part tells what it is. Not an address, whose slashes follow something.
    return re.sub(r"(?<![\w./:<+-])/(?:[\w.@-]+/)+(?=[\w.-])", "", text)


def linked(markdown):
    """Links of a notebook, followed from `docs/executed` in place of `notebooks`."""
    markdown = markdown.replace("](../docs/", "](../").replace("](../README", "](../../README")

    def target(found):
        name = found[1]
        return f"]({name}.html)" if name in SHOWN else f"](../../notebooks/{name}.ipynb)"

    return re.sub(r"\]\((\w+)\.ipynb\)", target, markdown)


def jpeg(png):
    """Base64 of PNG → of JPEG, no wider than `WIDTH`."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


# --- figures -------------------------------------------------------------------------------------------------------


def facts(run_dir, results):
    """What the template asks for."""
    start, stage1 = results[runs.START], results[release.STAGE1]
    dedup, classifier = results["04_deduplicate"], results["05_classifier"]
    test = classifier["numbers"]["test"]
    counts = start["numbers"]["counts"]
    difference = classifier["numbers"]["difference"]
    return {
        "total": start["numbers"]["images"],
        "size": stage1["settings"]["size"],
        "profile": start["profile"],
        "seed": start["seed"],
        "machine": by_step(results, lambda result: result["device"]),
        "versions": "Python {python}, torch {torch}, torchvision {torchvision}".format(**start["versions"]),
        "commits": by_step(results, lambda result: str(result["versions"]["git"])[:7]),
        "command": command(results),
        "times": table(["step", "seconds"], [[name, f"{r['seconds']:,.0f}"] for name, r in results.items()]),
        "splits": table(
            ["class", "train", "val", "test"],
            [[code, *(f"{counts[code][split]:,}" for split in ("train", "val", "test"))] for code in CLASSES],
        ),
        "stage1_curve": curve(stage1["numbers"]["quality"]),
        "quality_images": stage1["settings"]["quality_images"],
        "space": stage1["numbers"]["feature_space"],
        "stage2": table(*of_stage2(results)),
        **held_out(run_dir, results),
        "prior": table(["class", "KID at 200", "KID of the one used"], [[code, *PRIOR[code][:2]] for code in MINORITY]),
        "thresholds": dedup["settings"],
        "dedup": table(*of_dedup(dedup["numbers"])),
        "control": dedup["numbers"],
        "classifier": classifier["settings"],
        "joined": classifier["numbers"]["generated_in_training"],
        "judged": table(*of_test(test)),
        "balanced": [shown(arm["metrics"]["balanced_accuracy"]) for arm in test.values()],
        "difference": "{value:+.3f} ({low:+.3f} … {high:+.3f})".format(**difference),
        "chance": difference["low"] <= 0 <= difference["high"],
        "trivial": next(iter(test.values()))["trivial"],
        "mixed": table(*of_validation(classifier["numbers"]["validation"])),
    }


def by_step(results, what):
    """What was the case in which steps, such as "float32 (00, 02); bfloat16 (01, 05)"; alone where it was in all."""
    found = {}
    for name, result in results.items():
        found.setdefault(what(result), {})[name[:2]] = True
    return "; ".join(f"{each} ({', '.join(steps)})" if len(found) > 1 else each for each, steps in found.items())


def shown(figures):
    return interval(figures, "value")


def command(results):
    """What makes this run again: its profile, and each setting in which it differs from it."""
    start = results[runs.START]
    data = runs.PHANTOM if start["data"] == runs.PHANTOM else "FOLDER"
    words = [f"python -m stgan_utils run --data {data} --profile {start['profile']} --out RUN"]
    for step in pipeline.STEPS:
        words += release.differing(results[step.name], step.kind)
    return " ".join(dict.fromkeys(words))  # the six of Stage 2 once


def curve(quality):
    rows = zip(*(quality[name] for name in ("iteration", "kid", "kid_low", "kid_high")), strict=True)
    return table(
        ["iteration", "KID"],
        [[f"{at:,}", interval({"kid": kid, "low": low, "high": high})] for at, kid, low, high in rows],
    )


def of_stage2(results):
    columns = ["class", "real", "KID, global GAN (it 0)", "best KID (iteration)", "end"]
    columns += ["Barlow Twins term (on + ½ off), first → last", "on-diagonal", "off-diagonal", "nearer"]
    rows = []
    for code in MINORITY:
        found = results[f"03_stage2_{code}"]["numbers"]
        history, best = found["quality_history"], int(found["kid_best_iteration"])
        at = history["iteration"].index(best)
        on, off = found["barlow"]["bt_on_diag"], found["barlow"]["bt_off_diag"]
        term = [a + b / 2 for a, b in zip(on, off, strict=True)]
        low, high = history["kid_low"][at], history["kid_high"][at]
        rows.append(
            [
                code,
                found["real"],
                f"{found['kid_start']:.3f}",
                f"**{found['kid_best']:.3f}** ({low:.3f} – {high:.3f}) ({best})",
                f"{found['kid_end']:.3f}",
                *(f"{each[0]:.2f} → {each[-1]:.2f}" for each in (term, on, off)),
                f"{found['memorisation']['feature']['nearer']:.2f}",
            ]
        )
    return columns, rows


def held_out(run_dir, results):
    """KIDs to the lesions that no GAN of the run saw, and what they say of Stage 2."""
    distance = release.HeldOutDistance(run_dir)
    if distance.extractor.name != (space := results[release.STAGE1]["numbers"]["feature_space"]):
        raise SystemExit(f"The run measured KID with {space}, which cannot be had here.")
    first = distance(run_dir / release.STAGE1 / "best.safetensors", MINORITY)
    rows, lower, apart = [], [], []
    for code in MINORITY:
        before, after = first[code], distance(run_dir / f"03_stage2_{code}" / "best.safetensors", [code])[code]
        rows.append([code, after["real"], interval(before), interval(after)])
        lower += [code] if after["kid"] < before["kid"] else []
        apart += [code] if after["high"] < before["low"] else []
    verdict = (
        f"Stage 2 is lower for {', '.join(lower) or 'no class'}, with intervals apart for {', '.join(apart) or 'none'}."
    )
    columns = ["class", "real images", "KID, Stage 1's global GAN", "KID, Stage 2"]
    return {"held_out": table(columns, rows), "verdict": verdict, "generated": release.GENERATED}


def of_dedup(found):
    columns = ["class", "generated", "after pHash", "after wHash", "sparing thresholds"]
    columns.append("prior system: generated → pHash → wHash")
    keys = ("generated", "after_phash", "after_whash", "kept_auto")
    rows = []
    for code in MINORITY:
        ours = [f"{found['per_class'][code][key]:,}" for key in keys]
        rows.append([code, *ours, " → ".join(f"{each:,}" for each in PRIOR[code][2:])])
    return columns, rows


def of_test(arms):
    rows = [[name, *(shown(arm["metrics"][key]) for arm in arms.values())] for key, name in METRICS.items()]
    for code in CLASSES:
        recalls = [arm["per_class"][code] for arm in arms.values()]
        rows.append([f"recall {code} (n = {recalls[0]['images']})", *(shown(each["recall"]) for each in recalls)])
    return ["", *arms], rows


def of_validation(sets):
    rows = []
    for name, found in sets.items():
        figures = [f"{found['metrics'][key]['value']:.3f}" for key in ("accuracy", "balanced_accuracy")]
        rows.append([name, f"{found['images']:,}", *figures])
    return ["judged on", "images", "accuracy", "balanced accuracy"], rows


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Name the folder of a finished run: python docs/render_real_run.py RUN")
    main(sys.argv[1])
