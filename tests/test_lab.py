"""The demo's data, network and training."""

import pickle

import numpy as np
import pytest
import torch

import orthokit as ok
from orthokit.lab import demo
from orthokit.lab.data import cifar10, digits
from orthokit.lab.models import ResNet


def test_digits_are_real_and_balanced():
    data = digits(300)
    assert data.train_images.shape == (300, 1, 8, 8)
    assert len(data.test_labels) == 1797 - 300
    assert data.train_labels.bincount().tolist() == pytest.approx([30] * 10, abs=1)
    assert data.train_images.mean().item() == pytest.approx(0, abs=1e-6)
    assert data.train_images.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(digits(300).train_images, data.train_images)
    seen = {image.numpy().tobytes() for image in data.train_images}
    assert sum(image.numpy().tobytes() in seen for image in data.test_images) == 0


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder with the layout, keys and types of the published one, and pictures made here."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        images = rng.integers(0, 256, (10_000, 3072), dtype=np.uint8)
        batch = {
            b"data": images,
            b"labels": rng.permutation(10_000) % 10,
            b"batch_label": name.encode(),
            b"filenames": [b"a.png"],
        }
        batch[b"labels"] = batch[b"labels"].tolist()
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


def test_cifar10(cifar):
    data = cifar10(cifar, train=500)
    assert data.train_images.shape == (500, 3, 16, 16)
    assert data.train_labels.bincount().tolist() == [50] * 10
    assert data.test_images.shape == (10_000, 3, 16, 16)
    assert torch.equal(cifar10(cifar / "cifar-10-batches-py", train=500).train_images, data.train_images)
    raw = pickle.loads((cifar / "cifar-10-batches-py/data_batch_1").read_bytes(), encoding="bytes")
    first = raw[b"labels"].index(int(data.train_labels[0]))
    image = torch.from_numpy(raw[b"data"][first]).reshape(3, 32, 32).float()
    area = image.reshape(3, 16, 2, 16, 2).mean((2, 4))
    scale = np.polyfit(area[0].flatten(), data.train_images[0, 0].flatten(), 1)
    assert np.allclose(np.polyval(scale, area[0]), data.train_images[0, 0], atol=1e-4)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or no batch"),
        (b"not a pickle", "damaged, or no batch"),
        (pickle.dumps({b"data": np.zeros((5, 3072), np.uint8), b"labels": [0] * 5}), "is no batch of CIFAR-10"),
        (
            pickle.dumps({b"data": np.zeros((10_000, 3072), np.uint8), b"labels": [10] * 10_000}),
            "labels must be integers from 0 to 9",
        ),
        (pickle.dumps({b"data": np.zeros((10_000, 3072), np.uint8), b"fine_labels": [0] * 10_000}), "damaged, or no batch"),
        (pickle.dumps([1, 2]), "damaged, or no batch"),
        (pickle.dumps(Evil()), "asks for builtins.exec"),
    ],
    ids=["empty", "text", "few", "labels", "cifar100", "list", "evil"],
)
def test_damaged_batches(cifar, tmp_path, content, message):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (cifar / "cifar-10-batches-py").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_3 in .*; --root must name"):
        cifar10(tmp_path)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cifar10(tmp_path)


def test_bad_sizes(cifar):
    with pytest.raises(ValueError, match="size must divide 32"):
        cifar10(cifar, size=7)
    with pytest.raises(ValueError, match="train must be an integer, from 10"):
        digits(5)


def test_resnet():
    # He et al. report 0.27M parameters for depth 20; with projection shortcuts 272,474.
    assert sum(p.numel() for p in ResNet(20).parameters()) == 272_474
    assert ResNet(8, channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    over = [row["layer"] for row in ok.report(ResNet(8), where=ok.convs).rows if row["determined"] == "over"]
    assert over == ["blocks.1.shortcut.0", "blocks.2.shortcut.0"]
    with pytest.raises(ValueError, match="depth must be 6 b"):
        ResNet(10)


@pytest.mark.filterwarnings("ignore:form='pairs'")
def test_demo_arms_share_everything_but_the_penalty(monkeypatch):
    data, seen = digits(100), []
    results = demo.train_seed(data, seed=3, epochs=2, batch=50, tick=lambda: seen.append(1))
    assert len(seen) == 2
    assert [result.arm for result in results] == list(demo.ARMS)
    again = demo.train_seed(data, seed=3, epochs=2, batch=50, tick=lambda: None)
    assert all(torch.equal(a.weights[k], b.weights[k]) for a, b in zip(results, again, strict=True) for k in a.weights)
    # Without its penalty any arm is the arm none.
    monkeypatch.setattr(demo, "STRENGTH", 0.0)
    plain = demo.train_seed(data, seed=3, epochs=2, batch=50, tick=lambda: None)
    for result in plain:
        assert all(torch.equal(result.weights[k], results[0].weights[k]) for k in result.weights)
    for result in results[1:]:
        assert not torch.equal(result.weights["conv.weight"], results[0].weights["conv.weight"])
