"""Whatever is in a file, its reader gives something valid or one clear line: ValueError or OSError.

Property-based (hypothesis): good files with bytes changed, cut or inserted, and JSON with fields of
every kind.
"""

import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora
import tiny
from model import Config, load_pretrained
from support import checkpoint, glue, hf_folder
from support.errors import one_line
from support.flags import FLAGS, parse_flags
from tools.faults import same
from tools.peft import reading

FAST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert"]), st.integers(0, 1 << 20), st.binary()),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def changed(content, changes):
    """Good bytes with a few of them overwritten, cut off from somewhere, or more put in."""
    for kind, where, new in changes:
        where %= len(content) + 1
        if kind == "cut":
            content = content[:where]
        else:
            skip = len(new) if kind == "set" else 0
            content = content[:where] + new + content[where + skip :]
    return content


def read(reader, *args):
    """(what the reader gave, None) or (None, its complaint, which is one line)."""
    try:
        return reader(*args), None
    except (ValueError, OSError) as error:
        assert str(error) and len(str(error).splitlines()) == 1
        return None, str(error)


GOOD_TSV = (
    "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t7\t8\tthe "cat\tdog\r\n0\t9\t10\tété\tbird\r\n'
)


@FAST
@given(changes=CHANGES)
def test_tsv(tmp_path, changes):
    path = tmp_path / "train.tsv"
    path.write_bytes(changed(GOOD_TSV.encode(), changes))
    examples, complaint = read(glue.read_tsv, path, glue.TASKS["mrpc"])
    if complaint:
        assert str(path) in complaint
    else:
        assert examples
        for texts, label in examples:
            assert label in (0, 1) and len(texts) == 2 and not any("\t" in t for t in texts)


@FAST
@given(text=st.text(max_size=12))
def test_labels_of_regression(text):
    value, complaint = read(glue.read_label, text, glue.TASKS["stsb"], "dev.tsv:7")
    assert complaint.startswith("dev.tsv:7: label") if complaint else math.isfinite(value)


OTHER_FIELDS = (
    "hidden_act",
    "activation_function",
    "n_embd",
    "n_head",
    "n_layer",
    "n_positions",
    "n_inner",
    "ffn_dim",
    "word_embed_proj_dim",
    "do_layer_norm_before",
    "quantization_config",
    "layer_norm_epsilon",
)


@FAST
@given(
    family=st.sampled_from(["bert", "roberta", "opt", "gpt2", None, 3]),
    fields=st.dictionaries(
        st.sampled_from([*tiny.BERT_CONFIG, *OTHER_FIELDS]),
        JSON,
        max_size=3,
    ),
)
def test_config(family, fields):
    """A Config whose numbers are usable, or a complaint."""
    hf = {**tiny.BERT_CONFIG, "model_type": family, "n_positions": 40, "n_embd": 12, "n_layer": 2}
    hf |= {"n_head": 3, "ffn_dim": 20, **fields}
    config, complaint = read(Config.from_hf, hf)
    if not complaint:
        assert config.hidden_size % config.num_heads == 0 and config.max_positions > 0
        assert 0 <= config.pad_token_id < config.vocab_size
        assert isinstance(config.layer_norm_eps, float) and 0 < config.layer_norm_eps < 1
        assert config.activation in ("relu", "gelu", "gelu_new")
        assert all(isinstance(v, bool) for v in (config.pre_ln, config.final_norm))


def test_brackets_in_brackets(tmp_path):
    """What the JSON reader cannot follow, and what it can but repr cannot."""
    folder = tiny.bert_folder(tmp_path / "model")
    for depth in (100_000, *range(900, 1000, 7)):
        text = '{"model_type": ' + "[" * depth + "]" * depth + "}"
        (folder / "config.json").write_text(text)
        assert read(load_pretrained, str(folder))[1]


SIZES = st.sampled_from([1, 2, 3, 12, 41, 90, 10**7, 12 * 10**9, 10**18, 10**30])


@FAST
@given(
    fields=st.dictionaries(
        st.sampled_from([n for n, v in tiny.BERT_CONFIG.items() if type(v) is int]), SIZES
    )
)
def test_sizes_that_contradict_the_tensors(tmp_path, fields):
    """Refused before a model of these sizes is built: 10**7 layers would take for ever."""
    folder = tiny.bert_folder(tmp_path / "model", **fields)
    heads = fields.pop("num_attention_heads", 3)
    same = all(tiny.BERT_CONFIG[name] == size for name, size in fields.items())
    loaded, complaint = read(load_pretrained, str(folder))
    assert bool(loaded) == (same and 12 % heads == 0)
    if complaint and 12 % heads == 0:
        named = "contradict" in complaint or "do not belong together" in complaint
        assert named or "is missing" in complaint or "unexpected" in complaint


def test_sizes_that_no_tensor_confirms(tmp_path):
    tensors = {n: t for n, t in tiny.bert_tensors().items() if "intermediate" not in n}
    folder = tiny.bert_folder(tmp_path / "model", tensors, intermediate_size=10**18)
    complaint = read(load_pretrained, str(folder))[1]
    assert "layers.0.fc1.weight is missing (encoder.layer.0.intermediate" in complaint
    folder = tiny.bert_folder(tmp_path / "model", num_hidden_layers=3)
    assert "there are 2 layers, config.json says 3" in read(load_pretrained, str(folder))[1]


@FAST
@given(content=JSON | st.dictionaries(st.text(max_size=3), JSON, max_size=2))
def test_index_of_shards(tmp_path, content):
    folder = tiny.bert_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for whole in (content, {"weight_map": content}):
        index.write_text(json.dumps(whole))
        assert str(index) in read(load_pretrained, str(folder))[1]


class Code:
    def __reduce__(self):
        return pytest.fail, ("code in a file was run",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript itself
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_code(tmp_path, zipped):
    """Never run, called what it is, and no advice of torch's to switch the safety off."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Code()}, path, _use_new_zipfile_serialization=zipped)
    complaint = read(hf_folder.read_file, path)[1]
    assert "holds code (" in complaint and "nothing of it was run" in complaint
    assert "weights_only" not in complaint and "safe_globals" not in complaint
    path.write_bytes(b"\x80\x02}q\x00X\x05")
    assert "holds code" not in read(hf_folder.read_file, path)[1]
    torch.save({1: torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    assert "not a dict of tensors with names" in read(hf_folder.read_file, path)[1]
    torch.jit.script(torch.nn.ReLU()).save(str(path))
    assert "holds code (TorchScript)" in read(hf_folder.read_file, path)[1]


@FAST
@given(changes=CHANGES)
def test_pickles(tmp_path, changes):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, path)
    path.write_bytes(changed(path.read_bytes(), changes))
    tensors, complaint = read(hf_folder.read_file, path)
    assert complaint or all(torch.is_tensor(t) for t in tensors.values())
    assert "weights_only" not in str(complaint)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: t.bool(),
        lambda t: t.to(torch.complex64),
        lambda t: t.double() * 1e39,  # finite, but not in float32
    ],
)
def test_tensors_that_are_no_plain_numbers(tmp_path, make):
    folder = tiny.bert_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    name = "bert.encoder.layer.1.attention.self.key.weight"
    tensors = tiny.bert_tensors()
    torch.save({**tensors, name: make(tensors[name])}, folder / "pytorch_model.bin")
    assert f"{name.removeprefix('bert.')} (torch." in read(load_pretrained, str(folder))[1]
    half = {n: t.half() for n, t in tensors.items()}
    torch.save(half, folder / "pytorch_model.bin")
    model = load_pretrained(str(folder))[0]  # stored in float16, loaded in float32
    assert torch.equal(model.layers[1].k_proj.weight, half[name].float())


@FAST
@given(text=st.text() | st.text(alphabet="a \r\n\t\x0b\x0c\x1b\x1c\x85\u2028\ud800"))
def test_one_line(text):
    said = one_line(text)
    assert len(said.splitlines()) <= 1 and len(said) <= 300 and said.isprintable()
    assert one_line(said) == said
    if text.isprintable() and len(text) <= 300:
        assert said.split() == text.split()


def test_one_line_of_what_others_say():
    assert (
        one_line(OSError("cut\r\nshort \u2028 \x1b[1mnow\x1b[0m"))
        == "cut short \\x1b[1mnow\\x1b[0m"
    )
    assert one_line(EOFError()) == "EOFError" and one_line("a" * 9, limit=4) == "aaa…"


@FAST
@given(changes=CHANGES)
def test_safetensors(tmp_path, changes):
    """What loads is a whole set of finite tensors of the right shapes; never a traceback."""
    folder = tiny.bert_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(changed(path.read_bytes(), changes))
    loaded, _ = read(load_pretrained, str(folder))
    if loaded:
        model, _ = loaded
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


def header(tensors, offsets, dtype="F32"):
    """A safetensors file with a header of one's own."""
    fields = {
        n: {"dtype": dtype, "shape": list(t.shape), "data_offsets": list(offsets[n])}
        for n, t in tensors.items()
    }
    text = json.dumps(fields).encode()
    body = b"".join(t.numpy().tobytes() for t in tensors.values())
    return len(text).to_bytes(8, "little") + text + body


def test_overlapping_offsets_wrong_dtype_and_nan(tmp_path):
    path, two = tmp_path / "x.safetensors", {"a": torch.ones(4), "b": torch.zeros(4)}
    good = {"a": (0, 16), "b": (16, 32)}
    path.write_bytes(header(two, good))
    assert read(hf_folder.read_file, path)[0]["b"].sum() == 0
    for offsets in ({"a": (0, 16), "b": (8, 24)}, {"a": (0, 16), "b": (0, 16)}):
        path.write_bytes(header(two, offsets))
        assert "is not a readable safetensors file" in read(hf_folder.read_file, path)[1]
    path.write_bytes(header(two, good, "F64"))
    assert "is not a readable safetensors file" in read(hf_folder.read_file, path)[1]
    for value, message in ((torch.ones(90, 12).long(), "torch.int64"), (math.nan, "finite")):
        tensors = tiny.bert_tensors()
        name = "bert.embeddings.word_embeddings.weight"
        tensors[name] = value if torch.is_tensor(value) else torch.full((90, 12), value)
        folder = tiny.bert_folder(tmp_path / "model", tensors)
        complaint = read(load_pretrained, str(folder))[1]
        assert name.removeprefix("bert.") in complaint and message in complaint


@FAST
@given(changes=CHANGES)
def test_vocab_txt(tmp_path, changes):
    folder = tiny.bert_folder(tmp_path / "model")
    path = folder / "vocab.txt"
    path.write_bytes(changed(path.read_bytes(), changes))
    tokenizer, _ = read(hf_folder.load_tokenizer, folder, "bert", 90)
    if tokenizer:
        ids = tokenizer.encode("some words", "and more").ids
        assert len(ids) >= 3 and all(0 <= i < 90 for i in ids)


@FAST
@given(changes=CHANGES)
def test_tokenizer_json(tmp_path, changes):
    folder = tiny.bert_folder(tmp_path / "model")
    path = folder / "tokenizer.json"
    path.unlink(missing_ok=True)  # of the example before
    good = hf_folder.load_tokenizer(folder, "bert", 90).to_str()
    path.write_bytes(changed(good.encode(), changes))
    tokenizer, _ = read(hf_folder.load_tokenizer, folder, "bert", 90)
    if tokenizer:
        assert all(0 <= i < 90 for i in tokenizer.encode("some words", "and more").ids)


@FAST
@given(changes=CHANGES)
def test_checkpoints_are_whole_or_refused(tmp_path, changes):
    state = tiny.checkpoint_state()
    checkpoint.write(tmp_path, state)
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()
    bad = changed(good, changes)
    path.write_bytes(bad)
    loaded, complaint = read(checkpoint.read, path)
    assert (complaint is None) == (bad == good)
    if loaded:
        assert same(loaded, state)


@FAST
@given(
    changes=CHANGES | st.just([]),
    fields=st.dictionaries(st.sampled_from([n.replace("-", "_") for n in FLAGS]), JSON, max_size=2),
)
def test_flags_of_a_run(tmp_path, changes, fields):
    """What comes back could have been given on the command line."""
    good = {"task": "mrpc", "r": 8, "targets": ["fc1"], "ranking": "together", **fields}
    text = json.dumps({"flags": good}).encode()
    (tmp_path / "config.json").write_bytes(changed(text, changes))
    args, _ = read(parse_flags, ["--resume", str(tmp_path)])
    if args:
        assert args.task in glue.TASKS and args.r >= 1 and 0 <= args.lora_dropout < 1
        assert set(args.targets) <= set(lora.LINEARS)
        assert not changes or isinstance(args.seed, int)


PEFT_FIELDS = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "bias",
    "modules_to_save",
    "use_rslora",
    "layers_to_transform",
    "init_lora_weights",
)


@FAST
@given(
    fields=st.dictionaries(
        st.sampled_from(PEFT_FIELDS),
        JSON,
        max_size=3,
    )
)
def test_adapter_config(tmp_path, fields):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], **fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    tensors = {f"{query}.lora_A.weight": torch.ones(2, 12)}
    tensors[f"{query}.lora_B.weight"] = torch.ones(12, 2)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded, _ = read(reading.read, tmp_path, MODEL)
    if loaded:
        for pair in loaded[0].values():
            assert pair.r == 2 and math.isfinite(pair.scaling) and pair.scaling > 0


MODEL = tiny.model("bert", dtype=torch.float32, num_layers=1)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt"])
def test_folders_in_place_of_files(tmp_path, name):
    folder = tiny.bert_folder(tmp_path / "model")
    (folder / name).unlink()
    (folder / name).mkdir()
    assert read(load_pretrained, str(folder))[1]
