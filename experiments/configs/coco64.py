"""COCO pictures at 64 x 64 from their captions, in pixels.

    python -m experiments.train --config=coco64 --config.data.path=DIR_OF_TFDS
    told by a published CLIP or T5:  --config.frozen.text=DIR --config.text.max_len=32

Cost: 300,000 steps of 256 pictures, 131 M parameters: for a GPU or TPU, with --config.train.dtype=bfloat16. Not
measured here. The 82,783 pictures of the training split are decoded once, when it starts, and take 1 GB.
Expect: not known here; the prompt should decide scene and colours first. Of a picture's captions the first is used.
Data: tensorflow-datasets' coco_captions, prepared once as array_record (no TensorFlow is needed to read it).
"""

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs._base import base


def get_config() -> Config:
    c = base()
    c.data.name = "tfds"
    c.data.tfds = "coco_captions"
    c.data.size = 64
    c.condition = "caption"
    c.net = ConfigDict(
        {
            "name": "adm",
            "channels": 128,
            "multipliers": (1, 2, 3, 4),
            "num_blocks": 2,
            "attention_levels": (2, 3),
            "cross_levels": (1, 2, 3),
            "head_channels": 64,
            "dropout": 0.1,
            "time_scale": 1000.0,
        }
    )
    c.text.vocab_size = 8192
    c.text.max_len = 32
    c.text.dim = 512
    c.text.depth = 6
    c.text.heads = 8
    c.diffusion.schedule = "cosine"
    c.diffusion.target = "v"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup = 5000
    c.train.batch_size = 256
    c.train.steps = 300_000
    c.train.ema = "constant(decay=0.9999)"
    c.sample.scale = 3.0
    c.sample.num = 32
    c.sample.prompts = (
        "A red bus on a city street.",
        "A plate of food with broccoli.",
        "A man riding a wave on a surfboard.",
        "A bathroom with a white toilet.",
    )
    return c
