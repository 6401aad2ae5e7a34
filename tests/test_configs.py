"""Every config is complete: it parses, states its header, and trains the network that it names."""

import numpy as np
import pytest
import yaml
from conftest import PROJECT, column
from PIL import Image

import datamodules
import segmentation
from segmentation.cli import CLI, Parser, main
from segmentation.messages import plain

CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser():
    """The command's own parser, with nothing run."""

    class Parsed(Exception):
        pass

    class Stop(CLI):
        def before_instantiate_classes(self):
            raise Parsed(self.config)

    def parse(file):
        with pytest.raises(Parsed) as caught:
            Stop(
                segmentation.SegmentationModule, datamodules.SegmentationDataModule, parser_class=Parser,
                subclass_mode_model=True, subclass_mode_data=True, args=["fit", "--config", str(file)],
                auto_configure_optimizers=False, load_from_checkpoint_support=False,
            )  # fmt: skip
        return caught.value.args[0].fit

    return parse


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_is_complete(file, parser):
    lines = file.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:4]) and not lines[4].startswith("#")
    assert f"configs/{file.name}" in lines[2] or file.stem in lines[2]
    assert list(yaml.safe_load(file.read_text())) == ["seed_everything", "trainer", "model", "data"]
    config = parser(file)
    names = [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks]
    assert names[:2] == ["ModelCheckpoint", "ModelCheckpoint"] and names[-1] == "Report"
    assert config.trainer.logger[0].init_args.name == file.stem
    data = config.data.init_args
    classes = getattr(data, "class_names", None) or datamodules.SyntheticScenes.class_names
    assert max(2, config.model.init_args.num_classes) == len(classes)  # one logit tells two classes apart


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Option 'base_chanels' is not accepted", "unknown key 'base_chanels': did you mean 'base_channels'?"),
        ("Subcommand 'fit' does not accept option 'trainer.max_epoch'", "did you mean 'trainer.max_epochs'?"),
        ("unrecognized arguments: --modle.num_classes 3", "did you mean 'model.num_classes'?"),
        ("Expected a dot import path string: DeepLabv3", "unknown class 'DeepLabv3': did you mean 'DeepLabV3'?"),
        ("module 'torch.optim' has no attribute 'Adamw'", "did you mean 'AdamW'?"),
        ("argument subcommand: invalid choice: 'trian'", "unknown command 'trian'"),
        ("the following arguments are required: fit.model", "no model given"),
    ],
)
def test_parser_messages_become_sentences(message, sentence):
    assert sentence in plain(message, [segmentation.UNet, segmentation.DeepLabV3, datamodules.Folder])


def test_every_architecture_has_a_config_for_camvid():
    classes = {yaml.safe_load(file.read_text())["model"]["class_path"] for file in CONFIGS if "_camvid" in file.stem}
    assert classes == set(segmentation.__all__) - {"SegmentationModule"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of blocky pictures in as many classes as CamVid has, and one of two."""
    folder, rng = tmp_path_factory.mktemp("drawn"), np.random.RandomState(0)
    for classes in (2, 11):
        for split, count in (("train", 4), ("val", 2)):
            for kind in ("images", "masks"):
                (folder / str(classes) / kind / split).mkdir(parents=True)
            for i in range(count):
                labels = rng.randint(0, classes, (25, 25)).repeat(8, 0).repeat(8, 1).astype(np.uint8)  # 200 x 200
                image = (labels[..., None] * 20 + rng.randint(0, 40, (200, 200, 3))).astype(np.uint8)
                Image.fromarray(image).save(folder / str(classes) / "images" / split / f"{i}.png")
                Image.fromarray(labels).save(folder / str(classes) / "masks" / split / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_trains(file, drawn, tmp_path, monkeypatch):
    """Two steps of every recipe as it stands, with a narrow network on small crops and no download.

    In this process, since importing torch in one more takes longer than the run.
    """
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(file.read_text())
    model, data = config["model"], config["data"]
    shrink = {
        "trainer.logger": "CSVLogger", "trainer.logger.save_dir": "logs", "trainer.logger.name": "run",
        "trainer.accelerator": "cpu", "trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1,
        "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 2, "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false", "model.base_channels": 8, "data.num_workers": 0, "data.batch_size": 2,
    }  # fmt: skip
    if "weights" in model["init_args"]:
        shrink["model.weights"] = "null"
    if data["class_path"] == "Folder":
        valid = model["init_args"].get("padding") == "valid"
        shrink |= {"data.root": drawn / str(len(data["init_args"]["class_names"])), "data.test_split": "val"}
        shrink["data.crop_size"] = 188 if valid else 64
    else:
        shrink |= {"data.num_train": 4, "data.num_val": 2, "trainer.val_check_interval": 1.0}
    arguments = [text for key, value in shrink.items() for text in (f"--{key}", str(value))]
    main(["fit", "--config", str(file), *arguments])
    run = tmp_path / "logs/run/version_0"
    assert all(0 < value < 1e6 for value in column(run, "train/loss")) and len(column(run, "val/miou")) == 1
    assert (run / "checkpoints/best.ckpt").is_file() and (run / "checkpoints/last.ckpt").is_file()
