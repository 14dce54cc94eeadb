"""SAMQ: bits drawn by a controller that learns from the sharpness-aware loss of a weight-sharing supernet.

    for every epoch
        model phase         for every training batch: draw bits, one SAQ step of the supernet at them
        controller phase    for every held-out batch: draw bits b, one step of the controller on

            R(b) log pi(b) - entropy_weight * H(pi)          to be minimised; R is a cost
            R(b) = L(Q(w, b) + e) - L(Q(w, r)) + cost_weight * (c(b) / C - 1)**2

    then draw configurations that fit the budget, and take the one with the highest accuracy

``e`` is SAQ's perturbation on the same held-out batch: it reaches every searched layer. Controller phases begin after
``warmup`` epochs. Source: Liu et al., arXiv:2111.12273, section 4, Algorithm 1 and its released code.

Differs from the paper, with the way back in brackets:

- A moving average of R is subtracted (``baseline="none"``). The loss of a fixed configuration r on the same images is
  subtracted too (``reference="none"``): it does not depend on b, and takes the noise of the batch out of the reward. A
  batch is cut into parts of ``reward_images``, each for a draw of its own.
- The penalty is relative to the budget, so that one weight serves every model. The paper's is ``cost_weight`` 45 in its
  CIFAR setting and 6 for ImageNet. C is the middle of the window that is searched, and of several bounds the one counts
  of which most is used.
- Draws are repeated until one fits the budget and uses it (``within="anything"``). What is minimised is then the mean
  cost given that a draw fits; with a baseline subtracted, leaving the chance of fitting out of the gradient makes no
  difference on average. The controller starts at configurations that cost the budget (``prior="none"``), by default
  (``error``) at those with little quantization noise: evenly drawn ones spend so much on a few layers that all others
  have 2 bits, and a short search would be over before it has unlearned them.
- Every reward counts ``replay`` times, clipped as in PPO (arXiv:1707.06347), since a search is short (``replay=1``).
- Draws are compared as fine-tuning starts: from the float weights, calibrated at the draw's bits, corrections
  included (``score_in="supernet"`` compares in the trained supernet). The configuration of least quantization noise is
  compared with them. Of those within a standard error of the highest accuracy the
  one of least loss is taken.
- The released code perturbs first layer and classifier alone, and leaves the reward attached to its graph.
"""

from saqcli.algorithms.searchers.alternation import Alternation, Settings
from saqcli.algorithms.searchers.knapsack import indifferent
from saqcli.algorithms.searchers.problem import Found, SearchProblem


class SAMQ(Settings):
    """The paper's search."""

    def search(self, problem: SearchProblem) -> Found:
        """Train supernet and controller in turns, draw, score, choose."""
        space = problem.space
        space.check_reachable(problem.budget)
        if problem.budget.admits(space.ceiling):
            return indifferent(problem)
        run = Alternation(self, problem)
        run.train()
        return run.finish()
