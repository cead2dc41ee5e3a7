"""Tiny models for the command line."""

import pytest
import torch

from pab_kernels.models import autoencoders, checkpoints
from pab_kernels.pipelines import sizes
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.pipelines.demo_text import TextEmbedding
from tests.pipeline_tools import TINY
from tests.vae_tools import TINY_VAE


@pytest.fixture
def tiny(monkeypatch):
    """Every family at toy width, and one more size of Open-Sora-Plan."""
    torch.set_num_threads(1)
    for family, config in TINY.items():
        monkeypatch.setitem(checkpoints.FULL_SIZE, family, {**checkpoints.FULL_SIZE[family], **config})
        if family in sizes.PLAN_SIZES:
            monkeypatch.setitem(sizes.PLAN_SIZES[family], "17x64", (17, 64, 64))
        if family in TINY_VAE:
            whole = {**autoencoders.FULL_SIZE[family], **TINY_VAE[family]}
            monkeypatch.setitem(autoencoders.FULL_SIZE, family, whole)
    monkeypatch.setattr(autoencoders, "IMAGES", {**autoencoders.IMAGES, **TINY_VAE["open_sora"]["spatial"]})


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with an untrained demo model: 5 frames of 16 x 16 pixels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformer = demo_transformer(pairs=1, heads=1, size=16, frames=5)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    folder = tmp_path_factory.mktemp("demo")
    DemoPipeline(transformer, demo_scheduler(), TextEmbedding()).save_pretrained(folder)
    return folder
