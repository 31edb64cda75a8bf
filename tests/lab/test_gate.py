"""Gates and outputs of the command line: nothing passes unjudged, whoever reads the output, and no input is replaced."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import orthokit as ok
from orthokit.cli import main
from tiny import TINY

FAIL = ["--fail-if", "max_cos > 0.99"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copies():
    return {f"layer{index}.weight": torch.ones(3, 3) for index in range(30)}


def orthogonal():
    return {f"layer{index}.weight": torch.eye(4) for index in range(3)}


@pytest.mark.parametrize("form", ["table", "csv", "json"])
@pytest.mark.parametrize(("state", "status"), [(copies, 1), (orthogonal, 0)])
@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_closed_pipe_changes_no_verdict(folder, forked, form, state, status, closed):
    torch.save(state(), "x.pt")
    options = ["--format", form, "--junit", "j.xml", "--annotations", "github"]
    command = [sys.executable, "-m", "orthokit.cli", "report", "x.pt", *FAIL, *options]
    read, write = os.pipe()
    os.close(read)
    err = subprocess.DEVNULL if closed == "stdout" else write
    assert subprocess.run(command, stdout=write, stderr=err, check=False).returncode == status
    os.close(write)
    assert ElementTree.parse("j.xml").getroot().attrib["failures"] == str(30 * status)


def test_a_full_disk_keeps_no_verdict_back(folder, forked):
    torch.save(copies(), "x.pt")
    command = [sys.executable, "-m", "orthokit.cli", "report", "x.pt", *FAIL, "--junit", "j.xml"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert ElementTree.parse("j.xml").getroot().attrib["failures"] == "30"


@pytest.mark.parametrize("status", [0, 3, 4])
def test_the_status_of_any_command_survives_a_closed_pipe(monkeypatch, forked, status):
    def run(self, console):
        console.print("a line")
        console.write("another")
        print("a third")
        return status

    monkeypatch.setattr("orthokit.cli.evidence.Evaluate.run", run)
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "orthokit.cli", "evaluate", "runs"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (status, b"")


@pytest.mark.parametrize("option", ["html", "picture", "junit"])
@pytest.mark.parametrize("way", ["same", "link", "hard", "folder", "other", "part"])
def test_a_report_replaces_no_network(folder, capsys, option, way):
    torch.save(orthogonal(), "mine.pt")
    before = (folder / "mine.pt").read_bytes()
    (folder / "sub").mkdir()
    (folder / "link.out").symlink_to("mine.pt")
    os.link("mine.pt", "hard.out")
    torch.save(orthogonal(), "sub/model.pt")
    given = {"folder": "sub", "part": "mine.pt"}.get(way, "mine.pt")
    ways = {"same": "./sub/../mine.pt", "link": "link.out", "hard": "hard.out", "folder": "sub/model.pt"}
    output = ways.get(way, "sub/model.pt")
    gate = FAIL if option == "junit" else []
    assert main(["report", given, *gate, f"--{option}", output]) == 2
    assert "would replace" in capsys.readouterr().err
    assert (folder / "mine.pt").read_bytes() == before


@pytest.mark.parametrize("option", ["csv", "html", "latex", "markdown"])
def test_a_comparison_replaces_no_table(folder, capsys, option):
    text = "arm,seed,acc\n" + "".join(f"{arm},{seed},{seed}\n" for arm in ("none", "so") for seed in range(3))
    (folder / "a.csv").write_text(text)
    assert main(["compare", "a.csv", f"--{option}", str(folder / "a.csv")]) == 2
    assert main(["compare", "a.csv", "--latex" if option == "csv" else "--csv", "out", f"--{option}", "./out"]) == 2
    assert "name the same file" in capsys.readouterr().err
    assert (folder / "a.csv").read_text() == text
    assert main(["compare", "a.csv", f"--{option}", "out"]) == 0
    assert main(["compare", "a.csv", f"--{option}", "out"]) == 0


def float8(folder):
    save_file(orthogonal() | {"fc.weight": torch.eye(4).to(torch.float8_e4m3fn)}, folder / "x.safetensors")
    return "x.safetensors", "fc (quantized (float8_e4m3fn): nothing to judge)"


def one_part(folder):
    save_file(orthogonal(), folder / "model-00001-of-00002.safetensors")
    return "model-00001-of-00002.safetensors", "part 1 of 2"


def without_index(folder):
    one_part(folder)
    return ".", "1 of 2 parts"


def missing_part(folder):
    one_part(folder)
    weights = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return ".", "model-00002-of-00002.safetensors (a part that is missing"


def parametrized(folder):
    torch.save(orthogonal() | {"fc.parametrizations.weight.original": torch.eye(4)}, "x.pt")
    return "x.pt", "fc (parametrized in a way that is not recorded"


def packed(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, on quantized tensors
        quantized = torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8)
    torch.save(orthogonal() | {"fc._packed_params._packed_params": (quantized, None)}, "x.pt")
    return "x.pt", "packed, as quantized layers are"


@pytest.mark.parametrize(
    ("make", "by_name"), [(float8, 0), (parametrized, 0), (packed, 0), (one_part, 1), (without_index, 1), (missing_part, 1)]
)
def test_what_was_not_read_does_not_pass(folder, capsys, make, by_name):
    path, message = make(folder)
    assert main(["report", path, *FAIL, "--junit", "j.xml"]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "passed" not in err
    suite = ElementTree.parse("j.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("4", "1")
    assert len(ok.report(path).incomplete) == 1
    assert main(["report", path, *FAIL, "--layers", "layer*"]) == by_name


def test_a_layer_of_the_architecture_that_the_file_lacks_does_not_pass(folder, capsys):
    (folder / "gate_net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n"
    )
    torch.save({"0.weight": torch.eye(4), "0.bias": torch.zeros(4)}, "x.pt")
    sys.path.insert(0, str(folder))
    try:
        assert main(["report", "x.pt", "--model", "gate_net:net", *FAIL]) == 1
    finally:
        sys.path.remove(str(folder))
    assert "1 (not in the file: nothing to judge)" in capsys.readouterr().err


def test_a_whole_network_has_no_gap():
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)).state_dict()
    assert ok.report(state | {"embedding.weight": torch.ones(9, 3), "count": torch.ones(3).long()}).incomplete == {}


MODULE = """
import torch
from torch import nn
from torch.nn import functional as F

class Odd(nn.Conv2d):
    def forward(self, x):
        return x.sum() * self.weight.sum()

class Locked(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("locked")

class Small(nn.Module):
    def __init__(self, layer, features):
        super().__init__()
        self.layer, self.fc = layer, nn.Linear(features, 10)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))

NET = 3
def net(): return nn.Sequential(nn.Linear(4, 4), Odd(3, 4, 3))
def locked(): return nn.Sequential(Locked(4, 4))
def plain(): return nn.Sequential(nn.Linear(4, 4))
def odd(channels, classes): return Small(Odd(channels, 4, 3), channels)
def number(channels, classes): return 3
def broken(): return None + 1
"""


@pytest.fixture
def module(folder, monkeypatch):
    (folder / "gate_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    linear = {"0.weight": torch.eye(4), "0.bias": torch.zeros(4)}
    torch.save(linear | {"1.weight": torch.ones(4, 3, 3, 3), "1.bias": torch.ones(4)}, "odd.pt")
    torch.save(linear, "plain.pt")
    torch.save({name: value.to(torch.int8) for name, value in linear.items()}, "int8.pt")
    yield
    sys.modules.pop("gate_mine", None)


def is_one_line(capsys, message):
    *before, last = capsys.readouterr().err.splitlines()
    assert message in last
    assert all("importing" in line for line in before)


@pytest.mark.parametrize("command", ["report", "plan --linears"])
@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        ("plain.pt", "locked", "Sequential cannot be copied"),
        ("int8.pt", "plain", "weights must be real floating-point numbers; got torch.int8"),
        ("plain.pt", "NET", "has no function 'NET'"),
        ("plain.pt", "broken", "cannot be built on the meta device: TypeError"),
    ],
)
def test_modules_that_cannot_be_used_are_one_line(module, capsys, unchecked, command, file, make, message):
    assert main([*command.split(), file, "--model", f"gate_mine:{make}"]) == 2
    is_one_line(capsys, message)


def test_a_layer_whose_weight_cannot_be_read_is_one_line(module, capsys, unchecked):
    assert main(["report", "odd.pt", "--model", "gate_mine:net"]) == 2
    is_one_line(capsys, "Odd has a forward pass of its own")


RECIPE = TINY.replace('"resnet"\ndepth = 8', '"gate_mine:KIND"') + '[regularizer]\npenalty = "SO"\nstrength = 0.1\n'


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NET", "must be a function that makes a network; got int"),
        ("number", "must return a torch.nn.Module"),
        ("odd", "Odd has a forward pass of its own"),
    ],
)
@pytest.mark.parametrize("seeds", [["0"], ["0", "1"]])
def test_networks_that_cannot_be_trained_are_one_line(module, folder, capsys, unchecked, kind, message, seeds):
    (folder / "r.toml").write_text(RECIPE.replace("KIND", kind))
    assert main(["train", "r.toml", "--device", "cpu", "--seeds", *seeds, "--jobs", "1"]) == 2
    is_one_line(capsys, message)


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("orthokit.cli.evidence.Evaluate.run", lambda self, console: None + 1)
    with pytest.raises(TypeError):
        main(["evaluate", "runs"])
