"""The run folder: what a run leaves behind, written so that nothing is ever half there.

    config.json           all flags, fingerprints of data and base, versions, git commit
    metrics.jsonl         one JSON object a line; "event" = train | eval | score | done
    allocation.json       every decision: scores, and what is on
    checkpoint.pt         the state of the run, and checkpoint.previous.pt (checkpoint.py)
    adapter.safetensors   what was trained (adapter_file.py)
    written.json          of text tasks: prompts, what was written, references
    lock                  held by the process that writes here

Files are written beside their final name, flushed to the disk, and renamed.

What this file does not do: decide what is stored (run.py, checkpoint.py), export to other
formats (tools/peft).
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch

from support.errors import one_line
from support.form import count, misfit

FINGERPRINT = {"examples": count, "sha256": str}


def write_atomic(path, content):
    """bytes -> path: the old file or the whole new one, whatever happens in between.

    Raises:
        OSError: disk full, folder gone …; the old file is untouched, nothing is left beside it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path, content):
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def versions():
    """What the numbers of a run depend on, beside its flags.

    Returns:
        dict: of Python and each module its version, the number of threads, and "git": the commit,
        "COMMIT+changes" where a file of Python differs from it, None outside a repository.
    """

    def git(*words):
        # Without locks: to ask changes nothing, not even the times in git's index.
        here = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
        command = shutil.which("git") and [*here, *words]
        return command and subprocess.run(command, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "HEAD")
    changed = head and git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
    modules = (torch, numpy, safetensors, tokenizers)
    return {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in modules},
        "threads": torch.get_num_threads(),
        "git": head + "+changes" * bool(changed) if head else None,
    }


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock; the kernel lets it go when the process ends, however it ends.

    Raises:
        OSError: another process holds it, or the folder cannot be written.
    """
    with locked_file(folder / "lock", f"the run folder {folder}"):
        yield


@contextlib.contextmanager
def locked_file(path, what=""):
    """A file, open for reading and appending, that this process alone may write.

    Args:
        path: of the file. what: str, the words for it.

    Raises:
        OSError: another process holds it, or it cannot be written.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another process is writing to {what or path}: let it finish"
            raise BlockingIOError(message) from error
        yield file


def create(folder, stack, flags, data):
    """Make a new run folder and hold its lock.

    Args:
        folder: pathlib.Path, new or empty.
        stack: contextlib.ExitStack that lets the lock go.
        flags: dict, and data: dict split -> fingerprint, what config.json stores.

    Returns:
        folder.

    Raises:
        OSError: it is not empty, in use, or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_filled(folder)  # before it gets a lock, and again when nobody else can fill it
    stack.enter_context(locked(folder))
    refuse_filled(folder)
    write_json(folder / "config.json", {"flags": flags, "data": data, "versions": versions()})
    return folder


def refuse_filled(folder):
    """Raises FileExistsError where a folder holds something: a run is never overwritten.

    What a start that was killed leaves behind (a lock, a file that was being written) is nothing.
    """
    if any(path.name != "lock" and path.suffix != ".tmp" for path in folder.iterdir()):
        raise FileExistsError(
            f"the run folder {folder} is not empty: give another --out, or go on with --resume "
            f"{folder}"
        )


def read_json(path):
    """What a JSON file holds. Raises ValueError, in one line, where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error


def read_config(folder, key="flags"):
    """A part of a run's config.json: "flags", or "data", which is {} in a run that has none.

    Raises:
        FileNotFoundError: no run folder. ValueError: not the config.json of a run.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json")
    content = read_json(path)
    wrong = misfit(content, dict) or misfit(content.get("flags"), dict, "flags")
    wrong = wrong or misfit(content.get("data", {}), {str: FINGERPRINT}, "data")
    if wrong:
        raise ValueError(f"{path} is not the config.json of a run: {wrong}")
    return content.get(key, {})


def other_data(folder, data):
    """In what a run's data and model differ from others, in words; "" where they do not.

    Args:
        data: dict of what is compared -> its fingerprint, as run.fingerprints gives it. What the
            run did not have is not compared.
    """
    stored, found = read_config(folder, "data"), []
    for what, now in data.items():
        before = stored.get(what, now)
        if before == now:
            continue
        if what == "config":
            found.append("another model: its config.json said something else")
        elif what == "base":
            found.append("another base: its pretrained weights were not these")
        else:
            counts = f"{before['examples']} examples, not these {now['examples']}"
            had = counts if before["examples"] != now["examples"] else "other examples"
            found.append(f"other data: its {what} set had {had}")
    return f"{folder} has {', '.join(found)}" if found else ""


# ------------------------------------------------------------------------------------------ metrics


def log(folder, event, **values):
    """Append one line to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": event, **values}) + "\n")


def read_log(folder):
    """All lines of metrics.jsonl, as dicts; a last line that a crash cut short is left out.

    Raises:
        ValueError: a line that is no event, with file and line number.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not JSON: {one_line(error)}") from error
        wrong = misfit(event, dict, "the line") or misfit(event.get("event"), str, "its event")
        if wrong:
            raise ValueError(f"{path}:{number}: {wrong}")
        events.append(event)
    return events


def done_line(folder, lines):
    """The "done" of a log, where it comes directly after its first `lines` lines; else None."""
    after = read_log(folder)[lines : lines + 1]
    return next((line for line in after if line["event"] == "done"), None)


def truncate_log(folder, lines):
    """Keep the first `lines` lines: what a resumed run repeats is not reported twice."""
    kept = read_log(folder)[:lines]
    write_atomic(
        folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode()
    )
