"""Train an MGVQ tokenizer on a folder of images, or on the images a text file lists.

python tools/train_mgvq.py --config mgvq.yaml images=photos/ output_dir=runs/mgvq

The YAML's keys are the fields of MGVQTrainingConfig; --defaults prints them all. For 64 px images, a grid of 8 x 8:

    model: {image_size: 64, widths: [16, 32, 64], depths: [1, 1, 1], decoder_depths: [1, 1, 1], blocks: [res, res, evit],
            head_dim: 16, latent_channels: 16, groups: 4, codebook_size: 1024}
    steps: 600
    batch_size: 16
    lr: 4e-3
"""

import argparse
import sys

from htc_megatron.config import ConfigError
from htc_megatron.config_io import load_config, to_yaml
from htc_megatron.training.mgvq_trainer import WEIGHTS, MGVQTrainingConfig, train_mgvq


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file")
    parser.add_argument("--defaults", action="store_true", help="print every key with its default and leave")
    parser.add_argument("--stop-after", type=int, metavar="N", help="save and leave once N steps are done in all; run again to go on")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the YAML, such as model.groups=4")
    options = parser.parse_args(arguments)
    if options.defaults:
        print(to_yaml(MGVQTrainingConfig()), end="")
        return 0
    try:
        if not options.config:
            raise ConfigError("--config is missing; it names a YAML file, and --defaults prints the keys it may have.")
        config = load_config(options.config, options.overrides, MGVQTrainingConfig)
        report = train_mgvq(config, stop_after=options.stop_after)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    held_out = report.get("validation")
    quality = f", {held_out['psnr']:.1f} dB on {held_out['images']} held-out images" if held_out else ""
    print(f"{config.output_dir}/{WEIGHTS}: {report['steps']} of {config.steps} steps in {report['seconds']:.0f} s{quality}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
