"""Save a reduced or compressed model, dense or as factors; check what was saved."""

from laserlm.export.check import Loaded, Reproduced, load_check, reproduce
from laserlm.export.checkpoint import Saved, read_record
from laserlm.export.compression import Compressed, compress
from laserlm.export.saving import push, save

__all__ = ["Compressed", "Loaded", "Reproduced", "Saved", "compress", "load_check", "push", "read_record", "reproduce", "save"]
