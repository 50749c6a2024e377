"""The report of an evaluation: tables in Markdown, and a plot of the sweeps where matplotlib is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "fd": ("{title}", "{:.3f}"),
    "kid": ("KID x 1000", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "nearest": ("nearest", "{:.3f}"),
    "nearer": ("nearer", "{:.3f}"),
    "copied": ("copied", "{:.2%}"),
}
"""Heading and format of each figure."""

BITS = {
    "bound": "variational bound, decoded at sigma = 2/255",
    "bound_fine": "variational bound, decoded at sigma = 0.001",
    "flow": "probability flow",
    "gaussian": "Gaussian fit",
}
"""The rows of the table of likelihoods."""

PROMPTS = {
    "prompts": "",
    "held_out_prompts": "of held-out captions, among held-out pictures: ",
    "held_out_without": "the same, drawn without the captions: ",
}
"""What the figures of prompts are of."""

LEGEND = (
    "nearest: median distance to the nearest reference example, over that of held-out ones; nearer: the chance that a "
    "row's example is nearer than a held-out one (0.5 if neither); copied: nearest closer than a third of the second."
)


def _cell(figure: str, value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "too few"
    factor = 1000 if figure == "kid" else 1
    text = COLUMNS[figure][1].format(value["mean"] * factor)
    return text if value["std"] is None else f"{text} +- " + COLUMNS[figure][1].format(value["std"] * factor)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """One table: a row for each set of examples, {'name', 'n', 'figures': {figure: {'mean', 'std'}}}."""
    heads = ["examples", "n", *(head.format(title=title) for head, _ in COLUMNS.values())]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        lines.append(_line([row["name"], f"{row['n']:,}", *(_cell(key, row["figures"][key]) for key in COLUMNS)]))
    return "\n".join(lines)


def bits_line(name: str, value: dict[str, float]) -> str:
    """A row of bits per dimension."""
    return _line([name, f"{value['mean']:.3f} +- {value['se']:.3f}", str(value["n"])])


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    parts = [f"# {result['name']}", result["protocol"]]
    for features in result["features"]:
        parts += [f"## By {features['name']}", table(features["title"], features["rows"]), LEGEND]
        parts += [_by_class(features)] if any(row.get("by_class") for row in features["rows"]) else []
    if result.get("bits_per_dim"):
        rows = [bits_line(BITS[key], value) for key, value in result["bits_per_dim"].items() if key in BITS]
        head = [_line(["bits per dimension", "mean +- standard error", "n"]), _line(["---"] * 3)]
        parts += [f"## Likelihood of {result['bits_per_dim']['of']} examples", "\n".join(head + rows)]
    if result.get("classification_accuracy"):
        scores = result["classification_accuracy"]
        parts += ["## Classification accuracy on held-out pictures"]
        parts += ["\n".join(f"- trained on {name}: {value:.1%}" for name, value in scores.items())]
    if result.get("prompts"):
        lines = [f"- {title}{prompts_line(result[key])}" for key, title in PROMPTS.items() if key in result]
        parts += ["## Does the prompt decide the picture?", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def prompts_line(figure: dict[str, Any]) -> str:
    """The figure of `experiments.prompts` in words."""
    top = next(key for key in figure if key.startswith("recall_at_")).rpartition("_")[2]
    return (
        f"own picture in the top {top}: {figure[f'recall_at_{top}']:.1%} of {figure['samples']} prompts; "
        f"chance {figure['chance']:.3%}; {figure['times_chance']:.1f} times chance"
    )


def _by_class(features: dict[str, Any]) -> str:
    rows = [row for row in features["rows"] if row.get("by_class")]
    classes = list(rows[0]["by_class"])
    lines = [_line([f"{features['title']} by class", *map(str, classes)]), _line(["---"] * (len(classes) + 1))]
    lines += [_line([row["name"], *(f"{row['by_class'][c]:.3f}" for c in classes)]) for row in rows]
    return "\n".join(lines)


def plot(path: Path, features: Sequence[dict[str, Any]]) -> bool:
    """Draw the sweeps: distance against network calls and against guidance, floors dashed. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(features), 2, figsize=(10, 4 * len(features)), squeeze=False)
    for (left, right), given in zip(axes, features, strict=True):
        measured = [row for row in given["rows"] if "nfe" in row]
        key = "fd" if all(row["figures"]["fd"]["mean"] is not None for row in given["rows"]) else "kid"
        title = given["title"] if key == "fd" else f"KID ({given['name']})"
        _curves(left, measured, key, across="nfe", by="scale", label="network calls a sample")
        _curves(right, measured, key, across="scale", by="steps", label="guidance scale")
        for row in (row for row in given["rows"] if "nfe" not in row):
            for axis in (left, right):
                axis.axhline(row["figures"][key]["mean"], ls="--", lw=1, color="0.5")
                axis.text(0.02, row["figures"][key]["mean"], row["name"], transform=axis.get_yaxis_transform())
        for axis in (left, right):
            axis.set_yscale("log" if key == "fd" else "linear")
            axis.set_ylabel(title)
            axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True


def _curves(axis: Any, rows: Sequence[dict[str, Any]], key: str, *, across: str, by: str, label: str) -> None:
    for value in sorted({row[by] for row in rows}):
        chosen = sorted((row for row in rows if row[by] == value), key=lambda row: row[across])
        means = [row["figures"][key]["mean"] for row in chosen]
        bars = [row["figures"][key]["std"] or 0 for row in chosen]
        axis.errorbar([row[across] for row in chosen], means, bars, marker="o", capsize=3, label=f"{by} {value:g}")
    axis.set_xlabel(label)
