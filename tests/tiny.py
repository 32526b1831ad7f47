"""Small models, batches and folders that the tests share, all at a generic point.

Generic: every parameter is random (LayerNorm gains and biases too), lora_B is not zero, alpha is
not r, the FFN is not square, the batch has three examples of different length.
"""

import json

import safetensors.torch
import torch

import lora
from model import Config, Transformer
from support import download

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'?!"
FAMILIES = ("bert", "roberta", "opt", "opt-350m", "gpt2")
# One width of a head for each of three kinds of grouping: 6 heads on 2 pairs of key and value, 4 on
# 4, 4 on 1; no width of the attention equals the model's.
CAUSAL = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma")


def config(family, **overrides):
    """A config of each family; "opt-350m" is OPT with LayerNorm last and 8-wide embeddings."""
    if family in CAUSAL:
        return causal_config(family, **overrides)
    name = "opt" if family == "opt-350m" else family
    fields = dict(
        family=name,
        vocab_size=90,
        hidden_size=12,
        num_layers=3,
        num_heads=3,
        ffn_dim=20,
        max_positions=40,
        embed_dim=8 if family == "opt-350m" else 12,
        pad_token_id=1,
        layer_norm_eps=1e-5,
        activation={"opt": "relu", "gpt2": "gelu_new"}.get(name, "gelu"),
        causal=name in ("opt", "gpt2"),
        embed_norm=name in ("bert", "roberta"),
        embed_dropout=name != "opt",
        pooler_in_head=name == "roberta",
        pre_ln=family in ("opt", "gpt2"),
        final_norm=family in ("opt", "gpt2"),
        position_offset=2 if name in ("opt", "roberta") else 0,
        type_vocab_size={"bert": 2, "roberta": 1}.get(name, 0),
        num_labels=3,
    )
    return Config(**{**fields, **overrides})


def causal_config(family, **overrides):
    """LLaMA and its relatives; "llama3" has an untied head and rope scaling that shows early."""
    heads, kv_heads = {"qwen2": (4, 4), "gemma": (4, 1)}.get(family, (6, 2))
    fields = dict(
        family="llama" if family == "llama3" else family,
        vocab_size=90,
        hidden_size=12,
        num_layers=3,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=4,
        ffn_dim=20,
        max_positions=40,
        embed_dim=12,
        pad_token_id=1,
        layer_norm_eps=1e-5,
        activation="gelu_new" if family == "gemma" else "silu",
        causal=True,
        pre_ln=True,
        final_norm=True,
        embed_norm=False,
        embed_dropout=False,
        rms_norm=True,
        gated=True,
        bias="qkv" if family == "qwen2" else "none",
        qk_norm=family == "qwen3",
        rope_theta=30.0,
        rope_scaling=(4.0, 1.0, 3.0, 24.0) if family == "llama3" else None,
        embed_scale=12**0.5 if family == "gemma" else 1.0,
        tied=family in ("llama", "gemma"),
        eos_token_ids=(3,),
        num_labels=3,
    )
    return Config(**{**fields, **overrides})


def model(family, seed=0, dtype=torch.float64, **overrides):
    """A Transformer with random weights everywhere."""
    m = Transformer(config(family, **overrides)).to(dtype)
    randomise(m.parameters(), seed)
    return m


def randomise(parameters, seed=0, std=0.3):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * std)


def adapted(
    family, seed=0, r=3, targets=lora.LINEARS, shortcuts=(), dtype=torch.float64, **overrides
):
    """model() with LoRA and a random lora_B."""
    m = model(family, seed, dtype, **overrides)
    lora.inject(m, targets, r=r, lora_alpha=5, shortcuts=shortcuts, shortcut_alpha=2)
    randomise([a.lora_B for a in lora.adapters(m).values()], seed + 1)
    lora.mark_trainable(m)
    return m


def batch(c, seed=0, lengths=(9, 4, 6)):
    """Token ids that are not padding, padded on the right; labels of the config's kind."""
    rng = torch.Generator().manual_seed(seed)
    b, t = len(lengths), max(lengths)
    mask = torch.arange(t)[None] < torch.tensor(lengths)[:, None]  # (b, t)
    ids = torch.randint(5, c.vocab_size, (b, t), generator=rng).where(
        mask, torch.tensor(c.pad_token_id)
    )
    result = {"input_ids": ids, "attention_mask": mask.long()}
    if c.type_vocab_size > 1:
        result["token_type_ids"] = torch.randint(0, 2, (b, t), generator=rng) * mask
    if c.head == "lm":
        result["labels"] = ids.where(mask, torch.tensor(-100))
    elif c.num_labels == 1:
        result["labels"] = torch.rand(b, generator=rng) * 5
    else:
        result["labels"] = torch.randint(0, c.num_labels, (b,), generator=rng)
    return result


BERT_CONFIG = {
    "model_type": "bert",
    "vocab_size": 90,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
}


def bert_tensors(prefix="bert.", seed=0):
    """A BERT without classifier, under the names that transformers gives it, spelt out here."""
    d, f = 12, 20
    shapes = {
        "embeddings.word_embeddings.weight": (90, d),
        "embeddings.position_embeddings.weight": (40, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,),
    }
    for i in range(2):
        for name, shape in {
            "attention.self.query": (d, d),
            "attention.self.key": (d, d),
            "attention.self.value": (d, d),
            "attention.output.dense": (d, d),
            "attention.output.LayerNorm": (d,),
            "intermediate.dense": (f, d),
            "output.dense": (d, f),
            "output.LayerNorm": (d,),
        }.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    rng = torch.Generator().manual_seed(seed)
    return {f"{prefix}{n}": torch.randn(s, generator=rng) * 0.3 for n, s in shapes.items()}


def bert_folder(path, tensors=None, **changes):
    """Write a BERT model folder with a letter-by-letter tokenizer; returns the path."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**BERT_CONFIG, **changes}))
    tokens = [*SPECIALS, *LETTERS, *(f"##{c}" for c in LETTERS)]
    (path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    safetensors.torch.save_file(tensors or bert_tensors(), path / "model.safetensors")
    return path


def task_folder(path, train=24, dev=10):
    """Write a tiny task in MRPC's layout: is the second string the first one reversed?"""
    path.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(5)
    for name, n in (("train", train), ("dev", dev)):
        rows = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for i in range(n):
            size = int(torch.randint(2, 12, (1,), generator=rng))
            word = "".join(LETTERS[j] for j in torch.randint(0, 26, (size,), generator=rng))
            rows.append(f"{i % 2}\t{i}\t{i}\t{word}\t{word[::-1] if i % 2 else word}")
        (path / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return path


def hub_cache(cache, repo, write, repo_type="model", elsewhere=()):
    """Put a repository into a cache folder as huggingface_hub does; returns the snapshot.

    write(folder) makes the files; elsewhere: names of more that the hub has. Both are in the list
    by which huggingface_hub tells a whole copy from a part; with None there is no list.
    """
    commit = download.REVISIONS.get(repo, "0123456789" * 4)
    storage = cache / f"{repo_type}s--{repo.replace('/', '--')}"
    folder = storage / "snapshots" / commit
    folder.mkdir(parents=True)
    write(folder)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    if elsewhere is not None:
        names = [*elsewhere]
        names += [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        files = {name: {"size": 1, "blob_id": "0"} for name in names}
        (storage / "trees").mkdir()
        content = json.dumps({"format_version": 1, "files": files})
        (storage / "trees" / f"{commit}.json").write_text(content)
    return folder


def checkpoint_state():
    """What a checkpoint of a run holds, spelt out: one module, two steps, one decision."""
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 5, generator=rng), torch.randn(4, 2, generator=rng)
    moments = [{"step": torch.tensor(2.0), "exp_avg": p, "exp_avg_sq": p**2} for p in (a, b)]
    decision = {"step": 0, "epoch": 0, "scores": {"m": 0.5}, "on": {"m": True}}
    return {
        "parameters": {"m.lora_A": a, "m.lora_B": b},
        "optimizer": {
            "state": dict(enumerate(moments)),
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "on": {"m": True},
        "ranks_off": {"m": []},
        "plan": {"history": [decision], "rng": rng.get_state()},
        "delta": {
            "t": 2,
            "begin": {"m": (a, b)},
            "ended": {"m": [(a, b, 1), (a, b, -1)]},
            "weights": {"m": torch.randn(4, 5, generator=rng)},
        },
        "allocator": None,
        "position": {"epoch": 0, "step_in_epoch": 2, "step": 2},
        "metrics": {"best": None, "last": None, "seconds": 0.5, "score_seconds": 0.0},
        "generators": [{"cpu": rng.get_state(), "cuda": None}],
        "log_lines": 3,
    }
