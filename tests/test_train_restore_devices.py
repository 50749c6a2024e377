"""A state saved on 8 devices is the same, bit for bit, on 1, 2 and 4, and back on 8: whatever the mesh."""

import jax
import pytest

from jaxdiff import train
from tests.oracles import hosts

SHAPES = {"stem": (3, 3, 8, 64), "conv_in": (3, 3, 8, 64), "conv_out": (3, 3, 64, 8), "qkv": (64, 192), "small": (5,)}


def init():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {name: {"kernel": jax.random.normal(key, SHAPES[name])} for name, key in zip(SHAPES, keys, strict=True)}
    return train.create_state(params, train.adam(1e-3), ema={"ema": 0.99})


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("mesh", hosts.MESHES)
def test_restore_onto_another_number_of_devices_and_back(mesh, count, tmp_path):
    sizes = hosts.MESHES[mesh]
    assert hosts.restored(init, sizes, hosts.fewer(sizes, count), tmp_path)


def test_fewer_devices_keep_the_axes():
    assert hosts.fewer((2, 2, 2), 4) == (1, 2, 2)
    assert hosts.fewer((2, 1, 4), 2) == (1, 1, 2)
    assert hosts.fewer((8, 1, 1), 4) == (4, 1, 1)
    assert hosts.fewer((1, 8, 1), 1) == (1, 1, 1)
