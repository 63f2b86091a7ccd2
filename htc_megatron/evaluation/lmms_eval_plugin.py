"""What lmms-eval finds by the entry point lmms_eval.models: the model `htc_vlm`. Small, since every run of lmms-eval imports it.

pip install -c constraints.txt -e '.[lmms-eval]' && pip install -c constraints.txt --no-deps lmms-eval
python -m lmms_eval --model htc_vlm --model_args pretrained=FOLDER --tasks pope --batch_size 64
"""

from typing import Any


def manifest() -> Any:
    """lmms-eval's ModelManifest."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("htc_vlm", simple_class_path="htc_megatron.evaluation.lmms_eval_model.HTCVLM")
