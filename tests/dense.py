"""The forward pass once more, without a module: explicit matrices, one example at a time, float64.

An independent derivation of model.py and lora.py for the tests. Every adapted place is one dense
matrix, W + scaling * B A, I + scaling * B A or scaling * B A; attention is a softmax written out;
padding is cut off rather than masked.
"""

import math

import torch

import lora


def effective(model):
    """name -> (dense matrix, bias) of every adaptable place that is there."""
    d = model.config.hidden_size
    found = {}
    for i, block in enumerate(model.layers):
        for place in lora.LINEARS + lora.RESIDUALS + lora.CROSS:
            if place == "gate_proj" and not model.config.gated:
                continue
            module, name = getattr(block, place), f"layers.{i}.{place}"
            adapter = isinstance(module, lora.LoRALayer)
            base = module.base if adapter else module
            bias = getattr(base, "bias", None)
            if place in lora.LINEARS:
                matrix = base.weight.clone()
            else:
                matrix = torch.eye(d, dtype=torch.float64) * (place in lora.RESIDUALS)
            if adapter and (module.enabled or module.when_off == "frozen"):
                b, a = module.lora_B, module.lora_A
                alpha_over_r = module.lora_alpha / a.shape[0]
                if module.when_off == "out":  # the parts that are off are zero
                    mask = torch.tensor([float(k not in module.ranks_off) for k in range(len(a))])
                    b = b * mask
                matrix = matrix + alpha_over_r * torch.einsum("or,ri->oi", b, a)
            found[name] = (matrix, bias)
    return found


def layer_norm(x, norm):
    if isinstance(norm, torch.nn.RMSNorm):
        return x / torch.sqrt((x**2).sum(-1, keepdim=True) / x.shape[-1] + norm.eps) * norm.weight
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def activation(name, x):
    if name == "relu":
        return x * (x > 0)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "silu":
        return x / (1 + torch.exp(-x))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def affine(matrices, name, x):
    matrix, bias = matrices[name]
    return x @ matrix.T + (0 if bias is None else bias)


def frequency(c, i):
    """The angle by which pair i of a head turns from one position to the next."""
    f = c.rope_theta ** (-2 * i / c.head_dim)
    if c.rope_scaling is None:
        return f
    factor, low, high, original = c.rope_scaling
    wavelength = 2 * math.pi / f
    if wavelength < original / high:
        return f
    if wavelength > original / low:
        return f / factor
    share = (original / wavelength - low) / (high - low)
    return (1 - share) * f / factor + share * f


def turned(c, x):
    """Each pair (i, i + half) of a head's numbers as one complex number, times e^(i angle)."""
    half = c.head_dim // 2
    pairs = torch.complex(x[:, :half], x[:, half:])  # (t, half)
    angles = [[p * frequency(c, i) for i in range(half)] for p in range(len(x))]
    pairs = pairs * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
    return torch.cat([pairs.real, pairs.imag], -1)


def attention(c, matrices, block, prefix, x):
    """(t, d) -> (t, d), head by head."""
    t, width = len(x), c.head_dim
    parts = []
    for h in range(c.num_heads):
        own = h * c.num_kv_heads // c.num_heads  # the first heads share the first key and value
        q, k, v = (
            affine(matrices, f"{prefix}.{place}", x)[:, i * width : (i + 1) * width]
            for place, i in (("q_proj", h), ("k_proj", own), ("v_proj", own))
        )
        if c.qk_norm:
            q, k = layer_norm(q, block.q_norm), layer_norm(k, block.k_norm)
        if c.rope_theta is not None:
            q, k = turned(c, q), turned(c, k)
        scores = q @ k.T / math.sqrt(width)  # (t, t)
        if c.causal:
            future = torch.arange(t)[None, :] > torch.arange(t)[:, None]
            scores = scores.masked_fill(future, -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append(weights @ v)
    return affine(matrices, f"{prefix}.out_proj", torch.cat(parts, -1))


def encode(model, x):
    """One example through all blocks: (t, d) -> (t, d)."""
    c, matrices = model.config, effective(model)
    reuse = c.shortcut_norm == "reuse"
    previous_ffn_input = None
    for i, block in enumerate(model.layers):
        p = f"layers.{i}"
        sa_input = x
        h = attention(c, matrices, block, p, layer_norm(x, block.attn_norm) if c.pre_ln else x)
        x = sa_input @ matrices[f"{p}.residual_1"][0].T + h
        if not c.pre_ln:
            x = layer_norm(x, block.attn_norm)
        if block.shortcut_ffn is not None:
            x = x + previous_ffn_input @ matrices[f"{p}.shortcut_ffn"][0].T
            x = layer_norm(x, block.attn_norm) if reuse else x
        ffn_input = x
        h = layer_norm(x, block.ffn_norm) if c.pre_ln else x
        if c.gated:
            gate = activation(c.activation, affine(matrices, f"{p}.gate_proj", h))
            h = gate * affine(matrices, f"{p}.fc1", h)
        else:
            h = activation(c.activation, affine(matrices, f"{p}.fc1", h))
        h = affine(matrices, f"{p}.fc2", h)
        x = ffn_input @ matrices[f"{p}.residual_2"][0].T + h
        if not c.pre_ln:
            x = layer_norm(x, block.ffn_norm)
        if block.shortcut_sa is not None:
            x = x + sa_input @ matrices[f"{p}.shortcut_sa"][0].T
            x = layer_norm(x, block.ffn_norm) if reuse else x
        previous_ffn_input = ffn_input
    return x


def logits(model, batch):
    """(b, num_labels), or a list of (t_i, vocab) for head "lm"."""
    c, result = model.config, []
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids = batch["input_ids"][i, :n]
        x = model.word_embeddings.weight[ids]  # (n, embed_dim)
        if c.embed_dim != c.hidden_size:
            x = x @ model.project_in.weight.T
        if c.rope_theta is None:
            x = x + model.position_embeddings.weight[c.position_offset : c.position_offset + n]
        x = x * c.embed_scale
        if c.type_vocab_size:
            types = batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))[i, :n]
            x = x + model.token_type_embeddings.weight[types]
        if not c.causal:
            x = layer_norm(x, model.embed_norm)
        x = encode(model, x)
        if c.final_norm:
            x = layer_norm(x, model.final_norm)
        if c.embed_dim != c.hidden_size:
            x = x @ model.project_out.weight.T
        if c.head == "lm":
            head = model.word_embeddings if c.tied else model.lm_head
            result.append(x @ head.weight.T)
        elif c.causal:
            result.append(x[-1] @ model.score.weight.T)
        else:
            pooled = torch.tanh(x[0] @ model.pooler.weight.T + model.pooler.bias)
            result.append(pooled @ model.classifier.weight.T + model.classifier.bias)
    return result if c.head == "lm" else torch.stack(result)
