"""Errors come before any work, name both values and say what to do. Kernels and reference raise the
same ones.
"""

import pytest
import torch

import kernels
from kernels.operations import Make

make = Make("cpu")
x, w, b = make.real(32, 784), make.real(100, 784), make.real(100)
logits, labels, image = make.real(32, 10), make.labels(10, 32), make.real(2, 10, 3)
photo = make.real(2, 2, 8, 8)

# label -> (call, what the message must say)
ERRORS = {
    "in features": (
        lambda: kernels.linear(x, make.real(10, 128)),
        r"linear: input has 784 features \(its shape is \(32, 784\)\), "
        r"but weight \(10, 128\) takes 128$",
    ),
    "weight's dimensions": (
        lambda: kernels.linear(x, b),
        r"weight must be \(out, in\).*got \(100,\)",
    ),
    "input without dimensions": (
        lambda: kernels.linear(x[0, 0], w),
        r"linear: input must be \(…, 784\), got a tensor without dimensions",
    ),
    "bias": (
        lambda: kernels.linear(x, w, b[:3]),
        r"linear: bias must be \(100,\) as weight is \(100, 784\), got \(3,\)",
    ),
    "mixed precision": (
        lambda: kernels.linear(x, w.half()),
        r"linear: weight must be torch\.float32 as input is, got torch\.float16; "
        r"convert one of them",
    ),
    "device": (
        lambda: kernels.linear(x, w.to("meta")),
        r"weight must be on cpu as input is, got meta; move one of them",
    ),
    "integers": (
        lambda: kernels.linear(labels[None], labels[None]),
        r"must be floating point, got torch\.int64; .*\.float\(\)",
    ),
    "activation": (
        lambda: kernels.linear(x, w, b, "swish"),
        r"linear: unknown activation 'swish'; known: identity, relu",
    ),
    "no layers": (lambda: kernels.mlp(x, []), r"as many biases .* at least one, got 0 weights"),
    "biases": (lambda: kernels.mlp(x, [w, w], [b]), r"got 2 weights and 1 biases"),
    "widths": (
        lambda: kernels.mlp(x, [w, make.real(10, 99)]),
        r"mlp: weight 1 must be \(out, 100\) after weight 0 \(100, 784\), got \(10, 99\)",
    ),
    "a later bias": (
        lambda: kernels.mlp(x, [w, make.real(10, 100)], [b, make.real(1)]),
        r"mlp, layer 1: bias must be \(10,\) as weight is \(10, 100\), got \(1,\)",
    ),
    "first width": (
        lambda: kernels.mlp(x, [make.real(5, 7)]),
        r"mlp: input has 784 features .* weight \(5, 7\) takes 7$",
    ),
    "stack's activation": (
        lambda: kernels.mlp(x, [w], activation="swish", output_activation="swish"),
        "unknown activation",
    ),
    "labels' shape": (
        lambda: kernels.cross_entropy(logits, labels[:3]),
        r"cross_entropy: target must be labels \(32,\) for logits \(32, 10\), got \(3,\)",
    ),
    "image labels' shape": (
        lambda: kernels.cross_entropy(image, labels[:2]),
        r"labels \(2, 3\) for logits \(2, 10, 3\), got \(2,\)",
    ),
    "probabilities' shape": (
        lambda: kernels.cross_entropy(logits, logits[:, :9]),
        r"class probabilities \(32, 10\) for logits \(32, 10\), got \(32, 9\)",
    ),
    "probabilities' dtype": (
        lambda: kernels.cross_entropy(logits, logits.double()),
        r"target must be torch\.float32 as input is",
    ),
    "boolean target": (
        lambda: kernels.cross_entropy(logits, labels > 3),
        r"integer labels or .* got torch\.bool",
    ),
    "ignored probabilities": (
        lambda: kernels.cross_entropy(logits, logits, ignore_index=3),
        r"ignore_index is for labels.* got 3",
    ),
    "reduction": (
        lambda: kernels.cross_entropy(logits, labels, reduction="max"),
        r"cross_entropy: unknown reduction 'max'; known: none, mean, sum",
    ),
    "class weights": (
        lambda: kernels.cross_entropy(logits, labels, make.real(9)),
        r"weight must be \(10,\), one for each class, got \(9,\)",
    ),
    "integer logits": (
        lambda: kernels.cross_entropy(labels, labels),
        r"must be floating-point logits .* got torch\.int64 \(32,\)",
    ),
    "label": (
        lambda: kernels.cross_entropy(logits, labels + 5),
        r"target\[\d+\] is 1\d, but there are 10 classes: labels are 0 to 9",
    ),
    "flatten": (
        lambda: kernels.linear_cross_entropy(x[None], w, b, labels),
        r"linear_cross_entropy: input must be \(N, in\), got \(1, 32, 784\); flatten",
    ),
    "its weight": (
        lambda: kernels.linear_cross_entropy(x, w[:, :3], b, labels),
        r"linear_cross_entropy: input has 784 features .* weight \(100, 3\) takes 3$",
    ),
    "its labels": (
        lambda: kernels.linear_cross_entropy(x, w, b, labels[:3]),
        r"labels \(32,\) for logits \(32, 100\), got \(3,\)",
    ),
    "squared error's shape": (
        lambda: kernels.mse_loss(x, w),
        r"mse_loss: target must be \(32, 784\) as input is, got \(100, 784\)",
    ),
    "squared error's reduction": (
        lambda: kernels.mse_loss(x, x, "max"),
        "mse_loss: unknown reduction 'max'",
    ),
    "squared error's dtype": (
        lambda: kernels.mse_loss(x, x.half()),
        r"target must be torch\.float32 as input is",
    ),
    "squared error of integers": (
        lambda: kernels.mse_loss(labels, labels),
        r"mse_loss: input must be floating point, got torch\.int64; .*\.float\(\)",
    ),
    "sparse input": (
        lambda: kernels.linear(x.to_sparse(), w),
        r"linear: input must be dense, got torch\.sparse_coo; convert it with \.to_dense\(\)",
    ),
    "groups": (
        lambda: kernels.conv2d(photo, photo[:, :1, :3, :3], groups=2),
        r"groups must be 1, got 2; call it once for each",
    ),
    "no window": (
        lambda: kernels.conv2d(photo, photo[..., :3, :3], max_pool=None),
        r"conv2d: max_pool must be an integer of at least 1, or two \(height, width\), got None",
    ),
    "large window": (
        lambda: kernels.conv2d(photo, photo[..., :3, :3], max_pool=(2, 7)),
        r"max_pool of 2 × 7 must fit in the convolution's output of 6 × 6",
    ),
    "gradients": (lambda: kernels.sgd([w], [], [], 0.1), "sgd: 1 parameters but 0 gradients"),
    "gradient's shape": (
        lambda: kernels.adam([w], [b], [w], [w], 1, 0.1),
        r"adam: gradient 0 must be \(100, 784\) as its parameter is, got \(100,\)",
    ),
    "buffer's shape": (
        lambda: kernels.sgd([w], [w], [b], 0.1, 0.9),
        r"sgd: each state of parameter 0 must be \(100, 784\) as the parameter is, got \(100,\)",
    ),
    "second moment's shape": (
        lambda: kernels.adam([w], [w], [w], [w[:1]], 1, 0.1),
        r"adam: each state of parameter 0 must be \(100, 784\).*, got \(1, 784\)",
    ),
    "state's shape": (
        lambda: kernels.apply_rule("lion", [b], [b], [[b[:3]]], kernels.row_of("lion")),
        r"lion: each state of parameter 0 must be \(100,\) as the parameter is, got \(3,\)",
    ),
    "sparse gradient": (
        lambda: kernels.sgd([w], [w.to_sparse()], [w], 0.1),
        r"sgd: gradient 0 must be dense and real, got torch\.sparse_coo, .*; use torch\.optim",
    ),
    "complex gradient": (
        lambda: kernels.adam([w], [w + 1j], [w], [w], 1, 0.1),
        r"gradient 0 must be dense and real.*complex64",
    ),
}


@pytest.mark.parametrize("backend", ["torch", None], ids=["reference", "kernels"])
@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_message(call, message, backend):
    kind = IndexError if "classes: labels" in message else ValueError
    if backend is None:
        with pytest.raises(kind, match=message):
            call()
    else:
        with kernels.use(backend), pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kernels.cross_entropy(x, [0, 1]),
        lambda x: kernels.linear(x, [[1.0]]),
        lambda x: kernels.mse_loss(x, [0.0, 1.0]),
        lambda x: kernels.layer_norm(x, 3, [1.0, 1.0, 1.0]),
        lambda x: kernels.mlp(x, [[1.0]], [None]),
    ],
)
def test_lists_are_no_tensors(call):
    with pytest.raises(TypeError, match="got list; convert it with"):
        call(torch.ones(2, 3))
