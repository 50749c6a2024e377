"""sample(): seeds, jit, trajectories, callbacks, refusals; and the time grids against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import denoise, errors, process, sample, schedule, solver, target
from tests.oracles.gaussian import Gaussian

USED = schedule.cosine()
DATA = Gaussian(USED, 0.3, 0.25)
SCHEDULES = {
    "cosine": USED,
    "ddpm_table": schedule.ddpm_table(),
    "edm": schedule.edm(),
    "rectified_flow": schedule.rectified_flow(),
    "sub_vp": schedule.sub_vp(),
    "ve": schedule.ve(),
    "zero_terminal_snr": schedule.zero_terminal_snr(schedule.ddpm_table()),
}


def seeds_to_images(seeds, solve, times):
    """As a user does it: everything about an image comes from its own seed."""
    pairs = jax.vmap(jax.random.split)(jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)))
    x = process.prior(pairs[:, 0], USED, (len(seeds), 3, 2))
    return np.asarray(jax.jit(lambda k, x: sample.sample(k, DATA.denoise, x, times, solve))(pairs[:, 1], x))


@pytest.mark.parametrize("name", ["ddpm", "heun_churn", "dpmpp_2m"])
def test_seed_seven_is_the_same_picture_in_any_batch_and_place(name):
    solve, times = solver.ALL[name](USED), sample.uniform_grid(USED, 4)
    alone = seeds_to_images([7], solve, times)[0]
    # To the last bit or two: a compiler may vectorise another batch size with other roundings.
    np.testing.assert_allclose(seeds_to_images(range(64), solve, times)[7], alone, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(seeds_to_images([3, 1, 7], solve, times)[2], alone, rtol=1e-6, atol=1e-6)
    assert np.abs(seeds_to_images([8, 1, 2], solve, times)[0] - alone).max() > 0.01


def test_eight_devices_are_one_device_and_report_once():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    keys, x = jax.random.split(jax.random.key(0), 16), process.prior(jax.random.key(1), USED, (16, 3))
    times, solve, heard = sample.uniform_grid(USED, 3), solver.ALL["heun_churn"](USED), []
    tell = lambda done, total: heard.append((done, total))  # noqa: E731
    run = jax.jit(lambda k, x: sample.sample(k, DATA.denoise, x, times, solve, callback=tell))
    spread = run(jax.device_put(keys, rows), jax.device_put(x, rows))
    jax.effects_barrier()
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert spread.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_allclose(spread, run(keys, x), rtol=1e-5, atol=1e-6)


def test_one_key_gives_example_i_the_key_folded_with_i():
    key, x = jax.random.key(5), process.prior(jax.random.key(0), USED, (3, 2))
    times, solve = sample.uniform_grid(USED, 3), solver.ddpm(USED)
    keys = jnp.stack([jax.random.fold_in(key, i) for i in range(3)])
    one, many = (sample.sample(k, DATA.denoise, x, times, solve) for k in (key, keys))
    np.testing.assert_array_equal(one, many)
    assert not np.array_equal(one[0] / x[0], one[1] / x[1])


@pytest.mark.parametrize("name", solver.ALL)
def test_jit_is_eager(name):
    x, times, solve = (
        process.prior(jax.random.key(0), USED, (2, 3)),
        sample.karras_grid(USED, 3),
        solver.ALL[name](USED),
    )
    jitted = jax.jit(lambda k, x, t: sample.sample(k, DATA.denoise, x, t, solve))
    np.testing.assert_allclose(
        jitted(jax.random.key(1), x, jnp.asarray(times, jnp.float32)),
        sample.sample(jax.random.key(1), DATA.denoise, x, times, solve),
        rtol=1e-5,
        atol=1e-6,
    )


def test_new_seeds_times_and_noise_do_not_compile_again():
    solve = solver.heun(USED, gamma=0.1)
    jitted = jax.jit(lambda k, x, t: sample.sample(k, DATA.denoise, x, t, solve))
    for seed in range(3):
        x = process.prior(jax.random.key(seed), USED, (2, 3))
        times = np.linspace(1.0, 0.01 * seed, 4).astype(np.float32)
        jitted(jax.random.key(seed + 10), x, times)
    assert jitted._cache_size() == 1


def test_trajectory_starts_at_the_noise_and_ends_at_the_result():
    x, times, solve = process.prior(jax.random.key(0), USED, (2, 3)), sample.uniform_grid(USED, 5), solver.ddim(USED)
    last, path = sample.sample(jax.random.key(1), DATA.denoise, x, times, solve, return_trajectory=True)
    assert path.shape == (6, 2, 3)
    np.testing.assert_array_equal(path[0], x)
    np.testing.assert_array_equal(path[-1], last)
    two_steps = sample.sample(jax.random.key(1), DATA.denoise, x, times[:3], solve)
    np.testing.assert_allclose(path[2], two_steps, rtol=1e-6)


@pytest.mark.parametrize("under_jit", [True, False])
def test_callback_hears_of_every_step_in_order(under_jit):
    heard = []
    x, times = process.prior(jax.random.key(0), USED, (2, 3)), sample.uniform_grid(USED, 4)

    def run(key, x):
        tell = lambda done, total: heard.append((done, total))  # noqa: E731
        return sample.sample(key, DATA.denoise, x, times, solver.ddim(USED), callback=tell)

    out = (jax.jit(run) if under_jit else run)(jax.random.key(1), x)
    jax.effects_barrier()
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    silent = sample.sample(jax.random.key(1), DATA.denoise, x, times, solver.ddim(USED))
    np.testing.assert_allclose(out, silent, rtol=1e-6)


def test_function_evaluations_are_counted():
    times = sample.karras_grid(USED, 7)
    counts = {name: sample.nfe(make(USED), times) for name, make in solver.ALL.items()}
    assert {n: c for n, c in counts.items() if c != 7} == {"heun": 13, "heun_churn": 13}
    assert sample.nfe(solver.heun(USED), times[:-1]) == 12  # never reaches sigma = 0
    assert sample.nfe(solver.ddpm(USED, variance="learned_range"), times, learned_range=True) == 7


@pytest.mark.parametrize("name", solver.ALL)
def test_gradient_through_sampling_is_finite_and_right(name):
    x, times, solve = (
        process.prior(jax.random.key(0), USED, (2, 1)),
        sample.uniform_grid(USED, 3),
        solver.ALL[name](USED),
    )

    def total(shift, callback=None):
        shifted = lambda x, t: DATA.denoise(x, t) + shift  # noqa: E731
        return sample.sample(jax.random.key(1), shifted, x, times, solve, callback=callback).sum()

    gradient = jax.jit(jax.grad(total))(jnp.float32(0))
    slope = (total(jnp.float32(0.5)) - total(jnp.float32(-0.5))) / 1.0  # everything is affine in the shift
    np.testing.assert_allclose(gradient, slope, rtol=1e-3)
    if name == "ddim":
        np.testing.assert_allclose(
            jax.grad(lambda s: total(s, lambda done, total: None))(jnp.float32(0)), gradient, rtol=1e-5
        )


def test_half_precision_noise_is_sampled_in_float32():
    x, times = jnp.ones((2, 3), jnp.bfloat16), sample.uniform_grid(USED, 2)
    asked = []

    def half(x, t):
        asked.append((x.dtype, t.dtype))
        return DATA.denoise(x, t).astype(jnp.bfloat16)

    out = sample.sample(jax.random.key(0), half, x, times, solver.ddim(USED))
    assert out.dtype == jnp.float32
    assert set(asked) == {(jnp.dtype("float32"), jnp.dtype("float32"))}


def test_a_network_becomes_a_sampler():
    net = lambda x, time: x * (1 - time[:, None])  # noqa: E731
    used = denoise.from_net(net, schedule=USED, target=target.v)
    x = process.prior(jax.random.key(0), USED, (2, 3))
    assert np.isfinite(
        sample.sample(jax.random.key(1), used, x, sample.log_snr_grid(USED, 3), solver.dpmpp_2m(USED))
    ).all()


@pytest.mark.parametrize(
    "times", [[0.0, 1.0], [1.0, 1.0, 0.0], [1.2, 0.0], [1.0, -0.1], [1.0, float("nan")], [1.0], [[1.0, 0.0]], 1.0]
)
def test_unusable_times_are_refused(times):
    with pytest.raises(errors.ConfigError, match="times"):
        sample.sample(jax.random.key(0), DATA.denoise, jnp.zeros((1, 1)), times, solver.ddim(USED))


def test_times_that_float32_cannot_tell_apart_are_refused():
    with pytest.raises(errors.ConfigError, match="float32"):
        sample.sample(jax.random.key(0), DATA.denoise, jnp.zeros((1, 1)), [1.0, 1 - 1e-9, 0.0], solver.ddim(USED))


def test_wrong_keys_shapes_and_scalars_are_refused():
    times, solve = [1.0, 0.0], solver.ddim(USED)
    with pytest.raises(errors.ConfigError, match="2 keys"):
        sample.sample(jax.random.split(jax.random.key(0), 3), DATA.denoise, jnp.zeros((2, 1)), times, solve)
    with pytest.raises(errors.ConfigError, match=r"jax\.random\.key"):
        sample.sample(jax.random.PRNGKey(0), DATA.denoise, jnp.zeros((2, 1)), times, solve)
    with pytest.raises(errors.ConfigError, match=r"shape of x, \(2, 1\); got \(2, 2\)"):
        sample.sample(jax.random.key(0), lambda x, t: jnp.zeros((2, 2)), jnp.zeros((2, 1)), times, solve)
    with pytest.raises(errors.ConfigError, match="scalar"):
        sample.sample(jax.random.key(0), DATA.denoise, jnp.zeros(()), times, solve)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("name", sample.GRIDS)
def test_grids_have_exactly_the_steps_asked_for(name, schedule_name):
    for num_steps in (1, 2, 3, 40, 50, 250):
        times = sample.GRIDS[name](SCHEDULES[schedule_name], num_steps)
        assert times.dtype == np.float64
        assert times.shape == (num_steps + 1,)
        assert (times[0], times[-1]) == (1.0, 0.0)
        assert (np.diff(times.astype(np.float32)) < 0).all()


def test_karras_grid_is_equation_five():
    n = np.arange(18)
    sigmas = (80 ** (1 / 7) + n / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    used = schedule.edm()
    times = sample.karras_grid(used, 18)
    with jax.enable_x64(True):
        np.testing.assert_allclose(used.sigma(jnp.asarray(times)), np.append(sigmas, 0), rtol=1e-10)


def test_log_grids_are_uniform_in_log_snr():
    for used in (schedule.edm(), schedule.rectified_flow()):
        with jax.enable_x64(True):
            logsnr = lambda grid: np.asarray(used.logsnr(jnp.asarray(grid)))  # noqa: E731, B023
            ends = -2 * np.log([80, 0.002])
            np.testing.assert_allclose(
                logsnr(sample.log_snr_grid(used, 8))[1:-1], np.linspace(*ends, 9)[1:-1], rtol=1e-9
            )
            np.testing.assert_allclose(
                logsnr(sample.exponential_grid(used, 8))[1:-1], np.linspace(*ends, 8)[1:], rtol=1e-9
            )


def test_respacing_visits_the_training_times():
    table = schedule.ddpm_table()
    grid = lambda spacing, n: sample.respaced_grid(table, n, spacing=spacing)  # noqa: E731
    for spacing in ("leading", "linspace", "trailing"):
        np.testing.assert_allclose(grid(spacing, 1000), np.append(table.time(np.arange(999, -1, -1)), 0), rtol=1e-12)
    # The indices that Lin et al. (2024, table 2) and DDPM code give for 10 of 1000.
    np.testing.assert_allclose(grid("leading", 10)[:-1], table.time(np.arange(900, -1, -100)))
    np.testing.assert_allclose(grid("trailing", 10)[:-1], table.time(np.arange(999, 0, -100)))
    np.testing.assert_allclose(grid("linspace", 10)[:-1], table.time(np.arange(999, -1, -111)))


def test_a_grid_may_be_made_inside_jit():
    inside = jax.jit(lambda x: x + jnp.asarray(sample.karras_grid(USED, 3), jnp.float32))(jnp.zeros(4))
    np.testing.assert_allclose(inside, sample.karras_grid(USED, 3), rtol=1e-6)


@pytest.mark.parametrize("name", sample.GRIDS)
@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "3"])
def test_bad_step_counts_are_refused(name, num_steps):
    with pytest.raises(errors.ConfigError, match="num_steps must be an integer >= 1"):
        sample.GRIDS[name](USED, num_steps)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample.karras_grid(USED, 3, rho=0.0), "rho"),
        (lambda: sample.karras_grid(USED, 3, sigma_min=3.0, sigma_max=2.0), "sigma_min"),
        (lambda: sample.log_snr_grid(USED, 3, sigma_min=0.0), "sigma_min"),
        (lambda: sample.exponential_grid(schedule.ve(), 3, sigma_min=60.0, sigma_max=70.0), "no noise level"),
        (lambda: sample.respaced_grid(USED, 3, spacing="leadin"), "leading"),
        (lambda: sample.respaced_grid(USED, 1001), "num_train_steps"),
    ],
)
def test_bad_grid_settings_are_refused(call, words):
    with pytest.raises(errors.ConfigError, match=words):
        call()
