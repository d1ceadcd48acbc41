"""What the experiment found, on real test lesions: the arms side by side, and one arm in full."""

from pathlib import Path

import pandas as pd

from stgan_utils import data, evaluation, finetune, gradcam, plots, runs, steps
from stgan_utils.arms import ARMS, COMPARED, REAL_ONLY, SHARES, arm_named, made_of, real_table, require
from stgan_utils.classifier import Classifier
from stgan_utils.config import UserError
from stgan_utils.files import atomic_path, read_json, write_json
from stgan_utils.lesions import CLASSES


def compare(run_dir, bootstrap=1000):
    """The table of all arms that are trained, on real test lesions.

    Intervals resample lesions and seeds together. The arm to beat is the one without generated images that is best on
    the *validation* lesions.

    Returns:
        DataFrame, a row an arm in the order of `ARMS`: arm, text, command, seeds, generated (images), filled (the share
        of the gap to balance that they fill, 0 … 1), val (balanced accuracy, mean), to_beat, and value, `_low`, `_high`
        of accuracy, balanced_accuracy, macro_auc, mel_sensitivity_at_90 and difference (of the balanced accuracy to
        that of the arm to beat).

    Raises:
        UserError: no trained arm, none without generated images, arms with different numbers of seeds or of different
            test images, or one trained before a step that it is made of was made anew.
    """
    folders = {name: sorted(Path(run_dir).glob(f"arms/{name}/seed*/result.json")) for name in COMPARED}
    folders = {name: found for name, found in folders.items() if found}
    if not set(folders) & set(REAL_ONLY):
        raise UserError(f"{run_dir} has no trained arm without generated images: `arms train real` makes one.")
    seeds = {name: len(found) for name, found in folders.items()}
    if len(set(seeds.values())) > 1:
        raise UserError(f"The arms have different numbers of seeds ({seeds}): train those that are missing.")
    results = {name: [read_json(path) for path in found] for name, found in folders.items()}
    for name, found in results.items():
        inputs = made_of(name, run_dir)
        if any(result.get("inputs", inputs) != inputs for result in found):
            raise UserError(
                f"Arm {name} was trained before {' or '.join(inputs)} was made anew: delete "
                f"{Path(run_dir) / 'arms' / name} and train it again."
            )
    answers = {name: [_test_answers(path.parent) for path in found] for name, found in folders.items()}
    val = {
        name: sum(r["validation"]["balanced_accuracy"] for r in found) / len(found) for name, found in results.items()
    }
    to_beat = max(set(folders) & set(REAL_ONLY), key=val.get)
    truth = answers[to_beat][0]
    if not all(each["image_id"].equals(truth["image_id"]) for found in answers.values() for each in found):
        raise UserError(f"The arms in {run_dir} were judged on different test images: train them again.")
    rows = []
    for name in folders:
        figures = evaluation.over_seeds(
            truth["label"], answers[name], answers[to_beat], truth["lesion_id"], bootstrap=bootstrap
        )
        row = {
            "arm": name,
            "text": ARMS[name].text,
            "command": f"python -m stgan_utils arms train {name} --run RUN",
            "seeds": seeds[name],
            **_filled(results[name][0]["training_images"]),
            "val": val[name],
            "to_beat": name == to_beat,
        }
        for figure, interval in figures.items():
            row |= {figure: interval["value"], f"{figure}_low": interval["low"], f"{figure}_high": interval["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table):
    """The table of `compare` for a README, and what its intervals are of."""

    def shown(row, name, sign=""):
        return f"{row[name]:{sign}.3f} ({row[f'{name}_low']:{sign}.3f} … {row[f'{name}_high']:{sign}.3f})"

    head = "| arm | generated | balanced accuracy | difference | accuracy | AUC | `python -m stgan_utils …` |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in table.to_dict("records"):
        difference = "the one to beat" if row["to_beat"] else shown(row, "difference", "+")
        lines.append(
            f"| {row['text']} | {row['generated']:,} | {shown(row, 'balanced_accuracy')} | {difference} "
            f"| {shown(row, 'accuracy')} | {shown(row, 'macro_auc')} | `arms train {row['arm']} --run RUN` |"
        )
    seeds = table["seeds"].iloc[0]
    resampled = f"test lesions and the classifiers' {seeds} seeds" if seeds > 1 else "test lesions alone (one seed)"
    return "\n".join([*lines, "", f"95 % intervals over {resampled}; the GANs were trained once."])


def write_comparison(run_dir):
    """Write `compare` as RUN_DIR/arms/arms.csv, arms.md and arms.png; returns the Markdown table."""
    folder, table = Path(run_dir) / "arms", compare(run_dir)
    text = markdown(table)
    with atomic_path(folder / "arms.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic_path(folder / "arms.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    steps.save_figure(plots.arms(table, SHARES), folder / "arms.png", _data_name(run_dir))
    return text


def judge(name, run_dir, bootstrap=1000):
    """Everything about one arm (seed 0) on the real test lesions, into `RUN_DIR/arms/NAME/seed0/test/`.

    `result.json` (`evaluation.evaluate`), `subgroups.csv`, figures, and `README.md` that holds them together.

    Returns:
        The page's path.
    """
    run_dir = Path(run_dir)
    arm_named(name)  # or the next line would have it trained
    source = run_dir / "arms" / name / "seed0"
    require(source / "predictions.csv", f"`arms train {name}`")
    test = real_table(run_dir).query("split == 'test'")
    answers = _test_answers(source)
    if list(test["image_id"]) != list(answers["image_id"]):
        raise UserError(f"{source} was judged on other images than {run_dir} has now: delete it and train it anew.")
    truth, proba = answers["label"], answers[list(CLASSES)]
    found = evaluation.evaluate(truth, proba, test["lesion_id"], bootstrap)
    groups = evaluation.by_subgroups(test, truth, proba, bootstrap)
    model = Classifier.load(source / finetune.MODEL_FILE)
    pictures = data.image_cache(real_table(run_dir), model.size)[test.index]
    figures = {
        "confusion": plots.confusion(found["confusion_matrix"], found["classes"], "Real test lesions"),
        "recall": plots.recall_per_class({name: found["per_class"]}),
        "reliability": plots.reliability({name: evaluation.reliability_curve(truth, proba)}),
        **({"subgroups": plots.subgroups(groups)} if len(groups) else {}),
    }
    for kind, (seen, maps, titles) in gradcam.surest_answers(model, pictures, truth, proba).items():
        figures[f"grad_cam_{kind}"] = plots.heatmaps(seen, maps, titles, f"Grad-CAM of the surest {kind}, one a class")
    folder = source / "test"
    for title, figure in figures.items():
        steps.save_figure(figure, folder / f"{title}.png", _data_name(run_dir))
    write_json(folder / "result.json", found)
    with atomic_path(folder / "subgroups.csv") as temporary:
        groups.to_csv(temporary, index=False)
    with atomic_path(folder / "README.md") as temporary:
        page = _page(name, found, groups, figures)
        page = steps.drawn(page) if steps.PHANTOM_NAME in _data_name(run_dir) else page
        temporary.write_text(page, encoding="utf-8")
    return folder / "README.md"


def _page(name, found, groups, figures):
    def cell(interval):
        if interval["value"] is None:
            return "–"
        return "{value:.3f} ({low:.3f} … {high:.3f})".format(**interval)

    calibrated = found["metrics"]["ece"]["if_calibrated"]
    lines = [f"# {ARMS[name].text}: {found['images']:,} real test images of {found['lesions']:,} lesions", ""]
    lines += [
        "Not a medical device: no answer of a classifier is a diagnosis. These figures are those of the network",
        "trained on the train split only.",
        "",
    ]
    lines += ["| figure | value, 95 % interval over lesions |", "|---|---|"]
    lines += [f"| {figure.replace('_', ' ')} | {cell(interval)} |" for figure, interval in found["metrics"].items()]
    lines += [
        "",
        f"By chance alone, answers that mean just what they say would have an ece of {calibrated:.3f} on this many;",
        "the middle of its interval lies above its value for the same reason.",
        "",
    ]
    lines += ["| class | images | recall | precision | AUC |", "|---|---|---|---|---|"]
    for code, row in found["per_class"].items():
        lines.append(
            f"| {code} | {row['images']} | {cell(row['recall'])} | {cell(row['precision'])} | {cell(row['auc'])} |"
        )
    if len(groups):
        lines += [
            "",
            "Intervals of a group's balanced accuracy are those of Brodersen et al. (ICPR 2010): a class of one lesion",
            "counts there as the little that it is, where resampling would miss it or take it for certain.",
            "",
            "| column | group | images | lesions | classes | balanced accuracy | accuracy |",
            "|" + "---|" * 7,
        ]
    for row in groups.to_dict("records"):
        pair = [
            cell({"value": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]})
            for key in ("balanced_accuracy", "accuracy")
        ]
        counts = [row["images"], row["lesions"], row["classes"]]
        lines.append(f"| {' | '.join(map(str, [row['column'], row['group'], *counts, *pair]))} |")
    lines += [line for title in figures for line in ("", f"![{title.replace('_', ' ')}]({title}.png)")]
    return "\n".join(lines) + "\n"


def _filled(images):
    """How many generated images an arm had, and which share of the gap to balance that is: what was asked for, or less
    where the filters left less."""
    generated, real = sum(images["generated"].values()), images["real"].values()
    return {"generated": generated, "filled": generated / max(1, len(real) * max(real) - sum(real))}


def _data_name(run_dir):
    return (runs.result(run_dir, runs.START) or {}).get("data_name", "not recorded")


def _test_answers(folder):
    answers = pd.read_csv(folder / "predictions.csv", dtype={"image_id": str, "lesion_id": str})
    return answers[answers["split"] == "test"].reset_index(drop=True)
