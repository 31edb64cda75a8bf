"""Reading and downloading CIFAR as published, in small."""

import contextlib
import errno
import hashlib
import http.server
import io
import os
import pickle
import queue
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from orthokit.lab.data import cifar
from orthokit.lab.data.cifar import RELEASES, download, find, read
from small_cifar import HUNDRED, TEN, contents, packed, unpacked, with_md5


def test_the_table():
    assert [layout.archive for entry in RELEASES.values() for layout in entry.layouts] == [
        "cifar-10-python.tar.gz",
        "cifar-10-binary.tar.gz",
        "cifar-100-python.tar.gz",
        "cifar-100-binary.tar.gz",
    ]
    for name, entry in RELEASES.items():
        assert (entry.name, entry.train, entry.test) == (name, 50_000, 10_000)
        assert all(re.fullmatch("[0-9a-f]{32}", layout.md5) and len(layout.files) in (2, 6) for layout in entry.layouts)


@pytest.mark.parametrize("form", [0, 1], ids=["python", "binary"])
@pytest.mark.parametrize("published", [TEN, HUNDRED], ids=lambda entry: entry.name)
@pytest.mark.parametrize("place", ["folder", "itself", "archive"])
def test_every_form(tmp_path, published, form, place):
    if place == "archive":
        content, published = packed(published, form)
        (tmp_path / published.layouts[form].archive).write_bytes(content)
    else:
        folder = unpacked(published, tmp_path, form)
    source = find(published, folder if place == "itself" else tmp_path)
    assert source.layout == published.layouts[form]
    assert source.is_archive == (place == "archive")
    assert source.is_intact()
    before = sorted(tmp_path.rglob("*"))
    actual = read(source)
    expected = [part for pair in contents(published) for part in pair]
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(actual, expected, strict=True))
    assert [str(part.dtype) for part in actual] == ["torch.uint8", "torch.int64"] * 2
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


def test_text_keys_and_arrays_of_labels_are_fine(tmp_path):
    folder = unpacked(TEN, tmp_path)
    for path in folder.iterdir():
        batch = pickle.loads(path.read_bytes(), encoding="bytes")
        path.write_bytes(pickle.dumps({"data": batch[b"data"], "labels": np.array(batch[b"labels"], np.int32)}, protocol=4))
    images, labels = next(contents(TEN))
    actual = read(find(TEN, tmp_path))
    assert np.array_equal(actual.train_pixels, images)
    assert np.array_equal(actual.train_labels, labels)


def test_a_complete_form_is_preferred(tmp_path):
    folder = unpacked(TEN, tmp_path)
    unpacked(TEN, tmp_path, 1)
    content, published = packed(TEN)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    assert find(published, tmp_path).path == folder
    (folder / "test_batch").unlink()
    assert find(published, tmp_path).path.name == "cifar-10-batches-bin"
    (tmp_path / "cifar-10-batches-bin/data_batch_1.bin").unlink()
    assert find(published, tmp_path).path.name == "cifar-10-python.tar.gz"


def test_nothing_found(tmp_path):
    accepted = (
        r"root \(--root\) must hold the folder cifar-10-batches-py, the folder cifar-10-batches-bin, cifar-10-python.tar.gz or "
        r"cifar-10-binary.tar.gz; download=True \(orthokit train --download\) fetches cifar-10-python.tar.gz"
    )
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"no CIFAR-10 in {re.escape(str(root))}: {accepted}"):
            find(TEN, root)
    folder = unpacked(TEN, tmp_path)
    (folder / "data_batch_3").unlink()
    for root in (tmp_path, folder):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(str(folder))} lacks data_batch_3; {accepted}"):
            find(TEN, root)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def small(**changes):
    return pickle.dumps(
        {b"data": np.zeros((40, 3072), np.uint8), b"labels": [0] * 40} | {k.encode(): v for k, v in changes.items()}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or not a batch"),
        (b"not a pickle", "damaged, or not a batch"),
        (small()[:-3000], "damaged, or not a batch"),
        (small(data=np.zeros((5, 3072), np.uint8)), r"must hold 40 images of 3072 bytes .* holds uint8 \(5, 3072\)"),
        (small(data=np.zeros((40, 3072), np.float32)), "holds float32"),
        (small(data=np.zeros((40, 32, 32, 3), np.uint8)), r"\(40, 32, 32, 3\)"),
        (small(data=[[0] * 3072] * 40), "holds int64"),
        (small(labels=[0] * 39), r"labels \(39,\)"),
        (small(labels=[10] * 40), r"labels must be integers from 0 to 9; got int64 \[10, 10, 10\]"),
        (small(labels=[-1] + [0] * 39), r"from 0 to 9; got int64 \[-1\]"),
        (small(labels=[0.0] * 40), "from 0 to 9; got float64"),
        (small(labels=["0"] * 40), "from 0 to 9; got <U1"),
        (small(), "every class must have 20 images; class 0 has"),
        (pickle.dumps({b"data": np.zeros((40, 3072), np.uint8), b"fine_labels": [0] * 40}), "no 'labels' in it"),
        (pickle.dumps([1, 2]), "damaged, or not a batch"),
        (pickle.dumps(Evil()), "asks for builtins.exec"),
        (pickle.dumps({b"data": Evil()}), "asks for builtins.exec"),
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (b"cnumpy._core.multiarray\nfromfile\n(S'x'\ntR.", "asks for numpy._core.multiarray.fromfile"),
        (b"cnumpy\nndarray.tofile\n.", "asks for numpy.ndarray.tofile"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_damaged_pickles(tmp_path, content, message):
    folder = unpacked(TEN, tmp_path)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.*{message}.* anew"):
        read(find(TEN, tmp_path))


def test_damaged_binaries(tmp_path):
    folder = unpacked(HUNDRED, tmp_path, 1)
    path = folder / "train.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"train.bin is damaged.* multiple of 3074 bytes, and is 3,073,999"):
        read(find(HUNDRED, tmp_path))
    path.write_bytes(content[:-3074])
    with pytest.raises(ValueError, match=r"train.bin .* must hold 1,000 images .* \(999, 3072\)"):
        read(find(HUNDRED, tmp_path))
    path.write_bytes(content[:1] + bytes([100]) + content[2:])
    with pytest.raises(ValueError, match=r"train.bin: labels must be integers from 0 to 99; got uint8 \[100\]"):
        read(find(HUNDRED, tmp_path))
    path.write_bytes(content[:1] + bytes([(content[1] + 1) % 100]) + content[2:])
    with pytest.raises(ValueError, match=r"train.bin: every class must have 10 images; class \d+ has (9|11); unpack"):
        read(find(HUNDRED, tmp_path))
    path.write_bytes(bytes([77]) + content[1:])  # of the coarse labels nothing is asked
    read(find(HUNDRED, tmp_path))


def test_wrong_counts_in_the_test_part(tmp_path):
    folder = unpacked(TEN, tmp_path)
    batch = pickle.loads((folder / "test_batch").read_bytes())
    batch[b"labels"][0] = (batch[b"labels"][0] + 1) % 10
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match="test_batch: every class must have 10 images"):
        read(find(TEN, tmp_path))


def test_an_archive_is_hashed_first(tmp_path, monkeypatch):
    content, published = packed(TEN)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr(cifar.tarfile, "open", lambda **_: pytest.fail("opened"))
    source = find(published, tmp_path)
    assert not source.is_intact()
    with pytest.raises(
        ValueError, match=f"has the MD5 .* not the published {published.layouts[0].md5}; delete it, or .*--download"
    ):
        read(source)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "is damaged"),
        (lambda content: b"no archive", "is damaged"),
        (lambda content: content[:5000] + bytes(5000) + content[10_000:], "is damaged"),
        (lambda content: packed(TEN, leave_out=["data_batch_2"])[0], "holds no data_batch_2"),
    ],
    ids=["half", "text", "hole", "incomplete"],
)
def test_a_damaged_archive_with_the_right_hash(tmp_path, damage, message):
    content = damage(packed(TEN)[0])
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(find(with_md5(TEN, content), tmp_path))


def test_the_key_follows_the_files(tmp_path):
    folder = unpacked(TEN, tmp_path)
    key = find(TEN, tmp_path).key()
    assert find(TEN, tmp_path).key() == key
    (folder / "batches.meta").write_text("not read")
    assert find(TEN, tmp_path).key() == key
    os.utime(folder / "test_batch", ns=(1, 1))
    assert find(TEN, tmp_path).key() != key
    assert find(replace(TEN, test=50), tmp_path).key() != find(TEN, tmp_path).key()


# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; ``script`` says how to answer each request in turn, and what comes after it is answered well."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.script, self.ranges, self.stalled = content, [], [], threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        act = server.script.pop(0) if server.script else "well"
        content, start = server.content, int(asked[6:-1]) if asked else 0
        self.close_connection = True
        if act == "hang up":
            return
        if isinstance(act, int):
            return self.answer(act, {"Content-Length": 3}, b"sad")
        if act in ("ignore range", "ignore range, break off"):
            start = 0
        if act == "wrong range":
            start = 1
        if act == "endless":
            return self.answer(200, {}, content * 3)
        if start >= len(content):
            return self.answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0}, b"")
        body = content[start:]
        headers = {"Content-Length": len(body)}
        if act == "no length":
            headers = {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if act == "stall":
            self.answer(206 if start else 200, headers, body[: len(content) // 8])
            return server.stalled.wait(20)
        if act == "drip":
            self.answer(206 if start else 200, headers, b"")
            with contextlib.suppress(OSError):  # the client hangs up
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    server.stalled.wait(0.02)
            return None
        self.answer(206 if start else 200, headers, body[: len(body) // 2] if "break off" in act else body)

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in (headers | {"Connection": "close"}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setattr(cifar, "WAITS", (0.0, 0.0))
    with Server(packed(TEN)[0]) as actual:
        thread = threading.Thread(target=actual.serve_forever, args=(0.01,))
        thread.start()
        yield actual
        actual.stalled.set()
        actual.shutdown()
        thread.join()


@pytest.fixture
def fetch(server, tmp_path):
    """Download from the server; return what was printed."""
    published = with_md5(TEN, server.content)

    def call():
        console = Console(file=io.StringIO(), width=200)
        path = download(published, tmp_path / "new", url=f"http://127.0.0.1:{server.server_port}/x", console=console)
        assert path == tmp_path / "new/cifar-10-python.tar.gz"
        assert path.read_bytes() == server.content
        assert not Path(f"{path}.part").exists()
        return console.file.getvalue()

    call.path = tmp_path / "new/cifar-10-python.tar.gz"
    call.part = tmp_path / "new/cifar-10-python.tar.gz.part"
    call.published = published
    return call


def test_download(fetch, server):
    assert "cifar-10-python.tar.gz" in fetch()
    assert server.ranges == [None]
    assert len(read(find(fetch.published, fetch.path.parent)).test_labels) == 100
    fetch()  # is there
    assert len(server.ranges) == 1
    fetch.path.write_bytes(b"something else")
    fetch()
    assert server.ranges == [None, None]


def test_the_default_address(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(cifar, "_fetch", lambda url, part, *_: (asked.append(url), part.write_bytes(b"")))
    for name in RELEASES:
        with pytest.raises(ValueError, match=r"/~kriz/cifar-10+-python.tar.gz gave 0 bytes"):
            download(name, tmp_path)
    assert asked == [f"https://www.cs.toronto.edu/~kriz/cifar-{n}-python.tar.gz" for n in (10, 100)]
    with pytest.raises(ValueError, match="only cifar10 and cifar100 can be downloaded; got 'digits'"):
        download("digits", tmp_path)


def test_going_on_after_breaks(fetch, server):
    size = len(server.content)
    server.script = ["break off"] * 3 + [503, "break off", "hang up"]  # more breaks than waits, but each brought something
    printed = fetch()
    half, quarter = size // 2, (size - size // 2) // 2
    assert server.ranges[:3] == [None, f"bytes={half}-", f"bytes={half + quarter}-"]
    assert len(server.ranges) == 7
    assert f"broke off after {half:,} of {size:,} bytes; trying again" in printed
    assert "HTTP 503 Service Unavailable; trying again" in printed


def test_going_on_with_what_an_earlier_call_left(fetch, server):
    server.script = ["break off"] + [503] * 3
    with pytest.raises(ConnectionError, match=f"HTTP 503.*{len(server.content) // 2:,} bytes are kept in .*part.* by hand"):
        fetch()
    assert not fetch.path.exists()
    assert fetch.part.read_bytes() == server.content[: len(server.content) // 2]
    fetch()
    assert server.ranges[-1] == f"bytes={len(server.content) // 2}-"


def test_what_came_before_a_stall_is_kept(fetch, server, monkeypatch):
    """More stalls than attempts without progress, each after an eighth of the archive."""
    monkeypatch.setattr(cifar, "TIMEOUT", 0.3)
    server.script = ["stall"] * 7
    fetch()
    starts = [int(asked[6:-1]) for asked in server.ranges[1:]]
    assert len(starts) == 7 > len(cifar.WAITS)
    assert starts == [len(server.content) // 8 * stalls for stalls in range(1, 8)]


def test_a_server_that_drips_is_too_slow(fetch, server, monkeypatch):
    monkeypatch.setattr(cifar, "TIMEOUT", 0.3)
    server.script = ["drip"] * 9
    with pytest.raises(ConnectionError, match=r"the connection gave only \d+ bytes in 0 s; \d+ bytes are kept"):
        fetch()
    assert len(server.ranges) == 1 + len(cifar.WAITS)
    server.stalled.set()
    server.script.clear()
    fetch()


def test_no_more_than_the_archive_is_taken(fetch, server):
    server.script = ["endless"]
    with pytest.raises(ValueError, match=f"gave more than the {len(server.content):,} bytes of .*; they are deleted"):
        fetch()
    assert not fetch.part.exists()
    fetch()


@pytest.mark.parametrize("act", ["ignore range", "wrong range", "no length"])
def test_servers_without_ranges(fetch, server, act):
    server.script = ["break off", act]
    fetch()


def test_a_server_that_always_breaks_off_at_the_start(fetch, server):
    server.script = ["ignore range, break off"] * 9
    with pytest.raises(ConnectionError, match="could not fetch"):
        fetch()
    assert len(server.ranges) == 1 + len(cifar.WAITS)


@pytest.mark.parametrize("left", [0, 7], ids=["complete", "too long"])
def test_a_part_with_nothing_left_to_ask_for(fetch, server, left):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(server.content + bytes(left))
    fetch()
    assert server.ranges == [f"bytes={len(server.content) + left}-"] + [None] * bool(left)


def test_wrong_content(fetch, server):
    right, server.content = server.content, b"<html>please log in</html>"
    wrong = hashlib.md5(server.content).hexdigest()
    with pytest.raises(ValueError, match=f"gave 26 bytes with the MD5 {wrong}, not the published .* deleted"):
        fetch()
    assert not fetch.path.exists()
    assert not fetch.part.exists()
    server.content = right
    fetch()


@pytest.mark.parametrize("status", [404, 403])
def test_what_is_not_there_is_asked_for_once(fetch, server, status):
    server.script = [status]
    with pytest.raises(ConnectionError, match=f"HTTP {status} .*; put cifar-10-python.tar.gz into .* by hand"):
        fetch()
    assert len(server.ranges) == 1


def test_no_server(monkeypatch, tmp_path, server):
    monkeypatch.setattr(cifar, "WAITS", (0.0,))
    console = Console(file=io.StringIO())
    with pytest.raises(ConnectionError, match=r"Connection refused.*; 0 bytes are kept"):
        download(TEN, tmp_path, url="http://127.0.0.1:9/x", console=console)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(fetch):
    fetch.part.parent.mkdir()
    fetch.part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        fetch()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(fetch.part))
    assert not fetch.path.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))) as caught:
        download(TEN, tmp_path / "file/data")
    assert caught.value.filename


def _fetch_and_tell(published, root, url, results):
    console = Console(file=io.StringIO(), width=500)
    download(published, root, url=url, console=console)
    results.put(console.file.getvalue())


def test_two_at_once(fetch, server, tmp_path):
    """Threads of one process stand for two processes: the lock is held by an open file."""
    results, arguments = queue.Queue(), (fetch.published, tmp_path / "new", f"http://127.0.0.1:{server.server_port}/x")
    threads = [threading.Thread(target=_fetch_and_tell, args=(*arguments, results)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.qsize() == 3
    assert server.ranges == [None]
