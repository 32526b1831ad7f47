"""All tasks that train.py knows, those of glue.py and those of texts.py, behind the same calls.

    tasks of | a record is       | the model's head | the label of an example
    glue.py  | (texts, label)    | classification   | class id, or a number where the task rates
    texts.py | (prompt, targets) | lm               | per token its id, or -100: not predicted

What this file does not do: read a format (glue.py, texts.py), measure (evaluation.py).
"""

from support import download, glue, hf_folder, texts
from support.families import FAMILIES

TASKS = {**glue.TASKS, **texts.TASKS}
DEFAULT, DEFAULT_CAUSAL = "paraphrase", "describe"


def module(name):
    """Where a task's functions are."""
    return texts if name in texts.TASKS else glue


def default(model):
    """The task of a model, by its name, where none is given. Raises as download.model_folder."""
    family = family_of(download.model_folder(model))
    return DEFAULT_CAUSAL if family and family.features["causal"] else DEFAULT


def family_of(folder):
    """The record of a model's family; None of one that the loader will refuse by its name."""
    return FAMILIES.get(str(hf_folder.read_config(folder).get("model_type")))


def model_folder(name, model, proxy=""):
    """The folder of a model, by its name, that is to do a task, scored by a proxy ("" = by none).

    Raises:
        ValueError: the model cannot do it, or the proxy cannot score it.
        ValueError, OSError: as download.model_folder.
    """
    folder = download.model_folder(model)
    if TASKS[name].head == "lm":
        family = family_of(folder)
        if family and not family.features["causal"]:
            causal = ", ".join(n for n, f in FAMILIES.items() if f.features["causal"])
            raise ValueError(
                f"task {name} is to write text, which a model that reads in both directions cannot:"
                f" give a --model that is causal ({causal}), or a --task that is classification "
                f"({', '.join(glue.TASKS)})"
            )
    if proxy.startswith("alpha_test"):
        if TASKS[name].head == "lm":
            raise ValueError(f"--proxy {proxy} needs accuracy, and task {name} has perplexity")
        if TASKS[name].num_labels == 1:
            raise ValueError(f"--proxy {proxy} needs accuracy, and task {name} has scores")
    return folder


def load(name, data_dir, test, train, seed):
    """What a task's files hold.

    Args:
        name: a key of TASKS. data_dir: a folder, or None.
        test, train: bool, whether these splits are wanted.
        seed: int, for a task whose development set is drawn.

    Returns:
        ((train, dev, test), notes): lists of what the task's module loads, train and test may be
        None; notes are lines for the person who asked.

    Raises:
        ValueError, OSError: as load_splits of glue.py and of texts.py.
    """
    if name in texts.TASKS:
        return texts.load_splits(name, data_dir, test, train, seed)
    return glue.load_splits(name, data_dir, test, train)


def first(records, limit, what, notes):
    """The first records of a split, None = all; a limit that cuts nothing is noted."""
    if records is not None and limit and limit >= len(records):
        notes.append(f"{what}: the set has {len(records)}, all are taken")
    return records if records is None else records[:limit]


def encode(name, splits, tokenizer, config, folder, *, max_length, train_records, eval_records):
    """What load gave as examples.

    Args:
        splits: as load gives them. config: model.Config. folder: of the model.
        max_length: int, or None for the task's own.
        train_records, eval_records: int, how many are taken of the training set, of every other
            one, from its beginning; None = all. Of running text a window is a record.

    Returns:
        ((train, dev, test, prompts), notes): lists of examples, and {split: prompts that are
        answered}.

    Raises:
        ValueError: what is left of the training set has one label alone; a text or a length that
            does not go, by the task's module.
    """
    limits = (
        (train_records, f"--train-records {train_records}"),
        (eval_records, f"--eval-records {eval_records}, dev"),
        (eval_records, f"--eval-records {eval_records}, test"),
    )
    running, notes = name in texts.TASKS and not texts.TASKS[name].columns, []
    if not running:
        splits = [first(s, *limit, notes) for s, limit in zip(splits, limits, strict=True)]
    classes = name in glue.TASKS and splits[0]
    if classes and train_records and train_records > 1 and glue.one_label(splits[0]):
        raise ValueError(f"--train-records {train_records}: all of them have one label; give more")
    if name in texts.TASKS:
        examples, prompts, more = texts.encode_splits(
            name, splits, tokenizer, config, folder, max_length
        )
    else:
        prompts = {}
        refuse_other_order(TASKS[name].labels, hf_folder.read_config(folder))
        examples, more = glue.encode_splits(splits, tokenizer, max_length, config.max_positions)
    if running:
        examples = [first(e, *limit, notes) for e, limit in zip(examples, limits, strict=True)]
    return (*examples, prompts), notes + more


def refuse_other_order(labels, hf):
    """Raises ValueError where a model's config.json has a task's labels in another order.

    A classifier that comes with the checkpoint would be right about other classes than are asked.

    Args:
        labels: tuple of the task's words for its classes. hf: dict, config.json.
    """
    named = hf.get("id2label")
    found = [str(named[key]).lower() for key in sorted(named)] if isinstance(named, dict) else []
    if sorted(found) == sorted(labels) and found != list(labels):
        raise ValueError(
            f"config.json's id2label has the labels as {', '.join(found)}, the task as "
            f"{', '.join(labels)}: bring id2label and the rows of the classifier into that order"
        )


def source(name, data_dir, split):
    """Where the examples of "dev" or "test" lie, in words."""
    return module(name).source(name, data_dir, split)
