"""Which images an iteration takes: every one once an epoch, in an order that seed and epoch alone decide."""

import torch

from stgan_utils import parallel


class Order:
    """The order of a training's images.

    Args:
        count: how many images there are.
        batch_size: of all processes together.
        seed: of the order.
        device: where the numbers of the rows are to lie.
    """

    def __init__(self, count, batch_size, seed, device):
        self.count, self.batch_size, self.seed, self.device = count, batch_size, seed, device
        self.epoch = None

    def rows(self, iteration):
        """Rows (b,), int64, of the iteration's images: this process's share of the batch."""
        wanted, parts = parallel.own(range(iteration * self.batch_size, (iteration + 1) * self.batch_size)), []
        while wanted:
            epoch, first = divmod(wanted[0], self.count)
            parts.append(self._of_epoch(epoch)[first : first + len(wanted)])
            wanted = wanted[len(parts[-1]) :]
        return torch.cat(parts)

    def _of_epoch(self, epoch):
        if self.epoch != epoch:
            stream = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=stream).to(self.device)
        return self.order
