"""PEFT folders without PEFT: what is refused by name, what inspect notices, what an export holds.

The files themselves are checked against PEFT in tests/peers/test_peft_files.py.
"""

import json
import math
import re

import pytest
import safetensors.torch
import torch

import lora
import tiny
import train
from model import load_pretrained
from relatives.single_ranks import keep_ranks
from support import adapter_file, run_folder
from test_causal import llama_folder
from tools.peft import __main__ as tool
from tools.peft import commands, config, reading, writing


def pairs_of(model):
    return {
        n: writing.Pair(a.lora_A.detach(), a.lora_B.detach(), a.scaling)
        for n, a in lora.adapters(model).items()
    }


@pytest.fixture
def model():
    return tiny.model("bert", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    """A good adapter: q and fc1 of three layers, ranks 1 … 3, a classifier."""
    adapted = tiny.adapted("bert", targets=("q_proj", "fc1"), dtype=torch.float32)
    for i, layer in enumerate(lora.adapters(adapted).values()):
        keep_ranks(layer, list(range(1 + i % 3)))
    head = {f"classifier.{n}": p.detach() for n, p in adapted.classifier.named_parameters()}
    config, tensors = writing.peft_files(pairs_of(adapted), head, "bert", "base")
    writing.write_peft(tmp_path / "adapter", config, tensors)
    return tmp_path / "adapter"


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_a_good_folder_comes_back_as_it_went(folder, model):
    pairs, head = reading.read(folder, model)
    source = tiny.adapted("bert", targets=("q_proj", "fc1"), dtype=torch.float32)
    for i, (name, layer) in enumerate(lora.adapters(source).items()):
        assert pairs[name].r == 1 + i % 3 and pairs[name].scaling == pytest.approx(5 / 3)
        assert torch.equal(pairs[name].lora_A, layer.lora_A[: 1 + i % 3])
    assert torch.equal(head["classifier.weight"], source.classifier.weight)
    layers = reading.put(model, pairs, head)
    batch = tiny.batch(model.config)
    dense = {n: p.scaling * p.lora_B.double() @ p.lora_A.double() for n, p in pairs.items()}
    for name, layer in layers.items():
        assert writing.Pair(layer.lora_A, layer.lora_B, layer.scaling).norm() == pytest.approx(
            dense[name].norm().item()
        )
    reference = tiny.model("bert", dtype=torch.float64)
    with torch.no_grad():
        for name, delta in dense.items():
            reference.get_submodule(name).weight += delta
        got, expected = model.eval()(**batch).logits, reference.eval()(**batch).logits
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_same_content_gives_the_same_bytes(folder, tmp_path):
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), {}
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    backwards = dict(reversed(tensors.items()))
    writing.write_peft(tmp_path / "again", dict(reversed(config.items())), backwards)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert config["target_modules"] == sorted(config["target_modules"])


def test_padding_keeps_the_product(folder):
    pairs = reading.read_folder(folder)[1]
    fat = writing.padded(pairs)
    for name, pair in pairs.items():
        assert fat[name].r == 3 and fat[name].scaling == 1
        expected = pair.scaling * pair.lora_B @ pair.lora_A
        torch.testing.assert_close(fat[name].lora_B @ fat[name].lora_A, expected)


def test_gpt2_is_fused_exactly():
    model = tiny.adapted("gpt2", targets=("q_proj", "v_proj", "fc1"))
    layer = lora.adapters(model)["layers.1.v_proj"]
    layer.scaling = 0.3  # another scale than its neighbour's
    pairs = pairs_of(model)
    fused = writing.fuse_gpt2(pairs)
    assert set(fused) == {f"layers.{i}.{p}" for i in range(3) for p in ("q_proj", "fc1")}
    whole = fused["layers.1.q_proj"]
    q, v = pairs["layers.1.q_proj"], pairs["layers.1.v_proj"]
    delta = whole.scaling * whole.lora_B @ whole.lora_A  # (3 d, d)
    torch.testing.assert_close(delta[:12], q.scaling * q.lora_B @ q.lora_A)
    torch.testing.assert_close(delta[24:], 0.3 * v.lora_B @ v.lora_A)
    assert not delta[12:24].any()


CAUSAL_PATHS = {  # our places -> modules of LlamaForCausalLM and its relatives, spelt out here
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_names_and_task_of_a_causal_family(family, head):
    """Seven places under their names; a score is saved, a language model's head is not."""
    m = tiny.adapted(family, head=head, dtype=torch.float32)
    parameters = {n: p.detach() for n, p in lora.trainable(m).items() if n == "score.weight"}
    config, tensors = writing.peft_files(pairs_of(m), parameters, family, "base")
    expected = {}
    for name, layer in lora.adapters(m).items():
        _, i, place = name.split(".")
        path = f"base_model.model.model.layers.{i}.{CAUSAL_PATHS[place]}"
        expected |= {f"{path}.lora_A.weight": layer.lora_A, f"{path}.lora_B.weight": layer.lora_B}
    if head == "classification":
        expected["base_model.model.score.weight"] = m.score.weight
    assert tensors.keys() == expected.keys() and len(expected) == 42 + (head == "classification")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    kind = ("CAUSAL_LM", None) if head == "lm" else ("SEQ_CLS", ["score"])
    assert (config["task_type"], config["modules_to_save"]) == kind


def test_a_language_models_adapter_comes_back_through_the_command(tmp_path, capsys):
    """Ranks and scales that differ; it loads into a language model, and no task is evaluated."""
    m = tiny.model("llama", dtype=torch.float32, head="lm")
    base, folder, back = llama_folder(tmp_path / "m", m), tmp_path / "adapter", tmp_path / "back"
    lora.inject(m, lora.LINEARS, r=3, lora_alpha=5)
    tiny.randomise([a.lora_B for a in lora.adapters(m).values()], 1)
    for i, layer in enumerate(lora.adapters(m).values()):
        keep_ranks(layer, list(range(1 + i % 3)))
        layer.scaling *= 1 + i % 2
        layer.lora_alpha = layer.scaling * layer.r
    batch = tiny.batch(m.config)
    writing.write_peft(folder, *writing.peft_files(pairs_of(m), {}, "llama", "base"))
    given = ["import", str(folder), str(back), "--model", str(base)]
    assert tool.main([*given, "--task", "mrpc"]) == 2
    assert "holds no head: there is nothing to evaluate on mrpc" in capsys.readouterr().err
    assert not back.exists() and tool.main(given) == 0
    fresh, _ = load_pretrained(str(base), head="lm")
    lora.load_adapter(fresh, back)
    torch.testing.assert_close(fresh(**batch).logits, m(**batch).logits, rtol=0, atol=1e-5)
    assert tool.main(["inspect", str(folder), "--model", str(base)]) == 0


def test_what_comes_in_loads_again_or_is_refused(tmp_path, capsys):
    """A head that the folder lacks is stored as drawn, and said; one that the base has is none."""
    base = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    given = ["--model", str(base), "--task", "mrpc", "--data-dir", str(task)]
    adapted = tiny.adapted("bert", targets=("q_proj",), dtype=torch.float32, num_layers=2)
    pairs, folder = pairs_of(adapted), tmp_path / "adapter"
    head = {f"classifier.{n}": p.detach() for n, p in adapted.classifier.named_parameters()}
    writing.write_peft(folder, *writing.peft_files(pairs, head, "bert", "base"))
    assert tool.main(["import", str(folder), str(tmp_path / "whole"), *given[:2]]) == 0
    assert "stored as drawn" not in capsys.readouterr().out
    change_config(folder, layers_to_transform=[1])  # PEFT does not ask it of a full path
    assert tool.main(["inspect", str(folder), "--model", str(base)]) == 0
    change_config(folder, layers_to_transform=None)
    change_tensors(folder, lambda t: [t.pop(n) for n in [*t] if "classifier" in n])
    change_config(folder, modules_to_save=None)
    capsys.readouterr()
    assert tool.main(["import", str(folder), str(tmp_path / "drawn"), *given[:2]]) == 0
    said = capsys.readouterr().out
    assert "not in the folder, stored as drawn: classifier.bias, classifier.weight" in said
    for name in ("whole", "drawn"):
        fresh, _ = load_pretrained(str(base), num_labels=3 if name == "whole" else 2)
        assert len(lora.load_adapter(fresh, tmp_path / name)) == len(pairs)

    def with_pooler(t):
        t["base_model.model.bert.pooler.dense.weight"] = torch.ones(12, 12)
        t["base_model.model.bert.pooler.dense.bias"] = torch.ones(12)
        t |= {"base_model.model.classifier.weight": torch.ones(2, 12)}
        t |= {"base_model.model.classifier.bias": torch.ones(2)}

    change_tensors(folder, with_pooler)
    change_config(folder, modules_to_save=["classifier", "pooler"])
    assert tool.main(["import", str(folder), str(tmp_path / "pooler"), *given]) == 2
    assert "brings pooler.bias, which" in capsys.readouterr().err


def test_the_base_of_an_export_is_named_as_what_it_is(tmp_path, monkeypatch):
    """smollm2-q4 is on no hub: its weights are not SmolLM2's, and no id stands for them."""
    base = llama_folder(tmp_path / "m", tiny.model("llama", head="lm"))
    monkeypatch.setattr(writing.download, "model_folder", lambda name: base)
    found = {}
    there = tmp_path / "a@b"
    there.mkdir()
    for name in ("minilm", "smollm2", "smollm2-q4", "some/name", "some/name@0a1", str(there)):
        rows = {"layers.0.q_proj.lora_B": torch.ones(24, 2)}
        run = made_up_run(tmp_path / name.replace("/", "-"), {"model": name}, rows)
        config = writing.export(run, tmp_path / f"{run.name}-out")
        found[name] = config["base_model_name_or_path"], config["revision"]
    assert found == {
        "minilm": (
            "sentence-transformers/all-MiniLM-L6-v2",
            writing.download.REVISIONS["sentence-transformers/all-MiniLM-L6-v2"],
        ),
        "smollm2": (
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            writing.download.REVISIONS.get("HuggingFaceTB/SmolLM2-135M-Instruct"),
        ),
        "smollm2-q4": (None, None),
        "some/name": ("some/name", None),
        "some/name@0a1": ("some/name", "0a1"),
        str(there): (str(there), None),
    }


HUGE = 10**400  # a JSON integer beyond every float


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("peft_type", ["VERA", "adalora", None, 1, ["LORA"]], "'LORA' or 'ADALORA'"),
        ("r", [0, -1, 2.0, True, "2", None, [], math.nan], "an integer, 1 or more"),
        (
            "lora_alpha",
            [0, -1, True, "x", None, [], math.nan, math.inf, -math.inf, HUGE],
            "a finite number above 0",
        ),
        (
            "rank_pattern",
            [[], {"a": 0}, {"a": -1}, {"a": 1.5}, {"a": True}, {"a": [True]}, {"(": 2}],
            "regular expressions with integers, 1 or more",
        ),
        (
            "alpha_pattern",
            [{"a": 0}, {"a": True}, {"a": math.nan}, {"a": math.inf}, {"a": HUGE}, {"(?i)a": 2}],
            "regular expressions with finite numbers > 0",
        ),
        ("use_rslora", [1, "false", None], "true or false"),
        ("target_modules", [None, "*", 3, [3], {}], "a list of names, or a regular expression"),
        ("exclude_modules", ["*", [3], "a{99999999999}"], "a list of names, or a regular"),
        ("modules_to_save", ["classifier", [1]], "a list of names"),
        ("layers_to_transform", [True, "1", [0.5]], "an integer, or a list of integers"),
        ("bias", ["all", None], "'none'"),
        ("init_lora_weights", ["pissa_niter_4", "olora", "mica"], "change the base weights"),
    ],
)
def test_a_field_of_the_config_is_checked_before_anything_is_built(
    folder, model, field, values, allowed
):
    """NaN and Infinity are numbers to Python's JSON, and true is 1."""
    for value in values:
        change_config(folder, **{field: value})
        for read in (lambda: reading.read(folder, model), lambda: commands.inspect(folder)):
            with pytest.raises(ValueError, match=f"{field} is .*, allowed: .*{allowed}"):
                read()


def test_fields_that_may_change_the_function_are_refused_unless_empty(folder):
    for field in ("lora_bias", "layer_replication", "target_parameters", "new_in_1.0"):
        for value in (False, None, [], {}):
            change_config(folder, **{field: value})
            assert commands.inspect(folder)[1]
        change_config(folder, **{field: [1]})
        with pytest.raises(ValueError, match=rf"{field} = \[1\] is not supported"):
            commands.inspect(folder)
        change_config(folder, **{field: None})


def test_absent_fields_are_pefts_defaults(folder):
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    least = {name: content[name] for name in ("peft_type", "target_modules")}
    path.write_text(json.dumps(least))
    got = config.read_config(path)
    assert (got["r"], got["lora_alpha"], got["use_rslora"]) == (8, 8, False)
    for name in least:
        path.write_text(json.dumps({n: v for n, v in least.items() if n != name}))
        with pytest.raises(ValueError, match=f"{name} is missing"):
            config.read_config(path)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def zero_rank(tensors):
    tensors[f"{QUERY}.lora_A.weight"] = torch.ones(0, 12)
    tensors[f"{QUERY}.lora_B.weight"] = torch.ones(12, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict.clear, "has no lora_A and lora_B"),
        (drop(f"{QUERY}.lora_B.weight"), "self.query has no lora_B"),
        (put(f"{QUERY}.lora_A.weight", torch.ones(2, 12)), "rank 1 by the config, lora_A \\(2, 12"),
        (put(f"{QUERY}.lora_E.weight", torch.ones(2)), "unknown tensor .*lora_E"),
        (put("something", torch.ones(2)), "unknown tensor something"),
        (put(f"{QUERY}.lora_B.weight", torch.full((12, 1), math.nan)), "is not a tensor of finite"),
        (put(f"{QUERY}.lora_B.weight", torch.ones(12, 1).double() * 1e300), "tensor of finite"),
        (put(f"{QUERY}.lora_B.weight", torch.ones(12, 1, dtype=torch.int8)), "tensor of finite"),
        (put(f"{QUERY}.lora_B.weight", torch.full((12, 1), 3e38)), "makes delta W overflow"),
        (put(f"{QUERY}.lora_B.weight", torch.ones(12)), r"rank 1 by the config, .*\(12,\)"),
        (zero_rank, r"rank 1 by the config, lora_A \(0, 12\), lora_B \(12, 0\)"),
        (
            drop("base_model.model.classifier.bias"),
            "classifier.bias is in modules_to_save and has no tensor",
        ),
        (
            put("base_model.model.bert.pooler.dense.weight", torch.ones(12, 12)),
            "has a tensor and is not in modules_to_save",
        ),
    ],
)
def test_tensors_that_disagree_with_the_config(folder, model, change, message, capsys):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        reading.read(folder, model)
    only_the_model_tells = "classifier.bias" in message
    assert tool.main(["inspect", str(folder)]) == (0 if only_the_model_tells else 1)
    assert ("DISAGREES" in capsys.readouterr().out) != only_the_model_tells


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {}}, "rank 3 by the config, lora_A \\(1, 12\\)"),
        ({"target_modules": ["query"]}, "intermediate.dense has tensors and is not in target"),
        ({"exclude_modules": ["query"]}, "query has tensors and is in exclude_modules"),
        (
            {"target_modules": ["query", "intermediate.dense"], "layers_to_transform": [1]},
            "0.* has tensors and is not in layers_to_transform",
        ),
        ({"target_modules": ["query", "intermediate.dense", "typo"]}, "'typo' has no tensors"),
    ],
)
def test_config_that_disagrees_with_the_tensors(folder, model, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        reading.read(folder, model)
    assert not commands.inspect(folder)[1]


def test_modules_that_the_model_has_and_the_file_lacks(folder, model):
    """Only the model can tell: 'query' has tensors in two of three layers."""
    gone = [f"{QUERY.replace('layer.0', 'layer.2')}.lora_{x}.weight" for x in "AB"]
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in gone])
    change_config(folder, target_modules=["query", "intermediate.dense"])
    with pytest.raises(ValueError, match=r"layer.2.attention.self.query is a target and has no"):
        reading.read(folder, model)
    change_config(folder, exclude_modules=["layer.2.attention.self.query"])
    assert len(reading.read(folder, model)[0]) == 5


OTHER_MODELS = {  # what differs -> what is said
    "wider": ({"hidden_size": 24}, r"query: delta W is \(12, 12\), the layer is \(24, 24\)"),
    "another FFN": ({"intermediate_size": 28}, r"dense: delta W is \(20, 12\), .* \(28, 12\)"),
    "fewer layers": ({"num_hidden_layers": 2}, r"layer.2.* is no layer that we adapt in a bert"),
    "another family": ({"model_type": "roberta"}, "is no layer that we adapt in a roberta model"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_folder_for_another_model(folder, tmp_path, kind, capsys):
    """inspect --model sees it from shapes alone: the model's folder has no weights."""
    changes, message = OTHER_MODELS[kind]
    base = tmp_path / "base"
    base.mkdir()
    base_config = {**tiny.BERT_CONFIG, "num_hidden_layers": 3}
    (base / "config.json").write_text(json.dumps(base_config))
    argv = ["inspect", str(folder), "--model", str(base)]
    assert tool.main(argv) == 0
    assert "DISAGREES" not in capsys.readouterr().out
    (base / "config.json").write_text(json.dumps({**base_config, **changes}))
    assert tool.main(argv) == 1
    assert re.search(f"DISAGREES: .*{message}", capsys.readouterr().out)
    assert tool.main(argv[:2]) == 0  # without a model all is well
    with pytest.raises(ValueError, match=message):
        reading.read(folder, reading.shapes_of(str(base), 3))


def test_only_the_input_width_is_wrong(folder, model):
    def change(tensors):
        name = f"{QUERY}.lora_A.weight"
        tensors[name] = torch.ones(len(tensors[name]), 13)

    change_tensors(folder, change)
    assert commands.inspect(folder)[1]
    with pytest.raises(ValueError, match=r"query: delta W is \(12, 13\), the layer is \(12, 12\)"):
        reading.read(folder, model)


def test_a_head_for_another_number_of_labels(folder):
    assert reading.labels_of(reading.read_folder(folder)[2]) == 3
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 12\), the model's is \(5, 12"):
        reading.read(folder, tiny.model("bert", num_labels=5))


def test_nothing_is_drawn_from_the_callers_generator(folder, model):
    pairs, head = reading.read(folder, model)
    before = torch.get_rng_state()
    reading.put(model, pairs, head)
    assert torch.equal(torch.get_rng_state(), before)


def test_rslora_is_only_a_scale(folder, model):
    change_config(folder, use_rslora=True)
    pairs, _ = reading.read(folder, model)
    assert pairs["layers.1.q_proj"].r == 3
    assert pairs["layers.1.q_proj"].scaling == pytest.approx(5 / 3**0.5)


def test_pattern_keys_match_as_pefts_do():
    """The truth table of peft.utils.other.get_pattern_key."""
    path = "model.decoder.layers.11.fc1"
    hits = ["fc1", "11.fc1", "layers.11.fc1", path, f"^{path}", r"layers\.\d+\.fc1", ".*fc1"]
    misses = ["1.fc1", "layers.1.fc1", "fc", "^fc1", f"base_model.model.{path}"]
    for key in [*hits, "fc1|fc2", *misses]:
        assert (config.pattern_value({key: 7}, path, 0) == 7) == (key not in misses), key


# ------------------------------------------------------------------------------------------ AdaLoRA

KEPT = {"query": [True, False, True], "value": [False, False, False]}  # of block 0; block 1: all


@pytest.fixture
def adalora(tmp_path):
    """An AdaLoRA folder as PEFT writes it: q and v of two blocks, init_r 3, some ranks dropped."""
    rng, folder = torch.Generator().manual_seed(1), tmp_path / "adalora"
    tensors, masks = {}, {}
    for i in range(2):
        for place in ("query", "value"):
            path = f"bert.encoder.layer.{i}.attention.self.{place}"
            kept = KEPT[place] if i == 0 else [True] * 3
            masks |= {f"{path}.lora_E": kept} if i == 0 else {}
            for key, shape in (
                ("A", (sum(kept), 12)),
                ("B", (12, sum(kept))),
                ("E", (sum(kept), 1)),
            ):
                name = f"{writing.ROOT}{path}.lora_{key}"
                tensors[name] = torch.randn(shape, generator=rng)
    content = {"peft_type": "ADALORA", "init_r": 3, "r": 8, "target_r": 1, "lora_alpha": 5}
    content |= {"target_modules": ["query", "value"], "layers_to_transform": [0, 1]}
    content |= {"rank_pattern": masks, "tinit": 2, "tfinal": 4, "total_step": 10, "beta1": 0.85}
    writing.write_peft(folder, content, tensors)
    return folder


def test_adalora_comes_in_as_ordinary_pairs_of_what_it_kept(adalora, model, capsys):
    pairs, _ = reading.read(adalora, model)
    ranks = {name: pair.r for name, pair in pairs.items()}
    assert ranks == {"layers.0.q_proj": 2, "layers.1.q_proj": 3, "layers.1.v_proj": 3}
    tensors = safetensors.torch.load_file(adalora / "adapter_model.safetensors")
    a, b, e = (tensors[f"{QUERY}.lora_{key}"].double() for key in "ABE")
    got = pairs["layers.0.q_proj"]
    assert got.scaling == 5 / 3.00001  # of init_r, not of the two ranks that are left
    expected = 5 / 3.00001 * (b * e[:, 0]) @ a
    delta = got.scaling * got.lora_B.double() @ got.lora_A.double()
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
    assert tool.main(["inspect", str(adalora)]) == 0
    out = capsys.readouterr().out
    (line,) = [x for x in out.splitlines() if "layer.0.attention.self.query" in x]
    assert line.split()[1:4] == ["2", "5", "1.667"]


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("init_r", [0, True, None, 2.5], "an integer, 1 or more"),
        ("use_dora", [True, 1], "false: AdaLoRA has no DoRA"),
        (
            "rank_pattern",
            [[], {"x.lora_E": 2}, {"x.lora_E": [1, 0]}, {"x": [True]}],
            "lists of true and false, by paths that end in .lora_E",
        ),
        ("alpha_pattern", [{"a": 0}], "regular expressions with finite numbers > 0"),
    ],
)
def test_a_field_of_adalora_is_checked(adalora, model, field, values, allowed):
    for value in values:
        change_config(adalora, **{field: value})
        with pytest.raises(ValueError, match=f"{field} is .*, allowed: {allowed}"):
            reading.read(adalora, model)


def test_the_schedule_of_adalora_is_no_field_of_lora(folder):
    change_config(folder, target_r=2)
    with pytest.raises(ValueError, match="target_r = 2 is not supported"):
        commands.inspect(folder)


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        ({"init_r": 4}, dict.copy, "query: init_r is 4, and its rank_pattern of 3"),
        ({"rank_pattern": None}, dict.copy, r"query: rank 3 by the config, lora_A \(2, 12\)"),
        ({}, drop(f"{QUERY}.lora_E"), "self.query has no lora_E"),
        ({}, put(f"{QUERY}.lora_E", torch.ones(2)), r"rank 2 by the config, .*lora_E \(2,\)"),
        ({}, put(f"{QUERY}.lora_E", torch.full((2, 1), 1e38)), "makes delta W overflow"),
        ({}, put(f"{QUERY}.lora_A.weight", torch.ones(2, 12)), "unknown tensor .*lora_A.weight"),
        ({"init_r": 10**12, "rank_pattern": {}}, dict.copy, "rank 1000000000000 by the config"),
        (
            {"rank_pattern": {"bert.encoder.layer.7.attention.self.query.lora_E": [True] * 3}},
            dict.copy,
            "layer.7.attention.self.query.lora_E is in rank_pattern and has no tensor",
        ),
    ],
)
def test_an_adalora_folder_that_disagrees_with_itself(adalora, model, changes, change, message):
    change_config(adalora, **changes)
    change_tensors(adalora, change)
    with pytest.raises(ValueError, match=message):
        reading.read(adalora, model)
    assert not commands.inspect(adalora)[1]


# ------------------------------------------------------------------------------------------ a table


def test_inspect_prints_the_table(folder, capsys):
    assert tool.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    pair = reading.read_folder(folder)[1]["bert.encoder.layer.1.attention.self.query"]
    norm = (pair.scaling * pair.lora_B @ pair.lora_A).norm().item()
    (line,) = [x for x in out.splitlines() if "layer.1.attention.self.query" in x]
    assert line.split()[1:] == ["3", "5", "1.667", "72", f"{norm:.4g}"]
    assert "6 modules, 336 parameters; head: classifier.bias, classifier.weight" in out


def test_command_line(tmp_path, capsys, monkeypatch):
    """A run, out, in again with its metric; and what is refused."""
    base = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    run, adapter, back = tmp_path / "run", tmp_path / "adapter", tmp_path / "back"
    flags = f"--task mrpc --data-dir {task} --model {base} --r 2 --epochs 1 --batch-size 5"
    common = [*flags.split(), "--lr", "0.05", "--device", "cpu"]
    assert train.main([*common, "--preset", "lora", "--out", str(run)]) == 0
    assert tool.main(["export", str(run), str(adapter)]) == 0
    assert tool.main(["export", str(run), str(adapter)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    given = ["--model", str(base), "--data-dir", str(task)]
    assert tool.main(["import", str(adapter), str(back), *given]) == 2
    assert "--data-dir has no effect without --task" in capsys.readouterr().err
    assert not back.exists()
    given += ["--task", "mrpc"]
    assert tool.main(["import", str(adapter), str(back), *given]) == 0
    last = run_folder.read_log(run)[-1]
    metric = f"accuracy {last['accuracy']:.4f}, f1 {last['f1']:.4f}"
    assert f"4 modules, 192 parameters\n{metric}\n" in capsys.readouterr().out
    expected = safetensors.torch.load_file(run / "adapter.safetensors")
    got = safetensors.torch.load_file(back / "adapter.safetensors")
    assert expected.keys() == got.keys() and all(torch.equal(got[n], expected[n]) for n in got)

    shortcuts = tmp_path / "shortcuts"
    dead = ["--preset", "lora", "--shortcuts", "all", "--out", str(shortcuts)]
    monkeypatch.setattr(train, "learning_rate", lambda *_: 0.0)
    assert train.main([*common, *dead]) == 0
    refused = tmp_path / "refused"
    assert tool.main(["export", str(shortcuts), str(refused)]) == 2
    assert "7 shortcuts are on, all zero: --drop-shortcuts" in capsys.readouterr().err
    assert not refused.exists()
    assert tool.main(["export", str(shortcuts), str(refused), "--drop-shortcuts"]) == 0
    assert len(reading.read_folder(refused)[1]) == 4
    assert tool.main(["inspect", str(tmp_path)]) == 2
    assert "is no PEFT adapter" in capsys.readouterr().err


def made_up_run(folder, flags=(), tensors=(), about=None):
    """A run folder of one module of rank 2, with changes; about: the metadata in its adapter."""
    folder.mkdir()
    given = {"model": "base", "lora_dropout": 0.0, "shortcuts": "none", "shortcut_norm": "none"}
    given |= dict(flags)
    run_folder.write_json(folder / "config.json", {"flags": given})
    name = "layers.0.q_proj"
    content = {f"{name}.lora_A": torch.ones(2, 12), f"{name}.lora_B": torch.ones(12, 2)}
    content |= dict(tensors)
    about = {name: {"r": 2, "scaling": 0.5, "enabled": True}} if about is None else about
    adapter_file.write(folder, content, about, given["shortcut_norm"])
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"about": {"layers.1.q_proj": {"r": 2, "scaling": 1, "enabled": True}}},
            "has no layers.1.q_proj.lora_A, layers.1.q_proj.lora_B",
        ),
        ({"about": {"layers.0.q_proj": {"enabled": True}}}, "is no adapter of this program"),
        ({"about": [1]}, "is no adapter of this program"),
        ({"tensors": {"layers.0.q_proj.lora_B": torch.ones(12, 3)}}, "do not multiply"),
        ({"tensors": {"layers.0.q_proj.lora_B": torch.ones(12)}}, "do not multiply"),
        ({"tensors": {"layers.0.q_proj.lora_B": torch.full((12, 2), math.nan)}}, "is not finite"),
        ({"flags": {"shortcuts": "all", "shortcut_norm": "reuse"}}, "LayerNorms that no transf"),
    ],
)
def test_a_run_that_does_not_export_is_one_line(tmp_path, changes, message, capsys):
    run = made_up_run(tmp_path / "run", **changes)
    assert tool.main(["export", str(run), str(tmp_path / "out"), "--keep-shortcuts"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


ELSEWHERE = {f"{n}.lora_{k}": torch.ones(2, 2) for n in ("foo", "layers.9.q_proj") for k in "AB"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tensors": {"classifier.weight": torch.full((2, 12), math.nan)}},
            "is not a tensor of finite",
        ),
        ({"tensors": {"classifier.weight": torch.ones(2, 11)}}, "the model's is (2, 12)"),
        ({"tensors": {"score.weight": torch.ones(2, 12)}}, "'score.weight', which no bert model"),
        (
            {"tensors": {"layers.0.q_proj.lora_A": torch.ones(2, 11)}},
            "delta W is (12, 11), the layer is (12, 12)",
        ),
        ({"tensors": ELSEWHERE, "about": "foo"}, "'foo', which no bert model has"),
        ({"tensors": ELSEWHERE, "about": "layers.9.q_proj"}, "is no layer that we adapt in a bert"),
        ({"family": "t5"}, "is of family 't5', which is not known"),
        ({"flags": {"model": 5}}, "model is 5, no name"),
        ({"flags": {"model": None}}, "model is None, no name"),
    ],
)
def test_what_is_not_of_the_runs_model_is_not_exported(tmp_path, changes, message, capsys):
    """Nothing is written: neither a NaN nor a name that PEFT would drop in silence."""
    base = tiny.bert_folder(tmp_path / "base")
    (base / "config.json").write_text(
        json.dumps({**tiny.BERT_CONFIG, "model_type": changes.get("family", "bert")})
    )
    flags = {"model": str(base), **changes.get("flags", {})}
    about = changes.get("about")
    about = about and {about: {"r": 2, "scaling": 0.5, "enabled": True}}
    run = made_up_run(tmp_path / "run", flags, changes.get("tensors", {}), about)
    assert tool.main(["export", str(run), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "run"]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_shortcuts_that_no_model_has_a_place_for_stay_at_home(
    tmp_path, monkeypatch, family, capsys
):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": family}))
    monkeypatch.setattr(writing.download, "model_folder", lambda name: base)
    run = made_up_run(tmp_path / "run")
    out = str(tmp_path / "out")
    assert tool.main(["export", str(run), out, "--keep-shortcuts"]) == 2
    assert f"a {family} model has no place for shortcuts" in capsys.readouterr().err
    assert tool.main(["export", str(run), out, "--keep-shortcuts", "--drop-shortcuts"]) == 2
    error = capsys.readouterr().err
    assert "--drop-shortcuts: not allowed with" in error and error.count("\n") == 1


def test_a_run_of_a_version_without_a_flag(tmp_path):
    run = made_up_run(tmp_path / "run")
    run_folder.write_json(run / "config.json", {"flags": {"model": "base", "shortcuts": "none"}})
    with pytest.raises(ValueError, match=r"has no flag lora_dropout, shortcut_norm$"):
        writing.export(run, tmp_path / "out")


def test_pickled_code_is_not_executed(folder, model):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was executed",))

    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"holds code \(\S+\), refused"):
        reading.read(folder, model)
