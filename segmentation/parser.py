"""The parser of ``lightning``: our commands beside Lightning's, and which arguments each of them uses."""

import argparse
import importlib.metadata
import inspect
import json
import numbers
import re
import sys
from typing import Any, NoReturn

import jsonargparse
import jsonargparse.typing
import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from . import checkpoints
from .commands.check_data import check_data
from .commands.export import export
from .commands.predict_tiff import predict_tiff
from .commands.receptive_field import receptive_field
from .commands.tune_crf import tune_crf
from .messages import plain

COMMANDS = (check_data, export, predict_tiff, receptive_field, tune_crf)
OWN = {command.__name__: set(inspect.signature(command).parameters) for command in COMMANDS}
KEPT = ("model", "data", "writer", "ckpt_path", "weights_only", "verbose")  # a run's config.yaml holds them and trainer
HELP = {
    "seed_everything": "seed of all random numbers",
    "trainer.accelerator": "cpu, gpu or another device",
    "model": "the network, as UNet, and its arguments",
    "data": "the data set, as Folder, and its arguments",
}
if "add_print_completion_argument" in inspect.signature(jsonargparse.set_parsing_settings).parameters:  # 4.53
    metaclass = lambda cls: isinstance(cls, type) and issubclass(cls, type)  # noqa: E731  # 4.53.0 lists their subclasses
    jsonargparse.set_parsing_settings(add_print_completion_argument=True, subclasses_disabled=[metaclass])


def number(value: Any) -> int | float:
    """Return a number of a config; jsonargparse knows no ``numbers.Number``, the type of some of torchvision's."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value} is no number")
    return value


jsonargparse.typing.register_type(numbers.Number, serializer=number, deserializer=number)


class Trainer(L.Trainer):
    """Lightning's trainer, with the commands of this package as further methods."""

    check_data = check_data
    export = export
    predict_tiff = predict_tiff
    receptive_field = receptive_field
    tune_crf = tune_crf


def unused(command: str, key: str) -> bool:
    """Return whether a command ignores a key of a run's config.yaml, as `export` ignores ``trainer.max_epochs``."""
    part = key.partition(".")[0]
    if command not in OWN:
        return key == "verbose" and command not in ("validate", "test")
    if part == "trainer":
        return key != "trainer.accelerator"
    return part in KEPT and {"data": "datamodule"}.get(part, part) not in OWN[command]


class Parser(LightningArgumentParser):
    """The parser of one command. An error is one sentence with the nearest valid name, and exit status 2.

    Args:
        command: the command's name; "" for the parser of ``lightning`` itself or of a class.
    """

    def __init__(self, *args: Any, command: str = "", **kwargs: Any) -> None:
        usage = f"lightning {command} [options]" if command else None
        super().__init__(*args, usage=usage, allow_abbrev=False, **kwargs)
        self.command = command

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        named = re.match("Subcommand '([a-z_]+)' does not accept", message)
        commands = [action.choices for action in self._actions if named and isinstance(action.choices, dict)]
        parser = commands[0][named[1]] if named and commands else self
        keys = [action.dest for action in parser._actions if not unused(self.command, action.dest)]
        sys.stderr.write(f"error: {plain(message, keys, COMMANDS)}\n")
        raise SystemExit(2)

    def format_help(self, *args: Any) -> str:
        """Return the help. For our commands, show their own options first, and hide the arguments that they ignore."""
        if self.command in OWN:
            own = OWN[self.command] - {"trainer", "model"}
            for action in self._actions:
                unneeded = unused(self.command, action.dest)
                action.help = argparse.SUPPRESS if unneeded else HELP.get(action.dest, action.help)
            groups = [group for group in self._action_groups if group.title != "default config file locations"]
            self._action_groups = sorted(groups, key=lambda group: not {a.dest for a in group._group_actions} & own)
            self.description = None  # else it stands twice
        return super().format_help(*args)


def version() -> str:
    """Return what ``lightning --version`` prints."""
    try:
        return f"{importlib.metadata.version('lightning-segmentation')} (lightning-segmentation)"
    except importlib.metadata.PackageNotFoundError:
        return "(lightning-segmentation, not installed)"


def with_checkpoint_model(args: list[str]) -> list[str]:
    """Add the model of ``--ckpt_path`` to a command that names neither model nor config, and a folder to `predict`."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--model", "--config", "--data", "--ckpt_path"):
        look.add_argument(name, *(["-c"] if name == "--config" else []))
    known, _ = look.parse_known_args(args)
    path = known.ckpt_path
    commands = {*LightningCLI.subcommands(), *OWN} - {"fit", "check_data"}
    if not {*args[:1]} & commands or known.model or known.config or path in (None, "last", "best"):
        return args
    model = json.dumps(checkpoints.model_of(path))
    data = ["--data", "Folder"] if args[0] == "predict" and not known.data else []
    return [args[0], "--model", model, *data, *args[1:]]
