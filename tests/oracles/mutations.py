"""Damages and forgeries of weights and tokenizers, and what reading them does: a named error or the model, no more.

    python -m tests.oracles.mutations --count 10000

Every file of a small folder is changed at random: bits, cuts, splices, edited headers, indexes and configs,
paths that lead away, pickles under other names. Each is read as a user would read it. Counted are the errors by name;
recorded are every program run, code object executed, network call and file opened outside the folder (Python's audit
events), and the largest memory taken (tracemalloc, which sees NumPy's) beside the bytes of the files read.
"""

import argparse
import collections
import json
import os
import pickle
import struct
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxdiff.errors import JaxdiffError
from jaxdiff.pretrained import files, keys, text
from jaxdiff.text import CLIPText, open_tokenizer

ROOT = str(Path(__file__).parents[2])
TOKENIZER = Path(__file__).parents[1] / "fixtures" / "text" / "clip"
SLACK = 2**18
"""What a read may take however small its file is."""
FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "exec",
)

_INTEGERS = (0, -1, 1, 2, 3, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30)
_ODD = (*_INTEGERS, 1.5, 1e308, float("nan"), None, True, "", "x" * 5000, "\ud800", "\0", [], {}, [[[]]], {"a": {}})
_PATHS = (
    "../x.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "", "a/../../x.safetensors", "C:\\x.safetensors",
    "~/x.safetensors", "file:///etc/passwd", "x.safetensors\0.bin", "x" * 5000 + ".safetensors", "evil.bin", "evil.pt",
    "\ud800.safetensors", "/dev/stdin", "\\\\host\\x.safetensors", "model.safetensors.index.json",
)  # fmt: skip


class Bomb:
    """A pickle that says so when it is read."""

    def __reduce__(self):
        return os.system, ("echo a pickle was run; touch PICKLE_WAS_RUN",)


def prepare(folder):
    """A random CLIP text encoder of 400 kB as two shards with an index, and as one file; and its parameters."""
    model = CLIPText(549, 64, 2, 4, 96)
    params = model.init(jax.random.key(0), jax.numpy.zeros((1, 2), int))
    text.export(folder, model, params)
    tensors = {name: np.asarray(t) for name, t in files.read(folder).items()}
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, folder / f"part-{i}.safetensors", metadata={"format": "pt"})
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, whole, params


def damage(random, content):
    """Bytes changed somewhere, most often in the first thousands, where headers are."""
    content = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        limit = len(content) if random.random() < 0.3 else min(len(content), 4000)
        place = int(random.integers(max(limit, 1)))
        kind = random.integers(6)
        if kind == 0 and content:
            content[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = random.bytes(int(random.integers(1, 40)))
        elif kind == 3:
            del content[place : place + int(random.integers(1, 40))]
        elif kind == 4:
            content[:8] = struct.pack("<Q", int(random.choice([0, 1, 2**20, 2**31, 2**63, len(content), 10**8])))
        else:
            content[place : place + 8] = content[place // 2 : place // 2 + 8]
    return bytes(content)


def edit(random, value, depth=0):
    """A JSON value with one thing in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.9 and depth < 4:
        name = str(random.choice(list(value)))
        kind = random.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != name}
        if kind < 0.2:
            return value | {name + "x": value[name]}
        return value | {name: edit(random, value[name], depth + 1)}
    if isinstance(value, list) and value and random.random() < 0.8:
        i = int(random.integers(len(value)))
        return [*value[:i], edit(random, value[i], depth + 1), *value[i + 1 :]]
    if isinstance(value, str) and random.random() < 0.5:
        return str(random.choice(_PATHS))
    return _ODD[int(random.integers(len(_ODD)))]


def forge(random, content):
    """A safetensors file with an edited header, its length right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(edit(random, json.loads(content[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def disguise(random):
    """A pickle of any protocol, or PyTorch's archive of one."""
    if random.random() < 0.2:
        return b"PK\x03\x04" + pickle.dumps(Bomb())
    return pickle.dumps(Bomb(), protocol=int(random.integers(6)))


def tokenizer_files():
    """CLIP's in its two layouts."""
    old = {name: (TOKENIZER / name).read_bytes() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    backend = open_tokenizer(TOKENIZER)._backend
    return old, {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": old["tokenizer_config.json"]}


def mutate(random, originals, whole, tokenizers):
    """One mutation, {name: bytes} of a folder, and what it is a folder of."""
    what = str(random.choice(["weights", "shards", "config", "tokenizer"], p=[0.4, 0.4, 0.05, 0.15]))
    if what == "tokenizer":
        folder = dict(tokenizers[random.integers(2)])
    elif what == "weights":
        folder = {"config.json": originals["config.json"], "model.safetensors": whole}
    else:
        folder = dict(originals)
    usual = [n for n in folder if n != "config.json"]
    name = "config.json" if what == "config" else str(random.choice(usual))
    kind = random.random()
    if kind < 0.1:
        folder[name] = disguise(random)
        if kind < 0.03 and what != "tokenizer":
            folder = {str(random.choice(["pytorch_model.bin", "m.ckpt", "m.pt"])): folder[name]}
    elif kind < 0.5 or name == "merges.txt":
        folder[name] = damage(random, folder[name])
    elif name.endswith(".json"):
        edited = json.dumps(edit(random, json.loads(folder[name])))
        folder[name] = edited.encode("utf-8", "surrogatepass")
    else:
        folder[name] = forge(random, folder[name])
    return folder, what


class Watch:
    """What Python is told of: files opened, code executed, programs run."""

    def __init__(self, folder):
        self.folder, self.active, self.events = str(folder), False, []
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.fsdecode(arguments[0])
            if os.path.isabs(path) and not path.startswith((self.folder, sys.prefix, sys.base_prefix, ROOT)):
                self.events.append(f"open {path}")
        elif event == "exec":
            self.events.append(f"exec {arguments[0].co_filename} {arguments[0].co_name} {arguments[0].co_names}")
        elif event.startswith(FORBIDDEN):
            self.events.append(event)


def outcome(folder, template, table, what):
    """The name of what reading a folder comes to."""
    try:
        if what == "config":
            text.clip_text(folder)
        elif what == "tokenizer":
            open_tokenizer(folder, max_len=20).encode(["a Red cat!", "", "<|endoftext|> 12"])
        else:
            files.config(folder)
            tensors = keys.strip(files.read(folder), "text_model.")
            jax.block_until_ready(keys.load(template, tensors, table, ignore=("*position_ids",)))
    except JaxdiffError as error:
        return type(error).__name__
    except BaseException as error:  # every other error is a defect, also a panic of Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"UNNAMED {type(error).__name__}: {error}"[:200]
    return "read"


def run(count, seed=0):
    """(outcomes, audit events, the largest of (peak - SLACK) / bytes, the largest peak of a config) of mutations."""
    random, outcomes, worst, most = np.random.default_rng(seed), collections.Counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        originals, whole, params = prepare(home)
        tokenizers = tokenizer_files()
        table = text.clip_text_table()
        template = jax.eval_shape(lambda: params)
        watch = Watch(home)
        for i in range(-1, count):  # the first is sound, and brings the modules that are imported when needed
            content, what = mutate(random, originals, whole, tokenizers) if i >= 0 else (originals, "shards")
            folder = home / str(i)
            folder.mkdir()
            for file, data in content.items():
                (folder / file).write_bytes(data)
            tracemalloc.start()
            watch.active = i >= 0
            outcomes[outcome(folder, template, table, what)] += i >= 0
            watch.active = False
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            if what == "config":  # then a network is laid out, which costs memory of its own
                most = max(most, peak)
            elif what != "tokenizer":  # whose memory is Rust's
                worst = max(worst, (peak - SLACK) / sum(map(len, content.values())))
            for file in content:
                (folder / file).unlink()
            folder.rmdir()
        ran = (Path.cwd() / "PICKLE_WAS_RUN").exists()
    return outcomes, watch.events + (["a pickle was run"] if ran else []), worst, most


def main():
    """Print what `run` counts; exit status 1 for an error without a name, an event, or memory beyond 4 times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes, events, worst, most = run(arguments.count, arguments.seed)
    for name, number in outcomes.most_common():
        print(f"{number:7,}  {name}")
    print(f"audit events: {collections.Counter(events) or 'none'}")
    print(f"memory beyond {SLACK:,} bytes: at most {worst:.2f} times the files; with a changed config {most:,} bytes")
    return int(bool(events) or worst > 4 or any(name.startswith("UNNAMED") for name in outcomes))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    warnings.simplefilter("ignore", UserWarning)  # of texts that are cut
    sys.exit(main())
