"""The command ``lightning export``: a trained network as a file of ONNX or torch.export.

The exported graph takes pixels as they are stored and gives probabilities, so its user needs neither mean and std nor
this package. The file's metadata hold the names and colours of the classes.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..base import SegmentationModule
from ..checkpoints import identity, load_trained
from ..errors import UserError
from ..outputs import identities, writable

LEAST = 32  # pixels, the shortest side of an image that a graph for any size accepts
TOLERANCE = 1e-4  # between probabilities
IMAGES = 5  # per shape, for a network that unpools; see `compare`
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}


class Predictor(nn.Module):
    """Preprocessing, network and softmax in one module.

    Shape:
        image ``(N, C, H, W)`` as stored -> probs ``(N, num_classes, H, W)`` float32.
    """

    def __init__(self, network: SegmentationModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.probabilities(self.network(self.network.preprocess(image)))


def export(
    trainer: L.Trainer,
    model: SegmentationModule,
    ckpt_path: str | None = None,
    format: str = "onnx",
    output: str | None = None,
    size: int | list[int] | None = None,
    dtype: Literal["uint8", "uint16", "float32"] = "uint8",
) -> None:
    """Write a trained network to a file that runs without this package: stored pixels in, probabilities out.

    The command reads the file back and compares its probabilities with PyTorch's.

    Args:
        trainer: not needed; LightningCLI calls commands as methods of a trainer.
        model: the network; by default the checkpoint's own.
        ckpt_path: its weights, class names, palette, bands and value range.
        format: onnx, or torch_export for a program of torch.export.
        output: the file; by default beside the checkpoint.
        size: the only size of image that the file accepts, a side in pixels or [height, width]; by default any size.
        dtype: type of the stored pixels.

    Raises:
        UserError: if no checkpoint is given or it has no weights, the format is unknown, a package is missing, the size
            is not one or two sides, the output is the checkpoint or cannot be written, or the file does not give
            PyTorch's probabilities.
    """
    if ckpt_path is None:
        raise UserError("export needs a trained network: give --ckpt_path")
    if format not in SUFFIXES:
        raise UserError(f"--format is {' or '.join(SUFFIXES)}, got {format}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" and find_spec(name) is None]
    if missing:
        raise UserError(
            f"an export to ONNX needs {' and '.join(missing)}: pip install 'lightning-segmentation[export]', or "
            "pip install onnx onnxscript onnxruntime"
        )
    sides = [size, size] if isinstance(size, int) else list(size or ())
    if len(sides) not in (0, 2) or min(sides, default=1) < 1:
        raise UserError(f"--size is one side, or height and width as [360, 480], got {size}")
    path = Path(output) if output else Path(ckpt_path).with_suffix(SUFFIXES[format])
    if identities(path) & identities(Path(ckpt_path)):
        raise UserError(f"{path} is the checkpoint: name another file with --output")
    writable(path.parent)
    load_trained(model, ckpt_path)
    low, high = model.value_range or (0, 0)
    if dtype != "float32" and (low < 0 or high > np.iinfo(dtype).max):
        wider = "uint16" if low >= 0 and high <= 65535 else "float32"
        raise UserError(
            f"{ckpt_path} was trained on values from {low:g} to {high:g}, which --dtype {dtype} does not hold: set "
            f"--dtype {wider}"
        )
    model.channels_last = False  # else the order of the memory would depend on the size
    path.parent.mkdir(parents=True, exist_ok=True)
    write(Predictor(model.cpu().eval()), format, path, sides, dtype)


def write(predictor: Predictor, format: str, path: Path, sides: Sequence[int], dtype: str) -> None:
    """Write a file, read it back, compare it with PyTorch, and print what it is; remove it if it differs.

    Args:
        predictor: the network, in evaluation.
        format: ``onnx`` or ``torch_export``.
        path: the file.
        sides: height and width of the only image that the file accepts; empty for any size.
        dtype: type of the stored pixels.

    Raises:
        UserError: if the file does not give PyTorch's probabilities.
    """
    network = predictor.network
    with silence():
        program = capture(predictor, pixels(network, dtype, [2, *(sides or (250, 267))]), fixed=bool(sides))
        save, read = (write_onnx, read_onnx) if format == "onnx" else (write_torch, read_torch)
        kind = save(program, metadata(network, sides, dtype), path)
        try:
            shapes, exported = shapes_to_try(sides), read(path)
            unpools = any(n.target is torch.ops.aten.max_pool2d_with_indices.default for n in program.graph.nodes)
            images = IMAGES if unpools else 1
            difference = max(compare(predictor, exported, dtype, shape, images) for shape in shapes)
        except BaseException:
            path.unlink()
            raise
    if difference > TOLERANCE:
        path.unlink()
        raise UserError(
            f"the probabilities of {path} differ from PyTorch's by {difference:.1e}, more than {TOLERANCE:g}: it was "
            "removed; try the other --format"
        )
    spatial = "{} x {}".format(*sides) if sides else f"height, width, of {LEAST} or more"
    print(f"file         {path}")
    print(f"size         {path.stat().st_size / 1e6:.1f} MB")
    print(f"input        image {dtype} (batch, {network.in_channels}, {spatial}), pixels as they are stored")
    print(f"output       probs float32 (batch, {network.num_classes}, as high and wide)")
    print(f"format       {kind}")
    print(f"tried        {', '.join(' x '.join(map(str, shape)) for shape in shapes)} (batch x height x width)")
    print(f"difference   {difference:.1e} at most, from PyTorch's probabilities")
    if unpools:
        print("             more around pixels where rounding decides which of two values is a pooling's maximum")


def metadata(network: SegmentationModule, sides: Sequence[int], dtype: str) -> dict[str, str]:
    """Return the metadata of the file, each value as JSON; ``size`` is null if the graph accepts any size."""
    values = {
        **identity(network), "in_channels": network.in_channels, "dtype": dtype, "size": list(sides) or None
    }  # fmt: skip
    return {key: json.dumps(value) for key, value in values.items()}


def capture(predictor: Predictor, image: Tensor, fixed: bool) -> ExportedProgram:
    """Return the graph of a predictor, for any batch and, unless `fixed`, any size of image.

    Args:
        predictor: the network, in evaluation.
        image: an example.
        fixed: whether the graph accepts the example's height and width alone.
    """
    dims = {0: Dim("batch")} if fixed else {0: Dim("batch"), 2: Dim("height", min=LEAST), 3: Dim("width", min=LEAST)}
    # As in torch.onnx.export: a batch of 1, or a map of 1 pixel, does not need another graph.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(
            predictor,
            (image,),
            dynamic_shapes={"image": dims},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    # The assertions on sizes distinguish views from copies, which give the same numbers; `compare` checks the numbers.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def write_onnx(program: ExportedProgram, about: dict[str, str], path: Path) -> str:
    """Write an ONNX file, and return its format with the opset that it needs."""
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["image"], output_names=["probs"], verbose=False, external_data=False
    )
    assert exported is not None  # as always without a path
    exported.model.metadata_props.update(about)
    exported.save(path)
    return f"ONNX, opset {exported.model.opset_imports['']}"


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Read an ONNX file as a function of pixels."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["probs"], {"image": image.numpy()})[0])


def write_torch(program: ExportedProgram, about: dict[str, str], path: Path) -> str:
    """Write a torch.export file with the metadata as extra files, and return its format with the version of torch."""
    torch.export.save(program, path, extra_files=about)
    return f"torch.export of torch {torch.__version__}"


def read_torch(path: Path) -> Callable[[Tensor], Tensor]:
    """Read a torch.export file as a function of pixels."""
    return torch.export.load(path).module()


def shapes_to_try(sides: Sequence[int]) -> list[list[int]]:
    """Return the shapes (batch, height, width) for the comparison: the smallest, and random ones with odd sides too."""
    rng = np.random.default_rng(0)
    if sides:
        return [[batch, *sides] for batch in (1, 3)]
    return [[1, LEAST, LEAST]] + [[batch, *rng.integers(LEAST, 192, 2).tolist()] for batch in (1, 3, 2, 1)]


def pixels(network: SegmentationModule, dtype: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return noise of a stored type: shape (batch, height, width) -> ``(batch, in_channels, height, width)``."""
    batch, height, width = shape
    noise = np.random.default_rng(seed).random((batch, network.in_channels, height, width), dtype=np.float32)
    full = 1 if dtype == "float32" else np.iinfo(dtype).max
    return torch.from_numpy((noise * full).astype(dtype))


def compare(
    predictor: Predictor, exported: Callable[[Tensor], Tensor], dtype: str, shape: Sequence[int], images: int
) -> float:
    """Return the largest difference between two functions' probabilities on images of one shape; inf for nan.

    Args:
        predictor: the network in PyTorch.
        exported: the function of the file.
        dtype: type of the pixels.
        shape: batch, height and width.
        images: how many images to try until one gives the same probabilities. If two maxima of a pooling differ by
            rounding alone, a network that unpools (SegNet, DeconvNet) may put the value in another place. A wrong
            graph is wrong on all images.
    """
    differences = []
    for seed in range(images):
        image = pixels(predictor.network, dtype, shape, seed)
        with torch.inference_mode():
            difference = (exported(image) - predictor(image)).abs().max()
        differences.append(float(difference.nan_to_num(float("inf"))))
        if differences[-1] <= TOLERANCE:
            break
    return min(differences)


@contextmanager
def silence() -> Iterator[None]:
    """Hide the messages of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
