"""The files of a trained pair's folder, by name."""

from __future__ import annotations

from nla.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS

ENCODER_FOLDER = "encoder"
DECODER_FOLDER = "decoder"
HEAD_FILE = "head.safetensors"
BASELINES_FILE = "baselines.safetensors"
METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"
MANIFEST = (
    f"{ENCODER_FOLDER}/{ADAPTER_CONFIG}",
    f"{ENCODER_FOLDER}/{ADAPTER_WEIGHTS}",
    f"{DECODER_FOLDER}/{ADAPTER_CONFIG}",
    f"{DECODER_FOLDER}/{ADAPTER_WEIGHTS}",
    f"{DECODER_FOLDER}/{HEAD_FILE}",
    BASELINES_FILE,
)
"""Files of a pair whose hashes stand in its config; figures and model card may be edited."""

SEPARATE_MANIFEST = (f"{DECODER_FOLDER}/{HEAD_FILE}", BASELINES_FILE)
"""The same of a pair of separate models, which refers to the other weights."""
