"""transformers models of every family with random weights, saved as folders that model.py loads."""

import json

import torch
import transformers

import tiny
from model import load_pretrained

SIZES = {"vocab_size": 90, "num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 3}
BERT_SIZES = {**SIZES, "intermediate_size": 20, "max_position_embeddings": 40}
OPT_SIZES = {**SIZES, "ffn_dim": 20, "max_position_embeddings": 40}
CONFIGS = {
    "bert": transformers.BertConfig(**BERT_SIZES),
    "roberta": transformers.RobertaConfig(**BERT_SIZES, type_vocab_size=1, layer_norm_eps=1e-5),
    "opt": transformers.OPTConfig(**OPT_SIZES, word_embed_proj_dim=12),
    "opt-350m": transformers.OPTConfig(
        **OPT_SIZES, word_embed_proj_dim=8, do_layer_norm_before=False
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=90,
        n_embd=12,
        n_layer=3,
        n_head=3,
        n_positions=40,
        pad_token_id=1,
        eos_token_id=0,
    ),
}


def build_pair(folder, family, head="classification", num_labels=3, dtype=torch.float64):
    """(transformers' model, ours) with the same random weights, in eval mode, no dropout."""
    config = CONFIGS[family].__class__.from_dict(CONFIGS[family].to_dict())
    config.num_labels = num_labels
    auto = "AutoModelForCausalLM" if head == "lm" else "AutoModelForSequenceClassification"
    peer = getattr(transformers, auto).from_config(config)
    tiny.randomise(peer.parameters(), 0)
    peer.save_pretrained(folder)
    write_tokenizer(folder, family)
    ours, _ = load_pretrained(str(folder), num_labels=num_labels, head=head)
    return peer.to(dtype).eval(), ours.to(dtype).eval()


def write_tokenizer(folder, family):
    """Letters only: BERT's vocab.txt, or the byte-level pair of files."""
    if family == "bert":
        tokens = [*tiny.SPECIALS, *tiny.LETTERS, *(f"##{c}" for c in tiny.LETTERS)]
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
        return
    specials = ["<|endoftext|>"] if family == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [*specials, *tiny.LETTERS, "Ġ", "th", "Ġa"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nĠ a\n")
