"""fastbert doctor: the machine is read right, a broken installation is found, and the exit code says so."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fastbert import doctor, machine, native
from fastbert.cli import app
from fastbert.cli import doctor as cli


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"": "max 100000", "a": "150000 100000", "a/b": "max 100000"}, 1.5),
        ({"": "max 100000", "a": "400000 100000", "a/b": "50000 100000"}, 0.5),
        ({"": "max 100000"}, None),
        ({}, None),
    ],
)
def test_quota_of_control_groups(tmp_path, quotas, expected):
    """Version 2: the tightest level on the way to the process's group counts."""
    for path, text in quotas.items():
        write(tmp_path / "cgroup" / path, cpu__max=text + "\n")
    (tmp_path / "self").write_text("0::/a/b\n")
    assert machine.cpu_quota(tmp_path / "cgroup", tmp_path / "self") == expected


def test_quota_of_version_1(tmp_path):
    group = tmp_path / "cgroup" / "cpu,cpuacct" / "docker" / "x"
    write(group, cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    write(group.parent, cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    (tmp_path / "self").write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n")
    assert machine.cpu_quota(tmp_path / "cgroup", tmp_path / "self") == 2.5


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"), [(8, None, 8), (3, None, 3), (8, 1.5, 2), (8, 0.2, 1), (2, 6.0, 2)]
)
def test_usable_cores(affinity, quota, usable):
    assert machine.Cpu("x", "", (), 8, affinity, quota).usable == usable


def test_openmp_runtimes(tmp_path):
    lines = [
        "7f00-7f01 r-xp 00000000 fe:00 11 /opt/torch/lib/libgomp.so.1",
        "7f01-7f02 r--p 00000000 fe:00 11 /opt/torch/lib/libgomp.so.1",
        "7f02-7f03 r-xp 00000000 fe:00 12 /opt/other lib/libiomp5.so",
        "7f03-7f04 r-xp 00000000 fe:00 13 /usr/lib/libompl.so",
        "7f04-7f05 rw-p 00000000 00:00 0 ",
    ]
    (tmp_path / "maps").write_text("\n".join(lines))
    assert machine.openmp_runtimes(tmp_path / "maps") == ["/opt/other lib/libiomp5.so", "/opt/torch/lib/libgomp.so.1"]


def test_gpus_that_the_driver_sees(tmp_path):
    write(tmp_path / "0000:01:00.0", information="Model: \t\t NVIDIA H100\nIRQ: 1\n")
    assert machine.nvidia_gpus(tmp_path) == ["NVIDIA H100"]
    assert machine.nvidia_gpus(tmp_path / "none") == []


def findings(report):
    return {(f.broken, f.what.split(":")[0].split(" (")[0]) for f in report.findings}


@pytest.fixture
def sound(monkeypatch):
    """What this process or machine has beside fastbert is no finding: other tests load libraries with OpenMP runtimes
    of their own (scikit-learn, ctranslate2), and a machine may hold a GPU that its torch cannot use."""
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1"])
    monkeypatch.setattr(machine, "nvidia_gpus", list)
    monkeypatch.delenv("FASTBERT_BACKEND", raising=False)


def test_a_sound_installation(sound, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.cpu().usable)
    report = doctor.examine(measure=False)
    assert not report.broken, report.findings
    assert any(line.startswith("cpu float16: ") for line in report.reasons)
    assert report.versions["torch"] == torch.__version__
    assert set(report.ops["attention"]["cpu"]) == {"float32", "bfloat16", "float16"}
    if native.available():
        assert report.engines["cpu float32"].startswith("cpu engine: float32"), report.engines
        assert report.engines["cpu int8"].startswith("cpu engine: int8"), report.engines
        assert set(report.engines) >= {"cpu bfloat16", "cpu auto"}
        assert report.ops["attention"]["cpu"]["float32"] == "native"


def test_what_is_broken_is_found(monkeypatch):
    def no_extension():
        raise ImportError("made up")

    monkeypatch.setattr(native, "require", no_extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "nvidia_gpus", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(doctor, "_engines", dict)
    report = doctor.examine(measure=False)
    assert report.broken
    broken = {what for is_broken, what in findings(report) if is_broken}
    assert any("extension does not load" in what for what in broken)
    assert any(what.startswith("there is a GPU") for what in broken)


def test_two_openmp_runtimes_and_too_many_threads(monkeypatch):
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.cpu().usable + 3)
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    report = doctor.examine(measure=False)
    whats = [f.what for f in report.findings]
    assert report.broken == native.available()
    assert any("torch runs" in what and "may use" in what for what in whats)
    assert any(what.startswith("FASTBERT_BACKEND=reference overrides") for what in whats)


def test_measured_numbers_are_of_one_run():
    """Of the CPU, and of the GPU where there is one."""
    report = doctor.examine()
    rows = {what: row for what, row in report.measured.items() if "tokens_s" in row}
    assert {what.split()[0] for what in rows} == set(doctor._devices())
    assert rows.keys() >= {"cpu float32", "cpu bfloat16"}
    for row in rows.values():
        flop_a_token = row["encoder_gflop_s"] * 1e9 / row["tokens_s"]
        assert 2 * 6 * 12 * 384**2 < flop_a_token < 1.2 * 2 * 6 * 12 * 384**2
        assert row["peak_gflop_s"] >= row["gemm_gflop_s"]
    assert report.measured["cpu copy"]["gb_s"] > 0


@pytest.mark.parametrize("silence", [False, True])
def test_reasons_name_who_lacks_what(monkeypatch, silence):
    """Every op and dtype has one reason, and a device without a default says that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if silence:
        monkeypatch.setattr(doctor.dispatch, "DEFAULT", {})
        doctor.dispatch._choose.cache_clear()
    try:
        reasons = doctor._reasons()
    finally:
        doctor.dispatch._choose.cache_clear()
    assert len(reasons) >= 3
    if silence:
        assert all("no backend is a default on cpu yet (every op)" in line for line in reasons)
    elif native.available():
        (has,) = [line for line in reasons if line.startswith("cpu float32: native is the default on cpu and has it (")]
        assert {"attention", "add_layer_norm", "embed", "gelu"} <= set(has[has.index("(") + 1 : -1].split(", "))
        assert any(line.startswith("cpu float32: native has no op") and "linear_gelu" in line for line in reasons)
        assert "cpu float16: native has no op of float16 here (every op)" in reasons


def test_a_process_of_its_own_agrees_with_its_exit_code():
    """As users run it: nothing else is loaded, so the extension and torch share one OpenMP runtime."""
    run = subprocess.run(
        [sys.executable, "-m", "fastbert", "doctor", "--no-measure", "--json"], capture_output=True, text=True
    )
    document = json.loads(run.stdout)
    broken = [finding["what"] for finding in document["findings"] if finding["broken"]]
    assert run.returncode == (1 if broken else 0), run.stderr
    assert not any("OpenMP" in what for what in broken), broken


def no_extension():
    raise ImportError("made up")


BROKEN = {
    "the native extension does not load: made up": [(native, "require", no_extension)],
    "2 OpenMP runtimes are loaded": [(machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])],
    "there is a GPU (NVIDIA H100), but torch": [(machine, "nvidia_gpus", lambda: ["NVIDIA H100"])],
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_breakage_by_itself_decides_the_exit_code(sound, monkeypatch, what):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_engines", dict)  # asks the extension
    if native.available():
        assert CliRunner().invoke(app, ["doctor", "--no-measure"]).exit_code == 0
    for place, name, value in BROKEN[what]:
        monkeypatch.setattr(place, name, value)
    run = CliRunner().invoke(app, ["doctor", "--no-measure"])
    assert run.exit_code == 1
    assert f"broken: {what}" in " ".join(run.output.split())


@pytest.mark.skipif(sys.platform != "linux" or not native.available(), reason="reads /proc, loads the extension")
def test_a_second_openmp_runtime_is_seen(tmp_path):
    """As a process has it: two copies of one library are two runtimes."""
    native.require()
    runtime = machine.openmp_runtimes()[0]
    second = tmp_path / "libiomp5.so"
    second.write_bytes(Path(runtime).read_bytes())
    load = f"import ctypes, torch; ctypes.CDLL({str(second)!r})"  # after torch, which else would take this one
    run = f"{load}; from fastbert.cli import app; app(['doctor', '--no-measure'])"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "broken: 2 OpenMP runtimes are loaded" in " ".join(done.stdout.split())


@pytest.mark.parametrize("width", [80, 140])
def test_what_a_terminal_shows(sound, monkeypatch, width):
    """No name is cut and no command broken, also on a machine with GPUs."""
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    report = doctor.examine(measure=False)
    for by_device in report.ops.values():
        by_device["cuda"] = dict.fromkeys(by_device["cpu"], "triton")
    report.machine["gpus"] = ["NVIDIA H100"] * 8
    rates = ("peak_gflop_s", "gemm_gflop_s", "encoder_gflop_s", "tokens_s", "base_tokens_s")
    report.measured.update({"cuda copy": {"gb_s": 3000.0}, "cuda bfloat16": dict.fromkeys(rates, 812345.0)})
    with io.StringIO() as file:
        cli._show(Console(file=file, width=width, markup=False), report)
        shown = file.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown
    assert "8 x NVIDIA H100\n" in re.sub(" +\n", "\n", shown)
    words = set(re.split(r"\s*[│┃\n]\s*|  +", shown))
    assert {*report.ops, "triton", "812.35", "812,345", "100%", "op on cuda"} <= words
    assert re.search(r"^broken:  2 OpenMP runtimes are loaded .*\n {9}\S", shown, re.MULTILINE)


def test_command(sound, monkeypatch):
    run = CliRunner().invoke(app, ["doctor", "--no-measure", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["machine"]["usable"] >= 1
