"""Every public data set, read from a tree that is drawn in its owner's layout; nothing is downloaded."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pycocotools import mask as rle
from trees import (
    HEIGHT,
    WIDTH,
    draw_ade20k,
    draw_camvid,
    draw_cityscapes,
    draw_isbi_em,
    draw_voc,
    draw_wildfire,
    em_slices,
    labels,
    picture,
    save,
    wildfire_patch,
)

from datamodules import (
    ADE20K,
    COCO,
    ISBIEM,
    VOC,
    CamVid,
    Cityscapes,
    Folder,
    OxfordPets,
    Recycling,
    SyntheticCells,
    SyntheticScenes,
    Wildfire,
)
from datamodules.base import SegmentationDataModule
from datamodules.coco import CLASSES, VOC_CLASSES
from datamodules.errors import UserError


def read(data: SegmentationDataModule, split: str, index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Read an image and its labels from a split."""
    data.setup("fit" if split == "train" else "validate")
    return data.datasets[split].read(index)


@pytest.mark.parametrize(
    "cls",
    [ADE20K, COCO, ISBIEM, VOC, CamVid, Cityscapes, OxfordPets, Recycling, SyntheticCells, SyntheticScenes, Wildfire],
)
def test_facts_are_stated(cls):
    data = cls() if cls in (SyntheticCells, SyntheticScenes) else cls(root="/nowhere")
    assert len(data.class_names) == len(data.palette) == data.num_classes >= 2
    assert len(set(data.class_names)) == len(set(map(tuple, data.palette))) == data.num_classes
    assert data.source and data.licence
    if data.root is not None:
        assert data.disk and data.citation
        with pytest.raises(UserError, match="/nowhere does not exist: it should hold"):
            data.samples("train")
        with pytest.raises(ValueError, match="root is not set"):
            cls().samples("train")


def test_stated_mean_and_std_differ_from_the_default():
    assert ISBIEM().stated_mean_std == ((0.4908,), (0.1708,))
    assert VOC().stated_mean_std is None and Wildfire().stated_mean_std is None  # ImageNet's, and unknown


# PASCAL VOC


def test_voc_train_and_val(tmp_path):
    draw_voc(tmp_path)
    data = VOC(tmp_path, train_split="train", batch_size=1)
    image, mask = read(data, "train")
    assert image.shape == (3, HEIGHT, WIDTH) and set(mask.unique().tolist()) == {0, 15, 20, 255}
    assert [s.name for s in data.samples("train")] == ["2007_000032", "2007_000039"]
    assert [s.name for s in data.samples("val")] == ["2007_000033"]
    assert data.expected_counts == {"train": 1464, "val": 1449} and VOC().expected_counts["train"] == 10582


def test_voc_trainaug_from_masks_of_sbd(tmp_path):
    """The split holds all images of VOC's train and of SBD's two lists, without VOC's val."""
    from scipy.io import savemat

    draw_voc(tmp_path)
    sbd = tmp_path / "benchmark_RELEASE/dataset"
    (sbd / "cls").mkdir(parents=True)
    for split, names in {"train": ["2008_000008", "2007_000033"], "val": ["2007_000032", "2008_000015"]}.items():
        (sbd / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            save(sbd / f"img/{name}.jpg", picture(2))
            savemat(sbd / f"cls/{name}.mat", {"GTcls": {"Segmentation": labels(2, [0, 4]), "Boundaries": 0}})
    data = VOC(tmp_path, batch_size=1)
    assert [s.name for s in data.samples("train")] == ["2007_000032", "2007_000039", "2008_000008", "2008_000015"]
    _, mask = read(data, "train", 2)
    assert mask.tolist() == labels(2, [0, 4]).tolist()


def test_voc_trainaug_from_a_folder_with_or_without_its_list(tmp_path):
    draw_voc(tmp_path)
    base = tmp_path / "VOCdevkit/VOC2012"
    with pytest.raises(UserError, match=r"trainaug needs .*SegmentationClassAug or .*benchmark_RELEASE"):
        VOC(tmp_path).samples("train")
    for name in ("2007_000032", "2007_000033", "2008_000002"):
        save(base / f"SegmentationClassAug/{name}.png", labels(3, [0, 1]))
    assert [s.name for s in VOC(tmp_path).samples("train")] == ["2007_000032", "2008_000002"]
    line = "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png"
    (base / "ImageSets/Segmentation/trainaug.txt").write_text(f"{line}\n2007_000032\n")
    assert [s.name for s in VOC(tmp_path).samples("train")] == ["2008_000002", "2007_000032"]


# Cityscapes


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    draw_cityscapes(tmp_path)
    data = Cityscapes(tmp_path, labels=kind, batch_size=1)
    image, mask = read(data, "train")
    assert image.shape == (3, HEIGHT, WIDTH) and set(mask.unique().tolist()) == {*range(19), 255}
    assert data.samples("train")[0].name == "aachen/aachen_000000_000019"
    if kind == "labelIds":  # label ids of the owner's table: 7 road, 26 car, 33 bicycle, 3 out of roi, 14 guard rail
        stored = torch.from_numpy(labels(0, [*range(34), 255]))
        assert [mask[stored == i].unique().tolist() for i in (7, 26, 33, 3, 14)] == [[0], [13], [18], [255], [255]]


def test_cityscapes_coarse(tmp_path):
    save(tmp_path / "leftImg8bit/train_extra/bonn/bonn_1_leftImg8bit.png", picture(1))
    save(tmp_path / "gtCoarse/train_extra/bonn/bonn_1_gtCoarse_labelIds.png", labels(1, [7, 0]))
    (sample,) = Cityscapes(tmp_path, coarse=True).samples("train")
    assert sample.missing() is None and Cityscapes(coarse=True).expected_counts["train"] == 19998


# ADE20K


def test_ade20k(tmp_path):
    draw_ade20k(tmp_path)
    data = ADE20K(tmp_path, batch_size=1)
    _, mask = read(data, "train")
    assert set(mask.unique().tolist()) == {255, 0, 149} and len(data.class_names) == 150
    assert (data.class_names[0], data.class_names[12], data.class_names[149]) == ("wall", "person", "flag")


# Oxford Pets


def test_oxford_pets_as_torchvision_reads_it(tmp_path):
    from torchvision.datasets import OxfordIIITPet

    base = tmp_path / "oxford-iiit-pet"
    names = [f"Abyssinian_{i}" for i in range(12)]
    for name in names:
        save(base / f"images/{name}.jpg", picture(1))
        save(base / f"annotations/trimaps/{name}.png", labels(1, [1, 2, 3]))
    (base / "annotations/trainval.txt").write_text("".join(f"{name} 1 1 1\n" for name in names[:10]))
    (base / "annotations/test.txt").write_text("".join(f"{name} 1 1 1\n" for name in names[10:]))
    data = OxfordPets(tmp_path, batch_size=1)
    split = {name: [s.name for s in data.samples(name)] for name in ("train", "val", "test")}
    assert [len(split[name]) for name in ("train", "val", "test")] == [9, 1, 2]
    assert sorted(split["train"] + split["val"]) == sorted(names[:10])
    theirs = OxfordIIITPet(tmp_path, "test", "segmentation")
    data.setup("test")
    for i, (image, trimap) in enumerate(theirs):
        ours, mask = data.datasets["test"].read(i)
        assert np.array_equal(ours.permute(1, 2, 0), image)
        assert np.array_equal(mask, np.array([0, 1, 0, 2])[np.array(trimap)])  # 1 pet, 2 background, 3 border
    _, mask = read(OxfordPets(tmp_path, ignore_border=True, batch_size=1), "train")
    assert set(mask.unique().tolist()) == {0, 1, 255}


# CamVid


def test_camvid_of_segnet_and_in_two_folders_gives_the_same_pairs(tmp_path):
    counts = {"train": 3, "val": 2}
    draw_camvid(tmp_path / "segnet", counts | {"test": 2}, segnet=True)
    draw_camvid(tmp_path / "folders", counts)
    segnet, folders = (CamVid(tmp_path / name, batch_size=1) for name in ("segnet", "folders"))
    segnet.setup("fit"), folders.setup("fit")
    for split, count in counts.items():
        assert [s.name for s in segnet.samples(split)] == [s.name for s in folders.samples(split)]
        assert len(folders.datasets[split]) == count
        for i in range(count):
            (image, mask), (expected, truth) = folders.datasets[split].read(i), segnet.datasets[split].read(i)
            assert torch.equal(image, expected) and torch.equal(mask, truth)
            assert set(mask.unique().tolist()) == {*range(11), 255}
    segnet.setup("test")
    assert len(segnet.datasets["test"]) == 2


def test_camvid_without_test_frames_tests_on_val_or_names_the_folder(tmp_path):
    draw_camvid(tmp_path, {"train": 1, "val": 2})
    data = CamVid(tmp_path, test_split="val")
    data.setup("test")
    assert len(data.datasets["test"]) == 2
    with pytest.raises(UserError, match=r"images/test does not exist"):
        CamVid(tmp_path).setup("test")


# ISBI EM


def test_isbi_em_as_stacks_and_as_folders(tmp_path):
    draw_isbi_em(tmp_path / "stacks")
    volume, masks = em_slices(30)
    for i in range(30):
        for folder, kind in (("png/images", volume), ("png/masks", masks), ("keras/train/image", volume)):
            save(tmp_path / folder / f"{i}.png", kind[i])
        save(tmp_path / f"keras/train/label/{i}.png", masks[i])
    for root in ("stacks", "png", "keras"):
        data = ISBIEM(tmp_path / root, batch_size=2)
        data.setup("fit")
        assert (len(data.datasets["train"]), len(data.datasets["val"]), data.in_channels) == (26, 4, 1)
        for role, index, page in (("train", 10, 10), ("val", 3, 29)):
            image, mask = data.datasets[role].read(index)
            assert np.array_equal(image[0], volume[page]) and np.array_equal(mask * 255, masks[page])
    assert next(iter(data.val_dataloader()))["image"].shape == (1, 1, 32, 32)
    with pytest.raises(UserError, match=r"held_out must be at least 1.*got 0"):
        ISBIEM(tmp_path / "stacks", held_out=0)


# Wildfire


@pytest.mark.parametrize("nested", ["", "/train_{}"])
def test_wildfire_of_the_challenge(tmp_path, nested):
    draw_wildfire(tmp_path, nested=nested)
    data = Wildfire(tmp_path, batch_size=2, crop_size=64, scale_range=(0.8, 1.2), num_workers=0)
    data.setup("fit")
    assert (len(data.datasets["train"]), len(data.datasets["val"]), data.in_channels) == (8, 1, 3)
    number = int(data.datasets["train"].samples[0].name)
    image, mask = data.datasets["train"].read(0)
    assert image.dtype == torch.uint16
    assert np.array_equal(image, wildfire_patch(number)[..., [6, 5, 1]].transpose(2, 0, 1))  # bands 7, 6, 2
    assert np.array_equal(mask, wildfire_patch(number)[..., 0] > 40000)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.uint16 and batch["image"].shape == (2, 3, 64, 64)


def test_wildfire_of_activefire_keeps_scenes_together(tmp_path):
    for scene in range(20):
        for i in range(3):
            stem = f"LC08_L1TP_124046_202008{scene:02d}_20200810_01_RT"
            save(tmp_path / f"images/patches/{stem}_p{i:05d}.tif", np.zeros((4, 4, 10), np.uint16))
            for algorithm in ("Murphy", "Voting"):
                save(tmp_path / f"masks/patches/{stem}_{algorithm}_p{i:05d}.tif", np.zeros((4, 4), np.uint8))
    data = Wildfire(tmp_path, val_fraction=0.2, test_fraction=0.1)
    names = {split: [s.name for s in data.samples(split)] for split in ("train", "val", "test")}
    assert [len(names[split]) for split in names] == [42, 12, 6]
    scenes = {split: {name.rpartition("_")[0] for name in names[split]} for split in names}
    assert not scenes["train"] & scenes["val"] and not scenes["train"] & scenes["test"]
    assert all(s.missing() is None for split in names for s in data.samples(split))
    assert all("Murphy" in s.mask.name for s in Wildfire(tmp_path, algorithm="Murphy").samples("val"))


# COCO and its format


def annotations(things: list[dict], names: dict[str, int], files: list[str]) -> str:
    images = [{"id": 100 + i, "file_name": f, "height": HEIGHT, "width": WIDTH} for i, f in enumerate(files)]
    categories = [{"id": number, "name": name} for name, number in names.items()]
    things = [{"id": i, "iscrowd": 0, **thing} for i, thing in enumerate(things)]
    return json.dumps({"images": images, "annotations": things, "categories": categories})


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[top:bottom, left:right] = True
    return inside


def as_polygon(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def as_counts(*box):
    flat = rectangle(*box).flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    return {
        "size": [HEIGHT, WIDTH],
        "counts": np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()[: len(edges) + 1],
    }


def as_text(*box):
    code = rle.encode(np.asfortranarray(rectangle(*box).astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def draw_coco(root: Path) -> None:
    ids = {name: 10 + i for i, name in enumerate(CLASSES)}  # any numbers
    big, small = (2, 2, 38, 48), (10, 10, 20, 20)

    def thing(image, name, box, form):
        area = (box[2] - box[0]) * (box[3] - box[1])
        return {"image_id": image, "category_id": ids[name], "area": area, "segmentation": form(*box)}

    things = [
        thing(100, "person", big, as_polygon), thing(100, "dog", small, as_counts),
        thing(101, "cat", (0, 0, 5, 5), as_polygon),  # 25 px: nearly empty
        thing(102, "zebra", big, as_text),
    ]  # fmt: skip
    for split in ("train", "val"):
        (root / "annotations").mkdir(exist_ok=True, parents=True)
        files = [f"{i:012d}.jpg" for i in range(4)]
        (root / f"annotations/instances_{split}2017.json").write_text(annotations(things, ids, files))
        for i, file in enumerate(files):
            save(root / f"{split}2017/{file}", picture(i))


@pytest.mark.parametrize("form", [as_polygon, as_counts, as_text])
def test_coco_draws_all_forms_alike(form):
    from datamodules.polygons import draw

    box = (3, 4, 20, 31)
    assert np.array_equal(draw(form(*box), HEIGHT, WIDTH), rectangle(*box))
    assert not draw([[1, 2, 3, 4]], HEIGHT, WIDTH).any()


def test_coco_as_torchvision_makes_voc_of_it(tmp_path):
    """Background is 0, classes are in VOC's order, two objects give 255, nearly empty images are not trained on."""
    draw_coco(tmp_path)
    data = COCO(tmp_path, batch_size=1)
    assert [s.name for s in data.samples("train")] == ["000000000000"] and len(data.samples("val")) == 4
    _, mask = read(data, "train")
    expected = np.where(rectangle(2, 2, 38, 48), 15, 0)
    expected[rectangle(10, 10, 20, 20)] = 255
    assert np.array_equal(mask, expected)
    assert VOC.class_names[15] == "person" and VOC_CLASSES[14] == "person" and VOC_CLASSES[11] == "dog"


def test_coco_all_or_any_list_puts_the_smaller_on_top(tmp_path):
    draw_coco(tmp_path)
    data = COCO(tmp_path, classes="all", batch_size=1)
    assert data.num_classes == 81
    _, mask = read(data, "train")
    expected = np.where(rectangle(2, 2, 38, 48), 1, 0)
    expected[rectangle(10, 10, 20, 20)] = 1 + CLASSES.index("dog")
    assert np.array_equal(mask, expected)
    data = COCO(tmp_path, classes=["zebra"], batch_size=1)
    _, mask = read(data, "train")
    assert len(data.datasets["train"]) == 1 and np.array_equal(mask, rectangle(2, 2, 38, 48))
    with pytest.raises(ValueError, match="no class 'unicorn'"):
        COCO(tmp_path, classes=["unicorn"])
    (tmp_path / "annotations/instances_val2017.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"instances_val2017.json cannot be read as annotations"):
        data.samples("val")


def test_coco_pictures_annotated_as_stored_or_as_turned(tmp_path):
    draw_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for split, stored in (("train", picture(0)), ("val", np.rot90(picture(0)).copy())):
        Image.fromarray(stored).save(tmp_path / f"{split}2017/000000000000.jpg", exif=exif, quality=100)
        image, mask = read(COCO(tmp_path, batch_size=1), split)
        assert image.shape[1:] == mask.shape == (HEIGHT, WIDTH)


def test_recycling_in_batches_and_taco_in_one_file(tmp_path):
    names = {name: i for i, name in enumerate(Recycling().class_names[1:], start=1)}
    big, small = (2, 2, 38, 48), (10, 10, 20, 20)
    things = [
        {"image_id": 100, "category_id": names["Battery"], "area": 100, "segmentation": as_polygon(*small)},
        {"image_id": 100, "category_id": names["Paper"], "area": 1656, "segmentation": as_polygon(*big)},
    ]
    challenge, taco = tmp_path / "challenge", tmp_path / "taco"
    challenge.mkdir(), taco.mkdir()
    for split in ("train", "val"):
        (challenge / f"{split}.json").write_text(annotations(things, names, ["batch_01_vt/0002.jpg"]))
    save(challenge / "batch_01_vt/0002.jpg", picture(1))
    data = Recycling(challenge, batch_size=1)
    _, mask = read(data, "train")
    expected = np.where(rectangle(*big), names["Paper"], 0)
    expected[rectangle(*small)] = names["Battery"]
    assert data.num_classes == 11 and np.array_equal(mask, expected)

    things = [thing | {"category_id": 7} for thing in things]
    files = [f"batch_{i % 2 + 1}/{i:06d}.JPG" for i in range(10)]
    (taco / "annotations.json").write_text(annotations(things, {"Clear plastic bottle": 7, "Cigarette": 8}, files))
    data = Recycling(taco, classes=["Clear plastic bottle"])
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [8, 1, 1]
    assert data.class_names == ("background", "Clear plastic bottle")
    with pytest.raises(ValueError, match="no category 'General trash' among Clear plastic bottle"):
        Recycling(taco).samples("train")


# Folder


def test_folder_pairs_by_suffix_in_one_folder(tmp_path):
    for i in range(10):
        save(tmp_path / f"all/{i}_sat.jpg", picture(i))
        save(tmp_path / f"all/{i}_mask.png", labels(i, [0, 1]))
    data = Folder(tmp_path, ["a", "b"], image_dir="all", mask_dir="all", image_suffix="_sat", mask_suffix="_mask")
    assert len(data.samples("train")) == 8 and all(s.missing() is None for s in data.samples("train"))
    for i in range(10):
        (tmp_path / f"all/{i}_sat.jpg").rename(tmp_path / f"all/{i}.jpg")
    data = Folder(tmp_path, ["a", "b"], image_dir="all", mask_dir="all", mask_suffix="_mask")
    assert len(data.samples("train")) == 8 and all(s.missing() is None for s in data.samples("train"))
    with pytest.raises(ValueError, match=r"tell them apart by data.mask_suffix"):
        Folder(tmp_path, ["a", "b"], image_dir="all", mask_dir="all")


def test_folder_pairs_by_a_list_of_two_columns(tmp_path):
    save(tmp_path / "photos/x.jpg", picture(1))
    save(tmp_path / "truth/other.png", labels(1, [0, 1]))
    (tmp_path / "train.txt").write_text("photos/x.jpg truth/other.png\n")
    (tmp_path / "val.txt").write_text("photos/x.jpg,truth/none.png\n")
    data = Folder(tmp_path, ["a", "b"], batch_size=1)
    (sample,) = data.samples("train")
    assert sample.missing() is None and sample.read()[1].tolist() == labels(1, [0, 1]).tolist()
    assert "truth/none.png" in data.samples("val")[0].missing()


COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 64)]


@pytest.fixture
def colored(tmp_path):
    for i in range(5):
        save(tmp_path / f"images/{i}.jpg", picture(i))
        save(tmp_path / f"masks/{i}.png", np.array(COLORS, np.uint8)[labels(i, [0, 1, 2])])
    return tmp_path


def mask_of(data: Folder) -> tuple[np.ndarray, np.ndarray]:
    data.setup("fit")
    sample = data.datasets["train"].samples[0]
    return data.datasets["train"].read(0)[1].numpy(), labels(int(sample.name), [0, 1, 2])


def test_folder_takes_the_colours_found_as_classes(colored):
    data = Folder(colored, batch_size=1)
    mask, stored = mask_of(data)
    assert data.class_names == ["#000000", "#008040", "#800000"] and data.palette[1] == (0, 128, 64)
    assert np.array_equal(mask, np.array([0, 2, 1])[stored])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("class_dict.csv", "name,r,g,b\nroad,128,0,0\nnothing,0,0,0\ntree,0,128,64\n"),
        ("label_colors.txt", "128 0 0\troad\n0 0 0\tnothing\n0 128 64\ttree\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:128,0,0::\nnothing:0,0,0::\ntree:0,128,64::\n"),
    ],
)
def test_folder_reads_class_maps(colored, file, text):
    (colored / file).write_text(text)
    data = Folder(colored, batch_size=1)
    mask, stored = mask_of(data)
    assert data.class_names == ["road", "nothing", "tree"] and np.array_equal(mask, np.array([1, 0, 2])[stored])


def test_folder_takes_palette_and_void_colours(colored):
    data = Folder(colored, ["road", "tree"], [(128, 0, 0), (0, 128, 64)], void_colors=[(0, 0, 0)], batch_size=1)
    mask, stored = mask_of(data)
    assert np.array_equal(mask, np.array([255, 0, 1])[stored])
    data = Folder(colored, ["road", "tree"], [(128, 0, 0), (0, 128, 64)], batch_size=1)
    with pytest.raises(ValueError, match=r"belong to no class, \(0, 0, 0\) \(3\d\.\d %\).*data\.void_colors"):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"mask in colour.*data\.palette, or a class_dict\.csv"):
        Folder(colored, ["a", "b", "c"]).setup("fit")


def test_lossy_masks_in_colour_are_refused(tmp_path):
    for i in range(3):
        save(tmp_path / f"images/{i}.jpg", picture(i))
        save(tmp_path / f"masks/{i}.jpg", picture(i))
    with pytest.raises(ValueError, match=r"more than 255 are no classes, but what JPEG"):
        Folder(tmp_path).setup("fit")


def test_grey_saved_as_rgb_is_labels(tmp_path):
    for i in range(3):
        save(tmp_path / f"images/{i}.jpg", picture(i))
        save(tmp_path / f"masks/{i}.png", np.repeat(labels(i, [0, 1])[..., None], 3, axis=2))
    data = Folder(tmp_path, ["a", "b"], batch_size=1)
    data.setup("fit")
    assert set(data.datasets["train"].read(0)[1].unique().tolist()) == {0, 1}


@pytest.mark.parametrize("form", ["pages", "interleaved", "npy", "npy first"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_folder_of_many_bands(tmp_path, form, dtype):
    pixels = np.random.RandomState(0).randint(0, 200, (5, HEIGHT, WIDTH)).astype(dtype)
    for i in range(6):
        (tmp_path / "images").mkdir(exist_ok=True), (tmp_path / "masks").mkdir(exist_ok=True)
        if form == "pages":
            tifffile.imwrite(tmp_path / f"images/{i}.tif", pixels, photometric="minisblack")
        elif form == "interleaved":
            tifffile.imwrite(tmp_path / f"images/{i}.tif", pixels.transpose(1, 2, 0), planarconfig="contig")
        else:
            np.save(tmp_path / f"images/{i}.npy", pixels if form == "npy first" else pixels.transpose(1, 2, 0))
        np.save(tmp_path / f"masks/{i}.npy", labels(i, [0, 1]))
    data = Folder(tmp_path, ["a", "b"], bands=[4, 0], batch_size=2, crop_size=16, num_workers=0, color_jitter=0.2,
                  rotation=10, elastic=3, scale_range=[0.5, 2])  # fmt: skip
    data.setup("fit")
    image, _ = data.datasets["train"].read(0)
    assert data.in_channels == 2 and np.array_equal(image.numpy(), pixels[[4, 0]]) and image.numpy().dtype == dtype
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 2, 16, 16) and str(batch["image"].dtype).endswith(dtype)
    with pytest.raises(ValueError, match=r"it has the bands 0 to 4, but data.bands names 7"):
        Folder(tmp_path, ["a", "b"], bands=[7], batch_size=1).setup("fit")
    with pytest.raises(ValueError, match=r"\d\.(tif|npy).* bands.* so choose some in data\.bands"):
        Folder(tmp_path, ["a", "b"], batch_size=1).setup("fit")


def test_unmatched_files_are_listed_and_end_setup(tmp_path):
    save(tmp_path / "images/a.jpg", picture(1))
    save(tmp_path / "images/b.jpg", picture(2))
    save(tmp_path / "masks/b.png", labels(1, [0, 1]))
    save(tmp_path / "masks/c.png", labels(1, [0, 1]))
    data = Folder(tmp_path, ["a", "b"], val_fraction=0.3, test_fraction=0, batch_size=1)
    everything = data.samples("train") + data.samples("val")
    assert sorted(s.name for s in everything if s.missing() is None) == ["b"] and len(everything) == 3
    with pytest.raises(ValueError, match=r"has no partner: there is no \w+ .*; add it or remove the \w+"):
        data.setup("fit")


def test_what_is_fetched_is_what_torchvision_fetches():
    from torchvision.datasets import OxfordIIITPet, SBDataset, voc

    theirs = voc.DATASET_YEAR_DICT["2012"]
    url = theirs["url"].replace("http://host.", "https://thor.")  # torchvision 0.26 names the older host
    assert VOC.archives[0] == (url, f"md5:{theirs['md5']}", ".")
    assert VOC.sbd == (SBDataset.url, f"md5:{SBDataset.md5}", ".")
    assert VOC(train_split="train").archives == VOC.archives and VOC().archives == (*VOC.archives, VOC.sbd)
    assert [(a.url, a.checksum) for a in OxfordPets.archives] == [
        (url, f"md5:{md5}") for url, md5 in OxfordIIITPet._RESOURCES
    ]
