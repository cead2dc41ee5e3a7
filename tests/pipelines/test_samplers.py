"""Open-Sora's sampler."""

import pytest
import torch

from pab_kernels.pipelines.samplers import RFlowScheduler, rflow_timesteps


def test_rflow_follows_a_straight_line_from_noise_to_data():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(7, 480, 854, 15)
    noise, data = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    state = noise
    for t in scheduler.timesteps:
        state = scheduler.step(data - noise, t, state)
        assert torch.allclose(scheduler.scale_model_input(state, t), state)
    assert torch.allclose(state, data)


def test_rflow_makes_new_timesteps_for_each_run():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(5, 144, 256, 15)
    first = scheduler.timesteps
    scheduler.set_timesteps(5, 144, 256, 15)
    assert scheduler.timesteps is not first
    assert scheduler.timesteps.tolist() == pytest.approx(rflow_timesteps(5, 144, 256, 15))
    with pytest.raises(ValueError, match="must be one of the run's 5 timesteps"):
        scheduler.step(torch.zeros(1), 3.0, torch.zeros(1))
