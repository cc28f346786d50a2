"""Data augmentation: random crops, flips, affine maps, brightness, contrast, and torchvision's policies.

Every number is drawn from the generator of the caller, so the same generator gives the same pixels in any thread and in any
order. Fine-tuning draws again in every epoch; a cache may hold several views of each image (see `views`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from store.errors import UsageError

from .preprocess import FILTERS, Preprocess

POLICIES = {  # their names in torchvision.transforms.v2
    "trivialaugment": "TrivialAugmentWide",
    "randaugment": "RandAugment",
    "autoaugment": "AutoAugment",
    "augmix": "AugMix",
}
NAMES = ("standard", *POLICIES, "none")
SMOOTH = ("bicubic", "lanczos")  # bicubic is the best filter of Pillow's affine maps


@dataclass(frozen=True)
class Augmentation:
    """The random changes and their ranges; the default is a random crop and a horizontal flip.

    Attributes:
        area: least and largest share of the image in a random crop (torchvision's recipe begins at 0.08, which is for training
            from scratch); None for the network's own centred crop.
        ratio: narrowest and widest aspect of the random crop.
        flip, vertical_flip: probability of a mirror image, left to right and upside down.
        rotation: degrees, either way.
        translation: share of the side, in both directions.
        shear: degrees, in both directions.
        zoom: 0.25 is from 1/1.25 to 1.25 times the size.
        brightness, contrast: 0.2 is a factor from 0.8 to 1.2.
        policy: one of `POLICIES`, applied last.

    Raises:
        UsageError: a number is out of range, or the policy is unknown.
    """

    area: tuple[float, float] | None = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    vertical_flip: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    shear: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    policy: str | None = None

    def __post_init__(self) -> None:
        area, ratio = self.area or (1.0, 1.0), self.ratio
        allowed = {
            "area": (0 < area[0] <= area[1] <= 1, "two shares between 0 and 1, the smaller first"),
            "ratio": (0 < ratio[0] <= ratio[1] < math.inf, "two positive numbers, the smaller first"),
            "flip": (0 <= self.flip <= 1, "0 to 1"),
            "vertical_flip": (0 <= self.vertical_flip <= 1, "0 to 1"),
            "rotation": (0 <= self.rotation <= 180, "0 to 180 degrees"),
            "translation": (0 <= self.translation <= 1, "0 to 1"),
            "shear": (0 <= self.shear < 90, "0 to less than 90 degrees"),
            "zoom": (0 <= self.zoom < math.inf, "0 or more"),
            "brightness": (0 <= self.brightness <= 1, "0 to 1"),
            "contrast": (0 <= self.contrast <= 1, "0 to 1"),
            "policy": (self.policy is None or self.policy in POLICIES, ", ".join(POLICIES)),
        }
        for name, (fits, expected) in allowed.items():
            if not fits:
                message = f"{name} of an augmentation is {getattr(self, name)!r}; expected {expected}"
                raise UsageError(message)

    @classmethod
    def named(cls, name: str) -> Augmentation:
        """``standard`` (crops and flips), the same with one of `POLICIES` after it, or ``none``.

        Raises:
            UsageError: it is none of these.
        """
        if name not in NAMES:
            message = f"no augmentation {name!r}; expected {', '.join(NAMES)}"
            raise UsageError(message)
        return NONE if name == "none" else replace(STANDARD, policy=name if name in POLICIES else None)

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return replace(self, ratio=NONE.ratio) != NONE

    def facts(self) -> dict[str, Any]:
        """As JSON: the fields that differ from no augmentation at all."""
        none = asdict(NONE)
        changes = {name: value for name, value in asdict(self).items() if value != none[name]}
        changes |= {} if self.area is None else {"ratio": self.ratio}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Augmentation:
        """Inverse of `facts`."""
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        return replace(NONE, **fields)

    def pixels(self, image: Image.Image, rng: np.random.Generator, preprocess: Preprocess) -> NDArray[np.uint8]:
        """A random version of an image that is resized but not cropped (`Preprocess.scaled`): ``(crop, crop, 3)`` uint8."""
        side = preprocess.crop
        box = random_box(image.width, image.height, rng, self.area, self.ratio) if self.area else None
        flipped, upended = self._happens(self.flip, rng), self._happens(self.vertical_flip, rng)
        if self.rotation or self.translation or self.shear or self.zoom:
            image = self._mapped(image, box, rng, preprocess)
        elif box:
            image = image.crop(box).resize((side, side), FILTERS[preprocess.interpolation])
        else:
            image = Image.fromarray(preprocess.pixels(image))
        for enhance, strength in ((ImageEnhance.Brightness, self.brightness), (ImageEnhance.Contrast, self.contrast)):
            if strength:
                image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
        if self.policy:
            image = _by_policy(self.policy, image, neutral(preprocess), rng)
        return np.asarray(image)[:: -1 if upended else 1, :: -1 if flipped else 1]

    @staticmethod
    def _happens(probability: float, rng: np.random.Generator) -> bool:
        return probability > 0 and rng.random() < probability

    def _mapped(
        self, image: Image.Image, box: tuple[int, int, int, int] | None, rng: np.random.Generator, preprocess: Preprocess
    ) -> Image.Image:
        """Crop, zoom, shear, rotation and translation as one map, hence one interpolation.

        Pixels beside the crop come into view before the neutral colour does.
        """
        side = preprocess.crop
        left, top, right, bottom = box or _centred(image.size, side)
        angle, *shears = np.radians(rng.uniform(-1, 1, 3) * (self.rotation, self.shear, self.shear))
        shift = rng.uniform(-1, 1, 2) * self.translation * side
        factor = (1 + self.zoom) ** rng.uniform(-1, 1)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        lean = np.array([[1, np.tan(shears[0])], [np.tan(shears[1]), 1 + np.tan(shears[0]) * np.tan(shears[1])]])
        # Pillow needs the inverse map, from the pixels of the result to those of the image, about the middle of both.
        back = np.diag([(right - left) / side, (bottom - top) / side]) @ np.linalg.inv(factor * turn @ lean)
        offset = np.array([(left + right) / 2, (top + bottom) / 2]) - back @ (shift + side / 2)
        resample = Image.Resampling.BICUBIC if preprocess.interpolation in SMOOTH else Image.Resampling.BILINEAR
        matrix = (*back[0], offset[0], *back[1], offset[1])
        return image.transform((side, side), Image.Transform.AFFINE, matrix, resample, fillcolor=neutral(preprocess))


STANDARD = Augmentation()
NONE = Augmentation(area=None, flip=0.0)


def random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop (Szegedy et al. 2014), drawn as torchvision's RandomResizedCrop does.

    torchvision's own draws from torch's global generator, which threads would share with dropout.
    """
    for _ in range(10):
        size = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(*np.log(ratio)))
        w, h = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _centred((width, height), min(width, height))


def _centred(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def neutral(preprocess: Preprocess) -> tuple[int, ...]:
    """The RGB colour that the network sees as zero, for pixels outside of the image."""
    mean = (preprocess.mean * 3)[:3]  # one number may stand for all channels
    mean = mean[::-1] if preprocess.channels == "bgr" else mean
    return tuple(min(max(round(255 * value / preprocess.input_range), 0), 255) for value in mean)


def _by_policy(name: str, image: Image.Image, fill: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
    """Apply one of torchvision's policies.

    They draw from torch's global generator, as dropout and other threads do, and would influence each other. So their draws
    get a generator of their own; the mode that does this is active in this thread alone.
    """
    import torch

    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    with _own_draws()(generator):
        changed: Image.Image = _policy(name, fill)(image)
    return changed


@cache
def _policy(name: str, fill: tuple[int, ...]) -> Any:
    from torchvision.transforms import InterpolationMode, v2

    return getattr(v2, POLICIES[name])(interpolation=InterpolationMode.BILINEAR, fill=list(fill))


@cache
def _own_draws() -> Callable[[Any], Any]:
    import torch
    from torch.overrides import TorchFunctionMode

    draws = {
        torch.rand,
        torch.randn,
        torch.randint,
        torch.randperm,
        torch.bernoulli,
        torch.multinomial,
        torch._sample_dirichlet,
    }

    class OwnDraws(TorchFunctionMode):
        def __init__(self, generator: torch.Generator) -> None:
            super().__init__()
            self._generator = generator

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            own = {"generator": self._generator} if function in draws else {}
            return function(*args, **(kwargs or {}), **own)

    return OwnDraws
