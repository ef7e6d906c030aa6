"""Checkpoints: a Hugging Face model directory plus optimiser and data state, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.parallel import World

__all__ = ["latest", "load_optimizer", "prune", "remove", "save", "state_of"]

STATE = "chatloss_state.json"
OPTIMIZER = "optimizer.safetensors"


def save(
    path: Path, loss: TokenLoss, world: World, *, tokenizer_files: Callable[[Path], None], stop_ids: Sequence[int] = (),
    optimizer: torch.optim.Optimizer | None = None, state: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model, its tokenizer and generation config, and the training state if given, as directory `path`.

    Everything is written beside `path`, flushed, and renamed: a kill at any moment leaves the old directory or the new
    one. All ranks call this; rank 0 writes. Raises `RecipeError` if the disk is full, with what was there intact.
    """
    weights = _full_weights(loss, world)
    moments = None if optimizer is None else _optimizer_state(loss, optimizer)
    failed = ""
    if world.rank == 0:
        new = path.with_name(f".{path.name}.new")
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            loss.model.save_pretrained(new, state_dict=weights)  # type: ignore[operator]
            if loss.inner is not loss.model:
                loss.inner.config.save_pretrained(new / "base")
            _write_generation_config(loss.inner, new, stop_ids)
            tokenizer_files(new)
            if moments is not None:
                _save_tensors(moments, new / OPTIMIZER)
            if state is not None:
                (new / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            _flush(new)
            old = path.with_name(f".{path.name}.old")
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            new.rename(path)
            _flush_directory(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            failed = str(error)
    failed = world.gather(failed)[0]
    if failed:
        raise RecipeError(
            f"cannot write the checkpoint: {failed}", where=str(path),
            hint="make room, then run the same command again: it continues from the last checkpoint",
        )


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint ``root/step-*``, or None; half-written ones are never seen."""
    found = [path for path in root.glob("step-*") if (path / STATE).is_file()]
    return max(found, key=lambda path: path.name, default=None)


def state_of(path: Path) -> dict[str, Any]:
    """The state that `save` was given."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot read the checkpoint's state: {error}", where=str(path), hint="delete this checkpoint, or --fresh"
        ) from None
    return state


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a killed run left half-written."""
    whole = sorted(path for path in root.glob("step-*") if path.is_dir())
    for path in [*whole[:-keep], *root.glob(".step-*")]:
        gone = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.old"))
        shutil.rmtree(gone, ignore_errors=True)


def remove(*paths: Path) -> None:
    """Removes files and directories; each is gone at once or untouched, also if the process is killed meanwhile."""
    for path in paths:
        gone = path.with_name(f".{path.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        if path.is_dir():
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def load_optimizer(path: Path, loss: TokenLoss, optimizer: torch.optim.Optimizer) -> None:
    """Puts saved moments back into an optimiser over `loss`'s parameters; raises `RecipeError` if they do not fit."""
    from safetensors import SafetensorError, safe_open

    parameters: dict[str, Any] = dict(loss.named_parameters())
    try:
        with safe_open(path / OPTIMIZER, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, _, what = key.rpartition("/")
                parameter, value = parameters[name], file.get_tensor(key)
                if hasattr(parameter, "device_mesh") and value.ndim:
                    from torch.distributed.tensor import distribute_tensor

                    value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                # A count of steps is read by the CPU, except by fused kernels.
                home = parameter.device if value.ndim or optimizer.defaults.get("fused") else "cpu"
                optimizer.state[parameter][what] = value.to(home)
    except (OSError, KeyError, SafetensorError) as error:
        raise RecipeError(
            f"the optimiser's state does not fit: {error}", where=str(path / OPTIMIZER), hint="start anew with --fresh"
        ) from None


def _optimizer_state(loss: TokenLoss, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in loss.named_parameters()}
    # Fails if the optimiser holds parameters that are not the module's: then it was made at the wrong moment.
    states = {names[parameter]: state for parameter, state in optimizer.state.items()}
    return {f"{name}/{key}": _whole(value) for name, state in states.items() for key, value in state.items()
            if isinstance(value, Tensor)}


def _full_weights(loss: TokenLoss, world: World) -> dict[str, Tensor] | None:
    """The model's weights if they are sharded, else None: save_pretrained then takes them itself."""
    if not any(hasattr(parameter, "device_mesh") for parameter in loss.parameters()):
        return None
    whole = {name: _whole(value) for name, value in loss.model.state_dict().items()}
    return whole if world.rank == 0 else {}


def _whole(value: Any) -> Tensor:
    tensor: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return tensor.detach().to("cpu").contiguous()


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def _write_generation_config(model: Any, path: Path, stop_ids: Sequence[int]) -> None:
    """generation_config.json whose stops are the trained ones first, so that an engine ends a turn where we did."""
    config = model.generation_config
    before = config.eos_token_id
    known = before if isinstance(before, list) else [] if before is None else [before]
    stops = list(dict.fromkeys([*stop_ids, *known]))
    if stops:
        config.eos_token_id = stops
    config.save_pretrained(path)


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def freeze(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters on the CPU, for comparisons."""
    return {name: _whole(value).clone() for name, value in module.named_parameters()}
