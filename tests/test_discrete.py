"""Discrete processes against enumeration: matrices, entropies, chi-squares, and a network that learns the bits."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import discrete, nets, schedule
from jaxdiff.discrete import bound, forward, keep, unmask
from jaxdiff.errors import ConfigError
from tests.oracles.discrete import bayes, chi_square, heartbeat, markov, noise_of, transition

key = jax.random.key
SCHEDULES = {
    "linear": (discrete.linear(), lambda t: 1 - t),
    "cosine": (discrete.cosine(), lambda t: 1 - np.cos(np.pi / 2 * (1 - t))),
    "polynomial": (discrete.polynomial(3.0), lambda t: 1 - t**3),
    "root": (discrete.polynomial(0.5), lambda t: 1 - np.sqrt(t)),
    "geometric": (discrete.geometric(), lambda t: np.exp(-(1e-4 ** (1 - t)) * 20**t + 1e-4)),  # but for its end
}
PROCESSES = {"masked": discrete.masked, "uniform": discrete.uniform}
CHAIN, ENTROPY = markov()
BEAT = heartbeat()
ONE = {"masked": discrete.masked(3), "uniform": discrete.uniform(3)}


def shared(b, seed=0):
    """The same key for each of b examples: one path for all of them."""
    return jax.vmap(lambda _: key(seed))(jnp.arange(b))


def all_pairs(vocab, states):
    """x0 and x_t (vocab * states, 1): every pair."""
    x0, x_t = np.divmod(np.arange(vocab * states), states)
    return jnp.asarray(x0[:, None]), jnp.asarray(x_t[:, None])


# Schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_their_formulas_with_exact_ends(name):
    schedule, formula = SCHEDULES[name]
    ends = jnp.array([0.0, 1.0])
    assert schedule.keep(ends).tolist() == [1.0, 0.0]
    assert schedule.lost(ends).tolist() == [0.0, 1.0]
    assert schedule.inverse(ends).tolist() == [0.0, 1.0]
    with jax.enable_x64(True):
        t = jnp.linspace(0.001, 0.999, 50)
        np.testing.assert_allclose(schedule.keep(t), formula(np.asarray(t)), atol=3e-9)
        np.testing.assert_allclose(schedule.keep(t) + schedule.lost(t), 1.0, rtol=1e-12)
        np.testing.assert_allclose(schedule.inverse(schedule.lost(t)), t, rtol=1e-6)
        slope = (schedule.lost(t + 1e-6) - schedule.lost(t - 1e-6)) / 2e-6
        np.testing.assert_allclose(keep.loss_rate(schedule, t), slope, rtol=1e-5, atol=1e-9)
    assert np.all(np.isfinite(keep.loss_rate(schedule, ends)))
    tiny = np.float32(1e-6)  # each is precise where it is small: no cancellation against 1
    with jax.enable_x64(True):
        wide = schedule.lost(jnp.asarray(float(tiny))), schedule.keep(1 - jnp.asarray(2.0**-20))
    assert float(schedule.lost(jnp.asarray(tiny))) == pytest.approx(float(wide[0]), rel=1e-4)
    assert float(schedule.keep(jnp.asarray(1 - 2.0**-20))) == pytest.approx(float(wide[1]), rel=1e-4)


def test_what_a_small_step_gains_is_precise_at_both_ends():
    """In float32 keep(s) - keep(t) is 0 near t = 0, and lost(t) - lost(s) near t = 1."""
    process, like = discrete.masked(2, discrete.cosine()), jnp.zeros((1, 1))
    for t, s in ((1.0, 1 - 2.0**-14), (2.0**-25, 2.0**-26)):
        want = np.cos(np.pi / 2 * (1 - t)) - np.cos(np.pi / 2 * (1 - s))
        np.testing.assert_allclose(process.gained(jnp.asarray(t), jnp.asarray(s), like), want, rtol=1e-3)


def test_linear_is_the_binomial_schedule_of_2015():
    T = 50
    chain = np.cumprod(1 - 1 / (T - np.arange(1, T + 1) + 1))
    np.testing.assert_allclose(discrete.binomial().keep(jnp.arange(1, T + 1) / T), chain, atol=1e-6)


# The forward process and its posterior


@pytest.mark.parametrize("name", PROCESSES)
def test_q_sample_has_the_marginals_of_its_matrix(name):
    process = PROCESSES[name](3, discrete.cosine())
    x0 = jnp.broadcast_to(jnp.array([[0, 1, 2]]), (20_000, 3))
    for t in (0.2, 0.7):
        x_t = np.asarray(jax.jit(lambda k, t: discrete.q_sample(k, process, x0, t))(key(0), jnp.asarray(t)))
        want = transition(float(process.keep(jnp.asarray(t))), noise_of(process))
        seen = np.stack([(x_t == v).mean(0) for v in range(process.states)], axis=-1)
        assert np.all(np.abs(seen - want[:3]) < 4.5 * np.sqrt(want[:3] * (1 - want[:3]) / 20_000) + 1e-9)
        assert np.abs(np.corrcoef((x_t == x0).T)[np.triu_indices(3, 1)]).max() < 0.03  # tokens are independent
    assert jnp.all(discrete.q_sample(key(1), process, x0, 0.0) == x0)
    noise = np.asarray(discrete.prior(key(2), process, (5_000, 3)))
    seen = np.array([(noise == v).mean() for v in range(process.states)])
    np.testing.assert_allclose(seen, noise_of(process), atol=0.02)
    assert noise.dtype == np.int32


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_posterior_is_bayes_rule_by_matrices(name, schedule):
    with jax.enable_x64(True):
        process = PROCESSES[name](4, SCHEDULES[schedule][0])
        x0, x_t = all_pairs(4, process.states)
        run = jax.jit(lambda t, s: discrete.q_posterior(process, x0, x_t, jnp.full(len(x0), t), s))
        for t, s in ((0.9, 0.4), (0.5, 0.45), (0.1, 0.02), (1.0, 0.5), (1.0, 0.999)):
            k_t, k_s = (float(process.keep(jnp.asarray(u, jnp.float64))) for u in (t, s))
            want = bayes(process, k_t, k_s)
            got = np.asarray(run(jnp.float64(t), jnp.float64(s))).reshape(want.shape)
            possible = np.isfinite(want)
            np.testing.assert_allclose(got[possible], want[possible], rtol=1e-7, atol=1e-12)
        other = discrete.q_posterior(process, x0, x_t, jnp.float64(0.6), jnp.float64(0.1))
        want = bayes(process, *(float(process.keep(jnp.float64(u))) for u in (0.6, 0.3)))  # another s: noticed
        assert np.nanmax(np.abs(np.asarray(other).reshape(want.shape) - want)) > 1e-3


@pytest.mark.parametrize("name", PROCESSES)
def test_the_model_posterior_is_the_mean_of_the_posterior(name):
    """p(x_s | x_t) = sum_x0 q(x_s | x_t, x0) p(x0 | x_t), for noise x_t (what a token is, masked knows)."""
    process = PROCESSES[name](3)
    with jax.enable_x64(True):
        logits = jax.random.normal(key(0), (1, process.states, 3), jnp.float64)
        x_t = jnp.arange(process.states)[None]
        got = discrete.p_posterior(process, logits, x_t, jnp.asarray(0.7, jnp.float64), jnp.asarray(0.4, jnp.float64))[
            0
        ]
        chances = np.asarray(jax.nn.softmax(logits))[0]
    want = np.einsum("jts,tj->ts", np.nan_to_num(bayes(process, 0.3, 0.6)), chances)
    rows = [process.vocab] if name == "masked" else range(3)
    np.testing.assert_allclose(got[jnp.asarray(list(rows))], want[list(rows)], rtol=1e-6)
    if name == "masked":
        np.testing.assert_allclose(got[:3], np.eye(3, 4), atol=1e-12)


def test_from_net_is_the_parameterisation_of_d3pm():
    """Equation 4 of D3PM, with the matrices: p(x_s | x_t) ~ Q_st[x_s, x_t] sum_x0 Q_s[x0, x_s] softmax(net)."""
    for process in (discrete.masked(3), discrete.uniform(3)):
        noise, t, s = noise_of(process), 0.7, 0.4
        raw = jax.random.normal(key(0), (1, process.states, 3))
        x_t = jnp.arange(process.states)[None]

        @jax.jit
        def run(x_t, t, s):
            logits = discrete.from_net(lambda x, t: raw, process)(x_t, t)  # noqa: B023
            return [discrete.p_posterior(process, v, x_t, t, s)[0] for v in (logits, raw)]  # noqa: B023

        got, bare = run(x_t, jnp.asarray(t), jnp.asarray(s))
        want = transition(0.3 / 0.6, noise).T * (np.asarray(jax.nn.softmax(raw))[0] @ transition(0.6, noise)[:3])
        np.testing.assert_allclose(got, want / want.sum(1, keepdims=True), rtol=2e-5, atol=1e-7)
        if process.states == 3:  # the logits of a posterior are not those of equation 4: the wrapper matters
            assert np.abs(bare - got).max() > 0.05


@pytest.mark.parametrize("schedule", ["linear", "root", "geometric"])
@pytest.mark.parametrize("name", PROCESSES)
def test_everything_is_finite_at_both_ends(name, schedule):
    process = PROCESSES[name](3, SCHEDULES[schedule][0])
    x0, x_t = (jnp.repeat(x, 6, axis=0) for x in all_pairs(3, process.states))
    t = jnp.tile(jnp.array([1.0, 1.0, 0.5, 0.0, 1.0, 1e-7]), len(x0) // 6)
    s = jnp.tile(jnp.array([0.0, 0.5, 0.0, 0.0, 1.0, 0.0]), len(x0) // 6)

    def losses(logits):
        return discrete.kl(process, logits, x0, x_t, t, s), discrete.rate(process, logits, x0, x_t, t)

    @jax.jit
    def run(logits):
        values, back = jax.vjp(losses, logits)
        ones = jnp.ones_like(values[0])
        gradients = back((ones, jnp.zeros_like(ones))), back((jnp.zeros_like(ones), ones))
        return discrete.p_posterior(process, logits, x_t, t, s), values, gradients

    p, values, gradients = run(jax.random.normal(key(0), (len(x0), 1, 3)))
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-5)
    assert all(np.all(np.isfinite(v)) and np.all(v >= 0) for v in (p, *values))
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(gradients))
    same = jnp.tile(jnp.array([0, 0, 0, 1, 1, 0], bool), len(x0) // 6)
    np.testing.assert_allclose(p[same, 0], np.eye(process.states)[x_t[same, 0]], atol=1e-6)


# The loss


@pytest.mark.parametrize("name", PROCESSES)
def test_the_kl_of_a_step_is_that_of_its_posteriors_and_the_rate_its_limit(name):
    process = PROCESSES[name](4, discrete.cosine())
    with jax.enable_x64(True):
        x0, x_t = all_pairs(4, process.states)
        possible = np.asarray((x_t == process.vocab) | (x_t == x0) if name == "masked" else x0 >= 0)[:, 0]
        x0, x_t = x0[possible], x_t[possible]
        logits = jax.random.normal(key(1), (len(x0), 1, 4), jnp.float64) * 3
        kl = jax.jit(lambda t, s: discrete.kl(process, logits, x0, x_t, t, s))
        rate = jax.jit(lambda t: discrete.rate(process, logits, x0, x_t, t))
        posteriors = jax.jit(
            lambda t, s: (
                discrete.q_posterior(process, x0, x_t, t, s),
                discrete.p_posterior(process, logits, x_t, t, s),
            )
        )
        for t, s in ((0.8, 0.5), (0.3, 0.29), (0.2, 0.0)):
            t, s = jnp.asarray(t, jnp.float64), jnp.asarray(s, jnp.float64)
            q, p = posteriors(t, s)
            q, p = np.asarray(q), np.asarray(p)
            want = np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / np.where(q > 0, p, 1)), 0).sum((1, 2))
            np.testing.assert_allclose(kl(t, s), want, rtol=1e-8, atol=1e-12)
        for u in (0.05, 0.5, 0.97):
            t = jnp.asarray(u, jnp.float64)
            limit = kl(t, t - 1e-7) / 1e-7
            np.testing.assert_allclose(rate(t), limit, rtol=2e-4, atol=1e-6)


def test_the_masked_loss_is_that_of_md4():
    """-alpha' / (1 - alpha) times the cross entropy of the masked tokens, alpha = 1 - sin(pi t / 2), in NumPy."""
    process = discrete.masked(5, discrete.cosine())
    x0, logits = jax.random.randint(key(0), (6, 7), 0, 5), jax.random.normal(key(1), (6, 7, 5))
    t = np.linspace(0.1, 0.95, 6).astype(np.float32)
    x_t = discrete.q_sample(key(2), process, x0, jnp.asarray(t))
    log_p = np.asarray(logits) - np.log(np.exp(np.asarray(logits)).sum(-1, keepdims=True))
    entropy = -np.take_along_axis(log_p, np.asarray(x0)[..., None], -1)[..., 0] * (np.asarray(x_t) == 5)
    want = np.pi / 2 / np.tan(np.pi / 2 * t) * entropy.mean(1)
    got = jax.jit(lambda t: discrete.rate(process, logits, x0, x_t, t))(jnp.asarray(t))
    assert got.shape == (6,)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_mean_loss_is_the_bound(name):
    process = ONE[name]
    x0 = jnp.asarray(CHAIN.draw(20_000))
    values = jax.jit(lambda k: discrete.loss(k, CHAIN.denoiser(process), x0, process))(key(0))
    nats = float(values.mean()), float(values.std()) / math.sqrt(len(x0))
    assert abs(nats[0] - ENTROPY * math.log(2) / 4) < 4 * nats[1]
    assert nats[1] < 0.02


# The bound


def test_in_any_order_the_exact_denoiser_scores_exactly():
    """The chain rule: -log2 p(x0) for every sequence on every path, so the bound is the entropy, with no error."""
    x0 = jnp.asarray(CHAIN.sequences)
    run = jax.jit(lambda k: discrete.any_order_bound(k, CHAIN.denoiser(ONE["masked"]), x0, ONE["masked"]))
    for seed in range(3):
        np.testing.assert_allclose(run(key(seed)) * 4, -np.log2(CHAIN.chances), rtol=2e-5)
    assert CHAIN.chances @ np.asarray(run(key(9))) * 4 == pytest.approx(ENTROPY, rel=1e-5)


def test_the_masked_bound_of_T_steps_is_never_below_the_entropy_and_reaches_it():
    process, x0 = ONE["masked"], jnp.asarray(CHAIN.sequences)
    denoise = CHAIN.denoiser(process)

    def run(T):
        @jax.jit
        def bits(k):
            return discrete.variational_bound(k, denoise, x0, process, T=T)

        return np.array([CHAIN.chances @ np.asarray(bits(shared(len(x0), seed)), np.float64) * 4 for seed in range(40)])

    marginals = CHAIN.marginals(3)
    independent = -(marginals * np.log2(marginals)).sum()
    np.testing.assert_allclose(run(1), independent, rtol=1e-5)  # one step: all tokens at once
    few, many = run(3), run(2000)
    for bits in (few, many):
        assert bits.min() > ENTROPY * (1 - 1e-5)  # on every path
        assert bits.max() < independent * (1 + 1e-5)
    assert ENTROPY * 1.01 < few.mean() < independent
    assert many.mean() < ENTROPY * 1.01


def test_the_uniform_bound_of_T_steps_by_enumeration():
    """Every x0, x_t and step: the exact bound. From the independent marginals at T = 1 down to the entropy."""
    process, (data, entropy) = ONE["uniform"], markov(n=3)
    m = len(data.sequences)
    x0, x_t = (jnp.asarray(data.sequences[i]) for i in np.divmod(np.arange(m * m), m))
    denoise = data.denoiser(process)

    @jax.jit
    def step(t, s):
        chance = jnp.prod(jnp.where(x0 == x_t, 1 - t + t / 3, t / 3), axis=1)
        return chance * discrete.kl(process, denoise(x_t, t), x0, x_t, t, s) * 3 / math.log(2)

    def exact(T):
        times = jnp.arange(T + 1, dtype=jnp.float32) / T
        terms = jax.lax.map(lambda u: step(*u), (times[1:], times[:-1]))
        return data.chances @ np.sum(np.asarray(terms, np.float64), 0).reshape(m, m).sum(1)

    marginals = data.marginals(3)
    bits = {T: exact(T) for T in (1, 2, 8, 256)}
    assert bits[1] == pytest.approx(-(marginals * np.log2(marginals)).sum(), rel=1e-4)
    assert list(bits.values()) == sorted(bits.values(), reverse=True)
    assert entropy < bits[256] < entropy * 1.01
    assert bits[8] > entropy * 1.02

    @jax.jit
    def slope(t):
        chance = jnp.prod(jnp.where(x0 == x_t, 1 - t + t / 3, t / 3), axis=1)
        return chance * discrete.rate(process, denoise(x_t, t), x0, x_t, t) * 3 / math.log(2)

    v, weights = np.polynomial.legendre.leggauss(60)
    v = (v + 1) / 2  # t = v^3: the rate has a logarithm at t = 0
    rates = np.asarray(jax.lax.map(slope, jnp.asarray(v**3, jnp.float32)), np.float64).reshape(60, m, m).sum(2)
    integral = (weights / 2 * 3 * v**2) @ rates @ data.chances
    assert integral == pytest.approx(entropy, rel=2e-3)  # the continuous limit is the entropy itself
    drawn = jnp.asarray(data.draw(4_000))
    got = jax.jit(lambda k: discrete.variational_bound(k, denoise, drawn, process, T=8))(key(0)) * 3
    assert abs(float(got.mean()) - bits[8]) < 4 * float(got.std()) / math.sqrt(4_000)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_continuous_bound_is_the_entropy(name):
    """Exact in the limit for both: one token changes at a time, so nothing is lost by drawing each by itself."""
    process = PROCESSES[name](3, discrete.geometric() if name == "masked" else discrete.cosine())
    x0 = jnp.asarray(np.tile(CHAIN.sequences, (20, 1)))
    run = jax.jit(lambda k: discrete.continuous_bound(k, CHAIN.denoiser(process), x0, process, num_times=100))
    bits = np.asarray(run(key(0)), np.float64).reshape(20, 81) @ CHAIN.chances * 4  # no error of sampling x0
    assert abs(bits.mean() - ENTROPY) < 4 * bits.std() / math.sqrt(20) < 0.15 * ENTROPY


def test_the_continuous_bound_of_a_guess_is_that_of_the_vocabulary():
    """Equal logits cost log2 V bits a token, at any number of times."""
    process, x0 = ONE["masked"], jnp.zeros((4_000, 64), jnp.int32)
    bits = discrete.continuous_bound(key(0), lambda x, t: jnp.zeros((*x.shape, 3)), x0, process, num_times=2)
    assert abs(float(bits.mean()) - math.log2(3)) < 4 * float(bits.std()) / math.sqrt(4_000) < 0.1


@pytest.mark.parametrize("name", ["masked", "binomial"])
def test_the_heartbeat_has_2_32_bits(name):
    """Sohl-Dickstein et al. 2015 report at most 2.414 bits; with the exact denoiser the bound is log2 5 = 2.322."""
    process = discrete.masked(2) if name == "masked" else discrete.binomial()
    denoise, truth = BEAT.denoiser(process), math.log2(5)
    x0 = jnp.asarray(np.tile(BEAT.sequences, (40, 1)))  # each phase as often as it comes: no error of sampling x0
    steps = jax.jit(lambda k: discrete.variational_bound(k, denoise, x0, process, T=1000))(key(0)) * 20
    limit = jax.jit(lambda k: discrete.continuous_bound(k, denoise, x0, process, num_times=200))(key(1)) * 20
    for bits in (steps, limit):
        mean, error = float(bits.mean()), float(bits.std()) / math.sqrt(len(x0))
        assert truth - 3 * error < mean < truth * 1.01 + 3 * error
        assert error < 0.01 * truth
    if name == "masked":
        paths = np.asarray(steps).reshape(40, 5)
        assert paths.min() > -1e-4
        exact = jax.jit(lambda k: discrete.any_order_bound(k, denoise, x0, process))(key(2)) * 20
        np.testing.assert_allclose(exact, truth, rtol=1e-5)
        one = discrete.variational_bound(shared(5), denoise, x0[:5], process, T=1) * 20
        assert float(one.mean()) == pytest.approx(20 * (math.log2(5) - 0.8 * 2), rel=1e-4)  # 20 H(1/5)


def test_a_worse_denoiser_has_a_worse_bound():
    process, x0 = ONE["masked"], jnp.asarray(CHAIN.sequences)
    log_p = jnp.log(jnp.asarray(CHAIN.marginals(3), jnp.float32))
    blind = discrete.any_order_bound(key(0), lambda x, t: jnp.broadcast_to(log_p[None], (*x.shape, 3)), x0, process)
    assert CHAIN.chances @ np.asarray(blind) * 4 > ENTROPY * 1.1


# Samplers


def law_of_one_step(data, vocab):
    marginals = data.marginals(vocab)
    return np.prod([marginals[i][data.sequences[:, i]] for i in range(data.sequences.shape[1])], axis=0)


@pytest.mark.parametrize("name", ["ancestral masked", "ancestral uniform", "first_hitting"])
def test_many_steps_draw_the_data_and_one_step_draws_independent_tokens(name):
    process = ONE[name.split()[-1] if " " in name else "masked"]
    denoise = CHAIN.denoiser(process)
    x = discrete.prior(key(0), process, (2_500, 4))

    @jax.jit
    def run(k, times):
        if name == "first_hitting":
            return discrete.first_hitting(k, denoise, x, process)
        return discrete.ancestral(k, denoise, x, times, process)

    one, true = law_of_one_step(CHAIN, 3), CHAIN.chances
    many = np.asarray(run(key(1), jnp.asarray(discrete.grid(300))))
    assert chi_square(many, CHAIN.sequences, true) < 4
    assert chi_square(many, CHAIN.sequences, one) > 20
    if name != "first_hitting":
        single = np.asarray(run(key(2), jnp.asarray(discrete.grid(1))))
        assert chi_square(single, CHAIN.sequences, one) < 4
        assert chi_square(single, CHAIN.sequences, true) > 20


def counted(denoise):
    """The denoiser, and the list that grows with each call of it."""
    calls = []

    def count(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return denoise(x, t)

    return count, calls


def calls_of(calls):
    jax.effects_barrier()
    number = len(calls)
    calls.clear()
    return number


@pytest.mark.parametrize("num_steps", [3, 200])
def test_the_cached_sampler_makes_the_same_draws_with_fewer_calls(num_steps):
    """Not a likeness: the same tokens. Also for a denoiser that depends on time, and with prompts."""
    process, b, n = discrete.masked(3, discrete.cosine()), 16, 8
    place = jnp.arange(n * 3, dtype=jnp.float32).reshape(1, n, 3)
    denoise, calls = counted(lambda x, t: jnp.sin((jnp.sum(x, 1).astype(jnp.float32) + 9 * t)[:, None, None] * place))
    x = discrete.prior(key(0), process, (b, n)).at[3].set(1).at[5, :4].set(2)
    times = jnp.asarray(discrete.grid(num_steps))
    plain = jax.jit(lambda k: discrete.ancestral(k, denoise, x, times, process))(key(1))
    assert calls_of(calls) == num_steps
    fast = jax.jit(lambda k: discrete.cached(k, denoise, x, times, process))(key(1))
    number = calls_of(calls)
    np.testing.assert_array_equal(plain, fast)
    assert number <= min(num_steps, n)
    assert fast[5, :4].tolist() == [2] * 4  # the prompts
    assert fast[3].tolist() == [1] * n
    jax.jit(lambda k: discrete.cached(k, denoise, x[5:6], times, process))(key(1))
    assert 1 <= calls_of(calls) <= 4
    if num_steps == 3:
        discrete.cached(key(2), denoise, fast, times, process)
        assert calls_of(calls) == 0  # nothing is masked
        discrete.first_hitting(key(2), denoise, x, process)
        assert calls_of(calls) == n
    else:
        discrete.variational_bound(key(3), denoise, fast, process, T=num_steps)
        assert calls_of(calls) <= n


def test_a_plan_that_leaves_a_step_out_is_noticed():
    """The guard of the equality: without the last of its steps, a token stays masked."""
    process = ONE["masked"]
    x, times = discrete.prior(key(0), process, (4, 6)), jnp.asarray(discrete.grid(50), jnp.float32)
    plan = unmask.compact(unmask.on_grid(shared(4), process, x, times))
    broken = plan._replace(steps=plan.steps[:2], t=plan.t[:2])
    for p, full in ((plan, True), (broken, False)):
        out, _ = unmask.follow(lambda x, t: jnp.zeros((*x.shape, 3)), process, x, p, lambda s, l: 0 * x, skip=True)
        assert bool(jnp.all(out == 0)) == full


def test_tokens_are_unmasked_by_the_schedule():
    """The share of tokens filled in by time s is keep(s), in the plan of a grid and in the hitting times."""
    process = discrete.masked(3, discrete.cosine())
    x = discrete.prior(key(0), process, (2000, 10))
    times = jnp.asarray(discrete.grid(10), jnp.float32)
    step_of = np.asarray(unmask.on_grid(jax.random.split(key(1), 2000), process, x, times).step_of)
    for i in range(1, 11):
        assert abs((step_of < i).mean() - np.asarray(1 - np.sin(np.pi / 2 * (1 - i / 10)))) < 0.012
    plan = unmask.by_hitting(jax.random.split(key(2), 2000), process, x)
    assert np.all(np.sort(plan.step_of, axis=1) == np.arange(10))
    assert np.all(np.diff(plan.t, axis=0) <= 0)
    for u in (0.1, 0.5, 0.9):
        assert abs((np.asarray(plan.t) > u).mean() - (1 - np.sin(np.pi / 2 * u))) < 0.012


def test_a_grid_may_start_in_the_middle():
    """From t = 1/2 to 1/4 half of the masks go, as in q(x_s | x_t), and not a third: those of t > 1/2 are not there."""
    process, times = ONE["masked"], jnp.array([0.5, 0.25, 0.0])
    x = discrete.prior(key(0), process, (500, 20))
    step_of = unmask.on_grid(jax.random.split(key(1), 500), process, x, times).step_of
    assert abs(float((step_of == 0).mean()) - 0.5) < 0.02
    left = []

    def denoise(x, t):
        jax.debug.callback(lambda x: left.append(int((x == 3).sum())), x)
        return jnp.zeros((*x.shape, 3))

    discrete.confident(key(2), denoise, x[:1], times, process)
    jax.effects_barrier()
    assert left == [20, 10]


def test_confident_with_one_token_a_step_is_the_argmax_chain():
    process = ONE["masked"]
    data, _ = markov(3, 6, seed=5)
    denoise = jax.jit(data.denoiser(process))
    x = discrete.prior(key(0), process, (1, 6)).at[0, 2].set(1)
    got = discrete.confident(key(1), denoise, x, discrete.grid(5), process, temperature=0.0)
    want = np.array(x)
    for _ in range(5):
        log_p = np.asarray(denoise(jnp.asarray(want), jnp.asarray(0.5)))[0]
        log_p = np.where((want[0] == 3)[:, None], log_p, -np.inf)
        i, v = np.unravel_index(log_p.argmax(), log_p.shape)
        want[0, i] = v
    np.testing.assert_array_equal(got, want)


def test_confident_fills_by_the_schedule_and_the_surest_first():
    process = discrete.masked(3, discrete.cosine())
    n, num_steps = 20, 7
    lean = jnp.arange(n, dtype=jnp.float32)[None, :, None] * jnp.array([0.0, 0.0, 0.3])[None, None]  # surest at the end
    left = []

    def denoise(x, t):
        jax.debug.callback(lambda x: left.append(np.asarray(x == 3)), x)
        return jnp.broadcast_to(lean, (*x.shape, 3))

    x = discrete.prior(key(0), process, (3, n)).at[1, :10].set(0)
    out = discrete.confident(key(1), denoise, x, discrete.grid(num_steps), process, temperature=0.0)
    jax.effects_barrier()
    share = np.sin(np.pi / 2 * (1 - np.arange(num_steps) / num_steps))
    np.testing.assert_array_equal([m[0].sum() for m in left], np.round(share * n))
    np.testing.assert_array_equal([m[1].sum() for m in left], np.round(share * 10))
    assert all(np.all(np.diff(m[0].astype(int)) <= 0) for m in left)  # masks are left at the front
    assert int(out.max()) == 2
    left.clear()
    noisy = [
        discrete.confident(key(s), denoise, x, discrete.grid(2), process, choice_temperature=50.0) for s in range(3)
    ]
    jax.effects_barrier()
    assert not np.all(np.diff(left[1][0].astype(int)) <= 0)  # a hot choice does not go by confidence
    assert len({tuple(np.asarray(v[0]).tolist()) for v in noisy}) > 1
    left.clear()
    discrete.confident(key(0), denoise, x, discrete.grid(200), process)
    jax.effects_barrier()
    assert len(left) <= n + 10  # steps that fill nothing call nothing


SAMPLERS = {
    "ancestral": discrete.ancestral,
    "cached": discrete.cached,
    "confident": discrete.confident,
    "first_hitting": lambda key, denoise, x, times, process: discrete.first_hitting(key, denoise, x, process),
}


@pytest.mark.parametrize("name", [*SAMPLERS, "ancestral uniform"])
def test_examples_are_independent_and_jit_changes_nothing(name):
    """At 1, 2, 3 and 50 steps: valid tokens; an example is the same alone, elsewhere in a batch, and outside jit."""
    process = ONE["uniform" if "uniform" in name else "masked"]
    sampler, denoise = SAMPLERS[name.split()[0]], CHAIN.denoiser(process)
    x, keys = discrete.prior(key(0), process, (5, 4)), lambda order: jax.random.split(key(1), 5)[order]
    same = jnp.arange(5)
    run = jax.jit(lambda keys, x, times: sampler(keys, denoise, x, times, process))
    for num_steps in (1, 2, 3, 50):
        times = jnp.asarray(discrete.grid(num_steps), jnp.float32)
        out = run(keys(same), x, times)
        assert out.dtype == jnp.int32
        assert 0 <= int(out.min()) <= int(out.max()) < 3
        order = jnp.array([3, 1, 4, 0, 2])
        np.testing.assert_array_equal(run(keys(order), x[order], times), out[order])
        other = jnp.where(jnp.arange(5)[:, None] == 2, x, (x + 1) % 3)
        np.testing.assert_array_equal(run(keys(same), other, times)[2], out[2])
        if num_steps == 3:
            np.testing.assert_array_equal(sampler(keys(same), denoise, x, discrete.grid(3), process), out)


def test_a_sampler_that_mixes_examples_is_noticed():
    def mixing(x, t):
        return CHAIN.denoiser(ONE["masked"])(x, t) + jnp.mean(x.astype(jnp.float32)) * jnp.arange(3.0)[None, None]

    x = discrete.prior(key(0), ONE["masked"], (5, 4))
    out = discrete.ancestral(key(1), mixing, x, discrete.grid(3), ONE["masked"])
    other = discrete.ancestral(key(1), mixing, x.at[:2].set(0), discrete.grid(3), ONE["masked"])
    assert not np.array_equal(out[2:], other[2:])


@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_and_the_bounds_of_an_example_do_not_depend_on_the_others(name):
    process = ONE[name]
    x0, denoise = jnp.asarray(CHAIN.sequences[:6]), CHAIN.denoiser(process)
    runs = [
        jax.jit(lambda k, x: discrete.variational_bound(k, denoise, x, process, T=5)),
        jax.jit(lambda k, x: discrete.continuous_bound(k, denoise, x, process, num_times=5)),
    ]
    runs += [jax.jit(lambda k, x: discrete.any_order_bound(k, denoise, x, process))] if name == "masked" else []
    for run in runs:
        out = run(key(0), x0)
        np.testing.assert_allclose(run(key(0), jnp.roll(x0, 1, 0).at[2].set(x0[2]))[2], out[2], rtol=1e-6)
        assert out.shape == (6,)
        assert out.dtype == jnp.float32


def test_rare_tokens_come_up():
    """The usual Gumbel draw of a short float ends early, which cools every sampler; ours reaches its tail."""
    draws = np.asarray(forward.gumbel(key(0), (400_000,), jnp.float16), np.float64)
    usual = np.asarray(jax.random.gumbel(key(0), (400_000,), jnp.float16, mode="low"), np.float64)
    top = 8.5
    wanted = 400_000 * -np.expm1(-np.exp(-top))
    assert abs((draws > top).sum() - wanted) < 5 * np.sqrt(wanted)
    assert (usual > top).sum() == 0


# Gradients, a network, errors


@pytest.mark.parametrize("name", PROCESSES)
def test_gradients_of_the_loss_are_finite_and_equal_to_differences(name):
    process = ONE[name]
    x0 = jnp.asarray(CHAIN.sequences[:20])

    @jax.jit
    def mean(w, at):
        denoise = discrete.from_net(lambda x, t: jnp.broadcast_to(w[None], (*x.shape, 3)), process)
        return discrete.loss(
            key(0), denoise, x0, process, times=lambda k, b: jnp.broadcast_to(at, (b,)).astype(w.dtype)
        ).mean()

    both = jax.jit(jax.value_and_grad(mean))
    w = jax.random.normal(key(1), (4, 3)) * 3
    for at in (0.0, 1e-6, 0.5, 1.0):
        value, gradient = both(w, at)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
    with jax.enable_x64(True):
        w = w.astype(jnp.float64)
        gradient = both(w, 0.5)[1]
        for i, j in ((0, 1), (3, 2)):
            h = jnp.zeros_like(w).at[i, j].set(1e-5)
            slope = (mean(w + h, 0.5) - mean(w - h, 0.5)) / 2e-5
            np.testing.assert_allclose(gradient[i, j], slope, rtol=1e-5, atol=1e-8)


class Tiny(nn.Module):
    """An MLP over the tokens of a short sequence, one-hot, with the mask as one more state."""

    states: int
    vocab: int

    @nn.compact
    def __call__(self, x, t):
        b, n = x.shape
        hot = jax.nn.one_hot(x, self.states).reshape(b, n * self.states)
        return nets.MLP(width=128, depth=2, out_features=n * self.vocab)(hot, t).reshape(b, n, self.vocab)


@pytest.mark.parametrize("name", ["masked", "binomial"])
def test_a_network_learns_the_heartbeat(name):
    process = discrete.masked(2) if name == "masked" else discrete.binomial()
    model, data = Tiny(process.states, 2), jnp.asarray(BEAT.sequences)
    params = model.init(key(0), jnp.zeros((1, 20), jnp.int32), jnp.zeros(1))
    num_steps = 1000
    optimizer = optax.adam(lambda i: 4e-3 * (1 - i.astype(jnp.float32) / num_steps))

    def denoiser(params):
        return discrete.from_net(lambda x, t: model.apply(params, x, t), process)

    def step(carry, i):
        params, state = carry
        k = jax.random.fold_in(key(1), i)
        x0 = data[jax.random.randint(jax.random.fold_in(k, 0), (64,), 0, 5)]
        grad = jax.grad(lambda p: discrete.loss(jax.random.fold_in(k, 1), denoiser(p), x0, process).mean())(params)
        updates, state = optimizer.update(grad, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))[0][0]

    @jax.jit
    def judge(params):
        x0 = jnp.tile(data, (80, 1))
        if name == "masked":
            bits = discrete.any_order_bound(key(2), denoiser(params), x0, process) * 20
        else:
            bits = discrete.continuous_bound(key(2), denoiser(params), x0, process, num_times=100) * 20
        x = discrete.prior(key(3), process, (200, 20))
        return bits, discrete.ancestral(key(4), denoiser(params), x, jnp.asarray(discrete.grid(100)), process)

    with jax.numpy_dtype_promotion("standard"):  # Optax's own bias correction promotes
        params = jax.block_until_ready(train(params))
    bits, samples = jax.tree.map(np.asarray, judge(params))
    error = bits.std() / math.sqrt(len(bits))
    good = (samples[:, None] == BEAT.sequences[None]).all(-1).any(1).mean()
    print(name, bits.mean(), error, good)
    assert math.log2(5) - 3 * error < bits.mean() < math.log2(5) * 1.06
    assert good > 0.9


def test_errors_say_what_to_type():
    process, zeros = ONE["masked"], jnp.zeros((2, 4), jnp.int32)
    flat = lambda x, t: jnp.zeros((*x.shape, 3))  # noqa: E731
    times = discrete.grid(2)

    class Leaky:
        def keep(self, t):
            return 1 - 0.9 * t

    cases = [
        (lambda: discrete.masked(0), "vocab must be an integer >= 1, got 0"),
        (lambda: discrete.uniform(1), "vocab must be an integer >= 2, got 1"),
        (lambda: discrete.masked(True), "vocab"),
        (lambda: discrete.masked(3, Leaky()), "keep must be 1 at t = 0 and 0 at t = 1, got 1.0 and 0.1"),
        (lambda: discrete.masked(3, schedule.cosine()), "keep\\(t\\).*Cosine.*discrete.cosine"),
        (lambda: discrete.prior(key(0), process, (3,)), "shape must be \\(b, n\\), got \\(3,\\)"),
        (lambda: discrete.loss(key(0), flat, [0, 1], process), "x0 must be integer tokens"),
        (lambda: discrete.polynomial(0.0), "power must be positive"),
        (lambda: discrete.geometric(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: discrete.grid(0), "num_steps must be an integer >= 1, got 0"),
        (
            lambda: discrete.q_sample(key(0), process, zeros + 3, 0.5),
            "x0 must hold tokens from 0 to 2, got values from 3",
        ),
        (lambda: discrete.q_sample(key(0), process, zeros.astype(jnp.float32), 0.5), "integer tokens of shape"),
        (lambda: discrete.q_sample(key(0), process, zeros[0], 0.5), "shape \\(b, n\\), got int32 of shape \\(4,\\)"),
        (lambda: discrete.q_posterior(process, zeros, zeros + 4, 0.5, 0.2), "x_t must hold tokens from 0 to 3"),
        (lambda: discrete.ancestral(key(0), flat, zeros - 1, times, process), "got values from -1 to -1"),
        (lambda: discrete.ancestral(key(0), flat, zeros, times[::-1], process), "strictly decreasing"),
        (lambda: discrete.ancestral(key(0), flat, zeros, times[:1], process), "at least 2 times"),
        (
            lambda: discrete.ancestral(key(0), lambda x, t: jnp.zeros((2, 4, 4)), zeros, times, process),
            "never an output",
        ),
        (lambda: discrete.cached(key(0), flat, zeros, times, ONE["uniform"]), "cached needs discrete.masked"),
        (lambda: discrete.first_hitting(key(0), flat, zeros, ONE["uniform"]), "first_hitting needs"),
        (lambda: discrete.any_order_bound(key(0), flat, zeros, ONE["uniform"]), "continuous_bound"),
        (lambda: discrete.confident(key(0), flat, zeros, times, process, temperature=-1.0), "temperature must be"),
        (lambda: discrete.variational_bound(key(0), flat, zeros, process, T=0), "T must be an integer >= 1, got 0"),
        (lambda: discrete.continuous_bound(key(0), flat, zeros, process, num_times=1.5), "num_times must be"),
        (lambda: discrete.prior(jax.random.split(key(0), 3), process, (2, 4)), "one key or 2 keys"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


def test_the_oracles_can_fail():
    """A broken version of each: the chi-square, the entropy, the matrices, and the bound without its weight."""
    draws = CHAIN.draw(8_000)
    assert chi_square(draws, CHAIN.sequences, CHAIN.chances) < 4
    assert chi_square(np.where(np.arange(8_000)[:, None] % 20 == 0, 0, draws), CHAIN.sequences, CHAIN.chances) > 4
    assert chi_square(draws + 1, CHAIN.sequences, CHAIN.chances) == np.inf
    assert pytest.approx(ENTROPY, rel=1e-9) == CHAIN.entropy
    assert pytest.approx(math.log2(5)) == BEAT.entropy
    process = ONE["uniform"]
    np.testing.assert_allclose(bayes(process, 0.3, 0.6).sum(-1), 1.0)
    assert np.abs(bayes(process, 0.3, 0.6) - bayes(process, 0.3, 0.5)).max() > 0.02
    x0, x_t = jnp.asarray(CHAIN.sequences), discrete.q_sample(key(0), process, jnp.asarray(CHAIN.sequences), 0.5)
    rate = jax.jit(lambda t: bound.rate(process, CHAIN.denoiser(process)(x_t, jnp.asarray(0.5)), x0, x_t, t))
    assert np.abs(rate(jnp.asarray(0.6)) - rate(jnp.asarray(0.5))).max() > 0.01
