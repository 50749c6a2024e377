"""The two processes: each token is kept with chance k(t), else replaced by a draw from the noise, by itself.

    q(x_t | x0) = k_t [x_t = x0] + l_t noise(x_t),   l = 1 - k      noise: the mask, or uniform over the vocabulary
    q(x_t | x_s) = a [x_t = x_s] + (1 - a) noise(x_t),   a = k_t / k_s,   s <= t

The posterior is linear in the distribution m of x0: m = [x0] gives q(x_s | x_t, x0), m = softmax(logits) gives the
model's p(x_s | x_t). With d = k_s - k_t, for y != x_t, and z = k_t + l_t / V the chance q(x_t | x0) of x_t = x0,

    masked    p(y) = d m(y) / l_t  where x_t is the mask;              p(x_t) = l_s / l_t  (1 where it is a token)
    uniform   p(y) = d [m(y) / l_t + r / (k_s V)],                     p(x_t) = (a + (1 - a) / V) [k_s m(x_t) / z + r]
              r = (l_s / l_t) (1 - m(x_t) k_t / z)

So d times `odds` is the chance to jump, and -k'(t) times the odds of s = t the rate of jumps in continuous time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxdiff.discrete.keep import Keep, linear
from jaxdiff.errors import ConfigError, check_count
from jaxdiff.schedule import expand
from jaxdiff.schedule.base import require
from jaxdiff.types import Array, Key


@dataclasses.dataclass(frozen=True)
class Process:
    """What both processes share: `vocab` tokens 0 .. vocab - 1, and `schedule`, the chance that one is kept."""

    vocab: int
    schedule: Keep

    @property
    def states(self) -> int:
        """The number of values that x_t can take."""
        raise NotImplementedError

    def keep(self, t: Array) -> Array:
        """The chance that a token is untouched at t."""
        return self.schedule.keep(t)

    def levels(self, t: Array, like: Array) -> tuple[Array, Array]:
        """(keep, lost) at t, a scalar or (b,), shaped to broadcast against `like` (b, ...)."""
        return expand(self.schedule.keep(t), like), expand(self.schedule.lost(t), like)

    def gained(self, t: Array, s: Array, like: Array) -> Array:
        """keep(s) - keep(t), from whichever of keep and lost is small and so precise."""
        (k_t, l_t), (k_s, l_s) = self.levels(t, like), self.levels(s, like)
        return jnp.where(l_t < k_t, l_t - l_s, k_s - k_t)

    def noise(self, key: Key, shape: tuple[int, ...]) -> Array:
        """Tokens of pure noise, int32."""
        raise NotImplementedError

    def reverse(self, m: Array, x_t: Array, t: Array, s: Array) -> tuple[Array, Array]:
        """(chance to stay (b, n), odds of a jump to each token (b, n, V)) from x_t (b, n), for m (b, n, V) of x0.

        Linear in m, which need not be a distribution. The odds of x_t itself are 0.
        """
        raise NotImplementedError

    def divergence(self, log_p: Array, x0: Array, x_t: Array, t: Array, s: Array) -> tuple[Array, Array]:
        """The parts (odds, stay), (b, n), of KL(q(x_s | x_t, x0) || p(x_s | x_t)) in nats; the odds times d."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Masked(Process):
    """Absorbing noise: a token becomes the mask, state `vocab`, and stays it (Austin et al. 2021, section 3.1)."""

    @property
    def states(self) -> int:
        return self.vocab + 1

    @property
    def mask(self) -> int:
        """The state that stands for a masked token."""
        return self.vocab

    def noise(self, key: Key, shape: tuple[int, ...]) -> Array:
        return jnp.full(shape, self.mask, jnp.int32)

    def reverse(self, m: Array, x_t: Array, t: Array, s: Array) -> tuple[Array, Array]:
        masked = x_t == self.mask
        l_t, l_s = (self.levels(u, m[..., 0])[1] for u in (t, s))
        l_t, l_s = jnp.where(l_t > 0, l_t, 1), jnp.where(l_t > 0, l_s, 1)
        stay = jnp.where(masked, l_s / l_t, 1) * jnp.sum(m, axis=-1)
        return stay, jnp.where(masked[..., None], m / l_t[..., None], 0)

    def divergence(self, log_p: Array, x0: Array, x_t: Array, t: Array, s: Array) -> tuple[Array, Array]:
        # The cross entropy (Shi et al. 2024, eq. 4): whether to jump is known, only where to is not.
        l_t = self.levels(t, log_p[..., 0])[1]
        cross_entropy = jnp.where(x_t == self.mask, -pick(log_p, x0), 0)
        return cross_entropy / jnp.where(l_t > 0, l_t, 1), jnp.zeros_like(cross_entropy)


@dataclasses.dataclass(frozen=True)
class Uniform(Process):
    """Uniform noise: a token becomes any of the vocabulary, itself included (Austin et al. 2021, section 3.1)."""

    @property
    def states(self) -> int:
        return self.vocab

    def noise(self, key: Key, shape: tuple[int, ...]) -> Array:
        return jax.random.randint(key, shape, 0, self.vocab, jnp.int32)

    def reverse(self, m: Array, x_t: Array, t: Array, s: Array) -> tuple[Array, Array]:
        (k_t, l_t), (k_s, l_s) = self.levels(t, m[..., 0]), self.levels(s, m[..., 0])
        noisy, some = l_t > 0, jnp.where(k_s > 0, k_s, 1)
        l_t, l_s = jnp.where(noisy, l_t, 1), jnp.where(noisy, l_s, 1)
        here, z = pick(m, x_t), k_t + l_t / self.vocab
        total, fresh = jnp.sum(m, axis=-1), self.gained(t, s, k_t) / some
        rest = l_s / l_t * (total - here * k_t / z)
        stay = jnp.where(noisy, (1 - fresh + fresh / self.vocab) * (k_s * here / z + rest), total)
        odds = m / l_t[..., None] + (rest / (some * self.vocab))[..., None]
        return stay, jnp.where(one_hot(x_t, self.vocab, bool) | ~noisy[..., None], 0, odds)

    def divergence(self, log_p: Array, x0: Array, x_t: Array, t: Array, s: Array) -> tuple[Array, Array]:
        p, q = jnp.exp(log_p), one_hot(x0, self.vocab, log_p.dtype)
        (q_stay, q_odds), (p_stay, p_odds), (stay_gap, odds_gap) = (self.reverse(m, x_t, t, s) for m in (q, p, p - q))
        return jnp.sum(kl_term(q_odds, p_odds, odds_gap), axis=-1), kl_term(q_stay, p_stay, stay_gap)


def masked(vocab: int, schedule: Keep | None = None) -> Masked:
    """The absorbing process over `vocab` tokens and the mask, which is state `vocab`; `schedule` is linear by default.

    Raises ConfigError unless vocab is an integer >= 1 and keep falls from 1 at t = 0 to 0 at t = 1.
    """
    return Masked(_check_vocab(vocab, 1), _check_ends(schedule or linear()))


def uniform(vocab: int, schedule: Keep | None = None) -> Uniform:
    """The uniform process over `vocab` tokens; `schedule` is linear by default.

    Raises ConfigError unless vocab is an integer >= 2 and keep falls from 1 at t = 0 to 0 at t = 1.
    """
    return Uniform(_check_vocab(vocab, 2), _check_ends(schedule or linear()))


def binomial(schedule: Keep | None = None) -> Uniform:
    """Bits that turn into fair coin flips, B(x (1 - beta) + beta / 2) (Sohl-Dickstein et al. 2015, table App. 1).

    It is the uniform process of 2 tokens, and its own schedule, beta_i = 1 / (T - i + 1), the linear one.
    """
    return uniform(2, schedule)


def pick(m: Array, x: Array) -> Array:
    """m[..., x] for m (b, n, V) and tokens x (b, n); a mask reads the last token's."""
    index = jnp.minimum(x, m.shape[-1] - 1)[..., None]
    return jnp.take_along_axis(m, index, axis=-1)[..., 0]


def one_hot(x: Array, size: int, dtype: jnp.dtype | type) -> Array:
    """Tokens (b, n) as (b, n, size)."""
    return jax.nn.one_hot(x, size, dtype=dtype)


def kl_term(q: Array, p: Array, gap: Array) -> Array:
    """q log(q / p) - q + p, at least 0 and finite; `gap` is p - q without cancellation.

    It sums to the KL of two distributions, and of two jump processes with rates q and p.
    """
    safe = jnp.where(q > 0, q, 1)
    x = gap / safe
    close = jnp.abs(x) < 0.5
    near = jnp.where(close, x, 0)
    ratio = jnp.maximum(jnp.where(close, q, p), float(jnp.finfo(p.dtype).tiny)) / safe
    distance = jnp.where(close, near - jnp.log1p(near), x - jnp.log(ratio))
    return jnp.where(q > 0, q * distance, p)


def check_tokens(name: str, x: Array, states: int) -> Array:
    """`x` as int32 (b, n). Raises ConfigError for another shape or dtype, or values out of range (if not traced)."""
    x = jnp.asarray(x)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ConfigError(
            f"{name} must be integer tokens of shape (b, n), got {x.dtype} of shape {x.shape}. "
            "Flatten pictures with x.reshape(b, -1)."
        )
    if not isinstance(x, Tracer) and x.size:
        low, high = int(np.min(np.asarray(x))), int(np.max(np.asarray(x)))
        if low < 0 or high >= states:
            raise ConfigError(
                f"{name} must hold tokens from 0 to {states - 1}, got values from {low} to {high}. "
                "Check the vocab that the process was made with."
            )
    return x.astype(jnp.int32)


def _check_vocab(vocab: int, least: int) -> int:
    return check_count("vocab", vocab, "It is the number of tokens, the mask not counted.", least=least)


def _check_ends(schedule: Keep) -> Keep:
    require(
        hasattr(schedule, "keep"),
        f"schedule must have keep(t), the chance that a token is kept, got {schedule!r}. Use discrete.cosine().",
    )
    with jax.ensure_compile_time_eval():
        start, end = (float(schedule.keep(jnp.asarray(t, jnp.float32))) for t in (0.0, 1.0))
    require(
        start == 1 and end == 0,
        f"keep must be 1 at t = 0 and 0 at t = 1, got {start} and {end}. Use discrete.linear(), or rescale yours.",
    )
    return schedule
