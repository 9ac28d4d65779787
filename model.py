"""A GPT in plain PyTorch: the next-token model that everything else here builds on.

It is GPT-2, name for name (wte, wpe, h, ln_f, c_attn, ...): it opens what transformers writes, and
the other way round. For decoding it has a static KV cache, which gives all steps the same shapes,
and a block mask, with which one forward pass verifies several draft tokens.
"""
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn as nn
import torch.nn.functional as F

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# In files of transformers: what config.json says of this GPT, and the matrices stored transposed
GPT2_CONFIG = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
                   scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                   tie_word_embeddings=True)
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class InputError(ValueError):
    """A user's mistake. The command lines print it as one line and exit with status 2."""


def require(condition, message):
    """Raise InputError unless the condition holds."""
    if not condition:
        raise InputError(message)


@dataclass
class GPTConfig:
    """The shape of a GPT. The default is a toy for bytes: 0.9M parameters, minutes on a CPU."""
    block_size: int = 256  # longest sequence, in tokens
    vocab_size: int = 257  # 256 bytes, one end-of-text
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm

    def __post_init__(self):
        sizes = (self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        if not all(isinstance(n, int) and n > 0 for n in sizes) or not 0 <= self.dropout < 1:
            raise InputError(f"sizes must be positive integers, dropout in [0, 1): {self}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.c_attn = nn.Linear(C, 3 * C, config.bias)
        self.c_proj = nn.Linear(C, C, config.bias)

    def forward(self, x, cache=None, slots=None, mask=None):
        B, T, C = x.shape
        q, kv = self.c_attn(x).split([C, 2 * C], dim=2)  # (B, T, C), (B, T, 2C)
        if cache is not None:  # cache (B*S, 2C), slots (B*T,)
            cache.index_copy_(0, slots, kv.reshape(B * T, 2 * C).to(cache.dtype))
            q, kv = q.to(cache.dtype), cache.view(B, -1, 2 * C)  # from here on S keys, not T
        k, v = kv.split(C, dim=2)
        nh, hs = self.n_head, C // self.n_head
        q, k, v = (t.view(B, -1, nh, hs).transpose(1, 2) for t in (q, k, v))  # (B, nh, T or S, hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """The position-wise feed-forward layer, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        C, self.dropout = config.n_embd, config.dropout
        self.c_fc = nn.Linear(C, 4 * C, config.bias)
        self.c_proj = nn.Linear(4 * C, C, config.bias)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's "gelu_new"
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, slots=None, mask=None):
        """x (B, T, C) -> (B, T, C). With the layer's cache (B*S, 2C): the slots (B*T,), its rows
        that receive the keys and values, and a mask (B, 1, T, S) from block_mask."""
        x = x + self.attn(self.ln_1(x), cache, slots, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. `lm_head`, the unembedding, shares its weight with the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two per layer add to the stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def residual_stream(self, idx, position=None, cache=None, slots=None, mask=None):
        """The embeddings and the output of each layer, before the final norm: n_layer + 1 tensors
        (B, T, C) in a list. The arguments are those of hidden_states."""
        if position is None:
            T, context = idx.shape[1], self.config.block_size
            require(T <= context, f"{T} tokens exceed the model's context of {context}")
            position = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        stream = [F.dropout(x, self.config.dropout, self.training)]
        for i, block in enumerate(self.transformer.h):
            stream.append(block(stream[-1], cache.layers[i] if cache else None, slots, mask))
        return stream

    def hidden_states(self, idx, position=None, cache=None, slots=None, mask=None):
        """The hidden states after the final norm: token ids (B, T) int64 -> (B, T, C).

        Without a cache, the tokens are a text from its start. Raises InputError if it is too long.
        With a KVCache, they are a block at `position` (B, T); slots and mask are as in Block."""
        return self.transformer.ln_f(self.residual_stream(idx, position, cache, slots, mask)[-1])

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V), and the mean cross-entropy in nats for targets (B, T)"""
        logits, loss = self.lm_head(self.hidden_states(idx)), None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @classmethod
    def from_pretrained(cls, name_or_path):
        """A GPT in eval mode with the weights of a GPT-2: one of GPT2_NAMES (downloaded once), a
        folder that transformers wrote, or a .safetensors or .bin file beside its config.json.
        Raises InputError for anything else. Never runs code from a file."""
        path = Path(name_or_path)
        if str(path) in GPT2_NAMES:
            path = download_gpt2(str(path))
        for file in (path / "pytorch_model.bin", path / "model.safetensors"):
            path = file if file.exists() else path
        tensors, gpt = load_tensors(path), cls(read_config(path.parent / "config.json"))
        for key, p in gpt.transformer.state_dict().items():
            t = tensors.get(f"transformer.{key}", tensors.get(key, torch.empty(0, 0)))
            t = t.T if key.endswith(CONV1D) else t
            if t.shape != p.shape:
                raise InputError(f"{path}: config.json asks for {key} of shape {tuple(p.shape)}")
            p.copy_(t)
        return gpt.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel opens."""
        c, tensors = self.config, {}
        for key, p in self.transformer.state_dict(prefix="transformer.").items():
            tensors[key] = (p.T if key.endswith(CONV1D) else p).cpu().contiguous()
            if not c.bias and "wte" not in key and "wpe" not in key:  # transformers expects biases
                tensors[key.replace(".weight", ".bias")] = torch.zeros(len(p), dtype=p.dtype)
        write_pretrained(folder, tensors, GPT2_CONFIG | dict(
            architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.block_size,
            n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            attn_pdrop=c.dropout, embd_pdrop=c.dropout, resid_pdrop=c.dropout,
            bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1))


class KVCache:
    """The keys and values of every layer, for `batch` rows of `slots` tokens each.

    `layers[i]` (B*S, 2C) has a row per slot: key, then value. If it had three dimensions, then
    torch.compile (2.11) would clone it at every step instead of copying rows in place. Nothing is
    ever erased: each slot is written before a mask first reveals it."""

    def __init__(self, n_layer, n_embd, batch, slots, device=None, dtype=None):
        self.slots = slots
        self.layers = [torch.zeros(batch * slots, 2 * n_embd, device=device, dtype=dtype)
                       for _ in range(n_layer)]


def block_mask(position, visible, slots, dtype):
    """What each token of a block sees in the cache: an additive mask (B, 1, N, slots), 0 or -inf.

    position (B,): the slot of each row's first block token. Its past is in the slots before.
    visible (N, N) bool: whether token i of the block sees token j, in slot position + j. A token
        of a chain sees itself and those before it, a node of a tree itself and its ancestors."""
    N = len(visible)
    j = torch.arange(slots, device=position.device) - position[:, None]  # (B, S) index in block
    in_block = visible[:, j.clamp(0, N - 1)].transpose(0, 1)  # (B, N, S)
    seen = (j < 0)[:, None] | (in_block & ((j >= 0) & (j < N))[:, None])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, -math.inf)[:, None]


# ----------------------------------------------------------------------------------------------
# Files of weights, in the formats of Hugging Face and PyTorch

def download_gpt2(name):
    """Download a GPT-2 into the folder $MTP_CACHE/NAME, unless it is there. Returns the folder."""
    import_safetensors()  # if it is missing, fail before the download
    cache = Path(os.environ.get("MTP_CACHE", "~/.cache/multi-token-prediction")).expanduser()
    for file, read in (("config.json", read_config), ("model.safetensors", load_tensors)):
        url = f"https://huggingface.co/openai-community/{name}/resolve/main/{file}"
        path = cache / name / file
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
                read(path)  # torch.hub accepts a transfer that was cut short
        except Exception as error:
            path.unlink(missing_ok=True)
            raise InputError(f"cannot download {url}: {error}") from None
    return cache / name


def read_config(path):
    """transformers' config.json -> GPTConfig. Raises InputError if this GPT is not that model."""
    try:
        c = {"model_type": "missing"} | json.loads(path.read_text())
        for key, value in (GPT2_CONFIG | {"n_inner": 4 * c["n_embd"]}).items():
            if c.get(key) not in (None, value):
                raise ValueError(f"{key} is {c[key]!r}, not {value!r}")
        return GPTConfig(c["n_positions"], c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"],
                         c.get("resid_pdrop", 0.0))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not the config.json of a GPT-2: {error!r}") from None


def load_tensors(path, what="a file of weights or a folder with model.safetensors"):
    """The dict in a file of safetensors or torch.save, on the CPU. Never runs code from the file.
    Raises InputError, which says that `path` is not `what`."""
    safe = import_safetensors() if Path(path).suffix == ".safetensors" else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns before it refuses a file
            if safe:
                return safe.load_file(path)
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = type(error).__name__
        raise InputError(f"{path} is not {what}, or it is damaged ({reason})") from None


def write_pretrained(folder, tensors, config):
    """Write {name: tensor} to model.safetensors and `config` to config.json, both complete before
    either is in place. Raises OSError."""
    safe = import_safetensors()
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryDirectory(dir=folder) as new:
            safe.save_file(tensors, f"{new}/model.safetensors", metadata={"format": "pt"})
            Path(new, "config.json").write_text(json.dumps(config, indent=2) + "\n")
            for file in os.listdir(new):
                os.replace(f"{new}/{file}", f"{folder}/{file}")
    except Exception as error:  # OSError, or safetensors' own
        raise OSError(f"cannot save the model to {folder}: {error}") from None


def import_safetensors():
    """safetensors.torch. Raises InputError if safetensors, an optional package, is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("this needs the safetensors package: pip install -e '.[gpt2]'") from None
    return safetensors.torch
