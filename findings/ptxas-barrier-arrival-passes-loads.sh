#!/bin/sh
# ptxas 12.9 (of the package triton 3.9.0), sm_90a: loads from shared memory, then an arrival at an mbarrier.
#
# Expected: an arrival with release semantics, by which a consumer says that a stage may be overwritten, comes after the
# consumer's loads of it have their values.
# Seen: the machine code waits for none of the loads before `SYNCS.ARRIVE` (no bit of its wait mask is set, and neither of
# those between); only the additions that use the values wait. Loads that queue behind stores to global memory can so take
# longer than the next bulk copy into the same stage, and read what that brings: on an H200 such a kernel had wrong rows
# in a quarter of its launches, of which compute-sanitizer's racecheck showed nothing. With `fence.proxy.async` before the
# arrival, which PTX asks for between accesses of threads and of the copy engine, a `MEMBAR` and a `FENCE.VIEW.ASYNC` come
# first, and the arrival waits for them.
#
# Needs no GPU. Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --no-deps --target "$folder" triton==3.9.0
tools=$folder/triton/backends/nvidia/bin
cat > "$folder/plain.ptx" <<'PTX'
.version 8.0
.target sm_90a
.address_size 64
.visible .entry consume(.param .u64 out, .param .u32 stage, .param .u32 barrier)
{
    .reg .b64 %rd<2>; .reg .b64 %state; .reg .b32 %r<5>; .reg .f32 %f<8>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [stage];
    ld.param.u32 %r2, [barrier];
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r3, 8, %r1;
    mad.wide.u32 %rd1, %r3, 4, %rd1;
    ld.shared.v2.f32 {%f1, %f2}, [%r4];
    ld.shared.v2.f32 {%f3, %f4}, [%r4+256];
    // here
    mbarrier.arrive.release.cta.shared::cta.b64 %state, [%r2];
    add.f32 %f5, %f1, %f2;
    add.f32 %f6, %f3, %f4;
    add.f32 %f7, %f5, %f6;
    st.global.f32 [%rd1], %f7;
    ret;
}
PTX
sed 's|// here|fence.proxy.async.shared::cta;|' "$folder/plain.ptx" > "$folder/fenced.ptx"
for name in plain fenced; do
    "$tools/ptxas" -arch sm_90a "$folder/$name.ptx" -o "$folder/$name.cubin"
    "$tools/cuobjdump" -sass "$folder/$name.cubin" > "$folder/$name.sass" 2> "$folder/warnings"
done
"$tools/ptxas" --version | grep release
cat > "$folder/waits.py" <<'PYTHON'
import re
import sys


def instructions(path):
    """(name, scoreboard it sets or None, those it waits for); 7 is none, bits 46 to 48 and 52 to 57 of the second word."""
    text = open(path).read()
    found = []
    for name, word in re.findall(r"/\*[0-9a-f]{4}\*/\s+(.*?);.*?\n\s+/\* 0x([0-9a-f]{16}) \*/", text):
        bits = int(word, 16)
        sets = bits >> 46 & 7
        found.append((name.split()[0], None if sets == 7 else sets, {i for i in range(6) if bits >> 52 + i & 1}))
    return found


def loads_in_flight(path):
    """What of the loads before the arrival nothing has waited for when it is issued, and what stands between."""
    flying, between = set(), []
    for name, sets, waits in instructions(path):
        flying -= waits
        if name.startswith("LDS"):
            flying.add(sets)
            between.clear()
        elif name.startswith("SYNCS.ARRIVE"):
            return len(flying), between
        else:
            between.append(name)
    raise SystemExit(f"{path}: no arrival")


plain, fenced = loads_in_flight(sys.argv[1]), loads_in_flight(sys.argv[2])
print(f"without a fence: {plain[0]} of 2 loads in flight at the arrival, between them {plain[1]}")
print(f"with a fence: between them {fenced[1]}")
fences = [name for name in fenced[1] if name.startswith(("MEMBAR", "FENCE.VIEW.ASYNC"))]
sys.exit(0 if plain == (2, []) and len(fences) == 2 else 1)
PYTHON
python3 "$folder/waits.py" "$folder/plain.sass" "$folder/fenced.sass"
