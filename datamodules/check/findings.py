"""What the data doctor finds: rules that look at the facts of all samples and yield `Finding`s."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..base import IGNORE, SegmentationDataModule
from .facts import Color, Facts

SEVERITIES = ("error", "warning", "note")
UNEQUAL = 100  # the largest class has so many times the pixels of the rarest: it dominates the loss
LOSSY = "So many are no labels, but what JPEG or smoothing leaves: save masks as PNG, without resizing"


@dataclass
class Finding:
    """Something that the user should look at.

    Args:
        severity: ``error`` (training or testing would fail), ``warning`` or ``note``.
        text: what was found, with its count.
        facts: facts of the files, the worst first.
        mask: whether the finding is about the masks and not the images.
        detail: a sentence about the first file, and the number of further ones; "" names the first file.
        advice: what to do.
    """

    severity: str
    text: str
    facts: Sequence[Facts] = ()
    mask: bool = False
    detail: str = ""
    advice: str = ""

    @property
    def files(self) -> list[str]:
        """The files that the finding is about."""
        return [facts.file(self.mask) for facts in self.facts]

    def __str__(self) -> str:
        detail = self.detail or (and_more(self.files[0], len(self.facts)) if self.facts else "")
        return self.text + (f": {detail}" if detail else "") + (f". {self.advice}" if self.advice else "")


@dataclass
class Examination:
    """The result of `examine`.

    Args:
        given: the data set as configured.
        data: the data set, completed by what its files suggest where its arguments state nothing.
        splits: the splits that fit and test read.
        facts: the facts of every sample.
        pixels: by split, the pixels of each class, ignored, and without a class, int64 ``(K + 2,)``.
        images: number of training images in which each class occurs, ``(K,)``.
        class_weights: weights of the classes, ``(K,)``, see `median_frequency`.
        mean: mean of the training images' pixels per band, scaled to 0..1; empty if none could be read.
        std: standard deviation of the same pixels per band.
        findings: all findings, errors first.
    """

    given: SegmentationDataModule
    data: SegmentationDataModule
    splits: list[str]
    facts: list[Facts]
    pixels: dict[str, np.ndarray]
    images: np.ndarray
    class_weights: np.ndarray
    mean: list[float]
    std: list[float]
    findings: list[Finding]

    def of(self, split: str) -> list[Facts]:
        """Return the facts of a split's samples."""
        return [facts for facts in self.facts if facts.split == split]

    def shares(self, split: str) -> np.ndarray:
        """Return the share of each class in a split's labelled pixels, ``(K,)``; 0 if nothing is labelled."""
        labelled = self.pixels[split][:-2]
        return labelled / max(labelled.sum(), 1)

    @property
    def failed(self) -> bool:
        """Whether training or testing would fail."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The result in one or two plain sentences."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        fatal = [e for e in errors if not e.facts or any(f.split in ("train", "val") for f in e.facts)]
        if errors:
            more = f" And {count(len(errors) - 1, 'more error')}, see below." if len(errors) > 1 else ""
            return f"{'Training' if fatal else 'The test'} would fail: {(fatal or errors)[0]}.{more}"
        warnings = sum(finding.severity == "warning" for finding in self.findings)
        return "Ready to train" + (f", with {count(warnings, 'thing')} to look at." if warnings else ".")


def count(number: int, what: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def and_more(first: str, number: int) -> str:
    """Return the first of several, and how many more there are."""
    return f"{first} (and {number - 1:,} more)" if number > 1 else first


def percent(share: float) -> str:
    """Return a share in percent with three digits, so that rare classes do not look like 0."""
    return f"{100 * share:.3g} %"


def in_files(found: Examination) -> Iterator[Finding]:
    """Find files without a partner, unreadable files, and images that do not fit their mask or hold nothing."""
    if bad := [f for f in found.facts if f.problem == "unmatched"]:
        stems = Counter(Path(f.file()).with_suffix("") for f in bad)
        bad.sort(key=lambda f: -stems[Path(f.file()).with_suffix("")])
        (twin, n), detail = stems.most_common(1)[0], and_more(bad[0].reason, len(bad))
        advice = f"Two files are called {twin}: keep one of them" if n > 1 else ""
        yield Finding("error", f"{count(len(bad), 'file')} without a partner", bad, detail=detail, advice=advice)
    if bad := [f for f in found.facts if f.problem == "unreadable"]:
        detail = and_more(bad[0].reason, len(bad))
        yield Finding("error", f"{count(len(bad), 'file')} that cannot be read", bad, detail=detail)
    read = [f for f in found.facts if f.shape]
    if bad := [f for f in read if f.mask_shape and f.mask_shape != f.shape[1:]]:
        (mask_height, mask_width), (_, height, width) = bad[0].mask_shape, bad[0].shape
        detail = f"{bad[0].file(mask=True)} is {mask_width} x {mask_height} pixels, its image {width} x {height}"
        detail = and_more(detail, len(bad))
        turned = any(f.turned > 4 and f.mask_shape[::-1] == f.shape[1:] for f in bad)
        advice = "Images are turned upright by their EXIF orientation; turn these masks too" if turned else ""
        yield Finding("error", f"{count(len(bad), 'mask')} of another size than the image", bad, True, detail, advice)
    if bad := [f for f in read if not np.isfinite(f.sums).all()]:
        yield Finding("error", f"{count(len(bad), 'image')} with values that are no numbers (nan or infinite)", bad)
    if bad := [f for f in read if f.turned > 1 and f.mask_shape == f.shape[1:] and (f.turned < 5 or square(f))]:
        text = f"{count(len(bad), 'image')} turned or mirrored on reading by the EXIF orientation"
        advice = "Their sizes do not show whether the masks are turned too: look at the page"
        yield Finding("warning", text, bad, advice=advice)
    if bad := [f for f in read if np.isfinite(f.sums).all() and flat(f)]:
        yield Finding("warning", f"{count(len(bad), 'image')} of one single colour", bad)
    if bad := [f for f in read if f.mode[:1] in "IF" and f.dtype == "uint8"]:
        advice = "To read all bits, set data.bands: [0]"
        yield Finding("note", f"{count(len(bad), 'image')} of more than 8 bits, read as 8", bad, advice=advice)


def square(facts: Facts) -> bool:
    """Return whether an image is as high as wide."""
    return facts.shape[1] == facts.shape[2]


def flat(facts: Facts) -> bool:
    """Return whether each band of an image is constant, up to rounding."""
    n = facts.shape[1] * facts.shape[2]
    return all(q / n - (s / n) ** 2 <= 1e-13 * q / n for s, q in zip(facts.sums, facts.squares, strict=True))


def in_values(found: Examination) -> Iterator[Finding]:
    """Find masks of 0 and 255 only, unnamed classes, and stored values that have no class."""
    given, data, train = found.given, found.data, [f for f in found.of("train") if f.values]
    if data.label_map == {0: 0, IGNORE: 1} != given.label_map and all({0, IGNORE} >= f.values.keys() for f in train):
        advice = f"{IGNORE} means 'ignored': if it is your foreground, set data.label_map: {{0: 0, {IGNORE}: 1}}"
        yield Finding("error", f"the training masks hold 0 and {IGNORE} only", train, mask=True, advice=advice)
    if not given.class_names and data.class_names:
        advice = f"The block below names the {data.num_classes} classes in the masks by their stored values"
        yield Finding("error", "nothing names the classes: training needs data.class_names", advice=advice)
    elif not data.class_names and train:
        different = len({value for f in train for value in f.values})
        advice = f"The masks hold {different:,} different values, which are too many for labels"
        yield Finding("error", "nothing names the classes", train, mask=True, advice=advice)
    bad = sorted((f for f in found.facts if f.counts[-1] > 0), key=lambda f: -f.counts[-1])
    if bad and data.class_names:
        table = data.label_table()
        unknown = Counter[int]()
        for f in bad:
            unknown.update({v: n for v, n in f.values.items() if not 0 <= v < len(table) or table[v] < 0})
        listed = most_common(unknown, sum(int(f.counts.sum()) for f in bad))
        text = f"{count(len(bad), 'mask')} with values that belong to none of the {data.num_classes} classes, {listed}"
        advice = "To ignore them, use data.void_values; to learn them, data.class_names and data.label_map"
        yield Finding("error", text, bad, mask=True, advice=LOSSY if len(unknown) > 20 else advice)


def in_colors(found: Examination) -> Iterator[Finding]:
    """Find colours that have no class, and report how masks in colour and masks with a palette are read."""
    if bad := [f for f in found.facts if f.problem == "colour"]:
        colors = found_colors(bad)
        listed = most_common(colors, sum(int(np.prod(f.mask_shape)) for f in bad))
        advice = "Give one colour per class in data.palette, or a class map (README, 'Masks in colour')"
        if bad[0].sample.colors:
            advice = "Add them to the classes, or to data.void_colors to ignore them"
        text = f"{count(len(bad), 'mask')} in colours that belong to no class, {listed}"
        yield Finding("error", text, bad, mask=True, advice=LOSSY if len(colors) > 256 else advice)
    if some := [f for f in found.facts if f.values and f.sample.colors]:
        text = f"{count(len(some), 'mask')} in colour, read by the {len(some[0].sample.colors or ())} colours known"
        yield Finding("note", text, some, mask=True)
    if some := [f for f in found.facts if f.palette]:
        yield Finding("note", f"{count(len(some), 'mask')} with a palette, read by index", some, mask=True)
    meaning: dict[int, Color] = {}
    if bad := [f for f in some if any(meaning.setdefault(v, c) != c for v, c in f.palette.items())]:
        text = f"{count(len(bad), 'palette mask')} whose palette differs from the others'"
        advice = "If colours mean classes, save all masks with one palette: now one index has several colours"
        yield Finding("warning", text, bad, mask=True, advice=advice)


def found_colors(facts: Sequence[Facts]) -> Counter[Color]:
    """Count the pixels of each colour that has no class."""
    colors = Counter[Color]()
    for f in facts:
        colors.update(f.colors)
    return colors


def most_common(counts: Counter, total: int, shown: int = 8) -> str:
    """Describe values or colours by their shares of the pixels, the most common first."""
    listed = ", ".join(f"{value} ({percent(n / total)})" for value, n in counts.most_common(shown))
    return listed + (f" and {len(counts) - shown:,} more" if len(counts) > shown else "")


def in_classes(found: Examination) -> Iterator[Finding]:
    """Find classes that never occur, masks without labels, and very unequal classes."""
    names, train = found.data.class_names, found.pixels["train"][:-2]
    if not any(f.values for f in found.of("train")) or not names:
        return
    if not train.sum():
        some = [f for f in found.of("train") if f.values]
        yield Finding("error", "no pixel of the training masks has a class: there is nothing to learn", some, mask=True)
        return
    if len(names) > 1 and not train[1:].any() and found.pixels["train"][-2]:
        yield Finding("error", f"the training masks hold {names[0]} and ignored pixels only: there is nothing to learn")
    if empty := [f for f in found.facts if f.values and not f.counts[:-2].any() and not f.counts[-1]]:
        yield Finding("warning", f"{count(len(empty), 'mask')} in which every pixel is ignored", empty, mask=True)
    for split in found.splits[1:]:
        unseen = [k for k, n in enumerate(found.pixels[split][:-2]) if n and not train[k]]
        if unseen:
            some = [f for f in found.of(split) if f.counts[unseen].any()]
            text = f"{listing(names, unseen)} in '{split}' but never in 'train'"
            yield Finding(
                "warning", text, some, mask=True, advice="The network cannot learn a class that it never sees"
            )
    if never := [k for k in range(len(names)) if not any(found.pixels[split][k] for split in found.splits)]:
        yield Finding("warning", f"{listing(names, never)} in no mask")
    absent = [k for k, n in enumerate(found.pixels["val"][:-2]) if train[k] and not n]
    if absent and found.pixels["val"][:-2].any():
        yield Finding("note", f"{listing(names, absent)} never in 'val', so not in val/miou")
    present = np.flatnonzero(train)
    rare, large = int(present[train[present].argmin()]), int(train.argmax())
    if train[large] > UNEQUAL * train[rare]:
        few, much = (f"{names[k]} {percent(train[k] / train.sum())}" for k in (rare, large))
        text = f"very unequal classes in 'train': {few} of the labelled pixels, {much}"
        yield Finding("warning", text, advice="To balance them, use model.class_weights of the block below")


def listing(names: Sequence[str], classes: Sequence[int], shown: int = 8) -> str:
    """Name classes and add the verb."""
    listed = ", ".join(str(names[k]) for k in classes[:shown])
    listed += f" and {len(classes) - shown} more" if len(classes) > shown else ""
    return f"the class {listed} is" if len(classes) == 1 else f"the classes {listed} are"


def in_sizes(found: Examination) -> Iterator[Finding]:
    """Find splits that do not fit in batches, images smaller than the crop, and other counts than published."""
    data, listed = found.given, found.of("train")
    if 0 < len(listed) < data.batch_size:
        text = f"{count(len(listed), 'training image')}, fewer than one batch of {data.batch_size}"
        yield Finding("error", text, advice="Lower data.batch_size")
    for split in found.splits:
        images = [f for f in found.of(split) if f.shape]
        sizes, crop = Counter(f.shape[1:] for f in images), data.crop_size
        batch = data.batch_size if split == "train" else data.eval_batch_size
        if len(sizes) > 1 and batch > 1 and not (split == "train" and crop is not None):
            usual = sizes.most_common(1)[0][0]
            advice = "Set data.crop_size" if split == "train" else "Set data.eval_batch_size: 1"
            text = f"'{split}' has images of {len(sizes)} sizes, which do not fit in one batch of {batch}"
            yield Finding("error", text, [f for f in images if f.shape[1:] != usual], advice=advice)
        if split == "train" and crop is not None:
            height, width = (crop, crop) if isinstance(crop, int) else crop
            if small := [f for f in images if f.shape[1] < height or f.shape[2] < width]:
                text = f"{count(len(small), 'training image')} smaller than the crop of {width} x {height}, so padded"
                yield Finding("warning", text, sorted(small, key=lambda f: f.shape[1] * f.shape[2]))
        number = len(found.of(split))
        expected = data.expected_counts.get(split, number)
        if number not in (0, expected):
            yield Finding("warning", f"'{split}' has {count(number, 'image')}, {expected:,} are published")


def in_modes(found: Examination) -> Iterator[Finding]:
    """Find mixed numbers of bands, types and modes."""
    read = [f for f in found.facts if f.shape]
    for severity, what, kinds in (
        ("error", "numbers of bands", [f.shape[0] for f in read]),
        ("error", "types, each scaled by its own range", [f.dtype for f in read]),
        ("warning", "modes among the images", [f.mode for f in read]),
        ("warning", "modes among the masks", [f.mask_mode for f in read]),
    ):
        if len(set(kinds)) > 1:
            kinds_by_count = Counter(kinds).most_common()
            odd = [f for f, kind in zip(read, kinds, strict=True) if kind != kinds_by_count[0][0]]
            text = f"different {what}: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds_by_count)
            yield Finding(severity, text, odd, mask="masks" in what)


def in_memory(found: Examination) -> Iterator[Finding]:
    """Find a cache in memory that is too small."""
    data, need = found.given, sum(f.size for f in found.facts if f.shape and f.split in ("train", "val"))
    if data.in_memory and data.cache is not None and need > data.cache.budget:
        text = f"data.cache: memory needs {need / 2**30:.1f} GiB, data.cache_budget is {data.cache.budget / 2**30:g}"
        yield Finding("warning", text, advice="The files that do not fit are decoded at every use")


def in_contents(found: Examination) -> Iterator[Finding]:
    """Find the same decoded image twice: within a split, in two splits, and with different masks."""
    same: dict[str, list[Facts]] = defaultdict(list)
    for f in found.facts:
        if f.content:
            same[f.content].append(f)
    pairs = [pair for group in same.values() for pair in pairwise(group)]
    leaks = [(a, b) for a, b in pairs if a.split != b.split]
    for text, kept in (
        ("LEAK: {} also in another split, so the metrics will be too good", leaks),
        ("{} more than once in one split", [(a, b) for a, b in pairs if a.split == b.split]),
        ("{} with different masks", [(a, b) for a, b in pairs if a.mask_content != b.mask_content]),
    ):
        if kept:
            first, other = kept[0]
            detail = and_more(f"{other.file()} is the same image as {first.file()}", len(kept))
            some = [f for pair in kept for f in pair]
            yield Finding("warning", text.format(count(len(kept), "picture")), some, detail=detail)


RULES = (in_files, in_values, in_colors, in_classes, in_sizes, in_modes, in_memory, in_contents)
