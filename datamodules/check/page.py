"""The data doctor's report: short tables in the terminal, and one HTML page that contains its pictures."""

import base64
import io
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..base import IGNORE
from .facts import Facts
from .findings import Examination, Finding, count, percent, printable
from .suggest import batch_bytes, yaml_block

OVERLAYS, WORST, NAMED, ROWS = 9, 4, 50, 30  # training images; images and names per finding; rows in the terminal
WHITE, MAGENTA = (255, 255, 255), (255, 0, 255)


def megabytes(size: float) -> str:
    """Return a number of bytes in MiB, or in GiB from 1 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def size_range(facts: Sequence[Facts]) -> str:
    """Return the smallest and the largest size of the images, as width x height."""
    sizes = sorted({f.shape[1:] for f in facts if f.shape}, key=lambda s: (s[0] * s[1], s))
    ends = " to ".join(f"{width} x {height}" for height, width in dict.fromkeys(sizes[:1] + sizes[-1:]))
    return ends + (f" ({len(sizes)} sizes)" if len(sizes) > 2 else "")


def split_rows(found: Examination) -> tuple[list[str], list[list[str]]]:
    """Return the headings of the table of splits, and one row per split."""
    rows = []
    for split in found.splits:
        facts = found.of(split)
        modes, masks = (
            ", ".join(f"{mode or '?'}" for mode, _ in Counter(kinds).most_common())
            for kinds in ([f.mode for f in facts if f.shape], [f.mask_mode for f in facts if f.mask_shape and f.shape])
        )
        ignored = found.pixels[split][-2] / max(found.pixels[split].sum(), 1)
        decoded = megabytes(sum(f.size for f in facts))
        rows.append([split, f"{len(facts):,}", size_range(facts), modes, masks, percent(ignored), decoded])
    return ["split", "images", "width x height", "modes", "masks", "ignored", "decoded"], rows


def class_rows(found: Examination) -> tuple[list[str], list[list[str]]]:
    """Return the headings of the table of classes, and one row per class."""
    rows = []
    for k, name in enumerate(found.data.class_names):
        shares = [percent(found.shares(split)[k]) for split in found.splits]
        rows.append([str(k), printable(name), *shares, f"{found.images[k]:,}", f"{found.class_weights[k]:.4g}"])
    return ["label", "class", *found.splits, "in training images", "class weight"], rows


def memory(found: Examination) -> str:
    """Describe how much memory the data needs."""
    fit = sum(f.size for f in found.facts if f.split in ("train", "val"))
    batch = f"a training batch of {found.given.batch_size} takes {megabytes(batch_bytes(found))} on the device"
    return f"data.cache: memory needs {megabytes(fit)} for train and val; {batch}, without the network"


def report(found: Examination, folder: Path) -> None:
    """Write ``index.html`` and ``found.yaml`` into a folder, and print tables, findings, verdict and the YAML block.

    Args:
        found: the result of `examine`.
        folder: where to write; it is created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "found.yaml").write_text(yaml_block(found) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(page_html(found), encoding="utf-8")
    console = Console()
    for title, (headings, rows) in (("Splits", split_rows(found)), ("Classes", class_rows(found))):
        table = Table(title=title, box=ASCII2)
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if rows and rows[0][i][:1].isdigit() else "left")
        if len(rows) > ROWS:  # the page shows all rows
            rows = [rows[k] for k in np.argsort(-found.pixels["train"][:-2], kind="stable")]
            rows[ROWS // 2 : -ROWS // 2] = [["...", f"{len(rows) - ROWS} more", *[""] * (len(headings) - 2)]]
        for row in rows:
            table.add_row(*map(Text, row))
        if rows:
            console.print(table)
    console.print(memory(found), soft_wrap=True, highlight=False)
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for finding in found.findings:
        text = Text.assemble("\n", (f"{finding.severity}: ", styles[finding.severity]), found.as_given(finding))
        console.print(text, soft_wrap=True)
    print(f"\n{found.as_given(found.verdict)}\n\n{yaml_block(found)}\n")
    print(f"To use this block, add --config {folder / 'found.yaml'} to a command")
    print(f"The report with pictures is {folder / 'index.html'}")


def page_html(found: Examination) -> str:
    """Return the HTML page, which needs no other file. Names of files and classes are escaped."""
    import jinja2  # only the page needs it

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    overlays, legend = training_images(found)
    text, plot = sizes(found)
    return template.render(
        found=found,
        count=count,
        name=type(found.data).__name__,
        root=printable(found.given.root_as_given or "drawn"),
        findings=[finding_parts(found, finding) for finding in found.findings],
        splits=split_rows(found),
        memory=memory(found),
        classes=class_bars(found),
        sizes=text,
        plot=plot,
        overlays=overlays,
        legend=legend,
        block=yaml_block(found),
    )


def finding_parts(found: Examination, finding: Finding) -> tuple[Finding, list[tuple[str, str]], list[str], int]:
    """Return a finding, pictures of its first files, the names of its files, and the number of further ones."""
    names = [f"{f.split}: {name}" for f, name in zip(finding.facts, finding.files, strict=True)][:NAMED]
    pictures = pictures_of(found, finding.facts[:WORST], finding.mask)
    return finding, pictures, [found.as_given(name) for name in names], len(finding.facts) - len(names)


def class_bars(found: Examination) -> list[dict[str, Any]]:
    """Return what the page shows of each class: one bar per split in the class's colour."""
    shares = [found.shares(split) for split in found.splits]
    largest = max(1e-9, *(share.max(initial=0) for share in shares))
    return [
        {
            "color": css(found.data.palette[k]),
            "name": printable(name),
            "bars": [f"{100 * share[k] / largest:.1f}" for share in shares],
            "shares": [f"{split} {percent(share[k])}" for split, share in zip(found.splits, shares, strict=True)],
            "weight": f"{found.class_weights[k]:.4g}",
            "images": count(int(found.images[k]), "image"),
        }
        for k, name in enumerate(found.data.class_names)
    ]


def css(color: Sequence[int]) -> str:
    """Return a colour in CSS's notation."""
    return "#" + "".join(f"{int(value):02x}" for value in color)


def sizes(found: Examination) -> tuple[str, str]:
    """Describe the sizes of the images, and draw a scatter plot if there are several: a sentence, and a PNG or ""."""
    facts = [f for f in found.facts if f.shape]
    if len({f.shape[1:] for f in facts}) < 2:
        return (f"All {count(len(facts), 'image')} are {size_range(facts)} pixels." if facts else "None."), ""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="width, pixels", ylabel="height, pixels")
    for split, marker in zip(found.splits, "o^s", strict=False):
        numbers = Counter(f.shape[1:] for f in found.of(split) if f.shape)
        area = [20 + 300 * n / numbers.total() for n in numbers.values()]
        axes.scatter([w for _, w in numbers], [h for h, _ in numbers], area, marker=marker, alpha=0.5, label=split)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"{size_range(facts)}; larger marks mean more images.", base64.b64encode(buffer.getvalue()).decode()


def training_images(found: Examination) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Draw random training images under their masks, the same at every call.

    Returns:
        caption and PNG of each, and colour and name of each class in them.
    """
    usable = [f for f in found.of("train") if f.values and f.shape]
    picked = random.Random(0).sample(usable, min(OVERLAYS, len(usable)))
    seen = sorted({k for f in picked for k in np.flatnonzero(f.counts[:-2]).tolist()})
    legend = [(css(found.data.palette[k]), printable(found.data.class_names[k])) for k in seen]
    for i, color, name in ((-2, WHITE, "ignored"), (-1, MAGENTA, "no class")):
        legend += [(css(color), name)] if any(f.counts[i] for f in picked) else []
    return pictures_of(found, picked), legend


def pictures_of(found: Examination, facts: Iterable[Facts], mask: bool = False) -> list[tuple[str, str]]:
    """Return caption and PNG of each sample; files that cannot be drawn are left out."""
    pictures = []
    for f in facts:
        if (picture := draw(found, f)) is not None:
            buffer = io.BytesIO()
            picture.save(buffer, format="png")
            caption = printable(f"{f.split}: {Path(f.file(mask)).name}")
            pictures.append((caption, base64.b64encode(buffer.getvalue()).decode()))
    return pictures


def draw(found: Examination, facts: Facts, width: int = 320) -> Image.Image | None:
    """Draw an image under its mask at 50 % opacity, or beside its mask if their sizes differ.

    Args:
        found: the result of `examine`.
        facts: of the sample to draw.
        width: width of the picture in pixels.

    Returns:
        the picture. If the sample could not be read, it is the readable one of the two files, or None.
    """
    if not facts.shape:
        try:
            with Image.open(facts.sample.mask if facts.problem == "colour" else facts.sample.image) as file:  # type: ignore[arg-type]
                return resized(file.convert("RGB"), width)
        except Exception:  # the finding says why it cannot be read
            return None
    image, values = facts.sample.read()
    pixels = np.nan_to_num(image.numpy()[[0, 1, 2] if len(image) > 2 else [0, 0, 0]].astype(np.float32))
    if facts.dtype != "uint8":
        low, high = np.percentile(pixels, (1, 99))
        pixels = ((pixels - low) / max(high - low, 1e-12)).clip(0, 1) * 255
    picture = resized(Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8)), width)
    if values is None:
        return picture
    table = found.data.label_table()
    labels = table(values).numpy()
    colors = np.array([*found.data.palette, *[WHITE] * (IGNORE + 1)], np.uint8)[: IGNORE + 1]
    colors[IGNORE] = WHITE
    colored = Image.fromarray(np.where((labels < 0)[..., None], np.array(MAGENTA, np.uint8), colors[labels]))
    colored = resized(colored, width, Image.Resampling.NEAREST)
    if facts.mask_shape == facts.shape[1:]:
        return Image.blend(picture, colored, 0.5)
    both = Image.new("RGB", (2 * width, max(picture.height, colored.height)), WHITE)
    both.paste(picture, (0, 0))
    both.paste(colored, (width, 0))
    return both


def resized(picture: Image.Image, width: int, how: Image.Resampling = Image.Resampling.BOX) -> Image.Image:
    """Scale a picture to a width."""
    return picture.resize((width, max(1, round(width * picture.height / picture.width))), how)
