"""What a run keeps: frozen statistics to the bit, and after a resume the batches of the run never stopped."""

import lightning as L
import pytest
import torch
from conftest import CLASSES, draw_tree
from torch import nn

from datamodules import Folder
from segmentation import DeepLabV2, MaskFormer, SegmentationModule


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_tree(tmp_path_factory.mktemp("keep") / "tree", {"train": 8, "val": 2})


def trainer(folder, epochs: int, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=folder, max_epochs=epochs, accelerator="cpu", **quiet, **options)


def data(root, num_workers: int = 0) -> Folder:
    return Folder(
        root, class_names=CLASSES, batch_size=2, crop_size=32, scale_range=(0.5, 1.5), num_workers=num_workers
    )


def statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of all running statistics of batch norm."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return [getattr(m, name).clone() for m in norms for name in ("running_mean", "running_var", "num_batches_tracked")]


NETWORKS = {
    "DeepLabV2": lambda freeze: DeepLabV2(3, backbone="resnet50", base_channels=4, weights=None, freeze_bn=freeze),
    "MaskFormer": lambda freeze: MaskFormer(
        3, base_channels=4, hidden_channels=16, num_queries=4, decoder_layers=1, weights=None, freeze_bn=freeze
    ),
}


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_statistics_stay_in_a_run(name, freeze, root, tmp_path):
    torch.manual_seed(0)
    model = NETWORKS[name](freeze)
    before = statistics(model)
    few = {"limit_train_batches": 2, "limit_val_batches": 0}  # such a network may well have no finite scores
    trainer(tmp_path, 2, enable_checkpointing=False, **few).fit(model, data(root))
    assert len(before) > 3
    same = [torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True)]
    assert same == [freeze] * len(same)


class Watching(SegmentationModule):
    """A network of one layer that remembers the batches of training."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(3, 3, 1)
        self.seen: list[tuple] = []

    def score_maps(self, image):
        return {"main": self.conv(image)}

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, *batch["name"], batch["image"].sum().item(), batch["mask"].sum().item()))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_resumed_run_sees_the_batches_of_the_run_never_stopped(num_workers, root, tmp_path):
    whole, first, second = Watching(), Watching(), Watching()
    trainer(tmp_path / "whole", 2, enable_checkpointing=False).fit(whole, data(root, num_workers))
    run = trainer(tmp_path / "first", 1)
    run.fit(first, data(root, num_workers))
    saved = run.checkpoint_callback.best_model_path  # as written at the end of the epoch
    trainer(tmp_path / "second", 2, enable_checkpointing=False).fit(second, data(root, num_workers), ckpt_path=saved)
    assert len(whole.seen) == 8 and len({names[1:] for names in whole.seen}) == 8
    assert first.seen + second.seen == whole.seen
