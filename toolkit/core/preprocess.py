"""Prepare a face crop for a network. How is data beside the weights, never inferred."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import Record, fault_of

PerChannel = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


class Preprocess(Record):
    """State crop geometry and pixel scaling: network input = (pixel − mean) / std, in ``channels`` order."""

    size: int = Field(default=112, ge=8)
    """Height and width of the square crop, pixels."""
    template: str = "arcface5pt"
    """Alignment template the crop was warped to; ``none`` for images that are not faces."""
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
                return cls.model_validate(json.loads(Path(spec).read_text()))
            fields = dict(item.split("=", 1) for item in re.split(r",(?=[^,]*=)", spec))
            values = {key.strip(): [part.strip() for part in value.split(",")] for key, value in fields.items()}
            return cls.model_validate({key: part if len(part) > 1 else part[0] for key, part in values.items()})
        except FileNotFoundError:
            raise InputError(f"preprocessing {spec!r}: no such file. Give a JSON file or fields, {example}.") from None
        except ValidationError as error:
            field = str([*error.errors()[0]["loc"], ""][0])
            scaling = f"{field}: must be one number, or three: one per channel"
            said = scaling if field in ("mean", "std") else fault_of(error)
            raise InputError(f"preprocessing {spec!r}: {said}. Give fields, {example}.") from None
        except (ValueError, OSError) as error:
            raise InputError(f"preprocessing {spec!r}: {error}. Give a JSON file or fields, {example}.") from None

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
                "Align photographs with pkd-align first."
            )
