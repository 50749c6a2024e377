"""Many devices are one device: the same numbers, whatever the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdiff import nets, train
from jaxdiff.errors import ConfigError
from jaxdiff.train import mesh as mesh_lib
from tests.oracles import hosts

WIDTH = 64
OPTIMIZER = train.adam(1e-2, clip_norm=1.0)


def init():
    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (WIDTH, WIDTH)) / 8, "b": jax.random.normal(keys[1], (WIDTH,))}
    return train.create_state(params, OPTIMIZER, ema={"slow": 0.99})


def loss(params, key, batch):
    noise = jax.random.normal(key, batch["x"].shape)
    residual = (batch["x"] + noise) @ params["w"] + params["b"][None]
    return (residual**2).mean(-1), {}


def run(mesh, accumulate=1):
    data = {"x": np.random.default_rng(0).normal(size=(40, WIDTH)).astype(np.float32)}
    indices = np.random.default_rng(1).integers(0, 40, (3, 2, 16)).astype(np.int32)
    step = train.make_step(
        loss, OPTIMIZER, key=jax.random.key(1), ema={"slow": 0.99}, steps_per_call=2, accumulate=accumulate, mesh=mesh
    )
    state = mesh_lib.born_sharded(mesh, init)
    data = jax.device_put(data, mesh_lib.replicated(mesh))
    losses = []
    for rows in indices:
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        state, metrics = step(state, rows, data)
        losses.append(metrics["loss"])
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
    return state, np.concatenate(losses)


@pytest.fixture(scope="module")
def alone():
    return {a: run(mesh_lib.make(devices=jax.devices()[:1]), accumulate=a) for a in (1, 2)}


@pytest.mark.parametrize(("data", "fsdp", "accumulate"), [(8, 1, 1), (2, 4, 1), (2, 4, 2)])
def test_eight_devices_equal_one(alone, data, fsdp, accumulate):
    expected, losses = alone[accumulate]
    state, others = run(mesh_lib.make(data, fsdp), accumulate=accumulate)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, state)
    spec = P("fsdp") if fsdp > 1 else P()
    for tree in (state.params, state.ema_params["slow"], state.opt_state[1].mu):
        assert tree["w"].sharding.spec == spec
        assert tree["b"].sharding.spec == P()
    assert state.params["w"].addressable_shards[0].data.size == WIDTH * WIDTH // fsdp


@pytest.fixture(scope="module")
def points():
    training = hosts.Training(nets.MLP(width=64, depth=1), (2,))
    return training, training.run((1, 1, 1))


@pytest.mark.parametrize("sizes", hosts.MESHES.values(), ids=hosts.MESHES)
def test_a_network_on_eight_devices_stays_beside_one_for_200_steps(points, sizes):
    training, (expected, losses) = points
    state, others = training.run(sizes)
    assert abs(others - losses)[0] < 1e-6
    assert hosts.distance(expected.params, state.params) < 1e-4
    cut = state.params["params"]["in_0"]["kernel"].sharding.spec
    assert ("tensor" in cut) == (sizes[2] > 1)
    assert ("fsdp" in cut) == (sizes[1] > 1)


def test_micro_batches_and_attention_under_a_mixed_mesh():
    training = hosts.Training(nets.DiT(patch_size=4, width=64, depth=1, heads=4))
    runs = [training.run(sizes, steps=2, accumulate=2) for sizes in ((1, 1, 1), (2, 2, 2))]
    np.testing.assert_allclose(runs[0][1], runs[1][1], atol=1e-6)
    assert hosts.distance(runs[0][0].params, runs[1][0].params) < 1e-4


def test_heads_and_hidden_channels_of_every_network_are_cut_in_pairs():
    mesh, x, time = mesh_lib.make(2, 1, 4), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,))
    made = {
        "unet": (nets.small(token_dim=64), {"tokens": jnp.zeros((1, 4, 64))}),
        "dit": (nets.DiT(width=64, depth=1, heads=4, token_dim=64), {"tokens": jnp.zeros((1, 4, 64))}),
    }
    specs = {}
    for name, (net, inputs) in made.items():
        params = jax.eval_shape(lambda net=net, inputs=inputs: net.init(jax.random.key(0), x, time, **inputs))
        for path, place in jax.tree_util.tree_leaves_with_path(mesh_lib.state_sharding(mesh, params["params"])):
            specs[name + "/" + jax.tree_util.keystr(path, simple=True, separator="/")] = place.spec
    outputs, inputs = P(None, "tensor"), P("tensor")
    for block, expected in {
        "unet/down_1_0/conv_in": P(None, None, None, "tensor"),
        "unet/down_1_0/conv_out": P(None, None, "tensor"),
        "unet/down_1_0/embedding": outputs,
        "unet/down_1_0/attention/qkv": outputs,
        "unet/down_1_0/attention/out": inputs,
        "unet/down_1_0/cross/query": outputs,
        "unet/down_1_0/cross/key_value": outputs,
        "unet/down_1_0/cross/out": inputs,
        "unet/out": P(),
        "unet/stem": P(),
        "dit/block_0/attention/qkv": outputs,
        "dit/block_0/attention/out": inputs,
        "dit/block_0/mlp_in": outputs,
        "dit/block_0/mlp_out": inputs,
        "dit/block_0/modulation": P(),
    }.items():
        assert specs[f"{block}/kernel"] == expected, block


def test_template_is_the_state_without_its_numbers():
    mesh = mesh_lib.make(2, 4)
    template, state = mesh_lib.template(mesh, init), mesh_lib.born_sharded(mesh, init)
    assert jax.tree.structure(template) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(template), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


def test_rule_cuts_the_largest_divisible_dimension_of_large_leaves():
    mesh = mesh_lib.make(2, 4)
    shapes = {
        "conv": (3, 3, 64, 128),
        "odd": (4099, 8),
        "none": (4099, 3),
        "small": (8, 8),
        "scalar": (),
    }
    leaves = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    specs = {k: s.spec for k, s in mesh_lib.state_sharding(mesh, leaves).items()}
    assert specs == {
        "conv": P(None, None, None, "fsdp"),
        "odd": P(None, "fsdp"),
        "none": P(),
        "small": P(),
        "scalar": P(),
    }


def test_minus_one_is_the_rest():
    assert dict(mesh_lib.make().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh_lib.make(-1, 4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(mesh_lib.make(2, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(mesh_lib.make(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh_lib.make(1, 2, -1).shape) == {"data": 1, "fsdp": 2, "tensor": 4}


@pytest.mark.parametrize(
    "sizes",
    [(3, 1, 1), (-1, 3, 1), (-1, -1, 8), (0, 8, 1), (-2, -4, 1), (2, 2, 3), (-1, 2, 0), (-1, 16, 1), (-2, -2, 2)],
)
def test_sizes_that_do_not_fit_are_named(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ConfigError, match=f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit 8"):
        mesh_lib.make(*sizes)


def test_indivisible_batch_is_named_before_anything_runs():
    step = train.make_step(loss, OPTIMIZER, key=jax.random.key(1), mesh=mesh_lib.make(2, 4), accumulate=2)
    with pytest.raises(ConfigError, match=r"a batch of 6 cannot be divided over 8 devices.*multiple of 8: 8"):
        step(init(), {"x": np.zeros((1, 12, WIDTH), np.float32)})
