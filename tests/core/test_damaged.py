"""Damaged and hostile files: each ends in one line, whatever sizes, names and ways of packing it claims."""

import io
import json
import pickle
import struct
import zipfile

import pytest
import torch
from torch import nn

import orthokit as ok
from orthokit import checkpoint
from orthokit.checkpoint.torchfiles import LEGACY, MAGIC
from orthokit.cli import main

NAMES = {
    "deep": b")" + b"\x85" * 300_000,
    "doubled": b")" + b"2\x86" * 60,
    "deep list": b"]" + b"\x85" * 300_000,
    "list": b"](K\x01e",
    "none": b"N",
    "number": b"G" + struct.pack(">d", 1.5),
    "bytes": b"C\x01a",
    "mapping": b"}",
    "class": b"ctorch\nFloatStorage\n",
}
"""Programs that push what should be the name of a tensor's numbers."""


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def program(name):
    """A pickle of a dictionary with a tensor whose numbers have this name."""
    identifier = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + name + text("cpu") + b"K\x04t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identifier + b"QK\x00K\x02K\x02\x86K\x02K\x01\x86\x89}tR"
    return b"\x80\x02}" + text("a.weight") + tensor + b"s."


def packed(path, members, way=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", way) as file:
        for name, content in members.items():
            file.writestr(name, content)


def old(path, name, order):
    head = [pickle.dumps(value, protocol=2) for value in (MAGIC, LEGACY, {"little_endian": True})]
    numbers = struct.pack("<q", 4) + torch.eye(2).numpy().tobytes()
    path.write_bytes(b"".join(head) + program(name) + order + numbers)


def refused(path, capsys, reason=""):
    assert main(["report", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), len(err) < 1000) == ("", 1, True)
    assert reason in err
    with pytest.raises(ValueError, match=r"\S"):
        checkpoint.read(path)


def test_the_programs_of_these_tests_are_read(tmp_path):
    packed(tmp_path / "a.pt", {"a/data.pkl": program(text("0")), "a/data/0": torch.eye(2).numpy().tobytes()})
    old(tmp_path / "b.pt", text("0"), pickle.dumps(["0"], protocol=2))
    for name in ("a.pt", "b.pt"):
        assert torch.equal(checkpoint.read(tmp_path / name)[0]["a.weight"], torch.eye(2))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_numbers_that_are_not_text(tmp_path, capsys, unchecked, name):
    packed(tmp_path / "a.pt", {"a/data.pkl": program(NAMES[name])})
    refused(tmp_path / "a.pt", capsys, "the name of a tensor's numbers is not text")
    old(tmp_path / "b.pt", NAMES[name], pickle.dumps(["0"], protocol=2))
    refused(tmp_path / "b.pt", capsys, "the name of a tensor's numbers is not text")
    old(tmp_path / "c.pt", text("0"), b"\x80\x02](" + NAMES[name] + b"e.")
    refused(tmp_path / "c.pt", capsys, "the name of a tensor's numbers is not text")


SIZES = ["1e999", "-Infinity", "NaN", "1.5", '"2"', "true", "null", "[2]", "1" + "0" * 400]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ['"shape": [2, %s], "data_offsets": [0, 16]', '"shape": [2, 2], "data_offsets": [0, %s]'])
def test_sizes_that_are_not_whole_numbers(tmp_path, capsys, size, form):
    header = ('{"a.weight": {"dtype": "F32", ' + form % size + "}}").encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(tmp_path / "a.safetensors", capsys)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**70], [2**63, 0], [0] * 17, [-1, 0], [2**40, 2**40, 0]])
def test_empty_tensors_of_impossible_shapes(tmp_path, capsys, shape):
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path / "a.safetensors", capsys, "an impossible shape")


def encrypted(content, member):
    """A zip archive with the flag of encryption set for one member, in both of its headers."""
    content = bytearray(content)
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        length = 30 if flags == 6 else 46
        at = next(i for i in range(len(content)) if content[i : i + 4] == start and content[i + length :].startswith(member))
        content[at + flags] |= 1
    return bytes(content)


@pytest.mark.parametrize("member", ["byteorder", "data.pkl", "data/0"])
@pytest.mark.parametrize("way", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damage", ["encrypted", "bits"])
def test_members_that_cannot_be_unpacked(tmp_path, capsys, member, way, damage):
    path, numbers = tmp_path / "a.pt", torch.eye(2).numpy().tobytes()
    packed(path, {"a/byteorder": b"little", "a/data.pkl": program(text("0")), "a/data/0": numbers}, way)
    if damage == "encrypted":
        path.write_bytes(encrypted(path.read_bytes(), f"a/{member}".encode()))
        return refused(path, capsys, "it is encrypted")
    content = bytearray(path.read_bytes())
    start = content.index(f"a/{member}".encode()) + len(f"a/{member}")
    content[start : start + 12] = b"\xff" * 12
    path.write_bytes(content)
    if way == zipfile.ZIP_STORED:  # nothing is unpacked, the checksum differs
        with pytest.raises(ValueError, match="damaged") if member == "data.pkl" else io.BytesIO():
            assert any("checksum" in note for note in checkpoint.read(path)[1])
        return None
    return refused(path, capsys)


WEIGHTS = {
    "empty bias": {"c.weight": torch.ones(4, 3, 3, 3), "c.bias": torch.empty(0)},
    "scalar vectors": {"c.weight_orig": torch.ones(4, 3), "c.weight_u": torch.tensor(1.0), "c.weight_v": torch.ones(3)},
    "scalar weight": {"c.weight_orig": torch.tensor(1.0), "c.weight_u": torch.ones(1), "c.weight_v": torch.ones(1)},
    "scalar original": {f"c.parametrizations.weight.{name}": torch.tensor(1.0) for name in ("original", "0._u", "0._v")},
    "empty mask": {"c.weight_orig": torch.ones(4, 1), "c.weight_mask": torch.empty(0)},
    "empty length": {"c.weight_v": torch.ones(4, 3), "c.weight_g": torch.empty(0)},
    "scalar length": {"c.weight_v": torch.tensor(1.0), "c.weight_g": torch.tensor(1.0)},
    "scalar direction": {"c.weight_v": torch.tensor(1.0), "c.weight_g": torch.ones(1, 1)},
    "scalar bias": {"c.weight": torch.ones(4, 3, 3, 3), "c.bias": torch.tensor(1.0)},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_parts_that_do_not_fit(name):
    report = ok.report(WEIGHTS[name] | {"fine.weight": torch.eye(3)})
    assert [row["layer"] for row in report.rows if row["layer"] != "c"] == ["fine"]
    if "bias" not in name:
        assert list(report.incomplete) == ["c"]


def test_sound_files_are_still_read(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    assert ok.report(tmp_path / "a.pt").incomplete == {}
