"""tools/faults.py in short: real kills of a tiny run; and the full version's own judgement."""

import json
import random

import pytest

import tiny
import train
from support import run_folder
from tools import faults


@pytest.mark.parametrize("name", faults.METHODS)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, name):
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    flags = f"--task mrpc --data-dir {task} --model {model} --epochs 3 --r 2 --device cpu"
    argv = [*faults.METHODS[name].split(), *flags.split(), "--batch-size", "8"]
    reference = faults.run([*argv, "--out", str(tmp_path / "reference")])
    counts = json.loads(reference.stdout.splitlines()[-1])
    assert {"training", "evaluation", "checkpoint", "result"} <= set(counts)
    assert ("scoring" in counts) == (name == "heterolora")
    trials = list(faults.trials(counts, 5, random.Random(1)))
    phase = "scoring" if name == "heterolora" else "checkpoint"
    chosen = [next(t for t in trials if t[:2] == ("SIGKILL", phase))]
    chosen += [next(t for t in trials if t[0] == f) for f in ("SIGTERM", "disk full")]
    expected = faults.outcome(tmp_path / "reference")
    for i, (fault, phase, call) in enumerate(chosen):
        out = tmp_path / str(i)
        codes, last = faults.strike(out, argv, fault, phase, call)
        assert codes == faults.expected_codes(fault), (fault, phase, call, last)
        assert faults.same(faults.outcome(out), expected), (fault, phase, call, last)


@pytest.fixture
def finished(tmp_path):
    """(folder, flags) of a run with two checkpoints."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    flags = f"--task mrpc --data-dir {task} --model {model} --epochs 2 --r 2 --device cpu"
    argv = ["--preset", "lora", *flags.split(), "--batch-size", "8"]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run", argv


@pytest.mark.parametrize("where", [10, -40, -5])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(finished, capsys, where):
    folder, _ = finished
    expected = faults.outcome(folder)
    path = folder / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[where] ^= 4
    path.write_bytes(content)
    capsys.readouterr()
    assert train.main(["--resume", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint.pt is damaged: its checksum is wrong" in out
    assert "going on from checkpoint.previous.pt, step 3" in out
    assert faults.same(faults.outcome(folder), expected)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (folder / name).write_bytes(b"nothing")
    assert train.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("is damaged") == 2 and error.count("\n") == 1


def test_ctrl_c_while_a_file_is_written_leaves_nothing_beside_it(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(b"before")
    monkeypatch.setattr(run_folder.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_folder.write_atomic(tmp_path / "a", b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"before")]


def test_killed_between_the_two_renames(finished):
    """checkpoint.pt is away already and its successor not yet there."""
    folder, _ = finished
    expected = faults.outcome(folder)
    (folder / "checkpoint.pt").unlink()
    assert train.main(["--resume", str(folder)]) == 0
    assert faults.same(faults.outcome(folder), expected)


def test_two_runs_in_one_folder(finished, capsys):
    folder, argv = finished
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with run_folder.locked(folder):
        assert train.main(["--resume", str(folder)]) == 2
        assert "another process is writing to the run folder" in capsys.readouterr().err
        assert train.main([*argv, "--out", str(folder)]) == 2
        assert train.main(["--resume", str(folder), "--eval-only"]) == 0  # reading is free
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    run_folder.write_atomic(path, b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_folder.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
