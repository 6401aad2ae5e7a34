"""Results stay in their folder whatever names the data have, overwrite no data, and hold what was predicted."""

import json
import os
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import tifffile
import torch
from conftest import Fixed, draw_pair, lightning, succeed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from datamodules import Polygons, SegmentationDataModule
from datamodules.decode import Sample
from segmentation import geotiff, outlines
from segmentation.callbacks import PredictionWriter
from segmentation.commands.export import export
from segmentation.commands.predict_tiff import predict_tiff
from segmentation.errors import UserError
from segmentation.outputs import below, writable

COLOURS = torch.tensor([[110.0, 110, 110], [190, 60, 50], [50, 70, 180]])


def nearest_colour(image: Tensor) -> Tensor:
    """Logits that find the classes of `draw_pair`, for a normalised image."""
    model = Fixed(3, lambda x: x)
    pixels = image * model.std + model.mean
    return -(pixels[:, None] * 255 - COLOURS[None, :, :, None, None]).square().sum(dim=2) / 1000


class Listed(SegmentationDataModule):
    """A data module of one's own, whose names are what a test says."""

    class_names = ("ground", "disc", "bar")
    palette = ((10, 20, 30), (200, 0, 0), (0, 0, 200))

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__(num_workers=0)
        self.listed_samples = samples

    def samples(self, split: str) -> list[Sample]:
        return self.listed_samples


def draw(folder: Path, names: list[str]) -> list[Sample]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(names)):
        image, labels = draw_pair(i)
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(labels).save(folder / f"{i}_mask.png")
    return [Sample(name, folder / f"{i}.png", folder / f"{i}_mask.png") for i, name in enumerate(names)]


def predict(samples: list[Sample], out: Path, **options) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[PredictionWriter(str(out), **options)], **quiet)
    trainer.predict(Fixed(3, nearest_colour), Listed(samples), return_predictions=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


HOSTILE = [
    "/etc/x",
    "../x",
    "a/../../x",
    "..",
    "",
    "C:\\x",
    "C:x",
    "\\x",
    "..\\x",
    "a\\..\\..\\x",
    "\\\\host\\share\\x",
    "a\0b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_out_is_refused_before_anything_is_written(name, tmp_path):
    samples = draw(tmp_path / "data", ["good", name])
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"does not stay in the output folder .* rename"):
        predict(samples, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


@given(st.text(alphabet="ab./\\:C \0é", max_size=12))
@example("a/./b")
@settings(max_examples=200, deadline=None)
def test_no_name_leads_out(name):
    try:
        files = below(Path("/any/out"), name, {"masks": ".png"})
    except UserError:
        return
    assert os.path.normpath(files["masks"]).startswith("/any/out/masks/")


def test_an_absolute_name_of_the_data_is_never_overwritten(tmp_path):
    """As with lists of absolute paths: the name plus a suffix is a file of the data."""
    samples = draw(tmp_path / "data", ["x"])
    samples = [Sample(str(tmp_path / "data/0"), samples[0].image, samples[0].mask)]
    before = contents(tmp_path)
    with pytest.raises(UserError, match="does not stay in"):
        predict(samples, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def mark(out: Path) -> None:
    """Leave what an earlier run leaves."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "predictions.jsonl").touch()


def output_is_the_data(root: Path) -> Path:
    """The images' own folder holds `masks`, as many data sets do."""
    mark(root)
    return root


def output_is_a_link(root: Path) -> Path:
    mark(root)
    (root.parent / "link").symlink_to(root, target_is_directory=True)
    return root.parent / "link"


def masks_are_a_link(root: Path) -> Path:
    out = root.parent / "out"
    mark(out)
    (out / "masks").symlink_to(root / "masks", target_is_directory=True)
    return out


def a_subfolder_is_a_link(root: Path) -> Path:
    out = root.parent / "out"
    mark(out)
    (out / "masks").mkdir()
    (out / "masks/sub").symlink_to(root / "masks/sub", target_is_directory=True)
    return out


def a_file_is_a_link(root: Path) -> Path:
    out = root.parent / "out"
    mark(out)
    (out / "masks/sub").mkdir(parents=True)
    (out / "masks/sub/a.png").symlink_to(root / "masks/sub/a.png")
    return out


def a_file_is_a_hard_link(root: Path) -> Path:
    out = root.parent / "out"
    mark(out)
    (out / "masks/sub").mkdir(parents=True)
    (out / "masks/sub/a.png").hardlink_to(root / "masks/sub/a.png")
    return out


def no_earlier_run(root: Path) -> Path:
    out = root.parent / "out"
    (out / "masks/sub").mkdir(parents=True)
    (out / "masks/sub/a.png").write_bytes(b"somebody's only copy")
    return out


@pytest.mark.parametrize(
    "prepare",
    [output_is_the_data, output_is_a_link, masks_are_a_link, a_subfolder_is_a_link, a_file_is_a_link,
     a_file_is_a_hard_link, no_earlier_run],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_files_of_the_data_are_never_overwritten(prepare, tmp_path):
    root = tmp_path / "data"
    for kind in ("images", "masks"):
        (root / kind / "sub").mkdir(parents=True)
    image, labels = draw_pair(0)
    Image.fromarray(image).save(root / "images/sub/a.png")
    Image.fromarray(labels).save(root / "masks/sub/a.png")
    out = prepare(root)
    before = contents(tmp_path)
    sample = Sample("sub/a", root / "images/sub/a.png", root / "masks/sub/a.png")
    with pytest.raises(UserError, match=r"give another --writer.output_dir|remove the link"):
        predict([sample], out, overwrite=True)
    assert contents(tmp_path) == before
    predict([sample], tmp_path / "another")  # the advice
    assert (tmp_path / "another/masks/sub/a.png").is_file()


def test_a_link_out_of_the_folder_is_not_written_through(tmp_path):
    samples, out, elsewhere = draw(tmp_path / "data", ["a"]), tmp_path / "out", tmp_path / "elsewhere.png"
    elsewhere.write_bytes(b"precious")
    predict(samples, out)
    for link in (out / "masks/a.png", out / "predictions.jsonl"):
        link.unlink()
        link.symlink_to(elsewhere)
    predict(samples, out, overwrite=True)
    assert elsewhere.read_bytes() == b"precious" and not (out / "masks/a.png").is_symlink()


def test_results_are_not_predicted_again(tmp_path):
    samples = draw(tmp_path / "data", ["a"])
    predict(samples, tmp_path)
    again = [*samples, Sample("overlays/a", tmp_path / "overlays/a.jpg", tmp_path / "masks/a.png")]
    with pytest.raises(UserError, match=r"files of the data set lie in .* where results would be written"):
        predict(again, tmp_path, overwrite=True)
    predict(again, tmp_path / "out")


@pytest.mark.parametrize(
    "names", [["a", "a"], ["Straße", "STRASSE"], ["sub/a", "SUB/a"], ["é", "e\u0301"], ["x\\y", "x/y"]]
)
def test_names_that_differ_in_case_alone_are_refused(names, tmp_path):
    with pytest.raises(UserError, match=r"would write the same files .* rename one"):
        predict(draw(tmp_path / "data", names), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda out: out.write_text("a file"), "is a file: name another folder"),
        (lambda out: (out.mkdir(), (out / "masks").write_text("")), r"masks is a file: name another folder"),
        (lambda out: out.symlink_to("/dev/null"), "is a file: name another folder"),
    ],
)
def test_what_is_in_the_way_is_named(prepare, words, tmp_path):
    prepare(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        predict(draw(tmp_path / "data", ["a"]), tmp_path / "out")


def test_a_folder_that_the_system_refuses_is_named():
    with pytest.raises(UserError, match=r"cannot be written to /proc/nothing/out \(.*\): name another folder"):
        writable(Path("/proc/nothing/out"))
    with pytest.raises(UserError, match="File name too long"):
        writable(Path("/tmp") / ("x" * 300))


def test_a_name_that_is_too_long_for_a_result_is_named_before_the_run(tmp_path):
    samples = draw(tmp_path / "data", ["a", "x" * 251])
    predict(samples, tmp_path / "short")  # .png and .jpg still fit
    with pytest.raises(UserError, match=r"File name too long.*shorter"):
        predict(samples, tmp_path / "long", polygons="geojson")
    assert not (tmp_path / "long").exists()


def test_lines_and_files_follow_the_images(tmp_path):
    samples = draw(tmp_path / "data", ["b/2", "a 1", "c.x"])
    predict(samples, tmp_path / "out", polygons="coco", probabilities="npz")
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["b/2", "a 1", "c.x"]
    expected = {"predictions.jsonl", "annotations.json"}
    for kind, suffix in (("masks", "png"), ("overlays", "jpg"), ("probabilities", "npz")):
        expected |= {f"{kind}/{name}.{suffix}" for name in ("b/2", "a 1", "c.x")}
    assert contents(tmp_path / "out").keys() == expected
    for i, name in enumerate(("b/2", "a 1", "c.x")):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/masks/{name}.png")), draw_pair(i)[1])
    predict(samples, tmp_path / "out", overwrite=True, polygons="coco", probabilities="npz")
    assert contents(tmp_path / "out").keys() == expected


def test_lines_of_several_processes_end_in_the_order_of_the_images(tmp_path):
    writer = PredictionWriter(str(tmp_path))
    writer.samples = dict.fromkeys("abcde")
    file = tmp_path / "lines"
    file.write_text("".join(json.dumps({"name": name}) + "\n" for name in "dbeac"))
    assert [line["name"] for line in writer._in_order(file)] == list("abcde")


def test_probabilities_are_those_of_the_model(tmp_path):
    (sample,) = draw(tmp_path / "data", ["a"])
    model = Fixed(3, nearest_colour)
    with torch.no_grad():
        expected = model.probabilities(model(model.preprocess(sample.read()[0][None])))[0].numpy()
    for kind in ("tiff", "npz"):
        predict([sample], tmp_path / kind, probabilities=kind)
    stored = tifffile.imread(tmp_path / "tiff/probabilities/a.tif")
    assert stored.dtype == np.uint16 and stored.shape == (3, 48, 64)
    assert np.abs(stored / 65535 - expected).max() <= 0.51 / 65535
    with np.load(tmp_path / "npz/probabilities/a.npz") as file:
        assert file["class_names"].tolist() == ["ground", "disc", "bar"]
        np.testing.assert_array_equal(file["probabilities"], expected)
    with tifffile.TiffFile(tmp_path / "tiff/probabilities/a.tif") as file:
        about = json.loads(file.pages[0].description)
    assert about == {"class_names": ["ground", "disc", "bar"], "full_scale": 65535}


def test_coco_annotations_give_the_masks_back(tmp_path):
    samples = draw(tmp_path / "data", ["b", "a", "c"])
    predict(samples, tmp_path / "out", polygons="coco")
    coco = COCO(tmp_path / "out/annotations.json")
    assert [c["name"] for c in coco.loadCats([0, 1, 2])] == ["ground", "disc", "bar"]
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["0.png", "1.png", "2.png"]
    for i, number in enumerate(coco.getImgIds()):
        labels = np.full((48, 64), 255)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=number)):
            inside = coco.annToMask(annotation).astype(bool)
            assert annotation["area"] == inside.sum() and (labels[inside] == 255).all()
            labels[inside] = annotation["category_id"]
        np.testing.assert_array_equal(labels, draw_pair(i)[1])
    with pytest.raises(UserError, match="exists already"):
        predict(samples, tmp_path / "out", polygons="coco")


@pytest.mark.parametrize("first", ["background", "ground"])
def test_coco_annotations_are_a_data_set(first, tmp_path, monkeypatch):
    """`Polygons` reads them with the images; its background stands before classes that name none."""
    samples = draw(tmp_path / "data", ["2", "0", "1"])
    monkeypatch.setattr(Listed, "class_names", (first, "disc", "bar"))
    predict([Sample(f"{i}", s.image) for i, s in enumerate(samples)], tmp_path / "out", polygons="coco")
    (tmp_path / "data/annotations.json").write_text((tmp_path / "out/annotations.json").read_text())
    for mask in (tmp_path / "data").glob("*_mask.png"):
        mask.unlink()
    data = Polygons(tmp_path / "data", val_fraction=0, test_fraction=0)
    listed = data.samples("train")
    assert len(listed) == 3
    for sample in listed:
        labels = sample.read()[1].numpy() - (first == "ground")
        np.testing.assert_array_equal(labels, draw_pair(int(sample.name))[1])
    assert list(data.class_names)[-3:] == [first, "disc", "bar"]


def test_annotations_of_the_user_are_kept(tmp_path):
    samples, out = draw(tmp_path / "data", ["a"]), tmp_path / "out"
    predict(samples, out)
    (out / "annotations.json").write_text('{"images": []}')
    with pytest.raises(UserError, match=r"annotations.json is no result of predict"):
        predict(samples, out, overwrite=True, polygons="coco")
    assert (out / "annotations.json").read_text() == '{"images": []}'


def rasterised(shapes: dict, height: int, width: int, corner=lambda points: points) -> np.ndarray:
    """Draw polygons by matplotlib: a pixel belongs to the one that holds its middle."""
    y, x = np.mgrid[:height, :width]
    middles = np.c_[x.ravel() + 0.5, y.ravel() + 0.5]
    labels = np.full(height * width, -1)
    for feature in shapes["features"]:
        rings = [Outline(corner(np.array(ring))) for ring in feature["geometry"]["coordinates"]]
        inside = rings[0].contains_points(middles)
        for hole in rings[1:]:
            inside &= ~hole.contains_points(middles)
        assert (labels[inside] == -1).all() and inside.sum() == feature["properties"]["pixels"]
        labels[inside] = feature["properties"]["label"]
    return labels.reshape(height, width)


def assert_valid(shapes: dict) -> None:
    """Check the rules of RFC 7946 that a reader may rely on."""
    for feature in shapes["features"]:
        for i, ring in enumerate(feature["geometry"]["coordinates"]):
            assert ring[0] == ring[-1] and len(ring) >= 5
            assert len({tuple(point) for point in ring}) == len(ring) - 1, "no point twice"
            x, y = np.array(ring).T
            signed = (x[:-1] * y[1:] - x[1:] * y[:-1]).sum()
            assert (signed > 0) == (i == 0), "borders counterclockwise, holes clockwise"


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_polygons_give_any_labels_back(height, width, classes, seed):
    from scipy import ndimage

    labels = np.random.default_rng(seed).integers(0, classes, (height, width))
    shapes = outlines.geojson(labels, list("abcd"))
    np.testing.assert_array_equal(rasterised(shapes, height, width), labels)
    assert_valid(shapes)
    assert len(shapes["features"]) == sum(ndimage.label(labels == k)[1] for k in range(classes))


def test_a_ring_in_a_ring_keeps_its_hole():
    labels = np.zeros((9, 9), int)
    labels[1:8, 1:8], labels[2:7, 2:7], labels[4, 4] = 1, 0, 1
    shapes = outlines.geojson(labels, ["out", "ring"])
    rings = [(f["properties"]["class"], len(f["geometry"]["coordinates"])) for f in shapes["features"]]
    assert rings == [("out", 2), ("out", 2), ("ring", 2), ("ring", 1)]
    assert shapes["features"][3]["geometry"]["coordinates"] == [[(4, 4), (5, 4), (5, 5), (4, 5), (4, 4)]]


def geotiff_of(path: Path, image: np.ndarray, *, point: bool = False, matrix: bool = False) -> None:
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2 if point else 1, 3072, 0, 1, 32633)
    scale, tie = (33550, "d", 3, (2.0, 2.0, 0.0), True), (33922, "d", 6, (0, 0, 0, 500000.0, 5600000.0, 0), True)
    m = (2.0, 0, 0, 500000.0, 0, -2.0, 0, 5600000.0, 0, 0, 0, 0, 0, 0, 0, 1)
    place = [(34264, "d", 16, m, True)] if matrix else [scale, tie]
    tifffile.imwrite(path, image, photometric="rgb", metadata=None, extratags=[*place, (34735, "H", 16, keys, True)])


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("matrix", [False, True])
def test_polygons_and_probabilities_lie_on_the_map_where_the_image_does(point, matrix, tmp_path):
    image, labels = draw_pair(3)
    geotiff_of(tmp_path / "a.tif", image, point=point, matrix=matrix)
    predict([Sample("a", tmp_path / "a.tif")], tmp_path / "out", polygons="geojson", probabilities="tiff")
    shapes = json.loads((tmp_path / "out/polygons/a.geojson").read_text())
    assert shapes["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    half = 1.0 if point else 0.0  # metres: half a pixel
    origin = np.array([500000 - half, 5600000 + half])  # the image's upper left corner
    np.testing.assert_array_equal(rasterised(shapes, 48, 64, lambda p: (p - origin) / [2, -2]), labels)
    assert_valid(shapes)
    assert geotiff.read(tmp_path / "out/probabilities/a.tif") == geotiff.read(tmp_path / "a.tif")


def test_degrees_need_no_system_and_other_images_are_in_pixels(tmp_path):
    tags = {33550: (0.5, 0.25, 0), 33922: (0, 0, 0, 10.0, 50.0, 0), 34735: (1, 1, 0, 1, 2048, 0, 1, 4326)}
    place = geotiff.place_of(tags)
    shapes = outlines.geojson(np.zeros((4, 2), int), ["a"], place)
    assert "crs" not in shapes  # RFC 7946: longitude and latitude by WGS 84
    corners = {tuple(point) for point in shapes["features"][0]["geometry"]["coordinates"][0]}
    assert corners == {(10, 50), (11, 50), (11, 49), (10, 49)}
    assert geotiff.place_of({33922: tuple(range(24))}) is None  # ground control points
    assert geotiff.place_of({}) is None and geotiff.read(Path("a.png")) == (None, [])


def test_no_command_writes_over_the_checkpoint(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"weights")
    (tmp_path / "link.pt2").symlink_to(tmp_path / "a.ckpt")
    model, trainer = Fixed(3, nearest_colour), L.Trainer(accelerator="cpu", logger=False)
    checkpoint = str(tmp_path / "a.ckpt")
    for output in ("a.ckpt", "link.pt2"):
        with pytest.raises(UserError, match="is the checkpoint"):
            export(trainer, model, checkpoint, format="torch_export", output=str(tmp_path / output))
        with pytest.raises(UserError, match="is the checkpoint"):
            predict_tiff(trainer, model, checkpoint, image="a.tif", output=str(tmp_path / output), overwrite=True)
    with pytest.raises(UserError, match=r"a.ckpt is a file: name another folder"):
        export(trainer, model, checkpoint, format="torch_export", output=f"{checkpoint}/a.pt2")
    assert (tmp_path / "a.ckpt").read_bytes() == b"weights"


@pytest.mark.slow
def test_one_file_is_predicted_and_a_folder_in_the_way_is_said_first(trained, tmp_path):
    image, _ = draw_pair(0)
    Image.fromarray(image).save(tmp_path / "photo.png")
    checkpoint = trained / "logs/config/version_0/checkpoints/best.ckpt"
    command = ["predict", "--ckpt_path", checkpoint, "--data.predict_dir", tmp_path / "photo.png"]
    options = ["--writer.polygons", "geojson", "--writer.probabilities", "tiff"]
    succeed(*command, *options, cwd=tmp_path)
    found = contents(tmp_path / "predictions").keys()
    kinds = ("masks/photo.png", "overlays/photo.jpg", "polygons/photo.geojson", "probabilities/photo.tif")
    assert found == {*kinds, "predictions.jsonl"}
    done = lightning(*command, "--writer.output_dir", tmp_path / "photo.png/out", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "photo.png is a file: name another folder" in done.stderr and "GPU available" not in done.stderr
