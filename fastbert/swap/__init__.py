"""Swap-in for live `transformers` models: `accelerate(model)` and the encoder computes on packed tokens.

One thing changes, on the instance: encoder and layers get a class of this room, a stateless subclass of their own. The
2D mask is read back from whatever Hugging Face built of it, at the encoder's door: so callers that go around hooks are
served too, no configuration changes, and no attention is registered (half registered, Hugging Face drops the mask).
"""

from fastbert.swap.attach import FastbertPaddingWarning, accelerate, accelerated, restore
from fastbert.swap.encoders import FastbertFallbackWarning

__all__ = ["FastbertFallbackWarning", "FastbertPaddingWarning", "accelerate", "accelerated", "restore"]
