"""From names and settings to a running server: load, name, wire the series, serve."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import fastbert
from fastbert.serve.cache import Cache
from fastbert.serve.metrics import Gauge
from fastbert.serve.models import Model, load
from fastbert.serve.records import configure
from fastbert.serve.security import Keys
from fastbert.serve.series import Series
from fastbert.serve.server import serve
from fastbert.serve.settings import Settings
from fastbert.serve.state import State

_LONE_S = 8e-3  # that the event loop may stand still, where one client asks for one short text after another
_BUILD = ("version", "device", "dtype", "model", "sha")


def launch(folders: Mapping[str, Path], settings: Settings, keys: Sequence[str]) -> bool:
    """Load the models of these names and folders, serve until a signal; whether all that was accepted was answered."""
    configure(settings.structured_logs, settings.log_level)
    if settings.unix_socket is None:
        _check_address(settings.host, settings.port)
    return serve(build_state(folders, settings, keys))


def _check_address(host: str, port: int) -> None:
    """Raise OSError where the server could not listen: now, not when the models are loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # elsewhere it takes an address from who has it
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        why = f"cannot listen on {host}, port {port}: {error.strerror}; use another --port (0 = any free one) or --host"
        raise OSError(why) from error


def build_state(folders: Mapping[str, Path], settings: Settings, keys: Sequence[str] = ()) -> State:
    """Loaded models with their series, ready for `fastbert.serve.app.build_app`.

    Args:
        folders: by the name each was asked for; the first is the default.

    Raises:
        ValueError: the names of `served_model_name` are not as many as the models, or two are the same.
    """
    names = settings.served_model_name or tuple(folders)
    if len(names) != len(folders):
        raise ValueError(f"{len(names)} served model names for {len(folders)} models: give one for each")
    started = time.monotonic()
    cache = Cache(settings.cache_mb * 2**20) if settings.cache_mb else None
    models = [
        load(name, id, folder, settings, cache) for name, (id, folder) in zip(names, folders.items(), strict=True)
    ]
    series = Series(max(model.served.max_length for model in models), settings.compat)
    state = State(settings, models, series, Keys(keys, settings.protect_metrics), cache, started=started)
    for model in models:
        model.batcher.on_batch = series.batch
        if len(models) == 1 and model.served.device.type == "cpu":  # models do not wait for each other; no GPU tried it
            model.batcher.lone_s = _LONE_S
    series.more += _of_models(state)
    return state


def _of_models(state: State) -> list[Gauge]:
    """Series that are read from the models when somebody asks."""
    models = state.models

    def counted(key: str, name: str, help: str) -> Gauge:
        read = lambda: sum(getattr(model.batcher.counters, key) for model in models)  # noqa: E731
        return Gauge(f"fastbert_{name}_total", help, read, kind="counter")

    def each(name: str, help: str, read: Callable[[Model], float], kind: str = "gauge") -> Gauge:
        return Gauge(f"fastbert_{name}", help, lambda: {(m.name,): read(m) for m in models}, ["model"], kind)

    def cached(key: str, help: str) -> Gauge:
        read = lambda: 0 if state.cache is None else getattr(state.cache, key)  # noqa: E731
        return Gauge(f"fastbert_cache_{key}_total", help, read, kind="counter")

    versions = {
        (fastbert.__version__, str(m.served.device), m.served.dtype, m.name, m.served.sha or "") for m in models
    }
    return [
        Gauge("te_queue_size", "Requests that wait.", lambda: sum(m.batcher.queue_requests for m in models)),
        Gauge("fastbert_inflight_requests", "Requests in the house.", lambda: state.inflight),
        each("queue_tokens", "Tokens that wait.", lambda m: m.batcher.queue_tokens),
        each("queue_oldest_seconds", "Age of the oldest request that waits.", lambda m: m.batcher.oldest_s),
        each("batch_padding_ratio", "Share of padding, had batches been padded.", lambda m: m.padding_saved or 0.0),
        cached("hits", "Inputs that were in the cache."),
        cached("misses", "Inputs that were not."),
        counted("deadline_exceeded", "deadline_exceeded", "Requests past their deadline."),
        counted("overloaded", "overloaded", "Requests refused for want of room."),
        counted("nonfinite", "nonfinite", "Requests with NaN or infinite outputs."),
        counted("oom_splits", "oom_splits", "Forward passes split for want of memory."),
        Gauge("fastbert_build_info", "What is served.", lambda: dict.fromkeys(versions, 1), _BUILD),
    ]
