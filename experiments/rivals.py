"""A small VAE and a small GAN, to stand beside a diffusion model of the same size: each a loss and a sampler.

    VAE   (h w c / 2) log(mean squared error) + KL(q(z | x) || N(0, 1))    Kingma & Welling 2014, with the decoder's
          variance at its optimum (Rybkin et al. 2021, eq. 4)
    GAN   discriminator  s(-D(x)) + s(D(G(z))) + gamma / 2 |grad D(x)|^2,  generator  s(-D(G(z))),   s = softplus
          the non-saturating loss (Goodfellow et al. 2014) with the penalty R1 (Mescheder et al. 2018)

Both players of the GAN move at once, each by the gradient of its own term, so that one loss and one step train them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff import data
from jaxdiff.errors import ConfigError
from jaxdiff.nets import init, layers
from jaxdiff.nets.conditioning import dense
from jaxdiff.types import Array, Key, PyTree

LATENTS = 64
R1 = 1.0  # gamma


@dataclasses.dataclass(frozen=True)
class Rival:
    """A generative model: `init(key)`, `loss(params, key, batch) -> ((b,), aux)`, `sample(params, keys) -> (b, ...)`.

    `adam` are the options of its optimizer.
    """

    init: Callable[[Key], PyTree]
    loss: Callable[[PyTree, Key, Any], tuple[Array, dict[str, Array]]]
    sample: Callable[[PyTree, Key], Array]
    adam: dict[str, float]


def _conv(x: Array, features: int, name: str, **options: Any) -> Array:
    return nn.leaky_relu(layers.Conv(features, name=name, **options)(x), 0.2)


class Encoder(nn.Module):
    """Pictures (b, h, w, c) -> (b, outputs), by 3 x 3 convolutions and two halvings."""

    width: int
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = _conv(x, self.width, "stem")
        for i in (1, 2):
            h = _conv(h, i * self.width, f"conv_{i}")
            h = _conv(h, 2 * i * self.width, f"down_{i}", stride=2)
        return dense(h.reshape(len(h), -1), self.outputs, "out", init.XAVIER)


class Decoder(nn.Module):
    """Latents (b, d) -> pictures (b, *shape), by two doublings and 3 x 3 convolutions; the mirror of `Encoder`."""

    width: int
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, z: Array) -> Array:
        height, width, channels = self.shape[0] // 4, self.shape[1] // 4, 4 * self.width
        h = dense(z, height * width * channels, "stem", init.XAVIER).reshape(-1, height, width, channels)
        for i in (2, 1):
            h = _conv(h, 2 * i * self.width, f"conv_{i}")
            h = _conv(h, i * self.width, f"up_{i}", upsample=True)
        return nn.tanh(layers.Conv(self.shape[-1], name="out")(h))


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless examples of `shape` are pictures whose sides are multiples of 4."""
    if len(shape) != 3 or shape[0] % 4 or shape[1] % 4:
        raise ConfigError(f"the rivals are for pictures whose sides are multiples of 4, got examples of {shape}.")


def _latents(keys: Key) -> Array:
    return jax.vmap(lambda key: jax.random.normal(key, (LATENTS,)))(keys)


def vae(width: int, shape: tuple[int, ...]) -> Rival:
    """A variational autoencoder; a sample is the decoder's mean. Raises ConfigError as `check_shape`."""
    check_shape(shape)
    encoder: Any = Encoder(width, 2 * LATENTS)
    decoder: Any = Decoder(width, shape)

    def start(key: Key) -> PyTree:
        key_encoder, key_decoder = jax.random.split(key)
        encoder_params = encoder.init(key_encoder, jnp.zeros((1, *shape)))
        return {"encoder": encoder_params, "decoder": decoder.init(key_decoder, jnp.zeros((1, LATENTS)))}

    def loss(params: PyTree, key: Key, batch: Any) -> tuple[Array, dict[str, Array]]:
        x = data.decode(batch["image"])
        mean, log_std = jnp.split(encoder.apply(params["encoder"], x), 2, axis=-1)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        squared = jnp.square(decoder.apply(params["decoder"], z) - x)
        kl = (jnp.square(mean) + jnp.exp(2 * log_std) - 1 - 2 * log_std).sum(-1) / 2
        return x[0].size / 2 * jnp.log(squared.mean() + 1e-6) + kl, {}

    return Rival(
        start, loss, lambda params, keys: decoder.apply(params["decoder"], _latents(keys)), {"learning_rate": 1e-3}
    )


def gan(width: int, shape: tuple[int, ...]) -> Rival:
    """A generative adversarial network. Raises ConfigError as `check_shape`."""
    check_shape(shape)
    generator: Any = Decoder(width, shape)
    critic: Any = Encoder(width, 1)

    def start(key: Key) -> PyTree:
        key_generator, key_critic = jax.random.split(key)
        critic_params = critic.init(key_critic, jnp.zeros((1, *shape)))
        return {"critic": critic_params, "generator": generator.init(key_generator, jnp.zeros((1, LATENTS)))}

    def loss(params: PyTree, key: Key, batch: Any) -> tuple[Array, dict[str, Array]]:
        x = data.decode(batch["image"])
        fake = generator.apply(params["generator"], jax.random.normal(key, (len(x), LATENTS)))
        fixed = jax.lax.stop_gradient(params["critic"])

        def score(critic_params: PyTree, images: Array) -> Array:
            return critic.apply(critic_params, images)[:, 0]

        slope = jax.grad(lambda images: score(params["critic"], images).sum())(x)
        penalty = R1 / 2 * jnp.square(slope).reshape(len(x), -1).sum(-1)
        wrong = nn.softplus(-score(params["critic"], x)) + nn.softplus(
            score(params["critic"], jax.lax.stop_gradient(fake))
        )
        return wrong + penalty + nn.softplus(-score(fixed, fake)), {}

    def sample(params: PyTree, keys: Key) -> Array:
        return generator.apply(params["generator"], _latents(keys))

    return Rival(start, loss, sample, {"learning_rate": 5e-4, "b1": 0.0, "b2": 0.99})
