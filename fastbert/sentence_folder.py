"""A sentence-transformers folder in and out: `modules.json` and the files it names, in old and new spellings.

It knows the file formats and the modules after pooling; it loads neither the encoder nor the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastbert.ops import l2_normalize
from fastbert.pooling import Pooling
from fastbert.typed import field, is_a
from fastbert.weights import load_weights, read_json, save_weights

CONFIG_NAME = "config_sentence_transformers.json"
TRANSFORMER_CONFIG_NAMES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

_MOST_FEATURES = 1 << 20

_ACTIVATIONS = {
    f"{cls.__module__}.{cls.__name__}": cls
    for cls in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Mish)
}


def _size(config: Mapping[str, Any], name: str, source: str) -> int:
    size = field(config, name, int, None, source)
    if size is None or not 0 < size <= _MOST_FEATURES:
        raise ValueError(f"{source}: {name} is {size}; it must be a number of features from 1 to {_MOST_FEATURES}")
    return size


class Dense(nn.Module):
    """act(W x + b), plus x (or its own projection) where `use_residual` says so."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        source = "the configuration of Dense"
        name = field(config, "activation_function", str, "torch.nn.modules.activation.Tanh", source)
        if name not in _ACTIVATIONS:
            raise ValueError(f"Dense has activation_function {name!r}; known: {', '.join(_ACTIVATIONS)}")
        inputs, outputs = _size(config, "in_features", source), _size(config, "out_features", source)
        self.linear = nn.Linear(inputs, outputs, bias=field(config, "bias", bool, True, source))
        self.act = _ACTIVATIONS[name]()
        self.use_residual = field(config, "use_residual", bool, False, source)
        self.residual = nn.Linear(inputs, outputs, bias=False) if self.use_residual and inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(S, in_features) -> (S, out_features).

        At inference on a CPU row by row: a BLAS rounds differently with the number of rows, and a vector must not
        depend on what it is batched with.
        """
        if x.device.type == "cpu" and len(x) > 1 and not torch.is_grad_enabled():
            return torch.cat([self(row) for row in x.split(1)])
        y = self.act(self.linear(x))
        return y if not self.use_residual else y + (x if self.residual is None else self.residual(x))


class LayerNorm(nn.Module):
    """A layer norm of the vectors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.num_features = _size(config, "dimension", "the configuration of LayerNorm")
        self.norm = nn.LayerNorm(self.num_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(S, D) -> (S, D)."""
        return self.norm(x)


class Normalize(nn.Module):
    """Vectors of length 1."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(S, D) -> (S, D)."""
        return l2_normalize(x)


class Dropout(nn.Dropout):
    """Does nothing at inference; kept so that saving loses no module."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(field(config, "dropout", float, 0.2, "the configuration of Dropout"))
        self.config = dict(config)


def scales_first(modules: nn.Sequential) -> bool:
    """Whether pooled states are scaled to length 1 before anything else, which an engine does along with pooling."""
    return len(modules) > 0 and isinstance(modules[0], Normalize)


def finished(modules: nn.Sequential, pooled_SD: torch.Tensor, truncate_dim: int | None, unit: bool) -> torch.Tensor:
    """Vectors (S, D) fp32 of pooled states, which a first `Normalize` has scaled already (`scales_first`): through the
    other modules, cut to `truncate_dim` features, of length 1 if `unit`.

    What the last module scaled is not scaled again. A row's bits do not depend on the rows beside it.
    """
    vectors_SD = pooled_SD.float()
    scaled = False
    for i, module in enumerate(modules):
        scaled = isinstance(module, Normalize)
        if i > 0 or not scaled:
            vectors_SD = module(vectors_SD)
    if truncate_dim is not None and truncate_dim < vectors_SD.shape[1]:
        vectors_SD, scaled = vectors_SD[:, :truncate_dim].contiguous(), False
    return l2_normalize(vectors_SD) if unit and not scaled else vectors_SD


MODULES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    cls.__name__: cls for cls in (Dense, LayerNorm, Normalize, Dropout)
}


@dataclass(frozen=True)
class SentenceFolder:
    """What a sentence-transformers folder says around the encoder.

    Attributes:
        transformer: folder of the encoder's and tokenizer's files.
        pooling: how token states become a vector.
        modules: applied to the vectors, in order; in fp32.
        max_seq_length: tokens a text, None where no file says it.
        do_lower_case: lower the text before tokenising.
        prompts, default_prompt_name, similarity_fn_name, truncate_dim: as sentence-transformers names them.
    """

    transformer: Path
    pooling: Pooling = dataclasses.field(default_factory=Pooling)
    modules: nn.Sequential = dataclasses.field(default_factory=nn.Sequential)
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    truncate_dim: int | None = None


def read_folder(folder: Path) -> SentenceFolder:
    """Read what lies around the encoder. A plain encoder without `modules.json` gets mean pooling and a warning.

    Raises:
        FileNotFoundError: a file that `modules.json` promises is missing.
        ValueError: a corrupt file, or a module that this package does not compute, by its name.
    """
    path = folder / "modules.json"
    if path.is_file():
        transformer, pooling, modules = _read_modules(path)
    else:
        transformer, pooling, modules = folder, Pooling(), nn.Sequential()
        warnings.warn(f"{folder} has no modules.json: its token states are mean-pooled, not normalised", stacklevel=4)
    names = [transformer / name for name in TRANSFORMER_CONFIG_NAMES]
    sizes = next((read_json(name) for name in names if name.is_file()), {})
    task = field(sizes, "transformer_task", str, "feature-extraction", transformer)
    if task != "feature-extraction":
        raise ValueError(f"{transformer} is a model for {task}; only feature-extraction gives vectors of texts")
    path = folder / CONFIG_NAME
    model = read_json(path) if path.is_file() else {}
    similarity = field(model, "similarity_fn_name", str, "", path) or "cosine"
    if similarity not in SIMILARITIES:
        raise ValueError(f"{path}: similarity_fn_name {similarity!r} is not one of {SIMILARITIES}")
    prompts = field(model, "prompts", Mapping[str, str | None], {}, path)
    return SentenceFolder(
        transformer,
        pooling,
        modules,
        field(sizes, "max_seq_length", int, None, transformer),
        field(sizes, "do_lower_case", bool, False, transformer),
        {name: prompt or "" for name, prompt in prompts.items()},
        field(model, "default_prompt_name", str, None, path),
        similarity,
        field(model, "truncate_dim", int, None, path),
    )


def _read_modules(path: Path) -> tuple[Path, Pooling, nn.Sequential]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not is_a(rows, list[Mapping[str, Any]]):
            raise TypeError(f"it holds {rows!r:.80}")
        kinds = [_kind(field(row, "type", str, "", path)) for row in rows]
        folders = [path.parent / field(row, "path", str, "", path) for row in rows]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a list of modules with a type and a path each: {error}") from error
    root = path.parent.resolve()
    for where in folders:
        if "\0" in str(where) or not where.resolve().is_relative_to(root):
            raise ValueError(f"{path} names {str(where)!r}, which lies outside its folder")
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= set(MODULES):
        raise ValueError(
            f"{path} lists the modules {', '.join(kinds)}; computed here are Transformer, Pooling and then any of "
            f"{', '.join(MODULES)}"
        )
    after = zip(kinds[2:], folders[2:], strict=True)
    pooling = Pooling.from_config(read_json(folders[1] / "config.json"))
    return folders[0], pooling, nn.Sequential(*(_read_module(kind, folder) for kind, folder in after))


def _kind(dotted: str) -> str:
    """The class's name; sentence-transformers moved its modules between packages, code of others is never run."""
    package, _, name = dotted.rpartition(".")
    return name if package.split(".")[0] == "sentence_transformers" else dotted


def _read_module(kind: str, folder: Path) -> nn.Module:
    path = folder / "config.json"
    config = read_json(path) if path.is_file() or kind in ("Dense", "LayerNorm") else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ValueError(f"{path}: {key} is {config[key]!r}; {kind} is computed on the sentence_embedding only")
    try:
        module = MODULES[kind](config)
        if module.state_dict():
            module.load_state_dict({name: tensor.float() for name, tensor in load_weights(folder).items()})
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except RuntimeError as error:  # names or shapes that differ
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
    return module.eval()


def with_dense(modules: nn.Sequential, folder: Path) -> nn.Sequential:
    """Modules with the Dense layer of a folder in the place of their own; it comes first where they have none.

    Raises:
        FileNotFoundError, ValueError: as `read_folder`.
    """
    dense = _read_module("Dense", folder)
    rest = [module for module in modules if not isinstance(module, Dense)]
    place = next((i for i, module in enumerate(modules) if isinstance(module, Dense)), 0)
    return nn.Sequential(*rest[:place], dense, *rest[place:])


def write_folder(folder: Path, content: SentenceFolder, hidden_size: int) -> None:
    """Write `modules.json`, all that it names, and the two configurations, next to an encoder in `folder`.

    The types are those of sentence-transformers before version 5.4: newer releases and other servers read them too.
    """
    rows = [("Transformer", ""), ("Pooling", "1_Pooling")]
    _write(folder / "1_Pooling" / "config.json", content.pooling.to_config(hidden_size))
    for index, module in enumerate(content.modules, start=2):
        kind = type(module).__name__
        rows.append((kind, f"{index}_{kind}"))
        _write(folder / rows[-1][1] / "config.json", cast(dict[str, Any], module.config))
        if module.state_dict():
            save_weights(module.state_dict(), folder / rows[-1][1])
    listed = [
        {"idx": i, "name": str(i), "path": where, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, where) in enumerate(rows)
    ]
    sizes = {"max_seq_length": content.max_seq_length, "do_lower_case": content.do_lower_case}
    _write(folder / TRANSFORMER_CONFIG_NAMES[0], sizes)
    model: dict[str, Any] = {
        "prompts": dict(content.prompts),
        "default_prompt_name": content.default_prompt_name,
        "similarity_fn_name": content.similarity_fn_name,
    }
    if content.truncate_dim is not None:
        model["truncate_dim"] = content.truncate_dim
    _write(folder / CONFIG_NAME, model)
    _write(folder / "modules.json", listed)


def _write(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
