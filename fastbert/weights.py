"""Checkpoint files in and out, and the tables that translate between Hugging Face's names and ours."""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

State = MutableMapping[str, torch.Tensor]

# Buffers that old files carry and nothing needs.
_IGNORED = re.compile(r"(^|\.)(position_ids|embeddings\.token_type_ids)$")


class NameTable:
    """Our module names against Hugging Face's, one row each; `{}` stands for a layer number.

    A row whose right side is a tuple means: concatenate those tensors along axis 0 on the way in, split them on the
    way out. A name without a row is the same on both sides.
    """

    def __init__(self, rows: Mapping[str, str | tuple[str, ...]]) -> None:
        self.rows = {ours: (theirs,) if isinstance(theirs, str) else theirs for ours, theirs in rows.items()}
        self._ours = {ours: self._pattern(ours) for ours in self.rows}
        self._theirs = [
            (self._pattern(name), ours, part) for ours, names in self.rows.items() for part, name in enumerate(names)
        ]

    @staticmethod
    def _pattern(name: str) -> re.Pattern[str]:
        return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + r"\.(weight|bias)")

    def to_hf(self, state: State, prefix: str = "") -> None:
        """Rename and split, in place, the entries below `prefix`; split parts are views."""
        for key in [k for k in state if k.startswith(prefix)]:
            tensor = state.pop(key)
            for ours, pattern in self._ours.items():
                if match := pattern.fullmatch(key, len(prefix)):
                    *layers, kind = match.groups()
                    names = self.rows[ours]
                    for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                        state[f"{prefix}{name.format(*layers)}.{kind}"] = part
                    break
            else:
                state[key] = tensor

    def from_hf(self, state: State, prefix: str = "") -> None:
        """Rename and concatenate, in place, the entries below `prefix`; names that are ours already stay.

        Raises:
            ValueError: some but not all parts of a concatenated tensor are there.
        """
        groups: dict[tuple[str, tuple[str, ...]], dict[int, torch.Tensor]] = {}
        for key in [k for k in state if k.startswith(prefix)]:
            for pattern, ours, part in self._theirs:
                if match := pattern.fullmatch(key, len(prefix)):
                    groups.setdefault((ours, match.groups()), {})[part] = state.pop(key)
                    break
        for (ours, (*layers, kind)), parts in groups.items():
            names = [f"{prefix}{name.format(*layers)}.{kind}" for name in self.rows[ours]]
            if len(parts) < len(names):
                missing = [name for i, name in enumerate(names) if i not in parts]
                raise ValueError(f"missing weight {', '.join(missing)}: the file has only {len(parts)} of {names}")
            tensors = [parts[i] for i in range(len(names))]
            state[f"{prefix}{ours.format(*layers)}.{kind}"] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def speak_hf_names(module: nn.Module, table: NameTable) -> None:
    """Make `state_dict()` and `load_state_dict()` of `module` use Hugging Face's names, wherever it is nested."""

    def to_hf(module: nn.Module, state: State, prefix: str, metadata: Any) -> None:
        table.to_hf(state, prefix)

    def from_hf(module: nn.Module, state: State, prefix: str, *rest: Any) -> None:
        table.from_hf(state, prefix)

    module.register_state_dict_post_hook(to_hf)
    module.register_load_state_dict_pre_hook(from_hf)


def legacy_names(state: State) -> None:
    """Bring names of old files up to date, in place: gamma/beta of layer norms, buffers that nothing needs."""
    for key in list(state):
        if _IGNORED.search(key):
            del state[key]
        elif "LayerNorm" in key and key.endswith((".gamma", ".beta")):
            stem, _, kind = key.rpartition(".")
            state[f"{stem}.{'weight' if kind == 'gamma' else 'bias'}"] = state.pop(key)


def match_names(state: State, expected: Iterable[str], prefix: str) -> tuple[list[str], list[str]]:
    """Add or strip the base model's prefix, in place, so that base files fit head models and the reverse.

    Args:
        state: Hugging Face names to tensors.
        expected: names that the model has.
        prefix: the family's prefix, such as `bert.`.

    Returns:
        (missing, unexpected): names of the model that the file lacks; names of the file that the model lacks.
    """
    wanted = set(expected)
    unexpected = []
    for key in list(state):
        if key in wanted:
            continue
        for candidate in (prefix + key, key.removeprefix(prefix)):
            if candidate in wanted and candidate not in state:
                state[candidate] = state.pop(key)
                break
        else:
            unexpected.append(key)
    return sorted(wanted - set(state)), unexpected


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; the nearest names are ..." for an error message, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f" (nearest: {', '.join(close)})" if close else ""


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder: `model.safetensors`, a sharded index of it, or `pytorch_model.bin`.

    Safetensors are mapped into memory, not copied. A `.bin` file is a pickle: it is read with torch's weights-only
    loader, which refuses code.

    Raises:
        FileNotFoundError: no weight file, or a shard that the index names is missing.
        ValueError: a file that is truncated, corrupt, or holds something other than tensors.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return _load_file(single)
        if index.is_file():
            return _load_sharded(index)
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"{folder} has no model.safetensors and no pytorch_model.bin; it holds {found}")


def _load_sharded(index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map: it is not the index of a sharded checkpoint")
    if strange := [name for name in weight_map.values() if not isinstance(name, str)]:
        raise ValueError(f"{index} says that a shard is named {strange[0]!r:.80}: it must be the name of a file")
    state: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise FileNotFoundError(f"{index} names the shard {name}, which lies outside its folder")
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, which is missing: download the model again")
        state.update(_load_file(shard))
    if missing := sorted(set(weight_map) - set(state)):
        raise ValueError(f"{index} promises {missing[0]} and {len(missing) - 1} more that no shard holds")
    return state


def _load_file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError  # here, as a model without files needs torch alone
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}. Download it again."
            ) from error
    if tuple(int(v) for v in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise ValueError(f"{path} is a pickle: reading it safely needs torch >= 2.10, this is {torch.__version__}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds for foreign bytes
        raise ValueError(f"{path} cannot be read with torch's weights-only loader: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a state dict of tensors")
    return dict(state)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def save_weights(state: Mapping[str, torch.Tensor], folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Write `model.safetensors`, or shards and their index, each file replaced atomically."""
    from huggingface_hub import save_torch_state_dict

    whole = {name: _own_storage(tensor.detach()) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        save_torch_state_dict(whole, scratch, max_shard_size=max_shard_size, metadata={"format": "pt"})
        written = sorted(Path(scratch).iterdir())
        mode = folder.stat().st_mode & 0o666  # safetensors writes private files; a checkpoint is as open as its folder
        for path in written:
            path.chmod(mode)
            os.replace(path, folder / path.name)
    stale = {p.name for p in folder.glob("model*.safetensors*")} - {p.name for p in written}
    for name in stale:
        (folder / name).unlink()


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """A split part is a view of the fused weight: copy it, so that the file holds it alone. Tied tensors stay tied."""
    is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor.contiguous()
