"""What a network is told besides the picture: the time, a class, a vector, a text. One vector and one token sequence.

    sinusoid(t)_k = sin(w_k t), cos(w_k t),      w_k = 10000^(-k / K),  k = 0 .. n/2 - 1
    embedding     = silu(W2 silu(W1 sinusoid(s t)) + class + V vector)             (late, as ADM)
    embedding     = silu(W2 silu(W1 (sinusoid(s t) + class + V vector)))           (early, as EDM)
    context       = [null token, LayerNorm(tokens)],  a masked token is never attended to

A dropped class, vector or text adds nothing: the null class is the zero vector, and the text of no tokens is the
learned null token alone, so that attention over an empty text is finite and guidance has its unconditional input.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxdiff.errors import ConfigError
from jaxdiff.nets.init import XAVIER, normal
from jaxdiff.types import Array

MAX_PERIOD = 10_000.0


def sinusoid(time: Array, features: int, *, endpoint: bool = True) -> Array:
    """Embed `time` (b,) as (b, features) sines then cosines. Vaswani et al. 2017; `endpoint` as in DDPM's code.

    With `endpoint` the slowest frequency is exactly 1 / 10000 (DDPM, EDM), else one step above it (ADM, DiT).
    Raises ConfigError where `features` is odd or below 4.
    """
    if features % 2 or features < 4:
        raise ConfigError(f"the width of a time embedding must be even and >= 4, got {features}. Use {features + 1}.")
    half = features // 2
    wide = at_least_float32(time.dtype)
    exponent = jnp.arange(half, dtype=wide) / (half - 1 if endpoint else half)
    angle = time.astype(wide)[:, None] * jnp.exp(-math.log(MAX_PERIOD) * exponent)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def at_least_float32(dtype: Any) -> Any:
    """float32 for the half precisions, else the same. (`promote_types` refuses under strict dtype promotion.)"""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def dense(x: Array, features: int, name: str, init: Initializer, *, bias: bool = True) -> Array:
    """A linear layer named `name` in the module that calls this, computed in x.dtype. Parameters are float32."""
    # As a product of two matrices: with more axes, the gradient of the kernel takes up to three times as long on a CPU.
    y = nn.Dense(features, use_bias=bias, dtype=x.dtype, kernel_init=init, name=name)(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], features)


class Embedding(nn.Module):
    """The conditioning vector (b, features), float32, already through its last SiLU.

    `frequencies` is the width of the sinusoid; time is multiplied by `time_scale` first (1000 for times in [0, 1],
    1 for DDPM's index or EDM's c_noise). Labels outside [0, num_classes) are the null class and add nothing.
    """

    features: int
    frequencies: int
    time_scale: float = 1.0
    endpoint: bool = True
    num_classes: int | None = None
    vector_dim: int | None = None
    early: bool = False
    kernel_init: Initializer = XAVIER
    class_init: Initializer = normal(1.0)

    @nn.compact
    def __call__(self, time: Array, labels: Array | None = None, vector: Array | None = None) -> Array:
        h = sinusoid(time * self.time_scale, self.frequencies, endpoint=self.endpoint)
        width = self.frequencies if self.early else self.features
        extra = self._class(labels, width, h) + self._vector(vector, width, h)
        h = dense(h + extra if self.early else h, self.features, "hidden", self.kernel_init)
        h = dense(nn.silu(h), self.features, "out", self.kernel_init)
        return nn.silu(h if self.early else h + extra)

    def _class(self, labels: Array | None, width: int, like: Array) -> Array:
        if self.num_classes is None:
            return jnp.zeros((like.shape[0], width), like.dtype)
        table = self.param("classes", self.class_init, (self.num_classes, width), jnp.float32)
        labels = jnp.full((like.shape[0],), -1) if labels is None else labels
        known = (labels >= 0) & (labels < self.num_classes)
        rows = jnp.take(table, jnp.where(known, labels, 0), axis=0).astype(like.dtype)
        return jnp.where(known[:, None], rows, jnp.zeros_like(rows))

    def _vector(self, vector: Array | None, width: int, like: Array) -> Array:
        if self.vector_dim is None:
            return jnp.zeros((like.shape[0], width), like.dtype)
        vector = jnp.zeros((like.shape[0], self.vector_dim)) if vector is None else vector
        return dense(vector.astype(like.dtype), width, "vector", self.kernel_init, bias=False)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics at least float32, returns x.dtype. Ba et al. 2016."""

    affine: bool = True
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        if self.affine:
            shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            y = y * scale.astype(y.dtype).reshape(shape) + bias.astype(y.dtype).reshape(shape)
        return y.astype(x.dtype)


class Context(nn.Module):
    """Tokens (b, L, d) and their mask (b, L) made ready for cross-attention: (b, L + 1, d), (b, L + 1).

    Tokens are normalised, and one learned null token that is never masked goes before them. No tokens at all is the
    same as every token masked: the null token alone.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, batch: int, tokens: Array | None, mask: Array | None) -> tuple[Array, Array]:
        norm = LayerNorm(name="norm")
        null = self.param("null", normal(0.02), (1, 1, self.features), jnp.float32)
        null = jnp.broadcast_to(null.astype(self.dtype), (batch, 1, self.features))
        if tokens is None:
            tokens, mask = jnp.zeros((batch, 1, self.features)), jnp.zeros((batch, 1), bool)
        elif mask is None:
            mask = jnp.ones(tokens.shape[:2], bool)
        tokens = jnp.concatenate([null, norm(tokens.astype(self.dtype))], axis=1)
        return tokens, jnp.concatenate([jnp.ones((batch, 1), bool), jnp.asarray(mask, bool)], axis=1)


def check_inputs(net: Any, x: Array, ndim: int, time: Array, inputs: dict[str, Array | None]) -> None:
    """Raise ConfigError where the arguments of a network call do not fit it, before anything is compiled.

    `net` has `num_classes`, `vector_dim`, `token_dim`; `inputs` holds labels, vector, tokens, token_mask.
    """
    if x.ndim != ndim or not jnp.issubdtype(x.dtype, jnp.floating) or 0 in x.shape:
        raise ConfigError(f"x must be a non-empty floating array of {ndim} axes, batch first, got {x.dtype}{x.shape}.")
    batch = x.shape[0]
    if time.shape != (batch,):
        raise ConfigError(
            f"time must have shape ({batch},), one per example, got {time.shape}. Use jnp.full(({batch},), t)."
        )
    _check_labels(net, batch, inputs["labels"])
    _check_width("vector", net.vector_dim, "vector_dim", (batch,), inputs["vector"])
    tokens, mask = inputs["tokens"], inputs["token_mask"]
    if tokens is None:
        if mask is not None:
            raise ConfigError("token_mask was given without tokens. Pass tokens=... too, or leave both out.")
        return
    _check_width("tokens", net.token_dim, "token_dim", (batch, tokens.shape[1] if tokens.ndim > 1 else 0), tokens)
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise ConfigError(f"token_mask must have the shape {tokens.shape[:2]} of the tokens, got {mask.shape}.")


def _check_labels(net: Any, batch: int, labels: Array | None) -> None:
    if labels is None:
        return
    if net.num_classes is None:
        raise ConfigError(
            "labels were given to a network without classes. Build it with num_classes=..., or drop them."
        )
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ConfigError(
            f"labels must be integers of shape ({batch},), -1 for no class, got {labels.dtype}{labels.shape}."
        )


def _check_width(name: str, width: int | None, attribute: str, lead: tuple[int, ...], value: Array | None) -> None:
    if value is None:
        return
    if width is None:
        raise ConfigError(
            f"{name} were given to a network built without them. Build it with {attribute}={value.shape[-1]}."
        )
    if value.shape != (*lead, width):
        raise ConfigError(
            f"{name} must have shape {(*lead, width)}, got {value.shape}. The network has {attribute}={width}."
        )


def check_positive(**values: Any) -> None:
    """Raise ConfigError for each named value that is neither None nor an integer >= 1."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer >= 1, got {value!r}.")


def check_common(dropout: float, dtype: Any) -> None:
    """Raise ConfigError unless dropout is a number in [0, 1) and dtype is None or a floating dtype."""
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout!r}. Use 0.0 for none.")
    try:
        floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ConfigError(f"dtype must be a floating dtype or None, got {dtype!r}. Use jnp.bfloat16 or jnp.float32.")


# What a block keeps of its forward pass for the backward one, beside its inputs: all, nothing, or the results of the
# products with matrices, which are dear to compute again.
REMAT = {"none": None, "full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def remat(module: Any, policy: str, static: tuple[int, ...] = (4,)) -> Any:
    """`module`, recomputed in the backward pass as REMAT says; `static` arguments (self is 0) are no arrays."""
    if policy == "none":
        return module
    return nn.remat(module, static_argnums=static, policy=REMAT[policy])


def check_remat(policy: str) -> None:
    """Raise ConfigError unless the policy is one of REMAT."""
    if policy not in REMAT:
        raise ConfigError(f"remat must be one of {', '.join(REMAT)}, got {policy!r}. Use 'full' for the least memory.")


def compute_dtype(x: Array, dtype: Any) -> Any:
    """The dtype a network computes in: the one asked for, or that of x, at least float32."""
    return at_least_float32(x.dtype) if dtype is None else jnp.dtype(dtype)
