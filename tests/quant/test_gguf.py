from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from farthing.quant.errors import ModelError
from farthing.quant.gguf import _llama3_rope, convert
from tests.checkpoints import CHAT_TEMPLATE, Kind, tiny_checkpoint
from tests.quant.ggufs import write_gguf

Q8 = gguf.GGMLQuantizationType.Q8_0
KINDS: tuple[Kind, ...] = ("llama", "qwen2", "qwen3")


def converted(file: Path) -> Path:
    folder = file.with_suffix("")
    folder.mkdir()
    convert(file, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_unquantised_file_gives_back_the_checkpoint(kind: Kind, tmp_path: Path) -> None:
    source = tiny_checkpoint(kind, tmp_path / "source")
    folder = converted(write_gguf(source, tmp_path / "model.gguf"))
    weights, expected = (load_file(place / "model.safetensors") for place in (folder, source))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        got, wanted = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids).logits
            for place in (folder, source)
        )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_file_gives_what_transformers_reads(kind: Kind, tmp_path: Path) -> None:
    # transformers takes 128 for every qwen3 file, whatever the file says.
    width = {"head_dim": 128} if kind == "qwen3" else {}
    source = tiny_checkpoint(kind, tmp_path / "source", tie_word_embeddings=True, **width)
    file = write_gguf(source, tmp_path / "model.gguf", Q8)
    weights = load_file(converted(file) / "model.safetensors")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    assert set(reference) - set(weights) == {"lm_head.weight"}
    assert all(torch.equal(weights[name], reference[name]) for name in weights)
    assert weights["model.embed_tokens.weight"].dtype == torch.float32


def test_settings_tokeniser_and_template_are_kept(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    file = write_gguf(source, tmp_path / "model.gguf", **{"tokenizer.ggml.eot_token_id": 1})
    folder = converted(file)
    config, expected = (AutoConfig.from_pretrained(place) for place in (folder, source))
    for name in ("rms_norm_eps", "rope_parameters", "head_dim", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(expected, name)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [2, 1]}
    tokenizer, original = (AutoTokenizer.from_pretrained(place) for place in (folder, source))
    text = "<|im_start|>the père 👨‍👩‍👧 in 2024<|im_end|>"
    assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"


def test_digits_are_cut_as_the_named_tokeniser_cuts_them(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    folder = converted(write_gguf(source, tmp_path / "model.gguf", pre="smollm"))
    tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n 42")]
    assert pieces == ["a", "ĊĊĠ", "4", "2"]


def test_yarn_is_kept(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3", tmp_path / "source")
    scaling = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 128,
    }
    config = AutoConfig.from_pretrained(
        converted(write_gguf(source, tmp_path / "model.gguf", **scaling))
    )
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 128


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_are_recognised(factor: float) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", head_dim=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    divisors = (plain / scaled).numpy()
    assert _llama3_rope(Path("x.gguf"), divisors, 500000.0, 128) == pytest.approx(rope)
    with pytest.raises(ModelError, match="factors of its own"):
        _llama3_rope(Path("x.gguf"), np.linspace(1, 8, 64, dtype=np.float32), 500000.0, 128)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "source")
    whole = write_gguf(source, tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"not a whole GGUF file.*again"):
        converted(cut)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"not a model" * 10)
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        converted(junk)
    with pytest.raises(ModelError, match=r"'gpt2', 'tekken'"):
        converted(write_gguf(source, tmp_path / "pre.gguf", pre="tekken"))
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"'mamba'.*llama, qwen2, qwen3"):
        converted(tmp_path / "mamba.gguf")
