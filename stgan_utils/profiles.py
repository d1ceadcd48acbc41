"""The profiles: where the settings of a run of that name differ from the defaults in `config.py`, step by step."""

PROFILES = {
    # CI: the whole sequence in about two minutes on two cores; nothing is learnt.
    "smoke": {
        "data": {"phantom_images": 420, "phantom_size": 64},
        "baseline": {"size": 64, "epochs": 1, "bootstrap": 100},
        "classifier": {"size": 64, "epochs": 1, "bootstrap": 100},
        "stage1": {
            "ngf": 8,
            "iterations": 8,
            "checkpoint_every": 4,
            "sample_every": 4,
            "evaluate_every": 8,
            "quality_images": 32,
        },
        "stage2": {
            "ngf": 8,
            "batch_size": 4,
            "iterations": 4,
            "checkpoint_every": 2,
            "sample_every": 4,
            "evaluate_every": 4,
            "quality_images": 32,
            "generate": 24,
            "ablation_iterations": 1,
        },
    },
    # `make run`: at most ten minutes on two cores, pictures worth looking at.
    "demo": {
        "data": {"phantom_images": 1200, "phantom_size": 64},
        "baseline": {"size": 64, "epochs": 6},
        "classifier": {"size": 64, "epochs": 6},
        "stage1": {
            "ngf": 16,
            "iterations": 240,
            "checkpoint_every": 80,
            "sample_every": 80,
            "evaluate_every": 120,
            "quality_images": 200,
        },
        "stage2": {
            "ngf": 16,
            "iterations": 40,
            "bt_ramp": 10,
            "noise_decay": 20,
            "checkpoint_every": 20,
            "sample_every": 20,
            "evaluate_every": 20,
            "quality_images": 100,
            "generate": 120,
        },
    },
    # Real images on a laptop, an evening; what the released GANs were trained with.
    "real-cpu": {
        "baseline": {"size": 96, "epochs": 6},
        "classifier": {"size": 96, "epochs": 6},
        "stage1": {
            "size": 128,
            "ngf": 16,
            "iterations": 6000,
            "perceptual": "mobilenet",
            "checkpoint_every": 250,
            "sample_every": 250,
            "evaluate_every": 500,
        },
        "stage2": {
            "size": 128,
            "ngf": 16,
            "iterations": 300,
            "learning_rate": 1e-4,
            "bt_ramp": 50,
            "perceptual": "mobilenet",
            "checkpoint_every": 50,
            "sample_every": 50,
            "evaluate_every": 100,
            "generate": 400,
            "ablation_iterations": 100,
        },
    },
    # The prior system's settings (PRIOR figures in docs), sized for Kaggle's T4 × 2 or L4.
    "kaggle": {
        "baseline": {"size": 224, "epochs": 30},
        "classifier": {"size": 224, "epochs": 30},
        "stage1": {
            "size": 256,
            "ngf": 64,
            "batch_size": 16,
            "iterations": 70_000,
            "perceptual": "vgg",
            "checkpoint_every": 1000,
            "sample_every": 5000,
            "evaluate_every": 10_000,
            "quality_images": 2000,
        },
        "stage2": {
            "size": 256,
            "ngf": 64,
            "iterations": 1000,
            "learning_rate": 1e-4,
            "perceptual": "vgg",
            "checkpoint_every": 200,
            "sample_every": 200,
            "evaluate_every": 200,
            "quality_images": 1000,
            "ablation_iterations": 200,
        },
    },
}

# `make quick`: the demo, its GANs from released weights; a few minutes on two cores.
PROFILES["quick"] = PROFILES["demo"] | {
    "data": PROFILES["demo"]["data"] | {"phantom_size": 128},
    "stage1": PROFILES["demo"]["stage1"] | {"weights": "auto", "size": 128},
    "stage2": PROFILES["demo"]["stage2"] | {"weights": "auto", "size": 128, "generate": 60},
}
