"""tools/plot.py: the numbers in the pictures of a Delta-LoRA run, and the ten places of a block.

The picture of an allocation is tested where allocations are made, in test_hetero.py.
"""

import itertools
import json

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes

import lora
import tiny
import train
from delta_lora import DeltaLoRA
from support import checkpoint, run_folder
from tools import plot, plot_block

FLAGS = {"delta_ratio": 0.7, "delta_start": 1, "r": 3, "lora_alpha": 5}
STEPS = 6


def made_up_run(folder, flags=FLAGS):
    """A run folder as train.py leaves it, by Delta-LoRA on random gradients; {module: W_T - W_0}.

    layers.1.fc1 is off from step 4 on; layers.2.fc1 from the start.
    """
    model = tiny.adapted("bert", targets=("q_proj", "fc1"))
    layers = lora.adapters(model)
    layers["layers.2.fc1"].enabled = False
    before = {name: layer.base.weight.clone() for name, layer in layers.items()}
    delta = DeltaLoRA(model, flags["delta_ratio"], flags["delta_start"])
    for step in range(1, STEPS + 1):
        layers["layers.1.fc1"].enabled = step < 4
        delta.before_step()
        on = [a for a in layers.values() if a.enabled]
        tiny.randomise([p for a in on for p in (a.lora_A, a.lora_B)], seed=step)
        delta.after_step()
        changes = {n: (a.base.weight - before[n]).norm().item() for n, a in layers.items()}
        run_folder.log(folder, "train", step=step, weight_change=changes)
    run_folder.write_json(folder / "config.json", {"flags": flags})
    on = {name: layer.enabled for name, layer in layers.items()}
    parameters = {name: p.detach() for name, p in lora.trainable(model).items()}
    state = {**tiny.checkpoint_state(), "plan": None, "parameters": parameters, "on": on}
    state["delta"] = delta.state()
    checkpoint.write(folder, state)
    lora.save_adapter(model, folder, delta.export())
    return {name: (a.base.weight - before[name]).detach() for name, a in layers.items()}


def test_what_delta_lora_did_to_the_weights(tmp_path):
    """From the files of the run, against the weights themselves; the values by a dense SVD."""
    expected = made_up_run(tmp_path)
    found = plot.factored_change(tmp_path, FLAGS)
    assert found.keys() == expected.keys()
    for name, (left, right) in found.items():
        torch.testing.assert_close(left @ right, expected[name], rtol=1e-12, atol=1e-12)
        dense = torch.linalg.svdvals(expected[name])
        got = plot.singular_values(left, right)
        padded = torch.cat([got, got.new_zeros(len(dense))])[: len(dense)]
        torch.testing.assert_close(padded, dense, rtol=1e-10, atol=1e-12)
        assert (dense > 1e-10).sum() == (0 if name == "layers.2.fc1" else 6)  # 2r
    steps, changes = plot.weight_changes(tmp_path)
    assert steps == [1, 2, 3, 4, 5, 6]
    for name, norms in changes.items():
        assert norms[:2] == [0, 0]  # K = 1: W first moves after step K + 2 = 3
        assert norms[-1] == pytest.approx(expected[name].norm().item())


@pytest.mark.parametrize(
    "words",
    [
        "--allocate dynamic --every 0.4 --keep 0.4",
        "--allocate dynamic --every 0.4 --keep 0.4 --when-off frozen",
        "--allocate dynamic --every 0.4 --budget-params 250 --per-rank yes",
        "--allocate static --budget-params 250 --per-rank yes",
    ],
)
def test_the_change_out_of_the_files_is_what_the_run_measured(words, tmp_path):
    model, task, out = (tmp_path / name for name in ("model", "task", "run"))
    tiny.bert_folder(model)
    tiny.task_folder(task)
    common = f"--task mrpc --data-dir {task} --model {model} --device cpu --out {out} --log-every 1"
    delta = "--delta-ratio 2 --delta-start 0 --r 3 --shortcuts none --targets q_proj,v_proj,fc1"
    rest = "--batch-size 5 --epochs 2 --lr 0.03"
    assert train.main(f"{common} {delta} {rest} {words}".split()) == 0
    found = plot.factored_change(out, run_folder.read_config(out))
    _, norms = plot.weight_changes(out)
    for name, (left, right) in found.items():
        norm = plot.singular_values(left, right).norm().item()
        assert norm == pytest.approx(norms[name][-1], rel=1e-4, abs=1e-6), name
    assert sum(values[-1] > 0 for values in norms.values()) > 2


def test_the_picture_of_a_delta_lora_run(tmp_path, capsys):
    made_up_run(tmp_path)
    assert plot.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'delta.png'}\n"
    picture = plt.imread(tmp_path / "delta.png")
    assert picture.shape[1] > 1000 and picture.std() > 0.05
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "other.png")]) == 0
    assert (plt.imread(tmp_path / "other.png") == picture).all()


@pytest.mark.parametrize(
    ("on", "words", "share"),
    [
        ([{"a": True}, {"a": False}], "share of decisions in which it was on", "50%"),
        ([{"a": [0, 1]}, {"a": [2]}], "share of its ranks, over the decisions, that were", "50%"),
    ],
)
def test_what_the_picture_of_an_allocation_says_of_its_rows(
    on, words, share, tmp_path, monkeypatch
):
    """Of single ranks the share is of ranks: half of them may be on at every decision."""
    made_up_run(tmp_path)
    titles, labels, r = [], [], run_folder.read_config(tmp_path)["r"]
    assert r == 3
    history = [{"step": i, "on": {"layers.0.q_proj": chosen["a"]}} for i, chosen in enumerate(on)]
    content = {"mode": "dynamic", "proxy": "p", "budget": {"keep": 0.5}, "history": history}
    run_folder.write_json(tmp_path / "allocation.json", content)
    monkeypatch.setattr(Axes, "set_title", lambda self, text: titles.append(text))
    original = Axes.set_yticks
    monkeypatch.setattr(
        Axes, "set_yticks", lambda *a, **k: labels.append(a[2]) or original(*a, **k)
    )
    plot.allocation(tmp_path, tmp_path / "x.png")
    assert words in titles[0] and labels[0][0].endswith(share)


def remove(name):
    return lambda folder: (folder / name).unlink()


def damage(folder):
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    content[100] ^= 1
    (folder / "checkpoint.pt").write_bytes(content)


def cut_short(folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def forget_the_start(folder):
    content = json.loads((folder / "config.json").read_text())
    del content["flags"]["delta_start"]
    run_folder.write_json(folder / "config.json", content)


def allocate_too(folder):
    (folder / "allocation.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("config.json"), "is no run folder"),
        (remove("adapter.safetensors"), "finish the run"),
        (remove("checkpoint.pt"), "checkpoint.pt"),
        (remove("metrics.jsonl"), "no train line with a weight_change"),
        (damage, "its checksum is wrong"),
        (cut_short, "is damaged, a file of it does not fit"),
        (forget_the_start, "is damaged, a file of it does not fit: KeyError('delta_start')"),
        (allocate_too, "has two pictures, allocation and delta: leave out --out"),
        (
            lambda folder: run_folder.write_json(folder / "config.json", {"flags": {}}),
            "has nothing to draw",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, change, message, capsys):
    made_up_run(tmp_path)
    change(tmp_path)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_a_picture_is_a_png(tmp_path, capsys):
    """Another name would get .png behind it, and the wrong one be printed."""
    made_up_run(tmp_path)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "picture")]) == 2
    assert "picture, expected a name that ends in .png" in capsys.readouterr().err


def test_a_block_has_its_ten_places(tmp_path, monkeypatch):
    """Each is drawn in both blocks, and nothing lies on anything else."""
    drawn, draw = [], plot_block.box
    monkeypatch.setattr(plot_block, "box", lambda *a, **k: (drawn.append(a[1:6]), draw(*a, **k)))
    assert plot.main(["block", "--out", str(tmp_path / "block.png")]) == 0
    texts = [text for *_, text in drawn]
    linears = [place for place in lora.LINEARS if place != "gate_proj"]  # a block without a gate
    for place in (*linears, *lora.RESIDUALS, *lora.CROSS):
        assert texts.count(place) == 2
    for (x, y, w, h, _), (u, v, m, n, _) in itertools.combinations(drawn, 2):
        assert abs(x - u) > (w + m) / 2 or abs(y - v) > (h + n) / 2
    assert plt.imread(tmp_path / "block.png").shape[1] > 1500
