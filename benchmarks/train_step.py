"""One GAN training step, before and after, in turn: python benchmarks/train_step.py [--reference DIR].

DIR is a clone of FastGAN's public code (hugobb/FastGAN-pytorch is a copy of the original repository): its networks,
losses and augmentation make the step that ours is compared with, on the same kind of batch. Without it, ours is
compared with itself done plainly: float32, channels first, memory given back at every step. Perceptual networks have
random weights here, which cost the same. Each program has a process of its own, so that neither gets what the other set
up; they take turns, step by step. Ends with how the cost grows with the size of the images.
"""

import argparse
import functools
import multiprocessing
import os
import platform
import sys
import types
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from common import write_section

PACKAGES = ("torch", "torchvision", "lpips")


def random_lpips():
    """LPIPS with random networks, for whoever makes one after this: nothing is downloaded."""
    import lpips

    lpips.LPIPS = functools.partial(lpips.LPIPS, pnet_rand=True, verbose=False)
    return lpips.LPIPS


def reference(args):
    """One step of FastGAN's public code as a function without arguments."""
    import torch

    distance = random_lpips()(net="vgg")
    # What its training program imports: its copy of LPIPS is too old for today's packages.
    perceptual = types.SimpleNamespace(PerceptualLoss=lambda **_: lambda images, targets: distance(targets, images))
    sys.modules |= {"lpips": perceptual, "lmdb": types.ModuleType("lmdb")}
    sys.path.insert(0, args.reference)
    import train as code

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distance.to(device)
    generator = code.Generator(args.ngf, 256, im_size=args.size)
    discriminator = code.Discriminator(args.ngf, im_size=args.size)
    for network in (generator, discriminator):
        network.apply(code.weights_init).to(device)
    averaged = code.copy_G_params(generator)
    adam = [torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (generator, discriminator)]
    images = torch.rand(args.batch, 3, args.size, args.size, device=device) * 2 - 1

    def step():
        fake = generator(torch.Tensor(len(images), 256).normal_().to(device))
        real, *fake = (code.DiffAugment(view, policy="color,translation") for view in (images, *fake))
        discriminator.zero_grad()
        code.train_d(discriminator, real)
        code.train_d(discriminator, [view.detach() for view in fake], label="fake")
        adam[1].step()
        generator.zero_grad()
        (-discriminator(fake, "fake").mean()).backward()
        adam[0].step()
        for average, live in zip(averaged, generator.parameters(), strict=True):
            average.mul_(0.999).add_(live.data, alpha=0.001)

    return step


def ours(args, exact=False, plain=False):
    """One step of `GanTrainer` as a function without arguments.

    `exact` computes in float32 throughout; `plain` undoes the rest of what makes it fast as well.
    """
    import torch

    from stgan_utils import device, losses, trainer
    from stgan_utils.backbone import load_backbone
    from stgan_utils.config import Stage1Settings

    random_lpips()
    losses.load_backbone = lambda required: load_backbone("none")
    if exact or plain:
        device.precision = lambda *_: torch.float32
    if plain:
        device.keep_memory = lambda: None
        torch.channels_last = torch.contiguous_format
    settings = Stage1Settings(size=args.size, ngf=args.ngf, batch_size=args.batch, perceptual=args.perceptual)
    shape = 4 * args.batch, args.size, args.size, 3
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return trainer.GanTrainer(settings, images, Path("never written")).step


PROGRAMS = {
    "reference": reference,
    "plain": functools.partial(ours, plain=True),
    "exact": functools.partial(ours, exact=True),
    "ours": ours,
}


def work(connection, program, args):
    """A process of one program: makes a first step, sends its operations, then a step for every True received.

    Each of those is answered by its seconds; False ends the process, answered by the peak of memory in bytes.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    step = PROGRAMS[program](args)
    with FlopCounterMode(display=False) as counter:
        step()
    connection.send(counter.get_total_flops())
    while connection.recv():
        wait()
        began = perf_counter()
        step()
        wait()
        connection.send(perf_counter() - began)
    connection.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory())


def peak_memory():
    """The most memory that this process has held, in bytes."""
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def take_turns(programs, repeats):
    """Run programs step by step in turn, each in its own process.

    Args:
        programs: [(name in PROGRAMS, arguments)].

    Returns:
        [(operations of a step, [seconds] of `repeats` steps, peak memory in bytes)] in the same order.
    """
    spawn, pipes = multiprocessing.get_context("spawn"), []
    for program, args in programs:
        here, there = spawn.Pipe()
        spawn.Process(target=work, args=(there, program, args), daemon=True).start()
        there.close()  # so that a process that dies is an EOFError here, not a wait for ever
        pipes.append((here, here.recv()))
    seconds = [[] for _ in pipes]
    for repeat in range(repeats):
        for (pipe, _), taken in zip(pipes, seconds, strict=True):
            pipe.send(True)
            taken.append(pipe.recv())
        print(f"step {repeat + 1}: " + ", ".join(f"{taken[-1]:.2f} s" for taken in seconds), flush=True)
    found = []
    for (pipe, operations), taken in zip(pipes, seconds, strict=True):
        pipe.send(False)
        found.append((operations, taken, pipe.recv()))
    return found


def side_by_side(args):
    """Markdown table: the old step, ours with the same perceptual network, and ours with the cheaper one."""
    from stgan_utils import device

    old = ("the public code", "reference") if args.reference else ("ours, done plainly", "plain")
    same = argparse.Namespace(**{**vars(args), "perceptual": "vgg"})
    rows = [(f"{old[0]} (vgg)", old[1], same), ("same mathematics (vgg), float32", "exact", same)]
    precision = str(device.precision(device.pick(), args.ngf)).removeprefix("torch.")
    if precision != "float32":
        rows.append((f"same mathematics (vgg), {precision}", "ours", same))
    if args.perceptual != "vgg":
        rows.append((f"a cheaper distance ({args.perceptual}), {precision}", "ours", args))
    found = take_turns([row[1:] for row in rows], args.repeats)
    before = np.array(found[0][1])
    lines = [
        "| | seconds a step | images/s | peak memory | times as fast (lowest – highest) |",
        "|---|---|---|---|---|",
    ]
    for (name, *_), (_, taken, peak) in zip(rows, found, strict=True):
        ratio = before / taken
        lines.append(
            f"| {name} | {median(taken):.3f} | {args.batch / median(taken):.2f} | {peak / 2**30:.2f} GiB "
            f"| **{median(ratio):.2f}×** ({ratio.min():.2f} – {ratio.max():.2f}) |"
        )
    return "\n".join(lines)


def growth(args):
    """Markdown table of our step at each size in `args.growth`."""
    lines = [
        "| size | seconds a step | against the size before | images/s | 10⁹ operations | 10⁹ a second | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    last = None
    for size in args.growth:
        sized = argparse.Namespace(**{**vars(args), "size": size})
        [(operations, taken, peak)] = take_turns([("ours", sized)], args.repeats)
        seconds = median(taken)
        times = f"{seconds / last:.2f}×" if last else ""
        lines.append(
            f"| {size} px | {seconds:.3f} | {times} | {args.batch / seconds:.2f} | {operations / 1e9:,.0f} "
            f"| {operations / seconds / 1e9:,.0f} | {peak / 2**30:.2f} GiB |"
        )
        print(lines[-1], flush=True)
        last = seconds
    return "\n".join(lines)


def main():
    from stgan_utils import device
    from stgan_utils.config import PERCEPTUAL, PROFILES, SIZES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", metavar="DIR", help="a clone of FastGAN's public code (256 or 512 px only)")
    parser.add_argument("--size", type=int, choices=SIZES, default=256, help="side in pixels (default 256)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--ngf", type=int, default=64, help="width of the networks (default 64)")
    cheaper = PROFILES["real-cpu"]["stage1"]["perceptual"]
    parser.add_argument(
        "--perceptual", choices=PERCEPTUAL, default=cheaper, help=f"the cheaper one (default {cheaper})"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each program (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="threads of the CPU (default: torch's choice)")
    parser.add_argument("--growth", type=int, choices=SIZES, nargs="*", default=SIZES, help="sizes (default: all)")
    args = parser.parse_args()
    if args.reference and not (Path(args.reference) / "train.py").is_file():
        parser.error(f"--reference {args.reference} is no clone of FastGAN's public code: it has no train.py")
    if args.reference and args.size < 256:
        parser.error("FastGAN's public code has no networks below 256 px: choose --size 256 or 512")
    args.reference = args.reference and os.path.abspath(args.reference)
    against = "" if args.reference else " No clone of the public code was given (`--reference`): no ratio to it."
    threads = f", {args.threads} threads" if args.threads else ""
    body = f"""
{args.size} px, batch {args.batch}, width {args.ngf}, on {device.describe()}{threads}; in turn, {args.repeats} times;
medians. Perceptual networks with random weights.{against}

{side_by_side(args)}

How our step ({args.perceptual}) grows with the size (operations: additions and multiplications of convolutions
and matrix products, as torch counts them):

{growth(args)}
"""
    print(body)
    write_section("GAN training step", body, PACKAGES)


if __name__ == "__main__":
    main()
