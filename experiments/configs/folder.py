"""Your own pictures: a folder, with captions where it holds a metadata.jsonl ({"file_name": ..., "text": ...} a line).

    python -m experiments.train --config=folder --config.data.path=DIR --config.data.size=64
    with captions:    --config.condition=caption --config.sample.scale=3.0

Cost: by the size and number of pictures, not measured here. Pictures are cropped to a square. They are held in memory
where they take at most data.memory_gb, else read from disk by Grain (jaxdiff[grain]); the batches are the same.
Expect: it depends on the pictures; a few dozen are learned by heart. Look at the grids in samples/ as it trains.
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "folder"
    c.data.flip = True
    c.net = ConfigDict(
        {
            "name": "small",
            "channels": 64,
            "multipliers": (1, 2, 2),
            "num_blocks": 2,
            "attention_levels": (1, 2),
            "cross_levels": (),  # with captions: (1, 2)
            "head_channels": 32,
            "groups": 16,
            "patch_size": 2,
            "dropout": 0.1,
            "time_scale": 1000.0,
        }
    )
    c.optimizer.learning_rate = 3e-4
    c.train.batch_size = 64
    c.train.steps = 50_000
    c.train.ema = "warmed(decay=0.9995)"
    c.train.sample_every = 2000
    c.train.checkpoint_every = 1000
    return c
