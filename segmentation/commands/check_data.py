"""The command ``lightning check_data``: would training succeed on this data set?"""

from pathlib import Path

import lightning as L

import datamodules


def check_data(
    trainer: L.Trainer, datamodule: datamodules.SegmentationDataModule, output_dir: str = "check_data"
) -> None:
    """Read every file of a data set, and report what training would meet; exit status 1 if training would fail.

    Args:
        trainer: not needed; LightningCLI calls commands as methods of a trainer.
        datamodule: the data set.
        output_dir: folder for a folder named after the data set, with a page of findings and ``found.yaml``.

    Raises:
        SystemExit: with status 1 if training would fail.
    """
    from datamodules.check import examine, page  # no other command needs them

    found = examine(datamodule)
    page.report(found, Path(output_dir) / type(datamodule).__name__)
    if found.failed:
        raise SystemExit(1)
