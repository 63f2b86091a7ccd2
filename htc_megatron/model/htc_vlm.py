"""HTC-VLM: the hybrid front-end on the first pipeline stage, a Megatron-core GPT backbone over all of them."""

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from htc_megatron.config import RunConfig
from htc_megatron.model.attention import LayoutParams
from htc_megatron.model.frontend import HybridFrontEnd
from htc_megatron.model.layers import backbone_config, backbone_spec, vision_config
from htc_megatron.model.layout import ImageShape, MicroBatch, SequenceLayout
from htc_megatron.model.mask import MaskRule
from htc_megatron.model.naming import is_decayed
from htc_megatron.parallel.tied import TiedEmbedding
from htc_megatron.weights.table import COMPONENTS, is_adapter, padded_vocab_size


class HTCVLM(nn.Module):
    """One pipeline stage of the model; the whole model where there is one stage.

    Args:
        config: the run's configuration.
        first, last: whether this stage embeds images and text, and whether it computes the loss.
        device: where the stage computes.
    """

    def __init__(self, config: RunConfig, first: bool, last: bool, tp_rank: int, device: torch.device):
        super().__init__()
        model, parallel = config.model, config.parallel
        self.first, self.last, self.tp_rank, self.device = first, last, tp_rank, device
        self.rule = MaskRule.from_config(model.method)
        self.image = ImageShape.from_config(model)
        self.attention = parallel.attention
        self.pixel_shape = (3, model.vision.image_size, model.vision.image_size)
        self.code_shape = (model.mgvq.grid**2, model.mgvq.groups)
        self.vocab_size = model.backbone.vocab_size
        tp = parallel.tensor_model_parallel_size
        self.padded_vocab = padded_vocab_size(self.vocab_size, tp)
        self.config = backbone_config(config, device.type == "cpu")
        self.model_type = ModelType.encoder_or_decoder  # asked for by mcore's schedules
        if first:
            self.frontend = HybridFrontEnd(model, vision_config(config, device.type == "cpu"))
        self.backbone = GPTModel(
            self.config,
            backbone_spec(config),
            vocab_size=self.padded_vocab,
            max_sequence_length=model.backbone.max_position_embeddings,
            pre_process=first,
            post_process=last,
            position_embedding_type="none",  # rotary frequencies come from the layout's own positions
            share_embeddings_and_output_weights=False,
            scatter_embedding_sequence_parallel=False,  # images are placed into the whole sequence first
        )
        if last:
            self.backbone.output_layer.sequence_parallel = False  # it is given gathered rows: only those that carry loss
        self.tied = self._tie(config) if model.backbone.tie_word_embeddings and (first or last) else None
        self.rotary_base = model.backbone.rotary_base
        self._freeze(config)

    def _tie(self, config: RunConfig) -> TiedEmbedding:
        """Let the output layer use the embedding's matrix: it has no weight of its own then, on any stage."""
        shape = (self.padded_vocab // config.parallel.tensor_model_parallel_size, config.model.backbone.hidden_size)
        trained = "backbone" not in config.training.freeze
        tied = TiedEmbedding(self.first, self.last, shape, self.config.params_dtype, self.device, trained)
        if self.last:  # mcore's own sharing would keep a second parameter on the last stage
            self.backbone.output_layer.register_parameter("weight", None)
        if self.first:
            tied.attach(self.backbone.embedding.word_embeddings, self.backbone.output_layer if self.last else None)
        return tied

    def _freeze(self, config: RunConfig) -> None:
        prefixes = tuple(COMPONENTS[name] for name in config.training.freeze)
        for name, parameter in self.named_parameters():
            if prefixes and name.startswith(prefixes) and not is_adapter(name):
                parameter.requires_grad_(False)
        # DeepSpeed sums the gradient norm over the stages once a parameter group, so every stage must hold the same groups,
        # none of them empty. Where all is frozen, a stand-in takes part with weight zero and never moves.
        trained = {is_decayed(name, p) for name, p in self.named_parameters() if p.requires_grad}
        for decayed in (True, False):
            idle = None if decayed in trained else nn.Parameter(torch.zeros(1, dtype=self.config.params_dtype, device=self.device))
            self.register_parameter("idle_decayed" if decayed else "idle_plain", idle)

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """The previous stage's hidden states, as mcore's schedules hand them over."""
        self.backbone.set_input_tensor(input_tensor)

    def forward(self, batch: MicroBatch, logits: bool = False) -> Tensor:
        """Hidden states [s (/ tp with sequence parallelism), b, H] for the next stage; on the last stage the summed loss [].

        With `logits` the last stage returns [b, s, vocab_size] fp32 logits instead, gathered over TP.
        """
        layout = batch.layout
        if layout is None:
            raise RuntimeError("a pipeline stage was called without the micro-batch's layout: the mask would be lost")
        params = LayoutParams.from_layout(layout, self.rule, self.attention, self.device)
        hidden = self.embed(batch) if self.first else None
        hidden = self.backbone.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self.rotary(layout),
            packed_seq_params=params,
        )
        for idle in (self.idle_decayed, self.idle_plain):
            if idle is not None:
                hidden = hidden + 0.0 * idle
        if not self.last:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return self.logits(hidden) if logits else self.loss(hidden, batch.labels)

    def embed(self, batch: MicroBatch) -> Tensor:
        """Text embeddings with whole images put in their places. [s (/ tp), b, H]

        The front-end always runs: a micro-batch without an image calls it on one blank image at weight zero, so that
        no rank waits in a collective that another one skips.
        """
        layout = batch.layout
        ids = batch.input_ids.to(self.device)
        hidden = self.backbone.embedding(input_ids=ids, position_ids=None)  # [s, b, H]
        images = self.frontend(*self.visual_inputs(batch), batch.features)  # [images or 1, N + K, H]
        if layout.num_images:
            row, column = layout.image_places // layout.seq_length, layout.image_places % layout.seq_length
            places = (column * layout.rows + row).reshape(-1).to(self.device)
            flat = hidden.reshape(-1, hidden.shape[-1])
            hidden = flat.index_copy(0, places, images.reshape(-1, images.shape[-1]).to(flat.dtype)).view_as(hidden)
        else:
            hidden = hidden + 0.0 * images.sum()
        if self.config.recompute_granularity == "full" and not hidden.requires_grad and torch.is_grad_enabled():
            hidden.requires_grad_()  # a checkpointed layer whose input needs no gradient would drop its weights' gradients
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return hidden

    def visual_inputs(self, batch: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
        """Pixels, of the images that the tower has to see, and codes on the device; one blank image where there are none."""

        def pick(name: str, count: int, given: Tensor | None, blank: Tensor) -> Tensor:
            if count and (given is None or len(given) != count):
                raise ValueError(f"the first stage needs {name} of {count} images, the batch has {0 if given is None else len(given)}")
            return (given if count else blank).to(self.device)

        pixels = codes = None
        if self.image.num_patches:
            pixels = pick("pixel_values", batch.num_tower_images, batch.pixel_values, torch.zeros(1, *self.pixel_shape))
        if self.image.num_anchors:
            codes = pick("codes", batch.layout.num_images, batch.codes, torch.zeros(1, *self.code_shape, dtype=torch.int16))
        return pixels, codes

    def rotary(self, layout: SequenceLayout) -> Tensor:
        """Rotary frequencies at the layout's positions: [s, b, 1, head_dim] fp32 (mcore turns them into cos and sin)."""
        # made here and not kept: zero.Init would round every tensor made during construction to the parameters' precision
        head_dim = self.config.kv_channels
        powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=self.device) / head_dim
        positions = layout.position_ids.to(self.device).T.float()  # [s, b]
        angles = positions[..., None] * self.rotary_base**-powers
        return torch.cat([angles, angles], -1)[:, :, None]

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy over the supervised tokens; logits are computed at their rows only. []

        hidden: [s, b, H]; labels: [b, s] aligned with the input, so the row before each label predicts it.
        """
        following = torch.full_like(labels, -100)
        following[:, :-1] = labels[:, 1:]
        following = following.T.reshape(-1).to(self.device)  # [s * b], like hidden's rows
        rows = (following != -100).nonzero().squeeze(-1)
        weight = 1.0
        if not len(rows):  # every rank takes the same road through the output layer
            rows, weight = torch.zeros(1, dtype=torch.int64, device=self.device), 0.0
        targets = following[rows].clamp_min(0)
        logits = self._local_logits(hidden.reshape(-1, hidden.shape[-1])[rows][:, None])  # [rows, 1, vocab / tp]
        return tensor_parallel.vocab_parallel_cross_entropy(logits, targets[:, None]).sum() * weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[s, b, H] -> [b, s, vocab_size] fp32, whole on every TP rank."""
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(self._local_logits(hidden))
        return whole[..., : self.vocab_size].transpose(0, 1).contiguous()

    def _local_logits(self, hidden: Tensor) -> Tensor:
        """This TP rank's columns in fp32; padding columns are closed, so that they take no probability in any layout."""
        weight = None if self.tied is None else self.tied.weight  # None: the layer's own
        logits = self.backbone.output_layer(hidden, weight=weight)[0].float()
        if self.padded_vocab > self.vocab_size:
            width = logits.shape[-1]
            columns = self.tp_rank * width + torch.arange(width, device=logits.device)
            padding = columns >= self.vocab_size
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits
