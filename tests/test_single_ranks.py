"""Single ranks that go on and off: the choice, the step, the run, and what is exported."""

import itertools
import json
import signal
from contextlib import ExitStack

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import allocate
import dense
import lora
import proxies
import tiny
import train
from delta_lora import DeltaLoRA
from relatives import rank_budget, rank_scores, rank_steps
from support import checkpoint, run_folder
from support.flags import parse_flags
from test_train import whole_and_interrupted
from tools import plot
from tools.faults import same
from tools.peft import reading, writing

OFF = {"layers.0.q_proj": [1], "layers.1.fc1": [0, 2], "layers.2.shortcut_sa": [0]}


def some_ranks_off(family="bert", when_off="out", **more):
    m = tiny.adapted(family, shortcuts=("residual_1", "shortcut_sa"), **more)
    for name, layer in lora.adapters(m).items():
        layer.when_off, layer.ranks_off = when_off, OFF.get(name, [])
    return m


@pytest.fixture
def flags(tmp_path):
    """11 modules of rank 4, a rank costs 24: 600 parameters are 25 ranks of 44. Weights decay."""
    model = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 4 --epochs 2 --batch-size 5 --lr 0.03 "
        "--log-every 1 --device cpu --schedule constant --warmup 0 --every 0.4 --weight-decay 0.3 "
        "--budget-params 600 --per-rank yes --allocate dynamic"
    )
    return text.split()


def history(folder):
    return json.loads((folder / "allocation.json").read_text())["history"]


# ------------------------------------------------------------------------------------- forward pass


@pytest.mark.parametrize("when_off", ["out", "frozen"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_forward_and_gradients_equal_dense_matrices(family, when_off):
    """What is on has the gradient that it has through dense matrices, what is off has none."""
    m = some_ranks_off(family, when_off)
    batch, layers = tiny.batch(m.config), lora.adapters(m)
    out = m(**batch)
    torch.testing.assert_close(out.logits, dense.logits(m, batch), rtol=0, atol=1e-11)
    whole = tiny.adapted(family, shortcuts=("residual_1", "shortcut_sa"))(**batch).logits
    moved = (out.logits - whole).abs().max()
    assert moved < 1e-12 if when_off == "frozen" else moved > 1e-3
    out.loss.backward()
    factors = [f for a in layers.values() for f in (a.lora_A, a.lora_B)]
    loss = nn.functional.cross_entropy(dense.logits(m, batch), batch["labels"])
    expected = iter(torch.autograd.grad(loss, factors))
    for name, layer in layers.items():
        on = [k not in OFF.get(name, []) for k in range(3)]
        for g, e in ((layer.lora_A.grad, next(expected)), (layer.lora_B.grad.T, next(expected).T)):
            torch.testing.assert_close(g[on], e[on], rtol=0, atol=1e-11)
            assert not g[[not x for x in on]].any()


def test_delta_w_and_merge_hold_what_is_on():
    m = some_ranks_off("opt")
    layer, batch = m.layers[1].fc1, tiny.batch(m.config)
    only = layer.scaling * torch.outer(layer.lora_B[:, 1], layer.lora_A[1])  # 0 and 2 are off
    torch.testing.assert_close(layer.delta_w(), only, rtol=0, atol=1e-14)
    before = m(**batch).logits
    lora.merge(m)
    torch.testing.assert_close(m(**batch).logits, before, rtol=0, atol=1e-11)


def test_counts_and_a_state_dict():
    """3 ranks of 24 parameters, 32 for fc1; six ranks of three modules are off or on."""
    m, other = (
        some_ranks_off(),
        tiny.adapted("bert", seed=4, shortcuts=("residual_1", "shortcut_sa")),
    )
    whole = lora.count_trainable(other)
    with torch.no_grad():
        m.layers[1].fc1.lora_B[:, 2] = 0  # off, and has learned nothing
    counts, stored = lora.count_trainable(m), lora.count_trainable(m, stored=True)
    less = {"layers.0.q_proj": 24, "layers.1.fc1": 2 * 32, "layers.2.shortcut_sa": 24}
    assert {n: whole[n] - counts[n] for n in whole if whole[n] != counts[n]} == less
    assert {n: whole[n] - stored[n] for n in whole if whole[n] != stored[n]} == {"layers.1.fc1": 32}
    batch = tiny.batch(m.config)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(**batch).logits, m(**batch).logits)
    assert {n: a.ranks_off for n, a in lora.adapters(other).items() if a.ranks_off} == OFF


@pytest.mark.parametrize("proxy", ["grad_norm", "snip", "synflow", "fisher"])
def test_scoring_takes_every_rank_and_leaves_them_off(proxy):
    m = some_ranks_off()
    whole = tiny.adapted("bert", shortcuts=("residual_1", "shortcut_sa"))
    batches = [tiny.batch(m.config, seed=i) for i in range(2)]
    assert proxies.score(proxy, m, batches) == proxies.score(proxy, whole, batches)
    assert {n: a.ranks_off for n, a in lora.adapters(m).items() if a.ranks_off} == OFF


# --------------------------------------------------------------------------------------- the choice


def test_the_best_parts_with_one_in_every_module():
    """Against all 2^9 sets, at every budget from the least that is allowed to all there is."""
    rng = torch.Generator().manual_seed(0)
    costs = {"layers.0.q_proj": 5, "layers.0.fc1": 9, "layers.1.q_proj": 7}
    for budget in range(21, 65):
        table = torch.rand(3, 3, generator=rng, dtype=torch.float64).tolist()
        table[0] = [x / 50 for x in table[0]]  # a module that would not be chosen freely
        scores = dict(zip(costs, table, strict=True))
        kept = rank_budget.ranks_within_budget(scores, costs, budget, one_each=True)
        spent = sum(costs[n] * len(ks) for n, ks in kept.items())
        assert all(kept.values()) and spent <= budget
        best = max(
            sum(table[i][k] for i in range(3) for k in range(3) if mask[3 * i + k])
            for mask in itertools.product((0, 1), repeat=9)
            if all(any(mask[3 * i : 3 * i + 3]) for i in range(3))
            and sum(c * sum(mask[3 * i : 3 * i + 3]) for i, c in enumerate(costs.values()))
            <= budget
        )
        total = sum(scores[n][k] for n, ks in kept.items() for k in ks)
        assert total == pytest.approx(best, rel=1e-12)


def test_less_than_one_each_is_refused():
    costs = {"layers.0.q_proj": 5, "layers.0.fc1": 9}
    scores = {name: [1.0, 2.0] for name in costs}
    with pytest.raises(
        ValueError, match=r"13 parameters is less than one rank in each of 2 .*: 14"
    ):
        rank_budget.ranks_within_budget(scores, costs, 13, one_each=True)
    kept = rank_budget.ranks_within_budget(scores, costs, 14, one_each=True)
    assert kept == {"layers.0.q_proj": [1], "layers.0.fc1": [1]}


def test_ties_are_drawn():
    """All scores equal: over many generators every rank is kept about as often as another."""
    names = [f"layers.{i}.q_proj" for i in range(3)]
    times = torch.zeros(3, 4)
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        scores = {name: [0.0] * 4 for name in names}
        costs = dict.fromkeys(names, 24)
        kept = rank_budget.ranks_within_budget(scores, costs, 150, generator, one_each=True)
        assert sum(map(len, kept.values())) == 6
        for i, name in enumerate(names):
            times[i, kept[name]] += 1
    assert (times - 200).abs().max() < 45  # 6 of 12: sd 10


@pytest.mark.parametrize("one_each", [False, True])
def test_ties_do_not_depend_on_the_order_of_the_names(one_each):
    names = [f"layers.{i}.q_proj" for i in range(3)]
    for seed in range(20):
        found = []
        for order in (names, names[::-1]):
            generator = torch.Generator().manual_seed(seed)
            scores, costs = ({n: v for n in order} for v in ([0.0] * 4, 24))
            kept = rank_budget.ranks_within_budget(scores, costs, 150, generator, one_each)
            found.append(kept)
        assert found[0] == found[1]


def test_random_scores_are_of_single_parts():
    generator = torch.Generator().manual_seed(0)
    costs = {"layers.0.q_proj": 24, "layers.0.fc1": 32}
    scores = rank_scores.random_ranks(costs, 3, generator)
    assert sorted(itertools.chain(*scores.values())) == pytest.approx([i / 6 for i in range(1, 7)])
    assert scores != rank_scores.random_ranks(costs, 3, generator)


# ----------------------------------------------------------------------------------------- the step


def adamw_by_hand(value, state, gradient, lr, decay):
    """One step of AdamW (arXiv 1711.05101, Algorithm 2) on a vector; state is (t, m, v)."""
    t, m, v = state
    t, m, v = t + 1, 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return value - lr * decay * value - lr * step, (t, m, v)


def turns(step, i):
    """Which of three ranks of module i are off before a step: they come and go."""
    return [[], [1], [0, 2], [1], []][(step // 2 + i) % 5]


@pytest.mark.parametrize("when_off", ["out", "frozen"])
def test_steps_equal_adamw_by_hand_on_the_sliced_parameters(when_off):
    """Each row of A and column of B has moments and a step count, which wait while it is off."""
    m = some_ranks_off(when_off=when_off)
    layers = lora.adapters(m)
    ranks = rank_steps.RankSteps(m)
    optimizer = ranks.adamw(0.02, 0.4)
    vectors = {  # (module, factor, k) -> vector
        (n, key, k): (a.lora_A[k] if key == "A" else a.lora_B[:, k]).detach().clone()
        for n, a in layers.items()
        for key in "AB"
        for k in range(3)
    }
    states = {key: (0, 0 * x, 0 * x) for key, x in vectors.items()}
    head = m.classifier.weight.detach().clone()
    for step in range(14):
        for i, layer in enumerate(layers.values()):
            layer.ranks_off = turns(step, i)
        m(**tiny.batch(m.config, seed=step)).loss.backward()
        for (name, key, k), x in vectors.items():
            if k not in layers[name].ranks_off:
                a = layers[name]
                g = (a.lora_A.grad[k] if key == "A" else a.lora_B.grad[:, k]).clone()
                vectors[name, key, k], states[name, key, k] = adamw_by_hand(
                    x, states[name, key, k], g, 0.02, 0.4
                )
        ranks.before_step()
        optimizer.step()
        ranks.after_step()
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in m.parameters() if p.requires_grad)
        for (name, key, k), x in vectors.items():
            a = layers[name]
            found = (a.lora_A[k] if key == "A" else a.lora_B[:, k]).detach()
            torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    assert len({t for t, _, _ in states.values()}) > 2  # they were on for different times
    assert not torch.equal(m.classifier.weight, head)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("when_off", ["out", "frozen"])
def test_delta_lora_moves_by_what_trained(when_off, lazy):
    """W moves by the changes of the ranks that are on: W_T - W_0 = lambda s times their sum.

    The export has what is in W and in the forward pass, and no more.
    """
    m = some_ranks_off(when_off=when_off)
    layers, w0 = lora.adapters(m), {n: p.clone() for n, p in m.named_parameters()}
    delta, ranks = DeltaLoRA(m, 0.8, 1, lazy), rank_steps.RankSteps(m)
    optimizer = ranks.adamw(0.02, 0.4)
    expected = {n: 0.0 for n in delta.adapters}
    for step in range(9):
        for i, layer in enumerate(layers.values()):
            layer.ranks_off = turns(step, i)
        before = {
            (n, k): torch.outer(a.lora_B[:, k], a.lora_A[k]).detach()
            for n, a in layers.items()
            for k in range(3)
        }
        m(**tiny.batch(m.config, seed=step)).loss.backward()
        for part in (delta, ranks):
            part.before_step()
        optimizer.step()
        for part in (ranks, delta):
            part.after_step()
        optimizer.zero_grad()
        for name, k in itertools.product(expected, range(3)):
            a = layers[name]
            change = torch.outer(a.lora_B[:, k], a.lora_A[k]).detach() - before[name, k]
            if k in a.ranks_off:
                assert not change.any()
            elif step >= 2:
                expected[name] = expected[name] + 0.8 * a.scaling * change
    exported = delta.export()
    for name, change in expected.items():
        layer = layers[name]
        if not lazy:
            moved = layer.base.weight - w0[f"{name}.base.weight"]
            torch.testing.assert_close(moved, change, rtol=0, atol=1e-13)
        in_forward = range(3) if when_off == "frozen" else set(range(3)) - set(layer.ranks_off)
        for k in in_forward:
            change = change + layer.scaling * torch.outer(layer.lora_B[:, k], layer.lora_A[k])
        A, B = exported[name]
        torch.testing.assert_close(B @ A, change.detach(), rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("extra", ["", "--proxy snip", "--proxy random", "--when-off frozen"])
def test_budget_schedule_and_what_is_off_in_a_run(flags, tmp_path, monkeypatch, capsys, extra):
    """Exactly 25 ranks, one in every module, at every decision; what is off keeps its bits."""
    out, record, step = tmp_path / "run", [], train.train_step

    def watched(run, group, lr):
        before = {
            (n, k): (a.lora_A[k].detach().clone(), a.lora_B[:, k].detach().clone())
            for n, a in lora.adapters(run.model).items()
            for k in range(4)
        }
        moments = {
            (n, k): [dict(run.optimizer.state.get(p, {})) for p in run.ranks.parts[n][k]]
            for n, k in before
        }
        moments = {
            key: [{x: t.clone() for x, t in found.items()} for found in both]
            for key, both in moments.items()
        }
        loss = step(run, group, lr)
        for (name, k), (row, column) in before.items():
            layer = lora.adapters(run.model)[name]
            stays = torch.equal(layer.lora_A[k], row) and torch.equal(layer.lora_B[:, k], column)
            now = [dict(run.optimizer.state.get(p, {})) for p in run.ranks.parts[name][k]]
            assert same(moments[name, k], now) == stays == (k in layer.ranks_off)
        record.append(sum(4 - len(a.ranks_off) for a in lora.adapters(run.model).values()))
        return loss

    monkeypatch.setattr(train, "train_step", watched)
    assert train.main([*flags, *extra.split(), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert record == [25] * 10
    assert [h["step"] for h in history(out)] == [0, 2, 4, 5, 7, 9]
    for h in history(out):
        assert all(h["on"].values()) and sum(map(len, h["on"].values())) == 25
        assert all(len(scores) == 4 for scores in h["scores"].values())
    # snip: a part that never was on keeps B_k = 0 and scores 0, so the first choice stays
    changes = len({json.dumps(h["on"]) for h in history(out)})
    assert changes == 1 if "snip" in extra else changes > 1
    assert printed.count("11 of 11 modules on, 600 parameters (budget 600, 0 left)") == 6
    assert "600 parameters on single ranks" in printed and "▒" in printed and "█" in printed
    done = run_folder.read_log(out)[-1]
    ever = {(n, k) for h in history(out) for n, kept in h["on"].items() for k in kept}
    assert done["trainable"]["adapters"] == 600 and done["stored"] == 24 * len(ever)
    assert (done["stored"] > 600) == (changes > 1)
    assert plot.main([str(out)]) == 0
    assert plt.imread(out / "allocation.png").std() > 0.05


@pytest.mark.parametrize("budget", ["264", "299", "1056", "2000"])
def test_budgets_at_the_edges(flags, tmp_path, budget):
    """One rank each and nothing left; a rest that buys nothing or one more; more than there is."""
    out = tmp_path / "run"
    assert train.main([*flags, "--budget-params", budget, "--out", str(out)]) == 0
    expected = {"264": 11, "299": 12, "1056": 44, "2000": 44}[budget]
    assert all(sum(map(len, h["on"].values())) == expected for h in history(out))


@pytest.mark.parametrize(
    ("stop_after", "extra"),
    [(1, "--dropout 0.1"), (3, "--delta-ratio 2"), (5, "--when-off frozen"), (8, "--clip 0.1")],
)
def test_resuming_gives_the_same_bits(flags, tmp_path, monkeypatch, stop_after, extra):
    """In the middle of an epoch, between two decisions and at one, with choices that move."""
    flags = [*flags, "--proxy", "random", *extra.split()]
    whole, broken = whole_and_interrupted(flags, tmp_path, monkeypatch, stop_after, signal.SIGTERM)
    for name in ("allocation.json", "adapter.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


@pytest.mark.parametrize("extra", ["", "--when-off frozen", "--delta-ratio 2 --delta-start -1"])
def test_the_exports_compute_what_was_measured(flags, tmp_path, extra):
    """Equal logits of --eval-only, load_adapter, merge and a PEFT folder.

    They hold the ranks that are in the forward pass alone.
    """
    out = tmp_path / "run"
    more = ["--shortcuts", "none", "--budget-params", "240", *extra.split(), "--out", str(out)]
    assert train.main([*flags, *more]) == 0
    args = parse_flags(["--eval-only", "--resume", str(out)])
    run = train.prepare(args, ExitStack())
    done, layers = run_folder.read_log(out)[-1], lora.adapters(run.model)
    expected = {k: done[k] for k in ("accuracy", "f1")}
    assert train.evaluate(run.model, run.task, run.dev) == expected
    assert sum(4 - len(a.ranks_off) for a in layers.values()) == 10
    batch = train.batch_of(run.model.eval(), run.dev)
    logits = run.model(**batch).logits
    fresh, _ = train.load_pretrained(args.model)
    loaded = lora.load_adapter(fresh.eval(), out)
    if not extra:
        assert torch.equal(fresh(**batch).logits, logits)
        assert {n: a.r for n, a in loaded.items()} == {
            n: 4 - len(a.ranks_off) for n, a in layers.items()
        }
    torch.testing.assert_close(fresh(**batch).logits, logits, rtol=0, atol=1e-5)
    peer, _ = train.load_pretrained(args.model)
    writing.export(out, tmp_path / "peft")
    reading.put(peer, *reading.read(tmp_path / "peft", peer))
    torch.testing.assert_close(peer.eval()(**batch).logits, logits, rtol=0, atol=1e-5)
    lora.merge(run.model)
    torch.testing.assert_close(run.model(**batch).logits, logits, rtol=0, atol=1e-5)


def test_static_single_ranks_by_chance(flags, tmp_path):
    """The baseline of the static choice: other seeds, other ranks; it shrinks as ever."""
    kept = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        more = ["--allocate", "static", "--proxy", "random", "--seed", seed, "--out", str(out)]
        every = flags.index("--every")
        assert train.main([*flags[:every], *flags[every + 2 :], *more]) == 0
        (decision,) = history(out)
        kept.append(decision["on"])
        stored = checkpoint.read_last(out)[0]["parameters"]
        assert all(len(stored[f"{n}.lora_A"]) == len(ks) for n, ks in decision["on"].items() if ks)
    assert kept[0] != kept[1] and all(sum(map(len, k.values())) == 25 for k in kept)


def test_every_choice_is_a_proxy_or_a_baseline():
    assert set(rank_scores.CHOICES) <= {*proxies.PROXIES, *allocate.BASELINES}
