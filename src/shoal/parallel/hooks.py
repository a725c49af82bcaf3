"""What a model does to its own parameters that parts of them cannot do.

weight.register_hook(lambda gradient: gradient / 2)      # lost where a part takes its place

refuse_hooks(dict(model.named_parameters()), "tp2")      # Refused: … has a hook
"""

from collections.abc import Mapping

from torch import Tensor, nn

from shoal.errors import Refused


def refuse_hooks(tensors: Mapping[str, Tensor], strategy: str) -> None:
    """Raise `Refused` for a parameter with a hook: parts take its place, which have none.

    A hook may look at the whole gradient (its norm, a mask over it), so that it cannot go along.
    """
    for name, tensor in tensors.items():
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise Refused(
                f"{strategy} cuts the parameter {name}, which has a hook (register_hook) that its "
                "parts would not have",
                hint="Scale the tensor in forward instead, give the parameter a learning rate of "
                "its own, or use dpN or ppN, which keep parameters whole.",
            )


def refuse_max_norm(model: nn.Module, replicas: int) -> None:
    """Raise `Refused` for an embedding whose forward pass changes the rows that it looks up.

    Each replica would change those of its own examples only, and weights would drift apart.
    """
    if replicas == 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise Refused(
                f"the embedding {name} has max_norm, which changes the rows that a replica looks "
                f"up and no others: the weights of {replicas} replicas would drift apart",
                hint="Leave max_norm out (normalise what is looked up instead), or use a strategy "
                "without dp (tpN, ppN).",
            )
