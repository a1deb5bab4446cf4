from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from farthing.models.hf import ATTENTION, HFModel
from farthing.models.load import ARCHITECTURES, check_architecture
from farthing.quant.errors import ModelError
from tests.checkpoints import KINDS, Kind, tiny_checkpoint
from tests.models.steps import DEVICES, Sequence, Session

VOCABULARY = 266


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(folder: Path, device: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


@pytest.fixture(scope="module")
def model(folder: Path, device: str) -> HFModel:
    module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ATTENTION
    )
    return HFModel(module.to(device), "fp32")


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def expected_logits(plain: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return plain(input_ids=torch.tensor([tokens], device=plain.device)).logits[0]


every_kind = pytest.mark.parametrize("folder", KINDS, indirect=True, scope="module")


@every_kind
def test_whole_chunked_and_stepwise_prefill_give_plain_logits(
    model: HFModel, plain: PreTrainedModel
) -> None:
    """One step holds a whole prompt, a chunk of another and single tokens of a third."""
    texts = prompts([21, 30, 9, 5])
    expected = [expected_logits(plain, text) for text in texts]
    whole, chunked, stepwise, late = (Sequence() for _ in texts)
    session = Session(model)
    got: dict[Sequence, list[torch.Tensor]] = {s: [] for s in (whole, chunked, stepwise, late)}
    schedule = [
        [(whole, texts[0]), (chunked, texts[1][:11]), (stepwise, texts[2][:1])],
        [(stepwise, texts[2][1:2]), (chunked, texts[1][11:12])],
        [(chunked, texts[1][12:]), (stepwise, texts[2][2:3]), (late, texts[3][:4])],
        [(late, texts[3][4:]), (stepwise, texts[2][3:4])],
        *([(stepwise, [token])] for token in texts[2][4:]),
    ]
    for chunks in schedule:
        for (sequence, _), logits in zip(chunks, session.run(chunks), strict=True):
            got[sequence].append(logits)
    for parts, reference in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), reference, atol=1e-4, rtol=1e-4)


@every_kind
def test_batched_greedy_tokens_equal_generate(model: HFModel, plain: PreTrainedModel) -> None:
    texts = prompts([17, 3, 8])
    wanted = [
        plain.generate(
            torch.tensor([text], device=plain.device),
            attention_mask=torch.ones(1, len(text), device=plain.device),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(text) :].tolist()
        for text in texts
    ]
    sequences = [Sequence() for _ in texts]
    session = Session(model)
    chunks = list(zip(sequences, texts, strict=True))
    drawn: list[list[int]] = [[] for _ in texts]
    for _ in range(12):
        tokens = [int(logits[-1].argmax()) for logits in session.run(chunks)]
        for tokens_so_far, token in zip(drawn, tokens, strict=True):
            tokens_so_far.append(token)
        chunks = [(s, [token]) for s, token in zip(sequences, tokens, strict=True)]
    assert drawn == wanted


@every_kind
def test_spec_agrees_with_the_checkpoint(
    model: HFModel, plain: PreTrainedModel, request: pytest.FixtureRequest
) -> None:
    kind: Kind = request.node.callspec.params["folder"]
    spec = model.spec
    assert spec.model_type == kind
    assert spec.weight_bytes == 4 * plain.num_parameters()
    assert (spec.num_layers, spec.vocab_size, spec.max_position) == (2, VOCABULARY, 512)
    if kind.startswith("deepseek"):
        assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == (4, 16, 12)
        assert spec.kv_bytes_per_token == 2 * 4 * (16 + 12) * 4


def test_every_supported_architecture_is_proven() -> None:
    assert set(KINDS) == ARCHITECTURES


@pytest.mark.parametrize("kind", ["deepseek_v32", "bert", "mamba", "gpt2"])
def test_another_architecture_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ModelError, match=rf"'{kind}' is not supported.*deepseek_v2.*qwen3"):
        check_architecture({"model_type": kind})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_rope_that_follows_the_batch_is_refused(rope: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"'dynamic'.*another"):
        check_architecture({"model_type": "llama"} | rope)


def test_a_window_in_some_layers(tmp_path: Path) -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    folder = tiny_checkpoint("qwen2", tmp_path, **windowed)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ATTENTION
    )
    assert module.config.layer_types == ["full_attention", "sliding_attention"]
    session, sequence, (text,) = Session(HFModel(module, "fp32")), Sequence(), prompts([25])
    parts = [session.run([(sequence, chunk)])[0] for chunk in (text[:13], text[13:24], text[24:])]
    expected = expected_logits(plain, text)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=1e-4)
