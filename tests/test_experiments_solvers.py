"""The table of solvers: its truth is the truth, its walk is `sample`, its counting is right, its command runs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import cli, solvers, trained
from experiments import model as models
from experiments import train as job
from jaxdiff import errors, sample, schedule, solver
from tests.oracles import gaussian

FLOW = schedule.rectified_flow()


@pytest.fixture(scope="module")
def problem():
    return solvers.Problem(solvers.mixture(), FLOW, {False: 32, True: 64})


def test_the_mixture_has_the_spectrum_it_states():
    data = solvers.mixture()
    scale = np.sqrt(np.square(data.means).mean(0))
    assert np.sqrt(np.square(data.draw(20_000, 0)).mean()) == pytest.approx(0.5, rel=0.15)
    assert np.polyfit(np.log(np.arange(1, 65)), np.log(scale), 1)[0] == pytest.approx(-1, abs=0.1)


def test_its_denoiser_is_the_posterior_mean():
    weights, means, std = (0.2, 0.5, 0.3), ((0.5, -1.0), (-0.3, 0.2), (1.0, 0.7)), 0.2
    ours = solvers.Mixture(np.array(weights), np.array(means), np.full((3, 2), std))
    truth = gaussian.Mixture(schedule.cosine(), weights, means, (std**2,) * 3)
    x = np.random.default_rng(0).standard_normal((8, 2))
    with jax.enable_x64(True):
        for t in (0.05, 0.5, 0.95):
            wanted = truth.denoise(jnp.asarray(x), jnp.asarray(t))
            alpha, sigma = (float(f(jnp.asarray(t))) for f in (truth.schedule.alpha, truth.schedule.sigma))
            np.testing.assert_allclose(ours.denoise(x, alpha, sigma), wanted, rtol=1e-9)
            found = ours.denoiser(truth.schedule)(jnp.asarray(x), jnp.asarray(t))
            np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_its_flow_is_that_of_a_gaussian_where_it_is_one():
    data = solvers.Mixture(np.ones(1), np.array([[0.3, -0.5]]), np.array([[0.5, 0.02]]))
    x = np.random.default_rng(0).standard_normal((4, 2)) * 100
    wanted = data.means + data.stds / np.sqrt(data.stds**2 + 100**2) * (x - data.means)
    np.testing.assert_allclose(data.flow(x, 100.0), wanted, atol=2e-5)  # 1e-4 is where it stops, of 0.02


def test_the_flow_does_not_depend_on_its_steps_or_on_where_infinity_is(problem):
    x = np.random.default_rng(1).standard_normal((8, 64))
    ends = [problem.data.flow(x * top, top, steps) for top, steps in ((1e7, 2000), (1e7, 1000), (1e8, 2000))]
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-5)
    np.testing.assert_allclose(ends[2], ends[0], atol=1e-5)


def test_distances_are_distances(problem):
    shift = np.full(64, 0.3)
    assert problem.error(problem.end + shift, False) == pytest.approx(0.3)
    outlier = problem.end + np.where(np.arange(32)[:, None] == 5, 100.0, 0.01)
    medians = solvers.Problem(problem.data, FLOW, {False: 32, True: 64}, median=True)
    assert (problem.error(outlier, False) > 10, medians.error(outlier, False)) == (True, pytest.approx(0.01))
    x = problem.data.draw(64, 9)
    assert problem.distance(x) == pytest.approx(problem.floor, rel=0.5)
    assert problem.distance(x + 10 * shift) == pytest.approx(
        np.sqrt(np.square(10 * shift @ problem.directions).mean()), rel=0.1
    )


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "ddpm"])
def test_a_walk_is_sample_and_counts_like_nfe(problem, name):
    stochastic, used = name not in solver.ORDER, solver.ALL[name](FLOW)
    walk = solvers.on_problem(problem, used, stochastic, 6)
    for num_steps in (2, 5):
        times = sample.karras_grid(FLOW, num_steps)
        x, calls = walk(times)
        wanted = sample.sample(jax.random.key(0), problem.data.denoiser(FLOW), walk.x, times, used)
        np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)
        assert calls == sample.nfe(used, times)


@pytest.mark.parametrize(
    ("cost", "answers"),
    [
        (lambda n: n, {5: 5, 10: 10}),
        (lambda n: 2 * n - 1, {5: 3, 10: 5}),
        (lambda n: 2 * n, {5: 2, 10: 5}),
        (lambda n: 4 * min(n, 3) + max(n - 3, 0), {5: 1, 10: 2, 14: 5}),
        (lambda n: 7 * n, {5: 0, 10: 1}),
    ],
)
def test_the_steps_that_the_calls_pay_for(cost, answers):
    for calls, steps in answers.items():
        for guess in (1, 3, calls):
            found, result = solvers.affordable(lambda n: (f"x{n}", cost(n)), calls, guess)
            assert (found, result) == (steps, f"x{steps}" if steps else None)


def test_the_command_prints_a_table_whose_errors_fall(capsys):
    words = "--solver ddim dpmpp_2m ddpm --grid uniform log_snr(sigma_min=0.03) --calls 3 12 --rows 16"
    assert solvers.run([*words.split(), "--schedule", "rectified_flow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if line.startswith("| d")}
    assert set(rows) == {"ddim", "dpmpp_2m", "ddpm"}
    for cells in rows.values():
        for cell in cells:
            coarse, fine = map(float, cell.split())
            assert coarse > fine > 0
    assert sum("### `rectified_flow`" in line for line in lines) == 2
    assert any(line.startswith("- 12 calls: dpmpp_2m on ") for line in lines)


def test_speed_has_a_row_for_each_solver():
    rows = list(solvers.speed(["ddim", "heun"], num_steps=5, rounds=1))
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["ddim", "heun"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver", "dppm"], "Did you mean"),
        (["--grid", "karass", "--solver", "ddim"], "Did you mean 'karras'"),
        (["--schedule", "cosin"], "Did you mean 'cosine'"),
        (["--calls", "0"], "--calls"),
    ],
)
def test_wrong_words_are_answered(words, message):
    with pytest.raises(errors.ConfigError, match=message):
        solvers.run(words)


def test_diffusers_has_its_rows(problem):
    pytest.importorskip("diffusers")
    from experiments import solvers_diffusers

    lines = list(solvers_diffusers.table(problem, "rectified_flow", (4,)))
    assert len(lines) == 4 + len(solvers_diffusers.SCHEDULERS["rectified_flow"]) + 1
    # Its Euler is ours: on the same times, which are its own.
    scheduler = solvers_diffusers.build("FlowMatchEulerDiscrete", {}, "rectified_flow")
    x, _ = solvers_diffusers.sampler(problem, scheduler, solvers_diffusers.model(problem, "rectified_flow"), False)(4)
    ours = sample.sample(
        jax.random.key(0), problem.data.denoiser(FLOW), jnp.asarray(problem.noise[False], jnp.float32),
        scheduler.sigmas.numpy(), solver.euler(FLOW),
    )  # fmt: skip
    np.testing.assert_allclose(x, ours, atol=1e-4)


def test_the_network_evaluations_of_a_picture_are_counted_with_guidance():
    model = types.SimpleNamespace(schedule=FLOW)

    def count(name, scale):
        settings = types.SimpleNamespace(solver=name, grid="log_snr", steps=5, scale=scale)
        return models.evaluations(model, settings)

    assert [count("dpmpp_2m", scale) for scale in (1.0, 0.0, 3.0)] == [5, 5, 10]
    assert count("heun", 3.0) == 18


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a short training run."""
    directory = tmp_path_factory.mktemp("solvers") / "run"
    job.run([
        "--config=swissroll", "--config.net.width=16", "--config.net.depth=1", "--config.train.batch_size=16",
        "--config.train.steps=2", "--config.data.points=100", "--config.sample.num=4", "--config.sample.steps=2",
        "--config.train.steps_per_call=1", f"--workdir={directory}",
    ])  # fmt: skip
    return directory


def test_a_trained_network_is_held_to_its_own_long_run(run, capsys):
    words = ["--workdir", str(run), "--calls", "4", "150", "--grid", "log_snr(sigma_min=0.005)"]
    assert solvers.run([*words, "--solver", "dpmpp_2m", "heun", "--rows", "16"]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    cells = {line[1].strip(): [float(cell) for cell in line[2].split()] for line in lines[-3:] if len(line) > 2}
    assert cells["dpmpp_2m"][1] == 0  # it is the long run itself
    assert cells["dpmpp_2m"][0] > 0
    assert cells["heun"][0] > cells["heun"][1] > 0


def test_the_walk_of_a_network_is_what_sampling_draws(run):
    trained_run, settings = trained.load(run), trained.load(run).config.sample
    used = cli.call("solver", "ddpm", solver.ALL, schedule=trained_run.model.schedule)
    x, calls = solvers.on_network(trained_run, used, 4, 6)(sample.GRIDS["uniform"](trained_run.model.schedule, 3))
    settings = ConfigDict(settings.to_dict() | {"solver": "ddpm", "grid": "uniform", "steps": 3})
    given = models.grid_conditions(trained_run.model, ("",), None, 4)[0], trained_run.model.null(4)
    np.testing.assert_allclose(x, trained.draw(trained_run, settings, *given, range(4), 4), rtol=1e-4, atol=1e-5)
    assert calls == 3
