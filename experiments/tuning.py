"""Fine-tuning of a published Stable Diffusion: what trains, and the loss, as pure functions of (trained, frozen).

    full                 trained = the U-Net
    lora                 trained = factors:  U-Net = merge(frozen U-Net, scale down up)
    textual_inversion    trained = the vectors of one new word; the rows of all other words are frozen

    loss = instance + prior_weight prior,    prior: pictures of the class, as many, in the same batch

frozen is {"params": parts of the pipeline, "texts": rows, "prior": {"image", "text"}}. The examples are latents, and a
text is a row of "texts", of which 0 is the empty one: of embeddings, or of ids where a text encoder must hear the word.
Hu et al. 2022, section 4.1; Gal et al. 2022, section 3; Ruiz et al. 2023, section 3.3.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments import model as models
from experiments.configs import Config
from jaxdiff import loss, pipelines
from jaxdiff.errors import ConfigError
from jaxdiff.pipelines import Conditions, LatentDiffusion
from jaxdiff.pretrained import inversion, lora
from jaxdiff.pretrained.pipelines import Pipeline
from jaxdiff.types import Array, Key, PyTree

FROM_THE_MODEL = ("net.name", "diffusion.schedule", "diffusion.target", "diffusion.time_input", "sample.grid")
"""Settings that the published model decides; the config says PUBLISHED for them."""
PUBLISHED = "published"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune. first(key, pipe) -> trained; complete(trained, params) -> the parameters of the pipeline.

    needs: the frozen parts that the loss uses, by how their names begin.
    """

    first: Callable[[Key, Pipeline], PyTree]
    complete: Callable[[PyTree, PyTree], PyTree]
    needs: tuple[str, ...]


def full() -> Method:
    """Every parameter of the U-Net trains."""
    return Method(
        lambda key, pipe: {"unet": pipe.params["unet"]}, lambda trained, params: {**params, "unet": trained["unet"]}, ()
    )


def low_rank(rank: int, alpha: float) -> Method:
    """The factors of a LoRA of all attention train."""
    if not alpha > 0:
        raise ConfigError(f"tune.alpha must be > 0, got {alpha}. That of the rank makes the scale 1.")

    def first(key: Key, pipe: Pipeline) -> PyTree:
        return lora.split(lora.init(key, {"unet": pipe.params["unet"]}, rank=rank, alpha=alpha))[0]

    def complete(trained: PyTree, params: PyTree) -> PyTree:
        return lora.merge(params, added(trained, rank, alpha))

    return Method(first, complete, ("unet",))


def added(trained: PyTree, rank: int, alpha: float) -> lora.LoRA:
    """The LoRA whose factors are trained."""
    fixed = {part: dict.fromkeys(entries, jnp.float32(alpha / rank)) for part, entries in trained.items()}
    return lora.join(trained, fixed)


def word(pipe: Pipeline, token: str, like: str, count: int) -> Method:
    """The `count` vectors of the word `token` train, which was added to `pipe`; they begin as that of `like`."""

    def first(key: Key, pipe: Pipeline) -> PyTree:
        del key
        return inversion.init(pipe, token, like, count=count).vectors

    return Method(
        first, lambda trained, params: inversion.merge(pipe, params, token, trained), ("unet", "text_0", "text_1")
    )


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What the training job asks of a model, for one that is fine-tuned.

    encode(params, rows) -> what the network is told, for rows of the texts; None where they are that already.
    frozen: what does not train; row: that of each text. Both are known when the job has made them.
    """

    model: LatentDiffusion
    method: Method
    encode: Callable[[PyTree, Any], Conditions] | None
    weighting: loss.Weighting
    times: loss.Times
    dropout: float
    offset: float
    prior_weight: float
    frozen: PyTree = dataclasses.field(default_factory=dict)
    row: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    condition: ClassVar = "caption"
    told: ClassVar = False
    sums: ClassVar = models.Model.sums
    summary: ClassVar = staticmethod(models.Model.summary)

    def captions(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The rows of texts that were embedded."""
        return {"text": np.asarray([self.row[text] for text in texts])}

    def null(self, count: int) -> dict[str, np.ndarray]:
        """The empty text, `count` times."""
        return {"text": np.zeros(count, np.int32)}

    def loss(self, trained: PyTree, key: Key, batch: dict[str, Array], frozen: PyTree) -> tuple[Array, dict]:
        """Per-example losses (b,) and aux (b,) of a batch {"image": latents, "text": rows}."""
        key_drop, key_prior, key_loss = jax.random.split(key, 3)
        x0, rows, count = batch["image"], batch["text"], len(batch["text"])
        prior = frozen.get("prior")
        if prior is not None:
            chosen = jax.random.randint(key_prior, (count,), 0, len(prior["text"]))
            x0 = jnp.concatenate([x0, prior["image"][chosen]])
            rows = jnp.concatenate([rows, prior["text"][chosen]])
        rows = jnp.where(jax.random.bernoulli(key_drop, self.dropout, rows.shape), 0, rows)
        params = self.method.complete(trained, frozen["params"])
        told = self._tell(params, frozen["texts"], rows)

        def net(x: Array, time: Array) -> Array:
            return self.model.unet.apply(params["unet"], x, time, **told)

        losses, aux = loss.diffusion_with_aux(
            key_loss, net, x0, schedule=self.model.schedule, target=self.model.target, weighting=self.weighting,
            times=self.times, time_input=self.model.time_input, offset=self.offset,
        )  # fmt: skip
        if prior is not None:
            losses = loss.prior_preservation(losses, self.prior_weight)
        return losses, {name: value[:count] for name, value in aux.items()}

    def _tell(self, params: PyTree, texts: PyTree, rows: Array) -> Conditions:
        chosen = jax.tree.map(lambda x: x[rows], texts)
        return chosen if self.encode is None else self.encode(params, chosen)

    def sampler(self, **settings: Any) -> Callable[..., Array]:
        """`sample(params, keys, cond, null) -> pictures`, where params are what trains and what is frozen; jit it.

        settings: those of `pipelines.text_to_image`.
        """

        def sample(params: PyTree, keys: Key, cond: dict[str, Array], null: dict[str, Array]) -> Array:
            rest = {name: params[name] for name in ("params", "texts")}
            trained = {name: part for name, part in params.items() if name not in (*rest, "prior")}
            whole = self.method.complete(trained, rest["params"])
            told = [self._tell(whole, rest["texts"], rows["text"]) for rows in (cond, null)]
            return pipelines.text_to_image(keys, self.model, whole, *told, **settings)

        return sample


def method(config: Config, pipe: Pipeline) -> Method:
    """That which config.tune names. Raises ConfigError for another name, or settings that do not fit."""
    c = config.tune
    made = {
        "full": full,
        "lora": lambda: low_rank(c.rank, c.alpha),
        "textual_inversion": lambda: word(pipe, c.token, c.like, c.vectors),
    }
    if c.method not in made:
        raise cli.unknown("tune.method", c.method, made)
    return made[c.method]()


def build(config: Config, pipe: Pipeline, encode: Callable[[PyTree, Any], Conditions] | None) -> Tuned:
    """The model that `config` trains, of a pipeline (to which a new word was added already)."""
    c, flat = config.diffusion, cli.flatten(config)
    for key in FROM_THE_MODEL:
        if flat[key] != PUBLISHED:
            raise ConfigError(f"{key} is what the published model says. Type --config.{key}={PUBLISHED}.")
    chain = pipe.chain
    model = LatentDiffusion(
        pipe.model.unet.clone(remat=config.train.remat), pipe.model.vae, chain.schedule, chain.target, chain.time_input
    )
    return Tuned(
        model=model,
        method=method(config, pipe),
        encode=encode,
        weighting=cli.call("diffusion.weighting", c.weighting, models.WEIGHTINGS),
        times=cli.call("diffusion.times", c.times, models.TIMES, schedule=chain.schedule),
        dropout=config.condition_dropout,
        offset=c.noise_offset,
        prior_weight=config.tune.prior_weight,
    )
