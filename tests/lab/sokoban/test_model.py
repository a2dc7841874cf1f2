"""The Decision Transformer that reads and writes Sokoban as text, beside the Gymnasium environment."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import laserlm
from laserlm.edit import applied
from laserlm.lab.sokoban.env import Sokoban
from laserlm.lab.sokoban.episodes import replay, task
from laserlm.lab.sokoban.levels import CELLS, Level, generate
from laserlm.lab.sokoban.model import LEVEL_TOKENS, SokobanConfig, SokobanForCausalLM, tokenizer
from laserlm.lab.sokoban.solver import MOVES
from laserlm.models import LanguageModel, load
from laserlm.models.matrices import read_matrix
from laserlm.scoring import generation
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.forward import run_rows
from laserlm.scoring.prefix_cache import PrefixCache, PrefixCheck
from laserlm.scoring.tokenize import encode

WALL = "#" * 10
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "channels": 4, "depth": 1}
MADE = [*generate(6, seed=5, boxes=1, room=4), *generate(4, seed=6, boxes=2, room=5), *generate(2, seed=7, boxes=3)]
LEVELS = [level for level, _ in MADE]
EASY = [level for level, _ in generate(30, seed=3, boxes=1, room=3, steps=(1, 4))]
TOKENS = tokenizer()
END, PAD = TOKENS.convert_tokens_to_ids(["<end>", "<pad>"])
FIRST = TOKENS.convert_tokens_to_ids(MOVES[0])
STEPS = 12


def board(*inner: str) -> Level:
    """Return a level of the rows from row 1 on; the rest is wall."""
    return Level((WALL, *(f"#{row:#<9}" for row in inner), *([WALL] * (9 - len(inner)))))


def tiny(seed: int = 0) -> SokobanForCausalLM:
    """Return a model of random weights, larger than those that training begins with, so that it makes all kinds of moves."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SokobanForCausalLM(SokobanConfig(**SMALL))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return model.eval()


def always(move: str) -> SokobanForCausalLM:
    """Return a model that makes the same move whatever it sees."""
    model = tiny()
    head = model.decide.predict_action[0]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([float(m == move) for m in MOVES]))
    return model


def ids_of(*texts: str) -> Tensor:
    return torch.tensor([TOKENS(text).input_ids for text in texts])


def walk(rng: random.Random, steps: int) -> str:
    return "".join(rng.choice(MOVES) for _ in range(steps))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved model and its tokenizer."""
    folder = tmp_path_factory.mktemp("sokoban") / "model"
    tiny().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def lm() -> LanguageModel:
    return LanguageModel(model=tiny(), tokenizer=tokenizer(), name="tiny", kind="causal")


def test_each_symbol_is_a_token_and_a_cell_s_is_its_code() -> None:
    for level, moves in MADE:
        text = level.text + moves
        ids = TOKENS(text).input_ids
        assert len(ids) == len(text)
        assert TOKENS.decode(ids) == text
        assert len(level.text) == LEVEL_TOKENS
        assert tuple(i for i, symbol in zip(ids, level.text, strict=False) if symbol != "\n") == level.codes
    assert sorted(TOKENS.get_vocab()) == sorted([*CELLS, "\n", *MOVES, "<end>", "<pad>"])


@torch.no_grad()
def test_the_logits_at_a_move_are_those_of_the_text_that_ends_there() -> None:
    model, rng = tiny().double(), random.Random(0)
    for level in LEVELS[::3]:
        moves = walk(rng, STEPS)
        complete = model(ids_of(level.text + moves)).logits[0]
        for turn in range(STEPS + 1):
            alone = model(ids_of(level.text + moves[:turn])).logits[0, -1]
            assert torch.allclose(complete[LEVEL_TOKENS - 1 + turn], alone, atol=1e-9)
            other = model(ids_of(level.text + moves[:turn] + walk(rng, STEPS - turn))).logits[0]
            known = slice(LEVEL_TOKENS - 1, LEVEL_TOKENS + turn)
            assert torch.allclose(complete[known], other[known], atol=1e-9)


@torch.no_grad()
def test_the_logits_depend_on_the_level_and_on_earlier_moves() -> None:
    model = tiny()
    first, second, third = model(ids_of(LEVELS[0].text + "uu", LEVELS[0].text + "du", LEVELS[1].text + "uu")).logits[:, -1]
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first, third, atol=1e-3)


@torch.no_grad()
def test_padding_on_the_left_changes_no_logits() -> None:
    model, rng = tiny().double(), random.Random(1)
    texts = [level.text + walk(rng, steps) for level, steps in zip(LEVELS, [0, 9, 4, 1, 9, 7], strict=False)]
    batch = TOKENS(texts, padding=True, return_tensors="pt")
    assert batch.input_ids.shape == (6, LEVEL_TOKENS + 9)
    together = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    for row, text in zip(together, texts, strict=True):
        alone = model(ids_of(text)).logits[0, LEVEL_TOKENS - 1 :]
        assert torch.allclose(row[-len(alone) :], alone, atol=1e-9)


@torch.no_grad()
def test_what_is_seen_after_each_move_is_what_the_environment_shows() -> None:
    model, rng = tiny(), random.Random(2)
    seen: list[Tensor] = []
    calls: list[Tensor] = []
    model.see.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model.decide.register_forward_pre_hook(lambda _m, _a, kw: calls.append(kw["returns_to_go"]), with_kwargs=True)
    for level, solution in MADE:
        moves = solution[:-1] + walk(rng, 6)
        env = Sokoban([level], max_steps=1000)
        codes, _ = env.reset(options={"level": 0})
        boards, rewards = [codes], [0.0]
        for move in moves:
            codes, reward, solved, _, _ = env.step(np.int64(MOVES.index(move)))
            boards, rewards = [*boards, codes], [*rewards, float(reward)]
            if solved:
                break
        model(ids_of(level.text + moves[: len(boards) - 1]))
        shown = np.array(boards)
        walls, goals, boxes, player = (np.isin(shown, of) for of in ([2], [1, 4, 6], [3, 4], [5, 6]))
        assert np.array_equal(seen.pop().numpy(), np.stack([walls, goals, boxes, player], 1))
        # A generated level has no box on a goal: each is worth 1, and the end 10; what was earned is no longer to come.
        to_go = 10 + len(level.boxes) - np.cumsum(rewards)
        assert calls.pop()[0, :, 0].numpy() == pytest.approx(to_go / 10, abs=1e-5)


@torch.no_grad()
def test_the_return_asked_for_is_one_for_each_box_not_on_a_goal_and_ten_for_the_end() -> None:
    model = tiny()
    calls: list[Tensor] = []
    model.decide.register_forward_pre_hook(lambda _m, _a, kw: calls.append(kw["returns_to_go"]), with_kwargs=True)
    model(ids_of(board("* @$.").text, board("$.@$.").text))
    assert calls[0][:, 0, 0].tolist() == pytest.approx([1.1, 1.2])


def test_the_loss_is_the_mean_over_the_moves_of_all_rows() -> None:
    model = tiny()
    texts = [level.text + moves for level, moves in MADE]
    batch = TOKENS(texts, padding=True, return_tensors="pt")
    width = batch.input_ids.shape[1]
    labels = batch.input_ids.clone()
    for row, (_, moves) in enumerate(MADE):
        labels[row, : width - len(moves)] = -100
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    losses = []
    for level, moves in MADE:
        for turn, move in enumerate(moves):
            logits = model(ids_of(level.text + moves[:turn])).logits[0, -1].tolist()
            losses.append(math.log(math.fsum(map(math.exp, logits))) - logits[FIRST + MOVES.index(move)])
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    learning = {name.partition(".")[0] for name, g in gradients.items() if bool(g.any())}
    assert learning == {"see", "decide"}


@torch.no_grad()
def test_a_solved_board_is_followed_by_the_end_and_any_other_by_a_move() -> None:
    model = tiny()
    for level, moves in MADE:
        likely = model(ids_of(level.text + moves)).logits[0, LEVEL_TOKENS - 1 :].softmax(-1)  # (S, V)
        assert likely[-1, END].item() == pytest.approx(1)
        assert bool((likely[:-1, END] == 0).all())
        assert likely[:-1, FIRST : FIRST + 4].sum(1).tolist() == pytest.approx([1] * len(moves))
        assert bool((likely[:-1, FIRST : FIRST + 4] > 0).all())


@torch.no_grad()
def test_generating_is_playing_in_the_environment_move_by_move() -> None:
    model = tiny()
    levels = [*LEVELS, *EASY]
    generated = model.generate(ids_of(*(level.text for level in levels)), max_new_tokens=STEPS)
    assert generated.shape == (len(levels), LEVEL_TOKENS + STEPS)
    env = Sokoban(levels, max_steps=STEPS)
    ends = []
    for index, level in enumerate(levels):
        env.reset(options={"level": index})
        moves, total, solved, truncated = "", 0.0, False, False
        while not (solved or truncated):
            action = model(ids_of(level.text + moves)).logits[0, -1].argmax() - FIRST
            _, reward, solved, truncated, _ = env.step(np.int64(action))
            moves, total = moves + MOVES[action], total + float(reward)
        rest = [END, *[PAD] * STEPS] if solved else []
        assert generated[index].tolist() == [*TOKENS(level.text + moves).input_ids, *rest][: LEVEL_TOKENS + STEPS]
        right, total_reward, steps = replay(level, moves)
        assert (right, steps) == (solved, len(moves))
        assert total_reward == pytest.approx(total)
        ends.append(solved)
    assert 3 <= sum(ends) <= len(levels) - 3


@torch.no_grad()
def test_at_each_turn_a_play_decides_on_what_reading_the_text_so_far_gives() -> None:
    model = tiny()
    calls: list[Tensor] = []
    model.decide.predict_action.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    for level in [*LEVELS[::2], *EASY[:6]]:
        calls.clear()
        tokens = model.generate(ids_of(level.text), max_new_tokens=STEPS)[0, LEVEL_TOKENS:]
        moves = TOKENS.decode(tokens, skip_special_tokens=True)
        played = torch.cat(calls)  # (turns, H)
        calls.clear()
        model(ids_of(level.text + moves))
        assert len(played) == len(moves)
        assert torch.allclose(played, calls[0][0, : len(moves)], atol=1e-5)


@torch.no_grad()
def test_levels_that_are_played_on_decide_as_they_do_alone() -> None:
    model = tiny()
    levels = [board("@$."), *LEVELS]  # of which some are solved on the way
    together = model.generate(ids_of(*(level.text for level in levels)), max_new_tokens=STEPS)
    for i, level in enumerate(levels):
        assert torch.equal(together[i], model.generate(ids_of(level.text), max_new_tokens=STEPS)[0])


def test_a_model_that_only_goes_right_solves_what_lies_to_the_right() -> None:
    levels = [board("@$."), board("@ $ ."), board(".$@ "), board("@*"), board("@   $.")]
    texts = [level.text for level in levels]
    generated = always("r").generate(ids_of(*texts), max_new_tokens=4)[:, LEVEL_TOKENS:]
    r = FIRST + MOVES.index("r")
    assert generated.tolist() == [[r, END, PAD, PAD], [r, r, r, END], [r] * 4, [END, PAD, PAD, PAD], [r] * 4]
    lm = LanguageModel(model=always("r"), tokenizer=tokenizer(), name="right", kind="causal")
    assert generation.generate(lm, texts, max_new_tokens=4) == ["r", "rrr", "rrrr", "", "rrrr"]


def test_sampling_is_repeated_by_its_seed_and_follows_the_probabilities() -> None:
    model, n = tiny(), 4000
    level = LEVELS[6]
    for temperature in (1.0, 3.0):
        torch.manual_seed(0)
        drawn = model.generate(ids_of(level.text).repeat(n, 1), max_new_tokens=2, do_sample=True, temperature=temperature)
        with torch.no_grad():
            likely = (model(ids_of(level.text)).logits[0, -1, FIRST : FIRST + 4] / temperature).softmax(-1)
        shares = torch.bincount(drawn[:, LEVEL_TOKENS] - FIRST, minlength=4) / n
        assert bool(((shares - likely).abs() <= 4 * (likely * (1 - likely) / n).sqrt()).all())
    ids = ids_of(*(level.text for level in LEVELS))
    options = {"max_new_tokens": STEPS, "do_sample": True}
    calls = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        calls.append(model.generate(ids, temperature=2.0, **options))
    assert torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[0], calls[2])
    assert torch.equal(model.generate(ids, temperature=1e-4, **options), model.generate(ids, max_new_tokens=STEPS))


def test_as_many_moves_can_be_written_as_the_model_has_steps() -> None:
    generated = always("l").generate(ids_of(LEVELS[0].text), max_new_tokens=120)
    assert generated[0, LEVEL_TOKENS:].tolist() == [FIRST + MOVES.index("l")] * 120


@torch.no_grad()
def test_it_loads_as_any_model(folder: Path) -> None:
    texts = [level.text + moves for level, moves in MADE[:3]]
    loaded = load(folder)
    assert loaded.kind == "causal"
    assert loaded.family == "laser_sokoban"
    for text in texts:
        assert torch.equal(loaded.model(ids_of(text)).logits, tiny()(ids_of(text)).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_plays_in_half_precision(folder: Path, dtype: str) -> None:
    half = load(folder, dtype=dtype)
    level, moves = MADE[0]
    logits = half.model(ids_of(level.text + moves)).logits.float()
    assert bool(logits.isfinite().all())
    assert logits[0, -1].softmax(-1)[END].item() == pytest.approx(1)
    # Eight bits of mantissa at least, through a few layers.
    complete = tiny()(ids_of(level.text + moves)).logits
    assert torch.allclose(
        logits[0, LEVEL_TOKENS - 1 : -1].softmax(-1), complete[0, LEVEL_TOKENS - 1 : -1].softmax(-1), atol=0.1
    )
    assert len(generation.generate(half, [level.text], max_new_tokens=5)[0]) <= 5


def test_the_matrices_of_its_blocks_have_their_names(lm: LanguageModel) -> None:
    names = {"qkv", "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    by_name = {(m.layer, m.name): m for m in lm.matrices}
    assert set(by_name) == {(layer, name) for layer in (0, 1) for name in names}
    assert {m.id for m in lm.matrices} == {f"{layer}.{name}" for layer, name in by_name}
    for layer, block in enumerate(lm.model.decide.encoder.h):
        stored = {
            "q_proj": block.attn.c_attn.weight[:, :16],
            "k_proj": block.attn.c_attn.weight[:, 16:32],
            "v_proj": block.attn.c_attn.weight[:, 32:],
            "out_proj": block.attn.c_proj.weight,
            "fc_in": block.mlp.c_fc.weight,
            "fc_out": block.mlp.c_proj.weight,
        }
        for name, weight in stored.items():
            assert torch.equal(read_matrix(lm.model, by_name[layer, name]), weight.T)


def test_a_reduction_changes_scores_and_is_undone(lm: LanguageModel) -> None:
    questions = task(MADE, max_steps=STEPS).every
    before = evaluate(lm, questions)
    with applied(lm, "1.fc_in@0"):
        block = lm.model.decide.encoder.h[1]
        assert not bool(block.mlp.c_fc.weight.any())
        within = evaluate(lm, questions)
    assert within.intervention == "1.fc_in@0"
    assert abs(within.loss - before.loss) > 1e-3
    assert [s.logprob for s in evaluate(lm, questions).scores] == [s.logprob for s in before.scores]


def test_the_frontier_moves_through_its_blocks_and_scores_as_full_passes_do(lm: LanguageModel) -> None:
    rows = encode(lm, task(MADE).every.examples, "answer")
    checks = PrefixCheck(lm, rows)
    assert checks.block_order == [("", 0), ("", 1)]
    assert checks.is_exact(1)
    frontier = PrefixCache(lm, rows, 4, checks)
    assert frontier.is_enabled
    frontier.move_to("", 1)
    assert frontier.boundary == 1
    for text in ("", "1.fc_in@0", "1.q_proj@0.2", "1.out_proj@0.1"):
        with applied(lm, text):
            short, complete = frontier.run(), run_rows(lm, rows, 4)
        assert [o.argmax for o in short] == [o.argmax for o in complete]
        for a, b in zip(short, complete, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_reduced_copy_scores_as_the_model_does_under_the_reduction(folder: Path, tmp_path: Path, form: str) -> None:
    lm, questions = load(folder), task(MADE, max_steps=STEPS).every
    reduction = "1.fc_in@0.2+0.v_proj@0.1"
    laserlm.save(lm, reduction, tmp_path / "reduced", form=form)
    with applied(lm, reduction):
        expected = evaluate(lm, questions)
    got = evaluate(load(tmp_path / "reduced"), questions)
    assert [s.logprob for s in got.scores] == pytest.approx([s.logprob for s in expected.scores], abs=1e-4)
    assert [(s.predicted, s.correct, s.figures) for s in got.scores] == [
        (s.predicted, s.correct, s.figures) for s in expected.scores
    ]
    assert abs(expected.loss - evaluate(lm, questions).loss) > 1e-4
