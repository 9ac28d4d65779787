"""A GPT in plain PyTorch: the next-token model that everything else here builds on.

It is GPT-2, name for name (wte, wpe, h, ln_f, c_attn, ...), so it opens GPT-2's weights. Two things
are added for decoding: a static KV cache, which gives every step the same shapes, and a mask, with
which one forward pass verifies several draft tokens.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.prepare import InputError, require

GPT2_N_HEAD = {"gpt2": 12, "gpt2-medium": 16, "gpt2-large": 20, "gpt2-xl": 25}
GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out) by OpenAI


@dataclass
class GPTConfig:
    """The shape of a GPT. The default is a toy for bytes: 0.9M parameters, minutes on a CPU."""
    block_size: int = 256  # the context: the longest sequence, in tokens
    vocab_size: int = 257  # 256 bytes and end-of-text
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0

    def __post_init__(self):
        sizes = (self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        require(min(sizes) > 0, f"sizes must be positive: {self}")
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        require(self.n_embd % self.n_head == 0,
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(C, 3 * C)
        self.c_proj = nn.Linear(C, C)

    def forward(self, x, cache=None, slots=None, mask=None):
        B, T, C = x.shape
        q, kv = self.c_attn(x).split([C, 2 * C], dim=2)  # (B, T, C), (B, T, 2C)
        if cache is not None:
            new = kv.reshape(B * T, 2 * C).to(cache.dtype)
            cache.index_copy_(0, slots, new)  # cache (B*S, 2C), slots (B*T,)
            q = q.to(cache.dtype)
            kv = cache.view(B, -1, 2 * C)  # from here on S keys, not T
        k, v = kv.split(C, dim=2)

        def heads(t):  # (B, ., C) -> (B, nh, ., hs)
            return t.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            heads(q), heads(k), heads(v),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """The position-wise feed-forward layer, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.dropout = config.dropout
        self.c_fc = nn.Linear(C, 4 * C)
        self.c_proj = nn.Linear(4 * C, C)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # GPT-2's "gelu_new"
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, slots=None, mask=None):
        """x (B, T, C) -> (B, T, C). When decoding: the layer's cache (B*S, 2C), the rows (B*T,) of
        it to write, b * S + slot, and a mask (B, 1, T, S): which slots each token sees."""
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
            ln_f=nn.LayerNorm(config.n_embd)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two per layer add to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def residual_stream(self, idx, position=None, cache=None, slots=None, mask=None):
        """Token ids (B, T) int64 -> the embeddings and the output of each layer, before the final
        norm: a list of n_layer + 1 tensors (B, T, C). The tokens are a text from its start; with a
        cache, from `empty_cache`, they stand at `position` (B, T), and slots and mask are as in
        Block. Raises InputError if the text is longer than the context."""
        if position is None:
            T = idx.shape[1]
            require(T <= self.config.block_size,
                    f"{T} tokens exceed the model's context of {self.config.block_size}")
            position = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        stream = [F.dropout(x, self.config.dropout, self.training)]
        for i, block in enumerate(self.transformer.h):
            stream.append(block(stream[-1], cache[i] if cache else None, slots, mask))
        return stream

    def hidden_states(self, *args, **kwargs):
        """The last layer's output after the final norm (B, T, C). Takes residual_stream's input."""
        return self.transformer.ln_f(self.residual_stream(*args, **kwargs)[-1])

    def forward(self, idx):
        """idx (B, T) int64 -> logits (B, T, V); [:, t] predicts token t + 1."""
        return self.lm_head(self.hidden_states(idx))

    @classmethod
    def from_pretrained(cls, name_or_path):
        """A GPT in eval mode with the weights of a GPT-2: a folder that transformers wrote, a
        .bin or .safetensors file beside its config.json, or a name in GPT2_N_HEAD (downloaded
        once). What exists here comes first. Raises InputError. Never runs code from a file."""
        try:
            tensors, n_head = read_gpt2(name_or_path)
            tensors = {key.removeprefix("transformer."): t for key, t in tensors.items()}
            vocab_size, n_embd = tensors["wte.weight"].shape
            n_layer = sum(key.endswith("ln_1.weight") for key in tensors)
            block_size = len(tensors["wpe.weight"])
            gpt = cls(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
            for key, p in gpt.transformer.state_dict().items():
                p.copy_(tensors[key].T if key.endswith(TRANSPOSED) else tensors[key])
        except InputError:
            raise
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{name_or_path} holds no GPT-2 with its config.json: {error!r}") from None
        return gpt.eval()


# ---- The cache: keys and values of all layers ------------------------------------------------

def empty_cache(config, n_layer, batch, slots, dtype, device):
    """A list of n_layer tensors (batch * slots, 2C), with a row per slot: key, then value. Nothing
    is ever erased: each slot is written before a mask first reveals it. (If they had three
    dimensions, torch.compile (2.11) would clone them at every step, not write in place.)"""
    shape = (batch * slots, 2 * config.n_embd)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]


def causal_mask(position, slot, dtype):
    """Let a token see the slots up to its own: position (B, N), slot (S,), 0 to S - 1 -> (B, 1, N,
    S) of 0 or -inf. (slot is passed in, or torch.compile would compute the mask in each layer.)"""
    mask = torch.zeros(*position.shape, len(slot), dtype=dtype, device=position.device)
    return mask.masked_fill(slot > position[..., None], -math.inf)[:, None]


# ---- GPT-2's weights, from files of PyTorch or Hugging Face ----------------------------------

def load_tensors(path):
    """The dict in a file of torch.save or safetensors, on the CPU. Never runs code from the file.
    Raises InputError if there is none, or if it is damaged."""
    require(path.is_file(), f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # optional
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError:
        raise InputError(f"{path} needs a package: pip install safetensors") from None
    except Exception as error:  # of many kinds, depending on the damage
        reason = type(error).__name__
        raise InputError(f"{path} is damaged, or no file of tensors ({reason})") from None


def read_gpt2(name_or_path):
    """What GPT.from_pretrained takes -> ({name: tensor}, n_head)."""
    path = Path(name_or_path)
    if name_or_path in GPT2_N_HEAD and not path.exists():
        return download_gpt2(name_or_path), GPT2_N_HEAD[name_or_path]
    if path.is_dir():
        files = [path / "model.safetensors", path / "pytorch_model.bin"]
        path = next(filter(Path.is_file, files), None)
        require(path, f"there is neither {files[0]} nor {files[1].name} (weights in several files "
                "are not supported)")
    tensors = load_tensors(path)
    config = json.loads((path.parent / "config.json").read_text())
    for key, value in dict(model_type="gpt2", activation_function="gelu_new").items():
        require(config[key] == value, f"{path} is not a GPT-2: its {key} is not {value}")
    return tensors, config["n_head"]


def download_gpt2(name):
    """The tensors of a GPT-2, downloaded once into PyTorch's cache -> {name: tensor}."""
    try:
        return torch.hub.load_state_dict_from_url(
            GPT2_URL.format(name), file_name=f"{name}.bin", map_location="cpu", weights_only=True)
    except Exception as error:  # of the network or the disk, or the file was cut short
        Path(torch.hub.get_dir(), "checkpoints", f"{name}.bin").unlink(missing_ok=True)
        raise InputError(f"cannot download {name}: {error}") from None
