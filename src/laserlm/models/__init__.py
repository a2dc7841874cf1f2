"""Load a model; find, read and write its matrices."""

from laserlm.garbage import no_collection

with no_collection():  # transformers makes a million objects when it is imported
    from laserlm.models.kinds import Kind
    from laserlm.models.language_model import LanguageModel
    from laserlm.models.loading import load, set_up_bundled
    from laserlm.models.matrices import Matrix, find_matrices, read_matrix, select, view

__all__ = ["Kind", "LanguageModel", "Matrix", "find_matrices", "load", "read_matrix", "select", "set_up_bundled", "view"]
