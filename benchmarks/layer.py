"""All sweeps of `sparsegate bench`, and their picture.

    python -m benchmarks.layer

Writes `benchmarks/results/layer.json`, `tokens.json` and `small-batch.json`, and `docs/images/layer.svg` from
the first two. `--sweeps` names those to run; with none of them it makes the picture alone.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import RESULTS
from sparsegate.benchmarking.plot import draw
from sparsegate.cli.main import main as sparsegate

SWEEPS = ["layer", "tokens", "small-batch"]
PICTURE = Path(__file__).parent.parent / "docs/images/layer.svg"


def main() -> int:
    args = _arguments()
    common = ["--out", str(RESULTS), "--threads", str(args.threads), "--repeats", str(args.repeats)]
    common += [] if args.davidmrau is None else ["--davidmrau", str(args.davidmrau)]
    for sweep in args.sweeps:
        code = sparsegate(["bench", sweep, *common])
        if code:
            return code
    draw([json.loads((RESULTS / f"{sweep}.json").read_text()) for sweep in ("layer", "tokens")], [PICTURE])
    print(PICTURE)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", nargs="*", choices=SWEEPS, default=SWEEPS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--davidmrau", type=Path, help="moe.py of davidmrau/mixture-of-experts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
