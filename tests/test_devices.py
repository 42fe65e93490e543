"""A device that is not here is refused at once by every command that takes one, with what is here and what to do."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from fastbert.cli import app
from fastbert.embedder import Embedder
from fastbert.engine.dtypes import resolve_device

# Files and models that do not exist: nobody looks for them.
COMMANDS = {
    "embed": ["-m", "no/model", "a text"],
    "serve": ["no/model"],
    "finetune": ["classification", "--train", "none.csv", "--out", "out"],
    "pretrain": ["--data", "none.txt", "--out", "out"],
}


@pytest.fixture(params=["cpu build", "no gpu", "two gpus"])
def refused(request, monkeypatch):
    """(a device that is not here, what is said of it) on three kinds of machine."""
    built = request.param != "cpu build"
    count = 2 if request.param == "two gpus" else 0
    monkeypatch.setattr(torch.version, "cuda", "13.0" if built else None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return {
        "cpu build": ("cuda", "device 'cuda' is wanted, but torch .* is built for CPUs alone: use 'cpu', or install"),
        "no gpu": ("cuda:1", "device 'cuda:1' is wanted, but torch .* sees no GPU: use 'cpu', or see what nvidia-smi"),
        "two gpus": ("cuda:2", "device 'cuda:2' is wanted, but torch sees 2 GPUs: use cuda:0 or cuda:1"),
    }[request.param]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_a_device_that_is_not_here(command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device, said = refused
    result = CliRunner().invoke(app, [command, *COMMANDS[command], "--device", device])
    assert result.exit_code == 1
    assert re.match(f"error: {said}", result.stderr)
    assert not list(tmp_path.iterdir())


def test_so_does_the_library(refused):
    device, said = refused
    with pytest.raises(ValueError, match=said):
        Embedder.from_pretrained("no/model", device=device)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_device(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, *COMMANDS[command], "--device", "gpu"])
    assert (result.exit_code, result.stderr) == (1, "error: device 'gpu' is no device: use 'cpu', 'cuda' or 'cuda:1'\n")


def test_devices_that_are_here(monkeypatch):
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device(None) == torch.device("cuda")
