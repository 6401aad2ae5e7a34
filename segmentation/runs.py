"""How a run is named and logged: what the command settles before it builds anything, and rows of a continued run."""

import csv
import importlib
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_info

from . import checkpoints, weights
from .errors import UserError
from .optimizer import better

DEFAULTS = str(Path(__file__).with_name("run.yaml"))  # how every run is logged, saved and drawn


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of a run, and nowhere without one."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.logger, CSVLogger):  # the first logger, whose folder is the run's
            super().setup(trainer, pl_module, stage)


def settle(config: Namespace) -> None:
    """Complete the config of a command: the names of its loggers, and a folder that no earlier run has.

    Args:
        config: the parsed arguments of one command; its trainer is changed.
    """
    trainer = config.trainer
    if trainer.barebones:
        trainer.logger, trainer.enable_checkpointing = False, False
    for kind, key in (("CSVLogger", "name"), ("WandbLogger", "group")):
        for logger in loggers(config, kind):
            if logger.init_args.get(key) is None:
                logger.init_args[key] = run_name(config)
    for logger in loggers(config, "CSVLogger"):
        version, parent = logger.init_args.version, Path(logger.init_args.save_dir) / str(logger.init_args.name)
        earlier = parent / (version if isinstance(version, str) else f"version_{version}")
        if version is not None and earlier.exists():
            rank_zero_info(f"{earlier} holds an earlier run: this one gets a new version folder")
            logger.init_args.version = None


def check_modes(config: Namespace) -> None:
    """Check that no callback takes a metric's worst value for its best, as ModelCheckpoint's default mode does.

    Raises:
        UserError: if a callback watches a loss in the mode max, or another metric of a split in the mode min.
    """
    for callback in config.trainer.callbacks or []:
        given = callback.init_args if hasattr(callback, "init_args") else Namespace()
        metric, mode = given.get("monitor"), given.get("mode")
        known = isinstance(metric, str) and metric.startswith(("train/", "val/", "test/"))
        if known and mode in ("min", "max") and mode != better(metric):
            raise UserError(
                f"{callback.class_path.rpartition('.')[2]} watches {metric} in the mode {mode}, which takes its worst "
                f"value for the best: set mode: {better(metric)}"
            )


def drop_callbacks(config: Namespace) -> None:
    """Leave out callbacks that a later one of this package replaces, or that a switch of the trainer turns off."""
    listed = config.trainer.callbacks
    if isinstance(listed, list):
        config.trainer.callbacks = [c for i, c in enumerate(listed) if not dropped(c, listed[i + 1 :], config.trainer)]


def dropped(callback: Namespace, later: Sequence[Namespace], trainer: Namespace) -> bool:
    """Return whether a later callback replaces one of this package, or a switch of the trainer turns it off."""
    name = callback.class_path.rpartition(".")[2]
    off = {"LearningRateMonitor": trainer.logger, "ModelCheckpoint": trainer.enable_checkpointing}.get(name) is False
    ours = callback.class_path.startswith("segmentation.")
    return off or (ours and callback.class_path in [other.class_path for other in later])


def loggers(config: Namespace, kind: str) -> list[Namespace]:
    """Return the loggers of a class, as ``CSVLogger``, in a config."""
    listed = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    return [logger for logger in listed if hasattr(logger, "class_path") and logger.class_path.endswith(kind)]


def run_name(config: Namespace) -> str:
    """Return the stems of all ``--config``, as ``unet_found``; without one, model and data, as ``unet_folder``."""
    files = [Path(file.relative).stem for file in config.config or [] if file is not None]
    classes = [config[key].class_path.rpartition(".")[2] for key in ("model", "data") if config.get(key) is not None]
    return "_".join(files) or "_".join(classes).lower()


def folder(config: Namespace) -> Path | None:
    """Return the folder that holds the versions of a run; None without a CSVLogger."""
    found = [logger.init_args for logger in loggers(config, "CSVLogger")]
    return Path(found[-1].save_dir) / str(found[-1].name) if found else None


def find_checkpoint(config: Namespace, command: str) -> None:
    """Replace ``last`` or ``best`` by the path of a checkpoint, and take what model and data leave open from it.

    Args:
        config: the parsed arguments of the command, which are changed.
        command: its name.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, or `weights_only` would let it run commands.
    """
    if config.get("weights_only") is False:
        raise UserError("weights_only: false lets a checkpoint run commands on this machine: leave weights_only out")
    if not config.get("ckpt_path"):
        return
    if config.ckpt_path in ("last", "best"):
        config.ckpt_path = checkpoints.newest(folder(config), config.ckpt_path)
    if command in ("fit", "validate", "test", "predict"):  # Lightning reads the file again
        checkpoints.check_state(config.ckpt_path, command)
        config.weights_only = True
    if config.get("model") is not None and "weights" in config.model.init_args:
        take_from_checkpoint(config.model, config.ckpt_path)
    if config.get("data") is not None:
        take_bands(config.data.init_args, config.ckpt_path)


def say_random(config: Namespace) -> None:
    """Say that a command which needs a trained network has got neither a checkpoint nor weights."""
    weights = None if config.get("model") is None else config.model.init_args.get("weights")
    if not config.get("ckpt_path") and weights in (None, "imagenet"):
        random = "its weights are random" if weights is None else "all its weights but the backbone's are random"
        rank_zero_info(
            f"the network is not trained: {random}; give a checkpoint by --ckpt_path FILE, or --ckpt_path best for the "
            "best of this config's runs"
        )


def take_bands(init_args: Namespace, path: str) -> None:
    """Read images as training did: give ``bands`` and ``value_range`` of None the values in a checkpoint."""
    saved = checkpoints.read(path).get("segmentation") or {}
    for key in ("bands", "value_range"):
        if saved.get(key) is not None and key in init_args and init_args[key] is None:
            init_args[key] = saved[key]
            rank_zero_info(f"data.{key} is {saved[key]}, as in the checkpoint")


def take_from_checkpoint(model: Namespace, path: str) -> None:
    """Leave the weights to the checkpoint, and give plain arguments of None the values that it stores."""
    module, _, name = model.class_path.rpartition(".")
    plain = checkpoints.plain_arguments(getattr(importlib.import_module(module), name))  # a class that the user named
    saved = checkpoints.read(path).get("segmentation") or {}
    defaults = {key: value for key, value in saved.get("init_args", {}).items() if key in plain}
    model.init_args.weights = None
    for key, value in weights.settle(vars(model.init_args), weights.Weights(path, defaults=defaults)).items():
        if key in model.init_args:
            model.init_args[key] = value


def log_offline_without_key(config: Namespace) -> None:
    """Let W&B log offline if it has no key, since it would ask for one; print how to upload the run."""
    if loggers(config, "WandbLogger") and not has_wandb_key():
        os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
        rank_zero_info("no W&B key: logged offline; `wandb login`, then `wandb sync logs/wandb/offline-*` uploads")


def has_wandb_key() -> bool:
    """Return whether W&B is set up by its environment variables or by ``wandb login``."""
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


def take_rows(loggers: Sequence[Logger], checkpoint: str | None) -> None:
    """Copy the CSV rows of a run up to its checkpoint into the run that continues it.

    Args:
        loggers: the loggers of the new run.
        checkpoint: the file from which the new run goes on; None starts from scratch.
    """
    history = Path(checkpoint).parent.parent / "metrics.csv" if checkpoint else None
    if checkpoint is None or history is None or not history.is_file():
        return
    steps = checkpoints.read(checkpoint)["global_step"]
    with history.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) < steps]
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger.experiment.metrics.extend({key: value for key, value in row.items() if value} for row in rows)
    rank_zero_info(f"going on from {checkpoint}, step {steps}")
