"""Discrete processes: the verbs of the continuous one for tokens, with a denoiser that returns logits.

    q(x_t | x0) = keep(t) [x_t = x0] + (1 - keep(t)) noise(x_t)          denoise(x_t, t) -> logits of p(x0 | x_t)

`masked`: the noise is a mask, the state after the last token. `uniform`: any token. `binomial`: fair coin flips.
Tokens are (b, n) integers, logits (b, n, vocab), t a scalar or (b,), 0 = data and 1 = noise.

    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> process = jd.discrete.masked(4)
    >>> def denoise(x_t, t):  # all data are the tokens 0 1 2
    ...     return jnp.log(jnp.broadcast_to(jnp.eye(3, 4)[None], (x_t.shape[0], 3, 4)))
    >>> noise = jd.discrete.prior(jax.random.key(0), process, (1, 3))
    >>> noise.tolist()
    [[4, 4, 4]]
    >>> x0 = jd.discrete.cached(jax.random.key(1), denoise, noise, jd.discrete.grid(1000), process)
    >>> x0.tolist()
    [[0, 1, 2]]
    >>> guess = lambda x_t, t: jnp.zeros((*x_t.shape, 4))  # knows nothing: 2 bits a token
    >>> jd.discrete.any_order_bound(jax.random.key(2), guess, x0, process).tolist()
    [2.0]
"""

from jaxdiff.discrete.bound import any_order_bound, continuous_bound, kl, loss, rate, variational_bound
from jaxdiff.discrete.forward import Denoise, from_net, p_posterior, prior, q_posterior, q_sample
from jaxdiff.discrete.keep import Keep, cosine, geometric, linear, polynomial
from jaxdiff.discrete.processes import Masked, Process, Uniform, binomial, masked, uniform
from jaxdiff.discrete.sampling import ancestral, cached, confident, first_hitting, grid

__all__ = [
    "Denoise",
    "Keep",
    "Masked",
    "Process",
    "Uniform",
    "ancestral",
    "any_order_bound",
    "binomial",
    "cached",
    "confident",
    "continuous_bound",
    "cosine",
    "first_hitting",
    "from_net",
    "geometric",
    "grid",
    "kl",
    "linear",
    "loss",
    "masked",
    "p_posterior",
    "polynomial",
    "prior",
    "q_posterior",
    "q_sample",
    "rate",
    "uniform",
    "variational_bound",
]
