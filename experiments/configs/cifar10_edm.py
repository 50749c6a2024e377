"""CIFAR-10 by the recipe of EDM (Karras et al. 2022, tables 1 and 7), without its augmentation; unconditional.

    python -m experiments.train --config=cifar10_edm --config.data.path=DIR_OF_TFDS --config.train.dtype=bfloat16

Cost: 200 M images in batches of 512, 55.7 M parameters; about two days on eight V100s, by EDM's repository.
The whole run was not measured here.
Expect: a loss that starts near 1, since the target has unit variance. The paper's FID of 1.97 is with augmentation.
Left out: EDM's augmentation pipe and its 9 labels; left-right flips stand in for it.
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
            "name": "edm_ddpmpp",
            "channels": 128,
            "multipliers": (2, 2, 2),
            "num_blocks": 4,
            "attention_levels": (1,),  # 16 x 16
            "dropout": 0.13,
        }
    )
    c.diffusion.schedule = "edm"
    c.diffusion.target = "edm(sigma_data=0.5)"
    c.diffusion.weighting = "simple"  # on the target F this is EDM's lambda(sigma) on x0: lambda c_out^2 = 1
    c.diffusion.times = "log_normal(mean=-1.2, std=1.2)"
    c.diffusion.time_input = "c_noise"
    c.diffusion.scale_input = "edm(sigma_data=0.5)"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 19_531  # 10 M images
    c.optimizer.eps = 1e-8 / (32 * 32 * 3)  # EDM sums the squared error over an image where we average: gradients scale
    c.optimizer.clip = 0.0  # EDM gates non-finite gradients only
    c.train.batch_size = 512
    c.train.steps = 390_625  # 200 M images
    c.train.ema = "half_life(examples=500_000, ramp=0.05)"
    c.sample.solver = "heun"
    c.sample.grid = "karras"
    c.sample.steps = 18
    c.sample.clip = False
    return c
