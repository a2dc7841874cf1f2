"""Add what an unfinished run keeps in order to go on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(sa.Text, "postgresql")


def upgrade() -> None:
    """Add the column."""
    op.add_column("runs", sa.Column("notes", JSON))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("runs", "notes")
