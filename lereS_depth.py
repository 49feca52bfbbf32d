"""From photographs to training data: crop, resize, and estimate depth with LeReS (Yin et al., "Learning to Recover 3D
Scene Shape from a Single Image", CVPR 2021). One command, on any number of GPUs.

Run it:
    python lereS_depth.py photos/ data/photos --resolution 256
    python lereS_depth.py photos.zip data/photos.zip --resolution 256 --weights res101.pth
    python lereS_depth.py photos/ data/photos --depth-from maps/ --invert          # ready maps of any other estimator
    torchrun --nproc_per_node=8 lereS_depth.py imagenet/train data/imagenet --resolution 256 --keep 0.33

SOURCE: flat, or one folder per class, or with dataset.json. TARGET gets `<name>.png`, `<name>_depth.png` (16 bit, larger
is farther) and dataset.json; skipped.txt says what could not be used, depth.png shows photographs over their depth. A
run that was stopped goes on: call it again. `3dgp.py --data photos/` does all this by itself.
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

if "tdgp" not in sys.modules:   # 3dgp.py, whose name is no identifier: reads photographs, has small helpers
    spec = importlib.util.spec_from_file_location("tdgp", Path(__file__).with_name("3dgp.py"))
    sys.modules["tdgp"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tdgp"])
tdgp = sys.modules["tdgp"]

# ----------------------------------------------------------------------------------------------------------------------
# The network. Names of parameters are those of the released checkpoints.

class FTB(nn.Module):
    """A convolution, and a residual branch behind it. (B, in, H, W) -> (B, mid, H, W)"""
    def __init__(self, in_channels, mid):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, mid, 3, padding=1)
        self.conv_branch = nn.Sequential(nn.ReLU(), nn.Conv2d(mid, mid, 3, padding=1), nn.BatchNorm2d(mid), nn.ReLU(),
                                         nn.Conv2d(mid, mid, 3, padding=1))

    def forward(self, x):
        x = F.relu(self.conv1(x))   # the reference vectors tell: the branch's first ReLU acts on the sum as well
        return F.relu(x + self.conv_branch(x))

def double(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

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
        self.conv, self.conv1 = FTB(2048, 512), nn.Conv2d(512, 256, 3, padding=1)
        self.ffm2, self.ffm1, self.ffm0 = FFM(1024), FFM(512), FFM(256)
        self.outconv = nn.Module()
        self.outconv.adapt_conv = nn.Sequential(nn.Conv2d(256, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
                                                nn.Conv2d(128, 1, 3, padding=1))

    def forward(self, x1, x2, x3, x4):
        x = double(self.conv1(self.conv(x4)))
        x = self.ffm0(x1, self.ffm1(x2, self.ffm2(x3, x)))
        return double(self.outconv.adapt_conv(x))

class LeReS(nn.Module):
    """Depth up to scale and offset. (B, 3, H, W), by ImageNet's mean and std, sides multiples of 32 -> (B, 1, H, W)"""
    MEAN, STD, SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 448

    def __init__(self, backbone):
        super().__init__()
        self.encoder_modules, self.decoder_modules = nn.Module(), Decoder()
        self.encoder_modules.encoder = timm.create_model({"resnet50": "resnet50", "resnext101": "resnext101_32x8d"}[
            backbone], features_only=True, out_indices=(1, 2, 3, 4))

    def forward(self, x):
        return self.decoder_modules(*self.encoder_modules.encoder(x))

@torch.no_grad()
def estimate_depth(model, images, size=None):
    """Affine-invariant depth, larger is farther, from 0.01 on. images (B, 3, H, W) in [0, 1], any size -> float32
    (B, 1, H, W), or (B, 1, size, size)"""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (model.MEAN, model.STD))
    x = images if images.shape[2:] == (model.SIZE,) * 2 else F.interpolate(
        images, (model.SIZE,) * 2, mode="bilinear", align_corners=False, antialias=True)
    depth = model((x - mean) / std).float()
    depth = depth - depth.amin((1, 2, 3), keepdim=True) + 0.01
    return F.interpolate(depth, (size, size) if size else images.shape[2:], mode="bilinear", align_corners=False)

# ----------------------------------------------------------------------------------------------------------------------
# Weights

URL = "https://huggingface.co/lllyasviel/Annotators/resolve/5bc80eec2b4fddbb/res101.pth"
SHA256 = "1d696b2ef3e8336b057d0c15bc82d2fecef821bfebe5ef9d7671a5ec5dde520b"

def load_leres(path):
    """The network from a checkpoint in the released format: a dict with `depth_model`, names with a prefix `module.`"""
    state = tdgp.load_tensors(path, "--weights")
    state = state.get("depth_model", state) if isinstance(state, dict) else {}
    state = {k.removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}
    deep = any(k.startswith("encoder_modules.encoder.layer3.6.") for k in state)
    model = LeReS("resnext101" if deep else "resnet50")
    own = {k: v.shape for k, v in model.state_dict().items()}
    missing = [k for k in own if getattr(state.get(k), "shape", None) != own[k]]
    unexpected = [k for k in state if k not in own]
    if missing or unexpected:
        said = [f"{len(names)} {what}, the first is {names[0]}" for what, names in (
            ("missing or of another shape", missing), ("unexpected", unexpected)) if names]
        raise tdgp.UserError(f"--weights {path}: not the parameters of LeReS: {'; '.join(said)}")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)

def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def download(url, path, sha256):
    """Fetch a file: goes on where an earlier attempt broke off, checks, and only then gives it its name."""
    part = path.with_name(f"{path.name}.{platform.node()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            done = done if reply.status == 206 else 0
            total = done + int(reply.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name) as bar, \
                    open(part, "ab" if done else "wb") as f:
                for block in iter(lambda: reply.read(1 << 16), b""):
                    f.write(block)
                    bar.update(len(block))
            if total and bar.n < total:
                raise OSError("the connection broke off; what came is kept")
    except OSError as e:   # urllib's errors are among them
        if not (isinstance(e, urllib.error.HTTPError) and e.code == 416):   # 416: it was complete
            raise tdgp.UserError(f"cannot download {url} ({e}); fetch it in another way and name it with --weights FILE"
                                 ) from None
    if file_sha256(part) != sha256:
        part.unlink()
        raise tdgp.UserError(f"{url}: what came is not the expected file (SHA-256); try again, or use --weights FILE")
    os.replace(part, path)

def wait_for(condition):
    """For another process. Without a limit: if that one dies, so does the whole job."""
    while not condition():
        time.sleep(0.2)

def find_weights(given):
    """As given, or from PyTorch's cache, downloaded when they are not there. -> Path"""
    path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / "leres_res101.pth"
    if not given and not path.exists():
        if tdgp.distributed()[2] == 0:
            print(f"LeReS weights, 531 MB, licensed for non-commercial use only: {URL}", file=sys.stderr)
            download(URL, path, SHA256)
        wait_for(path.exists)
    return path

# ----------------------------------------------------------------------------------------------------------------------
# Preparation

@dataclasses.dataclass
class Prepare:
    """Options, after SOURCE and TARGET."""
    source: str
    target: str
    resolution: int = tdgp.opt(256, "side of the images")
    weights: str = tdgp.opt("", "LeReS checkpoint (empty: downloaded once)")
    depth_from: str = tdgp.opt("", "folder of ready maps in LeReS's place: 8 or 16 bit PNG, or .npy; upright, by name")
    invert: bool = tdgp.opt(False, "the ready maps are disparity: take 1 / map")
    keep: float = tdgp.opt(1.0, "share of each class to keep: the most typical images")
    keep_model: str = tdgp.opt("resnet50", "timm model whose features tell what is typical")
    keep_weights: str = tdgp.opt("", "local file with its weights (empty: timm downloads them)")
    batch: int = tdgp.opt(16, "images the network sees at once")
    workers: int = tdgp.opt(os.cpu_count() or 1, "processes that decode and encode")
    device: str = tdgp.opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")
    precision: str = tdgp.opt("tf32", "arithmetic of the network; on CPUs tf32 is fp32", "fp32", "tf32", "bf16")

class Work:
    """The photographs, and what becomes of each. Worker processes have a copy."""

    def __init__(self, cfg, folder):
        try:
            self.data = tdgp.ImageData(tdgp.Config(resolution=cfg.resolution, depth="none"), cfg.source)
            "".join(self.data.names).encode()
        except tdgp.UserError as e:
            raise tdgp.UserError(str(e).removeprefix("--data ")) from None
        except UnicodeEncodeError as e:
            raise tdgp.UserError(f"{cfg.source}: a name is not UTF-8 ({e}); rename the file") from None
        self.cfg, self.folder, self.outputs, used = cfg, folder, [], {"depth"}   # depth.png is the contact sheet
        for name in self.data.names:    # a.jpg -> a.png; a.webp beside it -> a_webp.png; none ends in _depth
            stem, suffix = str(Path(name).with_suffix("")), Path(name).suffix[1:]
            ends = itertools.chain(("", "_" + suffix), (f"_{k}" for k in itertools.count(2)))
            stem = next(stem + end for end in ends if stem + end not in used and not (stem + end).endswith("_depth"))
            used.update((stem, stem + "_depth"))
            self.outputs.append(stem + ".png")

    def paths(self, i):
        """-> where image i and its depth go"""
        path = self.folder / self.outputs[i]
        return path, Path(tdgp.ImageData.depth_name(path))

    def ready_depth(self, name, crop):
        """A ready depth map, cut as its photograph; crop is a box in shares of the sides. -> (R, R)"""
        stem = Path(self.cfg.depth_from) / Path(name).with_suffix("")
        for path in (stem.with_name(stem.name + end) for end in (".npy", ".png", "_depth.png")):
            if path.exists():
                d = np.load(path).squeeze() if path.suffix == ".npy" else tdgp.read_depth(path.read_bytes())
                if d.ndim != 2 or d.size == 0:
                    raise ValueError(f"{path} is no map: its shape is {d.shape}")
                d = PIL.Image.fromarray(d.astype(np.float32))
                d = np.asarray(d.resize((self.cfg.resolution,) * 2, PIL.Image.BILINEAR,
                                        box=[c * side for c, side in zip(crop, d.size * 2)]))
                return 1 / np.maximum(d, 0.01 * d.max()) if self.cfg.invert else d
        raise FileNotFoundError(f"no depth: {stem}.png, {stem.name}_depth.png or {stem.name}.npy")

    def open(self, i):
        with PIL.Image.open(io.BytesIO(self.data.read(self.data.names[i]))) as f:
            return tdgp.to_rgb(f)

    def picture(self, i, image=None):
        """-> photograph i, (R, R, 3) uint8"""
        return np.asarray(tdgp.crop_resize(image or self.open(i), self.cfg.resolution, PIL.Image.LANCZOS))

    def load(self, i):
        """Write the photograph, and its depth if there is a ready map. -> what the network has to see, or None"""
        image = self.open(i)
        if self.cfg.depth_from:
            (w, h), side = image.size, min(image.size)
            crop = [(1 - side / w) / 2, (1 - side / h) / 2, (1 + side / w) / 2, (1 + side / h) / 2]
            self.save(i, self.ready_depth(self.data.names[i], crop))
        self.write(self.paths(i)[0], self.picture(i, image))
        return None if self.cfg.depth_from else np.asarray(tdgp.crop_resize(image, LeReS.SIZE, PIL.Image.BILINEAR))

    def save(self, i, depth):
        """Write depth (R, R): 16 bit, between its extremes."""
        low, high = float(depth.min()), float(depth.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("depth is not finite")
        self.write(self.paths(i)[1], ((depth - low) * (65535 / max(high - low, 1e-12))).round().astype(np.uint16))

    def write(self, path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tdgp.atomic(path) as tmp:
            PIL.Image.fromarray(array).save(tmp, "PNG", compress_level=0)   # 1: a third smaller, 3 times as long

WORK = None   # in worker processes: what they work on

def start_worker(work):
    global WORK
    WORK = work
    tdgp.start_worker(0)   # the main process decides when to stop, and when it is killed so are its workers
    threading.Thread(target=lambda main: (wait_for(lambda: os.getppid() != main), os._exit(1)), args=(os.getppid(),),
                     daemon=True).start()

def in_worker(method, *args):
    """A method's result; or why there is none, a str. Only what stops the whole run, as a full disk, is raised."""
    try:
        return getattr(WORK, method)(*args)
    except tdgp.UserError:
        raise
    except Exception as e:   # decoders of damaged files raise anything
        return re.sub(r"<.* at 0x\w+>", "", " ".join(f"{type(e).__name__}: {e}".split())).strip()

def in_groups(pool, method, groups, ahead=4):
    """For each group of indices what a method makes of it, [(index, result)], with the next ones under way."""
    loading = collections.deque()
    for group in [*groups, *[[]] * ahead]:
        if group:
            loading.append([(i, pool.submit(in_worker, method, i)) for i in group])
        if loading and (len(loading) == ahead or not group):
            yield [(i, f.result()) for i, f in loading.popleft()]

def select(work, groups, pool, teacher, device):
    """The share `keep` of each class that is likeliest under a Gaussian of its features (instance selection, DeVries et
    al. 2020). The covariance goes a tenth of the way to a sphere, since a class may have few images. -> indices, those
    of unreadable images among them"""
    features, readable = [], []
    for loaded in in_groups(pool, "picture", tqdm(groups, desc="selecting", unit="batch")):
        good = [(i, x) for i, x in loaded if not isinstance(x, str)]
        if good:
            images = torch.from_numpy(np.stack([x for _, x in good])).to(device).permute(0, 3, 1, 2)
            features.append(teacher(images / 127.5 - 1).float().cpu())
            readable += [i for i, _ in good]
    kept = sorted({i for group in groups for i in group} - set(readable))   # the next step says why they are left out
    features, readable = torch.cat([*features, torch.zeros(0, teacher.dim)]), np.array(readable, int)
    labels = work.data.labels[readable] if work.data.num_classes else np.zeros(len(readable), int)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        x = features[own].double()
        x = x - x.mean(0)
        cov = x.t() @ x / max(len(own) - 1, 1)
        cov = 0.9 * cov + (0.1 * cov.diagonal().mean() + 1e-9) * torch.eye(len(cov), dtype=cov.dtype)
        unlikely = (x * torch.linalg.solve(cov, x.t()).t()).sum(1)
        kept += readable[own[unlikely.argsort(stable=True)[:math.ceil(work.cfg.keep * len(own))].numpy()]].tolist()
    return sorted(kept)

def claim(work, weights, rank):
    """Make the folder, or go on in it if it was begun in the same way: another source or size must not get mixed in."""
    recipe = {k: v for k, v in dataclasses.asdict(work.cfg).items() if k not in ("target", "workers", "device")}
    recipe.update(source=str(Path(work.cfg.source).resolve()), weights=file_sha256(weights) if weights else "",
                  depth_from=str(Path(work.cfg.depth_from).resolve()) if work.cfg.depth_from else "")
    note = work.folder / "prepared.json"
    if rank == 0 and not note.exists():
        work.folder.mkdir(parents=True, exist_ok=True)
        if {p.name for p in work.folder.iterdir()} - {"skipped.txt"}:   # that of an attempt in which nothing was usable
            raise tdgp.UserError(f"{work.folder}: has files that are not of this program; name another target")
        with tdgp.atomic(note) as tmp:
            tmp.write_text(json.dumps(recipe, indent=1))
    wait_for(note.exists)
    try:
        before = dict(json.loads(note.read_text()))
    except (ValueError, TypeError):
        raise tdgp.UserError(f"{note}: is not of this program; name another target") from None
    differing = [k for k, v in recipe.items() if before.get(k, v) != v]
    if differing:
        raise tdgp.UserError(f"{work.folder}: was begun with another {', '.join(differing)}; delete it or name another")

def prepare(cfg):
    """The share of this process; process 0 also finishes the whole."""
    (rank, world, local_rank), target, zipped = tdgp.distributed(), Path(cfg.target), cfg.target.endswith(".zip")
    device, folder = tdgp.choose_device(cfg, local_rank), target.with_suffix(".unfinished") if zipped else target
    if (target if zipped else target / "dataset.json").exists():
        if zipped and (folder / "prepared.json").exists():
            shutil.rmtree(folder, ignore_errors=True)   # of a run that was killed in its last moment
        if rank > 0:
            return
        raise tdgp.UserError(f"{target}: is there already; delete it to make it anew")
    part = folder / f".part-{rank}-of-{world}"
    for p in folder.glob(".part-*") if rank == 0 else [part]:   # marks of an earlier run: process 0 would trust them
        p.unlink(missing_ok=True)
    work = Work(cfg, folder)
    weights = None if cfg.depth_from else find_weights(cfg.weights)
    model = load_leres(weights).to(device) if weights else None
    try:
        teacher = tdgp.Teacher(cfg.keep_model, cfg.keep_weights).to(device) if cfg.keep < 1 and rank == 0 else None
    except tdgp.UserError as e:
        raise tdgp.UserError(str(e).replace("--teacher-weights", "--keep-weights").replace("--teacher", "--keep-model")
                             ) from None
    claim(work, weights, rank)
    split = lambda indices: [indices[first:first + cfg.batch] for first in range(0, len(indices), cfg.batch)]
    indices, network, start = list(range(len(work.data))), 0.0, time.time()
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with concurrent.futures.ProcessPoolExecutor(cfg.workers, context, start_worker, (work,)) as pool:
        if cfg.keep < 1:
            kept = folder / "kept.txt"
            if rank == 0 and not kept.exists():
                chosen = select(work, split(indices), pool, teacher, device)
                with tdgp.atomic(kept) as tmp:
                    tmp.write_text("".join(f"{work.data.names[i]}\n" for i in chosen))
            wait_for(kept.exists)
            names = set(kept.read_text().split("\n"))
            indices = [i for i in indices if work.data.names[i] in names]
        # the network sees fixed groups of photographs, so that the result does not depend on what was there already
        groups = [g for g in split(indices)[rank::world] if not all(p.exists() for i in g for p in work.paths(i))]
        skipped, saving = {}, collections.deque()
        with tqdm(total=sum(map(len, groups)), unit="img", disable=rank > 0, desc="preparing") as bar:
            for number, loaded in enumerate(in_groups(pool, "load", groups), 1):
                skipped.update({work.data.names[i]: x for i, x in loaded if isinstance(x, str)})
                seen = [(i, x) for i, x in loaded if isinstance(x, np.ndarray)]
                bar.update(len(loaded) - len(seen))
                if seen:
                    began = time.time()
                    x = torch.from_numpy(np.stack([x for _, x in seen])).to(device).permute(0, 3, 1, 2).float() / 255
                    with tdgp.autocast(cfg, device):
                        depths = estimate_depth(model, x, cfg.resolution)[:, 0].cpu().numpy()
                    network += time.time() - began
                    saving += [(i, pool.submit(in_worker, "save", i, d)) for (i, _), d in zip(seen, depths)]
                while len(saving) > (4 * cfg.batch if number < len(groups) else 0):   # writing may lag a little
                    i, f = saving.popleft()
                    skipped.update({work.data.names[i]: f.result()} if f.result() else {})
                    bar.update()
    while not part.exists():
        with tdgp.atomic(part) as tmp:
            tmp.write_text(json.dumps(skipped))
        if rank > 0:   # process 0 may start late, and remove it then
            wait_for(lambda: (target if zipped else target / "dataset.json").exists() or not part.exists())
        if (target if zipped else target / "dataset.json").exists():
            return
    if rank == 0:
        n = finish(work, indices, [folder / f".part-{r}-of-{world}" for r in range(world)], target, zipped)
        print(f"{target}: {n:,} images; {time.time() - start:.0f} s ({network:.0f} s of it for the network)")

def finish(work, indices, parts, target, zipped):
    """Wait for all; then skipped.txt, contact sheet, dataset.json and, if wanted, the zip. -> number of images"""
    beside = (lambda name: target.with_suffix("." + name)) if zipped else (lambda name: target / name)
    wait_for(lambda: all(p.exists() for p in parts))
    skipped = {k: v for p in parts for k, v in json.loads(p.read_text()).items()}
    indices = [i for i in indices if work.data.names[i] not in skipped]
    wait_for(lambda: all(p.exists() for i in indices for p in work.paths(i)))
    alone = (p for i, name in enumerate(work.data.names) if name in skipped for p in work.paths(i))
    for p in [*work.folder.rglob(".*.tmp"), *alone]:      # and what killed runs left
        p.unlink(missing_ok=True)
    with tdgp.atomic(beside("skipped.txt")) as tmp:
        tmp.write_text("".join(f"{name}\t{skipped[name]}\n" for name in sorted(skipped)))
    if not indices:
        (work.folder / "prepared.json").unlink()   # the next attempt may be another
        raise tdgp.UserError(f"{work.cfg.source}: not one image of it could be used; {beside('skipped.txt')} says why")
    labels, cells = work.data.labels[indices] if work.data.num_classes else work.data.labels, []
    for k in tdgp.grid_indices(labels, min(32, len(indices))):
        image, depth = (np.asarray(PIL.Image.open(p)) for p in work.paths(indices[k]))
        cells.append(np.concatenate([image, (depth // 257).astype(np.uint8)[..., None].repeat(3, 2)]))
    tdgp.write_image(tdgp.tile(cells, min(8, len(cells))), beside("depth.png"))
    listed = [[work.outputs[i], int(label)] for i, label in zip(indices, labels)] if len(labels) else None
    with tdgp.atomic(work.folder / "dataset.json") as tmp:
        tmp.write_text(json.dumps(dict(labels=listed)))
    for p in work.folder.glob(".part-*"):   # now the others may go
        p.unlink()
    if work.cfg.keep < 1:
        with tdgp.atomic(beside("kept.txt")) as tmp:
            tmp.write_text("".join(f"{work.data.names[i]}\n" for i in indices))
    if zipped:
        with tdgp.atomic(target) as tmp, zipfile.ZipFile(tmp, "w") as z:
            for path in [work.folder / "dataset.json", *(p for i in indices for p in work.paths(i))]:
                z.writestr(zipfile.ZipInfo(path.relative_to(work.folder).as_posix()), path.read_bytes())   # no date
        shutil.rmtree(work.folder)
    if skipped:
        print(f"{len(skipped)} images were left out; {beside('skipped.txt')} says why", file=sys.stderr)
    return len(indices)

def prepare_for_training(cfg, source, root):
    """What 3dgp.py does with photographs alone: prepare them once, all processes together. -> folder"""
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    target = root / f"{source.resolve().stem}-{cfg.resolution}-{place}"
    if tdgp.distributed()[0] == 0:
        print(f"{source}: photographs without depth; prepared, once, in {target}", flush=True)
    if not (target / "dataset.json").exists():
        try:
            prepare(Prepare(str(source), str(target), cfg.resolution, cfg.depth_weights, device=cfg.device))
        except tdgp.UserError as e:
            e = str(e).replace("--weights", "--depth-weights")
            raise tdgp.UserError(f"{e}; or train on RGB alone: --depth none") from None
        wait_for((target / "dataset.json").exists)
    return target

def main(argv=None):
    try:
        parser = tdgp.Parser(prog="lereS_depth.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                             description="Photographs to training data with depth, as the head of this file says.")
        parser.add_argument("source", help="folder or zip of photographs")
        parser.add_argument("target", help="folder, or a name that ends in .zip, for the result")
        tdgp.add_options(parser, Prepare)
        cfg = Prepare(**vars(parser.parse_args(argv)))
        for name in ("resolution", "batch", "workers"):
            if getattr(cfg, name) < 1:
                raise tdgp.UserError(f"--{name} {getattr(cfg, name)}: must be positive")
        if not 0 < cfg.keep <= 1:
            raise tdgp.UserError(f"--keep {cfg.keep}: must be above 0 and at most 1")
        if cfg.invert and not cfg.depth_from:
            raise tdgp.UserError("--invert: is for ready maps; give --depth-from too")
        if cfg.depth_from and not Path(cfg.depth_from).is_dir():
            raise tdgp.UserError(f"--depth-from {cfg.depth_from}: no such folder")
        prepare(cfg)
    except (tdgp.UserError, OSError, concurrent.futures.BrokenExecutor) as e:
        print(f"lereS_depth.py: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
