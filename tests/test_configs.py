"""Every config is complete: it parses, states its header, and trains the network that it names on the data it names."""

import functools
import re
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, column, rows
from trees import (
    draw_ade20k,
    draw_camvid,
    draw_cityscapes,
    draw_isbi_em,
    draw_voc,
    draw_voc_aug,
    draw_wildfire,
    labels,
    picture,
    save,
)

import datamodules
import segmentation
from segmentation.cli import CLI, main
from segmentation.messages import plain
from segmentation.parser import COMMANDS

FOLDER = PROJECT / "configs"
DEBUG = FOLDER / "debug.yaml"  # is added to a config
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - {DEBUG})
RESULT = re.compile(r"# (Published|Must reach): (.+)\. Measured: (.+)\.")


@pytest.fixture(scope="module")
def parser():
    """A function that parses a config as the command does, with `run.yaml` and the run's name, and runs nothing."""

    class Parsed(Exception):
        pass

    class Stop(CLI):
        def instantiate_classes(self):
            raise Parsed(self.config)

    @functools.cache
    def parse(file):
        with pytest.raises(Parsed) as caught:
            Stop(["fit", "--config", str(file)])
        return caught.value.args[0].fit

    return parse


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_is_complete(file, parser):
    lines = file.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:4]) and not lines[4].startswith("#")
    result = RESULT.fullmatch(lines[1])
    assert result and (result[3].startswith("not run") or re.search(r"commit [0-9a-f]{7}\b", result[3]))
    assert f"lightning fit --config configs/{file.name}" in lines[2] and lines[3].startswith("# Differs from the paper")
    assert max(len(line) for line in lines) <= 120
    written = yaml.safe_load("\n".join(lines))
    assert list(written) == ["seed_everything", "trainer", "model", "data"]
    config = parser(file)
    names = [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks]
    assert names[:3] == ["ModelCheckpoint", "ModelCheckpoint", "LearningRateMonitor"]
    assert names.count("Report") == names.count("PredictionLogger") == 1
    added = [callback["class_path"].rpartition(".")[2] for callback in written["trainer"].get("callbacks+", [])]
    assert len(names) == len({*names, *added}) + 1  # two are called ModelCheckpoint
    assert config.trainer.logger[0].init_args.name == config.trainer.logger[1].init_args.group == file.stem
    facts = getattr(datamodules, config.data.class_path.rpartition(".")[2])
    classes = getattr(config.data.init_args, "class_names", None) or facts.class_names
    assert max(2, config.model.init_args.num_classes) == len(classes)  # one logit tells two classes apart


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_model_normalises_as_the_data_set_states_or_the_header_says_why_not(file, parser):
    config = parser(file)
    facts = getattr(datamodules, config.data.class_path.rpartition(".")[2])
    model = config.model.init_args
    differs = bool(facts.mean) and (tuple(model.mean), tuple(model.std)) != (tuple(facts.mean), tuple(facts.std))
    header = " ".join(file.read_text().splitlines()[:4])
    assert differs == ("mean 0, std 1/255" in header)


def test_configs_are_short_together():
    assert sum(len(file.read_text().splitlines()) for file in (*CONFIGS, DEBUG)) <= 1300


def test_table_lists_every_config_with_what_its_header_says():
    table = (FOLDER / "README.md").read_text()
    expected = []
    for file in CONFIGS:
        result = RESULT.fullmatch(file.read_text().splitlines()[1])
        config = yaml.safe_load(file.read_text())
        value = result[2] if result[1] == "Published" else f"must reach {result[2]}"
        cells = (config["model"]["class_path"], config["data"]["class_path"], value, result[3])
        expected.append(f"| [{file.stem}]({file.name}) | {' | '.join(cells)} |")
    assert [line for line in table.splitlines() if line.startswith("| [")] == expected
    assert DEBUG.name in table


@pytest.mark.slow
def test_debug_config_goes_over_any_config(tmp_path, monkeypatch):
    """The data and the classes are replaced, the network is the config's, and the run leaves its folder."""
    monkeypatch.chdir(tmp_path)
    files = ["--config", str(FOLDER / "deeplabv3plus_wildfire.yaml"), "--config", str(DEBUG)]
    main(["fit", *files, "--model.weights", "null", "--model.base_channels", "8"])
    run = tmp_path / "logs/debug/version_0"
    assert len(column(run, "train/loss")) == 4 and len(column(run, "val/miou")) == 2
    assert (run / "checkpoints/best.ckpt").is_file() and (run / "config.yaml").is_file()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "segmentation.DeepLabV3Plus"
    assert config["model"]["init_args"]["output_stride"] == 8 and config["data"]["init_args"]["num_workers"] == 0


KEYS = ["base_channels", "num_classes", "trainer.max_epochs", "trainer.num_nodes", "model", "data", "writer.overwrite"]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Option 'base_chanels' is not accepted", "unknown key 'base_chanels': did you mean 'base_channels'?"),
        ("Option 'Base_Channels' is not accepted", "did you mean 'base_channels'?"),
        ("Option 'lr' is not accepted", "unknown key 'lr'"),
        ("Subcommand 'fit' does not accept option 'trainer.max_epoch'", "did you mean 'trainer.max_epochs'?"),
        ("unrecognized arguments: --modle.num_classes 3", "did you mean 'model.num_classes'?"),
        ("Unrecognized arguments: --writer.overwrit true", "did you mean 'writer.overwrite'?"),
        ('Parser key "model":\n  Expected a dot import path string: unet', "did you mean 'UNet'?"),
        ('Parser key "model":\n  Expected a dot import path string: DeepLabv3', "did you mean 'DeepLabV3'?"),
        ('Parser key "data":\n  Expected a dot import path string: Foldr', "did you mean 'Folder'?"),
        ('Parser key "optimizer":\n  Expected a dot import path string: adamw', "did you mean 'AdamW'?"),
        ('Parser key "trainer.callbacks":\n  Expected a dot import path string: denseCRF', "did you mean 'DenseCRF'?"),
        ("module 'torch.optim' has no attribute 'Adamw'", "did you mean 'AdamW'?"),
        ("argument subcommand: invalid choice: 'trian'", "unknown command 'trian': did you mean 'fit'?"),
        ("argument subcommand: invalid choice: 'train'", "unknown command 'train': did you mean 'fit'?"),
        ("argument subcommand: invalid choice: 'chek_data'", "unknown command 'chek_data': did you mean 'check_data'?"),
        ("Expected a <class 'int'>.\n  Got value: wide", "Expected a <class 'int'>. Got value: wide"),
    ],
)
def test_parser_messages_become_sentences(message, sentence):
    assert plain(message, KEYS, COMMANDS).endswith(sentence)


def test_every_architecture_has_a_config_for_camvid():
    classes = {yaml.safe_load(file.read_text())["model"]["class_path"] for file in CONFIGS if "_camvid" in file.stem}
    assert classes == set(segmentation.__all__) - {"SegmentationModule"}


SIDES = (200, 200)


def draw_folder(root: Path, classes: int) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            save(root / f"images/{split}/{i}.png", picture(i, SIDES))
            save(root / f"masks/{split}/{i}.png", labels(i, range(classes), SIDES))


def draw_voc_and_aug(root: Path) -> None:
    names = [f"2007_{i:06d}" for i in range(4)]
    draw_voc(root, names, ["2007_000032", "2007_000033"], SIDES)
    draw_voc_aug(root, names, SIDES)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A function that returns the root of a small tree in the layout of a data class, drawn once."""
    draw = {
        "Folder": draw_folder,
        "VOC": lambda root, _: draw_voc_and_aug(root),
        "Cityscapes": lambda root, _: draw_cityscapes(root, 4, 2, SIDES),
        "ADE20K": lambda root, _: draw_ade20k(root, 4, 2, SIDES),
        "CamVid": lambda root, _: draw_camvid(root, {"train": 4, "val": 2}, SIDES),
        "ISBIEM": lambda root, _: draw_isbi_em(root, 8, SIDES[0]),  # four are held out
        "Wildfire": lambda root, _: draw_wildfire(root),
    }

    @functools.cache
    def root(data_class: str, classes: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(data_class)
        draw[data_class](folder, classes)
        return folder

    return root


# A paper's first learning rates, where kinds of parameters have different ones; norms are trained at the weights' rate.
DEEPLAB_V1 = {"backbone_weight": 1e-3, "backbone_bias": 2e-3, "head_weight": 1e-2, "head_bias": 2e-2}
DEEPLAB_V2 = {"backbone_weight": 2.5e-4, "head_weight": 2.5e-3, "head_bias": 5e-3}  # batch norm is frozen
PSPNET = {"backbone_weight": 1e-2, "backbone_norm": 1e-2, "head_weight": 1e-1, "head_norm": 1e-1, "head_bias": 1e-1}
RATES = {
    "deeplabv1_voc": DEEPLAB_V1,
    "deeplabv2_voc": DEEPLAB_V2,
    "deeplabv2_voc_vgg16": DEEPLAB_V1,
    "deeplabv2_cityscapes": DEEPLAB_V2,
    "fcn_voc": {"backbone_weight": 2e-5, "backbone_bias": 4e-5, "head_weight": 2e-5, "head_bias": 4e-5},
    "pspnet_voc": PSPNET,
    "pspnet_cityscapes": PSPNET,
    "pspnet_ade20k": PSPNET,
    "maskformer_ade20k": {"backbone_weight": 1e-5, "head_weight": 1e-4, "head_bias": 1e-4, "head_norm": 1e-4},
}


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_trains(file, drawn, tmp_path, monkeypatch):
    """Every recipe trains two steps as it stands, with a narrow network on small crops and no download.

    It runs in this process, because importing torch in another one takes longer than the run.
    """
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(file.read_text())
    trainer, model, data = config["trainer"], config["model"], config["data"]
    valid = model["init_args"].get("padding") == "valid"
    shrink = {
        "trainer.logger": "CSVLogger", "trainer.logger.save_dir": "logs", "trainer.logger.name": "run",
        "trainer.accelerator": "cpu", "trainer.max_epochs": 1, "trainer.log_every_n_steps": 1,
        "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 2, "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false", "model.base_channels": 8,
        "data.num_workers": 0, "data.batch_size": 2, "data.crop_size": 188 if valid else 64,
    }  # fmt: skip
    if trainer.get("check_val_every_n_epoch", 1) is None:  # validates every so many steps, of any epoch
        shrink["trainer.val_check_interval"] = 2
    else:
        shrink |= {"trainer.val_check_interval": 1.0, "trainer.check_val_every_n_epoch": 1}
    if "weights" in model["init_args"]:
        shrink["model.weights"] = "null"
    if model["init_args"].get("freeze_bn"):
        shrink["trainer.gradient_clip_val"] = 1  # else random weights under frozen batch norm overflow in two steps
    if data["class_path"].startswith("Synthetic"):
        shrink |= {"data.size": f"[{SIDES[0]},{SIDES[1]}]", "data.num_train": 4, "data.num_val": 2, "data.num_test": 2}
    elif data["class_path"] == "Folder":
        shrink |= {"data.root": drawn("Folder", len(data["init_args"]["class_names"])), "data.test_split": "val"}
    else:
        shrink["data.root"] = drawn(data["class_path"])
    arguments = [text for key, value in shrink.items() for text in (f"--{key}", str(value))]
    main(["fit", "--config", str(file), *arguments])
    run = tmp_path / "logs/run/version_0"
    assert all(0 < value < 1e6 for value in column(run, "train/loss")) and len(column(run, "val/miou")) == 1
    assert (run / "checkpoints/best.ckpt").is_file() and (run / "checkpoints/last.ckpt").is_file()
    if file.stem in RATES:
        columns = [key for key in rows(run)[0] if key.startswith("lr-")]
        assert {key.rpartition("/")[2]: column(run, key)[0] for key in columns} == pytest.approx(RATES[file.stem])
