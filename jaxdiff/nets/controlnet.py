"""ControlNet: a copy of the first half of a U-Net that sees a picture and tells the U-Net by additions.

    h = conv_in(x) + E(picture);    E: convolutions and SiLUs, three of them of stride 2, down to the size of x
    [blocks, down] per level -> middle, as in `SDUNet`;     r_i = s Z_i(skip_i),    r' = s Z'(middle)

The 1 x 1 convolutions Z and the last one of E begin at zero: an untrained ControlNet changes nothing. Sub-modules bear
the published names. Zhang et al. 2023 (sections 3.1 and 3.2).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import compute_dtype
from jaxdiff.nets.layers import ZEROS, Conv
from jaxdiff.nets.ldm import Context
from jaxdiff.nets.sd_unet import Residuals, SDUNet
from jaxdiff.types import Array


class ControlNet(SDUNet):
    """`net.apply(params, x, time, picture, scale, tokens=, vector=, sizes=, labels=)` -> Residuals for an `SDUNet`.

    picture (b, f h, f w, picture_channels) in [-1, 1] for x (b, h, w, c), f = `factor`; scale a number or (b,), with
    which all is multiplied; the rest, and the settings, as of the `SDUNet`. `bgr`: it was trained on blue, green, red.
    Raises ConfigError for settings and inputs that do not fit.
    """

    picture_channels: int = 3
    picture_widths: tuple[int, ...] = (16, 32, 96, 256)
    bgr: bool = False

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Array,
        time: Array,
        picture: Array,
        scale: Any = 1.0,
        *,
        tokens: Array | None = None,
        vector: Array | None = None,
        sizes: Array | None = None,
        labels: Array | None = None,
    ) -> Residuals:
        self._check_inputs(x, time, tokens=tokens, vector=vector, sizes=sizes, labels=labels)
        wanted = (x.shape[0], x.shape[1] * self.factor, x.shape[2] * self.factor, self.picture_channels)
        if picture.shape != wanted:
            raise ConfigError(f"picture must have shape {wanted}, got {picture.shape}.")
        dtype = compute_dtype(x, self.dtype)
        embedding = jax.nn.silu(self._embedding(time, vector, sizes, labels))
        context = None if tokens is None else Context(tokens.astype(dtype), {})
        picture = (picture[..., ::-1] if self.bgr else picture).astype(dtype)
        seen = Hint(self.channels[0], self.picture_widths, name="controlnet_cond_embedding")((picture + 1) / 2)
        h, skips = self._way_down(Conv(self.channels[0], name="conv_in")(x.astype(dtype)) + seen, embedding, context)
        scale = jnp.asarray(scale, h.dtype).reshape(-1, 1, 1, 1)
        told = [scale * self._zero(skip, f"controlnet_down_blocks_{i}") for i, skip in enumerate(skips)]
        return Residuals(tuple(told), scale * self._zero(h, "controlnet_mid_block"))

    @property
    def factor(self) -> int:
        """How many pixels of the picture a latent has across."""
        return 2 ** (len(self.picture_widths) - 1)

    def _zero(self, h: Array, name: str) -> Array:
        return Conv(h.shape[-1], size=1, init=ZEROS, name=name)(h)


class Hint(nn.Module):
    """A picture (b, f h, f w, c) -> (b, h, w, features): f = 2 for each of `widths` beyond the first."""

    features: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = jax.nn.silu(Conv(self.widths[0], name="conv_in")(x))
        for i, (width, wider) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            h = jax.nn.silu(Conv(width, name=f"blocks_{2 * i}")(h))
            h = jax.nn.silu(Conv(wider, stride=2, padding=((1, 1), (1, 1)), name=f"blocks_{2 * i + 1}")(h))
        return Conv(self.features, init=ZEROS, name="conv_out")(h)
