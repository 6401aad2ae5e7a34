"""Every config is complete: it parses, states its header, and builds the network that it names."""

import pytest
import yaml
from conftest import PROJECT

import datamodules
import segmentation
from segmentation.cli import CLI, Parser
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
    assert config.model.init_args.num_classes == len(classes)


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
