"""Kill runs, fill disks, damage checkpoints, and see whether --resume ends with the same bits.

    python tools/faults.py            20 SIGKILLs for each method, and every other fault; a table

A reference run counts the Python calls in each phase: training, scoring, evaluation, checkpoint,
result. Each fault happens at a random call of a phase, in a real process: SIGKILL, SIGTERM, a disk
that is full (a limit on the size of files), a run folder that vanishes or cannot be written. Then
the cause is removed, the run is resumed, and its checkpoint, log, decisions and adapter are
compared with the reference's, seconds aside. The same with two processes under torchrun, where a
signal goes to one of them or to torchrun itself.

What this file does not do: power loss (files are flushed before they are renamed; that is not
tested here).
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

import torch
import torch.utils.serialization  # else the first torch.save loads it, and counts more calls
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from support import checkpoint, glue, run_folder
from support.errors import one_line
from support.flags import Parser, number

METHODS = {
    "lora": "--preset lora --dropout 0.1",
    "heterolora": "--allocate dynamic --every 0.4 --score-batches 2",
    "tied": "--preset lora --adapter tied --dropout 0.1",
    "lora_pro": "--preset lora --optimizer lora_pro",
    "adalora": "--allocate adalora --shortcuts none --every 0.2",
    "alora": "--allocate alora --shortcuts none --every 0.4 --score-batches 1",
    "delta-lora": "--preset delta-lora --delta-ratio 0.5 --delta-start 1",
}
PHASES = {  # function on the stack -> phase
    "save": "checkpoint",
    "decide": "scoring",
    "evaluate": "evaluation",
    "finish": "result",
    "train_step": "training",
}
FAULTS = ("SIGTERM", "disk full", "folder gone", "folder not writable")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN_FAULTS = (  # a signal, and who gets it
    *("SIGTERM to torchrun", "SIGINT to torchrun", "SIGKILL to torchrun"),
    *("SIGTERM to process 1", "SIGKILL to process 0", "SIGKILL to process 1"),
)


def watcher(fault, phase, moment, folder, counts):
    """A profile function: counts the calls within each phase; at one of them, the fault."""
    inside = ["between"]

    def watch(frame, event, _argument):
        name = frame.f_code.co_name if event in ("call", "return") else ""
        if name in PHASES and event == "call":
            inside.append(PHASES[name])
        counts[inside[-1]] = counts.get(inside[-1], 0) + 1
        if inside[-1] == phase and counts[phase] == moment:
            happen(fault, folder)
        if name in PHASES and event == "return":
            inside.pop()

    return watch


def happen(fault, folder):
    if fault in ("SIGKILL", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault.endswith("to torchrun"):
        signum, parent = getattr(signal, fault.split()[0]), os.getppid()
        handler = signal.getsignal(signum)
        os.kill(parent, signum)
        # until torchrun has passed it on (the handler is another one then), or is gone
        while os.getppid() == parent and signal.getsignal(signum) is handler:
            time.sleep(0.01)
    elif " to process " in fault:
        os.kill(os.getpid(), getattr(signal, fault.split()[0]))
    elif fault == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    elif fault == "folder gone":
        os.rename(folder, f"{folder}.gone")
    else:
        os.mkdir(os.path.join(folder, "checkpoint.new.pt.tmp"))


def child(argv, fault, phase, moment, folder):
    """In the new process: train.py, with the fault at its moment; without one, the counts."""
    counts, begin = {}, train.train

    def watched(run):
        sys.setprofile(watcher(fault, phase, moment, folder, counts))
        begin(run)

    train.train = watched
    try:
        code = train.main(argv)
    finally:
        sys.setprofile(None)
    if not fault:
        print(json.dumps(counts))
    return code


def run(argv, fault="", phase="", moment=0, folder=""):
    """train.py in a forked process, which has loaded torch already, with a fault at some call.

    Returns:
        namespace: returncode (negative: the signal), stdout, stderr.
    """
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # loads what every child would load
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                sys.stdout, sys.stderr = out, err
                # tqdm's own lock is shared by all forked processes: killed with it, none goes on
                tqdm.set_lock(threading.RLock())
                code = child(argv, fault, phase, moment, str(folder))
            except BaseException:
                traceback.print_exc()
            finally:
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    out.flush()
                    err.flush()
                finally:
                    os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return types.SimpleNamespace(returncode=status, stdout=out.read(), stderr=err.read())


def run_under_torchrun(argv, fault="", phase="", moment=0):
    """The same with two processes; process 0 sends what goes to torchrun.

    Ends when both processes have ended, torchrun's death or not: they hold the other end of stdout.
    """
    words = [*TORCHRUN, "--", __file__, "--worker", fault, phase, str(moment), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def worker(fault, phase, moment, *argv):
    """In a process that torchrun started: train.py, with the fault where it concerns this one."""
    victim = fault[-1] if fault[-1:].isdigit() else "0"
    if fault and os.environ["RANK"] != victim:
        fault, phase = "none", "none"
    return child(list(argv), fault, phase, int(moment), "")


# ---------------------------------------------------------------------------------------- comparing


def same(a, b):
    """Equal to the last bit, through nested containers; times aside."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        timeless = [k for k in a if not str(k).endswith("seconds")]
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in timeless)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(folder):
    """What a finished run consists of."""
    allocation = folder / "allocation.json"
    return {
        "checkpoint": checkpoint.read_last(folder)[0],
        "log": run_folder.read_log(folder),
        "decisions": json.loads(allocation.read_text()) if allocation.is_file() else None,
        "adapter": (folder / "adapter.safetensors").read_bytes(),
    }


# ------------------------------------------------------------------------------------------- faults


def small_task(folder):
    """The first pairs of the embedded task, as a folder of TSVs."""
    folder.mkdir()
    for name, rows in (("train.tsv", 40), ("dev.tsv", 24)):
        lines = (glue.EMBEDDED / name).read_text(encoding="utf-8").splitlines()[: rows + 1]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def resume(folder, argv):
    """Go on with a run, or start it again where it had not begun to exist."""
    if (folder / "config.json").is_file():
        return run(["--resume", str(folder)])
    return run([*argv, "--out", str(folder)])


def strike(folder, argv, fault, phase, moment):
    """One fault, its removal, and the resumed run: (exit codes, last words of the first)."""
    first = run([*argv, "--out", str(folder)], fault, phase, moment, folder)
    gone, blocked = Path(f"{folder}.gone"), folder / "checkpoint.new.pt.tmp"
    if gone.exists():
        shutil.rmtree(folder, ignore_errors=True)
        gone.rename(folder)
    if blocked.is_dir():
        blocked.rmdir()
    last = (first.stderr.strip().splitlines() or [""])[-1]
    return (first.returncode, resume(folder, argv).returncode), last


def strike_under_torchrun(folder, argv, fault, phase, moment):
    """One signal to two processes or their torchrun, and the resumed run; as strike."""
    first = run_under_torchrun([*argv, "--out", str(folder)], fault, phase, moment)
    words = [*argv, "--out", str(folder)]
    if (folder / "config.json").is_file():
        words = ["--resume", str(folder)]
    last = (first.stdout.strip().splitlines() or [""])[-1]
    return (first.returncode, run_under_torchrun(words).returncode), last


def damage(folder, argv, how):
    """A finished epoch's checkpoint is cut or changed; the one before it must take over."""
    checkpoint = folder / "checkpoint.pt"
    content = bytearray(checkpoint.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 3] ^= 1
    checkpoint.write_bytes(content)
    done = resume(folder, argv)
    said = "is damaged" in done.stdout and "checkpoint.previous.pt" in done.stdout
    return done.returncode, said


def expected_codes(fault):
    codes = {"SIGKILL": (-9, 0), "SIGKILL to torchrun": (-9, 0), "SIGTERM": (130, 0)}
    return codes.get(fault, (1, 0))  # torchrun makes 1 of every code that is not 0


def trials(counts, kills, rng):
    """(fault, phase, call) of each trial: the phases in turn, a random call of each."""
    phases = [phase for phase in counts if phase != "between"]
    for i in range(kills):
        phase = phases[i % len(phases)]
        yield "SIGKILL", phase, rng.randint(1, counts[phase])
    for fault in FAULTS * 2:
        yield fault, "training", rng.randint(1, counts["training"])


def method(name, folder, argv, kills, rng):
    """All trials of one method; returns the number of those that ended otherwise."""
    reference = run([*argv, "--out", str(folder / "reference")])
    if reference.returncode:
        raise RuntimeError(f"the reference run failed: {reference.stderr.strip().splitlines()[-1]}")
    counts = json.loads(reference.stdout.splitlines()[-1])
    expected, bad = outcome(folder / "reference"), 0
    for i, (fault, phase, call) in enumerate(trials(counts, kills, rng)):
        out = folder / f"trial-{i}"
        codes, last = strike(out, argv, fault, phase, call)
        equal = codes[1] == 0 and same(outcome(out), expected)
        # a fault that does not stop the run (no checkpoint was due any more) is none
        good = equal and codes in (expected_codes(fault), (0, 0)) and "Traceback" not in last
        bad += not good
        verdict = "same bits" if equal else f"DIFFERS: {last}"
        print(f"{name:<11} {fault:<20} {phase:<11} call {call:>7,}  exit {codes[0]:>4}  {verdict}")
    for how in ("truncated", "one bit flipped"):
        out = folder / how.replace(" ", "-")
        run([*argv, "--out", str(out)], "SIGKILL", "training", counts["training"], out)
        code, said = damage(out, argv, how)
        equal = code == 0 and said and same(outcome(out), expected)
        bad += not equal
        verdict = "same bits" if equal else "DIFFERS"
        print(f"{name:<11} {'checkpoint ' + how:<51} {verdict}")
    with run_folder.locked(folder / "reference"):
        second = run(["--resume", str(folder / "reference")])
    refused = second.returncode == 2 and "another process is writing" in second.stderr
    bad += not refused
    verdict = "refused" if refused else "NOT REFUSED"
    print(f"{name:<11} {'a second run in the folder':<51} {verdict}")
    return bad


def method_under_torchrun(name, folder, argv, rng):
    """Every signal to one of two processes and to torchrun, in the phases in turn."""
    reference = run_under_torchrun([*argv, "--out", str(folder / "reference")])
    if reference.returncode:
        raise RuntimeError(f"the reference run failed: {reference.stderr.strip()}")
    found = [json.loads(text) for text in re.findall(r"\{[^{}]*\}", reference.stdout)]
    phases = [phase for phase in found[0] if phase in found[1] and phase != "between"]
    counts = {phase: min(c[phase] for c in found) for phase in phases}  # both get that far
    expected, bad = outcome(folder / "reference"), 0
    for i, fault in enumerate(TORCHRUN_FAULTS):
        phase = phases[i % len(phases)]
        out, call = folder / f"trial-{i}", rng.randint(1, counts[phase])
        codes, last = strike_under_torchrun(out, argv, fault, phase, call)
        equal = codes[1] == 0 and same(outcome(out), expected)
        bad += not (equal and codes[0] == expected_codes(fault)[0])
        verdict = "same bits" if equal else f"DIFFERS: {last}"
        print(f"{name:<11} {fault:<20} {phase:<11} call {call:>7,}  exit {codes[0]:>4}  {verdict}")
    return bad


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--worker"]:
        return worker(*words[1:])
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--kills", type=number(int, 0), default=20, help="SIGKILLs per method (default: 20)"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--model", default="minilm", help="as of train.py (default: minilm)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    try:
        args = parser.parse_args(argv)
        names = list(dict.fromkeys(args.methods.split(",")))
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            raise ValueError(f"--methods {', '.join(unknown)}: allowed: {', '.join(METHODS)}")
    except ValueError as error:
        print(f"faults.py: {one_line(error, 600)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    rng, bad = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        task = small_task(Path(folder) / "task")
        common = ["--task", "mrpc", "--data-dir", str(task), "--model", args.model]
        common += ["--epochs", "3", "--r", "2", "--device", "cpu", "--batch-size", "8"]
        for name in names:
            (work := Path(folder) / name).mkdir()
            flags = [*METHODS[name].split(), *common]
            try:
                bad += method(name, work, flags, args.kills, rng)
                (work / "torchrun").mkdir()
                bad += method_under_torchrun(name, work / "torchrun", flags, rng)
            except RuntimeError as error:
                print(f"faults.py: {one_line(error, 600)}", file=sys.stderr)
                return 2
    print(f"{bad} of the trials ended otherwise" if bad else "every trial ended as it should")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
