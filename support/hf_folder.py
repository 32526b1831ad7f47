"""Reading a model folder in Hugging Face layout: config.json, tensors under HF names, tokenizer.

    config.json                     -> read_config: checked by families.config_fields
    model.safetensors, its sharded index, or pytorch_model.bin (weights only, no pickled code)
                                    -> read_tensors -> convert: our names, each tensor accounted for
    tokenizer.json, vocab.json + merges.txt, or vocab.txt
                                    -> load_tokenizer: pairs encoded as the family does

What is read is checked here, once, before anything is built from it: the kind of each value, the
sizes in config.json against the shapes of the tensors (check_sizes), every tensor's name, shape and
numbers (convert). What does not fit is a ValueError or OSError of one line.

Names differ between the checkpoints of one family (a prefix or none, LayerNorm.gamma for .weight,
heads of another task). What is known and not needed is listed in the family's record
(families.py); anything else that is missing, unexpected or misshapen is an error that lists it.

What this file does not do: know a family (families.py), build the model (model.py), write
checkpoints (checkpoint.py), fetch (download.py).
"""

import json
import re
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import tokenizers
import torch
from tokenizers import processors
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from support import large
from support.errors import one_line, shown
from support.families import FAMILIES
from support.form import count, misfit

# -------------------------------------------------------------------------------------------- files


def read_text(path):
    """The text of a file. ValueError: it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} ({error.reason})") from error


def read_json(path):
    """The object in a JSON file.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply to be read, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON that can be read: brackets in brackets") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_config(folder):
    """config.json of a model folder, with the ends of a text that generation_config.json names.

    Raises:
        FileNotFoundError: there is none. ValueError: it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: not a model in Hugging Face layout")
    config, more = read_json(path), Path(folder) / "generation_config.json"
    if more.is_file():
        ends = read_json(more).get("eos_token_id")
        config |= {} if ends is None else {"eos_token_id": ends}
    return config


def read_chat_template(folder):
    """(Jinja template by which messages become a prompt, or None; tokenizer_config.json).

    Of a list of templates, {"name", "template"} each, it is the one that is called "default". What
    tokenizer_config.json does not say of special tokens, special_tokens_map.json does.
    """
    files = [Path(folder) / f"{n}.json" for n in ("special_tokens_map", "tokenizer_config")]
    found = [read_json(path) if path.is_file() else {} for path in files]
    options, alone = found[0] | found[1], Path(folder) / "chat_template.jinja"
    template = read_text(alone) if alone.is_file() else options.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None, options


def read_tensors(folder):
    """All tensors of a model folder, under the names in the file.

    Raises:
        FileNotFoundError: no weights, or a shard is missing. ValueError: a file that is not what it
            says.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            tensors = {}
            for path in shards_of(index):
                tensors |= read_file(path)
            return tensors
    raise FileNotFoundError(
        f"{folder} has no weights: expected model.safetensors, pytorch_model.bin, or an index.json"
    )


def shards_of(index):
    """The files that an index.json names, all of them beside it. Raises as read_tensors."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map: expected tensor name -> file name")
    wrong = [shard for shard in shards.values() if not isinstance(shard, str)]
    if wrong:
        raise ValueError(f"{index}: weight_map holds {shown(wrong[0])}, expected names of files")
    paths = {shard: index.parent / shard for shard in sorted(set(shards.values()))}
    for shard, path in paths.items():
        if path.parent != index.parent or not path.is_file():
            raise FileNotFoundError(
                f"{index} names the shard {shown(shard)}, which is not beside it"
            )
    return list(paths.values())


def read_file(path):
    """The tensors of one file: safetensors, or a pickle of which no code is executed.

    Raises:
        ValueError: damaged, or not a dict of tensors; a pickle that holds code is called that.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
    except Exception as error:  # its own kind, or the operating system's
        raise ValueError(f"{path} is not a readable safetensors file: {one_line(error)}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, of formats that it will refuse
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds: zip, pickle, EOF, runtime
        raise ValueError(f"{path} {why_not_loaded(error)}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} is not a dict of tensors with names")
    return tensors


def why_not_loaded(error):
    """What torch.load(weights_only=True) found, without its advice to switch the safety off."""
    said = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", said)  # what the file asks to be called
    if found:
        return f"holds code ({found[1] or found[2]}), refused: nothing of it was run"
    if "weights_only" in said:
        return "is damaged, or holds something else than tensors, refused: nothing of it was run"
    return f"is damaged, or not a file of tensors: {one_line(error)}"


# ------------------------------------------------------------------------------------------ tensors


def hf_module(family, module):
    """The HF path of one of our modules, without the family's prefix: "layers.3.q_proj" -> …."""
    record = FAMILIES[family]
    if module.startswith("layers."):
        _, i, place = module.split(".", 2)
        return f"{record.stack}.{i}.{record.layer[place]}"
    return record.top[module]


def hf_name(family, ours):
    """The name of a tensor, without the prefix: "layers.3.q_proj.weight" -> …."""
    module, _, kind = ours.rpartition(".")
    return f"{hf_module(family, module)}.{kind}"


def normalise(tensors, family):
    """Names without the family's prefix, gamma and beta renamed, what is not needed left out."""
    record, result = FAMILIES[family], {}
    for name, tensor in tensors.items():
        short = name.removeprefix(record.prefix)
        short = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", short)
        short = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", short)
        if re.fullmatch(record.ignored, short):
            continue
        if short in result:
            raise ValueError(
                f"the checkpoint has {shown(short)} twice, with and without {record.prefix!r}"
            )
        result[short] = tensor
    return result


def our_layout(tensor, ours, family):
    """One of their tensors as nn.Linear stores it: (out, in), and our part of a fused one."""
    record = FAMILIES[family]
    place = ours.split(".")[-2]
    if not ours.startswith("layers.") or place.endswith("norm"):
        return tensor
    if record.transposed and tensor.ndim == 2:
        tensor = tensor.T  # Conv1D's (in, out) -> (out, in)
    n = len(record.fused)
    if place in record.fused and tensor.ndim and len(tensor) % n == 0:
        tensor = tensor.chunk(n)[record.fused.index(place)]  # (n out, in) -> (out, in)
    return tensor


def check_sizes(tensors, config):
    """Refuse a config.json that contradicts its tensors, before a model of its sizes is built.

    Each size is compared with the shape of one tensor that has it, and the number of layers with
    the numbers in the names; convert compares everything else with the model. A size that no
    tensor confirms is refused too, for a model of 10**12 columns cannot even be described; but not
    the number of heads, which in some families no tensor has.

    Args:
        tensors: dict, as read_tensors gives them; only names and shapes are read.
        config: model.Config.

    Raises:
        ValueError: lists each size, what config.json says and what the tensors say.
    """
    tensors, c = normalise(tensors, config.family), config
    sizes = {  # our tensor -> its shape by config.json
        "word_embeddings.weight": {"vocab_size": c.vocab_size, "embed_dim": c.embed_dim},
        "layers.0.fc1.weight": {"ffn_dim": c.ffn_dim, "hidden_size": c.hidden_size},
    }
    if "position_embeddings" in FAMILIES[c.family].top:
        rows = c.max_positions + c.position_offset
        sizes["position_embeddings.weight"] = {"positions": rows, "hidden_size": c.hidden_size}
    if c.rope_theta is not None:  # nothing else has the size of a head
        heads = {"num_attention_heads x head_dim": c.num_heads * c.head_dim}
        sizes["layers.0.q_proj.weight"] = {**heads, "hidden_size": c.hidden_size}
        heads = {"num_key_value_heads x head_dim": c.num_kv_heads * c.head_dim}
        sizes["layers.0.k_proj.weight"] = {**heads, "hidden_size": c.hidden_size}
    if c.type_vocab_size:
        shape = {"type_vocab_size": c.type_vocab_size, "hidden_size": c.hidden_size}
        sizes["token_type_embeddings.weight"] = shape
    problems = []
    for ours, shape in sizes.items():
        name = hf_name(c.family, ours)
        if name not in tensors:
            problems.append(f"{ours} is missing ({name})")
            continue
        got = tuple(our_layout(tensors[name], ours, c.family).shape)
        if got != tuple(shape.values()):
            said = " x ".join(f"{size} {shown(value)}" for size, value in shape.items())
            problems.append(f"{name} has shape {got}, config.json says {said}")
    stack = re.escape(FAMILIES[c.family].stack)
    found = {m[1] for n in tensors if (m := re.match(rf"{stack}\.(\d+)\.", n))}
    if len(found) < c.num_layers:  # convert lists the names of layers that are too many
        problems.append(f"there are {len(found)} layers, config.json says {shown(c.num_layers)}")
    if problems:
        raise ValueError(
            f"config.json contradicts the weights of this {c.family} model: {'; '.join(problems)}"
        )


def convert(tensors, config, expected, head):
    """HF tensors -> our state dict, every tensor accounted for.

    Args:
        tensors: dict, as read_tensors gives them.
        config: model.Config.
        expected: dict, our names -> tensors of the right shape (values are not read).
        head: tuple of our modules that may be missing as a whole.

    Returns:
        (dict our name -> tensor, tuple of the head modules that are missing). The tensors are
        float32; with config.base_dtype "bf16" those of the frozen base are bfloat16.

    Raises:
        ValueError: lists what is missing, unexpected, misshapen, or not dense, floating-point and
            finite in float32; or another base_dtype.
    """
    large.refuse_dtype(config.base_dtype)
    tensors, family = normalise(tensors, config.family), config.family
    used, state, problems = set(), {}, []
    for ours, parameter in expected.items():
        theirs = hf_name(family, ours)
        if theirs not in tensors:
            continue
        used.add(theirs)
        stored = tensors[theirs]
        if not plain(stored):
            problems.append(f"{theirs} ({stored.dtype}) is not a tensor of floating-point numbers")
            continue
        tensor = our_layout(stored, ours, family).to(torch.float32)
        if ours.endswith("norm.weight"):
            tensor = tensor + FAMILIES[family].gain_offset
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(stored.shape)}, does not fit {ours} {tuple(parameter.shape)}"
            problems.append(f"{theirs} has shape {shapes}")
        elif not tensor.isfinite().all():
            problems.append(f"{theirs} ({stored.dtype}) is not finite in float32")
        kept = "fp32" if large.stays_wide(ours, head) else config.base_dtype
        state[ours] = tensor.to(large.DTYPES[kept]).contiguous().clone()
    absent = [n for n in expected if hf_name(family, n) not in tensors]
    whole = {m: [n for n in expected if n.rpartition(".")[0] == m] for m in head}
    fresh = tuple(m for m, names in whole.items() if set(names) <= set(absent))
    problems += [f"{n} is missing" for n in absent if n.rpartition(".")[0] not in fresh]
    # the head of another task
    others = ("score", "classifier") if config.head == "lm" else ("lm_head",)
    used |= {f"{m}.{kind}" for m in others for kind in ("weight", "bias")}
    if config.head == "lm" and "lm_head.weight" in tensors and config.tied:
        used.add("lm_head.weight")  # a copy of the embedding
        embedding = tensors.get(hf_name(family, "word_embeddings.weight"))
        if embedding is not None and not torch.equal(tensors["lm_head.weight"], embedding):
            problems.append("lm_head.weight differs from the embedding that it is tied to")
    problems += [f"{one_line(n)} is unexpected" for n in tensors if n not in used]
    if problems:
        raise ValueError(f"the checkpoint does not fit a {family} model: {'; '.join(problems)}")
    return state, fresh


def plain(tensor):
    """Whether a tensor is there (not on "meta"), dense, and of floating-point numbers."""
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return dense and tensor.is_floating_point()


# ---------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(folder, family, vocab_size):
    """The tokenizer of a model folder; texts and pairs come out as transformers' of the family.

    Of LLaMA and its relatives they come out as tokenizer.json has it.

    Args:
        folder: path with tokenizer.json, or vocab.json + merges.txt, or vocab.txt.
        family: key of FAMILIES.
        vocab_size: int, rows of the model's embedding.

    Returns:
        tokenizers.Tokenizer without truncation or padding.

    Raises:
        FileNotFoundError: none of the three. ValueError: unreadable, a special token is missing, or
            ids beyond the model's embedding.
    """
    record = FAMILIES[family]
    try:
        tokenizer = read_tokenizer(Path(folder), record)
    except FileNotFoundError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    absent = [t for t in record.needed if tokenizer.token_to_id(t) is None]
    if absent:
        raise ValueError(
            f"the tokenizer in {folder} lacks {', '.join(absent)}, which {family} needs"
        )
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {highest}, the model's embedding "
            f"{vocab_size} rows: they do not belong together"
        )
    if record.pair is None:  # the file says it
        return tokenizer
    specials = {t for t in record.pair.replace(":1", "").split() if t[0] != "$"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=record.single,
        pair=record.pair,
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in sorted(specials)],
    )
    return tokenizer


def read_tokenizer(folder, record):
    """The tokenizer in whichever files are there, without the family's template."""
    if (folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if record.pair is None:
        raise FileNotFoundError(f"{folder} has no tokenizer.json, the one file that says it all")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return with_added(byte_level_bpe(folder, record.specials), folder)
    if (folder / "vocab.txt").is_file():
        return with_added(word_piece(folder, record.needed), folder)
    raise FileNotFoundError(
        f"{folder} has no tokenizer: expected tokenizer.json, vocab.json + merges.txt, or vocab.txt"
    )


def with_added(tokenizer, folder):
    """The same, with the tokens of added_tokens.json, {token: id}, at their ids."""
    path = folder / "added_tokens.json"
    added = read_json(path) if path.is_file() else {}
    new = added.keys() - tokenizer.get_vocab().keys()
    wrong = misfit(added, {str: count}, "added_tokens.json")
    if not wrong:
        ordered = sorted(new, key=added.get)
        tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ordered])
        odd = [t for t, number in added.items() if tokenizer.token_to_id(t) != number]
        wrong = f"added_tokens.json gives {shown(odd[0])} another id than the next" if odd else ""
    if wrong:
        raise ValueError(wrong)
    return tokenizer


def byte_level_bpe(folder, specials):
    """RoBERTa's, OPT's and GPT-2's: bytes as characters, then merges."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    path = folder / "tokenizer_config.json"
    prefix = (read_json(path) if path.is_file() else {}).get("add_prefix_space", False)
    built = ByteLevelBPETokenizer.from_file(*files, add_prefix_space=bool(prefix))
    tokenizer = tokenizers.Tokenizer.from_str(built.to_str())
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens(  # <mask> takes the space before it
        [tokenizers.AddedToken(t, lstrip=t == "<mask>") for t in specials if t in known]
    )
    return tokenizer


def word_piece(folder, needed):
    """BERT's: words, lower-cased unless tokenizer_config.json says no, then word pieces."""
    path = folder / "tokenizer_config.json"
    options = read_json(path) if path.is_file() else {}
    words = options.get("word_tokenizer_type", "basic")
    if words != "basic" or "Japanese" in str(options.get("tokenizer_class")):
        raise ValueError(f"tokenizer_config.json cuts words by {shown(words)}, expected 'basic'")
    vocab = tokenizers.models.WordPiece.read_file(str(folder / "vocab.txt"))
    absent = [token for token in needed if token not in vocab]
    if absent:
        raise ValueError(f"vocab.txt lacks {', '.join(absent)}")
    built = BertWordPieceTokenizer(
        vocab,
        lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
    )
    return tokenizers.Tokenizer.from_str(built.to_str())
