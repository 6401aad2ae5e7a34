"""Files as people have them: what lies around, names, lists and splits."""

import json
import string
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
from conftest import CLASSES, draw_tree, lightning
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules import Folder
from datamodules.decode import Sample
from datamodules.errors import UserError
from datamodules.files import files_under, list_photos, pair, parts_of, plain, read_lines, share_of
from datamodules.layout import work_out
from segmentation.cli import with_layout


def draw(*paths: Path) -> None:
    """Draw small pictures."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(path.suffix)
        Image.fromarray(np.eye(4, dtype=np.uint8)).save(path, kind)


def pairs(root: Path, image: str, mask: str, n: int = 6) -> Path:
    draw(*(root / form.format(i) for i in range(n) for form in (image, mask)))
    return root


def named(samples: list[Sample]) -> list[tuple[str, str, str]]:
    return [(s.name, s.image.name, s.mask.name) for s in samples]


def test_what_systems_hide_is_passed_over_and_the_rest_is_counted(tmp_path, caplog):
    hidden = (".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a.png", "@eaDir/a.png", "sub/.x/b.png")
    draw(*(tmp_path / name for name in ("a.png", "b.jfif", "c.JPE", "d.jp2", "e.tga", *hidden)))
    for name in ("f.heic", "g.HEIC", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level("INFO"):
        assert [*files_under(tmp_path)] == ["a", "b", "c", "d", "e"]
        files_under(tmp_path)
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert lines == [f"left out in {tmp_path}: 2 .heic, such as f.heic"]


def test_linked_folders_are_read_once_and_never_upwards(tmp_path):
    draw(tmp_path / "in/train/a.png", tmp_path / "in/val/b.png", tmp_path / "store/c.png")
    train = tmp_path / "in/train"
    (train / "more").symlink_to(tmp_path / "store", target_is_directory=True)
    (train / "again").symlink_to(tmp_path / "store", target_is_directory=True)
    (train / "up").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "store/loop").symlink_to(tmp_path / "store", target_is_directory=True)
    (train / "self").symlink_to(train / "self")
    assert [*files_under(train)] == ["a", "again/c"]


def test_a_double_renames_nothing_else_and_is_refused_by_its_names(tmp_path):
    pairs(tmp_path, "images/{}.png", "masks/{}.png")
    draw(tmp_path / "images/0.jpg")
    assert [s.name for s in list_photos(tmp_path / "images")] == ["0.jpg", "0.png", "1", "2", "3", "4", "5"]
    with pytest.raises(UserError, match=r"images.0\.jpg and .*images.0\.png are two images of one name"):
        Folder(tmp_path, CLASSES).samples("train")
    both = Folder(tmp_path, CLASSES, image_suffix=".png", val_fraction=0, test_fraction=0).samples("train")
    assert [s.image.name for s in both] == [f"{i}.png" for i in range(6)]  # as the sentence advises


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.jpg", "{}.jpg.png"),
        ("IMG_{}.JPG", "img_{}.png"),
        ("{}_image.jpg", "{}_annotation.png"),
        ("img_{}.jpg", "mask_{}.png"),
        ("{}.jpg", "{:04d}.png"),
        ("Caf\u00e9{}.jpg", "Cafe\u0301{}.png"),
        ("{}.jpg", "{}-label.png"),
    ],
)
def test_names_that_a_person_would_pair(image, mask, tmp_path):
    pairs(tmp_path, f"images/{image}", f"masks/{mask}")
    found = pair(tmp_path / "images", tmp_path / "masks")
    assert named(found) == [(image.format(i)[:-4], image.format(i), mask.format(i)) for i in range(6)]


def test_names_that_could_mean_two_files_are_not_paired(tmp_path):
    draw(tmp_path / "images/1.png", tmp_path / "masks/01.png", tmp_path / "masks/001.png")
    assert all(sample.missing() for sample in pair(tmp_path / "images", tmp_path / "masks"))


def test_an_unknown_ending_is_named_with_what_to_set(tmp_path):
    pairs(tmp_path, "images/{}.jpg", "masks/{}_v2.png")
    with pytest.raises(UserError, match=r"set data\.mask_suffix: _v2$"):
        Folder(tmp_path, CLASSES).samples("train")
    assert len(Folder(tmp_path, CLASSES, mask_suffix="_v2").samples("train")) == 4


@pytest.mark.parametrize(("ending", "mask"), [(".jpg", "{}.jpg.png"), (".jpg.png", "{}.jpg.png"), (".png", "{}.png")])
def test_endings_with_a_dot(ending, mask, tmp_path):
    pairs(tmp_path, "{}.jpg", mask)
    data = Folder(tmp_path, CLASSES, image_dir=".", mask_dir=".", mask_suffix=ending, val_fraction=0, test_fraction=0)
    assert named(data.samples("train")) == [(f"{i}", f"{i}.jpg", mask.format(i)) for i in range(6)]


@settings(max_examples=50, deadline=None)
@given(
    lines=st.lists(st.text(string.ascii_letters + "äé ;,_", min_size=1).map(str.strip).filter(bool), min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_lines_of_any_system(lines, end, encoding, tmp_path_factory):
    file = tmp_path_factory.mktemp("lines") / "train.txt"
    file.write_bytes(end.join(lines).encode(encoding))
    assert read_lines(file) == lines


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "train.txt").write_bytes("a\nM\u00fcller".encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.txt is not in UTF-8 \(line 2\).*save it as UTF-8"):
        read_lines(tmp_path / "train.txt")


@settings(max_examples=50, deadline=None)
@given(st.text(string.ascii_lowercase + "./\\:C ", max_size=30))
def test_a_name_from_a_list_stays_in_a_folder(text):
    name = PureWindowsPath("/".join(parts_of(text)))
    assert not name.anchor and ".." not in name.parts and name.parts


LINES = {
    "names": "{n}",
    "files": "{n}.png",
    "slash": "/images/{n}.png /masks/{n}.png",
    "dot": "./images/{n}.png\t./masks/{n}.png",
    "windows": "images\\{n}.png;masks\\{n}.png",
    "quoted": '"images/{n}.png","masks/{n}.png"',
    "another machine": "C:\\Users\\me\\set\\images\\{n}.png C:\\Users\\me\\set\\masks\\{n}.png",
    "upwards": "../somewhere/images/{n}.png, ../somewhere/masks/{n}.png",
    "one path": "/home/me/set/images/{n}.png",
    "absolute": "{root}/images/{n}.png {root}/masks/{n}.png",
}


@pytest.mark.parametrize("form", LINES)
@pytest.mark.parametrize("word", ["", "my photo "])
def test_paths_in_lists_of_any_system(form, word, tmp_path):
    pairs(tmp_path, f"images/{word}00{{}}.png", f"masks/{word}00{{}}.png")
    for split, numbers in (("train", range(4)), ("valid", [4]), ("test", [5])):
        text = "\r\n".join(LINES[form].format(n=f"{word}00{i}", root=tmp_path) for i in numbers)
        (tmp_path / f"{split}.txt").write_bytes(text.encode("utf-16"))
    for split, numbers in (("train", range(4)), ("val", [4]), ("test", [5])):
        found = Folder(tmp_path, CLASSES).samples(split)
        assert [s.name for s in found] == [f"{word}00{i}" for i in numbers]
        assert [s.mask for s in found] == [tmp_path / f"masks/{word}00{i}.png" for i in numbers]


def test_names_of_files_elsewhere_are_safe_and_unique(tmp_path):
    pairs(tmp_path / "a", "{}.png", "{}m.png", 1)
    pairs(tmp_path / "b", "{}.png", "{}m.png", 1)
    (tmp_path / "root").mkdir()
    lines = [f"../{d}/0.png ../{d}/0m.png" for d in "ab"] + [f"{tmp_path}/a/0.png {tmp_path}/b/0m.png"]
    (tmp_path / "root/train.txt").write_text("\n".join(lines))
    found = Folder(tmp_path / "root", CLASSES).samples("train")
    names = [PureWindowsPath(s.name) for s in found]
    assert len({*names}) == 3 and not any(n.anchor or ".." in n.parts for n in names)
    assert not any(s.missing() for s in found)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("{0}/{1}/{2}.png", {}),
        ("{1}/{0}/{2}.png", {}),
        ("{1}/{2}{3}.png", {"image_dir": ".", "mask_dir": ".", "mask_suffix": "_mask"}),
    ],
)
@pytest.mark.parametrize(
    "words", [("train", "valid", "test"), ("Training", "VALIDATION", "testing"), ("trn", "dev", "tst")]
)
def test_folders_of_splits(form, options, words, tmp_path):
    for word, numbers in zip(words, (range(4), [4], [5]), strict=True):
        for i in numbers:
            draw(*(tmp_path / form.format(d, word, i, end) for d, end in (("images", ""), ("masks", "_mask"))))
    data = Folder(tmp_path, CLASSES, **options)
    for split, numbers in (("train", "0123"), ("val", "4"), ("test", "5")):
        found = data.samples(split)
        assert [s.name for s in found] == [*numbers] and not any(s.missing() for s in found)


def test_two_folders_of_one_split_are_refused(tmp_path):
    draw(*(tmp_path / d / s / "0.png" for d in ("images", "masks") for s in ("train", "val", "valid")))
    with pytest.raises(UserError, match=r"images.val and .*images.valid are both the split 'val'"):
        Folder(tmp_path, CLASSES).samples("train")


def test_one_two_and_three_pairs(tmp_path):
    for n in (1, 2, 3):
        pairs(tmp_path / str(n), "images/{}.png", "masks/{}.png", n)
    with pytest.raises(UserError, match=r"of 1 images, val takes 1 .* data\.val_fraction: 0 and "):
        Folder(tmp_path / "1", CLASSES).samples("train")
    one = Folder(tmp_path / "1", CLASSES, batch_size=1, val_fraction=0, test_fraction=0)
    one.setup("fit")
    assert len(one.datasets["train"]) == len(one.datasets["val"]) == 1
    with pytest.raises(UserError, match=r"of 2 images, val takes 1 .* or set data\.test_fraction: 0$"):
        Folder(tmp_path / "2", CLASSES).samples("train")
    assert len(Folder(tmp_path / "2", CLASSES, test_fraction=0).samples("train")) == 1
    assert [len(Folder(tmp_path / "3", CLASSES).samples(s)) for s in ("train", "val", "test")] == [1, 1, 1]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), val=st.floats(0, 0.5), test=st.floats(0, 0.49))
def test_shares_divide_all_samples_or_say_that_one_is_empty(n, val, test):
    samples = [Sample(f"{i}") for i in range(n)]
    parts = []
    for split in ("train", "val", "test"):
        try:
            parts.append({s.name for s in share_of(samples, split, val, test)})
        except UserError as error:
            assert f"of {n} images, val takes" in str(error) or (split == "test" and test == 0)
            parts.append(set())
    train, held, tested = parts
    assert not train & tested and (held == train if val == 0 else not held & (train | tested))
    assert len(train | held | tested) == n


@settings(max_examples=50, deadline=None)
@given(st.text(string.ascii_lowercase + "_- ", min_size=1, max_size=8), st.integers(0, 999))
def test_zeros_and_words_are_no_difference(word, number):
    assert plain(f"{word}_{number}_image") == plain(f"{word}_{number:05d}_mask") == plain(f"{word}_{number}")


SIDE = {"image_dir": ".", "mask_dir": "."}


@pytest.mark.parametrize(
    ("image", "mask", "expected"),
    [
        ("images/{}.jpg", "masks/{}.png", {"image_dir": "images", "mask_dir": "masks"}),
        ("train/images/{}.jpg", "train/masks/{}.png", {"image_dir": "images", "mask_dir": "masks"}),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", {"image_dir": "JPEGImages", "mask_dir": "SegmentationClass"}),
        (
            "images/{}_image.jpg",
            "annotations/{}_annotation.png",
            {"image_dir": "images", "mask_dir": "annotations", "image_suffix": "_image", "mask_suffix": "_annotation"},
        ),
        ("set/images/a/{}.jpg", "set/gt/a/{}.png", {"image_dir": "set/images", "mask_dir": "set/gt"}),
        ("{}.jpg", "masks/{}.png", {"image_dir": ".", "mask_dir": "masks"}),
        ("x/{}.jpg", "y/{}.png", {"image_dir": "x", "mask_dir": "y"}),
        ("{}.jpg", "{}_mask.png", SIDE | {"mask_suffix": "_mask"}),
        ("train/{}.jpg", "train/{}_mask.png", SIDE | {"mask_suffix": "_mask"}),
        ("{}.jpg", "{}.png", SIDE | {"mask_suffix": ".png"}),
    ],
)
def test_the_layout_is_worked_out(image, mask, expected, tmp_path):
    pairs(tmp_path, image, mask)
    found = work_out(tmp_path)
    assert (found.class_path, found.init_args) == ("Folder", expected)
    assert "6 pairs" in found.said[0]


def test_annotations_beside_images_are_polygons(tmp_path):
    draw(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text(
        json.dumps({
            "shapes": [{"label": "cat", "shape_type": "polygon", "points": [[0, 0], [3, 0], [3, 3]]}],
            "imagePath": "a.jpg",
            "imageHeight": 4,
            "imageWidth": 4,
        })
    )  # fmt: skip
    assert work_out(tmp_path).class_path == "Polygons"


def test_a_layout_that_cannot_be_told_is_refused(tmp_path):
    draw(tmp_path / "x/0.jpg", tmp_path / "y/0.jpg")
    with pytest.raises(UserError, match=r"holds 2 images in x, y, but it cannot be told .* add --data Folder"):
        work_out(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        work_out(tmp_path / "nowhere")


def test_the_command_takes_what_it_worked_out_and_what_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(draw_tree(tmp_path / "set", {"train": 3, "val": 1, "test": 1}))
    given = ["check_data", "--data.root", root, "--data.class_names", "[a, b, c]"]
    args = with_layout(given)
    assert args[:2] == ["check_data", "--data"] and args[3:] == given[1:]
    assert json.loads(args[2]) == {
        "class_path": "Folder",
        "init_args": {"image_dir": "images", "mask_dir": "masks"},
    }
    for others in (["check_data", "--data", "Folder", "--data.root", root], ["fit", "--data.root", root]):
        assert with_layout(others) == others


@pytest.mark.slow
def test_check_data_without_a_class(tmp_path):
    root = draw_tree(tmp_path / "set", {"train": 3, "val": 1, "test": 1})
    output = lightning("check_data", "--data.root", root, "--minutes", "0.01", cwd=tmp_path).stdout
    assert "taken as Folder: image_dir images, mask_dir masks; 3 pairs" in output
    assert "\nReady to train" in output and "would fail" not in output


def test_several_masks_per_image_are_named(tmp_path):
    pairs(tmp_path, "images/{}.jpg", "masks/{}_cat.png")
    pairs(tmp_path, "images/{}.jpg", "masks/{}_dog.png")
    with pytest.raises(UserError, match=r"several masks per image, as .*0_cat\.png and .*0_dog\.png for .*0\.jpg"):
        Folder(tmp_path, CLASSES).samples("train")
    with pytest.raises(UserError, match="several masks per image"):
        work_out(tmp_path)
    assert len(Folder(tmp_path, CLASSES, mask_suffix="_cat").samples("train")) == 4  # as the sentence advises


def test_classes_of_roboflow(tmp_path):
    pairs(tmp_path, "train/{}.jpg", "train/{}_mask.png")
    pairs(tmp_path, "valid/{}.jpg", "valid/{}_mask.png", 1)
    for split in ("train", "valid"):
        text = "Pixel Value, Class\r\n0, background\r\n2, a\r\n"
        (tmp_path / split / "_classes.csv").write_bytes(text.encode("utf-16"))
    data = Folder(tmp_path, image_dir=".", mask_dir=".", mask_suffix="_mask")
    assert data.class_names == ["background", "a"] and data.label_map == {0: 0, 2: 1}
    (tmp_path / "valid/_classes.csv").write_text("Pixel Value, Class\n0, background\n2, b")
    with pytest.raises(UserError, match="name different classes"):
        Folder(tmp_path, image_dir=".", mask_dir=".", mask_suffix="_mask")


@pytest.mark.parametrize("sign", [";", "\t", ","])
def test_class_maps_of_spreadsheets(sign, tmp_path):
    rows = [["name", "r", "g", "b", ""], ['"bg"', "0", "0", "0", ""], ["a b", "255", "0", "1", ""]]
    text = "\r\n".join(sign.join(row) for row in rows)
    (tmp_path / "class_dict.csv").write_bytes(text.encode("utf-8-sig"))
    data = Folder(tmp_path)
    assert data.class_names == ["bg", "a b"] and data.palette == [(0, 0, 0), (255, 0, 1)]
