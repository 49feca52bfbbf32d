"""Opens a trained generator: a checkpoint, a run, a folder of tools/publish.py, or a model of the Hub.

What others may have written is checked before it is used, option by option and weight by weight, and nothing
in it is run: weights are numbers in safetensors, options are JSON.
"""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
tdgp = importlib.import_module("3dgp")

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
OF_A_MACHINE = ("out", "resume", "init", "device", "workers", "timeout", "depth_weights", "teacher_weights")


def open_generator(resume, device="auto"):
    """The averaged generator of a checkpoint, a run's newest, a published folder, or a model of the Hub,
    hf:owner/name[@revision]. -> Generator, path, kimg seen. What is made with it belongs beside `path`, which
    for the Hub's lies in the folder owner--name (not made here). UserError for what cannot be opened."""
    is_weights = Path(resume).name == WEIGHTS
    if str(resume).startswith("hf:"):
        path, cfg, state, images = open_published(*download(resume))
    elif is_weights or Path(resume, WEIGHTS).exists():
        folder = Path(resume).parent if is_weights else Path(resume)
        path, cfg, state, images = open_published(folder, folder)
    else:
        path, cfg, everything = tdgp.load_checkpoint(resume)
        state, images = everything.get("G_ema"), everything.get("images")

    try:
        kimg = images / 1000
        G = tdgp.Generator(cfg)
        G.load_state_dict(state)  # bf16 becomes float32 here
    except Exception:  # damaged, or of another version
        raise refusal(path, "of networks that do not fit") from None
    return G.to(tdgp.choose_device(device, cfg.precision)).eval().requires_grad_(False), path, kimg


def open_published(folder, place):
    """-> where its weights would lie in the folder `place`, Config, state dict, images seen"""
    cfg, images = read_config(folder / CONFIG)
    if max(cfg.resolution, cfg.coarse_samples, cfg.fine_samples) > 4096:
        raise refusal(folder / CONFIG, "describes pictures, or samples on a ray, that fill any memory")

    # What is of a machine is this one's, not the author's; data of their own are not here.
    data = cfg.data if cfg.data in tdgp.DATA_PRESETS else ""
    cfg = dataclasses.replace(cfg, data=data, **{name: getattr(tdgp.Config, name) for name in OF_A_MACHINE})

    # Names and shapes are compared with a network that takes no memory: sizes may be absurd.
    try:
        with torch.device("meta"):
            expected = tdgp.Generator(cfg).state_dict()
    except Exception as e:  # of sizes that no network can have
        raise refusal(folder / CONFIG, f"describes no network ({type(e).__name__})") from None
    return place / WEIGHTS, cfg, read_weights(folder / WEIGHTS, expected), images


def refusal(path, what):
    """-> UserError about a file, in one line. What stands in `what` may come from the file."""
    return tdgp.UserError(f"--resume {path}: {' '.join(what.split())[:300]}")


def download(resume):
    """hf:owner/name[@revision] -> folder of the Hub's cache, folder for what is made with the model
    Only the two files are fetched. All that can go wrong is a UserError."""
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@((?!.*\.\.)[\w./-]+))?", resume, re.ASCII)
    if not found:
        raise refusal(resume, "must be hf:owner/name or hf:owner/name@revision, as on huggingface.co")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise refusal(resume, "needs huggingface_hub; pip install -U huggingface_hub") from None

    name, revision = found.groups()
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, CONFIG])
    except errors.GatedRepoError:
        what = "its authors grant access; ask for it on its page, then log in by: hf auth login"
        raise refusal(resume, what) from None
    except errors.RepositoryNotFoundError:
        what = "no such model on the Hub, or a private one; look at the name, or log in by: hf auth login"
        raise refusal(resume, what) from None
    except errors.RevisionNotFoundError:
        raise refusal(resume, f"has no revision {revision}; its page shows those there are") from None
    except Exception as e:  # no network, a name that cannot be, a full disk
        reason = f"{e.__cause__ or e}".partition("\n")[0]
        what = f"cannot be fetched ({reason}); look at name and network, or fetch the folder elsewhere"
        raise refusal(resume, what) from None
    return Path(folder), Path(name.replace("/", "--"))


def read_config(path):
    """config.json -> Config, images seen. What Config would not hold is a UserError that names the field."""
    fields = {field.name: field for field in dataclasses.fields(tdgp.Config)}
    try:
        content = json.loads(path.read_text("utf-8"))
        images = content["images"]
        given = dict(content["config"].items())
    except Exception as e:  # damaged or foreign
        raise refusal(path, f"not the {CONFIG} of a published model ({type(e).__name__})") from None

    unknown = content.keys() - {"config", "images"} | given.keys() - fields.keys()
    for name in sorted(unknown):
        raise refusal(path, f"has the unknown field {name[:40]!r}; it is foreign, or of a newer program")
    if type(images) is not int or not 0 <= images < 2**53:
        raise refusal(path, "images: must be the number of images seen")

    values = {name: read_value(path, fields[name], value) for name, value in given.items()}
    cfg = tdgp.Config(**values)
    try:
        tdgp.validate(dataclasses.replace(cfg, metrics=""), 1)  # which ones there are differs by program
    except (tdgp.UserError, ArithmeticError) as e:  # the latter of numbers beyond float's
        raise refusal(path, str(e)) from None
    return cfg, images


def read_value(path, field, value):
    """JSON's value for a field of Config -> Config's. Of another type, or none of the choices: UserError"""
    length = len(field.default) if isinstance(field.default, tuple) else None  # of numbers; 0: any
    if length is not None:
        right = type(value) is list and len(value) in (length, length or len(value))
        right = right and all(type(x) in (int, float) for x in value)
    elif field.type is float:
        right = type(value) in (int, float)
    else:
        right = type(value) is field.type

    choices = field.metadata.get("choices")
    if choices:
        right = right and value in (*choices, field.default)
    if field.type is str:
        right = right and value.isprintable()  # it may come into messages
    if not right:
        raise refusal(path, f"{field.name}: cannot be {str(value)[:40]!r}")
    return value if length is None else tuple(value)


def read_weights(path, expected):
    """model.safetensors -> {name: tensor}. UserError unless finite, and as in `expected`, a state dict"""
    try:
        state = load_file(path)
    except Exception as e:  # cut off, a pickle, anything
        reason = f"{e}".partition("\n")[0]
        raise refusal(path, f"not a whole safetensors file ({reason}); fetch or publish it anew") from None

    for name in sorted(state.keys() ^ expected.keys()):
        how = "has the unknown" if name in state else f"by its {CONFIG} it lacks the"
        raise refusal(path, f"{how} weights {name[:80]!r}")
    for name, x in state.items():
        shape = tuple(expected[name].shape)
        if x.shape != shape:
            raise refusal(path, f"{name} has the shape {tuple(x.shape)}, by its {CONFIG} {shape}")
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise refusal(path, f"{name} is {x.dtype}, must be float32 or bfloat16")
        if not x.isfinite().all():
            raise refusal(path, f"{name} is not finite")
    return state
