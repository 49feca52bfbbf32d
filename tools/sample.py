"""Makes pictures, animations, meshes, point clouds, depth, and scenes that a person can turn.

    python tools/sample.py --resume runs/shapes                    # a grid: classes down, seeds across
    python tools/sample.py --resume runs/imagenet --classes 1,5,10-20 --seeds 0-15 --truncation 0.7
    python tools/sample.py --resume runs/shapes --video orbit      # or --interpolate, from sample to sample
    python tools/sample.py --resume runs/shapes --seeds 0 --turntable       # a page on which scenes turn
    python tools/sample.py --resume runs/shapes --classes 0 --seeds 1 --mesh --points --depth --cameras

It needs a checkpoint alone, or what publish.py wrote. turntable.py and mesh.py beside it are parts of it. The
letters in comments on shapes are those of 3dgp.py."""

import dataclasses
import importlib
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
tdgp = importlib.import_module("3dgp")
load = importlib.import_module("load")
mesh = importlib.import_module("mesh")
turntable = importlib.import_module("turntable")
opt = tdgp.opt


@dataclasses.dataclass
class SampleOptions:
    """The command line. There is one sample for each of the classes and seeds."""

    resume: str = opt("", "checkpoint, folder of a run or of publish.py, or hf:owner/name[@revision]")
    out: str = opt("", "folder (empty: samples-<kimg> beside the checkpoint; of hf: in owner--name)")
    classes: str = opt("", "which classes, as in 1,5,10-20 (empty: the first 8)")
    seeds: str = opt("0-3", "which seeds, likewise; a seed is a z and a draw of the camera")
    truncation: float = opt(1.0, "draws w to the mean w of its class: 1 leaves it, 0 is that mean")
    resolution: int = opt(0, "side of the pictures (0: as trained)")
    each: bool = opt(False, "one picture or animation of each sample, not one of all")
    video: str = opt("none", "animation from the mean camera on", "none", "orbit", "wiggle", "line", "zoom")
    interpolate: bool = opt(False, "animation that walks from each sample to the next and back to the first")
    frames: int = opt(64, "frames of an animation (of each step of a walk)")
    fps: float = opt(25.0, "frames per second")
    angle: float = opt(0.4, "how far an animation or turntable turns to each side, in radians")
    turntable: bool = opt(False, "one HTML page on which a person turns the samples, without a network")
    views: str = opt("15x5", "yaws x pitches that are rendered for it, around the camera of each sample")
    mesh: bool = opt(False, "coloured triangle mesh of the densities (PLY, GLB); needs scikit-image")
    mesh_resolution: int = opt(192, "points on a side of the grid for the mesh")
    mesh_level: float = opt(10.0, "density at the mesh's surface, per world unit")
    points: bool = opt(False, "coloured point cloud of the rendered depth (PLY)")
    depth: bool = opt(False, "16-bit PNGs of depth: rendered (0 near, 65535 far), and adapted")
    cameras: bool = opt(False, "figure of the learned camera distribution beside the prior")
    device: str = opt("auto", "auto takes the GPU if there is one", "auto", "cuda", "cpu")


def parse_numbers(text, flag, below):
    """ "1,5,10-20" -> [1, 5, 10, ..., 20]. UserError, which names the flag, for anything else."""
    numbers = []
    for part in text.split(","):
        span = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part)
        if not span or not int(span[1]) <= int(span[2] or span[1]) < below:
            raise tdgp.UserError(f"{flag} {text}: must be numbers below {below:,}, as in 1,5,10-20")
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    return numbers


@dataclasses.dataclass
class Sample:
    """What one seed makes of one class."""

    name: str  # what its files begin with
    title: str  # what a person reads
    w: torch.Tensor  # (1, w_dim), truncated
    planes: torch.Tensor  # (1, 3, C, T, T)
    camera: tdgp.Camera  # of 1; the picture is taken by it
    mean_camera: tdgp.Camera  # of 1, the mean of the class; animations start from it
    rgb: torch.Tensor  # (1, 3, H, W)
    depth: torch.Tensor  # (1, 1, H, W) in world units


def draw_samples(G, classes, seeds, options):
    """Yields a Sample for each seed of each class, one at a time: the planes of all would fill the memory."""
    device = next(G.parameters()).device
    for label in classes:
        c = torch.tensor([label], device=device)
        tdgp.seed_draws(G.cfg.seed, -1, "mean w", 0)
        many = torch.randn(4096, G.cfg.z_dim).to(device)
        mean_w = G.mapping(many, c.expand(4096)).mean(0, keepdim=True)
        prior = tdgp.sample_camera_prior(G.cfg, 64, device)
        posterior = G.pose(prior, many[:64], c.expand(64))
        mean_camera = posterior._make(x.mean(0, keepdim=True) for x in posterior)

        for seed in seeds:
            # A seed's draws do not depend on the class. Made on the CPU, they are the same on all devices.
            tdgp.seed_draws(seed, -1, "sample", 0)
            z, _, prior = tdgp.draw_latents(G.cfg, 1, torch.tensor([0]))
            z = z.to(device)
            prior = prior._make(x.to(device) for x in prior)

            w = mean_w.lerp(G.mapping(z, c), options.truncation)
            camera = G.pose(prior, z, c)
            planes = G.backbone(w)
            rgb, depth = G.render(planes, camera, options.resolution)
            name = f"class{label:04d}-seed{seed:04d}"
            title = f"class {label}, seed {seed}"
            yield Sample(name, title, w, planes, camera, mean_camera, rgb, depth)


def camera_path(kind, start, n, angle):
    """n cameras of a closed path from `start` (Camera of 1 or n) on, `angle` radians to each side at most."""
    t = torch.arange(n, device=start.yaw.device) * (2 * math.pi / n)
    up = (1 - t.cos()) / 2  # from 0 to 1 and back
    yaw = pitch = torch.zeros_like(t)
    fov = torch.ones_like(t)

    if kind == "orbit":  # an ellipse in front, over the top
        yaw = t.sin()
        pitch = -up
    elif kind == "wiggle":
        yaw = t.sin() / 2
        pitch = (2 * t).sin() / 4
    elif kind == "line":  # sideways, at constant speed
        yaw = t.sin().asin() * 2 / math.pi
    elif kind == "zoom":
        fov = 1 - up / 2

    pitch = (start.pitch + angle * pitch).clamp(0.05, math.pi - 0.05)
    moved = start._replace(yaw=start.yaw + angle * yaw, pitch=pitch, fov=start.fov * fov)
    return moved._make(x.expand(n) for x in moved)


def write_walk(G, stops, path, options):
    """Animation from sample to sample and back to the first.
    stops (n, w_dim + 6): their w, and the parameters of the mean cameras of their classes"""
    t = torch.arange(options.frames, device=stops.device) * (math.pi / options.frames)
    shares = (1 - t.cos()) / 2  # of a step; slow at the stops
    way = stops[:, None].lerp(stops.roll(-1, 0)[:, None], shares[:, None])  # (n, frames, w_dim + 6)

    ws, parameters = way.flatten(0, 1).split([G.cfg.w_dim, 6], 1)  # (n frames, w_dim), (n frames, 6)
    cameras = camera_path(options.video, tdgp.make_camera(parameters), len(ws), options.angle)
    film = []
    for i, w in enumerate(tqdm(ws.split(1), "walk", unit="frame")):
        film += tdgp.render_views(G, G.backbone(w), tdgp.rows(cameras, [i]), options.resolution, dim=2)
    write_animation([film], 1, path, options.fps)


def write_animation(films, columns, path, fps):
    """Films, lists of as many frames, so many in a row -> path.webp, path.gif and, with ffmpeg, path.mp4"""
    first, *rest = frames = [tdgp.tile(cells, columns) for cells in zip(*films, strict=True)]
    for kind in ("webp", "gif"):
        with tdgp.atomic(f"{path}.{kind}") as tmp:
            first.save(tmp, kind, save_all=True, append_images=rest, duration=1000 / fps, loop=0, quality=90)

    if shutil.which("ffmpeg"):
        source = f"-f rawvideo -pix_fmt rgb24 -s {first.width}x{first.height} -r {fps} -i -"
        even = "pad=ceil(iw/2)*2:ceil(ih/2)*2"  # its sides must be
        command = f"ffmpeg -y -v error {source} -vf {even} -pix_fmt yuv420p -f mp4"
        raw = b"".join(map(Image.Image.tobytes, frames))
        with tdgp.atomic(f"{path}.mp4") as tmp:
            done = subprocess.run([*command.split(), tmp], input=raw, capture_output=True)
            if done.returncode:
                raise ValueError(f"ffmpeg: {done.stderr.decode(errors='replace')}")


def write_depth(depth, path):
    """depth (1, 1, H, W) in [0, 1] -> a 16-bit PNG"""
    levels = (depth[0, 0].clamp(0, 1) * 65535).round()
    tdgp.write_image(Image.fromarray(levels.cpu().numpy().astype(np.uint16)), path)


def write_cameras(G, path, n=16384):
    """Histograms of each camera parameter over all classes, of 48 bars: prior gray, posterior blue."""
    labels = torch.arange(max(G.cfg.num_classes, 1), device=next(G.parameters()).device)
    z, c, prior = tdgp.draw_latents(G.cfg, n, labels, "cameras")
    series = (("prior", prior, "#aaaaaa", 5), ("learned", G.pose(prior, z, c), "#2563eb", 3))
    ranges = tdgp.camera_ranges(G.cfg).tolist()

    image = Image.new("RGB", (960, 480), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for i, (name, (low, high)) in enumerate(zip(tdgp.Camera._fields[:6], ranges, strict=True)):
        # Three histograms a row; x, y is the lower left corner of the bars.
        x = 320 * (i % 3) + 16
        y = 240 * (i // 3) + 210
        draw.text((x, y - 200), name, "black", font, "la")
        draw.text((x, y + 4), f"{low:.3g}", "black", font, "la")
        draw.text((x + 288, y + 4), f"{high:.3g}", "black", font, "ra")
        for line, (label, camera, color, width) in enumerate(series):
            p = tdgp.camera_parameters(camera)[:, i].float().cpu()
            shares = p.histc(48, low, high) / n
            for k, height in enumerate((shares * 1200).clamp(max=140).tolist()):
                draw.rectangle([x + 6 * k, y - height, x + 6 * k + width, y], color)
            draw.text((x, y - 182 + 18 * line), f"{label} {p.mean():.3g} ± {p.std():.2g}", color, font)
    tdgp.write_image(image, path)


def write_sample(G, s, path, options):
    """The files of one Sample, but for its animation; their names begin with `path`."""
    if options.each:
        tdgp.write_image(tdgp.tile([tdgp.to_picture(s.rgb[0])], 1), f"{path}.png")
    if options.points:
        mesh.write_points(s, f"{path}-points.ply")
    if options.depth:
        write_depth((s.depth - G.cfg.near) / (G.cfg.far - G.cfg.near), f"{path}-depth.png")
    if options.depth and G.depth_adaptor:
        write_depth((G.depth_adaptor.adapt(s.depth) + 1) / 2, f"{path}-adapted.png")
    if options.mesh:  # comes last, since it alone may fail
        n = options.mesh_resolution
        surface = mesh.extract_mesh(G, s.planes, s.camera, options.mesh_level, n)
        mesh.write_ply(f"{path}-mesh.ply", *surface)
        mesh.write_glb(f"{path}-mesh.glb", *surface)


def attempt(failed, name, work, *args):
    """work(*args). Why one of many cannot be made is said, and its name noted; the others are made."""
    try:
        work(*args)
    except ValueError as e:
        print(f"sample.py: {name}: {e}", file=sys.stderr)
        failed.append(name)


def open_generator(options):
    """-> Generator, path of its checkpoint, kimg. Where no resolution is asked for, sets the trained one."""
    few = min(options.frames, options.fps)
    small = min(options.mesh_resolution, options.resolution or 2)
    if few < 1 or small < 2:
        what = "--frames, --fps: must be 1 or more, --mesh-resolution and --resolution 2 or more"
        raise tdgp.UserError(what)

    G, path, kimg = load.open_generator(options.resume, options.device)
    options.resolution = options.resolution or G.cfg.resolution
    of_scenes = options.mesh, options.points, options.depth, options.turntable, options.video != "none"
    if G.cfg.dims == 2 and any(of_scenes):
        what = "this generator (--dims 2) makes pictures, not scenes"
        raise tdgp.UserError(f"--mesh, --points, --depth, --turntable, --video: {what}")
    return G, path, kimg


def check_film(options, classes, seeds):
    """UserError if the animation of all samples is larger than WebP can be."""
    together = options.video != "none" and not (options.each or options.interpolate)
    side = options.resolution * math.ceil(96 / options.resolution)  # small pictures are enlarged
    longest = side * max(2 * len(seeds), len(classes))
    if together and longest > 16383:
        what = f"{longest:,} pixels in a row, of 16,383 at most; take fewer, or --each"
        raise tdgp.UserError(f"--seeds, --classes: an animation of all has {what}")


@torch.no_grad()
def sample(given):
    """All that a person wants to look at, from a checkpoint alone. given: options, a dict"""
    options = SampleOptions(**given)
    G, path, kimg = open_generator(options)
    seeds = parse_numbers(options.seeds, "--seeds", 2**31)
    count = max(G.cfg.num_classes, 1)
    classes = parse_numbers(options.classes or f"0-{min(8, count) - 1}", "--classes", count)
    views = turntable.parse_views(options)
    check_film(options, classes, seeds)
    out = Path(options.out or path.with_name(f"samples-{kimg:010.3f}"))
    out.mkdir(parents=True, exist_ok=True)

    # Of each sample only what the files of all need is kept.
    failed = []  # names
    pictures = []
    films = []  # lists of frames, RGB beside depth
    stops = []  # of the walk, (1, w_dim + 6) each
    cards = []  # of the turntable, HTML
    samples = draw_samples(G, classes, seeds, options)
    for s in tqdm(samples, total=len(classes) * len(seeds), unit="sample"):
        attempt(failed, s.name, write_sample, G, s, out / s.name, options)
        pictures.append(tdgp.to_picture(s.rgb[0]))
        stops.append(torch.cat([s.w, tdgp.camera_parameters(s.mean_camera)], 1))
        if options.video != "none" and not options.interpolate:
            cameras = camera_path(options.video, s.mean_camera, options.frames, options.angle)
            films.append(tdgp.render_views(G, s.planes, cameras, options.resolution, dim=2))
        if films and options.each:
            name = f"{s.name}-{options.video}"
            attempt(failed, name, write_animation, [films.pop()], 1, out / name, options.fps)
        if options.turntable:
            attempt(failed, f"{s.name}-turntable", turntable.add_card, cards, G, s, views, options)

    if not options.each:
        tdgp.write_image(tdgp.tile(pictures, len(seeds)), out / "grid.png")
    if films:
        attempt(failed, options.video, write_animation, films, len(seeds), out / options.video, options.fps)
    if options.interpolate:
        attempt(failed, "walk", write_walk, G, torch.cat(stops), out / "walk", options)
    if options.cameras:
        write_cameras(G, out / "cameras.png")
    if options.turntable:
        title = f"{path.resolve().parent.name}, {kimg:g} kimg"
        turntable.write_page(out / "turntable.html", title, cards, options.resolution)
    print(f"written to {out}")
    if failed:
        sys.exit(1)


def main(argv=None):
    """-> exit status"""
    texts = "sample.py", __doc__.splitlines()[0], argv
    return tdgp.run_program("sample.py", lambda: sample(tdgp.parse_options(SampleOptions, *texts)))


if __name__ == "__main__":
    sys.exit(main())
