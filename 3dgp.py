"""3DGP: a 3D GAN for any category, learned from unposed photographs. The whole method in this one file.

    python 3dgp.py                              # the `shapes` data, on a CPU or one GPU; downloads nothing
    python 3dgp.py --data photos/               # your own pictures; lereS_depth.py estimates depth first
    torchrun --nproc_per_node=8 3dgp.py --data imagenet

Method: Skorokhodov et al., "3D generation on ImageNet", ICLR 2023. The way of one sample from z to the loss:

    training_step                 one update of G, D and the moving average, by all that follows
    sample_patch                  a random patch of the image, the same for samples and photographs
    draw_latents                  a latent z, a class, a camera of the prior (in generator_pass)
    CameraGenerator.forward       prior camera, z, class -> posterior camera (in synthesize)
    MappingNetwork.forward        z, class -> w
    TriplaneBackbone.forward      w -> three planes of features
    camera_rays                   a ray through each pixel of the patch (in Generator.render)
    Generator.sample_rays         points on the rays, evenly first, then where those found something
    query_triplane                their features in the planes -> colour and density
    march_rays                    -> RGB and depth of the patch
    DepthAdaptor.forward          rendered depth -> depth as an estimator might have given it
    blur_patch                    RGB and depth, blurred at first (in generator_pass)
    Discriminator.forward         -> a score; from it the losses of G, and of D on samples
    discriminator_pass            the score of photographs, distillation, R1
    camera_regularizer            what keeps the cameras wide

Shapes: B batch, R image resolution (in rendering: rays), P patch resolution, T tri-plane resolution, C its
features, N points, S samples on a ray. Images and estimated depth are in [-1, 1], samples and adapted depth
nearly: nothing clamps them. Rendered depth is along the ray, in world units; angles are radians, fov degrees.
"""

import argparse
import collections
import colorsys
import contextlib
import copy
import ctypes
import datetime
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from unicodedata import normalize

# Threads that wait for each other spin briefly, then sleep: else one busy process beside stops them all.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # is read when PyTorch is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

# ---- Config ------------------------------------------------------------------------------------------------
# The command line and its record in config.json, presets, schedules, and what all sections use.


class UserError(Exception):
    """A mistake that the user can mend. It is printed as one line, and the exit status is 2."""


def opt(default, help, *choices):
    """A dataclass field that is a command-line option."""
    return field(default=default, metadata=dict(help=help, choices=choices or None))


@dataclass
class Config:
    """Every hyperparameter, as published at 256²; PRESETS, DATA_PRESETS override. kimg: 1000 images shown."""

    data: str = opt("shapes", "shapes, imagenet, dogs, elephants, horses, or a folder or zip of images")
    out: str = opt("", "run folder (empty: runs/<data>)")
    preset: str = opt("", "model size (empty: the one for --data)", "tiny", "small", "base", "imagenet")
    resume: str = opt("", "a checkpoint, or 'latest' of --out, or 'auto': that if any, else a new run")
    init: str = opt("", "fine-tuning: begins with the networks of this run, checkpoint or published folder")
    seed: int = opt(0, "all draws of a run are a function of this, the step and the pass")
    device: str = opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")
    workers: int = opt(4, "data loading processes per training process (0: load in the training process)")
    mirror: bool = opt(True, "horizontal flips double the data")
    depth: str = opt("auto", "files beside the images, else LeReS; none: RGB alone", "auto", "none")
    depth_weights: str = opt("", "LeReS checkpoint for photographs without depth (empty: downloaded once)")
    depth_distortion: float = opt(1.0, "shapes only: how wrong 'estimated' depth is (0: a copy of the truth)")
    # sizes; the first two are no options, they are set from the data and the teacher
    num_classes: int = 0  # 0: none
    teacher_dim: int = 0  # size of the teacher's features; 0: no distillation head
    dims: int = opt(3, "2: the backbone paints pictures, StyleGAN2; with --depth none --camera frontal", 2, 3)
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
    # camera: the prior's ranges (yaw, pitch in radians, fov in degrees), bounds of a ray, the tri-plane box
    camera: str = opt("learned", "camera distribution", "learned", "prior", "frontal")
    prior_yaw: tuple[float, float] = opt((-1.57, 1.57), "prior range of yaw")
    prior_pitch: tuple[float, float] = opt((math.pi / 4, 3 * math.pi / 4), "of pitch (pi/2: the horizon)")
    prior_fov: tuple[float, float] = opt((10.0, 45.0), "prior range of the field of view")
    prior_look_at: tuple[float, float] = opt((0.0, 0.2), "prior range of the look-at point's radius")
    near: float = opt(0.75, "where rays begin")
    far: float = opt(1.25, "where rays end")
    box: float = opt(0.5, "half size of the tri-plane box")
    # camera generator, depth adaptor, distillation
    camera_reg: str = opt("emd", "keeps the camera posterior from collapsing", "emd", "grad", "none")
    camera_reg_weights: tuple[float, ...] = opt((2, 2, 1e-4, 1e-4), "for yaw, pitch, fov, look-at")
    camera_reg_units: str = opt("natural", "of the EMD: radians, degrees; share of prior", "natural", "range")
    camera_reg_kimg: float = opt(10_000, "the camera regulariser's weight grows from 0 to full over this")
    camera_center: float = opt(10.0, "weight of the distance of the mean posterior direction to the prior's")
    camera_lr_mult: float = opt(0.1, "learning-rate multiplier of the camera generator")
    depth_adaptor: str = opt("random", "how often D sees adapted depth", "random", "never", "half", "always")
    adaptor_kimg: float = opt(10_000, "share of un-adapted depth falls from 1/4 to 0.1 over this (random)")
    teacher: str = opt("none", "frozen classifier to distil: a timm name, or none (published: resnet50)")
    teacher_weights: str = opt("", "local file of its weights (no --teacher: tf_efficientnet_lite0's)")
    kd_weight: float = opt(1.0, "initial weight of the distillation")
    kd_kimg: float = opt(100_000, "the distillation's weight falls to 0 over this")
    # patches, blur, noise
    patch_beta: tuple[float, float] = opt((0.001, 0.8), "Beta(1, b) of patch scale (near 0: whole images)")
    patch_kimg: float = opt(10_000, "b grows over this")
    blur_sigma: float = opt(10.0, "blur of everything the discriminator sees at the start, in pixels")
    blur_kimg: float = opt(200, "the blur falls to 0 over this")
    density_noise: float = opt(1.0, "standard deviation of the noise on densities at the start")
    density_noise_kimg: float = opt(5_000, "the density noise falls to 0 over this")
    # optimisation; last, what is written and measured
    loss: str = opt("nonsaturating", "of each score, or of pairs (R3GAN)", "nonsaturating", "relativistic")
    kimg: float = opt(25_000, "length of the run in thousands of images")
    batch_size: int = opt(64, "images per step, over all processes")
    batch_gpu: int = opt(8, "images per pass at most: each takes gcd(this, a process's share)")
    g_lr: float = opt(0.0025, "generator's learning rate")
    d_lr: float = opt(0.002, "discriminator's learning rate")
    lr_decay: float = opt(0.0, "both learning rates fall to 0 over this last share of the run (published: 0)")
    mapping_lr_mult: float = opt(0.01, "learning-rate multiplier of the generator's mapping network")
    r1_gamma: float = opt(0.05, "weight of R1 (ImageNet's; else base, imagenet: 0.0002 x size² / batch size)")
    r1_interval: int = opt(16, "R1 is computed every so many steps")
    ema_kimg: float = opt(20, "half life of G's moving average (base, imagenet: 0.3125 x batch size)")
    ema_rampup: float = opt(0.05, "the half life is at most this share of the images seen")
    precision: str = opt("tf32", "arithmetic of the networks; on CPUs tf32 is fp32", "fp32", "tf32", "bf16")
    fused: bool = opt(True, "look points up with custom_ops.cu where it compiles, not by PyTorch alone")
    guard: str = opt("on", "on divergence (see GUARD_... in the file) go back to a checkpoint", "on", "off")
    timeout: float = opt(600, "seconds after which a process that does not answer ends the run")
    recoveries: tuple[float, ...] = ()  # kimg of the checkpoints that were gone back to; the guard sets it
    snapshot_kimg: float = opt(200, "write checkpoint and samples every so many kimg; the newest 8 stay")
    log_kimg: float = opt(4, "write a line of log.jsonl every so many kimg")
    metrics: str = opt("fid2k", "of fid, nfs, each with a number of images (fid50k,nfs256); empty: none")
    metrics_kimg: float = opt(200, "measure every so many kimg")
    detector: str = opt("inception", "what compares images: inception, its file, or area8 (area averages)")
    reals: int = opt(0, "images of the data that samples are compared with (0: all)")


# Sizes. Short runs have schedules that suit them; with the published units of the EMD, their fov stays high.
# fmt: off
SHORT = dict(
    patch_resolution=32, triplane_resolution=64, triplane_features=16, channel_max=64, adaptor_channels=16,
    z_dim=64, w_dim=64, mapping_lr_mult=0.1, camera_lr_mult=1.0, camera_reg_units="range",
    camera_reg_weights=(10.0, 3.0, 2.5, 0.25), camera_reg_kimg=2, density_noise_kimg=2, blur_sigma=2.0,
    blur_kimg=1, batch_size=8, loss="relativistic", g_lr=0.006, d_lr=0.0045, lr_decay=0.2, r1_gamma=0.5,
    metrics="fid1k,nfs64", detector="area8", reals=1024, workers=1, patch_kimg=50,
)
PRESETS = {
    "tiny": dict(
        SHORT, resolution=32, channel_base=1024, coarse_samples=8, fine_samples=8, adaptor_kimg=50,
        ema_kimg=2, kimg=42, snapshot_kimg=4, log_kimg=0.25, metrics_kimg=4,
    ),
    "small": dict(
        SHORT, resolution=64, channel_base=2048, coarse_samples=12, fine_samples=12, ema_kimg=4, kimg=92,
        camera_reg_weights=(5.0, 3.0, 2.5, 0.25), snapshot_kimg=10, log_kimg=1, metrics_kimg=10,
    ),
    "base": {},
    "imagenet": dict(channel_base=65536, channel_max=1024),
}
SMALL_SET = dict(preset="base", teacher="resnet50", camera_reg_kimg=3_000)  # a faster camera schedule
DATA_PRESETS = {
    "shapes": dict(preset="tiny"),
    "imagenet": dict(preset="imagenet", teacher="resnet50", r1_gamma=0.05),
    "dogs": SMALL_SET, "elephants": SMALL_SET, "horses": SMALL_SET,
}
# fmt: on


def make_config(given):
    """Defaults, then the data's preset, then the size's, then the options that were given. dict -> Config"""
    data = DATA_PRESETS.get(given.get("data", "shapes"), {})
    preset = given.get("preset") or data.get("preset", "base")
    values = {**data, **PRESETS[preset], **given, "preset": preset}
    cfg = Config(**values)
    values.setdefault("r1_gamma", 0.0002 * cfg.resolution**2 / max(1, cfg.batch_size))
    values.setdefault("ema_kimg", 0.3125 * cfg.batch_size)
    if cfg.teacher_weights:
        values.setdefault("teacher", "tf_efficientnet_lite0")
    return Config(**values)


# What is taken for divergence, by the means over a log interval, and what then happens.
GUARD_NONFINITE = 0.01  # more than this share of the gradients is not finite
GUARD_LOSS = 20  # D is saturated: a loss is larger than this
GUARD_SLOW_KIMG = 200  # after going back the learning rates are halved for so long
GUARD_TRIES = 5  # the run ends after so many recoveries
MBSTD_GROUP = 4  # mini-batch standard deviation compares so many images; they share patch and adaptor choice


def schedules(cfg, kimg):
    """What changes with the images seen: linearly, then constant (lr_factor: last). -> {name: number}"""

    def linear(start, end, over):
        return end if kimg >= over else start + (end - start) * kimg / over

    slow = sum(back <= kimg < back + GUARD_SLOW_KIMG for back in cfg.recoveries)
    left = max(0, 1 - kimg / cfg.kimg)  # of the run
    decay = min(1, left / cfg.lr_decay) if cfg.lr_decay else 1
    return dict(
        blur_sigma=linear(cfg.blur_sigma, 0, cfg.blur_kimg),
        patch_beta=linear(*cfg.patch_beta, cfg.patch_kimg),
        density_noise=linear(cfg.density_noise, 0, cfg.density_noise_kimg),
        raw_depth_share=linear(1 / 4, 0.1, cfg.adaptor_kimg),
        kd_weight=cfg.kd_weight * linear(1, 0, cfg.kd_kimg),
        camera_reg_weight=linear(0, 1, cfg.camera_reg_kimg),
        lr_factor=0.5**slow * decay,
    )


# Which process this is, as torchrun or start_second_process says: of all, of how many, on this machine.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def say(text, file=None):
    """Print once, however many processes there are, and above a progress bar."""
    if RANK == 0:
        with tqdm.external_write_mode():
            print(text, file=file, flush=True)


def train_seed(cfg):
    """What a run's draws depend on: another one after each recovery of the guard."""
    return cfg.seed + 2**32 * len(cfg.recoveries)


def seed_draws(seed, step, phase, number=0):
    """Draws are a function of these four from here on: resuming changes none. Step -1: not of training"""
    entropy = [seed, step + 1, int.from_bytes(phase.encode(), "little"), number]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


@contextlib.contextmanager
def atomic(path):
    """Write to a temporary file that takes the name `path` only when all went well. Full disk: UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # the latter is how torch reports a full disk
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise UserError(f"cannot write {path}: {reason}; what was there before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path, flag, **kind):
    """torch.load that runs no code. A file that is missing, damaged or foreign is a UserError."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # timm brings it

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, **kind)
    except Exception as e:  # a damaged or foreign file raises anything
        raise UserError(f"{flag} {path}: no such file, or not one of tensors ({type(e).__name__})") from None


# ---- Data --------------------------------------------------------------------------------------------------
# A folder or zip of images, or `shapes`, which the program draws itself. An item is a dict of one image:
# `image` uint8 (3, R, R); `depth` float32 (1, R, R) in [-1, 1], larger is farther; and `label`.

NO_PHOTOS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PCD", "PDF", "WMF"}  # or not for Pillow alone
SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind not in NO_PHOTOS} - {".pfm"}
Image.MAX_IMAGE_PIXELS = 2**28  # Pillow warns of more, and refuses twice as many


def to_rgb(image):
    """Any PIL image, upright and as RGB; transparency over white, 16-bit gray scaled to 8."""
    if image.mode == "F":
        raise ValueError("floats, whose range nobody knows; save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        gray = np.asarray(image).clip(0, 65535)
        gray = gray // (257 if gray.max() > 4095 else 16)  # some cameras have 12 bits
        image = Image.fromarray(gray.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def read_depth(content):
    """Depth from the bytes of a gray picture, in its own numbers; NaN where it is transparent -> (H, W)"""
    with Image.open(io.BytesIO(content)) as image:
        image = ImageOps.exif_transpose(image)
        depth = np.atleast_3d(image.convert("RGBA") if image.mode == "P" else image)  # (H, W, 1 to 4)
    if depth.shape[2] > 2 and np.ptp(depth[..., :3], 2).max() > 8:  # lossy files have traces of colour
        raise ValueError("a picture of depth, not depth: it has colours")
    hidden = depth.shape[2] in (2, 4) and depth[..., -1] == 0  # the last one is alpha
    return np.where(hidden, np.nan, depth[..., 0])


def fill_holes(depth):
    """What was not measured becomes as what is beside it in its row, or else column: NaN, infinity, and zeros
    (or -1) far from all other values, but in maps from 0 to 65535. Without zeros, 65535 far from all others
    is as far as the farthest of those. (H, W) -> float32 (H, W)"""
    depth = np.float32(np.where(depth < 1e9, depth, np.nan))
    if depth.min() > 0 or depth.max() == 65535:  # not so with NaN
        within = np.max(depth, where=depth != 65535, initial=0)
        return np.minimum(depth, within) if depth.min() > 0 and within < 16_384 else depth
    levels = np.unique(depth[np.isfinite(depth)])
    gaps = np.diff(levels)
    spike = gaps.size > 1 and gaps[0] > max(4 * np.median(gaps[1:]), 0.05 * levels.mean())
    if spike and levels[0] <= 0:
        depth[depth == levels[0]] = np.nan
    if np.isfinite(depth).mean() < 0.1:
        raise ValueError("less than a tenth of its depth is measured")
    for line in (*depth, *depth.T):
        known = np.isfinite(line)
        if known.any() and not known.all():
            line[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), line[known])
    return depth


def to_unit(x):
    """Linearly from its extremes to [0, 1]; what is constant becomes 0. Any shape -> the same"""
    return (x - x.min()) / max(x.max() - x.min(), 1e-6)


def fit_depth(depth, size, new_size):
    """Cuts a map (H, W) as its picture of size (w, h) is cut, whatever the map's own size. -> new_size"""
    depth = Image.fromarray(depth)
    if (size[0] / size[1] - 1) * (depth.width / depth.height - 1) < -0.01:  # one is upright, the other is not
        raise ValueError(f"width and height of the picture are {size}, those of its depth {depth.size}")
    share = min(size) / np.array(size)  # of width and height: the picture's largest centred square
    box = *((1 - share) / 2 * depth.size), *((1 + share) / 2 * depth.size)
    return np.asarray(depth.resize(new_size, Image.BILINEAR, box))


def depth_name(name):
    """Where the depth of an image is, but for its ending: "cat/1.jpg" -> "cat/1_depth"."""
    return os.path.splitext(name)[0] + "_depth"


class Names(dict):
    """A dict by names of files. A missing one is sought in lower case, its accents in one form; then None."""

    def __init__(self, table):
        super().__init__({normalize("NFC", name.lower()): value for name, value in table.items()} | table)

    def __missing__(self, name):
        return self.get(normalize("NFC", name.lower()))


@functools.lru_cache(4)
def open_zip(path, pid):
    """A zip, opened anew in each process: data workers must not share a file position."""
    archive = zipfile.ZipFile(path)
    members = [member for member in archive.infolist() if not member.is_dir()]  # some are of Windows
    archive.NameToInfo = {os.path.normpath(m.filename.replace("\\", "/")).lstrip("/"): m for m in members}
    return archive


class ImageData:
    """Images of a folder or zip: flat, a folder per class, or with dataset.json; depth in `<name>_depth.png`.
    An unreadable image's item is the next one's: a line names it. 100 in a row, a wrong layout: UserError"""

    def __init__(self, cfg, source):
        self.source = Path(source)
        self.unreadable = set()  # names that were met
        self.classes = []  # their names, if they are folders
        self.cfg = cfg
        # Hidden files are none of ours. A depth map is no photograph.
        files = [f for f in sorted(self.list_files()) if not re.search(r"(^|/)(\.[^/]|__MACOSX)", f)]
        images = [f for f in files if os.path.splitext(f)[1].lower() in SUFFIXES]
        found = Names({os.path.splitext(f)[0]: f for f in images})
        depths = [found[depth_name(f)] for f in images]
        maps = {f for f in images if f.lower().endswith("_depth.png")}.union(depths)
        self.names = [f for f in images if f not in maps]
        self.depths = [found[depth_name(f)] for f in self.names]  # None: without
        if not self.names:
            raise UserError(f"--data {source}: no images in it that Pillow opens")

        notes = {"dataset.json", "prepared.json", "kept.txt", "skipped.txt", "all_depth.png"}  # ours
        others = set(files).difference(self.names, self.depths)
        endings = collections.Counter(Path(f).suffix for f in others if Path(f).name not in notes)
        if endings:
            say(f"{source}: not read, by ending: {dict(endings)}")
        if cfg.depth != "none" and any(self.depths) and None in self.depths:
            what = f"no depth of {self.depths.count(None)} images, as {self.names[self.depths.index(None)]}"
            raise UserError(f"--data {source}: {what}; make it by lereS_depth.py, or train with --depth none")
        self.labels = self.read_labels(files)  # int64 (N,), empty without classes
        self.num_classes = int(self.labels.max(initial=-1)) + 1

    def __len__(self):
        return len(self.names)

    def list_files(self):
        """All files, relative to the folder or as the zip has them. Links are followed, not in circles."""

        def refuse(error):
            raise UserError(f"--data {self.source}: neither a folder nor one whole zip file ({error})")

        if self.source.is_file():
            try:
                return list(open_zip(self.source, os.getpid()).NameToInfo)
            except Exception as e:  # zipfile raises many kinds
                refuse(e)
        files = []
        for path, folders, members in os.walk(self.source, followlinks=True, onerror=refuse):
            ours = {"prepared.json", "reals.png"}.intersection(members) and Path(path) != self.source
            if ours or any(map(Path(path).samefile, Path(path).parents)):  # a link in a circle
                folders.clear()
                continue
            files += [str(Path(path, name).relative_to(self.source)) for name in members]
        return files

    def read_labels(self, files):
        """Class of every image, by dataset.json or the first-level folders. -> int64 (N,), or empty"""
        top = os.path.commonpath([os.path.dirname(name) for name in self.names])  # archives have one folder
        listings = [f for f in files if re.search(r"(?i)(^|/)dataset\.json$", f)]
        listings = [f for f in listings if Path(top).is_relative_to(Path(f).parent)]
        listing = max(listings, key=len, default=None)  # the one nearest to the images
        if listing:
            table = self.read_listing(listing)
        else:
            deeper = [name for name in self.names if os.path.dirname(name) != top]
            folders = [Path(name).relative_to(top).parts[0] for name in deeper]
            tops, numbers = np.unique(folders, return_inverse=True)
            self.classes = tops.tolist()
            table = Names(dict(zip(deeper, numbers, strict=True)))
            if folders:
                say(f"{len(tops)} classes: {', '.join(tops[:9])}; if parts of one set, give one as --data")
        unlabelled = [name for name in self.names if table[name] is None]
        if table and unlabelled:
            raise UserError(f"--data {self.source}: {len(unlabelled)} without a class, first {unlabelled[0]}")
        return np.array([table[name] for name in self.names if table], np.int64)

    def read_listing(self, listing):
        """{name: class} of dataset.json; empty when it lists none."""
        try:
            listed = json.loads(self.read(listing))["labels"] or []
            for name, label in listed:
                if type(label) is not int or not 0 <= label < 100_000:
                    raise ValueError(f"{name}: class {label!r} is no whole number from 0 to 99,999")
            folder = Path(listing).parent
            return Names({str(folder / name.replace("\\", "/")): label for name, label in listed})
        except Exception as e:  # whatever a damaged file leads to
            form = '{"labels": [["file", class], ...]}'
            raise UserError(f"--data {self.source}: dataset.json is not of the form {form} ({e})") from None

    def read(self, name):
        """The bytes of one file."""
        if self.source.is_dir():
            return (self.source / name).read_bytes()
        return open_zip(self.source, os.getpid()).read(name)

    def decode(self, i):
        """-> {image, and depth if it is wanted} of photograph i; raises whatever PIL does"""
        with Image.open(io.BytesIO(self.read(self.names[i]))) as image:
            image = to_rgb(image)
        size = self.cfg.resolution, self.cfg.resolution
        pixels = np.asarray(ImageOps.fit(image, size, Image.LANCZOS))
        item = dict(image=torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
        if self.cfg.depth != "none":
            depth = fit_depth(fill_holes(read_depth(self.read(self.depths[i]))), image.size, size)
            item["depth"] = torch.from_numpy(2 * to_unit(depth) - 1)[None]
        return item

    def __getitem__(self, i):
        for _ in range(100):
            try:
                return dict(self.decode(i), label=self.labels[i] if self.num_classes else 0)
            except Exception as e:  # decoders of damaged files raise anything
                name = self.names[i]
                if name not in self.unreadable:
                    print(f"skipped, unreadable: {name} ({e})", file=sys.stderr)
                self.unreadable.add(name)
                i = (i + 1) % len(self)
        raise UserError(f"--data {self.source}: 100 images in a row are unreadable or gone; mend the data")


SOLIDS = ["sphere", "box", "cylinder", "cone", "torus", "capsule", "octahedron", "snowman"]


def signed_distance(solid, points):
    """How far points (N, 3), y up, are outside a solid of about unit size that stands on y = -1. -> (N,)"""
    x, y, z = points.T
    from_axis = np.hypot(x, z)
    if solid == "sphere":
        return np.hypot(from_axis, y) - 1
    if solid == "box":
        return np.maximum(np.maximum(abs(x), abs(z)) - 0.75, abs(y) - 1)
    if solid == "cylinder":
        return np.maximum(from_axis - 1, abs(y + 0.5) - 0.5)
    if solid == "cone":
        return np.maximum(0.9 * (from_axis - 0.48 * (1 - y)), -1 - y)
    if solid == "torus":
        return np.hypot(np.hypot(x, y) - 0.68, z) - 0.32
    if solid == "capsule":
        return np.hypot(from_axis, y - y.clip(-0.5, 0.5)) - 0.5
    if solid == "octahedron":
        return (abs(x) + abs(y) + abs(z) - 1) * 0.577
    return np.minimum(np.hypot(from_axis, y + 0.4) - 0.6, np.hypot(from_axis, y - 0.45) - 0.45)  # snowman


class ShapesData:
    """Solids on checkered ground under a sky, from cameras of a known distribution. Item i is a function of i
    alone: true_depth (1, R, R), world units (sky: far; some < near); camera (6,), fov at 32² 1.6% too wide"""

    GROUND = -0.11  # its height
    classes = SOLIDS
    num_classes = len(SOLIDS)

    def __init__(self, cfg):
        self.cfg = cfg
        self.labels = np.arange(len(self)) % self.num_classes

    def __len__(self):
        return 40_000

    def true_camera(self, rng, label):
        """What the camera generator must find, narrower than the prior, fov by class. -> float32 (6,)"""
        yaw = rng.normal(0, 0.35)
        pitch = min(rng.normal(math.pi / 2 - 0.25, 0.1), math.pi / 2)
        fov = 17 + 2 * label + rng.normal(0, 0.5)
        look_at = rng.normal(0, 0.6), rng.normal(math.pi / 2, 0.3), rng.uniform(0, 0.06)
        return np.array([yaw, pitch, fov, *look_at], np.float32)

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        label = i % self.num_classes
        camera = torch.from_numpy(self.true_camera(rng, label))  # (6,)
        R = self.cfg.resolution
        finer = 2 if R <= 64 else 1  # rays a pixel and direction: small pictures are smooth
        origins, rays = camera_rays(make_camera(camera[None]), R * finer)
        color, depth = self.draw(rng, label, float(camera[2]), origins[0, 0].numpy(), rays[0].numpy())
        grid = R, finer, R, finer
        image = color.reshape(*grid, 3).mean((1, 3)).clip(0, 1)  # (R, R, 3)
        image = torch.from_numpy((image.transpose(2, 0, 1) * 255).round().astype(np.uint8))
        depth = torch.from_numpy(depth.reshape(grid).mean((1, 3)))[None]  # (1, R, R)
        item = dict(image=image, label=label, true_depth=depth.float(), camera=camera)
        if self.cfg.depth != "none":
            item["depth"] = self.estimate(rng, depth)
        return item

    def draw(self, rng, label, fov, origin, rays):
        """What rays (N, 3) from origin (3,) meet -> color (N, 3) in [0, 1], depth (N,) in world units"""
        # About half as high as the picture, and turned about the vertical; a torus shows its hole.
        size = 0.5 * math.tan(math.radians(fov / 2)) * rng.uniform(0.85, 1.15)
        center = [rng.uniform(-0.05, 0.05), self.GROUND + size, rng.uniform(-0.05, 0.05)]
        outside = functools.partial(signed_distance, SOLIDS[label])
        angle = rng.uniform(-1, 1) * (0.6 if SOLIDS[label] == "torus" else math.pi)
        sin, cos = math.sin(angle), math.cos(angle)
        turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        # Checkered ground with a shadow, in fog that at `far` is the sky.
        up = np.clip(rays[:, 1:2] * 1.5 + 0.75, 0, 1)
        sky = [0.78, 0.86, 0.93] - up * [0.42, 0.31, 0.08]
        depth = np.minimum((self.GROUND - origin[1]) / np.minimum(rays[:, 1], -1e-6), self.cfg.far)
        xz = origin[::2] + depth[:, None] * rays[:, ::2]
        checkers = np.floor(xz / 0.1).sum(1, keepdims=True) % 2
        shadow = np.exp(-((xz - center[::2]) ** 2).sum(1, keepdims=True) / size**2)
        ground = (0.42 + 0.3 * checkers) * (1 - 0.55 * shadow) * [1.0, 0.93, 0.82]
        clear = 0.88 * self.cfg.far  # up to here
        fog = np.clip((depth[:, None] - clear) / (self.cfg.far - clear), 0, 1) ** 2
        color = ground + fog * (sky - ground)
        # Sphere tracing, in the solid's own frame and in units of its size.
        start = turn @ (origin - center) / size
        along = rays @ turn.T
        middle = -(along @ start)  # where a ray is closest to the centre
        hit = np.flatnonzero(start @ start - middle**2 < 1.5**2)
        t = middle[hit] - 1.5
        for _ in range(18):
            points = start + t[:, None] * along[hit]
            distance = outside(points)
            t = t + distance
        seen = (distance < 0.02) & (t * size < depth[hit])
        hit, points = hit[seen], points[seen]
        depth[hit] = t[seen] * size
        slopes = [outside(points + s) - outside(points - s) for s in 1e-3 * np.eye(3)]  # as the normal
        shade = 0.4 + 0.6 * np.maximum(turn @ [0, 0.8, 0.6] @ slopes / 2e-3, 0)
        hue = label / len(SOLIDS) + rng.normal(0, 0.02)  # near the class's own
        paint = colorsys.hsv_to_rgb(hue % 1, 0.85, 1)  # RGB
        tone = np.where(np.sin(7 * points[:, 1] + 1) > 0, 1.0, 0.55)  # bands
        color[hit] = (shade * tone)[:, None] * paint
        return color, depth

    def estimate(self, rng, depth):
        """What a monocular estimator might say. True depth (1, R, R) -> float32 (1, R, R) in [-1, 1]"""
        k, R = self.cfg.depth_distortion, self.cfg.resolution
        pad = R // 8
        power = max(0.05, 1 + k * (rng.uniform(0.5, 1.1) - 1))
        d = to_unit(depth) ** power
        error = torch.from_numpy(rng.normal(0, 0.04 * k, (1, 1, 4, 4)))
        d = d + F.interpolate(error, (R, R), mode="bicubic", align_corners=True)  # (1, 1, R, R)
        d = F.pad(d, (pad,) * 4, mode="replicate")
        d = blur(d, k * R / 64)[0, :, pad:-pad, pad:-pad]
        return (2 * to_unit(d) - 1).float()


def stop_with_parent():
    """When the parent process is killed, this one gets a SIGTERM; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def open_data(cfg):
    """The data set that cfg.data names; photographs without depth as lereS_depth.py prepares them, once."""
    if cfg.data == "shapes":
        return ShapesData(cfg)
    root = Path(os.environ.get("DATA_DIR", "data"))
    source = root / cfg.data if cfg.data in DATA_PRESETS else Path(cfg.data)
    source = source if source.exists() else Path(f"{source}.zip")
    if not source.exists():
        raise UserError(f"--data {cfg.data}: no such file or folder; named ones are in DATA_DIR, {root}")
    data = ImageData(cfg, source)
    if any(data.depths) or cfg.depth == "none":
        return data
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    target = root / f"{source.stem}-{cfg.resolution}-{place}"
    say(f"{cfg.data}: photographs without depth; prepared, once, in {target}")
    if not (target / "dataset.json").exists():
        command = [sys.executable, Path(__file__).with_name("lereS_depth.py"), source, target]
        command += [f"--resolution={cfg.resolution}", "--device", cfg.device, "--weights", cfg.depth_weights]
        if subprocess.run(command, preexec_fn=stop_with_parent if os.name == "posix" else None).returncode:
            raise UserError(f"--data {cfg.data}: no depth, see above; or train on RGB alone: --depth none")
    return ImageData(cfg, target)


def real_images(batch, device):
    """A batch as the discriminator sees it: RGB and depth, if any. -> (B, 3 or 4, R, R) in [-1, 1]"""
    rgb = batch["image"].to(device, non_blocking=True).float() / 127.5 - 1
    if "depth" not in batch:
        return rgb
    return torch.cat([rgb, batch["depth"].to(device, non_blocking=True)], 1)


@dataclass
class MirroredData:
    """The data and its mirror image: index n + i is item i flipped. An item knows its `number`."""

    data: object

    def __getitem__(self, i):
        item = self.data[i % len(self.data)]
        flipped = [-1] if i >= len(self.data) else []  # dimensions
        seen = {key: item[key].flip(flipped) for key in ("image", "depth") if key in item}
        return dict(seen, label=item["label"], number=i)


def draw_batches(cfg, n, step, rank, world):
    """Endless batches of indices for this process from a step on, a function of seed and step: a resumed run
    sees what an undisturbed one would. Epochs are permutations of the n images and their mirror images."""
    total = n * (1 + cfg.mirror)
    share = cfg.batch_size // world

    @functools.lru_cache(2)
    def order(epoch):
        return np.random.default_rng([train_seed(cfg), epoch]).permutation(total)

    for start in itertools.count(step * cfg.batch_size + rank * share, cfg.batch_size):
        yield [order(k // total)[k % total] for k in range(start, start + share)]


STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}  # last: SLURM


def start_worker(_):
    """In data workers: the training process decides when to stop."""
    for kind in STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


def load_batches(data, cfg, indices):
    """Batches of the data and its mirror image; indices: a list for each. Workers that fail: UserError."""
    how = dict(batch_sampler=indices, worker_init_fn=start_worker, num_workers=cfg.workers)
    how.update(timeout=min(cfg.timeout, 1e5 * cfg.workers), pin_memory=torch.cuda.is_initialized())
    try:
        batches = iter(torch.utils.data.DataLoader(MirroredData(data), **how))
        if hasattr(signal, "SIGCHLD"):  # PyTorch's own handler would raise in the middle of a step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except UserError as e:  # of a worker, with a traceback in front
        raise UserError(str(e).rpartition("UserError: ")[2].strip()) from None
    except (RuntimeError, OSError, EOFError) as e:
        reason = str(e).partition("\n")[0]
        hint = "large pictures need more --timeout, workers shared memory (/dev/shm) or --workers 0"
        raise UserError(f"--data: data workers fail: {reason}; {hint}") from None


# ---- Ops ---------------------------------------------------------------------------------------------------
# Equalised layers, FIR resampling (StyleGAN2, Karras et al. 2020); tri-plane lookup (EG3D, Chan et al. 2022).


def normalize_2nd_moment(x):
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def one_hot(c, num_classes, dtype):
    """Class int64 (B,) -> (B, num_classes); None without classes"""
    return F.one_hot(c, num_classes).to(dtype) if num_classes else None


leaky_relu = functools.partial(F.leaky_relu, negative_slope=0.2, inplace=True)  # so its input is not kept

# A gain keeps the variance behind an activation. It commutes with leaky ReLU: in the weights it is free.
GAIN = {leaky_relu: math.sqrt(2), F.softplus: 1.0, None: 1.0}


class Linear(nn.Module):
    """Equalised: Adam trains weights of deviation 1 / lr_mult, used times lr_mult. (B, in) -> (B, out)"""

    def __init__(self, in_features, out_features, activation=None, lr_mult=1.0, bias_init=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mult)
        self.bias = nn.Parameter(torch.zeros(out_features) + bias_init)
        self.activation = activation
        self.scale = lr_mult * GAIN[activation]

    def effective(self):
        """-> weight (out, in), bias (out,) as they are used"""
        return self.weight * (self.scale / math.sqrt(self.weight.shape[1])), self.bias * self.scale

    def forward(self, x):
        x = F.linear(x, *self.effective())  # (B, out)
        return self.activation(x) if self.activation else x


class Conv2d(nn.Module):
    """Equalised convolution that keeps the size; down=2 halves it. (B, in, H, W) -> (B, out, ., .)"""

    def __init__(self, in_channels, out_channels, kernel_size, activation=None, bias=True, down=1, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.activation = activation
        self.down = down
        self.gain = gain * GAIN[activation]

    def forward(self, x):
        padding = self.weight.shape[2] // 2
        stride = self.down
        if self.down == 2:  # low-pass, padded for both; before a 1x1 the filter itself skips pixels
            stride = 2 if padding else 1
            x = fir_filter(x, padding + 1, stride=2 // stride)
            padding = 0
        weight = (self.weight * (self.gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        bias = None if self.bias is None else (self.bias * self.gain).to(x.dtype)
        x = F.conv2d(x, weight, bias, stride, padding)
        return self.activation(x) if self.activation else x


def fir_filter(x, padding, gain=1.0, stride=1):
    """Separable low-pass [1, 3, 3, 1] / 8, zeros around; every stride-th pixel of (B, C, H+2p-3, W+2p-3)"""
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) * (math.sqrt(gain) / 8)  # (4,)
    weight = taps.outer(taps).expand(x.shape[1], 1, 4, 4)  # (C, 1, 4, 4)
    return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])


def upsample(x):
    """Zeros between pixels, then FIR with gain 4: bilinear, less at edges. (B, C, H, H) -> (B, C, 2H, 2H)"""
    x = x.clone(memory_format=torch.channels_last)  # one image's sum of skips does not pass for that
    edge = F.pad(x.new_ones(2 * x.shape[2] - 2), (1, 1), value=0.75)  # (2H,): 1/4 falls on zeros outside
    return F.interpolate(x, scale_factor=2, mode="bilinear").mul_(edge.outer(edge))


def sample_triplane(planes, points, box):
    """Mean of the bilinear lookups in planes xy, xz, yz (width, then height).
    planes (B, 3, C, T, T), zero outside; points (B, N, 3), same dtype; box: their half size -> (B, N, C)"""
    xy, xz, yz = points[..., :2], points[..., ::2], points[..., 1:]  # (B, N, 2)
    uv = torch.stack([xy, xz, yz], 1).flatten(0, 1) / box  # (3B, N, 2)
    features = F.grid_sample(planes.flatten(0, 1), uv[:, None], align_corners=True)
    return features.unflatten(0, (-1, 3)).mean(1).squeeze(2).transpose(1, 2)  # (B, N, C)


def compile_custom_ops(device_type):
    """Compiles custom_ops.cu for this GPU or processor, once for each source and flags. -> the library"""
    if device_type == "cuda":
        target = "sm_{}{}".format(*torch.cuda.get_device_capability())
        options = dict(extra_cuda_cflags=["-O3", f"-arch={target}"])
    else:
        target = torch.backends.cpu.get_cpu_capability()
        vector = {"AVX2": "-mavx2 -mfma", "AVX512": "-mavx512f -mavx512vl -mfma"}.get(target, "")
        loose = "-fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
        flags = f"-x c++ -O3 -fopenmp {loose} {vector}".split()
        options = dict(extra_cflags=flags, extra_ldflags=["-fopenmp"], with_cuda=False)
    source = Path(__file__).with_name("custom_ops.cu")
    key = repr((source.read_bytes(), options, torch.version.cuda)).encode()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(torch.hub.get_dir(), "extensions"))
    library = root / f"3dgp-triplane-{target}-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where no GPU is
        from torch.utils import cpp_extension

        say(f"compiling custom_ops.cu for {target}, once", sys.stderr)
        root.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, then moved: who is killed leaves neither a lock nor half a library.
        with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
            options.update(build_directory=folder, is_python_module=False)
            cpp_extension.load(library.stem, str(source), **options)
            os.replace(Path(folder, library.name), library)
    return library


@functools.cache
def custom_ops(device_type):
    """-> `triplane` of custom_ops.cu for "cuda" or "cpu"; None where it does not compile: a line says why"""
    if device_type not in ("cuda", "cpu"):
        return None
    try:
        function = ctypes.CDLL(str(compile_custom_ops(device_type))).triplane
    except Exception as e:  # no compiler, no ninja, nowhere to write, a build that fails
        lines = str(e).splitlines() or [type(e).__name__]
        reason = max(lines, key=lambda line: "error:" in line or "not found" in line)  # the first that tells
        say(f"custom_ops.cu is not used; PyTorch's own operators do the same: {reason}", sys.stderr)
        return None
    function.restype = ctypes.c_char_p
    return function


def call_custom_ops(planes, points, box, decoder, *rest):
    """rest: out, grad, grad_planes, grad_points, grad_decoder, or the first of them; empty: none."""
    B, three, C, T, width = planes.shape
    others = points, decoder, *rest
    call = custom_ops(planes.device.type)
    types = [torch.float32, torch.bfloat16, torch.float64]  # of the planes, as custom_ops.cu counts them
    kind = torch.promote_types(planes.dtype, torch.float32), planes.device
    packed = ((32 if planes.is_cuda or C > 16 else 16) + 5) * 64 + 4  # w1, b1 and four rows of w2; b2
    shapes_fit = (three, width, len(points), *points.shape[2:]) == (3, T, B, 3)
    decoder_fits = len(decoder) == 0 or (C <= 32 and len(decoder) == packed)
    kinds_fit = planes.dtype in types and all((t.dtype, t.device) == kind for t in others)
    if not (call and shapes_fit and decoder_fits and kinds_fit):
        needs = "custom_ops.cu, planes (B, 3, C, T, T), points (B, N, 3), decoder empty or packed, C <= 32"
        raise ValueError(f"triplane: needs {needs}; float32 or float64, or bfloat16 planes; on one device")

    if planes.stride(2) != 1:  # the channels of a pixel must be adjacent in memory
        planes = planes.movedim(2, 4).contiguous().movedim(4, 2)
    tensors = [planes, *(t.contiguous() for t in others)]
    size = (ctypes.c_int64 * 9)(B, points.shape[1], C, T, *planes.stride())
    pointers = (ctypes.c_void_p * 8)(*(t.data_ptr() for t in tensors))
    with torch.cuda.device_of(planes):  # does nothing on a CPU
        context = torch.cuda.current_stream().cuda_stream if planes.is_cuda else torch.get_num_threads()
        error = call(types.index(planes.dtype), size, pointers, ctypes.c_double(box), ctypes.c_int64(context))
    if error:
        raise RuntimeError(f"custom_ops.cu: {error.decode()}; --no-fused does without it")


class Triplane(torch.autograd.Function):
    """`sample_triplane`, or with `TriplaneDecoder.packed()` (C <= 32; empty: none) its result (B, N, 4).
    planes (B, 3, C, T, T) float32 or bfloat16, fast if channels are adjacent; points (B, N, 3), decoder
    float32; on a CPU all may be float64. First derivatives, of all three; on a GPU their last digits vary."""

    @staticmethod
    def forward(ctx, planes, points, box, decoder):
        ctx.save_for_backward(planes, points, decoder)
        ctx.box = box
        out = points.new_empty(*points.shape[:2], 4 if len(decoder) else planes.shape[2])
        call_custom_ops(planes, points, box, decoder, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        planes, points, decoder = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError("triplane: has no second derivatives; use sample_triplane, or --no-fused")
        shapes = planes.permute(0, 3, 4, 1, 2).shape, points.shape, decoder.shape
        grad_planes, grad_points, grad_decoder = grads = [points.new_zeros(shape) for shape in shapes]
        call_custom_ops(planes, points, ctx.box, decoder, points.new_empty(0), grad, *grads)
        if len(decoder):
            grad_decoder[-4:] = grad.contiguous().sum((0, 1))  # of the last bias
        # Detached it is no view: so autograd adds the gradient of a second query to it in place.
        return grad_planes.permute(0, 3, 4, 1, 2).detach().to(planes.dtype), grad_points, None, grad_decoder


triplane = Triplane.apply  # (planes, points, box, decoder) -> (B, N, C) or (B, N, 4)


# ---- Camera ------------------------------------------------------------------------------------------------
# "Ball in sphere" (paper section 3.2): from a wide prior to the cameras of the data. Rays; patches of images.


class Camera(typing.NamedTuple):
    """A camera on a sphere that looks at a point of a small inner ball. Roll is 0."""

    yaw: torch.Tensor  # (B,) radians
    pitch: torch.Tensor  # (B,) radians; the horizon is pi/2
    fov: torch.Tensor  # (B,) degrees
    look_at_yaw: torch.Tensor  # (B,) where the point looked at lies, in radians
    look_at_pitch: torch.Tensor  # (B,) radians
    look_at_radius: torch.Tensor  # (B,) world units
    radius: torch.Tensor  # (B,) of the sphere, in world units


def rows(t, index):
    """x[index] of every tensor x in a named tuple. index: a slice, list or tensor"""
    return t._make(x[index] for x in t)


def camera_parameters(camera):
    """The six free parameters: all but the radius, which is 1. -> (B, 6)"""
    return torch.stack(camera[:6], 1)


def make_camera(parameters):
    """The inverse: (B, 6) -> Camera"""
    return Camera(*parameters.unbind(1), radius=torch.ones_like(parameters[:, 0]))


def camera_ranges(cfg, device="cpu"):
    """Prior range of each of the six parameters. -> (6, 2)"""
    look_at = [(-math.pi, math.pi), (0.0, math.pi), cfg.prior_look_at]
    return torch.tensor([cfg.prior_yaw, cfg.prior_pitch, cfg.prior_fov, *look_at], device=device)


def sample_camera_prior(cfg, n, device):
    """n cameras with every parameter uniform in its range and the look-at direction uniform on the sphere."""
    low, high = camera_ranges(cfg, device).unbind(1)  # (6,)
    p = low + (high - low) * torch.rand(n, 6, device=device)  # (n, 6)
    height = (p[:, 4] / math.pi).clamp(1e-6, 1 - 1e-6)
    p[:, 4] = torch.arccos(1 - 2 * height)
    return make_camera(p)


def spherical_to_cartesian(yaw, pitch, radius):
    """(B,) each -> (B, 3). y is up; yaw 0 lies on +z."""
    x = radius * pitch.sin() * (-yaw).sin()
    z = radius * pitch.sin() * yaw.cos()
    return torch.stack([x, radius * pitch.cos(), z], 1)


def cam2world(camera):
    """-> camera-to-world (B, 4, 4). It looks along its own -z, x is right, y up; not straight up or down."""
    origin = spherical_to_cartesian(camera.yaw, camera.pitch, camera.radius)  # (B, 3)
    look_at = spherical_to_cartesian(camera.look_at_yaw, camera.look_at_pitch, camera.look_at_radius)
    forward = F.normalize(look_at - origin)  # (B, 3)
    left = F.normalize(torch.linalg.cross(origin.new_tensor([[0.0, 1.0, 0.0]]), forward))
    up = F.normalize(torch.linalg.cross(forward, left))
    top = torch.stack([-left, up, -forward, origin], 2)  # (B, 3, 4)
    bottom = origin.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(origin), 1, 4)  # (B, 1, 4)
    return torch.cat([top, bottom], 1)


def patch_grid(patch, resolution, like):
    """Pixels of len(like) images or patches, corners included: x right, y up, in [-1, 1]. -> (B, H, W, 2)"""
    line = torch.linspace(-1, 1, resolution, device=like.device)  # float32
    xy = torch.stack(torch.meshgrid(line, -line, indexing="xy"), -1)  # (H, W, 2)
    xy = xy.expand(len(like), -1, -1, -1)
    if patch is None:
        return xy
    scale, offset = patch[:, None, None].split([1, 2], -1)  # (B, 1, 1, 1), (B, 1, 1, 2)
    return (xy + 1) * scale - 1 + 2 * offset


def camera_rays(camera, resolution, patch=None):
    """One ray per pixel, rows from the top. -> origins, unit directions (B, resolution², 3) in world units"""
    pose = cam2world(camera)  # (B, 4, 4)
    xy = patch_grid(patch, resolution, pose).flatten(1, 2)  # (B, R, 2)
    focal = 1 / (camera.fov.deg2rad() / 2).tan()  # (B,)
    z = -focal.view(-1, 1, 1).expand(-1, xy.shape[1], 1)  # (B, R, 1)
    in_camera = F.normalize(torch.cat([xy, z], 2), dim=2)  # (B, R, 3)
    directions = in_camera @ pose[:, :3, :3].transpose(1, 2)  # (B, R, 3)
    return pose[:, None, :3, 3].expand_as(directions), directions


def sample_patch(cfg, n, kimg):
    """n random patches (n, 3), MBSTD_GROUP in a row the same (it divides n): scale ~ s_min + (1 - s_min)
    Beta(1, b), as a share of the image's side, and offset of its left and bottom in [0, 1 - scale]."""
    groups = n // MBSTD_GROUP
    s_min = cfg.patch_resolution / cfg.resolution
    b = schedules(cfg, kimg)["patch_beta"]
    beta = 1 - torch.rand(groups, 1, dtype=torch.float64) ** (1 / b)  # by inversion
    scale = s_min + (1 - s_min) * beta
    offset = torch.rand(groups, 2, dtype=torch.float64) * (1 - scale)
    return torch.cat([scale, offset], 1).float().repeat_interleave(MBSTD_GROUP, 0)


def extract_patch(image, patch, resolution):
    """Patches of images, bilinear, by the coordinates `camera_rays` uses. (B, ., H, W) -> (B, ., P, P)"""
    grid = patch_grid(patch, resolution, image) * image.new_tensor([1.0, -1.0])  # in images y points down
    return F.grid_sample(image, grid, align_corners=True)


class CameraAdaptor(nn.Module):
    """One MLP of the camera generator: parameters, embeddings of z and class -> values before the sigmoid."""

    def __init__(self, in_features, z_dim, num_classes, lr_mult):
        super().__init__()
        layer = functools.partial(Linear, activation=F.softplus, lr_mult=lr_mult)
        self.project_params = layer(in_features, 256)
        self.project_z = layer(z_dim, 16) if z_dim else None
        self.project_c = layer(num_classes, 16) if num_classes else None
        width = 256 + 16 * (bool(z_dim) + bool(num_classes))
        self.main = nn.Sequential(layer(width, 256), Linear(256, 4, lr_mult=lr_mult))

    def forward(self, params, z, c):
        """(B, in), (B, z_dim), one-hot (B, num_classes) -> (B, 4)"""
        x = [self.project_params(params)]
        if self.project_z:
            x.append(normalize_2nd_moment(self.project_z(z)))
        if self.project_c:
            x.append(normalize_2nd_moment(self.project_c(c)))
        return self.main(torch.cat(x, 1))


class CameraGenerator(nn.Module):
    """Maps a prior camera to a posterior one (paper section 3.2)."""

    def __init__(self, cfg):
        super().__init__()
        self.num_classes = cfg.num_classes
        self.register_buffer("ranges", camera_ranges(cfg), persistent=False)
        self.origin_adaptor = CameraAdaptor(4, 0, cfg.num_classes, cfg.camera_lr_mult)
        self.look_at_adaptor = CameraAdaptor(8, cfg.z_dim, cfg.num_classes, cfg.camera_lr_mult)

    def forward(self, prior, z, c):
        """Prior Camera (radius 1), z (B, z_dim), c int64 (B,) -> posterior Camera, in the prior's ranges"""
        low, high = self.ranges.unbind(1)  # (6,)
        prior_01 = (camera_parameters(prior) - low) / (high - low)  # (B, 6) in [0, 1]
        yaw, pitch, fov = prior_01[:, :3].unbind(1)  # (B,)
        c = one_hot(c, self.num_classes, z.dtype)  # (B, num_classes)

        # Where the camera stands: the class decides, z does not.
        roll = torch.zeros_like(yaw)  # (B,)
        origin = self.origin_adaptor(torch.stack([yaw, pitch, roll, prior.radius], 1), None, c)  # (B, 4)

        # Where it looks, and how wide. It sees the new origin as it is before the sigmoid.
        seen = torch.cat([origin[:, :3], fov[:, None], origin[:, 3:], prior_01[:, 3:]], 1)  # (B, 8)
        look_at = self.look_at_adaptor(seen, z, c)  # (B, 4)

        # Roll stays 0 and the radius 1: two of the origin's outputs are not in the posterior.
        margin = low.new_tensor([0, 1e-5, 0, 0, 0, 0])  # pitch stays inside its range
        share = torch.cat([origin[:, :2], look_at], 1).sigmoid()  # (B, 6)
        return make_camera(low + margin + share * (high - low - 2 * margin))


def emd_1d(a, b):
    """Squared-cost optimal transport of as many scalars: in 1-D, sort both. a, b (n, ...) -> (...)"""
    return (a.sort(0).values - b.sort(0).values).square().mean(0)


def camera_gradient_penalty(camera_generator, prior, z, c):
    """The paper's regulariser: |g| + 1 / (|g| + 1e-4), g = d posterior_i / d prior_i, mean -> (6,)"""
    parameters = camera_parameters(prior).requires_grad_()
    posterior = camera_parameters(camera_generator(make_camera(parameters), z, c))
    diagonal = []
    for i, total in enumerate(posterior.sum(0)):
        (g,) = torch.autograd.grad(total, parameters, create_graph=True)  # (B, 6)
        diagonal.append(g[:, i])
    g = torch.stack(diagonal, 1).abs()
    return (g + 1 / (g + 1e-4)).mean(0)


# ---- Rendering ---------------------------------------------------------------------------------------------
# NeRF's quadrature (Mildenhall et al. 2020) along a ray, of samples i at depths t_i with densities sigma_i:
#     alpha_i = 1 - exp(-(t_{i+1} - t_i) sigma_i),  w_i = alpha_i prod_j<i (1 - alpha_j),  colour = sum w c
# Samples are taken evenly first, and then where the first ones have weight (EG3D). All work on (..., S).


def stratified_depths(near, far, shape, samples, random, device):
    """Depths of the coarse samples: one in each interval between midpoints of an even grid. -> (*shape, S)"""
    grid = torch.linspace(near, far, samples, device=device)  # (S,)
    edges = torch.cat([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])  # (S+1,)
    u = torch.rand(*shape, samples, device=device) if random else 0.5
    return (edges[:-1] + edges.diff() * u).expand(*shape, -1)


@torch.no_grad()
def importance_depths(depths, weights, u):
    """Inverts the coarse weights' distribution. depths, weights (..., S); u (..., K) in [0, 1] -> (..., K)"""
    bins = (depths[..., 1:] + depths[..., :-1]) / 2  # (..., S-1)
    pdf = weights[..., 1:-1] + 1e-5 + 1e-5  # (..., S-2); twice, as the published code adds it
    cdf = F.pad((pdf / pdf.sum(-1, keepdim=True)).cumsum(-1), (1, 0))  # (..., S-1)

    above = torch.searchsorted(cdf, u.contiguous(), right=True)  # (..., K)
    below = above - 1  # >= 0, since the cdf begins with 0
    above = above.clamp(max=cdf.shape[-1] - 1)
    bin_below = bins.gather(-1, below)
    cdf_below = cdf.gather(-1, below)
    width = bins.gather(-1, above) - bin_below
    step = cdf.gather(-1, above) - cdf_below
    step = torch.where(step < 1e-5, 1.0, step)
    return bin_below + (u - cdf_below) / step * width


def ray_weights(sigma_raw, depths, cut=False):
    """Weights of the samples; sigma_raw is the density before its softplus. (..., S), (..., S) -> (..., S)"""
    sigma = F.softplus(sigma_raw)
    if cut:  # densities below the median of all are 0
        sigma = sigma * (sigma >= sigma.median())
    delta = F.pad(depths.diff(), (0, 1), value=1e10)  # (..., S); the last sample takes what light is left
    alpha = 1 - torch.exp(-delta * sigma)
    transmittance = F.pad(1 - alpha[..., :-1] + 1e-10, (1, 0), value=1.0).cumprod(-1)
    return alpha * transmittance


def march_rays(rgb, sigma_raw, depths, cut=False):
    """rgb (..., S, 3), sigma_raw, sorted depths (..., S) -> rgb (..., 3), depth (...), weights (..., S)"""
    weights = ray_weights(sigma_raw, depths, cut)  # (..., S)
    return (weights[..., None] * rgb).sum(-2), (weights * depths).sum(-1), weights


class TriplaneDecoder(nn.Module):
    """Two layers from the mean plane feature to colour (no sigmoid) and density before the softplus."""

    def __init__(self, features):
        super().__init__()
        self.model = nn.Sequential(Linear(features, 64, leaky_relu), Linear(64, 4))

    def forward(self, features):
        """(..., C) -> rgb (..., 3), sigma_raw (...)"""
        out = self.model(features)  # (..., 4)
        return out[..., :3], out[..., 3]

    def packed(self):
        """All weights in one vector, as custom_ops.cu has them; C <= 32 is padded by zeros to 16 or 32."""
        w1, b1 = self.model[0].effective()
        w2, b2 = self.model[1].effective()
        multiple = 32 if w1.is_cuda else 16
        w1 = F.pad(w1, (0, -w1.shape[1] % multiple))
        return torch.cat([w1.flatten(), b1, w2.flatten(), b2])


def query_triplane(planes, points, box, decoder, fused):
    """`decoder(sample_triplane(planes, points, box))`, or fused, where `custom_ops` finds a library.
    planes (B, 3, C, T, T), points (B, N, 3) in world units -> rgb (B, N, 3), sigma_raw (B, N)"""
    if not fused or planes.shape[2] > 32 or not custom_ops(planes.device.type):  # it decodes at most 32
        return decoder(sample_triplane(planes, points, box))
    out = triplane(planes, points, box, decoder.packed())  # (B, N, 4)
    return out[..., :3], out[..., 3]


# ---- Generator ---------------------------------------------------------------------------------------------
# z and class -> w -> planes -> RGB, depth of a patch -> adapted depth. Parameters are named as StyleGAN2's.


class MappingNetwork(nn.Module):
    """z and class (or, in the discriminator, conditions alone) -> w. Two layers that learn slowly."""

    def __init__(self, z_dim, c_dim, w_dim, lr_mult=0.01):
        super().__init__()
        self.embed = Linear(c_dim, w_dim) if c_dim else None
        self.fc0 = Linear(z_dim + w_dim * bool(c_dim), w_dim, leaky_relu, lr_mult)
        self.fc1 = Linear(w_dim, w_dim, leaky_relu, lr_mult)
        if z_dim:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z, c):
        """(B, z_dim) or None, (B, c_dim) or None -> (B, w_dim)"""
        inputs = [z, self.embed(c) if self.embed else None]
        x = torch.cat([normalize_2nd_moment(x) for x in inputs if x is not None], 1)
        return self.fc1(self.fc0(x))


class SynthesisLayer(nn.Module):
    """3x3 modulated and demodulated convolution, noise, leaky ReLU; up=2 doubles the resolution. The batch
    shares the weights: the style scales the input, demodulation the output (StyleGAN2, equations 1 and 3)."""

    def __init__(self, in_channels, out_channels, w_dim, resolution, up=1):
        super().__init__()
        self.affine = Linear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.up = up

    def forward(self, x, w, noise):
        """(B, in, H, W), (B, w_dim), "const", "random" or "none" -> (B, out, up H, up W)"""
        style = self.affine(w)  # (B, in)
        energy = self.weight.square().sum((2, 3))  # (out, in)
        demodulation = (style.square() @ energy.t() + 1e-8).rsqrt()[:, :, None, None]  # (B, out, 1, 1)
        x = x * style[:, :, None, None].to(x.dtype)  # (B, in, H, W)
        weight = self.weight.to(x.dtype)
        if self.up == 2:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # (B, out, 2H+1, 2W+1)
            x = fir_filter(x, padding=1, gain=4)  # (B, out, 2H, 2W)
        else:
            x = F.conv2d(x, weight, padding=1)  # (B, out, H, W)
        # leaky_relu(x demodulation + bias + noise) times the activation's gain, with the gain moved inside.
        gain = GAIN[leaky_relu]
        bias = (self.bias * gain)[:, None, None]  # (out, 1, 1)
        x = torch.addcmul(bias.to(x.dtype), x, (demodulation * gain).to(x.dtype))
        if noise == "random":
            x += torch.randn_like(x[:, :1]) * (self.noise_strength * gain)
        elif noise == "const":
            x += self.noise_const * (self.noise_strength * gain)
        return leaky_relu(x)


class ToRGB(nn.Module):
    """1x1 modulated convolution (not demodulated) to the tri-plane's channels."""

    def __init__(self, in_channels, out_channels, w_dim):
        super().__init__()
        self.affine = Linear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x, w):
        """(B, in, H, W), (B, w_dim) -> (B, out, H, W), the channels of a pixel adjacent in memory"""
        style = self.affine(w) / math.sqrt(self.weight.shape[1])  # (B, in)
        weight = (style.unsqueeze(2) * self.weight.flatten(1).t()).to(x.dtype)  # (B, in, out)
        y = torch.baddbmm(self.bias.to(x.dtype), x.flatten(2).transpose(1, 2), weight)  # (B, H W, out)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


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
        """x, skip of the last block (B, ., H, W), or None -> x (B, out, 2H, 2W), skip (B, planes, 2H, 2W)"""
        x = self.const.expand(len(w), -1, -1, -1) if x is None else self.conv0(x, w, noise)
        x = self.conv1(x, w, noise)
        y = self.torgb(x, w).to(w.dtype)  # the skips are summed in w's precision
        return x, y if skip is None else y + upsample(skip)


def channels(cfg, resolution):
    return min(cfg.channel_base // resolution, cfg.channel_max)


class TriplaneBackbone(nn.ModuleDict):
    """StyleGAN2 synthesis network with 3 x C output channels: blocks b4, b8, ... up to T, a power of 2."""

    def __init__(self, cfg):
        super().__init__()
        for r in (2**i for i in range(2, cfg.triplane_resolution.bit_length())):
            before = channels(cfg, r // 2) if r > 4 else 0
            self[f"b{r}"] = SynthesisBlock(before, channels(cfg, r), cfg.w_dim, r, 3 * cfg.triplane_features)

    def forward(self, w, noise="const"):
        """w (B, w_dim); noise "const", "random" or "none" -> planes (B, 3, C, T, T)"""
        *blocks, last = self.values()
        x = planes = None
        for block in blocks:
            x, planes = block(x, planes, w, noise)
        # In the largest maps a pixel's channels are adjacent, as in the planes: nothing has to be transposed.
        _, planes = last(x.contiguous(memory_format=torch.channels_last), planes, w, noise)
        return planes.unflatten(1, (3, -1))


class DepthAdaptor(nn.Module):
    """Makes rendered depth look like estimated depth (paper section 3.1). Candidate 0 is the depth, to about
    [-1, 1] from a learned near plane to `far`; 1 to 3 are what one head reads from each of 3 convolutions."""

    def __init__(self, cfg):
        super().__init__()
        self.near, self.far, width = cfg.near, cfg.far, cfg.adaptor_channels
        self.level = 0 if cfg.depth_adaptor == "never" else 3  # what is looked at outside training
        self.near_plane_offset_raw = nn.Parameter(torch.tensor([-3.0]))
        self.layers = nn.ModuleList(Conv2d(i, width, 5, leaky_relu) for i in (1, width, width))
        self.head = Conv2d(width, 1, 1)

    def adapt(self, depth, level=None):
        """Candidate `level`; without, the one that is looked at outside training. (B, 1, H, W) -> the same"""
        return self(depth, torch.full([len(depth)], self.level if level is None else level))

    def forward(self, depth, choice):
        """depth (B, 1, H, W), candidate of each sample int64 (B,), on the CPU -> (B, 1, H, W)"""
        near = self.near + self.near_plane_offset_raw.sigmoid() * 0.25 * (self.far - self.near)
        x = 2 * (depth - (near + self.far) / 2) / (self.far - near)
        candidates = [x]
        for layer in self.layers:
            x = layer(x)
            candidates.append(self.head(x))
        return torch.stack(candidates)[choice, torch.arange(len(choice))]


def sample_adaptor_choice(cfg, n, kimg):
    """Depth candidates of n samples, a multiple of MBSTD_GROUP; so many in a row take one. -> int64 (n,)"""
    if cfg.depth_adaptor == "random":  # linear in the index; the first one's probability is on a schedule
        first = schedules(cfg, kimg)["raw_depth_share"]
        probabilities = first + torch.arange(4) * (1 - 4 * first) / 6
    else:
        last = {"never": 0.0, "half": 0.5, "always": 1.0}[cfg.depth_adaptor]
        probabilities = torch.tensor([1 - last, 0.0, 0.0, last])
    choice = torch.multinomial(probabilities, n // MBSTD_GROUP, replacement=True)
    return choice.repeat_interleave(MBSTD_GROUP)


class Generator(nn.Module):
    """z and class -> w -> tri-planes -> image and depth. Samples on rays are random in training mode only."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.density_noise = 0.0  # a standard deviation, set by the training loop
        self.mapping_network = MappingNetwork(cfg.z_dim, cfg.num_classes, cfg.w_dim, cfg.mapping_lr_mult)
        self.backbone = TriplaneBackbone(cfg)
        self.decoder = TriplaneDecoder(cfg.triplane_features)
        self.camera_generator = CameraGenerator(cfg) if cfg.camera == "learned" else None
        self.depth_adaptor = DepthAdaptor(cfg) if cfg.depth != "none" else None

    def mapping(self, z, c):
        """z (B, z_dim), c int64 (B,) (ignored without classes) -> w (B, w_dim)"""
        return self.mapping_network(z, one_hot(c, self.cfg.num_classes, z.dtype))

    def pose(self, prior, z, c):
        """The camera a sample is seen from: a function of the prior's Camera, z (B, z_dim), class (B,)"""
        if self.camera_generator:
            return self.camera_generator(prior, z, c)
        if self.cfg.camera == "prior":
            return prior
        middle = camera_ranges(self.cfg, z.device).mean(1)
        middle[5] = 0  # frontal: it looks at the origin
        return make_camera(middle.repeat(len(z), 1))

    def query(self, planes, origins, directions, depths):
        """At `depths` (B, R, S) on rays (B, R, 3): -> rgb (B, R, S, 3), sigma_raw (B, R, S)"""
        points = (origins[:, :, None] + depths[..., None] * directions[:, :, None]).flatten(1, 2)  # (B, N, 3)
        rgb, sigma_raw = query_triplane(planes, points, self.cfg.box, self.decoder, self.cfg.fused)
        if self.training and self.density_noise > 0:
            sigma_raw = sigma_raw + self.density_noise * torch.randn_like(sigma_raw)
        return rgb.view(*depths.shape, 3), sigma_raw.view(depths.shape)

    def sample_rays(self, planes, origins, directions, cut=False):
        """S even and K fine samples on rays (B, R, 3), sorted -> rgb (B, R, S + K, 3), sigma_raw, depths"""
        cfg = self.cfg
        shape = directions.shape[:2]
        coarse = stratified_depths(cfg.near, cfg.far, shape, cfg.coarse_samples, self.training, planes.device)
        rgb, sigma_raw = self.query(planes, origins, directions, coarse)  # (B, R, S, 3), (B, R, S)

        # Where the fine samples are taken is decided with distances in units of far - near.
        weights = ray_weights(sigma_raw, (coarse - cfg.near) / (cfg.far - cfg.near), cut)  # (B, R, S)
        u = (torch.arange(cfg.fine_samples, device=planes.device) + 0.5) / cfg.fine_samples
        u = torch.rand(*shape, len(u), device=u.device) if self.training else u.expand(*shape, -1)
        fine = importance_depths(coarse, weights, u)  # (B, R, K)
        fine_rgb, fine_sigma_raw = self.query(planes, origins, directions, fine)

        depths, order = torch.cat([coarse, fine], -1).sort(-1)  # (B, R, S + K)
        rgb = torch.cat([rgb, fine_rgb], -2).take_along_dim(order[..., None], -2)
        sigma_raw = torch.cat([sigma_raw, fine_sigma_raw], -1).gather(-1, order)
        return rgb, sigma_raw, depths

    def render(self, planes, camera, resolution, patch=None, chunk=2**14, cut=False):
        """planes (B, 3, C, T, T), a Camera and, maybe, patches (B, 3) -> rgb (B, 3, H, W), depth (B, 1, H, W)
        Evaluation: `chunk` rays at a time. With cut (NFS alone) densities below the median of all are 0"""
        if self.cfg.dims == 2:  # one feature of each plane is a channel of the picture
            image = extract_patch(planes[:, :, 0], patch, resolution)
            return image, torch.zeros_like(image[:, :1])
        B = len(planes)
        origins, directions = camera_rays(camera, resolution, patch)  # (B, R, 3)
        size = origins.shape[1] if self.training or cut else max(1, chunk // B)
        parts = []
        for part in zip(origins.split(size, 1), directions.split(size, 1), strict=True):
            samples = self.sample_rays(planes, *part, cut)
            parts.append(march_rays(*samples, cut)[:2])  # (B, size, 3), (B, size)
        rgb, depth = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        shape = (B, -1, resolution, resolution)
        return rgb.transpose(1, 2).reshape(shape), depth.reshape(shape)


def draw_latents(cfg, n, labels, phase=""):
    """n draws of z ~ N(0, I), a class out of labels (N,), a prior camera. A phase seeds torch: same draws."""
    if phase:
        seed_draws(cfg.seed, -1, phase)
    z = torch.randn(n, cfg.z_dim, device=labels.device)  # (n, z_dim)
    c = labels.new_zeros(n)
    if cfg.num_classes:
        c = labels[torch.randint(len(labels), (n,), device=z.device)]
    return z, c, sample_camera_prior(cfg, n, z.device)


def autocast(cfg, device, wanted=True):
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and cfg.precision == "bf16")


def synthesize(G, z, c, prior, choice, patch=None):
    """z (B, z_dim), c (B,), prior Camera, choice (B,) of the depth candidate, patch (None: whole images) ->
    what D sees (paper figure 2): RGB and, if any, adapted depth (B, 3 or 4, P, P); w (B, w_dim)"""
    cfg = G.cfg
    camera = G.pose(prior, z, c)  # of B
    w = G.mapping(z, c)  # (B, w_dim)
    with autocast(cfg, z.device):
        planes = G.backbone(w, noise="random" if G.training else "const")  # (B, 3, C, T, T)
    resolution = cfg.resolution if patch is None else cfg.patch_resolution
    image, depth = G.render(planes, camera, resolution, patch)  # (B, 3, P, P), (B, 1, P, P)
    if G.depth_adaptor:
        with autocast(cfg, z.device):
            adapted = G.depth_adaptor(depth, choice)  # (B, 1, P, P)
        image = torch.cat([image, adapted.float()], 1)
    return image, w


# ---- Discriminator -----------------------------------------------------------------------------------------
# StyleGAN2's, on patches, with a second head for what a frozen classifier, the teacher, sees (section 3.4).


class PatchEncoder(nn.Module):
    """Scale, offset, each as 10 sines, 10 cosines, 256 learned numbers of 1000 x value. (B, 3) -> (B, 828)"""

    def __init__(self):
        super().__init__()
        self.const_embed = nn.Embedding(1001, 256)
        self.fourier_encoder = nn.Module()
        self.fourier_encoder.register_buffer("fourier_coefs", math.pi * 2.0 ** torch.arange(10) / 1024)

    def forward(self, values):
        x = values * 1000  # (B, 3)
        phase = x[..., None] * self.fourier_encoder.fourier_coefs  # (B, 3, 10)
        embedded = self.const_embed(x.round().long())  # (B, 3, 256)
        return torch.cat([phase.sin(), phase.cos(), embedded], -1).flatten(1)


class DiscriminatorBlock(nn.Module):
    """Residual block; the patch modulates the second convolution's input. down=1 keeps the resolution."""

    def __init__(self, img_channels, in_channels, out_channels, down):
        super().__init__()
        self.fromrgb = Conv2d(img_channels, in_channels, 1, leaky_relu) if img_channels else nn.Identity()
        self.conv0 = Conv2d(in_channels, in_channels, 3, leaky_relu)
        self.conv1 = Conv2d(in_channels, out_channels, 3, leaky_relu, down=down, gain=math.sqrt(0.5))
        self.conv1.affine = Linear(512, in_channels)  # named as in the published code
        self.skip = Conv2d(in_channels, out_channels, 1, bias=False, down=down, gain=math.sqrt(0.5))

    def forward(self, x, h):
        """(B, in, H, W), patch code (B, 512) -> (B, out, H/down, W/down)"""
        x = self.fromrgb(x)
        modulation = (1 + self.conv1.affine(h).tanh())[:, :, None, None].to(x.dtype)  # (B, in, 1, 1)
        return self.skip(x) + self.conv1(self.conv0(x) * modulation)


def minibatch_std(x):
    """Append the mean standard deviation over each 4 images. (B, C, H, W), B < 4 or 4 n -> (B, C+1, H, W)"""
    size = min(MBSTD_GROUP, len(x))
    variance = x.unflatten(0, (-1, size)).var(dim=1, unbiased=False)  # (B / 4, C, H, W)
    std = (variance + 1e-8).sqrt().mean((1, 2, 3), keepdim=True).repeat_interleave(size, 0)
    return torch.cat([x, std.expand(-1, -1, *x.shape[2:])], 1)


class DiscriminatorEpilogue(nn.Module):
    """4x4 features -> score vector, and the prediction of the teacher's features."""

    def __init__(self, in_channels, teacher_dim):
        super().__init__()
        self.conv = Conv2d(in_channels + 1, in_channels, 3, leaky_relu)
        self.fc = Linear(in_channels * 16, in_channels, leaky_relu)
        self.out = Linear(in_channels, in_channels)
        hidden = Linear(in_channels * 16, in_channels, leaky_relu)
        self.feat_out = nn.Sequential(hidden, Linear(in_channels, teacher_dim)) if teacher_dim else None

    def forward(self, x):
        """(B, C, 4, 4) -> (B, C), (B, teacher_dim) or None"""
        x = self.conv(minibatch_std(x)).flatten(1)  # (B, 16 C)
        return self.out(self.fc(x)), self.feat_out(x) if self.feat_out else None


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator on patches, as wide as for images: the first blocks keep size."""

    def __init__(self, cfg):
        super().__init__()
        self.num_classes = cfg.num_classes
        self.scalar_enc = PatchEncoder()
        self.hyper_mod_mapping = MappingNetwork(0, 828, 512)
        img_channels = 3 if cfg.depth == "none" else 4
        self.resolutions = [2**i for i in range(cfg.resolution.bit_length() - 1, 2, -1)]
        for r in self.resolutions:
            down = 2 if r <= cfg.patch_resolution else 1
            block = DiscriminatorBlock(img_channels, channels(cfg, r), channels(cfg, r // 2), down)
            setattr(self, f"b{r}", block)
            img_channels = 0  # the first block alone sees the image
        self.head_mapping = MappingNetwork(0, 828 + cfg.num_classes, channels(cfg, 4))
        with torch.no_grad():  # ours: else the one-hot class drowns in 828 numbers, and short runs ignore it
            self.head_mapping.embed.weight[:, : cfg.num_classes] *= math.sqrt(828)
        self.b4 = DiscriminatorEpilogue(channels(cfg, 4), cfg.teacher_dim)

    def forward(self, x, c, patch):
        """image x (B, 3 or 4, P, P), c (B,), patch (B, 3) -> score (B,), features (B, teacher_dim) or None"""
        code = self.scalar_enc(patch)  # (B, 828)
        h = self.hyper_mod_mapping(None, code)  # (B, 512)
        for r in self.resolutions:
            x = getattr(self, f"b{r}")(x, h)
        # The score is the projection of what was seen on what the class and the patch lead to expect.
        if self.num_classes:
            code = torch.cat([one_hot(c, self.num_classes, code.dtype), code], 1)
        with torch.autocast(x.device.type, enabled=False):  # statistics and scores in the weights' precision
            x, features = self.b4(x.to(code.dtype))  # (B, C), (B, teacher_dim)
            expected = self.head_mapping(None, code)  # (B, C)
            return (x * expected).sum(1) / math.sqrt(expected.shape[1]), features


class Teacher(nn.Module):
    """A frozen timm classifier (weights: a file or downloaded). Whole images (B, 3 or 4, H, W) -> (B, dim)"""

    def __init__(self, name, weights=""):
        super().__init__()
        import timm  # only who distils needs it; its import takes seconds

        try:
            self.model = timm.create_model(name, pretrained=not weights)
            if weights:
                self.model.load_state_dict(load_tensors(weights, "file"))
        except Exception as e:  # timm and the hub raise many kinds
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise UserError(f"teacher {name} {weights}: {reason}; see --teacher, --teacher-weights") from None
        self.requires_grad_(False)
        data = timm.data.resolve_model_data_config(self.model)
        self.size = data["input_size"][-1]
        for name in ("mean", "std"):  # of the colours it was trained with
            self.register_buffer(name, torch.tensor(data[name]).view(3, 1, 1), persistent=False)
        self.known = None  # see keep
        self.dim = self(torch.zeros(1, 3, 8, 8)).shape[1]  # not num_features: some pool to another width

    def keep(self, path, count):
        """From now on images need numbers (B,) below count, on the CPU: features are computed once, and kept
        in a file that processes share; of many images as half floats, to which they are rounded anyway."""
        kind = torch.float32 if count <= 65_536 else torch.float16
        size = count * (self.dim + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        if LOCAL_RANK == 0:  # all of it: a full disk is an error now, where it would be a crash later
            path.write_bytes(bytes(size * kind.itemsize))
        table = torch.from_file(str(path), True, size, dtype=kind)
        self.features, self.known = table.view(count, -1).split(self.dim, 1)  # (count, dim), (count, 1)

    @torch.no_grad()
    def forward(self, image, numbers=None):
        if self.known is not None and self.known[numbers].all():
            return self.features[numbers].to(image)
        x = F.interpolate(image[:, :3], self.size, mode="bicubic", antialias=True)  # (B, 3, size, size)
        x = self.model.eval().forward_features(((x + 1) / 2 - self.mean) / self.std)
        features = self.model.forward_head(x, pre_logits=True).float()
        if self.known is not None:
            self.features[numbers] = features = features.to(self.features)
            self.known[numbers] = 1  # only now: another process may read them
        return features.to(image)


# ---- Losses ------------------------------------------------------------------------------------------------
# Section 3.5 of the paper. The loss itself, of one of two kinds, is in generator_pass and discriminator_pass.


def blur(image, sigma, spread=None):
    """Separable blur: taps 2^-(x / spread)², |x| <= floor(3 sigma), zero padding. Without a spread: sigma."""
    radius = math.floor(3 * sigma)
    if not radius:
        return image
    C = image.shape[1]
    x = torch.arange(-radius, radius + 1, device=image.device)  # (2 radius + 1,)
    taps = (2.0 ** -(x / (spread or sigma)).square()).to(image.dtype)
    taps = (taps / taps.sum()).expand(C, 1, -1)  # (C, 1, 2 radius + 1)
    image = F.conv2d(image, taps.unsqueeze(2), padding=(0, radius), groups=C)
    return F.conv2d(image, taps.unsqueeze(3), padding=(radius, 0), groups=C)


def blur_patch(image, sigma):
    """What D sees while the blur is on: depth is blurred a second time, nearly by a box. -> the same shape"""
    rgb, *depth = blur(image, sigma).split(3, 1)
    return torch.cat([rgb, *(blur(d, sigma, spread=30) for d in depth)], 1)


def r1_penalty(score, image):
    """Squared norm of the score's gradient with respect to the image (Mescheder et al. 2018). -> (B,)"""
    (gradient,) = torch.autograd.grad(score.sum(), image, create_graph=True)  # (B, C, P, P)
    return gradient.square().sum((1, 2, 3))


def camera_regularizer(G, kimg):
    """Keeps the camera posterior from collapsing (paper section 3.2) -> loss, {name: (6,) or scalar}"""
    cfg, ranges = G.cfg, G.camera_generator.ranges  # (6, 2)
    every_class = torch.arange(cfg.num_classes, device=ranges.device)  # alike, whatever their frequencies
    z, c, prior = draw_latents(cfg, 256, every_class)  # (256, z_dim), (256,), Camera of 256
    parameters = camera_parameters(G.camera_generator(prior, z, c))  # (256, 6)
    center = (parameters[:, :2].mean(0) - ranges[:2].mean(1)).norm()  # scalar
    loss = cfg.camera_center * center  # the mean direction stays in the middle of the prior

    # Each parameter keeps some of the prior's spread. 64 of the samples are enough for that.
    few = rows(prior, slice(64))  # Camera of 64
    penalty = emd = emd_1d(camera_parameters(few), parameters[:64])  # (6,) in squared radians or degrees
    weights = ranges.new_tensor(cfg.camera_reg_weights)[[0, 1, 2, 3, 3, 3]]  # 3: look-at
    if cfg.camera_reg == "grad":
        penalty = camera_gradient_penalty(G.camera_generator, few, z[:64], c[:64])
    elif cfg.camera_reg_units == "range":
        weights = weights / ranges.diff()[:, 0].square()
    if cfg.camera_reg != "none":
        loss = loss + schedules(cfg, kimg)["camera_reg_weight"] * (weights * penalty).sum()
    log = dict(camera_reg=loss, camera_center=center, camera_emd=emd)
    return loss, dict(log, camera_mean=parameters.mean(0), camera_std=parameters.std(0))


# ---- Metrics -----------------------------------------------------------------------------------------------
# What training follows: FID and the paper's Non-Flatness Score, the same on any number of processes.

FID_NET = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


def frechet_distance(a, b):
    """Frechet distance of two Gaussians, each (mean (F,), covariance (F, F)) in float64."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    if not (cov_a + cov_b).isfinite().all():
        return math.nan
    values, vectors = torch.linalg.eigh(cov_a)  # (F,), (F, F)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()  # the square root of cov_a
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # tr (cov_a cov_b)^1/2
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def gaussian(x):
    """Mean and covariance of features (N, F), in float64."""
    return x.double().mean(0), x.double().t().cov()


def non_flatness_score(depth, near, far, bins=64):
    """exp of the entropy of a depth map's histogram: 1 is a flat wall (paper section 4). (B, ...) -> (B,)"""
    share = (depth.flatten(1).clamp(near, far) - near) / (far - near)  # (B, H W) in [0, 1]
    histogram = F.one_hot((share * bins).long().clamp(0, bins - 1), bins).double().mean(1)  # (B, bins)
    return torch.special.entr(histogram).sum(1).exp()


def area8(image):
    """8x8 area averages of all channels: where things are, colour and depth. (B, C, H, W) -> (B, 64 C)"""
    return F.adaptive_avg_pool2d(image, 8).flatten(1)


class Detector:
    """What compares images: (B, 3 or 4, H, W) in [-1, 1] -> features (B, F).
    name: "inception" (downloaded once), a TorchScript file that is called as that one is, or "area8"."""

    def __init__(self, name, device):
        self.net = None
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(FID_NET).name)
        path = cached if name == "inception" else Path(name)
        self.label = "" if path.name == cached.name else f"[{path.stem}]"  # of a metric: fid2k[area8]
        if name == "area8":
            return
        try:
            if path == cached and not cached.exists():
                cached.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(FID_NET, str(cached), progress=RANK == 0)
            self.net = torch.jit.load(path, map_location=device).eval()
            self(torch.zeros(1, 3, 64, 64, device=device))
        except Exception:  # urllib and torch raise anything
            what = "not there, or not TorchScript in the field's format"
            raise UserError(f"--detector {name}: {what}; fetch {FID_NET} and name it, or area8") from None

    @torch.no_grad()
    def __call__(self, image, output="return_features"):
        if self.net is None:
            return area8(image)
        image = (image[:, :3] * 127.5 + 128).clamp(0, 255).byte()
        return self.net(image, **{output: True}).float()


def parse_metrics(text, kinds=("fid", "nfs")):
    """ "fid50k,nfs256" -> [("fid", "50k", 50000), ("nfs", "256", 256)]. Below 10k, k is 1,024."""
    metrics = []
    for item in filter(None, text.split(",")):
        found = re.fullmatch(rf"({'|'.join(kinds)})([89]|[1-9]\d{{1,5}}|[1-9]\d{{0,2}}k)", item)
        if not found:
            raise UserError(f"--metrics {item}: must be {' or '.join(kinds)}, a number from 8 on; as fid50k")
        kind, count = found.groups()
        n = int(count.removesuffix("k"))
        if count.endswith("k"):
            n *= 1024 if n < 10 else 1000
        metrics.append((kind, count, n))
    return metrics


def mean_over_processes(t):
    """The mean of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(t)
        t /= WORLD
    return t


def own_batches(n, desc):
    """0 to n - 1 in batches of 4: those of this process, with a progress bar. -> arrays of numbers"""
    starts = np.array_split(np.arange(0, n, 4), WORLD)[RANK]
    own = [np.arange(first, min(first + 4, n)) for first in starts]
    return tqdm(own, desc, unit="batch", disable=RANK > 0 or not n, leave=False)


def gather(parts):
    """Rows (B, ...) of this process -> those of all processes, in order (N, ...)"""
    own = torch.cat([torch.zeros(0), *(part.cpu() for part in parts)])  # a process may have none
    everyone = [own] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, own)
    return torch.cat(everyone)


def running_gaussian(parts):
    """Rows (B, F) of all processes, without keeping them -> mean (F,), covariance (F, F) in float64"""
    own = []  # stays empty in a process that has none
    for x in parts:
        y = F.pad(x.double(), (1, 0), value=1.0)
        own = [sum(own) + y.t() @ y]  # with a one in front: count, sums and sums of products
    everyone = gather(own)  # one matrix below the other
    total = sum(everyone.split(everyone.shape[1]))
    n, mean = total[0, 0], total[0, 1:] / total[0, 0]
    return mean, (total[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)


def real_parts(cfg, data, detector, device, reals):
    """Features (B, F) of this process's share of the data and its mirror image, or of `reals` fixed ones."""
    total = len(data) * (1 + cfg.mirror)
    order = np.random.default_rng(0).permutation(total)[: reals or total]
    batches = (order[i] for i in own_batches(len(order), "measuring data"))
    for batch in load_batches(data, cfg, batches):
        yield detector(real_images(batch, device))


@torch.no_grad()
def measure_samples(G, labels, detector, n, n_flat):
    """Features of n samples (n, F); non-flatness scores of n_flat, from in front and without fog (n_flat,)"""
    cfg = G.cfg
    z, c, prior = draw_latents(cfg, max(n, n_flat), labels, "evaluate")
    front = prior._replace(yaw=0 * prior.yaw, pitch=0 * prior.pitch + math.pi / 2)

    def render(count, cameras, cut):
        """The first `count` samples by posteriors of `cameras`, in batches; noise: random, always the same"""
        for i in own_batches(count, "measuring depth" if cut else "measuring samples"):
            seed_draws(cfg.seed, -1, "noise", int(i[0]))
            planes = G.backbone(G.mapping(z[i], c[i]), noise="random")
            yield G.render(planes, G.pose(rows(cameras, i), z[i], c[i]), cfg.resolution, cut=cut)

    features = []
    for image, depth in render(n, prior, cut=False):
        adapted = [G.depth_adaptor.adapt(depth)] if G.depth_adaptor else []
        features.append(detector(torch.cat([image, *adapted], 1)))
    scores = (non_flatness_score(depth, cfg.near, cfg.far) for _, depth in render(n_flat, front, cut=True))
    return gather(features), gather(scores)


# ---- Training ----------------------------------------------------------------------------------------------
# One step; then what a run of months needs. Draws are functions of seed, step and pass, not of processes.


@dataclass
class Run:
    """What a run consists of, passed along from function to function."""

    cfg: Config
    data: object  # ImageData or ShapesData
    labels: torch.Tensor  # of all images (N,), on the device; empty without classes
    teacher: Teacher | None
    stop: list  # signals that came: the run ends after the step at hand
    G: Generator
    D: Discriminator
    G_ema: Generator  # moving average of G, which is what is sampled and measured
    opt_g: torch.optim.Adam
    opt_d: torch.optim.Adam
    step: int = 0
    done: bool = False

    @property
    def images(self):  # seen so far
        return self.step * self.cfg.batch_size

    @property
    def kimg(self):
        return self.images / 1000

    def due(self, kimg):
        """At the end, and when the last step has crossed a multiple of so many kimg."""
        every = max(1, round(kimg * 1000))
        return self.done or self.images // every > (self.images - self.cfg.batch_size) // every

    def file(self, kind, suffix):
        """A file of the run folder whose name tells how many images were seen."""
        return Path(self.cfg.out, f"{kind}-{self.kimg:010.3f}.{suffix}")


def build(cfg, device):
    """Everything that a run trains, the same in every process. -> {name: module or optimiser}"""
    seed_draws(cfg.seed, -1, "init")
    G = Generator(cfg).to(device)
    D = Discriminator(cfg).to(device)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    ratio = cfg.r1_interval / (cfg.r1_interval + 1)  # as published, where R1 is one more step; here it is not
    opt_g = torch.optim.Adam(G.parameters(), cfg.g_lr, (0.0, 0.99), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), cfg.d_lr * ratio, (0.0, 0.99**ratio), fused=True)
    return dict(G=G, D=D, G_ema=G_ema, opt_g=opt_g, opt_d=opt_d)


class Averages(dict):
    """Means of what is logged, over steps and processes. Every process must add the same names."""

    def add(self, **values):
        for name, value in values.items():
            self.setdefault(name, []).append(value.detach().float())

    def result(self):
        """-> {name: number or list}, and begins anew"""
        means = ((name, torch.stack(self.pop(name)).mean(0)) for name in sorted(self))
        return {name: mean_over_processes(mean).tolist() for name, mean in means}


def generator_pass(run, real, c_real, patch, pass_number, weight, stats):
    """Gradients of G, and of D on what G makes: one pass of a sample through each network serves both losses.
    real, c_real: what samples are paired with; weight: share of the process's images; pass_number, in the
    whole batch: for draws. -> sum of w (w_dim,), what the scores of photographs are compared with"""
    cfg = run.cfg
    sigma = schedules(cfg, run.kimg)["blur_sigma"]
    paired = cfg.loss == "relativistic"
    r2_due = paired and run.step % cfg.r1_interval == 0
    seed_draws(train_seed(cfg), run.step, "generator", pass_number)
    z, c, prior = draw_latents(cfg, len(patch), run.labels)  # (B, z_dim), (B,), Camera of B
    c = c_real if paired else c
    choice = sample_adaptor_choice(cfg, len(z), run.kimg)  # (B,)
    image, w = synthesize(run.G, z, c, prior, choice, patch)  # (B, 3 or 4, P, P), (B, w_dim)
    image = blur_patch(image, sigma)

    # A sample's score is compared with 0, or with the score of a photograph of its class, by the same patch.
    rival = 0
    if paired:
        photo = blur_patch(extract_patch(real, patch, cfg.patch_resolution), sigma)
        with torch.no_grad(), autocast(cfg, z.device):
            rival, _ = run.D(photo, c, patch)  # (B,)

    # D sees a copy cut off from G: loss_d ends there; of loss_g only the gradient at the image goes on, to G.
    seen = image.detach().requires_grad_()
    with autocast(cfg, z.device, not r2_due):
        score, _ = run.D(seen, c, patch)  # (B,)
    loss_g = F.softplus(rival - score).mean()
    loss_d = F.softplus(score - rival).mean()
    (grad,) = torch.autograd.grad(loss_g * weight, seen, retain_graph=True)
    stats.add(loss_g=loss_g, loss_d_fake=loss_d, score_fake=score.mean())
    if r2_due:  # R1 of samples, as D sees them
        penalty = r1_penalty(score, seen).mean()
        loss_d = loss_d + penalty * (cfg.r1_gamma / 2 * cfg.r1_interval)
        stats.add(r2=penalty)
    (loss_d * weight).backward()
    image.backward(grad)
    return w.detach().sum(0), score.detach() if paired else 0


def discriminator_pass(run, real, numbers, c, patch, rival, scale_mean, weight, stats):
    """Gradients of D on real images (B, 3 or 4, R, R), by numbers in the data, classes c, patches (B, ...):
    score, distillation, R1 every r1_interval steps. rival: 0 or scores; scale_mean: of all patches"""
    cfg = run.cfg
    r1_due = run.step % cfg.r1_interval == 0
    now = schedules(cfg, run.kimg)
    image = extract_patch(real, patch, cfg.patch_resolution).requires_grad_(r1_due)  # (B, 3 or 4, P, P)
    seen = blur_patch(image, now["blur_sigma"])
    with autocast(cfg, real.device, not r1_due):  # no double backward in bf16
        score, predicted = run.D(seen, c, patch)  # (B,), (B, teacher_dim)
    loss = loss_real = F.softplus(rival - score).mean()
    if run.teacher:
        target = run.teacher(real, numbers)  # (B, teacher_dim)
        distance = (predicted - target).norm(dim=1)  # (B,)
        loss = loss + now["kd_weight"] * (distance * patch[:, 0] / scale_mean).mean()
        stats.add(kd_distance=distance.mean())
    if r1_due:
        penalty = r1_penalty(score, image).mean()  # unlike R1 of samples: by the patch before its blur
        loss = loss + penalty * (cfg.r1_gamma / 2 * cfg.r1_interval)
        stats.add(r1=penalty)
    (loss * weight).backward()
    stats.add(loss_d_real=loss_real, score_real=score.mean())


def average_gradients(module, extra):
    """Averages a module's gradients (none counts as 0) over processes; what is not finite becomes 0 or ±1e5.
    `extra`, a tensor, travels in the same vector. -> the share that was not finite, the mean of extra"""
    params = list(module.parameters())
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params] + [extra]
    flat = mean_over_processes(torch.cat([t.flatten() for t in parts]))  # all in one vector
    bad = (~flat.isfinite()).float().mean()
    flat.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
    *means, last = flat.split([t.numel() for t in parts])
    for p, mean in zip(params, means, strict=True):
        p.grad = mean.view_as(p)
    return bad, last


def training_step(run, batch, stats):
    """One update of G, D, moving average by this process's share of a batch -> whether a process must stop"""
    cfg, G = run.cfg, run.G
    now = schedules(cfg, run.kimg)
    real = real_images(batch, run.labels.device)  # (share, 3 or 4, R, R)
    c = batch["label"].to(real.device)  # (share,)
    numbers = batch["number"]
    share = cfg.batch_size // WORLD
    for adam in (run.opt_g, run.opt_d):  # a checkpoint brought its own options: back to the run's
        adam.param_groups[0].update(adam.defaults, lr=adam.defaults["lr"] * now["lr_factor"])
        adam.zero_grad()

    # Patches are shared by reals and fakes. Each process draws all: distillation needs the mean scale.
    seed_draws(train_seed(cfg), run.step, "patches")
    patches = sample_patch(cfg, cfg.batch_size, run.kimg)  # of the whole batch
    scale_mean = float(patches[:, 0].mean())
    patches = patches.split(share)[RANK].to(real.device)  # of this process

    # Gradients of G, and of D on what G makes and on photographs, pass by pass; of the camera regulariser.
    G.density_noise = now["density_noise"]
    size = math.gcd(cfg.batch_gpu, share)  # of a pass
    weight = size / share
    w_sum = 0
    passes = [slice(first, first + size) for first in range(0, share, size)]
    for pass_number, part in enumerate(passes, RANK * len(passes)):
        patch = patches[part]
        w, rival = generator_pass(run, real[part], c[part], patch, pass_number, weight, stats)
        discriminator_pass(run, real[part], numbers[part], c[part], patch, rival, scale_mean, weight, stats)
        w_sum = w_sum + w
    if G.camera_generator:
        seed_draws(train_seed(cfg), run.step, "camera")  # the same draws in every process
        loss, log = camera_regularizer(G, run.kimg)
        loss.backward()
        stats.add(**log)

    bad_g, w_mean = average_gradients(G, w_sum / share)
    bad_d, stop = average_gradients(run.D, real.new_full([1], bool(run.stop)))  # and whether any must stop
    stats.add(nonfinite_g=bad_g, nonfinite_d=bad_d)
    run.opt_g.step()
    run.opt_d.step()
    G.mapping_network.w_avg.lerp_(w_mean, 1 - 0.998)  # a part of StyleGAN2's state; nothing here reads it
    half_life = min(cfg.ema_kimg * 1000, (run.images + cfg.batch_size) * cfg.ema_rampup)
    beta = 0.5 ** (cfg.batch_size / max(half_life, 1e-8))
    with torch.no_grad():
        torch._foreach_lerp_(list(run.G_ema.parameters()), list(G.parameters()), 1 - beta)
        torch._foreach_copy_(list(run.G_ema.buffers()), list(G.buffers()))
    return bool(stop)


def choose_device(wanted, precision="tf32"):
    """wanted: as --device. -> torch.device, with PyTorch set up for it"""
    gpus = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", LOCAL_RANK + 1))
    if gpus < needed and (gpus or wanted == "cuda"):
        raise UserError(f"--device {wanted}: {needed} processes need a GPU each, {gpus} found; try cpu")
    if not gpus:
        # glibc: freed memory stays with the process, since new pages cost more than the arithmetic on them.
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
        return torch.device("cpu")
    torch.cuda.set_device(LOCAL_RANK)
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    return torch.device("cuda", LOCAL_RANK)


def start_second_process(cfg, device):
    """On CPUs two processes are faster than one with all threads. Starts the other, by the same command line,
    for steps of two groups in one pass; not under torchrun, or with OMP_NUM_THREADS. -> [it], or []"""
    global WORLD
    threads = torch.get_num_threads() // 2
    alone = __name__ == "__main__" and {"OMP_NUM_THREADS", "WORLD_SIZE"}.isdisjoint(os.environ)
    halves = cfg.batch_size == 2 * MBSTD_GROUP <= cfg.batch_gpu
    if not (alone and halves and threads and device.type == "cpu" and sys.platform == "linux"):
        return []
    WORLD = 2
    torch.set_num_threads(threads)
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    os.environ.update(WORLD_SIZE="2", RANK="0", OMP_NUM_THREADS=str(threads), GLOO_SOCKET_IFNAME="lo")
    env = dict(os.environ, RANK="1", LOCAL_RANK="1")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the other inherits: Ctrl-C is for this one
    second = subprocess.Popen([sys.executable, *sys.argv], env=env, preexec_fn=stop_with_parent)
    signal.signal(signal.SIGINT, before)
    return [second]


def join_processes(device, timeout=600, step=0):
    """Waits for the others, all at one step. Then one that is silent for so many seconds ends the run."""
    if WORLD > 1 and not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    if mean_over_processes(torch.tensor(step, dtype=torch.double, device=device)) != step:
        raise UserError("processes go on from different checkpoints; all of them must see the same --out")


def append_line(path, entry):
    if RANK == 0:
        with open(path, "a") as f:
            f.write(json.dumps(entry) + "\n")


def checkpoints(folder):
    """Checkpoints of a run, the newest first. -> [(kimg, path)]"""
    paths = Path(folder).glob("checkpoint-??????.???.pt")
    return sorted(((float(path.stem[11:]), path) for path in paths), reverse=True)


def snapshot(run):
    """Checkpoint, of plain tensors and numbers, and samples. The newest 8 stay. Draws need no state in it."""
    state = {name: getattr(run, name).state_dict() for name in ("G", "D", "G_ema", "opt_g", "opt_d")}
    with atomic(run.file("checkpoint", "pt")) as temporary:
        state.update(config=asdict(run.cfg), step=run.step, images=run.images, classes=run.data.classes)
        torch.save(state, temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())  # on the disk before an older one goes
    for _, path in checkpoints(run.cfg.out)[8:]:
        path.unlink(missing_ok=True)
    write_samples(run.G_ema, run.labels, run.file("samples", "png"))


def load_checkpoint(*paths):
    """The first whole one of the paths, or of a run's newest; none: UserError. -> path, Config, state"""
    folder = Path(paths[0])
    if folder.is_dir():
        paths = [path for _, path in checkpoints(folder)]
    if not paths:
        raise UserError(f"no checkpoint in {folder}; name one, or the folder of a run")
    for path in paths:
        try:
            state = load_tensors(path, "file", mmap=True)
            with zipfile.ZipFile(path) as parts:
                if parts.testzip():
                    raise zipfile.BadZipFile("its checksum is wrong")
            cfg = Config(**state["config"])
            validate(replace(cfg, metrics=""), 1)  # some that there were are in tools/evaluate.py now
            return Path(path), cfg, state
        except Exception as e:  # whatever a damaged or foreign file leads to
            what = f"{path}: gone, damaged, or not a checkpoint of this program ({e})"
            if path == paths[-1]:
                raise UserError(what) from None
            say(f"3dgp.py: warning: {what}; the checkpoint before it is taken", sys.stderr)


def begin_with(path, module, given):
    """Loads what fits of a state dict; what has another shape, or is not in it, begins anew: a line says."""
    own = module.state_dict()
    fits = {key: t for key, t in given.items() if key in own and t.shape == own[key].shape}
    module.load_state_dict(fits, strict=False)
    anew = ", ".join(sorted(own.keys() - fits)) or "nothing"
    say(f"--init {path}: {type(module).__name__} begins with {len(fits)} tensors; anew: {anew}")


def begin_folder(run):
    """The run folder with its configuration and a picture of the data. Newer checkpoints are renamed."""
    spread = np.linspace(0, len(run.data) - 1, 32, dtype=int)  # over the classes too, by their order
    reals = real_images(torch.utils.data.default_collate([run.data[i] for i in spread]), "cpu")
    folder = Path(run.cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    if not run.cfg.resume:  # of two runs that begin at the same moment, one takes it
        (folder / "config.json").touch(exist_ok=False)
    for path in folder.glob(".*.tmp"):  # of a process that was killed
        path.unlink()
    for kimg, path in checkpoints(folder):
        if kimg > run.kimg:
            path.rename(path.with_name(f"left-{path.name}"))
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(asdict(run.cfg), indent=2))
    write_image(tile([to_picture(x[:3], x[3:]) for x in reals], 16), folder / "reals.png")


def diagnose(entry):
    """A log entry -> what is wrong, or "" """
    bad_share = max(entry["nonfinite_g"], entry["nonfinite_d"])
    if bad_share > GUARD_NONFINITE:
        return f"{bad_share:.0%} of the gradients are not finite"
    worst = np.max([entry["loss_g"], entry["loss_d_fake"], entry["loss_d_real"]])
    if not worst <= GUARD_LOSS:
        return f"D is saturated, or not finite: a loss is {worst:.3g}"
    return ""


def go_back(cfg, what, kimg, healthy):
    """After a divergence, seen at kimg: -> Config, state of a checkpoint from when all was well, at `healthy`
    kimg at the latest. Each recovery goes one checkpoint further back than the one before."""
    said = f"diverged at {kimg} kimg: {what}"
    before = len(cfg.recoveries)
    if before == GUARD_TRIES:
        raise UserError(f"{said}, after {before} recoveries; lower --g-lr and --d-lr, or raise --r1-gamma")
    every = checkpoints(cfg.out)
    paths = [path for at, path in every if at <= healthy] or [every[-1][1]]
    path, _, state = load_checkpoint(*paths[min(before, len(paths) - 1) :])
    back = state["images"] / 1000
    append_line(Path(cfg.out, "log.jsonl"), dict(kimg=back, diverged=kimg, reason=what))
    say(f"{said}; back to {path.name}, learning rates halved", sys.stderr)
    return replace(cfg, resume=str(path), recoveries=(*cfg.recoveries, back)), state


def train(cfg, state=None):
    """The whole run. state: of a checkpoint to go on from. After a divergence it takes an earlier one."""
    stop, second = [], []
    if "TORCHELASTIC_RUN_ID" in os.environ:  # when torchrun itself is killed, stop too
        stop_with_parent()
    try:
        while trouble := train_until_trouble(cfg, state, stop, second):
            cfg, state = go_back(cfg, *trouble)
    finally:
        for process in torch.multiprocessing.active_children() + second:  # if one hangs, so would this
            process.kill()


def open_run(cfg, state, stop):
    """Data, teacher and networks, and what a checkpoint's state holds of them. -> Run"""
    validate(cfg, WORLD)
    device = choose_device(cfg.device, cfg.precision)
    start = {}
    if cfg.init and not state:  # now, before data are prepared for hours
        published = Path(cfg.init, "model.safetensors")  # of tools/publish.py
        if published.exists():
            start = dict(G_ema=load_tensors(published, "--init"), D={})
        else:
            start = load_checkpoint(cfg.init)[2]
    data = open_data(cfg)
    teacher = Teacher(cfg.teacher, cfg.teacher_weights).to(device) if cfg.teacher != "none" else None
    cfg = replace(cfg, num_classes=data.num_classes, teacher_dim=teacher.dim if teacher else 0)
    trained = build(cfg, device)
    run = Run(cfg, data, torch.from_numpy(data.labels).to(device), teacher, stop, **trained)
    if state:
        try:
            run.step = state["images"] // cfg.batch_size
            for name, part in trained.items():
                part.load_state_dict(state[name])
        except Exception:  # of other options or data, or damaged
            raise UserError(f"--resume {cfg.resume}: of networks that do not fit") from None
        if state.get("classes", data.classes) != data.classes:  # they might exchange their numbers
            raise UserError(f"--data: the classes were {state['classes']}; name them so, or use --init")
    elif start:
        begin_with(cfg.init, run.G, start["G_ema"])
        begin_with(cfg.init, run.D, start["D"])
        run.G_ema.load_state_dict(run.G.state_dict())
    return run


def evaluate(run, detector, reals):
    """Metrics (--metrics) of the average, printed and appended to metrics.jsonl; the same on any number
    of processes. detector: None where none needs one; reals: mean, covariance of its features of the data"""
    cfg = run.cfg
    wanted = parse_metrics(cfg.metrics)
    most = dict(sorted((kind, n) for kind, _, n in wanted))  # of a kind the largest n comes last, and stays
    fake, flat = measure_samples(run.G_ema, run.labels, detector, most.get("fid", 0), most.get("nfs", 0))
    entry = dict(kimg=run.kimg, data=cfg.data, reals=cfg.reals)
    for kind, count, n in wanted:
        if kind == "nfs":
            name, value = f"nfs{count}", float(flat[:n].mean())
        else:
            name, value = f"fid{count}{detector.label}", frechet_distance(reals, gaussian(fake[:n]))
        entry[name] = value
        why = ", of too few images?" if math.isnan(value) else ""
        say(f"{run.kimg:g} kimg: {name} {value:.4g}{why}")
    if wanted:
        append_line(Path(cfg.out, "metrics.jsonl"), entry)


def train_until_trouble(cfg, state, stop, second):  # noqa: C901, PLR0915 (the loop, from top to bottom)
    """-> None at the end, or when `stop` is not empty; on divergence its sign, its kimg, the last good one"""
    run = open_run(cfg, state, stop)
    cfg, device = run.cfg, run.labels.device
    total = math.ceil(cfg.kimg * 1000 / cfg.batch_size) * cfg.batch_size
    if run.images >= total:  # started again after its end
        say(f"{cfg.out}: finished already")
        return None
    second += start_second_process(cfg, device)
    say(f"{cfg.data}: {len(run.data)} images, {cfg.num_classes} classes; {WORLD} x {device}; {cfg.out}")
    detector = Detector(cfg.detector, device) if "fid" in cfg.metrics else None
    join_processes(device, cfg.timeout, run.step)  # all have opened their checkpoint: now one may be renamed
    if RANK == 0:
        begin_folder(run)
        snapshot(run)  # even of a run that goes on: its configuration may be another one
    join_processes(device)  # where the folder cannot be written, process 0 has ended
    if run.teacher and len(run.data) < 250_000:
        features = Path(cfg.out, f".features-{RANK - LOCAL_RANK}.tmp")  # one on each machine
        run.teacher.keep(features, 2 * len(run.data))
        join_processes(device)
        features.unlink(missing_ok=True)  # it stays open
    reals = detector and running_gaussian(real_parts(cfg, run.data, detector, device, cfg.reals))
    if not state:
        evaluate(run, detector, reals)

    stats, healthy = Averages(), run.kimg  # healthy: of the last log entry in which all was well
    tick = time.time(), run.images
    batches = load_batches(run.data, cfg, draw_batches(cfg, len(run.data), run.step, RANK, WORLD))
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=total, initial=run.images, unit="img", disable=RANK > 0, mininterval=interval) as bar:
        for batch in batches:
            for kind in STOP_SIGNALS:  # until the first batch came there was nothing to save
                signal.signal(kind, lambda *_: stop.append(1))
            stopped = training_step(run, batch, stats)
            run.step += 1
            run.done = stopped or run.images >= total

            if run.due(cfg.log_kimg):
                speed = (run.images - tick[1]) / (time.time() - tick[0])
                entry = dict(kimg=run.kimg, **stats.result())
                entry.update(images_per_second=speed, schedules=schedules(cfg, run.kimg))
                if cfg.guard == "on" and (what := diagnose(entry)):
                    return what, run.kimg, healthy
                healthy = run.kimg
                append_line(Path(cfg.out, "log.jsonl"), entry)

            if RANK == 0 and run.due(cfg.snapshot_kimg):
                snapshot(run)
            if run.due(cfg.metrics_kimg) and not stopped:
                evaluate(run, detector, reals)
            bar.update(cfg.batch_size)  # after the checkpoint: who looked on may have gone
            if run.due(cfg.log_kimg):
                tick = time.time(), run.images  # speed is that of training alone
            if run.done:
                break
    end = f"stopped (go on with --resume latest --out {cfg.out})" if run.images < total else "finished"
    say(f"{end} at {run.kimg} kimg; see {run.file('samples', 'png')}")


# ---- Pictures ----------------------------------------------------------------------------------------------
# From tensors to arrays of bytes, and to the grids that a run writes: samples over depth, photographs too.


def to_picture(rgb, depth=(), near=-1, far=1, dim=1):
    """rgb (3, H, W) in [-1, 1]; below it (dim=2: beside) depth (1, H, W), if any -> uint8 (., ., 3)"""
    shades = [(d - near).expand_as(rgb) / max(far - near, 1e-6) for d in depth]
    picture = (torch.cat([(rgb + 1) / 2, *shades], dim).clamp(0, 1) * 255).round().byte()
    return picture.permute(1, 2, 0).cpu().numpy()


def tile(cells, columns):
    """Equal pictures (H, W, 3), row by row; small ones are enlarged without smoothing."""
    starts = range(0, len(cells) - columns + 1, columns)
    lines = [np.concatenate(cells[i : i + columns], 1) for i in starts]
    zoom = -(-96 // cells[0].shape[1])
    return Image.fromarray(np.concatenate(lines, 0).repeat(zoom, 0).repeat(zoom, 1))


def write_image(image, path):
    with atomic(path) as temporary:
        image.save(temporary, "PNG")


def render_views(G, planes, cameras, resolution, dim=1):
    """One scene (planes of 1) from each camera -> pictures of RGB and depth, as `to_picture`"""
    views = [G.render(planes, rows(cameras, [i]), resolution) for i in range(len(cameras.yaw))]
    near, far = views[0][1].quantile(planes.new_tensor([0.02, 0.98])).tolist()  # but for strays
    return [to_picture(rgb[0], depth[0] if G.cfg.dims == 3 else (), near, far, dim) for rgb, depth in views]


@torch.no_grad()
def write_samples(G, labels, path):
    """A grid of fixed z and classes: 4 scenes a row, RGB over depth from 4 yaws, mean ± 0.3 rad; in 2D 16"""
    scenes, views = (16, 4) if G.cfg.dims == 3 else (64, 1)
    z, _, prior = draw_latents(G.cfg, scenes, labels, "samples")
    c = torch.arange(scenes, device=z.device) % max(1, G.cfg.num_classes)
    camera = G.pose(prior, z, c)  # of all scenes
    yaws = camera.yaw.mean() + torch.linspace(-0.3, 0.3, views, device=z.device)
    cells = []
    for i in torch.arange(scenes, device=z.device).split(1):
        cameras = rows(camera, i.expand(views))._replace(yaw=yaws)
        cells += render_views(G, G.backbone(G.mapping(z[i], c[i])), cameras, G.cfg.resolution)
    write_image(tile(cells, 16), path)


# ---- Main --------------------------------------------------------------------------------------------------
# The command line, what can be wrong in it, which run it means, and how a program ends. For tools/, too.


def parse_options(options, prog, description, argv=None, positional=()):
    """options: a dataclass of `opt`s; positional: (name, help, nargs or None), ... -> {field: value given}"""

    def refuse(message):
        raise UserError(f"{message}; --help shows all options")

    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.argument_default = argparse.SUPPRESS
    parser.error = refuse
    for name, text, nargs in positional:
        parser.add_argument(name, help=text, nargs=nargs)
    for option in filter(lambda option: option.metadata, fields(options)):
        kind, default, choices = option.type, option.default, option.metadata["choices"]
        how = dict(type=kind, choices=choices, metavar=None if choices else kind.__name__.upper())
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            how = dict(type=float, nargs=len(default), metavar="X")
            default = " ".join(f"{x:g}" for x in default)
        text = f"{option.metadata['help']} (default: {default})"
        parser.add_argument("--" + option.name.replace("_", "-"), help=text, **how)
    return vars(parser.parse_args(argv))


POSITIVE = """batch_size triplane_features channel_base channel_max adaptor_channels z_dim w_dim fine_samples
    box r1_interval patch_beta timeout kimg snapshot_kimg log_kimg metrics_kimg
    mapping_lr_mult camera_lr_mult"""


def validate(cfg, world):
    """Whatever is wrong in a configuration is a UserError, before anything is built."""

    def require(ok, message):
        if not ok:
            raise UserError(message)

    for name, value in vars(cfg).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, str):
            require(not re.search(r"[\ud800-\udfff]", value), f"{flag}: is not UTF-8; rename it")
            continue
        numbers = np.array(value, float)
        least = numbers.min(initial=math.inf)
        require(np.isfinite(numbers).all(), f"{flag}: not a finite number")
        require(least >= 0 or name == "prior_yaw", f"{flag}: must not be negative")
        require(least > 0 or name not in POSITIVE.split(), f"{flag} {value}: must be positive")
        if name.startswith("prior_"):
            require(value[0] < value[1], f"{flag}: the first number must be less than the second")
        if name.endswith("resolution"):
            require(value > 4 and value.bit_count() == 1, f"{flag} {value}: must be a power of two from 8 on")

    R, P = cfg.resolution, cfg.patch_resolution
    require(cfg.data, "--data: is empty; name a folder or a zip of images")
    require(os.path.realpath(cfg.out) != cfg.data, "--out: is the folder of the data; name another")
    require(cfg.dims == 3 or cfg.depth == "none", "--dims 2: a picture has no depth; add --depth none")
    require(P <= R, f"--patch-resolution {P}: larger than --resolution {R}")
    require(cfg.prior_pitch[1] <= math.pi, "--prior-pitch: must lie between 0 and pi")
    require(cfg.prior_fov[1] < 180, "--prior-fov: must stay below 180 degrees")
    require(cfg.channel_base >= max(R, cfg.triplane_resolution), "--channel-base: less than the resolution")
    require(cfg.coarse_samples >= 3, "--coarse-samples: must be 3 or more")
    require(cfg.near < cfg.far, "--near: must be less than --far")
    parse_metrics(cfg.metrics)
    share = cfg.batch_size // world
    size = math.gcd(cfg.batch_gpu, share)  # of a pass
    batch = f"--batch-size {cfg.batch_size}, --batch-gpu {cfg.batch_gpu}"
    require(cfg.batch_size % world == 0, f"{batch}: not divisible by {world} processes")
    require(size % MBSTD_GROUP == 0, f"{batch}: {size} images in a pass are not a multiple of {MBSTD_GROUP}")


def resolve(given):
    """The options given -> Config, and the state to go on from or None. What is not given stays as it was."""
    data = given.get("data", "shapes")
    if data and data not in DATA_PRESETS:
        given["data"] = data = os.path.realpath(data)
    out = Path(given.get("out") or Path("runs", Path(data).name.removesuffix(".zip")))
    resume = given.get("resume", "")
    if not resume or resume == "auto" and not checkpoints(out):
        taken = Path(out, "config.json").exists()  # by a run, or a start that was killed
        if taken and not resume:
            raise UserError(f"--out {out}: holds a run; go on by --resume latest, or name another folder")
        return make_config({**given, "out": str(out), "resume": "auto" if taken else ""}), None
    path, saved, state = load_checkpoint(out if resume in ("latest", "auto") else resume)
    cfg = replace(saved, **{"out": str(path.parent), **given, "resume": str(path)})
    for name in ("preset", "mapping_lr_mult", "camera_lr_mult"):  # the last two scale stored weights
        if getattr(cfg, name) != getattr(saved, name):
            raise UserError(f"--{name.replace('_', '-')}: {path} has {getattr(saved, name)}; start a new run")
    if Path(cfg.out, "config.json").exists() and not path.parent.samefile(cfg.out):
        raise UserError(f"--out {cfg.out}: holds another run than {path}; name another folder")
    if cfg.data != saved.data and "out" not in given:
        raise UserError(f"--data {cfg.data}: {path} is of {saved.data}; name another --out, or this one anew")
    say(f"going on with {path}, on {cfg.data}")
    return cfg, state


def run_program(name, work):
    """Calls work(); what a user can mend becomes one line on standard error. -> exit status"""
    status = 0
    sys.stderr = sys.stderr or open(os.devnull, "w", errors="replace")  # noqa: SIM115 (who called has closed it)
    if hasattr(sys.stdout, "reconfigure"):  # what the terminal cannot show is no reason to end
        sys.stdout.reconfigure(errors="replace")
    try:
        work()
        print(end="", flush=True)  # tools print without: os._exit below would lose that
    except (UserError, OSError, torch.OutOfMemoryError) as e:  # the last one of a GPU
        status = 2
        if LOCAL_RANK == 0 or dist.is_initialized():  # once per machine, or where it happened
            print(f"{name}: error: {e}", file=sys.stderr)
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        status = 1
        reason = f"another one has ended, or did not answer in --timeout ({str(e).strip().splitlines()[0]})"
        print(f"{name}: error: process {RANK} waited in vain: {reason}", file=sys.stderr)
    except KeyboardInterrupt:  # before there was anything to save
        status = 130
    if dist.is_initialized():  # threads that wait for other processes would abort a normal exit
        os._exit(status)
    return status


def main(argv=None):
    """-> exit status"""
    about = "3DGP, as published at 256²; --preset and --data change that, as PRESETS says. More is in tools/."
    return run_program("3dgp.py", lambda: train(*resolve(parse_options(Config, "3dgp.py", about, argv))))


if __name__ == "__main__":
    sys.exit(main())
