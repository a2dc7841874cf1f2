"""The tables: runs hold trials, trials hold scores, and scores point to examples."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, DateTime, Dialect, Double, ForeignKey, Index, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

__all__ = ["Base", "ExampleRow", "RunRow", "ScoreRow", "TrialRow", "UtcDateTime"]


class UtcDateTime(TypeDecorator[datetime]):
    """Keep an aware time as UTC, also where the database knows no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC on the way in."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return an aware time; one without a zone was written by us, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class AnyText(TypeDecorator[str]):
    """Keep text also with the character NUL, which PostgreSQL refuses: it is written as two others."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Write NUL, and the character that marks it."""
        return None if value is None else value.replace("\x1a", "\x1a1").replace("\0", "\x1a0")

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the text as it was."""
        return None if value is None else value.replace("\x1a0", "\0").replace("\x1a1", "\x1a")


class AnyJson(TypeDecorator[Any]):
    """Keep JSON as Python writes it, also with NaN and infinity, which PostgreSQL's own type refuses."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Write it as text."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Read the text."""
        return None if value is None else json.loads(value)


PLAIN = JSON(none_as_null=True).with_variant(AnyJson(), "postgresql")


class Base(DeclarativeBase):
    """Root of the tables; constraints are named, so that a later migration can address them."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        str: Text().with_variant(AnyText(), "postgresql"),
        float: Double(),
        datetime: UtcDateTime(),
        dict[str, Any]: PLAIN,
        list[str]: PLAIN,
    }


class RunRow(Base):
    """A piece of work under one key, and the claim of the process that works on it."""

    __tablename__ = "runs"

    number: Mapped[int] = mapped_column(primary_key=True)  # the order of creation, whatever the clocks say
    id: Mapped[str] = mapped_column(String(12), unique=True)
    key: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    status: Mapped[str]
    reason: Mapped[str | None]
    model: Mapped[str]
    task: Mapped[str]
    settings: Mapped[dict[str, Any]]
    provenance: Mapped[dict[str, Any]]
    notes: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)  # may be large; listings do without
    outcome: Mapped[dict[str, Any] | None]
    created: Mapped[datetime]
    updated: Mapped[datetime]
    owner_token: Mapped[str | None]  # null while nobody works on the run, and so are the four below
    owner_host: Mapped[str | None]
    owner_pid: Mapped[int | None]
    claimed: Mapped[datetime | None]
    heartbeat: Mapped[datetime | None]


class TrialRow(Base):
    """One evaluation, or the reason why there is none; the figures repeat what follows from the scores."""

    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("run_id", "split", "intervention"),)  # on PostgreSQL an index, with a digest

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(String(12), ForeignKey("runs.id", ondelete="CASCADE"))
    split: Mapped[str]
    intervention: Mapped[str]
    status: Mapped[str]
    reason: Mapped[str | None]
    model: Mapped[str | None]
    task: Mapped[str | None]
    scorer: Mapped[str | None]
    n: Mapped[int | None]
    accuracy: Mapped[float | None]
    loss: Mapped[float | None]
    seconds: Mapped[float | None]
    classes: Mapped[list[str] | None]
    created: Mapped[datetime]


class ExampleRow(Base):
    """An example as it was scored; trials and runs that score the same one share the row."""

    __tablename__ = "examples"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str]  # the example's own id
    prompt: Mapped[str]
    answer: Mapped[str]
    choices: Mapped[list[str]]
    group: Mapped[str]
    fact: Mapped[str]
    popularity: Mapped[float | None]
    more: Mapped[dict[str, Any] | None]  # the other fields, those that are not as they are by default


class ScoreRow(Base):
    """How one trial did on one example."""

    __tablename__ = "scores"
    # The index lets SQLite check the foreign key without reading all scores; without a rowid the rows are stored once.
    __table_args__ = (Index(None, "example_id"), {"sqlite_with_rowid": False})

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    example_id: Mapped[int] = mapped_column(ForeignKey("examples.id"))
    correct: Mapped[bool]
    logprob: Mapped[float]
    tokens: Mapped[int]
    predicted: Mapped[str]
    answer: Mapped[str | None]  # null where it is the example's
    figures: Mapped[dict[str, Any] | None]
