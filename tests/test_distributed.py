"""Two processes with half of each batch are one with all of it; and a run under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed
import runs
import tiny
import train

HERE = Path(__file__).parent
METHODS = {
    "lora": "--preset lora --accumulate 2 --clip 0.5",
    "heterolora": "--every 0.4 --score-batches 2",
    "delta": "--preset delta-lora --delta-ratio 0.5 --delta-start 1",
}


def launch(processes, script, *argv):
    """torchrun on this machine; one process: plain Python."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def flags(tmp_path):
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = f"--task mrpc --data-dir {task} --model {model} --r 2 --batch-size 5 --lr 0.01"
    return [*text.split(), "--device", "cpu"]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(flags, tmp_path, method):
    """float64; 24 examples in batches of 5: shares of 3 and 2, and a last batch of 4."""
    argv, results = [*flags, *METHODS[method].split()], {}
    for n in (1, 2):
        done = launch(n, HERE / "two_processes.py", tmp_path / str(n), *argv)
        assert done.returncode == 0, done.stderr
        results[n] = [torch.load(tmp_path / f"{n}.{rank}") for rank in range(n)]
    (one,), (first, second) = results[1], results[2]
    for key in ("losses", "parameters", "weights", "metrics", "history"):
        torch.testing.assert_close(first[key], one[key], rtol=0, atol=1e-10)
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)  # the same bits
    if method == "heterolora":
        decisions = [{n for n, on in h["on"].items() if on} for h in one["history"]]
        assert decisions == [{n for n, on in h["on"].items() if on} for h in first["history"]]
        assert len(decisions) == 6


def test_a_run_under_torchrun(flags, tmp_path):
    """One run folder, one voice; stopped by SIGTERM in one process it resumes with two alone."""
    out = tmp_path / "run"
    script = Path(train.__file__)
    done = launch(2, script, *flags, "--epochs", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("method ") == 1
    stored, note = runs.load_checkpoint(out)
    assert stored["position"]["step"] == 10 and len(stored["generators"]) == 2 and not note
    assert [e["event"] for e in runs.read_log(out)].count("eval") == 2
    assert train.main(["--resume", str(out)]) == 2  # one process


def test_one_process_exchanges_nothing():
    assert distributed.world() == 1 and distributed.rank() == 0
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.gather("x") == ["x"]
    parameter = torch.nn.Parameter(torch.ones(2))
    assert distributed.sum_gradients([parameter], 1.5, 0.0) == [1.5, 0.0]
    assert parameter.grad is None
