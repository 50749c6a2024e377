"""Noto emoji at 32 x 32 from their names: the embedded default, text-conditioned.

    python -m experiments.train --config=emoji
    python -m experiments.sample --workdir=runs/emoji --prompt "red heart" --num 16 --out grid.png

Cost: about 8 minutes on two CPU cores, compilation included (measured; see RESULTS.md).
Expect: the prompt decides colour and often shape; details stay coarse, since each picture is seen 27 times.
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "emoji"
    c.condition = "caption"
    c.net = ConfigDict(
        {
            "name": "small",
            "channels": 48,
            "multipliers": (1, 2, 4),
            "num_blocks": 1,
            "attention_levels": (2,),
            "cross_levels": (1, 2),
            "head_channels": 32,
            "groups": 16,
            "patch_size": 2,
            "dropout": 0.0,
            "time_scale": 1000.0,
        }
    )
    c.text.dim = 96
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.target = "velocity"
    c.diffusion.times = "logit_normal(mean=1.0, std=1.0)"  # most at high noise, where the prompt decides the picture
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 100
    c.optimizer.decay = "cosine"
    c.train.batch_size = 32
    c.train.steps = 1600
    c.train.ema = "warmed(decay=0.998)"
    c.train.log_every = 50
    c.train.sample_every = 400
    c.train.checkpoint_every = 200
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
