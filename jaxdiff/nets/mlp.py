"""A residual multilayer perceptron for points, not pictures: two-dimensional toy data, features, latents.

    h = W x;   h = h + V silu(U silu(LN(h)) + C e)   per layer;   y = W' silu(LN(h)),  V = W' = 0 at the start

e is the conditioning vector of time, class and vector.
"""

from typing import Any

import flax.linen as nn

from jaxdiff.nets import init, layers
from jaxdiff.nets.conditioning import (
    Embedding,
    LayerNorm,
    check_common,
    check_inputs,
    check_positive,
    compute_dtype,
    dense,
)
from jaxdiff.types import Array


class MLP(nn.Module):
    """`net.apply(params, x, time, labels=, vector=)`: points x (b, d) -> (b, out_features, or d). Time in [0, 1].

    labels (b,) need num_classes (-1: no class), vector (b, n) needs vector_dim. `dtype` is the dtype of computation.
    Raises ConfigError for settings or inputs that do not fit; tokens are not supported and are refused.
    """

    width: int = 128
    depth: int = 3
    out_features: int | None = None
    time_scale: float = 1000.0
    num_classes: int | None = None
    vector_dim: int | None = None
    dtype: Any = None
    token_dim = None

    def __post_init__(self):
        super().__post_init__()
        check_positive(
            width=self.width, depth=self.depth, out_features=self.out_features, num_classes=self.num_classes,
            vector_dim=self.vector_dim,
        )  # fmt: skip
        check_common(0.0, self.dtype)

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        *,
        labels: Array | None = None,
        vector: Array | None = None,
        tokens: Array | None = None,
        token_mask: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        del deterministic  # there is no dropout; the argument is that of every network
        inputs = {"labels": labels, "vector": vector, "tokens": tokens, "token_mask": token_mask}
        check_inputs(self, x, 2, time, inputs)
        e = Embedding(
            self.width, 128, self.time_scale, num_classes=self.num_classes, vector_dim=self.vector_dim, name="time"
        )(time, labels, vector)
        h = dense(x.astype(compute_dtype(x, self.dtype)), self.width, "stem", init.XAVIER)
        e = e.astype(h.dtype)
        for i in range(self.depth):
            r = dense(nn.silu(LayerNorm(name=f"norm_{i}")(h)), self.width, f"in_{i}", init.XAVIER)
            r = nn.silu(r + dense(e, self.width, f"embedding_{i}", init.XAVIER, bias=False))
            h = h + dense(r, self.width, f"out_{i}", layers.ZEROS)
        h = nn.silu(LayerNorm(name="out_norm")(h.astype(compute_dtype(x, None))))
        return dense(h, self.out_features or x.shape[-1], "out", layers.ZEROS).astype(x.dtype)
