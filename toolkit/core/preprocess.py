"""Prepare a face crop for a network. How is data beside the weights, never inferred."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record, fault_of
from pkd.toolkit.core.text import read_text

PerChannel = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


class Preprocess(Record):
    """State crop geometry and pixel scaling: network input = (pixel − mean) / std, in ``channels`` order."""

    size: int = Field(default=112, ge=8, le=8192)
    """Height and width of the square crop, pixels."""
    template: str = "arcface5pt"
    """Alignment template the crop was warped to; ``none`` for images that are not faces. Only ``arcface5pt`` can be
    aligned by pkd: crops of any other are taken as they come."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Channel order the network was trained on. Crops are RGB everywhere in pkd."""
    mean: float | PerChannel = 127.5
    """Subtracted from each 0–255 pixel value: one number, or one per channel in ``channels`` order."""
    std: float | PerChannel = 127.5
    """Divides the difference, one number or three; 1 with mean 0 where the network normalises by itself."""

    @field_validator("std")
    @classmethod
    def _divides(cls, std: float | PerChannel) -> float | PerChannel:
        if not np.all(std):
            raise ValueError("must not be 0")
        return std

    @field_validator("mean", "std")
    @classmethod
    def _near_pixels(cls, value: float | PerChannel) -> float | PerChannel:
        if np.max(np.abs(value)) > 1e6:
            raise ValueError("must be in units of pixels, which are 0 to 255")
        return value

    @property
    def scales_nothing(self) -> bool:
        """Whether the network takes pixels of 0 to 255 as they are."""
        return not np.any(self.mean) and bool(np.all(np.equal(self.std, 1)))

    @property
    def name(self) -> str:
        """Give a short form for people and the REST API, for example ``arcface5pt-112-rgb``."""
        return f"{self.template}-{self.size}-{self.channels}"

    @classmethod
    def parse(cls, spec: str) -> Preprocess:
        """Read ``channels=rgb,mean=127.5,std=127.5`` or the path of a JSON file with the same fields."""
        example = "for example channels=rgb,mean=127.5,std=127.5"
        try:
            if "=" not in spec:
                return cls.model_validate(json.loads(read_text(spec))).require_plausible(spec)
            fields = dict(item.split("=", 1) for item in re.split(r",(?=[^,]*=)", spec))
            values = {key.strip(): [part.strip() for part in value.split(",")] for key, value in fields.items()}
            stated = cls.model_validate({key: part if len(part) > 1 else part[0] for key, part in values.items()})
            return stated.require_plausible(spec)
        except FileNotFoundError:
            raise InputError(f"preprocessing {spec!r}: no such file. Give a JSON file or fields, {example}.") from None
        except ValidationError as error:
            field = str([*error.errors()[0]["loc"], ""][0])
            scaling = f"{field}: must be one number, or three: one per channel"
            said = scaling if field in ("mean", "std") else fault_of(error)
            raise InputError(f"preprocessing {spec!r}: {said}. Give fields, {example}.") from None
        except (ValueError, OSError) as error:
            raise InputError(f"preprocessing {spec!r}: {error}. Give a JSON file or fields, {example}.") from None

    def require_plausible(self, spec: str) -> Preprocess:
        """Return itself; raise InputError where mean and std cannot be meant for pixels of 0 to 255.

        Torchvision, and who copies from it, states them for pixels of 0 to 1; OpenCV's ``scale`` is a factor, not a
        divisor. Either is a valid record and ruins an encoder without a word. ``spec``: what errors name.
        """
        mean, std = (np.broadcast_to(np.asarray(value, np.float64), 3) for value in (self.mean, self.std))
        low, high = np.min((0 - mean) / std), np.max((255 - mean) / std)
        said = f"preprocessing {spec!r}: pixels are 0 to 255, so the network would see {low:.4g} to {high:.4g}"
        if (std <= 0).any():
            raise InputError(f"{said}. The std divides: it must be above 0.")
        if std.min() < 0.05:
            raise InputError(f"{said}. The std divides; a factor like OpenCV's scale is std={_listed(1 / std)}.")
        if 0 <= mean.min() <= mean.max() <= 1 and std.max() <= 1 and not self.scales_nothing:
            more = f"mean={_listed(255 * mean)},std={_listed(255 * std)}"
            raise InputError(f"{said}. These are stated for pixels of 0 to 1: multiply both by 255, {more}.")
        if ((mean > 0) & (mean < 1)).any() or std.min() < 1:
            raise InputError(f"{said}. One of them is stated for pixels of 0 to 1: multiply that by 255.")
        if mean.min() < 0 or mean.max() > 255 or std.max() > 1024:
            raise InputError(f"{said}. State both in units of pixels, for example mean=127.5,std=127.5.")
        return self

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale uint8 N×H×W×3 RGB → float32 N×3×H×W. The one numpy implementation; graphs do the same.

        Raises InputError for another shape or dtype.
        """
        self.check(crops)
        ordered = crops if self.channels == "rgb" else crops[..., ::-1]
        scaled = (ordered.astype(np.float32) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def check(self, crops: NDArray[np.uint8]) -> None:
        """Raise InputError unless ``crops`` is uint8 N×size×size×3."""
        expected = (self.size, self.size, 3)
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != expected:
            raise InputError(
                f"crops are {crops.dtype} {crops.shape}; this encoder takes uint8 N×{self.size}×{self.size}×3 RGB. "
                f"Align photographs with pkd-align --size {self.size}."
            )


def _listed(values: NDArray[np.float64]) -> str:
    """Write one number, or three, as an option takes them."""
    numbers = [f"{value:.6g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 else ",".join(numbers)
