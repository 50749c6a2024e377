"""Tokenizers of published encoders: text -> the ids that the network was trained on, with its own begin, end, padding.

    CLIP    [begin] ids [end] [end] ...      lower case, white space joined; byte-pair merges within words
    T5      ids [end] [pad] ...
    BERT    [begin] ids [end] [pad] ...

They are Hugging Face's `tokenizers` (in Rust, without PyTorch), read from tokenizer.json or CLIP's older two files.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from jaxdiff.errors import ConfigError, DataError, check_count
from jaxdiff.text.tokenizer import check_size, clean, named_damage, warn_of_cuts

_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PADS = ("<pad>", "[PAD]")


class Tokens(NamedTuple):
    """`ids` int32 (n, L) and `mask` bool (n, L), True up to the end token."""

    ids: np.ndarray
    mask: np.ndarray


class PublishedTokenizer:
    """Made by `open_tokenizer`. `bos` is None where texts have no begin; `max_len` is what the folder says, or None.

    added: the first id of each token that `extended` has put in -> all of its ids.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pad: int | None,
        max_len: int | None,
        added: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        ends = backend.encode("").ids
        if not 1 <= len(ends) <= 2:
            raise DataError(f"a tokenizer must put one or two tokens around a text, this one puts {len(ends)}.")
        self._backend, self._added = backend, dict(added or {})
        self.bos, self.eos = (ends[0] if len(ends) == 2 else None), ends[-1]
        self.pad, self.max_len = (self.eos if pad is None else pad), max_len

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self._backend.get_vocab_size()

    @property
    def room(self) -> int:
        """How many ids of text fit between begin and end, where the folder gives a length."""
        return self._length(None) - 1 - (self.bos is not None)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without begin, end and padding, of any length."""
        if isinstance(texts, str):
            raise ConfigError(f"texts must be a sequence of strings, got a bare string. Write [{texts[:40]!r}].")
        with named_damage("this tokenizer"):
            encoded = self._backend.encode_batch([clean(text) for text in texts], add_special_tokens=False)
        if not self._added:
            return [e.ids for e in encoded]
        return [[i for id in e.ids for i in self._added.get(id, (id,))] for e in encoded]

    def extended(self, token: str, count: int = 1) -> "PublishedTokenizer":
        """This tokenizer and one token more, which stands for `count` new ids: those of token, token_1, token_2 ...

        It is found also within words, in any case of its letters, as diffusers finds it. Raises ConfigError for a
        token that is blank or known, and for more ids than a text has room for.
        """
        check_count("count", count, "A token stands for one vector or a few.")
        if self.max_len is not None and count > self.room:
            raise ConfigError(f"{token!r:.60} has {count} vectors; a text has room for {self.room}.")
        names = [token, *(f"{token}_{i}" for i in range(1, count))]
        known = [name for name in names if not name.strip() or self._backend.token_to_id(name) is not None]
        if known:
            raise ConfigError(f"{known[0]!r:.60} is blank or known to this tokenizer. Give another name for the token.")
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_tokens(names)
        ids = tuple(i for name in names if (i := backend.token_to_id(name)) is not None)
        return PublishedTokenizer(backend, self.pad, self.max_len, self._added | {ids[0]: ids})

    def ids(self, token: str) -> tuple[int, ...]:
        """The ids of a token that `extended` has put in. Raises ConfigError for another."""
        first = self._backend.token_to_id(token)
        if first not in self._added:
            raise ConfigError(f"{token!r:.60} was not added to this tokenizer.")
        return self._added[first]

    def frame(self, pieces: Sequence[int], length: int) -> np.ndarray:
        """int32 (length,): begin, `pieces`, end, padding. Raises ConfigError where they do not fit."""
        row = [*([] if self.bos is None else [self.bos]), *pieces, self.eos]
        if len(row) > length:
            raise ConfigError(f"{len(row)} tokens do not fit into {length}. Cut them, or chunk the prompt.")
        return np.asarray(row + [self.pad] * (length - len(row)), np.int32)

    def encode(self, texts: Sequence[str], max_len: int | None = None) -> Tokens:
        """n texts -> Tokens (n, max_len). A text of more tokens is cut before the end token, with a UserWarning.

        Raises ConfigError for a bare string or a length without room.
        """
        length = self._length(max_len)
        room = length - 1 - (self.bos is not None)
        if room < 1:
            raise ConfigError(f"max_len must leave room for a token between begin and end, got {length}.")
        pieces = self.pieces(texts)
        ids = np.full((len(pieces), length), self.pad, np.int32)
        for row, text in zip(ids, pieces, strict=True):
            row[:] = self.frame(text[:room], length)
        warn_of_cuts([len(text) for text in pieces], room)
        ends = length - room + np.asarray([min(len(text), room) for text in pieces], np.int32)
        return Tokens(ids, np.arange(length)[None, :] < ends[:, None])

    def _length(self, max_len: int | None) -> int:
        length = self.max_len if max_len is None else max_len
        if length is None:
            raise ConfigError("this tokenizer does not say how many tokens its network takes: give max_len.")
        return length


def open_tokenizer(folder: str | os.PathLike, *, max_len: int | None = None) -> PublishedTokenizer:
    """The tokenizer in `folder`: tokenizer.json, or CLIP's vocab.json and merges.txt, and the small files beside them.

    `max_len` stands in for what tokenizer_config.json does not say. Raises DataError for a missing or damaged file.
    """
    folder = Path(folder).expanduser()
    settings = _settings(folder)
    with named_damage(f"the tokenizer in {folder}"):
        backend = _open(folder, settings)
        pad = settings.get("pad_token")
        if pad is not None and backend.token_to_id(pad) is not None:
            backend.add_special_tokens([AddedToken(pad, normalized=False, special=True)])
        known = [pad] if pad is not None else _PADS
        pad_id = next((i for i in map(backend.token_to_id, known) if i is not None), None)
        return PublishedTokenizer(backend, pad_id, settings.get("model_max_length", max_len))


def _open(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        check_size(folder / "tokenizer.json")
        return tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _clip(folder, settings)
    hint = " Convert spiece.model to tokenizer.json first." if (folder / "spiece.model").is_file() else ""
    raise DataError(f"there is no tokenizer.json and no vocab.json with merges.txt in {folder}.{hint}")


def _settings(folder: Path) -> dict[str, Any]:
    """pad_token and the like as strings, and the length where it is a real one."""
    merged: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            check_size(path)
            try:
                merged |= dict(json.loads(path.read_bytes().decode()))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path} is damaged: {error}. Get it again.") from error
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in merged.items() if k.endswith("_token")}
    settings: dict[str, Any] = {key: value for key, value in tokens.items() if isinstance(value, str)}
    length = merged.get("model_max_length")
    if isinstance(length, int) and 0 < length < 2**20:  # 10^30 stands for "any"
        settings["model_max_length"] = length
    return settings


def _clip(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """CLIP's byte-pair tokenizer from its two files, as transformers builds it."""
    begin, end = settings.get("bos_token", "<|startoftext|>"), settings.get("eos_token", "<|endoftext|>")
    for name in ("vocab.json", "merges.txt"):
        check_size(folder / name)
    model = models.BPE.from_file(
        str(folder / "vocab.json"), str(folder / "merges.txt"),
        continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False,
        unk_token=settings.get("unk_token", end),
    )  # fmt: skip
    backend = tokenizers.Tokenizer(model)
    bos, eos = backend.token_to_id(begin), backend.token_to_id(end)
    if bos is None or eos is None:
        raise DataError(f"vocab.json in {folder} must hold {begin} and {end}; it is not one of CLIP's.")
    space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    split = pre_tokenizers.Split(tokenizers.Regex(_CLIP_SPLIT), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (begin, end)])
    backend.post_processor = processors.RobertaProcessing((end, eos), (begin, bos), False, False)
    return backend
