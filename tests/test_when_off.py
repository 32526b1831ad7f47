"""--when-off frozen: what goes off stays in the forward pass, without gradient, step or decay."""

import json
import signal
from contextlib import ExitStack

import pytest
import safetensors
import torch
from torch import nn

import dense
import lora
import proxies
import tiny
import train
from delta_lora import DeltaLoRA
from support import run_folder
from support.flags import equal_budget_control, parse_flags
from test_delta_lora import adamw, moved_through, problem, products, weights
from test_proxies import snapshot
from test_train import whole_and_interrupted
from tools.faults import same
from tools.peft import reading, writing

ALL = lora.RESIDUALS + lora.CROSS


def frozen_model(family="bert", **more):
    """Every place adapted, every second module off and frozen; lora_B is nowhere zero."""
    m = tiny.adapted(family, shortcuts=ALL, **more)
    for i, layer in enumerate(lora.adapters(m).values()):
        layer.when_off = "frozen"
        layer.enabled = i % 2 == 0
    return m


@pytest.fixture
def flags(tmp_path):
    """Two epochs of five steps; of 11 modules (4 LoRA + 7 shortcuts) 3 train at once, by chance."""
    model = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 2 --epochs 2 --batch-size 5 --lr 0.03 "
        "--log-every 1 --device cpu --schedule constant --warmup 0 --every 0.4 --keep 0.25 "
        "--proxy random --weight-decay 0.3 --when-off frozen"
    )
    return text.split()


# ------------------------------------------------------------------------------------- forward pass


@pytest.mark.parametrize("norm", ["none", "reuse"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_forward_and_gradients_equal_dense_matrices(family, norm):
    """Off modules are in every dense matrix, shortcuts too.

    What is on has the same gradient as through the dense matrices, what is off has none.
    """
    m = frozen_model(family, shortcut_norm=norm)
    batch, layers = tiny.batch(m.config), lora.adapters(m)
    out = m(**batch)
    torch.testing.assert_close(out.logits, dense.logits(m, batch), rtol=0, atol=1e-11)
    everything_on = tiny.adapted(family, shortcuts=ALL, shortcut_norm=norm)
    assert torch.equal(out.logits, everything_on(**batch).logits)
    out.loss.backward()
    on = [f for a in layers.values() if a.enabled for f in (a.lora_A, a.lora_B)]
    off = [f for a in layers.values() if not a.enabled for f in (a.lora_A, a.lora_B)]
    assert len(off) > 20 and all(f.grad is None for f in off)
    loss = nn.functional.cross_entropy(dense.logits(m, batch), batch["labels"])
    for factor, g in zip(on, torch.autograd.grad(loss, on), strict=True):
        torch.testing.assert_close(factor.grad, g, rtol=0, atol=1e-11)


@pytest.mark.parametrize("place", ["shortcut_sa", "shortcut_ffn", "residual_1", "fc1"])
def test_out_leaves_and_frozen_stays(place):
    """One module goes off: out, it does what W (identity, zero) does alone; frozen, nothing."""
    m = tiny.adapted("opt", shortcuts=ALL)
    batch, layer = tiny.batch(m.config), lora.adapters(m)[f"layers.1.{place}"]
    on = m(**batch).logits
    layer.enabled = False
    assert not layer.in_forward and (m(**batch).logits - on).abs().max() > 1e-4
    layer.when_off = "frozen"
    assert layer.in_forward and torch.equal(m(**batch).logits, on)


def test_dropout_still_acts_on_a_frozen_branch():
    """It stays as it is: inverted dropout in train mode, as while it was on."""
    m = tiny.model("bert")
    lora.inject(m, ("fc1",), r=2, lora_dropout=0.5, when_off="frozen")
    layer = m.layers[0].fc1
    tiny.randomise([layer.lora_B], 1)
    x = torch.randn(2, 12, dtype=torch.float64)
    results = []
    for enabled in (True, False):
        layer.enabled = enabled
        torch.manual_seed(0)
        results.append(layer(x))
    assert torch.equal(*results) and not torch.equal(results[0], layer.eval()(x))


def test_injection_sets_it_and_refuses_another_word():
    m = tiny.model("bert")
    with pytest.raises(ValueError, match="when_off is 'in', allowed: out, frozen"):
        lora.inject(m, when_off="in")
    assert not lora.adapters(m)
    layers = lora.inject(m, shortcuts=("residual_1",), when_off="frozen")
    assert {layer.when_off for layer in layers.values()} == {"frozen"}
    assert lora.LoRALayer(nn.Linear(4, 3), 4, 3, r=2).when_off == "out"


# --------------------------------------------------------------------------- merge, state, counting


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_frozen_modules_merge_too(family):
    m = frozen_model(family)
    batch, before = tiny.batch(m.config), {n: p.clone() for n, p in m.named_parameters()}
    unmerged = m(**batch).logits
    merged = lora.merge(m)
    assert set(merged) == {n for n in lora.adapters(m) if n.rpartition(".")[2] in lora.LINEARS}
    torch.testing.assert_close(m(**batch).logits, unmerged, rtol=0, atol=1e-11)
    for name in merged:
        assert not torch.equal(m.get_submodule(name).base.weight, before[f"{name}.base.weight"])
    lora.unmerge(m)
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())
    assert torch.equal(m(**batch).logits, unmerged)


def test_a_state_dict_carries_it():
    m, other = frozen_model(), tiny.adapted("bert", seed=5, shortcuts=ALL)
    batch = tiny.batch(m.config)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(**batch).logits, m(**batch).logits)
    assert {a.when_off for a in lora.adapters(other).values()} == {"frozen"}
    assert [a.enabled for a in lora.adapters(other).values()][:2] == [True, False]
    back = tiny.adapted("bert", shortcuts=ALL)
    other.load_state_dict(back.state_dict())
    assert {a.when_off for a in lora.adapters(other).values()} == {"out"}


@pytest.mark.parametrize("when_off", ["out", "frozen"])
def test_trainable_at_once_and_stored(when_off):
    """q_proj costs 3 (12 + 12), fc1 3 (12 + 20): on or not, learned or not, one of each."""
    m = tiny.model("bert")
    layers = lora.inject(m, ("q_proj", "fc1"), r=3, when_off=when_off)
    lora.mark_trainable(m)
    lora.switch(m, {"layers.0.q_proj", "layers.1.fc1"})
    tiny.randomise([layers[f"layers.{i}.{p}"].lora_B for i, p in ((0, "q_proj"), (2, "fc1"))], 1)
    head = sum(p.numel() for part in m.head for p in m.get_submodule(part).parameters())
    assert sum(lora.count_trainable(m).values()) - head == 72 + 96
    assert sum(lora.count_trainable(m, stored=True).values()) - head == 72 + 96 + 96
    assert list(lora.training_now(m))[:4] == [
        *(f"layers.0.q_proj.lora_{x}" for x in "AB"),
        *(f"layers.1.fc1.lora_{x}" for x in "AB"),
    ]


@pytest.mark.parametrize("proxy", ["grad_norm", "synflow", "fisher", "grad_norm_slot", "grasp"])
def test_scoring_takes_all_as_trainable_and_leaves_no_trace(proxy):
    """The scores do not depend on what is off, nor on what becomes of it."""
    m = frozen_model()
    batches = [tiny.batch(m.config, seed=i) for i in range(2)]
    before = snapshot(m)
    scores = proxies.score(proxy, m, batches)
    after = snapshot(m)
    assert all(same(before[part], after[part]) for part in before)
    assert [a.enabled for a in lora.adapters(m).values()][:3] == [True, False, True]
    assert scores == proxies.score(proxy, tiny.adapted("bert", shortcuts=ALL), batches)


# ------------------------------------------------------------------------------------------- a file


def test_a_saved_adapter_loads_to_equal_logits(tmp_path):
    """The file says enabled for what is in the forward pass."""
    m = frozen_model("opt")
    lora.save_adapter(m, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["adapters"])
    assert all(a["enabled"] and a["r"] == 3 for a in about.values())
    fresh = tiny.model("opt")
    lora.load_adapter(fresh, tmp_path / "a.safetensors")
    batch = tiny.batch(m.config)
    assert torch.equal(fresh(**batch).logits, m(**batch).logits)


# --------------------------------------------------------------------------------------- Delta-LoRA


@pytest.mark.parametrize("lazy", [False, True])
def test_delta_lora_through_several_reallocations(lazy):
    """An off module does not move W and stays in at scale s; the export is exact, rank <= 2r."""
    m, twin = problem(), problem()
    w0, layers = weights(m), lora.adapters(m)
    for layer in layers.values():
        layer.when_off = "frozen"
    delta, optimizer = DeltaLoRA(m, 0.8, 1, lazy), adamw(m)
    chosen = {"layers.0.q_proj": (0, 4), "layers.1.fc1": (3, 6, 14), "layers.2.q_proj": ()}
    expected = moved_through(m, delta, optimizer, chosen)
    assert not layers["layers.0.q_proj"].enabled and products(m)["layers.0.q_proj"].any()
    assert set(delta.begin) == {n for n, a in layers.items() if a.enabled}  # the stretch has ended
    exported, batch = delta.export(), tiny.batch(m.config, seed=99)
    for name, w in weights(m).items():
        if not lazy:
            torch.testing.assert_close(w - w0[name], expected[name], rtol=0, atol=1e-13)
        A, B = exported[name]
        effective = expected[name] + 2.5 * products(m)[name]  # on or off
        torch.testing.assert_close(B @ A, effective, rtol=0, atol=1e-13)
        assert len(A) <= 2 * layers[name].r and (len(A) > 0) == (name != "layers.2.q_proj")
    for name, layer in lora.adapters(twin).items():
        A, B = exported[name]
        layer.enabled, layer.scaling, layer.r = len(A) > 0, 1.0, len(A)
        layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
    for part in m.head:
        twin.get_submodule(part).load_state_dict(m.get_submodule(part).state_dict())
    torch.testing.assert_close(twin(**batch).logits, m(**batch).logits, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------- a run


def test_frozen_modules_keep_weights_and_moments_in_a_run(flags, tmp_path, monkeypatch):
    """While off neither A, B nor a moment moves, not even by decay; on again, they go on."""
    target, record, turns = "layers.1.v_proj", [], iter([True, False, True])

    def scripted(_kind, costs, _generator):
        on = next(turns)
        return {n: float(n == target) if on else float(n != target) for n in costs}

    step = train.train_step

    def watched(run, group, lr):
        loss = step(run, group, lr)
        layer = lora.adapters(run.model)[target]
        moments = [run.optimizer.state.get(p) for p in (layer.lora_A, layer.lora_B)]
        parts = [layer.lora_A, layer.lora_B, *(m[k] for m in moments for k in sorted(m))]
        kept = [p.detach().clone() for p in parts]
        record.append((layer.enabled, layer.delta_w().detach().norm(), kept))
        return loss

    monkeypatch.setattr(train.allocate, "baseline_scores", scripted)
    monkeypatch.setattr(train, "train_step", watched)
    args = [*flags, "--epochs", "3", "--every", "1", "--out", str(tmp_path / "run")]
    assert train.main(args) == 0
    assert [enabled for enabled, _, _ in record] == [True] * 5 + [False] * 5 + [True] * 5
    for _, norm, parts in record[5:10]:
        assert same(parts, record[4][2]) and norm > 0
    steps = [i for i, part in enumerate(record[4][2]) if part.ndim == 0]
    assert [record[-1][2][i].item() for i in steps] == [10.0, 10.0]


def test_a_run_says_both_counts_and_ends_as_it_was_measured(flags, tmp_path, capsys):
    """done, the table, the adapter file, --eval-only and the PEFT folder agree with each other."""
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    done = run_folder.read_log(out)[-1]
    history = json.loads((out / "allocation.json").read_text())["history"]
    ever = {name for decision in history for name, on in decision["on"].items() if on}
    assert done["trainable"]["adapters"] == 144 and len(ever) > 5
    assert done["stored"] == 48 * len(ever)  # rank 2 x (12 + 12) each
    assert f"stored      {done['stored']:,} in adapters" in printed and "off = frozen" in printed
    args = parse_flags(["--eval-only", "--resume", str(out)])
    trained = train.prepare(args, ExitStack())
    expected = {k: done[k] for k in ("accuracy", "f1")}
    assert train.evaluate(trained.model, trained.task, trained.dev) == expected
    batch = train.batch_of(trained.model.eval(), trained.dev)
    logits = trained.model(**batch).logits
    fresh, _ = train.load_pretrained(args.model)
    lora.load_adapter(fresh.eval(), out)
    assert torch.equal(fresh(**batch).logits, logits)
    config, _, head = writing.read_run(out)
    peer, _ = train.load_pretrained(args.model)
    peft = writing.export(out, tmp_path / "peft", keep_shortcuts=True)
    assert config["when_off"] == "frozen" and len(peft["target_modules"]) == 11 and head
    # a stock model has no place for shortcuts: the same run without them, below
    no_shortcuts = tmp_path / "none"
    more = ["--shortcuts", "none", "--keep", "0.5", "--out", str(no_shortcuts)]
    assert train.main([*flags, *more]) == 0
    args = parse_flags(["--eval-only", "--resume", str(no_shortcuts)])
    trained = train.prepare(args, ExitStack())
    writing.export(no_shortcuts, tmp_path / "stock")
    reading.put(peer, *reading.read(tmp_path / "stock", peer))
    logits = trained.model.eval()(**batch).logits
    torch.testing.assert_close(peer.eval()(**batch).logits, logits, rtol=0, atol=1e-6)
    off = [a for a in lora.adapters(trained.model).values() if not a.enabled]
    assert any(a.lora_B.any() for a in off)


def test_both_counts_are_said_only_where_they_differ(flags, tmp_path, capsys):
    lora_alone = [f for f in flags if f not in ("--when-off", "frozen", "--proxy", "random")]
    lora_alone = lora_alone[: lora_alone.index("--every")]
    args = [*lora_alone, "--allocate", "none", "--out", str(tmp_path / "run")]
    assert train.main(args) == 0
    assert "\nstored" not in capsys.readouterr().out
    done = run_folder.read_log(tmp_path / "run")[-1]
    assert done["stored"] == done["trainable"]["adapters"] == 528


@pytest.mark.parametrize(("stop_after", "delta"), [(1, "2"), (4, "2"), (5, "0"), (6, "0")])
def test_resuming_gives_the_same_bits(flags, tmp_path, monkeypatch, stop_after, delta):
    extra = ["--delta-ratio", delta, "--delta-start", "1"] if delta != "0" else ["--dropout", "0.1"]
    pair = whole_and_interrupted(
        [*flags, *extra], tmp_path, monkeypatch, stop_after, signal.SIGTERM
    )
    adapters = [(folder / "adapter.safetensors").read_bytes() for folder in pair]
    assert adapters[0] == adapters[1]


def test_the_control_is_plain(flags):
    args = parse_flags(flags)
    command, parameters = equal_budget_control(args, 264, {f"m{i}": 48 for i in range(11)})
    assert "when-off" not in command and parameters == 264
