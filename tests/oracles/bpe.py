"""CLIP's tokenizer in pure Python, from its description: another program than the one that is tested.

    text -> NFC, white space joined, lower case -> words -> bytes as printable characters, the last with </w>
    while there is a pair in the list of merges: join the pair that comes first in it       (Sennrich et al. 2016)

A word is a contraction, a run of letters, one number, or a run of anything else that is not white space (Radford et al.
2021 with the code published beside it). Categories are those of Python's Unicode.
"""

import itertools
import re
import unicodedata

_MARKS = re.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_SPACE = {*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def letters():
    """Byte -> printable character: itself where it is one, else the next free from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def kind(character):
    """'L' for letters, 'N' for numbers, ' ' for white space, '' for the rest."""
    category = unicodedata.category(character)[0]
    return " " if ord(character) in _SPACE else category if category in "LN" else ""


def words(text):
    """The words of a normalised text. A mark that was in upper case is three of them, as transformers has it."""
    place = 0
    while place < len(text):
        short = next((c for c in _CONTRACTIONS if text.startswith(c, place)), None)
        first = kind(text[place])
        end = place + 1
        mark = _MARKS.match(text, place)
        if mark:
            yield from ("<|", mark[0][2:-2], "|>")
            place = mark.end()
            continue
        if short:
            end = place + len(short)
        elif first != "N":
            while end < len(text) and kind(text[end]) == first:
                end += 1
        if first != " ":
            yield text[place:end]
        place = end


def merge(parts, ranks):
    """Join pairs, the earliest of the list first, every occurrence of it from the left."""
    while len(parts) > 1:
        pair = min(itertools.pairwise(parts), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        joined, i = [], 0
        while i < len(parts):
            hit = tuple(parts[i : i + 2]) == pair
            joined.append("".join(parts[i : i + 2]) if hit else parts[i])
            i += 2 if hit else 1
        parts = joined
    return parts


def clip_ids(text, vocabulary, merges):
    """The ids of a text, without begin and end. `merges` is the text of merges.txt."""
    ranks = {tuple(line.split()): i for i, line in enumerate(merges.splitlines()[1:])}
    table, ids = letters(), []
    for part in _MARKS.split(text):
        if _MARKS.fullmatch(part):
            ids.append(vocabulary[part])
            continue
        plain = unicodedata.normalize("NFC", part)
        plain = re.sub(" +", " ", "".join(" " if ord(c) in _SPACE else c for c in plain))
        for word in words("".join(c.lower() for c in plain)):
            pieces = [table[b] for b in word.encode()]
            pieces[-1] += "</w>"
            ids += [vocabulary[piece] for piece in merge(pieces, ranks)]
    return ids
