"""The parts that CLIP, T5 and BERT share.

attention   softmax(scale q k' + bias) v          over `heads`, then one projection; the softmax is float32
mlp         down(f(up(x)))  or, gated,  down(f(gate(x)) up(x))
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Norm(nn.Module):
    """LayerNorm (b, ..., c), or with `rms` only its scale by the root mean square; statistics at least float32."""

    eps: float = 1e-5
    rms: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x.astype(wide(x))
        affine = (1,) * (x.ndim - 1) + (-1,)
        if not self.rms:
            h = h - h.mean(axis=-1, keepdims=True)  # before the squares: their difference would lose digits
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + self.eps)
        h = h * self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(h.dtype).reshape(affine)
        if not self.rms:
            h = h + self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(h.dtype).reshape(affine)
        return h.astype(x.dtype)


class Attention(nn.Module):
    """Self-attention of x (b, L, d) in `heads` of `head_dim` (default d / heads) channels."""

    heads: int
    head_dim: int | None = None
    use_bias: bool = True
    scale: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, *, mask: Array | None = None, bias: Array | None = None, causal: bool = False
    ) -> Array:
        """`mask` (b, L) of keys to look at; `bias` (1, heads, L, L) is added to the logits."""
        batch, length, width = x.shape
        inner = self.heads * (self.head_dim or width // self.heads)

        def project(name: str) -> Array:
            h = nn.Dense(inner, use_bias=self.use_bias, dtype=self.dtype, name=name)(x)
            return h.reshape(batch, length, self.heads, -1)

        h = jax.nn.dot_product_attention(
            project("query"),
            project("key"),
            project("value"),
            bias=None if bias is None else bias.astype(self.dtype),
            mask=None if mask is None else mask[:, None, None, :],
            scale=self.scale,
            is_causal=causal,
        )
        return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, name="out")(h.reshape(batch, length, inner))


class MLP(nn.Module):
    """The two layers of a block, with a third as a gate in T5 v1.1."""

    hidden: int
    act: str
    gated: bool = False
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, name=name)

        h = dense(self.hidden, "up")(x)
        h = ACTIVATIONS[self.act](dense(self.hidden, "gate")(x)) * h if self.gated else ACTIVATIONS[self.act](h)
        return dense(x.shape[-1], "down")(h)


def wide(x: Array) -> Any:
    """The dtype for statistics of x: its own, but float32 for anything narrower."""
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32


def check(width: int, heads: int, act: str) -> None:
    """Raise ConfigError where `heads` does not divide `width` or the activation is unknown."""
    if heads < 1 or width % heads:
        raise ConfigError(f"heads must divide width={width}, got {heads}.")
    if act not in ACTIVATIONS:
        raise ConfigError(f"the activation {act!r} is not known; known are {', '.join(ACTIVATIONS)}.")


def check_ids(ids: Array, max_len: int | None) -> None:
    """Raise ConfigError unless ids are (b, L) with 1 <= L <= max_len."""
    if ids.ndim != 2 or ids.shape[1] < 1 or (max_len is not None and ids.shape[1] > max_len):
        limit = "" if max_len is None else f" <= {max_len}"
        raise ConfigError(f"ids must have shape (b, L) with 1 <= L{limit}, got {ids.shape}. Cut or chunk the prompt.")


def check_mask(mask: Array, ids: Array) -> None:
    """Raise ConfigError unless the mask is bool and shaped as the ids."""
    if mask.shape != ids.shape or mask.dtype != bool:
        raise ConfigError(f"mask must be bool {ids.shape} as the ids, got {mask.dtype} {mask.shape}.")


def masked_mean(tokens: Array, mask: Array) -> Array:
    """The mean of tokens (b, L, d) over the positions of mask (b, L)."""
    weights = mask.astype(wide(tokens))
    total = jnp.einsum("bld,bl->bd", tokens.astype(weights.dtype), weights)
    return (total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9)).astype(tokens.dtype)
