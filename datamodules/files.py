"""Files of images and masks: how to find, pair and split them."""

import codecs
import csv
import functools
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from PIL import features

from .decode import Sample, decoding, read_image, read_mask  # noqa: F401  data sets of users import them from here
from .errors import UserError

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".npy", ".tga", ".mpo",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc",
    *([".avif"] if features.check("avif") else []),
)  # fmt: skip
TEXTS = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".log", ".py", ".ini", ".cfg",
    ".tfw", ".pgw", ".jgw", ".wld", ".prj",
)  # fmt: skip  # they are no pictures, and nobody misses them
SYSTEM = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "tst"),
}  # what people call the splits
NAME_WORDS = {
    "image", "images", "img", "imgs", "photo", "photos", "picture", "pic", "rgb", "sat", "leftimg8bit", "mask", "masks",
    "msk", "label", "labels", "lbl", "annotation", "annotations", "annot", "annots", "anno", "gt", "groundtruth",
    "truth", "seg", "segmentation", "segmask",
}  # fmt: skip  # what people add to the names of images or masks
say_once = functools.cache(rank_zero_info)


def folded(name: str) -> str:
    """Return a name in one case and one form of its accents, in which systems and tools differ."""
    return unicodedata.normalize("NFC", name).casefold()


def walk(folder: Path) -> list[Path]:
    """List all files below a folder, also in linked folders; what systems and tools hide is passed over.

    Each folder is read once, under its own path rather than a link's, and a link to a folder around this one is not
    followed.

    Raises:
        UserError: if a folder does not exist or cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist: check the path")
    seen = {identity(parent) for parent in folder.resolve().parents}
    found: list[Path] = []
    inner: list[Path] = [folder]
    linked: list[Path] = []
    while inner or linked:
        here = inner.pop() if inner else linked.pop(0)
        if identity(here) in seen:
            continue
        seen.add(identity(here))
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"the folder {here} cannot be read ({error.strerror}): change its permissions") from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                continue
            if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                found.append(here / entry.name)
            else:
                (linked if entry.is_symlink() else inner).append(here / entry.name)
    return sorted(found)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a folder from all others, whatever its path."""
    status = path.stat()
    return status.st_dev, status.st_ino


def files_under(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """Find the files below a folder that have one of the suffixes; see `walk`.

    Where pictures are looked for, other files are counted and said, once per folder.

    Returns:
        the path of each name. A name is the relative path without suffix; files that would get the same name keep
        their suffix.

    Raises:
        UserError: if the folder does not exist or cannot be read.
    """
    files = walk(folder)
    paths = [path for path in files if path.suffix.lower() in suffixes]
    if suffixes is SUFFIXES:
        say_left_out(folder, [path for path in files if path.suffix.lower() not in (*SUFFIXES, *TEXTS)])
    full = [path.relative_to(folder) for path in paths]
    names = [path.with_suffix("").as_posix() for path in full]
    while twice := {name for name, n in Counter(map(folded, names)).items() if n > 1}:
        longer = [p.as_posix() if folded(n) in twice else n for n, p in zip(names, full, strict=True)]
        if longer == names:  # files that differ in the case of their letters alone
            break
        names = longer
    return dict(zip(names, paths, strict=True))


def say_left_out(folder: Path, paths: Sequence[Path]) -> None:
    """Say in one line how many files of each suffix are no images of a known format, and name one of them."""
    if paths:
        kinds = Counter(path.suffix.lower() or "without suffix" for path in paths)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        say_once(f"left out in {folder}: {counts}, such as {paths[0].relative_to(folder).as_posix()}")


def list_photos(folder: Path, bands: tuple[int, ...] | None = None) -> list[Sample]:
    """List a folder of unlabelled images for `predict`, or one image by itself.

    Raises:
        UserError: if the folder does not exist or holds no image.
    """
    if folder.is_file():
        return [Sample(folder.stem, folder, bands=bands)]
    photos = files_under(folder)
    if not photos:
        raise UserError(f"the folder {folder} holds no image; an image ends in one of {', '.join(SUFFIXES)}")
    return [Sample(name, path, bands=bands) for name, path in photos.items()]


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 as Windows and spreadsheets write it.

    Raises:
        UserError: if the file does not exist, or is in another encoding.
    """
    if not path.is_file():
        raise UserError(f"the list {path} does not exist: check data.root")
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif content[1:2] == b"\0" != content[:1]:
        encoding = "utf-16-le"
    elif content[:1] == b"\0" != content[1:2]:
        encoding = "utf-16-be"
    else:
        encoding = "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} is not in UTF-8 (line {line}), but in another encoding such as Latin-1 or Windows-1252: save it "
            "as UTF-8 in your editor"
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is no text: replace it by a text file in UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without surrounding blanks and without empty lines.

    Raises:
        UserError: if the file does not exist, or is in an unknown encoding.
    """
    return [line.strip() for line in re.split(r"[\r\n]+", read_text(path)) if line.strip()]


def cells(line: str) -> list[str]:
    """Split a line of a table at semicolons, tabs or commas, the first of these that it has; quotes are removed."""
    delimiter = next((sign for sign in ";\t" if sign in line), ",")
    found = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    while found and not found[-1]:  # spreadsheets fill up their rows
        found.pop()
    return found


def folder_of(root: str | os.PathLike | None, what: str) -> Path:
    """Return a data set's root as a path.

    Args:
        root: the argument `root` of the data set.
        what: what the root should hold, for the error message.

    Raises:
        UserError: if the root is not set or does not exist.
    """
    if root is None:
        raise UserError(f"data.root is not set: set it to the folder that holds {what}")
    if not Path(root).is_dir():
        raise UserError(f"data.root {root} does not exist: it should hold {what}")
    return Path(root)


def pair(
    images: Path,
    masks: Path,
    image_suffix: str = "",
    mask_suffix: str = "",
    bands: tuple[int, ...] | None = None,
    colors: tuple[tuple[int, int, int], ...] | None = None,
) -> list[Sample]:
    """Match images and masks by relative path without suffix.

    Names that differ in case, the form of accents, zeros, or words such as ``image`` and ``mask`` are matched too where
    one image and one mask agree. Files without a partner are listed with a path that does not exist.

    Args:
        images: folder of images.
        masks: folder of masks; it may be the same folder if a suffix tells images and masks apart.
        image_suffix: end of the images' names that the masks' names lack, such as ``_leftImg8bit``; it may hold a dot,
            as ``.jpg``.
        mask_suffix: end of the masks' names that the images' names lack, such as ``_mask`` or ``.png``.
        bands: see `Sample`.
        colors: see `Sample`.

    Raises:
        UserError: if a folder is missing, or two files have one name but for their suffixes.
    """
    image_of = single(stems(images, image_suffix, masks, mask_suffix), "images")
    mask_of = single(stems(masks, mask_suffix, images, image_suffix), "masks")
    partner = {name: name for name in image_of if name in mask_of}
    partner |= match([n for n in image_of if n not in partner], [n for n in mask_of if n not in partner], image_of)
    alone = mask_of.keys() - partner.values()
    found = [
        Sample(
            name,
            image_of.get(name, images / f"{name}{image_suffix}.*"),
            mask_of.get(partner.get(name, name), masks / f"{name}{mask_suffix}.*"),
            bands,
            colors,
        )
        for name in sorted(image_of.keys() | alone)
    ]
    odd = [(image_of[a], mask_of[b]) for a, b in partner.items() if a != b]
    if odd:
        say_once(f"{len(odd)} images and masks are paired though their names differ, as {odd[0][0]} and {odd[0][1]}")
    return found


def stems(folder: Path, own: str, other_folder: Path, other: str) -> list[tuple[str, Path]]:
    """List the files of one kind, images or masks, with what their names have in common with their partners'.

    Args:
        folder: folder of the files. If `other_folder` lies within, its files are left out.
        own: end of the names of these files, which is removed.
        other_folder: folder of the other kind.
        other: end of the names of the other kind; in one common folder, files that have it are left out.
    """
    shared, inside = folder == other_folder, other_folder.is_relative_to(folder)
    found = []
    files = {path.relative_to(folder).as_posix(): path for path in files_under(folder).values()}
    whole = not any(without(name, own if own else other, False) is not None for name in files)
    for name, path in files.items():
        stem = without(name, own, whole)
        if stem is None or (inside and not shared and path.is_relative_to(other_folder)):
            continue
        if not (shared and other.endswith(own) and without(name, other, whole) is not None):
            found.append((stem, path))
    return found


def single(named: Sequence[tuple[str, Path]], what: str) -> dict[str, Path]:
    """Return the file of each name.

    Args:
        named: names and files.
        what: ``images`` or ``masks``.

    Raises:
        UserError: if two files have one name.
    """
    found: dict[str, Path] = {}
    for name, path in named:
        if name in found:
            raise UserError(
                f"{found[name]} and {path} are two {what} of one name: remove or rename one of them, or set "
                f"data.{what[:-1]}_suffix to the ending of the files that count, such as {path.suffix}"
            )
        found[name] = path
    return found


def without(name: str, end: str, whole: bool) -> str | None:
    """Remove an ending from a file's name; None if the name does not have it.

    Args:
        name: a relative path.
        end: the ending.
        whole: whether an ending with a dot includes the file's suffix, as ``.png`` of ``a.png``; otherwise it stands
            before the suffix, as ``.jpg`` of ``a.jpg.png``.
    """
    stem = Path(name).with_suffix("").as_posix()
    if whole and "." in end:
        return name[: len(name) - len(end)] if folded(name).endswith(folded(end)) else None
    return stem.removesuffix(end) if stem.endswith(end) else None


def match(images: Sequence[str], masks: Sequence[str], image_of: dict[str, Path]) -> dict[str, str]:
    """Match names of images and masks that a person would call the same, where one image and one mask agree.

    Args:
        images: names of images without a partner.
        masks: names of masks without a partner.
        image_of: the files of the images. The mask of ``a.jpg`` may be called ``a.jpg.png``.
    """
    partner: dict[str, str] = {}
    for ways in (
        (folded, folded),
        (lambda name: folded(f"{name}{image_of[name].suffix}"), folded),
        (plain, plain),
    ):
        groups: list[dict[str, list[str]]] = []
        for way, names, taken in zip(ways, (images, masks), (partner.keys(), set(partner.values())), strict=True):
            groups.append({})
            for name in names:
                if name not in taken:
                    groups[-1].setdefault(way(name), []).append(name)
        for key, some in groups[0].items():
            others = groups[1].get(key, [])
            if len(some) == len(others) == 1:
                partner[some[0]] = others[0]
    return partner


def plain(name: str) -> str:
    """Return a name without the words that tell images from masks, and without zeros that fill up numbers."""
    folder, _, last = folded(name).rpartition("/")
    parts = [
        part.lstrip("0") or "0" if part.isdigit() else part for part in re.findall(r"[^\W\d_]+8bit|[^\W\d_]+|\d+", last)
    ]
    kept = [part for part in parts if part not in NAME_WORDS]
    return "/".join([folder, *(kept or parts)])


def difference(samples: Sequence[Sample]) -> str | None:
    """Return a sentence that says which ending the masks' or the images' names have in addition, if that is why no file
    has a partner; None if it is not.
    """
    images = {s.name: s.image for s in samples if s.image and s.mask and s.image.is_file() and not s.mask.is_file()}
    masks = {s.name: s.mask for s in samples if s.image and s.mask and s.mask.is_file() and not s.image.is_file()}
    for short, long, which in ((images, masks, "mask"), (masks, images, "image")):
        first = next(iter(short), "")
        endings = [name[len(first) :] for name in long if first and name.startswith(first)]
        common = [end for end in endings if sum(f"{name}{end}" in long for name in short) * 2 > len(short)]
        if len(common) > 1 and which == "mask":
            return (
                f"there are several masks per image, as {' and '.join(str(long[first + end]) for end in common[:2])} "
                f"for {short[first]}: merge them into one mask of a label per class, or set data.mask_suffix: "
                f"{common[0]} to read this one alone"
            )
        if common:
            return (
                f"{short[first]} and {long[first + common[0]]} look like a pair, and the second name has "
                f"'{common[0]}' in addition: set data.{which}_suffix: {common[0]}"
            )
    return None


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits directly below a folder, by the words that people use for them.

    Raises:
        UserError: if two folders are one split, such as ``val`` and ``valid``.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        split = next((split for split, words in WORDS.items() if path.name.lower() in words), None)
        if split is None or not path.is_dir():
            continue
        if split in found:
            raise UserError(f"{found[split]} and {path} are both the split '{split}': keep one, or merge them")
        found[split] = path
    return found


def split_lists(root: Path) -> dict[str, Path]:
    """Return the lists of the splits in a folder, such as ``train.txt``, by the words that people use for splits.

    Raises:
        UserError: if two lists are of one split.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*.[tTcC][xXsS][tTvV]")):
        split = next((split for split, words in WORDS.items() if path.stem.lower() in words), None)
        if split in found:
            raise UserError(f"{found[split]} and {path} are both lists of the split '{split}': keep one")
        if split is not None:
            found[split] = path
    return found


def parts_of(text: str) -> list[str]:
    """Return the parts of a path as any system writes it, without drive, leading slash, ``.`` and ``..``."""
    parts: list[str] = []
    for part in re.split(r"[/\\]+", text):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", ".", "..") and not re.fullmatch(r"[A-Za-z]:", part):
            parts.append(re.sub(r"^([A-Za-z]:)+", "", part))
    return [part for part in parts if part] or ["unnamed"]


def located(text: str, folder: Path, root: Path) -> Path:
    """Return the file that a list names by a path: as it stands, or by its last parts below the folder or the root.

    Args:
        text: the path, as any system writes it, also that of a file on another machine.
        folder: folder of the images or masks.
        root: folder of the list.

    Returns:
        the file; if there is none, a path below the root that does not exist.
    """
    for base in (folder, root):  # a path with a leading slash stands for itself
        if (base / text).is_file():
            return base / text
    parts = parts_of(text)
    for start in range(len(parts)):
        for base in (root, folder):
            if base.joinpath(*parts[start:]).is_file():
                return base.joinpath(*parts[start:])
    return root.joinpath(*parts)


def check_fractions(val: float, test: float) -> None:
    """Check that the shares of validation and test leave something to train on.

    Raises:
        UserError: if one is negative, or both together are all samples.
    """
    if min(val, test) < 0 or val + test >= 1:
        raise UserError(
            f"data.val_fraction {val} and data.test_fraction {test} must not be negative, and their sum must be below 1"
        )


def split_by_hash(samples: Sequence[Sample], split: str, val: float, test: float, group: str = "") -> list[Sample]:
    """Choose the samples of one split by a hash of their names, so that every machine gets the same split.

    Args:
        samples: all samples of the data set.
        split: ``train``, ``val`` or ``test``.
        val: share of the samples for validation, 0 to 1; at least one sample unless 0.
        test: share of the samples for the test, 0 to 1; at least one sample unless 0.
        group: regular expression whose first group names the samples that stay in one split, such as a scene; ""
            treats each sample by itself.
    """

    def key(sample: Sample) -> str:
        found = re.search(group, sample.name) if group else None
        return found[1] if found else sample.name

    names = sorted({key(s) for s in samples}, key=lambda name: hashlib.sha256(name.encode()).digest())
    first, second = (max(round(share * len(names)), int(share > 0)) for share in (val, test))
    bounds = {"val": (0, first), "test": (first, first + second), "train": (first + second, len(names))}
    chosen = set(names[slice(*bounds[split])])
    return sorted((s for s in samples if key(s) in chosen), key=lambda sample: sample.name)


def share_of(samples: Sequence[Sample], split: str, val: float, test: float) -> list[Sample]:
    """Choose the samples of one split as `split_by_hash` does; without a share for validation it is the training split.

    Args:
        samples: see `split_by_hash`.
        split: ``train``, ``val`` or ``test``.
        val: see `split_by_hash`.
        test: see `split_by_hash`.

    Raises:
        UserError: if the shares leave no sample for the split.
    """
    if split == "val" and val == 0 and samples:
        say_once("data.val_fraction is 0: the training images are also the validation images")
        return share_of(samples, "train", val, test)
    chosen = split_by_hash(samples, split, val, test)
    if chosen or not samples:
        return chosen
    if test == 0 and split == "test":
        raise UserError("data.test_fraction is 0, so there is no split 'test': set it, or set data.test_split: val")
    first, second = (len(split_by_hash(samples, name, val, test)) for name in ("val", "test"))
    cure = "data.test_fraction: 0"
    if len(samples) == 1:
        cure = "data.val_fraction: 0 and data.test_fraction: 0, to see whether one image can be learned"
    elif len(samples) > 2:
        cure = "lower fractions"
    raise UserError(
        f"of {len(samples)} images, val takes {first} (data.val_fraction {val:g}) and test takes {second} (data."
        f"test_fraction {test:g}), which leaves none for {split}: add images, or set {cure}"
    )
