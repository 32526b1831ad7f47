"""train.py as its user meets it: whole runs on a tiny model, interruption, resumption, refusals."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lora
import tiny
import train
from support import checkpoint, report, run_folder
from support.flags import describe
from support.flags import parse_flags as flags_of
from tools.faults import same


@pytest.fixture
def flags(tmp_path):
    """Flags of a run that takes a second: 24 examples, a two-layer model."""
    model = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 2 --epochs 2 --batch-size 5 --lr 0.01"
    )
    return ["--preset", "lora", *text.split(), "--log-every", "1", "--device", "cpu"]


def weights(folder):
    return checkpoint.read_last(folder)[0]


def events(folder):
    lines = run_folder.read_log(folder)
    return [{k: v for k, v in e.items() if not k.endswith("seconds")} for e in lines]


def whole_and_interrupted(flags, tmp_path, monkeypatch, stop_after, signum=signal.SIGINT):
    """One run in one piece, one that a signal stops after some step and --resume finishes.

    They must end with the same bits and the same log. Returns the two folders.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.main([*flags, "--out", str(whole)]) == 0
    step = train.train_step

    def interrupted(run, group, lr):
        loss = step(run, group, lr)
        if run.step + 1 == stop_after:
            signal.raise_signal(signum)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        assert train.main([*flags, "--out", str(broken)]) == 130
    # the signal came after the step in which it would have been heeded: the next one is the last
    assert weights(broken)["position"]["step"] == stop_after + 1
    torch.rand(7)  # whatever happened to the global generator in between
    assert train.main(["--resume", str(broken)]) == 0
    assert same(weights(whole), weights(broken))
    assert events(whole) == events(broken)
    return whole, broken


def test_a_run_and_its_folder(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "final       accuracy" in printed and str(out) in printed
    assert "fresh head, not in the checkpoint: classifier\n" in printed
    said_first, _, _ = printed.partition("epoch 1")
    assert describe(flags_of(flags)) in said_first
    # 2 layers x q, v x r 2 x (12 + 12); the head 12 x 2 + 2
    assert "192 in adapters + 26 in the head" in printed
    log = run_folder.read_log(out)
    kinds = [e["event"] for e in log]
    assert kinds.count("train") == 2 * 5 and kinds.count("eval") == 2 and kinds[-1] == "done"
    assert log[-1]["trainable"] == {"adapters": 192, "head": 26}
    assert log[-1]["accuracy"] == [e for e in log if e["event"] == "eval"][-1]["accuracy"]
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["r"] == 2 and config["versions"]["torch"] == torch.__version__
    stored = safetensors.torch.load_file(out / "adapter.safetensors")
    assert same(stored, weights(out)["parameters"])
    assert set(stored) == {
        *(f"layers.{i}.{p}_proj.lora_{x}" for i in (0, 1) for p in "qv" for x in "AB"),
        "classifier.weight",
        "classifier.bias",
    }


def test_the_seconds_of_a_run_hold_its_evaluations_and_the_bar_its_steps(
    flags, tmp_path, monkeypatch
):
    """By a clock that moves on by 50 s in evaluate(), once an epoch, and by 2 s in a step."""
    now, evaluate, step, said, bars = [1000.0], train.evaluate, train.train_step, [], []

    def slow(*args):
        now[0] += 50
        return evaluate(*args)

    def slow_step(*args):
        now[0] += 2
        return step(*args)

    class Bar(train.tqdm):
        def __init__(self, **how):
            said.append(f"{how['initial']} of {how['total']} {how['unit']}s")
            super().__init__(**how)
            bars.append(self)

        def set_postfix_str(self, text, refresh):
            said.append(text.split(", ")[1])

    monkeypatch.setattr(train, "evaluate", slow)
    monkeypatch.setattr(train, "train_step", slow_step)
    monkeypatch.setattr(train, "tqdm", Bar)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert run_folder.read_log(tmp_path / "run")[-1]["seconds"] == pytest.approx(120, abs=1)
    assert [bar.n for bar in bars] == [10]
    # batches of 5, and the last one of an epoch of 4: 24 examples in 10 s
    assert said[0] == "0 of 10 steps" and {*said[1:5], *said[6:10]} == {"2.5 examples/s"}
    assert said[5] == said[10] == "2.4 examples/s"


def test_the_seconds_of_a_run_that_is_stopped_in_an_epoch(flags, tmp_path, monkeypatch):
    """By a clock that a step moves on by 2 s: stopped after three steps, gone on after a day."""
    now, step = [1000.0], train.train_step

    def slow_step(run, group, lr):
        now[0] += 2
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(run, group, lr)

    monkeypatch.setattr(train, "train_step", slow_step)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 130
    assert weights(out)["metrics"]["seconds"] == 6
    now[0] += 86_400
    assert train.main(["--resume", str(out)]) == 0
    assert run_folder.read_log(out)[-1]["seconds"] == 20


def test_every_step_is_in_train_mode_and_the_result_stands_beside_the_baselines(
    flags, tmp_path, monkeypatch, capsys
):
    """Also of a model that comes in eval mode; by baselines that are made up."""
    set_up, step, modes, asked = train.set_up, train.train_step, [], []

    def evaluated(args):
        run = set_up(args)
        run.model.eval()
        return run

    def seen(run, group, lr):
        modes.append(run.model.training)
        return step(run, group, lr)

    def made_up(**names):
        asked.append(names)
        return {"by lot": 0.5}

    monkeypatch.setattr(train, "set_up", evaluated)
    monkeypatch.setattr(train, "train_step", seen)
    monkeypatch.setattr(train.glue, "baselines", made_up)
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert modes == [True] * 10
    about = {k: flags[flags.index(f"--{k.replace('_', '-')}") + 1] for k in ("data_dir", "model")}
    assert asked == [{"task": "mrpc", "train_records": None, "eval_records": None, **about}]
    assert "by lot 0.500" in capsys.readouterr().out


def test_same_seed_same_bits_other_seed_other_bits(flags, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        train.main([*flags, "--out", str(tmp_path / name), "--seed", seed])
    first, second, third = (weights(tmp_path / n) for n in "abc")
    assert same(first, second) and events(tmp_path / "a") == events(tmp_path / "b")
    assert not same(first["parameters"], third["parameters"])


OPTIONS = "--dropout 0.2 --lora-dropout 0.1 --schedule linear --warmup 3 --clip 0.5 --accumulate 2"


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_an_interrupted_run_ends_with_the_same_bits(
    flags, tmp_path, monkeypatch, capsys, stop_after
):
    """Ctrl-C in the middle of an epoch and at its end; dropout's RNG and moments go on."""
    flags = [*flags, *OPTIONS.split()]
    _, broken = whole_and_interrupted(flags, tmp_path, monkeypatch, stop_after)
    assert f"train.py --resume {broken}" in capsys.readouterr().out


def test_resuming_from_an_older_checkpoint_does_not_report_twice(flags, tmp_path, monkeypatch):
    """A killed run: its log is ahead of its checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main([*flags, "--out", str(whole)])
    step = train.train_step

    def dies(run, group, lr):
        if run.step == 7:
            raise SystemExit
        return step(run, group, lr)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", str(killed)])
    monkeypatch.setattr(train, "train_step", step)
    assert train.main(["--resume", str(killed)]) == 0
    assert events(whole) == events(killed)
    assert same(weights(whole), weights(killed))


def test_eval_only_prints_the_metric_of_the_run(flags, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*flags, "--out", str(out)])
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert train.main(["--eval-only", "--resume", str(out)]) == 0
    last = run_folder.read_log(out)[-1]
    assert report.show({k: last[k] for k in ("accuracy", "f1")}) in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_resuming_a_finished_run_prints_its_result_again(flags, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*flags, "--out", str(out)])
    first = capsys.readouterr().out.split("method")[1]
    assert train.main(["--resume", str(out)]) == 0
    assert capsys.readouterr().out.split("method")[1] == first
    assert [e["event"] for e in run_folder.read_log(out)].count("done") == 1


def test_a_finished_run_keeps_the_test_that_one_resume_asked_for(flags, tmp_path, capsys):
    """The log of a finished run is not rewritten, unless there is more to say than before."""
    with_test_set(flags, ROWS)
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    assert train.main(["--resume", str(out), "--test"]) == 0
    log, printed = run_folder.read_log(out), capsys.readouterr().out
    assert log[-1]["test"] is not None and len(log[-1]["test_predictions"]) == len(ROWS)
    assert train.main(["--resume", str(out)]) == 0
    assert run_folder.read_log(out) == log
    assert capsys.readouterr().out.split("method")[1] == printed.split("method")[-1]


def test_a_run_without_its_checkpoints(flags, tmp_path, capsys):
    """Finished: refused, nothing is lost. Not begun: from step 0, and it says so."""
    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    for path in out.glob("checkpoint*.pt"):
        path.unlink()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    assert train.main(["--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert "is finished and its checkpoints are gone" in error and error.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "adapter.safetensors").unlink()
    assert train.main(["--resume", str(out)]) == 0
    assert "has no checkpoint yet: begins at step 0" in capsys.readouterr().out
    weights = safetensors.torch.load(before["adapter.safetensors"])
    assert same(weights, safetensors.torch.load_file(out / "adapter.safetensors"))


def test_a_terminal_without_the_characters_of_a_grid(flags, tmp_path):
    """In Latin-1 there is no █: a question mark, and the run goes on."""
    words = [*flags, "--preset", "heterolora", "--dry-run"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, train.__file__, *words], capture_output=True, env=environment
    )
    assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0)
    assert b"grad_norm chose" in done.stdout and b"dry run: loss" in done.stdout


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space")])
def test_what_is_said_of_a_stop_where_nothing_is_written(error, capsys):
    def stopped():
        raise error

    run = types.SimpleNamespace(folder=None, stop=False, notes=[])
    assert train.terminal.carry_through(run, stopped) in (1, 130)
    said = "".join(capsys.readouterr())
    assert said.count("\n") == 1 and "--resume" not in said and "None" not in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_do(error, capsys):
    def full():
        raise error

    run = types.SimpleNamespace(folder=None, stop=False, notes=[])
    assert train.terminal.carry_through(run, full) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said and "smaller --batch-size" in said
    with pytest.raises(RuntimeError, match="another"):  # what is no lack of memory has a traceback
        train.terminal.carry_through(run, lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_a_reader_that_is_gone_before_the_first_note_is_one_line(monkeypatch, capsys):
    def closed(*words, **how):
        if how.get("file") is None:
            raise BrokenPipeError("Broken pipe")
        sys.stderr.write(" ".join(map(str, words)) + "\n")

    monkeypatch.setattr("builtins.print", closed)
    run = types.SimpleNamespace(folder=None, stop=False, notes=["a note"])
    assert train.terminal.carry_through(run, pytest.fail) == 1
    assert capsys.readouterr().err == "train.py: Broken pipe\n"


def test_the_command_that_goes_on_has_what_was_given_beside_resume(tmp_path):
    """Not what the run keeps by itself."""
    kept = {"data_dir": "there", "device": "cpu", "test": False}
    run_folder.write_json(tmp_path / "config.json", {"flags": kept})

    def said(**given):
        args = types.SimpleNamespace(**{**kept, "resume": str(tmp_path), **given})
        return train.terminal.go_on(types.SimpleNamespace(args=args, folder=tmp_path))

    assert said() == said(resume=None) == f"--resume {tmp_path}"
    assert said(test=True) == f"--resume {tmp_path} --test"
    assert said(data_dir="a b", device="cuda") == (
        f"--resume {tmp_path} --data-dir 'a b' --device cuda"
    )


def test_a_home_folder_that_the_shell_left_alone_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert flags_of(["--out=~/run"]).out == str(tmp_path / "run")
    assert flags_of(["--out", "a/"]).out == "a/"
    for words, said in (
        (["--resume", "~/run"], f"{tmp_path}/run is no run folder"),
        (
            ["--out", ""],
            "argument --out: expected a path",
        ),
    ):
        assert train.main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_dry_run_writes_nothing(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*flags, "--dry-run"]) == 0
    assert "dry run: loss" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert train.main([*flags, "--preset", "heterolora", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "step 0: grad_norm chose" in printed and "modules on" in printed
    assert train.main([*flags, "--batch-size", "24", "--dry-run"]) == 0  # an epoch of one step
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_ends_with_the_exit_code_of_main():
    done = subprocess.run([sys.executable, train.__file__, "--r", "0"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)


def test_head_alone(flags, tmp_path, capsys):
    flags = [*flags[: flags.index("--r")], *flags[flags.index("--r") + 2 :]]
    assert train.main([*flags, "--targets", "none", "--out", str(tmp_path / "run")]) == 0
    assert "0 in adapters + 26 in the head" in capsys.readouterr().out


def test_frozen_weights_do_not_move(flags, tmp_path):
    run = train.set_up(flags_of(flags))
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    for group in train.epoch_steps(run, 0):
        train.train_step(run, group, 0.1)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(lora.trainable(run.model))


def test_accumulation_equals_one_large_batch(flags):
    """Unequal batches weigh by their examples: the step is that of the mean over all of them."""
    results = []
    for groups in ([[0, 1, 2, 3, 4], [5, 6]], [[0, 1, 2, 3, 4, 5, 6]]):
        run = train.set_up(flags_of([*flags, "--clip", "0.05"]))
        run.model.double()
        loss = train.train_step(run, groups, 0.1)
        results.append((loss, lora.trainable(run.model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    for name, parameter in results[0][1].items():
        torch.testing.assert_close(parameter, results[1][1][name], rtol=0, atol=1e-9)


def test_clipping_bounds_the_gradient(flags, monkeypatch):
    """With plain SGD of rate 1, the step is as long as the clipped gradient."""
    run = train.set_up(flags_of([*flags, "--clip", "0.01"]))
    run.optimizer = torch.optim.SGD(lora.trainable(run.model).values(), lr=1.0)
    before = {n: p.detach().clone() for n, p in lora.trainable(run.model).items()}
    train.train_step(run, [[0, 1, 2]], 1.0)
    moved = [(p.detach() - before[n]).norm() ** 2 for n, p in lora.trainable(run.model).items()]
    assert sum(moved).sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_learning_rates():
    rates = [train.learning_rate(step, 12, 2.0, "linear", 4) for step in range(13)]
    assert rates == [0, 0.5, 1.0, 1.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0]
    constant = [train.learning_rate(s, 12, 2.0, "constant", 4) for s in (0, 3, 4, 11)]
    assert constant == [0, 1.5, 2.0, 2.0]
    assert train.learning_rate(4, 5, 2.0, "linear", 4) == 2.0  # one step after the warm-up


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    flags, tmp_path, monkeypatch, capsys
):
    out, step = tmp_path / "run", train.train_step

    def poisoned(run, group, lr):
        if run.step == 6:
            with torch.no_grad():
                run.model.classifier.weight.fill_(float("inf"))
        return step(run, group, lr)

    monkeypatch.setattr(train, "train_step", poisoned)
    assert train.main([*flags, "--out", str(out)]) == 1
    message, where = capsys.readouterr().err.splitlines()[-2:]
    assert "the loss of step 7 is nan; try a smaller --lr" in message
    assert where == f"the last good checkpoint is kept in {out}"
    state = weights(out)
    assert state["position"] == {"epoch": 1, "step_in_epoch": 0, "step": 5}
    assert all(p.isfinite().all() for p in state["parameters"].values())


@pytest.mark.parametrize(
    "flag", ["--clip 0", "--seed 0", "--weight-decay 0", "--targets none", "--lr 1"]
)
def test_a_flag_of_nothing_is_a_flag_that_is_given(flag):
    name = flag.split()[0]
    with pytest.raises(ValueError, match=f"{name} cannot be changed by --resume"):
        flags_of(["--resume", "nowhere", *flag.split()])
    if name != "--seed":  # it draws a head that is fresh
        with pytest.raises(ValueError, match=f"{name} does nothing with --eval-only"):
            flags_of(["--eval-only", "--task", "describe", *flag.split()])


def test_a_parameter_that_the_last_step_breaks_is_noticed(flags, tmp_path, monkeypatch, capsys):
    """No loss comes after it that would be no number."""
    out, step = tmp_path / "run", train.train_step

    def poisoned(run, group, lr):
        loss = step(run, group, lr)
        if run.step == 9:  # the last of two epochs of five steps
            with torch.no_grad():
                layer = next(iter(lora.adapters(run.model).values()))
                layer.lora_A[0, 0] = float("nan")
                layer.enabled = False  # else the evaluation would say it first
        return loss

    monkeypatch.setattr(train, "train_step", poisoned)
    assert train.main([*flags, "--out", str(out)]) == 1
    assert "step 10 has made a parameter that is not a number" in capsys.readouterr().err
    assert weights(out)["position"]["step"] == 5 and not (out / "adapter.safetensors").exists()


def test_a_rule_that_cannot_invert_a_matrix_any_more_is_one_line(flags, tmp_path, capsys):
    """The loss is still a number when a matrix of a diverging run is none any more."""
    text = "--optimizer lora_rite --lr 1e15 --weight-decay 0 --warmup 0 --schedule constant"
    assert train.main([*flags, *text.split(), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "train.py: " in error and "try a smaller --lr" in error and "Traceback" not in error


def test_a_second_ctrl_c_ends_a_run_at_once(flags, tmp_path, monkeypatch, capsys):
    step = train.train_step

    def twice(run, group, lr):
        if run.step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(run, group, lr)

    monkeypatch.setattr(train, "train_step", twice)
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 130
    assert "stopped at once; go on from the last checkpoint" in capsys.readouterr().out
    assert weights(tmp_path / "run")["position"]["step"] == 5


def test_sigterm_after_the_last_step_is_said(flags, tmp_path, monkeypatch, capsys):
    """While a long test set is read, say: nothing is lost, and the next command is told."""
    out, mine = tmp_path / "run", lambda *_: None
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with monkeypatch.context() as patch:
            send = lambda _: signal.raise_signal(signal.SIGTERM)  # noqa: E731
            patch.setattr(train.measures, "at_the_end", send)
            assert train.main([*flags, "--out", str(out)]) == 130
        assert signal.getsignal(signal.SIGTERM) == mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"go on from the last checkpoint: --resume {out}" in capsys.readouterr().out
    assert train.main(["--resume", str(out)]) == 0
    assert events(out)[-1]["event"] == "done"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--task mrcp", "'mrcp' is not one of paraphrase, mrpc.*did you mean 'mrpc'"),
        ("--targets q_porj", "did you mean 'q_proj'"),
        ("--r 0", "argument --r: '0' is not an integer from 1 up"),
        ("--r 99", "r is 99, allowed: an integer from 1 to 12"),
        ("--lr nan", "'nan' is not a number from 0.0 up|'nan' is not a number from 0 up"),
        ("--dropout 1", "'1' is not a number from 0 below 1"),
        ("--epochs 1.5", "'1.5' is not an integer"),
        ("--max-length 50", "--max-length is 50, .* has 40 positions"),
        ("--model ./nowhere", "no model folder"),
        ("--data-dir nowhere", "no data folder"),
        ("--data-dir ~nobody-of-that-name/x", "no folder at ~nobody-of-that-name/x"),
        ("--model ~nobody-of-that-name/x", "no folder at ~nobody-of-that-name/x"),
        ("--device tpu9", "--device 'tpu9' cannot be used"),
        ("--unknown 1", "unrecognized arguments: --unknown 1; python train.py --help lists all"),
        ("--bacth-size=3", "unrecognized arguments: --bacth-size=3; did you mean --batch-size?"),
        ("--seed 18446744073709551616", "is not an integer from 0 up to 2..63 - 1"),
        ("--device meta", "--device 'meta' cannot be used: .* try cpu"),
        ("--device cuda:77", "--device 'cuda:77' cannot be used: .* try cpu"),
        ("--device hpu", "--device 'hpu' cannot be used: .* try cpu"),
        ("--lr=-1e-3", "argument --lr: '-1e-3' is not a number from 0 up"),
        ("--eval-only", "--eval-only needs --resume"),
        ("--resume nowhere", "cannot be changed by --resume"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags, tmp_path, monkeypatch, capsys, extra, message
):
    import re

    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*flags, *extra.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_are_not_runs(flags, tmp_path, capsys):
    assert train.main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    out = tmp_path / "run"
    train.main([*flags, "--out", str(out)])
    assert train.main([*flags, "--out", str(out)]) == 2
    assert "is not empty: give another --out" in capsys.readouterr().err
    (other := tmp_path / "other").mkdir()
    (other / "thesis.txt").write_text("mine")
    assert train.main([*flags, "--out", str(other)]) == 2
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]  # and no lock


def test_importing_is_silent():
    code = "import train, support.flags, support.hf_folder, support.download"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=train.Path(train.__file__).parent, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_adapters_are_what_the_flags_say(flags):
    args = flags_of([*flags, "--targets", "fc2,k_proj", "--lora-alpha", "3"])
    run = train.set_up(args)
    layers = lora.adapters(run.model)
    assert list(layers) == [f"layers.{i}.{p}" for i in (0, 1) for p in ("k_proj", "fc2")]
    assert all(a.scaling == 1.5 and a.r == 2 for a in layers.values())


# ------------------------------------------------------------------------------------------ --test


def with_test_set(flags, rows):
    """A labelled test.tsv beside the task's other files: texts of unequal length, in no order."""
    folder = Path(flags[flags.index("--data-dir") + 1])
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    lines += [f"{label}\t1\t2\t{a}\t{b}" for label, a, b in rows]
    (folder / "test.tsv").write_text("\n".join(lines) + "\n")


ROWS = [
    (1, "abcdefg", "gfedcba"),
    (0, "ab", "ab"),
    (1, "xyz", "zyx"),
    (1, "q", "w"),
    (0, "mn", "k"),
]


def test_the_test_set_is_evaluated_once_at_the_end_and_stands_apart(flags, tmp_path, capsys):
    """Predictions as of each example alone (their order: test_evaluation.py); dev as without."""
    with_test_set(flags, ROWS)
    plain, out = tmp_path / "plain", tmp_path / "run"
    assert train.main([*flags, "--out", str(plain)]) == 0
    assert train.main([*flags, "--test", "--out", str(out)]) == 0
    assert "24 training, 10 development, 5 test examples" in capsys.readouterr().out
    done, without = (run_folder.read_log(folder)[-1] for folder in (out, plain))
    assert done["dev"] == without["dev"] == {k: done[k] for k in ("accuracy", "f1")}
    assert without["test"] is None and without["test_predictions"] is None
    model, tokenizer = train.load_pretrained(flags[flags.index("--model") + 1], num_labels=2)
    lora.load_adapter(model, out)
    predicted = []
    for _, a, b in ROWS:
        ids = torch.tensor([tokenizer.encode(a, b).ids])  # (1, t)
        types = torch.tensor([tokenizer.encode(a, b).type_ids])
        logits = model.eval()(ids, torch.ones_like(ids), types).logits  # (1, 2)
        predicted.append(int(logits[0, 1] > logits[0, 0]))
    assert done["test_predictions"] == "".join(map(str, predicted))
    hits = sum(p == label for p, (label, _, _) in zip(predicted, ROWS, strict=True))
    assert done["test"]["accuracy"] == pytest.approx(hits / 5)
    assert all("test" not in e for e in run_folder.read_log(out)[:-1])


def test_a_resumed_run_keeps_its_test_and_can_be_evaluated_again(
    flags, tmp_path, monkeypatch, capsys
):
    with_test_set(flags, ROWS)
    whole, broken = whole_and_interrupted([*flags, "--test"], tmp_path, monkeypatch, 3)
    assert run_folder.read_log(broken)[-1]["test"] is not None
    capsys.readouterr()
    assert train.main(["--eval-only", "--resume", str(whole)]) == 0
    printed = capsys.readouterr().out
    accuracy = run_folder.read_log(whole)[-1]["test"]["accuracy"]
    assert "5 examples of" in printed and f"test: accuracy {accuracy:.4f}" in printed


def test_a_test_set_without_labels_is_one_line_and_the_run_goes_on(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*flags, "--test", "--out", str(out)]) == 0
    assert "has no test.tsv: no test result" in capsys.readouterr().out
    assert run_folder.read_log(out)[-1]["test"] is None


def test_the_seed_reaches_the_head_the_pairs_the_order_and_new_ranks(flags):
    one, two = (train.set_up(flags_of([*flags, "--seed", s])) for s in "01")
    a, b = (lora.trainable(run.model) for run in (one, two))
    drawn = [name for name in a if name.endswith(("lora_A", "classifier.weight"))]
    assert len(drawn) > 2 and not [name for name in drawn if torch.equal(a[name], b[name])]
    assert train.epoch_steps(one, 0) != train.epoch_steps(two, 0)
    generators = [train.around_steps(run)["generator"] for run in (one, two)]
    assert generators[0].initial_seed() != generators[1].initial_seed()


def test_how_a_method_is_said():
    said = describe(flags_of(["--preset", "delta-lora", "--delta-start", "1"]))
    assert "lambda=2 K=1:" in said
