"""The model that a config describes: built once here, used by train, sample, evaluate and export alike.

    build(config, info, tokenizer, coder) -> Model   with init(key), loss(params, key, batch), denoiser(params, cond)
    sampler(model, settings)              -> sample(params, keys, cond, null) -> x0

Parameters are {'net': ..., 'text': ...}; a condition is {} or {'ids': (b, L)} or {'label': (b,)}, or what a frozen text
encoder made, {'tokens', 'mask', 'pooled'}. Diffusion in latents has the frozen {'vae': ...} beside the parameters
where it samples, and x0 are pictures. `Autoencoder` is the other model there is. This is the only place where names in
a config become functions.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import autoencoder, cli, inputs, latents
from experiments.autoencoder import Autoencoder
from experiments.configs import Config
from jaxdiff import data, denoise, guide, loss, nets, process, sample, schedule, solver, target, text, train
from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver, Target

SCHEDULES = {
    "linear": schedule.linear,
    "ddpm_table": schedule.ddpm_table,
    "scaled_linear": schedule.scaled_linear,
    "cosine": schedule.cosine,
    "sigmoid": schedule.sigmoid,
    "vp": schedule.vp,
    "sub_vp": schedule.sub_vp,
    "ve": schedule.ve,
    "edm": schedule.edm,
    "rectified_flow": schedule.rectified_flow,
    "zero_terminal_snr": lambda: schedule.zero_terminal_snr(schedule.scaled_linear()),
}
TARGETS = {
    "eps": lambda: target.eps,
    "x0": lambda: target.x0,
    "v": lambda: target.v,
    "score": lambda: target.score,
    "velocity": lambda: target.velocity,
    "edm": target.edm,
}
WEIGHTINGS = {
    "simple": lambda: loss.simple,
    "snr": lambda: loss.snr,
    "min_snr": loss.min_snr,
    "p2": loss.p2,
    "edm": loss.edm,
    "sigmoid": loss.sigmoid,
    "likelihood": lambda: loss.likelihood,
}
TIMES = {
    "uniform": lambda: loss.uniform,
    "stratified": lambda: loss.stratified,
    "antithetic": lambda: loss.antithetic,
    "discrete": loss.discrete,
    "logit_normal": loss.logit_normal,
    "log_normal": loss.log_normal,
}
TIME_INPUTS = {
    "t": lambda: denoise.time_t,
    "index": denoise.time_index,
    "logsnr": lambda: denoise.time_logsnr,
    "c_noise": lambda: denoise.c_noise,
}
SCALE_INPUTS = {"none": lambda: None, "edm": denoise.edm_scale}
NETS = {
    "unet": nets.UNet,
    "small": nets.small,
    "ddpm_cifar10": nets.ddpm_cifar10,
    "adm": nets.adm,
    "edm_ddpmpp": nets.edm_ddpmpp,
    "dit": nets.DiT,
    "mlp": nets.MLP,
    "autoencoder": nets.AutoencoderKL,
}
EMAS = {"constant": train.ema.constant, "warmed": train.ema.warmed, "half_life": train.ema.half_life}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BUCKETS = {"low": -10.0, "high": 10.0, "count": 10}  # of the log signal-to-noise ratio, in the loss log
CONDITIONS = ("none", "label", "caption")
# Options of networks that no config gives: they follow from other settings.
GIVEN = {"dtype", "num_classes", "vector_dim", "token_dim", "remat", "kernel_init", "qkv_init", "image_channels"}
GIVEN |= {"scale", "shift"}  # of an autoencoder, which are measured


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, its text encoder where it has one, and the diffusion it is trained for."""

    net: Any
    encoder: Any
    tokenizer: Any
    schedule: Schedule
    target: Target
    weighting: Callable
    times: Callable
    time_input: Callable
    scale_input: Callable | None
    shape: tuple[int, ...]
    condition: str
    num_classes: int
    max_len: int
    dropout: float
    flip: bool
    noise_offset: float = 0.0
    coder: latents.Coder | None = None

    sums: ClassVar = {"bucket_sum": (BUCKETS["count"],), "bucket_count": (BUCKETS["count"],)}
    summary: ClassVar = staticmethod(train.logsnr_buckets(**BUCKETS))

    @property
    def told(self) -> bool:
        """Whether a frozen text encoder makes the conditions, once, and none is trained along."""
        return isinstance(self.tokenizer, latents.Texts)

    @property
    def frozen(self) -> PyTree:
        """The parameters that sampling needs beside the trained ones."""
        return {"vae": self.coder.params} if self.coder else {}

    def init(self, key: Key) -> PyTree:
        """Parameters, float32; jit it."""
        key_net, key_text = jax.random.split(key)
        cond = self.null(1)
        params = {"text": self.encoder.init(key_text, cond["ids"])} if self.encoder else {}
        x, t = jnp.zeros((1, *self.shape)), jnp.zeros((1,))
        return params | {"net": self.net.init(key_net, x, t, **self.embed(params, cond))}

    def null(self, count: int) -> dict[str, Array]:
        """The empty condition, `count` times: the caption "", or class -1."""
        if self.condition == "caption":
            return {name: jnp.repeat(x, count, 0) for name, x in self.captions([""]).items()}
        return {"label": jnp.full((count,), -1, jnp.int32)} if self.condition == "label" else {}

    def captions(self, prompts: Sequence[str]) -> dict[str, Array]:
        """The condition of some prompts."""
        return {name: jnp.asarray(x) for name, x in inputs.texts(self.tokenizer, prompts, self.max_len).items()}

    def embed(self, params: PyTree, cond: dict[str, Array]) -> dict[str, Array]:
        """What the network is given for a condition; the text encoder runs here, once for a whole sampling run."""
        if self.condition == "caption":
            made = self.encoder.apply(params["text"], cond["ids"]) if self.encoder else text.TextFeatures(**cond)
            tokens, mask, pooled = made
            return {"tokens": tokens, "token_mask": mask, "vector": pooled}
        return {"labels": cond["label"]} if self.condition == "label" else {}

    def loss(self, params: PyTree, key: Key, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Per-example losses (b,) and aux (b,) of a batch of rows, with its condition dropped for some."""
        key_drop, key_flip, key_net, key_loss = jax.random.split(key, 4)
        x0 = data.decode(batch["image"])
        x0 = data.augment.flip(key_flip, x0) if self.flip else x0
        inputs = self.embed(params, self._drop(key_drop, batch))

        def net(x: Array, time: Array) -> Array:
            return self.net.apply(params["net"], x, time, **inputs, deterministic=False, rngs={"dropout": key_net})

        return loss.diffusion_with_aux(
            key_loss, net, x0, schedule=self.schedule, target=self.target, weighting=self.weighting,
            times=self.times, time_input=self.time_input, scale_input=self.scale_input, offset=self.noise_offset,
        )  # fmt: skip

    def _drop(self, key: Key, batch: dict[str, Array]) -> dict[str, Array]:
        """The condition of a batch, empty for a share of its examples (Ho and Salimans 2022, algorithm 1)."""
        count = batch["image"].shape[0]
        dropped = jax.random.bernoulli(key, self.dropout, (count,))
        return {
            name: jnp.where(dropped.reshape(-1, *[1] * (empty.ndim - 1)), empty, batch[name])
            for name, empty in self.null(count).items()
        }

    def denoise(self, params: PyTree, x: Array, t: Array, inputs: dict[str, Array]) -> Array:
        """D(x_t, t) -> x0 for the `inputs` that `embed` made."""
        return denoise.from_net(
            lambda scaled, time: self.net.apply(params["net"], scaled, time, **inputs),
            schedule=self.schedule, target=self.target, time_input=self.time_input, scale_input=self.scale_input,
        )(x, t)  # fmt: skip

    def decode(self, params: PyTree, x0: Array) -> Array:
        """What is drawn, as the data are: pictures of latents, of anything else itself."""
        return self.coder.decode(params["vae"], x0) if self.coder else x0

    def denoiser(self, params: PyTree, cond: dict[str, Array], null: dict[str, Array], scale: float = 1.0) -> Denoiser:
        """D(x_t, t) guided from `null` towards `cond`. Call it inside jit, so that `params` are traced."""
        inputs, empty = self.embed(params, cond), self.embed(params, null)
        return guide.cfg_batched(lambda x, t, given: self.denoise(params, x, t, given), inputs, empty, scale)


def tokenizer_for(config: Config, captions: Sequence[str] | None, workdir: Path) -> Any:
    """That of the run in `workdir`, else one trained on the captions; None when the config has no use for them."""
    if config.condition != "caption" or config.frozen.text or (workdir / "tokenizer.json").exists():
        return load_tokenizer(config, workdir)
    return text.train(captions or (), vocab_size=config.text.vocab_size)


def load_tokenizer(config: Config, workdir: Path) -> Any:
    """The tokenizer of a trained run, its frozen text encoder (`latents.Texts`), or None where it has no captions."""
    if config.condition != "caption" or config.frozen.text:
        return latents.texts_of(config)
    return text.load(workdir / "tokenizer.json")


def build(
    config: Config, info: dict[str, Any], tokenizer: Any, coder: latents.Coder | None = None
) -> Model | Autoencoder:
    """The model of `config` for data described by `info` (see inputs.describe). Raises ConfigError for bad names.

    `tokenizer` and `coder`: as `tokenizer_for` and `latents.coder_of` give them.
    """
    if config.condition not in CONDITIONS:
        raise cli.unknown("condition", config.condition, CONDITIONS)
    if config.data.flip and len(info["shape"]) != 3:
        raise ConfigError(
            f"data.flip=True mirrors pictures, and the examples are of shape {tuple(info['shape'])}. "
            "Type --config.data.flip=false."
        )
    if config.net.name == "autoencoder":
        shape = tuple(info["shape"])
        return autoencoder.build(config, shape, _net(config, shape, 0, None))
    if coder and config.data.flip:
        raise ConfigError("data.flip=True mirrors pictures, and latents are made once. Type --config.data.flip=false.")
    shape = coder.shape(info["shape"]) if coder else tuple(info["shape"])
    c = config.diffusion
    given = cli.call("diffusion.schedule", c.schedule, SCHEDULES)
    num_classes = info["num_classes"] if config.condition == "label" else 0
    return Model(
        net=_net(config, shape, num_classes, tokenizer),
        encoder=_encoder(config, tokenizer),
        tokenizer=tokenizer,
        schedule=given,
        target=cli.call("diffusion.target", c.target, TARGETS),
        weighting=cli.call("diffusion.weighting", c.weighting, WEIGHTINGS),
        times=cli.call("diffusion.times", c.times, TIMES, schedule=given),
        time_input=cli.call("diffusion.time_input", c.time_input, TIME_INPUTS),
        scale_input=cli.call("diffusion.scale_input", c.scale_input, SCALE_INPUTS),
        shape=shape,
        condition=config.condition,
        num_classes=num_classes,
        max_len=config.text.max_len,
        dropout=config.condition_dropout,
        flip=config.data.flip,
        noise_offset=c.noise_offset,
        coder=coder,
    )


def _net(config: Config, shape: tuple[int, ...], num_classes: int, tokenizer: Any) -> Any:
    options = dict(config.net)
    name = options.pop("name")
    if name not in NETS:
        raise cli.unknown("net.name", name, NETS)
    fields = inspect.signature(NETS[name] if isinstance(NETS[name], type) else nets.UNet).parameters
    accepted = set(fields) - {"parent", "name"}
    for option, value in options.items():
        if option not in accepted - GIVEN:
            raise cli.unknown(f"option of net {name}:", option, accepted - GIVEN)
        cli.check_type(f"net.{option}", value, fields[option])
    if config.train.dtype not in DTYPES:
        raise cli.unknown("train.dtype", config.train.dtype, DTYPES)
    given: dict[str, Any] = {"dtype": DTYPES[config.train.dtype], "image_channels": shape[-1]}
    if config.train.remat != "none":
        if "remat" not in accepted:
            raise ConfigError(f"net {name} keeps all of its forward pass. Type --config.train.remat=none.")
        given["remat"] = config.train.remat
    if num_classes:
        given["num_classes"] = num_classes
    if config.condition == "caption":
        widths = tokenizer.widths if isinstance(tokenizer, latents.Texts) else (config.text.dim, config.text.dim)
        given |= dict(zip(("token_dim", "vector_dim"), widths, strict=True))
    return NETS[name](**options, **{k: v for k, v in given.items() if k in accepted})


def _encoder(config: Config, tokenizer: Any) -> nn.Module | None:
    if tokenizer is None or isinstance(tokenizer, latents.Texts):
        return None
    c = config.text
    return text.TextEncoder(tokenizer.vocab_size, dim=c.dim, depth=c.depth, heads=c.heads, max_len=c.max_len)


def optimizer(config: Config) -> Any:
    """Adam as the config says."""
    c = config.optimizer
    return train.adam(
        c.learning_rate, warmup_steps=c.warmup, decay=c.decay, total_steps=config.train.steps, clip_norm=c.clip or None,
        weight_decay=c.weight_decay, b1=c.b1, b2=c.b2, eps=c.eps,
    )  # fmt: skip


def averages(config: Config) -> dict[str, Callable]:
    """The averages of the parameters that training keeps: one, named 'ema'."""
    return {"ema": cli.call("train.ema", config.train.ema, EMAS, batch_size=config.train.batch_size)}


def carry(model: Model | Autoencoder, config: Config, key: Key) -> dict[str, Any]:
    """What a checkpoint holds: the training state, and the sums that the next line of the log will average."""
    return begin(model.init(key), config, model.sums)


def begin(params: PyTree, config: Config, sums: Mapping[str, tuple[int, ...]] = Model.sums) -> dict[str, Any]:
    """`carry` of given parameters."""
    state = train.create_state(params, optimizer(config), ema=averages(config))
    sums = {"loss": (), "grad_norm": (), **sums}
    return {"state": state, "window": {k: jnp.zeros(v) for k, v in sums.items()} | {"steps": jnp.zeros(())}}


def sampler(model: Model | Autoencoder, settings: Config) -> Callable[..., Array]:
    """`sample(params, keys, cond, null) -> x0`: one example per key and per row of `cond`; jit it.

    `null` is the other side of guidance: the empty condition, or a negative prompt. Each example is a function of its
    own key and condition alone. `settings` are those of config.sample: solver, grid, steps, scale, clip.
    Of an autoencoder they are pairs: the pictures of `cond` and what comes back.
    Raises ConfigError for unknown names, steps < 1 or a scale that is not finite.
    """
    if isinstance(model, Autoencoder):
        return lambda params, keys, cond, null: model.pairs(params, cond["image"])
    scale = settings.scale
    if not np.isfinite(scale) or scale < 0:
        raise ConfigError(f"scale must be a finite number >= 0, got {scale}. 1 is no guidance, 4 is usual.")
    if scale != 1 and model.condition == "none":
        raise ConfigError(f"scale={scale} needs a condition to guide towards, and this model has none. Use scale 1.")
    if settings.clip and model.coder:
        raise ConfigError("sample.clip keeps x0 in [-1, 1], where latents are not. Type --config.sample.clip=false.")
    given, times = _solver_and_times(model, settings)

    def run(params: PyTree, keys: Key, cond: dict[str, Array], null: dict[str, Array]) -> Array:
        keys = jax.vmap(jax.random.split)(keys)
        denoiser = model.denoiser(params, cond, null, scale)
        if settings.clip:
            denoiser = guide.threshold_static(denoiser)
        noise = process.prior(keys[:, 0], model.schedule, (keys.shape[0], *model.shape))
        return model.decode(params, sample.sample(keys[:, 1], denoiser, noise, times, given))

    return run


def evaluations(model: Model, settings: Config) -> int:
    """The network evaluations of one picture, counted: calls of the denoiser, twice where guidance has two sides."""
    return sample.nfe(*_solver_and_times(model, settings)) * (1 if settings.scale in (0, 1) else 2)


def _solver_and_times(model: Model, settings: Config) -> tuple[Solver, np.ndarray]:
    given = cli.call("sample.solver", settings.solver, solver.ALL, schedule=model.schedule)
    times = cli.call("sample.grid", settings.grid, sample.GRIDS, schedule=model.schedule, num_steps=settings.steps)
    return given, times


def grid_conditions(model: Model | Autoencoder, prompts: Sequence[str], dataset: Any, count: int) -> tuple[dict, list]:
    """The conditions of a sample grid, and their names: the prompts (or some captions) or the classes, in turn.

    For an autoencoder pictures of `dataset`, without names.
    """
    if isinstance(model, Autoencoder):
        return {"image": jnp.asarray(autoencoder.some(dataset, count))}, []
    captions = dataset.captions if dataset else None
    if model.condition == "caption":
        words = list(prompts) or list(captions or ())[:: max(1, len(captions or ()) // count)]
        words = [words[i * len(words) // count] for i in range(count)]
        return model.captions(words), words
    if model.condition == "label":
        labels = [i % model.num_classes for i in range(count)]
        return {"label": jnp.asarray(labels, jnp.int32)}, labels
    return {}, []
