"""Measures a trained generator: distances between its samples and the data, and how flat its geometry is.

    python tools/evaluate.py --resume runs/shapes --detector area8
    python tools/evaluate.py --resume runs/photos --metrics fid2k,kid2k --detector timm:resnet50
    python tools/evaluate.py --resume runs/imagenet --metrics fid50k,is50k,kid50k,pr50k,nfs256
    torchrun --nproc_per_node=8 tools/evaluate.py --resume runs/imagenet --metrics fid50k,nfs256

The numbers are printed and appended to metrics.jsonl beside the checkpoint (hf: in owner--name); any number
of processes gives the same ones. On `shapes` cameras and depth are compared with the truth, and a network
names the solids it sees. Shapes in comments: N reals, M fakes, F features, R resolution."""

import dataclasses
import importlib
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
tdgp = importlib.import_module("3dgp")
load = importlib.import_module("load")


@dataclasses.dataclass
class EvaluateOptions:
    """The command line."""

    resume: str = tdgp.opt("", "checkpoint, folder of a run or of publish.py, or hf:owner/name[@revision]")
    data: str = tdgp.opt("", "data to compare with (empty: what it was trained on)")
    metrics: str = tdgp.opt("fid50k,nfs256", "of fid, kid, is, pr, nfs, each with a number of images")
    detector: str = tdgp.opt("inception", "inception (downloaded), its file, timm:NAME[:WEIGHTS], or area8")
    reals: int = tdgp.opt(0, "images of the data that samples are compared with (0: all)")
    device: str = tdgp.opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")


# ---- Metrics that training does not follow -----------------------------------------------------------------
def kernel_distance(a, b, subsets=100, size=1000):
    """KID (Binkowski et al. 2018) of features (N, F) and (M, F): the unbiased squared MMD with the kernel
    (x.y / F + 1)³, as the mean over random subsets, of `size` rows each if there are so many. -> float"""
    random = torch.Generator().manual_seed(0)
    n = min(size, len(a), len(b))

    def kernel(x, y):
        return (x @ y.t() / x.shape[1] + 1) ** 3  # (n, n)

    total = 0.0
    for _ in range(subsets):
        # Drawn on the CPU, so that all devices take the same rows.
        x, y = (features[torch.randperm(len(features), generator=random)[:n]].double() for features in (a, b))

        # The mean over pairs within a set leaves out each row's pair with itself: that makes it unbiased.
        xx = kernel(x, x)
        yy = kernel(y, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
        total += float(within - 2 * kernel(x, y).mean())
    return total / subsets


def inception_score(p, splits=10):
    """exp of the mean divergence of class probabilities p (N, K) from their mean; averaged over splits."""
    parts = p.double().clamp(min=1e-16).tensor_split(min(splits, len(p)))
    divergences = [(x * (x.log() - x.mean(0).log())).sum(1).mean() for x in parts]
    return float(sum(x.exp() for x in divergences) / len(parts))


def precision_recall(real, fake, k=3):
    """Precision: the share of fakes (M, F) that are as near to one of the reals (N, F) as that one's k-th
    neighbour among the reals. Recall: the same with both exchanged (Kynkaanniemi et al. 2019).
    -> two floats in [0, 1]"""
    return share_covered(fake, real, k), share_covered(real, fake, k)


def share_covered(x, by, k, part=1000):
    """Share of the rows of x (n, F) that lie in the ball of a row of `by` (m, F), which reaches to the k-th
    neighbour of that row in `by`. `part` rows at a time, which bounds memory. -> float in [0, 1]"""
    radius = [torch.cdist(rows, by).kthvalue(k + 1).values for rows in by.split(part)]
    radius = torch.cat(radius)  # (m,); k + 1, since the nearest row of all is the row itself
    covered = [(torch.cdist(rows, by) <= radius).any(1) for rows in x.split(part)]
    return float(torch.cat(covered).double().mean())


@torch.no_grad()
def measure(G, data, labels, metrics, detector, reals):
    """Metrics of G, in evaluation mode, against the data. -> {name: number}, in the order of the metrics
    labels (N,): the data's classes, on G's device; metrics: what parse_metrics returns; detector: None if all
    are nfs; reals: how many images of the data count (0: all)."""
    # What several metrics share is computed once, for the one that takes most of it.
    count_flat = largest(metrics, "nfs")
    count_fake = largest(metrics, "fid", "kid", "is", "pr")
    count_rows = largest(metrics, "kid", "pr")
    count_real = min(len(data) * (1 + G.cfg.mirror), reals or math.inf)
    if count_real < 4 and largest(metrics, "fid", "kid", "pr"):
        raise tdgp.UserError(f"--metrics: fid, kid and pr need 4 images of the data, there are {count_real}")
    fake, flat = tdgp.measure_samples(G, labels, detector, count_fake, count_flat)
    if largest(metrics, "fid"):
        mean, cov = tdgp.running_gaussian(tdgp.real_parts(G.cfg, data, detector, labels.device, reals))
    if count_rows:
        count_rows = min(count_rows, reals or count_rows)
        real = tdgp.gather(tdgp.real_parts(G.cfg, data, detector, labels.device, count_rows))  # (N, F)

    found = {}
    label = detector.label if detector else ""
    width = slice(detector.width if detector else None)
    for kind, count, n in metrics:
        name = f"{kind}{count}" + (label if kind != "nfs" else "")
        if kind == "fid":
            gaussian = tdgp.gaussian(fake[:n, width])
            found[name] = tdgp.frechet_distance((mean[width], cov[width, width]), gaussian)
        elif kind == "kid":
            found[name] = kernel_distance(real[:n, width], fake[:n, width])
        elif kind == "is":
            found[name] = inception_score(fake[:n, detector.width :])
        elif kind == "pr":
            names = f"precision{count}{label}", f"recall{count}{label}"
            found.update(zip(names, precision_recall(real[:n, width], fake[:n, width]), strict=True))
        else:
            found[name] = float(flat[:n].mean())
    return found


def largest(metrics, *kinds):
    """The largest number of images that a metric of these kinds asks for; 0 if there is none."""
    return max((n for kind, _, n in metrics if kind in kinds), default=0)


# ---- Where the truth is known ------------------------------------------------------------------------------
@torch.no_grad()
def evaluate_truth(G, data, labels, n=512):
    """G, in evaluation mode, against the truth of `shapes`, by n samples and the first n images.
    -> {name: number or list}: what compare_cameras, compare_depth and name_solids return"""
    z, c, prior = tdgp.draw_latents(G.cfg, n, labels, "evaluate_truth")
    posterior = G.pose(prior, z, c)
    batch = torch.utils.data.default_collate([data[i] for i in range(n)])
    cameras = compare_cameras(prior, posterior, batch["camera"].to(z.device))
    real = tdgp.real_images(batch, z.device)  # (n, 3 or 4, R, R)
    image, depth = render_samples(G, z, c, posterior)
    compared = compare_depth(G.depth_adaptor, image, depth, real, batch["true_depth"].to(z.device))
    found = {**cameras, **compared, **name_solids(G.cfg, image, depth, c)}
    if G.cfg.dims == 2:  # such pictures have neither a camera nor depth
        found = {name: value for name, value in found.items() if "gray" in name}
    return found


def compare_cameras(prior, posterior, true):
    """Prior and posterior Camera of n, true parameters (n, 6) -> {name: list of 6}
    camera_w1: Wasserstein-1 distance to the true ones, each parameter by itself, in radians or degrees; yaw
    and pitch less their means, which are no property of the data: a scene can turn instead."""
    found = {}
    for name, camera in (("posterior", posterior), ("prior", prior)):
        both = torch.stack([tdgp.camera_parameters(camera), true])  # (2, n, 6)
        both[..., :2] -= both[..., :2].mean(1, keepdim=True)
        a, b = both.sort(1).values
        found[f"camera_w1_{name}"] = (a - b).abs().mean(0).tolist()
    return found


def render_samples(G, z, c, camera, part=16):
    """`part` samples at a time, which bounds memory. -> rgb (n, 3, R, R), depth (n, 1, R, R)"""
    parts = []
    for i in torch.arange(len(z)).split(part):
        planes = G.backbone(G.mapping(z[i], c[i]))
        parts.append(G.render(planes, tdgp.rows(camera, i), G.cfg.resolution))
    image, depth = zip(*parts, strict=True)
    return torch.cat(image), torch.cat(depth)


def compare_depth(adaptor, image, depth, real, true_depth):
    """Rendered rgb (n, 3, R, R) and depth (n, 1, R, R), real images (n, 3 or 4, R, R), their true depth
    -> {name: number}
    depth_error_render: mean absolute difference, in world units, of rendered depth and the true depth of the
    image of most similar colours; depth_error_data: the same of two images of the data.
    depth_error_raw, _adapted: of true depth, as is and adapted, and estimated depth, by pixel.
    depth_fd_raw, _adapted: Frechet distance of rendered depth, as is and adapted, and estimated depth."""
    colors = tdgp.area8(image)  # (n, 192)
    real_colors = tdgp.area8(real[:, :3])  # (n, 192)
    nearest = torch.cdist(colors, real_colors).argmin(1)
    nearest_other = torch.cdist(real_colors, real_colors).fill_diagonal_(math.inf).argmin(1)
    found = {
        "depth_error_render": float((depth - true_depth[nearest]).abs().mean()),
        "depth_error_data": float((true_depth - true_depth[nearest_other]).abs().mean()),
    }
    if adaptor is None:
        return found

    estimated = real[:, 3:]  # (n, 1, R, R)
    estimated_gaussian = tdgp.gaussian(tdgp.area8(estimated))
    for name, level in (("raw", 0), ("adapted", adaptor.level)):
        found[f"depth_error_{name}"] = float((adaptor.adapt(true_depth, level) - estimated).abs().mean())
        rendered_gaussian = tdgp.gaussian(tdgp.area8(adaptor.adapt(depth, level)))
        found[f"depth_fd_{name}"] = tdgp.frechet_distance(estimated_gaussian, rendered_gaussian)
    return found


# ---- What people see ---------------------------------------------------------------------------------------
# Can one tell what a sample is? A small network learns the names of the solids of `shapes` from the data, and
# then names those of samples: once by depth alone, once by a gray picture alone.

NAMER_IMAGES = 4096  # it learns from so many images
NAMER_SIZE = 32  # pixels; larger pictures are averaged


def name_solids(cfg, image, depth, c):
    """Samples: rgb (n, 3, R, R), rendered depth (n, 1, R, R), the classes asked for (n,) -> {name: value}
    named_depth, named_gray: share of samples whose solid is named as what it should be (1 / 8 by chance);
    with a solid's name: of its class; with _data: of images of the data that were not learned from."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: any number of processes trains the same network
    data = tdgp.ShapesData(dataclasses.replace(cfg, resolution=NAMER_SIZE))
    batch = torch.utils.data.default_collate([data[i] for i in range(NAMER_IMAGES + 512)])
    real = namer_inputs(tdgp.real_images(batch, c.device)[:, :3], batch["true_depth"].to(c.device))
    samples = namer_inputs(image, depth)
    labels = batch["label"].to(c.device)  # (N,)

    found = {}
    for kind in ("depth", "gray"):
        learned, held_out = real[kind].tensor_split([NAMER_IMAGES])
        namer = train_namer(learned, labels[:NAMER_IMAGES], data.num_classes)
        right = namer(samples[kind]).argmax(1) == c  # (n,)
        right_data = namer(held_out).argmax(1) == labels[NAMER_IMAGES:]  # (512,)
        found[f"named_{kind}"] = float(right.double().mean())
        found[f"named_{kind}_data"] = float(right_data.double().mean())
        for k, solid in enumerate(tdgp.SOLIDS):
            found[f"named_{kind}_{solid}"] = float(right[c == k].double().mean())
    torch.set_num_threads(threads)
    return found


def namer_inputs(rgb, depth):
    """rgb (B, 3, R, R), depth (B, 1, R, R) -> {"gray": (B, 1, 32, 32), "depth": the same}, 0 to 1 from their
    2% to their 98%. Gray is the largest channel: the hue, which is the class's, does not show in it."""
    inputs = {}
    for kind, x in (("gray", rgb.amax(1, keepdim=True)), ("depth", depth)):
        x = F.adaptive_avg_pool2d(x, NAMER_SIZE).flatten(1)  # (B, 1024)
        low, high = x.quantile(x.new_tensor([0.02, 0.98]), dim=1)[..., None]  # (B, 1)
        x = (x - low) / (high - low).clamp(min=1e-6)
        inputs[kind] = x.clamp(0, 1).view(-1, 1, NAMER_SIZE, NAMER_SIZE)
    return inputs


@torch.enable_grad()
def train_namer(x, labels, num_classes):
    """Learns to tell the classes (N,) of gray pictures (N, 1, 32, 32), sharp and soft, clean and noisy.
    -> a network, pictures -> (B, num_classes)"""
    tdgp.seed_draws(0, -1, "namer", 0)
    layers = []
    for before, after in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    namer = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, num_classes)).to(x.device)

    opt = torch.optim.Adam(namer.parameters(), 2e-3)
    for i in torch.cat([torch.randperm(len(x)) for _ in range(8)]).split(64):  # each image 8 times
        # Samples are softer than data, and noisy: what a person would still name is to be named.
        strength = torch.rand(2, len(i), 1, 1, 1, device=x.device)
        soft = x[i].lerp(tdgp.blur(x[i], 1.5), strength[0])
        noisy = soft + 0.1 * strength[1] * torch.randn_like(soft)
        loss = F.cross_entropy(namer(noisy), labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return namer.eval().requires_grad_(False)


# ---- Command line ------------------------------------------------------------------------------------------
class Detector(tdgp.Detector):
    """Of features there are `width`; behind them are class probabilities, if `classes` are wanted."""

    def __init__(self, name, device, classes):
        self.classes = classes
        super().__init__(name, device)
        self.width = super().__call__(torch.zeros(1, 4, 64, 64, device=device)).shape[1]

    def __call__(self, image):
        parts = [super().__call__(image)]
        if self.classes:
            parts.append(super().__call__(image, "no_output_bias"))
        return torch.cat(parts, 1)


class TimmDetector:
    """The same of a timm model."""

    def __init__(self, name, device, classes):
        self.classes = classes
        name, weights = re.fullmatch(r"timm:((?:hf-hub:|local-dir:)?[^:]*):?(.*)", name).groups()
        self.label = f"[{name}]"  # what stands behind the names of metrics
        self.net = tdgp.Teacher(name, weights).to(device)
        self.width = self.net.dim

    def __call__(self, image):
        parts = [self.net(image[:, :3].clamp(-1, 1))]
        if self.classes:
            parts.append(self.net.model.get_classifier()(parts[0]).softmax(1))
        return torch.cat(parts, 1)


def open_detector(name, device, kinds):
    """name: as --detector. -> a detector, or None where no metric of the kinds needs one"""
    if not kinds:
        raise tdgp.UserError("--metrics is empty: name what to measure, as in fid50k,nfs256")
    if set(kinds) == {"nfs"}:
        return None
    if name == "area8" and "is" in kinds:
        raise tdgp.UserError("--metrics: area8 has no class probabilities for is; take another --detector")
    return (TimmDetector if name.startswith("timm:") else Detector)(name, device, "is" in kinds)


def evaluate_checkpoint(given):
    """Measures a checkpoint over all processes; the first one prints and writes. given: options, a dict"""
    options = EvaluateOptions(**given)
    metrics = tdgp.parse_metrics(options.metrics, ("fid", "kid", "is", "pr", "nfs"))
    G, path, kimg = load.open_generator(options.resume, options.device)
    G.cfg = dataclasses.replace(G.cfg, data=options.data or G.cfg.data)
    if not G.cfg.data:
        raise tdgp.UserError("--data: name the images to compare with; a published model has none")
    device = next(G.parameters()).device
    detector = open_detector(options.detector, device, [kind for kind, _, _ in metrics])
    data = tdgp.open_data(G.cfg)
    if G.cfg.num_classes != data.num_classes:
        classes = f"{data.num_classes} classes, the checkpoint {G.cfg.num_classes}"
        raise tdgp.UserError(f"--data {G.cfg.data}: has {classes}")
    tdgp.join_processes(device)

    labels = torch.from_numpy(data.labels).to(device)
    found = measure(G, data, labels, metrics, detector, options.reals)
    if isinstance(data, tdgp.ShapesData):
        found.update(evaluate_truth(G, data, labels))
    if tdgp.RANK > 0:
        return

    # First to the terminal: the numbers may have taken hours, and the folder may be another person's.
    for name, value in found.items():
        values = value if isinstance(value, list) else [value]  # of a camera: its six parameters
        print(f"{kimg:g} kimg: {name}", *(f"{x:.4g}" for x in values))
    entry = {"kimg": kimg, "data": G.cfg.data, "reals": options.reals, **found}
    path.parent.mkdir(exist_ok=True)  # there is none yet for a model of the Hub
    tdgp.append_line(path.with_name("metrics.jsonl"), entry)


def main(argv=None):
    """-> exit status. argv: the command line (None: the program's own)"""
    texts = EvaluateOptions, "evaluate.py", "Metrics of a checkpoint.", argv
    return tdgp.run_program("evaluate.py", lambda: evaluate_checkpoint(tdgp.parse_options(*texts)))


if __name__ == "__main__":
    sys.exit(main())
