"""MNIST digits at 28 x 28, conditioned on the class.

    python -m experiments.train --config=mnist --config.data.path=DIR
    python -m experiments.sample --workdir=runs/mnist --label 7 --num 16 --out sevens.png

DIR holds the *-ubyte files that MNIST, Fashion-MNIST and KMNIST publish, gzipped or not, or tensorflow-datasets' mnist.

Cost: 4,000 steps of 64 pictures; a CPU will do. Its time was not measured here: the progress bar tells.
Expect: digits of the class that is asked for.
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "tfds"
    c.data.tfds = "mnist"
    c.data.size = 28
    c.condition = "label"
    c.net = ConfigDict(
        {
            "name": "small",
            "channels": 32,
            "multipliers": (1, 2),
            "num_blocks": 2,
            "attention_levels": (1,),
            "groups": 16,
            "patch_size": 2,
            "dropout": 0.0,
            "time_scale": 1000.0,
        }
    )
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 100
    c.optimizer.decay = "cosine"
    c.train.batch_size = 64
    c.train.steps = 4000
    c.train.ema = "warmed(decay=0.999)"
    c.train.sample_every = 1000
    c.train.checkpoint_every = 500
    c.sample.scale = 2.0
    c.sample.num = 40
    return c
