"""Textual inversion: words whose vectors were learned; read, put into a pipeline, trained, written.

    learned_embeds.safetensors      {"<cat>": (n, d)}                      diffusers; XL's second in learned_embeds_2
    <name>.safetensors              {"emb_params": (n, d)}                 AUTOMATIC1111's web interface
    <name>.safetensors              {"clip_l": (n, 768), "clip_g": (n, 1280)}     the same for XL

    pipe = inversion.add(pipe, inversion.load("learned_embeds.safetensors"))       then draw "a photo of <cat>"

A word of n vectors is n tokens in a row, `<cat>`, `<cat>_1`, ..., each a new row of the table of embeddings. Of old
configs, which say that a text ends at the largest id, `add` mends the end: a new id is larger. Gal et al. 2022.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.atomic import replacing
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.pretrained import files
from jaxdiff.pretrained.pipelines import Pipeline
from jaxdiff.text.clip import CLIPText
from jaxdiff.types import Array, PyTree

NAMES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
"""The files of a folder of diffusers: for the first text encoder, and for the second of XL."""
XL = ("clip_l", "clip_g")


class Inversion(NamedTuple):
    """A word, as it is typed in a prompt, and its vectors (n, d) for each text encoder: {"text_0": ...}."""

    token: str
    vectors: dict[str, Array]


def load(source: str | os.PathLike, token: str | None = None) -> Inversion:
    """The inversion in a .safetensors file, or in a folder that diffusers wrote.

    token: the word, where it is not to be that of the file (its key, or the name of a file of the web interface).
    Raises CheckpointError for other keys and shapes, UnsafeFileError for a pickle.
    """
    path = Path(source).expanduser()
    if (path / NAMES[0]).is_file():
        found = [load(path / name, token) for name in NAMES if (path / name).is_file()]
        return Inversion(found[0].token, {f"text_{i}": one.vectors["text_0"] for i, one in enumerate(found)})
    tensors = files.read(path)
    if set(tensors) != set(XL) and len(tensors) != 1:
        raise CheckpointError(f"{path} must hold one tensor, or {XL}, and holds {', '.join(sorted(tensors)[:4])}.")
    names = [name for name in (*XL, *tensors) if name in tensors][: len(tensors)]
    stem = tensors[names[0]].path.stem
    return Inversion(
        token or (stem if names[0] in ("emb_params", *XL) else names[0]),
        {f"text_{i}": _rows(tensors[name]) for i, name in enumerate(names)},
    )


def init(pipe: Pipeline, token: str, like: str, *, count: int = 1) -> Inversion:
    """An inversion to train, which begins as the word `like`: its first piece, `count` times, for every CLIP."""
    vectors = {}
    for i, tokenizer in enumerate(pipe.tokenizers):
        if not isinstance(pipe.text[i], CLIPText):
            continue
        pieces = tokenizer.pieces([like])[0]
        if not pieces:
            raise ConfigError(f"like must be a word to begin from, got {like!r}.")
        vectors[f"text_{i}"] = jnp.repeat(_table(pipe.params, f"text_{i}")[pieces[0]][None], count, axis=0)
    return Inversion(token, vectors)


def add(pipe: Pipeline, inversion: Inversion) -> Pipeline:
    """`pipe` with the word known to its tokenizers, and its vectors in the tables of its text encoders.

    A text encoder that the inversion says nothing of spells the word. Raises ConfigError for a word that is known, and
    for vectors of another width.
    """
    text, tokenizers, params = list(pipe.text), list(pipe.tokenizers), dict(pipe.params)
    for part, rows in inversion.vectors.items():
        i = _number(part)
        encoder = text[i] if i < len(text) else None
        if not isinstance(encoder, CLIPText) or rows.shape[1] != encoder.width:
            widths = ", ".join(str(net.width) for net in text if isinstance(net, CLIPText))
            raise ConfigError(f"{inversion.token!r} has vectors {rows.shape} for {part}; the widths here are {widths}.")
        tokenizers[i] = tokenizers[i].extended(inversion.token, len(rows))
        first, eos = tokenizers[i].ids(inversion.token)[0], tokenizers[i].eos
        table = _table(params, part)
        if len(table) < first:
            raise ConfigError(f"{part} has {len(table)} embeddings and its tokenizer {first} ids: not of one model.")
        text[i] = encoder.clone(vocab_size=first + len(rows), eos=eos if encoder.eos == 2 else encoder.eos)
        params[part] = _with_table(params[part], jnp.concatenate([table[:first], rows.astype(table.dtype)]))
    return dataclasses.replace(pipe, text=tuple(text), tokenizers=tuple(tokenizers), params=params)


def merge(pipe: Pipeline, params: PyTree, token: str, vectors: Mapping[str, Array]) -> PyTree:
    """`params` with other vectors for a word that was added to `pipe`; pure, so that its gradient by them trains it."""
    params = dict(params)
    for part, rows in vectors.items():
        first = pipe.tokenizers[_number(part)].ids(token)[0]
        table = _table(params, part)
        params[part] = _with_table(params[part], table.at[first : first + len(rows)].set(rows.astype(table.dtype)))
    return params


def export(folder: str | os.PathLike, inversion: Inversion) -> None:
    """Write learned_embeds.safetensors into `folder`, as diffusers reads it, and for XL the one of its second too."""
    from safetensors import numpy

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(NAMES[: len(inversion.vectors)]):
        with replacing(folder / name) as path:
            rows = np.array(inversion.vectors[f"text_{i}"], np.float32, order="C")
            numpy.save_file({inversion.token: rows}, path, metadata={"format": "pt"})


def _rows(tensor: files.Tensor) -> Array:
    rows = np.asarray(tensor, np.float32)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.size:
        raise CheckpointError(f"{tensor.path}: {tensor.name:.60} must be one vector or several, got {rows.shape}.")
    return jnp.asarray(rows)


def _number(part: str) -> int:
    return int(part.removeprefix("text_"))


def _table(params: Mapping[str, Any], part: str) -> Array:
    return params[part]["params"]["token_embedding"]["embedding"]


def _with_table(tree: Any, table: Array) -> Any:
    return {**tree, "params": {**tree["params"], "token_embedding": {"embedding": table}}}
