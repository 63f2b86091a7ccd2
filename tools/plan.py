"""Which layout to train on: TP x PP x DP x ZeRO x recomputation x micro-batch, with memory and step time foretold, best first.

python tools/plan.py --config pretrain/recipes/instruct.yaml pretrain/recipes/backbones/llama-70b.yaml --nodes 64 --gpus-per-node 8 \
    --gpu h100-80g --write plan.yaml
torchrun ... pretrain/pretrain_htc.py --config pretrain/recipes/instruct.yaml pretrain/recipes/backbones/llama-70b.yaml plan.yaml
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.config_io import files_and_overrides, load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", help="YAML of the run, and others that are laid over it in turn")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--gpu", default="h100-80g", help="a100-40g, a100-80g, h100-80g, h200-141g, b200; cpu: this machine (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=10, help="how many layouts to list (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the best as YAML to lay over the run's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that are listed there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the configuration")
    args = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    try:
        for name in ("nodes", "gpus_per_node", "top"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, wanted at least 1")
        config = load_config(*files_and_overrides([*args.config, *args.overrides]))
        from htc_megatron.planner.hardware import hardware
        from htc_megatron.planner.report import table
        from htc_megatron.planner.search import Cluster, Planner

        cluster = Cluster(args.nodes, args.gpus_per_node, hardware(args.gpu))
        plans = Planner(config, cluster).search(args.top)
    except ConfigError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(table(plans, cluster))
    if args.write:
        args.write.write_text(plans[0].overlay())
    if args.json:
        args.json.write_text(json.dumps([plan.record() for plan in plans], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
