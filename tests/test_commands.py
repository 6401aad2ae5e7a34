"""The commands as their users run them: real processes on real files."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import COMMAND, ENVIRONMENT, PROJECT, column, config, draw_pair, draw_tree, lightning, rows, succeed
from PIL import Image

from datamodules.files import list_photos

pytestmark = pytest.mark.slow
SCORES = ["val/miou", "val/pixel_acc", "val/mean_acc", "val/fwiou", "val/loss"]
SCORES += [f"val/iou/{name}" for name in ("ground", "disc", "bar")]


def test_fit_leaves_checkpoints_metrics_curves_and_pictures(trained):
    run = trained / "logs/config/version_0"
    for path in ("config.yaml", "metrics.csv", "curves.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (run / path).is_file(), path
    assert len(column(run, "val/miou")) == 2 and len(column(run, "train/loss")) == 6
    assert set(SCORES) <= set(rows(run)[0])
    assert sorted(p.name for p in (run / "pictures").iterdir()) == ["step_000003.png", "step_000006.png"]


def test_checkpoint_knows_its_model_and_holds_plain_types_only(trained):
    checkpoint = torch.load(trained / "logs/config/version_0/checkpoints/best.ckpt", weights_only=True)
    saved = checkpoint["segmentation"]
    assert saved["class_path"] == "segmentation.UNet"
    assert saved["init_args"]["base_channels"] == 4 and saved["init_args"]["num_classes"] == 3
    assert saved["class_names"] == ["ground", "disc", "bar"] and saved["palette"][1] == [200, 0, 0]
    assert "hyper_parameters" not in checkpoint and not any("_orig_mod" in key for key in checkpoint["state_dict"])


def test_test_reports_every_class_and_the_paths(trained, tree):
    out = succeed("test", "--config", trained / "config.yaml", "--ckpt_path", "best", cwd=trained)
    for word in ("ground", "disc", "bar", "mean IoU", "pixel accuracy", "best.ckpt", "metrics.csv", "curves.png"):
        assert word in out
    newest = max((trained / "logs/config").iterdir(), key=lambda p: p.stat().st_mtime)
    assert (newest / "panel.png").is_file() and "mean IoU" in (newest / "report.txt").read_text()


def test_model_comes_from_the_checkpoint_alone(trained, tree):
    checkpoint = trained / "logs/config/version_0/checkpoints/best.ckpt"
    data = ["--data", "Folder", "--data.root", tree, "--data.class_names", "[ground, disc, bar]"]
    out = succeed("validate", "--ckpt_path", checkpoint, *data, "--trainer.accelerator", "cpu", cwd=trained)
    best = max(column(trained / "logs/config/version_0", "val/miou"))
    assert f"{best:.3f}" in out


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    sizes = {}
    for i, mode in enumerate(["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16"]):
        height, width = 20 + 13 * i, 70 - 7 * i
        picture = Image.fromarray(draw_pair(i, 48, 64)[0]).resize((width, height))
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256)
        else:
            picture = picture.convert(mode)
        suffix = "tif" if mode == "CMYK" else "png"
        picture.save(folder / f"photo{i}.{suffix}")
        sizes[f"photo{i}.{suffix}"] = (height, width)
    Image.fromarray(draw_pair(1)[0]).save(folder / "photo0.jpg")  # the same stem as a PNG
    Image.fromarray(draw_pair(2)[0]).save(folder / "sub/photo0.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.fromarray(draw_pair(3)[0]).save(folder / "turned.jpeg", exif=exif)
    (folder / "notes.txt").write_text("not an image")
    doubles = {"photo0.png": sizes.pop("photo0.png"), "photo0.jpg": (48, 64)}  # these alone keep their suffix
    others = {name.rpartition(".")[0]: size for name, size in sizes.items()}
    return folder, others | doubles | {"sub/photo0": (48, 64), "turned": (64, 48)}


def test_predict_writes_masks_overlays_and_lines_for_any_photo(trained, photos, tmp_path):
    folder, sizes = photos
    checkpoint = trained / "logs/config/version_0/checkpoints/best.ckpt"
    command = ["predict", "--ckpt_path", checkpoint, "--data.predict_dir", folder]
    before = set(tmp_path.iterdir())
    succeed(*command, cwd=tmp_path)
    assert {p.name for p in set(tmp_path.iterdir()) - before} <= {
        "predictions",
        ".config",
        ".cache",
    }  # no run is logged
    out = tmp_path / "predictions"
    lines = {line["name"]: line for line in map(json.loads, (out / "predictions.jsonl").read_text().splitlines())}
    assert lines.keys() == sizes.keys()
    for name, (height, width) in sizes.items():
        with Image.open(out / "masks" / f"{name}.png") as mask, Image.open(out / "overlays" / f"{name}.jpg") as overlay:
            assert mask.mode == "P" and mask.size == overlay.size == (width, height)
            assert mask.getpalette()[:9] == [10, 20, 30, 200, 0, 0, 0, 0, 200]
            values = np.array(mask)
        shares = [float((values == label).mean()) for label in range(3)]
        np.testing.assert_allclose(list(lines[name]["shares"].values()), shares, atol=1e-6)
        assert (lines[name]["height"], lines[name]["width"]) == (height, width)

    stamp = (out / "masks/photo0.jpg.png").stat().st_mtime_ns
    again = lightning(*command, cwd=tmp_path)
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr
    assert (out / "masks/photo0.jpg.png").stat().st_mtime_ns == stamp
    succeed(*command, "--writer.overwrite", "true", cwd=tmp_path)
    assert (out / "masks/photo0.jpg.png").stat().st_mtime_ns > stamp


def test_two_processes_validate_seven_images_exactly(trained, tree, tmp_path):
    command = ["validate", "--config", trained / "config.yaml"]
    command += ["--ckpt_path", trained / "logs/config/version_0/checkpoints/best.ckpt"]
    runs = {}
    for devices in (1, 2):
        logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / str(devices)]
        extra = ["--trainer.devices", devices, *(["--trainer.strategy", "ddp"] if devices == 2 else [])]
        succeed(*command, *logger, *extra, cwd=tmp_path)
        runs[devices] = rows(tmp_path / str(devices) / "lightning_logs/version_0")[0]
    for key in SCORES:
        assert float(runs[1][key]) == pytest.approx(float(runs[2][key]), rel=1e-5), key


def test_two_processes_predict_every_photo_once(trained, photos, tmp_path):
    folder, sizes = photos
    checkpoint = trained / "logs/config/version_0/checkpoints/best.ckpt"
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    command = ["predict", "--ckpt_path", checkpoint, "--data.predict_dir", folder, "--writer.polygons", "coco"]
    succeed(*command, *devices, cwd=tmp_path)
    lines = [json.loads(line)["name"] for line in (tmp_path / "predictions/predictions.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(sizes) and lines == [sample.name for sample in list_photos(folder)]
    written = json.loads((tmp_path / "predictions/annotations.json").read_text())
    assert [image["id"] for image in written["images"]] == list(range(1, len(lines) + 1))
    pixels = {image["id"]: image["height"] * image["width"] for image in written["images"]}
    for number, count in pixels.items():  # every pixel has a class
        assert sum(a["area"] for a in written["annotations"] if a["image_id"] == number) == count


def test_two_processes_train_and_agree(tree, tmp_path):
    file = config(tmp_path, tree)
    succeed("fit", "--config", file, "--trainer.devices", 2, "--trainer.strategy", "ddp", cwd=tmp_path)
    run = tmp_path / "logs/config/version_0"
    assert len(column(run, "train/loss")) == 2  # 12 images, 6 per process, batches of 4
    succeed("validate", "--config", file, "--ckpt_path", run / "checkpoints/last.ckpt", cwd=tmp_path)
    one = rows(tmp_path / "logs/config/version_1")[0]
    assert float(one["val/miou"]) == pytest.approx(column(run, "val/miou")[-1], rel=1e-5)


def test_last_goes_on_after_sigkill_in_the_middle_of_an_epoch(tree, tmp_path):
    file = config(tmp_path, tree, max_epochs="max_epochs: 300")
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [*COMMAND, "fit", "--config", file], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log
    )
    first = tmp_path / "logs/config/version_0"
    deadline = time.time() + 240
    while len(column(first, "val/miou") if (first / "metrics.csv").is_file() else []) < 3 and time.time() < deadline:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    steps = torch.load(first / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < steps < 900
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}

    epochs = steps // 3 + 2
    out = succeed("fit", "--config", file, "--ckpt_path", "last", "--trainer.max_epochs", epochs, cwd=tmp_path)
    assert "going on from" in out
    second = tmp_path / "logs/config/version_1"
    assert len(column(second, "val/miou")) == epochs  # earlier rows came along, nothing is missing or doubled
    logged = [int(row["step"]) for row in rows(second) if row.get("train/loss")]
    assert logged == sorted(set(logged)) and logged[-1] == 3 * epochs - 1
    old = [row["val/miou"] for row in rows(first) if row["val/miou"]][: steps // 3]
    assert [row["val/miou"] for row in rows(second) if row["val/miou"]][: steps // 3] == old
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()} == before  # the first run is untouched

    succeed("validate", "--config", file, "--ckpt_path", "best", cwd=tmp_path)  # the best of both parts of the run
    again = float(rows(tmp_path / "logs/config/version_2")[-1]["val/miou"])
    seen = column(first, "val/miou") + column(second, "val/miou")[steps // 3 :]
    assert again == pytest.approx(max(seen), rel=1e-5)


def test_last_without_an_earlier_run_is_an_error(tree, tmp_path):
    done = lightning("fit", "--config", config(tmp_path, tree), "--ckpt_path", "last", cwd=tmp_path)
    assert done.returncode == 1 and "has left a last.ckpt" in done.stderr and "Traceback" not in done.stderr


def test_a_second_run_gets_its_own_folder_even_with_a_fixed_version(tree, tmp_path):
    file = config(tmp_path, tree, max_epochs="max_epochs: 1")
    text = file.read_text().replace("name: config}", "name: config, version: 0}")
    file.write_text(text)
    succeed("fit", "--config", file, cwd=tmp_path)
    first = tmp_path / "logs/config/version_0"
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    out = succeed("fit", "--config", file, cwd=tmp_path)
    assert "gets a new version folder" in out
    assert (tmp_path / "logs/config/version_1/checkpoints/best.ckpt").is_file()
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()} == before


def test_samples_do_not_depend_on_the_number_of_workers(tree, tmp_path):
    losses = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        succeed("fit", "--config", config(folder, tree), "--data.num_workers", workers, cwd=folder)
        losses.append(column(folder / "logs/config/version_0", "train/loss"))
    assert losses[0] == losses[1]


def test_wandb_without_a_key_logs_offline_and_asks_nothing(tree, tmp_path):
    file = config(tmp_path, tree, max_epochs="max_epochs: 1")
    logger = ["--trainer.logger+=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.save_dir", tmp_path / "logs"]
    out = succeed("fit", "--config", file, *logger, cwd=tmp_path)
    assert "logged offline" in out
    run = next((tmp_path / "logs/wandb").glob("offline-run-*"))
    assert list(run.glob("*.wandb")) and list(run.glob("files/media/images/val/*.png"))


def test_camvid_takes_the_place_of_a_folder_config(tmp_path):
    tree = draw_tree(tmp_path / "tree", {"train": 4, "val": 2})
    camvid = tmp_path / "camvid"
    for split in ("train", "val"):
        shutil.copytree(tree / "images" / split, camvid / split)
        shutil.copytree(tree / "masks" / split, camvid / f"{split}annot")
        for image in (camvid / split).iterdir():
            Image.open(image).save(image.with_suffix(".png"))
            image.unlink()
        names = sorted(p.name for p in (camvid / split).iterdir())
        lines = [f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}" for name in names]
        (camvid / f"{split}.txt").write_text("\n".join(lines) + "\n")
    command = ["fit", "--config", PROJECT / "configs/unet_camvid_cpu.yaml", "--data", "CamVid", "--data.root", camvid]
    small = [
        "--trainer.max_epochs",
        1,
        "--trainer.check_val_every_n_epoch",
        1,
        "--data.batch_size",
        2,
        "--model.base_channels",
        4,
        "--data.num_workers",
        0,
    ]
    where = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "logs"]
    succeed(*command, *small, *where, "--trainer.precision", "32-true", cwd=tmp_path)
    run = tmp_path / "logs/lightning_logs/version_0"
    assert "val/iou/Bicyclist" in rows(run)[0] and len(column(run, "val/miou")) == 1
