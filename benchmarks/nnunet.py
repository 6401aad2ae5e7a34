"""Train nnU-Net v2 (Isensee et al., Nature Methods 2021) for some minutes on the splits of a config, as a comparison.

    pip install nnunetv2
    python benchmarks/nnunet.py check_data/data/recipe.yaml --minutes 15

The script copies the splits ``train``, ``val`` and `test_split` of the config's data set into nnU-Net's form. nnU-Net
plans and preprocesses by its own rules (configuration ``2d``). Its schedule needs the number of steps in advance, so
the script measures the time of a step first, and then trains for as many steps as the minutes hold; planning, copying
and the test are not counted. The script prints mIoU and accuracy from one confusion matrix over `test_split`, ignored
pixels left out, beside those of the constant prediction of the most common class.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, auto_cli
from PIL import Image

import datamodules

IGNORE, EPOCHS, STEPS_TO_MEASURE = 255, 20, 4
RAW, PREPROCESSED, RESULTS, WORKERS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA"
NAME = "Dataset001_data"


def data_of(config: Path) -> datamodules.SegmentationDataModule:
    """Build the data set of a config and open its splits."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(datamodules.SegmentationDataModule, "data")
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    data = parser.instantiate_classes(parser.parse_object({"data": content["data"]})).data
    data.setup("fit")
    data.setup("test")
    return data


def write(data: datamodules.SegmentationDataModule, root: Path) -> dict[str, list[str]]:
    """Write the splits as nnU-Net reads them: 8-bit PNG, the ignored label last. Return the names in each split."""
    names: dict[str, list[str]] = {}
    for role, where in (("train", "Tr"), ("val", "Tr"), ("test", "Ts")):
        names[role] = []
        for part in ("images", "labels"):
            (root / f"{part}{where}").mkdir(parents=True, exist_ok=True)
        for index in range(len(data.datasets[role])):
            image, mask = data.datasets[role].read(index)
            assert mask is not None and image.dtype == torch.uint8 and len(image) == 3, "8-bit RGB only"
            labels = mask.numpy().copy()
            labels[labels == IGNORE] = data.num_classes
            names[role].append(f"{role}{index:04d}")
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"images{where}/{names[role][-1]}_0000.png")
            Image.fromarray(labels).save(root / f"labels{where}/{names[role][-1]}.png")
    labels = {"background": 0, **{f"class{k}": k for k in range(1, data.num_classes)}, "ignore": data.num_classes}
    described = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": labels,
        "numTraining": len(names["train"]) + len(names["val"]),
        "file_ending": ".png",
    }
    (root / "dataset.json").write_text(json.dumps(described))
    return names


def train(names: dict[str, list[str]], minutes: float) -> Any:
    """Plan, preprocess, measure a step and train; return the trainer and the number of steps."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    extract_fingerprints([1], num_processes=2, check_dataset_integrity=True)
    plan_experiments([1])
    preprocess([1], configurations=("2d",), num_processes=(2,))
    folder = Path(os.environ[PREPROCESSED]) / NAME
    (folder / "splits_final.json").write_text(json.dumps([{"train": names["train"], "val": names["val"]}]))

    def trainer(steps_per_epoch: int, epochs: int) -> nnUNetTrainer:
        plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        described = json.loads((folder / "dataset.json").read_text())
        trainer = nnUNetTrainer(plans, "2d", 0, described, torch.device("cpu"))
        trainer.num_iterations_per_epoch, trainer.num_epochs, trainer.num_val_iterations_per_epoch = (
            steps_per_epoch, epochs, 1
        )  # fmt: skip
        return trainer

    look = trainer(STEPS_TO_MEASURE, 1)
    look.on_train_start()
    times = []
    for _ in range(STEPS_TO_MEASURE):
        start = time.perf_counter()
        look.train_step(next(look.dataloader_train))
        times.append(time.perf_counter() - start)
    seconds = float(np.mean(times[1:]))
    steps = max(EPOCHS, int(60 * minutes / seconds))
    trained = trainer(steps // EPOCHS, EPOCHS)
    start = time.perf_counter()
    trained.run_training()
    print(f"{steps // EPOCHS * EPOCHS} steps in {time.perf_counter() - start:.0f} s, {seconds:.2f} s each at first")
    return trained


def test(trained: Any, root: Path, names: list[str], classes: int) -> np.ndarray:
    """Predict the test images and return their confusion matrix, ``(K, K)``: rows are the truth."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trained.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.manual_initialization(
        trained.network, trained.plans_manager, trained.configuration_manager, [trained.network.state_dict()],
        trained.dataset_json, "nnUNetTrainer", trained.inference_allowed_mirroring_axes,
    )  # fmt: skip
    reader = trained.plans_manager.image_reader_writer_class()
    matrix = np.zeros((classes, classes), np.int64)
    for name in names:
        image, properties = reader.read_images([str(root / f"imagesTs/{name}_0000.png")])
        predicted = np.asarray(predictor.predict_single_npy_array(image, properties)).squeeze()
        truth = np.asarray(Image.open(root / f"labelsTs/{name}.png"))
        valid = truth < classes
        pairs = truth[valid].astype(np.int64) * classes + predicted[valid]
        matrix += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    return matrix


def scores(matrix: np.ndarray) -> str:
    """Return mIoU over the classes that occur, and accuracy, of a confusion matrix."""
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = matrix.diagonal()[union > 0] / union[union > 0]
    return f"mIoU {iou.mean():.3f}, accuracy {matrix.trace() / matrix.sum():.3f}"


def main(recipe: Path, minutes: float = 15.0, threads: int = 2) -> None:
    """Compare on the splits of a config.

    Args:
        recipe: a config of this project; its part ``data`` is used.
        minutes: time of the training steps.
        threads: torch's threads.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {name: str(Path(folder) / name) for name in (RAW, PREPROCESSED, RESULTS)} | {WORKERS: "1"}
        root = Path(os.environ[RAW]) / NAME
        data = data_of(recipe)
        names = write(data, root)
        trained = train(names, minutes)
        matrix = test(trained, root, names["test"], data.num_classes)
    constant = np.zeros_like(matrix)
    constant[:, matrix.sum(1).argmax()] = matrix.sum(1)
    print(f"nnU-Net v2 2d: {scores(matrix)}; the most common class alone: {scores(constant)}")


if __name__ == "__main__":
    auto_cli(main)
