"""The command ``lightning check_data``: would training succeed on this data set?"""

from pathlib import Path

import lightning as L

import datamodules

from ..errors import UserError


def check_data(
    trainer: L.Trainer,
    datamodule: datamodules.SegmentationDataModule,
    output_dir: str = "check_data",
    fix: str | None = None,
) -> None:
    """Read every file of a data set, and report what training would meet; exit status 1 if training would fail.

    Args:
        trainer: not needed; LightningCLI calls commands as methods of a trainer.
        datamodule: the data set.
        output_dir: folder outside the data for a folder named after the data set's, with a page of findings and
            ``found.yaml``.
        fix: new folder outside the data for a corrected copy, of what can be mended without a guess: sizes of masks,
            EXIF turns, colours to labels, one palette. The exit status is 0 if it was written.

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
    page.report(found, Path(output_dir) / (root.resolve().name if root else type(datamodule).__name__))
    if fix is not None:
        print("", *corrected.fix(found, Path(fix)), sep="\n")
    elif found.failed:
        raise SystemExit(1)
