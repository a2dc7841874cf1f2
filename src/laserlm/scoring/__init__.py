"""Score a model on examples: scorers, intervals and paired tests.

Nothing is imported here: reading recorded scores needs no torch.
"""
