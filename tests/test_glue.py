"""support/glue.py: file formats, batches, metrics; the promises about the embedded task."""

import itertools
import json

import numpy as np
import pytest
import torch

import tiny
from support import download, glue, hf_folder, tasks


def write(folder, text, name="train.tsv", encoding="utf-8"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def test_mrpc_quotes_do_not_quote_and_bom_and_crlf_are_gone(tmp_path):
    text = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    text += '1\t7\t8\tHe said " no .\tSo " he\u2028left\r\n'
    path = write(tmp_path, text, encoding="utf-8-sig")
    assert glue.read_tsv(path, glue.TASKS["mrpc"]) == [(('He said " no .', 'So " he\u2028left'), 1)]


TSVS = {
    "cola": ("gj04\t0\t*\tThey drank.\n", (("They drank.",), 0)),
    "sst2": ("sentence\tlabel\nfine \t1\n", (("fine ",), 1)),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\t1\ts\ts\tA\tB\t3.25\n",
        (("A", "B"), 3.25),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\n0\t1\t2\tA\tB\t1\n",
        (("A", "B"), 1),
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA\tB\tneutral\tcontradiction\n",
        (("A", "B"), 2),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tQ\tS\tnot_entailment\n", (("Q", "S"), 1)),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n", (("A", "B"), 0)),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n", (("A", "B"), 1)),
}


@pytest.mark.parametrize("task", TSVS)
def test_the_format_of_every_task(tmp_path, task):
    """Columns by name, words for labels, CoLA without a header, QQP's short rows skipped."""
    assert {*TSVS, "mrpc", "paraphrase"} == {*glue.TASKS}
    text, expected = TSVS[task]
    folder = tmp_path / glue.TASKS[task].folder
    write(folder, text)
    write(folder, text, glue.TASKS[task].dev)
    assert glue.load_task(task, tmp_path) == ([expected], [expected])
    assert glue.load_task(task, folder) == ([expected], [expected])


HEADER = "sentence\tlabel\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\tlabel\na\t1\n", r"train\.tsv:1: no column 'sentence' .* has: text, label"),
        (HEADER + "a\t1\nb\t2\n", r"train\.tsv:3: label '2', allowed: 0, 1"),
        (HEADER + "a\t1\n\nb\n", r"train\.tsv:4: 1 columns, expected 2$"),
        (HEADER + "a\t1\nb\tc\t1\n", r"train\.tsv:3: 3 columns, expected 2: is there a tab"),
        (HEADER + "a\t1\t\n", r"train\.tsv:2: 3 columns, expected 2"),
        ("sentence\tlabel\ra\t1\r", r"train\.tsv: its lines end in CR alone"),
        ("label\tsentence\tlabel\n1\ta\t0\n", r"train\.tsv:1: the header has two columns 'label'"),
        (HEADER, "has no examples"),
        ("", r"no column 'sentence'"),
    ],
)
def test_broken_files_are_refused_with_file_and_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        glue.read_tsv(path, glue.TASKS["sst2"])


def test_bad_encoding_bad_score_missing_file_unknown_task(tmp_path):
    path = write(tmp_path, HEADER + "caf\xe9\t1\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"train\.tsv is not UTF-8: byte 18"):
        glue.read_tsv(path, glue.TASKS["sst2"])
    path = write(tmp_path, "sentence1\tsentence2\tscore\na\tb\tnan\n")
    with pytest.raises(ValueError, match=r"train\.tsv:2: label 'nan', expected a number"):
        glue.read_tsv(path, glue.TASKS["stsb"])
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv is missing"):
        glue.read_tsv(tmp_path / "dev.tsv", glue.TASKS["sst2"])
    with pytest.raises(FileNotFoundError, match="no data folder"):
        glue.load_task("mrpc", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown task 'x', allowed: paraphrase, mrpc"):
        glue.load_task("x")


def test_without_hub_and_folder_one_line_says_how_to_get_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="--data-dir DIR") as error:
        glue.load_task("mrpc")
    assert "\n" not in str(error.value)


def test_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    """The hub's columns are read by name, out of its cache, and the hub itself is not asked."""
    import datasets
    import huggingface_hub.constants

    def write(folder):
        (folder / "mnli").mkdir()
        for split, n in (("train", 2), ("validation_matched", 1), ("validation_mismatched", 1)):
            rows = {"premise": ["A"] * n, "label": [2] * n, "hypothesis": ["B"] * n}
            rows["idx"] = list(range(n))
            path = folder / "mnli" / f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_dict(rows).to_parquet(path)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "hub_reachable", lambda: pytest.fail("asked"))
    folder = tiny.hub_cache(tmp_path, "nyu-mll/glue", write, "dataset", ["rte/train-0.parquet"])
    assert glue.load_task("mnli") == ([(("A", "B"), 2)] * 2, [(("A", "B"), 2)])
    (folder / "mnli" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"train-\S+\.parquet cannot be read: .") as error:
        glue.load_task("mnli")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(download, "hub_reachable", lambda: False)
    with pytest.raises(ConnectionError, match=r"task rte is neither here .* --data-dir DIR"):
        glue.load_task("rte")


# ----------------------------------------------------------------------------- tokenising, batching


def tokenizer(tmp_path):
    return hf_folder.load_tokenizer(tiny.bert_folder(tmp_path / "m"), "bert", 90)


def test_encode_truncates_the_longer_text_first_and_leaves_the_tokenizer(tmp_path):
    t = tokenizer(tmp_path)
    encoded, cut = glue.encode([(("a b c d e f", "g h"), 1), (("a", "b"), 0)], t, 9)
    assert cut == 1
    assert [t.id_to_token(i) for i in encoded[0]["input_ids"]] == (
        ["[CLS]", *"abcd", "[SEP]", "g", "h", "[SEP]"]
    )
    assert encoded[0]["token_type_ids"] == [0] * 6 + [1] * 3
    assert t.truncation is None
    alone, _ = glue.encode([(("a b",), 2)], t, 9)
    assert alone[0]["label"] == 2 and len(alone[0]["input_ids"]) == 4
    empty, _ = glue.encode([(("", ""), 0)], t, 9)
    assert len(empty[0]["input_ids"]) == 3
    t.enable_truncation(5)
    t.enable_padding(length=20)
    before = t.truncation, t.padding
    padded, _ = glue.encode([(("a b c d e f",), 2)], t, 9)
    assert len(padded[0]["input_ids"]) == 8 and (t.truncation, t.padding) == before


def examples(lengths):
    return [{"input_ids": [7] * n, "token_type_ids": [0] * n, "label": 0} for n in lengths]


def test_collate_pads_on_the_right():
    encoded = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1], "label": 1},
        {"input_ids": [8], "token_type_ids": [0], "label": 0},
    ]
    batch = glue.collate(encoded, 3, True)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
        "labels": [1, 0],
    }
    assert "token_type_ids" not in glue.collate(encoded, 3, False)


def test_an_epoch_has_every_example_once_and_little_padding():
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 100, (1003,), generator=rng).tolist()
    encoded = examples(lengths)
    batches = glue.grouped_by_length(encoded, 8, torch.Generator().manual_seed(1))
    assert sorted(itertools.chain(*batches)) == list(range(1003))
    assert sorted(map(len, batches)) == [3] + [8] * 125
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.1 * sum(lengths)
    again = glue.grouped_by_length(encoded, 8, torch.Generator().manual_seed(1))
    other = glue.grouped_by_length(encoded, 8, torch.Generator().manual_seed(2))
    assert batches == again != other
    means = [np.mean([lengths[i] for i in b]) for b in batches]
    assert means != sorted(means)  # short batches do not all come first


def test_in_order():
    assert glue.in_order(examples([1] * 5), 2) == [[0, 1], [2, 3], [4]]


# ------------------------------------------------------------------------------------------ metrics


def test_metrics_by_counting():
    rng = np.random.default_rng(0)
    p, y = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    tp = sum(a == b == 1 for a, b in zip(p, y, strict=True))
    tn = sum(a == b == 0 for a, b in zip(p, y, strict=True))
    fp, fn = sum(p) - tp, sum(y) - tp
    m = glue.metrics(glue.TASKS["mrpc"], p, y)
    assert list(m) == ["accuracy", "f1"]
    assert m["accuracy"] == pytest.approx((tp + tn) / 50)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert m["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    mcc = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert glue.metrics(glue.TASKS["cola"], p, y) == {"matthews": pytest.approx(mcc)}


def test_correlations_with_ties():
    """Spearman by the definition: mean rank of equals, counted pair by pair."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 30).astype(float), rng.normal(size=30)

    def rank(v):
        return [sum(w < a for w in v) + (sum(w == a for w in v) + 1) / 2 for a in v]

    def pearson(a, b):
        a, b = np.array(a) - np.mean(a), np.array(b) - np.mean(b)
        return (a @ b) / ((a @ a) * (b @ b)) ** 0.5

    m = glue.metrics(glue.TASKS["stsb"], x, y)
    assert m == {
        "pearson": pytest.approx(pearson(x, y), abs=1e-12),
        "spearman": pytest.approx(pearson(rank(x), rank(y)), abs=1e-12),
    }


def test_metrics_where_nothing_varies():
    assert glue.metrics(glue.TASKS["mrpc"], [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert glue.metrics(glue.TASKS["cola"], [1, 1], [0, 1]) == {"matthews": 0.0}
    assert glue.metrics(glue.TASKS["stsb"], [2.0, 2.0], [0.0, 1.0])["spearman"] == 0.0


# ------------------------------------------------------------------------------------ embedded task


def embedded_rows(name):
    lines = (glue.EMBEDDED / f"{name}.tsv").read_text(encoding="utf-8").split("\n")
    return [line.split("\t") for line in lines[1:-1]]


def test_the_embedded_task_keeps_its_promises():
    """1332 + 360 pairs, half and half; no pair, sentence or subject in both splits."""
    splits = {name: embedded_rows(name) for name in ("train", "dev")}
    assert (len(splits["train"]), len(splits["dev"])) == (1332, 360)
    for rows in splits.values():
        assert 2 * sum(r[0] == "1" for r in rows) == len(rows)
        assert len({frozenset(r[3:]) for r in rows}) == len(rows)
        assert all(r[3] != r[4] for r in rows)
    sentences = [{s for r in rows for s in r[3:]} for rows in splits.values()]
    subjects = [{int(i) // 10 for r in rows for i in r[1:3]} for rows in splits.values()]
    assert not sentences[0] & sentences[1]
    assert not subjects[0] & subjects[1]
    assert (len(subjects[0]), len(subjects[1])) == (262, 70)


def test_word_overlap_does_not_decide_the_embedded_task():
    """The best threshold on shared words, chosen on the development labels, stays weak."""
    overlaps, labels = [], []
    for row in embedded_rows("dev"):
        a, b = (set(s.lower().strip(".").split()) for s in row[3:])
        overlaps.append(len(a & b) / len(a | b))
        labels.append(int(row[0]))
    overlaps, labels = np.array(overlaps), np.array(labels)
    best = max(np.mean((overlaps >= t) == labels) for t in overlaps)
    assert best < 0.7
    assert overlaps[labels == 0].max() > 0.7 and overlaps[labels == 1].min() < 0.1


# ---------------------------------------------------------------------------------------- test sets


def test_a_test_set_with_labels_is_read_and_one_without_is_said(tmp_path):
    text, expected = TSVS["rte"]
    write(tmp_path, text)
    assert glue.load_test("rte", tmp_path) == (
        None,
        f"{tmp_path} has no test.tsv: no test result",
    )
    write(tmp_path, text, "test.tsv")
    assert glue.load_test("rte", tmp_path) == ([expected], "")
    path = write(tmp_path, "index\tsentence1\tsentence2\n0\tA\tB\n", "test.tsv")  # GLUE's own
    found, note = glue.load_test("rte", tmp_path)
    assert found is None and note.startswith(f"{path} has no labels") and "\n" not in note
    write(tmp_path, "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tmaybe\n", "test.tsv")
    with pytest.raises(ValueError, match=r"test\.tsv:2: label 'maybe'"):
        glue.load_test("rte", tmp_path)


def test_colas_test_set_is_told_apart_without_a_header(tmp_path):
    text, expected = TSVS["cola"]
    write(tmp_path, text, "test.tsv")
    assert glue.load_test("cola", tmp_path) == ([expected], "")
    write(tmp_path, "index\tsentence\n0\tThey drank.\n", "test.tsv")
    assert glue.load_test("cola", tmp_path)[0] is None


def test_the_hubs_test_sets_have_no_labels(monkeypatch):
    rows = [(("A", "B"), -1), (("C", "D"), -1)]
    monkeypatch.setattr(glue, "load_from_hub", lambda _name, splits: [rows for _ in splits])
    found, note = glue.load_test("rte")
    assert found is None and "on the hub has no labels" in note


def test_the_length_of_a_pair_is_128_where_nothing_is_said(tmp_path):
    rows = [(("a " * 300, "b"), 0)]
    ([example],), _ = glue.encode_splits([rows], tokenizer(tmp_path), None, 512)
    assert len(example["input_ids"]) == 128


def test_train_records_of_one_label_alone_are_refused(tmp_path):
    rows = [(("a", "b"), label) for label in (0, 0, 1)]
    (tmp_path / "config.json").write_text("{}")
    words = tokenizer(tmp_path), tiny.config("bert"), tmp_path
    sizes = {"max_length": None, "eval_records": None}
    with pytest.raises(ValueError, match="--train-records 2: all of them have one label; give mo"):
        tasks.encode("mrpc", (rows, rows, None), *words, **sizes, train_records=2)
    (found, *_), _ = tasks.encode("mrpc", (rows, rows, None), *words, **sizes, train_records=3)
    assert len(found) == 3
    (found, dev, *_), _ = tasks.encode("mrpc", (None, rows, None), *words, **sizes, train_records=3)
    assert found is None and len(dev) == 3  # --eval-only of such a run


def test_qqp_with_many_short_rows_is_refused(tmp_path):
    header, row = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n", "0\t1\t2\tA\tB\t1\n"
    some, many = "1\t2\n" * 10, "1\t2\n" * 11
    assert len(glue.read_tsv(write(tmp_path, header + row + some), glue.TASKS["qqp"])) == 1
    with pytest.raises(ValueError, match="11 rows do not have 6 columns, 1 do"):
        glue.read_tsv(write(tmp_path, header + row + many), glue.TASKS["qqp"])


def test_what_stands_beside_a_result_was_measured_alike():
    whole = {"task": "paraphrase", "data_dir": None, "train_records": None, "eval_records": None}
    assert set(glue.baselines(**whole, model="minilm")) == {"words alone", "the head alone"}
    assert set(glue.baselines(**whole, model="other")) == {"words alone"}
    for change in {"task": "mrpc"}, {"data_dir": "x"}, {"train_records": 6}, {"eval_records": 6}:
        assert glue.baselines(**{**whole, **change}, model="minilm") == {}


def test_eval_records_are_of_dev_and_of_test(tmp_path):
    rows = [(("a", "b"), label) for label in (0, 1, 0, 1, 0)]
    (tmp_path / "config.json").write_text("{}")
    found, _ = tasks.encode(
        "mrpc",
        (rows, rows, rows),
        tokenizer(tmp_path),
        tiny.config("bert"),
        tmp_path,
        max_length=None,
        train_records=3,
        eval_records=2,
    )
    assert [len(split) for split in found[:3]] == [3, 2, 2]


def test_a_model_whose_labels_are_in_another_order_is_no_model_of_the_task(tmp_path):
    labels = {"id2label": {"0": "NOT_ENTAILMENT", "1": "ENTAILMENT"}}
    (tmp_path / "config.json").write_text(json.dumps(labels))
    sizes = {"max_length": None, "train_records": None, "eval_records": None}
    rows = [(("a", "b"), 0)]
    with pytest.raises(ValueError, match="id2label has the labels as not_entailment, entailment"):
        tasks.encode("rte", (rows,) * 3, None, tiny.config("bert"), tmp_path, **sizes)


def test_mnli_is_measured_on_the_matched_part():
    task = glue.TASKS["mnli"]
    assert (task.dev, task.test) == ("dev_matched.tsv", "test_matched.tsv")
    assert (task.hub_dev, task.hub_test) == ("validation_matched", "test_matched")
