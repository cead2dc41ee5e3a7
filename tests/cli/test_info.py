"""`pab info`."""

import re

import pytest
import torch

from tests.cli_tools import pab, refused


def test_info_names_versions_and_backends():
    output = pab("info")
    for word in ("torch", "gpu", "residual_norm_modulate", "temporal_attention"):
        assert word in output


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [
        (["--model", "open_sora", "--resolution", "480p", "--duration", "8s"], "112 slots .* 45.9"),
        (["--model", "open_sora", "--resolution", "480p", "--pab", "off"], "0 slots .* 0.0"),
        (["--model", "latte", "--prompts", "2"], "84 slots .* 11.8"),
        (["--model", "open_sora_plan", "--size", "29x480p"], "64 slots .* 5.3"),
        (["--model", "open_sora_plan", "--size", "65x512x512", "--dtype", "float32"], "84 slots .* 12.6"),
        (["--model", "open_sora", "--resolution", "480p", "--cache-device", "cpu"], "staging of 112 slots .* 0.5"),
        (["--model", "open_sora", "--resolution", "480p", "--cache-device", "cpu"], "slots in host memory .* 11.5"),
        (["--model", "open_sora", "--resolution", "480p", "--cache-dtype", "int8"], "112 slots .* 5.8"),
    ],
)
def test_info_tells_memory(arguments, slots):
    output = pab("info", *arguments)
    assert re.search(slots, output)
    assert all(part in output for part in ("weights", "keys and values", "activations", "all"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "demo"], "model: got 'demo'"),
        (["--model", "opensora"], "model: got 'opensora'"),
        (["--model", "open_sora", "--resolution", "481p"], "resolution: got '481p'"),
        (["--model", "open_sora", "--size", "29x480p"], "size: got '29x480p' for open_sora"),
        (["--model", "latte", "--pab", "nothing"], "pab: got 'nothing'"),
        (["--model", "latte", "--dtype", "int8"], "dtype: got 'int8'"),
        (["--model", "latte", "--cache-device", "disk"], "cache_device: got 'disk', must be cpu or cuda"),
        (["--model", "latte", "--cache-dtype", "fp4"], "cache_dtype: got 'fp4', must be null or one of fp8, int8"),
    ],
)
def test_info_refuses(arguments, message):
    assert message in refused("info", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_tells_what_would_run_in_fp8():
    output = pab("info", "--model", "latte", "--linear-precision", "fp8")
    assert re.search(r"Not timed here: linear_precision: got fp8, .* fp8 GEMMs need a CUDA GPU, got cpu", output)
    weights = [re.search(r"weights +│ +(\d\.\d)", text) for text in (output, pab("info", "--model", "latte"))]
    assert [match and match[1] for match in weights] == ["2.8", "2.0"], "QKV, text queries and MLPs twice"


@pytest.mark.parametrize(
    ("arguments", "weights", "piece"),
    [
        (["--model", "open_sora", "--resolution", "480p"], 1.1, 3.9),
        (["--model", "open_sora", "--resolution", "480p", "--decode-memory", "2GiB"], 1.1, 1.9),
        (["--model", "latte"], 0.3, 3.8),
        (["--model", "open_sora_plan", "--size", "93x480p"], 0.7, 8.5),
        (["--model", "open_sora_plan", "--size", "65x512x512", "--decode-memory", "4GiB"], 0.7, 2.8),
    ],
    ids=str,
)
def test_info_counts_the_decoders_memory(arguments, weights, piece):
    found = re.search(r"decoder adds (\d+\.\d) of weights.* (\d+\.\d) for its largest piece", pab("info", *arguments))
    assert found is not None
    assert float(found[1]) == pytest.approx(weights, abs=0.06)
    assert float(found[2]) == pytest.approx(piece, abs=0.06)


def test_info_refuses_a_bound_that_no_piece_fits():
    arguments = ("info", "--model", "open_sora", "--resolution", "480p", "--decode-memory", "100MiB")
    assert "decode_memory: got 100 MiB, must be at least" in refused(*arguments)
