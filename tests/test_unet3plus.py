"""UNet 3+ against its published counts, a second implementation, torchmetrics' MS-SSIM and values computed by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from segmentation.architectures.unet3plus import UNet3Plus, focal_loss, guidance_loss, iou_loss, ms_ssim_loss, one_hot
from segmentation.losses import CrossEntropy


def shake(module: nn.Module) -> nn.Module:
    """Random batch-norm statistics and affine parameters: the initial ones change nothing."""
    torch.manual_seed(1)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.2)
            nn.init.normal_(m.bias, 0, 0.2)
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.bias, 0, 0.1)
    return module.eval()


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: UNet3Plus(21, deep_supervision=False), 27_029_397),
        (lambda: UNet3Plus(1, deep_supervision=False), 26_971_777),
        (lambda: UNet3Plus(21), 27_029_397 + 375_060),
        (lambda: UNet3Plus(1, deep_supervision=False, class_guidance=True), 26_971_777 + 2_050),
    ],
)
def test_parameter_counts_equal_the_papers(build, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


def test_operations_equal_the_papers():
    """The coarse maps are enlarged before their convolutions; the other order would need far fewer operations."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet3Plus(21, deep_supervision=False).eval()(torch.empty(1, 3, 320, 320))
    assert counter.get_total_flops() / 2e9 == pytest.approx(314.73, abs=0.005)


def layer(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    x = F.conv2d(x, conv.weight, conv.bias, padding=1)
    return F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5))


def written_down(model: UNet3Plus, image: Tensor) -> list[Tensor]:
    """Compute the scores of the five scales at the image's size; every map is resized by its sides only."""
    height, width = image.shape[-2:]
    x = F.pad(image, (0, -width % 16, 0, -height % 16), mode="reflect")
    full = x.shape[-2:]
    encoder = []
    for block in (model.down1, model.down2, model.down3, model.down4, model.bottom):
        x = F.max_pool2d(encoder[-1], 2) if encoder else x
        encoder.append(layer(block[3], block[4], layer(block[0], block[1], x)))
    decoder = {5: encoder[4]}
    for stage, block in ((4, model.up4), (3, model.up3), (2, model.up2), (1, model.up1)):
        size = encoder[stage - 1].shape[-2:]
        parts = []
        for level, (conv, norm, _) in enumerate(block.branches, start=1):
            x = encoder[level - 1] if level <= stage else decoder[level]
            x = F.adaptive_max_pool2d(x, size) if level < stage else F.interpolate(x, size, mode="bilinear")
            parts.append(layer(conv, norm, x))
        decoder[stage] = layer(block.fuse[0], block.fuse[1], torch.cat(parts, 1))
    outputs = []
    for stage, conv in enumerate([model.classifier, *model.sides], start=1):
        scores = F.conv2d(decoder[stage], conv.weight, conv.bias, padding=1)
        outputs.append(F.interpolate(scores, full, mode="bilinear")[..., :height, :width])
    return outputs


@pytest.mark.parametrize("size", [(64, 80), (61, 47), (16, 33)])
def test_all_five_outputs_are_the_papers_graph(size):
    model = shake(UNet3Plus(3, base_channels=4, freeze_bn=True))
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = written_down(model, image)
        assert all(scores.std() > 0.05 for scores in expected)
        torch.testing.assert_close(model(image), expected[0], atol=1e-5, rtol=1e-4)
        assert list(model.score_maps(image)) == ["main"]
        maps = model.train().score_maps(image)
    assert list(maps) == ["main", "side2", "side3", "side4", "side5"]
    for ours, theirs in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (37, 18)])
def test_any_size_has_logits_and_finite_losses(classes, size):
    model = UNet3Plus(classes, base_channels=2, class_guidance=True, freeze_bn=True).train()
    image, mask = torch.rand(2, 3, *size), torch.randint(0, max(2, classes), (2, *size))
    terms = model.losses({"image": image, "mask": mask})
    assert len(terms) == 16 and all(torch.isfinite(term) for term in terms.values())
    assert model(image).shape == model.eval()(image).shape == (2, classes, *size)


# The hybrid loss


def blobs(*shape: int) -> tuple[Tensor, Tensor]:
    """Draw a smooth map of probabilities and a target that it partly follows."""
    torch.manual_seed(2)
    target = (F.avg_pool2d(torch.randn(shape), 7, 1, 3) > 0).float()
    return (0.6 * target + 0.3 * F.avg_pool2d(torch.rand(shape), 3, 1, 1)).clamp(0, 1), target


EXPONENTS = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]


@pytest.mark.parametrize(
    ("size", "scales"), [((176, 192), 5), ((175, 181), 4), ((61, 47), 3), ((43, 90), 2), ((11, 20), 1)]
)
def test_ms_ssim_is_made_of_torchmetrics_ssim(size, scales):
    probs, target = (x.double() for x in blobs(2, 3, *size))
    loss = ms_ssim_loss(probs, target, torch.ones(2, 1, *size, dtype=torch.bool))
    p, g = (x.flatten(0, 1)[:, None] for x in (probs, target))  # each class of each image by itself
    similarity = torch.ones(6, dtype=torch.float64)
    for scale, exponent in enumerate(EXPONENTS[:scales]):
        _, values = ssim(p, g, data_range=1.0, reduction="none", return_contrast_sensitivity=True)
        if scale == scales - 1:  # the only scale with luminance; whole windows, as for contrast
            _, image = ssim(p, g, data_range=1.0, reduction="none", return_full_image=True)
            values = image[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
        similarity *= values ** (exponent * sum(EXPONENTS) / sum(EXPONENTS[:scales]))
        p, g = F.avg_pool2d(p, 2), F.avg_pool2d(g, 2)
    assert 0.05 < loss < 0.95
    torch.testing.assert_close(loss, 1 - similarity.mean(), atol=1e-6, rtol=0)


def test_ms_ssim_of_even_maps_is_their_luminance_once_whatever_is_ignored():
    """0.8 where 1 is right: no contrast to lose, so 1 - luminance ** 0.1333, on the coarsest scale alone."""
    luminance = (2 * 0.8 * 1.0 + 1e-4) / (0.8**2 + 1.0 + 1e-4)
    target = torch.ones(1, 1, 176, 180, dtype=torch.float64)
    for labelled in (target > 0, torch.rand_like(target) > 0.5):
        loss = ms_ssim_loss(0.8 * target * labelled, target * labelled, labelled)
        assert loss.item() == pytest.approx(1 - luminance**0.1333, abs=1e-9)


def test_ms_ssim_takes_its_statistics_from_labelled_pixels_window_by_window():
    """Compute two scales pixel by pixel: the mean over windows, weighted by the labelled share of each."""
    probs, target = (x[0, 0].double().numpy() for x in blobs(1, 1, 22, 24))
    share = (np.random.default_rng(0).random((22, 24)) > 0.5).astype(float)
    share[:, 11:20] = 0
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    labelled = torch.from_numpy(share)[None, None] > 0
    loss = ms_ssim_loss(torch.from_numpy(probs)[None, None], torch.from_numpy(target)[None, None], labelled)
    similarity = 1.0
    for scale in range(2):
        total = weights = 0.0
        for y, x in itertools.product(*(range(side - 10) for side in probs.shape)):
            part = np.s_[y : y + 11, x : x + 11]
            w, p, g = window * share[part], probs[part], target[part]
            if w.sum() == 0:
                continue
            mean_p, mean_g = np.average(p, weights=w), np.average(g, weights=w)
            covariance = np.average((p - mean_p) * (g - mean_g), weights=w)
            variances = np.average((p - mean_p) ** 2, weights=w) + np.average((g - mean_g) ** 2, weights=w)
            value = (2 * covariance + 0.0009) / (variances + 0.0009)
            if scale == 1:
                value *= (2 * mean_p * mean_g + 0.0001) / (mean_p**2 + mean_g**2 + 0.0001)
            total, weights = total + w.sum() * value, weights + w.sum()
        similarity *= (total / weights) ** (EXPONENTS[scale] * sum(EXPONENTS) / sum(EXPONENTS[:2]))
        if scale == 0:
            sums = [x.reshape(11, 2, 12, 2).sum(axis=(1, 3)) for x in (probs * share, target * share, share)]
            probs, target = (np.divide(x, sums[2], out=np.zeros_like(x), where=sums[2] > 0) for x in sums[:2])
            share = sums[2] / 4
    assert loss.item() == pytest.approx(1 - similarity, abs=1e-9)


def test_ms_ssim_has_finite_gradients_for_opposites_and_for_perfection():
    target = one_hot(torch.randint(0, 2, (1, 48, 48)), 1)
    for start in (1 - target, target):
        probs = start.clone().requires_grad_()
        loss = ms_ssim_loss(probs, target, torch.ones(1, 1, 48, 48, dtype=torch.bool))
        loss.backward()
        assert loss.item() == pytest.approx(float(start[0, 0, 0, 0] != target[0, 0, 0, 0]), abs=1e-3)
        assert torch.isfinite(probs.grad).all()


def test_ms_ssim_gradient_equals_finite_differences():
    probs, target = (x.double() for x in blobs(1, 2, 22, 23))
    labelled = torch.rand(1, 1, 22, 23) > 0.3
    probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: ms_ssim_loss(p, target, labelled), probs, atol=1e-5, fast_mode=True)


def test_focal_and_iou_by_hand():
    probability = torch.tensor([[0.9, 0.2], [0.5, 0.6]])
    mask = torch.tensor([[[1, 1], [0, 255]]])
    focal = [0.1**2 * math.log(1 / 0.9), 0.8**2 * math.log(1 / 0.2), 0.5**2 * math.log(1 / 0.5)]
    iou = 1 - (0.9 + 0.2) / (1 + 1 + 0.5)
    probs = probability[None, None]
    weight = (mask != 255).float()
    assert focal_loss(probs.logit(), mask, weight).item() == pytest.approx(sum(focal) / 3, rel=1e-5)
    assert iou_loss(probs, one_hot(mask, 1), mask[:, None] != 255).item() == pytest.approx(iou, rel=1e-5)
    # the same two classes under a softmax, and a third that does not occur
    three = torch.cat([1 - probs, probs, torch.zeros_like(probs)], 1)
    background = 1 - 0.5 / (0.1 + 0.8 + 1)
    assert focal_loss(three.clamp(min=1e-12).log(), mask, weight).item() == pytest.approx(sum(focal) / 3, rel=1e-5)
    loss = iou_loss(three, one_hot(mask, 3), mask[:, None] != 255)
    assert loss.item() == pytest.approx((iou + background) / 2, rel=1e-5)


def test_class_weights_and_pixel_weights_are_the_focal_losses():
    model = UNet3Plus(2, base_channels=2, class_weights=[1.0, 3.0])
    mask, weight = torch.tensor([[[0, 1, 1, 255]]]), torch.tensor([[[1.0, 2.0, 0.0, 5.0]]])
    scores = torch.log(torch.tensor([0.5, 0.25, 0.1, 0.9])).view(1, 1, 1, 4)
    scores = torch.cat([torch.log1p(-scores.exp()), scores], 1)
    terms = [0.5**2 * math.log(2), 0.75**2 * math.log(4), 0.9**2 * math.log(10)]
    plain = (terms[0] + 3 * terms[1] + 3 * terms[2]) / 7
    weighted = (terms[0] + 3 * 2 * terms[1]) / 7
    assert model.hybrid(scores, mask)["focal"].item() == pytest.approx(plain, rel=1e-5)
    assert model.hybrid(scores, mask, weight)["focal"].item() == pytest.approx(weighted, rel=1e-5)
    assert model.evaluation_loss(scores, mask).item() == pytest.approx(sum(model.hybrid(scores, mask).values()).item())


@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels_have_no_influence(classes):
    torch.manual_seed(0)
    model = UNet3Plus(classes, base_channels=2)
    mask = torch.randint(0, max(2, classes), (2, 50, 45))
    mask[0, 10:35, 20:] = 255
    mask[:, ::7] = 255
    ignored = (mask == 255)[:, None].expand(2, classes, 50, 45)
    scores = torch.randn(2, classes, 50, 45, requires_grad=True)
    terms = model.hybrid(scores, mask)
    other = model.hybrid(torch.where(ignored, 30 * torch.randn(scores.shape), scores), mask)
    for name, value in terms.items():
        torch.testing.assert_close(other[name], value, msg=name)
        (gradient,) = torch.autograd.grad(value, scores, retain_graph=True)
        assert (gradient[ignored] == 0).all() and gradient[~ignored].abs().sum() > 0, name
    # nor has an image without labels
    blank = model.hybrid(torch.cat([scores, scores]), torch.cat([mask, torch.full_like(mask, 255)]))
    for name, value in terms.items():
        torch.testing.assert_close(blank[name], value, msg=name)


def test_a_batch_without_labels_gives_zero_and_zero_gradients():
    model = UNet3Plus(3, base_channels=2, class_guidance=True).train()
    terms = model.losses({"image": torch.rand(2, 3, 32, 32), "mask": torch.full((2, 32, 32), 255)})
    assert all(term == 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_terms_are_the_paper_s_sum_and_an_injected_loss_replaces_them():
    batch = {"image": torch.rand(2, 3, 32, 32), "mask": torch.randint(0, 3, (2, 32, 32))}
    sides = ["main", "side2", "side3", "side4", "side5"]
    hybrid = UNet3Plus(3, base_channels=2, class_guidance=True).losses(batch)
    assert list(hybrid) == [f"{side}_{term}" for side in sides for term in ("focal", "ms_ssim", "iou")] + ["guidance"]
    assert list(UNet3Plus(3, base_channels=2, deep_supervision=False).losses(batch)) == [
        "main_focal", "main_ms_ssim", "main_iou"
    ]  # fmt: skip
    model = UNet3Plus(3, base_channels=2, hybrid_loss=False, freeze_bn=True).train()
    terms, maps = model.losses(batch), model.score_maps(model.preprocess(batch["image"]))
    assert list(terms) == sides
    for side in sides:
        torch.testing.assert_close(terms[side], F.cross_entropy(maps[side], batch["mask"]))
    injected = UNet3Plus(3, base_channels=2, loss=CrossEntropy([1.0, 2.0, 3.0]))
    assert list(injected.losses(batch)) == sides
    weights = torch.tensor([1.0, 2.0, 3.0])
    loss = injected.evaluation_loss(maps["main"], batch["mask"])
    torch.testing.assert_close(loss, F.cross_entropy(maps["main"], batch["mask"], weights))


# The classification-guided module


def answer(model: UNet3Plus, pairs: list[list[float]]) -> None:
    """Make the module give these scores of absence and presence per class for an image."""
    model.guidance[1].weight.data.zero_()
    model.guidance[1].bias.data = torch.tensor(pairs).flatten()


def test_an_image_without_the_organ_has_probability_zero_not_a_half():
    model = UNet3Plus(1, base_channels=2, class_guidance=True).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        answer(model, [[0.0], [1.0]])
        present = model(image)
        answer(model, [[1.0], [0.0]])
        absent = model(image)
    assert present.std() > 0 and present.abs().max() < 50  # as the decoder made it
    torch.testing.assert_close(absent, present - 100)
    assert model.probabilities(absent).max() < 1e-20 and model.labels(model.probabilities(absent)).sum() == 0


def test_every_class_has_its_own_gate():
    model = UNet3Plus(3, base_channels=2, class_guidance=True).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        answer(model, [[0.0] * 3, [1.0] * 3])
        free = model(image)
        answer(model, [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
        probs = model.probabilities(model(image))
        expected = free.clone()
        expected[:, 1] = -torch.inf
        torch.testing.assert_close(probs, expected.softmax(1), atol=1e-6, rtol=1e-4)
        answer(model, [[1.0] * 3, [0.0] * 3])
        torch.testing.assert_close(model.probabilities(model(image)), free.softmax(1), atol=1e-5, rtol=1e-3)


def test_guidance_is_taught_which_classes_the_mask_holds():
    mask = torch.full((3, 4, 4), 255)
    mask[0, 0, 0], mask[0, 3, 3], mask[1, 1, 2] = 0, 2, 1  # the third image has no label
    pairs = torch.tensor([[1.0, 2.0, 3.0, -1.0, 0.5, 4.0], [0.0, -2.0, 1.0, 0.3, 2.0, -3.0], [9.0] * 6])
    present = [[1, 0, 1], [0, 1, 0]]
    expected = 0.0
    for scores, classes in zip(pairs.tolist(), present, strict=False):
        for k in range(3):
            for score, truth in ((scores[k], 1 - classes[k]), (scores[3 + k], classes[k])):
                expected += math.log1p(math.exp(-score if truth else score)) / 12
    assert guidance_loss(pairs, mask).item() == pytest.approx(expected, rel=1e-5)
    organ = torch.tensor([[[0, 255]], [[0, 1]]])  # one class: its label is 1
    loss = guidance_loss(torch.tensor([[20.0, -20.0], [-20.0, 20.0]]), organ)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_guidance_looks_at_the_strongest_place_and_reaches_the_encoder():
    model = UNet3Plus(1, base_channels=2, class_guidance=True, freeze_bn=True).eval()
    x5 = torch.randn(2, 32, 3, 4)
    dropout, conv = model.guidance[0], model.guidance[1]
    assert dropout.p == 0.5
    expected = torch.einsum("nchw,oc->nohw", x5, conv.weight[:, :, 0, 0]).amax((2, 3)) + conv.bias
    torch.testing.assert_close(model.guidance(x5), expected)
    model.train()
    model.losses({"image": torch.rand(2, 3, 32, 32), "mask": torch.ones(2, 32, 32).long()})["guidance"].backward()
    assert conv.weight.grad.abs().sum() > 0 and model.down1[0].weight.grad.abs().sum() > 0
    assert model.up1.fuse[0].weight.grad is None


# Weights and arguments


def test_weights_with_other_heads_are_taken_as_far_as_they_fit(tmp_path, capsys, caplog):
    trained = shake(UNet3Plus(3, base_channels=2, class_guidance=True))
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    plain = UNet3Plus(3, base_channels=2, deep_supervision=False, weights=str(tmp_path / "w.pth")).eval()
    image = torch.randn(1, 3, 20, 20)
    trained.guidance = None
    with torch.inference_mode():
        torch.testing.assert_close(plain(image), trained(image))
    other = UNet3Plus(5, base_channels=2, class_guidance=True, weights=str(tmp_path / "w.pth"))
    torch.testing.assert_close(other.up1.fuse[0].weight, trained.up1.fuse[0].weight)
    said = capsys.readouterr().err + caplog.text
    assert (
        "sides. dropped" in said
        and "classifier. keeps its random initialisation, as it has 3 outputs in the file and 5 here" in said
    )
    with pytest.raises(ValueError, match="do not fit"):
        UNet3Plus(3, base_channels=4, weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(("classes", "weights"), [(3, [1.0, 2.0]), (1, [1.0]), (2, [1.0, 2.0, 3.0])])
def test_class_weights_of_another_number_are_refused(classes, weights):
    with pytest.raises(ValueError, match=f"class_weights has {len(weights)} values for {max(2, classes)} classes"):
        UNet3Plus(classes, base_channels=2, class_weights=weights)
