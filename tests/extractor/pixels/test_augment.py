"""What is drawn, that it is drawn from the given generator alone, and that one map does all geometry."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from extractor.pixels.augment import NAMES, NONE, POLICIES, STANDARD, Augmentation, neutral, random_box
from extractor.pixels.preprocess import Preprocess
from extractor.pixels.settings import AugmentSettings
from store.errors import UsageError

PIXELS = Preprocess(72, 64, "bilinear", (0.5, 0.25, 0.75), (0.2, 0.2, 0.2))
STILL = Augmentation(area=None, flip=0.0, rotation=1e-9)  # through the map, and nowhere


def picture(width: int = 100, height: int = 80, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def draw(augmentation: Augmentation, seed: int = 0, image: Image.Image | None = None) -> NDArray[np.uint8]:
    return augmentation.pixels(PIXELS.scaled(image or picture()), np.random.default_rng(seed), PIXELS)


def test_random_boxes_are_inside_and_of_the_asked_area() -> None:
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(2000):
        left, top, right, bottom = random_box(60, 40, rng)
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        areas.append((right - left) * (bottom - top) / 2400)
    assert 0.3 < min(areas) < 0.4
    assert random_box(100, 2, np.random.default_rng(0)) == (49, 0, 51, 2)


@pytest.mark.parametrize("seed", range(8))
def test_the_standard_is_a_crop_and_then_a_flip(seed: int) -> None:
    image, rng = PIXELS.scaled(picture()), np.random.default_rng(seed)
    cropped = np.asarray(image.crop(random_box(*image.size, rng)).resize((64, 64), Image.Resampling.BILINEAR))
    expected = cropped[:, ::-1] if rng.random() < 0.5 else cropped
    found = draw(STANDARD, seed)
    assert found.shape == (64, 64, 3)
    assert found.dtype == np.uint8
    assert (found == expected).all()


def test_none_is_the_image_as_it_is() -> None:
    assert (draw(Augmentation.named("none")) == PIXELS.pixels(picture())).all()
    assert not NONE
    assert STANDARD
    assert replace(NONE, rotation=5.0)
    assert not replace(NONE, ratio=(1.0, 1.0)), "the aspect of crops without crops"


def test_a_map_that_moves_nothing_changes_nothing() -> None:
    assert np.abs(draw(STILL).astype(int) - PIXELS.pixels(picture())).max() <= 1


def dot(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The centre of what is bright, from the middle of the picture."""
    weight = np.maximum(image[..., 0].astype(float) - 140, 0)
    places = np.arange(64) - 31.5
    return np.array([weight.sum(axis=0) @ places, weight.sum(axis=1) @ places]) / weight.sum()


def with_dot(x: float, y: float) -> Image.Image:
    """A bright disc of radius 5 on the neutral colour of `PIXELS`, so many pixels from the middle."""
    across, down = np.meshgrid(np.arange(72) - 35.5 - x, np.arange(72) - 35.5 - y)
    pixels = np.tile(np.array(neutral(PIXELS), np.uint8), (72, 72, 1))
    pixels[across**2 + down**2 <= 25] = 255
    return Image.fromarray(pixels)


def test_rotation_turns_about_the_middle_by_no_more_than_asked() -> None:
    angles = []
    for seed in range(40):
        x, y = dot(draw(replace(STILL, rotation=30.0), seed, with_dot(20, 0)))
        assert np.hypot(x, y) == pytest.approx(20, abs=0.3)
        angles.append(np.degrees(np.arctan2(y, x)))
    assert min(angles) < -20
    assert max(angles) > 20
    assert np.abs(angles).max() <= 30.5


def test_translation_moves_by_a_share_of_the_side() -> None:
    moved = np.array([dot(draw(replace(STILL, translation=0.25), seed, with_dot(0, 0))) for seed in range(40)])
    assert np.abs(moved).max() <= 16.3
    assert (np.ptp(moved, axis=0) > 24).all(), "in both directions, and either way"


def test_zoom_scales_and_shear_keeps_the_area() -> None:
    def area(augmentation: Augmentation, seed: int) -> int:
        return int((draw(augmentation, seed, with_dot(0, 0))[..., 0] > 190).sum())

    zoomed = [area(replace(STILL, zoom=1.0), seed) / area(STILL, 0) for seed in range(40)]
    assert 0.2 < min(zoomed) < 0.4, "half the size is a quarter of the area"
    assert 3 < max(zoomed) < 4.3
    sheared = [area(replace(STILL, shear=30.0), seed) / area(STILL, 0) for seed in range(20)]
    assert sheared == pytest.approx([1.0] * 20, abs=0.12)


def test_what_lies_outside_has_the_colour_that_the_network_sees_as_zero() -> None:
    far = draw(replace(STILL, translation=1.0), 3)
    assert (far == neutral(PIXELS)).all(axis=2).mean() > 0.3
    assert np.abs(PIXELS.normalise(np.array([[[neutral(PIXELS)]]], np.uint8))).max() < 0.02
    assert neutral(replace(PIXELS, channels="bgr")) == neutral(PIXELS)[::-1]
    assert neutral(replace(PIXELS, mean=(127.5,), input_range=255.0)) == (128, 128, 128)


def test_flips_happen_as_often_as_asked() -> None:
    plain = PIXELS.pixels(picture())
    for field, mirrored in (("flip", plain[:, ::-1]), ("vertical_flip", plain[::-1])):
        drawn = [draw(replace(NONE, **{field: 0.25}), seed) for seed in range(200)]
        assert {each.tobytes() for each in drawn} == {plain.tobytes(), mirrored.tobytes()}
        assert 30 <= sum((each == mirrored).all() for each in drawn) <= 70


def test_light_changes_by_factors() -> None:
    plain = PIXELS.pixels(picture()).astype(float)
    factors = [draw(replace(NONE, brightness=0.5), seed).mean() / plain.mean() for seed in range(40)]
    assert 0.45 < min(factors) < 0.7
    assert 1.2 < max(factors) < 1.55
    spreads = [draw(replace(NONE, contrast=0.5), seed).std() / plain.std() for seed in range(40)]
    assert 0.45 < min(spreads) < 0.7
    assert 1.2 < max(spreads) < 1.55


@pytest.mark.parametrize("name", POLICIES)
def test_policies_draw_from_the_given_generator_alone(name: str) -> None:
    import torch

    augmentation = replace(NONE, policy=name)
    state = torch.random.get_rng_state()
    alone = [draw(augmentation, seed) for seed in range(12)]
    assert torch.equal(torch.random.get_rng_state(), state), "dropout elsewhere would draw other numbers"
    assert len({each.tobytes() for each in alone}) > 6
    assert (alone[0].shape, alone[0].dtype) == ((64, 64, 3), np.uint8)
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            torch.rand(100)

    with ThreadPoolExecutor(4) as pool:
        disturbing = pool.submit(disturb)
        together = list(pool.map(lambda seed: draw(augmentation, seed), range(12)))
        done.set()
        disturbing.result()
    assert all((one == other).all() for one, other in zip(alone, together, strict=True))


def test_facts_are_what_differs_from_nothing_and_come_back() -> None:
    assert NONE.facts() == {}
    assert STANDARD.facts() == {"area": [0.35, 1.0], "ratio": [0.75, 4 / 3], "flip": 0.5}
    some = Augmentation(rotation=15.0, zoom=0.2, vertical_flip=0.5, policy="augmix")
    for each in (NONE, STANDARD, some, replace(some, area=None)):
        assert Augmentation.from_facts(each.facts()) == each


@pytest.mark.parametrize(
    "changes",
    [
        {"area": (0.0, 1.0)},
        {"area": (0.5, 0.4)},
        {"ratio": (2.0, 1.0)},
        {"flip": 1.5},
        {"vertical_flip": -0.1},
        {"rotation": 200.0},
        {"translation": 2.0},
        {"shear": 90.0},
        {"zoom": -1.0},
        {"brightness": 1.5},
        {"contrast": float("nan")},
        {"policy": "cutmix"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_meant_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        Augmentation(**changes)


def test_names() -> None:
    assert all(isinstance(Augmentation.named(name), Augmentation) for name in NAMES)
    with pytest.raises(UsageError, match="trivialaugment"):
        Augmentation.named("trivial")


def test_settings_change_what_a_name_stands_for() -> None:
    assert AugmentSettings(augment="randaugment").augmentation == replace(STANDARD, policy="randaugment")
    assert AugmentSettings(augment="none", rotation=15.0).augmentation == replace(NONE, rotation=15.0)
    changed = AugmentSettings(crop_area=0.08, flip="vertical").augmentation
    assert (changed.area, changed.vertical_flip, changed.flip) == ((0.08, 1.0), 0.5, 0.0)
