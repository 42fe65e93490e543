"""The parity certificate: fastbert's hidden states against `transformers` in fp64, layer by layer, path by path.

A path is a dtype on a backend. It passes where its error is within the budget of `fastbert.testing`: twice the error
that `transformers` makes in the same dtype, plus one rounding. int8 has no such peer: its cosine decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from fastbert.models import AutoConfig, AutoModel
from fastbert.models.encoder import EncoderModel, Trace
from fastbert.models.quantize import quantize_int8
from fastbert.ops import use_backend
from fastbert.ops.dispatch import REFERENCE, chosen
from fastbert.packing import pack
from fastbert.plot import error_by_layer
from fastbert.sentence_folder import read_folder
from fastbert.testing import FORWARD_FACTOR
from fastbert.tokenizer import Tokenizer

INT8_COSINE = 0.98  # least cosine of a text's vector; the mean is far above
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TEXTS = (
    "Yes.",
    "The ferry to the island was cancelled because of the storm.",
    "Bad weather stopped the boat from crossing.",
    "How do I change the password of my account if I no longer have the old phone?",
    "Violins made in Cremona, most of them before 1750, are still prized by soloists; nobody agrees on why.",
    "for i in range(10): print(i ** 2)  # squares",
    "Ärger über die Straßenbahn: 3,50 € für zwei Stationen!",
    "Knead the dough for ten minutes, let it rise under a cloth until it has doubled, then shape it into a loaf, slash "
    "the top with a sharp knife, and bake it in the hottest oven you have with a tray of water below. After a quarter "
    "of an hour take the water out and turn the heat down; after another half an hour the crust should be dark, and "
    "the loaf should sound hollow when you knock on its underside. Leave it on a rack for at least an hour before you "
    "cut it, however good it smells, because the crumb is still setting while it cools.",
)


@dataclass(frozen=True)
class Reference:
    """What `transformers` computes: exact hidden states, and its own errors in each dtype.

    Attributes:
        sequences: S lists of token ids.
        exact: num_layers + 1 tensors (T, D) fp64.
        allowed: dtype name -> greatest error of `transformers` at each layer.
        source: which version made it.
    """

    sequences: list[list[int]]
    exact: list[torch.Tensor]
    allowed: dict[str, list[float]]
    source: str

    @classmethod
    def compute(cls, folder: Path, sequences: list[list[int]]) -> Reference:
        """With the installed `transformers`.

        Raises:
            ImportError: it is not installed.
        """
        from fastbert.swap import oracle

        exact = oracle.hidden_states(folder, sequences, torch.float64)
        allowed = {}
        for name, dtype in DTYPES.items():
            same = oracle.hidden_states(folder, sequences, dtype)
            allowed[name] = [_max_abs(a, b) for a, b in zip(same, exact, strict=True)]
        return cls(sequences, exact, allowed, f"transformers {oracle.version()}")

    def save(self, path: Path) -> None:
        """As one safetensors file."""
        flat = [i for ids in self.sequences for i in ids]
        lengths = torch.tensor([len(ids) for ids in self.sequences])
        tensors = {"input_ids": torch.tensor(flat), "lengths": lengths}
        tensors |= {f"exact.{i}": layer.contiguous() for i, layer in enumerate(self.exact)}
        save_file(tensors, path, {"allowed": json.dumps(self.allowed), "source": self.source})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """What `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            lengths = tensors.pop("lengths").tolist()
            sequences = [ids.tolist() for ids in tensors.pop("input_ids").split(lengths)]
            exact = [tensors[f"exact.{i}"] for i in range(len(tensors))]
            return cls(sequences, exact, json.loads(metadata["allowed"]), metadata["source"])
        except FileNotFoundError:
            raise
        except Exception as error:  # foreign bytes: safetensors, KeyError, JSON
            raise ValueError(f"{path} is not a reference that `fastbert verify --save` wrote: {error}") from error


@dataclass(frozen=True)
class Line:
    """One layer on one path.

    Attributes:
        path: dtype and backend, such as `float32 native`.
        layer: 0 = embeddings, num_layers = the output; "vector" = mean-pooled texts.
        max_abs, rmse: error against fp64.
        cosine: least over rows.
        worst: row with the greatest error: text and token.
        budget: what `max_abs` may be, or None where cosine decides.
        passed: within the budget.
    """

    path: str
    layer: str
    max_abs: float
    rmse: float
    cosine: float
    worst: str
    budget: float | None
    passed: bool


def encoder_folder(folder: Path) -> Path:
    """Where the encoder's files lie: below a sentence-transformers folder, or `folder` itself."""
    return read_folder(folder).transformer if (folder / "modules.json").is_file() else folder


def token_ids(folder: Path, texts: Sequence[str], max_length: int = 256) -> list[list[int]]:
    """S lists of ids with the model's own tokenizer, cut to `max_length` (fp64 is slow) or what the model takes."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    limit = model.config.max_position_embeddings - model.position_offset
    return Tokenizer.from_folder(folder, limit, min(max_length, limit)).encode(texts).ids


def _max_abs(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b).abs().max().item()


def _pooled(hidden_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    return torch.stack([part.double().mean(0) for part in hidden_TD.split(list(lengths))])


def compare(path: str, dtype: str | None, ours: Mapping[int, torch.Tensor], reference: Reference) -> list[Line]:
    """Lines of one path: every layer that it shows, and the texts' vectors.

    Args:
        ours: layer -> (T, D); the last layer is among them.
        dtype: whose budget counts; None where the vectors' cosine decides.
    """
    lengths = [len(ids) for ids in reference.sequences]
    places = [f"text {s}, token {t}" for s, n in enumerate(lengths) for t in range(n)]
    layers = [(str(i), hidden, reference.exact[i], places) for i, hidden in ours.items()]
    vectors = (_pooled(ours[len(reference.exact) - 1], lengths), _pooled(reference.exact[-1], lengths))
    lines = []
    for name, a, b, rows in [*layers, ("vector", *vectors, [f"text {s}" for s in range(len(lengths))])]:
        error = a.double() - b
        cosine = F.cosine_similarity(a.double(), b).min().item()
        budget = None
        if dtype is not None:
            allowed = reference.allowed[dtype][-1 if name == "vector" else int(name)]
            budget = FORWARD_FACTOR * allowed + torch.finfo(DTYPES[dtype]).eps * b.abs().max().item()
        max_abs = error.abs().max().item()
        finite = bool(torch.isfinite(a).all())
        passed = finite and (max_abs <= budget if budget is not None else name != "vector" or cosine >= INT8_COSINE)
        worst = rows[int(error.abs().amax(1).nan_to_num(torch.inf).argmax())]
        lines.append(Line(path, name, max_abs, error.pow(2).mean().sqrt().item(), cosine, worst, budget, passed))
    return lines


def run(model: EncoderModel, sequences: list[list[int]]) -> dict[int, torch.Tensor]:
    """Our hidden states, layer -> (T, D), as ops."""
    trace = Trace(hidden_states=[])
    with torch.inference_mode():
        model.forward_packed(pack(sequences, position_offset=model.position_offset), trace)
    return dict(enumerate(trace.hidden_states or ()))


def run_engine(model: EncoderModel, sequences: list[list[int]]) -> torch.Tensor | None:
    """The last layer's hidden states (T, D) as inference computes them, where that is on an engine."""
    with torch.inference_mode():
        if model.execution_plan().startswith("ops"):
            return None
        return model.forward_packed(pack(sequences, position_offset=model.position_offset))


def verify(folder: Path, reference: Reference, report: Callable[[str], None] = lambda path: None) -> list[Line]:
    """Every path that this machine would take: each dtype on its engine, as ops, on the reference; and int8.

    Args:
        folder: the checkpoint.
        report: told the name of each path before it runs.
    """
    lines = []
    for name, dtype in DTYPES.items():
        model = AutoModel.from_pretrained(folder, dtype=dtype)
        last = run_engine(model, reference.sequences)
        if last is not None:
            report(path := f"{name} engine")
            lines += compare(path, name, {len(reference.exact) - 1: last}, reference)
        default = chosen("attention", "cpu", dtype)
        for backend in dict.fromkeys((default, REFERENCE)):
            report(path := f"{name} {backend}")
            if backend == default:
                ours = run(model, reference.sequences)
            else:
                with use_backend(backend):
                    ours = run(model, reference.sequences)
            lines += compare(path, name, ours, reference)
    report("int8")
    quantised = quantize_int8(AutoModel.from_pretrained(folder, dtype=torch.float32))
    return lines + compare("int8", None, run(quantised, reference.sequences), reference)


def certificate(name: str, reference: Reference, lines: list[Line]) -> dict[str, Any]:
    """The JSON document."""
    return {
        "model": name,
        "reference": reference.source,
        "texts": len(reference.sequences),
        "tokens": sum(map(len, reference.sequences)),
        "torch": torch.__version__,
        "passed": all(line.passed for line in lines),
        "lines": [asdict(line) for line in lines],
    }


def table(name: str, reference: Reference, lines: list[Line], all_layers: bool = False) -> Table:
    """The certificate to look at: each path's layer nearest to (or past) its budget, its output and its vectors."""
    title = f"{name} against {reference.source} in fp64, {len(reference.sequences)} texts"
    grid = Table(title=escape(title))
    for column in ("path", "layer", "max abs", "budget", "rmse", "least cosine", "worst row", ""):
        grid.add_column(column, justify="right" if column in ("layer", "max abs", "budget", "rmse") else "left")
    for path in dict.fromkeys(line.path for line in lines):
        own = [line for line in lines if line.path == path]
        tightest = max(own[:-1], key=lambda line: line.max_abs / line.budget if line.budget else line.max_abs)
        for line in own if all_layers else dict.fromkeys((tightest, *own[-2:])):
            grid.add_row(
                path if line is own[0] or not all_layers else "", line.layer, f"{line.max_abs:.2e}",
                "-" if line.budget is None else f"{line.budget:.2e}", f"{line.rmse:.2e}", f"{line.cosine:.7f}",
                line.worst, "[green]pass" if line.passed else "[bold red]FAIL",
            )  # fmt: skip
        grid.add_section()
    return grid


def plot(path: Path, name: str, lines: list[Line]) -> None:
    """Write a figure of each path's error by layer beside its budget."""
    by_layer = [line for line in lines if line.layer != "vector"]
    paths = dict.fromkeys(line.path for line in by_layer if line.layer == "0")  # an engine shows its last layer only
    errors = {p: [line.max_abs for line in by_layer if line.path == p] for p in paths}
    budgets = {p: [line.budget for line in by_layer if line.path == p and line.budget is not None] for p in paths}
    error_by_layer(path, f"{name}: error against transformers in fp64", errors, {p: b for p, b in budgets.items() if b})
