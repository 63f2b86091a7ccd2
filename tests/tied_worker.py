"""What one rank does in the tests of tied embeddings. Each function runs on every rank."""

import torch

from htc_megatron.parallel import groups as process_groups
from htc_megatron.parallel.tied import TiedEmbedding
from htc_megatron.weights.convert import to_hf
from htc_megatron.weights.export import hf_config
from tests.parity_worker import MICROS, global_batch, run_steps, tiny_config
from tests.stage_worker import replaced


def run_faulty(fault: str, changes: dict, zero_json: dict) -> list[tuple[float, float]]:
    """Loss and norm of the parity steps with one fault in how the output layer's gradient reaches the embedding."""
    if fault == "not added":
        arriving = TiedEmbedding._arriving

        def lost(self):
            arriving(self)

        with replaced(TiedEmbedding, "_arriving", lost):
            return run_steps(changes, zero_json)
    if fault == "last micro-batch alone":
        collect = TiedEmbedding._collect

        def forgetful(self, weight):
            self._gradient = None
            collect(self, weight)

        with replaced(TiedEmbedding, "_collect", forgetful):
            return run_steps(changes, zero_json)
    assert fault == "added at every micro-batch"
    arriving, held = TiedEmbedding._arriving, {}

    def repeated(self):
        held["gradient"] = arriving(self) if self.due else held.get("gradient")
        return held["gradient"]

    with replaced(TiedEmbedding, "_arriving", repeated):
        return run_steps(changes, zero_json)


def tied_gradients(changes: dict, zero_json: dict):
    """On the first stage: this TP rank's share of the matrix's gradient after a step's backwards on text, and all of it as
    transformers' Qwen2 with tied embeddings has it; on other stages nothing."""
    from deepspeed.utils import safe_get_full_grad
    from transformers import Qwen2ForCausalLM

    from htc_megatron.model.initialisation import initial_value
    from htc_megatron.training.build import build_engine
    from htc_megatron.training.step import _forward_step
    from htc_megatron.weights import weights

    config = tiny_config(**changes)
    groups = process_groups.initialise(config.parallel, 0)
    engine = build_engine(config, zero_json, groups)
    batches = global_batch(config, 0, ("t",))
    engine.train(_forward_step(1.0), iter(batches), MICROS, engine.module.shape_between_stages(batches[0].layout))
    if not groups.first_stage:
        engine.destroy()
        return None
    ours = safe_get_full_grad(engine.module.backbone.embedding.word_embeddings.weight).clone()
    engine.destroy()

    settings = hf_config(config.model).text_config
    settings.tie_word_embeddings = True
    model = Qwen2ForCausalLM(settings)
    stored = {}
    for weight in weights(config.model):
        if weight.name.startswith("backbone."):
            for name, tensor in to_hf(weight, initial_value(weight, config.training.seed, 0, 1).view(weight.shape)).items():
                stored[name.replace("model.language_model.", "model.")] = tensor
    missing = model.load_state_dict(stored, strict=False)
    assert missing == (["lm_head.weight"], []) and model.lm_head.weight is model.model.embed_tokens.weight
    for batch in batches:
        for row, start, stop in batch.layout.samples.tolist():
            ids, labels = batch.input_ids[row, start:stop], batch.labels[row, start:stop]
            logits = model(ids[None]).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100).backward()
    return ours, model.model.embed_tokens.weight.grad
