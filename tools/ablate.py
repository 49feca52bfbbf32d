"""Repeats the experiments behind the paper's claims: runs that differ in one thing, and their table.

    python tools/ablate.py adaptor                                     # 3 seeds of each variant: hours
    python tools/ablate.py adaptor --options "--depth-distortion 2"    # options of 3dgp.py for all runs
    python tools/ablate.py distillation-2d --options "--data photos/ --preset small"   # of photographs

Runs follow each other, each in a folder of its own. Called again, it goes on where it was: finished runs are
passed over, broken ones resumed. It writes table.md (means and deviations over the seeds, at equal images),
curves.png (distance over images) and samples.png (a row for each variant, of the first seed)."""

import dataclasses
import fcntl
import importlib
import itertools
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
sys.path[:0] = [str(HERE), str(HERE.parent)]
tdgp = importlib.import_module("3dgp")
evaluate = importlib.import_module("evaluate")
report = importlib.import_module("report")


# ---- What is compared --------------------------------------------------------------------------------------
@dataclasses.dataclass
class Variant:
    """How it differs from the others, as options of 3dgp.py. The first of an experiment is the baseline."""

    name: str
    options: str
    claim: str  # of the paper, and where
    comparable: bool = True  # whether its distance is to the same data and channels as the baseline's


def distillation(options):
    """On photographs, such as --data in --options names."""
    teacher = f"{options} --teacher tf_efficientnet_lite0"
    without = Variant("without", f"{options} --teacher none", "the baseline of section 3.4")
    return without, Variant("with", teacher, "FID at least 40% lower at equal images")


def flat(resolution):
    """StyleGAN2: the backbone paints the picture itself."""
    sizes = f"--resolution {resolution} --triplane-resolution {resolution} --patch-resolution {resolution}"
    return f"--dims 2 --depth none --camera frontal --triplane-features 1 {sizes}"


EXPERIMENTS = {
    "adaptor": (
        Variant("random", "", "section 3.1: one of four candidates at random, the default"),
        Variant("never", "--depth-adaptor never", "dogs, FID2k 12.2: geometry has the estimator's faults"),
        Variant("half", "--depth-adaptor half", "dogs, FID2k 9.25"),
        Variant("always", "--depth-adaptor always", "dogs, FID2k 8.13, the best"),
        Variant("truth", "--depth-adaptor never --depth-distortion 0", "none: true depth, a bound", False),
    ),
    "camera": (
        Variant("emd", "", "section 3.2: learned cameras are better than given ones; the code's form"),
        Variant("grad", "--camera-reg grad --camera-reg-weights 1 1 0.01 0.01", "the paper's; weights ours"),
        Variant("none", "--camera-reg none", "without a regulariser the posterior collapses"),
        Variant("wide", "--camera prior", "all cameras of the prior: worse than learned ones"),
        Variant("frontal", "--camera frontal", "one camera: the worst, geometry is flat"),
    ),
    "depth": (
        Variant("with", "", "section 3.1: estimated depth, however wrong, helps geometry"),
        Variant("without", "--depth none", "no number. Its distance is of RGB alone", False),
    ),
    "loss": (
        Variant("relativistic", "--loss relativistic", "none: R3GAN's pairs, R1 on both; the default"),
        Variant("nonsaturating", "--loss nonsaturating", "section 3.5: what the paper trains with"),
    ),
    "distillation": distillation(""),
    "distillation-2d": distillation(flat(64)),  # the convergence figure, of --preset small
    "distillation-2d-32": distillation(flat(32)),  # and of --preset tiny
}
SHOWN = r"^(fid|kid|is)\d|precision|recall|nfs|depth_error_render|named_(depth|gray)$|W1"  # in the table


@dataclasses.dataclass
class AblateOptions:
    """The command line."""

    experiment: str
    seeds: int = tdgp.opt(3, "runs of each variant, with --seed 0, 1, ...")
    out: str = tdgp.opt("", "folder of all (empty: runs/ablate-<experiment>)")
    options: str = tdgp.opt("", "options of 3dgp.py for all runs, as in --options='--kimg 8'")
    metrics: str = tdgp.opt("fid1k,pr1k,nfs64", "of tools/evaluate.py, at the end of each run")
    detectors: str = tdgp.opt("area8", "of tools/evaluate.py, for these metrics; separated by blanks")


# ---- Running -----------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Trial:
    """One run of a variant."""

    variant: Variant
    folder: Path
    options: list  # of 3dgp.py, but for --out and --resume
    asked: list  # all that the result depends on

    def read(self):
        """What is known: `asked`; once it is finished `kimg` and what was measured, or why it `failed`."""
        rows = report.read_rows(self.folder / "ablation.json")
        return rows[0] if rows else {}

    def write(self, **found):
        self.folder.mkdir(parents=True, exist_ok=True)
        with tdgp.atomic(self.folder / "ablation.json") as temporary:
            temporary.write_text(json.dumps({"asked": self.asked, **found}))

    def images(self):
        """Seen so far, as the log says."""
        rows = report.read_rows(self.folder / "log.jsonl") or [{"kimg": 0}]
        return round(1000 * rows[-1]["kimg"])


def plan(options):
    """What is wrong with an option is a UserError here, before anything runs.
    -> [Trial], seed by seed, so that a first answer is there early; images of a run"""
    metrics = tdgp.parse_metrics(options.metrics, ("fid", "kid", "is", "pr", "nfs"))
    if not options.detectors.split():
        raise tdgp.UserError("--detectors is empty: name one, as area8")
    for detector in options.detectors.split():
        evaluate.open_detector(detector, "cpu", [kind for kind, _, _ in metrics])
    trials = []
    for seed, variant in itertools.product(range(options.seeds), EXPERIMENTS[options.experiment]):
        try:
            own = shlex.split(f"{options.options} {variant.options} --seed {seed}")
        except ValueError as e:
            raise tdgp.UserError(f"--options {options.options}: {e}") from None
        given = tdgp.parse_options(tdgp.Config, "3dgp.py", "", own)
        if given.keys() & {"out", "resume"}:
            raise tdgp.UserError("--options: neither --out nor --resume can be the same for all runs")
        cfg = tdgp.make_config(given)
        tdgp.validate(cfg, 1)

        folder = Path(options.out, f"{variant.name}-{seed}")
        trial = Trial(variant, folder, own, [*own, options.metrics, options.detectors])
        if trial.read().get("asked", trial.asked) != trial.asked:
            raise tdgp.UserError(f"{folder}: was run with other options; name another --out")
        trials.append(trial)
    return trials, math.ceil(cfg.kimg * 1000 / cfg.batch_size) * cfg.batch_size


def call(program, argv, trial, lock, progress):
    """Runs a program of ours; it ends when this one does, and holds the lock. -> "", or what went wrong"""
    log = trial.folder.with_suffix(".log")
    with open(log, "a") as f:
        how = dict(stdout=f, stderr=f, pass_fds=[lock.fileno()], preexec_fn=tdgp.stop_with_parent)
        process = subprocess.Popen([sys.executable, str(program), *argv], **how)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            progress()
    finally:
        process.wait()  # after Ctrl-C it saves what it has

    if process.returncode == 0:
        return ""
    said = log.read_text(errors="replace").strip().splitlines() or [""]
    return f"{program.name} ended with status {process.returncode}: {said[-1]} ({log})"


def run(trial, images, options, lock, progress):
    """Trains, or goes on, and measures. Divergence is a result; all other trouble ends the experiment."""
    trial.write()
    argv = ["--out", str(trial.folder), "--resume", "auto", *trial.options]
    failed = call(HERE.parent / "3dgp.py", argv, trial, lock, progress)
    if "diverged" in failed:
        return trial.write(failed=failed)
    if failed:
        raise tdgp.UserError(failed)
    kimg, _ = tdgp.checkpoints(trial.folder)[0]
    if round(kimg * 1000) != images:
        raise tdgp.UserError(f"{trial.folder}: was stopped at {kimg:g} kimg; call again to go on")

    found = {}
    reals = json.loads((trial.folder / "config.json").read_text())["reals"]
    common = ["--resume", str(trial.folder), "--reals", str(reals), "--metrics", options.metrics]
    for detector in options.detectors.split():
        argv = [*common, "--detector", detector]
        if failed := call(HERE / "evaluate.py", argv, trial, lock, progress):
            raise tdgp.UserError(failed)
        found.update(report.read_rows(trial.folder / "metrics.jsonl")[-1])
    yaw, pitch, *_ = found.get("camera_w1_posterior", [None] * 6)
    trial.write(**found, **{"W1 of yaw": yaw, "W1 of pitch": pitch})


# ---- Table -------------------------------------------------------------------------------------------------
def mean_curve(trials):
    """Distance of a variant as training measured it -> [(kimg, mean, deviation)] where all seeds have one"""
    values = {}  # {kimg: {seed: distance}}
    for seed, trial in enumerate(trials):
        rows = report.read_rows(trial.folder / "metrics.jsonl")
        names = [name for name in rows[0] if name.startswith("fid")] if rows else []
        for row in rows:  # that at 0 kimg is of the untrained generator
            if names and row.get("kimg", 0) > 0 and 0 < row.get(names[0], 0) < math.inf:
                values.setdefault(row["kimg"], {})[seed] = row[names[0]]  # the last of a kimg
    curve = []
    for kimg, found in sorted(values.items()):
        if len(found) == len(trials):
            distances = list(found.values())
            curve.append((kimg, float(np.mean(distances)), float(np.std(distances))))
    return curve


def reached(curve, goal):
    """At how many kimg a curve first is at the goal or below."""
    return next((f"{kimg:g}" for kimg, mean, _ in curve if mean <= goal), "not reached")


def spread(values):
    """Mean, and deviation if there are several."""
    text = f"{np.mean(values):.3g}" if values else "-"
    return f"{text} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else text


def table(by_variant):
    """Markdown: a row for each variant. by_variant: {name: [Trial]}, the baseline first"""
    columns = {}  # {name: values of each variant}
    for name, trials in by_variant.items():
        for trial in trials:
            for key, value in trial.read().items():
                if re.search(SHOWN, key) and isinstance(value, float):
                    columns.setdefault(key, {}).setdefault(name, []).append(value)

    heads = ["variant", *columns, "kimg to the baseline's last distance", "the paper says"]
    lines = [heads, ["---"] * len(heads)]
    baseline = mean_curve(next(iter(by_variant.values())))
    for name, trials in by_variant.items():
        variant = trials[0].variant
        cells = [spread(values.get(name, [])) for values in columns.values()]
        compared = baseline and variant.comparable
        cells.append(reached(mean_curve(trials), baseline[-1][1]) if compared else "-")
        failed = len([trial for trial in trials if "failed" in trial.read()])
        note = f" ({failed} runs diverged)" if failed else ""
        lines.append([name, *cells, variant.claim + note])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# ---- Pictures ----------------------------------------------------------------------------------------------
def draw_curves(by_variant):
    """Distance over kimg, logarithmic: a line for each variant, its deviation as a band. -> PIL image"""
    curves = {name: mean_curve(trials) for name, trials in by_variant.items()}
    points = np.array(sum(curves.values(), []) or [(1, 1, 0)])  # (N, 3)
    right = points[:, 0].max()
    low = math.log(points[:, 1].min() / 1.2)
    high = math.log(points[:, 1].max() * 1.2)

    def at(kimg, distance):
        """The drawing fills 640 x 360 pixels, from (60, 20) on."""
        share = (math.log(max(distance, 1e-9)) - low) / (high - low)
        return 60 + 640 * kimg / right, 380 - 360 * min(max(share, 0), 1)

    image = Image.new("RGB", (840, 420), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(14)
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = math.exp(low + share * (high - low))
        draw.line([at(0, value), at(right, value)], "#dddddd")
        draw.text((54, at(0, value)[1]), f"{value:.3g}", "black", font, "rm")
    draw.text((700, 386), f"{right:g} kimg", "black", font, "ra")

    for line, (name, curve) in enumerate(curves.items()):
        color = report.COLORS[line]
        upper = [at(kimg, mean + deviation) for kimg, mean, deviation in curve]
        lower = [at(kimg, mean - deviation) for kimg, mean, deviation in reversed(curve)]
        if len(curve) > 1:
            draw.polygon(upper + lower, color + "30")
        draw.line([at(kimg, mean) for kimg, mean, _ in curve], color, 2)
        for kimg, mean, _ in curve:
            draw.circle(at(kimg, mean), 3, color)
        draw.text((716, 30 + 22 * line), name, color, font, "la")
    return image


def draw_samples(by_variant):
    """The first row of the last samples of each variant's first run, with its name. -> PIL image"""
    rows = []
    for name, trials in by_variant.items():
        samples = Image.open(max(trials[0].folder.glob("samples-*.png")))
        row = Image.new("RGB", (samples.width, 20 + samples.height // 4), "white")  # of four rows of scenes
        row.paste(samples, (0, 20))
        ImageDraw.Draw(row).text((4, 2), name, "black", ImageFont.load_default(14))
        rows.append(np.asarray(row))
    return Image.fromarray(np.concatenate(rows))


# ---- Command line ------------------------------------------------------------------------------------------
def ablate(options):
    """All runs that are missing, then the table and the pictures."""
    if options.experiment not in EXPERIMENTS:
        raise tdgp.UserError(f"{options.experiment}: must be one of {', '.join(EXPERIMENTS)}")
    if options.seeds < 1:
        raise tdgp.UserError(f"--seeds {options.seeds}: must be positive")
    options.out = options.out or f"runs/ablate-{options.experiment}"
    out = Path(options.out)
    trials, images = plan(options)

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock, tqdm(total=len(trials) * images, unit="img") as bar:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # runs hold it too, and may end a little later
        except OSError:
            raise tdgp.UserError(f"{out}: another ablate.py or a run of it is still at work") from None

        for number, trial in enumerate(trials):
            bar.set_description(trial.folder.name)

            def progress(before=number * images, trial=trial):
                bar.update(before + trial.images() - bar.n)

            if not trial.read().keys() & {"kimg", "failed"}:
                run(trial, images, options, lock, progress)
            bar.update((number + 1) * images - bar.n)

    by_variant = {}
    for trial in trials:
        by_variant.setdefault(trial.variant.name, []).append(trial)
    text = table(by_variant)
    with tdgp.atomic(out / "table.md") as temporary:
        temporary.write_text(text, "utf-8")
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
