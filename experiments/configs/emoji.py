"""Noto emoji at 32 x 32 from their names: the embedded default, text-conditioned.

    python -m experiments.train --config=emoji
    python -m experiments.sample --workdir=runs/emoji --prompt "red heart" --num 16 --out grid.png

Cost: about 8 minutes on two CPU cores, compilation included; under a minute on a GPU.
Expect: recognisable emoji of the training set; the prompt decides colour, shape and often the very picture.
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
            "channels": 64,
            "multipliers": (1, 2),
            "num_blocks": 2,
            "attention_levels": (1,),
            "cross_levels": (1,),
            "head_channels": 32,
            "groups": 16,
            "patch_size": 2,
            "dropout": 0.0,
            "time_scale": 1000.0,
        }
    )
    c.text.dim = 96
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 100
    c.optimizer.decay = "cosine"
    c.train.batch_size = 32
    c.train.steps = 2500
    c.train.ema = "warmed(decay=0.998)"
    c.train.log_every = 50
    c.train.sample_every = 1000
    c.train.checkpoint_every = 500
    c.sample.scale = 3.0
    c.sample.num = 16
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
