"""How good the teachers of the released classifier are, each kind and both: python benchmarks/teachers.py --run RUN.

They are asked only about lesions that they have not learnt from: those of the train split that the student hears their
answers to, and validation lesions. `python -m stgan_utils arms train release --seeds 1 --run RUN` trains them.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from answers import weighed
from common import write_section
from views import interval

from stgan_utils import arms, evaluation
from stgan_utils.finetune import class_weights, log_prior
from stgan_utils.lesions import CLASSES


def table(found, lesions):
    """Markdown: a row a kind of teachers, 95 % intervals over lesions."""
    shares = class_weights(1, log_prior([CLASSES.index(label) for label in lesions["label"]]))
    lines = ["| teachers | asked about | balanced accuracy | accuracy | AUC | cross-entropy |", "|" + "---|" * 6]
    for split, rows in lesions.groupby("split").groups.items():
        for name, answers in found.items():
            proba = pd.DataFrame(answers[rows], columns=list(CLASSES))
            truth = lesions.loc[rows, "label"].to_numpy()
            figures = evaluation.evaluate(truth, proba, lesions.loc[rows, "lesion_id"])["metrics"]
            right = weighed(proba, 1, shares).to_numpy()[np.arange(len(rows)), proba.columns.get_indexer(truth)]
            cells = [interval(figures[key]) for key in ("balanced_accuracy", "accuracy", "macro_auc")]
            lines.append(f"| {name} | {split} | {' | '.join(cells)} | {-np.log(right).mean():.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder with teachers; without one nothing is measured")
    args = parser.parse_args()
    if args.run is None:
        print("teachers: skipped, --run names no run folder with teachers.")
        return
    real = arms.real_table(args.run)
    networks = arms.teach(args.run)
    kinds = {
        f"{kind.parts} of {name}": {file: rows for file, rows in networks.items() if name in file.parent.name}
        for name, kind in arms.TEACHERS.items()
    }
    found = {name: arms.answers_of_others(files, real) for name, files in (kinds | {"all": networks}).items()}
    body = f"""
Balanced answers of networks to real lesions that they have not learnt from: of each kind one network for a lesion of
the train split, all of them for one of the validation split. The cross-entropy is that of the answers with the
classes' shares put back, lower is better.

{table(found, real[real["split"].isin(("train", "val"))])}
"""
    print(body)
    write_section("Who teaches the released classifier", body, ("torch", "torchvision"))


if __name__ == "__main__":
    main()
