"""Tiny Stable Diffusions of random weights, made and run by diffusers: folders of weights, and what diffusers draws.

    python -m tests.oracles.tiny_sd tests/fixtures/tiny_sd        needs the witness extra; writes the committed fixture

Beside the folder's own files stands expected.safetensors: the noise, the embedded texts, and for each solver the times,
the latents after each of 10 guided steps (in the space alpha^2 + sigma^2 = 1) and the picture.
"""

import json
import sys
from pathlib import Path

import numpy as np

PROMPT, NEGATIVE, SCALE, STEPS = "A small red house, by the sea!", "rain", 5.0, 10
SOLVERS = {
    "euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc_2": "UniPCMultistepScheduler",
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "timestep_spacing": "leading",
}  # fmt: skip
LEVELS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
UNET = LEVELS | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2, "sample_size": 8,
}  # fmt: skip
UNET_XL = LEVELS | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "sample_size": 8,
    "projection_class_embeddings_input_dim": 40, "cross_attention_dim": 28,
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 514, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 512,
    "eos_token_id": 513, "pad_token_id": 513,
}  # fmt: skip


def random(net, seed=0):
    """`net` with random biases and norms too, and weights large enough that every part of it is heard."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(1.2)
            p.copy_(p.half().float())  # so that files in half precision hold the same numbers
    return net.eval()


def tokenizer(folder):
    """A CLIP tokenizer that spells: all bytes, no merges."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def pipeline(scratch, xl=False, **unet):
    """A StableDiffusionPipeline, or an XL one, of random weights."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    parts = {"tokenizer": tokenizer(Path(scratch) / "words"), "scheduler": diffusers.PNDMScheduler(**SCHEDULER)}
    parts["vae"] = random(diffusers.AutoencoderKL(**VAE))
    parts["unet"] = random(diffusers.UNet2DConditionModel(**(UNET_XL if xl else UNET) | unet), 1)
    config = transformers.CLIPTextConfig(**TEXT, hidden_size=12, projection_dim=12)
    parts["text_encoder"] = random(transformers.CLIPTextModel(config), 2)
    if not xl:
        safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts, **safety)
    config = transformers.CLIPTextConfig(**TEXT, hidden_size=16, projection_dim=16, hidden_act="gelu")
    parts["text_encoder_2"] = random(transformers.CLIPTextModelWithProjection(config), 3)
    parts["tokenizer_2"] = parts["tokenizer"]
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)


def draw(pipe, **settings):
    """What `pipe` makes with each of SOLVERS, as a dict of arrays, channels last."""
    import diffusers
    import torch

    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    made = {"noise": noise}
    config = dict(pipe.scheduler.config)
    for name, kind in SOLVERS.items():
        pipe.scheduler = getattr(diffusers, kind).from_config(config, clip_sample=False)
        path = []

        def note(pipe, step, time, values, path=path):
            path.append(values["latents"].numpy().copy())
            return values

        with torch.no_grad():
            result = pipe(
                PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="np",
                latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()), callback_on_step_end=note, **settings,
            )  # fmt: skip
        path = np.moveaxis(np.stack(path), 2, -1)
        if name == "euler":  # theirs is in units where alpha is 1
            sigmas = pipe.scheduler.sigmas.numpy()[1:]
            path = path / np.sqrt(1 + sigmas**2).reshape(-1, 1, 1, 1, 1)
        made[f"{name}/indices"] = pipe.scheduler.timesteps.numpy().astype(np.float32)
        made[f"{name}/latents"] = path.astype(np.float32)
        made[f"{name}/picture"] = 2 * result.images.astype(np.float32) - 1
    pipe.scheduler = diffusers.PNDMScheduler.from_config(config)
    return {key: np.ascontiguousarray(array) for key, array in made.items()}


def times(indices, solver):
    """The grid of our solver: theirs ends at 0, but DDIM, told so by set_alpha_to_one, at the first training step."""
    t = (np.asarray(indices, np.float64) + 1) / SCHEDULER["num_train_timesteps"]
    return np.append(t, 1e-3 if solver == "ddim" else 0.0)


def write(folder):
    """The committed fixture: the SD 1 of this file, and what it draws."""
    import tempfile

    import torch
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as scratch:
        pipe = pipeline(scratch)
        pipe.set_progress_bar_config(disable=True)
        pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
        pipe.to(torch.float32)
        save_file(draw(pipe, height=16, width=16), str(Path(folder) / "expected.safetensors"))


if __name__ == "__main__":
    write(sys.argv[1])
