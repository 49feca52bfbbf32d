"""One HTML page on which a person turns samples: views rendered beforehand, and a script that shows them.

A part of `sample.py` (--turntable), which has the command line. The page needs a browser and nothing else."""

import base64
import html
import importlib
import io
import math
import re
import string
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
tdgp = importlib.import_module("3dgp")

LONGEST_SIDE = 16384  # of a picture that any browser draws, in pixels


# ---- The page --------------------------------------------------------------------------------------------
# A card is a canvas that shows one cell of a sheet of views: yaws from left to right, pitches from the top.
# Sheets are text in the canvas's attributes. They are images only while the card is in sight.
PAGE = string.Template("""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>$title</title>
<style>
  :root { color-scheme: light dark }
  body { font: 15px/1.5 system-ui, sans-serif; margin: auto; padding: 1em; max-width: 1250px }
  h1, p, form, figure { margin: 0 0 .5em }
  main { display: grid; gap: .5em 1em; grid-template-columns: repeat(auto-fill, minmax(max(9em, 21%), 1fr)) }
  canvas { width: 100%; cursor: grab; touch-action: pan-y pinch-zoom; image-rendering: $scaling }
  canvas:focus-visible { outline: 3px solid #3b82f6; outline-offset: 2px }
  figcaption { display: flex; flex-wrap: wrap; justify-content: space-between }
</style>
<h1>$title</h1>
<p>Drag a picture to turn it; with a finger, begin sideways. Or choose it with Tab and use the arrow keys.
<form autocomplete=off role=radiogroup aria-label="What is shown">
  <label><input type=radio name=sheet value=color checked> Colour</label>
  <label><input type=radio name=sheet value=depth> Depth (bright is far)</label>
</form>
<main>$cards</main>
<script>
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
  document.querySelectorAll("canvas").forEach(canvas => {
    const yaws = canvas.dataset.yaws.split(" ")
    const pitches = canvas.dataset.pitches.split(" ")
    let column = (yaws.length - 1) / 2, row = (pitches.length - 1) / 2  // fractions while it is dragged
    let inSight, held, sheets = {}  // held: the last event of the drag

    function show() {
      if (!inSight) return sheets = {}  // the browser may forget them
      const name = document.forms[0].sheet.value
      const sheet = sheets[name] ??= Object.assign(new Image(), { onload: show, src: canvas.dataset[name] })
      const x = Math.round(column), y = Math.round(row), side = canvas.width
      canvas.getContext("2d").drawImage(sheet, x * side, y * side, side, side, 0, 0, side, side)
      canvas.parentNode.querySelector("output").value = "yaw " + yaws[x] + "°, pitch " + pitches[y] + "°"
    }
    function turn(right, down) {
      column = Math.min(Math.max(column + right, 0), yaws.length - 1)
      row = Math.min(Math.max(row + down, 0), pitches.length - 1)
      show()
    }
    canvas.onpointerdown = e => { if (e.button == 0) canvas.setPointerCapture(e.pointerId); held = e }
    canvas.onpointermove = e => {
      if (!canvas.hasPointerCapture(e.pointerId)) return
      const right = (e.clientX - held.clientX) / canvas.clientWidth
      const down = (e.clientY - held.clientY) / canvas.clientHeight
      turn(right * yaws.length, down * pitches.length)
      held = e
    }
    canvas.onkeydown = e => {
      if (!STEPS[e.key] || e.altKey || e.ctrlKey || e.metaKey) return
      turn(...STEPS[e.key])
      e.preventDefault()  // else it scrolls
    }
    document.forms[0].addEventListener("change", show)
    new IntersectionObserver(seen => { inSight = seen.at(-1).isIntersecting; show() }).observe(canvas)
  })
</script>
""")

CARD = string.Template("""
<figure><canvas width=$side height=$side tabindex=0 role=application aria-label="$title, arrow keys turn it"
  data-yaws="$yaws" data-pitches="$pitches" data-color="$color" data-depth="$depth"></canvas>
  <figcaption><span>$title</span><output></output></figcaption></figure>
""")


def write_page(path, title, cards, resolution):
    """The page. cards: as `add_card` makes them; resolution: of a view, in pixels. Small ones stay sharp."""
    scaling = "pixelated" if resolution < 128 else "auto"
    page = PAGE.substitute(title=html.escape(title), cards="".join(cards), scaling=scaling)
    with tdgp.atomic(path) as tmp:
        tmp.write_text(page, "utf-8", "replace")


# ---- The views -------------------------------------------------------------------------------------------
def parse_views(options):
    """--views: "15x5" -> (15, 5), yaws and pitches. UserError for what cannot be rendered or shown."""
    numbers = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", options.views)
    if not numbers:
        raise tdgp.UserError(f"--views {options.views}: must be yaws x pitches, as in 15x5")
    yaws = int(numbers[1])
    pitches = int(numbers[2])

    if options.turntable and max(yaws, pitches) * options.resolution > LONGEST_SIDE:
        what = f"more than {LONGEST_SIDE:,} pixels in a row at --resolution {options.resolution}"
        raise tdgp.UserError(f"--views {options.views}: {what}")
    return yaws, pitches


def spread(n, device):
    """n even steps from -1 to 1; 0 if there is but one."""
    return (2 * torch.arange(n, device=device) - (n - 1)) / max(n - 1, 1)


def cameras_around(camera, yaws, pitches, angle):
    """Cameras around one (Camera of 1), which is in their middle: up to `angle` radians to each side, half
    of it up and down. What is near moves right with the columns and down with the rows, as under a finger.
    -> Camera of pitches * yaws, row by row"""
    yaw = camera.yaw + angle * spread(yaws, camera.yaw.device)  # (yaws,)
    pitch = camera.pitch - angle / 2 * spread(pitches, camera.yaw.device)  # (pitches,)
    pitch = pitch.clamp(0.05, math.pi - 0.05)
    pitch, yaw = torch.meshgrid(pitch, yaw, indexing="ij")  # (pitches, yaws)
    around = camera._replace(yaw=yaw.flatten(), pitch=pitch.flatten())
    return around._make(x.expand(yaws * pitches) for x in around)


def sheet_url(views, columns):
    """Views (H, W, 3), row by row -> a picture of all, as a data URL"""
    rows = [np.concatenate(views[i : i + columns], 1) for i in range(0, len(views), columns)]
    file = io.BytesIO()
    # WebP would be smaller, but halves the resolution of colours, which small views do not bear.
    Image.fromarray(np.concatenate(rows, 0)).save(file, "JPEG", quality=92, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def degrees(angles):
    """(N,) radians -> "-23 +0 +23" """
    return " ".join(f"{x:+.0f}" for x in angles.rad2deg().tolist())


def add_card(cards, G, s, views, options):
    """Renders the views of a Sample, and appends their card. views: how many yaws, and pitches"""
    yaws, pitches = views
    cameras = cameras_around(s.camera, yaws, pitches, options.angle)

    # The sample's own camera comes first, since the first picture sets the depths that are black and white.
    all_cameras = cameras._make(torch.cat(pair) for pair in zip(s.camera, cameras, strict=True))
    _, *pictures = tdgp.render_views(G, s.planes, all_cameras, options.resolution, dim=2)

    side = options.resolution
    card = CARD.substitute(
        title=html.escape(s.title),
        side=side,
        yaws=degrees(cameras.yaw[:yaws] - s.camera.yaw),
        pitches=degrees(cameras.pitch[::yaws] - s.camera.pitch),
        color=sheet_url([picture[:, :side] for picture in pictures], yaws),
        depth=sheet_url([picture[:, side:] for picture in pictures], yaws),
    )
    cards.append(card)
