"""Check that a device computes what the CPU computes: scores, the screen, padding, and what happens when memory runs out.

The models are tiny and have random weights, so that a check takes seconds. ``laser doctor`` runs the checks on the user's
device, and ``make test-gpu`` runs them for every family of models.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from laserlm.edit import applied, factored
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.forward import batches, forward_logits, run_rows
from laserlm.scoring.statistics import dense_ranks, spearman
from laserlm.scoring.tokenize import encode
from laserlm.searching.candidates import expand
from laserlm.searching.scorer import EncodedSplit, PrefixScorer
from laserlm.searching.screen import Prediction, screen
from laserlm.tasks import Example, Split

CITIES = ("Paris", "Rome", "Oslo", "Lisbon", "Madrid")
EXAMPLES = tuple(
    Example(
        str(i),
        "The river by the city " * (i % 4 * 2) + "The capital of the country is",
        CITIES[i % 5],
        (CITIES[i % 5], CITIES[(i + 1 + i % 3) % 5], "a big city in Italy"),
    )
    for i in range(10)
)
"""Prompts of 6 to 36 words, so that most rows of a batch are padded, and choices of one word and of several."""
GRID = "all.all@0.75,0.5,0.25,0.1"
TOP = 8
"""Candidates that the screens of two devices have to agree on, but for a quarter of them."""
PLAYED_BATCH_SIZE = 3
"""Rows that fit where a CPU plays a device without memory."""


@dataclass(frozen=True)
class Tolerance:
    """How far a device may be from the CPU.

    Args:
        logprob: of an answer, in nats.
        correlation: smallest rank correlation of two screens.
        change: difference of predicted changes of loss, as a share of their largest.
    """

    logprob: float
    correlation: float
    change: float


DTYPES: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(logprob=1e-3, correlation=0.999, change=1e-3),
    torch.float16: Tolerance(logprob=0.05, correlation=0.99, change=0.01),
    torch.bfloat16: Tolerance(logprob=0.3, correlation=0.98, change=0.1),
}
"""Dtypes of weights, and how far from exact sums they may lead: four times as far as a CPU leads in any family, or more."""


@dataclass(frozen=True)
class DeviceCheck:
    """The result of one check.

    Args:
        name: what was checked.
        passed: whether the device agrees with the CPU.
        detail: the figures, in words.
    """

    name: str
    passed: bool
    detail: str


def missing_gpu() -> str:
    """Return in one line why no CUDA GPU can be used here, or empty text if one can."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"no CUDA GPU found: PyTorch {torch.__version__} is built without CUDA"
    return f"no CUDA GPU found: PyTorch {torch.__version__} sees no GPU; see 'nvidia-smi', and CUDA_VISIBLE_DEVICES"


def check_device(device: torch.device | str) -> list[DeviceCheck]:
    """Return the checks of a small Llama on a device: three dtypes, mixed placement, and a device without memory."""
    lm = small_llama()
    checks = [check for dtype in DTYPES for check in check_model(lm, device, dtype)]
    return [*checks, *check_mixed_placement(lm, device), *check_out_of_memory(device)]


def check_model(lm: LanguageModel, device: torch.device | str, dtype: torch.dtype) -> list[DeviceCheck]:
    """Return the checks of a model on a device in a dtype.

    The CPU computes with the same rounded weights, in float32.

    Args:
        lm: a model on the CPU.
        device: what is checked.
        dtype: one of ``DTYPES``.
    """
    there, exact = _copy(lm, device, dtype), _copy(_copy(lm, "cpu", dtype), "cpu", torch.float32)
    tolerance, label = DTYPES[dtype], f"{lm.name} in {str(dtype).removeprefix('torch.')}"
    together, alone = _screened(there, len(EXAMPLES)), _screened(there, 1)
    return [
        _check_scores(f"{label}: choices", there, exact, tolerance),
        _check_screen(f"{label}: screen", together, _screened(exact, len(EXAMPLES)), tolerance),
        _check_gradients(f"{label}: padding in the backward pass", there, tolerance),
        _check_changes(f"{label}: padding in the screen", together, alone, tolerance),
        _check_changes(f"{label}: two screens", together, _screened(there, len(EXAMPLES)), tolerance),
    ]


def check_mixed_placement(lm: LanguageModel, device: torch.device | str) -> list[DeviceCheck]:
    """Return the checks of a model of which one layer of each block is on the CPU and the rest on a device.

    This is a device map finer than the blocks. Applied and factored reductions have to find the layer where it is.
    """
    there = _copy(lm, device, torch.float32)
    for path in {m.path.rpartition(".")[0] for m in there.matrices if m.name == "fc_out"}:
        layer = there.model.get_submodule(path).to("cpu")
        add_hook_to_module(layer, AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True))
    tolerance = DTYPES[torch.float32]
    reduction, cache = "all.fc_out@0.25", DecompositionCache()
    with applied(lm, reduction, cache=cache):
        expected = _choice_logprobs(lm)
    checks = [_check_scores("layers on two devices: choices", there, lm, tolerance)]
    for how, edited in (("applied", applied), ("factored", factored)):
        with edited(there, reduction, cache=cache):
            actual = _choice_logprobs(there)
        checks.append(_compare_choices(f"layers on two devices: {how} reduction", actual, expected, tolerance))
    screens = _screened(there, len(EXAMPLES)), _screened(lm, len(EXAMPLES))
    return [*checks, _check_screen("layers on two devices: screen", *screens, tolerance)]


def check_out_of_memory(device: torch.device | str) -> list[DeviceCheck]:
    """Return whether scores and screen come out the same if a batch does not fit into memory.

    On CUDA the memory of this process is limited to half of what the batch takes. On another device the model refuses it.
    """
    on_gpu = torch.device(device).type == "cuda"
    # A large batch on a GPU, so that its activations take far more than the pieces in which PyTorch reserves memory.
    lm = _copy(small_llama(width=512, layers=4) if on_gpu else small_llama(), device, torch.float32)
    lm.shares_prompts = False  # rows that begin alike would take less than half of the memory
    examples = tuple(
        Example(f"{e.id} {i}", "The river by the city " * (40 if on_gpu else 4) + e.prompt, e.answer, e.choices)
        for i in range(10 if on_gpu else 1)
        for e in EXAMPLES
    )
    split = Split("device check", "validation", examples, "answer")
    rows = encode(lm, examples, "answer")
    candidates = expand("all.fc_out@0.5,0.1", lm.matrices)

    def run() -> tuple[list[float], dict[str, float]]:
        scorer = PrefixScorer(lm, {"validation": EncodedSplit(split, rows, "answer")}, batch_size=len(examples))
        changes = _expected(scorer.screen("validation", 0, candidates).predictions)
        return [s.logprob for s in evaluate(lm, split, batch_size=len(examples)).scores], changes

    expected = run()
    with _half_of_memory(lm, run) as failures:
        actual = run()
        n_failures = failures()
    tolerance = DTYPES[torch.float32]
    difference = _worst(a - b for a, b in zip(expected[0], actual[0], strict=True))
    change = _difference(actual[1], expected[1])
    return [
        DeviceCheck(
            "out of memory",
            n_failures > 0 and difference <= tolerance.logprob and change <= tolerance.change,
            f"{n_failures} batches did not fit and were halved; log-probabilities differ by {difference:.1e} nats, predicted "
            f"changes by {change:.1e} of the largest",
        )
    ]


def small_llama(width: int = 64, layers: int = 3) -> LanguageModel:
    """Return a Llama of random weights on the CPU that knows the words of ``EXAMPLES``."""
    words = {word for e in EXAMPLES for text in (e.prompt, *e.choices) for word in text.split()}
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width**-0.5)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    return LanguageModel(model, fast, "a small llama", "causal")


def _copy(lm: LanguageModel, device: torch.device | str, dtype: torch.dtype) -> LanguageModel:
    model: Any = copy.deepcopy(lm.model)
    return LanguageModel(model.to(device=device, dtype=dtype), lm.tokenizer, lm.name, lm.kind)


def _choice_logprobs(lm: LanguageModel) -> list[list[float]]:
    """Return the log-probability of each choice of each example, in nats."""
    rows = encode(lm, EXAMPLES, "choice")
    logprobs: list[list[float]] = [[] for _ in EXAMPLES]
    for row, scores in zip(rows, run_rows(lm, rows, len(rows)), strict=True):
        logprobs[row.example] += scores.choice_logprobs or [sum(scores.logprobs)]
    return logprobs


def _check_scores(name: str, lm: LanguageModel, exact: LanguageModel, tolerance: Tolerance) -> DeviceCheck:
    """Compare the choices of the unchanged model and under a reduction of the first, the middle and the last block."""
    candidates = expand("all.fc_out@0.5", lm.matrices)
    actual, expected = _choice_logprobs(lm), _choice_logprobs(exact)
    for candidate in (candidates[0], candidates[len(candidates) // 2], candidates[-1]):
        for model, scores in ((lm, actual), (exact, expected)):
            with applied(model, candidate.intervention, cache=DecompositionCache()):
                scores += _choice_logprobs(model)
    return _compare_choices(name, actual, expected, tolerance)


def _compare_choices(name: str, actual: list[list[float]], expected: list[list[float]], tolerance: Tolerance) -> DeviceCheck:
    """Compare log-probabilities, and which choice is the likeliest wherever the difference allowed cannot decide that."""
    difference = _worst(x - y for a, b in zip(actual, expected, strict=True) for x, y in zip(a, b, strict=True))
    same, other = 0, 0
    for a, b in zip(actual, expected, strict=True):
        first, second, *_ = sorted(b, reverse=True)
        if a.index(max(a)) == b.index(first):
            same += 1
        elif first - second > 2 * tolerance.logprob:
            other += 1
    return DeviceCheck(
        name,
        not other and difference <= tolerance.logprob,
        f"{same} of {len(actual)} choices are the same, {other} differ clearly; log-probabilities differ by {difference:.1e} "
        f"nats (allowed {tolerance.logprob:g})",
    )


def _screened(lm: LanguageModel, batch_size: int) -> dict[str, float]:
    """Return the change of loss that the screen expects of each candidate of ``GRID``."""
    rows = encode(lm, EXAMPLES, "answer")
    screening = screen(
        lm, EXAMPLES, rows, "answer", expand(GRID, lm.matrices), cache=DecompositionCache(), batch_size=batch_size
    )
    return _expected(screening.predictions)


def _expected(predictions: Mapping[str, Prediction]) -> dict[str, float]:
    return {text: prediction.expected for text, prediction in predictions.items()}


def _difference(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Return the largest difference of predictions as a share of the largest; infinite if others are predicted."""
    if a.keys() != b.keys() or not a:
        return math.inf
    return _worst(a[text] - b[text] for text in b) / max(map(abs, b.values()))


def _worst(differences: Iterable[float]) -> float:
    """Return the largest absolute value; infinite if one is not a number."""
    return max(abs(d) if math.isfinite(d) else math.inf for d in differences)


def _check_changes(name: str, a: Mapping[str, float], b: Mapping[str, float], tolerance: Tolerance) -> DeviceCheck:
    change = _difference(a, b)
    return DeviceCheck(
        name,
        change <= tolerance.change,
        f"{len(a)} and {len(b)} candidates have finite predictions, which differ by {change:.1e} of the largest "
        f"(allowed {tolerance.change:g})",
    )


def _check_gradients(name: str, lm: LanguageModel, tolerance: Tolerance) -> DeviceCheck:
    """Compare gradients over one padded batch with those over single rows. The screen repairs gradients; this does not."""
    together, alone = _gradient(lm, len(EXAMPLES)), _gradient(lm, 1)
    finite = bool(together.isfinite().all())
    difference = float((together - alone).norm() / alone.norm())
    return DeviceCheck(
        name,
        finite and difference <= tolerance.change,
        f"gradients of padded rows are {'finite' if finite else 'NOT finite'} and differ from those of single rows by "
        f"{difference:.1e} in norm (allowed {tolerance.change:g})",
    )


def _gradient(lm: LanguageModel, batch_size: int) -> Tensor:
    """Return the gradient of the summed log-losses along all weights, in one vector."""
    rows = encode(lm, EXAMPLES, "answer")
    parameters = list(lm.model.parameters())
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for batch in batches(lm, rows, batch_size):
        with torch.enable_grad():
            loss = -forward_logits(lm, batch, scored_only=False).logprobs.sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for one, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                one += gradient
    return torch.cat([one.flatten() for one in total])


def _check_screen(name: str, a: Mapping[str, float], b: Mapping[str, float], tolerance: Tolerance) -> DeviceCheck:
    if a.keys() != b.keys():
        return DeviceCheck(name, False, f"{len(a)} candidates have finite predictions here, and {len(b)} on the CPU")
    correlation = spearman(dense_ranks(list(a.values())), dense_ranks([b[text] for text in a]))
    best_a, best_b = (set(sorted(x, key=x.__getitem__)[:TOP]) for x in (a, b))
    both = len(best_a & best_b)
    return DeviceCheck(
        name,
        correlation >= tolerance.correlation and both >= TOP * 3 // 4,
        f"rank correlation {correlation:.4f} over {len(a)} candidates (at least {tolerance.correlation:g}); "
        f"{both} of the best {TOP} are the same",
    )


@contextmanager
def _half_of_memory(lm: LanguageModel, run: Callable[[], object]) -> Iterator[Callable[[], int]]:
    """Leave a device half of the memory that a run takes; yield what counts the batches that did not fit."""
    if lm.device.type != "cuda":
        with _refuse_batches(lm) as refused:
            yield lambda: len(refused)
        return
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(lm.device)
    torch.cuda.reset_peak_memory_stats(lm.device)
    run()
    peak = torch.cuda.max_memory_reserved(lm.device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(lm.device).total_memory
    failed_before = torch.cuda.memory_stats(lm.device)["num_ooms"]
    torch.cuda.set_per_process_memory_fraction((before + peak) / 2 / total, lm.device)
    try:
        yield lambda: torch.cuda.memory_stats(lm.device)["num_ooms"] - failed_before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, lm.device)


@contextmanager
def _refuse_batches(lm: LanguageModel) -> Iterator[list[int]]:
    refused: list[int] = []

    def refuse(_module: torch.nn.Module, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["input_ids"]) > PLAYED_BATCH_SIZE:
            refused.append(len(inputs["input_ids"]))
            raise torch.OutOfMemoryError("the CPU plays a device without memory")

    handle = lm.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield refused
    finally:
        handle.remove()
