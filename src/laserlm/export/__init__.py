"""Save a reduced or compressed model, dense or as factors; check and rebuild saved models."""

from laserlm.export.check import LoadCheck, Reproduction, load_check, reproduce
from laserlm.export.checkpoint import SavedModel
from laserlm.export.compression import CompressionResult, compress
from laserlm.export.record import read_record
from laserlm.export.saving import push, save

__all__ = [
    "CompressionResult",
    "LoadCheck",
    "Reproduction",
    "SavedModel",
    "compress",
    "load_check",
    "push",
    "read_record",
    "reproduce",
    "save",
]
