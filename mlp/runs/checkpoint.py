"""Networks on disk: a safetensors file of weights, with a description and a checksum."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..engines import takeover
from ..modules import build
from ..net import Net
from .disk import (
    BLANK,
    CHECKSUM,
    SEALED,
    CheckpointError,
    check_safetensors,
    replacing,
    seal_safetensors,
)

WEIGHTS = "model.safetensors"  # its name in a run folder
_Parts = tuple[str | int, ...]  # the words and numbers of a parameter's name
# Keys of the network's config() in the metadata. Older files, without a checksum, have the second.
_DESCRIPTIONS = (SEALED, "handgrad")
Model = TypeVar("Model", bound=torch.nn.Module | Net)


def tensors_of(model: torch.nn.Module | Net) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a network, by name."""
    if isinstance(model, Net):
        return dict(model.parameters)
    state = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}


def config_of(model: torch.nn.Module | Net) -> dict[str, Any] | None:
    """The description that builds one of our networks again, or None for another module.

    None too if the network may compute something else than its description, such as a subclass.
    `load` then asks for `load_weights`. Hooks are not stored, as in torch.
    """
    is_ours = takeover.description(model) is None
    ours: Any = model
    return ours.config() if is_ours else None


def save(model: torch.nn.Module | Net, path: str | os.PathLike) -> None:
    """Write the weights of a network and its description to a .safetensors file.

    model: a network of ours, which `load` can build again, or any module. CheckpointError if the
    folder of `path` does not exist, or if the file would have another suffix.
    """
    from safetensors.torch import save_file  # imported here, so that training works without it

    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: weights are written as .safetensors, got {path.suffix or 'no suffix'}; use "
            f"{path.stem}.safetensors"
        )
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors_of(model).items()}
    metadata = {CHECKSUM: BLANK, SEALED: json.dumps(config_of(model))}
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path}: cannot be written, because there is no folder {path.parent}; make it first"
        )
    with replacing(path) as part:
        save_file(tensors, part, metadata)
        seal_safetensors(part)


def load_file(path: Path, device: torch.device | str | None = None) -> torch.nn.Module:
    """The network in a file written by `save`."""
    from safetensors import safe_open

    state = read_weights(path)
    config = None
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        texts = [metadata[name] for name in _DESCRIPTIONS if name in metadata]
        try:
            config = json.loads(texts[0]) if texts else None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its description is not JSON ({error})") from None
    if config is None:
        raise CheckpointError(
            f"{path}: has weights but no description of the network; use load_weights(model, path)"
        )
    return network(config, state, str(path), device)


def network(
    config: object,
    state: dict[str, torch.Tensor],
    where: str,
    device: torch.device | str | None = None,
) -> torch.nn.Module:
    """The module that a `config()` describes, with these weights.

    where: the place that an error names. The description is checked before anything is allocated,
    because it may ask for any size. CheckpointError if it is wrong or does not fit the weights.
    """
    if not isinstance(config, dict) or _items(config) > 20 + 2 * len(state):
        raise CheckpointError(
            f"{where}: the description must be an object with the arguments of a network of "
            f"{len(state)} tensors, got {_short(config)}"
        )
    dtypes = [t.dtype for t in state.values() if t.is_floating_point()] or [torch.float32]
    try:
        empty = build(config, "meta", dtypes[0])
        found = config_of(empty)
        if json.dumps(found, sort_keys=True) != json.dumps(config, sort_keys=True):
            raise ValueError(f"it would be {_short(found)}")
        _match(tensors_of(empty), state, where)
    except CheckpointError:
        raise
    except Exception as error:  # a wrong type may raise any error at its first use
        raise CheckpointError(
            f"{where}: the description {_short(config)} is not that of a network ({_reason(error)})"
        ) from None
    model = build(config, device, dtypes[0])
    _copy(model, state, where)
    return model


def _items(value: object) -> int:
    """The count of values in a description, at any depth."""
    if isinstance(value, dict):
        return sum(map(_items, value.values()))
    return sum(map(_items, value)) if isinstance(value, list) else 1


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}…"


def _reason(error: Exception) -> str:
    """The error in words, without the advice and the traces that torch adds."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name, on the CPU.

    The file is a .safetensors file, or a file of torch.save that holds a plain state_dict.
    CheckpointError if it is damaged, or is neither.
    """
    from safetensors.torch import load_file as load_safetensors

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    is_safetensors = path.suffix == ".safetensors"
    try:
        if is_safetensors:
            check_safetensors(path)
            state = load_safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # pickle, zip and safetensors raise different classes
        kind = "a readable safetensors file" if is_safetensors else "readable as weights"
        raise CheckpointError(f"{path}: not {kind} ({_reason(error)})") from None
    if isinstance(state, dict):
        state = {name: t for name, t in state.items() if not str(name).endswith("_extra_state")}
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in state.items()
    ):
        raise CheckpointError(f"{path}: must hold a plain state_dict, name -> tensor")
    return state


def load_weights(model: Model, path: str | os.PathLike) -> Model:
    """Copy weights from a file into a network of the same shapes, and return it.

    Tensors are matched by name. If only a prefix or the layers' numbers differ, as in
    "module.0.weight" and "module.2.weight", they are matched by the order of the numbers, where 2
    comes before 10. CheckpointError if they do not match. The network is then unchanged.
    """
    _copy(model, read_weights(path), str(path))
    return model


@torch.no_grad()
def _copy(model, state: dict[str, torch.Tensor], where: str) -> None:
    for target, source in _match(tensors_of(model), state, where):
        target.copy_(source)


def _match(
    expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor], where: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (the network's tensor, the file's tensor).

    CheckpointError if they do not match one to one, or if a shape differs.
    """
    if state.keys() == expected.keys():
        pairs = [(name, name) for name in expected]
    else:
        ours, theirs = ({key: n for key, n in _canonical(names)} for names in (expected, state))
        if ours.keys() != theirs.keys() or len(theirs) != len(state):
            raise CheckpointError(
                f"{where}: weights of another network: has {_names(state)}, needs "
                f"{_names(expected)}"
            )
        pairs = [(ours[key], theirs[key]) for key in ours]
    for name, found in pairs:
        if expected[name].shape != state[found].shape:
            raise CheckpointError(
                f"{where}: weights of another network: {found} has the shape "
                f"{tuple(state[found].shape)}, needs {tuple(expected[name].shape)}"
            )
    return [(expected[name], state[found]) for name, found in pairs]


def _names(tensors: dict[str, torch.Tensor]) -> str:
    """The first names, each with its shape."""
    shown = [f"{name} {tuple(t.shape)}" for name, t in list(tensors.items())[:8]]
    return ", ".join(shown) + (f" and {len(tensors) - 8} more" if len(tensors) > 8 else "")


def _canonical(names: Iterable[str]) -> list[tuple[_Parts, str]]:
    """[(key, name)] of the parameters.

    Two networks have equal keys if their names differ only in a prefix and in the layers' numbers.
    A name is cut into words and numbers. Words that begin all names are dropped. Then numbers at
    the same place are replaced by their rank.
    """
    cut = {name: _parts(name) for name in names}
    while cut and all(len(parts) > 1 for parts in cut.values()):
        if len({parts[0] for parts in cut.values()}) > 1:
            break
        cut = {name: parts[1:] for name, parts in cut.items()}
    for place in range(max(map(len, cut.values()), default=0)):
        cut = _ranked(cut, place)
    return [(parts, name) for name, parts in cut.items()]


def _ranked(cut: dict[str, _Parts], place: int) -> dict[str, _Parts]:
    """The names, where numbers at this place become their rank among those after equal words."""
    numbers: dict[_Parts, set[int]] = {}
    for parts in cut.values():
        part = parts[place] if place < len(parts) else None
        if isinstance(part, int):
            numbers.setdefault(parts[:place], set()).add(part)
    ranked = {}
    for name, parts in cut.items():
        part = parts[place] if place < len(parts) else None
        if isinstance(part, int):
            rank = sorted(numbers[parts[:place]]).index(part)
            parts = (*parts[:place], rank, *parts[place + 1 :])
        ranked[name] = parts
    return ranked


def _parts(name: str) -> _Parts:
    """The words and numbers of a name: "conv.10.weight" -> ("conv", 10, "weight")."""
    return tuple(int(p) if p.isdecimal() else p for p in re.findall(r"\d+|[^\d.]+", name))
