"""The data doctor: a clean tree passes, and every defect is found and named."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, config, draw_pair, draw_tree, lightning
from PIL import Image

from datamodules import Folder, Sample, SegmentationDataModule, SyntheticScenes
from datamodules.check import examine, median_frequency
from datamodules.check.facts import Facts, look_at
from datamodules.check.fix import place
from datamodules.check.page import page_html, report
from datamodules.check.suggest import yaml_block
from datamodules.errors import UserError
from segmentation.cli import main

COUNTS = {"train": 6, "val": 3, "test": 2}


def save(path: Path, pixels: np.ndarray, **options) -> None:
    Image.fromarray(pixels).save(path, **options)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def labels_of(root: Path, name: str) -> np.ndarray:
    return np.array(Image.open(root / "masks" / f"{name}.png"))


def each_mask(root: Path, change) -> None:
    for path in root.glob("masks/*/*.png"):
        save(path, change(np.array(Image.open(path))))


def palette_mask(path: Path, colors: list[int]) -> None:
    mask = Image.open(path)
    mask.putpalette(colors + (768 - len(colors)) * [77])
    mask.save(path)


def rotated(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif, quality=95)


def copy(source: Path, target: Path) -> None:
    """Save the same pixels in another kind of file."""
    target.unlink(missing_ok=True)
    Image.open(source).save(target.with_suffix(".png" if target.suffix == ".jpg" else target.suffix))


def resize(root: Path, name: str, size: tuple[int, int]) -> None:
    for path in root.glob(f"*/{name}.*"):
        Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)


def draw_labels(i: int) -> np.ndarray:
    """Return the labels of the i-th training mask as `colored` shows them: ignored pixels are ground."""
    labels = draw_pair(i)[1]
    labels[:2] = 0
    return labels


COLORS = np.array([[0, 0, 0], [200, 0, 0], [0, 0, 200]], np.uint8)


def colored(labels: np.ndarray) -> np.ndarray:
    return COLORS[np.where(labels == 255, 0, labels)]


def folder(root: Path, **replace) -> Folder:
    return Folder(root, **({"class_names": CLASSES, "batch_size": 4} | replace))


# name: (what to break in a fresh tree, arguments of Folder, severity, words of the finding, first file or None)
def floats(root: Path, odd: str) -> None:
    """Save all images as floats, one of them with pixels that are no numbers."""
    for path in root.glob("images/*/*.jpg"):
        pixels = np.asarray(Image.open(path).convert("L"), np.float32)[None].copy()
        pixels[:, :9] = np.nan if path == root / odd else pixels[:, :9]
        np.save(path.with_suffix(".npy"), pixels)
        path.unlink()


CASES = {
    "image without mask": (
        lambda r: (r / "masks/train/03.png").unlink(), {}, "error",
        ["1 file without a partner", "03.jpg has no partner"], "images/train/03.jpg",
    ),
    "mask without image": (
        lambda r: (r / "images/val/02.jpg").unlink(), {}, "error",
        ["1 file without a partner", "02.png has no partner"], "masks/val/02.png",
    ),
    "two images of one name": (
        lambda r: Image.open(r / "images/train/03.jpg").save(r / "images/train/03.png"), {}, "error",
        ["train/03.jpg", "train/03.png are two images of one name: remove or rename one of them"], None,
    ),
    "truncated image": (
        lambda r: truncate(r / "images/train/02.jpg"), {}, "error", ["1 file that cannot be read", "truncated"],
        "images/train/02.jpg",
    ),
    "truncated mask": (
        lambda r: truncate(r / "masks/val/00.png"), {}, "error", ["cannot be read as a mask"], "masks/val/00.png"
    ),
    "no picture": (
        lambda r: (r / "images/val/01.jpg").write_text("no"), {}, "error", ["cannot be read"], "images/val/01.jpg"
    ),
    "sizes differ": (
        lambda r: save(r / "masks/train/05.png", np.zeros((40, 64), np.uint8)), {}, "error",
        ["1 mask of another size", "05.png is 64 x 40 pixels, its image 64 x 48"], "masks/train/05.png",
    ),
    "masks of half the size": (
        lambda r: Image.open(r / "masks/val/01.png").resize((32, 24), Image.Resampling.NEAREST).save(
            r / "masks/val/01.png"), {}, "error",
        ["1 mask of another size", "01.png is 32 x 24 pixels, its image 64 x 48", "data.resize_masks: true"],
        "masks/val/01.png",
    ),
    "image turned by EXIF": (
        lambda r: rotated(r / "images/train/01.jpg", 6), {}, "error", ["64 x 48 pixels, its image 48 x 64", "EXIF"],
        "masks/train/01.png",
    ),
    "image upside down by EXIF": (
        lambda r: rotated(r / "images/train/01.jpg", 3), {}, "warning", ["1 image turned or mirrored", "EXIF"],
        "images/train/01.jpg",
    ),
    "value without a class": (
        lambda r: save(r / "masks/val/01.png", np.full((48, 64), 7, np.uint8)), {}, "error",
        ["1 mask with values that belong to none of the 3 classes, 7 (100 %)", "void_values"], "masks/val/01.png",
    ),
    "smoothed masks": (
        lambda r: save(r / "masks/val/01.png", np.arange(48 * 64).reshape(48, 64).astype(np.uint8)), {}, "error",
        ["and 244 more", "JPEG or smoothing"], "masks/val/01.png",
    ),
    "masks of 0 and 255": (
        lambda r: each_mask(r, lambda m: ((m == 1) * 255).astype(np.uint8)), {"class_names": ["a", "b"]}, "error",
        ["0 and 255 only", "label_map: {0: 0, 255: 1}"], "masks/train/00.png",
    ),
    "masks in colours": (
        lambda r: each_mask(r, colored), {}, "error",
        ["11 masks in colours that belong to no class", "(0, 0, 0) (8", "data.palette"], "masks/train/00.png",
    ),
    "a colour too many": (
        lambda r: (each_mask(r, colored), save(r / "masks/val/02.png", np.full((48, 64, 3), [9, 8, 7], np.uint8))),
        {"palette": COLORS.tolist()}, "error", ["1 mask in colours", "(9, 8, 7) (100 %)", "void_colors"],
        "masks/val/02.png",
    ),
    "masks in known colours": (
        lambda r: each_mask(r, colored), {"palette": COLORS.tolist()}, "note", ["11 masks in colour, read by the 3"],
        "masks/train/00.png",
    ),
    "palette masks": (
        lambda r: palette_mask(r / "masks/train/01.png", [9, 9, 9, 200, 30, 0]), {}, "note",
        ["1 mask with a palette, read by index"], "masks/train/01.png",
    ),
    "palettes that differ": (
        lambda r: (palette_mask(r / "masks/train/01.png", [9, 9, 9, 200, 30, 0]),
                   palette_mask(r / "masks/train/04.png", [200, 30, 0, 9, 9, 9])),
        {}, "error", ["the palettes of", "04.png give the value 0 different colours", "data.palette"], None,
    ),
    "mixed mask modes": (
        lambda r: palette_mask(r / "masks/train/01.png", [9, 9, 9]), {}, "warning",
        ["different modes among the masks: 10 L, 1 P"], "masks/train/01.png",
    ),
    "mixed image modes": (
        lambda r: Image.open(r / "images/val/02.jpg").convert("L").save(r / "images/val/02.jpg"), {}, "warning",
        ["different modes among the images: 10 RGB, 1 L"], "images/val/02.jpg",
    ),
    "16 bits": (
        lambda r: ((r / "images/val/02.jpg").unlink(),
                   save(r / "images/val/02.png", np.arange(48 * 64, dtype=np.uint16).reshape(48, 64))),
        {}, "error", ["different types", "10 uint8, 1 uint16"], "images/val/02.png",
    ),
    "different types": (
        lambda r: ((r / "images/val/02.jpg").unlink(),
                   save(r / "images/val/02.png", np.arange(48 * 64, dtype=np.uint16).reshape(48, 64))),
        {"bands": [0]}, "error", ["different types", "10 uint8, 1 uint16"], "images/val/02.png",
    ),
    "not a number": (
        lambda r: floats(r, "images/val/02.jpg"),
        {"bands": [0]}, "error", ["1 image with values that are no numbers"], "images/val/02.npy",
    ),
    "empty split": (
        lambda r: [path.unlink() for path in r.glob("*/val/*")], {}, "error", ["the split 'val' of", "is empty"], None
    ),
    "missing split": (
        lambda r: (r / "images/val").rename(r / "images/other"), {}, "error",
        ["images/val does not exist"], None,
    ),
    "missing test split": (
        lambda r: [(r / kind / "test").rename(r / kind / "other") for kind in ("images", "masks")], {}, "warning",
        ["there is no split 'test'", "data.test_split: val"], None,
    ),
    "fewer images than a batch": (
        None, {"batch_size": 8}, "error", ["6 training images, fewer than one batch of 8", "batch_size"], None
    ),
    "mixed sizes in a batch of evaluation": (
        lambda r: resize(r, "val/01", (32, 40)), {"eval_batch_size": 2}, "error",
        ["'val' has images of 2 sizes", "eval_batch_size: 1"], "images/val/01.jpg",
    ),
    "mixed sizes without a crop": (
        lambda r: resize(r, "train/01", (32, 40)), {}, "error", ["'train' has images of 2 sizes", "data.crop_size"],
        "images/train/01.jpg",
    ),
    "smaller than the crop": (
        lambda r: resize(r, "train/01", (32, 40)), {"crop_size": [44, 60]}, "warning",
        ["1 training image smaller than the crop of 60 x 44"], "images/train/01.jpg",
    ),
    "class nowhere": (None, {"class_names": [*CLASSES, "cloud"]}, "warning", ["the class cloud is in no mask"], None),
    "class never in training": (
        lambda r: [save(p, np.minimum(np.array(Image.open(p)), 1)) for p in r.glob("masks/train/*")], {}, "warning",
        ["the class bar is in 'val' but never in 'train'"], "masks/val/00.png",
    ),
    "class never in validation": (
        lambda r: [save(p, np.minimum(np.array(Image.open(p)), 1)) for p in r.glob("masks/val/*")], {}, "note",
        ["the class bar is never in 'val'"], None,
    ),
    "nothing labelled": (
        lambda r: [save(p, np.full((48, 64), 255, np.uint8)) for p in r.glob("masks/train/*")], {}, "error",
        ["the training masks have no pixel with a class"], "masks/train/00.png",
    ),
    "a mask without labels": (
        lambda r: save(r / "masks/train/02.png", np.full((48, 64), 255, np.uint8)), {}, "warning",
        ["1 mask in which every pixel is ignored"], "masks/train/02.png",
    ),
    "an image of one colour": (
        lambda r: save(r / "images/train/02.jpg", np.full((48, 64, 3), 90, np.uint8)), {}, "warning",
        ["1 image of one single colour"], "images/train/02.jpg",
    ),
    "very unequal": (
        lambda r: [save(p, np.eye(48, 64, dtype=np.uint8) * (p.name == "00.png")) for p in r.glob("masks/*/*")],
        {"class_names": CLASSES[:2]}, "warning",
        ["very unequal", "disc 0.26 %", "ground 99.7 %", "class_weights"], None,
    ),
    "the same picture twice": (
        lambda r: (copy(r / "images/train/01.jpg", r / "images/train/04.jpg"),
                   copy(r / "masks/train/01.png", r / "masks/train/04.png")),
        {}, "warning", ["1 picture more than once in one split", "train/04.png is", "train/01.jpg"],
        "images/train/01.jpg",
    ),
    "the same picture in two splits": (
        lambda r: copy(r / "images/train/01.jpg", r / "images/val/00.jpg"), {}, "warning",
        ["LEAK: 1 picture also in another split", "val/00.png is", "train/01.jpg"], "images/train/01.jpg",
    ),
    "the same picture with two masks": (
        lambda r: copy(r / "images/train/01.jpg", r / "images/val/00.jpg"), {}, "warning",
        ["1 picture with different masks"], "images/train/01.jpg",
    ),
    "no class names": (
        None, {"class_names": None}, "error", ["nothing names the classes", "data.class_names", "the 3"], None
    ),
    "cache beyond its budget": (
        None, {"cache": "memory", "cache_budget": 1e-5}, "warning", ["data.cache: memory needs"], None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_broken_tree_is_found_out(tmp_path, name):
    spoil, arguments, severity, words, file = CASES[name]
    root = draw_tree(tmp_path / "tree", COUNTS)
    if spoil is not None:
        spoil(root)
    found = examine(folder(root, **arguments), workers=2)
    hits = [f for f in found.findings if all(word in str(f) for word in words)]
    assert len(hits) == 1 and hits[0].severity == severity, "\n".join(map(str, found.findings))
    assert (hits[0].files[0] == str(root / file)) if file else not hits[0].files
    assert found.verdict.startswith("Training would fail: " if found.failed else "Ready to train")
    assert found.failed == (severity == "error"), found.verdict
    if name == "masks in colours":
        assert "# palette: [[0, 0, 0], [0, 0, 200], [200, 0, 0]]" in yaml_block(found)
    page = page_html(found)
    assert "<script" not in page and 'src="http' not in page
    block = yaml.safe_load(yaml_block(found))
    Folder(**block["data"]["init_args"])


@pytest.mark.parametrize("name", CASES)
def test_fit_says_what_the_doctor_says(tmp_path, name, caplog):
    """An error ends `setup` in the doctor's words, and each warning is one line; doubles are found by hash alone."""
    spoil, arguments, *_ = CASES[name]
    root = draw_tree(tmp_path / "tree", COUNTS)
    if spoil is not None:
        spoil(root)
    found = examine(folder(root, test_split="val", **arguments), workers=2)
    errors = [str(f) for f in found.findings if f.severity == "error"]
    doubles = ("LEAK", "once in one split", "with different masks")
    warnings = [f for f in found.findings if f.severity == "warning" and not any(d in f.text for d in doubles)]
    caplog.clear()
    data = folder(root, **arguments)
    if errors:
        with pytest.raises(UserError) as caught:
            data.setup("fit")
        assert str(caught.value).startswith(errors[0].partition(" (and")[0].partition(". The")[0])
    else:
        data.setup("fit")
        said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("warning: ")]
        assert said == [f"warning: {w}" for w in warnings]


def advised(text: str) -> list[dict]:
    """Return what a sentence says to set, as arguments of `Folder`."""
    found = re.findall(r"data\.(\w+): (\{.*?\}|\[\[.*?\]\]|\[.*?\]|\w+)", text)
    return [{key: yaml.safe_load(value)} for key, value in found]


@pytest.mark.parametrize("name", CASES)
def test_what_a_sentence_advises_to_set_works(tmp_path, name):
    spoil, arguments, severity, words, _ = CASES[name]
    root = draw_tree(tmp_path / "tree", COUNTS)
    if spoil is not None:
        spoil(root)
    found = examine(folder(root, **arguments), workers=2)
    (finding,) = [f for f in found.findings if all(word in str(f) for word in words)]
    for setting in advised(finding.advice):
        mended = examine(folder(root, **arguments | setting), workers=2)
        texts = [f.text for f in mended.findings if f.severity == "error"]
        assert finding.text not in texts + [f.text for f in mended.findings if severity != "error"], setting
        # ignoring all that is not background leaves nothing to learn, and this is said
        assert not texts or (setting == {"void_values": [255]} and "nothing to learn" in texts[0]), texts


# name: (case, words of its advice, what they say to do to the files, or arguments of Folder that they say to give)
REMEDIES = {
    "a partner for an image": (
        "image without mask", "add it", lambda r: copy(r / "masks/val/00.png", r / "masks/train/03.png")
    ),
    "no image without a mask": (
        "image without mask", "remove the image", lambda r: (r / "images/train/03.jpg").unlink()
    ),
    "no mask without an image": ("mask without image", "remove the mask", lambda r: (r / "masks/val/02.png").unlink()),
    "one of two files": (
        "two images of one name", "remove or rename one", lambda r: (r / "images/train/03.png").unlink()
    ),
    "another file": (
        "truncated mask", "replace or remove it", lambda r: copy(r / "masks/val/01.png", r / "masks/val/00.png")
    ),
    "a turned mask": (
        "image turned by EXIF", "turn these masks too",
        lambda r: save(r / "masks/train/01.png", np.rot90(labels_of(r, "train/01"), -1)),
    ),
    "labels for values": (
        "value without a class", "data.class_names and data.label_map",
        {"class_names": [*CLASSES, "tree"], "label_map": {0: 0, 1: 1, 2: 2, 7: 3}},
    ),
    "a palette": ("masks in colours", "data.palette", {"palette": COLORS.tolist()}),
    "a class map": (
        "masks in colours", "class map",
        lambda r: (r / "class_dict.csv").write_text(
            "name,r,g,b\n" + "".join(f"{n},{c[0]},{c[1]},{c[2]}\n" for n, c in zip(CLASSES, COLORS, strict=True))),
    ),
    "colours to ignore": ("a colour too many", "data.void_colors", {"void_colors": [[9, 8, 7]]}),
    "one more class": (
        "a colour too many", "add them to the classes",
        {"class_names": [*CLASSES, "tree"], "palette": [*COLORS.tolist(), [9, 8, 7]]},
    ),
    "one palette": (
        "palettes that differ", "save all masks with one palette",
        lambda r: palette_mask(r / "masks/train/04.png", [9, 9, 9, 200, 30, 0]),
    ),
    "a smaller batch": ("fewer images than a batch", "data.batch_size", {"batch_size": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", REMEDIES)
def test_what_a_sentence_advises_to_do_works(tmp_path, name):
    case, words, remedy = REMEDIES[name]
    spoil, arguments, *_, find, _ = CASES[case]
    root = draw_tree(tmp_path / "tree", COUNTS)
    if spoil is not None:
        spoil(root)
    before = [f for f in examine(folder(root, **arguments), workers=2).findings if all(w in str(f) for w in find)]
    assert words.lower() in str(before[0]).lower()
    if callable(remedy):
        remedy(root)
    data = folder(root, **{"crop_size": 32} | arguments | ({} if callable(remedy) else remedy))
    after = examine(data, workers=2)
    assert not after.failed and not [f for f in after.findings if all(w in str(f) for w in find)], after.verdict
    data.setup("fit")
    assert len(data.datasets["train"]) >= 5


def test_advice_is_there_to_be_tried():
    assert advised("set data.label_map: {0: 0, 255: 1}; or data.void_values: [3, 7], data.eval_batch_size: 1") == [
        {"label_map": {0: 0, 255: 1}}, {"void_values": [3, 7]}, {"eval_batch_size": 1}]  # fmt: skip


def mixed(root: Path) -> Path:
    """Save the masks of every other pair as 0 and 255, of the others as 0 and 1."""
    for i, path in enumerate(sorted(root.glob("masks/*/*.png"))):
        save(path, ((labels_of(root, f"{path.parent.name}/{path.stem}") == 1) * (255 if i % 2 else 1)).astype(np.uint8))
    return root


def test_masks_of_0_and_1_among_masks_of_0_and_255_are_refused_with_two_ways_out(tmp_path):
    root = mixed(draw_tree(tmp_path / "tree", COUNTS))
    with pytest.raises(UserError) as caught:
        folder(root, class_names=["a", "b"]).setup("fit")
    text = str(caught.value)
    assert re.match(r"4 masks of 0 and 255 among 5 masks of 0 and 1: \S+01\.png, \S+03\.png", text)
    label_map, void_values = advised(text)
    counts = {}
    for setting in (label_map, void_values):
        data = folder(root, class_names=["a", "b"], **setting)
        assert not examine(data).failed
        data.setup("fit")
        masks = torch.stack([data.datasets["train"].read(i)[1] for i in range(6)])
        counts[next(iter(setting))] = [int((masks == value).sum()) for value in (0, 1, 255)]
    stored = np.stack([np.array(Image.open(path)) for path in sorted(root.glob("masks/train/*"))])
    assert counts["label_map"] == [(stored == 0).sum(), (stored > 0).sum(), 0]
    assert counts["void_values"] == [(stored == 0).sum(), (stored == 1).sum(), (stored == 255).sum()]


def test_255_around_objects_is_no_error(tmp_path):
    """One mask without an object holds 0 and 255 only, as masks with a border do: a line asks to look at it."""
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, lambda mask: np.where(mask == 2, 0, mask).astype(np.uint8))
    empty = np.zeros((48, 64), np.uint8)
    empty[:2] = 255
    save(root / "masks/train/04.png", empty)
    found = examine(folder(root, class_names=["a", "b"]))
    assert not found.failed and any("1 mask of 0 and 255 among 10 masks" in f.text for f in found.findings)
    assert not any(
        "255 among" in f.text for f in examine(folder(root, class_names=["a", "b"], void_values=[255])).findings
    )


def test_masks_of_0_and_255_among_masks_of_three_classes_are_said(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, lambda mask: np.where(mask == 255, 0, mask).astype(np.uint8))
    save(root / "masks/train/02.png", ((labels_of(root, "train/02") == 1) * 255).astype(np.uint8))
    found = examine(folder(root))
    (finding,) = [f for f in found.findings if "of 0 and 255 among" in f.text]
    assert finding.severity == "warning" and finding.files == [str(root / "masks/train/02.png")]
    assert finding.text == "1 mask of 0 and 255 among 10 masks of 0 and 1 and 2"
    for setting in ({"void_values": [255]}, {"label_map": {0: 0, 1: 1, 2: 2, 255: 1}}):
        assert not any("255" in f.text for f in examine(folder(root, **setting)).findings)


def test_deep_grey_is_scaled_by_one_range_which_is_said(tmp_path):
    """12 bits in 16: mean and std are those of the pixels over 4095, as fit scales them."""
    root = draw_tree(tmp_path / "tree", {"train": 4, "val": 1})
    rng, arrays = np.random.default_rng(0), []
    for path in sorted(root.glob("images/*/*.jpg")):
        pixels = rng.integers(0, 4000, (48, 64)).astype(np.uint16)
        save(path.with_suffix(".png"), pixels)
        path.unlink()
        arrays += [pixels / 4095] if path.parent.name == "train" else []
    found = examine(folder(root, test_split="val"))
    assert not found.failed, found.verdict
    assert any("5 images of more than 8 bits, scaled by data.value_range: [0, 4095]" in str(f) for f in found.findings)
    np.testing.assert_allclose(found.mean, [np.mean(arrays)] * 3, rtol=1e-9)
    np.testing.assert_allclose(found.std, [np.std(arrays)] * 3, rtol=1e-9)
    assert yaml.safe_load(yaml_block(found))["data"]["init_args"]["value_range"] == [0.0, 4095.0]
    data = folder(root)
    data.setup("fit")
    assert data.value_range == [0.0, 4095.0]


def test_few_files_prove_no_absence(tmp_path):
    """With `check` below the number of files, nothing is said of classes that the others may hold."""
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, lambda mask: np.full_like(mask, 255))
    save(root / "masks/train/03.png", np.eye(48, 64, dtype=np.uint8))
    folder(root, check=2).setup("fit")
    with pytest.raises(UserError, match=r"1 file without a partner.*val/01"):
        (root / "masks/val/01.png").unlink()  # found without being decoded
        folder(root, check=1).setup("fit")


def test_a_clean_tree_is_ready(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["check_data", "--config", str(config(tmp_path, tree))])  # no SystemExit: status 0
    printed = capsys.readouterr().out
    assert "Ready to train." in printed and "error:" not in printed and "warning:" not in printed
    page = (tmp_path / "check_data" / tree.name / "index.html").read_text()
    assert "Ready to train." in page and page.count("data:image/png;base64") == 9
    assert all(name in page for name in CLASSES) and "num_classes: 3" in page
    found = yaml.safe_load((tmp_path / "check_data" / tree.name / "found.yaml").read_text())
    assert found == yaml.safe_load(printed.partition("\n\nmodel:")[2].partition("\n\n")[0].join(["model:", ""]))
    assert found["data"]["init_args"]["crop_size"] == [32, 32]
    assert found["data"]["init_args"]["palette"] == [[10, 20, 30], [200, 0, 0], [0, 0, 200]]


def test_shares_mean_std_and_weights_are_those_of_numpy(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    found = examine(folder(root), workers=1)
    masks = [np.array(Image.open(path)) for path in sorted(root.glob("masks/train/*"))]
    images = np.stack([np.array(Image.open(path)) for path in sorted(root.glob("images/train/*"))]) / 255
    np.testing.assert_allclose(found.mean, images.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, images.std(axis=(0, 1, 2)), rtol=1e-9)
    pixels = [sum((mask == k).sum() for mask in masks) for k in (0, 1, 2, 255)]
    assert found.pixels["train"].tolist() == [*pixels, 0]
    np.testing.assert_allclose(found.shares("train"), np.array(pixels[:3]) / sum(pixels[:3]))
    around = [sum((mask != 255).sum() for mask in masks if (mask == k).any()) for k in range(3)]
    frequency = np.array(pixels[:3]) / around
    np.testing.assert_allclose(found.class_weights, np.median(frequency) / frequency)
    assert found.images.tolist() == [sum((mask == k).any() for mask in masks) for k in range(3)]


def test_median_frequency_by_hand():
    """Class 0: 90 of 200 pixels, class 1: 10 of 100, class 2: 100 of 100 of the images that hold it, class 3: none."""
    counts = np.array([[90, 10, 0, 0], [0, 0, 100, 0], [60, 40, 0, 0]])
    np.testing.assert_allclose(median_frequency(counts), [1, 0.75 / 0.25, 0.75, 1])
    assert median_frequency(np.zeros((2, 3))).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32])
def test_deep_bands_are_scaled_by_their_own_range(tmp_path, dtype):
    rng = np.random.default_rng(0)
    root = draw_tree(tmp_path / "tree", {"train": 3, "val": 1})
    arrays = []
    for path in [*root.glob("images/*/*.jpg")]:
        array = rng.random((2, 48, 64)).astype(np.float32) if dtype == np.float32 else rng.integers(
            0, np.iinfo(dtype).max, (2, 48, 64), dtype, endpoint=True)  # fmt: skip
        np.save(path.with_suffix(".npy"), array)
        arrays += [array] if path.parent.name == "train" else []
        path.unlink()
    found = examine(folder(root, bands=[0, 1], batch_size=2, test_split="val"))
    assert not found.failed
    scaled = np.stack(arrays).astype(np.float64) / (1 if dtype == np.float32 else np.iinfo(dtype).max)
    np.testing.assert_allclose(found.mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(found.std, scaled.std(axis=(0, 2, 3)), rtol=1e-6)
    assert "in_channels: 2" in yaml_block(found)


def test_the_block_mends_masks_of_0_and_255(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, lambda mask: ((mask == 1) * 255).astype(np.uint8))
    found = examine(Folder(root, batch_size=4))
    assert found.failed and found.data.class_names == ["background", "foreground"]
    block = yaml.safe_load(yaml_block(found))
    assert block["model"]["init_args"]["num_classes"] == 2
    assert block["data"]["init_args"]["label_map"] == {0: 0, 255: 1}
    again = examine(Folder(root, batch_size=4, **block["data"]["init_args"]))
    assert not again.failed and again.class_weights.tolist() == found.class_weights.tolist()
    assert yaml_block(again) == yaml_block(found)


def test_the_block_names_values_with_gaps(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, lambda mask: np.array([3, 7, 40], np.uint8)[np.minimum(mask, 2)])
    found = examine(Folder(root, void_values=[3], batch_size=4))
    block = yaml.safe_load(yaml_block(found))["data"]["init_args"]
    assert block["class_names"] == ["7", "40"] and block["label_map"] == {7: 0, 40: 1} and block["void_values"] == [3]
    assert not examine(Folder(root, batch_size=4, **block)).failed


def test_the_block_takes_the_colours_of_palette_masks(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    for path in root.glob("masks/*/*.png"):
        palette_mask(path, [9, 9, 9, 200, 30, 0, 0, 40, 210])
    block = yaml.safe_load(yaml_block(examine(Folder(root, batch_size=4))))["data"]["init_args"]
    assert block["palette"] == [[9, 9, 9], [200, 30, 0], [0, 40, 210]]


def test_the_block_names_colours(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, colored)
    found = examine(Folder(root, batch_size=4))
    assert not found.failed  # Folder takes each colour as a class
    block = yaml.safe_load(yaml_block(found))["data"]["init_args"]
    assert block["class_names"] == ["#000000", "#0000c8", "#c80000"] and block["void_values"] == []
    again = examine(Folder(root, batch_size=4, **block))
    assert not again.failed and again.pixels["train"].tolist() == found.pixels["train"].tolist()


def test_colours_smoothed_by_jpeg_are_no_classes_but_the_common_ones_are_named(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(colored(np.array(Image.open(path)))).save(path.with_suffix(".jpg"), quality=60)
        path.unlink()
    found = examine(Folder(root, batch_size=4))
    assert found.failed and any("JPEG or smoothing" in str(f) for f in found.findings)
    assert "#000000" in found.data.class_names


def test_a_test_split_alone_does_not_stop_training(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    truncate(root / "images/test/01.jpg")
    found = examine(folder(root))
    assert found.failed and found.verdict.startswith("The test would fail: 1 file that cannot be read")
    assert not examine(folder(root, test_split="val")).failed


def test_published_counts_are_compared(tmp_path):
    data = folder(draw_tree(tmp_path / "tree", COUNTS))
    data.expected_counts, data.palette = {"train": 7, "val": 3}, ()  # a data set may have no colours
    found = examine(data)
    assert [str(f) for f in found.findings] == ["'train' has 6 images, 7 are published"]
    assert "palette" not in yaml_block(found) and "#800000" in page_html(found)


def test_drawn_data_needs_no_files(tmp_path):
    found = examine(SyntheticScenes(size=(32, 48), num_train=8, num_val=4, num_test=4, batch_size=8))
    assert not found.failed and len(found.facts) == 16 and found.of("train")[0].file() == "train_00000"
    assert "class_names" not in yaml_block(found)  # the data set states them
    assert page_html(found).count("data:image/png") >= 8


def test_many_samples_of_one_file_are_told_apart(tmp_path):
    class Page(Sample):
        def read(self):
            return torch.zeros(3, 4, 4, dtype=torch.uint8), None

    (tmp_path / "volume.tif").write_bytes(b"")
    assert look_at("train", Page("slice_03", tmp_path / "volume.tif")).file() == f"{tmp_path / 'volume.tif'} (slice_03)"


def test_any_error_of_a_reader_is_a_finding(tmp_path):
    class Odd(Sample):
        def read(self):
            raise KeyError("label")

    facts = look_at("val", Odd("a"))
    assert facts.problem == "unreadable" and facts.reason == "a cannot be read (KeyError: 'label')"


def test_the_page_escapes_names(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    (root / "images/train/03.jpg").rename(root / "images/train/<b>&.jpg")
    (root / "masks/train/03.png").unlink()
    page = page_html(examine(folder(root, class_names=["<i>", "disc", "bar"])))
    assert "<b>&" not in page and "&lt;b&gt;&amp;.jpg" in page and "&lt;i&gt;" in page and "<i>" not in page


def tree_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_hostile_names_stay_text(tmp_path, monkeypatch, capsys):
    """A name with markup runs nothing, one that is no UTF-8 stops nothing, and none moves the terminal's cursor."""
    monkeypatch.chdir(tmp_path)
    root = draw_tree(Path("tree"), COUNTS)
    names = ["<img src=x onerror=alert(1)>", os.fsdecode(b"caf\xe9"), "a\x1b[2Jb", "{{ 7 * 7 }}"]
    for old, new in zip(("00", "01", "02", "03"), names, strict=True):
        (root / f"images/train/{old}.jpg").rename(root / f"images/train/{new}.jpg")
        (root / f"masks/train/{old}.png").unlink()
    with pytest.raises(SystemExit):
        main(["check_data", "--data", "Folder", "--data.root", "tree", "--data.class_names", "[<b>x, disc, bar]"])
    page, printed = Path("check_data/tree/index.html").read_text(encoding="utf-8"), capsys.readouterr().out
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;.jpg" in page and "<b>x" not in page
    assert "caf\\udce9.jpg" in page and "{{ 7 * 7 }}" in page and "\x1b[2J" not in page + printed
    assert str(tmp_path) not in page and "images/train" in page
    with pytest.raises(UserError, match="4 files without a partner"):
        folder(root).setup("fit")


def test_the_page_shows_the_home_folder_as_the_user_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = draw_tree(tmp_path / "tree", COUNTS)
    truncate(root / "images/train/02.jpg")
    found = examine(folder("~/tree"))
    page = page_html(found)
    assert found.failed and str(tmp_path) not in page and "~/tree/images/train/02.jpg" in page


def test_250_classes_fit_on_the_page_and_in_the_terminal(tmp_path, capsys):
    root = draw_tree(tmp_path / "tree", {"train": 2, "val": 1})
    for path in root.glob("masks/*/*.png"):
        save(path, np.arange(48 * 64).reshape(48, 64).astype(np.uint8) % 250)
    found = examine(folder(root, class_names=[f"c{k}" for k in range(250)], batch_size=2, test_split="val"))
    report(found, tmp_path / "out")
    page, printed = (tmp_path / "out/index.html").read_text(), capsys.readouterr().out
    assert (
        not found.failed
        and "220 more" in printed
        and all(f">c{k}</td>" in page.replace("</i>", ">") for k in range(250))
    )


def test_classes_named_by_colours_are_to_be_renamed(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, colored)
    found = examine(Folder(root, batch_size=4))
    (finding,) = [f for f in found.findings if "named after their colours" in f.text]
    assert finding.severity == "note" and "3 classes" in str(finding) and "#000000" in str(finding)
    block = yaml.safe_load(yaml_block(found))["data"]["init_args"] | {"class_names": ["sky", "sea", "sun"]}
    again = examine(Folder(root, batch_size=4, **block))
    assert not again.failed and not any("named after" in f.text for f in again.findings)
    assert again.pixels["train"].tolist() == found.pixels["train"].tolist()


def test_check_data_never_writes_into_the_data(tmp_path, monkeypatch, capsys):
    root = draw_tree(tmp_path / "tree", {"train": 4, "val": 1})
    before = tree_of(root)
    base = ["check_data", "--data", "Folder", "--data.root", ".", "--data.class_names", "[ground, disc, bar]"]
    base += ["--data.test_split", "val", "--data.batch_size", "4"]
    monkeypatch.chdir(root)
    for options in ([], ["--output_dir", "../out", "--fix", "fixed"], ["--output_dir", "images/../x"]):
        with pytest.raises(SystemExit) as status:
            main([*base, *options])
        assert status.value.code == 1 and "lies inside the data" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main([*base, "--output_dir", "../out", "--fix", "../full"])
    assert "full is not empty" in capsys.readouterr().err
    main([*base, "--output_dir", "../out"])
    assert (tmp_path / "out/tree/index.html").is_file() and tree_of(root) == before


def test_no_data_set_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no data set is named: add --data CLASS"):
        examine(SegmentationDataModule("somewhere"))


def test_fix_writes_a_copy_that_is_ready(tmp_path, monkeypatch, capsys):
    """A mask of half the size, a turned image with an unturned mask, colours: mended; a damaged file: left out."""
    monkeypatch.chdir(tmp_path)
    root = draw_tree(Path("tree"), COUNTS)
    each_mask(root, colored)
    expected = {i: np.array([0, 2, 1])[draw_labels(i)] for i in (0, 1, 2)}  # colours are classes in the order of RGB
    small = Image.open(root / "masks/train/00.png")
    small.resize((32, 24), Image.Resampling.NEAREST).save(root / "masks/train/00.png")
    rotated(root / "images/train/01.jpg", 6)
    truncate(root / "images/train/05.jpg")
    before = tree_of(root)
    data = ["check_data", "--data", "Folder", "--data.batch_size", "4", "--data.crop_size", "32"]
    main([*data, "--data.root", "tree", "--fix", "mended"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "10 pairs written into mended" in printed and "masks scaled to the size of their image: 1" in printed
    assert "masks turned by the EXIF orientation of their image: 1" in printed and "05.jpg" in printed
    assert tree_of(root) == before
    main([*data, "--data.root", "mended"])  # no SystemExit: status 0
    assert "Ready to train" in capsys.readouterr().out
    copied = Folder("mended", batch_size=4, crop_size=32)
    copied.setup("fit")
    images, masks = zip(*(copied.datasets["train"].read(i) for i in range(5)), strict=True)
    assert np.array_equal(masks[2].numpy(), expected[2])
    assert np.array_equal(masks[1].numpy(), np.rot90(expected[1], -1)) and images[1].shape == (3, 64, 48)
    assert masks[0].shape == (48, 64) and (masks[0].numpy() == expected[0]).mean() > 0.95
    assert np.array_equal(images[2].numpy(), np.array(Image.open(root / "images/train/02.jpg")).transpose(2, 0, 1))
    assert {Image.open(p).mode for p in Path("mended").glob("masks/*/*.png")} == {"P"}


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a/../../b", "..", "C:/x", "deep/er/name.with.dots"])
def test_a_name_decides_no_folder_of_the_copy(tmp_path, name):
    path = place(tmp_path / "copy", "masks", Facts("train", Sample(name)), ".png")
    assert path.resolve().is_relative_to((tmp_path / "copy/masks/train").resolve()) and path.suffix == ".png"


def test_sizes_are_drawn(tmp_path):
    root = draw_tree(tmp_path / "tree", COUNTS)
    resize(root, "train/01", (32, 40))
    found = examine(folder(root, crop_size=32))
    assert not found.failed
    page = page_html(found)
    assert "32 x 40 to 64 x 48" in page and 'alt="sizes of the images"' in page


def test_the_command_fails_where_training_would(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        main(["check_data", "--data", "Folder", "--data.root", str(tree), "--output_dir", "out"])
    assert status.value.code == 1
    printed = capsys.readouterr().out
    assert "Training would fail: nothing names the classes" in printed
    assert (tmp_path / "out" / tree.name / "index.html").is_file()
    with pytest.raises(SystemExit) as status:
        main(["check_data", "--data", "Folder", "--data.root", str(tmp_path / "nowhere")])
    assert status.value.code == 1
    assert re.search(r"error: data.root \S+nowhere does not exist", capsys.readouterr().err)
    with pytest.raises(SystemExit) as status:
        main(["check_data"])
    assert status.value.code == 2 and "no data given" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_of_its_own_mends_a_config(tmp_path):
    """found.yaml is given as one more --config, and a run's config.yaml is accepted."""
    root = draw_tree(tmp_path / "tree", COUNTS)
    each_mask(root, lambda mask: ((mask == 1) * 255).astype(np.uint8))
    file = config(tmp_path, root, class_names="class_names: [a, b]", palette="palette: null")
    file.write_text(file.read_text() + "ckpt_path: gone.ckpt\nweights_only: null\n")
    done = lightning("check_data", "--config", file, cwd=tmp_path)
    assert done.returncode == 1 and "Training would fail: the masks hold 0 and 255 only" in done.stdout
    assert "Traceback" not in done.stderr
    more = tmp_path / "check_data/tree/found.yaml"
    done = lightning("check_data", "--config", file, "--config", more, cwd=tmp_path)
    assert done.returncode == 0 and "Ready to train" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "logs").exists()
