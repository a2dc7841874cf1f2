"""Add what scorers measure in addition to right or wrong, and what examples hold in addition to prompt and answer."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(sa.Text, "postgresql")


def upgrade() -> None:
    """Add the columns."""
    op.add_column("scores", sa.Column("figures", JSON))
    op.add_column("examples", sa.Column("more", JSON))


def downgrade() -> None:
    """Drop the columns."""
    op.drop_column("scores", "figures")
    op.drop_column("examples", "more")
