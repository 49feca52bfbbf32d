"""Geometry of one sample: marching cubes, point clouds, and the files they are written to, PLY and GLB.

A part of `sample.py` (--mesh, --points), which has the command line."""

import importlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
tdgp = importlib.import_module("3dgp")


# ---- From a scene to points ------------------------------------------------------------------------------
def query(G, planes, points):
    """One scene at points (N, 3) in world units. -> colours (N, 3), densities (N,) per world unit"""
    rgb, sigma_raw = tdgp.query_triplane(planes, points[None], G.cfg.box, G.decoder, G.cfg.fused)
    return rgb[0], F.softplus(sigma_raw[0])


def density_grid(G, planes, camera, n):
    """Densities as far from the camera as rays go, from near to far, else 0. -> (n, n, n) by x, y, z, CPU"""
    cfg = G.cfg
    line = torch.linspace(-cfg.box, cfg.box, n, device=planes.device)
    origin = tdgp.cam2world(camera)[:, :3, 3]  # (1, 3)
    slabs = []
    for x in line.tolist():
        points = F.pad(torch.cartesian_prod(line, line), (1, 0), value=x)  # (n², 3)
        distance = (points - origin).norm(dim=1)  # (n²,)
        seen = (distance > cfg.near) & (distance < cfg.far)
        _, density = query(G, planes, points)
        slabs.append((density * seen).cpu())
    return torch.stack(slabs).view(n, n, n)


def extract_mesh(G, planes, camera, level, n):
    """Marching cubes over one scene, n points a side, as far as the camera (of 1) sees.
    -> vertices (V, 3) in world units, colours (V, 3), faces (M, 3), counter-clockwise from outside"""
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise tdgp.UserError("--mesh: needs scikit-image; pip install scikit-image") from None

    density = density_grid(G, planes, camera, n)
    top = density.max()
    if not 0 < level < top:
        raise ValueError(f"--mesh-level {level:g}: must lie between 0 and the largest density, {top:.3g}")
    vertices, faces, *_ = marching_cubes(density.numpy(), level, gradient_direction="ascent")

    # Marching cubes counts in cells, from the grid's corner.
    cell = 2 * G.cfg.box / (n - 1)
    vertices = (vertices * cell - G.cfg.box).astype(np.float32)
    parts = torch.from_numpy(vertices).to(planes.device).split(2**16)
    colors = [query(G, planes, points)[0] for points in parts]
    return vertices, torch.cat(colors).cpu().numpy(), faces


# ---- Files -----------------------------------------------------------------------------------------------
PLY_HEADER = """ply
format binary_little_endian 1.0
element vertex {}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
element face {}
property list uchar int vertex_indices
end_header
"""


def write_ply(path, points, colors, faces=()):
    """Points (N, 3) in world units, y up; colors (N, 3) in [-1, 1]; faces (M, 3), outwards."""
    vertex = np.zeros(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertex["xyz"] = points
    vertex["rgb"] = ((np.clip(colors, -1, 1) + 1) * 127.5).round()

    face = np.zeros(len(faces), [("count", "u1"), ("indices", "<i4", 3)])
    face["count"] = 3
    face["indices"] = np.reshape(faces, (-1, 3))
    header = PLY_HEADER.format(len(vertex), len(face))
    with tdgp.atomic(path) as tmp:
        tmp.write_bytes(header.encode() + vertex.tobytes() + face.tobytes())


GLTF = {
    "asset": {"version": "2.0"},
    "extensionsUsed": ["KHR_materials_unlit"],
    "scene": 0,
    "scenes": [{"nodes": [0]}],
    "nodes": [{"mesh": 0}],
    "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}]}],
    # The colours have the light in them already. Viewers that cannot leave it out get something dull.
    "materials": [
        {
            "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1},
            "extensions": {"KHR_materials_unlit": {}},
            "doubleSided": True,
        }
    ],
}

# Numbers that the format has for its types
FLOAT, UNSIGNED_INT = 5126, 5125
VERTEX_DATA, INDEX_DATA = 34962, 34963


def write_glb(path, points, colors, faces):
    """The mesh of `write_ply` as binary glTF 2.0: https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html
    Like our worlds it has y up, faces counter-clockwise from outside, and a front that looks along +z."""
    positions = np.asarray(points, "<f4")
    srgb = (np.clip(colors, -1, 1) + 1) / 2
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)  # as glTF has it
    indices = np.ravel(faces)

    low = positions.min(0).tolist()
    high = positions.max(0).tolist()
    vertex = {"componentType": FLOAT, "count": len(positions), "type": "VEC3"}
    accessors = [
        {"bufferView": 0, **vertex, "min": low, "max": high},
        {"bufferView": 1, **vertex},
        {"bufferView": 2, "componentType": UNSIGNED_INT, "count": len(indices), "type": "SCALAR"},
    ]

    # The three arrays follow each other in one buffer. Their items have 4 bytes, so nothing needs padding.
    buffer = b""
    views = []
    parts = ((positions, "<f4", VERTEX_DATA), (linear, "<f4", VERTEX_DATA), (indices, "<u4", INDEX_DATA))
    for array, kind, target in parts:
        data = array.astype(kind).tobytes()
        views.append({"buffer": 0, "byteOffset": len(buffer), "byteLength": len(data), "target": target})
        buffer += data

    # The file: a header, a chunk of JSON (padded with spaces to a multiple of 4), a chunk of the buffer.
    scene = {**GLTF, "accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": len(buffer)}]}
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(buffer), b"BIN\0") + buffer
    with tdgp.atomic(path) as tmp:
        tmp.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def write_points(s, path):
    """The pixels of a Sample's picture, at their depth, as a point cloud."""
    origins, directions = tdgp.camera_rays(s.camera, s.rgb.shape[-1])  # (1, R, 3)
    points = origins[0] + directions[0] * s.depth.flatten()[:, None]  # (R, 3)
    write_ply(path, points.cpu().numpy(), s.rgb[0].flatten(1).t().cpu().numpy())
