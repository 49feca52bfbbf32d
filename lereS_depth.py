"""From photographs to training data: crop, resize, and estimate depth with LeReS (Yin et al., "Learning to
Recover 3D Scene Shape from a Single Image", CVPR 2021). One command, on any number of GPUs:
    python lereS_depth.py photos/ data/photos --resolution 256
    python lereS_depth.py photos.zip data/photos.zip --resolution 256 --weights res101.pth
    python lereS_depth.py photos/ data/photos --depth-from maps/ --invert      # ready maps, any estimator
    torchrun --nproc_per_node=8 lereS_depth.py imagenet/train data/imagenet --resolution 256 --keep 0.33

SOURCE: flat, or one folder per class, or with dataset.json. TARGET gets `<name>.png`, `<name>_depth.png` (16
bit, larger is farther) and dataset.json; skipped.txt says what could not be used, all_depth.png shows some
over their depth. A run that was stopped goes on: call it again. `3dgp.py --data photos/` does all this, too.
"""

import concurrent.futures
import dataclasses
import glob
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # as in 3dgp.py
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

tdgp = importlib.import_module("3dgp")  # reads photographs, has small helpers; its name is no identifier

# ---- Network. Its parameters have the names that they have in the released checkpoints ---------------------

double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)  # (B, C, H, W) -> (B, C, 2H, 2W)


def conv(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class FTB(nn.Module):
    """A convolution, and a residual branch behind it. (B, in, H, W) -> (B, mid, H, W)"""

    def __init__(self, in_channels, mid):
        super().__init__()
        self.conv1 = conv(in_channels, mid)
        layers = [nn.ReLU(), conv(mid, mid), nn.BatchNorm2d(mid), nn.ReLU(), conv(mid, mid)]
        self.conv_branch = nn.Sequential(*layers)

    def forward(self, x):
        x = F.relu(self.conv1(x))  # the reference vectors tell: the branch's first ReLU acts on the sum, too
        return F.relu(x + self.conv_branch(x))


class FFM(nn.Module):
    """Fuses a skip connection into the coarser features. (B, in, H, W), (B, 256, H, W) -> (B, 256, 2H, 2W)"""

    def __init__(self, in_channels):
        super().__init__()
        self.ftb1, self.ftb2 = FTB(in_channels, 256), FTB(256, 256)

    def forward(self, skip, high):
        return double(self.ftb2(self.ftb1(skip) + high))


class Decoder(nn.Module):
    """Features after layer1 ... layer4 of the encoder -> depth (B, 1, H, W)"""

    def __init__(self):
        super().__init__()
        self.conv = FTB(2048, 512)
        self.conv1 = conv(512, 256)
        self.ffm2, self.ffm1, self.ffm0 = FFM(1024), FFM(512), FFM(256)
        self.outconv = nn.Module()
        self.outconv.adapt_conv = nn.Sequential(conv(256, 128), nn.BatchNorm2d(128), nn.ReLU(), conv(128, 1))

    def forward(self, x1, x2, x3, x4):
        x = double(self.conv1(self.conv(x4)))  # (B, 256, H / 16, W / 16)
        x = self.ffm1(x2, self.ffm2(x3, x))  # (B, 256, H / 4, W / 4)
        x = self.ffm0(x1, x)  # (B, 256, H / 2, W / 2)
        return double(self.outconv.adapt_conv(x))  # (B, 1, H, W)


class LeReS(nn.Module):
    """(B, 3, H, W), by MEAN and STD, sides multiples of 32 -> depth up to scale and offset (B, 1, H, W)"""

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    SIZE = 448  # side of the images it was trained on
    ENCODERS = {"resnet50": "resnet50", "resnext101": "resnext101_32x8d"}  # timm's names

    def __init__(self, backbone):
        super().__init__()
        name = self.ENCODERS[backbone]
        self.encoder_modules = nn.Module()
        self.encoder_modules.encoder = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
        self.decoder_modules = Decoder()

    def forward(self, x):
        return self.decoder_modules(*self.encoder_modules.encoder(x))


@torch.no_grad()
def estimate_depth(model, images, size=None):
    """Affine-invariant depth, larger is farther, from 0.01 on.
    images (B, 3, H, W) in [0, 1], of any size -> float32 (B, 1, H, W), or (B, 1, size, size)"""
    x = F.interpolate(images, model.SIZE, mode="bilinear", align_corners=False, antialias=True)

    mean = images.new_tensor(model.MEAN).view(3, 1, 1)
    std = images.new_tensor(model.STD).view(3, 1, 1)
    depth = model((x - mean) / std).float()  # (B, 1, SIZE, SIZE)
    depth = depth - depth.amin((1, 2, 3), keepdim=True) + 0.01
    return F.interpolate(depth, size or images.shape[2:], mode="bilinear", align_corners=False)


# ---- Weights: a file that was given, or the released one, downloaded once into PyTorch's cache -------------

URL = "https://huggingface.co/lllyasviel/Annotators/resolve/5bc80eec2b4fddbb/res101.pth"
SHA256 = "1d696b2ef3e8336b057d0c15bc82d2fecef821bfebe5ef9d7671a5ec5dde520b"


def load_leres(path):
    """The network from a file in the released format: a dict with `depth_model`, names with `module.`"""
    state = tdgp.load_tensors(path, "--weights")
    if isinstance(state, dict):
        state = state.get("depth_model", state)
    entries = state.items() if isinstance(state, dict) else ()  # then every parameter is missing
    state = {name.removeprefix("module."): value for name, value in entries}

    # Only the deeper encoder has a seventh block in its third layer.
    deep = any(name.startswith("encoder_modules.encoder.layer3.6.") for name in state)
    model = LeReS("resnext101" if deep else "resnet50")

    own = model.state_dict()
    missing = [name for name in own if getattr(state.get(name), "shape", None) != own[name].shape]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        what = f"{len(missing)} missing or of another shape, {len(unexpected)} unexpected"
        first = (missing + unexpected)[0]
        raise tdgp.UserError(f"--weights {path}: not the parameters of LeReS: {what}, the first is {first}")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def download(url, path, sha256):
    """Fetch a file: goes on where an earlier attempt broke off, checks, and only then gives it its name."""
    part = path.with_name(f"{path.name}.{platform.node()}.part")  # machines may share the folder
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(request, timeout=30) as reply:
            if reply.status != 206:  # the whole file comes again
                part.unlink(missing_ok=True)
                done = 0
            total = done + int(reply.headers.get("Content-Length", 0)) or None
            with open(part, "ab") as f, tqdm.wrapattr(f, "write", total, initial=done, desc=path.name) as out:
                shutil.copyfileobj(reply, out)
        if total and part.stat().st_size < total:
            raise OSError("the connection broke off; what came is kept")
    except OSError as e:  # urllib's errors are among them
        if getattr(e, "code", None) != 416:  # 416: nothing is left to fetch
            hint = "fetch it in another way and name it with --weights FILE"
            raise tdgp.UserError(f"cannot download {url} ({e}); {hint}") from None

    if hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise tdgp.UserError(f"{url}: not the expected file (SHA-256); try again, or use --weights FILE")
    os.replace(part, path)


def find_weights(given):
    """The file that was given, or the one in PyTorch's cache, downloaded when it is not there. -> Path"""
    if given:
        return Path(given)
    path = Path(torch.hub.get_dir()) / "checkpoints" / "leres_res101.pth"
    if tdgp.LOCAL_RANK == 0 and not path.exists():  # one process on each machine
        print(f"LeReS weights, 531 MB, licensed for non-commercial use only: {URL}", file=sys.stderr)
        download(URL, path, SHA256)
    wait_for([path])
    return path


# ---- Photographs: what becomes of each of them, but for the network's part ---------------------------------


class Work:
    """The photographs, and where each of them goes. Worker processes have a copy."""

    def __init__(self, cfg, folder):
        self.cfg = cfg
        self.folder = folder
        try:
            self.data = tdgp.ImageData(tdgp.Config(resolution=cfg.resolution, depth="none"), cfg.source)
            "".join(self.data.names).encode()
        except tdgp.UserError as e:
            raise tdgp.UserError(str(e).removeprefix("--data ")) from None
        except UnicodeEncodeError as e:
            raise tdgp.UserError(f"{cfg.source}: a name is not UTF-8 ({e}); rename the file") from None

        self.names = self.data.names
        self.labels = self.data.labels if self.data.num_classes else np.zeros(len(self.names), np.int64)
        if cfg.depth_from:
            found = glob.glob("**", root_dir=cfg.depth_from, recursive=True)  # follows links
            self.maps = tdgp.Names({name: Path(cfg.depth_from, name) for name in found})
        self.taken = {"all"}  # all_depth.png is the contact sheet
        self.outputs = [self.output_name(name) for name in self.names]

    def output_name(self, name):
        """a.jpg -> a.png; a.webp beside it -> a_webp.png; another one -> a_2.png. None ends in _depth.png."""
        free = stem = str(Path(name).with_suffix(""))
        tries = 0
        while free in self.taken or free.endswith("_depth"):
            tries += 1
            free = f"{stem}_{Path(name).suffix[1:] if tries == 1 else tries}"
        self.taken.update((free, free + "_depth"))
        return free + ".png"

    def paths(self, indices):
        """Where these images and their depth go: image, depth, image, depth, ..."""
        paths = []
        for i in indices:
            paths += [self.folder / self.outputs[i], self.folder / f"{tdgp.depth_name(self.outputs[i])}.png"]
        return paths

    def open(self, i):
        with Image.open(io.BytesIO(self.data.read(self.names[i]))) as f:
            return tdgp.to_rgb(f)

    def picture(self, i, image=None):
        """-> photograph i, (R, R, 3) uint8"""
        return np.asarray(ImageOps.fit(image or self.open(i), [self.cfg.resolution] * 2, Image.LANCZOS))

    def load(self, i):
        """Write photograph i, and its depth if there are ready maps. -> else what the network has to see"""
        image = self.open(i)
        self.write(self.paths([i])[0], self.picture(i, image))
        if self.cfg.depth_from:
            return self.save(i, self.ready_depth(i, image.size))
        return np.asarray(ImageOps.fit(image, (LeReS.SIZE, LeReS.SIZE), Image.BILINEAR))

    def save(self, i, depth):
        """Write depth (R, R): 16 bit, between its extremes."""
        low, high = float(depth.min()), float(depth.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("depth is not finite")
        depth = (depth - low) * (65535 / max(high - low, 1e-12))
        self.write(self.paths([i])[1], depth.round().astype(np.uint16))

    def write(self, path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tdgp.atomic(path) as tmp:
            Image.fromarray(array).save(tmp, "PNG", compress_level=0)  # 1: a third less, 3 times as long

    def ready_depth(self, i, size):
        """The ready map of photograph i, whose size is (w, h), cut as the photograph is. -> (R, R)"""
        depth = self.read_map(self.names[i])  # (H, W)
        known = np.isfinite(depth) & (depth > 0)
        if not depth.any() or (self.cfg.invert and known.mean() < 0.1):
            raise ValueError("less than a tenth of its depth is measured")
        if self.cfg.invert:  # what was not measured is far: 10 times as far as the nearest, the limit of all
            depth = 1 / np.where(known, depth, 0).clip(min=0.1 * depth[known].max())
        depth = tdgp.fill_holes(depth)
        return tdgp.fit_depth(depth, size, (self.cfg.resolution, self.cfg.resolution))

    def read_map(self, name):
        """-> numbers (H, W), as the file has them"""
        stem = os.path.splitext(name)[0]
        for end in ("_depth.png", "_depth.npy", ".npy", ".png", "_depth.tiff", "_depth.tif", ".tiff", ".tif"):
            path = self.maps[stem + end]
            if path and path.resolve() != (self.data.source / name).resolve():
                depth = np.load(path).squeeze() if "npy" in end else tdgp.read_depth(path.read_bytes())
                if depth.ndim != 2 or depth.size == 0:
                    raise ValueError(f"{path} is no map: its shape is {depth.shape}")
                return depth
        raise FileNotFoundError(f"no depth: neither {stem}.png, nor _depth.png, nor .npy")


WORK = None  # in worker processes: the photographs


def start_worker(work):
    global WORK
    WORK = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent):
    """End this process when its parent has ended, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def in_worker(method, *args):
    """A method's result, or why there is none, a str. Raised is only what stops the run, as a full disk."""
    try:
        return getattr(WORK, method)(*args)
    except tdgp.UserError:
        raise
    except Exception as e:  # decoders of damaged files raise anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        return re.sub(r"<.* at 0x\w+>", "", reason).strip()


def in_groups(pool, method, groups, ahead=4):
    """For each group of indices what a method of Work makes of it, [(index, result)]; more are under way."""
    started = []
    for k in range(len(groups) + ahead - 1):
        if k < len(groups):
            started.append([(i, pool.submit(in_worker, method, i)) for i in groups[k]])
        if k >= ahead - 1:
            yield [(i, future.result()) for i, future in started.pop(0)]


# ---- Preparing ---------------------------------------------------------------------------------------------
# Any number of processes share the work. What they tell each other is in files of one folder: prepared.json
# (what is made), kept.txt (of which images), and a mark from each that is done, with what it could not use.


@dataclasses.dataclass
class Prepare:
    """Options, after SOURCE and TARGET."""

    source: str
    target: str
    resolution: int = tdgp.opt(256, "side of the images")
    weights: str = tdgp.opt("", "LeReS checkpoint (empty: downloaded once)")
    depth_from: str = tdgp.opt("", "folder of ready maps in LeReS's place: PNG, TIFF, .npy; holes are filled")
    invert: bool = tdgp.opt(False, "the ready maps are disparity: take 1 / map; 0 is far")
    keep: float = tdgp.opt(1.0, "share of each class to keep: the most typical images")
    keep_model: str = tdgp.opt("resnet50", "timm model whose features tell what is typical")
    keep_weights: str = tdgp.opt("", "local file with its weights (empty: timm downloads them)")
    batch: int = tdgp.opt(16, "images the network sees at once")
    workers: int = tdgp.opt(os.cpu_count() or 1, "processes that decode and encode")
    device: str = tdgp.opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")
    precision: str = tdgp.opt("tf32", "arithmetic of LeReS; on CPUs tf32 is fp32", "fp32", "tf32", "bf16")

    def __post_init__(self):
        for name in ("resolution", "batch", "workers"):
            if getattr(self, name) < 1:
                raise tdgp.UserError(f"--{name} {getattr(self, name)}: must be positive")
        if not 0 < self.keep <= 1:
            raise tdgp.UserError(f"--keep {self.keep}: must be above 0 and at most 1")
        if self.invert and not self.depth_from:
            raise tdgp.UserError("--invert: is for ready maps; give --depth-from too")
        if self.depth_from and not Path(self.depth_from).is_dir():
            raise tdgp.UserError(f"--depth-from {self.depth_from}: no such folder")


class Job:
    """What the steps of a preparation share. A zip is made, in the end, of a folder beside it."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.rank, self.world = tdgp.RANK, tdgp.WORLD
        self.device = tdgp.choose_device(cfg.device, cfg.precision)
        self.target = Path(cfg.target)
        self.zipped = cfg.target.lower().endswith(".zip")
        self.folder = self.target
        self.complete = self.target / "dataset.json"  # comes last
        if self.zipped:
            self.folder = self.target.with_suffix(".unfinished")
            self.complete = self.target
        self.note = self.folder / "prepared.json"
        self.marks = [self.folder / f".part-{rank}-of-{self.world}" for rank in range(self.world)]
        self.work = None  # the photographs, once they have been found
        self.skipped = {}  # name of a photograph: why it is left out

    def about(self, name):
        """Where a file about the result goes: into the folder, or beside the zip."""
        return self.target.with_suffix("." + name) if self.zipped else self.target / name


def prepare(cfg):
    """The share of this process; process 0 also finishes the whole."""
    job = Job(cfg)
    if job.complete.exists():
        if job.zipped and job.note.exists():  # left by a run that was killed in its last moment
            shutil.rmtree(job.folder, ignore_errors=True)
        if job.rank > 0:
            return
        raise tdgp.UserError(f"{job.target}: is there already; delete it to make it anew")

    # What may be wrong is found out before there is a folder.
    job.work = Work(cfg, job.folder)
    weights = None if cfg.depth_from else find_weights(cfg.weights)
    model = load_leres(weights).to(job.device) if weights else None
    selects = cfg.keep < 1 and job.rank == 0
    teacher = tdgp.Teacher(cfg.keep_model, cfg.keep_weights).to(job.device) if selects else None
    claim(job, weights)
    if job.complete.exists():
        return

    start = time.time()
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
    with concurrent.futures.ProcessPoolExecutor(cfg.workers, context, start_worker, (job.work,)) as pool:
        indices = list(range(len(job.work.names)))
        if cfg.keep < 1:
            indices = choose(job, pool, indices, teacher)
        estimate(job, pool, indices, model)
    hand_in(job)

    if job.rank == 0 and not job.complete.exists():
        n = finish(job, indices)
        print(f"{job.target}: {n:,} images in {time.time() - start:.0f} s")


def claim(job, weights):
    """Make the folder, or go on in it if it has the same recipe: nothing else must get mixed in."""
    recipe = dataclasses.asdict(dataclasses.replace(job.cfg, target="", workers=1, device=""))
    recipe["source"] = str(Path(job.cfg.source).resolve())
    recipe["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest() if weights else ""
    recipe["depth_from"] = str(Path(job.cfg.depth_from).resolve()) if job.cfg.depth_from else ""

    job.folder.mkdir(parents=True, exist_ok=True)
    begun = any(path.is_file() for path in job.folder.rglob("[!.]*") if path.name != "skipped.txt")
    if job.note.exists():
        compare(job, recipe)  # now, since another preparation may take hours
    elif begun:
        raise tdgp.UserError(f"{job.folder}: has files that are not of this program; name another target")
    lock(job)
    if job.complete.exists():  # by the preparation that was waited for
        return
    if job.rank == 0:
        for mark in job.folder.glob(".part-*"):  # of an earlier run: they would be trusted
            mark.unlink(missing_ok=True)
        if not job.note.exists():
            write_text(job.note, json.dumps(recipe, indent=1))
    wait_for([job.note])
    compare(job, recipe)


def compare(job, recipe):
    try:
        before = dict(json.loads(job.note.read_text()))
    except (ValueError, TypeError):
        raise tdgp.UserError(f"{job.note}: is not of this program; name another target") from None
    differing = [name for name in recipe if before.get(name, recipe[name]) != recipe[name]]
    if differing:
        raise tdgp.UserError(f"{job.folder}: is of another {', '.join(differing)}; delete it or name another")


def lock(job):
    """Waits for the process of this number of another preparation. The lock ends with this process."""
    try:
        fcntl = importlib.import_module("fcntl")
        job.lock = open(job.folder / f".lock-{job.rank}", "a")  # noqa: SIM115 (as long as the job)
        fcntl.flock(job.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{job.folder}: another process prepares it; waiting", flush=True)
        fcntl.flock(job.lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # there are no locks here
        return


def write_text(path, text):
    with tdgp.atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def wait_for(paths):
    """For files that other processes write. Without a limit: if one of those dies, so does the whole job."""
    while not all(map(Path.exists, paths)):
        time.sleep(0.2)


def split(indices, size):
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def choose(job, pool, indices, teacher):
    """The images to keep, which process 0 selects and lists in kept.txt. -> indices"""
    kept = job.folder / "kept.txt"
    if job.rank == 0 and not kept.exists():
        selected = select(job, pool, indices, teacher)
        write_text(kept, "".join(f"{job.work.names[i]}\n" for i in selected))
    wait_for([kept])
    names = set(kept.read_text(encoding="utf-8").split("\n"))
    return [i for i in indices if job.work.names[i] in names]


def select(job, pool, indices, teacher):
    """The share `keep` of each class that is likeliest under a Gaussian of its features (instance selection,
    DeVries et al. 2020). -> indices; those of unreadable images, too: the next step says what is wrong."""
    features = [torch.zeros(0, teacher.dim)]
    readable = []
    groups = split(indices, job.cfg.batch)
    for loaded in tqdm(in_groups(pool, "picture", groups), "selecting", len(groups), unit="batch"):
        pictures = {i: result for i, result in loaded if isinstance(result, np.ndarray)}
        if pictures:
            images = torch.from_numpy(np.stack(list(pictures.values()))).to(job.device)  # (B, R, R, 3)
            features.append(teacher(images.permute(0, 3, 1, 2) / 127.5 - 1).float().cpu())
            readable.extend(pictures)
    features = torch.cat(features)  # (N, teacher.dim)

    kept = set(indices) - set(readable)
    readable = np.array(readable, int)
    labels = job.work.labels[readable]
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        x = features[own].double()
        x = x - x.mean(0)

        # The covariance goes a tenth of the way to a sphere, since a class may have few images.
        cov = x.t() @ x / max(len(own) - 1, 1)  # (dim, dim)
        cov = 0.9 * cov + (0.1 * cov.diagonal().mean() + 1e-9) * torch.eye(len(cov), dtype=cov.dtype)
        unlikely = (x * torch.linalg.solve(cov, x.t()).t()).sum(1)  # squared Mahalanobis distance

        number = math.ceil(job.cfg.keep * len(own))
        likeliest = own[unlikely.argsort(stable=True)[:number].numpy()]
        kept.update(readable[likeliest].tolist())
    return sorted(kept)


def estimate(job, pool, indices, model):
    """Write the photographs and their depth, as far as they are this process's and not there already."""
    # The network sees fixed groups: neither what is there already nor the number of processes changes them.
    size = job.cfg.batch
    own = split(indices, size)[job.rank :: job.world]
    groups = [group for group in own if not all(map(Path.exists, job.work.paths(group)))]
    loading = in_groups(pool, "load", groups)
    saving = []  # (index, future) of depth that is being written
    for loaded in tqdm(loading, "preparing", len(groups), unit="img", unit_scale=size, disable=job.rank > 0):
        pictures = {i: result for i, result in loaded if isinstance(result, np.ndarray)}
        job.skipped.update({job.work.names[i]: result for i, result in loaded if isinstance(result, str)})
        if pictures:
            images = torch.from_numpy(np.stack(list(pictures.values()))).to(job.device)  # (B, SIZE, SIZE, 3)
            with tdgp.autocast(job.cfg, job.device):
                depths = estimate_depth(model, images.permute(0, 3, 1, 2).float() / 255, job.cfg.resolution)
            depths = depths[:, 0].cpu().numpy()  # (B, R, R)
            for i, depth in zip(pictures, depths, strict=True):
                saving.append((i, pool.submit(in_worker, "save", i, depth)))
        settle(job, saving, 4 * size)
    settle(job, saving, 0)


def settle(job, saving, most):
    """Writing may lag a little: wait until depth of at most so many photographs is still being written."""
    while len(saving) > most:
        i, future = saving.pop(0)
        if problem := future.result():
            job.skipped[job.work.names[i]] = problem


def hand_in(job):
    """Leave this process's mark; processes other than 0 then wait until the whole is complete."""
    mark = job.marks[job.rank]
    while not job.complete.exists():
        write_text(mark, json.dumps(job.skipped))
        if job.rank == 0:
            return
        while mark.exists() and not job.complete.exists():  # process 0, if it starts late, removes the mark
            time.sleep(0.2)


# ---- Finishing, by process 0 -------------------------------------------------------------------------------


def finish(job, indices):
    """Wait for all; then skipped.txt, contact sheet, dataset.json and perhaps the zip. -> number of images"""
    work = job.work
    wait_for(job.marks)
    skipped = {}
    for mark in job.marks:
        skipped.update(json.loads(mark.read_text()))
    indices = [i for i in indices if work.names[i] not in skipped]
    wait_for(work.paths(indices))  # a file system that machines share may be slow

    # What killed runs left; and an image without depth, or the other way round.
    left_out = [i for i, name in enumerate(work.names) if name in skipped]
    for path in [*job.folder.rglob(".*.tmp"), *work.paths(left_out)]:
        path.unlink(missing_ok=True)

    reasons = job.about("skipped.txt")
    write_text(reasons, "".join(f"{name}\t{skipped[name]}\n" for name in sorted(skipped)))
    if not indices:
        job.note.unlink()  # the next attempt may be another
        raise tdgp.UserError(f"{job.cfg.source}: not one image of it could be used; {reasons} says why")

    write_sheet(work, indices, job.about("all_depth.png"))
    labels = [[work.outputs[i], int(work.labels[i])] for i in indices]
    listing = job.folder / "dataset.json"
    write_text(listing, json.dumps({"labels": labels if work.data.num_classes else None}))
    if job.cfg.keep < 1:
        write_text(job.about("kept.txt"), "".join(f"{work.names[i]}\n" for i in indices))

    if job.zipped:
        with tdgp.atomic(job.target) as tmp, zipfile.ZipFile(tmp, "w") as archive:
            for path in [listing, *work.paths(indices)]:
                member = zipfile.ZipInfo(path.relative_to(job.folder).as_posix())  # with a fixed date
                archive.writestr(member, path.read_bytes())
        shutil.rmtree(job.folder)
    else:
        for path in (*job.marks, *job.folder.glob(".lock-*")):
            path.unlink()
    if skipped:
        print(f"{len(skipped)} images were left out; {reasons} says why", file=sys.stderr)
    return len(indices)


def write_sheet(work, indices, path):
    """Up to 32 photographs, evenly over all, above their depth."""
    cells = []
    for k in np.linspace(0, len(indices) - 1, min(32, len(indices))).round():
        image, depth = (np.asarray(Image.open(p)) for p in work.paths([indices[int(k)]]))
        gray = (depth // 257).astype(np.uint8)[..., None].repeat(3, 2)  # (R, R, 3)
        cells.append(np.concatenate([image, gray]))
    tdgp.write_image(tdgp.tile(cells, min(8, len(cells))), path)


# ---- Main --------------------------------------------------------------------------------------------------


def run(argv):
    description = "Photographs to training data with depth, as the head of this file says."
    source = ("source", "folder or zip of photographs", None)
    target = ("target", "folder, or a name that ends in .zip, for the result", None)
    try:
        given = tdgp.parse_options(Prepare, "lereS_depth.py", description, argv, (source, target))
        prepare(Prepare(**given))
    except concurrent.futures.BrokenExecutor as e:  # a worker process was killed
        raise tdgp.UserError(str(e)) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise


def main(argv=None):
    """-> exit status"""
    return tdgp.run_program("lereS_depth.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
