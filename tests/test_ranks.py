"""The gradient of several processes is that of one with all pixels, and outputs that are not finite end a run."""

import lightning as L
import pytest
import torch
from conftest import CLASSES, draw_tree
from torch import nn
from torch.multiprocessing import spawn

from datamodules import Folder
from segmentation import SegmentationModule, losses
from segmentation.errors import UserError

WEIGHTS = [0.2, 1.0, 5.0]


def gradient(rank: int, processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its gradient over every `processes`-th of four images, whose shares of void pixels differ."""
    generator = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(4, 3, 9, 9, generator=generator), torch.randint(3, (4, 9, 9), generator=generator)
    for i in range(4):
        mask[i, : 2 * i] = 255
    scale = torch.ones(3, 1, 1, requires_grad=True)
    loss = losses.CrossEntropy(WEIGHTS)(logits[rank::processes] * scale, mask[rank::processes])
    loss.backward()
    assert scale.grad is not None
    return loss.detach(), scale.grad


def in_a_process(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.save(gradient(rank, processes), f"{folder}/{rank}.pt")
    logits, mask = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long()
    if rank == 0:  # evaluation waits for no other process
        assert losses.CrossEntropy()(logits, mask).item() == pytest.approx(1.0986, abs=1e-3)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_two_images_have_the_gradient_of_one_of_four(tmp_path):
    spawn(in_a_process, (2, str(tmp_path)), nprocs=2)
    loss, whole = gradient(0, 1)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, whole, rtol=1e-6, atol=1e-7)


class Net(SegmentationModule):
    """A network of one layer, whose output for one image is infinite if asked."""

    def __init__(self, bad: int = -1) -> None:
        super().__init__(3)
        self.conv, self.bad, self.calls = nn.Conv2d(3, 3, 1), bad, 0

    def score_maps(self, image):
        self.calls += 1
        return {"main": self.conv(image) / (self.calls - 1 != self.bad)}


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("fault", ["weights", "image"])
def test_outputs_that_are_not_finite_end_in_one_sentence(verb, fault, tmp_path):
    root = draw_tree(tmp_path / "tree", {"train": 2, "val": 3, "test": 3})
    model = Net(bad=1 if fault == "image" else -1)
    if fault == "weights":
        model.conv.weight.data[0, 0] = float("nan")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    words = "weights hold values that are not finite, first in conv.weight" if fault == "weights" else "for 01 is not"
    with pytest.raises(UserError, match=words):
        getattr(trainer, verb)(model, Folder(root, class_names=CLASSES, num_workers=0))
