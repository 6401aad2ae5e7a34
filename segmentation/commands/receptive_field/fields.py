"""Receptive fields of a network, in theory and in effect.

The theoretical field holds all input pixels that can change an output. The effective field holds the pixels that change
it noticeably: they are fewer and lie in the middle (W. Luo, Y. Li, R. Urtasun, R. Zemel, "Understanding the Effective
Receptive Field in Deep Convolutional Neural Networks", NIPS 2016, arXiv 1701.04128).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from ...base import SegmentationModule
from ...errors import UserError

STRIP = 768  # width of the first test image: a multiple of usual strides


@dataclass(frozen=True)
class Field:
    """The square of input pixels that a unit of one stage sees.

    Args:
        stage: name of the layer or module, followed by the number of the run if the module runs more than once.
        stride: input pixels from one unit to the next; None if the number of units does not depend on the image's size.
        rates: dilations above 1 in the stage.
        size: side of the square in input pixels; 0 for none.
        centre: input pixel in the middle of the square of unit 0; that of unit j is ``stride * j + centre``.
        bins: bins per side of a pooling over the whole image that the unit sees too; 0 for none.
    """

    stage: str
    stride: float | None
    rates: tuple[int, ...]
    size: int = 0
    centre: float = 0.0
    bins: int = 0


# A chain of layers, by the formula


def read_layer(layer: str) -> tuple[int, int, int, int]:
    """Return kernel, stride, dilation and padding of a layer of `layer_fields`.

    Raises:
        UserError: if the layer is not written as described there.
    """
    match = re.fullmatch(r"(?:conv|pool)([1-9]\d*)((?:s[1-9]\d*|d[1-9]\d*|p\d+)*)", layer)
    if match is None:
        raise UserError(
            f"'{layer}' is not a layer: write conv or pool with its kernel, then stride s, dilation d and padding p "
            "if they differ from 1, 1 and 0, such as conv3, pool2s2, conv3d2 or conv7s2p3"
        )
    options = {option[0]: int(option[1:]) for option in re.findall(r"[sdp]\d+", match[2])}
    return int(match[1]), options.get("s", 1), options.get("d", 1), options.get("p", 0)


def layer_fields(layers: Sequence[str]) -> list[Field]:
    """Follow a chain of layers: each widens the field by (kernel - 1) * dilation * product of the earlier strides.

    Args:
        layers: each ``conv`` or ``pool`` with its kernel, then its stride ``s``, dilation ``d`` and padding ``p`` if
            they differ from 1, 1 and 0: ``conv3``, ``pool2s2``, ``conv3d2``, ``conv7s2p3``.

    Raises:
        UserError: if a layer is not written like this.
    """
    fields = []
    size, stride, centre = 1, 1, 0.0
    for layer in layers:
        kernel, step, dilation, padding = read_layer(layer)
        size += (kernel - 1) * dilation * stride
        centre += ((kernel - 1) * dilation / 2 - padding) * stride
        stride *= step
        fields.append(Field(layer, stride, (dilation,) if dilation > 1 else (), size, centre))
    return fields


def ways_to_pixels(layers: Sequence[str]) -> np.ndarray:
    """Count the paths from the last layer's first unit to each pixel of its field, along one side."""
    ways, stride = np.ones(1), 1
    for layer in layers:
        kernel, step, dilation, _ = read_layer(layer)
        taps = np.zeros((kernel - 1) * dilation * stride + 1)
        taps[:: dilation * stride] = 1
        ways = np.convolve(ways, taps)
        stride *= step
    return ways


# Any network, by the gradient of its linear twin


class Call(NamedTuple):
    """One run of a module: its input map and its output map, ``(N, 1, h, w)``."""

    name: str
    module: nn.Module
    source: Tensor
    output: Tensor


class LinearTwin(TorchFunctionMode):
    """A mode in which a network runs with every operation replaced by a linear one that looks at the same pixels.

    The gradient of an output is then positive at exactly the pixels that the output sees, for any weights and any
    wiring of the layers. Every map has a single channel, ``(N, 1, h, w)``: convolutions and poolings become means over
    their windows, and operations on single pixels do nothing. The statistics of the whole image that a normalisation
    may use are not counted.

    A method replaces the operation of the same name, in place or not. Any other operation must be linear already.

    Args:
        width: of the image, a strip ``(1, 1, 1, width)``. Fields are assumed to be as high as wide.
    """

    PIXELWISE = (
        *("relu", "relu6", "leaky_relu", "prelu", "elu", "gelu", "silu", "mish", "hardtanh", "hardswish"),
        *("hardsigmoid", "sigmoid", "tanh", "softplus", "softmax", "log_softmax", "clamp"),
        *("batch_norm", "instance_norm", "layer_norm", "group_norm", "local_response_norm", "normalize"),
    )

    def __init__(self, width: int) -> None:
        super().__init__()
        self.strip = torch.ones(1, 1, 1, width, dtype=torch.float64, requires_grad=True)
        self.whole: dict[
            int, Tensor
        ] = {}  # a leaf per number of bins; gets the gradient of poolings of the whole image
        self.calls: list[Call] = []  # in order

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").removesuffix("_")
        if name in self.PIXELWISE:
            return args[0].view_as(args[0])
        twin = func if name.startswith("_") else getattr(self, name, func)  # `__getitem__` and the like are linear
        return twin(*args, **(kwargs or {}))

    def conv2d(
        self, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:  # fmt: skip
        return F.conv2d(x, mean_kernel(weight), None, stride, padding, dilation)

    def conv_transpose2d(
        self, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> Tensor:  # fmt: skip
        return F.conv_transpose2d(x, mean_kernel(weight), None, stride, padding, output_padding, 1, dilation)

    def linear(self, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        return x.double().mean(-1, keepdim=True).expand(*x.shape[:-1], len(weight))

    def max_pool2d(
        self, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Tensor:  # fmt: skip
        if dilation not in (1, (1, 1)):
            raise UserError(f"the field of a pooling with dilation {dilation} cannot be measured")
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode)

    def max_pool2d_with_indices(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return means, and as indices the number of each pixel's window in place of the places of maxima."""
        y = self.max_pool2d(x, *args, **options)
        windows = torch.arange(y[0].numel(), dtype=y.dtype).view(1, *y.shape[1:])
        return y, F.interpolate(windows, size=x.shape[2:]).long()

    def scatter(self, x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
        """Unpooling: spread each value over its window."""
        return src.gather(dim, index)

    add = staticmethod(torch.add)  # never in place, as `calls` keeps maps whose gradient is taken later
    amax = staticmethod(torch.mean)
    pixel_unshuffle = staticmethod(F.avg_pool2d)

    def pixel_shuffle(self, x: Tensor, upscale_factor: int) -> Tensor:
        return F.interpolate(x, scale_factor=upscale_factor)

    def unflatten(self, x: Tensor, dim: int, sizes: Any) -> Tensor:
        return x.unsqueeze(1) if dim == 1 else x.unflatten(dim, sizes)  # a single channel has no parts

    def cat(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        maps = dim == 1 and tensors[0].dim() == 4
        return torch.stack(list(tensors)).sum(0) if maps else torch.cat(list(tensors), dim)

    def adaptive_avg_pool2d(self, x: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, output_size)
        return self.of_whole_image(pooled, pooled.shape[3])

    adaptive_max_pool2d = adaptive_avg_pool2d

    def mean(self, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        mean = torch.mean(x, dim, keepdim)
        both = x.dim() == 4 and isinstance(dim, (tuple, list)) and {axis % 4 for axis in dim} >= {2, 3}
        return self.of_whole_image(mean, 1) if both else mean

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        product = torch.matmul(x, y)  # a map times a matrix is a mean over regions, as in PSPNet
        return self.of_whole_image(product, y.shape[1]) if (x.dim(), y.dim()) == (4, 2) else product

    def multi_head_attention_forward(self, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        return query + self.of_whole_image(query, 1), None

    def of_whole_image(self, x: Tensor, bins: int) -> Tensor:
        """Pass the gradient to the leaf of this number of bins and not to pixels."""
        leaf = self.whole.setdefault(bins, torch.ones((), dtype=torch.float64, requires_grad=True))
        return torch.ones_like(x) * leaf


def mean_kernel(weight: Tensor) -> Tensor:
    """Return a kernel of the weight's size that takes the mean over its window."""
    return torch.ones(1, 1, *weight.shape[2:], dtype=torch.float64) / weight.shape[2:].numel()


@contextmanager
def watched(network: nn.Module, remember: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Evaluate a network under hooks: call `remember` with name, module, input and output of each module's run.

    Runs that do not return one tensor of four dimensions are left out. The network itself is named ``logits``.
    """
    names = {module: name or "logits" for name, module in network.named_modules()}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module in names and args and isinstance(output, Tensor) and output.dim() == 4:
            remember(names[module], module, args[0], output)

    training = network.training
    network.eval()
    try:
        with register_module_forward_hook(hook):
            yield
    finally:
        network.train(training)


def trace(network: nn.Module, width: int) -> LinearTwin:
    """Run the linear twin of a network, and keep the run of every module in its `calls`."""
    twin = LinearTwin(width)
    with watched(network, lambda *run: twin.calls.append(Call(*run))), twin:
        network(twin.strip)
    return twin


@torch.no_grad()
def map_sizes(network: SegmentationModule, size: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Run a network on an image of zeros, and return the sizes of its feature maps.

    Args:
        network: runs on its own device; on the meta device nothing is computed.
        size: height and width of the image in pixels.

    Returns:
        channels, height and width of each module's map, by `Field.stage`.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    runs: Counter[str] = Counter()

    def remember(name: str, module: nn.Module, source: Tensor, output: Tensor) -> None:
        runs[name] += 1
        sizes[stage_name(name, runs[name])] = tuple(output.shape[1:])

    with watched(network, remember):
        network(network.mean.new_zeros(1, network.in_channels, *size))
    return sizes


def stage_name(name: str, run: int) -> str:
    """Return a module's name, followed by the number of its run from the second on."""
    return f"{name} ({run})" if run > 1 else name


def main_stages(network: nn.Module, calls: Sequence[Call]) -> list[str]:
    """Return the outermost modules that give one map; a module with three or more parallel layers is opened.

    Layers are parallel if they read the same map. In a residual block, two layers do.
    """
    ran = {call.name for call in calls}
    layers = {(call.name, id(call.source)) for call in calls if next(call.module.children(), None) is None}
    stages: list[str] = []
    for name, _ in network.named_modules():
        if name in ran and not name.startswith(tuple(f"{stage}." for stage in stages)):
            readers = Counter(source for layer, source in layers if layer.startswith(f"{name}."))
            if max(readers.values(), default=0) < 3:
                stages.append(name)
    return stages


def network_fields(network: nn.Module, stages: Sequence[str] = ()) -> list[Field]:
    """Measure the theoretical fields of a network's stages, in running order, by gradients of its linear twin.

    After an upsampling, neighbouring units see squares of different sizes: the largest size and the mean centre count.

    Args:
        network: takes an image ``(N, C, H, W)`` of any size.
        stages: names of modules, and ``logits`` for the network's output; by default those of `main_stages`.

    Raises:
        UserError: if no module of a stage's name ran and gave one map, or if a field is as wide as the image for images
            of any width.
    """
    run, width = trace(network, STRIP), STRIP
    names = [call.name for call in run.calls]
    unknown = [stage for stage in stages if stage not in names]
    if unknown:
        raise UserError(f"no stage '{unknown[0]}': there are {', '.join(dict.fromkeys(names))}")
    wanted = stages or [*main_stages(network, run.calls), "logits"]
    fields = []
    deepest = gap = 1.0  # the largest stride, and the largest distance between taps, so far
    for number, (call, wider) in enumerate(zip(run.calls, trace(network, 2 * STRIP).calls, strict=True)):
        units = wider.output.shape[3] - call.output.shape[3]
        stride = STRIP / units if units else None
        convs = [m for m in call.module.modules() if isinstance(m, nn.Conv2d) and call.name != "logits"]
        rates = tuple(sorted({rate for conv in convs for rate in conv.dilation if rate > 1}))
        deepest, gap = max(deepest, stride or 1), max(gap, max(rates, default=1) * (stride or 1))
        if call.name not in wanted:
            continue
        field = Field(stage_name(call.name, names[: number + 1].count(call.name)), stride, rates)
        field, margin = measure(run, number, field, deepest)
        while margin < gap:  # taps far apart might see more beyond it
            if width == 16 * STRIP:
                raise UserError(f"the field of {call.name} is as wide as the image, even at {width} pixels")
            width *= 2
            run = trace(network, width)
            field, margin = measure(run, number, field, deepest)
        fields.append(field)
    return fields


def measure(run: LinearTwin, number: int, field: Field, deepest: float) -> tuple[Field, int]:
    """Fill in size, centre and bins of a field, and return the number of pixels between it and the strip's ends too.

    The units in the middle of the strip are measured, over one period: the fields repeat in steps of the largest stride
    so far, `deepest`.
    """
    output, width = run.calls[number].output, run.strip.shape[3]
    period = round(deepest / field.stride) if field.stride else 1
    first = (output.shape[3] - period) // 2
    lows, highs, bins = [], [], set()
    for unit in range(first, first + period):
        leaves = [run.strip, *run.whole.values()]
        unit_sum = output[0, :, :, unit].sum()
        pixels, *pooled = torch.autograd.grad(unit_sum, leaves, retain_graph=True, materialize_grads=True)
        bins |= {parts for parts, gradient in zip(run.whole, pooled, strict=True) if gradient != 0}
        seen = pixels[0, 0].sum(dim=0).nonzero()
        if len(seen):
            lows.append(int(seen[0]))
            highs.append(int(seen[-1]))
    field = replace(field, bins=min(bins, default=0))
    if not lows:
        return field, width
    size = max(high - low + 1 for low, high in zip(lows, highs, strict=True))
    centre = (sum(lows) + sum(highs)) / 2 / len(lows) - (first + (period - 1) / 2) * (field.stride or 0)
    centre = round(centre, 6)  # fields are compared
    return replace(field, size=size, centre=centre), min(min(lows), width - 1 - max(highs))


# In effect


def effective_field(network: SegmentationModule, image: Tensor, draws: int = 8) -> Tensor:
    """Measure how much each input pixel changes the logits in the middle: the mean absolute gradient.

    The mean is over random shifts of the image, each with a random signed sum of the classes' logits.

    Args:
        network: runs on its own device.
        image: stored pixels ``(C, H, W)``.
        draws: number of shifts.

    Returns:
        ``(H, W)`` on the CPU, whose sum is 1.

    Raises:
        UserError: if the gradient is zero or not finite.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = image.shape[1:]
    total = torch.zeros(height, width, dtype=torch.float64)
    network.eval()
    for _ in range(draws):
        shift = [int(torch.randint(side, (), generator=generator)) for side in (height, width)]
        pixels = network.preprocess(image.roll(shift, (1, 2))[None]).requires_grad_()
        logits = network(pixels)[0, :, height // 2, width // 2]  # (K,)
        signs = 2 * torch.randint(2, logits.shape, generator=generator) - 1
        (gradient,) = torch.autograd.grad((logits * signs.to(logits.device)).sum(), pixels)
        total += gradient[0].abs().sum(dim=0).double().cpu()
    if not 0 < total.sum() < math.inf:
        raise UserError("the gradient of the logits is zero or not finite: there is no effective field to measure")
    return total / total.sum()
