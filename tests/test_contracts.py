"""Tests that every architecture passes, on narrow variants of all twelve."""

import pytest
import torch
from torch import nn

import segmentation
from segmentation import (
    FCN,
    DeconvNet,
    DeepLabV1,
    DeepLabV2,
    DeepLabV3,
    DeepLabV3Plus,
    FCDenseNet,
    MaskFormer,
    PSPNet,
    SegNet,
    UNet,
    UNet3Plus,
)
from segmentation.optimizer import parameter_groups

narrow = {"base_channels": 8}
FAMILY = {
    "fcn32s": (FCN, {"output_stride": 32, **narrow}),
    "fcn16s": (FCN, {"output_stride": 16, **narrow}),
    "fcn8s": (FCN, {"output_stride": 8, "learn_upsampling": True, **narrow}),
    "fcn resnet": (FCN, {"backbone": "resnet50", "aux_loss_weight": 0.5, **narrow}),
    "deeplabv1": (DeepLabV1, narrow),
    "deeplabv1 post": (DeepLabV1, {"fc7_padding": 1, "dropout": "channel", **narrow}),
    "deeplabv1 multi-scale": (DeepLabV1, {"multi_scale": True, **narrow}),
    "deeplabv2 vgg": (DeepLabV2, {"backbone": "vgg16", **narrow}),
    "deeplabv2 resnet": (DeepLabV2, {"backbone": "resnet50", **narrow}),
    "deeplabv2 single scale": (DeepLabV2, {"backbone": "resnet50", "scales": [1.0], **narrow}),
    "deeplabv3": (DeepLabV3, {"aux_loss_weight": 0.5, **narrow}),
    "deeplabv3 mobilenet": (DeepLabV3, {"backbone": "mobilenet_v3_large", "aux_loss_weight": 0.5, **narrow}),
    "deeplabv3 paper": (DeepLabV3, {"layout": "paper", **narrow}),
    "deeplabv3 cascade": (DeepLabV3, {"layout": "paper", "cascade": True, "output_stride": 8, **narrow}),
    "deeplabv3plus": (DeepLabV3Plus, {"backbone": "resnet50", **narrow}),
    "deeplabv3plus xception": (DeepLabV3Plus, {"backbone": "xception65", "output_stride": 8, **narrow}),
    "deeplabv3plus jfzhang95": (DeepLabV3Plus, {"backbone": "xception65", "layout": "jfzhang95", **narrow}),
    "deeplabv3plus VainF": (DeepLabV3Plus, {"backbone": "mobilenet_v2", "layout": "VainF", **narrow}),
    "deeplabv3plus mobilenet": (DeepLabV3Plus, {"backbone": "mobilenet_v3_large", **narrow}),
    "pspnet": (PSPNet, narrow),
    "unet": (UNet, narrow),
    "unet valid": (UNet, {"padding": "valid", "batch_norm": False, **narrow}),
    "unet bilinear": (UNet, {"up": "bilinear", "pixel_shuffle": 2, **narrow}),
    "unet3plus": (UNet3Plus, narrow),
    "unet3plus guided": (UNet3Plus, {"class_guidance": True, **narrow}),
    "segnet": (SegNet, narrow),
    "segnet basic": (SegNet, {"variant": "basic", **narrow}),
    "deconvnet": (DeconvNet, {"fc_channels": 256, **narrow}),
    "fcdensenet": (FCDenseNet, {"depth": 56, "growth_rate": 4, **narrow}),
    "maskformer": (MaskFormer, {"hidden_channels": 32, "num_queries": 12, "decoder_layers": 2, **narrow}),
}
SEED_OF_TEST = 3
each = pytest.mark.parametrize("name", FAMILY)


def build(name: str, num_classes: int = 5, **kwargs) -> segmentation.SegmentationModule:
    torch.manual_seed(SEED_OF_TEST)
    architecture, arguments = FAMILY[name]
    model = architecture(num_classes, **arguments, **kwargs)
    for module in model.modules():  # with the initial statistics, batch norm changes nothing in evaluation
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.7, 1.4)
    return model


def batch(size: tuple[int, int] = (64, 64), num_classes: int = 5, name: str = "", cells: int = 4) -> dict:
    """Build two images of random labels in a grid; the brightness of a pixel shows its label."""
    torch.manual_seed(SEED_OF_TEST)
    if name == "unet valid":  # trains on crops of 16 n + 12 pixels
        size = (188, 188)
    mask = torch.randint(0, max(2, num_classes), (2, 1, cells, cells)).float()
    mask = nn.functional.interpolate(mask, size, mode="nearest")[:, 0].long()
    image = torch.rand(2, 3, *size) * 0.3 + mask[:, None] / 8
    mask[:, :3] = 255
    return {"image": image, "mask": mask, "name": ["0", "1"]}


def test_the_family_is_complete():
    classes = {getattr(segmentation, name) for name in segmentation.__all__} - {segmentation.SegmentationModule}
    assert len(classes) == 12 and {architecture for architecture, _ in FAMILY.values()} == classes


@each
@pytest.mark.parametrize(("size", "num_classes"), [((61, 47), 5), ((33, 64), 1), ((7, 1), 2)])
def test_logits_have_the_images_size_for_any_size_and_number_of_classes(name, size, num_classes):
    model = build(name, num_classes).eval()
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, num_classes, *size) and torch.isfinite(logits).all()
        probs = model.probabilities(logits)
    assert probs.min() >= 0 and probs.max() <= 1
    if num_classes > 1:
        torch.testing.assert_close(probs.sum(1), torch.ones(2, *size))


@pytest.mark.parametrize(
    "full_width",
    [
        lambda k: DeepLabV1(k),
        lambda k: DeepLabV1(k, fc7_padding=1),
        lambda k: DeepLabV3(k, "mobilenet_v3_large"),
        lambda k: DeepLabV3(k, output_stride=16),
        lambda k: UNet(k, base_channels=4),
        lambda k: UNet(k, base_channels=4, padding="valid", batch_norm=False),
        lambda k: UNet(k, base_channels=4, pixel_shuffle=2),
    ],
)
@pytest.mark.parametrize(("classes", "size"), [(1, (33, 70)), (5, (1, 9)), (3, (64, 64))])
def test_logits_have_the_inputs_size_for_any_size_and_class_count(full_width, classes, size):
    model = full_width(classes).eval()
    with torch.inference_mode():
        logits = model(torch.randn(1, 3, *size))
        assert logits.shape == (1, classes, *size)
        assert torch.isfinite(logits).all()
        total = model.probabilities(logits).sum(1)
    if classes > 1:
        torch.testing.assert_close(total, torch.ones_like(total))


@each
@pytest.mark.parametrize("num_classes", [1, 5])
def test_every_parameter_gets_a_gradient(name, num_classes):
    model = build(name, num_classes).train()
    sum(model.losses(batch(num_classes=num_classes, name=name)).values()).backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    grouped = {id(p) for group in parameter_groups(model) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


@each
def test_evaluation_is_deterministic_and_knows_no_neighbours_in_the_batch(name):
    model = build(name).eval()
    image = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        both = model(image)
        torch.testing.assert_close(model(image), both, atol=0, rtol=0)
        torch.testing.assert_close(model(image[1:]), both[1:], atol=1e-4, rtol=1e-4)


@each
def test_other_bands_than_rgb(name):
    bands = {"in_channels": 2, "mean": [0.5] * 2, "std": [0.25] * 2}
    model = build(name, **bands).eval()
    with torch.inference_mode():
        assert model(model.preprocess(torch.zeros(1, 2, 40, 56, dtype=torch.uint16))).shape == (1, 5, 40, 56)


@each
def test_ignored_pixels_change_neither_loss_nor_metric(name):
    """An image whose pixels are all 255 adds nothing to the loss of another; a batch of such images has loss 0."""
    model = build(name).eval()
    torch.manual_seed(SEED_OF_TEST)
    pair = batch(name=name)
    pair["mask"][1] = 255
    alone = {"image": pair["image"][:1], "mask": pair["mask"][:1], "name": ["0"]}
    with torch.no_grad():
        together, single = model.losses(pair), model.losses(alone)
        for term, value in single.items():
            torch.testing.assert_close(together[term], value, atol=1e-4, rtol=1e-4, msg=term)
        model.validation_step(pair, 0)
    matrix = model.confusion.compute()
    assert matrix.sum() == (pair["mask"] != 255).sum()
    model.train()
    pair["mask"][:] = 255
    loss = sum(model.losses(pair).values())
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@each
def test_a_checkpoint_builds_the_same_network_again(name, tmp_path):
    model = build(name).eval()
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    again = FAMILY[name][0](**loaded["segmentation"]["init_args"])
    again.on_load_checkpoint(loaded)
    again.load_state_dict(loaded["state_dict"])
    by_path = build(name, weights=str(tmp_path / "x.ckpt"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in by_path.state_dict().items() if k[-4:] != "cked")
    image = torch.randn(1, 3, 40, 56)
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(image), model(image), atol=0, rtol=0)


@each
def test_channels_last_gives_the_same_logits(name):
    model, image = build(name).eval(), torch.randn(1, 3, 64, 48)
    with torch.inference_mode():
        expected = model(image)
        model.to(memory_format=torch.channels_last)
        logits = model(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@each
def test_bfloat16_stays_finite(name):
    model = build(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.losses(batch(name=name))
        loss = sum(terms.values())
        logits = model.eval()(torch.rand(1, 3, 64, 64))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@each
def test_the_captured_graph_gives_the_same_scores(name):
    """``compile: true`` captures this graph. The next test runs the code that torch generates from such graphs."""
    model, image = build(name).eval(), torch.randn(1, 3, 188, 188)
    captured = torch.compile(model.score_maps, backend="aot_eager")
    with torch.no_grad():
        expected, maps = model.score_maps(image), captured(image)
    for key, value in expected.items():
        torch.testing.assert_close(maps[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deeplabv2 single scale", "pspnet", "segnet", "maskformer"])
def test_compiled_code_gives_the_same_scores(name):
    model, image = build(name).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.score_maps(image)["main"]
        torch.testing.assert_close(torch.compile(model.score_maps)(image)["main"], expected, atol=1e-4, rtol=1e-4)


# Cells of 16 pixels are too fine for scores of stride 32, for a loss that sees every eighth label, and for DeconvNet,
# which passes the whole image through one vector: these learn one label per image.
COARSE = ("fcn32s", "deconvnet", *(name for name in FAMILY if name.startswith(("deeplabv1", "deeplabv2"))))
# With a padded fc7, the scores at the border do not depend on the image. The smallest crop of the valid U-Net has its
# loss in the middle 4 x 4 pixels only.
BORDER = {"deeplabv1 post", "unet valid"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILY.keys() - BORDER))
def test_one_batch_can_be_overfitted(name):
    model, data = build(name).train(), batch(name=name, cells=1 if name in COARSE else 4)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    valid = data["mask"] != 255

    def accuracy() -> float:
        with torch.no_grad():  # in training mode: running statistics lag behind so few steps
            labels = model.labels(model.probabilities(model(model.preprocess(data["image"]))))
        return float((labels == data["mask"])[valid].float().mean())

    first = accuracy()
    for step in range(200):
        optimizer.zero_grad()
        sum(model.losses(data).values()).backward()
        optimizer.step()
        if step % 20 == 19 and accuracy() > 0.95:
            break
    assert first < 0.6 and accuracy() > 0.95
