"""Training: the state, the step, averages, the optimiser, the mesh. It takes a loss function and knows no diffusion."""

from jaxdiff.train import ema, hosts, mesh
from jaxdiff.train.checkpoint import Checkpoints
from jaxdiff.train.optimizer import adam
from jaxdiff.train.state import TrainState, create_state, roll_back
from jaxdiff.train.step import logsnr_buckets, make_step

__all__ = [
    "Checkpoints",
    "TrainState",
    "adam",
    "create_state",
    "ema",
    "hosts",
    "logsnr_buckets",
    "make_step",
    "mesh",
    "roll_back",
]
