"""Classification accuracy score: a classifier trained on samples alone, tested on real pictures.

    CAS = accuracy on real pictures of a classifier that never saw one          (Ravuri and Vinyals 2019, section 3)

Theirs is a ResNet-50 on ImageNet; `Classifier` is a small network for small pictures, so a score means something only
beside that of the same classifier trained on as many real pictures.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxdiff.errors import DataError, check_count
from jaxdiff.metrics.checks import check_images, check_labels, check_pair
from jaxdiff.types import Array, Key, PyTree


class Classifier(nn.Module):
    """Three convolutions with GroupNorm, each followed by a pool of 2 x 2, and a mean: (b, h, w, c) -> logits."""

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(3):
            x = nn.Conv(self.width * 2**i, (3, 3))(x)  # strided ones have a slow gradient on CPUs
            x = nn.max_pool(nn.relu(nn.GroupNorm(num_groups=8)(x)), (2, 2), (2, 2))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


def _scaled(x: Array) -> Array:
    return x.astype(jnp.float32) / 127.5 - 1 if x.dtype == jnp.uint8 else x.astype(jnp.float32)


def fit(
    key: Key, net: nn.Module, images: Any, labels: Any, *, steps: int = 500, batch_size: int = 128,
    learning_rate: float = 2e-3, augment: Callable[[Key, Array], Array] | None = None,
) -> PyTree:  # fmt: skip
    """Parameters of `net` after `steps` of Adam, its rate falling as a cosine to 0, on random batches.

    Pictures uint8 or in [-1, 1] (n, h, w, c), labels (n,); `augment(key, batch)` may change each batch.
    Raises as `checks.check_images` and `check_labels`.
    """
    images = check_images("images", images)
    labels = check_labels("labels", labels, len(images)).astype(np.int32)
    steps = check_count("steps", steps, "500 is the default.")
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    key_init, key_order, key_augment = jax.random.split(key, 3)

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(net.apply(params, _scaled(x))), y).mean()

    def step(params: PyTree, state: PyTree, i: Array, images: Array, labels: Array) -> tuple[PyTree, PyTree]:
        rows = jax.random.randint(jax.random.fold_in(key_order, i), (batch_size,), 0, len(labels))
        batch = images[rows] if augment is None else augment(jax.random.fold_in(key_augment, i), images[rows])
        updates, state = optimizer.update(jax.grad(loss)(params, batch, labels[rows]), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(net.init)(key_init, jnp.zeros((1, *images.shape[1:])))
    state, run, images, labels = optimizer.init(params), jax.jit(step), jnp.asarray(images), jnp.asarray(labels)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a python float to an integer count
        for i in range(steps):  # not a scan, in which XLA's convolutions are slow on CPUs
            params, state = run(params, state, jnp.asarray(i), images, labels)
    return params


def accuracy(net: nn.Module, params: PyTree, images: Any, labels: Any, *, batch_size: int = 512) -> float:
    """The share of pictures whose largest logit is that of their label."""
    images = check_images("images", images)
    labels = check_labels("labels", labels, len(images))
    predict = jax.jit(lambda params, x: jnp.argmax(jnp.asarray(net.apply(params, _scaled(x))), axis=-1))
    found = []
    for start in range(0, len(images), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(images) - 1)  # one shape, one program
        found.append(np.asarray(predict(params, images[rows]))[: len(images) - start])
    return float((np.concatenate(found) == labels).mean())


def classification_accuracy(
    key: Key, samples: Any, labels: Any, real: Any, real_labels: Any, *, steps: int = 500, width: int = 32
) -> float:
    """The score of `samples` with the labels they were made for, on `real` pictures with theirs: from 0 to 1.

    Raises DataError when the two are of other shapes or types, or a class of `real` has no sample.
    """
    samples, real = check_images("samples", samples), check_images("real", real)
    check_pair("samples and real", samples, real)
    y, real_y = check_labels("labels", labels, len(samples)), check_labels("real_labels", real_labels, len(real))
    missing = np.setdiff1d(real_y, y)
    if samples.dtype != real.dtype or len(missing):
        raise DataError(
            f"samples ({samples.dtype}) must be of the type of real ({real.dtype}) and have every class of it; "
            f"without samples: {missing.tolist()}. Make some of each."
        )
    net = Classifier(int(max(y.max(), real_y.max())) + 1, width)
    return accuracy(net, fit(key, net, samples, y, steps=steps), real, real_y)
