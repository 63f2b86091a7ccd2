"""Hugging Face side: these files need torch, transformers and Pillow only and travel with an export.

Importing this package makes exported folders load without trust_remote_code: the automatic classes and pipeline() then take
the code from here, and what is saved again carries it along.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_htc_vlm import HTCVLMConfig
from .modeling_htc_vlm import HTCVLMForConditionalGeneration, HTCVLMModel
from .processing_htc_vlm import HTCVLMImageProcessor, HTCVLMProcessor

AutoConfig.register(HTCVLMConfig.model_type, HTCVLMConfig, exist_ok=True)
AutoModel.register(HTCVLMConfig, HTCVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(HTCVLMConfig, HTCVLMForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(HTCVLMConfig, HTCVLMForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(HTCVLMConfig, image_processor_classes={"pil": HTCVLMImageProcessor}, exist_ok=True)
AutoProcessor.register(HTCVLMConfig, HTCVLMProcessor, exist_ok=True)
HTCVLMConfig.register_for_auto_class()
HTCVLMModel.register_for_auto_class("AutoModel")
HTCVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
HTCVLMImageProcessor.register_for_auto_class()
HTCVLMProcessor.register_for_auto_class()
