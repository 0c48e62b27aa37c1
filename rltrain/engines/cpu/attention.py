"""Attention of sequences that share prompts, whose keys and values are stored and read once."""

from __future__ import annotations

import torch

from rltrain.engines.cpu.products import fewest_in_batch

WIDTH_STEP = 32
"""Prompts are padded to a multiple, so that other prompts move no number to another vector lane."""

FIRST_STEPS = 32


def padded(length: int) -> int:
    """Return the width that prompts of at most `length` tokens are padded to."""
    return -(-length // WIDTH_STEP) * WIDTH_STEP


class SharedPrompts:
    """Keys and values per layer of P prompts, and of the tokens that N sequences have added.

    Heads come first. Scores over prompts are products of one prompt's keys with the queries of all
    its sequences, in a batch of `groups * P`. The sequences' own keys are multiplied row by row.
    One softmax runs over both.
    """

    def __init__(
        self,
        lengths: torch.Tensor,
        prompt_of_N: torch.Tensor,
        layers: int,
        groups: int,
        repeats: int,
        head_dim: int,
    ) -> None:
        self.width = padded(int(lengths.max()))
        self.steps = 0
        self._groups, self._repeats, self._head_dim = groups, repeats, head_dim
        prompts, device = len(lengths), lengths.device
        self._prompts = [self._new(prompts, self.width, device) for _ in range(layers)]
        self._sampled = [self._new(len(prompt_of_N), FIRST_STEPS, device) for _ in range(layers)]
        self._bias = torch.zeros(prompts, self.width, device=device)
        self._bias.masked_fill_(
            torch.arange(self.width, device=device) >= lengths[:, None], -torch.inf
        )
        self._arrange(prompt_of_N)

    def _new(
        self, rows: int, tokens: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zeroed keys and values, `[groups, rows, tokens, D]` each.

        They are zeroed because masked values must be finite.
        """
        size = self._groups, rows, tokens, self._head_dim
        return torch.zeros(size, device=device), torch.zeros(size, device=device)

    def store(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store keys and values, `[P', groups, <= width, D]`, of the prompts from `start` on."""
        for cache, new in zip(self._prompts[layer], (key, value), strict=True):
            cache[:, start : start + len(new), : new.shape[2]] = new.transpose(0, 1)

    def grow(self) -> None:
        """Make room for one more token of every sequence."""
        room = self._sampled[0][0].shape[2]
        if self.steps == room:
            self._sampled = [
                (
                    torch.cat([key, torch.zeros_like(key)], dim=2),
                    torch.cat([value, torch.zeros_like(value)], dim=2),
                )
                for key, value in self._sampled
            ]
        self.steps += 1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Store the new token's key and value and return its attention output, `[N, H * D]`.

        `query` is `[N, H, D]`; `key` and `value` are `[N, groups, D]`.
        """
        groups, rows, dim = self._groups, query.shape[0], self._head_dim
        keys, values = (cache[:, :, : self.steps] for cache in self._sampled[layer])
        keys[:, :, -1], values[:, :, -1] = key.transpose(0, 1), value.transpose(0, 1)
        prompt_key, prompt_value = self._prompts[layer]
        query = query.view(rows, groups, self._repeats * dim).transpose(0, 1).contiguous()
        shared = self._to_grid(query).view(-1, self._per_prompt * self._repeats, dim)
        scores = torch.bmm(shared, prompt_key.flatten(0, 1).transpose(1, 2))
        scores = self._to_rows(scores.view(groups, -1, self._repeats * self.width)).view(
            groups, rows, -1, self.width
        )
        query = query.view(groups * rows, self._repeats, dim)
        sampled = torch.bmm(query, keys.flatten(0, 1).transpose(1, 2)).view(
            groups, rows, self._repeats, -1
        )
        weights = torch.cat([scores + self._bias_N, sampled], dim=-1).softmax(dim=-1)
        to_prompt = weights[..., : self.width].reshape(groups, rows, -1)
        shared = self._to_grid(to_prompt).view(-1, self._per_prompt * self._repeats, self.width)
        mixed = torch.bmm(shared, prompt_value.flatten(0, 1)).view(groups, -1, self._repeats * dim)
        mixed = torch.baddbmm(
            self._to_rows(mixed).view(groups * rows, self._repeats, dim),
            weights[..., self.width :].reshape(groups * rows, self._repeats, -1),
            values.flatten(0, 1),
        )
        return mixed.view(groups, rows, -1).transpose(0, 1).flatten(1)

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these sequences and their prompts only."""
        prompts, prompt_of_N = self._prompt_of_N[rows].unique(return_inverse=True)
        self._sampled = [
            (key.index_select(1, rows), value.index_select(1, rows)) for key, value in self._sampled
        ]
        if len(prompts) < self._bias.shape[0]:
            self._prompts = [
                (key.index_select(1, prompts), value.index_select(1, prompts))
                for key, value in self._prompts
            ]
            self._bias = self._bias[prompts]
        self._arrange(prompt_of_N)

    def _arrange(self, prompt_of_N: torch.Tensor) -> None:
        """Assign each sequence a cell in a grid with a row per prompt.

        A row has as many cells as the prompt with the most sequences needs.
        """
        self._prompt_of_N = prompt_of_N
        counts = torch.bincount(prompt_of_N, minlength=self._bias.shape[0])
        first = counts.cumsum(0) - counts
        rank = torch.arange(len(prompt_of_N), device=prompt_of_N.device) - first[prompt_of_N]
        self._per_prompt = max(fewest_in_batch(self._head_dim), int(counts.max()))
        self._cell_of_N = prompt_of_N * self._per_prompt + rank
        grid = self._bias.shape[0] * self._per_prompt
        self._full = grid == len(prompt_of_N)
        self._row_at = torch.zeros(grid, dtype=torch.long, device=prompt_of_N.device)
        self._row_at[self._cell_of_N] = torch.arange(len(prompt_of_N), device=prompt_of_N.device)
        self._bias_N = self._bias[prompt_of_N][:, None]

    def _to_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """`[groups, N, ...]` -> `[groups, P * cells, ...]`; unused cells repeat a sequence."""
        return rows if self._full else rows.index_select(1, self._row_at)

    def _to_rows(self, grid: torch.Tensor) -> torch.Tensor:
        return grid if self._full else grid.index_select(1, self._cell_of_N)
