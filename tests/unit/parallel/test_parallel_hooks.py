"""What a model does to its own parameters that parts of them cannot do."""

import pytest
import torch
from torch import nn

from shoal.errors import Refused
from shoal.parallel.hooks import refuse_hooks, refuse_max_norm
from shoal.parallel.tensor import cut_model, plan
from shoal.trace import trace


def test_a_hook_on_a_parameter_that_is_cut_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    made = plan(trace(model, torch.randn(3, 4), 3), 2, model)
    model[0].weight.register_hook(lambda gradient: gradient / 2)
    with pytest.raises(Refused, match=r"tp2 cuts the parameter 0\.weight, which has a hook"):
        cut_model(made, model, 0)


def test_a_hook_after_accumulation_counts_and_none_is_fine() -> None:
    model = nn.Linear(4, 8)
    refuse_hooks(dict(model.named_parameters()), "zero3")
    model.bias.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(Refused, match="zero3 cuts the parameter bias"):
        refuse_hooks(dict(model.named_parameters()), "zero3")


def test_an_embedding_that_changes_what_it_looks_up_is_for_one_replica() -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 3, max_norm=1.0))
    refuse_max_norm(model, 1)
    refuse_max_norm(nn.Sequential(nn.Embedding(5, 3)), 2)
    with pytest.raises(Refused, match="the embedding 0 has max_norm"):
        refuse_max_norm(model, 2)
