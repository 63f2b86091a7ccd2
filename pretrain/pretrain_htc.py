"""Train HTC-VLM on any layout of TP x PP x DP with ZeRO 1 to 3.

torchrun --nproc-per-node N pretrain/pretrain_htc.py --config pretrain/recipes/X.yaml [overlay.yaml ...] key=value ...

The same under srun and mpiexec, or alone as one process; tools/launch.py makes a SLURM job of it.
"""

import argparse
import logging
import os
import sys
import traceback
import warnings

from htc_megatron.cluster import status as run_status
from htc_megatron.cluster.status import FAULT, FINISHED, REFUSED
from htc_megatron.config import RunConfig
from htc_megatron.config_io import check, files_and_overrides, load_config, load_zero, to_yaml
from htc_megatron.training.life import ExitStatus, Fault, Interrupt, Lives, is_sentence, status_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", help="YAML of the run, and others that are laid over it in turn")
    parser.add_argument("--show", action="store_true", help="print the whole configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the configuration")
    status = ExitStatus()
    with Interrupt(status) as interrupt:
        args = parser.parse_args()
        from htc_megatron.parallel.launch import speaks

        first = speaks()
        try:
            config = load_config(*files_and_overrides([*args.config, *args.overrides]))
            if args.show:
                print(to_yaml(config), end="")
                return FINISHED
            status.belongs_to(config.output_dir, first)
            interrupt.limit(config.life)
            train(config, interrupt, status, first)
            if first:
                Lives(config.output_dir).finish()
                status.write(FINISHED)
                run_status.end(config.output_dir, FINISHED, "")
        except Exception as error:
            code = status_of(error)
            status.write(code)  # before anything else that may take time: what comes first is the cause
            if not is_sentence(error):
                traceback.print_exc()
            elif first:
                print(f"pretrain_htc: {error}", file=sys.stderr, flush=True)
            if first and code != REFUSED:
                run_status.end(config.output_dir, code, str(error))
            return code
    return FINISHED


def train(config: RunConfig, interrupt: Interrupt, status: ExitStatus, first: bool) -> None:
    """Check everything that can be checked, then make the process groups and train. Raises what `status_of` knows."""
    from htc_megatron.parallel.launch import discover
    from htc_megatron.parallel.support import refuse_untested

    launch, zero = discover(), load_zero(config.zero)
    check(config, launch.world_size)
    refuse_untested(config, launch.world_size, zero["zero_optimization"]["stage"])

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from htc_megatron.checkpoint import CheckpointError
    from htc_megatron.cluster.report import tell_environment
    from htc_megatron.parallel import groups as process_groups
    from htc_megatron.parallel.zero import refuse_unsupported
    from htc_megatron.training.meeting import begin_life
    from htc_megatron.training.trainer import Trainer, check_files, first_step
    from htc_megatron.training.watchdog import Watchdog

    refuse_unsupported(config)
    check_files(config)
    if first:
        run_status.StatusFile(config.output_dir).update(state="starting")  # though it should come no further
    groups = process_groups.initialise(config.parallel, config.training.seed)
    with Watchdog(groups, config.life, status) as watchdog:
        try:
            begin_life(config, groups, first_step(config))
            tell_environment(launch, groups.checkpoint)
            trainer = Trainer(config, zero, groups, interrupt)
            try:
                trainer.run()
            except CheckpointError as error:  # no checkpoint is read any more: it could not be written
                raise Fault(str(error)) from error
        except Exception as error:
            if status_of(error) == FAULT:  # other ranks may be gone: taking the groups down could wait for them
                watchdog.mourn(error)
                raise
            process_groups.destroy()
            raise
    process_groups.destroy()


if __name__ == "__main__":
    code = main()
    if code == FAULT:  # threads may wait for a rank or a disk that is gone; nothing waits for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
