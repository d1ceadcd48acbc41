"""Settings of every step, with their defaults and bounds.

A notebook's parameters cell lists the fields of its settings class, each `None`: "what the profile says". `resolve`
puts the profile (`profiles.py`) and the parameters together and checks every value, so that a wrong one is refused
before any work.
"""

from dataclasses import dataclass, fields
from math import isfinite

from stgan_utils.lesions import CLASSES
from stgan_utils.profiles import PROFILES

SIZES = (64, 128, 256, 512)
PERCEPTUAL = ("vgg", "squeeze", "mobilenet", "l1")
AUGMENTATIONS = ("color", "translation")
CHOICES = {  # of the classifier
    "pretrained": ("auto", "none"),
    "sampling": ("natural", "balanced"),
    "augmentation": ("standard", "strong", "trivial"),
    "mix": ("none", "mixup", "cutmix"),
}


class UserError(Exception):
    """Something the user can mend: the message is one sentence that says what is wrong and what to do.

    The command line prints it and exits with status 2; everything else is a bug and keeps its traceback.
    """


def _require(ok, message):
    if not ok:
        raise UserError(message)


def _require_seed(seed):
    # Streams are seeded with multiples of it, which must stay below 2⁶⁴.
    _require(0 <= seed < 2**32, f"seed is {seed}, it must be in 0 … 4,294,967,295.")


@dataclass(frozen=True)
class DataSettings:
    """Step 00: where the images come from and how they are split."""

    seed: int = 0
    # The embedded dataset only: how many images are drawn, and their side in pixels.
    phantom_images: int = 1400
    phantom_size: int = 128
    # "error" stops at bad images or labels, "skip" leaves them out and lists them in a CSV.
    on_bad: str = "error"

    def __post_init__(self):
        _require_seed(self.seed)
        _require(self.phantom_images >= 140, f"phantom_images is {self.phantom_images}, it must be at least 140.")
        _require(self.phantom_size >= 32, f"phantom_size is {self.phantom_size}, it must be at least 32.")
        _require(self.on_bad in ("error", "skip"), f"on_bad is {self.on_bad!r}, it must be 'error' or 'skip'.")


@dataclass(frozen=True)
class Stage1Settings:
    """Step 02: the global FastGAN. Defaults are FastGAN's own (B. Liu et al., ICLR 2021)."""

    seed: int = 0
    size: int = 64
    ngf: int = 32  # width of the generator; 64 in the paper
    nz: int = 256
    iterations: int = 1000
    batch_size: int = 8
    learning_rate: float = 2e-4
    ema_decay: float = 0.999
    # Needs no pretrained weights. To real images "mobilenet", which does, comes far nearer (`benchmarks/quality.py`).
    perceptual: str = "l1"
    augment: str = "color,translation"
    checkpoint_every: int = 250
    sample_every: int = 250
    evaluate_every: int = 500
    quality_images: int = 500  # images generated for each evaluation
    # "train", "auto" (released weights where they fit, else train) or the name of weights in the manifest.
    weights: str = "train"
    # Stop in time (checkpoint written) when a session ends; not part of what makes two runs equal.
    max_minutes: float | None = None

    def __post_init__(self):
        _require(self.size in SIZES, f"size is {self.size}, it must be one of {SIZES}.")
        _require(self.perceptual in PERCEPTUAL, f"perceptual is {self.perceptual!r}, it must be one of {PERCEPTUAL}.")
        _require(self.ngf % 8 == 0 and self.ngf > 0, f"ngf is {self.ngf}, it must be a multiple of 8.")
        _require(self.batch_size >= 2, f"batch_size is {self.batch_size}, it must be at least 2.")
        _require_seed(self.seed)
        _require(0 < self.learning_rate < 1, f"learning_rate is {self.learning_rate}, it must be in (0, 1).")
        for name in filter(None, self.augment.split(",")):
            _require(name in AUGMENTATIONS, f"augment names {name!r}; there are {', '.join(AUGMENTATIONS)}.")
        _require(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}, it must be in [0, 1).")
        counts = ("iterations", "checkpoint_every", "sample_every", "evaluate_every", "quality_images", "nz")
        for name in counts:
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, it must be above 0.")
        _require((self.max_minutes or 0) >= 0, f"max_minutes is {self.max_minutes}, it must not be negative.")

    @property
    def width(self):
        """Channels of the widest images, what `device.precision` goes by on a CPU."""
        return self.ngf


@dataclass(frozen=True)
class Stage2Settings(Stage1Settings):
    """Step 03: one class's GAN, started from Stage 1. Size, width and nz are those of the Stage-1 checkpoint."""

    lesion: str = ""
    # A checkpoint (ours or FastGAN's) to start from instead of this run's own Stage 1.
    start_from: str = ""
    freeze_blocks: int = 2  # discriminator blocks frozen, counted from the image (Freeze-D)
    bt_weight: float = 1.0  # Barlow Twins, after the ramp; 0 switches it off
    bt_ramp: int = 200  # iterations over which the weight rises from 0
    noise_sigma: float = 0.1  # instance noise on the discriminator's input, in units of [-1, 1]
    noise_decay: int = 500  # iterations over which it falls to 0
    # Images to generate; 0: as many as bring the class's train split to the largest class's.
    generate: int = 0
    # Length of each of the three short trainings that show what freezing and Barlow Twins change; 0: none.
    ablation_iterations: int = 0

    def __post_init__(self):
        super().__post_init__()
        _require(self.lesion in ("", *CLASSES), f"lesion is {self.lesion!r}, it must be one of {', '.join(CLASSES)}.")
        _require(self.freeze_blocks >= 0, f"freeze_blocks is {self.freeze_blocks}, it must not be negative.")
        _require(self.noise_sigma >= 0, f"noise_sigma is {self.noise_sigma}, it must not be negative.")
        _require(self.bt_weight >= 0, f"bt_weight is {self.bt_weight}, it must not be negative.")
        for name in ("bt_ramp", "noise_decay", "generate", "ablation_iterations"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, it must not be negative.")
        _require(
            not self.start_from or self.weights == "train",
            f"start_from is for training, but weights is {self.weights!r}: leave one of them out.",
        )


@dataclass(frozen=True)
class DedupSettings:
    """Step 04: Hamming distances (of 64 bits) below which an image counts as a copy of one kept before it."""

    # Any folder of images in place of what Stage 2 made; the step then needs no other.
    images: str = ""
    phash_threshold: int = 10
    whash_threshold: int = 10

    def __post_init__(self):
        for name in ("phash_threshold", "whash_threshold"):
            _require(0 <= getattr(self, name) <= 64, f"{name} is {getattr(self, name)}, it must be in 0 … 64.")


@dataclass(frozen=True)
class ClassifierSettings:
    """Steps 01 and 05: MobileNetV2. Step 01 trains on real images alone, step 05 adds the kept synthetic ones."""

    seed: int = 0
    size: int = 128
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    # Strength of logit adjustment (A. K. Menon et al., ICLR 2021); 0 is plain cross-entropy.
    logit_adjustment: float = 1.0
    # "auto": the best backbone that can be had, "none": random weights.
    pretrained: str = "auto"
    # A classifier of ours to begin with instead: the second phase of a training.
    continue_from: str = ""
    # Feature blocks, counted from the image, that stay as pretrained: the largest share of a step's time.
    frozen_blocks: int = 0
    # "natural": every image once an epoch, "balanced": every class equally often.
    sampling: str = "natural"
    # Images an epoch draws; 0: as many as there are. Arms of different size get the same number of steps by it.
    epoch_images: int = 0
    # "standard": geometry and light, "strong": their ranges half as wide again, "trivial": TrivialAugment before them.
    augmentation: str = "standard"
    mix: str = "none"
    # When it answers: by the image as it is (1) or by two turned views of it (2); the divisor of logits, unless one is
    # fitted to validation images.
    views: int = 1
    temperature: float = 1.0
    # What its answers aim at: this share of accuracy, the rest balanced accuracy (`finetune.class_weights`).
    accuracy_share: float = 0.0
    bootstrap: int = 1000  # resamples behind every interval

    def __post_init__(self):
        _require_seed(self.seed)
        _require(self.size >= 32, f"size is {self.size}, it must be at least 32.")
        for name in ("epochs", "batch_size", "bootstrap"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, it must be above 0.")
        _require(0 < self.learning_rate < 1, f"learning_rate is {self.learning_rate}, it must be in (0, 1).")
        _require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}, it must be in [0, 1).")
        for name in ("frozen_blocks", "epoch_images", "weight_decay", "logit_adjustment"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, it must not be negative.")
        _require(self.temperature > 0, f"temperature is {self.temperature}, it must be above 0.")
        _require(self.views in (1, 2), f"views is {self.views}, it must be 1 or 2.")
        _require(0 <= self.accuracy_share <= 1, f"accuracy_share is {self.accuracy_share}, it must be in 0 … 1.")
        _require(
            not self.accuracy_share or self.logit_adjustment == 1,
            f"accuracy_share is {self.accuracy_share}: it weighs balanced answers, which need logit_adjustment = 1.",
        )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} is {value!r}, it must be one of {', '.join(choices)}.")
        _require(
            self.sampling == "natural" or not self.logit_adjustment,
            f"sampling is 'balanced' and logit_adjustment {self.logit_adjustment:g}: each makes up for the imbalance, "
            "both would do it twice; set logit_adjustment = 0 or sampling = 'natural'.",
        )

    @property
    def width(self):
        """As of the GANs: of MobileNetV2's first layer."""
        return 32


@dataclass(frozen=True)
class Stage5Settings(ClassifierSettings):
    """Step 05: the classifier settings, and which synthetic images join the real ones."""

    # "kept": left by step 04's thresholds, "auto": by the thresholds that spare real lesions, "raw": all of them.
    synthetic: str = "kept"

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.synthetic in ("kept", "auto", "raw"),
            f"synthetic is {self.synthetic!r}: use 'kept', 'auto' or 'raw'.",
        )


@dataclass(frozen=True)
class PostMortemSettings:
    """Step 06: the faults of the prior system, shown on this run's own networks."""

    seed: int = 0
    bootstrap: int = 1000  # resamples behind every interval

    def __post_init__(self):
        _require_seed(self.seed)
        _require(self.bootstrap > 0, f"bootstrap is {self.bootstrap}, it must be above 0.")


@dataclass(frozen=True)
class ReportSettings:
    """Step 07: nothing to set; the report is made from the other steps' results."""


SETTINGS = {
    "data": DataSettings,
    "baseline": ClassifierSettings,
    "stage1": Stage1Settings,
    "stage2": Stage2Settings,
    "dedup": DedupSettings,
    "classifier": Stage5Settings,
    "post_mortem": PostMortemSettings,
    "report": ReportSettings,
}


def resolve(step, profile, given=()):
    """Settings of one step: the defaults, then what the profile says, then every value in `given` that is not None.

    Args:
        step: a key of `SETTINGS`.
        profile: one of `profiles.PROFILES`.
        given: a mapping; names that are no setting of this step are passed over, so that a notebook can hand in its
            `globals()` after the parameters cell.

    Returns:
        A frozen instance of the step's settings class.

    Raises:
        UserError: an unknown profile, or a value of the wrong kind or out of range; the message names it.
    """
    _require(profile in PROFILES, f"No profile {profile!r}; there are {', '.join(PROFILES)}.")
    kind = SETTINGS[step]
    known = {field.name: field for field in fields(kind)}
    values = dict(PROFILES[profile].get(step, {}))
    values |= {name: value for name, value in dict(given).items() if name in known and value is not None}
    return kind(**{name: _cast(name, value, known[name]) for name, value in values.items()})


def _cast(name, value, field):
    """`value` as the field's kind: papermill and the command line hand numbers over as text or as the other kind."""
    if value is None or (field.default is None and value == ""):
        return None
    kind = float if field.default is None else type(field.default)
    try:
        cast = kind(value)
        if kind in (int, float) and (float(value) != cast or not isfinite(cast)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):  # the last: infinity as a whole number
        raise UserError(f"{name} is {value!r}, it must be {'a whole number' if kind is int else 'a number'}.") from None
    return cast
