"""The command ``lightning {fit,validate,test,predict,...} --config FILE``: a LightningCLI with plain errors."""

import argparse
import csv
import json
import logging
import netrc
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import datamodules
import datamodules.errors
import segmentation
import segmentation.errors
from segmentation import callbacks, checkpoints, inference
from segmentation.commands import COMMANDS, NEEDS, Trainer
from segmentation.messages import plain

from .errors import UserError

RUN = str(Path(__file__).with_name("run.yaml"))  # how Lightning's verbs log, save and draw


class Parser(LightningArgumentParser):
    """Ends a wrong command in one sentence with the nearest valid name, and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        classes = [getattr(m, name) for m in (segmentation, datamodules, callbacks, inference) for name in m.__all__]
        sys.stderr.write(f"error: {plain(message, classes, COMMANDS)}\n")
        raise SystemExit(2)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, and nowhere when there is none."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.logger, CSVLogger):  # the first logger, whose folder is the run's
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """Architectures as ``--model``, data sets as ``--data``, and checkpoints that know what they are."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            segmentation.SegmentationModule,
            datamodules.SegmentationDataModule,
            save_config_callback=SaveConfig,
            trainer_class=Trainer,
            seed_everything_default=0,
            parser_kwargs={verb: {"default_config_files": [RUN]} for verb in LightningCLI.subcommands()},
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands and ours, with the arguments that do not come from the command line."""
        return LightningCLI.subcommands() | {command.__name__: {"model", "datamodule"} for command in COMMANDS}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--trainer``, ``--model`` and ``--data``; which of them a command needs, `NEEDS` says."""
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(segmentation.SegmentationModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(datamodules.SegmentationDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--writer.output_dir`` and ``--writer.overwrite`` for `predict`; after all callbacks of the config."""
        parser.add_lightning_class_args(callbacks.PredictionWriter, "writer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the model taken from the checkpoint where the command names none."""
        self.config = parser.parse_args(with_checkpoint_model(list(sys.argv[1:] if args is None else args)))
        config = self.config[self.config.subcommand]
        needs = () if config.get("layers") else NEEDS[self.config.subcommand]
        for part, example in (
            ("model", "an architecture with --model CLASS"),
            ("data", "a data set with --data CLASS"),
        ):
            if part not in needs:
                config[part] = None
            elif config[part] is None:
                parser.error(f"no {part} given: name a config with --config FILE, or {example}")

    def before_instantiate_classes(self) -> None:
        """Settle what depends on earlier runs and on the W&B key, before anything is built."""
        config = self.config[self.subcommand]
        if self.subcommand == "check_data":
            config.ckpt_path, config.trainer.accelerator = None, "cpu"  # of a run's config.yaml, and of no use here
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        loggers = [logger for logger in loggers if hasattr(logger, "class_path")]
        for logger in loggers:
            for key in ("name", "group"):  # of CSVLogger, of WandbLogger
                if logger.class_path.endswith("CSVLogger" if key == "name" else "WandbLogger"):
                    logger.init_args[key] = logger.init_args[key] or run_name(config)
        config.trainer.callbacks = latest(config.trainer.callbacks)
        folder = None
        for logger in loggers:
            if logger.class_path.endswith("CSVLogger"):
                folder = Path(logger.init_args.save_dir) / str(logger.init_args.name)
                version = logger.init_args.version
                name = version if isinstance(version, str) else f"version_{version}"
                if version is not None and (folder / name).exists():
                    rank_zero_info(f"{folder / name} holds an earlier run: this one gets a new version folder")
                    logger.init_args.version = None
        if config.ckpt_path in ("last", "best"):
            config.ckpt_path = checkpoints.newest(folder, config.ckpt_path)
        if config.ckpt_path and "://" not in config.ckpt_path and not Path(config.ckpt_path).is_file():
            raise UserError(f"the checkpoint {config.ckpt_path} does not exist")
        if config.ckpt_path and config.model is not None and "weights" in config.model.init_args:
            take_from_checkpoint(config.model.init_args, config.ckpt_path)
        if self.subcommand in ("validate", "test") and any(
            "Report" in c.class_path for c in config.trainer.callbacks or []
        ):
            config.verbose = False  # one table is enough
        if self.subcommand in {command.__name__ for command in COMMANDS}:
            quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
            config.trainer = Namespace(accelerator=config.trainer.accelerator, devices=1, callbacks=None, **quiet)
        elif self.subcommand == "predict":
            config.trainer.logger, config.return_predictions = False, False
        elif any(logger.class_path.endswith("WandbLogger") for logger in loggers) and not has_wandb_key():
            os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
            rank_zero_info("no W&B key: logged offline; `wandb login`, then `wandb sync logs/wandb/offline-*` uploads")

    @rank_zero_only
    def before_fit(self) -> None:
        """Take the CSV rows of a resumed run along."""
        checkpoint = self.config[self.subcommand].ckpt_path
        history = Path(checkpoint).parent.parent / "metrics.csv" if checkpoint else None
        if checkpoint is None or history is None or not history.is_file():
            return
        steps = checkpoints.read(checkpoint)["global_step"]
        with history.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < steps]
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.experiment.metrics.extend({key: value for key, value in row.items() if value} for row in rows)
        rank_zero_info(f"going on from {checkpoint}, step {steps}")


def with_checkpoint_model(args: list[str]) -> list[str]:
    """Add the model of ``--ckpt_path`` to a command that names neither model nor config, and a folder to `predict`."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--model", "--config", "--data", "--ckpt_path"):
        look.add_argument(name, *(["-c"] if name == "--config" else []))
    known, _ = look.parse_known_args(args)
    path = known.ckpt_path
    if not args or args[0] not in NEEDS or args[0] == "fit" or known.model or known.config or not path:
        return args
    if path in ("last", "best"):
        return args  # known once the config is
    model = json.dumps(checkpoints.model_of(path))
    data = ["--data", "Folder"] if args[0] == "predict" and not known.data else []
    return [args[0], "--model", model, *data, *args[1:]]


def run_name(config: Namespace) -> str:
    """Return the stem of the last config file given; without one, ``<model>_<data>`` in lower case."""
    files = [Path(file.relative) for file in config.config or [] if file is not None]
    parts = (config.model.class_path, config.data.class_path)
    return files[-1].stem if files else "_".join(part.rpartition(".")[2].lower() for part in parts)


def latest(callbacks: list[Namespace] | None) -> list[Namespace] | None:
    """Return callbacks with each class of this package once: one that a config adds replaces that of run.yaml."""
    ours = [c.class_path for c in callbacks or [] if c.class_path.startswith("segmentation.")]
    return callbacks and [
        c
        for i, c in enumerate(callbacks)
        if c.class_path not in [later.class_path for later in callbacks[i + 1 :]] or c.class_path not in ours
    ]


def take_from_checkpoint(init_args: Any, path: str) -> None:
    """Leave weights to the checkpoint, with what they made of arguments that were None: null is what they need."""
    init_args.weights = None
    if "://" in path:
        return
    saved = checkpoints.read(path).get("segmentation")
    for key, value in (saved["init_args"] if saved else {}).items():
        if init_args.get(key, 0) is None:
            init_args[key] = value


def has_wandb_key() -> bool:
    """Whether W&B is set up or told what to do: by its environment variables or by ``wandb login``."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for name in (os.environ.get("NETRC", "~/.netrc"), "~/_netrc"):
        try:
            if netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def sentence(error: BaseException | None) -> str | None:
    """Return the message of an error that the user can mend; None for any other, which keeps its traceback.

    Args:
        error: a `UserError` of either package, or one that was raised from it, as the parser does with what a class's
            constructor raises.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, (segmentation.errors.UserError, datamodules.errors.UserError)):
            return text.rpartition("UserError: ")[2].strip()  # a loader's worker puts its traceback before the message
        if "of the Union subtypes" in text:  # an older parser does no more than quote it
            quoted = re.findall(r"^ *- (?!Expected an? )(.+)$", text, re.MULTILINE)
            return quoted[-1] if quoted else None
        error = error.__cause__
    return None


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
    try:
        CLI(None if args is None else list(args))
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(1) from None
