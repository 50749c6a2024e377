"""Published text and picture encoders: CLIP (OpenAI's and OpenCLIP's layouts), T5, BERT; read, and written back.

    model, params = pretrained.text.clip_text("stable-diffusion-v1-5/text_encoder")
    features = model.apply(params, ids)

Layouts understood, all to the same parameters:
    encoder.layers.0...                  transformers today          resblocks.0.attn.in_proj_weight    OpenCLIP
    text_model.encoder.layers.0...       published folders, with position_ids; and the two halves of a whole CLIP
Written is the layout of published folders, which transformers reads in every version.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained.keys import Rule
from jaxdiff.text.bert import Bert
from jaxdiff.text.clip import CLIPText, CLIPVision
from jaxdiff.text.t5 import T5Encoder
from jaxdiff.types import PyTree

Source = str | os.PathLike | Mapping[str, Any]
"""A folder or file of weights, or tensors by name, for which `config` must be given."""
Shardings = Callable[[PyTree], PyTree]
"""From a tree of shapes to one of shardings, as `train.mesh.state_sharding`: each leaf is born where it belongs."""

MAX_LAYERS = 256
"""No published text encoder has more; a damaged config must not keep the machine building layers."""

_POSITIONS = ("*position_ids",)


def clip_text(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[CLIPText, PyTree]:
    """A CLIP text encoder and its parameters; `pooled` is projected where the weights hold a projection.

    `config` as in config.json, read from the folder where it is not given; depth may be less than the file's (Stable
    Diffusion 2's single file holds one layer more than it uses). `dtype` is that of the computation. Raises
    CheckpointError or UnsafeFileError for files that do not fit or are not read.
    """
    tensors, settings = _open(source, config, variant)
    tensors = keys.strip({n: t for n, t in tensors.items() if not n.startswith(("vision", "visual"))}, "text_model.")
    projection = _size(tensors, "text_projection.weight", 0) or _size(tensors, "text_projection", 1)
    get = _reader(settings.get("text_config", settings))
    model = CLIPText(
        get("vocab_size", 49408), get("hidden_size", 512), get("num_hidden_layers", 12), get("num_attention_heads", 8),
        get("intermediate_size", 2048), get("max_position_embeddings", 77), get("hidden_act", "quick_gelu"),
        get("layer_norm_eps", 1e-5), get("eos_token_id", 49407), projection, dtype,
    )  # fmt: skip
    beyond = (f"transformer.resblocks.{i}.*" for i in range(model.depth, model.depth + 8))
    ignore = (*_POSITIONS, "logit_scale", "attn_mask", *beyond)
    return model, _load(model, tensors, clip_text_table(), ignore, shardings)


def clip_vision(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[CLIPVision, PyTree]:
    """A CLIP picture encoder and its parameters, as `clip_text`; from its own folder or from a whole CLIP's."""
    tensors, settings = _open(source, config, variant)
    tensors = keys.strip({n: t for n, t in tensors.items() if not n.startswith("text")}, "vision_model.")
    get = _reader(settings.get("vision_config", settings))
    model = CLIPVision(
        get("image_size", 224), get("patch_size", 32), get("hidden_size", 768), get("num_hidden_layers", 12),
        get("num_attention_heads", 12), get("intermediate_size", 3072), get("hidden_act", "quick_gelu"),
        get("layer_norm_eps", 1e-5), _size(tensors, "visual_projection.weight", 0), dtype,
    )  # fmt: skip
    return model, _load(model, tensors, _clip_vision_table(), (*_POSITIONS, "logit_scale"), shardings)


def t5(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[T5Encoder, PyTree]:
    """The encoder of a T5 and its parameters, as `clip_text`; a decoder in the same file is left.

    param_dtype: that in which the parameters are kept. XXL has 19 GB of them in float32.
    """
    tensors, settings = _open(source, config, variant)
    get = _reader(settings)
    gate, _, act = str(get("feed_forward_proj", "relu")).rpartition("-")
    model = T5Encoder(
        get("vocab_size", 32128), get("d_model", 512), get("num_layers", 6), get("num_heads", 8), get("d_kv", 64),
        get("d_ff", 2048), "gelu_new" if gate and act == "gelu" else act, bool(gate),
        get("relative_attention_num_buckets", 32), get("relative_attention_max_distance", 128),
        get("layer_norm_epsilon", 1e-6), dtype,
    )  # fmt: skip
    if "shared.weight" in tensors:  # published files hold the embedding twice
        tensors = {name: t for name, t in tensors.items() if name != "encoder.embed_tokens.weight"}
    return model, _load(model, tensors, _t5_table(model), ("decoder.*", "lm_head.*"), shardings, param_dtype)


def bert(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[Bert, PyTree]:
    """A BERT sentence encoder and its parameters, as `clip_text`; the pooler, which it does not use, is left.

    Weights of int8 with a float32 `NAME.scale` for each row are read as int8 * scale.
    """
    tensors, settings = _open(source, config, variant)
    tensors = _scale_rows(keys.strip(tensors, "bert."))
    get = _reader(settings)
    if get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError("only BERTs with position_embedding_type 'absolute' are known, not this one.")
    model = Bert(
        get("vocab_size", 30522), get("hidden_size", 768), get("num_hidden_layers", 12),
        get("num_attention_heads", 12), get("intermediate_size", 3072), get("max_position_embeddings", 512),
        get("type_vocab_size", 2), get("hidden_act", "gelu"), get("layer_norm_eps", 1e-12), dtype,
    )  # fmt: skip
    return model, _load(model, tensors, _bert_table(), (*_POSITIONS, "pooler.*", "cls.*"), shardings)


def export(folder: str | os.PathLike, model: nn.Module, params: PyTree, *, dtype: Any = None) -> None:
    """Write an encoder so that transformers loads it: model.safetensors and config.json in `folder`.

    `dtype` e.g. np.float16 for half precision; None as the parameters are. Raises ConfigError for another module.
    """
    for kind, (table, config, prefix, bare) in _EXPORTS.items():
        if isinstance(model, kind):
            tensors = keys.export(params, table(model), dtype=dtype)
            named = {name if name in bare else prefix + name: tensor for name, tensor in tensors.items()}
            return files.write(folder, named, config(model))
    raise ConfigError(f"only {', '.join(kind.__name__ for kind in _EXPORTS)} can be exported, got {type(model)}.")


# --- reading


def _open(source: Source, config: Mapping[str, Any] | None, variant: str | None) -> tuple[dict[str, Any], Any]:
    if isinstance(source, Mapping):
        if config is None:
            raise ConfigError("tensors alone do not say what they are: give config=, as in the model's config.json.")
        return dict(source), config
    return files.read(source, variant=variant), files.config(source) if config is None else config


def _reader(config: Any) -> Callable[[str, Any], Any]:
    """`get(name, default)` of a config.json, in which a value that no model can have is the file's fault."""

    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json: the settings must be an object, got {config!r:.40}. Get the file again.")

    def get(name: str, default: Any) -> Any:
        value = config.get(name, default)
        fits = isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
        most = MAX_LAYERS if name.endswith("layers") else 2**24
        if isinstance(value, bool) or not fits or (not isinstance(value, str) and not 0 < value <= most):
            raise CheckpointError(f"config.json: {name} must be like {default!r}, got {value!r}. Get the file again.")
        return value

    return get


def _size(tensors: Mapping[str, Any], name: str, axis: int) -> int | None:
    """How wide a matrix is, or None where there is none."""
    tensor = tensors.get(name)
    if tensor is not None and (len(tensor.shape) != 2 or tensor.shape[axis] < 1):
        raise CheckpointError(f"the weights are damaged: {name} must be a matrix, and has {tuple(tensor.shape)}.")
    return None if tensor is None else int(tensor.shape[axis])


def _load(
    model: nn.Module,
    tensors: Mapping[str, Any],
    table: list[Rule],
    ignore: Any,
    shardings: Any,
    param_dtype: Any = jnp.float32,
) -> PyTree:
    shapes = jax.eval_shape(model.init, jax.random.key(0), *_EXAMPLES[type(model)](model))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), shapes)
    if shardings is not None:
        shapes = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings(shapes)
        )
    return keys.load(shapes, tensors, table, ignore=ignore)


def _scale_rows(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """int8 weights with their scales -> float32."""
    scaled = dict(tensors)
    for name, scale in tensors.items():
        weight = tensors.get(name.removesuffix(".scale"))
        if name.endswith(".scale") and weight is not None and weight.shape[:1] == scale.shape:
            scaled[name.removesuffix(".scale")] = np.asarray(weight, np.float32) * np.asarray(scaled.pop(name))[:, None]
    return scaled


# --- tables


def _blocks(ours: str, theirs: str, names: Mapping[str, str], *, bias: bool = True) -> list[Rule]:
    """The rules of a transformer layer: our part of it -> their name of it."""
    rows = []
    for part, name in names.items():
        layer = keys.norm if part.startswith("norm") else keys.linear
        rows += layer(f"{ours}/{part}", f"{theirs}.{name}", bias=bias)
    return rows


_CLIP_BLOCK = {
    "norm_1": "layer_norm1", "norm_2": "layer_norm2", "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj", "attention/value": "self_attn.v_proj", "attention/out": "self_attn.out_proj",
    "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
}  # fmt: skip
_OPEN_CLIP_BLOCK = {
    "norm_1": "ln_1", "norm_2": "ln_2", "attention/out": "attn.out_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"
}  # fmt: skip
_BERT_BLOCK = {
    "attention/query": "attention.self.query", "attention/key": "attention.self.key",
    "attention/value": "attention.self.value", "attention/out": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm", "mlp/up": "intermediate.dense", "mlp/down": "output.dense",
    "norm_2": "output.LayerNorm",
}  # fmt: skip


def clip_text_table() -> list[Rule]:
    """The names of a CLIP text encoder, without their prefix text_model., and OpenCLIP's."""
    return [
        Rule("token_embedding/embedding", "embeddings.token_embedding.weight"),
        Rule("positions", "embeddings.position_embedding.weight"),
        *_blocks("layer_{i}", "encoder.layers.{i}", _CLIP_BLOCK),
        *keys.norm("final_norm", "final_layer_norm"),
        Rule("projection/kernel", "text_projection.weight", keys.LINEAR),
        *_open_clip_table(),
    ]


def _open_clip_table() -> list[Rule]:
    rows = [
        Rule("token_embedding/embedding", "token_embedding.weight"),
        Rule("positions", "positional_embedding"),
        *_blocks("layer_{i}", "transformer.resblocks.{i}", _OPEN_CLIP_BLOCK),
        *keys.norm("final_norm", "ln_final"),
        Rule("projection/kernel", "text_projection"),
    ]
    for k, part in enumerate(("query", "key", "value")):
        theirs = "transformer.resblocks.{i}.attn.in_proj_"
        rows.append(Rule(f"layer_{{i}}/attention/{part}/kernel", f"{theirs}weight", _third(k, keys.LINEAR)))
        rows.append(Rule(f"layer_{{i}}/attention/{part}/bias", f"{theirs}bias", _third(k, keys.SAME)))
    return rows


def _third(k: int, transform: keys.Transform) -> keys.Transform:
    """One of the query, key and value that OpenCLIP keeps in one array; read only."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        return transform.to_ours(x.reshape(3, -1, *x.shape[1:])[k])

    return keys.Transform(to_ours, transform.to_theirs)


def _clip_vision_table() -> list[Rule]:
    return [
        Rule("class_embedding", "embeddings.class_embedding"),
        *keys.conv("patches", "embeddings.patch_embedding", bias=False),
        Rule("positions", "embeddings.position_embedding.weight"),
        *keys.norm("pre_norm", "pre_layrnorm"),  # their spelling
        *_blocks("layer_{i}", "encoder.layers.{i}", _CLIP_BLOCK),
        *keys.norm("post_norm", "post_layernorm"),
        Rule("projection/kernel", "visual_projection.weight", keys.LINEAR),
    ]


def _t5_table(model: T5Encoder) -> list[Rule]:
    attention, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    names = {
        "norm_1": "layer.0.layer_norm", "norm_2": "layer.1.layer_norm", "attention/query": f"{attention}.q",
        "attention/key": f"{attention}.k", "attention/value": f"{attention}.v", "attention/out": f"{attention}.o",
        "mlp/gate": f"{mlp}.wi_0", "mlp/up": f"{mlp}.{'wi_1' if model.gated else 'wi'}", "mlp/down": f"{mlp}.wo",
    }  # fmt: skip
    return [
        Rule("token_embedding/embedding", "shared.weight"),
        Rule("token_embedding/embedding", "encoder.embed_tokens.weight"),
        Rule("relative_bias", f"encoder.block.0.{attention}.relative_attention_bias.weight"),
        *_blocks("layer_{i}", "encoder.block.{i}", names, bias=False),
        *keys.norm("final_norm", "encoder.final_layer_norm", bias=False),
    ]


def _bert_table() -> list[Rule]:
    return [
        Rule("token_embedding/embedding", "embeddings.word_embeddings.weight"),
        Rule("positions", "embeddings.position_embeddings.weight"),
        Rule("types", "embeddings.token_type_embeddings.weight"),
        *keys.norm("norm", "embeddings.LayerNorm"),
        *_blocks("layer_{i}", "encoder.layer.{i}", _BERT_BLOCK),
    ]


# --- writing


def _clip_text_config(model: CLIPText) -> dict[str, Any]:
    name = "CLIPTextModel" if model.projection is None else "CLIPTextModelWithProjection"
    return {
        "architectures": [name], "model_type": "clip_text_model", "vocab_size": model.vocab_size,
        "hidden_size": model.width, "num_hidden_layers": model.depth, "num_attention_heads": model.heads,
        "intermediate_size": model.hidden, "max_position_embeddings": model.max_len, "hidden_act": model.act,
        "layer_norm_eps": model.eps, "eos_token_id": model.eos,
        **({} if model.projection is None else {"projection_dim": model.projection}),
    }  # fmt: skip


def _clip_vision_config(model: CLIPVision) -> dict[str, Any]:
    name = "CLIPVisionModel" if model.projection is None else "CLIPVisionModelWithProjection"
    return {
        "architectures": [name], "model_type": "clip_vision_model", "image_size": model.size,
        "patch_size": model.patch, "hidden_size": model.width, "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads, "intermediate_size": model.hidden, "hidden_act": model.act,
        "layer_norm_eps": model.eps, **({} if model.projection is None else {"projection_dim": model.projection}),
    }  # fmt: skip


def _t5_config(model: T5Encoder) -> dict[str, Any]:
    act = "gelu" if model.gated and model.act == "gelu_new" else model.act
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": model.vocab_size,
        "d_model": model.width, "num_layers": model.depth, "num_heads": model.heads, "d_kv": model.head_dim,
        "d_ff": model.hidden, "feed_forward_proj": f"gated-{act}" if model.gated else act,
        "relative_attention_num_buckets": model.buckets, "relative_attention_max_distance": model.max_distance,
        "layer_norm_epsilon": model.eps,
    }  # fmt: skip


def _bert_config(model: Bert) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": model.vocab_size,
        "hidden_size": model.width, "num_hidden_layers": model.depth, "num_attention_heads": model.heads,
        "intermediate_size": model.hidden, "max_position_embeddings": model.max_len,
        "type_vocab_size": model.types, "hidden_act": model.act, "layer_norm_eps": model.eps,
    }  # fmt: skip


_EXPORTS: dict[type, tuple[Callable[[Any], list[Rule]], Callable[[Any], dict[str, Any]], str, tuple[str, ...]]] = {
    CLIPText: (lambda _: clip_text_table(), _clip_text_config, "text_model.", ("text_projection.weight",)),
    CLIPVision: (lambda _: _clip_vision_table(), _clip_vision_config, "vision_model.", ("visual_projection.weight",)),
    T5Encoder: (_t5_table, _t5_config, "", ()),
    Bert: (lambda _: _bert_table(), _bert_config, "", ()),
}
_IDS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
_EXAMPLES: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    CLIPText: lambda _: (_IDS,),
    CLIPVision: lambda model: (jax.ShapeDtypeStruct((1, model.size, model.size, 3), jnp.float32),),
    T5Encoder: lambda _: (_IDS,),
    Bert: lambda _: (_IDS, jax.ShapeDtypeStruct((1, 2), jnp.bool_)),
}
