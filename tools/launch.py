"""Write a run as a SLURM job and submit it.

    python tools/launch.py --config pretrain/recipes/instruct.yaml --nodes 64 --gpus-per-node 8 --time 24:00:00 key=value ...

The layout is checked for that many GPUs first. The script (OUTPUT_DIR/job.sh) starts with a preflight, saves and queues the job again
before its time limit, and goes on after a fault. --nodes 48-64 lets it start, and go on, with fewer nodes.
"""

import argparse
import sys

from htc_megatron.cluster.slurm import Job, job_script, submit, write_job
from htc_megatron.config import ConfigError
from htc_megatron.config_io import files_and_overrides, load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", help="YAML of the run, and others that are laid over it in turn")
    parser.add_argument("--nodes", required=True, metavar="N or MIN-MAX", help="nodes of the job, or the least and the most")
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--gpus-per-node", type=int, help="one rank for each")
    ranks.add_argument("--cpu-ranks-per-node", type=int, help="ranks that compute on CPU, where there are no GPUs")
    parser.add_argument("--time", default="", help="time limit of one life of the job, such as 24:00:00 (default: the partition's)")
    parser.add_argument("--job-name", default="", help="default: htc-, and output_dir's name")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--constraint", default="", help="features that the nodes must have")
    parser.add_argument("--signal-before", type=int, default=300, help="seconds before the time limit to stop (default: %(default)s)")
    parser.add_argument("--min-free-gib", type=float, default=10.0, help="space that output_dir's disk must have (default: %(default)s)")
    parser.add_argument("--no-preflight", action="store_true", help="do not check nodes and paths before each life")
    parser.add_argument("--setup", action="append", default=[], metavar="COMMAND", help="shell command at the start: 'module load cuda'")
    parser.add_argument("--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help="another option of sbatch; may be repeated")
    parser.add_argument("--print", action="store_true", help="print the script; nothing is written or submitted")
    parser.add_argument("--no-submit", action="store_true", help="write the script and do not submit it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the configuration")
    args = parser.parse_args()
    try:
        config = load_config(*files_and_overrides([*args.config, *args.overrides]))
        least, _, most = args.nodes.partition("-")
        if not least.isdecimal() or not (most or "1").isdecimal():
            raise ConfigError(f"--nodes: got {args.nodes!r}, wanted a number such as 64, or the least and the most such as 48-64")
        job = Job(
            nodes=int(most or least),
            min_nodes=int(least),
            ranks_per_node=args.gpus_per_node if args.gpus_per_node is not None else args.cpu_ranks_per_node,
            gpus=args.gpus_per_node is not None,
            time=args.time,
            name=args.job_name,
            partition=args.partition,
            account=args.account,
            constraint=args.constraint,
            signal_before=args.signal_before,
            preflight=not args.no_preflight,
            min_free_gib=args.min_free_gib,
            setup=tuple(args.setup),
            sbatch=tuple((name.lstrip("-"), value) for name, _, value in (option.partition("=") for option in args.sbatch)),
        )
        if args.print:
            print(job_script(config, job), end="")
            return 0
        script = write_job(config, job)
        print(
            f"{script}: written" if args.no_submit else f"{script}: submitted as job {submit(script)}; its logs are in {script.parent}/logs"
        )
    except ConfigError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
