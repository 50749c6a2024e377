"""The U-Net of latent diffusion: conditioning has an effect, any size, wrong inputs are named. Parity: the witness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.nets import SDUNet

TINY = {"channels": (8, 16), "num_blocks": 1, "heads": (2, 2), "depth": (1, 1), "groups": 4, "token_dim": 6}
XL = TINY | {"attention": ("none", "cross"), "linear_projection": True, "vector_dim": 10, "size_features": 4}


@pytest.fixture(scope="module")
def xl():
    """A tiny SDXL, its parameters away from zero, and inputs of an odd size."""
    net = SDUNet(**XL)
    shape = {"x": (2, 5, 6, 4), "tokens": (2, 3, 6), "vector": (2, 10), "sizes": (2, 6)}
    inputs = {k: jax.random.normal(jax.random.key(i), s) for i, (k, s) in enumerate(shape.items())}
    inputs["time"] = jnp.float32([3.0, 900.0])
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: net.init(jax.random.key(0), **inputs)))
    rng = np.random.default_rng(0)
    params = tree.unflatten(
        [jnp.float32(rng.normal(size=x.shape) / max(np.prod(x.shape[:-1]), 4) ** 0.5) for x in leaves]
    )
    return params, inputs, jax.jit(net.apply)


@pytest.mark.parametrize("name", ["time", "tokens", "vector", "sizes"])
def test_each_row_listens_to_its_own_conditioning(xl, name):
    params, inputs, apply = xl
    y = apply(params, **inputs)
    changed = apply(params, **inputs | {name: inputs[name].at[0].multiply(0.9)})
    assert y.shape == (2, 5, 6, 4)
    assert np.abs(changed[0] - y[0]).max() > 1e-4
    np.testing.assert_array_equal(changed[1], y[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, r"tokens must have shape \(2, -1, 6\), got None"),
        ({"tokens": jnp.zeros((2, 3, 5))}, r"tokens must have shape \(2, 3, 6\), got \(2, 3, 5\)"),
        ({"vector": None}, "vector must have shape"),
        ({"sizes": jnp.zeros((2, 4))}, r"sizes must have shape \(2, 6\)"),
        ({"labels": jnp.zeros(2, int)}, "labels must not be given"),
        ({"x": jnp.zeros((2, 4, 4, 3))}, r"\(b, h, w, 4\)"),
        ({"time": jnp.zeros(())}, "one per example"),
    ],
)
def test_wrong_inputs_are_named(xl, change, message):
    params, inputs, _ = xl
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(SDUNet(**XL).apply, params, **inputs | change)


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="one entry for each of 2 levels"):
        SDUNet(**TINY)
    with pytest.raises(ConfigError, match="heads=3 must divide"):
        SDUNet(**XL | {"heads": (3, 2)})
    with pytest.raises(ConfigError, match="token_dim must be given"):
        SDUNet(**XL | {"token_dim": None})


def test_remat_changes_no_gradient_and_computes_again_what_it_says(xl):
    params, inputs, _ = xl

    def gradient(remat):
        def loss(tokens):
            return jnp.square(SDUNet(**XL, remat=remat).apply(params, **inputs | {"tokens": tokens})).mean()

        return jax.grad(loss)

    plain, *others = (jax.jit(gradient(remat))(inputs["tokens"]) for remat in ("none", "full", "dots"))
    assert np.abs(plain).max() > 0
    for other in others:
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-6)
    programs = [str(jax.make_jaxpr(gradient(remat))(inputs["tokens"])) for remat in ("none", "dots", "full")]
    products = [program.count("dot_general") for program in programs]
    assert products[0] < products[1] < products[2]
    assert ["remat" in program for program in programs] == [False, True, True]
    with pytest.raises(ConfigError, match="remat must be one of none, full, dots"):
        SDUNet(**XL, remat="some")


def test_the_published_sizes():
    """The numbers of parameters of Stable Diffusion 1.5 and XL, as their papers and cards give them."""

    def count(net, **inputs):
        x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
        shapes = jax.eval_shape(net.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.float32), **inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def text(width):
        return jax.ShapeDtypeStruct((1, 77, width), jnp.float32)

    assert count(SDUNet(), tokens=text(768)) == 859_520_964
    xl = SDUNet(
        channels=(320, 640, 1280), attention=("none", "cross", "cross"), heads=(5, 10, 20), depth=(1, 2, 10),
        token_dim=2048, vector_dim=1280, linear_projection=True,
    )  # fmt: skip
    vector, sizes = jax.ShapeDtypeStruct((1, 1280), jnp.float32), jax.ShapeDtypeStruct((1, 6), jnp.float32)
    assert count(xl, tokens=text(2048), vector=vector, sizes=sizes) == 2_567_463_684
