"""The parameters of a network that fine-tuning trains, and the layers that it freezes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from store.cache import PENULTIMATE
from store.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .settings import FineTuneOptions


def modules_before(network: Any, example: Any, freeze_until: str, last: str) -> list[Any]:
    """The modules of a network that start before a layer; the parameters that each holds directly are frozen.

    So a module around that layer counts for its own parameters (the class token of a ViT), and its children count
    separately. A module that is never called (the projection of an attention) is treated as the one around it.

    Args:
        freeze_until: name of the layer.
        last: name of the last classification layer; ``head`` and ``penultimate`` mean this layer.

    Raises:
        UsageError: there is no such layer, or it does not run.
    """
    import torch

    modules = dict(network.named_modules())
    call_order: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: call_order.append(name)) for n, m in modules.items()]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    until = last if freeze_until in ("head", PENULTIMATE) else freeze_until
    if not until or until not in call_order:
        stages = ", ".join(name for name, _ in network.named_children() if name in call_order)
        problem = "does not run in this network" if until in modules else "is no layer of this network"
        hint = did_you_mean(until, [*filter(None, call_order), "head"], f"it has {stages}, and head")
        message = f"--freeze-until {freeze_until!r} {problem}{hint}"
        raise UsageError(message)
    called, before = set(call_order), set(call_order[: call_order.index(until)])

    def caller(name: str) -> str:
        while name not in called:
            name = name.rpartition(".")[0]
        return name

    return [module for name, module in modules.items() if caller(name) in before]


def parameter_groups(features: Any, network: Any, head: Any, options: FineTuneOptions) -> list[dict[str, Any]]:
    """Parameter groups for the optimiser: the transferred ones that ``features`` depend on, and the head with a higher rate.

    All others get ``requires_grad`` False, the network's own classification layer among them.
    """
    import torch

    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if features.requires_grad:
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        used = [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    else:
        used = []
    network.requires_grad_(requires_grad=False)
    for parameter in used:
        parameter.requires_grad_()
    factor = options.head_lr_factor
    assert factor is not None  # `finetune` has filled it in
    return [{"params": used, "lr": options.lr}, {"params": list(head.parameters()), "lr": options.lr * factor}]
