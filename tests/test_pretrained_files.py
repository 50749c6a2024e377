"""Reading and writing other people's files: layouts, the report of keys, and what is refused."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdiff.errors import CheckpointError, UnsafeFileError
from jaxdiff.pretrained import files, keys

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "net.layers.0.q.weight": RANDOM.standard_normal((3, 4)).astype(np.float32),
    "net.layers.0.q.bias": RANDOM.standard_normal(3).astype(np.float32),
    "net.layers.11.q.weight": RANDOM.standard_normal((3, 4)).astype(np.float32),
    "net.layers.11.q.bias": RANDOM.standard_normal(3).astype(np.float32),
    "net.conv.weight": RANDOM.standard_normal((2, 3, 5, 5)).astype(np.float32),
    "net.scale": np.float32(2.5).reshape(()),
}
TABLE = [
    *keys.linear("layer_{i}/query", "net.layers.{i}.q"),
    *keys.conv("conv", "net.conv", bias=False),
    keys.Rule("scale", "net.scale"),
]
SHAPES = {
    "params": {
        "layer_0": {"query": {"kernel": (4, 3), "bias": (3,)}},
        "layer_11": {"query": {"kernel": (4, 3), "bias": (3,)}},
        "conv": {"kernel": (5, 5, 3, 2)},
        "scale": (),
    }
}


def template(dtype=jnp.float32, **changed):
    shapes = {"params": SHAPES["params"] | changed}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))


def raw(path, header, data=b""):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- files


@pytest.mark.parametrize("dtype", [*files._DTYPES], ids=str)
def test_every_type_comes_back_as_it_was(tmp_path, dtype):
    kind = files._DTYPES[dtype]
    tensors = {"b": np.arange(6).reshape(2, 3).astype(kind), "a": np.ones((), kind), "empty": np.zeros((0, 2), kind)}
    files.write(tmp_path, tensors, {})
    back = files.read(tmp_path)
    assert {name: tensor.shape for name, tensor in back.items()} == {"a": (), "b": (2, 3), "empty": (0, 2)}
    for name, tensor in tensors.items():
        assert np.asarray(back[name]).dtype == tensor.dtype
        assert np.asarray(back[name]).tobytes() == tensor.tobytes()


def test_a_tensor_is_written_in_the_order_of_its_axes(tmp_path):
    x = np.arange(6.0).reshape(2, 3)
    files.write(tmp_path, {"x": x.T, "y": x[:, ::2]}, {"hidden_size": 3})
    back = files.read(tmp_path)
    np.testing.assert_array_equal(np.asarray(back["x"]), x.T)
    np.testing.assert_array_equal(np.asarray(back["y"]), x[:, ::2])
    assert files.config(tmp_path) == {"hidden_size": 3}


def test_folder_index_variant_and_file_are_the_same_model(tmp_path):
    files.write(tmp_path / "whole", WEIGHTS, {})
    names = list(WEIGHTS)
    for i, part in enumerate((names[:2], names[2:])):
        files.write(tmp_path / "parts", {n: WEIGHTS[n] for n in part}, {}, stem=f"model-{i}")
    where = {name: f"model-{int(i >= 2)}.safetensors" for i, name in enumerate(names)}
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    half = {name: w.astype(np.float16) for name, w in WEIGHTS.items()}
    files.write(tmp_path / "whole", half, {}, stem="model.fp16")
    for tensors in (
        files.read(tmp_path / "whole"),
        files.read(tmp_path / "whole" / "model.safetensors"),
        files.read(tmp_path / "parts"),
    ):
        assert {name: np.asarray(t).tobytes() for name, t in tensors.items()} == {
            name: w.tobytes() for name, w in WEIGHTS.items()
        }
    for name, tensor in files.read(tmp_path / "whole", variant="fp16").items():
        assert tensor.dtype == np.float16
        np.testing.assert_array_equal(np.asarray(tensor), half[name])


def test_a_folder_with_only_a_variant_says_so(tmp_path):
    files.write(tmp_path, WEIGHTS, {}, stem="model.fp16")
    with pytest.raises(CheckpointError, match=r"holds model\.fp16\.safetensors"):
        files.read(tmp_path)
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "lora.safetensors")
    assert set(files.read(tmp_path)) == set(WEIGHTS)  # the only one there is


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sd-v1-4.ckpt", "weights.pt", "x.npz"])
def test_a_pickle_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsafeFileError, match=r"Convert it to \.safetensors first"):
            files.read(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(60), b"\x80\x02ctorch", b"\x80\x05\x95" + bytes(9)])
def test_a_pickle_is_refused_by_content(tmp_path, content):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsafeFileError, match="pickle files can run code"):
        files.read(tmp_path)
    with pytest.raises(UnsafeFileError, match="pickle files can run code"):
        files.config(tmp_path)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = raw(tmp_path / "model.safetensors", header.ljust(0x0280), b"\x07")
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert np.asarray(files.read(tmp_path)["x"]).tolist() == [7]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", ".."])
def test_an_index_stays_in_its_folder(tmp_path, name):
    files.write(tmp_path, WEIGHTS, {}, stem="secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"net.scale": name}}))
    with pytest.raises(UnsafeFileError, match=r"Only \.safetensors files beside it"):
        files.read(folder)


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (entry((2**40,), (0, 2**42)), b"12345678"),  # more than the file holds
        (entry((2**62, 4), (0, 8)), b"12345678"),  # a product that overflows
        (entry((2,), (8, 0)), b"12345678"),
        (entry((2,), (-8, 0)), b"12345678"),
        (entry((2,), (4, 12)), b"123456781234"),  # a gap
        (entry((3,), (0, 8)), b"12345678"),
        (entry((2,), (0, 8)), b"1234567"),  # cut short
        (entry((2,), (0, 8)), b"123456789"),
        (entry((-2,), (0, 8)), b"12345678"),
        (entry(dtype="F31"), b"12345678"),
        ({"x": entry()["x"], "y": entry()["x"]}, b"12345678"),  # two tensors in one place
        ({"x": [[[]]]}, b""),
        (b"[" * 10_000, b""),
        (b"{", b""),
        (b"\xff\xfe{}", b""),
    ],
)
def test_a_header_is_checked_against_its_file(tmp_path, header, data):
    raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match="damaged"):
        files.read(tmp_path)


def test_a_sound_file_passes_that_check(tmp_path):
    raw(tmp_path / "model.safetensors", entry(), struct.pack("<ff", 1, 2))
    assert np.asarray(files.read(tmp_path)["x"]).tolist() == [1, 2]


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", b"\xff" * 64])
def test_a_file_that_has_no_header(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        files.read(tmp_path)


def test_a_file_cut_after_it_was_opened_is_an_error(tmp_path):
    files.write(tmp_path, {"x": np.ones(1000)}, {})
    tensor = files.read(tmp_path)["x"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match="cut after it was opened"):
        np.asarray(tensor)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        np.asarray(tensor)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '"x"', "\xff"])
def test_a_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"damaged|must hold"):
        files.config(tmp_path)


def test_a_huge_config_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10 * files.MAX_JSON)
    with pytest.raises(CheckpointError, match="41,943,040 bytes"):
        files.config(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"x": 1}, {"x": None}])
def test_a_damaged_index(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map must be"):
        files.read(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path):
    files.write(tmp_path, {"a": np.ones(1)}, {}, stem="part")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match="holds b, and it does not"):
        files.read(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="there is no file"):
        files.read(tmp_path)


# --- the Hub

LISTING = """model_index.json v1-5-pruned.safetensors v1-5-pruned.ckpt README.md unet/config.json
unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.bin
unet/diffusion_pytorch_model-00001-of-00002.safetensors unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
text_encoder/model.safetensors text_encoder/model.fp16.safetensors text_encoder/pytorch_model.bin
tokenizer/merges.txt tokenizer/vocab.json model.safetensors model.fp16.safetensors evil.py evil/evil.py"""


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        (None, [".safetensors", "-00001-of-00002.safetensors"]),
        ("fp16", [".fp16.safetensors", ".fp16-00001-of-00002.safetensors"]),
    ],
)
def test_only_weights_json_and_vocabularies_are_fetched(monkeypatch, tmp_path, variant, wanted):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **rest: asked.update(rest) or str(tmp_path))
    assert files.download("a/b", variant=variant, revision="main") == tmp_path
    fetched = huggingface_hub.utils.filter_repo_objects(
        LISTING.split(), allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    expected = {f"unet/diffusion_pytorch_model{end}" for end in wanted}
    expected |= {f"{place}model{wanted[0]}" for place in ("", "text_encoder/")}
    expected |= {"model_index.json", "unet/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json"}
    assert set(fetched) == expected


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="did not give a/b: no connection"):
        files.download("a/b")


# --- memory

LOAD = """
import sys, jax, numpy as np
from pathlib import Path
from jaxdiff.pretrained import files, keys
table = keys.linear("layer_{i}", "layers.{i}", bias=False)
def load(names):
    tensors = {name: tensor for name, tensor in files.read(sys.argv[1]).items() if name in names}
    if sys.argv[2] == "eager":
        tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    layers = {f"layer_{name.split('.')[1]}": {"kernel": tensor.shape[::-1]} for name, tensor in tensors.items()}
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)
    shapes = jax.tree.map(leaf, {"params": layers}, is_leaf=lambda x: isinstance(x, tuple))
    return jax.block_until_ready(keys.load(shapes, tensors, table))
load({"layers.0.weight"})
def memory(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
before = memory("VmRSS")
params = load({f"layers.{i}.weight" for i in range(32)})
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of memory")
@pytest.mark.parametrize(("how", "least", "most"), [("lazy", 0.5, 1.2), ("eager", 1.6, 3.0)])
def test_loading_takes_little_more_than_the_weights(tmp_path, how, least, most):
    """And the test would see a second copy."""
    size = 32 * 4 * 2**20
    files.write(tmp_path, {f"layers.{i}.weight": np.full((1024, 1024), i, np.float32) for i in range(32)}, {})
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), how], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert least < int(done.stdout) / size < most


def test_what_is_written_has_the_usual_permissions(tmp_path):
    files.write(tmp_path, WEIGHTS, {})
    (tmp_path / "usual").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


# --- keys


def test_load_by_hand():
    params = keys.load(template(), WEIGHTS, TABLE)["params"]
    np.testing.assert_array_equal(params["layer_11"]["query"]["kernel"], WEIGHTS["net.layers.11.q.weight"].T)
    np.testing.assert_array_equal(params["layer_0"]["query"]["bias"], WEIGHTS["net.layers.0.q.bias"])
    assert params["conv"]["kernel"][3, 1, 2, 0] == WEIGHTS["net.conv.weight"][0, 2, 3, 1]
    assert params["scale"] == 2.5


def test_a_round_trip_changes_no_bit(tmp_path):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        weights = {name: w.astype(dtype) for name, w in WEIGHTS.items()}
        files.write(tmp_path, weights, {})
        params = keys.load(template(), files.read(tmp_path), TABLE)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        back = keys.export(params, TABLE, dtype=dtype)
        assert {n: w.tobytes() for n, w in back.items()} == {n: w.tobytes() for n, w in weights.items()}


def test_the_report_names_every_key():
    tensors = dict(WEIGHTS)
    del tensors["net.layers.0.q.bias"]
    tensors |= {"net.conv.weight": np.ones((2, 3, 5)), "head.weight": np.ones(1), "a.position_ids": np.ones(1)}
    report = keys.compare(template(extra=(1,)), tensors, TABLE, ignore=["*.position_ids"])
    assert not report.ok
    assert report.matched == (
        ("layer_0/query/kernel", "net.layers.0.q.weight"),
        ("layer_11/query/bias", "net.layers.11.q.bias"),
        ("layer_11/query/kernel", "net.layers.11.q.weight"),
        ("scale", "net.scale"),
    )
    assert report.missing == ("no rule (extra)", "net.layers.0.q.bias (layer_0/query/bias)")
    assert report.unexpected == ("head.weight",)
    assert report.shape == ("net.conv.weight has (2, 3, 5) for conv/kernel (5, 5, 3, 2)",)
    assert str(report).startswith("4 matched; 2 missing: no rule (extra), net.layers.0.q.bias")
    with pytest.raises(CheckpointError, match=r"2 unexpected: a\.position_ids, head\.weight; 1 shape: net\.conv"):
        keys.load(template(extra=(1,)), tensors, TABLE)


def test_what_is_missing_may_keep_the_template_but_a_wrong_shape_may_not():
    first = keys.load(template(), WEIGHTS, TABLE)
    tensors = {"net.scale": np.ones((), np.float32), "other": np.ones(1)}
    second = keys.load(first, tensors, TABLE, strict=False)
    assert second["params"]["scale"] == 1
    np.testing.assert_array_equal(second["params"]["conv"]["kernel"], first["params"]["conv"]["kernel"])
    with pytest.raises(CheckpointError, match="template holds no array"):
        keys.load(template(), tensors, TABLE, strict=False)
    with pytest.raises(CheckpointError, match="1 shape"):
        keys.load(first, {"net.scale": np.ones(2)}, TABLE, strict=False)


def test_a_later_rule_reads_an_older_layout_and_is_never_written():
    def third(k):
        return keys.Transform(lambda x: np.split(x, 3)[k].T, lambda x: x)

    table = [*TABLE, *(keys.Rule("layer_{i}/query/kernel", "old.{i}.qkv", third(k)) for k in (1,))]
    tensors = {n: w for n, w in WEIGHTS.items() if n != "net.layers.0.q.weight"} | {
        "old.0.qkv": np.arange(36, dtype=np.float32).reshape(9, 4)
    }
    params = keys.load(template(), tensors, table)
    np.testing.assert_array_equal(params["params"]["layer_0"]["query"]["kernel"], np.arange(12, 24.0).reshape(3, 4).T)
    assert set(keys.export(params, table)) == set(WEIGHTS)


def test_an_unknown_parameter_is_not_exported_silently():
    with pytest.raises(CheckpointError, match="extra has no name"):
        keys.export({"extra": np.ones(1)}, TABLE)


def test_weights_do_not_share_memory_with_what_they_came_from():
    source = {name: w.copy() for name, w in WEIGHTS.items()}
    params = keys.load(template(), source, TABLE)
    source["net.layers.0.q.bias"][:] = 0
    np.testing.assert_array_equal(params["params"]["layer_0"]["query"]["bias"], WEIGHTS["net.layers.0.q.bias"])


def test_weights_are_born_sharded():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), template())
    shapes["params"]["layer_0"]["query"]["kernel"] = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=sharding)
    kernel = keys.load(shapes, WEIGHTS, TABLE)["params"]["layer_0"]["query"]["kernel"]
    assert kernel.sharding == sharding
    assert kernel.addressable_shards[0].data.shape == (2, 3)


def test_strip_and_select():
    assert keys.strip({"a.b": 1, "c": 2}, "a.") == {"b": 1, "c": 2}
    assert keys.select({"a.b": 1, "c": 2}, "a.") == {"b": 1}
