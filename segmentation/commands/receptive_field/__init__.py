"""The command ``lightning receptive_field``: which input pixels does one output pixel see?"""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor

from ...base import SegmentationModule
from ...checkpoints import load_trained
from ...errors import UserError
from .drawing import draw_layers, draw_network
from .fields import Field, effective_field, layer_fields, network_fields, read_layer
from .tables import effect_table, field_table, main_rows, network_table

CONSOLE = Console(width=120)


def receptive_field(
    trainer: L.Trainer,
    model: SegmentationModule | None = None,
    ckpt_path: str | None = None,
    layers: list[str] | None = None,
    image: str | None = None,
    size: int | list[int] | None = None,
    stages: list[str] | None = None,
    output_dir: str = "receptive_field",
) -> None:
    """Show which pixels one output pixel sees, in theory and in effect, and the sizes of the feature maps.

    Args:
        trainer: chooses the device.
        model: the network; not needed with `layers`.
        ckpt_path: a checkpoint, to compare the trained network with the same network before training.
        layers: a plain chain of layers instead of a network, such as [conv3, pool2s2, conv3d2]: conv or pool with its
            kernel, then stride s, dilation d and padding p if they differ from 1, 1 and 0.
        image: the image to look at; by default noise of 512 x 512 pixels.
        size: resize the image to this side in pixels, or to [height, width].
        stages: modules to show, such as [pool5.0, pool5, logits]; by default the main ones.
        output_dir: folder for the picture.

    Raises:
        UserError: if neither a model nor layers are given, or one of the values above cannot be used.
    """
    if layers is not None:
        analyse_layers(layers, size, Path(output_dir))
    elif model is not None:
        device = trainer.strategy.root_device
        analyse_network(model, ckpt_path, image, size, stages or (), device, Path(output_dir))
    else:
        raise UserError("receptive_field has nothing to look at: give --model, --config or --layers")


def analyse_layers(layers: Sequence[str], size: int | Sequence[int] | None, output_dir: Path) -> None:
    """Print and draw the fields of a chain of layers.

    Args:
        layers: see `layer_fields`.
        size: side of an image in pixels, to count the units that each layer makes of it; None does not count.
        output_dir: folder for ``layers.png``.

    Raises:
        UserError: if there is no layer, a layer is not written as `layer_fields` describes, or the size has two sides.
    """
    if not layers or (size is not None and not isinstance(size, int)):
        raise UserError(f"--layers takes one layer or more, and then --size one side, got {layers} and {size}")
    fields, units = layer_fields(layers), []
    if size is not None:
        for layer in layers:
            kernel, stride, dilation, padding = read_layer(layer)
            size = max(0, (size + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1)
            units.append(str(size))
    CONSOLE.print(field_table("What one unit sees", fields, {"units": units}))
    output_dir.mkdir(parents=True, exist_ok=True)
    draw_layers(layers, fields, output_dir / "layers.png")
    print(f"picture      {output_dir / 'layers.png'}")


def analyse_network(
    network: SegmentationModule,
    checkpoint: str | None,
    image: str | None,
    size: int | Sequence[int] | None,
    stages: Sequence[str],
    device: torch.device,
    output_dir: Path,
) -> None:
    """Print and draw the fields of a network, the effective field before and after training.

    Args:
        network: the network before training.
        checkpoint: the same network after training; None leaves this out.
        image: a file; None takes noise.
        size: a side, or height and width, to which the image is resized; None keeps its size, and makes noise 512.
        stages: see `network_fields`; by default the table is cut to `ROWS` main stages.
        device: where feature maps and effective fields are computed.
        output_dir: folder for a picture named after the network.
    """
    name = type(network).__name__
    pixels = read_image(image, size, network.in_channels)
    fields = fields_on_one_thread(network, stages)
    fields = fields if stages else main_rows(fields)
    network.to(device)
    CONSOLE.print(network_table(network, fields, pixels.shape[1:]))
    effects = {"in effect, before training" if checkpoint else "in effect": effective_field(network, pixels)}
    if checkpoint is not None:
        load_trained(network, checkpoint)
        effects["in effect, after training"] = effective_field(network, pixels)
    CONSOLE.print(effect_table(effects))

    output_dir.mkdir(parents=True, exist_ok=True)
    picture = output_dir / f"{name}.png"
    draw_network(pixels, fields, effects, f"What one output pixel of {name} sees", picture)
    print(f"picture      {picture}")


def fields_on_one_thread(network: SegmentationModule, stages: Sequence[str]) -> list[Field]:
    """Return `network_fields`, measured on one thread: the strips are so thin that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return network_fields(network, stages)
    finally:
        torch.set_num_threads(threads)


def read_image(path: str | None, size: int | Sequence[int] | None, in_channels: int) -> Tensor:
    """Read an image as uint8 ``(in_channels, H, W)``, resized; without a path, return noise.

    Raises:
        UserError: if the file does not exist or cannot be read, the channels are not 1 or 3, or the size is not one or
            two sides.
    """
    sides = [size, size] if isinstance(size, int) else list(size or ())
    if len(sides) not in (0, 2) or min(sides, default=1) < 1:
        raise UserError(f"--size is one side, or height and width as [360, 480], got {size}")
    if path is None:
        height, width = sides or (512, 512)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, (in_channels, height, width), dtype=torch.uint8, generator=generator)
    if in_channels not in (1, 3):
        raise UserError(f"--image has 1 or 3 channels, but the model in_channels {in_channels}: leave --image out")
    if not Path(path).is_file():
        raise UserError(f"the image {path} does not exist")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB" if in_channels == 3 else "L")
    except OSError as error:
        raise UserError(f"the image {path} cannot be read: {error}") from error
    if sides:
        picture = picture.resize((sides[1], sides[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).view(picture.height, picture.width, in_channels).permute(2, 0, 1)
