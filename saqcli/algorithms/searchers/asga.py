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

from saqcli.algorithms.searchers.descent import Descent
from saqcli.algorithms.searchers.descent_settings import Settings
from saqcli.algorithms.searchers.knapsack import best_choice, indifferent
from saqcli.algorithms.searchers.problem import Found, SearchProblem
from saqcli.algorithms.searchers.scoring import Scorer


class ASGA(Settings):
    """Learns shares of all options together with the weights, by sharpness-aware gradient alignment."""

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
        scorer = Scorer(problem)  # before the weights move
        descent = Descent(self, problem)
        descent.run()
        losses = descent.mixtures.losses()
        choice = best_choice(space, problem.budget, losses)
        scored = [scorer(choice)]
        return Found(choice, lambda budget: [best_choice(space, budget, losses)], scorer, scored)
