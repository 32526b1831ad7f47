"""What is read is checked at the door: checkpoints, run folders, data, Python entry points."""

import collections
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess

import pytest
import safetensors.torch
import torch

import lora
import proxies
import tiny
import train
from delta_lora import DeltaLoRA
from model import Transformer, load_pretrained
from support import checkpoint, glue, run_folder
from support.flags import parse_flags
from support.form import Maybe, count, misfit
from tools.faults import outcome, same

# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a model, a task, and one finished run of each kind, all never changed."""
    path = tmp_path_factory.mktemp("doors")
    tiny.bert_folder(path / "model")
    tiny.task_folder(path / "task")
    common = f"--task mrpc --data-dir {path / 'task'} --model {path / 'model'} --r 2 --device cpu"
    kinds = {
        "hetero": "--every 0.5",
        "delta": "--every 0.5 --delta-ratio 0.5 --delta-start -1",
        "parts": "--per-rank yes --budget-params 300 --every 0.5",
        "ranks": "--allocate static --per-rank yes --budget-params 300",
        "lora": "--preset lora",
    }
    for name, flags in kinds.items():
        words = f"{common} --epochs 2 --batch-size 8 --log-every 1 {flags} --out {path / name}"
        assert train.main(words.split()) == 0
    return path


@pytest.fixture(scope="module")
def like(runs):
    """A function: what a checkpoint of one of the runs has to fit."""

    @functools.cache
    def captured(kind):
        run = train.set_up(parse_flags(["--resume", str(runs / kind)]))
        return checkpoint.expected(run.model, run.optimizer, run.plan, run.delta)

    return captured


@pytest.fixture
def copy(runs, tmp_path):
    """A function: a copy of one of the runs, that a test may change."""
    return lambda kind: shutil.copytree(runs / kind, tmp_path / kind)


def rewrite(folder, name, change):
    """Change what a checkpoint holds, under a checksum that is right."""
    state = checkpoint.read(folder / name)
    replaced = change(state)
    content = io.BytesIO()
    torch.save(state if replaced is None else replaced, content)
    body = content.getvalue()
    (folder / name).write_bytes(body + hashlib.sha256(body).digest())


def put(*way):
    """A change: the last of the arguments, in the place that the others lead to."""

    def change(state):
        *keys, last, value = way
        for key in keys:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def first_moments(state):
    return next(iter(state["optimizer"]["state"].values()))


A = "layers.0.q_proj.lora_A"
NAN, WIDE = torch.full((2, 12), torch.nan), torch.ones(2, 13)
WRONG = {
    "an empty dict": lambda _: {},
    "a list": lambda _: [1, 2],
    "a number": lambda _: 7,
    "no optimizer": lambda s: {k: v for k, v in s.items() if k != "optimizer"},
    "one key more": lambda s: {**s, "more": 1},
    "another shape": put("parameters", A, WIDE),
    "NaN": put("parameters", A, NAN),
    "another dtype": put("parameters", A, lambda p: p.double()),
    "integers": put("parameters", A, lambda p: p.long()),
    "a list for a tensor": put("parameters", A, lambda p: p.tolist()),
    "a lower rank": put("parameters", A, lambda p: p[:1]),
    "a name is lacking": put("parameters", lambda p: {n: v for n, v in p.items() if n != A}),
    "a moment of another shape": lambda s: first_moments(s).update(exp_avg=torch.ones(2, 13)),
    "an infinite moment": lambda s: first_moments(s)["exp_avg_sq"].fill_(torch.inf),
    "moments without a step": lambda s: first_moments(s).update(step=None),
    "moments of a parameter too many": lambda s: s["optimizer"]["state"].update(
        {99: first_moments(s)}
    ),
    "other weight decay": lambda s: s["optimizer"]["param_groups"][0].update(weight_decay=7.0),
    "no group": put("optimizer", "param_groups", []),
    "other parameters in the group": lambda s: s["optimizer"]["param_groups"][0].update(params=[0]),
    "switches that are numbers": put("on", lambda on: {n: 1 for n in on}),
    "a module nobody knows": put("on", lambda on: {**on, "layers.9.fc1": True}),
    "no plan": put("plan", None),
    "a generator's state cut short": put("plan", "rng", lambda p: p[:9]),
    "a history of numbers": put("plan", "history", [1]),
    "a decision without scores": lambda s: s["plan"]["history"][0].update(scores=None),
    "a delta": put("delta", {"t": 0, "begin": {}, "ended": {}, "weights": {}}),
    "a step below 0": put("position", "step", -1),
    "a step that is true": put("position", "step", True),
    "seconds that are infinite": put("metrics", "seconds", float("inf")),
    "a metric that is a word": put("metrics", "last", "accuracy", "high"),
    "a generator that is no tensor": put("generators", 0, "cpu", [1, 2]),
}
WRONG_DELTA = {
    "no delta": put("delta", None),
    "a weight of another shape": put("delta", "weights", "layers.0.q_proj", WIDE),
    "a weight is lacking": lambda s: s["delta"]["weights"].clear(),
    "a stretch of another shape": lambda s: s["delta"]["ended"].update(
        {"layers.0.q_proj": [(WIDE, torch.ones(13, 2), 1)]}
    ),
    "a stretch without an end": lambda s: s["delta"]["ended"].clear(),
    "a beginning of no module": put("delta", "begin", lambda b: {**b, "x": (WIDE, WIDE)}),
    "t that is a word": put("delta", "t", "one"),
}
CASES = [("hetero", name, change) for name, change in WRONG.items()]
CASES += [("delta", name, change) for name, change in WRONG_DELTA.items()]
CASES += [
    ("parts", "moments of a whole factor", lambda s: first_moments(s).update(exp_avg=WIDE[:, :12])),
    ("parts", "a lower rank", put("parameters", A, lambda p: p[:1])),
    ("parts", "a rank that is a word", put("ranks_off", "layers.0.q_proj", ["one"])),
]
CASES += [("ranks", "another rank", put("parameters", A, lambda p: torch.ones(len(p) + 1, 12)))]


@pytest.mark.parametrize(("kind", "name", "change"), CASES, ids=[f"{k}: {n}" for k, n, _ in CASES])
def test_wrong_content_gives_way_to_the_checkpoint_before(copy, like, kind, name, change):
    """In one line that names the file; the run itself fits."""
    folder = copy(kind)
    assert checkpoint.read_last(folder, like(kind))[1] == ""
    rewrite(folder, "checkpoint.pt", change)
    state, note = checkpoint.read_last(folder, like(kind))
    assert "checkpoint.pt is no checkpoint of a run" in note or "does not fit the run" in note
    assert "going on from checkpoint.previous.pt" in note and "\n" not in note
    assert state["position"]["epoch"] == 1


@pytest.mark.parametrize(
    ("kind", "change"),
    [("hetero", WRONG["an empty dict"]), ("delta", WRONG["another shape"]), CASES[-1][::2]],
)
def test_the_run_goes_on_from_the_one_before_to_the_same_bits(copy, capsys, kind, change):
    folder = copy(kind)
    expected = outcome(folder)
    rewrite(folder, "checkpoint.pt", change)
    capsys.readouterr()
    assert train.main(["--resume", str(folder)]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "going on from checkpoint.previous" in line]
    assert "checkpoint.pt is no checkpoint of a run" in line or "does not fit the run" in line
    assert same(outcome(folder), expected)


def test_two_wrong_checkpoints_are_one_line(copy, capsys):
    folder = copy("lora")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        rewrite(folder, name, put("parameters", A, NAN))
        before[name] = (folder / name).read_bytes()
    assert train.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.count("expected finite numbers") == 2
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("step", 5),
        ("step_in_epoch", 4),
        ("epoch", 3),
        ("epoch", 0),
    ],
)
def test_a_position_that_the_run_does_not_have(copy, capsys, part, value):
    folder = copy("lora")
    rewrite(folder, "checkpoint.pt", put("position", part, value))
    assert train.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "no step of this run" in error and error.count("\n") == 1


def test_an_optimizer_of_another_kind_resumes(tmp_path):
    """Two groups in another order, and a state with keys of its own; NaN in it is refused."""
    model = tiny.adapted("bert", dtype=torch.float32)
    trained = lora.trainable(model)
    groups = [
        [p for n, p in trained.items() if n.endswith(end) == ours]
        for end, ours in (("lora_B", True), ("lora_B", False))
    ]
    optimizer = torch.optim.SGD([{"params": g} for g in groups], lr=0.1, momentum=0.9)
    like = checkpoint.expected(model, optimizer, None, None)
    model(**tiny.batch(model.config)).loss.backward()
    optimizer.step()
    state = tiny.checkpoint_state() | checkpoint.capture(model, optimizer, None, None)
    checkpoint.write(tmp_path, state)
    assert same(checkpoint.read_last(tmp_path, like)[0]["optimizer"], state["optimizer"])
    optimizer.state[groups[0][0]]["momentum_buffer"].fill_(torch.nan)
    state |= {"optimizer": optimizer.state_dict()}
    (tmp_path / "checkpoint.pt").unlink()
    checkpoint.write(tmp_path, state)
    with pytest.raises(ValueError, match="expected finite state"):
        checkpoint.read_last(tmp_path, like)


class Attack:
    def __reduce__(self):
        return os.system, ("touch /tmp/heterolora-was-here",)


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (lambda: saved({"parameters": Attack()}), r"holds code \(\w+\.system\), refused"),
        (lambda: pickle.dumps(Attack(), protocol=2), r"holds code \(\w+\.system\), refused"),
        (lambda: saved(torch.nn.Linear(2, 2)), r"holds code \(torch.*Linear\), refused"),
        (lambda: saved(collections.Counter("ab")), "is no checkpoint of a run|holds code"),
        (lambda: b"nothing", "is damaged"),
        (lambda: b"", "is damaged"),
    ],
)
def test_a_pickle_with_code_is_called_that(tmp_path, dump, message):
    """And without torch's advice to switch the safety off; nothing of it runs."""
    body = dump()
    (tmp_path / "checkpoint.pt").write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.read_last(tmp_path)
    text = str(error.value)
    assert "\n" not in text and "weights_only" not in text and "trusted" not in text
    assert not os.path.exists("/tmp/heterolora-was-here")


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------- run folders


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[" * 100_000, "config.json is not JSON: "),
        ("config.json", "{", "config.json is not JSON: "),
        ("config.json", "[]", r"not the config.json of a run: the content is \[\], expected dict"),
        ("config.json", "{}", "flags is None, expected dict"),
        ("config.json", '{"flags": {"ranking": "apart"}, "data": 3}', "data is 3, expected dict"),
        (
            "config.json",
            '{"flags": {"ranking": "apart"}, "data": {"dev": {"examples": "x", "sha256": ""}}}',
            "examples is 'x', expected count",
        ),
        ("config.json", '{"flags": {"ranking": "apart", "seed": 1e999}}', "seed is inf, no value"),
        ("metrics.jsonl", '{"event": "train"}\n{"eve\n', "metrics.jsonl:2 is not JSON"),
        ("metrics.jsonl", "3\n", "metrics.jsonl:1: the line is 3, expected dict"),
        ("metrics.jsonl", '{"step": 3}\n', "metrics.jsonl:1: its event is None, expected str"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl:1 is not JSON"),
    ],
)
def test_a_run_folder_that_is_malformed_is_one_line(copy, capsys, file, content, message):
    import re

    folder = copy("lora")
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert train.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and len(error) < 700
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_forms():
    form = {"n": count, "maybe": Maybe(str), "pairs": [(int, float)], "named": {str: bool}, "x": {}}
    good = {"n": 3, "maybe": None, "pairs": [(1, 2.0)], "named": {"a": True}, "x": {}}
    assert misfit(good, form) == "" == misfit({**good, "maybe": "s", "pairs": []}, form)
    for key, value, words in (
        ("n", True, "n is True, expected count"),
        ("n", -1, "n is -1, expected count"),
        ("maybe", 3, "maybe is 3, expected str"),
        ("pairs", [(1, 2.0), (1,)], r"pairs[1] has 1 members, expected 2"),
        ("pairs", [(True, 2.0)], "pairs[0][0] is True, expected int"),
        ("pairs", {}, "pairs is {}, expected list"),
        ("named", {"a": 1}, "named['a'] is 1, expected bool"),
        ("named", {1: True}, "a key of named is 1, expected str"),
        ("x", {"y": 1}, "x has 'y'"),
    ):
        assert misfit({**good, key: value}, form) == words
    assert misfit({}, {"a": int}) == "the content lacks 'a'"
    assert misfit(None, {"a": int}) == "the content is None, expected dict"
    assert misfit(3, None) == "the content is 3, expected NoneType"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scaling": float("inf")}, "scaling is inf, expected finite"),
        ({"scaling": "2"}, "scaling is '2', expected finite"),
        ({"scaling": 10**400}, ", expected finite"),
        ({"r": 10**400}, ", expected count"),
        ({"r": -1}, "r is -1, expected count"),
        ({"r": 2.0}, "r is 2.0, expected count"),
        ({"enabled": "no"}, "enabled is 'no', expected bool"),
        ({"more": 1}, "has 'more'"),
    ],
)
def test_what_an_adapter_says_of_its_modules(runs, tmp_path, change, words):
    import safetensors.torch

    path = runs / "lora" / "adapter.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["adapters"])
    about["layers.0.q_proj"] |= change
    safetensors.torch.save_file(
        tensors, tmp_path / "a.safetensors", {"adapters": json.dumps(about)}
    )
    model, _ = load_pretrained(str(runs / "model"))
    with pytest.raises(ValueError, match="is no adapter of this program") as error:
        lora.load_adapter(model, tmp_path / "a.safetensors")
    assert words in str(error.value) and lora.adapters(model) == {}


# --------------------------------------------------------------------------------------------- data


def test_a_run_keeps_its_data(copy, runs, tmp_path, capsys):
    folder = copy("lora")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    more, other = tiny.task_folder(tmp_path / "more", train=40), tmp_path / "other"
    shutil.copytree(runs / "task", other)
    text = (other / "train.tsv").read_text().splitlines()
    text[3] = "01"[text[3][0] == "0"] + text[3][1:]  # one label
    (other / "train.tsv").write_text("\n".join(text) + "\n")
    for data, message in ((more, "24 examples, not these 40"), (other, "had other examples")):
        assert train.main(["--resume", str(folder), "--data-dir", str(data)]) == 2
        error = capsys.readouterr().err
        assert "other data: its train set" in error and message in error and error.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    moved = shutil.copytree(runs / "task", tmp_path / "moved")
    assert train.main(["--resume", str(folder), "--data-dir", str(moved)]) == 0


def test_eval_only_says_what_it_evaluates(copy, runs, tmp_path, capsys, monkeypatch):
    """Without train.tsv, without tokenising it, and with no word of a fresh head."""
    folder, encoded = copy("lora"), []
    last = run_folder.read_log(folder)[-1]
    task = shutil.copytree(runs / "task", tmp_path / "moved")
    (task / "train.tsv").unlink()
    encode = glue.encode
    monkeypatch.setattr(glue, "encode", lambda *a: encoded.append(len(a[0])) or encode(*a))
    words = ["--eval-only", "--resume", str(folder), "--data-dir", str(task)]
    assert train.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    accuracy = f"accuracy {last['accuracy']:.4f}, f1 {last['f1']:.4f}"
    assert lines == [f"10 examples of {task / 'dev.tsv'}", accuracy] and encoded == [10]
    tiny.task_folder(task, dev=6)
    assert train.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "has other data: its dev set had 10 examples, not these 6" in lines[0]
    assert lines[1] == f"6 examples of {task / 'dev.tsv'}"


def test_a_run_does_not_go_on_upon_another_base(copy, runs, tmp_path, capsys):
    """Other weights in its model's folder: refused to train on, said to who measures."""
    folder, path = copy("lora"), tmp_path / "model"
    shutil.copytree(runs / "model", path)
    config = json.loads((folder / "config.json").read_text())
    config["flags"] |= {"model": str(path), "data_dir": str(runs / "task")}
    (folder / "config.json").write_text(json.dumps(config))
    for words in ["--resume"], ["--eval-only", "--resume"]:
        assert train.main([*words, str(folder)]) == 0  # a copy is the same base
    assert "another base" not in capsys.readouterr().out
    weights = safetensors.torch.load_file(path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    safetensors.torch.save_file(weights, path / "model.safetensors")
    assert train.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "has another base: its pretrained weights were not these" in error
    assert error.count("\n") == 1
    assert train.main(["--eval-only", "--resume", str(folder)]) == 0
    assert "has another base" in capsys.readouterr().out
    other = tiny.task_folder(tmp_path / "task", dev=6)
    words = ["--eval-only", "--resume", str(folder), "--data-dir", str(other)]
    assert train.main(words) == 0  # both are said
    said = capsys.readouterr().out
    assert "its dev set had 10 examples, not these 6" in said and "another base" in said
    shutil.copy(runs / "model" / "model.safetensors", path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_norm_eps": 0.5}))
    assert train.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "has another model: its config.json said something else" in error
    assert error.count("\n") == 1


def test_a_run_keeps_its_test_set(tmp_path, runs, capsys):
    data = shutil.copytree(runs / "task", tmp_path / "task")
    shutil.copy(data / "dev.tsv", data / "test.tsv")
    flags = ["--task", "mrpc", "--data-dir", str(data), "--model", str(runs / "model"), "--r", "2"]
    flags += ["--preset", "lora", "--device", "cpu", "--epochs", "1", "--warmup", "0", "--test"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    text = (data / "test.tsv").read_text().splitlines(keepends=True)
    (data / "test.tsv").write_text("".join(text[:4]))
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--test"]) == 2
    assert "its test set had 10 examples, not these 3" in capsys.readouterr().err


def test_a_checkpoint_of_a_torch_that_lacks_a_setting_is_one_of_this_run(runs):
    """What every torch has is still asked for."""
    found = checkpoint.read_last(runs / "lora")[0]["optimizer"]["param_groups"]
    fits = checkpoint.groups_like(found)
    assert fits(found) and "decoupled_weight_decay" in found[0]
    without = [{k: v for k, v in group.items() if k != "decoupled_weight_decay"} for group in found]
    assert fits(without) and not checkpoint.groups_like(without[:-1])(without)
    for key in ("betas", "eps", "weight_decay", "params"):
        assert not fits([{k: v for k, v in group.items() if k != key} for group in without])
    assert not fits([{**group, "decoupled_weight_decay": False} for group in found])


def test_ctrl_c_before_there_is_a_run_is_no_traceback(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_pretrained", interrupted)
    assert train.main(["--dry-run"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not shutil.which("git"), reason="git makes the repository")
def test_a_run_says_its_commit_and_what_is_not_in_it(tmp_path, monkeypatch):
    """A file of Python that was changed, anywhere; not another file, nor one that is new."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@n"]
    (tmp_path / "support").mkdir()
    for name in ("train.py", "README.md", "support/run_folder.py"):
        (tmp_path / name).write_text("1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "support" / "run_folder.py"))
    assert run_folder.versions()["git"] == head
    (tmp_path / "README.md").write_text("2\n")
    (tmp_path / "new.py").write_text("2\n")
    assert run_folder.versions()["git"] == head
    (tmp_path / "train.py").write_text("2\n")
    assert run_folder.versions()["git"] == f"{head}+changes"


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    """A git that knows the commit; one that stands outside a repository; none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    clean = 'case "$*" in *status*) ;; *) echo c0ffee ;; esac'
    for script, said in ((clean, "c0ffee"), ("echo no >&2; exit 128", None), (None, None)):
        program = tmp_path / "git"
        if script:
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        else:
            program.unlink()
        assert run_folder.versions()["git"] == said


def test_control_characters_of_a_file_reach_no_terminal(tmp_path, capsys):
    task = tiny.task_folder(tmp_path / "task")
    (task / "train.tsv").write_bytes(b"a\x1b[2J\r\x0cb\tc\n1\t2\n")
    model = tiny.bert_folder(tmp_path / "model")
    words = ["--task", "mrpc", "--data-dir", str(task), "--model", str(model)]
    assert train.main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error[:-1].isprintable() and "no column" in error


def test_a_model_that_no_device_holds_is_one_line(monkeypatch, capsys):
    def full(_model, _device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(Transformer, "to", full)
    assert train.main(["--dry-run", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "the model does not fit on cpu (CUDA out of memory. Tried" in error
    assert error.count("\n") == 1


# ----------------------------------------------------------------------------- Python entry points


def scores_of(change):
    batches = [tiny.batch(tiny.config("bert")), tiny.batch(tiny.config("bert"), 1)]
    return proxies.score("grad_norm", tiny.adapted("bert"), change(batches))


def without(name):
    return lambda batches: [batches[0], {k: v for k, v in batches[1].items() if k != name}]


def with_value(name, value):
    def change(batches):
        batches[1][name] = batches[1][name].clone()
        batches[1][name][0] = value
        return batches

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (x for x in b), "batches is a generator, expected a list: it is read more"),
        (lambda b: [], "at least one batch"),
        (lambda b: b[0], "batches is a dict, expected a list"),
        (lambda b: [[1, 2]], "batch 0 has no input_ids"),
        (without("labels"), "batch 1 has no labels: expected a dict of tensors"),
        (without("attention_mask"), "batch 1 has no attention_mask"),
        (lambda b: [{k: v[:0] for k, v in b[0].items()}], "batch 0 has no input_ids"),
        (with_value("labels", 3), "batch 1 has labels . to 3, allowed: 0 to 2"),
        (with_value("labels", -100), "batch 1 has labels -100 to ., allowed: 0 to 2"),
        (with_value("input_ids", 90), "batch 1 has input_ids . to 90, allowed: 0 to 89"),
        (lambda b: [{k: v.to("meta") for k, v in b[0].items()}], "batch 0 is on meta, the model"),
        (with_value("token_type_ids", 2), "batch 1 has token_type_ids 0 to 2, allowed: 0 to 1"),
        (lambda b: [b[0] | {"labels": b[0]["labels"].double()}], "batch 0 has labels in .*float64"),
        (
            lambda b: [b[0] | {"attention_mask": b[0]["attention_mask"][:, 1:]}],
            r"batch 0 has input_ids \(\d, \d+\), attention_mask \(\d, \d+\): not alike",
        ),
    ],
)
def test_batches_without_a_score(change, message):
    with pytest.raises(ValueError, match=message):
        scores_of(change)


def test_batches_at_the_edge_of_what_is_allowed():
    """The largest id and label are let in; a causal model's labels may be -100."""
    assert scores_of(with_value("labels", 2))
    assert scores_of(with_value("input_ids", 89))
    model = tiny.adapted("gpt2", head="lm")
    batch = tiny.batch(model.config)
    assert proxies.score("grad_norm", model, [batch])
    batch["labels"][:, 1:] = -100  # the first token of a text is never predicted
    with pytest.raises(ValueError, match="batch 0 has no token to predict"):
        proxies.score("grad_norm", model, [batch])
    model = tiny.adapted("bert", num_labels=1)
    assert proxies.score("grad_norm", model, (tiny.batch(model.config),))


ENTRIES = {
    "inject": lora.inject,
    "score": lambda m: proxies.score("grad_norm", m, [tiny.batch(tiny.config("bert"))]),
    "load_adapter": lambda m: lora.load_adapter(m, "nowhere"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "the model is a Linear, expected a model.Transformer"),
        (lambda: tiny.model("bert").half(), "word_embeddings.weight is in torch.float16, whose"),
        (lambda: tiny.model("bert").to("meta"), "word_embeddings.weight is on the device meta"),
    ],
)
def test_models_that_cannot_be_adapted(entry, make, message):
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](make())


def test_foreign_modules_are_called_that_everywhere():
    foreign = torch.nn.Linear(2, 2)
    for call in (lora.merge, lora.unmerge, lora.mark_trainable, lora.trainable, DeltaLoRA):
        with pytest.raises(ValueError, match=r"is a Linear, expected a model\.Transformer"):
            call(foreign)


def test_what_is_switched_on_is_a_set_of_names():
    """A record of a decision, {name: bool}, would switch on what it has as false as well."""
    model = tiny.adapted("bert", targets=("q_proj",))
    names = list(lora.adapters(model))
    for on, message in (
        ({names[0]: True, names[1]: False}, "what is on is a dict, expected a set of names"),
        (names[:1], "what is on is a list"),
        ({names[0], "layers.0.q"}, "no module is called 'layers.0.q'"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.switch(model, on)
        assert all(layer.enabled for layer in lora.adapters(model).values())
    lora.switch(model, frozenset(names[:1]))
    assert [layer.enabled for layer in lora.adapters(model).values()] == [True, False, False]


def test_a_first_block_alone_has_no_shortcut_from_the_one_before():
    with pytest.raises(ValueError, match="nothing to adapt: the first block has no shortcut_ffn"):
        lora.inject(tiny.model("bert", num_layers=1), (), r=2, shortcuts=("shortcut_ffn",))
    both = (
        "nothing to adapt: a bert model has no gate_proj, and the first block has no shortcut_ffn"
    )
    with pytest.raises(ValueError, match=both):
        lora.inject(tiny.model("bert", num_layers=1), ("gate_proj",), shortcuts=("shortcut_ffn",))


def test_a_weight_that_two_modules_have_is_not_merged():
    """The second would keep W + B A of the first as what it was before."""
    model = tiny.adapted("bert", targets=("q_proj", "v_proj"))
    model.layers[1].q_proj.base.weight = model.layers[0].v_proj.base.weight
    before = model.layers[0].v_proj.base.weight.clone()
    message = r"layers\.0\.v_proj has the weight of layers\.1\.q_proj: merging one changes both"
    with pytest.raises(ValueError, match=message):
        lora.merge(model)
    assert torch.equal(model.layers[0].v_proj.base.weight, before)
    model.layers[1].q_proj.enabled = False  # it would not be merged, and yet change
    with pytest.raises(ValueError, match="merging one changes both"):
        lora.merge(model)


def test_no_module_of_a_merged_model_is_switched():
    """Neither one that was merged nor one that was off, nor a shortcut; afterwards all of them."""
    model = tiny.adapted("bert", targets=("q_proj",), shortcuts=lora.RESIDUALS)
    off = lora.adapters(model)["layers.1.q_proj"]
    off.enabled = False
    batch = tiny.batch(model.config)
    expected = model.eval()(**batch).logits
    lora.merge(model)
    for layer in lora.adapters(model).values():
        with pytest.raises(ValueError, match="a module of a merged model cannot be switched"):
            layer.enabled = True
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-12)
    lora.unmerge(model)
    off.enabled = True
    assert not torch.allclose(model(**batch).logits, expected)
    lora.switch(model, set())
    assert lora.merge(model) == ()  # nothing is on: nothing is merged, and nothing is locked
    off.enabled = True


# -------------------------------------------------------------------------------------- state_dict


def two_models(**second):
    """An adapted model of which every second module is on, and another, random in all."""
    first = tiny.adapted("bert", shortcuts=lora.SHORTCUTS["all"]).eval()
    lora.switch(first, set(list(lora.adapters(first))[::2]))
    settings = {"shortcuts": lora.SHORTCUTS["all"], **second}
    return first, tiny.adapted("bert", seed=5, **settings).eval()


def test_a_state_dict_loads_to_the_same_logits():
    first, second = two_models()
    batch = tiny.batch(first.config)
    expected = first(**batch).logits
    assert not torch.allclose(second(**batch).logits, expected)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(**batch).logits, expected)
    on = {name: layer.enabled for name, layer in lora.adapters(first).items()}
    assert on == {name: layer.enabled for name, layer in lora.adapters(second).items()}
    assert 0 < sum(on.values()) < len(on)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda first, second: lora.merge(first), "is merged, in the state_dict or in the model"),
        (lambda first, second: lora.merge(second), "is merged, in the state_dict or in the model"),
        (
            lambda first, second: [lora.merge(first), lora.merge(second)],
            "is merged, in the state_dict or in the model",
        ),
        (
            lambda first, second: setattr(lora.adapters(second)["layers.1.fc1"], "scaling", 7.0),
            "layers.1.fc1 has r 3 and scaling 7.0, the state_dict 3 and 1.66.*: inject with",
        ),
    ],
)
def test_a_state_dict_that_would_compute_something_else_is_refused(prepare, message):
    first, second = two_models()
    prepare(first, second)
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(first.state_dict())


def test_two_merged_models_do_not_exchange_state_dicts():
    """All on and all merged: the weight before merging is in no state_dict."""
    first, second = tiny.adapted("bert"), tiny.adapted("bert", seed=5)
    lora.merge(first)
    lora.merge(second)
    with pytest.raises(ValueError, match="is merged, in the state_dict or in the model"):
        second.load_state_dict(first.state_dict())


def test_a_state_dict_of_other_modules_or_without_switches_is_refused():
    first, second = two_models(shortcuts=())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        second.load_state_dict(first.state_dict())
    first, second = two_models()
    state = {k: v for k, v in first.state_dict().items() if not k.endswith("lora_switches")}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_switches"):
        second.load_state_dict(state)


def test_json_of_this_file_is_whole(runs):
    """The run folders above are what a run leaves: their data is on record."""
    data = json.loads((runs / "lora" / "config.json").read_text())["data"]
    assert {split: data[split]["examples"] for split in ("train", "dev")} == {
        "train": 24,
        "dev": 10,
    }
    frozen = safetensors.torch.load_file(runs / "model" / "model.safetensors").values()
    assert data["base"]["examples"] == sum(p.numel() for p in frozen)
    assert set(data) == {"train", "dev", "config", "base"}
