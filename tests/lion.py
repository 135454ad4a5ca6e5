"""Lion by its paper, in plain torch. It is the oracle of `mlp.Lion`, because torch has no Lion."""

import torch


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023, line by line."""

    def __init__(
        self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False, foreach=None
    ):
        options = {"betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step, after the closure if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = torch.sign(beta1 * m + (1 - beta1) * g)
                p.sub_(lr * (update + decay * p))
                m.copy_(beta2 * m + (1 - beta2) * g)
        return loss


def oracle(cls):
    """torch's optimizer with the name of one of ours, or this Lion."""
    return getattr(torch.optim, cls.__name__, Lion)
