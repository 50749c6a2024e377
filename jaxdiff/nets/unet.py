"""One U-Net, and the published networks it configures to.

    x -> conv -> [blocks, down] per level -> block, attention, block -> [blocks with skips, up] per level -> conv -> y

`ddpm_cifar10` Ho, Jain & Abbeel 2020 (appendix B); `adm` Dhariwal & Nichol 2021; `edm_ddpmpp` Karras et al. 2022
(the DDPM++ of Song et al. 2021); `small` for training on a laptop. It knows no diffusion maths: time is embedded as
given, and the output has the shape of the input.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxdiff.errors import ConfigError
from jaxdiff.nets import init, layers
from jaxdiff.nets.conditioning import (
    Context,
    Embedding,
    check_common,
    check_inputs,
    check_positive,
    check_remat,
    compute_dtype,
    remat,
)
from jaxdiff.types import Array

# PyTorch's default for convolutions and linear layers, U(-1, 1) / sqrt(fan_in), which ADM leaves unchanged.
TORCH = init.uniform(1 / 3, "fan_in")
# EDM draws one c x 3c Xavier matrix for queries, keys and values and multiplies it by sqrt(0.2).
EDM_QKV = init.uniform(0.1, "fan_in")


class UNet(nn.Module):
    """`net.apply(params, x, time, labels=, vector=, tokens=, token_mask=)`: x (b, h, w, c) -> (b, h, w, out_channels).

    Level i has channels * multipliers[i] channels at 1 / (patch_size 2^i) of the size; any size is padded to fit and
    cropped. labels (b,) need num_classes (-1: no class), vector (b, d) needs vector_dim, tokens (b, L, d) with their
    mask (b, L) need token_dim and are attended to at cross_levels and in the middle. `dtype` is the dtype of
    computation (parameters, statistics and output stay float32); `remat` "full" or "dots" spares memory in training.
    `deterministic=False` needs the rng "dropout".
    Raises ConfigError for settings or inputs that do not fit.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    cross_levels: tuple[int, ...] = ()
    up_attention: Literal["all", "last"] = "all"
    heads: int = 1
    head_channels: int | None = None
    dropout: float = 0.0
    groups: int = 32
    eps: float = 1e-6
    scale_shift: bool = False
    resample: Literal["conv", "block"] = "conv"
    skip_scale: float = 1.0
    skip_conv: bool = False
    patch_size: int = 1
    out_channels: int | None = None
    time_scale: float = 1.0
    time_endpoint: bool = True
    num_classes: int | None = None
    vector_dim: int | None = None
    token_dim: int | None = None
    early_condition: bool = False
    kernel_init: Initializer = init.XAVIER
    qkv_init: Initializer = init.XAVIER_SQUARE
    remat: str = "none"
    dtype: Any = None

    def __post_init__(self):
        super().__post_init__()
        _check_settings(self)

    @property
    def multiple(self) -> int:
        """Height and width are padded to a multiple of this."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        *,
        labels: Array | None = None,
        vector: Array | None = None,
        tokens: Array | None = None,
        token_mask: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        inputs = {"labels": labels, "vector": vector, "tokens": tokens, "token_mask": token_mask}
        check_inputs(self, x, 4, time, inputs)
        dtype = compute_dtype(x, self.dtype)
        embedding = self._embedding()(time, labels, vector)
        context = None
        if self.token_dim is not None:
            context = Context(self.token_dim, dtype, name="context")(x.shape[0], tokens, token_mask)
        h = layers.space_to_depth(layers.pad_to_multiple(x, self.multiple), self.patch_size)
        h = self._body(h.astype(dtype), embedding, context, deterministic)
        out = self.out_channels or x.shape[-1]
        h = layers.Conv(out * self.patch_size**2, init=layers.ZEROS, name="out")(
            layers.GroupNorm(self.groups, self.eps, silu=True, name="out_norm")(h).astype(compute_dtype(x, None))
        )
        return layers.depth_to_space(h, self.patch_size)[:, : x.shape[1], : x.shape[2]].astype(x.dtype)

    def _embedding(self) -> Embedding:
        class_init = init.normal(1.0)
        if self.early_condition and self.num_classes is not None:  # EDM: Xavier, on one-hot vectors times sqrt(classes)
            class_init = init.uniform(self.num_classes, "fan_avg")
        return Embedding(
            features=4 * self.channels,
            frequencies=self.channels,
            time_scale=self.time_scale,
            endpoint=self.time_endpoint,
            num_classes=self.num_classes,
            vector_dim=self.vector_dim,
            early=self.early_condition,
            kernel_init=self.kernel_init,
            class_init=class_init,
            name="time",
        )

    def _body(self, h: Array, embedding: Array, context: Any, deterministic: bool) -> Array:
        def call(h: Array, block: Callable[..., Array]) -> Array:
            return block(h, embedding, context, deterministic)

        h = layers.Conv(self.channels, init=self.kernel_init, name="stem")(h)
        h, skips = self._down(call, h)
        h = call(h, self._block("mid_0", -1, attention=True, cross=self.token_dim is not None))
        h = call(h, self._block("mid_1", -1))
        return self._up(call, h, skips)

    def _down(self, call: Callable[..., Array], h: Array) -> tuple[Array, list[Array]]:
        skips = [h]
        for level in range(len(self.multipliers)):
            if level > 0:
                h = self._resample(call, h, f"down_{level}", level - 1, "down")
                skips.append(h)
            for i in range(self.num_blocks):
                h = call(h, self._level_block(f"down_{level}_{i}", level, attention=True))
                skips.append(h)
        return h, skips

    def _up(self, call: Callable[..., Array], h: Array, skips: list[Array]) -> Array:
        top = len(self.multipliers) - 1
        for level in range(top, -1, -1):
            if level < top:
                h = self._resample(call, h, f"up_{level}", level + 1, "up")
            for i in range(self.num_blocks + 1):
                attention = self.up_attention == "all" or i == self.num_blocks
                block = self._level_block(f"up_{level}_{i}", level, attention=attention)
                h = call(jnp.concatenate([h, skips.pop()], axis=-1), block)
        return h

    def _resample(
        self, call: Callable[..., Array], h: Array, name: str, level: int, to: Literal["up", "down"]
    ) -> Array:
        if self.resample == "block":
            return call(h, self._block(name, level, resample=to))
        up = to == "up"
        return layers.Conv(h.shape[-1], stride=1 if up else 2, upsample=up, init=self.kernel_init, name=name)(h)

    def _level_block(self, name: str, level: int, *, attention: bool) -> Callable[..., Array]:
        attention, cross = attention and level in self.attention_levels, attention and level in self.cross_levels
        return self._block(name, level, attention=attention, cross=cross)

    def _block(self, name: str, level: int, **settings: Any) -> Callable[..., Array]:
        shared = ("groups", "eps", "dropout", "scale_shift", "skip_scale", "skip_conv", "heads", "head_channels")
        settings |= {field: getattr(self, field) for field in (*shared, "kernel_init", "qkv_init")}
        return remat(layers.Block, self.remat)(self.channels * self.multipliers[level], name=name, **settings)


def _check_settings(net: UNet) -> None:
    check_positive(
        channels=net.channels, num_blocks=net.num_blocks, heads=net.heads, head_channels=net.head_channels,
        groups=net.groups, patch_size=net.patch_size, out_channels=net.out_channels, num_classes=net.num_classes,
        vector_dim=net.vector_dim, token_dim=net.token_dim,
    )  # fmt: skip
    check_common(net.dropout, net.dtype)
    check_remat(net.remat)
    _check_levels(net)
    for width in sorted({net.channels} | {net.channels * m for m in net.multipliers}):
        if width % net.groups:
            raise ConfigError(
                f"groups must divide the {width} channels of every level, got {net.groups}. Use a divisor of {width}."
            )
    _check_heads(net)
    for name, allowed in (("up_attention", ("all", "last")), ("resample", ("conv", "block"))):
        if getattr(net, name) not in allowed:
            raise ConfigError(f"{name} must be one of {allowed}, got {getattr(net, name)!r}.")


def _check_levels(net: UNet) -> None:
    for name in ("multipliers", "attention_levels", "cross_levels"):
        value = getattr(net, name)
        if not isinstance(value, tuple):
            raise ConfigError(f"{name} must be a tuple of integers, got {value!r}. Use a tuple such as (1, 2).")
    if not net.multipliers:
        raise ConfigError("multipliers must name at least one level, got (). Use (1, 2, 2, 2).")
    check_positive(**{f"multipliers[{i}]": m for i, m in enumerate(net.multipliers)})
    for name in ("attention_levels", "cross_levels"):
        for level in getattr(net, name):
            if level not in range(len(net.multipliers)):
                raise ConfigError(f"{name} must be levels 0 to {len(net.multipliers) - 1}, got {level!r}.")
    if net.cross_levels and net.token_dim is None:
        raise ConfigError(f"cross_levels={net.cross_levels} needs token_dim=..., the width of the tokens, got None.")


def _check_heads(net: UNet) -> None:
    levels = {*net.attention_levels, *net.cross_levels, len(net.multipliers) - 1}
    name, divisor = ("heads", net.heads) if net.head_channels is None else ("head_channels", net.head_channels)
    for level in sorted(levels):
        width = net.channels * net.multipliers[level]
        if width % divisor:
            raise ConfigError(f"{name} must divide the {width} channels of level {level}, got {divisor}.")


def ddpm_cifar10(**settings: Any) -> UNet:
    """The CIFAR-10 network of DDPM, 35,746,307 parameters. Ho, Jain & Abbeel 2020, appendix B. time: index 0 .. 999."""
    defaults: dict[str, Any] = {"dropout": 0.1}
    return UNet(**defaults | settings)


def adm(**settings: Any) -> UNet:
    """The network of ADM: scale-shift norm, resampling in blocks, heads of 64 channels; ImageNet 64 x 64 by default.

    Dhariwal & Nichol 2021, table 4 and section 3. time: index 0 .. 999. The defaults have 3 blocks of 192 channels
    times (1, 2, 3, 4) with attention at 32, 16 and 8. Give num_classes=1000 and out_channels=6 for the published one.
    """
    defaults: dict[str, Any] = {
        "channels": 192, "multipliers": (1, 2, 3, 4), "num_blocks": 3, "attention_levels": (1, 2, 3),
        "head_channels": 64, "dropout": 0.1, "eps": 1e-5, "scale_shift": True, "resample": "block",
        "time_endpoint": False, "kernel_init": TORCH, "qkv_init": TORCH,
    }  # fmt: skip
    return UNet(**defaults | settings)


def edm_ddpmpp(**settings: Any) -> UNet:
    """EDM's DDPM++ for CIFAR-10, about 55.7 M parameters. Karras et al. 2022, table 7. time: c_noise = log(sigma) / 4.

    Give vector_dim=9 for the augmentation labels, num_classes=10 for the conditional network.
    """
    defaults: dict[str, Any] = {
        "channels": 128, "multipliers": (2, 2, 2), "num_blocks": 4, "attention_levels": (1,), "up_attention": "last",
        "dropout": 0.13, "resample": "block", "skip_scale": math.sqrt(0.5), "skip_conv": True,
        "early_condition": True, "qkv_init": EDM_QKV,
    }  # fmt: skip
    return UNet(**defaults | settings)


def small(**settings: Any) -> UNet:
    """A network of about 3 M parameters that trains on a laptop: 2 x 2 patches, two levels, heads of 32 channels.

    time in [0, 1]. Give token_dim and vector_dim for text, num_classes for labels, patch_size=1 for finer detail.
    """
    defaults: dict[str, Any] = {
        "channels": 64, "multipliers": (1, 2), "num_blocks": 1, "attention_levels": (1,), "head_channels": 32,
        "groups": 16, "scale_shift": True, "patch_size": 2, "time_scale": 1000.0,
    }  # fmt: skip
    if settings.get("token_dim") is not None:
        defaults["cross_levels"] = (1,)
    return UNet(**defaults | settings)
