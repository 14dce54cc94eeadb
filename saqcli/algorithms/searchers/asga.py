"""Bits by gradient descent, where the loss is low and stays low nearby: a search meant for another data set's network.

Every free layer computes with all its options at once, see ``mixture``. Weights w and logits A descend together, on
the loss L and on the loss at a perturbed point, and on what exceeds the budget:

    pass 1    L, g = dL/dp,  p the mixed quantized weights, biases and norm parameters
    ascent    e = (rho / ||s g|| - a) s**2 g,  s the deviation of a layer's weights, 1 for the rest; see ``sharpness``
    pass 2    L_p = L at p + e, batch statistics frozen
    update    1/2 grad L + 1/2 grad L_p  to w and A,  and to A once
              lambda sum_k max(0, E[c_k] / C_k - 1)**2 + 0.001 E[c_k] / C_k,  k over the bounds C_k of the budget
    radius    rho = clip(ln(1 + h), rho_min, rho_max) for the next step,  h = max(0, L_p - L), a running mean

The expected cost is that of the options by their shares: at settled shares it is what the choice costs, exactly.
Lambda rises from 0 over the first tenth of the steps, learning rates fall to 0 along a cosine. In the end the choice is
the likeliest that the budget admits: the least sum of -log p_o, by an exact knapsack. Where the likeliest option of
every decision fits and uses the budget, it is that.

Sources: the idea, the radius and the proxy set are those of "Learning from Loss Landscape: Generalizable
Mixed-Precision Quantization via Adaptive Sharpness-Aware Gradient Aligning" (ASGA, arXiv:2505.04877), of which no full
text was at hand. The update is that of SAGM (Wang et al., CVPR 2023, arXiv:2303.10353), as released; mixtures as in
EdMIPS (arXiv:2004.05795).

Differs from ASGA:

- rho does not fall below ``rho_min``: to first order h = rho ||g||, so that ln(1 + h) alone shrinks to 0 wherever
  ||g|| < 1. Of h the running mean is taken.
- rho is in units of weight deviations, and the perturbation is added to quantized weights, as in SAQ.
- The exact knapsack takes the place of lowering bits one by one until the budget is met.
- Logits have an optimizer of their own, Adam, and steps are on few images: less than an epoch does, not 90.
- ``bilevel`` learns weights on some images and logits on others, an epoch of each in turn (DARTS, arXiv:1806.09055,
  takes turns at every step).
"""

from typing import get_args

from saqcli.algorithms.options import check_choice, check_count, check_flag, check_number
from saqcli.algorithms.searchers.descent import Align, Descent, Settings
from saqcli.algorithms.searchers.knapsack import best_choice, indifferent
from saqcli.algorithms.searchers.problem import Found, SearchProblem
from saqcli.algorithms.searchers.supernet import Scorer
from saqcli.algorithms.sharpness import RadiusUnit
from saqcli.errors import ConfigError


class ASGA:
    """Learns shares of all options together with the weights, by sharpness-aware gradient alignment.

    The arguments are those of ``Settings``.

    Raises:
        ConfigError: a word that is not among an option's choices, or a number out of range.
    """

    def __init__(
        self,
        *,
        epochs: float = 0.25,
        step_images: int = 32,
        rho_min: float = 0.01,
        rho_max: float = 0.1,
        rho_unit: RadiusUnit = "deviation",
        alignment: float = 1e-3,
        align: Align = "sagm",
        cost_weight: float = 3.0,
        logit_lr: float = 0.1,
        temperature_end: float = 1.0,
        bilevel: bool = False,
    ) -> None:
        check_number("epochs", epochs, 0)
        if not epochs:
            raise ConfigError(f"epochs {epochs!r} is not possible: give more than 0")
        for option, value, least in (
            ("rho_min", rho_min, 0),
            ("rho_max", rho_max, rho_min),
            ("alignment", alignment, 0),
            ("cost_weight", cost_weight, 0),
            ("logit_lr", logit_lr, 0),
            ("temperature_end", temperature_end, 0.01),
        ):
            check_number(option, value, least)
        check_count("step_images", step_images)
        check_flag("bilevel", bilevel)
        check_choice("rho_unit", rho_unit, get_args(RadiusUnit))
        check_choice("align", align, get_args(Align))
        self.settings = Settings(
            epochs=epochs,
            step_images=step_images,
            rho_min=rho_min,
            rho_max=rho_max,
            rho_unit=rho_unit,
            alignment=alignment,
            align=align,
            cost_weight=cost_weight,
            logit_lr=logit_lr,
            temperature_end=temperature_end,
            bilevel=bilevel,
        )

    def search(self, problem: SearchProblem) -> Found:
        """Train shares and weights, then take the likeliest choice; where all fits, that, without training.

        Raises:
            InfeasibleBudget: no configuration meets the budget.
            TrainingDiverged: the loss is no finite number.
            Interrupted: asked to stop; the memory holds what was done.
        """
        space = problem.space
        space.check_reachable(problem.budget)
        if problem.budget.admits(space.ceiling):
            return indifferent(problem)
        descent = Descent(self.settings, problem)
        descent.run()
        losses = descent.mixtures.losses()
        descent.mixtures.remove()
        scorer = Scorer(descent.supernet)
        choice = best_choice(space, problem.budget, losses)
        scored = [scorer(choice)]
        return Found(choice, lambda budget: [best_choice(space, budget, losses)], scorer, scored)
