"""Writes tests/fixtures/text: tiny random encoders with what transformers makes of them, and ids of its tokenizers.

    python -m tests.oracles.make_text_fixture        needs torch and transformers 5 (the witness extra)

With it the tests compare with the originals where neither is installed. The layout is that of published folders: for
CLIP the prefix text_model. and position_ids, which transformers no longer writes.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from tests.oracles.strings import strings, write_clip_vocabulary

FOLDER = Path(__file__).parents[1] / "fixtures" / "text"
CORPUS = "the cat sat on the mat with a red hat and the dog ran to the park in the rain while it's sunny " * 5
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


def tiny(kind, config):
    """A model of random parameters, norms and biases too."""
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" in name or "shared" in name or "relative" in name:
                parameter.normal_(0, 0.5)
    return model


def write(name, model, **more):
    """The weights and config.json, as published folders have them; returns the tensors' folder."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.ascontiguousarray(t.detach().numpy()) for key, t in model.state_dict().items()}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    text = json.dumps({k: v for k, v in config.items() if v is not None}, indent=1, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def clip(expected):
    """The tokenizer, the text encoder in the legacy layout, the picture encoder."""
    vocabulary = write_clip_vocabulary(FOLDER / "clip", CORPUS, merges=150)
    (FOLDER / "clip" / "tokenizer_config.json").write_text('{"model_max_length": 77}\n')
    reference = transformers.CLIPTokenizer.from_pretrained(FOLDER / "clip")
    made = strings(150, megabyte=False)
    rows = list(zip(made, reference(made, add_special_tokens=False)["input_ids"], strict=True))
    (FOLDER / "clip" / "ids.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), max_position_embeddings=77, eos_token_id=2, projection_dim=12, **TINY
    )
    model = tiny(transformers.CLIPTextModelWithProjection, config)
    write("clip", model, **{"text_model.embeddings.position_ids": np.arange(77)[None]})
    captions = ["a red cat", "the dog ran to the park in the rain", ""]
    ids = torch.tensor(reference(captions, padding="max_length", max_length=77)["input_ids"])
    out = model(ids, output_hidden_states=True)
    expected |= {"clip.ids": ids, "clip.tokens": out.last_hidden_state[:, :12], "clip.pooled": out.text_embeds}
    expected["clip.penultimate"] = out.hidden_states[-2][:, :12]
    config = transformers.CLIPVisionConfig(image_size=12, patch_size=4, projection_dim=12, hidden_act="gelu", **TINY)
    model = tiny(transformers.CLIPVisionModelWithProjection, config)
    write("vision", model)
    pixels = torch.randn(2, 3, 12, 12)
    out = model(pixels)
    expected |= {"vision.pixels": pixels, "vision.tokens": out.last_hidden_state, "vision.pooled": out.image_embeds}


def others(expected):
    """T5 v1.1 and BERT, with a mask."""
    ids = torch.randint(3, 40, (2, 20))
    mask = torch.arange(20)[None] < torch.tensor([[20], [9]])
    shape = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = tiny(transformers.T5EncoderModel, transformers.T5Config(feed_forward_proj="gated-gelu", **shape))
    write("t5", model)
    expected |= {"ids": ids, "mask": mask, "t5.tokens": model(ids, attention_mask=mask).last_hidden_state}
    model = tiny(transformers.BertModel, transformers.BertConfig(vocab_size=40, max_position_embeddings=24, **TINY))
    write("bert", model)
    expected["bert.tokens"] = model(ids, attention_mask=mask).last_hidden_state


def main():
    """Write the folder."""
    torch.manual_seed(0)
    expected = {}
    clip(expected)
    others(expected)
    arrays = {name: np.ascontiguousarray(t.detach().numpy()) for name, t in expected.items()}
    save_file(arrays, FOLDER / "expected.safetensors")
    print(sum(os.path.getsize(path) for path in FOLDER.rglob("*") if path.is_file()), "bytes")


if __name__ == "__main__":
    main()
