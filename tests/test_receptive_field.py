"""What one output pixel sees: papers' numbers, the formula, and the gradients of real networks."""

import random
import re

import numpy as np
import pytest
import torch
from conftest import PROJECT, draw_pair
from PIL import Image
from torch import Tensor, nn

from segmentation import (
    FCN,
    DeepLabV1,
    DeepLabV2,
    DeepLabV3,
    DeepLabV3Plus,
    MaskFormer,
    PSPNet,
    SegNet,
    UNet,
    UNet3Plus,
)
from segmentation.architectures.backbones.resnet import ResNet
from segmentation.base import SegmentationModule
from segmentation.cli import main
from segmentation.commands.receptive_field import receptive_field
from segmentation.commands.receptive_field.fields import (
    Field,
    effective_field,
    layer_fields,
    map_sizes,
    network_fields,
    ways_to_pixels,
)
from segmentation.commands.receptive_field.tables import live_taps, main_rows, side_above, side_holding
from segmentation.errors import UserError

VGG16 = [f"{layer}p1" if layer == "conv3" else layer for n in (2, 2, 3, 3, 3) for layer in ["conv3"] * n + ["pool2s2"]]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Strips are too thin to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def meta(build, *args, **kwargs) -> nn.Module:
    """A network without memory for its weights: fields do not depend on them."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def by_stage(network: nn.Module, *stages: str) -> dict[str, Field]:
    return {field.stage: field for field in network_fields(network, stages=stages)}


# A chain of layers


@pytest.mark.parametrize(
    ("layers", "sizes", "strides", "centres"),
    [
        (["conv3", "conv3"], [3, 5], [1, 1], [1, 2]),
        (["conv3", "pool2s2", "conv3"], [3, 4, 8], [1, 2, 2], [1, 1.5, 3.5]),  # the blog post says 6 in the middle
        (["conv3d2"], [5], [1], [2]),
        (["conv3d3"], [7], [1], [3]),
        (["conv3d2p2", "conv3d3p3"], [5, 11], [1, 1], [0, 0]),
        (["conv7s2p3", "pool3s2p1"], [7, 11], [2, 4], [0, 0]),
        (["conv1s3", "conv2"], [1, 4], [3, 3], [0, 1.5]),
    ],
)
def test_chain_by_hand(layers, sizes, strides, centres):
    fields = layer_fields(layers)
    assert [field.size for field in fields] == sizes
    assert [field.stride for field in fields] == strides
    assert [field.centre for field in fields] == centres


def test_vgg16_as_a_chain():
    fields = layer_fields([*VGG16, "conv7"])
    assert (fields[-2].size, fields[-1].size, fields[-1].stride) == (212, 404, 32)


def test_chain_agrees_with_gradients_of_a_network():
    """Two ways that share nothing: the formula, and the linear twin of torch's own layers."""
    draw = random.Random(0)
    for _ in range(12):
        layers, modules = [], []
        for _ in range(draw.randint(2, 5)):
            kind, kernel, stride, dilation = draw.choice("cp"), draw.randint(1, 5), draw.randint(1, 2), 1
            padding = draw.randint(0, kernel // 2)
            if kind == "c":
                dilation = draw.randint(1, 3)
                modules.append(nn.Conv2d(3 if not modules else 4, 4, kernel, stride, padding, dilation))
                layers.append(f"conv{kernel}s{stride}d{dilation}p{padding}")
            else:
                modules += [] if modules else [nn.Conv2d(3, 4, 1)]
                layers += [] if layers else ["conv1"]
                modules.append(nn.MaxPool2d(kernel, stride, padding))
                layers.append(f"pool{kernel}s{stride}p{padding}")
        found = network_fields(Tall(*modules), stages=[str(i) for i in range(len(modules))])
        expected = layer_fields(layers)
        keys = [(f.size, f.stride, f.centre, f.rates) for f in found]
        assert keys == [(f.size, f.stride, f.centre, f.rates) for f in expected], layers


class Tall(nn.Sequential):
    """Makes a strip high enough for layers without padding."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.expand(-1, -1, 200, -1))


def test_ways_to_pixels():
    assert ways_to_pixels(["conv3", "conv3"]).tolist() == [1, 2, 3, 2, 1]
    assert ways_to_pixels(["conv3", "pool2s2", "conv3"]).tolist() == [1, 2, 3, 3, 3, 3, 2, 1]
    assert ways_to_pixels(["conv3d2"]).tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("layer", ["conv", "cnov3", "conv3x", "conv3s0", "conv0", "pool2s", "conv3 s2"])
def test_a_layer_that_is_none(layer):
    with pytest.raises(ValueError, match="is not a layer"):
        layer_fields([layer])


# Numbers of the papers, and of the formula r += (k - 1) d j by hand


def test_deeplabv1():
    network = meta(DeepLabV1, 21)
    fields = by_stage(network, "pool3", "pool5.0", "pool5", "fc6", "fc7", "logits")
    assert [field.size for field in fields.values()] == [51, 227, 243, 435, 435, 443]
    assert [field.stride for field in fields.values()] == [8, 8, 8, 8, 8, 1]
    assert fields["fc6"].rates == (12,) and fields["fc6"].centre == fields["logits"].centre == 0


@pytest.mark.parametrize(
    ("depth", "output_stride", "multi_grid", "size"),
    [
        (50, 32, (1, 1, 1), 427), (50, 16, (1, 1, 1), 459), (50, 8, (1, 1, 1), 475),
        (101, 32, (1, 1, 1), 971), (101, 16, (1, 1, 1), 1003), (101, 8, (1, 1, 1), 1019),
        (101, 16, (1, 2, 4), 1259),
    ],
)  # fmt: skip
def test_resnet(depth, output_stride, multi_grid, size):
    backbone = meta(ResNet, depth, output_stride=output_stride, multi_grid=multi_grid, dilate_first_block=True)
    last = by_stage(backbone)["layer4"]
    assert (last.size, last.stride, last.centre) == (size, output_stride, 0)


def test_deeplabv3plus_shows_every_branch_and_where_its_logits_look():
    network = meta(DeepLabV3Plus, 21, backbone="resnet101", output_stride=16)
    fields = by_stage(network)
    assert fields["backbone.layer4"].size == 1259  # with the multi-grid
    assert fields["aspp.convs.3"].size == 1259 + 2 * 18 * 16 and fields["aspp.convs.3"].rates == (18,)
    plain = meta(DeepLabV3Plus, 21, backbone="resnet101", layout="smp", output_stride=16)  # 1003 px, and ASPP's 576
    assert by_stage(plain, "aspp.0.convs.3")["aspp.0.convs.3"].size == 1579
    assert [fields[f"aspp.convs.{i}"].rates for i in range(4)] == [(), (6,), (12,), (18,)]
    assert (fields["aspp.convs.4"].size, fields["aspp.convs.4"].bins) == (0, 1)  # the image's mean, and no more
    assert fields["aspp.project"].bins == 1 and fields["backbone.layer4"].bins == 0


def test_interpolation_without_aligned_corners_looks_to_one_side():
    """Scores lie over pixels 16 j and are spread as if over 16 j + 7.5 (torchvision does the same)."""
    logits = by_stage(meta(DeepLabV3, 21, output_stride=16), "logits")["logits"]
    assert (logits.size, logits.stride, logits.centre, logits.bins) == (1051, 1, -7.5, 1)


def test_unet():
    fields = by_stage(meta(UNet, 2))
    assert (fields["bottom"].size, fields["bottom"].stride, fields["bottom"].centre) == (140, 16, 7.5)
    # two convolutions at stride 8 from any phase see three units of stride 16: 140 + 32, then 16 and so on more
    assert [fields[name].size for name in ("up4", "up3", "up2", "up1", "logits")] == [172, 188, 204, 204, 204]
    valid = by_stage(meta(UNet, 2, padding="valid", batch_norm=False, base_channels=8), "bottom", "logits")
    assert (valid["bottom"].size, valid["bottom"].stride) == (140, 16)
    assert (valid["logits"].size, valid["logits"].centre) == (204, 0)


def test_fcn32s_and_segnet_on_vgg16():
    fcn = by_stage(meta(FCN, 21), "backbone.fc6")["backbone.fc6"]
    assert (fcn.size, fcn.stride) == (404, 32)
    segnet = network_fields(meta(SegNet, 21), stages=["encoder.4", "drop", "logits"])
    bottom = next(field for field in segnet if field.stride == 32)
    assert (bottom.size, bottom.centre) == (212, 15.5) and segnet[-1].stage == "logits"


def test_pyramid_pooling_sees_the_image_in_parts():
    fields = by_stage(meta(PSPNet, 21))
    assert [fields[f"ppm.features.{i}"].bins for i in range(4)] == [1, 2, 3, 6]
    assert fields["ppm.features.0"].size == 0 and fields["logits"].bins == 1


def test_squeeze_and_excitation_sees_the_whole_image():
    fields = by_stage(meta(DeepLabV3, 21, backbone="mobilenet_v3_large"), "backbone.3", "backbone.4", "backbone.5")
    assert [field.bins for field in fields.values()] == [0, 1, 1]
    assert [field.size for field in fields.values()] == [19, 35, 67]


def test_attention_sees_the_whole_image():
    network = MaskFormer(3, base_channels=8, hidden_channels=16, num_queries=4, decoder_layers=1)
    fields = by_stage(network, "backbone.layer4", "pixel_decoder", "logits")
    assert [(field.size, field.bins) for field in fields.values()] == [(427, 0), (555, 0), (587, 1)]


def test_every_scale_of_deeplabv2_is_seen():
    one, three = (
        by_stage(meta(DeepLabV2, 21, scales=scales), "classifier.convs.3", "logits") for scales in ([1.0], [1.0, 0.5])
    )
    assert one["classifier.convs.3"].size == three["classifier.convs.3"].size
    half = three["classifier.convs.3 (2)"]
    assert half.stride == 16 and half.size == 2 * one["classifier.convs.3"].size
    assert three["logits"].size > half.size


def test_fields_far_apart_are_not_cut_off_by_the_strip():
    network = Tall(nn.Conv2d(3, 2, 3, padding=500, dilation=500), nn.Conv2d(2, 2, 3, padding=900, dilation=900))
    assert [field.size for field in network_fields(network, stages=["0", "1"])] == [1001, 2801]


# Against gradients of real networks


@pytest.mark.parametrize(
    "build",
    [
        lambda: UNet(2, base_channels=2),
        lambda: UNet(2, base_channels=2, up="bilinear"),
        lambda: UNet(2, base_channels=2, pixel_shuffle=2),
        lambda: UNet(2, base_channels=2, padding="valid", batch_norm=False),
        lambda: SegNet(2, base_channels=2),
        lambda: UNet3Plus(2, base_channels=2),
    ],
    ids=["unet", "bilinear", "pixel_shuffle", "valid", "segnet", "unet3plus"],
)
def test_real_gradients_lie_in_the_field_and_fill_it(build):
    """Over the units of a period. Weights are positive, so no unit is dead; a maximum sees one of its pixels only."""
    torch.manual_seed(0)
    network = build().double().eval()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.uniform_(module.weight, 0.1, 1)
    logits = by_stage(network, "logits")["logits"]
    width = 640
    image = torch.rand(1, 3, 1, width, dtype=torch.float64, requires_grad=True)
    output = network(image)
    lows, highs = [], []
    for unit in range(width // 2, width // 2 + 32):
        (gradient,) = torch.autograd.grad(output[0, :, 0, unit].sum(), image, retain_graph=True)
        seen = gradient[0].abs().sum(dim=(0, 1)).nonzero().flatten() - unit
        lows.append(int(seen[0]))
        highs.append(int(seen[-1]))
    sizes = [high - low + 1 for low, high in zip(lows, highs, strict=True)]
    assert max(sizes) <= logits.size
    assert max(sizes) >= 0.8 * logits.size


def test_measuring_leaves_the_network_as_it_was():
    network = UNet(2, base_channels=2).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network_fields(network)
    assert network.training and all(not module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_unknown_stage_names_those_that_ran():
    with pytest.raises(ValueError, match=r"no stage 'bottm': there are down1.*bottom"):
        network_fields(UNet(2, base_channels=2), stages=["bottm"])


# What is shown


def test_rows_of_a_table():
    fields = main_rows(network_fields(meta(DeepLabV1, 21)))
    names = "conv1 pool1 conv2 pool2 conv3 pool3 conv4 pool4 conv5 pool5 fc6 logits"
    assert [field.stage for field in fields] == names.split()
    for network in (meta(DeepLabV3, 21, backbone="mobilenet_v3_large"), meta(DeepLabV2, 21), meta(SegNet, 21)):
        rows = main_rows(network_fields(network))
        assert 5 < len(rows) <= 15 and rows[-1].stage == "logits"
        assert len(set(rows)) == len(rows)


def test_live_taps_are_those_of_the_closed_form():
    """Average live taps of a zero-padded 3x3 filter on an n x n map: ((n + 2 max(n - r, 0)) / n) ** 2."""
    network = meta(DeepLabV3, 21, output_stride=16)
    fields = by_stage(network)
    words = [live_taps(network, fields[f"classifier.0.convs.{i}"], (513, 513)) for i in range(5)]
    assert words == ["", *(f"{((33 + 2 * (33 - rate)) / 33) ** 2:.1f} of 9" for rate in (6, 12, 18)), ""]


def test_map_sizes_are_those_of_the_stages():
    """Sizes and fields are measured apart; the table joins them by stage, numbered runs included."""
    network = meta(DeepLabV2, 21)
    sizes = map_sizes(network, (321, 321))
    assert sizes["backbone.layer4"] == (2048, 41, 41)  # of the image's own scale; then 0.75 and 0.5
    assert (sizes["classifier.convs.3 (2)"], sizes["classifier.convs.3 (3)"]) == ((21, 31, 31), (21, 21, 21))
    assert sizes["logits"] == (21, 321, 321)
    for build in (UNet, SegNet, PSPNet):
        network = meta(build, 4)
        sizes = map_sizes(network, (97, 130))
        assert {field.stage for field in network_fields(network)} <= sizes.keys()
        assert sizes["logits"] == (4, 97, 130)


def test_map_sizes_leave_the_network_as_it_was():
    network = UNet(2, base_channels=2).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    assert map_sizes(network, (64, 64))["bottom"] == (32, 4, 4)
    assert network.training and all(not module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


class Convs(SegmentationModule):
    """3x3 convolutions of ones, whose gradient is known."""

    def __init__(self, layers: int) -> None:
        super().__init__(1)
        self.layers = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 1, 1, 3, padding=1) for i in range(layers)))
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def score_maps(self, image: Tensor) -> dict[str, Tensor]:
        return {"main": self.layers(image)}


def test_effective_field_of_known_gradients():
    image = torch.zeros(3, 20, 31, dtype=torch.uint8)
    effect = effective_field(Convs(1), image, draws=2)
    expected = torch.zeros(20, 31, dtype=torch.float64)
    expected[9:12, 14:17] = 1 / 9
    torch.testing.assert_close(effect, expected)
    assert side_holding(effect, 0.05) == 1 and side_holding(effect, 0.95) == 3 and side_above(effect) == 3
    effect = effective_field(Convs(2), image)  # 1 2 3 2 1 either way: 49 of 81 within 3x3
    torch.testing.assert_close(effect[10, 13:18], torch.tensor([3.0, 6, 9, 6, 3], dtype=torch.float64) / 81)
    assert [side_holding(effect, share) for share in (0.1, 0.5, 0.7)] == [1, 3, 5] and side_above(effect) == 5


def test_effective_field_is_smaller_than_the_theoretical_one():
    """Luo et al.: it grows as the root of the number of layers, the theoretical one as the number."""
    image = torch.zeros(3, 99, 99, dtype=torch.uint8)
    few, many = (side_holding(effective_field(Convs(layers), image, draws=1), 0.95) for layers in (10, 40))
    assert 1.7 < many / few < 2.3 and many < 81 / 2


def test_no_gradient_is_said():
    network = Convs(1)
    nn.init.zeros_(network.layers[0].weight)
    with pytest.raises(ValueError, match="zero or not finite"):
        effective_field(network, torch.zeros(3, 9, 9, dtype=torch.uint8))


# The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    Image.fromarray(draw_pair(0)[0]).save(tmp_path / "photo.png")
    return tmp_path


def test_command_with_layers(folder, capsys):
    main(["receptive_field", "--layers", "[conv3, pool2s2, conv3]", "--size", "10"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["conv3", "1", "", "3", "j + 1", "8"] in rows
    assert ["pool2s2", "2", "", "4", "2 j + 1.5", "4"] in rows
    assert ["conv3", "2", "", "8", "2 j + 3.5", "2"] in rows
    with Image.open(folder / "receptive_field/layers.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 20


def test_command_with_a_config_needs_no_data_and_leaves_a_picture_only(folder, capsys):
    config = PROJECT / "configs/unet_camvid_cpu.yaml"  # its data.root does not exist here, and it names a W&B logger
    both = ["--config", str(config), "--config", "of_a_run.yaml"]
    (folder / "of_a_run.yaml").write_text("ckpt_path: null\nweights_only: null\n")  # keys of fit in its config.yaml
    main(["receptive_field", *both, "--model.base_channels", "4", "--image", "photo.png"])
    out = capsys.readouterr().out
    assert "| bottom   |     32 |       |      280 |" in out and "48 x 64 px" in out
    assert re.search(r"\| bottom .*\|\s+64 x 1 x 2 \|", out) and re.search(r"\| logits .*\|\s+11 x 48 x 64 \|", out)
    assert "in effect " in out and "training" not in out
    assert sorted(p.name for p in folder.rglob("*")) == ["UNet.png", "of_a_run.yaml", "photo.png", "receptive_field"]


def test_command_with_a_checkpoint_shows_before_and_after(folder, capsys):
    torch.manual_seed(1)
    network = UNet(3, base_channels=4)
    checkpoint = {"state_dict": network.state_dict()}
    network.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "last.ckpt")
    command = ["receptive_field", "--ckpt_path", "last.ckpt", "--image", "photo.png", "--size", "[40, 56]"]
    main([*command, "--stages", "[bottom, logits]", "--output_dir", "out"])
    out = capsys.readouterr().out
    assert "40 x 56 px" in out and "| bottom |" in out and "down1" not in out
    before, after = (line.split("|")[2:] for line in out.splitlines() if "training" in line)
    assert before != after
    image = torch.from_numpy(np.array(Image.open("photo.png").resize((56, 40), Image.Resampling.BILINEAR)))
    expected = effective_field(network, image.permute(2, 0, 1))
    assert [int(cell) for cell in after[:2]] == [side_holding(expected, 0.5), side_holding(expected, 0.95)]
    assert (folder / "out/UNet.png").is_file()


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, "no model given"),
        (["--layers", "[conv3, pol2]"], 1, "'pol2' is not a layer"),
        (["--layers", "[]"], 2, "no model given"),
        (["--layers", "[conv3]", "--size", "[3, 4]"], 1, "one side"),
        (["--model", "UNet", "--model.num_classes", "2", "--image", "none.png"], 1, "none.png does not exist"),
        (["--model", "UNet", "--model.num_classes", "2", "--image", "notes.txt"], 1, "notes.txt cannot be read"),
        (["--model", "UNet", "--model.num_classes", "2", "--size", "[3, 4, 5]"], 1, "one side, or height and width"),
        (["--model", "UNet", "--model.num_classes", "2", "--ckpt_path", "none.ckpt"], 1, "none.ckpt does not exist"),
        (["--model", "UNet", "--model.num_classes", "0"], 1, "num_classes must be at least 1"),
        (["--model", "UNet", "--model.num_classes", "2", "--stagse", "[bottom]"], 2, "did you mean 'stages'"),
        (["--model", "UNet", "--model.num_classes", "2", "--stages", "[botom]"], 1, "no stage 'botom'"),
    ],
)
def test_wrong_command_ends_in_one_sentence(folder, capsys, args, status, words):
    (folder / "notes.txt").write_text("no picture")
    args = [*args, "--model.base_channels", "2"] if "--model" in args else args
    with pytest.raises(SystemExit) as end:
        main(["receptive_field", *args])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == status and len(errors) == 1 and words in errors[0]
    assert not (folder / "receptive_field").exists()


def test_nothing_to_look_at():
    with pytest.raises(UserError, match="give --model, --config or --layers"):
        receptive_field(None)


def test_other_commands_still_need_model_and_data(folder, capsys):
    for args, words in ((["fit"], "no model"), (["fit", "--model", "UNet", "--model.num_classes", "2"], "no data")):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 2 and f"error: {words} given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--model", "UNet", "--model.num_classes", "0", "--data", "SyntheticScenes"],
            "num_classes must be at least 1",
        ),
        (["--model", "UNet", "--model.num_classes", "2", "--data", "SyntheticScenes", "--data.size", "[3, 3]"], "size"),
    ],
)
def test_errors_of_models_and_data_keep_their_sentence(folder, capsys, args, words):
    """Model and data are optional to the parser now, which wraps what their ``__init__`` raises."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *args])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and error.startswith("error: ") and words in error and "Union" not in error


def test_misspelt_command_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["receptive_feild"])
    assert "did you mean 'receptive_field'?" in capsys.readouterr().err
