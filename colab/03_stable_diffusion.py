# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Stable Diffusion in pure JAX
#
# Published weights of Stable Diffusion 1, 2 or XL, on a TPU, a GPU or a CPU, without PyTorch: text to picture, picture
# to picture, and inpainting. Everything is a plain function; the samplers and the guidance are those of every other
# model of jaxdiff. (In Colab, choose a TPU or GPU under *Runtime / Change runtime type* first.)

# %%
import importlib.metadata
import subprocess
import sys

# Only in Colab, install jaxdiff beside the jax that is there already (it fits the machine's TPU or GPU, so keep it).
SOURCE = ""  # where this notebook comes from, such as "git+https://github.com/OWNER/REPOSITORY"
if "google.colab" in sys.modules:
    if not SOURCE:
        raise ValueError("SOURCE is empty: write the address of the jaxdiff repository in the line above.")
    keep = [f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
    command = [sys.executable, "-m", "pip", "install", "-q", f"jaxdiff @ {SOURCE}", "huggingface_hub", *keep]
    subprocess.run(command, check=True)

# %% tags=["parameters"]
FOLDER = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # a folder of this machine, or else a repository of the Hub
VARIANT = "fp16"  # which of its files: "fp16" is half as large; None for the others
PROMPT = "a red house by the sea, oil painting"
NEGATIVE = "blurry"
STEPS = 20
SCALES = [1.0, 4.0, 7.5, 12.0]
STRENGTHS = [0.3, 0.6, 0.9]

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxdiff as jd
from jaxdiff import data, pretrained

for device in jax.devices():
    print(device.platform, device.device_kind)


def show(pictures, titles):
    """Show pictures (n, h, w, 3) in [-1, 1] in a row."""
    _, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.3), squeeze=False)
    for axis, picture, title in zip(axes[0], data.encode(np.asarray(pictures)), titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title)
        axis.axis("off")
    plt.show()


# %% [markdown]
# ## Load
#
# Only safetensors and JSON are read. Every key of the files is matched with a parameter, and a key without a partner is
# an error that names it. On an accelerator the network computes in bfloat16; parameters stay float32.

# %%
folder = FOLDER if Path(FOLDER).is_dir() else pretrained.files.download(FOLDER, variant=VARIANT)
fast = jax.default_backend() != "cpu"
pipe = pretrained.pipelines.load(folder, variant=VARIANT, dtype=jnp.bfloat16 if fast else None)
count = sum(leaf.size for leaf in jax.tree.leaves(pipe.params))
print(
    f"{count / 1e6:,.1f} M parameters, pictures of {pipe.size[0]} x {pipe.size[1]}, {pipe.chain.target.name} prediction"
)

# %% [markdown]
# ## Text to picture
#
# `jit` stands here and nowhere inside. Parameters, seeds, texts, scale and times are arguments, so that the program is
# compiled once, and every call after the first is fast. A picture of seed 3 is the same, whatever stands beside it.

# %%
solver = jd.solver.unipc(pipe.model.schedule)
times = pipe.chain.times(STEPS, "unipc")


@jax.jit
def draw(params, seeds, prompt, negative, scale, times):
    told = [pipe.encode(params, texts) for texts in (prompt, negative)]
    keys = jax.vmap(jax.random.key)(seeds)
    settings = {"times": times, "solver": solver, "scale": scale, "size": pipe.size}
    return jd.pipelines.text_to_image(keys, pipe.model, params, *told, **settings)


one = pipe.tokenize([PROMPT], [NEGATIVE])
seeds = [jnp.array([seed]) for seed in range(4)]
show([draw(pipe.params, seed, *one, 7.5, times)[0] for seed in seeds], [f"seed {i}" for i in range(4)])

# %% [markdown]
# The scale of guidance: 1 is none, more follows the words more closely and varies less.

# %%
show([draw(pipe.params, seeds[0], *one, scale, times)[0] for scale in SCALES], [f"scale {s:g}" for s in SCALES])

# %% [markdown]
# Words in brackets count more, `(word:1.3)`, or less, `[word]`. A prompt may be of any length.

# %%
words = [PROMPT, f"({PROMPT.split(',')[0]}:1.4), night", f"[{PROMPT}]"]
show([draw(pipe.params, seeds[0], *pipe.tokenize([w], [NEGATIVE]), 7.5, times)[0] for w in words], words)

# %% [markdown]
# ## Picture to picture
#
# A picture is made noisy up to a time $t<1$ and drawn anew from there: `last_part` keeps that part of the steps.

# %%
image = draw(pipe.params, seeds[0], *one, 7.5, times)
other = pipe.tokenize(["the same in winter, snow"], [NEGATIVE])
told = [jax.jit(pipe.encode)(pipe.params, texts) for texts in other]


def again(params, image, times):
    settings = {"times": times, "solver": solver, "scale": 7.5}
    return jd.pipelines.image_to_image(jax.random.key(1), pipe.model, params, image, *told, **settings)


changed = [jax.jit(again)(pipe.params, image, jd.pipelines.last_part(times, strength)) for strength in STRENGTHS]
show([image[0], *(x[0] for x in changed)], ["before", *(f"strength {s}" for s in STRENGTHS)])

# %% [markdown]
# ## Inpainting
#
# Where the mask is 1 the picture is drawn anew, and all its other pixels stay. A network trained for it (9 input
# channels) is told the mask; any other is guided by putting the known latents into its estimate $D(x_t, t)$.

# %%
height, width = image.shape[1:3]
mask = jnp.zeros((1, height, width, 1)).at[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4].set(1.0)


@jax.jit
def paint(params, image, mask):
    settings = {"times": times, "solver": solver, "scale": 7.5}
    return jd.pipelines.inpaint(jax.random.key(2), pipe.model, params, image, mask, *told, **settings)


painted = paint(pipe.params, image, mask)
show([image[0], (image * (1 - mask))[0], painted[0]], ["before", "to be drawn anew", "after"])
