"""A training shared by several processes, one a GPU: what each does alone, and where they meet.

Several processes do what one would do with the whole batch, so that neither results nor checkpoints depend on their
number. Each takes its share of the images (`own`). Random numbers are drawn for the whole batch from one stream, the
same everywhere, and of them too each keeps its share (`drawn`). Statistics of the batch are those of the whole batch:
BatchNorm's (`synchronise`) and Barlow Twins' (`gathered`). The losses are means over images, so the mean of the
processes' gradients (`average`) is the gradient of the whole batch; after it all take the same step, and their networks
stay equal.

PyTorch's `DistributedDataParallel` is not used: it wants one forward pass before each backward pass, a GAN's
discriminator has several, on real and on generated images. In one process all of this does nothing.
"""

import os
from datetime import timedelta

import torch
from torch import distributed, nn

from stgan_utils import device as devices
from stgan_utils.config import UserError

# The others wait while the main process evaluates and writes; by default they give up after ten minutes.
PATIENCE = timedelta(hours=2)


def launched():
    """Whether `accelerate launch` (or `torchrun`) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def join():
    """Meet the other processes, if there are any: NCCL between GPUs, gloo between CPUs."""
    if launched():
        from accelerate import PartialState  # only who needs it pays for the import

        PartialState(cpu=devices.pick().type == "cpu", timeout=PATIENCE)


def size():
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank():
    """This process's number, 0 … `size()` - 1."""
    return distributed.get_rank() if size() > 1 else 0


def is_main():
    """Whether this process is the one that writes files and evaluates."""
    return rank() == 0


def check_batch(batch_size, processes):
    """Raises:
    UserError: the processes cannot share the batch equally.
    """
    if batch_size % processes:
        raise UserError(
            f"A batch of {batch_size} cannot be shared equally by {processes} processes (one a GPU): make batch_size a "
            f"multiple of {processes}, or let CUDA_VISIBLE_DEVICES name fewer GPUs."
        )


# --- a process's share -------------------------------------------------------------------------------------------


def own(rows):
    """This process's share of what stands for the whole batch: a tensor (B, …) or a range."""
    share = len(rows) // size()
    return rows[rank() * share : (rank() + 1) * share]


def drawn(random, shape, dim=0, **kind):
    """`random(shape, **kind)`, as this process's share of the numbers that one process would draw for the whole batch.

    Args:
        random: such as `torch.randn`; takes a shape.
        shape: of the share; `shape[dim]` counts its images.
    """
    shape = list(shape)
    shape[dim] *= size()
    return random(shape, **kind).chunk(size(), dim)[rank()]


def drawn_like(random, tensor):
    """As `drawn`, of the share's type, shape (B, …) and layout: `random` is such as `torch.randn_like`."""
    return random(tensor) if size() == 1 else own(random(torch.cat([tensor] * size())))


# --- where the processes meet ------------------------------------------------------------------------------------


def average(tensors):
    """Put their mean over the processes into tensors, all of them in one message."""
    if size() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def from_main(value):
    """The main process's value, in all of them, as soon as the main process has come here too."""
    values = [value]
    if size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


class _Gather(torch.autograd.Function):
    """PyTorch's own differentiable `all_gather` is deprecated; its successor is private."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(size())]
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # Every process's loss depends on every row.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return own(gradient)


def gathered(rows):
    """The whole batch's rows (B, …) from each process's share; a gradient goes back to the process of its row."""
    return rows if size() == 1 else _Gather.apply(rows.contiguous())


class BatchNormOfAll(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of the whole batch, on CPUs, where `nn.SyncBatchNorm` does not run."""

    def _check_input_dim(self, features):
        pass

    def forward(self, features):
        """(B, C) or (B, C, H, W), a process's share → the same shape."""
        if not self.training:
            return super().forward(features)
        others = [dim for dim in range(features.dim()) if dim != 1]
        share = torch.stack(torch.var_mean(features.float(), others, correction=0))
        variances, means = gathered(share[None]).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)  # shares are equally large
        count = features.numel() // features.shape[1] * size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = [1, -1, *[1] * (features.dim() - 2)]
        return (features * scale.view(shape) + shift.view(shape)).to(features.dtype)


def synchronise(*modules):
    """Have BatchNorm in the modules take its statistics from the whole batch, not from a process's share.

    A GAN is sensitive to them: from 4 images of the 8 they would be noisier, and no longer what one GPU computes. On
    GPUs it is PyTorch's `SyncBatchNorm`, which has fused kernels and float32 statistics of half-precision features; it
    refuses CPUs, where `BatchNormOfAll` computes the same. Parameters, buffers and their names stay.
    """
    if size() == 1:
        return
    for module in modules:
        if devices.pick().type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
            continue
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.__class__ = BatchNormOfAll
