"""What the tests share: small data sets that are drawn on disk, and processes of the `lightning` command."""

import csv
import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in every process, since the tests run in two

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn

from segmentation import SegmentationModule
from segmentation.architectures.backbones.resnet import Bottleneck

PROJECT = Path(__file__).parents[1]
CLASSES = ["ground", "disc", "bar"]

torch.set_num_threads(1)
settings.register_profile("same", derandomize=True, deadline=None)  # the same examples in every run
settings.load_profile("same")
logging.getLogger("lightning.pytorch").propagate = True  # pytest 8 imports this file before it captures logs


def pytest_report_header() -> str:
    """Print the versions that the tests run on."""
    names = ("torch", "torchvision", "lightning", "torchmetrics", "jsonargparse", "numpy")
    return "versions: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def draw_pair(seed: int, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw a red disc (1) and a blue bar (2) on a grey ground: image (H, W, 3) and labels (H, W)."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.uint8)
    labels[(y - rng.randint(10, height - 10)) ** 2 + (x - rng.randint(10, width - 10)) ** 2 < rng.randint(30, 90)] = 1
    left = rng.randint(0, width - 6)
    labels[:, left : left + 4] = 2
    colours = np.array([[110, 110, 110], [190, 60, 50], [50, 70, 180]])
    image = colours[labels] + rng.randint(-15, 16, (height, width, 3))
    return image.astype(np.uint8), labels


def draw_tree(root: Path, counts: dict[str, int] | None = None) -> Path:
    """Draw images/ and masks/ with a folder for each split; the upper border of every mask is ignored."""
    for offset, (split, count) in enumerate((counts or {"train": 12, "val": 7, "test": 3}).items()):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, labels = draw_pair(100 * offset + i)
            labels[:2] = 255
            Image.fromarray(image).save(root / "images" / split / f"{i:02d}.jpg", quality=95)
            Image.fromarray(labels).save(root / "masks" / split / f"{i:02d}.png")
    return root


def config(folder: Path, root: Path, name: str = "config", /, **replace: str) -> Path:
    """Write a complete small config; `replace` exchanges the line of a key."""
    lines = f"""\
seed_everything: 0
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {{save_dir: {folder}/logs, name: {name}}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{monitor: val/miou, mode: max, filename: best}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{filename: last, save_on_train_epoch_end: true}}
    - class_path: segmentation.callbacks.PredictionLogger
    - class_path: segmentation.callbacks.Report
model:
  class_path: UNet
  init_args:
    num_classes: 3
    base_channels: 4
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data:
  class_path: Folder
  init_args:
    root: {root}
    class_names: [{", ".join(CLASSES)}]
    palette: [[10, 20, 30], [200, 0, 0], [0, 0, 200]]
    batch_size: 4
    num_workers: 0
    crop_size: 32
    scale_range: [0.75, 1.5]
""".splitlines()
    for key, value in replace.items():
        found = [i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        assert len(found) == 1, key
        lines[found[0]] = lines[found[0]].split(key)[0] + value
    file = folder / f"{name}.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "200"}
for variable in ("WANDB_API_KEY", "WANDB_MODE", "PL_GLOBAL_SEED"):
    ENVIRONMENT.pop(variable, None)
SCRIPT = Path(sys.executable).with_name("lightning")  # as `pip install -e .` makes it
COMMAND = [str(SCRIPT)] if SCRIPT.is_file() else [sys.executable, "-m", "segmentation"]


def lightning(*args: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run the command as a user does: in another process and another folder, without a terminal."""
    environment = {**ENVIRONMENT, "HOME": str(cwd)}
    return subprocess.run(
        [*COMMAND, *map(str, args)], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


def succeed(*args: object, cwd: Path, timeout: float = 300) -> str:
    """Run the command, check that its exit status is 0, and return what it printed."""
    done = lightning(*args, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run: Path, key: str) -> list[float]:
    """Return the values of a metric in a run's metrics.csv, in order."""
    return [float(row[key]) for row in rows(run) if row.get(key)]


class Fixed(SegmentationModule):
    """A network without layers: a function of the image gives the logits."""

    def __init__(self, num_classes: int, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_classes)
        self.function = logits

    def forward(self, image: Tensor) -> Tensor:
        return self.function(image)


def count(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def dilations(module: nn.Module) -> list[int]:
    """List the dilations of the 3x3 convolutions, in order."""
    return [m.dilation[0] for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def shake(module: nn.Module, image: torch.Tensor) -> nn.Module:
    """Set random scales, shifts and biases, and the statistics of `image`, so that every layer changes the logits."""
    torch.manual_seed(1)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
            nn.init.uniform_(m.weight, 0.7, 1.3)
            nn.init.normal_(m.bias, 0, 0.2)
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.bias is not None:
            nn.init.normal_(m.bias, 0, 0.1)
    with torch.no_grad():
        module.train()(image)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return module.eval()


def shake_norms(module: nn.Module, low: float = 0.3, high: float = 0.9) -> nn.Module:
    """Set random statistics, shifts and scales (low to high) of batch norm; the initial ones change nothing."""
    torch.manual_seed(1)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, low, high)
            nn.init.normal_(m.bias, 0, 0.2)
        if isinstance(m, (Bottleneck, torchvision.models.resnet.Bottleneck)):
            nn.init.uniform_(m.bn3.weight, 0.05, 0.2)  # otherwise 33 additions lead to logits of a thousand
    return module.eval()


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """The folder of a small data set, for tests that only read it."""
    return draw_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def trained(tree, tmp_path_factory) -> Path:
    """The folder of a finished run: config.yaml beside logs/config/version_0."""
    folder = tmp_path_factory.mktemp("trained")
    file = config(folder, tree)
    succeed("fit", "--config", file, cwd=folder)
    return folder
