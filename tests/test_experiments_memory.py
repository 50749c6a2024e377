"""The account of a step's memory: what it is given is parameters, average and two moments, divided over the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import memory
from jaxdiff import train
from jaxdiff.errors import ConfigError
from jaxdiff.nets import SDUNet

TINY = SDUNet(channels=(64,), num_blocks=1, attention=("cross",), heads=(2,), depth=(1,), token_dim=16)


def parameters(devices):
    """GB of the parameters on each device: large leaves are divided, small ones on all."""
    inputs = jax.tree.map(memory._zeros, memory.unet.example(TINY))
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(TINY.init, jax.random.key(0), **inputs))]
    return sum(size / devices if size >= train.mesh.MIN_SHARDED else size for size in sizes) * 4 / 1e9


def test_the_state_is_divided_over_the_devices():
    whole, halves = (memory.line(memory.lowered(TINY, 4, devices, 2)) for devices in (1, 2))
    for devices, found in ((1, whole), (2, halves)):
        np.testing.assert_allclose(found["arguments"], 4 * parameters(devices), rtol=0.01)
        assert found["new outputs"] < 0.01 * found["arguments"]  # what is returned lies where the old state was
    assert whole["temporaries"] > parameters(1)  # the gradient at least


def test_the_command_prints_a_row_for_each_number(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(memory, "lowered", lambda *given: seen.append(given))
    found = {"arguments": 1.0, "temporaries": 2.0, "new outputs": 0.25, "program": 0.0, "seconds": 7.0}
    monkeypatch.setattr(memory, "line", lambda lower: found)
    assert memory.run(["--model", "sdxl", "--devices", "1", "4", "--batch=2", "--remat=dots"]) == 0
    assert [given[1:] for given in seen] == [(128, 1, 2), (128, 4, 8)]
    assert (seen[0][0].remat, seen[0][0].dtype) == ("dots", jnp.bfloat16)
    assert "| 4 | 1.00 | 2.00 | 0.25 | 3.25 | 7 s |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="must be >= 1"):
        memory.run(["--devices", "0"])
