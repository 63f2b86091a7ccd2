"""How runs fare, one line each: `python tools/status.py runs/instruct [runs/...]`.

Exit status 0: all run, have stopped to go on, or are finished. 1: one has failed, ended by a fault, has fallen silent or has no status.
"""

import argparse
import json
import sys

from htc_megatron.cluster.status import STALE, line, read, silent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="OUTPUT_DIR", help="output_dir of a run")
    parser.add_argument("--json", action="store_true", help="print a list of what is known instead of lines")
    parser.add_argument("--stale", type=float, default=STALE, help="seconds without a word that are too many (default %(default)s)")
    options = parser.parse_args()
    bad, known = 0, []
    for folder in options.runs:
        said = read(folder)
        if said is None:
            bad += 1
            known.append({"output_dir": folder, "state": "unknown"})
            if not options.json:
                print(f"{folder}: no status.json that can be read: no run has begun there, or its disk is lost")
            continue
        quiet = silent(said, options.stale)
        bad += said.get("state") in ("failed", "fault") or quiet > 0
        known.append({"output_dir": folder} | said | {"silent_s": round(quiet)})
        if not options.json:
            print(line(folder, said, options.stale))
    if options.json:
        print(json.dumps(known, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
