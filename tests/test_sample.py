"""sample(): seeds, jit, compilations, the count of calls, trajectories, callbacks, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import denoise, errors, guide, process, sample, schedule, solver, target
from jaxdiff.types import Solver
from tests.oracles.compiles import counted
from tests.oracles.gaussian import Gaussian

USED = schedule.cosine()
DATA = Gaussian(USED, 0.3, 0.25)


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


@pytest.fixture(scope="module")
def all_solvers():
    """One jitted function of (key, x, times, scale): what every solver makes of them, with guidance."""

    @jax.jit
    def run(key, x, times, scale):
        guided = guide.cfg(DATA.denoise, lambda x, t: 0.5 * DATA.denoise(x, t), scale)
        return {name: sample.sample(key, guided, x, times, make(USED)) for name, make in solver.ALL.items()}

    return run


def compilations(function, arguments):
    """How many programs are compiled for a list of arguments, after the first of them."""
    function(*arguments[0])
    with counted() as compiled:
        for some in arguments[1:]:
            function(*some)
    return len(compiled)


def test_new_seeds_noise_times_and_scales_do_not_compile_again(all_solvers):
    given = [
        (
            jax.random.key(seed),
            process.prior(jax.random.key(10 + seed), USED, (2, 3)),
            np.linspace(1.0, 0.01 * seed, 5).astype(np.float32),
            jnp.float32(1 + seed),
        )
        for seed in range(3)
    ]
    assert compilations(all_solvers, given) == 0
    results = [all_solvers(*some) for some in given]
    for name in solver.ALL:  # so all four did matter
        assert np.isfinite(results[0][name]).all()
        assert not np.allclose(results[0][name], results[1][name]), name


def test_a_new_shape_or_a_scale_built_in_would_compile_again():
    times, x = np.linspace(1.0, 0.0, 5).astype(np.float32), jnp.ones((2, 3))
    run = jax.jit(lambda x, times: sample.sample(jax.random.key(0), DATA.denoise, x, times, solver.ddim(USED)))
    assert compilations(run, [(x, times), (x, times[:-1])]) == 1
    built_in = jax.jit(lambda x, scale: scale * x, static_argnums=1)
    assert compilations(built_in, [(x, 1.0), (x, 2.0), (x, 3.0)]) == 2


def host_calls(function, *arguments):
    """The callbacks to the host in a function, wherever they are nested."""
    return str(jax.make_jaxpr(function)(*arguments)).count("callback[")


@pytest.mark.parametrize("name", solver.ALL)
def test_sampling_is_one_scan_that_never_goes_back_to_the_host(name):
    times, x, solve = np.linspace(1.0, 0.0, 5).astype(np.float32), jnp.ones((2, 3)), solver.ALL[name](USED)

    def run(key, x, times, callback=None):
        return sample.sample(key, DATA.denoise, x, times, solve, callback=callback)

    arguments = (jax.random.key(0), x, times)
    outer = [equation.primitive.name for equation in jax.make_jaxpr(run)(*arguments).eqns]
    assert outer.count("scan") == 1
    assert "while" not in outer
    assert host_calls(run, *arguments) == 0
    assert host_calls(lambda *given: run(*given, lambda done, total: None), *arguments) == 1  # this check can fail


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


def counted_by_hand(solve, times, denoise=None, x=None):
    """The calls of the denoiser where every loop and branch is Python's own."""
    calls = []

    def count(x, t):
        calls.append(t)
        return x if denoise is None else denoise(x, t)

    with jax.disable_jit():
        sample.sample(jax.random.key(0), count, jnp.zeros((1, 1)) if x is None else x, times, solve)
    return len(calls)


@pytest.mark.parametrize("name", solver.ALL)
def test_function_evaluations_are_counted(name):
    times, solve = sample.karras_grid(USED, 3), solver.ALL[name](USED)
    assert sample.nfe(solve, times) == counted_by_hand(solve, times) >= 3


def test_the_counts_of_well_known_solvers():
    times = sample.karras_grid(USED, 7)
    for make, calls in ((solver.ddpm, 7), (solver.ddim, 7), (solver.heun, 13), (solver.dpmpp_2m, 7)):
        assert sample.nfe(make(USED), times) == calls
    assert sample.nfe(solver.heun(USED), times[:-1]) == 12  # never reaches sigma = 0
    assert sample.nfe(solver.ddim(USED), sample.uniform_grid(USED, 1000)) == 1000
    assert jax.jit(lambda x: x * sample.nfe(solver.heun(USED), times))(1.0) == 13  # also while something is traced


def test_the_calls_of_an_adaptive_solver_are_those_of_the_denoiser_it_is_given():
    pytest.importorskip("diffrax")
    x, harder = jnp.ones((2, 3)), Gaussian(USED, 0.3, 1e-4)
    counts = []
    for data in (DATA, harder):
        solve = solver.adaptive(USED, rtol=1e-3, atol=1e-3)
        counts.append(sample.nfe(solve, [1.0, 0.0], denoise=data.denoise, x=x))
    assert 10 < counts[0] < counts[1] < 1000


def test_calls_are_counted_with_the_denoiser_given():
    def learned(x, t):
        return denoise.LearnedRange(x, jnp.zeros_like(x))

    ranged = solver.ddpm(USED, variance="learned_range")
    assert sample.nfe(ranged, sample.karras_grid(USED, 7), denoise=learned) == 7

    def step(key, denoise, x, t, s, memory):  # as many calls as it takes, like an adaptive solver
        return jax.lax.while_loop(lambda x: (x > 1).any(), lambda x: denoise(x, t), x), memory

    halving = Solver(lambda x: (), step)
    given = {"denoise": lambda x, t: x / 2, "x": jnp.full((2, 3), 8.0)}
    assert sample.nfe(halving, [1.0, 0.5, 0.0], **given) == counted_by_hand(halving, [1.0, 0.5, 0.0], **given) == 3


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
    with pytest.raises(errors.ConfigError, match=r"ddim.*call it with the schedule"):
        sample.sample(jax.random.key(0), DATA.denoise, jnp.zeros((2, 1)), times, solver.ddim)  # pyright: ignore
    with pytest.raises(errors.ConfigError, match="scalar"):
        sample.sample(jax.random.key(0), DATA.denoise, jnp.zeros(()), times, solve)
