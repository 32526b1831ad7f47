"""Reading a model folder in Hugging Face layout: config.json, tensors under HF names, tokenizer.

    config.json                     -> config_fields: the arguments of model.Config, or a refusal
    model.safetensors, its sharded index, or pytorch_model.bin (weights only, no pickled code)
                                    -> read_tensors -> convert: our names, each tensor accounted for
    tokenizer.json, vocab.json + merges.txt, or vocab.txt
                                    -> load_tokenizer: pairs encoded as the family does

Names differ between the checkpoints of one family (a prefix or none, LayerNorm.gamma for .weight,
heads of another task). What is known and not needed is listed in IGNORED; anything else that is
missing, unexpected or misshapen is an error that lists all of it.

What this file does not do: build the model (model.py), write checkpoints (train.py), fetch
(download.py).
"""

import json
import re
from pathlib import Path

import safetensors
import safetensors.torch
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

# ------------------------------------------------------------------------------------------- config

SAME = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}  # other names of tanh-GELU
REFUSED = {  # field -> the values that we implement, by family (None: the field may be absent)
    "*": {
        "quantization_config": (None,),
        "pruned_heads": (None, {}),
        "problem_type": (None, "single_label_classification", "regression"),
    },
    "bert": {
        "position_embedding_type": (None, "absolute"),
        "is_decoder": (None, False),
        "add_cross_attention": (None, False),
    },
    "opt": {
        "enable_bias": (None, True),
        "layer_norm_elementwise_affine": (None, True),
        "tie_word_embeddings": (None, True),
    },
    "gpt2": {
        "scale_attn_weights": (None, True),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "reorder_and_upcast_attn": (None, False),
        "add_cross_attention": (None, False),
        "tie_word_embeddings": (None, True),
    },
}
REFUSED["roberta"] = REFUSED["bert"]
SIZES = {  # our field -> HF field, by family
    "bert": {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_dim": "intermediate_size",
        "max_positions": "max_position_embeddings",
    },
    "opt": {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_dim": "ffn_dim",
        "max_positions": "max_position_embeddings",
    },
    "gpt2": {
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_positions": "n_positions",
    },
}
SIZES["roberta"] = SIZES["bert"]


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_config(folder):
    """config.json of a model folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: not a model in Hugging Face layout")
    return read_json(path)


def size(hf, field):
    value = hf.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {field} is {value!r}, expected a positive integer")
    return value


def switch(hf, field, default):
    value = hf.get(field, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {field} is {value!r}, expected true or false")
    return value


def epsilon(hf, field, default):
    value = hf.get(field, default)
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(f"config.json: {field} is {value!r}, expected a number between 0 and 1")
    return value


def padding_id(hf, default, vocab_size):
    value = hf.get("pad_token_id", default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ValueError(f"config.json: pad_token_id is {value!r}, expected an id below vocab_size")
    return value


def refuse_unsupported(hf, family, activation, activations):
    for field, allowed in {**REFUSED["*"], **REFUSED[family]}.items():
        if hf.get(field) not in allowed:
            raise ValueError(
                f"config.json: {field} = {hf[field]!r} is not implemented for {family}, "
                f"only {allowed[-1]!r}"
            )
    if activation not in activations:
        raise ValueError(
            f"config.json: activation {activation!r} is not implemented, only "
            f"{', '.join(activations)}"
        )


def family_fields(hf, family, sizes):
    """What differs between families: LayerNorm, positions, padding; defaults as transformers'."""
    fields, d, vocab_size = {}, sizes["hidden_size"], sizes["vocab_size"]
    if family in ("bert", "roberta"):
        pad = padding_id(hf, 0 if family == "bert" else 1, vocab_size)
        fields |= {"pre_ln": False, "final_norm": False, "pad_token_id": pad}
        fields["layer_norm_eps"] = epsilon(hf, "layer_norm_eps", 1e-12)
        fields["type_vocab_size"] = size({"type_vocab_size": 2, **hf}, "type_vocab_size")
        if family == "roberta":  # positions count from pad + 1
            fields["position_offset"] = pad + 1
            fields["max_positions"] = sizes["max_positions"] - pad - 1
    elif family == "opt":
        pre_ln = switch(hf, "do_layer_norm_before", True)
        final_norm = pre_ln and not switch(hf, "_remove_final_layer_norm", False)
        fields |= {"pre_ln": pre_ln, "final_norm": final_norm}
        fields |= {"position_offset": 2, "layer_norm_eps": 1e-5}
        fields["pad_token_id"] = padding_id(hf, 1, vocab_size)
        if hf.get("word_embed_proj_dim") is not None:
            fields["embed_dim"] = size(hf, "word_embed_proj_dim")
    else:
        fields |= {"pre_ln": True, "final_norm": True}
        fields["layer_norm_eps"] = epsilon(hf, "layer_norm_epsilon", 1e-5)
        fields["ffn_dim"] = 4 * d if hf.get("n_inner") is None else size(hf, "n_inner")
        # GPT-2 has no padding token; any id does, since padding is masked and never read.
        ids = [hf.get(field) for field in ("pad_token_id", "eos_token_id")]
        given = {"pad_token_id": next((i for i in ids if i is not None), 0)}
        fields["pad_token_id"] = padding_id(given, 0, vocab_size)
    return fields


def config_fields(hf, activations):
    """The arguments of model.Config that a Hugging Face config.json decides.

    Sizes must be there; other fields default as in transformers' configuration class of the family.

    Args:
        hf: dict, the content of config.json.
        activations: tuple of the activation names that the model has.

    Returns:
        dict, field of model.Config -> value.

    Raises:
        ValueError: names the field, what it is, and what is implemented.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in SIZES:
        raise ValueError(
            f"config.json: model_type {family!r} is not implemented, only "
            f"{', '.join(sorted(SIZES))}"
        )
    default = {"opt": "relu", "gpt2": "gelu_new"}.get(family, "gelu")
    activation = hf.get("hidden_act" if family in ("bert", "roberta") else "activation_function")
    activation = activation or hf.get("activation_function") or default
    if not isinstance(activation, str):
        raise ValueError(f"config.json: the activation is {activation!r}, expected a name")
    activation = SAME.get(activation, activation)
    refuse_unsupported(hf, family, activation, activations)
    fields = {ours: size(hf, theirs) for ours, theirs in SIZES[family].items()}
    d = fields["hidden_size"]
    fields |= {"family": family, "activation": activation, "embed_dim": d}
    fields |= family_fields(hf, family, fields)
    if fields["max_positions"] < 1:
        raise ValueError(f"config.json: max_position_embeddings leaves {fields['max_positions']}")
    return fields


# ------------------------------------------------------------------------------------------ tensors

PREFIX = {"bert": "bert.", "roberta": "roberta.", "opt": "model.", "gpt2": "transformer."}
IGNORED = {  # known, and not needed here (after the prefix is gone)
    "bert": r"cls\..*|embeddings\.position_ids",
    "roberta": r"lm_head\..*|pooler\..*|embeddings\.position_ids",
    "opt": r"lm_head\.weight|decoder\.version",
    "gpt2": r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias",
}
TOP = {  # our module -> HF module
    "bert": {
        "word_embeddings": "embeddings.word_embeddings",
        "position_embeddings": "embeddings.position_embeddings",
        "token_type_embeddings": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
    "opt": {
        "word_embeddings": "decoder.embed_tokens",
        "position_embeddings": "decoder.embed_positions",
        "project_in": "decoder.project_in",
        "project_out": "decoder.project_out",
        "final_norm": "decoder.final_layer_norm",
        "score": "score",
    },
    "gpt2": {
        "word_embeddings": "wte",
        "position_embeddings": "wpe",
        "final_norm": "ln_f",
        "score": "score",
    },
}
TOP["roberta"] = {**TOP["bert"], "pooler": "classifier.dense", "classifier": "classifier.out_proj"}
LAYER = {  # our module in a layer -> HF module in a layer
    "bert": {
        "q_proj": "attention.self.query",
        "k_proj": "attention.self.key",
        "v_proj": "attention.self.value",
        "out_proj": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "ffn_norm": "output.LayerNorm",
    },
    "opt": {
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "out_proj": "self_attn.out_proj",
        "attn_norm": "self_attn_layer_norm",
        "fc1": "fc1",
        "fc2": "fc2",
        "ffn_norm": "final_layer_norm",
    },
    "gpt2": {
        "q_proj": "attn.c_attn",
        "k_proj": "attn.c_attn",
        "v_proj": "attn.c_attn",
        "out_proj": "attn.c_proj",
        "attn_norm": "ln_1",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
        "ffn_norm": "ln_2",
    },
}
LAYER["roberta"] = LAYER["bert"]
STACK = {"bert": "encoder.layer", "roberta": "encoder.layer", "opt": "decoder.layers", "gpt2": "h"}


def hf_module(family, module):
    """The HF path of one of our modules, without the family's prefix: "layers.3.q_proj" -> …."""
    if module.startswith("layers."):
        _, i, rest = module.split(".", 2)
        return f"{STACK[family]}.{i}.{LAYER[family][rest]}"
    return TOP[family][module]


def read_tensors(folder):
    """All tensors of a model folder, under the names in the file.

    Raises:
        FileNotFoundError: no weights, or a shard is missing. ValueError: a file that is not what it
            says.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index} has no weight_map")
            tensors = {}
            for shard in sorted(set(shards.values())):
                path = folder / shard
                if path.parent != folder or not path.is_file():
                    raise FileNotFoundError(
                        f"{index} names the shard {shard!r}, which is not beside it"
                    )
                tensors |= read_file(path)
            return tensors
    raise FileNotFoundError(
        f"{folder} has no weights: expected model.safetensors, pytorch_model.bin, or an index.json"
    )


def read_file(path):
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    except Exception as error:  # torch.load raises many kinds: zip, pickle, EOF, runtime
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a file of plain tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise ValueError(f"{path} is not a dict of tensors")
    return tensors


def normalise(tensors, family):
    """Names without the family's prefix, gamma and beta renamed, what is not needed left out."""
    result = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(PREFIX[family])
        short = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", short)
        short = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", short)
        if re.fullmatch(IGNORED[family], short):
            continue
        if short in result:
            raise ValueError(
                f"the checkpoint has {short} twice, with and without {PREFIX[family]!r}"
            )
        result[short] = tensor
    return result


def convert(tensors, config, expected, head):
    """HF tensors -> our state dict, every tensor accounted for.

    GPT-2: Conv1D stores (in, out), nn.Linear (out, in); c_attn is q, k and v side by side.

    Args:
        tensors: dict, as read_tensors gives them.
        config: model.Config.
        expected: dict, our names -> tensors of the right shape (values are not read).
        head: tuple of our modules that may be missing as a whole.

    Returns:
        (dict our name -> float32 tensor, tuple of the head modules that are missing).

    Raises:
        ValueError: lists what is missing, unexpected, misshapen, not floating point or not finite.
    """
    tensors = normalise(tensors, config.family)
    used, state, problems = set(), {}, []
    for ours, parameter in expected.items():
        module, _, kind = ours.rpartition(".")
        theirs = f"{hf_module(config.family, module)}.{kind}"
        if theirs not in tensors:
            continue
        used.add(theirs)
        tensor, shape = tensors[theirs], tuple(tensors[theirs].shape)
        place = module.rpartition(".")[2]
        if config.family == "gpt2" and module.startswith("layers.") and not place.endswith("norm"):
            tensor = tensor.T if tensor.ndim == 2 else tensor
            if place in ("q_proj", "k_proj", "v_proj"):
                j, d = ("q_proj", "k_proj", "v_proj").index(place), config.hidden_size
                tensor = tensor[j * d : (j + 1) * d] if len(tensor) == 3 * d else tensor
        if tensor.shape != parameter.shape:
            problems.append(
                f"{theirs} has shape {shape}, does not fit {ours} {tuple(parameter.shape)}"
            )
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            problems.append(
                f"{theirs} ({tensor.dtype}) is not a tensor of finite floating-point numbers"
            )
        state[ours] = tensor.to(torch.float32).contiguous().clone()
    missing = set(expected) - set(state)
    fresh = tuple(m for m in head if {n for n in expected if n.rpartition(".")[0] == m} <= missing)
    problems += [
        f"{n} is missing" for n in expected if n in missing and n.rpartition(".")[0] not in fresh
    ]
    unneeded = (
        ("score.weight", "classifier.weight", "classifier.bias") if config.head == "lm" else ()
    )
    problems += [f"{n} is unexpected" for n in tensors if n not in used and n not in unneeded]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit a {config.family} model: " + "; ".join(problems)
        )
    return state, fresh


# ---------------------------------------------------------------------------------------- tokenizer

PAIRS = {  # family -> (one text, two texts) for the template processor
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "opt": ("</s> $A", "</s> $A </s> $B"),
    "gpt2": ("$A", "$A $B"),
}


def load_tokenizer(folder, family, vocab_size):
    """The tokenizer of a model folder; texts and pairs come out as transformers' of the family.

    Args:
        folder: path with tokenizer.json, or vocab.json + merges.txt, or vocab.txt.
        family: "bert", "roberta", "opt" or "gpt2".
        vocab_size: int, rows of the model's embedding.

    Returns:
        tokenizers.Tokenizer without truncation or padding.

    Raises:
        FileNotFoundError: none of the three. ValueError: unreadable, a special token is missing, or
            ids beyond the model's embedding.
    """
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = byte_level_bpe(folder, family)
        elif (folder / "vocab.txt").is_file():
            tokenizer = word_piece(folder)
        else:
            raise FileNotFoundError(
                f"{folder} has no tokenizer: expected tokenizer.json, vocab.json + merges.txt, or "
                "vocab.txt"
            )
    except FileNotFoundError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {highest}, the model's embedding "
            f"{vocab_size} rows: "
            "they do not belong together"
        )
    single, pair = PAIRS[family]
    specials = sorted({t for t in pair.replace(":1", "").split() if t[0] != "$"})
    ids = {t: tokenizer.token_to_id(t) for t in specials}
    if None in ids.values():
        absent = ", ".join(t for t in specials if ids[t] is None)
        raise ValueError(f"the tokenizer in {folder} lacks {absent}, which {family} needs")
    template = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(ids.items())
    )
    tokenizer.post_processor = template
    return tokenizer


def byte_level_bpe(folder, family):
    """RoBERTa's, OPT's and GPT-2's: bytes as characters, then merges."""
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = tokenizer.get_vocab()
    specials = [t for t in ("<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>") if t in known]
    tokenizer.add_special_tokens(specials)
    if family == "roberta" and "<mask>" in known:
        tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    return tokenizer


def word_piece(folder):
    """BERT's: words, lower-cased unless tokenizer_config.json says no, then word pieces."""
    path = folder / "tokenizer_config.json"
    options = read_json(path) if path.is_file() else {}
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocab = {token.rstrip("\r"): i for i, token in enumerate(lines) if token.rstrip("\r")}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
    tokenizer.add_special_tokens(specials)
    return tokenizer
