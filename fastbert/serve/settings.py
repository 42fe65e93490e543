"""Every setting of the server: one dataclass from which the command line, its help and the environment names are made.

Where text-embeddings-inference has the setting, its flag and environment name work too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _setting(default: Any, panel: str, help: str, *flags: str, env: str = "", **more: Any) -> Any:
    """A field: its panel in the help, its text there, its flags (none = from the name), TEI's environment name."""
    return field(default=default, metadata={"panel": panel, "help": help, "flags": flags, "env": env, **more})


@dataclass(frozen=True)
class Settings:
    """How to serve. Times are in seconds, sizes in bytes or tokens, as the names say.

    The environment name of a setting is `FASTBERT_<NAME>`, and TEI's where it has one. TEI's `HOSTNAME` is not read:
    shells and containers set it to the machine's own name, which would open the server to the network unasked.
    """

    revision: str | None = _setting(None, "Model", "Branch, tag or commit on the hub.", env="REVISION")
    served_model_name: tuple[str, ...] = _setting(
        (), "Model", "Name in answers and in the `model` field; one for each model.", env="SERVED_MODEL_NAME"
    )
    dtype: str | None = _setting(
        None, "Model", "auto, float32, bfloat16, float16 (GPU) or int8 (CPU); default: float32 on a CPU.", env="DTYPE"
    )
    device: str | None = _setting(None, "Model", "cpu, cuda, cuda:1; default: a GPU if there is one.")
    pooling: str | None = _setting(
        None, "Model", "cls, mean, max, last-token or splade instead of what the model's files say.", env="POOLING"
    )
    dense_path: str | None = _setting(
        None, "Model", "Folder, in the model's, of a Dense module to use instead of its own.", env="DENSE_PATH"
    )
    max_seq_length: int | None = _setting(None, "Model", "Tokens a text; longer ones are cut.", min=1)
    auto_truncate: bool = _setting(
        True, "Model", "Cut texts that are too long, where the request does not say.", env="AUTO_TRUNCATE"
    )
    default_prompt_name: str | None = _setting(
        None, "Model", "Prompt of the model's files put before texts.", env="DEFAULT_PROMPT_NAME"
    )
    default_prompt: str | None = _setting(None, "Model", "Words put before every text.", env="DEFAULT_PROMPT")
    hf_token: str | None = _setting(
        None, "Model", "Token for the hub.", "--hf-token", "--hf-api-token", env="HF_TOKEN HF_API_TOKEN", secret=True
    )
    huggingface_hub_cache: Path | None = _setting(None, "Model", "The hub's cache.", env="HUGGINGFACE_HUB_CACHE")  # noqa: RUF009

    threads: int | None = _setting(None, "Speed", "CPU threads of a forward pass; default: what is allotted.", min=1)
    keep_weights: bool = _setting(
        True, "Speed", "Keep the weights that the CPU engine has packed; without them a model takes half the memory."
    )
    tokenization_workers: int | None = _setting(
        None, "Speed", "Threads that tokenise.", env="TOKENIZATION_WORKERS", min=1
    )
    max_batch_tokens: int | None = _setting(
        None, "Speed", "Tokens of one forward pass; default: by device.", env="MAX_BATCH_TOKENS", min=1
    )
    max_batch_requests: int | None = _setting(
        None, "Speed", "Texts of one forward pass.", env="MAX_BATCH_REQUESTS", min=1
    )
    target_p99_ms: float | None = _setting(None, "Speed", "Size forward passes for this latency.", min=0.1)
    max_queue_tokens: int | None = _setting(
        None, "Speed", "Tokens that may wait; a request beyond is answered 429 at once.", min=1
    )
    cache_mb: int = _setting(0, "Speed", "Memory for exact repeats of inputs; 0 = none.", min=0)
    warmup: bool = _setting(True, "Speed", "Compute the shapes to come before the server is ready.")

    max_concurrent_requests: int = _setting(
        512, "Limits", "Requests in the house at once; beyond: 429.", env="MAX_CONCURRENT_REQUESTS", min=1
    )
    max_client_batch_size: int = _setting(2048, "Limits", "Inputs of one request.", env="MAX_CLIENT_BATCH_SIZE", min=1)
    payload_limit: int = _setting(8_000_000, "Limits", "Bytes of one body.", env="PAYLOAD_LIMIT", min=1)
    request_timeout_s: float = _setting(
        60.0, "Limits", "Deadline of a request that names none in x-deadline-ms; then 504.", min=0.001
    )
    header_timeout_s: float = _setting(10.0, "Limits", "Time for a request's headers to arrive.", min=0.001)
    body_timeout_s: float = _setting(30.0, "Limits", "Time for its body to arrive; then 408.", min=0.001)
    write_timeout_s: float = _setting(30.0, "Limits", "Time without progress in reading an answer.", min=0.001)
    keep_alive_s: float = _setting(75.0, "Limits", "Time an idle connection is kept.", min=0)

    host: str = _setting("127.0.0.1", "Network", "Address to listen on; 0.0.0.0 = all.", "--host", "--hostname")
    port: int = _setting(3000, "Network", "Port; 0 = any that is free.", "--port", "-p", env="PORT", min=0, max=65535)
    unix_socket: Path | None = _setting(None, "Network", "Listen on this socket instead of a port.")  # noqa: RUF009
    ssl_certfile: Path | None = _setting(None, "Network", "TLS certificate (PEM).", exists=True)  # noqa: RUF009
    ssl_keyfile: Path | None = _setting(None, "Network", "TLS key (PEM).", exists=True)  # noqa: RUF009
    cors_allow_origin: tuple[str, ...] = _setting(
        (), "Network", "Origin that browsers may call from; * = any.", env="CORS_ALLOW_ORIGIN"
    )

    api_key: tuple[str, ...] = _setting((), "Security", "Key that requests must carry.", env="API_KEY", secret=True)
    api_key_file: Path | None = _setting(None, "Security", "File with a key a line.", exists=True)  # noqa: RUF009
    protect_metrics: bool = _setting(False, "Security", "Ask for the key on /metrics and /stats too.")

    compat: str = _setting(
        "openai", "Dialect", "`tei`: errors of /v1 flat, and counters, as TEI has them; `openai`: its envelope."
    )

    drain_grace_s: float = _setting(
        1.0, "Shutdown", "Time to serve on after SIGTERM with /ready at 503, so that traffic moves away.", min=0
    )
    drain_timeout_s: float = _setting(30.0, "Shutdown", "Time for accepted requests to finish.", min=0)

    log_format: str = _setting("text", "Logs", "text, or json with a line for every request.")
    json_output: bool = _setting(False, "Logs", "The same as --log-format json.", env="JSON_OUTPUT")
    log_level: str = _setting("info", "Logs", "debug, info, warning or error.", env="LOG_LEVEL")
    otlp_endpoint: str | None = _setting(
        None, "Logs", "Where to send traces (needs fastbert-engine[otel]).", env="OTLP_ENDPOINT"
    )
    otlp_service_name: str = _setting("fastbert.server", "Logs", "Service name of traces.", env="OTLP_SERVICE_NAME")

    def __post_init__(self) -> None:
        _one_of("compat", self.compat, ("openai", "tei"))
        _one_of("log_format", self.log_format, ("text", "json"))
        _one_of("log_level", self.log_level.lower(), ("trace", "debug", "info", "warning", "warn", "error"))
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("TLS needs both files: give --ssl-certfile and --ssl-keyfile, or neither")
        if self.default_prompt is not None and self.default_prompt_name is not None:
            raise ValueError("give --default-prompt or --default-prompt-name, not both")

    @property
    def structured_logs(self) -> bool:
        """Whether logs are JSON."""
        return self.json_output or self.log_format == "json"

    def keys(self) -> tuple[str, ...]:
        """All API keys, those of the file too.

        Raises:
            ValueError: an empty key, or a file without any: that would look protected and be open.
        """
        keys = list(self.api_key)
        if self.api_key_file is not None:
            lines = [line.strip() for line in self.api_key_file.read_text(encoding="utf-8").splitlines()]
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise ValueError(f"{self.api_key_file} has no key: write one a line, or leave out --api-key-file")
            keys += found
        if any(not key.strip() for key in keys):
            raise ValueError("an API key is empty: give a key, or leave out --api-key")
        return tuple(dict.fromkeys(keys))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(choices)}")
