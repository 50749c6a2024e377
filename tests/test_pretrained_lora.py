"""LoRA: one set of factors in every layout gives the same addition, which is the sum written out; merging is pure."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.pretrained import files, lora
from jaxdiff.pretrained import pipelines as published

FOLDER = Path(__file__).parent / "fixtures" / "tiny_sd"
RANK, ALPHA = 3, 6.0
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RESIDUAL = "down_blocks.0.resnets.0"
TEXT = "text_model.encoder.layers.1.self_attn"


@pytest.fixture(scope="module")
def params():
    return published.load(FOLDER, variant="fp16").params


@pytest.fixture(scope="module")
def factors():
    """module -> (down (r, in, ...), up (out, r, ...)) in torch's layout."""
    rng = np.random.default_rng(0)
    shapes = {f"{ATTENTION}.to_q": ((3, 8), (8, 3)), f"{ATTENTION}.to_out.0": ((3, 8), (8, 3))}
    shapes[f"{RESIDUAL}.conv1"] = ((3, 8, 3, 3), (8, 3, 1, 1))
    shapes[f"{TEXT}.q_proj"] = ((3, 12), (12, 3))
    return {name: tuple(np.float32(rng.normal(size=s)) for s in pair) for name, pair in shapes.items()}


def kohya(factors):
    made = {}
    for name, (down, up) in factors.items():
        stem = ("lora_te_" if "text" in name else "lora_unet_") + name.replace(".", "_")
        made |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.float32(ALPHA)}
    return made


def diffusers(factors):
    made = {}
    for name, (down, up) in factors.items():
        stem = ("text_encoder." if "text" in name else "unet.") + name
        made |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * ALPHA / RANK}
    return made


def old_diffusers(factors):
    made = {}
    for name, (down, up) in factors.items():
        module, _, last = name.removesuffix(".0").rpartition(".")
        stem = f"unet.{module}.processor.{last}_lora" if "attn1" in name else f"unet.{name}.lora"
        stem = f"text_encoder.{name}.lora_linear_layer" if "text" in name else stem
        made |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up * ALPHA / RANK}
    return made


@pytest.mark.parametrize("layout", [kohya, diffusers, old_diffusers])
def test_every_layout_is_the_sum_written_out(params, factors, layout):
    merged = lora.merge(params, lora.load(layout(factors), params), 0.5)
    changed = {
        "unet/" + lora._name(path): (np.asarray(a), np.asarray(b))
        for (path, a), b in zip(
            jax.tree_util.tree_flatten_with_path(params["unet"])[0], jax.tree.leaves(merged["unet"]), strict=True
        )
        if np.any(a != b)
    }
    assert len(changed) == 3
    for name, (down, up) in factors.items():
        wanted = 0.5 * ALPHA / RANK * np.tensordot(up.reshape(len(up), RANK), down, axes=1)
        if "text" in name:
            a, b = (tree["text_0"]["params"]["layer_1"]["attention"]["query"]["kernel"] for tree in (params, merged))
            added = np.asarray(b - a).T
        else:
            path = name.replace(".0", "_0").replace(".", "/")
            a, b = changed[f"unet/{path}/kernel"]
            added = (b - a).T if a.ndim == 2 else (b - a).transpose(3, 2, 0, 1)
        np.testing.assert_allclose(added, wanted, atol=1e-5)


def test_a_peft_folder_says_its_alpha_beside(params, factors, tmp_path):
    unet = {name: pair for name, pair in factors.items() if "text" not in name}
    tensors = {}
    for name, (down, up) in unet.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    ours = lora.load(tmp_path / "adapter_model.safetensors", params)
    wanted = lora.load(kohya(unet), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, wanted)


@pytest.mark.parametrize("layout", lora.LAYOUTS)
def test_what_is_written_is_read_again(params, factors, tmp_path, layout):
    read = lora.load(kohya(factors), params)
    read = {"unet": read["unet"]} if layout == "peft" else read
    lora.export(tmp_path / "x.safetensors", read, params, layout=layout)
    again = lora.load(tmp_path / "x.safetensors", params)
    a, b = (lora.merge(params, entries) for entries in (read, again))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
    names = {"kohya": set(kohya(factors)), "diffusers": set(diffusers(factors))}
    assert set(files.read(tmp_path / "x.safetensors")) == names.get(layout, set(files.read(tmp_path / "x.safetensors")))


def test_what_a_layout_cannot_hold_is_refused(params, factors, tmp_path):
    read = lora.load(kohya(factors), params)
    for path, layout, words in (("x.bin", "kohya", "must end in"), ("x.safetensors", "peft", "of the U-Net alone")):
        with pytest.raises(ConfigError, match=words):
            lora.export(tmp_path / path, read, params, layout=layout)
    with pytest.raises(ConfigError, match="must be one of diffusers, kohya, peft, got 'webui'"):
        lora.export(tmp_path / "x.safetensors", read, params, layout="webui")
    assert list(tmp_path.iterdir()) == []


def test_an_xl_names_its_first_text_encoder_te1(params, factors, tmp_path):
    read = {"text_0": lora.load(kohya(factors), params)["text_0"]}
    lora.export(tmp_path / "x.safetensors", read, params | {"text_1": {}}, layout="kohya")
    assert all(name.startswith("lora_te1_text_model_") for name in files.read(tmp_path / "x.safetensors"))


def test_a_new_one_adds_nothing_and_says_what_trains(params):
    shapes = jax.eval_shape(lambda: params)
    start = lora.init(jax.random.key(0), shapes, rank=2, alpha=3.0)
    assert len(start["unet"]) == 4 * 2 * 4  # q, k, v, out; self and cross; one down, one middle, two up
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, start), params)
    trained, fixed = lora.split(start)
    assert all(set(pair) == {"down", "up"} for pair in trained["unet"].values())
    assert set(map(float, jax.tree.leaves(fixed))) == {1.5}
    assert jax.tree.structure(lora.join(trained, fixed)) == jax.tree.structure(start)
    with pytest.raises(ConfigError, match="no kernel matches"):
        lora.init(jax.random.key(0), params, match="nothing")


def test_its_gradient_is_the_full_one_by_the_chain_rule(params):
    """W' = W + s down up, so dL/d up = s down^T dL/dW' and dL/d down = s dL/dW' up^T."""
    rng = np.random.default_rng(0)
    trained, fixed = lora.split(lora.init(jax.random.key(0), params, rank=2, alpha=3.0, match=".*(to_q|conv1)/kernel"))
    trained = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), trained)

    def loss(unet):
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(unet))

    merged = lora.merge({"unet": params["unet"]}, lora.join(trained, fixed))["unet"]
    full = jax.grad(loss)(merged)
    gradient = jax.grad(lambda t: loss(lora.merge({"unet": params["unet"]}, lora.join(t, fixed))["unet"]))(trained)
    assert {lora._leaf(params["unet"], path).ndim for path in gradient["unet"]} == {2, 4}
    for path, pair in gradient["unet"].items():
        whole = np.asarray(lora._leaf(full, path)).reshape(-1, pair["up"].shape[-1])
        down, up = (np.asarray(trained["unet"][path][name]) for name in ("down", "up"))
        np.testing.assert_allclose(pair["up"], 1.5 * down.reshape(-1, 2).T @ whole, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(pair["down"].reshape(-1, 2), 1.5 * whole @ up.T, rtol=1e-4, atol=1e-4)


def test_what_does_not_belong_is_named(params, factors):
    with pytest.raises(CheckpointError, match=r"lora_unet_hat.lora_down.weight"):
        lora.load(kohya(factors) | {"lora_unet_hat.lora_down.weight": np.ones((3, 8), np.float32)}, params)
    tensors = kohya(factors)
    name = next(name for name in tensors if name.endswith("to_q.lora_down.weight"))
    with pytest.raises(CheckpointError, match="do not make its"):
        lora.load(tensors | {name: np.ones((3, 9), np.float32)}, params)
    with pytest.raises(CheckpointError, match="has alpha and up only"):
        lora.load({k: v for k, v in tensors.items() if k != name}, params)
