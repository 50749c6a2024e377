"""Every solver is the algorithm that its paper prints (see `tests.oracles.printed`); and the comparison can fail."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import solver
from jaxdiff.types import Solver
from tests.oracles import papers, parts, printed

HEUN = printed.CASES["heun"]


@pytest.mark.parametrize("name", printed.CASES)
def test_it_is_the_algorithm_of_its_paper(name):
    assert printed.CASES[name](solver) is None


@pytest.mark.parametrize("name", printed.DIFFERENTIATED)
def test_its_derivative_is_that_of_its_values(name):
    assert printed.CASES[name].derivative(solver) is None


@pytest.mark.parametrize("name", parts.CHECKS)
def test_a_part_is_its_formulas(name):
    assert parts.CHECKS[name](solver) is None


def test_every_solver_has_a_paper():
    others = {"ALL", "DISTILLED", "ORDER", "fresh", "predict"}
    names = [*printed.CASES, *parts.CHECKS]
    assert not [each for each in set(solver.__all__) - others if not any(name.startswith(each) for name in names)]


def test_no_two_solvers_are_one_but_those_that_are():
    with printed.eagerly():
        problem, ends = printed.Problem(printed.VP, printed.MIDDLE), {}
        for name in (*solver.ORDER, "ddpm", "ddim_eta1", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "sa_solver"):
            denoise = functools.partial(printed.answer, jnp)
            build = lambda schedule, noise, name=name: solver.ALL[name](  # noqa: E731
                schedule, **({} if name in solver.ORDER else {"noise": noise})
            )
            ends[name] = np.asarray(printed.walk(build, problem, jnp.asarray(problem.x), denoise)[0][-1])
    same = {pair for pair in itertools.combinations(ends, 2) if np.abs(ends[pair[0]] - ends[pair[1]]).max() < 1e-6}
    assert same == {("ddim", "euler"), ("ddpm", "ddim_eta1")}


def altered(change):
    """Solvers of which Heun's method takes steps as `change(step)` does."""

    class Solvers:
        @staticmethod
        def heun(schedule, **settings):
            inner = solver.heun(schedule, **settings)
            return Solver(inner.init, change(inner.step))

    return Solvers


def test_a_step_that_is_a_little_off_is_seen():
    for wrong in (1 + 1e-6, float("nan")):
        off = altered(lambda step, w=wrong: lambda *args: (w * step(*args)[0], args[-1]))
        assert "step 0 is" in (HEUN(off) or "")
    assert HEUN(altered(lambda step: step)) is None


def test_a_question_that_is_not_the_papers_is_seen():
    def twice(step):
        def asking(key, denoise, x, t, s, memory):
            denoise(x, t)
            return step(key, denoise, x, t, s, memory)

        return asking

    assert "asks 2" in (HEUN(altered(twice)) or "")

    def elsewhere(step):
        """Asks at another x, and is told what it would have been told."""

        def asking(key, denoise, x, t, s, memory):
            def other(y, u):
                return denoise(y + 1e-6, u) + printed.answer(jnp, y, u) - printed.answer(jnp, y + 1e-6, u)

            return step(key, other, x, t, s, memory)

        return asking

    assert "at another x" in (HEUN(altered(elsewhere)) or "")


def test_a_draw_for_nothing_and_one_draw_used_twice_are_seen():
    silent = printed.Case(lambda solvers, schedule, noise: solver.ddim(schedule, eta=1e-12, noise=noise), papers.ddim)
    assert "has no noise" in (silent(solver) or "")

    def one_key(solvers, schedule, noise):
        return solver.ddpm(schedule, noise=lambda key, x, t, s: noise(jax.random.split(jax.random.key(5), 2), x, t, s))

    assert "step 1 is" in (printed.Case(one_key, papers.ddpm)(solver) or "")


def test_a_span_of_noise_that_is_not_that_of_the_step_is_seen():
    swapped = lambda solvers, schedule, noise: solver.ddpm(  # noqa: E731
        schedule, noise=lambda key, x, t, s: noise(key, x, s, t)
    )
    assert "step 0 is" in (printed.Case(swapped, papers.ddpm)(solver) or "")


def test_a_derivative_that_is_lost_or_not_finite_is_seen():
    lost = altered(lambda step: lambda *args: (jax.lax.stop_gradient(step(*args)[0]), args[-1]))
    assert HEUN(lost) is None
    assert "the derivative is 0.0" in (HEUN.derivative(lost) or "")

    unguarded = altered(lambda step: lambda *args: (step(*args)[0] + jnp.sqrt(0 * args[2]), args[-1]))
    assert HEUN(unguarded) is None
    assert "the derivative is nan" in (HEUN.derivative(unguarded) or "")


@pytest.mark.parametrize("name", ["phi", "brownian_path", "adaptive"])
def test_a_broken_part_is_seen(name, monkeypatch):
    modules = {"phi": "polynomial", "brownian_path": "brownian", "adaptive": "adaptive"}
    module = sys.modules[f"jaxdiff.solver.{modules[name]}"]
    if name == "phi":
        inner = module.phi
        monkeypatch.setattr(module, "phi", lambda h, count: [*inner(h, count)[:2], *inner(1.0001 * h, count)[2:]])
    elif name == "brownian_path":
        monkeypatch.setattr(module, "_DEPTH", 23)
    else:
        monkeypatch.setattr(module, "_CAP", 1.1e-4)
    assert parts.CHECKS[name](solver) is not None
