"""tools/peft against PEFT: what we export PEFT loads, what PEFT saves we load: equal logits."""

import json
from contextlib import ExitStack

import peft
import pytest
import torch
import transformers

import lora
import tiny
import train
from model import load_pretrained
from peer_models import build_pair
from support.flags import parse_flags
from tools.peft import commands, prepare, reading, writing

FAMILIES = ["bert", "roberta", "opt", "opt-350m", "gpt2"]
KINDS = {
    "uniform": "--preset lora --lora-alpha 5",
    "heterogeneous": "--shortcuts none --keep 0.5 --allocate static",
    "per rank": "--shortcuts none --allocate static --per-rank yes --budget-params 300",
    "delta": "--preset delta-lora --delta-ratio 0.7 --delta-start 1",
}


def finished_run(tmp_path, family, flags):
    """(folder of the base model, folder of a run on it, our model at the end of the run)."""
    base, out = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    build_pair(base, family, num_labels=2)
    task = tiny.task_folder(tmp_path / "task")
    common = f"--task mrpc --data-dir {task} --model {base} --r 3 --epochs 2 --batch-size 5"
    rest = f"--lr 0.05 --max-length 30 --device cpu --targets q_proj,v_proj,fc1 --out {out}"
    assert train.main([*common.split(), *rest.split(), *flags.split()]) == 0
    return base, out, train.prepare(parse_flags(["--resume", str(out), "--eval-only"]), ExitStack())


def logits(model, run):
    """Of the development set; transformers' models and ours take the same batch."""
    batch = train.batch_of(run.model, run.dev[:5])
    del batch["labels"]
    with torch.no_grad():
        return model.eval()(**batch).logits


def stock(base):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = 1
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_loads_into_peft(tmp_path, family, kind):
    """With and without padding; and our own reader gets the same function back."""
    base, out, run = finished_run(tmp_path, family, KINDS[kind])
    expected = logits(run.model, run)
    plain = logits(stock(base), run)
    assert (expected - plain).abs().max() > 1e-3  # the adapter does something
    for pad in (False, True):
        folder = tmp_path / f"adapter-{pad}"
        config = writing.export(out, folder, pad=pad)
        assert bool(config["rank_pattern"]) == (kind == "per rank" and not pad) or family == "gpt2"
        lines, agree = commands.inspect(folder)
        assert agree, lines
        peer = peft.PeftModel.from_pretrained(stock(base), folder)
        torch.testing.assert_close(logits(peer, run), expected, rtol=0, atol=1e-6)
        fresh, _ = load_pretrained(str(base), num_labels=2)
        reading.put(fresh, *reading.read(folder, fresh))
        torch.testing.assert_close(logits(fresh, run), expected, rtol=0, atol=1e-6)
    if kind == "delta":
        assert config["r"] == (6 if family != "gpt2" else 12)  # r 3, doubled; GPT-2: q and v
    if kind == "heterogeneous":
        enabled = [n for n, a in lora.adapters(run.model).items() if a.enabled]
        assert 0 < len(enabled) < len(lora.adapters(run.model))


@pytest.mark.parametrize("adapter", ["tied", "condlora", "cora", "cora_trained", "reslora_block"])
@pytest.mark.parametrize("family", ["bert", "opt", "gpt2"])
def test_a_relative_that_is_a_pair_loads_into_peft(tmp_path, family, adapter):
    """All on, and with some modules off: an ordinary LoRA adapter, of equal logits."""
    for more in ("--allocate none", "--allocate static --keep 0.5"):
        folder = tmp_path / more.split()[1]
        folder.mkdir()
        flags = f"--adapter {adapter} --targets q_proj,k_proj,v_proj --shortcuts none {more}"
        base, out, run = finished_run(folder, family, flags)
        expected = logits(run.model, run)
        assert (expected - logits(stock(base), run)).abs().max() > 1e-3
        config = writing.export(out, folder / "peft")
        assert config["peft_type"] == "LORA" and not config.get("use_dora")
        peer = peft.PeftModel.from_pretrained(stock(base), folder / "peft")
        torch.testing.assert_close(logits(peer, run), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("allocate", ["adalora --keep 0.5", "alora --score-batches 1"])
@pytest.mark.parametrize("family", ["bert", "opt", "gpt2"])
def test_a_run_of_a_rank_allocator_loads_into_peft(tmp_path, family, allocate):
    """AdaLoRA with E folded in, ALoRA with what its gates left: the ranks differ by module."""
    flags = f"--shortcuts none --every 0.5 --allocate {allocate}"
    base, out, run = finished_run(tmp_path, family, flags)
    expected = logits(run.model, run)
    assert (expected - logits(stock(base), run)).abs().max() > 1e-3
    config = writing.export(out, tmp_path / "peft")
    assert config["peft_type"] == "LORA" and not config.get("use_dora")
    if family != "gpt2":  # where q and v are one module
        ranks = {config["r"], *config["rank_pattern"].values()}
        assert len(ranks) > 1 and (allocate[:3] != "ada" or sum(ranks) < 9)
    peer = peft.PeftModel.from_pretrained(stock(base), tmp_path / "peft")
    torch.testing.assert_close(logits(peer, run), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("adapter", ["reslora_input", "reslora_middle"])
def test_what_is_no_matrix_on_its_input_does_not_leave(tmp_path, adapter):
    flags = f"--adapter {adapter} --shortcuts none --allocate none"
    _, out, _ = finished_run(tmp_path, "bert", flags)
    with pytest.raises(ValueError, match=f"holds {adapter}: its modules add no matrix to a weight"):
        writing.export(out, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


PEFT_CONFIGS = {
    "plain": {},
    "patterns": {"rank_pattern": {"PLACE": 4}, "alpha_pattern": {"PLACE": 7}},
    "rslora": {"use_rslora": True, "rank_pattern": {"PLACE": 5}},
}
PEFT_TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "roberta": ["query", "key", "attention.output.dense"],
    "opt": ["q_proj", "v_proj", "fc2"],
    "opt-350m": ["k_proj", "out_proj", "fc1"],
    "gpt2": ["c_attn", "c_fc"],
}
CASES = [(f, "classification") for f in FAMILIES] + [(f, "lm") for f in FAMILIES[2:]]


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
@pytest.mark.parametrize(
    ("family", "head"),
    [(f, "classification") for f in FAMILIES] + [(f, "lm") for f in FAMILIES[2:]],
)
def test_an_adapter_of_peft_loads_into_ours(tmp_path, family, head, kind):
    """Random A, B and head; patterns by regex; classification heads, and language models."""
    peer, ours = build_pair(tmp_path, family, head)
    targets = PEFT_TARGETS[family]
    text = json.dumps(PEFT_CONFIGS[kind]).replace("PLACE", rf"(0|2)\\..*{targets[0]}")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        task_type="CAUSAL_LM" if head == "lm" else "SEQ_CLS",
        **json.loads(text),
    )
    peer = peft.get_peft_model(peer, config).double().eval()
    tiny.randomise([p for p in peer.parameters() if p.requires_grad], 2)
    peer.save_pretrained(tmp_path / "adapter")
    pairs, parameters = reading.read(tmp_path / "adapter", ours)
    layers = reading.put(ours, pairs, parameters)
    batch = tiny.batch(ours.config)
    real = batch["attention_mask"].bool() if head == "lm" else slice(None)
    with torch.no_grad():  # the file is in float32 where the peer's model was not
        got, expected = ours.eval()(**batch).logits[real], peer(**batch).logits[real]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    if kind == "patterns":
        assert len({a.r for a in layers.values()}) == 2
        assert len({a.scaling for a in layers.values()}) == 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", PEFT_TARGETS)
def test_an_adalora_adapter_of_peft_loads_into_ours(tmp_path, family, masked):
    """Saved before and after PEFT's allocator has taken ranks away, from some modules all of them.

    Expected is what PEFT reads back: its trainable scale, ranknum, is not in the file. Its AdaLoRA
    leaves alpha_pattern and use_rslora unread.
    """
    peer, ours = build_pair(tmp_path, family, num_labels=2)
    config = peft.AdaLoraConfig(
        init_r=3,
        target_r=1,
        lora_alpha=5,
        target_modules=PEFT_TARGETS[family],
        task_type="SEQ_CLS",
        total_step=9,
        tinit=1,
        tfinal=2,
        alpha_pattern={PEFT_TARGETS[family][0]: 11},
        use_rslora=True,
    )
    peer = peft.get_peft_model(peer, config)
    tiny.randomise([p for n, p in peer.named_parameters() if "lora_" in n or "save" in n], 2)
    for step in range(9 if masked else 0):
        peer(**tiny.batch(ours.config)).loss.backward()
        peer.base_model.update_and_allocate(step)
        peer.zero_grad()
    peer.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(stock(tmp_path), tmp_path / "adapter").double().eval()
    pairs, parameters = reading.read(tmp_path / "adapter", ours)
    layers = reading.put(ours, pairs, parameters)
    modules = [m for m in again.modules() if getattr(m, "lora_E", None)]
    ranks = [len(m.lora_E["default"]) for m in modules]
    assert sum(ranks) == (len(ranks) if masked else 3 * len(ranks)) and (0 in ranks) == masked
    with torch.no_grad():
        batch = {k: v for k, v in tiny.batch(ours.config).items() if k != "labels"}
        expected = again(**batch).logits
        torch.testing.assert_close(ours.eval()(**batch).logits, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(peer.eval()(**batch).logits, expected, rtol=1e-6, atol=1e-6)
        commands.import_folder(tmp_path / "adapter", tmp_path / "out", str(tmp_path))
        fresh, _ = load_pretrained(str(tmp_path), num_labels=2)
        lora.load_adapter(fresh, tmp_path / "out")
        torch.testing.assert_close(fresh(**batch).logits.double(), expected, rtol=0, atol=1e-5)
    assert {layer.scaling for layer in layers.values()} == {5 / 3.00001}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_shortcuts_live_in_a_prepared_model(tmp_path, family):
    """prepare() changes nothing by itself; with the adapter it computes what our model does."""
    flags = "--shortcuts all --allocate none --shortcut-alpha 2"
    base, out, run = finished_run(tmp_path, family, flags)
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"11 shortcuts are on .* a stock model has no place"):
        writing.export(out, folder)
    config = writing.export(out, folder, keep_shortcuts=True)
    places = [p for p in config["target_modules"] if "residual" in p or "shortcut" in p]
    assert len(places) == 11
    peer = stock(base)
    before = logits(peer, run)
    prepare.prepare(peer, places)
    assert torch.equal(logits(peer, run), before)
    peer = peft.PeftModel.from_pretrained(peer, folder)
    expected = logits(run.model, run)
    torch.testing.assert_close(logits(peer, run), expected, rtol=0, atol=1e-6)
    assert (expected - before).abs().max() > 1e-3


def test_transformers_own_loader(tmp_path):
    """model.load_adapter reads the same folder, head included."""
    base, out, run = finished_run(tmp_path, "opt", KINDS["heterogeneous"])
    writing.export(out, tmp_path / "adapter")
    model = stock(base)
    model.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model, run), logits(run.model, run), rtol=0, atol=1e-6)
