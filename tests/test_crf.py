"""Compare DenseCRF with sums over all pairs of pixels, with pydensecrf and by hand; try the callback and commands."""

import csv
import importlib.util
import json
import re

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, PROJECT, column, config, draw_pair, succeed
from PIL import Image

from datamodules import Folder
from segmentation import MaskFormer, UNet
from segmentation.callbacks import DenseCRF, PredictionWriter
from segmentation.cli import sentence
from segmentation.commands.tune_crf import Search
from segmentation.crf import CRF, PRESETS, Lattice, grid_lattice, refine
from segmentation.errors import UserError

needs_pydensecrf = pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is optional")


def noisy(seed: int, height: int = 48, width: int = 64, certainty: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Return noisy probabilities (1, 3, H, W), the picture (1, 3, H, W), and the truth (1, H, W)."""
    image, labels = draw_pair(seed, height, width)
    truth = torch.from_numpy(labels).long()[None]
    logits = certainty * torch.nn.functional.one_hot(truth, 3).permute(0, 3, 1, 2)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (logits + noise).softmax(dim=1), torch.from_numpy(image).permute(2, 0, 1)[None], truth


def by_pairs(probs: torch.Tensor, image: torch.Tensor, crf: CRF) -> torch.Tensor:
    """Run algorithm 1 of Krähenbühl and Koltun with exact Gaussians over all pairs of pixels, in float64."""
    k, height, width = probs.shape[1:]
    y, x = np.mgrid[:height, :width]
    position = np.stack([x, y], axis=-1).reshape(-1, 2).astype(float)
    colour = image[0].permute(1, 2, 0).reshape(-1, 3).numpy().astype(float)
    near = ((position[:, None] - position[None]) ** 2).sum(axis=-1)
    like = ((colour[:, None] - colour[None]) ** 2).sum(axis=-1)
    kernels = [
        (crf.w1, np.exp(-near / (2 * crf.sigma_alpha**2) - like / (2 * crf.sigma_beta**2))),
        (crf.w2, np.exp(-near / (2 * crf.sigma_gamma**2))),
    ]
    pairs = sum(w * kernel / np.sqrt(np.outer(kernel.sum(axis=1), kernel.sum(axis=1))) for w, kernel in kernels)
    unary = np.log(probs[0].reshape(k, -1).T.double().numpy())
    q = np.exp(unary)
    for _ in range(crf.iterations):
        q = np.exp(unary + pairs @ q)
        q /= q.sum(axis=1, keepdims=True)
    return torch.from_numpy(q.T.reshape(1, k, height, width)).float()


@pytest.mark.parametrize("crf", [CRF(4, 12, 20, 3, 1), CRF(5, 8, 40, 3, 3)])
def test_mean_field_is_that_of_exact_gaussians(crf):
    """The lattice approximates the kernels, so a few labels differ."""
    probs, image, truth = noisy(0, 32, 40)
    exact, ours = by_pairs(probs, image, crf).argmax(dim=1), refine(probs, image, crf, bound=0).argmax(dim=1)
    changed = (exact != probs.argmax(dim=1)).float().mean()
    assert changed > 0.1
    assert (ours == exact).float().mean() > 0.99
    assert (ours == truth).float().mean() > (probs.argmax(dim=1) == truth).float().mean() + 0.1


@needs_pydensecrf
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(48, 64), (33, 47), (1, 9)])
def test_both_backends_are_the_same_algorithm(preset, size):
    probs, image, _ = noisy(1, 48, 64)
    probs, image = probs[..., : size[0], : size[1]], image[..., : size[0], : size[1]]
    ours, theirs = (refine(probs, image, PRESETS[preset], backend) for backend in ("torch", "pydensecrf"))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    assert (ours.argmax(dim=1) == theirs.argmax(dim=1)).all()


@pytest.mark.parametrize("backend", ["torch", pytest.param("pydensecrf", marks=needs_pydensecrf)])
def test_one_pixel_by_hand(backend):
    """A single pixel hears only itself: q <- softmax(log p + (w1 + w2) q), because the kernels are normalised."""
    crf = CRF(w1=2, w2=0.5, iterations=3)
    probs = torch.tensor([0.5, 0.3, 0.2])
    q = probs
    for _ in range(3):
        q = (probs.log() + 2.5 * q).softmax(dim=0)
    image = torch.tensor([10, 200, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(refine(probs.view(1, 3, 1, 1), image, crf, backend).flatten(), q, atol=1e-5, rtol=0)


def test_half_precision_and_autocast_make_no_other_lattice():
    """tune_crf stores half precision, and a user's loop may use autocast; positions need float32."""
    probs, image, _ = noisy(10)
    expected = refine(probs.half(), image, CRF())
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected, refine(probs, image, CRF()), atol=0.01, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(refine(probs.half(), image, CRF()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same():
    both = [torch.cat(pair) for pair in zip(noisy(3), noisy(4), strict=True)]
    expected = refine(both[0], both[1], CRF())
    torch.testing.assert_close(refine(both[0].cuda(), both[1].cuda(), CRF()).cpu(), expected, atol=2e-3, rtol=0)


def test_without_iterations_or_weights_nothing_changes():
    probs, image, _ = noisy(2)
    for crf in (CRF(iterations=0), CRF(w1=0, w2=0)):
        torch.testing.assert_close(refine(probs, image, crf), probs, atol=1e-5, rtol=0)


def test_a_batch_is_refined_image_by_image():
    both = [torch.cat(pair) for pair in zip(noisy(3), noisy(4), strict=True)]
    together = refine(both[0], both[1], CRF())
    for i in range(2):
        alone = refine(both[0][i : i + 1], both[1][i : i + 1], CRF())
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_lattice_filters_like_a_gaussian_of_standard_deviation_one(dimensions):
    """Means around points agree with sums over all pairs to about a tenth of their spread."""
    points = torch.rand(600, dimensions, generator=torch.Generator().manual_seed(0)) * 3
    values = (1.5 * points).sin()
    kernel = (-0.5 * torch.cdist(points, points) ** 2).exp()
    norm = kernel.sum(dim=1).rsqrt()
    expected = norm[:, None] * (kernel @ (norm[:, None] * values))
    found = Lattice(points, torch.zeros(600, dtype=torch.long)).filter(values)
    assert (found - expected).abs().mean() < 0.12 * expected.std()  # 0.10 in five dimensions, less in fewer
    assert expected.std() > 0.1


def test_lattice_averages_and_keeps_groups_apart():
    """No weight is negative, the largest eigenvalue is near 1, and equal points of two groups do not meet."""
    matrix = grid_lattice(2, 5, 6, 1.5, torch.device("cpu")).filter(torch.eye(60))
    assert (matrix >= 0).all() and (matrix[:30, :30] > 0).sum() > 300
    assert (matrix[:30, 30:] == 0).all() and (matrix[30:, :30] == 0).all()
    torch.testing.assert_close(matrix[:30, :30], matrix[30:, 30:])
    assert torch.linalg.eigvals(matrix).abs().max().item() == pytest.approx(1, abs=0.02)


def test_classes_below_the_bound_are_left_out_and_change_no_label():
    probs, image, _ = noisy(5, certainty=3.0)
    rare = torch.cat([probs * 0.97, torch.full_like(probs[:, :1], 0.03)], dim=1)
    all_classes, few = refine(rare, image, CRF(), bound=0), refine(rare, image, CRF(), bound=0.05)
    assert (few[:, 3] == 0).all() and (all_classes[:, 3] > 0).all()
    assert (few.argmax(dim=1) == all_classes.argmax(dim=1)).all()
    torch.testing.assert_close(few.sum(dim=1), torch.ones_like(few[:, 0]))
    certain = torch.zeros_like(probs)
    certain[:, 1] = 1  # nothing to decide
    torch.testing.assert_close(refine(certain, image, CRF()), certain)


@pytest.mark.parametrize("backend", ["torch", pytest.param("pydensecrf", marks=needs_pydensecrf)])
def test_one_logit_is_two_classes(backend):
    probs, image, _ = noisy(6)
    two = torch.stack([probs[:, 0], 1 - probs[:, 0]], dim=1)
    one = refine(two[:, 1:], image, CRF(), backend)
    assert one.shape == (1, 1, 48, 64)
    torch.testing.assert_close(one[:, 0], refine(two, image, CRF(), backend, bound=0)[:, 1], atol=1e-5, rtol=0)


def test_wrong_input_is_refused_in_plain_words():
    probs, image, _ = noisy(7)
    with pytest.raises(ValueError, match=r"raw RGB pixels.*float32"):
        refine(probs, image.float(), CRF())
    with pytest.raises(ValueError, match="raw RGB pixels"):
        refine(probs, image[..., 1:], CRF())
    for bad in (probs.masked_fill(probs > 0.9, torch.nan), probs / 0, (probs * 255).byte()):
        with pytest.raises(ValueError, match="no finite numbers"):
            refine(bad, image, CRF())
    with pytest.raises(ValueError, match="sigmas must be positive"):
        CRF(sigma_beta=0)
    with pytest.raises(ValueError, match="not be negative"):
        CRF(w1=-1)
    with pytest.raises(ValueError, match="too small"):
        refine(probs, image, CRF(sigma_alpha=1e-3, sigma_beta=1e-3))
    with pytest.raises(ValueError, match=r"preset is one of deeplabv1, .*deeplabv2"):
        DenseCRF(preset="deeplab")


class Noisy(UNet):
    """A network that returns the logits which were stored for an image."""

    def __init__(self, logits: dict[bytes, torch.Tensor]) -> None:
        super().__init__(3, base_channels=2)
        self.told = logits

    def forward(self, image):
        raw = (image * self.std + self.mean).mul(255).round().byte()
        return torch.cat([self.told[one.contiguous().numpy().tobytes()] for one in raw])


@pytest.fixture
def scene(tmp_path):
    """Return a folder of five pictures, a model that labels them with noise, and its probabilities."""
    logits, pairs = {}, []
    for split in ("images", "masks"):
        (tmp_path / split / "test").mkdir(parents=True)
    for i in range(5):
        probs, image, truth = noisy(i)
        truth[:, :2] = 255
        Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / f"images/test/{i}.png")
        Image.fromarray(truth[0].byte().numpy()).save(tmp_path / f"masks/test/{i}.png")
        logits[image[0].contiguous().numpy().tobytes()] = probs.log()
        pairs.append((probs, image, truth))
    data = Folder(tmp_path, class_names=CLASSES, num_workers=0)
    return data, Noisy(logits), pairs


def run(scene, what: str = "test", **arguments) -> dict[str, float]:
    data, model, _ = scene
    callback = DenseCRF(sigma_alpha=20, sigma_beta=20, **arguments)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[callback],
        enable_model_summary=False,
    )  # fmt: skip
    if what == "predict":
        return trainer.predict(model, data)
    return {key: float(value) for key, value in getattr(trainer, what)(model, data, verbose=False)[0].items()}


def miou(labels: list[torch.Tensor], truths: list[torch.Tensor]) -> float:
    """Compute mean IoU by counting, class by class."""
    found, truth = torch.cat(labels), torch.cat(truths)
    found = found[truth != 255]
    truth = truth[truth != 255]
    return np.mean([((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum() for k in range(3)])


@pytest.mark.parametrize("workers", [0, 2])
def test_callback_reports_the_scores_before_and_after(scene, workers):
    values = run(scene, workers=workers, trimap_widths=[1, 5])
    crf = CRF(4, 20, 20, 3, 1)
    truths = [truth for _, _, truth in scene[2]]
    before = [probs.argmax(dim=1) for probs, _, _ in scene[2]]
    after = [refine(probs, image, crf).argmax(dim=1) for probs, image, _ in scene[2]]
    assert values["test/miou"] == pytest.approx(miou(before, truths), abs=1e-5)
    assert values["test/crf/miou"] == pytest.approx(miou(after, truths), abs=1e-5)
    assert values["test/crf/miou"] > values["test/miou"] + 0.2
    assert {f"test/crf/iou/{name}" for name in CLASSES} <= values.keys()
    for width in (1, 5):
        assert values[f"test/crf/trimap_miou/{width}"] > values[f"test/trimap_miou/{width}"]


def test_predict_hands_refined_probabilities_on(scene):
    crf = CRF(4, 20, 20, 3, 1)
    for result, (probs, image, _) in zip(run(scene, "predict"), scene[2], strict=True):
        torch.testing.assert_close(result["probs"], refine(probs, image, crf), atol=1e-4, rtol=0)


def test_predict_refuses_a_writer_that_stands_before_the_crf(scene, tmp_path):
    data, model, _ = scene
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [PredictionWriter(tmp_path / "out"), DenseCRF(workers=0)]
    with pytest.raises(UserError, match="put DenseCRF before it"):
        L.Trainer(accelerator="cpu", callbacks=callbacks, **quiet).predict(model, data)
    assert not (tmp_path / "out").exists()
    L.Trainer(accelerator="cpu", callbacks=callbacks[::-1], **quiet).predict(model, data)
    assert len(list((tmp_path / "out/masks").iterdir())) == 5


def test_nan_names_the_picture(scene):
    model = scene[1]
    model.told = {key: value * (torch.nan if i == 3 else 1) for i, (key, value) in enumerate(model.told.items())}
    with pytest.raises(ValueError, match="DenseCRF, image 3: the CRF needs probabilities"):
        run(scene, workers=1)


def test_scores_over_their_sum_and_grey_of_16_bits_are_refined_too():
    """MaskFormer has no softmax, and a 16-bit picture is stretched to 0..255 for the CRF."""
    callback = DenseCRF(workers=0, trimap_widths=[])
    model = MaskFormer(3, num_queries=4).eval()
    callback._start(model)
    probs = model.probabilities(torch.rand(3, 8, 9)[None])[0]
    refined = callback._submit(probs, torch.randint(0, 65535, (1, 8, 9)).to(torch.uint16)).result()
    assert refined.shape == (1, 3, 8, 9)
    torch.testing.assert_close(refined.sum(dim=1), torch.ones(1, 8, 9))


def test_without_pydensecrf_one_line_says_what_to_do(monkeypatch, scene):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        run(scene, backend="pydensecrf")
    assert "\n" not in str(caught.value) and all(w in str(caught.value) for w in ("pip install pydensecrf2", "g++"))
    assert sentence(caught.value) == str(caught.value)
    assert "test/crf/miou" in run(scene, workers=0)  # the other backend works


@pytest.mark.slow
def test_commands_with_a_crf(trained, tree):
    """test logs it, predict uses it, fit does not; two processes count what one counts."""
    file = config(trained, tree, "with_crf")
    settings = yaml.safe_load(file.read_text())
    crf = {"class_path": "segmentation.callbacks.DenseCRF", "init_args": {"sigma_alpha": 10, "sigma_beta": 13}}
    settings["trainer"]["callbacks"].append(crf)  # after Report, which shows it all the same
    file.write_text(yaml.safe_dump(settings))
    checkpoint = trained / "logs/config/version_0/checkpoints/best.ckpt"
    out = succeed("test", "--config", file, "--ckpt_path", checkpoint, cwd=trained)
    run = trained / "logs/with_crf/version_0"
    assert (run / "crf.png").is_file() and "CRF" in out
    alone = column(run, "test/crf/miou")[0]
    succeed("test", "--config", file, "--ckpt_path", checkpoint, "--trainer.devices", 2, "--trainer.strategy", "ddp",
            cwd=trained)  # fmt: skip
    assert column(trained / "logs/with_crf/version_1", "test/crf/miou")[0] == pytest.approx(alone, abs=1e-6)
    succeed("predict", "--config", file, "--ckpt_path", checkpoint, cwd=trained)
    assert len(list((trained / "predictions/masks").iterdir())) == 3
    succeed("fit", "--config", file, "--trainer.max_epochs", 1, cwd=trained)
    assert not any("crf" in key for key in _header(trained / "logs/with_crf/version_2/metrics.csv"))


def _header(file) -> list[str]:
    with file.open(newline="") as lines:
        return next(csv.reader(lines))


@pytest.mark.slow
def test_tune_crf_prints_a_table_and_yaml_that_can_be_pasted(trained, tree):
    checkpoint = trained / "logs/config/version_0/checkpoints/best.ckpt"
    axes = ["--w1", "[3, 5]", "--sigma_alpha", "[5, 10, 20]", "--sigma_beta", "[5, 13]", "--num_images", 2]
    arguments = ["tune_crf", "--config", trained / "config.yaml", "--ckpt_path", checkpoint, *axes]
    out = succeed(*arguments, cwd=trained)
    block = yaml.safe_load(re.search(r"callbacks\+: .*\n.*\n.*", out)[0])["callbacks+"][0]
    assert block["class_path"] == "segmentation.callbacks.DenseCRF"
    with (trained / "tune_crf/search.csv").open(newline="") as file:
        coarse = list(csv.DictReader(file))
    assert float(coarse[0]["w1"]) == block["init_args"]["w1"]
    succeed(*arguments, "--grid", "true", "--output_dir", "grid", cwd=trained)
    with (trained / "grid/search.csv").open(newline="") as file:
        grid = list(csv.DictReader(file))
    assert len(grid) == 12 and 2 <= len(coarse) <= 12
    found = {json.dumps([row["w1"], row["sigma_alpha"], row["sigma_beta"]]): row["miou"] for row in grid}
    for row in coarse:
        assert float(found[json.dumps([row["w1"], row["sigma_alpha"], row["sigma_beta"]])]) == float(row["miou"])


def test_search_scores_each_setting_once_and_by_the_whole_set(tmp_path):
    """Two stored pictures, one matrix: the mIoU of their sum."""

    class Inline:
        tasks = 0

        def map(self, function, *columns):
            self.tasks += len(columns[0])
            return map(function, *columns)

    class Silent:
        def add_task(self, *args, **kwargs):
            return 0

        update = advance = add_task

    pairs = [noisy(i) for i in (8, 9)]
    for i, (probs, image, truth) in enumerate(pairs):
        torch.save({"probs": probs, "image": image, "mask": truth.byte()}, tmp_path / f"{i}.pt")
    search = Search([tmp_path / "0.pt", tmp_path / "1.pt"], 3, "torch", Inline(), Silent())
    weak, strong = CRF(w1=0, w2=0), CRF(4, 20, 20, 3, 1)
    search.evaluate([weak, strong, weak])
    expected = [
        miou([refine(p, i, crf).argmax(dim=1) for p, i, _ in pairs], [t for _, _, t in pairs]) for crf in (weak, strong)
    ]
    assert list(search.miou.values()) == pytest.approx(expected, abs=1e-5)
    assert search.best() == strong
    search.evaluate([strong])
    assert search.pool.tasks == 4


def test_configs_of_the_papers_have_their_crf():
    for name, preset in (("deeplabv1_voc", "deeplabv1_largefov"), ("deeplabv2_voc", "deeplabv2")):
        callbacks = yaml.safe_load((PROJECT / f"configs/{name}.yaml").read_text())["trainer"]["callbacks+"]
        crf = next(c for c in callbacks if c["class_path"] == "segmentation.callbacks.DenseCRF")
        assert crf["init_args"]["preset"] == preset
