"""The benchmarks of the paper's table, a file each, and easy-VQA, which the quick start is measured by."""

from htc_megatron.evaluation.tasks.easy_vqa import EasyVQA
from htc_megatron.evaluation.tasks.gqa import GQA
from htc_megatron.evaluation.tasks.mmbench import MMBench
from htc_megatron.evaluation.tasks.mme import MME
from htc_megatron.evaluation.tasks.pope import POPE
from htc_megatron.evaluation.tasks.seed import SEEDBench
from htc_megatron.evaluation.tasks.sqa import ScienceQA
from htc_megatron.evaluation.tasks.vqav2 import VQAv2

TASKS: dict[str, type] = {task.name: task for task in (GQA, VQAv2, MMBench, MME, POPE, SEEDBench, ScienceQA, EasyVQA)}
