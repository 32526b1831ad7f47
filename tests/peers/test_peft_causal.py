"""tools/peft for LLaMA and its relatives: what we export PEFT loads, what PEFT saves we load.

In float64, with factors that float32 holds exactly, since a PEFT folder is written in it: what is
compared are names, shapes, scales and the places of seven matrices, to 1e-10.
"""

import json

import peft
import pytest
import torch
import transformers

import causal_models
import lora
import tiny
import train
from causal_models import CASES, in_float64
from delta_lora import DeltaLoRA
from model import load_pretrained
from relatives.dora import DoRA
from relatives.single_ranks import keep_ranks
from support import run_folder
from tools.peft import __main__ as tool
from tools.peft import commands, prepare, reading, writing

ALL = lora.SHORTCUTS["all"]
ONE_OF_EACH = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def in_float32(parameters):
    """The same, rounded to what float32 holds."""
    for p in parameters:
        p.data = p.data.float().to(p.dtype)


def build_pair(*args):
    """causal_models.build_pair, the frequencies of the rotary angles in float64 too."""
    with in_float64():
        return causal_models.build_pair(*args)


def logits(m, batch, head):
    """Of the real tokens, or of the examples; without labels, for either side."""
    batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad(), in_float64():
        found = m.eval()(**batch).logits
    return found[batch["attention_mask"].bool()] if head == "lm" else found


def adapted(ours, shortcuts=(), adapter=lora.LoRALayer):
    """All seven places; ranks 1 … 3 and scales that differ, two modules off; random factors."""
    lora.inject(ours, lora.LINEARS, r=3, lora_alpha=5, shortcuts=shortcuts, adapter=adapter, seed=4)
    layers = lora.adapters(ours)
    tiny.randomise([f for a in layers.values() for f in a.factors().values()], 2)
    if adapter is lora.LoRALayer:
        for i, layer in enumerate(layers.values()):
            keep_ranks(layer, list(range(1 + i % 3)))
            layer.scaling = (0.5, 2.0, 0.25, 4.0)[i % 4]  # padding folds them into B exactly
            layer.lora_alpha = layer.scaling * layer.r
        lora.switch(ours, set(layers) - {"layers.0.fc1", "layers.2.out_proj"})
    tiny.randomise([p for m in ours.head for p in ours.get_submodule(m).parameters()], 3)
    in_float32(lora.trainable(ours).values())
    lora.mark_trainable(ours)
    return ours.double()


def run_of(folder, ours, base, pairs=None, **flags):
    """A run folder as train.py leaves it: flags and adapter."""
    folder.mkdir()
    given = {"model": str(base), "lora_dropout": 0.1, "shortcuts": "none", "shortcut_norm": "none"}
    run_folder.write_json(folder / "config.json", {"flags": given | flags})
    lora.save_adapter(ours, folder, pairs)
    return folder


def stock(base, peer, head, num_labels=3):
    """transformers' own model of the folder, as a user loads it; in the dtype of peer."""
    auto = "AutoModelForCausalLM" if head == "lm" else "AutoModelForSequenceClassification"
    more = {} if head == "lm" else {"num_labels": num_labels}
    with in_float64():
        fresh = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32, **more)
    fresh = fresh.to(peer.dtype).eval()
    if hasattr(fresh.model.embed_tokens, "embed_scale"):  # Gemma's, which it rounds to float32
        fresh.model.embed_tokens.embed_scale = peer.model.embed_tokens.embed_scale
    return fresh


# ---------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("case", CASES)
def test_what_we_export_loads_into_a_stock_model(tmp_path, case, head):
    """Padded and not; inspect agrees; and each of the seven places does something."""
    peer, ours = build_pair(tmp_path, case, head)
    batch = tiny.batch(ours.config, lengths=(11, 4, 6))
    plain = logits(peer, batch, head)
    expected = logits(adapted(ours), batch, head)
    assert (expected - plain).abs().max() > 1e-2
    run = run_of(tmp_path / "run", ours, tmp_path)
    for pad in (False, True):
        folder = tmp_path / f"adapter-{pad}"
        config = writing.export(run, folder, pad=pad)
        assert config["task_type"] == ("CAUSAL_LM" if head == "lm" else "SEQ_CLS")
        assert config["modules_to_save"] == (None if head == "lm" else ["score"])
        assert len(config["target_modules"]) == 19 and bool(config["rank_pattern"]) != pad
        lines, agree = commands.inspect(folder, str(tmp_path))
        assert agree, lines
        theirs = peft.PeftModel.from_pretrained(stock(tmp_path, peer, head), folder).double()
        torch.testing.assert_close(logits(theirs, batch, head), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_transformers_own_loader_and_merging(tmp_path, case):
    """Without PeftModel; and the merged weights of both sides give the same logits."""
    peer, ours = build_pair(tmp_path, case)
    batch = tiny.batch(ours.config)
    expected = logits(adapted(ours), batch, "lm")
    writing.export(run_of(tmp_path / "run", ours, tmp_path), tmp_path / "adapter")
    fresh = stock(tmp_path, peer, "lm")
    fresh.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(fresh.double(), batch, "lm"), expected, rtol=0, atol=1e-10)
    theirs = peft.PeftModel.from_pretrained(stock(tmp_path, peer, "lm"), tmp_path / "adapter")
    merged = theirs.double().merge_and_unload()
    lora.merge(ours)
    torch.testing.assert_close(logits(ours, batch, "lm"), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(merged, batch, "lm"), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_delta_lora_is_a_pair_of_twice_the_rank_on_the_original(tmp_path, case):
    """Weights that moved, every place: the file is the whole truth, to the rounding of float32."""
    peer, ours = build_pair(tmp_path, case)
    adapted(ours)
    delta = DeltaLoRA(ours, ratio=0.7, start=0)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.01)
    batch = tiny.batch(ours.config)
    for _ in range(5):
        with in_float64():
            ours(**batch).loss.backward()
        delta.before_step()
        optimizer.step()
        delta.after_step()
        optimizer.zero_grad()
    expected = logits(ours, batch, "lm")
    run = run_of(tmp_path / "run", ours, tmp_path, delta.export())
    config = writing.export(run, tmp_path / "adapter")
    assert config["r"] == 6 and set(config["rank_pattern"].values()) == {2, 4}
    theirs = peft.PeftModel.from_pretrained(stock(tmp_path, peer, "lm"), tmp_path / "adapter")
    got = logits(theirs.double(), batch, "lm")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (logits(peer, batch, "lm") - expected).abs().max() > 1e-2


def test_dora_on_every_place(tmp_path):
    peer, ours = build_pair(tmp_path, "llama")
    expected = logits(adapted(ours, adapter=DoRA), batch := tiny.batch(ours.config), "lm")
    config = writing.export(run_of(tmp_path / "run", ours, tmp_path), tmp_path / "adapter")
    assert config["use_dora"] and len(config["target_modules"]) == 21
    theirs = peft.PeftModel.from_pretrained(stock(tmp_path, peer, "lm"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs.double(), batch, "lm"), expected, rtol=0, atol=1e-10)


def test_shortcuts_are_refused_and_those_of_zero_dropped(tmp_path):
    peer, ours = build_pair(tmp_path, "llama")
    batch = tiny.batch(ours.config)
    adapted(ours, shortcuts=ALL)
    run = run_of(tmp_path / "alive", ours, tmp_path, shortcuts="all")
    with pytest.raises(ValueError, match=r"11 shortcuts are on .* a stock model has no place"):
        writing.export(run, tmp_path / "adapter")
    for name, layer in lora.adapters(ours).items():
        if name.rpartition(".")[2] in ALL:
            layer.lora_B.data.zero_()
    run = run_of(tmp_path / "zero", ours, tmp_path, shortcuts="all")
    with pytest.raises(ValueError, match="11 shortcuts are on, all zero: --drop-shortcuts"):
        writing.export(run, tmp_path / "adapter")
    writing.export(run, tmp_path / "adapter", drop_shortcuts=True)
    theirs = peft.PeftModel.from_pretrained(stock(tmp_path, peer, "lm"), tmp_path / "adapter")
    torch.testing.assert_close(
        logits(theirs.double(), batch, "lm"), logits(ours, batch, "lm"), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma"])
def test_shortcuts_live_in_a_prepared_model(tmp_path, case):
    """prepare() changes no bit; with the adapter the model computes what ours does."""
    peer, ours = build_pair(tmp_path, case)
    batch = tiny.batch(ours.config)
    expected = logits(adapted(ours, shortcuts=ALL), batch, "lm")
    run = run_of(tmp_path / "run", ours, tmp_path, shortcuts="all")
    config = writing.export(run, tmp_path / "adapter", keep_shortcuts=True)
    places = [p for p in config["target_modules"] if "residual" in p or "shortcut" in p]
    assert len(places) == 11
    fresh = stock(tmp_path, peer, "lm")
    before = logits(fresh, batch, "lm")
    prepare.prepare(fresh, places)
    assert torch.equal(logits(fresh, batch, "lm"), before)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").double()
    torch.testing.assert_close(logits(theirs, batch, "lm"), expected, rtol=0, atol=1e-10)
    assert (expected - before).abs().max() > 1e-2
    for wrong in ("0.q_proj", "0.shortcut_ffn", "9.residual_1", "x.residual_1"):
        with pytest.raises(ValueError, match="is no place for a shortcut in"):
            prepare.prepare(fresh, [f"model.layers.{wrong}"])
    with pytest.raises(ValueError, match="is no place for a shortcut in this model"):
        prepare.prepare(fresh, ["bert.encoder.layer.0.residual_1"])


def test_a_whole_run_goes_out_through_the_program(tmp_path):
    """train.py with dynamic HeteroLoRA, shortcuts and Delta-LoRA; then a prepared model, PEFT."""
    base = tmp_path / "base"
    peer, _ = causal_models.build_pair(base, "llama", dtype=torch.float32)
    task, out = tiny.task_folder(tmp_path / "task"), tmp_path / "run"
    flags = f"--task mrpc --data-dir {task} --model {base} --r 2 --epochs 2 --batch-size 5"
    more = f"--lr 0.05 --max-length 30 --device cpu --every 0.5 --out {out} --delta-ratio 0.5"
    places = "--targets q_proj,out_proj,gate_proj,fc2 --shortcuts all --delta-start 1"
    assert train.main([*flags.split(), *more.split(), *places.split()]) == 0
    folder = tmp_path / "adapter"
    assert tool.main(["export", str(out), str(folder)]) == 2  # shortcuts are on
    assert tool.main(["export", str(out), str(folder), "--keep-shortcuts"]) == 0
    ours, _ = load_pretrained(str(base), num_labels=2)
    lora.load_adapter(ours, out)
    batch = tiny.batch(ours.config)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["r"] == 4
    shortcuts = [p for p in config["target_modules"] if "residual" in p or "shortcut" in p]
    fresh = prepare.prepare(stock(base, peer, "classification", num_labels=2), shortcuts)
    theirs = peft.PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        del batch["labels"]
        got, expected = theirs(**batch).logits, ours.eval()(**batch).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------- in

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "every place": {"target_modules": NAMES},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {r"layers\.(0|2)\.mlp\.up_proj": 4, "gate_proj": 2},
        "alpha_pattern": {r"layers\.(0|2)\.mlp\.up_proj": 7, "down_proj": 1},
    },
    "rslora": {"target_modules": NAMES, "use_rslora": True, "rank_pattern": {"gate_proj": 5}},
    "dora": {"target_modules": NAMES, "use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_what_peft_saves_loads_into_ours(tmp_path, case, kind):
    """Read and put; and through the command and adapter.safetensors, into a fresh model."""
    peer, ours = build_pair(tmp_path, case)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **KINDS[kind])
    theirs = peft.get_peft_model(peer, config).double().eval()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    tiny.randomise(trained, 2)
    in_float32(trained)
    theirs.save_pretrained(tmp_path / "adapter")
    batch = tiny.batch(ours.config)
    expected = logits(theirs, batch, "lm")
    layers = reading.put(ours, *reading.read(tmp_path / "adapter", ours))
    torch.testing.assert_close(logits(ours, batch, "lm"), expected, rtol=0, atol=1e-10)
    assert len(layers) == 3 * (4 if kind == "patterns" else 7)
    if kind == "patterns":
        assert {a.r for a in layers.values()} == {2, 3, 4}
        assert len({a.scaling for a in layers.values()}) == 4
    back = tmp_path / "back"
    argv = ["import", str(tmp_path / "adapter"), str(back), "--model", str(tmp_path)]
    assert tool.main(argv) == 0
    again, _ = load_pretrained(str(tmp_path), head="lm")
    lora.load_adapter(again, back, DoRA if kind == "dora" else lora.LoRALayer)
    # in float32 until here: the norms of DoRA's rows are those of the rounded weights
    torch.testing.assert_close(logits(again.double(), batch, "lm"), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["llama", "gemma"])
def test_a_classifier_of_peft_brings_its_head(tmp_path, case):
    peer, ours = build_pair(tmp_path, case, "classification")
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="SEQ_CLS", target_modules=NAMES)
    theirs = peft.get_peft_model(peer, config).double().eval()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    tiny.randomise(trained, 2)
    in_float32(trained)
    theirs.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    batch = tiny.batch(ours.config)
    reading.put(ours, *reading.read(tmp_path / "adapter", ours))
    got = logits(ours, batch, "classification")
    torch.testing.assert_close(got, logits(theirs, batch, "classification"), rtol=0, atol=1e-10)
