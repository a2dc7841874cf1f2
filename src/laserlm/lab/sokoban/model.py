"""A Decision Transformer for Sokoban that reads a level and moves as a text, and gives the next move as a token.

What the player sees after some moves follows from the level and the moves, so a forward pass computes all boards by the
rules first, encodes each by convolutions, and gives them with moves and returns to go to transformers' Decision
Transformer. To write moves after a level is therefore to play it: every token is a step in the environment.

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
from laserlm.lab.sokoban.levels import CELLS, MOVES, SIDE

__all__ = ["CELL_PLACES", "LEVEL", "MAX_STEPS", "SokobanConfig", "SokobanForCausalLM", "tokenizer"]

LINE_END = len(CELLS)
"""Token of a line's end; those of the cells are their codes."""
FIRST_MOVE = LINE_END + 1
END, PAD = FIRST_MOVE + len(MOVES), FIRST_MOVE + len(MOVES) + 1
LEVEL = SIDE * (SIDE + 1)
"""Tokens of a level: its cells and line ends."""
CELL_PLACES = torch.tensor([(SIDE + 1) * row + column for row in range(SIDE) for column in range(SIDE)])
"""Which of a level's tokens are its cells, (100,)."""
MAX_STEPS = 120
"""Moves that a model is made for at most."""
NEVER = -1e4
"""Logit of a token that does not come: finite, so that gradients are."""


class SokobanConfig(PreTrainedConfig):
    """Shape of the model; the names are those of ``DecisionTransformerConfig`` where it has them."""

    model_type = "laser_sokoban"

    vocab_size: int = PAD + 1
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    channels: int = 32
    depth: int = 8
    max_steps: int = MAX_STEPS
    max_position_embeddings: int = LEVEL + MAX_STEPS
    eos_token_id: int | None = END
    pad_token_id: int | None = PAD
    use_cache: bool = False


class _Encoder(nn.Module):
    """Encode boards: convolutions with the board at hand at every depth, read off where the player stands and on average."""

    def __init__(self, config: SokobanConfig) -> None:
        super().__init__()
        c = config.channels
        self.first = nn.Conv2d(4, c, 3, padding=1)
        self.deeper = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(config.depth))
        self.last = nn.Linear(2 * c, config.hidden_size)

    def forward(self, planes: Tensor) -> Tensor:
        """Return (N, hidden) of boards, (N, 4, 10, 10)."""
        floor = 1 - planes[:, :1]  # so that what lies beyond the board, which is zero, is like a wall
        planes = torch.cat([floor, planes[:, 1:]], 1)[..., 1:-1, 1:-1].to(self.last.weight.dtype)  # (N, 4, 8, 8)
        x = self.first(planes)  # (N, C, 8, 8)
        for layer in self.deeper:
            x = x + layer(torch.relu(x))
        x = torch.relu(x)
        here = (x * planes[:, 3:]).sum((2, 3))  # (N, C)
        out: Tensor = self.last(torch.cat([here, x.mean((2, 3))], 1))
        return out


class SokobanForCausalLM(PreTrainedModel):
    """Give the next move after a level and the moves so far."""

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
        """Return logits, (B, L, V), which mean something from a level's last token on; with labels the loss too.

        Args:
            input_ids: (B, L) levels, each followed by moves; padded on the left.
            attention_mask: (B, L), 0 where padded.
            labels: (B, L), the tokens that the loss is over, -100 elsewhere.
        """
        given = input_ids.shape[1]
        if given < LEVEL:  # the end of a level, which is whole with what stands for floor before it
            input_ids = nn.functional.pad(input_ids, (LEVEL - given, 0), value=PAD)
            attention_mask = None
        B, L = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        start = (L - mask.sum(1, keepdim=True)).clamp(max=L - LEVEL)  # (B, 1)
        places = start + LEVEL - 1 + torch.arange(L - LEVEL + 1, device=start.device)  # (B, S): where the next move is told
        known = places < L
        places = places.clamp(max=L - 1)
        codes = input_ids.gather(1, start + CELL_PLACES.to(start.device))  # (B, 100)
        moves = (input_ids.gather(1, (places + 1).clamp(max=L - 1)) - FIRST_MOVE).clamp(0, len(MOVES) - 1)  # (B, S)

        state, to_go = State.of(codes), _ceiling(codes)  # (B,) boards and returns
        boards, returns, ends = [state.planes], [to_go], [state.solved]
        for turn in range(moves.shape[1] - 1):
            state, rewards = step(state, moves[:, turn])
            to_go = to_go - rewards
            boards, returns, ends = [*boards, state.planes], [*returns, to_go], [*ends, state.solved]
        planes, solved = torch.stack(boards, 1), torch.stack(ends, 1)  # (B, S, 4, 10, 10), (B, S)
        seen = planes.new_zeros(B, planes.shape[1], self.config.hidden_size, dtype=self.dtype)  # (B, S, H)
        seen[known] = self.see(planes[known])
        said = self._decided(seen, moves, torch.stack(returns, 1), known)  # (B, S, 4)

        next_ = said.new_full((*said.shape[:2], self.config.vocab_size), NEVER)  # (B, S, V)
        next_[..., FIRST_MOVE:END] = torch.where(solved[..., None], NEVER, said)
        next_[..., END] = torch.where(solved, 0.0, NEVER)
        row, turn_ = known.nonzero(as_tuple=True)
        logits = said.new_zeros(B, L, self.config.vocab_size)
        logits[row, places[row, turn_]] = next_[row, turn_]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits[:, -given:])

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """Return nothing: boards are encoded, tokens are not embedded."""

    def _decided(self, seen: Tensor, moves: Tensor, returns: Tensor, known: Tensor) -> Tensor:
        """Return the scores of the moves at each turn, (B, S, 4), of boards as encoded, (B, S, H)."""
        said: Tensor = self.decide(
            states=seen,
            actions=nn.functional.one_hot(moves, len(MOVES)).to(self.dtype),
            returns_to_go=returns[..., None].to(self.dtype) / REWARD_SOLVED,
            timesteps=torch.arange(seen.shape[1], device=seen.device).expand(len(seen), -1),
            attention_mask=known.long(),
        ).action_preds
        return said

    def _decided_next(self, cache: DynamicCache, seen: Tensor, last: Tensor, to_go: Tensor, turn: int) -> Tensor:
        """Return the scores of the moves at one turn, (P, 4), after the turns in the cache: as ``_decided`` does.

        The Decision Transformer itself hands no cache on, so its embeddings are put together here in its order: the move
        before, the return to go, the board.

        Args:
            cache: keys and values of the turns before; those of this one are added.
            seen: (P, H) boards as encoded.
            last: (P,) the moves before; of the first turn they do not count.
            to_go: (P,) returns to go.
            turn: which one it is, from 0.
        """
        d = self.decide
        now, before = d.embed_timestep.weight[turn], d.embed_timestep.weight[turn - 1]  # (H,) both
        tokens = [d.embed_return(to_go[:, None].to(self.dtype) / REWARD_SOLVED) + now, d.embed_state(seen) + now]
        if turn:
            tokens.insert(0, d.embed_action(nn.functional.one_hot(last, len(MOVES)).to(self.dtype)) + before)
        x = d.embed_ln(torch.stack(tokens, 1))  # (P, 2 or 3, H)
        places = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        known = torch.ones(len(x), cache.get_seq_length() + x.shape[1], dtype=torch.long, device=x.device)
        out = d.encoder(
            inputs_embeds=x, attention_mask=known, position_ids=places, past_key_values=cache, use_cache=True
        ).last_hidden_state
        said: Tensor = d.predict_action(out[:, -1])
        return said

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

        Each turn is computed once, and levels that are solved are played no further. Of the settings of transformers' own
        ``generate``, which would play from the beginning at every move, those named here count.

        Args:
            input_ids: (B, ``LEVEL``) levels.
            max_new_tokens: moves at most, fewer than ``max_steps``.
            do_sample: whether moves are drawn at random and not the likeliest taken.
            temperature: of sampling.
        """
        B, device = len(input_ids), input_ids.device
        codes = input_ids[:, CELL_PLACES.to(device)]  # (B, 100)
        state, to_go = State.of(codes), _ceiling(codes)
        playing = torch.arange(B, device=device)  # the levels that are played on, (P,)
        chosen = playing.new_zeros(B)  # (P,)
        cache = DynamicCache(config=self.decide.config)
        written = torch.full((B, max_new_tokens), PAD, device=device)
        for turn in range(max_new_tokens):
            on = ~state.solved
            written[playing[~on], turn] = END
            playing, to_go, chosen = playing[on], to_go[on], chosen[on]
            state = State(*(getattr(state, name)[on] for name in ("walls", "goals", "boxes", "player")))
            if not len(playing):
                break
            if turn and not bool(on.all()):
                cache.batch_select_indices(on.nonzero()[:, 0])
            said = self._decided_next(cache, self.see(state.planes), chosen, to_go, turn).float()  # (P, 4)
            chosen = torch.multinomial((said / temperature).softmax(-1), 1)[:, 0] if do_sample else said.argmax(-1)
            written[playing, turn] = FIRST_MOVE + chosen
            state, rewards = step(state, chosen)
            to_go = to_go - rewards
        return torch.cat([input_ids, written], 1)


def _ceiling(codes: Tensor) -> Tensor:
    """Return the most that levels give, the costs of steps aside, (B,).

    That is the return that the model is asked for. All that it learnt from are the best episodes, and the true return of
    one would tell how many moves are left.
    """
    state = State.of(codes)
    return REWARD_SOLVED + REWARD_ON_GOAL * (state.boxes & ~state.goals).sum(1)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each cell, line end and move."""
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
