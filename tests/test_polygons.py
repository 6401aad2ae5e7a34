"""Exports of labelling tools, written by hand as each tool writes them; all draw the same two objects."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import lightning, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from trees import HEIGHT, WIDTH, picture, save

from datamodules import COCO, Polygons
from datamodules.annotations import ellipse, read_annotations, turned, unpack_brush, unpack_counts
from datamodules.errors import UserError
from datamodules.polygons import spellings

CAT, DOG = (2, 2, 38, 48), (10, 10, 20, 20)  # top, left, bottom, right
# Label Studio's own encoder made this of the square DOG in 40 x 52 pixels
BRUSH = [
    0, 0, 32, 128, 57, 27, 255, 8, 71, 0, 196, 255, 250, 156, 3, 19, 255, 234, 112, 12, 79, 255, 169, 192, 49, 63, 254,
    167, 0, 196, 255, 250, 156, 3, 19, 255, 234, 112, 12, 79, 255, 169, 192, 49, 63, 254, 167, 0, 196, 255, 250, 156, 3,
    19, 255, 241, 11, 240, 0,
]  # fmt: skip


def inside(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    pixels[top:bottom, left:right] = True
    return pixels


EXPECTED = np.where(inside(*DOG), 2, np.where(inside(*CAT), 1, 0))


def corners(top: float, left: float, bottom: float, right: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def flat(box: tuple[int, ...]) -> list[float]:
    return [part for point in corners(*box) for part in point]


def coco(files: Sequence[str], things: Sequence[dict], names: Sequence[str] = ("cat", "dog"), **image) -> str:
    """Write COCO's format; image ids count from 0, category ids from 1."""
    size = {"height": HEIGHT, "width": WIDTH} | image
    return json.dumps({
        "info": {}, "licenses": [],
        "images": [{"id": i, "file_name": file, **size} for i, file in enumerate(files)],
        "annotations": [{"id": i, "image_id": 0, "iscrowd": 0, **thing} for i, thing in enumerate(things)],
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names, start=1)],
    })  # fmt: skip


TWO = ({"category_id": 2, "segmentation": [flat(DOG)]}, {"category_id": 1, "segmentation": [flat(CAT)]})  # no areas


def labelme(file: str, shapes: Sequence[dict]) -> str:
    return json.dumps({
        "version": "5.5.0", "flags": {}, "imagePath": file, "imageData": "iVBORw0KGgo=", "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
        "shapes": [{"group_id": None, "description": "", "flags": {}, "mask": None, **shape} for shape in shapes],
    })  # fmt: skip


LABELME = (
    {"label": "dog", "shape_type": "rectangle", "points": [[20, 10], [10, 20]]},
    {"label": "cat", "shape_type": "polygon", "points": corners(*CAT)},
    {"label": "cat", "shape_type": "point", "points": [[3, 3]]},
)
CVAT = f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><id>7</id><name>pets</name><mode>annotation</mode>
    <labels>
      <label><name>cat</name><color>#ff6037</color><type>any</type><attributes></attributes></label>
      <label><name>dog</name><color>#24b353</color><type>any</type><attributes></attributes></label>
    </labels></task><dumped>2026-01-01</dumped></meta>
  <image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">
    <mask label="dog" source="manual" occluded="0" rle="0, 100" left="10" top="10" width="10" height="10" z_order="0">
    </mask>
    <polygon label="cat" source="manual" occluded="0" points="2.00,2.00;48.00,2.00;48.00,38.00;2.00,38.00" z_order="0">
    </polygon>
    <polyline label="cat" source="manual" occluded="0" points="1.00,1.00;5.00,5.00" z_order="0"></polyline>
    <tag label="cat" source="manual"></tag>
  </image>
</annotations>
"""


def label_studio(path: str, *values: dict, minimal: bool = False) -> str:
    """Write Label Studio's JSON, or JSON-MIN; a value is percent of the image's sides."""
    kinds = [next(key for key in value if key.endswith("labels")) for value in values]
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    if minimal:
        label = [{**value, **size} for value in values]
        return json.dumps([{"image": path, "id": 1, "label": label, "annotator": 1, "annotation_id": 1}])
    results = [
        {**size, "value": value, "id": f"r{i}", "from_name": "label", "to_name": "image", "type": kind}
        for i, (kind, value) in enumerate(zip(kinds, values, strict=True))
    ]
    old = {"id": 1, "was_cancelled": False, "ground_truth": False, "result": [], "updated_at": "2026-01-01"}
    new = {"id": 2, "was_cancelled": False, "ground_truth": False, "result": results, "updated_at": "2026-01-02"}
    task = {"id": 1, "annotations": [new, old], "predictions": [], "data": {"image": path}}
    return json.dumps([task])


def percent(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[x * 100 / WIDTH, y * 100 / HEIGHT] for x, y in points]


PERCENT_BOX = {
    "x": 2 * 100 / WIDTH, "y": 2 * 100 / HEIGHT, "width": 46 * 100 / WIDTH, "height": 36 * 100 / HEIGHT, "rotation": 0,
    "rectanglelabels": ["cat"],
}  # fmt: skip
STROKE = {"format": "rle", "rle": BRUSH, "brushlabels": ["dog"]}
POLYGON = {"points": percent(corners(*DOG)), "closed": True, "polygonlabels": ["dog"]}


def via(shapes: Sequence[tuple[str, dict]]) -> dict:
    regions = [{"shape_attributes": shape, "region_attributes": {"class": name}} for name, shape in shapes]
    return {"a.png4711": {"filename": "a.png", "size": 4711, "regions": regions, "file_attributes": {}}}


VIA = via([
    ("dog", {"name": "rect", "x": 10, "y": 10, "width": 10, "height": 10}),
    ("cat", {"name": "polygon", "all_points_x": [2, 48, 48, 2], "all_points_y": [2, 2, 38, 38]}),
])  # fmt: skip
EXPORTS = {
    "coco": ("annotations.json", coco(["a.png"], TWO)),
    "coco of another machine": ("annotations.json", coco([r"C:\Users\bob\images\a.png"], TWO)),
    "labelme": ("a.json", labelme("a.png", LABELME)),
    "labelme elsewhere": ("a.json", labelme("..\\pictures\\a.png", LABELME)),
    "cvat": ("annotations.xml", CVAT),
    "label studio": ("export.json", label_studio("/data/upload/1/1a2b3c4d-a.png", POLYGON, PERCENT_BOX)),
    "label studio's brush": ("export.json", label_studio("/data/local-files/?d=pets%2Fa.png", STROKE, PERCENT_BOX)),
    "label studio, minimal": ("export.json", label_studio("s3://pets/a.png?v=1", STROKE, PERCENT_BOX, minimal=True)),
    "via": ("via_export_json.json", json.dumps(VIA)),
    "via project": ("project.json", json.dumps({"_via_settings": {}, "_via_img_metadata": VIA, "_via_attributes": {}})),
}  # fmt: skip


def write(root: Path, files: dict[str, str], images: Sequence[str] = ("a.png",)) -> Path:
    for i, name in enumerate(images):
        save(root / name, picture(i))
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def everything(data: Polygons) -> dict:
    return {sample.name: sample for split in ("train", "val", "test") for sample in data.samples(split)}


def drawn(root: Path, **arguments) -> np.ndarray:
    (sample,) = everything(Polygons(root, val_fraction=0, test_fraction=0, **arguments)).values()
    return sample.read()[1].numpy()


@pytest.mark.parametrize("tool", EXPORTS)
def test_all_tools_draw_the_same(tmp_path, tool):
    name, text = EXPORTS[tool]
    write(tmp_path, {name: text})
    data = Polygons(tmp_path, val_fraction=0, test_fraction=0)
    (sample,) = data.samples("train")
    assert data.class_names == ("background", "cat", "dog") and sample.name == "a"
    assert np.array_equal(sample.read()[1], EXPECTED)


def test_cvat_states_colours_subsets_turns_and_z_order(tmp_path, caplog):
    write(tmp_path, {"annotations.xml": CVAT})
    with caplog.at_level("INFO"):
        data = Polygons(tmp_path, val_fraction=0, test_fraction=0)
        data.samples("train")
    assert data.palette == [(0, 0, 0), (0xFF, 0x60, 0x37), (0x24, 0xB3, 0x53)]
    assert "left out: 1 polylines, such as a.png in" in caplog.text
    raised = CVAT.replace('38.00" z_order="0"', '38.00" z_order="1"')
    assert np.array_equal(drawn(write(tmp_path, {"annotations.xml": raised})), inside(*CAT).astype(int))
    half_turn = '<box label="dog" xtl="10" ytl="10" xbr="20" ybr="20" rotation="180" z_order="0"></box>'
    boxed = CVAT.replace('<tag label="cat" source="manual"></tag>', half_turn)
    assert np.array_equal(drawn(write(tmp_path, {"annotations.xml": boxed})), EXPECTED)
    video = CVAT.replace("<image", '<track id="0" label="cat"></track><image')
    write(tmp_path, {"annotations.xml": video})
    with pytest.raises(UserError, match=r"export the task as 'CVAT for images 1\.1'"):
        Polygons(tmp_path).samples("train")


def test_ellipses_cover_the_pixels_inside(tmp_path):
    """Independent of the polygon of many corners: a pixel belongs to an ellipse if its centre lies inside."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    expected = ((x - 26) / 16) ** 2 + ((y - 20) / 9) ** 2 <= 1
    shape = '<ellipse label="cat" cx="26" cy="20" rx="9" ry="16" rotation="90" z_order="0"></ellipse>'
    xml = CVAT[: CVAT.index("    <mask")] + shape + "</image></annotations>"
    for name, text in {
        "annotations.xml": xml,
        "a.json": json.dumps(via([("cat", {"name": "ellipse", "cx": 26, "cy": 20, "rx": 9, "ry": 16,
                                           "theta": math.pi / 2})])),
        "b.json": label_studio("a.png", {"x": 50, "y": 50, "radiusX": 1600 / WIDTH, "radiusY": 900 / HEIGHT,
                                         "rotation": 0, "ellipselabels": ["cat"]}),
    }.items():  # fmt: skip
        root = write(tmp_path / name, {name: text})
        assert np.mean(drawn(root).astype(bool) != expected) < 0.01
    circle = labelme("a.png", [{"label": "cat", "shape_type": "circle", "points": [[26, 20], [26, 32]]}])
    expected = (x - 26) ** 2 + (y - 20) ** 2 <= 144
    assert np.mean(drawn(write(tmp_path / "circle", {"a.json": circle})).astype(bool) != expected) < 0.01


def test_labelme_masks_and_its_labels_for_background_and_ignored(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((10, 10), 255, np.uint8)).save(file, "PNG")
    mask = {"label": "dog", "shape_type": "mask", "points": [[10, 10], [19, 19]]}
    mask["mask"] = base64.b64encode(file.getvalue()).decode()
    hole = {"label": "_background_", "shape_type": "rectangle", "points": [[30, 30], [32, 32]]}
    void = {"label": "__ignore__", "shape_type": "rectangle", "points": [[40, 30], [42, 32]]}
    write(tmp_path, {"a.json": labelme("a.png", [mask, LABELME[1], hole, void])})
    data = Polygons(tmp_path, val_fraction=0, test_fraction=0)
    expected = EXPECTED.copy()
    expected[30:32, 30:32], expected[30:32, 40:42] = 0, 255
    assert np.array_equal(data.samples("train")[0].read()[1], expected)
    assert data.class_names == ("_background_", "cat", "dog")


def test_roboflow_has_a_file_for_each_split_and_a_category_for_the_project(tmp_path, caplog):
    text = json.loads(coco(["a.png"], TWO))
    text["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        *({"id": i, "name": name, "supercategory": "pets"} for i, name in ((1, "cat"), (2, "dog"))),
    ]
    files = {f"{split}/_annotations.coco.json": json.dumps(text) for split in ("train", "valid", "test")}
    write(tmp_path, files, [f"{split}/a.png" for split in ("train", "valid", "test")])
    with caplog.at_level("INFO"):
        data = Polygons(tmp_path)
        names = [[s.name for s in data.samples(split)] for split in ("train", "val", "test")]
    assert names == [["train/a"], ["valid/a"], ["test/a"]] and data.class_names == ("background", "cat", "dog")
    assert "3 categories that only group others, such as 'pets'" in caplog.text
    text["categories"][0]["name"] = text["categories"][1]["supercategory"] = "cat"  # a project called as its class
    text["categories"][2]["supercategory"] = "cat"
    for file in files:
        (tmp_path / file).write_text(json.dumps(text))
    data = Polygons(tmp_path)
    assert np.array_equal(data.samples("val")[0].read()[1], EXPECTED) and data.num_classes == 3


def test_labels_typed_with_blanks_and_regions_of_two_labels(tmp_path, caplog):
    typed = LABELME[1] | {"label": " cat "}
    write(tmp_path, {"a.json": labelme("a.png", [LABELME[0], typed, LABELME[1]])})
    assert np.array_equal(drawn(tmp_path), EXPECTED)
    (tmp_path / "a.json").unlink()
    write(tmp_path, {"a.json": label_studio("a.png", POLYGON | {"polygonlabels": ["dog", "brown"]}, PERCENT_BOX)})
    with caplog.at_level("INFO"):
        assert np.array_equal(drawn(tmp_path), EXPECTED)
    assert "1 further labels of the same region, such as a.png" in caplog.text
    assert "1 further annotations of the same image, such as a.png" in caplog.text


def test_splits_without_words_for_them_come_from_a_hash(tmp_path):
    images = [f"{i}.png" for i in range(10)]
    write(tmp_path, {"train.json": coco(images, TWO)}, images)
    data = Polygons(tmp_path, val_fraction=0.2)
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [7, 2, 1]
    (tmp_path / "test").mkdir()
    write(tmp_path, {"test/test.json": coco(["t.png"], TWO)}, ["test/t.png"])
    data = Polygons(tmp_path, val_fraction=0.2)  # val is a share of train alone
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [8, 2, 1]
    with pytest.raises(UserError, match="their sum must be below 1"):
        Polygons(tmp_path, val_fraction=0.5, test_fraction=0.5)


def test_names_of_images_are_no_words_for_splits_but_their_folders_are(tmp_path):
    images = [f"{word}_{i}.png" for word in ("train", "val", "test") for i in range(10)]
    write(tmp_path, {f"{Path(name).stem}.json": labelme(name, LABELME) for name in images}, images)
    data = Polygons(tmp_path)
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [24, 3, 3]
    sorted_out = {f"{name.partition('_')[0]}/{name}" for name in images}
    files = {f"{Path(name).with_suffix('.json')}": labelme(Path(name).name, LABELME) for name in sorted_out}
    data = Polygons(write(tmp_path / "sorted", files, sorted(sorted_out)))
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [10, 10, 10]


def test_splits_may_be_folders_of_images(tmp_path):
    images = ["images/train/a.png", "images/train/b.png", "images/val/c.png"]
    write(tmp_path, {"labels.json": coco([Path(name).name for name in images], TWO)}, images)
    data = Polygons(tmp_path)
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [2, 1, 0]


def test_run_length_codes_must_fill_the_image(tmp_path):
    """pycocotools would fill the rest with what the memory holds."""
    whole = rle.encode(np.asfortranarray(inside(*DOG).astype(np.uint8)))["counts"].decode()
    fit = {"category_id": 2, "segmentation": {"size": [HEIGHT, WIDTH], "counts": whole}, "iscrowd": 1}
    assert np.array_equal(drawn(write(tmp_path, {"a.json": coco(["a.png"], [fit])})), inside(*DOG) * 2)
    for size, counts in (
        ([HEIGHT, WIDTH], "04"),
        ([HEIGHT, WIDTH], [3, 5]),
        ([HEIGHT, WIDTH], [-3, HEIGHT * WIDTH + 3]),
        ([WIDTH, HEIGHT], whole),
    ):
        thing = {"category_id": 2, "segmentation": {"size": size, "counts": counts}}
        write(tmp_path, {"a.json": coco(["a.png"], [thing])})
        with pytest.raises(UserError, match=r"a.json holds a run-length code .* for a.png, which has 52 x 40: export"):
            Polygons(tmp_path).samples("train")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_compressed_runs_are_those_of_pycocotools(height, width, seed, share):
    pixels = (np.random.RandomState(seed).rand(height, width) < share).repeat(9, 0)
    runs = unpack_counts(rle.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode())
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2 == 1, runs), pixels.flatten(order="F"))


def test_a_brush_stroke_is_read_as_label_studio_packed_it():
    assert np.array_equal(unpack_brush(BRUSH, (HEIGHT, WIDTH)), inside(*DOG))
    with pytest.raises(ValueError, match="8320 values for 10 x 10 pixels"):
        unpack_brush(BRUSH, (10, 10))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-90, 140), st.integers(-90, 130)), min_size=3, max_size=6))
def test_polygons_are_clipped_at_the_border(points):
    """The part inside is that of the same polygon in a larger picture, but for the rounding of one pixel's border."""
    from datamodules.polygons import draw

    whole = draw([[part + 100 for point in points for part in point]], HEIGHT + 200, WIDTH + 200)
    clipped = draw([[part for point in points for part in point]], HEIGHT, WIDTH)
    assert (clipped != whole[100 : 100 + HEIGHT, 100 : 100 + WIDTH]).sum() <= HEIGHT + WIDTH


def test_turned_is_clockwise_on_the_screen():
    assert turned([10, 0], (0, 0), 90) == pytest.approx([0, 10]) and len(ellipse(0, 0, 1, 1)) == 360


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["..", "C:", "", "~", "a b", "x.jpg", "%2e%2e", "%2F", "\\", "?d=", "://", "http:/", "1a2b3c4d-.."]
        )
    )
)
def test_no_path_of_a_file_leaves_the_folder(parts):
    for reading in spellings("/".join(parts)):
        assert reading and ".." not in reading and not any("/" in part or "\\" in part for part in reading)


def test_paths_lead_to_images_below_the_folder_only(tmp_path):
    save(tmp_path / "secret.png", picture(0))
    root = write(tmp_path / "root", {"a.json": coco(["../secret.png"], TWO)})
    (sample,) = everything(Polygons(root, val_fraction=0, test_fraction=0)).values()
    assert sample.name == "secret" and sample.image == root / "secret.png"
    assert "names the image" in sample.missing()
    root = write(tmp_path / "two", {"a.json": coco(["/home/bob/x.png"], TWO)}, ["one/x.png", "two/x.png"])
    with pytest.raises(UserError, match=r"both one/x.png and two/x.png in .* fit: set data.image_dir"):
        Polygons(root).samples("train")
    assert np.array_equal(drawn(root, image_dir="two"), EXPECTED)  # what the sentence advises
    write(root, {"a.json": coco(["/home/bob/two/X.PNG"], TWO)})
    assert everything(Polygons(root, val_fraction=0, test_fraction=0)).keys() == {"two/x"}
    root = write(tmp_path / "accent", {"a.json": coco(["pictures/e\u0301.png"], TWO)}, ["pictures/\u00e9.png"])
    assert np.array_equal(drawn(root), EXPECTED)  # the accent is a letter's own, or a sign after it
    root = write(tmp_path / "both", {"a.json": coco(["a.png", "a.jpg"], TWO)}, ["a.png", "a.jpg", "b.jpg"])
    assert everything(Polygons(root)).keys() == {"a.png", "a.jpg"}


def test_what_is_left_out_is_counted(tmp_path, caplog):
    things = [
        *TWO,
        {"category_id": 1, "segmentation": [[100, 100, 110, 100, 110, 110]]},
        {"category_id": 1, "segmentation": [[-5, 0, 5, 0, 5, 2, -5, 2]]},  # clipped
        {"category_id": 1, "segmentation": [], "bbox": [1, 2, 3, 4]},
        {"category_id": 1, "segmentation": [[1, 1, 2, 2]]},
        {"category_id": 1, "segmentation": [flat(DOG)], "image_id": 77},
    ]
    write(tmp_path, {"a.json": coco(["a.png", "b.png"], things), "other.json": "{}"}, ["a.png", "b.png", "c.png"])
    with caplog.at_level("INFO"):
        mask = everything(Polygons(tmp_path))["a"].read()[1]
    assert np.array_equal(mask, np.where(inside(0, 0, 2, 5), 1, EXPECTED))
    for line in (
        "1 objects wholly outside their image, such as a.png in",
        "1 boxes without an outline",
        "1 objects without area",
        "1 objects of images that the file does not list",
        f"1 images have no object and are all background, such as {tmp_path / 'b.png'}",
        f"1 images are not annotated and are left out, such as {tmp_path / 'c.png'}",
        f"1 files are no annotations and are left out, such as {tmp_path / 'other.json'}",
    ):
        assert line in caplog.text


SHARES = [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]
REFUSED = {
    "none of the formats": ('{"a": 1}', "expected COCO's JSON"),
    "cut short": ('{"images": [', "annotations.json cannot be read as annotations .*replace or remove it"),
    "nested": ("[" * 100000, "nested too deeply"),
    "boxes": (coco(["a.png"], [{"category_id": 1, "bbox": [1, 1, 2, 2]}]), "has 1 objects and outlines none"),
    "category": (coco(["a.png"], [{"category_id": 9, "segmentation": []}]), "category 9, which is not among its"),
    "nan": (coco(["a.png"], [{"category_id": 1, "segmentation": [[1, 2, 3, math.nan, 5, 6]]}]), "of a.png .*finite"),
    "far": (coco(["a.png"], [{"category_id": 1, "segmentation": [[1, 2, 3, 1e300, 5, 6]]}]), "of a.png .*finite"),
    "odd": (coco(["a.png"], [{"category_id": 1, "segmentation": [[1, 2, 3, 4, 5, 6, 7]]}]), "of a.png .*finite"),
    "text": (coco(["a.png"], [{"category_id": 1, "segmentation": [list("123456")]}]), "annotations of COCO .*again"),
    "shares": (coco(["a.png"], [{"category_id": 1, "segmentation": SHARES}]), "in shares of the image"),
    "twice": (coco(["a.png", "a.png"], TWO), "a.png is annotated twice, in .*annotations.json"),
    "names": (coco(["a.png"], TWO, ("cat", "cat")), "has two categories of the name 'cat'"),
    "many": (coco(["a.png"], TWO, [f"c{i}" for i in range(255)]), "255 classes besides the background"),
    "turned view": (
        label_studio("a.png", POLYGON).replace('"image_rotation": 0', '"image_rotation": 90'),
        "turned view of a.png",
    ),
    "latin-1": ("", "its text is not UTF-8: save it as UTF-8"),
    "no label": (labelme("a.png", [LABELME[1] | {"label": " "}]), "an object without a label in a.png"),
    "one name in two forms": (coco(["a.png"], TWO, ("a/b", "a-b")), "two classes are called 'a-b'"),
    "brush": (label_studio("a.png", STROKE | {"rle": BRUSH[:20]}), "annotations of Label Studio .*export it again"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path, fault):
    text, words = REFUSED[fault]
    write(tmp_path, {"annotations.json": text})
    if fault == "latin-1":
        (tmp_path / "annotations.json").write_bytes('{"é": 1}'.encode("latin-1"))
    with pytest.raises(UserError, match=words) as caught:
        Polygons(tmp_path).samples("train")
    assert str(tmp_path) in str(caught.value) or "classes" in words


def test_xml_declares_no_entities(tmp_path):
    bomb = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>'
    for encoding in ("utf-8", "utf-16"):
        head, body = CVAT.replace('"utf-8"', f'"{encoding}"').split("\n", 1)
        (tmp_path / "a.xml").write_bytes(f"{head}\n{bomb}\n{body}".encode(encoding))
        with pytest.raises(UserError, match=r"a.xml cannot be read as annotations: it declares a document type"):
            read_annotations(tmp_path / "a.xml")


def test_254_classes_fit_and_classes_choose_and_order(tmp_path):
    write(tmp_path, {"a.json": coco(["a.png"], TWO, ["a/b", "dog", *(f"c{i}" for i in range(252))])})
    data = Polygons(tmp_path, val_fraction=0, test_fraction=0)
    assert set(np.unique(data.samples("train")[0].read()[1])) == {0, 1, 2} and data.num_classes == 255
    assert data.class_names[1] == "a-b"  # a slash would split the names of metrics
    chosen = Polygons(tmp_path, classes=["dog", "c3"], val_fraction=0, test_fraction=0)
    assert np.array_equal(chosen.samples("train")[0].read()[1], inside(*DOG))
    assert chosen.class_names == ("background", "dog", "c3")
    with pytest.raises(UserError, match="no category 'horse' among a/b, dog"):
        Polygons(tmp_path, classes=["horse"]).samples("train")
    with pytest.raises(UserError, match="255 classes besides the background"):
        Polygons("/nowhere", classes=[f"c{i}" for i in range(255)])


def test_overlaps_may_be_ignored_however_many_objects_there_are(tmp_path):
    write(tmp_path, {"a.json": coco(["a.png"], [*TWO, *[TWO[0]] * 255])})  # 257 objects: a count of 8 bits is 1
    expected = np.where(inside(*DOG), 255, np.where(inside(*CAT), 1, 0))
    assert np.array_equal(drawn(tmp_path, ignore_overlap=True), expected)


def test_images_must_have_the_size_that_was_annotated(tmp_path):
    write(tmp_path, {"a.json": coco(["a.png"], TWO, height=2 * HEIGHT)})
    with pytest.raises(UserError, match=r"a.json was drawn on 52 x 80 pixels but the image .*a.png has 52 x 40"):
        drawn(tmp_path)
    write(tmp_path, {"a.json": coco(["a.png"], TWO, height=None)})
    assert np.array_equal(drawn(tmp_path), EXPECTED)  # no size is stated
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").unlink()
    for stored in (picture(0), np.rot90(picture(0)).copy()):  # annotated before and after the turn
        save(tmp_path / "a.jpg", stored, exif=exif, quality=95)
        write(tmp_path, {"a.json": coco(["a.jpg"], TWO)}, [])
        assert np.array_equal(drawn(tmp_path), EXPECTED)


def test_several_files_may_be_chosen(tmp_path):
    write(tmp_path, {"train.json": coco(["a.png"], TWO), "train_all.json": coco(["a.png"], TWO)})
    with pytest.raises(UserError, match=r"name the files to read in data\.annotations"):
        Polygons(tmp_path).samples("train")
    assert np.array_equal(drawn(tmp_path, annotations=["train.json"]), EXPECTED)
    with pytest.raises(UserError, match=r"file of annotations .*none.json does not exist"):
        Polygons(tmp_path, annotations="none.json").samples("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no annotations"):
        Polygons(tmp_path, annotations="empty").samples("train")


def test_coco_takes_no_argument_that_would_do_nothing():
    for argument in ("annotations", "image_dir", "val_fraction"):
        with pytest.raises(TypeError, match=argument):
            COCO("/nowhere", **{argument: 0})


@pytest.mark.slow
def test_the_doctor_reads_polygons_and_a_network_trains_on_them(tmp_path):
    images = [f"{i}.png" for i in range(6)]
    things = [thing | {"image_id": i} for i in range(6) for thing in TWO]
    root = write(tmp_path / "data", {"annotations.json": coco(images, things)}, images)
    said = succeed("check_data", "--data", "Polygons", "--data.root", root, "--data.batch_size", 2, cwd=tmp_path)
    assert "Ready to train." in said and "classes: background, cat, dog" in said
    options = "--model UNet --model.num_classes 3 --model.base_channels 4 --data Polygons --data.batch_size 2 "
    options += "--trainer.max_steps 1 --trainer.accelerator cpu --data.num_workers 0"
    succeed("fit", *options.split(), "--data.root", root, cwd=tmp_path)
    gone = Polygons(root).samples("train")[0].image
    gone.unlink()
    done = lightning("fit", *options.split(), "--data.root", root, cwd=tmp_path)
    assert done.returncode == 1 and f"names the image {gone}, which does not exist" in done.stderr
    assert "Traceback" not in done.stderr
