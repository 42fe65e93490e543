"""Vectors of sequences out of the CPU engine's one call."""

from __future__ import annotations

import pytest
import torch
from engine_models import LENGTHS, batch_of, build, plan_of

from fastbert import native
from fastbert.engine import cpu, use_engine
from fastbert.ops import l2_normalize, pool
from fastbert.ops.pool import MODES

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)


@pytest.mark.parametrize("unit", [False, True], ids=["pooled", "unit"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_are_the_pooled_hidden_states(mode, dtype, unit):
    model = build("bert").to(dtype)
    batch = batch_of(model)

    def pooled() -> torch.Tensor:
        vectors = pool(model.forward_packed(batch), batch.cu_seqlens, mode)
        return l2_normalize(vectors) if unit else vectors

    with torch.inference_mode():
        vectors = model.pool_packed(batch, mode, unit)
        assert plan_of(model).startswith("cpu engine: ")
        assert torch.equal(vectors, pooled())
        assert vectors.dtype == (torch.float32 if unit else dtype)
        with use_engine("off"):
            assert torch.equal(model.pool_packed(batch, mode, unit), pooled())
    assert not vectors[LENGTHS.index(0)].any()
    assert vectors.abs().sum(-1).count_nonzero() == len(LENGTHS) - 1
    assert model.pool_packed(batch, mode, unit).requires_grad, "where autograd records, it runs on ops"


def test_pooling_takes_known_modes_and_a_row_a_sequence():
    model = build("bert")
    batch = batch_of(model)
    with torch.inference_mode(), pytest.raises(ValueError, match="unknown pooling mode 'middle'"):
        model.pool_packed(batch, "middle")
    engine = cpu.compile(model)
    given = (batch.input_ids, batch.position_ids, None, batch.cu_seqlens)
    with pytest.raises(ValueError, match="out"):
        engine._encoder.forward(*given, torch.empty(batch.num_tokens, 48), batch.max_seqlen, 1, "mean")
    with pytest.raises(ValueError, match="vectors of length 1 need a pooling mode"):
        engine.run(batch, None, True)
