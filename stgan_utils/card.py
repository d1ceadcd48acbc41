"""The model card of the released weights, `weights/README.md`: written from the manifest alone, so that both agree."""

from stgan_utils.files import atomic_path
from stgan_utils.lesions import LESIONS

CREDIT = """CC BY-NC 4.0, like the images that they learnt from: HAM10000, P. Tschandl, C. Rosendahl, H. Kittler,
*Scientific Data* 5, 180161, 2018, doi:10.1038/sdata.2018.161. Non-commercial use, with this credit; images made with
them come under the same licence."""
LIMITS = """- Not a medical device. Generated images show no patient and prove nothing about lesions; no answer of a
  classifier is a diagnosis.
- HAM10000 shows mostly light skin from two clinics, photographed through a dermatoscope; the weights know nothing else.
- The images are small and the rare classes were learnt from few lesions: variety is limited, details are invented.
- Half precision: pictures differ from those of the trained originals by two grey levels of 255 at most."""
MEMORISED = """`nearer` is the chance that a generated image is nearer to a training image than a fresh real lesion of
its class is; 0.5 is what fresh lesions would give, 1 is copying, and p belongs to a one-sided test for nearer. Images
far from real ones pass this test in any case, so read it together with the distances above."""
REFITTED = """The figures below are those of the network trained on the train split alone. The released file continued
from it with **all** images, test lesions included, so figures on any HAM10000 training image flatter it. """
NOT_NEARER = "Stage 1's own generator (all classes): no iteration of Stage 2 came nearer; not a {} generator"
USE_GENERATOR = """import torch
from stgan_utils import checkpoints, weights

generator = checkpoints.load_generator(weights.path("{0}"))
drawn = generator(torch.randn(8, {1}))  # (8, 3, {2}, {2}), about -1 … 1"""
USE_CLASSIFIER = """from stgan_utils import data, weights
from stgan_utils.classifier import Classifier

model = Classifier.load(weights.path("{0}"))
images = data.load_images(["lesion.jpg"], model.size)
answers = model.predict_proba(images)  # a DataFrame, columns named by class"""
WITHOUT = """All files are safetensors; class order, scaling and how to answer (views, temperature, weights) are in
their headers, and none needs a network once it is here."""
SQUARE = """It takes RGB images: the central square of each, scaled to {0} × {0} px; `predict` cuts it out. """
WEIGHTED = """Its probabilities are those for equally common classes, times a weight ({}) that makes its first answer
right more often. To look for one class, such as melanoma, use its probability and a threshold. """


def write(path, assets):
    """Write the card.

    Args:
        path: of the card; `samples.png` is beside it.
        assets: entries of the manifest; those with a file in the repository are described.
    """
    assets = [asset for asset in assets if asset["sources"]["repo"]]
    classifiers = [asset for asset in assets if asset["stage"] == "classifier"]
    generators = [asset for asset in assets if asset not in classifiers]
    stage2 = [asset for asset in generators if asset["stage"] == "stage2"]
    commands = [
        "pip install .    # in a clone of the repository; these weights come with it",
        "python -m stgan_utils weights verify",
    ]
    if generators:
        commands.append(f"python -m stgan_utils generate --weights {generators[0]['name']} --count 64 --out DIR")
        commands.append("make quick    # the whole sequence with these weights in place of GAN training")
    if classifiers:
        commands.append("python -m stgan_utils predict --images DIR --out preds.csv")
    parts = [
        "# Released weights\n\nWritten by `python -m stgan_utils weights release`; every figure is also in "
        "`weights_manifest.json`.",
        *_pictures(generators),
        "## What they are\n\n" + _files(assets),
        "## Use\n\n```bash\n" + "\n".join(commands) + "\n```",
        *_in_python(generators, classifiers),
        "## Data\n\n" + _data(assets),
        *(["## How near to real images\n\n" + _distances(stage2)] if stage2 else []),
        *(["## Memorisation check\n\n" + _memorisation(stage2)] if stage2 else []),
        *("## Classifier\n\n" + _classifier(each) for each in classifiers),
        f"## Limits\n\n{LIMITS}",
        f"## Licence and credit\n\n{CREDIT}",
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _in_python(generators, classifiers):
    code = [
        USE_GENERATOR.format(each["name"], each["architecture"]["nz"], each["architecture"]["size"])
        for each in generators[:1]
    ]
    code += [USE_CLASSIFIER.format(each["name"]) for each in classifiers]
    yield "In Python:\n\n```python\n" + "\n\n".join(code) + f"\n```\n\n{WITHOUT}"


def _pictures(generators):
    if generators:
        names = [
            (each["lesion_class"] or "Stage 1") + (" (drawn by Stage 1)" if _is_stage1(each) else "")
            for each in generators
        ]
        caption = f"Eight each, none picked; from the top: {', '.join(names)}."
        yield f"![Eight images from each generator](samples.png)\n*{caption}*"
        yield (
            "Stage 1 is one FastGAN for all seven classes (generator and discriminator), at its *nearest* iteration. "
            "Stage 2 is one generator per class, trained with Freeze-D and Barlow Twins from Stage 1's *last* one. "
            "A class drawn by Stage 1 has that last one too: hence two KIDs for it below."
        )


def _is_stage1(asset):
    """Whether a generator of Stage 2 is the one that it started from: at iteration 0 nothing was learnt."""
    return asset["stage"] == "stage2" and asset["trained_on"]["iterations"] == 0


def table(columns, rows):
    """A Markdown table: names of the columns, and rows of as many cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _files(assets):
    rows = []
    for asset in assets:
        lesion, shape = asset["lesion_class"], asset["architecture"]
        what = f"{lesion}, {LESIONS[lesion].name}" if lesion else "all classes"
        what = NOT_NEARER.format(lesion) if _is_stage1(asset) else what
        sizes = f"{shape['size']} px, ngf {shape['ngf']}, nz {shape['nz']}" if "ngf" in shape else "MobileNetV2"
        megabytes = f"{asset['bytes'] / 1e6:.1f}"
        rows.append([f"`{asset['name']}`", asset["stage"], what, sizes, megabytes, f"`{asset['sha256'][:16]}…`"])
    return table(["name", "stage", "draws or knows", "architecture", "MB", "SHA-256"], rows)


def _data(assets):
    rows = [
        [
            f"`{asset['name']}`",
            known["data"],
            known["split"],
            "–" if known["iterations"] is None else known["iterations"],
            f"`{known['command']}`",
        ]
        for asset in assets
        for known in [asset["trained_on"]]
    ]
    return table(["name", "trained on", "split", "iterations", "command"], rows)


def _distances(stage2):
    """KID of each class's generator beside that of Stage 1, and in words for which it is not lower."""
    rows, not_lower = [], []
    for asset in stage2:
        code, figures = asset["lesion_class"], asset["figures"]
        own, first = figures["kid_held_out"][code], figures["kid_held_out_of_stage1"][code]
        lower, apart = own["kid"] < first["kid"], own["high"] < first["low"]
        not_lower += [] if lower else [code]
        verdict = ("yes" if apart else "yes, but the intervals overlap") if lower else "**no**"
        rows.append([code, own["real"], interval(own), interval(first), verdict])
    space = stage2[0]["figures"]["feature_space"]
    sentence = f"It is **not** lower for {', '.join(not_lower)}." if not_lower else "It is lower for every class."
    return (
        f"KID (lower is nearer) of {own['generated']} generated images to real ones of the class that no GAN has seen "
        "(validation and test lesions), with 95 % intervals. "
        f"Features: {space}; do not compare with figures in other networks' features.\n\n"
        + table(["class", "real images", "KID, Stage 2", "KID, Stage 1", "Stage 2 lower?"], rows)
        + f"\n\n{sentence}"
    )


def _memorisation(stage2):
    rows = []
    for asset in stage2:
        found = asset["figures"]["memorisation"]
        nearer = ["{nearer:.2f} (p = {p_value:.2g})".format(**found[kind]) for kind in ("feature", "hash")]
        rows.append([asset["lesion_class"], *nearer, f"{found['n']} / {found['n_control']}"])
    columns = ["class", "nearer, by features", "nearer, by pHash", "generated / fresh images"]
    return f"{MEMORISED}\n\n{table(columns, rows)}"


def _classifier(asset):
    figures = asset["figures"]
    text = f"`{asset['name']}`; split: {asset['trained_on']['split']}. "
    text += SQUARE.format(asset["preprocessing"]["size"])
    text += REFITTED if figures["went_on_with_all_images"] else ""
    weights = figures["answering"]["weights"]
    if len(set(weights.values())) > 1:
        text += WEIGHTED.format(", ".join(f"{code} {weight:.2f}" for code, weight in weights.items()))
    if "test" not in figures:
        return text + "No figures on held-out lesions are known."
    rows = [[name.replace("_", " "), interval(f, "value")] for name, f in figures["test"].items() if name != "images"]
    text += f"On {figures['test']['images']:,} real test images, 95 % intervals over lesions:\n\n"
    return text + table(["measure", "value"], rows)


def interval(figures, name="kid"):
    """`0.534 (0.510 – 0.557)` of a mapping with `name`, "low" and "high"."""
    return "{:.3f} ({:.3f} – {:.3f})".format(*(figures[key] for key in (name, "low", "high")))
