"""Log-probabilities of answers: sums over their trained tokens, and over nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PairLogps", "sequence_logps"]


@dataclass(frozen=True, slots=True, eq=False)
class PairLogps:
    """What a preference loss sees of pairs: log-probabilities of both answers under the policy and the reference.

    All are float64 [P], in nats, summed over the `n_chosen` and `n_rejected` trained tokens of the answers. The
    reference's are zeros where there is no reference. `mean()` is the same per trained token.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    n_chosen: Tensor
    n_rejected: Tensor

    @property
    def ratio_chosen(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x), [P]."""
        return self.chosen - self.reference_chosen

    @property
    def ratio_rejected(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x), [P]."""
        return self.rejected - self.reference_rejected

    def mean(self) -> PairLogps:
        """The same pairs with every sum divided by the number of trained tokens it is over.

        >>> two = torch.tensor([2.0])
        >>> PairLogps(-4 * two, -3 * two, -two, -two, 2 * two, two).mean().ratio_chosen
        tensor([-1.5000])
        """
        c, r = self.n_chosen, self.n_rejected
        one = torch.ones_like(c)
        return PairLogps(self.chosen / c, self.rejected / r, self.reference_chosen / c, self.reference_rejected / r,
                         one, one)


def sequence_logps(nll: Tensor, weights: Tensor, owners: Tensor, count: int) -> Tensor:
    """``log p_k = -sum over tokens t of answer k of u_t * nll_t``, float64 [count], with nll's gradient.

    `nll`, `weights` [N], `owners` int64 [N] (the answer that a token belongs to, 0 <= k < count). A token of weight 0
    (prompt) and one that belongs to nobody (padding, which has no nll) are in no sum.

    >>> nll = torch.tensor([1.0, 2.0, 4.0, 8.0])
    >>> sequence_logps(nll, torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), 2)
    tensor([ -2., -12.], dtype=torch.float64)
    """
    values = nll.double() * -weights.double()
    return torch.zeros(count, dtype=torch.float64, device=nll.device).index_add(0, owners, values)
