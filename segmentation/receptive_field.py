"""What does one output pixel see? Receptive fields of a network, in theory and in effect, as a table and a picture.

In theory: all input pixels that can change the output. In effect: those that do so noticeably, which are fewer and lie
in the middle (W. Luo, Y. Li, R. Urtasun, R. Zemel, "Understanding the Effective Receptive Field in Deep Convolutional
Neural Networks", NIPS 2016, arXiv 1701.04128).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base import SegmentationModule

STRIP = 768  # width of the first test image: a multiple of usual strides
ROWS = 15  # of a table that is read at a glance


@dataclass(frozen=True)
class Field:
    """What a unit of one stage sees.

    Args:
        stage: name of the layer or module; of a module that runs again, with the number of its run.
        stride: input pixels from one unit to the next; None where the number of units does not follow the image's.
        rates: dilations above 1 in the stage.
        size: side of the square of input pixels; 0 for none.
        centre: input pixel in the middle of what unit 0 sees; that of unit j is ``stride * j + centre``.
        bins: bins per side of a pooling over the whole image that the unit sees besides; 0 for none.
    """

    stage: str
    stride: float | None
    rates: tuple[int, ...]
    size: int = 0
    centre: float = 0.0
    bins: int = 0


# A chain of layers, by the formula


def read_layer(layer: str) -> tuple[int, int, int, int]:
    """Kernel, stride, dilation and padding of a layer of `layer_fields`."""
    match = re.fullmatch(r"(?:conv|pool)(\d+)((?:[sdp]\d+)*)", layer)
    options = {"s": 1, "d": 1, "p": 0}
    if match:
        options |= {option[0]: int(option[1:]) for option in re.findall(r"[sdp]\d+", match[2])}
    if match is None or min(int(match[1]), options["s"], options["d"]) < 1:
        raise ValueError(
            f"'{layer}' is not a layer: write conv or pool with its kernel, then stride s, dilation d and padding p "
            "where they are not 1, 1 and 0, such as conv3, pool2s2, conv3d2 or conv7s2p3"
        )
    return int(match[1]), options["s"], options["d"], options["p"]


def layer_fields(layers: Sequence[str]) -> list[Field]:
    """Follow a chain of layers: each widens the field by (kernel - 1) * dilation * stride so far.

    Args:
        layers: each ``conv`` or ``pool`` with its kernel, then, where they are not 1, 1 and 0, its stride ``s``,
            dilation ``d`` and padding ``p``: ``conv3``, ``pool2s2``, ``conv3d2``, ``conv7s2p3``.

    Raises:
        ValueError: for a layer that is not written so.
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
    """In how many ways the last layer's first unit reaches each pixel of its field, along one side."""
    ways = np.ones(1)
    for layer in reversed(layers):
        kernel, stride, dilation, _ = read_layer(layer)
        apart = np.zeros((len(ways) - 1) * stride + 1)
        apart[::stride] = ways
        taps = np.zeros((kernel - 1) * dilation + 1)
        taps[::dilation] = 1
        ways = np.convolve(apart, taps)
    return ways


# Any network, by the gradient of its linear twin


class LinearTwin(TorchFunctionMode):
    """Runs a network with every operation replaced by a linear one that looks at the same pixels.

    Then an output's gradient is positive at exactly the pixels that the output sees, whatever the weights and however
    the layers are wired. Convolutions and poolings become means over their windows, unpooling spreads a value over its
    window, and what works pixel by pixel does nothing; that a normalisation knows statistics of the whole image is not
    counted. Pooling to a fixed number of bins and attention hand on no gradient to pixels, but one to `whole`.

    Channels are not told apart: a map is one channel, expanded to as many as the network expects.

    Args:
        whole: receives a leaf per number of bins per side, with the gradient of what pools the whole image into them.
    """

    PIXELWISE = (
        *("relu", "relu6", "leaky_relu", "prelu", "elu", "gelu", "silu", "mish", "hardtanh", "hardswish"),
        *("hardsigmoid", "sigmoid", "tanh", "softplus", "softmax", "log_softmax", "clamp"),
        *("dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
        *("batch_norm", "instance_norm", "layer_norm", "group_norm", "local_response_norm", "normalize"),
    )

    def __init__(self, whole: dict[int, Tensor]) -> None:
        super().__init__()
        self.whole = whole
        self.windows: dict[tuple[int, int], Tensor] = {}  # which window a pixel is in, by the numbers of both

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.removesuffix("_") in self.PIXELWISE:
            return args[0].view_as(args[0])
        twins: dict[str, Callable[..., Any]] = {
            "conv2d": conv,
            "conv_transpose2d": conv_transpose,
            "max_pool2d": per_channel(mean_of_windows),
            "max_pool2d_with_indices": self.max_pool_with_indices,
            "scatter": self.unpool,
            "avg_pool2d": per_channel(F.avg_pool2d),
            "interpolate": per_channel(F.interpolate),
            "pad": per_channel(F.pad),
            "__getitem__": index,
            "cat": cat,
            "add": add,
            "add_": add,  # in place would write into the one channel
            "mul_": torch.mul,
            "maximum": add,
            "amax": torch.mean,
            "linear": linear,
            "einsum": lambda equation, *operands: torch.einsum(equation, *(x.double() for x in operands)),
            "matmul": self.matmul,
            "mean": self.mean,
            "adaptive_avg_pool2d": self.pool_to_bins,
            "adaptive_max_pool2d": self.pool_to_bins,
            "scaled_dot_product_attention": lambda query, *others, **options: query * self.image(1),
            "multi_head_attention_forward": lambda query, *others, **options: (query * self.image(1), None),
        }
        return twins.get(name, func)(*args, **(kwargs or {}))

    def image(self, bins: int) -> Tensor:
        return self.whole.setdefault(bins, torch.ones((), dtype=torch.float64, requires_grad=True))

    def pool_to_bins(self, x: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        bins = pair(output_size)[1]
        return (x.new_ones(len(x), 1, bins, bins) * self.image(bins)).expand(-1, x.shape[1], -1, -1)

    def mean(self, x: Tensor, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
        if x.dim() == 4 and isinstance(dim, (tuple, list)) and {axis % 4 for axis in dim} >= {2, 3}:
            return x.new_ones(x.shape).mean(dim, keepdim) * self.image(1)
        return torch.mean(x, dim, keepdim, **options)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        if x.dim() == 4 and y.dim() == 2:  # a map's rows as means over regions
            means = x.new_ones(len(x), 1, x.shape[2], y.shape[1]) * self.image(y.shape[1])
            return means.expand(-1, x.shape[1], -1, -1)
        return torch.matmul(x.double(), y.double())

    def max_pool_with_indices(self, x: Tensor, kernel: Any, stride: Any = None, *args: Any, **options: Any) -> Any:
        y = per_channel(mean_of_windows)(x, kernel, stride, *args, **options)
        rows, columns = (
            (torch.arange(side) // step).clamp(max=count - 1)
            for side, step, count in zip(x.shape[2:], pair(stride or kernel), y.shape[2:], strict=True)
        )
        self.windows[x[0, 0].numel(), y[0, 0].numel()] = (rows[:, None] * y.shape[3] + columns).flatten()
        return y, torch.zeros((), dtype=torch.long).expand(y.shape)

    def unpool(self, x: Tensor, dim: int, indices: Tensor, source: Tensor) -> Tensor:
        window = self.windows.get((x.shape[-1], source.shape[-1]))
        return x.scatter(dim, indices, source) if window is None else one(source)[..., window].expand(x.shape)


def pair(value: Any) -> tuple[int, int]:
    """An argument of a convolution or pooling for rows and for columns."""
    return (value, value) if isinstance(value, int) else tuple(value)


def one(x: Tensor) -> Tensor:
    """A map as one channel ``(N, 1, ...)``: the one that was expanded, or their mean."""
    if x._base is not None and x.stride(1) == 0 and x._base.numel() * x.shape[1] == x.numel():
        return x._base.reshape(len(x), 1, *x.shape[2:])
    return x.mean(1, keepdim=True)


def per_channel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Twin by a linear function that treats all channels alike."""
    return lambda x, *args, **options: function(one(x), *args, **options).expand(-1, x.shape[1], -1, -1)


def mean_of_windows(
    x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:  # fmt: skip
    """For max pooling."""
    if pair(dilation) != (1, 1):
        raise ValueError(f"the field of a pooling with dilation {dilation} cannot be measured")
    return F.avg_pool2d(x, kernel, stride, padding, ceil_mode)


def index(x: Tensor, where: Any) -> Tensor:
    """Twin of indexing, cheap where it cuts rows and columns."""
    cuts = x.dim() == 4 and isinstance(where, tuple) and where[0] is Ellipsis and len(where) <= 3
    return per_channel(torch.Tensor.__getitem__)(x, where) if cuts else x[where]


def conv(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """Twin of conv2d."""
    kernel = x.new_full((1, 1, *weight.shape[2:]), 1 / weight[0, 0].numel())
    return F.conv2d(one(x), kernel, None, stride, padding, dilation).expand(-1, len(weight), -1, -1)


def conv_transpose(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """Twin of conv_transpose2d."""
    kernel = x.new_full((1, 1, *weight.shape[2:]), 1 / weight[0, 0].numel())
    y = F.conv_transpose2d(one(x), kernel, None, stride, padding, output_padding, 1, dilation)
    return y.expand(-1, groups * weight.shape[1], -1, -1)


def linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """Twin of linear."""
    return x.mean(-1, keepdim=True).expand(*x.shape[:-1], len(weight))


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Twin of cat, a sum over channels."""
    if dim != 1 or tensors[0].dim() != 4:
        return torch.cat(list(tensors), dim)
    channels = sum(x.shape[1] for x in tensors)
    return torch.stack([one(x) for x in tensors]).sum(0).expand(-1, channels, -1, -1)


def add(x: Any, y: Any) -> Tensor:
    """Twin of a sum."""
    maps = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() == 4 and x.shape == y.shape
    return (one(x) + one(y)).expand(x.shape) if maps else x + y


class Call(NamedTuple):
    """One run of a module: the map it read and the map it gave, ``(N, C, h, w)``."""

    name: str
    source: Tensor
    output: Tensor


class Trace(NamedTuple):
    """A run of the linear twin: its image, `LinearTwin.whole`, and the runs of modules in order."""

    strip: Tensor
    whole: dict[int, Tensor]
    calls: list[Call]


def trace(network: nn.Module, in_channels: int, width: int) -> Trace:
    """Run the linear twin on a strip ``(1, in_channels, 1, width)``: fields are taken to be as high as wide."""
    strip = torch.ones(1, in_channels, 1, width, dtype=torch.float64, requires_grad=True)
    run = Trace(strip, {}, [])

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and args:
                run.calls.append(Call(name or "logits", args[0], output))

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in network.named_modules()]
    training = network.training
    network.eval()
    try:
        with LinearTwin(run.whole):
            network(strip)
    finally:
        network.train(training)
        for handle in hooks:
            handle.remove()
    return run


def children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that make up this one, those in its lists too, by their full names."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from children(child, path)
        else:
            yield path, child


def stage_names(module: nn.Module, calls: Sequence[Call], name: str = "") -> list[str]:
    """The modules that make up a network, opened where they give no single map or hold parallel branches."""
    names = []
    for path, child in children(module, name):
        if any(call.name == path for call in calls) and not has_branches(child, calls, path):
            names.append(path)
        else:
            names += stage_names(child, calls, path)
    return names


def has_branches(module: nn.Module, calls: Sequence[Call], name: str) -> bool:
    """Whether three or more modules within read the same map; in a residual block these are two."""
    within = dict(children(module, name))
    readers = {(id(call.source), call.name) for call in calls if call.name in within}
    most = max(Counter(source for source, _ in readers).values(), default=0)
    return most >= 3 or any(has_branches(child, calls, path) for path, child in within.items())


def dilations(module: nn.Module) -> tuple[int, ...]:
    """The dilations above 1 of a module's convolutions."""
    convs = (m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))
    return tuple(sorted({rate for conv in convs for rate in conv.dilation if rate > 1}))


def network_fields(network: nn.Module, in_channels: int = 3, stages: Sequence[str] = ()) -> list[Field]:
    """Theoretical fields of a network's stages in the order in which they run, from gradients of its linear twin.

    After an upsampling, neighbouring units see squares of different sizes: the largest counts, and the mean centre.

    Args:
        network: takes an image ``(N, in_channels, H, W)`` of any size.
        in_channels: of the image.
        stages: names of modules, and ``logits`` for what the network gives; by default those of `stage_names`.

    Raises:
        ValueError: if a stage is none of the modules that ran and gave one map, or its field is as wide as the image
            however wide that is.
    """
    run = trace(network, in_channels, STRIP)
    with torch.no_grad():
        wider = trace(network, in_channels, 2 * STRIP)
    ran = [call.name for call in run.calls]
    unknown = [stage for stage in stages if stage not in ran]
    if unknown:
        raise ValueError(f"no stage '{unknown[0]}': there are {', '.join(dict.fromkeys(ran))}")
    more = [b.output.shape[3] - a.output.shape[3] for a, b in zip(run.calls, wider.calls, strict=True)]
    strides = [STRIP / units if units else None for units in more]
    rates = {name: dilations(module) for name, module in network.named_modules()} | {"logits": ()}
    gaps = [max(rates[name], default=1) * (stride or 1) for name, stride in zip(ran, strides, strict=True)]

    wanted = set(stages or [*stage_names(network, run.calls), "logits"])
    fields = {}
    for i, name in enumerate(ran):
        if name in wanted:
            again = f" ({ran[: i + 1].count(name)})" if name in ran[:i] else ""
            fields[i] = Field(name + again, strides[i], rates[name])
    left, width = list(fields), STRIP
    while left:
        for i in list(left):
            deepest = max(stride or 1 for stride in strides[: i + 1])
            fields[i], margin = measure(run, run.calls[i].output, fields[i], deepest)
            if margin >= max(gaps[: i + 1]):  # beyond it there is nothing that taps far apart might see
                left.remove(i)
        if left:
            width *= 2
            if width > 16 * STRIP:
                raise ValueError(f"the field of {ran[left[0]]} is as wide as the image, even at {width // 2} pixels")
            run = trace(network, in_channels, width)
    return list(fields.values())


def measure(run: Trace, output: Tensor, field: Field, deepest: float) -> tuple[Field, int]:
    """Fill in what the units of a stage see in the middle of the strip.

    Args:
        run: of the linear twin.
        output: of the stage.
        field: its other values.
        deepest: largest stride so far: what units see repeats in steps of so many pixels.

    Returns:
        the field, and how many pixels of the strip are left beside it.
    """
    period = round(deepest / field.stride) if field.stride else 1
    first, width = (output.shape[3] - period) // 2, run.strip.shape[3]
    lows, highs, bins = [], [], set()
    for unit in range(first, first + period):
        pixels, *pooled = torch.autograd.grad(
            one(output)[0, 0, :, unit].sum(),
            [run.strip, *run.whole.values()],
            retain_graph=True,
            materialize_grads=True,
        )
        seen = pixels[0].sum(dim=(0, 1)).nonzero()
        bins |= {parts for parts, gradient in zip(run.whole, pooled, strict=True) if gradient != 0}
        if len(seen):
            lows.append(int(seen[0]))
            highs.append(int(seen[-1]))
    field = replace(field, bins=min(bins, default=0))
    if not lows:
        return field, width
    size = max(high - low + 1 for low, high in zip(lows, highs, strict=True))
    centre = (sum(lows) + sum(highs)) / 2 / len(lows) - (first + (period - 1) / 2) * (field.stride or 0)
    return replace(field, size=size, centre=centre), min(min(lows), width - 1 - max(highs))


# In effect


def effective_field(network: SegmentationModule, image: Tensor, draws: int = 8) -> Tensor:
    """How much each input pixel changes the logits in the middle: the mean absolute gradient.

    The mean is over random shifts of the image, each with a random signed sum of the classes' logits.

    Args:
        network: is evaluated where its parameters are.
        image: stored pixels ``(C, H, W)``.
        draws: number of shifts.

    Returns:
        ``(H, W)``, of sum 1, on the CPU.

    Raises:
        ValueError: if the gradient is zero or not finite.
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
        raise ValueError("the gradient of the logits is zero or not finite: there is no effective field to measure")
    return total / total.sum()


def side_holding(effect: Tensor, share: float) -> int:
    """Side of the square around the middle that holds a share of an effective field ``(H, W)``."""
    height, width = effect.shape
    rows, columns = torch.arange(height)[:, None] - height // 2, torch.arange(width) - width // 2
    distance = torch.maximum(rows.abs(), columns.abs())  # of the square on whose border a pixel lies
    held = torch.bincount(distance.flatten(), effect.flatten()).cumsum(0)
    return 2 * int((held < share).sum()) + 1


def side_above(effect: Tensor, share: float = 0.0455) -> int:
    """Root of the number of pixels above a share of the largest, 1 - 95.45 % in Luo et al., section 4."""
    return round(int((effect > share * effect.max()).sum()) ** 0.5)


# Tables and pictures


def main_rows(fields: Sequence[Field]) -> list[Field]:
    """Leave out repetitions; of more than `ROWS`, all but the last of neighbours that work alike, and second runs."""
    kept: list[Field] = []
    for field in fields:
        same = kept and replace(field, stage=kept[-1].stage, rates=field.rates or kept[-1].rates) == kept[-1]
        if not same or field.stage == "logits":
            kept.append(field)
    if len(kept) > ROWS:
        ways = [(field.stride, field.rates, field.bins) for field in kept]
        kept = [field for field, way, following in zip(kept, ways, [*ways[1:], None], strict=True) if way != following]
    if len(kept) > ROWS:
        kept = [field for field in kept if not field.stage.endswith(")")]
    return kept


def field_table(title: str, fields: Sequence[Field], heading: str = "", words: Sequence[str] = ()) -> Table:
    """A row per field, with a last column of the caller's words, if any."""
    headings = ["stride", "rates", "sees, px", "middle of unit j, px"]
    table = Table("stage", title=title, box=ASCII2)
    for text in [*headings, heading] if words else headings:
        table.add_column(text, justify="right")
    for row, field in enumerate(fields):
        pooled = {0: "", 1: "whole image"}.get(field.bins, f"1/{field.bins} of the image")
        sees = " + ".join(part for part in (str(field.size or ""), pooled) if part)
        stride = "" if field.stride is None else f"{field.stride:.4g}"
        place = f"{stride if stride != '1' else ''} j".strip() if stride and field.size else ""
        if place and field.centre:
            place += f" {'-' if field.centre < 0 else '+'} {abs(field.centre):.4g}"
        table.add_row(field.stage, stride, ", ".join(map(str, field.rates)), sees, place, *words[row : row + 1])
    return table


def live_taps(network: nn.Module, field: Field, image_size: Sequence[int]) -> str:
    """Of the taps of a stage's dilated convolution, how many lie on the map on average, not on its padding.

    Empty unless the stage has exactly one rate.
    """
    if len(field.rates) != 1 or field.stride is None:
        return ""
    modules = network.get_submodule(field.stage.partition(" ")[0]).modules()
    kernel = next(m.kernel_size for m in modules if isinstance(m, nn.Conv2d) and max(m.dilation) > 1)
    live = 1.0
    for side, taps in zip(image_size, kernel, strict=True):
        units = math.ceil(side / field.stride)
        offsets = (abs(tap - (taps - 1) / 2) * field.rates[0] for tap in range(taps))
        live *= sum(max(0.0, units - offset) for offset in offsets) / units
    return f"{live:.1f} of {math.prod(kernel)}"


def draw_layers(layers: Sequence[str], fields: Sequence[Field], picture: Path) -> None:
    """Draw which pixels the first unit of each layer sees, and the squares of this and of the next unit."""
    from matplotlib.figure import Figure  # 0.3 s to import, and needed only here; no pyplot: no global state
    from matplotlib.patches import Rectangle

    columns = min(len(layers), 5)
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(2.6 * max(columns, 2), 2.9 * lines + 0.3), layout="constrained")
    figure.supxlabel("What one unit sees: darker, in more ways; dashed, the next unit", fontsize=9)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    side = max(field.size + int(field.stride or 0) for field in fields)
    for axes in panels:
        axes.set_axis_off()
    for number, (axes, field) in enumerate(zip(panels, fields, strict=False), start=1):
        ways = np.zeros(side)
        ways[: field.size] = ways_to_pixels(layers[:number])
        seen = np.ma.masked_equal(np.outer(ways, ways), 0)
        axes.pcolormesh(seen, cmap="YlOrRd", vmin=0, vmax=1.2 * seen.max())
        if side <= 40:
            axes.hlines(range(side + 1), 0, side, color="#bbbbbb", linewidth=0.5)
            axes.vlines(range(side + 1), 0, side, color="#bbbbbb", linewidth=0.5)
        for start, line in ((int(field.stride or 0), "--"), (0, "-")):
            axes.add_patch(Rectangle((start, 0), field.size, field.size, fill=False, linestyle=line, linewidth=1.5))
        axes.set_title(f"{field.stage}: {field.size} px, stride {field.stride}", fontsize=10)
        axes.set(xlim=(-0.1, side + 0.1), ylim=(side + 0.1, -0.1), aspect="equal")
    figure.savefig(picture, dpi=110)


def draw_network(image: Tensor, fields: Sequence[Field], effects: dict[str, Tensor], title: str, picture: Path) -> None:
    """Draw the squares of the stages over an image, and beside it how much each pixel counts in effect.

    Args:
        image: stored pixels ``(C, H, W)``.
        fields: of the stages; the last one's is compared with `effects`.
        effects: effective fields ``(H, W)`` by the titles of their panels.
        title: of the whole picture.
        picture: PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = image.shape[1:]
    row, column = height // 2, width // 2
    shown = distinct(fields)
    theory = f"in theory: {shown[-1].size} px" + (" + whole image" if shown[-1].bins else "")
    reach = min(shown[-1].size / 2 + 12, max(height, width))
    left, right = min(-0.5, column - reach), max(width - 0.5, column + reach)
    top, bottom = min(-0.5, row - reach), max(height - 0.5, row + reach)

    # Inches: a line of title, a row of panels, their legends below, and a scale to the right.
    across, panel, legend = 4.5 * (1 + len(effects)), 4.4 * (bottom - top) / (right - left), 0.17 * len(shown) + 0.3
    size = across + 0.8, legend + panel + 0.65
    figure = Figure(figsize=size)
    figure.text(0.05 / size[0], 1 - 0.08 / size[1], title, va="top", fontsize=11, weight="bold")
    figure.subplots_adjust(
        left=0.05 / size[0],
        right=across / size[0],
        bottom=legend / size[1],
        top=(legend + panel) / size[1],
        wspace=0.03,
    )
    panels = figure.subplots(1, 1 + len(effects), squeeze=False)[0]

    def square(axes: Any, side: float, label: str, **style: Any) -> None:
        label += ", beyond this picture" if side / 2 > reach else ""
        corner = column - side / 2, row - side / 2
        axes.add_patch(Rectangle(corner, side, side, fill=False, label=label, **style))

    pixels = image[[0, 1, 2] if len(image) > 2 else [0, 0, 0]].permute(1, 2, 0).numpy()
    panels[0].imshow(pixels)
    for number, field in enumerate(shown):
        shade = colormaps["plasma"](0.1 + 0.85 * number / max(1, len(shown) - 1))
        label = f"{field.stage}: {field.size} px, stride {field.stride:.4g}"
        label += f", rate {', '.join(map(str, field.rates))}" if field.rates else ""
        square(panels[0], field.size, label, edgecolor=shade, linewidth=2)
    scale, colours = LogNorm(1e-3, 1), colormaps["inferno"]
    for axes, effect in zip(panels[1:], effects.values(), strict=True):
        heat = blur(effect)
        strength = np.asarray(scale((heat / heat.max()).clip(1e-3, 1)))
        axes.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=400)
        axes.imshow(colours(strength), alpha=strength)
        square(axes, shown[-1].size, theory, edgecolor="#999999", linestyle="--")
        for share, colour in ((0.95, "#3f9fff"), (0.5, "#7fffdf")):
            side = side_holding(effect, share)
            square(axes, side, f"{share:.0%} of the gradient: {side} px", edgecolor=colour, linewidth=2)
    for axes, name in zip(panels, ["in theory", *effects], strict=True):
        axes.set_title(name, fontsize=10)
        axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], facecolor="#e4e4e4")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize=9, labelspacing=0.2)
    bar = figure.colorbar(ScalarMappable(scale, colours), cax=panels[-1].inset_axes((1.02, 0, 0.02, 1)))
    bar.set_label("gradient over its largest value, mean over shifts of the image", fontsize=8)
    figure.savefig(picture, dpi=110)


def distinct(fields: Sequence[Field]) -> list[Field]:
    """At most eight of the fields, the last among them, whose squares can be told apart in a picture."""
    *others, last = (field for field in fields if field.size and field.stride)
    kept: list[Field] = []
    for field in others:
        if field.size < 0.8 * last.size and (not kept or field.size > 1.25 * kept[-1].size):
            kept.append(field)
    return [*kept[-7:], last]


def blur(effect: Tensor) -> np.ndarray:
    """An effective field ``(H, W)`` without the grain of single draws: a Gaussian of 0.6 % of the longer side."""
    sigma = 0.006 * max(effect.shape)
    offset = torch.arange(-int(3 * sigma) - 1, int(3 * sigma) + 2, dtype=torch.float64)
    window = torch.exp(-(offset**2) / (2 * sigma**2))[None, None, None]
    rows = F.conv2d(effect[None, None], window, padding="same")
    return F.conv2d(rows, window.transpose(2, 3), padding="same")[0, 0].numpy()


# The command


def analyse_layers(layers: Sequence[str], size: int | Sequence[int] | None, output_dir: Path) -> None:
    """Print and draw the fields of a chain of layers.

    Args:
        layers: see `layer_fields`.
        size: side of an image in pixels, to say how many units each layer gives of it; None does not.
        output_dir: for ``layers.png``.

    Raises:
        ValueError: for no layer, one that is not written as it should be, or a size of two sides.
    """
    if not layers or (size is not None and not isinstance(size, int)):
        raise ValueError(f"--layers takes one layer or more, and then --size one side, got {layers} and {size}")
    fields, units = layer_fields(layers), []
    if size is not None:
        for layer in layers:
            kernel, stride, dilation, padding = read_layer(layer)
            size = max(0, (size + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1)
            units.append(str(size))
    Console(width=100).print(field_table("What one unit sees", fields, "units", units))
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
    """Print and draw the fields of a network, the effective one before and after training.

    Args:
        network: as it is before training.
        checkpoint: of the same network after training; None leaves that out.
        image: a file; None takes noise.
        size: to which the image is resized, a side or height and width; None keeps its own, and makes noise 512.
        stages: see `network_fields`; if none are named, the table is cut to what is read at a glance.
        device: where the effective field is measured.
        output_dir: for a picture named as the network.
    """
    name = type(network).__name__
    pixels = read_image(image, size, network.in_channels)
    trained = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint else None
    if trained is not None:
        network.on_load_checkpoint(trained)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # strips are too thin to share: more threads would wait for each other
    try:
        fields = network_fields(network, network.in_channels, stages)
    finally:
        torch.set_num_threads(threads)
    fields = fields if stages else main_rows(fields)
    height, width = pixels.shape[1:]
    taps = [live_taps(network, field, (height, width)) for field in fields]
    console = Console(width=100)
    title = f"What one unit of {name} sees, of {height} x {width} px"
    console.print(field_table(title, fields, "live taps", taps if any(taps) else ()))

    network.to(device)
    effects = {"in effect, before training" if trained else "in effect": effective_field(network, pixels)}
    if trained is not None:
        network.load_state_dict(trained["state_dict"])
        effects["in effect, after training"] = effective_field(network, pixels)
    table = Table("", title="Where the gradient of the logits in the middle comes from", box=ASCII2)
    for heading in ("half of it, px", "95 % of it, px", "above 4.55 % of its largest, px"):
        table.add_column(heading, justify="right")
    for when, effect in effects.items():
        table.add_row(when, *map(str, (side_holding(effect, 0.5), side_holding(effect, 0.95), side_above(effect))))
    console.print(table)

    output_dir.mkdir(parents=True, exist_ok=True)
    picture = output_dir / f"{name}.png"
    draw_network(pixels, fields, effects, f"What one output pixel of {name} sees", picture)
    print(f"picture      {picture}")


def read_image(path: str | None, size: int | Sequence[int] | None, in_channels: int) -> Tensor:
    """Read an image as uint8 ``(in_channels, H, W)``, resized; without a path, noise.

    Raises:
        ValueError: if the file cannot be read, the channels are not 1 or 3, or the size is not one or two sides.
        FileNotFoundError: if there is no such file.
    """
    sides = [size, size] if isinstance(size, int) else list(size or ())
    if len(sides) not in (0, 2) or min(sides, default=1) < 1:
        raise ValueError(f"--size is one side, or height and width as [360, 480], got {size}")
    if path is None:
        height, width = sides or (512, 512)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, (in_channels, height, width), dtype=torch.uint8, generator=generator)
    if in_channels not in (1, 3):
        raise ValueError(f"--image has 1 or 3 channels, but the model in_channels {in_channels}: leave --image out")
    if not Path(path).is_file():
        raise FileNotFoundError(f"the image {path} does not exist")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB" if in_channels == 3 else "L")
    except OSError as error:
        raise ValueError(f"the image {path} cannot be read: {error}") from error
    if sides:
        picture = picture.resize((sides[1], sides[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).view(picture.height, picture.width, in_channels).permute(2, 0, 1)
