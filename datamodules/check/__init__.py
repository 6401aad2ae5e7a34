"""The data doctor: what training would meet in a data set's files, found out in one pass over all of them.

`examine` collects the facts of every sample in threads (`check_files`), adds them up to class shares and weights, mean
and std, and asks the rules (`check_findings`); `yaml_block` says what to paste. `check_page` shows it all.
"""

import copy
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..base import IGNORE, SegmentationDataModule, voc_palette
from ..errors import UserError
from ..files import Sample
from .facts import Facts, look_at
from .findings import RULES, Examination, Finding, found_colors

COMMON = 0.001  # share of the pixels from which a colour counts as a class: smoothing and JPEG leave rarer ones


def examine(data: SegmentationDataModule, workers: int | None = None) -> Examination:
    """Look at every file of the splits that fit and test read.

    Args:
        data: any data set.
        workers: threads, one per core without it. Decoding and counting let other threads run; processes took twice
            the time on two cores, ten times where each must import torch first.

    Raises:
        UserError: if there is nothing to look at, because a folder is missing.
        UserError: if the data set's arguments contradict each other.
    """
    data.prepare_data()
    splits = list(dict.fromkeys(("train", "val", data.test_split)))
    listed: list[tuple[str, Sample]] = []
    findings: list[Finding] = []
    refused: list[UserError] = []
    for split in splits:
        problem, samples = "empty", []
        try:
            samples = data.samples(split)
        except UserError as error:
            problem = f"missing: {error}"
            refused.append(error)
        listed += [(split, sample) for sample in samples]
        if not samples and split in ("train", "val"):
            findings.append(Finding("error", f"the split '{split}' is {problem}"))
        elif not samples:
            advice = "Training needs none; for the command test, add one or set data.test_split: val"
            findings.append(Finding("warning", f"there is no split '{split}'", advice=advice))
    if refused and not listed:
        raise refused[0]
    if unknown := getattr(data, "colors_unknown", ""):  # of a `Folder`, which lists its files all the same
        findings.append(Finding("error", unknown))

    columns = (TextColumn("looking at the files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, Progress(*columns, transient=True) as bar:
        facts = list(bar.track(pool.map(look_at, *zip(*listed, strict=True)), len(listed))) if listed else []

    known = completed(data, facts)
    table = known.label_table().numpy()
    for f in facts:
        f.counts = count_labels(f, table, known.num_classes)
    zero = np.zeros(known.num_classes + 2, np.int64)
    pixels = {split: sum((f.counts for f in facts if f.split == split), zero) for split in splits}
    train = np.stack([zero, *(f.counts for f in facts if f.split == "train")])[:, :-2]
    mean, std = mean_and_std([f for f in facts if f.split == "train"])
    images, weights = (train > 0).sum(axis=0), median_frequency(train)
    found = Examination(data, known, splits, facts, pixels, images, weights, mean, std, findings)
    for rule in RULES:
        findings += rule(found)
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.severity))
    return found


def completed(data: SegmentationDataModule, facts: Sequence[Facts]) -> SegmentationDataModule:
    """Complete a copy of the data set by what its files suggest, where it says nothing itself.

    Masks of 0 and 255 get the label map that makes 255 the foreground. Where nothing names the classes, they are the
    values found; in masks of unknown colours, the colours, in the order of their codes as `Folder` takes them.
    """
    known = copy.copy(data)
    train = {value for f in facts if f.split == "train" for value in f.values}
    binary = train == {0, IGNORE} and IGNORE not in (data.label_map or ()) and data.num_classes != 1
    if binary:
        known.label_map = {0: 0, IGNORE: 1}
    if data.class_names:
        known.palette = data.palette if len(data.palette) == data.num_classes else voc_palette(data.num_classes)
        return known
    stored = sorted({v for f in facts for v in f.values if 0 <= v < 65536} - {IGNORE, *data.void_values})
    colors = found_colors(facts)
    names: Sequence[str] = [str(value) for value in stored]
    palette = {value: color for f in facts for value, color in f.palette.items()}
    if binary:
        names = ["background", "foreground"]
    elif data.label_map:
        names = [str(k) for k in range(1 + max({*data.label_map.values()} - {IGNORE}, default=-1))]
    elif colors and not stored:
        kept = sorted(color for color, n in colors.items() if n >= COMMON * colors.total())[:IGNORE]
        names, palette = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in kept], dict(enumerate(kept))
        for f in facts:
            f.values = {label: f.colors[color] for label, color in enumerate(kept) if color in f.colors}
    elif len(stored) >= IGNORE:
        names = []  # no labels, whatever they are
    elif stored != list(range(len(stored))):
        known.label_map = {value: label for label, value in enumerate(stored)}
        palette = {known.label_map[value]: color for value, color in palette.items() if value in known.label_map}
    known.class_names = names
    known.palette = [palette.get(k, color) for k, color in enumerate(voc_palette(len(names)))]
    return known


def count_labels(facts: Facts, table: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of each class, of ignored ones and of those without a class: int64 ``(K + 2,)``."""
    values = np.array([*facts.values], np.int64).clip(-1, len(table) - 1)  # both ends of the table mean: no class
    labels = table[values].astype(np.int64)
    labels[labels == IGNORE] = classes
    labels[labels < 0] = classes + 1
    counts = np.zeros(classes + 2, np.int64)
    np.add.at(counts, labels, np.array([*facts.values.values()], np.int64))
    return counts


def median_frequency(counts: np.ndarray) -> np.ndarray:
    """Class weights by median frequency balancing (Eigen and Fergus, arXiv 1411.4734; SegNet, section 3.1).

    The frequency of a class is its pixels over all labelled pixels of the images in which it occurs; its weight is the
    median of the frequencies over its own. A class that never occurs gets 1: no pixel meets that weight now, and 0
    would silently leave the class out once it does occur.

    Args:
        counts: labelled pixels of each image and class, ``(N, K)``.

    Returns:
        ``(K,)``.
    """
    around = ((counts > 0) * counts.sum(axis=1, keepdims=True)).sum(axis=0)
    frequency = np.divide(counts.sum(axis=0), around, out=np.full(counts.shape[1], np.nan), where=around > 0)
    if not (around > 0).any():
        return np.ones(counts.shape[1])
    return np.where(around > 0, np.nanmedian(frequency) / frequency, 1.0)


def mean_and_std(facts: Sequence[Facts]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per band of all pixels, scaled to 0..1; empty if no image could be read."""
    usable = [f for f in facts if f.sums and np.isfinite(f.sums).all()]
    bands = {len(f.sums) for f in usable}
    if len(bands) != 1:
        return [], []
    n = sum(f.shape[1] * f.shape[2] for f in usable)
    mean = [math.fsum(values) / n for values in zip(*(f.sums for f in usable), strict=True)]
    square = [math.fsum(values) / n for values in zip(*(f.squares for f in usable), strict=True)]
    return mean, [math.sqrt(max(q - m * m, 0.0)) for m, q in zip(mean, square, strict=True)]
