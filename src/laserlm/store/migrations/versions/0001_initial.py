"""Create runs, trials, examples and scores."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(sa.Text, "postgresql")
UNIQUE = "uq_trials_run_id_split_intervention"


# One call for each table, and no shared pieces: databases in use were made by these lines, so they are not changed any more.
def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "runs",
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("provenance", JSON, nullable=False),
        sa.Column("outcome", JSON),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.Column("owner_token", sa.Text),
        sa.Column("owner_host", sa.Text),
        sa.Column("owner_pid", sa.Integer),
        sa.Column("claimed", sa.DateTime(timezone=True)),
        sa.Column("heartbeat", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_runs")),
        sa.UniqueConstraint("id", name=op.f("uq_runs_id")),
    )
    op.create_index(op.f("ix_runs_key"), "runs", ["key"])
    op.create_table(
        "trials",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("run_id", sa.String(12), nullable=False),
        sa.Column("split", sa.Text, nullable=False),
        sa.Column("intervention", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("model", sa.Text),
        sa.Column("task", sa.Text),
        sa.Column("scorer", sa.Text),
        sa.Column("n", sa.Integer),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.Column("seconds", sa.Double),
        sa.Column("classes", JSON),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trials")),
        sa.UniqueConstraint("run_id", "split", "intervention", name=op.f(UNIQUE)).ddl_if(dialect="sqlite"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_trials_run_id"), ondelete="CASCADE"),
    )
    if op.get_bind().dialect.name == "postgresql":  # its indexes take no text that is some kB long
        op.create_index(op.f(UNIQUE), "trials", ["run_id", "split", sa.text("md5(intervention)")], unique=True)
    op.create_table(
        "examples",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("choices", JSON, nullable=False),
        sa.Column("group", sa.Text, nullable=False),
        sa.Column("fact", sa.Text, nullable=False),
        sa.Column("popularity", sa.Double),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_examples")),
        sa.UniqueConstraint("digest", name=op.f("uq_examples_digest")),
    )
    op.create_table(
        "scores",
        sa.Column("trial_id", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("example_id", sa.Integer, nullable=False),
        sa.Column("correct", sa.Boolean, nullable=False),
        sa.Column("logprob", sa.Double, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("predicted", sa.Text, nullable=False),
        sa.Column("answer", sa.Text),
        sa.PrimaryKeyConstraint("trial_id", "position", name=op.f("pk_scores")),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name=op.f("fk_scores_trial_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["example_id"], ["examples.id"], name=op.f("fk_scores_example_id")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_scores_example_id"), "scores", ["example_id"])


def downgrade() -> None:
    """Drop the tables."""
    for table in ("scores", "examples", "trials", "runs"):
        op.drop_table(table)
