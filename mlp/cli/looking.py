"""`data`: describes a data set before a training."""

from pathlib import Path

from ..data import describe
from ..data.dataset import require
from .options import Values
from .setup import load
from .terminal import check_folder, say


def data(values: Values) -> None:
    """Print a description of a data set, and draw it on request."""
    folder = values["out"] or Path()
    if values["plots"]:
        require("matplotlib", "matplotlib", "--plots")
        check_folder(folder, "--out ")
    elif values["out"] is not None:
        raise ValueError("--out is the folder of the pictures that --plots draws; give both")
    read = load(values)
    train, test = read.train, read.test
    for line in describe.page(train, test, read.table):
        say(line)
    if not values["plots"]:
        return
    from ..data import sheets

    if read.table is not None:
        train, test = map(read.table.in_own_units, (train, test))
    for path in sheets.write(train, test, folder):
        say(path)
