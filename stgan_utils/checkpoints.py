"""Reading and writing models: safetensors with a JSON header, and FastGAN's own `.pth` files.

A checkpoint says what it is: architecture, class order, settings, iteration, commit. Nothing is ever loaded with keys
missing or left over, and a pickle is never executed.
"""

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stgan_utils.config import UserError
from stgan_utils.fastgan import Discriminator, Generator
from stgan_utils.files import atomic_path, sha256
from stgan_utils.lesions import CLASSES
from stgan_utils.versions import git_commit

FORMAT = "stgan-1"


def save(path, tensors, header):
    """Write tensors and a JSON header as one safetensors file, whole or not at all."""
    header = {"format": FORMAT, "class_order": list(CLASSES), "git_commit": git_commit(), **header}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"header": json.dumps(header)})


def read_header(path):
    """The JSON header of one of our files.

    Raises:
        UserError: no such file, or it is damaged, not ours or of another format.
    """
    return _open(path)[1]


def load(path):
    """(tensors by name, header) of one of our files; raises as `read_header`."""
    file, header = _open(path)
    with file:
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - not a mapping


def _open(path):
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    try:
        file = safe_open(path, framework="pt")
        header = json.loads((file.metadata() or {})["header"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged or no checkpoint of this package ({error}).") from None
    if (found := header.get("format")) != FORMAT:
        raise UserError(
            f"{path} has the format {found!r}, this version reads {FORMAT!r}: take the version that wrote it."
        )
    return file, header


def prefixed(prefix, tensors):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix, tensors):
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def generator_architecture(generator):
    return {"kind": "fastgan", "size": generator.size, "ngf": generator.ngf, "nz": generator.nz}


def save_generator(path, generator, header):
    """Write a generator alone, with its architecture in the header."""
    header = {"architecture": generator_architecture(generator), **header}
    save(path, prefixed("generator", generator.state_dict()), header)


def load_generator(path, ema=True):
    """A generator in eval mode, from one of our files or one of FastGAN's (`N.pth`, `all_N.pth`).

    Args:
        path: `.safetensors` of ours (a generator, or a training checkpoint), else FastGAN's own format.
        ema: take the averaged weights where the file holds both.

    Returns:
        A `Generator`; called with z (B, nz) it gives (B, 3, S, S), about [-1, 1].

    Raises:
        UserError: no such file, damaged, an unsafe pickle, or keys missing or left over.
    """
    if str(path).endswith(".safetensors"):
        tensors, header = load(path)
        state = without_prefix("ema" if ema else "generator", tensors) or without_prefix("generator", tensors)
        if header.get("architecture", {}).get("kind") != "fastgan" or not state:
            raise UserError(f"{path} holds no FastGAN generator.")
        architecture = header["architecture"]
    else:
        contents = _load_pickle(path)
        state = _with_heads(_clean(contents.get("g"), path), path)
        architecture = _shape_of_generator(state, path)
    generator = Generator(**{name: architecture[name] for name in ("size", "ngf", "nz")})
    _load_exactly(generator, state, path)
    if not str(path).endswith(".safetensors") and ema and "g_ema" in contents:
        _take_ema_list(generator, contents["g_ema"], path)
    return generator.eval()


def convert(source, target):
    """Write FastGAN's own file as one of ours: live generator, averaged one and discriminator, whichever it has.

    Raises:
        UserError: as `load_generator`; or `target` does not end in `.safetensors`, or `source` does.
    """
    if not str(target).endswith(".safetensors"):
        raise UserError(f"{target} would not be recognised again: let its name end in .safetensors.")
    if str(source).endswith(".safetensors"):
        raise UserError(f"{source} is one of our files already: there is nothing to convert.")
    contents, generator = _load_pickle(source), load_generator(source, ema=False)
    tensors = prefixed("generator", generator.state_dict())
    if "g_ema" in contents:
        tensors |= prefixed("ema", load_generator(source).state_dict())
    if "d" in contents:
        tensors |= prefixed("discriminator", load_discriminator(source).state_dict())
    save(target, tensors, {"architecture": generator_architecture(generator), "converted_from": sha256(source)})


def load_discriminator(path):
    """A discriminator in eval mode, from a training checkpoint of ours or one of FastGAN's; see `load_generator`."""
    if str(path).endswith(".safetensors"):
        state = without_prefix("discriminator", load(path)[0])
    else:
        state = _clean(_load_pickle(path).get("d"), path)
    if not state:
        raise UserError(f"{path} holds no discriminator: Stage 2 starts from a training checkpoint.")
    discriminator = Discriminator(**_shape_of_discriminator(state, path))
    _load_exactly(discriminator, state, path)
    return discriminator.eval()


def _load_pickle(path):
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors, or is damaged; it was not opened.") from None
    except Exception as error:  # what the unpickler raises on arbitrary bytes has no common class
        raise UserError(f"{path} is damaged or no PyTorch file ({type(error).__name__}).") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is no FastGAN checkpoint: it has no 'g' and 'd'.")
    return contents


def _clean(state, path):
    """FastGAN's state dict without DataParallel's prefix."""
    tensors = isinstance(state, dict) and state and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    if not tensors:
        raise UserError(f"{path} is no FastGAN checkpoint: it has no 'g' and 'd'.")
    cleaned = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if len(cleaned) < len(state):
        raise UserError(f"{path} has {len(state) - len(cleaned)} tensors twice, with and without 'module.'.")
    return cleaned


def _with_heads(state, path):
    """FastGAN's generator with its two outputs under today's names: older files call them `to_rgb`, `to_rgb_…`.

    Which one it is, the kernel tells: 1×1 is `to_128`, 3×3 `to_big`.
    """
    renamed = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        if module.startswith("to_rgb"):
            weight = state.get(f"{module}.weight_orig", tensor)
            head = {(1, 1): "to_128", (3, 3): "to_big"}.get(tuple(weight.shape[2:]))
            if head is None:
                raise UserError(f"{path} does not fit: its '{module}' is neither a 1×1 nor a 3×3 convolution.")
            name = f"{head}.{last}"
            if name in state or name in renamed:
                raise UserError(f"{path} does not fit: '{module}' and another output of it are both '{head}'.")
        renamed[name] = tensor
    return renamed


def _shape_of_generator(state, path):
    try:
        nz, twice = state["init.init.0.weight_orig"].shape[:2]
        size = max(int(name.split(".")[0].removeprefix("feat_")) for name in state if name.startswith("feat_"))
    except (KeyError, ValueError):
        raise UserError(f"{path} is no FastGAN generator: 'init.init.0.weight_orig' or 'feat_8' is missing.") from None
    return {"size": size, "ngf": twice // 32, "nz": nz}


def _shape_of_discriminator(state, path):
    try:
        stem = state["down_from_big.0.weight_orig"]
        ndf = state["rf_big.3.weight_orig"].shape[1] // 16
        decoder_width = state["decoder_big.main.1.1.weight_orig"].shape[0] // 8
    except KeyError as error:
        raise UserError(f"{path} is no FastGAN discriminator: {error} is missing.") from None
    downs = sum(f"down_{k}.main.0.weight_orig" in state for k in (4, 8, 16, 32, 64))
    size = 512 if stem.shape[-1] == 4 else 2 ** (3 + downs)
    return {"size": size, "ndf": ndf, "decoder_width": decoder_width}


def _load_exactly(module, state, path):
    """Load every key; BatchNorm's counters, which old files lack, are all that may be absent."""
    counters = {name for name in module.state_dict() if name.endswith("num_batches_tracked")}
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {str(error).splitlines()[1].strip()}") from None
    missing = sorted(set(missing) - counters)
    if missing or unexpected:
        raise UserError(
            f"{path} does not fit: {len(missing)} keys missing {missing[:3]}, {len(unexpected)} left over "
            f"{sorted(unexpected)[:3]}."
        )


def _take_ema_list(generator, averaged, path):
    """FastGAN keeps its averaged weights as a bare list, in the order of the generator's parameters."""
    parameters = list(generator.parameters())
    shapes = [getattr(average, "shape", None) for average in averaged] if isinstance(averaged, list) else None
    if shapes != [parameter.shape for parameter in parameters]:
        raise UserError(f"{path}: its 'g_ema' list does not match the generator's {len(parameters)} parameters.")
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
