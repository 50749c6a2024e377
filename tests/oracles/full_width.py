"""A block of each kind of FLUX.1 at its full width, diffusers' beside ours: 546 M parameters, 3 GB of memory.

python -m tests.oracles.full_width        needs the witness extra; `tests/test_witness_transformers.py` has less
"""

import tempfile

import jax

from tests import test_witness_transformers as witness

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        difference, count = witness.compare("FluxTransformer2DModel", witness.FLUX_WIDE, folder)
    print(f"{count:,} parameters, up to {difference:.1e} apart")
