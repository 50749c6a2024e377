"""Truth for discrete processes: data given as a table of all sequences and their chances, and chains as matrices.

p(x0 | x_t) ~ p(x0) prod_i q(x_t^i | x0^i)        by enumeration; its marginals are the exact denoiser
Q_t = keep I + lost 1 noise^T,   Q_st = a I + (1 - a) 1 noise^T,   a = keep_t / keep_s
q(x_s | x_t, x0) = Q_s[x0, x_s] Q_st[x_s, x_t] / Q_t[x0, x_t]
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, eq=False)
class Data:
    """Sequences (m, n) and their chances (m,)."""

    sequences: np.ndarray
    chances: np.ndarray

    @property
    def entropy(self):
        """In bits per sequence."""
        return -(self.chances * np.log2(self.chances)).sum()

    def marginals(self, vocab):
        """(n, vocab)"""
        return np.einsum("m,mnv->nv", self.chances, np.eye(vocab)[self.sequences])

    def draw(self, count, seed=0):
        """(count, n) sequences."""
        return self.sequences[np.random.default_rng(seed).choice(len(self.chances), count, p=self.chances)]

    def denoiser(self, process):
        """log p(x0^i | x_t), exact. The process gives keep and lost, the vocabulary, and whether it has a mask."""
        masks = process.states > process.vocab
        table = jax.nn.one_hot(jnp.asarray(self.sequences), process.vocab)
        log_prior = jnp.log(jnp.asarray(self.chances, jnp.float32))

        def denoise(x_t, t):
            t = jnp.broadcast_to(t, x_t.shape[:1]).astype(jnp.float32)
            keep, lost = process.schedule.keep(t), process.schedule.lost(t)
            same = (x_t[:, None] == jnp.asarray(self.sequences)[None]).astype(jnp.float32)
            if masks:  # what is not masked is so; keep and lost are the same for every sequence
                chance = jnp.maximum(same, (x_t == process.vocab)[:, None].astype(jnp.float32))
            else:
                chance = keep[:, None, None] * same + lost[:, None, None] / process.vocab
            log_joint = jnp.log(jnp.maximum(chance, 1e-36)).sum(-1) + log_prior[None]
            return jnp.log(jnp.einsum("bm,mnv->bnv", jax.nn.softmax(log_joint), table) + 1e-36)

        return denoise


def markov(vocab=3, n=4, seed=0):
    """A Markov chain; returns (data, its entropy by the chain rule: H(start) + sum_i H(next | now))."""
    rng = np.random.default_rng(seed)
    start, step = rng.dirichlet(np.ones(vocab)), 0.94 * rng.dirichlet(np.full(vocab, 0.4), vocab) + 0.02
    sequences = np.array(list(itertools.product(range(vocab), repeat=n)))
    chances = start[sequences[:, 0]] * np.prod(step[sequences[:, :-1], sequences[:, 1:]], axis=1)
    now, entropy = start, -(start * np.log2(start)).sum()
    for _ in range(n - 1):
        entropy, now = entropy - now @ (step * np.log2(step)).sum(1), now @ step
    return Data(sequences, chances / chances.sum()), entropy


def heartbeat(n=20, period=5):
    """A one every 5th place at a random phase (Sohl-Dickstein et al. 2015, section 3.1.2): log2 5 = 2.32 bits."""
    sequences = (np.arange(n)[None] % period == np.arange(period)[:, None]).astype(int)
    return Data(sequences, np.full(period, 1 / period))


def transition(keep, noise):
    """The matrix [from, to] of tokens kept with chance `keep`, else replaced by a draw from `noise` (states,)."""
    return keep * np.eye(len(noise)) + (1 - keep) * np.broadcast_to(noise, (len(noise), len(noise)))


def noise_of(process):
    """The noise distribution over the states of a process."""
    if process.states > process.vocab:
        return np.eye(process.states)[process.vocab]
    return np.full(process.vocab, 1 / process.vocab)


def bayes(process, keep_t, keep_s):
    """q(x_s | x_t, x0) as [x0, x_t, x_s] for x0 in the vocabulary; NaN where x0 cannot become x_t."""
    noise = noise_of(process)
    at_s, at_t = transition(keep_s, noise), transition(keep_t, noise)
    between = transition(keep_t / keep_s, noise)
    joint = at_s[:, None, :] * between.T[None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (joint / at_t[:, :, None])[: process.vocab]


def chi_square(draws, sequences, chances):
    """Standard deviations that the chi-square of drawn sequences (b, n) is above its mean; inf if one is impossible."""
    counts = np.array([(draws == sequence).all(1).sum() for sequence in sequences])
    if counts.sum() != len(draws):
        return np.inf
    likely = chances * len(draws) >= 4  # the rest go into one bin
    seen = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(chances[likely], chances[~likely].sum()) * len(draws)
    terms = (seen - wanted) ** 2 / np.maximum(wanted, 1)
    freedom = len(terms) - 1
    return (terms.sum() - freedom) / np.sqrt(2 * max(freedom, 1))
