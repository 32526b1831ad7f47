"""A GGUF file, llama.cpp's format for one model, turned into a folder in Hugging Face layout.

    metadata   general.architecture, llama.embedding_length, …       -> config.json
    tensors    blk.3.attn_q.weight, quantised or not                  -> model.safetensors, float32
    tokenizer  tokenizer.ggml.tokens, merges or scores, chat_template -> tokenizer.json,
                                                                         tokenizer_config.json

The package gguf, llama.cpp's own reader, reads the file and turns codes into numbers. What is left
to undo here is what llama.cpp changed when it wrote the file:

    q, k (llama)       rows are permuted for the interleaved rotation; ours is half-split
    norms (gemma)      hold 1 + w where the original has w
    rope scaling       a tensor rope_freqs, by which each frequency is divided

Dequantised weights are not those of the model that was quantised: two models, two names.

What this file does not do: keep weights quantised, know where files come from (download.py).
"""

import json
import re

import numpy
import safetensors.torch
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from support.errors import one_line, shown

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma")  # Mistral's files call themselves llama
CONFIG = {  # in config.json -> in the metadata, behind the architecture's name
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
}
OPTIONAL = ("num_key_value_heads", "rope_theta", "head_dim")
REFUSED = {  # in the metadata -> the values that we implement
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
}
TENSORS = {  # theirs -> Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {  # theirs, behind blk.{i} -> Hugging Face's, behind model.layers.{i}
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
LLAMA3 = {  # what all of LLaMA 3.1 to 3.3 share; the factor is 8 or 32
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1  # kinds of tokens
SPLITS = {  # tokenizer.ggml.pre -> how text is cut before merges, as in these models' own files
    "gpt-2": None,
    "smollm": r"\p{N}",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def convert(path, folder):
    """Write a GGUF file's model as config.json, model.safetensors, tokenizer.json and their like.

    Args:
        path: the file. folder: pathlib.Path, there and empty.

    Raises:
        ValueError: no GGUF file, damaged, or of a model that is not implemented.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = read_tensors(reader)
    except Exception as error:  # of its own kinds, numpy's, or the operating system's
        raise ValueError(f"{path} is not a readable GGUF file: {one_line(error)}") from error
    try:
        config = config_of(metadata, tensors)
        tensors = renamed(tensors, config)
        tokenizer = tokenizer_of(metadata)
        about = about_tokenizer(metadata, config)
    except KeyError as error:
        raise ValueError(f"{path} lacks {one_line(error)} in its metadata") from error
    except Exception as error:  # tokenizers raises none of a kind of its own
        raise ValueError(f"{path}: {one_line(error)}") from error
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # By way of bytes: a full disk is then an OSError, and none of the libraries' own kinds.
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors))
    (folder / "tokenizer.json").write_bytes(tokenizer.to_str().encode())
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def about_tokenizer(metadata, config):
    """What tokenizer_config.json says: the tokens around a text, and how a chat is written."""
    texts, about = metadata["tokenizer.ggml.tokens"], {}
    for kind in ("bos", "eos"):
        number = config[f"{kind}_token_id"]
        number = number[0] if isinstance(number, list) else number
        if number is None:
            continue
        if not 0 <= number < len(texts):
            raise ValueError(f"{kind}_token_id is {number}, expected an id below {len(texts)}")
        about[f"{kind}_token"] = texts[number]
    if "tokenizer.chat_template" in metadata:
        about["chat_template"] = metadata["tokenizer.chat_template"]
    return about


# ------------------------------------------------------------------------------- config and tensors


def read_tensors(reader):
    """dict their name -> float32 tensor, (out, in) as in nn.Linear."""
    import gguf

    return {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type), dtype=torch.float32)
        for t in reader.tensors
    }


def config_of(metadata, tensors):
    """The metadata as a config.json. KeyError: something is missing. ValueError: unknown model."""
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {shown(architecture)} is not implemented, only "
            f"{', '.join(ARCHITECTURES)}"
        )
    for name, allowed in REFUSED.items():
        value = metadata.get(f"{architecture}.{name}", allowed[0])
        if value not in allowed:
            raise ValueError(f"{architecture}.{name} = {shown(value)} is not implemented")
    config = {"model_type": architecture}
    for ours, theirs in CONFIG.items():
        name = f"{architecture}.{theirs}"
        if name in metadata or ours not in OPTIONAL:
            config[ours] = metadata[name]
    if "head_dim" not in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    if "token_embd.weight" in tensors:  # some have more rows than there are tokens
        config["vocab_size"] = len(tensors["token_embd.weight"])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    found = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in found if end is not None))
    if len(ends) > 1:  # of a text, of a turn, of a message
        config["eos_token_id"] = ends
    if ROPE_FREQS in tensors:
        config["rope_scaling"] = rope_scaling(tensors[ROPE_FREQS].double().numpy(), config)
    return config


def rope_scaling(divisors, config):
    """LLaMA 3's parameters, found again in the numbers by which each frequency is divided.

    Raises:
        ValueError: other numbers than these parameters give.
    """
    scaling = {**LLAMA3, "factor": round(float(divisors.max()), 4)}
    steps = numpy.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = LLAMA3["original_max_position_embeddings"] / (2 * numpy.pi)
    turns = turns * config.get("rope_theta", 10000.0) ** -steps  # (d_h / 2,)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    share = ((turns - low) / (high - low)).clip(0, 1)
    # f / divisor = (1 - s) f / factor + s f
    expected = 1 / ((1 - share) / scaling["factor"] + share)
    if divisors.shape != expected.shape or not numpy.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(f"{ROPE_FREQS} is another scaling of the rope than LLaMA 3's")
    return scaling


def renamed(tensors, config):
    """The tensors under Hugging Face's names, in its layout.

    Raises:
        ValueError: lists the names that are not known.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    result, unknown = {}, []
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        i, place, kind = found.groups() if found else (None, None, None)
        if name == ROPE_FREQS:
            continue
        if place not in (TENSORS if i is None else BLOCK):
            unknown.append(one_line(name))
            continue
        if config["model_type"] == "llama" and place in heads:
            tensor = half_split(tensor, heads[place])
        if config["model_type"] == "gemma" and place.endswith("norm"):
            tensor = tensor - 1
        stem = TENSORS[place] if i is None else f"model.layers.{i}.{BLOCK[place]}"
        result[f"{stem}.{kind}"] = tensor.contiguous()
    if unknown:
        raise ValueError(f"unknown tensors: {', '.join(sorted(unknown)[:5])}")
    return result


def half_split(tensor, heads):
    """Rows of each head from pairs, (0, n, 1, n + 1, …), back to two halves, (0, 1, …, n, …)."""
    if len(tensor) % (2 * heads):
        raise ValueError(f"{len(tensor)} rows of q or k are not {heads} heads of pairs")
    pairs = tensor.reshape(heads, len(tensor) // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)  # (out, in)


# ---------------------------------------------------------------------------------------- tokenizer


def tokenizer_of(metadata):
    """tokenizers.Tokenizer of byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

    Raises:
        ValueError: another kind, or a way to cut texts that is not known.
    """
    kind, tokens = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if kind == "gpt2":
        tokenizer = byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = sentence_piece(metadata, tokens, kinds)
    else:
        raise ValueError(f"tokenizer {shown(kind)} is not implemented, only 'gpt2' and 'llama'")
    added = {CONTROL: [], USER_DEFINED: []}
    for token, what in zip(tokens, kinds, strict=True):
        if what in added:
            added[what].append(
                tokenizers.AddedToken(token, normalized=False, special=what == CONTROL)
            )
    tokenizer.add_tokens(added[USER_DEFINED])
    tokenizer.add_special_tokens(added[CONTROL])
    add_ends(tokenizer, metadata, tokens)
    return tokenizer


def byte_level(metadata, tokens):
    """GPT-2's: bytes as characters, then merges in their order."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre {shown(pre)} is not implemented, only {', '.join(SPLITS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    # LLaMA 3: a piece that is a token is taken whole, whatever the merges
    bpe = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(bpe)
    own_split = pre in ("gpt-2", "smollm")  # GPT-2's, which comes with ByteLevel
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_split)]
    if SPLITS[pre]:
        regex = tokenizers.Regex(SPLITS[pre])
        steps = [pre_tokenizers.Split(regex, behavior="isolated"), *steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece(metadata, tokens, kinds):
    """SentencePiece's BPE: the merge comes first whose result has the highest score."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], kinds, strict=True):
        if kind == NORMAL:
            splits = [(token[:i], token[i:]) for i in range(1, len(token))]
            merges += [(-score, pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    merges = [pair for _, pair in sorted(merges, key=lambda found: found[0])]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    begin = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*begin, spaces])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return tokenizer


def add_ends(tokenizer, metadata, tokens):
    """The tokens that stand before and after every text, where the file wants them."""
    spm = metadata["tokenizer.ggml.model"] == "llama"
    wanted = {
        "bos": metadata.get(
            "tokenizer.ggml.add_bos_token",
            spm or metadata.get("tokenizer.ggml.pre") == "llama-bpe",
        ),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {end: metadata[f"tokenizer.ggml.{end}_token_id"] for end in wanted if wanted[end]}
    if not ids:
        return

    def around(text):
        return " ".join(part for part in ("bos", text, "eos") if part == text or part in ids)

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A"),
        pair=f"{around('$A')} {around('$B')}",
        special_tokens=[
            {"id": end, "ids": [i], "tokens": [tokens[i]]} for end, i in sorted(ids.items())
        ],
    )
