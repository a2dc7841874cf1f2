from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import CAUSAL, SEQ2SEQ

from laserlm.errors import ScoringError
from laserlm.models import LanguageModel
from laserlm.scoring.generation import generate

Make = Callable[..., LanguageModel]
PROMPTS = ["The capital of France is", "Rome is a city in Italy and the capital of Norway is", "Oslo"]


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_a_batch_continues_as_plain_greedy_decoding_does(family: str, make: Make) -> None:
    lm = make(family)
    tok = lm.need_tokenizer()
    expected = []
    for prompt in PROMPTS:
        ids = tok(prompt).input_ids
        made = [0] if lm.kind == "encoder-decoder" else list(ids)
        start = len(made)
        with torch.no_grad():
            while len(made) < start + 6:
                given = {"input_ids": torch.tensor([made])}
                if lm.kind == "encoder-decoder":
                    given = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([made])}
                logits = lm.model(**given).logits[0, -1]
                if len(made) == start:
                    logits[tok.eos_token_id] = -torch.inf  # one new token at least
                made.append(int(logits.argmax()))
                if made[-1] == lm.model.generation_config.eos_token_id:
                    break
        expected.append(tok.decode(made[start:], skip_special_tokens=True))
    assert generate(lm, PROMPTS, max_new_tokens=6) == expected


def test_settings_of_the_checkpoint_do_not_change_greedy_decoding(make: Make) -> None:
    lm = make("llama")
    plain = generate(lm, PROMPTS)
    lm.model.generation_config.num_beams = 3
    lm.model.generation_config.repetition_penalty = 5.0
    lm.model.generation_config.no_repeat_ngram_size = 1
    assert generate(lm, PROMPTS) == plain


def test_what_cannot_be_generated_is_told(make: Make, llama: LanguageModel) -> None:
    with pytest.raises(ScoringError, match="does not generate"):
        generate(make("bert"), PROMPTS)
    with pytest.raises(ScoringError, match="nothing to generate"):
        generate(llama, [""])
    with pytest.raises(ScoringError, match="are more than the 128"):
        generate(make("gpt2"), PROMPTS, max_new_tokens=128)
