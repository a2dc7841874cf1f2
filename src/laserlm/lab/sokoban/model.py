"""A Decision Transformer for Sokoban: it reads a level and moves as a text, and returns the next move as a token.

The level and the moves determine every board. A forward pass therefore computes all boards by the rules and encodes each
board with convolutions. transformers' Decision Transformer then reads boards, moves and returns to go. Generating moves
after a level plays the level: every token is a step in the environment.

Source: Chen et al., "Decision Transformer", arXiv 2106.01345.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.decision_transformer.configuration_decision_transformer import DecisionTransformerConfig
from transformers.models.decision_transformer.modeling_decision_transformer import DecisionTransformerModel
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from laserlm.lab.sokoban.dynamics import REWARD_ON_GOAL, REWARD_SOLVED, State, step
from laserlm.lab.sokoban.levels import CELLS
from laserlm.lab.sokoban.solver import MOVES, SIDE
from laserlm.models.architectures import ARCHITECTURES, GPT2, Architecture

LINE_END_TOKEN = len(CELLS)
"""Token of a line end. The tokens of the cells are their codes."""
FIRST_MOVE_TOKEN = LINE_END_TOKEN + 1
END_TOKEN = FIRST_MOVE_TOKEN + len(MOVES)
PAD_TOKEN = END_TOKEN + 1
LEVEL_TOKENS = SIDE * (SIDE + 1)
"""Number of tokens of a level: its cells and line ends."""
CELL_POSITIONS = torch.tensor([(SIDE + 1) * row + column for row in range(SIDE) for column in range(SIDE)])
"""Positions of the cells among a level's tokens, (100,)."""
MAX_STEPS = 120
"""Largest number of moves that the model supports."""
IMPOSSIBLE_LOGIT = -1e4
"""Logit of a token that cannot follow. It is finite so that gradients are finite."""


class SokobanConfig(PreTrainedConfig):
    """Configuration of the model; shared fields have the names of ``DecisionTransformerConfig``."""

    model_type = "laser_sokoban"

    vocab_size: int = PAD_TOKEN + 1
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    channels: int = 32
    depth: int = 8
    max_steps: int = MAX_STEPS
    max_position_embeddings: int = LEVEL_TOKENS + MAX_STEPS
    eos_token_id: int | None = END_TOKEN
    pad_token_id: int | None = PAD_TOKEN
    use_cache: bool = False


class _Encoder(nn.Module):
    """Encode boards with residual convolutions, pooled at the player's cell and over all cells."""

    def __init__(self, config: SokobanConfig) -> None:
        super().__init__()
        c = config.channels
        self.first = nn.Conv2d(4, c, 3, padding=1)
        self.deeper = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(config.depth))
        self.last = nn.Linear(2 * c, config.hidden_size)

    def forward(self, planes: Tensor) -> Tensor:
        """Return the encodings (N, H) of boards (N, 4, 10, 10)."""
        floor = 1 - planes[:, :1]  # the zero padding beyond the board then reads as wall
        planes = torch.cat([floor, planes[:, 1:]], 1)[..., 1:-1, 1:-1].to(self.last.weight.dtype)  # (N, 4, 8, 8)
        x = self.first(planes)  # (N, C, 8, 8)
        for layer in self.deeper:
            x = x + layer(torch.relu(x))
        x = torch.relu(x)
        at_player = (x * planes[:, 3:]).sum((2, 3))  # (N, C)
        out: Tensor = self.last(torch.cat([at_player, x.mean((2, 3))], 1))
        return out


class SokobanForCausalLM(PreTrainedModel):
    """Predict the next move after a level and the moves so far."""

    config_class = SokobanConfig
    main_input_name = "input_ids"

    def __init__(self, config: SokobanConfig) -> None:
        super().__init__(config)
        self.see = _Encoder(config)
        self.decide = DecisionTransformerModel(
            DecisionTransformerConfig(
                state_dim=config.hidden_size,
                act_dim=len(MOVES),
                hidden_size=config.hidden_size,
                max_ep_len=config.max_steps + 1,
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                n_positions=3 * (config.max_steps + 1),
                action_tanh=False,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Return logits (B, L, V), valid from a level's last token on, and the loss if there are labels.

        Args:
            input_ids: (B, L) levels, each followed by moves; padded on the left.
            attention_mask: (B, L), 0 for padding.
            labels: (B, L), the tokens that the loss is over, -100 elsewhere.
        """
        length = input_ids.shape[1]
        if length < LEVEL_TOKENS:  # the end of a level; padding, which reads as floor, completes it
            input_ids = nn.functional.pad(input_ids, (LEVEL_TOKENS - length, 0), value=PAD_TOKEN)
            attention_mask = None
        B, L = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        start = (L - mask.sum(1, keepdim=True)).clamp(max=L - LEVEL_TOKENS)  # (B, 1)
        positions = start + LEVEL_TOKENS - 1 + torch.arange(L - LEVEL_TOKENS + 1, device=start.device)  # (B, S) of next moves
        known = positions < L
        positions = positions.clamp(max=L - 1)
        codes = input_ids.gather(1, start + CELL_POSITIONS.to(start.device))  # (B, 100)
        moves = (input_ids.gather(1, (positions + 1).clamp(max=L - 1)) - FIRST_MOVE_TOKEN).clamp(0, len(MOVES) - 1)  # (B, S)

        state, to_go = State.of(codes), _max_return(codes)  # (B,) boards and returns
        boards, returns, ends = [state.planes], [to_go], [state.solved]
        for i in range(moves.shape[1] - 1):
            state, rewards = step(state, moves[:, i])
            to_go = to_go - rewards
            boards, returns, ends = [*boards, state.planes], [*returns, to_go], [*ends, state.solved]
        planes, solved = torch.stack(boards, 1), torch.stack(ends, 1)  # (B, S, 4, 10, 10), (B, S)
        encodings = planes.new_zeros(B, planes.shape[1], self.config.hidden_size, dtype=self.dtype)  # (B, S, H)
        encodings[known] = self.see(planes[known])
        scores = self._move_scores(encodings, moves, torch.stack(returns, 1), known)  # (B, S, 4)

        token_scores = scores.new_full((*scores.shape[:2], self.config.vocab_size), IMPOSSIBLE_LOGIT)  # (B, S, V)
        token_scores[..., FIRST_MOVE_TOKEN:END_TOKEN] = torch.where(solved[..., None], IMPOSSIBLE_LOGIT, scores)
        token_scores[..., END_TOKEN] = torch.where(solved, 0.0, IMPOSSIBLE_LOGIT)
        row, turn = known.nonzero(as_tuple=True)
        logits = scores.new_zeros(B, L, self.config.vocab_size)
        logits[row, positions[row, turn]] = token_scores[row, turn]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits[:, -length:])

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """Return None: the model encodes boards and embeds no tokens."""

    def _move_scores(self, encodings: Tensor, moves: Tensor, returns: Tensor, known: Tensor) -> Tensor:
        """Return the scores of the moves at each turn, (B, S, 4), for encoded boards, (B, S, H)."""
        scores: Tensor = self.decide(
            states=encodings,
            actions=nn.functional.one_hot(moves, len(MOVES)).to(self.dtype),
            returns_to_go=returns[..., None].to(self.dtype) / REWARD_SOLVED,
            timesteps=torch.arange(encodings.shape[1], device=encodings.device).expand(len(encodings), -1),
            attention_mask=known.long(),
        ).action_preds
        return scores

    def _next_move_scores(self, cache: DynamicCache, encodings: Tensor, last: Tensor, to_go: Tensor, turn: int) -> Tensor:
        """Return the scores of the moves at one turn, (P, 4), equal to ``_move_scores``.

        The Decision Transformer does not pass a cache on. This method therefore joins its embeddings in its order: the
        previous move, the return to go, the board.

        Args:
            cache: keys and values of the turns before; this turn adds its own.
            encodings: (P, H) encoded boards.
            last: (P,) the previous moves; not used at the first turn.
            to_go: (P,) returns to go.
            turn: number of the turn, from 0.
        """
        d = self.decide
        now, before = d.embed_timestep.weight[turn], d.embed_timestep.weight[turn - 1]  # (H,) both
        tokens = [d.embed_return(to_go[:, None].to(self.dtype) / REWARD_SOLVED) + now, d.embed_state(encodings) + now]
        if turn:
            tokens.insert(0, d.embed_action(nn.functional.one_hot(last, len(MOVES)).to(self.dtype)) + before)
        x = d.embed_ln(torch.stack(tokens, 1))  # (P, 2 or 3, H)
        positions = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        known = torch.ones(len(x), cache.get_seq_length() + x.shape[1], dtype=torch.long, device=x.device)
        out = d.encoder(
            inputs_embeds=x, attention_mask=known, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        scores: Tensor = d.predict_action(out[:, -1])
        return scores

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        **_: Any,
    ) -> Tensor:
        """Play levels until each is solved or the moves are used up; return levels and moves, (B, L), padded at the end.

        Each turn is computed once, and a solved level is not played on. transformers' own ``generate`` would play from the
        start at every move. Of its settings only those below have an effect.

        Args:
            input_ids: (B, ``LEVEL_TOKENS``) levels.
            max_new_tokens: maximum number of moves, below ``max_steps``.
            do_sample: draw moves at random instead of taking the likeliest.
            temperature: sampling temperature.
        """
        B, device = len(input_ids), input_ids.device
        codes = input_ids[:, CELL_POSITIONS.to(device)]  # (B, 100)
        state, to_go = State.of(codes), _max_return(codes)
        playing = torch.arange(B, device=device)  # levels that are not solved yet, (P,)
        moves = playing.new_zeros(B)  # (P,)
        cache = DynamicCache(config=self.decide.config)
        tokens = torch.full((B, max_new_tokens), PAD_TOKEN, device=device)
        for turn in range(max_new_tokens):
            unsolved = ~state.solved
            tokens[playing[~unsolved], turn] = END_TOKEN
            playing, to_go, moves = playing[unsolved], to_go[unsolved], moves[unsolved]
            state = State(*(getattr(state, name)[unsolved] for name in ("walls", "goals", "boxes", "player")))
            if not len(playing):
                break
            if turn and not bool(unsolved.all()):
                cache.batch_select_indices(unsolved.nonzero()[:, 0])
            scores = self._next_move_scores(cache, self.see(state.planes), moves, to_go, turn).float()  # (P, 4)
            moves = torch.multinomial((scores / temperature).softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)
            tokens[playing, turn] = FIRST_MOVE_TOKEN + moves
            state, rewards = step(state, moves)
            to_go = to_go - rewards
        return torch.cat([input_ids, tokens], 1)


def _max_return(codes: Tensor) -> Tensor:
    """Return the largest return of levels, apart from the costs of steps, (B,).

    The model is asked for this return. It learns from optimal episodes only, and their true return would reveal the number
    of moves that are left.
    """
    state = State.of(codes)
    return REWARD_SOLVED + REWARD_ON_GOAL * (state.boxes & ~state.goals).sum(1)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per cell, line end and move."""
    symbols = [*CELLS, "\n", *MOVES, "<end>", "<pad>"]
    letters = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        eos_token="<end>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


AutoConfig.register(SokobanConfig.model_type, SokobanConfig)
AutoModelForCausalLM.register(SokobanConfig, SokobanForCausalLM)
ARCHITECTURES[SokobanConfig.model_type] = Architecture((("", "decide.encoder.h"),), GPT2.matrices, GPT2.fused)
