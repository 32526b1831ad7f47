"""tools/bench: how times and peaks are taken, and its command line. No test measures speed."""

import math
import statistics
import types

import pytest
import torch

import tiny
from relatives import METHODS
from tools.bench import __main__ as bench
from tools.bench import language, peak, relatives, timing, training


def test_arms_take_turns_and_the_first_round_is_not_counted():
    said = []
    arms = {name: [lambda s=f"{name}{i}": said.append(s) for i in (1, 2)] for name in "ab"}
    seconds = timing.interleaved(arms, 3)
    assert said == ["a1", "b1", "a2", "b2"] * 4  # three rounds, and the one that warms up
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_ratio_is_of_medians_and_its_range_of_rounds():
    assert timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 8.0]) == (4 / 3, 0.5, 3.0)
    assert timing.show((4 / 3, 0.5, 3.0)) == "1.33 (0.50 … 3.00)"


def test_a_peak_is_above_what_was_there_and_forgets_the_one_before():
    def work(mib):
        return lambda: b"x" * (mib << 20) and None

    large, small = peak.peak_above(work(256)), peak.peak_above(work(64))
    assert 250 < large < 300 and 60 < small < 100


def test_a_call_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever it is started
    assert peak.in_fresh_process(statistics.fmean, data=[1, 2, 6]) == 3
    with pytest.raises(RuntimeError, match=r"math\.sqrt in a new process: TypeError"):
        peak.in_fresh_process(math.sqrt, x=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train --rounds 2", "is 2, allowed: an integer, 3 or more"),
        ("agreement --seeds 0,x", "is 0,x, allowed: integers such as 0,1,2"),
        ("delta --task mrpc", "unrecognized arguments: --task mrpc"),  # it would do nothing
        ("train --model gpt2", "is gpt2, allowed: minilm, smollm2-q4"),
        ("generate --model minilm", "unrecognized arguments: --model minilm"),
        ("speed", "invalid choice: 'speed'"),
    ],
)
def test_what_a_benchmark_does_not_take_is_refused(argv, message, capsys):
    assert bench.main(argv.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_data_is_one_line(tmp_path, capsys):
    argv = ["score", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.bench: ") and error.count("\n") == 1


def test_a_task_of_another_head_than_the_benchmarks_is_one_line(tmp_path):
    lines = "sentence1\tsentence2\tgold_label\na\tb\tneutral\nc\td\tentailment\n"
    for name in ("train.tsv", "dev_matched.tsv"):
        (tmp_path / name).write_text(lines)
    with pytest.raises(ValueError, match="mnli has not two classes"):
        training.minilm_batches("mnli", tmp_path, None)


def test_less_work_than_is_divided_by_is_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t0\nc\td\t1\n")
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t0\nc\td\t1\n")
    with pytest.raises(ValueError, match="wnli has 2 training examples, this benchmark needs 320"):
        training.minilm_batches("wnli", tmp_path, None)


def test_all_relatives_are_measured_beside_plain_lora():
    """Every method of METHODS is an arm of the study that the benchmark reads, LoRA the first."""
    commands = relatives.settings()
    assert next(iter(commands)) == "lora"
    flags = [c.split() for c in commands.values()]
    for kind, flag in (("adapter", "--adapter"), ("optimizer", "--optimizer")):
        found = {f[f.index(flag) + 1] for f in flags if flag in f}
        assert found | {"adamw"} >= set(METHODS[kind])
    assert {f[f.index("--allocate") + 1] for f in flags} == {"none", *METHODS["allocator"]}


def test_a_relative_beside_plain_lora(tmp_path, monkeypatch):
    """On a tiny model, with made-up seconds: who is divided by whom, and what a step is."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    common = f"--task mrpc --data-dir {task} --model {model} --preset lora --device cpu --r 2"
    commands = {"lora": common, "asymmetry": f"{common} --adapter asymmetry"}
    arms = []

    def interleaved(given, rounds):
        arms.append(given)
        return {"lora": [2.0] * rounds, "asymmetry": [3.0] * rounds}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    peaks = {commands["lora"]: 8.0, commands["asymmetry"]: 6.0}
    monkeypatch.setattr(peak, "in_fresh_process", lambda function, command, first: peaks[command])
    found = relatives.beside_first(commands, 3)
    assert found == {
        "lora": (192, (1.0, 1.0, 1.0), 1.0),  # 4 modules of 12 x 12
        "asymmetry": (96, (1.5, 1.5, 1.5), 0.75),
    }
    for functions in arms[0].values():
        losses = [functions[0]() for _ in range(30)]
        assert losses[-1] < losses[0] - 0.01  # they train
    assert relatives.step_peak(common, common) >= 0


def test_a_task_does_nothing_to_the_language_model(tmp_path, capsys):
    argv = f"train --model smollm2-q4 --task rte --out {tmp_path}".split()
    assert bench.main(argv) == 2
    message = "--task and --data-dir do nothing with --model smollm2-q4"
    assert message in capsys.readouterr().err


def test_texts_of_the_language_model():
    """Prompts have no label, sentences end with eos; both orders have the same texts."""
    config = tiny.config("llama", head="lm", vocab_size=200)
    letters = types.SimpleNamespace(encode=lambda s: types.SimpleNamespace(ids=[*map(ord, s)]))
    both = language.describe_batches(types.SimpleNamespace(config=config), letters)
    found = []
    for batches in both:
        assert len(batches) == language.STEPS
        rows = [row for batch in batches for row in zip(*batch.values(), strict=True)]
        texts = set()
        for ids, mask, labels in rows:
            n = int(mask.sum())
            text = "".join(map(chr, ids[:n].tolist()))
            prompt, sentence = text.split("\n")
            assert prompt.startswith("kind[") and sentence.endswith(chr(config.eos_token_ids[0]))
            assert (ids[n:] == 1).all() and (labels[n:] == -100).all() and mask[:n].all()
            begin = len(prompt) + 1
            assert (labels[:begin] == -100).all() and torch.equal(labels[begin:n], ids[begin:n])
            texts.add(text)
        found.append(texts)
    assert found[0] == found[1] and len(found[0]) == language.BATCH * language.STEPS
    spare = [sum((1 - b["attention_mask"]).sum().item() for b in batches) for batches in both]
    assert spare[0] < spare[1]
    assert language.padded([[3], [4, 5]], 0, left=True).tolist() == [[0, 3], [4, 5]]
