"""Pictures by diffusion in the latents of an autoencoder, as plain functions: nothing here is a sampler of its own.

    text_to_image     x_1 = noise                                       x -> sample -> decode
    image_to_image    x_t = alpha encode(image) + sigma noise           the same, from a time t < 1
    inpaint           9 channels: the network sees [x, mask, encode(image outside the mask)]
                      4 channels: D = mask D + (1 - mask) encode(image)    (replacement in x0)
    with_control      the network is told a picture by ControlNets; with_image, a picture by an IP-Adapter

`model` says what does not change, `params` is a dict of the parameters of "unet" and "vae"; `cond` and `null` are the
arguments of the network by name (tokens, vector, sizes), (b, ...) each. Put the call into your own jax.jit with params,
cond, null, scale and times as arguments: one compilation then serves every prompt, seed, scale and set of weights.
Rombach et al. 2022 (section 3.3), Meng et al. 2022 (image to image), Lugmayr et al. 2022 (section 4.1, inpainting).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import guide, process, sample
from jaxdiff.denoise import TimeInput, from_net, map_x0, time_t
from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver, Target

Conditions = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """A network, its autoencoder (modules), and the process it was trained on; hashable, and without parameters.

    unet.apply(params["unet"], x, time, **cond), also where it is a transformer; vae as `nets.AutoencoderKL`.
    learned_range: as in `denoise.from_net`. controls: ControlNets, whose parameters are params["control_0"], ...;
    adapter: an IP-Adapter, of params["ip_adapter"]. `with_control` and `with_image` give them what they need.
    """

    unet: Any
    vae: Any
    schedule: Schedule
    target: Target
    time_input: TimeInput = time_t
    learned_range: bool = False
    controls: tuple[Any, ...] = ()
    adapter: Any = None


def text_to_image(
    key: Key,
    model: LatentDiffusion,
    params: PyTree,
    cond: Conditions,
    null: Conditions,
    *,
    times: Any,
    solver: Solver,
    scale: Any,
    size: tuple[int, int] = (512, 512),
    **settings: Any,
) -> Array:
    """Pictures (b, h, w, 3) in [-1, 1] of `size` (h, w), one for each row of `cond`.

    key: one, or (b,), one for each picture. times, solver: as `sample.sample`; scale: as `guide.cfg`. settings: those
    of `generate` and `decode`. Raises ConfigError for sizes that are no multiples of the autoencoder's factor.
    """
    factor = model.vae.factor
    if size[0] % factor or size[1] % factor:
        raise ConfigError(f"size must be multiples of {factor}, got {size}.")
    batch = jax.tree.leaves(cond)[0].shape[0]
    key_noise, key_steps = process.split_keys(process.example_keys(key, batch))
    # Of unit variance, as latents are at any time of a variance-preserving chain that does not begin at pure noise.
    shape = (batch, size[0] // factor, size[1] // factor, model.vae.latent_channels)
    x = process.normal(key_noise, shape)
    return _finish(key_steps, model, params, x, cond, null, times, solver, scale, settings)


def image_to_image(
    key: Key,
    model: LatentDiffusion,
    params: PyTree,
    image: Array,
    cond: Conditions,
    null: Conditions,
    *,
    times: Any,
    solver: Solver,
    scale: Any,
    **settings: Any,
) -> Array:
    """Draw `image` (b, h, w, 3) anew from times[0] on: SDEdit. `last_part(times, strength)` gives such times.

    Arguments and errors as in `text_to_image`.
    """
    key_noise, key_steps = process.split_keys(process.example_keys(key, image.shape[0]))
    z = encode(model, params, image, tile=settings.get("tile"))
    x = process.q_sample(model.schedule, z, process.normal(key_noise, z.shape), jnp.asarray(times, z.dtype)[0])
    return _finish(key_steps, model, params, x, cond, null, times, solver, scale, settings)


def inpaint(
    key: Key,
    model: LatentDiffusion,
    params: PyTree,
    image: Array,
    mask: Array,
    cond: Conditions,
    null: Conditions,
    *,
    times: Any,
    solver: Solver,
    scale: Any,
    **settings: Any,
) -> Array:
    """Draw `image` (b, h, w, 3) anew where `mask` (b, h, w, 1) is 1, and keep its pixels where it is 0.

    A network of 2 c + 1 input channels is told the mask and what is to be kept; any other is guided, by putting the
    known latents into D. A latent is new where any of its pixels is. Arguments and errors as in `text_to_image`.
    """
    if mask.shape != (*image.shape[:3], 1):
        raise ConfigError(f"mask must have shape {(*image.shape[:3], 1)}, got {mask.shape}.")
    new = (mask > 0.5).astype(image.dtype)
    key_noise, key_steps = process.split_keys(process.example_keys(key, image.shape[0]))
    told = model.unet.in_channels == 2 * model.vae.latent_channels + 1
    z = encode(model, params, image * (1 - new) if told else image, tile=settings.get("tile"))
    latent = _shrink(new, model.vae.factor)
    change = None
    if told:
        extra = {"extra": jnp.concatenate([latent, z], axis=-1)}
        cond, null = cond | extra, null | extra
    else:
        change = lambda denoise: _keep(denoise, z, latent)  # noqa: E731
    x = process.normal(key_noise, z.shape)
    made = _finish(key_steps, model, params, x, cond, null, times, solver, scale, settings, change)
    return jnp.where(new > 0, made, image)


def generate(
    key: Key,
    model: LatentDiffusion,
    params: PyTree,
    x: Array,
    cond: Conditions,
    null: Conditions,
    *,
    times: Any,
    solver: Solver,
    scale: Any,
    phi: float = 0.0,
    change: Callable[[Denoiser], Denoiser] | None = None,
    callback: sample.Callback | None = None,
    return_trajectory: bool = False,
) -> Any:
    """Latents x0 (b, h, w, c) from x at times[0]: `sample.sample` of the network guided by `guide.cfg_batched`.

    phi: as in `guide.cfg`. change: a further guidance, from denoiser to denoiser. The rest as in `sample.sample`.
    """
    guided = guide.cfg_batched(denoiser(model, params), cond, null, scale, phi=phi)
    guided = guided if change is None else change(guided)
    return sample.sample(key, guided, x, times, solver, callback=callback, return_trajectory=return_trajectory)


def denoiser(model: LatentDiffusion, params: PyTree) -> Callable[[Array, Array, Conditions], Array]:
    """`denoise(x, t, cond) -> x0`, cond as `network` takes it."""

    def denoise(x: Array, t: Array, cond: Conditions) -> Array:
        def net(x: Array, time: Array) -> Array:
            return network(model, params)(x, time, **cond)

        settings = {"time_input": model.time_input, "learned_range": model.learned_range}
        return from_net(net, schedule=model.schedule, target=model.target, **settings)(x, t)

    return denoise


def network(model: LatentDiffusion, params: PyTree) -> Callable[..., Array]:
    """`net(x, time, **cond)`: the network, with what its ControlNets and its IP-Adapter add to it.

    cond: "extra", where there is one, is joined to the channels of x; "control", "control_scale", "image" and
    "image_scale" are those of `with_control` and `with_image`; the rest goes to the network, and to the ControlNets.
    """

    def net(x: Array, time: Array, **cond: Any) -> Array:
        extra, control, image = (cond.pop(name, None) for name in ("extra", "control", "image"))
        scales, scale = (cond.pop(name, None) for name in ("control_scale", "image_scale"))
        if len(control or ()) != len(model.controls) or (image is None) != (model.adapter is None):
            raise ConfigError(f"give {len(model.controls)} pictures by with_control, and with_image for an IP-Adapter.")
        added = {}
        if control:
            each = [
                part.apply(params[f"control_{i}"], x, time, control[i], scales[:, i], **cond)
                for i, part in enumerate(model.controls)
            ]
            added["residuals"] = jax.tree.map(lambda *several: sum(several[1:], several[0]), *each)
        if model.adapter is not None:
            added["images"] = model.adapter.apply(params["ip_adapter"], image, scale)
        x = x if extra is None else jnp.concatenate([x, extra.astype(x.dtype)], axis=-1)
        return model.unet.apply(params["unet"], x, time, **cond, **added)

    return net


def with_control(
    cond: Conditions, null: Conditions, pictures: Sequence[Array], scale: Any = 1.0
) -> tuple[Conditions, Conditions]:
    """`cond` and `null` with a picture (b, h, w, c) in [-1, 1] for each ControlNet of the model.

    scale: how strongly they control, 0 not at all: one number, one for each (n,), or (b, n).
    """
    shape = (pictures[0].shape[0], len(pictures))
    told = {"control": tuple(pictures), "control_scale": jnp.broadcast_to(jnp.asarray(scale, jnp.float32), shape)}
    return cond | told, null | told


def with_image(cond: Conditions, null: Conditions, image: Array, scale: Any = 1.0) -> tuple[Conditions, Conditions]:
    """`cond` and `null` with CLIP's embedding (b, d) of a picture, for the IP-Adapter of the model; `null` with none.

    scale: how much of the picture is taken, a number or (b,).
    """
    strength = {"image_scale": jnp.broadcast_to(jnp.asarray(scale, jnp.float32), image.shape[:1])}
    return cond | strength | {"image": image}, null | strength | {"image": jnp.zeros_like(image)}


def encode(model: LatentDiffusion, params: PyTree, image: Array, *, tile: int | None = None) -> Array:
    """The latents of pictures (b, h, w, 3) in [-1, 1], scaled as the network knows them: the mean, nothing is drawn.

    tile: in tiles of so many latents, for large pictures.
    """
    apply = lambda x: model.vae.apply(params["vae"], x, method="encode").mean  # noqa: E731
    return model.vae.normalize(_in_tiles(apply, image, tile, (model.vae.factor, 1)))


def decode(model: LatentDiffusion, params: PyTree, z: Array, *, tile: int | None = None) -> Array:
    """Pictures, clipped to [-1, 1], of latents of the network. tile: as in `encode`."""
    apply = lambda z: model.vae.apply(params["vae"], z, method="decode")  # noqa: E731
    return jnp.clip(_in_tiles(apply, model.vae.unnormalize(z), tile, (1, model.vae.factor)), -1, 1)


def last_part(times: Any, strength: float) -> np.ndarray:
    """The last steps of a grid, on the host: the part `strength` of them, at least one.

    Raises ConfigError unless 0 < strength <= 1.
    """
    times = np.asarray(times)
    if not 0 < strength <= 1:
        raise ConfigError(f"strength must be in (0, 1], got {strength}. Use 1 to keep nothing of the picture.")
    steps = max(1, round((len(times) - 1) * strength))
    return times[len(times) - 1 - steps :]


def _finish(key, model, params, x, cond, null, times, solver, scale, settings, change=None) -> Array:
    settings = dict(settings)
    tile = settings.pop("tile", None)
    z = generate(key, model, params, x, cond, null, times=times, solver=solver, scale=scale, change=change, **settings)
    return decode(model, params, z, tile=tile)


def _keep(denoise: Denoiser, known: Array, mask: Array) -> Denoiser:
    return lambda x, t: map_x0(lambda x0: jnp.where(mask > 0, x0, known), denoise(x, t))


def _shrink(mask: Array, factor: int) -> Array:
    """The largest value in each square of factor x factor pixels."""
    b, h, w, _ = mask.shape
    return mask.reshape(b, h // factor, factor, w // factor, factor, 1).max((2, 4))


def _in_tiles(function: Callable[[Array], Array], x: Array, tile: int | None, cells: tuple[int, int]) -> Array:
    if tile is None:
        return function(x)
    from jaxdiff.nets.vae import tiled

    return tiled(function, x, tile=tile, overlap=tile // 4, cells=cells)
