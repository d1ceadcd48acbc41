"""The command line: `python -m stgan_utils COMMAND`; `--help` lists the commands.

Exit status: 0 done, 1 a notebook failed, 2 wrong input (one sentence says what), 3 done but for images that could not
be read, 4 time was up and the same command goes on. Anything else that goes wrong is a bug and keeps its traceback.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stgan_utils import engine, pipeline, places, runs
from stgan_utils.config import UserError
from stgan_utils.profiles import PROFILES

PATHS = ("MOBILENET_V2_WEIGHTS", "INCEPTION_WEIGHTS", "STGAN_WEIGHTS", "STGAN_CACHE")  # variables that name one
PLACE_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
TWO_WORDS = "takes two words: the setting and its value, such as -p iterations 100"

app = typer.Typer(
    help="GAN-made images for the rare classes of HAM10000, judged on real lesions. Not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
weights_app = typer.Typer(help="Trained weights: what there is, getting it, checking it.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")
arms_app = typer.Typer(help="The experiment: recipes side by side, on real lesions.", no_args_is_help=True)
app.add_typer(arms_app, name="arms")

kaggle_app = typer.Typer(
    help="The steps as Kaggle kernels: send them, see how they are, bring results back.", no_args_is_help=True
)
app.add_typer(kaggle_app, name="kaggle")

RunDir = Annotated[Path, typer.Option("--run", help="A run folder on real images, steps 00 to 04 done.")]
Folder = Annotated[
    Path | None, typer.Option("--dir", help="A folder of weights to look in first; or the variable STGAN_WEIGHTS.")
]

Params = Annotated[
    list[str] | None,
    typer.Option("-p", metavar="KEY VALUE", help="A setting for every step that knows it, or stage1.KEY for one."),
]
Jobs = Annotated[int, typer.Option(help="How many may run side by side on one machine.")]
Engine = Annotated[str, typer.Option("--engine", help="local, or ray: spread over the machines of a Ray cluster.")]
Address = Annotated[
    str | None, typer.Option(help="HOST:PORT of the Ray cluster; without one, this machine is all of it.")
]
KaggleRun = Annotated[Path, typer.Option("--run", help="A run folder; it remembers what was sent.")]
KaggleStep = Annotated[str, typer.Argument(metavar="[STEP|all]", help="Such as 02.")]


@app.command()
def run(
    data: Annotated[
        str, typer.Option(help="A dataset's folder, 'phantom' (the embedded one) or 'auto' (what Kaggle or Colab has).")
    ] = runs.PHANTOM,
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "demo",
    out: Annotated[Path, typer.Option(help="The run folder; a run that was cut off goes on from it.")] = Path(
        "runs/demo"
    ),
    only: Annotated[str | None, typer.Option(metavar="STEP", help="Only this step, such as 02.")] = None,
    start: Annotated[str | None, typer.Option("--from", metavar="STEP", help="This step and all after it.")] = None,
    jobs: Jobs = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Make the chosen steps anew; their folders are deleted.")
    ] = False,
    param: Params = None,
    on: Engine = "local",
    address: Address = None,
):
    """Run the notebooks in order, skipping those that are done, and write OUT/report.html."""
    pipeline.run(data, profile, out, only, start, jobs, force, _pairs(param), on, address)


@data_app.command()
def check(folder: Annotated[str, typer.Argument(help="A dataset's folder or file, 'phantom' or 'auto'.")]):
    """Count a dataset's images per class and split, and name what is missing, unreadable, doubled or would leak.

    Exit status 3: there is something that `run` would refuse.
    """
    from stgan_utils import data

    text, bad = data.check(runs.identify(folder))
    print(text)
    if bad:
        raise typer.Exit(3)


@app.command()
def predict(
    images: Annotated[Path, typer.Option(help="A folder, one image, or a zip archive.")],
    out: Annotated[str, typer.Option(help="CSV in the format of ISIC 2018 Task 3; - is standard output.")],
    model: Annotated[
        str, typer.Option(help="A classifier's file (.safetensors) or its name in the manifest.")
    ] = "classifier-mobilenetv2",
):
    """Classify images. Not a medical device: the probabilities are no diagnosis."""
    from stgan_utils.classifier import Classifier
    from stgan_utils.predict import predict_folder
    from stgan_utils.weights import resolve

    written, unreadable = predict_folder(Classifier.load(resolve(model)), images, out)
    for name, reason in unreadable:
        print(f"no row for {name}: {reason}", file=sys.stderr)
    print(f"{written:,} rows: {out}. Not a medical device: these are no diagnoses.", file=sys.stderr)
    if unreadable:
        raise typer.Exit(3)


@app.command()
def generate(
    weights: Annotated[str, typer.Option(help="A generator's name in the manifest, or a file.")],
    out: Annotated[Path, typer.Option(help="A new folder: images/, synthetic.csv, grid.png, interpolation.gif.")],
    count: Annotated[int, typer.Option(help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed makes the same images.")] = 0,
    truncation: Annotated[float, typer.Option(help="Below 1: fewer failures, less variety.")] = 1.0,
    lesion: Annotated[str | None, typer.Option(help="Names the files; by default what the weights draw.")] = None,
):
    """Draw images with trained weights."""
    from stgan_utils import generation
    from stgan_utils.weights import resolve

    rows = generation.generate(resolve(weights), count, out, seed, truncation, lesion)
    print(f"{len(rows):,} images, grid.png and interpolation.gif: {out}")


@arms_app.command("train")
def train_arms(
    names: Annotated[list[str], typer.Argument(help="Arms, as `stgan_utils/arms.py` lists them.")],
    run_dir: RunDir,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 3,
    jobs: Jobs = 1,
    on: Engine = "local",
    address: Address = None,
):
    """Train arms of the experiment; finished ones are left alone, a killed one goes on."""
    from stgan_utils import arms

    tasks = arms.tasks(names, run_dir, seeds)
    engine.run_all(tasks, engine.choose(on, tasks, run_dir.resolve(), jobs, address))


@arms_app.command("table")
def table_of_arms(run_dir: RunDir):
    """Compare all trained arms on the real test lesions: RUN/arms/arms.csv, arms.md, arms.png."""
    from stgan_utils import findings

    print(findings.write_comparison(run_dir))


@arms_app.command("judge")
def judge_arm(name: Annotated[str, typer.Argument(help="A trained arm.")], run_dir: RunDir):
    """Every figure of one arm (seed 0) on the real test lesions, as a page: RUN/arms/NAME/seed0/test/README.md."""
    from stgan_utils import findings

    print(findings.judge(name, run_dir))


@arms_app.command("refit")
def refit_arm(name: Annotated[str, typer.Argument(help="A trained arm without generated images.")], run_dir: RunDir):
    """Train on with an arm's recipe on all real images, held-out ones too; `weights release` publishes the result."""
    from stgan_utils import arms

    print(arms.refit(name, run_dir))


@kaggle_app.command("push")
def push_to_kaggle(
    run_dir: KaggleRun,
    step: KaggleStep = "all",
    dataset: Annotated[str, typer.Option(help="The images on Kaggle.")] = places.HAM10000,
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "kaggle",
    package: Annotated[str | None, typer.Option(help="OWNER/NAME of a data set that holds this package.")] = None,
    internet: Annotated[bool, typer.Option(help="What the kernels may use; --package is for those without.")] = True,
    param: Params = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, send nothing.")] = False,
):
    """Send steps to run on Kaggle; all: those whose earlier steps are done. Sent again, an unfinished one goes on."""
    from stgan_utils import kaggle_kernels

    kaggle_kernels.push(step, run_dir, dataset, profile, package, internet, _pairs(param), dry_run)


@kaggle_app.command("status")
def status_on_kaggle(run_dir: KaggleRun):
    """How the steps are that were sent."""
    from stgan_utils import kaggle_kernels

    for step, state in kaggle_kernels.status(run_dir).items():
        print(f"{step}: {state}")


@kaggle_app.command("pull")
def pull_from_kaggle(
    run_dir: KaggleRun,
    data: Annotated[str, typer.Option(help="Where the same data set lies here; `run` then goes on with it.")],
    step: KaggleStep = "all",
):
    """Bring what the steps made into the run folder."""
    from stgan_utils import kaggle_kernels

    kaggle_kernels.pull(step, run_dir, data)


@app.command()
def dedup(
    images: Annotated[Path, typer.Argument(help="Folder of images, searched with its sub-folders.")],
    out: Annotated[Path, typer.Option(help="CSV, one row an image; nothing is deleted.")],
    phash: Annotated[
        int, typer.Option(min=0, max=64, help="An image nearer than this to one kept is a copy (bits of 64).")
    ] = 10,
    whash: Annotated[int, typer.Option(min=0, max=64, help="The same for the wavelet hash, after pHash.")] = 10,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; one a core unless told.")] = None,
):
    """Find near-copies in a folder by pHash, then wHash."""
    from stgan_utils import files
    from stgan_utils.dedup import deduplicate
    from stgan_utils.generation import list_images

    paths = list_images(images)["path"]
    files.refuse_input(out, paths)
    table = deduplicate(paths, phash, whash, jobs)
    with files.atomic_path(out) as temporary:
        table.to_csv(temporary, index=False)
    print(f"{table['kept'].sum():,} of {len(table):,} images kept: {out}")


@weights_app.command("list")
def list_weights(folder: Folder = None):
    """What the manifest names: what is here, what must be fetched, how large."""
    from stgan_utils import weights

    for name, asset in weights.manifest().items():
        found = weights.find(name, folder)
        megabytes = f"{asset['bytes'] / 1e6:.1f} MB" if asset["bytes"] else "? MB"
        kaggle, url = asset["sources"]["kaggle"], asset["sources"]["url"]
        source = f"to fetch from Kaggle, {kaggle['slug']}" if kaggle else url and f"to fetch from {url}"
        where = found or source or "missing: `git checkout weights` brings it back"
        print(f"{name:28} {asset['stage']:10} {megabytes:>9}  {where}")


@weights_app.command("fetch")
def fetch_weights(
    names: Annotated[list[str] | None, typer.Argument(help="Names in the manifest.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that the manifest names.")] = False,
    folder: Folder = None,
):
    """Download what is not here and check it; a download that was cut off goes on."""
    from stgan_utils import weights

    if not names and not everything:
        raise UserError("Name what to fetch, or say --all; `weights list` shows the names.")
    failures = []
    for name in weights.manifest() if everything else names:
        try:
            print(f"{name}: {weights.fetch(name, folder)}")
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))


@weights_app.command("verify")
def verify_weights(folder: Folder = None):
    """Compare the checksum of everything that is here."""
    from stgan_utils import weights

    found = list(weights.verify(folder))
    for name, place, wrong in found:
        if not wrong:
            print(f"{name}: as it should be, {place}")
    if failures := [wrong for _, _, wrong in found if wrong]:
        raise UserError("\n".join(failures))


@weights_app.command("path")
def path_of_weights(name: Annotated[str, typer.Argument(help="A name in the manifest.")], folder: Folder = None):
    """Print where an asset is, checked; it is fetched if it is not here."""
    from stgan_utils import weights

    print(weights.path(name, folder))


@weights_app.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(metavar="IN", help="FastGAN's own file: N.pth or all_N.pth.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where to, .safetensors.")],
):
    """Turn FastGAN's own checkpoint into one of ours, every tensor accounted for."""
    from stgan_utils import checkpoints

    checkpoints.convert(source, target)
    print(target)


@weights_app.command("release")
def release_weights(
    run_dir: Annotated[
        Path | None, typer.Argument(metavar="RUN_DIR", help="A finished run on real images, for its GANs.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Folder of a trained classifier: model.safetensors, result.json.")
    ] = None,
):
    """For maintainers: put a run's models into weights/ in half precision, with manifest entries and a model card."""
    from stgan_utils.release import release

    for name, megabytes in release(run_dir, classifier).items():
        print(f"{name:28} {megabytes:6.1f} MB")


def _pairs(param):
    if wrong := [pair for pair in param or () if "=" not in pair]:
        raise UserError(f"-p {TWO_WORDS}, not {wrong[0]!r}.")
    return dict(pair.split("=", 1) for pair in param or ())


def _join_pairs(arguments):
    """`-p KEY VALUE`, papermill's way, as the single value that typer takes: `-p KEY=VALUE`."""
    joined, rest = [], iter(arguments)
    for argument in rest:
        joined.append(argument)
        if argument == "-p":
            key, value = next(rest, None), next(rest, None)
            if value is None or "=" in key or value.startswith("--"):
                raise UserError(f"-p {TWO_WORDS}.")
            joined.append(f"{key}={value}")
    return joined


def main():
    for name in PATHS:
        if os.environ.get(name):  # notebooks run in their own folder
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    try:
        app(_join_pairs(sys.argv[1:]), prog_name="python -m stgan_utils")
    except OSError as error:
        if error.filename is None or error.errno not in PLACE_REFUSED:
            raise
        print(f"{error.filename}: {error.strerror}; choose another place.", file=sys.stderr)
        sys.exit(2)
    except (UserError, pipeline.StepFailed, runs.Unfinished) as error:
        print(error, file=sys.stderr)
        sys.exit({UserError: 2, pipeline.StepFailed: 1, runs.Unfinished: 4}[type(error)])


if __name__ == "__main__":
    main()
