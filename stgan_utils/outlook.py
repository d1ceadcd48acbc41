"""What a step finds where it begins – data, processor, precision, time and room – in a line, and a sentence for each of
them that will not do.
"""

import shutil

from IPython import get_ipython
from IPython.display import Markdown, display

from stgan_utils import places
from stgan_utils.lesions import MINORITY
from stgan_utils.runs import PHANTOM

GPU_PROFILE = "kaggle"  # takes days without one
MOST = 7000  # images that bring a class of HAM10000 to the largest one's


def introduce(step, drawn_for_want):
    """The first words of a step: what it found, and what it will miss.

    Args:
        step: a `steps.OpenStep`.
        drawn_for_want: the images are phantom because no others were found.
    """
    print(f"{step.step} · {line(step)}")
    if drawn_for_want:
        _bold(
            "There is no HAM10000 here, so the images are phantom: drawn, not photographed, and no evidence. For real "
            f"ones {places.advice('data')}, and run from the top."
        )
    for sentence in warnings(step):
        _bold(sentence)


def line(step):
    """Data, device and precision, GPU memory or cores, time limit, free disk and the step's folder, between dots."""
    room = f"{places.cores()} cores"
    if step.device.startswith("cuda"):
        import torch

        room = f"{_gb(torch.cuda.get_device_properties(0).total_memory)} of GPU memory"
    minutes = getattr(step.settings, "max_minutes", None)
    limit = [f"stops after {minutes:g} minutes"] if minutes is not None else []
    free = f"{_gb(shutil.disk_usage(step.folder).free)} of disk free"
    return " · ".join([f"data: {step.data_name}", step.device, room, *limit, free, str(step.folder)])


def warnings(step):
    """A sentence, with the way on, for each thing that the step will miss here."""
    settings, found = step.settings, []
    full_size = step.profile == GPU_PROFILE and (hasattr(settings, "iterations") or hasattr(settings, "epochs"))
    if full_size and not step.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():  # `device.pick` names one that cannot be used
            found.append(
                f"There is no GPU, and without one the profile {GPU_PROFILE!r} takes days: {places.advice('gpu')}, or "
                "set profile to 'demo' or 'real-cpu'."
            )
    if full_size and places.place() == places.KAGGLE and getattr(settings, "max_minutes", 0) is None:
        found.append(
            "No time limit: Kaggle ends a session after 9 to 12 hours and keeps nothing of it; max_minutes = 500 stops "
            "in time, and the next session goes on from its output."
        )
    if places.place() == places.COLAB and not step.folder.is_relative_to(places.DRIVE):
        found.append(
            "What is made here is lost with the session: mount Google Drive (the folder symbol, then Mount Drive) and "
            "run from the top, and it is kept there."
        )
    from stgan_utils.data import cache_folder  # pandas

    wants = [(step.folder, room_needed(settings), "set run_dir to a folder of another disk")]
    if decoded := cache_needed(step):
        wants.append((cache_folder(), decoded, "let STGAN_CACHE name a folder of another disk"))
    for folder, needed, way_on in wants:
        if (free := shutil.disk_usage(folder).free) < needed:
            found.append(
                f"The disk is nearly full: {_gb(free)} free below {folder}, and this step may want {_gb(needed)}; "
                f"delete what is no longer needed there, or {way_on}."
            )
    return found


def room_needed(settings):
    """Bytes that a step may want in its folder, on the safe side.

    A GAN's checkpoint at width 64 has 0.6 GB (both networks, the average, Adam's two moments); it is there twice while
    it is replaced, with the best and the last generator beside it. Generated images count as if uncompressed.
    """
    networks = 2e9 * (getattr(settings, "ngf", 0) / 64) ** 2
    images = getattr(settings, "generate", None)
    return 2e8 + networks + (0 if images is None else (images or MOST) * 3 * settings.size**2)


def cache_needed(step):
    """Bytes that a step may want for decoded images, on the safe side: HAM10000, and in 05 what was generated."""
    settings = step.settings
    if step.data == PHANTOM or not hasattr(settings, "size"):
        return 0
    images = 10_100 + (len(MINORITY) * MOST if hasattr(settings, "synthetic") else 0)
    return images * 3 * settings.size**2


def _bold(sentence):
    if get_ipython():
        display(Markdown(f"**{sentence}**"))
    else:
        print(sentence)


def _gb(size):
    return f"{size / 1e9:,.1f} GB"
