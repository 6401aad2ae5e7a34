"""Commands of our own beside Lightning's: methods of a trainer, whose arguments are the command's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L

import datamodules
import segmentation

from ..checkpoints import load_trained
from ..errors import UserError
from .receptive_field.report import analyse_layers, analyse_network


class Trainer(L.Trainer):
    """Lightning's trainer and commands of our own, which train nothing and log nothing.

    Each is a method whose arguments are the command's, and an entry of `COMMANDS` and `NEEDS`.
    """

    def receptive_field(
        self,
        model: segmentation.SegmentationModule | None = None,
        ckpt_path: str | None = None,
        layers: list[str] | None = None,
        image: str | None = None,
        size: int | list[int] | None = None,
        stages: list[str] | None = None,
        output_dir: str = "receptive_field",
        weights_only: bool | None = None,
    ) -> None:
        """Says what one output pixel sees, in theory and in effect, as a table and a picture.

        Args:
            model: the network; none is needed with `layers`.
            ckpt_path: compare the network as initialised with the trained one of this checkpoint.
            layers: a plain chain instead of a network, such as [conv3, pool2s2, conv3d2]: kernel, stride s, dilation d,
                padding p.
            image: a picture to look at; without one, noise.
            size: side in pixels, or [height, width], to which the image is resized.
            stages: modules to show, such as [pool5.0, pool5, logits]; without, the main ones.
            output_dir: folder for the picture.
            weights_only: stands in the config.yaml of a run, and changes nothing: checkpoints are always read so.
        """
        if layers is not None:
            analyse_layers(layers, size, Path(output_dir))
        elif model is not None:
            device = self.strategy.root_device
            analyse_network(model, ckpt_path, image, size, stages or (), device, Path(output_dir))

    def check_data(
        self,
        model: None = None,
        datamodule: datamodules.SegmentationDataModule | None = None,
        output_dir: str = "check_data",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Looks at every file of a data set, and says what training would meet; exit status 1 where it would fail.

        Args:
            model: none is needed.
            datamodule: the data set.
            output_dir: folder for a folder named after the data set, with a page of findings and ``found.yaml``.
            ckpt_path: stands in the config.yaml of a run, and changes nothing.
            weights_only: likewise.
        """
        from datamodules.check import examine, page  # no other command needs them

        assert datamodule is not None  # `NEEDS` says so
        found = examine(datamodule)
        page.report(found, Path(output_dir) / type(datamodule).__name__)
        if found.failed:
            raise SystemExit(1)

    def tune_crf(
        self,
        model: segmentation.SegmentationModule | None = None,
        datamodule: datamodules.SegmentationDataModule | None = None,
        ckpt_path: str | None = None,
        num_images: int = 100,
        w1: Sequence[float] = (3, 4, 5, 6),
        sigma_alpha: Sequence[float] = (30, 40, 50, 60, 70, 80, 90, 100),
        sigma_beta: Sequence[float] = (3, 4, 5, 6),
        w2: float = 3.0,
        sigma_gamma: float = 1.0,
        iterations: int = 10,
        backend: Literal["torch", "pydensecrf"] = "torch",
        grid: bool = False,
        workers: int | None = None,
        output_dir: str = "tune_crf",
        weights_only: bool | None = None,
    ) -> None:
        """Searches the DenseCRF that suits a trained network best, on images of the validation split.

        Args:
            model: the network.
            datamodule: the data set.
            ckpt_path: its weights.
            num_images: of the split `val`, evenly spread.
            w1: values to try; these and the next two are DeepLab v2's.
            sigma_alpha: values to try, in pixels.
            sigma_beta: values to try, in steps of 255.
            w2: stays.
            sigma_gamma: stays.
            iterations: of mean field.
            backend: torch or pydensecrf.
            grid: try all combinations, not from coarse to fine.
            workers: processes; one per core if not given.
            output_dir: folder for all scores, search.csv.
            weights_only: stands in the config.yaml of a run, and changes nothing: checkpoints are always read so.
        """
        from .tune_crf import tune

        if model is None or ckpt_path is None:
            raise UserError("tune_crf needs a trained network: give --ckpt_path")
        fixed = {"w2": w2, "sigma_gamma": sigma_gamma, "iterations": iterations}
        axes, device = (w1, sigma_alpha, sigma_beta), self.strategy.root_device
        tune(model, datamodule, ckpt_path, num_images, axes, fixed, backend, grid, workers, device, Path(output_dir))

    def predict_tiff(
        self,
        model: segmentation.SegmentationModule | None = None,
        ckpt_path: str | None = None,
        image: str | None = None,
        output: str = "labels.tif",
        bands: list[int] | None = None,
        overwrite: bool = False,
        weights_only: bool | None = None,
    ) -> None:
        """Writes the labels of a TIFF of any size, from file to file.

        Args:
            model: the network; its `inference` says how windows are laid, which are of 512 pixels where it does not.
            ckpt_path: the checkpoint of the trained network.
            image: the TIFF to read.
            output: the TIFF to write.
            bands: which bands to read as stored, counted from 0, as data.bands; without, RGB of 8 bits.
            overwrite: replace the output of an earlier run.
            weights_only: stands in the config.yaml of a run, and changes nothing: checkpoints are always read so.
        """
        from .predict_tiff import predict_tiff  # no other command needs it

        assert model is not None  # `NEEDS` says so
        if image is None:
            raise UserError("no image given: name a TIFF with --image FILE")
        if ckpt_path is not None:
            load_trained(model, ckpt_path)
        predict_tiff(model.to(self.strategy.root_device), Path(image), Path(output), bands, overwrite)

    def export(
        self,
        model: segmentation.SegmentationModule | None = None,
        ckpt_path: str | None = None,
        format: str = "onnx",
        output: str | None = None,
        size: int | list[int] | None = None,
        dtype: Literal["uint8", "uint16", "float32"] = "uint8",
        weights_only: bool | None = None,
    ) -> None:
        """Writes a trained network to a file that runs without this package: stored pixels in, probabilities out.

        Args:
            model: the network; the checkpoint's own, if none is named.
            ckpt_path: its weights, class names and palette.
            format: onnx, or torch_export for a program of torch.export.
            output: the file; without, it lies beside the checkpoint.
            size: the only size that the graph takes, a side in pixels or [height, width]; without, it takes any.
            dtype: of the stored pixels.
            weights_only: stands in the config.yaml of a run, and changes nothing: checkpoints are always read so.
        """
        from .export import export_network

        if ckpt_path is None:
            raise UserError("export needs a trained network: give --ckpt_path")
        assert model is not None  # `NEEDS` says so
        export_network(model, ckpt_path, format, output, size, dtype)


COMMANDS = (  # our own
    Trainer.receptive_field, Trainer.check_data, Trainer.tune_crf, Trainer.predict_tiff, Trainer.export
)  # fmt: skip
NEEDS = {  # what a command cannot do without; what it does not name is left out of its config
    **dict.fromkeys(("fit", "validate", "test", "predict", "tune_crf"), ("model", "data")),
    "receptive_field": ("model",),
    "check_data": ("data",),
    "predict_tiff": ("model",),
    "export": ("model",),
}
