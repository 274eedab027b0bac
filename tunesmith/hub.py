"""Models from the Hugging Face Hub and from folders: resolve gives a local folder, read_json a file's content. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith import remote
from tunesmith.errors import UserError, require

TOKENIZER_FILES = (
    "tokenizer*",
    "*.tiktoken",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""What a tokenizer may consist of."""

TOKENIZER_AND_SETTINGS = (*TOKENIZER_FILES, "config.json", "generation_config.json")
"""The same with the two small files that say what goes with it."""

UNUSED_FILES = ("*.bin", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.ot")
"""The same weights in formats that are never read here."""


def tokenizer_home(own: Path, base: Path) -> Path:
    """Where the tokenizer of an adapter in `own` is: one saved with it is preferred to its base's."""
    return own if any((own / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")) else base


def tokenizer_file(folder: Path) -> Path:
    """The file in a folder that defines the tokenizer; the fullest description there is goes first. Raises UserError where there is none."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return folder / "vocab.json"
    if (folder / "tokenizer.model").is_file():
        return folder / "tokenizer.model"
    others = sorted({*folder.glob("*.model"), *folder.glob("*.model.v*"), *folder.glob("*.tiktoken")})
    if len(others) == 1:
        return others[0]
    if others:
        raise UserError(
            f"{folder} holds several tokenizers ({', '.join(p.name for p in others)}): name one of the files"
        )
    if (folder / "original" / "tokenizer.model").is_file():
        return folder / "original" / "tokenizer.model"
    raise UserError(
        f"{folder} holds no tokenizer: there must be tokenizer.json, vocab.json with merges.txt, or a .model or .tiktoken file"
    )


def resolve(
    path_or_id: str | Path,
    what: str = "model",
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] | None = None,
) -> Path:
    """The local folder of a model, tokenizer or adapter: `path_or_id` itself if it exists, else its download from the Hub or a URL's.

    Raises UserError when it is neither, or can't be had (gated, missing, offline).
    """
    name = str(path_or_id)
    if remote.is_remote(name):
        ignored = tuple(ignore_patterns) if ignore_patterns is not None else (*UNUSED_FILES, "resume/*")
        return remote.fetch(name, what, ignored)
    path = follow_latest(Path(path_or_id).expanduser())
    if path.exists():
        return path
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or name.endswith("/"):
        raise UserError(f"there is no folder {name} ({what}), and a Hub id has the form owner/name")
    ignored = tuple(ignore_patterns) if ignore_patterns is not None else (*UNUSED_FILES, "original/*")
    return download(name, what=what, allow_patterns=allow_patterns, ignore_patterns=ignored)


def follow_latest(path: Path) -> Path:
    """The checkpoint that a run's checkpoints/latest names, where `path` is that file; any other path as it is."""
    return path.parent / path.read_text(encoding="utf-8").strip() if path.name == "latest" and path.is_file() else path


def download(
    repo: str,
    *,
    what: str = "model",
    folder: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] | None = None,
) -> Path:
    """Fetch a Hub repository into `folder` (default: the Hub cache) and return where it is; files that are there are not fetched again.

    HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured. Raises UserError with one sentence.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo,
            revision=revision,
            local_dir=None if folder is None else str(folder),
            token=token,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            ignore_patterns=None if ignore_patterns is None else list(ignore_patterns),
        )
    except OSError as error:
        raise UserError(_sentence(error, repo, what, revision)) from error
    except ValueError as error:  # a name that can't be a repository's
        raise UserError(_sentence(error, repo, what, revision)) from error
    return Path(found)


def _sentence(error: Exception, repo: str, what: str, revision: str | None) -> str:
    """What went wrong with a download, and what to do."""
    from huggingface_hub import errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)  # pyright: ignore[reportArgumentType]

    def is_a(*names: str) -> bool:
        classes = tuple(getattr(errors, name) for name in names if hasattr(errors, name))
        return any(isinstance(one, classes) for one in chain)

    statuses = {getattr(getattr(one, "response", None), "status_code", None) for one in chain}
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = "a token (HF_TOKEN, --hf-token, or `hf auth login`)"
    if is_a("GatedRepoError"):
        return f"{repo} ({what}) is gated: accept its terms at {site}/{repo}, and give {token} of the account that did"
    if is_a("RevisionNotFoundError"):
        return f"{repo} ({what}) has no revision {revision}"
    if is_a("RepositoryNotFoundError"):
        return f"there is no repository {repo} ({what}) at {site}, or it is private: check the name; a private one needs {token}"
    if 401 in statuses or 403 in statuses:
        return f"{site} refuses the token for {repo} ({what}): check HF_TOKEN"
    if is_a("HFValidationError"):
        return f"{repo} ({what}) can't be a repository's name: it has the form owner/name"
    if is_a("OfflineModeIsEnabled") or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return f"{repo} ({what}) is not in the Hub cache, and HF_HUB_OFFLINE forbids to fetch it: unset it, or name a folder"
    if any(getattr(one, "errno", None) == 28 for one in chain):
        return (
            f"no space left while fetching {repo} ({what}): free some, or choose another folder (--output-dir, HF_HOME)"
        )
    if status := next((status for status in statuses if status is not None and status >= 400), None):
        return (
            f"{repo} ({what}) can't be fetched: {site} answers with status {status}; check the name, or try again later"
        )
    if is_a("LocalEntryNotFoundError") or _is_connection(chain):
        return f"{repo} ({what}) can't be fetched: {site} does not answer, and the cache has no whole copy; check the network, or name a folder"
    return f"{repo} ({what}) can't be fetched from {site}: {str(chain[0]).splitlines()[0] if str(chain[0]) else type(chain[0]).__name__}"


def _is_connection(chain: list[Exception]) -> bool:
    names = (
        "ConnectError",
        "ConnectionError",
        "ConnectTimeout",
        "ReadTimeout",
        "TimeoutException",
        "Timeout",
        "NetworkError",
        "RemoteProtocolError",
    )
    return any(cls.__name__ in names for one in chain for cls in type(one).__mro__)


def download_from_kaggle(handle: str) -> Path:
    """Fetch a model from Kaggle (owner/model/framework/variation) into kagglehub's cache and return where it is."""
    kagglehub = require("kagglehub", "kaggle", "a download from Kaggle")
    try:
        return Path(kagglehub.model_download(handle))
    except ValueError as error:
        raise UserError(f"{handle} can't be a Kaggle model: it has the form owner/model/framework/variation") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("kagglehub", "requests", "urllib3", "kagglesdk"):
            raise
        raise UserError(
            f"{handle} can't be fetched from Kaggle ({str(error).splitlines()[0]}); "
            "check the name, KAGGLE_USERNAME and KAGGLE_KEY, and accept the model's terms on its page"
        ) from error


def read_weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of an index of weight files. Raises UserError where it is damaged."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: damaged (no weight_map can be read); download it again")
    return weight_map


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where it is missing, damaged or no object."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; is {path.parent} a model folder?") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return content


def fingerprint_folder(folder: Path) -> str:
    """A digest that tells model folders apart without reading them whole: configuration, tensor tables, file sizes, the ends of each file, and of
    each tensor a few kilobytes at its beginning, middle and end."""
    digest = hashlib.sha256()
    for path in sorted(
        [
            *folder.glob("*.safetensors"),
            *folder.glob("*.pth"),
            *folder.glob("*.distcp"),
            *folder.glob("pytorch_model*.bin"),
            folder / "config.json",
        ]
    ):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
            for place in _sampled_places(path):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


_SAMPLE = 4096


def _sampled_places(path: Path) -> list[int]:
    """Where three samples of each tensor of a safetensors file begin; none for another kind of file, or a damaged one."""
    if path.suffix != ".safetensors":
        return []
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, 100_000_000)))
            spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return []
    ends = [(8 + length + start, 8 + length + stop) for start, stop in sorted(map(tuple, spans))]
    return [place for start, stop in ends for place in (start, (start + stop) // 2, max(start, stop - _SAMPLE))]
