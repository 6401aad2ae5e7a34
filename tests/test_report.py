"""What `validate` and `test` write: tables, results.json, pictures, and the metrics of further callbacks."""

import importlib
import inspect
import json
import textwrap

import lightning as L
import pytest
import torch
from conftest import CLASSES, succeed
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryJaccardIndex, MulticlassConfusionMatrix, MulticlassJaccardIndex
from torchmetrics.functional.classification import multiclass_cohen_kappa

from segmentation import UNet
from segmentation.callbacks import (
    BoundaryScores,
    DenseCRF,
    EMScores,
    EvaluationCallback,
    EvaluationMetric,
    PredictionLogger,
    Report,
)
from segmentation.callbacks.report_pictures import draw_confusion, draw_iou
from segmentation.callbacks.report_tables import NUMBERS, class_table, further_table, kind, number
from segmentation.metrics import BoundaryIoU, TrimapIoU, confusion_metrics
from segmentation.metrics.membranes import EMErrors

NAMES = ["a", "b", "c"]


def batches(count: int = 3, void: bool = True) -> DataLoader:
    """Return batches of one image each; its brightness shows the label, and class ``c`` does not occur."""
    torch.manual_seed(0)
    mask = torch.nn.functional.interpolate(torch.randn(count, 1, 4, 5), (32, 40), mode="bilinear")[:, 0] > 0
    image = (mask[:, None] + 0.3 * torch.randn(count, 3, 32, 40)).clamp(0, 1)
    mask = mask.long()
    if void:
        mask[:, :3] = 255
    names = [str(i) for i in range(count)]
    samples = [{"image": i, "mask": m, "name": n} for i, m, n in zip(image, mask, names, strict=True)]
    return DataLoader(samples, batch_size=1)


class Brightness(UNet):
    """A network that separates light pixels from dark ones, and never predicts class ``c``."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        light = image[:, :1]
        return light if self.num_classes == 1 else torch.cat([-light, light, light - 9], dim=1)[:, : self.num_classes]


def network(classes: int) -> UNet:
    return Brightness(classes, base_channels=4)


def trainer(folder, *callbacks, **kwargs) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(folder, name="run", version="0")
    return L.Trainer(accelerator="cpu", logger=logger, callbacks=[*callbacks], **quiet, **kwargs)


def test_results_json_holds_what_torchmetrics_says_of_the_same_predictions(tmp_path, capsys):
    model, loader = network(3), batches()
    model.class_names = NAMES
    trainer(tmp_path, BoundaryScores(widths=[1, 5], distance=0.05), Report()).test(model, loader, verbose=False)
    results = json.loads((tmp_path / "run/0/results.json").read_text())
    matrix, jaccard = MulticlassConfusionMatrix(3, ignore_index=255), MulticlassJaccardIndex(3, ignore_index=255)
    boundary, trimaps, images = BoundaryIoU(3, 0.05), TrimapIoU(3, [1, 5]), []
    for batch in loader:
        labels = model(model.preprocess(batch["image"])).argmax(1)
        for metric in (matrix, jaccard, boundary, trimaps):
            metric.update(labels, batch["mask"])
        images.append(MulticlassJaccardIndex(3, ignore_index=255)(labels, batch["mask"]))
    assert results["confusion"] == matrix.compute().tolist() and results["class_names"] == NAMES
    assert results["split"] == "test" and results["checkpoint"] is None
    found = results["scores"]
    assert 0.1 < found["miou"] < 0.95 and found["miou"] == pytest.approx(float(jaccard.compute()))
    assert found["image_iou"] == pytest.approx(float(torch.stack(images).mean()))
    assert found["iou/c"] is None and found["boundary_iou/c"] is None  # occurs nowhere: not 0, and valid JSON
    assert found["boundary_iou/a"] == pytest.approx(float(boundary.compute()[0]))
    assert found["boundary_iou"] == pytest.approx(float(boundary.compute()[:2].mean()))
    assert found["trimap_miou/5"] == pytest.approx(float(confusion_metrics(trimaps.compute()[1], NAMES)["miou"]))
    assert {kind(key) for key in found} <= set(results["definitions"])
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "run/0/report.txt").read_text().strip() and "does not occur" in text
    for key in ("miou", "micro_iou", "image_iou", "fwiou", "pixel_acc", "mean_acc", "trimap_miou/1", "boundary_iou/b"):
        assert number(found[key]) in text
    assert max(len(line) for line in text.splitlines() if line[:1] in "+|") <= 100
    for name in ("confusion", "iou"):
        assert f"{tmp_path}/run/0/{name}.png" in text and Image.open(tmp_path / f"run/0/{name}.png").width > 300


def test_one_logit_is_two_classes(tmp_path):
    model, loader = network(1), batches()
    trainer(tmp_path, BoundaryScores(), Report()).validate(model, loader, verbose=False)
    results, iou = json.loads((tmp_path / "run/0/results.json").read_text()), BinaryJaccardIndex(ignore_index=255)
    for batch in loader:
        iou.update(model(model.preprocess(batch["image"]))[:, 0].sigmoid(), batch["mask"])
    assert results["split"] == "val" and results["class_names"] == ["0", "1"]
    assert results["scores"]["iou/1"] == pytest.approx(float(iou.compute()))
    assert torch.tensor(results["confusion"]).sum() == 3 * 29 * 40 and len(results["confusion"]) == 2


@pytest.mark.parametrize(("classes", "membrane"), [(1, 0), (2, 0), (2, 1)])
def test_em_scores_are_the_best_over_thresholds(tmp_path, classes, membrane):
    model, loader, thresholds = network(classes), batches(void=False), [0.1, 0.3, 0.5, 0.7, 0.9]
    run = trainer(tmp_path, EMScores(membrane, thresholds), Report())
    run.test(model, loader, verbose=False)
    errors = EMErrors(thresholds)
    for batch in loader:
        logits = model(model.preprocess(batch["image"]))
        light = (logits[:, 0] if classes == 1 else logits[:, 1] - logits[:, 0]).sigmoid()
        errors.update(light if membrane == 1 else 1 - light, batch["mask"] == 1 - membrane)
    for row, key in zip(errors.compute(), ("pixel_error", "rand_error", "warping_error"), strict=True):
        assert row.min() < row.max() and float(run.callback_metrics[f"test/{key}"]) == pytest.approx(float(row.min()))
        best = thresholds[int(row.argmin())]
        assert float(run.callback_metrics[f"test/{key}_threshold"]) == pytest.approx(best)
        assert f"at {best}" in (tmp_path / "run/0/report.txt").read_text()


def test_em_scores_refuse_other_data(tmp_path):
    with pytest.raises(ValueError, match="3 classes"):
        trainer(tmp_path, EMScores()).test(network(3), batches(), verbose=False)
    with pytest.raises(ValueError, match="masks of 0 ignore"):
        trainer(tmp_path, EMScores()).test(network(2), batches(), verbose=False)
    with pytest.raises(ValueError, match="0 or 1"):
        EMScores(membrane=2)


def test_within_fit_further_scores_cost_nothing(tmp_path):
    model = UNet(2, base_channels=4)
    run = trainer(tmp_path, BoundaryScores(), EMScores(), Report(), max_epochs=1, limit_train_batches=1)
    run.fit(model, batches(void=False), batches(void=False))
    logged = {key.partition("/")[2] for key in run.callback_metrics}
    assert "miou" in logged and "image_iou" in logged and not {"boundary_iou", "rand_error"} & logged
    assert not (tmp_path / "run/0/results.json").exists()


class Calls(EvaluationCallback):
    """A callback that lists its calls."""

    def __init__(self, *phases: str, every_n_epochs: int = 1) -> None:
        self.phases, self.every_n_epochs, self.calls = phases, every_n_epochs, []

    def begin(self, trainer, module, split):
        self.calls.append(f"begin {split}")

    def update(self, trainer, module, outputs, batch):
        self.calls.append(batch["name"][0])

    def end(self, trainer, module, split):
        assert module.confusion.compute().sum() > 0  # not yet logged and reset
        self.calls.append("end")

    def report(self, trainer, module, split):
        assert module.confusion.compute().sum() == 0 and f"{split}/miou" in trainer.callback_metrics
        self.calls.append(f"report {split}")


def test_an_evaluation_callback_works_in_its_phases_and_not_in_the_sanity_check(tmp_path):
    in_val, in_test = (["begin " + split, "0", "1", "2", "end", "report " + split] for split in ("val", "test"))
    for verb, expected in (("validate", in_val), ("test", in_test)):
        callbacks = [Calls("validate", "test"), Calls(verb), Calls("fit")]
        getattr(trainer(tmp_path, *callbacks), verb)(network(2), batches(), verbose=False)
        assert [callback.calls for callback in callbacks] == [expected, expected, []]
    callbacks = [Calls("validate", "test"), Calls("fit", every_n_epochs=3)]
    run = trainer(tmp_path, *callbacks, max_epochs=6, limit_train_batches=1, num_sanity_val_steps=1)
    run.fit(UNet(2, base_channels=4), batches(void=False), batches(void=False))
    assert [call.partition(" ")[0] for call in callbacks[1].calls] == 2 * ["begin", "0", "1", "2", "end", "report"]
    assert callbacks[0].calls == []


def test_the_example_of_a_further_metric_has_15_lines_and_is_logged_and_reported(tmp_path, monkeypatch):
    code = textwrap.dedent(inspect.getdoc(EvaluationMetric).partition("::\n\n")[2])
    assert len(code.splitlines()) <= 15 and "class Kappa" in code
    (tmp_path / "kappa.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    kappa, model, loader = importlib.import_module("kappa").Kappa(), network(2), batches()
    labels = torch.cat([model(model.preprocess(batch["image"])).argmax(1) for batch in loader])
    masks = torch.cat([batch["mask"] for batch in loader])
    expected = float(multiclass_cohen_kappa(labels, masks, 2, ignore_index=255))
    assert 0.1 < expected < 0.95
    for verb, split in (("validate", "val"), ("test", "test"), ("test", "test")):  # a second run starts from 0
        run = trainer(tmp_path, Report(), kappa)
        getattr(run, verb)(model, loader, verbose=False)
        assert float(run.callback_metrics[f"{split}/kappa"]) == pytest.approx(expected)
        row = next(s for s in (tmp_path / "run/0/report.txt").read_text().splitlines() if s.startswith("| kappa "))
        assert number(expected) in row


def test_the_report_does_not_depend_on_the_order_of_callbacks(tmp_path):
    texts, files = [], []
    for name in ("first", "last"):
        others = [DenseCRF(workers=0), BoundaryScores(widths=[3]), PredictionLogger()]
        callbacks = [Report(), *others] if name == "first" else [*others, Report()]
        trainer(tmp_path / name, *callbacks).test(network(3), batches(), verbose=False)
        folder = tmp_path / name / "run/0"
        texts.append((folder / "report.txt").read_text().replace(str(folder), ""))
        files.append((folder / "results.json").read_text())
    assert texts[0] == texts[1] and files[0] == files[1]
    assert all(word in texts[0] for word in ("with CRF", "boundary", "within 3 px", "/panel.png", "/crf.png"))


class Refined(L.Callback):
    """A callback that logs as DenseCRF does."""

    def on_test_epoch_end(self, trainer, pl_module):
        values = {"crf/miou": 0.711, "crf/iou/a": 0.722, "crf/iou/b": 0.733, "crf/iou/c": float("nan")}
        values |= {"crf/micro_iou": 0.744, "crf/image_iou": 0.755, "crf/fwiou": 0.766, "crf/pixel_acc": 0.777}
        values |= {"crf/mean_acc": 0.788, "crf/trimap_miou/3": 0.799, "own": 0.123}
        pl_module.log_dict({f"test/{key}": value for key, value in values.items()})


def test_refined_scores_stand_beside_the_plain_ones(tmp_path):
    model = network(3)
    model.class_names = NAMES
    trainer(tmp_path, BoundaryScores(widths=[3]), Refined(), Report()).test(model, batches(), verbose=False)
    text = (tmp_path / "run/0/report.txt").read_text()
    found = json.loads((tmp_path / "run/0/results.json").read_text())["scores"]
    pairs = [("| a ", "iou/a", "0.722"), ("| mean IoU  ", "miou", "0.711"), ("| micro IoU", "micro_iou", "0.744")]
    for start, key, refined in [*pairs, ("| mean IoU within 3 px", "trimap_miou/3", "0.799")]:
        row = next(line for line in text.splitlines() if line.startswith(start))
        assert [cell.strip() for cell in row.split("|")][2:4] == [number(found[key]), refined]
    assert text.count("with CRF") == 3 and "own" in text and "0.123" in text
    assert found["crf/iou/c"] is None and found["crf/fwiou"] == pytest.approx(0.766)


def test_numbers_are_short_and_small_ones_keep_two_digits():
    assert [number(v) for v in (0.5, 0.0, 1.0, 0.000353, float("nan"), None)] == [
        "0.500", "0.000", "1.000", "0.00035", "-", ""
    ]  # fmt: skip


def test_bars_are_as_long_as_the_iou():
    values = {"iou/a": 0.25, "iou/b": 1.0, "miou": 0.625, "pixel_acc": 0.9, "mean_acc": 0.8}
    assert list(class_table("test", ["a", "b"], values).columns[-1].cells)[:2] == [10 * "#", 40 * "#"]
    assert further_table(values).row_count == 0
    assert all(kind(key) == key for key in NUMBERS)


@pytest.mark.parametrize("count", [2, 11, 150])
def test_pictures_have_a_size_that_can_be_looked_at(tmp_path, count):
    names, iou = [f"class {k}" for k in range(count)], torch.linspace(0, 1, count).tolist()
    iou[0] = float("nan")
    matrix = torch.randint(0, 1000, (count, count)) + torch.eye(count, dtype=torch.int64) * 1000 * count
    matrix[1] = 0  # no true pixel
    draw_confusion(matrix, names, tmp_path / "confusion.png")
    draw_iou(iou, names, 0.5, tmp_path / "iou.png")
    for name in ("confusion", "iou"):
        picture = Image.open(tmp_path / f"{name}.png")
        assert min(picture.size) > 100 and max(picture.size) < 2600
        assert len(set(picture.convert("RGB").resize((200, 200)).getdata())) > 20  # something is drawn


@pytest.mark.slow
def test_the_command_leaves_results(trained):
    run = trained / "logs/config"
    printed = succeed("test", "--config", trained / "config.yaml", "--ckpt_path", "best", cwd=trained)
    newest = max(run.glob("version_*"), key=lambda folder: int(folder.name.partition("_")[2]))
    results = json.loads((newest / "results.json").read_text())
    assert results["class_names"] == CLASSES and results["split"] == "test"
    assert results["checkpoint"].endswith("version_0/checkpoints/best.ckpt")
    assert torch.tensor(results["confusion"]).sum() == 3 * 46 * 64  # two rows of each test mask are ignored
    assert number(results["scores"]["fwiou"]) in printed and str(newest / "confusion.png") in printed
