"""Text: captions -> token ids -> `TextFeatures`, which condition a network.

Trained at hand: `Tokenizer`, `TextEncoder`. Published, with the weights from `jaxdiff.pretrained.text`: `CLIPText`,
`CLIPVision`, `T5Encoder`, `Bert`.
"""

from jaxdiff.text.bert import Bert
from jaxdiff.text.clip import CLIPText, CLIPVision, ImageFeatures
from jaxdiff.text.encoder import TextEncoder, TextFeatures
from jaxdiff.text.t5 import T5Encoder
from jaxdiff.text.tokenizer import Tokenizer, load, train

__all__ = [
    "Bert",
    "CLIPText",
    "CLIPVision",
    "ImageFeatures",
    "T5Encoder",
    "TextEncoder",
    "TextFeatures",
    "Tokenizer",
    "load",
    "train",
]
