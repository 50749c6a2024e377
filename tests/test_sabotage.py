"""A broken solver is noticed: a few mutants of every file here, all of them by `python -m tests.oracles.sabotage`."""

import pytest

from jaxdiff import solver
from tests.oracles import sabotage


def some(file, count=2):
    """`count` mutants of a file, far from each other, that are not named as equivalent."""
    living = [mutant for mutant in sabotage.mutants(file) if not sabotage.equivalent(mutant)]
    return living[len(living) // 3 :: len(living) // count][:count]


@pytest.mark.parametrize("file", sabotage.files())
def test_broken_solvers_are_noticed(file):
    assert [mutant.name for mutant in some(file) if not sabotage.verdict(mutant)] == []


def test_what_is_named_as_equivalent_is_there_once_and_passes():
    every = {mutant.name: mutant for file in sabotage.files() for mutant in sabotage.mutants(file)}
    named = [name for names in sabotage.EQUIVALENT.values() for name in names]
    assert not set(named) - set(every)
    assert len(set(named)) == len(named)
    for name in [name for name in named if name.startswith(("langevin", "consistency"))]:
        assert sabotage.verdict(every[name]) is None


def test_a_mutant_is_in_force_only_while_it_is_asked_for():
    before = solver.ddim
    mutant = next(m for m in sabotage.mutants("ancestral.py") if m.function == "ddim")
    with sabotage.package(mutant) as broken:
        assert broken.ddim is not before
        assert broken.ALL["ddim"] is not before
    from jaxdiff import solver as after

    assert after is solver
    assert after.ddim is before


def test_a_solver_that_is_only_written_anew_lives_and_one_that_does_not_run_is_told_apart():
    source = (sabotage.ROOM / "dpm.py").read_text(encoding="utf-8")
    assert sabotage.verdict(sabotage.Mutant("none", "dpm.py", "dpmpp_2m", lambda: source)) is None
    crashing = sabotage.Mutant("none", "dpm.py", "dpmpp_2m", lambda: source.replace("2 * h_prev", "nothing"))
    assert sabotage.CRASH in sabotage.verdict(crashing)


def test_a_number_an_operator_a_term_a_name_and_a_guard_are_broken():
    changes = {mutant.name.split(": ", 2)[2] for mutant in sabotage.mutants("dpm.py")}
    assert {"2 -> 3", "x0 - x0_prev -> x0 + x0_prev", "x0 - x0_prev -> x0", "t -> s", "jnp.expm1 -> jnp.exp"} <= changes
    assert "jnp.where(schedule.sigma(s) > 0, over(h, 2 * h_prev), 0.0) -> over(h, 2 * h_prev)" in changes
