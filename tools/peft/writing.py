"""A run of ours as a PEFT adapter folder (the files of PEFT 0.21), exact for every kind of run.

    ours                       PEFT (full paths: relative to the HF model)
    layers.0.q_proj.lora_A     base_model.model.<full path>.lora_A.weight       (r, in)
    layers.0.q_proj.lora_B     base_model.model.<full path>.lora_B.weight       (out, r)
    layers.0.q_proj.lora_magnitude
                               ….lora_magnitude_vector, and use_dora                        (out,)
    scaling                    lora_alpha / r, by module: alpha_pattern / rank_pattern
    classifier, pooler, score  base_model.model.<HF path>.weight, and modules_to_save
    no head: a language model  task_type CAUSAL_LM, else SEQ_CLS

What is off is absent: PEFT refuses rank 0. GPT-2 has q, k and v in one matrix (d -> 3d): A is
stacked and B block-diagonal, of rank r_q + r_k + r_v. Delta-LoRA is the adapter of rank <= 2r on
the original weights (delta_lora.DeltaLoRA.export).

What this file does not do: train, read PEFT folders (reading.py).
"""

import dataclasses
import functools
import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import torch

import lora
from support import adapter_file, download, hf_folder, run_folder
from support.errors import shown
from support.families import FAMILIES

ROOT = "base_model.model."
HEADS = {  # family -> {our module: what PEFT's modules_to_save calls the module that it is in}
    **{name: {"score": "score"} for name, f in FAMILIES.items() if f.features["causal"]},
    "bert": {"classifier": "classifier", "pooler": "pooler"},
    "roberta": {"classifier": "classifier", "pooler": "classifier"},
}
HUB_IDS = {  # names of ours -> the same weights on the hub; the quantised ones are not there
    "minilm": download.MINILM_REPO,
    "smollm2": download.SMOLLM2_REPO,
    "smollm2-q4": None,
}


@dataclasses.dataclass
class Pair:
    """delta W = scaling * B A; A (r, in), B (out, r).

    With a magnitude (out,) it is DoRA: of the weight W + scaling * B A each row is divided by its
    norm, and multiplied by that.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def r(self):
        return len(self.lora_A)

    def count(self):
        """Numbers that it holds."""
        magnitude = 0 if self.magnitude is None else self.magnitude.numel()
        return self.lora_A.numel() + self.lora_B.numel() + magnitude

    def folded(self):
        """The same with scaling 1, B carrying it."""
        return Pair(self.lora_A, self.scaling * self.lora_B, 1.0, self.magnitude)

    def norm(self):
        """||scaling B A||_F without the (out, in) matrix: ||B A||^2 = tr(B^T B A A^T)."""
        a, b = self.lora_A.double(), self.lora_B.double()
        return abs(self.scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


def full_path(family, module):
    """Our module -> its path in the HF model with a head: "bert.encoder.layer.0.…"."""
    record, place = FAMILIES[family], module.rpartition(".")[2]
    if place in lora.RESIDUALS + lora.CROSS:
        _, i, _ = module.split(".")
        return f"{record.prefix}{record.stack}.{i}.{place}"
    prefix = "" if module in record.unprefixed else record.prefix
    return prefix + hf_folder.hf_module(family, module)


RUN_FLAGS = ("model", "lora_dropout", "shortcuts", "shortcut_norm")  # of config.json, needed here


def read_run(folder):
    """A finished run's adapter: (flags, {our name: Pair of what is on}, {head parameter: tensor}).

    Raises:
        FileNotFoundError: no run, or not finished. ValueError: its files are not what they should
            be.
    """
    flags = run_folder.read_config(folder)
    absent = [name for name in RUN_FLAGS if name not in flags]
    if absent:
        raise ValueError(f"{folder}/config.json has no flag {', '.join(absent)}")
    if not isinstance(flags["model"], str):
        raise ValueError(f"{folder}/config.json: model is {shown(flags['model'])}, no name")
    path = Path(folder) / "adapter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no adapter.safetensors: finish the run (train.py --resume {folder})"
        )
    tensors, about = adapter_file.read(path, flags["shortcut_norm"])
    kinds = {a["kind"] for a in about.values() if "kind" in a} - {"dora"}
    if kinds:
        raise ValueError(f"{path} holds {', '.join(kinds)}: its modules add no matrix to a weight")
    on = {name: a["scaling"] for name, a in about.items() if a["enabled"]}
    needed = [f"{n}.{key}" for n in on for key in ("lora_A", "lora_B")]
    needed += [f"{n}.lora_magnitude" for n in on if "kind" in about[n]]
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise ValueError(f"{path} has no {', '.join(absent)}")
    pairs = {}
    for name, scaling in on.items():
        factors = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        pairs[name] = Pair(*factors, scaling, tensors.get(f"{name}.lora_magnitude"))
    for name, pair in pairs.items():
        shapes = pair.lora_A.shape, pair.lora_B.shape
        if any(len(s) != 2 for s in shapes) or shapes[0][0] != shapes[1][1]:
            raise ValueError(f"{path}: {name} has lora_A and lora_B of shapes that do not multiply")
        if not pair.norm() < math.inf:
            raise ValueError(f"{path}: {name} has a delta W that is not finite")
    head = {name: t for name, t in tensors.items() if ".lora_" not in name}
    return flags, pairs, head


def without_shortcuts(pairs, drop):
    """The pairs on linear layers; ValueError where a shortcut would be lost."""
    cross = [n for n in pairs if n.rpartition(".")[2] in lora.RESIDUALS + lora.CROSS]
    alive = [n for n in cross if pairs[n].norm() > 0]
    if alive:
        raise ValueError(
            f"{len(alive)} shortcuts are on ({', '.join(alive[:3])}…) and a stock model has no "
            "place for them: train with --shortcuts none, or export with --keep-shortcuts for a "
            "model that prepare() was called on"
        )
    if cross and not drop:
        raise ValueError(
            f"{len(cross)} shortcuts are on, all zero: --drop-shortcuts leaves them out"
        )
    return {n: p for n, p in pairs.items() if n not in cross}


def fuse_gpt2(pairs):
    """q, k, v of a layer as one pair on c_attn: A stacked, B block-diagonal; {module: Pair}.

    Raises:
        ValueError: DoRA on one or two of them: the rows of the others have no magnitude here.
    """
    fused = {
        n: p for n, p in pairs.items() if n.rpartition(".")[2] not in ("q_proj", "k_proj", "v_proj")
    }
    for i in dict.fromkeys(n.split(".")[1] for n in pairs if n not in fused):
        parts = [pairs.get(f"layers.{i}.{p}_proj") for p in "qkv"]
        there = [p.folded() for p in parts if p]
        d = len(there[0].lora_B)
        lora_A = torch.cat([p.lora_A for p in there])  # (r_q + r_k + r_v, d)
        lora_B = torch.zeros(3 * d, len(lora_A)).to(lora_A)
        column = 0
        for row, part in enumerate(parts):
            if part:
                lora_B[row * d : (row + 1) * d, column : column + part.r] = part.folded().lora_B
                column += part.r
        magnitudes = [p.magnitude for p in there if p.magnitude is not None]
        if magnitudes and len(magnitudes) < 3:
            raise ValueError(
                "GPT-2 has q, k and v in one matrix, and DoRA the norm of each of its rows: train "
                "with q_proj, k_proj and v_proj all on"
            )
        magnitude = torch.cat(magnitudes) if magnitudes else None  # (3 d,)
        fused[f"layers.{i}.q_proj"] = Pair(lora_A, lora_B, 1.0, magnitude)  # its HF path: c_attn
    return fused


def padded(pairs):
    """Every pair at the largest rank, with zeros, and scaling 1."""
    largest = max(p.r for p in pairs.values())
    result = {}
    for name, pair in pairs.items():
        a, b = pair.lora_A, pair.folded().lora_B
        more = largest - pair.r
        lora_A = torch.cat([a, a.new_zeros(more, a.shape[1])])  # (largest, in)
        lora_B = torch.cat([b, b.new_zeros(len(b), more)], 1)  # (out, largest)
        result[name] = Pair(lora_A, lora_B, 1.0, pair.magnitude)
    return result


def peft_files(pairs, head, family, base, pad=False, dropout=0.0):
    """A PEFT adapter: (content of adapter_config.json, tensors of adapter_model.safetensors).

    Args:
        pairs: {our module: Pair}, of what is on.
        head: {our parameter: tensor}; empty for a language model, whose head is not trained.
        family: key of FAMILIES. base: hub id or path of the base model, or None.
        pad: one rank for all, for consumers that ignore rank_pattern and alpha_pattern.
        dropout: lora_dropout, as trained.

    Raises:
        ValueError: no pair; or DoRA beside pairs that are not.
    """
    pairs = {n: p for n, p in pairs.items() if p.r}
    if not pairs:
        raise ValueError("no LoRA module is on: PEFT has no adapter without one")
    dora = {n for n, p in pairs.items() if p.magnitude is not None}
    if dora and dora != set(pairs):
        raise ValueError(
            "PEFT's use_dora is of all modules, and shortcuts are plain LoRA: train DoRA with "
            "--shortcuts none"
        )
    pairs = fuse_gpt2(pairs) if family == "gpt2" else pairs
    pairs = padded(pairs) if pad else pairs
    paths = {full_path(family, name): pair for name, pair in pairs.items()}
    r = max(p.r for p in paths.values())
    largest = next(p for p in paths.values() if p.r == r)
    alpha = largest.scaling * r
    if head and family not in HEADS:
        raise ValueError(f"the head of a model of family {family!r} has no name in HEADS")
    saved = sorted({HEADS[family][n.rpartition(".")[0]] for n in head})
    config = {
        "alpha_pattern": {n: p.scaling * p.r for n, p in paths.items() if p.scaling * p.r != alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {name: p.r for name, p in paths.items() if p.r != r},
        "target_modules": sorted(paths),
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "use_rslora": False,
    } | ({"use_dora": True} if dora else {})
    return config, peft_tensors(paths, head, family)


def peft_tensors(paths, head, family):
    """{their name: tensor} of {full path: Pair} and {our head parameter: tensor}."""
    tensors = {}
    for path, pair in paths.items():
        tensors[f"{ROOT}{path}.lora_A.weight"] = pair.lora_A
        tensors[f"{ROOT}{path}.lora_B.weight"] = pair.lora_B
        if pair.magnitude is not None:
            tensors[f"{ROOT}{path}.lora_magnitude_vector"] = pair.magnitude
    for name, tensor in head.items():
        module, _, kind = name.rpartition(".")
        tensors[f"{ROOT}{full_path(family, module)}.{kind}"] = tensor
    return tensors


def refuse_unknown(run, pairs, head, family):
    """Raises ValueError where a module or a head has no name in the family, before it is named."""
    if family not in FAMILIES:
        raise ValueError(f"the model of {run} is of family {shown(family)}, which is not known")
    layers = re.compile(r"layers\.\d+\.(\w+)")
    places = {*FAMILIES[family].layer, *lora.RESIDUALS, *lora.CROSS}
    unknown = [n for n in pairs if not (m := layers.fullmatch(n)) or m[1] not in places]
    unknown += [n for n in head if n.rpartition(".")[0] not in HEADS.get(family, ())]
    if unknown:
        said = ", ".join(shown(name) for name in unknown[:3])
        raise ValueError(f"{run}/adapter.safetensors has {said}, which no {family} model has")


def refuse_filled(folder):
    """Raises FileExistsError where there is something: nothing is ever overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: give another one")


def write_peft(folder, config, tensors, *copied, check=None):
    """Write a PEFT adapter folder, whole or not at all; the same content gives the same bytes.

    Args:
        folder: path, new or empty. config, tensors: as peft_files returns them.
        copied: paths of files to lay beside them, where they exist.
        check: function of the folder as it was written, before it is in its place.

    Raises:
        FileExistsError: the folder holds something. OSError: it cannot be written.
    """
    folder = Path(folder)
    refuse_filled(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "adapter"
        new.mkdir()
        content = {n: tensors[n].detach().float().contiguous() for n in sorted(tensors)}
        (new / "adapter_model.safetensors").write_bytes(
            safetensors.torch.save(content, {"format": "pt"})
        )
        text = json.dumps(config, indent=2, sort_keys=True)
        (new / "adapter_config.json").write_text(text + "\n")
        for path in copied:
            if path.is_file():
                shutil.copy(path, new)
        if check:
            check(new)
        new.replace(folder)


def export(run, folder, pad=False, drop_shortcuts=False, keep_shortcuts=False):
    """RUN -> a PEFT adapter folder, with the run's allocation.json in it.

    Args:
        run, folder: paths.
        pad: one rank for all modules, with zeros.
        drop_shortcuts: leave out shortcuts that are zero.
        keep_shortcuts: write shortcuts under the paths that prepare.prepare() makes.

    Returns:
        the content of adapter_config.json.

    Raises:
        ValueError: shortcuts that no model has a place for, --shortcut-norm reuse, nothing on, or
            an adapter that is not the model's. OSError: see read_run, write_peft.
    """
    from tools.peft import prepare, reading  # here, because reading.py is built on this file

    flags, pairs, head = read_run(run)
    if flags["shortcut_norm"] == "reuse" and flags["shortcuts"] in ("cross", "all"):
        raise ValueError("--shortcut-norm reuse adds LayerNorms that no transformers model has")
    if not keep_shortcuts:
        pairs = without_shortcuts(pairs, drop_shortcuts)
    name = flags["model"]
    family = hf_folder.read_config(download.model_folder(name)).get("model_type")
    refuse_unknown(run, pairs, head, family)
    stack = FAMILIES[family].prefix + FAMILIES[family].stack
    if keep_shortcuts and stack not in prepare.STACKS:
        raise ValueError(f"a {family} model has no place for shortcuts, not even after prepare()")
    base, _, revision = (HUB_IDS.get(name, name) or "").partition("@")
    if Path(name).exists():  # a folder, whose name may have an @
        base, revision = name, ""
    config, tensors = peft_files(
        pairs, head, family, base or None, pad, dropout=flags["lora_dropout"]
    )
    config["revision"] = revision or download.REVISIONS.get(base)
    try:
        check = functools.partial(reading.refuse_unreadable, name=name)
        write_peft(folder, config, tensors, Path(run) / "allocation.json", check=check)
    except ValueError as error:
        raise ValueError(f"{run}/adapter.safetensors does not fit {name}: {error}") from error
    return config
