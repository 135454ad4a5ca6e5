"""The command line: train, evaluate, report, predict, sweep, recipes, info. Errors are one line on
stderr and exit status 2.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import kernels

from . import checkpoint, data, engines, metrics, recipes, report
from .checkpoint import RunFolder
from .sweep import Sweep, spread
from .trainer import Trainer, line

app = typer.Typer(
    help="Train multilayer perceptrons by hand-written backpropagation.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
)

# name -> dtype of weights and data, and torch's name for the precision of float32 products
PRECISIONS = {
    "fp32": (torch.float32, "highest"),
    "tf32x3": (torch.float32, "high"),
    "tf32": (torch.float32, "medium"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp64": (torch.float64, "highest"),
}


_INTERRUPTED = 130  # what shells and typer call Ctrl-C


def run(argv: list[str]) -> int:
    """Run a command; 0, or 2 after one line on stderr. HANDGRAD_DEBUG=1 shows where an error comes
    from.
    """
    try:
        status = app(argv, standalone_mode=False) or 0
        if status == _INTERRUPTED:
            print(
                "handgrad: interrupted; a training goes on with --out RUN --resume", file=sys.stderr
            )
        return status
    except Exception as error:
        if os.environ.get("HANDGRAD_DEBUG"):
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not isinstance(
            error, (ValueError, IndexError, OSError, engines.Diverged)
        ) and not hasattr(error, "exit_code"):
            message = f"{type(error).__name__}: {message} (HANDGRAD_DEBUG=1 shows where)"
        print(f"handgrad: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("handgrad: interrupted", file=sys.stderr)
        return _INTERRUPTED


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one; a ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:1, …") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {name} was asked for, but this machine has {count} CUDA devices; use "
            "--device cpu"
        )
    return device


def pick_precision(name: str) -> torch.dtype:
    """The dtype of a --precision; sets how float32 products are made."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}")
    dtype, products = PRECISIONS[name]
    torch.set_float32_matmul_precision(products)
    return dtype


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ValueError(
            f"--hidden must be widths with commas, such as 100,50, got {text!r}"
        ) from None


def _free_folder(source: str) -> Path:
    """runs/NAME, or the first runs/NAME-2, -3, … that does not exist."""
    stem = Path("runs") / Path(source.split(",")[0]).stem
    return next(
        p
        for n in range(1, 10**6)
        if not (p := stem if n == 1 else stem.with_name(f"{stem.name}-{n}")).exists()
    )


def _prepare(settings: dict):
    """(recipe, train, test, device, dtype) of a run's settings."""
    recipe = recipes.Recipe(**settings["recipe"])
    device, dtype = pick_device(settings["device"]), pick_precision(settings["precision"])
    train, test = recipe.prepare(*data.load(settings["dataset"], settings["data_dir"]))
    return recipe, train, test, device, dtype


def _resumed(context, run: RunFolder) -> dict:
    """The settings of a run that goes on; a ValueError that names an option which it cannot take
    any more.
    """
    given = {
        name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"
    }
    fixed = given - {"dataset", "epochs", "data_dir", "device", "engine", "out", "plots", "resume"}
    settings = run.config
    if fixed or ("dataset" in given and context.params["dataset"] != settings["dataset"]):
        what = (
            f"--{min(fixed).replace('_', '-')}"
            if fixed
            else f"the data set {context.params['dataset']}"
        )
        raise ValueError(
            f"{what} cannot be changed by --resume, which goes on with the settings in "
            f"{run.path / 'config.json'}: "
            "leave it out, or train into another --out"
        )
    return settings | {
        name: str(context.params[name])
        for name in ("device", "engine", "data_dir")
        if name in given
    }


@app.command()
def train(
    context: typer.Context,
    dataset: Annotated[
        str, typer.Argument(help=f"{', '.join(data.NAMES)}, or a path: .mat, .npz, image folder")
    ] = "digits",
    recipe: Annotated[
        str, typer.Option(help="settings by name; see `handgrad recipes`")
    ] = "default",
    hidden: Annotated[
        str | None, typer.Option(help="widths of the hidden layers, such as 100,50")
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help=f"one of {', '.join(kernels.ACTIVATIONS)}")
    ] = None,
    loss: Annotated[str | None, typer.Option(help=f"one of {', '.join(recipes.LOSSES)}")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help=f"one of {', '.join(recipes.OPTIMIZERS)}")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate")] = None,
    momentum: Annotated[float | None, typer.Option(help="momentum of sgd")] = None,
    batch_size: Annotated[int | None, typer.Option(help="samples in a step")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the training data")] = None,
    seed: Annotated[int, typer.Option(help="of initial weights and sample order")] = 0,
    engine: Annotated[str, typer.Option(help=f"auto, {', '.join(engines.ENGINES)}")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    precision: Annotated[str, typer.Option(help=f"one of {', '.join(PRECISIONS)}")] = "fp32",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="folder of data sets; default $HANDGRAD_DATA, else the cache"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="run folder; default runs/DATASET, numbered")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the run in --out")] = False,
    plots: Annotated[
        bool, typer.Option("--plots", help="draw all pictures of `handgrad report` at the end")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --out, up to --epochs")
    ] = False,
):
    """Train a network; prints a line an epoch and writes a run folder."""
    for name, value, smallest in (("epochs", epochs, 1), ("lr", lr, 0)):
        if value is not None and not value >= smallest:
            raise ValueError(f"--{name} must be at least {smallest}, got {value}")
    if resume:
        run = RunFolder(_required(out, "--resume needs --out, the run folder to go on with"))
        settings = _resumed(context, run)
        settings["recipe"]["epochs"] = epochs or settings["recipe"]["epochs"]
    else:
        chosen = recipes.changed(
            recipes.get(recipe),
            hidden=_widths(hidden),
            activation=activation,
            loss=loss,
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            batch_size=batch_size,
            epochs=epochs,
        )
        settings = {
            "dataset": dataset,
            "data_dir": str(data_dir) if data_dir else None,
            "seed": seed,
            "device": device,
            "engine": engine,
            "precision": precision,
            "recipe": dataclasses.asdict(chosen),
            "versions": versions(),
        }
    chosen, train_set, test_set, on, dtype = _prepare(settings)
    model = chosen.model(train_set, settings["seed"], on, dtype)
    trainer = Trainer(
        model, chosen.make_loss(), chosen.make_optimizer, settings["engine"], verbose=False
    )
    trainer.check(train_set, chosen.epochs, chosen.batch_size, test_set, drop_last=chosen.drop_last)
    if resume:
        run.resume(trainer)
        if len(trainer.history) >= chosen.epochs:
            print(
                f"nothing to do: {run.path} has {len(trainer.history)} epochs; for more give "
                "--epochs"
            )
            return
    else:
        run = RunFolder.create(out or _free_folder(dataset), force)
    settings["data"] = {
        "classes": list(train_set.classes),
        "image_shape": train_set.image_shape,
        "scale": train_set.scale,
        "shift": train_set.shift,
    }
    run.config = settings
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{train_set.name}: {len(train_set):,} samples; {chosen.about}; {count:,} parameters; "
        f"{trainer.engine_note}; {on}"
    )
    _fit(trainer, chosen, train_set, test_set, settings["seed"], run)
    if plots:
        _draw(run, chosen, test_set, model)


def _required(value, message: str):
    if value is None:
        raise ValueError(message)
    return value


def _fit(trainer, recipe, train_set, test_set, seed, run):
    """Train with a progress bar, record every epoch, and draw the curves."""
    from tqdm import tqdm

    steps = -(-len(train_set) // recipe.batch_size)
    remaining = max(recipe.epochs - len(trainer.history), 0)
    with tqdm(
        total=steps * remaining, unit="step", leave=False, disable=None, file=sys.stderr
    ) as bar:

        def on_epoch(row):
            run.record(trainer)
            bar.write(line(row), file=sys.stdout)

        trainer.fit(
            train_set,
            recipe.epochs,
            recipe.batch_size,
            test_set,
            seed,
            drop_last=recipe.drop_last,
            on_epoch=on_epoch,
            on_step=None if bar.disable else bar.update,
        )
    if trainer.history:
        report.curves(trainer.history, run.path / "curves.png")
    print(f"trained {sum(row['seconds'] for row in trainer.history):.1f} s; run folder {run.path}")


def _open(run: Path, data_dir, device: str):
    """(settings, recipe, test data, model on its device) of a run folder."""
    settings = {**RunFolder(run).config, "device": device}
    settings["data_dir"] = str(data_dir) if data_dir else settings["data_dir"]
    recipe, _, test_set, on, _ = _prepare(settings)
    return settings, recipe, test_set, checkpoint.load(run, on)


_RunArgument = Annotated[Path, typer.Argument(help="a run folder")]
_DataOption = Annotated[Path | None, typer.Option(help="as for train; default: the run's")]
_DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


@app.command()
def evaluate(
    run: _RunArgument,
    top: Annotated[
        int | None, typer.Option(help="k of the top-k accuracy; default 5, or all classes if fewer")
    ] = None,
    data_dir: _DataOption = None,
    device: _DeviceOption = "auto",
):
    """Loss and accuracy of a trained network on its test data: top-1, top-k and by class."""
    _, recipe, test_set, model = _open(run, data_dir, device)
    trainer = Trainer(model, recipe.make_loss(), recipe.make_optimizer, "autograd", verbose=False)
    result = trainer.evaluate(test_set)
    print(f"{test_set.name}: {len(test_set):,} samples, loss {result['test_loss']:.4f}")
    if test_set.is_classification:
        scores = metrics.probabilities(model, trainer.loss, test_set)
        measured = metrics.classification(scores, test_set, top or min(5, len(test_set.classes)))
        print(f"accuracy {measured['accuracy']:.2%}, top-{measured['k']} {measured['top_k']:.2%}")
        for name, share in measured["per_class"].items():
            print(f"  {name:<20} {'no samples' if share is None else f'{share:.2%}'}")


@app.command("report")
def draw(run: _RunArgument, data_dir: _DataOption = None, device: _DeviceOption = "auto"):
    """Draw a run: curves, test images with predictions, confusion matrix, the first layer's
    weights.
    """
    _, recipe, test_set, model = _open(run, data_dir, device)
    for path in _draw(RunFolder(run), recipe, test_set, model):
        print(path)


def _draw(run: RunFolder, recipe, test_set, model) -> list[Path]:
    scores = measured = None
    if test_set.is_classification:
        scores = metrics.probabilities(model, recipe.make_loss(), test_set)
        measured = metrics.classification(scores, test_set, 1)
    return report.write_all(run.history, model, scores, measured, test_set, run.path)


@app.command()
def predict(
    run: _RunArgument,
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files")],
    device: _DeviceOption = "auto",
):
    """The class of each image, and its probability. Images of another size are resized, with a
    note.
    """
    settings = RunFolder(run).config
    facts, recipe = settings["data"], recipes.Recipe(**settings["recipe"])
    if facts["image_shape"] is None:
        raise ValueError(
            f"{run} was trained on rows of numbers, not on images: it cannot read {images[0]}"
        )
    model = checkpoint.load(run, pick_device(device))
    dtype = pick_precision(settings["precision"])
    pixels, notes = zip(*(data.open_image(path, tuple(facts["image_shape"])) for path in images))
    batch = data.Dataset(
        torch.stack(pixels),
        torch.zeros(len(pixels), dtype=torch.int64),
        tuple(facts["classes"]),
        scale=facts["scale"],
        shift=facts["shift"],
    )
    with torch.no_grad():
        x = batch.read(batch.inputs, dtype).to(next(model.parameters()).device)
        scores = recipe.make_loss().probabilities(model(x)).float().cpu()
    for path, note, score in zip(images, notes, scores):
        best = int(score.argmax())
        print(
            f"{path}: {facts['classes'][best]} ({score[best]:.1%})" + (f", {note}" if note else "")
        )


@app.command()
def sweep(
    dataset: Annotated[str, typer.Argument(help="as for train")] = "digits",
    replicas: Annotated[int, typer.Option(help="how many networks")] = 16,
    lr: Annotated[
        str,
        typer.Option(help="learning rate, or LOW:HIGH, spread over the networks in equal ratios"),
    ] = "0.01:1.0",
    momentum: Annotated[float, typer.Option(help="momentum of sgd")] = 0.0,
    hidden: Annotated[str, typer.Option(help="widths of the hidden layers")] = "100,50",
    activation: Annotated[str, typer.Option(help="as for train")] = "relu",
    optimizer: Annotated[str, typer.Option(help="as for train")] = "sgd",
    batch_size: Annotated[int, typer.Option(help="samples in a step")] = 32,
    epochs: Annotated[int, typer.Option(help="passes over the training data")] = 10,
    seed: Annotated[int, typer.Option(help="of the first network; the others count on")] = 0,
    top: Annotated[int, typer.Option(help="rows of the table to print")] = 10,
    device: _DeviceOption = "auto",
    data_dir: Annotated[Path | None, typer.Option(help="as for train")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for sweep.jsonl and every network; none is written without it"),
    ] = None,
):
    """Train many networks at once; prints a table, best first, and the accuracy of their mean."""
    from tqdm import tqdm

    train_set, test_set = data.load(dataset, data_dir)
    low, colon, high = lr.partition(":")
    try:
        rates = spread(float(low), float(high) if colon else float(low), replicas)
    except ValueError as error:
        raise ValueError(
            f"--lr must be a number, or LOW:HIGH with 0 < LOW <= HIGH, got {lr!r} ({error})"
        ) from None
    if out is not None and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another --out")
    sizes = (train_set.features, *_widths(hidden), len(train_set.classes))
    job = Sweep(
        sizes,
        replicas,
        rates,
        momentum,
        range(seed, seed + replicas),
        activation=activation,
        optimizer=optimizer,
        device=pick_device(device),
    )
    started = time.perf_counter()
    with tqdm(total=epochs, unit="epoch", leave=False, disable=None, file=sys.stderr) as bar:
        rows = job.fit(
            train_set, epochs, batch_size, test_set, on_epoch=lambda epoch, losses: bar.update()
        )
    seconds = time.perf_counter() - started
    print(
        f"{replicas} networks {' → '.join(map(str, sizes))} on {job.device}: {seconds:.1f} s, "
        f"{replicas / seconds:.2f} a second"
    )
    print(f"{'network':>7} {'seed':>5} {'lr':>9} {'loss':>9} {'test accuracy':>14}")
    for row in rows[:top]:
        print(
            f"{row.replica:>7} {row.seed:>5} {row.lr:>9.4g} {row.train_loss:>9.4f} "
            f"{row.test_accuracy:>14.2%}"
        )
    print(
        f"mean of all networks' probabilities: test accuracy {job.ensemble_accuracy(test_set):.2%}"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "sweep.jsonl").write_text(
            "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        )
        job.save(out)


@app.command("recipes")
def list_recipes():
    """The networks and settings that --recipe knows."""
    for name, recipe in recipes.RECIPES.items():
        print(f"{name:<12} {recipe.about}")


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    packages = ("handgrad", "torch", "triton", "numpy", "torchvision", "scikit-learn")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@app.command()
def info():
    """Versions, the GPU, which path each operation takes, and a self-check of every kernel."""
    from kernels import selfcheck

    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    if Path(kernels.__file__).parent.parent != Path(__file__).parent.parent:
        print(f"warning: `kernels` is imported from {kernels.__file__}, which is not handgrad's")
    device = pick_device("auto")
    cpu = f"cpu, {torch.get_num_threads()} threads"
    print(f"device {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        path = kernels.path(torch.empty(0, device=device, dtype=dtype))
        print(
            f"{dtype}: {', '.join(kernels.OPERATIONS)} by "
            f"{'Triton kernels' if path == 'triton' else 'the torch reference'}"
        )
    print(
        "self-check: kernels "
        + ("on the GPU" if device.type == "cuda" else "in Triton's interpreter")
        + " against float64"
    )
    passed, text = selfcheck.run()
    print(text)
    if not passed:
        raise ValueError(
            "self-check failed: a kernel errs more than twice as much as plain torch; see the table"
        )
