"""Text: captions -> token ids -> `TextFeatures`, which condition a network."""

from jaxdiff.text.encoder import TextEncoder, TextFeatures
from jaxdiff.text.tokenizer import Tokenizer, load, train

__all__ = ["TextEncoder", "TextFeatures", "Tokenizer", "load", "train"]
