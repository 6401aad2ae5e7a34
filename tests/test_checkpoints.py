"""What a checkpoint says, and that those of earlier versions still load."""

import pytest
import torch
from conftest import succeed
from torch import nn

from segmentation import SegmentationModule, UNet, checkpoints
from segmentation.errors import UserError


class Elsewhere(SegmentationModule):
    """A network outside of the package."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv = nn.Conv2d(3, num_classes, 1)


def test_class_paths_name_no_file_of_the_package():
    assert checkpoints.class_path(UNet) == "segmentation.UNet"
    assert checkpoints.class_path(Elsewhere) == f"{__name__}.Elsewhere"  # not public there, so its file is named
    for path in ("segmentation.unet.UNet", "segmentation.architectures.unet.UNet", "segmentation.UNet"):
        assert checkpoints.public_path(path) == "segmentation.UNet"
    assert checkpoints.public_path("mynet.TinyNet") == "mynet.TinyNet"


def test_an_earlier_checkpoint_builds_and_fills_its_network(tmp_path):
    model = UNet(3, base_channels=4)
    save(model, tmp_path / "old.ckpt", "segmentation.unet.UNet")
    assert checkpoints.model_of(tmp_path / "old.ckpt")["class_path"] == "segmentation.UNet"
    again = UNet(3, base_channels=4)
    checkpoints.load_trained(again, tmp_path / "old.ckpt")
    assert again.class_names == ["sky", "road", "car"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "the checkpoint .*x.ckpt does not exist"),
        ({"epoch": 1}, "x.ckpt holds no state_dict"),
        (
            {"state_dict": {}, "segmentation": {"class_path": "segmentation.segnet.SegNet"}},
            "of segmentation.SegNet, but",
        ),
    ],
)
def test_other_files_are_refused_in_one_sentence(content, words, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=words):
        checkpoints.load_trained(UNet(3, base_channels=4), tmp_path / "x.ckpt")


@pytest.mark.slow
def test_commands_take_an_earlier_checkpoint(trained, tree, tmp_path):
    """The commands that find the model in the checkpoint, and one that has a config."""
    now = trained / "logs/config/version_0/checkpoints/best.ckpt"
    content = torch.load(now, weights_only=True)
    content["segmentation"]["class_path"] = "segmentation.unet.UNet"
    torch.save(content, tmp_path / "old.ckpt")
    photos = ["--data.predict_dir", tree / "images/test", "--trainer.accelerator", "cpu"]
    masks = []
    for name, path in (("old", tmp_path / "old.ckpt"), ("now", now)):
        succeed("predict", "--ckpt_path", path, *photos, "--writer.output_dir", tmp_path / name, cwd=tmp_path)
        masks.append([file.read_bytes() for file in sorted((tmp_path / name / "masks").iterdir())])
    assert len(masks[0]) == 3 and masks[0] == masks[1]
    succeed("test", "--config", trained / "config.yaml", "--ckpt_path", tmp_path / "old.ckpt", cwd=tmp_path)


def save(model: UNet, path, class_path: str) -> None:
    checkpoint: dict = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    checkpoint["segmentation"] |= {"class_path": class_path, "class_names": ["sky", "road", "car"]}
    torch.save(checkpoint, path)
