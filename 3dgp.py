"""3DGP: a 3D GAN for any category, learned from unposed photographs. The whole method in this one file. Run it:
    python 3dgp.py                                    # the `shapes` data on a CPU or one GPU; downloads nothing
    python 3dgp.py --data photos/                     # your own pictures; lereS_depth.py estimates their depth first
    torchrun --nproc_per_node=8 3dgp.py --data imagenet
    python 3dgp.py --help                             # every option, with its default
Method: Skorokhodov et al., "3D generation on ImageNet", ICLR 2023. Sections, in the paper's order: config, data, ops,
camera, rendering, generator, discriminator, losses, metrics, training, sampling, bench, main.
One sample's way from z to loss: `synthesize` (generator) -> `Discriminator` -> `generator_pass`, `training_step`.
Shapes in comments: B batch, P patch resolution, T tri-plane resolution, C tri-plane features, N points, R rays,
S samples on a ray. Images are float in [-1, 1], depth in world units, angles in radians except fov (degrees)."""
import argparse, base64, contextlib, ctypes, dataclasses, datetime, functools, hashlib, html, io, json, logging, math
import os, platform, re, shutil, signal, subprocess, sys, tempfile, time, typing, warnings, zipfile, zlib
from pathlib import Path

import numpy as np
import PIL.Image, PIL.ImageDraw, PIL.ImageFont, PIL.ImageOps
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

class UserError(Exception):
    """A mistake the user can mend. `main` prints it as one line and exits with status 2."""
class MissingDepth(UserError):
    """A data set of photographs alone."""

# ---- Config: one dataclass is the command line, its help and the record in config.json -------------------------------
def opt(default, help: str, *choices):
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices or None))
METRICS_HELP = "of fid, kid, is, pr, each with a number of images (fid50k,pr10k), and nfs (nfs256)"
DETECTOR_HELP = "what compares images: inception (downloaded), its file, timm:NAME[:WEIGHTS], or area8, area averages"
@dataclasses.dataclass
class Config:
    """Every hyperparameter, as published at 256²; PRESETS, DATA_PRESETS override. kimg: thousands of images shown."""
    data: str = opt("shapes", "shapes, imagenet, dogs, elephants, horses, or a folder or zip of images")
    out: str = opt("", "run folder (empty: runs/<data>, numbered when that is taken)")
    preset: str = opt("", "model size (empty: the one that suits --data)", "tiny", "small", "base", "imagenet")
    resume: str = opt("", "'latest' (of --out), a checkpoint's path, or 'auto': latest if there is one, else a new run")
    seed: int = opt(0, "all draws of a run are a function of this and the step")
    device: str = opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")
    workers: int = opt(4, "data loading processes per training process (0: load in the training process)")
    mirror: bool = opt(True, "horizontal flips double the data")
    depth: str = opt("auto", "auto: files beside the images, or LeReS; none: train on RGB alone", "auto", "none")
    depth_weights: str = opt("", "LeReS checkpoint for photographs without depth (empty: downloaded once)")
    depth_distortion: float = opt(1.0, "shapes only: how wrong the 'estimated' depth is (0: a copy of the true depth)")
    # sizes (the first two are set from the data and the teacher)
    num_classes: int = opt(0, "number of classes (0: none)")
    teacher_dim: int = opt(0, "size of the teacher's features (0: no distillation head)")
    resolution: int = opt(256, "image resolution")
    patch_resolution: int = opt(64, "patch resolution: what is rendered and what the discriminator sees")
    triplane_resolution: int = opt(512, "tri-plane resolution T")
    triplane_features: int = opt(32, "features per plane C")
    channel_base: int = opt(32768, "channels at resolution r are min(channel_base / r, channel_max)")
    channel_max: int = opt(512, "see channel_base")
    adaptor_channels: int = opt(64, "channels of the depth adaptor")
    z_dim: int = opt(512, "size of z")
    w_dim: int = opt(512, "size of w")
    coarse_samples: int = opt(32, "stratified samples on a ray")
    fine_samples: int = opt(32, "importance samples on a ray")
    # camera: the prior's ranges (yaw and pitch in radians, fov in degrees), the bounds of a ray, the tri-plane box
    camera: str = opt("learned", "camera distribution", "learned", "prior", "frontal")
    prior_yaw: tuple[float, float] = opt((-1.57, 1.57), "prior range of yaw")
    prior_pitch: tuple[float, float] = opt((math.pi / 4, 3 * math.pi / 4), "prior range of pitch (pi/2: the horizon)")
    prior_fov: tuple[float, float] = opt((10.0, 45.0), "prior range of the field of view")
    prior_look_at: tuple[float, float] = opt((0.0, 0.2), "prior range of the look-at point's radius")
    near: float = opt(0.75, "where rays begin")
    far: float = opt(1.25, "where rays end")
    box: float = opt(0.5, "half size of the tri-plane box")
    # camera generator, depth adaptor, distillation
    camera_reg: str = opt("emd", "keeps the camera posterior from collapsing", "emd", "grad", "none")
    camera_reg_weights: tuple[float, float, float, float] = opt((2.0, 2.0, 1e-4, 1e-4), "for yaw, pitch, fov, look-at")
    camera_reg_units: str = opt("natural", "unit of the EMD: radians, degrees; shares of the prior", "natural", "range")
    camera_reg_kimg: float = opt(10_000, "the camera regulariser's weight grows from 0 to full over this")
    camera_center: float = opt(10.0, "weight of the distance between the mean posterior direction and the prior's")
    camera_lr_mult: float = opt(0.1, "learning-rate multiplier of the camera generator")
    depth_adaptor: str = opt("random", "how often D sees adapted depth", "random", "never", "half", "always")
    adaptor_kimg: float = opt(10_000, "share of un-adapted depth falls from 1/4 to 0.1 over this (random)")
    teacher: str = opt("none", "frozen classifier to distil: a timm name, or none (shapes: none; published: resnet50)")
    teacher_weights: str = opt("", "local file with the teacher's weights (empty: timm downloads them)")
    kd_weight: float = opt(1.0, "initial weight of the distillation")
    kd_kimg: float = opt(100_000, "the distillation's weight falls to 0 over this")
    # patches, blur, noise
    patch_beta: tuple[float, float] = opt((0.001, 0.8), "b of the patch scale's Beta(1, b): at the start, in the end")
    patch_kimg: float = opt(10_000, "b grows over this")
    blur_sigma: float = opt(10.0, "blur of everything the discriminator sees at the start, in pixels")
    blur_kimg: float = opt(200, "the blur falls to 0 over this")
    density_noise: float = opt(1.0, "standard deviation of the noise on densities at the start")
    density_noise_kimg: float = opt(5_000, "the density noise falls to 0 over this")
    # optimisation
    kimg: float = opt(25_000, "length of the run in thousands of images")
    batch_size: int = opt(64, "images per step, over all processes")
    batch_gpu: int = opt(0, "images per pass, a multiple of 4; gradients add up over passes (0: what memory holds)")
    g_lr: float = opt(0.0025, "generator's learning rate")
    d_lr: float = opt(0.002, "discriminator's learning rate")
    r1_gamma: float = opt(0.05, "weight of R1")
    r1_interval: int = opt(16, "R1 is computed every so many steps")
    ema_kimg: float = opt(20, "half life of the generator's moving average")
    ema_rampup: float = opt(0.05, "the half life is at most this share of the images seen")
    precision: str = opt("tf32", "arithmetic of the networks; on CPUs tf32 is fp32", "fp32", "tf32", "bf16")
    compile: bool = opt(False, "torch.compile the networks, but not for the steps with R1; takes minutes at the start")
    fused: bool = opt(True, "look points up with custom_ops.cu where it compiles, not with PyTorch's own operators")
    guard: str = opt("on", "on divergence (see GUARD in the file) go back to an earlier checkpoint", "on", "off")
    timeout: float = opt(600, "seconds after which a process that does not answer ends the run")
    recoveries: tuple[float, ...] = ()    # kimg of the checkpoints gone back to, set by the guard
    # output
    snapshot_kimg: float = opt(200, "write checkpoint and samples every so many kimg; old ones are thinned out")
    log_kimg: float = opt(4, "write a line of log.jsonl every so many kimg")
    metrics: str = opt("fid2k", METRICS_HELP + "; the first one tells which checkpoint is best.pt; empty: none")
    metrics_kimg: float = opt(200, "measure every so many kimg")
    detector: str = opt("inception", DETECTOR_HELP)
    reals: int = opt(0, "images of the data that samples are compared with (0: all)")
@dataclasses.dataclass
class SampleConfig:   # one sample for each of the classes and seeds
    resume: str = opt("", "checkpoint, or run folder (its newest)")
    out: str = opt("", "folder to write into (empty: samples-<kimg> beside the checkpoint)")
    classes: str = opt("", "which classes, as in 1,5,10-20 (empty: the first 8)")
    seeds: str = opt("0-3", "which seeds, likewise; a seed is a z and a draw of the camera")
    truncation: float = opt(1.0, "draws w to the mean w of its class: 1 leaves it, 0 is that mean")
    resolution: int = opt(0, "side of the pictures (0: as trained)")
    each: bool = opt(False, "one picture or animation of each sample, not one of all")
    video: str = opt("none", "animation from the mean camera on", "none", "orbit", "wiggle", "line", "zoom")
    interpolate: bool = opt(False, "animation that walks from each sample to the next and back to the first")
    frames: int = opt(64, "frames of an animation (of each step of a walk)")
    fps: float = opt(25.0, "frames per second")
    angle: float = opt(0.4, "how far an animation turns to each side, in radians")
    mesh: bool = opt(False, "coloured triangle mesh of the densities (PLY); needs scikit-image")
    mesh_resolution: int = opt(192, "points on a side of the grid for the mesh")
    mesh_level: float = opt(10.0, "density at the mesh's surface, per world unit")
    points: bool = opt(False, "coloured point cloud of the rendered depth (PLY)")
    depth: bool = opt(False, "16-bit PNGs of depth: rendered (0 near, 65535 far), and adapted")
    cameras: bool = opt(False, "figure of the learned camera distribution beside the prior")
    device: str = opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")
@dataclasses.dataclass
class EvalConfig:
    resume: str = opt("", "checkpoint, or run folder (its newest)")
    data: str = opt("", "data to compare with (empty: what it was trained on)")
    metrics: str = opt("fid50k,nfs256", METRICS_HELP)
    detector: str = opt("inception", DETECTOR_HELP)
    reals: int = opt(0, "images of the data that samples are compared with (0: all)")
    device: str = opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")
@dataclasses.dataclass
class ReportConfig:
    runs: list[str] = opt(..., "folders of runs")
    out: str = opt("", "file to write (empty: report.html in the first run's folder)")
@dataclasses.dataclass
class BenchConfig(Config):   # these, and those of train
    what: str = opt("triplane", "tri-plane query, training step (on shapes whatever --data is), or making pictures",
                    "triplane", "step", "render")
    preset: str = opt("small", "model size; compared, compared-small: as the published implementation was measured",
                      "tiny", "small", "base", "imagenet", "compared", "compared-small")
    repeats: int = opt(9, "timings of each row, after one to warm up; the median counts")
    json: bool = opt(False, "print JSON, not a table")
# tiny and small are short runs: with the published units of the EMD, their field of view would stay at its upper end.
SHORT = dict(camera_reg_units="range", camera_reg_weights=(20.0, 10.0, 20.0, 2.0), camera_lr_mult=1.0)
PRESETS = {
    "tiny": dict(resolution=32, patch_resolution=32, triplane_resolution=32, triplane_features=16, channel_base=2048,
                 channel_max=64, adaptor_channels=16, z_dim=64, w_dim=64, coarse_samples=8, fine_samples=8,
                 batch_size=8, kimg=18, r1_gamma=0.5, ema_kimg=0.5, density_noise_kimg=2, adaptor_kimg=5,
                 camera_reg_kimg=2, patch_kimg=7, blur_sigma=2.0, blur_kimg=1, snapshot_kimg=4.5, log_kimg=0.25,
                 metrics="fid1k,nfs64", metrics_kimg=4.5, detector="area8", reals=1024, workers=1, **SHORT),
    "small": dict(resolution=64, patch_resolution=64, triplane_resolution=128, triplane_features=32, channel_base=8192,
                  channel_max=256, z_dim=128, w_dim=128, coarse_samples=24, fine_samples=24, batch_size=32,
                  kimg=400, r1_gamma=0.5, ema_kimg=4, density_noise_kimg=80, adaptor_kimg=160,
                  camera_reg_kimg=120, patch_kimg=160, blur_sigma=4.0, blur_kimg=10, snapshot_kimg=25, log_kimg=1,
                  metrics="fid2k,nfs64", metrics_kimg=25, detector="area8", reals=2048, **SHORT),
    "base": dict(), "imagenet": dict(channel_base=65536, channel_max=1024),
    # seconds an image of the published G, D and R1 on 2 CPU cores, in one pass: 7.97, 2.93, 1.36; 0.076, 0.036, 0.009
    "compared": dict(batch_size=4, num_classes=1000),
    "compared-small": dict(resolution=64, patch_resolution=32, triplane_resolution=64, channel_base=2048, num_classes=8,
                           channel_max=64, coarse_samples=16, fine_samples=16, batch_size=16)}
DATA_PRESETS = {   # the published data sets; the small ones have a faster camera schedule
    "shapes": dict(preset="tiny"), "imagenet": dict(preset="imagenet", teacher="resnet50"),
    **{k: dict(preset="base", teacher="resnet50", camera_reg_kimg=3_000) for k in ("dogs", "elephants", "horses")}}
# Divergence, by the means over a log interval, and what then happens
GUARD = dict(nonfinite=0.01,            # more than this share of the gradients is not finite (or a loss is not)
             score=50,                  # D is saturated: scores of reals or fakes are as far as this from 0
             loss_g=5, r1=10, window=32, least=8,   # so many times the median of 32 log intervals, 8 at least,
             floor_g=10, floor_r1=1,    # and above its floor: a loss, and R1's term in D's loss
             fake_std=0.1,              # less than this share of that median: all pixels are alike
             distance=2,                # the first metric, if a Frechet distance, is so many times the best of the run
             slow_kimg=200,             # after going back the learning rates are halved for so long
             tries=3, tries_kimg=1000)  # the run ends after so many recoveries within so many kimg
MBSTD_GROUP = 4  # mini-batch standard deviation compares so many images; they share one patch
def schedules(cfg, kimg):
    """Everything that changes with the number of images seen: linearly from start to end, then constant."""
    line = lambda start, end, over: end if kimg >= over else start + (end - start) * kimg / over
    return dict(blur_sigma=line(cfg.blur_sigma, 0, cfg.blur_kimg), patch_beta=line(*cfg.patch_beta, cfg.patch_kimg),
                density_noise=line(cfg.density_noise, 0, cfg.density_noise_kimg),
                raw_depth_share=line(1 / 4, 0.1, cfg.adaptor_kimg), kd_weight=cfg.kd_weight * line(1, 0, cfg.kd_kimg),
                camera_reg_weight=line(0, 1, cfg.camera_reg_kimg),
                lr_factor=0.5 ** sum(x <= kimg < x + GUARD["slow_kimg"] for x in cfg.recoveries))

# ---- Data: a folder or zip of images, or `shapes`, which the program draws itself ------------------------------------
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
def to_rgb(image):
    """Any PIL image, upright and as RGB; transparency over white, 16-bit gray scaled to 8."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
def crop_resize(image, resolution, filter):  # the largest centred square, resized
    return PIL.ImageOps.fit(image, (resolution, resolution), filter)
def read_depth(png):
    """Depth from the bytes of a PNG of any bit depth. -> float32 (H, W)"""
    if wide := png[:8] == b"\x89PNG\r\n\x1a\n" and png[24:26] == b"\x10\x04":   # 16-bit gray and alpha, as published,
        header = png[12:24] + b"\x08\x06" + png[26:29]          # cut to 8 by PIL; whole if declared 8-bit RGBA
        png = png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    with PIL.Image.open(io.BytesIO(png)) as f:
        d = np.atleast_3d(np.asarray(f.convert("L") if f.mode == "P" else f).astype(np.float32))
    return d[..., 0] * 256 + d[..., 1] if wide else d[..., 0]
class ImageData:
    """Images of a folder or zip: flat, or one folder per class, or with dataset.json; depth in `<name>_depth.png`.
    An item is a dict: image uint8 (3, R, R); depth float32 (1, R, R) in [-1, 1], larger is farther, if cfg.depth wants
    it; label; bad: names of unreadable files met (the item is then the next readable one)."""
    MAX_BAD_RUN, MAX_SECONDS = 100, 60   # so many unreadable images in a row, or so long without one, end the search
    READ_SECONDS, MAX_BYTES = 10, 2 ** 28   # how long data workers wait for a file; larger files are refused
    def __init__(self, cfg, source):
        self.source, self.resolution, self.use_depth = Path(source), cfg.resolution, cfg.depth != "none"
        if self.source.is_dir():
            files, seen = [], set()
            def refuse(e):
                raise UserError(f"--data {source}: cannot read the folder {e.filename} ({e.strerror})")
            for path, folders, members in os.walk(self.source, followlinks=True, onerror=refuse):
                if (real := os.path.realpath(path)) in seen or "prepared.json" in members and Path(path) != self.source:
                    folders[:] = members[:] = []    # links can make circles; lereS_depth.py may have written below
                seen.add(real)
                files += [os.path.relpath(os.path.join(path, f), self.source) for f in members]
        else:
            try:
                files = [i.filename for i in self.archive(os.getpid()).infolist() if not i.is_dir()]
            except Exception as e:  # zipfile raises many kinds
                raise UserError(f"--data {source}: neither a folder nor a zip file ({e})") from None
        if unsafe := [f for f in files if Path(f).is_absolute() or ".." in Path(f).parts]:
            raise UserError(f"--data {source}: a member leads out of the archive: {unsafe[0]}")
        sheets = {f.removesuffix("prepared.json") + "depth.png" for f in files if Path(f).name == "prepared.json"}
        names = sorted(f for f in set(files) - sheets if Path(f).suffix.lower() in IMAGE_SUFFIXES
                       and not any(part.startswith((".", "__MACOSX")) for part in Path(f).parts))
        depths = {f for f in names if f.endswith("_depth.png")}
        self.names = [f for f in names if f not in depths]
        if not self.names:
            raise UserError(f"--data {source}: no images in it (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
        if self.use_depth and (missing := [f for f in self.names if self.depth_name(f) not in depths]):
            kind = UserError if len(missing) < len(self.names) else MissingDepth
            raise kind(f"--data {source}: {len(missing)} of {len(self.names)} images have no depth, the first is "
                       f"{missing[0]}; prepare them with lereS_depth.py, or train on RGB alone with --depth none")
        self.labels = self.read_labels(files)
        self.num_classes = int(self.labels.max(initial=-1)) + 1
    depth_name = staticmethod(lambda name: str(Path(name).with_suffix("")) + "_depth.png")
    def read_labels(self, files):
        """Class of every image, from dataset.json or the first-level folders. -> int64 (N,), empty without classes"""
        top = os.path.commonpath([os.path.dirname(f) for f in self.names])  # folders that hold everything do not count
        if listing := next((f for f in ("dataset.json", os.path.join(top, "dataset.json")) if f in files), None):
            try:
                listed = json.loads(self.read(listing))["labels"]
                table = {os.path.join(os.path.dirname(listing), name): int(label) for name, label in listed or []}
                if table and not 0 <= min(table.values()) <= max(table.values()) < 100_000:
                    raise ValueError("classes must be numbers from 0 to 99,999")
            except Exception as e:  # whatever a damaged file leads to
                raise UserError(f'--data {self.source}: dataset.json is not of the form {{"labels": [["file", class], '
                                f'...]}} ({e})') from None
        else:
            parts = {f: Path(f).relative_to(top).parts for f in self.names}
            folders = sorted({p[0] for p in parts.values() if len(p) > 1})
            table = {f: folders.index(p[0]) for f, p in parts.items() if len(p) > 1}
        if table and (unlabelled := [f for f in self.names if f not in table]):
            raise UserError(f"--data {self.source}: no label for {len(unlabelled)} images, the first is {unlabelled[0]}"
                            f" ({'name it in dataset.json' if listing else 'move it into the folder of its class'})")
        return np.array([table[f] for f in self.names if table], np.int64)
    @functools.lru_cache(4)
    def archive(self, pid):  # the open zip, one for each process: workers must not share a file position
        return zipfile.ZipFile(self.source)
    def read(self, name, tries=3):
        """-> bytes of one member. Drives fail and stall: tries again; data workers wait READ_SECONDS at most."""
        alarm = signal.alarm if torch.utils.data.get_worker_info() else (lambda seconds: None)   # see start_worker
        try:
            alarm(self.READ_SECONDS)
            path, zipped = self.source / name, not self.source.is_dir()
            if not zipped and not path.is_file():
                raise FileNotFoundError(f"{name}: not a file")
            if (self.archive(os.getpid()).getinfo(name).file_size if zipped else path.stat().st_size) > self.MAX_BYTES:
                raise ValueError(f"{name}: too large")
            return self.archive(os.getpid()).read(name) if zipped else path.read_bytes()
        except OSError:
            if tries == 1:
                raise
            self.archive.cache_clear()
        finally:
            alarm(0)
        time.sleep(1 / tries)
        return self.read(name, tries - 1)
    def fingerprint(self):  # tells apart data that differ, without reading them all
        found = ([(i.filename, i.CRC) for i in self.archive(os.getpid()).infolist()] if self.source.is_file() else
                 [(f, s.st_size, s.st_mtime_ns) for f in self.names for s in [(self.source / f).stat()]])
        return hashlib.sha256(repr((found, self.labels.tolist())).encode()).hexdigest()
    __len__ = lambda self: len(self.names)
    def decode(self, i):
        with PIL.Image.open(io.BytesIO(self.read(self.names[i]))) as f:
            image = np.asarray(crop_resize(to_rgb(f), self.resolution, PIL.Image.LANCZOS))
        item = dict(image=torch.from_numpy(image.transpose(2, 0, 1).copy()))
        if self.use_depth:
            d = PIL.Image.fromarray(read_depth(self.read(self.depth_name(self.names[i]))))
            d = np.asarray(crop_resize(d, self.resolution, PIL.Image.BILINEAR))
            if not np.isfinite(d).all():
                raise ValueError("depth is not finite")
            item["depth"] = torch.from_numpy(2 * (d - d.min()) / max(d.max() - d.min(), 1e-6) - 1)[None]
        return item
    def __getitem__(self, i):
        bad, start = [], time.time()
        while len(bad) < min(self.MAX_BAD_RUN, len(self)) and time.time() < start + self.MAX_SECONDS:
            try:
                return dict(self.decode(i), label=int(self.labels[i]) if self.num_classes else 0, bad=bad)
            except Exception:  # decoders of damaged files raise anything
                bad, i = [*bad, self.names[i]], (i + 1) % len(self)
        self.MAX_SECONDS = 0    # the run ends: the rest of the batch need not be waited for
        return dict(bad=bad)
length = lambda *coords: np.sqrt(sum(c * c for c in coords))
# Signed distance of each solid from points (x, y, z), y up; about one unit in size, standing on y = -1 or higher.
SOLIDS = {
    "sphere": lambda x, y, z: length(x, y, z) - 1,
    "box": lambda x, y, z: np.maximum(np.maximum(abs(x), abs(z)) - 0.75, abs(y) - 1),
    "cylinder": lambda x, y, z: np.maximum(length(x, z) - 0.7, abs(y) - 1),
    "cone": lambda x, y, z: np.maximum(0.9 * (length(x, z) - 0.48 * (1 - y)), -1 - y),
    "torus": lambda x, y, z: length(length(x, y) - 0.68, z) - 0.32,
    "capsule": lambda x, y, z: length(x, y - y.clip(-0.5, 0.5), z) - 0.5,
    "octahedron": lambda x, y, z: (abs(x) + abs(y) + abs(z) - 1.1) * 0.577,
    "snowman": lambda x, y, z: np.minimum(length(x, y + 0.4, z) - 0.6, length(x, y - 0.45, z) - 0.45)}
class ShapesData:
    """Solids on a checkered ground under a sky, from cameras whose distribution is known. Item i is a function of i
    alone: ImageData's entries, true_depth float32 (1, R, R) in world units (sky: cfg.far), camera float32 (6,) in the
    order of CAMERA_PARAMETERS. Estimated depth is the true one, normalised, to some power, with a smooth error."""
    num_classes, GROUND, __len__ = len(SOLIDS), -0.11, lambda self: 40_000
    def __init__(self, cfg):
        self.resolution, self.use_depth, self.distortion = cfg.resolution, cfg.depth != "none", cfg.depth_distortion
        self.far, self.labels = cfg.far, np.arange(len(self)) % self.num_classes
    def fingerprint(self):
        return "shapes", self.distortion, self.far, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    @staticmethod
    def true_camera(rng, label):  # -> (6,): what the camera generator must find, narrower than the prior, fov by class
        return np.array([rng.normal(0, 0.35), rng.normal(math.pi / 2 - 0.25, 0.1), 17 + 2 * label + rng.normal(0, 0.5),
                         rng.normal(0, 0.6), rng.normal(math.pi / 2, 0.3), rng.uniform(0, 0.06)], np.float32)
    def true_cameras(self, n):
        return torch.from_numpy(np.stack([*map(self.true_camera, map(np.random.default_rng, range(n)), self.labels)]))
    def __getitem__(self, i):
        rng, label, finer = np.random.default_rng(i), int(self.labels[i]), 2 if self.resolution <= 64 else 1
        c = torch.from_numpy(self.true_camera(rng, label))[None]
        origin, ray = camera_rays(Camera(*c[:, :3].T, torch.ones(1), c[:, 3:]), self.resolution * finer)
        origin, ray = origin[0, 0].numpy(), ray[0].numpy()                            # (3,), (R², 3)
        up = np.clip(ray[:, 1:2] * 1.5 + 0.75, 0, 1)     # sky; on it checkered ground out to `far`, dark near the solid
        color = (1 - up) * np.array([0.78, 0.86, 0.93]) + up * np.array([0.36, 0.55, 0.85])
        t = (self.GROUND - origin[1]) / np.minimum(ray[:, 1], -1e-6)
        on, depth = np.flatnonzero(t < self.far), np.minimum(t, self.far)
        p, scale = origin + t[on, None] * ray[on], rng.uniform(0.065, 0.095)
        center = np.array([rng.uniform(-0.05, 0.05), self.GROUND + scale, rng.uniform(-0.05, 0.05)])
        ground = (0.42 + 0.3 * (np.floor(p[:, [0, 2]] / 0.1).sum(1, keepdims=True) % 2)) * np.array([1.0, 0.93, 0.82])
        ground = ground * (1 - 0.55 * np.exp(-((p - center)[:, [0, 2]] ** 2).sum(1) / scale ** 2))[:, None]
        fog = np.clip((t[on, None] - 1.1) / (self.far - 1.1), 0, 1) ** 2
        color[on] = (1 - fog) * ground + fog * color[on]
        sdf, angle = list(SOLIDS.values())[label], rng.uniform(0, 2 * math.pi)
        turn = np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
        o, d = turn @ (origin - center) / scale, (ray @ turn.T).astype(np.float64)
        middle = -(d @ o)          # sphere tracing of the rays that meet the solid's bounding ball
        hit = np.flatnonzero((gap := 1.5 ** 2 - (o @ o - middle ** 2)) > 0)
        d, s = d[hit], middle[hit] - np.sqrt(gap[hit])
        for _ in range(32):
            s = s + (distance := sdf(*(o + s[:, None] * d).T))
        on = (distance < 0.02) & (s * scale < depth[hit])
        hit, d, s = hit[on], d[on], s[on]
        p = o + s[:, None] * d
        normal = np.stack([sdf(*(p + e).T) - sdf(*(p - e).T) for e in 1e-3 * np.eye(3)], 1)
        normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        shade = 0.4 + 0.6 * np.maximum(normal @ (turn @ np.array([0, 0.8, 0.6])), 0)
        # colour: a hue near the class's own, in bands (even classes) or sectors (odd) of two tones
        hue, value, saturation = label / len(SOLIDS) + rng.normal(0, 0.02), rng.uniform(0.75, 1), rng.uniform(0.7, 0.95)
        rgb = value * (1 - saturation * np.clip(abs((hue * 6 + np.array([3, 1, 5])) % 6 - 3) - 1, 0, 1))
        band = np.sin(7 * p[:, 1] + 1) if label % 2 == 0 else np.sin(3 * np.arctan2(p[:, 2], p[:, 0]))
        color[hit], depth[hit] = rgb * (shade * np.where(band > 0, 1.0, 0.55))[:, None], s * scale
        small = (self.resolution, finer, self.resolution, finer)        # average: the nearest depth would flicker
        image, depth = color.reshape(*small, 3).mean((1, 3)).clip(0, 1), depth.reshape(small).mean((1, 3))
        return dict(image=torch.from_numpy((image.transpose(2, 0, 1) * 255).round().astype(np.uint8)), label=label,
                    true_depth=torch.from_numpy(depth[None].astype(np.float32)), camera=c[0], bad=[],
                    **(dict(depth=self.estimate(rng, depth)) if self.use_depth else {}))
    def estimate(self, rng, depth):  # true (R, R) -> float32 (1, R, R) in [-1, 1], as a monocular estimator might say
        k, R, pad = self.distortion, self.resolution, self.resolution // 8
        d = ((depth - depth.min()) / max(depth.max() - depth.min(), 1e-6)) ** (1 + k * (rng.uniform(0.5, 1.1) - 1))
        u, v = np.cos(np.outer([1, 2], np.linspace(0, math.pi, R)) + rng.uniform(0, 2 * math.pi, (2, 1)))
        d = torch.from_numpy(d + k * 0.04 * (u[:, None] * u + v[:, None] * v))[None, None]
        d = blur(F.pad(d, (pad,) * 4, mode="replicate"), k * R / 64)[0, :, pad:-pad, pad:-pad]
        return (2 * (d - d.min()) / max(d.max() - d.min(), 1e-6) - 1).float()
def open_data(cfg):
    """The data set that cfg.data names. Photographs without depth are prepared first."""
    if cfg.data == "shapes":
        return ShapesData(cfg)
    root = Path(os.environ.get("DATA_DIR", "data"))
    places = [root / cfg.data, root / f"{cfg.data}.zip"] if cfg.data in DATA_PRESETS else [Path(cfg.data)]
    if (source := next((s for s in places if s.exists()), None)) is None:
        raise UserError(f"--data {cfg.data}: no such file or folder ({' or '.join(map(str, places))}); give a path, or "
                        f"one of {', '.join(DATA_PRESETS)}, which are looked for in DATA_DIR")
    try:
        return ImageData(cfg, source)
    except MissingDepth:
        sys.modules.setdefault("tdgp", sys.modules[__name__])   # what lereS_depth knows this file as
        import lereS_depth
        return ImageData(cfg, lereS_depth.prepare_for_training(cfg, source, root))
def collate(items):
    """Stack what can be stacked; failed items carry only their names."""
    bad = [name for item in items for name in item["bad"]]
    keys = [k for k in items[0] if k != "bad"] if all("image" in item for item in items) else []
    return dict(bad=bad, **{k: torch.stack([torch.as_tensor(item[k]) for item in items]) for k in keys})
def real_images(batch, device):
    """A batch as the discriminator sees it: RGB and, if there is any, depth. -> (B, 3 or 4, R, R) in [-1, 1]"""
    if "image" not in batch and (bad := batch["bad"]):
        raise UserError(f"--data: {len({*bad})} images in a row are unreadable or gone, the first is {bad[0]}")
    rgb = batch["image"].to(device, non_blocking=True).float() / 127.5 - 1
    return torch.cat([rgb, batch["depth"].to(device, non_blocking=True)], 1) if "depth" in batch else rgb
class MirroredData(torch.utils.data.Dataset):
    """The data and its mirror image: index n + i is item i flipped."""
    def __init__(self, data):
        self.data = data
    def __getitem__(self, i):
        item = self.data[i % len(self.data)]
        if i >= len(self.data):
            item.update({k: item[k].flip(-1) for k in ("image", "depth", "true_depth") if k in item})
            item.update({k: item[k] * torch.tensor([-1, 1, 1, -1, 1, 1]) for k in ["camera"] if k in item})
        return item
def train_seed(cfg):
    """What a run's draws depend on: another one after each recovery of the guard."""
    return cfg.seed + 2 ** 32 * len(cfg.recoveries)
class Batches:
    """Endless batches of indices for this process from a step on: a function of seed and step, so that a resumed run
    sees what an undisturbed one would. Epochs are permutations of the data (and of its mirror image)."""
    def __init__(self, cfg, n, step, rank, world):
        self.total, self.seed, self.share = n * (2 if cfg.mirror else 1), train_seed(cfg), cfg.batch_size // world
        self.starts = range(step * cfg.batch_size + rank * self.share, sys.maxsize, cfg.batch_size)
    def __iter__(self):
        order = functools.lru_cache(1)(lambda epoch: np.random.default_rng([self.seed, epoch]).permutation(self.total))
        for start in self.starts:
            yield [int(order(k // self.total)[k % self.total]) for k in range(start, start + self.share)]

# ---- Ops: equalised layers (StyleGAN2, Karras et al. 2020), FIR resampling, tri-plane lookup -------------------------
def normalize_2nd_moment(x):
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
# Leaky ReLU's gain of sqrt(2) keeps the variance. It commutes with the activation: put into the weights, it is free.
leaky_relu = functools.partial(F.leaky_relu, negative_slope=0.2)
GAIN = {leaky_relu: math.sqrt(2), F.softplus: 1.0, None: 1.0}
class Linear(nn.Module):
    """Equalised linear layer: weights of unit variance / lr_mult, scaled when used. (B, in) -> (B, out)"""
    def __init__(self, in_features, out_features, activation=None, lr_mult=1.0, bias_init=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mult)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self.activation, self.scale = activation, lr_mult * GAIN[activation]
    def effective(self):
        return self.weight * (self.scale / math.sqrt(self.weight.shape[1])), self.bias * self.scale
    def forward(self, x):
        x = F.linear(x, *self.effective())
        return self.activation(x) if self.activation else x
class Conv2d(nn.Module):
    """Equalised convolution that keeps the size; down=2 filters, then halves it. (B, in, H, W) -> (B, out, ., .)"""
    def __init__(self, in_channels, out_channels, kernel_size, activation=None, bias=True, down=1, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.activation, self.down, self.gain = activation, down, gain * GAIN[activation]
    def forward(self, x):
        padding, stride = self.weight.shape[2] // 2, self.down
        if self.down == 2:  # the FIR's own padding, and then the convolution's; a 1x1 one reads every other pixel alone
            x, padding, stride = (fir_filter(x, padding + 1), 0, 2) if padding else (fir_filter(x, 1, stride=2), 0, 1)
        weight = (self.weight * (self.gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        x = F.conv2d(x, weight, None if self.bias is None else (self.bias * self.gain).to(x.dtype), stride, padding)
        return self.activation(x) if self.activation else x
def fir_filter(x, padding, gain=1.0, stride=1):
    """Low-pass with the separable filter [1, 3, 3, 1] / 8, zero padding. (B, C, H, W) -> (B, C, H+2p-3, W+2p-3)"""
    f = x.new_tensor([1.0, 3.0, 3.0, 1.0]) * (math.sqrt(gain) / 8)
    return F.conv2d(x, (f[:, None] * f).expand(x.shape[1], 1, 4, 4), None, stride, padding, groups=x.shape[1])
def upsample(x):
    """Factor 2: zeros between pixels, then the FIR with gain 4, as one polyphase step: an output pixel is 3/4 of its
    nearest input pixel and 1/4 of the next one, in both directions. (B, C, H, W) -> (B, C, 2H, 2W)"""
    for dim in (2, 3):
        wide, n = F.pad(x, (0, 0) * (3 - dim) + (1, 1)), x.shape[dim]
        x = torch.stack([x.lerp(wide.narrow(dim, k, n), 0.25) for k in (0, 2)], dim + 1).flatten(dim, dim + 1)
    return x
def sample_triplane(planes, points, box):
    """Mean of the bilinear lookups in planes xy, xz, yz (width, then height); EG3D, Chan et al. 2022, section 4.
    planes (B, 3, C, T, T), zero outside; points (B, N, 3) in world units; box: half size of the planes -> (B, N, C)"""
    uv = torch.stack([points[..., :2], points[..., ::2], points[..., 1:]], 1).flatten(0, 1) / box           # (3B, N, 2)
    features = F.grid_sample(planes.flatten(0, 1), uv[:, None], "bilinear", "zeros", align_corners=True)  # 3B, C, 1, N
    return features.unflatten(0, (-1, 3)).mean(1).squeeze(2).transpose(1, 2)          # (B, N, C)
# The same in one pass. A custom operator and no autograd.Function: torch.compile knows its shapes and leaves it alone.
@functools.cache
def custom_ops(device_type):
    """A function that calls custom_ops.cu on "cuda" or "cpu"; without it None, and one line that says why.
    Compiled once, into TORCH_EXTENSIONS_DIR or PyTorch's own place; its name tells source, target and flags."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)   # it warns of machines without a GPU
    from torch.utils import cpp_extension
    source, cuda = Path(__file__).with_name("custom_ops.cu"), device_type == "cuda"
    say = functools.partial(print, file=sys.stderr, flush=True) if distributed()[2] == 0 else lambda *_, **__: None
    try:
        if cuda:
            target = "sm_%d%d" % torch.cuda.get_device_capability()
            flags = ["-O3", f"-gencode=arch={target.replace('sm', 'compute')},code={target}"]
        else:
            target = torch.backends.cpu.get_cpu_capability()
            flags = ("-x c++ -O3 -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math "
                     + dict(AVX2="-mavx2 -mfma", AVX512="-mavx512f -mavx512vl -mfma").get(target, "")).split()
        options = dict(extra_cuda_cflags=flags) if cuda else dict(extra_cflags=flags, extra_ldflags=["-fopenmp"])
        key = repr((source.read_bytes(), flags, torch.version.cuda, platform.machine()))
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
        library = root / f"3dgp-triplane-{target}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            say(f"compiling custom_ops.cu for {target}, once:", end=" ")
            start = time.time()
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as build:
                cpp_extension.load(library.stem, [str(source)], build_directory=build, with_cuda=cuda,
                                   is_python_module=False, **options)
                os.replace(Path(build, library.name), library)
            say(f"{time.time() - start:.0f} s")
        proto = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_double, ctypes.c_int64)
        function = proto(("triplane", ctypes.CDLL(str(library))))
        def call(dtype, size, pointers, box, context):
            if error := function(dtype, (ctypes.c_int64 * 8)(*size), (ctypes.c_void_p * 8)(*pointers), box, context):
                raise RuntimeError(f"custom_ops.cu: {error.decode()}")
        x = torch.zeros(4, device=device_type)   # try it: a driver may be too old for what compiles
        call(0, [1] * 8, [x.data_ptr(), x.data_ptr(), None, x.data_ptr()], 1, 0 if cuda else 1)
        return call
    except Exception as e:  # no compiler, no ninja, nowhere to write, a build that fails: the plain path does as well
        reason = max(str(e).splitlines() or [type(e).__name__], key=lambda x: "error:" in x or "not found" in x)
        say(f"custom_ops.cu is not used but PyTorch's own operators, with the same results: {reason}")
@torch.compiler.assume_constant_result
def has_custom_ops(device_type):
    return device_type in ("cpu", "cuda") and custom_ops(device_type) is not None
def call_custom_ops(planes, points, box, decoder, *rest):
    """rest: out, grad, grad_planes, grad_points, grad_decoder, or the first of them; empty: none."""
    (B, three, C, T, width), N = planes.shape, points.shape[1]
    dtypes, real = [torch.float32, torch.bfloat16, torch.float64], torch.promote_types(planes.dtype, torch.float32)
    if not has_custom_ops(planes.device.type):
        raise RuntimeError("triplane: custom_ops.cu does not compile here; use sample_triplane")
    padded = 16 if C <= 16 and not planes.is_cuda else 32                             # as in TriplaneDecoder.packed
    if not (planes.dtype in dtypes and three == 3 and T == width and points.shape == (B, N, 3)
            and (len(decoder) == 0 or C <= 32 and len(decoder) == (padded + 5) * 64 + 4) and all(
            t.dtype == real and t.device == planes.device for t in (points, decoder, *rest))):
        raise ValueError("triplane: needs planes (B, 3, C, T, T), points (B, N, 3), a decoder, empty or packed (C at "
                         "most 32), on one device; planes float32 or bfloat16, the others float32; or all float64")
    planes = planes if planes.stride(2) == 1 else channels_last(planes)
    tensors = [planes, *(t.contiguous() for t in (points, decoder, *rest))]
    size, pointers = [B, N, C, T, *(planes.stride(i) for i in (0, 1, 3, 4))], [t.data_ptr() for t in tensors]
    with torch.cuda.device_of(planes):   # does nothing on a CPU
        context = torch.cuda.current_stream().cuda_stream if planes.is_cuda else torch.get_num_threads()
        custom_ops(planes.device.type)(dtypes.index(planes.dtype), size, pointers, box, context)
def channels_last(planes):
    """(B, 3, C, T, T) as before, with the channels of a pixel adjacent in memory."""
    return planes.movedim(2, 4).contiguous().movedim(4, 2)
@torch.library.custom_op("threedgp::triplane", mutates_args=())
def triplane(planes: torch.Tensor, points: torch.Tensor, box: float, decoder: torch.Tensor) -> torch.Tensor:
    """`sample_triplane`, or with `TriplaneDecoder.packed()` (C <= 32; empty: none) what that makes of it (B, N, 4);
    planes (B, 3, C, T, T) float32 or bfloat16, fast if `channels_last`; points (B, N, 3), decoder float32; on a CPU all
    may be float64. All on one device. Gradients to all three."""
    out = points.new_empty(*points.shape[:2], 4 if len(decoder) else planes.shape[2])
    call_custom_ops(planes, points, box, decoder, out)
    return out
@torch.library.custom_op("threedgp::triplane_backward", mutates_args=())
def triplane_backward(planes: torch.Tensor, points: torch.Tensor, box: float, decoder: torch.Tensor, grad: torch.Tensor
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        message = "tri-plane gradients are not deterministic on a GPU: train on a CPU, or allow them by warn_only=True"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message)
    grads = [points.new_zeros(t.shape) for t in (planes.movedim(2, 4), points, decoder)]
    call_custom_ops(planes, points, box, decoder, points.new_empty(0), grad, *grads)
    if len(decoder):
        grads[2][-4:] = grad.contiguous().sum((0, 1))
    return grads[0].movedim(4, 2).to(planes.dtype), grads[1], grads[2]
def triplane_context(ctx, inputs, output):
    planes, points, ctx.box, decoder = inputs
    ctx.save_for_backward(planes, points, decoder)
def triplane_autograd(ctx, grad):
    planes, points, decoder = ctx.saved_tensors
    grads = triplane_backward(planes, points, ctx.box, decoder, grad)
    return grads[0], grads[1], None, grads[2]
triplane.register_fake(lambda planes, points, box, decoder: points.new_empty(
    *points.shape[:2], 4 if len(decoder) else planes.shape[2]))
triplane_backward.register_fake(lambda planes, points, box, decoder, grad: (
    channels_last(torch.empty_like(planes)), points.new_empty(points.shape), decoder.new_empty(decoder.shape)))
triplane.register_autograd(triplane_autograd, setup_context=triplane_context)

# ---- Camera ("ball in sphere", paper section 3.2), camera generator and its regularisers, patches --------------------
class Camera(typing.NamedTuple):
    """A camera on a sphere that looks at a point of a small inner ball. Roll is 0."""
    yaw: torch.Tensor      # (B,) radians
    pitch: torch.Tensor    # (B,) radians; the horizon is pi/2
    fov: torch.Tensor      # (B,) degrees
    radius: torch.Tensor   # (B,) world units
    look_at: torch.Tensor  # (B, 3) yaw, pitch, radius of the point looked at
class Patch(typing.NamedTuple):
    """A square cut-out: `scale` in (0, 1] of the image's side, `offset` of its left and bottom in [0, 1 - scale]."""
    scale: torch.Tensor   # (B,)
    offset: torch.Tensor  # (B, 2) x, y
def rows(t, start, stop=None):
    """Rows start to stop, or those whose indices `start` holds, of every tensor in a named tuple."""
    return type(t)(*(x[start if stop is None else slice(start, stop)] for x in t))
CAMERA_PARAMETERS = ("yaw", "pitch", "fov", "look_at_yaw", "look_at_pitch", "look_at_radius")
def camera_parameters(camera):
    """The six free parameters, in the order of CAMERA_PARAMETERS. -> (B, 6)"""
    return torch.cat([torch.stack([camera.yaw, camera.pitch, camera.fov], 1), camera.look_at], 1)
def camera_ranges(cfg, device="cpu"):
    """Prior range of each of the six parameters. -> (6, 2)"""
    return torch.tensor([cfg.prior_yaw, cfg.prior_pitch, cfg.prior_fov, (-math.pi, math.pi), (0.0, math.pi),
                         cfg.prior_look_at], device=device)
def sample_camera_prior(cfg, n, device):
    """n cameras with every parameter uniform in its range and the look-at direction uniform on the sphere."""
    low, high = camera_ranges(cfg, device).unbind(1)
    p = low + (high - low) * torch.rand(n, 6, device=device)
    p[:, 4] = torch.arccos(1 - 2 * (p[:, 4] / math.pi).clamp(1e-6, 1 - 1e-6))
    return Camera(p[:, 0], p[:, 1], p[:, 2], torch.ones(n, device=device), p[:, 3:])
def frontal_camera(cfg, n, device):
    """n cameras in the middle of the prior, looking at the origin."""
    p = F.pad(camera_ranges(cfg, device)[:5].mean(1), (0, 1)).repeat(n, 1)            # radius 0 for the look-at point
    return Camera(p[:, 0], p[:, 1], p[:, 2], torch.ones(n, device=device), p[:, 3:])
def spherical_to_cartesian(yaw, pitch, radius):
    """(B,) each -> (B, 3). y is up; yaw 0 lies on +z."""
    return torch.stack([radius * pitch.sin() * (-yaw).sin(), radius * pitch.cos(), radius * pitch.sin() * yaw.cos()], 1)
def cam2world(camera):
    """Camera-to-world matrices; the camera looks along its own -z, x is right, y is up. -> (B, 4, 4)"""
    origin = spherical_to_cartesian(camera.yaw, camera.pitch, camera.radius)          # (B, 3)
    forward = F.normalize(spherical_to_cartesian(*camera.look_at.unbind(1)) - origin, dim=1)
    left = F.normalize(torch.linalg.cross(origin.new_tensor([[0.0, 1.0, 0.0]]), forward), dim=1)
    up = F.normalize(torch.linalg.cross(forward, left), dim=1)
    top = torch.stack([-left, up, -forward, origin], dim=2)                           # (B, 3, 4)
    return torch.cat([top, origin.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(origin), 1, 4)], dim=1)
def patch_grid(patch, n, resolution, device):
    """Coordinates of the pixels of an image or a patch, corners included: x right, y up, in [-1, 1]. -> (n, H, W, 2)"""
    line = torch.linspace(-1, 1, resolution, device=device)
    xy = torch.stack(torch.meshgrid(line, -line, indexing="xy"), dim=-1).expand(n, -1, -1, -1)
    return xy if patch is None else (xy + 1) * patch.scale.view(n, 1, 1, 1) - 1 + 2 * patch.offset.view(n, 1, 1, 2)
def camera_rays(camera, resolution, patch=None):
    """One ray per pixel, rows from the top. -> origins, unit directions, both (B, resolution², 3), in world units."""
    n, pose = len(camera.yaw), cam2world(camera)
    xy = patch_grid(patch, n, resolution, pose.device).reshape(n, -1, 2)              # (B, R, 2)
    focal = 1 / (camera.fov * (math.pi / 360)).tan()
    in_camera = F.normalize(torch.cat([xy, -focal.view(n, 1, 1).expand(-1, xy.shape[1], 1)], 2), dim=2)
    directions = in_camera @ pose[:, :3, :3].transpose(1, 2)                          # (B, R, 3)
    return pose[:, None, :3, 3].expand_as(directions), directions
class CameraAdaptor(nn.Module):
    """One MLP of the camera generator: parameters, embeddings of z and class -> new parameters before the sigmoid."""
    def __init__(self, in_features, z_dim, num_classes, out_features, lr_mult):
        super().__init__()
        fc = lambda i, o, activation=F.softplus: Linear(i, o, activation, lr_mult)
        self.project_params, self.project_z = fc(in_features, 256), fc(z_dim, 16) if z_dim else None
        self.project_c = fc(num_classes, 16) if num_classes else None
        self.main = nn.Sequential(fc(256 + 16 * (bool(z_dim) + bool(num_classes)), 256), fc(256, out_features, None))
    def forward(self, params, z, c):  # (B, in), (B, z_dim), (B, num_classes) -> (B, out)
        extra = [normalize_2nd_moment(f(x)) for f, x in ((self.project_z, z), (self.project_c, c)) if f is not None]
        return self.main(torch.cat([self.project_params(params), *extra], 1))
class CameraGenerator(nn.Module):
    """Maps a prior camera to a posterior one (paper section 3.2). The origin sees the class, the look-at also z."""
    def __init__(self, cfg):
        super().__init__()
        self.num_classes, self.pitch = cfg.num_classes, (cfg.prior_pitch[0] + 1e-5, cfg.prior_pitch[1] - 1e-5)
        self.register_buffer("ranges", camera_ranges(cfg), persistent=False)
        self.origin_adaptor = CameraAdaptor(4, 0, cfg.num_classes, 4, cfg.camera_lr_mult)
        self.look_at_adaptor = CameraAdaptor(8, cfg.z_dim, cfg.num_classes, 4, cfg.camera_lr_mult)
    def forward(self, prior, z, c):  # Camera of B, (B, z_dim), int64 (B,) -> Camera with every parameter in its range
        low, high = self.ranges.unbind(1)
        c = F.one_hot(c, self.num_classes).to(z.dtype) if self.num_classes else None
        p = (camera_parameters(prior) - low) / (high - low)                           # (B, 6) in [0, 1]
        # yaw, pitch, roll, radius: the second network sees them before the sigmoid, then the last two are dropped
        origin = self.origin_adaptor(torch.stack([p[:, 0], p[:, 1], p.new_zeros(len(p)), prior.radius], 1), None, c)
        look_at = self.look_at_adaptor(torch.cat([origin[:, :3], p[:, 2:3], origin[:, 3:], p[:, 3:]], 1), z, c)
        q = torch.cat([origin[:, :2], look_at], 1).sigmoid() * (high - low) + low     # (B, 6)
        return Camera(q[:, 0], q[:, 1].clamp(*self.pitch), q[:, 2], prior.radius, q[:, 3:])
def emd_1d(a, b):
    """Squared-cost optimal transport between equal numbers of scalars: in 1-D, sort both. a, b (n, ...) -> (...)"""
    return (a.sort(0).values - b.sort(0).values).square().mean(0)
def camera_gradient_penalty(camera_generator, prior, z, c):
    """The paper's regulariser: |g| + 1 / (|g| + 1e-4), g = d posterior_i / d prior_i, mean over samples. -> (6,)"""
    p = camera_parameters(prior).detach().requires_grad_()
    posterior = camera_parameters(camera_generator(Camera(p[:, 0], p[:, 1], p[:, 2], prior.radius, p[:, 3:]), z, c))
    g = torch.stack([torch.autograd.grad(posterior[:, i].sum(), p, create_graph=True)[0][:, i] for i in range(6)], 1)
    return (g.abs() + 1 / (g.abs() + 1e-4)).mean(0)
def sample_patch(cfg, n, kimg):
    """n random patches; every MBSTD_GROUP consecutive ones are the same. Scale ~ s_min + (1 - s_min) Beta(1, b)."""
    groups, s_min, b = -(-n // MBSTD_GROUP), cfg.patch_resolution / cfg.resolution, schedules(cfg, kimg)["patch_beta"]
    scale = s_min + (1 - s_min) * (1 - torch.rand(groups, dtype=torch.float64) ** (1 / b))    # Beta(1, b) by inversion
    offset = torch.rand(groups, 2, dtype=torch.float64) * (1 - scale[:, None])
    return Patch(*(x.float().repeat_interleave(MBSTD_GROUP, 0)[:n] for x in (scale, offset)))
def extract_patch(image, patch, resolution):
    """Cut patches out of images, bilinear, by the coordinates `camera_rays` uses. (B, ., H, W) -> (B, ., P, P)"""
    grid = patch_grid(patch, len(image), resolution, image.device) * image.new_tensor([1.0, -1.0])
    return F.grid_sample(image, grid, mode="bilinear", align_corners=True)

# ---- Rendering (NeRF's quadrature, Mildenhall et al. 2020; hierarchical samples as in EG3D) --------------------------
def stratified_depths(near, far, shape, samples, random, device):
    """Depths of the coarse samples: one in each interval between midpoints of an even grid. -> (*shape, S)"""
    grid = torch.linspace(near, far, samples, device=device)
    edges = torch.cat([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])              # (S+1,)
    u = torch.rand(*shape, samples, device=device) if random else torch.full((*shape, samples), 0.5, device=device)
    return edges[:-1] + edges.diff() * u
@torch.no_grad()
def importance_depths(depths, weights, u):
    """Inverts the coarse weights' distribution. depths, weights (..., S), sorted; u (..., K) in [0, 1] -> (..., K)"""
    bins = (depths[..., 1:] + depths[..., :-1]) / 2                                   # (..., S-1)
    pdf = weights[..., 1:-1] + 1e-5 + 1e-5                                            # (..., S-2)
    cdf = F.pad((pdf / pdf.sum(-1, keepdim=True)).cumsum(-1), (1, 0))                 # (..., S-1)
    above = torch.searchsorted(cdf, u.contiguous(), right=True)
    below, above = (above - 1).clamp(min=0), above.clamp(max=cdf.shape[-1] - 1)
    (b0, b1), (c0, c1) = ([x.gather(-1, i) for i in (below, above)] for x in (bins, cdf))
    return b0 + (u - c0) / torch.where(c1 - c0 < 1e-5, 1.0, c1 - c0) * (b1 - b0)
def ray_weights(sigma_raw, depths, density_scale=1.0):
    """alpha_i = 1 - exp(-delta_i softplus(sigma_i)); weight = alpha x transmittance. (..., S), (..., S) -> (..., S)"""
    delta = F.pad(depths.diff(dim=-1), (0, 1), value=1e10)
    alpha = 1 - torch.exp(-density_scale * delta * F.softplus(sigma_raw))
    return alpha * F.pad(1 - alpha[..., :-1] + 1e-10, (1, 0), value=1.0).cumprod(-1)
def march_rays(rgb, sigma_raw, depths):
    """Composite rgb (..., S, 3) by sigma_raw, sorted depths (..., S) -> rgb (..., 3), depth (...), weights (..., S)"""
    weights = ray_weights(sigma_raw, depths)
    return (weights[..., None] * rgb).sum(-2), (weights * depths).sum(-1), weights
class TriplaneDecoder(nn.Module):
    """Two layers from the mean plane feature to colour (as is, no sigmoid) and density (before the softplus)."""
    def __init__(self, features):
        super().__init__()
        self.model = nn.Sequential(Linear(features, 64, leaky_relu), Linear(64, 4))
    def forward(self, features):  # (..., C) -> (..., 3), (...)
        out = self.model(features)
        return out[..., :3], out[..., 3]
    def packed(self):
        """All weights in one vector, as custom_ops.cu has them; C, at most 32, padded by zeros to 16 or 32."""
        (w1, b1), (w2, b2) = self.model[0].effective(), self.model[1].effective()
        width = 16 if w1.shape[1] <= 16 and not w1.is_cuda else 32
        return torch.cat([F.pad(w1, (0, width - w1.shape[1])).flatten(), b1, w2.flatten(), b2])
def query_triplane(planes, points, box, decoder, fused):    # planes (B, 3, C, T, T), points (B, N, 3) in world units
    """`decoder(sample_triplane(planes, points, box))`, fused or not -> rgb (B, N, 3), sigma_raw (B, N)"""
    query = planes, points, box
    if fused and planes.shape[2] <= 32:
        out = triplane(*query, decoder.packed())
        return out[..., :3], out[..., 3]
    return decoder(triplane(*query, points.new_empty(0)) if fused else sample_triplane(*query))

# ---- Generator: mapping, StyleGAN2 backbone, depth adaptor (paper sections 3.1 and 3.3) ------------------------------
class MappingNetwork(nn.Module):
    """z and class (or, in the discriminator, conditions alone) -> w. Two layers, learning rate 1/100."""
    def __init__(self, z_dim, c_dim, w_dim):
        super().__init__()
        self.embed = Linear(c_dim, w_dim) if c_dim else None
        self.fc0 = Linear(z_dim + w_dim * bool(c_dim), w_dim, leaky_relu, lr_mult=0.01)
        self.fc1 = Linear(w_dim, w_dim, leaky_relu, lr_mult=0.01)
        if z_dim:
            self.register_buffer("w_avg", torch.zeros(w_dim))
    def forward(self, z, c):  # (B, z_dim) or None, (B, c_dim) or None -> (B, w_dim)
        inputs = [z, self.embed(c) if self.embed is not None else None]
        return self.fc1(self.fc0(torch.cat([normalize_2nd_moment(x) for x in inputs if x is not None], 1)))
def modulated(i, o, w_dim, size):  # a convolution whose input is scaled by a style -> w's layer, weights, bias
    return Linear(w_dim, i, bias_init=1), nn.Parameter(torch.randn(o, i, size, size)), nn.Parameter(torch.zeros(o))
class SynthesisLayer(nn.Module):
    """3x3 modulated and demodulated convolution, noise, leaky ReLU. up=2 doubles the resolution. The batch shares the
    weights: the style scales the input, the demodulation the output, to the same effect (StyleGAN2, equations 1, 3)."""
    def __init__(self, in_channels, out_channels, w_dim, resolution, up=1):
        super().__init__()
        self.affine, self.weight, self.bias = modulated(in_channels, out_channels, w_dim, 3)
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength, self.up = nn.Parameter(torch.zeros([])), up
    def forward(self, x, w, noise):  # (B, in, H, W), (B, w_dim) -> (B, out, up H, up W)
        style = self.affine(w)                                                        # (B, in)
        demod = (style.square() @ self.weight.square().sum((2, 3)).t() + 1e-8).rsqrt()  # (B, out)
        x = x * style[:, :, None, None].to(x.dtype)
        if self.up == 2:  # the filter makes 2H x 2W of (B, out, 2H+1, 2W+1)
            x = fir_filter(F.conv_transpose2d(x, self.weight.transpose(0, 1).to(x.dtype), stride=2), padding=1, gain=4)
        else:
            x = F.conv2d(x, self.weight.to(x.dtype), padding=1)
        bias, gain = self.bias[:, None, None], GAIN[leaky_relu]                       # (out, 1, 1)
        if noise != "none":
            n = torch.randn(len(x), 1, *x.shape[2:], device=x.device) if noise == "random" else self.noise_const
            bias = bias + n * self.noise_strength
        return leaky_relu(torch.addcmul((bias * gain).to(x.dtype), x, (demod * gain)[:, :, None, None].to(x.dtype)))
class ToRGB(nn.Module):
    """1x1 modulated convolution (not demodulated) to the tri-plane's channels."""
    def __init__(self, in_channels, out_channels, w_dim):
        super().__init__()
        self.affine, self.weight, self.bias = modulated(in_channels, out_channels, w_dim, 1)
    def forward(self, x, w):  # (B, in, H, W), (B, w_dim) -> (B, out, H, W)
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        return F.conv2d(x * style[:, :, None, None].to(x.dtype), self.weight.to(x.dtype), self.bias.to(x.dtype))
class SynthesisBlock(nn.Module):
    """Doubles the resolution (but for the first), then adds to the upsampled skip."""
    def __init__(self, in_channels, out_channels, w_dim, resolution, out_planes):
        super().__init__()
        if in_channels:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, up=2)
        else:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution)
        self.torgb = ToRGB(out_channels, out_planes, w_dim)
    def forward(self, x, skip, w, noise):
        x = self.const.expand(len(w), -1, -1, -1) if x is None else self.conv0(x, w, noise)
        x = self.conv1(x, w, noise)
        y = self.torgb(x, w).to(w.dtype)  # the skips are summed in w's precision
        return x, y if skip is None else upsample(skip) + y
def channels(cfg, resolution):
    return min(cfg.channel_base // resolution, cfg.channel_max)
class TriplaneBackbone(nn.ModuleDict):
    """StyleGAN2 synthesis network with 3 x C output channels."""
    def __init__(self, cfg):
        widths = lambda r: (channels(cfg, r // 2) if r > 4 else 0, channels(cfg, r))
        super().__init__({f"b{r}": SynthesisBlock(*widths(r), cfg.w_dim, r, 3 * cfg.triplane_features)
                          for r in (2 ** i for i in range(2, int(math.log2(cfg.triplane_resolution)) + 1))})
    def forward(self, w, noise="const"):  # (B, w_dim), "const", "random" or "none" -> (B, 3, C, T, T)
        x = planes = None
        for block in self.values():
            x, planes = block(x, planes, w, noise)
        return planes.unflatten(1, (3, -1))
class DepthAdaptor(nn.Module):
    """Makes rendered depth look like estimated depth (paper section 3.1). Candidate 0 is the depth, to about [-1, 1]
    between a learned near plane and `far`; 1 to 3 are what one shared head reads from each of three convolutions."""
    def __init__(self, cfg):
        super().__init__()
        self.near, self.far, width = cfg.near, cfg.far, cfg.adaptor_channels
        self.level = 0 if cfg.depth_adaptor == "never" else 3   # looked at outside training: the last, if it is trained
        self.near_plane_offset_raw = nn.Parameter(torch.tensor([-3.0]))
        self.layers = nn.ModuleList(Conv2d(i, width, 5, leaky_relu) for i in (1, width, width))
        self.head = Conv2d(width, 1, 1)
    def near_offset(self):
        """How far the learned near plane lies beyond `near`, in world units, in (0, (far - near) / 4)."""
        return self.near_plane_offset_raw.sigmoid() * 0.25 * (self.far - self.near)
    def normalize(self, depth):
        near = self.near + self.near_offset()
        return 2 * (depth - (near + self.far) / 2) / (self.far - near)
    def candidates(self, depth):
        """depth (B, 1, H, W) in world units -> (4, B, 1, H, W), from un-adapted to most adapted."""
        x = [self.normalize(depth)]
        for layer in self.layers:
            x.append(layer(x[-1]))
        return torch.stack([x[0], *map(self.head, x[1:])])
    def forward(self, depth, choice):
        """depth (B, 1, H, W), each sample's candidate int64 (B,), best on the CPU -> (B, 1, H, W). A layer sees the
        samples alone that go on to it: by the schedule half, later two thirds of the work of `candidates`."""
        x, left, out, order = self.normalize(depth), torch.arange(len(choice), device=choice.device), [], []
        for level, layer in enumerate([*self.layers, None]):
            ends = choice[left] == level
            out, order = [*out, self.head(x[ends]) if level else x[ends]], [*order, left[ends]]
            x, left = (layer(x[~ends]), left[~ends]) if layer else (None, None)
        return torch.cat(out)[torch.cat(order).argsort()]
def sample_adaptor_choice(cfg, n, kimg):
    """Which candidate each of n training samples takes. -> int64 (n,)"""
    p = schedules(cfg, kimg)["raw_depth_share"]     # random: linear in the index, and the first one's share is p
    probabilities = {"random": p + torch.arange(4) * (1 - 4 * p) / 6, "never": torch.tensor([1.0, 0, 0, 0]),
                     "half": torch.tensor([0.5, 0, 0, 0.5]), "always": torch.tensor([0, 0, 0, 1.0])}
    return torch.multinomial(probabilities[cfg.depth_adaptor], n, replacement=True)
class Generator(nn.Module):
    """z and class -> w -> tri-planes -> image and depth from a camera. Ray samples are random in training mode only."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.density_noise = cfg, 0.0   # a standard deviation, set by the training loop
        self.mapping_network = MappingNetwork(cfg.z_dim, cfg.num_classes, cfg.w_dim)
        self.backbone, self.decoder = TriplaneBackbone(cfg), TriplaneDecoder(cfg.triplane_features)
        self.camera_generator = CameraGenerator(cfg) if cfg.camera == "learned" else None
        self.depth_adaptor = DepthAdaptor(cfg) if cfg.depth != "none" else None
    def query(self, planes, origins, directions, depths, fused):
        """Colour and density at `depths` (B, R, S) on rays (B, R, 3). -> rgb (B, R, S, 3), sigma_raw (B, R, S)"""
        points = origins[:, :, None] + depths[..., None] * directions[:, :, None]      # (B, R, S, 3)
        rgb, sigma_raw = query_triplane(planes, points.flatten(1, 2), self.cfg.box, self.decoder, fused)
        if self.training and self.density_noise > 0:
            sigma_raw = sigma_raw + self.density_noise * torch.randn_like(sigma_raw)
        return rgb.view(*depths.shape, 3), sigma_raw.view(depths.shape)
    def sample_rays(self, planes, origins, directions):
        """Coarse and importance samples on rays (B, R, 3), sorted -> rgb (B, R, S, 3), sigma_raw, depths (B, R, S)"""
        cfg, random, fused = self.cfg, self.training, self.cfg.fused and has_custom_ops(planes.device.type)
        B, R, _ = directions.shape
        coarse = stratified_depths(cfg.near, cfg.far, (B, R), cfg.coarse_samples, random, planes.device)
        rgb, sigma = self.query(planes, origins, directions, coarse, fused)
        u = (torch.rand(B, R, cfg.fine_samples, device=planes.device) if random else
             ((torch.arange(cfg.fine_samples, device=planes.device) + 0.5) / cfg.fine_samples).expand(B, R, -1))
        # twice the density sharpens the importance weights; the spec is silent here, the reference vectors are not
        fine = importance_depths(coarse, ray_weights(sigma, coarse, density_scale=2.0), u)
        fine_rgb, fine_sigma = self.query(planes, origins, directions, fine, fused)
        depths, order = torch.cat([coarse, fine], -1).sort(-1)                         # (B, R, S)
        rgb = torch.cat([rgb, fine_rgb], -2).gather(-2, order[..., None].expand(-1, -1, -1, 3))
        return rgb, torch.cat([sigma, fine_sigma], -1).gather(-1, order), depths
    def render(self, planes, camera, resolution, patch=None, chunk=2 ** 14, cut=False):
        """planes (B, 3, C, T, T), a Camera and, if wanted, a Patch of B -> rgb (B, 3, H, W), depth (B, 1, H, W)
        Evaluation: `chunk` rays at a time, which only bounds memory. cut: densities below an image's median are 0."""
        planes = channels_last(planes) if self.cfg.fused and has_custom_ops(planes.device.type) else planes
        rays = camera_rays(camera, resolution, patch)                                  # 2 x (B, R, 3)
        rays = [rays] if self.training else zip(*(x.split(max(1, chunk // len(x)), 1) for x in rays))
        samples = (self.sample_rays(planes, *r) for r in rays)
        if cut:
            samples = list(samples)
            median = torch.cat([sigma.flatten(1) for _, sigma, _ in samples], 1).median(1).values.view(-1, 1, 1)
            samples = [(rgb, sigma.masked_fill(sigma < median, -math.inf), depths) for rgb, sigma, depths in samples]
        rgb, depth = (torch.cat(x, 1) for x in zip(*(march_rays(*s)[:2] for s in samples)))   # all but the weights
        shape = (len(planes), -1, resolution, resolution)
        return rgb.transpose(1, 2).reshape(shape), depth.reshape(shape)
    def mapping(self, z, c):
        """z (B, z_dim), c int64 (B,) (ignored without classes) -> w (B, w_dim)"""
        return self.mapping_network(z, F.one_hot(c, self.cfg.num_classes).to(z.dtype) if self.cfg.num_classes else None)
    def pose(self, prior, z, c):
        """The camera a sample is seen from: a function of the prior's draw (Camera), z (B, z_dim) and class (B,)."""
        if self.camera_generator is not None:
            return self.camera_generator(prior, z, c)
        return prior if self.cfg.camera == "prior" else frontal_camera(self.cfg, len(z), z.device)
def mean_camera(G, c, draws=64):
    """The mean of the posterior cameras of each class in c (B,). -> Camera of B"""
    z, _, prior = draw_latents(G.cfg, draws, c, "mean camera")        # the same draws for all
    many = Camera(*(x.repeat(len(c), *[1] * (x.ndim - 1)) for x in prior))
    posterior = G.pose(many, z.repeat(len(c), 1), c.repeat_interleave(draws))
    return Camera(*(x.view(len(c), draws, *x.shape[1:]).mean(1) for x in posterior))
def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
def synthesize(G, z, c, prior, choice, patch=None):
    """z (B, z_dim), c (B,), prior Camera, choice (B,) of the depth candidate, patch (None: the whole image) -> what the
    discriminator sees (paper figure 2): RGB and adapted depth (B, 4, P, P) (3 channels without depth); w (B, w_dim)"""
    cfg, camera, w = G.cfg, G.pose(prior, z, c), G.mapping(z, c)
    with autocast(cfg, z.device):
        planes = G.backbone(w, noise="random" if G.training else "const")
    image, depth = G.render(planes, camera, cfg.resolution if patch is None else cfg.patch_resolution, patch)
    if G.depth_adaptor is not None:
        with autocast(cfg, z.device):
            image = torch.cat([image, G.depth_adaptor(depth, choice).float()], 1)
    return image, w

# ---- Discriminator with a distillation head (paper section 3.4), and the teacher -------------------------------------
class PatchEncoder(nn.Module):
    """Scale and offset, each as sines, cosines and a learned embedding of 1000 x value. (B, 3) -> (B, 828)"""
    def __init__(self):
        super().__init__()
        self.const_embed, self.fourier_encoder = nn.Embedding(1001, 256), nn.Module()
        self.fourier_encoder.register_buffer("fourier_coefs", math.pi * 2.0 ** torch.arange(10) / 1024)
    def forward(self, values):
        x = values * 1000                                                             # (B, 3)
        phase = x[..., None] * self.fourier_encoder.fourier_coefs                     # (B, 3, 10)
        embedded = self.const_embed(x.round().long().clamp(0, 1000))                  # (B, 3, 256)
        return torch.cat([phase.sin(), phase.cos(), embedded], -1).flatten(1)
class DiscriminatorBlock(nn.Module):
    """Residual block; the second convolution's input is modulated by the patch. down=1 keeps the resolution."""
    def __init__(self, img_channels, in_channels, out_channels, down):
        super().__init__()
        self.fromrgb = Conv2d(img_channels, in_channels, 1, leaky_relu) if img_channels else None
        self.conv0 = Conv2d(in_channels, in_channels, 3, leaky_relu)
        self.conv1 = Conv2d(in_channels, out_channels, 3, leaky_relu, down=down, gain=math.sqrt(0.5))
        self.conv1.affine = Linear(512, in_channels)      # named as in the reference
        self.skip = Conv2d(in_channels, out_channels, 1, bias=False, down=down, gain=math.sqrt(0.5))
    def forward(self, x, h):  # (B, in, H, W), (B, 512) -> (B, out, H/down, W/down)
        x = x if self.fromrgb is None else self.fromrgb(x)
        modulation = (1 + self.conv1.affine(h).tanh())[:, :, None, None].to(x.dtype)  # (B, in, 1, 1)
        return self.skip(x) + self.conv1(self.conv0(x) * modulation)
def minibatch_std(x):
    """Append the mean standard deviation over groups of consecutive images. (B, C, H, W) -> (B, C+1, H, W)"""
    B, C, H, W = x.shape
    group = x.view(-1, min(MBSTD_GROUP, B), C, H, W)
    std = (group.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))         # (B / 4,)
    return torch.cat([x, std.repeat_interleave(group.shape[1]).view(B, 1, 1, 1).expand(-1, 1, H, W)], 1)
class DiscriminatorEpilogue(nn.Module):
    """4x4 features -> score vector, and the prediction of the teacher's features."""
    def __init__(self, in_channels, teacher_dim):
        super().__init__()
        self.conv = Conv2d(in_channels + 1, in_channels, 3, leaky_relu)
        self.fc, self.out = Linear(in_channels * 16, in_channels, leaky_relu), Linear(in_channels, in_channels)
        self.feat_out = nn.Sequential(Linear(in_channels * 16, in_channels, leaky_relu),
                                      Linear(in_channels, teacher_dim)) if teacher_dim else None
    def forward(self, x):  # (B, C, 4, 4) -> (B, C), (B, teacher_dim) or None
        x = self.conv(minibatch_std(x)).flatten(1)
        return self.out(self.fc(x)), self.feat_out(x) if self.feat_out is not None else None
class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator on patches, as wide as one for whole images: its first blocks keep size."""
    def __init__(self, cfg):
        super().__init__()
        self.num_classes, img_channels = cfg.num_classes, 3 if cfg.depth == "none" else 4
        self.scalar_enc, self.hyper_mod_mapping = PatchEncoder(), MappingNetwork(0, 828, 512)
        self.resolutions = [2 ** i for i in range(int(math.log2(cfg.resolution)), 2, -1)]
        for r in self.resolutions:
            widths = img_channels if r == cfg.resolution else 0, channels(cfg, r), channels(cfg, r // 2)
            setattr(self, f"b{r}", DiscriminatorBlock(*widths, down=2 if r <= cfg.patch_resolution else 1))
        self.head_mapping = MappingNetwork(0, 828 + cfg.num_classes, channels(cfg, 4))
        with torch.no_grad():  # ours: else the one-hot class drowns in 828 numbers, and short runs ignore it
            self.head_mapping.embed.weight[:, :cfg.num_classes] *= math.sqrt(828)
        self.b4 = DiscriminatorEpilogue(channels(cfg, 4), cfg.teacher_dim)
    def forward(self, image, c, patch):
        """image (B, 3 or 4, P, P), c int64 (B,), Patch -> score (B,), teacher features (B, teacher_dim) or None"""
        code = self.scalar_enc(torch.cat([patch.scale[:, None], patch.offset], 1))     # (B, 828)
        x, h = image, self.hyper_mod_mapping(None, code)
        for r in self.resolutions:
            x = getattr(self, f"b{r}")(x, h)
        if self.num_classes:
            code = torch.cat([F.one_hot(c, self.num_classes).to(code.dtype), code], 1)
        with torch.autocast(x.device.type, enabled=False):     # statistics and scores in the weights' precision
            (x, features), m = self.b4(x.to(code.dtype)), self.head_mapping(None, code)
            return (x * m).sum(1) / math.sqrt(m.shape[1]), features
class Teacher(nn.Module):
    """A frozen timm classifier's pooled features of whole images in [-1, 1]. (B, 3, H, W) -> (B, teacher_dim)
    head: keep its last layer, `model.get_classifier()`, which makes class scores of the features."""
    def __init__(self, name, weights="", flag="--teacher", head=False):
        super().__init__()
        import timm  # only who distils needs it; its import takes seconds
        if not timm.is_model(name):
            raise UserError(f"{flag} {name}: timm has no model of that name; see timm.list_models()")
        given, kind = (f"{flag} timm:{name}:", {}) if head else (f"{flag}-weights ", dict(num_classes=0))
        try:
            self.model = timm.create_model(name, pretrained=not weights, **kind)
        except Exception as e:  # timm and the hub raise many kinds
            raise UserError(f"{flag} {name}: its weights could not be downloaded ({type(e).__name__}); give a local "
                            f"file by {given}FILE") from None
        if weights:
            own, state = self.model.state_dict(), load_tensors(weights, given.rstrip())
            state = state if isinstance(state, dict) else {}
            if wrong := [k for k in own if getattr(state.get(k), "shape", None) != own[k].shape]:
                raise UserError(f"{given}{weights}: not weights of {name}: {len(wrong)} parameters are missing or of "
                                f"another shape, the first is {wrong[0]}")
            self.model.load_state_dict({k: state[k] for k in own})
        self.eval().requires_grad_(False)
        data = timm.data.resolve_model_data_config(self.model)
        self.size = data["input_size"][-1]
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(3, 1, 1), persistent=False)
        self.dim = self(torch.zeros(1, 3, 8, 8)).shape[1]   # not num_features: some models pool to another width
    @torch.no_grad()
    def forward(self, image):
        x = F.interpolate(image, (self.size, self.size), mode="bicubic", antialias=True)
        x = self.model.forward_features(((x + 1) / 2 - self.mean) / self.std)
        return self.model.forward_head(x, pre_logits=True).float()

# ---- Losses (paper section 3.5) --------------------------------------------------------------------------------------
def blur(image, sigma):
    """Separable blur with taps 2^-(x / sigma)², |x| <= floor(3 sigma), zero padding. (B, C, H, W) -> the same"""
    if 3 * sigma < 1:
        return image
    radius = math.floor(3 * sigma)
    taps = (2.0 ** -(torch.arange(-radius, radius + 1, device=image.device) / sigma).square()).to(image.dtype)
    taps = (taps / taps.sum()).expand(image.shape[1], 1, -1)
    image = F.conv2d(image, taps[:, :, None], padding=(0, radius), groups=image.shape[1])
    return F.conv2d(image, taps[:, :, :, None], padding=(radius, 0), groups=image.shape[1])
def r1_penalty(score, image):
    """Squared norm of the score's gradient with respect to the image (Mescheder et al. 2018). -> (B,)"""
    return torch.autograd.grad(score.sum(), image, create_graph=True)[0].square().sum((1, 2, 3))
def distillation_distance(predicted, target):
    """L2 distance of predicted and teacher features (paper section 3.4). (B, F), (B, F) -> (B,)"""
    return (predicted - target).norm(dim=1)
def draw_latents(cfg, n, labels, phase=""):
    """n draws of z ~ N(0, I), a class by the data's labels (N,), a prior camera; always the same ones in a phase."""
    if phase:
        seed_draws(cfg.seed, -1, phase, 0)
    z = torch.randn(n, cfg.z_dim, device=labels.device)
    c = labels[torch.randint(max(len(labels), 1), (n,), device=z.device)] if cfg.num_classes else z.new_zeros(n).long()
    return z, c, sample_camera_prior(cfg, n, z.device)
def camera_regularizer(G, labels, kimg):
    """What keeps the camera posterior from collapsing (paper section 3.2) -> loss, {name: (6,) or scalar} to log"""
    cfg, ranges = G.cfg, camera_ranges(G.cfg, labels.device)
    z, c, prior = draw_latents(cfg, 256, labels)    # all measure the mean direction, the first 64 of them the spread
    posterior, few = G.camera_generator(prior, z, c), rows(prior, 0, 64)
    center = (torch.stack([posterior.yaw, posterior.pitch], 1).mean(0) - ranges[:2].mean(1)).norm()
    emd = emd_1d(camera_parameters(few), camera_parameters(rows(posterior, 0, 64)))   # in squared radians or degrees
    spread = camera_gradient_penalty(G.camera_generator, few, z[:64], c[:64]) if cfg.camera_reg == "grad" else emd
    weights = torch.tensor(cfg.camera_reg_weights, device=labels.device)[[0, 1, 2, 3, 3, 3]]     # the last: look-at
    unit = ranges.diff(dim=1)[:, 0].square() if cfg.camera_reg == "emd" and cfg.camera_reg_units == "range" else 1
    penalty = schedules(cfg, kimg)["camera_reg_weight"] * (weights / unit * spread).sum()
    loss = cfg.camera_center * center + (0 if cfg.camera_reg == "none" else penalty)
    p = camera_parameters(posterior).detach()
    return loss, dict(camera_reg=loss.detach(), camera_center=center.detach(), camera_emd=emd.detach(),
                      camera_mean=p.mean(0), camera_std=p.std(0))

# ---- Metrics: distances between samples and data, and what is known where the data know the truth --------------------
def frechet_distance(a, b):
    """Frechet distance of two Gaussians, each (mean (F,), covariance (F, F)) in float64; nan if one is not finite."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    if not (cov_a.isfinite().all() and cov_b.isfinite().all()):
        return math.nan
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()    # trace of the root of cov_a cov_b
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
def gaussian(x):
    """Mean and covariance of features (N, F), in float64."""
    return x.double().mean(0), x.double().t().cov()
def kernel_distance(a, b, subsets=100, size=1000):
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (x.y / F + 1)³, mean over random subsets."""
    random, n, total = torch.Generator().manual_seed(0), min(size, len(a), len(b)), 0.0
    kernel = lambda x, y: (x @ y.t() / x.shape[1] + 1) ** 3
    for _ in range(subsets):
        x, y = (t[torch.randperm(len(t), generator=random)[:n].to(t.device)].double() for t in (a, b))
        xx, yy = kernel(x, x), kernel(y, y)
        total += float((xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1)) - 2 * kernel(x, y).mean())
    return total / subsets
def precision_recall(real, fake, k=3):
    """Share of fakes (M, F) as near to a real (N, F) as its k-th neighbour, and reverse (Kynkaanniemi et al. 2019)"""
    def covered(x, by):
        radius = torch.cat([torch.cdist(part, by).kthvalue(k + 1).values for part in by.split(1000)])   # 1st: itself
        return float(torch.cat([(torch.cdist(part, by) <= radius).any(1) for part in x.split(1000)]).double().mean())
    return covered(fake, real), covered(real, fake)
def inception_score(p, splits=10):
    """exp of the mean divergence of class probabilities p (N, K) from their mean; averaged over splits."""
    parts = [x.double().clamp(min=1e-16) for x in p.tensor_split(splits) if len(x)]
    return sum(float((x * (x.log() - x.mean(0).log())).sum(1).mean().exp()) for x in parts) / len(parts)
def non_flatness_score(depth, near, far, bins=64):
    """exp of the entropy of each depth map's histogram: 1 is a flat wall (paper section 4). (B, ...) -> (B,)"""
    index = ((depth.flatten(1).clamp(near, far) - near) / (far - near) * bins).long().clamp(max=bins - 1)
    return torch.special.entr(F.one_hot(index, bins).double().mean(1)).sum(1).exp()
def area8(image):
    """8x8 area averages of all channels: where things are, their colour and depth. (B, C, H, W) -> (B, 64 C)"""
    return F.adaptive_avg_pool2d(image, 8).flatten(1)
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
class Detector:
    """(B, 3 or 4, H, W) in [-1, 1] -> features (B, width), beside them class probabilities, if any. name: as --detector
    (a file is TorchScript in the field's format). label is "" for Inception: numbers of all others must carry it."""
    def __init__(self, name, device):
        kind, _, rest = name.partition(":")
        if kind == "area8":
            self.label, self.file, self.width, self.measure = name, "", None, lambda x: [area8(x)]
        elif kind == "timm":
            self.label, _, self.file = rest.partition(":")
            net = Teacher(self.label, self.file, "--detector", head=True).to(device)
            self.measure = lambda x: [f := net(x[:, :3].clamp(-1, 1)), net.model.get_classifier()(f).softmax(1)]
            self.width = net.dim
        else:
            field, byte = Path(INCEPTION), lambda x: (x[:, :3] * 127.5 + 128).clamp(0, 255).byte()
            self.file = Path(torch.hub.get_dir()) / "checkpoints" / field.name if name == "inception" else Path(name)
            self.label = "" if self.file.stem == field.stem else self.file.stem
            try:
                if name == "inception" and not self.file.exists():
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    torch.hub.download_url_to_file(INCEPTION, str(self.file), progress=distributed()[0] == 0)
                net = torch.jit.load(self.file, map_location=device).eval()
                self.measure = lambda x: (net(byte(x), return_features=True), net(byte(x), no_output_bias=True))
                self.width = self.measure(torch.zeros(1, 3, 64, 64, device=device))[0].shape[1]
            except Exception as e:  # urllib and torch raise anything
                what = f"cannot fetch {INCEPTION}" if name == "inception" else "not TorchScript in the field's format"
                raise UserError(f"--detector {name}: {what} ({str(e).strip().splitlines()[0]}); give its file by "
                                "--detector FILE, or another network by --detector timm:NAME[:WEIGHTS]") from None
    __call__ = lambda self, image: torch.cat([x.float() for x in self.measure(image)], 1)
def parse_metrics(text):
    """"fid50k,nfs256" -> [("fid", "50k", 50000), ("nfs", "256", 256)]. Below 10k, k is 1,024, as in the field."""
    out = []
    for item in text.split(","):
        found = re.fullmatch(r"(fid|kid|is|pr|nfs)(\d{1,6})(k?)", item)
        n = int(found[2]) * ((1024 if int(found[2]) < 10 else 1000) if found[3] else 1) if found else 0
        if n < 8:
            raise UserError(f"--metrics {item}: must be fid, kid, is, pr or nfs and a number from 8 on, as in fid50k")
        out.append((found[1], found[2] + found[3], n))
    return out
def open_detector(options, device):
    """Checks --metrics and --detector. -> Detector, or None where no metric needs one"""
    kinds = {kind for kind, _, _ in parse_metrics(options.metrics)}
    if "is" in kinds and options.detector == "area8":
        raise UserError("--metrics: area8 gives no class probabilities, which is needs; choose another --detector")
    return Detector(options.detector, device) if kinds - {"nfs"} else None
def share(n, rank, world):
    """Items of this process when n are dealt out; all get the same number, so that some wrap round."""
    return [i % n for i in range(rank, -(-n // world) * world, world)]
def batches(items, cfg, rank, desc):
    """Items, a tensor or a list, in parts that fit into memory, with a progress bar."""
    n = max(1, min(16, 2 ** 18 // cfg.resolution ** 2))
    return tqdm([items[i:i + n] for i in range(0, len(items), n)], desc, unit="batch", disable=rank > 0, leave=False)
def collect(batches, n, keep, rank, world, stop=None):
    """All processes' `batches` (B, F) of `share` -> first `keep` rows; mean (F,), covariance (F, F) of n in float64.
    stop: a list; raises KeyboardInterrupt in all processes when it is not empty in one."""
    parts, total, i = [], 0, rank
    for x in batches:
        counts = torch.arange(i, i + world * len(x), world, device=x.device) < n     # not those that wrapped
        y = F.pad(x.double(), (1, 0), value=1.0) * counts[:, None]  # a one in front: y^T y has count, sum and products
        parts, total, i = [*parts, x] if i - rank < keep else parts, total + y.t() @ y, i + world * len(x)
        if stop is not None and mean_over_processes(total.new_tensor(float(bool(stop)))):
            raise KeyboardInterrupt
    x = torch.cat(parts)[:-(-keep // world)]
    if world > 1:
        dist.all_reduce(total)
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x)
        x = torch.stack(parts, 1).flatten(0, 1)
    mean = total[0, 1:] / n
    return x[:keep], mean, (total[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)
def real_statistics(cfg, data, detector, device, reals, keep, rank, world, stop=None):
    """`collect` of the data and its mirror image, or of `reals` of them; kept on disk."""
    n = min(reals or math.inf, total := len(data) * (2 if cfg.mirror else 1))
    key = repr((data.fingerprint(), cfg.resolution, cfg.mirror, cfg.depth, detector.label, n, keep)).encode()
    key += Path(detector.file).read_bytes() if detector.file else b""
    path = Path(torch.hub.get_dir()) / "3dgp" / f"{hashlib.sha256(key).hexdigest()[:24]}.pt"
    if not mean_over_processes(torch.tensor(float(not path.exists()), device=device)):      # all have it
        return [x.to(device) for x in load_tensors(path, "cached statistics")]
    order = np.random.default_rng(0).permutation(total)[share(n, rank, world)].tolist()
    bar = batches(order, cfg, rank, "measuring data")
    loader = load_batches(data, cfg, lambda step: bar.iterable[step:] if step else bar, 0, stop)
    stats = collect((detector(real_images(b, device)) for b in loader), n, min(keep, n), rank, world, stop)
    if distributed()[2] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as tmp:
            torch.save([x.cpu() for x in stats], tmp)
    return stats
@torch.no_grad()
def evaluate(G, data, labels, metrics, detector, reals, rank, world, stop=None):
    """Metrics of G in evaluation mode, the same on any number of processes; stop: see `collect`. -> {name: number}"""
    cfg, wanted, out, adaptor = G.cfg, parse_metrics(metrics), {}, G.depth_adaptor
    z, c, prior = draw_latents(cfg, max(k for _, _, k in wanted), labels, "evaluate")
    def features(i):
        image, depth = G.render(G.backbone(G.mapping(z[i], c[i])), G.pose(rows(prior, i), z[i], c[i]), cfg.resolution)
        return detector(torch.cat([image, adaptor.candidates(depth)[adaptor.level]], 1) if adaptor else image)
    def flatness(i):    # seen from the middle of the posterior, without thin fog
        _, depth = G.render(G.backbone(G.mapping(z[i], c[i])), mean_camera(G, c[i]), cfg.resolution, cut=True)
        return non_flatness_score(depth, cfg.near, cfg.far)[:, None]
    over = lambda f, n, desc: collect(map(f, batches(share(n, rank, world), cfg, rank, desc)), n, n, rank, world, stop)
    if detector:
        n, w = max(k for kind, _, k in wanted if kind != "nfs"), slice(detector.width)
        real, mean, cov = real_statistics(cfg, data, detector, labels.device, reals, n, rank, world, stop)
        fake = over(features, n, "measuring samples")[0]
    table = {"fid": lambda k: {"fid": frechet_distance((mean[w], cov[w, w]), gaussian(fake[:k, w]))},
             "kid": lambda k: {"kid": kernel_distance(real[:k, w], fake[:k, w])},
             "is": lambda k: {"is": inception_score(fake[:k, detector.width:])},
             "pr": lambda k: dict(zip(("precision", "recall"), precision_recall(real[:k, w], fake[:k, w]))),
             "nfs": lambda k: {"nfs": float(over(flatness, k, "measuring depth")[1])}}
    others = {"fid": "fd", "kid": "kd", "is": "score"}      # only Inception's numbers are called fid, kid and is
    for kind, count, k in wanted:
        names, label = (others, f"[{detector.label}]") if kind != "nfs" and detector.label else ({}, "")
        out.update({f"{names.get(name, name)}{count}{label}": value for name, value in table[kind](k).items()})
    return {**out, **evaluate_truth(G, data, labels)} if isinstance(data, ShapesData) else out
@torch.no_grad()
def evaluate_truth(G, data, labels, n=512):
    """Where the truth is known -> {name: number or list}. camera_w1: distance of posterior and prior to true cameras.
    depth_error_render: mean absolute difference, in world units, of rendered depth and the true depth of the image of
    most similar colours (_data: of two images of the data); _raw, _adapted: of true depth, as is and adapted, and
    estimated, by pixel. depth_fd: Frechet distance of rendered and estimated depth."""
    z, c, prior = draw_latents(G.cfg, n, labels, "evaluate_truth")
    def ordered(p):  # but for mean yaw and pitch, which are no property of the data: the scene can turn instead
        return torch.cat([p[:, :2] - p[:, :2].mean(0), p[:, 2:]], 1).sort(0).values
    true, out, pose = data.true_cameras(n).to(z.device), {}, G.pose(prior, z, c)
    for name, p in (("posterior", camera_parameters(pose)), ("prior", camera_parameters(prior))):
        out.update({f"camera_w1_{name}": (ordered(p) - ordered(true)).abs().mean(0).tolist(),
                    f"camera_mean_{name}": p.mean(0).tolist(), f"camera_std_{name}": p.std(0).tolist()})
    batch = collate([data[i] for i in range(n)])
    real, true = real_images(batch, z.device), batch["true_depth"].to(z.device)
    fake, depth = map(torch.cat, zip(*(G.render(G.backbone(G.mapping(z[i], c[i])), rows(pose, i), G.cfg.resolution)
                                       for i in torch.arange(n, device=z.device).split(16))))
    x, y = area8(real[:, :3]), area8(fake)
    out["depth_error_render"] = float((depth - true[torch.cdist(y, x).argmin(1)]).abs().mean())
    out["depth_error_data"] = float((true - true[torch.cdist(x, x).fill_diagonal_(math.inf).argmin(1)]).abs().mean())
    for name, level in (("raw", 0), ("adapted", G.depth_adaptor.level)) if G.depth_adaptor else ():
        shown, rendered = (G.depth_adaptor.candidates(d)[level] for d in (true, depth))
        out[f"depth_error_{name}"] = float((shown - real[:, 3:]).abs().mean())
        out[f"depth_fd_{name}"] = frechet_distance(gaussian(area8(real[:, 3:])), gaussian(area8(rendered)))
    return out

# ---- Training --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic(path, durable=False):
    """Write to a temporary file beside `path` that takes its name only when all went well; durable: and is on disk."""
    tmp = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        yield tmp
        for when, what in (("before", tmp), ("after", tmp.parent)):     # the content, then the name
            if durable:
                handle = os.open(what, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            if when == "before":
                os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # the latter is how torch reports a full disk
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise UserError(f"cannot write {path}: {reason}; what was there before is untouched") from None
    finally:
        tmp.unlink(missing_ok=True)
def load_tensors(path, flag, **kind):
    """torch.load that runs no code, with one clear line when it fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **kind)
    except Exception as e:  # a damaged or foreign file raises anything
        reason = f"not a readable file of tensors ({type(e).__name__})"
        raise UserError(f"{flag} {path}: {'no such file' if isinstance(e, FileNotFoundError) else reason}") from None
def seed_draws(seed, step, phase, micro):
    """The draws that follow depend on these alone: resuming, or other processes of one batch_gpu, changes none."""
    entropy = [seed, step + 1, int.from_bytes(phase.encode(), "little"), micro]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
def mean_over_processes(t):
    """The mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
        t /= dist.get_world_size()
    return t
def start_average(module, extra):
    """Begins to average a module's gradients (none counts as 0) and another tensor over processes, beside other work.
    -> a function that ends it, replaces non-finite gradients, and returns how many there were, and the mean of extra"""
    params = [p for p in module.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat, world = torch.cat([t.flatten() for t in (*grads, extra)]), distributed()[1]
    work = dist.all_reduce(flat, async_op=True) if dist.is_initialized() else None
    def finish():
        if work:
            work.wait()
            flat.div_(world)
        bad = (~flat.isfinite()).sum()
        torch.nan_to_num(flat, nan=0.0, posinf=1e5, neginf=-1e5, out=flat)
        *means, last = flat.split([t.numel() for t in (*params, extra)])
        for p, g in zip(params, means):
            p.grad = g.view_as(p)
        return bad, last
    return finish
class Averages:
    """Running means of what is logged, over steps and processes. Every process must add the same names."""
    def __init__(self):
        self.values = {}
    def add(self, **values):
        for name, v in values.items():
            self.values.setdefault(name, []).append(torch.as_tensor(v, dtype=torch.float32).detach())
    mark = lambda self, phase: None     # a phase of the step has ended, which `bench` wants to know
    def result(self, device):
        means = {k: torch.stack([x.to(device) for x in v]).mean(0) for k, v in sorted(self.values.items())}
        self.values, flat = {}, mean_over_processes(torch.cat([x.flatten() for x in means.values()]))
        parts = flat.split([x.numel() for x in means.values()])
        return {k: part.view_as(x).tolist() for (k, x), part in zip(means.items(), parts)}
def generator_pass(G, D, labels, patch, step, number, weight, stats):
    """Gradients of G, and of D on what G makes: one pass of each network serves both losses. weight: this pass's share
    of the process's images; its number tells its draws from those of others. -> sum of w (w_dim,)"""
    cfg, kimg, micro = G.cfg, step * G.cfg.batch_size / 1000, len(patch.scale)
    seed_draws(train_seed(cfg), step, "generator", number)
    z, c, prior = draw_latents(cfg, micro, labels)
    choice = sample_adaptor_choice(cfg, micro, kimg)
    image, w = synthesize(G, z, c, prior, choice, patch)
    image = blur(image, schedules(cfg, kimg)["blur_sigma"])
    stats.mark("G forward")
    seen = image.detach().requires_grad_()
    with autocast(cfg, seen.device):
        score = D(seen, c, patch)[0]
    loss_g, loss_d = F.softplus(-score).mean(), F.softplus(score).mean()    # non-saturating: -log of D's sigmoid
    grad, = torch.autograd.grad(loss_g * weight, seen, retain_graph=True)
    (loss_d * weight).backward()
    stats.mark("D on fakes")
    image.backward(grad)
    stats.mark("G backward")
    stats.add(loss_g=loss_g, loss_d_fake=loss_d, score_fake=score.mean(), fake_std=seen.std())
    if G.depth_adaptor is not None:
        stats.add(near_offset=G.depth_adaptor.near_offset().mean(), depth_choice=F.one_hot(choice, 4).float().mean(0))
    return w.detach().sum(0)
def discriminator_pass(D, cfg, teacher, real, c, patch, scale_mean, step, weight, stats):
    """Gradients of D on real images: score, distillation of the whole image, R1 every r1_interval steps."""
    now, lazy_r1 = schedules(cfg, step * cfg.batch_size / 1000), step % cfg.r1_interval == 0
    if distils := teacher is not None and cfg.kd_weight > 0:
        with autocast(cfg, real.device):
            target = teacher(real[:, :3])
        stats.mark("teacher")
    image = blur(extract_patch(real, patch, cfg.patch_resolution), now["blur_sigma"]).requires_grad_(lazy_r1)
    with contextlib.nullcontext() if lazy_r1 else autocast(cfg, real.device):
        score, predicted = (D.forward if lazy_r1 else D)(image, c, patch)  # double backward: neither bf16 nor compiled
    loss = loss_real = F.softplus(-score).mean()
    if distils:
        distance = distillation_distance(predicted, target)
        loss = loss + now["kd_weight"] * (distance * patch.scale / scale_mean).mean()
        stats.add(kd_distance=distance.mean())
    if lazy_r1:
        penalty = r1_penalty(score, image).mean()
        loss = loss + penalty * (cfg.r1_gamma / 2 * cfg.r1_interval)
        stats.add(r1=penalty)
    (loss * weight).backward()
    stats.mark("D on reals, R1" if lazy_r1 else "D on reals")
    stats.add(loss_d_real=loss_real, score_real=score.mean())
def build(cfg, device):
    """Everything that a run trains and a checkpoint holds, the same in every process. -> {name: module or optimiser}"""
    seed_draws(cfg.seed, -1, "init", 0)
    G, D, ema = Generator(cfg).to(device), Discriminator(cfg).to(device), Generator(cfg).to(device)
    ema.eval().requires_grad_(False).load_state_dict(G.state_dict())
    if cfg.compile:
        torch._functorch.config.donated_buffer = False      # D's graph is used twice
        for network in (G.backbone, D):    # with it, what PyTorch 2.11 makes for CPUs writes where it must not
            network.compile(options=dict(layout_optimization=device.type != "cpu"))
    ratio = cfg.r1_interval / (cfg.r1_interval + 1)    # corrects Adam for R1 at every r1_interval-th step alone
    opt_g = torch.optim.Adam(G.parameters(), cfg.g_lr, (0.0, 0.99), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), cfg.d_lr * ratio, (0.0, 0.99 ** ratio), fused=True)
    return dict(G=G, D=D, G_ema=ema, opt_g=opt_g, opt_d=opt_d)
def training_step(cfg, modules, teacher, batch, labels, step, stats, stop=False):
    """One update of G, D and the average by a batch of the data (`collate`). -> whether a process wants to stop"""
    G, D, ema, opt_g, opt_d = modules.values()
    (rank, world, _), device, kimg = distributed(), labels.device, step * cfg.batch_size / 1000
    real, c, share = real_images(batch, device), batch["label"].to(device), cfg.batch_size // world
    # shared by reals and fakes; every process draws the whole batch's: distillation needs their mean scale
    seed_draws(train_seed(cfg), step, "patches", 0)
    patches = sample_patch(cfg, cfg.batch_size, kimg)
    scale_mean = float(patches.scale.mean())
    patches = Patch(*(t.to(device) for t in rows(patches, rank * share, (rank + 1) * share)))
    now, ratio = schedules(cfg, kimg), cfg.r1_interval / (cfg.r1_interval + 1)    # see build
    G.density_noise = now["density_noise"]
    opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = (
        x * now["lr_factor"] for x in (cfg.g_lr, cfg.d_lr * ratio))
    micro, weight = cfg.batch_gpu, cfg.batch_gpu / share
    passes = [slice(i, i + micro) for i in range(0, share, micro)]
    opt_g.zero_grad()
    opt_d.zero_grad()
    stats.mark("data")
    w_sum = sum(generator_pass(G, D, labels, rows(patches, part), step, rank * share // micro + m, weight, stats)
                for m, part in enumerate(passes))
    if G.camera_generator is not None:
        seed_draws(train_seed(cfg), step, "camera", 0)               # the same draws in every process
        loss, log = camera_regularizer(G, labels, kimg)
        loss.backward()
        stats.add(**log)
    stats.mark("camera regulariser")
    averages = [start_average(G, w_sum / share)]            # while D looks at the reals
    for part in passes:
        discriminator_pass(D, cfg, teacher, real[part], c[part], rows(patches, part), scale_mean, step, weight, stats)
    averages.append(start_average(D, real.new_full([1], stop)))
    (bad_g, w_mean), (bad_d, stop) = (finish() for finish in averages)
    stats.mark("waiting for others")
    stats.add(nonfinite_g=bad_g, nonfinite_d=bad_d)
    opt_g.step()
    opt_d.step()
    G.mapping_network.w_avg.lerp_(w_mean, 1 - 0.998)
    stats.mark("optimisers")
    beta = 0.5 ** (cfg.batch_size / max(min(cfg.ema_kimg * 1000, (step + 1) * cfg.batch_size * cfg.ema_rampup), 1e-8))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(G.parameters()), 1 - beta)
        torch._foreach_copy_(list(ema.buffers()), list(G.buffers()))
    stats.mark("EMA")
    return bool(stop)
MAY_DIFFER = {"data", "out", "device", "workers", "teacher_weights", "depth_weights"}   # between machines
# options that may be set anew on resuming; all others are the checkpoint's
FREE_ON_RESUME = set("out resume device workers kimg snapshot_kimg log_kimg metrics metrics_kimg detector reals fused "
                     "batch_gpu compile data precision teacher_weights depth_weights guard timeout".split())
def checkpoints(folder):
    """Checkpoints of a run, the newest first. -> [(kimg, path)]"""
    return sorted(((float(p.stem[11:]), p) for p in Path(folder).glob("checkpoint-??????.???.pt")), reverse=True)
def load_checkpoint(*paths):
    """The first whole one, where the CRC-32 of each part agrees, of the paths, or of the run in a folder, the newest
    first. -> path, Config, state"""
    folder, *_ = paths = [*map(Path, paths)]
    if folder.is_dir() and not (paths := [p for _, p in checkpoints(folder)]):
        raise UserError(f"--resume: no checkpoint in {folder}; name one, or the folder of a run")
    for path in paths:
        try:
            problem, state = "not a checkpoint of this program", load_tensors(path, "--resume", mmap=True)
            state = {k: state[k] for k in "config step images seconds G D G_ema opt_g opt_d".split()}
            problem = "damaged, its checksum is wrong"
            with zipfile.ZipFile(path) as f:
                if broken := f.testzip():
                    raise zipfile.BadZipFile(broken)
            problem = "of another version of this program"
            return path, Config(**state["config"]), state
        except Exception as e:  # zipfile, of damaged files, raises anything
            error = e if isinstance(e, UserError) else UserError(f"--resume {path}: {problem} ({e})")
            if path == paths[-1]:
                raise error from None
            print(f"3dgp.py: warning: {error}; the checkpoint before it is taken", file=sys.stderr)
def thin_out(folder, images, every):
    """Deletes old checkpoints: of those from 2^k to 2^(k+1) intervals (of so many images) ago one is kept."""
    newest, seen = images // every, set()
    for kimg, path in checkpoints(folder):
        number = round(kimg * 1000) // every
        if number % 2 ** int(math.log2(max(newest - number, 1))) or number in seen and number < newest:
            path.unlink(missing_ok=True)
        seen.add(number)
def load_generator(options):
    """The averaged generator of the checkpoint options.resume. -> Generator in evaluation mode, path, kimg seen"""
    path, cfg, state = load_checkpoint(options.resume)
    device = choose_device(options, distributed()[2])
    try:
        validate(cfg, 1)
        G = Generator(cfg)
        G.load_state_dict(state["G_ema"])
        return G.to(device).eval().requires_grad_(False), path, state["images"] / 1000
    except Exception as e:  # whatever a foreign or damaged state leads to
        raise UserError(f"--resume {path}: does not fit its own configuration ({type(e).__name__})") from None
def join_processes(cfg, device, world):
    """Meets the other processes, which must run the same program, libraries and options."""
    if world == 1:
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(seconds=getattr(cfg, "timeout", 600)))
    program, checkpoint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8], Path(cfg.resume).name
    own = dict(vars(cfg), PyTorch=torch.__version__, NumPy=np.__version__, program=program, resume=checkpoint)
    dist.all_gather_object(parts := [None] * world, own)
    for rank, other in enumerate(parts):
        if differing := [f"{k} {v} (process 0: {parts[0].get(k)})" for k, v in other.items()
                         if v != parts[0].get(k) and k not in MAY_DIFFER]:
            raise UserError(f"process {rank} differs from process 0: {', '.join(differing)}; all must run the same")
def distributed():
    """-> rank, processes, and the rank on this machine, as torchrun says."""
    return tuple(int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
def validate(cfg, world):
    """All that can be wrong in a configuration, before anything is built. -> images of a process in a step"""
    R, P, share = cfg.resolution, cfg.patch_resolution, cfg.batch_size // world
    micro = min(cfg.batch_gpu or share, share)
    def check(ok, message):
        if not ok:
            raise UserError(message)
    positive = ("batch_size triplane_features channel_base channel_max adaptor_channels fine_samples z_dim "
                "w_dim box r1_interval patch_beta timeout kimg snapshot_kimg log_kimg metrics_kimg").split()
    for f in dataclasses.fields(cfg):      # numbers: finite, and none below zero but angles
        name, flag, v = f.name, "--" + f.name.replace("_", "-"), getattr(cfg, f.name)
        values = [x for x in (v if isinstance(v, tuple) else [v]) if isinstance(x, (int, float))]
        check(all(map(math.isfinite, values)), f"{flag}: not a finite number")
        check(min(values, default=0) >= 0 or name in ("prior_yaw", "prior_pitch"), f"{flag}: must not be negative")
        check(name not in positive or min(values) > 0, f"{flag} {v}: must be positive")
        check(not name.startswith("prior_") or v[0] < v[1], f"{flag}: the first number must be less than the second")
        check("resolution" not in name or v > 7 and v & (v - 1) == 0, f"{flag} {v}: must be a power of two, 8 or more")
    check(cfg.data, "--data is empty: name a data set, or a folder or zip of images")
    check(P <= R, f"--patch-resolution {P}: larger than --resolution {R}")
    check(0 <= cfg.prior_pitch[0] and cfg.prior_pitch[1] <= math.pi, "--prior-pitch: must lie between 0 and pi")
    check(cfg.prior_fov[1] < 180, "--prior-fov: must stay below 180 degrees")
    check(cfg.channel_base >= max(R, cfg.triplane_resolution), "--channel-base: less than the highest resolution")
    check(cfg.coarse_samples >= 3, f"--coarse-samples {cfg.coarse_samples}: must be 3 or more")
    check(cfg.near < cfg.far, f"--near {cfg.near}: must be less than --far {cfg.far}")
    check(cfg.batch_size % world == 0, f"--batch-size {cfg.batch_size}: not divisible by {world} processes")
    check(micro % MBSTD_GROUP == 0, f"--batch-size {cfg.batch_size} over {world} processes, --batch-gpu {cfg.batch_gpu}"
          f": a pass has {micro} images, but must have a multiple of {MBSTD_GROUP} (mini-batch standard deviation)")
    check(share % micro == 0, f"--batch-gpu {cfg.batch_gpu}: does not divide a process's share of {share} images")
    return share
def images_per_pass(cfg, share, device):
    """--batch-gpu, or where that is 0 the most images, in whole MBSTD_GROUPs, that divide a process's share and whose
    planes, feature maps and samples on rays, 32 bytes a number, fill half of the memory (CPU: of 8 GiB; 8 images)."""
    T, P, cuda = cfg.triplane_resolution, cfg.patch_resolution, device.type == "cuda"
    per_pixel = cfg.adaptor_channels + 8 * (cfg.coarse_samples + cfg.fine_samples)
    numbers = 3 * cfg.triplane_features * T * T + per_pixel * P * P + sum(channels(cfg, r) * (
        r * r * (r <= T) + min(r, P) ** 2 * (r <= cfg.resolution)) for r in (2 ** i for i in range(2, 12)))
    fits = (torch.cuda.get_device_properties(device).total_memory if cuda else 2 ** 33) // (2 * 32 * numbers)
    fits = fits if cuda else min(fits, 8)
    choices = [n for n in range(MBSTD_GROUP, share + 1, MBSTD_GROUP) if share % n == 0 and n <= fits]
    return min(cfg.batch_gpu, share) or max(choices, default=min(MBSTD_GROUP, share))
def choose_device(cfg, local_rank):
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that this PyTorch can use; install a CUDA build or leave --device out")
    if cfg.device == "cpu" or not torch.cuda.is_available():
        with contextlib.suppress(OSError, AttributeError, TypeError):   # glibc: freed memory stays with the process,
            for option in ((-4, 0), (-1, -1)):                          # since new pages cost more than the arithmetic
                ctypes.CDLL(None).mallopt(*option)
        return torch.device("cpu")
    if (here := int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))) > torch.cuda.device_count():
        raise UserError(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs; start fewer")
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.allow_tf32 = tf32 = getattr(cfg, "precision", "tf32") != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return torch.device("cuda", local_rank)
def diagnose(entry, before, cfg, parameters):
    """A log entry, the healthy ones before it, numbers of parameters of G and D -> what tells of divergence, or """""
    before, share = before[-GUARD["window"]:], [entry[f"nonfinite_{k}"] / n for k, n in zip("gd", parameters)]
    def limit(name, floor=0.0):     # so many times the median, `floor` at least
        known = [x[name] for x in before if name in x]
        return max(GUARD[name] * np.median(known), floor) if len(known) >= GUARD["least"] else math.nan
    score, r1 = max(entry["score_real"], entry["score_fake"], key=abs), entry.get("r1", 0)
    found = {f"{max(share):.0%} of the gradients are not finite": max(share) > GUARD["nonfinite"],
             "a loss is not finite": not math.isfinite(entry["loss_g"] + entry["loss_d_real"] + entry["loss_d_fake"]),
             f"D is saturated, its mean score is {score:.3g}": abs(score) > GUARD["score"],
             f"images are constant, their deviation is {entry['fake_std']:.2g}": entry["fake_std"] < limit("fake_std"),
             f"G's loss jumped to {entry['loss_g']:.3g}": entry["loss_g"] > limit("loss_g", GUARD["floor_g"]),
             f"R1 jumped to {r1:.3g}": r1 > limit("r1", 2 * GUARD["floor_r1"] / max(cfg.r1_gamma, 1e-9))}
    return next((what for what, is_so in found.items() if is_so), "")
def go_back(cfg, what, kimg, healthy):
    """After a divergence at kimg: -> Config, state of a healthy checkpoint (the n-th time: of one n - 1 before it)."""
    recent = sum(abs(kimg - x) < max(GUARD["tries_kimg"], 4 * cfg.snapshot_kimg) for x in cfg.recoveries)
    if recent >= GUARD["tries"]:
        raise UserError(f"diverged at {kimg:g} kimg ({what}), after {recent} recoveries; start anew with lower --g-lr "
                        "and --d-lr, or a higher --r1-gamma")
    good = [x for x in checkpoints(cfg.out) if x[0] <= healthy] or checkpoints(cfg.out)[-1:]
    path, saved, state = load_checkpoint(*(p for _, p in good[min(recent, len(good) - 1):]))
    back = state["images"] / 1000
    if distributed()[0] == 0:
        append_line(Path(cfg.out) / "log.jsonl", dict(kimg=back, diverged=kimg, reason=what))
        tqdm.write(f"diverged at {kimg:g} kimg: {what}; back to {path.name}, learning rates halved", file=sys.stderr)
    return dataclasses.replace(saved, **{k: getattr(cfg, k) for k in FREE_ON_RESUME - {"resume"}}, resume=str(path),
                               recoveries=(*cfg.recoveries, back)), state
def load_batches(data, cfg, sampler, step=0, stop=()):
    """Batches of the data and its mirror image from a step on. sampler(step): lists of indices from there on. Workers
    that die begin again, 3 times in a row; slow ones have --timeout seconds, but less when `stop` is not empty."""
    batches, batch, failures = None, None, 0
    while True:
        try:
            batches = iter(torch.utils.data.DataLoader(
                MirroredData(data), batch_sampler=sampler(step), num_workers=cfg.workers, timeout=cfg.workers and 10,
                collate_fn=collate, worker_init_fn=start_worker, pin_memory=cfg.device != "cpu" and
                torch.cuda.is_available())) if batches is None else batches
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # PyTorch's own handler would raise in the middle of a step
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as e:
            waits, reason = "timed out" in str(e), str(e).partition("\n")[0]
            failures += 10 / cfg.timeout if waits else 1 / 3
            if failures > 1:
                raise UserError(f"--data: data workers fail again and again: {reason}") from None
            if not waits:
                batches = tqdm.write(f"data workers begin again: {reason}", file=sys.stderr)
            elif stop and batch:
                yield batch     # the last one once more
        else:
            yield batch
            step, failures = step + 1, 0
def train(cfg, state=None):
    """The whole run. state: of a checkpoint to go on from. After a divergence it goes on from an earlier one."""
    stop, before = [], {s: signal.getsignal(s) for s in STOP_SIGNALS}
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":     # when torchrun itself is killed, stop too
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    try:
        while trouble := train_while_healthy(cfg, state, stop):
            cfg, state = go_back(cfg, *trouble)
    finally:
        for worker in torch.multiprocessing.active_children():      # one that hangs would not let the program end
            worker.kill()
        for s, handler in before.items():
            signal.signal(s, handler)
def train_while_healthy(cfg, resumed, stop):
    """-> None at the end, or when `stop` is not empty; on divergence what tells of it, its kimg, the last healthy"""
    rank, world, local_rank = distributed()
    share, device = validate(cfg, world), choose_device(cfg, local_rank)
    cfg = dataclasses.replace(cfg, batch_gpu=images_per_pass(cfg, share, device))
    data, detector = open_data(cfg), open_detector(cfg, device) if cfg.metrics else None
    teacher = Teacher(cfg.teacher, cfg.teacher_weights).to(device) if cfg.teacher != "none" else None
    for name, found in (("num_classes", data.num_classes), ("teacher_dim", teacher.dim if teacher else 0)):
        wanted = getattr(cfg, name)
        if wanted != found and (wanted or resumed):
            raise UserError(f"--{name.replace('_', '-')} {wanted}: so given or saved; data and teacher make it {found}")
        cfg = dataclasses.replace(cfg, **{name: found})
    join_processes(cfg, device, world)
    say = functools.partial(print, flush=True) if rank == 0 else (lambda *a, **k: None)
    G, D, ema, *_ = (modules := build(cfg, device)).values()
    parameters = [sum(p.numel() for p in network.parameters()) for network in (G, D)]
    step, images, seconds = (resumed[k] for k in ("step", "images", "seconds")) if resumed else (0, 0, 0.0)
    if resumed:
        try:
            for name, module in modules.items():
                module.load_state_dict(resumed[name])
        except Exception as e:  # whatever a foreign or damaged state leads to
            raise UserError(f"--resume {cfg.resume}: does not fit its own configuration ({type(e).__name__})") from None
    labels = torch.from_numpy(data.labels).to(device)
    total_steps, out = math.ceil(cfg.kimg * 1000 / cfg.batch_size), Path(cfg.out)
    if step >= total_steps:     # restarted after its end
        return say(f"{out}: finished already")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_reals(data, out / "reals.png")
        with atomic(out / "config.json") as tmp:
            tmp.write_text(json.dumps(dataclasses.asdict(cfg), indent=2))
        for path in filter(Path.exists, (out / "log.jsonl", out / "metrics.jsonl") if resumed else ()):
            lines, seen = path.read_text().splitlines(), images / 1000
            with atomic(path) as tmp:    # forget what was logged after the checkpoint
                tmp.write_text("".join(f"{x}\n" for x in lines if parse_line(x).get("kimg", math.inf) <= seen))
        for path in out.glob(".*.tmp"):     # of a process that was killed
            path.unlink()
        for path in (p for k, p in checkpoints(out) if k > images / 1000):      # of a way that the run has left
            path.rename(path.with_name(f"left-{path.name}"))
    say(f"{cfg.data}: {len(data):,} images, {cfg.num_classes or 'no'} classes; {cfg.resolution}², patches "
        f"{cfg.patch_resolution}², {'RGB and depth' if cfg.depth != 'none' else 'RGB alone'}; teacher {cfg.teacher}\n"
        f"G {parameters[0] / 1e6:.1f} M, D {parameters[1] / 1e6:.1f} M; batch {world} x {share // cfg.batch_gpu} x "
        f"{cfg.batch_gpu} on {device}; {out}")
    stats, unreadable, said, done, start = Averages(), set(), set(), False, time.time() - seconds
    history, healthy, measured = [], images / 1000, images / 1000    # kimg of the last healthy log line, measurement
    for s in STOP_SIGNALS:
        signal.signal(s, lambda *_: stop.append(1))
    named = lambda kind, suffix: out / f"{kind}-{images / 1000:010.3f}.{suffix}"
    def save(path):    # plain tensors and numbers; random states need no place in it: see seed_draws
        state = dict(config=dataclasses.asdict(cfg), step=step, images=images, seconds=time.time() - start)
        with atomic(path, durable=True) as tmp:
            torch.save({**state, **{k: m.state_dict() for k, m in modules.items()}}, tmp)
    def snapshot():
        save(named("checkpoint", "pt"))
        thin_out(out, images, max(1, round(cfg.snapshot_kimg * 1000)))
        write_samples(ema, labels, named("samples", "png"))
    def metrics():    # -> what tells of divergence, or ""
        try:
            name, value, best = measure(out / "metrics.jsonl", images / 1000, ema, data, labels, cfg, detector, rank,
                                        world, stop) if cfg.metrics else ("", 0, 1)
        except KeyboardInterrupt:   # `stop` was set meanwhile; the next step ends the run
            return ""
        if rank == 0 and value == best:
            save(out / "best.pt")
        ill = name[:1] == "f" and not value <= GUARD["distance"] * best and cfg.guard == "on"     # in process 0 alone
        ill = mean_over_processes(torch.tensor(float(ill), device=device)) > 0
        return (f"{name} rose to {value:.3g} from {best:.3g}" if rank == 0 else "a distance rose") if ill else ""
    def due(kimg):    # at the end, and when a step has crossed a multiple of it
        every = max(1, round(kimg * 1000))
        return done or images // every > (images - cfg.batch_size) // every
    if rank == 0:    # even of a run that goes on: its configuration may be another one
        snapshot()
    if not resumed:
        metrics()
    tick_time, tick_images, kimg = time.time(), images, images / 1000
    with tqdm(total=total_steps * cfg.batch_size, initial=images, unit="img", disable=rank > 0,
              mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        for batch in load_batches(data, cfg, lambda step: Batches(cfg, len(data), step, rank, world), step, stop):
            unreadable.update(batch["bad"])
            stopped = training_step(cfg, modules, teacher, batch, labels, step, stats, bool(stop))
            step, images, kimg = step + 1, images + cfg.batch_size, (images + cfg.batch_size) / 1000
            bar.update(cfg.batch_size)
            done = stopped or step == total_steps
            if due(cfg.log_kimg) or due(1):
                check_readable(unreadable, said, images, cfg)
            if due(cfg.log_kimg):
                now = time.time()
                entry = dict(kimg=round(kimg, 3), **stats.result(device), seconds=round(now - start, 1),
                             images_per_second=round((images - tick_images) / (now - tick_time), 2),
                             memory_mb=memory(device)[1] / 2**20, unreadable=len(said), schedules=schedules(cfg, kimg))
                if cfg.guard == "on" and (ill := diagnose(entry, history, cfg, parameters)):
                    return ill, kimg, healthy       # in all processes alike: they share the averages
                history, healthy = [*history[-GUARD["window"]:], entry], kimg
                if rank == 0:
                    append_line(out / "log.jsonl", entry)
                bar.set_postfix({k: f"{entry[k]:.3g}" for k in ("loss_g", "score_real", "score_fake")})
            if rank == 0 and due(cfg.snapshot_kimg):
                snapshot()
            if not stopped and due(cfg.metrics_kimg):
                if ill := metrics():
                    return ill, kimg, measured
                measured = kimg
            if any(map(due, (cfg.log_kimg, cfg.snapshot_kimg, cfg.metrics_kimg))):   # speed is that of training alone
                tick_time, tick_images = time.time(), images
            if done:
                break
    end = "finished" if step == total_steps else f"stopped (go on with --resume latest --out {out})"
    say(f"{end} at {kimg:g} kimg after {(time.time() - start) / 60:.1f} minutes; see {named('samples', 'png')}")
def append_line(path, entry):
    with open(path, "a") as f:
        f.write(json.dumps(entry) + "\n")
def parse_line(line):
    """A line of a .jsonl file as a dict; empty for one that a crash cut short."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}
def measure(path, kimg, G, data, labels, options, detector, rank, world, stop=None):
    """`evaluate`, printed and appended to a file. -> name, value and best so far of its first number (in process 0)"""
    result = evaluate(G, data, labels, options.metrics, detector, options.reals, rank, world, stop)
    if rank:
        return "", 0, 1
    append_line(path, dict(kimg=kimg, data=G.cfg.data, reals=options.reals, **result))
    tqdm.write("\n".join(f"{kimg:g} kimg: {k} {v:.4g}" for k, v in result.items() if isinstance(v, float)))
    first = next(iter(result))
    best = min if first[:2] in ("fi", "fd", "ki", "kd") else max
    values = [x[first] for x in map(parse_line, path.read_text().splitlines()) if math.isfinite(x.get(first, math.nan))
              and (x.get("data"), x.get("reals")) == (G.cfg.data, options.reals)]
    return first, result[first], best(values, default=result[first])
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)     # Ctrl-C, schedulers and spot machines, SLURM
def start_worker(_):
    """In data workers: the training process decides when to stop; `ImageData.read` sets an alarm."""
    def alarm(*_):
        raise TimeoutError("no answer")
    for s in STOP_SIGNALS:
        signal.signal(s, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, alarm)
def memory(device, reset=False):
    """Bytes of the GPU, or resident, that this process holds, and the most since a reset. nan where unknown."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    try:    # Linux
        if reset:   # give back what is free, then set the high-water mark to what is left
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return tuple(int(status.split(key)[1].split()[0]) * 1024 for key in ("VmRSS:", "VmHWM:"))
    except (OSError, AttributeError, IndexError):
        return math.nan, math.nan
def check_readable(names, said, images, cfg):
    """Share the names of unreadable images and name each once; stop if more than 1% of the first 1000 are bad."""
    parts = [names] * distributed()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, names)
    fresh = set().union(*parts) - said
    said |= fresh
    if len(said) > 10 and images < 1000 + cfg.batch_size:
        raise UserError(f"--data {cfg.data}: {len(said)} of the first {images} images are unreadable; mend the data")
    for name in sorted(fresh) if distributed()[0] == 0 else ():
        tqdm.write(f"skipped, unreadable: {name}", file=sys.stderr)

# ---- Sampling: pictures, animations, meshes --------------------------------------------------------------------------
def to_picture(rgb, depth=(), near=-1, far=1, dim=1):
    """rgb (3, H, W) in [-1, 1] and, below it (dim=2: beside), depth (1, H, W) if any, near black. -> uint8 (., ., 3)"""
    depths = [((d - near) / max(far - near, 1e-6)).clamp(0, 1).expand(3, -1, -1) for d in depth]
    return (torch.cat([(rgb.clamp(-1, 1) + 1) / 2, *depths], dim) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
def tile(cells, columns):
    """Equal pictures (H, W, 3), row by row; small ones are enlarged without smoothing: pixels stay visible."""
    lines = [np.concatenate(cells[i:i + columns], 1) for i in range(0, len(cells) - columns + 1, columns)]
    zoom = -(-96 // cells[0].shape[1])
    return PIL.Image.fromarray(np.concatenate(lines, 0).repeat(zoom, 0).repeat(zoom, 1))
def write_image(image, path):
    with atomic(path) as tmp:
        image.save(tmp, "PNG")
def grid_indices(labels, n):
    """n indices of samples, going round the classes."""
    labels = labels if len(labels) else np.zeros(n)
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)[:n]]
    return [int(np.resize(members[i % len(members)], n)[i // len(members)]) for i in range(n)]
def write_reals(data, path):
    real = real_images(collate([data[i % len(data)] for i in grid_indices(data.labels, 32)]), "cpu")
    write_image(tile([to_picture(x[:3], x[3:]) for x in real], 16), path)
def render_views(G, planes, cameras, resolution, dim=1):
    """One scene (planes of 1) from each camera -> pictures of RGB and depth, as `to_picture`"""
    views = [G.render(planes, rows(cameras, i, i + 1), resolution) for i in range(len(cameras.yaw))]
    near, far = views[0][1].flatten().quantile(planes.new_tensor([0.02, 0.98])).tolist()    # but for strays
    return [to_picture(rgb[0], depth[0], near, far, dim) for rgb, depth in views]
@torch.no_grad()
def write_samples(G, labels, path, scenes=16, views=4):
    """A grid of fixed z and classes, 4 scenes a row: RGB over depth, `views` yaws, the posterior's mean ± 0.3 rad"""
    z, _, prior = draw_latents(G.cfg, scenes, labels, "samples")
    c = (torch.unique(labels) if G.cfg.num_classes else z.new_zeros(1).long()).repeat(scenes)[:scenes]
    camera, cells, R = G.pose(prior, z, c), [], G.cfg.resolution
    yaws = camera.yaw.mean() + torch.linspace(-0.3, 0.3, views, device=z.device)
    for i in torch.arange(scenes, device=z.device).split(1):
        cells += render_views(G, G.backbone(G.mapping(z[i], c[i])), rows(camera, i.expand(views))._replace(yaw=yaws), R)
    write_image(tile(cells, 4 * views), path)
def camera_path(kind, start, n, angle):
    """n cameras of a closed path from `start` (a Camera of 1 or n) on, `angle` radians to each side at most."""
    t = torch.linspace(0, 2 * math.pi, n + 1, device=start.yaw.device)[:-1]
    sin, up = t.sin(), (1 - t.cos()) / 2  # orbit: an ellipse in front, over the top; line: sideways, at constant speed
    yaw, pitch, fov = {"none": (0, 0, 1), "orbit": (sin, -up, 1), "wiggle": (sin / 2, (2 * t).sin() / 4, 1),
                       "line": (sin.asin() * 2 / math.pi, 0, 1), "zoom": (0, 0, 1 - up / 2)}[kind]
    pitch = (start.pitch + angle * pitch).clamp(0.05, math.pi - 0.05)
    moved = start._replace(yaw=start.yaw + angle * yaw, pitch=pitch, fov=start.fov * fov)
    return Camera(*(x.expand(n, *x.shape[1:]) for x in moved))
def write_animation(frames, path, fps):
    """PIL images -> path.webp, path.gif and, where there is ffmpeg, path.mp4"""
    for kind in ("webp", "gif"):
        with atomic(f"{path}.{kind}") as tmp:
            frames[0].save(tmp, kind, save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0, quality=90)
    if shutil.which("ffmpeg"):
        with atomic(f"{path}.mp4") as tmp:
            size, raw = f"{frames[0].width}x{frames[0].height}", b"".join(f.tobytes() for f in frames)
            command = f"ffmpeg -y -v error -f rawvideo -pix_fmt rgb24 -s {size} -r {fps} -i - -pix_fmt yuv420p -f mp4"
            if (done := subprocess.run([*command.split(), tmp], input=raw, capture_output=True)).returncode:
                raise OSError(f"ffmpeg: {done.stderr.decode(errors='replace').strip()}")
def write_ply(path, points, colors, faces=()):
    """Points (N, 3) in world units, y up; colors (N, 3) in [-1, 1]; faces (M, 3), counter-clockwise from outside."""
    vertex = np.rec.fromarrays([points, ((np.clip(colors, -1, 1) + 1) * 127.5).round()], "(3,)<f4, (3,)u1")
    face = np.rec.fromarrays([np.full(len(faces), 3), np.reshape(faces, (-1, 3))], "u1, (3,)<i4")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertex)}",
              *(f"property float {k}" for k in "xyz"), *(f"property uchar {k}" for k in ("red", "green", "blue")),
              f"element face {len(face)}", "property list uchar int vertex_indices", "end_header\n"]
    with atomic(path) as tmp:
        tmp.write_bytes("\n".join(header).encode() + vertex.tobytes() + face.tobytes())
def extract_mesh(G, planes, camera, level, n):
    """Marching cubes, n points a side, between near and far of the camera: what no ray saw is arbitrary. One scene"""
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise UserError("--mesh: needs scikit-image; pip install scikit-image") from None
    cfg, device, slabs = G.cfg, planes.device, []
    query = lambda x: query_triplane(planes, x[None], cfg.box, G.decoder, cfg.fused and has_custom_ops(device.type))
    line, origin = torch.linspace(-cfg.box, cfg.box, n, device=device), cam2world(camera)[:, :3, 3]
    for x in line.tolist():
        points = F.pad(torch.cartesian_prod(line, line), (1, 0), value=x)              # (n², 3)
        distance = (points - origin).norm(dim=1)
        slabs.append((F.softplus(query(points)[1][0]) * ((distance > cfg.near) & (distance < cfg.far))).cpu())
    if not 0 < level < (highest := max(x.max() for x in slabs)):
        raise UserError(f"--mesh-level {level:g}: must lie between 0 and the largest density, {highest:.3g}")
    vertices, faces, *_ = marching_cubes(torch.stack(slabs).view(n, n, n).numpy(), level, gradient_direction="ascent")
    vertices = (vertices * (2 * cfg.box / (n - 1)) - cfg.box).astype(np.float32)       # the unit was a cell
    colors = [query(x)[0][0] for x in torch.from_numpy(vertices).to(device).split(2 ** 16)]
    return vertices, torch.cat(colors).cpu().numpy(), faces                            # (V, 3), (V, 3), outwards (M, 3)
def write_cameras(G, path, n=16384):
    """Histograms of each camera parameter over all classes: the prior gray, the posterior blue."""
    cfg, device, image = G.cfg, next(G.parameters()).device, PIL.Image.new("RGB", (960, 480), "white")
    z, c, prior = draw_latents(cfg, n, torch.arange(max(cfg.num_classes, 1), device=device), "cameras")
    draw, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(14)
    for i, (name, (low, high)) in enumerate(zip(CAMERA_PARAMETERS, camera_ranges(cfg).tolist())):
        x, y = 320 * (i % 3) + 16, 240 * (i // 3) + 210
        for j, (camera, color) in enumerate(((prior, "#aaaaaa"), (G.pose(prior, z, c), "#2563eb"))):
            p = camera_parameters(camera)[:, i].float().cpu()
            for k, v in enumerate((p.histc(48, low, high) / n * 1200).clamp(max=140).tolist()):
                draw.rectangle([x + 6 * k, y - v, x + 6 * k + 5 - 2 * j, y], color)
            draw.text((x, y - 182 + 18 * j), f"{('prior', 'learned')[j]} {p.mean():.3g} ± {p.std():.2g}", color, font)
        for dx, dy, text, anchor in ((0, -200, name, "la"), (0, 4, f"{low:.3g}", "la"), (288, 4, f"{high:.3g}", "ra")):
            draw.text((x + dx, y + dy), text, "black", font, anchor)
    write_image(image, path)
def parse_numbers(text, flag, below):
    """"1,5,10-20" -> [1, 5, 10, ..., 20]"""
    spans = [re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part) for part in text.split(",")]
    if all(spans) and all(int(s[1]) <= int(s[2] or s[1]) < below for s in spans):
        return [i for s in spans for i in range(int(s[1]), int(s[2] or s[1]) + 1)]
    raise UserError(f"{flag} {text}: must be numbers below {below:,}, as in 1,5,10-20")
@torch.no_grad()
def sample(options):
    """All that a person wants to look at, from a checkpoint alone."""
    if not min(options.frames, options.fps, options.mesh_resolution - 1, (options.resolution or 2) - 1) >= 1:
        raise UserError("--frames, --fps: must be 1 or more, --mesh-resolution and --resolution 2 or more")
    G, path, kimg = load_generator(options)
    cfg, device, resolution = G.cfg, next(G.parameters()).device, options.resolution or G.cfg.resolution
    seeds, count = parse_numbers(options.seeds, "--seeds", 2 ** 31), max(cfg.num_classes, 1)
    classes = parse_numbers(options.classes or f"0-{min(8, count) - 1}", "--classes", count)
    out, pictures, films, stops = Path(options.out or path.with_name(f"samples-{kimg:010.3f}")), [], [], []
    out.mkdir(parents=True, exist_ok=True)
    for label, seed in tqdm([(label, seed) for label in classes for seed in seeds], unit="sample"):
        c, name = torch.tensor([label], device=device), out / f"class{label:04d}-seed{seed:04d}"
        if seed == seeds[0]:
            seed_draws(cfg.seed, -1, "mean w", 0)
            many = torch.randn(4096, cfg.z_dim).to(device)
            mean_w, mean_pose = G.mapping(many, c.expand(4096)).mean(0, keepdim=True), mean_camera(G, c)
        seed_draws(seed, -1, "sample", 0)
        z, _, prior = draw_latents(cfg, 1, torch.zeros(1, dtype=torch.long))    # on the CPU: on all devices alike
        z, prior = z.to(device), Camera(*(x.to(device) for x in prior))
        w, camera = mean_w.lerp(G.mapping(z, c), options.truncation), G.pose(prior, z, c)
        rgb, depth = G.render(planes := G.backbone(w), camera, resolution)
        pictures, stops = [*pictures, to_picture(rgb[0])], [*stops, (w, *mean_pose)]
        if options.each:
            write_image(tile(pictures[-1:], 1), f"{name}.png")
        if options.video != "none" and not options.interpolate:
            poses = camera_path(options.video, mean_pose, options.frames, options.angle)
            films.append(render_views(G, planes, poses, resolution, 2))
            if options.each:
                write_animation([tile([x], 1) for x in films[-1]], f"{name}-{options.video}", options.fps)
        if options.mesh:
            write_ply(f"{name}-mesh.ply", *extract_mesh(G, planes, camera, options.mesh_level, options.mesh_resolution))
        if options.points:
            origins, directions = camera_rays(camera, resolution)                      # (1, R, 3)
            points = origins + directions * depth.flatten(2).transpose(1, 2)
            write_ply(f"{name}-points.ply", points[0].cpu().numpy(), rgb[0].flatten(1).t().cpu().numpy())
        if options.depth:
            adapted = [(G.depth_adaptor.candidates(depth)[G.depth_adaptor.level] + 1) / 2] if G.depth_adaptor else []
            for kind, x in zip(("depth", "adapted"), [(depth - cfg.near) / (cfg.far - cfg.near), *adapted]):
                x = (x[0, 0].clamp(0, 1) * 65535).round().cpu().numpy().astype(np.uint16)
                write_image(PIL.Image.fromarray(x), f"{name}-{kind}.png")
    if not options.each:
        write_image(tile(pictures, len(seeds)), out / "grid.png")
        if films:
            write_animation([tile(x, len(seeds)) for x in zip(*films)], out / options.video, options.fps)
    if options.interpolate:
        t = (1 - torch.linspace(0, math.pi, options.frames + 1, device=device)[:-1].cos()) / 2     # slow at the stops
        ws, *poses = zip(*([a.lerp(b, x) for a, b in zip(*ab)] for ab in zip(stops, stops[1:] + stops[:1]) for x in t))
        poses = camera_path(options.video, Camera(*map(torch.cat, poses)), len(ws), options.angle)
        write_animation([tile(render_views(G, G.backbone(w), rows(poses, i, i + 1), resolution, 2), 1)
                         for i, w in enumerate(tqdm(ws, "walk", unit="frame"))], out / "walk", options.fps)
    if options.cameras:
        write_cameras(G, out / "cameras.png")
    print(f"written to {out}")
def evaluate_checkpoint(options):
    """`eval`: metrics of a checkpoint, over all processes."""
    (rank, world, _), (G, path, kimg) = distributed(), load_generator(options)
    device, G.cfg = next(G.parameters()).device, dataclasses.replace(G.cfg, data=options.data or G.cfg.data)
    detector, data = open_detector(options, device), open_data(G.cfg)
    if G.cfg.num_classes != data.num_classes:
        raise UserError(f"--data {G.cfg.data}: has {data.num_classes} classes, the checkpoint {G.cfg.num_classes}")
    join_processes(options, device, world)
    measure(path.with_name("metrics.jsonl"), kimg, G, data, torch.from_numpy(data.labels).to(device), options, detector,
            rank, world)

# ---- Report: one page that needs nothing but a browser ---------------------------------------------------------------
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>3DGP</title><style>body{font:15px/1.5 system-ui,sans-serif;margin:auto;padding:1em;max-width:1400px;color:#222}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:1em}svg,img,input{
width:100%}figure{margin:0}img{image-rendering:pixelated}.wide{overflow-x:auto}td,th{padding:0 1em 0 0;text-align:left}
</style><script>function show(s){s.parentNode.querySelectorAll("figure").forEach((f,i)=>f.hidden=i!=s.value)}</script>
<h1>3DGP</h1>"""
def chart(title, lines):
    """Inline SVG. lines: {color: [(kimg, value, spread)]}; the spread, if any, is a band."""
    xs, ys = zip(*((x, y + k * spread) for points in lines.values() for x, y, spread in points for k in (-1, 1)))
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    at = lambda x, y: f"{44 + 270 * (x - x0) / (x1 - x0 or 1):.1f},{150 - 140 * (y - y0) / (y1 - y0 or 1):.1f} "
    body = "".join(f"<path d='M44 {150 - 140 * k}h270' stroke=#ddd /><text x=40 y={154 - 140 * k} text-anchor=end>"
                   f"{y0 + (y1 - y0) * k:.3g}</text>" for k in (0, 0.5, 1))
    for color, points in lines.items():
        points = points[::len(points) // 400 + 1] + points[-1:]
        top, line, bottom = ("".join(at(x, y + k * s) for x, y, s in points[::k or 1]) for k in (1, 0, -1))
        body += (f"<polygon points='{top}{bottom}' fill={color} opacity=.15 /><polyline fill=none stroke={color} "
                 f"stroke-width={1.5 if len(points) > 2 else 6} stroke-linecap=round points='{line}' />")
    return (f"<figure>{html.escape(title)}<svg viewBox='0 0 320 170' font-size=10>{body}<text x=44 y=165>{x0:g}</text>"
            f"<text x=314 y=165 text-anchor=end>{x1:g} kimg</text></svg></figure>")
def report(options):
    """`report`: metrics, losses, speed, cameras, samples over time, and where the configurations differ."""
    page, samples, charts, configs, esc = [PAGE], ["<h2>Samples</h2>"], {}, {"default": vars(Config())}, html.escape
    for run, color in zip(map(Path, options.runs), COLORS * len(options.runs)):  # charts[heading][title][color]: points
        if not holds_run(run):
            raise UserError(f"report {run}: not the folder of a run")
        page.append(f"<b style='color:{color}'>&#9632; {esc(str(run))}</b> ")
        configs[str(run)] = parse_line((run / "config.json").read_text())
        files = filter(Path.exists, (run / "metrics.jsonl", run / "log.jsonl"))
        for kind, row in ((f.stem, parse_line(line)) for f in files for line in f.read_text().splitlines()):
            cameras = dict(zip(CAMERA_PARAMETERS, zip(row.get("camera_mean", []), row.get("camera_std", []))))
            for name, value in {**row, **cameras}.items():
                dot = (row.get("kimg"), *value) if name in cameras else (row.get("kimg"), value, 0)
                heading = ("Metrics" if kind == "metrics" else "Camera posterior" if name in cameras else
                           "Speed" if name in ("images_per_second", "memory_mb", "seconds") else "Training")
                if name not in ("kimg", "reals") and all(isinstance(x, (int, float)) and math.isfinite(x) for x in dot):
                    charts.setdefault(heading, {}).setdefault(name, {}).setdefault(color, []).append(dot)
        files = (found := sorted(run.glob("samples-*.png")))[::len(found) // 20 + 1]
        samples += [f"<section><b>{esc(str(run))}</b><input type=range max={len(files) - 1} value={len(files) - 1} "
                    "oninput=show(this)>", *(f"<figure hidden>{esc(f.stem)}<img alt='' src='data:image/png;base64,"
                    f"{base64.b64encode(f.read_bytes()).decode()}'></figure>" for f in files), "</section>"]
    page += [f"<h2>{heading}</h2><div class=charts>{''.join(chart(*x) for x in drawn.items())}</div>"
             for heading, drawn in charts.items()]
    page += [*samples, "<script>document.querySelectorAll('input').forEach(show)</script><h2>Configurations, where not "
             "the default</h2><div class=wide><table><tr><th>", *(f"<th>{esc(name)}" for name in configs)]
    for f in Config.__dataclass_fields__:
        values = [f"<td>{esc(str(list(v) if isinstance(v := c.get(f), tuple) else v))}" for c in configs.values()]
        page += [f"<tr><td>{f}", *values] if len(set(values)) > 1 else []
    with atomic(path := Path(options.out or Path(options.runs[0]) / "report.html")) as tmp:
        tmp.write_text("".join(page) + "</table></div></html>")
    print(f"written to {path}")

# ---- Bench -----------------------------------------------------------------------------------------------------------
def clock(device):
    torch.get_device_module(device).synchronize()    # nothing on a CPU
    return time.perf_counter()
def timed(device, f, *args):
    """-> what f returns, and how many seconds it took"""
    start = clock(device)
    return f(*args), clock(device) - start
class Operations(TorchDispatchMode):
    """Counts floating-point operations (PyTorch's FlopCounterMode does not go with autograd.grad), the query's too."""
    total = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs={}):
        out = f(*args, **kwargs)
        if f.namespace == "threedgp":
            planes, points, _, decoder, *grad = args
            C, n = planes.shape[2], points.shape[0] * points.shape[1]
            self.total += n * (24 * C + (128 * (C + 4) if len(decoder) else 0)) * (3 if grad else 1)
        elif count := flop_registry.get(f.overloadpacket):
            self.total += count(*args, **kwargs, out_val=out)
        return out
def bench_step(cfg, repeats, device):
    """-> heading, rows: times and operations per image of each phase of a training step on `shapes`"""
    teacher = Teacher(cfg.teacher, cfg.teacher_weights).to(device) if cfg.teacher != "none" else None
    cfg = dataclasses.replace(cfg, num_classes=cfg.num_classes or 8, teacher_dim=teacher.dim if teacher else 0)
    share, modules, data = cfg.batch_size // distributed()[1], build(cfg, device), MirroredData(ShapesData(cfg))
    labels, counter = torch.arange(cfg.num_classes, device=device), Operations()
    def step(number):   # -> {phase: seconds and counted operations}
        now, stats, spent = (lambda: np.array([clock(device), counter.total])), Averages(), {}
        marks = [now()]
        def mark(phase):
            marks.append(now())
            spent[phase] = spent.get(phase, 0) + marks[-1] - marks[-2]
        stats.mark, batch = mark, collate([data[i] for i in range(share)])
        mark("drawing data")
        training_step(cfg, modules, teacher, batch, labels, number, stats)
        return spent
    pair = lambda n: {**step(n * cfg.r1_interval + 1), **step(n * cfg.r1_interval)}      # without and with R1
    pair(0)
    with counter, torch.compiler.set_stance("force_eager"):      # compiled code has no operators to count
        counted = pair(1)
    memory(device, reset=True)
    times = [pair(2 + n) for n in range(repeats)]
    x = torch.ones(8192 if device.type == "cuda" else 2048, 8192, device=device)
    x = x.bfloat16() if cfg.precision == "bf16" else x
    rate = 2e-9 * len(x) ** 2 * 8192 / np.median([timed(device, torch.matmul, x, x.t())[1] for _ in range(9)])
    phases = {k: np.array([np.median([t[k][0] for t in times]), counted[k][1] / 1e9]) / share for k in counted}
    phases["whole step"] = sum(v for k, v in phases.items() if "R1" not in k)
    phases["mean, with R1"] = phases["whole step"] + (phases["D on reals, R1"] - phases["D on reals"]) / cfg.r1_interval
    sent = sum(p.numel() for k in "GD" for p in modules[k].parameters()) * 4e-6
    rows = [{"what": k, "ms/image": t * 1e3, "Gflop/image": f, "of products": f / t / rate}
            for k, (t, f) in ((k, v.tolist()) for k, v in phases.items())]
    speed, most = cfg.batch_size / share / phases["mean, with R1"][0], memory(device)[1] / 1e6
    return (f"{speed:.4g} images/s; {share // cfg.batch_gpu} passes of {cfg.batch_gpu}, {most:.0f} MB; products "
            f"{rate:.0f} Gflop/s; gradients {sent:.1f} MB"), rows
@torch.no_grad()
def bench_render(cfg, repeats, device):
    """-> heading, rows: times of making pictures of the data's size, one at a time"""
    G, c = build(cfg, device)["G_ema"], torch.zeros(1, dtype=torch.long, device=device)
    z, _, prior = draw_latents(cfg, 1, c)
    planes, camera = (lambda: G.backbone(G.mapping(z, c))), G.pose(prior, z, c)
    ways = {"planes": planes, "picture": lambda: G.render(planes(), camera, cfg.resolution)}
    ways["frame of an orbit"] = functools.partial(G.render, planes(), camera, cfg.resolution)
    runs = [[timed(device, way)[1] for way in ways.values()] for _ in range(repeats + 1)][1:]
    return f"{memory(device)[1] / 1e6:.0f} MB at most", [{"what": name, "ms": t * 1e3, "per second": 1 / t}
                                                        for name, t in zip(ways, np.median(runs, 0).tolist())]
def bench_triplane(model, repeats, device):
    """-> heading, rows: times of the tri-plane query on rays of random cameras, as in training"""
    B, R, S, C, T = (8, 64, 64, 32, 512) if device.type == "cuda" else (2, 64, 32, 32, 256)
    decoder, no_decoder = TriplaneDecoder(C).to(device), torch.empty(0, device=device)
    plain = lambda p, x: sample_triplane(p.to(x.dtype), x, model.box)
    fused = lambda p, x, decoder=no_decoder: triplane(p, x, model.box, decoder)
    ways = {"features, plain": plain, "features, fused": fused, "query, plain": lambda p, x: decoder.model(plain(p, x)),
            "query, fused lookup": lambda p, x: decoder.model(fused(p, x)),
            "query, fused": lambda p, x: fused(p, x, decoder.packed())}
    ways = {name: way for name, way in ways.items() if "plain" in name or has_custom_ops(device.type)}
    def run(name, dtype):
        """-> seconds forward, seconds of both passes, peak bytes beyond inputs, result and gradients"""
        planes = torch.randn(B, 3, C, T, T, device=device, dtype=dtype)
        planes = (channels_last(planes) if "fused" in name else planes).requires_grad_()   # the layout it likes best
        origins, directions = camera_rays(sample_camera_prior(model, B, device), R)
        depths = stratified_depths(model.near, model.far, (B, R * R, 1), S, True, device).transpose(2, 3)
        points = (origins[:, :, None] + depths * directions[:, :, None]).flatten(1, 2).requires_grad_()  # (B, N, 3)
        grad = torch.randn(*points.shape[:2], C if "features" in name else 4, device=device)
        before = memory(device, reset=True)[0]
        y, forward = timed(device, ways[name], planes, points)
        _, backward = timed(device, y.backward, grad)
        return forward, forward + backward, memory(device)[1] - before - (grad.nbytes + planes.nbytes + points.nbytes)
    kinds, rows = [(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in ways], []
    runs = [[run(*kind) for kind in kinds] for _ in range(repeats + 1)][1:]       # in turn: all are hit alike
    medians = dict(zip(kinds, np.median(runs, 0).tolist()))
    for (name, dtype), (forward, both, extra) in medians.items():
        base = medians[name.split(",")[0] + ", plain", dtype]
        rows.append({"what": name, "planes": str(dtype)[6:], "forward ms": forward * 1e3, "both ms": both * 1e3,
                     "times faster": base[1] / both, "extra MB": extra / 1e6, "of plain": extra / base[2]})
    return f"{B} x {R * R * S:,} points, C = {C}, T = {T}; extra: beyond inputs, result and gradients", rows
def bench(given):
    options, (rank, world, local_rank) = BenchConfig(**given), distributed()
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: must be positive")
    cfg = make_config({k: getattr(options, k) for k in ("preset", *given) if k in Config.__dataclass_fields__})
    device, share = choose_device(cfg, local_rank), validate(cfg, world)
    cfg = dataclasses.replace(cfg, batch_gpu=images_per_pass(cfg, share, device))
    join_processes(cfg, device, world)
    run = dict(triplane=bench_triplane, step=bench_step, render=bench_render)[options.what]
    heading, rows = run(cfg, options.repeats, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    heading = f"{name}, {world} processes, PyTorch {torch.__version__}; {options.what} {options.preset}: {heading}"
    if rank == 0 and options.json:
        print(json.dumps({"heading": heading, "rows": rows}).replace("NaN", "null"))
    elif rank == 0:
        print(f"{heading}; median of {options.repeats}")
        for row in (rows[0].keys(), *(row.values() for row in rows)):
            print(*(f"{f'{v:.4g}' if isinstance(v, float) else v:>{12 if i else 20}}" for i, v in enumerate(row)))

# ---- Main: the command line ------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help shows all options")
def add_options(parser, options):
    """An argument for every field of a dataclass that is an `opt`."""
    types = typing.get_type_hints(options)
    for f in (f for f in dataclasses.fields(options) if f.metadata):
        flag, type_, choices = "--" + f.name.replace("_", "-"), types[f.name], f.metadata["choices"]
        shown = " ".join(f"{x:g}" for x in f.default) if isinstance(f.default, tuple) else f.default
        text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        if f.default is ...:
            flag, text, kind = f.name, f.metadata["help"], dict(nargs="+")
        elif type_ is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(type_) is tuple:
            kind = dict(type=float, nargs=len(f.default), metavar="X")
        else:
            kind = dict(type=type_, choices=choices, metavar=None if choices else type_.__name__.upper())
        parser.add_argument(flag, help=text, **kind)
MODES = {"train": Config, "sample": SampleConfig, "eval": EvalConfig, "report": ReportConfig, "bench": BenchConfig}
def parse_arguments(argv):
    """-> mode, {field: value} of the options given. The first word may be a mode; train is the default."""
    argv = sys.argv[1:] if argv is None else argv
    mode, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if mode not in MODES:
        raise UserError(f"{mode}: no such mode; there are {', '.join(MODES)}")
    epilog = "Defaults are the published ones at 256²; --preset and --data change them, as PRESETS in the file says."
    parser = Parser(prog=f"3dgp.py {mode}", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description="3DGP: a 3D GAN for any category, from unposed photographs. "
                    f"Options of {mode}; modes: {', '.join(MODES)} (--help after a mode shows its own).",
                    epilog=epilog if mode == "train" else None)
    add_options(parser, MODES[mode])
    return mode, {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
def make_config(given):
    """Defaults, then the size's preset, then the data's, then what was given."""
    data = DATA_PRESETS.get(given.get("data", "shapes"), {})
    preset = given.get("preset") or data.get("preset", "base")
    values = {**PRESETS[preset], **data, **given, "preset": preset}
    if values.get("teacher_weights"):
        values.setdefault("teacher", "tf_efficientnet_lite0")
    return Config(**values)
def holds_run(folder):
    return any((Path(folder) / name).exists() for name in ("config.json", "log.jsonl"))
def resolve(given):
    """-> Config, and the state to resume from or None. Decides the run folder; refuses to write over another run."""
    name, found = Path(given.get("data", "shapes")).resolve().stem or "data", []
    # the folders runs/<data>, runs/<data>-2, ... that hold a run, oldest first, and the next free one
    while holds_run(free := Path("runs") / (f"{name}-{len(found) + 1}" if found else name)):
        found.append(free)
    resume, latest = given.get("resume", ""), given.get("out") or [free, *found][-1]
    if restarted := any(int(os.environ.get(f"{kind}_RESTART_COUNT") or 0) for kind in ("TORCHELASTIC", "SLURM")):
        if resume not in ("", "latest", "auto") and not given.get("out"):    # where the first start has written
            latest = resume if Path(resume).is_dir() else Path(resume).parent
        resume = "auto" if not resume or checkpoints(latest) else resume
    if not resume or resume == "auto" and not checkpoints(latest):
        cfg = make_config({**given, "out": str(latest)} if resume else given)
        if cfg.out and holds_run(cfg.out) and not resume:
            raise UserError(f"--out {cfg.out}: holds a run; go on with it by --resume latest, or name another folder")
        return dataclasses.replace(cfg, out=cfg.out or str(free)), None
    path, saved, state = load_checkpoint(latest if resume in ("latest", "auto") else resume)
    given["resume"] = resume
    differing = [f"{k} (there {getattr(saved, k)!r}, here {v!r})" for k, v in given.items()
                 if k not in FREE_ON_RESUME - ({"data"} if restarted else set()) and v != getattr(saved, k)]
    if differing:
        raise UserError(f"--resume {path}: a checkpoint of another configuration: {', '.join(differing)}")
    out = Path(given.get("out") or path.parent)
    if out.resolve() != path.resolve().parent and holds_run(out):
        raise UserError(f"--out {out}: holds another run than {path}; name another folder")
    cfg = dataclasses.replace(saved, **{**given, "out": str(out), "resume": str(path)})
    if resume != "auto" and state["images"] >= cfg.kimg * 1000:
        raise UserError(f"--kimg {cfg.kimg:g}: the checkpoint has seen {state['images'] / 1000:g}; ask for more")
    return cfg, state
def main(argv=None):
    try:
        mode, given = parse_arguments(argv)
        if mode == "train":
            train(*resolve(given))
        elif mode == "bench":
            bench(given)
        else:
            dict(sample=sample, eval=evaluate_checkpoint, report=report)[mode](MODES[mode](**given))
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as e:
        if distributed()[2] == 0 or dist.is_initialized():     # once per machine, or where it happened
            print(f"3dgp.py: error: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        print(f"3dgp.py: error: process {distributed()[0]} waited in vain: another one has ended, or did not answer "
              f"within --timeout ({str(e).strip().splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:   # before there was anything to save
        return 130
    return 0

if __name__ == "__main__":
    status = main()
    if dist.is_initialized():    # after an error: threads that wait for other processes would abort a normal exit
        os._exit(status)
    sys.exit(status)
