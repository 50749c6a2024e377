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
# # Diffusion in your own JAX code
#
# This notebook uses jaxdiff as a set of pure functions: no trainer, no configs, no Flax. By the end you will have
# trained a diffusion model with a network of ten lines, written its reverse step by hand, and added a solver and a
# guidance of your own. The data are points of the plane, so that everything can be drawn, and a CPU is enough.
#
# Four kinds of thing meet, and each is a plain function or a small value:
#
# | | | |
# |---|---|---|
# | **schedule** | $t \mapsto \alpha(t), \sigma(t)$ | signal and noise at time $t$: 0 is data, 1 is noise |
# | **target** | $a\,x_0 + b\,\varepsilon$ | what the network is trained to output |
# | **denoiser** | $D(x_t, t) \approx \mathbb{E}[x_0 \mid x_t]$ | all that sampling and guidance know of a model |
# | **solver** | $(x, t, s) \mapsto x$ at $s < t$ | one step from noise towards data |

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
STEPS = 4000  # of training
BATCH = 256
WIDTH = 128  # of the network
SAMPLES = 2000

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxdiff as jd
from jaxdiff import data


def scatter(axis, points, title, limit=1.3):
    """Draw points of the plane."""
    axis.scatter(*np.asarray(points).T, s=2, alpha=0.4, linewidths=0)
    axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])


points = jnp.asarray(data.swissroll(10_000).images)  # float32 (n, 2), within about [-1, 1]
print(points.shape, "standard deviation", points.std(axis=0))

# %% [markdown]
# ## 1. The schedule and the forward process
#
# A schedule says how data turns into noise:
#
# $$x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon, \qquad \varepsilon \sim \mathcal N(0, 1),
# \qquad \mathrm{logsnr}(t) = \log \frac{\alpha(t)^2}{\sigma(t)^2}.$$
#
# All of them share one time axis, so a model, a solver or a time grid works with any. What really differs between two
# schedules is the log signal-to-noise ratio on the right: it says how long they dwell at each noise level.

# %%
schedules = {
    "cosine": jd.schedule.cosine(),
    "linear (DDPM)": jd.schedule.linear(),
    "rectified flow": jd.schedule.rectified_flow(),
    "sigmoid": jd.schedule.sigmoid(),
}
t = jnp.linspace(0.0, 1.0, 200)
figure, axes = plt.subplots(1, 3, figsize=(12, 3))
for name, each in schedules.items():
    for axis, values in zip(axes, (each.alpha(t), each.sigma(t), each.logsnr(t)), strict=True):
        axis.plot(t, values, label=name)
for axis, title in zip(axes, (r"$\alpha(t)$", r"$\sigma(t)$", r"$\mathrm{logsnr}(t)$"), strict=True):
    axis.set(title=title, xlabel="t")
axes[2].set_ylim(-15, 15)
axes[0].legend()
plt.show()

# %% [markdown]
# `q_sample` draws $x_t$ in one go, for any $t$. Here it is on an emoji and on our points; the numbers are the same
# noise level in both rows. In what follows we use the cosine schedule, whose $\alpha(1)$ is exactly 0: at $t = 1$
# nothing of the data is left.

# %%
schedule = jd.schedule.cosine()
key = jax.random.key(0)
key, key_picture, key_points = jax.random.split(key, 3)  # one use per key; the next split starts from the new `key`
pictures = data.emoji()
which = pictures.captions.index("red apple")
emoji = data.decode(pictures.images[which : which + 1])  # (1, 32, 32, 3) in [-1, 1]
noise_picture = jax.random.normal(key_picture, emoji.shape)
noise_points = jax.random.normal(key_points, points[:SAMPLES].shape)

figure, axes = plt.subplots(2, 5, figsize=(12, 5))
for column, t in zip(axes.T, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
    t = jnp.float32(t)
    noisy = jd.process.q_sample(schedule, emoji, noise_picture, t)
    column[0].imshow(data.encode(noisy[0]))
    column[0].set(title=f"t = {t:.2f}, logsnr {schedule.logsnr(t):.1f}", xticks=[], yticks=[])
    scatter(column[1], jd.process.q_sample(schedule, points[:SAMPLES], noise_points, t), "", limit=3)
plt.show()

# %% [markdown]
# The log-SNR at the two ends is really $\pm\infty$; jaxdiff clamps it to $\pm 80$, so that nothing downstream is ever
# infinite.
#
# ## 2. The loss, with a network of your own
#
# A network is any function `net(x, time) -> output`. This one is a list of matrices. It sees the point and the time
# also as sines and cosines, without which so small a network would blur the arms of the spiral.

# %%
FREQUENCIES = jnp.pi * jnp.asarray([1.0, 2.0, 4.0])


def init(key, width):
    """Parameters: (weights, bias) of each layer; the last starts at zero, so that the first output is 0."""
    sizes = [3 + 6 * len(FREQUENCIES), width, width, width, 2]
    keys = jax.random.split(key, len(sizes) - 1)
    params = [
        (jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    return [*params[:-1], jax.tree.map(jnp.zeros_like, params[-1])]


def apply(params, x, time):
    """x (b, 2), time (b,) -> (b, 2)."""
    h = jnp.concatenate([x, time[:, None]], axis=1)
    angle = (h[:, :, None] * FREQUENCIES).reshape(len(h), -1)
    h = jnp.concatenate([h, jnp.sin(angle), jnp.cos(angle)], axis=1)
    for w, b in params[:-1]:
        h = jax.nn.silu(h @ w + b)
    w, b = params[-1]
    return h @ w + b


# %% [markdown]
# What shall it output? Any `target` $a\,x_0 + b\,\varepsilon$ will do: together with $x_t = \alpha x_0 + \sigma
# \varepsilon$ it makes a 2 x 2 system, which jaxdiff solves for $x_0$ and $\varepsilon$. We take
# $v = \alpha\varepsilon - \sigma x_0$, which is well-behaved at both ends: at $t = 1$ the network predicts $-x_0$, at
# $t = 0$ it predicts $\varepsilon$.
#
# `jd.loss.diffusion` draws $t$ and $\varepsilon$ for each example, makes $x_t$, calls the network and returns one
# squared error per example:
#
# $$L_i = \frac1d\, \bigl\lVert \mathrm{net}(x_t, t) - (\alpha\varepsilon - \sigma x_0) \bigr\rVert^2 .$$
#
# The mean, the gradient, the optimiser and `jit` are yours. Two habits make a run repeatable: the key of a step is
# `fold_in(key, step)`, and a batch is drawn from that key too.

# %%
target = jd.target.v
key, key_init, key_train, key_sample = jax.random.split(key, 4)
optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, STEPS))


def loss(params, key, x0):
    def net(x, time):
        return apply(params, x, time)

    return jd.loss.diffusion(key, net, x0, schedule=schedule, target=target).mean()


@jax.jit
def train(params):
    def step(carry, n):
        params, state = carry
        key_batch, key_loss = jax.random.split(jax.random.fold_in(key_train, n))
        x0 = points[jax.random.randint(key_batch, (BATCH,), 0, len(points))]
        value, gradient = jax.value_and_grad(loss)(params, key_loss, x0)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(STEPS))
    return params, losses


params, losses = train(init(key_init, WIDTH))
window = max(1, STEPS // 40)
smooth = losses[: STEPS // window * window].reshape(-1, window).mean(axis=1)
plt.figure(figsize=(5, 3))
plt.plot(window * (1 + np.arange(len(smooth))), smooth)
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# The loss does not go to 0, and should not: from $x_t$ alone, $x_0$ is uncertain, and the best any network can do is
# its conditional mean. For a finite set of points that mean is known exactly. By Bayes' rule each training point $p_i$
# is as probable as the noise it would take to get from it to $x_t$:
#
# $$\mathbb E[x_0 \mid x_t] = \sum_i w_i\, p_i, \qquad
# w = \mathrm{softmax}_i\!\left(-\frac{\lVert x_t - \alpha\, p_i\rVert^2}{2\sigma^2}\right).$$
#
# So we can draw what the network has learned beside the truth.

# %%
denoise = jd.denoise.from_net(lambda x, time: apply(params, x, time), schedule=schedule, target=target)


def exact(x, t):
    """E[x0 | x_t] when x0 is one of `points`, each as likely: x (b, 2), t a scalar."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    squares = jnp.sum((x[:, None, :] - alpha * points[None, :, :]) ** 2, axis=-1)
    return jax.nn.softmax(-squares / (2 * sigma**2), axis=1) @ points


figure, axes = plt.subplots(2, 4, figsize=(11, 5.5))
for column, t in zip(axes.T, (0.1, 0.3, 0.5, 0.8), strict=True):
    t = jnp.float32(t)
    x_t = jd.process.q_sample(schedule, points[: len(noise_points)][:500], noise_points[:500], t)
    scatter(column[0], jax.jit(denoise)(x_t, t), f"network, t = {t:.1f}")
    scatter(column[1], jax.jit(exact)(x_t, t), f"exact, t = {t:.1f}")
plt.show()

# %% [markdown]
# At little noise the mean lies on the spiral; at much noise it is drawn towards the mean of all the data. `denoise`
# and `exact` are both denoisers in the sense of jaxdiff, functions $D(x_t, t) \to \hat x_0$, and everything below
# takes either.
#
# ## 3. The reverse step
#
# If we knew $x_0$, the way back from $x_t$ to an earlier $x_s$ would be a Gaussian, `q_posterior`. DDPM puts the
# network's estimate in its place:
#
# $$x_s \sim q\bigl(x_s \mid x_t,\; x_0 = D(x_t, t)\bigr).$$
#
# That is the whole algorithm. Written by hand:


# %%
def reverse_step(key, x, t, s):
    mean, variance, _ = jd.process.q_posterior(schedule, denoise(x, t), x, t, s)
    return mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape)


@jax.jit
def by_hand(key, x, times):
    def body(x, step):
        n, t, s = step
        return reverse_step(jax.random.fold_in(key, n), x, t, s), None

    return jax.lax.scan(body, x, (jnp.arange(len(times) - 1), times[:-1], times[1:]))[0]


key_prior, key_steps = jax.random.split(key_sample)
noise = jd.process.prior(key_prior, schedule, (SAMPLES, 2))  # N(0, sigma(1)^2), which here is N(0, 1)
times = jd.sample.uniform_grid(schedule, 200)  # 1 = t_0 > t_1 > ... > t_200 = 0
ancestral = by_hand(key_steps, noise, jnp.asarray(times, jnp.float32))

# %% [markdown]
# The same in one call, with any solver. `sample` is a single `lax.scan`; it works as it is and inside your own `jit`.
# It draws the noise of each example from a key of its own, so an example comes out the same in a batch of 1 and in a
# batch of 1000. A deterministic solver of second order needs a tenth of the steps.


# %%
@jax.jit
def draw(key, noise):
    grid = jd.sample.log_snr_grid(schedule, 20)  # equal steps of log-SNR; computed on the host
    return jd.sample.sample(key, denoise, noise, grid, jd.solver.dpmpp_2m(schedule), return_trajectory=True)


solved, trajectory = draw(key_steps, noise)
figure, axes = plt.subplots(1, 4, figsize=(12, 3.2))
scatter(axes[0], points[:SAMPLES], "data")
scatter(axes[1], ancestral, "by hand, 200 steps")
scatter(axes[2], solved, "DPM-Solver++(2M), 20 steps")
axes[3].plot(*np.moveaxis(np.asarray(trajectory[:, :40]), -1, 0), linewidth=0.7)
axes[3].set(title="40 of its paths", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## 4. A solver of your own
#
# A solver is a pair of functions. `init(x)` makes its memory (multistep methods keep the last estimate there; we need
# none) and `step` goes from time $t$ to $s < t$. If $x_0$ were constant along the way, the step would be exact:
#
# $$x_s = \frac{\sigma_s}{\sigma_t} x_t + \Bigl(\alpha_s - \frac{\sigma_s}{\sigma_t}\alpha_t\Bigr)\, x_0 .$$
#
# With $x_0 = D(x_t, t)$ this is DDIM, of first order. Going half the way, asking the denoiser there, and taking the
# whole step with that answer is of second order: the midpoint rule, known as DPM-Solver++(2S).


# %%
def midpoint(schedule):
    def move(x, x0, t, s):
        ratio = schedule.sigma(s) / schedule.sigma(t)
        return ratio * x + (schedule.alpha(s) - ratio * schedule.alpha(t)) * x0

    def step(key, denoise, x, t, s, memory):
        x0 = denoise(x, t)
        u = schedule.inverse((schedule.logsnr(t) + schedule.logsnr(s)) / 2)  # half-way in log-SNR
        there = denoise(move(x, x0, t, u), u)
        return move(x, jnp.where(schedule.sigma(s) > 0, there, x0), t, s), memory

    return jd.types.Solver(init=lambda x: (), step=step)


# %% [markdown]
# (The last step, to $\sigma_s = 0$, has no middle in log-SNR, so it returns $D(x_t, t)$ as every solver does.)
#
# Is it really of second order? For Gaussian data $x_0 \sim \mathcal N(0, c^2)$ everything is known: the denoiser is
# linear, and the path through $x_t$ reaches $x_s \sqrt{V_s / V_t}$, with $V = \alpha^2 c^2 + \sigma^2$. Halving the
# step should divide the error by 2 for DDIM and by 4 for ours. This is how the tests of jaxdiff judge every solver.


# %%
def variance(t, c=0.5):
    return schedule.alpha(t) ** 2 * c**2 + schedule.sigma(t) ** 2


def gaussian(x, t, c=0.5):
    return schedule.alpha(t) * c**2 / variance(t, c) * x


def error(solver, num_steps):
    times = np.linspace(0.9, 0.1, num_steps + 1)
    x = jnp.ones((1, 1))
    got = jd.sample.sample(jax.random.key(0), gaussian, x, times, solver)
    return float(jnp.abs(got - x * jnp.sqrt(variance(times[-1]) / variance(times[0]))).max())


counts = np.array([4, 8, 16, 32])
plt.figure(figsize=(4, 3))
for name, solver in {"DDIM": jd.solver.ddim(schedule), "midpoint": midpoint(schedule)}.items():
    errors = [error(solver, n) for n in counts]
    plt.loglog(counts, errors, "o-", label=name)
    print(f"{name:9s} slopes", np.round(np.diff(np.log(errors)) / np.diff(np.log(counts)), 2))
plt.xlabel("steps")
plt.ylabel("error")
plt.legend()
plt.show()

# %% [markdown]
# ## 5. A guidance of your own
#
# A guidance is a function from denoiser to denoiser. Suppose we want samples where some $r(x_0) > 0$ is large: that
# is, from the density proportional to $p(x_0)\, r(x_0)$. Its denoiser follows from Tweedie's formula,
#
# $$D_r(x_t, t) = D(x_t, t) + \frac{\sigma^2}{\alpha}\, \nabla_{x_t} \log \mathbb E\bigl[r(x_0) \mid x_t\bigr]
# \;\approx\; D(x_t, t) + \frac{\sigma^2}{\alpha}\, \nabla_{x_t} \log r\bigl(D(x_t, t)\bigr),$$
#
# where the approximation puts $r$ of the mean for the mean of $r$ (Chung et al. 2023 call it diffusion posterior
# sampling). The gradient goes through the network, and JAX takes it:


# %%
def steer(denoise, log_r, schedule):
    def steered(x, t):
        gradient = jax.grad(lambda x: log_r(denoise(x, t)).sum())(x)
        shift = schedule.sigma(t) ** 2 / schedule.alpha(t)
        return denoise(x, t) + jd.schedule.expand(shift, x) * gradient

    return steered


# %% [markdown]
# Because what comes out is a denoiser again, guidances compose. Two things need care where the noise is high: at
# $t = 1$ the factor $\sigma^2 / \alpha$ is infinite, and $D$, a mean over much of the data, says little about $r$. So
# we steer only where $\sigma / \alpha \le 1$, with jaxdiff's own `interval`, and keep the plain denoiser elsewhere. The
# approximation has a limit, too: write 0.02 for 0.1 below, and for a wish that narrow the samples diverge.

# %%
wishes = {
    "right half": lambda x0: jax.nn.log_sigmoid(20 * x0[:, 0]),
    "near the diagonal": lambda x0: -((x0[:, 0] - x0[:, 1]) ** 2) / (2 * 0.1**2),
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
scatter(axes[0], solved, "no guidance")
for axis, (title, log_r) in zip(axes[1:], wishes.items(), strict=True):
    guided = jd.guide.interval(steer(denoise, log_r, schedule), denoise, schedule, sigma=(0.0, 1.0))
    times = jd.sample.log_snr_grid(schedule, 40)
    run = jax.jit(lambda key, x, D=guided, times=times: jd.sample.sample(key, D, x, times, midpoint(schedule)))
    scatter(axis, run(key_steps, noise), title)
plt.show()

# %% [markdown]
# ## Where to go from here
#
# - `jd.guide` has classifier-free guidance (`cfg`, `cfg_batched`), thresholding, rescaling, autoguidance and classifier
#   guidance; `jd.solver.ALL` and `jd.sample.GRIDS` list the solvers and the time grids.
# - `jd.loss` has weightings (`min_snr`, `p2`, `edm`, ...), time samplers; `jd.likelihood` has bits/dim.
# - `from jaxdiff import nets, train, text` gives a U-Net, a DiT, a training step with averages and checkpoints, and a
#   small text encoder. They know no diffusion maths: take the ones you need.
# - The notebook `01_train_and_sample` trains a text-conditioned model on pictures.
