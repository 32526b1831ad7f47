"""One record a model family: everything by which a family's files differ from another's.

    FAMILIES["bert"]      BERT, MiniLM and other sentence-transformers
    FAMILIES["roberta"]   the same blocks; other positions, head and special tokens
    FAMILIES["opt"]       LayerNorm before each sub-layer, in OPT-350M after it
    FAMILIES["gpt2"]      weights stored transposed, q, k and v side by side in one matrix
    FAMILIES["llama"]     RMSNorm, rotary positions, grouped key-value heads, a gate, no biases:
                          LLaMA 2 and 3, SmolLM2, TinyLlama
    FAMILIES["mistral"]   the same, where there is no sliding window
    FAMILIES["qwen2"]     … and a bias on q, k and v
    FAMILIES["qwen3"]     … and RMSNorm of each head of q and k
    FAMILIES["gemma"]     … and gains stored as their difference from 1, scaled embeddings (Gemma 1)

To add a family, write a record. Where its architecture has something that no other has, add a
field to model.Config, a branch in model.Block that reads it, and its value to `features` (the same
in every model of the family) or to `fields` (config.json decides).

    word     | meaning
    ours     | a name in model.py: a field of Config, or a module such as layers.0.q_proj
    theirs   | a name in config.json, or in the checkpoint's tensors without the prefix

What this file does not do: read files (hf_folder.py), compute anything (model.py).
"""

import dataclasses
from collections.abc import Callable

from support.errors import shown

ACTIVATIONS = {  # their name -> ours
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "silu": "silu",
}
BYTE_LEVEL_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>")
PARTIAL = "partial_rotary_factor"  # 1: every pair of features is turned
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_fits(value, fields):
    """Whether a rope_scaling is one that model.rotation implements: none, or LLaMA 3's, whole."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    kind = value.get("rope_type", value.get("type"))
    if kind == "default" or (kind is None and value.keys() <= {"rope_theta", PARTIAL}):
        return value.get(PARTIAL, 1) == 1
    numbers = rope_numbers(value, fields) if kind == "llama3" else [None]
    return (
        all(type(n) in (int, float) and 0 < n < 1e12 for n in numbers) and numbers[1] < numbers[2]
    )


def rope_numbers(scaling, fields):
    """LLaMA 3's four, in the order of ROPE_KEYS; the last is the model's own where it is absent."""
    return [{ROPE_KEYS[3]: fields["max_positions"], **scaling}.get(key) for key in ROPE_KEYS]


KINDS = {  # kind -> (what a value must be, test of a value given the fields read before it)
    "size": ("a positive integer", lambda v, _: type(v) is int and 0 < v < 1e300),
    "switch": ("true or false", lambda v, _: type(v) is bool),
    "epsilon": ("a number between 0 and 1", lambda v, _: type(v) is float and 0 < v < 1),
    "base": ("a number above 1", lambda v, _: type(v) in (int, float) and 1 < v < 1e12),
    "rope scaling": (f"null, or rope_type 'llama3' with {', '.join(ROPE_KEYS)}", rope_fits),
    "no window": ("null: every token sees all before it", lambda v, _: v is None),
    "token id": (
        "an id below vocab_size",
        lambda v, fields: type(v) is int and 0 <= v < fields["vocab_size"],
    ),
    "activation": (
        f"one of {', '.join(ACTIVATIONS)}",
        lambda v, _: isinstance(v, str) and v in ACTIVATIONS,
    ),
}


@dataclasses.dataclass(frozen=True)
class Field:
    """Where one field of model.Config stands in config.json.

    name: theirs.
    kind: a key of KINDS; any other value is refused.
    default: what holds where config.json lacks the field, as in transformers' configuration class;
        a function of the whole config.json where it depends on other fields (it is asked where the
        field is null, too); None where there is no default, so that the field must be there.
    """

    name: str
    kind: str
    default: object = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    features: fields of model.Config that are the same in all its models.
    fields: field of model.Config -> Field. They are read in this order.
    finish: function of the fields that were read -> the fields of Config, where one follows from
        another.
    refused: theirs -> (values that we implement, what they mean). Absent is always allowed.
    prefix: stands before their tensors' names in a model with a head; some files leave it out.
    unprefixed: our modules that are named without it: the head.
    ignored: pattern of tensors, without the prefix, that are known and not needed.
    stack: path of the list of blocks.
    layer: our module in a block -> theirs.
    top: our module outside the blocks -> theirs.
    transposed: a block's matrices are stored (in, out), as Conv1D does, where nn.Linear has
        (out, in).
    fused: our modules that lie side by side in one of theirs, in this order.
    gain_offset: is added to the gain of every norm: Gemma stores the difference from 1.
    single, pair: how one text and two texts are put between special tokens, in the notation of
        tokenizers' TemplateProcessing: $A and $B are the texts, :1 is token type 1. None: the
        models of the family differ, and each one's tokenizer.json says it.
    specials: tokens that a text is never cut inside of, where tokenizer.json does not say it.
    needed: tokens without which the tokenizer cannot work.
    """

    features: dict
    fields: dict
    refused: dict
    prefix: str
    unprefixed: tuple
    ignored: str
    stack: str
    layer: dict
    top: dict
    single: str | None
    pair: str | None
    specials: tuple
    needed: tuple
    finish: Callable = dict
    transposed: bool = False
    fused: tuple = ()
    gain_offset: float = 0.0


# ------------------------------------------------------------------------------------ bert, roberta

BERT_FIELDS = {
    "vocab_size": Field("vocab_size", "size"),
    "hidden_size": Field("hidden_size", "size"),
    "num_layers": Field("num_hidden_layers", "size"),
    "num_heads": Field("num_attention_heads", "size"),
    "ffn_dim": Field("intermediate_size", "size"),
    "max_positions": Field("max_position_embeddings", "size"),
    "embed_dim": Field("hidden_size", "size"),
    "type_vocab_size": Field("type_vocab_size", "size", 2),
    "pad_token_id": Field("pad_token_id", "token id", 0),
    "layer_norm_eps": Field("layer_norm_eps", "epsilon", 1e-12),
    "activation": Field("hidden_act", "activation", "gelu"),
}
BERT = Family(
    features={
        "causal": False,
        "pre_ln": False,
        "final_norm": False,
        "embed_norm": True,
        "embed_dropout": True,
        "pooler_in_head": False,
    },
    fields=BERT_FIELDS,
    refused={
        "position_embedding_type": (("absolute", None), "positions come from a table"),
        "is_decoder": ((False, None), "every token sees every other"),
        "add_cross_attention": ((False, None), "there is one sequence"),
    },
    prefix="bert.",
    unprefixed=("classifier",),
    ignored=r"cls\..*|embeddings\.position_ids",
    stack="encoder.layer",
    layer={
        "q_proj": "attention.self.query",
        "k_proj": "attention.self.key",
        "v_proj": "attention.self.value",
        "out_proj": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "ffn_norm": "output.LayerNorm",
    },
    top={
        "word_embeddings": "embeddings.word_embeddings",
        "position_embeddings": "embeddings.position_embeddings",
        "token_type_embeddings": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    specials=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    needed=("[CLS]", "[SEP]", "[UNK]"),
)


def roberta_positions(fields):
    """Positions count from pad_token_id + 1: the table's rows before that are never used."""
    offset = fields["pad_token_id"] + 1
    positions = fields["max_positions"] - offset
    return fields | {"position_offset": offset, "max_positions": positions}


ROBERTA = dataclasses.replace(
    BERT,
    features={**BERT.features, "pooler_in_head": True},
    fields={**BERT_FIELDS, "pad_token_id": Field("pad_token_id", "token id", 1)},
    finish=roberta_positions,
    prefix="roberta.",
    unprefixed=("classifier", "pooler"),
    ignored=r"lm_head\..*|pooler\..*|embeddings\.position_ids",
    top={**BERT.top, "pooler": "classifier.dense", "classifier": "classifier.out_proj"},
    single="<s> $A </s>",
    pair="<s> $A </s> </s> $B </s>",
    specials=(*BYTE_LEVEL_SPECIALS, "<mask>"),
    needed=("<s>", "</s>"),
)


# ---------------------------------------------------------------------------------------------- opt


def opt_norms(fields):
    """With LayerNorm before each sub-layer, one more follows the last block unless removed."""
    kept = not fields["final_norm_removed"]
    fields = {name: value for name, value in fields.items() if name != "final_norm_removed"}
    return fields | {"final_norm": fields["pre_ln"] and kept}


OPT = Family(
    features={
        "causal": True,
        "embed_norm": False,
        "embed_dropout": False,
        "position_offset": 2,
        "layer_norm_eps": 1e-5,
    },
    fields={
        "vocab_size": Field("vocab_size", "size"),
        "hidden_size": Field("hidden_size", "size"),
        "num_layers": Field("num_hidden_layers", "size"),
        "num_heads": Field("num_attention_heads", "size"),
        "ffn_dim": Field("ffn_dim", "size"),
        "max_positions": Field("max_position_embeddings", "size"),
        "embed_dim": Field("word_embed_proj_dim", "size", lambda hf: hf["hidden_size"]),
        "pad_token_id": Field("pad_token_id", "token id", 1),
        "activation": Field("activation_function", "activation", "relu"),
        "pre_ln": Field("do_layer_norm_before", "switch", True),
        "final_norm_removed": Field("_remove_final_layer_norm", "switch", False),
    },
    finish=opt_norms,
    refused={
        "enable_bias": ((True,), "every linear layer has a bias"),
        "layer_norm_elementwise_affine": ((True,), "every LayerNorm has a gain and a bias"),
        "tie_word_embeddings": ((True,), "the language model's head is the embedding"),
    },
    prefix="model.",
    unprefixed=("score",),
    ignored=r"decoder\.version",
    stack="decoder.layers",
    layer={
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "out_proj": "self_attn.out_proj",
        "attn_norm": "self_attn_layer_norm",
        "fc1": "fc1",
        "fc2": "fc2",
        "ffn_norm": "final_layer_norm",
    },
    top={
        "word_embeddings": "decoder.embed_tokens",
        "position_embeddings": "decoder.embed_positions",
        "project_in": "decoder.project_in",
        "project_out": "decoder.project_out",
        "final_norm": "decoder.final_layer_norm",
        "score": "score",
    },
    single="</s> $A",
    pair="</s> $A </s> $B",
    specials=("<pad>", "</s>"),
    needed=("</s>",),
)


# --------------------------------------------------------------------------------------------- gpt2


def first_eos(hf):
    """There may be no padding token; any id does, since padding is masked and never read."""
    return next(iter(eos_ids(hf)), 0)


GPT2 = Family(
    features={
        "causal": True,
        "pre_ln": True,
        "final_norm": True,
        "embed_norm": False,
        "embed_dropout": True,
    },
    fields={
        "vocab_size": Field("vocab_size", "size"),
        "hidden_size": Field("n_embd", "size"),
        "num_layers": Field("n_layer", "size"),
        "num_heads": Field("n_head", "size"),
        "ffn_dim": Field("n_inner", "size", lambda hf: 4 * hf["n_embd"]),
        "max_positions": Field("n_positions", "size"),
        "embed_dim": Field("n_embd", "size"),
        "pad_token_id": Field("pad_token_id", "token id", first_eos),
        "layer_norm_eps": Field("layer_norm_epsilon", "epsilon", 1e-5),
        "activation": Field("activation_function", "activation", "gelu_new"),
    },
    refused={
        "scale_attn_weights": ((True,), "attention is scaled by 1 / sqrt(d / h)"),
        "scale_attn_by_inverse_layer_idx": ((False,), "and by nothing else"),
        "reorder_and_upcast_attn": ((False,), "attention stays in the model's precision"),
        "add_cross_attention": ((False, None), "there is one sequence"),
        "tie_word_embeddings": ((True,), "the language model's head is the embedding"),
    },
    prefix="transformer.",
    unprefixed=("score",),
    ignored=r"h\.\d+\.attn\.(masked_)?bias",
    stack="h",
    layer={
        "q_proj": "attn.c_attn",
        "k_proj": "attn.c_attn",
        "v_proj": "attn.c_attn",
        "out_proj": "attn.c_proj",
        "attn_norm": "ln_1",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
        "ffn_norm": "ln_2",
    },
    top={
        "word_embeddings": "wte",
        "position_embeddings": "wpe",
        "final_norm": "ln_f",
        "score": "score",
    },
    transposed=True,
    fused=("q_proj", "k_proj", "v_proj"),
    single="$A",
    pair="$A $B",
    specials=BYTE_LEVEL_SPECIALS,
    needed=("<|endoftext|>",),  # stands for an empty text
)


# ---------------------------------------------------------------------- llama and its relatives


def kv_heads(default):
    """Of num_key_value_heads: the class's default where it is absent, one for each q where null."""
    return lambda hf: hf.get("num_attention_heads") if "num_key_value_heads" in hf else default


def with_rope(hf):
    """hf with rope_theta where rope_scaling, or rope_parameters (transformers 5), has its own."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return hf if theta is None else {**hf, "rope_theta": theta}


def llama_shapes(fields):
    """LLaMA 3's scaling as the four numbers in the order of model.rotation."""
    scaling = fields["rope_scaling"] or {}
    scaled = scaling.get("rope_type", scaling.get("type")) == "llama3"
    numbers = tuple(map(float, rope_numbers(scaling, fields))) if scaled else None
    fields = {name: value for name, value in fields.items() if name != "sliding_window"}
    return fields | {"rope_scaling": numbers, "rope_theta": float(fields["rope_theta"])}


LLAMA = Family(
    features={
        "causal": True,
        "pre_ln": True,
        "final_norm": True,
        "embed_norm": False,
        "embed_dropout": False,
        "rms_norm": True,
        "bias": "none",
        "gated": True,
    },
    fields={
        "vocab_size": Field("vocab_size", "size"),
        "hidden_size": Field("hidden_size", "size"),
        "num_layers": Field("num_hidden_layers", "size"),
        "num_heads": Field("num_attention_heads", "size"),
        "num_kv_heads": Field(
            "num_key_value_heads", "size", lambda hf: hf.get("num_attention_heads")
        ),
        "head_dim": Field(
            "head_dim", "size", lambda hf: hf["hidden_size"] // hf["num_attention_heads"]
        ),
        "ffn_dim": Field("intermediate_size", "size"),
        "max_positions": Field("max_position_embeddings", "size"),
        "embed_dim": Field("hidden_size", "size"),
        "pad_token_id": Field("pad_token_id", "token id", first_eos),
        "layer_norm_eps": Field("rms_norm_eps", "epsilon", 1e-6),
        "activation": Field("hidden_act", "activation", "silu"),
        "rope_theta": Field("rope_theta", "base", 10000.0),
        "rope_scaling": Field("rope_scaling", "rope scaling", lambda hf: hf.get("rope_parameters")),
        "tied": Field("tie_word_embeddings", "switch", False),
    },
    finish=llama_shapes,
    refused={
        "attention_bias": ((False, None), "the attention's linear layers have no bias"),
        "mlp_bias": ((False, None), "the feed-forward's linear layers have no bias"),
        "pretraining_tp": ((1, None), "matrices are whole"),
        "use_sliding_window": ((False, None), "every token sees all before it"),
        "use_bidirectional_attention": ((False, None), "no token sees those after it"),
    },
    prefix="model.",
    unprefixed=("score", "lm_head"),
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    stack="layers",
    layer={
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "out_proj": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "gate_proj": "mlp.gate_proj",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
    },
    top={
        "word_embeddings": "embed_tokens",
        "final_norm": "norm",
        "lm_head": "lm_head",
        "score": "score",
    },
    single=None,
    pair=None,
    specials=(),
    needed=(),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    fields={
        **LLAMA.fields,
        "num_kv_heads": Field("num_key_value_heads", "size", kv_heads(8)),
        "sliding_window": Field("sliding_window", "no window", 4096),
    },
)

QWEN2 = dataclasses.replace(
    LLAMA,
    features={**LLAMA.features, "bias": "qkv"},
    fields={**LLAMA.fields, "num_kv_heads": Field("num_key_value_heads", "size", kv_heads(32))},
)

QWEN3 = dataclasses.replace(
    LLAMA,
    features={**LLAMA.features, "qk_norm": True},
    fields={**QWEN2.fields, "head_dim": Field("head_dim", "size", 128)},
    layer={**LLAMA.layer, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
)


def gemma_shapes(fields):
    """Embeddings times sqrt(d); "gelu", in the first config.json files, meant its tanh form."""
    if fields["activation"] == "gelu":
        fields = fields | {"activation": "gelu_new"}
    return llama_shapes(fields) | {"embed_scale": fields["hidden_size"] ** 0.5}


GEMMA = dataclasses.replace(
    LLAMA,
    fields={
        **LLAMA.fields,
        "num_kv_heads": Field("num_key_value_heads", "size", 16),
        "head_dim": Field("head_dim", "size", 256),
        "activation": Field("hidden_act", "activation", "gelu_pytorch_tanh"),
        "pad_token_id": Field("pad_token_id", "token id", lambda hf: 0),
        "tied": Field("tie_word_embeddings", "switch", True),
    },
    finish=gemma_shapes,
    gain_offset=1.0,
)

FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "opt": OPT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
}
REFUSED = {  # in every family, as Family.refused
    "quantization_config": ((None,), "weights are stored as numbers, not as codes"),
    "pruned_heads": (({}, None), "every block has all its heads"),
    "problem_type": (
        ("single_label_classification", "regression", None),
        "the loss is cross-entropy, or squared error for one label",
    ),
}


# ------------------------------------------------------------------------------------- config.json


def config_fields(hf):
    """The fields of model.Config that a Hugging Face config.json decides.

    Args:
        hf: dict, the content of config.json.

    Returns:
        dict, field of model.Config -> value.

    Raises:
        ValueError: a family or feature that is not implemented, or a value that cannot be; names
            the field, what it is, and what is allowed.
    """
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {shown(name)} is not implemented, only "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    for theirs, (allowed, meaning) in {**REFUSED, **family.refused}.items():
        if theirs in hf and hf[theirs] not in allowed:
            raise ValueError(
                f"config.json: {theirs} = {shown(hf[theirs])} is not implemented for "
                f"{name}, only {allowed[0]!r}: {meaning}"
            )
    hf = with_rope(hf)
    if family.features["causal"] and hf.get("pad_token_id") == -1:  # older files: there is none
        hf = {**hf, "pad_token_id": None}
    fields = {}
    for ours, field in family.fields.items():
        fields[ours] = read_field(hf, field, fields)
    fields = {"family": name, **family.features, **family.finish(fields)}
    if fields["causal"]:
        fields["eos_token_ids"] = eos_ids(hf)
        expected, fits = KINDS["token id"]
        for e in fields["eos_token_ids"]:
            if not fits(e, fields):
                raise ValueError(f"config.json: eos_token_id has {e}, expected {expected}")
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    if fields["max_positions"] < 1:
        raise ValueError(
            f"config.json: max_position_embeddings leaves {fields['max_positions']} positions"
        )
    return fields


def eos_ids(hf):
    """The tokens that end a text: eos_token_id is an id, a list of ids, or absent."""
    found = hf.get("eos_token_id")
    return tuple(e for e in (found if isinstance(found, list) else [found]) if type(e) is int)


def read_field(hf, field, fields):
    """One field's value, checked; fields holds those before it. Raises as config_fields."""
    value = hf.get(field.name, field.default)
    if callable(field.default) and (value is None or field.name not in hf):
        value = field.default(hf)
    expected, fits = KINDS[field.kind]
    if not fits(value, fields):
        raise ValueError(f"config.json: {field.name} is {shown(value)}, expected {expected}")
    return value
