"""LLaMA and its relatives: model.py against dense.py, and what their files say and refuse."""

import json
import math

import pytest
import safetensors.torch
import torch

import dense
import lora
import proxies
import tiny
from model import Config, load_pretrained, rotate, rotation
from support import prompts
from test_gguf import write_tokenizer

ALL = lora.SHORTCUTS["all"]


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_logits_equal_the_dense_derivation(family, head):
    """Every place adapted, the four shortcuts too; lengths beyond where the rope is scaled."""
    m = tiny.adapted(family, shortcuts=ALL, head=head).eval()
    batch = tiny.batch(m.config, lengths=(37, 4, 6))
    got, expected = m(**batch).logits, dense.logits(m, batch)
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        ours = got[i, :n] if head == "lm" else got[i]
        torch.testing.assert_close(ours, expected[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_last_layer_at_one_position_equals_all_positions(family):
    """The one query is turned by the angle of its own position."""
    m = tiny.adapted(family, shortcuts=ALL)
    batch = tiny.batch(m.config)
    mask = batch["attention_mask"].bool()
    x, read = m.embed(batch["input_ids"]), mask.sum(1) - 1
    picked = m.encode(x, mask)[torch.arange(len(mask)), read]
    torch.testing.assert_close(m.encode(x, mask, read)[:, 0], picked, rtol=0, atol=1e-12)


def test_angles_add_up():
    """By position 2, then by 3, is by 5; and a quarter turn by hand takes (1, 0) to (0, 1).

    Scores are of differences of angles: no logit says in which direction both are turned.
    """
    c = tiny.config("llama", head_dim=8, rope_theta=50.0)
    x = torch.randn(1, 2, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turns = [rotation(c, torch.tensor([[p]]), x) for p in (2, 3, 5)]
    twice = rotate(rotate(x, turns[0]), turns[1])
    torch.testing.assert_close(twice, rotate(x, turns[2]), rtol=0, atol=1e-12)
    quarter = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])  # cosines, sines
    got = rotate(torch.tensor([[[[1.0, 2.0, 0.0, 0.0]]]]), quarter)
    assert got.flatten().tolist() == [0.0, 0.0, 1.0, 2.0]


def test_frequencies_between_low_and_high_are_mixed():
    """LLaMA 3.1, by wavelengths, as its authors write it: short ones stay, long ones are cut."""
    c = tiny.config("llama", head_dim=8, rope_theta=30.0, rope_scaling=(8.0, 1.0, 4.0, 40.0))
    cos, sin = rotation(c, torch.tensor([[1]]), torch.zeros(1, dtype=torch.float64))
    expected, kinds = [], []
    for i in range(4):
        f = 30.0 ** (-i / 4)
        wavelength = 2 * math.pi / f
        smooth = (40 / wavelength - 1) / (4 - 1)
        kinds.append("short" if wavelength < 40 / 4 else "long" if wavelength > 40 else "between")
        mixed = (1 - smooth) * f / 8 + smooth * f
        expected.append({"short": f, "long": f / 8, "between": mixed}[kinds[-1]])
    assert kinds == ["short", "between", "between", "long"]
    assert torch.atan2(sin, cos).flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_angles_in_bfloat16_are_those_of_float32():
    """An angle at position 1000 has more digits than bfloat16: cosines are cut, not angles."""
    c = tiny.config("llama", head_dim=8, rope_theta=1e4)
    positions = torch.arange(1000)[None]
    for parts in zip(
        rotation(c, positions, torch.zeros(1, dtype=torch.bfloat16)),
        rotation(c, positions, torch.zeros(1, dtype=torch.float64)),
        strict=True,
    ):
        torch.testing.assert_close(parts[0].double(), parts[1], rtol=0, atol=2**-8)


# ---------------------------------------------------------------------------------- what is adapted


def test_gate_proj_is_a_place_where_there_is_a_gate():
    everywhere = lora.inject(tiny.model("llama"), lora.LINEARS, r=2)
    assert sum(name.endswith("gate_proj") for name in everywhere) == 3
    assert everywhere["layers.0.k_proj"].lora_B.shape == (2 * 4, 2)  # two key-value heads of four
    assert everywhere["layers.0.out_proj"].lora_A.shape == (2, 6 * 4)
    without = lora.inject(tiny.model("gpt2"), lora.LINEARS, r=2)
    assert len(without) == 6 * 3 and not any("gate" in name for name in without)
    with pytest.raises(ValueError, match="a gpt2 model has no gate_proj: name another target"):
        lora.inject(tiny.model("gpt2"), ["gate_proj"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("proxy", ["grad_norm", "synflow", "snip"])
def test_every_place_gets_a_score(family, proxy):
    """Of SYNFLOW too: through attention without softmax, grouped heads, and the gate."""
    m = tiny.adapted(family, shortcuts=ALL, head="lm")
    scores = proxies.score(proxy, m, [tiny.batch(m.config)])
    assert len(scores) == 3 * 7 + 3 * 4 - 1
    assert all(score > 0 for score in scores.values())


# -------------------------------------------------------------------------------------- config.json

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_config_fields_of_real_files():
    c = Config.from_hf(SMOLLM2, head="lm")
    assert (c.num_kv_heads, c.head_dim, c.rope_theta, c.tied) == (3, 64, 1e5, True)
    assert (c.eos_token_ids, c.rope_scaling, c.bias, c.qk_norm) == ((2,), None, "none", False)
    changes = {"eos_token_id": [7, 8, 9], "pad_token_id": None, "rope_scaling": LLAMA3_ROPE}
    c = Config.from_hf({**SMOLLM2, **changes})
    assert (c.eos_token_ids, c.pad_token_id) == ((7, 8, 9), 7)
    assert c.rope_scaling == (32.0, 1.0, 4.0, 8192.0)
    newer = {k: v for k, v in SMOLLM2.items() if k not in ("rope_theta", "rope_scaling")}
    for parameters, scaling in (
        ({"rope_type": "default", "rope_theta": 5e5}, None),
        ({"rope_type": "default", "rope_theta": 5e5, "factor": 1.0}, None),
        ({**LLAMA3_ROPE, "rope_theta": 5e5}, (32.0, 1.0, 4.0, 8192.0)),
    ):
        c = Config.from_hf({**newer, "rope_parameters": parameters})
        assert (c.rope_theta, c.rope_scaling) == (5e5, scaling)
    assert Config.from_hf(newer).rope_theta == 1e4
    for rope, theta in (  # the object's own comes first, as transformers has it
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 3e4, "rope_scaling": {}}, 3e4),
    ):
        assert Config.from_hf({**newer, **rope}).rope_theta == theta
    short = {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}
    found = Config.from_hf({**newer, "max_position_embeddings": 4096, "rope_scaling": short})
    assert found.rope_scaling == (32.0, 1.0, 4.0, 4096.0)
    for family in ("mistral", "qwen2", "qwen3"):
        nulls = {"model_type": family, "num_key_value_heads": None, "sliding_window": None}
        assert Config.from_hf({**SMOLLM2, **nulls}).num_kv_heads == 9
    assert Config.from_hf({**SMOLLM2, "pad_token_id": -1}).pad_token_id == 2
    pads = Config.from_hf({**SMOLLM2, "model_type": "gemma", "pad_token_id": None})
    assert pads.pad_token_id == 0
    c = Config.from_hf({**SMOLLM2, "model_type": "qwen2", "use_sliding_window": False})
    assert (c.bias, c.qk_norm) == ("qkv", False)
    c = Config.from_hf({**SMOLLM2, "model_type": "qwen3"})
    assert (c.bias, c.qk_norm, c.head_dim) == ("none", True, 128)
    assert Config.from_hf({**SMOLLM2, "model_type": "mistral", "sliding_window": None}).causal
    old = {k: v for k, v in SMOLLM2.items() if k != "tie_word_embeddings"}
    c = Config.from_hf({**old, "model_type": "gemma", "hidden_act": "gelu"})
    assert (c.activation, c.embed_scale, c.tied, c.head_dim) == ("gelu_new", 24.0, True, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "sliding_window is 4096, expected null"),
        ({"model_type": "mistral", "sliding_window": 512}, "sliding_window is 512, expected null"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        ({"attention_bias": True}, "attention_bias = True is not implemented"),
        ({"eos_token_id": 500_000, "pad_token_id": 0}, "eos_token_id has 500000, expected an id"),
        ({"eos_token_id": [2, -1], "pad_token_id": 0}, "eos_token_id has -1, expected an id below"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*expected null"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "rope_scaling is .*expected null"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling"),
        ({"rope_scaling": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_scaling is"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is .*expected null"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, "rope_scaling is"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a number above 1"),
        ({"num_key_value_heads": 4}, "num_heads 9 is not a multiple of num_kv_heads 4"),
        ({"head_dim": 5}, "head_dim is 5: rotary positions need an even one"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf({**SMOLLM2, **change})


# ------------------------------------------------------------------------------------ model folders


def llama_folder(path, m, **more):
    """Write a tiny.model as a folder under Hugging Face's names, spelt out here."""
    c, places = (
        m.config,
        {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "fc1": "mlp.up_proj",
            "fc2": "mlp.down_proj",
            "gate_proj": "mlp.gate_proj",
            "out_proj": "self_attn.o_proj",
        },
    )
    tensors = {}
    for name, p in m.state_dict().items():
        if name.startswith("layers."):
            _, i, place, kind = name.split(".")
            name = f"model.layers.{i}.{places.get(place, f'self_attn.{place}')}.{kind}"
        names = {"word_embeddings.weight": "model.embed_tokens.weight"}
        name = {**names, "final_norm.weight": "model.norm.weight"}.get(name, name)
        gain = 1 if c.family == "gemma" and name.endswith("norm.weight") else 0
        tensors[name] = (p - gain).float().contiguous()
    tensors |= more.pop("tensors", {})
    config = {
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.layer_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied,
        "eos_token_id": 3,
        "pad_token_id": 1,
    }
    if c.family == "mistral":
        config["sliding_window"] = None
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config, **more}))
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    write_tokenizer(path)
    return path


@pytest.mark.parametrize("family", [f for f in tiny.CAUSAL if f != "llama3"])
def test_a_folder_gives_the_model_that_was_written(tmp_path, family):
    m = tiny.model(family, dtype=torch.float32, head="lm")
    loaded, tokenizer = load_pretrained(str(llama_folder(tmp_path / "m", m)), head="lm")
    batch = tiny.batch(m.config)
    torch.testing.assert_close(loaded(**batch).logits, m(**batch).logits, rtol=0, atol=1e-5)
    assert loaded.head == () and loaded.config.eos_token_ids == (3,)
    assert tokenizer.encode("ab").ids == [4, 5]


def test_heads_tied_and_not(tmp_path):
    """A copy of a tied head is left out; another one, or an untied one missing, is refused."""
    tied = tiny.model("llama", dtype=torch.float32, head="lm")
    embedding = tied.word_embeddings.weight.detach()
    copy = {"lm_head.weight": embedding.clone()}
    loaded, _ = load_pretrained(str(llama_folder(tmp_path / "1", tied, tensors=copy)), head="lm")
    assert not hasattr(loaded, "lm_head")
    other = {"lm_head.weight": embedding + 1}
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
        load_pretrained(str(llama_folder(tmp_path / "2", tied, tensors=other)), head="lm")
    folder = str(llama_folder(tmp_path / "3", tied, tie_word_embeddings=False))
    with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
        load_pretrained(folder, head="lm")
    untied = tiny.model("qwen2", dtype=torch.float32, head="lm")
    folder = str(llama_folder(tmp_path / "4", untied))
    assert load_pretrained(folder, head="lm")[0].lm_head.weight.shape == (90, 12)
    classifier, _ = load_pretrained(folder, num_labels=3)  # the language model's head is left out
    assert classifier.head == classifier.fresh == ("score",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_attention_heads": 4},
            r"q_proj.weight has shape \(24, 12\), config.json says num_att",
        ),
        (
            {"num_key_value_heads": 3},
            r"k_proj.weight has shape \(8, 12\), config.json says num_key",
        ),
        ({"num_hidden_layers": 4}, "there are 3 layers, config.json says 4"),
        ({"model_type": "qwen3"}, r"q_norm.weight is missing"),
        ({"model_type": "qwen2"}, r"q_proj.bias is missing"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    folder = llama_folder(tmp_path / "m", tiny.model("llama", head="lm"), **change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(folder), head="lm")


def test_generation_config_names_the_ends(tmp_path):
    folder = llama_folder(tmp_path / "m", tiny.model("llama", head="lm"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert load_pretrained(str(folder), head="lm")[0].config.eos_token_ids == (3, 5)


def test_special_tokens_that_another_file_names(tmp_path):
    """special_tokens_map.json says what tokenizer_config.json does not."""
    folder = llama_folder(tmp_path / "m", tiny.model("llama", head="lm"))
    options = {"chat_template": "{{ bos_token }}?", "eos_token": "b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    specials = {"bos_token": {"content": "a"}, "eos_token": "c"}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    form, found = prompts.read_form(folder)
    assert (found["bos_token"], found["eos_token"]) == ("a", "b")
    assert prompts.render(form[0], "x", form[1]) == "a?"


def test_only_tokenizer_json_is_read(tmp_path):
    """vocab.json and merges.txt do not say how text is cut, nor what stands before it."""
    folder = llama_folder(tmp_path / "m", tiny.model("llama", head="lm"))
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    (folder / "merges.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_pretrained(str(folder), head="lm")
