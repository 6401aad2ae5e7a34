"""recipe.yaml of `check_data` runs as it is, keeps what the user set, and fits into the minutes that were asked for."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CLASSES, draw_tree, rows, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules import Folder, SyntheticScenes
from datamodules.check import examine
from segmentation.cli import main
from segmentation.commands.recipe import Cost, choose_trainer, no_up, write_recipe
from segmentation.errors import UserError

COUNTS = {"train": 6, "val": 3, "test": 2}
COLORS = np.array([[0, 0, 0], [0, 200, 0], [200, 0, 0]], np.uint8)


def recipe(data, folder: Path, minutes: float = 0.001, **init_args) -> tuple[dict, str]:
    """The recipe for a data set, as the command reads it and as it is written."""
    folder.mkdir(exist_ok=True)
    arguments = {"class_path": f"datamodules.{type(data).__name__}", "init_args": init_args}
    written = write_recipe(examine(data), arguments, minutes, folder / "recipe.yaml").read_text()
    return yaml.safe_load(written), written


def draw(root: Path, labels_of, number: int = 24) -> Path:
    """Draw images and masks in colour, whose names have a suffix, into one folder each without splits."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        labels = labels_of(rng)
        pixels = np.array([[90, 70, 50], [60, 150, 50], [160, 60, 60]])[labels] + rng.integers(-15, 16, (64, 64, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{i:02d}.png")
        Image.fromarray(COLORS[labels]).save(root / f"labels/{i:02d}_mask.png")
    return root


def scattered(rng) -> np.ndarray:
    return rng.choice(3, (8, 8), p=[0.8, 0.15, 0.05]).repeat(8, 0).repeat(8, 1)


def landscape(rng) -> np.ndarray:
    return np.repeat([0, 1, 2], [20, 24, 20])[:, None].repeat(64, 1)


def stripes(rng) -> np.ndarray:
    return np.repeat([0, 1, 2, 1, 0], [10, 16, 12, 16, 10])[:, None].repeat(64, 1)


@pytest.mark.slow
def test_a_recipe_runs_with_nothing_edited(tmp_path, monkeypatch, capsys):
    """From a folder with masks in colour to a test, predictions and an exported network."""
    draw(tmp_path / "plants", scattered)
    arguments = ["--data.root", "plants", "--data.mask_dir", "labels", "--data.mask_suffix", "_mask"]
    printed = succeed("check_data", "--data", "Folder", *arguments, "--minutes", "0.1", cwd=tmp_path)
    file = "check_data/plants/recipe.yaml"
    assert f"  lightning fit --config {file}\n" in printed and f"test --config {file} --ckpt_path best\n" in printed
    lines = (tmp_path / file).read_text().splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 120
    start = time.monotonic()
    succeed("fit", "--config", file, cwd=tmp_path)
    assert time.monotonic() - start < 60 + 4 * 6  # 6 seconds were asked for; starting takes long on a busy machine
    run = tmp_path / "logs/plants/version_0"
    steps = yaml.safe_load("\n".join(lines))["trainer"]["max_steps"]
    assert max(int(row["step"]) for row in rows(run)) == steps - 1
    assert [row["step"] for row in rows(run) if row.get("val/miou")][-1] == str(steps - 1)  # the last step is validated
    monkeypatch.chdir(tmp_path)
    main(["validate", "--config", file, "--ckpt_path", "best"])
    main(["test", "--config", file, "--ckpt_path", "best"])
    results = json.loads(next(Path("logs/plants").glob("*/results.json")).read_text())
    assert results["class_names"] == ["#000000", "#00c800", "#c80000"]
    main(["predict", "--config", file, "--ckpt_path", "best"])
    tested = len(examine(Folder("plants", mask_dir="labels", mask_suffix="_mask")).of("test"))
    assert len([*Path("predictions/masks").iterdir()]) == tested > 0
    main(["export", "--config", file, "--ckpt_path", "best", "--format", "torch_export", "--output", "network.pt2"])
    assert Path("network.pt2").is_file()


def test_a_recipe_holds_the_data_as_found(tmp_path):
    root = draw(tmp_path / "plants", scattered)
    arguments = {"root": str(root), "mask_dir": "labels", "mask_suffix": "_mask"}
    config, written = recipe(Folder(**arguments), tmp_path / "out", **arguments, image_dir="images", val_fraction=0.1)
    data = config["data"]["init_args"]
    assert config["data"]["class_path"] == "Folder" and data | arguments == data
    assert data["palette"] == COLORS[[0, 1, 2]].tolist() and data["class_names"][1] == "#00c800"
    assert "image_dir" not in data and "val_fraction" not in data  # as by default
    again = examine(Folder(**data))
    assert not again.failed and again.data.class_names == data["class_names"]
    assert config["trainer"]["logger"][0]["init_args"]["name"] == "plants"
    assert config["trainer"]["logger"][1]["init_args"]["group"] == "plants"
    assert config["model"]["init_args"]["num_classes"] == 3
    weights = config["model"]["init_args"]["class_weights"]
    assert weights[2] > weights[1] > weights[0]  # 5, 15 and 80 % of the pixels
    assert "test_split" not in data and "val has fewer than 10 images" in written


def test_what_the_user_set_stays(tmp_path):
    root = draw_tree(tmp_path / "tree", {"train": 6, "val": 3})
    arguments = {"root": str(root), "class_names": CLASSES, "batch_size": 3, "crop_size": (48, 40), "num_workers": 0}
    config, _ = recipe(Folder(**arguments), tmp_path / "out", **arguments, border_weight=0.0)
    data = config["data"]["init_args"]
    assert (data["batch_size"], data["crop_size"], data["class_names"]) == (3, [48, 40], CLASSES)
    assert data["test_split"] == "val"  # there is no test split
    assert config["trainer"]["max_steps"] % config["trainer"]["val_check_interval"] == 0


def test_a_recipe_mends_masks_of_0_and_255(tmp_path, monkeypatch, capsys):
    """As given, training would fail, and the exit status says so; by the recipe it would not."""
    root = draw_tree(tmp_path / "tree", COUNTS)
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(((np.array(Image.open(path)) == 1) * 255).astype(np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    arguments = ["--data.root", "tree", "--data.batch_size", "2", "--minutes", "0.001"]
    with pytest.raises(SystemExit) as status:
        main(["check_data", "--data", "Folder", *arguments])
    assert status.value.code == 1
    printed = capsys.readouterr().out
    assert "With the arguments of data in check_data/tree/recipe.yaml: Ready to train" in printed
    config = yaml.safe_load(Path("check_data/tree/recipe.yaml").read_text())
    assert config["data"]["init_args"]["label_map"] == {0: 0, 255: 1} and config["data"]["init_args"]["root"] == "tree"
    assert config["model"]["init_args"]["num_classes"] == 2
    main(["check_data", "--data.root", "tree", "--minutes", "0.001"])  # no SystemExit: only the recipe counts
    printed = capsys.readouterr().out
    assert printed.startswith("taken as Folder") and "\nReady to train" in printed and "would fail" not in printed


def test_what_no_recipe_mends_is_said(tmp_path, monkeypatch, capsys):
    """A value without a class is an error with the recipe too, so no command to train is printed."""
    root = draw_tree(tmp_path / "tree", COUNTS)
    for path in root.glob("masks/*/*.png"):
        mask = np.array(Image.open(path))
        mask[5, 5] = 77
        Image.fromarray(mask).save(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        main(["check_data", "--data", "Folder", "--data.root", "tree", "--data.class_names", "[a, b, c]"])
    printed = capsys.readouterr().out
    assert status.value.code == 1 and "lightning fit" not in printed
    assert "With the arguments of data in check_data/tree/recipe.yaml: Training would fail: " in printed


def test_drawn_data_gets_a_recipe_too(tmp_path):
    data = SyntheticScenes(size=(32, 48), num_train=8, num_val=4, num_test=4)
    config, _ = recipe(data, tmp_path / "out", size=(32, 48), num_train=8, num_val=4, num_test=4)
    arguments = config["data"]["init_args"]
    assert config["trainer"]["logger"][0]["init_args"]["name"] == "SyntheticScenes"
    assert arguments["size"] == [32, 48] and "class_names" not in arguments  # the data set states them
    assert not examine(SyntheticScenes(**arguments)).failed


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(scattered, {"turns": 90}), (stripes, {"vertical_flip": True}), (landscape, {})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_images_are_turned_where_there_is_no_up(tmp_path, labels, expected):
    root = draw(tmp_path / "tree", labels)
    config, _ = recipe(Folder(root, mask_dir="labels", mask_suffix="_mask", batch_size=4), tmp_path / "out")
    data = config["data"]["init_args"]
    assert {key: data[key] for key in ("turns", "vertical_flip") if key in data} == expected
    assert data["scale_range"] == ([0.8, 1.25] if expected else [0.75, 1.5])


def test_images_without_labels_have_an_up(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    assert no_up(examine(Folder(root, class_names=CLASSES))) == ("", False)


@settings(max_examples=50, deadline=None)
@given(
    step=st.floats(0.001, 30), validation=st.floats(0, 1000), save=st.floats(0, 5), batch=st.integers(1, 8),
    minutes=st.floats(0.05, 600), number=st.integers(1, 5000),
)  # fmt: skip
def test_the_plan_fits_into_the_minutes(step, validation, save, batch, minutes, number):
    """Steps, validations and checkpoints take at most the minutes, unless one step with its validation does not fit."""

    class Found:
        def of(self, split):
            return range(number)

    cost = Cost(step, validation, save, batch, 0, "32-true", {"32-true": step})
    trainer, warmup = choose_trainer(Found(), cost, minutes, "cpu")
    steps, every = trainer["max_steps"][0], trainer["val_check_interval"][0]
    passes, left = divmod(steps, every)
    assert left == 0 and 1 <= passes <= 10 and warmup <= 0.1 * steps and 1 <= steps <= 20_000
    epochs = steps / max(1, number // batch)
    seconds = steps * step + passes * (validation + 2 * save) + epochs * save
    assert seconds <= 60 * minutes or steps == passes == 1
    if steps > 1 and steps < 19_000:  # and what is left is less than one more step before each validation
        assert seconds + passes * (step + save) + step >= 0.9 * 60 * minutes * 0.999


def test_minutes_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="--minutes is the time that fit may take, above 0, got 0"):
        write_recipe(examine(Folder(draw_tree(tmp_path / "t", COUNTS), class_names=CLASSES)), {}, 0, tmp_path / "r")
