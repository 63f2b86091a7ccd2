"""Train HTC-VLM on any layout of TP x PP x DP with ZeRO 1 to 3.

torchrun --nproc-per-node N pretrain/pretrain_htc.py --config pretrain/recipes/X.yaml [overlay.yaml ...] key=value ...

The same under srun and mpiexec, or alone as one process; tools/launch.py writes a job of it.
"""

import argparse
import logging
import sys
import warnings

from htc_megatron.config import ConfigError
from htc_megatron.config_io import check, files_and_overrides, load_config, load_zero, to_yaml


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", help="YAML of the run, and others that are laid over it in turn")
    parser.add_argument("--show", action="store_true", help="print the whole configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the configuration")
    args = parser.parse_args()
    from htc_megatron.parallel.launch import discover, speaks

    first = speaks()
    try:
        config = load_config(*files_and_overrides([*args.config, *args.overrides]))
        if args.show:
            print(to_yaml(config), end="")
            return 0
        from htc_megatron.parallel.support import refuse_untested

        launch, zero = discover(), load_zero(config.zero)
        check(config, launch.world_size)
        refuse_untested(config, launch.world_size, zero["zero_optimization"]["stage"])

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning)
        from htc_megatron.cluster.report import tell_environment
        from htc_megatron.parallel import groups as process_groups
        from htc_megatron.parallel.zero import refuse_unsupported
        from htc_megatron.training.trainer import Trainer, TrainingError, check_files

        refuse_unsupported(config)
        check_files(config)
        groups = process_groups.initialise(config.parallel, config.training.seed)
        try:
            tell_environment(launch, groups.checkpoint)
            Trainer(config, zero, groups).run()
        finally:
            process_groups.destroy()
    except ConfigError as error:
        if first:
            print(f"pretrain_htc: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        if first:
            print(f"pretrain_htc: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
