"""Where the time of the whole sequence goes: python benchmarks/sequence.py [--profile demo] [--jobs N].

Runs every notebook on the embedded dataset through the command line, in a fresh folder, with an empty cache; then the
same once more, when nothing is left to do. Ends with what `import stgan_utils` takes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from statistics import median
from time import perf_counter

from common import write_section

from stgan_utils import files
from stgan_utils.pipeline import STEPS
from stgan_utils.profiles import PROFILES
from stgan_utils.runs import result

PACKAGES = ("papermill", "torch")
IMPORT = "from time import perf_counter as now; began = now(); import stgan_utils; print(now() - began)"


def run(profile, jobs, only, folder):
    """Seconds of `python -m stgan_utils run`, with folder's own cache."""
    command = [sys.executable, "-m", "stgan_utils", "run", "--data", "phantom", "--profile", profile]
    command += ["--out", str(folder / "run"), "--jobs", str(jobs), *(["--only", only] if only else [])]
    began = perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "STGAN_CACHE": str(folder / "cache")})
    return perf_counter() - began


def steps(run_dir):
    """Markdown table of what the steps left in `run_dir`: seconds from a notebook's start to its end, and of its parts.

    The kernel's start ends with the first cell. `result.json` tells the seconds from the opening of the step, when
    everything heavy has been imported, to its end; cells that call `stgan_utils.data` and no network are its data, the
    others its work. The rest is imports, and the kernel's end.
    """
    lines = ["| step | kernel start | imports | data | work | all |", "|---|---|---|---|---|---|"]
    sums = [0.0] * 5
    for step in STEPS:
        finished = result(run_dir, step.name)
        if finished is None:
            continue
        notebook = files.read_json(run_dir / "notebooks" / step.notebook.name)
        whole = notebook["metadata"]["papermill"]
        first = min(cell["metadata"]["papermill"]["start_time"] for cell in notebook["cells"])
        start = (datetime.fromisoformat(first) - datetime.fromisoformat(whole["start_time"])).total_seconds()
        opened = finished["seconds"]
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        data = sum(c["metadata"]["papermill"]["duration"] for c in cells if reads_data("".join(c["source"])))
        parts = start, whole["duration"] - start - opened, data, opened - data, whole["duration"]
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
        lines.append(f"| {step.name} | " + " | ".join(f"{part:.1f} s" for part in parts) + " |")
    lines.append("| **all steps** | " + " | ".join(f"**{total:.1f} s**" for total in sums) + " |")
    return "\n".join(lines)


def reads_data(source):
    return "datasets." in source and not any(call in source for call in ("train(", "predict_proba(", "Trainer("))


def import_seconds(repeats):
    """Seconds of `import stgan_utils` in fresh processes, a list."""
    command = [sys.executable, "-c", IMPORT]
    return [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(repeats)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="smoke", help="smoke (default) or demo")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks side by side (default 1)")
    parser.add_argument("--only", metavar="STEP", help="no step but those whose name begins with this")
    parser.add_argument("--repeats", type=int, default=5, help="runs with nothing to do, and imports (default 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = run(args.profile, args.jobs, args.only, folder)
        table = steps(folder / "run")
        again = [run(args.profile, args.jobs, args.only, folder) for _ in range(args.repeats)]
    imports = import_seconds(args.repeats)
    body = f"""
`run --data phantom --profile {args.profile} --jobs {args.jobs}` in a fresh folder: **{whole:.0f} s** from the first
process to the last. With nothing left to do: **{median(again):.2f} s**. `import stgan_utils`:
**{median(imports):.3f} s** (medians of {args.repeats}).

{table}

Kernel start: the first kernel of each of the workers waits until one process has imported what notebooks need, the
others are its forks. Imports: what is left of them up to the opening of a step, and the kernel's end. Steps that ran
side by side ({args.jobs} at most) count in full each.
"""
    print(body)
    write_section(f"The sequence, {args.profile}", body, PACKAGES)


if __name__ == "__main__":
    main()
