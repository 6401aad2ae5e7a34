"""Annotations of labelling tools: one reader for each format; all give outlined objects by the path of their image.

The formats, as their tools write them:

- COCO: cocodataset.org/#format-data; Roboflow and many other tools export it.
- LabelMe: github.com/wkentaro/labelme, one JSON file beside each image.
- CVAT for images 1.1: docs.cvat.ai, "XML annotation format".
- Label Studio: labelstud.io/guide/export, JSON and JSON-MIN. Its brush strokes are packed by thi.ng/rle-pack.
- VGG Image Annotator 2: robots.ox.ac.uk/~vgg/software/via, the annotations or the whole project as JSON.
"""

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from .decode import decoding
from .errors import UserError

Color = tuple[int, int, int]
Size = tuple[int, int]  # height and width in pixels
FORMATS = (
    "COCO's JSON (with images, annotations and categories), LabelMe's (with shapes and imagePath), CVAT for images 1.1 "
    "(XML), Label Studio's JSON, or VGG Image Annotator's JSON"
)
IGNORED = "__ignore__"  # LabelMe's label for pixels to ignore
FAR = 1e6  # no picture is so wide; beyond it a coordinate is not in pixels, and the rasteriser would need the memory


@dataclass(frozen=True)
class Outline:
    """One outlined object.

    Args:
        category: name of its class.
        segmentation: as in COCO's format: polygons ``[[x, y, x, y, ...], ...]`` or a run-length code.
        area: in pixels, as the file states it, or else computed from the segmentation.
        layer: objects of a higher layer lie on top; within a layer, the smaller ones do.
    """

    category: str
    segmentation: Any
    area: float
    layer: int = 0


@dataclass(frozen=True)
class Picture:
    """An annotated image.

    Args:
        path: of the image, as the tool wrote it.
        size: height and width in pixels as stated; None where the file states none.
        outlines: its objects.
        split: as the tool wrote it; "" for none.
    """

    path: str
    size: Size | None
    outlines: tuple[Outline, ...] = ()
    split: str = ""


@dataclass
class Annotations:
    """The content of one file of annotations.

    Args:
        file: the file.
        categories: the classes that the file lists, in its order, with the colour that it states or None.
        pictures: the annotated images.
        left_out: for each kind of thing that is not drawn, where it stands.
        largest: the largest coordinate of a polygon.
        one_image: whether the tool writes a file for each image, under the image's name.
    """

    file: Path
    categories: dict[str, Color | None] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    largest: float = -math.inf
    one_image: bool = False

    def leave_out(self, kind: str, path: str) -> list[Outline]:
        """Note that something is not drawn, and return no outline."""
        self.left_out.setdefault(kind, []).append(f"{path} in {self.file}")
        return []

    def outline(
        self, path: str, size: Size | None, category: Any, segmentation: Any, area: float | None = None, layer: int = 0
    ) -> list[Outline]:
        """Check one object and return it in a list, or note that it covers no pixel and return an empty list.

        Args:
            path: of its image, for messages.
            size: height and width of its image, if known.
            category: name of its class.
            segmentation: polygons or a run-length code, in COCO's format.
            area: its area as stated, in pixels.
            layer: see `Outline`.

        Raises:
            UserError: if the object has no label, a coordinate is not a number of pixels, or a run-length code belongs
                to another size.
        """
        label = str(category).strip()
        if not label:
            raise UserError(f"{self.file} outlines an object without a label in {path}: label or remove it")
        if isinstance(segmentation, Mapping):
            covered = self.check_code(path, size, segmentation)
            if not covered:
                return self.leave_out("objects without area", path)
            return [Outline(label, segmentation, float(area or covered), layer)]
        if segmentation and not isinstance(segmentation[0], Sequence):
            segmentation = [segmentation]  # some tools write one polygon without the outer list
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # a line has no area
        if not polygons:
            return self.leave_out("objects without area", path)
        for polygon in polygons:
            if not math.isfinite(sum(polygon)) or max(map(abs, polygon)) > FAR or len(polygon) % 2:
                raise UserError(
                    f"{self.file} outlines an object '{category}' of {path} by coordinates that are not pairs of "
                    f"finite pixels ({', '.join(map(str, polygon[:6]))}, ...): correct or remove this object"
                )
            self.largest = max(self.largest, *polygon)
        xs, ys = [x for p in polygons for x in p[0::2]], [y for p in polygons for y in p[1::2]]
        if size and (max(xs) <= 0 or max(ys) <= 0 or min(xs) >= size[1] or min(ys) >= size[0]):
            return self.leave_out("objects wholly outside their image", path)
        return [Outline(label, segmentation, float(area or sum(map(shoelace, polygons))), layer)]

    def check_code(self, path: str, size: Size | None, code: Mapping[str, Any]) -> int:
        """Return the number of pixels of a run-length code.

        pycocotools would fill what a code leaves open with whatever the memory holds.

        Raises:
            UserError: if the code has another size than its image, or its runs do not add up to it.
        """
        counts = code["counts"]
        runs = unpack_counts(counts) if isinstance(counts, str) else [int(count) for count in counts]
        height, width = (int(side) for side in code["size"])
        if (size and (height, width) != size) or sum(runs) != height * width or min(runs, default=0) < 0:
            stated = f"{size[1]} x {size[0]}" if size else f"{width} x {height}"
            raise UserError(
                f"{self.file} holds a run-length code of {width} x {height} pixels, whose runs cover {sum(runs)}, for "
                f"{path}, which has {stated}: export the annotations again"
            )
        return sum(runs[1::2])


def read_annotations(file: Path, required: bool = True) -> Annotations | None:
    """Read a file of any of the formats.

    Args:
        file: JSON or XML.
        required: whether a file of another content is an error; otherwise None is returned for it.

    Raises:
        UserError: if the file does not exist, is damaged, or is of none of the formats.
    """
    if not file.is_file():
        raise UserError(f"the file of annotations {file} does not exist: put it there, or correct data.root")
    with decoding(file, "annotations"):
        try:
            content = parse_xml(file) if file.suffix.lower() == ".xml" else json.loads(file.read_bytes())
        except UnicodeDecodeError:
            raise UserError("its text is not UTF-8: save it as UTF-8") from None
        except RecursionError:
            raise UserError("it is nested too deeply, so it is none: remove it") from None
    reader, tool = reader_of(content)
    if reader is None:
        if required:
            raise UserError(f"{file} cannot be read as annotations: expected {FORMATS}")
        return None
    found = Annotations(file)
    try:
        reader(content, found)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise UserError(f"{file} cannot be read as annotations of {tool} ({reason}): export it again") from error
    if 0 <= found.largest <= 1:
        raise UserError(
            f"{file} holds no coordinate above 1, so its polygons are in shares of the image: export them in pixels"
        )
    return found


def reader_of(content: Any) -> tuple[Callable[[Any, Annotations], None] | None, str]:
    """Tell the format by the keys at the top, and return its reader and the tool's name."""
    if isinstance(content, ElementTree.Element):
        return (read_cvat, "CVAT") if content.tag == "annotations" else (None, "")
    if isinstance(content, dict):
        if {"images", "annotations", "categories"} <= content.keys():
            return read_coco, "COCO"
        if {"shapes", "imagePath"} <= content.keys():
            return read_labelme, "LabelMe"
        entries = content.get("_via_img_metadata", content)
        entries = [*entries.values()] if isinstance(entries, dict) else []
        if entries and all(isinstance(entry, dict) and {"filename", "regions"} <= entry.keys() for entry in entries):
            return read_via, "VGG Image Annotator"
    if isinstance(content, list) and content and all(isinstance(task, dict) for task in content):
        if all("annotations" in task and "data" in task for task in content):
            return read_label_studio, "Label Studio"
        if all("annotation_id" in task for task in content):  # JSON-MIN
            return read_label_studio, "Label Studio"
    return None, ""


def parse_xml(file: Path) -> ElementTree.Element:
    """Parse XML that declares no entities of its own, because these could grow without limit or name other files."""
    text = file.read_bytes()
    if re.search(rb"<!\s*(DOCTYPE|ENTITY)", text.replace(b"\0", b""), re.IGNORECASE):
        raise UserError("it declares a document type, which no labelling tool does: remove the line <!DOCTYPE ...>")
    return ElementTree.fromstring(text)


# One reader for each format. It adds categories and pictures to `found`.


def read_coco(content: Any, found: Annotations) -> None:
    """Read COCO's format; a crowd (`iscrowd`) is drawn like any object, and `area` may be missing."""
    things = content["annotations"]
    names = coco_categories(content["categories"], {thing["category_id"] for thing in things}, found)
    images = {image["id"]: image for image in content["images"]}
    if len(images) < len(content["images"]):
        raise UserError(f"{found.file} gives two images the same id: export it again")
    outlines: dict[Any, list[Outline]] = {}
    for thing in things:
        image = images.get(thing["image_id"])
        if image is None:
            found.leave_out("objects of images that the file does not list", f"image_id {thing['image_id']}")
            continue
        if thing["category_id"] not in names:
            raise UserError(
                f"{found.file} holds an object of the category {thing['category_id']}, which is not among its "
                "categories: add the category, or remove the object"
            )
        path, name = str(image["file_name"]), names[thing["category_id"]]
        if not thing.get("segmentation"):
            found.leave_out("boxes without an outline", path)
            continue
        outlines.setdefault(image["id"], []).extend(
            found.outline(path, size_of(image), name, thing["segmentation"], thing.get("area"))
        )
    if things and not any(outlines.values()):
        raise UserError(
            f"{found.file} has {len(things)} objects and outlines none of them, so it is for detection: export "
            "polygons or masks"
        )
    for number, image in images.items():
        found.pictures.append(Picture(str(image["file_name"]), size_of(image), tuple(outlines.get(number, ()))))


def coco_categories(categories: Iterable[Mapping[str, Any]], used: set[Any], found: Annotations) -> dict[Any, str]:
    """Add categories to `found` in the order of their ids, and return the name of each id.

    Roboflow writes one more category, which has no object and groups the others under the project's name.

    Raises:
        UserError: for two categories of one name.
    """
    ordered = sorted(categories, key=lambda category: category["id"])
    above = Counter(category.get("supercategory") for category in ordered)
    names: dict[Any, str] = {}
    for category in ordered:
        number, name = category["id"], str(category["name"]).strip()
        if number not in used and above[name] > (category.get("supercategory") == name):
            found.leave_out("categories that only group others", f"'{name}'")
        elif name in names.values():
            raise UserError(f"{found.file} has two categories of the name '{name}': rename one of them")
        else:
            names[number] = name
            found.categories[name] = color_of(category.get("color"))
    return names


def read_labelme(content: Any, found: Annotations) -> None:
    """Read LabelMe's format: polygons, rectangles, circles and masks; points and lines have no area."""
    path, found.one_image = str(content["imagePath"]), True
    size = size_of({"height": content.get("imageHeight"), "width": content.get("imageWidth")})
    outlines: list[Outline] = []
    for shape in content["shapes"]:
        kind, points, label = shape.get("shape_type") or "polygon", shape["points"], shape["label"]
        segmentation: Any = None
        if kind == "mask":
            segmentation = labelme_mask(shape["mask"], points[0], size)
        elif kind == "circle":
            (x, y), (edge_x, edge_y) = points
            radius = math.hypot(edge_x - x, edge_y - y)
            segmentation = [ellipse(x, y, radius, radius)]
        elif kind == "rectangle" and len(points) == 2:
            (left, top), (right, bottom) = points
            segmentation = [box(left, top, right, bottom)]
        elif kind in ("polygon", "rectangle", "oriented_rectangle", "rotation"):
            segmentation = [flat(points)]
        if segmentation is None:
            found.leave_out(f"{kind}s" if not kind.endswith("s") else kind, path)
        else:
            outlines += found.outline(path, size, label, segmentation)
    found.pictures.append(Picture(path, size, tuple(outlines)))


def labelme_mask(text: str, corner: Sequence[float], size: Size | None) -> dict[str, Any]:
    """Decode LabelMe's mask: a PNG, as text, of the box whose upper left corner is given."""
    if size is None:
        raise UserError("a mask needs imageHeight and imageWidth")
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as file:
        return encode(np.array(file.convert("L")) > 0, int(corner[0]), int(corner[1]), size)


def read_cvat(content: ElementTree.Element, found: Annotations) -> None:
    """Read CVAT for images 1.1: polygons, boxes, ellipses and masks, in their z-order."""
    if content.find("track") is not None:
        raise UserError(
            f"{found.file} holds tracks of a video ('CVAT for video'): export the task as 'CVAT for images 1.1'"
        )
    for label in content.iterfind("meta//labels/label"):
        if not label.findtext("parent"):  # a point of a skeleton has one
            found.categories[(label.findtext("name") or "").strip()] = color_of(label.findtext("color"))
    for image in content.iterfind("image"):
        path, size = image.attrib["name"], size_of(image.attrib)
        outlines: list[Outline] = []
        for shape in image:
            segmentation = cvat_shape(shape, size)
            if segmentation is not None:
                layer = int(shape.get("z_order", 0))
                outlines += found.outline(path, size, shape.attrib["label"], segmentation, layer=layer)
            elif shape.tag != "tag":
                found.leave_out(f"{shape.tag}s" if not shape.tag.endswith("s") else shape.tag, path)
        found.pictures.append(Picture(path, size, tuple(outlines), image.get("subset", "")))


def cvat_shape(shape: ElementTree.Element, size: Size | None) -> Any:
    """Turn a shape of CVAT into COCO's polygons or run-length code; None for points, lines and the like."""

    def number(name: str) -> float:
        return float(shape.get(name, 0) if name == "rotation" else shape.attrib[name])

    if shape.tag == "polygon":
        return [flat([float(part) for part in point.split(",")] for point in shape.attrib["points"].split(";"))]
    if shape.tag == "box":
        corners = box(number("xtl"), number("ytl"), number("xbr"), number("ybr"))
        centre = (number("xtl") + number("xbr")) / 2, (number("ytl") + number("ybr")) / 2
        return [turned(corners, centre, number("rotation"))]
    if shape.tag == "ellipse":
        outline = ellipse(number("cx"), number("cy"), number("rx"), number("ry"))
        return [turned(outline, (number("cx"), number("cy")), number("rotation"))]
    if shape.tag == "mask" and size:  # runs of 0 and 1 in turn, row by row, inside a box
        runs = [int(run) for run in shape.attrib["rle"].split(",")]
        height, width = int(number("height")), int(number("width"))
        if sum(runs) != height * width or min(runs) < 0:
            raise ValueError(f"a mask of {width} x {height} pixels whose runs cover {sum(runs)}")
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        return encode(inside, int(number("left")), int(number("top")), size)
    return None


def read_label_studio(content: Any, found: Annotations) -> None:
    """Read Label Studio's export; of several annotations of a task, the ground truth counts, or else the latest."""
    for task in content:
        data = task.get("data", task)
        path = label_studio_path(data)
        annotations = [a for a in task.get("annotations", [task]) if not a.get("was_cancelled")]
        if not annotations:
            found.leave_out("tasks without an annotation", path)
            continue
        if len(annotations) > 1:
            found.leave_out("further annotations of the same image", path)
        annotations.sort(key=lambda a: (bool(a.get("ground_truth")), str(a.get("updated_at") or "")))
        chosen = annotations[-1]
        listed = chosen["result"] if "result" in chosen else label_studio_min(task)
        regions: dict[Any, dict[str, Any]] = {}  # shape and label of one region may be two results of one id
        for position, result in enumerate(listed):
            region = regions.setdefault(result.get("id") or position, {})
            region |= {**result, "value": {**region.get("value", {}), **result.get("value", result)}}
        outlines: list[Outline] = []
        size: Size | None = None
        for region in regions.values():
            here = size_of({"height": region.get("original_height"), "width": region.get("original_width")})
            if here is None:
                continue  # a choice or a text about the whole image
            size = here
            outlines += label_studio_region(found, path, size, region)
        found.pictures.append(Picture(path, size, tuple(outlines)))


def label_studio_region(found: Annotations, path: str, size: Size, region: Mapping[str, Any]) -> list[Outline]:
    """Turn one region of Label Studio, whose units are percent, into an outline; note what has no outline."""
    value = region["value"]
    labels = [label for key, value in value.items() if key.endswith("labels") and value for label in value]
    if region.get("image_rotation"):
        raise UserError(f"{found.file} has annotations on a turned view of {path}: turn the image file itself")
    x, y = size[1] / 100, size[0] / 100  # pixels of one percent
    segmentation: Any = None
    if "points" in value:
        segmentation = [flat((px * x, py * y) for px, py in value["points"])]
    elif "rle" in value:
        segmentation = encode(unpack_brush(value["rle"], size), 0, 0, size)
    elif "radiusX" in value:
        outline = ellipse(value["x"] * x, value["y"] * y, value["radiusX"] * x, value["radiusY"] * y)
        segmentation = [turned(outline, (value["x"] * x, value["y"] * y), value.get("rotation", 0))]
    elif {"x", "y", "width", "height"} <= value.keys() and "keypointlabels" not in value:
        left, top = value["x"] * x, value["y"] * y
        corners = box(left, top, left + value["width"] * x, top + value["height"] * y)
        segmentation = [turned(corners, (left, top), value.get("rotation", 0))]
    if segmentation is None:
        return found.leave_out(f"regions of the type {region.get('type', 'unknown')}", path)
    if not labels:
        return found.leave_out("regions without a label", path)
    if len(labels) > 1:
        found.leave_out("further labels of the same region", path)
    return found.outline(path, size, labels[0], segmentation)


def label_studio_path(data: Mapping[str, Any]) -> str:
    """Return the path or address of a task's image: the field ``image``, or else the first that looks like one."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    likely = [value for value in texts.values() if re.search(r"\.\w{3,4}($|\?)", value)]
    likely += [value for value in texts.values() if "/" in value]
    if "image" in texts:
        return texts["image"]
    if not likely:
        raise ValueError("a task without a path of an image")
    return likely[0]


def label_studio_min(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the regions of a task in JSON-MIN, where they stand in the task under the names of their tags."""
    lists = [value for value in task.values() if isinstance(value, list)]
    return [part for value in lists for part in value if isinstance(part, dict) and "original_width" in part]


def unpack_brush(data: Sequence[int], size: Size) -> np.ndarray:
    """Unpack a brush stroke of Label Studio, which thi.ng/rle-pack wrote.

    A stream of bits: the number of values (32), the bits of a value less 1 (5), the bits of each of four lengths less 1
    (4 each); then runs. A run is: whether one value is repeated (1), which of the four lengths follows (2), the run's
    length less 1, and the value once or each value. The values are RGBA; opaque pixels belong to the object.

    Returns:
        bool ``(H, W)``.
    """
    height, width = size
    bits = np.unpackbits(np.array(data, np.uint8))
    text, place = (bits + ord("0")).tobytes().decode(), 0

    def number(length: int) -> int:
        nonlocal place
        place += length
        return int(text[place - length : place], 2)

    total, word = number(32), number(5) + 1
    lengths = [number(4) + 1 for _ in range(4)]
    if total != height * width * 4:
        raise ValueError(f"a brush stroke of {total} values for {width} x {height} pixels")
    values, done = np.zeros(total, np.int64), 0
    while done < total:
        repeated, length = number(1), number(lengths[number(2)]) + 1
        if repeated:
            values[done : done + length] = number(word)
        else:
            literal = bits[place : place + length * word].reshape(length, word)
            values[done : done + length] = (literal @ (1 << np.arange(word)[::-1]))[: total - done]
            place += length * word
        done += length
    return values.reshape(height, width, 4)[..., 3] >= 128


def read_via(content: Any, found: Annotations) -> None:
    """Read the JSON of VGG Image Annotator 2: polygons, rectangles, circles and ellipses."""
    entries = [*content.get("_via_img_metadata", content).values()]
    regions = [(entry, region) for entry in entries for region in listed_regions(entry)]
    keys = dict.fromkeys(key for _, region in regions for key in region["region_attributes"])
    likely = [key for key in keys if key.lower() in ("class", "label", "category", "name", "type", "object")]
    if len(keys) > 1 and len(likely) != 1:
        raise UserError(
            f"{found.file} gives regions the attributes {', '.join(keys)}: call the one that names the class 'class'"
        )
    key = (likely or [*keys] or [""])[0]
    for entry in entries:
        path, outlines = str(entry["filename"]), []
        for region in listed_regions(entry):
            label = region["region_attributes"].get(key, "" if keys else "object")
            if isinstance(label, dict):  # check boxes
                label = next((name for name, ticked in label.items() if ticked), "")
            segmentation = via_shape(region["shape_attributes"])
            if segmentation is None:
                found.leave_out(f"regions of the type {region['shape_attributes'].get('name')}", path)
            elif not label:
                found.leave_out("regions without a label", path)
            else:
                outlines += found.outline(path, None, label, segmentation)
        found.pictures.append(Picture(path, None, tuple(outlines)))


def listed_regions(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the regions of an image, which version 1 of VGG Image Annotator numbers and version 2 lists."""
    regions = entry["regions"]
    return [*regions.values()] if isinstance(regions, dict) else regions


def via_shape(shape: Mapping[str, Any]) -> list[list[float]] | None:
    """Turn a shape of VGG Image Annotator into polygons; None for points and lines."""
    kind = shape.get("name")
    if kind == "polygon":
        return [flat(zip(shape["all_points_x"], shape["all_points_y"], strict=True))]
    if kind == "rect":
        return [box(shape["x"], shape["y"], shape["x"] + shape["width"], shape["y"] + shape["height"])]
    if kind == "circle":
        return [ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"])]
    if kind == "ellipse":
        outline = ellipse(shape["cx"], shape["cy"], shape["rx"], shape["ry"])
        return [turned(outline, (shape["cx"], shape["cy"]), math.degrees(shape.get("theta", 0)))]
    return None


# Shapes, as polygons (x, y, x, y, ...) in pixels


def flat(points: Iterable[Sequence[float]]) -> list[float]:
    """Turn points (x, y) into one list of coordinates."""
    return [float(part) for x, y in points for part in (x, y)]


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    """Return a rectangle as a polygon."""
    return flat([(left, top), (right, top), (right, bottom), (left, bottom)])


def ellipse(x: float, y: float, radius_x: float, radius_y: float, corners: int = 180) -> list[float]:
    """Return an ellipse as a polygon of many corners."""
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return flat((x + radius_x * math.cos(angle), y + radius_y * math.sin(angle)) for angle in angles)


def turned(polygon: Sequence[float], centre: tuple[float, float], degrees: float) -> list[float]:
    """Turn a polygon clockwise, as seen on the screen, about a point."""
    if not degrees:
        return list(polygon)
    (x, y), cos, sin = centre, math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    points = [(px - x, py - y) for px, py in zip(polygon[0::2], polygon[1::2], strict=True)]
    return flat((x + px * cos - py * sin, y + px * sin + py * cos) for px, py in points)


def shoelace(polygon: Sequence[float]) -> float:
    """Return the area of a polygon."""
    xs, ys = np.array(polygon[0::2], float), np.array(polygon[1::2], float)
    return float(abs(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1)) / 2)


def encode(inside: np.ndarray, left: int, top: int, size: Size) -> dict[str, Any]:
    """Place a mask into an image, clip it there, and return COCO's run-length code.

    Args:
        inside: bool ``(h, w)``.
        left: column of the mask's first pixel.
        top: row of the mask's first pixel.
        size: height and width of the image.
    """
    from pycocotools import mask as rle  # only run-length codes need it

    whole = np.zeros(size, np.uint8, order="F")
    rows = slice(max(top, 0), max(min(top + inside.shape[0], size[0]), 0))
    columns = slice(max(left, 0), max(min(left + inside.shape[1], size[1]), 0))
    part = whole[rows, columns]
    part[:] = inside[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]]
    code = rle.encode(whole)
    return {"size": list(size), "counts": code["counts"].decode()}


def unpack_counts(text: str) -> list[int]:
    """Unpack COCO's compressed runs: five bits a character from 48 on, low bits first, less the run two before.

    Raises:
        ValueError: if the text ends within a run.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the last character of a run; its highest bit is the sign
            value -= (code & 16) << shift - 4 if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("a run-length code that ends within a run")
    return runs


def size_of(entry: Mapping[str, Any]) -> Size | None:
    """Return height and width as stated, or None where one is missing."""
    height, width = entry.get("height"), entry.get("width")
    return (int(height), int(width)) if height and width else None


def color_of(value: Any) -> Color | None:
    """Return a colour that a tool states, ``#rrggbb`` or three numbers; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    if isinstance(value, list) and len(value) == 3 and all(isinstance(part, int) and 0 <= part < 256 for part in value):
        return value[0], value[1], value[2]
    return None
