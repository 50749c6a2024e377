"""Fine-tuning as a run of the training job: what `--config=finetune --config.pretrained=DIR` builds, and its export.

    python -m experiments.train --config=finetune --config.pretrained=DIR --config.data.path=FOLDER
    python -m experiments.export --workdir=runs/finetune --out=OUT

OUT holds the averages of the run as diffusers and `experiments.sample` load them: of method full a whole pipeline, of
lora pytorch_lora_weights.safetensors, of textual_inversion learned_embeds.safetensors.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import cli, inputs, latents, tuning, workdir
from experiments import model as models
from experiments.configs import Config
from experiments.job import Job
from experiments.pretrained import SOLVERS
from jaxdiff import train
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.nets import SDUNet
from jaxdiff.pretrained import inversion, lora
from jaxdiff.pretrained import pipelines as published
from jaxdiff.pretrained.layout import Shardings
from jaxdiff.pretrained.pipelines import Pipeline, Prompts
from jaxdiff.text.cache import fingerprint
from jaxdiff.train import checkpoint
from jaxdiff.types import PyTree

BATCH = 16  # texts embedded at once
WEIGHTS = "published.json"
"""The file of a run that holds the hash of the weights it began from."""


class Tuning(Job):
    """A run that trains a published model further. Its texts and latents are made once, in `prepare`."""

    model: tuning.Tuned

    def build(self) -> None:
        """The pipeline, what of it trains, and what samples from it."""
        config, size = self.config, (self.config.data.size,) * 2
        self.pipe = open_pipeline(config, functools.partial(train.mesh.state_sharding, self.mesh))
        self.tokenizer, self.coder = None, latents.Coder(self.pipe.model.vae, self.pipe.params["vae"])
        self.coder.shape(self.info["shape"])
        self.weights = fingerprint(self.pipe.model.unet, self.pipe.params)
        self._check_weights()
        if config.data.flip:
            raise ConfigError(
                "data.flip=True mirrors pictures, and latents are made once. Type --config.data.flip=false."
            )
        self.dataset = captioned(self.dataset, config.tune.prompt, "tune.prompt")
        encode = functools.partial(self.pipe.encode, size=size) if config.tune.method == "textual_inversion" else None
        self.model = tuning.build(config, self.pipe, encode)
        self.trained = jax.eval_shape(lambda: self._first(self.pipe))
        if config.tune.method == "full":  # it is read again where the run begins, and not kept until then
            self._drop("unet")
        c = config.sample
        used = cli.call("sample.solver", c.solver, SOLVERS, schedule=self.pipe.model.schedule)
        times = self.pipe.chain.times(c.steps, c.solver.partition("(")[0])
        self.sampler = self.model.sampler(size=size, solver=used, times=times, scale=c.scale)

    def _check_weights(self) -> None:
        path = self.directory / WEIGHTS
        if path.exists() and workdir.load_json(path) != self.weights:
            raise CheckpointError(
                f"the weights in {self.config.pretrained} are not those that the run in {self.directory} began from. "
                "Put them back, or give another --workdir."
            )

    def _drop(self, *names: str) -> None:
        params = {name: part for name, part in self.pipe.params.items() if name not in names}
        self.pipe = dataclasses.replace(self.pipe, params=params)

    def _first(self, pipe: Pipeline) -> PyTree:
        return self.model.method.first(self.key_init, pipe)

    def shapes(self) -> dict[str, Any]:
        """The shapes of the carry."""
        return jax.eval_shape(functools.partial(models.begin, config=self.config), self.trained)

    def fresh(self) -> dict[str, Any]:
        """The carry before the first step, each device with its own share."""
        begin = functools.partial(models.begin, config=self.config)
        place = functools.partial(train.mesh.state_sharding, self.mesh)
        pipe = open_pipeline(self.config, place) if self.config.tune.method == "full" else self.pipe
        return jax.jit(begin, out_shardings=place(self.abstract))(self._first(pipe))

    def write_header(self) -> None:
        """As of any run, and which weights it began from."""
        super().write_header()
        workdir.write_json(self.directory / WEIGHTS, self.weights)

    def prepare(self) -> None:
        """The latents of the pictures, and what the network is told of their captions; the rest is let go of."""
        config, cache = self.config, latents.cache_of(self.config)
        self.examples = latents.encode(self.dataset, self.coder, cache)
        self.faults = inputs.faults(self.examples, self.directory / "skipped_records.jsonl")
        other = prior(config)
        captions = [*(self.examples.captions or ()), *((other.captions or ()) if other else ())]
        literal = dict.fromkeys(captions)
        known = list(literal | dict.fromkeys(config.sample.prompts))
        self._check_token(known)
        texts = self._texts([plain(text) if text in literal else text for text in known])
        row = {text: np.int32(i + 1) for i, text in enumerate(known)}
        frozen: dict[str, Any] = {"texts": texts}
        if other:
            z = latents.encode(other, self.coder, cache)
            good = [i for i in range(len(z)) if i not in z.skipped]
            own = [row[text] for text in np.asarray(z.captions, object)[good]]
            frozen["prior"] = {"image": z.images[good], "text": np.asarray(own)}
        self._drop(*{name for name in self.pipe.params if name not in ("vae", *self.model.method.needs)})
        frozen = jax.tree.map(jnp.asarray, frozen) | {"params": self.pipe.params}
        self.model = dataclasses.replace(self.model, frozen=frozen, row=row)
        rows = np.asarray([row[text] for text in self.examples.captions or ()])
        self.rows, self.along = {"image": self.examples.images, "text": rows}, {}

    def _check_token(self, texts: list[str]) -> None:
        c = self.config.tune
        if c.method == "textual_inversion" and not any(c.token.lower() in text.lower() for text in texts):
            raise ConfigError(
                f"no caption has the word {c.token!r}. Write captions with it, or leave metadata.jsonl away and type "
                f"--config.tune.prompt='a photo of {c.token}'."
            )

    def _texts(self, texts: list[str]) -> PyTree:
        """The empty text and these, as rows: embedded, or as ids where a text encoder trains."""
        told, null = self.pipe.tokenize(texts, [""] * len(texts))
        rows: Prompts = jax.tree.map(lambda a, b: np.concatenate([a[:1], b]), null, told)
        if self.model.encode is not None:
            return rows
        size = (self.config.data.size,) * 2
        encode = jax.jit(lambda params, part: self.pipe.encode(params, part, size=size))
        params = {name: part for name, part in self.pipe.params.items() if name.startswith("text_")}
        count = len(texts) + 1
        parts = []
        for start in range(0, count, BATCH):  # the last one is filled up, so that one program makes all
            chosen = np.minimum(np.arange(start, start + BATCH), count - 1)
            parts.append(jax.device_get(encode(params, jax.tree.map(lambda x, chosen=chosen: x[chosen], rows))))
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def what(self) -> str:
        """What is trained, in a word."""
        return f"{self.config.tune.method} of {self.config.pretrained},"

    def ended(self) -> str:
        """What to type when training has ended."""
        out = f"{self.directory}-out"
        text = {
            "full": f"--pretrained {out}",
            "lora": f"--pretrained {self.config.pretrained} --lora {out}",
            "textual_inversion": f"--pretrained {self.config.pretrained} --inversion {out}",
        }[self.config.tune.method]
        return (
            f"Write and try it with\n  python -m experiments.export --workdir={self.directory} --out={out}\n"
            f'  python -m experiments.sample {text} --prompt "..."'
        )


def open_pipeline(config: Config, shardings: Shardings | None = None) -> Pipeline:
    """The published model of `config`, with its new word where there is one. Raises ConfigError for another kind."""
    c = config.tune
    if config.train.dtype not in models.DTYPES:
        raise cli.unknown("train.dtype", config.train.dtype, models.DTYPES)
    dtype = None if config.train.dtype == "float32" else models.DTYPES[config.train.dtype]
    pipe = published.load(config.pretrained, variant=c.variant or None, dtype=dtype, shardings=shardings)
    net = pipe.model.unet
    if not isinstance(net, SDUNet) or net.in_channels != pipe.model.vae.latent_channels:
        raise ConfigError(f"{config.pretrained} cannot be fine-tuned here: that is for Stable Diffusion 1, 2 and XL.")
    if c.method == "textual_inversion":
        pipe = inversion.add(pipe, inversion.init(pipe, c.token, c.like, count=c.vectors))
    return pipe


def captioned(dataset: inputs.Examples, prompt: str, setting: str) -> inputs.Examples:
    """`dataset` with `prompt` for the caption of every picture, where one is given."""
    if prompt:
        return dataclasses.replace(dataset, captions=(prompt,) * len(dataset))
    if dataset.captions is None:
        raise ConfigError(f"{dataset.name} has no captions. Type --config.{setting}='a photo of ...', for all of them.")
    return dataset


def plain(caption: str) -> str:
    """The prompt that says a caption as it stands: its brackets are no weights."""
    return re.sub(r"([()\[\]\\])", r"\\\1", caption)


def prior(config: Config) -> inputs.Examples | None:
    """The pictures of the class, with their captions, where there are any."""
    if not config.tune.class_path:
        return None
    other = ConfigDict(config.to_dict())
    for key, value in (("data.name", "folder"), ("data.path", config.tune.class_path)):
        cli.override(other, key, value)
    return captioned(inputs.load(other), config.tune.class_prompt, "tune.class_prompt")


def export(directory: Path, out: Path, step: int | None) -> None:
    """Write the averages of the run in `directory`, at `step` or the newest, to `out`, as other programs load them."""
    config, _ = workdir.load(directory)
    pipe, c = open_pipeline(config), config.tune
    method = tuning.method(config, pipe)
    template = jax.eval_shape(lambda: models.begin(method.first(jax.random.key(0), pipe), config))
    carry, _ = checkpoint.Checkpoints(directory / "checkpoints").restore(template, step)
    trained = carry["state"].ema_params["ema"]
    if c.method == "full":
        published.export(out, dataclasses.replace(pipe, params=pipe.params | trained), config.pretrained)
    elif c.method == "lora":
        out.mkdir(parents=True)
        lora.export(out / LORA, tuning.added(trained, c.rank, c.alpha), pipe.params)
    else:
        inversion.export(out, inversion.Inversion(c.token, trained))


LORA = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""
