"""gguf_file.py: tiny GGUF files, written by gguf's own writer."""

import tokenizers
from tokenizers import models, pre_tokenizers

import tiny


def write_tokenizer(folder):
    """tokenizer.json of letters, for models of LLaMA's kind."""
    tokens = ["<unk>", "<pad>", "<s>", "</s>", *tiny.LETTERS, "Ġ"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
