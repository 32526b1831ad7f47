"""Text tasks of causal models: read, tokenise, cut into windows.

    describe       data/describe/, shipped with the project: meaning representation -> sentence
    e2e            E2E's CSV files, or the hub (tuetschek/e2e_nlg): the same for restaurants
    instructions   Alpaca's JSON layout (instruction, input, output), or the hub (tatsu-lab/alpaca)
    wikitext       raw text, or the hub (Salesforce/wikitext)

    word       | what it is
    record     | (prompt, [target, …]): a prompt is answered by each of its targets
    example    | dict of two lists of t ints: input_ids, the prompt, one target, the end of text;
               | label, the same with -100 where nothing is to be predicted: in the prompt
    window     | an example of t tokens of a running text; all but the first are predicted
    prompt     | Prompt: what a model answers when it is measured by what it writes

The first token of a sequence would be predicted from nothing, so it never counts (model.predicted
shifts by one).

What this file does not do: batches (glue.py, of all tasks), metrics (evaluation.py, writing.py).
"""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import NamedTuple

import torch

from support import download, prompts, seeds
from support.errors import one_line, shown

EMBEDDED = Path(__file__).parents[1] / "data" / "describe"
HUB_REVISION = "refs/convert/parquet"  # the hub's own conversion: CONFIG/SPLIT/*.parquet
HELD_OUT = 10  # of instructions one in so many is held out


@dataclasses.dataclass(frozen=True)
class Task:
    """One task whose answers are text.

    files: split -> names, of which the first that is there is read. columns are joined to form
    the prompt, target holds what is to be written; hub, hub_files and hub_columns say the same of
    the hub. form: what is asked, {} being the prompt. chat: the model's chat template is put around
    it, where it has one. A task with writes=True is measured by its greedy output too, against all
    targets of a prompt. length: --max-length where it is not given. metrics[0] is the headline.
    """

    files: dict
    columns: tuple
    target: str
    hub: str
    hub_files: dict
    hub_columns: tuple = ()
    hub_target: str = ""
    form: str = "{}\n"
    chat: bool = False
    writes: bool = False
    before: bool = False  # the untouched model is measured too, before training
    java: bool = False  # METEOR, ROUGE-L and CIDEr are reported too
    length: int = 256
    metrics: tuple = ("loss", "perplexity")
    head: str = "lm"
    num_labels: int = 2  # of no effect


def of_hub(config, dev="validation"):
    """split -> pattern of the hub's converted files."""
    names = {"train": "train", "dev": dev, "test": "test"}
    return {split: f"{config}/{name}/*.parquet" for split, name in names.items()}


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
TASKS = {
    "describe": Task(
        files={split: (f"{split}.jsonl",) for split in ("train", "dev", "test")},
        columns=("mr",),
        target="references",
        hub="",
        hub_files={},
        writes=True,
        before=True,
        length=128,
    ),
    "e2e": Task(
        files={
            "train": ("trainset.csv",),
            "dev": ("devset.csv",),
            "test": ("testset_w_refs.csv",),
        },
        columns=("mr",),
        target="ref",
        hub="tuetschek/e2e_nlg",
        hub_files=of_hub("default"),
        hub_columns=("meaning_representation",),
        hub_target="human_reference",
        writes=True,
        java=True,
    ),
    "instructions": Task(
        files={"train": ("*.json",)},
        columns=("instruction", "input"),
        target="output",
        hub="tatsu-lab/alpaca",
        hub_files={"train": "default/train/*.parquet"},
        hub_columns=("instruction", "input"),
        hub_target="output",
        form=ALPACA,
        chat=True,
        length=512,
    ),
    "wikitext": Task(
        files={
            "train": ("wiki.train.raw", "wiki.train.tokens", "train.txt"),
            "dev": ("wiki.valid.raw", "wiki.valid.tokens", "valid.txt"),
            "test": ("wiki.test.raw", "wiki.test.tokens", "test.txt"),
        },
        columns=(),
        target="text",
        hub="Salesforce/wikitext",
        hub_files=of_hub("wikitext-2-raw-v1"),
        hub_target="text",
        form="",
        length=512,
    ),
}


class Record(NamedTuple):
    prompt: str  # "" = running text
    targets: list


class Prompt(NamedTuple):
    text: str
    ids: list  # of the tokens, up to where the answer begins
    references: list  # of str
    longest: int  # tokens of the longest reference, with the end of text


# ------------------------------------------------------------------------------------------ reading


def load_splits(name, data_dir=None, test=False, train=True, seed=0):
    """Records of a task.

    Args:
        name: a key of TASKS.
        data_dir: folder with the task's files; None = shipped (describe), else the hub.
        test, train: bool, whether that split is wanted.
        seed: int, by which a tenth of instructions is held out.

    Returns:
        ((train, dev, test), notes): lists of Record, train and test may be None.

    Raises:
        ValueError: a file that is wrong, with its line. OSError: no such file, hub out of reach.
    """
    task, notes = TASKS[name], []
    splits = ["train"] * train + ["dev"] + ["test"] * test
    if "dev" not in task.files:
        whole = read_split(name, data_dir, "train", notes)
        found = dict(zip(("train", "dev"), held_out(whole, seed, name), strict=True))
    else:
        found = {split: read_split(name, data_dir, split, notes) for split in splits}
    if test and found.get("test") is None:
        notes.append(f"task {name} has no test set here: no test result")
    if task.writes:
        found |= {s: grouped(found[s]) for s in ("dev", "test") if found.get(s)}
    return (found["train"] if train else None, found["dev"], found.get("test")), notes


def held_out(records, seed, name):
    """(nine tenths, a tenth) of the records, drawn, each in its order."""
    if len(records) < 2:
        raise ValueError(f"task {name} has {len(records)} record: one is to be held out")
    order = torch.randperm(len(records), generator=seeds.generator(seed, "held-out")).tolist()
    dev = set(order[: max(1, len(records) // HELD_OUT)])
    parts = ([], [])
    for i, record in enumerate(records):
        parts[i in dev].append(record)
    return parts


def grouped(records):
    """Records of one prompt become one, with the targets of all: a prompt is answered once."""
    found = {}
    for prompt, targets in records:
        found.setdefault(prompt, []).extend(targets)
    return [Record(prompt, targets) for prompt, targets in found.items()]


def path_of(name, data_dir, split):
    """The file of a split in a folder, or None where it is a test set that is not there."""
    folder, wanted = download.expanded(data_dir), TASKS[name].files[split]
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {data_dir}: give one that holds {wanted[0]}")
    found = [sorted(folder.glob(pattern)) for pattern in wanted]
    paths = next(filter(None, found), [])
    if len(paths) > 1:
        several = ", ".join(path.name for path in paths)
        raise ValueError(f"{folder} has {several}: which is the data? leave one there")
    if not paths and split != "test":
        raise FileNotFoundError(f"{folder} has no {' or '.join(wanted)}: task {name} needs it")
    return paths[0] if paths else None


def source(name, data_dir, split):
    """Where the records of a split lie, in words."""
    split = split if split in TASKS[name].files else "train"
    data_dir = EMBEDDED if name == "describe" and data_dir is None else data_dir
    if data_dir is None:
        return f"{TASKS[name].hub}, {TASKS[name].hub_files[split]}"
    return str(path_of(name, data_dir, split))


def read_split(name, data_dir, split, notes):
    """Records of one split, None of a test set that is not there; what is left out is noted."""
    task = TASKS[name]
    if split not in task.files:
        return None
    if data_dir is None and name == "describe":
        data_dir = EMBEDDED
    if data_dir is None:
        where = f"{task.hub}, {split}"
        rows = hub_rows(name, split)
        columns, target = task.hub_columns, task.hub_target
        if not columns:  # running text comes by the line, each with its end; an empty line as ""
            rows = [(where, {target: "".join(row[target] or " \n" for _, row in rows)})]
    else:
        where = path_of(name, data_dir, split)
        if where is None:
            return None
        columns, target = task.columns, task.target
        rows = read_rows(where, (*columns, target))
    records = [read_record(at, row, columns, target) for at, row in rows]
    kept = [record for record in records if all(record.targets)]
    if not kept:
        raise ValueError(f"{where} has no records")
    if len(kept) < len(records):
        notes.append(f"{where}: {len(records) - len(kept)} records have no {target}: left out")
    return kept


def read_record(where, row, columns, target):
    """A row, a dict with a string in each column, as a Record. ValueError: it has not."""
    targets = row[target] if isinstance(row[target], list) else [row[target]]
    parts = [row[column] for column in columns]
    for part in (*parts, *targets):
        if not isinstance(part, str):
            raise ValueError(f"{where}: {shown(part)} where a text is expected")
        if "\0" in part:
            raise ValueError(f"{where}: a NUL character in the text {shown(part)}")
        if has_half_a_character(part):
            raise ValueError(f"{where}: half a character (a lone surrogate) in {shown(part)}")
    if not targets:
        raise ValueError(f"{where}: no {target}: a record needs one at least")
    prompt = "\n\n".join(part.strip() for part in parts if part.strip())
    if columns and not prompt:
        raise ValueError(f"{where}: no {columns[0]}: nothing is asked")
    return Record(prompt, [text.strip() for text in targets] if columns else targets)


def has_half_a_character(text):
    """Whether a lone surrogate is in it: half of a cut \\ud83d, or a byte that is no UTF-8."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def read_rows(path, columns):
    """[(where, dict)] of a CSV, JSON, JSONL or text file, in which each dict has the columns."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} ({error.reason})") from error
    if path.suffix == ".csv":
        return read_csv(path, text, columns)
    if path.suffix not in (".json", ".jsonl"):
        return [(path, {"text": text.replace("\r\n", "\n")})]  # lines end in one way
    if path.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(f"{path}:{n}", parse(f"{path}:{n}", line)) for n, line in lines]
    else:
        rows = parse(path, text)
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds {shown(rows)}, expected a list of records")
        rows = [(f"{path}: record {i}", row) for i, row in enumerate(rows, 1)]
    for where, row in rows:
        absent = [c for c in columns if not isinstance(row, dict) or c not in row]
        if absent:
            raise ValueError(f"{where}: no {absent[0]!r} in {shown(row)}")
    return rows


def parse(where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {one_line(error)}") from error


def read_csv(path, text, columns):
    """[(where, dict)] of a CSV with a header; a text may be quoted and hold line breaks."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        absent = [c for c in columns if c not in header]
        twice = [c for c in columns if header.count(c) > 1]
        if twice:
            raise ValueError(f"{path}:1: column {twice[0]!r} is there twice in the header")
        if absent:
            has = one_line(", ".join(header))
            raise ValueError(f"{path}:1: no column {absent[0]!r} in the header; it has: {has}")
        rows = []
        for row in filter(None, lines):
            if len(row) != len(header):
                raise ValueError(
                    f"{path}:{lines.line_num}: {len(row)} columns, expected {len(header)}"
                )
            rows.append((f"{path}:{lines.line_num}", dict(zip(header, row, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}:{lines.line_num}: {one_line(error)}") from error
    return rows


def hub_rows(name, split):
    """[(where, dict)] of a split from the hub; raises as glue.load_from_hub."""
    task = TASKS[name]
    folder = download.snapshot(
        f"{task.hub}@{HUB_REVISION}",
        [task.hub_files[split]],
        f"task {name}",
        f"give a folder that holds {task.files[split][0]} with --data-dir DIR",
        repo_type="dataset",
    )
    import datasets

    files = sorted(str(path) for path in folder.glob(task.hub_files[split]))
    if not files:
        raise FileNotFoundError(f"{folder} has no {task.hub_files[split]}")
    try:
        columns = [*task.hub_columns, task.hub_target]
        found = datasets.Dataset.from_parquet(files).select_columns(columns)
    except Exception as error:  # pyarrow and datasets have kinds of their own
        raise ValueError(f"{files[0]} cannot be read: {one_line(error)}") from error
    return [(f"{task.hub}, {split}, row {i}", row) for i, row in enumerate(found)]


# --------------------------------------------------------------------------------------- tokenising


def prompt_ids(name, text, tokenizer, form, ends):
    """The tokens of a task's prompt: in training, when it is measured, and in tools/generate.py."""
    task = TASKS[name]
    if task.chat and form:
        return prompts.ids_of(tokenizer, text, form, ends)
    return prompts.ids_of(tokenizer, task.form.format(text) if task.form else text, None, ends)


def encode(name, records, tokenizer, form, ends, max_length):
    """Examples of every target, and the prompts that are answered where the task writes.

    An example that is too long loses its end; one whose prompt leaves no room for a target is left
    out, and with it the whole record.

    Returns:
        (examples, list of Prompt, how many were truncated, how many records were left out).

    Raises:
        ValueError: nothing is left.
    """
    examples, asked, cut, left_out = [], [], 0, 0
    for text, targets in records:
        if not TASKS[name].columns:
            examples += windows(tokenizer.encode(targets[0]).ids, max_length)
            continue
        prompt = prompt_ids(name, text, tokenizer, form, ends)
        if len(prompt) >= max_length:
            left_out += 1
            continue
        answers = [tokenizer.encode(t, add_special_tokens=False).ids + ends[:1] for t in targets]
        for answer in answers:
            # L = - sum over the target's tokens of log p(token | prompt, tokens before)
            ids = (prompt + answer)[:max_length]
            label = ([-100] * len(prompt) + answer)[:max_length]
            examples.append({"input_ids": ids, "label": label})
            cut += len(prompt) + len(answer) > max_length
        if TASKS[name].writes:
            asked.append(Prompt(text, prompt, targets, max(map(len, answers))))
    if not examples and not TASKS[name].columns:
        raise ValueError(f"a text of task {name} has less than two tokens: nothing to predict")
    if not examples:
        raise ValueError(f"no record of task {name} fits into {max_length} tokens: --max-length")
    return examples, asked, cut, left_out


def windows(ids, length):
    """A running text as examples of `length` tokens, side by side; none has one token alone."""
    parts = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [{"input_ids": part, "label": part} for part in parts if len(part) > 1]


def encode_splits(name, splits, tokenizer, config, folder, max_length):
    """Each split by encode, None stays None.

    Args:
        splits: as load_splits gives them. config: model.Config. folder: of the model.
        max_length: int, or None for the task's own, or what the model has.

    Returns:
        ([train, dev, test], {split: prompts}, notes).

    Raises:
        ValueError: max_length is more than the model has, or the model names no end of text.
    """
    limit = config.max_positions
    max_length = max_length or min(TASKS[name].length, limit)
    if max_length > limit:
        raise ValueError(f"--max-length is {max_length}, the model has {limit} positions")
    if not config.eos_token_ids and TASKS[name].columns:
        raise ValueError("the model's config.json has no eos_token_id: no text would ever end")
    form, specials = prompts.read_form(folder)
    ends = prompts.ends_of(tokenizer, config.eos_token_ids, specials)
    found, asked, notes = [], {}, []
    for split, records in zip(("train", "dev", "test"), splits, strict=True):
        if records is None:
            found.append(None)
            continue
        examples, asked[split], cut, left_out = encode(
            name, records, tokenizer, form, ends, max_length
        )
        found.append(examples)
        if cut:
            notes.append(f"{split}: {cut} targets go beyond {max_length} tokens: truncated")
        if left_out:
            notes.append(
                f"{split}: {left_out} prompts leave no room for a target in {max_length} tokens: "
                "left out"
            )
    return found, asked, notes
