"""HTC-Megatron: training of HTC-VLM (hybrid token compression) on TP x PP x DP with ZeRO."""

__version__ = "0.1.0"
