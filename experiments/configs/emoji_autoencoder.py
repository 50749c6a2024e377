"""An autoencoder of emoji, to latents 4 x smaller each way: the first half of latent diffusion.

    python -m experiments.train --config=emoji_autoencoder
    python -m experiments.train --config=latent_emoji          then, in its latents

Larger pictures of your own:  --config.data.size=64 --config.data.path=FILE.npz
Cost: 2,000 steps; 1,000 of them took 7 minutes of processor time on two cores (see RESULTS.md).
Expect: in samples/ each picture and, on its right, what comes back: after 1,000 steps recognisable, a little blurred.
With LPIPS:  --config.autoencoder.lpips=FILE.safetensors     (pictures of 31 x 31 and more; its weights are not ours)
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "emoji"
    c.net = ConfigDict(
        {
            "name": "autoencoder",
            "channels": (32, 64, 96),
            "num_blocks": 1,
            "latent_channels": 4,
            "groups": 8,
            "mid_attention": False,
        }
    )
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 100
    c.optimizer.decay = "cosine"
    c.train.batch_size = 32
    c.train.steps = 2000
    c.train.ema = "warmed(decay=0.995)"
    c.train.log_every = 50
    c.train.sample_every = 500
    c.train.checkpoint_every = 250
    c.sample.num = 32
    return c
