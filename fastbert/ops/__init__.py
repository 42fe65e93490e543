"""What is computed: one file an op, with its equation, its reference in plain PyTorch and its public function."""

from fastbert.ops.add_layer_norm import add_layer_norm
from fastbert.ops.attention import attention
from fastbert.ops.cross_entropy import cross_entropy
from fastbert.ops.dispatch import use_backend
from fastbert.ops.embed import embed
from fastbert.ops.float8_linear import float8_linear
from fastbert.ops.gelu import gelu
from fastbert.ops.int8_linear import int8_linear
from fastbert.ops.l2_normalize import l2_normalize
from fastbert.ops.linear import linear, linear_add, linear_add_norm, linear_gelu
from fastbert.ops.plan import plan_batches, plan_concat, plan_mask
from fastbert.ops.pool import pool

OPS = (
    "embed",
    "attention",
    "attention_rel_bias",
    "attention_window",
    "add_layer_norm",
    "gelu",
    "pool",
    "l2_normalize",
    "cross_entropy",
    "int8_linear",
    "float8_linear",
    "linear",
    "linear_gelu",
    "linear_add",
    "linear_add_norm",
    "plan_mask",
    "plan_batches",
    "plan_concat",
)

__all__ = [
    "OPS",
    "add_layer_norm",
    "attention",
    "cross_entropy",
    "embed",
    "float8_linear",
    "gelu",
    "int8_linear",
    "l2_normalize",
    "linear",
    "linear_add",
    "linear_add_norm",
    "linear_gelu",
    "plan_batches",
    "plan_concat",
    "plan_mask",
    "pool",
    "use_backend",
]
