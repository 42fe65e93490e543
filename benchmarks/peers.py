"""Others that turn texts into vectors on a CPU, each with the same token ids, as fast as its own documentation says.

One small class a peer. It gets token ids and gives hidden states of a padded batch; sorting by length, pooling by mean
and scaling to length 1 are common to all. Peers with "tuned" in their name run as an expert would run them, those
without as most people do.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.texts import real_texts
from fastbert import native
from fastbert.sentence_folder import read_folder
from fastbert.tokenizer import Tokenizer
from fastbert.weights import read_json
from fastbert.windows import encode_windows

Batch = tuple[list[int], np.ndarray, np.ndarray]  # rows, input_ids (B, L), mask (B, L); int64


def batches(ids: Sequence[list[int]], size: int) -> Iterator[Batch]:
    """Padded batches of at most `size` sequences, the longest first, as every library that pads makes them."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = max(1, len(ids[rows[0]]))
        input_ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
        for line, row in enumerate(rows):
            input_ids[line, : len(ids[row])] = ids[row]
            mask[line, : len(ids[row])] = 1
        yield rows, input_ids, mask


def pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(B, L, D), (B, L) -> (B, D) float32 of length 1: the mean over real tokens."""
    weight = mask[..., None].astype(np.float32)
    vectors = (hidden.astype(np.float32) * weight).sum(1) / weight.sum(1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Padded:
    """A peer that takes one padded batch after the other."""

    batch_size = 32

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        """Load the model in `float32`, `bfloat16` or `int8`; what it is converted to is kept in `scratch`."""
        raise NotImplementedError

    def hidden(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, L), (B, L) -> (B, L, D)."""
        raise NotImplementedError

    def vectors(self, ids: list[list[int]]) -> np.ndarray:
        """(N, D) of N lists of token ids."""
        out: np.ndarray | None = None
        for rows, input_ids, mask in batches(ids, self.batch_size):
            part = pooled(self.hidden(input_ids, mask), mask)
            out = np.empty((len(ids), part.shape[1]), np.float32) if out is None else out
            out[rows] = part
        assert out is not None
        return out


class Transformers(Padded):
    """transformers with scaled-dot-product attention, eager."""

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        from transformers import AutoModel

        self.model: Any = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def hidden(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
        return self.model(**inputs).last_hidden_state.float().numpy()


class Compiled(Transformers):
    """The same, through torch.compile with shapes left open."""

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        super().__init__(folder, dtype, scratch)
        self.model = torch.compile(self.model, dynamic=True)


def onnx_file(folder: Path, scratch: Path) -> Path:
    """The encoder in ONNX with open batch and length, exported once."""
    if (place := scratch / "model.onnx").exists():
        return place
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.requires_grad_(False)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            # Written as a float mask: the exporter cannot follow the library's own way of making one.
            bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            return self.model(input_ids=input_ids, attention_mask=bias).last_hidden_state

    sample = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: "batch", 1: "length"}
    torch.onnx.export(
        Encoder(), (sample, sample), str(place), dynamo=False, opset_version=17,
        input_names=["input_ids", "attention_mask"], output_names=["hidden"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
    )  # fmt: skip
    return place


class OnnxRuntime(Padded):
    """ONNX Runtime: fp32 with its own fusions for BERT, or its dynamic int8 quantisation of that."""

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.transformers.optimizer import optimize_model

        config = read_json(folder / "config.json")
        place = scratch / f"optimised-{dtype}.onnx"
        heads, size = config["num_attention_heads"], config["hidden_size"]
        fused = optimize_model(str(onnx_file(folder, scratch)), model_type="bert", num_heads=heads, hidden_size=size)
        fused.save_model_to_file(str(place))
        if dtype == "int8":
            source, place = place, scratch / "int8.onnx"
            types = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of what its own fusions put out
            quantize_dynamic(source, place, weight_type=QuantType.QInt8, per_channel=True, extra_options=types)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])

    def hidden(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"input_ids": input_ids, "attention_mask": mask})[0]


class OpenVino(Padded):
    """OpenVINO as most people run it: one synchronous request after the other."""

    hint = "LATENCY"

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model((_calibrated if dtype == "int8" else onnx_file)(folder, scratch))
        precision = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}[dtype]  # int8: of what is not quantised
        config = {
            "PERFORMANCE_HINT": self.hint,
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.model = core.compile_model(model, "CPU", config)
        self.request = self.model.create_infer_request()

    def hidden(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.request.infer({"input_ids": input_ids, "attention_mask": mask})["hidden"]


class OpenVinoTuned(OpenVino):
    """OpenVINO as its performance guide says: throughput mode, asynchronous requests in flight, smaller batches."""

    hint = "THROUGHPUT"
    batch_size = 16

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        import openvino

        super().__init__(folder, dtype, scratch)
        self.queue = openvino.AsyncInferQueue(self.model)

    def vectors(self, ids: list[list[int]]) -> np.ndarray:
        if len(ids) <= self.batch_size:
            return super().vectors(ids)
        parts: list[tuple[list[int], np.ndarray]] = []

        def keep(request: Any, sent: tuple[list[int], np.ndarray]) -> None:
            parts.append((sent[0], pooled(request.get_output_tensor(0).data, sent[1])))

        self.queue.set_callback(keep)
        for rows, input_ids, mask in batches(ids, self.batch_size):
            self.queue.start_async({"input_ids": input_ids, "attention_mask": mask}, (rows, mask))
        self.queue.wait_all()
        out = np.empty((len(ids), parts[0][1].shape[1]), np.float32)
        for rows, part in parts:
            out[rows] = part
        return out


def _calibrated(folder: Path, scratch: Path) -> Path:
    """Static int8 by NNCF's recipe for transformers, calibrated on English sentences; once."""
    if (place := scratch / "int8.xml").exists():
        return place
    import nncf
    import openvino

    encode = _tokenizer(folder).encode(real_texts((4, 80), 300, seed=1)).ids
    samples = [{"input_ids": i, "attention_mask": m} for _, i, m in batches(encode, 1)]
    model = openvino.Core().read_model(onnx_file(folder, scratch))
    kind = nncf.ModelType.TRANSFORMER
    openvino.save_model(nncf.quantize(model, nncf.Dataset(samples), model_type=kind, subset_size=len(samples)), place)
    return place


class CTranslate2(Padded):
    """CTranslate2, which drops padding too; fp32, or int8 weights and activations.

    It computes in a thread of its own. What converts or loads a model in parallel leaves a team of OpenMP's behind in
    the thread that did: that team and the computing one are more threads than cores, so libgomp has all of them sleep
    at barriers, a hundred times a text. (A short text took 3.4 to 5.5 ms instead of 0.6 in int8, 8 instead of 2 in fp32
    where the process had converted the model; two cores, 2026-11-27.) A thread that ends takes its team with it.
    """

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        with ThreadPoolExecutor(1) as aside:
            aside.submit(self._load, folder, dtype, scratch).result()

    def _load(self, folder: Path, dtype: str, scratch: Path) -> None:
        import ctranslate2

        place = scratch / "ctranslate2"
        if not place.exists():
            ctranslate2.converters.TransformersConverter(str(folder)).convert(str(place))
        self.array = ctranslate2.StorageView.from_array
        self.encoder = ctranslate2.Encoder(
            str(place), compute_type=dtype, intra_threads=torch.get_num_threads(), inter_threads=1
        )

    def hidden(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        ids, lengths = input_ids.astype(np.int32), mask.sum(1).astype(np.int32)
        states = self.encoder.forward_batch(self.array(ids), self.array(lengths))
        return np.array(states.last_hidden_state)


@dataclass(frozen=True)
class Peer:
    """How a peer is found, named and made."""

    kind: type[Padded]
    dtype: str
    needs: tuple[str, ...]


PEERS = {
    "transformers": Peer(Transformers, "float32", ("transformers",)),
    "transformers-bf16": Peer(Transformers, "bfloat16", ("transformers",)),
    "torch-compile": Peer(Compiled, "float32", ("transformers",)),
    "torch-compile-bf16": Peer(Compiled, "bfloat16", ("transformers",)),
    "onnxruntime": Peer(OnnxRuntime, "float32", ("transformers", "onnx", "onnxruntime")),
    "onnxruntime-int8": Peer(OnnxRuntime, "int8", ("transformers", "onnx", "onnxruntime")),
    "openvino": Peer(OpenVino, "float32", ("transformers", "onnx", "openvino")),
    "openvino-bf16": Peer(OpenVino, "bfloat16", ("transformers", "onnx", "openvino")),
    "openvino-int8": Peer(OpenVino, "int8", ("transformers", "onnx", "openvino", "nncf")),
    "openvino-tuned": Peer(OpenVinoTuned, "float32", ("transformers", "onnx", "openvino")),
    "openvino-tuned-bf16": Peer(OpenVinoTuned, "bfloat16", ("transformers", "onnx", "openvino")),
    "openvino-tuned-int8": Peer(OpenVinoTuned, "int8", ("transformers", "onnx", "openvino", "nncf")),
    "ctranslate2": Peer(CTranslate2, "float32", ("transformers", "ctranslate2")),
    "ctranslate2-int8": Peer(CTranslate2, "int8", ("transformers", "ctranslate2")),
}


NO_BFLOAT16 = "this CPU has no bfloat16 arithmetic: libraries emulate it, some a hundred times slower"


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself."""
    return native.available() and native.isa() in ("avx512bf16", "amx")


def reason_against(peer: Peer) -> str | None:
    """Why the peer cannot be measured here: what is missing with the line that installs it, or the CPU."""
    missing = [name for name in peer.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"missing: pip install {' '.join(missing)}"
    return NO_BFLOAT16 if peer.dtype == "bfloat16" and not has_bfloat16() else None


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    described = read_folder(folder)
    limit = read_json(described.transformer / "config.json")["max_position_embeddings"]
    return Tokenizer.from_folder(described.transformer, limit, described.max_seq_length, described.do_lower_case)


def make(name: str, folder: Path, scratch: Path) -> Callable[[list[str]], np.ndarray]:
    """Texts -> (N, D) unit vectors by one peer: tokens as ours are made, then the peer, then pooling.

    Raises:
        ValueError: the model does not pool by mean, which is all that peers do here.
    """
    described = read_folder(folder)
    if described.pooling.modes != ("mean",):
        raise ValueError(f"peers pool by mean, but {folder} says {described.pooling.modes}")
    tokenizer = _tokenizer(folder)
    peer = PEERS[name].kind(described.transformer, PEERS[name].dtype, scratch)

    def vectors(texts: list[str]) -> np.ndarray:
        parts = encode_windows(tokenizer, texts, "", sys.maxsize, on_cpu=True)
        return peer.vectors([ids for _, encoded in parts for ids in encoded.ids])

    return vectors
