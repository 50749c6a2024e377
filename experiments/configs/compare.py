"""Emoji at 16 x 16 without conditions, with a network small enough to train many times: for experiments.compare.

    python -m experiments.train --config=compare
    python -m experiments.compare --minutes 2 --seeds 5

Cost: by the second command, three models x 5 seeds x 2 minutes, and a few minutes of compiling and sampling.
Expect: a table of distances to the data for a VAE, a GAN and the diffusion model, beside their floors.
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "emoji"
    c.data.size = 16
    c.net = ConfigDict(
        {
            "name": "small",
            "channels": 32,
            "multipliers": (1, 2),
            "num_blocks": 1,
            "attention_levels": (1,),
            "head_channels": 32,
            "groups": 16,
            "patch_size": 2,
            "dropout": 0.0,
            "time_scale": 1000.0,
        }
    )
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.target = "velocity"
    c.diffusion.times = "logit_normal(mean=0.0, std=1.0)"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 100
    c.optimizer.decay = "cosine"
    c.train.batch_size = 32
    c.train.steps = 5000
    c.train.ema = "warmed(decay=0.999)"
    return c
