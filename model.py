"""One Transformer for BERT, RoBERTa, OPT, GPT-2, LLaMA, Mistral, Qwen2, Qwen3 and Gemma.

The families differ in few places, all of them fields of `Config` that `Block` and `Transformer`
read: where the norm sits (after each sub-layer: BERT, RoBERTa, OPT-350M; before it: all others) and
of what kind it is, where positions come from, who may attend to whom, whether the feed-forward is
gated, and what the head reads. `Block` shows the places that HeteroLoRA (arXiv 2406.14956,
Figure 1) can adapt: six linear layers, a seventh where there is a gate, and four shortcuts.

    name            | symbol  | shape
    x               | x       | (b, t, d)         the residual stream: b examples, t tokens,
                    |         |                   d = hidden_size
    q               | Q       | (b, h, t, d_h)    h = num_heads, d_h = head_dim
    k, v            | K, V    | (b, g, t, d_h)    g = num_kv_heads, each read by h / g heads
    q_proj … fc2    | W       | (out, in)         as nn.Linear stores it
    rotation        | cos, sin| (1 or b, t, d_h / 2) of the angles by which q and k are turned
    read            |         | (b,)              the one position of each example that the
                    |         |                   classification head reads
    cache           | K, V    | a block's keys and values of earlier tokens, generation.KeysValues

What this file does not do: low-rank adapters (lora.py puts them in place of the modules), what a
family's files look like (support/families.py), reading them (support/hf_folder.py), downloading
(support/download.py), choosing tokens (support/generation.py), padding on the left.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from support import download, families, generation, hf_folder, large, seeds

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


# ------------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config:
    """What the model is, in one vocabulary for all families.

    max_positions is the longest sequence in tokens; RoBERTa and OPT keep position_offset unused
    rows in front of their position table. embed_dim differs from hidden_size in OPT-350M alone.
    Fields with a default are those that not every family has, and those not from config.json.
    """

    family: str  # key of families.FAMILIES; the model itself reads the fields below alone
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    max_positions: int
    embed_dim: int
    pad_token_id: int
    layer_norm_eps: float
    activation: str  # key of ACTIVATIONS
    causal: bool  # a token sees itself and those before it, and the head reads the last one
    pre_ln: bool  # the norm before each sub-layer, else after it
    final_norm: bool  # one more norm after the last block
    embed_norm: bool  # norm of the embeddings
    embed_dropout: bool  # dropout of the embeddings
    pooler_in_head: bool = False  # RoBERTa's: dropout before the pooler, and it trains
    position_offset: int = 0
    type_vocab_size: int = 0
    rms_norm: bool = False  # RMSNorm, else LayerNorm
    num_kv_heads: int | None = None  # None = num_heads
    head_dim: int | None = None  # None = hidden_size / num_heads
    qk_norm: bool = False  # RMSNorm of each head of q and k
    bias: str = "all"  # which linear layers of a block have one: all | qkv | none
    gated: bool = False  # a gate_proj in the feed-forward
    rope_theta: float | None = None  # base of the rotary positions; None = a table of positions
    rope_scaling: tuple | None = None  # LLaMA 3's: (factor, low, high, original max_positions)
    embed_scale: float = 1.0  # the word embeddings are multiplied by it
    tied: bool = True  # the language model's head is the embedding
    eos_token_ids: tuple = ()  # generation stops at these
    num_labels: int = 2  # 1 = regression
    head: str = "classification"  # classification | lm
    dropout: float = 0.0
    shortcut_norm: str = "none"  # none | reuse: LayerNorm once more after a cross-layer shortcut
    base_dtype: str = "fp32"  # fp32 | bf16: of the frozen weights, and of what they multiply

    @classmethod
    def from_hf(cls, hf, **overrides):
        """The content of a Hugging Face config.json as a Config.

        Args:
            hf: dict, config.json.
            overrides: fields of Config that the file does not decide: num_labels, head, dropout,
                shortcut_norm, base_dtype.

        Raises:
            ValueError: a family or feature that is not implemented; a size that is missing, or
                contradicts another; or an override out of range.
        """
        return cls(**{**families.config_fields(hf), **overrides})

    def __post_init__(self):
        if self.hidden_size % self.num_heads and not self.head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                "config.json contradicts itself"
            )
        for name, default in (
            ("num_kv_heads", self.num_heads),
            ("head_dim", self.hidden_size // self.num_heads),
        ):
            object.__setattr__(self, name, getattr(self, name) or default)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}: config.json contradicts itself"
            )
        if self.rope_theta and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions need an even one")
        if self.head not in ("classification", "lm"):
            raise ValueError(f"head is {self.head!r}, allowed: 'classification', 'lm'")
        if self.head == "lm" and not self.causal:
            causal = [n for n, f in families.FAMILIES.items() if f.features["causal"]]
            raise ValueError(
                f"head 'lm' needs a causal family ({', '.join(causal)}), got {self.family}"
            )
        if self.num_labels < 1:
            raise ValueError(f"num_labels is {self.num_labels}, allowed: 1 (regression) or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, allowed: 0 <= dropout < 1")
        if self.shortcut_norm not in ("none", "reuse"):
            raise ValueError(f"shortcut_norm is {self.shortcut_norm!r}, allowed: 'none', 'reuse'")


class Output(NamedTuple):
    """logits: (b, num_labels), or (b, t, vocab) for head "lm"; loss: scalar, or None.

    In train mode, with labels, head "lm" computes the logits of the n predicted tokens alone,
    (n, vocab): the loss needs no others, and nothing else in a step is as wide as a vocabulary.
    """

    logits: torch.Tensor
    loss: torch.Tensor | None


# -------------------------------------------------------------------------------------------- block


def refuse_weights(weight):
    """ValueError where the weights cannot be computed with; weight is one of them."""
    if weight.is_meta:
        raise ValueError('the model has no weights (device "meta"): use load_pretrained')
    if weight.dtype == torch.float16:
        raise ValueError(
            "the weights are float16, in which training overflows and losses become NaN: "
            "model.float(), or model.bfloat16()"
        )


def pick(x, read):
    """The read positions only: (b, t, d), (b,) -> (b, 1, d)."""
    return x[torch.arange(len(x), device=x.device), read][:, None]  # (b, 1, d)


def predicted(x, labels):
    """What is predicted: position t predicts token t + 1, where that has a label.

    Args:
        x: (b, t, …), what predicts: the last hidden states, or their logits.
        labels: (b, t), -100 = no label.

    Returns:
        (n, …) of x, and their n labels.
    """
    return x[:, :-1][labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100]


def norm_of(config):
    """A norm of the hidden size, with the weights of a new one: RMSNorm or LayerNorm."""
    kind = nn.RMSNorm if config.rms_norm else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


def rotation(config, positions, x):
    """Cosine and sine of every position's angles: (1 or b, t) -> two of (1 or b, t, d_h / 2).

    In float32 at least, whatever x is in, as the models were trained; then in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(0, config.head_dim, 2, device=x.device).to(wide)  # (d_h / 2,)
    # angle(p, i) = p f_i     f_i = theta^(-2 i / d_h)     RoPE, arXiv 2104.09864, Eq. 15
    frequencies = 1.0 / (config.rope_theta ** (steps / config.head_dim))  # (d_h / 2,)
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        # LLaMA 3.1: f <- (1 - s) f / factor + s f, where s rises from 0 to 1 as the number of turns
        # within the original context, original f / 2 pi, rises from low to high
        turns = original / (2 * math.pi / frequencies)
        s = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - s) * frequencies / factor + s * frequencies
    angles = positions[..., None].to(wide) * frequencies  # (1 or b, t, d_h / 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x, turned):
    """Turn each pair (x_i, x_{i + d_h / 2}) by its angle: half-split, not interleaved as in GGUF.

    Args:
        x: (b, heads, t, d_h). turned: what `rotation` gives, or None: x stays.
    """
    if turned is None:
        return x
    cos, sin = (part[:, None] for part in turned)  # (1 or b, 1, t, d_h / 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    """Self-attention and feed-forward, each with a residual connection.

    The search space of HeteroLoRA, all places: lora.inject puts a LoRALayer in any of them.
    Where nothing was injected, a residual is the identity and a cross-layer shortcut is absent.

    shortcut_sa carries the input of this block's self-attention to the input of the next block's,
    both taken from the residual stream, where a pre-LN block has yet to normalise it.
    The last block has one too: there is no next block, so it feeds what comes after, the final
    norm or the head. shortcut_ffn carries the FFN input of the block before to this block's, so
    block 0, with none before it, has no shortcut_ffn.
    """

    def __init__(self, config):
        super().__init__()
        c, d = config, config.hidden_size
        self.config = c
        bias = c.bias == "all"
        self.q_proj = nn.Linear(d, c.num_heads * c.head_dim, c.bias != "none")
        self.k_proj = nn.Linear(d, c.num_kv_heads * c.head_dim, c.bias != "none")
        self.v_proj = nn.Linear(d, c.num_kv_heads * c.head_dim, c.bias != "none")
        self.out_proj = nn.Linear(c.num_heads * c.head_dim, d, bias)
        self.fc1 = nn.Linear(d, c.ffn_dim, bias)
        self.fc2 = nn.Linear(c.ffn_dim, d, bias)
        self.gate_proj = nn.Linear(d, c.ffn_dim, bias) if c.gated else None
        self.residual_1 = nn.Identity()  # x around self-attention
        self.residual_2 = nn.Identity()  # x around the feed-forward
        self.shortcut_sa = None  # or a LoRALayer over a zero base
        self.shortcut_ffn = None
        self.attn_norm = norm_of(c)
        self.ffn_norm = norm_of(c)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(c.head_dim, c.layer_norm_eps) if c.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, x, previous_ffn_input, key_mask, read=None, turned=None, cache=None):
        """One block. R: a residual, else the identity; S: a cross-layer shortcut, else absent.

        Args:
            x: (b, t, d), the residual stream.
            previous_ffn_input: (b, t, d) from the block before, None in the first.
            key_mask: (b, 1, 1, t), 0 where a key may be attended to, else -inf; None = everywhere.
            read: (b,) positions whose output somebody reads; None = all. Only these are computed:
                keys and values come from all t positions, the rest of the block from one.
            turned: rotation() of the t positions, None where a table has them.
            cache: KeysValues of the tokens before in this block, which these join; its k and v are
                None at first. Afterwards t is 1, and key_mask has a column for every token, old and
                new. None = nothing is kept.

        Returns:
            The residual stream and this block's FFN input, both (b, t, d), or (b, 1, d) with read.
        """
        pre_ln = self.config.pre_ln
        h = self.attn_norm(x) if pre_ln else x
        queries, turns = h, (turned, turned)  # of the queries, of the keys
        if read is not None:
            x, queries = pick(x, read), pick(h, read)  # (b, 1, d)
            if previous_ffn_input is not None:
                previous_ffn_input = pick(previous_ffn_input, read)  # (b, 1, d)
            if turned is not None:
                turns = [pick(part.expand(len(read), -1, -1), read) for part in turned], turned
        sa_input = x

        causal = self.config.causal and read is None and (cache is None or cache.k is None)
        h = self.attention(queries, h, key_mask, causal, turns, cache)
        # pre-LN:  x = R_1 x + SA(LN x) + S_ffn y      y: the FFN input of the block before
        # post-LN: x = LN(R_1 x + SA(x)) + S_ffn y
        x = self.residual_1(sa_input) + self.drop(h)
        x = x if pre_ln else self.attn_norm(x)
        x = self.add_shortcut(x, self.shortcut_ffn, previous_ffn_input, self.attn_norm)
        ffn_input = x

        h = self.feed_forward(self.ffn_norm(x) if pre_ln else x)  # (b, 1 or t, d)
        # pre-LN:  x = R_2 x + FFN(LN x) + S_sa z      z: this block's SA input
        # post-LN: x = LN(R_2 x + FFN(x)) + S_sa z
        x = self.residual_2(ffn_input) + self.drop(h)
        x = x if pre_ln else self.ffn_norm(x)
        x = self.add_shortcut(x, self.shortcut_sa, sa_input, self.ffn_norm)
        return x, ffn_input

    def feed_forward(self, x):
        """(b, 1 or t, d) -> the same, with a gate where the family has one."""
        act = ACTIVATIONS[self.config.activation]
        # FFN(x) = W_fc2 act(W_fc1 x + b) + b, or W_fc2 (act(W_gate x) * W_fc1 x)
        h = self.fc1(x)  # (b, 1 or t, ffn_dim)
        h = act(h) if self.gate_proj is None else act(self.gate_proj(x)) * h
        return self.fc2(h)  # (b, 1 or t, d)

    def attention(self, queries, x, key_mask, causal, turns=(None, None), cache=None):
        """Every head for itself, then side by side: (b, 1 or t, d), (b, t, d) -> (b, 1 or t, d).

        The one query of `read` or beside a cache is an example's last token, or the model is not
        causal: it may see all that is not padding, so causal is False then.
        """
        q, k, v = self.heads(queries, x, turns)
        if cache is not None:
            if cache.k is not None:
                k, v = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2)
            cache.k, cache.v = k, v  # (b, g, tokens so far, d_h)
        mask = None if causal else key_mask  # padding is on the right: causal hides it
        p = self.config.dropout if self.training else 0.0
        # Grouped: each head of k and v stands for several of q, one after the other.
        grouped = self.config.num_kv_heads < self.config.num_heads
        # SA = W_o [softmax(Q K^T / sqrt(d_h) + mask) V for each head]
        h = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal, enable_gqa=grouped
        )
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (b, 1 or t, d)

    def heads(self, queries, x, turns=(None, None)):
        """q (b, h, 1 or t, d_h) of the queries, k and v (b, g, t, d_h) of x."""
        q = rotate(self.q_norm(self.split_heads(self.q_proj(queries))), turns[0])
        k = rotate(self.k_norm(self.split_heads(self.k_proj(x))), turns[1])
        return q, k, self.split_heads(self.v_proj(x))

    def split_heads(self, x):
        """(b, t, heads * d_h) -> (b, heads, t, d_h)."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (b, heads, t, d_h)

    def add_shortcut(self, x, shortcut, source, norm):
        """x + S source. With shortcut_norm "reuse" this is normalised once more, also when out."""
        if shortcut is None:
            return x
        if shortcut.in_forward:
            x = x + shortcut(source)
        return norm(x) if self.config.shortcut_norm == "reuse" else x

    def drop(self, x):
        """Dropout of what a sub-layer adds, in train mode."""
        return F.dropout(x, self.config.dropout, self.training)


# -------------------------------------------------------------------------------------- transformer


@large.in_base_dtype("embed", "encode", "predict")
class Transformer(nn.Module):
    """Embeddings, blocks, head.

    `head` names the parts that are trained for the task, beside the adapters; load_pretrained
    leaves a pooler that came with the checkpoint out of it, but for RoBERTa's.
    """

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = c
        self.word_embeddings = nn.Embedding(c.vocab_size, c.embed_dim)
        if c.rope_theta is None:
            rows = c.max_positions + c.position_offset
            self.position_embeddings = nn.Embedding(rows, c.hidden_size)
        if c.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        if c.embed_norm:
            self.embed_norm = norm_of(c)
        if c.embed_dim != c.hidden_size:
            self.project_in = nn.Linear(c.embed_dim, c.hidden_size, bias=False)
            self.project_out = nn.Linear(c.hidden_size, c.embed_dim, bias=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        if c.final_norm:
            self.final_norm = norm_of(c)
        if c.head == "lm":
            if not c.tied:
                self.lm_head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
            self.head = ()
        elif c.causal:
            self.score = nn.Linear(c.embed_dim, c.num_labels, bias=False)
            self.head = ("score",)
        else:
            self.pooler = nn.Linear(c.hidden_size, c.hidden_size)
            self.classifier = nn.Linear(c.hidden_size, c.num_labels)
            self.head = ("pooler", "classifier")

    def forward(
        self, input_ids, attention_mask, token_type_ids=None, labels=None, inputs_embeds=None
    ):
        """Logits, and the mean loss if there are labels.

        Args:
            input_ids: (b, t) int64; may be None where inputs_embeds is given.
            attention_mask: (b, t), 1 = token, 0 = padding, which must be on the right.
            token_type_ids: (b, t) int64, BERT alone; None = all 0.
            labels: (b,) class ids; (b,) floats with num_labels 1; (b, t) token ids with head "lm",
                -100 where no loss is wanted (the shift by one happens here; in train mode logits
                are then those of the predicted tokens alone, see Output).
            inputs_embeds: (b, t, embed_dim), in place of the word embeddings.

        Returns:
            Output(logits, loss).

        Raises:
            ValueError: a sequence longer than max_positions, padding that is not on the right,
                or weights that cannot be computed with: float16, or on the device "meta".
        """
        refuse_weights(self.word_embeddings.weight)
        mask = attention_mask.bool()  # (b, t)
        if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(
                "attention_mask must be ones, then zeros: this model pads on the right"
            )
        read = mask.new_zeros(len(mask), dtype=torch.long)  # (b,) [CLS] or <s>
        if self.config.causal:
            read = mask.sum(1) - 1 if self.config.head != "lm" else None  # the last real token; all
        x = self.embed(input_ids, token_type_ids, inputs_embeds)
        h = self.encode(x, mask, read)
        if self.config.head == "lm" and labels is not None and self.training:
            h, labels = predicted(h, labels)  # (n, embed_dim), (n,)
        logits = self.predict(h)
        return Output(logits, None if labels is None else self.loss(logits, labels))

    def generate(self, input_ids, max_new_tokens, **how):
        """New tokens after each prompt, (b, n): see support/generation.py for all arguments."""
        return generation.generate(self, input_ids, max_new_tokens, **how)

    def embed(self, input_ids, token_type_ids=None, inputs_embeds=None, positions=None):
        """(b, t) -> (b, t, d), the input of the first block; positions as in `encode`.

        Raises:
            ValueError: t is more than max_positions.
        """
        c = self.config
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        b, t = x.shape[:2]
        if t > c.max_positions:
            raise ValueError(
                f"a sequence has {t} tokens, the model has positions for {c.max_positions}: "
                "truncate it (--max-length)"
            )
        if c.embed_dim != c.hidden_size:
            x = self.project_in(x)  # (b, t, d)
        if c.embed_scale != 1:
            x = x * x.new_tensor(c.embed_scale)  # rounded to the model's dtype
        # x = word + position + type, each a row of its table; rotary positions enter in attention
        if c.rope_theta is None:
            positions = torch.arange(t, device=x.device) if positions is None else positions
            x = x + self.position_embeddings(positions + c.position_offset)
        if c.type_vocab_size:
            types = positions.new_zeros(b, t) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(types)
        x = self.embed_norm(x) if c.embed_norm else x
        return F.dropout(x, c.dropout, self.training) if c.embed_dropout else x

    def encode(self, x, mask, read=None, positions=None, caches=None):
        """All blocks: (b, t, d) -> (b, t, embed_dim), or (b, 1, embed_dim) at the read positions.

        The last block is computed only where the head reads it; every other block everywhere, since
        all tokens are its successor's keys and values. A module with every_token
        (relatives/reslora.py) has to see them in the last block too.

        Args:
            x: (b, t, d). read: (b,), or None.
            mask: (b, t) bool, True = token; beside filled caches (b, tokens so far).
            positions: (b, t) int64, where they are not 0 … t - 1 in every row.
            caches: list of one a block, as in Block.forward.
        """
        key_mask = None
        if not mask.all():  # once, as numbers: attention would make them anew from bool each time
            key_mask = x.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None, :]
        turned = None
        if self.config.rope_theta is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, t)
            turned = rotation(self.config, positions, x)
        ffn_input = None
        for block, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            last = block is self.layers[-1]
            whole = any(getattr(m, "every_token", False) for m in block.children())
            at = read if last and not whole else None
            x, ffn_input = block(x, ffn_input, key_mask, at, turned, cache)
        if read is not None and whole:
            x = pick(x, read)  # (b, 1, d)
        if self.config.final_norm:
            x = self.final_norm(x)
        return self.project_out(x) if self.config.embed_dim != self.config.hidden_size else x

    def predict(self, h):
        """The head: (b, 1, embed_dim) -> (b, num_labels), or (…, embed_dim) -> (…, vocab)."""
        if self.config.head == "lm":
            head = self.word_embeddings if self.config.tied else self.lm_head
            return F.linear(h, head.weight)  # (…, vocab)
        h = h[:, 0]  # (b, embed_dim)
        if self.config.causal:
            return self.score(h)  # (b, num_labels)
        p, training = self.config.dropout, self.training
        if self.config.pooler_in_head:
            h = F.dropout(h, p, training)
        h = torch.tanh(self.pooler(h))  # (b, d)
        return self.classifier(F.dropout(h, p, training))  # (b, num_labels)

    def loss(self, logits, labels):
        """Cross-entropy, mean over examples (over tokens for "lm"); squared error for one label."""
        if self.config.head == "lm":
            logits, labels = (logits, labels) if logits.ndim == 2 else predicted(logits, labels)
        elif self.config.num_labels == 1:
            return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)


# ------------------------------------------------------------------------------------------ loading


def load_pretrained(name, num_labels=2, head="classification", dropout=0.0, seed=0, **overrides):
    """A pretrained model and its tokenizer.

    Args:
        name: "minilm", "smollm2", "smollm2-q4", a folder in Hugging Face layout, a GGUF file, or a
            hub id such as "roberta-base".
        num_labels: int, 1 = regression.
        head: "classification", or "lm" (causal families).
        dropout: float, replaces whatever the checkpoint was pretrained with.
        seed: int, for the parts of the head that the checkpoint lacks: weights are drawn from
            N(0, 0.02^2), biases are 0.
        overrides: other fields of Config, for example shortcut_norm="reuse", base_dtype="bf16".

    Returns:
        (Transformer in float32 and train mode, tokenizers.Tokenizer that encodes pairs as the
        family does). model.fresh names the modules that were drawn; model.head those that are
        trained for the task: the classifier always, a pooler if it is fresh or RoBERTa's. With
        base_dtype "bf16" its frozen weights are in bfloat16 (support/large.py).

    Raises:
        ValueError: a config, tensor or tokenizer that does not fit, all of them listed.
        OSError: nothing to load, or it cannot be downloaded.
    """
    folder = download.model_folder(name)
    hf = hf_folder.read_config(folder)
    config = Config.from_hf(hf, num_labels=num_labels, head=head, dropout=dropout, **overrides)
    tokenizer = hf_folder.load_tokenizer(folder, config.family, config.vocab_size)
    tensors = hf_folder.read_tensors(folder)
    hf_folder.check_sizes(tensors, config)
    with torch.device("meta"):  # every parameter is replaced below: none needs an initial value
        model = Transformer(config)
    state, fresh = hf_folder.convert(tensors, config, model.state_dict(), model.head)
    rng = seeds.generator(seed, "head")
    for module in fresh:
        linear = model.get_submodule(module)
        state[f"{module}.weight"] = torch.empty(linear.weight.shape).normal_(0, 0.02, generator=rng)
        if linear.bias is not None:
            state[f"{module}.bias"] = torch.zeros(linear.bias.shape)
    model.load_state_dict(state, strict=True, assign=True)
    model.fresh = fresh
    if not config.pooler_in_head:  # a pooler that came is part of the backbone
        model.head = tuple(m for m in model.head if m != "pooler" or m in fresh)
    large.cast_base(model, config.base_dtype)
    return model, tokenizer
