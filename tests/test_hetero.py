"""HeteroLoRA as a run: schedule, budgets, what off means to the optimizer, resumption."""

import json
import signal
from contextlib import ExitStack

import pytest
import torch

import allocate
import lora
import tiny
import train
from relatives.single_ranks import keep_ranks
from support import checkpoint, run_folder
from support.flags import PRESETS, parse_flags
from test_train import whole_and_interrupted
from tools.faults import same


@pytest.fixture
def flags(tmp_path):
    """Five steps an epoch, two epochs, 11 modules (4 LoRA + 7 shortcuts) of which 1 + 2 stay on."""
    model = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 2 --epochs 2 --batch-size 5 --lr 0.01"
    )
    more = "--log-every 1 --device cpu --schedule constant --warmup 0 --every 0.4 --keep 0.25"
    return [*text.split(), *more.split()]


def static(flags):
    """The flags of the fixture for a choice that is made once, under a budget of its own."""
    return [*flags[:-4], "--allocate", "static"]


def history(folder):
    return json.loads((folder / "allocation.json").read_text())["history"]


def on_set(decision):
    return {name for name, level in decision["on"].items() if level}


def test_dynamic_run_decides_on_schedule_and_within_budget(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert [h["step"] for h in history(out)] == [0, 2, 4, 5, 7, 9]
    assert all(len(on_set(h)) == 3 for h in history(out))
    assert len({frozenset(on_set(h)) for h in history(out)}) > 1  # it does change
    assert printed.count("3 of 11 modules on, 144 parameters (all 528)") == 6
    assert "q_proj" in printed and "█" in printed and "·" in printed
    # rank 1 on all 11 modules is 264 parameters: nothing that is spread evenly costs 144
    assert "for decisions" in printed and "spread evenly" not in printed
    *log, done = run_folder.read_log(out)
    assert done["trainable"]["adapters"] == 144
    each = [event["seconds"] for event in log if event["event"] == "score"]
    assert min(each) > 0 and done["score_seconds"] == pytest.approx(sum(each), abs=0.01)
    assert done["score_seconds"] < done["seconds"]
    for h in history(out):
        assert set(h["scores"]) == set(h["on"]) and all(v > 0 for v in h["scores"].values())


def test_static_run_decides_once(flags, tmp_path):
    out = tmp_path / "run"
    assert train.main([*static(flags), "--out", str(out)]) == 0
    assert [h["step"] for h in history(out)] == [0]


def test_choices_are_those_of_the_scores(flags, tmp_path):
    """What is on is what keep_top makes of the recorded scores, and nothing else trained."""
    out = tmp_path / "run"
    more = ["--keep", "0.25", "--ranking", "apart"]
    train.main([*static(flags), *more, "--out", str(out)])
    (decision,) = history(out)
    assert on_set(decision) == allocate.keep_top(decision["scores"], 0.25, together=False)
    parameters = checkpoint.read_last(out)[0]["parameters"]
    for name in decision["on"]:
        assert bool(parameters[f"{name}.lora_B"].any()) == (name in on_set(decision))


def test_on_off_on_keeps_weights_and_moments(flags, tmp_path, monkeypatch):
    """One module goes on, off and on.

    While it is off neither A, B nor a moment moves, not even by decay; afterwards it goes on from
    there, its own step count included.
    """
    target, record = "layers.1.v_proj", []
    turns = iter([True, False, True])

    def scripted(_proxy, model, _batches):
        on = next(turns)
        return {n: float(n == target) if on else float(n != target) for n in lora.adapters(model)}

    step = train.train_step

    def watched(run, group, lr):
        loss = step(run, group, lr)
        layer = lora.adapters(run.model)[target]
        moments = [run.optimizer.state.get(p) for p in (layer.lora_A, layer.lora_B)]
        parts = [layer.lora_A, layer.lora_B, *(m[k] for m in moments for k in sorted(m))]
        record.append((layer.enabled, layer.lora_A.grad, [p.detach().clone() for p in parts]))
        return loss

    monkeypatch.setattr(train.proxies, "score", scripted)
    monkeypatch.setattr(train, "train_step", watched)
    extra = [
        "--epochs",
        "3",
        "--every",
        "1",
        "--weight-decay",
        "0.5",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main([*flags, *extra]) == 0
    assert [enabled for enabled, _, _ in record] == [True] * 5 + [False] * 5 + [True] * 5
    assert all(grad is None for _, grad, _ in record)
    at_end_of_on = record[4][2]
    for _, _, parts in record[5:10]:
        assert same(parts, at_end_of_on)
    steps = [i for i, part in enumerate(at_end_of_on) if part.ndim == 0]
    assert [record[-1][2][i].item() for i in steps] == [10.0, 10.0]
    assert not same(record[10][2], at_end_of_on)


@pytest.mark.parametrize("stop_after", [1, 4, 5, 6])
def test_resuming_through_a_reallocation_gives_the_same_bits(
    flags, tmp_path, monkeypatch, stop_after
):
    flags = [
        *flags,
        "--proxy",
        "snip",
        "--dropout",
        "0.1",
    ]  # snip: the first decision is a random tie
    pair = whole_and_interrupted(flags, tmp_path, monkeypatch, stop_after, signal.SIGTERM)
    whole, broken = pair
    assert (whole / "allocation.json").read_text() == (broken / "allocation.json").read_text()


def test_eval_only_keeps_what_is_off_off(flags, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*flags, "--out", str(out)])
    run = train.prepare(parse_flags(["--eval-only", "--resume", str(out)]), ExitStack())
    assert {n for n, a in lora.adapters(run.model).items() if a.enabled} == on_set(history(out)[-1])
    assert train.evaluate(run.model, run.task, run.dev) == {
        k: run_folder.read_log(out)[-1][k] for k in ("accuracy", "f1")
    }


def test_what_is_scored_is_the_beginning_of_the_training_set(flags):
    """The first examples, whatever batches they come in."""
    args = parse_flags([*flags, "--score-batches", "3"])
    run = train.set_up(args)
    found = []
    for batch in train.score_batches(run):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.append(ids[: mask.sum()].tolist())
    assert sorted(found) == sorted(e["input_ids"] for e in run.train[: 3 * args.batch_size])


def test_random_choice_is_said(flags, tmp_path, capsys):
    args = [*static(flags), "--proxy", "synflow", "--out", str(tmp_path / "run")]
    assert train.main(args) == 0
    assert "note: all synflow scores are zero: the choice is random" in capsys.readouterr().out
    by_rank = ["--proxy", "snip", "--per-rank", "yes", "--budget-params", "600", "--dry-run"]
    assert train.main([*static(flags), *by_rank]) == 0
    assert "note: all snip scores are zero: the choice is random" in capsys.readouterr().out


def test_a_score_that_is_not_finite_stops_the_run(flags, tmp_path, monkeypatch, capsys):
    step, out = train.train_step, tmp_path / "run"

    def poisoned(run, group, lr):
        loss = step(run, group, lr)
        with torch.no_grad():
            lora.adapters(run.model)["layers.1.v_proj"].lora_A[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(train, "train_step", poisoned)
    assert train.main([*flags, "--proxy", "snip", "--every", "0.2", "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the snip score of layers." in error and "is nan" in error
    assert checkpoint.read_last(out) == (None, "")  # in its first epoch


@pytest.mark.parametrize("proxy", ["random", "size", "constant", "grad_norm_slot"])
def test_every_kind_of_scores(flags, tmp_path, proxy):
    out = tmp_path / "run"
    assert train.main([*flags, "--proxy", proxy, "--out", str(out)]) == 0
    assert len(history(out)) == 6
    choices = len({frozenset(on_set(h)) for h in history(out)})
    scores = len({tuple(h["scores"].values()) for h in history(out)})
    if proxy == "grad_norm_slot":
        assert scores == 6  # the model has moved on
    else:  # sizes (all alike here) and a constant stay; ties and random numbers are drawn anew
        assert scores == (6 if proxy == "random" else 1) and choices > 1


def test_budget_in_parameters_of_modules_of_different_size(flags, tmp_path, capsys):
    """fc1 costs 2 (12 + 20) = 64, the rest 48; 200 is spent as well as it can be."""
    out = tmp_path / "run"
    extra = ["--targets", "q_proj,fc1", "--budget-params", "200"]
    assert train.main([*static(flags), *extra, "--out", str(out)]) == 0
    (decision,) = history(out)
    costs = json.loads((out / "allocation.json").read_text())["costs"]
    spent = sum(costs[n] for n in on_set(decision))
    assert sorted(set(costs.values())) == [48, 64] and spent <= 200
    assert run_folder.read_log(out)[-1]["trainable"]["adapters"] == spent
    assert f"(budget 200, {200 - spent} left)" in capsys.readouterr().out


def test_ranks_within_a_budget(flags, tmp_path, monkeypatch):
    """Each module has its own rank, the scaling of the full rank; resumption knows both."""
    out = tmp_path / "run"
    extra = ["--r", "4", "--budget-params", "600", "--per-rank", "yes"]
    assert train.main([*static(flags), *extra, "--out", str(out)]) == 0
    (decision,) = history(out)
    ranks = {name: len(kept) for name, kept in decision["on"].items()}
    assert 24 * sum(ranks.values()) == run_folder.read_log(out)[-1]["trainable"]["adapters"] <= 600
    assert len(set(ranks.values())) > 2
    run = train.prepare(parse_flags(["--eval-only", "--resume", str(out)]), ExitStack())
    for name, layer in lora.adapters(run.model).items():
        assert layer.enabled == (ranks[name] > 0)
        assert layer.scaling == (4 if name.endswith("proj") else 1)  # 16 / 4 and 4 / 4
        if ranks[name]:
            assert layer.lora_A.shape == (ranks[name], 12) and layer.r == ranks[name]
    assert (
        train.evaluate(run.model, run.task, run.dev)["accuracy"]
        == run_folder.read_log(out)[-1]["accuracy"]
    )


def test_kept_ranks_compute_what_they_did():
    m = tiny.adapted("bert")
    layer = lora.adapters(m)["layers.0.fc1"]
    a, b, s = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scaling
    keep_ranks(layer, [0, 2])
    expected = s * (torch.outer(b[:, 0], a[0]) + torch.outer(b[:, 2], a[2]))
    torch.testing.assert_close(layer.delta_w().detach(), expected, rtol=0, atol=1e-14)
    assert layer.r == 2 and layer.lora_alpha / layer.r == s
    with pytest.raises(ValueError, match="kept is empty"):
        keep_ranks(layer, [])


def test_presets_are_the_released_settings():
    args = parse_flags(["--preset", "heterolora-released"])
    expected = dict(r=8, lora_alpha=16, shortcut_alpha=4, keep=0.25, every=0.2, score_batches=32)
    expected |= dict(proxy="grad_norm", allocate="dynamic", shortcuts="all", weight_decay=0.01)
    assert {k: getattr(args, k) for k in expected} == expected
    assert args.targets == ["q_proj", "v_proj"] and args.schedule == "constant"
    uniform = parse_flags(["--preset", "uniform-r2-released", "--epochs", "3"])
    assert (uniform.r, uniform.allocate, uniform.epochs, uniform.shortcuts) == (2, "none", 3, "all")
    differ = {k for k, v in vars(uniform).items() if v != getattr(args, k)}
    assert differ <= {"r", "allocate", "preset", "epochs", "every", "score_batches", "keep"}
    released = {"heterolora-released", "uniform-r2-released", "delta-lora-released"}
    assert set(PRESETS) == {"lora", "heterolora", "uniform-r2", "delta-lora"} | released


def test_the_suggested_baseline_runs_and_spends_the_same(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*flags, "--keep", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "the same budget, spread evenly (264 parameters):" in printed
    command = printed[printed.index("python train.py --task") :].split()[2:]
    assert train.main([*command, "--out", str(tmp_path / "uniform")]) == 0
    done = run_folder.read_log(tmp_path / "uniform")[-1]
    assert done["trainable"]["adapters"] == 264  # rank 1 on 11 modules; the run had 5 of rank 2
    run = train.prepare(parse_flags(["--eval-only", "--resume", "uniform"]), ExitStack())
    scalings = {n: a.scaling for n, a in lora.adapters(run.model).items()}
    assert scalings == {n: 8.0 if n.endswith("proj") else 2.0 for n in scalings}  # 16 / 2, 4 / 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--allocate none --keep 0.5", "--keep needs --allocate static or dynamic"),
        ("--keep 0.5 --budget-params 100", "two budgets: give one"),
        ("--keep 0.01", "keep 0.01 of 11 modules is none"),
        ("--keep 1.5", "'1.5' is not a number from 0 to 1"),
        ("--budget-params 10", "less than the smallest module needs: 48"),
        ("--budget-params 0", "'0' is not an integer from 1"),
        ("--per-rank yes", "--per-rank yes needs --budget-params N"),
        ("--per-rank yes --budget-params 99 --proxy constant", "a --proxy out of grad_norm, snip"),
        ("--per-rank yes --budget-params 263", "less than one rank in each of 11 modules needs"),
        ("--when-off frozen --allocate static", "--when-off frozen needs --allocate dynamic"),
        ("--when-off in", "'in' is not one of out, frozen"),
        ("--rank apart", "a module's rank is --r, and --ranking says"),
        ("--proxy grad-norm", "did you mean 'grad_norm'"),
        ("--targets none --shortcuts none", "--r needs --targets or --shortcuts"),
        ("--shortcuts some", "'some' is not one of none, residual, cross, all"),
    ],
)
def test_conflicts_are_one_line(flags, tmp_path, monkeypatch, capsys, extra, message):
    import re

    monkeypatch.chdir(tmp_path)
    flags = flags[:-4]  # without --every and --keep
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*flags, *extra.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_plot_draws_what_was_decided(flags, tmp_path, mode, capsys):
    import matplotlib.pyplot as plt

    from tools import plot

    out = tmp_path / "run"
    train.main([*(static(flags) if mode == "static" else flags), "--out", str(out)])
    assert plot.main([str(out)]) == 0
    picture = plt.imread(out / "allocation.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05
    assert plot.main([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
