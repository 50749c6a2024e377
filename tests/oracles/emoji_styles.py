"""Emoji at 64 x 64 in four drawing styles, with captions, as two array files: to train on, and held out.

    python -m tests.oracles.emoji_styles emoji64.zip DIR        writes DIR/train.npz and DIR/held_out.npz

emoji64.zip holds metadata.jsonl with a line {"file_name", "style", "name", "keywords", "hexcode"} for each picture. A
caption is "style name, keywords". Of the code points that all four styles have, HELD_OUT are missing in one style each
when training: a code point and a style that never met. Which ones they are is a function of the code points alone.
"""

import hashlib
import io
import json
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff import data
from jaxdiff.data.folders import fit

STYLES = ("noto", "twemoji", "fluent", "openmoji")
HELD_OUT = 200


def caption(row: dict[str, Any]) -> str:
    """'noto bubble tea, boba food milk pearl': the style, the name, and the keywords that are not in it."""
    words = row["name"].lower().split()
    more = [word for word in dict.fromkeys(row["keywords"]) if word.lower() not in words]
    return f"{row['style']} {row['name']}" + (f", {' '.join(more)}" if more else "")


def held_out(styles: dict[str, set[str]]) -> dict[str, str]:
    """{code point: the style it is missing in}: the first of those with all four styles, in the order of their hash."""
    hashes = {code: hashlib.sha256(code.encode()).digest() for code, some in styles.items() if some >= set(STYLES)}
    chosen = sorted(hashes, key=lambda code: hashes[code])[:HELD_OUT]
    return {code: STYLES[hashes[code][-1] % len(STYLES)] for code in chosen}


def split(archive: zipfile.ZipFile) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of metadata.jsonl to train on, and those held out."""
    rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
    styles = defaultdict(set)
    for row in rows:
        styles[row["hexcode"]].add(row["style"])
    out = held_out(styles)
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row in rows:
        parts[out.get(row["hexcode"]) == row["style"]].append(row)
    return parts


def main(source: str, target: str) -> None:
    """Write both files."""
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source) as archive:
        for name, rows in zip(("train", "held_out"), split(archive), strict=True):
            pictures = [fit(Image.open(io.BytesIO(archive.read(row["file_name"]))), 64) for row in rows]
            labels = np.asarray([STYLES.index(row["style"]) for row in rows], np.int32)
            texts: dict[str, Any] = {"captions": [caption(row) for row in rows], "label_names": STYLES}
            np.savez(folder / f"{name}.npz", images=np.stack(pictures), labels=labels, **texts)
            print(f"{folder / name}.npz: {len(data.array_file(folder / f'{name}.npz')):,} pictures")


if __name__ == "__main__":
    main(*sys.argv[1:])
