"""Exported files against PyTorch, on sizes that no export has seen, and without this package."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import PROJECT, draw_pair, shake, succeed
from PIL import Image
from test_contracts import FAMILY, build
from torch import nn

from segmentation import SegmentationModule, UNet
from segmentation.cli import main
from segmentation.commands import export

SIZES = [(1, 32, 32), (3, 33, 95), (1, 130, 64), (2, 61, 257)]
NAMES = ["fcn8s", "deeplabv1", "deeplabv1 multi-scale", "deeplabv2 vgg", "deeplabv3 paper", "deeplabv3plus",
         "pspnet", "unet bilinear", "unet valid", "unet3plus guided", "segnet", "deconvnet", "fcdensenet",
         "maskformer"]  # fmt: skip


def varied(model: SegmentationModule) -> SegmentationModule:
    """Layers that start from zeros get weights, else every image has the same probabilities; logits stay near 0."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    shake(model, torch.rand(2, model.in_channels, 188, 188))
    with torch.no_grad():
        spread = model(torch.randn(2, model.in_channels, 64, 96)).std()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == model.num_classes and spread > 2:
                module.weight *= 2 / spread
                module.bias *= 2 / spread
    return model


def save(model: SegmentationModule, path: Path) -> str:
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def noise(shape: tuple[int, int, int], channels: int = 3, dtype: str = "uint8") -> np.ndarray:
    full = 1 if dtype == "float32" else np.iinfo(dtype).max
    return (np.random.RandomState(2).rand(shape[0], channels, *shape[1:]) * full).astype(dtype)


def answer(model: SegmentationModule, image: np.ndarray) -> np.ndarray:
    """What validation would make of an image."""
    with torch.no_grad():
        return model.probabilities(model(model.preprocess(torch.from_numpy(image)))).numpy()


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_every_architecture_is_exported():
    assert {FAMILY[name][0] for name in NAMES} == {architecture for architecture, _ in FAMILY.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_give_the_networks_probabilities_on_any_size(name, tmp_path):
    model = varied(build(name))
    expected = [answer(model, noise(size)) for size in SIZES]
    assert max(probs.std(axis=(0, 2, 3)).max() for probs in expected) > 0.01  # the image matters
    model.channels_last = False
    with export.silence():
        program = export.capture(export.Predictor(model), torch.from_numpy(noise((2, 100, 75))), fixed=False)
        export.write_onnx(program, {}, tmp_path / "x.onnx")
        export.write_torch(program, {}, tmp_path / "x.pt2")
    onnx, torched = session(tmp_path / "x.onnx"), torch.export.load(tmp_path / "x.pt2").module()
    for size, probs in zip(SIZES, expected, strict=True):
        np.testing.assert_allclose(onnx.run(None, {"image": noise(size)})[0], probs, atol=1e-4, rtol=0)
        np.testing.assert_allclose(torched(torch.from_numpy(noise(size))).detach(), probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "dtype", "size"),
    [
        ({"num_classes": 1, "bgr": True}, "uint8", None),
        ({"num_classes": 2, "in_channels": 2, "mean": [0.3, 0.6], "std": [0.2, 0.1]}, "uint16", [40, 56]),
        ({"num_classes": 3}, "float32", 37),
    ],
    ids=["one logit, blue first", "two bands of 16 bits, one size", "floats, one size"],
)
def test_the_file_says_what_it_is(arguments, dtype, size, tmp_path, capsys):
    model = varied(UNet(base_channels=4, **arguments))
    model.palette[0] = [1, 2, 3]
    checkpoint = save(model, tmp_path / "net.ckpt")
    fresh = UNet(base_channels=4, **arguments)
    export.export(None, fresh, checkpoint, "onnx", str(tmp_path / "new" / "net.onnx"), size, dtype)
    file = session(tmp_path / "new" / "net.onnx")
    about = {key: json.loads(value) for key, value in file.get_modelmeta().custom_metadata_map.items()}
    assert about["class_path"] == "segmentation.UNet" and UNet(**about["init_args"]).num_classes
    assert about["palette"] == model.palette and about["class_names"] == model.class_names
    assert about["mean"] == pytest.approx(model.mean.flatten().tolist()) and about["dtype"] == dtype
    assert about["in_channels"] == model.in_channels and about["size"] == ([37, 37] if size == 37 else size)
    image = noise((2, *(about["size"] or (51, 70))), model.in_channels, dtype)
    probs = answer(model, image)
    np.testing.assert_allclose(file.run(["probs"], {"image": image})[0], probs, atol=1e-4)
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["file"] == str(tmp_path / "new" / "net.onnx") and float(printed["difference"].split()[0]) <= 1e-4


@pytest.mark.slow
def test_the_command_and_the_example_without_this_package(trained, tmp_path):
    """The checkpoint of a real run; the example, in a process that could not import torch, labels as the network."""
    checkpoint = trained / "logs/config/version_0/checkpoints/best.ckpt"
    succeed("export", "--ckpt_path", checkpoint, "--format", "torch_export", "--output", "net.pt2", cwd=tmp_path)
    succeed("export", "--ckpt_path", checkpoint, "--output", "net.onnx", cwd=tmp_path)
    loaded = torch.load(checkpoint, weights_only=True)
    model = UNet(**loaded["segmentation"]["init_args"]).eval()
    model.load_state_dict(loaded["state_dict"])
    photo, _ = draw_pair(7, 77, 50)
    Image.fromarray(photo).save(tmp_path / "photo.png")

    image = photo.transpose(2, 0, 1)[None]
    extra = {"class_names": "", "palette": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["class_names"]) == ["ground", "disc", "bar"]
    probs = answer(model, image)
    torch.testing.assert_close(program.module()(torch.from_numpy(image)).detach().numpy(), probs)

    example = PROJECT / "docs" / "run_onnx.py"
    names = {node.names[0].name for node in ast.walk(ast.parse(example.read_text())) if isinstance(node, ast.Import)}
    assert names == {"json", "sys", "numpy", "onnxruntime"}
    arguments = [sys.executable, "-I", example, "net.onnx", "photo.png", "mask.png"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "mask.png") as mask:
        palette = np.reshape(mask.getpalette()[:9], (3, 3)).tolist()
        assert mask.mode == "P" and palette == json.loads(extra["palette"]) == [[10, 20, 30], [200, 0, 0], [0, 0, 200]]
        assert (np.asarray(mask) == probs[0].argmax(axis=0)).mean() > 0.999
    assert done.stdout.splitlines()[1].startswith("disc ")


def test_a_file_that_differs_is_removed(tmp_path, monkeypatch):
    checkpoint = save(UNet(2, base_channels=4), tmp_path / "net.ckpt")
    monkeypatch.setattr(export, "compare", lambda *_: 0.5)
    monkeypatch.setattr(export, "write_onnx", lambda program, about, path: path.write_text("x"))
    monkeypatch.setattr(export, "read_onnx", lambda path: None)
    with pytest.raises(ValueError, match=r"net\.onnx differ from PyTorch's by 5\.0e-01, more than"):
        export.export(None, UNet(2, base_channels=4), checkpoint, "onnx", None, 32, "uint8")
    assert [path.name for path in tmp_path.iterdir()] == ["net.ckpt"]


def test_a_file_is_wrong_if_it_differs_on_every_image():
    """One image may meet two equal maxima, if the network unpools; nan is a difference."""
    predictor = export.Predictor(UNet(2, base_channels=4).eval())
    seen = []

    def once(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return predictor(image) + (0.01 if len(seen) == 1 else 0.00001)

    where = "uint8", (1, 32, 40)
    assert export.compare(predictor, once, *where, 5) == pytest.approx(1e-5, rel=0.1) and len(seen) == 2
    assert not torch.equal(*seen)
    seen.clear()
    assert export.compare(predictor, once, *where, 1) == pytest.approx(0.01, rel=0.01)
    assert export.compare(predictor, lambda image: predictor(image) + 0.01, *where, 5) == pytest.approx(0.01, rel=0.01)
    assert export.compare(predictor, lambda image: predictor(image) * torch.nan, *where, 5) == float("inf")


def test_what_cannot_be_exported_is_said_plainly(tmp_path, monkeypatch, capsys):
    model = UNet(2, base_channels=4)
    checkpoint = save(model, tmp_path / "net.ckpt")
    for change, message in (
        ({"format": "onx"}, "--format is onnx or torch_export, got onx"),
        ({"size": [1, 2, 3]}, "--size is one side, or height and width"),
        ({"size": 0}, "--size is one side, or height and width"),
    ):
        arguments = {"ckpt_path": checkpoint, "format": "onnx", "output": None, "size": None, "dtype": "uint8"}
        with pytest.raises(ValueError, match=message):
            export.export(None, model, **{**arguments, **change})
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        export.export(None, model, str(tmp_path / "other.pth"), "onnx", None, None, "uint8")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"needs onnxscript: pip install 'lightning-segmentation\[export\]'"):
        export.export(None, model, checkpoint, "onnx", None, None, "uint8")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.ckpt")
    for path, message in (("bare.ckpt", "does not say how its model is built"), ("none.ckpt", "does not exist")):
        with pytest.raises(SystemExit):
            main(["export", "--ckpt_path", str(tmp_path / path)])
        assert message in capsys.readouterr().err
