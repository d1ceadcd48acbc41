"""The losses: hinge with soft margin, perceptual distance, Barlow Twins. Each is a function of tensors."""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import SqueezeNet1_1_Weights, VGG16_Weights

from stgan_utils import parallel
from stgan_utils.backbone import fold_batch_norm, hub_file, load_backbone
from stgan_utils.config import UserError


def hinge_d_loss(real_logits, fake_logits):
    """What the discriminator minimises on real and on generated images: two scalars.

    max(0, m ∓ D) with the margin m drawn from [0.8, 1) a logit: FastGAN's softened hinge. High logits mean real. In
    float32 whatever the logits are in, as below: the scale of fp16's gradients, 65,536, is more than fp16 can hold.
    """
    real_logits, fake_logits = real_logits.float(), fake_logits.float()

    def margin(logits):
        return 0.8 + 0.2 * parallel.drawn_like(torch.rand_like, logits)

    real = F.relu(margin(real_logits) - real_logits).mean()
    fake = F.relu(margin(fake_logits) + fake_logits).mean()
    return real, fake


def hinge_g_loss(fake_logits):
    """What the generator minimises: -mean D(G(z))."""
    return -fake_logits.float().mean()


class Projector(nn.Sequential):
    """Pooled discriminator features (B, inputs) → embeddings (B, outputs) that Barlow Twins compares."""

    def __init__(self, inputs, outputs=128):
        super().__init__(
            nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Linear(outputs, outputs)
        )


def barlow_twins(z_a, z_b):
    """Redundancy reduction between two views (J. Zbontar et al., ICML 2021, arXiv:2103.03230, eq. 1).

    The paper sums over the cross-correlation matrix C; here each part is a mean over its own entries, so that neither
    depends on the dimension: both are 0 at best and about 1 for unrelated views (on) or collapsed dimensions (off).
    With a batch of B images the off-diagonal part of perfectly decorrelated dimensions is still about 1 / (B - 1).

    Args:
        z_a, z_b: (B, D) embeddings of two augmentations of the same images, B ≥ 2.

    Returns:
        (on_diag, off_diag): mean (1 - C_ii)², mean C_ij² over i ≠ j.
    """
    batch, dimensions = z_a.shape

    def standardise(z):
        z = z.float()  # correlations in half precision lose what they measure
        return (z - z.mean(0)) / (z.std(0, unbiased=False) + 1e-5)

    c = standardise(z_a).T @ standardise(z_b) / batch
    diagonal = c.diagonal()
    on_diag = (1 - diagonal).square().mean()
    off_diag = (c.square().sum() - diagonal.square().sum()) / (dimensions * (dimensions - 1))
    return on_diag, off_diag


class FeatureDistance(nn.Module):
    """The form of LPIPS (R. Zhang et al., CVPR 2018, arXiv:1801.03924): squared differences of a network's features.

    Features have unit length at every pixel; at each depth a weighted sum over channels, and the mean over pixels and
    images. A subclass gives `network`, `_layers(images)`, the features that it has of images, and `weights`, for each
    depth those of its channels.
    """

    def forward(self, images, targets):
        with torch.no_grad():
            wanted = self._unit(targets)
        total = 0
        for got, want, weight in zip(self._unit(images), wanted, self.weights, strict=True):
            difference = got.unflatten(0, (-1, len(want))) - want
            total = total + (difference.square().mean((0, 1, 3, 4)) * weight).sum()
        return total

    def _unit(self, images):
        # Without gradients of weights, this layout is the fastest everywhere.
        layers = self._layers(images.contiguous(memory_format=torch.channels_last))
        return [F.normalize(layer.float(), dim=1) for layer in layers]


class MobileNetDistance(FeatureDistance):
    """MobileNetV2's features at four depths, every channel alike; costs about a fiftieth of VGG-16."""

    LAYERS = (1, 3, 6, 13)
    weights = [1 / len(LAYERS)] * len(LAYERS)

    def __init__(self):
        super().__init__()
        backbone = load_backbone(required=True)
        self.network = fold_batch_norm(backbone.features[: self.LAYERS[-1] + 1].eval()).requires_grad_(False)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(backbone.preprocessing[name])[:, None, None])

    def _layers(self, images):
        x = ((images + 1) / 2 - self.mean) / self.std
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index in self.LAYERS:
                yield x


class Lpips(FeatureDistance):
    """LPIPS itself, network and channel weights from the `lpips` package."""

    def __init__(self, net):
        super().__init__()
        import lpips

        url = {"vgg": VGG16_Weights, "squeeze": SqueezeNet1_1_Weights}[net].IMAGENET1K_V1.url
        hub_file(url)  # it looks in more places than lpips does
        try:
            self.distance = lpips.LPIPS(net=net, verbose=False)
        except (OSError, RuntimeError) as error:  # no network; a download with another hash
            file = url.rsplit("/", 1)[1]
            raise UserError(
                f"The perceptual distance '{net}' needs torchvision's {file}, which could not be downloaded: put it "
                f"into {torch.hub.get_dir()}/checkpoints/, or set perceptual to 'l1', which needs no file."
            ) from error
        self.requires_grad_(False)

    @property
    def network(self):
        return self.distance.net

    @property
    def weights(self):
        return [lin.model[-1].weight.flatten() for lin in self.distance.lins]

    def _layers(self, images):
        return self.network(self.distance.scaling_layer(images))


class L1(nn.Module):
    """Mean absolute difference of the pixels."""

    def forward(self, images, targets):
        return (images.unflatten(0, (-1, len(targets))) - targets.detach()).abs().mean()


def perceptual_distance(name, dtype=torch.float32):
    """A module (images (k B, 3, S, S), targets (B, 3, S, S)) → scalar, their mean distance; pictures in [-1, 1].

    The images are k pictures of each target, one batch after the other. Targets carry no gradient.

    Args:
        name: "vgg" or "squeeze" (LPIPS), "mobilenet", or "l1", which alone needs no weights.
        dtype: of the autocast around it, if there is one: weights that have it already are not converted at every call.

    Raises:
        UserError: the weights cannot be had; it says which file to put where, and what needs none.
    """
    distance = {"l1": L1, "mobilenet": MobileNetDistance}.get(name, lambda: Lpips(name))()
    if isinstance(distance, FeatureDistance):
        distance.network.to(dtype)
    return distance
