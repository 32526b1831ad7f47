"""PEFT folders without PEFT: what is refused by name, what inspect notices, what an export holds.

The files themselves are checked against PEFT in tests/peers/test_peft_files.py.
"""

import json
import math

import pytest
import safetensors.torch
import torch

import lora
import tiny
import train
from support import run_folder
from tools.peft import __main__ as peft_io
from tools.peft import reading, writing


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
        layer.keep_ranks(list(range(1 + i % 3)))
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA', only 'LORA'"),
        *[({field: True}, f"{field} = True is not supported") for field in reading.REFUSED],
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base weights"),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a positive number"),
        ({"rank_pattern": {"a": [True]}}, "rank_pattern is"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has '\\(', no regular expression"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": "*"}, "target_modules is '\\*', no regular expression"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(folder, model, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        reading.read(folder, model)
    with pytest.raises(ValueError, match=message):
        peft_io.inspect(folder)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{QUERY}.lora_B.weight"), "self.query has no lora_B"),
        (put(f"{QUERY}.lora_A.weight", torch.ones(2, 12)), "rank 1 by the config, lora_A \\(2, 12"),
        (put(f"{QUERY}.lora_E.weight", torch.ones(2)), "unknown tensor .*lora_E"),
        (put("something", torch.ones(2)), "unknown tensor something"),
        (put(f"{QUERY}.lora_B.weight", torch.full((12, 1), math.nan)), "is not a tensor of finite"),
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
    assert peft_io.main(["inspect", str(folder)]) == (0 if only_the_model_tells else 1)
    assert ("DISAGREES" in capsys.readouterr().out) != only_the_model_tells


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {}}, "rank 3 by the config, lora_A \\(1, 12\\)"),
        ({"target_modules": ["query"]}, "intermediate.dense has tensors and is not in target"),
        ({"exclude_modules": ["query"]}, "query has tensors and is in exclude_modules"),
        ({"target_modules": ["query", "intermediate.dense", "typo"]}, "'typo' has no tensors"),
    ],
)
def test_config_that_disagrees_with_the_tensors(folder, model, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        reading.read(folder, model)
    assert not peft_io.inspect(folder)[1]


def test_modules_that_the_model_has_and_the_file_lacks(folder, model):
    """Only the model can tell: 'query' has tensors in two of three layers."""
    gone = [f"{QUERY.replace('layer.0', 'layer.2')}.lora_{x}.weight" for x in "AB"]
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in gone])
    change_config(folder, target_modules=["query", "intermediate.dense"])
    with pytest.raises(ValueError, match=r"layer.2.attention.self.query is a target and has no"):
        reading.read(folder, model)
    change_config(folder, exclude_modules=["layer.2.attention.self.query"])
    assert len(reading.read(folder, model)[0]) == 5


def test_a_folder_for_another_model(folder):
    with pytest.raises(ValueError, match="is no layer that we adapt in a opt model"):
        reading.read(folder, tiny.model("opt"))
    with pytest.raises(ValueError, match=r"delta W is \(12, 12\), the layer is \(24, 24\)"):
        reading.read(folder, tiny.model("bert", hidden_size=24, embed_dim=24))
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 12\), the model's is \(5, 12"):
        reading.read(folder, tiny.model("bert", num_labels=5))


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
        assert (reading.pattern_value({key: 7}, path, 0) == 7) == (key not in misses), key


def test_inspect_prints_the_table(folder, capsys):
    assert peft_io.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    pair = reading.read_folder(folder)[1]["bert.encoder.layer.1.attention.self.query"]
    norm = (pair.scaling * pair.lora_B @ pair.lora_A).norm().item()
    (line,) = [x for x in out.splitlines() if "layer.1.attention.self.query" in x]
    assert line.split()[1:] == ["3", "5", "1.667", "72", f"{norm:.4g}"]
    assert "6 modules, 336 parameters; head: classifier.bias, classifier.weight" in out


def test_command_line(tmp_path, capsys):
    """A run, out, in again with its metric; and what is refused."""
    base = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    run, adapter, back = tmp_path / "run", tmp_path / "adapter", tmp_path / "back"
    flags = f"--task mrpc --data-dir {task} --model {base} --r 2 --epochs 1 --batch-size 5"
    common = [*flags.split(), "--lr", "0.05", "--device", "cpu"]
    assert train.main([*common, "--preset", "lora", "--out", str(run)]) == 0
    assert peft_io.main(["export", str(run), str(adapter)]) == 0
    assert peft_io.main(["export", str(run), str(adapter)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    given = ["--model", str(base), "--task", "mrpc", "--data-dir", str(task)]
    assert peft_io.main(["import", str(adapter), str(back), *given]) == 0
    last = run_folder.read_log(run)[-1]
    metric = f"accuracy {last['accuracy']:.4f}, f1 {last['f1']:.4f}"
    assert f"4 modules, 192 parameters\n{metric}\n" in capsys.readouterr().out
    expected = safetensors.torch.load_file(run / "adapter.safetensors")
    got = safetensors.torch.load_file(back / "adapter.safetensors")
    assert expected.keys() == got.keys() and all(torch.equal(got[n], expected[n]) for n in got)

    shortcuts = tmp_path / "shortcuts"
    dead = ["--preset", "lora", "--shortcuts", "all", "--lr", "0", "--out", str(shortcuts)]
    assert train.main([*common, *dead]) == 0
    refused = tmp_path / "refused"
    assert peft_io.main(["export", str(shortcuts), str(refused)]) == 2
    assert "7 shortcuts are on, all zero: --drop-shortcuts" in capsys.readouterr().err
    assert not refused.exists()
    assert peft_io.main(["export", str(shortcuts), str(refused), "--drop-shortcuts"]) == 0
    assert len(reading.read_folder(refused)[1]) == 4
    assert peft_io.main(["inspect", str(tmp_path)]) == 2
    assert "is no PEFT adapter" in capsys.readouterr().err


def test_pickled_code_is_not_executed(folder, model):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was executed",))

    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"holds code \(\S+\), refused"):
        reading.read(folder, model)
