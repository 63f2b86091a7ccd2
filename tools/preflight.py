"""Check a run's nodes, network, disk and paths before it is started, by as many processes as it will have.

    srun ... python tools/preflight.py --config runs/instruct/job.yaml

Exit status 0: all is well; 2: the run itself must be mended; 70: a node or the network is at fault.
"""

import argparse
import sys

from htc_megatron.cluster.preflight import Limits, preflight
from htc_megatron.config import ConfigError
from htc_megatron.config_io import check, files_and_overrides, load_config
from htc_megatron.parallel.launch import discover, speaks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", help="YAML of the run, and others that are laid over it in turn")
    parser.add_argument("--time-limit", type=float, default=Limits.seconds, help="seconds for all ranks to come (default: %(default)s)")
    parser.add_argument("--max-clock-skew", type=float, default=Limits.clock_skew_s, help="seconds between nodes (default: %(default)s)")
    parser.add_argument("--min-free-gib", type=float, default=Limits.min_free_gib, help="of output_dir's disk (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the configuration")
    args = parser.parse_args()
    first = speaks()
    try:
        config, launch = load_config(*files_and_overrides([*args.config, *args.overrides])), discover()
        check(config, launch.world_size)
        status, lines = preflight(config, launch, Limits(args.time_limit, args.max_clock_skew, args.min_free_gib))
    except ConfigError as error:
        if first:
            print(f"preflight: {error}", file=sys.stderr)
        return 2
    if launch.rank == 0 or status and len(lines) == 1:  # one line alone: of a rank that never met rank 0
        print("\n".join(f"preflight: {line}" for line in lines), flush=True)
        print(f"preflight: {'all is well' if not status else 'not fit to train'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
