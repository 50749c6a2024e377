"""The Swiss roll: points of the plane, a small MLP. The quickest way to see everything work.

    python -m experiments.train --config=swissroll

Cost: 4,000 steps of 512 points on a network of three layers, the least of all configs. Not timed here.
Expect: the dots of the last picture in runs/swissroll/samples lie on the spiral.
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "swissroll"
    c.net = ConfigDict({"name": "mlp", "width": 128, "depth": 3})
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 100
    c.optimizer.decay = "cosine"
    c.train.batch_size = 512
    c.train.steps = 4000
    c.train.steps_per_call = 100
    c.train.ema = "warmed(decay=0.999)"
    c.train.sample_every = 1000
    c.train.checkpoint_every = 1000
    c.sample.num = 2000
    c.sample.clip = False
    return c
