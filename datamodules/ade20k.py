"""ADE20K, the scene parsing benchmark of 2016. B. Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017."""

from typing import Any

from .base import SegmentationDataModule, voc_palette
from .decode import Sample
from .download import Archive
from .files import folder_of, pair
from .transforms import IGNORE

CLASSES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""


class ADE20K(SegmentationDataModule):
    """Indoor and outdoor scenes of all sizes in 150 classes; the stored value 0, "other", is ignored.

    Layout, as ``ADEChallengeData2016.zip`` unpacks::

        ADEChallengeData2016/images/{training,validation}/ADE_train_00000001.jpg
        ADEChallengeData2016/annotations/{training,validation}/ADE_train_00000001.png

    Get it: `download` fetches it. It takes about 1 GB, and 1 GB more while it is unpacked.

    Args:
        root: folder that holds ``ADEChallengeData2016/``.
        **kwargs: arguments of `SegmentationDataModule`; `test_split` is ``val``, as the test labels are not public.
    """

    class_names = tuple(" ".join(name.split()) for name in CLASSES.split(","))
    palette = voc_palette(151)[1:]
    label_map = {0: IGNORE} | {label + 1: label for label in range(150)}
    source = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
    licence = "labels and code BSD 3-clause; the photographs for research"
    citation = "Zhou et al., CVPR 2017"
    disk = "about 1 GB, and 1 GB more while it is unpacked"
    archives = (Archive(source, "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"),)
    expected_counts = {"train": 20210, "val": 2000}

    def __init__(self, root: str | None = None, test_split: str = "val", **kwargs: Any) -> None:
        super().__init__(root, test_split=test_split, **kwargs)

    def samples(self, split: str) -> list[Sample]:
        """Pair the images and annotations of a split.

        Raises:
            UserError: if a folder is missing.
        """
        base = folder_of(self.root, f"ADEChallengeData2016/ ({self.source})") / "ADEChallengeData2016"
        folder = {"train": "training", "val": "validation"}.get(split, split)
        return pair(base / "images" / folder, base / "annotations" / folder)
