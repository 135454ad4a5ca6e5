"""Mixed precision for autograd: products in 16 bits, weights and their update in float32.

fp32    the network's own dtype, without autocast
bf16    torch.autocast: weights stay float32, products take bfloat16
fp16    the same with float16, and the loss is scaled so that small gradients do not vanish. If a
        gradient overflows, the step is skipped and the scale is halved.
"""

import contextlib
from collections.abc import Sequence

import torch

_TINY = 1e-6  # added to a norm before a division, as torch does, because the norm may be 0
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def clip(grads: Sequence[torch.Tensor | None], limit: float) -> None:
    """Scale gradients in place so that the norm of all together is at most `limit`.

    The result is that of `torch.nn.utils.clip_grad_norm_`.
    """
    given = [grad for grad in grads if grad is not None]
    if not given:
        return
    norm = torch.nn.utils.get_total_norm(given)
    torch._foreach_mul_(given, (limit / (norm + _TINY)).clamp(max=1.0))


def _clip_of(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Clip .grad of the optimizer's parameters."""
    clip([p.grad for group in optimizer.param_groups for p in group["params"]], limit)


class Precision:
    """The precision of a step. `skipped` counts the steps that were skipped after an overflow.

    name: a key of PRECISIONS, else ValueError. device_type: "cpu", "cuda", …
    """

    def __init__(self, name: str = "fp32", device_type: str = "cpu"):
        if name not in PRECISIONS:
            raise ValueError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}")
        self.name, self.dtype, self.skipped = name, PRECISIONS[name], 0
        is_scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device_type) if is_scaled else None

    def refuses(self, parameters: dict[str, torch.Tensor]) -> str | None:
        """The reason why weights of these dtypes cannot be trained in this precision, or None."""
        other = [p.dtype for p in parameters.values() if p.dtype != torch.float32]
        if self.dtype is None or not other:
            return None
        return (
            f"precision {self.name!r} keeps float32 weights, but the network has {other[0]}; "
            "give it as float32 (model.float()), or train it in its own dtype with precision "
            "'fp32'"
        )

    def context(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context in which forward and loss run."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def step(
        self,
        value: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None = None,
    ) -> None:
        """Run the backward from the loss, then the optimizer's step unless a gradient overflowed.

        clip_norm: the largest norm of all gradients together, or None.
        """
        if self.scaler is None:
            value.backward()
            if clip_norm is not None:
                _clip_of(optimizer, clip_norm)
            optimizer.step()
            return
        self.scaler.scale(value).backward()
        if clip_norm is not None:
            self.scaler.unscale_(optimizer)
            _clip_of(optimizer, clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self.skipped += 1
            vars(optimizer)["_opt_called"] = True  # torch's schedulers check that a step was taken

    def state_dict(self) -> dict:
        """The scale of the loss and the count of skipped steps."""
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return {"name": self.name, "skipped": self.skipped, "scaler": scaler}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict` of this precision. That of another precision has no effect."""
        if state["name"] == self.name:
            self.skipped = state["skipped"]
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
