"""Checkpoint: a folder that is there in full or not at all.

A checkpoint is written to a hidden folder beside its place, every file is flushed to disk, a manifest with the size and
SHA-256 of each file goes in last, and the folder is renamed. Whatever happens in between, the previous checkpoint
stays as it was, and a folder without a valid manifest is not a checkpoint.

The weights (or the adapter) and the tokenizer are saved as transformers and PEFT save them, so the folder is also a
plain model folder. Beside them lie `optimizer.safetensors`, `rng.safetensors` and `trainer_state.json`, and in
`source.safetensors` what the source of the data still has in hand, if anything: no pickle.
"""

import hashlib
import json
import os
import random
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.train.config import ConfigError

MANIFEST = "manifest.json"
_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"
_RNG = "rng.safetensors"
_SOURCE = "source.safetensors"
_NAME = re.compile(r"checkpoint-\d+")


def save(
    output_dir: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    source: dict[str, Tensor] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-<step>` and return its path.

    `state` is what goes to trainer_state.json, `source` the state of the source of the data.
    """
    target = output_dir / f"checkpoint-{step}"
    for abandoned in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(abandoned)
    partial = output_dir / f".{target.name}.partial"
    partial.mkdir(parents=True)
    save_model(model, tokenizer, partial)
    save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, partial / _OPTIMIZER)
    if source:
        save_file({name: tensor.contiguous() for name, tensor in source.items()}, partial / _SOURCE)
    rng_tensors, rng_json = _random_state()
    save_file(rng_tensors, partial / _RNG)
    (partial / _STATE).write_text(json.dumps({**state, "step": step, "random": rng_json}, indent=1), encoding="utf-8")
    _seal(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _flush(output_dir)
    return target


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The weights or the adapter, as transformers and PEFT write them, and the tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(
    folder: Path, model: nn.Module, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Restore the weights and the random generators. Returns (optimizer state, trainer state, source's state)."""
    problem = defect(folder)
    if problem:
        raise ConfigError(f"resume_from_checkpoint: {folder} is not a checkpoint: {problem}")
    _load_weights(folder, model)
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    _restore_random(load_file(folder / _RNG), state["random"])
    source = load_file(folder / _SOURCE) if (folder / _SOURCE).is_file() else {}
    return load_file(folder / _OPTIMIZER, device=str(device)), state, source


def defect(folder: Path) -> str | None:
    """Why `folder` is not a whole checkpoint, or None if it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"it has no readable {MANIFEST}"
    for name, size, digest in entries:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} is not what was written"
    return None


def find_all(output_dir: Path) -> list[Path]:
    """The folders in `output_dir` named checkpoint-<step>, newest first, valid or not."""
    named = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(named, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def find_newest(output_dir: Path) -> Path | None:
    """The newest valid checkpoint in `output_dir`, or None."""
    return next((folder for folder in find_all(output_dir) if defect(folder) is None), None)


def remove_old(output_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for folder in find_all(output_dir)[keep:]:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def set_aside(output_dir: Path, step: int) -> Path | None:
    """Move the checkpoints after `step` into a new folder `abandoned-<n>`: a run goes on from `step` without them.

    Returns that folder, or None if there was nothing to move.
    """
    later = [folder for folder in find_all(output_dir) if _step_of(folder) > step]
    if not later:
        return None
    target = next(path for n in count(1) if not (path := output_dir / f"abandoned-{n}").exists())
    target.mkdir()
    for folder in later:
        folder.rename(target / folder.name)
    return target


def _seal(folder: Path) -> None:
    """Flush every file of `folder`, then write the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    _flush(folder / MANIFEST)
    _flush(folder)


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_weights(folder: Path, model: Any) -> None:
    has_adapter = (folder / "adapter_config.json").is_file()
    if has_adapter != hasattr(model, "peft_config"):
        kinds = ("an adapter", "a whole model") if has_adapter else ("a whole model", "an adapter")
        raise ConfigError(f"resume_from_checkpoint: {folder} holds {kinds[0]}, but this run trains {kinds[1]}")
    if has_adapter:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    else:
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the generators of Python, numpy and torch, as tensors and as JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}


def _restore_random(tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
