"""Preference losses: pure functions from log-probabilities of pairs to one loss per pair, divided by nothing.

x is the prompt, w the chosen ("won") answer and l the rejected one. ``s`` is the log-probability of an answer summed
over its trained tokens, ``r = s - s_ref`` its log-ratio to the reference, ``delta = r_w - r_l``. n is a number of
trained tokens. Prompt and padding are in none of them. All arguments and results are float64 [P]; the mean over the
pairs of a whole optimiser step is taken by `chatloss.step`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from chatloss.errors import RecipeError
from chatloss.loss.sequence import PairLogps

__all__ = ["ALIASES", "LOSSES", "LossOptions", "PreferenceLoss", "find", "kto"]


@dataclass(frozen=True, slots=True)
class LossOptions:
    """`beta` scales rewards (tau of IPO, lambda of ORPO), `label_smoothing` is the share of labels that are wrong,
    `gamma` SimPO's target margin."""

    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0


def sigmoid(pairs: PairLogps, options: LossOptions) -> Tensor:
    """DPO: ``-log sigmoid(beta * delta)`` (Rafailov et al. 2023, eq. 7).

    Label smoothing e gives conservative DPO, ``-(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta)``
    (Mitchell 2023).

    >>> pair = [torch.tensor([value], dtype=torch.float64) for value in (-10.0, -12.0, -11.0, -11.0, 4.0, 3.0)]
    >>> sigmoid(PairLogps(*pair), LossOptions(beta=0.5))
    tensor([0.3133], dtype=torch.float64)
    """
    return _smoothed(options.beta * (pairs.ratio_chosen - pairs.ratio_rejected), options.label_smoothing)


def sigmoid_norm(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Length-normalised DPO: ``-log sigmoid(beta (r_w / n_w - r_l / n_l))`` (Lambert et al. 2024, Tulu 3)."""
    return sigmoid(pairs.mean(), options)


def robust(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Robust DPO: ``(-(1 - e) log sigmoid(beta delta) + e log sigmoid(-beta delta)) / (1 - 2e)``.

    Unbiased where a share e < 1/2 of the labels is flipped (Chowdhury et al. 2024). May be negative.
    """
    logits, e = options.beta * (pairs.ratio_chosen - pairs.ratio_rejected), options.label_smoothing
    return (-(1 - e) * logsigmoid(logits) + e * logsigmoid(-logits)) / (1 - 2 * e)


def hinge(pairs: PairLogps, options: LossOptions) -> Tensor:
    """``max(0, 1 - beta * delta)`` (Zhao et al. 2023, SLiC, in the normalised form of Liu et al. 2024, RSO)."""
    return relu(1 - options.beta * (pairs.ratio_chosen - pairs.ratio_rejected))


def ipo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """IPO on sums: ``(delta - 1 / (2 beta))^2`` (Azar et al. 2024, eq. 17; beta is their tau).

    The paper's form, and OpenRLHF's. TRL's "ipo" is `ipo_mean`.
    """
    return (pairs.ratio_chosen - pairs.ratio_rejected - 1 / (2 * options.beta)) ** 2


def ipo_mean(pairs: PairLogps, options: LossOptions) -> Tensor:
    """IPO on length averages: ``(r_w / n_w - r_l / n_l - 1 / (2 beta))^2``, as TRL computes "ipo"."""
    return ipo(pairs.mean(), options)


def simpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """SimPO: ``-log sigmoid(beta (s_w / n_w - s_l / n_l) - gamma)``, without a reference (Meng et al. 2024, eq. 6)."""
    mean = pairs.mean()
    return _smoothed(options.beta * (mean.chosen - mean.rejected) - options.gamma, options.label_smoothing)


def cpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """CPO's preference term: ``-log sigmoid(beta (s_w - s_l))``, without a reference (Xu et al. 2024).

    The paper adds the NLL of chosen answers, which here is a term of its own with a denominator of its own.
    """
    return _smoothed(options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing)


def orpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """ORPO's odds-ratio term: ``-beta log sigmoid(log odds_w - log odds_l)`` (Hong et al. 2024).

    ``odds = p / (1 - p)`` with ``p = exp(s / n)``, the geometric mean of the answer's token probabilities; beta is
    their lambda. The NLL of chosen answers is a term of its own. Infinite where an answer is certain (p = 1).
    """
    mean = pairs.mean()
    odds = (mean.chosen - mean.rejected) - (_log1mexp(mean.chosen) - _log1mexp(mean.rejected))
    return -options.beta * logsigmoid(odds)


def apo_zero(pairs: PairLogps, options: LossOptions) -> Tensor:
    """APO-zero: ``1 - sigmoid(beta r_w) + sigmoid(beta r_l)``: chosen up, rejected down (D'Oosterlinck et al. 2024).

    The paper leaves out the constant 1, which keeps the loss positive.
    """
    return torch.sigmoid(-options.beta * pairs.ratio_chosen) + torch.sigmoid(options.beta * pairs.ratio_rejected)


def apo_down(pairs: PairLogps, options: LossOptions) -> Tensor:
    """APO-down: ``sigmoid(beta r_w) + 1 - sigmoid(beta delta)``: both down, rejected further (D'Oosterlinck 2024)."""
    delta = pairs.ratio_chosen - pairs.ratio_rejected
    return torch.sigmoid(options.beta * pairs.ratio_chosen) + torch.sigmoid(-options.beta * delta)


def kto(
    ratios: Tensor, desirable: Tensor, baseline: Tensor | float, beta: float, desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: ``lambda_D (1 - sigmoid(beta (r - z0)))`` for a desirable answer, ``lambda_U (1 - sigmoid(beta (z0 - r)))``
    for an undesirable one (Ethayarajh et al. 2024).

    `ratios` [A] are the log-ratios r of single answers and `desirable` bool [A]. `baseline` is z0 >= 0, an estimate of
    the KL divergence to the reference, through which no gradient flows. It couples the batch: it belongs to the whole
    global batch, and is never computed here.

    >>> kto(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), 1.0, beta=1.0)
    tensor([0.2689, 0.7311])
    """
    good = desirable.to(ratios.dtype)
    weight = desirable_weight * good + undesirable_weight * (1 - good)
    return weight * torch.sigmoid(beta * (1 - 2 * good) * (ratios - baseline))


def _smoothed(logits: Tensor, e: float) -> Tensor:
    return -(1 - e) * logsigmoid(logits) - e * logsigmoid(-logits)


def _log1mexp(a: Tensor) -> Tensor:
    """``log(1 - exp(a))`` for a <= 0, exact at both ends (Maechler 2012)."""
    small = a > -math.log(2.0)
    # The branch that is not taken must not see what it cannot compute: its NaN would be multiplied by 0.
    near, far = torch.where(small, a, -1.0), torch.where(small, -1.0, a)
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A loss by name: its function, default beta, and what it needs.

    `reference`: it compares with a reference model. `mean`: it looks at log-probabilities per token, and so do the
    rewards that are reported. `nll` is the coefficient that the paper gives to the NLL of chosen answers. `options`
    names what may be set besides beta.
    """

    function: Callable[[PairLogps, LossOptions], Tensor]
    beta: float
    reference: bool = True
    mean: bool = False
    nll: float = 0.0
    options: tuple[str, ...] = ()


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid, 0.1, options=("label_smoothing",)),
    "sigmoid_norm": PreferenceLoss(sigmoid_norm, 5.0, mean=True, options=("label_smoothing",)),
    "robust": PreferenceLoss(robust, 0.1, options=("label_smoothing",)),
    "hinge": PreferenceLoss(hinge, 0.1),
    "ipo": PreferenceLoss(ipo, 0.1),
    "ipo_mean": PreferenceLoss(ipo_mean, 0.1, mean=True),
    "apo_zero": PreferenceLoss(apo_zero, 0.1),
    "apo_down": PreferenceLoss(apo_down, 0.1),
    "simpo": PreferenceLoss(simpo, 2.0, reference=False, mean=True, options=("label_smoothing", "gamma")),
    "cpo": PreferenceLoss(cpo, 0.1, reference=False, nll=1.0, options=("label_smoothing",)),
    "orpo": PreferenceLoss(orpo, 0.1, reference=False, mean=True, nll=1.0),
}
# Other names in use -> the name here.
ALIASES = {"dpo": "sigmoid", "cdpo": "sigmoid", "rdpo": "robust", "slic": "hinge", "ipo_sum": "ipo",
           "ipo_avg": "ipo_mean", "dpo_norm": "sigmoid_norm", "ln_dpo": "sigmoid_norm"}


def find(name: str, where: str = "dpo.loss", beside: tuple[str, ...] = ()) -> str:
    """The name in `LOSSES` (or "kto") that `name` means; raises `RecipeError` with the nearest known names.

    `beside` names what else may stand at `where`, for the hint.

    >>> find("DPO"), find("APO-zero")
    ('sigmoid', 'apo_zero')
    >>> find("simpoo")
    Traceback (most recent call last):
    chatloss.errors.RecipeError: error: 'simpoo' is not known
      --> dpo.loss
    hint: did you mean 'simpo'?
    """
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    key = ALIASES.get(key, key)
    if key in LOSSES or key == "kto":
        return key
    near = difflib.get_close_matches(key, [*LOSSES, "kto", *ALIASES, *beside], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join([*beside, *LOSSES, 'kto'])}"
    raise RecipeError(f"{name!r} is not known", where=where, hint=hint)
