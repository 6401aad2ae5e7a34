"""The command ``lightning check_data``: would training succeed on this data set, and by which recipe?"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import yaml

import datamodules

from ..errors import UserError

if TYPE_CHECKING:
    from datamodules.check.findings import Examination


def check_data(
    trainer: L.Trainer,
    datamodule: datamodules.SegmentationDataModule,
    arguments: Mapping[str, Any] | None = None,
    worked_out: bool = False,
    output_dir: str = "check_data",
    fix: str | None = None,
    minutes: float = 15.0,
) -> None:
    """Read every file of a data set, report what training would meet, and write the recipe of a run.

    The exit status is 1 if training would fail.

    Args:
        trainer: not needed; LightningCLI calls commands as methods of a trainer.
        datamodule: the data set.
        arguments: its ``class_path`` and ``init_args`` as configured, for the recipe.
        worked_out: whether the command found class and arguments out by itself. The verdict and the exit status are
            then those of the data with the recipe.
        output_dir: folder outside the data for a folder named after the data set's, with a page of findings and
            ``recipe.yaml``, a complete config.
        fix: new folder outside the data for a corrected copy, of what can be mended without a guess: sizes of masks,
            EXIF turns, colours to labels, one palette. The exit status is 0 if it was written.
        minutes: how long `fit` may take with the recipe on this machine, after its start. Steps are timed for it.

    Raises:
        UserError: if a folder to write into lies inside the data, or `fix` is not empty.
        SystemExit: with status 1 if training would fail.
    """
    from datamodules.check import examine, page  # no other command needs them
    from datamodules.check import fix as corrected

    root = datamodule.root
    if root is not None and Path(output_dir).resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"output_dir {output_dir} lies inside the data in {root}, which check_data never changes: add "
            "--output_dir with a folder elsewhere"
        )
    if fix is not None:
        corrected.refuse_folder(Path(fix), root)
    found = examine(datamodule)
    folder = Path(output_dir) / (root.resolve().name if root else type(datamodule).__name__)
    if fix is not None:
        page.report(found, folder)
        print("", *corrected.fix(found, Path(fix)), sep="\n")
        return
    again = with_recipe(found, arguments or {}, minutes, folder / "recipe.yaml")
    if again is not None and worked_out:  # there is no config whose fate the verdict could tell
        found = again
    page.report(found, folder)
    if again is None:
        print("\nThere is no recipe: no training image could be read, or no class is known")
    elif again is not found:
        print(f"\nWith the arguments of data in {folder / 'recipe.yaml'}: {again.verdict}")
    if again is not None and not again.failed:
        print_commands(folder / "recipe.yaml", minutes)
    if found.failed:
        raise SystemExit(1)


def with_recipe(found: "Examination", arguments: Mapping[str, Any], minutes: float, file: Path) -> "Examination | None":
    """Write the recipe, and look at data that would fail once more with the arguments in the recipe.

    Args:
        found: the result of the data doctor.
        arguments: ``class_path`` and ``init_args`` of the data set.
        minutes: how long ``fit`` may take.
        file: the recipe.

    Returns:
        what the doctor says of the data with the recipe; None without a recipe.

    Raises:
        UserError: if `minutes` is not positive.
    """
    from datamodules.check import examine

    from .recipe import is_trainable, write_recipe

    if not is_trainable(found):
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(found, arguments, minutes, file)
    if not found.failed:
        return found
    init_args = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]["init_args"]
    return examine(type(found.given)(**{key: value for key, value in init_args.items() if key != "transforms"}))


def print_commands(file: Path, minutes: float) -> None:
    """Print the commands that train, test and predict with a recipe."""
    print(f"\nTo train for {minutes:g} minutes, to test, and to predict the test images or those of a folder:")
    for command in ("fit", "test --ckpt_path best", "predict --ckpt_path best"):
        verb, _, options = command.partition(" ")
        print(f"  lightning {verb} --config {file} {options}".rstrip())
    print(f"  lightning predict --config {file} --ckpt_path best --data.predict_dir FOLDER")
