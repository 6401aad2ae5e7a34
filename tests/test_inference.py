"""Whole-image inference compared with values computed by hand, and with the network on the whole image at once."""

import itertools
import math

import lightning
import pytest
import torch
import torch.nn.functional as F
from conftest import config, draw_pair, shake, succeed
from conftest import lightning as run
from PIL import Image
from torch import Tensor, nn

from segmentation import DeepLabV1, MaskFormer, PSPNet, UNet
from segmentation.architectures.unet import OverlapTile
from segmentation.errors import UserError
from segmentation.inference import MultiScaleFlip, SlidingWindow, Whole, positions

narrow = {"base_channels": 8}
MODELS = {
    "unet": lambda **kwargs: UNet(4, base_channels=4, **kwargs),
    "binary": lambda **kwargs: UNet(1, base_channels=4, **kwargs),
    "pspnet": lambda **kwargs: PSPNet(4, **narrow, **kwargs),
    "deeplabv1": lambda **kwargs: DeepLabV1(4, **narrow, **kwargs),
    "maskformer": lambda **kwargs: MaskFormer(
        4, hidden_channels=32, num_queries=12, decoder_layers=2, **narrow, **kwargs
    ),
}


class Network(UNet):
    """A network without layers: a function of the image gives the logits, and `seen` lists the shapes of its images."""

    def __init__(self, function, num_classes: int = 3) -> None:
        super().__init__(num_classes, base_channels=1)
        self.function, self.seen = function, []
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        return self.function(image)


def valid_unet() -> UNet:
    torch.manual_seed(0)
    return shake(UNet(2, base_channels=2, padding="valid", batch_norm=False), torch.randn(1, 3, 188, 188))


# Sliding windows


def test_positions_by_hand():
    assert positions(10, 4, 0.5) == [0, 2, 4, 6]
    assert positions(10, 4, 0.0) == [0, 3, 6]  # three windows of 4 are needed for 10 pixels, and lie evenly
    assert positions(9, 4, 0.5) == [0, 2, 3, 5]
    assert positions(4, 4, 0.5) == positions(3, 4, 0.5) == [0]


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.5, 0.9])
def test_positions_reach_from_border_to_border_with_the_overlap_asked_for(overlap):
    for length in range(1, 200, 7):
        for crop in (1, 2, 5, 16, 33, 64):
            starts = positions(length, crop, overlap)
            assert starts[0] == 0 and starts[-1] == max(0, length - crop)
            steps = {b - a for a, b in itertools.pairwise(starts)}
            assert all(0 < step <= max(1, round(crop * (1 - overlap))) for step in steps)
            assert len(steps) <= 2  # evenly: they differ by a pixel at most


def test_overlapping_windows_are_averaged_by_hand():
    """Windows of 4 of 6 pixels at 0 and 2, from a network that counts its columns: 0 1 2 3 and 0 1 2 3."""
    network = Network(lambda image: torch.arange(4.0).expand(1, 3, 1, 4))
    image = torch.zeros(1, 3, 1, 6)
    logits = SlidingWindow(4, 0.5)(network, image)
    assert logits[0, 0, 0].tolist() == [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]
    near, far = (math.exp(-0.5 * (distance / (4 / 8)) ** 2) for distance in (0.5, 1.5))  # from the middle, 1.5
    middle = [(2 * near + 0 * far) / (near + far), (3 * far + 1 * near) / (near + far)]
    logits = SlidingWindow(4, 0.5, "gaussian")(network, image)
    torch.testing.assert_close(logits[0, 0, 0], torch.tensor([0, 1, *middle, 2, 3]))


@pytest.mark.parametrize("blend", ["average", "gaussian"])
@pytest.mark.parametrize("crop", [1, 8, 31, 500])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.9])
def test_a_network_that_sees_single_pixels_gives_the_same_in_windows(blend, crop, overlap):
    torch.manual_seed(0)
    image = torch.randn(2, 3, 29 if crop == 1 else 67, 17 if crop == 1 else 45)
    mix = nn.Conv2d(3, 3, 1)
    network = Network(lambda image: mix(image).sin())
    with torch.inference_mode():
        logits = SlidingWindow(crop, overlap, blend, batch_size=3)(network, image)
        torch.testing.assert_close(logits, network(image), atol=1e-6, rtol=1e-5)


def test_windows_are_finished_block_by_block_and_never_larger_than_asked():
    network = Network(lambda image: image.double())  # another type comes back as float32
    image = torch.rand(2, 3, 50, 70)

    def read(top: int, bottom: int, left: int, right: int) -> Tensor:
        return image[..., top:bottom, left:right]

    covered = torch.zeros(50, 70)
    blocks = list(SlidingWindow(16, 0.25, batch_size=3).blocks(network, read, 50, 70))
    for top, left, logits in blocks:
        assert logits.shape[2] <= 16 and logits.shape[3] <= 16 and logits.dtype == torch.float32
        covered[top : top + logits.shape[2], left : left + logits.shape[3]] += 1
    assert (covered == 1).all()
    assert [(top, left) for top, left, _ in blocks] == sorted((top, left) for top, left, _ in blocks)
    assert len(blocks) == 4 * 6 and set(network.seen) == {(6, 3, 16, 16)}  # three windows of two images


def test_a_window_larger_than_the_image_is_the_image():
    model = shake(MODELS["unet"](), torch.randn(2, 3, 61, 47))
    image = torch.randn(2, 3, 61, 47)
    with torch.inference_mode():
        assert torch.equal(SlidingWindow(1000)(model, image), model(image))


def test_windows_run_in_bf16_under_autocast_and_are_summed_in_float32():
    model = MODELS["unet"]().eval()
    image = torch.randn(1, 3, 40, 40)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(image).dtype == torch.bfloat16
        logits = SlidingWindow(24)(model, image)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SlidingWindow(32, overlap=1.0), "below 1, got 1.0"),
        (lambda: SlidingWindow(32, overlap=-0.1), "0 or more"),
        (lambda: SlidingWindow(0), "1 or more, got 0"),
        (lambda: SlidingWindow(8, batch_size=0), "batch_size"),
        (lambda: SlidingWindow(8, blend="max"), "average or gaussian, got max"),
        (lambda: MultiScaleFlip([]), "one factor or more"),
        (lambda: MultiScaleFlip([1.0, 0.0]), "above 0"),
        (lambda: OverlapTile(570), "16 n \\+ 12"),
        (lambda: OverlapTile(188), "204 or more"),
        (lambda: OverlapTile()(MODELS["unet"](), torch.zeros(1, 3, 8, 8)), "loses no border: .* SlidingWindow"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# Overlap-tile


@pytest.mark.parametrize(("size", "crop"), [((150, 129), 252), ((128, 64), 252), ((61, 47), 572), ((7, 1), 204)])
def test_tiles_of_the_valid_unet_are_the_untiled_network(size, crop):
    model = valid_unet()
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        whole = model(image)
        torch.testing.assert_close(OverlapTile(crop)(model, image), whole, atol=1e-5, rtol=0)
    assert whole.std() > 0.1


def test_tiles_are_read_with_the_border_and_no_larger_than_the_crop():
    model, sizes = valid_unet(), []
    model.register_forward_pre_hook(lambda *_: pytest.fail("the bare network is asked, not forward"))
    model.down1.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    with torch.inference_mode():
        OverlapTile(252)(model, torch.randn(1, 3, 70, 130))
    assert sizes == [(252, 252), (252, 252), (252, 204), (204, 252), (204, 252), (204, 204)]  # 64 + 64 + 2, 64 + 6


# Several scales


def test_one_scale_without_flip_is_the_whole_image():
    for name in ("unet", "binary", "maskformer"):
        model = MODELS[name]().eval()
        image = torch.randn(1, 3, 33, 47)
        with torch.inference_mode():
            once = model.probabilities(MultiScaleFlip([1.0], flip=False)(model, image))
            torch.testing.assert_close(once, model.probabilities(model(image)), atol=1e-6, rtol=1e-5)


def test_mean_of_probabilities_against_a_second_writing_down():
    model = shake(MODELS["unet"](), torch.randn(2, 3, 41, 64))
    image = torch.randn(1, 3, 41, 64)
    with torch.inference_mode():
        expected = []
        for size in ((20, 32), (41, 64), (62, 96)):  # 20.5 is rounded to even
            small = F.interpolate(image, size, mode="bilinear", align_corners=False)
            for pixels, back in ((small, lambda x: x), (torch.flip(small, [3]), lambda x: torch.flip(x, [3]))):
                logits = F.interpolate(back(model(pixels)), (41, 64), mode="bilinear", align_corners=False)
                expected.append(F.softmax(logits, dim=1))
        mean = model.probabilities(MultiScaleFlip([0.5, 1.0, 1.5])(model, image))
        torch.testing.assert_close(mean, sum(expected) / 6, atol=1e-6, rtol=1e-5)
        assert (mean - model.probabilities(model(image))).abs().max() > 0.01


def test_the_mirrored_image_has_the_mirrored_prediction():
    model = shake(MODELS["unet"](), torch.randn(2, 3, 40, 64))
    image = torch.randn(1, 3, 40, 64)
    with torch.inference_mode():
        inference = MultiScaleFlip([0.75, 1.0])
        torch.testing.assert_close(inference(model, image.flip(-1)).flip(-1), inference(model, image))
        assert not torch.allclose(model(image.flip(-1)).flip(-1), model(image), atol=0.1)


# All together


@pytest.mark.parametrize("name", MODELS)
def test_every_way_works_for_every_kind_of_output(name):
    model = MODELS[name]().eval()
    image = torch.randn(2, 3, 61, 47)
    inner = SlidingWindow(24, batch_size=2)
    for inference in (Whole(), SlidingWindow(32, blend="gaussian"), MultiScaleFlip([0.5, 1.0], inference=inner)):
        with torch.inference_mode():
            logits = inference(model, image)
            probs = model.probabilities(logits)
        assert logits.shape == (2, model.num_classes, 61, 47) and torch.isfinite(logits).all()
        assert probs.min() >= 0 and probs.max() <= 1
        if model.num_classes > 1:
            torch.testing.assert_close(probs.sum(1), torch.ones(2, 61, 47))


@pytest.mark.parametrize("name", ["unet", "binary", "maskformer"])
def test_logits_of_is_the_inverse_of_probabilities(name):
    model = MODELS[name]()
    probs = torch.rand(2, model.num_classes, 5, 7)
    probs[0, 0, 0, :3] = torch.tensor([0.0, 1.0, 1e-9])
    probs = probs if model.num_classes == 1 else probs / probs.sum(dim=1, keepdim=True)
    logits = model.logits_of(probs)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(model.probabilities(logits), probs, atol=3e-7, rtol=1e-5)


def test_evaluation_and_prediction_go_through_it_and_training_does_not():
    seen = []

    class Counting(Whole):
        def __call__(self, model, image):
            seen.append(tuple(image.shape))
            return 2 * model(image)

    torch.manual_seed(0)
    model = UNet(3, base_channels=4, inference=Counting()).eval()
    batch = {"image": torch.rand(2, 3, 32, 32), "mask": torch.randint(0, 3, (2, 32, 32)), "name": ["a", "b"]}
    batch["size"] = [(32, 32)] * 2
    with torch.inference_mode():
        logits = 2 * model(model.preprocess(batch["image"]))
        for out in (model.validation_step(batch, 0), model.test_step(batch, 0)):
            torch.testing.assert_close(out["logits"], logits)
            torch.testing.assert_close(out["loss"], F.cross_entropy(logits, batch["mask"]))
        torch.testing.assert_close(model.predict_step(batch, 0)["probs"], logits.softmax(dim=1))
    assert seen == 3 * [(2, 3, 32, 32)]
    model.losses(batch)
    assert len(seen) == 3


def test_it_is_no_part_of_a_checkpoint():
    checkpoint: dict = {"state_dict": {}}
    UNet(3, base_channels=4, inference=SlidingWindow(32)).on_save_checkpoint(checkpoint)
    arguments = checkpoint["segmentation"]["init_args"]
    assert "inference" not in arguments and arguments["base_channels"] == 4


class Elsewhere(Tensor):
    """A tensor that claims to be on another device than the mask."""

    device = property(lambda self: torch.device("meta"))


@pytest.mark.parametrize("name", MODELS)
def test_scores_in_strips_are_those_at_once(name):
    """Logits of 600 rows in another memory are brought to the mask in three strips."""

    class Away(Whole):
        def __call__(self, model, image):
            return model(image).as_subclass(Elsewhere)

    torch.manual_seed(0)
    mask = torch.randint(0, 2, (2, 600, 24))
    mask[:, 100:400] = 255  # the second strip has no label
    batch = {"image": torch.rand(2, 3, 600, 24), "mask": mask}
    found = []
    for inference in (Whole(), Away()):
        torch.manual_seed(0)
        model, strips = MODELS[name](inference=inference).eval(), []
        model.loss.register_forward_pre_hook(lambda _, args, strips=strips: strips.append(args[1].shape[1]))
        with torch.inference_mode():
            out = model.validation_step(batch, 0)
        found.append((strips, out["loss"], model.mean_loss.compute(), model.confusion.compute()))
    (whole, *values), (parts, *theirs) = found
    assert whole == [600] and parts == [256, 256, 88]
    for ours, other in zip(values, theirs, strict=True):
        torch.testing.assert_close(other.as_subclass(Tensor), ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_logits_of_windows_stay_outside_the_gpu():
    model = MODELS["unet"](inference=SlidingWindow(100)).cuda().eval()
    mask = torch.randint(0, 4, (1, 300, 200)).cuda()
    with torch.inference_mode():
        out = model.validation_step({"image": torch.rand(1, 3, 300, 200).cuda(), "mask": mask}, 0)
    assert out["logits"].device.type == "cpu" and out["loss"].device.type == "cuda"
    torch.testing.assert_close(out["loss"].cpu(), F.cross_entropy(out["logits"], mask.cpu()))


@pytest.mark.slow
def test_yaml_and_command_line_agree_beside_a_checkpoint(tree, tmp_path):
    torch.manual_seed(0)
    model = UNet(3, base_channels=4)
    images = torch.stack([torch.from_numpy(draw_pair(200 + i)[0]).permute(2, 0, 1) for i in range(3)])  # of the tree
    shake(model, model.preprocess(images))
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": lightning.__version__}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    file = config(tmp_path, tree)
    line = "    inference: {class_path: SlidingWindow, init_args: {crop: 24}}\n"
    file.write_text(file.read_text().replace("    base_channels: 4\n", f"    base_channels: 4\n{line}"))
    command = ["predict", "--ckpt_path", tmp_path / "model.ckpt", "--trainer.accelerator", "cpu"]
    ways = {
        "whole": [],
        "flags": ["--model.inference", "SlidingWindow", "--model.inference.crop", 24],
        "yaml": ["--config", file],
    }
    masks = {}
    for way, arguments in ways.items():
        where = ["--data.predict_dir", tree / "images/test", "--writer.output_dir", way]
        succeed(*command, *arguments, *where, cwd=tmp_path)
        masks[way] = [Image.open(path).tobytes() for path in sorted((tmp_path / way / "masks").glob("*.png"))]
    assert len(masks["flags"]) == 3 and masks["flags"] == masks["yaml"] != masks["whole"]
    wrong = run(*command, "--model.inference", "SlidingWindw", cwd=tmp_path)
    assert wrong.stderr.strip() == "error: unknown class 'SlidingWindw': did you mean 'SlidingWindow'?"


def test_an_image_too_large_for_the_network_goes_in_windows(monkeypatch):
    monkeypatch.setattr("segmentation.inference.LARGEST", 64 * 64 - 1)
    model, image = UNet(2, base_channels=4).eval(), torch.zeros(1, 3, 64, 64)
    with pytest.raises(UserError, match=r"64 x 64 pixels is too large .* set model\.inference: SlidingWindow"):
        Whole()(model, image)
    assert SlidingWindow(32)(model, image).shape == (1, 2, 64, 64)
