"""Tests of 3dgp.py: python -m pytest test_3dgp.py

Analytic tests need nothing. The reference section compares with the vectors in the folder that the environment variable
REFERENCE_VECTORS names, and is skipped without it.
"""
import dataclasses
import hashlib
import http.server
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
SCRIPT = HERE / "3dgp.py"
spec = importlib.util.spec_from_file_location("tdgp", SCRIPT)
m = importlib.util.module_from_spec(spec)
sys.modules["tdgp"] = m
spec.loader.exec_module(m)
sys.path.insert(0, str(HERE))
import lereS_depth as L  # noqa: E402  (finds m by its name)

# a configuration that takes milliseconds a step
MICRO = dict(resolution=16, patch_resolution=8, triplane_resolution=16, triplane_features=4, channel_base=256,
             channel_max=8, adaptor_channels=4, z_dim=8, w_dim=8, coarse_samples=4, fine_samples=4, batch_size=16,
             batch_gpu=8, metrics="", workers=0, log_kimg=0.016, snapshot_kimg=1000)


def micro(**changes):
    return m.Config(**{**MICRO, "num_classes": 3, **changes})

def flags(**options):
    return [x for k, v in options.items() for x in ("--" + k.replace("_", "-"), str(v))]

def run_main(capsys, *argv):
    """-> exit status and what was printed to standard error"""
    status = m.main([str(a) for a in argv])
    return status, capsys.readouterr().err

def train_micro(out, *argv, **options):
    assert m.main(["--out", str(out), *flags(**{**MICRO, **options}), *argv]) == 0
    return out

def checkpoint(out):
    return torch.load(sorted(Path(out).glob("checkpoint-*.pt"))[-1], weights_only=True)

def log(out, kind="log"):
    return [json.loads(line) for line in (Path(out) / f"{kind}.jsonl").read_text().splitlines()]

def flatten(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}/{key}").items()}
    return {prefix: tree} if isinstance(tree, torch.Tensor) else {}

def camera(n=1, yaw=0.0, pitch=math.pi / 2, fov=30.0, look_at=(0.0, math.pi / 2, 0.0)):
    full = lambda x: torch.full((n,), float(x))
    return m.Camera(full(yaw), full(pitch), full(fov), full(1), torch.tensor(look_at).expand(n, 3))

# ----------------------------------------------------------------------------------------------------------------------
# Camera, patches

def test_camera_looks_where_it_should():
    cam = camera(3, yaw=0.4, pitch=1.3, look_at=(0.7, 1.1, 0.15))
    pose = m.cam2world(cam)
    target = m.spherical_to_cartesian(*cam.look_at.unbind(1))
    forward = F.normalize(target - pose[:, :3, 3], dim=1)
    assert torch.allclose(-pose[:, :3, 2], forward, atol=1e-6)
    assert torch.allclose(pose[:, :3, :3] @ pose[:, :3, :3].transpose(1, 2), torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(pose[:, :3, :3]), torch.ones(3), atol=1e-6)
    assert (pose[:, 1, 1] > 0).all() and (pose[:, 1, 0].abs() < 1e-6).all()      # upright, no roll
    frontal = m.cam2world(camera())[0]
    assert torch.allclose(frontal[:3, 3], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)   # yaw 0 lies on +z

def test_rays_span_the_field_of_view():
    origins, rays = m.camera_rays(camera(fov=40.0), 5)
    rays = rays.view(5, 5, 3)
    angle = lambda a, b: math.degrees(math.acos(float((a * b).sum())))
    assert angle(rays[2, 0], rays[2, 2]) == pytest.approx(20, abs=1e-3)
    assert angle(rays[0, 2], rays[2, 2]) == pytest.approx(20, abs=1e-3)
    assert rays[2, 4, 0] > 0 and rays[0, 2, 1] > 0                               # x right, first row on top
    assert torch.allclose(rays.norm(dim=-1), torch.ones(5, 5))

def test_patch_of_render_is_patch_of_full_render():
    cfg = micro()
    G = m.Generator(cfg).eval()
    planes = torch.randn(2, 3, 4, 16, 16)
    patch = m.Patch(torch.full((2,), 0.5), torch.tensor([[0.25, 0.125], [0.0, 0.5]]))
    with torch.no_grad():
        full = torch.cat(G.render(planes, camera(2), 33), 1)
        part = torch.cat(G.render(planes, camera(2), 17, patch), 1)
    assert torch.allclose(part[0], full[0, :, 12:29, 8:25], atol=1e-5)           # rows are counted from the top
    assert torch.allclose(part[1], full[1, :, 0:17, 0:17], atol=1e-5)
    assert torch.allclose(part, m.extract_patch(full, patch, 17), atol=1e-5)

def test_prior_and_posterior_stay_in_range():
    cfg = micro()
    low, high = m.camera_ranges(cfg).unbind(1)
    prior = m.sample_camera_prior(cfg, 4000, "cpu")
    p = m.camera_parameters(prior)
    assert (p >= low - 1e-4).all() and (p <= high + 1e-4).all()
    assert torch.allclose(p.min(0).values, low, atol=0.1) and torch.allclose(p.max(0).values, high, atol=0.1)
    assert p[:, 4].cos().mean().abs() < 0.05                                      # uniform on the sphere: mean height 0
    assert p[:, 4].cos().square().mean() == pytest.approx(1 / 3, abs=0.03)
    generator = m.CameraGenerator(cfg)
    for adaptor in (generator.origin_adaptor, generator.look_at_adaptor):
        adaptor.main[1].weight.data.mul_(1000)                                    # saturate the sigmoid
    q = m.camera_parameters(generator(prior, torch.randn(4000, 8), torch.randint(3, (4000,))))
    assert (q >= low - 1e-5).all() and (q <= high + 1e-5).all()
    assert q[:, 1].min() > low[1] and q[:, 1].max() < high[1]

def test_patch_statistics():
    cfg = micro(resolution=32)
    torch.manual_seed(0)
    early, late = m.sample_patch(cfg, 4000, 0), m.sample_patch(cfg, 4000, cfg.patch_kimg)
    assert early.scale.mean() > 0.99                                              # whole images
    assert late.scale.mean() == pytest.approx(0.25 + 0.75 / 1.8, abs=0.02)        # mean of Beta(1, b) is 1 / (1 + b)
    for patch in (early, late):
        assert (patch.scale >= 0.25).all() and (patch.scale <= 1).all()
        assert (patch.offset >= 0).all() and (patch.offset <= 1 - patch.scale[:, None] + 1e-6).all()
    groups = late.scale.view(-1, 4)
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) > 900

# ----------------------------------------------------------------------------------------------------------------------
# Rendering

def test_lone_opaque_plane_renders_at_its_depth():
    """Density is a steep ramp in z: the decoder reads z off the (x, z) plane. The wall stands at z = 0.1."""
    cfg = micro(coarse_samples=128, fine_samples=32)
    G = m.Generator(cfg).eval()
    planes = torch.zeros(1, 3, 4, 16, 16)
    planes[:, 1, 0] = torch.linspace(-0.5, 0.5, 16)[:, None]                      # feature 0 of the mean is z / 3
    first, second = G.decoder.model
    with torch.no_grad():
        for p in G.decoder.parameters():
            p.zero_()
        first.weight[0, 0], first.weight[1, 0] = 1, -1                            # leaky ReLU of z and of -z
        second.weight[3, 0], second.weight[3, 1] = -1, 1                          # their difference is linear in z
        second.weight[3] *= 1e9                                               # opaque within a micrometre
        unit = float(G.decoder(torch.tensor([[1 / 3, 0, 0, 0]]))[1])              # raw density at z = 1
        second.bias[3] = -0.1 * unit
        second.bias[:3] = torch.tensor([0.2, -0.4, 0.6])
        rgb, depth = G.render(planes, camera(fov=20.0), 9)
    _, rays = m.camera_rays(camera(fov=20.0), 9)
    expected = 0.9 / -rays[0, :, 2]
    assert unit < -1e6
    assert (depth.flatten() - expected).abs().max() < 0.5 / 127 / 2 * 1.1          # half a coarse interval
    assert torch.allclose(rgb[0, :, 4, 4], torch.tensor([0.2, -0.4, 0.6]), atol=1e-4)

def test_weights_sum_to_one_and_importance_follows_them():
    depths = torch.linspace(0.75, 1.25, 16).expand(5, 16)
    weights = m.ray_weights(torch.randn(5, 16), depths)
    assert torch.allclose(weights.sum(-1), torch.ones(5), atol=1e-5)              # the last sample takes what is left
    weights = torch.zeros(1, 16)
    weights[0, 7] = 1
    fine = m.importance_depths(depths[:1], weights, torch.linspace(0.01, 0.99, 50)[None])
    low, high = (depths[0, 6] + depths[0, 7]) / 2, (depths[0, 7] + depths[0, 8]) / 2
    assert (fine >= low - 1e-3).all() and (fine <= high + 1e-3).all()

def test_evaluation_is_deterministic_and_training_is_not():
    cfg = micro()
    G = m.Generator(cfg)
    planes = torch.randn(1, 3, 4, 16, 16)
    G.eval()
    assert torch.equal(G.render(planes, camera(), 8)[0], G.render(planes, camera(), 8)[0])
    G.train()
    assert not torch.equal(G.render(planes, camera(), 8)[0], G.render(planes, camera(), 8)[0])

def test_upsampling_is_zero_insertion_and_fir():
    x = torch.randn(2, 3, 5, 7)
    spread = torch.zeros(2, 3, 10, 14)
    spread[:, :, ::2, ::2] = x
    assert torch.allclose(m.upsample(x), m.fir_filter(F.pad(spread, (2, 1, 2, 1)), 0, gain=4), atol=1e-5)

# ----------------------------------------------------------------------------------------------------------------------
# Fused tri-plane query: custom_ops.cu against PyTorch's own operators

compiles = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

def query_inputs(C, T=9, N=70, dtype=torch.float32, device="cpu"):
    """Planes (2, 3, C, T, T) and points inside, outside, and exactly on the border."""
    torch.manual_seed(C)
    planes, real = torch.randn(2, 3, C, T, T), torch.float64 if dtype == torch.float64 else torch.float32
    points = 1.3 * (torch.rand(2, N, 3) - 0.5)
    special = [[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5], [0.5, -0.5, 0.1], [0.5, 0, 9], [-900, 0.2, 0]]
    points[0, :len(special)] = torch.tensor(special)[:N]
    decoder = m.TriplaneDecoder(C).to(device, real)
    return planes.to(device, dtype).requires_grad_(), points.to(device, real).requires_grad_(), decoder

def fused_features(planes, points):
    return m.triplane(planes, points, 0.5, points.new_empty(0))

def values_and_gradients(f, *inputs):
    """Of f and of a fixed combination of its values"""
    y = f(*inputs)
    y = torch.cat([x if x.ndim == 3 else x[..., None] for x in y], -1) if isinstance(y, tuple) else y
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y, *torch.autograd.grad((y * cotangent).sum(), inputs)]

def close(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert float((x.double() - y.double()).detach().abs().max()) <= tolerance * max(1.0, float(y.detach().abs().max()))

@compiles
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C, N", [(1, 7), (3, 70), (4, 1), (16, 70), (20, 33), (32, 129), (40, 70)])
def test_fused_query_is_the_plain_one(device, C, N):
    planes, points, decoder = query_inputs(C, N=N, device=device)
    inputs = [planes, points, *decoder.parameters()]
    features = values_and_gradients(lambda p, x: m.sample_triplane(p, x, 0.5), planes, points)
    query = values_and_gradients(lambda p, x, *_: m.query_triplane(p, x, 0.5, decoder, False), *inputs)
    between = planes.detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)   # channels of all planes adjacent
    for layout in (planes, m.channels_last(planes.detach()), between):
        layout = layout.detach().requires_grad_()
        close(values_and_gradients(fused_features, layout, points), features)
        close(values_and_gradients(lambda p, x, *_: m.query_triplane(p, x, 0.5, decoder, True), layout, *inputs[1:]), query)
    one = planes[:1].detach().requires_grad_()                                             # one scene for all
    close(values_and_gradients(lambda p, x: fused_features(p.expand(2, -1, -1, -1, -1), x), one, points),
          values_and_gradients(lambda p, x: m.sample_triplane(p.expand(2, -1, -1, -1, -1), x, 0.5), one, points))

@compiles
@pytest.mark.parametrize("device", DEVICES)
def test_points_out_of_this_world_see_nothing_and_change_nothing(device):
    planes, points, _ = query_inputs(8, device=device)
    want = values_and_gradients(fused_features, planes, points.detach()[:, 20:].requires_grad_())
    strange = points.detach().clone()
    strange[:, :20] = torch.tensor([[math.nan, 0, 0], [0, math.inf, 0.1], [1e30, -1e30, 1e30], [-math.inf, 2, 2]] * 5)
    strange[:, :20, 2] = 3                                                                 # beyond every plane
    got = values_and_gradients(fused_features, planes, strange.requires_grad_())
    assert not got[0][:, :20].any() and not got[2][:, :20].any()
    close([got[0][:, 20:]], [want[0]])
    assert got[1].isfinite().all()

@compiles
@pytest.mark.parametrize("device", DEVICES)
def test_fused_query_of_bfloat16_planes_sums_in_float32(device):
    for C in (6, 32):
        planes, points, _ = query_inputs(C, dtype=torch.bfloat16, device=device)
        wide = planes.detach().float().requires_grad_()
        got = values_and_gradients(fused_features, planes, points)
        want = values_and_gradients(fused_features, wide, points)
        assert got[0].dtype == torch.float32 and got[1].dtype == torch.bfloat16
        close([got[0], got[2]], [want[0], want[2]], 1e-6)
        close([got[1]], [want[1]], 2 ** -8)                                                # rounded once, at the end

@compiles
def test_fused_query_against_finite_differences():
    planes, points, decoder = query_inputs(3, T=4, N=8, dtype=torch.float64)
    points = points.detach()[:, -2:].requires_grad_()                                      # off the corners of cells
    assert torch.autograd.gradcheck(fused_features, (planes, points))
    assert torch.autograd.gradcheck(lambda p, x, *_: m.query_triplane(p, x, 0.5, decoder, True),
                                    (planes, points, *decoder.parameters()))

@compiles
def test_fused_query_is_a_proper_operator():
    for C, dtype, vector in ((8, torch.float32, False), (8, torch.float64, True), (20, torch.bfloat16, True)):
        planes, points, decoder = query_inputs(C, dtype=dtype)
        packed = decoder.packed().detach().requires_grad_() if vector else points.new_empty(0)
        torch.library.opcheck(m.triplane, (planes, points, 0.5, packed))
        turned = points.detach().transpose(1, 2).contiguous().transpose(1, 2)               # not contiguous
        torch.library.opcheck(m.triplane_backward, (planes.detach(), turned, 0.5, packed.detach(), m.triplane(
            planes, turned, 0.5, packed).detach()))
    planes, points, decoder = query_inputs(8)
    query = lambda p, x: torch.cat([x if x.ndim == 3 else x[..., None]
                                    for x in m.query_triplane(p, x, 0.5, decoder, m.has_custom_ops("cpu"))], -1)
    want = values_and_gradients(query, planes, points)
    close(values_and_gradients(torch.compile(query, fullgraph=True, backend="aot_eager"), planes, points), want, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):                                            # points keep their precision
        close([fused_features(planes, points)], [m.sample_triplane(planes.float(), points, 0.5)])
    for bad in ((planes.half(), points), (planes, points[:1]), (planes, points.double()), (planes[..., :-1], points)):
        with pytest.raises(ValueError, match="planes \\(B, 3, C, T, T\\)"):
            fused_features(*bad)
    with pytest.raises(ValueError, match="packed"):
        m.triplane(query_inputs(20)[0], points, 0.5, decoder.packed())                      # packed for 8 channels, not for 20
    empty = values_and_gradients(fused_features, planes, points.detach()[:, :0].requires_grad_())
    assert empty[0].shape == (2, 0, 8) and not empty[1].any()

@compiles
def test_fused_query_does_not_depend_on_the_number_of_threads():
    planes, points, decoder = query_inputs(20, N=3000)
    planes, points = (t.detach()[:1].requires_grad_() for t in (planes, points))            # so that threads share planes
    threads, results = torch.get_num_threads(), []
    torch.use_deterministic_algorithms(True)
    try:
        for n in (1, 2, 16):
            torch.set_num_threads(n)
            packed = decoder.packed().detach().requires_grad_()
            results.append(values_and_gradients(lambda p, x, d: m.triplane(p, x, 0.5, d), planes, points, packed))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_deterministic_mode_on_a_gpu_says_what_to_do():
    planes, points, _ = query_inputs(8, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="warn_only"):
            values_and_gradients(fused_features, planes, points)
    finally:
        torch.use_deterministic_algorithms(False)

@compiles
@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_32_bits(device):
    C, T = 4, 3
    storage = torch.empty(2 ** 31 + 3 * T * T * C, dtype=torch.bfloat16, device=device)    # hardly any of it is touched
    planes = storage.as_strided((2, 3, C, T, T), (2 ** 31, T * T * C, 1, T * C, C))
    values, points, _ = query_inputs(C, T, dtype=torch.bfloat16, device=device)
    planes.copy_(values.detach())
    close([fused_features(planes, points)], [fused_features(values, points)], 0)

@compiles
def test_training_uses_the_fused_query(monkeypatch):
    calls, call = [], m.call_custom_ops
    monkeypatch.setattr(m, "call_custom_ops", lambda *a: calls.append(1) or call(*a))
    images = {}
    for fused in (True, False):
        torch.manual_seed(0)
        G = m.Generator(micro(fused=fused)).eval()
        z, c, prior = m.draw_latents(G.cfg, 4, torch.arange(3))
        images[fused] = m.synthesize(G, z, c, prior, torch.zeros(4).long())[0]
        images[fused].sum().backward()
        assert len(calls) == 4                                                             # two forward, two backward
    close([images[True]], [images[False]])

QUERY = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("tdgp", {str(SCRIPT)!r})
m = importlib.util.module_from_spec(spec)
sys.modules["tdgp"] = m
spec.loader.exec_module(m)
torch.manual_seed(0)
G = m.Generator(m.Config(**{MICRO!r})).eval()
z, c, prior = m.draw_latents(G.cfg, 4, torch.zeros(0).long())
print(m.has_custom_ops("cpu"), m.synthesize(G, z, c, prior, torch.zeros(4).long())[0].square().mean().item())
"""

def start_query(cache, **env):
    return subprocess.Popen([sys.executable, "-c", QUERY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), **env})

@compiles
def test_processes_that_start_at_once_build_once_each_and_agree(tmp_path):
    started = [start_query(tmp_path / "cache", LOCAL_RANK=str(i)) for i in range(3)]
    results = [p.communicate() for p in started]
    assert all(p.returncode == 0 for p in started), results
    assert len({out for out, _ in results}) == 1 and results[0][0].startswith("True")
    assert re.fullmatch(r"compiling custom_ops.cu for \w+, once: \d+ s\n", results[0][1])   # the first one speaks
    assert results[1][1] == results[2][1] == ""
    assert len(os.listdir(tmp_path / "cache")) == 1                                        # nothing half-made is left
    again = start_query(tmp_path / "cache").communicate()
    assert again == (results[0][0], "")                                                    # from the cache, in silence
    value = float(results[0][0].split()[1])
    broken = (dict(CXX="/no/such/compiler"), dict(PATH="/nowhere"), dict(CXX="false"))
    for process in [start_query(tmp_path / f"none{i}", **env) for i, env in enumerate(broken)]:
        out, err = process.communicate()
        assert out.startswith("False") and abs(float(out.split()[1]) - value) < 1e-5 * value, err
        assert err.count("custom_ops.cu is not used") == 1 and len(err.splitlines()) == 1, err

@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_kernels_compile_for_three_generations_without_warnings_or_spills(tmp_path):
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    done = subprocess.run(["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra", *archs, "-fatbin",
                           "-o", tmp_path / "out", HERE / "custom_ops.cu"], capture_output=True, text=True)
    log_ = done.stdout + done.stderr
    assert done.returncode == 0, log_
    assert "warning" not in log_
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log_)
    assert len(spills) >= 3 * 8 and set(spills) == {("0", "0")}

@compiles
def test_bench_says_what_the_fused_query_saves(capsys):
    assert m.main(["bench", "--what", "triplane", "--device", "cpu", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {(r["what"], r["planes"]): r for r in result["rows"]}
    assert len(rows) == 10
    for kind in ("features", "query"):
        row, plain = rows[f"{kind}, fused", "float32"], rows[f"{kind}, plain", "float32"]
        assert abs(row["times faster"] - plain["both ms"] / row["both ms"]) < 1e-6
        if plain["extra MB"] is not None:
            assert row["extra MB"] < plain["extra MB"] / 3

def test_bench_times_and_counts_the_phases_of_a_step(capsys):
    size = flags(**{k: v for k, v in MICRO.items() if k not in ("metrics", "workers", "log_kimg", "snapshot_kimg")})
    assert m.main(["bench", "--what", "step", "--device", "cpu", "--repeats", "1", "--json", *size]) == 0
    rows = {r["what"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    total = rows.pop("whole step")
    parts = [r for k, r in rows.items() if "R1" not in k]
    for unit in ("ms/image", "Gflop/image"):
        assert total[unit] == pytest.approx(sum(r[unit] for r in parts))
    assert rows["D on fakes"]["Gflop/image"] > rows["D on reals"]["Gflop/image"] > 0      # G's gradient in addition
    assert rows["D on reals, R1"]["Gflop/image"] > rows["D on reals"]["Gflop/image"]
    assert m.main(["bench", "--what", "render", "--device", "cpu", "--repeats", "1", "--json", *size]) == 0
    rows = {r["what"]: r["ms"] for r in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["picture"] > rows["planes"] > 0

def test_operations_are_counted():
    with m.Operations() as count:
        torch.randn(3, 4) @ torch.randn(4, 5)
        torch.nn.functional.conv2d(torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3))
    assert count.total == 2 * 3 * 4 * 5 + 2 * 2 * 5 * 6 * 6 * 27

@compiles
def test_operations_of_the_fused_query_are_counted():
    planes, points, decoder = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 5, 3) - 0.5, m.TriplaneDecoder(4)
    with torch.no_grad(), m.Operations() as count:
        m.query_triplane(planes, points, 0.5, decoder, True)
    assert count.total == 2 * 5 * (2 * 12 * 4 + 2 * 64 * (4 + 4))     # 12 corners, then 4 -> 64 -> 4

# ----------------------------------------------------------------------------------------------------------------------
# Losses, schedules, metrics

def test_emd_closed_forms():
    a = torch.randn(64)
    assert float(m.emd_1d(a, a.flip(0))) == 0
    assert float(m.emd_1d(a, a + 3)) == pytest.approx(9, rel=1e-5)
    assert float(m.emd_1d(a, 2 * a)) == pytest.approx(float(a.square().mean()), rel=1e-5)
    b = torch.randn(5).double()
    best = min(float((a[:5].double() - b[list(p)]).square().mean()) for p in __import__("itertools").permutations(range(5)))
    assert float(m.emd_1d(a[:5].double(), b)) == pytest.approx(best, rel=1e-6)

def test_gradient_penalty_is_least_when_the_posterior_follows_the_prior():
    cfg = micro()
    prior = m.sample_camera_prior(cfg, 16, "cpu")
    identity = lambda camera, z, c: camera
    assert torch.allclose(m.camera_gradient_penalty(identity, prior, None, None), torch.full((6,), 2.0), atol=1e-3)
    shrunk = lambda camera, z, c: camera._replace(yaw=0.01 * camera.yaw)
    assert m.camera_gradient_penalty(shrunk, prior, None, None)[0] > 50

def test_r1_double_backward_by_finite_differences():
    cfg = micro(channel_max=4)
    torch.manual_seed(0)
    D = m.Discriminator(cfg).double()
    image = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    c, patch = torch.zeros(4, dtype=torch.int64), m.Patch(torch.full((4,), 0.5).double(), torch.zeros(4, 2).double())

    def penalty():
        return m.r1_penalty(D(image, c, patch)[0], image).sum()
    for p in (D.b16.conv1.weight, D.b8.conv0.weight, D.b16.conv1.affine.weight, D.b4.fc.weight):
        gradient = torch.autograd.grad(penalty(), p)[0]
        direction = torch.randn_like(p)
        with torch.no_grad():
            p += 1e-5 * direction
        up = float(penalty().detach())
        with torch.no_grad():
            p -= 2e-5 * direction
        down = float(penalty().detach())
        with torch.no_grad():
            p += 1e-5 * direction
        assert float((gradient * direction).sum().detach()) == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-9)

def test_schedules_at_their_ends():
    cfg = m.Config()
    start, end = m.schedules(cfg, 0), m.schedules(cfg, 1e6)
    assert start == dict(blur_sigma=10, density_noise=1, patch_beta=0.001, raw_depth_share=0.25, camera_reg_weight=0, kd_weight=1,
                         lr_factor=1)
    assert end == dict(blur_sigma=0, density_noise=0, patch_beta=0.8, raw_depth_share=0.1, camera_reg_weight=1, kd_weight=0, lr_factor=1)
    assert m.schedules(cfg, 5_000)["raw_depth_share"] == pytest.approx(0.175)

def test_adaptor_choices_follow_the_schedule():
    torch.manual_seed(0)
    share = lambda cfg, kimg: np.bincount(m.sample_adaptor_choice(cfg, 20_000, kimg).numpy(), minlength=4) / 20_000
    assert share(micro(), 0) == pytest.approx([0.25] * 4, abs=0.02)
    assert share(micro(), 1e6) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    assert share(micro(depth_adaptor="never"), 0) == pytest.approx([1, 0, 0, 0])
    assert share(micro(depth_adaptor="half"), 0) == pytest.approx([0.5, 0, 0, 0.5], abs=0.02)
    assert share(micro(depth_adaptor="always"), 0) == pytest.approx([0, 0, 0, 1])

def test_adaptor_computes_the_chosen_candidates():
    adaptor = m.DepthAdaptor(micro())
    depth = torch.rand(6, 1, 8, 8) * 0.5 + 0.75
    for choice in (torch.tensor([2, 0, 3, 1, 3, 0]), torch.zeros(6).long(), torch.full([6], 3)):
        got, candidates = adaptor(depth, choice), adaptor.candidates(depth)
        assert torch.allclose(got, candidates[choice, torch.arange(6)], atol=1e-6)
        got.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adaptor.parameters())

def test_labels_are_drawn_by_their_frequencies():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 700 + [1] * 100 + [2] * 200)
    c = m.draw_latents(micro(), 20_000, labels)[1]
    assert np.bincount(c.numpy()) / 20_000 == pytest.approx([0.7, 0.1, 0.2], abs=0.02)

def test_minibatch_std_does_not_mix_groups():
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(m.minibatch_std(x)[:4], m.minibatch_std(x[:4]))
    assert (m.minibatch_std(x[:1].expand(4, -1, -1, -1))[:, 3] < 1e-3).all()

def test_one_pass_gives_the_gradients_of_both_networks():
    """What `generator_pass` leaves in G and D is what the two losses, each on its own, give."""
    cfg = micro(num_classes=2, depth="auto")
    modules, labels = m.build(cfg, torch.device("cpu")), torch.arange(2)
    G, D = modules["G"], modules["D"]
    patch = m.sample_patch(cfg, 8, 0.032)
    m.generator_pass(G, D, labels, patch, 2, 0, 0.5, m.Averages())
    got = {(k, n): p.grad.clone() for k in "GD" for n, p in modules[k].named_parameters() if p.grad is not None}
    for sign, k in ((-1, "G"), (1, "D")):
        G.zero_grad(), D.zero_grad()
        m.seed_draws(cfg.seed, 2, "generator", 0)
        z, c, prior = m.draw_latents(cfg, 8, labels)
        image, _ = m.synthesize(G, z, c, prior, m.sample_adaptor_choice(cfg, 8, 0.032), patch)
        score, _ = D(m.blur(image, m.schedules(cfg, 0.032)["blur_sigma"]), c, patch)
        (torch.nn.functional.softplus(sign * score).mean() * 0.5).backward()
        for name, p in modules[k].named_parameters():
            if p.grad is not None:
                assert torch.allclose(got[k, name], p.grad, rtol=1e-3, atol=1e-6 + 1e-4 * float(p.grad.abs().max())), name

def test_images_per_pass_follow_the_stated_rule():
    cpu = torch.device("cpu")
    assert m.images_per_pass(m.make_config({}), 8, cpu) == 8
    assert m.images_per_pass(m.make_config({"preset": "small"}), 32, cpu) == 8        # no more on a CPU
    assert m.images_per_pass(m.make_config({"preset": "small"}), 12, cpu) == 4        # must divide the share, in fours
    assert m.images_per_pass(m.make_config({"preset": "imagenet"}), 64, cpu) == 4     # the least, where nothing fits
    assert m.images_per_pass(m.make_config({"preset": "small", "batch_gpu": 16}), 32, cpu) == 16

def test_bf16_is_near_fp32():
    """Relative errors of the image, the score and G's gradient (measured on a trained `tiny`: 0.006, 0.007, 0.056)."""
    results = []
    for precision in ("fp32", "bf16"):
        cfg = micro(num_classes=2, precision=precision)
        modules, c = m.build(cfg, torch.device("cpu")), torch.arange(8) % 2
        G, D = modules["G"].eval(), modules["D"]
        m.seed_draws(0, 0, "test", 0)
        z, _, prior = m.draw_latents(cfg, 8, torch.arange(2))
        patch = m.sample_patch(cfg, 8, 0)
        image, _ = m.synthesize(G, z, c, prior, torch.full([8], 3), patch)
        with m.autocast(cfg, torch.device("cpu")):
            score = D(image, c, patch)[0]
        score.sum().backward()
        results.append([image.detach(), score.detach(), torch.cat([p.grad.flatten() for p in G.backbone.parameters()])])
    for exact, rounded in zip(*results):
        assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.1

@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_give_the_same_results_and_gradients():
    """Draws aside: compiled code draws its noise in another way."""
    cfg = micro(num_classes=2, compile=True, batch_size=8)
    modules, patch = m.build(cfg, torch.device("cpu")), m.sample_patch(cfg, 8, 0)
    batch = m.collate([m.ShapesData(cfg)[i] for i in range(8)])
    stats = m.Averages()
    m.training_step(cfg, modules, None, {**batch, "label": batch["label"] % 2}, torch.arange(2), 16, stats)
    log_ = stats.result(torch.device("cpu"))
    assert all(math.isfinite(log_[k]) for k in ("loss_g", "loss_d_fake", "r1"))
    G, D, image, w = modules["G"].backbone, modules["D"], torch.randn(8, 4, 8, 8), torch.randn(8, 8)
    for net, args in ((G, (w, "const")), (D, (image, torch.arange(8) % 2, patch))):
        results = []
        for call in (net.forward, net):    # as written, compiled
            net.zero_grad()
            out = call(*args)
            out = out if isinstance(out, torch.Tensor) else out[0]
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
        for plain, compiled in zip(*results, strict=True):
            assert float((compiled - plain).norm()) <= 1e-4 * float(plain.norm()) + 1e-7

def test_gradients_that_are_not_finite_are_replaced():
    layer = m.Linear(3, 1)
    layer.weight.grad = torch.tensor([[float("nan"), float("inf"), -float("inf")]])
    layer.bias.grad = torch.tensor([0.5])
    assert int(m.start_average(layer, torch.zeros(1))()[0]) == 3
    assert layer.weight.grad.tolist() == [[0, 1e5, -1e5]] and layer.bias.grad.tolist() == [0.5]

def test_frechet_distance_closed_forms():
    cov = torch.diag(torch.tensor([1.0, 4.0, 9.0])).double()
    mean = torch.zeros(3).double()
    assert m.frechet_distance((mean, cov), (mean, cov)) == pytest.approx(0, abs=1e-9)
    assert m.frechet_distance((mean, cov), (mean + 2, cov)) == pytest.approx(12)
    assert m.frechet_distance((mean, cov), (mean, 4 * cov)) == pytest.approx(1 + 4 + 9)    # sum of (2 s - s)²

def test_non_flatness_ends():
    wall, ramp = torch.full((1, 640), 1.0), torch.linspace(0.75, 1.2499, 6400)[None]
    assert float(m.non_flatness_score(wall, 0.75, 1.25)) == pytest.approx(1)
    assert float(m.non_flatness_score(ramp, 0.75, 1.25)) == pytest.approx(64, rel=1e-3)

def test_blur_keeps_constants_inside_and_is_off_at_the_end():
    image = torch.ones(1, 2, 32, 32)
    assert torch.allclose(m.blur(image, 2.0)[:, :, 8:24, 8:24], torch.ones(1, 2, 16, 16), atol=1e-5)
    assert m.blur(image, 0.2) is image

def test_teacher_is_the_timm_model(tmp_path):
    import timm
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    teacher = m.Teacher("test_resnet", str(tmp_path / "w.pth"))
    image = torch.rand(2, 3, 24, 24) * 2 - 1
    features = teacher(image)
    size = timm.data.resolve_model_data_config(model)
    x = (F.interpolate(image, size["input_size"][1:], mode="bicubic", antialias=True) + 1) / 2
    x = (x - torch.tensor(size["mean"]).view(3, 1, 1)) / torch.tensor(size["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, teacher.dim) and torch.allclose(features, expected, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.save({"other": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(m.UserError, match="not weights of test_resnet"):
        m.Teacher("test_resnet", str(tmp_path / "x.pth"))
    (tmp_path / "y.pth").write_bytes(b"nothing")
    with pytest.raises(m.UserError, match="y.pth"):
        m.Teacher("test_resnet", str(tmp_path / "y.pth"))
    with pytest.raises(m.UserError, match="no model"):
        m.Teacher("resnet_of_nobody")

# ----------------------------------------------------------------------------------------------------------------------
# Data

def photo(size=(40, 30), seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    image = PIL.Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize(size, PIL.Image.BICUBIC)
    return image.convert(mode)

def make_folder(root, classes=("cat", "dog"), each=10, depth=False):
    for k, c in enumerate(classes):
        (root / c).mkdir(parents=True)
        for i in range(each):
            photo(seed=100 * k + i).save(root / c / f"{i}.jpg")
            if depth:
                ramp = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (30, 1))
                PIL.Image.fromarray(ramp).save(root / c / f"{i}_depth.png")
    return root

def data_of(source, **changes):
    return m.ImageData(micro(**changes), source)

def test_shapes_are_a_function_of_the_index():
    cfg = m.make_config({})
    a, b = m.ShapesData(cfg)[5], m.ShapesData(cfg)[5]
    assert all(torch.equal(a[k], b[k]) for k in ("image", "depth", "true_depth", "camera")) and a["label"] == 5
    assert cfg.near < float(a["true_depth"].min()) and float(a["true_depth"].max()) <= cfg.far + 1e-6
    assert float(a["depth"].min()) == pytest.approx(-1, abs=1e-5) and float(a["depth"].max()) == pytest.approx(1, abs=1e-5)
    exact = m.ShapesData(dataclasses.replace(cfg, depth_distortion=0.0))[5]
    t = exact["true_depth"]
    assert torch.allclose(exact["depth"], 2 * (t - t.min()) / (t.max() - t.min()) - 1, atol=1e-4)
    flipped = m.MirroredData(m.ShapesData(cfg))[5 + 40_000]
    assert torch.equal(flipped["image"], a["image"].flip(-1)) and flipped["camera"][0] == -a["camera"][0]

def test_shapes_depth_agrees_with_its_camera():
    """Where the picture shows ground, the true depth and the true camera put the point on the ground."""
    data = m.ShapesData(dataclasses.replace(m.make_config({}), resolution=128))
    item = data[3]
    c = item["camera"][None]
    o, d = m.camera_rays(m.Camera(c[:, 0], c[:, 1], c[:, 2], torch.ones(1), c[:, 3:]), 128)
    points = (o + d * item["true_depth"].view(1, -1, 1)).view(128, 128, 3)
    assert (points[-1, :, 1] - data.GROUND).abs().max() < 2e-3                    # the lowest row is ground

def test_true_cameras_differ_from_the_prior_and_by_class():
    cameras = m.ShapesData(m.make_config({})).true_cameras(800)
    assert cameras[:, 0].std() == pytest.approx(0.35, abs=0.05)
    fov = [cameras[k::8, 2].mean() for k in range(8)]
    assert all(b - a > 1 for a, b in zip(fov, fov[1:]))

def test_folder_layouts(tmp_path):
    data = data_of(make_folder(tmp_path / "a"), depth="none")
    assert len(data) == 20 and data.num_classes == 2 and data[0]["image"].shape == (3, 16, 16)
    assert data[19]["label"] == 1 and "depth" not in data[0]
    flat = tmp_path / "flat"
    flat.mkdir()
    photo().save(flat / "x.png")
    assert data_of(flat, depth="none").num_classes == 0
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for p in sorted((tmp_path / "a").rglob("*.jpg")):
            z.write(p, p.relative_to(tmp_path / "a"))
    zipped = data_of(tmp_path / "a.zip", depth="none")
    assert zipped.names == data.names and torch.equal(zipped[3]["image"], data[3]["image"])

def test_published_layout(tmp_path):
    root = make_folder(tmp_path / "a", classes=("00000",), each=3, depth=True)
    labels = [[f"00000/{i}.jpg", 7 - i] for i in range(3)]
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    data = data_of(root)
    assert len(data) == 3 and data.num_classes == 8 and data[1]["label"] == 6
    depth = data[0]["depth"]
    assert depth.shape == (1, 16, 16) and float(depth.min()) == -1 and float(depth.max()) == 1
    assert (depth[0, 0, 1:] > depth[0, 0, :-1]).all()                             # the ramp: larger is farther
    (root / "dataset.json").write_text(json.dumps({"labels": labels[:2]}))
    with pytest.raises(m.UserError, match="2.jpg"):
        data_of(root)
    (root / "dataset.json").write_text("{")
    with pytest.raises(m.UserError, match="dataset.json"):
        data_of(root)

def test_every_mode_is_read(tmp_path):
    photo(mode="CMYK").save(tmp_path / "cmyk.jpg")
    photo().convert("P").save(tmp_path / "palette.png")
    transparent = PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    transparent.save(tmp_path / "alpha.png")
    PIL.Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "gray16.png")
    photo().save(tmp_path / "anim.gif")
    turned = photo((60, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    PIL.Image.new("RGB", (2000, 2), "red").save(tmp_path / "wide.png")
    data = data_of(tmp_path, depth="none")
    items = {n: data[i] for i, n in enumerate(data.names)}
    assert len(items) == 7 and not any(item["bad"] for item in items.values())
    assert (items["alpha.png"]["image"] == 255).all()                             # transparency over white
    assert (items["gray16.png"]["image"] == 40000 // 257).all()
    upright = m.crop_resize(turned.rotate(-90, expand=True), 16, PIL.Image.LANCZOS)
    assert np.abs(items["turned.jpg"]["image"].numpy().transpose(1, 2, 0).astype(int) - np.asarray(upright)).mean() < 3

def test_unreadable_images_are_skipped_and_counted(tmp_path, capsys):
    root = make_folder(tmp_path / "a")
    whole = (root / "cat" / "3.jpg").read_bytes()
    (root / "cat" / "3.jpg").write_bytes(whole[:len(whole) // 2])
    (root / "dog" / "0.jpg").write_text("not a picture")
    out = train_micro(tmp_path / "out", data=root, depth="none", kimg=0.048)
    err = capsys.readouterr().err
    assert err.count("cat/3.jpg") == 1 and err.count("dog/0.jpg") == 1
    assert [line["unreadable"] for line in log(out) if "unreadable" in line][-1] == 2
    for p in root.rglob("*.jpg"):
        p.write_text("not a picture")
    status, err = run_main(capsys, "--data", root, "--depth", "none", "--out", tmp_path / "all", *flags(**MICRO))
    assert status == 2 and "images in a row are unreadable" in err and err.count("\n") == 1

def test_too_many_unreadable_images_stop_the_run(tmp_path, capsys):
    root = make_folder(tmp_path / "a", classes=("c",), each=60)
    for i in range(20, 35):
        (root / "c" / f"{i}.jpg").write_text("not a picture")
    options = {**MICRO, "kimg": 1.2, "log_kimg": 4}         # a log interval beyond the first 1000 images
    status, err = run_main(capsys, "--data", root, "--depth", "none", "--out", tmp_path / "o", *flags(**options))
    assert status == 2 and "unreadable; mend" in err.splitlines()[-1]

# ----------------------------------------------------------------------------------------------------------------------
# Preparation of photographs

class Brightness(torch.nn.Module):
    """Stands for LeReS where not the network but what is around it is tested."""
    MEAN, STD, SIZE = (0, 0, 0), (1, 1, 1), 448

    def forward(self, x):
        return x.mean(1, keepdim=True)

@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file for --weights that yields `Brightness`"""
    monkeypatch.setattr(L, "load_leres", lambda path: Brightness())
    (tmp_path / "weights.pth").write_bytes(b"any")
    return tmp_path / "weights.pth"

def prepare(*argv):
    return L.main([str(a) for a in argv])

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def seeded_leres(backbone):
    """A state dict as the reference vectors draw it"""
    state = {}
    for name, v in L.LeReS(backbone).state_dict().items():
        r = torch.randn(v.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        kind = "weight4" if v.ndim == 4 else name.rsplit(".", 1)[1]
        state[name] = {"weight4": lambda: r * math.sqrt(2 / r[0].numel()), "running_var": lambda: 1 + 0.1 * r.abs(),
                       "running_mean": lambda: 0.1 * r, "weight": lambda: 1 + 0.1 * r, "bias": lambda: 0.05 * r,
                       "num_batches_tracked": lambda: torch.zeros_like(v)}[kind]()
    return state

def test_photographs_to_training_with_a_checkpoint_of_the_released_format(tmp_path, capsys):
    root, file = make_folder(tmp_path / "photos", each=4), tmp_path / "res50.pth"
    state = {"module." + k: v for k, v in seeded_leres("resnet50").items()}
    torch.save({"depth_model": state}, file)
    assert prepare(root, tmp_path / "out", "--resolution", 16, "--weights", file, "--batch", 4) == 0
    out = contents(tmp_path / "out")
    assert json.loads(out["dataset.json"])["labels"] == [[f"{c}/{i}.png", k] for k, c in enumerate(("cat", "dog"))
                                                         for i in range(4)]
    assert out["skipped.txt"] == b"" and {"depth.png", "dog/3.png", "dog/3_depth.png"} <= set(out) and len(out) == 20
    depth = m.read_depth(out["cat/0_depth.png"])
    assert (depth.min(), depth.max(), depth.shape) == (0, 65535, (16, 16))
    train_micro(tmp_path / "run", "--data", str(tmp_path / "out"), kimg=0.016)
    assert prepare(root, tmp_path / "out", "--weights", file) == 2 and "is there already" in capsys.readouterr().err
    key = "module.decoder_modules.conv1.bias"
    torch.save({"depth_model": {**{k: v for k, v in state.items() if k != key}, "module.extra": state[key]}}, file)
    assert prepare(root, tmp_path / "out2", "--weights", file) == 2
    err = capsys.readouterr().err
    assert "the first is decoder_modules.conv1.bias" in err and "1 unexpected, the first is extra" in err
    assert err.count("\n") == 1 and not (tmp_path / "out2").exists()

def test_estimated_depth_has_the_images_size_and_starts_at_one_hundredth():
    depth = L.estimate_depth(Brightness(), torch.rand(2, 3, 30, 50))
    assert depth.shape == (2, 1, 30, 50) and float(depth.min()) >= 0.01 - 1e-6
    ramp = torch.linspace(0, 1, 448).expand(1, 3, 448, -1)
    assert torch.allclose(L.estimate_depth(Brightness(), ramp)[0, 0, 0], ramp[0, 0, 0] + 0.01, atol=1e-4)

def test_all_that_can_be_read_is_prepared(tmp_path, weights):
    source = tmp_path / "nasty"
    source.mkdir()
    photo((500, 300)).save(source / "whole.jpg")
    (source / "cut.jpg").write_bytes((source / "whole.jpg").read_bytes()[:2000])
    photo(mode="CMYK").save(source / "cmyk.jpg")
    photo().convert("P").save(source / "palette.png", transparency=3)
    PIL.Image.fromarray(np.full((8, 9), 40000, np.uint16)).save(source / "gray16.png")
    photo().save(source / "anim.gif")
    exif = photo().getexif()
    exif[0x0112] = 6
    photo((60, 20)).save(source / "turned.jpg", exif=exif, quality=95, subsampling=0)
    (source / "text.jpg").write_text("not a picture")
    (source / "empty.png").write_bytes(b"")
    PIL.Image.new("RGB", (20_000, 20), "red").save(source / "wide.png")
    photo().save(source / "Übergröße 猫.jpg")
    photo().save(source / "whole.png")                                                     # the same name twice
    assert prepare(source, tmp_path / "out.zip", "--resolution", 32, "--weights", weights) == 0
    skipped = (tmp_path / "out.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["cut.jpg", "empty.png", "text.jpg"]
    data = m.ImageData(micro(resolution=32), tmp_path / "out.zip")
    assert len(data) == 9 and data.num_classes == 0 and {"whole.png", "whole_png.png", "Übergröße 猫.png"} <= set(data.names)
    assert not any(data[i]["bad"] for i in range(9)) and (tmp_path / "out.depth.png").exists()
    turned = data[data.names.index("turned.png")]["image"].float().mean(0)
    upright = m.crop_resize(photo((60, 20)).rotate(-90, expand=True), 32, PIL.Image.LANCZOS)
    assert np.abs(turned.numpy() - np.asarray(upright).mean(-1)).mean() < 4 and not (tmp_path / "out.unfinished").exists()

@pytest.mark.parametrize("name", ["../evil.png", "/evil.png"])
def test_archives_that_lead_out_are_refused(tmp_path, capsys, weights, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z:
        z.writestr(name, b"")
    assert prepare(tmp_path / "bad.zip", tmp_path / "out", "--weights", weights) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "out").exists()

def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path):
    """With ready maps, in two processes that share the work; once undisturbed in one process, once killed."""
    root = make_folder(tmp_path / "photos", each=60, depth=True)
    (root / "cat" / "broken.jpg").write_text("not a picture")
    maps = tmp_path / "maps"
    for p in root.rglob("*_depth.png"):
        (maps / p.parent.name).mkdir(parents=True, exist_ok=True)
        p.rename(maps / p.parent.name / p.name)
    argv = [root, "--depth-from", maps, "--resolution", 64, "--batch", 4, "--workers", 1]
    assert prepare(argv[0], tmp_path / "a", *argv[1:]) == 0

    def start():
        return [subprocess.Popen([sys.executable, HERE / "lereS_depth.py", root, tmp_path / "b", *map(str, argv[1:])],
                                 env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"},
                                 start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
                for r in range(2)]
    started = start()
    while len(list((tmp_path / "b").rglob("*_depth.png"))) < 10:
        time.sleep(0.01)
    for p in started:
        os.killpg(p.pid, signal.SIGKILL)
    assert len(list((tmp_path / "b").rglob("*.png"))) < 240
    assert [p.wait() for p in start()] == [0, 0]
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(contents(tmp_path / "a")) == 2 * 120 + 4

def test_ready_depth_maps_of_any_kind(tmp_path):
    photos, maps = tmp_path / "photos", tmp_path / "maps"
    photos.mkdir(), maps.mkdir()
    for name in ("a", "b", "c"):
        photo((80, 40)).save(photos / f"{name}.jpg")
    ramp = np.linspace(1, 4, 80)[None].repeat(40, 0)
    np.save(maps / "a.npy", ramp)
    PIL.Image.fromarray((ramp * 60).round().astype(np.uint8)).resize((160, 80)).save(maps / "b.png")
    read = lambda out, name: m.read_depth((tmp_path / out / f"{name}_depth.png").read_bytes())[7]
    for out, flags_ in (("plain", []), ("inverse", ["--invert"])):
        assert prepare(photos, tmp_path / out, "--depth-from", maps, "--resolution", 40, *flags_) == 0
        assert (tmp_path / out / "skipped.txt").read_text().startswith("c.jpg\tFileNotFoundError: no depth")
        d = ramp[0, 20:60] if out == "plain" else 1 / ramp[0, 20:60]                       # the middle of the photograph
        expected = (d - d.min()) / (d.max() - d.min()) * 65535
        assert np.abs(read(out, "a") - expected).max() < 300 and np.abs(read(out, "b") - expected).max() < 1200

def test_16_bit_gray_and_alpha_is_read_at_full_precision():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 2)).astype(">u2")
    rows = b"".join(b"\x00" + row.tobytes() for row in values)
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", (7).to_bytes(4, "big") + (5).to_bytes(4, "big") + b"\x10\x04\0\0\0")
           + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert np.array_equal(m.read_depth(png), values[..., 0].astype(np.float32))

def test_instance_selection_keeps_the_typical(tmp_path, weights, monkeypatch):
    teacher = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())       # mean colour
    teacher.dim = 3
    monkeypatch.setattr(m, "Teacher", lambda name, file: teacher)
    root = tmp_path / "photos"
    for c, typical, odd in (("red", (200, 20, 20), (20, 20, 200)), ("blue", (20, 20, 200), (200, 20, 20))):
        (root / c).mkdir(parents=True)
        for i in range(10):
            PIL.Image.new("RGB", (20, 20), odd if i == 3 else tuple(v + i for v in typical)).save(root / c / f"{i}.png")
    (root / "red/x.jpg").write_text("not a picture")
    assert prepare(root, tmp_path / "out", "--resolution", 16, "--weights", weights, "--keep", 0.85) == 0
    kept = (tmp_path / "out/kept.txt").read_text().splitlines()
    assert (tmp_path / "out/skipped.txt").read_text().startswith("red/x.jpg\tUnidentifiedImageError")
    assert len(kept) == 18 and not {"red/3.png", "blue/3.png"} & set(kept)
    assert len(m.ImageData(micro(), tmp_path / "out")) == 18

def test_weights_are_downloaded_resumed_and_checked(tmp_path, monkeypatch, capsys):
    body, ranges = bytes(range(256)) * 1000, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            ranges.append(first)
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            self.wfile.write(body[first:] if first else body[:100_000])                    # the first time it breaks off

        def log_message(self, *_):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(L, "URL", f"http://127.0.0.1:{server.server_port}/res101.pth")
    monkeypatch.setattr(L, "SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(m.UserError, match="--weights FILE"):
        L.find_weights("")
    assert "non-commercial" in capsys.readouterr().err
    assert L.find_weights("").read_bytes() == body and ranges == [0, 100_000]
    assert L.find_weights("").read_bytes() == body and len(ranges) == 2                    # from the cache
    monkeypatch.setattr(L, "SHA256", "0" * 64)
    (tmp_path / "checkpoints/leres_res101.pth").unlink()
    body = body[:90_000]
    with pytest.raises(m.UserError, match="SHA-256"):
        L.find_weights("")
    server.shutdown()
    with pytest.raises(m.UserError, match="cannot download http://127.0.0.1"):
        L.find_weights("")

def test_training_on_raw_photographs_prepares_them_once(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    root = make_folder(tmp_path / "data")                                                  # the result lies within
    for run in ("one", "two"):
        train_micro(tmp_path / run, "--data", str(root), "--depth-weights", str(weights), kimg=0.016)
        assert ("network" in capsys.readouterr().out) == (run == "one")                    # the last line of a preparation
    assert len(list((tmp_path / "data").iterdir())) == 3 and (tmp_path / "one/reals.png").exists()

def test_batches_are_the_same_however_they_are_split():
    cfg = micro()
    def take(rank, world, step, n):
        it = iter(m.Batches(cfg, 50, step, rank, world))
        return [next(it) for _ in range(n)]
    whole = take(0, 1, 0, 13)
    halves = zip(take(0, 2, 0, 13), take(1, 2, 0, 13))
    assert whole == [a + b for a, b in halves]
    assert whole[5:] == take(0, 1, 5, 8)                                          # a resumed run
    flat = sum(whole, [])
    assert sorted(flat[:100]) == list(range(100))                                 # an epoch: the data and its mirror image

# ----------------------------------------------------------------------------------------------------------------------
# Training

def test_two_processes_and_one_give_the_same_gradients(tmp_path):
    """Adam with beta1 = 0 keeps the last gradient as its first moment, so a checkpoint after one step shows it."""
    options = {**MICRO, "kimg": 0.016, "data": "shapes", "teacher_dim": 0}
    one = train_micro(tmp_path / "one", kimg=0.016)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--out",
                    tmp_path / "two", *flags(**options)], check=True, env=env, capture_output=True, timeout=300)
    a, b = checkpoint(one), checkpoint(tmp_path / "two")
    for opt in ("opt_g", "opt_d"):
        for (k, x), y in zip(flatten(a[opt]).items(), flatten(b[opt]).values()):
            if k.endswith("exp_avg"):
                assert (x - y).abs().max() <= 1e-4 * max(1e-3, float(x.abs().max())), k
        assert any(float(x.abs().max()) > 1e-3 for k, x in flatten(a[opt]).items() if k.endswith("exp_avg"))
    assert torch.allclose(a["G"]["mapping_network.w_avg"], b["G"]["mapping_network.w_avg"], atol=1e-6)
    lines = [line for line in log(tmp_path / "two") if "loss_g" in line]
    assert lines[0]["loss_g"] == pytest.approx([line for line in log(one) if "loss_g" in line][0]["loss_g"], rel=1e-4)

def test_a_resumed_run_ends_with_identical_weights(tmp_path):
    whole = train_micro(tmp_path / "whole", kimg=0.064)
    half = train_micro(tmp_path / "half", kimg=0.032)
    assert m.main(["--resume", "latest", "--out", str(half), "--kimg", "0.064"]) == 0
    a, b = checkpoint(whole), checkpoint(half)
    fa, fb = flatten({k: a[k] for k in ("G", "D", "G_ema", "opt_g", "opt_d")}), flatten({k: b[k] for k in ("G", "D", "G_ema", "opt_g", "opt_d")})
    assert fa.keys() == fb.keys() and len(fa) > 100
    assert all(torch.equal(fa[k], fb[k]) for k in fa)
    assert a["step"] == b["step"] == 4
    strip = lambda out: [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "memory_mb")} for line in log(out)]
    assert strip(whole) == strip(half)

def test_run_folder_has_everything(tmp_path):
    out = train_micro(tmp_path / "run", kimg=0.032, metrics="fid32,nfs8", detector="area8", reals=32)
    names = {p.name for p in out.iterdir()}
    assert names == {"config.json", "log.jsonl", "reals.png", "checkpoint-000000.000.pt", "checkpoint-000000.032.pt", "samples-000000.000.png",
                     "samples-000000.032.png", "metrics.jsonl", "best.pt"}
    assert json.loads((out / "config.json").read_text())["num_classes"] == 8
    with PIL.Image.open(out / "samples-000000.032.png") as image:
        assert image.width >= 16 * 96 and image.height == image.width // 2         # 4 scenes of 4 views; RGB over depth
    line = [line for line in log(out) if "loss_g" in line][-1]
    assert set(line) >= {"kimg", "images_per_second", "seconds", "memory_mb", "loss_g", "loss_d_fake", "loss_d_real",
                         "score_real", "score_fake", "camera_mean", "camera_std", "camera_emd", "depth_choice", "near_offset",
                         "schedules", "nonfinite_g", "nonfinite_d"}
    assert math.isfinite(log(out)[0]["r1"])
    assert [set(x) >= {"fd32[area8]", "nfs8", "camera_w1_posterior", "camera_w1_prior", "depth_error_raw", "depth_error_render",
                       "depth_error_adapted"} for x in log(out, "metrics")] == [True, True]

def test_distillation_pulls_the_features_to_the_teacher(tmp_path):
    import timm
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "w.pth")
    root = make_folder(tmp_path / "a")
    out = train_micro(tmp_path / "run", data=root, depth="none", kimg=0.64, teacher="test_resnet",
                      teacher_weights=tmp_path / "w.pth")
    distances = [line["kd_distance"] for line in log(out) if "kd_distance" in line]
    assert len(distances) == 40 and np.mean(distances[-5:]) < 0.8 * np.mean(distances[:5])

@pytest.mark.parametrize("options", [dict(camera="prior"), dict(camera="frontal"), dict(camera_reg="grad"),
                                     dict(camera_reg="none"), dict(depth="none"), dict(precision="bf16"),
                                     dict(depth_adaptor="half")], ids=str)
def test_every_mechanism_can_be_switched(tmp_path, options):
    out = train_micro(tmp_path / "run", kimg=0.032, **options)
    for line in log(out):
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        assert line.get("nonfinite_g", 0) == line.get("nonfinite_d", 0) == 0
    assert ("camera_emd" in log(out)[-1]) == (options.get("camera", "learned") == "learned")

def test_the_tiny_preset_learns(tmp_path):
    """Forty steps of the default job: the distance to the data falls by a factor of 2.5 at least (measured: 3.8)."""
    assert m.main(["--out", str(tmp_path / "run"), *flags(kimg=0.32, metrics="fid128", reals=128, workers=1)]) == 0
    first, last = [line["fd128[area8]"] for line in log(tmp_path / "run", "metrics")]
    assert last < first / 2.5

def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    argv = [sys.executable, SCRIPT, "--out", tmp_path / "run", *flags(**{**MICRO, "workers": 1})]
    p = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "run" / "log.jsonl").exists():
            break
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and "Traceback" not in err and "stopped" in out
    state = checkpoint(tmp_path / "run")
    assert 0 < state["step"] < 100_000
    kimg = (state["images"] + 32) / 1000
    assert m.main(["--resume", "latest", "--out", str(tmp_path / "run"), "--kimg", str(kimg)]) == 0
    assert checkpoint(tmp_path / "run")["step"] == state["step"] + 2

def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, capsys):
    out = train_micro(tmp_path / "run", kimg=0.016)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(obj, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    status, err = run_main(capsys, "--resume", "latest", "--out", out, "--kimg", 0.032)
    assert status == 2 and "No space left on device" in err.splitlines()[-1]
    assert (out / "checkpoint-000000.016.pt").read_bytes() == before["checkpoint-000000.016.pt"]
    assert not list(out.glob(".*tmp")) and not (out / "checkpoint-000000.032.pt").exists()

# ----------------------------------------------------------------------------------------------------------------------
# Metrics by the textbook, eval, sample, report

class Stub(torch.nn.Module):
    """A detector in the field's format: 6 features, 5 class probabilities."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        assert x.dtype == torch.uint8
        f = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)[:, :6]
        return f if return_features else (3 * f[:, :5]).softmax(1)

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps, with its own cache of statistics."""
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("home"))
    out = tmp_path_factory.mktemp("runs") / "run<1>"
    torch.jit.script(Stub()).save(str(out.parent / "stub.pt"))
    yield train_micro(out, kimg=0.048, metrics="fid16,nfs8", detector="area8", reals=16, metrics_kimg=0.016)
    del os.environ["TORCH_HOME"]

@pytest.mark.parametrize("n, dim", [(300, 8), (20, 32)])
def test_metrics_are_the_textbooks(n, dim):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(n, dim)), rng.normal(size=(n, dim)) * 1.3 + 0.2
    x, y = (torch.from_numpy(v).float() for v in (a, b))
    # FID: the trace of the root of a product is the sum of the roots of its eigenvalues
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real.sum()
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert m.frechet_distance(m.gaussian(x), m.gaussian(y)) == pytest.approx(fid, rel=1e-3)
    # KID: sums over pairs, one by one
    k = lambda u, v: (u @ v / dim + 1) ** 3
    within = lambda v: sum(k(v[i], v[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    kid = within(a) + within(b) - 2 * sum(k(u, v) for u in a for v in b) / n ** 2
    assert m.kernel_distance(x, y, subsets=3) == pytest.approx(kid, rel=1e-3)
    # precision and recall
    distances = lambda u, v: np.sqrt(((u[:, None] - v[None]) ** 2).sum(-1))
    inside = lambda u, v: np.mean([(d <= np.sort(distances(v, v), 1)[:, 3]).any() for d in distances(u, v)])
    assert m.precision_recall(x, y) == pytest.approx((inside(b, a), inside(a, b)))
    # inception score
    p = np.exp(a) / np.exp(a).sum(1, keepdims=True)
    scores = [np.exp(np.mean([sum(q * np.log(q / part.mean(0))) for q in part])) for part in np.array_split(p, 10)]
    assert m.inception_score(torch.from_numpy(p)) == pytest.approx(np.mean(scores), rel=1e-3)

def test_collected_statistics_do_not_need_all_features():
    x = torch.randn(50, 3)
    rows, mean, cov = m.collect(x.split(16), 50, 20, 0, 1)
    assert torch.equal(rows, x[:20]) and torch.allclose(mean.float(), x.mean(0), atol=1e-6)
    assert torch.allclose(cov.float(), x.t().cov(), atol=1e-5)
    for n, world in ((7, 2), (8, 3), (2, 4)):
        parts = [m.share(n, rank, world) for rank in range(world)]
        assert len({len(p) for p in parts}) == 1 and {i for p in parts for i in p} == set(range(n))

def test_eval_on_two_processes_gives_what_one_gives(run, capsys, tmp_path):
    """fid and its kin with a detector in the field's format; other networks' numbers carry their name."""
    argv = ["eval", "--resume", str(run), "--metrics", "fid33,kid33,is33,pr33,nfs9", "--reals", "41", "--detector"]
    assert m.main([*argv, str(run.parent / "stub.pt")]) == 0
    one = log(run, "metrics")[-1]
    shutil.rmtree(Path(os.environ["TORCH_HOME"]) / "hub" / "3dgp")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *argv,
                    run.parent / "stub.pt"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                   timeout=300)
    two = log(run, "metrics")[-1]
    assert len(log(run, "metrics")) >= 2 and one.keys() == two.keys()
    assert {"fd33[stub]", "kd33[stub]", "score33[stub]", "precision33[stub]", "nfs9", "camera_w1_prior"} <= one.keys()
    for name, value in one.items():
        assert two[name] == (value if name == "data" else pytest.approx(value, rel=1e-4, abs=1e-7)), name
    shutil.copy(run.parent / "stub.pt", tmp_path / "inception-2015-12-05.pt")           # the field's own file
    capsys.readouterr()
    assert m.main([*argv, str(tmp_path / "inception-2015-12-05.pt")]) == 0
    assert log(run, "metrics")[-1]["fid33"] == pytest.approx(one["fd33[stub]"], rel=1e-6)
    assert " fid33 " in capsys.readouterr().out

def test_eval_needs_a_metric(run, capsys):
    status, err = run_main(capsys, "eval", "--resume", run, "--metrics", "", "--detector", "area8")
    assert status == 2 and "--metrics : must be fid" in err

def test_real_statistics_are_kept_until_the_data_change(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    root, reads = make_folder(tmp_path / "a", each=8), []
    cfg = micro(depth="none")
    monkeypatch.setattr(m.ImageData, "decode", lambda self, i, real=m.ImageData.decode: reads.append(i) or real(self, i))
    statistics = lambda: m.real_statistics(cfg, m.ImageData(cfg, root), m.Detector("area8", "cpu"), torch.device("cpu"), 0, 8, 0, 1)
    first = statistics()
    assert len(reads) == 2 * 16 and first[0].shape == (8, 192)                          # all, and their mirror images
    assert all(torch.equal(a, b) for a, b in zip(first, statistics())) and len(reads) == 32
    photo(seed=999).save(root / "cat" / "0.jpg")
    assert not torch.equal(first[1], statistics()[1]) and len(reads) == 64

def test_the_best_checkpoint_is_kept(run):
    lines = [x for x in log(run, "metrics") if "fd16[area8]" in x]
    assert [x["kimg"] for x in lines] == [0, 0.016, 0.032, 0.048]
    best = min(lines, key=lambda x: x["fd16[area8]"])
    assert torch.load(run / "best.pt", weights_only=True)["images"] == round(1000 * best["kimg"])

def test_sample_writes_what_was_asked_for(run, tmp_path):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    options = dict(resume=run, out=tmp_path, seeds="3,5-6", frames=3, mesh_resolution=12, video="wiggle")
    G, *_ = m.load_generator(m.SampleConfig(resume=str(run)))
    level = 0.9 * float(F.softplus(G.decoder.model[1].effective()[1][3]).detach())
    assert m.main(["sample", *flags(**options, classes="1-2", mesh_level=level), "--mesh", "--points", "--depth", "--cameras", "--interpolate"]) == 0
    names = [f"class{c:04d}-seed{s:04d}" for c in (1, 2) for s in (3, 5, 6)]
    kinds = ["mesh.ply", "points.ply", "depth.png", "adapted.png"]
    films = {f"walk.{k}" for k in ("webp", "gif", *["mp4"] * bool(shutil.which("ffmpeg")))}
    assert {p.name for p in tmp_path.iterdir()} == {"grid.png", "cameras.png", *films, *(f"{n}-{k}" for n in names for k in kinds)}
    with PIL.Image.open(tmp_path / "walk.webp") as film, PIL.Image.open(tmp_path / f"{names[0]}-depth.png") as depth:
        assert film.n_frames == 6 * 3 and film.width == 2 * film.height                # RGB beside depth
        assert depth.mode.startswith("I") and depth.size == (16, 16)
    points, colors, _ = read_ply(tmp_path / f"{names[0]}-points.ply")
    assert points.shape == (256, 3) and colors.std() > 0
    assert m.main(["sample", *flags(**{**options, "out": tmp_path / "each", "video": "orbit", "seeds": "5", "resolution": 32}), "--each"]) == 0
    with PIL.Image.open(tmp_path / "grid.png") as grid, PIL.Image.open(tmp_path / "each" / f"{names[1]}.png") as single:
        assert grid.size == (3 * 96, 2 * 96) and single.size == (96, 96)
    assert len(list((tmp_path / "each").glob("*-orbit.webp"))) == 8 and not (tmp_path / "each" / "grid.png").exists()

def test_mesh_without_scikit_image_asks_for_it(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    status, err = run_main(capsys, "sample", "--resume", run, "--out", tmp_path, "--mesh")
    assert status == 2 and err.splitlines()[-1].endswith("--mesh: needs scikit-image; pip install scikit-image")

def test_truncation_draws_to_the_mean_of_the_class(run, tmp_path, monkeypatch):
    seen, forward = [], m.TriplaneBackbone.forward
    monkeypatch.setattr(m.TriplaneBackbone, "forward", lambda self, w, **kind: seen.append(w) or forward(self, w, **kind))
    for truncation in (0, 0.5, 1):
        assert m.main(["sample", *flags(resume=run, out=tmp_path, truncation=truncation, classes="0,4", seeds="1-2")]) == 0
    mean, half, whole = torch.stack(seen).view(3, 2, 2, 8)                              # class, seed, w
    assert torch.equal(mean[:, 0], mean[:, 1]) and (mean[0] - mean[1]).abs().max() > 0.1   # each class has its own
    assert torch.allclose(half, (mean + whole) / 2, atol=1e-6) and (whole[:, 0] - whole[:, 1]).abs().max() > 0.1
    G, *_ = m.load_generator(m.SampleConfig(resume=str(run)))
    for k, c in enumerate((0, 4)):
        assert torch.allclose(mean[k, 0], G.mapping(torch.randn(20_000, 8), torch.full((20_000,), c)).mean(0), atol=0.1)

def read_ply(path):
    """-> vertices (V, 3), colours (V, 3), faces (M, 3)"""
    header, body = Path(path).read_bytes().split(b"end_header\n", 1)
    V, M = (int(line.split()[-1]) for line in header.decode().splitlines() if line.startswith("element"))
    vertex = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)], V)
    face = np.frombuffer(body[V * 15:], [("n", "u1"), ("v", "<i4", 3)], M)
    assert len(body) == V * 15 + M * 13 and (face["n"] == 3).all()
    return vertex["xyz"], vertex["rgb"], face["v"]

def ball(radius=0.15, sharp=20000.0):
    """A generator whose planes hold a ball: the decoder's density is steep in radius² - |x|², its colours a ramp."""
    G = m.Generator(micro(coarse_samples=64, fine_samples=64, triplane_resolution=64)).eval().requires_grad_(False)
    line = torch.linspace(-0.5, 0.5, 64)
    first, second = line.view(1, 64).expand(64, 64), line.view(64, 1).expand(64, 64)   # width, height
    squares = first ** 2 + second ** 2
    planes = torch.stack([torch.stack([1.5 * squares / 2, first, second, 0 * first]) for _ in range(3)])[None]
    # means of the planes: |x|² / 2, (2x + y) / 3, (y + 2z) / 3
    gain, W1, W2 = math.sqrt(2), G.decoder.model[0], G.decoder.model[1]
    for layer in (W1, W2):
        layer.weight.zero_()
        layer.bias.zero_()
    for row, (feature, weight, bias) in enumerate([(0, -1.0, radius ** 2 / 2), (1, 1.0, 1.0), (2, 1.0, 1.0)]):
        W1.weight[row, feature] = weight * math.sqrt(4) / gain
        W1.bias[row] = bias / gain
    W2.weight[3, 0], W2.weight[0, 1], W2.weight[1, 2] = sharp * 8, 32.0, 32.0
    W2.bias[:2] = -4.0
    return G, planes

def test_mesh_of_a_ball_is_closed_outward_and_renders_to_its_depth():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    (G, planes), cam = ball(), camera(yaw=0.3, pitch=1.3, fov=25)
    vertices, _, faces = m.extract_mesh(G, planes, cam, 60.0, 96)
    radius = math.sqrt(0.15 ** 2 - 2 * 60 / 20000)                                      # where the density is 60
    assert np.linalg.norm(vertices, axis=1) == pytest.approx(radius, abs=0.003)
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()                # watertight
    a, b, c = (vertices[faces[:, i]].astype(float) for i in range(3))
    assert np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6 == pytest.approx(4 / 3 * math.pi * radius ** 3, rel=0.02)   # outwards
    rgb, depth = G.render(planes, cam, 65)
    pose = m.cam2world(cam)[0].numpy()
    p = (vertices - pose[:3, 3]) @ pose[:3, :3]                                         # in the camera's frame
    facing = np.einsum("ij,ij->i", vertices, pose[:3, 3] - vertices) > 0.3 * radius
    focal = 1 / math.tan(math.radians(12.5))
    u, v = ((s * p[facing, k] / -p[facing, 2] * focal + 1) * 32 for k, s in ((0, 1), (1, -1)))
    rendered = depth[0, 0].numpy()[v.round().astype(int), u.round().astype(int)]
    assert np.median(abs(rendered - np.linalg.norm(p[facing], axis=1))) < 0.01
    with pytest.raises(m.UserError, match="--mesh-level"):
        m.extract_mesh(G, planes, cam, 1e6, 32)

def test_what_no_ray_saw_is_not_in_the_mesh():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    (G, planes), cam = ball(radius=0.4), camera()
    vertices, _, _ = m.extract_mesh(G, planes, cam, 60.0, 48)
    distance = np.linalg.norm(vertices - m.cam2world(cam)[0, :3, 3].numpy(), axis=1)
    assert 0.73 < distance.min() < 0.78 and distance.max() < 1.27

def reprojection_psnr(G, planes, a, b, R):
    """Colours of the view from b, found in the view from a by b's depth, against themselves; dB."""
    (rgb_a, depth_a), (rgb_b, depth_b) = (G.render(planes, c, R) for c in (a, b))
    origins, directions = m.camera_rays(b, R)
    points = origins + directions * depth_b.flatten(2).transpose(1, 2)
    pose = m.cam2world(a)
    p = (points - pose[:, None, :3, 3]) @ pose[:, :3, :3]
    xy = p[..., :2] / -p[..., 2:] / (a.fov.view(-1, 1, 1) * math.pi / 360).tan()
    grid = (xy * torch.tensor([1.0, -1.0])).view(1, R, R, 2)
    found = F.grid_sample(torch.cat([rgb_a, depth_a], 1), grid, align_corners=True)
    seen = (grid.abs() < 1).all(-1) & ((found[:, 3] - p.norm(dim=2).view(1, R, R)).abs() < 0.02)     # not hidden in a
    error = (found[:, :3].clamp(-1, 1) - rgb_b.clamp(-1, 1)).square().mean(1)[seen].mean() / 4
    return -10 * math.log10(float(error)), float(seen.float().mean())

@pytest.mark.parametrize("kind", ["orbit", "wiggle", "line", "zoom"])
def test_animations_start_and_end_at_the_mean_camera_and_are_consistent(kind):
    (G, planes), start = ball(), camera(pitch=1.4, fov=25)
    path = m.camera_path(kind, start, 48, 0.4)
    parameters = m.camera_parameters(path)
    assert torch.allclose(parameters[0], m.camera_parameters(start)[0], atol=1e-5)
    steps = (parameters.roll(-1, 0) - parameters).abs()
    assert (parameters[:, :2] - parameters[0, :2]).abs().max() <= 0.4 + 1e-5 and steps[:, :2].max() < 0.1 and steps.max() < 1
    for i in (0, 12, 30):
        psnr, seen = reprojection_psnr(G, planes, m.rows(path, i, i + 1), m.rows(path, i + 1, i + 2), 64)
        assert psnr > 30 and seen > 0.15

def test_render_does_not_depend_on_the_chunk_and_the_cut_is_the_median():
    G = m.Generator(micro()).eval()
    planes = torch.randn(2, 3, 4, 16, 16)
    with torch.no_grad():
        whole = torch.cat(G.render(planes, camera(2), 16), 1)
        parts = torch.cat(G.render(planes, camera(2), 16, chunk=77), 1)
        assert torch.allclose(whole, parts, atol=1e-6)
        rgb, sigma, depths = G.sample_rays(m.channels_last(planes), *m.camera_rays(camera(2), 16))
        sigma = F.softplus(sigma)
        kept = torch.where(sigma < sigma.flatten(1).median(1).values.view(2, 1, 1), 0, sigma)
        raw = torch.where(kept > 0, (kept.clamp(min=1e-20).expm1()).log(), torch.tensor(-math.inf))
        expected = m.march_rays(rgb, raw, depths)[1].view(2, 1, 16, 16)
        for chunk in (2 ** 14, 100):
            assert torch.allclose(G.render(planes, camera(2), 16, chunk=chunk, cut=True)[1], expected, atol=1e-4)
        assert (expected - whole[:, 3:]).abs().max() > 1e-3

def test_report_is_one_page_that_escapes_what_it_shows(run, tmp_path):
    with open(run / "log.jsonl", "a") as f:
        f.write('{"kimg": 0.05, "<script>alert(1)</script>": 3, "loss_g": NaN}\n{"kimg": 0.06, "loss')
    assert m.main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "run&lt;1&gt;" in page and "run<1>" not in page and "<script>alert" not in page and "http" not in page
    for title in ("loss_g", "fd16[area8]", "images_per_second", "look_at_radius", "z_dim"):
        assert title in page
    assert page.count("data:image/png;base64,") == len(list(run.glob("samples-*.png")))
    assert "nan" not in "".join(re.findall(r"points='([^']*)'", page))

def test_a_damaged_or_foreign_checkpoint_is_one_line_and_runs_nothing(run, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    whole = (run / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"config": Evil(), **dict.fromkeys(("step", "images", "seconds", "G", "D", "G_ema", "opt_g", "opt_d"), 0)}, tmp_path / "evil.pt")
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "z_dim": 12}}, tmp_path / "other.pt")
    torch.save({**state, "config": {**state["config"], "resolution": "many"}}, tmp_path / "odd.pt")
    torch.save({"G_ema": {}}, tmp_path / "foreign.pt")
    for name in ("cut", "evil", "other", "odd", "foreign"):
        for mode in ("sample", "eval"):
            status, err = run_main(capsys, mode, "--resume", tmp_path / f"{name}.pt")
            assert status == 2 and err.count("\n") == 1 and f"{name}.pt" in err, (name, err)
    assert not (tmp_path / "ran").exists()

# ----------------------------------------------------------------------------------------------------------------------
# A month of training: divergence, preemption, damaged files, processes that die or hang

slow = pytest.mark.skipif(not os.environ.get("SLOW_TESTS"), reason="takes minutes: set SLOW_TESTS=1 and name it by -k")
STATE = ("G", "D", "G_ema", "opt_g", "opt_d")

def start(out, rank=0, world=1, port=0, prefix=(), env=(), **options):
    """A training process as torchrun starts it."""
    env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **dict(env)}
    return subprocess.Popen([*prefix, sys.executable, SCRIPT, "--out", out, *flags(**{**MICRO, **options})],
                            env={k: str(v) for k, v in env.items()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def start_two(out, each=({}, {}), **options):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [start(out, rank, 2, port, **{**options, **each[rank]}) for rank in (0, 1)]

def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)

def has_lines(out, n=1):
    path = Path(out) / "log.jsonl"
    return lambda: path.exists() and len(path.read_text().splitlines()) >= n

def spoil(monkeypatch, how, at=12, times=1):
    """Damages one training step after the `at`-th, `times` times in all; a run that goes on is not damaged again."""
    real, left = m.training_step, [times]
    def step(cfg, modules, teacher, batch, labels, number, stats, stop=False):
        if number >= at and left[0]:
            left[0] -= 1
            if how == "nan":
                batch = {**batch, "image": batch["image"].float() * math.nan}
            elif how == "lr":
                cfg = dataclasses.replace(cfg, g_lr=100 * cfg.g_lr, d_lr=100 * cfg.d_lr)
            elif how == "scale":
                with torch.no_grad():
                    for p in modules["D"].parameters():
                        p.mul_(5)
        return real(cfg, modules, teacher, batch, labels, number, stats, stop)
    monkeypatch.setattr(m, "training_step", step)

HEALTHY = dict(loss_g=1.5, loss_d_real=0.4, loss_d_fake=0.4, score_real=1.0, score_fake=-1.0, fake_std=0.4, r1=0.2,
               nonfinite_g=0.0, nonfinite_d=0.0)

@pytest.mark.parametrize("change, reason", [
    (dict(nonfinite_g=2000), "2% of the gradients"), (dict(nonfinite_d=60), "6% of the gradients"),
    (dict(loss_d_real=math.nan), "not finite"), (dict(score_fake=-60.0), "saturated, its mean score is -60"),
    (dict(fake_std=0.03), "constant"), (dict(loss_g=12.0), "G's loss"), (dict(r1=50.0), "R1 jumped to 50"),
    (dict(), ""), (dict(nonfinite_g=500, loss_g=5.0, r1=3.0, fake_std=0.1, score_real=20.0), "")], ids=str)
def test_the_guard_tells_divergence_from_bad_luck(change, reason):
    found = m.diagnose({**HEALTHY, **change}, [HEALTHY] * 20, micro(), (100_000, 1000))
    assert bool(found) == bool(reason) and reason in found

@pytest.mark.parametrize("how", ["nan", "lr", "scale"])
def test_a_spoiled_run_goes_back_and_on(tmp_path, monkeypatch, capsys, how):
    spoil(monkeypatch, how)
    out = train_micro(tmp_path, kimg=0.4, snapshot_kimg=0.032, log_kimg=0.032)
    assert "diverged" in capsys.readouterr().err
    event, = [line for line in log(out) if "diverged" in line]
    assert event["kimg"] <= 0.192 < event["diverged"] <= 0.192 + 2 * 0.032 and event["reason"]
    lines = [line for line in log(out) if "loss_g" in line]
    state = checkpoint(out)
    recoveries, factor = state["config"]["recoveries"], 0.5 ** len(state["config"]["recoveries"])
    assert recoveries[-1] == event["kimg"] and len(recoveries) <= 2
    assert all(line["schedules"]["lr_factor"] == (1 if line["kimg"] <= event["kimg"] else factor) for line in lines)
    assert lines[-1]["kimg"] == 0.4 and not m.diagnose(lines[-1], lines[:-1], micro(), (1000, 1000))
    assert state["step"] == 25
    assert all(x.isfinite().all() for x in flatten(state["G_ema"]).values())
    assert state["opt_g"]["param_groups"][0]["lr"] == pytest.approx(0.0025 * factor)
    assert [line["kimg"] for line in log(out)] == sorted(line["kimg"] for line in log(out))

def test_the_guard_gives_up_in_the_end_and_can_be_off(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "nan", times=100)
    status, err = run_main(capsys, "--out", tmp_path / "a", *flags(**{**MICRO, "kimg": 0.4, "snapshot_kimg": 0.032}))
    assert status == 2 and err.count("; back to checkpoint") == 3 and "after 3 recoveries" in err.splitlines()[-1]
    went_back = [line["kimg"] for line in log(tmp_path / "a") if "diverged" in line]
    recoveries = checkpoint(tmp_path / "a")["config"]["recoveries"]        # so that a restart does not begin to count anew
    assert went_back[-1] == recoveries[-1] < 0.192 and len(recoveries) == 3
    monkeypatch.setitem(m.GUARD, "tries_kimg", 0.05)        # less than from a checkpoint to the divergence
    status, err = run_main(capsys, "--out", tmp_path / "c", *flags(**{**MICRO, "kimg": 0.4, "snapshot_kimg": 0.16}))
    assert status == 2 and "after 3 recoveries" in err.splitlines()[-1]
    train_micro(tmp_path / "b", "--guard", "off", kimg=0.24)
    assert not [line for line in log(tmp_path / "b") if "diverged" in line]

def test_a_rising_distance_is_divergence(tmp_path, monkeypatch, capsys):
    values = iter([10.0, 8.0, 17.0, 7.0, 6.0, 5.0])
    monkeypatch.setattr(m, "evaluate", lambda *_: {"fid9": next(values)})
    out = train_micro(tmp_path, kimg=0.064, metrics="fid9", metrics_kimg=0.016, snapshot_kimg=0.016, detector="area8")
    event, = [line for line in log(out) if "diverged" in line]
    assert event == {"kimg": 0.016, "diverged": 0.032, "reason": "fid9 rose to 17 from 8"}
    assert [line["fid9"] for line in log(out, "metrics")] == [10.0, 8.0, 7.0, 6.0, 5.0]

def test_the_best_value_is_of_the_same_data_and_images(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "evaluate", lambda *_: {"fid9": 5.0})
    path, cfg = tmp_path / "metrics.jsonl", micro()
    path.write_text("".join(json.dumps(dict(kimg=1, data=data, reals=reals, fid9=value)) + "\n"
                            for data, reals, value in (("shapes", 0, 6), ("shapes", 100, 1), ("photos", 0, 2))))
    assert m.measure(path, 2, types.SimpleNamespace(cfg=cfg), None, None, cfg, None, 0, 1) == ("fid9", 5.0, 5.0)

def test_draws_differ_after_a_recovery_alone():
    cfg = micro(seed=3)
    again = dataclasses.replace(cfg, recoveries=(1.0,))
    take = lambda cfg: next(iter(m.Batches(cfg, 1000, 5, 0, 1)))
    assert m.train_seed(cfg) == 3 and take(cfg) == take(micro(seed=3)) != take(again)
    assert m.schedules(again, 200.9)["lr_factor"] == 0.5 and m.schedules(again, 201)["lr_factor"] == 1
    assert m.schedules(dataclasses.replace(cfg, recoveries=(1.0, 2.0)), 150)["lr_factor"] == 0.25

def test_old_checkpoints_are_thinned_out(tmp_path):
    (mine := tmp_path / "checkpoint-000000.100-copy.pt").touch()
    for n in range(200):
        (tmp_path / f"checkpoint-{n / 10:010.3f}.pt").touch()
        m.thin_out(tmp_path, n * 100, 100)
        (tmp_path / f"checkpoint-{n / 10 + 0.05:010.3f}.pt").touch()       # of a run that was stopped in between
        m.thin_out(tmp_path, n * 100 + 50, 100)
        ages = [n - int(10 * kimg + 0.01) for kimg, _ in m.checkpoints(tmp_path)]
        assert ages[:2] == [0, 0] and len(ages) <= math.log2(n + 1) + 3
        for k in range(int(math.log2(n + 1))):                    # one of an age from 2^k to the next power
            assert any(2 ** k <= age < 2 ** (k + 1) for age in ages) or n + 1 < 2 ** (k + 1)
    assert mine.exists()

def test_a_run_that_goes_back_leaves_its_newer_checkpoints(tmp_path):
    out = train_micro(tmp_path, kimg=0.064, snapshot_kimg=0.016)
    old = out / "checkpoint-000000.032.pt"
    assert m.main(["--resume", str(old), "--kimg", "0.048"]) == 0
    assert m.load_checkpoint(out)[0].name == "checkpoint-000000.048.pt"
    assert (out / "left-checkpoint-000000.064.pt").exists()

def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, capsys):
    out = train_micro(tmp_path / "run", kimg=0.048, snapshot_kimg=0.016)
    newest = out / "checkpoint-000000.048.pt"
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for damaged in (whole[:len(whole) * 2 // 3], bytes(flipped), b""):
        newest.write_bytes(damaged)
        capsys.readouterr()
        status, err = run_main(capsys, "--resume", newest, "--kimg", 1)
        assert status == 2 and "checkpoint-000000.048.pt" in err and err.count("\n") == 1
        path, _, state = m.load_checkpoint(out)
        assert path.name == "checkpoint-000000.032.pt" and state["step"] == 2
        assert "warning" in (err := capsys.readouterr().err) and "000000.048.pt" in err
    assert m.main(["--resume", "latest", "--out", str(out), "--kimg", "0.064"]) == 0
    assert checkpoint(out)["step"] == 4

@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", ["collate", "synthesize", "march_rays", "write_samples", "evaluate", "save"])
def test_a_signal_at_any_time_saves_and_the_run_goes_on(tmp_path, monkeypatch, phase, signum):
    """In the second step or what follows it: drawing data, forward pass, saving, sampling, measuring."""
    where, name, calls = (torch, "save", []) if phase == "save" else (m, phase, [])
    real, first = getattr(where, name), dict(collate=3, synthesize=3, march_rays=200).get(phase, 2)
    def f(*args, **kwargs):
        calls.append(1)
        if len(calls) == first:
            os.kill(os.getpid(), signum)
        return real(*args, **kwargs)
    monkeypatch.setattr(where, name, f)
    out = train_micro(tmp_path, kimg=0.8, snapshot_kimg=0.032, metrics="fid33", metrics_kimg=0.032, detector="area8",
                      reals=64)
    assert len(calls) >= first and 1 <= checkpoint(out)["step"] <= 3
    monkeypatch.undo()
    step = checkpoint(out)["step"]
    assert m.main(["--resume", "auto", "--out", str(out), "--kimg", str((step + 1) * 0.016), "--metrics", ""]) == 0
    assert checkpoint(out)["step"] == step + 1

def test_metrics_end_soon_after_a_signal(tmp_path, monkeypatch):
    """An evaluation of ImageNet takes long: the signal must not wait for its end."""
    stop, seen = [], []
    def batches():
        for i in range(100):
            seen.append(i)
            if i == 3:
                stop.append(1)
            yield torch.randn(4, 2)
    with pytest.raises(KeyboardInterrupt):
        m.collect(batches(), 400, 4, 0, 1, stop)
    assert len(seen) == 4

def test_restarts_resume_by_themselves(tmp_path, monkeypatch, capsys):
    for kind in ("TORCHELASTIC", "SLURM"):
        out = tmp_path / kind
        monkeypatch.setenv(f"{kind}_RESTART_COUNT", "1")
        train_micro(out, kimg=0.016)                              # the first start had come to nothing
        train_micro(out, kimg=0.032)
        assert checkpoint(out)["step"] == 2 and (out / "checkpoint-000000.016.pt").exists()
        monkeypatch.delenv(f"{kind}_RESTART_COUNT")
    assert m.main(["--resume", "auto", *flags(**MICRO, out=tmp_path / "new", kimg=0.016)]) == 0     # nothing there yet
    assert m.main(["--resume", "auto", "--out", str(tmp_path / "new"), "--kimg", "0.032"]) == 0
    assert checkpoint(tmp_path / "new")["step"] == 2
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "new").iterdir()}
    again = ("--out", str(tmp_path / "new"), "--kimg", "0.032")
    assert m.main(["--resume", "auto", *again]) == 0 and "finished already" in capsys.readouterr().out      # requeued
    status, err = run_main(capsys, "--resume", "latest", *again)
    assert status == 2 and "has seen 0.032; ask for more" in err
    assert files == {f: f.stat().st_mtime_ns for f in (tmp_path / "new").iterdir()}

def test_a_restart_is_no_way_round_a_mistake(tmp_path, monkeypatch, capsys):
    out, root = train_micro(tmp_path / "run", kimg=0.016), make_folder(tmp_path / "photos")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    status, err = run_main(capsys, "--resume", "latest", "--out", tmp_path / "typo")
    assert status == 2 and "no such file" in err and not (tmp_path / "typo").exists()
    status, err = run_main(capsys, "--out", out, "--data", root, "--kimg", 1)
    assert status == 2 and "data (there 'shapes'" in err

def end(processes, seconds):
    """-> exit statuses and errors of processes that must end in time"""
    ended = []
    for p in processes:
        try:
            _, err = p.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            p.kill()
            pytest.fail(f"hangs: {p.communicate()[1]}")
        ended.append((p.returncode, err))
    return ended

@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_no_process_waits_for_ever(tmp_path, blow):
    a, b = start_two(tmp_path, timeout=15)
    wait_for(has_lines(tmp_path))
    b.send_signal(blow)
    (status, err), = end([a], 60)
    assert status == 1 and "waited in vain" in err.splitlines()[-1] and "Traceback" not in err
    if blow == signal.SIGSTOP:
        b.send_signal(signal.SIGCONT)
        (status, err), = end([b], 60)
        assert status == 1 and "waited in vain" in err.splitlines()[-1] and "Traceback" not in err
    else:
        end([b], 10)

def test_processes_must_run_the_same(tmp_path):
    for status, err in end(start_two(tmp_path / "a", each=({}, {"r1_gamma": 3.0})), 90):
        assert status == 2 and "process 1 differs from process 0: r1_gamma 3.0 (process 0: 0.5)" in err.splitlines()[-1]
    assert not (tmp_path / "a").exists()
    train_micro(tmp_path / "b", kimg=0.032, snapshot_kimg=0.016)
    old, new = (tmp_path / "b" / f"checkpoint-000000.0{k}.pt" for k in (16, 32))
    for _, err in end(start_two(tmp_path / "b", each=({"resume": old}, {"resume": new}), kimg=1, timeout=30), 90):
        assert "process 1 differs from process 0: resume checkpoint-000000.032.pt" in err.splitlines()[-1]

def test_one_signal_stops_all_processes(tmp_path):
    a, b = start_two(tmp_path)
    wait_for(has_lines(tmp_path, 2))
    b.send_signal(signal.SIGUSR1)
    assert [status for status, _ in end([a, b], 30)] == [0, 0]
    assert checkpoint(tmp_path)["step"] > 0

def test_data_that_stall_or_vanish_are_tried_again_then_skipped(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "a")
    monkeypatch.setattr(m.ImageData, "READ_SECONDS", 1)
    real, late = Path.read_bytes, tmp_path / "once"
    def read(path):
        if path.name == "3.jpg":
            time.sleep(100)
        if path.name == "4.jpg" and not late.exists():
            late.touch()
            raise OSError(5, "Input/output error")
        return real(path)
    data = data_of(root, depth="none")
    names = data.names
    monkeypatch.setattr(Path, "read_bytes", read)
    (root / names[0]).unlink()
    loader = torch.utils.data.DataLoader(data, 10, num_workers=1, collate_fn=m.collate, worker_init_fn=m.start_worker)
    bad = {name for batch in loader for name in batch["bad"]}
    assert bad == {names[0], *(n for n in names if n.endswith("3.jpg"))} and late.exists()

def test_data_that_are_gone_end_the_run(tmp_path, monkeypatch, capsys):
    root, real, gone = make_folder(tmp_path / "a"), m.training_step, []
    def step(cfg, modules, teacher, batch, labels, number, *rest):
        if number == 2:
            shutil.rmtree(root)
            gone.append(time.time())
        return real(cfg, modules, teacher, batch, labels, number, *rest)
    monkeypatch.setattr(m, "training_step", step)
    monkeypatch.setattr(m.ImageData, "MAX_SECONDS", 3)
    status, err = run_main(capsys, "--out", tmp_path / "run", *flags(**{**MICRO, "data": root, "depth": "none"}))
    assert status == 2 and "unreadable or gone" in err.splitlines()[-1]
    assert time.time() - gone[0] < 9            # not 3 seconds for each of 16 images

def test_a_signal_does_not_wait_for_a_data_worker_that_hangs(tmp_path, monkeypatch):
    real = m.ShapesData.__getitem__
    def item(self, i):
        if torch.utils.data.get_worker_info() and (tmp_path / "run" / "log.jsonl").exists():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})
            (tmp_path / "hangs").touch()
            time.sleep(1000)
        return real(self, i)
    monkeypatch.setattr(m.ShapesData, "__getitem__", item)
    def blow():
        wait_for((tmp_path / "hangs").exists)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=blow).start()
    start = time.time()
    out = train_micro(tmp_path / "run", workers=1, kimg=10)
    assert checkpoint(out)["step"] > 0 and time.time() - start < 30
    for worker in torch.multiprocessing.active_children():
        worker.join(5)
        assert not worker.is_alive()

@pytest.mark.parametrize("times, metrics", [(1, ""), (1, "fid33"), (100, "")])      # the first batches: training, measuring
def test_killed_data_workers_begin_again_or_end_the_run(tmp_path, monkeypatch, capsys, times, metrics):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))         # no statistics yet
    real = m.ShapesData.__getitem__
    def item(self, i):
        if torch.utils.data.get_worker_info() and (n := len(list(tmp_path.glob("killed*")))) < times:
            (tmp_path / f"killed{n}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i)
    monkeypatch.setattr(m.ShapesData, "__getitem__", item)
    options = flags(**{**MICRO, "workers": 1, "kimg": 0.048, "metrics": metrics, "detector": "area8", "reals": 64})
    status, err = run_main(capsys, "--out", tmp_path / "run", *options)
    assert "data workers begin again" in err and "Traceback" not in err
    if times == 1:
        assert status == 0
        monkeypatch.undo()
        other = train_micro(tmp_path / "other", kimg=0.048)
        a, b = (flatten({k: checkpoint(x)[k] for k in STATE}) for x in (tmp_path / "run", other))
        assert all(torch.equal(a[k], b[k]) for k in a)                  # no batch was lost or seen twice
    else:
        assert status == 2 and "fail again and again" in err.splitlines()[-1]

def test_files_that_are_too_large_are_refused(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "a", each=2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr("bomb.jpg", b"0" * 10_000_000)
        f.write(root / "cat" / "0.jpg", "fine.jpg")
    monkeypatch.setattr(m.ImageData, "MAX_BYTES", 1_000_000)
    data = data_of(tmp_path / "a.zip", depth="none")
    assert data[0]["bad"] == ["bomb.jpg"] and data[1]["bad"] == []
    PIL.Image.new("1", (20_000, 20_000)).save(root / "cat" / "bomb.png")              # 400 million pixels
    data = data_of(root, depth="none")
    assert data[data.names.index("cat/bomb.png")]["bad"] == ["cat/bomb.png"]

def mutate(data, rng):
    """Bytes overwritten, cut out, cut off or put in."""
    data, i, n = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, 20))
    kind = rng.integers(4)
    data[i:i + (n if kind < 2 else 0 if kind == 2 else len(data))] = rng.bytes(n) if kind in (0, 2) else b""
    return bytes(data)

@pytest.mark.filterwarnings("ignore")
def test_200_mutated_files_are_refused_or_skipped(tmp_path, run):
    rng, root = np.random.default_rng(0), make_folder(tmp_path / "a", each=2, depth=True)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as f:
        for path in sorted(root.rglob("*.*")):
            f.write(path, path.relative_to(root))
    listing = json.dumps({"labels": [["cat/0.jpg", 1], ["cat/1.jpg", 0], ["dog/0.jpg", 2], ["dog/1.jpg", 1]]}).encode()
    (root / "dataset.json").write_bytes(listing)
    originals = {k: (root / k).read_bytes() for k in ("cat/0.jpg", "cat/0_depth.png", "dataset.json")}
    best, outcomes = (run / "best.pt").read_bytes(), {"read": 0, "skipped": 0, "refused": 0}
    for i in range(40):
        for name, original in [*originals.items(), ("zip", (tmp_path / "a.zip").read_bytes()), ("pt", best)]:
            changed = mutate(original, rng)
            try:
                if name == "pt":
                    (tmp_path / "best.pt").write_bytes(changed)
                    m.load_checkpoint(tmp_path / "best.pt")
                    bad = []
                else:
                    path = tmp_path / "b.zip" if name == "zip" else root / name
                    path.write_bytes(changed)
                    data = data_of(path if name == "zip" else root)
                    bad = [b for k in range(len(data)) for b in data[k]["bad"]]
                outcomes["skipped" if bad else "read"] += 1
            except m.UserError as e:
                assert "\n" not in str(e)
                outcomes["refused"] += 1
            finally:
                if name in originals:
                    (root / name).write_bytes(original)
    assert sum(outcomes.values()) == 200 and outcomes["skipped"] > 30 and outcomes["refused"] > 50, outcomes

@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)

def test_a_really_full_disk(small_disk, capsys):
    status, err = run_main(capsys, "--out", small_disk / "run", *flags(**{**MICRO, "kimg": 1, "snapshot_kimg": 0.016}))
    assert status == 2 and "cannot write" in err.splitlines()[-1] and "untouched" in err.splitlines()[-1]
    assert not list((small_disk / "run").glob(".*tmp"))
    kept = m.checkpoints(small_disk / "run")
    assert kept and all(m.load_checkpoint(path)[0] == path for _, path in kept)

def torchrun(out, *argv, processes=2, **options):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                             SCRIPT, "--resume", "auto", "--out", out, *flags(**{**MICRO, **options}), *argv],
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)

def test_processes_do_not_outlive_torchrun(tmp_path):
    p = torchrun(tmp_path, kimg=1000)
    wait_for(has_lines(tmp_path, 3))
    p.kill()
    assert "stopped (go on with --resume latest" in p.communicate(timeout=60)[0]     # its workers share the pipe
    assert m.checkpoints(tmp_path)[0][0] >= 0.048

@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fault_drill(tmp_path, processes):
    """30 rounds of SIGKILL at random moments: every resume succeeds, at most one snapshot interval is lost."""
    random, every, lost = np.random.default_rng(processes), 0.08, []
    options = dict(kimg=16, snapshot_kimg=every, log_kimg=0.016, metrics="", timeout=60)
    for i in range(30):
        before = m.checkpoints(tmp_path / "run")[:1]
        p = torchrun(tmp_path / "run", processes=processes, **options)
        if i % 3:       # the others are killed at the start
            lines = before and len(log(tmp_path / "run"))
            wait_for(has_lines(tmp_path / "run", lines + 1) if before else has_lines(tmp_path / "run"))
        time.sleep(random.uniform(0, 3 if i % 3 else 12))
        subprocess.run(["pkill", "-9", "-f", f"{tmp_path}/run"])       # torchrun's workers have their own sessions
        seen = p.communicate()[0]
        assert "Traceback" not in seen and "rror:" not in seen, seen
        newest = m.checkpoints(tmp_path / "run")[:1]
        assert newest >= before
        if newest and has_lines(tmp_path / "run")():
            lost.append(log(tmp_path / "run")[-1]["kimg"] - newest[0][0])
    assert max(lost) <= every + 0.017 and len({*lost}) > 3
    p = torchrun(tmp_path / "run", processes=processes, **options)
    assert p.communicate(timeout=600) and p.returncode == 0
    if processes == 1:
        p = torchrun(tmp_path / "whole", processes=1, **options)
        assert p.communicate(timeout=900) and p.returncode == 0
        a, b = (flatten({k: checkpoint(tmp_path / x)[k] for k in STATE}) for x in ("run", "whole"))
        assert all(torch.equal(a[k], b[k]) for k in a)

@slow
def test_memory_is_flat_over_5000_steps(tmp_path):
    out = train_micro(tmp_path, kimg=80, log_kimg=0.16, snapshot_kimg=8, workers=1, guard="off")
    at = {round(line["kimg"] * 1000 / 16): line["memory_mb"] for line in log(out)}
    assert at[5000] < 1.03 * at[500], (at[500], at[5000])

@slow
@pytest.mark.parametrize("how", ["nan", "lr", "scale"])
def test_a_spoiled_tiny_run_ends_as_good(tmp_path, monkeypatch, how):
    options = dict(preset="tiny", kimg=9, metrics="fid1k", workers=1)
    healthy = Path(os.environ.get("HEALTHY_RUN") or tmp_path / "healthy")
    if not healthy.exists():
        assert m.main(flags(**options, out=healthy)) == 0
    spoil(monkeypatch, how, at=600)
    assert m.main(flags(**options, out=tmp_path / "ill")) == 0
    event, = [line for line in log(tmp_path / "ill") if "diverged" in line]
    assert 4.8 <= event["diverged"] <= 5.06
    a, b = (log(x, "metrics")[-1]["fd1k[area8]"] for x in (healthy, tmp_path / "ill"))
    assert b < 1.2 * a, (a, b)

@slow
def test_two_hosts(tmp_path):
    """Two network namespaces joined by a veth pair: c10d rendezvous, the same result as on one host; a cut link ends both."""
    sh = lambda command, **kind: subprocess.run(command.split(), check=True, capture_output=True, **kind)
    try:
        sh("ip netns add tdgp0"), sh("ip netns add tdgp1")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make network namespaces")
    try:
        sh("ip link add tdgp0 netns tdgp0 type veth peer name tdgp1 netns tdgp1")
        for i in (0, 1):
            sh(f"ip -n tdgp{i} addr add 10.99.0.{i + 1}/24 dev tdgp{i}")
            sh(f"ip -n tdgp{i} link set tdgp{i} up"), sh(f"ip -n tdgp{i} link set lo up")
        def hosts(out, **options):
            return [subprocess.Popen([
                "ip", "netns", "exec", f"tdgp{i}", sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv_backend=c10d",
                "--rdzv_endpoint=10.99.0.1:29511", "--rdzv_id=t", f"--rdzv_conf=is_host={1 - i}", f"--local_addr=10.99.0.{i + 1}", "--nproc_per_node=1",
                SCRIPT, "--resume", "auto", "--out", out, *flags(**{**MICRO, "timeout": 20, **options})], env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"tdgp{i}"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in (0, 1)]
        one = torchrun(tmp_path / "one", kimg=0.16)
        assert one.communicate(timeout=120) and one.returncode == 0
        assert [s for s, _ in end(hosts(tmp_path / "two", kimg=0.16), 120)] == [0, 0]
        a, b = (flatten({k: checkpoint(tmp_path / x)[k] for k in STATE}) for x in ("one", "two"))
        assert all(torch.equal(a[k], b[k]) for k in a)
        cut = hosts(tmp_path / "cut", kimg=1000, snapshot_kimg=0.16)
        wait_for(has_lines(tmp_path / "cut", 15))
        sh("ip -n tdgp0 link set tdgp0 down")
        for p in cut:       # the processes end; torchrun waits for its own store as long as TCP does
            threading.Timer(60, p.kill).start()
            assert any("waited in vain" in line for line in p.stderr)
            p.kill(), p.communicate()
        sh("ip -n tdgp0 link set tdgp0 up")
        kimg = m.checkpoints(tmp_path / "cut")[0][0] + 0.16
        assert [s for s, _ in end(hosts(tmp_path / "cut", kimg=kimg, snapshot_kimg=0.16), 120)] == [0, 0]
        assert m.checkpoints(tmp_path / "cut")[0][0] == pytest.approx(kimg)
    finally:
        sh("ip netns del tdgp0"), sh("ip netns del tdgp1")

# ----------------------------------------------------------------------------------------------------------------------
# Command line and bad input

@pytest.mark.parametrize("mode", m.MODES)
def test_help_shows_every_option_with_its_default(mode):
    text = subprocess.run([sys.executable, SCRIPT, mode, "--help"], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\s+", " ", text)
    fields = [f for f in dataclasses.fields(m.MODES[mode]) if f.metadata]      # but for what the program sets itself
    for f in fields:
        assert ("--" if f.default is not ... else "") + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()[:2]) in text, f.name
    assert text.count("(default:") == sum(f.default is not ... for f in fields)

def test_presets_name_real_options_and_are_valid():
    names = {f.name for f in dataclasses.fields(m.Config)}
    for preset in m.PRESETS.values():
        assert set(preset) <= names
    for data in m.DATA_PRESETS:
        m.validate(m.make_config({"data": data}), 2 if data == "shapes" else 8)
    for preset in m.PRESETS:
        m.validate(m.make_config({"preset": preset}), 1)
    assert m.make_config({"data": "imagenet"}).channel_base == 65536
    assert m.make_config({}).preset == "tiny" and m.make_config({"resolution": 64}).resolution == 64

@pytest.mark.parametrize("argv, message", [
    (["--data", "nowhere"], "nowhere: no such file"),
    (["--data", "imagenet"], "DATA_DIR"),
    (["--data", "EMPTY"], "no images"),
    (["--data", "PHOTOS", "--depth-weights", "nowhere.pth"], "--depth-weights nowhere.pth: no such file; or train on RGB alone"),
    (["--resolution", "48"], "--resolution 48: must be a power of two"),
    (["--patch-resolution", "64"], "larger than --resolution"),
    (["--batch-size", "6"], "multiple of 4"),
    (["--batch-size", "24", "--batch-gpu", "16"], "does not divide"),
    (["--kimg", "0"], "--kimg 0.0: must be positive"),
    (["--r1-gamma", "nan"], "--r1-gamma: not a finite number"),
    (["--seed", "-1"], "--seed: must not be negative"),
    (["--prior-fov", "45", "10"], "--prior-fov: the first number must be less"),
    (["--near", "2"], "less than --far"),
    (["--frobnicate", "3"], "--help"),
    (["--device", "gpu"], "invalid choice"),
    (["--num-classes", "5"], "--num-classes 5"),
    (["--teacher", "nonsense_net"], "no model of that name"),
    (["--resume", "missing.pt"], "missing.pt: no such file"),
    (["--resume", "latest", "--out", "EMPTY"], "no checkpoint"),
    (["--resume", "GARBAGE"], "not a readable"),
    (["paint"], "paint: no such mode"),
    (["sample"], "--resume: no checkpoint in .; name one"),
    (["sample", "--resume", "EMPTY"], "no checkpoint in"),
    (["sample", "--frames", "0"], "--frames, --fps: must be 1 or more"),
    (["sample", "--resolution", "-5"], "--resolution 2 or more"),
    (["eval", "--resume", "missing.pt"], "missing.pt: no such file"),
    (["report", "EMPTY"], "EMPTY: not the folder of a run"),
    (["--metrics", "fid50x"], "--metrics fid50x: must be fid, kid"),
    (["--metrics", "is2k"], "area8 gives no class probabilities"),
    (["--detector", "GARBAGE"], "not TorchScript in the field's format"),
    (["--detector", "timm:nobody"], "--detector nobody: timm has no model"),
    (["bench", "--repeats", "0"], "--repeats 0: must be positive"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, argv, message):
    (tmp_path / "EMPTY").mkdir()
    make_folder(tmp_path / "PHOTOS", each=1)
    (tmp_path / "GARBAGE").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    argv = [str(tmp_path / a) if a in ("EMPTY", "PHOTOS", "GARBAGE") else a for a in argv]
    if "--out" not in argv and argv[0] not in ("bench", "eval"):
        argv += ["--out", str(tmp_path / "out")]
    status, err = run_main(capsys, *argv)
    assert status == 2 and message in err and err.count("\n") == 1 and err.startswith("3dgp.py: error: ")
    assert not (tmp_path / "out").exists()

def test_no_gpu_when_asked_for_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, err = run_main(capsys, "--device", "cuda", "--out", tmp_path / "out")
    assert status == 2 and "no GPU" in err

def test_batch_that_does_not_fit_the_processes():
    with pytest.raises(m.UserError, match="not divisible by 3 processes"):
        m.validate(micro(), 3)

def test_checkpoint_of_another_configuration_names_the_fields(tmp_path, capsys):
    out = train_micro(tmp_path / "run", kimg=0.016)
    status, err = run_main(capsys, "--resume", "latest", "--out", out, "--z-dim", 16, "--r1-gamma", 3)
    assert status == 2 and "z_dim (there 8, here 16)" in err and "r1_gamma" in err and "batch_size" not in err
    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pt")
    status, err = run_main(capsys, "--resume", tmp_path / "other.pt")
    assert status == 2 and "not a checkpoint of this program" in err

def test_a_run_is_not_overwritten(tmp_path, capsys, monkeypatch):
    out = train_micro(tmp_path / "run", kimg=0.016)
    status, err = run_main(capsys, "--out", out, *flags(**MICRO))
    assert status == 2 and "--resume latest" in err
    monkeypatch.chdir(tmp_path)
    for expected in ("shapes", "shapes-2"):
        assert m.main(flags(**MICRO, kimg=0.016)) == 0
        assert (tmp_path / "runs" / expected / "checkpoint-000000.016.pt").exists()

# ----------------------------------------------------------------------------------------------------------------------
# Reference vectors: agreement means max |a - b| <= 1e-4 x max(1, max |b|), gradients included

FOLDER = os.environ.get("REFERENCE_VECTORS")
reference = pytest.mark.skipif(not FOLDER, reason="REFERENCE_VECTORS does not name the folder of the reference vectors")

def load(name):
    with np.load(Path(FOLDER) / f"{name}.npz") as d:
        return {k: torch.from_numpy(np.asarray(d[k])) for k in d.files}

def parameters(d, prefix="param/"):
    """resample_filter is the constant FIR, which this implementation has as a function."""
    return {k[len(prefix):]: v for k, v in d.items() if k.startswith(prefix) and not k.endswith("resample_filter")}

def agree(a, b):
    b = b.to(a.dtype)
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= 1e-4 * max(1.0, float(b.detach().abs().max()))

def golden_config(**changes):
    return m.Config(**{**dict(num_classes=5, teacher_dim=40, resolution=64, patch_resolution=32, triplane_resolution=32,
                              triplane_features=8, channel_base=512, channel_max=32, z_dim=24, w_dim=24, coarse_samples=6,
                              fine_samples=6), **changes})

def golden_camera(d, prefix):
    angles = d[f"{prefix}/angles"]
    return m.Camera(angles[:, 0], angles[:, 1], d[f"{prefix}/fov"], d[f"{prefix}/radius"], d[f"{prefix}/look_at"])

@reference
def test_reference_camera():
    d = load("camera")
    cam = m.Camera(d["yaw"], d["pitch"], d["fov_degrees"], d["radius"], d["look_at_yaw_pitch_radius"])
    agree(m.cam2world(cam), d["cam2world"])
    for prefix, patch in (("", None), ("patch_", m.Patch(d["patch_scale"], d["patch_offset_xy"]))):
        origins, directions = m.camera_rays(cam, 5, patch)
        agree(origins, d[f"{prefix}ray_origins"])
        agree(directions, d[f"{prefix}ray_directions"])
    origins, directions = m.camera_rays(cam, 5)
    for t in (d["box_near"], d["box_far"]):                # a ray enters and leaves the box on its surface
        on_surface = (origins + t * directions).abs().amax(-1)
        inside = (d["box_near"] < d["box_far"])[..., 0]
        agree(on_surface[inside], torch.full_like(on_surface[inside], float(d["box_half_size"])))

@reference
def test_reference_triplane_sampling():
    d = load("triplane_sampling")
    planes, points = d["planes"].requires_grad_(), d["coords"].requires_grad_()
    ways = [m.sample_triplane, lambda p, x, box: m.triplane(p, x, box, x.new_empty(0))][:1 + m.has_custom_ops("cpu")]
    for lookup in ways:
        features = lookup(planes, points, float(d["scale"]))
        agree(features, d["features_mean_over_planes"])
        g_planes, g_points = torch.autograd.grad((features * d["cotangent"]).sum(), (planes, points))
        agree(g_planes, d["grad_planes"])
        agree(g_points, d["grad_coords"])

@reference
def test_reference_triplane_decoder():
    d = load("triplane_decoder")
    decoder = m.TriplaneDecoder(8)
    decoder.load_state_dict(parameters(d))
    constant = d["features"][:, None, :, None, None].expand(-1, 3, -1, 2, 2)               # planes with these features
    for rgb, sigma in [decoder(d["features"][:, None]),
                       m.query_triplane(constant, torch.zeros(11, 1, 3), 0.5, decoder, m.has_custom_ops("cpu"))]:
        agree(rgb[:, 0], d["rgb"])
        agree(sigma, d["sigma_raw"])

@reference
def test_reference_ray_marching():
    d = load("ray_marching")
    rgb, depth, weights = m.march_rays(d["colors"], d["sigma_raw"], d["depths"])
    agree(rgb, d["rgb"])
    agree(depth, d["depth"])
    agree(weights, d["weights"])

@reference
def test_reference_importance_sampling():
    d = load("importance_sampling")
    agree(m.importance_depths(d["depths"], d["weights"], d["u"]), d["fine_depths"])

@reference
def test_reference_mapping():
    d = load("mapping")
    G = m.Generator(golden_config())
    G.mapping_network.load_state_dict(parameters(d))
    agree(G.mapping(d["z"], d["c"].argmax(1)), d["w"])

@reference
def test_reference_backbone():
    d = load("backbone")
    backbone = m.TriplaneBackbone(golden_config())
    backbone.load_state_dict(parameters(d))
    agree(backbone(d["ws"][:2], noise="const"), d["planes"])
    assert (backbone(d["ws"][:2], noise="none") - d["planes"]).abs().max() > 0.01

@reference
def test_reference_camera_generator():
    d = load("camera_generator")
    generator = m.CameraGenerator(golden_config())
    generator.load_state_dict(parameters(d))
    posterior = generator(golden_camera(d, "prior"), d["z"], d["c"].argmax(1))
    for a, b in zip(posterior, golden_camera(d, "posterior")):
        agree(a, b)

@reference
def test_reference_depth_adaptor():
    d = load("depth_adaptor")
    adaptor = m.DepthAdaptor(golden_config(near=float(d["near"]), far=float(d["far"])))
    adaptor.load_state_dict(parameters(d))
    agree(adaptor.candidates(d["depth"]), d["adapted_per_level"])

@reference
def test_reference_render():
    d = load("render")
    G = m.Generator(golden_config(near=float(d["near"]), far=float(d["far"]), box=float(d["box_half_size"]))).eval()
    G.backbone.load_state_dict(parameters(load("backbone")))
    G.decoder.load_state_dict(parameters(d, "decoder/"))
    G.depth_adaptor.load_state_dict(parameters(load("depth_adaptor")))
    with torch.no_grad():
        image, depth = G.render(G.backbone(d["w"]), golden_camera(d, "camera"), 32)
        agree(image, d["image"])
        agree(depth, d["depth"])
        agree(G.depth_adaptor.candidates(depth)[3], d["depth_adapted"])

@reference
def test_reference_discriminator():
    d = load("discriminator")
    D = m.Discriminator(golden_config())
    result = D.load_state_dict(parameters(d), strict=False)
    assert not result.missing_keys                          # only the first block reads the image; the vectors hold spare ones
    assert all(re.fullmatch(r"b(32|16|8)\.fromrgb\.(weight|bias)", k) for k in result.unexpected_keys)
    image = d["img"].requires_grad_()
    score, features = D(image, d["c"].argmax(1), m.Patch(d["patch_scale"], d["patch_offset_xy"]))
    agree(score, d["logits"])
    agree(features, d["features"])
    penalty = m.r1_penalty(score, image)
    agree(penalty, d["r1_penalty"])
    gradients = torch.autograd.grad(penalty.sum(), list(D.parameters()), allow_unused=True)
    agree(torch.stack([g.norm() for g in gradients if g is not None]).norm(), d["r1_param_grad_norm"])

@reference
def test_reference_patches():
    d = load("patches")
    agree(m.extract_patch(d["image"], m.Patch(d["patch_scale"], d["patch_offset_xy"]), 32), d["patch"])

@reference
def test_reference_blur():
    d = load("blur")
    agree(m.blur(d["image"], float(d["sigma"])), d["blurred"])

@reference
def test_reference_emd():
    d = load("emd_1d")
    agree(m.emd_1d(d["a"], d["b"]), d["emd_squared_cost"])

@reference
def test_reference_non_flatness():
    d = load("nfs")
    score = m.non_flatness_score(d["depth"], float(d["near"]), float(d["far"]), int(d["bins"]))
    agree(score, d["score_per_image"])
    agree(score.mean(), d["nfs"])

@reference
@pytest.mark.parametrize("backbone", ["resnet50", "resnext101"])
def test_reference_leres(backbone):
    shapes = json.loads((Path(FOLDER) / "leres_state_dict_shapes.json").read_text())[backbone]
    model, state, d = L.LeReS(backbone).eval(), seeded_leres(backbone), load(f"leres_{backbone}")
    assert {k: list(v.shape) for k, v in state.items()} == shapes
    model.load_state_dict(state)
    with torch.no_grad():
        assert (model(d["input"]) - d["output"]).abs().max() <= 1e-4 * d["output"].abs().max()

@reference
def test_every_reference_file_is_checked():
    text = Path(__file__).read_text()
    assert not {p.stem for p in Path(FOLDER).glob("*.npz") if f'load("{p.stem}")' not in text} - {
        "leres_resnet50", "leres_resnext101"}
