"""What one run is built of, before its first step and beside its loop: data, model, the carry, and what to do next."""

import shlex
from pathlib import Path
from typing import Any

import jax

from experiments import autoencoder, check, inputs, latents, trained, workdir
from experiments import model as models
from experiments.configs import Config
from jaxdiff import train
from jaxdiff.train import checkpoint


class Job:
    """Everything of one run that is built before its first step; nothing here has compiled or written yet."""

    model: Any

    def __init__(self, config: Config, directory: Path):
        check.config(config)
        self.config, self.directory = config, directory
        self.meta = {"config": workdir.lasting(config.to_dict())}  # goes into every checkpoint
        self.mesh = check.mesh(config)
        self.dataset = inputs.load(config)
        self.info = inputs.describe(self.dataset)
        workdir.check(directory, config, self.info)
        self.key_init, self.key_train = jax.random.split(jax.random.key(config.seed))
        self.build()
        self.faults = inputs.faults(self.dataset, directory / "skipped_records.jsonl")
        self.abstract = self.shapes()
        there = len(checkpoint.Checkpoints(directory / "checkpoints").steps())
        workdir.check_space(directory, _bytes(self.abstract) * max(1, config.train.keep + 1 - there))

    def build(self) -> None:
        """The model, what samples from it, and the frozen networks that it stands on."""
        config, directory = self.config, self.directory
        self.tokenizer = models.tokenizer_for(config, self.dataset.captions, directory)
        self.coder = latents.coder_of(config)
        latents.check(directory, self.coder, self.tokenizer)
        self.model = models.build(config, self.info, self.tokenizer, self.coder)
        self.sampler = models.sampler(self.model, config.sample)

    def init(self) -> dict[str, Any]:
        """The carry before the first step; jit it."""
        return models.carry(self.model, self.config, self.key_init)

    def shapes(self) -> dict[str, Any]:
        """The shapes of the carry."""
        return jax.eval_shape(self.init)

    def fresh(self) -> dict[str, Any]:
        """The carry before the first step, each device with its own share."""
        return train.mesh.born_sharded(self.mesh, self.init)

    def write_header(self) -> None:
        """The files that say what this run is: config.json first, so that a header cut short is known as ours."""
        workdir.write_json(self.directory / "config.json", self.config.to_dict())
        (self.directory / "samples").mkdir(exist_ok=True)
        vocabulary = None if self.model.told else self.tokenizer
        if vocabulary is not None and not (self.directory / "tokenizer.json").exists():
            vocabulary.save(self.directory / "tokenizer.json")
        latents.remember(self.directory, self.coder, self.tokenizer)
        workdir.write_json(self.directory / "data.json", self.info)
        workdir.write_json(self.directory / "versions.json", workdir.versions())
        self.faults.write()

    def prepare(self) -> None:
        """What the steps are given: examples or their latents, and conditions, on the device or along with each batch.

        Frozen networks make theirs now, for as long as that takes.
        """
        c, captions = self.config, self.dataset.captions or ()
        self.examples: inputs.Examples = self.dataset
        if self.coder:
            self.examples = self.dataset = latents.encode(self.dataset, self.coder, latents.cache_of(c))
            self.faults = inputs.faults(self.examples, self.directory / "skipped_records.jsonl")
        self.rows = inputs.arrays(self.examples, c.condition, self.tokenizer, c.text.max_len)
        self.along = inputs.texts(self.tokenizer, captions, c.text.max_len) if self.model.told else {}

    def describe(self) -> str:
        """One line about what is trained on what."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.abstract["state"].params))
        shape = " x ".join(map(str, self.info["shape"]))
        device = jax.devices()[0]
        return (
            f"{self.info['name']}: {self.info['num_examples']:,} examples of {shape}; {self.what()} of "
            f"{size:,} parameters; {self.mesh.size} {device.platform} device(s) ({device.device_kind}); "
            f"workdir {self.directory}"
        )

    def what(self) -> str:
        """What is trained, in a word."""
        return self.config.net.name

    def ended(self) -> str:
        """What is left to do when training has ended, and what to type then."""
        if not isinstance(self.model, models.Autoencoder):
            return f"Make pictures with\n  python -m experiments.sample --workdir={self.directory}{self._hint()}"
        run = trained.restore(self.directory)
        autoencoder.publish(run.model, run.params, self.dataset, self.directory / "vae")
        more = "--config=latent_emoji --config.frozen.autoencoder"
        return f"Train a model in its latents with\n  python -m experiments.train {more}={self.directory}"

    def _hint(self) -> str:
        """What to add to the command that makes pictures: a prompt that the model has seen, or a class."""
        prompt = (*self.config.sample.prompts, *(self.dataset.captions or ()), "...")[0]
        return {"caption": f" --prompt {shlex.quote(prompt)}", "label": " --label 0"}.get(self.config.condition, "")


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
