"""Files from strangers run nothing: a marker file would tell. A file that cannot be read is named in one sentence."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import config, draw_tree, lightning
from torch import nn

from segmentation import MaskFormer, SegmentationModule, UNet, checkpoints, cli, tensor_file, weights
from segmentation.errors import UserError


class Touch:
    """A pickle that touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def content(**init_args) -> dict:
    """Return a checkpoint's content whose model says more than `fit` writes."""
    model = UNet(3, base_channels=4)
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.6", "epoch": 1, "global_step": 1}
    checkpoint |= {"loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    checkpoints.describe(model, checkpoint)
    checkpoint["segmentation"]["init_args"] |= init_args
    return checkpoint


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that appears when the module `stranger` is imported, or its function called."""
    file = tmp_path / "executed"
    (tmp_path / "stranger.py").write_text(
        f"open({str(file)!r}, 'a').write('import')\n"
        f"def run(*args, **kwargs): open({str(file)!r}, 'a').write('call')\n"
        "class Net: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return file


HOSTILE = {
    "a class for the optimizer": {"optimizer": {"class_path": "stranger.run", "init_args": {}}},
    "a name for the optimizer": {"optimizer": "stranger.run"},
    "a config of the optimizer": {"optimizer": "call.yaml"},
    "a class for the loss": {"loss": {"class_path": "stranger.Net"}},
    "a class for the schedule": {"lr_scheduler": {"class_path": "stranger.run"}},
    "a class for inference": {"inference": {"class_path": "stranger.Net"}},
    "a class within a list": {"mean": [{"class_path": "stranger.run"}]},
    "a class for a plain argument": {"base_channels": {"class_path": "stranger.run", "init_args": {}}},
    "arguments beside the signature": {"dict_kwargs": {"class_path": "stranger.run"}},
    "a file of weights": {"weights": "weights.pth"},
}


def hostile(name: str, folder: Path) -> Path:
    """Write a checkpoint that names a stranger's code."""
    made = content(**HOSTILE.get(name, {}))
    if name == "another class":
        made["segmentation"]["class_path"] = "stranger.Net"
    elif name == "a class below the package's name":
        made["segmentation"]["class_path"] = "segmentation.checkpoints.torch"
    elif name == "bands":
        made["segmentation"]["bands"] = {"class_path": "stranger.run"}
    elif name in IGNORED:
        made["hyper_parameters"] = IGNORED[name]
    (folder / "call.yaml").write_text("class_path: stranger.run\n")
    torch.save({"a": Touch(folder / "executed")}, folder / "weights.pth")
    torch.save(made, folder / "x.ckpt")
    return folder / "x.ckpt"


IGNORED = {  # entries of Lightning's, which no command reads
    "hyperparameters": {"class_path": "UNet", "init_args": {"num_classes": 3, "optimizer": "stranger.run"}},
    "the class of hyperparameters": {"_class_path": "stranger.Net"},
    "the builder of hyperparameters": {"_instantiator": "stranger.run", "num_classes": 3},
}
OTHERS = [*IGNORED, "another class", "a class below the package's name", "bands"]


@pytest.mark.parametrize("name", [*HOSTILE, *OTHERS])
def test_no_class_of_a_checkpoint_is_imported_or_called(name, marker, tmp_path, capsys):
    file = hostile(name, tmp_path)
    arguments = ["predict", "--ckpt_path", str(file), "--data.predict_dir", str(tmp_path / "none")]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and not marker.exists()
    assert ("none does not exist" if name in {"a file of weights", *IGNORED} else "x.ckpt") in said[0]


@pytest.mark.parametrize("name", [*HOSTILE, *OTHERS])
def test_a_config_of_ones_own_takes_plain_values_alone(name, marker, tmp_path, capsys):
    root = draw_tree(tmp_path / "tree")
    file = config(tmp_path, root)
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--config", str(file), "--ckpt_path", str(hostile(name, tmp_path)), "--data.root", "none"])
    assert ended.value.code == 1 and not marker.exists()
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_commands_run_nothing(tree, marker, tmp_path):
    file = hostile("a class for the optimizer", tmp_path)
    own, data = ["--config", config(tmp_path, tree)], ["--data", "Folder", "--data.root", tree]
    commands = (
        ["predict", "--data.predict_dir", tree / "images/test"],
        ["test", *own],
        ["fit", *own],
        ["export"],
        ["tune_crf", *data],
        ["predict_tiff", "--image", "x.tif"],
        ["receptive_field"],
    )
    for command in commands:
        done = lightning(*command, "--ckpt_path", file, cwd=tmp_path)
        assert done.returncode == 1 and not marker.exists(), done.stderr
        assert "error: " in done.stderr and "Traceback" not in done.stderr and "x.ckpt" in done.stderr
    file.write_bytes(file.read_bytes()[:2000])
    for command in commands[1:3]:
        done = lightning(*command, "--ckpt_path", file, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr and f"{file} is cut short" in done.stderr


def test_a_checkpoint_may_set_plain_arguments_alone():
    unet = checkpoints.plain_arguments(UNet)
    assert {"num_classes", "base_channels", "padding", "mean", "class_weights", "freeze_bn"} <= unet
    assert not {"weights", "optimizer", "lr_scheduler", "loss", "inference", "kwargs", "self"} & unet
    assert "num_queries" in checkpoints.plain_arguments(MaskFormer)
    for arguments in ({"mean": [0.5, 0.5, 0.5]}, {"bias_weight_decay": 0.1}):
        assert arguments.keys() <= checkpoints.plain_arguments(SegmentationModule)


def test_a_checkpoint_without_strange_arguments_builds_its_network(tmp_path):
    made = content(weights="weights.pth")
    torch.save(made, tmp_path / "x.ckpt")
    found = checkpoints.model_of(tmp_path / "x.ckpt")
    assert found["class_path"] == "segmentation.UNet" and found["init_args"]["base_channels"] == 4
    assert "weights" not in found["init_args"]


def damaged(folder: Path) -> dict[str, Path]:
    """Write files that are no checkpoints, by the words of the sentence that must name them."""
    torch.save(content(), folder / "good.ckpt")
    good = (folder / "good.ckpt").read_bytes()
    torch.save(content(), folder / "old.ckpt", _use_new_zipfile_serialization=False)
    bytes_of = {
        "is cut short": good[: len(good) // 2],
        "is empty": b"",
        "is a text file": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "is damaged": (folder / "old.ckpt").read_bytes()[:5000],
        "holds no weights": b"no checkpoint",
    }
    files = {}
    for number, (words, written) in enumerate(bytes_of.items()):
        files[words] = folder / f"{number}.ckpt"
        files[words].write_bytes(written)
    torch.save({"state_dict": {}, "x": Touch(folder / "executed")}, folder / "evil.ckpt")
    (folder / "raw.ckpt").write_bytes(pickle.dumps(Touch(folder / "executed"), protocol=2))
    torch.save({"model": nn.Linear(2, 2)}, folder / "module.ckpt")
    torch.jit.script(nn.Linear(2, 2)).save(folder / "script.ckpt")
    with zipfile.ZipFile(folder / "archive.ckpt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    (folder / "folder.ckpt").mkdir()
    return files | {
        "tensors and plain values .posix.system": folder / "evil.ckpt",
        "which could run commands": folder / "raw.ckpt",
        "Linear": folder / "module.ckpt",
        "TorchScript": folder / "script.ckpt",
        "zip archive": folder / "archive.ckpt",
        "is a folder": folder / "folder.ckpt",
        "does not exist": folder / "none.ckpt",
    }


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_damaged_file_is_named_and_no_advice_is_to_run_it(tmp_path):
    for words, file in damaged(tmp_path).items():
        for read in (checkpoints.read, lambda path: tensor_file.read(path, "weights:")):
            with pytest.raises(UserError, match=f"{file.name}.*{words}") as said:
                read(file)
            assert "weights_only" not in str(said.value) and "\n" not in str(said.value)
    assert not (tmp_path / "executed").exists()
    assert checkpoints.read(tmp_path / "old.ckpt")["epoch"] == checkpoints.read(tmp_path / "good.ckpt")["epoch"] == 1


@pytest.mark.parametrize("address", ["http://a/x.ckpt", "https://a/x.ckpt", "s3://a/x", "file:///x.ckpt", "hf://a/x"])
def test_addresses_are_refused(address, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["test", "--config", str(config(tmp_path, tree))], ["export"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--ckpt_path", address])
        error = capsys.readouterr().err
        assert f"{address} is an address: download the file first" in error


def test_code_in_checkpoints_cannot_be_asked_for(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(content(), tmp_path / "x.ckpt")
    arguments = ["test", "--config", str(config(tmp_path, tree)), "--ckpt_path", "x.ckpt", "--weights_only", "false"]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "weights_only: false lets a checkpoint run commands" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["state_dict", "nothing", "weights"])
def test_weights_without_a_run_are_loaded_as_the_sentence_says(left, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = content()
    state = made["state_dict"]
    torch.save({"state_dict": {"state_dict": state}, "nothing": {}, "weights": state}[left], "x.pth")
    file = str(config(tmp_path, tree))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", file, "--ckpt_path", "x.pth"])
    error = capsys.readouterr().err
    assert ("holds no state_dict" if left != "state_dict" else "not the state of a run") in error
    assert ("--model.weights x.pth" in error) == (left != "nothing")
    if left != "nothing":  # the advice
        again = UNet(3, base_channels=4, weights="x.pth")
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())


def test_another_file_of_the_same_name_in_the_cache_is_named(tmp_path, monkeypatch):
    """Torchvision publishes 8 hex digits of the sha256, in the file's name."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    digits = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()[:8]
    published = SimpleNamespace(url=f"https://download.pytorch.org/models/net-{digits}.pth")
    cached = tmp_path / f"checkpoints/net-{digits}.pth"
    cached.write_bytes((tmp_path / "x.pth").read_bytes())
    assert weights.download(published)["a"].tolist() == [1, 1]
    torch.save({"a": torch.zeros(2)}, cached)
    with pytest.raises(UserError, match=f"net-{digits}.pth is not the file that torchvision published.*not {digits}"):
        weights.download(published)
    torch.save({"a": Touch(tmp_path / "executed")}, cached)
    digits = hashlib.sha256(cached.read_bytes()).hexdigest()[:8]
    cached.rename(cached.with_name(f"net-{digits}.pth"))
    with pytest.raises(UserError, match=f"net-{digits}.pth holds more than tensors"):
        weights.download(SimpleNamespace(url=f"https://download.pytorch.org/models/net-{digits}.pth"))
    with pytest.raises(UserError, match="is no address of weights with a checksum"):
        weights.download(SimpleNamespace(url=f"http://download.pytorch.org/models/net-{digits}.pth"))
    assert not (tmp_path / "executed").exists()
