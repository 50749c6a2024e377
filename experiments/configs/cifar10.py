"""CIFAR-10 by the recipe of DDPM (Ho, Jain & Abbeel 2020, appendix B, and its code for warm-up and clipping).

    python -m experiments.train --config=cifar10 --config.data.path=DIR_OF_TFDS
    on a GPU, not in the paper:    --config.train.dtype=bfloat16

Cost: 800,000 steps of 128 images, 35.7 M parameters: for a GPU or TPU. The whole run was not measured here.
Expect: a loss that starts at 1, since the target is noise of unit variance. The paper's FID is 3.17.
In 20 network calls a picture:  --config.sample.solver=unipc_2 --config.sample.grid=log_snr --config.sample.steps=20
Data: tensorflow-datasets' cifar10, prepared once as array_record (no TensorFlow is needed to read it).
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "tfds"
    c.data.tfds = "cifar10"
    c.data.flip = True
    c.net = ConfigDict(
        {
            "name": "ddpm_cifar10",
            "channels": 128,
            "multipliers": (1, 2, 2, 2),
            "num_blocks": 2,
            "attention_levels": (1,),  # 16 x 16
            "dropout": 0.1,
        }
    )
    c.diffusion.schedule = "ddpm_table"  # T = 1000, beta from 1e-4 to 0.02
    c.diffusion.target = "eps"
    c.diffusion.times = "discrete(T=1000)"
    c.diffusion.time_input = "index(T=1000)"
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup = 5000
    c.optimizer.clip = 1.0
    c.train.batch_size = 128
    c.train.steps = 800_000
    c.train.ema = "constant(decay=0.9999)"
    c.sample.solver = "ddpm_large"  # the paper's choice for CIFAR-10
    c.sample.grid = "uniform"
    c.sample.steps = 1000
    c.sample.num = 16  # not in the paper: a small grid, since every picture costs 1000 network calls
    return c
