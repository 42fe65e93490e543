"""Ray Serve: `application` makes of the server a deployment with replicas on many machines, behind Ray's own proxy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from ray import serve

from fastbert.hub import resolve
from fastbert.serve.app import build_app
from fastbert.serve.errors import WrongModel
from fastbert.serve.launch import build_state
from fastbert.serve.settings import Settings
from fastbert.serve.state import State
from fastbert.serve.work import Work


@cache
def _state(models: tuple[str, ...], settings: Settings) -> State:
    """The models of a replica: loaded once in its process."""
    cache_dir, token = settings.huggingface_hub_cache, settings.hf_token
    folders = {name: resolve(name, revision=settings.revision, cache_dir=cache_dir, token=token) for name in models}
    return build_state(folders, settings, settings.keys())


def application(models: str | Sequence[str], settings: Settings | None = None, **deployment: Any) -> serve.Application:
    """The server as a Ray Serve application: every route over HTTP, and `encode` for calls from other deployments.

        from ray import serve
        from fastbert.serve.ray_serve import application

        embedder = application("sentence-transformers/all-MiniLM-L6-v2", num_replicas=4,
                               ray_actor_options={"num_cpus": 4})
        handle = serve.run(embedder)
        vectors = handle.encode.remote(["a text"], normalize_embeddings=True).result()

    Args:
        models: folders or hub ids, known to every node; the first is the default.
        settings: as of `fastbert serve`; what has to do with the network (port, TLS, timeouts of connections) is Ray's.
        deployment: of `serve.deployment`: `num_replicas`, `autoscaling_config`, `ray_actor_options`, ... A replica
            computes with as many threads as it has `num_cpus`, or on its GPU.
    """
    names = (models,) if isinstance(models, str) else tuple(models)
    settings = settings or Settings()

    @serve.ingress(lambda: build_app(_state(names, settings)))
    class Encoders:
        """A replica: the server's application, and `encode` beside it; both fill the same batches."""

        async def encode(
            self,
            texts: Sequence[str],
            prompt_name: str | None = None,
            normalize_embeddings: bool = False,
            model: str | None = None,
        ) -> np.ndarray:
            """(N, D) float32, what `Embedder.encode` gives."""
            chosen = _state(names, settings).model(model)
            if chosen.served.kind != "embedding":
                raise WrongModel(f"{chosen.name} is a {chosen.served.kind} model: it has no vectors of texts")
            if not texts:
                return np.empty((0, chosen.served.dimension or 0), np.float32)
            encoded = await chosen.tokens.encode(list(texts), prompt=chosen.prompt(prompt_name))
            output = "unit" if normalize_embeddings else "vectors"
            work = Work(encoded.ids, encoded.type_ids, output, prompt_length=encoded.prompt_length)
            return np.stack((await chosen.batcher.submit(work)).values)

    # Ray sends a replica five requests at a time unless told otherwise: no batch would ever be full.
    options = {"name": "fastbert", "max_ongoing_requests": settings.max_concurrent_requests, **deployment}
    return serve.deployment(**options)(Encoders).bind()
