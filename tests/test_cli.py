"""The command line itself: whose mistake an error is, help, names of runs, and what a command accepts and ignores."""

import configparser
import importlib.util
import subprocess

import jsonargparse
import pytest
import yaml
from conftest import COMMAND, ENVIRONMENT, PROJECT, config, draw_tree, succeed
from torch import nn

import datamodules.errors
import segmentation.errors
from segmentation import checkpoints, cli
from segmentation.messages import sentence
from segmentation.parser import OWN

LIGHTNING = ["fit", "validate", "test", "predict"]
UNET = ["--model", "UNet", "--model.num_classes", "3"]
FOLDER = ["--data", "Folder", "--data.root", "x"]


class Parsed(Exception):
    """The arguments of a command that was about to build its classes."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """A function that gives what a command would build from its arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def stop(self):
        raise Parsed(self.config[self.subcommand])

    monkeypatch.setattr(cli.CLI, "instantiate_classes", stop)

    def parse(*args):
        with pytest.raises(Parsed) as caught:
            cli.main([str(arg) for arg in args])
        return caught.value.args[0]

    return parse


def refused(capsys, *args) -> str:
    """The sentence with which a command ends that cannot be parsed."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1
    return errors[0]


def names(arguments) -> list[str]:
    return [callback.class_path.rpartition(".")[2] for callback in arguments.trainer.callbacks]


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    """It is a ValueError in a function of ours, as a user's mistake is, but no `UserError`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "newest", lambda *args: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match=r"zip\(\)"):
        cli.main(["export", *UNET, "--ckpt_path", "best"])


def test_a_bug_in_a_constructor_keeps_its_traceback(monkeypatch, tmp_path):
    """The parser calls constructors, and wraps their exceptions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn, "Conv2d", lambda *args, **kwargs: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match=r"zip\(\)"):
        cli.main(["receptive_field", *UNET])


@pytest.mark.parametrize("kind", [segmentation.errors.UserError, datamodules.errors.UserError])
def test_a_mistake_of_the_user_is_one_sentence(kind, monkeypatch, tmp_path, capsys):
    def newest(*args):
        raise kind("no run here: train first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "newest", newest)
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *UNET, "--ckpt_path", "best"])
    assert end.value.code == 1 and capsys.readouterr().err.splitlines()[-1] == "error: no run here: train first"


@pytest.mark.parametrize("command", OWN)
def test_help_shows_the_commands_own_options_first(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    options = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    own = OWN[command] - {"trainer", "model", "datamodule", "arguments", "worked_out"}
    assert end.value.code == 0 and {option.strip("-,") for option in options[: len(own)]} == own
    assert [option for option in options if option.startswith("--trainer")] == ["--trainer.accelerator"]
    assert ("--model" in options) == ("model" in OWN[command])
    assert ("--data" in options) == ("datamodule" in OWN[command])
    assert not {"--weights_only", "--writer.output_dir"} & set(options)


@pytest.mark.slow
def test_help_of_export_is_short():
    """In a process of its own, since the help lists the classes that tests define too."""
    done = subprocess.run(
        [*COMMAND, "export", "--help"],
        env={**ENVIRONMENT, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 60
    assert str(PROJECT) not in done.stdout  # a path there made the length depend on the folder of the checkout


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    assert end.value.code == 0 and setup["metadata"]["version"] in capsys.readouterr().out
    assert "run.yaml" in setup["options.package_data"]["segmentation"]


@pytest.mark.parametrize("command", [*LIGHTNING, *OWN])
def test_every_command_accepts_the_config_of_a_run(command, parse, tmp_path, capsys):
    """The complete config of `fit`, with the keys that `test` adds; what a command ignores, it leaves out."""
    with pytest.raises(SystemExit):
        cli.main(["fit", *UNET, *FOLDER, "--trainer.accelerator", "cpu", "--print_config"])
    run = yaml.safe_load(capsys.readouterr().out)
    run["trainer"]["logger"][0]["init_args"]["name"] = "earlier"
    for key in ("ckpt_path", "weights_only", "verbose"):
        run.setdefault(key, None)
    run["verbose"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    arguments = parse(command, "--config", "config.yaml")
    assert arguments.trainer.accelerator == "cpu"
    if command in OWN:
        assert ("model" in arguments) == ("model" in OWN[command])
        assert ("data" in arguments) == ("datamodule" in OWN[command])
        assert arguments.trainer.logger is False and arguments.trainer.get("max_epochs") is None
    elif command != "predict":
        assert arguments.trainer.logger[0].init_args.name == "earlier"


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (["export", "--trainer.max_epochs", "3"], "trainer.max_epochs"),
        (["export", "--data", "Folder"], "data"),
        (["export", "--weights_only=true"], "weights_only"),
        (["predict_tiff", "--writer.output_dir", "x"], "writer.output_dir"),
        (["check_data", "--model", "UNet"], "model"),
        (["check_data", "--ckpt_path", "x.ckpt"], "ckpt_path"),
        (["tune_crf", "--trainer.logger", "false"], "trainer.logger"),
        (["receptive_field", "--data.root", "x"], "data.root"),
        (["fit", "--verbose", "true"], "verbose"),
    ],
)
def test_an_argument_that_a_command_ignores_is_an_error(args, key, capsys):
    assert refused(capsys, *args) == f"error: {args[0]} does not use --{key}: leave it out"


def test_our_commands_accept_an_accelerator(parse):
    assert parse("receptive_field", *UNET, "--trainer.accelerator", "cpu").trainer.accelerator == "cpu"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["train"], "unknown command 'train': did you mean 'fit'?"),
        (["fit", *UNET, "--model.lr", "1"], "unknown key 'lr'"),
        (["fit", *UNET, "--model.base_chanels", "1"], "unknown key 'base_chanels': did you mean 'base_channels'?"),
        (["fit", *UNET, *FOLDER, "--data.path", "x"], "unknown key 'path'"),
        (["fit", *UNET, *FOLDER, "--data.batchsize", "x"], "unknown key 'batchsize': did you mean 'batch_size'?"),
        (["fit", *UNET, "--model.optimizer", "adamw"], "unknown class 'adamw': did you mean 'AdamW'?"),
        (["fit", "--model", "unet"], "unknown class 'unet': did you mean 'UNet'?"),
        (["fit", "--model", "Folder"], "unknown class 'Folder'"),
        (["fit", *UNET, "--data", "voc"], "unknown class 'voc': did you mean 'VOC'?"),
        (["fit", "--trainer.max_epoch", "1"], "unknown key 'trainer.max_epoch': did you mean 'trainer.max_epochs'?"),
        (["export", "--frmat", "onnx"], "unknown key 'frmat': did you mean 'format'?"),
        (["fit"], "no model given: name a config with --config FILE, or an architecture with --model CLASS"),
        (["check_data"], "no data given: name a config with --config FILE, or a data set with --data CLASS"),
    ],
)
def test_a_typo_gets_the_nearest_valid_name(args, sentence, capsys):
    assert refused(capsys, *args) == f"error: {sentence}"


def test_a_run_without_a_config_is_named_after_model_and_data(parse):
    arguments = parse("fit", *UNET, *FOLDER)
    csv, wandb = arguments.trainer.logger
    assert csv.init_args.name == wandb.init_args.group == "unet_folder" and wandb.init_args.project == "segmentation"
    assert names(arguments) == [
        "ModelCheckpoint", "ModelCheckpoint", "LearningRateMonitor", "PredictionLogger", "Report"
    ]  # fmt: skip
    assert [c.init_args.filename for c in arguments.trainer.callbacks[:2]] == ["best", "last"]
    assert arguments.trainer.callbacks[0].init_args.monitor == "val/miou"


def test_a_copied_config_logs_into_its_own_folder(parse, tmp_path):
    for name in ("unet_cats", "copy_of_it"):
        (tmp_path / f"{name}.yaml").write_text("trainer: {max_epochs: 3}\nmodel: {class_path: UNet}\n")
        arguments = parse("fit", "--config", f"{name}.yaml", "--model.num_classes", 3, *FOLDER)
        assert [arguments.trainer.logger[0].init_args.name, arguments.trainer.logger[1].init_args.group] == [name] * 2
    both = ["-c", "copy_of_it.yaml", "--config", "unet_cats.yaml"]
    assert parse("fit", *both, *UNET, *FOLDER).trainer.logger[0].init_args.name == "copy_of_it_unet_cats"


def test_a_name_that_is_given_stays(parse, tmp_path):
    file = config(tmp_path, tmp_path / "x", "its_file")
    file.write_text(file.read_text().replace("name: its_file}", "name: cats}"))
    arguments = parse("fit", "--config", file)
    assert [logger.init_args.name for logger in arguments.trainer.logger] == ["cats"]  # its list replaces run.yaml's
    assert names(arguments) == ["ModelCheckpoint", "ModelCheckpoint", "PredictionLogger", "Report"]


def test_a_config_adds_callbacks_or_replaces_one_of_this_package(parse, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: DenseCRF\n"
        "    - {class_path: PredictionLogger, init_args: {every_n_epochs: 20}}\n"
    )
    added = "--trainer.callbacks+=segmentation.callbacks.BoundaryScores"
    stopping = "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"
    arguments = parse("fit", *UNET, *FOLDER, "--config", "more.yaml", added, *stopping)
    assert names(arguments) == [
        "ModelCheckpoint", "ModelCheckpoint", "LearningRateMonitor", "Report", "DenseCRF", "PredictionLogger",
        "BoundaryScores", "EarlyStopping",
    ]  # fmt: skip
    assert arguments.trainer.callbacks[5].init_args.every_n_epochs == 20


def test_a_switch_leaves_out_the_callbacks_that_need_it(parse):
    assert "LearningRateMonitor" not in names(parse("fit", *UNET, *FOLDER, "--trainer.logger", "false"))
    assert "ModelCheckpoint" not in names(parse("fit", *UNET, *FOLDER, "--trainer.enable_checkpointing", "false"))
    bare = parse("fit", *UNET, *FOLDER, "--trainer.barebones", "true")
    assert bare.trainer.logger is False and names(bare) == ["PredictionLogger", "Report"]


def test_predict_writes_no_checkpoints_and_so_has_no_callback_for_them(parse, tmp_path):
    photos = ["--data.predict_dir", tmp_path]
    assert names(parse("predict", *UNET, *FOLDER, *photos)) == ["PredictionLogger", "Report"]


def test_configs_of_earlier_versions_find_a_class_that_has_moved(parse):
    arguments = parse("fit", *UNET, *FOLDER, "--model.inference", "segmentation.inference.OverlapTile")
    assert arguments.model.init_args.inference.init_args.crop == 572


def test_best_of_a_short_config_is_found_in_its_own_folder(parse, tmp_path, capsys):
    (tmp_path / "cats.yaml").write_text("model: {class_path: UNet, init_args: {num_classes: 3}}\n")
    with pytest.raises(SystemExit):
        cli.main(["export", "--config", "cats.yaml", "--ckpt_path", "best"])
    assert "no run in logs/cats has left a best.ckpt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_a_config_leaves_all_that_a_run_leaves(tmp_path):
    draw_tree(tmp_path / "tree")
    data = ["--data", "Folder", "--data.root", "tree", "--data.class_names", "[a, b, c]", "--data.num_workers", 0]
    small = ["--data.batch_size", 4, "--data.crop_size", 32, "--model.base_channels", 4, "--trainer.accelerator", "cpu"]
    succeed("fit", *UNET, *data, *small, "--trainer.max_epochs", 1, "--trainer.log_every_n_steps", 1, cwd=tmp_path)
    run = tmp_path / "logs/unet_folder/version_0"
    for name in ("config.yaml", "metrics.csv", "curves.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (run / name).is_file(), name
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["logger"][0]["init_args"]["name"] == "unet_folder"
    assert len(saved["trainer"]["callbacks"]) == 5 and list((run / "pictures").iterdir())
    succeed("test", "--config", run / "config.yaml", "--ckpt_path", "best", cwd=tmp_path)
    assert (run.parent / "version_1/report.txt").is_file()


@pytest.mark.skipif(
    tuple(map(int, jsonargparse.__version__.split(".")[:2])) < (4, 53), reason="older jsonargparse words it otherwise"
)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data.crop_size", "abc"], "crop_size is abc, but must be one of int, tuple[int, int], null"),
        (["--data.class_names", "[yes, no]"], "class_names is [True, False], but must be one of Sequence[str], null; "),
        (["--data.class_names", "[yes, no]"], "Expected a <class 'str'>. Got value: True"),
        (["--trainer.precision", "17"], "'64-true'], Literal['64', '32', '16', 'bf16'], null"),
        (["--trainer.logger", "nowhere.Logger"], "trainer.logger: Problem with given class_path 'nowhere.Logger': No "),
        (["--model.lr_scheduler", "StepLR"], "step_size is missing: a class needs it, as in --KEY CLASS --KEY.step_si"),
    ],
)
def test_no_part_of_a_reason_is_cut_off(args, words, capsys):
    assert words in refused(capsys, "fit", *UNET, *FOLDER, *args)


@pytest.mark.parametrize(
    ("logger", "package", "command"),
    [
        ("TensorBoardLogger", "tensorboard", "pip install tensorboard"),
        ("MLFlowLogger", "mlflow", "pip install 'mlflow>=1.0.0'"),
        ("CometLogger", "comet-ml", "pip install 'comet-ml>="),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(logger, package, command, monkeypatch, tmp_path, capsys):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        save_dir = ["--trainer.logger.save_dir", "logs"] if logger == "TensorBoardLogger" else []
        cli.main(["fit", *UNET, *FOLDER, "--trainer.logger", logger, *save_dir])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1
    assert said.startswith(f"error: {logger} needs the package {package}, which is not installed: {command}")


def test_a_module_of_ours_that_is_missing_is_a_bug():
    assert sentence(ModuleNotFoundError("No module named 'segmentation.x'", name="segmentation.x")) is None
    said = sentence(ModuleNotFoundError("No module named 'psutil'", name="psutil"))
    assert said == "this needs the package psutil, which is not installed: pip install psutil"


@pytest.mark.parametrize("callback", ["ModelCheckpoint", "EarlyStopping"])
def test_a_callback_that_takes_the_worst_for_the_best_is_refused(callback, parse, monkeypatch, tmp_path, capsys):
    added = [*UNET, *FOLDER, f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor", "val/miou"]
    with pytest.raises(SystemExit):
        cli.main(["fit", *added])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: {callback} watches val/miou in the mode min, which takes its worst value for the best: set mode: max"
    )
    assert parse("fit", *added, "--trainer.callbacks.mode", "max").trainer.callbacks[-1].init_args.mode == "max"
