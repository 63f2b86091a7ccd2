"""Linear probes of what an exported model makes of images: `python tools/probe.py runs/quickstart/hf labels.json --out probes.json`.

LABELS is a file of images and their labels, JSON or CSV (htc_megatron/evaluation/labels.py says how it is written), or easy-vqa: shape
as semantic label and colour as detail, of the data set's own split. Printed is the accuracy in percent on the test images, beside
always saying the most frequent value.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from htc_megatron.config import ConfigError
from htc_megatron.evaluation.easy_vqa import labelled_images
from htc_megatron.evaluation.labels import read_labels
from htc_megatron.evaluation.probes import by_kind, extract, probe, require_sklearn, table
from htc_megatron.inference import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("labels", help="file of labelled images, or easy-vqa")
    parser.add_argument("--out", type=Path, help="JSON to write all figures to")
    parser.add_argument("--layers", type=int, nargs="+", default=[-1], help="of z_voco; 0: into the first, -1: out of the last (default)")
    parser.add_argument("--pooling", choices=("flat", "mean"), default="flat", help="of anchors and of several voco tokens (default: flat)")
    parser.add_argument("--test-share", type=float, default=0.2, help="of the images, where the file has no split (default: %(default)s)")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the folds (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        require_sklearn()
        if a.folds < 2 or a.batch_size < 1:
            raise ConfigError(f"--folds is {a.folds} and --batch-size {a.batch_size}; wanted at least 2 and 1")
        labels = labelled_images() if a.labels == "easy-vqa" else read_labels(a.labels)
        labels = labels.divided(a.test_share, a.seed)
        model, processor = load(a.model, device=a.device)
        representations = extract(model, processor, [image.image for image in labels.images], a.layers, a.pooling, a.batch_size)
        found = probe(representations, labels, a.folds, a.seed)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(table(found, labels))
    if a.out:
        record = {
            name: {
                "size": representations[name].shape[1],
                "labels": {label: asdict(one) for label, one in probes.items()},
                **by_kind(probes, labels),
            }
            for name, probes in found.items()
        }
        options = {"layers": a.layers, "pooling": a.pooling, "folds": a.folds, "seed": a.seed}
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps({"labels": labels.labels, "options": options, "representations": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
