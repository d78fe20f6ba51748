"""How clearly a sample is misclassified."""

import torch
from torch import Tensor


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Mean of max over j != y of z_j - z_y: above zero where a sample is misclassified, and without a bound.

    Args:
        logits: (n, classes), at least two classes.
        y: Labels (n,).

    Source:
        Carlini and Wagner, S&P 2017, arXiv:1608.04644, section V-A, f_6 without its floor, as PGD takes it for
        CW-infinity (Madry et al., ICLR 2018, section 5.1).
    """
    labelled = torch.arange(logits.shape[1], device=logits.device) == y.unsqueeze(1)
    others = torch.where(labelled, -torch.inf, logits).amax(1)
    return (others - logits.gather(1, y.unsqueeze(1)).squeeze(1)).mean()
