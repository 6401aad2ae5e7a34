"""Labels as polygons along the edges of the pixels: exact, with holes, and without gaps between neighbours."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .geotiff import Place

Ring = list[tuple[float, float]]  # corners (x, y), the first of which is not repeated
WGS84 = 4326  # degrees of longitude and latitude, which GeoJSON takes for granted


def geojson(labels: np.ndarray, class_names: Sequence[str], place: Place | None = None, **about: Any) -> dict[str, Any]:
    """Return the regions of a label map as a ``FeatureCollection``, one ``Polygon`` per connected region.

    Coordinates are those of the map, in the reference system that ``crs`` names, or, without a place, corners of
    pixels: x to the right and y down from the image's upper left corner.

    Args:
        labels: ``(H, W)``.
        class_names: one name per label.
        place: where the image lies on a map.
        **about: further members, such as the image's name.
    """
    features = []
    for label in np.unique(labels).tolist():
        for rings in regions(labels == label):
            placed = [ring if place is None else place.points(ring) for ring in rings]
            turned = [closed(ring, outer=i == 0) for i, ring in enumerate(placed)]
            pixels = round(sum(map(area, rings)))
            properties = {"label": label, "class": class_names[label], "pixels": pixels}
            shape = {"type": "Polygon", "coordinates": turned}
            features.append({"type": "Feature", "properties": properties, "geometry": shape})
    crs: dict[str, Any] = {}
    if place is not None and place.epsg not in (None, WGS84):
        crs = {"crs": {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{place.epsg}"}}}
    return {"type": "FeatureCollection", **about, **crs, "features": features}


def regions(mask: np.ndarray) -> Iterator[list[Ring]]:
    """Yield the outlines of each region of a mask, its border first and then its holes.

    Pixels that touch at a corner alone belong to two regions. An outline visits no point twice, so the polygons are
    valid wherever they are read; a hole may touch the border at a corner.

    Args:
        mask: bool ``(H, W)``.

    Yields:
        rings; the region lies on the right of a walker, as the picture is seen.
    """
    from scipy import ndimage  # takes time to import

    found: dict[int, list[Ring]] = {}
    for region, ring in rings_of(ndimage.label(mask)[0]):
        found.setdefault(region, []).append(ring)
    for region in sorted(found):
        yield sorted(found[region], key=area, reverse=True)  # holes have negative areas


def rings_of(number: np.ndarray) -> Iterator[tuple[int, Ring]]:
    """Yield all outlines of regions that are numbered from 1, int ``(H, W)``, each with the number of its region."""
    height, width = number.shape
    wide = width + 1  # corners in a row
    padded = np.pad(number > 0, 1)
    inner = padded[1:-1, 1:-1]
    starts, ends, owners = [], [], []
    # the edges of a pixel clockwise: the neighbour beyond it, its first and its last corner
    for (dy, dx), (y0, x0), (y1, x1) in (
        ((-1, 0), (0, 0), (0, 1)),
        ((0, 1), (0, 1), (1, 1)),
        ((1, 0), (1, 1), (1, 0)),
        ((0, -1), (1, 0), (0, 0)),
    ):
        y, x = np.nonzero(inner & ~padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width])
        starts.append((y + y0) * wide + x + x0)
        ends.append((y + y1) * wide + x + x1)
        owners.append(y * width + x)
    start, end, owner = map(np.concatenate, (starts, ends, owners))
    order = np.argsort(start, kind="stable")
    start, end, owner = start[order], end[order], owner[order]
    following = np.searchsorted(start, end)  # the edge that leaves where this one ends
    second = np.minimum(following + 1, len(start) - 1)
    fork = (start[second] == end) & (owner[following] != owner)  # two pixels touch at a corner: stay with this one
    following = np.where(fork & (owner[second] == owner), second, following)
    corner, then, region = start.tolist(), following.tolist(), number.ravel()[owner].tolist()
    seen = bytearray(len(corner))
    for first in range(len(corner)):
        if seen[first]:
            continue
        path, edge = [], first
        while not seen[edge]:
            seen[edge] = 1
            path.append(corner[edge])
            edge = then[edge]
        for loop in simple(path):
            around = zip(loop[-1:] + loop[:-1], loop, loop[1:] + loop[:1], strict=True)
            turns = [point for before, point, after in around if point - before != after - point]
            yield region[first], [(point % wide, point // wide) for point in turns]


def simple(path: list[int]) -> Iterator[list[int]]:
    """Cut a closed path into loops that visit no point twice."""
    if len(set(path)) == len(path):
        yield path
        return
    place: dict[int, int] = {}
    kept: list[int] = []
    for point in path:
        if point in place:  # the loop since the last visit is one of its own
            at = place[point]
            yield kept[at:]
            for gone in kept[at + 1 :]:
                del place[gone]
            del kept[at + 1 :]
        else:
            place[point] = len(kept)
            kept.append(point)
    yield kept


def area(ring: Ring) -> float:
    """Return the signed area of a ring: positive where x turns towards y."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True)) / 2


def closed(ring: Ring, outer: bool) -> Ring:
    """Turn a ring as GeoJSON asks, borders counterclockwise and holes clockwise, and repeat its first point."""
    ring = ring if (area(ring) > 0) == outer else ring[::-1]
    return ring + ring[:1]
