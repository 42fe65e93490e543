"""Engines: frozen whole-model execution of a packed batch, one a device, on top of what the ops define."""

from fastbert.engine.choice import plan, release_weights, run, use_engine

__all__ = ["plan", "release_weights", "run", "use_engine"]
