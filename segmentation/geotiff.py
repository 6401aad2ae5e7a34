"""The tags that place a TIFF on a map: how to copy them, and the map's coordinates of a pixel.

The format: OGC GeoTIFF standard 19-008r4, https://docs.ogc.org/is/19-008r4/19-008r4.html
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALE, TIE_POINTS, TRANSFORMATION, KEYS = 33550, 33922, 34264, 34735
TAGS = (SCALE, TIE_POINTS, TRANSFORMATION, KEYS, 34736, 34737)  # the last two hold values of keys
RASTER_TYPE, GEOGRAPHIC, PROJECTED = 1025, 2048, 3072  # keys
IS_POINT, USER_DEFINED = 2, 32767  # values


@dataclass(frozen=True)
class Place:
    """Where the pixels of an image lie on a map.

    Args:
        matrix: ``((a, b, c), (d, e, f))``; the corner (column, row) of a pixel, counted from the image's upper left
            corner, lies at (a column + b row + c, d column + e row + f).
        epsg: number of the map's reference system; None if it has none.
    """

    matrix: tuple[tuple[float, float, float], tuple[float, float, float]]
    epsg: int | None

    def points(self, corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Convert corners of pixels (column, row) to the map."""
        (a, b, c), (d, e, f) = self.matrix
        return [(a * column + b * row + c, d * column + e * row + f) for column, row in corners]


def tags_of(page: Any) -> list[tuple]:
    """Return the tags of a page of tifffile that place it, as `extratags` for the file that gets them."""
    tags = (page.tags.get(code) for code in TAGS)
    return [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags if tag is not None]


def read(path: Path | None) -> tuple[Place | None, list[tuple]]:
    """Return where an image lies on a map, and the tags that say it; None and no tags for all other files."""
    if path is None or path.suffix.lower() not in (".tif", ".tiff"):
        return None, []
    import tifffile  # takes time to import, and only TIFFs need it

    try:
        with tifffile.TiffFile(path) as file:
            page = file.series[0].keyframe
            return place_of({tag[0]: tag[3] for tag in tags_of(page)}), tags_of(page)
    except (tifffile.TiffFileError, ValueError, IndexError):
        return None, []  # another library could read the image


def place_of(tags: dict[int, Any]) -> Place | None:
    """Return what the values of the tags say; None without a scale or a matrix, as with ground control points."""
    keys = {tags[KEYS][i]: tags[KEYS][i + 3] for i in range(4, len(tags.get(KEYS, ())) - 3, 4)}
    if len(tags.get(TRANSFORMATION, ())) == 16:
        m = tags[TRANSFORMATION]
        (a, b, c), (d, e, f) = (m[0], m[1], m[3]), (m[4], m[5], m[7])
    elif len(tags.get(SCALE, ())) >= 2 and len(tags.get(TIE_POINTS, ())) >= 6:
        (a, down), (column, row, _, x, y) = tags[SCALE][:2], tags[TIE_POINTS][:5]
        b, d, e = 0.0, 0.0, -down
        c, f = x - column * a, y + row * down
    else:
        return None
    if keys.get(RASTER_TYPE) == IS_POINT:  # then (0, 0) is the middle of the first pixel
        c, f = c - (a + b) / 2, f - (d + e) / 2
    number = keys.get(PROJECTED, keys.get(GEOGRAPHIC, USER_DEFINED))
    return Place(((a, b, c), (d, e, f)), None if number in (0, USER_DEFINED) else int(number))
