"""jaxdiff: verified, composable diffusion models in JAX. Everything meets at one function, denoise(x_t, t) -> x0.

    import jaxdiff as jd
    schedule = jd.schedule.cosine()
    denoise = jd.denoise.from_net(net, schedule=schedule, target=jd.target.v)

Networks, data, text, training and metrics are imported by name (`from jaxdiff import nets`): this import is light.
"""

from jaxdiff import (
    denoise,
    discrete,
    errors,
    guide,
    likelihood,
    loss,
    pipelines,
    process,
    sample,
    schedule,
    solver,
    target,
    types,
)

__all__ = [
    "denoise",
    "discrete",
    "errors",
    "guide",
    "likelihood",
    "loss",
    "pipelines",
    "process",
    "sample",
    "schedule",
    "solver",
    "target",
    "types",
]
