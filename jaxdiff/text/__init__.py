"""Text: captions -> token ids -> `TextFeatures`, which condition a network.

Trained at hand: `Tokenizer`, `TextEncoder`. Published: `open_tokenizer`, and with the weights that
`jaxdiff.pretrained.text` reads `CLIPText`, `CLIPVision`, `T5Encoder`, `Bert`. `prompts` weights and chunks; `cache`
keeps embeddings on the disk.
"""

from jaxdiff.text import cache, clip, prompts
from jaxdiff.text.bert import Bert
from jaxdiff.text.clip import CLIPText, CLIPVision, ImageFeatures
from jaxdiff.text.encoder import TextEncoder, TextFeatures
from jaxdiff.text.published import PublishedTokenizer, Tokens, open_tokenizer
from jaxdiff.text.t5 import T5Encoder
from jaxdiff.text.tokenizer import Tokenizer, load, train

__all__ = [
    "Bert",
    "CLIPText",
    "CLIPVision",
    "ImageFeatures",
    "PublishedTokenizer",
    "T5Encoder",
    "TextEncoder",
    "TextFeatures",
    "Tokenizer",
    "Tokens",
    "cache",
    "clip",
    "load",
    "open_tokenizer",
    "prompts",
    "train",
]
