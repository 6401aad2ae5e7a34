"""FCN compared with torchvision's, a second implementation of the VGG-16 nets, and values computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from conftest import count, shake_norms
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models import segmentation as peers

from segmentation.architectures.fcn import FCN, Upsampling
from segmentation.optimizer import parameter_groups

NAMES = {32: "FCN-32s", 16: "FCN-16s", 8: "FCN-8s"}


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"output_stride": 32}, 134_346_581),
        ({"output_stride": 16}, 134_357_354),
        ({"output_stride": 8}, 134_362_751),
        ({"output_stride": 32, "learn_upsampling": True}, 136_152_917),
        ({"output_stride": 16, "learn_upsampling": True}, 134_815_994),
        ({"output_stride": 8, "learn_upsampling": True}, 134_489_759),
        ({"backbone": "resnet50"}, 32_957_013),
        ({"backbone": "resnet101"}, 51_949_141),
        ({"backbone": "resnet50", "aux_loss_weight": 0.5}, 35_322_218),
        ({"backbone": "resnet101", "aux_loss_weight": 0.5}, 54_314_346),
    ],
)
def test_parameter_counts(arguments, parameters):
    with torch.device("meta"):
        assert count(FCN(21, **arguments)) == parameters


@pytest.mark.parametrize(("backbone", "sizes"), [("resnet50", [(40, 56), (49, 33)]), ("resnet101", [(33, 40)])])
def test_torchvisions_weights_give_its_logits(backbone, sizes, monkeypatch):
    build = {"resnet50": peers.fcn_resnet50, "resnet101": peers.fcn_resnet101}[backbone]
    peer = shake_norms(build(weights=None, weights_backbone=None, num_classes=21, aux_loss=True))
    asked = []
    monkeypatch.setattr(
        "segmentation.architectures.fcn.download", lambda weights: asked.append(weights) or peer.state_dict()
    )
    ours = FCN(21, backbone, weights="coco").eval()
    assert len(asked) == 1 and backbone in asked[0].url and "coco" in asked[0].url
    with torch.inference_mode():
        for size in sizes:
            image = torch.randn(1, 3, *size)
            theirs = peer(image)["out"]
            assert 0.05 < theirs.std() < 20
            torch.testing.assert_close(ours(image), theirs, atol=1e-4, rtol=0)


def test_training_gives_torchvisions_main_and_aux_losses(tmp_path):
    peer = shake_norms(peers.fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)).train()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = FCN(5, "resnet50", aux_loss_weight=0.5, weights=str(tmp_path / "peer.pth")).train()
    for module in (*peer.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    image, mask = torch.rand(2, 3, 33, 33), torch.randint(0, 5, (2, 33, 33))
    theirs, terms = peer(ours.preprocess(image)), ours.losses({"image": image, "mask": mask})
    torch.testing.assert_close(terms["main"], F.cross_entropy(theirs["out"], mask), atol=1e-4, rtol=0)
    torch.testing.assert_close(terms["aux"], 0.5 * F.cross_entropy(theirs["aux"], mask), atol=1e-4, rtol=0)


def narrow(num_classes: int = 3, **arguments) -> FCN:
    """Build a small network on VGG-16 with random score layers; the initial ones are zero."""
    torch.manual_seed(2)
    model = FCN(num_classes, base_channels=4, **arguments)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias, 0, 0.1)
    for score in model.new_layers():
        nn.init.normal_(score.weight, 0, 0.5)
    return model.eval()


def second(model: FCN, image: Tensor) -> Tensor:
    """Compute the nets of the released definitions, layer by layer, from the tensors only."""
    p, stride = model.state_dict(), model.classifier.output_stride
    scale = (1e-2, 1e-4) if model.hparams.at_once else (1, 1)

    def conv(name: str, x: Tensor, **kwargs) -> Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **kwargs)

    def up(name: str, x: Tensor, factor: int) -> Tensor:
        return F.conv_transpose2d(x, p[f"classifier.{name}.weight"], stride=factor)

    x, pools = image, {}
    for stage, layers in enumerate((2, 2, 3, 3, 3), start=1):
        for layer in range(layers):
            first = stage == 1 and layer == 0
            x = F.relu(conv(f"backbone.conv{stage}.{2 * layer}", x, padding=100 if first else 1))
        x = pools[stage] = F.max_pool2d(x, 2, 2, ceil_mode=True)
    x = F.relu(conv("backbone.fc7", F.relu(conv("backbone.fc6", x))))
    x = conv("classifier.score_fr", x)
    if stride < 32:
        x = up("upscore2", x, 2)
        skip = conv("classifier.score_pool4", scale[0] * pools[4])
        x = x + skip[:, :, 5 : 5 + x.shape[2], 5 : 5 + x.shape[3]]
    if stride < 16:
        x = up("upscore_pool4", x, 2)
        skip = conv("classifier.score_pool3", scale[1] * pools[3])
        x = x + skip[:, :, 9 : 9 + x.shape[2], 9 : 9 + x.shape[3]]
    offset = {32: 19, 16: 27, 8: 31}[stride]
    height, width = image.shape[2:]
    return up("upscore", x, stride)[:, :, offset : offset + height, offset : offset + width]


@pytest.mark.parametrize(
    "arguments",
    [{"output_stride": 32}, {"output_stride": 16}, {"output_stride": 8}, {"output_stride": 8, "at_once": True}],
)
@pytest.mark.parametrize("size", [(40, 70), (61, 33)])
def test_vgg16_nets_are_the_released_ones(arguments, size):
    model, image = narrow(**arguments), torch.randn(2, 3, *size)
    with torch.inference_mode():
        logits = model(image)
        assert logits.std() > 0.05
        torch.testing.assert_close(logits, second(model, image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", NAMES, ids=NAMES.get)
def test_what_is_cropped_is_as_wide_on_both_sides(stride):
    """Symmetric filters on a mirrored image give mirrored logits, where the poolings see whole windows.

    26 and 58 pixels with 198 of padding are 7 and 8 times 32; a crop one pixel beside the centre would shift the
    mirror image by two.
    """
    model = narrow(output_stride=stride)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = (module.weight + module.weight.flip(-1)) / 2
    image = torch.randn(1, 3, 26, 58)
    with torch.inference_mode():
        logits = model(image)
        assert (logits - logits.flip(-1)).abs().max() > 1e-3
        torch.testing.assert_close(model(image.flip(-1)), logits.flip(-1), atol=1e-5, rtol=1e-4)


def test_upsampling_starts_as_bilinear_interpolation():
    up = Upsampling(2, 2, learn=False)
    quarter = torch.tensor([0.25, 0.75, 0.75, 0.25])
    torch.testing.assert_close(up.weight[0, 0], torch.outer(quarter, quarter))
    assert (up.weight[0, 1] == 0).all() and (up.weight[1, 0] == 0).all()
    for factor in (2, 8, 16, 32):
        x = torch.randn(1, 2, 5, 6)
        with torch.no_grad():
            ours = Upsampling(2, factor, learn=True)(x)
        whole = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        # The result reaches factor / 2 over the border and fades there; interpolation repeats the border instead.
        half = factor // 2
        inner = ours[..., factor : -factor or None, factor : -factor or None]
        torch.testing.assert_close(inner, whole[..., half:-half, half:-half], atol=1e-5, rtol=1e-5)


def test_fixed_upsampling_is_not_trained_and_learned_upsampling_is():
    for learn in (False, True):
        model = FCN(3, base_channels=4, learn_upsampling=learn)
        grouped = {id(p) for group in parameter_groups(model) for p in group["params"]}
        kernels = [p for name, p in model.named_parameters() if ".upscore" in name]
        assert len(kernels) == 3 and all((id(p) in grouped) == learn for p in kernels)


def test_scores_start_at_zero_and_the_first_step_moves_them():
    model = FCN(3, base_channels=4)
    batch = {"image": torch.rand(1, 3, 40, 40), "mask": torch.randint(0, 2, (1, 40, 40))}
    loss = sum(model.losses(batch).values())
    torch.testing.assert_close(loss, torch.tensor(3.0).log())
    loss.backward()
    assert all(score.weight.grad.abs().max() > 0 for score in model.new_layers())


def test_a_coarser_net_starts_the_finer_one(tmp_path, capsys, caplog):
    """A new skip adds nothing: FCN-16s starts with the predictions of FCN-32s, interpolated in two steps."""
    image = torch.randn(1, 3, 64, 64)
    coarse = narrow(output_stride=32)
    for stride, name in ((16, "score_pool4"), (8, "score_pool3")):
        torch.save(coarse.state_dict(), tmp_path / "coarse.pth")
        fine = FCN(3, output_stride=stride, base_channels=4, weights=str(tmp_path / "coarse.pth")).eval()
        assert f"classifier.{name}. keeps its random initialisation" in capsys.readouterr().err + caplog.text
        assert (getattr(fine.classifier, name).weight == 0).all()
        torch.testing.assert_close(fine.backbone.fc7.weight, coarse.backbone.fc7.weight)
        with torch.inference_mode():
            before, after = coarse(image), fine(image)
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.99
        nn.init.normal_(getattr(fine.classifier, name).weight, 0, 0.1)
        coarse = fine


def test_other_classes_leave_scores_fresh_and_upsampling_bilinear(tmp_path, capsys, caplog):
    five = narrow(5, learn_upsampling=True)
    torch.save(five.state_dict(), tmp_path / "five.pth")
    model = FCN(2, base_channels=4, weights=str(tmp_path / "five.pth"))
    assert (
        "keeps its random initialisation, as it has 5 outputs in the file and 2 here"
        in capsys.readouterr().err + caplog.text
    )
    torch.testing.assert_close(model.classifier.upscore.weight, Upsampling(2, 8, learn=False).weight)
    torch.testing.assert_close(model.backbone.conv5[4].weight, five.backbone.conv5[4].weight)


def test_imagenet_makes_fc6_and_fc7_windows_of_the_classifier(monkeypatch):
    """On a 224 x 224 image without the extra padding, the convolutions see what the fully connected layers saw."""
    torch.manual_seed(3)
    layers, inputs = [], 3
    for width, number in ((4, 2), (8, 2), (16, 3), (32, 3), (32, 3)):
        for _ in range(number):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(nn.Linear(32 * 49, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU())
    vgg = nn.ModuleDict({"features": nn.Sequential(*layers), "classifier": classifier}).eval()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: vgg.state_dict())
    model = FCN(3, base_channels=4, weights="imagenet").eval()
    model.backbone.conv1[0].padding = (1, 1)
    image = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = classifier(vgg["features"](image).flatten(1))
        assert expected.std() > 1e-3
        torch.testing.assert_close(model.backbone(image)["fc7"][:, :, 0, 0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "vgg19"}, "backbone is vgg16"),
        ({"output_stride": 4}, "output_stride 32, 16 or 8, got vgg16, 4"),
        ({"aux_loss_weight": 0.5}, "aux_loss_weight and weights: coco for a ResNet, got backbone vgg16"),
        ({"weights": "coco"}, "weights: coco for a ResNet"),
        ({"backbone": "resnet50", "learn_upsampling": True}, "are for vgg16"),
        ({"backbone": "resnet50", "at_once": True}, "are for vgg16"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        FCN(21, **arguments)
