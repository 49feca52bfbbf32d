"""Times the parts of the program and counts their operations.

    python tools/bench.py --what triplane                     # the tri-plane query, fused and plain
    python tools/bench.py --what step --preset small          # each phase of a training step
    python tools/bench.py --what render --preset base         # making pictures
    torchrun --nproc_per_node=2 tools/bench.py --what step    # and what waiting for others costs

All options of training are options here, too. Training does not know that it is timed: see Stopwatch.watch.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import itertools
import json
import math
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
tdgp = importlib.import_module("3dgp")


# ---- Clock, memory, operations -----------------------------------------------------------------------------
def clock(device):
    """Seconds, once the device has done what it was given, but for exchange with other processes."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # NCCL has a stream of its own
    return time.perf_counter()


def timed(device, function, *args):
    """-> what the function returns, and how many seconds it took"""
    start = clock(device)
    return function(*args), clock(device) - start


def memory(device, reset=False):
    """Most bytes of the GPU, or resident, that this process held since a reset; at a reset: what it holds"""
    if reset and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif reset and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # of Linux
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 2**10 if status.exists() else math.nan


class Operations(TorchDispatchMode):
    """Counts floating-point operations. (PyTorch's FlopCounterMode does not go with autograd.grad.)"""

    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if count := flop_registry.get(operator.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out

    def __enter__(self):
        """What custom_ops.cu does is no operator of PyTorch's: it is counted where it is called."""
        call = tdgp.call_custom_ops

        def counted(planes, points, box, decoder, *rest):
            C = planes.shape[2]  # 4 corners in each of 3 planes; then C -> 64 -> 4
            per_point = 24 * C + (128 * (C + 4) if len(decoder) else 0)
            passes = 1 + 2 * (len(rest) > 1)  # a backward pass makes features and hidden units again
            self.total += passes * per_point * points.shape[0] * points.shape[1]
            return call(planes, points, box, decoder, *rest)

        self.patch = mock.patch.object(tdgp, "call_custom_ops", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


# ---- A training step, phase by phase -----------------------------------------------------------------------
class Stopwatch:
    """Measures the phases of training steps. One inside another interrupts it: no time counts twice."""

    def __init__(self, run):
        self.run = run
        self.images = run.cfg.batch_size // tdgp.WORLD  # of this process in a step
        self.operations = Operations()
        self.spent = {}  # {phase: array of seconds and operations}
        self.running = []  # names of phases, the innermost last
        self.last = None

    def charge(self):
        """Puts what was spent since the last call down to the innermost phase."""
        now = np.array([clock(self.run.labels.device), self.operations.total])
        if self.running:
            phase = self.running[-1]
            self.spent[phase] = self.spent.get(phase, 0) + now - self.last
        self.last = now

    @contextlib.contextmanager
    def phase(self, name):
        """For a `with` block, or around a function: phase(name)(function) does what the function does."""
        self.charge()
        self.running.append(name)
        yield
        self.charge()
        self.running.pop()

    def watch_regularizer(self, camera_regularizer, *args):
        """`camera_regularizer`, and the backward pass of the loss that it returns."""
        phase = self.phase("camera regulariser")
        loss, log = phase(camera_regularizer)(*args)
        loss.backward = phase(loss.backward)
        return loss, log

    def watch(self):
        """-> context in which what `training_step` calls is put down to phases: it is wrapped from outside"""
        replacements = (
            (tdgp, "generator_pass", self.phase("D on fakes, G backward")(tdgp.generator_pass)),
            (tdgp, "synthesize", self.phase("G forward")(tdgp.synthesize)),
            (tdgp, "camera_regularizer", functools.partial(self.watch_regularizer, tdgp.camera_regularizer)),
            (tdgp, "average_gradients", self.phase("waiting for others")(tdgp.average_gradients)),
            (tdgp, "discriminator_pass", self.phase("D on reals")(tdgp.discriminator_pass)),
            (tdgp.Teacher, "forward", self.phase("teacher")(tdgp.Teacher.forward)),
            (torch.optim.Adam, "step", self.phase("optimisers")(torch.optim.Adam.step)),
        )
        context = contextlib.ExitStack()
        for owner, name, replacement in replacements:
            context.enter_context(mock.patch.object(owner, name, replacement))
        return context

    def measure(self, number):
        """The number-th training step of the run. -> {phase: array of seconds and counted operations}"""
        self.run.step = number
        self.spent = {}
        with self.phase("drawing data"):
            items = [dict(self.run.data[i], number=i) for i in range(self.images)]
            batch = torch.utils.data.default_collate(items)
        with self.watch(), self.phase("other"):
            tdgp.training_step(self.run, batch, tdgp.Averages())
        return self.spent

    def measure_pair(self, n):
        """-> the phases of a step without R1, and "D on reals, R1" of one with it, R1 of samples included"""
        first = n * self.run.cfg.r1_interval
        spent = self.measure(first + 1)
        due = self.measure(first)
        more = due["D on fakes, G backward"] - spent["D on fakes, G backward"]
        return {**spent, "D on reals, R1": due["D on reals"] + more}


def bench_step(cfg, repeats, device):
    """-> heading, rows: times and operations per image of each phase of a training step on `shapes`"""
    teacher = tdgp.Teacher(cfg.teacher, cfg.teacher_weights).to(device) if cfg.teacher != "none" else None
    dim = teacher.dim if teacher else cfg.teacher_dim
    cfg = dataclasses.replace(cfg, num_classes=cfg.num_classes or 8, teacher_dim=dim)
    labels = torch.arange(cfg.num_classes, device=device)
    run = tdgp.Run(cfg, tdgp.ShapesData(cfg), labels, teacher, [], **tdgp.build(cfg, device))
    if dim and not teacher:  # the published code reads features from a file
        run.teacher = lambda image, numbers: image.new_zeros(len(image), dim)

    # Once to warm up, once with operations counted, then against the clock.
    stopwatch = Stopwatch(run)
    stopwatch.measure_pair(0)
    with stopwatch.operations:
        counted = stopwatch.measure_pair(1)
    memory(device, reset=True)
    times = [stopwatch.measure_pair(2 + n) for n in range(repeats)]
    most = memory(device) / 1e6

    # Seconds and operations an image.
    share = stopwatch.images
    phases = {}
    for phase, (_, count) in counted.items():
        seconds = np.median([spent[phase][0] for spent in times])
        phases[phase] = np.array([seconds, count]) / share
    more = phases["D on reals, R1"] - phases["D on reals"]
    phases["whole step"] = sum(phases.values()) - phases["D on reals, R1"]
    phases["mean, with R1"] = phases["whole step"] + more / cfg.r1_interval
    rate = product_rate(cfg, device)
    rows = []
    for phase, spent in phases.items():
        seconds, count = spent.tolist()
        row = {"what": phase, "ms/image": seconds * 1e3, "Gflop/image": count / 1e9}
        rows.append({**row, "of products": count / seconds / rate})

    speed = cfg.batch_size / share / phases["mean, with R1"][0]
    sent = sum(4 * p.numel() for p in (*run.G.parameters(), *run.D.parameters())) / 1e6
    heading = f"{speed:.4g} images/s; {share // cfg.batch_gpu} passes of {cfg.batch_gpu}, {most:.0f} MB; "
    heading += f"products {rate / 1e9:.0f} Gflop/s; gradients {sent:.1f} MB"
    return heading, rows


def product_rate(cfg, device):
    """Operations a second of a large matrix product in the networks' precision: the most there can be."""
    m = {"cuda": 8192, "cpu": 2048}[device.type]
    x = torch.ones(m, 8192, device=device, dtype={"bf16": torch.bfloat16}.get(cfg.precision))
    return 2 * m * m * 8192 / np.median([timed(device, torch.matmul, x, x.t())[1] for _ in range(9)])


# ---- Making pictures ---------------------------------------------------------------------------------------
@torch.no_grad()
def bench_render(cfg, repeats, device):
    """-> heading, rows: times of making pictures of the data's size, one at a time"""
    G = tdgp.build(cfg, device)["G_ema"]
    c = torch.zeros(1, dtype=torch.long, device=device)
    z, _, prior = tdgp.draw_latents(cfg, 1, c)
    camera = G.pose(prior, z, c)

    # A picture needs planes of its own; an orbit renders the same ones again and again.
    rounds = []
    for _ in range(1 + repeats):
        planes, making = timed(device, lambda: G.backbone(G.mapping(z, c)))
        _, rendering = timed(device, G.render, planes, camera, cfg.resolution)
        rounds.append((making, making + rendering, rendering))
    rows = []
    medians = np.median(rounds[1:], 0).tolist()
    for name, seconds in zip(("planes", "picture", "frame of an orbit"), medians, strict=True):
        rows.append({"what": name, "ms": seconds * 1e3, "per second": 1 / seconds})
    return f"{memory(device) / 1e6:.0f} MB at most", rows


# ---- The tri-plane query -----------------------------------------------------------------------------------
WAYS = ("features, plain", "features, fused", "query, plain", "query, fused lookup", "query, fused")
# B images, R x R rays in each, S samples on a ray, C features, tri-plane resolution T
SIZES = {"cuda": (8, 64, 64, 32, 512), "cpu": (2, 64, 32, 32, 256)}


def query(way, planes, points, box, decoder):
    """planes (B, 3, C, T, T), points (B, N, 3) -> features (B, N, C) or decoded, RGB and density (B, N, 4)"""
    if way == "query, fused":
        return tdgp.triplane(planes, points, box, decoder.packed())
    if "fused" in way:
        features = tdgp.triplane(planes, points, box, points.new_empty(0))
    else:
        features = tdgp.sample_triplane(planes.to(points.dtype), points, box)
    return decoder.model(features) if "query" in way else features


def bench_triplane(cfg, repeats, device):
    """-> heading, rows: times of the tri-plane query on rays of random cameras, as in training"""
    B, R, S, C, T = SIZES[device.type]
    decoder = tdgp.TriplaneDecoder(C).to(device)
    ways = [way for way in WAYS if "plain" in way or tdgp.custom_ops(device.type)]
    kinds = [*itertools.product((torch.float32, torch.bfloat16), ways)]

    # In turn, so that whatever else the machine does hits all alike. The first round warms up.
    rounds = []
    for _ in range(1 + repeats):
        rounds.append([measure_query(way, dtype, cfg, decoder, device) for dtype, way in kinds])
    found = dict(zip(kinds, np.median(rounds[1:], 0).tolist(), strict=True))
    rows = []
    for (dtype, way), (forward, both, extra) in found.items():
        what, _, _ = way.partition(",")
        _, plain_both, plain_extra = found[dtype, f"{what}, plain"]
        row = {"what": way, "planes": str(dtype).removeprefix("torch.")}
        row |= {"forward ms": forward * 1e3, "both ms": both * 1e3, "times faster": plain_both / both}
        rows.append({**row, "extra MB": extra / 1e6, "of plain": extra / plain_extra})
    return f"{B} x {R * R * S:,} points, C = {C}, T = {T}; extra: beyond inputs, result and gradients", rows


def measure_query(way, dtype, cfg, decoder, device):
    """-> seconds forward, seconds of both passes, peak bytes beyond inputs, result and gradients"""
    B, R, S, C, T = SIZES[device.type]
    planes = torch.randn(B, 3, C, T, T, device=device, dtype=dtype)
    if "fused" in way:
        planes = planes.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)  # as the backbone has it
    planes.requires_grad_()
    origins, directions = tdgp.camera_rays(tdgp.sample_camera_prior(cfg, B, device), R)  # 2 x (B, R², 3)
    depths = tdgp.stratified_depths(cfg.near, cfg.far, (B, R * R), S, True, device)  # (B, R², S)
    points = origins[:, :, None] + depths[..., None] * directions[:, :, None]  # (B, R², S, 3)
    points = points.flatten(1, 2).requires_grad_()  # (B, N, 3)
    grad = torch.randn(B, R * R * S, C if "features" in way else 4, device=device)

    held = memory(device, reset=True)
    result, forward = timed(device, query, way, planes, points, cfg.box, decoder)
    _, backward = timed(device, result.backward, grad)
    beyond = memory(device) - held - (result.nbytes + planes.nbytes + points.nbytes)
    return forward, forward + backward, beyond


# ---- Command line ------------------------------------------------------------------------------------------
BENCHES = {"triplane": bench_triplane, "step": bench_step, "render": bench_render}
# Sizes at which the published implementation was measured. On 2 CPU cores, in one pass, its G, D and R1 took
# 7.97, 2.93 and 1.36 seconds an image (compared); 0.076, 0.036 and 0.009 (compared-small).
SMALL = dict(resolution=64, patch_resolution=32, triplane_resolution=64, channel_base=2048, channel_max=64)
SMALL.update(num_classes=8, teacher_dim=2048, coarse_samples=16, fine_samples=16, batch_size=16)
COMPARED = {"compared": dict(batch_size=4, num_classes=1000, teacher_dim=2048), "compared-small": SMALL}


@dataclasses.dataclass
class BenchOptions(tdgp.Config):
    """These, and those of training."""

    what: str = tdgp.opt("triplane", "tri-plane query, a step (on shapes), or making pictures", *BENCHES)
    preset: str = tdgp.opt("small", "model size (compared: the published code's)", *tdgp.PRESETS, *COMPARED)
    repeats: int = tdgp.opt(9, "timings of each row, after one to warm up; the median counts")
    json: bool = tdgp.opt(False, "print JSON, not a table")


def make_config(given):
    """The Config of what is given of BenchOptions; as tdgp.make_config, but it knows COMPARED as well."""
    values = {name: value for name, value in given.items() if name in tdgp.Config.__dataclass_fields__}
    if values.get("preset") in COMPARED:
        values = {**COMPARED[values["preset"]], **values, "preset": "base"}
    return tdgp.make_config({"preset": BenchOptions.preset, **values})


def bench(argv):
    """Measures, over all processes, and prints what was found."""
    given = tdgp.parse_options(BenchOptions, "bench.py", "Times the parts of the program.", argv)
    options = BenchOptions(**given)
    if options.repeats < 1:
        raise tdgp.UserError(f"--repeats {options.repeats}: must be positive")
    cfg = make_config(given)
    device = tdgp.choose_device(cfg.device, cfg.precision)
    tdgp.validate(cfg, tdgp.WORLD)
    cfg = dataclasses.replace(cfg, batch_gpu=math.gcd(cfg.batch_gpu, cfg.batch_size // tdgp.WORLD))
    tdgp.join_processes(device, cfg.timeout)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    title = f"{name}, {tdgp.WORLD} processes, PyTorch {torch.__version__}; {options.what} {options.preset}"
    said, rows = BENCHES[options.what](cfg, options.repeats, device)
    if tdgp.RANK == 0 and options.json:
        print(json.dumps({"heading": f"{title}: {said}", "rows": rows}).replace("NaN", "null"))
    elif tdgp.RANK == 0:
        print(f"{title}: {said}; median of {options.repeats}")
        for row in (dict(zip(rows[0], rows[0], strict=True)), *rows):
            cells = [f"{value:.4g}" if isinstance(value, float) else value for value in row.values()]
            print(f"{cells[0]:>24}", *map("{:>12}".format, cells[1:]))


def main(argv=None):
    return tdgp.run_program("bench.py", lambda: bench(argv))


if __name__ == "__main__":
    sys.exit(main())
