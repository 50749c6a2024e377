"""Make emoji32.webp and emoji32.json from a folder of 64 x 64 RGBA pictures: `python make_embedded.py FOLDER`.

FOLDER holds metadata.jsonl (file_name, style, name, keywords, category) and the pictures it names. The pictures are
composited on white (linear in alpha, so the same as scaling premultiplied colours), scaled to 32 x 32 with a Lanczos
filter and laid row by row on one lossless sheet, in the order of the captions.
"""

import json
import sys
from pathlib import Path

from PIL import Image

SIZE, COLUMNS = 32, 44
HERE = Path(__file__).parent


def shrink(path: Path) -> Image.Image:
    """One picture on white, 32 x 32."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def caption(name: str) -> str:
    """A name in lower case with plain quotes."""
    return name.lower().translate(str.maketrans("’“”", '\'""'))


def main(folder: Path) -> None:
    """Write both files beside this one."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["style"] == "noto"]
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(rows) // COLUMNS) * SIZE), "white")
    for i, row in enumerate(rows):
        sheet.paste(shrink(folder / row["file_name"]), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    sheet.save(HERE / "emoji32.webp", lossless=True, quality=100, method=6)
    names = sorted({row["category"].lower() for row in rows})
    content = {
        "captions": [caption(row["name"]) for row in rows],
        "label_names": names,
        "labels": [names.index(row["category"].lower()) for row in rows],
    }
    (HERE / "emoji32.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
