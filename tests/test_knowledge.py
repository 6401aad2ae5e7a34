"""What training knew, prediction knows: a checkpoint's bands, scale and classes are compared with the data's."""

import json
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import tifffile
import torch
from conftest import CLASSES, config, draw_pair, lightning, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules import Folder
from datamodules.check import examine
from datamodules.errors import UserError as DataError
from segmentation import UNet, checkpoints, cli
from segmentation.commands.export import export
from segmentation.errors import UserError

CPU = ["--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """A folder with RGB TIFFs, and a run on their bands in another order, whose checkpoint gives all classes."""
    folder = tmp_path_factory.mktemp("swapped")
    for offset, split in enumerate(("train", "val", "test")):
        for kind in ("images", "masks"):
            (folder / "tree" / kind / split).mkdir(parents=True)
        for i in range(4):
            image, labels = draw_pair(10 * offset + i)
            tifffile.imwrite(folder / f"tree/images/{split}/{i}.tif", image, photometric="rgb")
            Image.fromarray(labels).save(folder / f"tree/masks/{split}/{i}.png")
    file = config(folder, folder / "tree", max_epochs="max_steps: 1")
    cli.main(["fit", "--config", str(file), "--data.bands", "[2, 1, 0]"])
    path = folder / "logs/config/version_0/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    noise = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    content["state_dict"] = shake(UNet(3, base_channels=4), noise).state_dict()
    torch.save(content, path)
    return folder


def command(folder, *args: object) -> None:
    """Run a command in this process with the checkpoint of a folder."""
    path = folder / "logs/config/version_0/checkpoints/last.ckpt"
    cli.main([*map(str, args), "--ckpt_path", str(path), *CPU])


def refusal(capsys, folder, *args: object) -> str:
    """Return the sentence with which a command ends."""
    with pytest.raises(SystemExit) as end:
        command(folder, *args)
    assert end.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_photos_are_read_in_the_bands_of_training(swapped, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    photos = swapped / "tree/images/test"
    command(swapped, "predict", "--data.predict_dir", photos, "--writer.output_dir", "photos")
    command(swapped, "predict_tiff", "--image", photos / "3.tif", "--output", "3.tif")
    command(swapped, "predict", "--config", swapped / "config.yaml", "--writer.output_dir", "split")
    assert caplog.text.count("data.bands is [2, 1, 0], as in the checkpoint") == 2

    saved = torch.load(swapped / "logs/config/version_0/checkpoints/last.ckpt", weights_only=True)
    model = UNet(**saved["segmentation"]["init_args"]).eval()
    model.load_state_dict(saved["state_dict"])
    pixels = torch.from_numpy(tifffile.imread(photos / "3.tif")).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected, other = (model(model.preprocess(p)).argmax(1)[0].numpy() for p in (pixels.flip(1), pixels))
    assert (expected != other).any()
    for file in ("photos/masks/3.png", "split/masks/3.png"):
        np.testing.assert_array_equal(np.array(Image.open(file)), expected)
    np.testing.assert_array_equal(tifffile.imread("3.tif"), expected)


@pytest.mark.parametrize("name", ["test", "predict", "fit", "tune_crf"])
def test_other_bands_than_those_of_training_are_refused(name, swapped, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, swapped, name, "--config", swapped / "config.yaml", "--data.bands", "[0, 1, 2]")
    assert (
        said == "error: bands is [0, 1, 2], but the checkpoint was trained with data.bands [2, 1, 0]: set bands to that"
    )


def test_other_bands_are_refused_for_photos_and_large_tiffs(swapped, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    photos = swapped / "tree/images/test"
    for args in (
        ["predict", "--data.predict_dir", photos, "--data.bands", "[0, 1, 2]"],
        ["predict_tiff", "--image", photos / "3.tif", "--bands", "[0, 1, 2]"],
    ):
        assert "bands is [0, 1, 2], but the checkpoint was trained with data.bands [2, 1, 0]" in refusal(
            capsys, swapped, *args
        )
    assert not (tmp_path / "labels.tif").exists()


def test_bands_that_are_not_given_are_those_of_rgb():
    for there, here in ((None, [0, 1, 2]), ([0, 1, 2], None), (None, None), ([4], (4,))):
        checkpoints.compare_bands({"bands": there}, here)
    checkpoints.compare_bands({}, [7])  # a checkpoint of an earlier version
    with pytest.raises(UserError, match=r"bands is \[2, 1, 0\], but .* trained on RGB: leave bands out"):
        checkpoints.compare_bands({"bands": None}, [2, 1, 0])
    with pytest.raises(UserError, match=r"bands is None, but .* trained with data.bands \[3\]: set bands to that"):
        checkpoints.compare_bands({"bands": [3]}, None)


def test_the_value_range_of_training_wins(caplog):
    model = UNet(3, base_channels=4)
    model.value_range = [0.0, 4095.0]
    checkpoints.settle_range({"value_range": [0, 4095]}, model)
    assert model.value_range == [0.0, 4095.0] and not caplog.text
    with pytest.raises(UserError, match=r"is \[0.0, 4095.0\], but the checkpoint was trained with \[0, 1023\]: set it"):
        checkpoints.settle_range({"value_range": [0, 1023]}, model)
    checkpoints.settle_range({}, model)
    assert model.value_range is None and "data.value_range [0.0, 4095.0] is not used" in caplog.text
    with pytest.raises(UserError, match=r"is None, but the checkpoint was trained with \[0, 1023\]: set it"):
        checkpoints.settle_range({"value_range": [0, 1023]}, model)


def test_a_checkpoint_of_an_earlier_version_tells_no_bands(swapped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(swapped / "logs/config/version_0/checkpoints/last.ckpt", weights_only=True)
    assert (
        content["segmentation"].pop("bands") == [2, 1, 0] and content["segmentation"].pop("value_range", None) is None
    )
    torch.save(content, "old.ckpt")
    for bands in ("[0, 1, 2]", "[2, 1, 0]"):
        cli.main(["test", "--config", str(swapped / "config.yaml"), "--ckpt_path", "old.ckpt", "--data.bands", bands])


names = st.lists(st.text("abcdefg ", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=6, unique=True)


@settings(max_examples=50, deadline=None)
@given(names, st.randoms())
def test_names_in_another_order_are_noticed(theirs, random):
    ours = random.sample(theirs, len(theirs))
    assert bool(checkpoints.moved_names(theirs, ours)) == (theirs != ours)
    renamed = [f"{name}!" for name in theirs]
    assert not checkpoints.moved_names(theirs, renamed)
    assert checkpoints.other_names(theirs, renamed).startswith(f"{len(theirs)} of {len(theirs)} class names differ")
    assert not checkpoints.other_names(theirs, theirs)


def test_names_are_compared_whatever_their_case():
    assert checkpoints.moved_names(["sky", "Car"], ["car", "Sky"])
    assert not checkpoints.moved_names(["sky", "Car", "car"], ["sky", "Car", "car"])
    assert not checkpoints.moved_names(["0", "1"], ["1", "0"])  # a network that no data named


@pytest.mark.parametrize("name", ["validate", "fit", "tune_crf"])
def test_classes_in_another_order_are_refused(name, swapped, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    other = ["--data.class_names", "[ground, bar, disc]", "--data.label_map", "{0: 0, 1: 2, 2: 1}"]
    said = refusal(capsys, swapped, name, "--config", swapped / "config.yaml", *other)
    assert "the classes of the checkpoint are [ground, disc, bar], but the data has [ground, bar, disc]" in said


def test_stored_values_in_another_order_are_read_in_the_checkpoints_order(swapped, monkeypatch, tmp_path):
    """What the refusal advises, on masks whose stored values name the classes in the other order."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(swapped / "tree", "tree")
    for file in Path("tree/masks").rglob("*.png"):
        Image.fromarray(np.array([0, 2, 1], np.uint8)[np.array(Image.open(file))]).save(file)
    advice = ["--data.class_names", "[ground, disc, bar]", "--data.label_map", "{0: 0, 1: 2, 2: 1}"]
    results = []
    for root, more in ((swapped / "tree", []), ("tree", advice)):
        logs = ["--trainer.logger.save_dir", tmp_path / "logs"]
        command(swapped, "test", "--config", swapped / "config.yaml", "--data.root", root, *more, *logs)
        results.append(
            json.loads((tmp_path / f"logs/config/version_{len(results)}/results.json").read_text())["confusion"]
        )
    assert results[0] == results[1]


def test_weights_of_a_checkpoint_tell_what_they_were_trained_on(swapped, caplog):
    path = str(swapped / "logs/config/version_0/checkpoints/last.ckpt")
    data = Folder(swapped / "tree", ["ground", "bar", "disc"], bands=[0, 1, 2])
    model = UNet(3, base_channels=4, weights=path, mean=(0.5, 0.5, 0.5))
    checkpoints.agree(model, data)
    for words in (
        "bands is [0, 1, 2], but the checkpoint was trained with data.bands [2, 1, 0]",
        "the classes of the checkpoint are [ground, disc, bar], but the data has [ground, bar, disc]",
        "model.mean is [0.5, 0.5, 0.5], but the checkpoint was trained with [0.48",
    ):
        assert f"the weights come from a checkpoint: {words}" in caplog.text
    assert model.class_names == ["ground", "bar", "disc"] and model.bands == [0, 1, 2]
    caplog.clear()
    checkpoints.agree(UNet(3, base_channels=4, weights=path), Folder(swapped / "tree", CLASSES, bands=[2, 1, 0]))
    assert not caplog.text


def test_a_checkpoints_mean_and_order_of_colours_are_compared(swapped, caplog):
    path = swapped / "logs/config/version_0/checkpoints/last.ckpt"
    model = UNet(3, base_channels=4, mean=(0.5, 0.5, 0.5))
    checkpoints.load_trained(model, path)
    assert "model.mean [0.5, 0.5, 0.5] is not used: the checkpoint was trained with [0.48" in caplog.text
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(
        UserError, match=r"model\.bgr is True, but the checkpoint was trained with False: set it to that"
    ):
        checkpoints.load_trained(UNet(3, base_channels=4, bgr=True), path)


@pytest.mark.parametrize(("values", "wider"), [([0, 4095], "uint16"), ([-5, 40], "float32"), ([0, 70000], "float32")])
def test_an_export_takes_a_type_that_holds_the_values_of_training(values, wider, tmp_path):
    model = UNet(3, base_channels=4)
    model.value_range = values
    checkpoint: dict = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "deep.ckpt")
    with pytest.raises(UserError, match=f"--dtype uint8 does not hold: set --dtype {wider}"):
        trainer = L.Trainer(accelerator="cpu", logger=False)
        export(trainer, UNet(3, base_channels=4), str(tmp_path / "deep.ckpt"), format="torch_export")


def test_other_names_are_said_and_win(swapped, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    names = ["--data.class_names", "[ground, disc, pole]"]
    command(swapped, "test", "--config", swapped / "config.yaml", *names, "--trainer.logger.save_dir", tmp_path)
    assert "1 of 3 class names differ from the checkpoint's: bar is now pole" in caplog.text
    assert "pole" in next(tmp_path.glob("config/*/report.txt")).read_text()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["bg", "car", "car"], "labels 1 and 2 are both called 'car'"),
        (["bg", " car", "car "], "labels 1 and 2 are both called 'car'"),
        (["bg", ""], "the class of label 1 has no name"),
        (["bg", "tree/shrub"], "the class name 'tree/shrub' has a slash"),
        (["bg", "a\\b"], "has a slash"),
        (["bg", "a\x07b"], "control character"),
    ],
)
def test_names_that_tell_no_classes_apart_are_refused(names, words, tmp_path):
    with pytest.raises(DataError, match=words):
        Folder(tmp_path, class_names=names)
    (tmp_path / "class_dict.csv").write_text("".join(f"{name},{i},0,0\n" for i, name in enumerate(names)))
    with pytest.raises(DataError, match=words):
        Folder(tmp_path)


def test_names_that_a_data_set_states_are_refused_in_the_same_words(tree):
    """By a run and by the doctor: its class names are no argument."""
    data = Folder(tree, CLASSES)
    data.class_names = ["bg", "car", "car"]
    for look in (lambda: data.setup("fit"), lambda: examine(data)):
        with pytest.raises(DataError, match="labels 1 and 2 are both called 'car'"):
            look()


def test_two_stored_values_may_be_one_class(tree):
    """The remedy for two classes of one name."""
    data = Folder(tree, class_names=["ground", "object"], label_map={0: 0, 1: 1, 2: 1})
    data.setup("validate")
    assert data.datasets["val"].read(0)[1].unique().tolist() == [0, 1, 255]


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_a_command_says_that_the_weights_are_random(name, swapped, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    cli.main([name, "--config", str(swapped / "config.yaml"), "--trainer.logger.save_dir", str(tmp_path)])
    assert "the network is not trained: its weights are random; give a checkpoint by --ckpt_path FILE" in caplog.text
    caplog.clear()
    path = swapped / "logs/config/version_0/checkpoints/last.ckpt"
    overwrite = ["--writer.overwrite", "true"] if name == "predict" else []
    cli.main([name, "--config", str(swapped / "config.yaml"), "--model.weights", str(path), *overwrite])
    assert "not trained" not in caplog.text


class Seen(L.Callback):
    """Keeps the batches of each epoch."""

    def __init__(self) -> None:
        self.batches: dict[int, list[torch.Tensor]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.setdefault(trainer.current_epoch, []).append(batch["image"])


@pytest.mark.parametrize(("overfit", "count"), [(1, 1), (2, 2), (0.5, 2), (1.0, 4)])
def test_overfitting_sees_the_same_batches_in_each_epoch(overfit, count, tree, tmp_path):
    data = Folder(tree, CLASSES, batch_size=3, num_workers=0, crop_size=32, scale_range=(0.5, 2))
    seen = Seen()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[seen], overfit_batches=overfit, **quiet)
    trainer.fit(UNet(3, base_channels=4), data)
    first = seen.batches[0]
    assert len(first) == count and list(seen.batches) == [0, 1, 2]
    for later in (seen.batches[1], seen.batches[2]):
        assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@pytest.mark.slow
def test_overfitting_one_batch_by_the_command(tree, tmp_path):
    file = config(tmp_path, tree, num_workers="num_workers: 1")
    done = lightning("fit", "--config", file, "--trainer.overfit_batches", 1, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    refused = lightning("fit", "--config", file, "--trainer.overfit_batches", 0.1, cwd=tmp_path)
    assert refused.returncode == 1 and "set it to 1" in refused.stderr.splitlines()[-1]
