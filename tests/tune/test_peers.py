"""What other ways to leave out work are given of the model."""

import torch

from pab_kernels.tune.cache_dit_peer import paired
from tests.latte_tools import call, inputs, tiny_latte


def test_pairs_of_blocks_are_the_model():
    model = tiny_latte(layers=3)
    latents, text = inputs()
    expected = call(model, latents, text, 500.0)
    twin = paired(model)
    twin.forward = lambda *args, **kwargs: type(model).forward(twin, *args, enable_temporal_attentions=False, **kwargs)
    assert torch.equal(call(twin, latents, text, 500.0), expected)
    assert len(list(twin.parameters())) == len(list(model.parameters())), "the weights are shared"
    assert torch.equal(call(model, latents, text, 500.0), expected), "the model is as it was"
