"""Compare metrics with other libraries, with slow and obvious loops, and with numbers worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.metrics import adapted_rand_error
from torch.multiprocessing import spawn
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from segmentation.metrics import BoundaryIoU, ConfusionMatrix, TrimapIoU, confusion_metrics
from segmentation.metrics.membranes import EMErrors, rand_error, simple, warp, warping_error

CLASSES = 4
ALL_AROUND = np.ones((3, 3), dtype=bool)


def blobs(seed: int, images: int = 3, size: tuple[int, int] = (23, 31)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and a mask ``(N, H, W)`` that agree in most pixels; some are ignored, and one class is rare."""
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randn(2, images, CLASSES, 5, 6, generator=generator)
    fields[1] = fields[0] + 0.4 * fields[1]
    fields[:, :, -1] -= 1.5
    labels, mask = F.interpolate(fields.flatten(0, 1), size, mode="bilinear").argmax(1).view(2, images, *size)
    mask[:, :2], mask[0, 10:14, 5:20] = 255, 255
    return labels, mask


# The confusion matrix and its metrics


def test_by_hand_on_images_of_2x2():
    """The first has 3 of 4 pixels right, the second a single labelled pixel, which is right, and the third none."""
    mask = torch.tensor([[[0, 0], [0, 1]], [[1, 255], [255, 255]], [[255, 255], [255, 255]]])
    labels = torch.tensor([[[0, 0], [1, 1]], [[1, 0], [0, 0]], [[0, 1], [0, 1]]])
    confusion = ConfusionMatrix(2)
    confusion.update(labels[:1], mask[:1])
    assert confusion.compute().tolist() == [[2, 1], [0, 1]]
    values = confusion_metrics(confusion.compute(), ["a", "b"], confusion.image_iou())
    expected = {
        "iou/a": 2 / 3, "iou/b": 1 / 2, "miou": 7 / 12, "micro_iou": 3 / 5, "image_iou": 7 / 12,
        "fwiou": (3 * 2 / 3 + 1 / 2) / 4, "pixel_acc": 3 / 4, "mean_acc": (2 / 3 + 1) / 2,
    }  # fmt: skip
    assert {key: float(value) for key, value in values.items()} == pytest.approx(expected)
    confusion.update(labels[1:], mask[1:])
    assert confusion.compute().tolist() == [[2, 1], [0, 2]]
    assert confusion.image_iou() == pytest.approx((7 / 12 + 1) / 2)
    assert "image_iou" not in confusion_metrics(confusion.compute(), ["a", "b"])


def test_the_matrix_and_its_averages_are_those_of_torchmetrics():
    own, theirs = ConfusionMatrix(CLASSES), MulticlassConfusionMatrix(CLASSES, ignore_index=255)
    averages = {"miou": "macro", "micro_iou": "micro", "fwiou": "weighted"}
    jaccard = {key: MulticlassJaccardIndex(CLASSES, how, ignore_index=255) for key, how in averages.items()}
    per_image = []
    for seed in range(3):
        labels, mask = blobs(seed)
        for metric in (own, theirs, *jaccard.values()):
            metric.update(labels, mask)
        for image in zip(labels, mask, strict=True):
            per_image.append(MulticlassJaccardIndex(CLASSES, "macro", ignore_index=255)(*image))
    assert torch.equal(own.compute(), theirs.compute()) and own.compute().count_nonzero() > 12
    values = confusion_metrics(own.compute(), list("abcd"))
    for key, metric in jaccard.items():
        torch.testing.assert_close(values[key].float(), metric.compute())
    torch.testing.assert_close(own.image_iou(), torch.stack(per_image).mean())


def test_counts_stay_exact_where_smaller_types_do_not():
    confusion = ConfusionMatrix(2)
    pixel = torch.ones(1, 1, 1, dtype=torch.int64)
    for start in (2**24, 2**31, 2**40):  # where float32 and int32 end, and further
        confusion.matrix.fill_(start)
        confusion.update(pixel, pixel)
        assert confusion.matrix.tolist() == [[start, start], [start, start + 1]]


def test_a_mask_is_not_changed():
    labels, mask = blobs(0)
    kept = mask.clone()
    for metric in (ConfusionMatrix(CLASSES), BoundaryIoU(CLASSES), TrimapIoU(CLASSES, [3])):
        metric.update(labels, mask)
    assert torch.equal(mask, kept)


# Near contours


def eroded(region: np.ndarray, times: int) -> np.ndarray:
    """Erode a region with a 3x3 square; outside the picture is nothing."""
    return ndimage.binary_erosion(region, ALL_AROUND, iterations=times, border_value=0)


@pytest.mark.parametrize("distance", [0.02, 0.05, 0.2])
def test_boundary_iou_is_that_of_eroded_masks_per_class(distance):
    """The loop computes it class by class, as the paper's authors do; ignored pixels belong to no class."""
    metric, intersection, union = BoundaryIoU(CLASSES, distance), np.zeros(CLASSES), np.zeros(CLASSES)
    times = {0.02: 1, 0.05: 2, 0.2: 8}[distance]  # of a diagonal of 38.6 pixels
    for seed in range(2):
        labels, mask = blobs(seed)
        metric.update(labels, mask)
        for prediction, truth in zip(labels.numpy(), mask.numpy(), strict=True):
            for k in range(CLASSES):
                true, found = truth == k, (prediction == k) & (truth != 255)
                true, found = true & ~eroded(true, times), found & ~eroded(found, times)
                intersection[k] += (true & found).sum()
                union[k] += (true | found).sum()
    assert (intersection > 0).all() and (intersection < union).all()
    np.testing.assert_allclose(metric.compute().numpy(), intersection / union)


def test_boundary_iou_of_the_truth_is_one_and_of_an_absent_class_nan():
    mask = blobs(0)[1]
    metric = BoundaryIoU(CLASSES + 1)
    metric.update(mask.where(mask != 255, 0), mask)
    assert metric.compute()[:-1].tolist() == [1] * CLASSES and metric.compute()[-1].isnan()


def test_trimaps_hold_what_is_near_a_change_of_label():
    """A loop over pixels and contour pixels gives the same matrices."""
    widths = [5, 1, 2.5]
    metric = TrimapIoU(CLASSES, widths)
    labels, mask = blobs(1, images=2, size=(13, 17))
    metric.update(labels, mask)
    expected = torch.zeros(3, CLASSES, CLASSES, dtype=torch.int64)
    pixels = [(y, x) for y in range(13) for x in range(17)]
    for prediction, truth in zip(labels, mask, strict=True):
        contour = [
            (y, x)
            for y, x in pixels
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            if 0 <= v < 13 and 0 <= u < 17 and truth[y, x] != truth[v, u]
        ]
        for y, x in pixels:
            away = min(((y - v) ** 2 + (x - u) ** 2) ** 0.5 for v, u in contour)
            for i, width in enumerate(sorted(widths)):
                if truth[y, x] != 255 and away + 1 <= width:
                    expected[i, truth[y, x], prediction[y, x]] += 1
    assert metric.widths == [1, 2.5, 5] and torch.equal(metric.compute(), expected)
    sizes = expected.sum(dim=(1, 2))
    assert 0 < sizes[0] < sizes[1] < sizes[2] <= (mask != 255).sum()


def test_a_wide_trimap_is_the_whole_picture_and_one_without_contour_empty():
    labels, mask = blobs(2)
    wide, confusion = TrimapIoU(CLASSES, [1000]), ConfusionMatrix(CLASSES)
    wide.update(labels, mask)
    confusion.update(labels, mask)
    assert torch.equal(wide.compute()[0], confusion.compute())
    wide.reset()
    wide.update(labels, torch.zeros_like(mask))
    assert wide.compute().sum() == 0


def test_senseless_widths_are_refused():
    for widths in ([], [0], [3, -1]):
        with pytest.raises(ValueError, match="1 or more"):
            TrimapIoU(2, widths)
    for distance in (0, 1, 2.5):
        with pytest.raises(ValueError, match="share of the diagonal"):
            BoundaryIoU(2, distance)


# Electron microscopy


def slices(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Return cells between membranes, and a noisy prediction of the membrane's probability."""
    rng = np.random.RandomState(seed)
    cells = ndimage.gaussian_filter(rng.randn(size, size), 3)
    cells = np.abs(cells) > 0.15 * np.abs(cells).max()
    membrane = ndimage.gaussian_filter(~cells + 0.6 * rng.randn(size, size), 1).clip(0, 1)
    return cells, membrane


def topology(cells: np.ndarray) -> tuple[int, int]:
    """Count the 4-connected cells, and the 8-connected parts of membranes and outside."""
    return ndimage.label(cells)[1], ndimage.label(~np.pad(cells, 1), ALL_AROUND)[1]


def test_a_pixel_is_simple_just_where_its_flip_keeps_cells_and_holes():
    """By Euler's formula, a flip of any other pixel changes one of the two counts."""
    cells = np.random.RandomState(0).rand(20, 20) < 0.6
    around = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]
    padded, found = np.pad(cells, 1), []
    for y, x in np.ndindex(cells.shape):
        flipped = cells.copy()
        flipped[y, x] ^= True
        ring = np.array([[padded[y + 1 + v, x + 1 + u] for v, u in around]])
        found.append(simple(ring)[0])
        assert found[-1] == (topology(flipped) == topology(cells)), (y, x)
    assert 100 < sum(found) < 300


@pytest.mark.parametrize("seed", range(3))
def test_warping_keeps_the_topology_and_comes_nearer(seed):
    cells, membrane = slices(seed)
    for threshold in (0.1, 0.5, 0.9):
        prediction = membrane < threshold
        warped = warp(cells, prediction)
        assert topology(warped) == topology(cells)
        differ = warped != prediction
        assert 0 < differ.sum() < 0.5 * (cells != prediction).sum()
        assert not (differ & (cells == prediction)).any()  # right pixels stay


def test_a_shifted_border_is_no_warping_error_and_a_gap_is_one_pixel():
    """Two cells and a membrane between them, worked out by hand."""
    truth = np.ones((8, 9), dtype=bool)
    truth[:, 4] = False
    shifted = np.roll(truth, 1, axis=1)
    assert warping_error(truth, shifted) == 0 and rand_error(truth, truth) == 0
    gap = truth.copy()
    gap[3, 4] = True
    assert warping_error(truth, gap) == pytest.approx(1 / 72)
    # 2 * 32 * 31 pairs in a cell in both, 64 * 63 in the prediction
    assert rand_error(truth, gap) == pytest.approx(1 - 2 * 1984 / (1984 + 4032))


@pytest.mark.parametrize("seed", range(3))
def test_rand_error_is_scikit_images_where_lost_pixels_are_alone(seed):
    cells, membrane = slices(seed)
    for threshold in (0.2, 0.5, 0.8):
        prediction = membrane < threshold
        labels = ndimage.label(prediction)[0]
        alone = labels == 0
        labels[alone] = labels.max() + 1 + np.arange(alone.sum())
        expected = adapted_rand_error(ndimage.label(cells)[0], labels)[0]
        assert 0 < expected < 1 and rand_error(cells, prediction) == pytest.approx(expected)
    assert rand_error(np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)) == 0  # no cell to find


def test_em_errors_are_means_over_slices_and_f1_over_pixels():
    cells, membrane = zip(*(slices(seed) for seed in range(3)), strict=True)
    metric = EMErrors([0.3, 0.6])
    metric.update(torch.tensor(np.stack(membrane[:2])), torch.tensor(np.stack(cells[:2])))
    metric.update(torch.tensor(membrane[2])[None], torch.tensor(cells[2])[None])
    for i, threshold in enumerate((0.3, 0.6)):
        found = [probability < threshold for probability in membrane]
        right = sum((a & b).sum() for a, b in zip(cells, found, strict=True))
        precision, recall = right / np.sum(found), right / np.sum(cells)
        expected = [
            1 - 2 * precision * recall / (precision + recall),
            np.mean([rand_error(a, b) for a, b in zip(cells, found, strict=True)]),
            np.mean([warping_error(a, b) for a, b in zip(cells, found, strict=True)]),
        ]
        assert metric.compute()[:, i].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        EMErrors([0.0, 0.5])


# Processes


def measure(rank: int, processes: int, folder: str) -> list[torch.Tensor]:
    """Compute every metric over every `processes`-th batch."""
    confusion, boundary, trimaps = ConfusionMatrix(CLASSES), BoundaryIoU(CLASSES), TrimapIoU(CLASSES, [1, 4])
    em = EMErrors([0.4, 0.6])
    for seed in range(rank, 5, processes):
        for metric in (confusion, boundary, trimaps):
            metric.update(*blobs(seed))
        cells, membrane = slices(seed, size=32)
        em.update(torch.tensor(membrane)[None], torch.tensor(cells)[None])
    return [confusion.compute(), confusion.image_iou(), boundary.compute(), trimaps.compute(), em.compute()]


def in_a_process(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.save(measure(rank, processes, folder), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    spawn(in_a_process, (2, str(tmp_path)), nprocs=2)
    alone = measure(0, 1, "")
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone)
