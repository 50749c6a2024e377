"""A short part of the trials of tests/oracles/longrun.py; the long one is a command there."""

import dataclasses
import sys

import jax
import pytest

from tests.oracles import longrun

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
    pytest.mark.filterwarnings("ignore"),
]
CALM = [longrun.Sample(step, 600 + step / 1000, 40 + 10 * (step % 7 == 0), 9, 30) for step in range(1000, 10_000, 9)]


def test_any_number_of_workers_ends_in_the_same_bits(tmp_path, monkeypatch):
    """In fresh processes; one of the two workers is killed on the way."""
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.values["jax_compilation_cache_dir"])
    readings = [longrun.Reading(0, 16), longrun.Reading(2, 3, killed=True)]
    assert longrun.same_bits(tmp_path, longrun.pictures(tmp_path), 20, readings)


def test_a_run_that_reads_other_data_is_not_the_same(tmp_path, monkeypatch):
    results = iter(range(9))
    monkeypatch.setattr(longrun, "start", lambda arguments, directory: None)
    monkeypatch.setattr(longrun, "finish", lambda run, directory: None)
    monkeypatch.setattr(longrun, "result", lambda directory: next(results))
    assert not longrun.same_bits(tmp_path, [], 20, longrun.READINGS[:2])


def growing(**rates):
    return [
        dataclasses.replace(one, **{name: getattr(one, name) + rate * i // 100 for name, rate in rates.items()})
        for i, one in enumerate(CALM)
    ]


def test_what_leaks_is_not_steady():
    assert longrun.steady_samples(CALM, ["run"])
    assert not longrun.steady_samples(CALM, ["run", "run"])
    for leak in ({"resident": 4}, {"threads": 1}, {"files": 1}, {"compiled": 1}):
        assert not longrun.steady_samples(growing(**leak), ["run"])
