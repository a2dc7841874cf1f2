"""The kinds of models: which head a checkpoint was saved with, and the class that loads it."""

from __future__ import annotations

from typing import Any, Literal

import transformers
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from laserlm.errors import ModelError
from laserlm.models.matrices import language_config

Kind = Literal["causal", "masked", "encoder-decoder", "classifier", "reward", "embedding", "headless"]
TEXT_KINDS: tuple[Kind, ...] = ("classifier", "reward", "embedding")
"""Kinds of models that give one output for a text: the logits of labels, one number, or a vector."""

CLASSES: dict[Kind, type[_BaseAutoModelClass]] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
    "reward": AutoModelForSequenceClassification,
    "embedding": AutoModel,
    "headless": AutoModel,
}
HEADS: dict[Kind, dict[str, Any]] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def head_kinds(config: Any) -> list[Kind]:
    """Return the kind of head that the checkpoint was saved with; if that is not recorded, all kinds that its family offers."""
    for architecture in config.architectures or ():
        own = getattr(transformers, architecture, None)
        if own is not None and own.main_input_name != "input_ids":
            return ["headless"]  # it reads images or sound, as Whisper does
        if config.is_encoder_decoder and architecture.endswith(("ForConditionalGeneration", "WithLMHeadModel", "MTModel")):
            return ["encoder-decoder"]
        if architecture.endswith("ForMaskedLM") or _offers(architecture) == {"masked"}:
            return ["masked"]
        if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return ["causal"]
        if architecture.endswith("ForPreTraining") and getattr(own, "_tied_weights_keys", None) is not None:
            return ["masked"]
        if architecture.endswith("ForSequenceClassification"):
            return ["reward" if config.num_labels == 1 else "classifier"]
        return ["embedding" if _is_text_body(architecture, config) else "headless"]
    # An encoder's family also offers a causal head, but few checkpoints were trained with one.
    order: tuple[Kind, ...] = ("encoder-decoder", "masked", "causal")
    return [kind for kind in order if config.model_type in HEADS[kind]] or ["headless"]


def _offers(architecture: str) -> set[Kind]:
    """Return the kinds of heads that transformers lists a class under."""
    return {kind for kind, classes in HEADS.items() if architecture in classes.values()}


def _is_text_body(architecture: str, config: Any) -> bool:
    """Return whether a class of transformers is an encoder or decoder of text without a head."""
    own = getattr(transformers, architecture, None)
    is_body = architecture.endswith("EncoderModel") or (architecture.endswith("Model") and not config.is_encoder_decoder)
    reads_text = own is not None and own.main_input_name == "input_ids" and language_config(config) is config
    return is_body and reads_text and not architecture.endswith("DoubleHeadsModel")


def input_embeddings(model: Any) -> Any:
    """Return the module that embeds tokens; None for a model that reads none, or that reads texts and images separately."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # CLIP's
        return None


def model_class(config: Any, kind: Kind) -> Any:
    """Return the class that loads a checkpoint with a kind of head.

    It is the class that the checkpoint was saved as where another would leave weights out: the vision or audio tower beside a
    language model, or the head of a classifier.
    """
    own = getattr(transformers, (config.architectures or [""])[0], None)
    is_own = kind in ("headless", *TEXT_KINDS) or (kind == "causal" and language_config(config) is not config)
    if own is not None and own.main_input_name == "input_ids":
        classes: Any = CLASSES[kind]
        is_own = is_own or type(config) not in classes._model_mapping
    return own if own is not None and is_own and head_kinds(config)[0] == kind else CLASSES[kind]


def check_head(name: str, config: Any, kind: Kind) -> None:
    """Do nothing if a checkpoint with this config has the kind of head. Every checkpoint has a body without a head.

    Raises:
        ModelError: if it was saved with another head.
    """
    saved = head_kinds(config)
    if kind not in saved and kind not in ("headless", "embedding"):
        raise ModelError(
            f"{name!r} was saved as {', '.join(config.architectures or [config.model_type])}, which is {saved[0]}, not {kind}; "
            f"load it with kind={saved[0]!r}, or name a checkpoint that has a {kind} head"
        )
