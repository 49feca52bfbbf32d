"""Writes a trained generator as a folder that can be shared, with a model card.

    python tools/publish.py runs/shapes my-model                  # weights, config.json, README.md, a picture
    python tools/publish.py runs/shapes my-model --dtype bf16 --repo me/my-model
    hf upload me/my-model my-model --exclude "samples-*" metrics.jsonl     # to the Hub, once the card is read
    python tools/sample.py --resume my-model                      # or hf:me/my-model

The weights are those of the averaged generator alone. No path of this machine is in the folder.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
tdgp = importlib.import_module("3dgp")
load = importlib.import_module("load")
read_rows = importlib.import_module("report").read_rows

MOST_BYTES = 2**20  # of the card's picture as PNG; a larger one becomes WebP


@dataclasses.dataclass
class PublishOptions:
    """The command line."""

    run: str
    folder: str
    dtype: str = tdgp.opt("fp32", "of the weights; bf16 halves the file, and rounds", "fp32", "bf16")
    repo: str = tdgp.opt("", "owner/name on the Hub, for the card's commands (empty: the folder's name)")
    code: str = tdgp.opt("", "URL from which this program is cloned, for the card (empty: to be filled in)")


# ---- Publishing --------------------------------------------------------------------------------------------
def publish(options):
    """Writes the folder of a run's averaged generator: all of it, or nothing."""
    folder = Path(options.folder).resolve()
    check_options(options, folder)
    G, path, kimg = load.open_generator(options.run, "cpu")
    if G.cfg.dims == 2:
        raise tdgp.UserError(f"{path}: makes pictures, not scenes (--dims 2), which a card does not describe")
    G.cfg = shared_config(G.cfg)
    state = published_state(G, options.dtype)

    with new_folder(folder) as new:
        (new / load.WEIGHTS).write_bytes(save(state, {"format": "pt"}))
        content = dict(images=round(kimg * 1000), config=dataclasses.asdict(G.cfg))
        (new / load.CONFIG).write_text(json.dumps(content, indent=2), "utf-8")
        picture = write_picture(G, path.with_name(f"samples-{kimg:010.3f}.png"), new)
        card = model_card(options, G, kimg, picture, metrics_table(path, kimg))
        (new / "README.md").write_text(card, "utf-8")
    print(f"written to {folder}; the lines of README.md that say FILL IN are yours")


def check_options(options, folder):
    """UserError for what is wrong in them, before anything is read or written."""

    def require(ok, message):
        if not ok:
            raise tdgp.UserError(message)

    is_new = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    require(is_new, f"{folder}: is there already, and holds something; name a new folder")
    require(folder.name.isprintable(), f"{folder.name!r}: take a name without line breaks and the like")
    good = re.fullmatch(r"([\w.-]+/[\w.-]+)?", options.repo, re.ASCII)
    require(good, f"--repo {options.repo}: must be owner/name, of letters, digits, and . _ -")
    good = re.fullmatch(r"(https?://[\w./~:%+-]+)?", options.code, re.ASCII)
    require(good, f"--code {options.code}: must be an address that begins with https://, without a password")


def shared_config(cfg):
    """Config without what is of the author's machine alone: of paths nothing is left, or their last part."""
    data = Path(cfg.data).name
    if cfg.data not in tdgp.DATA_PRESETS and data in tdgp.DATA_PRESETS:
        data = f"./{data}"  # somebody's own folder of that name
    teacher = cfg.teacher
    if teacher.startswith("local-dir:"):  # so timm calls a model in a folder
        teacher = Path(teacher).name
    names = dict(
        data=printable(data), teacher=printable(teacher), detector=printable(Path(cfg.detector).name)
    )
    alone = dict(out="", resume="", init="", depth_weights="", teacher_weights="", device="auto")
    return dataclasses.replace(cfg, **names, **alone)


def published_state(G, dtype):
    """-> {name: tensor}, none of which shares memory. In bf16 are parameters alone: buffers are few."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    state = {name: x.clone().contiguous() for name, x in G.state_dict().items()}
    for name, _ in G.named_parameters():
        state[name] = state[name].to(kind)
    return state


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill, which takes the name `path` only when all went well. What prevents it: UserError"""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        reason = e.strerror or str(e)
        raise tdgp.UserError(f"cannot write {path}: {reason}; nothing was written") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_picture(G, path, folder):
    """The run's samples of this checkpoint, or, where they are gone or damaged, such drawn anew. -> name"""
    png = folder / "samples.png"
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # gone, or damaged
        tdgp.write_samples(G, torch.arange(max(G.cfg.num_classes, 1)), png)
        with Image.open(png) as image:
            image = image.convert("RGB")

    image.save(png, optimize=True)
    if png.stat().st_size <= MOST_BYTES:
        return png.name
    png.unlink()
    image.save(png.with_suffix(".webp"), quality=85)
    return "samples.webp"


# ---- The model card ----------------------------------------------------------------------------------------
KINDS = {
    "fid": "Frechet distance (lower is better)",
    "kid": "kernel distance (lower is better)",
    "is": "inception score (higher is better)",
    "precision": "precision (higher is better)",
    "recall": "recall (higher is better)",
    "nfs": "non-flatness score (1: flat, 64: the most)",
}

# What evaluate.py says of `shapes`, by 512 samples.
TRUTHS = {
    "depth_error_render": "rendered depth less the true depth of the most similar image, in world units",
    "named_depth": "share of samples whose solid is recognised by depth (chance: 0.125)",
    "named_gray": "the same by a gray picture",
}


def printable(text):
    """Text in one line: in place of line breaks, and of all else that does not show, are spaces."""
    return "".join(x if x.isprintable() else " " for x in text)


def plain(text):
    """Text for markdown that shows as it is, whatever it holds: in one line, and nothing in it is markup."""
    text = printable(str(text))
    return re.sub(r"([\\`*_\[\]<>#|~$&])", r"\\\1", text)


METRICS_HEAD = "\n| metric | value | compared by | samples | with up to |\n| --- | --- | --- | --- | --- |\n"


def metrics_table(path, kimg):
    """What metrics.jsonl beside the checkpoint says of it, or else of the newest before it. -> markdown"""
    rows = read_rows(path.with_name("metrics.jsonl"))
    rows = [row for row in rows if isinstance(row.get("kimg"), (int, float)) and row["kimg"] <= kimg]
    newest = max((row["kimg"] for row in rows), default=0)

    lines = {}  # of what was measured twice the later value stands
    for row in rows:
        for name, value in row.items():
            if row["kimg"] == newest and isinstance(value, float):
                lines[name] = metric_line(name, value, row)
    if not any(lines.values()):
        return "None were measured."
    return f"At {newest:g} kimg:\n{METRICS_HEAD}{''.join(lines.values()).rstrip()}"


def metric_line(key, value, row):
    """One metric as a line of the table; "" for what does not belong there."""
    if key in TRUTHS:
        return f"| {TRUTHS[key]} | {value:.3g} | | 512 | the truth of shapes |\n"
    name, _, detector = key.partition("[")
    try:
        [(kind, _, n)] = tdgp.parse_metrics(name, KINDS)
    except (tdgp.UserError, ValueError):
        return ""

    what = f"{plain(key)}: {KINDS[kind]} | {value:.3g}"
    by = plain(detector.removesuffix("]") or "Inception")
    if detector == "area8]":
        by = "area8: 8x8 averages of colour and depth; no FID of Inception's"
    if kind in ("nfs", "is"):  # of samples alone
        return f"| {what} | {by if kind == 'is' else ''} | {n:,} | |\n"
    data = plain(Path(str(row.get("data"))).name)
    reals = row.get("reals") or "all"
    if kind in ("kid", "precision", "recall"):  # which take as many as samples
        reals = min(n, row.get("reals") or n)
    return f"| {what} | {by} | {n:,} | {plain(reals)} images of {data} |\n"


CARD = """---
license: unknown  # FILL IN: an identifier of huggingface.co/docs/hub/repositories-licenses
library_name: 3dgp
pipeline_tag: unconditional-image-generation
tags:
- 3dgp
- gan
- 3d
---

# 3DGP: {data}, {size}²

A GAN that makes 3D scenes: from a random z{and_class} three planes of features, rendered from any camera. The
method is that of "3D generation on ImageNet" (Skorokhodov et al., ICLR 2023), the program `3dgp.py`.

![samples]({picture})

*Samples of seed {seed}, none chosen: four views of each, over its depth.*

## Use

{where}

```bash
{commands}
```

`pictures/grid.png` has classes down and seeds across; `python tools/sample.py --help` shows all else. The
weights are numbers in safetensors; opening them runs no code of this folder.

## What it was trained on

| | |
| --- | --- |
| data | {about_data} |
| classes | {classes} |
| resolution | {size}² |
| depth of the data | {depth} |
| teacher that was distilled | {teacher} |
| images seen | {kimg:g} kimg ({kimg:g} thousand), preset {preset} |
| weights | the generator's moving average, {parameters:,} parameters, {dtype} |

## Metrics

{metrics}
{rounded}
## Limits

It has learned what its data show, their biases included, and makes nothing else. Shapes are inferred from
pictures, not measured: what no picture shows is made up, and depth has no unit of the real world.

## Licence

FILL IN: the licence of these weights, here and in the first lines of this file. The data, and pretrained
networks that training used, may restrict it{leres}.
"""


def model_card(options, G, kimg, picture, metrics):
    """-> README.md in the form of the Hub's model cards. Text of others goes through `plain`."""
    cfg = G.cfg
    data = about_data = plain(cfg.data)
    classes = f"{cfg.num_classes} (0 to {cfg.num_classes - 1})" if cfg.num_classes else "none"
    leres = "; those of LeReS, if it estimated the depth, are for non-commercial use"
    if cfg.data == "shapes":
        about_data = "shapes: solids of which the program itself draws any number"
        classes += f": {', '.join(tdgp.SOLIDS)}"
    if cfg.data == "shapes" or cfg.depth == "none":
        leres = ""

    rounded = ""
    if options.dtype == "bf16":
        rounded = "\nMetrics and picture are of the weights before they were rounded to bf16.\n"
    return CARD.format(
        data=data,
        about_data=about_data,
        classes=classes,
        and_class=" and a class" if cfg.num_classes else "",
        depth="none" if cfg.depth == "none" else "estimated",
        leres=leres,
        teacher=plain(cfg.teacher),
        size=cfg.resolution,
        preset=cfg.preset,
        seed=cfg.seed,
        kimg=kimg,
        parameters=sum(x.numel() for x in G.parameters()),
        dtype=options.dtype,
        rounded=rounded,
        picture=picture,
        metrics=metrics,
        where=where(options),
        commands=commands(options),
    )


def where(options):
    """From where the card's commands go. -> a line"""
    if options.code and options.repo:
        return "In any folder:"
    if options.code:
        return "In the folder that holds this one:"
    beside = "" if options.repo else ", with this folder beside it"
    return f"FILL IN: where to get the program. Where `3dgp.py` is{beside}:"


def commands(options):
    """Those of the card, which lead to pictures. -> text, a line for each"""
    folder = shlex.quote(Path(options.folder).resolve().name)
    lines = []
    if options.code:
        lines.append(f"git clone {options.code} 3dgp")
    if options.code and not options.repo:
        lines.append(f"cp -r {folder} 3dgp")
    if options.code:
        lines.append("cd 3dgp")
    lines.append("pip install -r requirements.txt")

    model = f"hf:{options.repo}" if options.repo else folder
    sample = f"python tools/sample.py --resume {model} --out pictures"
    lines.append(sample)
    lines.append(f"{sample}/orbit --classes 0 --video orbit")
    lines.append(f"{sample}/points --classes 0 --seeds 0 --points --depth")
    return "\n".join(lines)


def main(argv=None):
    """-> exit status"""

    def work():
        run = ("run", "folder of a run (its newest checkpoint), or a checkpoint", None)
        folder = ("folder", "new folder to write", None)
        given = tdgp.parse_options(PublishOptions, "publish.py", __doc__.splitlines()[0], argv, [run, folder])
        publish(PublishOptions(**given))

    return tdgp.run_program("publish.py", work)


if __name__ == "__main__":
    sys.exit(main())
