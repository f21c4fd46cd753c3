"""Pictures with more than eight bits, turned ones and those of several pages become what is documented."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image as Pil

from lalora_flwr.data.images import unreadable
from lalora_flwr.data.pictures import as_shown


def stored(values: Any, kind: str, **options: Any) -> Pil.Image:
    """A picture as it comes from a file."""
    file = BytesIO()
    (values if isinstance(values, Pil.Image) else Pil.fromarray(values)).save(file, kind, **options)
    return Pil.open(BytesIO(file.getvalue()))


DEEP = [(np.uint16, "png"), (np.uint16, "tiff"), (np.int32, "tiff"), (np.float32, "tiff")]


@pytest.mark.parametrize(("dtype", "kind"), DEEP)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_deep_pictures_go_from_their_own_black_to_their_own_white(dtype: Any, kind: str, mode: str) -> None:
    """A radiograph has 12 bits in 16: neither all white, as clipping makes it, nor nearly black."""
    values = (np.arange(64).reshape(8, 8) * 65).astype(dtype)  # 0 to 4095
    shown = np.asarray(as_shown(stored(values, kind), mode))
    first = shown if mode == "L" else shown[..., 0]
    assert np.array_equal(first, np.round(values / 4095 * 255).astype(np.uint8)) and (
        mode == "L" or (shown == first[..., None]).all()
    )


def test_a_large_picture_is_scaled_as_a_whole() -> None:
    """It is computed in bands of rows, none of which may have a black and a white of its own."""
    values = np.tile(np.arange(1500, dtype=np.uint16)[:, None], (1, 1100))
    shown = np.asarray(as_shown(stored(values, "png"), "L"))
    assert np.array_equal(shown[:, 0], np.round(np.arange(1500) / 1499 * 255)) and (shown == shown[:, :1]).all()


@given(arrays(np.float32, (4, 5), elements=st.floats(width=32)))
def test_any_values_become_a_picture(values: Any) -> None:
    shown = np.asarray(as_shown(stored(values, "tiff"), "L")).astype(int)
    finite = np.isfinite(values)
    assert not shown[~finite].any()
    if finite.any() and values[finite].min() < values[finite].max():
        assert shown[finite].min() == 0 and shown[finite].max() == 255
    else:
        assert not shown.any()


def test_eight_bits_stay_as_they_are() -> None:
    values = np.random.default_rng(0).integers(3, 90, (6, 6, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(as_shown(stored(values, "png"), "RGB")), values)


def test_a_deep_picture_is_turned_as_exif_says() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 51
    exif = Pil.Exif()
    exif[0x0112] = 6
    turned = np.asarray(as_shown(stored(values, "png", exif=exif), "L"))
    assert np.array_equal(turned, np.rot90(values, -1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp"])
def test_of_several_pages_or_frames_it_is_the_first(kind: str) -> None:
    pages = [Pil.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    picture = stored(pages[0], kind, save_all=True, append_images=pages[1:])
    assert getattr(picture, "n_frames", 1) == 3
    red, green, blue = np.asarray(as_shown(picture, "RGB"))[4, 4]
    assert red > 200 and green < 40 and blue < 40


def test_what_cannot_be_read_is_named_with_its_reason(tmp_path: Path) -> None:
    Pil.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "words.png").write_text("no picture")
    files = [str(tmp_path / name) for name in ("good.png", "half.png", "words.png", "gone.png")]
    found = list(unreadable(Dataset.from_dict({"image": files}), "image"))
    assert [line.partition(": ")[0] for line in found] == files[1:]
    assert found[1].endswith("not one of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP") and "No such file" in found[2]
