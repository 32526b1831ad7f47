"""tools/ablation.py, against explicit matrices, a hand-written loop and known answers.

Also: that nothing is lost, or measured twice.
"""

import copy
import json
import pathlib
import random
import types

import numpy as np
import pytest
import safetensors.torch
import torch

import dense
import lora
import proxies
import tiny
import train
from support import run_folder
from tools import ablation

DEV = 10
EVEN, ROLLED = np.arange(8), (np.arange(8) + 1) % 8  # importances of results()'s two seeds
NAMES = [f"layers.{i}.{place}" for i in range(4) for place in ("q_proj", "v_proj")]


def ignore(_examples):
    pass


@pytest.fixture
def folders(tmp_path):
    """(model, task): 80 examples in train.tsv, of which 10 are set aside."""
    task = tiny.task_folder(tmp_path / "task", train=70 + DEV)
    return tiny.bert_folder(tmp_path / "model", vocab_size=90), task


@pytest.fixture
def command(folders, tmp_path):
    """The command line of a short real run."""
    model, task = folders
    flags = f"--data-dir {task} --model {model} --dev {DEV} --steps 1 --score-batches 2 --seeds 0"
    return ["run", *flags.split(), "--out", str(tmp_path / "results" / "ablation.jsonl")]


def a_run(folders, space="B", steps=1):
    model, task = folders
    args = types.SimpleNamespace(
        model=str(model), data_dir=str(task), score_batches=2, dev=DEV, steps=steps
    )
    return ablation.prepare(args, space, seed=3)


def snapshot(run):
    """Everything of a run's model that could have moved, and the optimizer's moments."""
    model = run.model
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    enabled = {name: layer.enabled for name, layer in lora.adapters(model).items()}
    moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    return bits, flags, modes, enabled, moments, torch.get_rng_state()


def same(a, b):
    """Equal to the bit, through dicts, lists and tuples."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ----------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_switching_off_equals_a_dense_model_without_the_product(family):
    m = tiny.adapted(family, shortcuts=lora.SHORTCUTS["all"])
    batches = [tiny.batch(m.config, seed=1), tiny.batch(m.config, seed=2, lengths=(5, 8))]

    def loss(model):
        """Minus the log of the softmax at the label, mean over all five examples."""
        losses = []
        for batch in batches:
            for z, label in zip(dense.logits(model, batch), batch["labels"], strict=True):
                losses.append((z.exp().sum().log() - z[label]).item())
        return sum(losses) / 5

    run = types.SimpleNamespace(model=m, optimizer=None)
    base, rise = ablation.rise_when_off(run, batches, ignore)
    assert base == pytest.approx(loss(m), abs=1e-11)
    assert len(rise) == 3 * 10 - 1
    for name, value in rise.items():
        without = copy.deepcopy(m)
        torch.nn.init.zeros_(lora.adapters(without)[name].lora_B)
        assert value == pytest.approx(loss(without) - loss(m), abs=1e-11), name
    assert len({round(abs(value), 9) for value in rise.values()} - {0}) == len(rise)


def test_training_alone_equals_a_loop_with_one_pair_in_the_optimizer(folders):
    """Nothing is switched here: lora_B = 0 keeps the others silent, no gradient keeps them so."""
    run = a_run(folders, steps=2)
    run.model.double()
    run.args.lr = 0.05
    groups = train.epoch_steps(run, 0)
    base, fall = ablation.fall_when_trained(run, groups, 2, ignore)
    batches = [train.batch_of(run.model, [run.train[i] for i in g[0]]) for g in groups]
    examples = [len(batch["labels"]) for batch in batches]

    def loss(model):
        """Of the third and the fourth batch, which may differ in size."""
        two = model(**batches[2]).loss.item(), model(**batches[3]).loss.item()
        return np.average(two, weights=examples[2:4])

    def trained(model, parameters, batches):
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)
        for batch in batches:
            gradients = torch.autograd.grad(model(**batch).loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    warm = copy.deepcopy(run.model)
    head = [p for module in warm.head for p in warm.get_submodule(module).parameters()]
    trained(warm, head, batches[:2])
    assert base == pytest.approx(loss(warm), abs=1e-10)
    for name in lora.adapters(warm):
        model = copy.deepcopy(warm)
        layer = lora.adapters(model)[name]
        trained(model, [layer.lora_A, layer.lora_B], batches[2:4])
        assert fall[name] == pytest.approx(loss(warm) - loss(model), abs=1e-10), name
    assert min(abs(value) for value in fall.values()) > 1e-8


@pytest.mark.parametrize("moment", ["start", "end"])
def test_measuring_leaves_no_trace(folders, moment):
    run = a_run(folders)
    groups = train.epoch_steps(run, 0)
    if moment == "end":
        train.train_step(run, groups[0], 1e-3)
    before, optimizer = snapshot(run), run.optimizer
    record = ablation.measure(run, moment, groups, 1, ignore)
    assert run.optimizer is optimizer
    assert same(before, snapshot(run))
    assert set(record["scores"]) == {*proxies.PROXIES, "size"}
    assert set(record["importance"]) == set(lora.adapters(run.model))
    train.train_step(run, groups[1], 1e-3)
    assert not same(before, snapshot(run)), "this snapshot sees nothing"


def test_every_proxy_scores_the_batches_that_train_py_scores(folders, monkeypatch):
    """ALPHA-TEST every second of them; "size" is the number of parameters."""
    run = a_run(folders)
    train.train_step(run, train.epoch_steps(run, 0)[0], 0.05)  # B is not zero
    score, given = proxies.score, {}

    def watched(name, model, batches):
        given[name] = batches
        return score(name, model, batches)

    monkeypatch.setattr(proxies, "score", watched)
    found = ablation.measure(run, "end", [], 1, ignore)["scores"]
    batches = list(train.score_batches(run))
    assert len(batches) == 2 and given.keys() == proxies.PROXIES.keys()
    for name, taken in given.items():
        assert same(taken, batches[:1] if name.startswith("alpha_test") else batches), name
        if any(found[name].values()):
            assert found[name] == pytest.approx(score(name, run.model, taken), rel=1e-6), name
    layers = lora.adapters(run.model)
    assert found["size"] == {n: a.lora_A.numel() + a.lora_B.numel() for n, a in layers.items()}


def test_the_training_is_that_of_train_py(folders, command, tmp_path, monkeypatch):
    """To the bit, where train.tsv is the tuning split."""
    model, task = folders
    header, *rows = (task / "train.tsv").read_text().splitlines()
    random.Random(20261124).shuffle(rows)
    split = tmp_path / "split"
    split.mkdir()
    (split / "train.tsv").write_text("\n".join([header, *rows[DEV:]]) + "\n")
    (split / "dev.tsv").write_text("\n".join([header, *rows[:DEV]]) + "\n")
    flags = (
        f"--task mrpc --data-dir {split} --model {model} --allocate none --epochs 3 --device cpu"
    )
    flags += " --batch-size 16 --schedule linear --warmup 30 --lr 1e-3 --seed 0 --shortcuts all"
    assert train.main([*flags.split(), "--out", str(tmp_path / "run")]) == 0

    seen = {}

    def measure(run, moment, *_):
        seen[moment] = {n: p.detach().clone() for n, p in lora.trainable(run.model).items()}
        seen["dev"] = run.dev
        return {"seconds": {}}

    monkeypatch.setattr(ablation, "measure", measure)
    assert ablation.main([*command, "--spaces", "B"]) == 0
    stored = safetensors.torch.load_file(tmp_path / "run" / "adapter.safetensors")
    assert same(seen["end"], {name: stored[name] for name in seen["end"]})
    assert not same(seen["third"], seen["end"])
    assert not any(p.any() for n, p in seen["start"].items() if n.endswith("lora_B"))
    assert [e["label"] for e in seen["dev"]] == [int(row[0]) for row in rows[:DEV]]


# ----------------------------------------------------------------------------------------- the file


def content(path):
    """The records, without what depends on the clock."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["space"], r["seed"], r["moment"]): {**r, "seconds": None} for r in records}


def test_an_interrupted_run_goes_on_and_repeats_nothing(command, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results" / "ablation.jsonl"
    assert ablation.main(command) == 0
    whole, reference = path.read_bytes(), content(path)
    assert set(reference) == {(s, 0, m) for s in "AB" for m in ("start", "third", "end")}
    assert [r["step"] for r in reference.values()] == [0, 5, 15] * 2
    ablation.main(command)
    assert path.read_bytes() == whole

    path.write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 40])  # the last line is torn
    lines, measure = path.read_text().splitlines()[:-1], ablation.measure
    monkeypatch.setattr(ablation, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ablation.main(command) == 130
    assert path.read_text().splitlines() == lines
    done = []
    monkeypatch.setattr(
        ablation, "measure", lambda run, moment, *a: done.append(moment) or measure(run, moment, *a)
    )
    assert ablation.main(command) == 0
    assert done == ["end"]
    assert path.read_text().splitlines()[:-1] == lines
    assert content(path) == reference
    capsys.readouterr()
    assert ablation.main([*command, "--score-batches", "1"]) == 2
    error = capsys.readouterr().err
    assert "with score_batches 2, asked for is 1: give another --out" in error
    assert content(path) == reference
    other = tmp_path / "other"
    other.mkdir()
    folder = pathlib.Path(command[command.index("--data-dir") + 1])
    for name in ("train", "dev"):
        lines = (folder / f"{name}.tsv").read_text().splitlines()
        (other / f"{name}.tsv").write_text("\n".join([*lines[:-1], lines[1]]) + "\n")
    assert ablation.main([*command, "--data-dir", str(other)]) == 2
    assert "was measured on other data or weights" in capsys.readouterr().err
    assert content(path) == reference
    old = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record["settings"].pop("data") for record in old)  # as lines were before
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    assert ablation.main(command) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("run --seeds 0,x", "'x' is not an integer"),
        ("run --spaces C", "'C' is not one of A, B"),
        ("run --data-dir nowhere", "no data folder at nowhere"),
        ("run --dev 80", "--dev is 80"),
        ("run --steps 3", "lower --steps or --dev"),
        ("report nowhere.jsonl", "nowhere.jsonl"),
        ("draw", "draw"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, capsys, tmp_path, flags, message):
    name, *rest = flags.split()
    argv = [*command, *rest] if name == "run" else [name, *rest]
    assert ablation.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()


# --------------------------------------------------------------------------------------- the report


def dicts(*lists):
    return [dict(zip("abcdefgh", values, strict=False)) for values in lists]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 3, 4, 5], [-1, -20, -300, -4000, -50000], -1.0),
        ([1, 2, 2, 4], [1, 20, 30, 40], 4.5 / 22.5**0.5),  # ranks 1, 2.5, 2.5, 4
        ([7, 7, 7, 7], [1, 2, 3, 4], None),
        ([1, 2, 3, 4], [0, 0, 0, 0], None),
    ],
)
def test_spearman_of_known_answers(x, y, expected):
    got = ablation.spearman(*dicts(x, y))
    assert got == (expected if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize(
    ("x", "y", "count", "expected"),
    [
        ([4, 3, 2, 1], [9, 8, 1, 0], 2, 1.0),
        ([4, 3, 2, 1], [0, 1, 8, 9], 2, 0.0),
        ([3, 2, 2, 1], [9, 8, 1, 0], 2, 0.75),  # a, and b or c
        ([5, 5, 5, 5], [9, 8, 1, 0], 1, 0.25),
        ([5, 5, 5, 0], [9, 9, 0, 0], 1, 1 / 3),  # one of a, b, c; one of a, b
    ],
)
def test_overlap_of_known_answers(x, y, count, expected):
    assert ablation.overlap(*dicts(x, y), count) == pytest.approx(expected, abs=1e-12)


def test_interval_by_hand():
    """1, 2, 3: sd 1, so 4.3027 / sqrt(3)."""
    assert ablation.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2.4841), abs=1e-4)


@pytest.fixture
def results(tmp_path):
    """Two seeds of space A; one proxy is right, one is wrong, one is the same for all."""
    path, lines = tmp_path / "made-up.jsonl", []
    for seed in (0, 1):
        for moment in ("start", "end"):
            values = [float((i + seed) % 8) for i in range(8)]
            importance = dict(zip(NAMES, values, strict=True))
            scores = {
                "right": {name: 3 * v + 1 for name, v in importance.items()},
                "wrong": {name: -v for name, v in importance.items()},
                "alike": dict.fromkeys(NAMES, 2.0),
                "half": dict.fromkeys(NAMES, 0.0) if seed else importance,
            }
            about = {"space": "A", "seed": seed, "moment": moment, "step": 0, "settings": {"r": 8}}
            measured = {"scores": scores, "importance": importance, "loss": 0.5}
            versions = {"versions": run_folder.versions()}
            versions["seconds"] = {"scores": 2.0, "importance": 5.0}
            lines.append(json.dumps({**about, **measured, **versions}))
    path.write_text("\n".join(lines) + "\n" + lines[0][:50])  # torn
    return path


def test_the_report_of_made_up_results(results, capsys):
    assert ablation.main(["report", str(results)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "| Spearman's rank correlation | A, start | A, end | A, start → end |"
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    tables = {}
    for name, *cells in rows:
        tables.setdefault(name, []).append(cells)
    assert tables["right"] == [["1.00 ± 0.00"] * 3] * 2
    assert tables["wrong"] == [["-1.00 ± 0.00"] * 3, ["0.00 ± 0.00"] * 3]
    assert tables["alike"] == [["–"] * 3, ["0.25 ± 0.00"] * 3]
    assert tables["half"][0] == ["1.00 (1 of 2)"] * 3
    # blocks 0, 0, 1, 1, 2, 2, 3, 3, whose ranks are 1.5, 1.5, 3.5, …: against 1 … 8 and 2 … 8, 1
    correlations = [np.corrcoef(np.repeat([1, 2, 3, 4], 2), x)[0, 1] for x in (EVEN, ROLLED)]
    half = (
        12.706 * abs(correlations[0] - correlations[1]) / 2
    )  # t of two seeds: 12.706 sd / sqrt(2)
    assert tables["depth"][0] == [f"{np.mean(correlations):.2f} ± {half:.2f}"] * 3
    assert tables["depth"][1] == ["0.75 ± 3.18"] * 3  # of blocks 3: both of the best two; one
    # ranks 0 … 7 against 1 … 7, 0: d = 1 seven times and 7 once, 1 - 6 * 56 / (8 * 63)
    assert tables["importance, another seed"] == [["0.33"] * 3, ["0.50"] * 3]
    for cells, centre in zip(tables["random"], (0, 0.25), strict=True):
        for cell in cells:
            mean, low, _, high = cell.replace("(", "").replace(")", "").split()
            assert abs(float(mean) - centre) < 0.03 and float(low) < centre < float(high)
    assert tables["A, end"] == [["0, 1", "0", "0.5000", "0, 3.5, 7", "7"]]
    assert "nan" not in text.lower()
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_chance_has_the_variance_of_one_permutation_in_all_seeds(results):
    """Var = (1 + rho) / 2 / (n - 1): 8 modules, two seeds whose importances correlate with rho."""
    records = ablation.parse(results.read_bytes(), results)
    pairs = ablation.pairs_of(records, "A", ("end", "end"))
    found = ablation.of_chance(pairs, np.random.default_rng(1))
    assert np.std([r for r, _ in found]) == pytest.approx(((1 + 1 / 3) / 2 / 7) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "change", ["not JSON", "repeat", "one score less", "space", "empty", "other modules"]
)
def test_a_damaged_file_is_one_line(results, capsys, change):
    lines = results.read_text().splitlines()[:2]
    if change == "one score less":
        record = json.loads(lines[1])
        record["scores"]["right"].popitem()
        lines[1] = json.dumps(record)
    elif change == "space":
        lines[1] = json.dumps({**json.loads(lines[1]), "space": []})
    elif change == "other modules":
        record = json.loads(lines[1])
        for scores in (record["importance"], *record["scores"].values()):
            scores["layers.9.q_proj"] = scores.pop(next(iter(scores)))
        lines[1] = json.dumps(record)
    elif change == "empty":
        lines = []
    else:
        lines.insert(1, {"not JSON": "{", "repeat": lines[0]}[change])
    results.write_text("".join(line + "\n" for line in lines))
    assert ablation.main(["report", str(results)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (":2 " in error) == (change != "empty")


def test_the_scores_of_one_moment_against_the_importance_of_the_other():
    up, down = ({"w": 4 * k, "x": 3 * k, "y": 2 * k, "z": k} for k in (1, -1))
    first, then = (
        {"scores": {"p": up}, "importance": down},
        {"scores": {"p": down}, "importance": up},
    )
    assert ablation.of_proxy("p", [(first, then)]) == [(pytest.approx(1), 1)]
    assert ablation.of_proxy("p", [(first, first)]) == [(pytest.approx(-1), 0)]
