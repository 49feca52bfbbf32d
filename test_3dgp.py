"""Tests of 3dgp.py, lereS_depth.py and tools/: python -m pytest test_3dgp.py

Nothing is downloaded. Four kinds of tests are skipped where what they need is missing:
- tests of the programs in tools/, where that folder is not there;
- the comparison with reference vectors at the end: set REFERENCE_VECTORS to their folder;
- tests of what needs a GPU, a compiler, Chromium, ffmpeg, scikit-image or trimesh;
- tests that take minutes: set SLOW_TESTS=1.
"""

import ast
import base64
import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import unicodedata
import zipfile
import zlib
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as 3dgp.py has it; PyTorch is imported first here

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "3dgp.py"

# The names of the programs are no identifiers, so that `import` cannot load them.
sys.path.insert(0, str(HERE))
m = importlib.import_module("3dgp")
L = importlib.import_module("lereS_depth")


@functools.cache
def tool(name):
    """The program tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", HERE / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


with_tools = pytest.mark.skipif(not (HERE / "tools").is_dir(), reason="the folder tools/ is not here")
compiles = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
two_cores = pytest.mark.skipif(torch.get_num_threads() < 2, reason="one core, or OMP_NUM_THREADS=1")
slow = pytest.mark.skipif(not os.environ.get("SLOW_TESTS"), reason="takes minutes: set SLOW_TESTS=1")

# ------------------------------------------------------------------------------------------------------------
# Helpers: a small configuration, runs of it, and what they leave behind

# A training step of this configuration takes milliseconds.
MICRO = dict(
    resolution=16,
    patch_resolution=8,
    triplane_resolution=16,
    triplane_features=4,
    channel_base=256,
    channel_max=8,
    adaptor_channels=4,
    z_dim=8,
    w_dim=8,
    coarse_samples=4,
    fine_samples=4,
    batch_size=16,
    batch_gpu=8,
    metrics="",
    workers=0,
    log_kimg=0.016,
    snapshot_kimg=1000,
    g_lr=0.0025,
    d_lr=0.002,
    lr_decay=0.0,
)

# What a checkpoint holds of networks and optimisers.
STATE = ("G", "D", "G_ema", "opt_g", "opt_d")

CPU = torch.device("cpu")


def micro(**changes):
    return m.Config(**{**MICRO, "num_classes": 3, **changes})


def flags(**options):
    """Options as the command line has them."""
    argv = []
    for name, value in options.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    return argv


def run_main(capsys, *argv):
    """-> exit status, and what was printed to standard error"""
    status = m.main([str(a) for a in argv])
    return status, capsys.readouterr().err


def train_micro(out, *argv, **options):
    """A run of the small configuration. -> its folder"""
    assert m.main(["--out", str(out), *flags(**{**MICRO, **options}), *argv]) == 0
    return out


def newest(out):
    """The path of a run's newest checkpoint."""
    return sorted(Path(out).glob("checkpoint-*.pt"))[-1]


def checkpoint(out):
    """What a run's newest checkpoint holds."""
    return torch.load(newest(out), weights_only=True)


def log(out, kind="log"):
    """The lines of log.jsonl or metrics.jsonl."""
    lines = (Path(out) / f"{kind}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def flatten(tree, prefix=""):
    """Nested dicts -> {path: tensor}. What is neither is left out."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    if not isinstance(tree, dict):
        return {}
    found = {}
    for key, value in tree.items():
        found.update(flatten(value, f"{prefix}/{key}"))
    return found


def camera(n=1, yaw=0.0, pitch=math.pi / 2, fov=30.0, look_at=(0.0, math.pi / 2, 0.0)):
    """n times the same camera, by default in front and looking at the origin."""
    parameters = torch.tensor([yaw, pitch, fov, *look_at])
    return m.make_camera(parameters.expand(n, 6))


def read_ply(path):
    """-> vertices (V, 3), colours (V, 3), faces (M, 3)"""
    header, body = Path(path).read_bytes().split(b"end_header\n", 1)
    elements = [line for line in header.decode().splitlines() if line.startswith("element")]
    V, M = (int(line.split()[-1]) for line in elements)
    assert len(body) == V * 15 + M * 13

    vertex = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)], V)
    face = np.frombuffer(body[V * 15 :], [("n", "u1"), ("v", "<i4", 3)], M)
    assert (face["n"] == 3).all()
    return vertex["xyz"], vertex["rgb"], face["v"]


class Stub(torch.nn.Module):
    """A detector in the field's format: 6 features, 5 class probabilities."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        assert x.dtype == torch.uint8
        means = F.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
        features = means[:, :6]
        if return_features:
            return features
        return (3 * features[:, :5]).softmax(1)


@pytest.fixture(autouse=True)
def leave_no_files(tmp_path):
    """The checkpoints of all tests together take gigabytes, and pytest keeps those of three runs."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(autouse=True)
def leave_no_tf32():
    """A run sets it for the whole process; what is compared with float32 on a GPU is to be float32."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps; stub.pt beside it is a detector."""
    out = tmp_path_factory.mktemp("runs") / "run<1>"
    torch.jit.script(Stub()).save(str(out.parent / "stub.pt"))
    return train_micro(out, kimg=0.048, metrics="fid16,nfs8", detector="area8", reals=16, metrics_kimg=0.016)


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    """A file with weights of timm's `test_resnet`, the smallest there is."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "w.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return path


# ------------------------------------------------------------------------------------------------------------
# Helpers: photographs


def photo(size=(40, 30), seed=0, mode="RGB"):
    """A smooth picture of random colours."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colors).resize(size, PIL.Image.BICUBIC).convert(mode)


def make_folder(root, classes=("cat", "dog"), each=10, depth=False):
    """A folder of photographs for each class; depth: each has a ramp that rises from left to right."""
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)
    for k, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(each):
            photo(seed=100 * k + i).save(folder / f"{i}.jpg")
            if depth:
                PIL.Image.fromarray(np.tile(ramp, (30, 1))).save(folder / f"{i}_depth.png")
    return root


def make_zip(path, root):
    """All files below a folder, under their names in it."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
    return path


def data_of(source, **changes):
    return m.ImageData(micro(**changes), source)


def seeded_leres(backbone):
    """LeReS's parameters as the reference vectors draw them: each from a seed that is its name's CRC-32."""
    state = {}
    for name, value in L.LeReS(backbone).state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        r = torch.randn(value.shape, generator=generator)
        kind = name.rsplit(".", 1)[1]

        if value.ndim == 4:
            state[name] = r * math.sqrt(2 / r[0].numel())
        elif kind == "running_var":
            state[name] = 1 + 0.1 * r.abs()
        elif kind == "running_mean":
            state[name] = 0.1 * r
        elif kind == "weight":
            state[name] = 1 + 0.1 * r
        elif kind == "bias":
            state[name] = 0.05 * r
        else:
            assert kind == "num_batches_tracked"
            state[name] = torch.zeros_like(value)
    return state


# ------------------------------------------------------------------------------------------------------------
# Config


def test_schedules_at_their_ends():
    cfg = m.Config()
    assert m.schedules(cfg, 0) == dict(
        blur_sigma=10,
        density_noise=1,
        patch_beta=0.001,
        raw_depth_share=0.25,
        camera_reg_weight=0,
        kd_weight=1,
        lr_factor=1,
    )
    assert m.schedules(cfg, 1e6) == dict(
        blur_sigma=0,
        density_noise=0,
        patch_beta=0.8,
        raw_depth_share=0.1,
        camera_reg_weight=1,
        kd_weight=0,
        lr_factor=1,
    )
    assert m.schedules(cfg, 5_000)["raw_depth_share"] == pytest.approx(0.175)


def test_learning_rates_fall_to_0_at_the_end_where_that_is_asked_for():
    cfg = micro(kimg=10, lr_decay=0.4)
    factors = [m.schedules(cfg, kimg)["lr_factor"] for kimg in (0, 6, 8, 10, 11)]
    assert factors == pytest.approx([1, 1, 0.5, 0, 0])
    both = dataclasses.replace(cfg, recoveries=(5.0,))
    assert m.schedules(both, 8)["lr_factor"] == pytest.approx(0.25)
    assert m.schedules(micro(kimg=10), 11)["lr_factor"] == 1


def test_the_mapping_network_of_g_alone_learns_faster():
    """Equalised layers: weights of deviation 1 / multiplier, and the same function at the start."""
    torch.manual_seed(0)
    fast = m.MappingNetwork(512, 0, 512, lr_mult=0.1)
    assert fast.fc0.weight.std().item() == pytest.approx(10, rel=0.01)
    assert fast(torch.randn(64, 512), None).square().mean().item() == pytest.approx(1, rel=0.1)

    G = m.Generator(micro(mapping_lr_mult=0.1))
    D = m.Discriminator(micro(mapping_lr_mult=0.1))
    assert G.mapping_network.fc0.scale == pytest.approx(0.1 * math.sqrt(2))
    assert D.head_mapping.fc0.scale == pytest.approx(0.01 * math.sqrt(2))
    assert m.Generator(micro()).mapping_network.fc0.scale == pytest.approx(0.01 * math.sqrt(2))


def test_presets_name_real_options_and_are_valid():
    names = {f.name for f in dataclasses.fields(m.Config)}
    for name, preset in m.PRESETS.items():
        assert set(preset) <= names
        m.validate(m.make_config({"preset": name}), 1)
    for data in m.DATA_PRESETS:
        m.validate(m.make_config({"data": data}), 2 if data == "shapes" else 8)


def test_r1_and_the_moving_average_go_by_resolution_and_batch():
    def chosen(**given):
        cfg = m.make_config(given)
        return cfg.r1_gamma, cfg.ema_kimg

    # 0.0002 x resolution² / batch, and 0.3125 x batch; ImageNet and the small sizes have their own
    for data in ("dogs", "elephants", "horses"):
        assert chosen(data=data) == pytest.approx((0.2048, 20))
    assert chosen(data="dogs", batch_size=32, resolution=512) == pytest.approx((1.6384, 10))
    assert chosen(data="imagenet", preset="base") == pytest.approx((0.05, 20))
    assert chosen(data="shapes") == (0.5, 2)
    assert chosen(data="dogs", r1_gamma=3.0) == (3.0, 20)


def test_data_choose_the_preset_and_options_override_it():
    assert m.make_config({"data": "imagenet"}).channel_base == 65536
    assert m.make_config({}).preset == "tiny"
    assert m.make_config({"resolution": 64}).resolution == 64


def adaptor_shares(cfg, kimg):
    """How often each of the 4 depth candidates is drawn."""
    choices = m.sample_adaptor_choice(cfg, 80_000, kimg).view(-1, 4)
    assert (choices == choices[:, :1]).all()  # those that the mini-batch standard deviation compares
    return np.bincount(choices[:, 0].numpy(), minlength=4) / 20_000


def test_adaptor_choices_follow_the_schedule():
    torch.manual_seed(0)
    assert adaptor_shares(micro(), 0) == pytest.approx([0.25] * 4, abs=0.02)
    assert adaptor_shares(micro(), 1e6) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    assert adaptor_shares(micro(depth_adaptor="never"), 0) == pytest.approx([1, 0, 0, 0])
    assert adaptor_shares(micro(depth_adaptor="half"), 0) == pytest.approx([0.5, 0, 0, 0.5], abs=0.02)
    assert adaptor_shares(micro(depth_adaptor="always"), 0) == pytest.approx([0, 0, 0, 1])


@pytest.mark.parametrize("batch_size, batch_gpu, images", [(16, 8, 8), (12, 8, 4), (16, 100, 4), (8, 64, 8)])
def test_a_pass_has_what_divides_the_share(tmp_path, monkeypatch, batch_size, batch_gpu, images):
    real = m.synthesize
    sizes = set()

    def synthesize(G, z, *rest):
        sizes.add(len(z))
        return real(G, z, *rest)

    monkeypatch.setattr(m, "synthesize", synthesize)
    sizes_given = dict(batch_size=batch_size, batch_gpu=batch_gpu)
    out = train_micro(tmp_path, **sizes_given, kimg=batch_size / 1000)
    assert sizes == {images}
    assert checkpoint(out)["config"]["batch_gpu"] == batch_gpu


# ------------------------------------------------------------------------------------------------------------
# Data: shapes


def test_shapes_are_a_function_of_the_index():
    cfg = m.make_config({})
    item = m.ShapesData(cfg)[5]
    again = m.ShapesData(cfg)[5]
    for name in ("image", "depth", "true_depth", "camera"):
        assert torch.equal(item[name], again[name])
    assert item["label"] == 5

    assert cfg.near < float(item["true_depth"].min())
    assert float(item["true_depth"].max()) <= cfg.far + 1e-6
    assert float(item["depth"].min()) == pytest.approx(-1, abs=1e-5)
    assert float(item["depth"].max()) == pytest.approx(1, abs=1e-5)


def test_shapes_without_distortion_have_their_true_depth():
    cfg = dataclasses.replace(m.make_config({}), depth_distortion=0.0)
    item = m.ShapesData(cfg)[5]
    true = item["true_depth"]
    normalized = 2 * (true - true.min()) / (true.max() - true.min()) - 1
    assert torch.allclose(item["depth"], normalized, atol=1e-4)


def test_shapes_however_distorted_have_depth_everywhere():
    cfg = dataclasses.replace(m.make_config({}), depth_distortion=4.0)
    data = m.ShapesData(cfg)
    for i in range(16):
        assert data[i]["depth"].isfinite().all()


def test_the_mirror_image_has_mirrored_depth_and_no_truth_that_is_not():
    data = m.ShapesData(m.make_config({}))
    item = data[5]
    flipped = m.MirroredData(data)[5 + len(data)]
    for name in ("image", "depth"):
        assert torch.equal(flipped.pop(name), item[name].flip(-1))
    assert flipped == {"label": 5, "number": 5 + len(data)}


def test_shapes_depth_agrees_with_its_camera():
    """Where the picture shows ground, the true depth and the true camera put the point on the ground."""
    data = m.ShapesData(dataclasses.replace(m.make_config({}), resolution=128))
    item = data[3]
    origins, directions = m.camera_rays(m.make_camera(item["camera"][None]), 128)
    points = origins + directions * item["true_depth"].view(1, -1, 1)
    lowest_row = points.view(128, 128, 3)[-1]
    assert (lowest_row[:, 1] - data.GROUND).abs().max() < 2e-3


def test_shapes_can_be_seen_with_rays_of_any_length():
    """Fog hides the ground near the end of rays alone, wherever that is."""
    for far in (1.05, 1.1, 1.5):
        item = m.ShapesData(dataclasses.replace(m.make_config({}), far=far))[3]
        depth = item["true_depth"][0]
        ground = item["image"][:, depth < 0.9 * far].float()
        sky = item["image"][:, depth == far].float()
        assert ground.mean() < sky.mean() - 50


def test_true_cameras_differ_from_the_prior_and_by_class():
    data = m.ShapesData(m.make_config({}))
    rng = np.random.default_rng(0)
    cameras = torch.stack([torch.from_numpy(data.true_camera(rng, i % 8)) for i in range(800)])
    assert cameras[:, 0].std() == pytest.approx(0.35, abs=0.05)

    # classes take turns, and each one's field of view is wider than the one's before
    fov = cameras[:, 2].view(100, 8).mean(0)
    assert (fov.diff() > 1).all()


# ------------------------------------------------------------------------------------------------------------
# Data: folders and archives of photographs


def test_folder_layouts(tmp_path):
    # a folder for each class
    root = make_folder(tmp_path / "a")
    data = data_of(root, depth="none")
    assert len(data) == 20
    assert data.num_classes == 2
    assert data[0]["image"].shape == (3, 16, 16)
    assert data[19]["label"] == 1
    assert "depth" not in data[0]

    # a flat one
    flat = tmp_path / "flat"
    flat.mkdir()
    photo().save(flat / "x.png")
    assert data_of(flat, depth="none").num_classes == 0

    # an archive
    zipped = data_of(make_zip(tmp_path / "a.zip", root), depth="none")
    assert zipped.names == data.names
    assert torch.equal(zipped[3]["image"], data[3]["image"])


def test_published_layout(tmp_path):
    root = make_folder(tmp_path / "a", classes=("00000",), each=3, depth=True)
    listing = root / "dataset.json"
    labels = [["00000/0.jpg", 7], ["00000/1.jpg", 6], ["00000/2.jpg", 5]]
    listing.write_text(json.dumps({"labels": labels}))
    data = data_of(root)
    assert len(data) == 3
    assert data.num_classes == 8
    assert data[1]["label"] == 6

    # the ramp: larger is farther
    depth = data[0]["depth"]
    assert depth.shape == (1, 16, 16)
    assert float(depth.min()) == -1
    assert float(depth.max()) == 1
    assert (depth[0, 0].diff() > 0).all()

    # a list that leaves one out, and one that is damaged
    listing.write_text(json.dumps({"labels": labels[:2]}))
    with pytest.raises(m.UserError, match="2.jpg"):
        data_of(root)
    listing.write_text("{")
    with pytest.raises(m.UserError, match="dataset.json"):
        data_of(root)


@pytest.mark.parametrize("label", ["0.5", "1.0", "-1", "true", "null", "NaN", '"cat"', "100000", "[1]"])
def test_classes_are_whole_numbers(tmp_path, label):
    root = make_folder(tmp_path / "a", classes=("c",), each=2)
    listing = '{"labels": [["c/0.jpg", 0], ["c/1.jpg", %s]]}'
    (root / "dataset.json").write_text(listing % "7")
    assert data_of(root, depth="none").labels.tolist() == [0, 7]
    (root / "dataset.json").write_text(listing % label)
    with pytest.raises(m.UserError, match="c/1.jpg: class .* is no whole number from 0 to 99,999"):
        data_of(root, depth="none")


def test_every_mode_is_read(tmp_path):
    photo(mode="CMYK").save(tmp_path / "cmyk.jpg")
    photo().convert("P").save(tmp_path / "palette.png")
    photo().save(tmp_path / "anim.gif")
    PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "alpha.png")
    PIL.Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "gray16.png")
    PIL.Image.new("RGB", (2000, 2), "red").save(tmp_path / "wide.png")
    turned = photo((60, 20))
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)

    data = data_of(tmp_path, depth="none")
    items = {name: data[i] for i, name in enumerate(data.names)}
    assert len(items) == 7
    assert not data.unreadable

    assert (items["alpha.png"]["image"] == 255).all()  # transparency over white
    assert (items["gray16.png"]["image"] == 40000 // 257).all()
    upright = PIL.ImageOps.fit(turned.rotate(-90, expand=True), (16, 16), PIL.Image.LANCZOS)
    read = items["turned.jpg"]["image"].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(read - np.asarray(upright)).mean() < 3


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA"])
def test_a_map_is_gray_however_it_is_stored(tmp_path, mode):
    gray = PIL.Image.linear_gradient("L")
    content = io.BytesIO()
    gray.convert(mode).save(content, "PNG")
    assert np.array_equal(m.read_depth(content.getvalue()), np.asarray(gray))
    if mode in ("P", "RGB", "RGBA"):  # a picture of it in colours is refused
        colors = PIL.ImageOps.colorize(gray, "blue", "yellow", "red").convert(mode)
        content = io.BytesIO()
        colors.save(content, "PNG")
        with pytest.raises(ValueError, match="not depth"):
            m.read_depth(content.getvalue())


def test_unreadable_images_are_skipped_and_named(tmp_path, capsys):
    root = make_folder(tmp_path / "a")
    whole = (root / "cat" / "3.jpg").read_bytes()
    (root / "cat" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "0.jpg").write_text("not a picture")
    out = train_micro(tmp_path / "out", data=root, depth="none", kimg=0.048)
    err = capsys.readouterr().err
    assert err.count("cat/3.jpg") == 1
    assert err.count("dog/0.jpg") == 1
    assert checkpoint(out)["step"] == 3

    # not one can be read
    for path in root.rglob("*.jpg"):
        path.write_text("not a picture")
    status, err = run_main(
        capsys, "--data", root, "--depth", "none", "--out", tmp_path / "all", *flags(**MICRO)
    )
    assert status == 2
    assert "100 images in a row are unreadable" in err.splitlines()[-1]


def test_100_unreadable_images_in_a_row_stop_the_run(tmp_path, capsys):
    root = make_folder(tmp_path / "a", classes=("c",), each=110)
    for i in range(105):
        (root / "c" / f"{i}.jpg").write_text("not a picture")
    for workers in (0, 1):
        options = flags(**{**MICRO, "workers": workers})
        out = tmp_path / f"out{workers}"
        status, err = run_main(capsys, "--data", root, "--depth", "none", "--out", out, *options)
        assert status == 2
        assert err.splitlines()[-1].startswith(f"3dgp.py: error: --data {root}: 100 images in a row")


def test_data_that_vanish_or_cannot_be_read_are_skipped(tmp_path, monkeypatch):
    data = data_of(make_folder(tmp_path / "a"), depth="none")
    gone = data.names[0]
    (data.source / gone).unlink()
    read_bytes = Path.read_bytes

    def read(path):
        if path.name == "4.jpg":
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    batches = list(m.load_batches(data, micro(workers=0), [range(10), range(10, 20)]))
    assert data.unreadable == {gone, "cat/4.jpg", "dog/4.jpg"}
    assert torch.equal(batches[0]["image"][4], batches[0]["image"][5])  # the next one in its place


def hangs(self, i):
    time.sleep(100)


def dies(self, i):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("reads", [hangs, dies])
def test_data_workers_that_hang_or_die_are_an_error(tmp_path, monkeypatch, reads):
    data = data_of(make_folder(tmp_path / "a"), depth="none")
    monkeypatch.setattr(m.ImageData, "decode", reads)
    with pytest.raises(m.UserError, match="data workers fail"):
        next(m.load_batches(data, micro(workers=1, timeout=2.0), [range(4)]))
    for worker in torch.multiprocessing.active_children():
        worker.kill()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_timeout_may_mean_never(tmp_path, workers):
    data = data_of(make_folder(tmp_path / "a"), depth="none")
    batch = next(m.load_batches(data, micro(workers=workers, timeout=1e9), [range(4)]))
    assert len(batch["image"]) == 4


def test_photographs_may_be_large(tmp_path, capsys):
    root = make_folder(tmp_path / "a", each=2)
    PIL.Image.new("1", (20_000, 10_000), 1).save(root / "cat" / "large.png")  # 200 megapixels, a small file
    data = data_of(root, depth="none")
    i = data.names.index("cat/large.png")
    assert (data[i]["image"] == 255).all()

    # For a larger one than memory is sure to hold the next one stands in, and a line says why.
    PIL.Image.new("1", (24_000, 24_000), 1).save(root / "cat" / "large.png")
    assert torch.equal(data[i]["image"], data[i + 1]["image"])
    assert "large.png (Image size (576000000 pixels) exceeds limit" in capsys.readouterr().err


# What users' files are like. Each test is of a fault that was met, and of others of its kind.


def test_archives_of_windows_have_folders(tmp_path):
    root = make_folder(tmp_path / "a", each=2, depth=True)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, str(file.relative_to(root)).replace("/", "\\"))
    data = data_of(tmp_path / "b.zip")
    folder = data_of(root)
    assert data.num_classes == 2
    assert data.names == folder.names
    assert torch.equal(data[3]["depth"], folder[3]["depth"])

    # And what a list of classes says.
    labels = [[f"cat\\{i}.jpg", i + 3] for i in range(2)] + [[f"dog\\{i}.jpg", 0] for i in range(2)]
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert data_of(root).labels.tolist() == [3, 4, 0, 0]


@pytest.mark.parametrize("letters", [str.upper, str.title])
def test_names_are_matched_in_any_letter_case(tmp_path, letters):
    root = make_folder(tmp_path / "a", each=2, depth=True)
    expected = data_of(root)
    for path in [*root.rglob("0_depth.png")]:
        path.rename(path.with_name(letters(path.name)))
    labels = [[letters(name), 5] for name in expected.names]
    (root / letters("dataset.json")).write_text(json.dumps({"labels": labels}))
    data = data_of(root)
    assert data.names == expected.names
    assert data.labels.tolist() == [5] * 4
    assert torch.equal(data[0]["depth"], expected[0]["depth"])


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_matched_however_they_are_written(tmp_path, forms):
    """A Mac splits letters from their accents."""
    picture, depth = (unicodedata.normalize(form, "käse") for form in forms)
    photo((40, 30)).save(tmp_path / f"{picture}.jpg")
    PIL.Image.linear_gradient("L").resize((40, 30)).save(tmp_path / f"{depth}_depth.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{depth}.jpg", 3]]}))
    data = data_of(tmp_path)
    assert data.names == [f"{picture}.jpg"]
    assert any(data.depths)
    assert data.labels.tolist() == [3]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = make_folder(tmp_path / "photos", classes=("a", "b"), each=2)
    elsewhere = make_folder(tmp_path / "elsewhere", classes=("c",), each=2)
    (root / "c").symlink_to(elsewhere / "c")
    for name in ("one", "two"):  # of which each leads to both
        (root / name).symlink_to(".")
    data = data_of(root, depth="none")
    assert len(data.names) == 6
    assert data.num_classes == 3


def test_names_that_differ_in_letter_case_alone_keep_their_depth(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    for name, depth in (("a", ramp), ("A", ramp[:, ::-1])):
        photo().save(tmp_path / f"{name}.jpg")
        PIL.Image.fromarray(depth).save(tmp_path / f"{name}_depth.png")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system knows no letter case")
    data = data_of(tmp_path)
    assert data.names == ["A.jpg", "a.jpg"]
    assert data[0]["depth"][0, 0].diff().max() < 0 < data[1]["depth"][0, 0].diff().min()


@pytest.mark.parametrize("end", [".tif", ".webp", ".PNG"])
def test_a_map_of_another_format_is_no_photograph(tmp_path, end):
    root = make_folder(tmp_path / "a", each=2)
    for path in [*root.rglob("*.jpg")]:
        PIL.Image.linear_gradient("L").rotate(90).save(
            path.with_name(f"{path.stem}_depth{end}"), lossless=True
        )
    data = data_of(root)
    assert len(data) == 4
    assert any(data.depths)
    assert (data[0]["depth"][0, 0].diff() > 0).all()


def test_what_pillow_opens_is_read_and_a_line_tells_of_the_rest(tmp_path, capsys):
    endings = ("avif", "jfif", "JPEG", "tga", "ppm", "jp2", "ico", "qoi")
    for end in endings:
        photo((32, 32)).save(tmp_path / f"{end}.{end}")
    for name in ("a.heic", "b.HEIC", "c.txt", "d", "e.pdf", ".hidden", "Thumbs.db", "dataset.json.bak"):
        (tmp_path / name).write_bytes(b"")
    data = data_of(tmp_path, depth="none")
    assert sorted(data.names) == sorted(f"{end}.{end}" for end in endings)
    for i in range(len(data)):
        data[i]
    assert not data.unreadable

    said = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert len(said) == 1
    assert ast.literal_eval(said[0].split("by ending: ")[1]) == {
        ".heic": 1, ".HEIC": 1, ".txt": 1, "": 1, ".pdf": 1, ".db": 1, ".bak": 1,
    }  # fmt: skip
    data_of(make_folder(tmp_path / "plain"), depth="none")
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [(30, 40), (60, 80), (50, 51)])
def test_a_map_that_lies_on_its_side_is_refused(tmp_path, capsys, size):
    photo((40, 30)).save(tmp_path / "0.jpg")
    photo((40, 30)).save(tmp_path / "1.jpg")
    PIL.Image.linear_gradient("L").resize((40, 30)).save(tmp_path / "1_depth.png")
    PIL.Image.linear_gradient("L").resize(size).save(tmp_path / "0_depth.png")
    data = data_of(tmp_path)
    data[0]
    slight = size == (50, 51)
    assert data.unreadable == (set() if slight else {"0.jpg"})
    if not slight:
        said = f"0.jpg (width and height of the picture are (40, 30), those of its depth {size})"
        assert said in capsys.readouterr().err

    # As where the maps are prepared.
    out = tmp_path / "out"
    assert prepare(tmp_path, out, "--depth-from", tmp_path, "--resolution", 16) == 0
    assert (out / "skipped.txt").read_text().startswith("0.jpg\t") != slight


@pytest.mark.parametrize("size", [(64, 48), (38, 38), (128, 96), (20, 30)])
def test_a_map_is_cut_as_its_picture_whatever_its_size(tmp_path, size):
    """The picture is twice as wide as high; its middle half is in the square. One rule in both programs."""
    photo((64, 32)).save(tmp_path / "0.jpg")
    if size[0] < size[1]:
        size = size[::-1]
    across = np.tile(np.linspace(0, 65535, size[0]), (size[1], 1)).astype(np.uint16)
    across[:, : size[0] // 5] = 0  # is not seen
    PIL.Image.fromarray(across).save(tmp_path / "0_depth.png")
    seen = data_of(tmp_path)[0]["depth"][0, 8]
    assert torch.allclose(seen, torch.linspace(-1, 1, 16), atol=0.1)

    out = tmp_path / "out"
    assert prepare(tmp_path, out, "--depth-from", tmp_path, "--resolution", 16) == 0
    assert torch.allclose(data_of(out)[0]["depth"][0, 8], seen, atol=1e-3)


def test_a_map_is_turned_as_its_own_file_says(tmp_path):
    exif = photo().getexif()
    exif[0x0112] = 3  # upside down
    photo((40, 30)).save(tmp_path / "0.jpg", exif=exif)
    gradient = PIL.Image.linear_gradient("L").rotate(90).resize((40, 30))
    gradient.save(tmp_path / "0_depth.png", exif=exif)
    assert (data_of(tmp_path)[0]["depth"][0, 8].diff() < 0).all()


def test_a_map_in_any_colour_is_refused():
    gray = np.tile(np.arange(40, dtype=np.uint8), (30, 1))
    for channel in range(3):
        content = io.BytesIO()
        colors = np.stack([gray] * 3, 2)
        colors[..., channel] = 9
        PIL.Image.fromarray(colors).save(content, "PNG")
        with pytest.raises(ValueError, match="it has colours"):
            m.read_depth(content.getvalue())


def test_traces_of_colour_in_a_lossy_map_are_none():
    gray = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (30, 1))
    content = io.BytesIO()
    PIL.Image.fromarray(np.stack([gray, gray + 1, gray + 3], 2)).save(content, "WEBP", lossless=True)
    assert np.array_equal(m.read_depth(content.getvalue()), gray)


@pytest.mark.parametrize("nothing", [-1, 1e10, math.inf, math.nan])
def test_what_stands_for_not_measured_is_filled(tmp_path, nothing):
    """-1, as many programs write it; 1e10, as Blender does."""
    slope = np.tile(np.linspace(1.5, 5, 40), (30, 1)).astype(np.float32)
    holed = slope.copy()
    holed[10:20, 15:25] = nothing
    assert np.allclose(m.fill_holes(holed), slope, atol=1e-5)

    photo((40, 30)).save(tmp_path / "0.jpg")
    PIL.Image.fromarray(holed).save(tmp_path / "0_depth.tif")
    depth = data_of(tmp_path)[0]["depth"][0]
    assert (depth.diff(dim=1) >= 0).all()
    assert depth.min() == -1


def test_depth_may_be_negative():
    """As along the axis of a camera that looks along -z; what is larger is farther still."""
    slope = np.tile(np.linspace(-5, -1.5, 40), (30, 1))
    assert np.array_equal(m.fill_holes(slope), slope.astype(np.float32))


def test_pictures_of_12_bits_are_not_dark():
    gray = np.tile(np.linspace(0, 4095, 40), (30, 1)).astype(np.uint16)
    picture = np.asarray(m.to_rgb(PIL.Image.fromarray(gray)))
    assert (picture.min(), picture.max()) == (0, 255)
    assert np.abs(picture[..., 0] - gray / 4095 * 255).max() < 2


def test_a_list_of_classes_may_lie_above_the_pictures(tmp_path):
    root = make_folder(tmp_path / "a" / "b", each=2)
    names = [f"b/{name}" for name in data_of(root, depth="none").names]
    listed = [[f"./{name}" if k else name, 9] for k, name in enumerate(names)]  # as `find .` prints them
    (tmp_path / "a" / "dataset.json").write_text(json.dumps({"labels": listed}))
    assert data_of(tmp_path / "a", depth="none").labels.tolist() == [9] * 4
    assert data_of(tmp_path, depth="none").labels.tolist() == [9] * 4


def test_runs_within_the_data_are_not_data(tmp_path, capsys):
    root = make_folder(tmp_path / "a", each=4)
    train_micro(root / "runs" / "a", data=root, depth="none", kimg=0.016)
    assert len(data_of(root, depth="none")) == 8
    capsys.readouterr()

    # Maps that belong to no picture are among what is not read.
    PIL.Image.linear_gradient("L").save(root / "cat" / "9_depth.png")
    data_of(root, depth="none")
    assert "not read, by ending: {'.png': 1}" in capsys.readouterr().out


def test_a_start_that_failed_is_no_run(tmp_path, capsys):
    root = tmp_path / "a"
    root.mkdir()
    (root / "0.jpg").write_text("not a picture")
    argv = ("--data", root, "--depth", "none", "--out", tmp_path / "run", *flags(**MICRO, kimg=0.016))
    assert run_main(capsys, *argv)[0] == 2
    photo().save(root / "0.jpg")
    assert run_main(capsys, *argv)[0] == 0


def test_pictures_of_floats_are_refused(tmp_path, capsys):
    root = make_folder(tmp_path / "a", each=2)
    ramp = np.linspace(0, 1, 40, dtype=np.float32)
    PIL.Image.fromarray(np.tile(ramp, (30, 1))).save(root / "cat" / "0.tif")
    data = data_of(root, depth="none")
    i = data.names.index("cat/0.tif")
    assert torch.equal(data[i]["image"], data[i + 1]["image"])
    assert "cat/0.tif (floats" in capsys.readouterr().err


def sensor_map(kind):
    """A slope from 800 to 4000 mm with a hole of zeros in it, (60, 80); which pixels it has; the slope"""
    slope = np.tile(np.linspace(800, 4000, 80), (60, 1))
    if kind == np.uint8:
        slope = slope / 16
    hole = np.zeros((60, 80), bool)
    hole[20:40, 30:50] = hole[:, -3:] = True
    return np.where(hole, 0, slope).astype(kind), ~hole, slope


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_what_a_sensor_did_not_measure_is_filled_from_around(tmp_path, capsys, kind):
    values, known, slope = sensor_map(kind)
    photo((80, 60)).save(tmp_path / "0.jpg")
    photo((80, 60)).save(tmp_path / "1.jpg")
    PIL.Image.fromarray(values).save(tmp_path / "0_depth.png")
    PIL.Image.linear_gradient("L").resize((80, 60)).save(tmp_path / "1_depth.png")  # 0 is a value of its own

    # Read beside its picture, and prepared.
    data = data_of(tmp_path, resolution=32)
    rows = [(data[0]["depth"][0, 16].numpy() + 1) / 2]
    assert not torch.equal(data[0]["depth"], data[1]["depth"])
    assert capsys.readouterr().err == ""
    out = tmp_path / "out"
    assert prepare(tmp_path, out, "--depth-from", tmp_path, "--resolution", 32) == 0
    rows.append(m.read_depth((out / "0_depth.png").read_bytes())[16] / 65535)
    for row in rows:
        assert np.abs(row - np.linspace(0, 1, 32)).max() < 0.05
        assert np.diff(row).min() > -0.02

    filled = m.fill_holes(np.where(known, slope, np.nan))
    assert np.array_equal(filled[known], slope[known].astype(np.float32))
    assert np.abs(filled - slope)[:, :-3].max() < 1
    assert np.abs(filled - slope)[:, -3:].max() < 150  # at the border there is one neighbour alone


def test_holes_that_fill_rows_are_filled_along_columns():
    slope = np.linspace(100, 900, 41)[:, None].repeat(30, 1)
    holed = slope.copy()
    holed[[0, 7, 8, 30]] = 0
    holed[20, 5] = np.nan
    filled = m.fill_holes(holed)
    assert np.abs(filled - slope)[1:].max() < 0.01
    assert np.array_equal(filled[0], filled[1])
    assert np.isnan(holed[20, 5])  # what was given is as it was


@pytest.mark.parametrize("kind", ["one hole", "a far point", "npy"])
def test_holes_of_other_kinds_are_found(tmp_path, kind):
    values, known, slope = sensor_map(np.uint16)
    if kind == "one hole":
        known[:] = True
        known[30, 40] = False
        values = np.where(known, slope, 0).astype(np.uint16)
    if kind == "a far point":
        values[0, 0] = 60_000
    (tmp_path / "maps").mkdir()
    (tmp_path / "photos").mkdir()
    photo((80, 60)).save(tmp_path / "photos" / "0.jpg")
    if kind == "npy":
        np.save(tmp_path / "maps" / "0.npy", values / 1000)
    else:
        PIL.Image.fromarray(values).save(tmp_path / "maps" / "0.png")
        filled = m.fill_holes(m.read_depth((tmp_path / "maps" / "0.png").read_bytes()))
        assert np.array_equal(filled != values, ~known)
    out = tmp_path / "out"
    assert prepare(tmp_path / "photos", out, "--depth-from", tmp_path / "maps", "--resolution", 32) == 0
    row = m.read_depth((out / "0_depth.png").read_bytes())[16] / 65535
    assert np.diff(row).min() > -0.02


def test_what_is_transparent_in_a_map_is_a_hole():
    slope = np.linspace(50, 200, 40).round().astype(np.uint8)[None].repeat(30, 0)
    alpha = np.full((30, 40), 255, np.uint8)
    alpha[5:9, 10:30] = 0
    for shown in ([slope], [slope] * 3):
        values = np.where(alpha > 0, np.stack(shown), 0)
        mode = {1: "LA", 3: "RGBA"}[len(shown)]
        buffer = io.BytesIO()
        PIL.Image.fromarray(np.stack([*values, alpha], -1), mode).save(buffer, "PNG")
        depth = m.read_depth(buffer.getvalue())
        assert np.array_equal(np.isnan(depth), alpha == 0)
        assert np.abs(m.fill_holes(depth) - slope).max() <= 1

    # a palette of gray, of which one entry is transparent
    image = PIL.Image.fromarray(np.where(alpha > 0, slope, 7).astype(np.uint8)).convert("P")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=7)
    depth = m.read_depth(buffer.getvalue())
    assert np.array_equal(np.isnan(depth), alpha == 0)
    assert np.array_equal(depth[alpha > 0], slope[alpha > 0])


def test_beyond_the_range_of_a_sensor_is_as_far_as_the_farthest():
    """65535 in a map in millimetres would leave all else a hundredth of the range."""
    values = np.linspace(800, 4000, 40).astype(np.uint16)[None].repeat(30, 0)
    far = values.copy()
    far[:6] = 65535
    filled = m.fill_holes(far)
    assert (filled[:6] == 4000).all()
    assert np.array_equal(filled[6:], values[6:])

    # in a map that uses the whole range it is a depth like another
    whole = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    assert np.array_equal(m.fill_holes(whole), whole)
    behind = np.where(far == 65535, 65535, whole // 30 - whole[6, 0] // 30)  # as lereS_depth.py writes
    assert np.array_equal(m.fill_holes(behind), behind)

    # ... and so it is where there is more
    metres = np.where(far == 65535, 200_000, far.astype(float))
    metres[29] = 65535
    assert np.array_equal(m.fill_holes(metres), metres)


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("kind", ["zeros", "nan", "few"])
def test_maps_of_which_nothing_is_measured_are_named(tmp_path, invert, kind):
    values = np.full((30, 40), np.nan if kind == "nan" else 0.0)
    if kind == "few":
        values[3, 3:6] = 7, 8, 9
    (tmp_path / "photos").mkdir()
    photo((40, 30)).save(tmp_path / "photos" / "0.jpg")
    np.save(tmp_path / "0.npy", values)
    options = ("--depth-from", tmp_path, "--resolution", 16, *["--invert"] * invert)
    assert prepare(tmp_path / "photos", tmp_path / "out", *options) == 2
    said = (tmp_path / "out" / "skipped.txt").read_text()
    assert said == "0.jpg\tValueError: less than a tenth of its depth is measured\n"

    # When the map has been mended, the same command goes on.
    np.save(tmp_path / "0.npy", np.tile(np.linspace(1, 2, 40), (30, 1)))
    assert prepare(tmp_path / "photos", tmp_path / "out", *options) == 0


@pytest.mark.parametrize("levels", [(0, 255), (0, 100, 200), (0, 64, 128, 192, 255)])
def test_zeros_of_few_levels_are_depth(levels):
    values = np.repeat(np.array(levels, np.uint8), 16)[None].repeat(40, 0)
    content = io.BytesIO()
    PIL.Image.fromarray(values).save(content, "PNG")
    assert np.array_equal(m.fill_holes(m.read_depth(content.getvalue())), values)


def test_zeros_of_disparity_are_far(tmp_path):
    disparity = np.tile(np.linspace(100, 400, 60), (40, 1))
    disparity[:, :11] = 0
    for folder in ("photos", "maps"):
        (tmp_path / folder).mkdir()
    photo((60, 40)).save(tmp_path / "photos" / "0.jpg")
    PIL.Image.fromarray(disparity.astype(np.uint16)).save(tmp_path / "maps" / "0.PNG")
    out = tmp_path / "out"
    options = ("--depth-from", tmp_path / "maps", "--invert", "--resolution", 40)
    assert prepare(tmp_path / "photos", out, *options) == 0
    row = m.read_depth((out / "0_depth.png").read_bytes())[20] / 65535  # of the columns 10 to 50
    depth = 1 / np.linspace(100, 400, 60)[10:50]
    depth[0] = 1 / 40  # a zero
    expected = (depth - depth.min()) / (depth.max() - depth.min())
    assert np.abs(row - expected)[2:].max() < 0.02
    assert row[0] > 0.9 > row[2]  # behind all that was measured


def test_maps_may_be_in_linked_folders(tmp_path):
    root = make_folder(tmp_path / "a", classes=("cat",), each=1, depth=True)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    photo((40, 30)).save(tmp_path / "photos" / "cat" / "0.jpg")
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "cat").symlink_to(root / "cat")
    options = ("--depth-from", tmp_path / "maps", "--resolution", 16)
    assert prepare(tmp_path / "photos", tmp_path / "out", *options) == 0


@pytest.mark.parametrize("folders", [("rgb", "depth"), ("train", "val"), ("left", "right")])
def test_a_line_names_the_classes_and_says_what_to_do_if_they_are_none(tmp_path, capsys, folders):
    data = data_of(make_folder(tmp_path / "a", classes=folders, each=2), depth="none")
    assert data.num_classes == 2
    names = ", ".join(sorted(folders))
    hint = "if parts of one set, give one as --data"
    assert f"2 classes: {names}; {hint}" in capsys.readouterr().out
    data_of(tmp_path / "a" / folders[0], depth="none")
    assert "classes" not in capsys.readouterr().out


def mutate(content, rng):
    """A few bytes are overwritten, cut out or put in, or the rest is cut off."""
    content = bytearray(content)
    i = int(rng.integers(len(content)))
    n = int(rng.integers(1, 20))
    kind = rng.integers(4)
    if kind == 0:
        content[i : i + n] = rng.bytes(n)
    elif kind == 1:
        del content[i : i + n]
    elif kind == 2:
        content[i:i] = rng.bytes(n)
    else:
        del content[i:]
    return bytes(content)


def read_outcome(path):
    """What reading a checkpoint, or all of a folder or zip of images, comes to."""
    try:
        if path.suffix == ".pt":
            m.load_checkpoint(path)
            return "read"
        data = data_of(path)
        for i in range(len(data)):
            data[i]
        return "skipped" if data.unreadable else "read"
    except m.UserError as e:
        assert "\n" not in str(e)
        return "refused"


@pytest.mark.filterwarnings("ignore")
def test_200_mutated_files_are_refused_or_skipped(tmp_path, run):
    root = make_folder(tmp_path / "a", each=2, depth=True)
    archive = make_zip(tmp_path / "a.zip", root)
    labels = [["cat/0.jpg", 1], ["cat/1.jpg", 0], ["dog/0.jpg", 2], ["dog/1.jpg", 1]]
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    saved = Path(shutil.copy(newest(run), tmp_path))

    # the file that is damaged, and what is read then
    cases = {
        root / "cat" / "0.jpg": root,
        root / "cat" / "0_depth.png": root,
        root / "dataset.json": root,
        archive: archive,
        saved: saved,
    }
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(40):
        for file, source in cases.items():
            whole = file.read_bytes()
            file.write_bytes(mutate(whole, rng))
            outcomes.append(read_outcome(source))
            file.write_bytes(whole)

    assert len(outcomes) == 200
    assert outcomes.count("skipped") > 30
    assert outcomes.count("refused") > 50


def first_batches(n, step=0, rank=0, world=1):
    """n batches of indices from a step on, of 50 images and their mirror images."""
    return list(itertools.islice(m.draw_batches(micro(), 50, step, rank, world), n))


def test_batches_are_the_same_however_they_are_split():
    whole = first_batches(13)
    halves = zip(first_batches(13, rank=0, world=2), first_batches(13, rank=1, world=2), strict=True)
    assert whole == [a + b for a, b in halves]
    assert whole[5:] == first_batches(8, step=5)  # a resumed run

    # an epoch: the data and its mirror image
    order = list(itertools.chain(*whole))
    assert sorted(order[:100]) == list(range(100))
    assert order[:100] != order[100:200]


def test_batches_are_of_the_data_alone_without_mirror_images():
    batches = m.draw_batches(micro(mirror=False), 48, 0, 0, 1)
    order = list(itertools.chain(*itertools.islice(batches, 3)))
    assert sorted(order) == list(range(48))


# ------------------------------------------------------------------------------------------------------------
# Ops: upsampling, and the fused tri-plane query: custom_ops.cu against PyTorch's own operators

BOX = 0.5
DEVICES = ["cpu", pytest.param("cuda", marks=has_gpu)]


def test_upsampling_is_zero_insertion_and_fir():
    x = torch.randn(2, 3, 6, 6)
    spread = torch.zeros(2, 3, 12, 12)
    spread[:, :, ::2, ::2] = x
    expected = m.fir_filter(F.pad(spread, (2, 1, 2, 1)), 0, gain=4)
    assert torch.allclose(m.upsample(x), expected, atol=1e-5)


def query_inputs(C, T=9, N=70, dtype=torch.float32, device="cpu"):
    """-> planes (2, 3, C, T, T), points (2, N, 3) inside, outside, and exactly on the border, a decoder"""
    torch.manual_seed(C)
    planes = torch.randn(2, 3, C, T, T)
    points = 1.3 * (torch.rand(2, N, 3) - 0.5)
    special = [[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5], [0.5, -0.5, 0.1], [0.5, 0, 9], [-900, 0.2, 0]]
    points[0, : len(special)] = torch.tensor(special)[:N]

    real = torch.float64 if dtype == torch.float64 else torch.float32
    planes = planes.to(device, dtype).requires_grad_()
    points = points.to(device, real).requires_grad_()
    return planes, points, m.TriplaneDecoder(C).to(device, real)


@torch.backends.cudnn.flags(enabled=False)  # whose slopes exactly on a pixel may be those of its other side
def plain_features(planes, points):
    return m.sample_triplane(planes, points, BOX)


def fused_features(planes, points):
    no_decoder = points.new_empty(0)
    return m.triplane(planes, points, BOX, no_decoder)


@torch.backends.cudnn.flags(enabled=False)
def query(planes, points, decoder, fused):
    """Colour and density, side by side. -> (B, N, 4)"""
    rgb, sigma = m.query_triplane(planes, points, BOX, decoder, fused)
    return torch.cat([rgb, sigma[..., None]], -1)


def with_gradients(values, *inputs):
    """-> [values, the gradients of a fixed combination of them with respect to each of the inputs]"""
    cotangent = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    return [values, *torch.autograd.grad((values * cotangent).sum(), inputs)]


def largest(x):
    return float(x.detach().double().abs().max())


def assert_close(got, expected, tolerance=1e-5):
    """Two lists of tensors; the tolerance counts from the largest number, 1 at least."""
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert largest(x.double() - y.double()) <= tolerance * max(1.0, largest(y))


@compiles
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "C, N", [(1, 7), (3, 70), (4, 1), (16, 70), (20, 33), (32, 129), (32, 3000), (40, 70)]
)
def test_fused_query_is_the_plain_one(device, C, N):
    planes, points, decoder = query_inputs(C, N=N, device=device)
    parameters = list(decoder.parameters())
    features = with_gradients(plain_features(planes, points), planes, points)
    colors = with_gradients(query(planes, points, decoder, False), planes, points, *parameters)

    # in every layout in memory: channels first, and last for each plane, and for all three
    values = planes.detach()
    each = values.movedim(2, 4).contiguous().movedim(4, 2)
    together = values.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    for layout in (values, each, together):
        layout = layout.detach().requires_grad_()
        assert_close(with_gradients(fused_features(layout, points), layout, points), features)
        fused = query(layout, points, decoder, True)
        assert_close(with_gradients(fused, layout, points, *parameters), colors)

    # one scene for all: its gradients add up
    one = values[:1].requires_grad_()
    scenes = one.expand(2, -1, -1, -1, -1)
    assert_close(
        with_gradients(fused_features(scenes, points), one, points),
        with_gradients(plain_features(scenes, points), one, points),
    )


@compiles
@pytest.mark.parametrize("device", DEVICES)
def test_points_out_of_this_world_see_nothing_and_change_nothing(device):
    planes, points, _ = query_inputs(8, device=device)
    usual = points.detach()[:, 20:].requires_grad_()
    expected = with_gradients(fused_features(planes, usual), planes, usual)

    strange = points.detach().clone()
    nowhere = [[math.nan, 0, 0], [0, math.inf, 0.1], [1e30, -1e30, 1e30], [-math.inf, 2, 2]]
    strange[:, :20] = torch.tensor(nowhere * 5)
    strange[:, :20, 2] = 3  # beyond every plane
    strange.requires_grad_()
    features, grad_planes, grad_points = with_gradients(fused_features(planes, strange), planes, strange)

    assert not features[:, :20].any()
    assert not grad_points[:, :20].any()
    assert_close([features[:, 20:]], expected[:1])
    assert grad_planes.isfinite().all()


@compiles
@pytest.mark.parametrize("device", DEVICES)
def test_fused_query_of_bfloat16_planes_sums_in_float32(device):
    for C in (6, 32):
        planes, points, _ = query_inputs(C, dtype=torch.bfloat16, device=device)
        wide = planes.detach().float().requires_grad_()
        features, grad_planes, grad_points = with_gradients(fused_features(planes, points), planes, points)
        expected = with_gradients(fused_features(wide, points), wide, points)
        assert features.dtype == torch.float32
        assert grad_planes.dtype == torch.bfloat16
        assert_close([features, grad_points], [expected[0], expected[2]], 1e-6)
        assert_close([grad_planes], [expected[1]], 2**-8)  # rounded once, at the end


@compiles
def test_fused_query_against_finite_differences():
    planes, points, decoder = query_inputs(3, T=4, N=8, dtype=torch.float64)
    points = points.detach()[:, -2:].requires_grad_()  # off the corners of cells
    assert torch.autograd.gradcheck(fused_features, (planes, points))
    assert torch.autograd.gradcheck(
        lambda planes, points, *_: query(planes, points, decoder, True),
        (planes, points, *decoder.parameters()),
    )


@compiles
def test_fused_query_reads_points_and_gradients_of_any_layout():
    planes, points, decoder = query_inputs(8)
    packed = decoder.packed().detach().requires_grad_()
    inputs = (planes, points, packed)
    colors = m.triplane(planes, points, BOX, packed)
    cotangent = torch.randn_like(colors)
    expected = [colors, *torch.autograd.grad(colors, inputs, cotangent)]

    turned = points.transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous
    colors = m.triplane(planes, turned, BOX, packed)
    cotangent = cotangent.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close([colors, *torch.autograd.grad(colors, inputs, cotangent)], expected, 1e-6)


@compiles
@pytest.mark.parametrize("reduce", [torch.sum, torch.norm])
def test_fused_query_has_no_second_derivatives_and_says_so(reduce):
    """Silence would be a wrong gradient: what the penalty adds would be 0."""
    planes, points, _ = query_inputs(8)
    with pytest.raises(RuntimeError):
        value = reduce(fused_features(planes, points))
        (slope,) = torch.autograd.grad(value, points, create_graph=True)
        torch.autograd.grad(slope.square().sum() + planes.sum(), planes)


@compiles
def test_fused_query_under_autocast():
    planes, points, _ = query_inputs(8)
    with torch.autocast("cpu", torch.bfloat16):  # points keep their precision
        assert_close([fused_features(planes, points)], [plain_features(planes.float(), points)])


@compiles
def test_fused_query_refuses_what_it_cannot_read():
    planes, points, decoder = query_inputs(8)
    wrong = [
        (planes.half(), points),
        (planes, points[:1]),
        (planes, points[..., None]),
        (planes, points.double()),
        (planes[..., :-1], points),
    ]
    for inputs in wrong:
        with pytest.raises(ValueError, match="planes \\(B, 3, C, T, T\\)"):
            fused_features(*inputs)
    of_20_channels, _, _ = query_inputs(20)
    with pytest.raises(ValueError, match="packed"):
        m.triplane(of_20_channels, points, BOX, decoder.packed())  # which has weights for 8


@compiles
def test_fused_query_of_no_points():
    planes, points, _ = query_inputs(8)
    none = points.detach()[:, :0].requires_grad_()
    features, grad_planes, _ = with_gradients(fused_features(planes, none), planes, none)
    assert features.shape == (2, 0, 8)
    assert not grad_planes.any()


@compiles
def test_fused_query_does_not_depend_on_the_number_of_threads():
    planes, points, decoder = query_inputs(20, N=3000)
    planes = planes.detach()[:1].requires_grad_()  # so that threads share planes
    points = points.detach()[:1].requires_grad_()
    packed = decoder.packed().detach().requires_grad_()

    threads = torch.get_num_threads()
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for n in (1, 2, 16):
            torch.set_num_threads(n)
            colors = m.triplane(planes, points, BOX, packed)
            results.append(with_gradients(colors, planes, points, packed))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)

    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@compiles
@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_32_bits(device):
    C, T = 4, 3
    scene = 2**31  # numbers from one scene to the next: hardly any of this memory is touched
    storage = torch.empty(scene + 3 * T * T * C, dtype=torch.bfloat16, device=device)
    planes = storage.as_strided((2, 3, C, T, T), (scene, T * T * C, 1, T * C, C))
    values, points, _ = query_inputs(C, T, dtype=torch.bfloat16, device=device)
    planes.copy_(values.detach())
    assert_close([fused_features(planes, points)], [fused_features(values, points)], 0)


@compiles
def test_training_uses_the_fused_query(monkeypatch):
    calls = []
    call_custom_ops = m.call_custom_ops

    def counted(*args):
        calls.append(1)
        return call_custom_ops(*args)

    monkeypatch.setattr(m, "call_custom_ops", counted)
    images = []
    for fused in (True, False):
        torch.manual_seed(0)
        G = m.Generator(micro(fused=fused)).eval()
        z, c, prior = m.draw_latents(G.cfg, 4, torch.arange(3))
        image, _ = m.synthesize(G, z, c, prior, torch.zeros(4).long())
        image.sum().backward()
        images.append(image)
        assert len(calls) == 4  # two forward, two backward, and none of the second round
    assert_close(images[:1], images[1:])


@compiles
def test_gradients_of_two_queries_are_added_in_place(monkeypatch):
    planes, points, decoder = query_inputs(16)
    filled, arrived = [], []  # addresses of gradients of planes
    call_custom_ops = m.call_custom_ops

    def watched(*args):
        filled.extend(grad_planes.data_ptr() for grad_planes in args[6:7])  # none in a forward pass
        return call_custom_ops(*args)

    monkeypatch.setattr(m, "call_custom_ops", watched)
    doubled = 2 * planes
    doubled.register_hook(lambda grad: arrived.append(grad.data_ptr()))
    coarse, fine = (query(doubled, points, decoder, True) for _ in range(2))
    (coarse + fine).sum().backward()
    assert len(filled) == 2 and len(arrived) == 1
    assert arrived[0] in filled


def test_planes_and_the_largest_maps_have_a_pixels_channels_adjacent():
    backbone = m.TriplaneBackbone(micro())
    *_, last = backbone.values()
    maps = []
    last.conv1.register_forward_hook(lambda layer, inputs, out: maps.append(out))
    planes = backbone(torch.randn(2, micro().w_dim))
    assert planes.permute(0, 3, 4, 1, 2).is_contiguous()
    assert maps[0].is_contiguous(memory_format=torch.channels_last)


# A program that says how long threads are to spin when PyTorch is imported, and ends there.
SPIN = f"""
import importlib, os, sys

class AtTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch())
sys.path.insert(0, {str(HERE)!r})
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("program", ["3dgp", "lereS_depth"])
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(program):
    """Threads that spin at every barrier slow down many times beside one other busy process."""

    def spin(**given):
        others = {name: value for name, value in os.environ.items() if "OMP" not in name}
        command = [sys.executable, "-c", SPIN, program]
        return subprocess.check_output(command, text=True, env={**others, **given}).strip()

    assert spin() == "1000"
    assert spin(GOMP_SPINCOUNT="5") == "5"
    assert spin(OMP_WAIT_POLICY="active") == "None"


# A program that says whether it has the fused query, and a number that depends on it.
QUERY = f"""
import importlib, sys, torch
sys.path.insert(0, {str(HERE)!r})
m = importlib.import_module("3dgp")
torch.manual_seed(0)
G = m.Generator(m.Config(**{MICRO!r})).eval()
z, c, prior = m.draw_latents(G.cfg, 4, torch.zeros(0).long())
image, _ = m.synthesize(G, z, c, prior, torch.zeros(4).long())
print(m.custom_ops("cpu") is not None, image.square().mean().item())
"""


def start_query(**env):
    """env: what differs in its environment; TORCH_EXTENSIONS_DIR is where the fused query is built."""
    return subprocess.Popen(
        [sys.executable, "-c", QUERY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


@compiles
def test_processes_that_start_at_once_build_once_each_and_agree(tmp_path):
    cache = str(tmp_path / "cache")
    started = [start_query(TORCH_EXTENSIONS_DIR=cache, RANK=str(rank)) for rank in range(3)]
    results = [p.communicate() for p in started]
    assert all(p.returncode == 0 for p in started), results
    (first, said), (second, silence), (third, silence_too) = results
    assert first.startswith("True")
    assert first == second == third

    # the first one speaks, and nothing half-made is left
    assert re.fullmatch(r"compiling custom_ops.cu for \w+, once\n", said)
    assert silence == silence_too == ""
    assert len(os.listdir(cache)) == 1

    # from then on it is there
    assert start_query(TORCH_EXTENSIONS_DIR=cache).communicate() == (first, "")


@compiles
def test_where_custom_ops_do_not_compile_pytorch_does_the_same(tmp_path):
    broken = [dict(CXX="/no/such/compiler"), dict(PATH="/nowhere"), dict(CXX="false")]
    started = []
    for i, env in enumerate(broken):
        started.append(start_query(TORCH_EXTENSIONS_DIR=str(tmp_path / str(i)), **env))
    fused, _ = start_query().communicate()
    assert fused.startswith("True")
    value = float(fused.split()[1])

    for process in started:
        out, err = process.communicate()
        has_custom_ops, plain = out.split()
        assert has_custom_ops == "False", err
        assert float(plain) == pytest.approx(value, rel=1e-5)
        assert err.count("custom_ops.cu is not used") == 1, err
        assert len(err.splitlines()) <= 2, err  # the first one says that it compiles


@pytest.mark.parametrize("damaged", [True, False])
def test_a_cache_that_is_damaged_or_cannot_be_written_is_one_warning(tmp_path, monkeypatch, capsys, damaged):
    cache = tmp_path / "cache"
    cache.write_bytes(b"\x7fELF, once")  # neither a library nor a folder
    if damaged:
        monkeypatch.setattr(m, "compile_custom_ops", lambda device_type: cache)
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
    assert m.custom_ops.__wrapped__("cpu") is None
    err = capsys.readouterr().err
    assert err.count("custom_ops.cu is not used; PyTorch's own operators do the same") == 1
    assert len(err.splitlines()) <= 2  # the first one says that it compiles


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_kernels_compile_for_three_generations_without_warnings_or_spills(tmp_path):
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    names = [name for name in ("80", "90", "100") if f"compute_{name}" in known]  # 100 from CUDA 12.8 on
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    warnings = ["-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra"]
    command = ["nvcc", "-std=c++17", "-O3", *warnings, *targets]
    command += ["-fatbin", "-o", tmp_path / "out", HERE / "custom_ops.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said

    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == len(targets) * 16
    assert set(spills) == {("0", "0")}


# ------------------------------------------------------------------------------------------------------------
# Camera, camera generator and its regularisers, patches


def test_a_camera_is_its_parameters():
    parameters = torch.rand(4, 6)
    cameras = m.make_camera(parameters)
    assert torch.equal(m.camera_parameters(cameras), parameters)
    assert (cameras.radius == 1).all()


def test_camera_looks_where_it_should():
    cameras = camera(3, yaw=0.4, pitch=1.3, look_at=(0.7, 1.1, 0.15))
    pose = m.cam2world(cameras)
    rotation = pose[:, :3, :3]
    target = m.spherical_to_cartesian(cameras.look_at_yaw, cameras.look_at_pitch, cameras.look_at_radius)
    forward = F.normalize(target - pose[:, :3, 3], dim=1)
    assert torch.allclose(-pose[:, :3, 2], forward, atol=1e-6)
    assert torch.allclose(rotation @ rotation.transpose(1, 2), torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(3), atol=1e-6)

    # upright, no roll
    assert (pose[:, 1, 1] > 0).all()
    assert (pose[:, 1, 0].abs() < 1e-6).all()

    # yaw 0 lies on +z
    frontal = m.cam2world(camera())[0]
    assert torch.allclose(frontal[:3, 3], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)


def degrees_between(a, b):
    """The angle between two unit vectors."""
    return math.degrees(math.acos(float((a * b).sum())))


def test_rays_span_the_field_of_view():
    _, rays = m.camera_rays(camera(fov=40.0), 5)
    rays = rays.view(5, 5, 3)
    middle, left, top = rays[2, 2], rays[2, 0], rays[0, 2]
    assert degrees_between(left, middle) == pytest.approx(20, abs=1e-3)
    assert degrees_between(top, middle) == pytest.approx(20, abs=1e-3)

    # x right, first row on top
    assert rays[2, 4, 0] > 0
    assert top[1] > 0
    assert torch.allclose(rays.norm(dim=-1), torch.ones(5, 5))


def test_prior_and_posterior_stay_in_range():
    cfg = micro()
    low, high = m.camera_ranges(cfg).unbind(1)
    prior = m.sample_camera_prior(cfg, 4000, "cpu")
    p = m.camera_parameters(prior)
    assert (p >= low - 1e-4).all()
    assert (p <= high + 1e-4).all()
    assert torch.allclose(p.min(0).values, low, atol=0.1)
    assert torch.allclose(p.max(0).values, high, atol=0.1)

    # uniform on the sphere: the height is uniform in [-1, 1]
    height = p[:, 4].cos()
    assert height.mean().abs() < 0.05
    assert height.square().mean() == pytest.approx(1 / 3, abs=0.03)

    # a camera generator whose sigmoids saturate
    generator = m.CameraGenerator(cfg)
    for adaptor in (generator.origin_adaptor, generator.look_at_adaptor):
        adaptor.main[1].weight.data.mul_(1000)
    posterior = generator(prior, torch.randn(4000, 8), torch.randint(3, (4000,)))
    q = m.camera_parameters(posterior)
    assert (q >= low - 1e-5).all()
    assert (q <= high + 1e-5).all()
    assert q[:, 1].min() > low[1]
    assert q[:, 1].max() < high[1]


def test_posterior_is_an_affine_function_of_the_sigmoid():
    """low + sigmoid x range; pitch has 1e-5 less on each side, and no clamp."""
    cfg = micro()
    generator = m.CameraGenerator(cfg).double()
    shares = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.2], dtype=torch.float64)
    layers = generator.origin_adaptor.main[1], generator.look_at_adaptor.main[1]
    for layer, share in zip(layers, (shares[[0, 1, 0, 0]], shares[2:]), strict=True):
        layer.weight.data.zero_()
        layer.bias.data.copy_(share.logit() / layer.scale)

    prior = m.Camera(*(x.double() for x in m.sample_camera_prior(cfg, 4, "cpu")))
    posterior = generator(prior, torch.randn(4, cfg.z_dim).double(), torch.zeros(4).long())
    low, high = m.camera_ranges(cfg).double().unbind(1)
    expected = low + shares * (high - low)
    expected[1] = low[1] + 1e-5 + 0.3 * (high[1] - low[1] - 2e-5)
    assert torch.allclose(m.camera_parameters(posterior), expected.expand(4, 6), rtol=0, atol=1e-7)


def test_emd_closed_forms():
    a = torch.randn(64)
    assert float(m.emd_1d(a, a.flip(0))) == 0
    assert float(m.emd_1d(a, a + 3)) == pytest.approx(9, rel=1e-5)
    assert float(m.emd_1d(a, 2 * a)) == pytest.approx(float(a.square().mean()), rel=1e-5)

    # the best of all ways to pair five with five
    few = a[:5].double()
    others = torch.randn(5).double()
    costs = []
    for order in itertools.permutations(range(5)):
        costs.append(float((few - others[list(order)]).square().mean()))
    assert float(m.emd_1d(few, others)) == pytest.approx(min(costs), rel=1e-6)


def keeps_the_prior(prior, z, c):
    return prior


def shrinks_yaw(prior, z, c):
    return prior._replace(yaw=0.01 * prior.yaw)


def test_gradient_penalty_is_least_when_the_posterior_follows_the_prior():
    prior = m.sample_camera_prior(micro(), 16, "cpu")
    least = m.camera_gradient_penalty(keeps_the_prior, prior, None, None)
    assert torch.allclose(least, torch.full((6,), 2.0), atol=1e-3)
    assert m.camera_gradient_penalty(shrinks_yaw, prior, None, None)[0] > 50


def test_patch_of_render_is_patch_of_full_render():
    G = m.Generator(micro()).eval()
    planes = torch.randn(2, 3, 4, 16, 16)
    patch = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.0, 0.5]])
    with torch.no_grad():
        full = torch.cat(G.render(planes, camera(2), 33), 1)
        part = torch.cat(G.render(planes, camera(2), 17, patch), 1)
    assert torch.allclose(part[0], full[0, :, 12:29, 8:25], atol=1e-5)  # rows are counted from the top
    assert torch.allclose(part[1], full[1, :, 0:17, 0:17], atol=1e-5)
    assert torch.allclose(part, m.extract_patch(full, patch, 17), atol=1e-5)


def test_patch_statistics():
    cfg = micro(resolution=32)  # patches of 8 pixels: a quarter of the side at least
    torch.manual_seed(0)
    early = m.sample_patch(cfg, 4000, 0)
    late = m.sample_patch(cfg, 4000, cfg.patch_kimg)
    assert early[:, 0].mean() > 0.99  # whole images

    # the mean of Beta(1, b) is 1 / (1 + b)
    assert late[:, 0].mean() == pytest.approx(0.25 + 0.75 / 1.8, abs=0.02)
    for patch in (early, late):
        assert (patch[:, 0] >= 0.25).all()
        assert (patch[:, 0] <= 1).all()
        assert (patch[:, 1:] >= 0).all()
        assert (patch[:, 1:] <= 1 - patch[:, :1] + 1e-6).all()

    # four consecutive images share one
    groups = late[:, 0].view(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique()) > 900


# ------------------------------------------------------------------------------------------------------------
# Rendering


def test_lone_opaque_plane_renders_at_its_depth():
    """Density is a steep ramp in z: the decoder reads z off the (x, z) plane. The wall stands at z = 0.1."""
    G = m.Generator(micro(coarse_samples=128, fine_samples=32)).eval().requires_grad_(False)
    planes = torch.zeros(1, 3, 4, 16, 16)
    planes[:, 1, 0] = torch.linspace(-0.5, 0.5, 16)[:, None]  # feature 0 of the mean is z / 3

    # the difference of the leaky ReLUs of z and of -z is linear in z
    first, second = G.decoder.model
    for p in G.decoder.parameters():
        p.zero_()
    first.weight[0, 0] = 1
    first.weight[1, 0] = -1
    second.weight[3, 0] = -1e9  # opaque within a micrometre
    second.weight[3, 1] = 1e9
    _, unit = G.decoder(torch.tensor([[1 / 3, 0, 0, 0]]))  # raw density at z = 1
    assert unit < -1e6
    second.bias[3] = -0.1 * unit
    color = torch.tensor([0.2, -0.4, 0.6])
    second.bias[:3] = color

    rgb, depth = G.render(planes, camera(fov=20.0), 9)
    _, rays = m.camera_rays(camera(fov=20.0), 9)
    expected = 0.9 / -rays[0, :, 2]
    half_interval = 0.5 / 127 / 2  # of the coarse samples
    assert (depth.flatten() - expected).abs().max() < 1.1 * half_interval
    assert torch.allclose(rgb[0, :, 4, 4], color, atol=1e-4)


def test_weights_sum_to_one_and_importance_follows_them():
    depths = torch.linspace(0.75, 1.25, 16).expand(5, 16)
    weights = m.ray_weights(torch.randn(5, 16), depths)
    assert torch.allclose(weights.sum(-1), torch.ones(5), atol=1e-5)  # the last sample takes what is left

    # all weight on the eighth sample: all that are drawn lie around it
    weights = torch.zeros(1, 16)
    weights[0, 7] = 1
    fine = m.importance_depths(depths[:1], weights, torch.linspace(0.01, 0.99, 50)[None])
    low = (depths[0, 6] + depths[0, 7]) / 2
    high = (depths[0, 7] + depths[0, 8]) / 2
    assert (fine >= low - 1e-3).all()
    assert (fine <= high + 1e-3).all()


def test_evaluation_is_deterministic_and_training_is_not():
    G = m.Generator(micro())
    planes = torch.randn(1, 3, 4, 16, 16)
    G.eval()
    assert torch.equal(G.render(planes, camera(), 8)[0], G.render(planes, camera(), 8)[0])
    G.train()
    assert not torch.equal(G.render(planes, camera(), 8)[0], G.render(planes, camera(), 8)[0])


def test_render_does_not_depend_on_the_chunk():
    G = m.Generator(micro()).eval().requires_grad_(False)
    planes = torch.randn(2, 3, 4, 16, 16)
    whole = torch.cat(G.render(planes, camera(2), 16), 1)
    parts = torch.cat(G.render(planes, camera(2), 16, chunk=77), 1)
    assert torch.allclose(whole, parts, atol=1e-6)


def test_the_cut_is_the_median_of_all_images_in_both_passes():
    G = m.Generator(micro()).eval().requires_grad_(False)
    planes = torch.randn(2, 3, 4, 16, 16)
    planes[1] *= 3  # so that the median of both is neither's own
    rays = m.camera_rays(camera(2), 16)
    _, uncut = G.render(planes, camera(2), 16)

    def without_fog(sigma_raw):
        """A raw density of -inf is none."""
        sigma = F.softplus(sigma_raw)
        return sigma_raw.masked_fill(sigma < sigma.flatten().median(), -math.inf)

    # by hand: of the coarse samples' densities, before the fine ones are placed, and then of all
    size = (2, 256)
    coarse = m.stratified_depths(0.75, 1.25, size, G.cfg.coarse_samples, False, "cpu")
    rgb, sigma_raw = G.query(planes, *rays, coarse)
    weights = m.ray_weights(without_fog(sigma_raw), 2 * coarse)
    u = (torch.arange(G.cfg.fine_samples) + 0.5) / G.cfg.fine_samples
    fine = m.importance_depths(coarse, weights, u.expand(*size, -1))
    fine_rgb, fine_sigma = G.query(planes, *rays, fine)
    depths, order = torch.cat([coarse, fine], -1).sort(-1)
    rgb = torch.cat([rgb, fine_rgb], -2).gather(-2, order[..., None].expand(-1, -1, -1, 3))
    sigma_raw = torch.cat([sigma_raw, fine_sigma], -1).gather(-1, order)
    _, depth, _ = m.march_rays(rgb, without_fog(sigma_raw), depths)

    _, found = G.render(planes, camera(2), 16, chunk=100, cut=True)
    assert torch.allclose(found, depth.view(2, 1, 16, 16), atol=1e-4)
    assert (found - uncut).abs().max() > 1e-3


def test_the_coarse_pass_counts_distance_from_near_to_far():
    """A scene that is stretched with near and far has its fine samples at the stretched places."""
    shares = []
    for near, far in ((0.75, 1.25), (0.5, 2.0)):
        G = m.Generator(micro(near=near, far=far, coarse_samples=12, fine_samples=12)).eval()

        def query(planes, origins, directions, depths, near=near, far=far):
            share = (depths - near) / (far - near)
            return depths[..., None].expand(-1, -1, -1, 3), 4 * (9 * share).sin()

        G.query = query
        _, _, depths = G.sample_rays(torch.zeros(1), torch.zeros(1, 5, 3), torch.ones(1, 5, 3))
        shares.append((depths - near) / (far - near))
    assert torch.allclose(*shares, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Generator


def test_adaptor_computes_the_chosen_candidates():
    adaptor = m.DepthAdaptor(micro())
    depth = torch.rand(6, 1, 8, 8) * 0.5 + 0.75
    for choice in ([2, 0, 3, 1, 3, 0], [0] * 6, [3] * 6):
        choice = torch.tensor(choice)
        adapted = adaptor(depth, choice)
        candidates = torch.stack([adaptor.adapt(depth, level) for level in range(4)])  # (4, 6, 1, 8, 8)
        expected = candidates[choice, torch.arange(6)]
        assert torch.allclose(adapted, expected, atol=1e-6)

        adapted.sum().backward()
        for p in adaptor.parameters():
            assert p.grad is not None
            assert p.grad.isfinite().all()


@pytest.mark.parametrize("kind, level", [("random", 3), ("never", 0)])
def test_outside_training_the_last_trained_candidate_is_seen(kind, level):
    adaptor = m.DepthAdaptor(micro(depth_adaptor=kind))
    depth = torch.rand(2, 1, 8, 8) * 0.5 + 0.75
    assert torch.allclose(adaptor.adapt(depth), adaptor.adapt(depth, level), atol=1e-6)


def test_in_two_dimensions_the_backbone_paints_the_picture():
    """Whole, or a patch of it."""
    G = m.Generator(micro(dims=2, depth="none", camera="frontal", triplane_features=1)).eval()
    z, c, prior = m.draw_latents(G.cfg, 4, torch.arange(3), "test")
    with torch.no_grad():
        painted = G.backbone(G.mapping(z, c)).squeeze(2)  # (4, 3, 16, 16)
        image, _ = m.synthesize(G, z, c, prior, None)
        assert torch.allclose(image, painted, atol=1e-5)
        patch = torch.tensor([[0.5, 0.0, 0.5]]).expand(4, 3)  # upper left
        image, _ = m.synthesize(G, z, c, prior, None, patch)
    assert image.shape == (4, 3, 8, 8)
    assert torch.allclose(image[..., 0, 0], painted[..., 0, 0], atol=1e-5)
    assert torch.allclose(image[..., 7, 7], painted[..., 7:9, 7:9].mean((2, 3)), atol=1e-5)


def test_labels_are_drawn_by_their_frequencies():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 700 + [1] * 100 + [2] * 200)
    _, c, _ = m.draw_latents(micro(), 20_000, labels)
    assert np.bincount(c.numpy()) / 20_000 == pytest.approx([0.7, 0.1, 0.2], abs=0.02)


# ------------------------------------------------------------------------------------------------------------
# Discriminator, teacher


def test_minibatch_std_does_not_mix_groups():
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(m.minibatch_std(x)[:4], m.minibatch_std(x[:4]))
    alike = x[:1].expand(4, -1, -1, -1)
    assert (m.minibatch_std(alike)[:, 3] < 1e-3).all()


def test_teacher_is_the_timm_model(teacher_weights):
    teacher = m.Teacher("test_resnet", str(teacher_weights))
    assert not any(p.requires_grad for p in teacher.parameters())
    image = torch.rand(2, 3, 24, 24) * 2 - 1
    features = teacher(image)

    # the same by timm's own names
    model = timm.create_model("test_resnet", pretrained=False).eval().requires_grad_(False)
    model.load_state_dict(torch.load(teacher_weights, weights_only=True))
    data = timm.data.resolve_model_data_config(model)
    mean = torch.tensor(data["mean"]).view(3, 1, 1)
    std = torch.tensor(data["std"]).view(3, 1, 1)
    x = (F.interpolate(image, data["input_size"][1:], mode="bicubic", antialias=True) + 1) / 2
    expected = model.forward_head(model.forward_features((x - mean) / std), pre_logits=True)

    assert features.shape == (2, teacher.dim)
    assert torch.allclose(features, expected, atol=1e-5)

    # It stays frozen as a part of a network that is in training mode.
    assert torch.equal(torch.nn.Sequential(teacher).train()(image), features)
    assert torch.equal(teacher(image), features)


def test_teacher_refuses_what_it_cannot_load(tmp_path):
    foreign = tmp_path / "x.pth"
    torch.save({"other": torch.zeros(1)}, foreign)
    with pytest.raises(m.UserError, match="x.pth: Error.* in loading"):
        m.Teacher("test_resnet", str(foreign))

    damaged = tmp_path / "y.pth"
    damaged.write_bytes(b"nothing")
    with pytest.raises(m.UserError, match="y.pth"):
        m.Teacher("test_resnet", str(damaged))

    with pytest.raises(m.UserError, match="resnet_of_nobody.*Unknown model"):
        m.Teacher("resnet_of_nobody")


# ------------------------------------------------------------------------------------------------------------
# Losses, and their gradients in other precision


def test_blur_keeps_constants_inside_and_is_off_at_the_end():
    image = torch.ones(1, 2, 32, 32)
    assert torch.allclose(m.blur(image, 2.0)[:, :, 8:24, 8:24], torch.ones(1, 2, 16, 16), atol=1e-5)
    assert m.blur(image, 0.2) is image


def test_depth_is_blurred_twice():
    """The variances of the two filters add up."""
    for sigma in (10.0, 5.0, 2.5):
        image = torch.zeros(1, 4, 129, 129)
        image[..., 64, 64] = 1
        profile = m.blur_patch(image, sigma)[0].sum(1)  # (4, 129), from the side
        x = torch.arange(129) - 64.0
        variance = (profile * x.square()).sum(1)
        assert torch.allclose(profile.sum(1), torch.ones(4), atol=1e-4)

        x = torch.arange(-math.floor(3 * sigma), math.floor(3 * sigma) + 1.0)
        expected = []
        for spread in (sigma, 30):
            taps = 2 ** -(x / spread).square()
            expected.append(float((taps * x.square()).sum() / taps.sum()))
        assert variance.tolist() == pytest.approx([expected[0]] * 3 + [sum(expected)], rel=1e-3)

    rgb = torch.rand(2, 3, 16, 16)
    assert torch.equal(m.blur_patch(rgb, 2.0), m.blur(rgb, 2.0))  # there may be no depth
    assert torch.equal(m.blur_patch(rgb, 0.0), rgb)


class LinearScore(torch.nn.Module):
    """In the place of D: its score is linear in what it sees."""

    def __init__(self, shape):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.randn(shape))

    def forward(self, image, c, patch):
        return (self.slope * image).sum((1, 2, 3)), None


def test_r1_is_of_the_patch_before_the_blurs():
    """The gradient goes through both of them; a blur is its own adjoint, two are in the opposite order."""
    torch.manual_seed(0)
    cfg = micro(depth="auto", blur_sigma=1.5, blur_kimg=100.0)
    run = m.Run(cfg, None, torch.zeros(0), None, [], **{**m.build(cfg, CPU), "D": LinearScore((4, 8, 8))})
    real = torch.randn(4, 4, 16, 16)
    patch = torch.tensor([[0.5, 0.25, 0.25]]).expand(4, 3)
    stats = m.Averages()
    m.discriminator_pass(run, real, None, torch.zeros(4).long(), patch, 0, 1.0, 1.0, stats)

    penalty = stats.result()["r1"]
    slope = run.D.slope.detach()[None]
    depth = m.blur(m.blur(slope[:, 3:], 1.5, spread=30), 1.5)
    gradient = torch.cat([m.blur(slope[:, :3], 1.5), depth], 1)
    assert penalty == pytest.approx(float(gradient.square().sum()), rel=1e-4)
    assert penalty < 0.5 * float(slope.square().sum())

    # the same by finite differences of the score, in a few pixels
    image = m.extract_patch(real, patch, 8)
    for pixel in ((0, 3, 3), (2, 0, 7), (3, 4, 1)):
        step = torch.zeros(1, 4, 8, 8)
        step[(0, *pixel)] = 1
        ahead, _ = run.D(m.blur_patch(image + step, 1.5), None, None)
        behind, _ = run.D(m.blur_patch(image - step, 1.5), None, None)
        assert float((ahead - behind)[0].detach() / 2) == pytest.approx(
            float(gradient[(0, *pixel)]), abs=1e-4
        )


def test_the_camera_regulariser_draws_classes_alike(monkeypatch):
    G = m.Generator(micro(num_classes=4))
    seen = []
    forward = m.CameraGenerator.forward

    def watched(self, prior, z, c):
        seen.append(c)
        return forward(self, prior, z, c)

    monkeypatch.setattr(m.CameraGenerator, "forward", watched)
    torch.manual_seed(0)
    m.camera_regularizer(G, 1.0)
    counts = torch.bincount(seen[0], minlength=4)
    assert int(counts.sum()) == 256
    assert (counts - 64).abs().max() < 30


def test_r1_double_backward_by_finite_differences():
    torch.manual_seed(0)
    D = m.Discriminator(micro(channel_max=4)).double()
    image = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    c = torch.zeros(4, dtype=torch.int64)
    patch = torch.tensor([[0.5, 0.0, 0.0]]).double().expand(4, 3)

    def penalty():
        score, _ = D(image, c, patch)
        return m.r1_penalty(score, image).sum()

    def penalty_at(p, value):
        p.data.copy_(value)
        return float(penalty().detach())

    for p in (D.b16.conv1.weight, D.b8.conv0.weight, D.b16.conv1.affine.weight, D.b4.fc.weight):
        (gradient,) = torch.autograd.grad(penalty(), p)
        start = p.detach().clone()
        direction = torch.randn_like(p)
        step = 1e-5 * direction
        slope = (penalty_at(p, start + step) - penalty_at(p, start - step)) / 2e-5
        p.data.copy_(start)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def gradients(module):
    """{name: gradient} of the parameters that have one."""
    found = {}
    for name, p in module.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.clone()
    return found


@pytest.mark.parametrize("step", [2, 16])  # at the latter R1 is due
@pytest.mark.parametrize("loss", ["nonsaturating", "relativistic"])
def test_one_pass_gives_the_gradients_of_both_networks(loss, step):
    """What the two passes leave in G and D is what the losses, each on its own, give: of samples alone, or
    of a sample's score less that of the photograph of its class."""
    cfg = micro(num_classes=2, depth="auto", loss=loss, r1_gamma=3.0)
    labels = torch.arange(2)
    run = m.Run(cfg, None, labels, None, [], **m.build(cfg, CPU))
    run.step = step
    kimg = run.kimg
    sigma = m.schedules(cfg, kimg)["blur_sigma"]
    networks = {"G": run.G, "D": run.D}
    patch = m.sample_patch(cfg, 8, kimg)
    real, c_real = torch.randn(8, 4, 16, 16), torch.tensor([0, 0, 1, 1, 1, 0, 1, 1])
    stats = m.Averages()
    _, rival = m.generator_pass(run, real, c_real, patch, 0, 0.5, stats)
    m.discriminator_pass(run, real, None, c_real, patch, rival, 1.0, 0.5, stats)
    assert ("r1" in stats) == (step == 16)
    assert ("r2" in stats) == (step == 16 and loss == "relativistic")
    got = {name: gradients(network) for name, network in networks.items()}

    for name in networks:
        run.G.zero_grad()
        run.D.zero_grad()
        m.seed_draws(cfg.seed, run.step, "generator", 0)
        z, c, prior = m.draw_latents(cfg, 8, labels)
        c = c_real if loss == "relativistic" else c
        choice = m.sample_adaptor_choice(cfg, 8, kimg)
        image, _ = m.synthesize(run.G, z, c, prior, choice, patch)
        fake = m.blur_patch(image, sigma)
        photo = m.extract_patch(real, patch, 8).requires_grad_()
        score, score_real = run.D(fake, c, patch)[0], run.D(m.blur_patch(photo, sigma), c_real, patch)[0]
        if loss == "relativistic":
            sign = -1 if name == "G" else 1
            value = F.softplus(sign * (score - score_real)).mean()
        else:
            value = F.softplus(-score).mean()
            if name == "D":
                value = F.softplus(score).mean() + F.softplus(-score_real).mean()
        if name == "D" and step == 16:
            penalty = m.r1_penalty(score_real, photo).mean()
            if loss == "relativistic":
                penalty = penalty + m.r1_penalty(score, fake).mean()
            value = value + penalty * (3.0 / 2 * cfg.r1_interval)
        (value * 0.5).backward()
        for parameter, expected in gradients(networks[name]).items():
            tolerance = 1e-6 + 1e-4 * float(expected.abs().max())
            assert torch.allclose(got[name][parameter], expected, rtol=1e-3, atol=tolerance), parameter


def test_gradients_that_are_not_finite_are_replaced():
    layer = m.Linear(3, 1)
    layer.weight.grad = torch.tensor([[math.nan, math.inf, -math.inf]])
    layer.bias.grad = torch.tensor([0.5])
    bad, mean = m.average_gradients(layer, torch.full([1], 2.0))
    assert float(bad) == pytest.approx(3 / 5)  # of four gradients and the tensor that goes with them
    assert float(mean) == 2
    assert layer.weight.grad.tolist() == [[0, 1e5, -1e5]]
    assert layer.bias.grad.tolist() == [0.5]


def image_score_and_gradient(precision):
    """Of the same networks and draws. -> image, score, gradient of G's backbone as one vector"""
    cfg = micro(num_classes=2, precision=precision)
    modules = m.build(cfg, CPU)
    G = modules["G"].eval()
    c = torch.arange(8) % 2
    m.seed_draws(0, 0, "test", 0)
    z, _, prior = m.draw_latents(cfg, 8, torch.arange(2))
    patch = m.sample_patch(cfg, 8, 0)
    image, _ = m.synthesize(G, z, c, prior, torch.full([8], 3), patch)
    with m.autocast(cfg, CPU):
        score, _ = modules["D"](image, c, patch)
    score.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in G.backbone.parameters()])
    return image.detach(), score.detach(), gradient


def test_bf16_is_near_fp32():
    """Relative errors of image, score and gradient (measured on a trained `tiny`: 0.006, 0.007, 0.056)."""
    exact = image_score_and_gradient("fp32")
    rounded = image_score_and_gradient("bf16")
    for x, y in zip(exact, rounded, strict=True):
        assert 0 < float((x - y).norm() / x.norm()) < 0.12


# ------------------------------------------------------------------------------------------------------------
# Metrics


def test_frechet_distance_closed_forms():
    cov = torch.diag(torch.tensor([1.0, 4.0, 9.0])).double()
    mean = torch.zeros(3).double()
    assert m.frechet_distance((mean, cov), (mean, cov)) == pytest.approx(0, abs=1e-9)
    assert m.frechet_distance((mean, cov), (mean + 2, cov)) == pytest.approx(12)
    assert m.frechet_distance((mean, cov), (mean, 4 * cov)) == pytest.approx(1 + 4 + 9)  # sum of (2 s - s)²


@pytest.mark.parametrize("n, dim", [(300, 8), (20, 32)])
def test_frechet_distance_is_the_textbooks(n, dim):
    """The trace of the root of a product is the sum of the roots of its eigenvalues."""
    rng = np.random.default_rng(n)
    a = rng.normal(size=(n, dim))
    b = rng.normal(size=(n, dim)) * 1.3 + 0.2
    cov_a = np.cov(a.T)
    cov_b = np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = means + np.trace(cov_a) + np.trace(cov_b) - 2 * root

    x = torch.from_numpy(a).float()
    y = torch.from_numpy(b).float()
    assert m.frechet_distance(m.gaussian(x), m.gaussian(y)) == pytest.approx(expected, rel=1e-3)


@with_tools
@pytest.mark.parametrize("n, dim", [(300, 8), (20, 32)])
def test_inception_score_is_the_textbooks(n, dim):
    """The exponential of the mean divergence from the mean, averaged over 10 parts."""
    logits = np.random.default_rng(n).normal(size=(n, dim))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in np.array_split(p, 10):
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert tool("evaluate").inception_score(torch.from_numpy(p)) == pytest.approx(np.mean(scores), rel=1e-3)


def test_non_flatness_ends():
    wall = torch.full((1, 640), 1.0)
    ramp = torch.linspace(0.75, 1.2499, 6400)[None]
    assert float(m.non_flatness_score(wall, 0.75, 1.25)) == pytest.approx(1)
    assert float(m.non_flatness_score(ramp, 0.75, 1.25)) == pytest.approx(64, rel=1e-3)
    assert m.non_flatness_score(wall * math.nan, 0.75, 1.25).isfinite()  # of networks that diverged


def test_rows_and_statistics_are_gathered_from_parts():
    x = torch.randn(50, 3)
    assert torch.equal(m.gather(x.split(16)), x)
    assert m.gather([]).numel() == 0
    mean, cov = m.running_gaussian(x.split(16))
    assert mean.dtype == cov.dtype == torch.float64
    assert torch.allclose(mean.float(), x.mean(0), atol=1e-6)
    assert torch.allclose(cov.float(), x.t().cov(), atol=1e-5)


def own_items(n, rank=0, world=1):
    """What `own_batches` deals out to a process of n numbers, batch by batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "RANK", rank)
        patch.setattr(m, "WORLD", world)
        return [batch.tolist() for batch in m.own_batches(n, "test")]


@pytest.mark.parametrize("n, world", [(7, 2), (8, 3), (2, 4), (50, 1)])
def test_work_is_dealt_out_in_order(n, world):
    parts = []
    for rank in range(world):
        own = list(itertools.chain(*own_items(n, rank, world)))
        assert len(own) <= 4 * math.ceil(math.ceil(n / 4) / world)
        parts += own
    assert parts == list(range(n))


def test_a_call_has_4_images():
    assert [len(batch) for batch in own_items(10)] == [4, 4, 2]


def test_rows_of_own_batches_are_those_of_all():
    x = torch.randn(50, 3)
    assert torch.equal(m.gather(x[i] for i in m.own_batches(50, "test")), x)
    mean, cov = m.running_gaussian(x[i] for i in m.own_batches(50, "test"))
    expected_mean, expected_cov = m.gaussian(x)
    assert torch.allclose(mean, expected_mean)
    assert torch.allclose(cov, expected_cov)


def test_flatness_is_seen_from_in_front():
    """Two scenes: a sphere around the camera that is meant, and two walls, each in half of the picture."""
    G = m.Generator(micro(camera="prior", coarse_samples=24, fine_samples=24)).eval()
    centre = torch.tensor([0.0, 0.0, 1.0])  # yaw 0, pitch pi/2
    for left, right, expected in ((1.0, 1.0, 1.0), (0.9, 1.1, 2.0)):

        def query(planes, origins, directions, depths, left=left, right=right):
            points = origins[:, :, None] + depths[..., None] * directions[:, :, None]
            seen_right = directions[..., :1] > 0
            wall = torch.where(seen_right, right, left)  # its distance
            sigma = torch.where((points - centre).norm(dim=-1) > wall, 1e4, -1e4)
            return torch.zeros(*depths.shape, 3), sigma

        G.query = query
        G.cfg = dataclasses.replace(G.cfg, prior_look_at=(0.0, 1e-6))
        _, scores = m.measure_samples(G, torch.arange(3), None, 0, 8)
        assert scores.tolist() == pytest.approx([expected] * 8, rel=0.02)


def test_noise_inputs_are_random_when_measured_and_the_same_each_time():
    G = m.Generator(micro()).eval()
    labels = torch.arange(3)
    detector = m.Detector("area8", CPU)
    without, _ = m.measure_samples(G, labels, detector, 8, 0)
    for block in G.backbone.values():
        block.conv1.noise_strength.data.fill_(1.0)
    first, _ = m.measure_samples(G, labels, detector, 8, 0)
    G.backbone["b4"].conv1.noise_const.fill_(9.0)  # has no say
    again, _ = m.measure_samples(G, labels, detector, 8, 0)
    assert torch.equal(first, again)
    assert (first - without).abs().max() > 1e-3


def test_samples_are_measured_by_features_and_scores():
    """Both are of the same draws, those of the phase "evaluate", however many there are of either."""
    G = m.Generator(micro()).eval()
    labels = torch.arange(3)
    detector = m.Detector("area8", CPU)
    features, scores = m.measure_samples(G, labels, detector, 20, 5)
    assert features.shape == (20, 4 * 64)
    assert scores.shape == (5,)
    assert (scores >= 1).all()
    assert (scores <= 64).all()
    assert not features.requires_grad

    # by hand
    z, c, prior = m.draw_latents(G.cfg, 20, labels, "evaluate")
    with torch.no_grad():
        image, _ = m.synthesize(G, z, c, prior, torch.full([20], 3))
        front = m.rows(prior, slice(4))._replace(yaw=torch.zeros(4), pitch=torch.full([4], math.pi / 2))
        planes = G.backbone(G.mapping(z[:4], c[:4]))
        _, depth = G.render(planes, G.pose(front, z[:4], c[:4]), 16, cut=True)
    assert torch.allclose(features, m.area8(image), atol=1e-5)
    expected = m.non_flatness_score(depth, G.cfg.near, G.cfg.far)
    assert torch.allclose(scores[:4], expected, rtol=1e-2)  # a call has 4 images

    # one without the other; no detector is needed for depth alone
    none, alone = m.measure_samples(G, labels, None, 0, 5)
    assert none.numel() == 0
    assert alone.shape == (5,)
    _, none = m.measure_samples(G, labels, detector, 20, 0)
    assert none.shape == (0,)


def test_statistics_of_the_data_are_of_all_images_and_their_mirror_images(tmp_path):
    cfg = micro(depth="none")
    data = data_of(make_folder(tmp_path / "a", each=8), depth="none")
    detector = m.Detector("area8", CPU)
    features = []
    for item in map(m.MirroredData(data).__getitem__, range(32)):
        features.append(detector(m.real_images(torch.utils.data.default_collate([item]), "cpu")))
    mean, cov = m.running_gaussian(m.real_parts(cfg, data, detector, CPU, 0))
    expected_mean, expected_cov = m.gaussian(torch.cat(features))
    assert mean.shape == (192,)
    assert cov.shape == (192, 192)
    assert torch.allclose(mean, expected_mean)
    assert torch.allclose(cov, expected_cov)

    # without mirror images, half of them
    rows = m.gather(m.real_parts(dataclasses.replace(cfg, mirror=False), data, detector, CPU, 0))
    assert rows.shape == (16, 192)


def test_features_of_some_reals_are_always_the_same_ones(tmp_path):
    data = data_of(make_folder(tmp_path / "a", each=8), depth="none")
    detector = m.Detector("area8", CPU)
    rows = [m.gather(m.real_parts(micro(depth="none"), data, detector, CPU, 8)) for _ in range(2)]
    assert rows[0].shape == (8, 192)
    assert torch.equal(rows[0], rows[1])


# ------------------------------------------------------------------------------------------------------------
# Training


def start_training(out, rank=0, world=1, port=0, script=SCRIPT, **options):
    """A training process as torchrun starts it; what it prints goes into pipes."""
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, script, "--out", out, *flags(**{**MICRO, **options})],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(out, processes=2, **options):
    """A run under torchrun that goes on by itself; all that it prints goes into one pipe."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher, SCRIPT, "--resume", "auto", "--out", out, *flags(**{**MICRO, **options})],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, seconds):
    """Waits for a run under torchrun, which must succeed in time."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, output


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def wait_for_lines(out, n=1):
    """Until the run has written n lines of its log."""
    path = Path(out) / "log.jsonl"
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) >= n)


def lines_of_training(out):
    return [line for line in log(out) if "loss_g" in line]


def lines_of_recovery(out):
    return [line for line in log(out) if "diverged" in line]


def tensors_of(out):
    """All that the newest checkpoint of a run holds of networks and optimisers. -> {name: tensor}"""
    state = checkpoint(out)
    return flatten({name: state[name] for name in STATE})


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 10
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_two_processes_and_one_give_the_same_gradients(tmp_path):
    """Adam with beta1 = 0 keeps the last gradient as its first moment: a checkpoint after one step has it."""
    train_micro(tmp_path / "one", kimg=0.016)
    finish(torchrun(tmp_path / "two", kimg=0.016), 300)
    one = checkpoint(tmp_path / "one")
    two = checkpoint(tmp_path / "two")

    # Sums over half the images are added in another order: equal but for rounding.
    for optimiser in ("opt_g", "opt_d"):
        a = flatten(one[optimiser])
        b = flatten(two[optimiser])
        gradients = [name for name in a if name.endswith("exp_avg")]

        largest = {name: float(a[name].abs().max()) for name in gradients}
        assert max(largest.values()) > 1e-3
        for name in gradients:
            assert (a[name] - b[name]).abs().max() <= 1e-4 * max(1e-3, largest[name]), name

    # What else processes share: the mean w, and the averages in the log.
    w_avg = "mapping_network.w_avg"
    assert torch.allclose(one["G"][w_avg], two["G"][w_avg], atol=1e-6)
    loss = lines_of_training(tmp_path / "one")[0]["loss_g"]
    assert lines_of_training(tmp_path / "two")[0]["loss_g"] == pytest.approx(loss, rel=1e-4)


def test_a_resumed_run_ends_with_identical_weights(tmp_path):
    whole = train_micro(tmp_path / "whole", kimg=0.064)
    half = train_micro(tmp_path / "half", kimg=0.032)
    assert m.main(["--resume", "latest", "--out", str(half), "--kimg", "0.064"]) == 0

    assert_same_tensors(tensors_of(whole), tensors_of(half))
    assert checkpoint(whole)["step"] == 4
    assert checkpoint(half)["step"] == 4

    # The logs tell the same, but for what was measured by a clock.
    logs = {whole: log(whole), half: log(half)}
    for lines in logs.values():
        for line in lines:
            line.pop("images_per_second", None)
    assert logs[whole] == logs[half]


def test_run_folder_has_everything(tmp_path):
    out = train_micro(tmp_path / "run", kimg=0.032, metrics="fid32,nfs8", detector="area8", reals=32)
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "log.jsonl",
        "metrics.jsonl",
        "reals.png",
        "samples-000000.000.png",
        "samples-000000.032.png",
        "checkpoint-000000.000.pt",
        "checkpoint-000000.032.pt",
    }
    assert json.loads((out / "config.json").read_text())["num_classes"] == 8

    expected = """
        kimg images_per_second schedules
        loss_g loss_d_fake loss_d_real score_real score_fake nonfinite_g nonfinite_d
        camera_mean camera_std camera_emd
    """
    assert set(lines_of_training(out)[-1]) >= set(expected.split())
    assert math.isfinite(log(out)[0]["r1"])

    # Before the first step and after the last one.
    first, last = log(out, "metrics")
    for line in (first, last):
        assert set(line) >= {"fid32[area8]", "nfs8"}


def test_distillation_pulls_the_features_to_the_teacher(tmp_path, teacher_weights):
    out = train_micro(
        tmp_path / "run",
        data=make_folder(tmp_path / "a"),
        depth="none",
        kimg=0.64,
        teacher="test_resnet",
        teacher_weights=teacher_weights,
    )
    distances = [line["kd_distance"] for line in log(out) if "kd_distance" in line]
    assert len(distances) == 40
    assert np.mean(distances[-5:]) < 0.8 * np.mean(distances[:5])


def watch_teacher(monkeypatch):
    """-> list to which the teacher's network adds in each call how many images it saw, and of which type"""
    calls = []
    forward_features = timm.models.resnet.ResNet.forward_features

    def watched(model, x):
        features = forward_features(model, x)
        calls.append((len(features), features.dtype))
        return features

    monkeypatch.setattr(timm.models.resnet.ResNet, "forward_features", watched)
    return calls


def images_of(calls):
    return sum(n for n, _ in calls)


def distilled(folder, teacher_weights):
    """Options of a run with a teacher on photographs without depth, which shows each of them four times."""
    return dict(
        data=make_folder(folder),
        depth="none",
        kimg=0.16,
        teacher="test_resnet",
        teacher_weights=teacher_weights,
        metrics="",
    )


def test_features_of_the_teacher_are_computed_once(tmp_path, teacher_weights, monkeypatch):
    """Those of mirrored images, too; and the run is the same as when they are computed in each step."""
    options = distilled(tmp_path / "a", teacher_weights)
    calls = watch_teacher(monkeypatch)
    out = train_micro(tmp_path / "once", **options)
    n = len(data_of(options["data"], depth="none"))
    assert 4 * n < 160  # the run's images
    assert images_of(calls) == 1 + 2 * n  # the first one tells how many features there are
    assert not list(out.glob(".*"))  # what they were kept in has no name

    monkeypatch.setattr(m.Teacher, "keep", lambda teacher, path, count: None)
    anew = train_micro(tmp_path / "anew", **options)
    assert images_of(calls) == 2 + 2 * n + 160
    for name, value in flatten(checkpoint(anew)["D"]).items():
        assert torch.allclose(value, flatten(checkpoint(out)["D"])[name], atol=1e-6), name


def test_features_that_a_killed_run_kept_are_not_believed(tmp_path, teacher_weights, monkeypatch):
    """The data may be other ones when it goes on."""
    options = distilled(tmp_path / "a", teacher_weights)
    calls = watch_teacher(monkeypatch)
    out = train_micro(tmp_path / "run", **{**options, "kimg": 0.032})
    teacher = m.Teacher("test_resnet", str(teacher_weights))
    n = len(data_of(options["data"], depth="none"))
    teacher.keep(out / ".features-0.tmp", 2 * n)
    teacher.features[:] = 100
    teacher.known[:] = 1

    before = images_of(calls)
    train_micro(out, resume="latest", kimg=0.192)
    assert images_of(calls) >= before + 1 + 2 * n
    assert max(line["kd_distance"] for line in log(out) if "kd_distance" in line) < 100


@pytest.mark.parametrize("images, kept", [(249_999, [(".features-0.tmp", 499_998)]), (250_000, [])])
def test_features_of_much_data_are_not_kept(tmp_path, teacher_weights, monkeypatch, images, kept):
    files = []
    monkeypatch.setattr(m.Teacher, "keep", lambda teacher, path, count: files.append((path.name, count)))
    monkeypatch.setattr(m.ShapesData, "__len__", lambda data: images)
    options = dict(teacher="test_resnet", teacher_weights=teacher_weights, metrics="", kimg=0.016)
    train_micro(tmp_path / "run", **options)
    assert files == kept


def test_no_room_for_features_is_one_line_at_the_start(tmp_path, teacher_weights, monkeypatch, capfd):
    """All of the file is written at once: memory that maps a file with holes would be a crash, later."""
    options = distilled(tmp_path / "a", teacher_weights)
    teacher = m.Teacher("test_resnet", str(teacher_weights))
    room = []

    def write_bytes(path, content):
        room.append(len(content))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    capfd.readouterr()
    assert m.main(["--out", str(tmp_path / "run"), *flags(**{**MICRO, **options})]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "3dgp.py: error: [Errno 28] No space left on device"
    n = len(data_of(options["data"], depth="none"))
    assert room == [2 * n * (teacher.dim + 1) * 4]


def test_the_teacher_computes_in_float32_whatever_the_precision(tmp_path, teacher_weights, monkeypatch):
    calls = watch_teacher(monkeypatch)
    train_micro(tmp_path / "run", **{**distilled(tmp_path / "a", teacher_weights), "precision": "bf16"})
    assert {kind for _, kind in calls} == {torch.float32}


def test_processes_share_what_is_known_of_images(tmp_path, teacher_weights, monkeypatch):
    calls = watch_teacher(monkeypatch)
    one, other = (m.Teacher("test_resnet", str(teacher_weights)) for _ in range(2))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    numbers = torch.tensor([5, 0, 9, 3])
    for teacher in (one, other):
        teacher.keep(tmp_path / "kept", 10)
    calls.clear()

    expected = one(images, numbers)
    assert torch.equal(other(images[[2, 0]], numbers[[2, 0]]), expected[[2, 0]])
    assert images_of(calls) == 4

    # Not all of these are known.
    mixed = other(images, torch.tensor([5, 0, 9, 4]))
    assert torch.allclose(mixed, expected, atol=1e-6)
    assert images_of(calls) == 8
    assert one.known.flatten().tolist() == [1, 0, 0, 1, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("count, kind", [(65_536, torch.float32), (65_537, torch.float16)])
def test_features_of_many_images_are_half_floats_whether_known_or_not(tmp_path, teacher_weights, count, kind):
    teacher = m.Teacher("test_resnet", str(teacher_weights))
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    numbers = torch.tensor([1, 65_535, 7])
    exact = teacher(images)
    teacher.keep(tmp_path / "kept", count)

    first = teacher(images, numbers)
    again = teacher(images, numbers)
    assert first.dtype == again.dtype == torch.float32
    assert torch.equal(first, exact.to(kind).float())
    assert torch.equal(again, first)
    assert (tmp_path / "kept").stat().st_size == count * (teacher.dim + 1) * kind.itemsize


MECHANISMS = [
    dict(camera="prior"),
    dict(camera="frontal"),
    dict(camera_reg="grad"),
    dict(camera_reg="none"),
    dict(depth="none"),
    dict(precision="bf16"),
    dict(depth_adaptor="half"),
    dict(loss="nonsaturating"),
]


@pytest.mark.parametrize("options", MECHANISMS, ids=str)
def test_every_mechanism_can_be_switched(tmp_path, options):
    out = train_micro(tmp_path / "run", kimg=0.032, **options)

    for line in log(out):
        assert line.get("nonfinite_g", 0) == 0
        assert line.get("nonfinite_d", 0) == 0
        for name, value in line.items():
            assert not isinstance(value, float) or math.isfinite(value), name

    # Only a posterior that is learned has a regulariser.
    camera_is_learned = options.get("camera", "learned") == "learned"
    assert ("camera_emd" in log(out)[-1]) == camera_is_learned


def test_the_tiny_preset_learns(tmp_path):
    """Forty steps of the default job: the distance to the data falls by a factor of 2.5 (measured: 10)."""
    options = flags(out=tmp_path / "run", kimg=0.32, metrics="fid128", reals=128, workers=1)
    assert m.main(options) == 0

    first, last = (line["fid128[area8]"] for line in log(tmp_path / "run", "metrics"))
    assert last < first / 2.5


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    process = start_training(tmp_path / "run", workers=1)
    wait_for_lines(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped" in printed
    assert "Traceback" not in errors

    # What was saved is of a whole step, and two more follow it.
    state = checkpoint(tmp_path / "run")
    assert 0 < state["step"] < 100_000
    kimg = (state["images"] + 32) / 1000
    assert m.main(["--resume", "latest", "--out", str(tmp_path / "run"), "--kimg", str(kimg)]) == 0
    assert checkpoint(tmp_path / "run")["step"] == state["step"] + 2


def test_ctrl_c_saves_though_the_readers_of_what_is_printed_have_gone(tmp_path):
    """As `2>&1 | tee log` goes, of the same Ctrl-C."""
    process = start_training(tmp_path / "run")
    wait_for_lines(tmp_path / "run")
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert checkpoint(tmp_path / "run")["step"] > 0


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, capsys):
    out = train_micro(tmp_path / "run", kimg=0.016)
    earlier = out / "checkpoint-000000.016.pt"
    before = earlier.read_bytes()

    # The file is begun, then nothing more fits.
    def save(obj, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    status, err = run_main(capsys, "--resume", "latest", "--out", out, "--kimg", 0.032)
    assert status == 2
    assert "No space left on device" in err.splitlines()[-1]

    assert earlier.read_bytes() == before
    assert not list(out.glob(".*tmp"))
    assert not (out / "checkpoint-000000.032.pt").exists()


# ------------------------------------------------------------------------------------------------------------
# A month of training: divergence, preemption, damaged files, processes that die or hang

HEALTHY = dict(
    loss_g=1.5,
    loss_d_real=0.4,
    loss_d_fake=0.4,
    score_real=1.0,
    score_fake=-1.0,
    r1=0.2,
    nonfinite_g=0.0,
    nonfinite_d=0.0,
)
TOLD_APART = [
    (dict(nonfinite_g=0.02), "2% of the gradients"),
    (dict(nonfinite_d=0.06), "6% of the gradients"),
    (dict(loss_d_real=math.nan), "not finite: a loss is nan"),
    (dict(score_fake=-60.0, loss_g=60.0), "saturated, or not finite: a loss is 60"),
    (dict(score_real=-50.0, score_fake=-50.0, loss_d_real=50.0), "a loss is 50"),
    ({}, ""),
    (dict(nonfinite_g=0.005, loss_g=5.0, r1=3.0, score_real=15.0), ""),
    (dict(score_real=-50.0, score_fake=-51.0), ""),  # by pairs both may drift together
]


@pytest.mark.parametrize("change, reason", TOLD_APART, ids=str)
def test_the_guard_tells_divergence_from_bad_luck(change, reason):
    found = m.diagnose({**HEALTHY, **change})
    assert bool(found) == bool(reason)
    assert reason in found


def spoil(monkeypatch, how, at=12, times=1):
    """Damages training steps after the `at`-th, `times` in all; a run that goes on is not damaged again."""
    real = m.training_step
    left = times

    def step(run, batch, stats):
        nonlocal left
        if run.step < at or not left:
            return real(run, batch, stats)
        left -= 1

        # Pictures, learning rates or weights that no run survives.
        if how == "nan":
            batch = {**batch, "image": batch["image"].float() * math.nan}
        elif how == "lr":
            for opt in (run.opt_g, run.opt_d):
                opt.defaults["lr"] *= 1000
        elif how == "scale":
            with torch.no_grad():
                for p in run.D.parameters():
                    p.mul_(5)
        return real(run, batch, stats)

    monkeypatch.setattr(m, "training_step", step)


@pytest.mark.parametrize("how", ["nan", "lr", "scale"])
def test_a_spoiled_run_goes_back_and_on(tmp_path, monkeypatch, capsys, how):
    spoil(monkeypatch, how)
    out = train_micro(tmp_path, kimg=0.4, snapshot_kimg=0.032, log_kimg=0.032)
    assert "diverged" in capsys.readouterr().err

    # The twelfth step was damaged: seen within two log lines, and told in the log.
    events = lines_of_recovery(out)
    assert 1 <= len(events) <= 2
    assert events[0]["diverged"] <= 0.192 + 2 * 0.032
    assert events[-1]["kimg"] <= 0.192
    for event in events:
        assert event["diverged"] > 0.192
        assert event["reason"]

    # From there on kimg is that of the checkpoint, and the learning rates are lower.
    kimg = 0
    factor = 1
    for line in log(out):
        if "diverged" in line:
            kimg = line["kimg"]
            factor /= 2
        else:
            assert line["kimg"] > kimg
            assert line["schedules"]["lr_factor"] == factor
            kimg = line["kimg"]

    state = checkpoint(out)
    assert list(state["config"]["recoveries"]) == [event["kimg"] for event in events]
    assert state["opt_g"]["param_groups"][0]["lr"] == pytest.approx(0.0025 * factor)

    # The run ends as it should, in good health.
    assert state["step"] == 25
    lines = lines_of_training(out)
    assert lines[-1]["kimg"] == 0.4
    assert not m.diagnose(lines[-1])
    for name, value in flatten(state["G_ema"]).items():
        assert value.isfinite().all(), name


def test_the_guard_gives_up_in_the_end(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "nan", times=100)
    options = flags(**{**MICRO, "kimg": 0.4, "snapshot_kimg": 0.032})
    status, err = run_main(capsys, "--out", tmp_path, *options)
    assert status == 2
    assert err.count("; back to checkpoint") == 5
    assert "after 5 recoveries" in err.splitlines()[-1]

    # What is saved tells of them, so that a restart does not begin to count anew.
    recoveries = checkpoint(tmp_path)["config"]["recoveries"]
    assert len(recoveries) == 5
    assert lines_of_recovery(tmp_path)[-1]["kimg"] == recoveries[-1] < 0.192


def test_a_recovery_finds_the_oldest_checkpoint_where_none_is_healthy(tmp_path, monkeypatch, capsys):
    """More snapshots than are kept lie between two lines of the log."""
    spoil(monkeypatch, "nan", at=12)
    train_micro(tmp_path, kimg=0.4, snapshot_kimg=0.016, log_kimg=0.2)
    assert "back to checkpoint-000000.080.pt" in capsys.readouterr().err
    assert checkpoint(tmp_path)["step"] == 25


def test_the_guard_can_be_off(tmp_path, monkeypatch):
    spoil(monkeypatch, "nan", times=100)
    train_micro(tmp_path, "--guard", "off", kimg=0.24)
    assert not lines_of_recovery(tmp_path)


def first_batch(cfg):
    return next(m.draw_batches(cfg, 1000, 5, 0, 1))


def test_draws_differ_after_a_recovery_alone():
    cfg = micro(seed=3)
    once = dataclasses.replace(cfg, recoveries=(1.0,))
    twice = dataclasses.replace(cfg, recoveries=(1.0, 2.0))
    assert m.train_seed(cfg) == 3
    assert first_batch(cfg) == first_batch(micro(seed=3))
    assert first_batch(cfg) != first_batch(once)

    assert m.schedules(once, 200.9)["lr_factor"] == 0.5
    assert m.schedules(once, 201)["lr_factor"] == 1
    assert m.schedules(twice, 150)["lr_factor"] == 0.25


def test_the_newest_8_checkpoints_stay(tmp_path):
    mine = tmp_path / "checkpoint-000000.100-copy.pt"
    mine.touch()
    out = train_micro(tmp_path, kimg=0.16, snapshot_kimg=0.016)
    kept = [kimg for kimg, _ in m.checkpoints(out)]
    assert kept == [0.16, 0.144, 0.128, 0.112, 0.096, 0.08, 0.064, 0.048]
    assert mine.exists()


def test_a_run_that_goes_back_leaves_its_newer_checkpoints(tmp_path):
    out = train_micro(tmp_path, kimg=0.064, snapshot_kimg=0.016)
    assert m.main(["--resume", str(out / "checkpoint-000000.032.pt"), "--kimg", "0.048"]) == 0
    assert m.load_checkpoint(out)[0].name == "checkpoint-000000.048.pt"
    assert (out / "left-checkpoint-000000.064.pt").exists()


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, capsys):
    out = train_micro(tmp_path / "run", kimg=0.048, snapshot_kimg=0.016)
    last = out / "checkpoint-000000.048.pt"
    whole = last.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4

    for damaged in (whole[: len(whole) * 2 // 3], bytes(flipped), b""):
        last.write_bytes(damaged)
        capsys.readouterr()

        # Named by itself it is an error, ...
        status, err = run_main(capsys, "--resume", last, "--kimg", 1)
        assert status == 2
        assert last.name in err
        assert err.count("\n") == 1

        # ... but of a folder the one before it is taken.
        path, _, state = m.load_checkpoint(out)
        err = capsys.readouterr().err
        assert path.name == "checkpoint-000000.032.pt"
        assert state["step"] == 2
        assert "warning" in err
        assert last.name in err

    assert m.main(["--resume", "latest", "--out", str(out), "--kimg", "0.064"]) == 0
    assert checkpoint(out)["step"] == 4


def test_optimisers_follow_the_options_of_a_resumed_run(tmp_path):
    out = train_micro(tmp_path / "run", kimg=0.016)
    assert m.main(["--resume", "latest", "--out", str(out), "--kimg", "0.032", "--r1-interval", "4"]) == 0
    group = checkpoint(out)["opt_d"]["param_groups"][0]
    assert group["betas"][1] == pytest.approx(0.99 ** (4 / 5))


class Evil:
    """What a pickle of it does when it is loaded: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bad_checkpoints(run, tmp_path):
    """Files that are damaged, foreign, or of another configuration. None may run code of its own."""
    folder = tmp_path / "bad"
    folder.mkdir()
    whole = newest(run).read_bytes()
    state = checkpoint(run)

    # Half of a file; code in a pickle; a size, and a value, that do not fit the weights; something else.
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({**dict.fromkeys(state, 0), "config": Evil(tmp_path / "ran")}, folder / "evil.pt")
    torch.save({**state, "config": {**state["config"], "z_dim": 12}}, folder / "other.pt")
    torch.save({**state, "config": {**state["config"], "resolution": "many"}}, folder / "odd.pt")
    torch.save({"G_ema": {}}, folder / "foreign.pt")

    yield sorted(folder.iterdir())
    assert not (tmp_path / "ran").exists()


def test_a_damaged_or_foreign_checkpoint_is_one_line_and_runs_nothing(bad_checkpoints, capsys):
    for path in bad_checkpoints:
        status, err = run_main(capsys, "--resume", path)
        assert status == 2
        assert path.name in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "phase", ["real_images", "synthesize", "march_rays", "write_samples", "evaluate", "save"]
)
def test_a_signal_at_any_time_saves_and_the_run_goes_on(tmp_path, monkeypatch, phase, signum):
    """In the second step or what follows it: drawing data, forward pass, saving, sampling, measuring."""
    where = torch if phase == "save" else m
    real = getattr(where, phase)
    # Calls are counted from when the run catches signals. The 70th rays are of a sample that is measured.
    at = dict(real_images=2, synthesize=3, march_rays=70).get(phase, 1)
    before = signal.getsignal(signum)
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        if signal.getsignal(signum) is before:
            return real(*args, **kwargs)
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signum)
        return real(*args, **kwargs)

    monkeypatch.setattr(where, phase, call)
    sizes = dict(kimg=0.8, snapshot_kimg=0.032, metrics_kimg=0.032)
    out = train_micro(tmp_path, metrics="fid33", detector="area8", reals=64, **sizes)
    monkeypatch.undo()
    step = checkpoint(out)["step"]
    assert calls >= at
    assert 1 <= step <= 3

    # One more step.
    kimg = (step + 1) * 0.016
    assert m.main(["--resume", "auto", "--out", str(out), "--kimg", str(kimg), "--metrics", ""]) == 0
    assert checkpoint(out)["step"] == step + 1


def test_auto_resumes_what_is_there(tmp_path, capsys):
    out = tmp_path / "new"
    train_micro(out, "--resume", "auto", kimg=0.016)  # nothing there yet
    again = ("--out", str(out), "--kimg", "0.032")
    assert m.main(["--resume", "auto", *again]) == 0
    assert checkpoint(out)["step"] == 2

    # A scheduler may queue a job again that has ended: nothing changes.
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert m.main(["--resume", "auto", *again]) == 0
    assert "finished already" in capsys.readouterr().out
    assert m.main(["--resume", "latest", *again]) == 0
    assert "finished already" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_classes_that_exchange_their_numbers_are_noticed(tmp_path, capsys, monkeypatch):
    """A class folder was renamed: what was class 0 would be called 1 from then on."""
    data = make_folder(tmp_path / "photos", each=8)
    out = train_micro(tmp_path / "run", data=str(data), depth="none", kimg=0.016)
    assert checkpoint(out)["classes"] == ["cat", "dog"]
    (data / "cat").rename(data / "puss")
    status, err = run_main(capsys, "--resume", "latest", "--out", out, "--kimg", 0.032)
    assert status == 2
    assert "the classes were ['cat', 'dog']" in err
    assert checkpoint(out)["step"] == 1

    (data / "puss").rename(data / "cat")
    assert m.main(["--resume", "latest", "--out", str(out), "--kimg", "0.032"]) == 0
    assert checkpoint(out)["step"] == 2


def test_names_that_cannot_be_written_down_are_refused(tmp_path, capsys):
    """config.json and a checkpoint would hold a name that they could not give back."""
    data = tmp_path / os.fsdecode(b"caf\xe9")
    photo().save(make_folder(data) / "1.jpg")
    status, err = run_main(capsys, "--data", data, "--depth", "none", "--out", tmp_path / "run")
    assert status == 2
    assert "--data: is not UTF-8; rename it" in err
    assert not (tmp_path / "run").exists()


def test_a_part_of_a_zip_is_not_one(tmp_path, capsys):
    content = make_zip(tmp_path / "whole.zip", make_folder(tmp_path / "photos")).read_bytes()
    (tmp_path / "part.z01").write_bytes(content[: len(content) // 2])
    status, err = run_main(
        capsys, "--data", tmp_path / "part.z01", "--depth", "none", "--out", tmp_path / "run"
    )
    assert status == 2
    assert "one whole zip file" in err


def test_standard_error_may_be_closed(tmp_path):
    """As by a scheduler. Nothing that is opened later takes its place and gets what is meant for it."""
    options = flags(**{**MICRO, "kimg": 0.016}, out=tmp_path / "run")
    command = shlex.join([sys.executable, str(HERE / "3dgp.py"), *options])
    done = subprocess.run(command + " 2>&-", shell=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "finished at 0.016 kimg" in done.stdout
    assert checkpoint(tmp_path / "run")["step"] == 1


def test_a_run_is_not_in_its_data(tmp_path, capsys):
    root = make_folder(tmp_path / "photos")
    before = sorted(root.rglob("*"))
    status, err = run_main(capsys, "--data", root, "--out", root, "--depth", "none", *flags(**MICRO))
    assert status == 2
    assert "--out: is the folder of the data" in err
    assert sorted(root.rglob("*")) == before


def test_a_run_has_the_name_of_its_data(tmp_path, monkeypatch):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    for place, data in ((".", "link"), ("photos", "."), ("photos/sub", "..")):
        monkeypatch.chdir(tmp_path / place)
        assert m.resolve({"data": data})[0].out == "runs/photos"

    monkeypatch.chdir(tmp_path)
    for data in ("photos.v2", "photos.v2.zip"):  # an archive's ending is no part of its name
        assert m.resolve({"data": data})[0].out == "runs/photos.v2"


def test_resuming_is_no_way_round_a_mistake(tmp_path, capsys):
    out = train_micro(tmp_path / "run", kimg=0.016)
    root = make_folder(tmp_path / "photos")

    status, err = run_main(capsys, "--resume", "latest", "--out", tmp_path / "typo")
    assert status == 2
    assert "no such file" in err
    assert not (tmp_path / "typo").exists()

    # Other data, of another number of classes: nothing of the run changes.
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    options = ("--data", root, "--depth-weights", "", "--kimg", 1)
    status, err = run_main(capsys, "--resume", "auto", "--out", out, *options)
    assert status == 2
    assert files == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_a_run_goes_on_with_its_own_data_alone(tmp_path, capsys, monkeypatch):
    """Paths that read alike may be of other folders, and those that do not of the same."""
    for name in ("a", "b"):
        make_folder(tmp_path / name / "photos", each=2)
    monkeypatch.chdir(tmp_path / "a")
    options = [*flags(**MICRO, kimg=0.016), "--depth", "none"]
    assert m.main(["--data", "photos", "--out", str(tmp_path / "runs" / "photos"), *options]) == 0
    config = tmp_path / "runs" / "photos" / "config.json"
    assert json.loads(config.read_text())["data"] == str(tmp_path / "a" / "photos")

    # The folder of a run is named by the data.
    monkeypatch.chdir(tmp_path)
    before = config.read_text()
    status, err = run_main(capsys, "--data", "b/photos", "--resume", "auto", *options)
    assert status == 2
    assert f"--data {tmp_path}/b/photos: " in err
    assert f"is of {tmp_path}/a/photos" in err
    assert config.read_text() == before

    again = ["--resume", "auto", "--kimg", "0.032"]
    assert m.main(["--data", "b/../a/photos", *again]) == 0
    said = capsys.readouterr().out
    assert f"going on with runs/photos/checkpoint-000000.016.pt, on {tmp_path}/a/photos" in said
    assert (
        m.main(["--data", "b/photos", "--out", "runs/photos", "--resume", "latest", "--kimg", "0.048"]) == 0
    )


def test_a_checkpoint_may_name_metrics_of_before(run, tmp_path):
    state = torch.load(newest(run), weights_only=True)
    state["config"]["metrics"] = "fid2k,is2k"
    torch.save(state, tmp_path / newest(run).name)
    assert m.load_checkpoint(tmp_path)[2]["images"] == 48


def test_a_full_gpu_is_one_line(capsys):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert m.run_program("3dgp.py", work) == 2
    assert capsys.readouterr().err == "3dgp.py: error: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


@pytest.mark.parametrize("resume", ["", "auto"])
def test_of_runs_that_begin_at_the_same_moment_one_gets_the_folder(tmp_path, capsys, resume):
    given = dict(MICRO, out=str(tmp_path / "run"), kimg=0.016, resume=resume)
    (first, _), (second, _) = m.resolve(given), m.resolve(given)
    m.train(first)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert m.run_program("3dgp.py", lambda: m.train(second)) == 2
    assert "File exists" in capsys.readouterr().err
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_batch_a_signal_ends_the_program_at_once(tmp_path, signum):
    """Where shared memory is too small for what data workers send, for example."""
    code = "import importlib, sys, time; m = importlib.import_module('3dgp')"
    code += "; m.MirroredData.__getitem__ = lambda *_: (print('waits', flush=True), time.sleep(100))"
    code += "; sys.exit(m.main())"
    argv = flags(**{**MICRO, "workers": 1}, out=tmp_path / "run")
    how = dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = subprocess.Popen([sys.executable, "-c", code, *argv], start_new_session=True, **how)
    while "waits" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signum)
    assert process.wait(timeout=20) != 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the worker sleeps


def test_data_workers_that_fail_name_the_usual_cause(tmp_path, monkeypatch):
    data = data_of(make_folder(tmp_path / "a"), depth="none")
    monkeypatch.setattr(m.ImageData, "decode", dies)
    with pytest.raises(m.UserError, match="more --timeout.*/dev/shm.*--workers 0"):
        next(m.load_batches(data, micro(workers=1, timeout=2.0), [range(4)]))


def test_a_metric_of_too_few_images_is_no_divergence_and_says_why(tmp_path, capsys):
    root = make_folder(tmp_path / "a", classes=("cat",), each=1)
    options = dict(data=root, depth="none", kimg=0.032, metrics="fid8", detector="area8")
    out = train_micro(tmp_path / "run", "--no-mirror", **options)
    captured = capsys.readouterr()
    assert "fid8[area8] nan, of too few images?" in captured.err + captured.out
    assert "diverged" not in captured.err
    assert checkpoint(out)["step"] == 2


def start_two(out, **options):
    """Two training processes of one run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [start_training(out, rank, 2, port, **options) for rank in (0, 1)]


def end(processes, seconds):
    """-> exit statuses and errors of processes that must end in time"""
    ended = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"hangs: {process.communicate()[1]}")
        ended.append((process.returncode, errors))
    return ended


def assert_waited_in_vain(process):
    ((status, errors),) = end([process], 60)
    assert status == 1
    assert "waited in vain" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_no_process_waits_for_one_that_was_killed(tmp_path):
    a, b = start_two(tmp_path, timeout=15)
    wait_for_lines(tmp_path)
    b.kill()
    assert_waited_in_vain(a)
    end([b], 10)


def test_no_process_waits_for_one_that_hangs(tmp_path):
    a, b = start_two(tmp_path, timeout=15)
    wait_for_lines(tmp_path)
    b.send_signal(signal.SIGSTOP)
    assert_waited_in_vain(a)
    b.send_signal(signal.SIGCONT)
    assert_waited_in_vain(b)


def test_processes_that_would_go_on_from_different_checkpoints_end(tmp_path):
    """As of two machines that do not share the run's folder."""
    first = train_micro(tmp_path / "first", kimg=0.032)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    outs = (first, tmp_path / "second")
    processes = [start_training(out, k, 2, port, resume="auto", kimg=0.064) for k, out in enumerate(outs)]
    for status, errors in end(processes, 120):
        assert status == 2
        assert "from different checkpoints; all of them must see the same --out" in errors
        assert "Traceback" not in errors
    assert checkpoint(first)["step"] == 2
    assert not list(outs[1].glob("checkpoint-*"))


SPOILER = """
import importlib, math, sys

sys.path.insert(0, {folder!r})
m = importlib.import_module("3dgp")
real = m.training_step
left = m.RANK  # of two processes the second one spoils one step


def step(run, batch, stats):
    global left
    if run.step == 12 and left:
        left -= 1
        batch = dict(batch, image=batch["image"].float() * math.nan)
    return real(run, batch, stats)


m.training_step = step
sys.exit(m.main())
"""


def test_two_processes_go_back_together(tmp_path):
    script = tmp_path / "spoiler.py"
    script.write_text(SPOILER.format(folder=str(HERE)))
    out = tmp_path / "run"
    sizes = dict(kimg=0.32, snapshot_kimg=0.032, log_kimg=0.032, timeout=60)
    ended = end(start_two(out, script=script, **sizes), 120)
    assert [status for status, _ in ended] == [0, 0], ended

    (event,) = lines_of_recovery(out)
    assert event["kimg"] <= 0.192 < event["diverged"] <= 0.256
    state = checkpoint(out)
    assert state["step"] == 20
    assert list(state["config"]["recoveries"]) == [event["kimg"]]


def test_one_signal_stops_all_processes(tmp_path):
    a, b = start_two(tmp_path)
    wait_for_lines(tmp_path, 2)
    b.send_signal(signal.SIGUSR1)
    assert [status for status, _ in end([a, b], 30)] == [0, 0]
    assert checkpoint(tmp_path)["step"] > 0


def start_plainly(out, script=SCRIPT, **options):
    """A run as one types it: no launcher, no OMP_NUM_THREADS."""
    given = {"OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
    env = {name: value for name, value in os.environ.items() if name not in given}
    argv = flags(**{**MICRO, "batch_size": 8, **options}, out=out)
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, script, *argv], env=env, **how)


def processes_of(process):
    """Those that it has started."""
    found = subprocess.run(["pgrep", "--parent", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def has_ended(pid):
    """Its parent may be one that does not ask for its status."""
    stat = Path("/proc", str(pid), "stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@two_cores
def test_a_small_batch_is_shared_by_two_processes(tmp_path):
    """With the result of one process that takes it in two passes, but for rounding."""
    printed, errors = start_plainly(tmp_path / "two", kimg=0.008).communicate(timeout=120)
    assert printed.count("2 x cpu") == 1, errors
    assert printed.count("finished at 0.008 kimg") == 1

    two = flatten(checkpoint(tmp_path / "two")["opt_g"])
    out = train_micro(tmp_path / "one", batch_size=8, batch_gpu=4, kimg=0.008)
    one = flatten(checkpoint(out)["opt_g"])
    gradients = [name for name in one if name.endswith("exp_avg")]
    assert len(gradients) > 20
    for name in gradients:
        assert torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-6), name


@two_cores
def test_a_larger_batch_is_not_shared(tmp_path):
    """It would take more memory, since passes of one process follow each other."""
    printed, errors = start_plainly(tmp_path, batch_size=16, kimg=0.016).communicate(timeout=120)
    assert "1 x cpu" in printed, errors


@two_cores
def test_a_small_batch_in_two_passes_is_not_shared(tmp_path):
    """Who asks for small passes has little memory."""
    printed, errors = start_plainly(tmp_path, batch_gpu=4, kimg=0.008).communicate(timeout=120)
    assert "1 x cpu" in printed, errors


@two_cores
@pytest.mark.parametrize("reader", ["head -n 1", "true"])
def test_the_reader_of_two_processes_may_go(tmp_path, reader):
    """One line says so, if anything: no traceback of an exit that was not clean."""
    options = flags(**{**MICRO, "batch_size": 8, "kimg": 0.08}, out=tmp_path)
    command = shlex.join(["env", "-u", "OMP_NUM_THREADS", sys.executable, str(SCRIPT), *options])
    done = subprocess.run(f"{command} | {reader}", shell=True, stderr=subprocess.PIPE, text=True, timeout=120)
    assert "Traceback" not in done.stderr


@two_cores
def test_threads_that_the_user_asks_for_are_those_of_one_process(tmp_path):
    options = flags(**{**MICRO, "batch_size": 8, "kimg": 0.008}, out=tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    printed = subprocess.check_output([sys.executable, SCRIPT, *options], env=env, text=True)
    assert "1 x cpu" in printed


@two_cores
def test_bad_input_is_one_line_of_two_processes(tmp_path):
    """The second one, which waits for the first, does not say so."""
    (tmp_path / "file").touch()
    process = start_plainly(tmp_path / "file" / "run", metrics="fid8", detector="area8", reals=8)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "2 x cpu" in printed
    (line,) = errors.splitlines()
    assert line.startswith("3dgp.py: error: ")
    assert "Not a directory" in line


@two_cores
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_second_process_ends_with_the_first(tmp_path, signum):
    process = start_plainly(tmp_path, snapshot_kimg=0.08)
    wait_for_lines(tmp_path, 12)
    (second,) = processes_of(process)
    process.send_signal(signum)
    process.communicate(timeout=60)  # both hold the pipes
    wait_for(lambda: has_ended(second), 20)
    assert process.returncode == (0 if signum == signal.SIGTERM else -signal.SIGKILL)
    assert checkpoint(tmp_path)["step"] >= 10


@two_cores
def test_the_first_process_says_that_the_second_was_killed(tmp_path):
    process = start_plainly(tmp_path, timeout=20)
    wait_for_lines(tmp_path, 3)
    (second,) = processes_of(process)
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 0 waited in vain" in errors


def test_data_that_are_gone_end_the_run(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "a", each=5)
    real = m.training_step
    gone = []

    def step(run, batch, stats):
        if run.step == 2:
            shutil.rmtree(root)
            gone.append(time.time())
        return real(run, batch, stats)

    monkeypatch.setattr(m, "training_step", step)
    options = flags(**{**MICRO, "data": root, "depth": "none"})
    status, err = run_main(capsys, "--out", tmp_path / "run", *options)
    assert status == 2
    assert "unreadable or gone" in err.splitlines()[-1]
    assert time.time() - gone[0] < 9


def kill_data_workers(monkeypatch, folder, times):
    """So many data workers die over their first item; files in a folder count them, for all processes."""
    real = m.ShapesData.__getitem__

    def item(self, i):
        killed = len(list(folder.glob("killed*")))
        if torch.utils.data.get_worker_info() and killed < times:
            (folder / f"killed{killed}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i)

    monkeypatch.setattr(m.ShapesData, "__getitem__", item)


@pytest.mark.parametrize("metrics", ["", "fid33"])  # the first batches are of training, or of measuring
def test_a_killed_data_worker_ends_the_run_which_can_go_on(tmp_path, monkeypatch, capsys, metrics):
    kill_data_workers(monkeypatch, tmp_path, times=1)
    options = dict(workers=1, timeout=5, kimg=0.048, metrics=metrics, detector="area8", reals=64)
    argv = ("--resume", "auto", "--out", tmp_path / "run", *flags(**{**MICRO, **options}))
    status, err = run_main(capsys, *argv)
    assert status == 2
    assert "--data: data workers fail" in err
    assert "Traceback" not in err
    assert not torch.multiprocessing.active_children()

    # No batch is lost or seen twice.
    assert m.main([str(a) for a in argv]) == 0
    other = train_micro(tmp_path / "other", kimg=0.048)
    assert_same_tensors(tensors_of(tmp_path / "run"), tensors_of(other))


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_really_full_disk(small_disk, capsys):
    out = small_disk / "run"
    options = flags(**{**MICRO, "kimg": 1, "snapshot_kimg": 0.016})
    status, err = run_main(capsys, "--out", out, *options)
    assert status == 2
    assert "cannot write" in err.splitlines()[-1]
    assert "untouched" in err.splitlines()[-1]
    # No half files are left, and those that are there are whole.
    assert not list(out.glob(".*tmp"))

    kept = m.checkpoints(out)
    assert kept
    for _, path in kept:
        assert m.load_checkpoint(path)[0] == path


def test_processes_do_not_outlive_torchrun(tmp_path):
    process = torchrun(tmp_path, kimg=1000)
    wait_for_lines(tmp_path, 3)
    process.kill()
    printed, _ = process.communicate(timeout=60)  # its workers share the pipe
    assert "stopped (go on with --resume latest" in printed
    assert m.checkpoints(tmp_path)[0][0] >= 0.048


def kill_at_once(process):
    """SIGKILL to torchrun and to its workers, which have sessions of their own."""
    process.send_signal(signal.SIGSTOP)  # so that it starts no others meanwhile
    found = subprocess.run(["pgrep", "--parent", str(process.pid)], capture_output=True, text=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    process.kill()


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fault_drill(tmp_path, processes):
    """30 rounds of SIGKILL at random moments: every resume succeeds, at most a snapshot interval is lost."""
    out = tmp_path / "run"
    every = 0.08
    options = dict(processes=processes, kimg=16, snapshot_kimg=every, log_kimg=0.016, metrics="", timeout=60)
    random = np.random.default_rng(processes)
    lost = []

    for i in range(30):
        before = m.checkpoints(out)[:1]
        lines = len(log(out)) if before else 0
        process = torchrun(out, **options)

        # Every third one is killed while it starts.
        if i % 3:
            wait_for_lines(out, lines + 1)
            time.sleep(random.uniform(0, 3))
        else:
            time.sleep(random.uniform(0, 12))
        kill_at_once(process)

        printed, _ = process.communicate()
        assert "Traceback" not in printed, printed
        assert "rror:" not in printed, printed
        after = m.checkpoints(out)[:1]
        assert after >= before
        if after and (out / "log.jsonl").exists():
            lost.append(log(out)[-1]["kimg"] - after[0][0])

    assert max(lost) <= every + 0.017
    assert len({*lost}) > 3

    # It ends as if nothing had happened.
    finish(torchrun(out, **options), 600)
    if processes == 1:
        finish(torchrun(tmp_path / "whole", **options), 900)
        assert_same_tensors(tensors_of(out), tensors_of(tmp_path / "whole"))


@slow
def test_memory_is_flat_over_5000_steps(tmp_path, monkeypatch):
    memory = {}
    append_line = m.append_line

    def append(path, entry):
        memory[round(entry["kimg"] * 1000 / 16)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        append_line(path, entry)

    monkeypatch.setattr(m, "append_line", append)
    train_micro(tmp_path, kimg=80, log_kimg=0.16, snapshot_kimg=8, workers=1, guard="off")
    assert memory[5000] < 1.03 * memory[500], (memory[500], memory[5000])


@slow
@pytest.mark.parametrize("how", ["nan", "lr", "scale"])
def test_a_spoiled_tiny_run_ends_as_good(tmp_path, monkeypatch, how):
    """HEALTHY_RUN in the environment may name a run of these options that is there already."""
    options = dict(preset="tiny", kimg=9, metrics="fid1k", workers=1)
    healthy = Path(os.environ.get("HEALTHY_RUN") or tmp_path / "healthy")
    if not healthy.exists():
        assert m.main(flags(**options, out=healthy)) == 0

    spoil(monkeypatch, how, at=600)
    ill = tmp_path / "ill"
    assert m.main(flags(**options, out=ill)) == 0
    (event,) = lines_of_recovery(ill)
    assert 4.8 <= event["diverged"] <= 5.06

    distance = log(healthy, "metrics")[-1]["fid1k[area8]"]
    assert log(ill, "metrics")[-1]["fid1k[area8]"] < 1.2 * distance


def shell(command):
    subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture
def network_namespaces():
    """Two network namespaces, tdgp0 and tdgp1, joined by a veth pair: hosts 10.99.0.1 and 10.99.0.2"""
    names = ("tdgp0", "tdgp1")
    try:
        for name in names:
            shell(f"ip netns add {name}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make network namespaces")

    try:
        shell("ip link add tdgp0 netns tdgp0 type veth peer name tdgp1 netns tdgp1")
        for i, name in enumerate(names):
            shell(f"ip -n {name} addr add 10.99.0.{i + 1}/24 dev {name}")
            shell(f"ip -n {name} link set {name} up")
            shell(f"ip -n {name} link set lo up")
        yield names
    finally:
        for name in names:
            shell(f"ip netns del {name}")


def start_host(i, out, **options):
    """One process of a run of two hosts, started by torchrun in a namespace."""
    torchrun_there = f"""
        ip netns exec tdgp{i} {sys.executable} -m torch.distributed.run
        --nnodes=2 --nproc_per_node=1 --local_addr=10.99.0.{i + 1}
        --rdzv_backend=c10d --rdzv_endpoint=10.99.0.1:29511 --rdzv_id=t --rdzv_conf=is_host={1 - i}
    """
    options = flags(**{**MICRO, "timeout": 20, **options})
    return subprocess.Popen(
        [*torchrun_there.split(), SCRIPT, "--resume", "auto", "--out", out, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"tdgp{i}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_hosts(out, **options):
    return [start_host(i, out, **options) for i in (0, 1)]


@slow
def test_two_hosts(tmp_path, network_namespaces):
    """c10d rendezvous: the same result as on one host; a cut link ends both."""
    finish(torchrun(tmp_path / "one", kimg=0.16), 120)
    statuses = end(start_hosts(tmp_path / "two", kimg=0.16), 120)
    assert [status for status, _ in statuses] == [0, 0]
    assert_same_tensors(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two"))

    out = tmp_path / "cut"
    hosts = start_hosts(out, kimg=1000, snapshot_kimg=0.16)
    wait_for_lines(out, 15)
    shell("ip -n tdgp0 link set tdgp0 down")
    for process in hosts:
        # The training process ends; torchrun waits for its own store as long as TCP does.
        threading.Timer(60, process.kill).start()
        assert any("waited in vain" in line for line in process.stderr)
        process.kill()
        process.communicate()

    # With the link mended the run goes on.
    shell("ip -n tdgp0 link set tdgp0 up")
    kimg = m.checkpoints(out)[0][0] + 0.16
    statuses = end(start_hosts(out, kimg=kimg, snapshot_kimg=0.16), 120)
    assert [status for status, _ in statuses] == [0, 0]
    assert m.checkpoints(out)[0][0] == pytest.approx(kimg)


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning: a run that begins with the networks of another


def test_a_run_may_begin_with_the_networks_of_another(run, tmp_path, capsys):
    out = train_micro(tmp_path / "fine", "--init", str(run), kimg=0.016)
    said = capsys.readouterr().out
    first = torch.load(out / "checkpoint-000000.000.pt", weights_only=True)
    before = checkpoint(run)

    assert_same_tensors(first["G"], before["G_ema"])
    assert_same_tensors(first["G_ema"], before["G_ema"])
    assert_same_tensors(first["D"], before["D"])
    assert first["step"] == 0
    assert not first["opt_g"]["state"]
    assert f"--init {run}: Generator begins with {len(before['G'])} tensors; anew: nothing" in said
    assert f"--init {run}: Discriminator begins with {len(before['D'])} tensors; anew: nothing" in said

    # Gone on with, it does not begin again.
    begun = checkpoint(out)
    assert m.main(["--resume", "latest", "--out", str(out), "--kimg", "0.032"]) == 0
    assert checkpoint(out)["step"] == 2
    assert_same_tensors(torch.load(out / "checkpoint-000000.016.pt", weights_only=True)["G"], begun["G"])


def test_what_does_not_fit_begins_anew_and_is_named(run, tmp_path, capsys):
    """Photographs of two classes, with no depth, after eight kinds of solids."""
    photos = make_folder(tmp_path / "photos")
    out = tmp_path / "fine"
    train_micro(out, "--init", str(newest(run)), kimg=0.016, data=photos, depth="none")
    said = capsys.readouterr().out
    first = torch.load(out / "checkpoint-000000.000.pt", weights_only=True)
    before = checkpoint(run)

    for name in ("G", "D"):
        source = before["G_ema" if name == "G" else name]
        new = {key for key, t in first[name].items() if key not in source or t.shape != source[key].shape}
        assert 0 < len(new) < len(first[name]) / 2
        same = {key: t for key, t in first[name].items() if key not in new}
        assert_same_tensors(same, {key: source[key] for key in same})
        assert all(key in said for key in new)
    assert "mapping_network.embed.weight" in said
    assert "b16.fromrgb.weight" in said


def test_a_run_may_begin_with_a_published_generator(run, tmp_path, capsys):
    average = checkpoint(run)["G_ema"]
    model = tmp_path / "model"
    model.mkdir()
    safetensors.torch.save_file(average, model / "model.safetensors")

    out = train_micro(tmp_path / "fine", "--init", str(model), kimg=0.016)
    first = torch.load(out / "checkpoint-000000.000.pt", weights_only=True)
    assert_same_tensors(first["G"], average)
    assert_same_tensors(first["G_ema"], average)
    assert "Discriminator begins with 0 tensors" in capsys.readouterr().out

    for content in (b"", b"no tensors", (model / "model.safetensors").read_bytes()[:-9]):
        (model / "model.safetensors").write_bytes(content)
        status, err = run_main(capsys, "--init", model, "--out", tmp_path / "none", *flags(**MICRO))
        assert status == 2
        assert f"--init {model}/model.safetensors: no such file, or not one of tensors (Safeten" in err


@pytest.mark.parametrize("what, reason", [("nowhere", "no such file"), (".", "no checkpoint in ")])
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch, capsys, what, reason):
    """And data are not prepared before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(m, "open_data", None)
    status, err = run_main(capsys, "--init", what, *flags(**MICRO))
    assert status == 2
    assert reason in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# Pictures


def test_samples_are_four_views_of_each_scene_over_their_depth(run, tmp_path):
    """4 scenes of 4 views in a row, pictures of 16² enlarged to 96²; a function of the generator alone."""
    _, cfg, state = m.load_checkpoint(run)
    G = m.Generator(cfg).eval()
    G.load_state_dict(state["G_ema"])
    for name in ("a.png", "b.png"):
        m.write_samples(G, torch.arange(8), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    for path in (tmp_path / "a.png", run / "samples-000000.048.png"):
        with PIL.Image.open(path) as image:
            assert image.size == (16 * 96, 4 * 2 * 96)


def test_samples_in_2d_are_16_pictures_in_a_row(tmp_path):
    """64 pictures of 64 latents, none of them twice."""
    G = m.Generator(micro(dims=2, depth="none", camera="frontal", triplane_features=1)).eval()
    m.write_samples(G, torch.arange(8), tmp_path / "grid.png")
    with PIL.Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (4 * 96, 16 * 96, 3)
    pictures = pixels.reshape(4, 96, 16, 96, 3).swapaxes(1, 2).reshape(64, -1)
    assert len(np.unique(pictures, axis=0)) == 64


# ------------------------------------------------------------------------------------------------------------
# Main: the command line and bad input


def assert_help_shows_every_option(program, options):
    """Each with its default, and the beginning of what it is for."""
    command = [sys.executable, program, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\s+", " ", text)

    fields = [f for f in dataclasses.fields(options) if f.metadata]  # but for what the program sets itself
    for f in fields:
        assert "--" + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()[:2]) in text, f.name
    assert text.count("(default:") == len(fields)


def test_help_shows_every_option_with_its_default():
    assert_help_shows_every_option(SCRIPT, m.Config)


BAD_INPUT = [
    (["--data", "nowhere"], "nowhere: no such file"),
    (["--data", ""], "--data: is empty"),
    (["--data", "imagenet"], "DATA_DIR"),
    (["--data", "EMPTY"], "no images"),
    (
        ["--data", "PHOTOS", "--depth-weights", "nowhere.pth"],
        "no depth, see above",
    ),
    (["--resolution", "48"], "--resolution 48: must be a power of two"),
    (["--patch-resolution", "64"], "larger than --resolution"),
    (["--dims", "2"], "add --depth none"),
    (["--batch-size", "6"], "multiple of 4"),
    (["--batch-gpu", "6"], "2 images in a pass are not a multiple of 4"),
    (["--kimg", "0"], "--kimg 0.0: must be positive"),
    (["--mapping-lr-mult", "0"], "--mapping-lr-mult 0.0: must be positive"),
    (["--r1-gamma", "nan"], "--r1-gamma: not a finite number"),
    (["--seed", "-1"], "--seed: must not be negative"),
    (["--prior-fov", "45", "10"], "--prior-fov: the first number must be less"),
    (["--near", "2"], "less than --far"),
    (["--frobnicate", "3"], "--help"),
    (["paint"], "paint"),
    (["--device", "gpu"], "invalid choice"),
    (["--teacher", "nonsense_net"], "Unknown model"),
    (["--resume", "missing.pt"], "missing.pt: no such file"),
    (["--resume", "latest", "--out", "EMPTY"], "no checkpoint"),
    (["--resume", "GARBAGE"], "not one of tensors"),
    (["--metrics", "fid50x"], "--metrics fid50x: must be fid or nfs, a number"),
    (["--metrics", "is2k"], "--metrics is2k: must be fid or nfs"),
    (["--detector", "GARBAGE"], "not TorchScript in the field's format"),
    (["--detector", "nowhere.pt"], "nowhere.pt: not there"),
]


def with_paths(argv, folder):
    """Paths for words: PHOTOS, a folder of photographs; EMPTY, an empty one; GARBAGE, a foreign file."""
    make_folder(folder / "PHOTOS", each=1)
    (folder / "EMPTY").mkdir()
    (folder / "GARBAGE").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    names = ("PHOTOS", "EMPTY", "GARBAGE")
    return [str(folder / word) if word in names else word for word in argv]


@pytest.mark.parametrize("argv, message", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, argv, message):
    argv = with_paths(argv, tmp_path)
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]

    status, err = run_main(capsys, *argv)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("3dgp.py: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp936", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(encoding):
    command = [sys.executable, SCRIPT, "--help"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f"as published at 256{'²' if encoding == 'utf-8' else '?'};" in done.stdout.decode(encoding)


def test_systems_without_some_signals_are_served():
    """As Windows, where the module, at least, can be imported."""
    gone = "del signal.SIGUSR1, signal.SIGCHLD"
    code = f"import importlib, signal, torch; {gone}; m = importlib.import_module('3dgp')"
    code += "; assert len(m.STOP_SIGNALS) == 2"
    code += "; list(m.load_batches([dict(image=torch.ones(1), label=0)], m.Config(workers=0), [[0]]))"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_no_gpu_when_asked_for_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # one that its driver does not serve
    status, err = run_main(capsys, "--device", "cuda", "--out", tmp_path / "out")
    assert status == 2
    assert "need a GPU each, 0 found" in err
    assert m.choose_device("auto") == torch.device("cpu")


def test_fewer_gpus_than_processes(monkeypatch):
    """The first process says it: what only the others knew, nobody would print."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(m.UserError, match="2 processes need a GPU each, 1 found"):
        m.choose_device("auto")


def test_batch_that_does_not_fit_the_processes():
    with pytest.raises(m.UserError, match="not divisible by 3 processes"):
        m.validate(micro(), 3)


def test_what_does_not_fit_a_checkpoint_is_refused(tmp_path, capsys):
    out = train_micro(tmp_path / "run", kimg=0.016)
    config = (out / "config.json").read_bytes()
    changes = {
        "--z-dim": (16, "do not fit"),
        "--preset": ("small", "start a new run"),
        "--camera-lr-mult": (0.5, "has 1.0; start a new run"),  # the weights are stored divided by it
    }
    for flag, (value, message) in changes.items():
        status, err = run_main(capsys, "--resume", "latest", "--out", out, flag, value)
        assert status == 2
        assert message in err
    assert (out / "config.json").read_bytes() == config

    torch.save({"model": torch.zeros(1)}, tmp_path / "other.pt")
    status, err = run_main(capsys, "--resume", tmp_path / "other.pt")
    assert status == 2
    assert "not a checkpoint of this program" in err


def test_a_run_is_not_overwritten(tmp_path, capsys, monkeypatch):
    """Neither one whose folder is named nor the one in the folder that the program chooses."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "shapes"
    assert m.main(flags(**MICRO, kimg=0.016)) == 0
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()

    for named in ([], ["--out", out]):
        status, err = run_main(capsys, *named, *flags(**MICRO))
        assert status == 2
        assert "--resume latest" in err
        assert err.count("\n") == 1
    assert files == {path: path.stat().st_mtime_ns for path in out.iterdir()}

    assert m.main(["--resume", "latest", "--kimg", "0.032"]) == 0
    assert checkpoint(out)["step"] == 2


# ------------------------------------------------------------------------------------------------------------
# Preparation of photographs (lereS_depth.py)


class Brightness(torch.nn.Module):
    """Stands for LeReS where not the network but what is around it is tested."""

    MEAN = (0, 0, 0)
    STD = (1, 1, 1)
    SIZE = 448

    def forward(self, x):
        return x.mean(1, keepdim=True)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file for --weights that yields `Brightness`"""
    monkeypatch.setattr(L, "load_leres", lambda path: Brightness())
    path = tmp_path / "weights.pth"
    path.write_bytes(b"any")
    return path


@pytest.fixture(scope="module")
def leres_file(tmp_path_factory):
    """A checkpoint in the released format, of a network that nobody has trained"""
    path = tmp_path_factory.mktemp("leres") / "res50.pth"
    state = {f"module.{name}": value for name, value in seeded_leres("resnet50").items()}
    torch.save({"depth_model": state}, path)
    return path


def prepare(*argv):
    return L.main([str(a) for a in argv])


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_photographs_to_training_with_a_checkpoint_of_the_released_format(tmp_path, capsys, leres_file):
    root = make_folder(tmp_path / "photos", each=4)
    target = tmp_path / "out"
    assert prepare(root, target, "--resolution", 16, "--weights", leres_file, "--batch", 4) == 0

    # A picture and its depth of each photograph, and four files about them.
    out = contents(target)
    expected = [[f"cat/{i}.png", 0] for i in range(4)] + [[f"dog/{i}.png", 1] for i in range(4)]
    assert json.loads(out["dataset.json"])["labels"] == expected
    assert out["skipped.txt"] == b""
    assert {"all_depth.png", "dog/3.png", "dog/3_depth.png"} <= set(out)
    assert len(out) == 20
    depth = m.read_depth(out["cat/0_depth.png"])
    assert depth.shape == (16, 16)
    assert (depth.min(), depth.max()) == (0, 65535)

    train_micro(tmp_path / "run", data=target, kimg=0.016)
    # It is not made anew over what is there.
    capsys.readouterr()
    assert prepare(root, target, "--weights", leres_file) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_checkpoint_of_another_network_names_what_is_wrong(tmp_path, capsys, leres_file):
    root = make_folder(tmp_path / "photos", each=1)
    state = torch.load(leres_file, weights_only=True)["depth_model"]
    # The same number of parameters, of which one has another name.
    state["module.extra"] = state.pop("module.decoder_modules.conv1.bias")
    torch.save({"depth_model": state}, tmp_path / "other.pth")

    assert prepare(root, tmp_path / "out", "--weights", tmp_path / "other.pth") == 2
    err = capsys.readouterr().err
    assert "the first is decoder_modules.conv1.bias" in err
    assert "1 missing or of another shape, 1 unexpected" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_training_on_raw_photographs_prepares_them_once(tmp_path, monkeypatch, capfd, leres_file):
    """lereS_depth.py runs as a process of its own: its messages come from there."""
    root = make_folder(tmp_path / "data", each=2)
    monkeypatch.setenv("DATA_DIR", str(root))  # the result lies within

    for run, prepares in (("one", True), ("two", False)):
        train_micro(tmp_path / run, data=root, depth_weights=leres_file, kimg=0.016)
        assert (": 4 images in" in capfd.readouterr().out) == prepares

    assert len(list(root.iterdir())) == 3
    assert (tmp_path / "one" / "reals.png").exists()


@two_cores
def test_photographs_are_prepared_before_there_are_two_processes(tmp_path, monkeypatch, leres_file):
    root = make_folder(tmp_path / "data", each=2)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "prepared"))
    process = start_plainly(tmp_path / "run", data=root, depth_weights=leres_file, kimg=0.008)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert printed.count(": 4 images in") == 1
    assert "2 x cpu" in printed


def test_a_preparation_that_fails_ends_the_run(tmp_path, monkeypatch, capfd):
    """In one more line, after the one of lereS_depth.py"""
    root = make_folder(tmp_path / "data", each=1)
    monkeypatch.setenv("DATA_DIR", str(root))
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"nothing")
    options = ("--data", root, "--depth-weights", weights, "--out", tmp_path / "out")
    status, err = run_main(capfd, *options)
    assert status == 2

    # Theirs says what is wrong, ours what else can be done.
    theirs, ours = err.splitlines()
    assert theirs.startswith("lereS_depth.py: error: ")
    assert "weights.pth: no such file, or not one of tensors" in theirs
    assert ours.startswith("3dgp.py: error: ")
    assert "train on RGB alone" in ours
    assert not (tmp_path / "out").exists()


def test_estimated_depth_has_the_images_size_and_starts_at_one_hundredth():
    depth = L.estimate_depth(Brightness(), torch.rand(2, 3, 30, 50))
    assert depth.shape == (2, 1, 30, 50)
    assert float(depth.min()) >= 0.01 - 1e-6

    ramp = torch.linspace(0, 1, 448)
    depth = L.estimate_depth(Brightness(), ramp.expand(1, 3, 448, -1))
    assert torch.allclose(depth[0, 0, 0], ramp + 0.01, atol=1e-4)


def make_nasty_folder(folder):
    """Twelve files of which nine are images"""
    folder.mkdir()
    photo((500, 300)).save(folder / "whole.jpg")
    photo().save(folder / "whole.png")  # the same name twice
    photo().save(folder / "anim.gif")
    photo().save(folder / "Übergröße 猫.jpg")
    photo(mode="CMYK").save(folder / "cmyk.jpg")
    photo().convert("P").save(folder / "palette.png", transparency=3)
    PIL.Image.fromarray(np.full((8, 9), 40000, np.uint16)).save(folder / "gray16.png")
    PIL.Image.new("RGB", (20_000, 20), "red").save(folder / "wide.png")

    exif = photo().getexif()
    exif[0x0112] = 6
    photo((60, 20)).save(folder / "turned.jpg", exif=exif, quality=95, subsampling=0)

    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    return folder


def test_all_that_can_be_read_is_prepared(tmp_path, weights):
    source = make_nasty_folder(tmp_path / "nasty")
    assert prepare(source, tmp_path / "out.zip", "--resolution", 32, "--weights", weights) == 0
    skipped = (tmp_path / "out.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["cut.jpg", "empty.png", "text.jpg"]
    assert (tmp_path / "out.all_depth.png").exists()
    assert not (tmp_path / "out.unfinished").exists()

    # What was prepared is read without complaint, under names that differ.
    data = m.ImageData(micro(resolution=32), tmp_path / "out.zip")
    assert len(data) == 9
    assert data.num_classes == 0
    assert {"whole.png", "whole_png.png", "Übergröße 猫.png"} <= set(data.names)
    for i in range(9):
        data[i]
    assert not data.unreadable

    # A camera that was held upright says so in the EXIF data.
    turned = data[data.names.index("turned.png")]["image"].float().mean(0)
    upright = PIL.ImageOps.fit(photo((60, 20)).rotate(-90, expand=True), (32, 32), PIL.Image.LANCZOS)
    assert np.abs(turned.numpy() - np.asarray(upright).mean(-1)).mean() < 4


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "..\\evil.png"])
def test_archives_that_lead_out_are_refused(tmp_path, capsys, weights, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z:
        z.writestr(name, b"")
    assert prepare(tmp_path / "bad.zip", tmp_path / "out", "--weights", weights) == 2
    assert "no images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/a/b.png", "./a/b.png", "//a/./b.png", "a\\b.png"])
def test_odd_names_of_members_stay_within(tmp_path, weights, name):
    content = io.BytesIO()
    photo().save(content, "PNG")
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as z:
        z.writestr(name, content.getvalue())
        z.writestr("./dataset.json", '{"labels": [["a/b.png", 4]]}')
    assert prepare(tmp_path / "odd.zip", tmp_path / "out", "--resolution", 16, "--weights", weights) == 0
    assert data_of(tmp_path / "out").labels.tolist() == [4]
    assert data_of(tmp_path / "out").names == ["a/b.png"]


def start_preparation(rank, *argv, world=2, stdout=subprocess.DEVNULL):
    """One of `world` processes that share the work, in a session of its own with its workers."""
    return subprocess.Popen(
        [sys.executable, HERE / "lereS_depth.py", *map(str, argv)],
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop_session(leader):
    """SIGSTOP to a session, and wait until all of it stands (T), or has ended and nobody asked how (Z)."""
    os.killpg(leader.pid, signal.SIGSTOP)
    states = ["ps", "-o", "stat=", "-s", str(leader.pid)]
    wait_for(lambda: all(state[0] in "TZ" for state in subprocess.check_output(states, text=True).split()))


def many_photographs(folder):
    """120 photographs with ready maps, and a broken one -> their folder, options of a slow preparation"""
    root = make_folder(folder / "photos", each=60, depth=True)
    (root / "cat" / "broken.jpg").write_text("not a picture")
    maps = folder / "maps"
    for path in root.rglob("*_depth.png"):
        moved = maps / path.relative_to(root)
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    return root, ("--depth-from", maps, "--resolution", 64, "--batch", 4, "--workers", 1)


@pytest.mark.parametrize("target, killed, world", [("b", True, 1), ("b.zip", False, 2)])
def test_of_two_preparations_of_one_folder_one_waits(tmp_path, target, killed, world):
    """As when runs begin at once on the same photographs. If the first is killed, the other goes on."""
    root, options = many_photographs(tmp_path)
    undisturbed = tmp_path / target.replace("b", "a")
    assert prepare(root, undisturbed, *options) == 0

    def start(*more):
        how = dict(world=world, stdout=subprocess.PIPE)
        return [start_preparation(rank, root, target, *options, *more, **how) for rank in range(world)]

    target = tmp_path / target
    first = start()
    begun = target.with_suffix(".unfinished") if target.suffix else target
    wait_for(lambda: len(list(begun.rglob("*_depth.png"))) >= 5 and len(list(begun.glob(".lock-*"))) == world)
    for process in first:
        stop_session(process)
    made = len(list(begun.rglob("*.png")))

    # One that would make something else says so at once; one that would make the same waits.
    assert [process.wait() for process in start("--invert")] == [2] * world
    other = start()
    for process in other:
        assert any(b"another process prepares it; waiting" in line for line in process.stdout)
    assert len(list(begun.rglob("*.png"))) == made

    for process in first:
        os.killpg(process.pid, signal.SIGKILL if killed else signal.SIGCONT)
    assert [process.wait() for process in first] == [-signal.SIGKILL if killed else 0] * world
    said = [process.stdout.read().decode() for process in other]
    assert any("120 images in" in text for text in said) == killed
    assert [process.wait() for process in other] == [0] * world
    if target.is_dir():
        assert contents(target) == contents(undisturbed)
        assert not list(target.glob(".*"))
    else:
        assert target.read_bytes() == undisturbed.read_bytes()
        assert not begun.exists()
    for process in first + other:
        process.stdout.close()


def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path):
    """With ready maps; once undisturbed in one process, once killed in two that share the work."""
    root, options = many_photographs(tmp_path)

    # The undisturbed one.
    assert prepare(root, tmp_path / "a", *options) == 0

    # The killed one: when some files are there, and long before all are.
    b = tmp_path / "b"
    started = [start_preparation(rank, root, b, *options) for rank in (0, 1)]
    wait_for(lambda: len(list(b.rglob("*_depth.png"))) >= 10)
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(b.rglob("*.png"))) < 240

    started = [start_preparation(rank, root, b, *options) for rank in (0, 1)]
    assert [process.wait() for process in started] == [0, 0]
    assert contents(tmp_path / "a") == contents(b)
    assert len(contents(b)) == 2 * 120 + 4


@pytest.mark.parametrize("invert", [False, True])
def test_ready_depth_maps_of_any_kind(tmp_path, invert):
    photos = tmp_path / "photos"
    maps = tmp_path / "maps"
    photos.mkdir()
    maps.mkdir()
    for name in ("a", "b", "c"):
        photo((80, 40)).save(photos / f"{name}.jpg")
    # One map as numbers; one as a picture of twice the size; none for the third photograph.
    ramp = np.linspace(1, 4, 80)[None].repeat(40, 0)
    np.save(maps / "a.npy", ramp)
    PIL.Image.fromarray((ramp * 60).round().astype(np.uint8)).resize((160, 80)).save(maps / "b.png")

    out = tmp_path / "out"
    options = ["--depth-from", maps, "--resolution", 40, *["--invert"] * invert]
    assert prepare(photos, out, *options) == 0
    assert (out / "skipped.txt").read_text().startswith("c.jpg\tFileNotFoundError: no depth")

    depth = ramp[0, 20:60]  # the middle of the photograph
    if invert:
        depth = 1 / depth
    expected = (depth - depth.min()) / (depth.max() - depth.min()) * 65535
    for name, tolerance in (("a", 300), ("b", 1200)):
        row = m.read_depth((out / f"{name}_depth.png").read_bytes())[7]
        assert np.abs(row - expected).max() < tolerance


@pytest.mark.parametrize("beside", [True, False])
def test_a_photograph_is_never_its_own_depth(tmp_path, beside):
    """Nor is a picture in colours anybody's."""
    root = make_folder(tmp_path / "photos", classes=("cat",), each=2, depth=beside)
    for path in root.rglob("?.jpg"):
        PIL.Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    target = tmp_path / "out"
    status = prepare(root, target, "--depth-from", root, "--resolution", 16)
    if not beside:
        assert status == 2
        assert "no depth" in (target / "skipped.txt").read_text()
        shutil.copytree(root, tmp_path / "maps")
        target = tmp_path / "other"
        assert prepare(root, target, "--depth-from", tmp_path / "maps") == 2
        assert "a picture of depth, not depth" in (target / "skipped.txt").read_text()
        return
    assert status == 0
    rows = m.read_depth((target / "cat" / "0_depth.png").read_bytes())
    assert (np.diff(rows[5]) > 0).all()  # the ramp


def test_instance_selection_keeps_the_typical(tmp_path, weights, monkeypatch):
    mean_color = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    mean_color.dim = 3
    monkeypatch.setattr(m, "Teacher", lambda name, file: mean_color)

    # The fourth of each class has the color of the other class.
    root = tmp_path / "photos"
    red = (200, 20, 20)
    blue = (20, 20, 200)
    for folder, typical, odd in (("red", red, blue), ("blue", blue, red)):
        (root / folder).mkdir(parents=True)
        for i in range(10):
            color = odd if i == 3 else tuple(v + i for v in typical)
            PIL.Image.new("RGB", (20, 20), color).save(root / folder / f"{i}.png")
    (root / "red" / "x.jpg").write_text("not a picture")

    out = tmp_path / "out"
    assert prepare(root, out, "--resolution", 16, "--weights", weights, "--keep", 0.85) == 0
    assert (out / "skipped.txt").read_text().startswith("red/x.jpg\tUnidentifiedImageError")
    kept = (out / "kept.txt").read_text().splitlines()
    assert len(kept) == 18
    assert not {"red/3.png", "blue/3.png"} & set(kept)
    assert len(m.ImageData(micro(), out)) == 18


class FlakyServer(http.server.HTTPServer):
    """Serves `body`. A request for all of it breaks off; one that asks for the rest gets the rest."""

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), FlakyHandler)
        self.body = body
        self.starts = []  # where each request began
        self.url = f"http://127.0.0.1:{self.server_port}/res101.pth"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class FlakyHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.body
        wanted = self.headers.get("Range") or "bytes=0-"
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.server.starts.append(start)

        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:] if start else body[:100_000])

    def log_message(self, *_):
        pass


def test_weights_are_downloaded_resumed_and_checked(tmp_path, monkeypatch, capsys):
    body = bytes(range(256)) * 1000
    server = FlakyServer(body)
    monkeypatch.setattr(L, "URL", server.url)
    monkeypatch.setattr(L, "SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    # The first time the connection breaks off, the second time the rest comes, the third time it is there.
    with pytest.raises(m.UserError, match="--weights FILE"):
        L.find_weights("")
    assert "non-commercial" in capsys.readouterr().err
    assert L.find_weights("").read_bytes() == body
    assert L.find_weights("").read_bytes() == body
    assert server.starts == [0, 100_000]

    # Something else than what is expected comes.
    monkeypatch.setattr(L, "SHA256", "0" * 64)
    (tmp_path / "checkpoints" / "leres_res101.pth").unlink()
    server.body = body[:90_000]
    with pytest.raises(m.UserError, match="SHA-256"):
        L.find_weights("")

    # Nothing comes.
    server.shutdown()
    server.server_close()
    with pytest.raises(m.UserError, match="cannot download http://127.0.0.1"):
        L.find_weights("")


# ------------------------------------------------------------------------------------------------------------
# Tools: what people do with a trained generator, and what measures speed

OPTIONS_OF_TOOLS = dict(
    sample="SampleOptions",
    evaluate="EvaluateOptions",
    report="ReportOptions",
    bench="BenchOptions",
    ablate="AblateOptions",
    publish="PublishOptions",
)


@with_tools
@pytest.mark.parametrize("name", OPTIONS_OF_TOOLS)
def test_help_of_tools_shows_every_option_with_its_default(name):
    options = getattr(tool(name), OPTIONS_OF_TOOLS[name])
    assert_help_shows_every_option(HERE / "tools" / f"{name}.py", options)


def run_tool(capsys, name, *argv):
    """-> exit status and what was printed to standard error"""
    status = tool(name).main([str(a) for a in argv])
    return status, capsys.readouterr().err


BAD_INPUT_OF_TOOLS = [
    ("sample", [], "no checkpoint in .; name one"),
    ("sample", ["--resume", "EMPTY"], "no checkpoint in"),
    ("sample", ["--frames", "0"], "--frames, --fps: must be 1 or more"),
    ("sample", ["--resolution", "-5"], "--resolution 2 or more"),
    ("sample", ["--frobnicate", "3"], "--help"),
    ("evaluate", ["--resume", "missing.pt"], "missing.pt: no such file"),
    ("evaluate", ["--frobnicate", "3"], "--help"),
    ("report", ["EMPTY"], "EMPTY: not the folder of a run"),
    ("report", ["EMPTY", "--frobnicate", "3"], "--help"),
    ("ablate", ["colour"], "colour: must be one of adaptor"),
    ("ablate", ["depth", "--seeds", "0"], "--seeds 0: must be positive"),
    ("ablate", ["depth", "--options", "--kimg 0"], "--kimg 0.0: must be positive"),
    ("ablate", ["depth", "--options", "--out x"], "neither --out nor --resume"),
    ("ablate", ["depth", "--options", "--data it's"], "No closing quotation"),
    ("ablate", ["depth", "--metrics", "foo7"], "--metrics foo7: must be fid"),
    ("ablate", ["depth", "--metrics", ""], "--metrics is empty"),
    ("ablate", ["depth", "--metrics", "fid8,is8"], "area8 has no class probabilities"),
    ("ablate", ["depth", "--detectors", " "], "--detectors is empty"),
    ("ablate", ["depth", "--detectors", "GARBAGE"], "GARBAGE: not there, or not TorchScript"),
    ("bench", ["--repeats", "0"], "--repeats 0: must be positive"),
    ("bench", ["--frobnicate", "3"], "--help"),
    ("publish", ["EMPTY", "new"], "no checkpoint in"),
    ("publish", ["EMPTY", "PHOTOS"], "PHOTOS: is there already"),
    ("publish", ["EMPTY", "GARBAGE"], "GARBAGE: is there already"),
    ("publish", ["EMPTY", "new\nline"], "without line breaks"),
    ("publish", ["EMPTY", "new", "--repo", "mine"], "--repo mine: must be owner/name"),
    ("publish", ["EMPTY", "new", "--code", "https://me:word@host/x"], "without a password"),
    ("publish", ["EMPTY", "new", "--dtype", "fp16"], "invalid choice"),
    ("sample", ["--resume", "hf:mine"], "hf:mine: must be hf:owner/name"),
    ("sample", ["--resume", "hf:me/../x"], "must be hf:owner/name"),
    ("sample", ["--resume", "hf:me/x@../../x"], "must be hf:owner/name"),
]


@with_tools
@pytest.mark.parametrize("name, argv, message", BAD_INPUT_OF_TOOLS)
def test_bad_input_of_tools_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, name, argv, message):
    monkeypatch.chdir(tmp_path)
    argv = with_paths(argv, tmp_path)
    if name in ("sample", "report", "ablate"):
        argv += ["--out", str(tmp_path / "out")]

    status, err = run_tool(capsys, name, *argv)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith(f"{name}.py: error: ")
    assert not (tmp_path / "out").exists()


@with_tools
@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_tools_refuse_damaged_or_foreign_checkpoints_in_one_line(bad_checkpoints, capsys, name):
    for path in bad_checkpoints:
        status, err = run_tool(capsys, name, "--resume", path)
        assert status == 2
        assert err.count("\n") == 1
        assert path.name in err


@with_tools
@pytest.mark.parametrize("metrics, message", [("", "is empty"), ("fid50x", ": must be fid or kid or is")])
def test_evaluate_needs_a_metric(run, capsys, metrics, message):
    options = ("--metrics", metrics, "--detector", "area8")
    status, err = run_tool(capsys, "evaluate", "--resume", run, *options)
    assert status == 2
    assert f"--metrics {metrics}".rstrip() in err
    assert message in err


# Tools: pictures, animations, point clouds


@with_tools
def test_sample_writes_what_was_asked_for(run, tmp_path):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    G, *_ = tool("load").open_generator(run)
    bias = G.decoder.model[1].effective()[1][3]
    options = flags(
        resume=run,
        out=tmp_path,
        classes="1-2",
        seeds="3,5-6",
        frames=3,
        video="wiggle",
        mesh_resolution=12,
        mesh_level=0.9 * float(F.softplus(bias)),
    )
    switches = ["--mesh", "--points", "--depth", "--cameras", "--interpolate"]
    assert tool("sample").main([*options, *switches]) == 0

    expected = {"grid.png", "cameras.png", "walk.webp", "walk.gif"}
    if shutil.which("ffmpeg"):
        expected.add("walk.mp4")
    # Five files of each sample.
    names = [f"class{c:04d}-seed{seed:04d}" for c in (1, 2) for seed in (3, 5, 6)]
    for name in names:
        for kind in ("mesh.ply", "mesh.glb", "points.ply", "depth.png", "adapted.png"):
            expected.add(f"{name}-{kind}")
    assert {path.name for path in tmp_path.iterdir()} == expected

    # Classes down, seeds across; pictures of 16² are enlarged to 96².
    with PIL.Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 96, 2 * 96)
    with PIL.Image.open(tmp_path / "walk.webp") as film:
        assert film.n_frames == 6 * 3
        assert film.width == 2 * film.height  # RGB beside depth
    with PIL.Image.open(tmp_path / f"{names[0]}-depth.png") as depth:
        assert depth.mode.startswith("I")
        assert depth.size == (16, 16)

    # A point for each pixel.
    points, colors, _ = read_ply(tmp_path / f"{names[0]}-points.ply")
    assert points.shape == (256, 3)
    assert colors.std() > 0


@with_tools
def test_sample_writes_one_picture_and_animation_of_each(run, tmp_path):
    options = flags(resume=run, out=tmp_path, seeds="5", frames=3, video="orbit", resolution=32)
    assert tool("sample").main([*options, "--each"]) == 0
    assert len(list(tmp_path.glob("*-orbit.webp"))) == 8
    assert not (tmp_path / "grid.png").exists()
    with PIL.Image.open(tmp_path / "class0001-seed0005.png") as single:
        assert single.size == (96, 96)


@with_tools
def test_a_sample_that_fails_is_named_and_the_others_are_made(run, tmp_path, capsys, monkeypatch):
    sample = tool("sample")
    calls = []

    def extract_mesh(*_):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("--mesh-level 10: must lie between 0 and the largest density, 3")
        return np.zeros((3, 3)), np.zeros((3, 3)), np.array([[0, 1, 2]])

    monkeypatch.setattr(sample.mesh, "extract_mesh", extract_mesh)
    with pytest.raises(SystemExit) as end:
        sample.main([*flags(resume=run, out=tmp_path, classes="0", seeds="0-2"), "--mesh", "--points"])
    assert end.value.code == 1
    assert "sample.py: class0000-seed0001: --mesh-level 10" in capsys.readouterr().err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"grid.png", *(f"class0000-seed000{k}-points.ply" for k in range(3))} | {
        f"class0000-seed000{k}-mesh.{kind}" for k in (0, 2) for kind in ("ply", "glb")
    }


@with_tools
def test_films_of_odd_sizes_are_padded(tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("ffmpeg is not installed")
    frames = [np.zeros((97, 131, 3), np.uint8)] * 3
    tool("sample").write_animation([frames], 1, tmp_path / "film", 25.0)
    assert (tmp_path / "film.mp4").stat().st_size > 0


@with_tools
def test_metrics_of_too_few_images_are_one_line(run, tmp_path, capsys):
    root = make_folder(tmp_path / "a", classes=[f"c{k}" for k in range(8)], each=1, depth=True)
    for metrics in ("fid8", "kid8", "pr8"):
        options = ("--resume", run, "--data", root, "--detector", "area8", "--reals", 3, "--metrics", metrics)
        status, err = run_tool(capsys, "evaluate", *options)
        assert status == 2
        assert err.splitlines()[-1].endswith("fid, kid and pr need 4 images of the data, there are 3")
    assert run_tool(capsys, "evaluate", *options[:-4], "--reals", 4, "--metrics", "fid8,kid8,pr8")[0] == 0


@with_tools
def test_truncation_draws_to_the_mean_of_the_class(run, tmp_path, monkeypatch):
    seen = []
    forward = m.TriplaneBackbone.forward

    def remember(self, w, **kind):
        seen.append(w)
        return forward(self, w, **kind)

    monkeypatch.setattr(m.TriplaneBackbone, "forward", remember)
    for truncation in (0, 0.5, 1):
        options = flags(resume=run, out=tmp_path, truncation=truncation, classes="0,4", seeds="1-2")
        assert tool("sample").main(options) == 0

    # Truncation 0 is the mean of the class, whatever the seed; the rest lies on the way from it.
    mean, half, whole = torch.stack(seen).view(3, 2, 2, 8)  # class, seed, w
    assert torch.equal(mean[:, 0], mean[:, 1])
    assert (mean[0] - mean[1]).abs().max() > 0.1  # each class has its own
    assert torch.allclose(half, (mean + whole) / 2, atol=1e-6)
    assert (whole[:, 0] - whole[:, 1]).abs().max() > 0.1

    # It is the mean that another 20,000 draws have.
    G, *_ = tool("load").open_generator(run)
    for i, label in enumerate((0, 4)):
        w = G.mapping(torch.randn(20_000, 8), torch.full((20_000,), label))
        assert torch.allclose(mean[i, 0], w.mean(0), atol=0.1)


def ball(radius=0.15, sharp=20000.0):
    """A generator whose planes hold a ball: the density is steep in radius² - |x|², the colours are ramps.
    -> Generator, planes (1, 3, 4, 64, 64)"""
    sizes = dict(coarse_samples=64, fine_samples=64, triplane_resolution=64)
    G = m.Generator(micro(**sizes)).eval().requires_grad_(False)

    # The three planes are alike. Their means at a point: |x|² / 2, (2x + y) / 3, (y + 2z) / 3
    line = torch.linspace(-0.5, 0.5, 64)
    first = line.view(1, 64).expand(64, 64)  # along the width
    second = line.view(64, 1).expand(64, 64)  # along the height
    squares = first**2 + second**2
    plane = torch.stack([1.5 * squares / 2, first, second, torch.zeros_like(first)])
    planes = plane.expand(1, 3, -1, -1, -1)

    # Hidden units: (radius² - |x|²) / 2, and the two ramps, lifted so that the leaky ReLU leaves them alone.
    hidden, output = G.decoder.model
    for layer in (hidden, output):
        layer.weight.zero_()
        layer.bias.zero_()
    gain = math.sqrt(2)
    for i, (weight, bias) in enumerate([(-1.0, radius**2 / 2), (1.0, 1.0), (1.0, 1.0)]):
        hidden.weight[i, i] = weight * math.sqrt(4) / gain
        hidden.bias[i] = bias / gain
    output.weight[3, 0] = sharp * 8
    output.weight[0, 1] = 32.0
    output.weight[1, 2] = 32.0
    output.bias[:2] = -4.0
    return G, planes


def volume(vertices, faces):
    """What a closed mesh encloses; below 0 where its faces look inwards."""
    a, b, c = (vertices[faces[:, i]].astype(float) for i in range(3))
    return np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6


def edges_of(faces):
    """-> (3 M, 2): the two vertices of each side of each face, the smaller number first"""
    sides = [faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]
    return np.sort(np.concatenate(sides), 1)


@with_tools
def test_mesh_of_a_ball_is_closed_outward_and_renders_to_its_depth():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    G, planes = ball()
    cam = camera(yaw=0.3, pitch=1.3, fov=25)
    vertices, _, faces = tool("mesh").extract_mesh(G, planes, cam, 60.0, 96)

    # The surface is where the density is 60; each edge has two faces; these look outwards.
    radius = math.sqrt(0.15**2 - 2 * 60 / 20000)
    assert np.linalg.norm(vertices, axis=1) == pytest.approx(radius, abs=0.003)
    _, counts = np.unique(edges_of(faces), axis=0, return_counts=True)
    assert (counts == 2).all()
    assert volume(vertices, faces) == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)

    # Vertices that face the camera, in its frame, fall on pixels whose rendered depth is their distance.
    pose = m.cam2world(cam)[0].numpy()
    position = pose[:3, 3]
    facing = np.einsum("ij,ij->i", vertices, position - vertices) > 0.3 * radius
    x, y, z = ((vertices[facing] - position) @ pose[:3, :3]).T
    focal = 1 / math.tan(math.radians(12.5))
    column = ((x / -z * focal + 1) * 32).round().astype(int)
    row = ((-y / -z * focal + 1) * 32).round().astype(int)
    _, depth = G.render(planes, cam, 65)
    distance = np.linalg.norm([x, y, z], axis=0)
    assert np.median(abs(depth[0, 0].numpy()[row, column] - distance)) < 0.01


@with_tools
def test_mesh_level_must_be_a_density_that_there_is():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    with pytest.raises(ValueError, match="--mesh-level"):
        tool("mesh").extract_mesh(*ball(), camera(), 1e6, 32)


@with_tools
def test_what_no_ray_saw_is_not_in_the_mesh():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    cam = camera()
    vertices, _, _ = tool("mesh").extract_mesh(*ball(radius=0.4), cam, 60.0, 48)
    distance = np.linalg.norm(vertices - m.cam2world(cam)[0, :3, 3].numpy(), axis=1)
    assert 0.73 < distance.min() < 0.78
    assert distance.max() < 1.27


def read_glb(path):
    """-> vertices (V, 3), linear colours (V, 3), faces (M, 3), all of the chunk of JSON"""
    content = Path(path).read_bytes()
    magic, version, length = struct.unpack_from("<4sII", content)
    assert (magic, version, length) == (b"glTF", 2, len(content))

    # Two chunks, which start and end at multiples of 4.
    size, kind = struct.unpack_from("<I4s", content, 12)
    assert kind == b"JSON"
    assert size % 4 == 0
    scene = json.loads(content[20 : 20 + size])
    buffer_size, kind = struct.unpack_from("<I4s", content, 20 + size)
    assert kind == b"BIN\0"
    assert buffer_size % 4 == 0
    buffer = content[28 + size :]
    assert len(buffer) == buffer_size == scene["buffers"][0]["byteLength"]

    arrays = []
    kinds = {(5126, "VEC3"): ("<f4", 3), (5125, "SCALAR"): ("<u4", 1)}
    for accessor in scene["accessors"]:
        dtype, width = kinds[accessor["componentType"], accessor["type"]]
        view = scene["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        assert view["byteLength"] == 4 * width * accessor["count"]
        data = np.frombuffer(buffer, dtype, width * accessor["count"], view["byteOffset"])
        arrays.append(data.reshape(-1, 3))
    (primitive,) = scene["meshes"][0]["primitives"]
    attributes = primitive["attributes"]
    found = [arrays[i] for i in (attributes["POSITION"], attributes["COLOR_0"], primitive["indices"])]
    return *found, scene


@pytest.fixture(scope="module")
def ball_files(tmp_path_factory):
    """The mesh of a ball as ball.ply and ball.glb. -> their folder"""
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    folder = tmp_path_factory.mktemp("ball")
    surface = tool("mesh").extract_mesh(*ball(), camera(yaw=0.3, pitch=1.3, fov=25), 60.0, 48)
    tool("mesh").write_ply(folder / "ball.ply", *surface)
    tool("mesh").write_glb(folder / "ball.glb", *surface)
    return folder


@with_tools
def test_glb_has_the_mesh_of_the_ply(ball_files):
    points, colors, faces = read_ply(ball_files / "ball.ply")
    vertices, linear, indices, scene = read_glb(ball_files / "ball.glb")
    assert np.array_equal(vertices, points)
    assert np.array_equal(indices, faces)
    assert indices.max() == len(vertices) - 1
    assert volume(vertices, indices) > 0.008  # outwards

    # Readers fit the view by the bounds, which must be those of the numbers in the file.
    bounds = scene["accessors"][scene["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    assert bounds["min"] == points.min(0).tolist()
    assert bounds["max"] == points.max(0).tolist()

    # Colours are linear. As a screen shows them, they are those of the PLY; here ramps, not all alike.
    shown = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert abs(shown * 255 - colors).max() < 0.51
    assert colors.std(0)[:2].min() > 10

    # Nothing of the format is used that is not declared.
    assert scene["asset"]["version"] == "2.0"
    assert set(scene["materials"][0]["extensions"]) == set(scene["extensionsUsed"])


@with_tools
def test_another_reader_sees_the_same_mesh(ball_files):
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    points, _, faces = read_ply(ball_files / "ball.ply")
    options = dict(force="mesh", process=False, skip_materials=True)  # else it passes over the colours
    loaded = trimesh.load(ball_files / "ball.glb", **options)
    assert np.array_equal(loaded.vertices.astype(np.float32), points)
    assert np.array_equal(loaded.faces, faces)
    assert loaded.is_watertight
    assert loaded.volume > 0.008  # outwards
    _, linear, *_ = read_glb(ball_files / "ball.glb")
    assert abs(loaded.visual.vertex_colors[:, :3] / 255 - linear).max() < 0.01


@with_tools
def test_mesh_without_scikit_image_asks_for_it(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    status, err = run_tool(capsys, "sample", "--resume", run, "--out", tmp_path, "--mesh")
    assert status == 2
    assert err.splitlines()[-1].endswith("--mesh: needs scikit-image; pip install scikit-image")


def reprojection_psnr(G, planes, a, b, resolution):
    """Colours of the view from b, found in the view from a by b's depth, against themselves.
    -> PSNR in dB, share of pixels that a sees"""
    rgb_a, depth_a = G.render(planes, a, resolution)
    rgb_b, depth_b = G.render(planes, b, resolution)
    origins, directions = m.camera_rays(b, resolution)
    points = origins + directions * depth_b.flatten(2).transpose(1, 2)  # (1, R², 3)

    # the points in the frame of a, then on its picture
    pose = m.cam2world(a)
    p = (points - pose[:, None, :3, 3]) @ pose[:, :3, :3]
    xy = p[..., :2] / -p[..., 2:] / (a.fov.view(-1, 1, 1) * math.pi / 360).tan()
    grid = (xy * torch.tensor([1.0, -1.0])).view(1, resolution, resolution, 2)
    found = F.grid_sample(torch.cat([rgb_a, depth_a], 1), grid, align_corners=True)

    inside = (grid.abs() < 1).all(-1)
    distance = p.norm(dim=2).view(1, resolution, resolution)
    seen = inside & ((found[:, 3] - distance).abs() < 0.02)  # not hidden in a
    squares = (found[:, :3].clamp(-1, 1) - rgb_b.clamp(-1, 1)).square().mean(1)
    error = squares[seen].mean() / 4
    return -10 * math.log10(float(error)), float(seen.float().mean())


@with_tools
@pytest.mark.parametrize("kind", ["orbit", "wiggle", "line", "zoom"])
def test_animations_start_and_end_at_the_mean_camera_and_are_consistent(kind):
    G, planes = ball()
    start = camera(pitch=1.4, fov=25)
    path = tool("sample").camera_path(kind, start, 48, 0.4)

    parameters = m.camera_parameters(path)
    assert torch.allclose(parameters[0], m.camera_parameters(start)[0], atol=1e-5)
    # No further than the angle to each side, and in small steps, the last one back to the start included.
    turned = (parameters[:, :2] - parameters[0, :2]).abs()
    assert turned.max() <= 0.4 + 1e-5
    steps = (parameters.roll(-1, 0) - parameters).abs()
    assert steps[:, :2].max() < 0.1
    assert steps.max() < 1

    # A frame shows what the one before it shows, moved.
    for i in (0, 12, 30):
        psnr, seen = reprojection_psnr(G, planes, m.rows(path, [i]), m.rows(path, [i + 1]), 64)
        assert psnr > 30
        assert seen > 0.15


# Tools: the page on which scenes turn

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium")


def sheets_of(page, kind):
    """The sheets of views in a page, in the order of its cards. -> [uint8 (H, W, 3), ...]"""
    sheets = []
    for data in re.findall(rf'data-{kind}="data:image/jpeg;base64,([^"]*)"', page):
        with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as image:
            sheets.append(np.asarray(image.convert("RGB")))
    return sheets


@with_tools
def test_turntable_is_one_page_that_needs_nothing_else(run, tmp_path):
    options = flags(resume=run, out=tmp_path, classes="0,5", seeds="1-2", views="5x3")
    assert tool("sample").main([*options, "--turntable"]) == 0
    page = (tmp_path / "turntable.html").read_text()
    for elsewhere in ("://", "src=", "href=", "url(", "import"):
        assert elsewhere not in page
    assert "run&lt;1&gt;, 0.048 kimg" in page
    assert "run<1>" not in page

    titles = ["class 0, seed 1", "class 0, seed 2", "class 5, seed 1", "class 5, seed 2"]
    assert re.findall("<figcaption><span>(.*?)</span>", page) == titles
    assert re.findall('aria-label="(class .*?), arrow keys', page) == titles
    for kind in ("color", "depth"):
        shapes = [sheet.shape for sheet in sheets_of(page, kind)]
        assert shapes == 4 * [(3 * 16, 5 * 16, 3)]


@with_tools
def test_a_turntable_of_2_samples_at_64_is_below_half_a_megabyte(run, tmp_path):
    options = flags(resume=run, out=tmp_path, classes="0-1", seeds="1", resolution=64)
    assert tool("sample").main([*options, "--turntable"]) == 0
    page = tmp_path / "turntable.html"
    shapes = [sheet.shape for sheet in sheets_of(page.read_text(), "color")]
    assert shapes == 2 * [(5 * 64, 15 * 64, 3)]
    assert page.stat().st_size < 0.5e6


@with_tools
def test_sheets_have_the_views_of_the_cameras_around_the_samples_own():
    """The cameras look past the ball, which is then elsewhere in each view."""
    G, planes = ball()
    look = dict(fov=25, look_at=(1.0, 1.2, 0.1))
    own = camera(yaw=0.3, pitch=1.4, **look)
    scene = types.SimpleNamespace(title="a ball", planes=planes, camera=own)
    options = tool("sample").SampleOptions(resolution=64, angle=0.4)
    cards = []
    tool("turntable").add_card(cards, G, scene, (3, 2), options)
    (card,) = cards
    assert 'data-yaws="-23 +0 +23" data-pitches="+11 -11"' in card

    # Lossy compression moves a level by little; views differ by much.
    (color,) = sheets_of(card, "color")
    (depth,) = sheets_of(card, "depth")
    near, far = G.render(planes, own, 64)[1].quantile(torch.tensor([0.02, 0.98])).tolist()
    for row, pitch in enumerate((1.6, 1.2)):
        for column, yaw in enumerate((-0.1, 0.3, 0.7)):
            rgb, distance = G.render(planes, camera(yaw=yaw, pitch=pitch, **look), 64)
            expected = m.to_picture(rgb[0], distance[0], near, far, dim=2).astype(float)
            for sheet, picture in ((color, expected[:, :64]), (depth, expected[:, 64:])):
                cells = sheet.reshape(2, 64, 3, 64, 3).swapaxes(1, 2)  # (rows, columns, H, W, 3)
                errors = abs(cells - picture).mean((2, 3, 4))
                assert errors[row, column] < 2.5
                assert errors.argmin() == 3 * row + column


@with_tools
def test_the_scene_follows_the_finger():
    """A point before the middle moves right with the columns of the sheet, and down with its rows."""
    own = camera(yaw=0.2, pitch=1.4)
    around = tool("turntable").cameras_around(own, 5, 3, 0.4)
    assert torch.equal(m.camera_parameters(around)[7], m.camera_parameters(own)[0])
    pose = m.cam2world(around)
    near = 0.3 * m.cam2world(own)[0, :3, 3]
    x, y, _ = ((near - pose[:, :3, 3])[:, None] @ pose[:, :3, :3])[:, 0].unbind(1)
    assert (x.view(3, 5).diff(dim=1) > 0).all()
    assert (y.view(3, 5).diff(dim=0) < 0).all()

    # A single yaw or pitch is the own one. No camera looks along the axis.
    assert torch.equal(tool("turntable").cameras_around(own, 1, 1, 0.4).yaw, own.yaw)
    assert tool("turntable").cameras_around(own, 1, 5, 9.0).pitch.min() > 0


@with_tools
@pytest.mark.parametrize("views", ["0x5", "15", "15x", "x5", "15x-5", "15x5x5", "1100x5"])
def test_views_that_cannot_be_are_one_line_and_status_2(run, tmp_path, capsys, views):
    out = tmp_path / "out"
    status, err = run_tool(capsys, "sample", "--resume", run, "--out", out, "--turntable", f"--views={views}")
    assert status == 2
    assert err.startswith(f"sample.py: error: --views {views}: ")
    assert err.count("\n") == 1
    assert not out.exists()


@with_tools
def test_what_a_generator_of_pictures_cannot_make_is_refused(tmp_path, capsys):
    flat = dict(dims=2, depth="none", camera="frontal", triplane_features=1, kimg=0.016)
    folder = train_micro(tmp_path / "run", **flat)
    capsys.readouterr()
    for option in (["--mesh"], ["--points"], ["--depth"], ["--turntable"], ["--video", "orbit"]):
        status, err = run_tool(capsys, "sample", "--resume", folder, "--out", tmp_path / "out", *option)
        assert status == 2
        assert "--dims 2" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert run_tool(capsys, "sample", "--resume", folder, "--interpolate", "--frames", 1)[0] == 0


@with_tools
def test_an_animation_too_large_for_webp_is_refused_before_it_is_rendered(run, tmp_path, capsys):
    """Of pictures of 16 pixels, each six times as large and beside its depth, 85 have 16,320 in a row."""
    sample = tool("sample")
    sample.check_film(sample.SampleOptions(resolution=16, video="orbit"), [0], range(85))
    sample.check_film(sample.SampleOptions(resolution=16, video="orbit", each=True), [0], range(86))

    options = ("--seeds", "0-85", "--video", "orbit", "--out", tmp_path / "out")
    status, err = run_tool(capsys, "sample", "--resume", run, *options)
    assert status == 2
    assert "16,512 pixels in a row" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@with_tools
def test_views_forbid_nothing_without_a_turntable():
    options = tool("sample").SampleOptions(resolution=4096)
    assert tool("turntable").parse_views(options) == (15, 5)


@with_tools
def test_a_card_that_fails_is_named_and_the_others_are_on_the_page(run, tmp_path, capsys, monkeypatch):
    sample = tool("sample")
    add_card = sample.turntable.add_card

    def fail_once(cards, G, s, *rest):
        if s.name.endswith("1"):
            raise ValueError("encoding error")
        add_card(cards, G, s, *rest)

    monkeypatch.setattr(sample.turntable, "add_card", fail_once)
    options = flags(resume=run, out=tmp_path, classes="0", seeds="0-2", views="2x1")
    with pytest.raises(SystemExit) as end:
        sample.main([*options, "--turntable"])
    assert end.value.code == 1
    assert "sample.py: class0000-seed0001-turntable: encoding error" in capsys.readouterr().err
    assert (tmp_path / "turntable.html").read_text().count("<canvas") == 2


class Browser:
    """Chromium without a window, driven by the protocol of its developer tools: JSON between zero bytes,
    here over a socket that is its files 3 and 4."""

    def __init__(self, profile):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command = [CHROMIUM, *options, f"--user-data-dir={profile}"]
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        self.received = b""
        self.calls = 0
        self.session = {}
        self.errors = []

        files = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3), (os.POSIX_SPAWN_DUP2, theirs.fileno(), 4)]
        files += [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        self.pid = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=files)
        theirs.close()

    def call(self, method, **params):
        """-> what the browser answers"""
        self.calls += 1
        message = dict(id=self.calls, method=method, params=params, **self.session)
        self.socket.sendall(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"])
            if answer.get("id") == self.calls:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def receive(self):
        while b"\0" not in self.received:
            part = self.socket.recv(2**20)
            assert part, "the browser has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, height):
        """Shows a file in a window of this size, on a device with a touch screen."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = dict(sessionId=session)
        self.call("Runtime.enable")
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        self.call("Page.navigate", url=path.as_uri())

    def ask(self, expression):
        """-> the value of a line of JavaScript"""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def drawn(self):
        """Which cards have a picture. -> [bool, ...]"""
        alpha = "c.getContext('2d').getImageData(0, 0, 1, 1).data[3] == 255"
        return self.ask(f"[...document.querySelectorAll('canvas')].map(c => {alpha})")

    def turned(self):
        """What the cards say of how far they are turned. -> [str, ...]"""
        return self.ask("[...document.querySelectorAll('output')].map(o => o.value)")

    def box(self, selector, i):
        """Where the i-th of these lies in the window. -> left, top, right, bottom"""
        return self.ask(
            f"r = document.querySelectorAll('{selector}')[{i}].getBoundingClientRect(), "
            "[r.left, r.top, r.right, r.bottom]"
        )

    def screenshot(self):
        """-> int (height, width, 3)"""
        data = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        with PIL.Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    def drag(self, way, x, y, right, down, steps=8):
        """From (x, y) on, with the mouse or a finger."""
        places = []
        for k in range(steps + 1):
            places.append(dict(x=x + right * k / steps, y=y + down * k / steps))

        if way == "mouse":
            mouse = functools.partial(self.call, "Input.dispatchMouseEvent", button="left", clickCount=1)
            mouse(type="mousePressed", **places[0])
            for place in places:
                mouse(type="mouseMoved", **place)
            mouse(type="mouseReleased", **places[-1])
        else:
            touch = functools.partial(self.call, "Input.dispatchTouchEvent")
            touch(type="touchStart", touchPoints=places[:1])
            for place in places:
                touch(type="touchMove", touchPoints=[place])
            touch(type="touchEnd", touchPoints=[])

    def close(self):
        self.session = {}
        try:
            self.call("Browser.close")
        finally:
            self.socket.close()  # it ends without, too
            os.waitpid(self.pid, 0)


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def changes(before, after):
    """The box around all pixels that differ. -> left, top, right, bottom"""
    rows, columns = np.nonzero((before != after).any(2))
    assert len(rows), "nothing has changed"
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def inside(inner, outer):
    return (
        inner[0] >= math.floor(outer[0])
        and inner[1] >= math.floor(outer[1])
        and inner[2] <= math.ceil(outer[2])
        and inner[3] <= math.ceil(outer[3])
    )


@with_tools
@in_browser
@pytest.mark.parametrize("width, way", [(400, "touch"), (1280, "mouse")])
def test_a_drag_turns_one_card_and_no_other(run, tmp_path, browser, width, way):
    options = flags(resume=run, out=tmp_path, classes="0-3", seeds="1", views="5x3")
    assert tool("sample").main([*options, "--turntable"]) == 0
    browser.open(tmp_path / "turntable.html", width, 900)
    wait_for(lambda: browser.drawn() == 4 * [True], 20)
    assert browser.ask("document.documentElement.scrollWidth") <= width

    # Two fifths of its width are two views of five: from the middle to the last. Up, one of three.
    before = browser.screenshot()
    left, top, right, bottom = browser.box("canvas", 1)
    side = right - left
    browser.drag(way, left + side / 4, bottom - side / 4, 0.4 * side, -side / 3)
    wait_for(lambda: browser.turned()[1] == "yaw +23°, pitch +11°", 20)
    after = browser.screenshot()
    assert browser.ask("scrollX + scrollY") == 0
    assert inside(changes(before, after), browser.box("figure", 1))
    area = np.s_[round(top) + 2 : round(bottom) - 2, round(left) + 2 : round(right) - 2]
    assert (before[area] != after[area]).any()

    # Arrow keys turn the card that has the focus, by one view.
    browser.ask("document.querySelectorAll('canvas')[2].focus()")
    for key in ("ArrowLeft", "ArrowDown"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    rest = "yaw +0°, pitch +0°"
    assert browser.turned() == [rest, "yaw +23°, pitch +11°", "yaw -11°, pitch -11°", rest]

    # Depth is gray, and seen from where the cards were turned to.
    assert np.ptp(after, axis=2)[area].max() > 12
    browser.ask("document.querySelector('[value=depth]').click()")
    wait_for(lambda: np.ptp(browser.screenshot(), axis=2)[area].max() < 12, 20)
    assert browser.turned()[1] == "yaw +23°, pitch +11°"
    assert browser.errors == []


@with_tools
@in_browser
def test_cards_out_of_sight_are_drawn_when_they_come_into_it(run, tmp_path, browser):
    options = flags(resume=run, out=tmp_path, classes="0-7", seeds="1", views="3x1")
    assert tool("sample").main([*options, "--turntable"]) == 0
    browser.open(tmp_path / "turntable.html", 400, 300)
    wait_for(lambda: browser.drawn() == 2 * [True] + 6 * [False], 20)
    browser.ask("scrollTo(0, 1e6)")
    wait_for(lambda: browser.drawn()[6:] == [True, True], 20)
    assert browser.drawn()[2:4] == [False, False]


# Tools: report


@with_tools
def test_report_is_one_page_that_escapes_what_it_shows(run, tmp_path):
    with open(run / "log.jsonl", "a") as f:
        f.write('{"kimg": 0.05, "<script>alert(1)</script>": 3, "loss_g": NaN}\n')
        f.write('{"kimg": 0.06, "loss')
    assert tool("report").main([str(run), "--out", str(tmp_path / "r.html")]) == 0

    # Names are escaped, and nothing comes from elsewhere.
    page = (tmp_path / "r.html").read_text()
    assert "run&lt;1&gt;" in page
    assert "run<1>" not in page
    assert "<script>alert" not in page
    assert "http" not in page
    for title in ("loss_g", "fid16[area8]", "images_per_second", "look_at_radius", "z_dim"):
        assert title in page
    assert page.count("data:image/png;base64,") == len(list(run.glob("samples-*.png")))
    # What is no number leaves a gap.
    for points in re.findall(r"points='([^']*)'", page):
        assert "nan" not in points


@with_tools
def test_report_of_a_folder_whose_name_no_terminal_shows(run, tmp_path):
    folder = tmp_path / "größe 猫"
    shutil.copytree(run, folder)
    page = tmp_path / "é.html"
    command = [sys.executable, HERE / "tools" / "report.py", folder, "--out", page]
    # As where the locale is set, and where it is not; without one Python knows the name by its bytes alone.
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for env in (bare, {}):
        env = {**os.environ, "PYTHONIOENCODING": "ascii", **env}
        done = subprocess.run(command, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert "größe 猫" in page.read_text(encoding="utf-8")


@with_tools
def test_report_leaves_out_what_a_run_has_left_behind(tmp_path):
    """By going back to a checkpoint after a divergence."""
    (tmp_path / "config.json").write_text("{}")
    for kimg, value in ((1, 4.0), (2, 3.0), (3, 9.0)):
        m.append_line(tmp_path / "log.jsonl", dict(kimg=kimg, loss_g=value))
        m.append_line(tmp_path / "metrics.jsonl", dict(kimg=kimg, nfs8=value))
    m.append_line(tmp_path / "log.jsonl", dict(kimg=1, diverged=4, reason="R1 jumped to 50"))
    for kimg, value in ((2, 3.5), (3, 2.5)):
        m.append_line(tmp_path / "log.jsonl", dict(kimg=kimg, loss_g=value))
        m.append_line(tmp_path / "metrics.jsonl", dict(kimg=kimg, nfs8=value))

    curves = tool("report").read_curves(tmp_path)
    assert curves["Training", "loss_g"] == [(1, 4.0, 0), (2, 3.5, 0), (3, 2.5, 0)]
    assert (3, 9.0, 0) not in curves["Metrics", "nfs8"]
    assert curves["Metrics", "nfs8"][-2:] == [(2, 3.5, 0), (3, 2.5, 0)]


@with_tools
def test_numbers_against_other_data_or_counts_do_not_bend_a_curve(tmp_path):
    for kimg, data, reals, value in ((1, "x", 9, 4.0), (2, "x", 9, 3.0), (2, "y", 9, 7.0), (2, "x", 0, 8.0)):
        m.append_line(tmp_path / "metrics.jsonl", dict(kimg=kimg, data=data, reals=reals, fid8=value))
    m.append_line(tmp_path / "metrics.jsonl", dict(kimg=2, data="x", reals=0, nfs64=9.0))

    curves = tool("report").read_curves(tmp_path)
    assert curves["Metrics", "fid8"] == [(1, 4.0, 0), (2, 3.0, 0)]
    assert curves["Metrics", "nfs64"] == [(2, 9.0, 0)]


@with_tools
def test_the_newest_of_many_samples_is_on_the_page_and_damaged_files_are_nothing(tmp_path):
    for name in ("config.json", "metrics.jsonl", "log.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00{")
    names = [f"samples-{k:06d}.000.png" for k in range(45)]
    for name in names:
        (tmp_path / name).touch()
    shown = tool("report").read_run(tmp_path, "red")
    assert shown.pictures == sorted(shown.pictures)
    assert shown.pictures[-1].name == names[-1]
    assert 10 <= len(shown.pictures) <= tool("report").MOST_PICTURES
    assert (shown.config, shown.curves) == ({}, {})


# Tools: publishing, and opening what was published


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """The folder that publish.py makes of the run."""
    folder = tmp_path_factory.mktemp("published") / "my model"
    assert tool("publish").main([str(run), str(folder)]) == 0
    return folder


SAMPLES = "samples-000000.048.png"  # of the run


def sampled(resume, out, *argv):
    """The bytes of sample.py's grid of two classes and two seeds."""
    argv = flags(resume=resume, out=out, classes="1-2", seeds="0-1") + list(argv)
    assert tool("sample").main(argv) == 0
    return (out / "grid.png").read_bytes()


@with_tools
def test_a_published_model_gives_the_pictures_of_its_run(run, published, tmp_path):
    names = {path.name for path in published.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "samples.png"}
    with (
        PIL.Image.open(published / "samples.png") as copy,
        PIL.Image.open(run / "samples-000000.048.png") as own,
    ):
        assert np.array_equal(copy, own)

    expected = sampled(run, tmp_path / "run")
    assert sampled(published, tmp_path / "folder") == expected
    assert sampled(published / "model.safetensors", tmp_path / "file") == expected
    # It is the average that was published, and no more.
    average = checkpoint(run)["G_ema"]
    state = safetensors.torch.load_file(published / "model.safetensors")
    assert state.keys() == average.keys()
    for name, x in state.items():
        assert torch.equal(x, average[name]), name


@with_tools
def test_a_published_model_is_measured_as_its_run(run, published, tmp_path, monkeypatch):
    evaluate = tool("evaluate")
    monkeypatch.setattr(evaluate, "evaluate_truth", lambda *_: {})
    for source in (run, published):
        shutil.copytree(source, tmp_path / source.name)
        assert (
            evaluate.main(
                flags(resume=tmp_path / source.name, metrics="fid16,nfs8", detector="area8", reals=16)
            )
            == 0
        )
    assert log(tmp_path / published.name, "metrics")[-1] == log(tmp_path / run.name, "metrics")[-1]


@with_tools
def test_a_published_model_does_not_steer_the_machine(published, tmp_path, capsys):
    """Nor is a folder of this machine read because its config.json names one."""
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    change_config(folder, workers=60, timeout=1e9, out="/etc", init="x", data=str(tmp_path), device="cuda")
    G, *_ = tool("load").open_generator(folder, "cpu")
    own = m.Config()
    for name in ("workers", "timeout", "out", "init", "device"):
        assert getattr(G.cfg, name) == getattr(own, name)
    status, err = run_tool(
        capsys, "evaluate", "--resume", folder, "--metrics", "fid16", "--detector", "area8"
    )
    assert status == 2
    assert "--data: name the images to compare with" in err


@with_tools
def test_pictures_are_not_published_as_scenes(run, tmp_path, capsys):
    state = checkpoint(run)
    config = {**state["config"], "dims": 2, "depth": "none"}
    G = m.Generator(m.Config(**config))
    torch.save({**state, "config": config, "G_ema": G.state_dict()}, tmp_path / "checkpoint-000000.048.pt")
    status, err = run_tool(capsys, "publish", tmp_path, tmp_path / "out")
    assert status == 2
    assert "--dims 2" in err
    assert not (tmp_path / "out").exists()


@with_tools
def test_in_bf16_a_model_has_half_the_size_and_nearly_the_same_pictures(run, published, tmp_path):
    assert tool("publish").main([str(run), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", published)]
    assert sizes[0] < 0.7 * sizes[1]  # of so small a model the names of the weights are a part

    own, *_ = tool("load").open_generator(run)
    G, *_ = tool("load").open_generator(tmp_path / "half")
    for (name, x), y in zip(G.named_parameters(), own.parameters(), strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.bfloat16().float()), name
    for x, y in zip(G.buffers(), own.buffers(), strict=True):
        assert torch.equal(x, y)
    assert "before they were rounded" in (tmp_path / "half" / "README.md").read_text()
    assert "rounded" not in (published / "README.md").read_text()


def republish(run, folder, metrics=(), **config):
    """A run like this one, with other options and metrics, and published. -> the published folder"""
    shutil.copytree(run, folder / "run")
    state = checkpoint(run)
    torch.save({**state, "config": {**state["config"], **config}}, newest(folder / "run"))
    with open(folder / "run" / "metrics.jsonl", "w") as f:
        for row in metrics:
            f.write(json.dumps(row) + "\n")
    assert tool("publish").main([str(folder / "run"), str(folder / "out")]) == 0
    return folder / "out"


@with_tools
def test_nothing_of_the_authors_machine_is_published(run, tmp_path):
    row = {"kimg": 0.048, "data": "/home/me/photos", "reals": 0, "fid16[net]": 3.5}
    paths = ("resume", "init", "teacher_weights", "depth_weights", "detector", "data", "out")
    config = {name: f"/home/me/{name}.pth" for name in paths}
    folder = republish(run, tmp_path, [row], **config, teacher="local-dir:/home/me/teacher")
    for path in folder.iterdir():
        assert b"/home" not in path.read_bytes(), path.name
        assert str(tmp_path).encode() not in path.read_bytes(), path.name

    saved = json.loads((folder / "config.json").read_text())["config"]
    assert [saved[name] for name in paths] == ["", "", "", "", "detector.pth", "data.pth", ""]
    assert saved["teacher"] == "teacher"
    # Somebody's own folder of that name is not what the program calls so.
    shapes = republish(run, tmp_path / "2", data="/home/me/shapes")
    assert json.loads((shapes / "config.json").read_text())["config"]["data"] == "./shapes"


@with_tools
def test_a_card_says_what_was_measured_and_nothing_in_it_is_markup(run, tmp_path):
    evil = "a|b`<script>*\n---\nlicense: mit\n# head"
    rows = [
        {"kimg": 0.032, "data": "x", "fid8": 1.0},
        {"kimg": 0.048, "data": evil, "reals": 0, "fid2k[area8]": 7.0, "kid64": float("nan")},
        {
            "kimg": 0.048,
            "data": evil,
            "reals": 512,
            "fid2k[area8]": 3.25,
            f"recall9[{evil}]": 0.5,
            "nfs64": 8.0,
            "is2k": 2.0,
        },
        {"kimg": 0.064, "data": "x", "fid16": 1.0, "named_depth": 0.9},
    ]
    folder = republish(run, tmp_path, rows, data=f"/x/{evil}", teacher=evil)
    card = huggingface_hub.ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    assert card.data.to_dict() == dict(
        license="unknown",
        library_name="3dgp",
        pipeline_tag="unconditional-image-generation",
        tags=["3dgp", "gan", "3d"],
    )

    # What came last of this checkpoint stands, with the network, the number of samples, the data.
    table = [line for line in card.text.splitlines() if re.match(r"\| (fid|kid|recall|nfs|is|share)", line)]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    assert [row[1] for row in cells] == ["3.25", "nan", "0.5", "8", "2"]
    assert [row[3] for row in cells] == ["2,048", "64", "9", "64", "2,048"]
    assert cells[0][0].startswith(r"fid2k\[area8\]")
    assert cells[0][2].startswith("area8")
    assert cells[0][4].startswith("512 images of a")
    assert cells[1][2] == "Inception"
    assert cells[1][4].startswith("64 images of a")  # which is all that kid64 takes
    assert cells[3][2:5:2] == ["", ""]
    assert cells[4][2:5:2] == ["Inception", ""]  # it looks at samples alone
    assert {len(row) for row in cells} == {5}
    assert "At 0.048 kimg" in card.text
    assert not re.search(r"(?<!\\)<|^# head|^license: mit", card.text, re.MULTILINE)
    assert card.text.count("FILL IN") == 2

    G, *_ = tool("load").open_generator(folder)
    assert G.cfg.teacher.startswith("a|b`<script>* --- license: mit")


@with_tools
def test_a_card_that_is_followed_leads_to_pictures(published, tmp_path, monkeypatch):
    """In a folder with the program and the published folder, and nothing else."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(published, published.name)
    (tmp_path / "tools").symlink_to(HERE / "tools")
    [block] = re.findall(r"```bash\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    install, *rest = block.splitlines()
    assert install == "pip install -r requirements.txt"
    assert len(rest) == 3
    for line in rest:
        python, program, *argv = shlex.split(line)
        assert (python, program) == ("python", "tools/sample.py")
        assert tool("sample").main([*argv, "--frames", "3"]) == 0

    made = {str(path) for path in Path("pictures").rglob("*")}
    points = "pictures/points/class0000-seed0000"
    assert made >= {
        "pictures/grid.png",
        "pictures/orbit/orbit.webp",
        f"{points}-points.ply",
        f"{points}-depth.png",
    }
    with PIL.Image.open("pictures/grid.png") as image:
        assert image.size == (4 * 96, 8 * 96)  # seeds across, classes down
        assert np.std(np.asarray(image, float)) > 0


@with_tools
def test_cards_of_models_on_the_hub_name_them(run, tmp_path):
    options = flags(repo="me/my-model", code="https://example.org/me/3dgp.git")
    assert tool("publish").main([str(run), str(tmp_path / "a"), *options]) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.count("--resume hf:me/my-model ") == 3
    assert "git clone https://example.org/me/3dgp.git 3dgp\ncd 3dgp\npip" in card

    assert tool("publish").main([str(run), str(tmp_path / "b"), *options[2:]]) == 0
    assert "3dgp\ncp -r b 3dgp\ncd 3dgp\npip" in (tmp_path / "b" / "README.md").read_text()


@with_tools
def test_pictures_that_are_gone_are_drawn_and_large_ones_become_webp(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").glob("samples-*.png"):
        path.write_bytes(path.read_bytes()[:1000])
    publish = tool("publish")
    assert publish.main([str(tmp_path / "run"), str(tmp_path / "a")]) == 0
    with PIL.Image.open(tmp_path / "a" / "samples.png") as image:
        assert image.size == (16 * 96, 4 * 2 * 96)

    # Damaged so that Pillow has an error of its own.
    path = tmp_path / "run" / SAMPLES
    path.write_bytes((run / SAMPLES).read_bytes().replace(b"IDAT", b"!DAT"))
    assert publish.main([str(tmp_path / "run"), str(tmp_path / "c")]) == 0

    monkeypatch.setattr(publish, "MOST_BYTES", 1000)
    assert publish.main([str(run), str(tmp_path / "b")]) == 0
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "samples.webp"}
    assert "(samples.webp)" in (tmp_path / "b" / "README.md").read_text()


@with_tools
def test_a_publication_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool("publish"), "write_picture", full)
    status, err = run_tool(capsys, "publish", run, tmp_path / "out")
    assert status == 2
    assert err.count("\n") == 1
    assert "out: No space left on device; nothing was written" in err
    assert not list(tmp_path.iterdir())


def change_config(folder, **changes):
    """Other values for options of a published folder's config.json."""
    content = json.loads((folder / "config.json").read_text())
    content["config"].update(changes)
    (folder / "config.json").write_text(json.dumps(content))


def change_weights(folder, change):
    """What change(state) makes of a published folder's weights, in place of them."""
    state = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    change(state)
    safetensors.torch.save_file(state, folder / "model.safetensors")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_of_torch(folder):
    torch.save({"mapping_network.w_avg": Evil(folder / "ran")}, folder / "model.safetensors")


def bare_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(folder / "ran")))


def another_program(folder):
    (folder / "config.json").write_text('{"config": {}, "images": 3, "auto_map": "modeling.py"}')


W_AVG = "mapping_network.w_avg"
TAMPERED = [
    (cut, "model.safetensors: not a whole safetensors file"),
    (pickle_of_torch, "model.safetensors: not a whole safetensors file"),
    (bare_pickle, "model.safetensors: not a whole safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    (lambda f: change_weights(f, lambda s: s.update({W_AVG: torch.ones(9)})), "w_avg has the shape (9,)"),
    (lambda f: change_weights(f, lambda s: s.update(x=torch.ones(9))), "unknown weights 'x'"),
    (lambda f: change_weights(f, lambda s: s.pop(W_AVG)), "lacks the weights 'mapping_network.w_avg'"),
    (lambda f: change_weights(f, lambda s: s[W_AVG].fill_(math.inf)), "w_avg is not finite"),
    (lambda f: change_weights(f, lambda s: s.update({W_AVG: s[W_AVG].half()})), "w_avg is torch.float16"),
    (lambda f: (f / "config.json").unlink(), "config.json: not the config.json of a published model"),
    (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json: not the config.json of"),
    (lambda f: (f / "config.json").write_text('{"config": [], "images": 3}'), "not the config.json of"),
    (another_program, "config.json: has the unknown field 'auto_map'"),
    (lambda f: change_config(f, **{"x\n\x1b": 3}), r"config.json: has the unknown field 'x\n\x1b'"),
    (lambda f: change_config(f, seed="0"), "config.json: seed: cannot be '0'"),
    (lambda f: change_config(f, seed=True), "config.json: seed: cannot be 'True'"),
    (lambda f: change_config(f, mirror=1), "mirror: cannot be '1'"),
    (lambda f: change_config(f, z_dim=8.0), "z_dim: cannot be '8.0'"),
    (lambda f: change_config(f, near=True), "near: cannot be 'True'"),
    (lambda f: change_config(f, camera="drone"), "camera: cannot be 'drone'"),
    (lambda f: change_config(f, data="a\nb"), r"data: cannot be 'a\nb'"),
    (lambda f: change_config(f, prior_yaw=[0, 1, 2]), "prior_yaw: cannot be '[0, 1, 2]'"),
    (lambda f: change_config(f, resolution=48), "config.json: --resolution 48: must be a power of two"),
    (lambda f: change_config(f, far=math.nan), "config.json: --far: not a finite number"),
    (lambda f: change_config(f, z_dim=10**400), "config.json: "),
    (lambda f: change_config(f, coarse_samples=10**8), "config.json: describes pictures, or samples"),
    (lambda f: change_config(f, resolution=2**20, channel_base=2**20), "describes pictures, or samples"),
    (lambda f: change_config(f, z_dim=10**12), "by its config.json"),
    (lambda f: change_config(f, triplane_resolution=2**40, channel_base=2**40), "describes no network"),
]


@with_tools
@pytest.mark.parametrize("name", ["sample", "evaluate"])
@pytest.mark.parametrize("tamper, message", TAMPERED)
def test_a_tampered_folder_is_one_line_and_runs_nothing(published, tmp_path, capsys, name, tamper, message):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    tamper(folder)
    before = sorted(folder.iterdir())

    status, err = run_tool(capsys, name, "--resume", folder)
    assert status == 2
    assert err.startswith(f"{name}.py: error: --resume {folder}")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


class Hub(http.server.ThreadingHTTPServer):
    """In place of huggingface.co. It has the model me/solids, a folder for each revision."""

    def __init__(self, **revisions):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.revisions = revisions
        self.asked = set()  # which files
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        commits = {hashlib.sha1(name.encode()).hexdigest(): f for name, f in self.server.revisions.items()}
        kind, _, rest = path.removeprefix("/api/models").removeprefix("/me/solids/").partition("/")
        if path.startswith("/api/models/me/gated/"):
            self.answer(403, b"", "GatedRepo")
        elif "/me/solids/" not in path:
            self.answer(404, b"", "RepoNotFound")
        elif kind == "revision" and rest not in self.server.revisions:
            self.answer(404, b"", "RevisionNotFound")
        elif kind == "revision":
            commit = hashlib.sha1(rest.encode()).hexdigest()
            self.answer(200, json.dumps(dict(id="me/solids", sha=commit)).encode())
        elif kind == "tree":
            files = [
                dict(type="file", path=x.name, size=x.stat().st_size, oid="0")
                for x in commits[rest].iterdir()
            ]
            self.answer(200, json.dumps(files).encode())
        else:
            commit, name = rest.split("/")
            self.server.asked.add(name)
            self.answer(200, (commits[commit] / name).read_bytes(), commit=commit)

    do_HEAD = do_GET

    def answer(self, status, body, error="", commit=""):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def with_hub(url, folder, *command):
    """Runs a command in a folder, with the Hub at this URL. -> the finished process"""
    env = {name: x for name, x in os.environ.items() if not name.startswith("HF_")}
    env.update(HF_ENDPOINT=url, HF_HOME=str(folder / "hf"), NO_PROXY="*", OMP_NUM_THREADS="1")
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)


OPEN_EACH = f"""
import importlib, sys
sys.path.insert(0, {str(HERE / "tools")!r})
load = importlib.import_module("load")
for resume in sys.argv[1:]:
    try:
        print(*load.open_generator(resume)[1:])
    except load.tdgp.UserError as e:
        print(e)
"""


@with_tools
def test_models_are_fetched_from_the_hub(published, tmp_path):
    old, bad = tmp_path / "old", tmp_path / "bad"
    for folder in (old, bad):
        shutil.copytree(published, folder)
    (old / "config.json").write_text(
        (old / "config.json").read_text().replace('"images": 48', '"images": 16')
    )
    (old / "modeling.py").write_text("raise SystemExit(3)")
    cut(bad)
    hub = Hub(main=published, v1=old, bad=bad)

    # The same pixels as from the folder; they lie in the current folder, not in the cache.
    argv = flags(resume="hf:me/solids", classes="1-2", seeds="0-1")
    done = with_hub(hub.url, tmp_path, HERE / "tools" / "sample.py", *argv)
    assert done.returncode == 0, done.stderr
    grid = tmp_path / "me--solids" / "samples-000000.048" / "grid.png"
    assert grid.read_bytes() == sampled(published, tmp_path / "folder")

    names = [
        "hf:me/solids@v1",
        "hf:me/solids@v2",
        "hf:me/other",
        "hf:me/gated",
        "hf:me/solids@bad",
        "hf:a--b/c",
    ]
    done = with_hub(hub.url, tmp_path, "-c", OPEN_EACH, *names)
    assert done.returncode == 0, done.stderr
    opened, no_revision, no_model, gated, damaged, no_name = done.stdout.splitlines()
    assert opened == "me--solids/model.safetensors 0.016"
    assert no_revision.startswith("--resume hf:me/solids@v2: has no revision v2")
    assert no_model.startswith("--resume hf:me/other: no such model")
    assert gated.startswith("--resume hf:me/gated: its authors grant access")
    assert "not a whole safetensors file" in damaged
    assert no_name.startswith("--resume hf:a--b/c: cannot be fetched (Cannot have -- or ..")
    assert hub.asked == {"config.json", "model.safetensors"}

    # What was fetched once is there without a network.
    hub.shutdown()
    hub.server_close()
    done = with_hub(hub.url, tmp_path, "-c", OPEN_EACH, "hf:me/solids@v1")
    assert done.stdout == "me--solids/model.safetensors 0.016\n", done.stderr


@with_tools
@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_without_a_network_the_hub_is_one_line(tmp_path, name):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        started = time.monotonic()
        done = with_hub(url, tmp_path, HERE / "tools" / f"{name}.py", "--resume", "hf:me/solids")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hf:me/solids: cannot be fetched (" in done.stderr
    assert "refused" in done.stderr
    assert "network" in done.stderr
    assert time.monotonic() - started < 60
    assert not (tmp_path / "me--solids").exists()


# Tools: ablate


def make_trials(out, name, distances):
    """Finished runs of a variant: for each seed its distances at 1, 2, ... kimg."""
    trials = []
    for seed, curve in enumerate(distances):
        variant = tool("ablate").Variant(name, "", f"claim of {name}")
        trial = tool("ablate").Trial(variant, out / f"{name}-{seed}", [], [])
        trial.folder.mkdir()
        for kimg, distance in enumerate([90.0, *curve]):
            m.append_line(trial.folder / "metrics.jsonl", {"kimg": kimg, "fid8[area8]": distance})
        trial.write(**{"kimg": kimg, "fid8[area8]": distance, "lr": 1.0})
        trials.append(trial)
    return trials


@with_tools
def test_a_table_has_means_deviations_and_when_the_baseline_was_reached(tmp_path):
    first = make_trials(tmp_path, "first", [[8.0, 6.0, 4.0], [8.0, 7.0, 6.0]])
    second = make_trials(tmp_path, "second", [[6.0, 5.0, 3.0], [6.0, 4.0, 2.0]])
    third = make_trials(tmp_path, "third", [[9.0, 8.0, 7.0]])
    fourth = make_trials(tmp_path, "fourth", [[math.nan, 0.0, math.inf]])
    fourth[0].write(failed="diverged")
    by_variant = {"first": first, "second": second, "third": third, "fourth": fourth}
    heads, _, *rows = tool("ablate").table(by_variant).splitlines()
    assert heads.split(" | ")[:2] == ["| variant", "fid8[area8]"]
    assert rows == [
        "| first | 5 ± 1.4 | 3 | claim of first |",
        "| second | 2.5 ± 0.71 | 2 | claim of second |",
        "| third | 7 | not reached | claim of third |",
        "| fourth | - | not reached | claim of fourth (1 runs diverged) |",
    ]

    # A run that was killed in its first measurement lacks that of the untrained generator, no other.
    path = second[1].folder / "metrics.jsonl"
    path.write_text(path.read_text().partition("\n")[2])
    assert [kimg for kimg, _, _ in tool("ablate").mean_curve(second)] == [1, 2, 3]

    # The line of the second one lies below that of the first.
    pixels = np.asarray(tool("ablate").draw_curves(by_variant)).astype(int)
    blue, red = (np.abs(pixels - color).sum(2) < 30 for color in ([37, 99, 235], [220, 38, 38]))
    for x in (300, 500, 650):
        assert np.flatnonzero(blue[:, x]).mean() < np.flatnonzero(red[:, x]).mean()


@with_tools
def test_every_experiment_compares_runs_that_can_be_made(tmp_path):
    ablate = tool("ablate")
    for name, variants in ablate.EXPERIMENTS.items():
        options = ablate.AblateOptions(name, seeds=1, out=str(tmp_path), options="--preset tiny --kimg 2")
        if name == "distillation-2d":
            options.options = "--preset small --kimg 2"
        trials, images = ablate.plan(options)
        assert images == 2000
        assert len({tuple(trial.options) for trial in trials}) == len(variants) > 1


@with_tools
def test_a_killed_ablation_goes_on_where_it_was(tmp_path):
    data = make_folder(tmp_path / "data", each=4, depth=True)
    options = dict(MICRO, data=data, kimg=1.6, metrics="fid16", detector="area8", reals=16, metrics_kimg=0.8)
    out = tmp_path / "out"
    command = [sys.executable, HERE / "tools" / "ablate.py", "depth", "--seeds", "1", "--out", out]
    command += ["--metrics", "fid16,nfs8", "--options", " ".join(flags(**options))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    # Killed in the second of two runs, which then stops by itself.
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: (out / "without-0" / "log.jsonl").exists())
    second = subprocess.run(command, env=env, capture_output=True, text=True)
    assert second.returncode == 2
    assert "still at work" in second.stderr
    process.kill()
    process.wait()
    wait_for(lambda: "stopped" in (out / "without-0.log").read_text())
    first = (out / "with-0" / "ablation.json").stat().st_mtime_ns
    assert not (out / "table.md").exists()

    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    while "still at work" in done.stderr:  # it has said that it stops, and ends a little later
        time.sleep(0.5)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (out / "with-0" / "ablation.json").stat().st_mtime_ns == first
    steps = [line["kimg"] for line in lines_of_training(out / "without-0")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 1.6
    assert "going on with" in (out / "without-0.log").read_text()
    table = (out / "table.md").read_text()
    assert "fid16[area8]" in table
    assert "| with |" in table
    assert "| without |" in table
    for picture in ("curves.png", "samples.png"):
        assert PIL.Image.open(out / picture).width > 500

    # Neither finished nor broken runs are mixed with those of other options.
    (out / "with-0" / "ablation.json").unlink()
    again = subprocess.run([*command[:-1], "--kimg 0.016"], env=env, capture_output=True, text=True)
    assert again.returncode == 2
    assert "without-0: was run with other options" in again.stderr


# Tools: evaluate


def textbook_kernel_distance(a, b):
    """KID: sums of a cubic kernel over pairs, one by one"""
    n, dim = a.shape

    def kernel(u, v):
        return (u @ v / dim + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
    within_b = sum(kernel(b[i], b[j]) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(u, v) for u in a for v in b)
    return (within_a + within_b) / (n * (n - 1)) - 2 * between / n**2


def textbook_precision(real, fake, k=3):
    """The share of fakes that are as near to a real as its k-th neighbour"""
    radii = []
    for x in real:
        distances = np.sqrt(((real - x) ** 2).sum(1))
        radii.append(np.sort(distances)[k])

    inside = []
    for x in fake:
        distances = np.sqrt(((real - x) ** 2).sum(1))
        inside.append((distances <= radii).any())
    return np.mean(inside)


@with_tools
@pytest.mark.parametrize("n, dim", [(300, 8), (20, 32)])
def test_kernel_distance_precision_and_recall_are_the_textbooks(n, dim):
    rng = np.random.default_rng(n)
    a = rng.normal(size=(n, dim))
    b = rng.normal(size=(n, dim)) * 1.3 + 0.2
    x = torch.from_numpy(a).float()
    y = torch.from_numpy(b).float()

    evaluate = tool("evaluate")
    distance = textbook_kernel_distance(a, b)
    assert evaluate.kernel_distance(x, y, subsets=3) == pytest.approx(distance, rel=1e-3)
    expected = (textbook_precision(a, b), textbook_precision(b, a))
    assert evaluate.precision_recall(x, y) == pytest.approx(expected)


@with_tools
def test_evaluate_on_two_processes_gives_what_one_gives(run, capsys, tmp_path):
    """fid and its kin with a detector in the field's format; other networks' numbers carry their name."""
    metrics = "fid33,kid33,is33,pr33,nfs9"
    argv = flags(resume=run, metrics=metrics, reals=41, detector=run.parent / "stub.pt")
    assert tool("evaluate").main(argv) == 0
    one = log(run, "metrics")[-1]

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launcher, HERE / "tools" / "evaluate.py", *argv],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
    )
    two = log(run, "metrics")[-1]
    assert len(log(run, "metrics")) >= 2
    assert one.keys() == two.keys()
    for name, value in one.items():
        expected = value if name == "data" else pytest.approx(value, rel=1e-4, abs=1e-7)
        assert two[name] == expected, name

    assert one.keys() >= {"fid33[stub]", "kid33[stub]", "is33[stub]", "precision33[stub]", "nfs9"}
    cameras = {"camera_w1_posterior", "camera_w1_prior"}
    depths = {"depth_error_raw", "depth_error_render", "depth_error_adapted"}
    assert one.keys() >= cameras | depths
    printed = re.search(r"camera_w1_posterior(( [\d.e-]+){6})\n", capsys.readouterr().out)
    assert [float(x) for x in printed[1].split()] == pytest.approx(one["camera_w1_posterior"], rel=1e-3)

    # The field's own file, by whose name it is known: its numbers have no label.
    inception = tmp_path / "inception-2015-12-05.pt"
    shutil.copy(run.parent / "stub.pt", inception)
    capsys.readouterr()
    assert tool("evaluate").main([*argv, "--detector", str(inception)]) == 0
    assert log(run, "metrics")[-1]["fid33"] == pytest.approx(one["fid33[stub]"], rel=1e-6)
    assert " fid33 " in capsys.readouterr().out


@with_tools
def test_a_timm_model_can_be_the_detector(teacher_weights):
    """What it returns is what timm's model does."""
    open_detector = tool("evaluate").open_detector
    detector = open_detector(f"timm:test_resnet:{teacher_weights}", CPU, ["fid", "is"])
    assert detector.label == "[test_resnet]"
    image = 2 * torch.rand(2, 4, 64, 64) - 1
    found = detector(image)
    features = found[:, : detector.width]
    probabilities = found[:, detector.width :]
    assert features.std() > 0
    assert probabilities.shape == (2, 1000)
    assert probabilities.sum(1) == pytest.approx([1.0, 1.0], abs=1e-5)

    # Without is, the features alone: not every model has a layer that makes probabilities of them.
    assert torch.equal(open_detector(f"timm:test_resnet:{teacher_weights}", CPU, ["fid"])(image), features)

    # What needs none, and what cannot be.
    assert open_detector("inception", CPU, ["nfs"]) is None
    with pytest.raises(m.UserError, match="no class probabilities"):
        open_detector("area8", CPU, ["fid", "is"])
    with pytest.raises(m.UserError, match="nobody.*Unknown model"):
        open_detector("timm:nobody", CPU, ["fid"])


@with_tools
@pytest.mark.parametrize(
    "name, expected",
    [
        ("timm:resnet50", ("resnet50", "")),
        ("timm:resnet50:/a/w.pth", ("resnet50", "/a/w.pth")),
        ("timm:hf-hub:timm/resnet18.a1_in1k", ("hf-hub:timm/resnet18.a1_in1k", "")),
        ("timm:local-dir:/a/model:w.pth", ("local-dir:/a/model", "w.pth")),
    ],
)
def test_a_detector_has_the_name_that_timm_gives_it(monkeypatch, name, expected):
    """Before the file of weights, if there is one."""
    made = []

    class Teacher(torch.nn.Module):
        def __init__(self, *given):
            super().__init__()
            made.append(given)
            self.dim = 5

    monkeypatch.setattr(m, "Teacher", Teacher)
    tool("evaluate").open_detector(name, CPU, ["fid"])
    assert made == [expected]


@with_tools
def test_what_was_measured_is_printed_even_if_it_cannot_be_kept(run, tmp_path, capsys):
    shutil.copy(newest(run), tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    root = make_folder(tmp_path / "photos", classes=[f"c{k}" for k in range(8)], each=1, depth=True)
    argv = flags(resume=tmp_path, data=root, metrics="nfs8")
    assert tool("evaluate").main(argv) == 2
    printed = capsys.readouterr()
    assert re.search(r"^0.048 kimg: nfs8 [\d.]+$", printed.out, re.MULTILINE)
    assert "metrics.jsonl" in printed.err
    assert printed.err.count("error") == 1


@with_tools
def test_a_generator_of_pictures_is_compared_with_neither_depth_nor_cameras(monkeypatch):
    evaluate = tool("evaluate")
    monkeypatch.setattr(evaluate, "NAMER_IMAGES", 64)
    G = m.Generator(micro(dims=2, depth="none", camera="frontal", triplane_features=1, num_classes=8)).eval()
    data = m.ShapesData(G.cfg)
    truth = evaluate.evaluate_truth(G, data, torch.from_numpy(data.labels), n=64)
    assert "named_gray" in truth
    assert all(name.startswith("named_gray") for name in truth)


@with_tools
def test_cameras_that_are_not_learned_are_as_far_from_the_truth_as_the_prior():
    G = m.Generator(micro(camera="prior", num_classes=8)).eval()
    data = m.ShapesData(G.cfg)
    evaluate = tool("evaluate")
    evaluate.NAMER_IMAGES = 64
    truth = evaluate.evaluate_truth(G, data, torch.from_numpy(data.labels), n=64)
    assert truth["camera_w1_posterior"] == truth["camera_w1_prior"]
    for name, value in truth.items():
        assert np.isfinite(value).all(), name


@with_tools
def test_solids_are_named_by_their_depth_alone_and_by_their_gray_alone():
    """Pictures of the data in the place of samples: eight of each class, none that was learned from."""
    evaluate = tool("evaluate")
    evaluate.NAMER_IMAGES = 1024
    cfg = micro(num_classes=8)
    data = m.ShapesData(dataclasses.replace(cfg, resolution=64))
    batch = torch.utils.data.default_collate([data[i] for i in range(30_000, 30_064)])
    rgb = m.real_images(batch, CPU)[:, :3]
    depth = batch["true_depth"]

    named = evaluate.name_solids(cfg, rgb, depth, batch["label"])
    for kind in ("depth", "gray"):
        assert named[f"named_{kind}"] > 0.85
        assert named[f"named_{kind}_data"] > 0.85
        by_class = [named[f"named_{kind}_{solid}"] for solid in m.SOLIDS]
        assert np.mean(by_class) == pytest.approx(named[f"named_{kind}"])

    # Other hues and another unit of depth change nothing. Without depth nothing can be told from it.
    hues = evaluate.namer_inputs(rgb.roll(1, 1), 3 * depth + 1)
    for kind, expected in evaluate.namer_inputs(rgb, depth).items():
        torch.testing.assert_close(hues[kind], expected, rtol=0, atol=1e-5)
    flat = evaluate.name_solids(cfg, rgb, torch.rand_like(depth), batch["label"].roll(1))
    assert flat["named_depth"] < 0.3
    assert flat["named_gray"] < 0.1


# Tools: bench


def bench(capsys, what, *argv):
    """-> the rows of its table"""
    argv = ["--what", what, "--device", "cpu", "--repeats", "1", "--json", *argv]
    assert tool("bench").main(argv) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def micro_sizes():
    """Options of a small network, without those that are of a run"""
    of_a_run = ("metrics", "workers", "log_kimg", "snapshot_kimg")
    return flags(**{name: value for name, value in MICRO.items() if name not in of_a_run})


@compiles
@with_tools
def test_bench_says_what_the_fused_query_saves(capsys):
    rows = {(row["what"], row["planes"]): row for row in bench(capsys, "triplane")}
    assert len(rows) == 10
    for kind in ("features", "query"):
        fused = rows[f"{kind}, fused", "float32"]
        plain = rows[f"{kind}, plain", "float32"]
        assert abs(fused["times faster"] - plain["both ms"] / fused["both ms"]) < 1e-6
        if plain["extra MB"] is not None:
            assert fused["extra MB"] < plain["extra MB"] / 3


@with_tools
def test_bench_times_and_counts_the_phases_of_a_step(capsys):
    rows = {row["what"]: row for row in bench(capsys, "step", *micro_sizes())}
    total = rows.pop("whole step")
    parts = [row for what, row in rows.items() if "R1" not in what]
    for unit in ("ms/image", "Gflop/image"):
        assert total[unit] == pytest.approx(sum(row[unit] for row in parts))

    # On fakes D finds G's gradient in addition, and the way back through G is longer than the way there.
    operations = {what: row["Gflop/image"] for what, row in rows.items()}
    assert operations["D on reals"] > 0
    assert operations["G forward"] > 0
    assert operations["D on fakes, G backward"] > operations["D on reals"] + operations["G forward"]
    assert operations["D on reals, R1"] > operations["D on reals"]


@with_tools
def test_bench_distils_features_that_are_given():
    counts = []
    for teacher_dim in (0, 50):
        _, rows = tool("bench").bench_step(micro(num_classes=8, teacher_dim=teacher_dim), 1, CPU)
        counts += [row["Gflop/image"] for row in rows if row["what"] == "D on reals"]
    products = 8 * 16 * 8 + 8 * 50  # of the head's two layers; forward, and twice backward
    assert counts[1] - counts[0] == pytest.approx(3 * 2 * products / 1e9, rel=1e-3)


@with_tools
def test_bench_times_pictures(capsys):
    rows = {row["what"]: row["ms"] for row in bench(capsys, "render", *micro_sizes())}
    assert rows["picture"] > rows["planes"] > 0


@with_tools
def test_operations_are_counted():
    with tool("bench").Operations() as count:
        torch.randn(3, 4) @ torch.randn(4, 5)
        F.conv2d(torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3))
    product = 2 * 3 * 4 * 5
    convolution = 2 * 2 * 5 * 6 * 6 * 27
    assert count.total == product + convolution


@compiles
@with_tools
def test_operations_of_the_fused_query_are_counted():
    planes = torch.randn(2, 3, 4, 8, 8)
    points = torch.rand(2, 5, 3) - 0.5
    decoder = m.TriplaneDecoder(4)
    with torch.no_grad(), tool("bench").Operations() as count:
        m.query_triplane(planes, points, 0.5, decoder, True)

    lookup = 2 * 12 * 4  # 12 corners
    layers = 2 * 64 * (4 + 4)  # 4 -> 64 -> 4
    assert count.total == 2 * 5 * (lookup + layers)


# ------------------------------------------------------------------------------------------------------------
# Reference vectors: agreement means max |a - b| <= 1e-4 x max(1, max |b|), gradients included

FOLDER = os.environ.get("REFERENCE_VECTORS")
reference = pytest.mark.skipif(
    not FOLDER, reason="REFERENCE_VECTORS does not name the folder of the reference vectors"
)


def load(name):
    """{name: tensor} of one file."""
    with np.load(Path(FOLDER) / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def parameters(d, prefix="param/"):
    """State dict of what lies below a prefix, but for resample_filter: the FIR filter is a function here."""
    state = {}
    for key, value in d.items():
        if key.startswith(prefix) and not key.endswith("resample_filter"):
            state[key.removeprefix(prefix)] = value
    return state


def agree(a, b):
    b = b.to(a.dtype)
    assert a.shape == b.shape
    assert largest(a - b) <= 1e-4 * max(1.0, largest(b))


def golden_config(**changes):
    """The sizes that the vectors were computed with."""
    sizes = dict(
        num_classes=5,
        teacher_dim=40,
        resolution=64,
        patch_resolution=32,
        triplane_resolution=32,
        triplane_features=8,
        channel_base=512,
        channel_max=32,
        z_dim=24,
        w_dim=24,
        coarse_samples=6,
        fine_samples=6,
    )
    return m.Config(**{**sizes, **changes})


def golden_camera(d, prefix):
    yaw, pitch = d[f"{prefix}/angles"][:, :2].unbind(1)
    look_at = d[f"{prefix}/look_at"].unbind(1)
    return m.Camera(yaw, pitch, d[f"{prefix}/fov"], *look_at, d[f"{prefix}/radius"])


def golden_patch(d):
    return torch.cat([d["patch_scale"][:, None], d["patch_offset_xy"]], 1)


@reference
def test_reference_camera():
    d = load("camera")
    look_at = d["look_at_yaw_pitch_radius"].unbind(1)
    cameras = m.Camera(d["yaw"], d["pitch"], d["fov_degrees"], *look_at, d["radius"])
    agree(m.cam2world(cameras), d["cam2world"])

    patch = golden_patch(d)
    patch_origins, patch_directions = m.camera_rays(cameras, 5, patch)
    agree(patch_origins, d["patch_ray_origins"])
    agree(patch_directions, d["patch_ray_directions"])

    origins, directions = m.camera_rays(cameras, 5)
    agree(origins, d["ray_origins"])
    agree(directions, d["ray_directions"])

    # a ray that meets the box enters and leaves it on its surface
    meets = (d["box_near"] < d["box_far"])[..., 0]
    for t in (d["box_near"], d["box_far"]):
        farthest = (origins + t * directions).abs().amax(-1)[meets]
        agree(farthest, torch.full_like(farthest, float(d["box_half_size"])))


@reference
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=compiles)])
def test_reference_triplane_sampling(fused):
    d = load("triplane_sampling")
    planes = d["planes"].requires_grad_()
    points = d["coords"].requires_grad_()
    box = float(d["scale"])
    if fused:
        features = m.triplane(planes, points, box, points.new_empty(0))
    else:
        features = m.sample_triplane(planes, points, box)
    agree(features, d["features_mean_over_planes"])

    grad_planes, grad_points = torch.autograd.grad((features * d["cotangent"]).sum(), (planes, points))
    agree(grad_planes, d["grad_planes"])
    agree(grad_points, d["grad_coords"])


@reference
def test_reference_triplane_decoder():
    d = load("triplane_decoder")
    decoder = m.TriplaneDecoder(8)
    decoder.load_state_dict(parameters(d))
    rgb, sigma = decoder(d["features"][:, None])
    agree(rgb[:, 0], d["rgb"])
    agree(sigma, d["sigma_raw"])

    # the same of planes that have these features everywhere
    planes = d["features"][:, None, :, None, None].expand(-1, 3, -1, 2, 2)
    middle = torch.zeros(11, 1, 3)
    rgb, sigma = m.query_triplane(planes, middle, 0.5, decoder, m.custom_ops("cpu") is not None)
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
    w = d["ws"][:2]
    backbone = m.TriplaneBackbone(golden_config())
    backbone.load_state_dict(parameters(d))
    agree(backbone(w, noise="const"), d["planes"])
    assert (backbone(w, noise="none") - d["planes"]).abs().max() > 0.01


@reference
def test_reference_camera_generator():
    d = load("camera_generator")
    generator = m.CameraGenerator(golden_config())
    generator.load_state_dict(parameters(d))
    posterior = generator(golden_camera(d, "prior"), d["z"], d["c"].argmax(1))
    for a, b in zip(posterior, golden_camera(d, "posterior"), strict=True):
        agree(a, b)


@reference
def test_reference_depth_adaptor():
    d = load("depth_adaptor")
    adaptor = m.DepthAdaptor(golden_config(near=float(d["near"]), far=float(d["far"])))
    adaptor.load_state_dict(parameters(d))
    for level, expected in enumerate(d["adapted_per_level"]):
        agree(adaptor.adapt(d["depth"], level), expected)


@reference
def test_reference_render():
    d = load("render")
    cfg = golden_config(near=float(d["near"]), far=float(d["far"]), box=float(d["box_half_size"]))
    G = m.Generator(cfg).eval().requires_grad_(False)
    G.backbone.load_state_dict(parameters(load("backbone")))
    G.decoder.load_state_dict(parameters(d, "decoder/"))
    G.depth_adaptor.load_state_dict(parameters(load("depth_adaptor")))
    image, depth = G.render(G.backbone(d["w"]), golden_camera(d, "camera"), 32)
    agree(image, d["image"])
    agree(depth, d["depth"])
    agree(G.depth_adaptor.adapt(depth), d["depth_adapted"])


@reference
def test_reference_discriminator():
    d = load("discriminator")
    D = m.Discriminator(golden_config())

    # only the first block reads the image; the vectors hold spare parameters of the others
    result = D.load_state_dict(parameters(d), strict=False)
    assert not result.missing_keys
    for key in result.unexpected_keys:
        assert re.fullmatch(r"b(32|16|8)\.fromrgb\.(weight|bias)", key)

    image = d["img"].requires_grad_()
    patch = golden_patch(d)
    score, features = D(image, d["c"].argmax(1), patch)
    agree(score, d["logits"])
    agree(features, d["features"])

    penalty = m.r1_penalty(score, image)
    agree(penalty, d["r1_penalty"])
    found = torch.autograd.grad(penalty.sum(), list(D.parameters()), allow_unused=True)
    norms = torch.stack([g.norm() for g in found if g is not None])
    agree(norms.norm(), d["r1_param_grad_norm"])


@reference
def test_reference_patches():
    d = load("patches")
    patch = golden_patch(d)
    agree(m.extract_patch(d["image"], patch, 32), d["patch"])


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
    """Here agreement is relative to the output's size."""
    state = seeded_leres(backbone)
    shapes = json.loads((Path(FOLDER) / "leres_state_dict_shapes.json").read_text())[backbone]
    assert {name: list(value.shape) for name, value in state.items()} == shapes

    d = load(f"leres_{backbone}")
    model = L.LeReS(backbone).eval().requires_grad_(False)
    model.load_state_dict(state)
    assert (model(d["input"]) - d["output"]).abs().max() <= 1e-4 * d["output"].abs().max()


@reference
def test_every_reference_file_is_checked():
    text = Path(__file__).read_text()
    names = {path.stem for path in Path(FOLDER).glob("*.npz")}
    names -= {"leres_resnet50", "leres_resnext101"}  # whose names the test above puts together
    for name in names:
        assert f'load("{name}")' in text
