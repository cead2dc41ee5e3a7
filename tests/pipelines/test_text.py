"""Text encoders."""

import pytest
import torch

from pab_kernels.pipelines.text import RandomText, clean_prompt


def test_prompts_are_cleaned():
    assert clean_prompt("  A &amp; B\n C ") == "a & b c"


def test_random_text_depends_on_the_prompt_alone():
    text = RandomText(8)
    embeddings, mask = text.encode(["a cat", "a red dog"], 10)
    assert torch.equal(text.encode(["a red dog"], 10)[0][0], embeddings[1])
    assert mask.sum(1).tolist() == [3, 4]
    with pytest.raises(ValueError, match="has 3 tokens, must have at most 2"):
        text.encode(["a cat"], 2)
