"""COCO pictures at 256 x 256 from their captions, in the latents and told by the text encoder of a published model.

    python -m experiments.train --config=coco_latent --config.data.path=DIR_OF_TFDS
    with    --config.frozen.autoencoder=SD --config.frozen.text=SD

SD is a folder as diffusers writes it, with vae/, text_encoder/ and tokenizer/. Trained is v with zero terminal SNR (Lin
et al. 2024): the last step is pure noise, and sampling begins there.
Cost: 300,000 steps of 256 latents of 32 x 32 x 4, about 180 M parameters: for a GPU or TPU, with
--config.train.dtype=bfloat16. Not measured here. The 82,783 pictures are encoded once: until then they take 16 GB of
the host, then their latents 1.4 GB and the captions' embeddings 8 GB.
Expect: not known here. Of a picture's captions the first is used.
Data: tensorflow-datasets' coco_captions, prepared once as array_record (no TensorFlow is needed to read it).
"""

from ml_collections import ConfigDict

from experiments.configs import Config, coco64


def get_config() -> Config:
    c = coco64.get_config()
    c.data.size = 256
    c.frozen.autoencoder = "stable-diffusion-v1-5"
    c.frozen.text = "stable-diffusion-v1-5"
    c.net = ConfigDict(
        {
            "name": "adm",
            "channels": 192,
            "multipliers": (1, 2, 4),
            "num_blocks": 2,
            "attention_levels": (1, 2),
            "cross_levels": (0, 1, 2),
            "head_channels": 64,
            "dropout": 0.0,
        }
    )
    c.diffusion.schedule = "zero_terminal_snr"
    c.diffusion.times = "discrete(T=1000)"
    c.diffusion.time_input = "index(T=1000)"
    c.sample.grid = "respaced(spacing='trailing')"
    c.sample.clip = False  # latents are not bounded
    return c
