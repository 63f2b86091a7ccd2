"""A tiny run on disk: tokenizer, MGVQ, prepared data and the YAML that trains on them."""

from pathlib import Path

import torch
import yaml

from htc_megatron.config_io import to_dict
from htc_megatron.data.conversation import Template
from htc_megatron.data.prepare import CodeEncoder, Preparation, prepare
from htc_megatron.data.tokenizer import load_tokenizer
from htc_megatron.model.mgvq import build_mgvq, load_mgvq, mgvq_fingerprint, save_mgvq
from tests import data_tiny


def make_run(folder: Path, images: int = 12, count: int = 96) -> Path:
    """Everything a run reads, in `folder`. Returns the path of its YAML."""
    tokenizer_path = data_tiny.sentencepiece_model(folder)
    torch.manual_seed(0)
    save_mgvq(build_mgvq(data_tiny.MGVQ), data_tiny.MGVQ, folder / "mgvq.safetensors")
    prepare_data(folder, folder / "data", data_tiny.records(count, images), images)
    tree = to_dict(data_tiny.run_config(load_tokenizer(tokenizer_path), seq_length=320))
    tree["data"] |= {"train": str(folder / "data"), "validation": str(folder / "data")}
    tree["optimizer"] |= {"lr": 3e-3}
    tree["training"] |= {"train_iters": 4, "precision": "fp32", "freeze": []}
    tree |= {"tokenizer": str(tokenizer_path), "mgvq_checkpoint": str(folder / "mgvq.safetensors"), "output_dir": str(folder / "run")}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def prepare_data(folder: Path, output: Path, records: list[dict], images: int = 12) -> None:
    """Prepare records with the tokenizer and MGVQ of the run in `folder`."""
    model = load_mgvq(folder / "mgvq.safetensors", encoder_only=True).eval()
    encoder = CodeEncoder(model, mgvq_fingerprint(model), 4)
    data, pictures = data_tiny.write_source(folder / "source", records, images)
    prepare(
        Preparation(
            data=data,
            images=pictures,
            output=output,
            tokenizer=load_tokenizer(folder / "tokenizer.model"),
            template=Template("Look."),
            encoder=encoder,
            progress=False,
        )
    )
