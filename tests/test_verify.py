"""The parity certificate passes what is right, fails what is wrong, and with a saved reference needs no peer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from typer.testing import CliRunner

from fastbert import verify
from fastbert.cli import app
from fastbert.models import BertModel

SEQUENCES = [[5, 6, 7, 8], [9], [10] * 12]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, initializer_range=0.1,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_every_path_passes_and_lists_every_layer(folder):
    seen = []
    lines = verify.verify(folder, verify.Reference.compute(folder, SEQUENCES), seen.append)
    assert seen == list(dict.fromkeys(line.path for line in lines))
    assert {path.split()[0] for path in seen} == {"float32", "bfloat16", "int8"}
    for path in seen:
        expected = ["2", "vector"] if path.endswith("engine") else ["0", "1", "2", "vector"]
        assert [line.layer for line in lines if line.path == path] == expected
    assert all(line.passed for line in lines if not line.path.startswith("int8"))
    assert all(0 < line.rmse <= line.max_abs for line in lines if line.layer != "0")


@pytest.mark.parametrize("break_it", ["eps", "gelu", "nan"])
def test_a_wrong_model_fails(folder, break_it):
    reference = verify.Reference.compute(folder, SEQUENCES)
    model = BertModel.from_pretrained(folder)
    assert all(line.passed for line in verify.compare("p", "float32", verify.run(model, SEQUENCES), reference))
    if break_it == "eps":
        model.encoder.layer[1].output_LayerNorm.eps = 1e-3
    elif break_it == "gelu":
        model.encoder.layer[1].feed_forward.act = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    else:
        model.encoder.layer[1].output_LayerNorm.bias.data[0] = float("nan")
    lines = verify.compare("p", "float32", verify.run(model, SEQUENCES), reference)
    assert [line.passed for line in lines] == [True, True, False, False]


def test_saved_reference_is_the_same_and_needs_no_transformers(folder, tmp_path):
    reference = verify.Reference.compute(folder, SEQUENCES)
    reference.save(tmp_path / "reference.safetensors")
    again = verify.Reference.load(tmp_path / "reference.safetensors")
    assert again.sequences == SEQUENCES
    assert again.allowed == reference.allowed
    assert all(torch.equal(a, b) for a, b in zip(again.exact, reference.exact, strict=True))
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from pathlib import Path; from fastbert import verify\n"
        "lines = verify.verify(Path(sys.argv[1]), verify.Reference.load(Path(sys.argv[2])))\n"
        "print(all(line.passed for line in lines if 'int8' not in line.path))"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "reference.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "True"


def test_a_foreign_file_is_no_reference(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="is not a reference"):
        verify.Reference.load(tmp_path / "x.safetensors")


def test_command_on_real_weights(minilm, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("A ferry in the storm.\nThe boat did not sail, and nobody minded much.\n")
    names = {"--output": "certificate.json", "--plot": "error.png", "--save": "reference.safetensors"}
    options = [x for option, name in names.items() for x in (option, str(tmp_path / name))]
    runner = CliRunner()
    result = runner.invoke(app, ["verify", str(minilm), "--input", str(texts), *options])
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    document = json.loads((tmp_path / "certificate.json").read_text())
    assert document["passed"]
    assert document["texts"] == 2
    assert len({line["layer"] for line in document["lines"]}) == 8
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")

    reference = verify.Reference.load(tmp_path / "reference.safetensors")
    reference.exact[3][0, 0] += 1e-3
    reference.save(tmp_path / "reference.safetensors")
    result = runner.invoke(app, ["verify", str(minilm), "--against", str(tmp_path / "reference.safetensors")])
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert runner.invoke(app, ["verify", str(minilm), "--against", "x", "--save", "y"]).exit_code == 2
