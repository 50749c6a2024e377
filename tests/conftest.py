"""Test settings: 8 fake CPU devices, strict numerics, a compile cache that outlives the run.

The tests run on the CPU everywhere; those marked gpu are run by JAX_PLATFORMS=cuda,cpu pytest -n0 -m gpu.
"""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # correctness tests: compile time dominates
os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import pytest

_CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)


collect_ignore = ["oracles/make_text_fixture.py"]  # needs torch and transformers, and is run by hand


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Free what a file of tests has compiled: kept, it took a process to 6 GB, and every collection longer."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(items):
    """Skip GPU checks, with a reason, where JAX sees no GPU."""
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and JAX_PLATFORMS=cuda,cpu pytest -n0 -m gpu"))
