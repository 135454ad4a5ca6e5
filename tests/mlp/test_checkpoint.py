"""Checkpoints: a saved model loads again, a bad file changes nothing, and a failed write leaves the
old file.
"""

import copy
import json
import os
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

import mlp
from mlp import MLP, ConvNet, Net
from mlp.runs.disk import CheckpointError
from tests.checks import assert_equal

SIZES = (6, 5, 3)
MODELS = {
    "MLP": lambda: MLP(SIZES, "gelu", "sigmoid", bias=False),
    "bfloat16": lambda: MLP(SIZES, dtype=torch.bfloat16),
    "ConvNet": lambda: ConvNet((1, 8, 8), (2, 3), 3, 1, (6,), 5),
    "Net": lambda: Net(SIZES, "silu"),
}


def values(model):
    return list(mlp.engines.parameters_of(model).values())


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind, tmp_path, device):
    """`load` gives a module with the same description and weights, on the device asked for.
    safetensors can read the file, too.
    """
    model = MODELS[kind]()
    mlp.save(model, tmp_path / "w.safetensors")
    loaded = mlp.load(tmp_path / "w.safetensors", device)
    assert loaded.config() == model.config()
    assert_equal(
        [p.detach().cpu() for p in loaded.parameters()], [p.detach() for p in values(model)]
    )
    assert all(p.device.type == device for p in loaded.parameters())
    plain = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert list(plain) == sorted(mlp.engines.parameters_of(model))


def test_plain_state_dict(tmp_path):
    """A plain state_dict goes in by name where the names are the same. Else it goes in by order, as
    "0.weight", "2.weight" of an nn.Sequential.
    """
    sequential = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    torch.save(sequential.state_dict(), tmp_path / "sequential.pth")
    named = {name: p + 1 for name, p in reversed(MLP(SIZES).state_dict().items())}
    torch.save(named, tmp_path / "named.pth")
    safetensors.torch.save_file(named, tmp_path / "named.safetensors")
    for file in ("sequential.pth", "named.pth", "named.safetensors"):
        expected = (
            list(reversed(named.values()))
            if "named" in file
            else [p.detach() for p in sequential.parameters()]
        )
        for model in (MLP(SIZES), Net(SIZES)):
            assert mlp.load_weights(model, tmp_path / file) is model
            assert_equal([p.detach() for p in values(model)], expected)
    with pytest.raises(
        CheckpointError, match=r"no description of the network; use load_weights\(model, path\)"
    ):
        mlp.load(tmp_path / "named.safetensors")


def damaged(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def test_files_that_are_no_checkpoints(tmp_path):
    """An empty, cut or foreign file, or one of another network, is refused in one line that names
    it. The model keeps its weights.
    """
    model = MLP(SIZES)
    before = copy.deepcopy(model.state_dict())
    files = {}
    for name in ("empty", "cut", "other", "nested", "pickled", "shapes", "count"):
        files[name] = tmp_path / f"{name}.pth"
        torch.save(MLP(SIZES).state_dict(), files[name])
    files["gone"] = tmp_path / "gone.pth"
    damaged(files["empty"], 0)
    damaged(files["cut"], 0.5)
    files["other"].write_text("not that at all " * 20)
    torch.save({"model": model.state_dict()}, files["nested"])
    torch.save(model, files["pickled"])
    torch.save(MLP((6, 5, 4)).state_dict(), files["shapes"])
    torch.save(MLP((6, 5, 3, 3)).state_dict(), files["count"])
    for name, keep in (("empty", 0), ("cut", 0.5)):
        files[f"{name} safetensors"] = tmp_path / f"{name}.safetensors"
        mlp.save(model, files[f"{name} safetensors"])
        damaged(files[f"{name} safetensors"], keep)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            mlp.load(files[f"{name} safetensors"])
    other = r"another network: .*(has .*needs .*\(3, 5\)|\(4, 5\), needs \(3, 5\))"
    messages = {
        "gone": "no such checkpoint",
        "nested": "plain state_dict",
        "shapes": other,
        "count": other,
    }
    for name, path in files.items():
        with pytest.raises(
            CheckpointError, match=f"{path}: .*{messages.get(name, 'not .*readable')}"
        ) as error:
            mlp.load_weights(model, path)
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value), name
        assert_equal(list(model.state_dict().values()), list(before.values()))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        mlp.load(tmp_path / "gone")


def test_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    mlp.save(MLP(SIZES), path)
    content = path.read_bytes()

    def fail(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        mlp.save(MLP(SIZES), path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["w.safetensors"]


def test_names_that_differ_in_prefix_and_numbers(tmp_path):
    """Twelve layers load in order, although their names sort as 0, 10, 11, 1, …. So do names with a
    prefix, and fc1, fc2, ….
    """
    sizes = [3] * 13
    net = MLP(sizes, init="normal")
    expected = [p.detach() for p in net.parameters()]
    for rename in ("module.{}.{}", "net.layers.{}.{}", "fc{}.{}", "{}.{}"):
        state = {
            rename.format(2 * int(number) + 1, leaf): p.detach().clone()
            for number, leaf, p in ((*n.split("."), p) for n, p in net.named_parameters())
        }
        path = tmp_path / "w.safetensors"
        safetensors.torch.save_file(state, path)
        assert list(safetensors.torch.load_file(path)) != list(state), "the file sorts its names"
        for model in (MLP(sizes), Net(sizes)):
            mlp.load_weights(model, path)
            assert_equal([p.detach() for p in values(model)], expected)
    single = nn.Linear(4, 3)
    torch.save(single.state_dict(), tmp_path / "single.pth")
    assert mlp.load_weights(MLP([4, 3]), tmp_path / "single.pth")[0].weight.equal(single.weight)


@pytest.mark.parametrize(
    "names",
    [
        ("encoder.weight", "decoder.weight"),
        ("a.0.weight", "b.1.weight"),
        ("0.weight", "0.kernel"),
        ("0.weight", "00.weight"),
        ("0.weight", "1.weight", "2.weight"),
    ],
)
def test_names_without_an_order_are_refused(names, tmp_path):
    """The shapes fit, but the names do not say which layer is which. The error lists both sides."""
    torch.save({name: torch.randn(3, 3) for name in names}, tmp_path / "w.pth")
    model = MLP([3, 3, 3], bias=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"has {names[0]} .* needs 0.weight \(3, 3\), 1.w"):
        mlp.load_weights(model, tmp_path / "w.pth")
    assert_equal(list(model.state_dict().values()), list(before.values()))


def test_buffers_belong_to_the_network(tmp_path):
    """Running statistics and num_batches_tracked are loaded and saved with the weights. A tied
    weight may stand once for each of its names.
    """
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[3].weight = model[2].weight
    model(torch.randn(9, 4))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    mlp.save(model, tmp_path / "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3))
        other[3].weight = other[2].weight
        mlp.load_weights(other, tmp_path / file)
        assert int(other[1].num_batches_tracked) == 1
        assert_equal(list(other.state_dict().values()), list(model.state_dict().values()))


def test_a_file_of_a_gpu_loads_without_one(tmp_path):
    """A .pth whose tensors lay on cuda:0 loads on a CPU."""
    storage = torch.arange(6.0)
    torch.save({"0.weight": storage.view(2, 3)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "cuda.pth", "w") as archive:
        for name, content in parts.items():
            # pickle writes a text as its length in four bytes, then its letters
            moved = content.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            archive.writestr(name, moved)
            assert (moved != content) == name.endswith("data.pkl")
    model = mlp.load_weights(MLP([3, 2], bias=False), tmp_path / "cuda.pth")
    assert model[0].weight.equal(storage.view(2, 3))


def test_every_flipped_bit_is_noticed(tmp_path):
    """Any flipped bit, in header or numbers, makes a saved file refused. 200 random ones are
    tried.
    """
    path, model = tmp_path / "w.safetensors", MLP(SIZES)
    mlp.save(model, path)
    content, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for place in torch.randint(len(content) * 8, (200,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"w.safetensors: (damaged, |not a readable)"):
            mlp.load(path)


def described(path, state, description):
    safetensors.torch.save_file(state, path, {"handgrad": description})


def test_descriptions_of_the_wrong_kind(tmp_path):
    """A wrong description is refused in one line that names the file. No network is built from
    it.
    """
    path, good = tmp_path / "w.safetensors", MLP([4, 3]).config()
    state = {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)}
    described(path, state, json.dumps(good))
    assert mlp.load(path).config() == good
    huge = {"sizes": [10**15, 10**15]}
    for wrong in (
        *("abc", "{}", "null", "[]", "1", "[" * 10**5, '{"kind": "mlp"}', '{"kind": ["mlp"]}'),
        *({**good, **change} for change in (huge, {"sizes": [4, -3]}, {"sizes": "43"})),
        *({**good, **change} for change in ({"sizes": [4, 3.0]}, {"sizes": None}, {"bias": "no"})),
        *(
            {**good, **change}
            for change in ({"output_activation": "swish"}, {"kind": "rnn"}, {"x": 1})
        ),
        *({**good, **change} for change in ({"sizes": [4] * 10**4}, {"device": "cpu"})),
    ):
        described(path, state, wrong if isinstance(wrong, str) else json.dumps(wrong))
        with pytest.raises(CheckpointError, match=r"w.safetensors: .*(description|weights)"):
            mlp.load(path)


class Doubled(mlp.MLP):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_network_that_computes_something_else_is_saved_without_description(tmp_path):
    """`load` would build a network without the subclass's forward, or the object's own."""
    changed = mlp.MLP([4, 3])
    changed.forward = lambda x, forward=changed.forward: 2 * forward(x)
    for i, model in enumerate((Doubled([4, 3]), changed)):
        path = tmp_path / f"{i}.safetensors"
        mlp.save(model, path)
        with pytest.raises(
            CheckpointError, match=r"no description .*; use load_weights\(model, path\)"
        ):
            mlp.load(path)
        other = mlp.load_weights(mlp.MLP([4, 3]), path)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters()))


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"got \.st; use model\.safetensors"):
        mlp.save(mlp.MLP([4, 3]), tmp_path / "model.st")
