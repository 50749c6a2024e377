"""A broken solver is noticed: a few mutants of every file here, all of them by `python -m tests.oracles.sabotage`."""

from jaxdiff import solver
from tests.oracles import judge, sabotage


def some(file, count=2):
    """`count` mutants of a file, far from each other, that are not known to be equivalent."""
    living = [mutant for mutant in sabotage.mutants(file) if not sabotage.equivalent(mutant)]
    return living[len(living) // 3 :: len(living) // count][:count]


def test_broken_solvers_are_noticed():
    tried = [mutant for file in sabotage.files() for mutant in some(file)]
    unnoticed = [mutant.name for mutant in tried if not sabotage.verdict(mutant)]
    assert len(unnoticed) <= 0.1 * len(tried), unnoticed


def test_a_mutant_is_in_force_only_while_it_is_asked_for():
    before = solver.ddim
    mutant = next(m for m in sabotage.mutants("ancestral.py") if m.function == "ddim")
    with sabotage.package(mutant) as broken:
        assert broken.ddim is not before
        assert broken.ALL["ddim"] is not before
    from jaxdiff import solver as after

    assert after is solver
    assert after.ddim is before


def test_a_solver_that_is_only_written_anew_lives():
    source = (sabotage.ROOM / "dpm.py").read_text(encoding="utf-8")
    assert sabotage.verdict(sabotage.Mutant("none", "dpm.py", "dpmpp_2m", lambda: source)) is None


def test_a_mutant_that_moves_the_end_is_told_from_one_that_does_not():
    every = [mutant for file in sabotage.files() for mutant in sabotage.mutants(file)]
    same = next(mutant for mutant in every if sabotage.equivalent(mutant) not in (None, sabotage.IN_LAW))
    assert sabotage.moved(same) < 1e-11
    assert (
        max(sabotage.moved(mutant) for mutant in every if mutant.name.startswith("runge_kutta.py: euler: sch")) > 1e-6
    )


def test_facts_are_stated_only_of_solvers_that_there_are():
    assert set(judge.STATED) <= {*solver.ALL, *sabotage.OTHERS}
    assert all(judge.stated(name).order == solver.ORDER.get(name) for name in solver.ALL)
