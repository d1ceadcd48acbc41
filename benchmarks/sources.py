"""What a classifier is worth on a source that it has not learnt from: python benchmarks/sources.py --run RUN.

HAM10000 was put together from four sources. One network learns from the train split, others from the same without one
source, in as many steps; both are asked about that source's validation and test lesions. RUN is a run folder with the
table of real images (`python -m stgan_utils run --data FOLDER --only 00 --out RUN`) that says where each is from:
Dataverse's HAM10000_metadata does, Kaggle's and ISIC's do not.
"""

import argparse
import tempfile
from pathlib import Path

from common import write_section
from views import interval

from stgan_utils import arms, data, device, evaluation, finetune
from stgan_utils.classifier import Classifier
from stgan_utils.config import ClassifierSettings

# The two of which validation and test lesions show all classes but one at most; molemax has hardly a melanoma.
SOURCES = ("vidir_modern", "rosendahl")
HEAD = "| source | learnt from it | images, rarest class | balanced accuracy | difference | accuracy | AUC |"


def answers(settings, real, rows, asked):
    """Probabilities that a network trained on `rows` gives the images of the rows `asked`."""
    images = data.image_cache(real, settings.size)
    with tempfile.TemporaryDirectory() as folder:
        finetune.train(settings, images, real["label"], rows, None, folder)
        model = Classifier.load(Path(folder) / finetune.MODEL_FILE).to(device.pick())
    return model.predict_proba(images, asked)


def table(real, size, epochs):
    """Markdown: two rows a source, with 95 % intervals over lesions."""
    learnt = {"": real.index[real["split"] == "train"]}
    for source in SOURCES:
        learnt[source] = learnt[""][real.loc[learnt[""], "dataset"] != source]
    fewest = min(map(len, learnt.values()))
    more = {"size": size, "epochs": epochs, "epoch_images": fewest, "augmentation": "strong", "views": 2}
    settings = ClassifierSettings(**arms.RECIPE | more)
    asked = real.index[real["split"].isin(("val", "test")) & real["dataset"].isin(SOURCES)]
    proba = {left_out: answers(settings, real, rows, asked) for left_out, rows in learnt.items()}
    lines = [HEAD, "|" + "---|" * 7]
    for source in SOURCES:
        there = (real.loc[asked, "dataset"] == source).to_numpy()
        truth, groups = real.loc[asked[there], "label"], real.loc[asked[there], "lesion_id"]
        with_it, without = proba[""][there], proba[source][there]
        for known, left_out, its in (("yes", "", with_it), ("no", source, without)):
            found = evaluation.evaluate(truth, its, groups)["metrics"]
            per_class = real.loc[learnt[left_out], "label"].value_counts()
            difference = evaluation.paired_difference(truth, without, with_it, groups)
            cells = [
                f"{source}, {len(truth)} images",
                known,
                f"{per_class.sum():,}, {per_class.min()} of {per_class.idxmin()}",
                interval(found["balanced_accuracy"]),
                interval(difference, "+.3f") if known == "no" else "–",
                interval(found["accuracy"]),
                interval(found["macro_auc"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder with 00; without one there is nothing to measure")
    parser.add_argument("--size", type=int, default=128, help="side in pixels (default 128)")
    parser.add_argument("--epochs", type=int, default=5, help="of each training (default 5)")
    args = parser.parse_args()
    if args.run is None:
        print("sources: skipped, --run names no run folder.")
        return
    real = arms.real_table(args.run)
    if "dataset" not in real:
        print("sources: skipped, these images do not say which source they are from (column `dataset`).")
        return
    result = table(real, args.size, args.epochs)
    body = f"""
MobileNetV2 at {args.size} px, {args.epochs} epochs, on real lesions of a source of HAM10000, other lesions of which it
has learnt from or not; as many steps each. The difference is that of balanced accuracy, paired. Leaving a source out
also leaves fewer images of some classes to learn from: both together make the difference.

{result}
"""
    print(body)
    write_section("A source that it has not learnt from", body, ("torch", "torchvision"))


if __name__ == "__main__":
    main()
