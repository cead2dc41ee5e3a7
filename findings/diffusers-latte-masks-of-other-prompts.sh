#!/bin/sh
# diffusers 0.42.1, LattePipeline with several prompts and num_images_per_prompt above 1.
#
# Expected: the text embeddings of a prompt are masked by that prompt's own padding: a token counts if it is the
# prompt's, and is zero if it is padding.
# Seen: the embeddings are repeated prompt by prompt (a, a, b, b), their masks as a whole (a, b, a, b). The second video
# of the first prompt has the mask of the second prompt, and the other way round: words are zeroed, padding is kept.
#
# Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" diffusers==0.42.1 torch==2.13.0 transformers==5.24.0 tokenizers
PYTHONPATH="$folder" python3 - <<'PYTHON'
import sys

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

torch.manual_seed(0)
words = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "a", "cat", "on", "the", "hill"])}, "<pad>"))
words.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<pad>", eos_token="<pad>")
encoder = T5EncoderModel(T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()
transformer = LatteTransformer3DModel(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    cross_attention_dim=16,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    caption_channels=8,
    video_length=2,
)
pipe = LattePipeline(tokenizer, encoder, AutoencoderKL(), transformer, DDIMScheduler())

prompts = ["a cat on the hill", "a cat"]
with torch.no_grad():
    text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, num_images_per_prompt=2)
kept = [int(row.abs().sum(-1).ne(0).sum()) for row in text]
print("words of the prompts, two videos each:", [5, 5, 2, 2])
print("tokens that are not masked:           ", kept)
if kept != [5, 2, 5, 2]:
    sys.exit("this has changed")
PYTHON
