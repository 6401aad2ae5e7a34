"""The worked examples of CONTRIBUTING.md: a new architecture and a new data set, trained for two steps."""

import shutil
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, PROJECT, count, draw_pair
from PIL import Image

EXAMPLES = PROJECT / "docs/examples"


@pytest.fixture
def examples(monkeypatch):
    """Import the two files as a user does whose current folder holds them."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import my_dataset
    import my_network

    return my_network.MyNetwork, my_dataset.MyDataset


@pytest.fixture
def root(tmp_path):
    """Draw the data set in its own layout."""
    root = tmp_path / "data"
    for folder in ("photos", "labels", "lists"):
        (root / folder).mkdir(parents=True)
    for split, numbers in {"train": range(4), "val": range(4, 6), "test": range(6, 7)}.items():
        names = [f"{number:02d}" for number in numbers]
        (root / f"lists/{split}.txt").write_text("\n".join(names) + "\n")
        for number, name in zip(numbers, names, strict=True):
            image, labels = draw_pair(number)
            stored = np.array([0, 100, 200], np.uint8)[labels]
            stored[0] = 9
            Image.fromarray(image).save(root / f"photos/{name}.jpg")
            Image.fromarray(stored).save(root / f"labels/{name}_label.png")
    return root


@pytest.mark.parametrize("file", ["my_network.py", "my_dataset.py", "my_config.yaml"])
def test_examples_are_short(file):
    assert len((EXAMPLES / file).read_text().splitlines()) < 100


def test_the_network_has_the_papers_context_module(examples):
    """Table 1: seven layers of 3 x 3 filters, and a receptive field of 67 x 67 after the last one."""
    network = examples[0](3, channels=32)
    assert count(network.context) == 7 * 32 * (9 * 32 + 1)
    image = torch.zeros(1, 32, 99, 99, requires_grad=True)
    for layer in network.context:
        torch.nn.init.ones_(layer[0].weight)
        torch.nn.init.ones_(layer[0].bias)  # so that no ReLU stops the gradient
    network.context(image)[0, 0, 49, 49].backward()
    assert (image.grad[0, 0] != 0).sum() == 67**2
    assert network(torch.zeros(1, 3, 61, 47)).shape == (1, 3, 61, 47)


def test_the_data_set_maps_stored_values_to_labels(examples, root):
    data = examples[1](root, batch_size=2, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 3, 48, 64) and batch["name"] == ["04"]
    assert batch["mask"].unique().tolist() == [0, 1, 2, 255] and (batch["mask"][0, 0] == 255).all()


def test_both_train_for_two_steps(examples, root):
    network, data = examples
    torch.manual_seed(0)
    model = network(3, channels=4, mean=data.mean, std=data.std)
    before = [p.clone() for p in model.parameters()]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=2, logger=False, **quiet)
    trainer.fit(model, data(root, batch_size=2, num_workers=0, crop_size=32))
    assert trainer.global_step == 2
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


@pytest.mark.slow
def test_the_command_finds_them_in_the_current_folder(root, tmp_path):
    for file in EXAMPLES.iterdir():
        shutil.copy(file, tmp_path)
    command = [sys.executable, "-m", "segmentation", "fit", "--config", "my_config.yaml", "--data.root", str(root)]
    options = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    environment = {**ENVIRONMENT, "HOME": str(tmp_path), "WANDB_MODE": "disabled"}
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = torch.load(tmp_path / "logs/my_config/version_0/checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["segmentation"]["class_path"] == "my_network.MyNetwork"
