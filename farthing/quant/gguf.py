"""GGUF files become model folders, once.

Weights are dequantised a tensor at a time, so that memory stays small; torch is not needed. The
keys read are those of the GGUF specification (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as split
from tokenizers.pre_tokenizers import PreTokenizer

from farthing.quant.errors import ModelError

# float32 holds a dequantised value exactly; larger models take float16, which their quantisation
# error exceeds a hundredfold.
_EXACT_BYTES = 4 << 30

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# How the tokeniser named by tokenizer.ggml.pre cuts text before merging: the models' own regexes.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"qwen2": _WORDS % "", "deepseek-r1-qwen": _WORDS % "", "llama-bpe": _WORDS % "{1,3}"}
_CONTROL, _USER_DEFINED = 3, 4


def convert(file: Path, folder: Path) -> None:
    """Write the file's weights, settings and tokeniser into an existing folder.

    Raises ModelError where the file is damaged or holds what cannot be converted rightly.
    """
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, OverflowError) as error:
        raise ModelError(f"{file} is not a whole GGUF file ({error}). Download it again") from None
    metadata = _Metadata(file, reader)
    config = _config(metadata, {tensor.name: tensor for tensor in reader.tensors})
    tokenizer, tokenizer_config = _tokenizer(metadata)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(metadata))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_weights(folder / "model.safetensors", metadata, reader.tensors)


class _Metadata:
    """The file's key-value pairs; those of the architecture without its prefix."""

    def __init__(self, file: Path, reader: gguf.GGUFReader) -> None:
        self.file = file
        self._fields = reader.fields
        self.architecture: str = self["general.architecture"]
        if self.architecture not in _CLASSES:
            raise ModelError(
                f"{file} is a GGUF file of architecture {self.architecture!r}, which is not "
                f"supported. Use one of {', '.join(_CLASSES)}, or the model's safetensors weights"
            )

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.file} lacks {key!r}. Use another conversion of the model")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture; it must be there unless a default is given."""
        name = f"{self.architecture}.{key}"
        return self[name] if default is None else self.get(name, default)

    def token(self, name: str) -> str | None:
        """The text of a special token such as "bos"."""
        index = self.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else self["tokenizer.ggml.tokens"][index]


def _config(metadata: _Metadata, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    hidden, heads = metadata.own("embedding_length"), metadata.own("attention.head_count")
    head_dim = metadata.own("attention.key_length", hidden // heads)
    return {
        "architectures": [_CLASSES[metadata.architecture]],
        "model_type": metadata.architecture,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": metadata.own("feed_forward_length"),
        "num_hidden_layers": metadata.own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.own("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.own("context_length"),
        "rms_norm_eps": _shortest(metadata.own("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(metadata, tensors, head_dim),
        "attention_bias": metadata.architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _shortest(value: float) -> float:
    """The decimal that was meant by a value stored in float32: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope(
    metadata: _Metadata, tensors: dict[str, gguf.ReaderTensor], head_dim: int
) -> dict[str, Any]:
    theta = metadata.own("rope.freq_base", 10000.0)
    if _ROPE_FACTORS in tensors:
        return _llama3_rope(metadata.file, tensors[_ROPE_FACTORS].data, theta, head_dim)
    kind = metadata.own("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"{metadata.file} scales its positions by {kind!r}, which is not supported. "
            "Use the model's safetensors weights"
        )
    rope = {"rope_type": kind, "rope_theta": theta, "factor": metadata.own("rope.scaling.factor")}
    if kind == "yarn":
        length = metadata.own("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = length
    return rope


def _llama3_rope(
    file: Path, stored: NDArray[np.float32], theta: float, head_dim: int
) -> dict[str, Any]:
    """The settings of Llama 3's scaling from the divisors of each frequency that GGUF stores.

    The largest divisor is the factor; the other three settings are the same in every release.
    """
    factor, low, high, length = float(stored.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / (smooth + (1 - smooth) / factor)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ModelError(
            f"{file} scales its positions by factors of its own ({_ROPE_FACTORS}), which is not "
            "supported. Use the model's safetensors weights"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _generation_config(metadata: _Metadata) -> dict[str, Any]:
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
    }


def _tokenizer(metadata: _Metadata) -> tuple[Tokenizer, dict[str, Any]]:
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    pre_tokenizer = _pre_tokenizer(pre)
    if kind != "gpt2" or pre_tokenizer is None:
        raise ModelError(
            f"{metadata.file} has a tokeniser of kind {kind!r}, {pre!r}, which is not supported. "
            "Use the model's safetensors weights"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=pre == "llama-bpe",
    )
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=token_type == _CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config = {f"{name}_token": metadata.token(key) for key, name in names.items()}
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos = config["bos_token"]
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    return tokenizer, {
        **config,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _pre_tokenizer(pre: str) -> PreTokenizer | None:
    words = split.ByteLevel(add_prefix_space=False)
    if pre in ("default", "gpt-2"):
        return words
    if pre == "smollm":
        return split.Sequence([split.Digits(individual_digits=True), words])
    if pre in _SPLITS:
        whole = split.ByteLevel(add_prefix_space=False, use_regex=False)
        return split.Sequence([split.Split(Regex(_SPLITS[pre]), "isolated"), whole])
    return None


def _write_weights(file: Path, metadata: _Metadata, tensors: list[gguf.ReaderTensor]) -> None:
    """A safetensors file: the header's length, the header in JSON, the tensors."""
    weights = [tensor for tensor in tensors if tensor.name != _ROPE_FACTORS]
    count = sum(int(tensor.n_elements) for tensor in weights)
    dtype, name = (np.float32, "F32") if 4 * count <= _EXACT_BYTES else (np.float16, "F16")
    header: dict[str, Any] = {}
    offset = 0
    for tensor in weights:
        end = offset + int(tensor.n_elements) * np.dtype(dtype).itemsize
        shape = [int(size) for size in reversed(tensor.shape)]
        header[_weight_name(metadata.file, tensor.name)] = {
            "dtype": name,
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        console = Console(stderr=True)
        for tensor in track(weights, f"Unpacking {metadata.file.name}", console=console):
            stream.write(_dequantise(metadata, tensor).astype(dtype).tobytes())


def _weight_name(file: Path, name: str) -> str:
    module, _, kind = name.rpartition(".")
    prefix = ""
    if module.startswith("blk."):
        _, layer, module = module.split(".", 2)
        prefix = f"model.layers.{layer}."
    if module not in _MODULES:
        raise ModelError(
            f"{file} holds a tensor {name!r} that is not supported. "
            "Use the model's safetensors weights"
        )
    return f"{prefix}{_MODULES[module]}.{kind}"


def _dequantise(metadata: _Metadata, tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    try:
        weight: NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ModelError(
            f"{metadata.file} holds {tensor.tensor_type.name} weights, which are not supported. "
            "Use another quantisation of the model, such as Q4_K_M or Q8_0"
        ) from None
    module = tensor.name.split(".")[-2]
    if metadata.architecture == "llama" and module in ("attn_q", "attn_k"):
        heads = metadata.own("attention.head_count")
        if module == "attn_k":
            heads = metadata.own("attention.head_count_kv", heads)
        return _half_rotated(weight, heads)
    return weight


def _half_rotated(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a head from GGUF's order for llama, where the pairs that rotate together are
    neighbours, to transformers', where they stand half a head apart."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
