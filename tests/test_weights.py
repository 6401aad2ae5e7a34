"""Reading files of weights: wrappers, prefixes, old scalars, heads, other channels, and refusals."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from segmentation import FCN, DeconvNet, DeepLabV1, DeepLabV2, DeepLabV3, DeepLabV3Plus, PSPNet, SegNet, UNet
from segmentation.errors import UserError
from segmentation.weights import inflate, load_weights, read_weights


def small(**kwargs) -> UNet:
    return UNet(3, base_channels=4, **kwargs)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "model.module.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state", "model_state_dict", "model"])
def test_wrappers_and_prefixes_are_seen_through(prefix, wrapper, tmp_path):
    model = small()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state if wrapper is None else {"epoch": 1, wrapper: state}, tmp_path / "x.pth")
    read = read_weights(str(tmp_path / "x.pth"), "UNet").state
    assert list(read) == list(model.state_dict())


def test_a_compiled_submodules_prefix_is_seen_through(tmp_path):
    state = {key.replace("down1.", "down1._orig_mod."): value for key, value in small().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    assert list(read_weights(str(tmp_path / "x.pth"), "UNet").state) == list(small().state_dict())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("scalar", [np.float64(0.75), np.float32(0.75), np.int64(3)], ids=lambda s: type(s).__name__)
def test_a_numpy_scalar_beside_the_weights_is_read(legacy, scalar, tmp_path):
    content = {"best_pred": scalar, "state_dict": small().state_dict()}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)
    assert len(read_weights(str(tmp_path / "x.pth"), "UNet").state) == len(small().state_dict())


def test_a_numpy_scalar_under_its_old_name_is_read(tmp_path):
    torch.save({"best_pred": np.float64(0.75), "state_dict": small().state_dict()}, tmp_path / "new.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip
    content = (tmp_path / "new.pth").read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "old.pth").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_weights(str(tmp_path / "old.pth"), "UNet").state.keys() == small().state_dict().keys()


def test_nothing_else_is_unpickled(tmp_path):
    torch.save({"state_dict": small().state_dict(), "args": nn.Identity()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="Identity"):
        read_weights(str(tmp_path / "x.pth"), "UNet")


def test_a_head_of_another_class_count_is_left_fresh_and_said(tmp_path, capsys, caplog):
    torch.save(small().state_dict(), tmp_path / "x.pth")
    model = UNet(7, base_channels=4, weights=str(tmp_path / "x.pth"))
    assert model.classifier.out_channels == 7
    assert (
        "classifier. keeps its random initialisation, as it has 3 outputs in the file and 7 here"
        in capsys.readouterr().err + caplog.text
    )


def test_a_head_that_the_file_lacks_or_has_too_much_is_an_error(tmp_path):
    state = small().state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("classifier")}, tmp_path / "less.pth")
    torch.save({**state, "classifier.extra": torch.zeros(3)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"classifier.weight: absent in the file, \(3, 4, 1, 1\) in the network"):
        small(weights=str(tmp_path / "less.pth"))
    with pytest.raises(ValueError, match=r"classifier.extra: \(3,\) in the file, absent in the network"):
        small(weights=str(tmp_path / "more.pth"))


def test_the_first_convolution_is_inflated_from_rgb(tmp_path):
    """Grey: the same picture in three channels. Six bands: twice the same picture."""
    rgb = small(mean=[0.5] * 3, std=[0.5] * 3).eval()
    torch.save(rgb.state_dict(), tmp_path / "x.pth")
    grey = small(in_channels=1, mean=[0.5], std=[0.5], weights=str(tmp_path / "x.pth")).eval()
    six = small(in_channels=6, mean=[0.5] * 6, std=[0.5] * 6, weights=str(tmp_path / "x.pth")).eval()
    image, colour = torch.randn(1, 1, 32, 32), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(grey(image), rgb(image.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(six(torch.cat([colour, colour], 1)), rgb(colour), atol=1e-5, rtol=1e-4)
    weight = torch.randn(2, 3, 1, 1)
    assert inflate(weight, 4)[0, :, 0, 0].tolist() == pytest.approx((weight[0, [0, 1, 2, 0], 0, 0] * 0.75).tolist())


def test_a_missing_layer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the weights of here do not fit: bias: absent in the file, \(2,\) in the"):
        load_weights(nn.Linear(3, 2), {"weight": torch.zeros(2, 3)}, "here")


SMP = {"encoder.conv1.weight": torch.zeros(1), "segmentation_head.0.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decoder.blocks.0.conv1.0.weight": torch.zeros(1), **SMP}, "segmentation_models.pytorch for its Unet"),
        ({"decoder.psp.blocks.0.pool.1.0.weight": torch.zeros(1), **SMP}, "a network of its own"),
        ({"base.layer1.conv1.conv.weight": torch.zeros(1), "base.aspp.c0.weight": torch.zeros(1)}, "for DeepLabV2"),
        ({"layer0.0.weight": torch.zeros(1), "ppm.features.0.1.weight": torch.zeros(1)}, "semseg for PSPNet"),
    ],
)
def test_files_of_other_networks_are_refused_by_name(keys, message, tmp_path):
    torch.save(keys, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        small(weights=str(tmp_path / "x.pth"))


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path):
    model = small()
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"a checkpoint of segmentation.UNet, but the model is SegNet"):
        SegNet(3, base_channels=4, weights=str(tmp_path / "x.ckpt"))


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        small(weights=str(tmp_path / "x.pth"))


def test_what_published_weights_need_survives_a_checkpoint(tmp_path):
    """The file settles an argument; a checkpoint stores it and builds the same arithmetic without the file."""
    torch.save(milesial(bilinear=True), tmp_path / "x.pth")
    model = UNet(3, base_channels=4, weights=str(tmp_path / "x.pth"))
    checkpoint: dict = {"state_dict": {}}
    model.on_save_checkpoint(checkpoint)
    arguments = checkpoint["segmentation"]["init_args"]
    assert arguments["up"] == "bilinear" and "weights" not in arguments
    assert isinstance(UNet(**arguments).up1.up, nn.Upsample)


def test_an_argument_that_contradicts_a_published_file_is_an_error(tmp_path):
    torch.save(milesial(bilinear=True), tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"x.pth \(milesial/Pytorch-UNet\) needs up: bilinear, but the model has up: tra"
    ):
        UNet(3, base_channels=4, up="transposed", weights=str(tmp_path / "x.pth"))
    assert UNet(3, base_channels=4, up="bilinear", weights=str(tmp_path / "x.pth")).hparams.up == "bilinear"


def test_a_subclass_reads_the_files_of_its_paper(tmp_path):
    class Mine(UNet):
        pass

    torch.save(milesial(bilinear=True), tmp_path / "x.pth")
    assert Mine(3, base_channels=4, weights=str(tmp_path / "x.pth")).hparams.up == "bilinear"


def milesial(bilinear: bool) -> dict[str, torch.Tensor]:
    """Our U-Net's weights under milesial's names."""
    names = {"down1": "inc", "bottom": "down4.maxpool_conv.1", "classifier": "outc.conv"}
    names |= {f"down{level}": f"down{level - 1}.maxpool_conv.1" for level in (2, 3, 4)}
    state = {}
    for key, value in UNet(3, base_channels=4, up="bilinear" if bilinear else "transposed").state_dict().items():
        part, _, rest = key.partition(".")
        if part.startswith("up"):
            part, rest = f"up{5 - int(part[2])}", rest.replace("conv.", "conv.double_conv.", 1)
        elif part in ("mean", "std"):
            continue
        elif part != "classifier":
            rest = f"double_conv.{rest}"
        state[f"{names.get(part, part)}.{rest}"] = value
    return state


IMAGENET = {
    "fcn vgg16": (lambda **k: FCN(3, "vgg16", **k), torchvision.models.vgg16, "backbone.conv1.0.weight"),
    "fcn resnet50": (lambda **k: FCN(3, "resnet50", **k), torchvision.models.resnet50, None),
    "deeplabv1": (lambda **k: DeepLabV1(3, **k), torchvision.models.vgg16, "conv1.0.weight"),
    "deeplabv2 vgg16": (lambda **k: DeepLabV2(3, "vgg16", **k), torchvision.models.vgg16, None),
    "deeplabv2 resnet101": (lambda **k: DeepLabV2(3, **k), torchvision.models.resnet101, None),
    "deeplabv3 resnet50": (lambda **k: DeepLabV3(3, **k), torchvision.models.resnet50, "backbone.conv1.weight"),
    "deeplabv3 mobilenet": (
        lambda **k: DeepLabV3(3, "mobilenet_v3_large", **k),
        torchvision.models.mobilenet_v3_large,
        "backbone.0.0.weight",
    ),
    "deeplabv3plus mobilenet": (
        lambda **k: DeepLabV3Plus(3, "mobilenet_v2", **k),
        torchvision.models.mobilenet_v2,
        "backbone.features.0.0.weight",
    ),
    "pspnet": (lambda **k: PSPNet(3, "resnet50", **k), torchvision.models.resnet50, None),
    "segnet": (lambda **k: SegNet(3, **k), torchvision.models.vgg16_bn, "encoder.0.0.weight"),
    "deconvnet": (lambda **k: DeconvNet(3, **k), torchvision.models.vgg16_bn, None),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_weights_are_loaded_and_inflated(name, monkeypatch):
    """Torchvision's network has random weights here, nothing is downloaded; every tensor that fits is loaded."""
    build, peer, first = IMAGENET[name]
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    state = peer(weights=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    model = build(weights="imagenet")
    sums = {float(value.double().sum()) for value in model.state_dict().values()}
    convs = [key for key, value in state.items() if value.dim() == 4 and not key.startswith("classifier")]
    arrived = [key for key in convs if float(state[key].double().sum()) in sums]
    expected = {"pspnet": len(convs) - 3, "deeplabv3plus mobilenet": len(convs) - 1}.get(name, len(convs))
    assert len(arrived) == expected
    if first is not None:
        two = build(weights="imagenet", in_channels=2, mean=[0.5] * 2, std=[0.5] * 2)
        stem = next(value for value in state.values() if value.dim() == 4)
        torch.testing.assert_close(two.state_dict()[first], stem[:, :2] * 1.5)
