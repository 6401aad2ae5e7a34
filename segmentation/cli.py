"""The command ``lightning {fit,validate,test,predict,...} --config FILE``: a LightningCLI with plain errors."""

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import datamodules
import datamodules.errors
import segmentation
from datamodules import layout
from segmentation import callbacks, outputs, runs

from .commands.check_data import check_data
from .errors import UserError
from .messages import sentence
from .parser import KEPT, OWN, Parser, Trainer, unused, version, with_checkpoint_model


class Failed(BaseException):
    """An exception that a constructor has raised, as the cause of this one, which passes the parser unchanged.

    Args:
        cls: the constructor's class.
    """

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.cls = cls


def built(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Return an object of a class."""
    try:
        return cls(*args, **kwargs)
    except Exception as error:
        raise Failed(cls) from error


class CLI(LightningCLI):
    """Architectures as ``--model``, data sets as ``--data``, and checkpoints that know their model."""

    def __init__(self, args: list[str] | None = None) -> None:
        parsers = {name: {"command": name, "default_config_files": [runs.DEFAULTS]} for name in self.subcommands()}
        super().__init__(
            segmentation.SegmentationModule,
            datamodules.SegmentationDataModule,
            save_config_callback=runs.SaveConfig,
            trainer_class=Trainer,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "lightning", "version": version(), **parsers},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's commands and ours, with the parameters that do not come from the command line."""
        return LightningCLI.subcommands() | {name: {"model", "datamodule", "arguments", "worked_out"} for name in OWN}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--trainer``, ``--model`` and ``--data``; a command that lacks what it needs gets an error of ours."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(segmentation.SegmentationModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(datamodules.SegmentationDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--writer`` of `predict`, and, hidden, the keys of a run's config.yaml that the command ignores."""
        parser.add_lightning_class_args(callbacks.PredictionWriter, "writer")
        for key in ("ckpt_path", "weights_only", "verbose"):
            if unused(parser.command, key):  # type: ignore[attr-defined]
                parser.add_argument(f"--{key}", type=Any, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the model of the checkpoint if the command names none, and leave out what it does not use."""
        args = list(sys.argv[1:] if args is None else args)
        for key in re.findall(r"^--([\w.]+)", "\n".join(args[1:]), re.MULTILINE):
            if unused(args[0], key):
                parser.error(f"{args[0]} does not use --{key}: leave it out")
        complete = with_layout(args)
        self.worked_out = complete is not args
        self.config = parser.parse_args(with_checkpoint_model(complete))
        command, config = self.config.subcommand, self.config[self.config.subcommand]
        for key in KEPT:
            if unused(command, key) or (key == "model" and config.get("layers")):
                config.pop(key, None)
            elif key in ("model", "data") and config[key] is None:
                part = {"model": "an architecture", "data": "a data set"}[key]
                parser.error(f"no {key} given: name a config with --config FILE, or {part} with --{key} CLASS")

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: Lightning would build the classes that its ``hyper_parameters`` name."""

    def before_instantiate_classes(self) -> None:
        """Settle what depends on earlier runs and on the W&B key, before anything is built."""
        config = self.config[self.subcommand]
        runs.settle(config)
        runs.check_modes(config)
        runs.find_checkpoint(config, str(self.subcommand))
        if self.subcommand in ("validate", "test", "predict", "predict_tiff"):
            runs.say_random(config)
        if self.subcommand in ("validate", "test") and any(
            "Report" in callback.class_path for callback in config.trainer.callbacks or []
        ):
            config.verbose = False  # one table is enough
        if self.subcommand in OWN:
            accelerator = config.trainer.accelerator if config.get("model") is not None else "cpu"
            quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
            config.trainer = Namespace(accelerator=accelerator, devices=1, callbacks=None, **quiet)
        elif self.subcommand == "predict":
            config.trainer.logger, config.trainer.enable_checkpointing, config.return_predictions = False, False, False
            outputs.writable(Path(config.writer.output_dir).expanduser())
        else:
            runs.log_offline_without_key(config)
        runs.drop_callbacks(config)

    def instantiate_classes(self) -> None:
        """Build all classes, and let no parser change an exception of a constructor."""
        self.parser.add_instantiator(built, object, subclasses=True)
        super().instantiate_classes()

    @rank_zero_only
    def before_fit(self) -> None:
        """Take the CSV rows of a resumed run along."""
        runs.take_rows(self.trainer.loggers, self.config.fit.ckpt_path)

    def check_data(self, model: None, **options: Any) -> None:
        """Run `check_data` without the model that a LightningCLI hands to every command, and with data's arguments."""
        arguments = self.config.check_data.data.as_dict()
        check_data(self.trainer, **options, arguments=arguments, worked_out=self.worked_out)


def with_layout(args: list[str]) -> list[str]:
    """Add the class of data and its arguments to ``check_data --data.root FOLDER``, as the folder shows them."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--data", "--config", "--data.root"):
        look.add_argument(name, *(["-c"] if name == "--config" else []))
    known = vars(look.parse_known_args(args)[0])
    if args[:1] != ["check_data"] or known["data"] or known["config"] or not known["data.root"]:
        return args
    found = layout.work_out(Path(known["data.root"]).expanduser())
    print(*found.said, sep="\n")
    data = json.dumps({"class_path": found.class_path, "init_args": found.init_args})
    return [args[0], "--data", data, *args[1:]]


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: as after ``lightning`` in a shell; None takes the process's own.

    Raises:
        SystemExit: with status 2 for a command that cannot be parsed, 1 for a run that cannot go on.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "💡 Tip" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    error: BaseException
    cls = None
    try:
        CLI(None if args is None else list(args))
        return
    except Failed as failed:
        error, cls = failed.__cause__ or failed, failed.cls
    except Exception as other:
        error = other
    message = sentence(error, (UserError, datamodules.errors.UserError), cls)
    if message is None:
        raise error
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(1)
