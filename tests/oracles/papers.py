"""The algorithms of the solvers as their papers print them, in NumPy, for `printed.Problem`: x after each step.

Coefficients are found here in other ways than in jaxdiff: Lagrange polynomials and closed integrals of exponentials,
the linear systems of the paper, printed fractions. Every last step, to sigma = 0, is D; where alpha = 0 nothing but a
step of DDIM is defined, and lambda is -40 (see `Levels.half_logsnr`).
"""

import itertools
import math

import numpy as np


def steps(update):
    """A paper from its update(p, x, t, s, memory) -> x, memory being a dict; to sigma = 0 it asks, and returns D."""

    def paper(p, **settings):
        x, memory = p.x, {}
        for t, s in p.steps():
            x = update(p, x, t, s, memory, **settings)
            yield x

    paper.update = update
    return paper


def clean_end(update):
    """`steps`, where the last step of the paper is not the algorithm's own but D."""

    def with_end(p, x, t, s, memory, **settings):
        return p.ask(x, t) if p.levels.sigma(s) == 0 else update(p, x, t, s, memory, **settings)

    return steps(with_end)


def ends(p, t, s):
    """alpha_t, sigma_t, alpha_s, sigma_s, h = lambda_s - lambda_t."""
    v = p.levels
    return v.alpha(t), v.sigma(t), v.alpha(s), v.sigma(s), v.half_logsnr(s) - v.half_logsnr(t)


def midway(p, t, s):
    return float(p.levels.time((p.levels.half_logsnr(t) + p.levels.half_logsnr(s)) / 2))


# Ancestral sampling


@clean_end
def ddpm(p, x, t, s, memory, share=0.0, log_variance=None):
    """Ho et al. 2020, eq. 6 and 7; share: of log beta in the log-variance (Nichol & Dhariwal 2021, eq. 15).

    share may be a function of the answer, as what a network has learned is; so is log_variance, where it is given.
    """
    alpha, sigma, alpha_s, sigma_s, _ = ends(p, t, s)
    x0, step = p.ask(x, t), alpha / alpha_s
    beta = sigma**2 - step**2 * sigma_s**2
    mean = alpha_s * beta / sigma**2 * x0 + step * sigma_s**2 / sigma**2 * x
    small = beta * sigma_s**2 / sigma**2
    share = share(x0) if callable(share) else share
    variance = beta**share * small ** (1 - share) if log_variance is None else np.exp(log_variance(x0))
    return mean + np.sqrt(variance) * p.draw(t, s)


@clean_end
def ddim(p, x, t, s, memory, eta=0.0):
    """Song et al. 2021, eq. 12 and 16, in alpha and sigma."""
    alpha, sigma, alpha_s, sigma_s, _ = ends(p, t, s)
    x0, eps = p.both(x, t)
    new = eta * sigma_s / sigma * np.sqrt(sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2)
    fresh = p.draw(t, s) if eta > 0 else 0.0
    return alpha_s * x0 + np.sqrt(sigma_s**2 - new**2) * eps + new * fresh


@clean_end
def euler_ancestral_rf(p, x, t, s, memory, eta=1.0):
    """ComfyUI's sample_euler_ancestral_RF, in x / (alpha + sigma) and its noise level."""
    alpha, sigma, alpha_s, sigma_s, _ = ends(p, t, s)
    level, following = sigma / (alpha + sigma), sigma_s / (alpha_s + sigma_s)
    x0 = p.ask(x, t)
    down = following * (1 + (following / level - 1) * eta)
    x = down / level * x / (alpha + sigma) + (1 - down / level) * x0
    up = np.sqrt(following**2 - (down * (1 - following) / (1 - down)) ** 2)
    return (alpha_s + sigma_s) * ((1 - following) / (1 - down) * x + up * p.draw(t, s))


@steps
def ddim_inversion(p, x, t, s, memory):
    """Song et al. 2021, sec. 4.3, run upwards, with one iteration of Pan et al. 2023 from the eps before (first: 0)."""
    alpha, sigma, alpha_s, sigma_s, _ = ends(p, t, s)
    carried = lambda eps: alpha_s * (x - sigma * eps) / alpha + sigma_s * eps  # noqa: E731
    memory["eps"] = p.both(carried(memory.get("eps", 0.0)), s)[1]
    return carried(memory["eps"])


# Runge-Kutta


def churned(p, x, t, gamma, noise_scale, sigma_range):
    """Karras et al. 2022, Algorithm 2, lines 4 to 6; alpha x of theirs is x here."""
    v, rho = p.levels, p.levels.rho(t)
    if gamma == 0:
        return x, t
    draw = p.draw()
    raised = (1 + gamma) * rho if sigma_range[0] <= rho <= sigma_range[1] else rho
    t_hat = t if raised == rho else max(float(v.time(-np.log(raised))), t)
    if v.alpha(t) == 0 or t_hat == t:
        return x, t
    scale = v.alpha(t_hat) / v.alpha(t)
    return scale * x + noise_scale * np.sqrt(v.sigma(t_hat) ** 2 - (scale * v.sigma(t)) ** 2) * draw, t_hat


@steps
def euler(p, x, t, s, memory, gamma=0.0, noise_scale=1.0, sigma_range=(0.0, math.inf)):
    x, t = churned(p, x, t, gamma, noise_scale, sigma_range)
    x0, eps = p.both(x, t)
    return p.levels.alpha(s) * x0 + p.levels.sigma(s) * eps


@steps
def heun(p, x, t, s, memory, gamma=0.0, noise_scale=1.0, sigma_range=(0.0, math.inf)):
    """Karras et al. 2022, Algorithm 2, lines 7 to 11: d_i is eps (and D, where alpha changes)."""
    x, t = churned(p, x, t, gamma, noise_scale, sigma_range)
    alpha, sigma, alpha_s, sigma_s, _ = ends(p, t, s)
    x0, eps = p.both(x, t)
    following = x + (alpha_s - alpha) * x0 + (sigma_s - sigma) * eps
    if sigma_s > 0:
        x0_s, eps_s = p.both(following, s)
        following = x + (alpha_s - alpha) * (x0 + x0_s) / 2 + (sigma_s - sigma) * (eps + eps_s) / 2
    return following


@clean_end
def midpoint(p, x, t, s, memory):
    alpha, sigma, alpha_s, sigma_s, _ = ends(p, t, s)
    x0, eps = p.both(x, t)
    middle = (t + s) / 2
    x_middle = x + (p.levels.alpha(middle) - alpha) * x0 + (p.levels.sigma(middle) - sigma) * eps
    x0, eps = p.both(x_middle, middle)
    return x + (alpha_s - alpha) * x0 + (sigma_s - sigma) * eps


@clean_end
def dpm2(p, x, t, s, memory):
    """k-diffusion's sample_dpm_2 in x / alpha, by Karras' sigma = rho."""
    alpha, _, alpha_s, sigma_s, _ = ends(p, t, s)
    x0, eps = p.both(x, t)
    if alpha == 0:
        return alpha_s * x0 + sigma_s * eps
    middle, rho = midway(p, t, s), p.levels.rho
    x_middle = p.levels.alpha(middle) * (x / alpha + (rho(middle) - rho(t)) * eps)
    return alpha_s * (x / alpha + (rho(s) - rho(t)) * p.both(x_middle, middle)[1])


@clean_end
def dpmpp_2s(p, x, t, s, memory):
    """Lu et al. 2022 (DPM-Solver++), Algorithm 1 with r = 1/2."""
    alpha, sigma, alpha_s, sigma_s, h = ends(p, t, s)
    x0 = p.ask(x, t)
    if alpha > 0:
        middle = midway(p, t, s)
        u = p.levels.sigma(middle) / sigma * x - p.levels.alpha(middle) * np.expm1(-h / 2) * x0
        x0 = p.ask(u, middle)
    return sigma_s / sigma * x - alpha_s * np.expm1(-h) * x0


# Linear multistep methods of an exponential integrator, with data prediction


def integral(a, k):
    """int_0^1 a e^(a (v - 1)) v^k dv by parts; the series where a is small."""
    if a < 2:
        return sum((-a) ** j / math.prod(range(k + 1, k + j + 2)) for j in range(40)) * a
    return -math.expm1(-a) if k == 0 else 1 - k / a * integral(a, k - 1)


def integrated(moments, nodes, values):
    """The integral of the polynomial through (nodes, values), from the moments of the weight: Vandermonde's system."""
    count = len(nodes)
    weights = np.linalg.solve(np.vander(nodes, count, increasing=True).T, np.asarray(moments[:count]))
    return sum(w * value for w, value in zip(weights, values, strict=True))


def exponential(p, x, t, s, past, eta=0.0):
    """x_s of Lu et al. 2022, eq. 8 (and of the SDE with noise eta), D a polynomial in lambda through `past`."""
    _, sigma, alpha_s, sigma_s, h = ends(p, t, s)
    a = (1 + eta) * h
    nodes, values = zip(*past, strict=True)
    places = [(node - p.levels.half_logsnr(t)) / h for node in nodes]
    drift = integrated([integral(a, k) for k in range(len(nodes))], places, values)
    return sigma_s / sigma * np.exp(-eta * h) * x + alpha_s * drift


@clean_end
def dpmpp_2m(p, x, t, s, memory):
    """Lu et al. 2022 (DPM-Solver++), Algorithm 2."""
    _, sigma, alpha_s, sigma_s, h = ends(p, t, s)
    x0 = p.ask(x, t)
    slope = 0.0 if not memory else h / (2 * memory["h"]) * (x0 - memory["x0"])
    memory.update(x0=x0, h=h)
    return sigma_s / sigma * x - alpha_s * np.expm1(-h) * (x0 + slope)


def unic_1(p, x, t, before, x0):
    """UniC-1 (Zhao et al. 2023, B_2): x_t as corrected by D there; before: (lambda, D) at the start of its step."""
    h = p.levels.half_logsnr(t) - before[0]
    return x - p.levels.alpha(t) * np.expm1(-h) / 2 * (x0 - before[1])


@clean_end
def dpmpp_3m(p, x, t, s, memory):
    """Quadratic in lambda; the first step, of order 1, is corrected by UniC-1 in the second."""
    x0, past = p.ask(x, t), memory.setdefault("past", [])
    if len(past) == 1:
        x = unic_1(p, x, t, past[0], x0)
    past.insert(0, (p.levels.half_logsnr(t), x0))
    return exponential(p, x, t, s, past[:3])


def unipc_update(p, x, t, s, past, x0_s, order, variant):
    """Zhao et al. 2023 with data prediction: the systems R rho = b / B(h) of UniP and UniC. past: (lambda, D)."""
    _, sigma, alpha_s, sigma_s, h = ends(p, t, s)
    b_of_h = -h if variant == "bh1" else np.expm1(-h)
    if p.levels.alpha(t) == 0:
        b_of_h = -1.0  # both are, in the limit of an infinite h, or should be
    ratios = [(node - past[0][0]) / h for node, _ in past[1:order]]
    slopes = [(value - past[0][1]) / r for (_, value), r in zip(past[1:order], ratios, strict=True)]
    if x0_s is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, x0_s - past[0][1]]
    n = len(ratios)
    right = [(1 - integral(h, k) if k == 0 else -integral(h, k)) / b_of_h for k in range(1, n + 1)]
    system = np.array([[r**k for r in ratios] for k in range(n)]).reshape(n, n)
    weights = [0.5] if n == 1 else np.linalg.solve(system, np.array(right))
    total = sum(w * d for w, d in zip(weights, slopes, strict=True))
    return sigma_s / sigma * x - alpha_s * np.expm1(-h) * past[0][1] - alpha_s * b_of_h * total


@clean_end
def unipc(p, x, t, s, memory, order=2, variant="bh2"):
    x0, past = p.ask(x, t), memory.setdefault("past", [])
    if past:
        x = unipc_update(p, memory["x"], memory["t"], t, past, x0, min(order, len(past)), variant)
    past.insert(0, (p.levels.half_logsnr(t), x0))
    memory.update(x=x, t=t)
    return unipc_update(p, x, t, s, past, None, min(order, len(past)), variant)


# Linear multistep methods on eps


def transfer(p, x, slope, t, s):
    """The transfer part of Liu et al. 2022: DDIM's step with another eps. From alpha = 0 there is only DDIM's own."""
    return p.levels.alpha(s) * (x - p.levels.sigma(t) * slope) / p.levels.alpha(t) + p.levels.sigma(s) * slope


def multistep(update):
    """The frame of methods that keep past eps: from alpha = 0 they take a step of DDIM."""

    def step(p, x, t, s, memory, **settings):
        x0, eps = p.both(x, t)
        memory.setdefault("t", []).insert(0, t)
        memory.setdefault("eps", []).insert(0, eps)
        if p.levels.alpha(t) == 0:
            memory["x0"] = x0
            return p.levels.alpha(s) * x0 + p.levels.sigma(s) * eps
        return update(p, x, x0, t, s, memory, **settings)

    return clean_end(step)


@multistep
def lms(p, x, x0, t, s, memory, order=4):
    """k-diffusion's sample_lms in x / alpha: the polynomial through eps in rho, integrated."""
    here, length = p.levels.rho(t), p.levels.rho(s) - p.levels.rho(t)
    past = [(time, eps) for time, eps in zip(memory["t"], memory["eps"], strict=True)][:order]
    places = [(p.levels.rho(time) - here) / length for time, _ in past]
    known = [(v, eps) for v, (_, eps) in zip(places, past, strict=True) if abs(v) < 1e15]  # beyond: rho is infinite
    places, values = zip(*known, strict=True)
    total = integrated([length / (k + 1) for k in range(len(places))], places, values)
    return p.levels.alpha(s) * (x / p.levels.alpha(t) + total)


@multistep
def deis(p, x, x0, t, s, memory, order=3):
    """Zhang & Chen 2023, tAB: int L_j(u) drho(u), L_j Lagrange's in t; Gauss' rule in 8 points of log-SNR."""
    if len(memory["t"]) == 2 and order == 3:
        before = p.levels.half_logsnr(memory["t"][1]), memory["x0"]
        x = unic_1(p, x, t, before, x0)
        memory["eps"][0] = (x - p.levels.alpha(t) * x0) / p.levels.sigma(t)
    memory["x0"] = x0
    points, weights = np.polynomial.legendre.leggauss(8)
    here, there = p.levels.half_logsnr(t), p.levels.half_logsnr(s)
    lambdas = (here + there) / 2 + (there - here) / 2 * points
    nodes, values = memory["t"][:order], memory["eps"][:order]
    total = (p.levels.rho(s) - p.levels.rho(t)) * values[0]  # a constant is integrated without the rule
    for j, value in enumerate(values):
        others = [node for i, node in enumerate(nodes) if i != j]
        lagrange = np.prod([(p.levels.time(lambdas) - node) / (nodes[j] - node) for node in others], axis=0)
        total = total + (there - here) / 2 * np.sum(weights * -np.exp(-lambdas) * lagrange) * (value - values[0])
    return p.levels.alpha(s) * (x / p.levels.alpha(t) + total)


ADAMS_BASHFORTH = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


@multistep
def pndm(p, x, x0, t, s, memory, order=4, start="lower"):
    """Liu et al. 2022, Algorithm 2, started with lower orders (iPNDM), improved Euler (PLMS) or Runge-Kutta (PNDM)."""
    past = memory["eps"]
    slope = sum(w * e for w, e in zip(ADAMS_BASHFORTH[min(order, len(past)) - 1], past, strict=False))
    if start == "plms" and len(past) == 1:
        slope = (past[0] + p.both(transfer(p, x, past[0], t, s), s)[1]) / 2
    if start == "pndm" and len(past) <= 3:
        middle = (t + s) / 2
        second = p.both(transfer(p, x, past[0], t, middle), middle)[1]
        third = p.both(transfer(p, x, second, t, middle), middle)[1]
        fourth = p.both(transfer(p, x, third, t, s), s)[1]
        slope = (past[0] + 2 * second + 2 * third + fourth) / 6
    return transfer(p, x, slope, t, s)


# The reverse SDE


@clean_end
def dpmpp_2m_sde(p, x, t, s, memory, eta=1.0):
    """k-diffusion's sample_dpmpp_2m_sde, "midpoint"."""
    _, sigma, alpha_s, sigma_s, h = ends(p, t, s)
    x0 = p.ask(x, t)
    x = sigma_s / sigma * np.exp(-eta * h) * x - alpha_s * np.expm1(-h - eta * h) * x0
    if memory:
        x = x - alpha_s * 0.5 * np.expm1(-h - eta * h) * h / memory["h"] * (x0 - memory["x0"])
    memory.update(x0=x0, h=h)
    return x + p.draw(t, s) * sigma_s * np.sqrt(-np.expm1(-2 * eta * h))


@clean_end
def dpmpp_3m_sde(p, x, t, s, memory, eta=1.0):
    """k-diffusion's sample_dpmpp_3m_sde, the last term doubled: D quadratic in lambda."""
    x0, past, h = p.ask(x, t), memory.setdefault("past", []), ends(p, t, s)[4]
    past.insert(0, (p.levels.half_logsnr(t), x0))
    new = p.draw(t, s) * p.levels.sigma(s) * np.sqrt(-np.expm1(-2 * eta * h))
    return exponential(p, x, t, s, past[:3], eta) + new


def first_order(p, x, x0, t, s, eta, new):
    """The exact solution for a constant D."""
    _, sigma, alpha_s, sigma_s, h = ends(p, t, s)
    x = sigma_s / sigma * np.exp(-eta * h) * x - alpha_s * np.expm1(-(1 + eta) * h) * x0
    return x + sigma_s * np.sqrt(-np.expm1(-2 * eta * h)) * new


@clean_end
def dpmpp_sde(p, x, t, s, memory, eta=1.0):
    """k-diffusion's sample_dpmpp_sde, r = 1/2; the noise of the whole step is made of those of its halves."""
    m = midway(p, t, s)
    first, second = p.draw(t, m), p.draw(m, s)
    x0 = p.ask(first_order(p, x, p.ask(x, t), t, m, eta, first), m)
    _, sigma_m, _, sigma_s, h = ends(p, m, s)
    whole = sigma_s / sigma_m * np.exp(-eta * h) * sigma_m * np.sqrt(-np.expm1(-2 * eta * ends(p, t, m)[4])) * first
    whole = whole + sigma_s * np.sqrt(-np.expm1(-2 * eta * h)) * second
    return first_order(p, x, x0, t, s, eta, 0.0) + whole


@clean_end
def sa_solver(p, x, t, s, memory, tau=1.0):
    """Xue et al. 2023, Algorithm 1, s_p = s_c = 2: the corrector for x_t, then the predictor for x_s."""
    _, sigma, alpha_s, sigma_s, h = ends(p, t, s)
    x0 = p.ask(x, t)
    a = (1 + tau**2) * h
    if memory:
        past_a, past_x0 = (1 + tau**2) * memory["h"], memory["x0"]
        line = integrated([integral(past_a, k) for k in range(2)], [0.0, 1.0], [past_x0, x0])
        x = memory["carried"] + p.levels.alpha(t) * line
    carried = sigma_s / sigma * np.exp(-(tau**2) * h) * x
    carried = carried + sigma_s * np.sqrt(-np.expm1(-2 * tau**2 * h)) * p.draw(t, s)
    nodes, values = [0.0], [x0]
    if memory:
        nodes, values = [0.0, -memory["h"] / h], [x0, memory["x0"]]
    memory.update(x0=x0, h=h, carried=carried)
    return carried + alpha_s * integrated([integral(a, k) for k in range(2)], nodes, values)


# Langevin moves, restarts, distilled networks


def moves(p, x, s, delta, count):
    """Song & Ermon 2019, Algorithm 1, line 6; score = -eps / sigma."""
    for _ in range(count):
        score = -p.both(x, s)[1] / p.levels.sigma(s)
        x = x + delta / 2 * score + np.sqrt(delta) * p.draw(s, s)
    return x


@clean_end
def annealed_langevin(p, x, t, s, memory, step_size=0.2, count=5):
    """Song & Ermon 2019, Algorithm 1; alpha_i of theirs is step_size sigma^2. From alpha = 0, noise is scaled."""
    alpha, sigma, alpha_s, sigma_s, _ = ends(p, t, s)
    x = x * (alpha_s / alpha if alpha > 0 else sigma_s / sigma)
    return moves(p, x, s, step_size * sigma_s**2, count)


def predictor_corrector(predictor, snr=0.16, count=1):
    """Song et al. 2021, Algorithms 2 and 3: epsilon = 2 (snr |z| / |score|)^2, where |z| / |score| is sigma."""

    def update(p, x, t, s, memory):
        x = predictor(p, x, t, s, memory)
        epsilon = 2 * (snr * p.levels.sigma(s)) ** 2
        return x if p.levels.sigma(s) == 0 else moves(p, x, s, 2 * epsilon, count)

    return steps(update)


def restart(inner, low, high, repeats, num_steps):
    """Xu et al. 2023, Algorithm 1; the restart interval's steps are Karras' (eq. 5, rho = 7), in sigma / alpha."""

    def update(p, x, t, s, memory):
        x, v = inner(p, x, t, s, memory), p.levels
        if not (v.rho(t) > low >= v.rho(s) and v.sigma(s) > 0):
            return x
        bottom = v.rho(s)
        for _ in range(repeats):
            part = [i / num_steps for i in range(num_steps + 1)]
            rhos = [(high ** (1 / 7) + u * (bottom ** (1 / 7) - high ** (1 / 7))) ** 7 for u in part]
            times = [*(float(v.time(-np.log(each))) for each in rhos[:-1]), s]
            scale, top = v.alpha(times[0]) / v.alpha(s), v.sigma(times[0])
            x = scale * x + np.sqrt(top**2 - (scale * v.sigma(s)) ** 2) * p.draw(s, times[0])
            own = {}
            for a, b in itertools.pairwise(times):
                x = inner(p, x, a, b, own)
        return x

    return steps(update)


@steps
def consistency(p, x, t, s, memory):
    """Song et al. 2023, Algorithm 1, to clean data; LCM (Luo et al. 2023, Algorithm 3) on VP."""
    return p.levels.alpha(s) * p.ask(x, t) + p.levels.sigma(s) * p.draw(t, s)


@steps
def tcd(p, x, t, s, memory, gamma=0.3):
    """Zheng et al. 2024, Algorithm 4: DDIM to (1 - gamma) s, then the forward process to s."""
    x0, eps = p.both(x, t)
    draw, v, down = p.draw(t, s), p.levels, (1 - gamma) * s
    ratio = v.alpha(s) / v.alpha(down)
    lower = v.alpha(down) * x0 + v.sigma(down) * eps
    return ratio * lower + np.sqrt(np.maximum(v.sigma(s) ** 2 - (ratio * v.sigma(down)) ** 2, 0.0)) * draw
