"""Logs: plain lines, or one JSON object a line. Keys and texts are never in them."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from fastbert.serve.call import Call

_requests = logging.getLogger("fastbert.serve.requests")

_LEVELS = {"trace": logging.DEBUG, "warn": logging.WARNING}


class JSONLines(logging.Formatter):
    """A record as one JSON object: timestamp, level, target, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {
            "timestamp": moment,
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(structured: bool, level: str) -> None:
    """Set up the loggers of the server and of uvicorn; structured logs have a line for every request."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JSONLines() if structured else plain)
    number = _LEVELS.get(level.lower()) or getattr(logging, level.upper())
    logging.captureWarnings(True)
    for name in ("fastbert.serve", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(number)
    logging.getLogger("uvicorn").setLevel(max(number, logging.WARNING))  # its start and stop are told by us
    _requests.setLevel(number if structured or number <= logging.DEBUG else logging.WARNING)


def log_request(call: Call, status: int) -> None:
    """One line for a request, where lines for requests are wanted."""
    if not _requests.isEnabledFor(logging.INFO):
        return
    total_ms = (time.perf_counter() - call.started) * 1e3
    fields: dict[str, Any] = {
        "request_id": call.id,
        "method": call.method,
        "path": call.path,
        "status": status,
        "total_ms": round(total_ms, 3),
        "tokens": call.tokens,
        **{f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in call.stages.items()},
    }
    if (trace := call.sent.get("traceparent", "").split("-")) and len(trace) == 4:
        fields["trace_id"] = trace[1]
    line = f"{call.method} {call.path} {status} {total_ms:.1f} ms"
    _requests.info("%s", line, extra={"fields": fields})
