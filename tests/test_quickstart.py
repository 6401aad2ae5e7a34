"""The quickstart reaches its mIoU, and networks without context stay far below it."""

import time
from itertools import count

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import PROJECT, column, rows, succeed
from torch import nn
from torchmetrics.classification import MulticlassConfusionMatrix

from datamodules import SyntheticScenes
from segmentation.metrics import confusion_metrics

pytestmark = pytest.mark.slow
CONFIG = PROJECT / "configs/quickstart.yaml"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Run `fit`, `test` and `predict` as in the Makefile, without W&B; return their folder and the last output."""
    folder = tmp_path_factory.mktemp("quickstart")
    csv_only = [
        "--trainer.logger",
        "CSVLogger",
        "--trainer.logger.save_dir",
        "logs",
        "--trainer.logger.name",
        "quickstart",
    ]
    out = ""
    for verb in ("fit", "test", "predict"):
        checkpoint = [] if verb == "fit" else ["--ckpt_path", "best"]
        out = succeed(verb, "--config", CONFIG, *csv_only, *checkpoint, cwd=folder, timeout=1800)
    return folder, out


def test_quickstart_reaches_its_mean_iou_and_leaves_its_files(quickstart):
    folder, _ = quickstart
    run, tested = folder / "logs/quickstart/version_0", folder / "logs/quickstart/version_1"
    assert max(column(run, "val/miou")) >= 0.80
    assert float(rows(tested)[-1]["test/miou"]) >= 0.80
    for file in (run / "checkpoints/best.ckpt", run / "curves.png", tested / "panel.png", tested / "report.txt"):
        assert file.stat().st_size > 0
    assert len(list((folder / "predictions/masks").iterdir())) == 100


def pixel_classifier() -> nn.Module:
    """Build a perceptron on the colour of each pixel."""
    return nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 11, 1))


def narrow_network() -> nn.Module:
    """Build seven 3x3 convolutions, with a receptive field of 15 pixels."""
    layers: list[nn.Module] = []
    for inputs in (3, *[32] * 6):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(32, 11, 1))


def train(network: nn.Module) -> float:
    """Train with the recipe of the quickstart, and return the validation mIoU."""
    config = yaml.safe_load(CONFIG.read_text())
    data = SyntheticScenes(**{**config["data"]["init_args"], "num_workers": 2})
    data.setup("fit")
    torch.manual_seed(0)
    network = network.to(memory_format=torch.channels_last)
    settings = config["model"]["init_args"]["optimizer"]["init_args"]
    optimizer = torch.optim.AdamW(network.parameters(), **settings)
    settings = config["data"]["init_args"]
    steps = config["trainer"]["max_epochs"] * (settings["num_train"] // settings["batch_size"])
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.9)
    loader = data.train_dataloader()
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16):  # half the time, where the processor has it
                loss = F.cross_entropy(network(batch["image"].float() / 128 - 1), batch["mask"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            steps -= 1
        if steps <= 0:
            break
    matrix = MulticlassConfusionMatrix(11)
    network.eval()
    with torch.inference_mode():
        for batch in data.val_dataloader():
            matrix.update(network(batch["image"].float() / 128 - 1).argmax(1), batch["mask"])
    return float(confusion_metrics(matrix.compute(), data.class_names)["miou"])


@pytest.mark.parametrize("build", [pixel_classifier, narrow_network])
def test_no_shortcut_comes_within_a_quarter_of_the_quickstart(quickstart, build):
    folder, _ = quickstart
    started = time.monotonic()
    reached = train(build())
    print(f"{build.__name__}: mIoU {reached:.3f} in {time.monotonic() - started:.0f} s")
    assert reached <= max(column(folder / "logs/quickstart/version_0", "val/miou")) - 0.25
