"""What all requests share: settings, models, series, keys, and the phase the server is in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastbert.serve.cache import Cache
from fastbert.serve.errors import ModelNotFound
from fastbert.serve.models import Model
from fastbert.serve.security import Keys
from fastbert.serve.series import Series
from fastbert.serve.settings import Settings


@dataclass
class State:
    """The server's state; written by the event loop's thread only.

    Attributes:
        phase: `starting`, `ready` or `draining`.
        inflight: requests in the house that want something computed.
        abandoned: requests that had to be given up at the end.
        compute_type: of the header `x-compute-type`.
    """

    settings: Settings
    models: Sequence[Model]
    series: Series
    keys: Keys
    cache: Cache | None = None
    phase: str = "starting"
    inflight: int = 0
    abandoned: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # Where TEI says gpu+optimized on every device.
        self.compute_type = f"{self.models[0].served.device.type}+optimized"
        self._by_name = {model.name: model for model in self.models}
        if len(self._by_name) < len(self.models):
            names = ", ".join(model.name for model in self.models)
            raise ValueError(f"two models have one name: {names}; give each its own --served-model-name")

    def model(self, name: str | None) -> Model:
        """The model of a name; a lone model answers to every name, as TEI's does.

        Raises:
            ModelNotFound: several models, and none of this name.
        """
        if name is None or len(self.models) == 1:
            return self.models[0]
        if name not in self._by_name:
            known = ", ".join(self._by_name)
            raise ModelNotFound(f"the model {name!r:.200} is not served here; there are {known}", "model")
        return self._by_name[name]

    def cache_hit_rate(self) -> float | None:
        """Share of inputs that were in the cache; None without one."""
        cache = self.cache
        return None if cache is None else cache.hits / max(cache.hits + cache.misses, 1)
