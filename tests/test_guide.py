"""Guidance: identities at scale 1, what runs when, closed forms (tilted Gaussians), statistics per example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, guide, process, sample, schedule, solver
from jaxdiff.denoise import LearnedRange
from tests.oracles.compiles import counted
from tests.oracles.gaussian import Gaussian, Mixture

USED = schedule.cosine()
COND, UNCOND = Gaussian(USED, 0.5, 0.25).denoise, Gaussian(USED, 0.0, 1.0).denoise
T = jnp.float32(0.4)


def batch(rows=3, width=8, seed=0):
    return process.normal(jax.random.key(seed), (rows, width))


def never(x, t, *_):
    raise AssertionError("must not run")


def batched(x, t, cond):
    assert cond["shift"].shape[0] == x.shape[0]
    assert jnp.ndim(t) == 0 or t.shape[0] == x.shape[0]
    return COND(x, t) + cond["shift"]


def shifts(value, rows=3):
    return {"shift": jnp.full((rows, 1), value)}


GUIDED = {
    "cfg": guide.cfg(COND, UNCOND, 3.0),
    "cfg_phi": guide.cfg(COND, UNCOND, 3.0, phi=0.7),
    "cfg_batched": guide.cfg_batched(batched, shifts(0.3), shifts(0.0), 3.0),
    "autoguidance": guide.autoguidance(COND, UNCOND, 2.0),
    "interval": guide.interval(guide.cfg(COND, UNCOND, 3.0), COND, USED, sigma=(0.2, 5.0)),
    "rescale": guide.rescale(guide.cfg(COND, UNCOND, 3.0), COND),
    "static": guide.threshold_static(guide.cfg(COND, UNCOND, 3.0)),
    "dynamic": guide.threshold_dynamic(guide.cfg(COND, UNCOND, 3.0), 0.9),
    "classifier": guide.classifier(UNCOND, Gaussian(USED, 0.5, 0.25).log_prob, USED, 2.0),
}


@pytest.mark.parametrize("name", GUIDED)
def test_rows_do_not_change_each_other(name):
    x = batch()
    other = x * jnp.asarray([[1.0], [9.0], [-4.0]])
    for t in (T, jnp.asarray([0.4, 0.2, 0.9])):
        np.testing.assert_allclose(GUIDED[name](x, t)[0], GUIDED[name](other, t)[0], rtol=1e-6)


@pytest.mark.parametrize("name", GUIDED)
def test_scalar_and_batched_times_agree_in_the_whole_range_under_jit(name):
    x, run = batch(), jax.jit(GUIDED[name])
    for t in (0.0, 0.1, 0.4, 0.9, 1.0):
        one = run(x, jnp.float32(t))
        assert np.isfinite(one).all()
        assert one.shape == x.shape
        assert one.dtype == x.dtype
        np.testing.assert_allclose(one, run(x, jnp.full((3,), t, jnp.float32)), rtol=1e-5, atol=1e-6)


def test_scale_one_is_the_conditional_model_and_does_not_run_the_other():
    x = batch()
    np.testing.assert_array_equal(guide.cfg(COND, never, 1.0)(x, T), COND(x, T))
    np.testing.assert_array_equal(guide.cfg(COND, never, 1)(x, T), COND(x, T))
    np.testing.assert_array_equal(guide.autoguidance(COND, never, 1.0)(x, T), COND(x, T))
    np.testing.assert_array_equal(guide.cfg(never, UNCOND, 0.0)(x, T), UNCOND(x, T))
    np.testing.assert_array_equal(guide.classifier(COND, never, USED, 0.0)(x, T), COND(x, T))
    np.testing.assert_allclose(guide.cfg(COND, UNCOND, jnp.float32(1))(x, T), COND(x, T), rtol=1e-5, atol=1e-6)
    for scale, value in ((1.0, 0.3), (0.0, -0.2)):
        sizes = []

        def spy(x, t, cond, sizes=sizes):
            sizes.append(x.shape[0])
            return batched(x, t, cond)

        out = guide.cfg_batched(spy, shifts(0.3), shifts(-0.2), scale)(x, T)
        np.testing.assert_array_equal(out, COND(x, T) + value)
        assert sizes == [3]


def test_the_batched_form_is_one_call_and_the_same():
    x, sizes = batch(), []

    def spy(x, t, cond):
        sizes.append(x.shape[0])
        return batched(x, t, cond)

    for t in (T, jnp.asarray([0.4, 0.2, 0.9])):
        out = guide.cfg_batched(spy, shifts(0.3), shifts(-0.2), 4.0)(x, t)
        plain = guide.cfg(lambda x, t: COND(x, t) + 0.3, lambda x, t: COND(x, t) - 0.2, 4.0)(x, t)
        np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-6)
    assert sizes == [6, 6]


def test_a_scale_per_example_and_no_new_compilation():
    x = batch()
    run = jax.jit(lambda scale, x: guide.cfg(COND, UNCOND, scale)(x, T))
    scales = jnp.asarray([0.0, 1.0, 3.0])
    rows = [UNCOND(x, T)[0], COND(x, T)[1], guide.cfg(COND, UNCOND, 3.0)(x, T)[2]]
    np.testing.assert_allclose(run(scales, x), jnp.stack(rows), rtol=1e-5, atol=1e-6)
    other = scales + 1
    with counted() as compiled:
        run(other, x)
    assert compiled == []


def test_cfg_in_x0_is_cfg_in_eps():
    x, scale = batch(), 3.0
    alpha, sigma = USED.alpha(T), USED.sigma(T)
    eps_c, eps_u = ((x - alpha * d(x, T)) / sigma for d in (COND, UNCOND))
    in_eps = (x - sigma * (eps_u + scale * (eps_c - eps_u))) / alpha
    np.testing.assert_allclose(guide.cfg(COND, UNCOND, scale)(x, T), in_eps, rtol=1e-4, atol=1e-5)


def test_interval_is_in_sigma_over_alpha():
    x, other = batch(), guide.interval(COND, UNCOND, USED, sigma=(0.5, 2.0))
    edges = [float(USED.inverse(jnp.float32(-2 * np.log(s)))) for s in (0.45, 0.55, 1.9, 2.1)]
    for t, inside in zip(edges, (False, True, True, False), strict=True):
        np.testing.assert_allclose(other(x, jnp.float32(t)), (COND if inside else UNCOND)(x, jnp.float32(t)), rtol=1e-6)
    mixed = other(x, jnp.asarray(edges[:3]))
    for row, (t, inside) in enumerate(zip(edges[:3], (False, True, True), strict=True)):
        np.testing.assert_allclose(mixed[row], (COND if inside else UNCOND)(x, jnp.float32(t))[row], rtol=1e-6)


def test_interval_from_zero_or_to_infinity_includes_the_ends():
    x = batch()
    for used in (USED, schedule.rectified_flow(), schedule.ve()):
        always = guide.interval(COND, UNCOND, used, sigma=(0.0, np.inf))
        for t in (0.0, 0.5, 1.0):
            np.testing.assert_array_equal(always(x, jnp.float32(t)), COND(x, jnp.float32(t)))


def test_interval_runs_only_what_it_uses():
    times = sample.uniform_grid(USED, 10)
    calls = []

    def counting(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return COND(x, t)

    limited = guide.interval(counting, UNCOND, USED, sigma=(0.5, 2.0))
    jax.block_until_ready(sample.sample(jax.random.key(0), limited, batch(), times, solver.ddim(USED)))
    jax.effects_barrier()
    with np.errstate(divide="ignore"):
        sigma = np.asarray(
            USED.sigma(jnp.asarray(times[:-1], jnp.float32)) / USED.alpha(jnp.asarray(times[:-1], jnp.float32))
        )
    assert len(calls) == ((sigma > 0.5) & (sigma <= 2.0)).sum()


def test_rescale_gives_each_example_the_contrast_of_the_conditional():
    x, guided = batch(width=32), guide.cfg(COND, UNCOND, 5.0)
    full = guide.rescale(guided, COND, 1.0)(x, T)
    np.testing.assert_allclose(full.std(1), COND(x, T).std(1), rtol=1e-5)
    np.testing.assert_allclose(guide.rescale(guided, COND, 0.0)(x, T), guided(x, T), rtol=1e-6)
    half = guide.rescale(guided, COND, 0.5)(x, T)
    np.testing.assert_allclose(half, (full + guided(x, T)) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(guide.cfg(COND, UNCOND, 5.0, phi=0.5)(x, T), half, rtol=1e-6)
    flat = guide.rescale(lambda x, t: jnp.ones_like(x), COND, 0.7)(x, T)
    np.testing.assert_allclose(flat, 1.0, rtol=1e-6)


def test_thresholds():
    x = jnp.asarray([[0.5, -0.9, 0.1, 0.2], [4.0, -2.0, 0.4, 1.0]])
    same = lambda x, t: x  # noqa: E731
    np.testing.assert_array_equal(guide.threshold_static(same)(x, T), np.clip(x, -1, 1))
    np.testing.assert_array_equal(guide.threshold_static(same, 2.0)(x, T), np.clip(x, -2, 2))
    dynamic = guide.threshold_dynamic(same, 0.5)(x, T)
    np.testing.assert_array_equal(dynamic[0], x[0])  # inside [-1, 1]: untouched
    np.testing.assert_allclose(dynamic[1], np.clip(x[1], -1.5, 1.5) / 1.5, rtol=1e-6)  # the median of |x0| is 1.5
    np.testing.assert_allclose(np.abs(guide.threshold_dynamic(same, 1.0, 0.5)(x, T)).max(1), 0.5, rtol=1e-6)


def test_classifier_guidance_gives_the_conditional_of_a_mixture():
    # D_u + sigma^2 / alpha grad log p(k | x_t) is exactly the denoiser of component k.
    mixture = Mixture(USED, (0.3, 0.7), ((-1.0, 0.5), (0.8, -0.2)), (0.1, 0.3))
    log_prob = lambda x, t: jnp.log(mixture.responsibilities(x, t)[:, 0])  # noqa: E731
    component = Gaussian(USED, (-1.0, 0.5), 0.1)
    x = batch(5, 2)
    for t in (T, jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])):
        guided = guide.classifier(mixture.denoise, log_prob, USED)(x, t)
        np.testing.assert_allclose(guided, component.denoise(x, t), rtol=1e-3, atol=1e-3)


def test_classifier_guidance_is_finite_where_alpha_is_zero():
    used = schedule.rectified_flow()
    guided = guide.classifier(Gaussian(used).denoise, lambda x, t: -(x**2).sum(1), used)
    x = batch()
    np.testing.assert_array_equal(guided(x, jnp.float32(1)), Gaussian(used).denoise(x, jnp.float32(1)))
    assert np.isfinite(
        sample.sample(jax.random.key(1), guided, x, sample.uniform_grid(used, 3), solver.ddim(used))
    ).all()


def test_guidances_compose_in_sampling_with_finite_gradients():
    def total(scale):
        guided = guide.threshold_dynamic(guide.rescale(guide.cfg(COND, UNCOND, scale), COND))
        guided = guide.interval(guided, COND, USED, sigma=(0.1, 10.0))
        x = batch(2, 4)
        return sample.sample(jax.random.key(1), guided, x, sample.uniform_grid(USED, 3), solver.dpmpp_2m(USED)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.float32(4))
    assert np.isfinite(value)
    assert np.isfinite(gradient)
    assert gradient != 0


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1, -0.5, np.float32("nan"), np.asarray([1.0, -2.0])])
def test_unusable_scales_are_refused(scale):
    for call in (
        lambda: guide.cfg(COND, UNCOND, scale),
        lambda: guide.cfg_batched(batched, shifts(0.3), shifts(0.0), scale),
        lambda: guide.autoguidance(COND, UNCOND, scale),
        lambda: guide.classifier(COND, UNCOND, USED, scale),
    ):
        with pytest.raises(errors.ConfigError, match="guidance scale"):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: guide.rescale(COND, UNCOND, 1.5),
        lambda: guide.cfg(COND, UNCOND, 2.0, phi=float("nan")),
        lambda: guide.threshold_static(COND, 0.0),
        lambda: guide.threshold_dynamic(COND, 1.5),
        lambda: guide.threshold_dynamic(COND, 0.9, -1.0),
        lambda: guide.interval(COND, UNCOND, USED, sigma=(2.0, 1.0)),
    ],
)
def test_other_unusable_settings_are_refused(call):
    with pytest.raises(errors.ConfigError):
        call()


def learned(denoise, fraction):
    return lambda x, t, *cond: LearnedRange(denoise(x, t, *cond), jnp.full_like(x, fraction))


GOOD, BAD = learned(COND, 0.3), learned(UNCOND, 0.8)
LEARNED = {
    "cfg": guide.cfg(GOOD, BAD, 3.0),
    "cfg_phi": guide.cfg(GOOD, BAD, 3.0, phi=0.7),
    "cfg_batched": guide.cfg_batched(learned(batched, 0.3), shifts(0.3), shifts(0.0), 3.0),
    "autoguidance": guide.autoguidance(GOOD, BAD, 2.0),
    "interval": guide.interval(guide.cfg(GOOD, BAD, 3.0), GOOD, USED, sigma=(0.2, 5.0)),
    "rescale": guide.rescale(guide.cfg(GOOD, BAD, 3.0), GOOD),
    "static": guide.threshold_static(guide.cfg(GOOD, BAD, 3.0)),
    "dynamic": guide.threshold_dynamic(guide.cfg(GOOD, BAD, 3.0), 0.9),
    "classifier": guide.classifier(learned(UNCOND, 0.3), Gaussian(USED, 0.5, 0.25).log_prob, USED, 2.0),
}


@pytest.mark.parametrize("name", GUIDED)
def test_a_learned_variance_passes_through_and_is_that_of_the_condition(name):
    x = batch()
    for t in (T, jnp.asarray([0.4, 0.01, 0.9])):
        answer = LEARNED[name](x, t)
        np.testing.assert_array_equal(answer.x0, GUIDED[name](x, t))
        np.testing.assert_array_equal(answer.fraction, np.full(x.shape, np.float32(0.3)))


def test_guided_sampling_with_a_learned_variance_of_fraction_zero_is_fixed_small():
    x, times = batch(), sample.uniform_grid(USED, 3)
    given = [guide.cfg(learned(COND, 0.0), BAD, 3.0), guide.cfg(COND, UNCOND, 3.0)]
    made = [solver.ddpm(USED, variance="learned_range"), solver.ddpm(USED)]
    out = [
        sample.sample(jax.random.key(1), guide.threshold_static(d), x, times, m)
        for d, m in zip(given, made, strict=True)
    ]
    np.testing.assert_allclose(out[0], out[1], rtol=1e-5, atol=1e-6)
