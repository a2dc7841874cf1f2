"""The loss map of a search: the change of loss of every reduction of a single matrix that it scored, and harm of some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from statistics import median_high

from laserlm.errors import AnalysisError
from laserlm.reductions import Intervention, Size
from laserlm.scoring.records import Evaluation
from laserlm.searching.guard import Harm
from laserlm.store import RunInfo, Store
from laserlm.studies.estimates import Estimate, paired_estimates
from laserlm.studies.map_harms import stored_harms

MATRIX_ORDER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_up", "fc_out")
"""Order of the matrices as a block runs them. Other matrices come after these."""


@dataclass(frozen=True)
class LossAtRank:
    """What a search measured of one reduction of one matrix.

    Args:
        matrix: id of the matrix.
        stack: its stack of blocks, empty where the model has one stack.
        layer: 0-based block.
        name: name of the matrix within the block.
        size: kept fraction or rank with its options, as text.
        gain: gain in accuracy over the unchanged model on the same examples.
        loss_change: change of the loss on the same examples, in nats per answer token.
        harm: change of the loss on the guard where it is largest, in nats per token: the logarithm of the perplexity ratio.
            None where it was not measured on every guard.
        guard: name of this guard, empty where the harm was not measured.
    """

    matrix: str
    stack: str
    layer: int
    name: str
    size: str
    gain: Estimate
    loss_change: Estimate
    harm: Estimate | None = None
    guard: str = ""

    @property
    def intervention(self) -> str:
        """Canonical text of the reduction."""
        return f"{self.matrix}@{self.size}"


@dataclass(frozen=True)
class LossTable:
    """A loss map as blocks by matrices.

    Args:
        columns: names of the matrices.
        rows: name of each block, and a cell for each column; None where the search scored nothing.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[LossAtRank | None, ...]], ...]

    @property
    def cells(self) -> list[LossAtRank]:
        """All cells that are not None."""
        return [cell for _, row in self.rows for cell in row if cell is not None]


@dataclass(frozen=True)
class LossMap:
    """The reductions of a single matrix that a search scored on validation, by stack, block, matrix and size.

    Args:
        cells: one for each matrix and size. A race scores the candidates that it drops on few examples.
    """

    cells: tuple[LossAtRank, ...] = ()

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[LossAtRank]:
        return iter(self.cells)

    @classmethod
    def of(cls, base: Evaluation, trials: Mapping[str, Evaluation], harms: Mapping[str, Harm] | None = None) -> LossMap:
        """Compare each reduction of a single matrix with the unchanged model on the same examples.

        Args:
            base: the unchanged model on the validation split.
            trials: by canonical text; each is over the first examples of ``base``, on all or on some of them.
            harms: by canonical text, of those whose harm was measured.

        Raises:
            AnalysisError: if no trial is of a single matrix.
        """
        cells = []
        for text, trial in trials.items():
            reductions = Intervention.parse(text).reductions
            if len(reductions) != 1:
                continue
            (r,) = reductions
            layer = r.layers.first
            if layer is None or layer != r.layers.last:
                continue
            changes = paired_estimates(replace(base, scores=base.scores[: trial.n]), trial)
            matrix = stacked_name(r.stack, f"{layer}.{r.matrix}")
            harm = (harms or {}).get(text)
            measured = (
                () if harm is None else (Estimate(harm.change, harm.comparison.loss_interval, harm.comparison.n), harm.guard)
            )
            cells.append(LossAtRank(matrix, r.stack, layer, r.matrix, str(r).partition("@")[2], *changes, *measured))
        if not cells:
            raise AnalysisError(
                "the search scored no reduction of a single matrix, so there is nothing to map; search with --strategy race or "
                "exhaustive"
            )
        return cls(tuple(sorted(cells, key=lambda cell: (cell.stack, cell.layer, cell.name, cell.size))))

    @classmethod
    def read(cls, store: Store, run: str) -> LossMap:
        """Return the loss map of a search, without the trials that failed.

        Args:
            store: the results database.
            run: the search's id.

        Raises:
            AnalysisError: if the unchanged model has no scores yet, or no trial is of a single matrix.
            StoreError: if there is no such run.
        """
        done = {t.intervention for t in store.trials(run) if t.split == "validation" and t.status == "done"}
        trials = {text: trial for text, trial in store.evaluations(run, "validation").items() if text in done}
        base = trials.pop("", None)
        if base is None:
            raise AnalysisError(f"run {run} has not scored the unchanged model yet; finish it with the same 'laser search'")
        try:
            return cls.of(base, trials, stored_harms(store, store.find(run)))
        except AnalysisError as error:
            raise AnalysisError(f"run {run}: {error}") from None

    @classmethod
    def read_or_empty(cls, store: Store, run: RunInfo) -> LossMap:
        """Return the loss map of a run, empty if the run is not a search or has no map."""
        try:
            return cls.read(store, run.id) if run.kind == "search" else cls()
        except AnalysisError:  # a composition scores only sets of matrices
            return cls()

    @property
    def sizes(self) -> list[str]:
        """The sizes: first kept fractions, then ranks, both rising."""
        return sorted({cell.size for cell in self.cells}, key=_size_order)

    @property
    def matrices(self) -> list[tuple[str, str]]:
        """Stack and name of every matrix, stack by stack, in the order in which a block runs them."""
        return sorted({(cell.stack, cell.name) for cell in self.cells}, key=matrix_order)

    @property
    def colour_limit(self) -> float:
        """Change of loss, in nats per token, at which a colour scale ends on either side.

        It is the largest fall of the loss, or the median rise if that is larger. Changes that break the model would hide all
        others on a scale up to the largest rise.
        """
        return _limit([cell.loss_change.value for cell in self.cells])

    @property
    def harm_limit(self) -> float:
        """Harm, in nats per token, at which a colour scale ends on either side; see ``colour_limit``."""
        return _limit([cell.harm.value for cell in self.cells if cell.harm is not None])

    def with_harm(self) -> LossMap:
        """Return the cells whose harm was measured."""
        return LossMap(tuple(cell for cell in self.cells if cell.harm is not None))

    def at(self, size: str) -> LossMap:
        """Return the cells of one size."""
        return LossMap(tuple(cell for cell in self.cells if cell.size == size))

    def lowest(self) -> LossMap:
        """Return the cell with the lowest change of loss of each matrix."""
        best: dict[str, LossAtRank] = {}
        for cell in self.cells:
            if cell.matrix not in best or cell.loss_change.value < best[cell.matrix].loss_change.value:
                best[cell.matrix] = cell
        return LossMap(tuple(best.values()))

    def table(self, cells: Iterable[LossAtRank]) -> LossTable:
        """Arrange some cells of this map, at most one for each matrix, in all blocks by all matrices."""
        at = {(cell.stack, cell.layer, cell.name): cell for cell in cells}
        columns = self.matrices
        return LossTable(
            columns=tuple(stacked_name(stack, name) for stack, name in columns),
            rows=tuple(
                (
                    stacked_name(stack, str(layer)),
                    tuple(at.get((stack, layer, name)) if of_stack == stack else None for of_stack, name in columns),
                )
                for stack, layer in dict.fromkeys((cell.stack, cell.layer) for cell in self.cells)
            ),
        )


def stacked_name(stack: str, name: str) -> str:
    """Return a name with its stack of blocks before it, where the model has several stacks."""
    return f"{stack}.{name}" if stack else name


def matrix_order(matrix: tuple[str, str]) -> tuple[str, int, str]:
    """Return what stacks and names of matrices are sorted by: stack, then the order in which a block runs them."""
    stack, name = matrix
    return stack, MATRIX_ORDER.index(name) if name in MATRIX_ORDER else len(MATRIX_ORDER), name


def _limit(changes: Iterable[float]) -> float:
    changes = list(changes)
    rises = [change for change in changes if change > 0]
    return max([*(-change for change in changes), median_high(rises) if rises else 0.0, 1e-6])


def _size_order(text: str) -> tuple[bool, Decimal | int, str]:
    number, _, options = text.partition(":")
    size = Size.parse(number)
    return (False, size.rho, options) if size.rho is not None else (True, size.rank or 0, options)
