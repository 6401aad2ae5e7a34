"""DeepLab v3 compared with torchvision's, and its dilations with the paper's."""

import pytest
import torch
import torch.nn.functional as F
from conftest import count, dilations, shake_norms
from torch import nn
from torchvision.models import resnet50, segmentation

from segmentation.architectures.deeplabv3 import CascadedModules, DeepLabV3
from segmentation.errors import UserError


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: DeepLabV3(21), 39_638_869),
        (lambda: DeepLabV3(21, aux_loss_weight=0.5), 42_004_074),
        (lambda: DeepLabV3(21, "resnet50", output_stride=16), 39_638_869),
        (lambda: DeepLabV3(21, "resnet101"), 58_630_997),
        (lambda: DeepLabV3(21, "resnet101", aux_loss_weight=0.5), 60_996_202),
        (lambda: DeepLabV3(21, "mobilenet_v3_large"), 11_025_477),
        (lambda: DeepLabV3(21, "mobilenet_v3_large", aux_loss_weight=0.5), 11_029_328),
        (lambda: DeepLabV3(21, "resnet101", "paper"), 58_040_661),
        (lambda: DeepLabV3(21, "resnet101", "paper", output_stride=8), 58_040_661),
        (lambda: DeepLabV3(21, "resnet50", "paper"), 39_048_533),
    ],
)
def test_parameter_counts_equal_the_papers(build, parameters):
    with torch.device("meta"):
        model = build()
    assert count(model) == parameters


PEERS = {
    "resnet50": segmentation.deeplabv3_resnet50,
    "resnet101": segmentation.deeplabv3_resnet101,
    "mobilenet_v3_large": segmentation.deeplabv3_mobilenet_v3_large,
}


@pytest.mark.parametrize("backbone", PEERS)
@pytest.mark.parametrize("size", [(64, 96), (97, 75)])
def test_deeplabv3_gives_torchvisions_logits(backbone, size, tmp_path):
    peer = shake_norms(PEERS[backbone](weights=None, weights_backbone=None, num_classes=21, aux_loss=True))
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = DeepLabV3(21, backbone, aux_loss_weight=0.5, weights=str(tmp_path / "peer.pth")).eval()
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        theirs = peer(image)["out"]
        assert 0.05 < theirs.std() < 20  # logits that differ from pixel to pixel, so that a match proves something
        torch.testing.assert_close(ours(image), theirs, atol=1e-4, rtol=0)


def test_deeplabv3_training_gives_torchvisions_main_and_aux_scores(tmp_path):
    peer = shake_norms(PEERS["resnet50"](weights=None, weights_backbone=None, num_classes=5, aux_loss=True)).train()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = DeepLabV3(5, aux_loss_weight=0.5, weights=str(tmp_path / "peer.pth")).train()
    for module in (*peer.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    image, mask = torch.rand(2, 3, 65, 65), torch.randint(0, 5, (2, 65, 65))
    theirs = peer(ours.preprocess(image))
    terms = ours.losses({"image": image, "mask": mask})
    torch.testing.assert_close(terms["main"], F.cross_entropy(theirs["out"], mask), atol=1e-4, rtol=0)
    torch.testing.assert_close(terms["aux"], 0.5 * F.cross_entropy(theirs["aux"], mask), atol=1e-4, rtol=0)


def test_weights_of_another_class_count_leave_the_classifier_random(tmp_path, caplog, capsys):
    peer = PEERS["resnet50"](weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "peer.pth")
    ours = DeepLabV3(4, weights=str(tmp_path / "peer.pth"))
    torch.testing.assert_close(ours.classifier[1].weight, peer.classifier[1].weight)
    assert ours.classifier[4].weight.shape[0] == 4
    said = capsys.readouterr().err + caplog.text
    assert "classifier.4. keeps its random initialisation, as it has 21 outputs in the file and 4 here" in said
    assert "aux_classifier. dropped, as this network has none" in said


def test_missing_batch_norm_statistics_are_not_passed_over(tmp_path):
    state = PEERS["resnet50"](weights=None, weights_backbone=None, num_classes=21).state_dict()
    del state["backbone.bn1.running_mean"]
    torch.save(state, tmp_path / "peer.pth")
    with pytest.raises(ValueError, match=r"backbone.bn1.running_mean: absent in the file"):
        DeepLabV3(21, weights=str(tmp_path / "peer.pth"))


def test_weights_of_another_network_are_refused_with_keys_and_shapes(tmp_path):
    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"do not fit: conv1.weight: \(64, 3, 7, 7\) in the file, absent"):
        DeepLabV3(21, weights=str(tmp_path / "resnet.pth"))


@pytest.mark.parametrize(("stride", "rates"), [(16, [2, 4, 8]), (8, [4, 8, 16])])
def test_multi_grid_multiplies_the_rate_of_the_last_stage(stride, rates):
    """DeepLab v3, section 3.2.1: rates 2 * (1, 2, 4) at output stride 16, twice that at 8."""
    with torch.device("meta"):
        model = DeepLabV3(21, layout="paper", output_stride=stride)
    assert dilations(model.backbone.layer4) == rates
    assert dilations(model.backbone.layer3) == [16 // stride] * 6
    assert dilations(model.classifier[0]) == ([6, 12, 18] if stride == 16 else [12, 24, 36])


def test_cascaded_modules_double_the_rate():
    """Figure 3b: rates 2, 4, 8 and 16 of block4 to block7 at output stride 16, with multi-grid (1, 2, 1)."""
    with torch.device("meta"):
        model = DeepLabV3(21, layout="paper", cascade=True)
    assert isinstance(model.classifier[0], CascadedModules)
    assert dilations(model.backbone.layer4) == [2, 4, 2]
    assert dilations(model.classifier) == [4, 8, 4, 8, 16, 8, 16, 32, 16]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeepLabV3(21, "resnet18"), "backbone"),
        (lambda: DeepLabV3(21, output_stride=4), "output_stride"),
        (lambda: DeepLabV3(21, atrous_rates=[0]), "atrous_rates"),
        (lambda: DeepLabV3(21, weights="nowhere.pth"), "nowhere.pth"),
        (lambda: DeepLabV3(21, cascade=True), "layout: paper"),
        (lambda: DeepLabV3(21, "mobilenet_v3_large", "paper"), "layout: paper needs a ResNet"),
        (lambda: DeepLabV3(21, multi_grid=[1, 2]), "multi_grid"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
