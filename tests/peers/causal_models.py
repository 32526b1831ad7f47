"""LLaMA and its relatives in transformers, with random weights, as folders that model.py loads."""

import contextlib
import types
from unittest import mock

import torch
import transformers
from transformers import modeling_rope_utils
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import tiny
from model import load_pretrained
from test_gguf import write_tokenizer

SIZES = {
    "vocab_size": 90,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "head_dim": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 30.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
DEFAULT = {"rope_type": "default", "rope_theta": 30.0}
CASES = {  # name: (class of the config, heads, key-value heads, what else)
    "llama": ("LlamaConfig", 6, 2, {"rope_parameters": DEFAULT, "tie_word_embeddings": True}),
    "llama-mha": ("LlamaConfig", 3, 3, {"rope_parameters": DEFAULT}),
    "llama3": ("LlamaConfig", 4, 2, {"rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", 6, 3, {"rope_parameters": DEFAULT, "sliding_window": None}),
    "qwen2": ("Qwen2Config", 3, 1, {"rope_parameters": DEFAULT}),
    "qwen3": ("Qwen3Config", 6, 2, {"rope_parameters": DEFAULT, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", 4, 1, {"rope_parameters": DEFAULT}),
    "gemma-gqa": ("GemmaConfig", 4, 2, {"rope_parameters": DEFAULT}),
}


@contextlib.contextmanager
def in_float64():
    """torch.float32, torch.float and Tensor.float() mean float64 in transformers' model files."""
    wide = types.SimpleNamespace(
        **{**vars(torch), "float32": torch.float64, "float": torch.float64}
    )
    families = (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3, modeling_gemma)
    with contextlib.ExitStack() as stack:
        for module in (*families, modeling_rope_utils):
            stack.enter_context(mock.patch.object(module, "torch", wide))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def build_pair(folder, case, head="lm", dtype=torch.float64, end_bias=0):
    """(transformers' model, ours) with the same random weights, in eval mode."""
    kind, heads, kv_heads, more = CASES[case]
    sizes = {**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}
    if case.startswith("qwen2"):  # it has no head_dim
        del sizes["head_dim"]
    config = getattr(transformers, kind)(**sizes, num_labels=3)
    auto = "AutoModelForCausalLM" if head == "lm" else "AutoModelForSequenceClassification"
    peer = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    tiny.randomise(peer.parameters(), 0)
    if end_bias:
        with torch.no_grad():
            peer.get_output_embeddings().weight[config.eos_token_id] *= end_bias
    if kind == "GemmaConfig":  # gains of which 1 + w has no rounding error; sqrt(d) without one
        for name, p in peer.named_parameters():
            if name.endswith("norm.weight"):
                p.data = (1 + p.data) - 1
    peer.save_pretrained(folder)
    write_tokenizer(folder)
    ours, _ = load_pretrained(str(folder), num_labels=3, head=head)
    if kind == "GemmaConfig" and dtype == torch.float64:
        peer.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size, dtype=dtype).sqrt()
    return peer.to(dtype).eval(), ours.to(dtype).eval()
