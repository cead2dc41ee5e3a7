"""LoRA layers around linears: refused by name with what to do, whether fused or not; taken once they are merged."""

from typing import Any

import pytest
import torch

from pab_kernels import PABConfig, accelerate
from tests.latte_tools import call, inputs, tiny_latte

peft = pytest.importorskip("peft")


def wrapped(model: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("fused", [False, True])
def test_wrappers_are_refused_by_name(fused):
    model = tiny_latte()
    lora = wrapped(model)
    if fused:
        lora.merge_adapter()
    with pytest.raises(TypeError, match=r"to_q: is a Linear of peft\..*unload_lora_weights\(\), in peft merge_and_unl"):
        accelerate(model, PABConfig())


def test_merged_layers_are_plain_again():
    model, latents = tiny_latte(), inputs()
    model = wrapped(model).merge_and_unload()
    expected = call(model, *latents, 500.0)
    with accelerate(model, PABConfig()) as handle:
        handle.begin([500.0])
        torch.testing.assert_close(call(model, *latents, 500.0), expected, atol=1e-4, rtol=1e-4)
