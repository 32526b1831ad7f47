"""Real runs of two processes under torchrun: signals to it and to them, and how they end.

The faults of tools/faults.py, one after the other in one run; what torchrun says of its own is not
looked at.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
import train
from support import checkpoint
from test_distributed import in_processes
from tools import faults

# One after the other: two that look for a free port at once may find the same.
pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(train.__file__).parent


@pytest.fixture
def argv(tmp_path):
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = f"--task mrpc --data-dir {task} --model {model} --r 2 --batch-size 5 --epochs 2"
    return [*text.split(), "--dropout", "0.1", "--every", "0.4", "--device", "cpu"]


def test_stopped_in_every_way_a_run_ends_with_the_same_bits(argv, tmp_path, capfd):
    """Each signal in the second step since the start; at last the command that was printed."""
    out, reference = tmp_path / "run", tmp_path / "reference"
    assert in_processes(
        lambda: faults.child([*argv, "--out", str(reference)], "", "", 0, ""), 2, tmp_path
    ) == [0, 0]
    counts = [json.loads(s) for s in capfd.readouterr().out.splitlines() if s.startswith("{")]
    moment = int(1.5 * counts[0]["training"] / 10)  # in the second of ten steps
    words, step = [*argv, "--out", str(out)], 0
    for fault, code, gained in (
        ("SIGTERM to torchrun", 1, (2, 3)),
        ("SIGKILL to process 1", 1, (0,)),
        ("SIGINT to torchrun", 1, (2, 3)),
        ("SIGKILL to torchrun", -9, (2, 3)),
    ):
        done = faults.run_under_torchrun(words, fault, "training", moment)
        assert done.returncode == code, (fault, done.stderr)
        assert "[rank" not in done.stderr, (fault, done.stderr)  # no process has a traceback
        before, step = step, checkpoint.read_last(out)[0]["position"]["step"]
        assert step - before in gained, fault
        if step > before:
            said = [line for line in done.stdout.splitlines() if line.startswith("stopped and")]
            assert len(said) == 1
        words = ["--resume", str(out)]
    _, _, command = said[0].partition("go on with: ")
    assert command == f"torchrun --standalone --nproc-per-node 2 -- train.py --resume {out}"
    torchrun, *words = shlex.split(command)
    done = subprocess.run(
        [str(Path(sys.executable).with_name(torchrun)), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("method ") == 1 and "began" not in done.stdout
    assert faults.same(faults.outcome(out), faults.outcome(reference))
    assert {p.name for p in out.iterdir()} == {p.name for p in reference.iterdir()}


def test_a_wrong_flag_is_said_once(argv):
    """By the first process alone; torchrun makes 1 of its exit code."""
    done = subprocess.run(
        [*faults.TORCHRUN, "--", train.__file__, *argv, "--nosuch"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("--nosuch") == 1
