"""What balanced answers cost in accuracy, and the way between: python benchmarks/answers.py --run RUN.

Logit adjustment aims at balanced accuracy, a plain network at accuracy; `accuracy_share` sets the answers of one and
the same network between the two. What it costs and gains on validation lesions, of one network of a run: `python -m
stgan_utils arms train release --seeds 1 --run RUN` trains the one asked by default.
"""

import argparse
from pathlib import Path

import pandas as pd
from common import write_section
from views import interval

from stgan_utils import arms, evaluation, finetune
from stgan_utils.classifier import Classifier
from stgan_utils.lesions import CLASSES

SHARES = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1)


def weighed(proba, had, wanted):
    """Probabilities given with the class weights `had`, as they are with the class weights `wanted`."""
    proba = proba / had * pd.Series(wanted)
    return proba.div(proba.sum(axis=1), axis=0)[list(CLASSES)]


def table(lesions, had, log_prior):
    """Markdown: a row a share, 95 % intervals over lesions."""
    lines = ["| share | balanced accuracy | difference | accuracy | melanoma found | ECE |", "|" + "---|" * 6]
    truth, groups = lesions["label"], lesions["lesion_id"]
    balanced = weighed(lesions[list(CLASSES)], had, finetune.class_weights(0, log_prior))
    for share in SHARES:
        proba = weighed(lesions[list(CLASSES)], had, finetune.class_weights(share, log_prior))
        found = evaluation.evaluate(truth, proba, groups)
        difference = evaluation.paired_difference(truth, proba, balanced, groups)
        cells = [
            f"{share:.2f}",
            interval(found["metrics"]["balanced_accuracy"]),
            interval(difference, "+.3f") if share else "–",
            interval(found["metrics"]["accuracy"]),
            interval(found["per_class"]["MEL"]["recall"]),
            interval(found["metrics"]["ece"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder with the arm; without one there is nothing to measure")
    parser.add_argument("--arm", default=arms.RELEASE, help="arm, of which seed 0 is asked (default %(default)s)")
    args = parser.parse_args()
    if args.run is None:
        print("answers: skipped, --run names no run folder with a trained arm.")
        return
    folder = args.run / "arms" / args.arm / "seed0"
    arms.require(folder / "predictions.csv", f"`arms train {args.arm}`")
    real = arms.real_table(args.run)
    learnt = real.loc[real["split"] == "train", "label"]
    log_prior = finetune.log_prior([CLASSES.index(code) for code in learnt])
    answers = pd.read_csv(folder / "predictions.csv").query("split == 'val'").reset_index(drop=True)
    model = Classifier.load(folder / finetune.MODEL_FILE)
    result = table(answers, pd.Series(model.log_weights.exp(), model.classes), log_prior)
    body = f"""
`{args.arm}` (seed 0) on the {len(answers):,} real *validation* lesions, its answers aimed at accuracy for a share, at
balanced accuracy for the rest. The difference is that of balanced accuracy, paired, to the first row.

{result}
"""
    print(body)
    write_section("What its answers aim at", body, ("torch", "torchvision"))


if __name__ == "__main__":
    main()
