"""Two processes with half of each batch are one with all of it; and a run under torchrun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora
import tiny
import train
from support import checkpoint, distributed, flags, run_folder

METHODS = {
    "lora": "--preset lora --accumulate 2 --clip 0.5",
    "heterolora": "--every 0.4 --score-batches 2",
    "delta": "--preset delta-lora --delta-ratio 0.5 --delta-start 1",
}


@pytest.fixture
def argv(tmp_path):
    """24 examples in batches of 5: shares of 3 and 2, and a last batch of 4."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = f"--task mrpc --data-dir {task} --model {model} --r 2 --batch-size 5 --lr 0.01"
    return [*text.split(), "--device", "cpu"]


def two_epochs(argv):
    """A run in float64: what came of it."""
    run, losses = train.set_up(flags.parse_flags(argv)), []
    run.model.double()
    for epoch in range(2):
        groups = train.epoch_steps(run, epoch)
        for i, group in enumerate(groups):
            if run.plan and run.plan.due(run.step, i, len(groups)):
                train.decide(run)
            losses.append(train.train_step(run, group, 0.01))
            run.step += 1
    return {
        "losses": losses,
        "metrics": train.evaluate(run.model, run.task, run.dev),
        "parameters": {n: p.detach() for n, p in lora.trainable(run.model).items()},
        "weights": {n: p.detach() for n, p in run.model.named_parameters() if "base" in n},
        "history": run.plan.history if run.plan else [],
    }


def in_processes(function, count, folder):
    """[function() in process 0, 1, …], forked, joined as torchrun would join them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            code = 70
            try:
                where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
                where |= {"RANK": rank, "WORLD_SIZE": count}
                os.environ.update({k: str(v) for k, v in where.items()})
                distributed.start()
                torch.save(function(), folder / f"result.{rank}")
                distributed.stop()
                code = 0
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * count
    return [torch.load(folder / f"result.{rank}") for rank in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(argv, tmp_path, method):
    """Losses, metrics, A, B, W and scores to 1e-10; the two between themselves to the bit."""
    argv += METHODS[method].split()
    one = two_epochs(argv)
    first, second = in_processes(lambda: two_epochs(argv), 2, tmp_path)
    for key in one:
        torch.testing.assert_close(first[key], one[key], rtol=0, atol=1e-10)
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    decisions = [[n for n, on in h["on"].items() if on] for h in one["history"]]
    assert decisions == [[n for n, on in h["on"].items() if on] for h in first["history"]]
    assert len(decisions) == (6 if method == "heterolora" else 0)
    assert len(set(one["losses"])) == len(one["losses"])


def test_processes_that_would_disagree_agree(argv, tmp_path, monkeypatch):
    """Scores that differ by rounding between machines: all decide by the mean."""

    def tilted(_name, model, _batches):
        tilt = 1e-9 * (-1) ** distributed.rank()
        return {n: 1.0 + tilt * (-1) ** i for i, n in enumerate(lora.adapters(model))}

    def decide():
        run = train.set_up(flags.parse_flags(argv))
        train.decide(run)
        return run.plan.history[0]

    monkeypatch.setattr(train.proxies, "score", tilted)
    first, second = in_processes(decide, 2, tmp_path)
    assert first == second and set(first["scores"].values()) == {1.0}


def test_each_process_draws_its_own_dropout(argv, tmp_path):
    def initial_seed():
        train.set_up(flags.parse_flags([*argv, "--seed", "4"]))
        return torch.initial_seed()

    first, second = in_processes(initial_seed, 2, tmp_path)
    assert first == 4 and second != 4


def test_a_run_under_torchrun(argv, tmp_path):
    """One run folder, one voice; the generators of both processes are in the checkpoint."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--"]
    command = [*torchrun, train.__file__, *argv, "--epochs", "2", "--dropout", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("method ") == 1
    stored, note = checkpoint.read_last(out)
    assert stored["position"]["step"] == 10 and note == ""
    assert len(stored["generators"]) == 2
    assert [e["event"] for e in run_folder.read_log(out)].count("eval") == 2
    assert set(p.name for p in Path(out).iterdir()) == {
        *("config.json", "metrics.jsonl", "allocation.json", "adapter.safetensors", "lock"),
        *("checkpoint.pt", "checkpoint.previous.pt"),
    }


def test_another_number_of_processes_is_refused(argv, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*argv, "--epochs", "1", "--out", str(out)]) == 0
    stored, _ = checkpoint.read_last(out)
    checkpoint.write(out, {**stored, "generators": stored["generators"] * 2})
    assert train.main(["--resume", str(out)]) == 2
    assert "has 2 processes, this is 1: resume with as many" in capsys.readouterr().err


def test_one_process_exchanges_nothing():
    assert distributed.world() == 1 and distributed.rank() == 0
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.gather("x") == ["x"]
    parameter = torch.nn.Parameter(torch.ones(2))
    assert distributed.sum_gradients([parameter], 1.5, 0.0) == [1.5, 0.0]
    assert parameter.grad is None
