"""Detection of `torch.export`, which takes operators apart."""

import torch


def is_exporting() -> bool:
    """Return whether `torch.export` traces this call, which takes operators apart; False within `torch.compile`.

    Dynamo of PyTorch 2.8 to 2.10 answers True to `torch.compiler.is_exporting` within `torch.compile` too, so that the flag
    behind that function is read.
    """
    return torch.compiler._is_exporting_flag
