"""support/settings.py: every flag has an effect, or the run says or refuses that it has none."""

import functools
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

import lora
import proxies
import tiny
import train
from support import flags, run_folder
from support.flags import FLAGS, parse_flags
from support.settings import effects

ONE_EPOCH = "--epochs 1 --batch-size 5 --lr 0.01 --schedule constant --warmup 0"
STATIC = "--allocate static --score-batches 1"
DELTA = "--preset lora --delta-ratio 0.5 --delta-start -1"
# Of every flag: another value, and the run beside whose own value it is held.
OTHER = {
    "task": ("--task rte", ""),
    "data-dir": ("--data-dir OTHER", ""),
    "train-records": ("--train-records 20", ""),
    "eval-records": ("--eval-records 3", ""),
    "model": ("--model OTHER_MODEL", ""),
    "targets": ("--targets fc1", ""),
    "r": ("--r 3", ""),
    "lora-alpha": ("--lora-alpha 3", ""),
    "shortcuts": ("--shortcuts cross", ""),
    "shortcut-alpha": ("--shortcut-alpha 1", ""),
    "shortcut-norm": ("--shortcut-norm reuse", ""),
    "adapter": ("--adapter none_of_that_name", ""),
    "optimizer": ("--optimizer none_of_that_name", ""),
    "lora-dropout": ("--lora-dropout 0.5", ""),
    "allocate": ("--allocate none", ""),
    "proxy": ("--proxy size", ""),
    "keep": ("--keep 0.25", ""),
    "budget-params": ("--budget-params 300", ""),
    "per-rank": ("--per-rank yes", "--allocate static --budget-params 300"),
    "when-off": ("--when-off frozen", "--every 0.2 --keep 0.25"),
    "every": ("--every 0.4", ""),
    "score-batches": ("--score-batches 2", STATIC),
    "ranking": ("--ranking apart", "--targets fc1 --proxy size --keep 0.5"),
    "delta-ratio": ("--delta-ratio 2", DELTA),
    "delta-start": ("--delta-start 1", DELTA),
    "delta-lazy": ("--delta-lazy yes", DELTA),
    "base-dtype": ("--base-dtype bf16", ""),
    "shard": ("--shard yes", ""),
    "epochs": ("--epochs 2", ""),
    "batch-size": ("--batch-size 4", ""),
    "accumulate": ("--accumulate 2", ""),
    "lr": ("--lr 0.02", ""),
    "weight-decay": ("--weight-decay 1", ""),
    "schedule": ("--schedule linear", ""),
    "warmup": ("--warmup 2", ""),
    "clip": ("--clip 0.01", ""),
    "dropout": ("--dropout 0.5", ""),
    "max-length": ("--max-length 8", ""),
    "seed": ("--seed 1", ""),
    "device": ("--device meta", ""),
    "log-every": ("--log-every 2", ""),
    "out": ("--out ELSEWHERE", ""),
}
# Of every flag again: a value, and a run in which it would do nothing, or not what it says.
IDLE = [
    ("--r 3", "--targets none --shortcuts none --allocate none", "--r needs"),
    ("--lora-dropout 0.1", "--targets none --shortcuts none --allocate none", "--lora-dropout n"),
    ("--lora-alpha 3", "--targets none", "--lora-alpha needs --targets"),
    ("--lora-alpha 0", "", "--lora-alpha 0 multiplies every module by 0"),
    ("--shortcut-alpha 3", "--shortcuts none", "--shortcut-alpha needs --shortcuts"),
    ("--shortcut-alpha 0", "", "--shortcut-alpha 0 multiplies every module by 0"),
    ("--shortcut-norm reuse", "--shortcuts none", "--shortcut-norm reuse needs"),
    ("--shortcut-norm reuse", "--shortcuts residual", "--shortcut-norm reuse needs"),
    ("--keep 0.5", "--allocate none", "--keep needs --allocate"),
    ("--keep 0.5", "--budget-params 100", "two budgets"),
    ("--budget-params 99", "--allocate none", "--budget-params needs --allocate"),
    ("--per-rank no", "--allocate none", "--per-rank needs --allocate"),
    ("--per-rank yes", "--keep 0.5", "--per-rank yes needs --budget-params"),
    ("--when-off frozen", "--allocate static", "--when-off frozen needs --allocate dynamic"),
    ("--when-off frozen", "--allocate none", "--when-off needs --allocate"),
    ("--score-batches 2", "--allocate none", "--score-batches needs --allocate"),
    ("--score-batches 2", "--proxy random", "--score-batches needs a --proxy that reads"),
    ("--score-batches 2", "--proxy size", "--score-batches needs a --proxy that reads"),
    ("--score-batches 2", "--proxy constant", "--score-batches needs a --proxy that reads"),
    ("--score-batches 2", "--proxy synflow", "--score-batches needs a --proxy that reads"),
    ("--proxy snip", "--allocate none", "--proxy needs --allocate"),
    ("--ranking apart", "--budget-params 100", "--ranking needs --keep"),
    ("--ranking apart", "--shortcuts none", "--ranking needs both"),
    ("--ranking apart", "--targets none", "--ranking needs both"),
    ("--every 0.5", "--allocate static", "--every needs --allocate dynamic"),
    ("--every 0.5", "--allocate none", "--every needs --allocate"),
    ("--every 5", "", "'5' is not a number from 1e-09 to 1"),
    ("--delta-start 3", "", "--delta-start needs --delta-ratio"),
    ("--delta-lazy yes", "", "--delta-lazy needs --delta-ratio"),
    ("--delta-ratio -1", "", "--delta-ratio -1 takes out of the weights"),
    ("--delta-ratio 1", "--targets none", "--delta-ratio needs --targets"),
    ("--base-dtype bf16", DELTA, "--base-dtype bf16 needs --delta-lazy yes: a weight in bfloat16"),
    ("--shard yes", DELTA, "--shard yes needs --delta-lazy yes: no process has a whole weight"),
    ("--shard yes", "--proxy synflow", "--proxy synflow does not go with --shard yes: it copies"),
    ("--shard yes", "--proxy grasp", "--proxy grasp does not go with --shard yes: its second"),
    ("--lr 0", "", "--lr 0 trains nothing"),
    ("--weight-decay 100", "--lr 0.01", "would erase every parameter"),
    ("--clip 1e-30", "", "--clip 1e-30 is below AdamW's epsilon"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models and two tasks; 24 examples, 5 steps an epoch."""
    path = tmp_path_factory.mktemp("settings")
    tiny.bert_folder(path / "model")
    tiny.bert_folder(path / "other_model", tiny.bert_tensors(seed=1))
    tiny.task_folder(path / "task", dev=4)
    tiny.task_folder(path / "other", train=20, dev=4)
    return path


@pytest.fixture(scope="module")
def base_of(folders):
    """A function: what the run with some flags leaves, run once."""
    return functools.cache(lambda text: run(folders, folders / f"base-{hash(text)}", text))


def run(folders, out, text):
    """(exit code, what a run leaves: weights, log without seconds, decisions, where)."""
    words = f"{ONE_EPOCH} --log-every 1 --device cpu --task mrpc".split()
    words += ["--model", str(folders / "model"), "--data-dir", str(folders / "task")]
    words += ["--out", str(out), *text.split()]
    names = {"OTHER": "other", "OTHER_MODEL": "other_model", "ELSEWHERE": out.name + "-elsewhere"}
    words = [str(folders / names[w]) if w in names else w for w in words]
    code = train.main(words)
    out = Path(words[len(words) - words[::-1].index("--out")])
    if code:
        return code, None
    adapter = (out / "adapter.safetensors").read_bytes()
    log = [{k: v for k, v in e.items() if "seconds" not in k} for e in run_folder.read_log(out)]
    path = out / "allocation.json"
    history = json.loads(path.read_text())["history"] if path.is_file() else []
    return code, (adapter, log, history, "elsewhere" in str(out))


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_changes_the_run_or_says_why_not(folders, base_of, tmp_path, capsys, flag):
    """A flag that is added and forgotten somewhere fails here: it has no entry, or no effect."""
    other, base = OTHER[flag]
    assert other.startswith(f"--{flag} ")
    _, before = base_of(base)
    assert before
    capsys.readouterr()
    code, after = run(folders, tmp_path / "after", f"{base} {other}")
    said = capsys.readouterr()
    if code == 2:
        assert said.err.count("\n") == 1 and (f"--{flag}" in said.err or flag == "task")
    else:
        assert code == 0 and before != after


@pytest.mark.parametrize(("idle", "base", "message"), IDLE)
def test_what_would_do_nothing_is_refused(tmp_path, capsys, idle, base, message):
    """And the run beside it is not: it is this setting that is refused."""
    base = base or "--epochs 3"
    parse_flags(base.split())
    assert train.main([*base.split(), *idle.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def notes(text, examples=30, parameters=1000):
    """What is said of a run of 30 examples: 6 batches of 5 an epoch, 2 epochs, 12 steps."""
    args = parse_flags(f"--epochs 2 --batch-size 5 --log-every 1 --warmup 0 {text}".split())
    plan = None
    if args.allocate in ("static", "dynamic"):
        model = tiny.model("bert", dtype=torch.float32)
        lora.inject(model, args.targets, args.r, shortcuts=lora.SHORTCUTS[args.shortcuts])
        lora.mark_trainable(model)
        how = train.named(
            args, "r", "keep", "budget_params", "every", "ranking", "per_rank", "seed"
        )
        plan = train.runs.make_plan(model, mode=args.allocate, **how)
    return effects(args, examples=examples, parameters=parameters, plan=plan)


LORA = "--preset lora"
ALORA, ADALORA = (f"--r 2 --shortcuts none --allocate {name}" for name in ("alora", "adalora"))


@pytest.mark.parametrize(
    ("cut", "whole", "message"),
    [
        (f"{LORA} --batch-size 31", f"{LORA} --batch-size 30", "--batch-size 31: .* has 30"),
        (f"{LORA} --accumulate 6", f"{LORA} --accumulate 5", "6 batches, one step each epoch"),
        (f"{LORA} --warmup 12", f"{LORA} --warmup 11", r"12 steps: .* ends at 0.00092, not 0.001"),
        (f"{LORA} --lr 1e-8", f"{LORA} --lr 1e-6", r"times 12 steps is 1e-07: hardly anything"),
        (f"{LORA} --weight-decay 100", f"{LORA} --weight-decay 99", "each step takes 10% off"),
        (f"{LORA} --clip 3e-7", f"{LORA} --clip 3.2e-7", "over 1,000 parameters"),
        (f"{LORA} --log-every 13", f"{LORA} --log-every 12", "the run has 12 steps, no train"),
        (
            f"{LORA} --optimizer lora_rite",  # of language models every token is read
            f"{LORA} --optimizer lora_rite --model smollm2-q4 --task describe",
            "5 examples are 5 tokens where",
        ),
        (
            f"{LORA} --accumulate 4 --log-every 5",
            f"{LORA} --accumulate 4 --log-every 4",
            "the run has 4 steps, no train",  # of 6 batches: 4 and 2, in two epochs
        ),
        ("--r 2 --score-batches 7", "--r 2 --score-batches 6", "35 examples: .* has 30, all"),
        ("--r 2 --keep 1", "--r 2 --keep 0.9", "all 17 modules fit, grad_norm chooses"),
        ("--r 2 --budget-params 816", "--r 2 --budget-params 815", "all 17 modules fit"),
        (  # shortcuts are rounded: 0.95 of 6 is 6, of 11 it is 10
            "--r 2 --targets none --shortcuts residual --keep 0.95",
            "--r 2 --targets none --shortcuts all --keep 0.95",
            "all 6 modules fit, grad_norm chooses",
        ),
        (
            "--r 2 --epochs 1 --every 1",
            "--r 2 --epochs 2 --every 1",
            "one decision, dynamic is static here",
        ),
        ("--r 2 --every 0.1", "--r 2 --every 0.2", "before each of 6 steps an epoch"),
        (f"{ALORA} --score-batches 7", f"{ALORA} --score-batches 6", "has 30, importance is"),
        (f"{ALORA} --every 0.1", f"{ALORA} --every 0.2", "after each of 6 steps an epoch"),
        (f"{ADALORA} --keep 1", f"{ADALORA} --keep 0.9", "adalora takes no triplet out"),
        (
            f"{LORA} --delta-ratio 101 --delta-start 1",
            f"{LORA} --delta-ratio 100 --delta-start 1",
            "B A counts 204 times in the end, in place of 2",
        ),
    ],
)
def test_what_the_sizes_cut_short_is_said(cut, whole, message):
    """On one side of the edge one line, on the other none."""
    (line,) = notes(cut)
    assert re.search(message, line) and "\n" not in line
    assert notes(whole) == []


def test_a_language_model_without_a_module_has_nothing_to_train():
    nothing = ["--targets", "none", "--shortcuts", "none", "--allocate", "none"]
    with pytest.raises(ValueError, match="a language model has no head that would train"):
        parse_flags([*nothing, "--task", "e2e", "--model", "smollm2-q4"])
    assert parse_flags([*nothing, "--task", "mrpc"]).targets == []  # the head alone


def test_the_suggested_control_is_tested_as_well():
    args, costs = ["--r", "4", "--keep", "0.5"], {"a": 40, "b": 40}
    for more in [], ["--test"]:
        command, _ = flags.equal_budget_control(parse_flags([*args, *more]), 40, costs)
        assert command.endswith(" --test") == bool(more)


def test_delta_lora_that_never_moves_a_weight_is_refused(folders, tmp_path, capsys):
    """After the last step that moves one, K + 2, there is none: 12 steps, K = 10 moves W once."""
    assert notes(f"{LORA} --delta-ratio 1 --delta-start 10") == []
    with pytest.raises(
        ValueError, match="after step 13 of 12, and it would be plain LoRA; give 10"
    ):
        notes(f"{LORA} --delta-ratio 1 --delta-start 11")
    assert run(folders, tmp_path / "run", "--preset delta-lora-released --epochs 1")[0] == 2
    error = capsys.readouterr().err
    assert "--delta-start 500 is beyond this run" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="has one step, and its rate would be 0"):
        notes(f"{LORA} --warmup 1 --epochs 1 --batch-size 30")


def test_the_edge_of_delta_start_is_that_of_the_weights(folders, tmp_path):
    """The largest K that is let in does move the weights, in the last step alone."""
    words = "--preset lora --delta-ratio 1 --delta-start 3 --log-every 1"
    code, (_, log, _, _) = run(folders, tmp_path / "run", words)
    moved = [max(e["weight_change"].values()) for e in log if e["event"] == "train"]
    assert code == 0 and moved[:4] == [0.0] * 4 and moved[4] > 0


def test_notes_are_printed_before_the_first_step(folders, tmp_path, capsys):
    assert run(folders, tmp_path / "run", "--preset lora --warmup 500")[0] == 0
    printed = capsys.readouterr().out
    assert printed.index("--warmup 500 is as long as the run, 5 steps") < printed.index("epoch 1:")


# alpha_test is one of ten steps: too coarse to differ in three examples
@pytest.mark.parametrize("name", [n for n in proxies.PROXIES if not n.startswith("alpha_test")])
def test_proxies_without_data(name):
    """Other batches, other scores: of all proxies but those that are said to read none."""
    model = tiny.adapted("bert")
    first, second = (
        proxies.score(name, model, [tiny.batch(model.config, seed)]) for seed in (0, 1)
    )
    assert (first == second) == (name in proxies.WITHOUT_DATA)


def test_every_preset_and_study_holds_together():
    for name in flags.PRESETS:
        parse_flags(["--preset", name])
    for path in (Path(train.__file__).parent / "studies").glob("*.toml"):
        study = tomllib.loads(path.read_text())
        texts = re.findall(r'"flags": "(.*?)"', json.dumps(study))
        assert len(texts) > 5
        for text in texts[1:]:
            parse_flags([*texts[0].replace("\\n", " ").split(), *text.replace("\\n", " ").split()])
