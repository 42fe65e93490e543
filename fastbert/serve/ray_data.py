"""Ray Data: `EmbedBatch`, a class for `Dataset.map_batches` that adds vectors to rows. Corpora past one machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbert.embedder import Embedder


class EmbedBatch:
    """Texts of one column to vectors in another; each Ray worker loads the model once and keeps it.

        dataset = ray.data.read_parquet("corpus.parquet")
        dataset = dataset.map_batches(
            EmbedBatch,
            fn_constructor_kwargs={"model": "sentence-transformers/all-MiniLM-L6-v2", "normalize_embeddings": True},
            compute=ray.data.ActorPoolStrategy(size=4), num_cpus=4, batch_size=2048,
        )
        dataset.write_parquet("vectors")

    `num_cpus` is how many threads a worker computes with (Ray says so in OMP_NUM_THREADS, unless you set that); with
    `num_gpus=1` it computes on its GPU. The rows of a batch are sorted by length and packed inside, so a large
    `batch_size` costs no padding.

    Args:
        model: folder or hub id, known to every node; see `fastbert.hub.resolve`.
        column: the rows' texts, each a str.
        output: the column of vectors that is added: float32, one (D) vector a row.
        dtype: as in `Embedder.from_pretrained`.
        options: of `Embedder.encode`: `normalize_embeddings`, `prompt_name`, `truncate_dim`, `precision`, ...

    Raises:
        ValueError: `output` names a column that the rows have already.
        KeyError: the rows have no such `column`.
        TypeError: a text that is not a str; the message counts from the start of the batch.
    """

    def __init__(
        self, model: str, column: str = "text", output: str = "vector", dtype: str | None = None, **options: Any
    ) -> None:
        if column == output:
            raise ValueError(f"column and output are both {column!r}: the vectors would replace the texts")
        self.embedder = Embedder.from_pretrained(model, dtype=dtype)
        self.column, self.output, self.options = column, output, options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with one column more: (N, D), row by row what `Embedder.encode` gives for the texts."""
        if self.column not in batch:
            raise KeyError(f"the rows have no column {self.column!r}, they have {', '.join(sorted(batch))}")
        if self.output in batch:
            raise ValueError(f"the rows have a column {self.output!r} already: name another with output=...")
        texts = batch[self.column].tolist()
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"row {wrong} of a batch: {self.column!r} is {texts[wrong]!r}, it must be a str")
        return {**batch, self.output: self.embedder.encode(texts, **self.options)}
