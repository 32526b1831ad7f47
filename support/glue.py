"""GLUE's nine tasks and the embedded one: read, tokenise once, batch by length, score.

    paraphrase            data/paraphrase/, shipped with the project, in MRPC's layout
    mrpc rte sst2 …       a folder with GLUE's own train.tsv and dev.tsv, or the hub (nyu-mll/glue)

GLUE's TSVs do not quote: a quotation mark is a character like any other. A BOM and CRLF occur; CoLA
has no header; RTE, QNLI and MNLI have words for labels.

    name       | shape
    example    | dict: input_ids, token_type_ids (lists of t ints), label (int or float)
    batch      | dict: input_ids, attention_mask (b, t), labels (b,); BERT: token_type_ids (b, t)

What this file does not do: WordPiece or BPE themselves (tokenizers does), augmentation.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from support import download
from support.errors import one_line, shown

EMBEDDED = Path(__file__).parents[1] / "data" / "paraphrase"
GROUP = 50  # batches that are sorted by length together


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of GLUE: where its columns are and what is reported.

    columns and label are names in the TSV's header (CoLA: indices, it has none); hub_columns those
    of nyu-mll/glue, whose label column is "label". labels[i] is the TSV's word for class i; () =
    regression. metrics[0] is the headline.
    """

    folder: str
    columns: tuple
    label: str | int
    labels: tuple
    metrics: tuple
    hub_columns: tuple
    head: ClassVar[str] = "classification"
    dev: str = "dev.tsv"
    hub_dev: str = "validation"
    test: str = "test.tsv"
    hub_test: str = "test"
    skip_ragged_rows: bool = False  # QQP's released file has a few rows that lack columns

    @property
    def num_labels(self):
        return len(self.labels) or 1


PAIR = ("sentence1", "sentence2")
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MRPC = ("#1 String", "#2 String")
TASKS = {
    "paraphrase": Task("paraphrase", MRPC, "Quality", BINARY, ("accuracy", "f1"), ()),
    "mrpc": Task("MRPC", MRPC, "Quality", BINARY, ("accuracy", "f1"), PAIR),
    "rte": Task("RTE", PAIR, "label", ENTAILMENT, ("accuracy",), PAIR),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, ("accuracy",), ("sentence",)),
    "cola": Task("CoLA", (3,), 1, BINARY, ("matthews",), ("sentence",)),
    "stsb": Task("STS-B", PAIR, "score", (), ("pearson", "spearman"), PAIR),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        BINARY,
        ("accuracy", "f1"),
        ("question1", "question2"),
        skip_ragged_rows=True,
    ),
    "mnli": Task(
        "MNLI",
        PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("premise", "hypothesis"),
        dev="dev_matched.tsv",
        hub_dev="validation_matched",
        test="test_matched.tsv",
        hub_test="test_matched",
    ),
    "qnli": Task(
        "QNLI",
        ("question", "sentence"),
        "label",
        ENTAILMENT,
        ("accuracy",),
        ("question", "sentence"),
    ),
    "wnli": Task("WNLI", PAIR, "label", BINARY, ("accuracy",), PAIR),
}


# ------------------------------------------------------------------------------------------ reading


def load_task(name, data_dir=None, train=True):
    """Texts and labels of a task.

    Args:
        name: a key of TASKS.
        data_dir: folder with train.tsv and dev.tsv, or with GLUE's folder of the task (MRPC/, RTE/,
            …); None = shipped (paraphrase), else the cache, else the hub.
        train: bool, whether the training set is wanted.

    Returns:
        (train, dev): lists of (texts, label), train None where it is not wanted; texts is a tuple
        of one or two strings, label an int (float for regression).

    Raises:
        ValueError: unknown task; a file, a line or a label that is wrong, with file and line
            number.
        OSError: no such folder or file; hub out of reach.
    """
    folder = task_folder(name, data_dir)
    task = TASKS[name]
    if folder is None:
        found, dev = load_from_hub(name, ("train", task.hub_dev))
        return found if train else None, dev
    found = read_tsv(folder / "train.tsv", task) if train else None
    dev = read_tsv(folder / task.dev, task)
    if train and len(found) > 1 and one_label(found):
        raise ValueError(f"{folder / 'train.tsv'}: all {len(found)} examples have one label")
    return found, dev


def load_test(name, data_dir=None):
    """Texts and labels of a task's test set, where it has labels; GLUE's own have none.

    Args:
        name, data_dir: as in load_task.

    Returns:
        (test, note): test is a list of (texts, label), or None; note says in one line why it is
        None, and is "" otherwise.

    Raises:
        ValueError, OSError: as in load_task; a test file that is not there is no error.
    """
    folder = task_folder(name, data_dir)
    task = TASKS[name]
    if folder is None:
        (test,) = load_from_hub(name, (task.hub_test,))
        if any(label == -1 for _, label in test):
            return None, f"the test set of {name} on the hub has no labels: no test result"
        return test, ""
    path = folder / task.test
    if not path.is_file():
        return None, f"{folder} has no {task.test}: no test result"
    if not has_labels(path, task):
        return None, f"{path} has no labels (GLUE's own test sets have none): no test result"
    return read_tsv(path, task), ""


def has_labels(path, task):
    """Whether a TSV's header names the label column (CoLA: whether the file has no header)."""
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    if isinstance(task.label, str):
        return task.label in header
    return len(header) > max(*task.columns, task.label)  # GLUE's test.tsv: index, sentence


def task_folder(name, data_dir):
    """The folder with the task's TSVs, or None: from the hub. Raises as load_task."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}, allowed: {', '.join(TASKS)}")
    task = TASKS[name]
    if data_dir is None:
        if name != "paraphrase":
            return None
        data_dir = EMBEDDED
    folder = download.expanded(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no data folder at {data_dir}: give one that holds train.tsv and {task.dev}"
        )
    if not (folder / "train.tsv").is_file() and (folder / task.folder).is_dir():
        folder /= task.folder
    return folder


def source(name, data_dir, split):
    """Where the examples of "dev" or "test" lie, in words. Raises as load_task."""
    folder, task = task_folder(name, data_dir), TASKS[name]
    if folder is None:
        return f"nyu-mll/glue, {name}, {getattr(task, f'hub_{split}')}"
    return str(folder / getattr(task, split))


def load_splits(name, data_dir=None, test=False, train=True):
    """Train and dev, and the test set where it is asked for and has labels.

    Returns:
        ((train, dev, test), notes): train is None where it is not wanted, test may be None; notes
        are lines for the person who asked.
    """
    train, dev = load_task(name, data_dir, train)
    found, note = load_test(name, data_dir) if test else (None, "")
    notes = [note] if note else []
    if TASKS[name].labels and one_label(dev):
        notes.append("all development examples have one label: the metrics say little")
    return (train, dev, found), notes


def sizes(train, dev, test):
    """How many examples there are, in words; test may be None."""
    text = f"{len(train)} training, {len(dev)} development"
    return f"{text}, {len(test)} test examples" if test is not None else f"{text} examples"


def baselines(task, data_dir, model, train_records, eval_records):
    """dict of what else was measured on the embedded task -> accuracy on dev; {} for others.

    It was measured with all records; and the head with MiniLM, so that it is left out beside
    another model.
    """
    if task != "paraphrase" or data_dir is not None or train_records or eval_records:
        return {}
    found = json.loads((EMBEDDED / "baselines.json").read_text())
    return {k: v for k, v in found.items() if model == "minilm" or k == "words alone"}


def one_label(examples):
    """Whether all examples have the same label: nothing can be learned, or told, from them."""
    return len({label for _, label in examples}) == 1


def read_tsv(path, task):
    """One GLUE TSV: list of (texts, label). Errors as in load_task."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the data folder needs train.tsv and {task.dev}"
        )
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} ({error.reason})") from error
    if len(lines) == 1 and "\r" in lines[0].removesuffix("\r"):
        raise ValueError(f"{path}: its lines end in CR alone: write it with LF, or with CR LF")
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    wanted, first = (*task.columns, task.label), 1
    if isinstance(task.label, str):  # a header, of which CoLA has none
        absent = [c for c in wanted if c not in rows[0]]
        if absent:
            raise ValueError(
                f"{path}:1: no column {absent[0]!r} in the header; it has: "
                f"{one_line(', '.join(rows[0]))}"
            )
        twice = [c for c in wanted if rows[0].count(c) > 1]
        if twice:
            raise ValueError(f"{path}:1: the header has two columns {twice[0]!r}")
        wanted, first = tuple(rows[0].index(c) for c in wanted), 2
    *columns, label = wanted
    width = len(rows[0]) if first == 2 else max(wanted) + 1
    examples, skipped = [], 0
    for number, row in enumerate(rows[first - 1 :], first):
        if row == [""]:
            continue
        if len(row) != width:
            if task.skip_ragged_rows:
                skipped += 1
                continue
            more = ": is there a tab in a text?" if len(row) > width else ""
            raise ValueError(f"{path}:{number}: {len(row)} columns, expected {width}{more}")
        examples.append(
            (tuple(row[c] for c in columns), read_label(row[label], task, f"{path}:{number}"))
        )
    if not examples:
        raise ValueError(f"{path} has no examples")
    if skipped > 10 + len(examples) / 100:  # GLUE's own has a few
        raise ValueError(f"{path}: {skipped} rows do not have {width} columns, {len(examples)} do")
    return examples


def read_label(text, task, where):
    if task.labels:
        if text not in task.labels:
            allowed = ", ".join(task.labels)
            raise ValueError(f"{where}: label {shown(text)}, allowed: {allowed}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:  # STS-B, the one task that rates
        raise ValueError(f"{where}: label {shown(text)}, expected a number from 0 to 5")
    return score


def load_from_hub(name, splits):
    """Splits of a GLUE task from nyu-mll/glue: lists of (texts, label), as load_task gives them.

    Parquet files in huggingface_hub's cache, read by datasets; a second call asks nobody.

    Args:
        name: a key of TASKS. splits: the hub's names of the splits.

    Raises:
        ConnectionError: not in the cache, and the hub does not answer or would not give it.
        FileNotFoundError, ValueError: what came has no such split, or cannot be read.
    """
    task = TASKS[name]
    folder = download.snapshot(
        "nyu-mll/glue",
        [f"{name}/*.parquet"],
        f"task {name}",
        f"get GLUE's {task.folder} folder (train.tsv, {task.dev}), give it with --data-dir DIR",
        repo_type="dataset",
    )
    import datasets

    found = []
    for split in splits:
        files = sorted(str(path) for path in folder.glob(f"{name}/{split}-*.parquet"))
        if not files:
            raise FileNotFoundError(f"{folder} has no {name}/{split}-*.parquet")
        try:
            rows = datasets.Dataset.from_parquet(files).select_columns([*task.hub_columns, "label"])
        except Exception as error:  # pyarrow and datasets have kinds of their own
            raise ValueError(f"{files[0]} cannot be read: {one_line(error)}") from error
        found.append([(tuple(row[c] for c in task.hub_columns), row["label"]) for row in rows])
    return found


# --------------------------------------------------------------------------------------- tokenising


def encode(examples, tokenizer, max_length):
    """Token ids of every example, longest text shortened first where a pair does not fit.

    Args:
        examples: list of (texts, label).
        tokenizer: tokenizers.Tokenizer; left as it was.
        max_length: int, tokens including the special ones.

    Returns:
        (list of dicts with input_ids, token_type_ids, label; int, how many were truncated).

    Raises:
        ValueError: a text is empty, and the tokenizer puts no token of its own to it.
    """
    texts = [texts if len(texts) == 2 else texts[0] for texts, _ in examples]
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    tokenizer.no_padding()  # collate pads, and masks it
    try:
        encodings = tokenizer.encode_batch(texts)
    finally:
        tokenizer.no_truncation()
        if truncation:
            tokenizer.enable_truncation(**truncation)
        if padding:
            tokenizer.enable_padding(**padding)
    empty = tokenizer.token_to_id("<|endoftext|>")  # of GPT-2's kind, which add no token
    if empty is None and not all(e.ids for e in encodings):
        raise ValueError("an example's text is empty, and so are its tokens: take it out")
    encoded = [
        {"input_ids": e.ids or [empty], "token_type_ids": e.type_ids or [0], "label": label}
        for e, (_, label) in zip(encodings, examples, strict=True)
    ]
    return encoded, sum(bool(e.overflowing) for e in encodings)


def encode_splits(splits, tokenizer, max_length, limit):
    """Each split by encode, None stays None -> (encoded splits, notes).

    Args:
        splits: as load_splits gives them. tokenizer: as in encode.
        max_length: int, or None for 128 tokens, or what the model has.
        limit: int, the positions that the model has.

    Raises:
        ValueError: max_length is more than that.
    """
    max_length = max_length or min(128, limit)
    if max_length > limit:
        raise ValueError(f"--max-length is {max_length}, the model has {limit} positions")
    encoded, cut = [], 0
    for split in splits:
        found, truncated = (None, 0) if split is None else encode(split, tokenizer, max_length)
        encoded.append(found)
        cut += truncated
    return encoded, [
        f"{cut} examples are longer than {max_length} tokens: truncated"
    ] if cut else []


def fingerprint(examples):
    """What tells encoded examples from others: their number, and SHA-256 of ids and labels."""
    digest = hashlib.sha256()
    for e in examples:
        parts = (e["input_ids"], e.get("token_type_ids"), e["label"])
        digest.update(repr(parts).encode())
    return {"examples": len(examples), "sha256": digest.hexdigest()}


# ----------------------------------------------------------------------------------------- batching


def collate(examples, pad_token_id, token_types, device="cpu"):
    """Encoded examples -> one batch, padded on the right to its longest.

    Args:
        examples: list of dicts as encode, or texts.encode, gives them.
        pad_token_id: int.
        token_types: bool, whether the model tells the two texts apart (BERT).
        device: where the batch goes.

    Returns:
        dict of tensors: input_ids, attention_mask (b, t); labels (b,), of a text task (b, t);
        token_type_ids (b, t) or absent.
    """
    b, t = len(examples), max(len(e["input_ids"]) for e in examples)
    input_ids = torch.full((b, t), pad_token_id)
    attention_mask, types = torch.zeros(b, t, dtype=torch.long), torch.zeros(b, t, dtype=torch.long)
    for i, example in enumerate(examples):
        n = len(example["input_ids"])
        input_ids[i, :n] = torch.tensor(example["input_ids"])
        attention_mask[i, :n] = 1
        if token_types:
            types[i, :n] = torch.tensor(example["token_type_ids"])
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if token_types:
        batch["token_type_ids"] = types
    labels = [e["label"] for e in examples]
    if isinstance(labels[0], list):  # of a text task, one for each token; -100 = not predicted
        labels = [label + [-100] * (t - len(label)) for label in labels]
    batch["labels"] = torch.tensor(labels)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def in_order(examples, batch_size):
    """Indices of examples cut into batches, in the order given: evaluation and scoring."""
    return [
        list(range(i, min(i + batch_size, len(examples))))
        for i in range(0, len(examples), batch_size)
    ]


def grouped_by_length(examples, batch_size, generator):
    """One epoch: every index once, in shuffled batches of examples of similar length.

    Shuffle; sort each run of GROUP batches by length; cut into batches; shuffle the batches. Every
    epoch has other batches, and little of a batch is padding.

    Args:
        examples: list of encoded examples.
        batch_size: int.
        generator: torch.Generator, consumed.

    Returns:
        list of lists of indices; only one of them may be shorter than batch_size.
    """
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), GROUP * batch_size):
        group = sorted(
            order[start : start + GROUP * batch_size], key=lambda i: len(examples[i]["input_ids"])
        )
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


# ------------------------------------------------------------------------------------------ metrics


def correlation(x, y):
    """Pearson's r of two float64 arrays, (n,) each; 0 where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def ranks(x):
    """Ranks from 1, ties sharing their mean: (n,) -> (n,)."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # rank of the last member of each tie
    return (last - (counts - 1) / 2)[inverse]


def metrics(task, predictions, labels):
    """GLUE's metrics of a task.

    accuracy; f1 of class 1, 0 if there is nothing to find and nothing found; matthews, which is
    Pearson's r of two 0/1 vectors; pearson; spearman, which is Pearson's r of the ranks.

    Args:
        task: Task. predictions: (n,) class ids, or scores for regression. labels: (n,).

    Returns:
        dict metric -> float, the headline metric first.
    """
    p, y = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)  # (n,)
    hits, named = np.sum((p == 1) & (y == 1)), np.sum(p == 1) + np.sum(y == 1)
    compute = {
        "accuracy": lambda: float(np.mean(p == y)),
        "f1": lambda: float(2 * hits / named) if named else 0.0,  # 2 TP / (2 TP + FP + FN)
        "matthews": lambda: correlation(p, y),
        "pearson": lambda: correlation(p, y),
        "spearman": lambda: correlation(ranks(p), ranks(y)),
    }
    return {name: compute[name]() for name in task.metrics}
