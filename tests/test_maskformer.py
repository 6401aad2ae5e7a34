"""MaskFormer compared with a second implementation; its losses with those of the best of all assignments."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.architectures.maskformer import MaskFormer, assign, dice_loss, focal_loss, sine_positions
from segmentation.losses import IGNORE, CrossEntropy
from segmentation.optimizer import parameter_groups


def narrow(classes: int = 3, network: type[MaskFormer] = MaskFormer, **arguments: object) -> MaskFormer:
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "hidden_channels": 16, "num_queries": 6, "decoder_layers": 3, "num_heads": 4}
    return network(classes, **{**sizes, **arguments})


class Decoded(MaskFormer):
    """MaskFormer whose network gives the masks and classes that a test sets."""

    maps: dict[str, Tensor]

    def network(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.maps["main"], self.maps["classes"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_those_of_the_paper():
    with torch.device("meta"):
        model = MaskFormer(21)
        assert count(model) == 41_274_710
        assert count(model.backbone) == 23_508_032
        assert count(model.pixel_decoder) == 7_540_480
        assert count(MaskFormer(150)) == 41_307_863
        assert count(MaskFormer(21, "resnet101")) == 60_266_838
        assert count(MaskFormer(21, aux_losses=False)) == 41_274_710


# The network


def normalise(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dims, keepdim=True)) / (x.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()


def second_writing(model: MaskFormer, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Compute class and mask logits after every decoder layer from the tensors, without torch's layers."""
    state, heads = model.state_dict(), model.transformer_decoder.layers[0].cross_attention.num_heads

    def conv_norm(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        groups = normalise(x.unflatten(1, (-1, 8)), (2, 3, 4)).flatten(1, 2)
        return groups * state[f"{name}.1.weight"][:, None, None] + state[f"{name}.1.bias"][:, None, None]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return normalise(x, (-1,)) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
        weights, biases = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True))
        results = []
        for qh, kh, vh in zip(*(x.chunk(heads, dim=2) for x in (q, k, v)), strict=True):
            similarity = qh @ kh.transpose(1, 2) / math.sqrt(qh.shape[2])
            exponentials = (similarity - similarity.amax(2, keepdim=True)).exp()
            results.append(exponentials / exponentials.sum(2, keepdim=True) @ vh)
        return linear(torch.cat(results, dim=2), f"{name}.out_proj")

    c2, c3, c4, c5 = model.backbone(image).values()
    x = conv_norm(c5, "pixel_decoder.top").clamp(min=0)
    for level, features in ((2, c4), (1, c3), (0, c2)):
        doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = conv_norm(features, f"pixel_decoder.laterals.{level}") + doubled
        x = conv_norm(x, f"pixel_decoder.outputs.{level}").clamp(min=0)
    pixels = F.conv2d(x, state["pixel_decoder.embedding.weight"], state["pixel_decoder.embedding.bias"], padding=1)

    name = "transformer_decoder.projection"
    memory = F.conv2d(c5, state[f"{name}.weight"], state[f"{name}.bias"])
    place = torch.zeros_like(memory)
    channels, height, width = memory.shape[1:]
    for c in range(channels):  # the first half encodes the row, the second half the column
        pair = c % (channels // 2) // 2
        wave = math.cos if c % 2 else math.sin
        for i in range(height):
            for j in range(width):
                share = (i + 1) / height if c < channels // 2 else (j + 1) / width
                place[:, c, i, j] = wave(2 * math.pi * share / 10000 ** (2 * pair / (channels // 2)))
    memory, place = memory.flatten(2).transpose(1, 2), place.flatten(2).transpose(1, 2)
    query = state["transformer_decoder.queries.weight"]
    x = torch.zeros(len(image), *query.shape, dtype=image.dtype)
    classes, masks = [], []
    for layer in range(len(model.transformer_decoder.layers)):
        name = f"transformer_decoder.layers.{layer}"
        x = layer_norm(x + attention(x + query, x + query, x, f"{name}.self_attention"), f"{name}.norm1")
        x = layer_norm(x + attention(x + query, memory + place, memory, f"{name}.cross_attention"), f"{name}.norm2")
        x = layer_norm(x + linear(linear(x, f"{name}.linear1").clamp(min=0), f"{name}.linear2"), f"{name}.norm3")
        segments = layer_norm(x, "transformer_decoder.norm")
        embedding = linear(segments, "mask_head.0").clamp(min=0)
        embedding = linear(linear(embedding, "mask_head.2").clamp(min=0), "mask_head.4")
        classes.append(linear(segments, "classifier"))
        masks.append((embedding @ pixels.flatten(2)).unflatten(2, pixels.shape[2:]))
    return classes, masks


def test_network_is_the_papers_graph():
    model = narrow(5, dropout=0.0).double().train()
    for module in (*model.pixel_decoder.modules(), *model.transformer_decoder.modules()):
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # the initial ones change nothing
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.3)
    model.backbone.eval()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        our_masks, our_classes = model.network(image)
        classes, masks = map(torch.stack, second_writing(model, image))
    for axis in (0, 2):  # layers and segments differ, so that a match proves something
        assert classes.std(dim=axis).mean() > 0.03 and masks.std(dim=axis).mean() > 0.03
    torch.testing.assert_close(our_classes, classes, atol=1e-6, rtol=0)
    torch.testing.assert_close(our_masks, masks, atol=1e-6, rtol=0)


def test_sine_positions_by_hand():
    positions = sine_positions(torch.empty(1, 8, 2, 3)).unflatten(0, (2, 3))
    row, column = 2 * math.pi * 1 / 2, 2 * math.pi * 3 / 3
    expected = [f(a) for a in (row, row / 100, column, column / 100) for f in (math.sin, math.cos)]
    torch.testing.assert_close(positions[0, 2], torch.tensor(expected), atol=1e-6, rtol=0)


def test_forward_weighs_masks_by_classes_and_leaves_no_object_out():
    model = narrow(2, Decoded).eval()
    classes = torch.tensor([[0.7, 0.1, 0.2], [0.0, 0.5, 0.5]]).log()[None, None]
    masks = torch.tensor([0.9, 0.2]).logit()[None, None, :, None, None].expand(1, 1, 2, 8, 8)
    model.maps = {"main": masks, "classes": classes}
    scores = model(torch.zeros(1, 3, 10, 7))
    assert scores.shape == (1, 2, 10, 7)
    torch.testing.assert_close(scores[0, 0], torch.full((10, 7), 0.7 * 0.9))
    torch.testing.assert_close(scores[0, 1], torch.full((10, 7), 0.1 * 0.9 + 0.5 * 0.2))
    torch.testing.assert_close(model.probabilities(scores)[0, :, 0, 0], torch.tensor([0.63, 0.19]) / 0.82)


def test_masks_are_interpolated_between_the_centres_of_their_pixels():
    model = narrow(2, Decoded).eval()
    ramp = torch.arange(8.0).expand(1, 1, 1, 8, 8) - 4
    model.maps = {"main": ramp, "classes": torch.tensor([[[[30.0, 0.0, 0.0]]]])}
    logits = [min(max((column + 0.5) / 4 - 0.5, 0), 7) - 4 for column in range(32)]
    torch.testing.assert_close(model(torch.zeros(1, 3, 32, 32))[0, 0, 9], torch.tensor(logits).sigmoid())


def test_forward_is_the_padded_images_cropped():
    model = narrow().eval()
    image = torch.randn(2, 3, 61, 47)
    padded = torch.zeros(2, 3, 64, 64)
    padded[..., :61, :47] = image
    with torch.inference_mode():
        torch.testing.assert_close(model(image), model(padded)[..., :61, :47])


def test_forward_in_training_is_that_of_evaluation():
    model = narrow(dropout=0.0, freeze_bn=True)
    image = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        assert [len(logits) for logits in model.train().network(image)] == [3, 3]
        trained = model(image)
        assert [len(logits) for logits in model.eval().network(image)] == [1, 1]
        torch.testing.assert_close(trained, model(image))


@pytest.mark.slow
def test_compiled_network_takes_images_of_any_size():
    model = narrow(decoder_layers=1).eval()
    image = torch.randn(1, 3, 61, 47)
    with torch.no_grad():
        compiled = torch.compile(model.score_maps, dynamic=True)(image)
        torch.testing.assert_close(compiled, model.score_maps(image), atol=1e-4, rtol=1e-4)


def test_order_of_queries_changes_nothing():
    model = narrow(dropout=0.0, freeze_bn=True).train()
    batch = {"image": torch.rand(2, 3, 64, 64), "mask": torch.randint(0, 3, (2, 64, 64))}
    with torch.no_grad():
        scores, terms = model(batch["image"]), model.losses(batch)
        queries = model.transformer_decoder.queries.weight
        queries.copy_(queries[[4, 2, 0, 5, 1, 3]])
        torch.testing.assert_close(model(batch["image"]), scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.losses(batch), terms, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("classes", "size"), [(1, (61, 47)), (5, (1, 9))])
def test_every_parameter_learns_at_any_size(classes, size):
    model = narrow(classes).train()
    mask = torch.randint(0, 2, (2, *size))
    terms = model.losses({"image": torch.rand(2, 3, *size), "mask": mask})
    sum(terms.values()).backward()
    still = {name for name, p in model.named_parameters() if not (p.grad is not None and p.grad.abs().sum() > 0)}
    idle = ("self_attention.in_proj_weight", "self_attention.out_proj.weight", "norm1.weight")
    # the self-attention of the first layer exchanges zeros as long as biases are 0
    assert still <= {f"transformer_decoder.layers.0.{name}" for name in idle}


# The losses


def by_hand(
    classes: np.ndarray, masks: np.ndarray, mask: np.ndarray, num_classes: int
) -> tuple[dict[str, float], list[tuple]]:
    """Compute the loss terms of one layer in loops; classes (N, Q, K + 1), masks (N, Q, h, w), mask (N, H, W)."""

    def focal(x: np.ndarray, y: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-x))
        terms = np.where(y, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
        return float(terms.mean()) if terms.size else 0.0

    def dice(x: np.ndarray, y: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-x))
        return float(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))

    height, width = mask.shape[1:]
    large = F.interpolate(torch.tensor(masks), scale_factor=4, mode="bilinear")[..., :height, :width].numpy()
    log_probs = classes - np.log(np.exp(classes).sum(-1, keepdims=True))
    entropies, importances, focals, dices, num_masks, chosen = [], [], 0.0, 0.0, 0, []
    for n in range(len(mask)):
        valid, few = mask[n] != IGNORE, mask[n][::4, ::4] != IGNORE
        if not valid.any():
            continue
        labels = [label for label in np.unique(mask[n][valid]) if num_classes > 1 or label == 1]
        index = [label - (num_classes == 1) for label in labels]
        small = masks[n][:, : few.shape[0], : few.shape[1]]
        cost = np.zeros((masks.shape[1], len(labels)))
        for q in range(len(cost)):
            for m, label in enumerate(labels):
                x, y = small[q][few], (mask[n] == label)[::4, ::4][few]
                cost[q, m] = 20 * focal(x, y) + dice(x, y) - np.exp(log_probs[n, q, index[m]])
        queries, truths = cost.shape
        if queries >= truths:
            pairings = [list(zip(order, range(truths), strict=True)) for order in permutations(range(queries), truths)]
        else:
            pairings = [list(zip(range(queries), order, strict=True)) for order in permutations(range(truths), queries)]
        best = min(pairings, key=lambda pairs: sum(cost[pair] for pair in pairs))
        target = np.full(queries, num_classes)
        for q, m in best:
            target[q] = index[m]
            x, y = large[n, q][valid], (mask[n] == labels[m])[valid]
            focals, dices = focals + focal(x, y), dices + dice(x, y)
        entropies += [-log_probs[n, q, target[q]] for q in range(queries)]
        importances += [0.1 if label == num_classes else 1.0 for label in target]
        num_masks += truths
        chosen.append(tuple(best))
    terms = {
        "class": float(np.average(entropies, weights=importances)),
        "mask": 20 * focals / max(1, num_masks),
        "dice": dices / max(1, num_masks),
    }
    return terms, chosen


def stub(classes: int = 3, layers: int = 3, images: int = 2, queries: int = 4, side: int = 8) -> Decoded:
    """Build a model that gives random logits; each is a leaf of the graph."""
    model = narrow(classes, Decoded)
    model.maps = {
        "main": 2 * torch.randn(layers, images, queries, side, side),
        "classes": torch.randn(layers, images, queries, classes + 1),
    }
    return model


@pytest.fixture
def costs(monkeypatch) -> list[Tensor]:
    """The costs of every assignment, in order."""
    seen = []

    def record(cost: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(cost)
        return assign(cost)

    monkeypatch.setattr("segmentation.architectures.maskformer.assign", record)
    return seen


@pytest.mark.parametrize(("classes", "queries"), [(3, 4), (1, 3), (5, 3)])
@pytest.mark.parametrize("size", [(32, 32), (27, 18)])
def test_losses_are_those_of_the_best_assignment(classes, queries, size):
    torch.manual_seed(classes)
    model = stub(classes, queries=queries)
    mask = torch.randint(0, max(2, classes), (2, *size))
    mask[0, 3:11, :9] = IGNORE
    mask[1][mask[1] == 0] = 1 if classes > 1 else 0  # an image without one of the classes
    terms = model.losses({"image": torch.zeros(2, 3, *size), "mask": mask})
    each = [
        by_hand(c.double().numpy(), m.double().numpy(), mask.numpy(), classes)
        for c, m in zip(model.maps["classes"], model.maps["main"], strict=True)
    ]
    if classes > 1:
        assert len({str(chosen) for _, chosen in each}) > 1  # each layer has its own assignment
    for name in ("class", "mask", "dice"):
        values = [layer[name] for layer, _ in each]
        assert terms[name].item() == pytest.approx(values[-1], rel=1e-4)
        assert terms[f"aux_{name}"].item() == pytest.approx(sum(values[:-1]), rel=1e-4)


def test_focal_and_dice_by_hand():
    logits, weight = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # the last pixel is ignored
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pixel = 0.5**2 * math.log(2)
    assert focal_loss(logits, truth, weight).item() == pytest.approx((0.25 + 0.75 + 0.75) * pixel / 3)
    assert dice_loss(logits, truth, weight).item() == pytest.approx(1 - (2 * 0.5 + 1) / (1.5 + 1 + 1))


def test_ignored_pixels_have_no_gradient():
    model = stub()
    model.maps["main"].requires_grad_()
    mask = torch.randint(0, 3, (2, 32, 32))
    mask[:, :, 16:] = IGNORE
    sum(model.losses({"image": torch.zeros(2, 3, 32, 32), "mask": mask}).values()).backward()
    gradient = model.maps["main"].grad.abs().sum(dim=(0, 1, 2, 3))
    assert (gradient[5:] == 0).all() and (gradient[:4] > 0).all()  # the column at the border reaches over it


def test_image_of_ignored_pixels_alone_adds_nothing():
    model, mask = stub(), torch.randint(0, 3, (2, 32, 32))
    mask[1] = IGNORE
    both = model.losses({"image": torch.zeros(2, 3, 32, 32), "mask": mask})
    model.maps = {name: value[:, :1] for name, value in model.maps.items()}
    torch.testing.assert_close(both, model.losses({"image": torch.zeros(1, 3, 32, 32), "mask": mask[:1]}))


@pytest.mark.parametrize("label", [IGNORE, 0])
def test_batch_without_masks_is_finite_and_reaches_every_parameter(label):
    model = narrow(1).train()
    terms = model.losses({"image": torch.rand(2, 3, 32, 32), "mask": torch.full((2, 32, 32), label)})
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())  # otherwise DDP waits
    assert terms["mask"] == terms["dice"] == terms["aux_mask"] == terms["aux_dice"] == 0
    assert terms["class"] == 0 if label == IGNORE else terms["class"] > 0


def test_weight_of_0_is_an_ignored_pixel(costs):
    model, mask = stub(), torch.randint(0, 3, (2, 32, 32))
    hidden = torch.rand(2, 32, 32) < 0.3
    image = torch.zeros(2, 3, 32, 32)
    expected = model.losses({"image": image, "mask": mask.masked_fill(hidden, IGNORE)})
    terms = model.losses({"image": image, "mask": mask, "pixel_weight": (~hidden).float()})
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(costs[:2], costs[2:])


def test_number_of_masks_is_the_mean_over_processes(monkeypatch):
    model, mask = stub(), torch.randint(0, 3, (2, 32, 32))
    batch = {"image": torch.zeros(2, 3, 32, 32), "mask": mask}
    alone = model.losses(batch)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda masks: masks.add_(2))  # 6 masks here, 2 there
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    shared = model.losses(batch)
    torch.testing.assert_close(shared["mask"], alone["mask"] * 6 / 4)
    torch.testing.assert_close(shared["aux_dice"], alone["aux_dice"] * 6 / 4)
    torch.testing.assert_close(shared["class"], alone["class"])


def test_losses_are_computed_in_float32_under_autocast(costs):
    model = stub()
    model.maps = {name: value.bfloat16() for name, value in model.maps.items()}
    batch = {"image": torch.zeros(2, 3, 32, 32), "mask": torch.randint(0, 3, (2, 32, 32))}
    expected = model.losses(batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.losses(batch)
    assert all(value.dtype == torch.float32 for value in terms.values())
    torch.testing.assert_close(terms, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(costs[2:], costs[:2], rtol=1e-6, atol=0)


def test_diverged_network_gives_a_loss_that_is_not_finite_instead_of_an_error():
    model = stub()
    model.maps["main"][:] = torch.nan
    terms = model.losses({"image": torch.zeros(2, 3, 32, 32), "mask": torch.randint(0, 3, (2, 32, 32))})
    assert not terms["mask"].isfinite()


# Evaluation, weights, arguments


@pytest.mark.parametrize("classes", [1, 3])
def test_evaluation_loss_is_the_negative_log_probability_of_labelled_pixels(classes):
    model, mask = narrow(classes), torch.randint(0, max(2, classes), (2, 9, 7))
    mask[:, 2:5] = IGNORE
    scores = 2 * torch.rand(2, classes, 9, 7) if classes > 1 else 0.1 + 0.8 * torch.rand(2, 1, 9, 7)
    probs = model.probabilities(scores)
    probs = torch.cat([1 - probs, probs], dim=1) if classes == 1 else probs
    torch.testing.assert_close(probs.sum(1), torch.ones(2, 9, 7))
    picked = [probs[n, mask[n, i, j], i, j].log() for n in range(2) for i in (0, 1, 5, 6, 7, 8) for j in range(7)]
    torch.testing.assert_close(model.evaluation_loss(scores, mask), -torch.stack(picked).mean())


def test_scores_of_nothing_and_of_more_than_one_stay_probabilities():
    zero, large = torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), 1.7)
    assert narrow().evaluation_loss(zero, torch.ones(1, 2, 2, dtype=torch.long)).item() == pytest.approx(math.log(3))
    assert (narrow(1).probabilities(large) == 1).all()
    assert narrow(1).evaluation_loss(large, torch.zeros(1, 2, 2, dtype=torch.long)).isfinite()


def test_heads_are_all_but_the_backbone_and_queries_are_decayed_like_norms():
    model = narrow(head_lr_mult=10, norm_weight_decay=0.0)
    groups = {group["name"]: group for group in parameter_groups(model)}
    names = {id(p): name for name, p in model.named_parameters()}
    backbone = {names[id(p)] for name in groups if name.startswith("backbone") for p in groups[name]["params"]}
    assert backbone == {name for name in names.values() if name.startswith("backbone.")}
    assert groups["head_weight"]["lr_mult"] == 10 and groups["head_norm"]["weight_decay"] == 0
    assert "transformer_decoder.queries.weight" in {names[id(p)] for p in groups["head_norm"]["params"]}


def test_weights_of_another_class_count_leave_the_classifier_fresh(tmp_path, capsys, caplog):
    trained = narrow(5)
    torch.save(trained.state_dict(), tmp_path / "five.pth")
    model = narrow(2, weights=str(tmp_path / "five.pth"))
    torch.testing.assert_close(model.transformer_decoder.queries.weight, trained.transformer_decoder.queries.weight)
    assert (
        "classifier. keeps its random initialisation, as it has 6 outputs in the file and 3 here"
        in capsys.readouterr().err + caplog.text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "backbone"),
        ({"hidden_channels": 36}, "hidden_channels 36 must be a multiple of 8 and of num_heads 4"),
        ({"hidden_channels": 40, "num_heads": 3}, "hidden_channels 40"),
        ({"num_queries": 0}, "num_queries"),
        ({"decoder_layers": 0}, "decoder_layers"),
        ({"loss": nn.CrossEntropyLoss()}, "loss"),
        ({"loss": CrossEntropy([1.0, 2.0, 3.0])}, "loss"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "class_weights"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        narrow(**arguments)
