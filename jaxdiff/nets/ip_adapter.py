"""IP-Adapter: a picture beside the prompt, by attention of its own in every block that attends to tokens.

    c = LN(W e) as `num_tokens` tokens;    k' = W_k c,    v' = s W_v c        for each block;  used in `ldm.attend`

e is CLIP's embedding of the picture (`CLIPVision`, projected), all zeros for the side that guidance goes away from.
Sub-modules bear the published names: `ip_adapter_1`, `_3`, ... in the order of `sd_unet.places`. Ye et al. 2023, eq. 5.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import LayerNorm, dense
from jaxdiff.nets.init import XAVIER
from jaxdiff.nets.ldm import LAYER_EPS
from jaxdiff.types import Array


class IPAdapter(nn.Module):
    """`net.apply(params, image, scale)`: CLIP's embedding (b, image_dim) -> {block: (k, v)}, for `SDUNet`'s `images`.

    `places`: the blocks and their widths, tuple(sd_unet.places(unet).items()); scale a number or (b,). Raises
    ConfigError for an embedding of another width.
    """

    places: tuple[tuple[str, int], ...]
    token_dim: int = 768
    image_dim: int = 1024
    num_tokens: int = 4

    @nn.compact
    def __call__(self, image: Array, scale: Any = 1.0) -> dict[str, tuple[Array, Array]]:
        if image.ndim != 2 or image.shape[-1] != self.image_dim:
            raise ConfigError(f"image must have shape (b, {self.image_dim}), got {image.shape}: is its CLIP another?")
        tokens = Projection(self.num_tokens, self.token_dim, name="image_proj")(image)
        scale = jnp.asarray(scale, tokens.dtype).reshape(-1, 1, 1)
        pairs = {}
        for i, (place, width) in enumerate(self.places):
            k, v = KeyValue(width, name=f"ip_adapter_{2 * i + 1}")(tokens)
            pairs[place] = (k, scale * v)
        return pairs


class Projection(nn.Module):
    """An embedding (b, d) -> tokens (b, num, width)."""

    num: int
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = dense(x, self.num * self.width, "proj", XAVIER).reshape(-1, self.num, self.width)
        return LayerNorm(eps=LAYER_EPS, name="norm")(h)


class KeyValue(nn.Module):
    """Keys and values (b, n, width) of tokens (b, n, d)."""

    width: int

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        k = dense(tokens, self.width, "to_k_ip", XAVIER, bias=False)
        return k, dense(tokens, self.width, "to_v_ip", XAVIER, bias=False)
