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
# # Train a text-conditioned diffusion model, and make pictures with it
#
# This notebook runs jaxdiff's main job on whatever this machine has: a TPU, a GPU or a CPU. (In Colab, choose one under
# *Runtime / Change runtime type* first.) It trains on the 1,906 Noto emoji that come with the package, with their names
# as captions, then draws new pictures from prompts.
#
# Everything here can be typed in a shell as well; the commands stand above the cells.

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
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"jaxdiff @ {SOURCE}", *keep], check=True)

# %% tags=["parameters"]
WORKDIR = "runs/emoji"
OVERRIDES = []  # any setting of the config, such as ["--config.train.steps=5000"]
PROMPTS = ["red heart", "green apple", "dog face", "full moon"]
SCALES = [1.0, 2.0, 4.0]
COUNTS = [4, 8, 20]  # solver steps

# %%
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from experiments import model, pictures, sample, train, trained
from jaxdiff import data

for device in jax.devices():
    print(device.platform, device.device_kind)


def show(picture, title=""):
    """Show a picture, its pixels enlarged and sharp."""
    plt.figure(figsize=(7, 7 * picture.height / picture.width))
    plt.imshow(picture, cmap="gray", interpolation="nearest")
    plt.title(title)
    plt.axis("off")
    plt.show()


# %% [markdown]
# ## The data
#
# A data set is a few arrays in memory: pictures as `uint8`, captions as strings.

# %%
emoji = data.emoji()
some = range(0, len(emoji), 120)
show(data.grid(emoji.images[list(some)], columns=8), f"{len(some)} of {len(emoji)} pictures")
print(", ".join(emoji.captions[i] for i in some))

# %% [markdown]
# ## Training
#
#     python -m experiments.train --config=emoji --workdir=runs/emoji
#
# The first step takes longest, since XLA compiles it. The config is `experiments/configs/emoji.py`; its docstring says
# what it costs. A caption goes through a small text encoder that is trained along with the U-Net, and one caption in
# ten is dropped, so that the model also learns to draw *without* one; guidance needs both.
#
# Run the cell again after an interruption: it resumes from the last checkpoint in `WORKDIR` and ends with the same
# parameters, bit for bit, as if nothing had happened.

# %%
train.run(["--config=emoji", f"--workdir={WORKDIR}", *OVERRIDES])

# %% [markdown]
# ## What the run left behind
#
# `metrics.jsonl` has a line per logged step. The loss over all noise levels says little, because most of it is noise
# that nobody could predict. Split by log signal-to-noise ratio it says where the model still learns: to the left almost
# everything is noise, to the right almost nothing is.

# %%
lines = [json.loads(line) for line in (Path(WORKDIR) / "metrics.jsonl").read_text().splitlines()]
low, high, count = (model.BUCKETS[name] for name in ("low", "high", "count"))
middles = low + (high - low) * (np.arange(count) + 0.5) / count

figure, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot([line["step"] for line in lines], [line["loss"] for line in lines])
axes[0].set(xlabel="step", ylabel="loss")
for line in (lines[0], lines[-1]):
    values = [np.nan if value is None else value for value in line["loss_per_logsnr"]]
    axes[1].plot(middles, values, "o-", label=f"step {line['step']}")
axes[1].set(xlabel="log signal-to-noise ratio", ylabel="loss")
axes[1].legend()
plt.show()

grids = sorted((Path(WORKDIR) / "samples").glob("*.png"))
show(Image.open(grids[-1]), grids[-1].name)

# %% [markdown]
# ## Pictures from prompts
#
#     python -m experiments.sample --workdir=runs/emoji --prompt "red heart" "green apple" --num 8 --out grid.png
#
# Each prompt is a row, each column a seed. Samples come from the exponential moving average of the parameters, not from
# the last ones. A PNG carries what made it.

# %%
grid = str(Path(WORKDIR) / "prompts.png")
sample.run([f"--workdir={WORKDIR}", "--prompt", *PROMPTS, "--num=8", f"--out={grid}"])
show(Image.open(grid), " / ".join(PROMPTS))
print(data.read_metadata(grid))

# %% [markdown]
# ## Guidance and the number of steps
#
# Classifier-free guidance asks the model twice, with the prompt $c$ and without, and goes on in the direction of the
# difference:
#
# $$D_w(x_t, t) = D(x_t, t, \varnothing) + w\,\bigl(D(x_t, t, c) - D(x_t, t, \varnothing)\bigr).$$
#
# $w = 1$ is the model as it is; above 1, pictures follow the prompt more closely and differ less. Below, each row is
# one scale, with the same seeds in all rows: the same noise becomes related pictures. Then the same for the number of
# solver steps, at the scale of the config.

# %%
run = trained.load(Path(WORKDIR))
seeds = list(range(8))
cond, null = run.model.captions([PROMPTS[0]] * len(seeds)), run.model.null(len(seeds))


def rows(name, values):
    """One row of samples for each value of one setting."""
    drawn = []
    for value in values:
        settings = run.config.sample.copy_and_resolve_references()
        settings[name] = value
        drawn.append(trained.draw(run, settings, cond, null, seeds, batch=len(seeds)))
    return pictures.sheet(np.concatenate(drawn), [f"{name} {value}" for value in values for _ in seeds])


show(rows("scale", SCALES), f"{PROMPTS[0]}: scale {', '.join(map(str, SCALES))}")
show(rows("steps", COUNTS), f"{PROMPTS[0]}: {', '.join(map(str, COUNTS))} steps")

# %% [markdown]
# ## Next
#
# - **Your own pictures:** put them in a folder, with a `metadata.jsonl` of `{"file_name": ..., "text": ...}` lines if
#   they have captions, and train with `--config=folder --config.data.path=DIR`.
# - **Other configs:** `python -m experiments.train --help` lists them. `--config=swissroll` is the quickest.
# - **bfloat16** on a GPU or TPU: `--config.train.dtype=bfloat16`.
# - **Take the model elsewhere:** `python -m experiments.export --workdir=runs/emoji --out=sampler` writes a sampler
#   that runs with jax alone.
# - **The functions underneath**, without any of this: the notebook `02_pure_functions`.
