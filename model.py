"""A GPT in plain PyTorch: the next-token model that everything else here builds on.

It is GPT-2, layer for layer and name for name (wte, wpe, h, ln_f, c_attn, c_proj, ...), so that OpenAI's weights
load by name and what is trained here opens in Hugging Face transformers. Two things are added for decoding:

- a static key/value cache: all its memory is there from the start, so every step has the same shapes, which is what
  torch.compile and CUDA graphs want;
- a forward pass that takes a *block* of several tokens per row, each row at its own position, with a mask that says
  which token of the block sees which. Checking several guessed tokens at once is one such pass.

Read it top to bottom: config, cache, attention, block, GPT, GPT-2 weights in and out.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """Something the user gave is wrong. The command line prints the message as one line and exits with status 2."""


@dataclass
class GPTConfig:
    """Shape of a GPT. The defaults are a toy for bytes: 0.9M parameters, trained in minutes on a CPU."""
    block_size: int = 256     # longest sequence, in tokens
    vocab_size: int = 257     # 256 bytes and one end-of-text token
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True         # biases in Linear and LayerNorm, as in GPT-2

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} must be a whole number, at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), not {self.dropout}")


# ---------------------------------------------------------------------------------------------------------------------
# The cache

class KVCache:
    """Keys and values of every layer, for `batch` rows of `slots` tokens each; all of it allocated at once.

    `layers[i]` is one tensor (B * S, 2C): a row per slot, keys in the first C columns and values in the rest, so that
    storing a token is one row copy. It has no third dimension because torch.compile (2.11) only copies a row in place
    where it need not reshape; otherwise it clones the whole layer at every step. Nothing is ever erased: a slot is
    written before a mask first lets anybody see it.
    """

    def __init__(self, n_layer, n_embd, batch, slots, device=None, dtype=None):
        self.slots = slots
        self.layers = [torch.zeros(batch * slots, 2 * n_embd, device=device, dtype=dtype) for _ in range(n_layer)]


def block_mask(position, visible, slots, dtype):
    """What each token of a block may see in the cache, as an additive attention mask (0: seen, -inf: hidden).

    position (B,) int64: slot of each row's first block token; all slots before it hold the row's past.
    visible (N, N) bool: visible[i, j] says that token i of the block sees token j; token j lies in slot position + j.
        A chain is the lower triangle; in a tree, a node sees itself and its ancestors.
    Returns (B, 1, N, slots).
    """
    N = len(visible)
    j = torch.arange(slots, device=position.device) - position[:, None]     # (B, S) index within the block
    in_block = visible[:, j.clamp(0, N - 1)].transpose(0, 1)                # (B, N, S)
    seen = (j < 0)[:, None] | (in_block & ((j >= 0) & (j < N))[:, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -math.inf)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# The network

class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, cache=None, slots=None, mask=None):
        B, T, C = x.shape
        q, kv = self.c_attn(x).split([C, 2 * C], dim=2)                     # (B, T, C), (B, T, 2C)
        if cache is not None:                                               # cache (B*S, 2C), slots (B*T,)
            cache.index_copy_(0, slots, kv.reshape(B * T, 2 * C).to(cache.dtype))
            q, kv = q.to(cache.dtype), cache.view(B, -1, 2 * C)             # from here on S keys instead of T
        k, v = kv.split(C, dim=2)
        q, k, v = (t.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, ., hs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """The position-wise feed-forward layer, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))           # GPT-2's "gelu_new"
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
        """x (B, T, C) -> (B, T, C). With a cache: the layer's (B*S, 2C), the slots (B*T,) of its rows that
        receive these tokens' keys and values, and the mask (B, 1, T, S) from block_mask."""
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
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):                              # two of them add to the stream per layer
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def residual_stream(self, idx, position=None, cache=None, slots=None, mask=None):
        """What stands between the layers: the embeddings and each layer's output, before the final norm.
        -> list of n_layer + 1 tensors (B, T, C); arguments and errors as in hidden_states."""
        if position is None:
            T = idx.shape[1]
            if T > self.config.block_size:
                raise InputError(f"a sequence of {T} tokens is longer than the model's context of "
                                 f"{self.config.block_size}")
            position = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        stream = [F.dropout(x, self.config.dropout, self.training)]
        for i, block in enumerate(self.transformer.h):
            stream.append(block(stream[-1], cache.layers[i] if cache else None, slots, mask))
        return stream

    def hidden_states(self, idx, position=None, cache=None, slots=None, mask=None):
        """The final, normalised hidden states: (B, T) int64 token ids -> (B, T, C).

        Without a cache the T tokens are a whole text from its start. With one they are a block: `position` (B, T) is
        the place of each token in its text, and cache, slots, mask are as in Block.
        Raises InputError when a whole text exceeds block_size.
        """
        return self.transformer.ln_f(self.residual_stream(idx, position, cache, slots, mask)[-1])

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V), and the mean cross-entropy in nats against targets (B, T), or None."""
        logits = self.lm_head(self.hidden_states(idx))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    # -----------------------------------------------------------------------------------------------------------------
    # GPT-2 weights in and out. OpenAI stored some matrices transposed ("Conv1D"), and Hugging Face kept that.

    @classmethod
    def from_pretrained(cls, name_or_path):
        """GPT-2 weights from "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", a folder or a file.

        A name is downloaded once into ~/.cache/multi-token-prediction (or $MTP_CACHE). A folder is what transformers'
        save_pretrained writes: config.json with model.safetensors or pytorch_model.bin. Of a file (.safetensors or
        .bin), config.json is read beside it. Nothing is unpickled but plain tensors.
        Returns the GPT in eval mode; call .train() to train it.
        Raises InputError for anything that is not a GPT-2.
        """
        path = download_gpt2(name_or_path) if str(name_or_path) in GPT2_NAMES else Path(name_or_path)
        if path.is_dir():
            found = [path / f for f in ("model.safetensors", "pytorch_model.bin") if (path / f).exists()]
            if not found:
                split = " in one piece (it is split into several; save it again with a larger max_shard_size)"
                raise InputError(f"{path} holds neither model.safetensors nor pytorch_model.bin"
                                 + split * bool(list(path.glob("*.index.json"))))
            path = found[0]
        if not path.exists():
            raise InputError(f"{path} does not exist; give a folder, a file, or one of {', '.join(GPT2_NAMES)}")
        config = read_gpt2_config(path.parent / "config.json")
        tensors = {k.removeprefix("transformer."): v for k, v in read_tensors(path).items()}
        gpt = cls(config)
        with torch.no_grad():
            for key, p in gpt.state_dict().items():
                key = key.removeprefix("transformer.")
                if key == "lm_head.weight":                                 # tied to wte
                    continue
                if key not in tensors:
                    raise InputError(f"{path} has no tensor {key}: not a GPT-2, or another shape than its config.json")
                t = tensors[key].T if is_conv1d(key) else tensors[key]
                if t.shape != p.shape:
                    raise InputError(f"{path}: {key} has shape {tuple(t.shape)}, its config.json says {tuple(p.shape)}")
                p.copy_(t)
        return gpt.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors so that transformers' GPT2LMHeadModel.from_pretrained opens them."""
        config = self.config
        tensors = {}
        for key, p in self.state_dict().items():
            if key != "lm_head.weight":                                     # tied; transformers ties it again
                tensors[key] = (p.T if is_conv1d(key) else p).detach().cpu().contiguous()
                if not config.bias and "wte" not in key and "wpe" not in key:   # transformers knows GPT-2 with biases
                    tensors[key.replace(".weight", ".bias")] = torch.zeros(p.shape[0], dtype=p.dtype)
        hf_config = dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new",
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, layer_norm_epsilon=1e-5, tie_word_embeddings=True,
            attn_pdrop=config.dropout, embd_pdrop=config.dropout, resid_pdrop=config.dropout,
            bos_token_id=config.vocab_size - 1, eos_token_id=config.vocab_size - 1)
        write_pretrained(folder, tensors, hf_config)


GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def is_conv1d(key):
    """Whether GPT-2's files hold this matrix as (in, out), transposed against nn.Linear."""
    return key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def download_gpt2(name):
    """Fetch config.json and model.safetensors of a GPT-2 size into the cache, unless they are there. -> folder."""
    from data.prepare import CorpusError, download                          # only a download needs it
    import_safetensors()                                                    # fail before the download, not after it
    cache = Path(os.environ.get("MTP_CACHE", Path.home() / ".cache" / "multi-token-prediction")) / name
    for file in ("config.json", "model.safetensors"):
        if not (cache / file).exists():
            try:
                download(f"https://huggingface.co/openai-community/{name}/resolve/main/{file}", cache / file)
            except CorpusError as error:
                raise InputError(f"{error}; or give the folder of a GPT-2 that you have") from None
    return cache


def read_gpt2_config(path):
    """transformers' config.json -> GPTConfig. Raises InputError when it describes something this GPT cannot be."""
    try:
        c = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; it is needed to know the model's shape") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    c = c if isinstance(c, dict) else {}
    expected = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                    scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
    for key, value in expected.items():
        if c.get(key, value) != value or "model_type" not in c:
            raise InputError(f"{path}: {key} is {c.get(key)!r}; only GPT-2 with {key}={value!r} can be loaded")
    try:
        if c.get("n_inner") not in (None, 4 * c["n_embd"]):
            raise InputError(f"{path}: n_inner is {c['n_inner']}; only four times n_embd can be loaded")
        return GPTConfig(block_size=c["n_positions"], vocab_size=c["vocab_size"], n_layer=c["n_layer"],
                         n_head=c["n_head"], n_embd=c["n_embd"], dropout=c.get("resid_pdrop", 0.0))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks a part of a GPT-2's shape, or it is no number: {error}") from None


def read_tensors(path):
    """All tensors of a .safetensors or .bin file, by name. Raises InputError when it is neither or is damaged."""
    load = import_safetensors().load_file if path.suffix == ".safetensors" else (
        lambda p: torch.load(p, map_location="cpu", weights_only=True))     # weights_only: no code is ever unpickled
    try:
        return load(path)
    except Exception as error:                                              # both libraries raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be read as weights (damaged, or not a weights file): {reason}") from None


def write_pretrained(folder, tensors, config):
    """Write tensors {name: tensor} and a config, as model.safetensors and config.json; both are whole before either is
    in place. Raises OSError when that fails."""
    folder, save_file = Path(folder), import_safetensors().save_file
    names = ("model.safetensors", "config.json")
    parts = [folder / f"{name}.part" for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, parts[0], metadata={"format": "pt"})
        parts[1].write_text(json.dumps(config, indent=2) + "\n")
        for name, part in zip(names, parts):
            os.replace(part, folder / name)
    except Exception as error:                                              # safetensors has an error of its own
        for part in parts:
            part.unlink(missing_ok=True)
        raise OSError(f"cannot save the model to {folder}: {error}") from None


def import_safetensors():
    """safetensors is an optional package, only needed for files in Hugging Face's format."""
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("this needs the safetensors package: pip install -e '.[gpt2]'") from None
    return safetensors.torch
