"""Prompts of any length, with weights, for encoders of a fixed length.

    (word)      1.1 x        ((word))    1.21 x        \\( \\) \\[ \\] \\\\     the characters themselves
    (word:1.3)  1.3 x        [word]      x / 1.1       BREAK               the rest begins a new chunk

A bracket that is never closed holds to the end; one that was never opened is text. A prompt is cut into chunks of as
many tokens as fit between begin and end (75 of CLIP's 77); each is encoded by itself and they are laid side by side:

    z = tokens w,   tokens' = z mean(tokens) / mean(z)       over all positions and channels of one prompt

The syntax and the arithmetic are those of AUTOMATIC1111's web interface, as its users type them.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import ConfigError, check_count
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.text.published import PublishedTokenizer
from jaxdiff.types import Array

_SYNTAX = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*[+-]?[.\d]+\s*\)|[^\\()\[\]:]+|[\\:]")
_ROUND, _SQUARE = 1.1, 1 / 1.1


class Chunks(NamedTuple):
    """`ids` int32 and `weights` float32, both (b, n, L): n chunks for each prompt."""

    ids: np.ndarray
    weights: np.ndarray


Pieces = list[tuple[str, float]]
"""Texts and their weights, in order."""


def parse(prompt: str) -> list[Pieces]:
    """A prompt -> the pieces of each of its parts between BREAKs; neighbours of one weight are joined.

    Raises ConfigError for a weight that is not a finite number. A prompt without brackets is one piece of weight 1.
    """
    root = _Node("", 1.0, [])
    opened = [root]
    for token in _SYNTAX.findall(prompt):
        if token in ("(", "["):
            opened.append(_Node(token, _ROUND if token == "(" else _SQUARE, []))
            opened[-2].parts.append(opened[-1])
        elif len(opened) > 1 and token[-1:] == ")" and token[0] in ":)" and opened[-1].bracket == "(":
            node = opened.pop()
            node.weight = _number(token) if token[0] == ":" else node.weight
        elif len(opened) > 1 and token == "]" and opened[-1].bracket == "[":
            opened.pop()
        else:
            opened[-1].parts.append(token[1] if token[0] == "\\" and len(token) == 2 else token)
    return _join(_flatten(root))


def chunk(
    tokenizer: PublishedTokenizer, prompts: Sequence[str], *, chunks: int | None = None, weighted: bool = True
) -> Chunks:
    """Prompts -> as many chunks for each as the longest needs, or `chunks`; prompts cut by that are warned of.

    Give prompts and negative prompts in one call, so that they have one length. `weighted=False` takes brackets as
    text. Raises ConfigError for a bare string, a damaged weight, or `chunks` below 1.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"prompts must be a sequence of strings, got a bare string. Write [{prompts[:40]!r}].")
    room = tokenizer.room
    split = [_cut(tokenizer, prompt, room, weighted) for prompt in prompts]
    needed = max((len(parts) for parts in split), default=1)
    count = needed if chunks is None else check_count("chunks", chunks, "One chunk holds 75 tokens of CLIP.")
    length = room + 1 + (tokenizer.bos is not None)
    ids = np.empty((len(split), count, length), np.int32)
    weights = np.ones(ids.shape, np.float32)
    begin = length - room - 1
    for i, parts in enumerate(split):
        for j in range(count):
            pieces, scales = parts[j] if j < len(parts) else ((), ())
            ids[i, j] = tokenizer.frame(pieces, length)
            weights[i, j, begin : begin + len(scales)] = scales
    if needed > count:
        cut = sum(len(parts) > count for parts in split)
        message = f"{cut} of {len(split)} prompts need up to {needed} chunks of {room} tokens and were cut to {count}"
        warnings.warn(f"{message}. Raise chunks, or leave it out, to keep them whole.", stacklevel=2)
    return Chunks(ids, weights)


def encode(apply: Callable[[Array], TextFeatures], chunks: Chunks) -> TextFeatures:
    """Chunks (b, n, L) -> TextFeatures with tokens (b, n L, d), weighted; `pooled` is that of the first chunk.

    `apply` is the encoder bound to its parameters, ids (b n, L) -> TextFeatures. Weights of 1 change no bit.
    """
    b, n, length = chunks.ids.shape
    features = apply(jnp.asarray(chunks.ids).reshape(b * n, length))
    tokens = features.tokens.reshape(b, n * length, -1)
    weights = jnp.asarray(chunks.weights, tokens.dtype).reshape(b, n * length, 1)
    scaled = tokens * weights
    before, after = (jnp.mean(z.astype(jnp.float32), axis=(1, 2), keepdims=True) for z in (tokens, scaled))
    # where the mean vanishes there is nothing to restore
    usable = jnp.abs(after) > 1e-6 * jnp.max(jnp.abs(scaled).astype(jnp.float32), axis=(1, 2), keepdims=True)
    ratio = jnp.where(usable & (before != after), before / jnp.where(usable, after, 1.0), 1.0)
    pooled = features.pooled.reshape(b, n, -1)[:, 0]
    return TextFeatures(scaled * ratio.astype(tokens.dtype), features.mask.reshape(b, n * length), pooled)


class _Node:
    """A bracket, what is in it, and by how much it multiplies that."""

    def __init__(self, bracket: str, weight: float, parts: "list[str | _Node]") -> None:
        self.bracket, self.weight, self.parts = bracket, weight, parts


def _number(token: str) -> float:
    text = token[1:-1].strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(rf"the weight {text[:20]!r} is not a number. Write (word:1.2), or \( for a bracket.")
    return value


def _flatten(root: _Node) -> Pieces:
    """Depth first and without recursion, so that a million brackets are no danger."""
    pieces, stack = [], [(root, 1.0)]
    while stack:
        part, weight = stack.pop()
        if isinstance(part, str):
            pieces.append((part, weight))
            continue
        weight *= part.weight
        if not math.isfinite(weight):
            raise ConfigError("the weights of nested brackets multiply to infinity. Use fewer.")
        stack += [(inner, weight) for inner in reversed(part.parts)]
    return pieces


def _join(pieces: Pieces) -> list[Pieces]:
    runs: list[list[tuple[list[str], float]]] = [[]]
    for text, weight in pieces:
        for i, part in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
            if i:
                runs.append([])
            if part and runs[-1] and runs[-1][-1][1] == weight:
                runs[-1][-1][0].append(part)
            elif part:
                runs[-1].append(([part], weight))
    return [[("".join(parts), weight) for parts, weight in run] for run in runs]


def _cut(tokenizer: PublishedTokenizer, prompt: str, room: int, weighted: bool) -> list[tuple[list[int], list[float]]]:
    """(ids, weights) of each chunk of one prompt; at least one, which may be empty."""
    chunks = []
    for run in parse(prompt) if weighted else [[(prompt, 1.0)]]:
        pieces = tokenizer.pieces([text for text, _ in run])
        ids = [i for piece in pieces for i in piece]
        weights = [weight for piece, (_, weight) in zip(pieces, run, strict=True) for _ in piece]
        chunks += [(ids[i : i + room], weights[i : i + room]) for i in range(0, max(len(ids), 1), room)]
    return chunks
