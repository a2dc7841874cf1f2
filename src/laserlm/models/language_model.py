"""A loaded model with its tokenizer, the main argument of laserlm's functions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from laserlm.errors import ModelError, WeightError
from laserlm.linalg.quick_hash import quick_hash
from laserlm.models.kinds import Kind, input_embeddings
from laserlm.models.matrices import Matrix, find_matrices
from laserlm.models.pooling import Pooling
from laserlm.models.update import AdapterUpdate
from laserlm.paths import cache_folder


@dataclass(eq=False)
class LanguageModel:
    """A transformers model and its tokenizer. The model is put in evaluation mode, and is scored and saved only in it.

    Args:
        model: any transformers model.
        tokenizer: its tokenizer, or None for models of other inputs than text.
        name: the name it was loaded by.
        kind: ``causal``, ``masked`` or ``encoder-decoder`` for a model that predicts tokens; ``classifier``, ``reward`` or
            ``embedding`` for one that gives labels, a number or a vector for a text; or ``headless``.
        revision: the hub's commit, or None.
        cache: folder for decompositions and converted models.
        pads_exactly: whether left-padded batches give the scores of single sequences; None until it is tested.
        reads_positions: whether the output layer can compute the scored positions alone; None until it is tested.
        shares_prompts: whether sequences that begin alike can be one row; None until it is tested.
        active: interventions that are applied now, outermost first.
        pooling: how an embedding model makes one vector of a text; None takes the mean of its tokens.
        update: of an adapter that is merged; reductions then change the update in place of the weights. None without one.
        loaded: arguments of ``load`` that give another process the same model (without its device); None if the model was
            not made by ``load``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    kind: Kind
    revision: str | None = None
    cache: Path = field(default_factory=cache_folder)
    pads_exactly: bool | None = None
    reads_positions: bool | None = None
    shares_prompts: bool | None = None
    active: list[str] = field(default_factory=list)
    pooling: Pooling | None = None
    update: AdapterUpdate | None = field(default=None, repr=False)
    loaded: dict[str, Any] | None = field(default=None, repr=False)
    _hashed: tuple[tuple[str, ...], str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ModelError(f"no kind of model {self.kind!r}; there are {', '.join(get_args(Kind))}")
        self.model.eval()

    @property
    def device(self) -> torch.device:
        """The device of the inputs: that of the first weights in memory."""
        return next((p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    @property
    def width(self) -> int:
        """Hidden size: number of values per token between blocks."""
        embeddings = input_embeddings(self.model)
        embedded = 0 if embeddings is None else int(embeddings.weight.shape[-1])
        return max(embedded, int(getattr(self.model.config, "hidden_size", 0) or 0))

    @property
    def known_tokens(self) -> int:
        """Number of tokens that the model has an embedding for; 0 if its inputs are no tokens."""
        embeddings = input_embeddings(self.model)
        return embeddings.num_embeddings if isinstance(embeddings, torch.nn.Embedding) else 0

    @property
    def family(self) -> str:
        """The architecture's name in transformers, such as ``llama``."""
        return str(self.model.config.model_type)

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every weight matrix of every block; with the update of an adapter, those that it updates."""
        return self.all_matrices if self.update is None else self.update.matrices(self.all_matrices)

    @cached_property
    def all_matrices(self) -> tuple[Matrix, ...]:
        """Every weight matrix of every block, with or without an update."""
        return find_matrices(self.model)

    @property
    def hash(self) -> str:
        """Sha256 of the unchanged weights (names, shapes, dtypes, bytes), a key of stored results.

        It is computed again when the weights have changed.

        Raises:
            ModelError: if an intervention is applied now, or the model is in training mode.
            WeightError: if some weights are offloaded and not in memory.
        """
        if self.active:
            raise ModelError(f"the weights are changed by {self.intervention}; leave the 'with applied' block first")
        self.require_evaluation_mode()
        state = self.model.state_dict()
        for path, weight in ({} if self.update is None else self.update.weights).items():
            # The same weights without an update have other results of a search.
            state |= {f"update up {path}": weight.up, f"update down {path}": weight.down}
        tensors = sorted(state.items())
        for name, tensor in tensors:
            if tensor.device.type == "meta":
                raise WeightError(f"{name} is offloaded and not in memory; load the model with a device_map that holds it")
        # A tensor's version counter would be quicker, but writing to a parameter's .data does not raise it.
        current = tuple(f"{name} {quick_hash(tensor)}" for name, tensor in tensors)
        if self._hashed is None or self._hashed[0] != current:
            digest = hashlib.sha256()
            for name, tensor in tensors:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            self._hashed = current, digest.hexdigest()
        return self._hashed[1]

    def require_evaluation_mode(self) -> None:
        """Do nothing if the model is in evaluation mode.

        Raises:
            ModelError: if the model or a module of it is in training mode, in which dropout makes its outputs random.
        """
        path = next((path for path, module in self.model.named_modules() if module.training), None)
        if path is not None:
            raise ModelError(
                f"{path or type(self.model).__name__} of {self.name} is in training mode, in which dropout makes outputs "
                "random; call lm.model.eval() first"
            )

    @property
    def intervention(self) -> str:
        """Canonical text of the interventions that are applied now; empty for the unchanged model."""
        return "+".join(self.active)

    def require_tokenizer(self) -> Any:
        """Return the tokenizer; the type is Any because transformers' call signatures vary by class.

        Raises:
            ModelError: if the model has no tokenizer, or neither predicts tokens nor is of a kind whose outputs are scored.
        """
        if self.kind == "headless":
            raise ModelError(
                f"{self.name} ({type(self.model).__name__}) has no head that predicts tokens, labels or "
                "rewards from text alone, so it is not scored; its matrices can be listed, reduced and saved"
            )
        if self.tokenizer is None:
            raise ModelError(f"{self.name} was loaded without a tokenizer; save one beside the model to score or generate")
        return self.tokenizer
