"""The shared steps: optimizer groups, schedule, losses, metrics; compared with torch or values computed by hand."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import Fixed, column, config, draw_tree, succeed
from PIL import Image
from torch import nn
from trees import draw_isbi_em

from segmentation import DeepLabV1, DeepLabV3, UNet
from segmentation.base import SegmentationModule
from segmentation.losses import CrossEntropy
from segmentation.metrics import confusion_metrics
from segmentation.optimizer import parameter_groups, poly

CAFFE = {"head_lr_mult": 10, "bias_lr_mult": 2, "bias_weight_decay": 0}


def small(**kwargs) -> UNet:
    return UNet(3, base_channels=4, **kwargs)


def test_caffe_groups_of_deeplabv1():
    """1x and 2x for the backbone's weights and biases, 10x and 20x for fc8's, no decay of biases."""
    model = DeepLabV1(21, optimizer=lambda p: torch.optim.SGD(p, lr=0.001, weight_decay=5e-4), **CAFFE)
    optimizer = model.optimizer(parameter_groups(model))
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert {k: g["lr_mult"] for k, g in groups.items()} == {
        "backbone_weight": 1, "backbone_bias": 2, "head_weight": 10, "head_bias": 20
    }  # fmt: skip
    assert {k: g["weight_decay"] for k, g in groups.items()} == {
        "backbone_weight": 5e-4, "backbone_bias": 0, "head_weight": 5e-4, "head_bias": 0
    }  # fmt: skip
    assert groups["head_weight"]["params"][0] is model.fc8.weight and groups["head_bias"]["params"][0] is model.fc8.bias
    assert sum(p.numel() for g in groups.values() for p in g["params"]) == 20_505_429


def test_frozen_batch_norm_stays_in_eval_and_out_of_the_optimizer():
    model = DeepLabV3(4, freeze_bn=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    grouped = {id(p) for g in parameter_groups(model) for p in g["params"]}
    assert norms and not any(n.training for n in norms) and model.backbone.training
    assert not any(id(p) in grouped for n in norms for p in n.parameters())
    assert len(grouped) == len(list(model.parameters())) - 2 * len(norms)


def test_poly_is_the_papers_formula_with_linear_warmup():
    factor = poly(100, power=0.9)
    assert [factor(step) for step in (0, 50, 99)] == pytest.approx([1.0, 0.5**0.9, 0.01**0.9])
    assert factor(100) == 0
    warm = poly(100, warmup_steps=4)
    assert [warm(step) for step in (0, 1, 4)] == pytest.approx([0.2, 0.4 * 0.99**0.9, 0.96**0.9])


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_cross_entropy_is_torchs_where_something_is_labelled(weights):
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 5, 7), torch.randint(0, 3, (2, 5, 7))
    mask[0, :2] = 255
    weight = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(logits, mask, weight, ignore_index=255)
    torch.testing.assert_close(CrossEntropy(weights)(logits, mask), expected)
    binary = CrossEntropy()(logits[:, :1], mask.clamp(max=1).masked_fill(mask == 255, 255))
    keep = mask != 255
    target = mask.clamp(max=1)[keep].float()
    torch.testing.assert_close(binary, F.binary_cross_entropy_with_logits(logits[:, 0][keep], target))


def test_a_crop_of_ignored_pixels_gives_zero_loss_and_zero_gradients():
    model = small().train()
    batch = {"image": torch.rand(2, 3, 32, 32), "mask": torch.full((2, 32, 32), 255), "name": ["a", "b"]}
    assert torch.isnan(F.cross_entropy(model(batch["image"]), batch["mask"], ignore_index=255))  # what torch gives
    loss = model.losses(batch)["main"]
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_validation_loss_of_weighted_classes_does_not_depend_on_the_batches():
    torch.manual_seed(0)
    images, masks = torch.rand(4, 3, 16, 16), torch.randint(0, 3, (4, 16, 16))
    masks[0], masks[1, :8] = 2, 255
    losses = []
    for size in (1, 4):
        torch.manual_seed(1)
        model = small(class_weights=[0.2, 1.0, 5.0]).eval()
        for start in range(0, 4, size):
            model.validation_step({"image": images[start : start + size], "mask": masks[start : start + size]}, 0)
        losses.append(model.mean_loss.compute())
    torch.testing.assert_close(losses[0], losses[1])


def test_arguments_that_void_each_other_are_refused():
    with pytest.raises(ValueError, match="class_weights"):
        small(loss=CrossEntropy(), class_weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="warmup_steps"):
        small(warmup_steps=5, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))


def test_scores_of_a_hand_made_matrix():
    """Truth: 4 pixels of a (3 found, 1 predicted as b), 2 of b (both found), none of c and d."""
    matrix = torch.tensor([[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    values = confusion_metrics(matrix, ["a", "b", "c", "d"])
    assert values["iou/a"] == 3 / 4 and values["iou/b"] == pytest.approx(2 / 3) and values["iou/d"].isnan()
    assert values["miou"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert values["pixel_acc"] == pytest.approx(5 / 6)
    assert values["mean_acc"] == pytest.approx((3 / 4 + 1) / 2)
    assert values["fwiou"] == pytest.approx((4 * 3 / 4 + 2 * 2 / 3) / 6)
    matrix[1, 2] = 1  # c is predicted but never true: it counts in miou with 0
    assert confusion_metrics(matrix, ["a", "b", "c", "d"])["miou"] == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)


def test_evaluation_sums_one_matrix_and_drops_255():
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, [0, 1, 1, 2], 0, [0, 1, 2, 3]] = 5.0
    model = Fixed(3, lambda image: logits).eval()
    batch = {"image": torch.zeros(1, 3, 1, 4, dtype=torch.uint8), "mask": torch.tensor([[[0, 1, 2, 255]]])}
    model.validation_step(batch, 0)
    model.validation_step(batch, 1)
    assert model.confusion.compute().tolist() == [[2, 0, 0], [0, 2, 0], [0, 2, 0]]


def test_a_binary_model_has_one_logit_for_two_classes():
    logits = torch.tensor([[[[3.0, -3.0, 0.1, -0.1]]]])
    model = Fixed(1, lambda image: logits).eval()
    batch = {"image": torch.zeros(1, 3, 1, 4, dtype=torch.uint8), "mask": torch.tensor([[[1, 1, 0, 255]]])}
    out = model.validation_step(batch, 0)
    assert model.confusion.compute().tolist() == [[0, 1], [1, 1]]
    expected = F.binary_cross_entropy_with_logits(logits[0, 0, 0, :3], torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(out["loss"], expected)
    assert model.predict_step({**batch, "name": ["a"], "size": [(1, 4)]}, 0)["probs"].shape == (1, 1, 1, 4)


def test_preprocess_scales_by_the_storage_type():
    model = small(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    for dtype, full in ((torch.uint8, 255), (torch.uint16, 65535), (torch.float32, 1.0)):
        image = torch.full((1, 3, 2, 2), full, dtype=dtype)
        torch.testing.assert_close(model.preprocess(image), torch.full((1, 3, 2, 2), 2.0))
    assert model.preprocess(torch.zeros(1, 3, 4, 4)).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="1 channels"):
        model.preprocess(torch.zeros(1, 1, 2, 2))


@pytest.mark.slow
def test_compile_gives_the_same_logits_and_leaves_no_trace_in_the_state_dict():
    torch.manual_seed(0)
    model = small(compile=True).eval()
    image = torch.randn(1, 3, 32, 32)
    plain, keys = model(image), set(model.state_dict())
    model.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.setup("test")
    assert "score_maps" in vars(model)
    torch.testing.assert_close(model(image), plain, atol=1e-5, rtol=1e-4)
    assert set(model.state_dict()) == keys


@pytest.mark.slow
def test_compiled_runs_train_and_validate_images_of_several_sizes(tmp_path):
    """Validation runs first, so training meets a second size, and validation a third."""
    tree = draw_tree(tmp_path / "tree", {"train": 4, "val": 2})
    for path in (tree / "images/val/01.jpg", tree / "masks/val/01.png"):
        with Image.open(path) as picture:
            picture.crop((0, 0, 40, 41)).save(path)
    losses = []
    for compiled in ("true", "false"):
        name = f"compile_{compiled}"
        file = config(tmp_path, tree, name, max_epochs="max_epochs: 1", batch_size="batch_size: 2")
        succeed("fit", "--config", file, "--model.compile", compiled, cwd=tmp_path, timeout=600)
        run = tmp_path / "logs" / name / "version_0"
        losses.append(column(run, "train/loss") + column(run, "val/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("mean", "said"), [(0.4908, False), (0.25, True)])
def test_a_mean_other_than_the_data_set_states_is_said(mean, said, tmp_path):
    draw_isbi_em(tmp_path / "isbi", 8, 64)
    model = ["--model", "UNet", "--model.num_classes", 2, "--model.in_channels", 1, "--model.base_channels", 4]
    scale = ["--model.mean", f"[{mean}]", "--model.std", "[0.1708]"]
    data = ["--data", "ISBIEM", "--data.root", tmp_path / "isbi", "--data.batch_size", 2, "--data.num_workers", 0]
    out = succeed("fit", *model, *scale, *data, "--trainer.max_steps", 1, "--trainer.accelerator", "cpu", cwd=tmp_path)
    line = f"model.mean is [{mean}], but ISBIEM states [0.4908]: the images are normalised by model.mean"
    assert (line in out) is said and "model.std is" not in out


def test_every_public_architecture_is_a_segmentation_module():
    import segmentation

    for name in segmentation.__all__:
        assert issubclass(getattr(segmentation, name), SegmentationModule)
