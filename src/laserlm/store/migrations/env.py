"""Run the migrations on the connection that ``laserlm.store.database`` has opened, inside its transaction.

A change of ``laserlm.store.schema`` needs a further file in ``versions``; a test compares the two. On SQLite foreign
keys are enforced here: dropping a table in order to rebuild it would delete what points to it.
"""

from alembic import context

from laserlm.store.schema import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
