"""Installation: `pip install -c constraints.txt -e .`, or `bash tests/run.sh`, which makes `.venv` and does it."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
PINS = dict(line.split("==") for line in (HERE / "constraints.txt").read_text().split() if "==" in line)

# What lmms-eval imports to run a task, beside ours. All that it asks for has a torchvision that breaks a CPU build of torch.
LMMS_EVAL = ("datasets", "evaluate", "filelock", "loguru", "pytablewriter", "pytz", "sacrebleu", "tenacity")
SERVE = ("accelerate", "fastapi", "openai", "uvicorn")  # what `transformers serve` needs beside transformers


def pinned(*names: str) -> list[str]:
    return [f"{name}=={PINS[name]}" for name in names]


setup(
    name="htc-megatron",
    version="0.1.0",
    description="HTC-VLM on Megatron-Core and DeepSpeed: TP x PP x DP with ZeRO 1 to 3, from a laptop CPU to a cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["htc_megatron", "htc_megatron.*"]),
    package_data={"": ["*.json", "*.yaml", "*.txt", "*.jinja", "*.sh"]},
    entry_points={"lmms_eval.models": ["htc_vlm = htc_megatron.evaluation.lmms_eval_plugin:manifest"]},
    install_requires=pinned(
        "torch",
        "megatron-core",
        "deepspeed",
        "transformers",
        "numpy",
        "pillow",
        "psutil",
        "pydantic",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tqdm",
    ),
    extras_require={  # GPU packages (Transformer Engine, FlashAttention) are used where they are found, and never required
        "test": pinned(
            "hypothesis",
            "mpi4py",
            "mpich",
            "openpyxl",
            "peft",
            "py-spy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            *LMMS_EVAL,
            *SERVE,
        ),
        "examples": pinned("easy-vqa", "matplotlib"),
        "evaluation": pinned("openpyxl", "scikit-learn"),
        "lmms-eval": pinned(*LMMS_EVAL),  # and then lmms-eval itself, with --no-deps
        "serve": pinned(*SERVE),
        "mpi": pinned("mpi4py"),
    },
)
