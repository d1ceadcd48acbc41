"""What a step finds where it begins – data, processor, precision, time and room – in a line, and a sentence for each of
them that will not do.
"""

import shutil

import torch
from IPython import get_ipython
from IPython.display import Markdown, display

from stgan_utils import device, places

GPU_PROFILE = "kaggle"  # takes days without one


def introduce(step, drawn_for_want):
    """The first words of a step: what it found, and what it will miss.

    Args:
        step: a `runs.OpenStep`.
        drawn_for_want: the images are phantom because no others were found.
    """
    print(f"{step.step} · {line(step.settings, step.data_name, step.folder)}")
    if drawn_for_want:
        _bold(
            "There is no HAM10000 here, so the images are phantom: drawn, not photographed, and no evidence. For real "
            f"ones {places.advice('data')}, and run from the top."
        )
    for sentence in warnings(step.settings, step.profile, step.folder):
        _bold(sentence)


def line(settings, data_name, folder):
    """Data, device and precision, memory or cores, time limit, free disk and folder, between dots.

    Args:
        settings: the step's settings.
        data_name: what the data is called.
        folder: the step's folder; it exists.
    """
    if device.pick().type == "cuda":
        room = f"{torch.cuda.get_device_properties(device.pick()).total_memory / 1e9:.0f} GB of GPU memory"
    else:
        room = f"{places.cores()} cores"
    minutes = getattr(settings, "max_minutes", None)
    limit = [f"stops after {minutes:g} minutes"] if minutes is not None else []
    free = f"{_gb(shutil.disk_usage(folder).free)} of disk free"
    return " · ".join([f"data: {data_name}", device.describe(), room, *limit, free, str(folder)])


def warnings(settings, profile, folder):
    """A sentence, with the way on, for each thing that this step will miss here."""
    trains, found = hasattr(settings, "iterations") or hasattr(settings, "epochs"), []
    # One that this torch has no kernels for is named by `device.pick`.
    if trains and profile == GPU_PROFILE and not torch.cuda.is_available():
        found.append(
            f"There is no GPU, and without one the profile {GPU_PROFILE!r} takes days: {places.advice('gpu')}, or set "
            "profile to 'demo' or 'real-cpu'."
        )
    if profile == GPU_PROFILE and places.place() == places.KAGGLE and getattr(settings, "max_minutes", 0) is None:
        found.append(
            "No time limit: Kaggle ends a session after 9 to 12 hours and keeps nothing of it; max_minutes = 500 stops "
            "in time, and the next session goes on from its output."
        )
    if places.place() == places.COLAB and not folder.is_relative_to(places.DRIVE):
        found.append(
            "What is made here is lost with the session: mount Google Drive (the folder symbol, then Mount Drive) and "
            "run from the top, and it is kept there."
        )
    free, needed = shutil.disk_usage(folder).free, room_needed(settings)
    if free < needed:
        found.append(
            f"The disk is nearly full: {_gb(free)} free below {folder}, and this step may want {_gb(needed)}; delete "
            "what is no longer needed there, or set run_dir to a folder of another disk."
        )
    return found


def room_needed(settings):
    """Bytes that a step may want, on the safe side.

    A GAN's checkpoint at width 64 has 0.6 GB (both networks, the average, Adam's two moments); it is there twice while
    it is replaced, with the best and the last generator beside it. Generated images count as if uncompressed.
    """
    networks = 2e9 * (getattr(settings, "ngf", 0) / 64) ** 2
    images = getattr(settings, "generate", None)
    most = 7000  # images that bring a class of HAM10000 to the largest one's
    return 2e8 + networks + (0 if images is None else (images or most) * 3 * settings.size**2)


def _bold(sentence):
    if get_ipython():
        display(Markdown(f"**{sentence}**"))
    else:
        print(sentence)


def _gb(size):
    return f"{size / 1e9:,.1f} GB"
