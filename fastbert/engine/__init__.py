"""Engines: frozen whole-model execution of a packed batch, one a device, on top of what the ops define."""

from fastbert.engine.choice import pin, plan, release_weights, run, use_engine

__all__ = ["pin", "plan", "release_weights", "run", "use_engine"]
