"""train.py with causal models and text tasks: whole runs of a tiny LLaMA, as a user meets them."""

import json
import math
import types

import pytest
import torch

import lora
import tiny
import train
from model import load_pretrained
from support import run_folder, tasks, writing
from support.flags import parse_flags
from test_causal import llama_folder
from test_distributed import in_processes
from test_texts import by_hand, e2e_folder, letters
from test_train import whole_and_interrupted
from tools import generate as program

# One after the other: two that look for a free port at once may find the same.
pytestmark = pytest.mark.xdist_group("processes")

METHODS = {
    "static": "--allocate static --proxy snip_slot --score-batches 1",
    "dynamic": "--every 0.4 --score-batches 2 --keep 0.25",
    "delta": "--preset lora --delta-ratio 0.5 --delta-start 1",
    "lazy": "--preset lora --delta-ratio 0.5 --delta-start 1 --delta-lazy yes",
    "dora": "--preset lora --adapter dora",
    "reslora": "--preset lora --adapter reslora_middle",
    "lora_pro": "--preset lora --optimizer lora_pro",
    "adalora": "--allocate adalora --shortcuts none --every 0.2",
}


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """As where there is none: its programs take seconds each time."""
    monkeypatch.setattr(writing.shutil, "which", lambda name: None)


@pytest.fixture
def model_folder(tmp_path):
    return llama_folder(tmp_path / "model", tiny.model("llama", head="lm"))


@pytest.fixture
def flags(tmp_path, model_folder):
    """Twelve examples of unequal length in batches of five: three steps an epoch."""
    task = e2e_folder(tmp_path / "task")
    text = f"--task e2e --data-dir {task} --model {model_folder} --r 2 --batch-size 5 --lr 0.01"
    return [*text.split(), "--log-every", "1", "--max-length", "30", "--device", "cpu"]


def done(folder):
    return run_folder.read_log(folder)[-1]


# ------------------------------------------------------------------------------------------ a step


def test_a_step_is_of_the_mean_over_its_predicted_tokens(flags):
    """By hand, token by token, in batches that have other numbers of examples and of tokens."""
    groups, results = ([[0, 1, 2, 3], [4]], [[4, 0, 3, 1, 2]]), []
    for group in groups:
        run = train.set_up(parse_flags([*flags, "--preset", "lora"]))
        tiny.randomise([a.lora_B for a in lora.adapters(run.model.double()).values()], 1)
        if not results:
            with torch.no_grad():
                parts = [by_hand(run.model.eval(), run.train[i]) for i in range(5)]
            run.model.train()
        loss = train.train_step(run, group, 0.0)
        results.append(loss)
    expected = sum(map(sum, parts)) / sum(map(len, parts))
    assert results == pytest.approx([expected] * 2, abs=1e-10)
    assert abs(expected - sum(sum(p) / len(p) for p in parts) / 5) > 1e-4


def test_accumulation_equals_one_large_batch(flags):
    results = []
    for groups in ([[0, 1, 2, 3], [4]], [[0, 1, 2, 3, 4]]):
        run = train.set_up(parse_flags([*flags, "--preset", "lora"]))
        run.model.double()
        run.optimizer = torch.optim.SGD(lora.trainable(run.model).values(), lr=1.0)
        train.train_step(run, groups, 0.1)
        results.append(lora.trainable(run.model))
    for name, parameter in results[0].items():
        torch.testing.assert_close(parameter, results[1][name], rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_goes_on_to_the_same_bits(flags, tmp_path, monkeypatch, method):
    """What it wrote and how good that was, too."""
    words = [*flags, *METHODS[method].split(), "--epochs", "2"]
    whole, broken = whole_and_interrupted(words, tmp_path, monkeypatch, 2)
    assert 0 <= done(whole)["bleu"] <= 100
    written = [json.loads((folder / "written.json").read_text()) for folder in (whole, broken)]
    assert written[0] == written[1]


def test_what_a_run_reports(flags, tmp_path, capsys):
    """Perplexity each epoch, BLEU once; with --test of test too; three examples at the end."""
    out = tmp_path / "run"
    assert train.main([*flags, "--epochs", "2", "--test", "--out", str(out)]) == 0
    printed, log = capsys.readouterr().out, run_folder.read_log(out)
    evals = [e for e in log if e["event"] == "eval"]
    assert [e["epoch"] for e in evals] == [1, 2] and all("bleu" not in e for e in evals)
    last = log[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["dev"] == {
        **{k: evals[-1][k] for k in ("loss", "perplexity")},
        "bleu": last["bleu"],
    }
    assert (
        last["test"].keys() == {"loss", "perplexity", "bleu"} and last["test_predictions"] is None
    )
    assert last["best"]["loss"] == min(e["loss"] for e in evals)
    assert "12 training, 6 development, 6 test examples" in printed
    assert sum(line.startswith("written ") for line in printed.splitlines()) == 3
    assert printed.count("METEOR, ROUGE-L and CIDEr") == 1 and "meteor" not in last
    written = json.loads((out / "written.json").read_text())
    assert written.keys() == {"dev", "test"}
    assert [len(w["references"]) for w in written["dev"]] == [2, 2, 1, 1]


def test_two_processes_equal_one(flags, tmp_path):
    """Unequal numbers of tokens in each: losses, parameters, scores, metrics to 1e-10."""
    flags += ["--every", "0.4", "--score-batches", "2"]

    def run():
        r, losses = train.set_up(parse_flags(flags)), []
        r.model.double()
        for i, group in enumerate(train.epoch_steps(r, 0)):
            if r.plan.due(r.step, i, 3):
                train.decide(r)
            losses.append(train.train_step(r, group, 0.01))
            r.step += 1
        found = {"losses": losses, "metrics": train.evaluate(r.model, r.task, r.dev)}
        r.last = {}
        train.measures.at_the_end(r)
        found["bleu"] = r.last["bleu"]
        found["scores"] = [h["scores"] for h in r.plan.history]
        found["parameters"] = {n: p.detach() for n, p in lora.trainable(r.model).items()}
        return found

    one = run()
    first, second = in_processes(run, 2, tmp_path)
    torch.testing.assert_close(first, one, rtol=0, atol=1e-10)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len(one["scores"]) == 2 and len(set(one["losses"])) == 3


def test_a_sharded_model_writes_the_same(flags, tmp_path):
    """Every process calls the model equally often, though its answers have other lengths."""

    def run(*more):
        r = train.set_up(parse_flags([*flags, *more]))
        r.last = train.evaluate(r.model, r.task, r.dev)
        train.measures.at_the_end(r)
        return {**r.last, "written": sum(map(len, r.written["dev"]))}

    one = run()
    first, second = in_processes(lambda: run("--shard", "yes"), 2, tmp_path)
    assert first == second == pytest.approx(one, rel=1e-5)


def test_instructions_and_running_text(tmp_path, model_folder, capsys):
    """Both from a folder; of running text every window counts, and nothing is written."""
    rows = [{"instruction": "a" * n, "input": "", "output": "b" * n} for n in range(1, 21)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (model_folder / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ messages[0].content }}"}'
    )
    for name in ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"):
        (tmp_path / name).write_text("ab" * 50)
    common = f"--data-dir {tmp_path} --model {model_folder} --max-length 20 --test"
    for task, examples in (("instructions", "9 training, 1 "), ("wikitext", "5 training, 5 ")):
        out = tmp_path / task
        words = (
            f"{common} --task {task} --out {out} --r 2 --preset lora --batch-size 2 --train-records"
        )
        assert train.main([*words.split(), "9"]) == 0
        printed = capsys.readouterr().out
        assert examples in printed and done(out)["loss"] > 0 and "bleu" not in done(out)
        assert (done(out)["test"] is None) == (task == "instructions")
        assert not (out / "written.json").exists()
    words = f"{common} --task wikitext --eval-only --eval-records 2"  # of running text: windows
    assert train.main(words.split()) == 0
    assert "2 examples of" in capsys.readouterr().out


def test_a_short_run_of_the_default_task(tmp_path, model_folder, capsys):
    """The default of a causal model; the untouched one is measured before, and stands beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        json.dumps({"mr": "ab"[i % 2] * (1 + i % 5), "references": ["c d", "d" * i]})
        for i in range(1, 9)
    ]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    out = tmp_path / "run"
    words = f"--model {model_folder} --data-dir {folder} --preset lora --out {out} --log-every 1"
    assert train.main(words.split()) == 0
    printed, log = capsys.readouterr().out, run_folder.read_log(out)
    assert run_folder.read_config(out)["task"] == "describe"
    first = log[0]
    assert (first["event"], first["step"]) == ("eval", 0) and first.keys() >= {"loss", "bleu"}
    assert done(out)["untouched"] == {k: first[k] for k in ("loss", "perplexity", "bleu")}
    assert "untouched: loss" in printed and "\nuntouched   loss" in printed
    code = train.main(["--eval-only", "--resume", str(out), "--test"])
    said = capsys.readouterr().out
    assert code == 0 and f"bleu {done(out)['bleu']:.4f}" in said and "test: loss" in said


def test_a_model_as_it_is_is_evaluated_without_a_run(flags, tmp_path, monkeypatch, capsys):
    """No training file is read, nothing is written; the numbers are those of the model alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task" / "trainset.csv").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*flags, "--eval-only"]) == 2
    assert "--r does nothing with --eval-only: no run, and nothing" in capsys.readouterr().err
    trains = ("--r", "--batch-size", "--lr", "--log-every")
    given = [(f, v) for f, v in zip(flags[::2], flags[1::2], strict=True) if f not in trains]
    words = [word for pair in given for word in pair]
    assert train.main([*words, "--eval-only", "--eval-records", "2"]) == 0
    printed = capsys.readouterr().out
    model, _ = load_pretrained(words[words.index("--model") + 1], head="lm")
    run = train.set_up(parse_flags([*words, "--eval-only", "--eval-records", "2"]))
    with torch.no_grad():
        parts = [by_hand(model.eval(), e) for e in run.dev]
    assert len(parts) == 4  # two prompts, of two targets each
    assert f"loss {sum(map(sum, parts)) / sum(map(len, parts)):.4f}" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_generate_asks_as_the_run_was_trained(flags, tmp_path, monkeypatch, capsys):
    """The tokens of a prompt are those that were trained on; --plain is the prompt as it is."""
    out, stream, asked = tmp_path / "run", program.generation.stream, []
    assert train.main([*flags, "--preset", "lora", "--out", str(out)]) == 0

    def watched(model, ids, *how, **more):
        asked.append(ids[0].tolist())
        return stream(model, ids, *how, **more)

    monkeypatch.setattr(program.generation, "stream", watched)
    run = train.set_up(parse_flags(["--eval-only", "--resume", str(out)]))
    prompt = run.prompts["dev"][0]
    assert run.dev[0]["input_ids"][: len(prompt.ids)] == prompt.ids
    for more in ([], ["--plain"]):
        words = ["--run", str(out), prompt.text, "--max-new-tokens", "6", *more]
        assert program.main(words) == 0
    assert asked == [prompt.ids, letters(prompt.text)] and prompt.ids == [*asked[1], 0]


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--model BERT", "task e2e is to write text, which a model that reads in both directions"),
        ("--proxy alpha_test", "--proxy alpha_test needs accuracy, and task e2e has perplexity"),
        ("--max-length 99", "--max-length is 99, the model has 40 positions"),
        ("--data-dir NOWHERE", "no data folder at"),
        ("--train-records 0", "'0' is not an integer from 1"),
    ],
)
def test_what_cannot_be_is_one_line(flags, tmp_path, capsys, extra, message):
    tiny.bert_folder(tmp_path / "bert")
    extra = extra.replace("BERT", str(tmp_path / "bert")).replace("NOWHERE", str(tmp_path / "no"))
    assert train.main([*flags, *extra.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_model_without_an_end_of_text_is_refused(flags, tmp_path, capsys):
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert train.main(flags) == 2
    assert "no eos_token_id: no text would ever end" in capsys.readouterr().err


def test_what_is_cut_is_said(flags, tmp_path, capsys):
    argv = [*flags[:-3], "8", *flags[-2:], "--train-records", "99", "--dry-run"]
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    assert "targets go beyond 8 tokens: truncated" in printed
    assert "leave no room for a target in 8 tokens: left out" in printed
    assert "--train-records 99: the set has 12, all are taken" in printed


def test_classification_with_a_causal_model_goes_on(tmp_path, model_folder):
    task, out = tiny.task_folder(tmp_path / "mrpc"), tmp_path / "run"
    words = f"--task mrpc --data-dir {task} --model {model_folder} --r 2 --epochs 1 --out {out}"
    assert train.main(words.split()) == 0
    assert done(out)["accuracy"] >= 0 and done(out)["trainable"]["head"] == 2 * 12


def test_the_default_task_is_the_models(tmp_path, model_folder):
    """Of BERT the embedded classification; a text task has defaults of its own, which it keeps."""
    bert = tiny.bert_folder(tmp_path / "bert")
    for words in (["--model", str(bert)], []):
        assert parse_flags(words, tasks.default).task == "paraphrase"
    args = parse_flags(["--model", str(model_folder)], tasks.default)
    assert (args.task, args.epochs, args.batch_size) == ("describe", 1, 8)
    args = parse_flags(["--model", str(model_folder), "--task", "mrpc"], tasks.default)
    assert (args.epochs, args.batch_size) == (3, 16)


@pytest.mark.parametrize("content", ['{"test": ["kept"]}', "{", "[]", "null", "[" * 10**5, None])
def test_what_was_written_to_another_split_stays_unless_it_is_damaged(tmp_path, content):
    if content:
        (tmp_path / "written.json").write_text(content)
    run = types.SimpleNamespace(folder=tmp_path, prompts={"dev": []}, written={"dev": []})
    kept = {"test": ["kept"]} if content and "kept" in content else {}
    assert train.runs.beside_prompts(run, True) == {**kept, "dev": []}
    assert train.runs.beside_prompts(run, False) == {"dev": []}
