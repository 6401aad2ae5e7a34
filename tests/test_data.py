"""Reading, transforms, samplers, folders and downloads, compared with values computed by hand."""

import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import CLASSES, draw_tree
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from datamodules import CamVid, Folder, SegmentationDataset
from datamodules.base import voc_palette
from datamodules.dataset import EpochSampler, collate
from datamodules.decode import Sample, read_image, read_mask
from datamodules.download import Archive, fetch
from datamodules.errors import UserError
from datamodules.files import files_under
from datamodules.transforms import RandomScaleCrop


def batches(data: Folder, role: str = "train", epoch: int = 0) -> list[dict]:
    loader = data.loader(role)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_batches_keep_the_contract(tree):
    data = Folder(tree, CLASSES, batch_size=4, num_workers=0, crop_size=(24, 40), scale_range=(0.5, 2.0))
    data.setup("fit")
    batch = batches(data)[0]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 3, 24, 40)
    assert batch["mask"].dtype == torch.int64 and batch["mask"].shape == (4, 24, 40)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 255}
    assert len(batch["name"]) == 4 and batch["size"][0] == (48, 64)
    whole = batches(data, "val")
    assert len(whole) == 7 and whole[0]["image"].shape == (1, 3, 48, 64)


def test_a_sample_depends_on_seed_epoch_and_index_alone(tree, monkeypatch):
    data = Folder(tree, CLASSES, crop_size=24, scale_range=(0.5, 2.0), color_jitter=0.5)
    data.setup("fit")
    dataset = data.datasets["train"]
    torch.manual_seed(1)
    first = dataset[(3, 5)]
    state = torch.random.get_rng_state()
    dataset[(0, 0)]
    assert torch.equal(state, torch.random.get_rng_state())  # reading does not change the run's generator
    torch.manual_seed(99)
    assert torch.equal(first["image"], dataset[(3, 5)]["image"])
    assert not torch.equal(first["image"], dataset[(4, 5)]["image"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data.setup("fit")
    assert not torch.equal(first["image"], data.datasets["train"][(3, 5)]["image"])


def test_image_and_mask_move_together():
    """An image that equals its mask still equals it in every window."""
    labels = (torch.arange(60)[:, None] // 12 + torch.arange(90) // 15).byte() * 20
    crop = RandomScaleCrop((40, 52), (1.0, 1.0), fill=(255,))
    torch.manual_seed(0)
    for _ in range(20):
        image, mask = crop(tv_tensors.Image(labels[None]), tv_tensors.Mask(labels))
        assert image.shape == (1, 40, 52) and torch.equal(image[0], mask)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.7])
def test_crop_first_equals_scaling_the_whole_image_away_from_the_border(scale):
    """A smooth image equals torchvision's, which scales before it crops, within a few grey levels."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    picture = torch.stack([x + y, 2 * y, 255 - x]).round().byte()
    crop = RandomScaleCrop(40, (scale, scale), fill=(0, 0, 0))
    image = tv_tensors.Image(picture)
    params = crop.make_params([image])
    top, height, _, _ = params["rows"]
    left, width, _, _ = params["columns"]
    ours = crop.transform(image, params)
    usual = F.resize(picture, [round(96 * scale), round(128 * scale)], antialias=True)
    there = usual[:, round(top * scale) : round(top * scale) + 40, round(left * scale) : round(left * scale) + 40]
    assert height == width == round(40 / scale)
    inner = (slice(None), slice(3, 37), slice(3, 37))
    assert (ours[inner].int() - there[inner].int()).abs().max() <= 3


def test_small_images_are_padded_with_the_mean_and_255():
    crop = RandomScaleCrop(20, (0.5, 0.5), fill=(10, 20, 30))
    image = tv_tensors.Image(torch.full((3, 16, 24), 200, dtype=torch.uint8))
    image, mask = crop(image, tv_tensors.Mask(torch.zeros(16, 24, dtype=torch.uint8)))
    outside = mask == 255
    assert (~outside).sum() == 8 * 12
    assert image[:, outside].unique(dim=1).flatten().tolist() == [10, 20, 30]
    assert image[:, ~outside].unique().tolist() == [200]


@pytest.mark.parametrize("arguments", [(0,), ((8, 8, 8),), (8, (0.0, 1.0)), (8, (2.0, 1.0))])
def test_bad_crops_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        RandomScaleCrop(*arguments)


def test_training_sampler_shares_out_without_repeating():
    shares = [EpochSampler(11, train=True, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for sampler in shares:
        sampler.set_epoch(4)
    drawn = [list(sampler) for sampler in shares]
    assert [len(share) for share in drawn] == [len(sampler) for sampler in shares] == [5, 5]
    indices = [index for share in drawn for _, index in share]
    assert len(set(indices)) == 10 and {epoch for share in drawn for epoch, _ in share} == {4}
    shares[0].set_epoch(5)
    assert [index for _, index in shares[0]] != [index for _, index in drawn[0]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sampler_visits_every_image_once(world_size):
    shares = [EpochSampler(7, train=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for _, index in share) == list(range(7))
    assert sum(len(share) for share in shares) == 7


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_images_of_any_mode_become_rgb(mode, tmp_path):
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
    picture = grey.convert("RGB").convert(mode) if mode in ("P", "YCbCr", "CMYK") else grey.convert(mode)
    path = tmp_path / ("x.jpg" if mode == "YCbCr" else "x.tif" if mode == "CMYK" else "x.png")
    picture.save(path, **({"quality": 100} if mode == "YCbCr" else {}))
    pixels = read_image(path)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 2, 2)
    expected = torch.tensor([[0, 255], [255, 0]], dtype=torch.int)
    assert (pixels.int() - expected).abs().max() <= 4


def test_masks_are_read_as_stored(tmp_path):
    labels = np.array([[0, 1], [300, 65535]], np.uint16)
    Image.fromarray(labels).save(tmp_path / "wide.png")
    assert read_mask(tmp_path / "wide.png").tolist() == labels.tolist()
    Image.fromarray(np.array([[0, 1], [1, 0]], bool)).save(tmp_path / "bits.png")
    assert read_mask(tmp_path / "bits.png").tolist() == [[0, 1], [1, 0]]


def test_label_map_void_values_and_255(tmp_path):
    image, mask = tmp_path / "images", tmp_path / "masks"
    image.mkdir(), mask.mkdir()
    Image.new("RGB", (4, 1)).save(image / "a.png")
    Image.fromarray(np.array([[0, 255, 7, 9]], np.uint8)).save(mask / "a.png")
    data = Folder(tmp_path, ["no", "yes"], label_map={0: 0, 255: 1, 7: 1}, void_values=[9])
    dataset = SegmentationDataset([Sample("a", image / "a.png", mask / "a.png")], data.label_table())
    assert dataset.read(0)[1].tolist() == [[0, 1, 1, 255]]
    with pytest.raises(ValueError, match="label_map"):
        Folder(tmp_path, ["no", "yes"], label_map={0: 2}).label_table()


@pytest.mark.parametrize("value", [3, 254, 256, 65535, 65536, 2**20])
def test_a_value_without_a_class_is_named(value, tmp_path):
    Image.new("RGB", (2, 1)).save(tmp_path / "a.png")
    stored = np.array([[0, value]], np.uint8 if value < 256 else np.uint16 if value < 65536 else np.int32)
    Image.fromarray(stored).save(tmp_path / "a.tif")
    data = Folder(tmp_path, ["a", "b", "c"])
    dataset = SegmentationDataset([Sample("a", tmp_path / "a.png", tmp_path / "a.tif")], data.label_table())
    with pytest.raises(ValueError, match=f"a.tif holds the value {value}, .* none of the 3 classes"):
        dataset.read(0)


def test_splits_by_folder_list_or_fraction(tmp_path, tree):
    assert [len(Folder(tree, CLASSES).samples(split)) for split in ("train", "val", "test")] == [12, 7, 3]
    flat = tmp_path / "flat"
    for kind in ("images", "masks"):
        (flat / kind / "deep").mkdir(parents=True)
        for i in range(20):
            Image.new("L", (4, 4)).save(flat / kind / "deep" / f"{i:02d}.png")
    data = Folder(flat, ["a", "b"], val_fraction=0.2, test_fraction=0.1)
    parts = {split: [s.name for s in data.samples(split)] for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [14, 4, 2]
    assert sorted(name for part in parts.values() for name in part) == [f"deep/{i:02d}" for i in range(20)]
    assert len(Folder(flat, ["a", "b"], val_fraction=0.01).samples("val")) == 1
    (flat / "train.txt").write_text("deep/03\ndeep/04.png\n")
    (flat / "val.txt").write_text("deep/05\n\n")
    assert [s.name for s in data.samples("train")] == ["deep/03", "deep/04"]
    assert [s.name for s in data.samples("val")] == ["deep/05"]
    with pytest.raises(UserError, match=r"no test\.txt"):
        data.samples("test")
    (flat / "val.txt").write_text("deep/77\n")
    with pytest.raises(ValueError, match="deep/77"):
        data.samples("val")


def test_class_names_from_a_file(tmp_path):
    draw_tree(tmp_path / "tree", {"train": 1})
    (tmp_path / "tree/classes.txt").write_text("ground\ndisc\n\nbar\n")
    data = Folder(tmp_path / "tree")
    assert data.class_names == ["ground", "disc", "bar"] and data.num_classes == 3
    assert data.palette == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]  # PASCAL VOC's first colours
    assert voc_palette(21)[20] == (0, 64, 128)  # tvmonitor
    with pytest.raises(ValueError, match=r"nothing names the classes: name them in data.class_names"):
        Folder(tmp_path).setup("fit")


def test_names_never_collide(tmp_path):
    for name in ("a.jpg", "a.png", "b.png", "a.jpg.bmp"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    assert sorted(files_under(tmp_path)) == ["a.jpg", "a.jpg.bmp", "a.png", "b"]
    (tmp_path / "a.png").unlink()
    assert sorted(files_under(tmp_path)) == ["a", "a.jpg", "b"]


def test_camvid_facts_and_layout(tmp_path):
    assert len(CamVid.class_names) == len(CamVid.palette) == 11 and CamVid.void_values == (11,)
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
        for name in ("0001TP_006690.png", "0001TP_006720.png"):
            Image.new("L", (6, 4), 11 if folder == "trainannot" else 90).save(tmp_path / folder / name)
    data = CamVid(tmp_path)
    assert [s.name for s in data.samples("train")] == ["0001TP_006690", "0001TP_006720"]
    (tmp_path / "train.txt").write_text(
        "/SegNet/CamVid/train/0001TP_006720.png /SegNet/CamVid/trainannot/0001TP_006720.png\n"
    )
    sample = data.samples("train")[0]
    assert sample.mask == tmp_path / "trainannot/0001TP_006720.png"
    image, mask = SegmentationDataset([sample], data.label_table()).read(0)
    assert image.shape == (3, 4, 6) and mask.unique().tolist() == [255]
    (tmp_path / "trainannot/0001TP_006720.png").unlink()
    with pytest.raises(ValueError, match=r"no partner: there is no mask .*trainannot/0001TP_006720"):
        data.test_split = "train"
        data.setup("test")


def test_more_processes_than_images_is_an_error_on_every_process(tree, monkeypatch):
    data = Folder(tree, CLASSES)
    data.setup("test")
    monkeypatch.setattr(Folder, "world_size", 4)
    with pytest.raises(ValueError, match="3 images for 4 processes"):
        data.test_dataloader()


def test_pictures_of_different_sizes_do_not_stack():
    items = [{"image": torch.zeros(3, n, 4), "mask": torch.zeros(n, 4), "name": "a", "size": (n, 4)} for n in (4, 5)]
    with pytest.raises(ValueError, match=r"4 x 4 and 5 x 4.*crop_size"):
        collate(items)


# The cache


@pytest.mark.parametrize("cache", ["memory", "folder"])
def test_cache_decodes_once_within_its_budget(tree, tmp_path, cache, monkeypatch):
    place = cache if cache == "memory" else str(tmp_path / "cache")
    plain, kept = Folder(tree, CLASSES), Folder(tree, CLASSES, cache=place, batch_size=4)
    plain.setup("fit"), kept.setup("fit")
    expected = [plain.datasets["train"].read(i) for i in range(12)]
    if cache == "folder":
        kept = Folder(tree, CLASSES, cache=place, batch_size=4)  # another run
        kept.setup("fit")
    monkeypatch.setattr(Sample, "read", lambda self: pytest.fail(f"{self.name} was decoded again"))
    for i, (image, mask) in enumerate(expected):
        ours = kept.datasets["train"].read(i)
        assert torch.equal(ours[0], image) and torch.equal(ours[1], mask)


def test_cache_stops_at_its_budget_and_notices_a_new_file(tree, tmp_path):
    pair = 48 * 64 * 4  # bytes of image and mask
    data = Folder(tree, CLASSES, cache="memory", cache_budget=5.5 * pair / 2**30, batch_size=4)
    data.setup("fit")
    assert len(data.cache.kept) == 5 and data.cache.used == 5 * pair
    root = draw_tree(tmp_path / "tree", {"train": 4, "val": 1})
    data = Folder(root, CLASSES, cache=str(tmp_path / "cache"), batch_size=4)
    data.setup("fit")
    Image.fromarray(np.full((48, 64), 2, np.uint8)).save(root / "masks/train/00.png")
    data.setup("fit")
    assert data.datasets["train"].read(0)[1].unique().tolist() == [2]


# Weight maps and transforms together


def test_weight_maps_go_with_their_pictures(tree):
    data = Folder(tree, CLASSES, border_weight=10.0, elastic=4.0, rotation=20.0, crop_size=32, scale_range=(0.7, 1.4),
                  blur=0.5, color_jitter=0.3, max_class_share=0.9, batch_size=4, num_workers=0)  # fmt: skip
    data.setup("fit")
    batch = batches(data)[0]
    assert batch["pixel_weight"].shape == (4, 32, 32) and batch["pixel_weight"].dtype == torch.float32
    assert (batch["pixel_weight"][batch["mask"] == 255] == 0).all() and (
        batch["pixel_weight"][batch["mask"] != 255] > 0
    ).all()
    counts = data.look_at_files({"train": "train"})["train"].double()
    balance = counts.sum() / 3 / counts  # mean 1 over the training set
    discs = batch["pixel_weight"][batch["mask"] == 1]
    assert discs.unique().tolist() == pytest.approx([float(balance[1])])
    assert "pixel_weight" not in batches(data, "val")[0]
    assert len(data.weight_maps.kept) == 12  # one per training image, before any epoch


def test_items_do_not_depend_on_the_number_of_workers(tree):
    def items(num_workers: int) -> list[dict]:
        data = Folder(tree, CLASSES, border_weight=10.0, elastic=4.0, rotation=20.0, crop_size=32, color_jitter=0.3,
                      blur=0.5, max_class_share=0.9, batch_size=4, num_workers=num_workers)  # fmt: skip
        data.setup("fit")
        return batches(data, epoch=2)

    for one, two in zip(items(0), items(2), strict=True):
        assert one["name"] == two["name"]
        assert all(torch.equal(one[key], two[key]) for key in ("image", "mask", "pixel_weight"))


def test_rare_class_crops_need_a_crop():
    with pytest.raises(ValueError, match=r"max_class_share 0\.5 chooses crops: set data\.crop_size"):
        Folder("x", max_class_share=0.5)


# Downloads from a local server


@pytest.fixture
def server(tmp_path):
    """Serve a folder on a free port; connections break after `limit` bytes, and `asked` lists the ranges."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        limit, asked = 10**9, []

        def do_GET(self):
            content = (tmp_path / "served" / self.path[1:]).read_bytes()
            start = int(self.headers["Range"].split("=")[1].rstrip("-")) if self.headers["Range"] else 0
            Handler.asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : start + Handler.limit])

        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def archive(path, members: dict[str, bytes]) -> str:
    """Write a tar or zip archive, and return its checksum."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as file:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return "md5:" + hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_download_goes_on_checks_and_unpacks_once(server, tmp_path, suffix):
    handler, url = server
    content = np.random.RandomState(0).bytes(5000)
    checksum = archive(tmp_path / f"served/data.{suffix}", {"deep/file.bin": content})
    wanted, root = Archive(f"{url}/data.{suffix}", checksum, "here"), tmp_path / "root"
    handler.limit, handler.asked = 2000, []
    with pytest.raises(UserError, match="broke off after 2,000 of"):
        fetch(wanted, root)
    assert (root / f"data.{suffix}.part").stat().st_size == 2000
    handler.limit = 10**9
    fetch(wanted, root)
    assert handler.asked == [0, 2000] and (root / "here/deep/file.bin").read_bytes() == content
    fetch(wanted, root)
    assert handler.asked == [0, 2000] and not (root / f"data.{suffix}").exists()


def test_download_of_other_bytes_is_refused(server, tmp_path):
    archive(tmp_path / "served/data.zip", {"a": b"a"})
    with pytest.raises(ValueError, match="does not have the md5 000"):
        fetch(Archive(f"{server[1]}/data.zip", "md5:" + 32 * "0"), tmp_path / "root")
    assert not list((tmp_path / "root").iterdir())


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_nothing_is_unpacked_outside(server, tmp_path, suffix):
    checksum = archive(tmp_path / f"served/data.{suffix}", {"../../outside.txt": b"x"})
    with pytest.raises(ValueError, match=r"outside|not unpacked"):
        fetch(Archive(f"{server[1]}/data.{suffix}", checksum, "here"), tmp_path / "root")
    assert not (tmp_path / "outside.txt").exists() and not (tmp_path / "root/outside.txt").exists()


def test_only_what_may_be_fetched_is(tmp_path):
    from datamodules import Cityscapes

    with pytest.raises(ValueError, match=r"Cityscapes cannot be downloaded for you: https://www.cityscapes"):
        Cityscapes(tmp_path, download=True).prepare_data()
    Cityscapes(tmp_path).prepare_data()  # downloads nothing
