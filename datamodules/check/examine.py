"""One pass over a data set: collect the facts of every sample, add them up, and apply the rules."""

import copy
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..base import IGNORE, SegmentationDataModule, check_names, range_of, voc_palette
from ..dataset import LabelTable
from ..decode import Sample
from ..errors import UserError
from .facts import Facts, look_at
from .findings import RULES, SEVERITIES, Examination, Finding, count, found_colors

COMMON = 0.001  # smallest share of the pixels of a colour that is a class: smoothing and JPEG leave rarer colours


def examine(data: SegmentationDataModule, workers: int | None = None) -> Examination:
    """Decode every file of the splits that fit and test read, and report what training would meet.

    Args:
        data: any data set.
        workers: number of threads, by default one per core. Decoding and counting let other threads run. Processes
            took twice the time on two cores, and ten times if each must import torch first.

    Raises:
        UserError: if a missing folder leaves nothing to look at, names tell no classes apart, or the arguments of the
            data set contradict each other.
    """
    data.prepare_data()
    splits = list(dict.fromkeys(("train", "val", data.test_split)))
    listed, findings = list_splits(data, splits)
    check_names(data.class_names)
    columns = (TextColumn("looking at the files"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, Progress(*columns, transient=True) as bar:
        facts = list(bar.track(pool.map(look_at, *zip(*listed, strict=True)), len(listed))) if listed else []
    numbers = Counter(split for split, _ in listed)
    return add_up(data, facts, {split: numbers[split] for split in splits}, findings)


def look_before(
    data: SegmentationDataModule, splits: dict[str, str], wanted: dict[str, int | None]
) -> dict[str, np.ndarray]:
    """Look at files before a run: refuse what `examine` calls an error, and say what it warns of.

    Hashes, mean and std are left out, so the same picture in two files is not found.

    Args:
        data: a data set whose splits are opened.
        splits: role -> split of the data sets to look at.
        wanted: role -> number of files to decode, evenly spread; None for all.

    Returns:
        by role, pixels of each class in these files, int64 ``(K,)``.

    Raises:
        UserError: for the first error, in the words of ``check_data``.
    """
    facts: list[Facts] = []
    partial = False
    for role, split in splits.items():
        dataset, number = data.datasets[role], wanted[role]
        unmatched = [i for i, sample in enumerate(dataset.samples) if sample.missing() is not None]
        left = [i for i in range(len(dataset)) if number is None or dataset.samples[i].image is not None]
        left = sorted({*left} - {*unmatched}) if number != 0 else []
        chosen = left[:: -(-len(left) // number)] if number and left else left
        partial |= len(unmatched) + len(chosen) < len(dataset)
        if len(chosen) > 2000:
            rank_zero_info(f"decoding {len(chosen)} files of '{role}'; data.check: 500 decodes fewer")
        samples = [dataset.samples[i] for i in unmatched + chosen]
        reads = [lambda i=i, dataset=dataset: dataset.stored(i) for i in unmatched + chosen]
        with ThreadPoolExecutor(max(2, data.num_workers)) as pool:
            facts += pool.map(look_at, repeat(split), samples, reads, repeat(True))
    numbers = {split: len(data.datasets[role]) for role, split in splits.items()}
    found = add_up(data, facts, numbers, [], trains="train" in splits, partial=partial)
    if errors := [finding for finding in found.findings if finding.severity == "error"]:
        more = f". And {count(len(errors) - 1, 'more error')}: lightning check_data lists them" if errors[1:] else ""
        raise UserError(f"{errors[0]}{more}")
    for finding in found.findings:
        if finding.severity == "warning":
            rank_zero_info(f"warning: {finding}")
    return {role: found.pixels[split][:-2] for role, split in splits.items()}


def add_up(
    data: SegmentationDataModule,
    facts: list[Facts],
    numbers: dict[str, int],
    findings: list[Finding],
    trains: bool = True,
    partial: bool = False,
) -> Examination:
    """Add up the facts of all samples and apply the rules.

    Args:
        data: the data set as configured.
        facts: the facts of its samples.
        numbers: number of samples of each split.
        findings: what was found before; the list is extended.
        trains: whether the split ``train`` is there to train on.
        partial: whether samples were left out.
    """
    completed = complete(data, facts)
    table = completed.label_table()
    for f in facts:
        f.counts = count_labels(f, table, completed.num_classes)
    none = np.zeros(completed.num_classes + 2, np.int64)
    train = [f for f in facts if f.split == "train"]
    train_counts = np.stack([none, *(f.counts for f in train)])[:, :-2]
    mean, std = mean_and_std(train, completed.value_range)
    found = Examination(
        given=data,
        data=completed,
        numbers=numbers,
        facts=facts,
        pixels={split: sum((f.counts for f in facts if f.split == split), none) for split in numbers},
        images=(train_counts > 0).sum(axis=0),
        class_weights=median_frequency(train_counts),
        mean=mean,
        std=std,
        findings=findings,
        trains=trains,
        partial=partial,
    )
    for rule in RULES:
        findings += rule(found)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return found


def list_splits(data: SegmentationDataModule, splits: Sequence[str]) -> tuple[list[tuple[str, Sample]], list[Finding]]:
    """List the samples of all splits; an empty or missing split is a finding.

    Returns:
        (split, sample) of every sample, and the findings.

    Raises:
        UserError: if no split has a sample; the error of the first split.
    """
    listed: list[tuple[str, Sample]] = []
    findings: list[Finding] = []
    errors: list[UserError] = []
    for split in splits:
        try:
            listed += [(split, sample) for sample in data.listed(split)]
        except UserError as error:
            errors.append(error)
            if split in ("train", "val"):
                findings.append(Finding("error", str(error)))
            else:
                advice = "Training does not need it; for the command test, add it or set data.test_split: val"
                findings.append(Finding("warning", f"there is no split '{split}'", advice=advice))
    if not listed:
        raise errors[0]
    if unknown := getattr(data, "colors_unknown", ""):  # of a `Folder`, which lists its files all the same
        findings.append(Finding("error", unknown))
    return listed, findings


def complete(data: SegmentationDataModule, facts: Sequence[Facts]) -> SegmentationDataModule:
    """Copy a data set, and add what its files suggest where its arguments state nothing.

    Masks of 0 and 255 get the label map that makes 255 the foreground. If nothing names the classes, the values in the
    masks are the classes. In masks of unknown colours, the colours are the classes, in the order of their RGB codes,
    which is the order of `Folder`.
    """
    known = copy.copy(data)
    limits = [(f.dtype, *f.limits) for f in facts if f.limits is not None and f.split == "train"]
    if limits and data.bands is None and data.value_range is None:
        types, lows, highs = zip(*limits, strict=True)
        known.value_range = range_of(getattr(torch, types[0]), min(lows), max(highs))
    train = {value for f in facts if f.split == "train" for value in f.values}
    declared = {*data.void_values, *(data.label_map or ())}
    is_binary = train == {0, IGNORE} and IGNORE not in declared and data.num_classes != 1
    if is_binary:
        known.label_map = {0: 0, IGNORE: 1}
    if data.class_names:
        known.palette = data.palette if len(data.palette) == data.num_classes else voc_palette(data.num_classes)
        return known
    stored = sorted({v for f in facts for v in f.values if 0 <= v < 65536} - {IGNORE, *data.void_values})
    colors = found_colors(facts)
    names: Sequence[str] = [str(value) for value in stored]
    palette = {value: color for f in facts for value, color in f.palette.items()}
    if is_binary:
        names = ["background", "foreground"]
    elif data.label_map:
        names = [str(k) for k in range(1 + max({*data.label_map.values()} - {IGNORE}, default=-1))]
    elif colors and not stored:
        kept = sorted(color for color, n in colors.items() if n >= COMMON * colors.total())[:IGNORE]
        names, palette = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in kept], dict(enumerate(kept))
        for f in facts:
            f.values = {label: f.colors[color] for label, color in enumerate(kept) if color in f.colors}
    elif len(stored) >= IGNORE:
        names = []  # so many values are no labels
    elif stored != list(range(len(stored))):
        known.label_map = {value: label for label, value in enumerate(stored)}
        palette = {known.label_map[value]: color for value, color in palette.items() if value in known.label_map}
    known.class_names = names
    known.palette = [palette.get(k, color) for k, color in enumerate(voc_palette(len(names)))]
    return known


def count_labels(facts: Facts, table: LabelTable, classes: int) -> np.ndarray:
    """Count a mask's pixels of each class, ignored, and without a class: int64 ``(K + 2,)``."""
    labels = table(torch.tensor([*facts.values], dtype=torch.int64)).numpy().astype(np.int64)
    labels[labels == IGNORE] = classes
    labels[labels < 0] = classes + 1
    counts = np.zeros(classes + 2, np.int64)
    np.add.at(counts, labels, np.array([*facts.values.values()], np.int64))
    return counts


def median_frequency(counts: np.ndarray) -> np.ndarray:
    """Compute class weights by median frequency balancing (Eigen and Fergus, arXiv 1411.4734; SegNet, section 3.1).

    The frequency of a class is the number of its pixels divided by all labelled pixels of the images in which it
    occurs. Its weight is the median of all frequencies divided by its own. A class that never occurs gets the weight
    1: no pixel has this weight now, and 0 would silently ignore the class if it occurs later.

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


def mean_and_std(facts: Sequence[Facts], value_range: Sequence[float] | None = None) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation per band of all pixels, scaled to 0..1 by `value_range` or the type's range.

    Both are empty if no image could be read or the images differ in their number of bands.
    """
    usable = [f for f in facts if f.sums and np.isfinite(f.sums).all()]
    bands = {len(f.sums) for f in usable}
    if len(bands) != 1:
        return [], []
    n = sum(f.shape[1] * f.shape[2] for f in usable)
    mean = [math.fsum(values) / n for values in zip(*(f.sums for f in usable), strict=True)]
    square = [math.fsum(values) / n for values in zip(*(f.squares for f in usable), strict=True)]
    std = [math.sqrt(max(q - m * m, 0.0)) for m, q in zip(mean, square, strict=True)]
    if value_range is None:
        return mean, std
    (low, high), dtype = value_range, np.dtype(usable[0].dtype)
    full = float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0
    return [(m * full - low) / (high - low) for m in mean], [s * full / (high - low) for s in std]
