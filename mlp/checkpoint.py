"""Networks and runs on disk: weights as safetensors with the network's description beside them,
runs as folders.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from .modules import build
from .stepwise import parameters_of

CONFIG, METRICS, WEIGHTS, RESUME = "config.json", "metrics.jsonl", "model.safetensors", "last.ckpt"


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be, in one line."""


def _reason(error: Exception) -> str:
    """What went wrong, without the advice and the traces that torch adds."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]


@contextmanager
def replacing(path: Path):
    """A path to write to that takes the place of `path` at the end, or of nothing if writing
    fails.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # safetensors would keep others from reading
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(model, path) -> None:
    """Write the weights of an MLP or Net, and what builds it again, to a .safetensors file."""
    from safetensors.torch import save_file  # here, so that a machine without it can train

    tensors = {
        name: p.detach().cpu().contiguous().clone() for name, p in parameters_of(model).items()
    }
    metadata = {"handgrad": json.dumps(model.config())} if hasattr(model, "config") else {}
    if not Path(path).parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written, there is no folder {Path(path).parent}")
    with replacing(Path(path)) as part:
        save_file(tensors, part, metadata)


def load(path, device=None) -> torch.nn.Module:
    """The network in a file written by `save`, or in a run folder: a module on `device`.
    CheckpointError if it is neither.
    """
    from safetensors import safe_open

    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.exists():
        unfinished = (
            "; the run finished no epoch, train it again with --force"
            if (path.parent / CONFIG).exists()
            else ""
        )
        raise CheckpointError(f"{path}: no such checkpoint{unfinished}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises its own kinds for a damaged file
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    if "handgrad" not in metadata:
        raise CheckpointError(
            f"{path}: has weights but no description of the network; use load_weights(model, path)"
        )
    state = read_weights(path)
    model = build(json.loads(metadata["handgrad"]), device, next(iter(state.values())).dtype)
    return load_weights(model, path)


def read_weights(path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a .safetensors file, or of a torch .pth file that holds a plain
    state_dict.
    """
    from safetensors.torch import load_file

    path = Path(path)
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, weights_only=True)
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # pickle, zip and safetensors each raise their own
        raise CheckpointError(f"{path}: not readable as weights ({_reason(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: must hold a plain state_dict, name -> tensor")
    return state


@torch.no_grad()
def load_weights(model, path):
    """Copy weights into a network of the same shapes and return it: by name, or by order where only
    the names differ.
    """
    state, parameters = read_weights(path), parameters_of(model)
    found, expected = (
        [tuple(t.shape) for t in tensors.values()] for tensors in (state, parameters)
    )
    if state.keys() == parameters.keys():
        pairs = [(name, p, state[name]) for name, p in parameters.items()]
    else:
        pairs = list(zip(parameters, parameters.values(), state.values()))
    if len(found) != len(expected) or any(p.shape != t.shape for _, p, t in pairs):
        raise CheckpointError(f"{path}: weights of another network: has {found}, needs {expected}")
    for _, p, t in pairs:
        p.copy_(t)
    return model


class RunFolder:
    """A run on disk: config.json, metrics.jsonl (a line an epoch), model.safetensors, last.ckpt,
    curves.png.
    """

    def __init__(self, path):
        self.path = Path(path)

    @classmethod
    def create(cls, path, force=False) -> "RunFolder":
        """A new run folder; FileExistsError if one is there already, unless `force`, which removes
        that run's files.
        """
        run = cls(path)
        taken = [name for name in (CONFIG, METRICS, WEIGHTS, RESUME) if (run.path / name).exists()]
        if taken and not force:
            raise FileExistsError(
                f"{run.path} already holds a run; choose another --out, --resume it, or --force "
                "to replace it"
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(
                f"cannot write the run folder {run.path}: {error.strerror}"
            ) from None
        if not os.access(run.path, os.W_OK):
            raise PermissionError(f"cannot write the run folder {run.path}: permission denied")
        for name in taken:
            (run.path / name).unlink()
        return run

    @property
    def config(self) -> dict:
        """What config.json holds; CheckpointError if this is no run folder."""
        try:
            return json.loads((self.path / CONFIG).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} is not a run folder: it has no {CONFIG}") from None
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{self.path / CONFIG}: not JSON ({error})") from None

    @config.setter
    def config(self, value: dict):
        (self.path / CONFIG).write_text(json.dumps(value, indent=2) + "\n")

    @property
    def history(self) -> list[dict]:
        """The epochs in metrics.jsonl."""
        path = self.path / METRICS
        return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []

    def record(self, trainer) -> None:
        """After an epoch: its line, the weights, and what resuming needs."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(trainer.history[-1]) + "\n")
        save(trainer.model, self.path / WEIGHTS)
        with replacing(self.path / RESUME) as part:
            torch.save(trainer.state_dict(), part)

    def resume(self, trainer) -> None:
        """Put a trainer where the run stopped, and cut metrics.jsonl to the epochs that are
        kept.
        """
        try:
            state = torch.load(self.path / RESUME, map_location=trainer.device, weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} cannot be resumed: it has no {RESUME}") from None
        except Exception as error:  # pickle and zip raise many kinds
            raise CheckpointError(
                f"{self.path / RESUME}: not readable ({_reason(error)})"
            ) from None
        trainer.load_state_dict(state)
        (self.path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in trainer.history))
