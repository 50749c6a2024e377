"""An AutoencoderKL trained from scratch by the ordinary job: pictures to latents and back.

    q(z | x) = N(mean, exp(log_variance)),  z ~ q(z | x),  y = decode(z)
    loss     = mean |x - y|  +  kl KL(q(z | x) || N(0, 1)) / (h w c)  +  lpips_weight LPIPS(x, y)

or with the squared error. Rombach et al. 2022, section 3.1 and appendix G, without their discriminator. The perceptual
part is there where its weights are given (config.autoencoder.lpips). At the end `publish` writes WORKDIR/vae, the
averaged autoencoder as diffusers reads it, with

    shift = mean, scale = 1 / standard deviation      of the latents of the training pictures.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import inputs
from experiments.configs import Config
from jaxdiff import data, pretrained
from jaxdiff.data import faults
from jaxdiff.errors import ConfigError
from jaxdiff.metrics import lpips
from jaxdiff.nets import AutoencoderKL
from jaxdiff.process import normal
from jaxdiff.types import Array, Key, PyTree

ERRORS = {"l1": jnp.abs, "l2": jnp.square}
PARTS = ("error", "kl", "lpips")
MEASURED = 2048  # training pictures whose latents are measured


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """What the training job asks of a model, for an autoencoder: it has no condition, and its samples are pairs."""

    net: Any
    shape: tuple[int, ...]
    flip: bool
    error: str
    kl: float
    lpips: PyTree | None
    lpips_weight: float
    condition: str = "none"
    told: bool = False  # no text encoder

    @property
    def sums(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `summary` returns."""
        return dict.fromkeys(PARTS, ())

    @property
    def frozen(self) -> PyTree:
        """The parameters that are used and not trained: none."""
        return {}

    @staticmethod
    def summary(losses: Array, aux: dict[str, Array]) -> dict[str, Array]:
        """The parts of the loss, for the log."""
        del losses
        return {name: aux[name].mean() for name in PARTS}

    def init(self, key: Key) -> PyTree:
        """Parameters, float32; jit it."""
        return {"net": self.net.init(key, jnp.zeros((1, *self.shape)))}

    def null(self, count: int) -> dict[str, Array]:
        """The empty condition, which is the only one."""
        del count
        return {}

    def loss(self, params: PyTree, key: Key, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Per-example losses (b,) of a batch of pictures, and their parts (b,)."""
        key_flip, key_z = jax.random.split(key)
        x = data.decode(batch["image"])
        x = data.augment.flip(key_flip, x) if self.flip else x
        found = self.net.apply(params["net"], x, method="encode")
        variance = jnp.exp(found.log_variance)
        y = self._decode(params, found.mean + jnp.sqrt(variance) * normal(key_z, variance.shape, variance.dtype))
        kl = (jnp.square(found.mean) + variance - 1 - found.log_variance).sum((1, 2, 3)) / (2 * math.prod(self.shape))
        aux = {"error": ERRORS[self.error](x - y).mean((1, 2, 3)), "kl": kl, "lpips": self._lpips(x, y)}
        return aux["error"] + self.kl * kl + self.lpips_weight * aux["lpips"], aux

    def _lpips(self, x: Array, y: Array) -> Array:
        if self.lpips is None:
            return jnp.zeros(len(x))
        x, y = (jnp.broadcast_to(z, (*z.shape[:3], 3)) for z in (x, y))
        return lpips.distance(self.lpips, x, y)  # ten megabytes of constants: all that is passed is trained or sharded

    def _decode(self, params: PyTree, z: Array) -> Array:
        return self.net.apply(params["net"], z, method="decode")

    def pairs(self, params: PyTree, image: Array) -> Array:
        """Each picture and, on its right, what the decoder makes of the mean of its latents: (b, h, 2 w, c)."""
        x = data.decode(image)
        return jnp.concatenate([x, self._decode(params, self.net.apply(params["net"], x, method="encode").mean)], 2)


def build(config: Config, shape: tuple[int, ...], net: AutoencoderKL) -> Autoencoder:
    """The model of a config whose network is `net`. Raises ConfigError, or DataError for the weights of LPIPS."""
    c = config.autoencoder
    if c.error not in ERRORS:
        raise ConfigError(f"autoencoder.error must be one of {', '.join(ERRORS)}, got {c.error!r}.")
    if config.condition != "none" or config.frozen.autoencoder:
        raise ConfigError(
            "an autoencoder is trained on pictures alone. Type --config.condition=none --config.frozen.autoencoder=''."
        )
    if len(shape) != 3 or shape[0] % net.factor or shape[1] % net.factor:
        raise ConfigError(
            f"this autoencoder is for pictures of multiples of {net.factor}, not for examples of {shape}."
        )
    if c.lpips and (min(shape[:2]) < lpips.LEAST or shape[2] not in (1, 3)):
        raise ConfigError(f"LPIPS is for pictures of {lpips.LEAST} x {lpips.LEAST} and more, not for {shape}.")
    weights = lpips.load(Path(c.lpips).expanduser()) if c.lpips else None
    return Autoencoder(net, shape, config.data.flip, c.error, c.kl, weights, c.lpips_weight)


def some(dataset: inputs.Examples, count: int) -> np.ndarray:
    """`count` pictures from all over the data set, again and again where it has fewer; unreadable ones replaced."""
    rows = np.linspace(0, len(dataset) - 1, count).astype(int)
    if not isinstance(dataset, data.Dataset):
        return faults.read(dataset, 0, 0, rows)[1]
    return dataset.images[faults.replace(0, 0, rows, dataset.skipped, len(dataset))]


def measured(net: Any, params: PyTree, pictures: np.ndarray, *, batch: int = 16) -> AutoencoderKL:
    """`net` with the shift and the scale that give the latents of `pictures` (n, h, w, c) mean 0 and variance 1.

    Raises ConfigError where the latents are constant, which no scale can mend.
    """
    encode = jax.jit(lambda params, x: net.apply(params, data.decode(x), method="encode").mean)
    rows = np.arange(-(-len(pictures) // batch) * batch) % len(pictures)
    parts = [np.asarray(encode(params, pictures[part])) for part in rows.reshape(-1, batch)]
    z = np.concatenate(parts)[: len(pictures)].astype(np.float64)
    if not z.std() > 0:
        raise ConfigError(
            f"the latents of {len(pictures)} pictures are all {z.mean():.3g}. Train the autoencoder longer."
        )
    return net.clone(shift=float(z.mean()), scale=float(1 / z.std()))


def publish(model: Autoencoder, params: PyTree, dataset: inputs.Examples, folder: Path) -> None:
    """Write the autoencoder with these parameters to `folder`, as diffusers reads it and `latents.open_coder` does."""
    pictures = some(dataset, min(MEASURED, len(dataset)))
    net = measured(model.net.clone(dtype=None), params["net"], pictures)
    pretrained.vae.export(folder, net, params["net"])
    print(f"wrote {folder}: latents of mean {net.shift:.3f} and standard deviation {1 / net.scale:.3f}")
