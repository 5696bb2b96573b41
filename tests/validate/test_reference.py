"""Reference sets: folders of images and stored statistics, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from surgery.errors import InputError
from surgery.validate.reference import open_reference


def save(path, level=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (level, level, level)).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders, and a file that is none."""
    folder = tmp_path / "coco"
    save(folder / "b.png", 10)
    save(folder / "sub" / "a.webp", 20, "RGBA")
    save(folder / "a.JPG", 30, "L")
    (folder / "captions.txt").write_text("a, b")
    return folder


def test_a_folder_is_its_images_in_the_order_of_their_paths(folder):
    reference = open_reference(str(folder))
    assert (reference.name, reference.count, reference.statistics) == ("coco", 3, None)
    images = list(reference.images())
    assert [image.mode for image in images] == ["RGB"] * 3
    assert [image.getpixel((0, 0))[0] // 10 * 10 for image in images] == [30, 10, 20]
    assert len(list(reference.images())) == 3  # again


def test_its_digest_is_of_what_the_images_are_and_not_of_their_names(folder):
    before = open_reference(folder).sha256
    (folder / "b.png").rename(folder / "sub" / "z.png")
    assert open_reference(folder).sha256 == before
    save(folder / "sub" / "z.png", 11)
    assert open_reference(folder).sha256 != before


def test_a_folder_of_fewer_than_two_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no images in"):
        open_reference(tmp_path)
    save(tmp_path / "only.png")
    with pytest.raises(InputError, match="1 image, and a reference set needs 2"):
        open_reference(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_damaged_image_is_named_before_any_is_used(folder, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"cut.{suffix}")
    content = (folder / f"cut.{suffix}").read_bytes()
    (folder / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"cut\.{suffix} cannot be read"):
        open_reference(folder)


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "page.png").write_text("<html>")
    with pytest.raises(InputError, match=r"page\.png cannot be read: it is no image"):
        open_reference(folder)


def test_statistics_are_those_that_pytorch_fid_stores(tmp_path):
    mean, root = np.arange(3.0), np.random.default_rng(0).standard_normal((3, 3))
    np.savez_compressed(tmp_path / "coco_val.npz", mu=mean, sigma=root @ root.T)
    reference = open_reference(tmp_path / "coco_val.npz")
    assert (reference.name, reference.count, reference.files) == ("coco_val.npz", None, ())
    assert np.array_equal(reference.statistics.mean, mean)
    assert np.array_equal(reference.statistics.covariance, root @ root.T)
    assert len(reference.sha256) == 64 and list(reference.images()) == []


def test_statistics_in_single_precision_become_double(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2, np.float32), sigma=np.eye(2, dtype=np.float32))
    statistics = open_reference(tmp_path / "s.npz").statistics
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(2), "cov": np.eye(2)}, "mu"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"mu has shape \(2,\) and sigma \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 5.0], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": np.array([None, 1], dtype=object), "sigma": np.eye(2)}, "allow_pickle=False"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(InputError, match=rf"other\.npz.*{message}"):
        open_reference(tmp_path / "other.npz")


def test_a_damaged_npz_is_named(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(20), sigma=np.eye(20))
    (tmp_path / "cut.npz").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(InputError, match=r"cut\.npz cannot be read"):
        open_reference(tmp_path / "cut.npz")


def test_a_path_that_is_no_reference_set_is_named(tmp_path):
    with pytest.raises(InputError, match="no reference set at .*nowhere"):
        open_reference(tmp_path / "nowhere")
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"images\.zip is no reference set"):
        open_reference(tmp_path / "images.zip")
