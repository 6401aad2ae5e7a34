"""Schedules by name: ReduceLROnPlateau steps after a validation, in the direction in which its metric gets better."""

import pytest
import torch
from conftest import column, config
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from segmentation import UNet, cli
from segmentation.errors import UserError
from segmentation.optimizer import ReduceLROnPlateau as Plateau
from segmentation.optimizer import after_validation, better


class Validation:
    """What a schedule asks of a trainer."""

    limit_val_batches, check_val_every_n_epoch = 1.0, 1


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_a_plateau_lowers_the_rate_when_the_metric_no_longer_grows(tree, tmp_path, monkeypatch):
    """By its short name; with a threshold that nothing reaches, every validation after the first is no better."""
    monkeypatch.chdir(tmp_path)
    plateau = "{class_path: ReduceLROnPlateau, init_args: {monitor: val/miou, patience: 0, threshold: 9, factor: 0.5}}"
    file = config(tmp_path, tree, optimizer="optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.008}}")
    options = ["--model.lr_scheduler", plateau, "--trainer.callbacks+=LearningRateMonitor", "--trainer.max_epochs", "4"]
    cli.main(["fit", "--config", str(file), *options])
    rates = column(tmp_path / "logs/config/version_0", "lr-SGD/backbone_weight")
    assert list(dict.fromkeys(rates)) == pytest.approx([0.008, 0.004, 0.002])


def test_the_mode_follows_from_the_metric(optimizer):
    assert (Plateau(optimizer).monitor, Plateau(optimizer).mode) == ("val/loss", "min")
    assert Plateau(optimizer, "val/miou").mode == "max"
    assert Plateau(optimizer, "val/rand_error").mode == better("val/loss") == "min"
    plan = after_validation(ReduceLROnPlateau(optimizer, mode="max"), Validation())
    assert plan == {"interval": "epoch", "monitor": "val/miou", "frequency": 1, "strict": True}
    with pytest.raises(UserError, match=r"watches val/miou in the mode min, .* falling: set the mode to max"):
        after_validation(Plateau(optimizer, "val/miou", "min"), Validation())


def test_a_plateau_waits_for_a_validation(optimizer):
    trainer = Validation()
    trainer.check_val_every_n_epoch = 5
    assert after_validation(Plateau(optimizer), trainer)["frequency"] == 5
    trainer.limit_val_batches = 0
    with pytest.raises(UserError, match=r"trainer\.limit_val_batches 0 never gives"):
        after_validation(Plateau(optimizer), trainer)


def test_other_schedules_step_as_before():
    model = UNet(3, base_channels=4, lr_scheduler=lambda optimizer: StepLR(optimizer, 5))
    plan = model.configure_optimizers()["lr_scheduler"]
    assert isinstance(plan["scheduler"], StepLR) and plan["interval"] == "step" and "monitor" not in plan
