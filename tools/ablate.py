"""Repeats the experiments behind the paper's claims: runs that differ in one thing, and their table.

    python tools/ablate.py adaptor                                 # 3 seeds of each variant: hours
    python tools/ablate.py camera --seeds 1 --options "--kimg 8"   # shorter; options of 3dgp.py for all runs
    python tools/ablate.py distillation --options "--data photos/ --preset small --depth none
                           --teacher-weights tf_efficientnet_lite0.pth"

Runs follow each other, each in a folder of its own. Called again, it goes on where it was: finished runs are
passed over, broken ones resumed. In the end there are table.md (means and deviations over the seeds, at equal
images), curves.png (distance over images) and samples.png (a row for each variant, of the first seed).
"""

import collections
import dataclasses
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
tdgp = importlib.import_module("3dgp")


# ---- What is compared --------------------------------------------------------------------------------------
@dataclasses.dataclass
class Variant:
    """How it differs from the others, as options of 3dgp.py. The first of an experiment is the baseline."""

    name: str
    options: str
    claim: str  # of the paper, and where


# StyleGAN2: the backbone paints the picture itself.
FLAT = "--dims 2 --depth none --camera frontal --triplane-features 1"

EXPERIMENTS = {
    "adaptor": (
        Variant("random", "", "section 3.1: one of four candidates at random, the default"),
        Variant(
            "never", "--depth-adaptor never", "dogs, FID2k 12.2: geometry takes over the estimator's faults"
        ),
        Variant("half", "--depth-adaptor half", "dogs, FID2k 9.25"),
        Variant("always", "--depth-adaptor always", "dogs, FID2k 8.13, the best"),
        Variant("truth", "--depth-adaptor never --depth-distortion 0", "no claim: the bound, true depth"),
    ),
    "adaptor-2": (
        Variant("random", "--depth-distortion 2", "as adaptor, for an estimator twice as wrong"),
        Variant("never", "--depth-distortion 2 --depth-adaptor never", "the same"),
        Variant("half", "--depth-distortion 2 --depth-adaptor half", "the same"),
        Variant("always", "--depth-distortion 2 --depth-adaptor always", "the same"),
    ),
    "camera": (
        Variant(
            "emd", "", "section 3.2: learned cameras are better than given ones; the published code's form"
        ),
        Variant("grad", "--camera-reg grad --camera-reg-weights 1 1 0.01 0.01", "the paper's form of it"),
        Variant("none", "--camera-reg none", "without a regulariser the posterior collapses"),
        Variant("wide", "--camera prior", "all cameras of the prior: worse than learned ones"),
        Variant("frontal", "--camera frontal", "one camera: the worst, geometry is flat"),
    ),
    "depth": (
        Variant("with", "", "section 3.1: depth makes the geometry"),
        Variant(
            "without", "--depth none", "ImageNet: without depth it is flat. Its distance is of RGB alone"
        ),
    ),
    "distillation": (  # on photographs
        Variant("without", "--teacher none", "the baseline of section 3.4"),
        Variant("with", "--teacher tf_efficientnet_lite0", "FID at least 40% lower at equal images"),
    ),
    "distillation-2d": (
        Variant("without", f"{FLAT} --teacher none", "StyleGAN2, the baseline of the convergence figure"),
        Variant("with", f"{FLAT} --teacher tf_efficientnet_lite0", "FID at least 40% lower at equal images"),
    ),
}
SHOWN = r"fid|precision|recall|nfs|depth_error_render|named_(depth|gray)$|yaw|pitch"  # in the table
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")  # of the variants, in turn


@dataclasses.dataclass
class AblateOptions:
    """The command line."""

    experiment: str
    seeds: int = tdgp.opt(3, "runs of each variant, with --seed 0, 1, ...")
    out: str = tdgp.opt("", "folder of all (empty: runs/ablate-<experiment>)")
    options: str = tdgp.opt("", "options of 3dgp.py for all runs, in quotes")
    metrics: str = tdgp.opt("fid1k,nfs64", "of tools/evaluate.py, at the end of each run")
    detectors: str = tdgp.opt(
        "area8", "of tools/evaluate.py, separated by blanks; the first one's is the curve"
    )


# ---- Running -----------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Trial:
    """One run of a variant."""

    variant: Variant
    folder: Path
    options: list  # of 3dgp.py, but for --out and --resume

    @property
    def result(self):
        """The file whose being there says that the run is finished and measured."""
        return self.folder / "ablation.json"

    @property
    def images(self):
        """Seen so far, as the log says."""
        rows = read_rows(self.folder / "log.jsonl")
        return round(1000 * rows[-1]["kimg"]) if rows else 0


def read_rows(path):
    """The lines of a .jsonl file as dicts, but for one that is being written. [] where there is no file"""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def plan(options):
    """-> [Trial], seed by seed, so that a first answer is there early; images of a run"""
    trials = []
    for seed in range(options.seeds):
        for variant in EXPERIMENTS[options.experiment]:
            own = shlex.split(f"{options.options} {variant.options} --seed {seed}")
            trials.append(Trial(variant, Path(options.out, f"{variant.name}-{seed}"), own))

            # What is wrong with an option is said before anything runs.
            cfg = tdgp.make_config(tdgp.parse_options(tdgp.Config, "3dgp.py", "", own))
            tdgp.validate(cfg, 1)
    return trials, math.ceil(cfg.kimg * 1000 / cfg.batch_size) * cfg.batch_size


def start(program, argv, log):
    """A program of ours as a process that ends when this one is killed; what it says goes to a file."""
    with open(log, "a") as f:
        command = [sys.executable, str(program), *argv]
        return subprocess.Popen(command, stdout=f, stderr=f, preexec_fn=tdgp.stop_with_parent)


def finish(process, trial, log, bar, before):
    """Waits for a process, and shows meanwhile how far the trial is, beyond the images of those before.
    What went wrong is a UserError."""
    while process.poll() is None:
        time.sleep(0.5)
        bar.update(before + trial.images - bar.n)
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise tdgp.UserError(f"{trial.folder}: {said[-1]} ({log} has all of it)")


def is_finished(trial):
    """Whether it was run and measured before, which must have been by the same options."""
    if not trial.result.exists():
        return False
    if json.loads(trial.result.read_text())["options"] != trial.options:
        raise tdgp.UserError(f"{trial.folder}: was run with other options; name another --out")
    return True


def run(trial, bar, images, options):
    """Trains, or goes on with training, and measures; then the trial's result is there."""
    before = bar.n
    log = trial.folder.with_suffix(".log")
    argv = ["--out", str(trial.folder), "--resume", "auto", *trial.options]
    finish(start(HERE.parent / "3dgp.py", argv, log), trial, log, bar, before)
    kimg = max((kimg for kimg, _ in tdgp.checkpoints(trial.folder)), default=0)
    if round(kimg * 1000) < images:
        raise tdgp.UserError(
            f"{trial.folder}: was stopped at {kimg:g} kimg; the same command goes on from here"
        )

    found = {"options": trial.options}
    reals = json.loads((trial.folder / "config.json").read_text())["reals"]
    for detector in options.detectors.split():
        argv = ["--resume", str(trial.folder), "--reals", str(reals)]
        argv += ["--metrics", options.metrics, "--detector", detector]
        finish(start(HERE / "evaluate.py", argv, log), trial, log, bar, before)
        found.update(read_rows(trial.folder / "metrics.jsonl")[-1])
    for name, value in zip(("yaw", "pitch"), found.get("camera_w1_posterior", []), strict=False):
        found[f"W1 of {name}"] = value
    with tdgp.atomic(trial.result) as temporary:
        temporary.write_text(json.dumps(found, indent=1))


# ---- Table -------------------------------------------------------------------------------------------------
def distances(trial):
    """The curve of a run: (kimg, its first distance that is written down), without the untrained one"""
    curve = {}
    for row in read_rows(trial.folder / "metrics.jsonl"):
        names = [name for name in row if name.startswith("fid")]
        if names and row["kimg"] > 0:
            curve.setdefault(row["kimg"], row[names[0]])
    return sorted(curve.items())


def mean_curve(trials):
    """Over the seeds of a variant -> [(kimg, mean, standard deviation)] where all have a value"""
    values = collections.defaultdict(list)
    for trial in trials:
        for kimg, distance in distances(trial):
            values[kimg].append(distance)
    whole = sorted((kimg, x) for kimg, x in values.items() if len(x) == len(trials))
    return [(kimg, float(np.mean(x)), float(np.std(x))) for kimg, x in whole]


def reached(curve, goal):
    """At how many kimg a curve first is at the goal or below."""
    for kimg, mean, _ in curve:
        if mean <= goal:
            return f"{kimg:g}"
    return "not reached"


def spread(values):
    """Mean, and deviation if there are several."""
    text = f"{np.mean(values):.3g}"
    return f"{text} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else text


def table(by_variant):
    """Markdown: a row for each variant. by_variant: {name: [Trial]}, the baseline first"""
    results = {}
    for name, trials in by_variant.items():
        results[name] = [json.loads(trial.result.read_text()) for trial in trials]
    first = next(iter(results.values()))[0]
    columns = [key for key in first if re.search(SHOWN, key) and isinstance(first[key], float)]
    _, goal, _ = mean_curve(next(iter(by_variant.values())))[-1]

    heads = ["variant", *columns, "kimg to the baseline's last distance", "the paper says"]
    lines = [heads, ["---"] * len(heads)]
    for name, trials in by_variant.items():
        cells = [spread([x.get(column, math.nan) for x in results[name]]) for column in columns]
        lines.append([name, *cells, reached(mean_curve(trials), goal), trials[0].variant.claim])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# ---- Pictures ----------------------------------------------------------------------------------------------
def draw_curves(by_variant):
    """Distance over kimg, logarithmic: a line for each variant, its deviation as a band. -> PIL image"""
    curves = {name: mean_curve(trials) for name, trials in by_variant.items()}
    points = np.array([point for curve in curves.values() for point in curve])  # (N, 3)
    right = points[:, 0].max()
    low = math.log(points[:, 1].min() / 1.2)
    high = math.log(points[:, 1].max() * 1.2)

    def at(kimg, distance):
        """The drawing fills 640 x 360 pixels, from (60, 20) on."""
        share = (math.log(max(distance, math.exp(low))) - low) / (high - low)
        return 60 + 640 * kimg / right, 380 - 360 * share

    image = Image.new("RGB", (840, 420), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(14)
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = math.exp(low + share * (high - low))
        draw.line([at(0, value), at(right, value)], "#dddddd")
        draw.text((54, at(0, value)[1]), f"{value:.3g}", "black", font, "rm")
    draw.text((60, 386), "0", "black", font, "la")
    draw.text((700, 386), f"{right:g} kimg", "black", font, "ra")

    for line, (name, curve) in enumerate(curves.items()):
        color = COLORS[line % len(COLORS)]
        upper = [at(kimg, mean + deviation) for kimg, mean, deviation in curve]
        lower = [at(kimg, mean - deviation) for kimg, mean, deviation in reversed(curve)]
        if len(curve) > 1:
            draw.polygon(upper + lower, color + "30")
        draw.line([at(kimg, mean) for kimg, mean, _ in curve], color, 2)
        draw.text((716, 30 + 22 * line), name, color, font, "la")
    return image


def draw_samples(by_variant):
    """The first row of the last samples of each variant's first run, with its name. -> PIL image"""
    rows = []
    for name, trials in by_variant.items():
        samples = Image.open(max(trials[0].folder.glob("samples-*.png")))
        row = samples.crop((0, 0, samples.width, samples.height // 4))  # a grid has four rows of scenes
        rows.append((name, row))
    height = 20 + max(row.height for _, row in rows)

    image = Image.new("RGB", (max(row.width for _, row in rows), height * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    for line, (name, row) in enumerate(rows):
        draw.text((4, height * line + 2), name, "black", ImageFont.load_default(14), "la")
        image.paste(row, (0, height * line + 20))
    return image


# ---- Command line ------------------------------------------------------------------------------------------
def ablate(options):
    """All runs that are missing, then the table and the pictures."""
    if options.experiment not in EXPERIMENTS:
        raise tdgp.UserError(f"{options.experiment}: must be one of {', '.join(EXPERIMENTS)}")
    if options.seeds < 1:
        raise tdgp.UserError(f"--seeds {options.seeds}: must be positive")
    out = Path(options.out or Path("runs", f"ablate-{options.experiment}"))
    options = dataclasses.replace(options, out=str(out))
    trials, images = plan(options)
    out.mkdir(parents=True, exist_ok=True)

    missing = [trial for trial in trials if not is_finished(trial)]
    done = len(trials) - len(missing)
    with tqdm(total=len(trials) * images, initial=done * images, unit="img") as bar:
        for trial in missing:
            bar.set_description(trial.folder.name)
            run(trial, bar, images, options)

    by_variant = {}
    for trial in trials:
        by_variant.setdefault(trial.variant.name, []).append(trial)
    text = table(by_variant)
    with tdgp.atomic(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    tdgp.write_image(draw_curves(by_variant), out / "curves.png")
    tdgp.write_image(draw_samples(by_variant), out / "samples.png")
    print(f"{text}written to {out}")


def main(argv=None):
    """-> exit status"""

    def work():
        known = ("experiment", ", ".join(EXPERIMENTS), None)
        given = tdgp.parse_options(AblateOptions, "ablate.py", __doc__.splitlines()[0], argv, [known])
        ablate(AblateOptions(**given))

    return tdgp.run_program("ablate.py", work)


if __name__ == "__main__":
    sys.exit(main())
