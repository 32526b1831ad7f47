"""Rank allocators against their rules written by hand, as parts of runs, and the theorem."""

from contextlib import ExitStack

import pytest
import torch

import lora
import tiny
import train
from relatives import METHODS, adalora, alora, expressive_power, rank_steps
from relatives import exchange as exchange_module
from relatives.exchange import exchange, importance
from support import run_folder
from support.flags import parse_flags
from test_distributed import in_processes
from test_train import whole_and_interrupted

F64 = torch.float64


@pytest.fixture
def flags(tmp_path):
    """24 examples, 5 a step: 5 steps an epoch, 10 in all."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 4 --epochs 2 --batch-size 5 --lr 0.03 "
        "--log-every 1 --device cpu --schedule constant --warmup 0 --weight-decay 0.3 --every 0.2"
    )
    return text.split()


def with_e(seed=0, r=3, **more):
    """The tiny BERT with AdaLoRA on q and fc1, every factor random."""
    m = tiny.model("bert", seed)
    adapter = adalora.AdaLoRALayer
    lora.inject(m, ("q_proj", "fc1"), r=r, lora_alpha=5, adapter=adapter, **more)
    tiny.randomise([f for a in lora.adapters(m).values() for f in a.factors().values()], seed + 1)
    lora.mark_trainable(m)
    return m


def masks_of(m, steps=12, interval=1, keep=0.5):
    return adalora.AdaLoRA(m, steps=steps, interval=interval, keep=keep)


# ------------------------------------------------------------------------------------------ AdaLoRA


def test_the_last_budget_is_rounded_down():
    """0.42 * 18 is 7.56; 0.7 * 90 is 63, though 62.99999999999999 by floats."""
    assert masks_of(with_e(), keep=0.42).target == 7
    m = tiny.model("bert")
    lora.inject(m, ("q_proj", "k_proj", "fc1"), r=10, adapter=adalora.AdaLoRALayer)
    masks = masks_of(m, keep=0.7)
    assert (masks.total, masks.target) == (90, 63)


def test_at_the_start_e_is_zero_and_a_and_b_are_small():
    m = tiny.model("bert")
    before = m(**tiny.batch(m.config)).logits
    lora.inject(m, ("q_proj", "fc1"), r=9, adapter=adalora.AdaLoRALayer)
    assert torch.equal(m(**tiny.batch(m.config)).logits, before)
    layer = m.layers[1].fc1
    drawn = torch.cat([layer.lora_A.flatten(), layer.lora_B.flatten()])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.1) and not layer.lora_E.any()
    counts = lora.mark_trainable(m)
    assert counts["layers.1.fc1"] == 9 * (12 + 1 + 20)  # r (in + 1 + out)


def test_e_of_ones_is_lora_and_any_e_is_lora_with_e_in_a():
    """Logits and gradients: dL/dA = E o dL/d(E A), dL/dE_k = <A_k, dL/d(E A)_k>."""
    for ones in (True, False):
        m, plain = with_e(), tiny.model("bert")
        lora.inject(plain, ("q_proj", "fc1"), r=3, lora_alpha=5)
        lora.mark_trainable(plain)
        layers, others = lora.adapters(m), lora.adapters(plain)
        with torch.no_grad():
            for name, layer in layers.items():
                if ones:
                    layer.lora_E.fill_(1)
                others[name].lora_A.copy_(torch.diag(layer.lora_E[:, 0]) @ layer.lora_A)
                others[name].lora_B.copy_(layer.lora_B)
        batch = tiny.batch(m.config)
        out, expected = m(**batch), plain(**batch)
        torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-12)
        out.loss.backward()
        expected.loss.backward()
        for name, layer in layers.items():
            of_ea = others[name].lora_A.grad
            torch.testing.assert_close(layer.lora_A.grad, layer.lora_E * of_ea, rtol=0, atol=1e-12)
            of_e = (layer.lora_A * of_ea).sum(1, keepdim=True)
            torch.testing.assert_close(layer.lora_E.grad, of_e, rtol=0, atol=1e-12)
            torch.testing.assert_close(layer.delta_w(), others[name].delta_w(), rtol=0, atol=1e-12)


def test_a_zero_in_e_takes_out_its_triplet_alone():
    m = with_e()
    layer = m.layers[0].fc1
    whole = layer.delta_w().detach()
    part = layer.scaling * layer.lora_E[1] * torch.outer(layer.lora_B[:, 1], layer.lora_A[1])
    with torch.no_grad():
        layer.lora_E[1] = 0
    torch.testing.assert_close(layer.delta_w(), whole - part, rtol=0, atol=1e-12)
    A, B = layer.pair()
    assert A.shape == (2, 12) and B.shape == (20, 2)
    torch.testing.assert_close(B @ A, layer.delta_w(), rtol=0, atol=1e-12)


def test_the_schedule_by_hand():
    """36 to 18 over 12 steps, t_i 2, t_f 6: 18 + 18 (1, 27/64, 1/8, 1/64, 0), rounded down."""
    found = [adalora.budget(t, 36, 18, 2, 6) for t in range(1, 13)]
    assert found == [36, 36, 25, 20, 18, 18, 18, 18, 18, 18, 18, 18]


def test_scores_and_masks_by_brute_force():
    """Twelve steps: moving averages entry by entry as sums over the past, masks by counting."""
    m = with_e()
    layers = lora.adapters(m)
    masks, optimizer = masks_of(m, keep=0.4), torch.optim.SGD(lora.trainable(m).values(), lr=0.1)
    past = {name: [] for name in masks.factors}
    final = None
    for t in range(1, 13):
        m(**tiny.batch(m.config, seed=t)).loss.backward()
        masks.before_step()
        for name, w in masks.factors.items():
            past[name].append((w * w.grad).abs().detach())
        optimizer.step()
        moved = {n: a.lora_E.detach().clone() for n, a in layers.items()}
        masks.after_step()
        optimizer.zero_grad()
        if t <= 6:  # after that scores stand still
            scores = by_hand(past, layers)
        if t <= 2:
            assert all(torch.equal(a.lora_E, moved[n]) for n, a in layers.items())
            continue
        if t <= 6:
            b = [None, None, None, 11, 8, 7, 7][t]  # int(7 + 11 (27/64, 1/8, 1/64, 0))
            kept = {x for x, s in scores.items() if sum(o > s for o in scores.values()) < b}
            final = kept
            assert len(kept) == b
        for name, layer in layers.items():
            for k in range(3):
                expected = (
                    moved[name][k]
                    if (name, k) in (kept if t <= 6 else final)
                    else 0 * moved[name][k]
                )
                assert torch.equal(layer.lora_E[k], expected), (t, name, k)
    assert sum(int((a.lora_E != 0).sum()) for a in layers.values()) == 7 == masks.target


def by_hand(past, layers):
    """{(module, k): S_k} from the list of |w dL/dw|: I_t = 0.15 sum 0.85^(t - i) x_i."""
    entries = {}
    for name, values in past.items():
        sums = [
            sum(0.15 * 0.85 ** (t - i) * values[i] for i in range(t + 1))
            for t in range(len(values))
        ]
        gaps = [(x - s).abs() for x, s in zip(values, sums, strict=True)]
        last = len(values) - 1
        entries[name] = sums[-1] * sum(0.15 * 0.85 ** (last - i) * g for i, g in enumerate(gaps))
    return {
        (n, k): entries[f"{n}.lora_E"][k, 0].item()
        + sum(entries[f"{n}.lora_A"][k].tolist()) / a.in_features
        + sum(entries[f"{n}.lora_B"][:, k].tolist()) / a.out_features
        for n, a in layers.items()
        for k in range(a.r)
    }


def test_masks_are_due_at_the_interval_and_the_last_one_stands():
    """t_i 4, t_f 12, every 3rd step: 18 ranks, 11 = int(7 + 11 (6/8)^3) at 6, 7 at 9, 7 from 12."""
    m = with_e()
    layers = lora.adapters(m).values()
    masks, kept = masks_of(m, steps=24, interval=3, keep=0.4), []
    for t in range(24):
        for values in (masks.sensitivity, masks.uncertainty):
            tiny.randomise(values.values(), seed=t)  # at every step others would be the best
        with torch.no_grad():
            for layer in layers:
                layer.lora_E.fill_(1.0)
        masks.after_step()
        kept.append(torch.cat([layer.lora_E.detach().flatten() for layer in layers]))
    expected = [18] * 5 + [11, 18, 18, 7, 18, 18] + [7] * 13
    assert [int(e.sum()) for e in kept] == expected
    assert all(torch.equal(e, kept[11]) for e in kept[11:])


def test_what_is_masked_can_return():
    """Its E is 0, its A and B stay: with other scores it is chosen, and E moves from 0."""
    m = with_e()
    masks, layer = masks_of(m, steps=100, keep=0.3), m.layers[0].fc1
    masks.t = 40
    for name, value in masks.sensitivity.items():
        value.fill_(1.0 if name.startswith("layers.0.fc1") else 2.0)
        masks.uncertainty[name].fill_(1.0)
    masks.after_step()
    assert not layer.lora_E.any()
    for name, value in masks.sensitivity.items():
        value.fill_(3.0 if name.startswith("layers.0.fc1") else 2.0)
    with torch.no_grad():
        layer.lora_E += 0.5  # the optimizer's step
    masks.after_step()
    assert (layer.lora_E == 0.5).all()


def test_ties_keep_exactly_the_budget():
    m = with_e()
    masks = masks_of(m, keep=0.4)
    masks.t = 5
    masks.after_step()  # every score is 0
    assert sum(int((a.lora_E != 0).sum()) for a in lora.adapters(m).values()) == 7


def test_the_penalty_by_finite_differences():
    m = with_e()
    masks = masks_of(m)
    layers = lora.adapters(m).values()

    def penalty():
        norms = []
        for a in layers:
            norms.append((a.lora_A @ a.lora_A.T - torch.eye(3, dtype=F64)).square().sum().sqrt())
            norms.append((a.lora_B.T @ a.lora_B - torch.eye(3, dtype=F64)).square().sum().sqrt())
        return 0.1 * sum(norms) / len(norms)

    for p in lora.trainable(m).values():
        p.grad = torch.zeros_like(p)
    masks.before_step()
    for a in layers:
        assert not a.lora_E.grad.any()
        for p in (a.lora_A, a.lora_B):
            for i, j in ((0, 1), (2, 2)):
                with torch.no_grad():
                    p[i, j] += 1e-5
                    up = penalty()
                    p[i, j] -= 2e-5
                    slope = (up - penalty()) / 2e-5
                    p[i, j] += 1e-5
                assert p.grad[i, j].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


def test_a_run_of_adalora(flags, tmp_path):
    """Half of the ranks in the end, of q and v; what is saved is plain LoRA with equal logits."""
    out = tmp_path / "run"
    words = [*flags, "--allocate", "adalora", "--shortcuts", "none", "--out", str(out)]
    assert train.main(words) == 0
    run = train.prepare(parse_flags(["--eval-only", "--resume", str(out)]), ExitStack())
    layers = lora.adapters(run.model)
    assert sum(int((a.lora_E != 0).sum()) for a in layers.values()) == 8
    exported, _ = train.load_pretrained(run.args.model, num_labels=2, seed=0)
    loaded = lora.load_adapter(exported, out)
    assert all(type(a) is lora.LoRALayer and a.scaling == 1 for a in loaded.values())
    batch = tiny.batch(run.model.config)
    run.model.eval()
    torch.testing.assert_close(
        exported.eval()(**batch).logits, run.model(**batch).logits, rtol=0, atol=1e-5
    )
    assert run.allocator.t == 10


# -------------------------------------------------------------------------------------------- ALoRA


def test_places_that_are_closed_compute_nothing():
    """At the start a module is LoRA of rank r, to the bits of A, at the scale of r."""
    one, other = tiny.model("bert"), tiny.model("bert")
    lora.inject(one, ("q_proj", "fc1"), r=3, lora_alpha=5, adapter=alora.ALoRALayer)
    lora.inject(other, ("q_proj", "fc1"), r=3, lora_alpha=5)
    for name, layer in lora.adapters(one).items():
        plain = lora.adapters(other)[name]
        assert torch.equal(layer.lora_A[:3], plain.lora_A) and layer.scaling == plain.scaling
        with torch.no_grad():
            layer.lora_B.normal_()
            plain.lora_B.copy_(layer.lora_B[:, :3])
    batch = tiny.batch(one.config)
    torch.testing.assert_close(one(**batch).logits, other(**batch).logits, rtol=0, atol=1e-12)
    assert lora.mark_trainable(one) == lora.mark_trainable(other)


def ranks_alone(m, batches=(0, 1), steps=100, **more):
    """An ALoRA over a model, with the parts that an optimizer would step."""
    ranks, forgotten = rank_steps.RankSteps(m), []
    rule = alora.ALoRA(
        m,
        steps=steps,
        per_epoch=2,
        interval=3,
        batches=lambda: [tiny.batch(m.config, seed=i) for i in batches],
        generator=torch.Generator().manual_seed(0),
        parts=ranks.parts,
        forget=forgotten.append,
        **more,
    )
    return rule, ranks, forgotten


def of_two(seed=0):
    """Two modules of two ranks, four places each, B random."""
    m = tiny.model("bert", seed)
    lora.inject(m, ("q_proj",), r=2, lora_alpha=5, adapter=alora.ALoRALayer)
    m.layers[2].q_proj = m.layers[2].q_proj.base
    tiny.randomise([a.lora_B for a in lora.adapters(m).values()], seed + 1, std=2.0)
    lora.mark_trainable(m)
    return m


def test_importance_by_deleting_ranks():
    """IS on two modules, each rank's loss from a model in which columns of B are zeroed."""
    m = of_two()
    rule, _, _ = ranks_alone(m)
    found = importance(m, rule.batches())
    names = list(lora.adapters(m))
    ranks = [(n, k) for n in names for k in (0, 1)]

    def loss(on):
        other = of_two()
        for n, a in lora.adapters(other).items():
            for k in range(4):
                if (n, k) not in on:
                    a.lora_B.data[:, k] = 0
        parts = [other(**tiny.batch(m.config, seed=i)).loss.item() for i in (0, 1)]
        return sum(parts) / 2

    for rank in ranks:
        expected = -loss(ranks) + loss([x for x in ranks if x != rank]) - loss([rank])
        assert found[rank] == pytest.approx(expected, abs=1e-12)
    assert found.keys() == set(ranks) and len(set(found.values())) == 4


def test_gates_are_as_they_were_when_a_loss_raises(monkeypatch):
    m, calls = of_two().train(), []
    gates = [[1], [2, 3]]
    for layer, off in zip(lora.adapters(m).values(), gates, strict=True):
        layer.ranks_off = off
    original = exchange_module.mean_loss

    def third_raises(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(exchange_module, "mean_loss", third_raises)
    with pytest.raises(KeyboardInterrupt):
        importance(m, [tiny.batch(m.config)])
    assert [a.ranks_off for a in lora.adapters(m).values()] == gates and m.training


def test_importance_does_not_depend_on_how_tokens_are_cut_into_batches():
    """A loss of text is a mean over tokens: the long sequences count for more."""
    m = tiny.model("llama", head="lm")
    lora.inject(m, ("q_proj",), r=2, lora_alpha=5, adapter=alora.ALoRALayer)
    tiny.randomise([a.lora_B for a in lora.adapters(m).values()], 1, std=2.0)
    whole = tiny.batch(m.config, lengths=(9, 7, 4, 3))
    cut = [{key: value[rows] for key, value in whole.items()} for rows in ([0, 1], [2, 3])]
    found, again = importance(m, [whole]), importance(m, cut)
    assert found == pytest.approx(again, abs=1e-12) and len(set(found.values())) > 2


def test_importance_is_measured_without_dropout():
    m = of_two()
    batches = [tiny.batch(m.config)]
    expected, state = importance(m.eval(), batches), torch.get_rng_state()
    for layer in lora.adapters(m).values():
        layer.lora_dropout = 0.5
    assert importance(m.train(), batches) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_places_are_no_more_than_a_matrix_has_ranks():
    """12 in, 20 out: 9 ranks and 3 more places, at the scale of 9; 13 ranks are refused."""
    layer = alora.ALoRALayer(torch.nn.Linear(12, 20), 12, 20, r=9, lora_alpha=18)
    assert (layer.r, layer.ranks_off, layer.scaling) == (12, [9, 10, 11], 2)
    with pytest.raises(ValueError, match="r is 13, allowed: an integer from 1 to 12"):
        alora.ALoRALayer(torch.nn.Linear(12, 20), 12, 20, r=13, lora_alpha=18)


def test_who_loses_and_who_gains():
    """n = 4 modules. The 4 worst are of a, b and e; c alone lost none, and has room for two."""
    scores = {("a", 0): 0.1, ("a", 1): 0.2, ("b", 0): 0.3, ("b", 1): 9.0}
    scores |= {("c", 0): 5.0, ("c", 1): 4.0, ("e", 0): 7.0, ("e", 1): 1.0}
    on = dict.fromkeys("abce", 2)
    assert exchange(scores, dict.fromkeys("abce", 6), on) == (
        [("a", 0), ("a", 1), ("b", 0), ("e", 1)],
        {"c": 4},
    )
    pruned, grown = exchange(scores, dict.fromkeys("abce", 4), on)
    assert pruned == [("a", 0), ("a", 1)] and grown == {"c": 2}


def test_one_each_in_the_order_of_mean_importance():
    scores = {("a", 0): 0.1, ("a", 1): 0.2, ("a", 2): 0.3, ("b", 0): 3.0, ("c", 0): 5.0}
    pruned, grown = exchange(scores, dict.fromkeys("abc", 4), {"a": 3, "b": 1, "c": 1})
    assert pruned == [("a", 0), ("a", 1), ("a", 2)] and grown == {"c": 2, "b": 1}


def test_a_module_that_holds_no_rank_is_the_first_to_get_one():
    """Importance is mostly negative, and that of nothing is 0."""
    scores = {("a", 0): -0.9, ("a", 1): -0.8, ("a", 2): -0.7, ("b", 0): -0.5}
    pruned, grown = exchange(scores, dict.fromkeys("abe", 4), {"a": 3, "b": 1, "e": 0})
    assert pruned == [("a", 0), ("a", 1), ("a", 2)] and grown == {"e": 2, "b": 1}


@pytest.mark.parametrize("r", [0, 2.5, "3", 13])
def test_a_rank_that_alora_cannot_have_is_refused(r):
    with pytest.raises(ValueError, match=f"r is {r!r}, allowed: an integer from 1 to 12"):
        alora.ALoRALayer(torch.nn.Linear(12, 20), 12, 20, r)


def test_among_equals_the_order_is_that_of_the_names():
    """Of a set it is another one in each process, which would then grow other ranks."""
    empty = [f"layers.{i}.{p}" for i in range(9) for p in ("q_proj", "v_proj")]
    scores = {("fc1", 0): 1.0, ("fc1", 1): 2.0}
    on = {**dict.fromkeys(empty, 0), "fc1": 2}
    _, grown = exchange(scores, dict.fromkeys(on, 1), on)
    assert list(grown) == sorted(empty) and list(grown.values())[:3] == [1, 1, 0]


def test_a_round_keeps_the_budget_and_the_outputs_of_what_grows():
    """New ranks have B = 0, so only what is pruned is missing; their moments are dropped."""
    m = of_two(1)
    rule, ranks, forgotten = ranks_alone(m)
    scores = importance(m, rule.batches())
    on = {n: 2 for n in lora.adapters(m)}
    pruned, grown = exchange(scores, dict.fromkeys(on, 4), on)
    other = of_two(1)
    for name, k in pruned:
        lora.adapters(other)[name].lora_B.data[:, k] = 0
    state = torch.get_rng_state()
    rule.round()
    assert torch.equal(torch.get_rng_state(), state) and m.training
    batch = tiny.batch(m.config)
    torch.testing.assert_close(m(**batch).logits, other(**batch).logits, rtol=0, atol=1e-12)
    layers = lora.adapters(m)
    assert sum(a.r - len(a.ranks_off) for a in layers.values()) == 4
    assert len(forgotten) == 2 * len(pruned) > 0
    assert not any(layers[n].lora_B[:, k].any() for n, k in pruned)
    (gained,) = [n for n, count in grown.items() if count]
    new = [
        k
        for k in range(4)
        if k not in layers[gained].ranks_off and not layers[gained].lora_B[:, k].any()
    ]
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randn(12, generator=rng) for _ in new]) / 6
    # uniform within 1 / sqrt(12), as A is at first, has the variance (1 / 6)^2
    assert len(new) == grown[gained]
    torch.testing.assert_close(layers[gained].lora_A[new], drawn.double(), rtol=1e-6, atol=0)
    assert all(any(p is q for q in forgotten) for k in new for p in ranks.parts[gained][k])


def test_when_a_round_is(monkeypatch):
    """After 2 steps (an epoch), then every 3: eight at most, the last with 3 steps to follow."""
    m = of_two()
    for steps, expected in (
        (100, [2, 5, 8, 11, 14, 17, 20, 23]),
        (14, [2, 5, 8, 11]),
        (13, [2, 5, 8]),
        (5, [2]),
    ):
        rule, _, _ = ranks_alone(m, steps=steps)
        rounds = []
        monkeypatch.setattr(rule, "round", lambda rounds=rounds, rule=rule: rounds.append(rule.t))
        for _ in range(steps):
            rule.after_step()
        assert rounds == expected
    with pytest.raises(ValueError, match="give --epochs 2"):
        ranks_alone(m, steps=4)


def test_a_run_of_alora(flags, tmp_path):
    """Ranks have moved, there are as many as at first, and the adapter has those that are on."""
    out = tmp_path / "run"
    words = [*flags, "--allocate", "alora", "--shortcuts", "none", "--out", str(out)]
    assert train.main(words) == 0
    run = train.prepare(parse_flags(["--eval-only", "--resume", str(out)]), ExitStack())
    layers = lora.adapters(run.model)
    ranks = [a.r - len(a.ranks_off) for a in layers.values()]
    assert sum(ranks) == 16 and set(ranks) != {4}
    for a in layers.values():  # and each of them has trained
        assert all(a.lora_B[:, k].any() for k in range(a.r) if k not in a.ranks_off)
    done = run_folder.read_log(out)[-1]
    assert done["trainable"]["adapters"] == 16 * 24
    exported, _ = train.load_pretrained(run.args.model, num_labels=2, seed=0)
    lora.load_adapter(exported, out)
    batch = tiny.batch(run.model.config)
    run.model.eval()
    torch.testing.assert_close(
        exported.eval()(**batch).logits, run.model(**batch).logits, rtol=0, atol=1e-5
    )


def test_what_a_run_gives_to_an_allocator(flags):
    """Schedule and interval in steps; moments that are gone once they are forgotten."""
    words = [*flags, "--allocate", "alora", "--every", "0.4"]
    run = train.set_up(parse_flags(words))
    train.train_step(run, train.epoch_steps(run, 0)[0], 0.03)
    given = train.around_steps(run)
    assert [given[key] for key in ("steps", "per_epoch", "interval")] == [10, 5, 2]
    first, second, *_ = run.optimizer.state
    given["forget"](first)
    given["forget"](first)  # what has none
    assert first not in run.optimizer.state and second in run.optimizer.state


@pytest.mark.parametrize(
    "words", ["--allocate alora", "--allocate dynamic --per-rank yes --budget-params 192"]
)
def test_single_ranks_have_the_rate_and_the_decay_of_the_flags(flags, words):
    run = train.set_up(parse_flags([*flags, "--shortcuts", "none", *words.split()]))
    groups = run.optimizer.param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.03, 0.3)}


# ------------------------------------------------------------------------------------- whole runs


FEWER = {  # flags: ALoRA goes over every rank twice in each round, after steps 5 and 7
    "adalora": ["--shortcuts", "residual"],
    "alora": [
        "--shortcuts",
        "residual",
        "--targets",
        "q_proj",
        "--every",
        "0.4",
        "--score-batches",
        "1",
    ],
}


@pytest.mark.parametrize("stop_after", [4, 7])
@pytest.mark.parametrize("name", METHODS["allocator"])
def test_an_interrupted_run_ends_with_the_same_bits(flags, tmp_path, monkeypatch, name, stop_after):
    """Before and after the masks are final; between the first round and the last."""
    words = [*flags, *FEWER[name], "--allocate", name]
    whole_and_interrupted(words, tmp_path, monkeypatch, stop_after)


@pytest.mark.parametrize("name", METHODS["allocator"])
def test_two_processes_equal_one(flags, tmp_path, name):
    """In float64: parameters, gates and masks after two epochs."""

    def run():
        # the folder's model is float32: double() before the optimizer and the allocator are made
        args = parse_flags([*flags, *FEWER[name], "--allocate", name])
        load = train.load_pretrained
        train.load_pretrained = lambda *a, **k: (lambda m, t: (m.double(), t))(*load(*a, **k))
        r = train.set_up(args)
        for epoch in (0, 1):
            for group in train.epoch_steps(r, epoch):
                train.train_step(r, group, 0.03)
        gates = {n: a.ranks_off for n, a in lora.adapters(r.model).items()}
        return {n: p.detach() for n, p in lora.trainable(r.model).items()}, gates

    both = in_processes(run, 2, tmp_path)
    (alone, gates) = in_processes(run, 1, tmp_path)[0]
    for name, p in alone.items():
        torch.testing.assert_close(both[0][0][name], p, rtol=0, atol=1e-7)
        assert torch.equal(both[0][0][name], both[1][0][name])
    assert both[0][1] == gates == both[1][1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--allocate adalora --budget-params 300", "--budget-params needs --allocate static"),
        ("--allocate alora --keep 0.5", "--keep needs --allocate"),
        ("--allocate adalora --per-rank yes", "--per-rank needs --allocate static"),
        ("--allocate alora --proxy snip", "--proxy needs --allocate static"),
        ("--allocate adalora --score-batches 2", "--score-batches needs"),
        ("--allocate adalora --delta-ratio 2", "does not go with --delta-ratio 2.0"),
        ("--allocate alora --delta-ratio 2", "does not go with --delta-ratio 2.0"),
        ("--allocate adalora --adapter tied", "does not go with --adapter tied"),
        ("--allocate adalora --optimizer lora_rite", "B diag(E) A"),
        ("--allocate alora --optimizer loraplus", "does not go with --optimizer loraplus"),
        ("--allocate adalora --targets none", "--allocate adalora needs --targets"),
        ("--allocate adalroa", "did you mean 'adalora'"),
        ("--allocate adalora --keep 0.001", "--keep 0.001 of 96 ranks is none"),
        ("--allocate alora --epochs 1", "give --epochs 2"),
    ],
)
def test_bad_input(words, message, capsys):
    assert train.main(words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------- the theorem


def net(seed, n=7, layers=3):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, n, generator=rng, dtype=F64) for _ in range(layers + 1)]


@pytest.mark.parametrize("ranks", [(1, 1, 1), (0, 2, 1), (2, 2, 2), (3, 2, 2), (5, 3, 1)])
def test_the_error_is_the_next_singular_value(ranks):
    target, *weights = net(0)
    found = expressive_power.adapters(weights, target, ranks)
    adapted = [w + B @ A for w, (A, B) in zip(weights, found, strict=True)]
    assert all(
        torch.linalg.matrix_rank(B @ A, rtol=1e-10) <= r
        for (A, B), r in zip(found, ranks, strict=True)
    )
    error = torch.linalg.matrix_norm(target - adapted[2] @ adapted[1] @ adapted[0], 2)
    lacks = torch.linalg.svdvals(target - weights[2] @ weights[1] @ weights[0])
    expected = lacks[sum(ranks)] if sum(ranks) < 7 else 0.0
    assert error.item() == pytest.approx(float(expected), abs=1e-8)


def test_no_adapters_do_better():
    """Gradient descent on all of them, from 20 starts, and from the construction, stays above."""
    target, *weights = net(1, n=5, layers=2)
    bound = torch.linalg.svdvals(target - weights[1] @ weights[0])[2].item()
    best = expressive_power.adapters(weights, target, (1, 1))
    first, second = (w + B @ A for w, (A, B) in zip(weights, best, strict=True))
    reached = torch.linalg.matrix_norm(target - second @ first, 2).item()
    assert reached == pytest.approx(bound, abs=1e-8)
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        pairs = [
            [
                (
                    p + 0.3 * (seed > 0) * torch.randn(p.shape, generator=rng, dtype=F64)
                ).requires_grad_()
                for p in pair
            ]
            for pair in best
        ]
        optimizer = torch.optim.Adam([p for pair in pairs for p in pair], lr=0.01)
        for _ in range(60):
            first, second = (w + B @ A for w, (A, B) in zip(weights, pairs, strict=True))
            error = torch.linalg.matrix_norm(target - second @ first, 2)
            assert error.item() > bound - 1e-9
            optimizer.zero_grad()
            error.backward()
            optimizer.step()


def test_a_product_without_an_inverse_is_refused():
    target, *weights = net(2)
    weights[2][0] = 0
    with pytest.raises(ValueError, match="one side of layer 0 have no inverse"):
        expressive_power.adapters(weights, target, (1, 1, 1))


def test_the_penalty_stays_when_the_choice_is_final_and_when_that_is():
    m = tiny.model("bert")
    lora.inject(m, ("fc1",), r=3, adapter=adalora.AdaLoRALayer)
    assert adalora.AdaLoRA(m, steps=13, interval=1, keep=0.5).last == 7
    masks = adalora.AdaLoRA(m, steps=12, interval=1, keep=0.5)
    masks.t = masks.last
    for factor in masks.factors.values():
        factor.grad = torch.zeros_like(factor)
    masks.before_step()
    assert m.layers[0].fc1.lora_A.grad.any()
