"""One GAN training step, before and after, in turn: python benchmarks/train_step.py [--reference DIR].

DIR is a clone of FastGAN's public code (hugobb/FastGAN-pytorch is a copy of the original repository): its networks,
losses and augmentation make the step that ours is compared with, on the same kind of batch. Without it, ours is
compared with itself done plainly: float32, channels first, memory given back at every step. Perceptual networks have
random weights here, which cost the same. Each program has a process of its own, so that neither gets what the other set
up; they take turns, step by step; on a GPU, where one step is too short to be timed, ten at a time. Ends with
how the cost grows with the size of the images and, on a GPU, with what the time goes into and what the device could do.
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
ON_A_GPU = 10  # steps a turn
KERNELS = {  # of a GPU, by what their names hold; the first that fits
    "convolutions and matrix products": ("conv", "gemm", "xmma", "cutlass", "cudnn", "nvjet"),
    "BatchNorm": ("batch_norm", "bn_", "batchnorm"),
    "optimiser and average": ("multi_tensor", "foreach", "fused_adam"),
    "spectral norm's products": ("gemv", "dot_kernel", "reduce_1block"),
    "element by element, sums, copies": ("",),
}


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
    losses.hub_file = lambda url: None
    if exact or plain:
        device.precision = lambda *_: torch.float32
    if plain:
        device.keep_memory = lambda: None
        torch.channels_last = torch.contiguous_format
    same = {name: getattr(args, name) for name in ("size", "ngf", "perceptual")}
    settings = Stage1Settings(batch_size=args.batch, **same)
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
    """A process of one program: makes a first step, sends its operations, and then answers until it is told to end.

    "step": the seconds of a step; "look": what a GPU spends a step on (`look_at_gpu`); "end": the peak of memory in
    bytes, the last answer.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from stgan_utils.graphs import WARM_UP

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    step, steps = PROGRAMS[program](args), ON_A_GPU if on_gpu else 1
    with traffic() as moved, FlopCounterMode(display=False) as counter:
        step()
    for _ in range(steps + WARM_UP if on_gpu else 0):  # kernels are chosen, the step is recorded
        step()
    operations = counter.get_total_flops()
    connection.send(operations)
    while (order := connection.recv()) != "end":
        if order == "look":
            connection.send(look_at_gpu(step, steps, operations, moved.total))
            continue
        wait()
        began = perf_counter()
        for _ in range(steps):
            step()
        wait()
        connection.send((perf_counter() - began) / steps)
    connection.send(torch.cuda.max_memory_allocated() if on_gpu else peak_memory())


def peak_memory():
    """The most memory that this process has held, in bytes."""
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def take_turns(programs, repeats, look=False):
    """Run programs in turn, each in its own process.

    Args:
        programs: [(name in PROGRAMS, arguments)].
        look: whether the last one is to say in the end what a GPU spends a step on.

    Returns:
        [(operations of a step, [seconds a step] of `repeats` turns, peak memory in bytes)] in the same order; and what
        that one said, or None.
    """
    spawn, pipes = multiprocessing.get_context("spawn"), []
    for program, args in programs:
        here, there = spawn.Pipe()
        spawn.Process(target=work, args=(there, program, args), daemon=True).start()
        there.close()  # so that a process that dies is an EOFError here, not a wait for ever
        pipes.append(here)
    operations, seconds = [pipe.recv() for pipe in pipes], [[] for _ in pipes]

    def ask(pipe, order):
        pipe.send(order)
        return pipe.recv()

    for repeat in range(repeats):
        for pipe, taken in zip(pipes, seconds, strict=True):
            taken.append(ask(pipe, "step"))
        print(f"turn {repeat + 1}: " + ", ".join(f"{taken[-1]:.4f} s" for taken in seconds), flush=True)
    looked_at = ask(pipes[-1], "look") if look else None
    peaks = [ask(pipe, "end") for pipe in pipes]
    return list(zip(operations, seconds, peaks, strict=True)), looked_at


def side_by_side(args):
    """Markdown: the old step, ours with the same perceptual network, and with the cheaper one; on a GPU, where the time
    of the last goes."""
    from stgan_utils import device

    old = ("the public code", "reference") if args.reference else ("ours, done plainly", "plain")
    same = argparse.Namespace(**{**vars(args), "perceptual": "vgg"})
    rows = [(f"{old[0]} (vgg)", old[1], same), ("same mathematics (vgg), float32", "exact", same)]
    precision = _precision(args)
    if precision != "float32":
        rows.append((f"same mathematics (vgg), {precision}", "ours", same))
    if args.perceptual != "vgg":
        rows.append((f"a cheaper distance ({args.perceptual}), {precision}", "ours", args))
    found, looked_at = take_turns([row[1:] for row in rows], args.repeats, look=device.pick().type == "cuda")
    before = np.array(found[0][1])
    lines = [
        "| | seconds a step | images/s | peak memory | times as fast (lowest – highest) |",
        "|---|---|---|---|---|",
    ]
    for (name, *_), (_, taken, peak) in zip(rows, found, strict=True):
        ratio = before / taken
        lines.append(
            f"| {name} | {median(taken):.3g} | {args.batch / median(taken):.3g} | {peak / 2**30:.2f} GiB "
            f"| **{median(ratio):.2f}×** ({ratio.min():.2f} – {ratio.max():.2f}) |"
        )
    return "\n".join([*lines, *([looked_at] if looked_at else [])])


def _precision(args):
    """What our step computes in here, such as "float32"."""
    from stgan_utils import device

    return str(device.precision(device.pick(), args.ngf)).removeprefix("torch.")


def growth(args):
    """Markdown table of our step at each size in `args.growth`."""
    lines = [
        f"How our step ({args.perceptual}) grows with the size (operations: additions and multiplications of",
        "convolutions and matrix products, as torch counts them):",
        "",
        "| size | seconds a step | against the size before | images/s | 10⁹ operations | 10⁹ a second | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    last = None
    for size in args.growth:
        sized = argparse.Namespace(**{**vars(args), "size": size})
        [(operations, taken, peak)], _ = take_turns([("ours", sized)], args.repeats)
        seconds = median(taken)
        times = f"{seconds / last:.2f}×" if last else ""
        lines.append(
            f"| {size} px | {seconds:.3g} | {times} | {args.batch / seconds:.3g} | {operations / 1e9:,.0f} "
            f"| {operations / seconds / 1e9:,.0f} | {peak / 2**30:.2f} GiB |"
        )
        print(lines[-1], flush=True)
        last = seconds
    return "\n".join(lines)


def ceilings():
    """What the GPU can do: (operations a second in bf16, bytes a second), measured on random numbers."""
    import torch

    def seconds(work):
        times = []
        for _ in range(10):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1e3)
        return median(times)

    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * 8192**3 / seconds(lambda: a @ b), 2 * source.nbytes / seconds(lambda: target.copy_(source))


def traffic():
    """A context in which `total` counts the bytes that operations read and write, each input and output once."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            if not function.is_view:
                tensors = {id(t): t for t in tree_leaves((args, kwargs, results)) if isinstance(t, torch.Tensor)}
                self.total += sum(t.nbytes for t in tensors.values())
            return results

    return Counter()


def look_at_gpu(step, steps, flops, moved):
    """Markdown: where the time of a step goes on the GPU, and the least that its operations and bytes would take.

    Args:
        step: makes one.
        steps: how many to look at, whole rounds.
        flops: its operations.
        moved: its bytes, as `traffic` counts them.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    began = perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    seconds = (perf_counter() - began) / steps
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spent, count = {kind: [0.0, 0] for kind in KERNELS}, 0
    for event in recorded.key_averages():
        kind = next(kind for kind, parts in KERNELS.items() if any(part in event.key.lower() for part in parts))
        spent[kind][0] += event.self_device_time_total / 1e6 / steps
        spent[kind][1] += event.count / steps
    busy, count = (sum(column) for column in zip(*spent.values(), strict=True))
    rows = [*spent.items(), ("all", (busy, count))]
    operations, bytes_a_second = ceilings()
    table = "\n".join(
        f"| {kind} | {number:,.0f} | {1e3 * taken:.2f} ms | {taken / seconds:.0%} |" for kind, (taken, number) in rows
    )
    return f"""
Where the last one's {1e3 * seconds:.1f} ms a step go, of which 70,000 take {70_000 * seconds / 60:.1f} minutes:

| kernels | a step | time | of the step |
|---|---|---|---|
{table}

The device, measured: {operations / 1e12:.0f} · 10¹² operations a second in bf16 (a product of two 8192² matrices) and
{bytes_a_second / 1e12:.2f} · 10¹² bytes a second (a copy, read and written). The {flops / 1e9:,.0f} · 10⁹ operations
of a step take {1e3 * flops / operations:.2f} ms at that rate, its {moved / 1e9:.1f} · 10⁹ bytes (each operation's
inputs and outputs once) {1e3 * moved / bytes_a_second:.2f} ms."""


def main():
    from stgan_utils import device
    from stgan_utils.config import PERCEPTUAL, SIZES
    from stgan_utils.profiles import PROFILES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", metavar="DIR", help="a clone of FastGAN's public code (256 or 512 px only)")
    parser.add_argument("--size", type=int, choices=SIZES, default=256, help="side in pixels (default 256)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--ngf", type=int, default=64, help="width of the networks (default 64)")
    cheaper = PROFILES["real-cpu"]["stage1"]["perceptual"]
    parser.add_argument(
        "--perceptual", choices=PERCEPTUAL, default=cheaper, help=f"the cheaper one (default {cheaper})"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each program (default 5)")
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
{args.size} px, batch {args.batch}, width {args.ngf}, on {device.describe(args.ngf)}{threads};
in turn, {args.repeats} times; medians. Perceptual networks with random weights.{against}

{side_by_side(args)}

{growth(args) if args.growth else ""}
"""
    print(body)
    name = "" if _precision(args) == "float32" else f", on a CPU in {_precision(args)}"
    if device.pick().type == "cuda":
        name = f", {args.size} px, batch {args.batch}, on a GPU"
    write_section("GAN training step" + name, body, PACKAGES)


if __name__ == "__main__":
    main()
