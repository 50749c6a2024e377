"""Strings on which tokenizers differ, and a small CLIP vocabulary to try them with."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

_TEXT = (
    "a photo of the cat cats CATS Straße İstanbul naïve naïve ﬁne ½ x² café résumé don't I'll we've he'd 'S "
    "hello-world foo_bar http://a.b/c?d=e user@example.com 3.14159 1,000,000 2nd 007 #tag $5 100% e=mc^2 "
    "你好世界 日本語のテキスト 한국어 สวัสดี नमस्ते שלום مرحبا‎ العربية Здравствуйте Ελληνικά ﷽ ǅ Ⅷ ⅷ ① "
    "😀 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ☃ ® ™ “quoted” ‘single’ — – … • · ¿qué? ¡sí! ÷ × ∑∫√ ꙮ 𝕳𝖊𝖑𝖑𝖔 𒀀 ￼ � "
    "<|startoftext|> <|endoftext|> <|ENDOFTEXT|> [MASK] [CLS] [PAD] [unused1] ##ing </w> </s> <pad> <unk> <extra_id_0> "
    "! !! ?! ... ,,, ((( ))) [[x]] {y} \\ / | ~ ` ^ supercalifragilisticexpialidocious aaaaaaaaaaaaaaaaaaaaaaaaaaaa"
)
_WORDS = _TEXT.split(" ")
_SPACES = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\x0b",
    "\x85",
    "",
)
_ODD = "\x00\x01\x07\x1b\x7f\x80\xad\u0300\u0301\u034f\u0600\u202a\u202e\u2028\u2029\ufe0f\uffff\U000e0001\U0010ffff"


def strings(count=10_000, seed=0, megabyte=True):
    """`count` strings: empty, blank, words of many scripts, control characters, random code points, one of 1 MB."""
    random = np.random.default_rng(seed)
    made = ["", " ", "\n", "\x00", "a", "\u202eabc", "e\u0301", "ab" * 300, "." * 300, "1" * 300, "<|endoftext|>" * 3]
    made += ["the quick brown fox " * 50_000] if megabyte else []
    while len(made) < count:
        kind, length = random.integers(4), int(random.integers(1, 24))
        if kind < 2:
            words = random.choice(_WORDS, length)
            made.append("".join(w + _SPACES[random.integers(len(_SPACES)) if kind else 0] for w in words))
        elif kind == 2:
            made.append("".join(chr(c) for c in random.integers(1, 0x2FFFF, length) if not 0xD800 <= c < 0xE000))
        else:
            letters = "".join(random.choice(_WORDS, length)) + _ODD
            made.append("".join(random.choice(list(letters), length)))
    return made[:count]


def write_clip_vocabulary(folder, corpus, merges=600):
    """vocab.json and merges.txt in the layout of OpenAI's CLIP: bytes, bytes that end a word, merges, two marks."""
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, end_of_word_suffix="</w>", show_progress=False)
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.train_from_iterator([corpus.lower()], trainer)
    pairs = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in pairs)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return vocabulary
