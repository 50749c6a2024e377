"""Tiny Stable Diffusion 3s, FLUX.1s and a DiT of random weights, made and run by diffusers.

    python -m tests.oracles.tiny_flow tests/fixtures        needs the witness extra; writes tiny_sd3 and tiny_flux there

Beside a folder's own files stands expected.safetensors: the noise, the times, the latents after each of 10 steps, not
packed and channels last, and the picture. Every weight is a number of half precision.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.oracles import tiny_sd

SIDE, CHANNELS, LABEL = 8, 4, 7
SCALE, GUIDANCE = 5.0, 3.5
KINDS = ("sd3", "sd3 without t5", "sd3.5", "flux dev", "flux schnell")
JOINT = {
    "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 28,
}  # fmt: skip
SD3 = JOINT | {
    "sample_size": SIDE, "in_channels": CHANNELS, "out_channels": CHANNELS, "caption_projection_dim": 16,
    "pos_embed_max_size": 6,
}  # fmt: skip
FLUX = JOINT | {
    "num_layers": 1, "num_single_layers": 2, "in_channels": 4 * CHANNELS, "pooled_projection_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
DIT = {
    "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "sample_size": SIDE, "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS, "num_embeds_ada_norm": 1000,
}  # fmt: skip
VAE = tiny_sd.VAE | {
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False
}  # fmt: skip


def t5(seed):
    """A T5 encoder, and a tokenizer that spells."""
    import transformers

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzA,!."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    words = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": len(vocabulary)}
    config = transformers.T5Config(feed_forward_proj="gated-gelu", **shape)
    return tiny_sd.random(transformers.T5EncoderModel(config), seed), words


def clip(seed, width, projected):
    """A CLIP text encoder."""
    import transformers

    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    act = "quick_gelu" if width == 12 else "gelu"
    config = transformers.CLIPTextConfig(**tiny_sd.TEXT, hidden_size=width, projection_dim=width, hidden_act=act)
    return tiny_sd.random(kind(config), seed)


def pipeline(scratch, kind):
    """A pipeline of diffusers of random weights: one of KINDS, or "dit"."""
    import diffusers
    import torch

    torch.manual_seed(0)
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    parts = {"vae": tiny_sd.random(diffusers.AutoencoderKL(**(tiny_sd.VAE if kind == "dit" else VAE)))}
    if kind == "dit":
        parts["transformer"] = tiny_sd.random(diffusers.DiTTransformer2DModel(**DIT), 1)
        parts["scheduler"] = diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", beta_end=0.012)
        return diffusers.DiTPipeline(**parts)
    parts["tokenizer"] = tiny_sd.tokenizer(Path(scratch) / "words")
    if kind.startswith("flux"):
        guided = kind == "flux dev"
        parts["transformer"] = tiny_sd.random(diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=guided), 1)
        parts["scheduler"] = flow(use_dynamic_shifting=True, shift=3.0) if guided else flow(shift=1.0)
        parts["text_encoder"] = clip(2, 12, False)
        parts["text_encoder_2"], parts["tokenizer_2"] = t5(3)
        return diffusers.FluxPipeline(**parts)
    more = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if kind == "sd3.5" else {}
    parts["transformer"] = tiny_sd.random(diffusers.SD3Transformer2DModel(**SD3, **more), 1)
    parts["scheduler"] = flow(shift=3.0)
    parts |= {"text_encoder": clip(2, 12, True), "text_encoder_2": clip(4, 16, True), "tokenizer_2": parts["tokenizer"]}
    parts["text_encoder_3"], parts["tokenizer_3"] = (None, None) if "without" in kind else t5(3)
    return diffusers.StableDiffusion3Pipeline(**parts)


def pack(x):
    """(1, c, h, w) -> FLUX's (1, h w / 4, 4 c)."""
    _, c, h, w = x.shape
    return x.reshape(1, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, h * w // 4, 4 * c)


def unpack(x):
    """Its inverse, for a square."""
    side = int(x.shape[1] ** 0.5)
    x = x.reshape(1, side, side, -1, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(1, x.shape[1], 2 * side, 2 * side)


def draw(pipe, kind):
    """What `pipe` makes in 10 steps, as a dict of arrays, channels last."""
    import torch

    flux = kind.startswith("flux")
    noise = np.random.default_rng(0).normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    path = []

    def note(pipe, step, time, values):
        path.append(values["latents"].numpy().copy())
        return values

    settings = {"height": 16, "width": 16, "num_inference_steps": tiny_sd.STEPS, "output_type": "np"}
    settings["latents"] = torch.from_numpy(pack(noise) if flux else noise)
    if flux:
        settings |= {"guidance_scale": GUIDANCE, "max_sequence_length": 512 if kind == "flux dev" else 256}
    else:
        settings |= {"guidance_scale": SCALE, "negative_prompt": tiny_sd.NEGATIVE}
    with torch.no_grad():
        picture = pipe(tiny_sd.PROMPT, callback_on_step_end=note, **settings).images
    latents = np.stack([np.moveaxis(unpack(x) if flux else x, 1, -1) for x in path])
    times = pipe.scheduler.sigmas.numpy()
    made = {"noise": np.moveaxis(noise, 1, -1), "times": times, "latents": latents, "picture": 2 * picture - 1}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in made.items()}


def draw_class(pipe):
    """The same of the DiT, whose pipeline makes its noise itself and shows no latents."""
    import torch

    path, step = [], pipe.scheduler.step

    def note(*arguments, **settings):
        result = step(*arguments, **settings)
        path.append(result.prev_sample[:1].numpy().copy())
        return result

    pipe.scheduler.step = note
    settings = {"guidance_scale": SCALE, "num_inference_steps": tiny_sd.STEPS, "output_type": "np"}
    with torch.no_grad():
        picture = pipe([LABEL], generator=torch.Generator().manual_seed(0), **settings).images
    del pipe.scheduler.step
    noise = torch.randn((1, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).numpy()
    made = {"noise": np.moveaxis(noise, 1, -1), "latents": np.moveaxis(np.stack(path), 2, -1)}
    made |= {"indices": pipe.scheduler.timesteps.numpy(), "picture": 2 * picture - 1}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in made.items()}


def write(folder):
    """The committed fixtures: a Stable Diffusion 3.5 and a FLUX.1 dev, and what they draw."""
    import torch
    from safetensors.numpy import save_file

    for name, kind in (("tiny_sd3", "sd3.5"), ("tiny_flux", "flux dev")):
        with tempfile.TemporaryDirectory() as scratch:
            pipe = pipeline(scratch, kind)
            pipe.set_progress_bar_config(disable=True)
            pipe.to(torch.float16).save_pretrained(Path(folder) / name, variant="fp16")
            pipe.to(torch.float32)
            save_file(draw(pipe, kind), str(Path(folder) / name / "expected.safetensors"))


if __name__ == "__main__":
    write(sys.argv[1])
