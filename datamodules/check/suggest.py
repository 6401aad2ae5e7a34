"""The YAML that the data doctor suggests: lines to paste into a config."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import yaml

from ..base import voc_palette
from .findings import Examination, found_colors, usual_crop


def crop_size(found: Examination) -> list[int] | None:
    """Return the configured crop, or else the median height and width in multiples of 32, at most 512."""
    if (crop := found.given.crop_size) is not None:
        return [crop, crop] if isinstance(crop, int) else [*crop]
    return usual_crop([f for f in found.of("train") if f.shape]) or None


def batch_bytes(found: Examination) -> int:
    """Return the bytes of one training batch on the device: images as stored and as float32, and masks."""
    shapes = [(*f.shape, np.dtype(f.dtype).itemsize) for f in found.of("train") if f.shape]
    if not shapes:
        return 0
    bands, height, width, stored = max(shapes, key=lambda s: s[1] * s[2])
    if (crop := found.given.crop_size) is not None:
        height, width = (crop, crop) if isinstance(crop, int) else crop
    return found.given.batch_size * height * width * (bands * (stored + 4) + 8)


def yaml_block(found: Examination) -> str:
    """Write the arguments of model and data that fit the files, to paste or to give as one more ``--config``."""
    data, name = found.data, type(found.data).__name__
    accepted = {p for cls in type(data).__mro__ for p in inspect.signature(cls).parameters}
    colored = len(found.facts[0].sample.colors or ()) if found.facts else 0
    voids = [v for v in data.void_values if not data.num_classes <= v < colored]  # not the labels of void colours
    model: dict[str, Any] = {"num_classes": data.num_classes}
    if found.mean:
        model |= {"in_channels": len(found.mean)} if len(found.mean) != 3 else {}
        model |= {"mean": digits(found.mean), "std": digits(found.std)}
    if not found.given.border_weight and found.images.any():
        model["class_weights"] = digits(found.class_weights)
    values: dict[str, Any] = {"class_names": [str(name) for name in data.class_names]}
    if [*map(tuple, data.palette)] != voc_palette(data.num_classes):
        values["palette"] = [[int(value) for value in color] for color in data.palette]
    values["void_values"] = voids
    if void_colors := getattr(data, "void_colors", None):
        values["void_colors"] = [[*color] for color in void_colors]
    values["label_map"], values["crop_size"] = data.label_map, crop_size(found)
    values["value_range"] = data.value_range
    comments = {
        "mean": "of these images; leave out mean and std if pretrained weights bring their own",
        "class_weights": "median frequency; leave out to give all pixels the same weight",
    }
    lines = ["model:", "  init_args:"] + [line(key, value, comments.get(key)) for key, value in model.items()]
    lines += ["data:", f"  class_path: {name}", "  init_args:"]
    lines += [line(key, value) for key, value in values.items() if key in accepted and value is not None]
    colors = found_colors([f for f in found.facts if f.problem == "colour" and not f.sample.colors])
    if colors and found.given.class_names:
        listed = [[*color] for color, _ in colors.most_common(data.num_classes)]
        lines += [line("# palette", listed, "the colours found, by share: sort them in the order of class_names")]
    return "\n".join(lines)


def digits(values: Iterable[float]) -> list[float]:
    """Round to four significant digits, because the values of dark scenes may be very small."""
    return [float(f"{value:.4g}") for value in values]


def line(key: str, value: Any, comment: str | None = None) -> str:
    """Write one argument as a line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return f"    {key}: {text.removesuffix('...' + chr(10)).strip()}" + (f"  # {comment}" if comment else "")
