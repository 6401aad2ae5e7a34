"""The recipe of ``lightning check_data``: a complete config, by rules that stand beside each value as comments.

What the doctor found decides the data, the network and the augmentation; steps that are timed on this machine decide
the length of the run. Whoever set an argument of the data keeps it.
"""

import copy
import inspect
import math
import os
import statistics
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

import datamodules

from ..architectures.unet import UNet
from ..errors import UserError

if TYPE_CHECKING:
    from datamodules.check.findings import Examination

SMALL = 100  # training images below which the network is narrow and the window small
SHORT = 3000  # steps below which the learning rate is high
FEW = 10  # validation images below which the score is a rough one
FEW_STEPS = 300  # below which the network is narrow, and a line says so
SHARE = 0.9  # of the minutes that are planned: logging, pictures and the reading of data need the rest
BANDS = 3  # stripes in which the classes are counted
LOOK = 30  # masks that are read to count them
MEGAPIXELS = 4  # above which an image is evaluated window by window
Value = tuple[Any, str]  # a value of the config and the comment beside it


@dataclass
class Cost:
    """What a network costs on this machine, in seconds and bytes.

    Args:
        step: seconds of a training step, with the reading of its batch.
        validation: seconds of a pass over the validation images.
        save: seconds to save a checkpoint.
        batch: images per step that fit in the memory.
        image_bytes: what one training image keeps in memory for the backward pass.
        precision: Lightning's name of the faster precision.
        times: seconds of a step by precision.
    """

    step: float = 0.0
    validation: float = 0.0
    save: float = 0.0
    batch: int = 1
    image_bytes: int = 0
    precision: str = "32-true"
    times: dict[str, float] = field(default_factory=dict)


def write_recipe(found: "Examination", arguments: Mapping[str, Any], minutes: float, file: Path) -> Path:
    """Write a complete config for the data that was examined.

    Args:
        found: the result of the data doctor.
        arguments: ``class_path`` and ``init_args`` of the data set, as the user configured them.
        minutes: how long ``fit`` may take on this machine, without the start of the program.
        file: the file to write.

    Returns:
        the file.

    Raises:
        UserError: if `minutes` is not positive.
    """
    if not minutes > 0:
        raise UserError(f"--minutes is the time that fit may take, above 0, got {minutes}")
    file.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = changed(type(found.given), arguments.get("init_args") or {})
    data = choose_data(found, given, device)
    values = {key: value for key, (value, _) in data.items()}
    usual = 64 if device == "cuda" else 24 if len(found.of("train")) < SMALL else 32
    for width in dict.fromkeys((usual, min(usual, 16))):
        model = choose_model(found, data, width)
        network = UNet(**{key: value for key, (value, _) in model.items() if key != "inference"}).to(device)
        network.to(memory_format=torch.channels_last)
        cost = measure(found, network, values, given.get("batch_size"), file)
        trainer, warmup = choose_trainer(found, cost, minutes, device)
        if (steps := trainer["max_steps"][0]) >= FEW_STEPS:
            break
    else:
        print(
            f"\n{minutes:g} minutes are {steps} training steps on this machine, too few to learn much: raise --minutes"
        )
    if "batch_size" not in given:
        data["batch_size"] = cost.batch, batch_comment(cost, device)
    rate = 0.003 if steps < SHORT else 0.001
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate, "weight_decay": 0.01}}
    model["optimizer"] = optimizer, f"lr 0.003 below {SHORT:,} steps, else 0.001; it falls to 0 (poly)"
    model["warmup_steps"] = warmup, "5 % of the steps, at most 250"
    class_path = (arguments.get("class_path") or type(found.given).__name__).removeprefix("datamodules.")
    file.write_text(text(found, class_path, minutes, file, (trainer, model, data)), encoding="utf-8")
    return file


def is_trainable(found: "Examination") -> bool:
    """Return whether there are classes and an image to train on."""
    return found.data.num_classes > 0 and any(f.shape for f in found.of("train"))


def changed(cls: type, init_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a data set that differ from their defaults: those that the user set."""
    defaults = {k: p.default for c in reversed(cls.__mro__) for k, p in inspect.signature(c).parameters.items()}

    def plain(value: Any) -> Any:
        return list(map(plain, value)) if isinstance(value, (list, tuple)) else value

    return {k: plain(v) for k, v in init_args.items() if plain(v) != plain(defaults.get(k))}


def run_name(found: "Examination") -> str:
    """Return the name of a run on this data: that of its folder, or of the class of data that is drawn."""
    root = found.given.root
    return (root.resolve().name if root is not None else "") or type(found.given).__name__


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sizes(found: "Examination", split: str) -> list[tuple[int, int]]:
    """Return (height, width) of the images of a split that could be read."""
    return [(f.shape[1], f.shape[2]) for f in found.of(split) if f.shape]


# The data
def choose_data(found: "Examination", given: Mapping[str, Any], device: str) -> dict[str, Value]:
    """Choose the arguments of the data set: what the user set, what the files hold, and then the recipe's rules."""
    accepted = {p for cls in type(found.given).__mro__ for p in inspect.signature(cls).parameters}
    train = len(found.of("train"))
    chosen: dict[str, Value] = {key: (value, "") for key, value in given.items()}
    known = found.data
    facts: dict[str, Any] = {"class_names": [str(name) for name in known.class_names]}
    if [*map(tuple, known.palette)] != datamodules.base.voc_palette(known.num_classes):
        facts["palette"] = [[int(value) for value in color] for color in known.palette]
    facts |= {"label_map": known.label_map, "value_range": getattr(known, "value_range", None)}
    for key, value in facts.items():
        if key in accepted and value:
            value = [*value] if isinstance(value, tuple) else value
            chosen[key] = value, "rename the classes as you like" if key == "class_names" else ""
    if "test_split" not in given and not found.of("test"):
        chosen["test_split"] = "val", "there is no split 'test': the score of `test` is then that of the validation"
    up, across = no_up(found) if accepted >= {"turns"} else ("", False)
    crop, comment = crop_of(found, device, square=across)
    rules: dict[str, Value] = {
        "batch_size": (1, ""),  # `measure` decides it
        "eval_batch_size": (1, "validation, test and predict take whole images of any size"),
        "num_workers": (max(1, min(8, cores() - 1)), f"one core of {cores()} stays for the network, at most 8 load"),
        "crop_size": (crop, comment),
    }
    if up:
        rules["scale_range"] = [0.8, 1.25], "a narrow range, as where there is no up there is no far and near"
        rules["turns" if across else "vertical_flip"] = 90 if across else True, up
    else:
        rules["scale_range"] = [0.75, 1.5], "far and near, as the classes lie differently above and below"
    if train < SMALL:
        rules["color_jitter"] = 0.2, f"below {SMALL} training images"
    size = sum(f.size for f in found.facts if f.split in ("train", "val"))
    if size < 2**29 and any(f.sample.image for f in found.facts):
        rules["cache"] = "memory", f"train and val take {size / 2**20:.0f} MiB decoded, below 512"
    return chosen | {key: value for key, value in rules.items() if key not in given and key in accepted}


def crop_of(found: "Examination", device: str, square: bool) -> Value:
    """Choose the window that is cut from each training image: no larger than the smallest image, and divisible by 32.

    Args:
        found: the result of the data doctor.
        device: ``cpu`` or ``cuda``.
        square: whether quarter turns exchange the sides.
    """
    limit = 512 if device == "cuda" else 256 if len(found.of("train")) < SMALL else 384
    sides = [*zip(*sizes(found, "train"), strict=True)]
    crop = [max(32, int(min(limit, 0.8 * statistics.median(side), min(side))) // 32 * 32) for side in sides]
    shape = " x ".join(f"{statistics.median(side):.0f}" for side in sides)
    rule = f"0.8 of the middle image ({shape}), at most {limit} and the smallest image, a multiple of 32"
    return ([min(crop)] * 2 if square else crop), rule


def no_up(found: "Examination") -> tuple[str, bool]:
    """Find out from the masks whether the images have an up, as scenes have and views through a microscope lack.

    Returns:
        a sentence with the numbers if the classes fill the upper and the lower third of the images alike, else "";
        and whether they also lie across the images as they lie along them.
    """
    read = [f for f in found.of("train") if f.counts[:-2].any() and f.mask_shape == f.shape[1:]]
    table = found.data.label_table()
    counts = np.zeros((2, found.data.num_classes, BANDS))  # of the pixels, by rows and by columns
    for facts in read[:: -(-len(read) // LOOK) or 1]:
        values = facts.sample.read()[1]
        if values is None:
            continue
        labels = table(values).numpy().astype(np.int64)
        for i, turned in enumerate((labels, labels.T)):
            for j, stripe in enumerate(np.array_split(turned, BANDS)):
                present = stripe[(stripe >= 0) & (stripe < found.data.num_classes)].ravel()
                counts[i, :, j] += np.bincount(present, minlength=found.data.num_classes)
    rows, columns = counts[:, counts[0].sum(axis=1) > 0]
    if not len(rows):
        return "", False
    rows, columns = (part / part.sum(axis=1, keepdims=True) for part in (rows, columns))
    uneven = float(np.mean(np.abs(rows[:, 0] - rows[:, -1]) / np.maximum(rows[:, 0] + rows[:, -1], 1e-9)))
    across = float(np.mean(np.abs(rows - columns).sum(axis=1) / 2))
    if uneven >= 0.3:
        return "", False
    text = f"no up: the classes fill the upper and lower third alike (they differ by {uneven:.2f}, below 0.3"
    return text + (f"; rows and columns by {across:.2f}, below 0.15)" if across < 0.15 else ")"), across < 0.15


# The model
def choose_model(found: "Examination", data: Mapping[str, Value], width: int) -> dict[str, Value]:
    """Choose the sizes of the network, whose width is given, and its loss."""
    chosen: dict[str, Value] = {"num_classes": (found.data.num_classes, "")}
    if found.mean:
        stated = found.given.stated_mean_std
        mean, std = stated if stated and len(stated[0]) == len(found.mean) else (found.mean, found.std)
        chosen |= {"in_channels": (len(found.mean), "bands of the images")} if len(found.mean) != 3 else {}
        source = "as the data set states" if stated else "of the training images"
        chosen |= {"mean": (digits(mean), source), "std": (digits(std), "")}
    rule = f"24 below {SMALL} training images, else 32, and 16 where the minutes are below {FEW_STEPS} steps"
    chosen["base_channels"] = width, "the paper's, on a GPU" if width == 64 else f"{rule}; the paper has 64"
    crop = data["crop_size"][0] if "crop_size" in data else 0
    if width < 64 and min(crop if isinstance(crop, list) else [crop]) >= 192:
        chosen["pixel_shuffle"] = 2, "blocks of 2 x 2 pixels become channels: a quarter of the time, no pixel lost"
    shares = found.shares("train")
    present = np.flatnonzero(shares)
    if len(present) > 1 and "border_weight" not in data and shares.max() > 3 * shares[present].min():
        rare, large = int(present[shares[present].argmin()]), int(shares.argmax())
        weights = [float(f"{w:.2g}") for w in found.class_weights**0.4]
        names = found.data.class_names
        counted = (
            f"{names[rare]} has {100 * shares[rare]:.2g} % of the pixels, {names[large]} {100 * shares[large]:.2g}"
        )
        chosen["class_weights"] = weights, f"(median frequency / frequency) ** 0.4: {counted}"
    pixels = max((h * w for split in found.splits for h, w in sizes(found, split)), default=0)
    if pixels > MEGAPIXELS * 1e6:
        window = {"class_path": "segmentation.inference.SlidingWindow", "init_args": {"crop": 1024, "overlap": 0.25}}
        chosen["inference"] = window, f"the largest image has {pixels / 1e6:.0f} million pixels, above {MEGAPIXELS}"
    return chosen


def digits(values: Sequence[float]) -> list[float]:
    """Round to four significant digits, because the values of dark scenes may be very small."""
    return [float(f"{value:.4g}") for value in values]


# The machine
def measure(found: "Examination", network: UNet, data: Mapping[str, Any], batch: int | None, file: Path) -> Cost:
    """Time training steps, an evaluation and a checkpoint on this machine, on random pixels.

    Args:
        found: the result of the data doctor.
        network: the network, on its device.
        data: the arguments of the data set.
        batch: images per step if the user set them.
        file: the recipe; a checkpoint is saved beside it and removed.
    """
    device, train = network.device.type, len(found.of("train"))
    crop = data.get("crop_size") or max(sizes(found, "train"))
    one = random_batch(network, 1, [crop, crop] if isinstance(crop, int) else crop)
    cost = Cost(image_bytes=kept_bytes(network, one))
    cost.batch = 16 if device == "cuda" else 4 if 16 <= train < SMALL else 2
    while cost.batch > 1 and (cost.batch > train or 2 * cost.batch * cost.image_bytes > free_bytes(device) / 2):
        cost.batch //= 2
    cost.batch = batch or cost.batch
    full = {key: value.repeat_interleave(cost.batch, 0) for key, value in one.items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for precision in ("bf16-mixed",) if device == "cuda" else ("32-true", "bf16-mixed"):
        cost.times[precision] = seconds_of_a_step(network, optimizer, full, precision)
    cost.precision = min(cost.times, key=cost.times.__getitem__)
    reading, decoding = (seconds / max(1, cores()) for seconds in seconds_of_reading(found, data))
    step, loading = cost.times[cost.precision], cost.batch * reading
    cost.step = max(step, loading) if device == "cuda" else step + loading  # on a CPU both share the cores
    shapes = sorted(sizes(found, "val") or sizes(found, "train"), key=lambda size: size[0] * size[1])
    height, width = shapes[len(shapes) // 2]
    part = min(1.0, (MEGAPIXELS * 1e6 / (height * width)) ** 0.5)  # of each side; larger images are seen in windows
    image = random_batch(network, 1, [int(height * part), int(width * part)])
    cost.validation = len(found.of("val")) * (seconds_of_an_image(network, image, cost.precision) / part**2 + decoding)
    cost.save = seconds_of_saving(network, optimizer, file.parent)
    return cost


def random_batch(network: UNet, images: int, size: Sequence[int]) -> dict[str, torch.Tensor]:
    """Draw random pixels and labels on a network's device."""
    image = torch.randint(256, (images, network.in_channels, *size), dtype=torch.uint8, device=network.device)
    mask = torch.randint(max(2, network.num_classes), (images, *size), device=network.device)
    return {"image": image, "mask": mask}


def kept_bytes(network: UNet, batch: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.eval().losses(dict(batch))  # batch norm in training needs several images where a map is 1 x 1
    return sum(kept.values())


def free_bytes(device: str) -> int:
    """Return the free memory of a device; 4 GiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else 2**32


def mixed(network: UNet, precision: str) -> AbstractContextManager[None]:
    """Return the context in which Lightning runs a network of this precision."""
    return torch.autocast(network.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def now(network: UNet) -> float:
    """Return the time after all work on the network's device is done, in seconds."""
    if network.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of_a_step(
    network: UNet, optimizer: torch.optim.Optimizer, batch: Mapping[str, torch.Tensor], precision: str
) -> float:
    """Return the middle time of three training steps, after one more to warm up."""
    times = []
    network.train()
    for _ in range(4):
        start = now(network)
        with mixed(network, precision):
            loss = torch.stack([*network.losses(dict(batch)).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(now(network) - start)
    return statistics.median(times[1:])


@torch.no_grad()
def seconds_of_an_image(network: UNet, batch: Mapping[str, torch.Tensor], precision: str) -> float:
    """Return the time of an evaluation of one image, after one more to warm up."""
    network.eval()
    times = []
    for _ in range(2):
        start = now(network)
        with mixed(network, precision):
            network(network.preprocess(batch["image"])).argmax(1)
        times.append(now(network) - start)
    return times[-1]


def seconds_of_reading(found: "Examination", data: Mapping[str, Any]) -> tuple[float, float]:
    """Return the seconds in which one core reads a training image and augments it, and reads an image to evaluate."""
    known = copy.copy(found.data)
    for key in ("crop_size", "scale_range", "turns", "vertical_flip", "color_jitter"):
        if key in data:
            setattr(known, key, data[key])
    facts = [f for f in found.of("train") if f.shape and f.problem == ""][:3]
    dataset = datamodules.dataset.SegmentationDataset([f.sample for f in facts], known.label_table())
    reading, items = [], []
    try:
        dataset.transform = known.train_transform(dataset.read(0)[0])
        for index in range(len(dataset)):
            start = time.perf_counter()
            dataset.read(index)
            middle = time.perf_counter()
            dataset[0, index]
            reading.append(middle - start)
            items.append(time.perf_counter() - middle)
    except datamodules.errors.UserError:  # the doctor names what is wrong with a file
        return 0.0, 0.0
    read, item = statistics.median(reading), statistics.median(items)
    return (max(0.0, item - read), 0.0) if data.get("cache") else (item, read)


def seconds_of_saving(network: UNet, optimizer: torch.optim.Optimizer, folder: Path) -> float:
    """Return the seconds to write a checkpoint into a folder."""
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        torch.save({"state_dict": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def batch_comment(cost: Cost, device: str) -> str:
    """Return the rule that gave the batch size."""
    limit = "16" if device == "cuda" else f"4 for 16 to {SMALL} training images, else 2,"
    memory = f"an image keeps {cost.image_bytes / 2**20:.0f} MiB, {free_bytes(device) / 2**30:.1f} GiB are free"
    return f"{limit} and halved until it fits: {memory}"


def choose_trainer(found: "Examination", cost: Cost, minutes: float, device: str) -> tuple[dict[str, Value], int]:
    """Choose how long the run is and how often it is validated; return this and the steps of the warm-up."""
    epoch = max(1, len(found.of("train")) // cost.batch)  # steps
    once = cost.validation + 2 * cost.save
    budget = SHARE * 60 * minutes
    passes = int(min(10, 0.2 * budget / max(once, 1e-3), budget / (cost.step + cost.save / epoch + once))) or 1
    step = cost.step + cost.save / epoch
    steps = max(passes, int(max(0.0, budget - passes * once) / step))
    every = min(steps, 20_000) // passes
    steps = every * passes
    timed = ", ".join(f"{seconds:.2g} s ({name})" for name, seconds in cost.times.items())
    length = f"{minutes:g} minutes at {step:.2g} s a step with reading and saving: {steps / epoch:.0f} epochs"
    rule = f"{passes} times, 10 at most: a pass takes {once:.2g} s, and all together a fifth of the time at most"
    where = {"cuda": "a GPU was found; cpu also works"}.get(device, f"no GPU was found; {cores()} cores")
    return {
        "accelerator": ("gpu" if device == "cuda" else "cpu", where),
        "devices": (1, ""),
        "precision": (cost.precision, f"the fastest step: {timed}" if len(cost.times) > 1 else "half the memory"),
        "max_steps": (steps, length),
        "val_check_interval": (every, rule),
        "check_val_every_n_epoch": (None, "the interval counts steps, not epochs"),
        "num_sanity_val_steps": (0, "the doctor has read all files"),
        "log_every_n_steps": (max(1, min(50, steps // 100)), ""),
    }, min(250, steps // 20)


# The text
def text(
    found: "Examination",
    class_path: str,
    minutes: float,
    file: Path,
    parts: tuple[dict[str, Value], dict[str, Value], dict[str, Value]],
) -> str:
    """Write the YAML: what the run is, then seed, trainer, model and data, one value per line."""
    trainer, model, data = parts
    name = run_name(found)
    counts = ", ".join(f"{len(found.of(split))} {split}" for split in found.splits)
    few = 0 < len(found.of("val")) < FEW
    loggers = (
        ("CSVLogger", {"save_dir": "logs", "name": name}),
        (
            "WandbLogger",
            {"save_dir": "logs", "project": "segmentation", "group": name},
        ),
    )
    lines = [
        f"# U-Net (Ronneberger et al., arXiv 1505.04597) on {name}, {minutes:g} minutes of fit on this machine.",
        f"# Written by `lightning check_data`. Images: {counts}; classes: {found.data.num_classes}.",
        f"# lightning fit --config {file.as_posix()}, then test, predict and export with --ckpt_path best",
        "# A comment gives the rule that chose a value; an argument that check_data was given stays as it was.",
        *([f"# val has fewer than {FEW} images: the score is a rough one."] if few else []),
        "seed_everything: 0",
        "trainer:",
        *(line(2, key, *value) for key, value in trainer.items()),
        "  logger:  # as in every run, with the name of the data's folder",
    ]
    for logger, init_args in loggers:
        lines += [f"    - class_path: lightning.pytorch.loggers.{logger}", line(6, "init_args", init_args)]
    for part, path, values in (("model", "UNet", model), ("data", class_path, data)):
        lines += [f"{part}:", line(2, "class_path", path), "  init_args:"]
        lines += [line(4, key, *value) for key, value in values.items()]
    return "\n".join(lines) + "\n"


def line(indent: int, key: str, value: Any, comment: str = "") -> str:
    """Write one argument as a line of YAML, with the comment above it where the line would be too long."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    written = f"{' ' * indent}{key}: {dumped.removesuffix('...' + chr(10)).strip()}"
    if not comment:
        return written
    together = f"{written}  # {comment}"
    if len(together) <= 120:
        return together
    start = f"{' ' * indent}# "
    return "\n".join([*textwrap.wrap(comment, 119, initial_indent=start, subsequent_indent=start), written])
