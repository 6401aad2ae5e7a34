"""Who may import whom, by folder. CONTRIBUTING.md says why."""

import ast
from pathlib import Path

import pytest
from conftest import PROJECT

# A file belongs to the room of the longest beginning of its path that stands here. "itself" is its own room.
ROOMS = {
    "segmentation/losses": {"errors"},
    "segmentation/errors": set(),
    "segmentation/inference": {"losses", "errors"},
    "segmentation/crf": {"losses", "errors"},
    "segmentation/pictures": {"losses", "errors"},
    "segmentation/outputs": {"errors"},
    "segmentation/geotiff": {"errors"},
    "segmentation/outlines": {"geotiff", "errors"},
    "segmentation/metrics": {"itself", "losses", "errors"},
    "segmentation/tensor_file": {"errors"},
    "segmentation/weights": {"itself", "losses", "tensor_file", "errors"},
    "segmentation/checkpoints": {"tensor_file", "errors"},
    "segmentation/optimizer": {"errors"},
    "segmentation/base": {"checkpoints", "inference", "losses", "metrics", "optimizer", "errors"},
    "segmentation/architectures/backbones": {"itself", "weights", "errors"},
    "segmentation/architectures": {"base", "architectures/backbones", "inference", "losses", "weights", "errors"},
    "segmentation/callbacks": {
        "itself", "base", "crf", "geotiff", "losses", "metrics", "outlines", "outputs", "pictures", "errors",
    },
    "segmentation/commands": {
        "itself", "base", "architectures", "callbacks", "checkpoints", "crf", "inference", "losses", "metrics",
        "geotiff", "outputs", "pictures", "weights", "errors",
    },
    "segmentation/messages": {"errors"},
    "segmentation/runs": {"checkpoints", "optimizer", "weights", "errors"},
    "segmentation/parser": {"checkpoints", "commands", "messages", "errors"},
    "datamodules/errors": set(),
    "datamodules/decode": {"errors"},
    "datamodules/files": {"decode", "errors"},
    "datamodules/class_map": {"decode", "files", "errors"},
    "datamodules/annotations": {"decode", "errors"},
    "datamodules/layout": {"annotations", "files", "errors"},
    "datamodules/download": {"errors"},
    "datamodules/transforms": {"errors"},
    "datamodules/weight_map": {"transforms", "errors"},
    "datamodules/dataset": {"decode", "transforms", "errors"},
    "datamodules/base": {"check", "dataset", "decode", "download", "files", "transforms", "weight_map", "errors"},
    "datamodules/check": {"itself", "base", "class_map", "dataset", "decode", "files", "errors"},
    "datamodules": {"annotations", "base", "class_map", "decode", "files", "transforms", "download", "errors"},
}  # fmt: skip
EVERYTHING = {"segmentation/cli", "segmentation/__init__", "segmentation/__main__", "datamodules/__init__"}
# The one paper that a paper extends, the one data set that a data set extends.
EXTENDS = {
    "architectures/deeplabv2": "architectures/deeplabv1",
    "architectures/deeplabv3plus": "architectures/deeplabv3",
    "architectures/segnet": "architectures/deconvnet",
    "architectures/unet3plus": "architectures/unet",
    "coco": "polygons",
    "layout": "folder",  # it tries its arguments
    "recycling": "polygons",
    "synthetic_cells": "synthetic_scenes",
}
OTHER_PACKAGE = {"segmentation/cli", "segmentation/commands"}  # they alone see both packages
FILES = [p.relative_to(PROJECT) for name in ("segmentation", "datamodules") for p in (PROJECT / name).rglob("*.py")]


def imported(file: Path) -> set[str]:
    """The modules of this project that a file imports, as paths without suffix; packages end in their folder."""
    found = set()
    for node in ast.walk(ast.parse((PROJECT / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1].parts if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                found.add((*module, alias.name))
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    paths = set()
    for parts in found:
        if parts[0] not in ("segmentation", "datamodules"):
            continue
        while not ((PROJECT / Path(*parts)).is_dir() or (PROJECT / Path(*parts)).with_suffix(".py").is_file()):
            parts = parts[:-1]  # a name inside a module
        paths.add("/".join(parts))
    return paths


def room(path: str) -> str:
    return max((name for name in ROOMS if path == name or path.startswith(f"{name}/")), key=len, default=path)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_imports_from_the_rooms_that_its_own_may_see(file):
    path = file.with_suffix("").as_posix()
    package, own = file.parts[0], room(path)
    for other in imported(file):
        if other.partition("/")[0] != package:
            assert path in OTHER_PACKAGE or own in OTHER_PACKAGE, f"{file} imports {other}"
            continue
        if path in EVERYTHING:
            continue
        assert not other.startswith(("segmentation/cli", "segmentation/__main__")), f"{file} imports {other}"
        allowed = {f"{package}/{name}" for name in ROOMS[own] if name != "itself"}
        if "itself" in ROOMS[own]:
            allowed.add(own)
        short = path.partition("/")[2]
        if short in EXTENDS and other == f"{package}/{EXTENDS[short]}":
            continue
        if own == "segmentation/commands" and other == package:
            continue
        assert room(other) in allowed, f"{file} imports {other}"


def test_the_rule_sees_what_it_forbids():
    """A rule that finds nothing to look at would always pass."""
    assert "segmentation/base" in imported(Path("segmentation/architectures/unet.py"))
    assert "segmentation/architectures/backbones/vgg" in imported(Path("segmentation/architectures/fcn.py"))
    assert room("segmentation/architectures/backbones/vgg") == "segmentation/architectures/backbones"
    assert room("datamodules/voc") == "datamodules" and room("datamodules/check/page") == "datamodules/check"
