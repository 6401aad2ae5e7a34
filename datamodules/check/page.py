"""The data doctor's report: short tables in the terminal, and one HTML page that contains its pictures."""

import base64
import html
import io
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..base import IGNORE
from .facts import Facts
from .findings import Examination, Finding, count, percent
from .suggest import batch_bytes, yaml_block

OVERLAYS, WORST, NAMED, ROWS = 9, 4, 50, 30  # training images; images and names per finding; rows in the terminal
WHITE, MAGENTA = (255, 255, 255), (255, 0, 255)
COLORS = {"error": "#b3261e", "warning": "#9a6700", "note": "#57606a"}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1f2328;background:#fff;max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.verdict{padding:.75rem 1rem;border-left:.4rem solid;background:#f6f8fa;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--cell,17rem)),1fr));gap:.6rem}
figure{margin:0}img{max-width:100%;display:block;border-radius:3px}.grid img{width:100%}
figcaption,.small{font-size:.8rem;color:#57606a;overflow-wrap:anywhere}
li{margin:.5rem 0;overflow-wrap:anywhere}ul{padding-left:1.1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:middle;white-space:nowrap}
td.bars{width:100%;min-width:9rem}.bar{height:.55rem;margin:2px 0;border:1px solid #0003;box-sizing:border-box}
.swatch{display:inline-block;width:.8em;height:.8em;border:1px solid #0006;margin-right:.35em}
.legend span{margin-right:1rem;white-space:nowrap}
pre{background:#f6f8fa;padding:1rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
@media(max-width:40rem){.grid{--cell:9rem!important}}
"""


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
        rows.append([str(k), str(name), *shares, f"{found.images[k]:,}", f"{found.class_weights[k]:.4g}"])
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
        text = Text.assemble("\n", (f"{finding.severity}: ", styles[finding.severity]), str(finding))
        console.print(text, soft_wrap=True)
    print(f"\n{found.verdict}\n\n{yaml_block(found)}\n")
    print(f"To use this block, add --config {folder / 'found.yaml'} to a command")
    print(f"The report with pictures is {folder / 'index.html'}")


def page_html(found: Examination) -> str:
    """Return the HTML page, which needs no other file."""
    name, root = html.escape(type(found.data).__name__), html.escape(str(found.data.root or "drawn"))
    color = COLORS["error"] if found.failed else "#1a7f37"
    body = [f'<h1>{name}</h1><p class="small">{root}</p>']
    body += [f'<p class="verdict" style="border-color:{color}">{html.escape(found.verdict)}</p>']
    if found.findings:
        body += ["<h2>Findings</h2><ul>", *(finding_html(found, finding) for finding in found.findings), "</ul>"]
    body += ["<h2>Splits</h2>", table_html(*split_rows(found)), f'<p class="small">{html.escape(memory(found))}</p>']
    if found.data.class_names:
        body += ["<h2>Classes: share of the labelled pixels</h2>", bars_html(found)]
    body += ["<h2>Image sizes</h2>", sizes_html(found), overlays_html(found)]
    body += ["<h2>To paste into a config</h2>", f"<pre>{html.escape(yaml_block(found))}</pre>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'


def table_html(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of plain text as HTML."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    return f'<div class="scroll"><table><tr>{top}</tr><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def finding_html(found: Examination, finding: Finding) -> str:
    """Return a finding as HTML, with pictures of its first files and the names of its files."""
    pictures = grid(found, finding.facts[:WORST], "9rem", finding.mask)
    names = [html.escape(f"{f.split}: {name}") for f, name in zip(finding.facts, finding.files, strict=True)][:NAMED]
    names += [f"and {len(finding.facts) - NAMED:,} more"] if len(finding.facts) > NAMED else []
    files = f"<summary>{count(len(finding.facts), 'file')}</summary>{'<br>'.join(names)}"
    text = f'<b style="color:{COLORS[finding.severity]}">{finding.severity}</b> {html.escape(str(finding))}'
    return f"<li>{text}{pictures}" + (f'<details class="small">{files}</details></li>' if names[1:] else "</li>")


def bars_html(found: Examination) -> str:
    """Return a table of the classes as HTML; each has one bar per split in the class's colour."""
    shares = [found.shares(split) for split in found.splits]
    largest, rows = max(1e-9, *(share.max() for share in shares)), []
    for k in range(found.data.num_classes):
        bars = "".join(
            f'<div class="bar" style="width:{100 * share[k] / largest:.1f}%;background:{css(found.data.palette[k])};'
            f'opacity:{1 - 0.3 * i:.1f}"></div>'
            for i, share in enumerate(shares)
        )
        numbers = "<br>".join(f"{split} {percent(share[k])}" for split, share in zip(found.splits, shares, strict=True))
        weight = f"class weight {found.class_weights[k]:.4g}<br>in {count(int(found.images[k]), 'image')}"
        cells = f'<td>{swatch(found, k)}</td><td class="bars">{bars}</td>'
        rows.append(f'{cells}<td class="small">{numbers}</td><td class="small">{weight}</td>')
    return f'<div class="scroll"><table><tr>{"</tr><tr>".join(rows)}</tr></table></div>'


def css(color: Sequence[int]) -> str:
    """Return a colour in CSS's notation."""
    return "#" + "".join(f"{value:02x}" for value in color)


def swatch(found: Examination, label: int) -> str:
    """Return the colour and name of a class as HTML."""
    name = html.escape(str(found.data.class_names[label]))
    return f'<i class="swatch" style="background:{css(found.data.palette[label])}"></i>{name}'


def sizes_html(found: Examination) -> str:
    """Return the sizes of the images as HTML, with a scatter plot if there are several."""
    facts = [f for f in found.facts if f.shape]
    if len({f.shape[1:] for f in facts}) < 2:
        return f"<p>All {count(len(facts), 'image')} are {size_range(facts)} pixels.</p>" if facts else "<p>None.</p>"
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="width, pixels", ylabel="height, pixels")
    for split, marker in zip(found.splits, "o^s", strict=False):
        sizes = Counter(f.shape[1:] for f in found.of(split) if f.shape)
        area = [20 + 300 * n / sizes.total() for n in sizes.values()]
        axes.scatter([w for _, w in sizes], [h for h, _ in sizes], area, marker=marker, alpha=0.5, label=split)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    text = f"{size_range(facts)}; larger marks mean more images."
    return f"<p>{text}</p>{embedded(buffer.getvalue(), 'sizes of the images')}"


def overlays_html(found: Examination) -> str:
    """Return random training images under their masks as HTML, with a legend; every call draws the same images."""
    usable = [f for f in found.of("train") if f.values and f.shape]
    picked = random.Random(0).sample(usable, min(OVERLAYS, len(usable)))
    seen = sorted({k for f in picked for k in np.flatnonzero(f.counts[:-2]).tolist()})
    legend = "".join(f"<span>{swatch(found, k)}</span>" for k in seen)
    for i, color, name in ((-2, WHITE, "ignored"), (-1, MAGENTA, "no class")):
        if any(f.counts[i] for f in picked):
            legend += f'<span><i class="swatch" style="background:{css(color)}"></i>{name}</span>'
    text = f'<h2>Training images under their masks</h2><p class="legend small">{legend}</p>'
    return text + grid(found, picked, "17rem") if picked else ""


def grid(found: Examination, facts: Iterable[Facts], cell: str, mask: bool = False) -> str:
    """Return pictures side by side as HTML; files that cannot be drawn are left out."""
    figures = []
    for f in facts:
        if (picture := draw(found, f)) is not None:
            buffer = io.BytesIO()
            picture.save(buffer, format="png")
            caption = html.escape(f"{f.split}: {Path(f.file(mask)).name}")
            figures.append(f"<figure>{embedded(buffer.getvalue(), caption)}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="grid" style="--cell:{cell}">{"".join(figures)}</div>' if figures else ""


def embedded(png: bytes, alt: str) -> str:
    """Return a picture as HTML that contains its bytes."""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


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
    labels = table[values.long().clamp(-1, len(table) - 1)].numpy()
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
