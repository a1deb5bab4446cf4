"""llama, qwen2 and qwen3 in 4 bits by our own kernels, beside plain torch on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from farthing.models import load
from farthing.models.decoder import Decoder
from farthing.models.decoder_weights import DecoderConfig
from farthing.models.load import load_model
from farthing.quant.errors import ModelError
from farthing.quant.four_bit import read_weight
from farthing.quant.headers import read_headers
from farthing.quant.kernels.nf4 import NF4Weight
from farthing.quant.precision import Held, weight_bytes
from tests.checkpoints import tiny_checkpoint
from tests.models.steps import Sequence, Session

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PROMPTS = [list(range(5, 40)), [7], list(range(60, 200))]
STEPS = 6
SHAPE = {"hidden_size": 128, "intermediate_size": 192}
MODELS = {
    "llama": {"attention_bias": True, "num_key_value_heads": 1},
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}
FORMS: dict[str, tuple[Held, bool]] = {
    "nf4": ("nf4", False),
    "nf4 double": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4 double": ("fp4", True),
}

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_checkpoint(request.param, folder, **SHAPE | MODELS[request.param])
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FORMS)
def stored(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Held, Path]:
    """The checkpoint as bitsandbytes quantised it and transformers saved it."""
    quant_type, double = FORMS[request.param]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double
    )
    saved = tmp_path_factory.mktemp("stored")
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    ).save_pretrained(saved)
    return quant_type, saved


def read(folder: Path) -> tuple[DecoderConfig, State]:
    settings = json.loads((folder / "config.json").read_text())
    return DecoderConfig.from_json(settings), load_file(folder / "model.safetensors")


def plain(folder: Path, weight: Callable[[State, str], NF4Weight], dtype: torch.dtype) -> Decoder:
    """The model in plain torch, its projections what their 4-bit weights stand for."""
    config, state = read(folder)
    projections = {
        name: weight(state, name).dequantise(torch.float32) for name, _ in config.projections()
    }
    dense = {name: tensor for name, tensor in state.items() if ".weight." not in name}
    return Decoder(config, dense | projections, "none", CPU, dtype)


def quantised_here(state: State, name: str) -> NF4Weight:
    return NF4Weight.from_dense(state[name])


def as_stored(state: State, name: str) -> NF4Weight:
    return read_weight(state, name, CPU)


def greedy(model: Decoder, forced: list[list[int]] | None = None) -> tuple[list[list[int]], State]:
    """Prompts, then decode steps of all together: the tokens of each step, and all logits.

    The model's own greedy tokens are taken, or those forced on it.
    """
    session, sequences = Session(model), [Sequence() for _ in PROMPTS]
    chunks, tokens, logits = PROMPTS, [], {}
    for step in range(STEPS):
        rows = session.run(list(zip(sequences, chunks, strict=True)))
        logits[f"step {step}"] = torch.cat(rows).cpu()
        tokens.append([int(row[-1].argmax()) for row in rows])
        chunks = [[token] for token in (forced or tokens)[step]]
    return tokens, logits


def distance(got: State, want: State) -> float:
    """The largest relative error of any step's logits."""
    return max(float((got[step] - want[step]).norm() / want[step].norm()) for step in want)


def check_on_a_cpu(model: Decoder, reference: Decoder) -> None:
    tokens, want = greedy(reference)
    got_tokens, got = greedy(model)
    assert got_tokens == tokens
    assert distance(got, want) < 1e-4


def test_a_16_bit_checkpoint_is_quantised_at_load(folder: Path) -> None:
    model = Decoder.from_folder(folder, "nf4")
    check_on_a_cpu(model, plain(folder, quantised_here, torch.float32))
    assert model.spec.precision == "nf4"


def test_a_prequantised_checkpoint_is_taken_as_it_is(stored: tuple[Held, Path]) -> None:
    precision, folder = stored
    model = Decoder.from_folder(folder, precision)
    check_on_a_cpu(model, plain(folder, as_stored, torch.float32))
    assert model.spec.precision == precision


def test_the_estimate_is_what_the_weights_take(folder: Path, stored: tuple[Held, Path]) -> None:
    precision, prequantised = stored
    for source, held in [(folder, "nf4"), (prequantised, precision)]:
        spec = Decoder.from_folder(source, held, CPU, torch.bfloat16).spec
        quantised_to = "nf4" if source == folder else "none"
        estimate = weight_bytes(read_headers(source), quantised_to, torch.bfloat16)
        # Tiny weights are padded to whole blocks, and have a table and a text of settings each.
        assert estimate == pytest.approx(spec.weight_bytes, rel=0.1)


def check_on_a_gpu(model: Decoder, folder: Path, weight: Callable[[State, str], NF4Weight]) -> None:
    """Its distance to float32 is that of bfloat16, in which it computes."""
    tokens, exact = greedy(plain(folder, weight, torch.float32))
    _, rounded = greedy(plain(folder, weight, torch.bfloat16), forced=tokens)
    _, got = greedy(model, forced=tokens)
    assert distance(got, exact) < 1.5 * distance(rounded, exact) < 0.1


@gpu
def test_a_16_bit_checkpoint_on_a_gpu(folder: Path) -> None:
    model = load_model(folder, "nf4", GPU, torch.bfloat16)
    assert isinstance(model, Decoder)
    assert model.spec.precision == "nf4"
    check_on_a_gpu(model, folder, quantised_here)


@gpu
def test_a_prequantised_checkpoint_on_a_gpu(stored: tuple[Held, Path]) -> None:
    precision, folder = stored
    model = load_model(folder, "auto", GPU, torch.bfloat16)
    assert isinstance(model, Decoder)
    assert model.spec.precision == precision
    check_on_a_gpu(model, folder, as_stored)


@gpu
def test_16_bit_weights_are_on_the_gpu_one_at_a_time(tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        "llama", tmp_path, hidden_size=1024, intermediate_size=2048, num_hidden_layers=12
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(folder, "nf4", GPU, torch.bfloat16)
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    dense = weight_bytes(read_headers(folder), "none", torch.bfloat16)
    assert held == pytest.approx(model.spec.weight_bytes, rel=0.05)
    assert peak < 0.75 * dense


@pytest.fixture
def graphics_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of one as is looked at before weights are loaded."""
    monkeypatch.setattr(load, "free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))


def refusal(folder: Path, device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16) -> str:
    quantised = "quantization_config" in json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError) as raised:
        load_model(folder, "auto" if quantised else "nf4", device, dtype, "lean")
    return str(raised.value)


@pytest.mark.usefixtures("graphics_card")
def test_what_the_kernels_do_not_compute_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = tiny_checkpoint("llama", tmp_path / "fitting", **SHAPE)
    assert "nf4 weights on cpu go through bitsandbytes" in refusal(fitting, CPU)
    assert "compute in bf16, not in fp16" in refusal(fitting, dtype=torch.float16)
    ragged = tiny_checkpoint("llama", tmp_path / "ragged", intermediate_size=96)
    assert "inputs that 64 divides, and model.layers.0.mlp.down_proj.weight has 96" in refusal(
        ragged
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0 or later, and cuda:0 has 7.5" in refusal(fitting)


@pytest.mark.usefixtures("graphics_card")
def test_a_checkpoint_that_is_partly_in_4_bits_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path, **SHAPE)
    config = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"]
    )
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    ).save_pretrained(folder)
    assert "not exactly its layers' projections" in refusal(folder)


def test_a_damaged_4_bit_weight_is_named(stored: tuple[Held, Path], tmp_path: Path) -> None:
    precision, folder = stored
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    del state[f"{name}.quant_map"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} is not as bitsandbytes stores it.*again"):
        Decoder.from_folder(tmp_path, precision)
