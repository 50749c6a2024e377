"""Emoji from their names, in the latents of an autoencoder: the second half of latent diffusion.

    python -m experiments.train --config=latent_emoji          after --config=emoji_autoencoder
    python -m experiments.sample --workdir=runs/latent_emoji --prompt "red heart" --num 16

Another autoencoder, of ours or of diffusers:  --config.frozen.autoencoder=DIR
Cost: 3,000 steps; 600 of them took 6 minutes of processor time, compilation included, on two cores (see RESULTS.md).
Expect: after 600 steps hearts, faces and circles in the colours of their prompts; not yet apples, dogs or rockets.
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "emoji"
    c.condition = "caption"
    c.frozen.autoencoder = "runs/emoji_autoencoder"
    c.net = ConfigDict(
        {
            "name": "small",
            "channels": 96,
            "multipliers": (1, 2),
            "num_blocks": 2,
            "attention_levels": (0, 1),
            "cross_levels": (0, 1),
            "head_channels": 32,
            "groups": 16,
            "patch_size": 1,
            "dropout": 0.0,
            "time_scale": 1000.0,
        }
    )
    c.text.dim = 96
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.target = "velocity"
    c.diffusion.times = "logit_normal(mean=0.5, std=1.0)"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 100
    c.optimizer.decay = "cosine"
    c.train.batch_size = 32
    c.train.steps = 3000
    c.train.ema = "warmed(decay=0.998)"
    c.train.log_every = 50
    c.train.sample_every = 500
    c.train.checkpoint_every = 250
    c.sample.clip = False  # latents are not bounded
    c.sample.scale = 3.0
    c.sample.num = 32
    c.sample.prompts = (
        "red heart",
        "grinning face",
        "green apple",
        "dog face",
        "blue circle",
        "full moon",
        "pizza",
        "rocket",
    )
    return c
