"""Helpers of the network tests: parameters away from their zero initial values, and counts without any network."""

import jax
import jax.numpy as jnp
import numpy as np


def count(variables):
    """The number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables))


def shapes(net, x, **inputs):
    """The parameter shapes of a network, without compiling anything."""
    time = jnp.zeros((x.shape[0],))
    return jax.eval_shape(lambda key: net.init(key, x, time, **inputs), jax.random.key(0))


def perturbed(net, x, scale=0.2, **inputs):
    """Random parameters of a network: no leaf is zero, so that every path carries signal."""
    draw = np.random.default_rng(0)
    tree = shapes(net, x, **inputs)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw.standard_normal(leaf.shape), jnp.float32), tree)
