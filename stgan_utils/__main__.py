"""The command line: `python -m stgan_utils COMMAND`; `--help` lists the commands.

Exit status: 0 done, 1 a notebook failed, 2 wrong input (one sentence says what), 4 time was up and the same command
goes on. Anything else that goes wrong is a bug and keeps its traceback.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from stgan_utils import pipeline, runs
from stgan_utils.config import PROFILES, UserError

app = typer.Typer(
    help="GAN-made images for the rare classes of HAM10000, judged on real lesions. Not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command()
def run(
    data: Annotated[str, typer.Option(help="A dataset's folder, or 'phantom' for the embedded one.")] = runs.PHANTOM,
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "demo",
    out: Annotated[Path, typer.Option(help="The run folder; a run that was cut off goes on from it.")] = Path(
        "runs/demo"
    ),
    only: Annotated[str | None, typer.Option(metavar="STEP", help="Only this step, such as 02.")] = None,
    start: Annotated[str | None, typer.Option("--from", metavar="STEP", help="This step and all after it.")] = None,
    jobs: Annotated[int, typer.Option(help="How many notebooks may run side by side.")] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Make the chosen steps anew; their folders are deleted.")
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="KEY VALUE", help="A setting for every step that knows it, or stage1.KEY for one."),
    ] = None,
):
    """Run the notebooks in order, skipping those that are done, and write OUT/report.html."""
    pipeline.run(data, profile, out, only, start, jobs, force, dict(pair.split("=", 1) for pair in param or ()))


@data_app.command()
def check(folder: Annotated[str, typer.Argument(help="A dataset's folder or file.")]):
    """Count a dataset's images per class and split, and name what is missing, unreadable, doubled or would leak."""
    from stgan_utils import data

    print(data.check(folder))


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="A classifier's file (.safetensors).")],
    images: Annotated[Path, typer.Option(help="A folder, one image, or a zip archive.")],
    out: Annotated[str, typer.Option(help="CSV in the format of ISIC 2018 Task 3; - is standard output.")],
    tta: Annotated[bool, typer.Option("--tta", help="Average over flips: four times as slow.")] = False,
):
    """Classify images. Not a medical device: the probabilities are no diagnosis."""
    from stgan_utils.classifier import Classifier
    from stgan_utils.predict import predict_folder

    written, unreadable = predict_folder(Classifier.load(model), images, out, tta=tta)
    for name, reason in unreadable:
        print(f"no row for {name}: {reason}", file=sys.stderr)
    print(f"{written:,} rows: {out}. Not a medical device: these are no diagnoses.", file=sys.stderr)
    if unreadable:
        raise typer.Exit(3)


@app.command()
def dedup(
    images: Annotated[Path, typer.Argument(help="Folder of images, searched with its sub-folders.")],
    out: Annotated[Path, typer.Option(help="CSV, one row an image; nothing is deleted.")],
    phash: Annotated[int, typer.Option(help="An image nearer than this to one kept is a copy (bits of 64).")] = 10,
    whash: Annotated[int, typer.Option(help="The same for the wavelet hash, after pHash.")] = 10,
    jobs: Annotated[int | None, typer.Option(help="Processes; all cores unless told.")] = None,
):
    """Find near-copies in a folder by pHash, then wHash."""
    from stgan_utils import files
    from stgan_utils.dedup import deduplicate
    from stgan_utils.generation import list_images

    table = deduplicate(list_images(images)["path"], phash, whash, jobs)
    with files.atomic_path(out) as temporary:
        table.to_csv(temporary, index=False)
    print(f"{table['kept'].sum():,} of {len(table):,} images kept: {out}")


def _join_pairs(arguments):
    """`-p KEY VALUE`, papermill's way, as the single value that typer takes: `-p KEY=VALUE`."""
    joined, rest = [], iter(arguments)
    for argument in rest:
        joined.append(argument)
        if argument == "-p":
            key, value = next(rest, None), next(rest, None)
            if value is None:
                raise UserError("-p takes two words: the setting and its value, such as -p iterations 100.")
            joined.append(f"{key}={value}")
    return joined


def main():
    try:
        app(_join_pairs(sys.argv[1:]), prog_name="python -m stgan_utils")
    except (UserError, pipeline.StepFailed, runs.Unfinished) as error:
        print(error, file=sys.stderr)
        sys.exit({UserError: 2, pipeline.StepFailed: 1, runs.Unfinished: 4}[type(error)])


if __name__ == "__main__":
    main()
