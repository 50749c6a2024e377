"""The model of a config: what it refuses, and that captions and classes are dropped for a share of the examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments import model as models
from jaxdiff.errors import ConfigError

COUNT = 400


class Seen:
    """A text encoder and a network in one, which keep what they are given."""

    def apply(self, params, *args, labels=None, tokens=None, **_):
        if len(args) == 1:
            return args * 3
        self.condition = np.asarray(labels if tokens is None else tokens)
        return args[0]


def test_points_cannot_be_flipped():
    config = cli.load_config("swissroll")
    config.data.flip = True
    with pytest.raises(ConfigError, match=r"--config\.data\.flip=false"):
        models.build(config, {"shape": (2,), "num_classes": 0}, None)


def test_what_is_computed_again_is_a_setting_of_training():
    config = cli.load_config("mnist")
    config.train.remat = "dots"
    assert models.build(config, {"shape": (4, 4, 1), "num_classes": 10}, None).net.remat == "dots"
    config = cli.load_config("swissroll")
    config.train.remat = "full"
    with pytest.raises(ConfigError, match=r"--config\.train\.remat=none"):
        models.build(config, {"shape": (2,), "num_classes": 0}, None)


@pytest.mark.parametrize("name", ["mnist", "emoji"])
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_conditions_are_dropped_per_example_and_at_their_rate(name, rate, tmp_path):
    config = cli.load_config(name)
    config.condition_dropout = rate
    tokenizer = models.tokenizer_for(config, ["red heart"], tmp_path)
    model = models.build(config, {"shape": (4, 4, 1), "num_classes": 10}, tokenizer)
    seen = Seen()
    model = dataclasses.replace(model, net=seen, encoder=seen)
    cond = model.captions(["red heart"] * COUNT) if name == "emoji" else {"label": jnp.full(COUNT, 7, jnp.int32)}
    batch = {"image": jnp.zeros((COUNT, 4, 4, 1), jnp.uint8)} | cond
    model.loss({"net": {}, "text": {}}, jax.random.key(0), batch)
    (given,), (empty,) = cond.values(), model.null(COUNT).values()
    rows = [np.asarray(x).reshape(COUNT, -1) for x in (seen.condition, given, empty)]
    kept, dropped = ((rows[0] == row).all(1) for row in rows[1:])
    assert (kept ^ dropped).all()
    assert abs(dropped.sum() - rate * COUNT) <= 4 * (COUNT * rate * (1 - rate)) ** 0.5  # 4 standard deviations
