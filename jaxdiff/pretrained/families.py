"""The pipelines of diffusers that are read: which parts each has, and what its network is told of texts.

SD 1, SD 2    tokens of CLIP
SDXL          tokens [CLIP 1, CLIP 2], both before the last layer; vector: pooled text of CLIP 2;
              sizes (height, width, 0, 0, height, width)
SD 3          tokens [[CLIP 1, CLIP 2, 0 ...], T5], CLIP's before the last layer; vector [pooled 1, pooled 2];
              without T5, zeros in the place of its tokens
FLUX          tokens of T5; vector: pooled text of CLIP; guidance, where the network is told it (dev)
DiT           no text: labels are given by whoever draws
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets.flux import Flux
from jaxdiff.nets.latent_dit import LatentDiT
from jaxdiff.nets.mmdit import MMDiT
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.types import Array


class Family(NamedTuple):
    """Pipelines that are read alike.

    net: the class of the network, in the folder unet/ or transformer/. text: the kinds of its text encoders, in their
    order; Stable Diffusion 3's T5 may be absent. told: (features of the texts, network, height and width, guidance) ->
    the arguments of the network. inner: CLIP's tokens are those before its last layer and its norm.
    """

    net: type
    text: tuple[str, ...]
    told: Callable[[Sequence[TextFeatures], Any, tuple[int, int], Any], dict[str, Array]]
    inner: bool = False

    @property
    def folder(self) -> str:
        """Where the network lies."""
        return "unet" if self.net is SDUNet else "transformer"


def t5_len(net: Any) -> int:
    """How many tokens T5 reads at once: 512 for FLUX dev, 256 for FLUX schnell and Stable Diffusion 3."""
    return 512 if isinstance(net, Flux) and net.guided else 256


def _sd(parts: Sequence[TextFeatures], net: Any, size: tuple[int, int], guidance: Any) -> dict[str, Array]:
    return {"tokens": parts[0].tokens}


def _xl(parts: Sequence[TextFeatures], net: Any, size: tuple[int, int], guidance: Any) -> dict[str, Array]:
    h, w = size
    sizes = jnp.asarray([[h, w, 0, 0, h, w]], jnp.float32)
    sizes = jnp.broadcast_to(sizes, (parts[0].tokens.shape[0], sizes.shape[1]))
    tokens = jnp.concatenate([part.tokens for part in parts], axis=-1)
    return {"tokens": tokens, "vector": parts[1].pooled, "sizes": sizes}


def _sd3(parts: Sequence[TextFeatures], net: Any, size: tuple[int, int], guidance: Any) -> dict[str, Array]:
    clip = jnp.concatenate([part.tokens for part in parts[:2]], axis=-1)
    widths = clip.shape[-1], parts[2].tokens.shape[-1] if len(parts) > 2 else net.token_dim
    if widths[0] > net.token_dim or widths[1] != net.token_dim:
        raise ConfigError(f"the network takes tokens of {net.token_dim}; CLIP and T5 give {widths}: not of one model.")
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, net.token_dim - clip.shape[-1])))
    t5 = parts[2].tokens if len(parts) > 2 else jnp.zeros((len(clip), t5_len(net), net.token_dim), clip.dtype)
    vector = jnp.concatenate([part.pooled for part in parts[:2]], axis=-1)
    return {"tokens": jnp.concatenate([clip, t5.astype(clip.dtype)], axis=1), "vector": vector}


def _flux(parts: Sequence[TextFeatures], net: Any, size: tuple[int, int], guidance: Any) -> dict[str, Array]:
    told = {"tokens": parts[1].tokens, "vector": parts[0].pooled}
    if net.guided:
        told["guidance"] = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), told["vector"].shape[:1])
    return told


def _dit(parts: Sequence[TextFeatures], net: Any, size: tuple[int, int], guidance: Any) -> dict[str, Array]:
    return {}


SD = Family(SDUNet, ("clip",), _sd)
XL = Family(SDUNet, ("clip", "clip"), _xl, inner=True)
SD3 = Family(MMDiT, ("clip", "clip", "t5"), _sd3, inner=True)
FLUX = Family(Flux, ("clip", "t5"), _flux)
DIT = Family(LatentDiT, (), _dit)
CLASSES = {
    "StableDiffusionPipeline": SD, "StableDiffusionImg2ImgPipeline": SD, "StableDiffusionInpaintPipeline": SD,
    "StableDiffusionXLPipeline": XL, "StableDiffusionXLImg2ImgPipeline": XL, "StableDiffusionXLInpaintPipeline": XL,
    "StableDiffusion3Pipeline": SD3, "StableDiffusion3Img2ImgPipeline": SD3, "FluxPipeline": FLUX,
    "FluxImg2ImgPipeline": FLUX, "DiTPipeline": DIT,
}  # fmt: skip
"""Their class -> how it is read."""
