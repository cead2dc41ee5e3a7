import sys, functools
from pathlib import Path
import tempfile, torch
from tests.distributed.rank_tools import *
from tests.distributed.test_shares import all_of, alone

if __name__ == "__main__":
    fam, conf, g, f = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    fams = MODELS if fam == "all" else fam.split("+")
    cases = [Case(x, c, g, f) for x in fams for c in (CONFIGS if conf == "every" else [conf])]
    out = on_ranks(g * f, functools.partial(all_of, cases), Path(tempfile.mkdtemp()))
    for case in cases:
        want = alone(case.family, case.config)
        print(
            case,
            [float((o[str(case)].run - want.run).abs().max()) for o in out],
            [float((o[str(case)].again - want.run).abs().max()) for o in out],
            float(want.run.abs().max()),
        )
