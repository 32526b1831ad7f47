"""Text tasks: files in, tokens out, what is counted, and what a model writes.

Prompts and targets are of letters that tests/test_gguf.py's tokenizer knows: a letter is a token.
"""

import collections
import csv
import json
import math
import shutil
import sys
import types

import pytest
import torch

import lora
import proxies
import tiny
from model import load_pretrained
from support import download, evaluation, glue, prompts, seeds, tasks, texts, writing
from test_causal import llama_folder

A, END = 4, 3  # ids of the letter a, and of the end of text
E2E = [("name[ab], food[c]", "ab has c."), ("name[d]", "a, d"), ("name[ab], food[c]", "c at ab")]


def letters(text):
    """The ids of a text, spelt out: blanks are the last letter, what is unknown is 0."""
    known = {c: A + i for i, c in enumerate([*tiny.LETTERS, " "])}
    return [known.get(c, 0) for c in text]


def write_csv(path, rows, header=("mr", "ref")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def e2e_folder(path, train=12):
    """A task of E2E's form: the second text of a prompt is another target of it."""
    path.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(2)

    def text(low, high):
        size = int(torch.randint(low, high, (1,), generator=rng))
        return "".join(tiny.LETTERS[i] for i in torch.randint(0, 26, (size,), generator=rng))

    rows = [(text(1, 9), text(1, 12)) for _ in range(train)]
    write_csv(path / "trainset.csv", rows)
    held = [(text(2, 9), text(1, 9)) for _ in range(4)]
    for name in ("devset.csv", "testset_w_refs.csv"):
        write_csv(path / name, [*held, (held[1][0], text(1, 9)), (held[0][0], text(1, 9))])
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    return load_pretrained(str(llama_folder(path / "m", tiny.model("llama", head="lm"))))[1]


# ------------------------------------------------------------------------------------------ reading


def test_the_embedded_task():
    (train, dev, test), notes = texts.load_splits("describe", test=True)
    assert (len(train), len(dev), test) == (315, 90, None)
    assert all(len(r.targets) == 2 for r in train + dev)
    assert notes == ["task describe has no test set here: no test result"]


def test_references_are_grouped_by_prompt(tmp_path):
    """In the order in which a prompt comes first; the training set keeps a record a row."""
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        write_csv(tmp_path / name, E2E)
    (train, dev, test), _ = texts.load_splits("e2e", tmp_path, test=True)
    assert train == [(mr, [ref]) for mr, ref in E2E]
    both = [("name[ab], food[c]", ["ab has c.", "c at ab"]), ("name[d]", ["a, d"])]
    assert dev == test == both


def test_csv_as_it_occurs(tmp_path):
    """Quoted or not, a BOM, CRLF, a comma, a quotation mark and a line break in a text."""
    content = '\ufeff"mr","ref"\r\n"a, b","he said ""c"""\r\nd,"e\r\nf"\r\n\r\n'
    for name in ("trainset.csv", "devset.csv"):
        (tmp_path / name).write_bytes(content.encode())
    (train, _, _), _ = texts.load_splits("e2e", tmp_path)
    assert train == [("a, b", ['he said "c"']), ("d", ["e\r\nf"])]


def test_a_tenth_of_the_instructions_is_held_out(tmp_path):
    """Drawn by the seed; an input is part of what is asked; no answer: left out, and said."""
    rows = [{"instruction": f"i{n}", "input": "x" * (n % 2), "output": f"o{n}"} for n in range(40)]
    (tmp_path / "any.json").write_text(json.dumps([*rows, {**rows[0], "output": " "}]))
    (train, dev, test), notes = texts.load_splits("instructions", tmp_path, seed=1)
    assert (len(train), len(dev), test) == (36, 4, None)
    both = sorted(train + dev)
    assert both == sorted((f"i{n}" + "\n\nx" * (n % 2), [f"o{n}"]) for n in range(40))
    assert texts.load_splits("instructions", tmp_path, seed=1)[0][1] == dev
    assert texts.load_splits("instructions", tmp_path, seed=2)[0][1] != dev
    assert notes == [f"{tmp_path / 'any.json'}: 1 records have no output: left out"]


def test_running_text_is_kept_as_it_is(tmp_path):
    """But for CRLF, which is one line's end as LF is."""
    text = " \n = a = \n\n b \n"
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "wiki.valid.raw").write_bytes(text.replace("\n", "\r\n").encode())
    (train, dev, _), _ = texts.load_splits("wikitext", tmp_path)
    assert train == dev == [("", [text])]


MR = '{"mr": "a", "references": ["b"]}'
BROKEN = [  # task, {file: content}, what is said
    ("describe", {"train.jsonl": '{"mr": "a"}'}, r"train.jsonl:1: no 'references' in \{'mr'"),
    ("describe", {"train.jsonl": f'{MR}\n["a"]'}, r"train.jsonl:2: no 'mr' in \['a'\]"),
    ("describe", {"train.jsonl": f"{MR}\n{{"}, r"train.jsonl:2 is not JSON"),
    ("describe", {"train.jsonl": MR.replace('["b"]', "[]")}, r"no references: a record needs one"),
    ("describe", {"train.jsonl": MR.replace('["b"]', '["b", 3]')}, r"3 where a text is expected"),
    ("describe", {"train.jsonl": MR.replace('"b"', r'"b\u0000"')}, r"a NUL character in the text"),
    ("describe", {"train.jsonl": MR.replace('"b"', r'"hi \ud83d"')}, r"half a character"),
    ("describe", {"train.jsonl": MR.replace('"a"', '" "')}, r"train.jsonl:1: no mr: nothing is"),
    ("describe", {"train.jsonl": "\n"}, r"train.jsonl has no records"),
    ("describe", {"train.jsonl": MR}, r"has no dev.jsonl: task describe needs it"),
    ("describe", {"train.jsonl": b"\xff"}, r"train.jsonl is not UTF-8: byte 0"),
    ("e2e", {"trainset.csv": "mr,text\na,b\n"}, r"trainset.csv:1: no column 'ref' .* mr, text"),
    ("e2e", {"trainset.csv": ""}, r"trainset.csv:1: no column 'mr' in the header"),
    ("e2e", {"trainset.csv": "mr,ref,ref\na,b,c\n"}, "column 'ref' is there twice in the header"),
    ("e2e", {"trainset.csv": "mr,ref\n"}, r"trainset.csv has no records"),
    ("e2e", {"trainset.csv": "mr,ref\na,b,c\n"}, r"trainset.csv:2: 3 columns, expected 2"),
    ("e2e", {"trainset.csv": 'mr,ref\na,"b"c\n'}, r"trainset.csv:2: "),
    ("e2e", {"trainset.csv": "mr,ref\na,b\0\n"}, r"trainset.csv:2: .*NUL"),
    ("instructions", {"a.json": "{}", "b.json": "[]"}, r"has a.json, b.json: which is the data"),
    ("instructions", {"a.json": "{}"}, r"a.json holds \{\}, expected a list"),
    ("instructions", {"a.json": '[{"instruction": "a", "output": "b"}]'}, r"record 1: no 'input'"),
    ("instructions", {"a.json": "[]"}, r"a.json has no records"),
    ("instructions", {}, r"has no \*.json: task instructions needs it"),
    ("wikitext", {"train.txt": ""}, r"train.txt has no records"),
    ("wikitext", {"train.txt": "a\0"}, r"a NUL character"),
    ("wikitext", {}, r"has no wiki.train.raw or wiki.train.tokens or train.txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "message"), BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path, name, files, message):
    for file, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        texts.load_splits(name, tmp_path)
    assert "\n" not in str(error.value)


def test_the_hub(tmp_path, monkeypatch):
    """The columns that the hub's conversions have; running text comes by the line."""
    import datasets
    import huggingface_hub

    rows = {
        "tuetschek/e2e_nlg": {"meaning_representation": ["a", "a"], "human_reference": ["b", "c"]},
        "tatsu-lab/alpaca": {"instruction": ["a"] * 10, "input": [""] * 10, "output": ["b"] * 10},
        "Salesforce/wikitext": {"text": ["", " = a = \n", "", "b\n"]},
    }
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "hub_reachable", lambda: False)
    for task in ("e2e", "instructions", "wikitext"):
        with pytest.raises(ConnectionError, match=rf"task {task} is neither here .*--data-dir DIR"):
            texts.load_splits(task)
        repo = texts.TASKS[task].hub

        def write(folder, task=task, repo=repo):
            for pattern in texts.TASKS[task].hub_files.values():
                path = folder / pattern.replace("*", "0000")
                path.parent.mkdir(parents=True)
                datasets.Dataset.from_dict(rows[repo]).to_parquet(path)

        folder = tiny.hub_cache(tmp_path, repo, write, "dataset")
        ref = folder.parents[1] / "refs" / texts.HUB_REVISION
        ref.parent.mkdir(parents=True)
        shutil.copy(folder.parents[1] / "refs" / "main", ref)
    (train, dev, _), _ = texts.load_splits("e2e")
    assert (train, dev) == ([("a", ["b"]), ("a", ["c"])], [("a", ["b", "c"])])
    assert len(texts.load_splits("instructions")[0][0]) == 9
    assert texts.load_splits("wikitext", train=False)[0][1] == [("", [" \n = a = \n \nb\n"])]


# --------------------------------------------------------------------------------------- tokenising


def test_the_target_alone_is_predicted_and_its_end(tokenizer):
    records = [("ab c", ["de", "f"]), ("g", ["h"])]
    examples, asked, cut, left_out = texts.encode("e2e", records, tokenizer, None, [END, 9], 40)
    first = [*letters("ab c"), 0]  # the line break is a token that nobody knows
    for example, prompt, target in zip(
        examples, (first, first, [*letters("g"), 0]), ("de", "f", "h"), strict=True
    ):
        assert example["input_ids"] == [*prompt, *letters(target), END]
        assert example["label"] == [*[-100] * len(prompt), *letters(target), END]
    assert (cut, left_out) == (0, 0)
    assert asked[0] == ("ab c", first, ["de", "f"], 3)  # d, e and the end


def test_what_is_too_long_is_cut_or_left_out(tokenizer):
    """A target loses its end, and is then not taught to end; a prompt without room goes."""
    records = [("ab", ["cdefghij", "k"]), ("abcdefg", ["h"]), ("abcdefgh", ["i"])]
    examples, asked, cut, left_out = texts.encode("e2e", records, tokenizer, None, [END], 8)
    assert [e["input_ids"] for e in examples] == [
        [*letters("ab"), 0, *letters("cdefg")],
        [*letters("ab"), 0, *letters("k"), END],
    ]
    assert (cut, left_out) == (1, 2) and [p.text for p in asked] == ["ab"]
    with pytest.raises(ValueError, match="no record of task e2e fits into 8 tokens"):
        texts.encode("e2e", records[1:], tokenizer, None, [END], 8)
    with pytest.raises(ValueError, match="a text of task wikitext has less than two tokens"):
        texts.encode("wikitext", [("", ["a"])], tokenizer, None, [END], 8)


def test_instructions_are_asked_in_the_chat_template_where_there_is_one(tokenizer):
    form = ("<s>{{ messages[0]['content'] }}</s>", {})
    records = [("ab", ["c"])]
    (chat,), _, _, _ = texts.encode("instructions", records, tokenizer, form, [END], 40)
    assert chat["input_ids"] == [2, *letters("ab"), END, *letters("c"), END]
    assert chat["label"] == [-100] * 4 + [*letters("c"), END]
    (other,), _, _, _ = texts.encode("e2e", records, tokenizer, form, [END], 40)
    assert other["input_ids"] == [*letters("ab"), 0, *letters("c"), END]  # a form of its own
    (plain,), _, _, _ = texts.encode("instructions", records, tokenizer, None, [END], 400)
    text = texts.ALPACA.format("ab")
    assert plain["label"] == [-100] * len(text) + [*letters("c"), END]


def test_the_end_of_text_is_the_one_of_the_template(tokenizer):
    assert prompts.ends_of(tokenizer, (5, 3, 7), {"eos_token": "</s>"}) == [3, 5, 7]
    assert prompts.ends_of(tokenizer, (5, 3, 7), {}) == [5, 3, 7]


def test_windows():
    """Side by side, every token once; a last one alone has nothing before it."""
    got = texts.windows(list(range(9)), 4)
    assert [e["input_ids"] for e in got] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(e["label"] == e["input_ids"] for e in got)
    assert [e["input_ids"] for e in texts.windows(list(range(6)), 4)] == [[0, 1, 2, 3], [4, 5]]


# ---------------------------------------------------------------------------------- what is counted


def test_the_seed_of_a_run_draws_what_is_held_out(tmp_path):
    records = [{"instruction": f"say {i}", "input": "", "output": "x"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    held_out = [tasks.load("instructions", str(tmp_path), False, True, s)[0][1] for s in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


def some_examples(n=70, seed=3):
    """Prompts of 1 to 6 tokens and targets of 1 to 9, so that examples and tokens differ."""
    rng = seeds.generator(seed, "examples")
    found = []
    for _ in range(n):
        p, t = torch.randint(1, 7, (1,), generator=rng), torch.randint(1, 10, (1,), generator=rng)
        ids = torch.randint(5, 90, (int(p + t),), generator=rng).tolist()
        found.append({"input_ids": ids, "label": [-100] * int(p) + ids[p:]})
    return found


def by_hand(model, example):
    """- log p of each predicted token of one example, alone, in order."""
    ids = torch.tensor([example["input_ids"]])
    logits = model(ids, torch.ones_like(ids)).logits[0]
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    return [
        -log_p[i - 1, token].item()
        for i, token in enumerate(example["label"])
        if token != -100 and i > 0
    ]


@pytest.mark.parametrize("training", [True, False])
def test_perplexity_is_over_all_predicted_tokens(training, monkeypatch):
    """Whatever batches they came in, and without dropout; a window's first token is not counted."""
    model = tiny.adapted("llama", head="lm", dropout=0.3, shortcuts=lora.SHORTCUTS["all"])
    examples = [*some_examples(), *texts.windows([7, 8, 9, 10, 11], 5)]
    model.eval()
    with torch.no_grad():
        parts = [by_hand(model, e) for e in examples]
    assert evaluation.counted(examples) == sum(map(len, parts))
    loss = sum(map(sum, parts)) / sum(map(len, parts))
    means = sum(sum(p) / len(p) for p in parts) / len(parts)
    assert abs(loss - means) > 1e-3  # the mean of means is another number
    model.train(training)
    for tokens in (2048, 30, 1):
        monkeypatch.setattr(evaluation, "EVAL_TOKENS", tokens)
        got = evaluation.language(model, examples)
        assert got["loss"] == pytest.approx(loss, abs=1e-10)
        assert got["perplexity"] == pytest.approx(math.e**loss, rel=1e-10)
    assert model.training is training


def test_batches_by_tokens(monkeypatch):
    """Padding counts; an example that is longer than the limit is alone."""
    monkeypatch.setattr(evaluation, "EVAL_TOKENS", 12)
    sizes = [3, 30, 2, 4, 4, 3]
    got = evaluation.of_tokens([{"input_ids": [0] * n} for n in sizes])
    assert [[len(e["input_ids"]) for e in batch] for batch in got] == [[2, 3, 3], [4, 4], [30]]


def test_scores_are_of_the_mean_over_predicted_tokens():
    """GRAD-NORM by hand: the gradient of one mean over all tokens, in batches that differ."""
    model = tiny.adapted("llama", head="lm")
    examples = some_examples(7)
    batches = [glue.collate(part, 1, False) for part in (examples[:2], examples[2:])]
    scores = proxies.score("grad_norm", model, batches)
    total = evaluation.counted(examples)
    for example in examples:
        ids, label = (torch.tensor([example[k]]) for k in ("input_ids", "label"))
        n = evaluation.counted([example])
        (model(ids, torch.ones_like(ids), labels=label).loss * n / total).backward()
    for name, layer in lora.adapters(model).items():
        expected = layer.lora_A.grad.norm() + layer.lora_B.grad.norm()
        assert scores[name] == pytest.approx(expected.item(), rel=1e-10)


def test_a_batch_of_a_text_task():
    """Labels are padded with what is not predicted, ids with the model's padding."""
    short, long = (
        {"input_ids": [5, 6], "label": [-100, 6]},
        {"input_ids": [7, 8, 9], "label": [7, 8, 9]},
    )
    batch = glue.collate([short, long], 1, False)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert glue.fingerprint([short, long]) != glue.fingerprint([{**short, "label": [5, 6]}, long])


def test_what_is_better():
    task, mrpc = texts.TASKS["e2e"], glue.TASKS["mrpc"]
    assert evaluation.better(task, {"loss": 1.0}, {"loss": 2.0})
    assert not evaluation.better(task, {"loss": 2.0}, {"loss": 1.0})
    assert evaluation.better(mrpc, {"accuracy": 2.0}, {"accuracy": 1.0})


# ---------------------------------------------------------------------------------- what is written


def grams(words, n):
    """How often each run of n words occurs."""
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_by_hand(written, references):
    """BLEU (Papineni et al. 2002) of lists of words: clipped counts over all references of each."""
    hits, counts, length, closest = [0] * 4, [0] * 4, 0, 0
    for text, several in zip(written, references, strict=True):
        length += len(text)
        closest += min((abs(len(r) - len(text)), len(r)) for r in several)[1]
        for n in range(1, 5):
            most = collections.Counter()
            for r in several:
                most |= grams(r, n)
            hits[n - 1] += sum((grams(text, n) & most).values())
            counts[n - 1] += max(0, len(text) - n + 1)
    penalty = min(1.0, math.exp(1 - closest / length))
    return 100 * penalty * math.prod(h / c for h, c in zip(hits, counts, strict=True)) ** 0.25


def test_bleu_in_lower_case_over_all_references_of_a_prompt():
    """Two references of one, three of another; capitals do not count; short answers cost."""
    written = ["The Mill is a cheap pub by the river", "a small cafe near Lotus serves fine fish"]
    references = [
        ["the mill is a cheap pub near the water", "By the river there is a cheap pub"],
        ["A small Cafe near Lotus serves fish", "serves fine fish near lotus", "a cafe by the sea"],
    ]
    asked = [texts.Prompt("", [], r, 9) for r in references]
    words = [text.lower().split() for text in written]
    expected = bleu_by_hand(words, [[r.lower().split() for r in several] for several in references])
    assert 20 < expected < 90
    assert writing.bleu(asked, written) == pytest.approx(expected, abs=1e-6)


def test_answers_are_those_of_each_prompt_alone(tokenizer):
    """Greedy, in order, cut at the end of text, or at the longest reference of all."""
    model = tiny.adapted("llama", head="lm", seed=4).train()
    rng = seeds.generator(1, "prompts")
    ids = [torch.randint(4, 45, (1 + i % 5,), generator=rng).tolist() for i in range(40)]
    free = model.generate(torch.tensor([ids[0]]), 6, eos_token_ids=())[0].tolist()
    model.config = tiny.config("llama", head="lm", eos_token_ids=(free[2],))
    asked = [texts.Prompt("", t, ["a"], 3 + i % 4) for i, t in enumerate(ids)]
    got = writing.write(model, tokenizer, asked)
    lengths = set()
    for prompt, text in zip(ids, got, strict=True):
        answer = model.generate(torch.tensor([prompt]), 6)[0].tolist()
        answer = answer[: answer.index(free[2])] if free[2] in answer else answer
        lengths.add(len(answer))
        assert text == tokenizer.decode(answer).strip()
    assert len(lengths) > 1 and model.training


def test_the_room_of_an_answer_is_that_of_its_own_prompt(tokenizer):
    """40 positions: after 38 tokens there is room for two more, and for six beside it."""
    model = tiny.adapted("llama", head="lm", seed=4)
    model.config = tiny.config("llama", head="lm", eos_token_ids=())
    rng = seeds.generator(1, "prompts")
    asked = [torch.randint(4, 45, (n,), generator=rng).tolist() for n in (3, 38, 34)]
    got = list(writing.answer(model, asked, 6))
    assert [len(row) for row in got] == [6, 2, 6]
    for ids, row in zip(asked, got, strict=True):
        assert row == model.generate(torch.tensor([ids]), len(row))[0].tolist()


def test_java_is_left_out_in_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scores, why = writing.with_java([], [])
    assert scores == {} and "METEOR, ROUGE-L and CIDEr need" in why


def test_with_java_all_but_cider_are_of_100(monkeypatch):
    """The packages' part is played by other ones: scores from what they are given, and a list."""

    class Tokenizer:
        def tokenize(self, captions):
            return {i: [c["caption"].lower() for c in all_of] for i, all_of in captions.items()}

    def scorer(value):
        class Scorer:
            def compute_score(self, references, texts):
                print("counted")
                assert references == {0: ["ab", "c"], 1: ["d"]} and texts == {0: ["ab"], 1: ["x"]}
                return value, [value, value]

        return Scorer

    for path, name, made in (
        ("cider.cider", "Cider", scorer(1.05)),
        ("meteor.meteor", "Meteor", scorer(0.3)),
        ("rouge.rouge", "Rouge", scorer(0.5)),
        ("tokenizer.ptbtokenizer", "PTBTokenizer", Tokenizer),
    ):
        for part in ("pycocoevalcap", f"pycocoevalcap.{path.split('.')[0]}"):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        module = types.ModuleType(f"pycocoevalcap.{path}")
        setattr(module, name, made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    asked = [texts.Prompt("p", [], ["AB", "C"], 3), texts.Prompt("q", [], ["D"], 3)]
    scores, why = writing.with_java(asked, ["AB", "X"])
    assert scores == {"meteor": 30, "rouge_l": 50, "cider": 1.05} and why == ""
    # what another program's failure costs is its numbers, not the run
    meteor = sys.modules["pycocoevalcap.meteor.meteor"]
    monkeypatch.setattr(meteor.Meteor, "compute_score", lambda *_: float("b''\n"))
    scores, why = writing.with_java(asked, ["AB", "X"])
    assert scores == {} and "CIDEr failed" in why and "\n" not in why


def test_examples_beside_their_references():
    asked = [texts.Prompt(f"p{i}", [], [f"r{i}", f"s{i}", "third"], 3) for i in range(7)]
    lines = writing.beside_references(asked, [f"w\n{i}" for i in range(7)]).split("\n")
    assert [line for line in lines if line.startswith("written")] == [
        "written     w 0", "written     w 3", "written     w 6",
    ]  # fmt: skip
    assert lines[:4] == ["prompt      p0", "written     w 0", "reference   r0", "reference   s0"]


def test_a_split_is_measured_on_itself():
    m = tiny.adapted("llama", head="lm")
    splits = {"dev": some_examples(4), "test": some_examples(4, 9)}
    run = types.SimpleNamespace(model=m, task=texts.TASKS["wikitext"], prompts={}, **splits)
    found = {split: evaluation.measure(run, split)[0] for split in splits}
    assert found == {split: evaluation.language(m, examples) for split, examples in splits.items()}
    assert found["dev"] != found["test"]


def test_untouched_is_before_the_first_step():
    run = types.SimpleNamespace(task=texts.TASKS["describe"], step=3)
    assert evaluation.of_untouched(run) == ""


def test_the_length_of_an_example_is_the_tasks(tokenizer, tmp_path):
    config = tiny.config("llama", head="lm", max_positions=900)
    splits = [[("ab", ["c" * 500])], None, None]
    ([[example], _, _], _, _) = texts.encode_splits(
        "describe", splits, tokenizer, config, tmp_path, None
    )
    assert len(example["input_ids"]) == texts.TASKS["describe"].length == 128
