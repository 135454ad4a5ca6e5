"""handgrad's operations: Triton kernels with hand-written backward passes.

Each has a reference in plain torch.

`kernels.linear` is the function. The module that defines it is `kernels.ops.linear`, so
`import kernels.linear` is an error. No name in this package is both a function and a module.
"""

from . import compiled_optim  # noqa: F401  importing it registers the operators of torch.compile
from .activations import ACTIVATIONS, Activation
from .launch import backend, path, use
from .losses import LOSSES, Loss
from .operations import OPERATIONS
from .ops.conv import conv2d, conv2d_fwd, conv2d_fwd_ref
from .ops.conv_bwd import conv2d_bwd, conv2d_bwd_ref
from .ops.cross_entropy import (
    check_labels,
    check_range,
    cross_entropy,
    cross_entropy_bwd,
    cross_entropy_bwd_ref,
    cross_entropy_fwd,
    cross_entropy_fwd_ref,
)
from .ops.elementwise_loss import (
    binary_cross_entropy_with_logits,
    elementwise_loss,
    elementwise_loss_bwd,
    elementwise_loss_bwd_ref,
    elementwise_loss_fwd,
    elementwise_loss_fwd_ref,
    huber_loss,
    mse_loss,
    pinball_loss,
)
from .ops.layer_norm import (
    layer_norm,
    layer_norm_bwd,
    layer_norm_bwd_ref,
    layer_norm_fwd,
    layer_norm_fwd_ref,
)
from .ops.linear import (
    linear,
    linear_bwd,
    linear_bwd_dw,
    linear_bwd_dx,
    linear_bwd_dz,
    linear_bwd_ref,
    linear_fwd,
    linear_fwd_ref,
)
from .ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_bwd,
    linear_cross_entropy_bwd_ref,
    linear_cross_entropy_fwd,
    linear_cross_entropy_fwd_ref,
)
from .ops.mlp import mlp, mlp_bwd, mlp_bwd_ref, mlp_fwd, mlp_fwd_ref
from .ops.mlp_update import mlp_update, mlp_update_ref
from .ops.optim import adam, adam_ref, apply_rule, apply_rule_ref, check_update, sgd, sgd_ref
from .rules import RULES, Rule, hyperparameters, row_of
from .training import (
    Run,
    Spec,
    StepState,
    flush,
    outgrown,
    refusal,
    train_epoch,
    train_epoch_ref,
    train_replicas,
    train_replicas_ref,
    train_step,
)

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "OPERATIONS",
    "RULES",
    "Activation",
    "Loss",
    "Rule",
    "Run",
    "Spec",
    "StepState",
    "adam",
    "adam_ref",
    "apply_rule",
    "apply_rule_ref",
    "backend",
    "binary_cross_entropy_with_logits",
    "check_labels",
    "check_range",
    "check_update",
    "conv2d",
    "conv2d_bwd",
    "conv2d_bwd_ref",
    "conv2d_fwd",
    "conv2d_fwd_ref",
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_bwd_ref",
    "cross_entropy_fwd",
    "cross_entropy_fwd_ref",
    "elementwise_loss",
    "elementwise_loss_bwd",
    "elementwise_loss_bwd_ref",
    "elementwise_loss_fwd",
    "elementwise_loss_fwd_ref",
    "flush",
    "huber_loss",
    "hyperparameters",
    "layer_norm",
    "layer_norm_bwd",
    "layer_norm_bwd_ref",
    "layer_norm_fwd",
    "layer_norm_fwd_ref",
    "linear",
    "linear_bwd",
    "linear_bwd_dw",
    "linear_bwd_dx",
    "linear_bwd_dz",
    "linear_bwd_ref",
    "linear_cross_entropy",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_bwd_ref",
    "linear_cross_entropy_fwd",
    "linear_cross_entropy_fwd_ref",
    "linear_fwd",
    "linear_fwd_ref",
    "mlp",
    "mlp_bwd",
    "mlp_bwd_ref",
    "mlp_fwd",
    "mlp_fwd_ref",
    "mlp_update",
    "mlp_update_ref",
    "mse_loss",
    "outgrown",
    "path",
    "pinball_loss",
    "refusal",
    "row_of",
    "sgd",
    "sgd_ref",
    "train_epoch",
    "train_epoch_ref",
    "train_replicas",
    "train_replicas_ref",
    "train_step",
    "use",
]
