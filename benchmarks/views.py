"""What a classifier should answer by, the file as it is or turned views of it: python benchmarks/views.py --run RUN.

It asks one network of a run, trained on the train split, about lesions that it has not learnt from, those of the
validation and of the test split: by the image as it is, by its flips, and by the two views `stgan_utils.views.ASIDE`.
`python -m stgan_utils arms train release-160px --seeds 1 --run RUN` trains the network asked by default.
"""

import argparse
from pathlib import Path

import pandas as pd
from common import write_section

from stgan_utils import arms, data, device, evaluation, finetune
from stgan_utils.classifier import Classifier

AHEAD, BACK = slice(None), slice(None, None, -1)


def answers(model, images):
    """{what it answers by: (N, classes) probabilities, a DataFrame}."""
    model.answering["views"] = 1
    flipped = [model.logits(images[:, rows, columns]) for rows in (AHEAD, BACK) for columns in (AHEAD, BACK)]
    logits = {"the image as it is": flipped[0], "the image and its flips, four views": sum(flipped) / 4}
    model.answering["views"] = 2
    logits["two turned views"] = model.logits(images)
    temperature = model.answering["temperature"]
    return {
        name: pd.DataFrame(
            (each.double() / temperature + model.log_weights).softmax(1).numpy(), columns=list(model.classes)
        )
        for name, each in logits.items()
    }


def table(found, lesions):
    """Markdown: figures by split and together, with 95 % intervals over lesions."""
    lines = ["| answers by | validation | test | together | difference | accuracy | AUC |", "|" + "---|" * 7]
    first = next(iter(found.values()))
    for name, proba in found.items():
        cells = [name]
        for split in (("val",), ("test",), ("val", "test")):
            rows = lesions["split"].isin(split).to_numpy()
            truth, groups = lesions.loc[rows, "label"], lesions.loc[rows, "lesion_id"]
            figures = evaluation.evaluate(truth, proba[rows], groups)["metrics"]
            cells.append(interval(figures["balanced_accuracy"]))
        difference = evaluation.paired_difference(lesions["label"], proba, first, lesions["lesion_id"])
        cells += ["–" if proba is first else interval(difference, "+.3f")]
        cells += [interval(figures["accuracy"]), interval(figures["macro_auc"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(figure, form=".3f"):
    return "{} ({} … {})".format(*(format(figure[key], form) for key in ("value", "low", "high")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder with the arm; without one there is nothing to measure")
    parser.add_argument("--arm", default=arms.FIRST_PHASE, help="arm, of which seed 0 is asked (default %(default)s)")
    args = parser.parse_args()
    if args.run is None:
        print("views: skipped, --run names no run folder with a trained arm.")
        return
    file = args.run / "arms" / args.arm / "seed0" / finetune.MODEL_FILE
    arms.require(file, f"`arms train {args.arm}`")
    real = arms.real_table(args.run)
    lesions = real[real["split"].isin(("val", "test"))]
    model = Classifier.load(file).to(device.pick())
    images = data.image_cache(real, model.size)[lesions.index]
    result = table(answers(model, images), lesions.reset_index(drop=True))
    body = f"""
Balanced accuracy of `{args.arm}` (seed 0, {model.size} px) on {len(lesions):,} real lesions that it has not
learnt from, by what it looks at; accuracy and macro AUC of both splits together. The difference is paired, to
the first row.

{result}
"""
    print(body)
    write_section("What a classifier answers by", body, ("torch", "torchvision"))


if __name__ == "__main__":
    main()
