"""The command line as a person uses it: files good and bad, exit codes, formats, the demo."""

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import orthokit as ok
from orthokit.checks import install
from orthokit.cli import main


@pytest.fixture
def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Linear(16, 4))


@pytest.fixture
def checkpoint(tmp_path, network):
    torch.save({"model": network.state_dict(), "epoch": 3}, tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_report(tmp_path, network, capsys, suffix):
    path = tmp_path / f"net{suffix}"
    save_file(network.state_dict(), path) if suffix == ".safetensors" else torch.save(network.state_dict(), path)
    assert main(["report", str(path), "--format", "json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    expected = json.loads(ok.report(network).to_json())
    assert actual["layers"] == expected["layers"]


def test_report_formats(checkpoint, capsys, tmp_path):
    assert main(["report", str(checkpoint), "--layers", "0", "1"]) == 0
    out = capsys.readouterr().out
    assert "wide (1)" in out
    assert "tall (1)" in out
    assert main(["report", str(checkpoint), "--format", "csv", "--picture", str(tmp_path / "p.png")]) == 0
    assert capsys.readouterr().out.startswith("layer,kind,groups,o,n,")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_plan(checkpoint, network, capsys):
    assert main(["plan", str(checkpoint), "--share", "0.1", "--floor", "4", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(ok.plan(network, ok.share(0.1, floor=4)).to_json())
    assert main(["plan", str(checkpoint), "--feasible", "--linears"]) == 0
    assert "feasible()" in capsys.readouterr().out
    assert main(["plan", str(checkpoint)]) == 0
    assert "strict orthogonality" in capsys.readouterr().out


def test_list(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(penalty.__name__ in out for penalty in ok.PENALTIES)
    for penalty in ok.PENALTIES:
        assert main(["list", penalty.__name__.lower()]) == 0
        out = capsys.readouterr().out
        assert f"orthokit.{penalty.__name__}(" in out
        for part in (
            "Value.",
            "Prefers.",
            "Strength and schedule.",
            "Cost.",
            "Interactions.",
            "claims.",
            "Reproduced",
            "Not reproduced.",
        ):
            assert part in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"orthokit {ok.__version__}\n"


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def whole_model(path):
    torch.save(nn.Linear(2, 2), path)


def truncated(path):
    torch.save({"a.weight": torch.randn(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:20_000])


def malicious(path):
    class Evil:
        def __reduce__(self):
            return print, ("executed!",)

    path.write_bytes(pickle.dumps(Evil()))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("absent.pt", lambda p: None, "is not there"),
        ("folder.pt", lambda p: p.mkdir(), "is a folder with 0 files of weights"),
        ("empty.pt", lambda p: p.write_bytes(b""), "is empty (0 bytes)"),
        ("text.pth", lambda p: p.write_text("hello"), "is a text, not a saved network"),
        ("cut.pt", truncated, "was cut off or damaged"),
        ("whole.pt", whole_model, "save model.state_dict() instead"),
        ("evil.pt", malicious, "a pickle of a builtins.print, of which nothing is executed"),
        ("list.pt", lambda p: torch.save([1, 2], p), "holds a list, not a state dict"),
        ("none.pt", lambda p: torch.save({}, p), "no layer's weight in this state dict"),
        ("norms.pt", lambda p: torch.save(nn.BatchNorm2d(3).state_dict(), p), "no layer's weight in this state dict"),
        ("ints.pt", lambda p: torch.save({"a.weight": torch.ones(2, 2, 1, 1).int()}, p), "no layer's weight in this state dict"),
        ("bad.safetensors", lambda p: p.write_bytes(b"\xff" * 100), "not a safetensors file"),
        ("empty.safetensors", lambda p: p.write_bytes(b""), "is empty (0 bytes)"),
    ],
)
@pytest.mark.parametrize("command", ["report", "plan"])
def test_bad_files(tmp_path, capsys, command, name, make, message):
    make(tmp_path / name)
    assert main([command, str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert "executed!" not in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "sop"], "no penalty 'sop'; there are SO, DSO"),
        (["plan", "FILE", "--share", "2"], "q must be a finite number in [0, 1]; got 2"),
        (["plan", "FILE", "--share", ".1", "--fraction", ".1"], "choose one of"),
        (["plan", "FILE", "--floor", "3"], "--floor does nothing without"),
        (["report", "FILE", "--layers", "x*"], "matches no layer"),
        (["report", "FILE", "--picture", "p.xyz"], "xyz"),
        (["demo", "--data", "cifar10"], "--data cifar10 and --root DIR go together"),
        (["demo", "--root", "."], "go together"),
        (["demo", "--seeds", "0"], "--seeds must be at least 1"),
        (["train", "r.toml", "--name", "../../x"], "--name is a folder below --out"),
        (["train", "r.toml", "--name", "/abs"], "--name is a folder below --out"),
        (["train", "r.toml", "--name", ".."], "--name is a folder below --out"),
        (["train", "r.toml", "--devices", "-1"], "--devices must be at least 1"),
        (["train", "r.toml", "--threads", "100000"], "--threads must be at most 1,024"),
        (["demo", "--data", "cifar10", "--root", "nowhere"], "no CIFAR-10 in nowhere"),
    ],
)
def test_bad_arguments(checkpoint, capsys, arguments, message):
    assert main([str(checkpoint) if a == "FILE" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_help_and_unknown_commands(capsys):
    for arguments in ([], ["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    capsys.readouterr()
    for arguments in (["nonsense"], ["train", "--jobs", "\x1b[31m"], ["study"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["report"]) == 2
    assert "name a checkpoint" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(checkpoint, forked):
    command = [sys.executable, "-m", "orthokit.cli", "report", str(checkpoint), "--format", "csv"]
    for count in (0, 1):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.read(count) == "l"[:count]
        process.stdout.close()
        with process.stderr:
            assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_one_odd_entry_does_not_spoil_the_report(tmp_path, capsys):
    state = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 3)).state_dict()
    state |= {"q.weight": torch.ones(3, 3).char(), "s.weight": torch.eye(3).to_sparse(), "e.weight": torch.zeros(0, 3)}
    state["x[/b][red].weight"] = torch.eye(4)
    state["self"] = {"inner": state}
    torch.save({"a": state}, tmp_path / "odd.pt")
    assert main(["report", str(tmp_path / "odd.pt")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "x[/b][red]" in out
    assert "left out: q.weight (of type int8), s.weight (sparse), e.weight (empty)" in out


def test_broken_weights_in_a_picture(tmp_path, capsys):
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).state_dict()
    state["0.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    assert main(["report", str(tmp_path / "nan.pt"), "--picture", str(tmp_path / "p.png")]) == 0
    state["1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    assert main(["report", str(tmp_path / "nan.pt"), "--picture", str(tmp_path / "p.png")]) == 2
    assert "nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize("cut", range(0, 700, 50))
def test_damaged_pickles(tmp_path, capsys, cut):
    torch.save({"a.weight": torch.eye(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[min(cut, len(content) - 1)] ^= 0xFF
    (tmp_path / "a.pt").write_bytes(content)
    assert main(["report", str(tmp_path / "a.pt")]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_terminal_without_greek_letters(checkpoint, forked):
    command = [sys.executable, "-m", "orthokit.cli", "report", str(checkpoint)]
    run = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0
    assert b"wide" in run.stdout


def test_list_into_a_closed_pipe():
    command = f"{sys.executable} -m orthokit.cli list | head -n 1"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib.figure"])
def test_missing_extras_are_named(monkeypatch, checkpoint, capsys, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    if module.startswith("sklearn"):
        arguments = ["demo", "--out", str(tmp_path)]
    else:
        arguments = ["report", str(checkpoint), "--picture", str(tmp_path / "p.png")]
    assert main(arguments) == 2
    assert install("lab") in capsys.readouterr().err.replace("\n", " ")


def test_an_extra_is_installed_from_a_clone_and_from_a_wheel(tmp_path):
    wheel, clone = tmp_path / "lib/python3/site-packages/orthokit", tmp_path / "my clone/src/orthokit"
    assert install("lab", wheel) == "pip install 'orthokit[lab]'"  # pip keeps what is installed, and adds what is missing
    clone.mkdir(parents=True)
    (tmp_path / "my clone/pyproject.toml").touch()
    pip, verb, editable, expected = shlex.split(install("lab", clone))
    assert (pip, verb, editable, expected) == ("pip", "install", "-e", f"{tmp_path}/my clone[lab]")


def test_every_message_about_an_extra_asks_for_that_command():
    sources = {path: path.read_text("utf-8") for path in Path(ok.__file__).parent.rglob("*.py")}
    assert [path.name for path, text in sources.items() if "pip install" in text and "orthokit[" in text] == ["checks.py"]
    extras = {extra for text in sources.values() for extra in re.findall(r"\{install\('(\w+)'\)\}", text)}
    assert extras == {"lab", "lightning", "ray", "transformers"}
    assert extras <= set(metadata("orthokit").get_all("Provides-Extra"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    ],
    ids=["python", "processor", "accelerator"],
)
def test_too_little_memory_is_one_line(monkeypatch, checkpoint, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ok, "report", fail)
    assert main(["report", str(checkpoint)]) == 2
    assert "out of memory; try fewer --jobs" in capsys.readouterr().err
    monkeypatch.setattr(ok, "report", lambda *_, **__: fail_otherwise())
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["report", str(checkpoint)])


def fail_otherwise():
    raise RuntimeError("a fault of ours")


def test_a_strategy_whose_package_is_missing_is_one_line():
    from orthokit.lab.training.hardware import Hardware

    with pytest.raises(ValueError, match="--strategy deepspeed cannot be used here"):
        Hardware(device="cpu", strategy="deepspeed").fabric("32-true")


@pytest.mark.parametrize("width", ["60", "80", "120"])
def test_a_narrow_terminal_leaves_columns_out_and_names_in(checkpoint, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    assert main(["report", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *layer +o +n ", out, re.MULTILINE)
    assert re.search(r"^ *1 +16 +8 ", out, re.MULTILINE)
