"""What the data doctor finds: rules that look at the facts of all samples and yield `Finding`s."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..base import IGNORE, UNNAMED, SegmentationDataModule
from ..dataset import same_proportions
from .facts import Color, Facts

SEVERITIES = ("error", "warning", "note")
UNEQUAL = 100  # the largest class has so many times the pixels of the rarest: it dominates the loss
SHOWN = 5  # files that a finding about two kinds names
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
        return [printable(facts.file(self.mask)) for facts in self.facts]

    def __str__(self) -> str:
        detail = self.detail or (and_more(self.files[0], len(self.facts)) if self.facts else "")
        return printable(self.text + (f": {detail}" if detail else "") + (f". {self.advice}" if self.advice else ""))


@dataclass
class Examination:
    """The result of `examine`.

    Args:
        given: the data set as configured.
        data: the data set, completed by what its files suggest where its arguments state nothing.
        numbers: number of samples of each split that is looked at.
        facts: the facts of every sample, or of some.
        pixels: by split, the pixels of each class, ignored, and without a class, int64 ``(K + 2,)``.
        images: number of training images in which each class occurs, ``(K,)``.
        class_weights: weights of the classes, ``(K,)``, see `median_frequency`.
        mean: mean of the training images' pixels per band, scaled to 0..1; empty if none could be read.
        std: standard deviation of the same pixels per band.
        findings: all findings, errors first.
        trains: whether the split ``train`` is there to train on.
        partial: whether some samples were left out, so that nothing is known to be absent.
    """

    given: SegmentationDataModule
    data: SegmentationDataModule
    numbers: dict[str, int]
    facts: list[Facts]
    pixels: dict[str, np.ndarray]
    images: np.ndarray
    class_weights: np.ndarray
    mean: list[float]
    std: list[float]
    findings: list[Finding]
    trains: bool = True
    partial: bool = False

    @property
    def splits(self) -> list[str]:
        """The splits that are looked at."""
        return [*self.numbers]

    def of(self, split: str) -> list[Facts]:
        """Return the facts of a split's samples."""
        return [facts for facts in self.facts if facts.split == split]

    def as_given(self, text: object) -> str:
        """Return a text that shows the root as the user gave it, so with ``~`` and not with the home folder."""
        root, given = str(self.given.root), str(self.given.root_as_given)
        return str(text) if self.given.root is None or given[:1] != "~" else str(text).replace(root, given)

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
            more = f" And {count(len(errors) - 1, 'more error')}." if len(errors) > 1 else ""
            return f"{'Training' if fatal else 'The test'} would fail: {(fatal or errors)[0]}.{more}"
        warnings = sum(finding.severity == "warning" for finding in self.findings)
        return "Ready to train" + (f", with {count(warnings, 'thing')} to look at." if warnings else ".")


def printable(text: object) -> str:
    """Write characters that no terminal shows, such as a name's bytes that are no UTF-8, as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


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
    sized = [f for f in read if f.mask_shape and f.mask_shape != f.shape[1:]]
    fits = [f for f in sized if same_proportions(f.mask_shape, f.shape[1:])]
    if bad := [f for f in sized if not found.given.resize_masks or not same_proportions(f.mask_shape, f.shape[1:])]:
        (mask_height, mask_width), (_, height, width) = bad[0].mask_shape, bad[0].shape
        detail = f"{bad[0].file(mask=True)} is {mask_width} x {mask_height} pixels, its image {width} x {height}"
        detail = and_more(detail, len(bad))
        turned = any(f.turned > 4 and f.mask_shape[::-1] == f.shape[1:] for f in bad)
        advice = "Images are turned upright by their EXIF orientation; turn these masks too" if turned else ""
        if len(fits) == len(bad):
            advice = "They have the proportions of their images: data.resize_masks: true brings them to that size"
        yield Finding("error", f"{count(len(bad), 'mask')} of another size than the image", bad, True, detail, advice)
    if found.given.replace_nan is None and (bad := [f for f in read if not f.finite]):
        text = f"{count(len(bad), 'image')} with values that are no numbers (nan or infinite)"
        advice = "data.replace_nan: 0 reads such pixels as 0, and ignores their labels"
        yield Finding("error", text, bad, advice=advice)
    if bad := [f for f in read if f.turned > 1 and f.mask_shape == f.shape[1:] and (f.turned < 5 or square(f))]:
        text = f"{count(len(bad), 'image')} turned or mirrored on reading by the EXIF orientation"
        advice = "Their sizes do not show whether the masks are turned too: look at the page"
        yield Finding("warning", text, bad, advice=advice)
    if deep := [f for f in read if f.limits is not None and found.given.bands is None]:
        bounds = ", ".join(f"{value:g}" for value in found.data.value_range or ())
        text = f"{count(len(deep), 'image')} of more than 8 bits, scaled by data.value_range: [{bounds}]"
        yield Finding("note", text, deep)
    if bad := [f for f in read if f.constant]:
        yield Finding("warning", f"{count(len(bad), 'image')} of one single colour", bad)


def square(facts: Facts) -> bool:
    """Return whether an image is as high as wide."""
    return facts.shape[1] == facts.shape[2]


def in_values(found: Examination) -> Iterator[Finding]:
    """Find unnamed classes, and stored values that have no class."""
    given, data, labelled = found.given, found.data, [f for f in found.facts if f.values]
    if not given.class_names and data.class_names:
        advice = f"The block below names the {data.num_classes} classes in the masks by their stored values"
        yield Finding("error", UNNAMED, advice=advice)
    elif not data.class_names and labelled:
        different = len({value for f in labelled for value in f.values})
        advice = f"The masks hold {different:,} different values, which are too many for labels"
        yield Finding("error", UNNAMED, labelled, mask=True, advice=advice)
    bad = sorted((f for f in found.facts if f.counts[-1] > 0), key=lambda f: -f.counts[-1])
    if bad and data.class_names:
        table = data.label_table()
        unknown = Counter[int]()
        for f in bad:
            labels = table(torch.tensor([*f.values], dtype=torch.int64)).tolist()
            unknown.update({v: n for (v, n), label in zip(f.values.items(), labels, strict=True) if label < 0})
        listed = most_common(unknown, sum(int(f.counts.sum()) for f in bad))
        text = f"{count(len(bad), 'mask')} with values that belong to none of the {data.num_classes} classes, {listed}"
        values = sorted(unknown)
        advice = f"To ignore them, set data.void_values: {values}; to learn them, data.class_names and data.label_map"
        yield Finding("error", text, bad, mask=True, advice=LOSSY if len(unknown) > 20 else advice)


def in_255(found: Examination) -> Iterator[Finding]:
    """Find masks in which 255 may be an object: it means "ignored" where the arguments do not declare it."""
    given, classes, masks = found.given, found.data.num_classes, [f for f in found.facts if f.values]
    if IGNORE in {*given.void_values, *(given.label_map or ())} or classes == 1:
        return
    only = [f for f in masks if {0, IGNORE} == f.values.keys()]
    objects = [f for f in masks if f.values.keys() - {0, IGNORE}]
    labels = {**(given.label_map or {0: 0, **({1: 1} if objects else {})}), IGNORE: 1}
    setting = f"set data.label_map: {labels}" if classes == 2 or not objects else "give it a label in data.label_map"
    advice = f"{IGNORE} means 'ignored': if it is your object, {setting}; if it is to be ignored, "
    advice += f"set data.void_values: [{IGNORE}]"
    if only and not objects:
        severity = "error" if found.trains or (classes == 2 and len(only) > 1) else "warning"
        yield Finding(severity, f"the masks hold 0 and {IGNORE} only", only, mask=True, advice=advice)
        return
    both = any(IGNORE in f.values for f in objects)  # so 255 is the border of objects in some masks
    if only and (classes == 2 or not both):
        others = " and ".join(map(str, sorted({v for f in objects for v in f.values})[:4]))
        text = f"{count(len(only), 'mask')} of 0 and {IGNORE} among {count(len(objects), 'mask')} of {others}"
        names = ", ".join(f.file(mask=True) for f in only[:SHOWN])
        detail = names + (f" and {len(only) - SHOWN:,} more" if only[SHOWN:] else "")
        severity = "error" if classes == 2 and not both else "warning"
        yield Finding(severity, text, only, mask=True, detail=detail, advice=advice)


def in_colors(found: Examination) -> Iterator[Finding]:
    """Find colours that have no class, and report how masks in colour and masks with a palette are read."""
    if bad := [f for f in found.facts if f.problem == "colour"]:
        colors = found_colors(bad)
        listed = most_common(colors, sum(int(np.prod(f.mask_shape)) for f in bad))
        advice = "Give one colour per class in data.palette, or a class map (docs/your_data.md)"
        if bad[0].sample.colors:
            advice = "Add them to the classes, or to data.void_colors to ignore them"
        if few := in_the_other_form(found.facts):
            advice = f"{few[0].file(mask=True)} is {few[0].mask_mode}, others are not: save all in one form"
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


def in_the_other_form(facts: Sequence[Facts]) -> list[Facts]:
    """Return the masks in colour among masks of labels, or the masks of labels among those in colour, if fewer."""
    forms: dict[bool, list[Facts]] = {True: [], False: []}
    for f in facts:
        if f.mask_mode:
            forms[f.mask_mode in ("RGB", "RGBA", "CMYK", "YCbCr")].append(f)
    return min(forms.values(), key=len)


def in_names(found: Examination) -> Iterator[Finding]:
    """Find classes that are named after their colours, as `Folder` does where nothing else names them."""
    if named := [str(name) for name in found.given.class_names if re.fullmatch("#[0-9a-f]{6}", str(name))]:
        text = (
            f"{len(named)} class{'es are' if len(named) > 1 else ' is'} named after their colours, such as {named[0]}"
        )
        advice = "Rename them in data.class_names of the block below, which names the colours in data.palette"
        yield Finding("note", text, advice=advice)


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
    names, masks = found.data.class_names, [f for f in found.facts if f.values]
    if not names or not masks:
        return
    if found.trains and any(f.split == "train" for f in masks):
        hopeless = False
        for finding in in_training(found):
            hopeless |= finding.severity == "error"
            yield finding
        if hopeless:
            return
    if empty := [f for f in masks if not f.counts[:-2].any() and not f.counts[-1]]:
        yield Finding("warning", f"{count(len(empty), 'mask')} in which every pixel is ignored", empty, mask=True)
    never = [k for k in range(len(names)) if not any(found.pixels[split][k] for split in found.splits)]
    if never and found.trains and not found.partial:
        yield Finding("warning", f"{listing(names, never)} in no mask")


def in_training(found: Examination) -> Iterator[Finding]:
    """Find training masks without labels, classes that other splits alone hold, and very unequal classes."""
    names, train, ignored = found.data.class_names, found.pixels["train"][:-2], found.pixels["train"][-2]
    some = [f for f in found.of("train") if f.values]
    if not train[1:].any() and ((len(names) > 1 and ignored) or not train.any()) and not found.partial:
        held = f"hold {names[0]} and ignored pixels only" if train.any() else "have no pixel with a class"
        yield Finding("error", f"the training masks {held}: there is nothing to learn", some, mask=True)
        return
    for split in found.splits[1:] if not found.partial else ():
        unseen = [k for k, n in enumerate(found.pixels[split][:-2]) if n and not train[k]]
        if unseen:
            some = [f for f in found.of(split) if f.counts[unseen].any()]
            text = f"{listing(names, unseen)} in '{split}' but never in 'train'"
            advice = "The network cannot learn a class that it never sees"
            yield Finding("warning", text, some, mask=True, advice=advice)
    val = found.pixels.get("val", train)[:-2]
    absent = [k for k, n in enumerate(val) if train[k] and not n]
    if absent and val.any():
        yield Finding("note", f"{listing(names, absent)} never in 'val', so not in val/miou")
    present = np.flatnonzero(train) if train.any() else np.arange(1)
    rare, large = int(present[train[present].argmin()]), int(train.argmax())
    if train[large] > UNEQUAL * train[rare] and not found.given.border_weight:
        few, much = (f"{names[k]} {percent(train[k] / train.sum())}" for k in (rare, large))
        text = f"very unequal classes in 'train': {few} of the labelled pixels, {much}"
        yield Finding(
            "warning", text, advice="To balance them, set model.class_weights: lightning check_data writes them"
        )


def listing(names: Sequence[str], classes: Sequence[int], shown: int = 8) -> str:
    """Name classes and add the verb."""
    listed = ", ".join(str(names[k]) for k in classes[:shown])
    listed += f" and {len(classes) - shown} more" if len(classes) > shown else ""
    return f"the class {listed} is" if len(classes) == 1 else f"the classes {listed} are"


def in_sizes(found: Examination) -> Iterator[Finding]:
    """Find splits that do not fit in batches, images smaller than the crop, and other counts than published."""
    data = found.given
    share = found.numbers.get("train", 0) // data.world_size
    if found.trains and 0 < share < data.batch_size:
        each = "" if data.world_size == 1 else " per process"
        text = f"{count(share, 'training image')}{each}, fewer than one batch of {data.batch_size}"
        yield Finding("error", text, advice=f"Set data.batch_size: {share}")
    for split, number in found.numbers.items():
        images, train = [f for f in found.of(split) if f.shape], found.trains and split == "train"
        sizes, crop = Counter(f.shape[1:] for f in images), data.crop_size
        batch = data.batch_size if train else data.eval_batch_size
        unlabelled = not any(f.sample.mask or f.values for f in images)  # such are read one by one
        if len(sizes) > 1 and batch > 1 and not unlabelled and not (train and crop is not None):
            usual = sizes.most_common(1)[0][0]
            advice = f"Set data.crop_size: {usual_crop(images)}" if train else "Set data.eval_batch_size: 1"
            text = f"'{split}' has images of {len(sizes)} sizes, which do not fit in one batch of {batch}"
            yield Finding("error", text, [f for f in images if f.shape[1:] != usual], advice=advice)
        if train and crop is not None:
            height, width = (crop, crop) if isinstance(crop, int) else crop
            if small := [f for f in images if f.shape[1] < height or f.shape[2] < width]:
                text = f"{count(len(small), 'training image')} smaller than the crop of {width} x {height}, so padded"
                yield Finding("warning", text, sorted(small, key=lambda f: f.shape[1] * f.shape[2]))
        expected = data.expected_counts.get(split, number)
        if number not in (0, expected):
            yield Finding("warning", f"'{split}' has {count(number, 'image')}, {expected:,} are published")


def usual_crop(facts: Sequence[Facts]) -> list[int]:
    """Return the median height and width of images in multiples of 32, at most 512 and at least 32."""
    return [
        max(32, min(512, int(np.median(side)) // 32 * 32)) for side in zip(*(f.shape[1:] for f in facts), strict=True)
    ]


def in_modes(found: Examination) -> Iterator[Finding]:
    """Find mixed numbers of bands, types and modes."""
    read = [f for f in found.facts if f.shape]
    photos = not any(f.sample.mask or f.values for f in read)  # such are read one by one
    for severity, what, kinds in (
        ("error", "numbers of bands", [f.shape[0] for f in read]),
        ("warning" if photos else "error", "types of images", [f.dtype for f in read]),
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


RULES = (in_files, in_values, in_255, in_colors, in_names, in_classes, in_sizes, in_modes, in_memory, in_contents)
