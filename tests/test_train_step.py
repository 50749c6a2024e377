"""The training step on linear models, whose gradients and updates are known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import train
from jaxdiff.errors import ConfigError
from jaxdiff.train import step as step_lib
from tests.oracles.compiles import counted

WIDTH, BATCH = 4, 8
EMA = {"slow": 0.999, "fast": 0.5}
OPTIMIZER = train.adam(0.05, clip_norm=1.0)


def squared_error(params, key, batch):
    """Deterministic: the key is not used."""
    del key
    residual = batch["x"] @ params["w"] + params["b"][None] - batch["y"]
    return (residual**2).mean(-1), {"logsnr": residual[:, 0]}


def noisy_error(params, key, batch):
    noise = jax.random.normal(key, batch["y"].shape)
    return squared_error(params, None, {"x": batch["x"], "y": batch["y"] + noise})


def params():
    return {"w": jnp.eye(WIDTH), "b": jnp.zeros(WIDTH)}


def new_state(optimizer=OPTIMIZER):
    return train.create_state(params(), optimizer, ema=EMA)


def batches(count, size=BATCH):
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=(count, size, WIDTH)).astype(np.float32) for k in "xy"}


def part(tree, start, stop):
    return jax.tree.map(lambda x: x[start:stop], tree)


def make(loss=noisy_error, optimizer=OPTIMIZER, **options):
    return train.make_step(loss, optimizer, **{"key": jax.random.key(3), "ema": EMA} | options)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def numpy_gradient(w, b, x, y):
    residual = x @ w + b - y
    scale = 2 / residual.size
    return {"w": scale * x.T @ residual, "b": scale * residual.sum(0)}


def test_one_sgd_step_is_the_closed_form():
    data = batches(1)
    state, metrics = make(squared_error, optax.sgd(0.1))(new_state(optax.sgd(0.1)), data)
    gradient = numpy_gradient(np.eye(WIDTH), np.zeros(WIDTH), data["x"][0], data["y"][0])
    np.testing.assert_allclose(state.params["w"], np.eye(WIDTH) - 0.1 * gradient["w"], atol=1e-6)
    np.testing.assert_allclose(state.params["b"], -0.1 * gradient["b"], atol=1e-6)
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    np.testing.assert_allclose(metrics["grad_norm"], [norm], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], ((data["x"] - data["y"]) ** 2).mean((1, 2)), rtol=1e-5)
    assert int(state.step) == 1


def test_key_of_a_step_is_root_folded_with_the_step():
    def draw(params, key, batch):
        return jnp.full(batch.shape, jax.random.normal(key)) + 0 * params["b"].sum(), {}

    step = make(draw, steps_per_call=2)
    state = dataclasses.replace(new_state(), step=jnp.int32(5))
    _, metrics = step(state, np.zeros((2, BATCH), np.float32))
    expected = [jax.random.normal(jax.random.fold_in(jax.random.key(3), n)) for n in (5, 6)]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_steps_in_one_call_are_bit_equal_to_single_calls(monkeypatch, on_cpu):
    """Off the CPU the steps are one scan, on it one dispatch each: both paths run here."""
    monkeypatch.setattr(step_lib, "_on_cpu", lambda mesh: on_cpu)
    data = batches(4)
    once, together = make(), make(steps_per_call=4)
    assert len(together._parts(data)) == (4 if on_cpu else 1)
    state, losses = new_state(), []
    for i in range(4):
        state, metrics = once(state, part(data, i, i + 1))
        losses.append(metrics["loss"][0])
    scanned, metrics = together(new_state(), data)
    assert_same_bits(state, scanned)
    assert_same_bits(jnp.stack(losses), metrics["loss"])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_backward_convolutions_are_not_in_a_loop_on_a_cpu(monkeypatch, on_cpu):
    """Inside a while loop XLA's CPU backend takes 100 times as long for them."""

    def loss(params, key, batch):
        del key
        out = jax.lax.conv(batch, params["kernel"], (1, 1), "SAME")
        return (out**2).mean((1, 2, 3)), {}

    monkeypatch.setattr(step_lib, "_on_cpu", lambda mesh: on_cpu)
    state = train.create_state({"kernel": jnp.ones((2, 2, 3, 3))}, OPTIMIZER)
    images = np.ones((2, 4, 2, 8, 8), np.float32)
    step = train.make_step(loss, OPTIMIZER, key=jax.random.key(0), steps_per_call=2, accumulate=2)
    assert str(jax.make_jaxpr(step.jitted)(state, step.key, step._parts(images)[0], None, None)).count("scan[") == (
        0 if on_cpu else 2
    )


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradient_is_the_full_one(monkeypatch, accumulate, on_cpu):
    monkeypatch.setattr(step_lib, "_on_cpu", lambda mesh: on_cpu)
    data = batches(2)
    options = {"optimizer": optax.sgd(0.1), "steps_per_call": 2, "summary": lambda losses, aux: {"each": losses}}
    full, wanted = make(squared_error, **options)(new_state(optax.sgd(0.1)), data)
    cut, metrics = make(squared_error, accumulate=accumulate, **options)(new_state(optax.sgd(0.1)), data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), full, cut)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), wanted, metrics)  # and in the same order


def test_micro_batches_have_different_noise():
    def draw(params, key, batch):
        return jnp.full(batch.shape, jax.random.normal(key)) + 0 * params["b"].sum(), {}

    step = make(draw, accumulate=4, summary=lambda losses, aux: {"each": losses})
    _, metrics = step(new_state(), np.zeros((1, BATCH), np.float32))
    root = jax.random.fold_in(jax.random.key(3), 0)
    expected = [jax.random.normal(jax.random.fold_in(root, i)) for i in range(4)]
    np.testing.assert_allclose(metrics["each"][0], np.tile(expected, 2), rtol=1e-6)


def poisoned(kind):
    """A loss that goes wrong where the batch says so: in its value, or in its gradient alone."""

    def loss(params, key, batch):
        losses, aux = squared_error(params, key, batch)
        if kind == "loss":
            return losses + jnp.where(batch["bad"], jnp.inf, 0.0), aux
        root = jnp.sqrt(jnp.where(batch["bad"], 0.0 * params["b"][0], 1.0 + 0.0 * params["b"][0]))
        return losses + root, aux

    return loss


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_bad_step_leaves_every_leaf_bit_identical_and_is_counted(kind):
    step = make(poisoned(kind))
    data = batches(3) | {"bad": np.zeros((3, BATCH), bool)}
    data["bad"][1, 2] = True
    state, _ = step(new_state(), part(data, 0, 1))
    before = jax.device_get(state)
    state, metrics = step(state, part(data, 1, 2))
    after = jax.device_get(state)
    for field in ("params", "ema_params", "opt_state"):
        assert_same_bits(getattr(before, field), getattr(after, field))
    assert (int(after.step), int(after.bad_steps), int(metrics["bad_steps"][0])) == (2, 1, 1)
    assert np.isfinite(metrics["loss"][0]) == (kind == "gradient")
    state, metrics = step(state, part(data, 2, 3))
    assert int(state.bad_steps) == 1
    assert np.isfinite(metrics["loss"][0])
    assert not np.array_equal(state.params["w"], before.params["w"])


def test_without_the_gate_the_bad_batch_would_ruin_the_parameters():
    data = part(batches(1) | {"bad": np.ones((1, BATCH), bool)}, 0, 1)
    grads = jax.grad(lambda p: poisoned("gradient")(p, None, jax.tree.map(lambda x: x[0], data))[0].mean())(params())
    assert not np.isfinite(grads["b"]).all()


def test_gradient_norm_that_overflows_is_refused():
    state, metrics = make(lambda p, k, b: (b * p["b"][0], {}))(new_state(), np.full((1, BATCH), 1e30, np.float32))
    assert int(metrics["bad_steps"][0]) == 1
    assert_same_bits(state.params, params())


def test_data_on_the_device_is_indexed_by_the_batch_and_survives():
    data = jax.tree.map(lambda x: jnp.asarray(x[0]), batches(1, size=20))
    indices = np.random.default_rng(1).integers(0, 20, (3, BATCH)).astype(np.int32)
    by_value, _ = make(steps_per_call=3)(new_state(), jax.tree.map(lambda x: x[indices], data))
    by_index, _ = make(steps_per_call=3)(new_state(), indices, data)
    assert_same_bits(by_value, by_index)
    halved = make(steps_per_call=3, get_batch=lambda data, i: jax.tree.map(lambda x: x[i // 2], data))
    other, _ = halved(new_state(), indices, data)
    assert not np.array_equal(other.params["w"], by_index.params["w"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_frozen_reaches_the_loss_and_has_no_part_in_the_state(accumulate):
    """(x w + f - y)^2 is what `squared_error` is with the bias f: the same w, and f untouched."""

    def loss(params, key, batch, frozen):
        return squared_error(params | frozen, key, batch)

    frozen, data, start = {"b": jnp.full(WIDTH, 0.3)}, batches(2), {"w": jnp.eye(WIDTH)}
    step = make(loss, optax.sgd(0.1), accumulate=accumulate, steps_per_call=2)
    state, _ = step(train.create_state(start, optax.sgd(0.1), ema=EMA), data, None, frozen)
    w = np.eye(WIDTH)
    for x, y in zip(data["x"], data["y"], strict=True):
        w = w - 0.1 * numpy_gradient(w, np.full(WIDTH, 0.3), x, y)["w"]
    np.testing.assert_allclose(state.params["w"], w, atol=1e-6)
    np.testing.assert_array_equal(frozen["b"], np.full(WIDTH, 0.3, np.float32))
    assert all(set(tree) == {"w"} for tree in (state.params, *state.ema_params.values()))


def test_state_is_donated_and_the_callers_parameters_are_not():
    mine = params()
    state = train.create_state(mine, OPTIMIZER, ema=EMA)
    make()(state, batches(1))
    assert state.params["w"].is_deleted()
    assert not mine["w"].is_deleted()


def test_nothing_is_compiled_after_the_first_call():
    step, data = make(steps_per_call=2, accumulate=2), batches(10)
    state, _ = step(new_state(), part(data, 0, 2))
    with counted() as compiled:
        for i in range(2, 10, 2):
            state, _ = step(state, part(data, i, i + 2))
    assert compiled == []
    with counted() as compiled:
        jax.jit(lambda x: x * 1.234567)(jnp.ones(3))  # the counter can count
    assert compiled


def test_logsnr_buckets_are_the_sums_by_hand():
    losses = jnp.arange(5, dtype=jnp.float32)
    logsnr = jnp.array([-80.0, -10.0, 0.0, 9.99, 80.0])
    out = jax.jit(train.logsnr_buckets(-10, 10, 4))(losses, {"logsnr": logsnr})
    np.testing.assert_array_equal(out["bucket_sum"], [0 + 1, 0, 2, 3 + 4])
    np.testing.assert_array_equal(out["bucket_count"], [2, 0, 1, 2])


def test_lower_gives_the_program_without_running_it():
    state = new_state()
    assert make().lower(state, batches(1)).compile().cost_analysis()
    assert not state.params["w"].is_deleted()


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"accumulate": 0}, (1, 8), "accumulate must be an integer >= 1, got 0"),
        ({"steps_per_call": 0}, (1, 8), "steps_per_call must be an integer >= 1, got 0"),
        ({"steps_per_call": 2}, (3, 8), r"steps_per_call=2, got \(3, 8\)"),
        ({}, (8,), r"pass batch\[None\]"),
        ({"accumulate": 3}, (1, 8), "multiple of 3"),
    ],
)
def test_wrong_counts_and_shapes_are_named(options, shape, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)(new_state(), np.zeros(shape, np.float32))


def test_ema_name_with_a_dot_is_refused():
    with pytest.raises(ConfigError, match=r"without '\.', got 'ema_0\.9'"):
        train.create_state(params(), OPTIMIZER, ema={"ema_0.9": 0.9})


def test_averages_of_state_and_step_must_have_the_same_names():
    with pytest.raises(ConfigError, match=r"averages \['fast', 'slow'\] and make_step was given \['slow'\]"):
        make(ema={"slow": 0.9})(new_state(), batches(1))


def test_averages_move_as_the_formula_says():
    step, data = make(squared_error, optax.sgd(0.1)), batches(6)
    state = train.create_state(params(), optax.sgd(0.1), ema=EMA)
    expected = {name: np.zeros(WIDTH) for name in EMA}
    for n in range(6):
        state, _ = step(state, part(data, n, n + 1))
        for name, decay in EMA.items():
            d = min(decay, (1 + n) / (10 + n))
            expected[name] = d * expected[name] + (1 - d) * np.asarray(state.params["b"], np.float64)
    for name, value in expected.items():
        np.testing.assert_allclose(state.ema_params[name]["b"], value, atol=1e-6)
