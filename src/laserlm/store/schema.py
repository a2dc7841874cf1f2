"""The tables: runs hold trials, trials hold scores, and scores point to examples."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, DateTime, Dialect, Double, ForeignKey, Index, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time, stored in UTC, for databases with and without time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert the time to UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return an aware time; times without a zone were stored in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class AnyText(TypeDecorator[str]):
    """Text that may contain NUL, which PostgreSQL rejects; NUL is stored as two other characters."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Escape NUL and the escape character."""
        return None if value is None else value.replace("\x1a", "\x1a1").replace("\0", "\x1a0")

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the original text."""
        return None if value is None else value.replace("\x1a0", "\0").replace("\x1a1", "\x1a")


class AnyJson(TypeDecorator[Any]):
    """JSON that may contain NaN and infinity, which PostgreSQL's own type rejects."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the value as JSON text."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Parse the JSON text."""
        return None if value is None else json.loads(value)


JSON_VALUE = JSON(none_as_null=True).with_variant(AnyJson(), "postgresql")


class Base(DeclarativeBase):
    """Base class of the tables; constraints have names so that migrations can refer to them."""

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
        dict[str, Any]: JSON_VALUE,
        list[str]: JSON_VALUE,
    }


class RunRow(Base):
    """A piece of work under one key, and the claim of its process."""

    __tablename__ = "runs"

    number: Mapped[int] = mapped_column(primary_key=True)  # order of creation, independent of clocks
    id: Mapped[str] = mapped_column(String(12), unique=True)
    key: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    status: Mapped[str]
    reason: Mapped[str | None]
    model: Mapped[str]
    task: Mapped[str]
    settings: Mapped[dict[str, Any]]
    provenance: Mapped[dict[str, Any]]
    notes: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)  # may be large; not loaded for listings
    outcome: Mapped[dict[str, Any] | None]
    created: Mapped[datetime]
    updated: Mapped[datetime]
    owner_token: Mapped[str | None]  # this and the four columns below are null without a claim
    owner_host: Mapped[str | None]
    owner_pid: Mapped[int | None]
    claimed: Mapped[datetime | None]
    heartbeat: Mapped[datetime | None]


class TrialRow(Base):
    """One evaluation, or the reason of its failure; the numbers are computed from the scores."""

    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("run_id", "split", "intervention"),)  # PostgreSQL: an index with a digest

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
    """An example as it was scored; all trials that score the same example share the row."""

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
    more: Mapped[dict[str, Any] | None]  # other fields that differ from their defaults


class ScoreRow(Base):
    """The score of one example in one trial."""

    __tablename__ = "scores"
    # The index lets SQLite check the foreign key without a scan of all scores. Without a rowid, rows are stored once.
    __table_args__ = (Index(None, "example_id"), {"sqlite_with_rowid": False})

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    example_id: Mapped[int] = mapped_column(ForeignKey("examples.id"))
    correct: Mapped[bool]
    logprob: Mapped[float]
    tokens: Mapped[int]
    predicted: Mapped[str]
    answer: Mapped[str | None]  # null if it is the example's answer
    figures: Mapped[dict[str, Any] | None]
