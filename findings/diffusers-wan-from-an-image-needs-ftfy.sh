#!/bin/sh
# diffusers 0.42.1, WanImageToVideoPipeline without the package ftfy, which diffusers does not require.
#
# Expected: prompts are cleaned without ftfy, as WanPipeline does since it asks is_ftfy_available().
# Seen: cleaning a prompt raises NameError: name 'ftfy' is not defined. The import is guarded, its use is not; so in the
# image-to-video, video-to-video, VACE and Animate pipelines of Wan.
#
# Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" diffusers==0.42.1 torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
PYTHONPATH="$folder" python3 - <<'PYTHON'
import importlib
import importlib.util
import sys

if importlib.util.find_spec("ftfy") is not None:
    sys.exit("ftfy is installed beside this python3: run it in an environment without")
seen = {}
for name in ("pipeline_wan", "pipeline_wan_i2v", "pipeline_wan_video2video", "pipeline_wan_vace", "pipeline_wan_animate"):
    module = importlib.import_module(f"diffusers.pipelines.wan.{name}")
    try:
        seen[name] = repr(module.prompt_clean("a cat"))
    except NameError as error:
        seen[name] = f"NameError: {error}"
    print(f"{name:26} {seen[name]}")
broken = [name for name, what in seen.items() if what == "NameError: name 'ftfy' is not defined"]
if "pipeline_wan" in broken or broken != list(seen)[1:]:
    sys.exit("this has changed")
PYTHON
