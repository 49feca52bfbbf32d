"""Shows runs side by side on one HTML page that needs nothing but a browser.

    python tools/report.py runs/shapes                             # runs/shapes/report.html
    python tools/report.py runs/shapes runs/shapes-2               # two runs in the same charts
    python tools/report.py runs/* --out report.html

The page has charts of metrics, losses, speed and cameras over kimg (inline SVG), the samples over time under
a slider, and a table of where the configurations differ."""

import base64
import dataclasses
import html
import importlib
import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
tdgp = importlib.import_module("3dgp")

COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")  # of the runs, in turn
SPEED = ("images_per_second",)  # what of the log stands under that heading
MOST_POINTS = 400  # of a line in a chart
MOST_PICTURES = 20  # of a run


@dataclasses.dataclass
class ReportOptions:
    """The command line."""

    runs: list[str]
    out: str = tdgp.opt("", "file to write (empty: report.html in the first run's folder)")


# ---- Reading a run ---------------------------------------------------------------------------------------
@dataclasses.dataclass
class LoggedRun:
    """What the page shows of one run."""

    name: str  # its folder, as it was given
    color: str
    config: dict  # {option: value}
    curves: dict  # {(heading, title): [(kimg, value, spread), ...]}
    pictures: list  # paths of samples over time


def read_run(folder, color):
    """-> LoggedRun; UserError if the folder holds none"""
    if not (folder / "config.json").exists():
        raise tdgp.UserError(f"{folder}: not the folder of a run")

    newest_first = sorted(folder.glob("samples-*.png"), reverse=True)
    some = newest_first[:: len(newest_first) // MOST_PICTURES + 1]
    return LoggedRun(str(folder), color, read_config(folder), read_curves(folder), some[::-1])


def read_config(folder):
    """-> {option: value}, empty if the file is damaged"""
    text = (folder / "config.json").read_text(errors="replace")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def read_rows(path):
    """The lines of a .jsonl file as dicts, but those that a crash cut short. [] where there is no file"""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return rows


def not_left_behind(rows):
    """Lines of log.jsonl without those that the run has left by going back to an earlier checkpoint."""
    kept = []
    for row in rows:
        kimg = row.get("kimg", math.inf)
        if "diverged" in row:  # kimg is then the checkpoint's, whose own line stays
            kimg += 1e-6
        while kept and kept[-1].get("kimg", 0) >= kimg:
            kept.pop()
        kept.append(row)
    return kept


def read_curves(folder):
    """All numbers that the run has logged. -> {(heading, title): [(kimg, value, spread), ...]}"""
    curves = {}

    # Of a kimg that was measured twice, as after going back, the later value stands; not if it is by more or
    # fewer images than in training. By other data it is no point of these curves.
    measured = {}
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        if isinstance(row.get("kimg"), (int, float)) and row.get("data") == rows[0].get("data"):
            known = measured.setdefault(row["kimg"], {})
            same_count = row.get("reals") == rows[0].get("reals")
            known.update(row if same_count else {**row, **known})
    for _, row in sorted(measured.items()):
        for title, value in row.items():
            add_point(curves, ("Metrics", title), row.get("kimg"), value)

    for row in not_left_behind(read_rows(folder / "log.jsonl")):
        for title, value in row.items():
            heading = "Speed" if title in SPEED else "Training"
            add_point(curves, (heading, title), row.get("kimg"), value)

        # The mean of each camera parameter, and its standard deviation as a band.
        means = row.get("camera_mean", [])
        spreads = row.get("camera_std", [])
        for title, mean, spread in zip(tdgp.Camera._fields[:6], means, spreads, strict=False):
            add_point(curves, ("Camera posterior", title), row.get("kimg"), mean, spread)
    return curves


def add_point(curves, key, kimg, value, spread=0):
    """Adds to a curve, unless it is no quantity, or one that a chart cannot show: text, a list, nan."""
    _, title = key
    if title in ("kimg", "reals", "diverged"):
        return
    for number in (kimg, value, spread):
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            return
    curves.setdefault(key, []).append((kimg, value, spread))


# ---- Charts ----------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Axes:
    """The part of the plane that a chart shows. It fills 270 x 140 of the picture, from (44, 10) on."""

    left: float
    right: float
    bottom: float
    top: float

    def at(self, x, y):
        """Where a point lies in the picture. -> "across,down " """
        across = 44 + 270 * (x - self.left) / (self.right - self.left or 1)
        down = 150 - 140 * (y - self.bottom) / (self.top - self.bottom or 1)
        return f"{across:.1f},{down:.1f} "


def axes_around(lines):
    """-> Axes that all points of the lines, with their spread, fit in"""
    xs = []
    ys = []
    for _, points in lines:
        for x, y, spread in points:
            xs.append(x)
            ys += [y - spread, y + spread]
    return Axes(min(xs), max(xs), min(ys), max(ys))


def chart(title, lines):
    """Inline SVG of one quantity over kimg.
    lines: [(color, [(kimg, value, spread), ...]), ...]; the spread, if any, is a band around the line"""
    axes = axes_around(lines)
    ticks = "".join(tick(axes, share) for share in (0, 0.5, 1))
    drawn = "".join(curve(axes, color, points) for color, points in lines)
    return f"""
<figure>{html.escape(title)}
  <svg viewBox='0 0 320 170' font-size=10>
    {ticks}
    {drawn}
    <text x=44 y=165>{axes.left:g}</text>
    <text x=314 y=165 text-anchor=end>{axes.right:g} kimg</text>
  </svg>
</figure>"""


def tick(axes, share):
    """A horizontal line over the chart at this share of its height, and its value."""
    height = 140 * share
    value = axes.bottom + (axes.top - axes.bottom) * share
    return f"""
    <path d='M44 {150 - height}h270' stroke=#ddd />
    <text x=40 y={154 - height} text-anchor=end>{value:.3g}</text>"""


def curve(axes, color, points):
    """A line through points (kimg, value, spread), and its band. Of many points some are left out."""
    points = points[:: len(points) // MOST_POINTS + 1] + points[-1:]
    width = 1.5 if len(points) > 2 else 6  # a single point is a dot

    line = "".join(axes.at(x, y) for x, y, _ in points)
    upper = "".join(axes.at(x, y + spread) for x, y, spread in points)
    lower = "".join(axes.at(x, y - spread) for x, y, spread in reversed(points))
    return f"""
    <polygon points='{upper}{lower}' fill={color} opacity=.15 />
    <polyline fill=none stroke={color} stroke-width={width} stroke-linecap=round points='{line}' />"""


# ---- The page --------------------------------------------------------------------------------------------
HEAD = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width">
<title>3DGP</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: auto; padding: 1em; max-width: 1400px; color: #222 }
  .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1em }
  svg, img, input { width: 100% }
  figure { margin: 0 }
  img { image-rendering: pixelated }
  .wide { overflow-x: auto }
  td, th { padding: 0 1em 0 0; text-align: left }
</style>
<script>
  function show(s) {
    s.parentNode.querySelectorAll("figure").forEach((f, i) => f.hidden = i != s.value)
  }
</script>
<h1>3DGP</h1>
"""

SHOW_LAST = "<script>document.querySelectorAll('input').forEach(show)</script>"


def legend(run):
    """The colour and the name of a run."""
    return f"<b style='color:{run.color}'>&#9632; {html.escape(run.name)}</b>\n"


def charts(runs):
    """A heading and its charts, for all quantities of all runs."""
    found = {}  # {heading: {title: lines of `chart`}}
    for run in runs:
        for (heading, title), points in run.curves.items():
            lines = found.setdefault(heading, {}).setdefault(title, [])
            lines.append((run.color, points))

    page = ""
    for heading, quantities in found.items():
        figures = "".join(chart(title, lines) for title, lines in quantities.items())
        page += f"<h2>{heading}</h2><div class=charts>{figures}</div>\n"
    return page


def samples(run):
    """The samples of a run, one at a time, and a slider that chooses."""
    last = len(run.pictures) - 1
    figures = "".join(picture(path) for path in run.pictures)
    return f"""
<section>
  <b>{html.escape(run.name)}</b>
  <input type=range max={last} value={last} oninput=show(this)>
  {figures}
</section>
"""


def picture(path):
    """A PNG as part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"""
  <figure hidden>{html.escape(path.stem)}
    <img alt='' src='data:image/png;base64,{data}'>
  </figure>"""


def configurations(runs):
    """A table: a column for the defaults and one for each run, a row for each option where they differ."""
    names = ["default", *(run.name for run in runs)]
    configs = [vars(tdgp.Config()), *(run.config for run in runs)]

    heads = "".join(f"<th>{html.escape(name)}" for name in names)
    rows = ""
    for field in dataclasses.fields(tdgp.Config):
        cells = [cell(config.get(field.name)) for config in configs]
        if len(set(cells)) > 1:
            rows += f"<tr><td>{field.name}{''.join(cells)}\n"
    return f"""
<h2>Configurations, where not the default</h2>
<div class=wide>
  <table>
  <tr><th>{heads}
  {rows}
  </table>
</div>
"""


def cell(value):
    """An option's value in the table. A tuple looks like a list, since it is one in config.json."""
    if isinstance(value, tuple):
        value = list(value)
    return f"<td>{html.escape(str(value))}"


def report(options):
    """Writes the page, from the top to the bottom."""
    folders = [Path(run) for run in options.runs]
    runs = [read_run(folder, color) for folder, color in zip(folders, itertools.cycle(COLORS), strict=False)]

    page = HEAD
    page += "".join(legend(run) for run in runs)
    page += charts(runs)
    page += "<h2>Samples</h2>\n"
    page += "".join(samples(run) for run in runs)
    page += SHOW_LAST
    page += configurations(runs)
    page += "</html>\n"

    path = Path(options.out or folders[0] / "report.html")
    with tdgp.atomic(path) as tmp:
        tmp.write_text(page, "utf-8", "replace")
    print(f"written to {path}")


def main(argv=None):
    """-> exit status"""

    def work():
        runs = ("runs", "folders of runs", "+")
        given = tdgp.parse_options(ReportOptions, "report.py", __doc__.splitlines()[0], argv, [runs])
        report(ReportOptions(**given))

    return tdgp.run_program("report.py", work)


if __name__ == "__main__":
    sys.exit(main())
