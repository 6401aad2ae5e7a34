"""Compare architectures: train each for the same minutes on the same data, and report mIoU, costs and confusions.

    python benchmarks/compare.py                                         # SyntheticScenes, two minutes each
    python benchmarks/compare.py --architectures UNet SegNet --minutes 1 --output_dir logs/two
    python benchmarks/compare.py --data CamVid --data.root PATH --data.crop_size 224 --data.batch_size 4 --minutes 10
    python benchmarks/compare.py --output_dir logs/compare --draw_only   # tables and pictures again, from results.json

Each architecture trains in a separate process. The script first times a training step. Then it starts again, with as
many steps as fit into the minutes, so that the learning rate reaches 0 at their end. Then it runs the test split once.
Without a GPU, one thread computes, and the script measures its CPU time, so other programs do not change the result.
Finished architectures are not trained again: after an interruption, the same command continues.

All architectures start from random weights. They learn with AdamW, the poly schedule with warm-up, and gradients
clipped to norm 1. The losses are those of the papers, except for U-Net 3+, which has cross-entropy at every scale: its
hybrid loss would take most of its time. `VARIANTS` holds widths and learning rates.
"""

import json
import logging
import re
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from compare_pictures import DECODER, DILATED, FCN, MASKS, draw_confusions, draw_costs, draw_predictions
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import datamodules  # noqa: F401  its classes are the short names after --data
import segmentation
from datamodules import SegmentationDataModule
from segmentation.metrics import confusion_metrics
from segmentation.pictures import index_mask, rgb


class Variant(NamedTuple):
    """The settings of an architecture: family, learning rate, and arguments that make it narrow enough for a CPU."""

    family: str
    lr: float
    arguments: dict[str, Any]


RESNET = {"backbone": "resnet50", "base_channels": 16}
# The papers' atrous rates, scaled with the feature map: its side is 14 here (112 pixels at stride 8), 65 in the papers.
VARIANTS = {
    "FCN": Variant(FCN, 1e-3, {"base_channels": 8, "at_once": True}),
    "DeepLabV1": Variant(DILATED, 1e-3, {"base_channels": 16}),
    "DeconvNet": Variant(DECODER, 1e-3, {"base_channels": 8, "fc_channels": 256}),
    "UNet": Variant(DECODER, 3e-3, {"base_channels": 12}),
    "SegNet": Variant(DECODER, 3e-3, {"base_channels": 16}),
    "DeepLabV2": Variant(DILATED, 1e-3, {**RESNET, "atrous_rates": [2, 3, 4, 6]}),
    "FCDenseNet": Variant(DECODER, 3e-3, {"depth": 56, "growth_rate": 4, "base_channels": 12}),
    "PSPNet": Variant(DILATED, 3e-3, RESNET),
    "DeepLabV3": Variant(DILATED, 3e-3, {**RESNET, "layout": "paper", "output_stride": 8, "atrous_rates": [2, 4, 6]}),
    "DeepLabV3Plus": Variant(DILATED, 3e-3, {**RESNET, "output_stride": 8, "atrous_rates": [2, 4, 6]}),
    "UNet3Plus": Variant(DECODER, 3e-3, {"base_channels": 6, "hybrid_loss": False}),
    "MaskFormer": Variant(MASKS, 1e-3, {**RESNET, "hidden_channels": 64, "num_queries": 32}),
}
SCENES = {
    "class_path": "datamodules.SyntheticScenes",
    "init_args": {"size": [112, 112], "batch_size": 4, "num_workers": 1},
}
WARM, TIMED = 5, 15  # steps before the measurement, and measured steps
EDGE = 2  # a pixel is near an edge if the label changes within this distance, in pixels
SHOWN = (3, 5)  # test images whose predictions are drawn
PAIRS = (("boat", "car"), ("car", "boat"), ("pillow", "sheet"), ("sheet", "pillow"), ("sheep", "sky"), ("sky", "sheep"))


class Clock(L.Callback):
    """A callback that stores when each training step begins and ends, in seconds."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.begins.append(now())

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(now())


class Looker(L.Callback):
    """A callback that counts confusions on the test split, near edges and inside, and keeps the images to show."""

    def __init__(self, classes: int) -> None:
        self.near, self.inside = torch.zeros(2, classes, classes, dtype=torch.int64)
        self.images, self.shown = 0, []  # type: ignore[var-annotated]

    def on_test_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, *args: Any) -> None:
        mask, prediction = batch["mask"], model.labels(model.probabilities(outputs["logits"]))
        near = near_edges(mask)
        for matrix, chosen in ((self.near, near), (self.inside, ~near)):
            chosen = chosen & (mask != 255)
            pairs = mask[chosen] * len(matrix) + prediction[chosen]
            matrix += torch.bincount(pairs, minlength=matrix.numel()).view_as(matrix).cpu()
        for image, *labels in zip(batch["image"], mask, prediction, strict=True):
            self.shown += [(rgb(image), *labels)] if self.images in SHOWN else []
            self.images += 1


def near_edges(mask: Tensor) -> Tensor:
    """Return the pixels with a second label, ignored or not, within `EDGE` pixels: ``(N, H, W)``, bool."""
    labels = mask[:, None].float()
    highest, lowest = (sign * F.max_pool2d(sign * labels, 2 * EDGE + 1, 1, EDGE)[:, 0] for sign in (1, -1))
    return highest != lowest


def now() -> float:
    """Return seconds: after the GPU has finished, or else of CPU time, which other programs do not lengthen."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_memory() -> float:
    """Return the largest memory of this process so far, in MiB: allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, ru_maxrss would include the parent's memory
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def macs(model: segmentation.SegmentationModule, image: Tensor) -> int:
    """Count the multiply-accumulates of convolutions and matrix products in one forward pass of stored images."""
    model.eval()
    # The counter misses fused attention: nn.MultiheadAttention under no_grad, and on a CPU since torch 2.14.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(model.preprocess(image))
    return counter.get_total_flops() // 2


def measure(name: str, data: SegmentationDataModule, settings: dict[str, Any], pictures: Path) -> dict[str, Any]:
    """Time, train and test one architecture; return its part of ``results.json``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # two threads would wait for each other, and CPU time would count the waiting
    family, lr, arguments = VARIANTS[name]

    def trainer(callback: L.Callback, **limits: Any) -> L.Trainer:
        return L.Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=1, precision=settings["precision"],
            callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **limits,
        )  # fmt: skip

    def train(steps: int) -> tuple[segmentation.SegmentationModule, Clock]:
        L.seed_everything(settings["seed"], workers=True, verbose=False)
        optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.01)
        schedule = {"optimizer": optimizer, "warmup_steps": min(100, steps // 20)}
        model, clock = getattr(segmentation, name)(data.num_classes, **schedule, **arguments), Clock()
        trainer(clock, max_steps=steps, max_epochs=-1, limit_val_batches=0, gradient_clip_val=1.0).fit(model, data)
        return model, clock

    before = peak_memory()
    _, clock = train(WARM + TIMED)
    memory = peak_memory() - before
    each = [end - begin for begin, end in zip(clock.begins, clock.ends, strict=True)][WARM:]
    rate = TIMED / (clock.ends[-1] - clock.ends[WARM - 1])  # with a GPU, this includes the time to wait for data
    steps = max(1, round(60 * settings["minutes"] * rate))

    model, clock = train(steps)
    looker = Looker(data.num_classes)
    trainer(looker).test(model, data, verbose=False)
    image = next(iter(data.test_dataloader()))["image"][:1]
    for i, (pixels, *labels) in enumerate(looker.shown):
        Image.fromarray(pixels).save(pictures / f"{i}_image.png")
        for what, mask in zip(("truth", name), labels, strict=True):
            index_mask(mask, data.palette).save(pictures / f"{i}_{what}.png")
    return {
        "family": family,
        "lr": lr,
        "arguments": arguments,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs(model, image),
        "image_size": list(image.shape[-2:]),
        "step_seconds": statistics.median(each),
        "memory_mib": memory,
        "steps": steps,
        "minutes": (clock.ends[-1] - clock.begins[0]) / 60,
        "near": looker.near.tolist(),
        "inside": looker.inside.tolist(),
    }


def compare(names: Sequence[str], data: SegmentationDataModule, settings: dict[str, Any], folder: Path) -> None:
    """Measure the architectures that ``results.json`` does not hold yet.

    Raises:
        SystemExit: if the folder holds a comparison with other settings.
    """
    (folder / "shown").mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"settings": settings, "results": {}}
    for key, value in settings.items():
        if saved["settings"][key] != value:
            there = f"error: {folder} holds a comparison with {key} {saved['settings'][key]}"
            raise SystemExit(f"{there}, but this comparison has {value}: choose another --output_dir")
    saved |= {"class_names": list(data.class_names), "palette": [list(colour) for colour in data.palette]}
    for name in names:
        done = saved["results"].get(name, {})
        if (done.get("lr"), done.get("arguments")) == VARIANTS[name][1:]:
            print(f"{name}: done already")
            continue
        print(f"{name}: {settings['minutes']:g} minutes ...", flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # its memory starts small
            saved["results"][name] = process.submit(measure, name, data, settings, folder / "shown").result()
        file.write_text(json.dumps(saved), encoding="utf-8")


def write(folder: Path) -> None:
    """Write ``compare.md``, ``compare.png``, ``confusions.png`` and ``predictions.png`` from ``results.json``."""
    saved = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    settings, names, results = saved["settings"], saved["class_names"], saved["results"]
    for result in results.values():
        near, inside = torch.tensor(result["near"]), torch.tensor(result["inside"])  # (K, K), truth x prediction
        result["mious"] = [float(confusion_metrics(matrix, names)["miou"]) for matrix in (near, inside, near + inside)]
        result["called"] = 100 * (near + inside) / (near + inside).sum(dim=1, keepdim=True)
    results = dict(sorted(results.items(), key=lambda item: -item[1]["mious"][2]))
    pairs = [(names.index(truth), names.index(other)) for truth, other in PAIRS if {truth, other} <= set(names)]
    if not pairs:  # for other data, take the most frequent confusions
        called = torch.stack([result["called"] for result in results.values()]).mean(dim=0)
        order = called.nan_to_num().fill_diagonal_(0).flatten().argsort(descending=True)
        pairs = [divmod(int(i), len(names)) for i in order[:6]]
    count = (near + inside).sum(dim=1).double()
    rarest = int(count.where(count > 0, torch.inf).argmin())
    titles = [f"{names[truth]} called {names[other]}" for truth, other in pairs] + [f"{names[rarest]} missed"]
    for result in results.values():
        called = result["called"]
        result["shares"] = [float(called[pair]) for pair in pairs] + [100 - float(called[rarest, rarest])]

    size = "x".join(map(str, result["image_size"]))
    text = (
        f"Each network was trained for {settings['minutes']:g} minutes from random weights, seed {settings['seed']}, "
        f"on {settings['machine']}. MACs are of one image of {size}; step and memory are of training; near edges means "
        f"within {EDGE} px of a change of label. The second table is in % of the true class's pixels.\n\n"
    )
    costs = {
        name: [
            f"{result['parameters'] / 1e6:.2f} M", f"{result['macs'] / 1e9:.2f} G", f"{result['step_seconds']:.3f} s",
            f"{result['memory_mib']:.0f} MiB", result["steps"], *(f"{result['mious'][i]:.3f}" for i in (2, 0, 1)),
        ]
        for name, result in results.items()
    }  # fmt: skip
    shares = {name: [f"{share:.1f}" for share in result["shares"]] for name, result in results.items()}
    text += markdown(["parameters", "MACs", "step", "memory", "steps", "mIoU", "near edges", "inside"], costs)
    text += "\n" + markdown(titles, shares)
    (folder / "compare.md").write_text(text, encoding="utf-8")
    print(text)
    draw_costs(results, settings["minutes"], folder / "compare.png")
    draw_confusions(results, titles, folder / "confusions.png")
    draw_predictions(list(results), names, saved["palette"], folder / "shown", folder / "predictions.png")


def markdown(titles: Sequence[str], rows: dict[str, list]) -> str:
    """Return a Markdown table with a row per architecture."""
    lines = [["architecture", *titles], ["---"] * (len(titles) + 1), *([name, *row] for name, row in rows.items())]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main() -> None:
    """Read the command line, train the missing architectures, and draw the results."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Lightning calls old names of jsonargparse
    parser = ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_subclass_arguments(SegmentationDataModule, "data", default=SCENES, fail_untyped=False)
    parser.add_argument("--minutes", type=float, default=2.0, help="minutes of training for each architecture")
    parser.add_argument("--architectures", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output_dir", type=Path, default=Path("logs/compare"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="32-true", help="precision of Lightning's Trainer, such as bf16-mixed")
    parser.add_argument("--draw_only", action="store_true", help="only draw tables and pictures from results.json")
    config = parser.parse_args()
    if not config.draw_only:
        settings = json.loads(parser.dump(config, format="json"))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU thread"
        settings = {key: settings[key] for key in ("data", "minutes", "seed", "precision")} | {"machine": device}
        compare(config.architectures, parser.instantiate_classes(config).data, settings, config.output_dir)
    write(config.output_dir)


if __name__ == "__main__":
    main()
