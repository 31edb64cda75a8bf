"""Saved networks: every kind of file, of which nothing may run; what is read equals what was saved."""

import argparse
import collections
import contextlib
import enum
import gzip
import io
import json
import os
import pathlib
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import orthokit as ok
from orthokit import checkpoint
from orthokit.checkpoint import pickles, torchfiles
from orthokit.checkpoint.statedict import layers_of
from orthokit.cli import main


class Colour(enum.Enum):
    RED = 1


class Odd(dict):
    """A mapping of the user's own."""


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(small()).save(str(path))


def beside():
    return {
        "args": argparse.Namespace(lr=0.1),
        "accuracy": np.float64(0.9),
        "curve": np.ones(3),
        "out": pathlib.PurePosixPath("/x"),
        "seen": collections.defaultdict(int, a=1),
        "colour": Colour.RED,
        "odd": Odd(a=1),
        "set": {1, 2},
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "range": slice(1, 2),
    }


STATE = small().state_dict()
READABLE = {
    "zip.pt": lambda p: torch.save(STATE, p),
    "old.pth": lambda p: legacy(STATE, p),
    "nested.ckpt": lambda p: torch.save({"epoch": 3, "state_dict": STATE, **beside()}, p),
    "old_nested.bin": lambda p: legacy({"epoch": 3, "state_dict": STATE, **beside()}, p),
    "no_suffix": lambda p: torch.save(STATE, p),
    "upper.PT": lambda p: torch.save(STATE, p),
    "Upper.SafeTensors": lambda p: save_file(STATE, p),
    "safetensors_inside.pt": lambda p: save_file(STATE, p),
    "pickle_inside.safetensors": lambda p: torch.save(STATE, p),
    "own_mapping.pt": lambda p: torch.save({"net": Odd(STATE)}, p),
    "in_a_list.pt": lambda p: torch.save({"nets": [STATE]}, p),
    "half.pt": lambda p: torch.save({k: v.half() if v.is_floating_point() else v for k, v in STATE.items()}, p),
    "parameters.pt": lambda p: torch.save(dict(small().named_parameters()), p),
    "protocol4.pt": lambda p: torch.save(STATE, p, pickle_protocol=4),
    "script.pt": scripted,
    "deflated.pt": lambda p: deflated(p),
}


def deflated(path):
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("name", READABLE)
def test_files_give_what_was_saved(tmp_path, name):
    READABLE[name](path := tmp_path / name)
    state, _ = checkpoint.read(path)
    assert {"0.weight", "3.weight"} <= state.keys() <= STATE.keys()
    for key, value in state.items():
        assert torch.equal(value, STATE[key].to(value.dtype)), key
    assert {row["layer"] for row in ok.report(path).rows} == {"0", "3"}


def test_views_transposes_and_shared_memory_are_read(tmp_path):
    base = torch.arange(24.0)
    state = {"a.weight": base[4:16].view(3, 4).T, "b.weight": base[4:16].view(3, 4).T, "c.weight": base[::6].view(2, 2)}
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        torch.save(state, path) if path.stem == "a" else legacy(state, path)
        read = checkpoint.read(path)[0]
        assert all(torch.equal(read[key], state[key]) for key in state)
        assert [row["layer"] for row in ok.report(path).rows] == ["a", "c"]  # tied weights once


def test_what_was_left_out_is_named(tmp_path):
    torch.save({"model": STATE, **beside()}, tmp_path / "a.pt")
    note = " ".join(checkpoint.read(tmp_path / "a.pt")[1])
    assert "argparse.Namespace, numpy" in note
    assert "nothing in it is executed" in note


class Canary:
    """Says so if anything makes it."""

    fired: ClassVar = []

    def __init__(self, *arguments):
        Canary.fired.append(arguments)

    def __setstate__(self, state):
        Canary.fired.append(state)

    def __call__(self, *arguments):
        Canary.fired.append(arguments)


def fire(*arguments):
    Canary.fired.append(arguments)


class Reduces:
    def __reduce__(self):
        return fire, ("reduced",)


class Builds:
    def __reduce_ex__(self, protocol):
        return object.__new__, (Canary,), {"a": 1}


WHERE = f"{__name__}\nfire\n".encode()
KEY = b"X\x08\x00\x00\x00a.weight"
PROGRAMS = {
    "reduce": b"c" + WHERE + b"(tR.",
    "inst": b"(i" + WHERE + b".",
    "obj": b"(c" + f"{__name__}\nCanary\n".encode() + b"o.",
    "newobj": b"c" + f"{__name__}\nCanary\n".encode() + b")\x81.",
    "build": b"c" + f"{__name__}\nCanary\n".encode() + b")\x81}b.",
    "global of a builtin": b"cbuiltins\nexec\n(X\x01\x00\x00\x00ptR.",
    "getattr chain": b"cbuiltins\ngetattr\n(cos\nX\nX\x06\x00\x00\x00systemtRX\x01\x00\x00\x00ptR.",
    "in a mapping": b"}" + KEY + b"c" + WHERE + b"(tRs.",
    "as a storage": b"ctorch._utils\n_rebuild_tensor_v2\n(c" + WHERE + b"(tRK\x00(K\x02K\x02t(K\x02K\x01t\x89NtR.",
    "from a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(c" + WHERE + b"c" + WHERE + b"(tNtR.",
    "stack global": b"\x80\x04\x8c" + bytes([len(__name__)]) + __name__.encode() + b"\x8c\x04fire\x93)R.",
    "extension": b"\x82\x01)R.",
    "persistent": b"(c" + WHERE + b"tQ.",
    "default factory": b"ccollections\ndefaultdict\n(c" + WHERE + b"tR.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_instruction_runs_anything(tmp_path, name):
    Canary.fired.clear()
    for protocol, path in enumerate([tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pkl"]):
        if protocol == 0:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", PROGRAMS[name])
        else:
            head = pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({}) if protocol == 1 else b""
            path.write_bytes(head + PROGRAMS[name] + pickle.dumps([]))
        assert main(["report", str(path)]) == 2
    assert not Canary.fired
    for value in (Reduces(), Builds(), {"a": Reduces(), "b.weight": torch.eye(3)}):
        torch.save(value, tmp_path / "d.pt")
        main(["report", str(tmp_path / "d.pt")])
    assert not Canary.fired


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def archive_of(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def archive(path, **members):
    archive_of(path, {name.replace("__", "/"): content for name, content in members.items()})


def tar(path):
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("weights.pt"))


def cut(save, path):
    save(path)
    path.write_bytes(path.read_bytes()[:-300])


def header(path, entries, size=0, length=None):
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(size))


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("archive/data.pkl", "w", force_zip64=True) as member:
        for _ in range(3):
            member.write(bytes(2**20))


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"a.weight": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


NOT_NETWORKS = [
    ("lfs.safetensors", pointer, "a Git LFS pointer"),
    ("lfs.pt", pointer, "git lfs pull"),
    ("page.pt", lambda p: p.write_text("<!DOCTYPE html><html>Sign in</html>"), "a web page"),
    ("page.safetensors", lambda p: p.write_text("\n<html>404</html>"), "a web page"),
    ("xml.bin", lambda p: p.write_text("<?xml version='1.0'?><Error/>"), "an XML document"),
    ("config.pt", lambda p: p.write_text('{"model_type": "bert"}'), "a JSON document"),
    ("config.safetensors", lambda p: p.write_text('{\n  "model_type": "bert"}'), "a JSON document"),
    ("empty.pt", lambda p: p.write_bytes(b""), "is empty"),
    ("zeros.pt", lambda p: p.write_bytes(bytes(5000)), "begins with zeros"),
    ("gz.pt", lambda p: p.write_bytes(gzip.compress(b"x" * 50)), "compressed with gzip"),
    ("tar.pth", tar, "a tar archive"),
    ("half.pt", lambda p: cut(lambda q: torch.save(STATE, q), p), "cut off"),
    ("half.pth", lambda p: cut(lambda q: legacy(STATE, q), p), "ends too early"),
    ("half.safetensors", lambda p: cut(lambda q: save_file(STATE, q), p), "cut off"),
    ("net.onnx", lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x032.1"), "an ONNX file"),
    ("net.h5", lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "an HDF5 file"),
    ("net.npz", lambda p: np.savez(p, a=np.ones(3)), "a NumPy archive"),
    ("net.npy", lambda p: np.save(p, np.ones(3)), "a NumPy array"),
    ("net.gguf", lambda p: p.write_bytes(b"GGUF\x03\0\0\0"), "a GGUF file"),
    ("net.zip", lambda p: archive(p, weights__net_pth="x"), "a zip archive"),
    ("plain.pkl", lambda p: p.write_bytes(pickle.dumps({"a": 1})), "pickle.dump"),
    ("tensor.pt", lambda p: torch.save(torch.eye(3), p), "holds a Tensor, not a state dict"),
    ("module.pt", lambda p: torch.save(small(), p), "torch.nn.modules.container.Sequential"),
    ("old_module.pt", lambda p: legacy(small(), p), "torch.save(model.state_dict()"),
    ("with_module.pt", lambda p: torch.save({"epoch": 1, "model": small()}, p), "torch.nn.modules.container.Sequential"),
    ("long.safetensors", lambda p: header(p, {}, length=2**40), "safetensors file"),
    ("deep.safetensors", lambda p: header(p, "[" * 100_000), "safetensors file"),
    ("deeper.safetensors", lambda p: header(p, '{"a":' * 100_000), "safetensors file"),
    ("far.safetensors", lambda p: header(p, entry(offsets=(0, 2**60), shape=(2**58,))), "cut off"),
    ("wrong.safetensors", lambda p: header(p, entry(shape=(2**31, 2**31)), 16), "an impossible shape"),
    ("negative.safetensors", lambda p: header(p, entry(shape=(-2, -2)), 16), "an impossible shape"),
    ("types.safetensors", lambda p: header(p, {"a.weight": 3, "__metadata__": 7}), "not a safetensors file"),
    ("bomb.pt", bomb, "unpack to"),
    ("index.json", lambda p: p.write_text("{}"), "a JSON document"),
    ("a.index.json", lambda p: p.write_text('{"weight_map": 3}'), "not the index"),
    ("b.index.json", lambda p: p.write_text('{"weight_map": {"a": "../../etc/passwd"}}'), "not files beside it"),
    ("c.index.json", lambda p: p.write_text('{"weight_map": {"a": "x.bin"}}'), "none of the 1 parts"),
    ("hollow.pt", lambda p: archive(p, **{"archive__data.pkl": b""}), "damaged"),
]


@pytest.mark.parametrize(("name", "make", "message"), NOT_NETWORKS)
def test_what_is_not_a_network_is_named_in_one_line(tmp_path, monkeypatch, capsys, name, make, message):
    monkeypatch.setattr(torchfiles, "UNPACKED", 2**21)
    make(path := tmp_path / name)
    assert main(["report", str(path)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert "weights_only" not in err


def test_pipes_and_devices_are_not_opened(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", pathlib.Path("/dev/zero")):
        assert main(["report", str(path)]) == 2
        assert "a device or a pipe" in capsys.readouterr().err
    assert main(["report", "a\0b.pt"]) == 2


@pytest.mark.parametrize("size", [(10**6, 10**6), (2**20, 2**20, 8), (2**30, 2**30)])
def test_a_tensor_that_says_more_than_it_holds_is_left_out(tmp_path, capsys, size):
    torch.save({"a.weight": torch.ones(1).expand(size), "b.weight": torch.eye(3)}, tmp_path / "a.pt")
    assert main(["report", str(tmp_path / "a.pt")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: a.weight (" in out
    assert [row["layer"] for row in ok.report({"a.weight": torch.ones(1).expand(size), "b.weight": torch.eye(3)}).rows] == ["b"]


ODD = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)]),
    "complex": lambda: torch.eye(3, dtype=torch.complex64),
    "int8": lambda: torch.ones(3, 3, dtype=torch.int8),
    "bool": lambda: torch.ones(3, 3, dtype=torch.bool),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "float8": lambda: torch.eye(3).to(torch.float8_e4m3fn),
    "float4": lambda: torch.zeros(3, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "meta": lambda: torch.eye(3, device="meta"),
    "six": lambda: torch.ones((2,) * 6),
    "empty": lambda: torch.ones(0, 3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_numbers_that_are_not_read_are_named(tmp_path, name):
    state = {"odd.weight": ODD[name](), "b.weight": torch.eye(3)}
    torch.save(state, tmp_path / "a.pt")
    for source in (state, tmp_path / "a.pt"):
        table = ok.report(source)
        assert [row["layer"] for row in table.rows] == ["b"]
        assert any("odd" in note for note in table.notes)


def test_deep_and_circular_checkpoints(tmp_path):
    circular = {"net": STATE}
    circular["self"] = circular
    torch.save(circular, tmp_path / "a.pt")
    assert len(ok.report(tmp_path / "a.pt").rows) == 2
    program = b"(" * 30_000 + b"t" * 30_000 + b"."
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match="holds a tuple"):
        checkpoint.read(tmp_path / "b.pt")


def test_a_pickle_ends():
    with pytest.raises(pickles.DamagedError):
        pickles.read(io.BytesIO(b"(((("), lambda key: None, {})
    with pytest.raises(pickles.DamagedError):
        pickles.read(io.BytesIO(b"r\xff\xff\xff\xff."), lambda key: None, {})  # memo 4,294,967,295 of an empty stack


def test_safetensors_in_natural_order_and_ours_in_the_models(tmp_path):
    model = nn.Module()
    model.stem = nn.Linear(4, 4)
    model.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)])
    model.a = nn.Linear(4, 4)
    state = model.state_dict()
    order = [row["layer"] for row in ok.report(state).rows]
    save_file(state, tmp_path / "theirs.safetensors")
    save_file(state, tmp_path / "ours.safetensors", checkpoint.order_metadata(state))
    assert [row["layer"] for row in ok.report(tmp_path / "theirs.safetensors").rows] == sorted(order, key=checkpoint.natural)
    assert [row["layer"] for row in ok.report(tmp_path / "ours.safetensors").rows] == order
    assert list(checkpoint.read(tmp_path / "ours.safetensors")[0]) == list(state)


def other(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)).state_dict()


@pytest.mark.parametrize("names", [("model", "model_ema"), ("student", "teacher"), ("net", "ema.net"), ("generator", "swa")])
def test_of_several_networks_one_is_read_whatever_their_order(tmp_path, names):
    states = [other(1), other(2)]
    for order in ((0, 1), (1, 0)):
        torch.save({names[k]: states[k] for k in order}, path := tmp_path / "a.pt")
        read, notes = checkpoint.read(path)
        assert torch.equal(read["0.weight"], states[0]["0.weight"])
        assert all(text in notes[-1] for text in (*names, "--key"))
        assert torch.equal(checkpoint.read(path, names[1])[0]["0.weight"], states[1]["0.weight"])
        assert ok.report(path, key=names[1]).rows == ok.report(states[1]).rows
    with pytest.raises(ValueError, match=f"no network 'x'.*{names[0]}"):
        checkpoint.read(path, "x")


def test_a_key_may_be_the_beginning_of_names():
    joined = {f"G.{k}": v for k, v in other(1).items()} | {f"D.{k}": v for k, v in other(2).items()}
    assert ok.report(joined, key="D").rows == ok.report(other(2)).rows
    assert len(ok.report(joined).rows) == 4


def shards(folder, count=2, index=True, of=None, suffix=".safetensors"):
    folder.mkdir(exist_ok=True)
    items, places = list(STATE.items()), {}
    for k in range(count):
        name = f"model-{k + 1:05}-of-{of or count:05}{suffix}"
        part = dict(items[k::count])
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    if index:
        (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_networks_in_parts(tmp_path, suffix):
    folder = shards(tmp_path / "a", suffix=suffix)
    index = folder / f"model{suffix}.index.json"
    whole = ok.report(STATE).rows
    for path in (folder, index, shards(tmp_path / "b", index=False, suffix=suffix)):
        assert sorted(ok.report(path).rows, key=str) == sorted(whole, key=str)
    first = next(folder.glob("model-00001*"))
    assert "part 1 of 2" in " ".join(checkpoint.read(first)[1])
    next(folder.glob("model-00002*")).unlink()
    for path in (folder, index):
        assert "1 of 2 parts are missing" in " ".join(ok.report(path).notes)


def test_folders(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(STATE, tmp_path / "training_args.bin")
    assert len(ok.report(tmp_path).rows) == 2
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="2 files of weights"):
        ok.report(tmp_path)


def test_a_wrong_checksum_is_said(tmp_path):
    torch.save(STATE, path := tmp_path / "a.pt")
    content = bytearray(path.read_bytes())
    content[content.index(STATE["0.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert "checksum" in " ".join(checkpoint.read(path)[1])


def test_numbers_whose_squares_overflow_and_many_layers_end_well(tmp_path):
    state = {f"l{place}.weight": torch.ones(64, 32, 3, 3).as_strided((64, 32, 3, 3), (0, 0, 0, 0)) for place in range(600)}
    assert len(layers_of(state).modules) == 600
    for value in (1e200, 1e308, 1e-300):
        torch.save({"a.weight": torch.full((4, 3), value, dtype=torch.float64), "b.weight": torch.eye(3)}, tmp_path / "a.pt")
        assert main(["report", str(tmp_path / "a.pt")]) == 0


def canary(channels=None, classes=None):
    """A network for --model: importing this file and calling this is what the user names."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Conv2d(8, 8, 3, groups=4, bias=False))


@pytest.mark.parametrize("command", ["report", "plan"])
def test_the_architecture_is_named_on_the_command_line(tmp_path, capsys, command):
    torch.save(canary().state_dict(), path := tmp_path / "a.pt")
    assert main([command, str(path), "--model", f"{__name__}:canary", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert f"importing {__name__} to build canary, as --model says" in err
    assert "0,Conv2d,2,4," in out if command == "report" else "0,2,4," in out
    for model, message in [
        ("canary", "a model is torchvision:NAME"),
        (f"{__name__}:absent", "has no function 'absent'"),
        ("not_there.at_all:f", "no module 'not_there'"),
        ("os:getcwd", "it made a str"),
        (f"{__name__}:fire", "it made a NoneType"),
        ("os:_exit()", "has no function"),
        (f"{__name__}:other", "cannot be built on the meta device"),
        ("../x:y", "a model is torchvision:NAME"),
    ]:
        assert main([command, str(path), "--model", model]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("config", ['{"num_hidden_layers": 10000000}', "[" * 50_000, '{"model_type": "unheard_of"}', "<html>"])
def test_a_folders_configuration_builds_nothing_endless(tmp_path, config):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('executed!')")
    report = ok.report(tmp_path)
    assert len(report.rows) == 2
    assert any(note.startswith("read as a state dict, without the architecture in config.json") for note in report.notes)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle", "safetensors"])
def test_changed_bytes_end_in_one_line_or_a_table(tmp_path, kind):
    rng, path = random.Random(0), tmp_path / "a.pt"
    save_file(STATE, path) if kind == "safetensors" else legacy({"m": STATE, **beside()}, path) if kind == "old" else torch.save(
        {"m": STATE, **beside()}, path
    )
    whole = path.read_bytes()
    if kind == "pickle":
        with zipfile.ZipFile(path) as archive:
            whole = archive.read("a/data.pkl")
    read = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 2, 10])):
            start = rng.randrange(len(content))
            content[start : start + rng.choice([0, 1, 1, 4])] = rng.randbytes(rng.choice([0, 1, 1, 4]))
        if kind == "pickle":
            archive_of(path, {"a/data.pkl": bytes(content)} | {f"a/data/{key}": bytes(1000) for key in range(12)})
        else:
            path.write_bytes(content)
        with contextlib.suppress(ValueError):
            checkpoint.read(path)
            read += 1
    assert read
